"""What a graph consisted of at some time, so that whoever found out something about it can tell whether that still holds."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from onnxshrink.graph.excerpt import reads
from onnxshrink.graph.ir import Constant, Graph, Node

__all__ = ["Structure"]


@dataclass(frozen=True, eq=False)
class Structure:
    """The nodes of a main graph with their attributes and what they read, what it takes and returns, and the shapes of its constants.

    Values are a part of it only where asked for.

    Attributes:
        fixed: ids of the constants whose values must stay the same too, as those of shapes and positions.
        parts: for each node, constant, and list of tensors, its name and all that must stay the same; holds what it names alive, so
            that nothing else can take its place in memory.
    """

    fixed: frozenset[int]
    parts: tuple[tuple[str, tuple[Any, ...]], ...]

    @classmethod
    def of(cls, graph: Graph, fixed: Collection[int] = ()) -> Structure:
        """Returns the structure of a main graph as it is."""
        return cls(frozenset(fixed), tuple(_parts(graph, fixed)))

    def change(self, graph: Graph) -> str | None:
        """Returns what is no longer as it was, by its name, or None if all is."""
        now = tuple(_parts(graph, self.fixed))
        for (name, before), (other, after) in zip(self.parts, now, strict=False):
            if before != after:
                return name if name == other else other
        return None if len(self.parts) == len(now) else "the number of nodes or constants"


def _parts(graph: Graph, fixed: Collection[int]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    yield "the graph's inputs", tuple(graph.inputs)
    yield "the graph's outputs", tuple(graph.outputs)
    for node in graph.nodes:
        yield f"node '{node.site or node.op}'", (node, node.op, node.domain, *_attributes(node), *reads(node), "->", *node.outputs)
    for constant in graph.constants:
        values = (_Held(constant),) if id(constant) in fixed else ()
        yield f"tensor '{constant.name}'", (constant, constant.shape, constant.dtype, *values)


def _attributes(node: Node) -> Iterator[Any]:
    for name, value in node.attrs.items():
        yield name, tuple(value) if isinstance(value, list) else value


class _Held:
    """What a constant holds, equal while it is the same object: arrays are frozen, and so is what is in the file."""

    def __init__(self, constant: Constant) -> None:
        self.content = constant.values if constant.stored is None else constant.stored

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held) and self.content is other.content

    def __hash__(self) -> int:
        return id(self.content)
