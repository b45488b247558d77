"""Gives inner tensors short names and takes the names of nodes: nothing that callers of the model see, and fewer bytes.

Names stand in the file wherever a tensor is computed or read, so a model with 60 nodes and names such as
``/layer1/layer1.0/conv1/Conv_output_0`` spends 10 KB on them: nothing beside dense weights, a tenth beside coded ones. Names of the
model's inputs and outputs stay. Run it last: reports and rules of later passes speak of weights by their names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxshrink.contract import Change, Context, Pass, Report, Skip
from onnxshrink.graph.edit import item_bytes
from onnxshrink.graph.ir import Graph
from onnxshrink.graph.names import obstacle_to_shortening, shorten_names

__all__ = ["ShortenNames"]


@dataclass(frozen=True, kw_only=True)
class ShortenNames(Pass):
    """Shortens the names of inner tensors and drops those of nodes; inputs and outputs keep theirs."""

    name: ClassVar[str] = "shorten-names"
    runs_last: ClassVar[bool] = True

    def apply(self, graph: Graph, context: Context) -> Report:
        """Edits the graph in place."""
        site = graph.name or "graph"
        if context.options(self, [site]) is None:
            return Report(skips=[Skip(site, "left alone by a rule")])
        if (obstacle := obstacle_to_shortening(graph)) is not None:
            return Report(skips=[Skip(site, obstacle)])
        before = _nbytes(graph)
        tensors = shorten_names(graph)
        after = _nbytes(graph)
        if not tensors or after >= before:
            return Report(skips=[Skip(site, "names are short already")])
        return Report([Change(site, before, after, f"{tensors} inner tensors renamed, names of nodes dropped")])


def _nbytes(graph: Graph) -> int:
    return sum(item_bytes(item, graph) for item in graph.items)  # bodies are parts of their nodes
