"""Weight sharing and Huffman coding of real models: bytes, quality on evaluation inputs, entropy, session start, memory.

    python benchmarks/coded_size.py --json benchmarks/results/coded_size.json
    python benchmarks/coded_size.py --only cifar_resnet20 --share bits-per-weight=3.5 --quick

A row is what ``onnxshrink compress --pass tidy --pass share-weights:SHARE --pass huffman:raise-opset=true --pass shorten-names``
writes from the calibration inputs, in a process of its own, so that its peak memory is its own. The file with plain codes is the same
without the huffman pass; after zip means zlib at level 9 over the whole file. Rows without a limit are fitted to all calibration inputs, as
nothing depends on what judges them. A row with ``floor`` is held to that SQNR on held-out
calibration inputs, and the target is searched with which the evaluation inputs just reach it too: one number for each model. Latency
is measured last, when nothing else runs. Rows that are in the JSON file already and are not asked for stay.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import corpus
import numpy as np
from judged import Snapshot, peak_kb, quality, spearman

from onnxshrink import api
from onnxshrink.contract import Context
from onnxshrink.graph.coded import coded_weights
from onnxshrink.graph.edit import sort_nodes
from onnxshrink.graph.exporter import to_model
from onnxshrink.graph.huffman_weights import centred
from onnxshrink.graph.ir import Graph
from onnxshrink.numerics.code_lengths import entropy_bits
from onnxshrink.recipe import parse_pass
from onnxshrink.validate import Tolerance

_LEAST_SQNR_DB = 30.0
_MOST_TARGETS = 5
_CLOSE_DB = 1.0  # above the floor
ROWS: list[tuple[str, str, float | None]] = [
    ("cifar_resnet20", "bits-per-weight=3.9", None),
    ("cifar_resnet20", "bits-per-weight=2.7", None),
    ("squeezenet_fp32up", "bits-per-weight=5.05", None),
    ("squeezenet_fp32up", "bits-per-weight=4.22", None),
    ("squeezenet_fp32up", "bits-per-weight=3.56", None),
    ("ppocrv4_rec", "bits-per-weight=4.75", None),
    ("minilm_l6_v2", "bits-per-weight=4.28", None),
    ("minilm_l6_v2", "bits-per-weight=3.4", None),
    ("dtln_1", "sqnr=34.9", _LEAST_SQNR_DB),
    ("magika_v3_3", "sqnr=37.2", _LEAST_SQNR_DB),
    ("oww_embedding", "sqnr=30", _LEAST_SQNR_DB),
    ("silero_vad", "sqnr=31.2", _LEAST_SQNR_DB),
    ("gtcrn", "sqnr=30.6", _LEAST_SQNR_DB),
    ("yolox_nano", "sqnr=30", _LEAST_SQNR_DB),
]


def measure(name: str, share: str, floor: float | None, target: Path, quick: bool) -> dict[str, Any]:
    """Returns the figures of one model at one rate, all but its latency; writes the result to ``target``."""
    steps = [
        parse_pass(spec) for spec in ("tidy", f"share-weights:{share}", "huffman:raise-opset=true", "shorten-names")
    ]
    idle = peak_kb()
    start, cpu_start = time.perf_counter(), time.process_time()
    result = api.compress(
        corpus.model_path(name),
        [*steps[:2], Snapshot(), steps[2], Snapshot(), steps[3]],
        calibration=corpus.calibration(name),
        validation=corpus.evaluation(name) if floor is None else None,
        tolerance=Tolerance(min_sqnr_db=floor),
    )
    seconds, cpu_seconds, peak = time.perf_counter() - start, time.process_time() - cpu_start, peak_kb() - idle
    result.save(target)
    data = target.read_bytes()
    before, after = Snapshot.taken
    figures = rates(before, after)
    plain = plain_codes(before, steps[3])
    judged = api.verify(corpus.model_path(name), target, inputs=corpus.evaluation(name))
    row = {
        "name": name,
        "share": share,
        "floor": floor,
        "bytes_before": judged.bytes_before,
        "bytes": len(data),
        "bytes_zipped": len(zlib.compress(data, 9)),
        "plain_bytes": len(plain),
        "plain_bytes_zipped": len(zlib.compress(plain, 9)),
        **quality(judged.comparison),
        **figures,
        "outcomes": {step.name: f"{step.outcome} {step.reason}".strip() for step in result.report.passes},
        "notes": [note for step in result.report.passes for note in step.notes],
        "forms": {change.site: change.detail for change in result.report.passes[3].changes},
        "left": {step.name: [f"{skip.site}: {skip.reason}" for skip in step.skips] for step in result.report.passes},
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_mb": peak / 1024,
    }
    if name == "minilm_l6_v2" and not quick:
        row["spearman"] = [spearman(path) for path in (corpus.model_path(name), target)]
    return row


def plain_codes(graph: Graph, shorten: Any) -> bytes:
    """Returns the file of a graph with shared weights, with short names too, without Huffman coding."""
    shorten.apply(graph, Context())
    sort_nodes(graph)
    return to_model(graph).SerializeToString()


def rates(plain: Graph, coded: Graph) -> dict[str, Any]:
    """Returns, over the weights that were Huffman coded: how many, the mean entropy of their codes, and the bits they take.

    Entropy is of each tensor by itself. Coded bits are those of streams, tables and lanes, and of the nodes that read them;
    functions and scales are not among them, and `bytes` has everything.
    """
    pieces = {item.site: item.pieces for item in coded_weights(coded) if item.pieces}
    weights = [centred(item) for item in coded_weights(plain) if item.site in pieces]
    codes = [weight.codes for weight in weights if weight is not None]
    count = max(sum(part.size for part in codes), 1)
    entropy = sum(entropy_bits(np.bincount(part.view(np.uint8))) for part in codes)
    bits = 8 * sum(piece.nbytes for item in pieces.values() for piece in item)
    return {"codes": count, "entropy_bits": entropy / count, "coded_bits": bits / count}


def latency(row: dict[str, Any], path: Path) -> dict[str, Any]:
    """Returns milliseconds of both models, interleaved, on one thread, and of their sessions' starts."""
    report = api.bench(corpus.model_path(row["name"]), path, inputs=corpus.calibration(row["name"]), threads=1)
    return {
        "run_ms": [report.a_ms.median, report.b_ms.median],
        "run_ratio": [report.ratio.low, report.ratio.median, report.ratio.high],
        "start_ms": [report.a_start_ms, report.b_start_ms],
    }


def measured(name: str, share: str, floor: float | None, arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns a row; with a floor, the smallest of a few targets that reach it on the evaluation inputs."""
    kept = file_of(name, share, arguments)
    trial = kept.with_suffix(".trial.onnx")
    tried: list[dict[str, Any]] = []
    asked: str | None = share
    while asked is not None:
        request = json.dumps([name, asked, floor, str(trial), arguments.quick])
        run = subprocess.run([sys.executable, __file__, "--one", request], capture_output=True, text=True, check=False)
        if run.returncode:
            reason = [f"exit code {run.returncode}", *run.stderr.strip().splitlines()][-1]
            return {"name": name, "asked": share, "error": reason[-300:]}
        tried.append({**json.loads(run.stdout.splitlines()[-1]), "asked": share})
        best = min(tried, key=lambda row: (floor is not None and row["sqnr_db"] < floor, row["bytes"]))
        if best is tried[-1] or not kept.exists():
            trial.replace(kept)
        asked = None if floor is None else next_target(tried, floor)
        if asked is not None:
            print(f"  {describe(tried[-1])}", flush=True)
    trial.unlink(missing_ok=True)
    return {**best, "tried": [[row["share"], row["bytes"], row["sqnr_db"]] for row in tried]}


def next_target(tried: list[dict[str, Any]], floor: float) -> str | None:
    """Returns the SQNR to ask for next so that the evaluation inputs get a little more than the floor, or None if they do."""
    key, _, value = tried[-1]["share"].partition("=")
    above = [row["sqnr_db"] - floor for row in tried]
    gap = above[-1]
    if len(tried) == _MOST_TARGETS or 0 <= gap <= _CLOSE_DB or (gap > 0 and min(above) > 0):
        return None  # near enough, or as low as the limit on held-out inputs lets it go
    targets = [float(row["share"].partition("=")[2]) for row in tried]
    low = max((pair for pair in zip(above, targets, strict=True) if pair[0] < 0), default=None)
    high = min((pair for pair in zip(above, targets, strict=True) if pair[0] >= 0), default=None)
    if low is not None and high is not None:
        share = (_CLOSE_DB / 2 - low[0]) / (high[0] - low[0])
        target = low[1] + share * (high[1] - low[1])
    else:
        target = float(value) - gap + _CLOSE_DB / 2
    target = round(target, 1)
    return None if target in targets else f"{key}={target:g}"


def file_of(name: str, asked: str, arguments: argparse.Namespace) -> Path:
    """Returns where the result of a row is kept until its latency is measured."""
    return Path(arguments.models) / f"{name}_{asked.replace('=', '_')}.onnx"


def main() -> None:
    """Runs the rows one after the other, then measures the latency of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of models")
    parser.add_argument("--share", nargs="*", help="options of share-weights, instead of the rows' own")
    parser.add_argument("--json", type=Path, help="where the figures are, and go after each row")
    parser.add_argument("--models", help="where to keep the results; by default they are dropped")
    parser.add_argument("--quick", action="store_true", help="neither Spearman nor latency")
    parser.add_argument("--no-latency", action="store_true", help="leave it for a later call with --only-latency")
    parser.add_argument(
        "--only-latency", action="store_true", help="of rows that are in the JSON file, with results in --models"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--time", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, share, floor, target, quick = json.loads(arguments.one)
        print(json.dumps(measure(name, share, floor, Path(target), quick)))
        return
    if arguments.time:
        row, path = json.loads(arguments.time)
        print(json.dumps(latency(row, Path(path))))
        return
    chosen = [row for row in ROWS if not arguments.only or row[0] in arguments.only]
    if arguments.share:
        chosen = [
            (name, share, floor)
            for name, _, floor in {row[0]: row for row in chosen}.values()
            for share in arguments.share
        ]
    with tempfile.TemporaryDirectory() as folder:
        arguments.models = arguments.models or folder
        Path(arguments.models).mkdir(parents=True, exist_ok=True)
        table = Table(arguments.json)
        for name, share, floor in [] if arguments.only_latency else chosen:
            row = measured(name, share, floor, arguments)
            table.put(row)
            print(describe(row), flush=True)
        for name, share, _ in [] if arguments.quick or arguments.no_latency else chosen:
            path, known = file_of(name, share, arguments), table.rows.get((name, share))
            if known is None or not path.exists():
                continue
            request = json.dumps([known, str(path)])
            run = subprocess.run(
                [sys.executable, __file__, "--time", request], capture_output=True, text=True, check=True
            )
            table.put({**known, **json.loads(run.stdout.splitlines()[-1])})


class Table:
    """The rows in the order of `ROWS`, kept in a JSON file if there is one."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: dict[tuple[str, str], dict[str, Any]] = {}
        self.read()

    def read(self) -> None:
        """Takes the rows of the file, which another run may have changed."""
        if self.path is not None and self.path.exists():
            self.rows |= {(row["name"], row["asked"]): row for row in json.loads(self.path.read_text())["models"]}

    def put(self, row: dict[str, Any]) -> None:
        """Adds or replaces a row and writes the file."""
        self.read()
        self.rows[row["name"], row["asked"]] = row
        order = {(name, share): number for number, (name, share, _) in enumerate(ROWS)}
        ordered = sorted(self.rows.items(), key=lambda item: (order.get(item[0], len(order)), item[0]))
        if self.path is not None:
            self.path.write_text(json.dumps({"models": [row for _, row in ordered]}, indent=1) + "\n")


def describe(row: dict[str, Any]) -> str:
    """Returns one line about a row."""
    head = f"{row['name']:18} {row.get('share', row.get('asked', '')):22}"
    if "error" in row:
        return f"{head} {row['error']}"
    agreement = "" if row["agreement"] is None else f"  agreement {row['agreement']:.2%}"
    accuracy = "" if row["accuracy"] is None else f"  top-1 {row['accuracy'][0]:.2%} → {row['accuracy'][1]:.2%}"
    ranks = "" if "spearman" not in row else f"  Spearman {row['spearman'][0]:.4f} → {row['spearman'][1]:.4f}"
    return (
        f"{head} {row['bytes_before']:,} → {row['bytes']:,} ({row['bytes_zipped']:,} zipped; plain {row['plain_bytes']:,}, "
        f"{row['plain_bytes_zipped']:,} zipped)  {row['sqnr_db']:.1f} dB{agreement}{accuracy}{ranks}  entropy "
        f"{row['entropy_bits']:.2f}, coded {row['coded_bits']:.2f}  {row['seconds']:.0f} s  {row['peak_mb']:.0f} MB"
    )


if __name__ == "__main__":
    main()
