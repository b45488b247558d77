"""Steps of uniform grids for all weights of a model at once, from what rounding each of them does to the outputs.

Each weight is rounded alone, with the error feedback it will get, and the drift of the outputs measured on calibration inputs;
`onnxshrink.numerics.rates` makes steps of that. Within a weight, the step of a row goes with the root of its rms: between one step
for all, which is right if all output channels matter alike, and one in proportion to the row, which is right if what follows
normalises them. On models of both kinds either end lost about a decibel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from onnxshrink.contract import Context
from onnxshrink.graph.ir import Graph
from onnxshrink.graph.lowering import lowerings
from onnxshrink.graph.weights import Weight
from onnxshrink.numerics.levels import MOST_STEPS, by_channel, relative_scales, round_rows, step_levels
from onnxshrink.numerics.rates import Layer, sampled
from onnxshrink.sensitivity import OutputProbe

__all__ = ["Plan", "averaged", "plan"]

Array = np.ndarray[Any, np.dtype[Any]]
_PROBED_STEP = 0.5  # of the rms: about 3 bits, where the outputs move enough to tell and little enough to be proportional


@dataclass(frozen=True, eq=False)
class Plan:
    """What is known of a weight before steps are given out.

    Attributes:
        weight: it.
        scales: float32 [channels], relative steps of its channels, 1 in the geometric mean.
        layer: for `onnxshrink.numerics.rates`.
    """

    weight: Weight
    scales: Array
    layer: Layer


def plan(graph: Graph, weights: Sequence[Weight], context: Context, probe: OutputProbe | None) -> list[Plan]:
    """Returns the plan of each weight, in their order.

    Args:
        graph: the main graph; not changed.
        weights: of it, finite.
        context: for activations and progress.
        probe: of the graph; None where there is nothing to measure with, so that costs stay unknown.
    """
    plans: dict[int, Plan] = {}
    for weight, grams in _with_grams(graph, weights, context):
        plans[id(weight)] = _plan(weight, grams, probe)
        context.progress(len(plans), 2 * len(weights))
    return [plans[id(weight)] for weight in weights]


def averaged(trials: Sequence[Sequence[Plan]]) -> list[Plan]:
    """Returns plans of the same weights with the mean of the costs that were measured; unknown where none was."""
    return [_averaged(plans) for plans in zip(*trials, strict=True)]


def _averaged(plans: Sequence[Plan]) -> Plan:
    costs = [item.layer.cost for item in plans if item.layer.cost is not None]
    return replace(plans[0], layer=replace(plans[0].layer, cost=float(np.mean(costs)) if costs else None))


def _with_grams(graph: Graph, weights: Sequence[Weight], context: Context) -> Iterator[tuple[Weight, Array | None]]:
    if context.activations is None:
        yield from ((weight, None) for weight in weights)
        return
    known = {id(weight) for weight, ways in lowerings(graph, weights) if not isinstance(ways, str)}
    yield from ((weight, None) for weight in weights if id(weight) not in known)
    wanted = [weight for weight in weights if id(weight) in known]
    yield from ((weight, moments.shrunk) for weight, moments in context.activations.grams(graph, wanted))


def _plan(weight: Weight, grams: Array | None, probe: OutputProbe | None) -> Plan:
    matrix, channels = weight.layout.forward(weight.constant.values).astype(np.float64), weight.channels
    grouped = by_channel(matrix, channels)
    scales = relative_scales(grouped)
    relative = grouped / scales[:, None]
    rms = float(np.sqrt(np.mean(np.square(relative)))) or 1.0
    cost = None
    if probe is not None:
        levels = step_levels(grouped, (_PROBED_STEP * rms * scales).astype(np.float32))
        step = float(levels.grid.scale[0] / scales[0])  # coarser than asked for where a few weights lie far out
        rounded = round_rows(matrix, grams, levels.rows(channels))
        values = weight.layout.inverse(rounded).astype(weight.constant.dtype)
        drift = probe.squared_drift({weight.site: values})
        cost = drift / step**2 if np.isfinite(drift) else None
    finest = max(float(np.abs(relative).max(initial=0.0)) / MOST_STEPS, float(np.finfo(np.float32).tiny))
    return Plan(weight, scales, Layer(sampled(relative), matrix.size, cost, finest))
