"""What the outputs of layers are added to: a branch of a residual network can make up for what the others have got wrong.

    y = W x,    t = y + b + s + ...      b constant, s known before the layer is rewritten

A layer whose output goes nowhere but into such a sum is right when t is, whatever y is. Layers behind it see t alone.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence

from onnxshrink.graph.excerpt import reads
from onnxshrink.graph.ir import Constant, Graph, Node
from onnxshrink.graph.views import COMPUTE_OPS
from onnxshrink.graph.weights import Weight

__all__ = ["last_changes", "summands"]


def summands(graph: Graph, stages: Sequence[Sequence[Weight]]) -> dict[str, tuple[tuple[str, ...], ...]]:
    """Returns, for each node that multiplies with a weight, the names of its output and of what is added to that; by the weight's site.

    Counted in are tensors that no weight of the same or a later stage has a part in, behind Add and Sum that alone read what leads to
    them. Some may have another shape than the output, and be broadcast, which only shows when the graph runs.

    Args:
        graph: the main graph.
        stages: of its weights, in the order in which they are rewritten.

    Returns:
        By site, for each use that multiplies with the weight, in order: names, the output's first; none where that has no name.
    """
    last = last_changes(graph, [[weight.constant for weight in stage] for stage in stages])
    ends = {id(tensor) for tensor in graph.outputs}
    found: dict[str, tuple[tuple[str, ...], ...]] = {}
    for number, stage in enumerate(stages):
        final = {id(tensor) for node in graph.nodes if last[id(node)] < number for tensor in node.outputs if tensor.name}
        for weight in stage:
            sums = (list(_sums(use.node, last, ends)) for use in weight.uses if use.is_operand and use.op in COMPUTE_OPS and use.node)
            found[weight.site] = tuple(_names(nodes, final) for nodes in sums)
    return found


def last_changes(graph: Graph, changed: Sequence[Iterable[Constant]]) -> dict[int, int]:
    """Returns for each node, by id, the last of several steps that changes what it computes; -1 if none does.

    Args:
        graph: the main graph, its nodes in topological order.
        changed: the constants that get other values, step by step.
    """
    last = {id(constant): number for number, constants in enumerate(changed) for constant in constants}
    nodes: dict[int, int] = {}
    for node in graph.nodes:
        nodes[id(node)] = max((last.get(id(tensor), -1) for tensor in reads(node)), default=-1)
        for tensor in node.outputs:
            last[id(tensor)] = nodes[id(node)]
    return nodes


def _sums(node: Node, main: Container[int], ends: Container[int]) -> Iterator[Node]:
    """Yields a node and the sums that its output goes through, as long as nothing else reads it."""
    yield node
    while id(output := node.outputs[0]) not in ends and len(output.outputs) == 1:
        (node,) = output.outputs
        if node.op not in ("Add", "Sum") or not node.is_standard or id(node) not in main:  # but a node in a body
            return
        yield node


def _names(nodes: Sequence[Node], final: Container[int]) -> tuple[str, ...]:
    """Returns the names of the first node's output and of the final operands of the others."""
    added = (tensor.name for node in nodes[1:] for tensor in node.inputs if id(tensor) in final)
    return (nodes[0].outputs[0].name, *added) if nodes[0].outputs[0].name else ()
