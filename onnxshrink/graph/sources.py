"""Which tensors to ask a graph for, so that the positions that its weights meet can be made from their values."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxshrink.errors import PassError
from onnxshrink.graph.edit import NameSource
from onnxshrink.graph.ir import Graph, Node, Variable
from onnxshrink.graph.lowering import Lowering, Source, lowerings
from onnxshrink.graph.weights import Weight
from onnxshrink.graph.weights import weights as weights_of

__all__ = ["Found", "Lowerings", "Running", "lowered", "named", "running_order", "twin_lowerings"]

Array = np.ndarray[Any, np.dtype[Any]]
Lowerings = tuple[Lowering, ...]
Found = list[tuple[Weight, Lowerings]]


@dataclass(frozen=True)
class Running:
    """A graph in which every source that is asked for has a name.

    Attributes:
        graph: it, or a copy.
        names: of the sources, which are those of the graph that was copied, if it was.
    """

    graph: Graph
    names: Mapping[Source, str]

    def wanted(self, ways: Iterable[Lowering]) -> list[str]:
        """Returns the names of all sources of lowerings."""
        return sorted({self.names[source] for one in ways for source in one.sources})

    def values(self, one: Lowering, values: Mapping[str, Array]) -> dict[Source, Array]:
        """Returns the values of the sources of a lowering."""
        return {source: values[self.names[source]] for source in one.sources}

    def title(self, one: Lowering) -> str:
        """Returns what to call the positions of a lowering in errors."""
        return f"input '{self.names[one.sources[0]]}' of a layer"


def lowered(graph: Graph, weights: Sequence[Weight]) -> Found:
    """Returns the weights that have lowerings, with them."""
    return [(weight, ways) for weight, ways in lowerings(graph, weights) if not isinstance(ways, str)]


def named(graph: Graph, ways: Iterable[Lowerings], *, in_place: bool = False) -> Running:
    """Returns a copy of the graph, or the graph itself, in which every source of the lowerings has a name."""
    running, fresh = graph if in_place else graph.copy(), NameSource(graph)
    nodes = dict(zip(graph.nodes, running.nodes, strict=True))
    names: dict[Source, str] = {}
    for source in (source for job in ways for one in job for source in one.sources):
        if source not in names and isinstance(source, Node):
            output = nodes[source].outputs[0]
            if not output.name:
                output = nodes[source].outputs[0] = Variable(fresh.fresh(f"{source.site}_first"))
            names[source] = output.name
        elif source not in names:
            names[source] = source.name
    return Running(running, names)


def running_order(graph: Graph, found: Found) -> dict[Lowerings, list[Weight]]:
    """Returns the weights by their lowerings, sorted by the last node that multiplies with them."""
    position = {id(node): index for index, node in enumerate(graph.nodes)}
    jobs: dict[Lowerings, list[Weight]] = {}
    for weight, ways in sorted(found, key=lambda item: max(position.get(id(use.node), -1) for use in item[0].uses)):
        jobs.setdefault(ways, []).append(weight)
    return jobs


def twin_lowerings(found: Found, original: Graph) -> dict[Lowering, Lowering]:
    """Returns the lowerings of the same weights in the original, by those in a copy of it.

    Args:
        found: weights of the copy, with their lowerings.
        original: which names its weights as the copy does.

    Raises:
        PassError: a weight is missing there, or met by other positions.
    """
    sites = {weight.site for weight, _ in found}
    known = lowered(original, [weight for weight in weights_of(original) if weight.site in sites])
    ways_of = {weight.site: ways for weight, ways in known}
    twins: dict[Lowering, Lowering] = {}
    for weight, ways in found:
        for one, twin in itertools.zip_longest(ways, ways_of.get(weight.site, ())):
            if one is None or twin is None or not one.matches(twin) or twins.setdefault(one, twin) != twin:
                raise PassError(f"calibration: the original does not multiply with '{weight.site}' as its copy does")
    return twins
