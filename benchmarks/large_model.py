"""A model of 3 GB, far over protobuf's limit: loaded, one weight edited, saved, in a fraction of its size in memory.

    python benchmarks/large_model.py --json benchmarks/results/large_model.json

The model is a chain of MatMuls whose weights lie in a second file. A process of its own loads it, sets half of one weight to
zero and saves it; its peak resident memory is measured beyond what the same imports take, and pages of mapped files count in it.
Then the saved files are read back: the edited weight in full, all others in samples.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

SIDE = 8192
TENSOR_BYTES = SIDE * SIDE * 4
_CHUNK_BYTES = 1 << 22
_SAMPLES = 200
_SAMPLE_BYTES = 4096
_SEED = 0


def write_model(folder: Path, tensors: int) -> Path:
    """Writes a chain of MatMuls and its weights, piece by piece; returns the path of the model."""
    rng = np.random.default_rng(_SEED)
    initializers = []
    with (folder / "weights.bin").open("wb") as file:
        for index in range(tensors):
            initializer = TensorProto(name=f"w{index}", dims=[SIDE, SIDE], data_type=TensorProto.FLOAT)
            initializer.data_location = TensorProto.EXTERNAL
            for key, number in {"offset": file.tell(), "length": TENSOR_BYTES}.items():
                initializer.external_data.add(key=key, value=str(number))
            initializer.external_data.add(key="location", value="weights.bin")
            initializers.append(initializer)
            for _ in range(TENSOR_BYTES // _CHUNK_BYTES):
                file.write(rng.standard_normal(_CHUNK_BYTES // 4, np.float32).tobytes())
    names = ["x", *(f"h{index}" for index in range(tensors - 1)), "y"]
    nodes = [helper.make_node("MatMul", [names[index], f"w{index}"], [names[index + 1]]) for index in range(tensors)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", SIDE]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "large", ends[:1], ends[1:], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def edit(source: Path, target: Path, site: str) -> dict[str, float]:
    """Loads, sets the first half of one weight's rows to zero, saves; returns seconds and megabytes."""
    from onnxshrink.graph.edit import set_values
    from onnxshrink.graph.files import load, save
    from onnxshrink.graph.weights import weights

    idle = peak_mb()
    start = time.perf_counter()
    graph = load(source)
    found = weights(graph)
    loaded, loaded_mb = time.perf_counter(), peak_mb()
    weight = next(weight for weight in found if weight.site == site)
    values = weight.constant.values.copy()
    values[: SIDE // 2] = 0
    set_values(weight.constant, values)
    edited, edited_mb = time.perf_counter(), peak_mb()
    save(graph, target)
    return {
        "load_seconds": loaded - start,
        "edit_seconds": edited - loaded,
        "save_seconds": time.perf_counter() - edited,
        "imports_mb": idle,
        "load_mb": loaded_mb - idle,
        "edit_mb": edited_mb - idle,
        "peak_mb": peak_mb() - idle,
    }


def peak_mb() -> float:
    """Returns the largest resident set that this process has had, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def verify(source: Path, target: Path, site: str) -> None:
    """Reads both models back, without onnxshrink.

    Raises:
        AssertionError: a size differs, an untouched weight has changed, or the edited one is not what it should be.
    """
    rng = np.random.default_rng(_SEED)
    before, after = (onnx.load(path, load_external_data=False).graph.initializer for path in (source, target))
    assert [item.name for item in before] == [item.name for item in after]
    assert (target.parent / f"{target.name}.data").stat().st_size >= len(after) * TENSOR_BYTES
    for ours, theirs in zip(before, after, strict=True):
        left, right = mapped(ours, source.parent), mapped(theirs, target.parent)
        assert left.size == right.size == TENSOR_BYTES
        if ours.name == site:
            half = TENSOR_BYTES // 2
            assert not right[:half].any()
            assert left[:half].any()
            assert np.array_equal(left[half:], right[half:])
            continue
        for start in [0, *rng.integers(0, TENSOR_BYTES - _SAMPLE_BYTES, _SAMPLES), TENSOR_BYTES - _SAMPLE_BYTES]:
            assert np.array_equal(left[start : start + _SAMPLE_BYTES], right[start : start + _SAMPLE_BYTES])


def mapped(tensor: TensorProto, folder: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Returns the bytes of an external tensor."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return np.memmap(folder / entries["location"], np.uint8, "r", int(entries["offset"]), (int(entries["length"]),))


def main() -> None:
    """Writes the model, runs the measured process, checks what it has written, removes everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=12, help="weights of 256 MiB (default 12: 3.2 GB)")
    parser.add_argument(
        "--folder", type=Path, help="where to put 2 files of that size, for a while (default: the temporary folder)"
    )
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        source, target, site = arguments.one
        print(json.dumps(edit(Path(source), Path(target), site)))
        return
    with tempfile.TemporaryDirectory(prefix="onnxshrink-large-", dir=arguments.folder) as folder:
        needed = 2 * arguments.tensors * TENSOR_BYTES + (1 << 30)
        if shutil.disk_usage(folder).free < needed:
            sys.exit(f"{folder}: needs {needed / 1e9:.1f} GB of free disk")
        source, target, site = (
            write_model(Path(folder), arguments.tensors),
            Path(folder) / "edited.onnx",
            f"w{arguments.tensors // 2}",
        )
        command = [sys.executable, __file__, "--one", str(source), str(target), site]
        figures = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        verify(source, target, site)
        figures |= {"model_bytes": sum(path.stat().st_size for path in (source, source.parent / "weights.bin"))}
    print(
        f"{figures['model_bytes'] / 1e9:.2f} GB: load {figures['load_seconds']:.2f} s, edit {figures['edit_seconds']:.2f} s, "
        f"save {figures['save_seconds']:.1f} s; peak {figures['peak_mb']:.0f} MB beyond {figures['imports_mb']:.0f} MB of imports "
        f"(after load {figures['load_mb']:.0f}, after edit {figures['edit_mb']:.0f}); files verified"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
