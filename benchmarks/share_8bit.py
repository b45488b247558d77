"""Every real model through ``compress`` with 8-bit sharing: bytes, SQNR on evaluation inputs, seconds, peak memory.

    python benchmarks/share_8bit.py --json benchmarks/results/share_8bit.json
    python benchmarks/share_8bit.py --pass tidy --pass share-weights:bits=8,method=kmeans,per=tensor --only squeezenet_fp32up

Without ``--pass``, `tidy` and `share-weights` at 8 bits without repair, held to 30 dB on held-out calibration inputs. Each model runs
in a process of its own, so that the peak memory is its own. SQNR is of the worst output.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import corpus

DEFAULT, LIMIT_DB = ("tidy", "share-weights:bits=8,repair=false"), 30.0


def measure(name: str, specs: list[str]) -> dict[str, Any]:
    """Returns the figures of one model."""
    from onnxshrink import api
    from onnxshrink.errors import ShrinkError
    from onnxshrink.recipe import parse_pass
    from onnxshrink.validate import Tolerance

    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    passes = [parse_pass(spec) for spec in specs or DEFAULT]
    limit = Tolerance() if specs else Tolerance(min_sqnr_db=LIMIT_DB)
    try:
        result = api.compress(corpus.model_path(name), passes, calibration=corpus.calibration(name), tolerance=limit)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with tempfile.TemporaryDirectory() as folder:
            small = Path(folder) / "small.onnx"
            nbytes = result.save(small)
            judged = api.verify(corpus.model_path(name), small, inputs=corpus.evaluation(name))
    except ShrinkError as error:
        return {"name": name, "error": str(error)}
    worst = judged.comparison.worst("sqnr_db")
    agreed = judged.comparison.worst("agreement")
    return {
        "name": name,
        "bytes_before": judged.bytes_before,
        "bytes_after": nbytes,
        "ratio": judged.bytes_before / nbytes,
        "sqnr_db": worst.sqnr_db if worst else None,
        "agreement": agreed.agreement if agreed else None,
        "accuracy": [judged.comparison.accuracy.top1_original, judged.comparison.accuracy.top1_candidate]
        if judged.comparison.accuracy
        else None,
        "samples": judged.comparison.samples,
        "outcomes": {step.name: f"{step.outcome} {step.reason}".strip() for step in result.report.passes},
        "notes": [note for step in result.report.passes for note in step.notes],
        "float16_bytes": sum(
            change.bytes_after for step in result.report.passes for change in step.changes if "float16" in change.detail
        ),
        "seconds": seconds,
        "peak_mb": (peak - idle) / 1024,
        "failure": judged.comparison.failure,
    }


def main() -> None:
    """Runs the models one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pass", dest="passes", action="append", default=[], help="as for onnxshrink compress")
    parser.add_argument("--only", nargs="*", help="names of models")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.passes)))
        return
    rows = []
    specs = [word for spec in arguments.passes for word in ("--pass", spec)]
    for name in arguments.only or corpus.names():
        run = subprocess.run(
            [sys.executable, __file__, "--one", name, *specs], capture_output=True, text=True, check=False
        )
        row = json.loads(run.stdout.splitlines()[-1]) if run.returncode == 0 else {"name": name, "error": run.stderr[-300:]}
        rows.append(row)
        print(describe(row), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"passes": arguments.passes or "default", "models": rows}, indent=1) + "\n")


def describe(row: dict[str, Any]) -> str:
    """Returns one line of the table."""
    if "error" in row:
        return f"{row['name']:30} {row['error']}"
    sqnr = "–" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f} dB"
    agreement = "–" if row["agreement"] is None else f"{row['agreement']:.1%}"
    return (
        f"{row['name']:30} {row['bytes_before']:>10,} → {row['bytes_after']:>10,}  {row['ratio']:5.2f}x  {sqnr:>9}  {agreement:>6}"
        f"  {row['seconds']:5.1f} s  {row['peak_mb']:6.0f} MB  {row['outcomes']}"
    )


if __name__ == "__main__":
    main()
