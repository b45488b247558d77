"""Codebooks: k-means in one dimension, on tensors of any size, and the codes that go with them.

A tensor is first reduced to a `Sketch`: how many values fall into each of a million bins, and their mean there. Bins are the
top 20 bits of a float32, so their width is 2^-11 of the value: an outlier costs no resolution, and what k-means loses is the
variance inside bins, under (2^-12 |w|)^2 a weight. Small tensors and 16-bit floats are kept exactly.

On the sketch the best codebook is found by dynamic programming where that is affordable, else by Lloyd's iteration from two
starts, of which one is the uniform grid: no codebook is worse than that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxshrink.errors import must
from onnxshrink.numerics.chunks import CHUNK, Array, chunks, map_chunks, tiles
from onnxshrink.numerics.floatbits import bits_of, check_finite, check_float
from onnxshrink.numerics.lloyd import (
    companded_centers,
    companded_ranks,
    lloyd,
    squared_errors,
    thresholds,
    uniform_centers,
)
from onnxshrink.numerics.optimal_kmeans import optimal_centers, optimal_centers_with_zero

__all__ = ["Sketch", "kmeans_1d", "kmeans_rows", "nearest", "nearest_rows", "sketch"]

Codes = np.ndarray[Any, np.dtype[np.uint8]]

_BIN_BITS = 20
_EXACT_SIZE = 1 << 16  # tensors up to this size are sketched as they are
_FEWEST_GROUPS, _OPTIMAL_WORK = 1 << 11, 1 << 17  # dynamic programming takes a fifth of a second with these
_TABLE_SIZE = 1 << 22  # from this size on a look-up table of a million entries is worth making
_COMPARED = 24  # up to this many limits, comparing with each is faster than a binary search


@dataclass(frozen=True)
class Sketch:
    """A weighted histogram whose bins keep their mean.

    Attributes:
        means: float64 [bins], strictly ascending.
        counts: int64 [bins], all positive.
    """

    means: Array
    counts: Array


def sketch(values: Array) -> Sketch:
    """Returns the histogram of values that k-means works on.

    Args:
        values: float16, bfloat16, float32 or float64, any shape, not empty.

    Raises:
        ValueError: no float dtype, no element, or one that is not finite.
    """
    check_float("sketch", values)
    if not values.size:
        raise ValueError(must("sketch", "values", "not empty", f"shape {values.shape}"))
    check_finite("sketch", values)
    if values.dtype.itemsize == 2:
        return _sketch_of_patterns(values)
    if values.size <= _EXACT_SIZE:
        means, counts = np.unique(values.astype(np.float64), return_counts=True)
        return Sketch(means, counts)
    return _sketch_of_bins(values)


def kmeans_1d(values: Sketch | Array, k: int, keep_zero: bool = False) -> Array:
    """Returns the codebook of least squared error, or one within a few thousandths of it.

    Small sketches are clustered optimally. Of a large one, neighbouring bins are first put together in a few thousand groups
    as a fine quantizer would (Panter & Dite 1951), these are clustered optimally, and Lloyd's iteration on all
    bins does the rest.

    Args:
        values: a sketch, or what `sketch` takes.
        k: most entries, at least 1.
        keep_zero: whether exactly 0.0 must be among the entries.

    Returns:
        float64 [<= k], strictly ascending. Its squared error on the sketch is at most that of the uniform grid of k levels
        from the least to the greatest mean (moved so that a level is zero, where zero is kept).

    Raises:
        ValueError: k below 1, or values that `sketch` refuses.
    """
    if k < 1:
        raise ValueError(must("kmeans_1d", "k", "at least 1", k))
    bins = values if isinstance(values, Sketch) else sketch(values)
    distinct = np.union1d(bins.means, [0.0]) if keep_zero else bins.means
    if distinct.size <= k:
        return distinct
    optimal = optimal_centers_with_zero if keep_zero else optimal_centers
    points, weights = bins.means, bins.counts.astype(np.float64)
    most = max(_FEWEST_GROUPS, _OPTIMAL_WORK // k)
    if points.size <= most:
        return _settled(points, weights, optimal(points, weights, k), keep_zero)
    codebook = _settled(points, weights, optimal(*_grouped(points, weights, most), k), keep_zero)
    grid = uniform_centers(points[None, :1], points[None, -1:], k, keep_zero)
    if _error(points, weights, codebook) <= _error(points, weights, grid[0]):
        return codebook
    return _settled(points, weights, grid[0], keep_zero)


def kmeans_rows(matrix: Array, k: int, keep_zero: bool = False) -> Array:
    """Returns a codebook of small squared error for each row; all rows iterate together.

    Lloyd's iteration starts from the companded centers, and again from the uniform grid in rows that would be worse than it.

    Args:
        matrix: [rows, cols >= 1], one of the four float dtypes.
        k: most entries a row, at least 1.
        keep_zero: whether exactly 0.0 must be among the entries of each row.

    Returns:
        float64 [rows, k], ascending; a row with fewer distinct values repeats its last entry.

    Raises:
        ValueError: k below 1, no matrix, no column, another dtype, or a value that is not finite.
    """
    owner = "kmeans_rows"
    if k < 1:
        raise ValueError(must(owner, "k", "at least 1", k))
    if matrix.ndim != 2 or not matrix.shape[1]:
        raise ValueError(must(owner, "matrix", "2-D with a column at least", f"shape {matrix.shape}"))
    check_finite(owner, matrix)
    codebooks = np.empty((matrix.shape[0], k))
    if matrix.shape[1] > CHUNK:
        for row, target in zip(matrix, codebooks, strict=True):
            entries = kmeans_1d(row, k, keep_zero)
            target[:] = np.pad(entries, (0, k - entries.size), mode="edge")
        return codebooks
    for rows, _ in tiles(matrix.shape):
        codebooks[rows] = _block_codebooks(matrix[rows], k, keep_zero)
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
    _check_codebooks("nearest", codebook, 1)
    check_finite("nearest", values)
    limits = thresholds(codebook.astype(np.float64))
    if values.dtype.itemsize == 2 and values.size > _EXACT_SIZE:
        every = np.arange(1 << 16, dtype=np.uint16).view(values.dtype).astype(np.float64)
        table = np.searchsorted(limits, every).astype(np.uint8)
        return map_chunks(lambda chunk: table[bits_of(chunk)], values, np.uint8)
    if values.dtype.itemsize == 2:
        limits32 = _floored(limits, np.float32)
        return map_chunks(lambda chunk: np.searchsorted(limits32, chunk.astype(np.float32)), values, np.uint8)
    floored = _floored(limits, values.dtype.type)
    if values.size < _TABLE_SIZE:
        return map_chunks(lambda chunk: np.searchsorted(floored, chunk), values, np.uint8)
    return map_chunks(_BinnedSearch(floored), values, np.uint8)


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
    _check_codebooks(owner, codebooks, 2)
    if matrix.ndim != 2 or matrix.shape[0] != codebooks.shape[0]:
        constraint = f"2-D with a row for each of {codebooks.shape[0]} codebooks"
        raise ValueError(must(owner, "matrix", constraint, f"shape {matrix.shape}"))
    check_finite(owner, matrix)
    compute = np.float64 if matrix.dtype == np.float64 else np.float32
    limits = _floored(thresholds(codebooks.astype(np.float64)), compute)
    codes = np.empty(matrix.shape, np.uint8)
    for rows, cols in tiles(matrix.shape):
        block = np.ascontiguousarray(matrix[rows, cols], dtype=compute)
        if limits.shape[1] <= _COMPARED:
            codes[rows, cols] = _codes_by_comparing(block, limits[rows])
        else:
            for target, row, limit in zip(codes[rows, cols], block, limits[rows], strict=True):
                target[:] = np.searchsorted(limit, row)
    return codes


def _sketch_of_patterns(values: Array) -> Sketch:
    """Returns the exact histogram of 16-bit floats."""
    counts = np.zeros(1 << 16, np.int64)
    for chunk in chunks(values):
        counts += np.bincount(bits_of(chunk), minlength=counts.size)
    found = np.flatnonzero(counts)
    return _merged(found.astype(np.uint16).view(values.dtype).astype(np.float64), counts[found])


def _sketch_of_bins(values: Array) -> Sketch:
    offset, exponent = _normalization(values)
    counts, sums = np.zeros(1 << _BIN_BITS, np.int64), np.zeros(1 << _BIN_BITS)
    shift = np.uint32(32 - _BIN_BITS)
    for chunk in chunks(values, 2 * CHUNK):
        plain = chunk if offset is None else np.ldexp(chunk - np.float64(offset), -exponent).astype(np.float32)
        bins = (bits_of(plain) >> shift).astype(np.intp)
        counts += np.bincount(bins, minlength=counts.size)
        sums += np.bincount(bins, weights=chunk, minlength=counts.size)
    found = np.flatnonzero(counts)
    return _merged(sums[found] / counts[found], counts[found])


def _normalization(values: Array) -> tuple[float | None, int]:
    """Returns (offset, exponent) such that bins of ``(values - offset) * 2^-exponent`` are fine enough.

    The offset is None where the values can be binned as they are. It is not zero only where the values are farther from
    zero than from each other: their common part would use up the bits of the bins.
    """
    low, high = np.inf, -np.inf
    for chunk in chunks(values):
        low, high = min(low, float(chunk.min())), max(high, float(chunk.max()))
    nearest_zero = low if low > 0 else high if high < 0 else 0.0
    offset = nearest_zero if abs(nearest_zero) > high / 2 - low / 2 else 0.0
    exponent = int(np.frexp(max(high - offset, offset - low))[1])
    if values.dtype == np.float32 and offset == 0.0 and exponent > -64:
        return None, 0
    return offset, exponent


def _merged(means: Array, counts: Array) -> Sketch:
    """Returns the sketch of bins in any order, of which some may have equal means."""
    distinct, places = np.unique(means + 0.0, return_inverse=True)
    return Sketch(distinct, np.bincount(places, weights=counts).astype(np.int64))


def _grouped(points: Array, weights: Array, count: int) -> tuple[Array, Array]:
    """Returns (means, masses) of about `count` groups of neighbours, none with points of both signs."""
    places = np.minimum(companded_ranks(points[None], weights[None])[0] * count, count - 1).astype(np.int64)
    _, groups = np.unique(3 * places + np.sign(points).astype(np.int64), return_inverse=True)
    masses = np.bincount(groups, weights=weights)
    return np.bincount(groups, weights=weights * points) / masses, masses


def _settled(points: Array, weights: Array, centers: Array, keep_zero: bool) -> Array:
    return np.unique(lloyd(points[None], weights[None], centers[None], keep_zero=keep_zero))


def _error(points: Array, weights: Array, centers: Array) -> float:
    return float(squared_errors(points[None], weights[None], centers[None])[0])


def _block_codebooks(matrix: Array, k: int, keep_zero: bool) -> Array:
    """Returns the codebooks of a block of rows; shapes as `kmeans_rows`."""
    # C order, because sorting and every gather of the iteration walk along rows
    points = np.array(matrix, dtype=np.float64 if matrix.dtype == np.float64 else np.float32, order="C")
    points.sort(axis=1)
    weights = np.ones(points.shape)
    start = companded_centers(points, weights, k - keep_zero)
    if keep_zero:
        start = np.sort(np.pad(start, ((0, 0), (0, 1))), axis=1)
    codebooks = lloyd(points, weights, start, keep_zero=keep_zero)
    grids = uniform_centers(points[:, :1], points[:, -1:], k, keep_zero)
    worse = squared_errors(points, weights, codebooks) > squared_errors(points, weights, grids)
    if worse.any():
        codebooks[worse] = lloyd(points[worse], weights[worse], grids[worse], keep_zero=keep_zero)
    return _last_repeated(codebooks)


def _last_repeated(codebooks: Array) -> Array:
    """Returns the codebooks with repeated entries replaced by copies of the last one, which go last."""
    repeats = np.zeros(codebooks.shape, np.bool_)
    repeats[:, 1:] = codebooks[:, 1:] == codebooks[:, :-1]
    return np.sort(np.where(repeats, codebooks[:, -1:], codebooks), axis=1)


def _check_codebooks(owner: str, codebooks: Array, dimensions: int) -> None:
    if codebooks.ndim != dimensions or not 1 <= codebooks.shape[-1] <= 256:
        raise ValueError(must(owner, "codebook", f"{dimensions}-D with 1 to 256 entries", f"shape {codebooks.shape}"))
    if not np.all(np.isfinite(codebooks)) or np.any(np.diff(codebooks, axis=-1) < 0):
        raise ValueError(must(owner, "codebook", "finite and ascending", "other entries"))


def _floored(limits: Array, dtype: type[np.generic]) -> Array:
    """Returns the greatest value of the dtype that is at most each limit: values of it compare the same with both."""
    with np.errstate(over="ignore"):
        rounded = limits.astype(dtype)
    return np.where(rounded > limits, np.nextafter(rounded, rounded.dtype.type(-np.inf)), rounded)


def _codes_by_comparing(block: Array, limits: Array) -> Codes:
    """Returns how many of its row's limits each element exceeds; fast for few limits."""
    codes = np.zeros(block.shape, np.uint8)
    for column in limits.T:
        codes += block > column[:, None]
    return codes


class _BinnedSearch:
    """Finds how many limits are below each value: from a table of the top bits, with a binary search where bins are cut."""

    def __init__(self, limits: Array) -> None:
        self.limits = limits
        patterns = bits_of(limits[:0]).dtype
        self.shift = patterns.type(8 * patterns.itemsize - _BIN_BITS)
        first = np.arange(1 << _BIN_BITS, dtype=patterns) << self.shift
        last = first | patterns.type((1 << int(self.shift)) - 1)
        codes = np.searchsorted(limits, first.view(limits.dtype))
        is_cut = codes != np.searchsorted(limits, last.view(limits.dtype))
        self.table = (codes + (is_cut << 8)).astype(np.uint16)

    def __call__(self, chunk: Array) -> Array:
        entries = self.table[(bits_of(chunk) >> self.shift).astype(np.intp)]
        codes = entries.astype(np.uint8)
        cut = np.flatnonzero(entries >> np.uint16(8))
        codes[cut] = np.searchsorted(self.limits, chunk[cut])
        return codes
