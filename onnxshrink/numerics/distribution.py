"""How the values of a tensor are distributed: how many distinct ones, how many zeros, how many bits each is worth.

Two notions of "distinct" live here. An exact codebook must reproduce a tensor bit for bit, so `distinct_values` and
`codes_of` compare bit patterns: +0.0 and -0.0 are two values, and so are NaNs of different payload. `distribution`
speaks of numbers: both zeros are one value.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxshrink.errors import must
from onnxshrink.numerics.chunks import Array, chunks, map_chunks
from onnxshrink.numerics.floatbits import bits_of

__all__ = ["Distribution", "codes_of", "distinct_values", "distribution"]

_AT_ONCE = 1 << 18  # elements: a first look at this many refuses a tensor of many values in milliseconds
_PART = 1 << 22  # `distribution` sorts parts of about this many elements, or a sixteenth of a tensor if that is more
_MOST_PARTS_LOG2 = 4
_FEW = 1 << 16
_TABLE_BITS = 18


@dataclass(frozen=True)
class Distribution:
    """What the empirical distribution of a tensor's values says.

    Attributes:
        size: number of elements.
        zeros: number of elements that are zero, of either sign.
        distinct: number of distinct values; both zeros are one, NaNs are told apart by their bits.
        entropy_bits: Shannon entropy in bits per element, the least that coding elements one by one can reach.
    """

    size: int
    zeros: int
    distinct: int
    entropy_bits: float


def distinct_values(values: Array, limit: int) -> Array | None:
    """Returns the distinct values if there are few of them.

    Args:
        values: any shape; any dtype of 1, 2, 4 or 8 bytes.
        limit: most values wanted.

    Returns:
        The bitwise distinct values, [n <= limit], same dtype, ascending (-0.0 before +0.0, NaNs last); None if there
        are more. It stops reading where the limit is passed: random numbers take milliseconds, however many.

    Raises:
        ValueError: elements of another width.
    """
    found = bits_of(np.empty(0, values.dtype))
    for chunk in chunks(values, _AT_ONCE):
        patterns = np.sort(bits_of(chunk))
        found = np.union1d(found, patterns[_run_starts(patterns)])
        if found.size > limit:
            return None
    return _by_value(found, values.dtype)


def codes_of(values: Array, codebook: Array) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Returns the index of each value in an exact codebook, compared by bits.

    Bit patterns are hashed by multiplication (Dietzfelbinger et al. 1997, "A reliable randomized algorithm for the
    closest-pair problem") with a factor under which the codebook does not collide, so that a value costs one table
    look-up rather than a binary search.

    Args:
        values: any shape; the dtype of the codebook.
        codebook: [1 to 256] distinct values, such as `distinct_values` returns.

    Returns:
        uint8, the shape of `values`.

    Raises:
        ValueError: the codebook is too long, repeats a value, has another dtype, or lacks one of the values.
    """
    owner = "codes_of"
    if values.dtype != codebook.dtype:
        raise ValueError(must(owner, "codebook", f"of the values' dtype {values.dtype}", codebook.dtype))
    if codebook.ndim != 1 or not 1 <= codebook.size <= 256:
        raise ValueError(must(owner, "codebook", "1-D with 1 to 256 entries", f"shape {codebook.shape}"))
    keys = bits_of(np.ascontiguousarray(codebook))
    if np.unique(keys).size < keys.size:
        raise ValueError(must(owner, "codebook", "free of repeats", f"{keys.size} entries with repeats"))
    factor, shift, table = _perfect_hash(keys)

    def code(chunk: Array) -> Array:
        patterns = bits_of(chunk)
        codes: Array = table[((patterns * factor) >> shift).astype(np.intp)]
        if not np.array_equal(keys[codes], patterns):
            raise ValueError(must(owner, "codebook", "complete", "a value that it lacks"))
        return codes

    return map_chunks(code, values, np.uint8)


def distribution(values: Array) -> Distribution:
    """Returns size, zeros, distinct values and entropy of a tensor; non-finite values count like any others.

    Args:
        values: any shape; any dtype of 1, 2, 4 or 8 bytes.

    Raises:
        ValueError: elements of another width.
    """
    size, zeros, distinct, bits = int(values.size), 0, 0, 0.0
    for zeros_here, counts in _narrow_counts(values) if values.dtype.itemsize <= 2 else _wide_counts(values):
        zeros += zeros_here
        distinct += counts.size
        # every term is positive; log2(size) minus a mean would cancel where one value rules
        bits += float(np.sum(counts * np.log2(size / counts)))
    if zeros:
        distinct += 1
        bits += zeros * float(np.log2(size / zeros))
    return Distribution(size, zeros, distinct, bits / size if size else 0.0)


def _narrow_counts(values: Array) -> Iterator[tuple[int, Array]]:
    """Yields once (zeros, counts of the other distinct values); a table has room for every 8 or 16-bit pattern."""
    patterns = bits_of(np.empty(0, values.dtype)).dtype
    table = np.zeros(1 << (8 * patterns.itemsize), np.int64)
    for chunk in chunks(values):
        table += np.bincount(bits_of(chunk), minlength=table.size)
    with np.errstate(invalid="ignore"):  # signalling NaNs are among all patterns
        is_zero = np.arange(table.size, dtype=patterns).view(values.dtype) == np.zeros(1, values.dtype)
    yield int(table[is_zero].sum()), table[~is_zero & (table > 0)]


def _wide_counts(values: Array) -> Iterator[tuple[int, Array]]:
    """Yields (zeros, counts of the other distinct values) for parts of the values.

    The part of a value is a hash of its bits, so that equal values meet in one part and parts are of equal size
    whatever the distribution. Parts are gathered and sorted one after the other: memory is that of one part.
    """
    zero_patterns = [0, 1 << (8 * values.dtype.itemsize - 1)] if values.dtype.kind == "f" else [0]
    parts_log2 = min(_MOST_PARTS_LOG2, max(values.size // _PART, 1).bit_length() - 1)
    if parts_log2 and distinct_values(values, _FEW) is not None:
        parts_log2 = 0  # a single part of so few distinct values takes no room
    for part in range(1 << parts_log2):
        for patterns, counts in _counted_part(values, part, parts_log2):
            is_zero = np.isin(patterns, zero_patterns)
            yield int(counts[is_zero].sum()), counts[~is_zero]


def _counted_part(values: Array, part: int, parts_log2: int) -> Iterator[tuple[Array, Array]]:
    """Yields (distinct bit patterns of one part, how often each comes), a window of patterns at a time.

    Each chunk gives its distinct patterns once, and apart from them the repeats: a frequent value takes no room.
    """
    once: list[Array] = []
    repeated: list[Array] = []
    repeats: list[Array] = []
    for chunk in chunks(values):
        patterns = np.sort(_part_of(bits_of(chunk), part, parts_log2))
        starts = _run_starts(patterns)
        more = np.diff(starts, append=patterns.size) - 1
        once.append(patterns[starts])
        repeated.append(once[-1][more > 0])
        repeats.append(more[more > 0].astype(np.int32))
    if not once:
        return
    merged = np.concatenate(once)
    del once
    merged.sort()
    where, extra = np.concatenate(repeated), np.concatenate(repeats)
    for window in _whole_runs(merged):
        starts = _run_starts(window)
        counts = np.diff(starts, append=window.size)
        patterns = window[starts]
        here = (where >= patterns[0]) & (where <= patterns[-1])
        places = np.searchsorted(patterns, where[here])
        yield patterns, counts + np.bincount(places, weights=extra[here], minlength=counts.size).astype(np.int64)


def _whole_runs(ascending: Array) -> Iterator[Array]:
    """Yields windows of a sorted array that cut no run of equal elements."""
    firsts = np.searchsorted(ascending, ascending[::_AT_ONCE])
    for start, stop in zip(firsts, [*firsts[1:], ascending.size], strict=True):
        if start < stop:
            yield ascending[start:stop]


def _part_of(patterns: Array, part: int, parts_log2: int) -> Array:
    if not parts_log2:
        return patterns
    width = 8 * patterns.dtype.itemsize
    golden = patterns.dtype.type(int(0.6180339887498949 * 2**width) | 1)  # Fibonacci hashing: Knuth, TAOCP 6.4
    hashes = (patterns * golden) >> patterns.dtype.type(width - parts_log2)
    chosen: Array = patterns[hashes == part]
    return chosen


def _run_starts(ascending: Array) -> Array:
    """Returns where each run of equal elements begins."""
    is_start = np.ones(ascending.size, np.bool_)
    np.not_equal(ascending[1:], ascending[:-1], out=is_start[1:])
    return np.flatnonzero(is_start)


def _by_value(patterns: Array, dtype: np.dtype[Any]) -> Array:
    """Returns bit patterns as values of the dtype, ascending, -0.0 before +0.0 and NaNs last."""
    values = patterns.view(dtype)
    if dtype.kind in "biu":
        return np.sort(values)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        numbers = values.astype(np.float64)
    ascending: Array = values[np.lexsort((~patterns, numbers))]
    return ascending


def _perfect_hash(keys: Array) -> tuple[np.generic, np.generic, Array]:
    """Returns (factor, shift, table) such that ``table[keys * factor >> shift]`` is 0, 1, 2, ...

    Under a random odd factor two keys collide with probability at most 2 / 2^18, so all of 256 keys are apart three
    times out of four at least; keys of 16 bits or fewer have a slot each.
    """
    width = 8 * keys.dtype.itemsize
    table_bits = min(width, _TABLE_BITS)
    shift = keys.dtype.type(width - table_bits)
    highest, one = np.iinfo(keys.dtype).max, keys.dtype.type(1)
    generator = np.random.default_rng(0)
    while True:
        factor = generator.integers(0, highest, dtype=keys.dtype.type, endpoint=True) | one
        slots = (keys * factor) >> shift
        if np.unique(slots).size == keys.size:
            break
    table = np.zeros(1 << table_bits, np.uint8)
    table[slots] = np.arange(keys.size)
    return factor, shift, table
