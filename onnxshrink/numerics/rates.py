"""How finely to round each layer: the same gain in quality for the last bit, wherever it is spent.

With steps of size s an entropy coder needs about h - log2 s bits a weight, and the squared error of the model's outputs grows as
c s², with a c of every layer's own: it is measured, by rounding that layer alone. Errors of different layers are nearly
uncorrelated and add up. Minimising

    sum_l c_l s_l²        subject to        sum_l n_l (h_l - log2 s_l) = bits

gives s_l² proportional to n_l / c_l, with one common factor (reverse water-filling at high rate; Cover & Thomas, Elements of
Information Theory, section 10.3). A layer whose alphabet forbids such fine steps, or which is all zero long before such coarse
ones, stays at its bound, and the others make up for it. The factor follows by bisection from the error allowed, or from the bits
allowed: these over the entropy that rounding really leaves, which also holds at low rates where the logarithm does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from onnxshrink.numerics.chunks import Array

__all__ = [
    "Layer",
    "predicted_bits",
    "predicted_error",
    "rounded_entropy",
    "sampled",
    "steps_for_error",
    "steps_for_rate",
]

_SAMPLE = 1 << 16  # values that stand for a layer: its entropy is then known to some thousandths of a bit
_BISECTIONS = 48
_COARSEST = 2.0  # steps, in rms, that leave a normal distribution 1.2 bits; coarser ones destroy a layer
_FINEST = 1e-30  # whatever a layer says: further calculations stay in the range of float32
_FLOOR = 1e-12  # of the greatest c · rms²: a layer that seems not to matter still stays recognisable
_DENSE = 1 << 20  # levels up to which counting all of them is faster than sorting values


@dataclass(frozen=True, eq=False)
class Layer:
    """What rounding a layer costs.

    Attributes:
        values: float [n], the weights, or some that stand for them, in units of its rows' scales.
        size: how many weights there are, at least 1.
        cost: squared relative error of the model's outputs with a step of 1, finite, not negative; None if it is not known.
        finest: smallest step, with which codes still fit in the alphabet; positive where values are not all zero.
    """

    values: Array
    size: int
    cost: float | None
    finest: float


def sampled(values: Array) -> Array:
    """Returns the values, or evenly spaced ones of them where there are many."""
    flat = values.reshape(-1)
    stride = max(1, flat.size // _SAMPLE) | 1  # odd: no resonance with powers of two in the shape
    return flat[::stride].copy()  # not a view: those of all layers are held, and must not hold the layers


def rounded_entropy(values: Array, step: float) -> float:
    """Returns the entropy of round(values / step), bits a value."""
    if not values.size:
        return 0.0
    levels = np.rint(values / step)
    lowest = levels.min()
    if levels.max() - lowest < _DENSE:
        counts = np.bincount((levels - lowest).astype(np.int64))
        counts = counts[counts > 0]
    else:
        counts = np.unique(levels, return_counts=True)[1]
    return math.log2(levels.size) - float(counts @ np.log2(counts)) / levels.size


def steps_for_error(layers: Sequence[Layer], squared_error: float) -> list[float]:
    """Returns the step of each layer for a squared relative error of the outputs, or the nearest that the bounds allow.

    Args:
        layers: any number.
        squared_error: above 0.
    """
    costs = _costs(layers)

    def is_too_coarse(steps: list[float]) -> bool:
        return sum(cost * step * step for cost, step in zip(costs, steps, strict=True)) > squared_error

    return _bisected(layers, costs, is_too_coarse)[0]


def steps_for_rate(layers: Sequence[Layer], bits: float) -> list[float]:
    """Returns the step of each layer for a mean entropy of ``bits`` a weight, or the nearest that the bounds allow."""
    total = sum(layer.size for layer in layers)

    def is_too_coarse(steps: list[float]) -> bool:
        return predicted_bits(layers, steps) <= bits * total

    return _bisected(layers, _costs(layers), is_too_coarse)[1]


def predicted_error(layers: Sequence[Layer], steps: Sequence[float]) -> float:
    """Returns the squared relative error of the outputs that steps make, as far as errors add up."""
    return sum(cost * step * step for cost, step in zip(_costs(layers), steps, strict=True))


def predicted_bits(layers: Sequence[Layer], steps: Sequence[float]) -> float:
    """Returns the entropy of all codes that steps leave."""
    entropies = (rounded_entropy(layer.values, step) for layer, step in zip(layers, steps, strict=True))
    return sum(layer.size * entropy for layer, entropy in zip(layers, entropies, strict=True))


def _bisected(
    layers: Sequence[Layer], costs: Sequence[float], is_too_coarse: Callable[[list[float]], bool]
) -> tuple[list[float], list[float]]:
    """Returns the steps just before they get too coarse, and just after."""
    bounds = [_bounds(layer) for layer in layers]
    ratios = [math.sqrt(layer.size / cost) if cost else 1.0 for layer, cost in zip(layers, costs, strict=True)]

    def steps(octaves: float) -> list[float]:
        return [_bounded(2.0**octaves * ratio, *both) for ratio, both in zip(ratios, bounds, strict=True)]

    # beyond these, all layers are at their bounds
    low = min((math.log2(finest / ratio) for ratio, (finest, _) in zip(ratios, bounds, strict=True)), default=0.0)
    high = max((math.log2(coarsest / ratio) for ratio, (_, coarsest) in zip(ratios, bounds, strict=True)), default=0.0)
    if not is_too_coarse(steps(high)):
        return steps(high), steps(high)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if is_too_coarse(steps(middle)) else (middle, high)
    return steps(low), steps(high)


def _costs(layers: Sequence[Layer]) -> list[float]:
    """Returns the c of each layer, 0 for one of zeros; if unknown, as if the outputs' relative error were that of its values."""
    squares = [_mean_square(layer) for layer in layers]
    shares = [
        1 / 12 if layer.cost is None else layer.cost * square for layer, square in zip(layers, squares, strict=True)
    ]
    least = _FLOOR * max(shares, default=0.0) or 1.0  # if nothing matters, everything matters alike
    return [max(share, least) / square if square else 0.0 for share, square in zip(shares, squares, strict=True)]


def _bounds(layer: Layer) -> tuple[float, float]:
    """Returns the finest and the coarsest step that make sense for a layer; a layer of zeros has one step."""
    finest = max(layer.finest, _FINEST)
    root = math.sqrt(_mean_square(layer))
    return (finest, max(_COARSEST * root, finest)) if root > 0 else (max(1.0, finest), max(1.0, finest))


def _bounded(step: float, finest: float, coarsest: float) -> float:
    return max(min(step, coarsest), finest)


def _mean_square(layer: Layer) -> float:
    return float(np.mean(np.square(layer.values, dtype=np.float64))) if layer.values.size else 0.0
