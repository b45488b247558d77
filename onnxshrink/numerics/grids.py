"""Uniform affine grids: what DequantizeLinear, or Cast, Sub and Mul, make of small unsigned codes.

    value = (code - zero_point) * scale        in float32, one scale and one zero point a row

The zero point is one of the codes, so zero is exactly representable and pruned weights stay zero. Rounding to the nearest level
errs by scale / 2 at most inside the range of the grid.

With few bits, cutting off the tails pays: the finer steps gain more than the clipped values lose. Below 8 bits a few
clip ratios are tried on each row and the one of least squared error is kept. With 1 bit, one of the two levels must be zero; the
other has the sign and size that err least.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxshrink.errors import must
from onnxshrink.numerics.chunks import Array, tiles
from onnxshrink.numerics.floatbits import check_finite, check_float

__all__ = ["Grid", "decode", "encode", "fit_grid"]

_CLIP_RATIOS = {bits: (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3) for bits in range(1, 5)}
_CLIP_RATIOS.update({bits: (1.0, 0.95, 0.9, 0.85, 0.8, 0.7) for bits in (5, 6, 7)})
_CLIP_RATIOS[8] = (1.0,)


@dataclass(frozen=True)
class Grid:
    """A grid a row.

    Attributes:
        scale: float32 [rows], positive.
        zero_point: float32 [rows], integers from 0 to 2^bits - 1.
        bits: 1 to 8.
    """

    scale: Array
    zero_point: Array
    bits: int


def fit_grid(matrix: Array, bits: int) -> Grid:
    """Returns the grid of each row; ranges contain zero, and constant rows come back exactly.

    Args:
        matrix: [rows, cols], one of the four float dtypes, of float32's range.
        bits: 1 to 8.

    Raises:
        ValueError: bits out of range, no matrix, another dtype, or a value that is not finite in float32.
    """
    if not 1 <= bits <= 8:
        raise ValueError(must("fit_grid", "bits", "between 1 and 8", bits))
    _check_matrix("fit_grid", matrix)
    check_finite("fit_grid", matrix)
    low, high = _row_ranges(matrix)
    best, least = Grid(*_spanning(low, high, bits), bits), np.full(matrix.shape[0], np.inf)
    candidates = list(_candidates(low, high, bits))
    if len(candidates) > 1:
        for grid in candidates:
            errors = _squared_errors(matrix, grid)
            better = errors < least
            best.scale[better], best.zero_point[better] = grid.scale[better], grid.zero_point[better]
            least = np.minimum(errors, least)
    _make_constant_rows_exact(matrix, best)
    return best
