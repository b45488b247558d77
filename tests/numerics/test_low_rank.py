"""Tests of factors: against LAPACK's SVD of the whitened matrix, on explicit inputs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxshrink.numerics import eigenvectors
from onnxshrink.numerics.low_rank import balanced, factor, spectrum

sides, seeds = st.integers(1, 9), st.integers(0, 10**6)


def example(seed: int, rows: int, columns: int, count: int, groups: int = 1):
    """Returns (matrix [groups, rows, columns], inputs [groups, count, columns]): correlated and of many sizes."""
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((groups, count, columns)) @ (np.eye(columns) + rng.standard_normal((columns, columns)))
    return rng.standard_normal((groups, rows, columns)), inputs * np.exp(rng.standard_normal(columns))


def gram_of(inputs):
    return inputs.swapaxes(1, 2) @ inputs


def whitened(matrix, inputs):
    return matrix @ inputs.swapaxes(1, 2)


@given(seed=seeds, rows=sides, columns=sides, groups=st.integers(1, 3), data=st.data())
def test_the_spectral_error_is_the_first_singular_value_cut(seed, rows, columns, groups, data):
    matrix, _ = example(seed, rows, columns, 1, groups)
    rank = data.draw(st.integers(1, min(rows, columns)))
    left, right = factor(matrix, rank)
    assert left.shape == (groups, rows, rank)
    assert right.shape == (groups, rank, columns)
    values = np.linalg.svd(matrix, compute_uv=False)
    np.testing.assert_allclose(spectrum(matrix), values, atol=1e-7 * values.max())
    after = np.linalg.norm(matrix - left @ right, ord=2, axis=(1, 2))
    np.testing.assert_allclose(after, [*values[:, rank]] if rank < values.shape[1] else 0.0, atol=1e-7 * values.max())


@given(seed=seeds, rows=sides, columns=sides, count=st.integers(1, 30), groups=st.integers(1, 3), data=st.data())
def test_the_error_of_the_outputs_is_the_tail_of_the_whitened_spectrum(seed, rows, columns, count, groups, data):
    matrix, inputs = example(seed, rows, columns, count, groups)
    rank = data.draw(st.integers(1, min(rows, columns)))
    left, right = factor(matrix, rank, gram_of(inputs))
    error = np.linalg.norm(whitened(matrix - left @ right, inputs), axis=(1, 2))
    outputs = whitened(matrix, inputs)
    values = np.linalg.svd(outputs, compute_uv=False)
    size = np.linalg.norm(outputs) + np.linalg.norm(matrix) * np.linalg.norm(inputs)
    np.testing.assert_allclose(error, np.sqrt(np.square(values[:, rank:]).sum(axis=1)), atol=1e-4 * size)
    found = spectrum(matrix, gram_of(inputs))
    np.testing.assert_allclose(found[:, : values.shape[1]], values[:, : found.shape[1]], atol=1e-4 * size)
    plain = np.linalg.norm(whitened(matrix - np.matmul(*factor(matrix, rank)), inputs), axis=(1, 2))
    assert (error <= plain + 1e-4 * size).all()


@given(seed=seeds, rows=sides, columns=sides, count=st.integers(1, 30))
def test_all_of_the_rank_gives_the_matrix_back_whatever_the_inputs_showed(seed, rows, columns, count):
    matrix, inputs = example(seed, rows, columns, count)
    for grams in (None, gram_of(inputs), np.zeros((1, columns, columns))):
        np.testing.assert_allclose(np.matmul(*factor(matrix, min(rows, columns), grams)), matrix, atol=1e-7)


@given(seed=seeds, rows=sides, columns=sides, data=st.data())
def test_factors_are_even_and_signs_are_settled(seed, rows, columns, data):
    matrix, inputs = example(seed, rows, columns, 20)
    rank = data.draw(st.integers(1, min(rows, columns)))
    (left,), (right,) = factor(matrix * 1e-4, rank, gram_of(inputs) * 1e6)
    np.testing.assert_allclose(np.linalg.norm(left, axis=0), np.linalg.norm(right, axis=1))
    assert (left[np.abs(left).argmax(axis=0), np.arange(rank)] > 0).all()
    for one, other in zip(factor(-matrix, rank), factor(-matrix, rank), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("shape", [(1, 3, 5), (1, 5, 3), (2, 4, 4)])
def test_zeros_have_factors_of_zeros(shape):
    left, right = factor(np.zeros(shape), 2, np.ones((shape[0], shape[2], shape[2])))
    assert not left.any()
    assert not right.any()
    assert not spectrum(np.zeros(shape)).any()


@pytest.mark.parametrize("shape", [(1, 4, 6), (1, 6, 4)])
def test_a_matrix_that_rounding_has_made_indefinite_does_no_harm(shape):
    matrix, inputs = example(3, shape[1], shape[2], 2)
    gram = gram_of(inputs) - 1e-7 * np.trace(gram_of(inputs)[0]) * np.eye(shape[2])
    error = whitened(matrix - np.matmul(*factor(matrix, 2, gram)), inputs)
    assert np.linalg.norm(error) < 1e-3 * np.linalg.norm(whitened(matrix, inputs))


def test_what_no_input_showed_is_kept_by_its_plain_size():
    """Two of the three columns are never met: the rank that the met one does not need goes to the larger of them."""
    left, right = factor(np.diag([1.0, 2.0, 3.0])[None], 2, np.diag([5.0, 0.0, 0.0])[None])
    np.testing.assert_allclose((left @ right)[0], np.diag([1.0, 0.0, 3.0]), atol=1e-9)


@given(seed=seeds, rows=sides, columns=sides, rank=sides)
def test_balancing_keeps_the_product(seed, rows, columns, rank):
    rng = np.random.default_rng(seed)
    left, right = rng.standard_normal((rows, rank)) * 1e-5, rng.standard_normal((rank, columns))
    left[:, rng.random(rank) < 0.2] = 0.0
    even = balanced(left, right)
    np.testing.assert_allclose(np.matmul(*even), left @ right, atol=1e-15)
    np.testing.assert_allclose(np.linalg.norm(even[0], axis=0), np.linalg.norm(even[1], axis=1))


@pytest.mark.parametrize(("rows", "columns"), [(60, 90), (90, 60)])
@pytest.mark.parametrize("decay", [0.0, 1.0, 3.0])
def test_iteration_misses_hardly_more_than_is_missed_at_least(monkeypatch, rows, columns, decay):
    monkeypatch.setattr(eigenvectors, "_LEAST_SIDE", 10)
    matrix, inputs = example(1, rows, columns, 300)
    inputs *= np.arange(1, columns + 1.0) ** -decay
    for rank in (2, 8, 20):
        left, right = factor(matrix, rank, gram_of(inputs))
        error = np.square(whitened(matrix - left @ right, inputs)).sum()
        least = np.square(np.linalg.svd(whitened(matrix, inputs), compute_uv=False)[0, rank:]).sum()
        floor = 1e-7 * np.square(whitened(matrix, inputs)).sum()  # below which it is not asked for
        assert least * (1 - 1e-6) <= error <= 1.02 * least + floor
        again = factor(matrix, rank, gram_of(inputs))
        np.testing.assert_array_equal(left @ right, again[0] @ again[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.ones((2, 3)), 1), r"^factor: matrix must be \[groups, rows, columns\], got shape \(2, 3\)$"),
        ((np.ones((1, 2, 3)), 3), r"^factor: rank must be from 1 to 2, got 3$"),
        ((np.ones((1, 2, 3)), 0), r"^factor: rank must be from 1 to 2, got 0$"),
        ((np.ones((1, 2, 3)), 1, np.ones((3, 3))), r"^factor: grams must be of shape \(1, 3, 3\), got shape \(3, 3\)$"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        factor(*arguments)
