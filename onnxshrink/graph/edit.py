"""Edits of a graph: new values for a constant, a computed tensor in place of a stored one, removal of what became dead.

Edits clean up after themselves: what only the replaced thing needed goes with it, and nothing else does, so a model keeps its
own unused parts unless `tidy` is asked to remove them.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from onnxshrink.errors import PassError
from onnxshrink.graph.exporter import framed_bytes, node_message, tensor_bytes
from onnxshrink.graph.ir import Constant, Graph, Node, Tensor, Variable

__all__ = [
    "Fragment",
    "NameSource",
    "constant_bytes",
    "drop_constant",
    "footprint",
    "held_bytes",
    "item_bytes",
    "node_bytes",
    "nodes_bytes",
    "output_ids",
    "remove_dead",
    "replace_constant",
    "replace_everywhere",
    "replace_node",
    "set_values",
    "site_of",
    "sort_nodes",
]

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass
class Fragment:
    """Nodes and constants, not yet in any graph, that compute one tensor from nothing but their own constants.

    Attributes:
        output: the tensor it computes.
        nodes: in order of execution.
        constants: what they read.
    """

    output: Variable
    nodes: list[Node] = field(default_factory=list)
    constants: list[Constant] = field(default_factory=list)

    def nbytes(self, graph: Graph) -> int:
        """Returns the bytes that the fragment would take in the file as a part of ``graph``."""
        constants = sum(constant_bytes(constant, graph) for constant in self.constants)
        return constants + sum(node_bytes(node) for node in self.nodes)


class NameSource:
    """Gives names that no tensor of the model has, derived from a stem; deterministic."""

    def __init__(self, graph: Graph) -> None:
        self.used: dict[str, int] = {}
        self.taken = {
            tensor.name
            for scope in graph.scopes()
            for tensor in [*scope.graph.inputs, *scope.graph.constants, *_node_outputs(scope.graph)]
        }

    def fresh(self, stem: str) -> str:
        """Returns ``stem``, or ``stem_2``, ``stem_3``, ... and remembers it."""
        name = stem
        while name in self.taken:
            self.used[stem] = self.used.get(stem, 1) + 1
            name = f"{stem}_{self.used[stem]}"
        self.taken.add(name)
        return name


def set_values(constant: Constant, values: Array) -> None:
    """Gives a constant new values of the same shape and dtype; every user of the tensor sees them.

    Raises:
        PassError: shape or dtype differ.
    """
    if values.shape != constant.shape or values.dtype != constant.dtype:
        raise PassError(
            f"tensor '{constant.name}': new values must be {constant.dtype} {constant.shape}, "
            f"got {values.dtype} {values.shape}"
        )
    constant.values = values


def replace_constant(scope: Graph, constant: Constant, fragment: Fragment) -> None:
    """Puts a fragment where a constant of ``scope`` was: all its users read the fragment's output, under the old name.

    An initializer that was listed as a graph input no longer is: a computed tensor cannot be overridden by the caller.
    """
    fragment.output.name = constant.name
    if any(tensor is constant for tensor in scope.outputs):  # it stays described as it was
        fragment.output.dtype, fragment.output.shape, fragment.output.info = constant.dtype, constant.shape, constant.info
    replace_everywhere(scope, constant, fragment.output)
    drop_constant(scope, constant)
    scope.nodes[:0] = fragment.nodes
    scope.constants.extend(fragment.constants)


def replace_everywhere(scope: Graph, old: Tensor, new: Tensor) -> None:
    """Makes every node, in ``scope`` and in bodies below it, and every output of ``scope`` read ``new`` for ``old``."""
    for node in list(old.outputs):
        for index, tensor in enumerate(node.inputs):
            if tensor is old:
                node.inputs[index] = new
    scope.outputs = [new if tensor is old else tensor for tensor in scope.outputs]


def replace_node(scope: Graph, graph: Graph, node: Node, constants: list[Constant]) -> None:
    """Puts constants where the outputs of the same names of a node were, and removes it and what only it read."""
    by_name = {constant.name: constant for constant in constants}
    for tensor in node.outputs:
        if tensor.name:
            replace_everywhere(scope, tensor, by_name[tensor.name])
    scope.constants.extend(constants)
    remove_dead(graph, [node])


def drop_constant(scope: Graph, constant: Constant) -> None:
    """Takes a constant out of the scope that owns it, and out of its inputs."""
    scope.constants = [other for other in scope.constants if other is not constant]
    scope.inputs = [other for other in scope.inputs if other is not constant]


def remove_dead(graph: Graph, suspects: Iterable[Node | Constant] | None = None) -> list[Node | Constant]:
    """Removes nodes and constants whose outputs nobody reads, and what becomes dead with them.

    Args:
        graph: the main graph.
        suspects: where to look; everything by default.

    Returns:
        What was removed, last users first; what went inside the bodies of a removed node is not named again.
    """
    scopes = [scope.graph for scope in graph.scopes()]  # one walk: this is called for every node that goes
    outputs = {id(tensor) for scope in scopes for tensor in scope.outputs}
    if suspects is None:
        suspects = [item for scope in scopes for item in scope.items]
    queue: list[Node | Constant] = list(suspects)
    removed: list[Node | Constant] = []
    gone: set[int] = set()
    while queue:  # removing an item queues what it read, so one look at each suspect is enough
        item = queue.pop()
        tensors = item.outputs if isinstance(item, Node) else [item]
        if id(item) in gone or any(tensor.outputs or id(tensor) in outputs for tensor in tensors if tensor.name):
            continue
        gone.add(id(item))
        removed.append(item)
        if isinstance(item, Node):
            inputs = [*item.inputs, *(tensor for _, body in item.bodies() for tensor in _reads(body))]
            item.inputs.clear()
            for _, body in item.bodies():
                _unlink(body)
            queue.extend(tensor for tensor in inputs if isinstance(tensor, Constant))
            queue.extend(tensor.inputs[0] for tensor in inputs if isinstance(tensor, Variable) and tensor.inputs)
    inside = _inner_ids(removed)
    removed = [item for item in removed if id(item) not in inside]
    for owner in scopes:
        if gone.isdisjoint(map(id, owner.items)):
            continue
        owner.nodes = [node for node in owner.nodes if id(node) not in gone]
        owner.constants = [constant for constant in owner.constants if id(constant) not in gone]
        owner.inputs = [tensor for tensor in owner.inputs if id(tensor) not in gone]
    return removed


def sort_nodes(graph: Graph) -> None:
    """Sorts every scope topologically, keeping the order of nodes wherever it is already right.

    Raises:
        PassError: a cycle.
    """
    for scope in graph.scopes():
        scope.graph.nodes = _sorted(scope.graph)


def output_ids(graph: Graph) -> set[int]:
    """Returns the ids of the tensors that are outputs of any scope: those are read although no node reads them."""
    return {id(tensor) for scope in graph.scopes() for tensor in scope.graph.outputs}


def site_of(item: Node | Constant) -> str:
    """Returns the name by which reports address a node or a constant within its scope."""
    return item.site if isinstance(item, Node) else item.name


def footprint(nodes: list[Node], scope: Graph, outputs: set[int]) -> int:
    """Returns the bytes of nodes and of the constants of their scope that only they read."""
    readers = {id(node) for node in nodes}
    private = {
        id(tensor): tensor
        for tensor in (tensor for node in nodes for tensor in node.inputs)
        if isinstance(tensor, Constant)
        and tensor in scope.constants
        and id(tensor) not in outputs
        and all(id(reader) in readers for reader in tensor.outputs)
    }
    return nodes_bytes(nodes) + sum(constant_bytes(tensor, scope) for tensor in private.values())


def item_bytes(item: Node | Constant, scope: Graph) -> int:
    """Returns the bytes of a node or a constant in the file."""
    return node_bytes(item) if isinstance(item, Node) else constant_bytes(item, scope)


def constant_bytes(constant: Constant, scope: Graph) -> int:
    """Returns the bytes a constant takes in the file as a part of ``scope``: tensor, framing and what describes it."""
    tensor = tensor_bytes(constant)
    described = framed_bytes(constant.info.ByteSize()) if constant.info is not None else 0
    if constant.holder is None and not scope.is_function:
        return framed_bytes(tensor + _name_change(constant)) + described
    return held_bytes(constant, tensor, is_sparse=constant.stored is not None and constant.stored.is_sparse) + described


def held_bytes(constant: Constant, tensor: int, *, is_sparse: bool) -> int:
    """Returns the bytes of a Constant node that holds a tensor of so many bytes, under the name and holder of a constant."""
    kind = onnx.AttributeProto.SPARSE_TENSOR if is_sparse else onnx.AttributeProto.TENSOR
    attribute = framed_bytes(tensor) + onnx.AttributeProto(name="sparse_value" if is_sparse else "value", type=kind).ByteSize()
    attribute += is_sparse  # the field's number is 22: a tag of two bytes
    node = onnx.NodeProto(op_type="Constant", output=[constant.name])
    if constant.holder is not None:
        node.MergeFrom(constant.holder)
    return framed_bytes(framed_bytes(attribute) + node.ByteSize())


def _name_change(constant: Constant) -> int:
    """Returns by how many bytes the name of an initializer is longer than the one it was read with."""
    stored = constant.stored
    if stored is None or stored.external is not None or isinstance(stored.tensor, onnx.SparseTensorProto):
        return 0  # counted with the name it is written with
    return _name_bytes(constant.name) - _name_bytes(stored.tensor.name)


def _name_bytes(name: str) -> int:
    return framed_bytes(len(name.encode())) if name else 0


def node_bytes(node: Node) -> int:
    """Returns the bytes a node takes in the file, with its bodies and the descriptions of its outputs."""
    described = sum(framed_bytes(tensor.info.ByteSize()) for tensor in node.outputs if tensor.info is not None)
    return framed_bytes(node_message(node).ByteSize()) + described


def nodes_bytes(nodes: Iterable[Node]) -> int:
    """Returns the bytes of several nodes, each counted once."""
    return sum(map(node_bytes, {id(node): node for node in nodes}.values()))


def _sorted(graph: Graph) -> list[Node]:
    position = {id(node): index for index, node in enumerate(graph.nodes)}
    waiting: dict[int, int] = {}
    followers: dict[int, list[Node]] = {}
    ready: list[int] = []
    for node in graph.nodes:
        needs = {
            id(producer)
            for tensor in [*node.inputs, *(tensor for _, body in node.bodies() for tensor in _reads(body))]
            for producer in tensor.inputs
            if id(producer) in position
        }
        waiting[id(node)] = len(needs)
        for producer in needs:
            followers.setdefault(producer, []).append(node)
        if not needs:
            heapq.heappush(ready, position[id(node)])
    order = []
    while ready:
        node = graph.nodes[heapq.heappop(ready)]
        order.append(node)
        for follower in followers.get(id(node), ()):
            waiting[id(follower)] -= 1
            if not waiting[id(follower)]:
                heapq.heappush(ready, position[id(follower)])
    if len(order) != len(graph.nodes):
        stuck = next(node for node in graph.nodes if waiting[id(node)])
        raise PassError(f"graph '{graph.name}': node '{stuck.site}' must not depend on itself, got a cycle")
    return order


def _reads(body: Graph) -> Iterator[Tensor]:
    """Yields every tensor that a body or one below it reads or returns; those of outer scopes among them."""
    yield from body.outputs
    for node in body.nodes:
        yield from node.inputs
        for _, inner in node.bodies():
            yield from _reads(inner)


def _inner_ids(items: Iterable[Node | Constant]) -> set[int]:
    """Returns the ids of everything inside the bodies of the nodes among ``items``."""
    bodies = [body for item in items if isinstance(item, Node) for _, body in item.bodies()]
    return {id(item) for body in bodies for scope in body.scopes() for item in scope.graph.items}


def _unlink(body: Graph) -> None:
    for node in body.nodes:
        node.inputs.clear()
        for _, inner in node.bodies():
            _unlink(inner)


def _node_outputs(graph: Graph) -> Iterator[Tensor]:
    return (tensor for node in graph.nodes for tensor in node.outputs)
