"""Prefix codes as what defines them, a length for each symbol: optimal lengths, canonical codewords, the code tree.

Codewords follow from their lengths alone (RFC 1951, section 3.2.2): sorted by length, then by symbol, they count upwards
as binary fractions. So a code travels as its lengths. On each level of the code tree, leaves come before inner nodes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxshrink.errors import must
from onnxshrink.numerics.chunks import Array

__all__ = [
    "LONGEST",
    "canonical_codes",
    "canonical_order",
    "check_lengths",
    "code_lengths",
    "code_tree",
    "coded_bits",
    "entropy_bits",
]

Uint8s = np.ndarray[Any, np.dtype[np.uint8]]

LONGEST = 24  # bits: windows of 32 bits at any byte then hold a whole codeword
_MOST_SYMBOLS = 1 << 16


def code_lengths(counts: Array, limit: int = 15) -> Uint8s:
    """Returns the codeword lengths of a prefix code that needs the fewest bits, among those with no longer codewords.

    Package-merge (Larmore & Hirschberg 1990), a sort a level: from the deepest level up, neighbours are packed in twos
    and merged with the symbols; the cheapest 2(n - 1) items of the top level tell how often, that is on how many levels,
    each symbol is taken.

    Args:
        counts: integers [0 to 65,536], how often each symbol occurs; together below 2^58.
        limit: longest codeword allowed, 1 to 24.

    Returns:
        uint8, the shape of `counts`: 0 for symbols that do not occur, 1 for the only one that does.

    Raises:
        ValueError: another shape or dtype, a negative count, a limit out of range or too small for so many symbols.
    """
    owner = "code_lengths"
    counts = _checked_counts(owner, counts)
    if not 1 <= limit <= LONGEST:
        raise ValueError(must(owner, "limit", f"between 1 and {LONGEST}", limit))
    lengths = np.zeros(counts.size, np.uint8)
    used = np.flatnonzero(counts)
    if used.size > 1 << limit:
        constraint = f"at least {int(used.size - 1).bit_length()} for {used.size} symbols"
        raise ValueError(must(owner, "limit", constraint, limit))
    if used.size == 1:
        lengths[used] = 1
    elif used.size:
        rarest_first = used[np.argsort(counts[used], kind="stable")]
        lengths[rarest_first] = _package_merge(counts[rarest_first], limit)
    return lengths


def coded_bits(counts: Array, lengths: Array) -> int:
    """Returns how many bits all codewords have together.

    Args:
        counts: integers [k], how often each symbol occurs.
        lengths: integers [k], of the codewords; 0 for none.

    Raises:
        ValueError: shapes that do not fit, or a symbol that occurs and has no codeword.
    """
    owner = "coded_bits"
    counts = _checked_counts(owner, counts)
    if lengths.shape != counts.shape:
        raise ValueError(must(owner, "lengths", f"{counts.size} numbers", f"shape {lengths.shape}"))
    if np.any((lengths == 0) & (counts > 0)):
        raise ValueError(must(owner, "lengths", "positive for symbols that occur", 0))
    return int(counts @ lengths.astype(np.int64))


def entropy_bits(counts: Array) -> float:
    """Returns the bits of an ideal code of single symbols, Σ count · log2(total / count).

    Raises:
        ValueError: counts that are not [k] integers, none negative.
    """
    positive = _checked_counts("entropy_bits", counts)
    positive = positive[positive > 0]
    return float(positive @ np.log2(positive.sum() / positive))


def check_lengths(owner: str, lengths: Array) -> None:
    """Checks that lengths belong to a complete prefix code, to a lone symbol with a codeword of one bit, or to none.

    Raises:
        ValueError: not [0 to 65,536] uint8, a length over 24, or a Kraft sum, Σ 2^-length, that is not 1.
    """
    if lengths.ndim != 1 or lengths.dtype != np.uint8 or lengths.size > _MOST_SYMBOLS:
        got = f"{lengths.dtype} of shape {lengths.shape}"
        raise ValueError(must(owner, "lengths", f"1-D uint8 for {_MOST_SYMBOLS:,} symbols at most", got))
    used = lengths[lengths > 0].astype(np.int64)
    longest = int(used.max(initial=0))
    if longest > LONGEST:
        raise ValueError(must(owner, "codewords", f"at most {LONGEST} bits long", longest))
    kraft = int((1 << (LONGEST - used)).sum())
    if used.size and kraft != 1 << LONGEST and used.tolist() != [1]:
        raise ValueError(must(owner, "lengths", "of a complete code, Kraft sum 1", f"Kraft sum {kraft / 2**LONGEST}"))


def canonical_codes(lengths: Array) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """Returns the codeword of each symbol as a number, first bit highest; 0 where there is none.

    Args:
        lengths: uint8 [k], of a complete code.

    Returns:
        uint32 [k].
    """
    ordered = canonical_order(lengths)
    shifts = LONGEST - lengths[ordered].astype(np.int64)
    ends = np.cumsum(1 << shifts)
    codes = np.zeros(lengths.size, np.uint32)
    codes[ordered] = (ends - (1 << shifts)) >> shifts
    return codes


def code_tree(lengths: Array) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Returns the children of the inner nodes of the code tree, breadth first, the root being node 0.

    Args:
        lengths: uint8 [k], of a complete code of n >= 2 symbols.

    Returns:
        int32 [n - 1, 2], for bits 0 and 1: the number of an inner node, or ~symbol (negative) for a leaf.
    """
    ordered = canonical_order(lengths)
    leaves = np.bincount(lengths[ordered], minlength=LONGEST + 1)
    children = np.empty(2 * (ordered.size - 1), np.int32)
    at = leaf = 0
    inner, level = 1, 2  # the next number of an inner node, and how many nodes this level has
    for count in leaves[1:].tolist():
        deeper = level - count
        children[at : at + count] = ~ordered[leaf : leaf + count]
        children[at + count : at + level] = np.arange(inner, inner + deeper)
        at, leaf, inner, level = at + level, leaf + count, inner + deeper, 2 * deeper
    return children.reshape(-1, 2)


def canonical_order(lengths: Array) -> Array:
    """Returns the symbols that have codewords, sorted by (length, symbol)."""
    used = np.flatnonzero(lengths)
    order: Array = used[np.argsort(lengths[used], kind="stable")]
    return order


def _package_merge(weights: Array, limit: int) -> Uint8s:
    """Returns the lengths of at least two symbols sorted by weight, uint8, descending."""
    count = weights.size
    needed = 2 * count - 2  # items of the top level: more than that of a level are never asked for
    items, symbols_among_first = weights, []
    for level in range(limit):
        if level:
            packages = items[: items.size // 2 * 2].reshape(-1, 2).sum(axis=1)
            merged = np.concatenate([weights, packages])
            order = np.argsort(merged, kind="stable")[:needed]  # two ascending runs: a merge
            items, is_symbol = merged[order], order < count
        else:
            is_symbol = np.ones(count, np.bool_)
        symbols_among_first.append(np.concatenate([[0], np.cumsum(is_symbol)]))
    lengths = np.zeros(count, np.uint8)
    for symbols in reversed(symbols_among_first):
        taken = int(symbols[needed])
        lengths[:taken] += np.uint8(1)
        needed = 2 * (needed - taken)
    return lengths


def _checked_counts(owner: str, counts: Array) -> Array:
    """Returns the counts as int64 after checking them."""
    if counts.ndim != 1 or counts.dtype.kind not in "iu" or counts.size > _MOST_SYMBOLS:
        got = f"{counts.dtype} of shape {counts.shape}"
        raise ValueError(must(owner, "counts", f"1-D integers for {_MOST_SYMBOLS:,} symbols at most", got))
    if np.any(counts < 0):
        raise ValueError(must(owner, "counts", "zero or positive", counts.min()))
    return counts.astype(np.int64)
