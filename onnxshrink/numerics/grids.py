"""Uniform affine grids: what DequantizeLinear, or Cast, Sub and Mul, make of small unsigned codes.

    value = (code - zero_point) * scale        in float32, one scale and one zero point a row

The zero point is one of the codes, so zero is exactly representable and pruned weights stay zero. Rounding to the
nearest level errs by scale / 2 at most, clipped values apart.

With few bits, cutting off the tails pays: the finer steps gain more than the clipped values lose. Below 8 bits a few
clip ratios are tried on each row and the one of least squared error is kept. With 1 bit, one of the two levels must be
zero; the other has the sign and size that err least.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxshrink.errors import must
from onnxshrink.numerics.chunks import Array, tiles
from onnxshrink.numerics.floatbits import check_finite

__all__ = ["Grid", "decode", "encode", "fit_grid"]

_CLIP_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)


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
    owner = "fit_grid"
    if not 1 <= bits <= 8:
        raise ValueError(must(owner, "bits", "between 1 and 8", bits))
    _check_matrix(owner, matrix)
    low, high = _row_ranges(matrix)
    if max(high.max(initial=0), -low.min(initial=0)) > np.finfo(np.float32).max:
        raise ValueError(must(owner, "values", "in the range of float32", "a larger one"))
    candidates = _candidates(np.minimum(low, 0), np.maximum(high, 0), bits)
    grids = [_constant_rows_exact(grid, low, high) for grid in candidates]
    return grids[0] if len(grids) == 1 else _best_of_each_row(matrix, grids)


def encode(matrix: Array, grid: Grid) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Returns the code of the nearest level of its row's grid for each value; values beyond the range get the end.

    Args:
        matrix: [rows, cols], one of the four float dtypes.
        grid: of as many rows.

    Returns:
        uint8 [rows, cols]. Encoding what `decode` returns gives the same codes back.

    Raises:
        ValueError: shapes that do not fit, another dtype, or a value that is not finite.
    """
    _check_matrix("encode", matrix)
    _check_rows("encode", matrix, grid)
    codes = np.empty(matrix.shape, np.uint8)
    for rows, cols in tiles(matrix.shape):
        steps = _steps(_block(matrix, rows, cols), grid, rows)
        steps += grid.zero_point[rows, None]
        codes[rows, cols] = steps
    return codes


def decode(codes: Array, grid: Grid) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Returns the values of codes, rounded as Cast, Sub and Mul of ONNX round in float32.

    Args:
        codes: uint8 [rows, cols].
        grid: of as many rows.

    Returns:
        float32 [rows, cols].

    Raises:
        ValueError: shapes that do not fit.
    """
    _check_rows("decode", codes, grid)
    values = np.empty(codes.shape, np.float32)
    for rows, cols in tiles(codes.shape):
        block = codes[rows, cols].astype(np.float32)
        block -= grid.zero_point[rows, None]
        np.multiply(block, grid.scale[rows, None], out=values[rows, cols])
    return values


def _candidates(low: Array, high: Array, bits: int) -> Iterator[Grid]:
    """Yields the grids to choose from, for ranges that contain zero."""
    if bits == 8:
        yield _spanning(low, high, bits)
    elif bits > 1:
        yield from (_spanning(ratio * low, ratio * high, bits) for ratio in _CLIP_RATIOS)
    else:
        for ratio in _CLIP_RATIOS:
            yield _spanning(np.zeros_like(low), ratio * high, bits)
            yield _spanning(ratio * low, np.zeros_like(high), bits)


def _spanning(low: Array, high: Array, bits: int) -> Grid:
    """Returns the grid from low to high, float64 [rows] with zero between them, up to half a step."""
    levels, numbers = 2**bits - 1, np.finfo(np.float32)
    # a subnormal step may be flushed to zero, and the last level must not overflow
    scale = np.clip((high - low) / levels, numbers.tiny, numbers.max / (levels + 1)).astype(np.float32)
    scale[high == low] = 1.0
    return Grid(scale, np.clip(np.rint(0.0 - low / scale), 0, levels).astype(np.float32), bits)


def _constant_rows_exact(grid: Grid, low: Array, high: Array) -> Grid:
    """Returns the grid with the value of each constant row as its step, so that the row comes back exactly."""
    constant = (low == high) & (low != 0)
    scale = np.where(constant, np.abs(low), grid.scale).astype(np.float32)
    return Grid(scale, np.where(constant, low < 0, grid.zero_point).astype(np.float32), grid.bits)


def _best_of_each_row(matrix: Array, grids: list[Grid]) -> Grid:
    """Returns the grid of least squared error of each row; the first of equal ones."""
    errors = np.zeros((len(grids), matrix.shape[0]))
    for rows, cols in tiles(matrix.shape):
        block = _block(matrix, rows, cols)
        for index, grid in enumerate(grids):
            errors[index, rows] += _squared_errors(block, grid, rows)
    best, every = np.argmin(errors, axis=0), np.arange(matrix.shape[0])
    scale = np.stack([grid.scale for grid in grids])[best, every]
    zero_point = np.stack([grid.zero_point for grid in grids])[best, every]
    return Grid(scale, zero_point, grids[0].bits)


def _squared_errors(block: Array, grid: Grid, rows: slice) -> Array:
    """Returns float64 [rows]: the squared errors of a float32 block, summed along rows."""
    values = _steps(block, grid, rows)
    values *= grid.scale[rows, None]
    values -= block
    errors: Array = np.square(values, dtype=np.float64).sum(axis=1)
    return errors


def _steps(block: Array, grid: Grid, rows: slice) -> Array:
    """Returns code - zero_point of a float32 block, float32."""
    zero_point = grid.zero_point[rows, None]
    with np.errstate(over="ignore"):  # a value far beyond a grid made for others is clipped all the same
        steps = block / grid.scale[rows, None]
    np.rint(steps, out=steps)
    return np.clip(steps, -zero_point, 2**grid.bits - 1 - zero_point, out=steps)


def _row_ranges(matrix: Array) -> tuple[Array, Array]:
    """Returns the least and the greatest value of each row, float64; both zero where there are no columns."""
    shape = matrix.shape[:1]
    low, high = np.full(shape, np.inf), np.full(shape, -np.inf)
    for rows, cols in tiles(matrix.shape):
        block = matrix[rows, cols]
        if block.dtype.itemsize == 2:
            block = block.astype(np.float32)
        low[rows] = np.minimum(low[rows], block.min(axis=1))
        high[rows] = np.maximum(high[rows], block.max(axis=1))
    return (low, high) if matrix.shape[1] else (np.zeros(shape), np.zeros(shape))


def _block(matrix: Array, rows: slice, cols: slice) -> Array:
    return np.ascontiguousarray(matrix[rows, cols], dtype=np.float32)


def _check_matrix(owner: str, matrix: Array) -> None:
    if matrix.ndim != 2:
        raise ValueError(must(owner, "matrix", "2-D", f"shape {matrix.shape}"))
    check_finite(owner, matrix)


def _check_rows(owner: str, matrix: Array, grid: Grid) -> None:
    if matrix.ndim != 2 or matrix.shape[0] != grid.scale.size:
        raise ValueError(must(owner, "matrix", f"2-D with {grid.scale.size} rows", f"shape {matrix.shape}"))
