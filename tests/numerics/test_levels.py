"""Tests of levels: every kind against the nearest of all its values, codes that come back, rows, blocks, and rounding."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxshrink.numerics.cells import Cells
from onnxshrink.numerics.feedback import feedback, round_with_feedback
from onnxshrink.numerics.grids import Grid
from onnxshrink.numerics.levels import BlockLevels, BookLevels, GridLevels, RowBookLevels, placed, round_rows

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


BLOCKS = np.array([0, 0, 1, 1, 1, 0, 2, 2, 1, 2])
CELLS = Cells(np.array([1, 0, 0, 2, 1, 2]), BLOCKS)


def levels_of_cells(kind):
    """Returns levels of the 9 cells, and for each element of the matrix what it may become, [6, 10, values]."""
    drawn = [some_levels(kind, 16, seed) for seed in (1, 2)]
    if kind == "book":
        return drawn[0][0], np.broadcast_to(drawn[0][1][0], (6, 10, 16))
    levels, every = (pair[0] for pair in drawn), np.concatenate([pair[1] for pair in drawn])
    one, other = levels
    if kind == "grid":
        numbers = (np.concatenate([getattr(own.grid, name) for own in (one, other)]) for name in ("scale", "zero_point"))
        joined = GridLevels(Grid(*numbers, one.grid.bits))
    elif kind == "row books":
        joined = RowBookLevels(np.concatenate([one.codebooks, other.codebooks]))
    else:
        joined = BookLevels(one.codebook, np.concatenate([one.scale, -other.scale]))
        every = one.codebook.astype(np.float64) * joined.scale[:, None]
    return joined.rows(np.arange(9)), every[CELLS.rows[:, None] * 3 + BLOCKS]


@pytest.mark.parametrize("kind", KINDS)
def test_values_get_the_nearest_level_of_their_cell(kind):
    levels, every = levels_of_cells(kind)
    of_matrix = placed(levels, CELLS)
    assert isinstance(of_matrix, BlockLevels) == (kind != "book")
    matrix = np.random.default_rng(5).standard_normal((6, 10)) * 2
    snapped = np.stack([of_matrix.snap(matrix[:, column], column) for column in range(10)], axis=1)
    least = np.abs(every - matrix[:, :, None]).min(axis=2)
    np.testing.assert_allclose(np.abs(snapped - matrix), least, atol=1e-6)
    codes = of_matrix.codes(matrix)
    np.testing.assert_array_equal(of_matrix.values(codes), snapped.astype(np.float32))
    np.testing.assert_array_equal(of_matrix.rounded(matrix), snapped)
    some = np.array([4, 0])
    np.testing.assert_array_equal(of_matrix.rows(some).codes(matrix[some]), codes[some])
    assert of_matrix.count == (1 if kind == "book" else 6)


@pytest.mark.parametrize("kind", KINDS)
def test_error_feedback_snaps_to_the_levels_of_the_column(kind):
    """Columns are rounded in the order of their inputs' size, so it is the original column that must be told."""
    levels, every = levels_of_cells(kind)
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((6, 10))
    positions = rng.standard_normal((50, 10)) @ rng.standard_normal((10, 10)) * np.exp(rng.standard_normal(10))
    gram = positions.T @ positions
    assert (feedback(gram).order != np.arange(10)).any()
    rounded = round_rows(matrix, gram[None], placed(levels, CELLS))

    def nearest(wanted, column):
        own = every[:, column]
        return own[np.arange(6), np.abs(own - wanted[:, None]).argmin(axis=1)]

    np.testing.assert_allclose(rounded, round_with_feedback(matrix, feedback(gram), nearest), rtol=1e-6)


@pytest.mark.parametrize("price", [None, -0.2 * np.log2(np.array([0.02, 0.08, 0.8, 0.1]))], ids=["free", "priced"])
def test_blocks_round_as_if_each_were_alone(price):
    grid = Grid(np.array([0.5, 0.25, 1.0, 2.0], np.float32), np.full(4, 2.0, np.float32), 2)
    matrix = np.random.default_rng(0).standard_normal((2, 5))
    cells = Cells(np.array([0, 1]), np.array([0, 0, 1, 1, 1]))
    rounded = round_rows(matrix, None, placed(GridLevels(grid, price), cells))
    for block, columns in enumerate((slice(0, 2), slice(2, 5))):
        own = Grid(grid.scale[block::2], grid.zero_point[block::2], 2)
        np.testing.assert_array_equal(rounded[:, columns], GridLevels(own, price).snap(matrix[:, columns]))


def test_who_has_a_level_for_zero_says_so():
    zero, none = np.array([-1.0, 0.0, 1.0]), np.array([-1.0, 0.5, 1.0])
    scale = np.ones(1, np.float32)
    grid = GridLevels(Grid(scale, np.zeros(1, np.float32), 1))
    assert grid.has_zero
    assert BookLevels(zero, scale).has_zero
    assert not BookLevels(none, scale).has_zero
    assert RowBookLevels(np.stack([zero, zero])).has_zero
    assert not RowBookLevels(np.stack([zero, none])).has_zero
    assert BlockLevels((grid, BookLevels(zero)), BLOCKS).has_zero
    assert not BlockLevels((grid, BookLevels(none)), BLOCKS).has_zero
