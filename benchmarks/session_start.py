"""What coded weights cost when a session starts: ONNX Runtime decodes them then, and keeps what lies in between until it is done.

    python benchmarks/session_start.py --json benchmarks/results/session_start.json

A chain of four 4096x4096 MatMuls (67 million weights, 268 MB) in each form. File size, seconds to make a session, and peak memory
beyond the imports while doing so, each in a process of its own. The dense model is the first row.
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

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIDE, LAYERS = 4096, 4
FORMS = ("", "bits=16", "bits=8", "bits=8,method=kmeans,per=tensor", "bits=8,method=uniform", "bits=4", "bits=5")


def dense_model() -> onnx.ModelProto:
    """Returns the chain of MatMuls, with normal weights."""
    rng = np.random.default_rng(0)
    names = ["x", *(f"h{index}" for index in range(LAYERS - 1)), "y"]
    nodes = [helper.make_node("MatMul", [names[index], f"w{index}"], [names[index + 1]]) for index in range(LAYERS)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, SIDE]) for name in ("x", "y")]
    weights = [numpy_helper.from_array(rng.standard_normal((SIDE, SIDE), np.float32), f"w{i}") for i in range(LAYERS)]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def write_form(form: str, path: Path) -> None:
    """Writes the model with its weights in a form, as ``share-weights`` stores it."""
    from onnxshrink.contract import Context
    from onnxshrink.graph.edit import sort_nodes
    from onnxshrink.graph.files import load, save
    from onnxshrink.recipe import parse_pass

    graph = load(dense_model())
    if form:
        parse_pass(f"share-weights:{form}").apply(graph, Context())
    sort_nodes(graph)
    save(graph, path)


def start(path: str) -> dict[str, float]:
    """Makes a session and returns seconds and megabytes."""
    import onnxruntime

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    running = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    seconds = time.perf_counter() - begin
    del running
    return {"seconds": seconds, "peak_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}


def main() -> None:
    """Measures every form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--start", help=argparse.SUPPRESS)
    parser.add_argument("--write", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.start:
        print(json.dumps(start(arguments.start)))
        return
    if arguments.write:
        write_form(arguments.write[0], Path(arguments.write[1]))
        return
    rows = []
    for form in FORMS:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            subprocess.run([sys.executable, __file__, "--write", form, str(path)], check=True)
            run = subprocess.run([sys.executable, __file__, "--start", str(path)], check=True, capture_output=True, text=True)
            rows.append({"form": form or "dense", "file_mb": path.stat().st_size / 1e6, **json.loads(run.stdout)})
        print(rows[-1], flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"weights": LAYERS * SIDE * SIDE, "forms": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
