"""Tests of steps: entropies against a dictionary, equal marginal cost between bounds, totals that are met, odd layers."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxshrink.numerics import rates
from onnxshrink.numerics.rates import (
    Layer,
    predicted_bits,
    predicted_error,
    rounded_entropy,
    sampled,
    steps_for_error,
    steps_for_rate,
)


def gauss(seed: int, size: int = 3000, scale: float = 1.0):
    return np.random.default_rng(seed).standard_normal(size) * scale


def coarsest(layer: Layer) -> float:
    return max(2 * float(np.sqrt(np.mean(layer.values**2))), layer.finest)


@st.composite
def layers_of_a_model(draw, wide: bool = False):
    count = draw(st.integers(1, 5))
    reach = 3 if wide else 1  # with the scales, less than the floor of costs
    return [
        Layer(
            gauss(seed, scale=10 ** draw(st.floats(-1, 1))),
            draw(st.integers(1, 10**6)),
            10 ** draw(st.floats(-reach, reach)),
            draw(st.sampled_from([1e-6, 1e-2, 1.0])) if wide else 1e-9,
        )
        for seed in range(count)
    ]


def error_of(layers, steps) -> float:
    return sum(layer.cost * step**2 for layer, step in zip(layers, steps, strict=True))


def bits_of(layers, steps) -> float:
    pairs = list(zip(layers, steps, strict=True))
    return sum(layer.size * rounded_entropy(layer.values, step) for layer, step in pairs) / sum(
        layer.size for layer in layers
    )


def at_finest(layer: Layer, step: float) -> bool:
    return step <= layer.finest * (1 + 1e-9)


def at_coarsest(layer: Layer, step: float) -> bool:
    return step >= coarsest(layer) * (1 - 1e-9)


def check_equal_marginal_cost(layers, steps) -> None:
    """One price of a bit explains all steps: between its bounds a layer pays it, d(c s²) / d(n log2 s) = 2 ln 2 c s² / n.

    At its finest step a layer would pay at least the price for another bit, at its coarsest it saves at most the price with one less.
    """
    lows, highs = [0.0], [math.inf]
    for layer, step in zip(layers, steps, strict=True):
        assert layer.finest * (1 - 1e-12) <= step <= coarsest(layer) * (1 + 1e-12)
        slope = layer.cost * step**2 / layer.size
        if not at_finest(layer, step):
            lows.append(slope)
        if not at_coarsest(layer, step):
            highs.append(slope)
    assert max(lows) <= min(highs) * (1 + 1e-8)


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=60), st.floats(0.1, 20))
def test_entropy_is_that_of_the_codes(values, step):
    counts = Counter(round(value / step) for value in values)  # Python rounds half to even, too
    expected = -sum(count / len(values) * math.log2(count / len(values)) for count in counts.values())
    assert rounded_entropy(np.array(values), step) == pytest.approx(expected, abs=1e-9)


def test_entropy_of_many_levels_takes_no_table_of_them():
    values = np.array([0.0, 1e15, -1e15, 1e15])
    assert rounded_entropy(values, 1e-6) == pytest.approx(1.5)
    assert rounded_entropy(np.zeros(0), 1.0) == rounded_entropy(np.zeros(9), 1e-30) == 0.0


def test_entropy_at_high_rate_is_differential_entropy_less_the_step():
    expected = 0.5 * math.log2(2 * math.pi * math.e) + 6
    assert rounded_entropy(gauss(0, 1 << 19), 2.0**-6) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("size", [0, 1, 1 << 16, (1 << 17) - 1, 1 << 17, 10**6])
def test_samples_are_spread_evenly_and_few(size):
    values = np.arange(size).reshape(1, -1)
    chosen = sampled(values)
    assert chosen.ndim == 1
    assert min(size, 1 << 15) <= chosen.size <= 1 << 17
    steps = np.diff(chosen)
    assert size < 2 or (steps[0] % 2 == 1 and np.all(steps == steps[0]))


@given(layers_of_a_model(), st.floats(-6, -2))
def test_the_error_allowed_is_spent_and_equally_well_everywhere(layers, exponent):
    steps = steps_for_error(layers, 10**exponent)
    check_equal_marginal_cost(layers, steps)
    if any(step < coarsest(layer) * (1 - 1e-9) for layer, step in zip(layers, steps, strict=True)):
        assert error_of(layers, steps) == pytest.approx(10**exponent, rel=1e-9)
    else:
        assert error_of(layers, steps) <= 10**exponent


@given(layers_of_a_model(wide=True), st.floats(-8, 4))
def test_bounds_hold_and_the_others_make_up_for_them(layers, exponent):
    steps = steps_for_error(layers, 10**exponent)
    check_equal_marginal_cost(layers, steps)
    error = error_of(layers, steps)
    limits = list(zip(layers, steps, strict=True))
    if error > 10**exponent * (1 + 1e-9):
        assert all(at_finest(*limit) for limit in limits)
    elif error < 10**exponent * (1 - 1e-9):
        assert all(at_coarsest(*limit) for limit in limits)


@given(layers_of_a_model(wide=True), st.floats(0.2, 9))
def test_the_bits_allowed_are_spent_and_equally_well_everywhere(layers, bits):
    steps = steps_for_rate(layers, bits)
    check_equal_marginal_cost(layers, steps)
    spent = bits_of(layers, steps)
    limits = list(zip(layers, steps, strict=True))
    if all(at_coarsest(*limit) for limit in limits):
        return  # no coarser steps make sense
    assert spent <= bits
    if not all(at_finest(*limit) for limit in limits):
        slightly = [max(step * 0.99, layer.finest) for layer, step in limits]
        assert bits_of(layers, slightly) >= bits - 0.02  # nothing worth having is left


@given(st.integers(0, 1000), st.floats(2, 6))
def test_no_other_steps_of_those_bits_err_less(seed, bits):
    """A random change of the steps that keeps Σ n log2 s raises Σ c s²."""
    rng = np.random.default_rng(seed)
    layers = [
        Layer(gauss(index), int(rng.integers(100, 10000)), float(rng.uniform(0.1, 10)), 1e-9) for index in range(4)
    ]
    steps = np.array(steps_for_rate(layers, bits))
    sizes = np.array([layer.size for layer in layers])
    change = rng.standard_normal(4) * 0.3
    change -= (sizes @ change) / sizes.sum()
    if np.all(steps < [coarsest(layer) for layer in layers]):
        assert error_of(layers, steps * 2**change) >= error_of(layers, steps)


def test_a_common_unit_of_values_changes_nothing():
    values = [gauss(0), gauss(1) * 5]
    small, large = ([Layer(part * unit, 1000, 3 / unit**2, 1e-3 * unit) for part in values] for unit in (1e-9, 1e9))
    for steps in (lambda layers: steps_for_error(layers, 1e-4), lambda layers: steps_for_rate(layers, 3.0)):
        np.testing.assert_allclose(np.array(steps(small)) * 1e18, steps(large), rtol=1e-9)


def test_a_layer_of_an_unknown_cost_is_given_an_error_like_its_own():
    """Its relative squared error is s² / 12 rms², if it is rounded alone: that is what it may cost."""
    layer = Layer(gauss(0, scale=7.0), 500, None, 1e-9)
    (step,) = steps_for_error([layer], 1e-3)
    rounded = np.rint(layer.values / step) * step
    relative = np.sum((rounded - layer.values) ** 2) / np.sum(layer.values**2)
    assert relative == pytest.approx(1e-3, rel=0.1)
    known = Layer(layer.values, 500, 1 / (12 * float(np.mean(layer.values**2))), 1e-9)
    assert steps_for_error([known, layer], 1e-3) == pytest.approx([step / math.sqrt(2)] * 2)


@pytest.mark.parametrize("cost", [None, 0.0, 1.0])
def test_a_layer_of_zeros_takes_nothing_from_the_others(cost):
    other = Layer(gauss(0), 500, 2.0, 1e-9)
    zeros = Layer(np.zeros(100), 100, cost, np.finfo(np.float32).tiny)
    for steps in (lambda layers: steps_for_error(layers, 1e-3), lambda layers: steps_for_rate(layers, 3.0 * 500 / 600)):
        both = steps([zeros, other])
        assert both[0] == 1.0
    assert steps_for_error([zeros, other], 1e-3)[1] == pytest.approx(steps_for_error([other], 1e-3)[0])
    assert steps_for_rate([zeros, other], 3.0 * 500 / 600)[1] == pytest.approx(steps_for_rate([other], 3.0)[0])
    assert steps_for_error([zeros], 1e-3) == steps_for_rate([zeros], 3.0) == [1.0]


def test_layers_that_seem_not_to_matter_stay_recognisable():
    layers = [Layer(gauss(0), 1000, 5.0, 1e-3), Layer(gauss(1), 1000, 0.0, 1e-3)]
    for steps in (steps_for_error(layers, 1e-4), steps_for_rate(layers, 4.0)):
        assert steps[1] == pytest.approx(coarsest(layers[1]))
        assert steps[0] < 0.1
    nothing = [Layer(gauss(0), 1000, 0.0, 1e-3), Layer(gauss(1), 1000, 0.0, 1e-3)]
    alike = steps_for_rate(nothing, 4.0)
    assert bits_of(nothing, alike) == pytest.approx(4.0, abs=0.01)
    assert alike[0] == pytest.approx(alike[1], rel=0.05)


def test_no_layers_have_no_steps():
    assert steps_for_error([], 1.0) == steps_for_rate([], 3.0) == []


def test_a_rate_above_what_alphabets_hold_gives_the_finest():
    layers = [Layer(gauss(0), 10, 1.0, 0.05), Layer(gauss(1), 10, 1.0, 0.01)]
    assert steps_for_rate(layers, 16.0) == pytest.approx([0.05, 0.01], rel=1e-9)
    assert steps_for_error(layers, 1e-12) == [0.05, 0.01]


def test_the_bound_for_coarse_steps_leaves_what_it_says():
    assert rounded_entropy(gauss(0, 1 << 18), rates._COARSEST) == pytest.approx(1.2, abs=0.05)


def test_predictions_are_what_rounding_gives() -> None:
    """Entropy counted by hand; error as the sum of the costs times squared steps."""
    rng = np.random.default_rng(0)
    layers = [Layer(rng.standard_normal(500) * scale, 500, cost, 0.0) for scale, cost in ((1.0, 2.0), (3.0, 0.5))]
    steps = [0.3, 0.8]
    assert predicted_error(layers, steps) == pytest.approx(2.0 * 0.09 + 0.5 * 0.64)
    bits = 0.0
    for layer, step in zip(layers, steps, strict=True):
        counts = np.unique(np.rint(layer.values / step), return_counts=True)[1]
        bits -= float((counts * np.log2(counts / 500)).sum())
    assert predicted_bits(layers, steps) == pytest.approx(bits)
