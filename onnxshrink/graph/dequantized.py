"""Weights stored as the values that DequantizeLinear makes of them.

What a pass computes with is then the stored tensor itself: float, under the name that it had. Transpose, Reshape and a Cast that come
later stay where they are; Cast and DequantizeLinear before go, with the scales and zero points that nothing else reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxshrink.errors import PassError
from onnxshrink.graph.edit import remove_dead, replace_everywhere
from onnxshrink.graph.ir import Graph, Node, Variable
from onnxshrink.graph.storage import element_type
from onnxshrink.graph.views import View, reads_values, through
from onnxshrink.graph.weight_values import computed_type, dequantized
from onnxshrink.graph.weights import Use, Weight, weights
from onnxshrink.numerics.floatbits import bits_of

__all__ = ["dequantized_copy", "is_dequantized", "meets_integers", "obstacle", "store_dequantized"]

Array = np.ndarray[Any, np.dtype[Any]]
Path = tuple[Node, ...]


def is_dequantized(weight: Weight) -> bool:
    """Whether a node reads what DequantizeLinear makes of a weight."""
    return any(map(_way, weight.uses))


def meets_integers(weight: Weight) -> bool:
    """Whether nodes multiply a weight with what DequantizeLinear makes of integers: ONNX Runtime computes with these (QDQ format)."""
    nodes = {id(use.node): use.node for use in weight.uses if use.node is not None}.values()
    operands = {use.operand for use in weight.uses}
    others = [tensor for node in nodes for index, tensor in enumerate(node.inputs[:2]) if index not in operands]
    return any(maker.op == "DequantizeLinear" for tensor in others for maker in tensor.inputs)


def obstacle(graph: Graph, weight: Weight) -> str | None:
    """Returns in one line why a weight cannot be stored as what DequantizeLinear makes of it, or None.

    Args:
        graph: the main graph.
        weight: one of the model's.
    """
    if weight.scope.graph is not graph:
        return "it is stored in a body or a function"
    nodes = {id(node) for node in graph.nodes}
    for use in weight.uses:
        if use.node is None:
            return "is a graph output"
        if not all(id(node) in nodes for node in (*use.path, use.node)):
            return f"{use.op} '{use.node.site}' reads it inside of a body or a function"
        dtype = computed_type(weight, use)
        if isinstance(dtype, str):
            return dtype
    if not is_dequantized(weight):
        return "no node reads it through DequantizeLinear"
    first, *others = _ways(weight)
    if others:  # else there is nothing to compare, and nothing to compute
        expected = _computed(weight, first)
        if not all(_same(_computed(weight, other), expected) for other in others):
            return "nodes that share it read it in different types or scales"
    return _stray(weight)


def store_dequantized(graph: Graph, chosen: Sequence[Weight]) -> None:
    """Stores weights of the main graph as the values that DequantizeLinear makes of them: dense, in the dtype it gives, its nodes gone.

    Name and shape of a constant stay, and all that its nodes read stays the same to the bit. A weight that was listed as a graph input, so
    that callers could override it, no longer is. The `Weight`s describe the graph as it was: ask for new ones.

    Args:
        graph: the main graph.
        chosen: some of the model's weights that have no `obstacle`; those that are not `is_dequantized` stay as they are.

    Raises:
        PassError: a weight has an `obstacle`; the graph is then as it was.
    """
    found = {id(weight.constant): weight for weight in chosen if is_dequantized(weight)}
    for weight in found.values():
        reason = obstacle(graph, weight)
        if reason is not None:
            raise PassError(f"weight '{weight.site}': cannot be stored as what DequantizeLinear makes of it: {reason}")
    stored = [(weight, _computed(weight, _ways(weight)[0])) for weight in found.values()]  # all, before a scale goes
    gone: list[Node] = []
    for weight, values in stored:
        if weight.constant in graph.overridable:
            graph.inputs = [tensor for tensor in graph.inputs if tensor is not weight.constant]
        weight.constant.values, weight.constant.info = values, None  # it described the old dtype
        for node in {id(node): node for way in _ways(weight) for node in way}.values():
            moved = node.outputs[0]
            if node.op in ("Cast", "DequantizeLinear"):
                replace_everywhere(graph, moved, node.inputs[0])
                gone.append(node)
            elif isinstance(moved, Variable) and moved.dtype is not None:
                moved.dtype = values.dtype
    remove_dead(graph, gone)


def dequantized_copy(graph: Graph) -> Graph:
    """Returns a copy in which all weights that can be are stored as what DequantizeLinear makes of them; the graph where there are none."""
    if not any(map(is_dequantized, weights(graph))):
        return graph
    copy = graph.copy()
    store_dequantized(copy, [weight for weight in weights(copy) if is_dequantized(weight) and obstacle(copy, weight) is None])
    return copy


def _way(use: Use) -> Path:
    """Returns the nodes from a weight to the last DequantizeLinear; none if there is none."""
    return use.path[: max((index for index, node in enumerate(use.path, 1) if node.op == "DequantizeLinear"), default=0)]


def _ways(weight: Weight) -> list[Path]:
    """Returns every way that leads to a use, once."""
    return list({tuple(map(id, way)): way for way in map(_way, weight.uses)}.values())


def _stray(weight: Weight) -> str | None:
    """Returns which node reads the values of a weight before they are dequantized, in vain: no use tells of it."""
    known = {id(node) for way in _ways(weight) for node in way}
    tensors = [weight.constant, *(node.outputs[0] for way in _ways(weight) for node in way[:-1])]
    for node in (node for tensor in tensors for node in tensor.outputs):
        if id(node) not in known and reads_values(node):
            return f"{node.op} '{node.site}' reads it as well, and nothing reads that"
    return None


def _computed(weight: Weight, way: Path) -> Array:
    """Returns what the nodes of a way make of a weight, moved back to where the elements lie in the stored tensor."""
    values, moves = weight.constant.values, []
    for node in way:
        if node.op == "Cast":
            values = values.astype(element_type(int(node.attrs["to"])))
        elif node.op == "DequantizeLinear":
            values = dequantized(node, values)
        move = through(View((values.shape,)), node, 0)
        assert move is not None
        values = move.forward(values)
        moves.append(move)
    for move in reversed(moves):
        values = move.inverse(values)
    return values


def _same(left: Array, right: Array) -> bool:
    return left.dtype == right.dtype and np.array_equal(bits_of(left), bits_of(right))  # NaN is itself
