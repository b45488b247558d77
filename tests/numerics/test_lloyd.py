"""Tests of Lloyd's iteration, thresholds and starting points."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxshrink.numerics.lloyd import (
    companded_centers,
    companded_ranks,
    lloyd,
    squared_errors,
    thresholds,
    uniform_centers,
)

numbers = st.integers(-50, 50).map(lambda i: i / 4)
matrices = hnp.arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 12)), elements=numbers)
finite = st.floats(-1e300, 1e300)


def direct_errors(points, weights, centers):
    squares = np.square(points[:, :, None] - centers[:, None, :]).min(axis=2)
    return (weights * squares).sum(axis=1)


class TestThresholds:
    @given(st.lists(finite, min_size=1, max_size=6, unique=True))
    def test_they_are_the_midpoints_rounded_and_entries_keep_their_index(self, codebook):
        codebook = sorted(codebook)
        limits = thresholds(np.array(codebook)).tolist()
        for limit, (low, high) in zip(limits, itertools.pairwise(codebook), strict=True):
            middle = (Fraction(low) + Fraction(high)) / 2
            assert low <= limit < high
            assert abs(Fraction(limit) - middle) <= Fraction(float(np.spacing(max(abs(low), abs(high)))))
        assert [sum(limit < entry for limit in limits) for entry in codebook] == list(range(len(codebook)))

    def test_ties_go_to_the_lower_and_repeated_entries_to_the_first(self):
        limits = thresholds(np.array([1.0, 1, 2, 2, 2, 4, 4]))
        indices = [int(np.sum(limits < value)) for value in (0, 1, 1.5, 1.6, 2, 3, 3.1, 9)]
        assert indices == [0, 0, 0, 2, 2, 2, 5, 5]

    def test_neighbouring_floats_stay_apart(self):
        low = 1.0
        for _ in range(4):
            high = float(np.nextafter(low, 2))
            (limit,) = thresholds(np.array([low, high]))
            assert low <= limit < high
            low = high

    def test_far_entries_do_not_overflow(self):
        assert thresholds(np.array([-1.7e308, 1.7e308])).tolist() == [0]


class TestLloyd:
    @given(matrices, st.integers(1, 5), st.booleans(), st.randoms(use_true_random=False))
    def test_ends_at_the_means_of_its_clusters_no_worse_than_it_began(self, points, k, keep_zero, random):
        points = np.sort(points, axis=1)
        weights = np.array([[random.randint(1, 5) for _ in row] for row in points], np.float64)
        start = np.array([sorted(random.choice([-20, -1, 0, 3, 8.5]) for _ in range(k)) for _ in points], np.float64)
        if keep_zero:
            start[:, 0] = 0
            start.sort(axis=1)
        centers = lloyd(points, weights, start, keep_zero=keep_zero)
        before, after = direct_errors(points, weights, start), direct_errors(points, weights, centers)
        assert np.all(after <= before * (1 + 1e-12))
        assert squared_errors(points, weights, centers) == pytest.approx(after, rel=1e-12)
        for x, w, row in zip(points, weights, centers, strict=True):
            owners = np.array([int(np.sum(thresholds(row) < value)) for value in x])
            assert not keep_zero or 0.0 in row
            for index in np.unique(owners):
                mean = np.average(x[owners == index], weights=w[owners == index])
                assert row[index] == pytest.approx(mean, rel=1e-14, abs=1e-14) or (keep_zero and row[index] == 0)
            if not keep_zero:
                assert np.unique(owners).size == min(k, np.unique(x).size)

    def test_as_many_centers_as_distinct_points_give_them_exactly(self):
        values = np.array([-0.7, 0.1, 0.2, 0.3, 1e-30, 5e20], np.float32)
        points = np.sort(np.random.default_rng(0).choice(values, (20, 500)), axis=1)
        centers = lloyd(points, np.ones(points.shape), np.zeros((20, 6)))
        assert np.array_equal(centers, np.tile(np.sort(values), (20, 1)))

    def test_a_zero_that_is_kept_owns_its_points_and_others_move(self):
        points = np.array([[-1.0, -0.1, 0.1, 0.2, 4.0, 6.0]])
        centers = lloyd(points, np.ones(points.shape), np.array([[-1.5, 0.0, 2.0]]), keep_zero=True)
        assert centers.tolist() == [[-1, 0, 5]]

    def test_a_second_zero_is_not_kept(self):
        points = np.array([[-4.0, -4, 0, 4, 4]])
        centers = lloyd(points, np.ones(points.shape), np.array([[0.0, 0, 4]]), keep_zero=True)
        assert centers.tolist() == [[-4, 0, 4]]

    def test_inputs_are_left_alone(self):
        points, start = np.array([[1.0, 2, 3]]), np.array([[0.0, 1]])
        for array in (points, start):
            array.flags.writeable = False
        assert lloyd(points, np.ones((1, 3)), start).shape == (1, 2)


class TestStarts:
    def test_ranks_follow_the_cube_root_of_density(self):
        # density 8 on [0, 1), 1 on [1, 2): the best quantizer has twice as many levels on the first
        points = np.concatenate([np.arange(0, 1, 1 / 8000), np.arange(1, 2, 1 / 1000)])[None]
        ranks = companded_ranks(points, np.ones(points.shape))[0]
        assert ranks[8000] == pytest.approx(2 / 3, abs=1e-3)
        assert ranks[-1] == 1
        weighed = np.arange(0, 2, 1 / 500)[None]
        weights = np.where(weighed < 1, 8.0, 1.0)
        assert companded_ranks(weighed, weights)[0, 500] == pytest.approx(2 / 3, abs=2e-3)

    def test_no_gap_takes_more_than_its_share(self):
        points = np.array([[0, 1e-3, 2e-3, 3e-3, 100, 100.001, 100.002, 100.003]])
        steps = np.diff(companded_ranks(points, np.ones(points.shape), 1 / 32)[0])
        assert steps.max() < 1 / 6
        assert np.diff(companded_ranks(points, np.ones(points.shape))[0]).max() > 0.4

    @given(matrices, st.integers(1, 6))
    def test_companded_centers_are_points_in_order(self, points, k):
        points = np.sort(points, axis=1)
        centers = companded_centers(points, np.ones(points.shape), k)
        assert centers.shape == (len(points), k)
        assert np.all(np.diff(centers, axis=1) >= 0)
        assert all(np.isin(row, x).all() for row, x in zip(centers, points, strict=True))

    def test_uniform_centers(self):
        low, high = np.array([[-1.0], [2]]), np.array([[2.0], [2]])
        assert uniform_centers(low, high, 4).tolist() == [[-1, 0, 1, 2], [2, 2, 2, 2]]
        assert uniform_centers(low, high, 1).tolist() == [[-1], [2]]
        kept = uniform_centers(np.array([[-1.0]]), np.array([[3.2]]), 4, keep_zero=True)
        assert kept[0, 1] == 0
        assert kept[0, [0, 2, 3]].tolist() == pytest.approx([-1, 1.8, 3.2])
