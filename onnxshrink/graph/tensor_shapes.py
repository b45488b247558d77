"""The shapes of all tensors of the main graph, inferred anew: what a file says about its inner tensors may be out of date.

A size is an int, the name of an unknown size, or None. Equal names are equal sizes (ONNX IR specification, "Static tensor shapes"); but
some exporters write "?" or "None" for whatever they do not know, so those get names of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference

from onnxshrink.graph.excerpt import tensors_by_name
from onnxshrink.graph.exporter import inline_tensor, shell_tensor, to_model
from onnxshrink.graph.ir import Constant, Graph, Tensor, declared_type

__all__ = ["Dims", "Shapes", "tensor_shapes"]

Array = np.ndarray[Any, np.dtype[Any]]
Dims = tuple["int | str | None", ...]
Shapes = Mapping[int, Dims]
_NAME = re.compile(r"[A-Za-z_][\w.]*")
_SHAPELESS = (  # keep the shape of their first input
    "GroupNormalization",  # inference through its body loses it (onnx 1.23)
    *("Affine", "ImageScaler"),  # retired: onnx no longer knows them, ONNX Runtime still runs them (contrib_ops/contrib_defs.cc)
)
_MAX_VALUES = 64  # constants of up to that many elements may be shapes, and inference needs their values


def tensor_shapes(
    graph: Graph,
    known: Mapping[str, Dims] | None = None,
    values: Mapping[int, Array] | None = None,
    targets: Mapping[str, Array] | None = None,
) -> dict[int, Dims]:
    """Returns the dimensions of the tensors whose rank is known, by the tensor's id.

    Args:
        graph: the main graph; only read.
        known: dimensions by tensor name, e.g. as observed while running, None where they vary; they go before inferred ones.
        values: of tensors that are computed from sizes, by id, where they are known: inference follows few such computations itself.
        targets: by the name of what a Reshape computes, a constant that could stand for its computed shape.
    """
    model = to_model(graph, _small)
    del model.graph.value_info[:]
    _fold(model.graph, {tensor.name: values[key] for key, tensor in _computed(graph) if values and key in values})
    for node in model.graph.node:
        if node.op_type in _SHAPELESS and len(node.output) == 1:
            node.CopyFrom(onnx.NodeProto(op_type="Identity", input=node.input[:1], output=node.output))
        if node.op_type == "Crop":
            node.CopyFrom(_like_crop(node))
        if node.op_type == "Reshape" and targets and node.output[0] in targets:
            node.input[1] = f"{node.output[0]}\nshape"  # no exporter breaks lines in names
            model.graph.initializer.append(numpy_helper.from_array(targets[node.output[0]], node.input[1]))
    for index, info in enumerate(model.graph.input):
        for axis, dim in enumerate(info.type.tensor_type.shape.dim):
            if dim.dim_value <= 0 and not (_NAME.fullmatch(dim.dim_param) and dim.dim_param != "None"):
                dim.dim_param = f"input {index}, axis {axis}"
    for info in model.graph.output:
        info.type.tensor_type.ClearField("shape")
    found = _inferred(model, known or {})
    shapes: dict[int, Dims] = {}
    for name, tensor in tensors_by_name(graph).items():
        if isinstance(tensor, Constant):
            shapes[id(tensor)] = tensor.shape
        elif values and id(tensor) in values:
            shapes[id(tensor)] = values[id(tensor)].shape
        elif known is not None and name in known:
            shapes[id(tensor)] = known[name]
        elif (dims := found.get(name)) is not None:
            shapes[id(tensor)] = tuple(dim if not isinstance(dim, int) or dim >= 0 else None for dim in dims)
    return shapes


def _like_crop(node: onnx.NodeProto) -> onnx.NodeProto:
    """Returns a pooling whose output is as large as that of the retired Crop, which takes (left, top, right, bottom) away."""
    given = {attribute.name: list(attribute.ints) for attribute in node.attribute}
    left, top, right, bottom = given.get("border") or [0] * 4
    kernel = [top + bottom + 1, left + right + 1]
    return node if "scale" in given else helper.make_node("MaxPool", node.input[:1], node.output, kernel_shape=kernel)


def _inferred(model: onnx.ModelProto, known: Mapping[str, Dims]) -> dict[str, Dims | None]:
    """Returns what inference finds, twice if something is known that it may build on: types must be found first."""
    found = {info.name: declared_type(info) for info in model.graph.input}
    for is_last in (False, True):
        try:
            inferred = shape_inference.infer_shapes(model, data_prop=True).graph
        except (shape_inference.InferenceError, ValueError):  # e.g. an op that the checker does not know: what was found remains
            break
        found = {info.name: declared_type(info) for info in (*inferred.input, *inferred.output, *inferred.value_info)}
        facts = [(name, found[name][0], dims) for name, dims in known.items() if name in found]
        if is_last or not facts:
            break
        model.graph.value_info.extend(
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), dims) for name, dtype, dims in facts if dtype
        )
    return {name: dims for name, (_, dims) in found.items()}


def _computed(graph: Graph) -> Iterator[tuple[int, Tensor]]:
    return ((id(tensor), tensor) for node in graph.nodes for tensor in node.outputs if tensor.name)


def _fold(graph: onnx.GraphProto, values: Mapping[str, Array]) -> None:
    """Puts initializers where nodes compute values that are known."""
    for index in reversed(range(len(graph.node))):
        names = [name for name in graph.node[index].output if name]
        if len(names) == 1 and names[0] in values:
            del graph.node[index]
            graph.initializer.append(numpy_helper.from_array(values[names[0]], names[0]))


def _small(constant: Constant) -> TensorProto:
    return inline_tensor(constant) if constant.size <= _MAX_VALUES else shell_tensor(constant)
