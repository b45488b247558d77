"""Zeros in real models: what they do to the outputs on evaluation inputs, with and without repair, and the bytes that come of them.

    python benchmarks/sparsity.py --json benchmarks/results/sparsity.json
    python benchmarks/sparsity.py --only cifar_resnet20 --setting sparsity=0.7

A row is ``onnxshrink compress --pass tidy --pass sparsify:SETTING`` from all calibration inputs. ``packed`` are the bytes of that
file, which `pack-sparse` ends; ``shared`` those after ``share-weights:bits=5``, ``huffman:raise-opset=true`` and ``shorten-
names`` instead, with the SQNR of that file. Seconds are those of sparsify. See `harness.py` for the options.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import corpus
from harness import run_rows
from judged import Snapshot, peak_kb, quality, spearman

from onnxshrink import api
from onnxshrink.contract import Context
from onnxshrink.graph.edit import sort_nodes
from onnxshrink.graph.exporter import to_model
from onnxshrink.graph.ir import Graph
from onnxshrink.passes.pack_sparse import PackSparse
from onnxshrink.recipe import parse_pass

PLAIN = "repair=false,scope=layer,criterion=magnitude"
ALONE = "repair=false,scope=global,criterion=magnitude"
HEADLINES = {
    "cifar_resnet20": ["sparsity=0.5", "sparsity=0.7", "sparsity=0.8", "pattern=2:4"],
    "squeezenet_fp32up": ["sparsity=0.5", "sparsity=0.7", "pattern=2:4"],
    "minilm_l6_v2": ["sparsity=0.5", "pattern=2:4"],
}
_INTEGERS = ("mobilenetv2_tflq_qdq",)  # its weights are 8-bit integers


def rows() -> list[tuple[str, str]]:
    """Returns (model, setting) of all rows: the headlines, and every float model at half zeros, each plain and repaired."""
    found = []
    for name in dict.fromkeys([*HEADLINES, *corpus.names()]):
        for setting in HEADLINES.get(name, ["sparsity=0.5"] if name not in _INTEGERS else []):
            others = [PLAIN] if "pattern" in setting or name not in HEADLINES else [PLAIN, ALONE]
            found += [(name, f"{setting},{other}") for other in others] + [(name, setting)]
    return found


def measure(name: str, setting: str, path: Path) -> dict[str, Any]:
    """Returns the figures of one model at one setting, and leaves the result as pack-sparse stores it at a path."""
    idle = peak_kb()
    coding = ("share-weights:bits=5", "huffman:raise-opset=true", "shorten-names")
    steps = [parse_pass("tidy"), parse_pass(f"sparsify:pack=false,{setting}"), Snapshot(), *map(parse_pass, coding)]
    validation = corpus.evaluation(name)  # without a limit nothing depends on it
    result = api.compress(corpus.model_path(name), steps, calibration=corpus.calibration(name), validation=validation)
    sparsify = result.report.passes[1]
    row = {
        "name": name,
        "setting": setting,
        "seconds": sparsify.seconds,
        "peak_mb": (peak_kb() - idle) / 1024,
        "outcome": [f"{step.name} {step.outcome} {step.reason}".strip() for step in result.report.passes],
        "notes": list(sparsify.notes),
        "bytes_before": result.report.bytes_before,
    }
    with tempfile.TemporaryDirectory() as folder:
        paths = [path, Path(folder) / "shared.onnx"]
        paths[0].write_bytes(packed(Snapshot.taken[0]))
        result.save(paths[1])
        judged = [api.verify(corpus.model_path(name), path, inputs=validation) for path in paths]
        row |= quality(judged[0].comparison)
        row |= {"packed_bytes": paths[0].stat().st_size, "shared_bytes": paths[1].stat().st_size}
        row["shared"] = quality(judged[1].comparison)
        if name == "minilm_l6_v2":
            row["spearman"] = [spearman(path) for path in (corpus.model_path(name), *paths)]
    return row


def packed(graph: Graph) -> bytes:
    """Returns the file of a sparse graph as pack-sparse stores it."""
    PackSparse().apply(graph, Context())
    sort_nodes(graph)
    return to_model(graph).SerializeToString()


def describe(row: dict[str, Any]) -> str:
    """Returns one line about a row."""
    accuracy = "" if row["accuracy"] is None else f"  top-1 {row['accuracy'][0]:.2%} → {row['accuracy'][1]:.2%}"
    ranks = "" if "spearman" not in row else "  Spearman " + " → ".join(f"{rank:.4f}" for rank in row["spearman"])
    sqnr = "no SQNR" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f} dB"
    return (
        f"{sqnr}{accuracy}{ranks}  {row['bytes_before']:,} → {row['packed_bytes']:,} packed, {row['shared_bytes']:,} shared"
        f"  {row['seconds']:.0f} s, {row['peak_mb']:.0f} MB"
    )


if __name__ == "__main__":
    run_rows(__doc__, rows(), measure, describe)
