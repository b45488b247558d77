"""Activations for passes: the current graph runs on the calibration samples, one sample after the other.

    activations = Calibration(samples)
    for values in activations.samples(graph, ["conv1_in", "fc_in"]):  # dicts: tensor name -> array
        ...

Nothing runs before the first value is asked for, and one sample's values are in memory at a time. Only what the named
tensors depend on is given to ONNX Runtime, so early layers of a deep network cost little. A new graph output needs no
type: ONNX Runtime infers it from a ValueInfoProto that has just a name (1.31, tried, although onnx.checker wants a
type).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from onnxshrink.errors import PassError, ValidationError
from onnxshrink.graph.ir import Constant, Graph, Node, Tensor, Variable
from onnxshrink.inputs import Samples
from onnxshrink.options import did_you_mean
from onnxshrink.runtime import session

__all__ = ["Calibration"]

Array = np.ndarray[Any, np.dtype[Any]]


class Calibration:
    """The `Activations` of onnxshrink.contract, made by ONNX Runtime."""

    def __init__(self, data: Samples, threads: int | None = None) -> None:
        """Keeps the samples; runs nothing.

        Args:
            data: inputs of the original model, which every rewritten graph still has.
            threads: of ONNX Runtime, or None for its choice.
        """
        self._data = data
        self._threads = threads

    @property
    def count(self) -> int:
        """How many samples there are."""
        return len(self._data)

    def samples(self, graph: Graph, names: Sequence[str]) -> Iterator[Mapping[str, Array]]:
        """Yields, for each calibration sample, the values of the named tensors of the main graph, by name.

        Args:
            graph: as it is now; only read, and not to be edited before the iteration is over.
            names: graph inputs, constants and outputs of nodes of the main graph, typed or not.

        Raises:
            PassError: a name is unknown (at once).
            ValidationError: the graph does not run, or a name is no tensor (while iterating).
        """
        known = _tensors(graph)
        for name in names:
            if name not in known:
                raise PassError(f"calibration: the main graph has no tensor '{name}'; {did_you_mean(name, known)}")
        return self._iterate(graph, {name: known[name] for name in names})

    def _iterate(self, graph: Graph, wanted: Mapping[str, Tensor]) -> Iterator[Mapping[str, Array]]:
        constants = {name: tensor.values for name, tensor in wanted.items() if isinstance(tensor, Constant)}
        computed = [name for name, tensor in wanted.items() if tensor.inputs and not isinstance(tensor, Constant)]
        if not computed:
            for feeds in self._data:
                yield {name: feeds[name] if name in feeds else constants[name] for name in wanted}
            return
        with session(_excerpt(graph, computed), self._threads) as running:
            for feeds in self._data:
                values = {**constants, **feeds, **running.run(feeds)}
                if missing := [name for name in wanted if name not in values]:
                    raise ValidationError(f"calibration: '{missing[0]}' has no value: it is not a tensor")
                yield {name: values[name] for name in wanted}


def _tensors(graph: Graph) -> dict[str, Tensor]:
    """Returns the tensors of the main graph by name."""
    tensors = [*graph.inputs, *graph.constants, *(tensor for node in graph.nodes for tensor in node.outputs)]
    return {tensor.name: tensor for tensor in tensors if tensor.name}


def _excerpt(graph: Graph, names: Sequence[str]) -> Graph:
    """Returns a copy with the named tensors for outputs and only the nodes and constants that they depend on."""
    copy = graph.copy()
    known = _tensors(copy)
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
