"""The numerics on a hundred million float32 normals: seconds, and peak memory beyond the input.

    python benchmarks/numerics_speed.py --json benchmarks/results/numerics_speed.json
    python benchmarks/numerics_speed.py --size 10000000 --only nearest

Each case runs in a process of its own, so that the peak memory is its own. The peak includes what the case returns; the
bytes of that are given too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from onnxshrink.numerics.clusters import kmeans_1d, kmeans_rows, nearest, nearest_rows
from onnxshrink.numerics.distribution import codes_of, distinct_values, distribution
from onnxshrink.numerics.grids import encode, fit_grid
from onnxshrink.numerics.masks import keep_largest, n_m_mask
from onnxshrink.numerics.patterns import Pattern, expand_units, scores

Array = np.ndarray[Any, np.dtype[Any]]
_MEBI = 1 << 20


def _exact_codes(weights: Array) -> Array:
    codebook = distinct_values(weights, 256)
    if codebook is None:
        raise ValueError("more than 256 values")
    return codes_of(weights, codebook)


def _block_mask(weights: Array) -> Array:
    pattern = Pattern.parse("1x4")
    return expand_units(keep_largest(scores(weights, pattern), 0.5), pattern, weights.shape)


def _grid_codes(weights: Array, bits: int) -> Array:
    return encode(weights, fit_grid(weights, bits))


def _row_codes(weights: Array, k: int) -> Array:
    return nearest_rows(weights, kmeans_rows(weights, k))


CASES: dict[str, Callable[[Array], Any]] = {
    "distinct_values": lambda weights: distinct_values(weights, 256),
    "distinct_values and codes_of, 256 values": _exact_codes,
    "distribution": distribution,
    "distribution, 256 values": distribution,
    "kmeans_1d k=16 with sketch": lambda weights: kmeans_1d(weights, 16),
    "kmeans_1d k=256 with sketch": lambda weights: kmeans_1d(weights, 256),
    "nearest k=16": lambda weights: nearest(weights, np.linspace(-3, 3, 16)),
    "nearest k=256": lambda weights: nearest(weights, np.linspace(-4, 4, 256)),
    "kmeans_rows and nearest_rows k=16": lambda weights: _row_codes(weights, 16),
    "fit_grid and encode, 4 bits": lambda weights: _grid_codes(weights, 4),
    "fit_grid and encode, 8 bits": lambda weights: _grid_codes(weights, 8),
    "keep_largest 50 %": lambda weights: keep_largest(weights, 0.5),
    "scores and masks of 1x4 blocks, 50 %": _block_mask,
    "n_m_mask 2:4": lambda weights: n_m_mask(weights, 2, 4),
}


def main() -> None:
    """Runs the cases that are asked for and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=100_000_000, help="how many weights, about")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--case", choices=list(CASES), help=argparse.SUPPRESS)  # how it calls itself
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(_measure(arguments.case, arguments.size)))
        return
    results = {}
    for name in (name for name in CASES if arguments.only in name):
        command = [sys.executable, __file__, "--case", name, "--size", str(arguments.size)]
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        results[name] = json.loads(answer.stdout)
        line = "{seconds:8.2f} s  +{peak_mib:5.0f} MiB at the peak, {returned_mib:4.0f} MiB returned"
        print(f"{name:42s}{line.format(**results[name])}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": _machine(arguments.size), "cases": results}, indent=1) + "\n")


def _measure(name: str, size: int) -> dict[str, float]:
    """Returns the seconds of one case and the mebibytes it needed beyond its input."""
    weights = _weights(size, of_few_values="256 values" in name)
    weights.flags.writeable = False
    CASES[name](weights[:8])  # what is done once, such as loading code, is not measured
    before, start = _peak_bytes(), time.perf_counter()
    answer = CASES[name](weights)
    seconds = time.perf_counter() - start
    return {
        "seconds": round(seconds, 3),
        "peak_mib": round((_peak_bytes() - before) / _MEBI, 1),
        "returned_mib": round(getattr(answer, "nbytes", 0) / _MEBI, 1),
    }


def _weights(size: int, of_few_values: bool) -> Array:
    """Returns float32 normals, as square a matrix as can be; rounded to 256 values at most if there shall be few."""
    side = math.isqrt(size)
    weights = np.random.default_rng(0).standard_normal((side, size // side), dtype=np.float32)
    if of_few_values:
        weights *= 20
        np.clip(np.rint(weights, out=weights), -127, 127, out=weights)
        weights *= np.float32(1 / 7)
    return weights


def _peak_bytes() -> int:
    """Returns the most memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _machine(size: int) -> dict[str, Any]:
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    return {"weights": size, "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), **versions}


if __name__ == "__main__":
    main()
