"""What tells the decoders of sparse weights (`onnxshrink.graph.sparse_form`) from other nodes, and a quick way to evaluate them.

`onnxshrink.graph.coded` follows weights from their codes through the steps of decoding. Those of sparse weights count set bits to
find out which value belongs where, so all of these are integers until a value is looked up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import AttributeProto
from onnx.reference.op_run import OpRun

from onnxshrink.graph.ir import Constant, Node, Tensor, Variable
from onnxshrink.graph.storage import element_type, is_float

__all__ = ["QUICK_OPS", "counts_bits", "is_sparse_decoder"]

Array = np.ndarray[Any, np.dtype[Any]]
_OF_INTEGERS = ("BitShift", "CumSum", "Range", "ScatterElements", "Transpose")
_COUNTING = ("CumSum", "MatMul")


def counts_bits(node: Node, known: Mapping[int, np.dtype[Any]]) -> np.dtype[Any] | None:
    """Returns the element type that a node computes, if it may be a step from a mask or gaps to places, else None.

    Args:
        node: the node.
        known: element types of constants and of what is computed from them alone, by id.
    """
    reads = [tensor for tensor in node.inputs if tensor.name]
    if not node.is_standard or len(node.outputs) != 1 or not reads or not all(id(tensor) in known for tensor in reads):
        return None
    if node.op == "MatMul":
        return np.dtype(np.float32) if all(map(_is_cast_integer, reads)) else None
    if node.op == "Less":
        return np.dtype(np.bool_) if all(isinstance(tensor, Constant) for tensor in reads) else None
    if any(is_float(known[id(tensor)]) for tensor in reads):
        return None
    if node.op == "ConstantOfShape":
        return _filled_with(node)
    return known[id(reads[0])] if node.op in _OF_INTEGERS else None


def is_sparse_decoder(node: Node) -> bool:
    """Whether a step counts bits, or adds gaps up: of the weights that are stored as codes only sparse ones have it."""
    return node.is_standard and node.op in _COUNTING


def _is_cast_integer(tensor: Tensor) -> bool:
    """Whether a tensor is bits or truth values as float32: sums of so few are exact."""
    return isinstance(tensor, Variable) and bool(tensor.inputs) and tensor.inputs[0].op == "Cast"


def _filled_with(node: Node) -> np.dtype[Any] | None:
    """Returns the element type of a ConstantOfShape if it is one of integers."""
    value = node.attrs.get("value")
    if not isinstance(value, AttributeProto):
        return None
    dtype = element_type(value.t.data_type)
    return dtype if dtype.kind in "iu" else None


class _ScatterElements(OpRun):
    """ScatterElements of vectors in one step: onnx's own reference works element by element."""

    op_domain = ""

    def _run(self, data: Array, indices: Array, updates: Array, axis: int = 0, reduction: str = "none") -> tuple[Array]:
        result = data.copy()
        if reduction != "none" or axis != 0 or data.ndim != 1:
            raise RuntimeError(f"ScatterElements of {data.ndim} axes along axis {axis} with reduction {reduction}")
        result[indices] = updates
        return (result,)


_ScatterElements.__name__ = "ScatterElements"  # by which onnx finds it
QUICK_OPS: list[type[OpRun]] = [_ScatterElements]
