"""Tests of densities: exact totals within bounds, proportions, thresholds against sorting, the best shares against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from onnxshrink.numerics.densities import (
    Bounds,
    Curve,
    by_global_threshold,
    by_sensitivity,
    cubic_schedule,
    erdos_renyi_kernel,
    uniform,
)

sizes = st.lists(st.integers(1, 100_000), min_size=1, max_size=6)
shares = st.floats(0, 1)


def bounds_of(count: int, seed: int) -> Bounds:
    pair = np.sort(np.random.default_rng(seed).random((2, count)), axis=0)
    return Bounds.of(count, pair[0] * 0.5, 0.5 + pair[1] * 0.5)


def reachable(counts, share, bounds) -> bool:
    total = np.asarray(counts, float)
    return bounds.floor @ total <= (1 - share) * total.sum() <= bounds.ceiling @ total


def check(counts, kept, share, bounds=None):
    total = np.asarray(counts, float)
    assert total @ kept == pytest.approx((1 - share) * total.sum(), abs=1e-8 * total.sum())
    low, high = (0, 1) if bounds is None else (bounds.floor, bounds.ceiling)
    assert (kept >= low).all()
    assert (kept <= high).all()


@given(sizes, shares, st.integers(0, 99))
def test_uniform_is_the_same_within_bounds(counts, share, seed):
    kept = uniform(counts, share)
    check(counts, kept, share)
    assert kept == pytest.approx(np.full(len(counts), 1 - share))
    bounds = bounds_of(len(counts), seed)
    assume(reachable(counts, share, bounds))
    kept = uniform(counts, share, bounds)
    check(counts, kept, share, bounds)
    free = kept[(kept > bounds.floor + 1e-6) & (kept < bounds.ceiling - 1e-6)]
    assert free.size == 0 or free == pytest.approx(np.full(free.size, free[0]), abs=1e-6)


@given(st.lists(st.tuples(st.integers(1, 64), st.integers(1, 64), st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=6), shares)
def test_erdos_renyi_kernel_is_in_proportion_up_to_one(shapes, share):
    counts = [int(np.prod(shape)) for shape in shapes]
    kept = erdos_renyi_kernel(shapes, share)
    check(counts, kept, share)
    ratio = kept / np.array([sum(shape) / np.prod(shape) for shape in shapes])
    free = kept < 1 - 1e-9
    if free.any() and share < 1:
        assert ratio[free] == pytest.approx(np.full(free.sum(), ratio[free][0]), rel=1e-6)
        assert (ratio[~free] <= ratio[free][0] * (1 + 1e-6)).all()


@given(st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=15), min_size=1, max_size=4), shares, st.integers(0, 99))
def test_one_threshold_leaves_the_largest(layers, share, seed):
    scores = [np.array(layer, float) for layer in layers]
    counts = [layer.size for layer in scores]
    kept = by_global_threshold(scores, share)
    check(counts, kept, share)
    every = np.sort(np.concatenate(scores))
    cut = every[min(int(share * every.size), every.size - 1)]
    for layer, found in zip(scores, kept, strict=True):
        assert np.mean(layer > cut) - 1e-9 <= found <= np.mean(layer >= cut) + 1e-9
    bounds = bounds_of(len(counts), seed)
    assume(reachable(counts, share, bounds))
    check(counts, by_global_threshold(scores, share, bounds), share, bounds)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 1000)), min_size=1, max_size=3), st.integers(1, 9))
def test_sensitivity_finds_what_brute_force_finds(layers, tenths):
    counts = [1000 * size for size, _ in layers]
    points = np.linspace(0.2, 1.0, 5)
    curves = [Curve(points, np.sort(np.random.default_rng(seed).random(5)) ** 3) for _, seed in layers]
    kept = by_sensitivity(counts, curves, tenths / 10)
    check(counts, kept, tenths / 10)
    drift = sum(float(curve.at(np.array(1 - share))) for curve, share in zip(curves, kept, strict=True))
    total = sum(counts) * tenths / 10
    grid = np.linspace(0, 1, 11)
    chosen = np.array(list(itertools.product(range(11), repeat=len(counts))))
    drifts = sum(curve.at(grid)[chosen[:, layer]] for layer, curve in enumerate(curves))
    best = drifts[grid[chosen] @ counts >= total - 1e-6].min()
    assert drift <= best * 1.03 + 1e-4  # layers choose between hundredths, counted in ten-thousandths


@given(sizes, shares, st.integers(0, 99))
def test_sensitivity_keeps_totals_and_bounds(counts, share, seed):
    rng, bounds = np.random.default_rng(seed), bounds_of(len(counts), seed)
    assume(reachable(counts, share, bounds))
    curves = [Curve(np.array([0.3, 0.5, 0.8]), np.sort(rng.random(3))) for _ in counts]
    check(counts, by_sensitivity(counts, curves, share, bounds), share, bounds)


def test_curves_rise_through_their_points():
    curve = Curve(np.array([0.25, 0.5, 0.75]), np.array([0.01, 0.04, 0.03]))
    assert curve.at(np.array([0.25, 0.5, 0.75])) == pytest.approx([0.01, 0.04, 0.04])
    assert curve.at(np.array([0.0, 0.125, 0.375])) == pytest.approx([0.0, 0.01 / 8, 0.02])
    assert (np.diff(curve.at(np.linspace(0, 1, 50))) >= 0).all()
    steep = Curve(np.array([0.5, 0.75]), np.array([0.01, 0.1]))
    assert steep.at(np.array([1.0])) == pytest.approx([1.0])


def test_the_cubic_schedule_ends_where_it_should():
    assert cubic_schedule(0.0, 0.8, 1) == pytest.approx([0.8])
    assert cubic_schedule(0.0, 0.8, 4) == pytest.approx([0.8 - 0.8 * 0.75**3, 0.8 - 0.8 / 8, 0.8 - 0.8 / 64, 0.8])
    assert cubic_schedule(0.5, 0.5, 2) == pytest.approx([0.5, 0.5])


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="share_removed must be between 0 and 1, got 1.5"):
        uniform([1], 1.5)
    with pytest.raises(ValueError, match="sizes must be one positive integer or more"):
        uniform([0], 0.5)
    with pytest.raises(ValueError, match="sparsity must be between 0 and 0.5 with these bounds, got 0.8"):
        uniform([10, 10], 0.8, Bounds.of(2, [0.5, 0.5]))
    with pytest.raises(ValueError, match="with 0 <= floor <= ceiling <= 1"):
        Bounds.of(1, [0.5], [0.4])
    with pytest.raises(ValueError, match="densities: curves must be 2, got 0"):
        by_sensitivity([1, 1], [], 0.5)
    with pytest.raises(ValueError, match="sparsities must be ascending"):
        Curve(np.array([0.0, 0.5]), np.array([0.0, 0.1])).at(np.array([0.1]))
    with pytest.raises(ValueError, match="schedule must be"):
        cubic_schedule(0.5, 0.4, 3)
