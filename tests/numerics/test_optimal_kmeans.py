"""Tests of the dynamic programme, against the enumeration of every clustering."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxshrink.numerics.optimal_kmeans import optimal_centers


def exact_error(points, weights, center=None):
    """The squared error of a cluster around its mean, or around a center, without rounding."""
    if not points:
        return Fraction(0)
    center = sum(w * x for x, w in zip(points, weights, strict=True)) / sum(weights) if center is None else center
    return sum(w * (x - center) ** 2 for x, w in zip(points, weights, strict=True))


def least_error(points, weights, k, keep_zero):
    """The least error over every way to cut sorted points in k slices, one of them around zero if it must be kept."""
    points, weights = [Fraction(x) for x in points], [Fraction(w) for w in weights]
    best = None
    for cuts in itertools.combinations_with_replacement(range(len(points) + 1), k - 1):
        bounds = [0, *cuts, len(points)]
        slices = [slice(a, b) for a, b in itertools.pairwise(bounds)]
        around_means = [exact_error(points[s], weights[s]) for s in slices]
        totals = [sum(around_means)]
        if keep_zero:
            around_zero = [exact_error(points[s], weights[s], 0) for s in slices]
            totals = [totals[0] - mean + zero for mean, zero in zip(around_means, around_zero, strict=True)]
        best = min([*totals, *([] if best is None else [best])])
    return best


def error_of(points, weights, centers):
    nearest = [min((Fraction(x) - Fraction(c)) ** 2 for c in centers) for x in points]
    return sum(Fraction(w) * e for w, e in zip(weights, nearest, strict=True))


# eighths of small integers: centers are rounded once, so errors differ from the least by parts in 2^50
rows_of_points = st.integers(1, 7).flatmap(
    lambda n: st.lists(
        st.tuples(
            st.lists(st.integers(-40, 40), min_size=n, max_size=n),
            st.lists(st.integers(1, 9), min_size=n, max_size=n),
        ),
        min_size=1,
        max_size=3,
    )
)


@given(rows_of_points, st.integers(1, 4), st.booleans())
def test_no_clustering_errs_less(rows, k, keep_zero):
    points = np.sort(np.array([row[0] for row in rows]) / 8, axis=1)
    weights = np.array([row[1] for row in rows], np.float64)
    centers = optimal_centers(points, weights, k, keep_zero=keep_zero)
    assert centers.shape == (len(rows), k)
    assert np.all(np.diff(centers, axis=1) >= 0)
    for x, w, c in zip(points.tolist(), weights.tolist(), centers.tolist(), strict=True):
        assert not keep_zero or 0.0 in c
        assert abs(error_of(x, w, c) - least_error(x, w, k, keep_zero)) < Fraction(1, 2**40)


@given(st.lists(st.integers(-9, 9), min_size=5, max_size=5), st.integers(1, 4), st.booleans())
def test_points_without_weight_count_for_nothing(points, k, keep_zero):
    points = np.sort(np.array(points, np.float64))
    weights = np.array([0, 1, 0, 2, 0.0])
    with_all = optimal_centers(points[None], weights[None], k, keep_zero=keep_zero)
    without = optimal_centers(points[None, 1:4:2], weights[None, 1:4:2], k, keep_zero=keep_zero)
    least = least_error(points[[1, 3]].tolist(), [1, 2], k, keep_zero)
    for centers in (with_all, without):
        assert abs(error_of(points[[1, 3]].tolist(), [1, 2], centers[0].tolist()) - least) < Fraction(1, 2**40)


def test_a_common_offset_costs_no_precision():
    points = 1e8 + np.array([[0.0, 1, 10, 11, 20]])
    assert optimal_centers(points, np.ones((1, 5)), 3).tolist() == [[1e8 + 0.5, 1e8 + 10.5, 1e8 + 20]]


def test_an_outlier_costs_no_precision_among_the_others():
    few = np.array([-3e-6, -2e-6, 1e-6, 2e-6, 7e-6, 8e-6])
    expected = [-2.5e-6, 1.5e-6, 7.5e-6]
    for outlier in (-1e12, 1e12):
        points = np.sort(np.append(few, outlier))
        centers = optimal_centers(points[None], np.ones((1, 7)), 4)[0]
        assert centers == pytest.approx(np.sort([*expected, outlier]).tolist(), rel=1e-9)


def test_fewer_distinct_points_than_centers_repeat_the_last():
    points = np.array([[1.0, 1, 2, 2], [5, 5, 5, 5]])
    assert optimal_centers(points, np.ones((2, 4)), 3).tolist() == [[1, 2, 2], [5, 5, 5]]


def test_a_single_center_that_is_zero():
    assert optimal_centers(np.array([[1.0, 2]]), np.ones((1, 2)), 1, keep_zero=True).tolist() == [[0]]
