"""Tests of levels: every kind against the nearest of all its values, codes that come back, rows, and how levels are chosen."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxshrink.numerics.feedback import feedback, round_with_feedback
from onnxshrink.numerics.grids import Grid, fit_grid
from onnxshrink.numerics.levels import (
    MOST_STEPS,
    BookLevels,
    GridLevels,
    RowBookLevels,
    by_channel,
    cluster_levels,
    round_rows,
    row_scales,
    step_levels,
)

ROWS = 5
KINDS = ["grid", "book", "scaled book", "row books"]


def some_levels(kind: str, size: int, seed: int):
    """Returns levels of ROWS rows with up to `size` values, and all values of each row."""
    rng = np.random.default_rng(seed)
    if kind == "grid":
        bits = max(1, size.bit_length() - 1)
        grid = Grid(
            np.exp(rng.standard_normal(ROWS)).astype(np.float32), rng.integers(0, 2**bits, ROWS) * np.float32(1), bits
        )
        steps = np.arange(2**bits) - grid.zero_point[:, None].astype(np.float64)
        return GridLevels(grid), steps * grid.scale[:, None]
    if kind == "row books":
        books = np.sort(rng.standard_normal((ROWS, size)).astype(np.float32), axis=1)
        books[0, size // 2 :] = books[0, size // 2]  # as k-means pads rows of few values
        return RowBookLevels(books), books.astype(np.float64)
    book = np.sort(rng.standard_normal(size)).astype(np.float16)
    scale = np.exp(rng.standard_normal(ROWS)).astype(np.float32) if kind == "scaled book" else None
    every = np.broadcast_to(book.astype(np.float64), (ROWS, size))
    return BookLevels(book, scale), every if scale is None else every * scale[:, None]


def some_values(every, seed: int, dtype=np.float64):
    """Returns [ROWS, 40]: values amid those allowed and far beyond, allowed ones, and zero."""
    rng = np.random.default_rng(seed)
    spread = np.abs(every).max(axis=1, keepdims=True)
    near = rng.standard_normal((ROWS, 37)) * spread
    return np.hstack([near, every[:, :1], every[:, -1:] * 4, np.zeros((ROWS, 1))]).astype(dtype)


def nearest_of_all(every, values):
    """Returns the distance of each value to the nearest of its row's."""
    return np.abs(values[:, :, None] - every[:, None, :]).min(axis=2)


@pytest.mark.parametrize("kind", KINDS)
@given(size=st.integers(1, 256), seed=st.integers(0, 10**6))
def test_snapping_gives_the_nearest_value_of_the_row(kind, size, seed):
    levels, every = some_levels(kind, size, seed)
    values = some_values(every, seed)
    snapped = np.stack([levels.snap(column) for column in values.T], axis=1)
    assert snapped.dtype == np.float64
    rounding = 1e-6 * np.abs(every).max()  # values are float32 in the end
    np.testing.assert_allclose(np.abs(snapped - values), nearest_of_all(every, values), atol=rounding)
    assert nearest_of_all(every, snapped).max() <= rounding


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@given(size=st.integers(1, 256), seed=st.integers(0, 10**6))
def test_snapping_is_coding_and_decoding(kind, dtype, size, seed):
    levels, every = some_levels(kind, size, seed)
    values = some_values(every, seed, dtype)
    codes = levels.codes(values)
    assert codes.dtype == np.uint8
    decoded = levels.values(codes).astype(np.float64)
    snapped = np.stack([levels.snap(column.astype(np.float64)) for column in values.T], axis=1)
    differ = snapped != decoded  # only where a value lies halfway, up to rounding in float32
    distances = np.abs(np.stack([snapped, decoded]) - values.astype(np.float64))[:, differ]
    np.testing.assert_allclose(distances[0], distances[1], rtol=1e-5, atol=1e-6 * np.abs(every).max())


@pytest.mark.parametrize("kind", KINDS)
@given(size=st.integers(1, 256), seed=st.integers(0, 10**6))
def test_what_was_snapped_comes_back_from_its_codes(kind, size, seed):
    levels, every = some_levels(kind, size, seed)
    snapped = np.stack([levels.snap(column) for column in some_values(every, seed).T], axis=1)
    codes = levels.codes(snapped)
    np.testing.assert_array_equal(levels.values(codes).astype(np.float64), snapped)
    np.testing.assert_array_equal(levels.codes(levels.values(codes)), codes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("index", [np.array([3, 0, 3]), np.array([], np.intp), slice(1, 4)])
def test_levels_of_some_rows_are_theirs(kind, index):
    levels, every = some_levels(kind, 16, 7)
    values = some_values(every, 7)
    chosen = levels.rows(index)
    assert type(chosen) is type(levels)
    for column in values.T:
        np.testing.assert_array_equal(chosen.snap(column[index]), levels.snap(column)[index])
    np.testing.assert_array_equal(chosen.codes(values[index]), levels.codes(values)[index])
    assert levels.count == (1 if kind == "book" else ROWS)
    assert chosen.count == (1 if kind == "book" else len(values[index]))


def test_halves_go_where_nearest_sends_them():
    book = np.array([-1.0, 0.0, 2.0], np.float32)
    column = np.array([-0.5, 1.0, 1.0000001])
    for levels in (BookLevels(book), RowBookLevels(np.stack([book] * 3))):
        np.testing.assert_array_equal(levels.snap(column), [-1, 0, 2])
        np.testing.assert_array_equal(levels.values(levels.codes(column[:, None]))[:, 0], [-1, 0, 2])


@given(seed=st.integers(0, 10**6), reach=st.sampled_from([1.0, 1e-3, 300.0]), columns=st.integers(1, 30))
def test_steps_are_kept_unless_a_byte_is_too_small(seed, reach, columns):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((ROWS, columns)) * reach
    step = np.exp(rng.standard_normal(ROWS)).astype(np.float32)
    levels = step_levels(rows, step)
    scale = levels.grid.scale
    coarser = scale.astype(np.float64) / step
    np.testing.assert_allclose(coarser, coarser[0], rtol=1e-6)
    largest = (np.abs(rows) / step[:, None]).max()
    assert coarser[0] == pytest.approx(max(1.0, largest / MOST_STEPS), rel=1e-6)
    decoded = levels.values(levels.codes(rows))
    assert np.all(np.abs(decoded - rows) <= scale[:, None] * (0.5 + 1e-4))
    assert set(levels.codes(np.zeros((ROWS, 2))).ravel()) == {MOST_STEPS + 1}
    beyond = np.full(ROWS, (MOST_STEPS + 1) * scale)  # feedback may ask for a step more, either way
    np.testing.assert_allclose(levels.snap(beyond), beyond)
    np.testing.assert_allclose(levels.snap(-beyond), -beyond)


def test_steps_of_nothing_are_kept():
    step = np.full(2, 0.25, np.float32)
    np.testing.assert_array_equal(step_levels(np.zeros((2, 3)), step).grid.scale, step)
    np.testing.assert_array_equal(step_levels(np.zeros((2, 0)), step).grid.scale, step)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize(("each", "scaled"), [(False, False), (False, True), (True, False)])
def test_clusters_err_less_than_a_grid_of_as_many_levels(dtype, each, scaled):
    rng = np.random.default_rng(0)
    rows = (rng.standard_t(4, (ROWS, 400)) * 0.1).astype(dtype)
    wide = rows.astype(np.float64)
    levels = cluster_levels(rows, 16, each=each, scaled=scaled)
    grid = GridLevels(fit_grid(rows, 4))
    errors = [np.sum((one.values(one.codes(rows)).astype(np.float64) - wide) ** 2) for one in (levels, grid)]
    assert errors[0] < errors[1] * 1.02
    assert levels.count == (1 if not (each or scaled) else ROWS)


@pytest.mark.parametrize(("each", "scaled"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize(("zeros", "kept"), [(100, True), (10, False)])
def test_zero_has_an_entry_where_it_is_common(each, scaled, zeros, kept):
    rows = np.random.default_rng(0).uniform(1, 2, (ROWS, 160)).astype(np.float32)
    rows[:, :zeros] = 0.0
    levels = cluster_levels(rows, 8, each=each, scaled=scaled)
    decoded = levels.values(levels.codes(rows))
    assert np.all(decoded[:, :zeros] == 0) or not kept


def test_scales_lie_between_the_greatest_and_the_rms():
    rows = np.random.default_rng(0).standard_normal((ROWS, 50)) * np.logspace(-30, 30, ROWS)[:, None]
    rows[2] = 0.0
    expected = np.sqrt(np.abs(rows).max(axis=1) * np.sqrt(np.mean(rows**2, axis=1)))
    expected[2] = 1.0
    np.testing.assert_allclose(row_scales(rows), expected, rtol=1e-5)


def test_rows_of_a_channel_stand_side_by_side():
    matrix, channels = np.arange(12).reshape(6, 2), np.array([1, 0, 2, 1, 0, 2])
    expected = [
        np.concatenate([row for row, own in zip(matrix, channels, strict=True) if own == each]) for each in range(3)
    ]
    np.testing.assert_array_equal(by_channel(matrix, channels), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", [False, True])
def test_whole_matrices_are_rounded_group_by_group(kind, frozen):
    levels, _ = some_levels(kind, 32, 3)
    levels = levels.rows(np.array([0, 1, 2, 3]))
    rng = np.random.default_rng(3)
    matrix = rng.standard_normal((4, 12))
    zeros = rng.random(matrix.shape) < 0.3 if frozen else None
    positions = rng.standard_normal((2, 30, 12)) @ rng.standard_normal((12, 12))
    grams = np.einsum("gpk,gpl->gkl", positions, positions)
    rounded = round_rows(matrix, grams, levels, zeros)
    for group, rows in enumerate((np.array([0, 1]), np.array([2, 3]))):
        own = zeros[rows] if zeros is not None else None
        expected = round_with_feedback(matrix[rows], feedback(grams[group]), levels.rows(rows).snap, own)
        np.testing.assert_array_equal(rounded[rows], expected)
    plain = round_rows(matrix, None, levels, zeros)
    nearest = np.stack([levels.snap(column) for column in matrix.T], axis=1)
    np.testing.assert_array_equal(plain, nearest if zeros is None else np.where(zeros, 0, nearest))
