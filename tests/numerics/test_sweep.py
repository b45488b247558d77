"""Tests of the sweep: against a loop that solves anew after every column, patterns, shares and allowed values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxshrink.numerics import sweep as module
from onnxshrink.numerics.patterns import Pattern
from onnxshrink.numerics.refit import error_of_rows
from onnxshrink.numerics.sweep import prune_with_feedback

ANY = Pattern("unstructured")


def example(seed: int, rows: int, columns: int, count: int = 40, dead: int = 0):
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((count, columns)) @ (np.eye(columns) + 0.3 * rng.standard_normal((columns, columns)))
    inputs[:, rng.permutation(columns)[:dead]] = 0.0
    return rng.standard_normal((rows, columns)), inputs.T @ inputs


def brute_force(matrix, gram, mask, snap):
    """Fixes one column at a time, and solves anew for all those left."""
    energy = np.diagonal(gram)
    mean = energy.mean() or 1.0
    hessian = gram + np.diag(np.where(energy == 0, mean, 0.0)) + 0.01 * mean * np.eye(len(gram))
    left, fixed = list(np.argsort(-energy, kind="stable")), []
    wanted, result = matrix.copy(), np.zeros(matrix.shape)
    while left:
        column = left.pop(0)
        result[:, column] = np.where(mask[:, column], snap(wanted[:, column], column), 0.0)
        fixed.append(column)
        if left:
            errors = (result[:, fixed] - matrix[:, fixed]).T
            moves = np.linalg.solve(hessian[np.ix_(left, left)], -hessian[np.ix_(left, fixed)] @ errors)
            wanted[:, left] = matrix[:, left] + moves.T
    return result


@settings(max_examples=50)
@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 10), st.integers(0, 2), st.sampled_from([1, 3, 128]))
def test_a_given_mask_is_swept_as_solving_anew_does(seed, rows, columns, dead, block):
    matrix, gram = example(seed, rows, columns, dead=dead)
    mask = np.random.default_rng(seed).random(matrix.shape) < 0.6
    asked = []

    def snap(values, column):
        asked.append(column)
        return np.round(values, 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", block)
        found = prune_with_feedback(matrix, gram, ANY, mask=mask, snap=snap)
        free = prune_with_feedback(matrix, gram, ANY, mask=mask)
    assert sorted(asked) == list(range(columns))
    assert free == pytest.approx(brute_force(matrix, gram, mask, lambda values, _: values), abs=1e-6)
    assert found == pytest.approx(np.round(found, 1), abs=1e-12)
    assert not found[~mask].any()
    assert found == pytest.approx(brute_force(matrix, gram, mask, lambda values, _: np.round(values, 1)), abs=1e-6)


@settings(max_examples=40)
@given(st.integers(0, 1000), st.sampled_from(["unstructured", "4x1", "3x2", "1x4", "columns", "rows"]), st.floats(0, 1))
def test_units_go_as_wholes_and_the_share_is_met(seed, text, share):
    matrix, gram = example(seed, 7, 10)
    pattern = Pattern.parse(text)
    found = prune_with_feedback(matrix, gram, pattern, share)
    height, width = pattern.sides(matrix.shape)
    for row in range(0, 7, height):
        for column in range(0, 10, width):
            block = found[row : row + height, column : column + width]
            assert (block == 0).all() or (block != 0).all()
    budget = int(np.floor(share * 70 + 1e-9))
    assert budget - height * width < np.sum(found == 0) <= budget


@settings(max_examples=30)
@given(st.integers(0, 1000), st.sampled_from([(2, 4), (1, 3), (4, 8)]), st.integers(4, 18))
def test_n_of_m_holds_in_every_group(seed, n_m, columns):
    n, m = n_m
    matrix, gram = example(seed, 5, columns)
    found = prune_with_feedback(matrix, gram, Pattern("n:m", n, m))
    for start in range(0, columns, m):
        group = found[:, start : start + m]
        assert (np.count_nonzero(group, axis=1) == min(n, group.shape[1])).all()


@pytest.mark.parametrize("text", ["unstructured", "2:4", "4x1"])
def test_it_does_less_harm_than_the_same_zeros_alone(text):
    for seed in range(5):
        matrix, gram = example(seed, 16, 32, count=200)
        found = prune_with_feedback(matrix, gram, Pattern.parse(text), None if ":" in text else 0.5)
        plain = error_of_rows(matrix - np.where(found != 0, matrix, 0), gram[None]).sum()
        assert error_of_rows(matrix - found, gram[None]).sum() < plain


def test_frozen_weights_stay_zero_and_count():
    matrix, gram = example(0, 8, 12)
    frozen = np.random.default_rng(0).random(matrix.shape) < 0.2
    found = prune_with_feedback(matrix, gram, ANY, 0.5, frozen=frozen)
    assert not found[frozen].any()
    assert np.sum(found == 0) == 48


def test_bad_arguments_are_refused():
    matrix, gram = example(0, 8, 12)
    with pytest.raises(ValueError, match=r"prune_with_feedback: mask must be of shape \(8, 12\)"):
        prune_with_feedback(matrix, gram, ANY, mask=np.ones((2, 2), np.bool_))
    with pytest.raises(ValueError, match="gram must be positive semidefinite, got a matrix with large negative"):
        prune_with_feedback(matrix, gram - 1e9 * np.ones((12, 12)) + 1e9 * np.eye(12), ANY, 0.5)
    with pytest.raises(ValueError, match="choose: share_removed must be given"):
        prune_with_feedback(matrix, gram, ANY)
