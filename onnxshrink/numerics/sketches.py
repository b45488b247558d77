"""Weighted histograms that stand for tensors of any size where only the values matter, not their places.

Bins are the top 20 bits of a float32, so their width is at most 2^-11 of the value: an outlier costs no resolution, and
each value is moved by less than 2^-11 of itself to the mean of its bin. Small tensors and 16-bit floats are exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxshrink.errors import must
from onnxshrink.numerics.chunks import CHUNK, Array, chunks
from onnxshrink.numerics.floatbits import bits_of, check_finite

__all__ = ["Sketch", "sketch"]

_BIN_BITS = 20
_LEAST_EXPONENT = -64  # float32 values that are all smaller lack bins, because subnormal ones have few bits
_EXACT_SIZE = 1 << 16  # tensors up to this size are sketched as they are


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
    check_finite("sketch", values)
    if not values.size:
        raise ValueError(must("sketch", "values", "not empty", f"shape {values.shape}"))
    if values.dtype.itemsize == 2:
        return _sketch_of_patterns(values)
    if values.size <= _EXACT_SIZE:
        means, counts = np.unique(values.astype(np.float64) + 0.0, return_counts=True)  # -0.0 + 0.0 is 0.0
        return Sketch(means, counts)
    return _sketch_of_bins(values)


def _sketch_of_patterns(values: Array) -> Sketch:
    """Returns the exact histogram of 16-bit floats."""
    counts = np.zeros(1 << 16, np.int64)
    for chunk in chunks(values):
        counts += np.bincount(bits_of(chunk), minlength=counts.size)
    found = np.flatnonzero(counts)
    return _merged(found.astype(np.uint16).view(values.dtype).astype(np.float64), counts[found])


def _sketch_of_bins(values: Array) -> Sketch:
    offset, exponent = _normalization(values)
    rescaled = values.dtype != np.float32 or offset != 0.0 or exponent < _LEAST_EXPONENT
    counts, sums = np.zeros(1 << _BIN_BITS, np.int64), np.zeros(1 << _BIN_BITS)
    shift = np.uint32(32 - _BIN_BITS)
    for chunk in chunks(values, 2 * CHUNK):
        near = chunk - np.float64(offset) if rescaled else chunk
        plain = np.ldexp(near, -exponent).astype(np.float32) if rescaled else chunk
        bins = (bits_of(plain) >> shift).astype(np.intp)
        counts += np.bincount(bins, minlength=counts.size)
        sums += np.bincount(bins, weights=near, minlength=counts.size)
    found = np.flatnonzero(counts)
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
    return Sketch(distinct, np.bincount(places, weights=counts).astype(np.int64))
