"""Codes for all weights of a model within one budget: of bits, or of error in the outputs.

The entropy of the codes is what counts: an entropy coder is expected to follow. Steps come from `onnxshrink.allocation`. Error feedback
and repair change the outputs' error by an amount that only shows when all is done, so a target in decibels is met by trying: the
steps are scaled by what was missed, as squared error goes with squared step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from onnxshrink.allocation import Plan, plan
from onnxshrink.coding import Coding, code_in_turn
from onnxshrink.contract import Context
from onnxshrink.graph.ir import Graph
from onnxshrink.graph.weights import Weight
from onnxshrink.numerics.level_choice import halves, step_levels
from onnxshrink.numerics.levels import RowLevels
from onnxshrink.numerics.rates import Layer, predicted_bits, predicted_error, steps_for_error, steps_for_rate
from onnxshrink.repair import Repaired
from onnxshrink.sensitivity import folds

__all__ = ["code_for_rate", "code_for_sqnr"]

Array = np.ndarray[Any, np.dtype[Any]]
_Coded = tuple[dict[str, Coding], Repaired, list[str]]
_MOST_TRIALS = 3
_CLOSE_DB = 0.5  # from the target, on the better side
_CLOSE_BITS = 0.1  # to the rate asked for: error feedback moves it by hundredths
_TOO_COARSE = 2.0  # times the step that the budget asks for: four times the error


def code_for_rate(graph: Graph, weights: Sequence[Weight], bits: float, context: Context, rate_weight: float = 0.0) -> _Coded:
    """Returns codings of a mean entropy of ``bits`` a weight, by site; what was done beside; and what to say of it."""

    def badness(layers: list[Layer]) -> tuple[float, float]:
        return predicted_error(layers, steps_for_rate(layers, bits)), 0.0

    plans = plan(graph, weights, folds(graph, context), badness)
    codings, repaired = _code(graph, plans, steps_for_rate([item.layer for item in plans], bits), context, rate_weight)
    notes = [_summary(codings)]
    rate = _rate(codings)
    if rate > bits + _CLOSE_BITS:
        notes.append(f"{bits:g} bits a weight were asked for; coarser grids would leave nothing of some layers")
    elif rate < bits - _CLOSE_BITS:
        notes.append(f"{bits:g} bits a weight were asked for; codes of a byte take no finer grids")
    return codings, repaired, notes


def code_for_sqnr(graph: Graph, weights: Sequence[Weight], decibels: float, context: Context, rate_weight: float = 0.0) -> _Coded:
    """Returns codings with which the outputs have about that SQNR; otherwise as `code_for_rate`.

    A weight that would need far more levels than a byte can tell has no coding. Without calibration data there is nothing to
    measure: every weight then gets an equal share of the error, as if the relative error of its values were that of the outputs.
    """
    parts = folds(graph, context)
    fitting, probe = parts[0]
    target = aim = 10 ** (-decibels / 10)

    def badness(layers: list[Layer]) -> tuple[float, float]:
        steps = steps_for_error(layers, target)
        return max(predicted_error(layers, steps), target), predicted_bits(layers, steps)

    plans = _codable(plan(graph, weights, parts, badness), target)
    layers = [item.layer for item in plans]
    reached = ""
    aside = "that took no part in it" if fitting.activations is not context.activations else "it was fitted to"
    for trial in range(_MOST_TRIALS):
        if probe is None:
            break
        drift = probe.squared_drift(_decoded(plans, *_code(graph, plans, steps_for_error(layers, aim), fitting, rate_weight)))
        missed = 10 * math.log10(max(drift, 1e-30) / target)
        reached = f"{decibels - missed:.1f} dB on calibration inputs {aside}, aiming at {decibels:g}"
        if -_CLOSE_DB <= missed <= 0 or trial == _MOST_TRIALS - 1:
            break
        aim *= 10 ** (-(missed + _CLOSE_DB / 2) / 10)
    codings, repaired = _code(graph, plans, steps_for_error(layers, aim), context, rate_weight)
    unknown = "no calibration data" if context.activations is None else "the outputs on calibration inputs tell nothing"
    return codings, repaired, [_summary(codings), reached or f"{unknown}: steps follow from the weights alone"]


def _codable(plans: Sequence[Plan], squared_error: float) -> list[Plan]:
    """Returns the plans that codes of a byte suffice for, or nearly."""
    wanted = steps_for_error([replace(item.layer, finest=0.0) for item in plans], squared_error)
    return [item for item, step in zip(plans, wanted, strict=True) if step * _TOO_COARSE >= item.layer.finest]


def _code(
    graph: Graph, plans: Sequence[Plan], steps: Sequence[float], context: Context, rate_weight: float
) -> tuple[dict[str, Coding], Repaired]:
    scales = {item.weight.site: halves(item.scales * np.float32(step)) for item, step in zip(plans, steps, strict=True)}

    def levels_of(weight: Weight, rows: Array, importance: Array | None) -> tuple[RowLevels, str]:
        return step_levels(rows, scales[weight.site], rate_weight), f"uniform grid, {len(rows)} channels"

    codings, repaired = code_in_turn(graph, [item.weight for item in plans], levels_of, context)
    return {site: _with_entropy(coding) for site, coding in codings.items()}, repaired


def _with_entropy(coding: Coding) -> Coding:
    return replace(coding, detail=f"{coding.detail}, entropy {coding.entropy:.2f} bits")


def _decoded(plans: Sequence[Plan], codings: dict[str, Coding], repaired: Repaired) -> dict[str, Array]:
    """Returns the values that weights and biases get, by site."""
    values = {item.weight.site: codings[item.weight.site].decoded(item.weight.constant.dtype) for item in plans}
    return values | {bias.name: shifted for bias, shifted in repaired.biases.values()}


def _summary(codings: dict[str, Coding]) -> str:
    weights = sum(coding.codes.size for coding in codings.values())
    return f"{weights} weights on uniform grids, codes of {_rate(codings):.2f} bits entropy a weight"


def _rate(codings: dict[str, Coding]) -> float:
    """Returns the mean entropy of all codes, bits."""
    total = sum(coding.codes.size * coding.entropy for coding in codings.values())
    return total / max(sum(coding.codes.size for coding in codings.values()), 1)
