"""Tests of cells: against a walk over groups and blocks, one after the other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxshrink.numerics.cells import Cells, by_channel


@st.composite
def labels(draw, most: int):
    """Returns groups of up to `most` elements, each of 1 to 4, in any order."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=most))
    return np.array(draw(st.permutations(list(np.repeat(np.arange(len(sizes)), sizes)))))


def walked(matrix, rows, columns):
    """Returns the values of each cell, row by row."""
    groups, blocks = rows.max() + 1, columns.max() + 1
    return [matrix[np.ix_(rows == group, columns == block)] for group in range(groups) for block in range(blocks)]


@given(rows=labels(5), columns=labels(5), dtype=st.sampled_from([np.float16, np.float64]))
def test_every_cell_has_its_values_and_no_others(rows, columns, dtype):
    matrix = np.arange(rows.size * columns.size, dtype=dtype).reshape(rows.size, columns.size)
    cells = Cells(rows, columns)
    gathered, expected = cells.gather(matrix), walked(matrix, rows, columns)
    assert gathered.dtype == dtype
    assert gathered.shape == (cells.groups * cells.blocks, max(np.bincount(rows)) * max(np.bincount(columns)))
    for row, own in zip(gathered, expected, strict=True):
        assert set(row) == set(own.ravel())
        if own.size == row.size:
            np.testing.assert_array_equal(row, own.ravel())


@given(rows=labels(5), columns=labels(5))
def test_what_columns_have_goes_where_their_values_go(rows, columns):
    cells, values = Cells(rows, columns), np.random.default_rng(0).random(columns.size)
    expected = cells.gather(np.broadcast_to(values, (rows.size, columns.size)))
    gathered = cells.gather_columns(values)
    np.testing.assert_array_equal(np.broadcast_to(gathered, expected.shape), expected)
    assert gathered.ndim == (1 if cells.blocks == 1 else 2)


def test_shorter_cells_repeat_their_values():
    cells = Cells(np.array([0, 0, 1]), np.array([0, 0, 0, 1, 1]))
    matrix = np.array([list("abcde"), list("fghij"), list("klmno")])
    assert ["".join(row) for row in cells.gather(matrix)] == ["abcfgh", "dediji", "klmklm", "nonnon"]


@pytest.mark.parametrize(("rows", "columns"), [(0, 3), (3, 0)])
def test_nothing_has_no_cells(rows, columns):
    cells = Cells(np.zeros(rows, np.intp), np.zeros(columns, np.intp))
    assert cells.gather(np.zeros((rows, columns))).size == 0


def test_rows_of_a_channel_stand_side_by_side():
    matrix, channels = np.arange(12).reshape(6, 2), np.array([1, 0, 2, 1, 0, 2])
    expected = [
        np.concatenate([row for row, own in zip(matrix, channels, strict=True) if own == each]) for each in range(3)
    ]
    np.testing.assert_array_equal(by_channel(matrix, channels), expected)
