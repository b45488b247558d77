"""Runs of whole graphs that a pass may ask for: how much work the nodes do, and how fast one graph is next to another.

A pass knows no ONNX Runtime; `onnxshrink.contract.Trials` is what it sees of this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from onnxshrink.errors import ShrinkError, UnsupportedModelError
from onnxshrink.graph.excerpt import excerpt
from onnxshrink.graph.ir import Graph, Variable
from onnxshrink.inputs import Samples
from onnxshrink.latency import bench
from onnxshrink.runtime import session
from onnxshrink.tracing import NodeTrace, node_macs, trace

__all__ = ["SampleTrials"]

Array = np.ndarray[Any, np.dtype[Any]]
_PART_SECONDS = 0.2
_SECONDS = 2.0  # of timed runs: medians of pairs settle within a percent or two


class SampleTrials:
    """The `Trials` of onnxshrink.contract, on samples."""

    def __init__(self, samples: Samples, seconds: float = _SECONDS) -> None:
        """Keeps the samples; runs nothing.

        Args:
            samples: of the model's inputs, real or synthetic; one at least.
            seconds: that a comparison of latencies may take.
        """
        self._samples = samples
        self._seconds = seconds

    def macs(self, graph: Graph) -> dict[int, float] | None:
        """Returns the multiply-accumulates of the nodes that ran on the first sample, by id; None if they do not run one by one."""
        return node_macs(graph, self._traces(graph))

    def shapes(self, graph: Graph) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of what the nodes of the main graph computed from the first sample, by name; none where they do not run."""
        traces = self._traces(graph)
        found: dict[str, tuple[int, ...]] = {}
        for node in graph.nodes:
            computed = traces[id(node)].output_shapes if id(node) in traces else ()
            if len(computed) == len(node.outputs):
                found |= {tensor.name: shape for tensor, shape in zip(node.outputs, computed, strict=True) if tensor.name}
        return found

    def _traces(self, graph: Graph) -> dict[int, NodeTrace]:
        """Returns what nodes did; nothing where ONNX Runtime runs the graph only in an optimised form."""
        try:
            return trace(graph, self._samples[0])
        except UnsupportedModelError:
            return {}

    def latency_ratio(self, before: Graph, after: Graph) -> float:
        """Returns the time that the second graph takes over that of the first, both on one thread, in turns: a median.

        Raises:
            ModelError: the first graph does not run.
            ValidationError: the second does not.
        """
        return bench(before, after, self._samples, seconds=self._seconds).ratio.median

    def part_ratio(self, before: Graph, after: Graph, inputs: Sequence[str], outputs: Sequence[str]) -> float:
        """Returns the time that the second graph takes, on one thread, to compute some tensors from others, over that of the first.

        Args:
            before: the main graph; the first sample runs through it to fill the inputs.
            after: another one with the same tensors.
            inputs: names of tensors of both.
            outputs: names of tensors of both, which depend on nothing but those and constants.

        Returns:
            A median; infinite if either does not run.
        """
        try:
            feeds = self._values(before, inputs)
            first, second = (_part(graph, feeds, outputs) for graph in (before, after))
            data = Samples(lambda index: feeds, range(1), "one sample")
            return bench(first, second, data, seconds=_PART_SECONDS).ratio.median
        except ShrinkError:  # of a part that ONNX Runtime does not run by itself nothing is known
            return float("inf")

    def _values(self, graph: Graph, names: Sequence[str]) -> dict[str, Array]:
        sample = self._samples[0]
        computed = [name for name in names if name not in sample]
        values = {name: sample[name] for name in names if name in sample}
        if computed:
            with session(excerpt(graph, computed), threads=1) as running:
                found = running.run(sample)
                values |= {name: found[name] for name in computed}
        return values


def _part(graph: Graph, feeds: Mapping[str, Array], outputs: Sequence[str]) -> Graph:
    """Returns what computes tensors from those that are fed; what else the model wants to be fed, it does not."""
    part = excerpt(graph, outputs, {name: array.dtype for name, array in feeds.items()})
    part.inputs = [Variable(name, array.dtype, array.shape) for name, array in feeds.items()]
    return part
