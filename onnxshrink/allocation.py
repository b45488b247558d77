"""Steps of uniform grids for all weights of a model at once, from what rounding each of them does to the outputs.

Each weight is rounded alone, with the error feedback it will get, and the drift of the outputs measured on calibration inputs;
`onnxshrink.numerics.rates` makes steps of that. Within a weight, steps go with each channel's rms: codes are then distributed alike in
all channels, and it is right if what follows normalises them. Steps that go with the root of the rms did half a decibel better on a
small residual network and more than a decibel worse on a transformer, where one step for all channels lost 6 dB.
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

__all__ = ["Plan", "plan"]

Array = np.ndarray[Any, np.dtype[Any]]
_PROBED_STEP = 0.5  # of the rms: about 3 bits, where the outputs move enough to tell and little enough to be proportional


@dataclass(frozen=True, eq=False)
class Plan:
    """What is known of a weight before steps are given out.

    Attributes:
        weight: it.
        scales: float32 [channels], relative steps of its channels.
        layer: for `onnxshrink.numerics.rates`.
    """

    weight: Weight
    scales: Array
    layer: Layer


def plan(graph: Graph, weights: Sequence[Weight], folds: Sequence[tuple[Context, OutputProbe | None]]) -> list[Plan]:
    """Returns the plan of each weight, in their order, with the mean of what the folds measured.

    Args:
        graph: the main graph; not changed.
        weights: of it, finite.
        folds: contexts for activations and progress, each with a probe of the graph on other inputs; None where there is nothing
            to measure with, so that costs stay unknown.
    """
    plans = {id(weight): _unmeasured(weight) for weight in weights}
    costs: dict[int, list[float | None]] = {id(weight): [] for weight in weights}
    for number, (context, probe) in enumerate(folds):
        for done, (weight, grams) in enumerate(_with_grams(graph, weights, context), 1):
            costs[id(weight)].append(_cost(plans[id(weight)], grams, probe) if probe is not None else None)
            context.progress(number * len(weights) + done, len(folds) * len(weights))
    return [replace(item, layer=replace(item.layer, cost=_mean(costs[key]))) for key, item in plans.items()]


def _mean(costs: Sequence[float | None]) -> float | None:
    """Returns the mean of what was measured, None if nothing was."""
    known = [cost for cost in costs if cost is not None]
    return float(np.mean(known)) if known else None


def _with_grams(graph: Graph, weights: Sequence[Weight], context: Context) -> Iterator[tuple[Weight, Array | None]]:
    if context.activations is None:
        yield from ((weight, None) for weight in weights)
        return
    known = {id(weight) for weight, ways in lowerings(graph, weights) if not isinstance(ways, str)}
    yield from ((weight, None) for weight in weights if id(weight) not in known)
    wanted = [weight for weight in weights if id(weight) in known]
    yield from ((weight, moments.shrunk) for weight, moments in context.activations.grams(graph, wanted))


def _unmeasured(weight: Weight) -> Plan:
    """Returns the plan of a weight whose cost is not known yet."""
    grouped = by_channel(weight.layout.forward(weight.constant.values).astype(np.float64), weight.channels)
    scales = relative_scales(grouped, 1.0)
    relative = grouped / scales[:, None]
    finest = max(float(np.abs(relative).max(initial=0.0)) / MOST_STEPS, float(np.finfo(np.float32).tiny))
    return Plan(weight, scales, Layer(sampled(relative), relative.size, None, finest))


def _cost(item: Plan, grams: Array | None, probe: OutputProbe) -> float | None:
    """Returns the squared drift of the outputs over the squared step, or None if that is not finite."""
    weight, scales = item.weight, item.scales
    matrix, channels = weight.layout.forward(weight.constant.values).astype(np.float64), weight.channels
    grouped = by_channel(matrix, channels)
    rms = float(np.sqrt(np.mean(np.square(grouped / scales[:, None])))) or 1.0
    levels = step_levels(grouped, (_PROBED_STEP * rms * scales).astype(np.float32))
    step = float(levels.grid.scale[0] / scales[0])  # coarser than asked for where a few weights lie far out
    rounded = round_rows(matrix, grams, levels.rows(channels))
    drift = probe.squared_drift({weight.site: weight.layout.inverse(rounded).astype(weight.constant.dtype)})
    return drift / step**2 if np.isfinite(drift) else None
