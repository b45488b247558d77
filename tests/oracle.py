"""What tests compare with: ONNX Runtime's outputs bit for bit, and protobuf messages field by field.

Nothing here uses onnxshrink, so a mistake in it cannot hide itself.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import AttributeProto, TensorProto, helper

__all__ = ["canonical", "differences", "make_model", "random_feeds", "run", "same_bits", "session", "tensor", "value"]

Array = np.ndarray[Any, np.dtype[Any]]
_FATAL = 4  # ONNX Runtime's log level at which only what is fatal is printed
_SIZE_OF_UNKNOWN_DIM = 1
_NUMPY_OF_ORT = {"float": "float32", "double": "float64", "string": "object"}


def session(
    model: onnx.ModelProto | bytes | str | Path, *, optimise: bool = True, optimised_to: Path | None = None
) -> Any:
    """Returns an ONNX Runtime session on one CPU thread, silent and seeded.

    Args:
        model: a message, its bytes, or a path.
        optimise: whether ONNX Runtime may rewrite the graph.
        optimised_to: where to leave the graph that ONNX Runtime made of it.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimised_to is not None:
        options.optimized_model_filepath = str(optimised_to)
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else model
    onnxruntime.set_seed(0)
    return onnxruntime.InferenceSession(
        source if isinstance(source, bytes) else str(source), options, providers=["CPUExecutionProvider"]
    )


def random_feeds(running: Any, seed: int = 0) -> dict[str, Array]:
    """Returns small random inputs for the tensors that a session wants; unknown sizes are 1."""
    rng = np.random.default_rng(seed)
    feeds = {}
    for spec in running.get_inputs():
        shape = [dim if isinstance(dim, int) and dim >= 0 else _SIZE_OF_UNKNOWN_DIM for dim in spec.shape]
        name = spec.type.removeprefix("tensor(").removesuffix(")")
        dtype = np.dtype(_NUMPY_OF_ORT.get(name, name))
        if dtype.kind == "f":
            feeds[spec.name] = rng.standard_normal(shape).astype(dtype)
        elif dtype == object:
            feeds[spec.name] = np.full(shape, "text", object)
        else:
            feeds[spec.name] = rng.integers(0, 2, shape).astype(dtype)
    return feeds


def run(running: Any, feeds: Mapping[str, Any]) -> list[Any]:
    """Returns all outputs; tensors of types that numpy lacks go in and come out as raw bytes."""
    if not any(map(_is_exotic, [*running.get_inputs(), *running.get_outputs()])):
        return list(running.run(None, feeds))
    values = {name: _ort_value(array) for name, array in feeds.items()}
    outputs = running.run_with_ort_values([spec.name for spec in running.get_outputs()], values)
    return [_from_ort_value(output) for output in outputs]


def same_bits(left: Any, right: Any) -> bool:
    """Whether two outputs of ONNX Runtime are identical, NaN equal to NaN, -0.0 different from 0.0."""
    if isinstance(left, list | tuple):
        return isinstance(right, type(left)) and len(left) == len(right) and all(map(same_bits, left, right))
    if isinstance(left, dict):
        return (
            isinstance(right, dict) and left.keys() == right.keys() and all(same_bits(left[k], right[k]) for k in left)
        )
    if left is None or right is None:
        return left is right
    left, right = np.asarray(left), np.asarray(right)
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    if left.dtype == object:
        return bool(np.array_equal(left, right))
    return left.tobytes() == right.tobytes() or bool(
        np.array_equal(left, right, equal_nan=True) and _same_signs(left, right)
    )


def canonical(model: onnx.ModelProto) -> onnx.ModelProto:
    """Returns a copy with initializers, value_info and Constant nodes of every scope in a fixed order."""
    model = copy.deepcopy(model)
    _order(model.graph)
    for function in model.functions:
        _order_nodes(function.node)
    return model


def differences(left: onnx.ModelProto, right: onnx.ModelProto) -> list[str]:
    """Returns where two models differ beyond the order of initializers, value_info and Constant nodes; at most ten places."""
    left, right = canonical(left), canonical(right)
    if left.SerializeToString(deterministic=True) == right.SerializeToString(deterministic=True):
        return []
    return [place for place, _ in zip(_differ(left, right, "model"), range(10), strict=False)] or ["unknown fields"]


def tensor(name: str, shape: Sequence[int | str | None] | None, dtype: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    """Returns the description of a dense tensor, float unless said otherwise."""
    return helper.make_tensor_value_info(name, dtype, shape)


def value(name: str, array: Any, dtype: Any = None) -> TensorProto:
    """Returns an initializer."""
    return onnx.numpy_helper.from_array(np.asarray(array, dtype), name)


def make_model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    initializers: Sequence[TensorProto] = (),
    *,
    opset: int = 17,
    ir_version: int = 8,
    functions: Sequence[onnx.FunctionProto] = (),
    opsets: Mapping[str, int] | None = None,
) -> onnx.ModelProto:
    """Returns a model of the default domain, and of the domains in ``opsets``."""
    graph = helper.make_graph(nodes, "graph", inputs, outputs, initializers)
    imports = [helper.make_opsetid(domain, version) for domain, version in {"": opset, **(opsets or {})}.items()]
    return helper.make_model(graph, opset_imports=imports, ir_version=ir_version, functions=functions)


def _is_exotic(spec: Any) -> bool:
    return any(name in spec.type for name in ("bfloat16", "float8", "float4", "int4", "int2"))


def _ort_value(array: Any) -> Any:
    if isinstance(array, list):
        raise NotImplementedError("a sequence beside a tensor of raw bytes")
    if array.dtype.isbuiltin != 2:  # numpy: 2 for types that another package, here ml_dtypes, has registered
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array).reshape(array.shape))
    raw, element = onnx.numpy_helper.from_array(array).raw_data, helper.np_dtype_to_tensor_dtype(array.dtype)
    result: Any = onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(array.shape), element)
    ctypes.memmove(result.data_ptr(), raw, len(raw))
    return result


def _from_ort_value(output: Any) -> Any:
    if not output.is_tensor() or not any(
        name in output.data_type() for name in ("bfloat16", "float8", "float4", "int4", "int2")
    ):
        return output.numpy()
    return np.frombuffer(ctypes.string_at(output.data_ptr(), output.tensor_size_in_bytes()), np.uint8)


def _same_signs(left: Array, right: Array) -> bool:
    """Whether zeros carry the same signs; NaNs may differ in payload."""
    if left.dtype.kind != "f":
        return True
    return bool(np.array_equal(np.signbit(left) | np.isnan(left), np.signbit(right) | np.isnan(right)))


def _order(graph: onnx.GraphProto) -> None:
    for field in (graph.initializer, graph.value_info):
        _sort(field, lambda item: (item.name, item.SerializeToString(deterministic=True)))
    _sort(graph.sparse_initializer, lambda item: item.values.name)
    _order_nodes(graph.node)


def _order_nodes(nodes: Any) -> None:
    _sort(nodes, lambda node: (not _holds_tensor(node), node.output[0] if _holds_tensor(node) else ""))
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        for body in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
            _order(body)


def _sort(field: Any, key: Any) -> None:
    items = [copy.deepcopy(item) for item in sorted(field, key=key)]
    del field[:]
    field.extend(items)


def _holds_tensor(node: onnx.NodeProto) -> bool:
    return node.op_type == "Constant" and [item.type for item in node.attribute] == [AttributeProto.TENSOR]


def _differ(left: Any, right: Any, path: str) -> Iterator[str]:
    names = {field.name: field for message in (left, right) for field, _ in message.ListFields()}
    for name, field in names.items():
        ours, theirs = getattr(left, name), getattr(right, name)
        if field.is_repeated:
            if len(ours) != len(theirs):
                yield f"{path}.{name}: {len(ours)} entries became {len(theirs)}"
            elif field.message_type is not None:
                for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
                    if one.SerializeToString(deterministic=True) != other.SerializeToString(deterministic=True):
                        yield from _differ(one, other, f"{path}.{name}[{index}]")
            elif list(ours) != list(theirs):
                yield f"{path}.{name}: {str(ours)[:80]} became {str(theirs)[:80]}"
        elif field.has_presence and left.HasField(name) != right.HasField(name):
            yield f"{path}.{name}: {'dropped' if left.HasField(name) else 'added'}"
        elif field.message_type is not None:
            yield from _differ(ours, theirs, f"{path}.{name}")
        elif ours != theirs:
            yield f"{path}.{name}: {ours!r} became {theirs!r}"
