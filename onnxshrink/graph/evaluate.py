"""Computes nodes that read only constants, with the reference implementation of the onnx package.

Used to fold constants and to expand coded weights. The ops are limited to those whose result is exact (integer arithmetic,
movement of elements) or a single IEEE rounding per element (float Cast, Add, Sub, Mul), so every implementation agrees on
every bit.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from onnxshrink.graph.exporter import node_message
from onnxshrink.graph.ir import Constant, Graph, Node, Variable
from onnxshrink.graph.storage import is_float

__all__ = ["EXACT_OPS", "evaluate", "is_computable", "result_elements"]

Array = np.ndarray[Any, np.dtype[Any]]

EXACT_OPS = frozenset(
    "Add Cast Concat Div Equal Flatten Gather Greater Identity Less Mod Mul Neg Not Reshape Shape Slice Split Squeeze Sub "
    "Transpose Unsqueeze Where".split()
)
_BROADCASTING_OPS = ("Add", "Div", "Equal", "Greater", "Less", "Mod", "Mul", "Sub", "Where")
_DIVISIONS = ("Div", "Mod")
_CAST_TARGETS = frozenset(
    getattr(TensorProto, name)
    for name in "FLOAT16 BFLOAT16 FLOAT DOUBLE BOOL INT8 INT16 INT32 INT64 UINT8 UINT16 UINT32 UINT64".split()
)


def is_computable(node: Node) -> bool:
    """Whether all inputs of a node are constants and its result does not depend on the implementation."""
    if node.op not in EXACT_OPS or not node.is_standard or any(True for _ in node.bodies()):
        return False
    if any(isinstance(value, onnx.AttributeProto) for value in node.attrs.values()):  # set where the function is called
        return False
    constants = [tensor for tensor in node.inputs if tensor.name]
    if not all(isinstance(tensor, Constant) and tensor.dtype != object for tensor in constants):
        return False
    if node.op in _DIVISIONS:
        return _divides_exactly(node)
    return node.op != "Cast" or _casts_exactly(node)


def result_elements(node: Node) -> int:
    """Returns an upper bound of the elements that a computable node puts out, so that nobody computes an outer product."""
    shapes = [tensor.shape for tensor in node.inputs if isinstance(tensor, Constant)]
    if node.op == "Shape":
        return len(shapes[0])
    if node.op in _BROADCASTING_OPS:
        return math.prod(np.broadcast_shapes(*shapes))
    if node.op == "Gather":
        table, indices = shapes
        return math.prod(indices) * math.prod(table) // max(1, table[int(node.attrs.get("axis", 0))])
    return sum(math.prod(shape) for shape in shapes)


def _divides_exactly(node: Node) -> bool:
    """Whether a division is of integers: of floats, and where Mod has fmod, ONNX Runtime rounds otherwise; by zero it ends."""
    if node.attrs.get("fmod", 0) or not all(np.issubdtype(tensor.dtype, np.integer) for tensor in node.inputs):
        return False
    return bool(np.all(node.inputs[1].values))


def _casts_exactly(node: Node) -> bool:
    """Whether a Cast rounds at most once, to a number that the new type has room for."""
    source, target = node.inputs[0], node.attrs.get("to")
    if not isinstance(target, int) or target not in _CAST_TARGETS or not isinstance(source, Constant):
        return False
    dtype = helper.tensor_dtype_to_np_dtype(target)
    if source.dtype == np.float64 and is_float(dtype):
        return dtype.itemsize >= 4  # ONNX Runtime rounds to float32 on the way to 16 bits
    if not is_float(source.dtype) or is_float(dtype) or dtype == np.bool_:
        return True
    values, limits = source.values.astype(np.float64), np.iinfo(dtype)
    return bool(((values > limits.min - 1.0) & (values < limits.max + 1.0)).all())


def evaluate(node: Node, scope: Graph) -> list[tuple[Variable, Array]]:
    """Returns the named outputs of a node whose inputs are constants, each with its values.

    Args:
        node: accepted by `is_computable`.
        scope: the graph it belongs to, for the opset version.
    """
    outputs = [tensor for tensor in node.outputs if isinstance(tensor, Variable) and tensor.name]
    inputs = {tensor.name: tensor.values for tensor in node.inputs if isinstance(tensor, Constant)}
    graph = onnx.GraphProto(
        name="node",
        node=[node_message(node)],
        input=[onnx.ValueInfoProto(name=name) for name in inputs],
        output=[onnx.ValueInfoProto(name=tensor.name) for tensor in outputs],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", scope.opset)])
    return list(zip(outputs, map(np.asarray, ReferenceEvaluator(model).run(None, inputs)), strict=True))
