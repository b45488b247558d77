"""Finds the weights of a model, wherever they hide, and who computes with them.

A weight is a numeric constant of any scope: main graph, If/Loop/Scan body or model-local function. It is traced forward through
nodes that only move or convert elements (Identity, Cast, Transpose, Reshape, DequantizeLinear), into the functions it is passed
to and back out of them, down to the nodes that compute with it. One stored tensor is one `Weight` however many nodes use it, so
a tied weight is changed once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from onnxshrink.graph.coded import coded_weights
from onnxshrink.graph.huffman import is_decoder_scope
from onnxshrink.graph.ir import Constant, Graph, Node, Scope, Tensor
from onnxshrink.graph.storage import is_float
from onnxshrink.graph.views import COMPUTE_OPS, View, is_mover, is_weight_operand, operand_view, reads_values, through

__all__ = ["Use", "Weight", "weights"]


@dataclass(frozen=True, eq=False)
class Use:
    """One place where a weight is read.

    Attributes:
        node: the node that reads it, after all movers, or None for a graph output.
        operand: which input of the node.
        path: the movers between the stored tensor and the node, in order.
        view: from the stored tensor to the matrix of the operand; None if it is no weight operand, or if movers such as
            Concat took it apart on the way.
    """

    node: Node | None
    operand: int
    path: tuple[Node, ...]
    view: View | None

    @property
    def is_operand(self) -> bool:
        """Whether the node computes with the tensor, or with its rearranged elements, as a weight."""
        return self.node is not None and is_weight_operand(self.node, self.operand)

    @property
    def op(self) -> str:
        """The op that reads the weight, or "graph output"."""
        return self.node.op if self.node is not None else "graph output"


@dataclass(frozen=True, eq=False)
class Weight:
    """A stored numeric tensor with all its uses.

    Attributes:
        site: its model-wide name.
        scope: where it is stored.
        constant: the stored tensor; edit it with `onnxshrink.graph.edit`.
        uses: every place that reads it, in graph order.
    """

    site: str
    scope: Scope
    constant: Constant
    uses: tuple[Use, ...]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """What a glob of a rule may match: the site, and name and first output of every node that uses the weight."""
        nodes = [use.node for use in self.uses if use.node is not None]
        return (self.site, *(name for node in nodes for name in (node.name, node.site) if name))

    @property
    def view(self) -> View | None:
        """The matrix that all computing uses agree on; None when there is no such use, or tied uses disagree."""
        views = [use.view for use in self.uses if use.is_operand]
        return views[0] if views and all(view == views[0] for view in views) else None

    @property
    def layout(self) -> View:
        """The view, or where there is none the whole tensor as one row, for what works on elements alone."""
        return self.view or View((self.constant.shape,)).reshape((1, self.constant.size))

    @property
    def channels(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """For each row of the layout, where its output channel lies on the view's channel axis: [rows], zeros if on none."""
        layout, axis = self.layout, self.layout.channel_axis
        if axis is None:
            return np.zeros(layout.shape[0], np.int32)
        along = [size if index == axis else 1 for index, size in enumerate(self.constant.shape)]
        every = np.broadcast_to(np.arange(along[axis], dtype=np.int32).reshape(along), self.constant.shape)
        return layout.forward(every)[:, 0].copy()

    @property
    def obstacle(self) -> str | None:
        """Why its values must not be changed, or None when every use is a weight operand of a known op."""
        if not is_float(self.constant.dtype):
            return f"holds {self.constant.dtype} values, not floating point"
        if not self.uses:
            return "is not used"
        for use in self.uses:
            if use.node is None:
                return "is a graph output"
            if not use.is_operand:
                return f"is read as input {use.operand} of {use.op}, which is no weight operand"
        return None

    @property
    def computes(self) -> bool:
        """Whether a use does arithmetic with it, as against looking rows up."""
        return any(use.is_operand and use.op in COMPUTE_OPS for use in self.uses)


def weights(graph: Graph) -> list[Weight]:
    """Returns every numeric constant of the model that has more than one element, in file order.

    Parts of coded weights are not among them; `onnxshrink.graph.coded` finds those.
    """
    tracer = _Tracer(graph)
    parts = {id(constant) for coded in coded_weights(graph) for constant in coded.parts}
    found = []
    for scope in graph.scopes():
        if is_decoder_scope(scope):
            continue
        for constant in scope.graph.constants:
            if constant.size > 1 and constant.dtype != object and id(constant) not in parts:
                found.append(Weight(scope.address(constant.name), scope, constant, tuple(tracer.uses(constant))))
    return found


@dataclass(frozen=True)
class _Place:
    """Where the trace of a weight has come to: a tensor, the view of it, the movers so far, and the calls it is within."""

    tensor: Tensor
    view: View | None
    path: tuple[Node, ...] = ()
    calls: tuple[Node, ...] = ()


class _Tracer:
    """Follows tensors forward; built once per question because graph outputs are not linked to their tensors."""

    def __init__(self, graph: Graph) -> None:
        self.functions = {(function.domain, function.name, function.overload): function for function in graph.local_functions}
        self.returns = {
            id(tensor): (function, index)
            for function in graph.local_functions
            for index, tensor in enumerate(function.outputs)
        }
        self.calls: dict[int, list[Node]] = {}
        self.outputs: set[int] = set()
        for scope in graph.scopes():
            if not scope.graph.is_function:
                self.outputs.update(id(tensor) for tensor in scope.graph.outputs)
            for node in scope.graph.nodes:
                if (function := self.called(node)) is not None:
                    self.calls.setdefault(id(function), []).append(node)

    def called(self, node: Node) -> Graph | None:
        """Returns the local function that a node calls."""
        return self.functions.get((node.domain or "", node.op, node.overload))

    def uses(self, constant: Constant) -> Iterator[Use]:
        """Yields every use once, in graph order; a way that parts and meets again is walked once."""
        seen = set()
        waiting: list[_Place | Use] = [_Place(constant, View((constant.shape,)))]
        while waiting:
            at = waiting.pop()
            if isinstance(at, Use):
                yield at
            elif (key := (id(at.tensor), at.view, at.calls)) not in seen:
                seen.add(key)
                waiting.extend(reversed(list(self.next(at))))

    def next(self, at: _Place) -> Iterator[_Place | Use]:
        """Yields what reads the tensor of a place, and where it goes on."""
        if id(at.tensor) in self.outputs:
            yield Use(None, 0, at.path, None)
        if id(at.tensor) in self.returns:
            yield from self.returned(at)
        for node in {id(node): node for node in at.tensor.outputs}.values():
            for operand, other in enumerate(node.inputs):
                if other is at.tensor:
                    yield from self.reads(at, node, operand)

    def returned(self, at: _Place) -> Iterator[_Place]:
        """Yields the outputs of the call that the trace came through, or of every call if the function owns the weight."""
        function, index = self.returns[id(at.tensor)]
        for call in at.calls[-1:] or self.calls.get(id(function), []):
            if index < len(call.outputs):
                yield _Place(call.outputs[index], at.view, at.path, at.calls[:-1])

    def reads(self, at: _Place, node: Node, operand: int) -> Iterator[_Place | Use]:
        path, function = (*at.path, node), self.called(node)
        if function is not None and operand < len(function.inputs) and node not in at.calls:
            yield _Place(function.inputs[operand], at.view, path, (*at.calls, node))
            return
        moved = through(at.view, node, operand) if at.view is not None else None
        if moved is not None or is_mover(node, operand):
            for output in node.outputs:
                yield _Place(output, moved, path, at.calls)
        elif reads_values(node):
            yield Use(node, operand, at.path, operand_view(at.view, node, operand) if at.view is not None else None)
