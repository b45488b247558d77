"""Rewrites weights in the order in which the model runs, each made up for from calibration data.

Layers that do not depend on each other make a stage. They are rewritten with the inputs that the layers before, rewritten already, give them,
and against what the ORIGINAL computes:

    1. wanted = W + W (C - H') (H' + r I)^-1     the weights that give the original's outputs from the inputs as they are now
    2. rewrite(wanted, H')                       whatever a pass makes of them, with error feedback if it likes
    3. bias += W mean(x) - W' mean(x')           so that the mean output of each channel stays

with H' = X'^T X' and C = X^T X' over the calibration inputs, X the inputs of the original's layer and X' those of now.
Layers whose inputs are not known (in bodies of If and Loop, or read by Gather) are rewritten as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnxshrink.contract import Context
from onnxshrink.graph.edit import set_values
from onnxshrink.graph.ir import Constant, Graph, Node
from onnxshrink.graph.lowering import lowerings
from onnxshrink.graph.weights import Weight
from onnxshrink.graph.weights import weights as weights_of
from onnxshrink.numerics.feedback import retarget
from onnxshrink.numerics.gram import PairedGram

__all__ = ["Repaired", "Rewrite", "rewrite_in_turn"]

Array = np.ndarray[Any, np.dtype[Any]]
Rewrite = Callable[[Weight, Array, "Array | None"], Array]
"""f(weight, wanted float64 [rows, columns] of its layout, H' float64 [groups, columns, columns] or None) -> [rows, columns]."""

_RIDGE = 0.3  # of the mean of H's diagonal: with hundreds of inputs 0.1 gains as much and 0.01 less, with tens only more is safe


@dataclass(frozen=True)
class Repaired:
    """What was done beside rewriting.

    Attributes:
        sites: of the weights whose inputs were known.
        biases: new values of constants that are added to what layers compute, by site of the layer's weight.
    """

    sites: set[str] = field(default_factory=set)
    biases: dict[str, tuple[Constant, Array]] = field(default_factory=dict)


def rewrite_in_turn(graph: Graph, weights: Sequence[Weight], rewrite: Rewrite, context: Context) -> Repaired:
    """Rewrites weights stage by stage; the graph itself stays as it is, and keeping the results is up to ``rewrite``.

    Args:
        graph: the main graph.
        weights: of it, in any order.
        rewrite: makes new matrices of those that are wanted. Called from several threads.
        context: for the activations, and to spread the work.

    Raises:
        ValidationError: the model does not run on the calibration inputs, or an activation is not finite.
    """
    repaired = Repaired()
    if context.activations is None:
        context.map(lambda weight: _drop(rewrite(weight, _matrix(weight), None)), weights)
        return repaired
    work = graph.copy()
    twins = {weight.site: weight for weight in weights_of(work)}
    by_site = {weight.site: weight for weight in weights}
    known = {weight.site for weight, ways in lowerings(graph, weights) if not isinstance(ways, str)}
    context.map(
        lambda weight: _put(twins[weight.site], rewrite(weight, _matrix(weight), None)),
        [weight for weight in weights if weight.site not in known],
    )
    for stage in _stages(graph, [weight for weight in weights if weight.site in known]):
        pairs = list(context.activations.paired_grams(work, [twins[weight.site] for weight in stage], graph))
        results = context.map(lambda pair: _repair(by_site[pair[0].site], pair[1], rewrite), pairs)
        for (twin, moments), matrix in zip(pairs, results, strict=True):
            _put(twin, matrix)
            repaired.sites.add(twin.site)
            _centre(by_site[twin.site], twin, matrix, moments, repaired)
    return repaired


def _drop(_: Array) -> None:
    """Forgets a result, so that those of a whole model are not held at once."""


def _stages(graph: Graph, weights: Sequence[Weight]) -> Iterator[list[Weight]]:
    """Yields the weights in portions, in the order in which they are read.

    No layer of a portion depends on another one: what a layer makes up for, those behind it must not make up for again.
    """
    place = {id(node): index for index, node in enumerate(graph.nodes)}

    def first_use(weight: Weight) -> int:
        return min(place.get(id(use.node), len(place)) for use in weight.uses)

    stage: list[Weight] = []
    changed: set[int] = set()  # nodes that depend on a weight of the stage
    for weight in sorted(weights, key=first_use):
        nodes = [use.node for use in weight.uses if use.node is not None]
        if any(id(node) in changed for node in nodes):
            yield stage
            stage, changed = [], set()
        stage.append(weight)
        changed |= _downstream(nodes) - {id(node) for node in nodes}
    if stage:
        yield stage


def _downstream(nodes: Sequence[Node]) -> set[int]:
    """Returns the ids of nodes and of all nodes that depend on them."""
    found: set[int] = set()
    queue = list(nodes)
    while queue:
        node = queue.pop()
        if id(node) not in found:
            found.add(id(node))
            queue.extend(reader for tensor in node.outputs for reader in tensor.outputs)
    return found


def _repair(weight: Weight, moments: PairedGram, rewrite: Rewrite) -> Array:
    matrix, now = _matrix(weight), moments.now
    shrunk = now.shrunk
    groups = zip(np.split(matrix, len(now.matrix)), shrunk, moments.cross + (shrunk - now.matrix), strict=True)
    wanted = np.concatenate([retarget(rows, gram, cross, _RIDGE) for rows, gram, cross in groups])
    return rewrite(weight, wanted, shrunk)


def _centre(weight: Weight, twin: Weight, matrix: Array, moments: PairedGram, repaired: Repaired) -> None:
    """Changes the bias of a layer, where it has one of its own, so that its mean output is what the original's was."""
    bias, twin_bias = _bias(weight), _bias(twin)
    if bias is None or twin_bias is None:
        return
    before, groups = _matrix(weight), len(moments.now.matrix)
    means = zip(np.split(before, groups), moments.before_mean, np.split(matrix, groups), moments.now.mean, strict=True)
    shift = np.concatenate([old @ mean - new @ mean_now for old, mean, new, mean_now in means])
    if shift.size == bias.size:
        values = (bias.values.astype(np.float64) + shift.reshape(bias.shape)).astype(bias.dtype)
        set_values(twin_bias, values)
        repaired.biases[weight.site] = (bias, values)


def _bias(weight: Weight) -> Constant | None:
    """Returns the constant that is added to what a layer computes, if nothing else reads it."""
    nodes = [use.node for use in weight.uses if use.node is not None]
    if len(nodes) != 1:
        return None
    bias = _added(nodes[0])
    if not isinstance(bias, Constant) or len(bias.outputs) != 1 or bias.dtype not in (np.float32, np.float64, np.float16):
        return None
    return bias if max(bias.shape, default=1) == bias.size else None


def _added(node: Node) -> Any:
    """Returns the operand that is added to each channel of what a node computes, or None."""
    if node.op in ("Conv", "ConvTranspose") and len(node.inputs) > 2:
        return node.inputs[2]
    if node.op == "Gemm" and len(node.inputs) > 2 and node.attrs.get("beta", 1.0) == 1.0 == node.attrs.get("alpha", 1.0):
        return node.inputs[2]
    readers = node.outputs[0].outputs
    if node.op == "MatMul" and len(readers) == 1 and readers[0].op == "Add" and readers[0].is_standard:
        return next((tensor for tensor in readers[0].inputs if tensor is not node.outputs[0]), None)
    return None


def _matrix(weight: Weight) -> Array:
    """Returns the weight in its layout, float64 [rows, columns]."""
    return weight.layout.forward(weight.constant.values).astype(np.float64)


def _put(twin: Weight, matrix: Array) -> None:
    """Gives the working copy the rewritten weight."""
    set_values(twin.constant, twin.layout.inverse(matrix).astype(twin.constant.dtype))
