"""What layers meet on average, as far as the graph alone tells: a channel that was just normalized has a known mean and spread.

    BatchNormalization     N(B, scale^2) in each channel      Nagel et al., Data-Free Quantization, arXiv 1906.04721, section 4.2
    InstanceNormalization  the same, as its input's mean and spread are taken from the very input
    Relu, Clip, ...        f of that: E[relu(x)] = B Phi(B / s) + s phi(B / s)
    x * Sigmoid(x), ...    f of one and the same normalized x, however many nodes it takes
    Add of two             means add; for what comes then, a normal with both variances, as if they were not correlated
    average pooling        the mean stays; the spread, which shrinks by an unknown amount, is taken to stay
    Conv, Gemm, ...        W mean + b, and an unknown spread: enough for what follows up to the next function

A channel is held as the values that it takes at fixed quantiles z of a standard normal, so every f is applied as it stands. Padding is
not seen: at the border of a padded Conv the true mean input is smaller than what is said here.

`met_channels` also guesses, where it is asked to, what does not follow from normalizations; `onnxshrink.graph.expected_moments` says how.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx

from onnxshrink.graph.elementwise import FUNCTIONS
from onnxshrink.graph.expected_layers import LAYERS, as_columns, expected_result, fits
from onnxshrink.graph.expected_values import MOVES, Certainty, Channels, concatenated, padded
from onnxshrink.graph.ir import Constant, Graph, Node, Tensor
from onnxshrink.graph.lowering import Lowering, lowering
from onnxshrink.graph.static_shapes import shapes_and_sizes
from onnxshrink.graph.storage import is_float
from onnxshrink.graph.weights import Use
from onnxshrink.numerics.gaussian_moments import QUANTILES, parted

__all__ = ["Expectations", "is_inference", "known_lowering", "met_channels"]

Array = np.ndarray[Any, np.dtype[Any]]
_ADDED_ALIKE = 0.3  # correlation of a channel with what is added to it: 0 and 0.3 told apart by 0.2 dB on two residual networks


class Expectations:
    """The mean inputs of layers of a main graph whose inputs follow from normalized tensors."""

    def __init__(self, graph: Graph) -> None:
        """Looks at every node once.

        Args:
            graph: the main graph, its nodes in order; not changed.
        """
        self._nodes = list(graph.nodes)  # keeps the ids
        self._met = {key: met.mean for key, met in met_channels(graph).items()}

    def mean_input(self, use: Use) -> Array | str:
        """Returns the mean of what each column of a weight meets, float64 [groups, columns], or why it is not known, in one line."""
        way = known_lowering(use)
        if isinstance(way, str):
            return way
        mean = self._met.get(id(use.node))
        if use.node is None or mean is None:
            return "its inputs do not follow from normalized ones"
        columns = as_columns(mean, use.node, way.groups, way.columns)
        return f"{mean.size} normalized channels do not fit {way.groups} x {way.columns} columns" if columns is None else columns


def known_lowering(use: Use) -> Lowering | str:
    """Returns how a weight meets its layer's channels, if it is the weight of a layer that sums over channels, or why not."""
    node = use.node
    if node is None or node.op not in LAYERS or use.operand != 1 or node.attrs.get("transA", 0):
        return f"{use.op} reads no channels with it"
    return lowering(use)


def met_channels(graph: Graph, guess: bool = False) -> dict[int, Channels]:
    """Returns what the first inputs of layers hold, by the id of the layer's node, where that is known or guessed.

    Args:
        graph: the main graph, its nodes in order; not changed.
        guess: whether to go on where spreads are unknown, and to keep track of correlations.
    """
    met: dict[int, Channels] = {}
    walk = _Walk(guess, _computed_pads(graph) if guess else {})
    held = walk.held
    readers = {id(tensor): len(tensor.outputs) for node in graph.nodes for tensor in node.outputs}
    for node in graph.nodes:
        if node.is_standard and node.op in LAYERS and (read := held.get(id(node.inputs[0]))) is not None and fits(node, read):
            met[id(node)] = read
        found = _result(node, walk)
        if found is not None and (guess or found.certainty > Certainty.GUESS):
            held[id(node.outputs[0])] = found
        for tensor in node.inputs:  # what nobody will read any more goes
            readers[id(tensor)] = readers.get(id(tensor), 0) - 1
            if readers[id(tensor)] == 0:
                held.pop(id(tensor), None)
    return met


def is_inference(norm: Node) -> bool:
    """Whether a BatchNormalization uses its stored statistics, one for each channel.

    Before opset 14 a single output means inference; before opset 9 ``spatial = 0`` normalizes each position by itself (ONNX operator
    specification, BatchNormalization).
    """
    plain = not any(isinstance(value, onnx.AttributeProto) for value in norm.attrs.values())
    training = norm.attrs.get("training_mode", 0) or sum(bool(tensor.name) for tensor in norm.outputs) > 1
    return norm.is_standard and norm.op == "BatchNormalization" and plain and not training and norm.attrs.get("spatial", 1) == 1


@dataclass(frozen=True, eq=False)
class _Walk:
    """A walk along the nodes.

    Attributes:
        guess: whether to go on where spreads are unknown.
        pads: what is computed from sizes alone, by id of the tensor.
        held: what tensors hold, by id, as long as a node to come reads them.
    """

    guess: bool
    pads: Mapping[int, Array]
    held: dict[int, Channels] = field(default_factory=dict)


def _computed_pads(graph: Graph) -> dict[int, Array]:
    """Returns the values of pads that are computed from sizes, by id of the tensor."""
    given = [node.inputs[1] for node in graph.nodes if node.is_standard and node.op == "Pad" and len(node.inputs) > 1]
    if all(isinstance(tensor, Constant) for tensor in given):
        return {}
    _, sizes = shapes_and_sizes(graph)
    known = {id(tensor): sizes[id(tensor)].values for tensor in given if id(tensor) in sizes}
    return {key: values for key, values in known.items() if values is not None}


def _result(node: Node, walk: _Walk) -> Channels | None:
    """Returns what the first output of a node holds, or None."""
    if not node.is_standard or not node.inputs or not node.outputs:
        return None
    if any(isinstance(value, onnx.AttributeProto) for value in node.attrs.values()):
        return None
    held, guess = walk.held, walk.guess
    found = held.get(id(node.inputs[0]))
    if node.op in _NORMALIZATIONS:
        return _normalized(node, found)
    if node.op in _BINARY and len(node.inputs) == 2:
        return _binary(node, held, guess)
    if node.op == "Concat":
        return _concat(node, held)
    if node.op in LAYERS:
        return expected_result(node, found, guess)
    if found is None:
        return None
    if node.op in FUNCTIONS:
        certainty = Certainty.SPREADS if found.certainty == Certainty.SPREADS else Certainty.GUESS
        values = FUNCTIONS[node.op](found.values, node)
        return None if values is None or not np.isfinite(values).all() else replace(found, values=values, certainty=certainty)
    if node.op == "Pad":
        return padded(found, node, walk.pads.get(id(node.inputs[1])) if len(node.inputs) > 1 else None)
    return MOVES[node.op](found, node) if node.op in MOVES else None


def _normalized(node: Node, found: Channels | None) -> Channels | None:
    """Returns normal channels; how they are correlated is seen before the normalization."""
    scale, shift = node.inputs[1:3] if len(node.inputs) > 2 else (None, None)
    if not isinstance(scale, Constant) or not isinstance(shift, Constant) or not is_float(scale.dtype) or scale.size != shift.size:
        return None
    layer = node.op == "LayerNormalization"  # of a sample at a time: what a channel does over samples is a guess
    if (node.op == "BatchNormalization" and not is_inference(node)) or (layer and node.attrs.get("axis", -1) != -1):
        return None
    spread, centre = (tensor.values.astype(np.float64).reshape(-1, 1) for tensor in (scale, shift))
    values = centre + spread * QUANTILES
    if not np.isfinite(values).all():
        return None
    certainty = Certainty.GUESS if layer else Certainty.SPREADS
    if found is None or len(found.values) != len(values) or (layer and not (found.flat or found.last)):
        return Channels(values, node, certainty, last=layer)
    related = None if found.related is None else parted(found.covariance)[1]
    return Channels(values, node, certainty, related, found.pooled, found.flat, found.last)


def _binary(node: Node, held: dict[int, Channels], guess: bool) -> Channels | None:
    """Returns a sum, product or the like of two tensors, one of them perhaps constant for each channel."""
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
            if one.certainty < Certainty.SPREADS and node.op not in _LINEAR and not (guess and node.op in _TAME):
                return None
            if node.op == "Div" and left is None and one.certainty < Certainty.SPREADS:  # 1 / x is no linear function
                return None
            operands = [other if part is None else part.values for part in known]
            found = replace(one, values=_BINARY[node.op](*operands))
        else:
            both = _of_two(node, left, right, guess)
            if both is None:
                return None
            found = both
    return found if np.isfinite(found.values).all() else None


def _of_two(node: Node, left: Channels, right: Channels, guess: bool) -> Channels | None:
    certainty = min(left.certainty, right.certainty)
    if left.values.shape != right.values.shape:
        return None
    if left.lie != right.lie:
        gate, gated = (left, right) if left.pooled else (right, left)
        if node.op != "Mul" or not guess or gated.pooled or gate.lie != (False, False, True):
            return None
        return replace(gated, values=gated.values * gate.mean[:, None], certainty=Certainty.GUESS)
    if left.source is right.source and (certainty == Certainty.SPREADS or (guess and node.op in _TAME)):
        return replace(left, values=_BINARY[node.op](left.values, right.values), certainty=certainty)
    if node.op not in ("Add", "Sub"):
        return None
    centre, variance = _BINARY[node.op](left.mean, right.mean), left.variance + right.variance
    related = None
    if guess and certainty < Certainty.SPREADS:
        variance = variance + 2 * _ADDED_ALIKE * np.sqrt(left.variance * right.variance)
    if left.related is not None or right.related is not None:
        total = left.covariance + right.covariance
        np.fill_diagonal(total, variance)
        related = parted(total)[1]
    values = centre[:, None] + np.sqrt(variance)[:, None] * QUANTILES
    return Channels(values, node, certainty, related, left.pooled, left.flat, left.last)


def _constant(tensor: Tensor, beside: Channels) -> Array | None:
    """Returns a constant operand as [1 or channels, 1], or None if it is none, or differs within a channel."""
    if not isinstance(tensor, Constant) or not is_float(tensor.dtype):
        return None
    channels = len(beside.values)
    shapes = {(channels,), (1, channels), (1, 1, channels)} if beside.flat or beside.last else {(channels, 1, 1), (1, channels, 1, 1)}
    if tensor.size != 1 and tensor.shape not in shapes:
        return None
    return tensor.values.astype(np.float64).reshape(-1, 1)


def _concat(node: Node, held: dict[int, Channels]) -> Channels | None:
    parts = [held.get(id(tensor)) for tensor in node.inputs]
    found = [part for part in parts if part is not None and not part.flat and not part.last]
    if node.attrs.get("axis") != 1 or len(found) != len(parts):
        return None
    return concatenated(found, node)


_BINARY: dict[str, Callable[[Array, Array], Array]] = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide}
_BINARY |= {"Max": np.maximum, "Min": np.minimum}
_NORMALIZATIONS = ("BatchNormalization", "InstanceNormalization", "LayerNormalization")
_LINEAR = ("Add", "Sub", "Mul", "Div")
_TAME = ("Add", "Sub", "Mul", "Max", "Min")  # which no value near zero throws off
