"""Codebooks: k-means in one dimension, on tensors of any size, and the codes that go with them.

A tensor is first reduced to a sketch, in which the best codebook is found by dynamic programming where that is
affordable, else by dynamic programming on groups of bins and Lloyd's iteration on all bins. The rows of a matrix go the
same way together, each towards a codebook of its own. No codebook is worse than the uniform grid.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxshrink.errors import must
from onnxshrink.numerics.chunks import CHUNK, Array, map_chunks, tiles
from onnxshrink.numerics.floatbits import bits_of, check_finite
from onnxshrink.numerics.lloyd import (
    companded_centers,
    companded_ranks,
    lloyd,
    squared_errors,
    thresholds,
    uniform_centers,
)
from onnxshrink.numerics.optimal_kmeans import optimal_centers
from onnxshrink.numerics.sketches import LEAST_IMPORTANCE, Sketch, check_importance, sketch

__all__ = ["kmeans_1d", "kmeans_rows", "nearest", "nearest_rows"]

Codes = np.ndarray[Any, np.dtype[np.uint8]]

_FEWEST_GROUPS, _OPTIMAL_WORK = 1 << 11, 1 << 17  # dynamic programming takes a fifth of a second with these
_ROW_GROUPS = 256  # of the points of a row, for the same purpose
_ROWS_SIZE = CHUNK  # elements of rows that iterate together
_TABLE_BITS, _TABLE_SIZE = 20, 1 << 22  # values from which on a look-up table of 2^20 entries is worth making
_PATTERNS_SIZE = 1 << 16  # 16-bit values from which on a table of all of them is
_COMPARED = 24  # up to this many limits, comparing with each is faster than a binary search


def kmeans_1d(values: Sketch | Array, k: int, keep_zero: bool = False) -> Array:
    """Returns the codebook of least squared error, or one within a few thousandths of it.

    Small sketches are clustered optimally. Of a large one, neighbouring bins are first put together in a few thousand
    groups as a fine quantizer would (Panter & Dite 1951), these are clustered optimally, and Lloyd's iteration on all
    bins does the rest.

    Args:
        values: a sketch, or what `sketch` takes.
        k: most entries, at least 1.
        keep_zero: whether exactly 0.0 must be among the entries.

    Returns:
        float64 [<= k], strictly ascending. Its squared error on the sketch is at most that of the uniform grid of k
        levels from the least to the greatest mean (of which the level nearest to zero is made zero, with `keep_zero`).

    Raises:
        ValueError: k below 1, or values that `sketch` refuses.
    """
    if k < 1:
        raise ValueError(must("kmeans_1d", "k", "at least 1", k))
    bins = values if isinstance(values, Sketch) else sketch(values)
    distinct = np.union1d(bins.means, [0.0]) if keep_zero else bins.means
    if distinct.size <= k:
        return distinct
    points, weights = bins.means[None], bins.counts.astype(np.float64)[None]
    return np.unique(_codebooks(points, weights, k, max(_FEWEST_GROUPS, _OPTIMAL_WORK // k), keep_zero))


def kmeans_rows(matrix: Array, k: int, keep_zero: bool = False, importance: Array | None = None) -> Array:
    """Returns a codebook of small squared error for each row; all rows iterate together.

    Up to 64 entries, errors stay within a hundredth of the least. With more, Lloyd's iteration starts from companded
    centers (`companded_ranks`) and may end a third above the least, for dynamic programming would be slow.

    Args:
        matrix: [rows, cols >= 1], one of the four float dtypes.
        k: most entries a row, at least 1.
        keep_zero: whether exactly 0.0 must be among the entries of each row.
        importance: [cols] what a squared error in each column costs, see `sketch`.

    Returns:
        float64 [rows, k], ascending; a row with fewer distinct values repeats its last entry.

    Raises:
        ValueError: k below 1, no matrix, no column, another dtype, or a value that is not finite; importance that is
            negative or does not fit.
    """
    owner = "kmeans_rows"
    if k < 1:
        raise ValueError(must(owner, "k", "at least 1", k))
    if matrix.ndim != 2 or not matrix.shape[1]:
        raise ValueError(must(owner, "matrix", "2-D with a column at least", f"shape {matrix.shape}"))
    check_finite(owner, matrix)
    if importance is not None:
        matrix, importance = _important(owner, matrix, importance)
    codebooks = np.empty((matrix.shape[0], k))
    if matrix.shape[1] > CHUNK:
        for row, target in zip(matrix, codebooks, strict=True):
            entries = kmeans_1d(sketch(row, importance), k, keep_zero)
            target[:] = np.pad(entries, (0, k - entries.size), mode="edge")
        return codebooks
    groups = min(_ROW_GROUPS, max(_ROW_GROUPS // 4, 8 * k)) if k <= _ROW_GROUPS // 4 else 0
    for rows, _ in tiles(matrix.shape, _ROWS_SIZE):
        # C order, because sorting and every gather of the iteration walk along rows
        points = np.array(matrix[rows], dtype=np.float64 if matrix.dtype == np.float64 else np.float32, order="C")
        if importance is None:
            weights = np.ones(points.shape)
            points.sort(axis=1)
        else:
            order = np.argsort(points, axis=1)
            points, weights = np.take_along_axis(points, order, axis=1), importance[order]
        codebooks[rows] = _last_repeated(_codebooks(points, weights, k, groups, keep_zero))
    return codebooks


def nearest(values: Array, codebook: Array) -> Codes:
    """Returns the index of the entry nearest to each value.

    Args:
        values: any shape, one of the four float dtypes.
        codebook: [1 to 256], ascending; of a repeated entry the first index is used.

    Returns:
        uint8, the shape of `values`. A tie (a value at the float64 midpoint of two entries) goes to the lower entry.

    Raises:
        ValueError: a codebook of another shape or order, another dtype, or a value that is not finite.
    """
    check_finite("nearest", values)
    limits = _thresholds("nearest", codebook, 1)
    if values.dtype.itemsize == 2 and values.size >= _PATTERNS_SIZE:
        table = _codes_of_patterns(limits, values.dtype)
        return map_chunks(lambda chunk: table[bits_of(chunk)], values, np.uint8)
    wide = np.float64 if values.dtype == np.float64 else np.float32
    floored = _floored(limits, wide)
    if values.dtype == wide and values.size >= _TABLE_SIZE:
        return map_chunks(_BinnedSearch(floored), values, np.uint8)
    return map_chunks(lambda chunk: np.searchsorted(floored, chunk.astype(wide, copy=False)), values, np.uint8)


def nearest_rows(matrix: Array, codebooks: Array) -> Codes:
    """Returns the index of the entry of its row's codebook nearest to each value.

    Args:
        matrix: [rows, cols], one of the four float dtypes.
        codebooks: [rows, 1 to 256], each row ascending.

    Returns:
        uint8 [rows, cols]; ties and repeated entries as in `nearest`.

    Raises:
        ValueError: shapes that do not fit, another dtype, or a value that is not finite.
    """
    owner = "nearest_rows"
    check_finite(owner, matrix)
    compute = np.float64 if matrix.dtype == np.float64 else np.float32
    limits = _floored(_thresholds(owner, codebooks, 2), compute)
    if matrix.ndim != 2 or matrix.shape[0] != len(codebooks):
        constraint = f"2-D with a row for each of {len(codebooks)} codebooks"
        raise ValueError(must(owner, "matrix", constraint, f"shape {matrix.shape}"))
    codes = np.empty(matrix.shape, np.uint8)
    for rows, cols in tiles(matrix.shape):
        block = np.ascontiguousarray(matrix[rows, cols], dtype=compute)
        if limits.shape[1] <= _COMPARED:
            codes[rows, cols] = _codes_by_comparing(block, limits[rows])
        else:
            for target, row, limit in zip(codes[rows, cols], block, limits[rows], strict=True):
                target[:] = np.searchsorted(limit, row)
    return codes


def _important(owner: str, matrix: Array, importance: Array) -> tuple[Array, Array | None]:
    """Returns the columns that matter, all of them where none does, and their importance relative to the greatest."""
    check_importance(owner, importance, matrix.shape[1:])
    weights = np.broadcast_to(importance.astype(np.float64), matrix.shape[1:])
    if not weights.any():
        return matrix, None
    weights = weights / weights.max()
    columns = weights > LEAST_IMPORTANCE
    return (matrix if columns.all() else matrix[:, columns]), weights[columns]


def _codebooks(points: Array, weights: Array, k: int, groups: int, keep_zero: bool) -> Array:
    """Returns the codebooks of rows of sorted weighted points, never worse than a uniform grid.

    Args:
        points: [rows, n] floats, each row ascending.
        weights: [rows, n] float64, positive.
        k: entries a row.
        groups: how many points, or groups of them, dynamic programming may take; 0 for the companded centers instead.
        keep_zero: whether exactly 0.0 must be among the entries.

    Returns:
        float64 [rows, k], ascending.
    """
    if groups:
        few = _grouped(points, weights, groups) if points.shape[1] > groups else (points.astype(np.float64), weights)
        start = optimal_centers(few[0], few[1], k, keep_zero=keep_zero)
    else:
        start = companded_centers(points, weights, k - keep_zero)
        start = np.sort(np.pad(start, ((0, 0), (0, int(keep_zero)))), axis=1)
    codebooks = lloyd(points, weights, start, keep_zero=keep_zero)
    grids = uniform_centers(points[:, :1], points[:, -1:], k, keep_zero)
    worse = squared_errors(points, weights, codebooks) > squared_errors(points, weights, grids)
    if worse.any():
        codebooks[worse] = lloyd(points[worse], weights[worse], grids[worse], keep_zero=keep_zero)
    return codebooks


def _grouped(points: Array, weights: Array, count: int) -> tuple[Array, Array]:
    """Returns (means, masses), float64 [rows, count], of groups of neighbours that a fine quantizer would make.

    A group may be empty: its mass is zero, and its mean is that of the group before it.
    """
    rows = len(points)
    # a wide gap between clusters deserves one group, not all of them
    places = np.minimum(companded_ranks(points, weights, 1 / count) * count, count - 1).astype(np.intp)
    places += np.arange(rows)[:, None] * count
    masses = np.bincount(places.ravel(), weights=weights.ravel(), minlength=rows * count).reshape(rows, count)
    sums = np.bincount(places.ravel(), weights=(weights * points).ravel(), minlength=rows * count).reshape(rows, count)
    lowest = np.broadcast_to(points[:, :1].astype(np.float64), masses.shape)
    means = np.divide(sums, masses, out=lowest.copy(), where=masses > 0)
    return np.maximum.accumulate(means, axis=1), masses


def _last_repeated(codebooks: Array) -> Array:
    """Returns the codebooks with repeated entries replaced by copies of the last one, which go last."""
    repeats = np.zeros(codebooks.shape, np.bool_)
    repeats[:, 1:] = codebooks[:, 1:] == codebooks[:, :-1]
    return np.sort(np.where(repeats, codebooks[:, -1:], codebooks), axis=1)


def _thresholds(owner: str, codebooks: Array, dimensions: int) -> Array:
    """Returns the thresholds of codebooks, float64, after checking their shape and order."""
    if codebooks.ndim != dimensions or not 1 <= codebooks.shape[-1] <= 256:
        raise ValueError(must(owner, "codebook", f"{dimensions}-D with 1 to 256 entries", f"shape {codebooks.shape}"))
    entries = codebooks.astype(np.float64)
    if not np.all(np.isfinite(entries)) or np.any(entries[..., 1:] < entries[..., :-1]):
        raise ValueError(must(owner, "codebook", "finite and ascending", "other entries"))
    return thresholds(entries)


def _floored(limits: Array, dtype: type[np.generic]) -> Array:
    """Returns the greatest value of the dtype that is at most each limit: values of it compare the same with both."""
    with np.errstate(over="ignore"):
        rounded = limits.astype(dtype)
    floored: Array = np.where(rounded > limits, np.nextafter(rounded, rounded.dtype.type(-np.inf)), rounded)
    return floored


def _codes_of_patterns(limits: Array, dtype: np.dtype[Any]) -> Array:
    """Returns uint8 [2^16]: how many limits are below each 16-bit float."""
    with np.errstate(invalid="ignore"):  # signalling NaNs are among them
        every = np.arange(1 << 16, dtype=np.uint16).view(dtype).astype(np.float32)
    return np.searchsorted(_floored(limits, np.float32), every).astype(np.uint8)


def _codes_by_comparing(block: Array, limits: Array) -> Codes:
    """Returns how many of its row's limits each element exceeds; fast for few limits."""
    codes = np.zeros(block.shape, np.uint8)
    for column in limits.T:
        codes += block > column[:, None]
    return codes


class _BinnedSearch:
    """Finds how many limits are below each value, by a table of the top bits and a search where a limit cuts a bin."""

    def __init__(self, limits: Array) -> None:
        self.limits = limits
        patterns = bits_of(limits[:0]).dtype
        self.shift = patterns.type(8 * patterns.itemsize - _TABLE_BITS)
        first = np.arange(1 << _TABLE_BITS, dtype=patterns) << self.shift
        last = first | patterns.type((1 << int(self.shift)) - 1)
        codes = np.searchsorted(limits, first.view(limits.dtype))
        is_cut = codes != np.searchsorted(limits, last.view(limits.dtype))
        self.table = (codes + (is_cut << 8)).astype(np.uint16)

    def __call__(self, chunk: Array) -> Array:
        entries: Array = self.table[(bits_of(chunk) >> self.shift).astype(np.intp)]
        codes: Array = entries.astype(np.uint8)  # the low byte: the ninth bit says that a limit cuts the bin
        cut = np.flatnonzero(entries >> np.uint16(8))
        codes[cut] = np.searchsorted(self.limits, chunk[cut])
        return codes
