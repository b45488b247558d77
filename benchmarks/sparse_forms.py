"""What the forms of a sparse weight cost: bytes in the file, seconds and memory when a session starts, and where one overtakes another.

    python benchmarks/sparse_forms.py --json benchmarks/results/sparse_forms.json

Two MatMuls of 5000 x 2500 and 2500 x 5000 (25 million float32 weights, 100 MB), random zeros and 2:4. File size over the dense
model's, seconds to make a session (the least of three), and peak memory beyond the imports while doing so, each in a process of
its own. "sparse_initializer" is written as exporters do, with raw INT64 indices, only to compare: it fails the full check of ONNX.
The crossovers are of one 1000 x 1000 matrix: from which share of zeros on, in steps of 0.1 %, each form is the smallest.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from session_start import start

SHAPES = ((5000, 2500), (2500, 5000))
SPARSITIES = ("0.5", "0.75", "0.9", "0.97", "2:4")
FORMS = ("dense", "sparse_initializer", "constant", "mask", "patterns", "gaps")


def sparse_matrix(shape: tuple[int, int], sparsity: str, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    """Returns normal values with a share of random zeros, or with 2 zeros in each 4 of a column, along which a MatMul sums."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal(shape, np.float32)
    if sparsity == "2:4":
        groups = np.abs(values).reshape(shape[0] // 4, 4, shape[1])
        keep = groups >= np.sort(groups, axis=1)[:, 2:3]
        return np.where(keep.reshape(shape), values, np.float32(0)).astype(dtype)
    return np.where(rng.random(shape, np.float32) < float(sparsity), np.float32(0), values).astype(dtype)


def dense_model(sparsity: str) -> onnx.ModelProto:
    """Returns the two MatMuls."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 5000]) for name in ("x", "y")]
    nodes = [helper.make_node("MatMul", ["x", "w0"], ["h"]), helper.make_node("MatMul", ["h", "w1"], ["y"])]
    weights = [numpy_helper.from_array(sparse_matrix(shape, sparsity), f"w{i}") for i, shape in enumerate(SHAPES)]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def with_sparse_initializers(model: onnx.ModelProto) -> onnx.ModelProto:
    """Moves all weights to sparse_initializer."""
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor).reshape(-1)
        places = np.flatnonzero(values)
        kept = numpy_helper.from_array(values[places], tensor.name)
        indices = numpy_helper.from_array(places.astype(np.int64))
        model.graph.sparse_initializer.append(onnx.SparseTensorProto(values=kept, indices=indices, dims=tensor.dims))
    del model.graph.initializer[:]
    return model


def write_form(form: str, sparsity: str, path: Path) -> bool:
    """Writes the model with its weights in a form; returns whether there is that form."""
    from onnxshrink.graph.edit import NameSource, sort_nodes
    from onnxshrink.graph.files import load, save
    from onnxshrink.graph.sparse_form import sparse_forms, store_sparse

    model = dense_model(sparsity)
    if form in ("dense", "sparse_initializer"):
        onnx.save(model if form == "dense" else with_sparse_initializers(model), path)
        return True
    graph = load(model)
    names = NameSource(graph)
    for constant in list(graph.constants):
        found = next((item for item in sparse_forms(constant, graph, names) if item.kind == form), None)
        if found is None:
            return False
        store_sparse(constant, graph, found)
    sort_nodes(graph)
    save(graph, path)
    return True


def crossovers(dtype: str, opset: int) -> list[dict[str, Any]]:
    """Returns the smallest form, and from which share of zeros on it is that."""
    from onnxshrink.graph.edit import NameSource, constant_bytes
    from onnxshrink.graph.files import load
    from onnxshrink.graph.sparse_form import sparse_forms

    rng = np.random.default_rng(0)
    order, values = rng.permutation(10**6), rng.standard_normal(10**6).astype(dtype)

    def smallest(permille: int) -> str:
        matrix = values.copy()
        matrix[order[: permille * 1000]] = 0
        kind = helper.np_dtype_to_tensor_dtype(matrix.dtype)
        ends = [helper.make_tensor_value_info("y", kind, [1000, 1000])]
        node = helper.make_node("Identity", ["w"], ["y"])
        weight = numpy_helper.from_array(matrix.reshape(1000, 1000), "w")
        model = helper.make_model(helper.make_graph([node], "one", [], ends, [weight]), opset_imports=[helper.make_opsetid("", opset)])
        graph = load(model)
        constant = graph.constants[0]
        sizes = {form.kind: form.nbytes for form in sparse_forms(constant, graph, NameSource(graph))}
        return min(("dense", *sizes), key=lambda form: sizes.get(form, constant_bytes(constant, graph)))

    def between(low: int, high: int, ends: tuple[str, str]) -> list[tuple[int, str]]:
        if ends[0] == ends[1]:
            return []
        if high - low == 1:
            return [(high, ends[1])]
        middle = (low + high) // 2
        form = smallest(middle)
        return between(low, middle, (ends[0], form)) + between(middle, high, (form, ends[1]))

    grid = [(permille, smallest(permille)) for permille in (0, 100, 300, 500, 700, 800, 900, 950, 980, 999)]
    steps = [step for (low, first), (high, last) in pairwise(grid) for step in between(low, high, (first, last))]
    return [{"from_zeros": permille / 1000, "smallest": form} for permille, form in [grid[0], *steps]]


def main() -> None:
    """Measures every form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--start", help=argparse.SUPPRESS)
    parser.add_argument("--write", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.start:
        print(json.dumps(start(arguments.start)))
        return
    if arguments.write:
        write_form(arguments.write[0], arguments.write[1], Path(arguments.write[2]))
        return
    rows = []
    for sparsity in SPARSITIES:
        dense = 0
        for form in FORMS:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "model.onnx"
                subprocess.run([sys.executable, __file__, "--write", form, sparsity, str(path)], check=True)
                if not path.exists():
                    continue
                command = [sys.executable, __file__, "--start", str(path)]
                runs = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(3)]
                size = path.stat().st_size
                dense = dense or size
                best = min(runs, key=lambda run: run["seconds"])
                rows.append({"zeros": sparsity, "form": form, "bytes": size, "of_dense": size / dense, **best})
            print(rows[-1], flush=True)
    crossed = [
        {"dtype": dtype, "opset": opset, "forms": crossovers(dtype, opset)}
        for dtype, opset in (("float32", 17), ("float16", 17), ("float64", 17), ("float32", 10))
    ]
    for row in crossed:
        print(row, flush=True)
    if arguments.json:
        weights = sum(rows * columns for rows, columns in SHAPES)
        arguments.json.write_text(json.dumps({"weights": weights, "forms": rows, "crossovers": crossed}, indent=1) + "\n")


if __name__ == "__main__":
    main()
