"""How an operand of a node becomes a matrix [output channels, reduction axis], and back.

Sparsification, sharing and factorization all think in matrices whose rows are output channels and whose columns are what is
summed over. Where those lie in the tensor differs from op to op; this table says it once. Shapes follow the ONNX operator
specification:

    Conv, DeformConv    W [O, I/g, *k]        rows O            columns I/g·k
    ConvTranspose       W [I, O/g, *k]        rows O = g·O/g    columns I/g·k
    Gemm, MatMul        B [*b, K, N]          rows b·N          columns K         (A [*b, M, K]: rows b·M)
    LSTM, GRU, RNN      W, R [d, gates·H, I]  rows d·gates·H    columns I
    Gather              table [V, *d]         rows V            columns d
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import AttributeProto

from onnxshrink.graph.ir import Constant, Node

__all__ = ["COMPUTE_OPS", "View", "is_mover", "is_weight_operand", "operand_view", "reads_values", "through"]

Array = np.ndarray[Any, np.dtype[Any]]
Shape = tuple[int, ...]
COMPUTE_OPS = ("Conv", "ConvTranspose", "DeformConv", "GRU", "Gemm", "LSTM", "MatMul", "RNN")


@dataclass(frozen=True)
class View:
    """An invertible chain of reshapes and axis permutations from a stored tensor to a matrix.

    Attributes:
        shapes: the shape before each step, and the final one.
        steps: per step the permutation, or None for a reshape.
        channel_axis: the axis of the STORED tensor that holds output channels, None when no single axis does.
    """

    shapes: tuple[Shape, ...]
    steps: tuple[Shape | None, ...] = ()
    channel_axis: int | None = None

    @property
    def shape(self) -> Shape:
        """The shape that comes out."""
        return self.shapes[-1]

    def forward(self, array: Array) -> Array:
        """Returns the matrix of a stored tensor; a view of it where numpy can."""
        for shape, step in zip(self.shapes[1:], self.steps, strict=True):
            array = array.reshape(shape) if step is None else array.transpose(step)
        return array

    def inverse(self, matrix: Array) -> Array:
        """Returns the stored tensor of a matrix; a view of it where numpy can."""
        for shape, step in zip(reversed(self.shapes[:-1]), reversed(self.steps), strict=True):
            matrix = matrix.reshape(shape) if step is None else matrix.transpose(np.argsort(step))
        return matrix

    def reshape(self, shape: Shape) -> View:
        """Returns this view followed by a reshape."""
        return View((*self.shapes, shape), (*self.steps, None), self.channel_axis)

    def permute(self, axes: Shape) -> View:
        """Returns this view followed by a permutation of axes."""
        return View((*self.shapes, tuple(self.shape[axis] for axis in axes)), (*self.steps, axes), self.channel_axis)

    def channels_on(self, axis: int | None) -> View:
        """Returns this view with the channel axis that is ``axis`` of the tensor as it comes out now."""
        for before, after, step in zip(self.shapes[-2::-1], self.shapes[:0:-1], reversed(self.steps), strict=True):
            if axis is None:
                break
            axis = step[axis] if step is not None else _same_axis(before, after, axis)
        return View(self.shapes, self.steps, axis)


def through(view: View, node: Node, operand: int) -> View | None:
    """Returns the view after a node that only moves elements, or None where it does not, or not in a known way."""
    rule = _MOVES.get(node.op) if node.is_standard and operand == 0 else None
    if rule is None or any(isinstance(value, AttributeProto) for value in node.attrs.values()):
        return None
    return rule(view, node)


def operand_view(view: View, node: Node, operand: int) -> View | None:
    """Returns the view as a matrix of an operand that a node computes with, or None if it is no weight operand.

    Args:
        view: from the stored tensor to the operand.
        node: the consumer.
        operand: which of its inputs.
    """
    rule = _OPERANDS.get((node.op, operand)) if node.is_standard else None
    if rule is None or any(isinstance(value, AttributeProto) for value in node.attrs.values()):
        return None
    return rule(view, node)


def is_mover(node: Node, operand: int) -> bool:
    """Whether a node only moves, copies, drops or converts the elements of that input, in whatever order."""
    return node.is_standard and (node.op == "Concat" or (operand == 0 and node.op in {*_MOVES, *_SCATTERED_MOVES}))


def is_weight_operand(node: Node, operand: int) -> bool:
    """Whether that input of a node is a weight in the sense of the table above."""
    return node.is_standard and (node.op, operand) in _OPERANDS


def reads_values(node: Node) -> bool:
    """Whether a node looks at the values of its input, not only at its shape."""
    return not (node.is_standard and node.op in ("Shape", "Size"))


def _reshape(view: View, node: Node) -> View | None:
    if len(node.inputs) < 2:  # opset 1 to 4: an attribute
        return None
    target = node.inputs[1]
    if not isinstance(target, Constant) or node.attrs.get("allowzero", 0):
        return None
    dims = [int(dim) for dim in target.values]
    if any(dim == 0 and index >= len(view.shape) for index, dim in enumerate(dims)):
        return None
    dims = [view.shape[index] if dim == 0 else dim for index, dim in enumerate(dims)]
    known = math.prod(dim for dim in dims if dim != -1)
    dims = [math.prod(view.shape) // max(known, 1) if dim == -1 else dim for dim in dims]
    return view.reshape(tuple(dims)) if math.prod(dims) == math.prod(view.shape) else None


def _transpose(view: View, node: Node) -> View | None:
    axes = tuple(node.attrs.get("perm") or range(len(view.shape))[::-1])
    return view.permute(axes) if sorted(axes) == list(range(len(view.shape))) else None


def _unchanged(view: View, _: Node) -> View:
    return view


def _flatten(view: View, node: Node) -> View | None:
    axis, rank = int(node.attrs.get("axis", 1)), len(view.shape)
    if not -rank <= axis <= rank:
        return None
    axis = axis + rank if axis < 0 else axis
    return view.reshape((math.prod(view.shape[:axis]), math.prod(view.shape[axis:])))


def _squeeze(view: View, node: Node) -> View | None:
    axes, rank = _axes(node), len(view.shape)
    if axes is None or any(not -rank <= axis < rank or view.shape[axis] != 1 for axis in axes):
        return None
    dropped = {axis % rank for axis in axes} or {index for index, dim in enumerate(view.shape) if dim == 1}
    return view.reshape(tuple(dim for index, dim in enumerate(view.shape) if index not in dropped))


def _unsqueeze(view: View, node: Node) -> View | None:
    axes = _axes(node)
    if axes is None:
        return None
    rank = len(view.shape) + len(axes)
    added, dims = {axis % rank for axis in axes}, iter(view.shape)
    if len(added) != len(axes):
        return None
    return view.reshape(tuple(1 if index in added else next(dims) for index in range(rank)))


def _axes(node: Node) -> list[int] | None:
    """Returns the axes of Squeeze and Unsqueeze: an attribute before opset 13, an input since; None if not constant."""
    if len(node.inputs) < 2 or not node.inputs[1].name:
        return [int(axis) for axis in node.attrs.get("axes", [])]
    axes = node.inputs[1]
    return [int(axis) for axis in axes.values.reshape(-1)] if isinstance(axes, Constant) else None


def _rows_first(view: View, _: Node) -> View | None:
    if len(view.shape) < 2:
        return None
    return view.channels_on(0).reshape((view.shape[0], math.prod(view.shape[1:])))


def _conv_transpose(view: View, node: Node) -> View | None:
    if len(view.shape) < 3:
        return None
    inputs, outputs, kernel = view.shape[0], view.shape[1], math.prod(view.shape[2:])
    groups = int(node.attrs.get("group", 1))
    if groups < 1 or inputs % groups:
        return None
    axis = 1 if groups == 1 else 0 if inputs == groups and outputs == 1 else None
    return (
        view.channels_on(axis)
        .reshape((groups, inputs // groups, outputs, kernel))
        .permute((0, 2, 1, 3))
        .reshape((groups * outputs, inputs // groups * kernel))
    )


def _columns_first(view: View, _: Node) -> View | None:
    """[*b, K, N] -> [b·N, K]: the right operand of a product."""
    rank = len(view.shape)
    if rank < 2:
        return None
    axes = (*range(rank - 2), rank - 1, rank - 2)
    return view.channels_on(rank - 1).permute(axes).reshape((_rows(view, -2), view.shape[-2]))


def _rows_last(view: View, _: Node) -> View | None:
    """[*b, M, K] -> [b·M, K]: the left operand of a product."""
    rank = len(view.shape)
    if rank < 2:
        return None
    return view.channels_on(rank - 2).reshape((math.prod(view.shape[:-1]), view.shape[-1]))


def _gemm_left(view: View, node: Node) -> View | None:
    return _columns_first(view, node) if node.attrs.get("transA", 0) else _rows_last(view, node)


def _gemm_right(view: View, node: Node) -> View | None:
    return _rows_last(view, node) if node.attrs.get("transB", 0) else _columns_first(view, node)


def _recurrent(view: View, _: Node) -> View | None:
    if len(view.shape) != 3:
        return None
    directions, gates, inputs = view.shape
    return view.channels_on(1).reshape((directions * gates, inputs))


def _table(view: View, node: Node) -> View | None:
    if not view.shape:
        return None
    rank = len(view.shape)
    axis = int(node.attrs.get("axis", 0)) % rank
    axes = (axis, *(other for other in range(rank) if other != axis))
    return view.channels_on(axis).permute(axes).reshape((view.shape[axis], _rows(view, axis)))


def _rows(view: View, without: int) -> int:
    """Returns the product of all dimensions but one."""
    axis = without % len(view.shape)
    return math.prod(dim for index, dim in enumerate(view.shape) if index != axis)


def _same_axis(before: Shape, after: Shape, axis: int) -> int | None:
    """Returns the axis that a reshape left whole at that place, e.g. through an added or dropped 1, or None."""
    left, size = math.prod(after[:axis]), after[axis]
    return next(
        (index for index, dim in enumerate(before) if dim == size and math.prod(before[:index]) == left and dim > 1), None
    )


_Rule = Callable[[View, Node], "View | None"]
_MOVES: dict[str, _Rule] = {
    "Cast": _unchanged,
    "DequantizeLinear": _unchanged,
    "Flatten": _flatten,
    "Identity": _unchanged,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
_SCATTERED_MOVES = ("Expand", "Pad", "Slice", "Split", "Tile")  # and Concat: elements move, no single view describes it
_OPERANDS: dict[tuple[str, int], _Rule] = {
    ("Conv", 1): _rows_first,
    ("ConvTranspose", 1): _conv_transpose,
    ("DeformConv", 1): _rows_first,
    ("Gather", 0): _table,
    ("Gemm", 0): _gemm_left,
    ("Gemm", 1): _gemm_right,
    ("MatMul", 0): _rows_last,
    ("MatMul", 1): _columns_first,
    **{(op, operand): _recurrent for op in ("GRU", "LSTM", "RNN") for operand in (1, 2)},
}
