"""Tests of the walks over arrays: every layout, every element once, never a write."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxshrink.numerics.chunks import chunk_pairs, chunks, map_chunks, tiles

LAYOUTS = {
    "c": lambda a: a,
    "transposed": lambda a: a.transpose(2, 0, 1),
    "strided": lambda a: a[:, ::2],
    "reversed": lambda a: a[::-1],
    "broadcast": lambda a: np.broadcast_to(a[:1], a.shape),
    "scalar": lambda a: a[0, 0, 0],
    "empty": lambda a: a[:0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int8, ml_dtypes.bfloat16])
class TestLayouts:
    def array(self, layout, dtype):
        whole = np.arange(4 * 6 * 5).reshape(4, 6, 5).astype(dtype)
        whole.flags.writeable = False
        return np.asarray(LAYOUTS[layout](whole))

    def test_chunks_hold_every_element_once(self, layout, dtype):
        array = self.array(layout, dtype)
        pieces = [piece.copy() for piece in chunks(array, 7)]
        assert all(piece.ndim == 1 and 0 < piece.size <= 7 and piece.dtype == dtype for piece in pieces)
        joined = np.concatenate([*pieces, array.ravel()[:0]])
        assert sorted(joined.tolist()) == sorted(array.ravel().tolist())

    def test_pairs_belong_together(self, layout, dtype):
        array = self.array(layout, dtype)
        for other in (array.astype(np.float64) * 2, np.asfortranarray(array) * np.float64(2)):
            pieces = [(piece.copy(), twin.copy()) for piece, twin in chunk_pairs(array, other, 7)]
            assert all(0 < piece.size <= 7 for piece, _ in pieces)
            assert all(np.array_equal(piece.astype(np.float64) * 2, twin) for piece, twin in pieces)
            joined = np.concatenate([*(piece for piece, _ in pieces), array.ravel()[:0]])
            assert sorted(joined.tolist()) == sorted(array.ravel().tolist())

    def test_map_keeps_places(self, layout, dtype):
        array = self.array(layout, dtype)
        mapped = map_chunks(lambda piece: piece.astype(np.float64) + 1, array, np.float32, 7)
        assert mapped.dtype == np.float32
        assert mapped.flags.c_contiguous
        assert np.array_equal(mapped, array.astype(np.float32) + 1)


def test_chunks_of_contiguous_and_transposed_arrays_are_views():
    array = np.arange(24.0).reshape(4, 6)
    for view in (array, array.T):
        assert all(np.shares_memory(piece, array) for piece in chunks(view, 7))


@given(
    shape=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    size=st.integers(1, 200),
    row_step=st.integers(1, 5),
    col_step=st.integers(1, 5),
)
def test_tiles_cover_a_matrix_once(shape, size, row_step, col_step):
    seen = np.zeros(shape, np.int64)
    for rows, cols in tiles(shape, size, row_step, col_step):
        assert rows.start % row_step == 0
        assert cols.start % col_step == 0
        assert (rows.stop - rows.start) * (cols.stop - cols.start) <= max(
            size, row_step * col_step
        ) + row_step * col_step * 40
        seen[rows, cols] += 1
    assert np.array_equal(seen, np.ones(shape))


def test_tiles_of_long_rows_cut_them_and_short_rows_stay_whole():
    assert list(tiles((2, 10), 4)) == [(slice(r, r + 1), slice(c, min(c + 4, 10))) for r in (0, 1) for c in (0, 4, 8)]
    assert list(tiles((5, 3), 6)) == [(slice(r, min(r + 2, 5)), slice(0, 3)) for r in (0, 2, 4)]
