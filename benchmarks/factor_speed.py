"""Low-rank factors: seconds, peak memory and error for matrices of several sizes, next to the textbook's way to the same answer.

    python benchmarks/factor_speed.py --json benchmarks/results/factor_speed.json
    python benchmarks/factor_speed.py --only "4096x4096 whitened"
    python benchmarks/factor_speed.py --only "1024x1024 plain 1/4" --threads 1

Weights and inputs are those of ``prune_speed.py``: normal weights; correlated, ill-conditioned inputs. For every size, plain and
whitened, there is a case for each share of the full rank, one for the singular values alone, and one for the textbook:
``numpy.linalg.svd`` of W L, H = L L^T by Cholesky, cut, times L^-1. That costs the same whatever the rank, so it is computed once,
for the largest, and cut for the others: their errors are under ``cut``.

Errors are relative: of outputs ||(W - W') X|| / ||W X||, which whitened factors make least, and of weights ||W - W'|| / ||W||, which
plain ones do. Each case runs in a process of its own, which reads its matrices from a file, so that the peak memory beyond them is its
own; it includes what the case returns, and is given in MiB and as a multiple of the matrix in float32 and in float64. Seconds are the
least of several runs. A file of results is added to.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from prune_speed import _example, _machine, _peak_bytes
from scipy import linalg

from onnxshrink.numerics.low_rank import factor, spectrum
from onnxshrink.numerics.refit import error_of_rows

Array = np.ndarray[Any, np.dtype[Any]]
Row = dict[str, Any]

SIZES = [(384, 1536), (1536, 384), (1024, 1024), (4096, 1024), (4096, 4096)]
KINDS = ["plain", "whitened"]
SHARES = ["1/16", "1/4", "1/3", "1/2"]  # of the full rank
_RUNS = 3
_PATIENCE = 60.0  # seconds after which no further run starts
_MEBI = 1 << 20


def main() -> None:
    """Runs the cases that are asked for and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--threads", type=int, default=2, help="of the linear algebra (OpenBLAS)")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)  # how it calls itself
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(_measure(*arguments.case)))
        return
    os.environ["OPENBLAS_NUM_THREADS"] = str(arguments.threads)  # of the processes that it starts
    known = json.loads(arguments.json.read_text())["cases"] if arguments.json and arguments.json.exists() else {}
    for size in SIZES:
        chosen = [name for name in _names(*size) if arguments.only in name]
        if not chosen:
            continue
        with TemporaryDirectory() as folder:
            example = Path(folder, "example.npz")
            _run("x".join(map(str, size)), example)
            for name in chosen:
                known[name] = _run(name, example)
                print(f"{name:32s}{_line(known[name])}", flush=True)
                if arguments.json:
                    ordered = {name: known[name] for size in SIZES for name in _names(*size) if name in known}
                    arguments.json.write_text(json.dumps({"machine": _machine(), "cases": ordered}, indent=1) + "\n")


def _run(name: str, example: Path) -> Row:
    """Returns the figures of one case, measured in a process of its own."""
    answer = subprocess.run([sys.executable, __file__, "--case", name, example], check=True, stdout=subprocess.PIPE)
    row: Row = json.loads(answer.stdout)
    return row


def _names(rows: int, columns: int) -> Iterator[str]:
    for kind in KINDS:
        for what in ["textbook", "spectrum", *SHARES]:
            yield f"{rows}x{columns} {kind} {what}"


def _measure(name: str, example: str) -> Row:
    """Returns the figures of one case; where only a size is named, writes its example."""
    size, *case = name.split()
    rows, columns = map(int, size.split("x"))
    if not case:
        matrix, grams = _example(rows, columns)
        np.savez(example, matrix=matrix, grams=grams)
        return {}
    kind, what = case
    with np.load(example) as arrays:
        matrix, grams = arrays["matrix"], arrays["grams"]
    given = grams if kind == "whitened" else None
    if what == "textbook":
        return _measure_textbook(matrix, given, grams)
    if what == "spectrum":
        row, values = _timed(spectrum, matrix[None], given)
        start = time.perf_counter()
        wanted = np.linalg.svd(_whitened(matrix, given), compute_uv=False)
        seconds = round(time.perf_counter() - start, 3)
        difference = _rounded(np.abs(values[0] - wanted).max() / wanted[0])
        return row | {"largest_difference": difference, "textbook_seconds": seconds}
    rank = _rank(what, matrix)
    row, (left, right) = _timed(lambda one, gram: factor(one, _rank(what, one[0]), gram), matrix[None], given)
    return row | {"rank": rank, **_errors(matrix, left[0] @ right[0], grams)}


def _measure_textbook(matrix: Array, given: Array | None, grams: Array) -> Row:
    """Returns the figures of the textbook's factors at the largest rank, and the errors at all of them."""
    most = SHARES[-1]
    row, (left, right) = _timed(lambda one, gram: _textbook(one[0], _rank(most, one[0]), gram), matrix[None], given)
    ranks = {share: _rank(share, matrix) for share in SHARES}
    return row | {
        "cut": {share: _errors(matrix, left[:, :rank] @ right[:rank], grams) for share, rank in ranks.items()}
    }


def _textbook(matrix: Array, rank: int, grams: Array | None) -> tuple[Array, Array]:
    """Returns (left, right) with W' = left @ right by SVD."""
    left, values, right = np.linalg.svd(_whitened(matrix, grams), full_matrices=False)
    left, right = left[:, :rank] * values[:rank], right[:rank]
    if grams is None:
        return left, right
    return left, linalg.solve_triangular(np.linalg.cholesky(grams[0]), right.T, trans="T", lower=True).T


def _whitened(matrix: Array, grams: Array | None) -> Array:
    """Returns W L, float64."""
    wide = matrix.astype(np.float64)
    return wide if grams is None else wide @ np.linalg.cholesky(grams[0])


def _timed(function: Callable[[Array, Array | None], Any], matrix: Array, grams: Array | None) -> tuple[Row, Any]:
    """Returns (seconds and memory, what the function returns)."""
    # What is done once, such as loading code, is not measured.
    function(matrix[:, :32, :32], grams if grams is None else grams[:, :32, :32])
    before, begun, runs = _peak_bytes(), time.perf_counter(), []
    for _ in range(_RUNS):
        start, used = time.perf_counter(), time.process_time()
        answer = function(matrix, grams)
        runs.append((time.perf_counter() - start, time.process_time() - used))
        if len(runs) == 1:
            peak = _peak_bytes() - before
        if time.perf_counter() - begun > _PATIENCE:
            break
    seconds, used = np.min(runs, axis=0)
    return {
        "seconds": round(seconds, 3),
        "cpu_seconds": round(used, 3),
        "runs": len(runs),
        "peak_mib": round(peak / _MEBI, 1),
        "peak_of_float32": round(peak / (4 * matrix.size), 2),
        "peak_of_float64": round(peak / (8 * matrix.size), 2),
    }, answer


def _rank(share: str, matrix: Array) -> int:
    return int(min(matrix.shape) * Fraction(share))


def _errors(matrix: Array, product: Array, grams: Array) -> dict[str, float]:
    wide, change = matrix.astype(np.float64), matrix - product
    outputs = error_of_rows(change, grams).sum() / error_of_rows(wide, grams).sum()
    return {
        "output_error": _rounded(max(outputs, 0.0) ** 0.5),
        "weight_error": _rounded(np.linalg.norm(change) / np.linalg.norm(wide)),
    }


def _rounded(value: Any) -> float:
    return float(f"{value:.6g}")


def _line(row: Row) -> str:
    line = "{seconds:8.3f} s ({cpu_seconds:.2f} s of a core)  +{peak_mib:5.0f} MiB, {peak_of_float32:5.2f} times the matrix in float32"
    if "largest_difference" in row:
        return (line + "  off by {largest_difference:.1e}; textbook {textbook_seconds:.3f} s").format(**row)
    errors = {"rank " + str(row["rank"]): row} if "rank" in row else row["cut"]
    shown = ", ".join(
        "{}: {output_error:.6f} ({weight_error:.6f})".format(share, **error) for share, error in errors.items()
    )
    return line.format(**row) + "  error of outputs (weights) at " + shown


if __name__ == "__main__":
    main()
