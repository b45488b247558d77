"""The part of a graph that some of its tensors depend on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from onnxshrink.graph.ir import Graph, Node, Tensor, Variable

__all__ = ["excerpt", "tensors_by_name"]


def tensors_by_name(graph: Graph) -> dict[str, Tensor]:
    """Returns the tensors of the main graph that have a name."""
    tensors = [*graph.inputs, *graph.constants, *(tensor for node in graph.nodes for tensor in node.outputs)]
    return {tensor.name: tensor for tensor in tensors if tensor.name}


def excerpt(graph: Graph, names: Sequence[str]) -> Graph:
    """Returns a copy with the named tensors for outputs and only the nodes and constants that they depend on.

    Args:
        graph: the main graph; only read.
        names: of its tensors.

    Raises:
        KeyError: there is no such tensor.
    """
    copy = graph.copy()
    known = tensors_by_name(copy)
    copy.outputs = [known[name] for name in names]
    nodes, tensors = _needed(copy.outputs)
    listed = {id(tensor) for tensor in copy.inputs}
    copy.nodes = [node for node in copy.nodes if id(node) in nodes]
    copy.constants = [constant for constant in copy.constants if id(constant) in tensors | listed]
    for tensor in copy.outputs:  # a type from before the last rewrite may be wrong: let ONNX Runtime infer it
        if isinstance(tensor, Variable):
            tensor.dtype = tensor.shape = tensor.info = None
    return copy


def _needed(outputs: Sequence[Tensor]) -> tuple[set[int], set[int]]:
    """Returns the ids of all nodes and tensors that tensors depend on, reads of bodies included."""
    nodes: set[int] = set()
    tensors: set[int] = set()
    stack: list[Tensor] = list(outputs)
    while stack:
        tensor = stack.pop()
        if id(tensor) in tensors:
            continue
        tensors.add(id(tensor))
        for node in tensor.inputs:
            if id(node) not in nodes:
                nodes.add(id(node))
                stack.extend(_reads(node))
    return nodes, tensors


def _reads(node: Node) -> Iterator[Tensor]:
    """Yields the inputs of a node and of the nodes in its bodies.

    A body's output is no outer tensor: ONNX Runtime refuses that (1.31: "outer scope value being returned directly").
    """
    yield from node.inputs
    for _, body in node.bodies():
        for scope in body.scopes():
            for inner in scope.graph.nodes:
                yield from inner.inputs
