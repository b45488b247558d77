"""What a node makes of a stored weight before it multiplies with it: its dtype and its values, through Cast, DequantizeLinear and moves.

DequantizeLinear computes (x - zero_point) * scale with one scale for the tensor, one for each index along an axis, or, since opset 21, one
for each block of them (ONNX operator specification).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxshrink.graph.ir import Constant, Node
from onnxshrink.graph.storage import element_type
from onnxshrink.graph.views import View, through
from onnxshrink.graph.weights import Use, Weight

__all__ = ["computed_matrix", "computed_type", "conversions", "dequantized"]

Array = np.ndarray[Any, np.dtype[Any]]


def computed_type(weight: Weight, use: Use) -> np.dtype[Any] | str:
    """Returns the dtype in which a node reads a weight, or in one line why that or the values cannot be said."""
    dtype, view = weight.constant.dtype, View((weight.constant.shape,))
    for node in use.path:
        moved = through(view, node, 0)
        if moved is None:
            return f"rearranged in an unknown way by {node.op} '{node.site}'"
        view = moved
        if node.op == "Cast":
            dtype = element_type(int(node.attrs["to"]))
        elif node.op == "DequantizeLinear":
            if not all(isinstance(tensor, Constant) for tensor in node.inputs[1:] if tensor.name):
                return f"the scale of DequantizeLinear '{node.site}' is computed"
            asked = int(node.attrs.get("output_dtype", 0))
            dtype = element_type(asked) if asked else _values(node, 1).dtype
    return dtype


def conversions(use: Use) -> tuple[Any, ...]:
    """Returns what tells values that differ apart: equal for uses of one weight whose nodes read the same values, moved or not."""
    return tuple(
        (node.op, tuple(sorted(node.attrs.items())), *map(id, node.inputs[1:]))
        for node in use.path
        if node.op in ("Cast", "DequantizeLinear")
    )


def computed_matrix(weight: Weight, use: Use) -> Array:
    """Returns what a node multiplies with: the matrix of its view, float64 [rows, columns].

    Args:
        weight: whose layout is the view of the use.
        use: one for which `computed_type` finds a dtype.
    """
    assert use.view is not None
    values, view = weight.constant.values, View((weight.constant.shape,))
    for node in use.path:
        moved = through(view, node, 0)
        assert moved is not None
        if node.op == "Cast":
            values = values.astype(element_type(int(node.attrs["to"])))
        elif node.op == "DequantizeLinear":
            values = dequantized(node, values)
        values = _further(moved, view).forward(values)
        view = moved
    return _further(use.view, view).forward(values).astype(np.float64)


def dequantized(node: Node, values: Array) -> Array:
    """Returns what a DequantizeLinear with constant scales makes of values of any shape, in the dtype it gives, to the bit.

    ONNX Runtime (1.31, quantize_linear.cc) takes the zero point off as integers and multiplies as float32, then rounds.
    """
    scale = _along(node, 1, values)
    exact = np.int32 if values.dtype == np.int32 else np.float32  # which has all differences of elements of up to 16 bits
    wide = values.astype(exact)
    if len(node.inputs) > 2 and node.inputs[2].name:
        wide = wide - _along(node, 2, values).astype(exact)
    asked = int(node.attrs.get("output_dtype", 0))
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        found: Array = (wide.astype(np.float32) * scale.astype(np.float32)).astype(element_type(asked) if asked else scale.dtype)
    return found


def _along(node: Node, index: int, values: Array) -> Array:
    """Returns a scale or zero point so that it broadcasts to values: one for all, one an index along an axis, or one a block of them."""
    found, axis, block = _values(node, index), int(node.attrs.get("axis", 1)), int(node.attrs.get("block_size", 0))
    if found.size == 1:
        return found.reshape(())
    if block:
        return np.repeat(found, block, axis=axis)[tuple(map(slice, values.shape))]
    return found.reshape([-1 if other == axis % values.ndim else 1 for other in range(values.ndim)])


def _further(view: View, start: View) -> View:
    """Returns the steps of a view that come after those it starts with."""
    return View(view.shapes[len(start.shapes) - 1 :], view.steps[len(start.steps) :])


def _values(node: Node, index: int) -> Array:
    tensor = node.inputs[index]
    assert isinstance(tensor, Constant)
    return tensor.values
