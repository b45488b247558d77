"""What layers meet on average, as far as the graph alone tells: a channel that was just normalized has a known mean and spread.

    BatchNormalization     N(B, scale^2) in each channel      Nagel et al., Data-Free Quantization, arXiv 1906.04721, section 4.2
    Relu, Clip, ...        f of that: E[relu(x)] = B Phi(B / s) + s phi(B / s)
    x * Sigmoid(x), ...    f of one and the same normalized x, however many nodes it takes
    Add of two             means add; for what comes then, a normal with both variances, as if they were not correlated
    average pooling        the mean stays; the spread, which shrinks by an unknown amount, is taken to stay
    Conv, Gemm, ...        W mean + b, and an unknown spread: enough for what follows up to the next function

A channel is held as the values that it takes at fixed quantiles z of a standard normal, so every f is applied as it stands. Padding is
not seen: at the border of a padded Conv the true mean input is smaller than what is said here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx

from onnxshrink.graph.elementwise import FUNCTIONS
from onnxshrink.graph.ir import Constant, Graph, Node, Tensor
from onnxshrink.graph.lowering import lowering
from onnxshrink.graph.storage import is_float
from onnxshrink.graph.views import View, operand_view
from onnxshrink.graph.weights import Use

__all__ = ["Expectations", "is_inference"]

Array = np.ndarray[Any, np.dtype[Any]]
_Z = np.linspace(-6.0, 6.0, 121)  # of a function with a kink the mean comes out within 4e-4 of the spread
_P = np.exp(-0.5 * _Z**2) / np.exp(-0.5 * _Z**2).sum()


@dataclass(frozen=True, eq=False)
class _Channels:
    """What a tensor holds.

    Attributes:
        values: float64 [channels, len(_Z)].
        source: what z is: tensors of one source are functions of the same z.
        spread: whether they are more than means.
        pooled: whether there is one position left.
        flat: whether the channels, each with all its positions, lie along the last of two axes; else along axis 1.
    """

    values: Array
    source: object
    spread: bool = True
    pooled: bool = False
    flat: bool = False

    @property
    def mean(self) -> Array:
        """float64 [channels]."""
        mean: Array = self.values @ _P
        return mean


class Expectations:
    """The mean inputs of layers of a main graph whose inputs follow from normalized tensors."""

    def __init__(self, graph: Graph) -> None:
        """Looks at every node once.

        Args:
            graph: the main graph, its nodes in order; not changed.
        """
        self._met: dict[int, Array] = {}  # means of the first inputs of layers, by id of the node
        self._nodes = list(graph.nodes)  # keeps the ids
        held: dict[int, _Channels] = {}
        readers = {id(tensor): len(tensor.outputs) for node in graph.nodes for tensor in node.outputs}
        for node in graph.nodes:
            if node.is_standard and node.op in _LAYERS and (met := held.get(id(node.inputs[0]))) is not None and _fits(node, met):
                self._met[id(node)] = met.mean
            if (found := _result(node, held)) is not None:
                held[id(node.outputs[0])] = found
            for tensor in node.inputs:  # what nobody will read any more goes
                readers[id(tensor)] = readers.get(id(tensor), 0) - 1
                if readers[id(tensor)] == 0:
                    held.pop(id(tensor), None)

    def mean_input(self, use: Use) -> Array | str:
        """Returns the mean of what each column of a weight meets, float64 [groups, columns], or why it is not known, in one line."""
        node = use.node
        if node is None or node.op not in _LAYERS or use.operand != 1 or node.attrs.get("transA", 0):
            return f"{use.op} reads no channels with it"
        way = lowering(use)
        if isinstance(way, str):
            return way
        mean = self._met.get(id(node))
        if mean is None:
            return "its inputs do not follow from normalized ones"
        columns = _columns(mean, node, way.groups, way.columns)
        return f"{mean.size} normalized channels do not fit {way.groups} x {way.columns} columns" if columns is None else columns


def _fits(node: Node, met: _Channels) -> bool:
    """Whether the channels that a layer meets lie along the axis that it sums over."""
    if node.op == "Gemm":
        return not node.attrs.get("transA", 0)
    if node.op == "MatMul":
        return met.flat or len(getattr(node.inputs[0], "shape", None) or ()) == 2
    return not met.flat


def _columns(mean: Array, node: Node, groups: int, columns: int) -> Array | None:
    """Returns the mean of what each column of a layer's weight meets, [groups, columns], or None if the channels do not fit."""
    if not mean.size or mean.size % groups or columns * groups % mean.size:
        return None
    times = columns * groups // mean.size  # positions of a kernel, or of an image that was flattened
    each: Array = np.repeat(mean.reshape(groups, -1), times, axis=1)
    if node.op == "ConvTranspose":  # zeros between the elements: each position of the kernel meets one of so many
        each = each / float(np.prod(node.attrs.get("strides") or [1]))
    return each


def is_inference(norm: Node) -> bool:
    """Whether a BatchNormalization uses its stored statistics, one for each channel.

    Before opset 14 a single output means inference; before opset 9 ``spatial = 0`` normalizes each position by itself (ONNX operator
    specification, BatchNormalization).
    """
    plain = not any(isinstance(value, onnx.AttributeProto) for value in norm.attrs.values())
    training = norm.attrs.get("training_mode", 0) or sum(bool(tensor.name) for tensor in norm.outputs) > 1
    return norm.is_standard and norm.op == "BatchNormalization" and plain and not training and norm.attrs.get("spatial", 1) == 1


def _result(node: Node, held: dict[int, _Channels]) -> _Channels | None:
    """Returns what the first output of a node holds, or None."""
    if not node.is_standard or not node.inputs or not node.outputs:
        return None
    if node.op == "BatchNormalization":
        return _normalized(node)
    if node.op in _BINARY and len(node.inputs) == 2:
        return _binary(node, held)
    if node.op == "Concat":
        return _concat(node, held)
    if node.op in _LAYERS:
        return _layer(node, held)
    found = held.get(id(node.inputs[0]))
    if found is None or any(isinstance(value, onnx.AttributeProto) for value in node.attrs.values()):
        return None
    if node.op in FUNCTIONS:
        values = FUNCTIONS[node.op](found.values, node) if found.spread else None
        return None if values is None else replace(found, values=values)
    return _MOVES[node.op](found, node) if node.op in _MOVES else None


def _normalized(node: Node) -> _Channels | None:
    scale, shift = node.inputs[1:3]
    if not is_inference(node) or not isinstance(scale, Constant) or not isinstance(shift, Constant) or not is_float(scale.dtype):
        return None
    spread, centre = (tensor.values.astype(np.float64).reshape(-1, 1) for tensor in (scale, shift))
    values = centre + spread * _Z
    return _Channels(values, node) if np.isfinite(values).all() else None


def _layer(node: Node, held: dict[int, _Channels]) -> _Channels | None:
    """Returns the means of what a layer with constant weight and bias computes."""
    met, (weight, *rest) = held.get(id(node.inputs[0])), node.inputs[1:]
    bias = next((tensor for tensor in rest if tensor.name), None)
    plain = node.attrs.get("alpha", 1.0) == 1.0 == node.attrs.get("beta", 1.0)
    if met is None or not _fits(node, met) or not plain or not isinstance(weight, Constant) or not is_float(weight.dtype):
        return None
    view = operand_view(View((weight.shape,)), node, 1)
    groups = int(node.attrs.get("group", 1))
    columns = _columns(met.mean, node, groups, view.shape[1]) if view is not None else None
    is_matrix = weight.shape[2:] == () or node.op in ("Conv", "ConvTranspose")
    if view is None or columns is None or not is_matrix or (bias is not None and not isinstance(bias, Constant)):
        return None
    rows = view.forward(weight.values).astype(np.float64)
    means = np.concatenate([part @ mean for part, mean in zip(np.split(rows, groups), columns, strict=True)])
    if isinstance(bias, Constant):
        if bias.size != means.size or bias.shape[-1:] != (means.size,):
            return None
        means = means + bias.values.astype(np.float64).reshape(-1)
    if not np.isfinite(means).all():
        return None
    flat, one = node.op in ("Gemm", "MatMul"), met.pooled and all(side == 1 for side in weight.shape[2:])
    return _Channels(np.repeat(means[:, None], len(_Z), axis=1), node, spread=False, pooled=one, flat=flat)


def _binary(node: Node, held: dict[int, _Channels]) -> _Channels | None:
    """Returns a sum or product of two tensors, one of them perhaps constant for each channel."""
    known = [held.get(id(tensor)) for tensor in node.inputs]
    left, right = known
    one = left or right
    if one is None:
        return None
    with np.errstate(all="ignore"):
        if left is None or right is None:
            other = _constant(node.inputs[0 if left is None else 1], one)
            if other is None:
                return None
            if node.op == "Div" and left is None and not one.spread:  # 1 / x is no linear function
                return None
            operands = [other if part is None else part.values for part in known]
            values = _BINARY[node.op](*operands)
        elif left.values.shape != right.values.shape or (left.flat, left.pooled) != (right.flat, right.pooled):
            return None
        elif left.source is right.source and left.spread and right.spread:
            values = _BINARY[node.op](left.values, right.values)
        elif node.op in ("Add", "Sub"):
            variance = sum((np.square(part.values) @ _P - part.mean**2 for part in (left, right)), np.zeros(len(left.values)))
            centre = _BINARY[node.op](left.mean, right.mean)
            values = centre[:, None] + np.sqrt(np.maximum(variance, 0.0))[:, None] * _Z
            return _Channels(values, node, left.spread and right.spread, left.pooled, left.flat)
        else:
            return None
    return replace(one, values=values) if np.isfinite(values).all() else None


def _constant(tensor: Tensor, beside: _Channels) -> Array | None:
    """Returns a constant operand as [1 or channels, 1], or None if it is none, or differs within a channel."""
    if not isinstance(tensor, Constant) or not is_float(tensor.dtype):
        return None
    channels = len(beside.values)
    if tensor.size != 1 and (beside.flat or tensor.shape not in ((channels, 1, 1), (1, channels, 1, 1))):
        return None
    return tensor.values.astype(np.float64).reshape(-1, 1)


def _concat(node: Node, held: dict[int, _Channels]) -> _Channels | None:
    parts = [held.get(id(tensor)) for tensor in node.inputs]
    found = [part for part in parts if part is not None and not part.flat]
    if node.attrs.get("axis") != 1 or len(found) != len(parts):
        return None
    spread, pooled = all(part.spread for part in found), all(part.pooled for part in found)
    return _Channels(np.concatenate([part.values for part in found]), node, spread, pooled)


def _flatten(found: _Channels, node: Node) -> _Channels | None:
    return replace(found, flat=True) if node.attrs.get("axis", 1) == 1 else None


def _reshape(found: _Channels, node: Node) -> _Channels | None:
    """Returns what [samples, everything else] holds, or None for other shapes."""
    target = node.inputs[1] if len(node.inputs) > 1 else None
    if not isinstance(target, Constant) or target.size != 2:
        return None
    samples, rest = (int(dim) for dim in target.values.reshape(-1))
    fits = rest == -1 or samples == 0 or (found.pooled and rest == len(found.values))
    return replace(found, flat=True) if fits else None


def _squeeze(found: _Channels, node: Node) -> _Channels | None:
    axes = _axes(node)
    leaves_two = found.pooled and not found.flat and axes is not None and not {0, 1} & axes
    return replace(found, flat=True) if leaves_two and len(axes or ()) == 2 else None


def _reduce_mean(found: _Channels, node: Node) -> _Channels | None:
    axes = _axes(node)
    if found.flat or axes not in ({2, 3}, {-1, -2}):
        return None
    keeps = bool(node.attrs.get("keepdims", 1))
    return replace(found, pooled=True, flat=not keeps)


def _axes(node: Node) -> set[int] | None:
    """Returns the axes of a node, an attribute or, from opset 13 or 18 on, an input; None where they are not given."""
    given = node.inputs[1] if len(node.inputs) > 1 else None
    if isinstance(given, Constant):
        return {int(axis) for axis in given.values.reshape(-1)}
    axes = node.attrs.get("axes")
    return None if axes is None else {int(axis) for axis in axes}


def _same(found: _Channels, _: Node) -> _Channels:
    return found


_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_BINARY: dict[str, Callable[[Array, Array], Array]] = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide}
_MOVES: dict[str, Callable[[_Channels, Node], _Channels | None]] = {
    "AveragePool": _same,
    "Dropout": _same,
    "Flatten": _flatten,
    "GlobalAveragePool": lambda found, _: replace(found, pooled=True),
    "Identity": _same,
    "ReduceMean": _reduce_mean,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
}
