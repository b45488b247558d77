"""The part of a graph that some of its tensors depend on, from the inputs or from other tensors on."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from onnxshrink.graph.ir import Constant, Graph, Node, Tensor, Variable

__all__ = ["excerpt", "needed", "reads", "tensors_by_name"]


def tensors_by_name(graph: Graph) -> dict[str, Tensor]:
    """Returns the tensors of the main graph that have a name."""
    tensors = [*graph.inputs, *graph.constants, *(tensor for node in graph.nodes for tensor in node.outputs)]
    return {tensor.name: tensor for tensor in tensors if tensor.name}


def excerpt(graph: Graph, names: Sequence[str], given: Mapping[str, np.dtype[Any]] | None = None) -> Graph:
    """Returns a graph with the named tensors for outputs and only the nodes and constants that they depend on.

    It consists of the nodes and tensors of ``graph`` themselves, and is meant to be run, not to be edited.

    Args:
        graph: the main graph; only read.
        names: of its tensors.
        given: element types, by name, of tensors that become inputs instead of being computed.

    Raises:
        KeyError: there is no such tensor.
    """
    known, given = tensors_by_name(graph), given or {}
    nodes, tensors = needed((known[name] for name in names), stop={id(known[name]) for name in given})
    listed = {id(tensor) for tensor in graph.inputs}
    part = Graph(graph.name, graph.opset, graph.residue)
    part.model, part.ir_version, part.local_functions = graph.model, graph.ir_version, graph.local_functions
    part.nodes = [node for node in graph.nodes if id(node) in nodes]
    part.constants = [constant for constant in graph.constants if id(constant) in tensors | listed]
    part.inputs = [*graph.inputs, *(Variable(name, dtype) for name, dtype in given.items() if id(known[name]) in tensors)]
    # a type from before the last rewrite may be wrong: let ONNX Runtime infer those of outputs
    part.outputs = [known[name] if isinstance(known[name], Constant) else Variable(name) for name in names]
    return part


def needed(tensors: Iterable[Tensor], stop: Collection[int] = ()) -> tuple[set[int], set[int]]:
    """Returns the ids of all nodes and tensors that tensors depend on or are, reads of bodies included.

    Args:
        tensors: where to start.
        stop: ids of tensors that are taken as given: what they depend on does not count.
    """
    nodes: set[int] = set()
    seen: set[int] = set()
    stack = list(tensors)
    while stack:
        tensor = stack.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        for node in tensor.inputs if id(tensor) not in stop else ():
            if id(node) not in nodes:
                nodes.add(id(node))
                stack.extend(reads(node))
    return nodes, seen


def reads(node: Node) -> Iterator[Tensor]:
    """Yields the inputs of a node and of the nodes in its bodies.

    A body's output is no outer tensor: ONNX Runtime refuses that (1.31: "outer scope value being returned directly").
    """
    yield from node.inputs
    for _, body in node.bodies():
        for scope in body.scopes():
            for inner in scope.graph.nodes:
                yield from inner.inputs
