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
    scales: dict[int, Array] = {}
    layers: dict[int, Layer] = {}
    costs: dict[int, list[float | None]] = {id(weight): [] for weight in weights}
    for number, (context, probe) in enumerate(folds):
        for done, (weight, grams) in enumerate(_with_grams(graph, weights, context), 1):
            scales[id(weight)], layers[id(weight)] = _layer(weight)
            costs[id(weight)].append(_cost(weight, scales[id(weight)], grams, probe))
            context.progress(number * len(weights) + done, len(folds) * len(weights))
    return [
        Plan(weight, scales[id(weight)], replace(layers[id(weight)], cost=_mean(costs[id(weight)]))) for weight in weights
    ]


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


def _layer(weight: Weight) -> tuple[Array, Layer]:
    """Returns the rms of each channel relative to the others, and the layer without its cost."""
    relative, scales = _relative(weight)
    finest = max(float(np.abs(relative).max(initial=0.0)) / MOST_STEPS, float(np.finfo(np.float32).tiny))
    return scales, Layer(sampled(relative), relative.size, None, finest)


def _cost(weight: Weight, scales: Array, grams: Array | None, probe: OutputProbe | None) -> float | None:
    """Returns the squared drift of the outputs over the squared step, or None if that cannot be measured."""
    if probe is None:
        return None
    relative, _ = _relative(weight)
    rms = float(np.sqrt(np.mean(np.square(relative)))) or 1.0
    matrix, channels = weight.layout.forward(weight.constant.values).astype(np.float64), weight.channels
    levels = step_levels(by_channel(matrix, channels), (_PROBED_STEP * rms * scales).astype(np.float32))
    step = float(levels.grid.scale[0] / scales[0])  # coarser than asked for where a few weights lie far out
    rounded = round_rows(matrix, grams, levels.rows(channels))
    drift = probe.squared_drift({weight.site: weight.layout.inverse(rounded).astype(weight.constant.dtype)})
    return drift / step**2 if np.isfinite(drift) else None


def _relative(weight: Weight) -> tuple[Array, Array]:
    """Returns the weights of each channel [channels, columns] over its scale, and the scales."""
    grouped = by_channel(weight.layout.forward(weight.constant.values).astype(np.float64), weight.channels)
    scales = relative_scales(grouped, 1.0)
    return grouped / scales[:, None], scales
