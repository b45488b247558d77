"""Finds the weights of a model, wherever they hide, and who computes with them.

A weight is a numeric constant of any scope: main graph, If/Loop/Scan body or model-local function. It is traced forward through
nodes that only move or convert elements (Identity, Cast, Transpose, Reshape, DequantizeLinear) and into the functions it is
passed to, down to the nodes that compute with it. One stored tensor is one `Weight` however many nodes use it, so a tied
weight is changed once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from onnxshrink.graph.coded import coded_weights
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
                return f"input {use.operand} of {use.op} is not a weight operand"
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
    parts = {id(constant) for coded in coded_weights(graph) for constant in coded.constants}
    found = []
    for scope in graph.scopes():
        for constant in scope.graph.constants:
            if constant.size > 1 and constant.dtype != object and id(constant) not in parts:
                uses = tuple(tracer.uses(constant, View((constant.shape,))))
                found.append(Weight(scope.address(constant.name), scope, constant, uses))
    return found


class _Tracer:
    """Follows tensors forward; built once per question because graph outputs are not linked to their tensors."""

    def __init__(self, graph: Graph) -> None:
        self.functions = {(function.residue.domain, function.name): function for function in graph.local_functions}
        function_ids = {id(function) for function in graph.local_functions}
        self.outputs = {
            id(tensor)
            for scope in graph.scopes()
            if id(scope.graph) not in function_ids
            for tensor in scope.graph.outputs
        }

    def uses(self, tensor: Tensor, view: View | None, path: tuple[Node, ...] = ()) -> Iterator[Use]:
        if id(tensor) in self.outputs:
            yield Use(None, 0, path, None)
        for node in {id(node): node for node in tensor.outputs}.values():
            for operand, other in enumerate(node.inputs):
                if other is tensor:
                    yield from self.reads(node, operand, view, path)

    def reads(self, node: Node, operand: int, view: View | None, path: tuple[Node, ...]) -> Iterator[Use]:
        function = self.functions.get((node.domain or "", node.op))
        if function is not None and operand < len(function.inputs):
            yield from self.uses(function.inputs[operand], view, (*path, node))
            return
        moved = through(view, node, operand) if view is not None else None
        if moved is not None or is_mover(node, operand):
            for output in node.outputs:
                yield from self.uses(output, moved, (*path, node))
        elif reads_values(node):
            yield Use(node, operand, path, operand_view(view, node, operand) if view is not None else None)
