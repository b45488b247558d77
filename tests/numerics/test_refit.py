"""Tests of the refit: against lstsq row by row, exact and by conjugate gradients, with dead columns and inputs too few."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxshrink.numerics.refit import error_of_rows, refit


def example(seed: int, rows: int, columns: int, count: int, groups: int = 1, dead: int = 0):
    """Returns (weights [groups · rows, columns], inputs [groups, count, columns], their Gram matrices)."""
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((groups, count, columns)) @ (np.eye(columns) + 0.3 * rng.standard_normal((columns, columns)))
    inputs[:, :, rng.permutation(columns)[:dead]] = 0.0
    return rng.standard_normal((groups * rows, columns)), inputs, np.matmul(inputs.swapaxes(1, 2), inputs)


def outputs(matrix, inputs):
    return np.matmul(matrix.reshape(len(inputs), -1, matrix.shape[1]), inputs.swapaxes(1, 2)).reshape(len(matrix), -1)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 4),
    columns=st.integers(1, 12),
    count=st.integers(1, 40),
    groups=st.integers(1, 3),
    dead=st.integers(0, 3),
    alike=st.booleans(),
)
def test_as_good_as_lstsq_in_every_row(seed, rows, columns, count, groups, dead, alike):
    matrix, inputs, grams = example(seed, rows, columns, count, groups, dead)
    mask = np.random.default_rng(seed).random(matrix.shape) < 0.5
    mask = np.broadcast_to(mask[:1], mask.shape) if alike else mask
    found = refit(matrix, grams, mask)
    assert not found[~mask].any()
    wanted = outputs(matrix, inputs)
    for row, kept in enumerate(mask):
        positions = inputs[row // rows]
        best = np.linalg.lstsq(positions[:, kept], wanted[row], rcond=None)[0]
        least = np.sum(np.square(positions[:, kept] @ best - wanted[row]))
        error = np.sum(np.square(positions @ found[row] - wanted[row]))
        assert error == pytest.approx(least, rel=1e-5, abs=1e-6 * (1 + np.sum(np.square(wanted[row]))))


@settings(max_examples=30)
@given(st.integers(0, 1000), st.integers(1, 3), st.integers(0, 4))
def test_conjugate_gradients_come_close_and_never_get_worse(seed, groups, dead):
    matrix, _, grams = example(seed, 4, 16, 200, groups, dead)
    mask = np.random.default_rng(seed).random(matrix.shape) < 0.5
    exact, found = refit(matrix, grams, mask, exact=True), refit(matrix, grams, mask, exact=False)
    plain = error_of_rows(np.where(mask, 0.0, matrix), grams)
    error, least = error_of_rows(found - matrix, grams), error_of_rows(exact - matrix, grams)
    assert not found[~mask].any()
    assert (error <= plain).all()
    assert (error >= least - 1e-6 * plain).all()
    assert error.sum() <= least.sum() + 0.01 * plain.sum()


def test_weights_of_dead_columns_stay():
    matrix, _, grams = example(0, 4, 6, 30)
    grams[0, 2, :] = grams[0, :, 2] = 0.0
    mask = np.ones(matrix.shape, np.bool_)
    mask[:, 0] = mask[1, 2] = False
    for exact in (True, False):
        found = refit(matrix, grams, mask, exact=exact)
        assert np.array_equal(found[[0, 2, 3], 2], matrix[[0, 2, 3], 2])
        assert found[1, 2] == 0


def test_no_start_gets_worse():
    matrix, _, grams = example(0, 4, 6, 30)
    mask = np.random.default_rng(1).random(matrix.shape) < 0.5
    best = refit(matrix, grams, mask)
    again = refit(matrix, grams, mask, start=best)
    assert (error_of_rows(again - matrix, grams) <= error_of_rows(best - matrix, grams)).all()
    assert again == pytest.approx(best, abs=1e-6)
    # negative eigenvalues, far beyond rounding
    broken = grams - 5 * np.mean(np.diagonal(grams[0])) * np.ones((6, 6)) / 6
    moved = refit(matrix, broken, mask)
    assert (error_of_rows(moved - matrix, broken) <= error_of_rows(np.where(mask, 0.0, matrix), broken)).all()


def test_all_or_nothing():
    matrix, _, grams = example(0, 4, 6, 30)
    assert np.array_equal(refit(matrix, grams, np.ones(matrix.shape, np.bool_)), matrix)
    assert not refit(matrix, grams, np.zeros(matrix.shape, np.bool_)).any()


@given(st.integers(0, 100), st.integers(1, 3))
def test_errors_of_rows(seed, groups):
    matrix, inputs, grams = example(seed, 2, 5, 9, groups)
    assert error_of_rows(matrix, grams) == pytest.approx(np.square(outputs(matrix, inputs)).sum(axis=1))


def test_bad_arguments_are_refused():
    matrix, _, grams = example(0, 4, 6, 30)
    with pytest.raises(ValueError, match=r"refit: mask must be of shape \(4, 6\), got shape \(6, 4\)"):
        refit(matrix, grams, np.ones((6, 4), np.bool_))
    with pytest.raises(ValueError, match=r"refit: grams must be \[groups, 6, 6\] for equal groups of 4 rows, got \(3, 6, 6\)"):
        refit(matrix, np.repeat(grams, 3, axis=0), np.ones((4, 6), np.bool_))
    with pytest.raises(ValueError, match="refit: matrix must be 2-D and finite"):
        refit(np.full((4, 6), np.nan), grams, np.ones((4, 6), np.bool_))
