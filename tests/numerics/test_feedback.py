"""Tests of error feedback: against brute force that solves every step anew; zeros, dead columns, rank, blocks, least squares."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from onnxshrink.numerics import feedback as feedback_module
from onnxshrink.numerics.feedback import feedback, retarget, round_with_feedback


def inputs(columns: int, count: int, seed: int, dead: int = 0):
    """Returns correlated positions [count, columns], the first ones always zero."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((count, columns)) @ (rng.standard_normal((columns, columns)) + np.eye(columns))
    values *= np.exp(rng.standard_normal(columns))
    values[:, rng.permutation(columns)[:dead]] = 0.0
    return values


def weights(rows: int, columns: int, seed: int):
    return np.random.default_rng(seed + 1).standard_normal((rows, columns))


def to_grid(step: float):
    return lambda values, _=0: np.rint(values / step) * step


def to_integers(values, _=0):
    return np.rint(values)


def as_wanted(values, _=0):
    return values


def output_error(change, gram) -> float:
    """Returns the squared error of the outputs when the weights change by so much."""
    return np.trace(change @ gram @ change.T)


def damped(gram, damping: float = 0.01):
    """Returns the matrix that is meant: columns that never carried anything stand alone, and the diagonal is raised."""
    diagonal = np.diagonal(gram)
    mean = diagonal.mean() if diagonal.any() else 1.0
    return gram + np.diag(np.where(diagonal == 0, mean, 0.0)) + damping * mean * np.eye(len(gram))


def brute_force(matrix, gram, snap, frozen=None):
    """Fixes one column at a time, and then solves for all those left what makes up best for all errors so far."""
    hessian = damped(gram)
    fixed: list[int] = []
    left = list(np.argsort(-np.diagonal(gram), kind="stable"))
    wanted, rounded = matrix.copy(), np.zeros_like(matrix)
    while left:
        column = left.pop(0)
        values = snap(wanted[:, column], column)
        rounded[:, column] = values if frozen is None else np.where(frozen[:, column], 0.0, values)
        fixed.append(column)
        errors = rounded[:, fixed] - matrix[:, fixed]
        if left:  # least squares: the derivative of trace(D H D^T) with respect to the columns left is zero
            moves = np.linalg.solve(hessian[np.ix_(left, left)], -hessian[np.ix_(left, fixed)] @ errors.T)
            wanted[:, left] = matrix[:, left] + moves.T
    return rounded


@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 12),
    count=st.integers(1, 40),
    dead=st.integers(0, 3),
    seed=st.integers(0, 10**6),
    step=st.sampled_from([0.01, 0.3, 2.0]),
    frozen=st.booleans(),
)
def test_every_step_is_the_least_squares_solution(rows, columns, count, dead, seed, step, frozen):
    positions, matrix = inputs(columns, count, seed, dead), weights(rows, columns, seed)
    zeros = np.random.default_rng(seed).random(matrix.shape) < 0.3 if frozen else None
    gram = positions.T @ positions
    rounded = round_with_feedback(matrix, feedback(gram), to_grid(step), zeros)
    np.testing.assert_allclose(rounded, brute_force(matrix, gram, to_grid(step), zeros), atol=1e-7 * step)


@given(columns=st.integers(1, 10), seed=st.integers(0, 10**6))
def test_the_root_is_one_of_the_inverse(columns, seed):
    positions = inputs(columns, 30, seed)
    gram = positions.T @ positions
    through = feedback(gram)
    np.testing.assert_array_equal(through.root, np.triu(through.root))
    np.testing.assert_array_equal(through.order, np.argsort(-np.diagonal(gram), kind="stable"))
    inverse = np.linalg.inv(damped(gram))[np.ix_(through.order, through.order)]
    np.testing.assert_allclose(through.root.T @ through.root, inverse, atol=1e-8 * np.abs(inverse).max())


@pytest.mark.parametrize("rank", [5, 20, 60])
def test_errors_are_far_below_those_of_plain_rounding(rank):
    gains = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        positions = rng.standard_normal((300, rank)) @ rng.standard_normal((rank, 40)) + 0.1 * rng.standard_normal(
            (300, 40)
        )
        gram, matrix, snap = positions.T @ positions, weights(8, 40, seed), to_grid(0.5)
        plain = output_error(snap(matrix) - matrix, gram)
        gains.append(output_error(round_with_feedback(matrix, feedback(gram), snap) - matrix, gram) / plain)
    assert max(gains) < 1.0
    assert np.mean(gains) < {5: 0.1, 20: 0.25, 60: 0.6}[rank]


@given(columns=st.integers(1, 20), seed=st.integers(0, 10**6), step=st.floats(0.05, 3))
def test_uncorrelated_inputs_round_plainly(columns, seed, step):
    matrix = weights(3, columns, seed)
    gram = np.diag(np.random.default_rng(seed).random(columns))
    np.testing.assert_array_equal(round_with_feedback(matrix, feedback(gram), to_grid(step)), to_grid(step)(matrix))


@given(columns=st.integers(1, 20), seed=st.integers(0, 10**6))
def test_what_is_allowed_already_stays(columns, seed):
    positions, matrix = inputs(columns, 30, seed), np.rint(weights(3, columns, seed) * 4)
    rounded = round_with_feedback(matrix, feedback(positions.T @ positions), to_integers)
    np.testing.assert_array_equal(rounded, matrix)


@given(columns=st.integers(2, 30), seed=st.integers(0, 10**6))
def test_frozen_zeros_stay_zero(columns, seed):
    positions, matrix = inputs(columns, 60, seed), weights(4, columns, seed)
    frozen = np.random.default_rng(seed).random(matrix.shape) < 0.5
    rounded = round_with_feedback(matrix, feedback(positions.T @ positions), as_wanted, frozen)
    assert np.all(rounded[frozen] == 0)
    assert np.all(rounded[~frozen] != 0)


def test_what_is_left_makes_up_for_frozen_zeros():
    gains = []
    for seed in range(20):
        positions, matrix = inputs(30, 200, seed), weights(4, 30, seed)
        frozen = np.random.default_rng(seed).random(matrix.shape) < 0.5
        gram = positions.T @ positions
        rounded = round_with_feedback(matrix, feedback(gram), as_wanted, frozen)
        plain = output_error(np.where(frozen, 0, matrix) - matrix, gram)
        gains.append(output_error(rounded - matrix, gram) / plain)
    assert np.mean(gains) < 0.75


def test_frozen_values_are_zero_even_where_the_levels_have_none():
    frozen = np.array([[True, False, True]])
    rounded = round_with_feedback(
        np.ones((1, 3)), feedback(np.eye(3)), lambda values, _: np.full_like(values, 7.0), frozen
    )
    np.testing.assert_array_equal(rounded, [[0, 7, 0]])


@pytest.mark.parametrize("columns", [63, 64, 65, 128, 200])
def test_blocks_do_not_show(columns, monkeypatch):
    positions, matrix = inputs(columns, 2 * columns, 0), weights(5, columns, 0)
    through = feedback(positions.T @ positions)
    found = [round_with_feedback(matrix, through, to_grid(0.4))]
    for block in (1, 7, columns):
        monkeypatch.setattr(feedback_module, "_BLOCK", block)
        found.append(round_with_feedback(matrix, through, to_grid(0.4)))
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-9)


def test_dead_columns_carry_no_error_and_take_none():
    positions, matrix = inputs(9, 50, 3), weights(4, 9, 3)
    positions[:, [2, 5]] = 0.0
    through = feedback(positions.T @ positions)
    rounded = round_with_feedback(matrix, through, to_grid(0.6))
    np.testing.assert_array_equal(rounded[:, [2, 5]], to_grid(0.6)(matrix[:, [2, 5]]))
    assert set(through.order[-2:]) == {2, 5}
    other = matrix.copy()
    other[:, [2, 5]] = 100.0
    alive = [0, 1, 3, 4, 6, 7, 8]
    np.testing.assert_array_equal(round_with_feedback(other, through, to_grid(0.6))[:, alive], rounded[:, alive])


def test_inputs_that_were_always_zero_round_plainly():
    matrix = weights(3, 6, 0)
    rounded = round_with_feedback(matrix, feedback(np.zeros((6, 6))), to_grid(0.5))
    np.testing.assert_array_equal(rounded, to_grid(0.5)(matrix))


@pytest.mark.parametrize("damping", [0.0, 1e-12, 0.01])
def test_fewer_inputs_than_columns_are_enough(damping):
    positions, matrix = inputs(30, 4, 0), weights(6, 30, 0)
    gram, snap = positions.T @ positions, to_grid(0.5)
    rounded = round_with_feedback(matrix, feedback(gram, damping), snap)
    assert np.isfinite(rounded).all()
    assert output_error(rounded - matrix, gram) < 0.1 * output_error(snap(matrix) - matrix, gram)


@given(scale=st.sampled_from([1e-150, 1e-12, 1e12, 1e150]), seed=st.integers(0, 1000))
def test_the_unit_of_inputs_does_not_matter(scale, seed):
    positions, matrix = inputs(8, 20, seed), weights(3, 8, seed)
    gram = positions.T @ positions
    expected = round_with_feedback(matrix, feedback(gram), to_grid(0.5))
    np.testing.assert_allclose(round_with_feedback(matrix, feedback(gram * scale), to_grid(0.5)), expected, atol=1e-9)


def test_rounding_noise_below_zero_is_damped_away():
    gram = np.ones((50, 50)) + np.diag(np.full(50, -1e-7))
    rounded = round_with_feedback(weights(2, 50, 0), feedback(gram), to_grid(0.5))
    assert np.isfinite(rounded).all()
    below = np.diag([1.0, -1e-9, 2.0])
    np.testing.assert_array_equal(round_with_feedback(np.full((1, 3), 0.4), feedback(below), to_integers), np.zeros((1, 3)))
    assert np.isfinite(feedback(np.diag([-1e-9, 0.0])).root).all()


def test_a_single_column_and_no_rows():
    through = feedback(np.array([[4.0]]))
    np.testing.assert_array_equal(round_with_feedback(np.array([[0.6], [-1.2]]), through, to_integers), [[1], [-1]])
    assert round_with_feedback(np.zeros((0, 1)), through, to_integers).shape == (0, 1)
    assert round_with_feedback(np.zeros((2, 0)), feedback(np.zeros((0, 0))), to_integers).shape == (2, 0)


def test_arguments_are_only_read_and_may_have_any_layout():
    positions, matrix = inputs(70, 90, 0), weights(5, 70, 0).astype(np.float32)
    gram = positions.T @ positions
    gram.flags.writeable = matrix.flags.writeable = False
    rounded = round_with_feedback(matrix, feedback(gram), to_grid(0.3))
    other = round_with_feedback(np.asfortranarray(matrix), feedback(np.asfortranarray(gram)), to_grid(0.3))
    np.testing.assert_array_equal(rounded, other)
    assert rounded.dtype == np.float64


@pytest.mark.parametrize(
    ("gram", "got"),
    [
        (np.zeros((2, 3)), r"a finite square matrix, got shape \(2, 3\)"),
        (np.zeros(3), r"a finite square matrix, got shape \(3,\)"),
        (np.full((2, 2), np.nan), "a finite square matrix"),
        (np.array([[1.0, 1e9], [1e9, 1.0]]), "positive semidefinite, got a matrix with large negative eigenvalues"),
    ],
)
def test_what_is_no_gram_matrix_is_refused(gram, got):
    with pytest.raises(ValueError, match=f"^feedback: gram must be {got}"):
        feedback(gram)


def test_shapes_that_do_not_fit_are_refused():
    through = feedback(np.eye(3))
    with pytest.raises(
        ValueError, match=r"^round_with_feedback: matrix must be 2-D with 3 columns, got shape \(2, 4\)$"
    ):
        round_with_feedback(np.zeros((2, 4)), through, to_integers)
    with pytest.raises(ValueError, match=r"^round_with_feedback: frozen must be of shape \(2, 3\), got shape \(3,\)$"):
        round_with_feedback(np.zeros((2, 3)), through, to_integers, np.zeros(3, bool))


class TestRetarget:
    @given(columns=st.integers(1, 8), rows=st.integers(1, 4), seed=st.integers(0, 10**6))
    def test_with_hardly_a_ridge_it_is_least_squares(self, columns, rows, seed):
        before, matrix = inputs(columns, 50, seed), weights(rows, columns, seed)
        now = before * 0.8 + 0.3 * np.random.default_rng(seed).standard_normal(before.shape)
        assume(np.linalg.cond(now) < 1e4)  # what is left in directions that inputs hardly show is up to the ridge
        wanted = before @ matrix.T
        solution = np.linalg.lstsq(now, wanted)[0].T
        found = retarget(matrix, now.T @ now, matrix @ (before - now).T @ now, 1e-12)
        error, least = (np.square(now @ one.T - wanted).sum() for one in (found, solution))
        assert error <= least + 1e-6 * np.square(wanted).sum()

    @given(columns=st.integers(1, 8), ridge=st.floats(1e-3, 10), seed=st.integers(0, 10**6))
    def test_it_is_ridge_regression_on_the_difference(self, columns, ridge, seed):
        now, matrix = inputs(columns, 20, seed), weights(3, columns, seed)
        pull = np.sqrt(ridge * np.trace(now.T @ now) / columns) * np.eye(columns)
        missing = np.random.default_rng([seed, 1]).standard_normal((20, 3))  # whatever the reason
        change = np.linalg.lstsq(np.vstack([now, pull]), np.vstack([missing, np.zeros((columns, 3))]))[0].T
        found = retarget(matrix, now.T @ now, missing.T @ now, ridge)
        np.testing.assert_allclose(found, matrix + change, atol=1e-7 * (1 + np.abs(change).max()))

    def test_outputs_that_lack_nothing_change_nothing(self):
        now, matrix = inputs(6, 40, 0), weights(3, 6, 0)
        np.testing.assert_array_equal(retarget(matrix, now.T @ now, np.zeros((3, 6)), 0.1), matrix)

    def test_inputs_that_are_gone_leave_the_weights(self):
        matrix = weights(3, 6, 0).astype(np.float32)
        found = retarget(matrix, np.zeros((6, 6)), np.zeros((3, 6)), 0.1)
        assert found.dtype == np.float64
        np.testing.assert_array_equal(found, matrix)

    def test_columns_that_are_gone_keep_their_weights(self):
        before, matrix = inputs(6, 40, 0), weights(3, 6, 0)
        now = before.copy()
        now[:, 2] = 0.0
        found = retarget(matrix, now.T @ now, matrix @ (before - now).T @ now, 1e-6)
        np.testing.assert_allclose(found[:, 2], matrix[:, 2])
        assert output_error(found - matrix, now.T @ now) > 0
