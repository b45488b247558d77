"""Steps of uniform grids for all weights of a model at once, from what rounding each of them does to the outputs.

Each weight is rounded alone, with the error feedback it will get, and the drift of the outputs measured on calibration inputs;
`onnxshrink.numerics.rates` makes steps of that. Within a weight, steps go with a power of each channel's rms. One step for all would
be right if all output channels mattered alike, and steps in proportion to the rms if what follows normalised them. Both the
proportion and its root are tried, and each weight gets what does less harm at equal rate. (One step for all lost 6 dB on a
transformer and never gained.)
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
from onnxshrink.numerics.rates import Layer, rounded_entropy, sampled
from onnxshrink.sensitivity import OutputProbe

__all__ = ["Plan", "plan"]

Array = np.ndarray[Any, np.dtype[Any]]
_EXPONENTS = (1.0, 0.5)  # the first where nothing tells them apart
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
    trials: dict[int, list[list[_Trial]]] = {id(weight): [] for weight in weights}
    for number, (context, probe) in enumerate(folds):
        for done, (weight, grams) in enumerate(_with_grams(graph, weights, context), 1):
            trials[id(weight)].append(_trials(weight, grams, probe))
            context.progress(number * len(weights) + done, len(folds) * len(weights))
    return [_best(trials[id(weight)]) for weight in weights]


@dataclass(frozen=True, eq=False)
class _Trial:
    """A plan, and what an error of the outputs costs with it at equal rate; both as one fold has it."""

    plan: Plan
    merit: float


def _best(folds: Sequence[Sequence[_Trial]]) -> Plan:
    """Returns the plan of least mean error at equal rate, with the mean of its costs."""
    merits = [float(np.mean([trial.merit for trial in alike])) for alike in zip(*folds, strict=True)]
    chosen = [trials[int(np.argmin(merits))].plan for trials in folds]
    costs = [item.layer.cost for item in chosen if item.layer.cost is not None]
    return replace(chosen[0], layer=replace(chosen[0].layer, cost=float(np.mean(costs)) if costs else None))


def _with_grams(graph: Graph, weights: Sequence[Weight], context: Context) -> Iterator[tuple[Weight, Array | None]]:
    if context.activations is None:
        yield from ((weight, None) for weight in weights)
        return
    known = {id(weight) for weight, ways in lowerings(graph, weights) if not isinstance(ways, str)}
    yield from ((weight, None) for weight in weights if id(weight) not in known)
    wanted = [weight for weight in weights if id(weight) in known]
    yield from ((weight, moments.shrunk) for weight, moments in context.activations.grams(graph, wanted))


def _trials(weight: Weight, grams: Array | None, probe: OutputProbe | None) -> list[_Trial]:
    """Returns what each exponent does; only the first where nothing can tell them apart."""
    alone = probe is None or not weight.channels.any()
    return [_trial(weight, grams, probe, exponent) for exponent in _EXPONENTS[: 1 if alone else None]]


def _trial(weight: Weight, grams: Array | None, probe: OutputProbe | None, exponent: float) -> _Trial:
    """Returns the plan with steps that go with that power of a channel's rms.

    A step of s costs c s^2 and takes h(s) bits; at high rate c s^2 4^h(s) is the same for every s, and compares exponents.
    """
    matrix, channels = weight.layout.forward(weight.constant.values).astype(np.float64), weight.channels
    grouped = by_channel(matrix, channels)
    scales = relative_scales(grouped, exponent)
    relative = grouped / scales[:, None]
    rms = float(np.sqrt(np.mean(np.square(relative)))) or 1.0
    cost, merit = None, 0.0
    if probe is not None:
        levels = step_levels(grouped, (_PROBED_STEP * rms * scales).astype(np.float32))
        step = float(levels.grid.scale[0] / scales[0])  # coarser than asked for where a few weights lie far out
        rounded = round_rows(matrix, grams, levels.rows(channels))
        drift = probe.squared_drift({weight.site: weight.layout.inverse(rounded).astype(weight.constant.dtype)})
        cost = drift / step**2 if np.isfinite(drift) else None
        merit = drift * 4 ** rounded_entropy(sampled(relative), step)
    finest = max(float(np.abs(relative).max(initial=0.0)) / MOST_STEPS, float(np.finfo(np.float32).tiny))
    return _Trial(Plan(weight, scales, Layer(sampled(relative), matrix.size, cost, finest)), merit)
