"""Steps of uniform grids for all weights of a model at once, from what rounding each of them does to the outputs.

Each weight is rounded alone, with the error feedback it will get, and the drift of the outputs measured on calibration inputs;
`onnxshrink.numerics.rates` makes steps of that. Within a weight, steps go with a power of each channel's rms. In proportion to it,
codes are distributed alike in all channels, which is right if what follows normalises these; steps that go with its root did half a
decibel better on networks without, and more than a decibel worse on a transformer, where one step for all channels lost 6 dB. So both
are measured, and the better one holds for the whole model: for a single layer the difference is mostly noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from onnxshrink.contract import Context
from onnxshrink.graph.ir import Graph
from onnxshrink.graph.weights import Weight
from onnxshrink.numerics.cells import by_channel
from onnxshrink.numerics.level_choice import MOST_STEPS, relative_scales, step_levels
from onnxshrink.numerics.levels import round_rows
from onnxshrink.numerics.rates import Layer, sampled
from onnxshrink.repair import with_grams
from onnxshrink.sensitivity import OutputProbe

__all__ = ["Plan", "plan"]

Array = np.ndarray[Any, np.dtype[Any]]
_EXPONENTS = (1.0, 0.5)  # the first where nothing is known
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


def plan(
    graph: Graph,
    weights: Sequence[Weight],
    folds: Sequence[tuple[Context, OutputProbe | None]],
    badness: Callable[[list[Layer]], tuple[float, float]],
) -> list[Plan]:
    """Returns the plan of each weight, in their order, with the mean of what the folds measured.

    Args:
        graph: the main graph; not changed.
        weights: of it, finite.
        folds: contexts for activations and progress, each with a probe of the graph on other inputs; None where there is nothing
            to measure with, so that costs stay unknown.
        badness: of layers with steps in proportion to one another: the least holds.
    """
    kinds = [[_unmeasured(weight, exponent) for weight in weights] for exponent in _EXPONENTS]
    costs: list[dict[int, list[float]]] = [{id(weight): [] for weight in weights} for _ in kinds]
    place = {id(weight): index for index, weight in enumerate(weights)}
    for number, (context, probe) in enumerate(folds):
        for done, (weight, grams) in enumerate(with_grams(graph, weights, context), 1):
            for plans, found in zip(kinds, costs, strict=True):
                cost = _cost(plans[place[id(weight)]], grams, probe) if probe is not None else None
                found[id(weight)] += [cost] if cost is not None else []
            context.progress(number * len(weights) + done, len(folds) * len(weights))
    measured = [
        [_with_cost(item, found[id(item.weight)]) for item in plans] for plans, found in zip(kinds, costs, strict=True)
    ]
    return min(measured, key=lambda plans: badness([item.layer for item in plans]))


def _with_cost(item: Plan, costs: Sequence[float]) -> Plan:
    """Returns the plan with the mean of what was measured, if anything was."""
    return replace(item, layer=replace(item.layer, cost=float(np.mean(costs)) if costs else None))


def _unmeasured(weight: Weight, exponent: float) -> Plan:
    """Returns the plan of a weight whose cost is not known yet, with steps that go with a power of the channels' rms."""
    grouped = by_channel(weight.layout.forward(weight.constant.values).astype(np.float64), weight.channels)
    scales = relative_scales(grouped, exponent)
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
