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
from onnxshrink.numerics.levels import Levels, step_levels
from onnxshrink.numerics.rates import steps_for_error, steps_for_rate
from onnxshrink.repair import Repaired
from onnxshrink.sensitivity import OutputProbe

__all__ = ["code_for_rate", "code_for_sqnr"]

Array = np.ndarray[Any, np.dtype[Any]]
_Coded = tuple[dict[str, Coding], Repaired, list[str]]
_MOST_TRIALS = 3
_CLOSE_DB = 0.5  # from the target, on the better side
_TOO_COARSE = 2.0  # times the step that the budget asks for: four times the error


def code_for_rate(graph: Graph, weights: Sequence[Weight], bits: float, context: Context) -> _Coded:
    """Returns codings of a mean entropy of ``bits`` a weight, by site; what was done beside; and what to say of it."""
    plans = plan(graph, weights, context, _probe(graph, context))
    steps = steps_for_rate([item.layer for item in plans], bits)
    codings, repaired = _code(graph, plans, steps, context)
    return codings, repaired, [_summary(codings)]


def code_for_sqnr(graph: Graph, weights: Sequence[Weight], decibels: float, context: Context) -> _Coded:
    """Returns codings with which the outputs have about that SQNR; otherwise as `code_for_rate`.

    A weight that would need far more levels than a byte can tell has no coding. Without calibration data there is nothing to
    measure: every weight then gets an equal share of the error, as if the relative error of its values were that of the outputs.
    """
    probe = _probe(graph, context)
    every = plan(graph, weights, context, probe)
    target = aim = 10 ** (-decibels / 10)
    for trial in range(_MOST_TRIALS):
        plans, steps = _codable(every, aim)
        codings, repaired = _code(graph, plans, steps, context)
        if probe is None:
            return codings, repaired, [_summary(codings), "no calibration data: steps follow from the weights alone"]
        drift = probe.squared_drift(_decoded(plans, codings))
        missed = 10 * math.log10(max(drift, 1e-30) / target)
        if -_CLOSE_DB <= missed <= 0 or trial == _MOST_TRIALS - 1:
            break
        aim *= 10 ** (-(missed + _CLOSE_DB / 2) / 10)
    reached = -10 * math.log10(max(drift, 1e-30))
    return codings, repaired, [_summary(codings), f"{reached:.1f} dB on calibration inputs, aiming at {decibels:g}"]


def _codable(plans: Sequence[Plan], squared_error: float) -> tuple[list[Plan], list[float]]:
    """Returns the plans that codes of a byte suffice for, or nearly, and their steps."""
    wanted = steps_for_error([replace(item.layer, finest=0.0) for item in plans], squared_error)
    bounded = steps_for_error([item.layer for item in plans], squared_error)
    kept = [index for index, (fine, step) in enumerate(zip(wanted, bounded, strict=True)) if fine * _TOO_COARSE >= step]
    return [plans[index] for index in kept], [bounded[index] for index in kept]


def _probe(graph: Graph, context: Context) -> OutputProbe | None:
    probe = OutputProbe(graph, context.activations) if context.activations is not None else None
    return probe if probe is not None and probe.is_possible else None


def _code(
    graph: Graph, plans: Sequence[Plan], steps: Sequence[float], context: Context
) -> tuple[dict[str, Coding], Repaired]:
    scales = {item.weight.site: _half(item.scales * np.float32(step)) for item, step in zip(plans, steps, strict=True)}

    def levels_of(weight: Weight, rows: Array, importance: Array | None) -> tuple[Levels, str]:
        return step_levels(rows, scales[weight.site]), f"uniform grid, {len(rows)} channels"

    codings, repaired = code_in_turn(graph, [item.weight for item in plans], levels_of, context)
    return {site: _with_entropy(coding) for site, coding in codings.items()}, repaired


def _with_entropy(coding: Coding) -> Coding:
    return replace(coding, detail=f"{coding.detail}, entropy {coding.entropy:.2f} bits")


def _half(scales: Array) -> Array:
    """Returns the scales rounded to float16, which the file then holds, unless that is out of its normal range."""
    limits = np.finfo(np.float16)
    if scales.min() < limits.tiny or scales.max() > limits.max:
        return scales
    return scales.astype(np.float16).astype(np.float32)


def _decoded(plans: Sequence[Plan], codings: dict[str, Coding]) -> dict[str, Array]:
    return {item.weight.site: codings[item.weight.site].decoded(item.weight.constant.dtype) for item in plans}


def _summary(codings: dict[str, Coding]) -> str:
    weights = sum(coding.codes.size for coding in codings.values())
    total = sum(coding.codes.size * coding.entropy for coding in codings.values())
    return f"{weights} weights on uniform grids, codes of {total / max(weights, 1):.2f} bits entropy a weight"
