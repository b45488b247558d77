"""Weighted histograms that stand for tensors of any size where only the values matter, not their places.

Bins are the top 20 bits of a float32, so their width is at most 2^-11 of the value: an outlier costs no resolution, and
each value is moved by less than 2^-11 of itself to the mean of its bin. Small tensors and 16-bit floats are exact.

Values may matter unequally. Where a layer computes W X^T, an error e of a weight in column j costs e² H_jj, H = X^T X, its
neighbours aside: with H's diagonal for importance, k-means minimises that (Choi et al., arXiv 1612.01543).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from onnxshrink.errors import must
from onnxshrink.numerics.chunks import CHUNK, Array, chunk_pairs, chunks
from onnxshrink.numerics.floatbits import bits_of, check_finite

__all__ = ["LEAST_IMPORTANCE", "Sketch", "check_importance", "sketch"]

LEAST_IMPORTANCE = 1e-30  # of the greatest: less would lose itself in sums, and is as good as none

_BIN_BITS = 20
_LEAST_EXPONENT = -64  # float32 values that are all smaller lack bins, because subnormal ones have few bits
_EXACT_SIZE = 1 << 16  # tensors up to this size are sketched as they are


@dataclass(frozen=True)
class Sketch:
    """A weighted histogram whose bins keep their mean.

    Attributes:
        means: float64 [bins], strictly ascending.
        counts: int64 [bins], or float64 where values have importance; all positive.
    """

    means: Array
    counts: Array


def sketch(values: Array, importance: Array | None = None) -> Sketch:
    """Returns the histogram of values that k-means works on.

    Args:
        values: float16, bfloat16, float32 or float64, any shape, not empty.
        importance: what a squared error of each value costs, not negative, of a shape that broadcasts to that of the
            values. Counts are then sums of it, relative to the greatest; values that do not matter are left out,
            unless none does: then all matter alike.

    Raises:
        ValueError: no float dtype, no element, or one that is not finite; importance that is negative or does not fit.
    """
    check_finite("sketch", values)
    if not values.size:
        raise ValueError(must("sketch", "values", "not empty", f"shape {values.shape}"))
    if importance is not None:
        check_importance("sketch", importance, values.shape)
        importance = importance if importance.max() > 0 else None
    if values.dtype.itemsize == 2:
        return _sketch_of_patterns(values, importance)
    if values.size > _EXACT_SIZE:
        return _sketch_of_bins(values, importance)
    if importance is None:
        means, counts = np.unique(values.astype(np.float64) + 0.0, return_counts=True)  # -0.0 + 0.0 is 0.0
        return Sketch(means, counts)
    weights = np.broadcast_to(importance / np.float64(importance.max()), values.shape).ravel()
    important = weights > LEAST_IMPORTANCE
    return _merged(values.ravel()[important].astype(np.float64), weights[important])


def check_importance(owner: str, importance: Array, shape: tuple[int, ...]) -> None:
    """Checks what values matter.

    Args:
        owner: named in errors.
        importance: one of the four float dtypes.
        shape: that it must broadcast to.

    Raises:
        ValueError: another dtype, a value that is not finite or negative, or another shape.
    """
    check_finite(f"{owner}: importance", importance)
    widened = (1,) * (len(shape) - importance.ndim) + importance.shape
    if len(widened) != len(shape) or any(own not in (1, size) for own, size in zip(widened, shape, strict=True)):
        raise ValueError(
            must(owner, "importance", f"of a shape that broadcasts to {shape}", f"shape {importance.shape}")
        )
    if importance.min() < 0:
        raise ValueError(must(owner, "importance", "not negative", float(importance.min())))


def _pieces(values: Array, importance: Array | None, size: int = CHUNK) -> Iterator[tuple[Array, Array | None]]:
    """Yields 1-D pieces of the values, with their importance relative to the greatest, float64, where there is any."""
    if importance is None:
        yield from ((chunk, None) for chunk in chunks(values, size))
        return
    greatest = np.float64(importance.max())
    for chunk, weights in chunk_pairs(values, np.broadcast_to(importance, values.shape), size):
        yield chunk, weights / greatest


def _sketch_of_patterns(values: Array, importance: Array | None) -> Sketch:
    """Returns the exact histogram of 16-bit floats."""
    counts = np.zeros(1 << 16, np.int64 if importance is None else np.float64)
    for chunk, weights in _pieces(values, importance):
        counts += np.bincount(bits_of(chunk), weights, minlength=counts.size)
    found = np.flatnonzero(counts > LEAST_IMPORTANCE)
    return _merged(found.astype(np.uint16).view(values.dtype).astype(np.float64), counts[found])


def _sketch_of_bins(values: Array, importance: Array | None) -> Sketch:
    offset, exponent = _normalization(values)
    rescaled = values.dtype != np.float32 or offset != 0.0 or exponent < _LEAST_EXPONENT
    counts = np.zeros(1 << _BIN_BITS, np.int64 if importance is None else np.float64)
    sums = np.zeros(counts.size)
    shift = np.uint32(32 - _BIN_BITS)
    for chunk, weights in _pieces(values, importance, 2 * CHUNK if importance is None else CHUNK):
        near = chunk - np.float64(offset) if rescaled else chunk
        plain = np.ldexp(near, -exponent).astype(np.float32) if rescaled else chunk
        bins = (bits_of(plain) >> shift).astype(np.intp)
        counts += np.bincount(bins, weights, minlength=counts.size)
        sums += np.bincount(bins, near if weights is None else near * weights, minlength=counts.size)
    found = np.flatnonzero(counts > LEAST_IMPORTANCE)
    return _merged(offset + sums[found] / counts[found], counts[found])


def _normalization(values: Array) -> tuple[float, int]:
    """Returns (offset, exponent) such that ``(values - offset) * 2^-exponent`` is at most 1 and has fine bins.

    The offset is zero unless the values are farther from zero than from each other: their common part would use up the
    bits of the bins.
    """
    low, high = np.inf, -np.inf
    for chunk in chunks(values):
        low, high = min(low, float(chunk.min())), max(high, float(chunk.max()))
    nearest_zero = low if low > 0 else high if high < 0 else 0.0
    offset = nearest_zero if abs(nearest_zero) > high / 2 - low / 2 else 0.0
    return offset, int(np.frexp(max(high - offset, offset - low))[1])


def _merged(means: Array, counts: Array) -> Sketch:
    """Returns the sketch of bins in any order, of which some may have equal means."""
    distinct, places = np.unique(means + 0.0, return_inverse=True)
    return Sketch(distinct, np.bincount(places, weights=counts).astype(counts.dtype))
