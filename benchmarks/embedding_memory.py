"""Memory and time of a table of embeddings that stays coded at run time, against the dense table and one decoded at session start.

    python benchmarks/embedding_memory.py --json benchmarks/results/embedding_memory.json

A table of 200,000 x 256 (205 MB in float32) whose rows are looked up, averaged and multiplied with a small matrix. File size;
seconds to make a session; peak memory beyond the imports until the first run is done, and memory then, each in a process of its
own; milliseconds a run of 8 x 128 ids, in turns with the dense model, on one thread; the types of what ONNX Runtime keeps of the
table, and whether outputs equal those of the form decoded at session start. The dense model is the first row.
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

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ROWS, WIDTH = 200_000, 256
IDS = (8, 128)
_ROUNDS = 200
_SEED = 0
FORMS = (
    (),
    ("share-weights:bits=8",),
    ("share-weights:bits=8,method=uniform",),
    ("share-weights:bits=4,method=uniform",),
    ("share-weights:bits=8,method=uniform", "huffman"),
    ("share-weights:step=0.4", "huffman"),
)


def dense_model() -> onnx.ModelProto:
    """Returns mean(table[ids]) · w, with normal weights whose rows differ in size."""
    rng = np.random.default_rng(_SEED)
    table = rng.standard_normal((ROWS, WIDTH), np.float32) * rng.uniform(0.02, 0.1, (ROWS, 1)).astype(np.float32)
    square = rng.standard_normal((WIDTH, WIDTH), np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("ReduceMean", ["rows"], ["mean"], axes=[1], keepdims=0),
        helper.make_node("MatMul", ["mean", "w"], ["y"]),
    ]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", "words"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", WIDTH])
    weights = [numpy_helper.from_array(table, "table"), numpy_helper.from_array(square, "w")]
    graph = helper.make_graph(nodes, "embedding", [ids], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def write_form(form: list[str], path: Path, folded: bool) -> None:
    """Writes the model after some passes; with its table to be decoded at session start if it is to be folded."""
    from onnxshrink.contract import Context
    from onnxshrink.graph import coded_table
    from onnxshrink.graph.edit import sort_nodes
    from onnxshrink.graph.files import load, save
    from onnxshrink.recipe import parse_pass

    if folded:
        coded_table.LEAST_BYTES = sys.maxsize
    graph = load(dense_model())
    for word in form:
        parse_pass(word).apply(graph, Context())
        sort_nodes(graph)
    save(graph, path)


def sample(seed: int) -> dict[str, Any]:
    """Returns ids."""
    return {"ids": np.random.default_rng(seed).integers(0, ROWS, IDS)}


def session(path: str, **options: Any) -> Any:
    """Returns a session on one thread."""
    import onnxruntime

    chosen = onnxruntime.SessionOptions()
    chosen.intra_op_num_threads = chosen.inter_op_num_threads = 1
    for name, setting in options.items():
        setattr(chosen, name, setting)
    return onnxruntime.InferenceSession(path, chosen, providers=["CPUExecutionProvider"])


def start(path: str) -> dict[str, float]:
    """Makes a session, runs it once, and returns seconds and megabytes."""
    import onnxruntime

    assert onnxruntime.get_device()
    idle, idle_peak = resident_mb("VmRSS"), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    begin = time.perf_counter()
    running = session(path)
    seconds = time.perf_counter() - begin
    running.run(None, sample(0))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - idle_peak
    return {"start_seconds": seconds, "peak_mb": peak, "resident_mb": resident_mb("VmRSS") - idle}


def resident_mb(entry: str) -> float:
    """Returns what Linux says of the memory of this process (man 5 proc)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{entry}:")) / 1024


def compare(dense: str, coded: str, folded: str, folder: str) -> dict[str, Any]:
    """Runs forms in turns; returns milliseconds, whether coded and folded agree, and the types that the table is kept in."""
    optimised = str(Path(folder) / "optimised.onnx")
    sessions = [session(dense), session(coded, optimized_model_filepath=optimised)]
    seconds: list[list[float]] = [[], []]
    for number in range(_ROUNDS):
        for running, times in zip(sessions, seconds, strict=True):
            feeds = sample(number)
            begin = time.perf_counter()
            running.run(None, feeds)
            times.append(time.perf_counter() - begin)
    reference = session(folded)
    same = all(
        sessions[1].run(None, sample(number))[0].tobytes() == reference.run(None, sample(number))[0].tobytes() for number in range(20)
    )
    kept = onnx.load(optimised, load_external_data=False).graph.initializer
    types = sorted({TensorProto.DataType.Name(item.data_type) for item in kept if list(item.dims) == [ROWS, WIDTH]})
    dense_ms, coded_ms = (1000 * float(np.median(times)) for times in seconds)
    return {"dense_ms": dense_ms, "ms": coded_ms, "same_as_folded": same, "table_kept_as": types}


def call(*arguments: str) -> dict[str, Any]:
    """Runs this script in a process of its own and returns what it prints, if anything."""
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True, text=True)
    return json.loads(done.stdout) if done.stdout else {}


def main() -> None:
    """Measures every form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--write", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--folded", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--start", help=argparse.SUPPRESS)
    parser.add_argument("--compare", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        write_form(arguments.write[1:], Path(arguments.write[0]), arguments.folded)
    elif arguments.start:
        print(json.dumps(start(arguments.start)))
    elif arguments.compare:
        print(json.dumps(compare(*arguments.compare)))
    else:
        rows = measure()
        if arguments.json:
            arguments.json.write_text(json.dumps({"rows": ROWS, "width": WIDTH, "ids": IDS, "forms": rows}, indent=1) + "\n")


def measure() -> list[dict[str, Any]]:
    """Returns the figures of every form, the dense one first."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        dense, coded, folded = (str(Path(folder) / f"{name}.onnx") for name in ("dense", "coded", "folded"))
        for form in FORMS:
            path = coded if form else dense
            call("--write", path, *form)
            row = {"form": " ".join(form) or "dense", "file_mb": Path(path).stat().st_size / 1e6, **call("--start", path)}
            if form:
                call("--folded", "--write", folded, *form)
                row |= {f"folded_{key}": number for key, number in call("--start", folded).items()}
                row |= call("--compare", dense, coded, folded, folder)
            print(row, flush=True)
            rows.append(row)
    return rows


if __name__ == "__main__":
    main()
