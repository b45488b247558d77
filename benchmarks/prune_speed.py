"""Pruning with repair: seconds and peak memory for matrices of several sizes, and the error that each method leaves.

    python benchmarks/prune_speed.py --json benchmarks/results/prune_speed.json
    python benchmarks/prune_speed.py --only 4096
    python benchmarks/prune_speed.py --model model.onnx --calib calib.npz --only methods --json methods.json

Weights are normal; inputs are mixtures of fewer sources than columns, through a ReLU, with energies that differ from column to
column: correlated, not negative, ill-conditioned, as those of layers are. With --model the layers are those of a real one. Each
case of speed runs in a process of its own, so that the peak memory is its own. Errors are decibels of the squared error of the outputs
over the squared outputs: 10 log10(trace(D H D^T) / trace(W H W^T)), mean over the layers.
A file of results is added to.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from onnxshrink.numerics.masks import choose
from onnxshrink.numerics.patterns import Pattern
from onnxshrink.numerics.pruning import prune
from onnxshrink.numerics.refit import error_of_rows, refit
from onnxshrink.numerics.saliency import Criterion, additive, saliency
from onnxshrink.numerics.sweep import prune_with_feedback

Array = np.ndarray[Any, np.dtype[Any]]
Method = Callable[[Array, Array, Pattern, float | None], Array]
_MEBI = 1 << 20

SIZES = [(64, 576), (256, 576), (384, 1536), (1536, 384), (1024, 1024), (4096, 4096)]
Settings = list[tuple[str, float | None]]
SETTINGS: Settings = [("unstructured", 0.5), ("unstructured", 0.7), ("unstructured", 0.8), ("2:4", None), ("4x1", 0.5)]
SPEEDS: Settings = [("unstructured", 0.5), ("2:4", None), ("4x1", 0.5)]


def _by(criterion: Criterion, refitted: bool) -> Method:
    def method(matrix: Array, grams: Array, pattern: Pattern, share: float | None) -> Array:
        mask = choose(saliency(matrix, criterion, grams), pattern, share, norm=additive(criterion))
        return refit(matrix, grams, mask) if refitted else np.where(mask, matrix, 0.0)

    return method


def _sweep(matrix: Array, grams: Array, pattern: Pattern, share: float | None, refitted: bool = False) -> Array:
    parts = np.split(matrix, len(grams))
    swept = np.concatenate([prune_with_feedback(part, gram, pattern, share) for part, gram in zip(parts, grams, strict=True)])
    return refit(matrix, grams, swept != 0, swept) if refitted else swept


METHODS: dict[str, Method] = {
    "magnitude": _by("magnitude", False),
    "magnitude, refit": _by("magnitude", True),
    "wanda, refit": _by("wanda", True),
    "obs, refit": _by("obs", True),
    "sweep": _sweep,
    "sweep, refit": lambda matrix, grams, pattern, share: _sweep(matrix, grams, pattern, share, refitted=True),
    "prune": prune,
}


def main() -> None:
    """Runs the cases that are asked for and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--model", type=Path, help="whose layers the methods are compared on")
    parser.add_argument("--calib", type=Path, help="its calibration inputs")
    parser.add_argument("--layers", type=int, default=1000, help="how many of its layers, spread evenly")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # how it calls itself
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(_measure(arguments.case)))
        return
    known = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else {"speed": {}, "methods": {}}
    results: dict[str, Any] = {**known, "machine": _machine()}
    for name in (name for name in _names() if arguments.only in name):
        answer = subprocess.run([sys.executable, __file__, "--case", name], check=True, stdout=subprocess.PIPE)
        results["speed"][name] = json.loads(answer.stdout)
        line = "{seconds:8.2f} s ({cpu_seconds:.2f} s of a core)  +{peak_mib:5.0f} MiB  {error_db:.2f} dB, magnitude {magnitude_db:.2f} dB"
        print(f"{name:32s}{line.format(**results['speed'][name])}", flush=True)
    if arguments.only in "methods":
        layers = list(_layers(arguments.model, arguments.calib, arguments.layers) if arguments.model else _drawn())
        table = results["methods"][f"{arguments.model.parent.name if arguments.model else 'drawn'}, {len(layers)} layers"] = {}
        for pattern, share in SETTINGS:
            label = pattern if share is None else f"{pattern} {share:.0%}"
            table[label] = _compare(layers, Pattern.parse(pattern), share)
            print(f"{label:18s}", "  ".join(f"{name} {error:.2f}" for name, error in table[label].items()), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


def _names() -> Iterator[str]:
    for rows, columns in SIZES:
        for pattern, share in SPEEDS:
            yield f"{rows}x{columns} {pattern}" + ("" if share is None else f" {share}")


def _measure(name: str) -> dict[str, float]:
    """Returns the seconds of one case, the mebibytes it needed beyond its input, and its error beside that of plain zeroing."""
    size, text, *share = name.split()
    rows, columns = map(int, size.split("x"))
    matrix, grams = _example(rows, columns)
    pattern, removed = Pattern.parse(text), float(share[0]) if share else None
    prune(matrix[:8, :8], grams[:, :8, :8], pattern, removed)  # what is done once, such as loading code, is not measured
    before, start, used = _peak_bytes(), time.perf_counter(), time.process_time()
    pruned = prune(matrix, grams, pattern, removed)
    seconds, used, peak = time.perf_counter() - start, time.process_time() - used, _peak_bytes() - before
    return {
        "seconds": round(seconds, 3),
        "cpu_seconds": round(used, 3),
        "peak_mib": round(peak / _MEBI, 1),
        "error_db": round(_decibels(pruned, matrix, grams), 2),
        "magnitude_db": round(_decibels(METHODS["magnitude"](matrix, grams, pattern, removed), matrix, grams), 2),
        "zeros": round(float(np.mean(pruned == 0)), 6),
    }


def _compare(layers: list[tuple[Array, Array]], pattern: Pattern, share: float | None) -> dict[str, float]:
    """Returns the mean error that each method leaves, in decibels."""
    return {
        name: round(float(np.mean([_decibels(method(matrix, grams, pattern, share), matrix, grams) for matrix, grams in layers])), 2)
        for name, method in METHODS.items()
    }


def _decibels(pruned: Array, matrix: Array, grams: Array) -> float:
    error, whole = error_of_rows(pruned - matrix, grams).sum(), error_of_rows(np.asarray(matrix, np.float64), grams).sum()
    return float(10 * np.log10(max(error / whole, 1e-12)))


def _drawn() -> Iterator[tuple[Array, Array]]:
    for rows, columns in SIZES[:2]:
        yield _example(rows, columns)


def _example(rows: int, columns: int) -> tuple[Array, Array]:
    """Returns (weights float32 [rows, columns], Grams float64 [1, columns, columns]) of twice as many inputs as columns."""
    rng = np.random.default_rng(0)
    sources = rng.standard_normal((2 * columns, columns // 4), dtype=np.float32)
    inputs = sources @ rng.standard_normal((columns // 4, columns), dtype=np.float32) / np.float32(columns**0.5 / 2)
    inputs = np.maximum(inputs + 0.3 * rng.standard_normal(inputs.shape, dtype=np.float32), 0)
    inputs *= np.exp(0.7 * rng.standard_normal(columns)).astype(np.float32)
    return rng.standard_normal((rows, columns), dtype=np.float32), (inputs.T @ inputs).astype(np.float64)[None]


def _layers(model: Path, calib: Path, most: int) -> Iterator[tuple[Array, Array]]:
    """Yields (weights, Grams) of layers of a model, those that are computed with and whose inputs are known."""
    from onnxshrink.calibrate import Calibration
    from onnxshrink.graph.files import load
    from onnxshrink.graph.weights import weights
    from onnxshrink.inputs import read_inputs
    from onnxshrink.runtime import session

    graph = load(model)
    with session(graph) as run:
        samples = read_inputs(calib, run.inputs)
    found = [weight for weight in weights(graph) if weight.view is not None and weight.obstacle is None and weight.computes]
    for weight, gram in Calibration(samples).grams(graph, found[:: -(-len(found) // most)]):
        yield weight.layout.forward(weight.constant.values).astype(np.float64), gram.shrunk


def _peak_bytes() -> int:
    """Returns the most memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _machine() -> dict[str, Any]:
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    threads = int(os.environ.get("OPENBLAS_NUM_THREADS", os.cpu_count() or 1))
    return {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "blas_threads": threads, **versions}


if __name__ == "__main__":
    main()
