"""Covariances of functions of normal variables: against closed forms, against drawn samples, and against the sums written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxshrink.numerics.gaussian_moments import (
    DENSITY,
    QUANTILES,
    block_diagonal,
    covariance,
    nearness,
    parted,
    sum_covariance,
    sum_variance,
)

Array = np.ndarray[Any, np.dtype[Any]]
seeds = st.integers(0, 2**32 - 1)


def correlations(rng: np.random.Generator, channels: int) -> Array:
    root = rng.standard_normal((channels, channels + 2))
    found = root @ root.T
    spread = np.sqrt(found.diagonal())
    return found / np.outer(spread, spread)


@given(st.floats(-0.999, 0.999))
def test_covariance_of_two_relus(correlation):
    related = np.array([[1.0, correlation], [correlation, 1.0]])
    angle = np.arccos(correlation)  # Cho & Saul, Kernel methods for deep learning (2009), section 2, degree 1
    product = (np.sin(angle) + (np.pi - angle) * correlation) / (2 * np.pi)
    found = covariance(np.maximum(np.stack([QUANTILES, QUANTILES]), 0.0), related)
    variance = 0.5 - 1 / (2 * np.pi)
    assert found[0, 1] == pytest.approx(product - 1 / (2 * np.pi), abs=0.004 * variance)
    assert found[0, 0] == pytest.approx(variance, rel=1e-3)


@given(seeds, st.integers(1, 5))
def test_linear_functions_keep_their_covariance(seed, channels):
    rng = np.random.default_rng(seed)
    related, slope, shift = correlations(rng, channels), rng.standard_normal(channels), rng.standard_normal(channels)
    found = covariance(shift[:, None] + slope[:, None] * QUANTILES, related)
    np.testing.assert_allclose(found, np.outer(slope, slope) * related, atol=1e-5)
    np.testing.assert_allclose(covariance(slope[:, None] * QUANTILES, None), np.diag(slope**2), atol=1e-5)


@pytest.mark.parametrize("function", [np.tanh, lambda x: np.clip(x, 0, 1), lambda x: x / (1 + np.exp(-x)), np.square, np.abs])
def test_functions_as_drawn(function):
    rng = np.random.default_rng(0)
    related, slope, shift = correlations(rng, 4), rng.standard_normal(4), rng.standard_normal(4)
    drawn = rng.standard_normal((400_000, 4)) @ np.linalg.cholesky(related).T
    sample = np.cov(function(shift + slope * drawn), rowvar=False)
    found = covariance(function(shift[:, None] + slope[:, None] * QUANTILES), related)
    np.testing.assert_allclose(found, sample, atol=0.015 * sample.diagonal().max())


@given(seeds, st.integers(1, 6))
def test_covariances_have_no_negative_direction(seed, channels):
    rng = np.random.default_rng(seed)
    values = np.maximum(rng.standard_normal((channels, 1)) + rng.standard_normal((channels, 1)) * QUANTILES, 0.0)
    values[0] = 3.0  # one that does not vary
    found = covariance(values, correlations(rng, channels))
    assert np.linalg.eigvalsh(found).min() >= -1e-9
    np.testing.assert_allclose(found.diagonal(), np.square(values) @ DENSITY - np.square(values @ DENSITY), atol=1e-9)


@given(seeds, st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.lists(st.integers(1, 3), max_size=2))
def test_sums_are_those_of_all_columns(seed, groups, outputs, inputs, kernel):
    rng = np.random.default_rng(seed)
    near = nearness(kernel, [1] * len(kernel))
    rows = rng.standard_normal((groups * outputs, inputs * len(near)))
    related = correlations(rng, groups * inputs)
    columns = np.kron(related, near)  # channels outermost
    dense = block_diagonal(np.split(rows, groups))
    expected = dense @ columns @ dense.T
    np.testing.assert_allclose(sum_covariance(rows, related, groups, near), expected, atol=1e-8)
    variances = np.exp(rng.standard_normal(groups * inputs))
    alone = dense @ np.kron(np.diag(variances), near) @ dense.T
    np.testing.assert_allclose(sum_variance(rows, variances, groups, near), alone.diagonal(), atol=1e-8)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="sum_covariance: rows must be"):
        sum_covariance(np.ones((2, 5)), np.eye(2), 1, nearness((3,), (1,)))


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), max_size=2))
def test_nearness_falls_with_distance(axes):
    sizes, dilations = [size for size, _ in axes], [dilation for _, dilation in axes]
    near = nearness(sizes, dilations)
    assert near.shape == (int(np.prod(sizes)),) * 2
    assert np.all(near.diagonal() == 1)
    assert np.linalg.eigvalsh(near).min() > 0
    if sizes and sizes[-1] > 1:
        assert near[0, 1] == pytest.approx(0.5 ** dilations[-1])


def test_taps_of_a_transposed_convolution_meet_an_element_in_turn():
    near = nearness((4,), (1,), (2,))
    often, beside = 0.5, 0.5 * 0.5  # taps 0 and 2 meet neighbors, in every other position
    expected = [[often, 0, beside, 0], [0, often, 0, beside], [beside, 0, often, 0], [0, beside, 0, often]]
    np.testing.assert_allclose(near, expected)


@given(seeds, st.integers(1, 5))
def test_spreads_and_correlations_make_up_covariances(seed, channels):
    rng = np.random.default_rng(seed)
    spread = rng.random(channels) * (rng.random(channels) > 0.3)
    whole = correlations(rng, channels) * np.outer(spread, spread)
    found, related = parted(whole)
    np.testing.assert_allclose(found, spread, atol=1e-12)
    np.testing.assert_allclose(related * np.outer(found, found), whole, atol=1e-6)
    assert (related.diagonal() == 1).all()
    assert (related[spread == 0] == np.eye(channels)[spread == 0]).all()


@given(seeds, st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=4))
def test_blocks_lie_along_the_diagonal(seed, shapes):
    rng = np.random.default_rng(seed)
    blocks = [rng.standard_normal(shape) for shape in shapes]
    found = block_diagonal(blocks)
    row = column = 0
    for block in blocks:
        rows, columns = block.shape
        assert np.array_equal(found[row : row + rows, column : column + columns], block)
        row, column = row + rows, column + columns
    assert found.shape == (row, column)
    assert np.count_nonzero(found) == sum(np.count_nonzero(block) for block in blocks)
