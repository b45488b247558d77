"""Rewrites weights in the order in which the model runs, each made up for from calibration data.

Layers that do not depend on each other make a stage. They are rewritten with the inputs that the layers before, rewritten already,
give them, and against what the ORIGINAL computes:

    1. wanted = W + E (H' + r I)^-1            the weights that give the original's outputs from the inputs as they are now
    2. rewrite(wanted, H')                     whatever a pass makes of them, with error feedback if it likes
    3. bias += n / (n + 2) (mean(e) - (W' - W) mean(x'))    so that the mean output of each channel stays, as far as n inputs tell

with H' = sum of x' x'^T and E = sum of e x'^T over the calibration inputs, x' what a layer meets now, e what the output that it has
now lacks of the original's. Where it goes nowhere but into a sum, e is what the sum lacks as far as that is known: the branches of a
residual network make up for what has gone wrong on the way around them (`onnxshrink.graph.residuals`).
Layers whose inputs are not known (in bodies of If and Loop, or read by Gather) are rewritten as they are. Where there is no calibration
data, only 3 is left, n without bound: mean(x) follows from normalizations before a layer (`onnxshrink.graph.expectations`); and H, where
a guess will do, from the weights before it (`onnxshrink.graph.expected_moments`). A Conv without
a bias whose output is normalized has one in the normalization's running mean, which is subtracted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from typing import Any

import numpy as np

from onnxshrink.contract import Context
from onnxshrink.graph.edit import set_values
from onnxshrink.graph.excerpt import reads
from onnxshrink.graph.expectations import Expectations, is_inference
from onnxshrink.graph.expected_moments import ExpectedMoments
from onnxshrink.graph.ir import Constant, Graph, Tensor
from onnxshrink.graph.lowering import lowerings
from onnxshrink.graph.weights import Use, Weight
from onnxshrink.graph.weights import weights as weights_of
from onnxshrink.numerics.feedback import retarget
from onnxshrink.numerics.floatbits import rounded_to
from onnxshrink.numerics.gram import Gram, PairedGram

__all__ = ["Repaired", "Rewrite", "rewrite_in_turn", "with_grams"]

Array = np.ndarray[Any, np.dtype[Any]]
Rewrite = Callable[[Weight, Array, "Array | None"], Array]
"""f(weight, wanted float64 [rows, columns] of its layout, H' float64 [groups, columns, columns] or None) -> [rows, columns]."""

# Of the mean of H's diagonal: with hundreds of inputs 0.1 gains as much and 0.01 less, with tens only more is safe. Choosing it, or none of
# the repair, layer by layer on inputs that were left out was never better beyond noise, and up to 0.6 dB worse.
_RIDGE = 0.3
_FEW_POSITIONS = 2  # whose mean says as much of all inputs as nothing does: correcting all of it lost a decibel with one input


@dataclass(frozen=True)
class Repaired:
    """What was done beside rewriting.

    Attributes:
        sites: of the weights whose inputs were known from calibration data.
        biases: new values of constants that are added to what layers compute, or subtracted in a normalization, by site of the layer's
            weight. Weights that came back as they were have none.
    """

    sites: set[str] = field(default_factory=set)
    biases: dict[str, tuple[Constant, Array]] = field(default_factory=dict)


def rewrite_in_turn(
    graph: Graph, weights: Sequence[Weight], rewrite: Rewrite, context: Context, *, guess: bool = False
) -> Repaired:
    """Rewrites weights stage by stage; the graph itself stays as it is, and keeping the results is up to ``rewrite``.

    Args:
        graph: the main graph.
        weights: of it, in any order.
        rewrite: makes new matrices of those that are wanted. Called from several threads.
        context: for the activations, and to spread the work.
        guess: whether, without any, Gram matrices are guessed from the weights before a layer.

    Raises:
        ValidationError: the model does not run on the calibration inputs, or an activation is not finite.
    """
    repaired = Repaired()
    if context.activations is None:
        expected, guesses = Expectations(graph), ExpectedMoments(graph) if guess else None
        moved = context.map(lambda weight: _rewrite_alone(weight, rewrite, expected, guesses), weights)
        repaired.biases.update({weight.site: found for weight, found in zip(weights, moved, strict=True) if found is not None})
        return repaired
    work = graph.copy()
    twins = {weight.site: weight for weight in weights_of(work)}
    by_site = {weight.site: weight for weight in weights}
    known, unknown = _parted(graph, weights)
    context.map(lambda weight: _put(twins[weight.site], rewrite(weight, _matrix(weight), None)), unknown)
    stages = _stages(graph, known)
    of_work = [[twins[weight.site] for weight in stage] for stage in stages]
    for pairs in context.activations.paired_grams(work, graph, of_work):
        results = context.map(lambda pair: _repair(by_site[pair[0].site], pair[1], rewrite), pairs)
        for (twin, moments), matrix in zip(pairs, results, strict=True):
            _put(twin, matrix)
            repaired.sites.add(twin.site)
            _centre(by_site[twin.site], twin, matrix, moments, repaired)
    return repaired


def with_grams(
    graph: Graph, weights: Sequence[Weight], context: Context, *, guess: bool = False
) -> Iterator[tuple[Weight, Array | None]]:
    """Yields each weight with the Gram matrices of its inputs, float64 [groups, columns, columns]; None where they are not known.

    Args:
        graph: the main graph; not changed.
        weights: of it.
        context: for the activations.
        guess: whether, without any, they are guessed from the weights before a layer.
    """
    if context.activations is None:
        guesses = ExpectedMoments(graph) if guess else None
        for weight in weights:
            found = _guessed(weight, guesses)
            yield weight, found.shrunk if found is not None else None
        return
    known, unknown = _parted(graph, weights)
    yield from ((weight, None) for weight in unknown)
    yield from ((weight, moments.shrunk) for weight, moments in context.activations.grams(graph, known))


def _parted(graph: Graph, weights: Sequence[Weight]) -> tuple[list[Weight], list[Weight]]:
    """Returns (weights whose inputs are known, column by column of their layouts, the others).

    A table that is also multiplied with, as tied embeddings are, may have no layout that all its uses agree on.
    """
    known: list[Weight] = []
    unknown: list[Weight] = []
    for weight, ways in lowerings(graph, weights):
        (unknown if isinstance(ways, str) or weight.view is None else known).append(weight)
    return known, unknown


def _guessed(weight: Weight, guesses: ExpectedMoments | None) -> Gram | None:
    """Returns guessed moments of what a weight meets, if there are any; what several nodes share has none."""
    if guesses is None or len(weight.uses) != 1 or weight.view is None:
        return None
    found = guesses.gram(weight.uses[0])
    return None if isinstance(found, str) else found


def _rewrite_alone(
    weight: Weight, rewrite: Rewrite, expected: Expectations, guesses: ExpectedMoments | None
) -> tuple[Constant, Array] | None:
    """Rewrites a weight without calibration data and returns what becomes of its bias, if its mean input is known or guessed."""
    before, guessed = _matrix(weight), _guessed(weight, guesses)
    after = rewrite(weight, before, guessed.shrunk if guessed is not None else None)
    means = expected.mean_input(weight.uses[0]) if len(weight.uses) == 1 else ""
    if isinstance(means, str) and guessed is not None:
        means = guessed.mean
    bias = None if isinstance(means, str) or weight.view is None or np.array_equal(before, after) else _bias(weight, len(means))
    if bias is None or isinstance(means, str):
        return None
    shift = np.concatenate(
        [rows @ mean for rows, mean in zip(np.split(before - after, len(means)), means, strict=True)]
    )
    return bias.shifted(shift)


def _stages(graph: Graph, weights: Sequence[Weight]) -> Iterator[list[Weight]]:
    """Yields the weights in portions, each after all that its inputs depend on.

    No layer of a portion depends on another one: what a layer makes up for, those behind it must not make up for again. Weights of
    one node, W and R of an LSTM, come together. Weights that several nodes share may depend on each other in turn; the one that
    is read first then comes before the rest of the circle.
    """
    needs = _dependences(graph, weights)
    place = {id(node): index for index, node in enumerate(graph.nodes)}
    left = sorted(
        range(len(weights)), key=lambda index: min(place.get(id(use.node), len(place)) for use in weights[index].uses)
    )
    while left:
        waiting = sum(1 << index for index in left)
        stage = [index for index in left if not needs[index] & waiting] or [left[0]]
        yield [weights[index] for index in stage]
        left = [index for index in left if index not in stage]


def _dependences(graph: Graph, weights: Sequence[Weight]) -> list[int]:
    """Returns for each weight a set of bits: the others that what it meets depends on, by index."""
    used: dict[int, int] = {}  # by node, like all that follows
    for index, weight in enumerate(weights):
        for use in weight.uses:
            used[id(use.node)] = used.get(id(use.node), 0) | 1 << index
    before: dict[int, int] = {}
    for node in graph.nodes:
        makers = {id(maker) for tensor in reads(node) for maker in tensor.inputs}
        before[id(node)] = reduce(or_, (before.get(maker, 0) | used.get(maker, 0) for maker in makers), 0)
    return [
        reduce(or_, (before.get(id(use.node), 0) for use in weight.uses), 0) & ~(1 << index)
        for index, weight in enumerate(weights)
    ]


def _repair(weight: Weight, moments: PairedGram, rewrite: Rewrite) -> Array:
    matrix, shrunk = _matrix(weight), moments.now.shrunk
    groups = zip(np.split(matrix, len(shrunk)), shrunk, moments.error, strict=True)
    wanted = np.concatenate([retarget(rows, gram, error, _RIDGE) for rows, gram, error in groups])
    return rewrite(weight, wanted, shrunk)


def _centre(weight: Weight, twin: Weight, matrix: Array, moments: PairedGram, repaired: Repaired) -> None:
    """Changes the bias of a layer, where it has one of its own, so that its output lacks nothing on average."""
    groups = len(moments.now.matrix)
    bias, twin_bias = _bias(weight, groups), _bias(twin, groups)
    change = matrix - _matrix(weight)
    if bias is None or twin_bias is None or not change.any():
        return
    moved = [rows @ mean for rows, mean in zip(np.split(change, groups), moments.now.mean, strict=True)]
    shift = moments.error_mean.reshape(-1) - np.concatenate(moved)
    shifted = bias.shifted(shift * moments.now.count / (moments.now.count + _FEW_POSITIONS))
    if shifted is not None:
        set_values(twin_bias.constant, shifted[1])
        repaired.biases[weight.site] = shifted


@dataclass(frozen=True)
class _Bias:
    """A constant that is added to each channel of what a layer computes, or subtracted."""

    constant: Constant
    sign: float

    def shifted(self, shift: Array) -> tuple[Constant, Array] | None:
        """Returns the constant and new values of it, with which each channel moves by a shift [channels]; None if it has others."""
        values = self.constant.values
        if shift.size != values.size:
            return None
        return self.constant, rounded_to(values.astype(np.float64) + self.sign * shift.reshape(values.shape), values.dtype)


def _bias(weight: Weight, groups: int) -> _Bias | None:
    """Returns the bias of a layer, if nothing else reads it."""
    if len(weight.uses) != 1:
        return None
    bias, sign = _added(weight.uses[0], groups), 1.0
    if bias is None:
        bias, sign = _subtracted(weight.uses[0]), -1.0
    if not isinstance(bias, Constant) or len(bias.outputs) != 1 or bias.dtype not in (np.float32, np.float64, np.float16):
        return None
    return None if any(tensor is bias for tensor in weight.scope.graph.outputs) else _Bias(bias, sign)


def _subtracted(use: Use) -> Tensor | None:
    """Returns the running mean of a normalization that alone reads what a layer without a bias computes, or None."""
    node = use.node
    if node is None or not (node.op in ("Conv", "ConvTranspose") or (node.op == "Gemm" and node.attrs.get("alpha", 1.0) == 1.0)):
        return None
    readers, has_bias = node.outputs[0].outputs, any(tensor.name for tensor in node.inputs[2:])
    if use.operand != 1 or has_bias or len(readers) != 1 or readers[0].op != "BatchNormalization":
        return None
    norm = readers[0]
    return norm.inputs[3] if is_inference(norm) and norm.inputs[0] is node.outputs[0] else None


def _added(use: Use, groups: int) -> Tensor | None:
    """Returns the operand that is added to each channel of what a node computes, or None."""
    node, added = use.node, None
    if node is None:
        return None
    if node.op in ("Conv", "ConvTranspose"):
        return node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
    readers = node.outputs[0].outputs
    if node.op == "Gemm" and len(node.inputs) > 2 and node.attrs.get("beta", 1.0) == 1.0 == node.attrs.get("alpha", 1.0):
        added = node.inputs[2]
    elif node.op == "MatMul" and groups == 1 and len(readers) == 1 and readers[0].op == "Add" and readers[0].is_standard:
        added = next((tensor for tensor in readers[0].inputs if tensor is not node.outputs[0]), None)
    channels = -1 if use.operand == 1 else -2  # that axis of the product; along another one it is no bias
    along = isinstance(added, Constant) and added.shape[channels : channels + 1 or None] == (added.size,)
    return added if along else None


def _matrix(weight: Weight) -> Array:
    """Returns the weight in its layout, float64 [rows, columns]."""
    return weight.layout.forward(weight.constant.values).astype(np.float64)


def _put(twin: Weight, matrix: Array) -> None:
    """Gives the working copy the rewritten weight."""
    set_values(twin.constant, twin.layout.inverse(matrix).astype(twin.constant.dtype))
