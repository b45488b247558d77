"""What Huffman coded weights cost when a session starts, against plain codes and dense weights, and with the numpy decoder.

    python benchmarks/huffman_session.py --json benchmarks/results/huffman_session.json

Chains of MatMuls with 25 and 100 million normal weights, dense, and on uniform grids with codes of 4.4 bits entropy. File size, seconds
to make a session, nanoseconds a weight beyond the dense model's, and peak memory beyond the imports; extra memory is what goes beyond
the dense model's peak, as a multiple of the bytes of the dense weights. ``load`` is `onnxshrink.load`, which decodes with numpy before
ONNX Runtime sees the model. Each in a process of its own, the files read once before so that none has to wait for the disk; seconds
are those of the fastest of a few starts, memory is the median.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIDE = 2500
LAYERS = {25_000_000: 4, 100_000_000: 16}
BITS = 4.4
STARTS = 3


def dense_model(layers: int) -> onnx.ModelProto:
    """Returns a chain of MatMuls with normal weights."""
    rng = np.random.default_rng(0)
    names = ["x", *(f"h{index}" for index in range(layers - 1)), "y"]
    nodes = [helper.make_node("MatMul", [names[index], f"w{index}"], [names[index + 1]]) for index in range(layers)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, SIDE]) for name in ("x", "y")]
    weights = [
        numpy_helper.from_array(rng.standard_normal((SIDE, SIDE), np.float32), f"w{index}") for index in range(layers)
    ]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def write_forms(layers: int, folder: Path) -> None:
    """Writes the model with dense weights, with plain codes, and Huffman coded."""
    from onnxshrink.contract import Context
    from onnxshrink.graph.edit import sort_nodes
    from onnxshrink.graph.files import load, save
    from onnxshrink.recipe import parse_pass

    graph = load(dense_model(layers))
    for form, spec in (("dense", ""), ("plain codes", f"share-weights:bits-per-weight={BITS}"), ("Huffman", "huffman")):
        if spec and not parse_pass(spec).apply(graph, Context()).changes:
            raise RuntimeError(f"{spec} changed nothing")
        sort_nodes(graph)
        save(graph, folder / f"{form}.onnx")


def start(path: str, way: str) -> dict[str, float]:
    """Makes a session and returns seconds and megabytes."""
    import onnxruntime

    import onnxshrink

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    if way == "load":
        running = onnxshrink.load(path)
    else:
        running = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    seconds = time.perf_counter() - begin
    del running
    return {"seconds": seconds, "peak_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}


def measure(weights: int, layers: int) -> list[dict[str, Any]]:
    """Returns the rows of one size."""
    import onnxshrink

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, __file__, "--write", str(layers), folder], check=True)
        ways = [("dense", ""), ("plain codes", ""), ("Huffman", "")]
        ways += [("Huffman", "load")] if hasattr(onnxshrink, "load") else []
        for form, way in ways:
            path = Path(folder) / f"{form}.onnx"
            with path.open("rb") as file:
                while file.read(1 << 20):  # in parts: a child's peak memory begins with its parent's
                    pass
            command = [sys.executable, __file__, "--start", str(path), way]
            starts = [
                json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                for _ in range(STARTS)
            ]
            row = {"weights": weights, "form": form, "way": way, "file_mb": path.stat().st_size / 1e6}
            row |= {"seconds": min(run["seconds"] for run in starts)}
            row |= {"peak_mb": statistics.median(run["peak_mb"] for run in starts)}
            dense = rows[0] if rows else row
            row["ns_per_weight"] = 1e9 * (row["seconds"] - dense["seconds"]) / weights
            row["extra_peak"] = (row["peak_mb"] - dense["peak_mb"]) * 2**20 / (4 * weights)
            rows.append(row)
            print(row, flush=True)
    return rows


def main() -> None:
    """Measures every form at every size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="*", choices=LAYERS, help="numbers of weights")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--start", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--write", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.start:
        print(json.dumps(start(*arguments.start)))
        return
    if arguments.write:
        write_forms(int(arguments.write[0]), Path(arguments.write[1]))
        return
    rows: list[dict[str, Any]] = []
    for weights in arguments.only or LAYERS:
        rows += measure(weights, LAYERS[weights])
        if arguments.json:
            arguments.json.write_text(json.dumps({"entropy_bits": BITS, "forms": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
