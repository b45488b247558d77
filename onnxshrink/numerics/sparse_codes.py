"""Where the values of a sparse tensor are, in few bits: gaps between them, or patterns of small blocks.

With n elements of which k are stored, s bytes each, and H(p) the entropy of a bit, a mask takes n bits, and no code of the places
takes less than n·H(k/n), unless the places have a structure:

    gaps        b bits for the distance from one stored element to the next; what is farther than 2**b - 1 gets a filler of value 0 on
                the way (Han et al., arXiv 1510.00149, section 3): k + fillers of b bits, a fifth to a third over n·H(k/n)
    patterns    a matrix in blocks of r x c, each one of at most 256 patterns of a table: N:M zeros take log2 C(M, N) bits in M (3 in 4
                for 2:4), blocks and whole rows of zeros one bit a block; a rare pattern is covered by a larger one with fillers

Stored is what has any bit set: -0.0 is stored, so the tensor comes back bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

__all__ = ["Patterns", "best_gap_bits", "best_patterns", "gap_codes", "set_bits"]

Array = np.ndarray[Any, np.dtype[Any]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]
Uint8s = np.ndarray[Any, np.dtype[np.uint8]]
_GAP_BITS = range(2, 9)
_NARROW = 16  # elements of a block up to which all of its patterns are looked at
_MOST_PATTERNS = 1024  # more distinct ones than that have no structure
_SAMPLE = 2**18  # elements by which blocks are compared
_SIDES = ((1, 2), (2, 1), (1, 4), (4, 1), (2, 2), (1, 8), (8, 1), (1, 16), (16, 1), (4, 4), (1, 32), (32, 1), (8, 8), (16, 16), (32, 32))


def set_bits(values: Array) -> Bools:
    """Returns which elements have any bit set, in the shape of the values; they may be of any floating-point type."""
    whole = np.ascontiguousarray(values).reshape(-1)
    words = whole.view({2: np.uint16, 4: np.uint32, 8: np.uint64}[values.dtype.itemsize])
    return np.asarray(words != 0).reshape(values.shape)


def best_gap_bits(stored: Bools, itemsize: int) -> int:
    """Returns the bits of a gap, from 2 to 8, with which gaps and values take the fewest bytes.

    Args:
        stored: bool, flat.
        itemsize: bytes of a value.
    """
    steps = np.bincount(np.minimum(_steps(stored), 2**16)) if stored.any() else np.zeros(1, np.int64)
    distances = np.arange(len(steps))

    def nbytes(bits: int) -> float:
        most = 2**bits - 1
        entries = np.maximum(-(-distances // most), 1) @ steps
        return float(entries) * (itemsize + bits / 8)

    return min(_GAP_BITS, key=nbytes)


def gap_codes(stored: Bools, bits: int) -> tuple[Uint8s, Array]:
    """Returns the gaps, uint8 [k + fillers], and the places that they lead to, int64 of that shape; the last place is stored.

    Place i is the sum of the gaps up to i. Places of fillers are those of elements that are not stored.

    Args:
        stored: bool, flat.
        bits: of a gap.
    """
    steps = _steps(stored)
    most = 2**bits - 1
    entries = np.maximum(-(-steps // most), 1)
    gaps = np.full(int(entries.sum()), most, np.int64)
    last = np.cumsum(entries) - 1
    gaps[last] = steps - most * (entries - 1)
    return gaps.astype(np.uint8), np.cumsum(gaps)


def _steps(stored: Bools) -> Array:
    """Returns the distance of each stored element from the one before, of the first from the start: int64 [k]."""
    return np.diff(np.flatnonzero(stored), prepend=0)


@dataclass(frozen=True, eq=False)
class Patterns:
    """A mask of a matrix as blocks.

    Attributes:
        matrix: rows and columns that the tensor is seen as, in its own order.
        block: rows and columns of a block; those at the edges reach over them.
        codes: uint8 [blocks], row by row: which row of the table.
        table: bool [patterns, elements of a block].
        bits: of a code.
    """

    matrix: tuple[int, int]
    block: tuple[int, int]
    codes: Uint8s
    table: Bools
    bits: int

    @property
    def grid(self) -> tuple[int, int]:
        """How many blocks there are down and across."""
        (rows, columns), (height, width) = self.matrix, self.block
        return -(-rows // height), -(-columns // width)

    @cached_property
    def stored(self) -> Bools:
        """Which elements are stored, fillers among them: bool, of the matrix."""
        (rows, columns), (height, width), (down, across) = self.matrix, self.block, self.grid
        blocks = self.table[self.codes].reshape(down, across, height, width)
        return blocks.transpose(0, 2, 1, 3).reshape(down * height, across * width)[:rows, :columns]

    def nbytes(self, itemsize: int) -> float:
        """Returns the bytes of codes, table and values of so many bytes each."""
        return self.codes.size * self.bits / 8 + self.table.size + int(np.count_nonzero(self.stored)) * itemsize


def best_patterns(stored: Bools, itemsize: int) -> Patterns | None:
    """Returns the patterns that take the fewest bytes, or None if none takes less than a mask of a bit for each element.

    The size of the blocks is chosen by a part of the tensor, whole rows and columns by all of it.

    Args:
        stored: bool, of the tensor's shape.
        itemsize: bytes of a value.
    """
    best: tuple[float, tuple[int, int], tuple[int, int]] | None = None
    plain = 1 / 8 + itemsize * np.count_nonzero(stored) / max(stored.size, 1)
    for matrix in _matrices(stored.shape):
        for block, part in _trials(stored.reshape(matrix)):
            found = _patterns(part, block, itemsize)
            cost = found.nbytes(itemsize) / part.size if found is not None else plain
            limit = 1 / 8 + itemsize * np.count_nonzero(part) / part.size
            if cost < limit and (best is None or cost - limit < best[0]):
                best = cost - limit, matrix, block
    if best is None:
        return None
    found = _patterns(stored.reshape(best[1]), best[2], itemsize)
    return found if found is not None and found.nbytes(itemsize) < plain * stored.size else None


def _matrices(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Returns the matrices that a tensor may be seen as without moving an element: split after the first axis, or before the last."""
    if not shape or 0 in shape:
        return []
    return list(dict.fromkeys([(shape[0], math.prod(shape[1:])), (math.prod(shape[:-1]), shape[-1])]))


def _trials(matrix: Bools) -> Iterator[tuple[tuple[int, int], Bools]]:
    """Yields blocks with the part of the matrix to try them on."""
    rows, columns = matrix.shape
    for block in dict.fromkeys([(1, columns), (rows, 1), _uniform(matrix)]):
        if 1 < math.prod(block) < matrix.size:
            yield block, matrix
    few = matrix[: max(32, _SAMPLE // columns)]
    for height, width in _SIDES:
        if height <= rows and width <= columns and height * width < matrix.size:
            yield (height, width), few


def _uniform(matrix: Bools) -> tuple[int, int]:
    """Returns the largest block, counted from the corner, within which all elements of the matrix are alike."""
    down = np.flatnonzero((matrix[1:] != matrix[:-1]).any(axis=1)) + 1
    across = np.flatnonzero((matrix[:, 1:] != matrix[:, :-1]).any(axis=0)) + 1
    height, width = (int(np.gcd.reduce(edges, initial=0)) for edges in (down, across))
    return height or matrix.shape[0], width or matrix.shape[1]


def _patterns(matrix: Bools, block: tuple[int, int], itemsize: int) -> Patterns | None:
    """Returns the patterns of blocks of one size that take the fewest bytes, or None if there are too many different ones."""
    blocks = _tiled(matrix, block)
    if blocks.shape[1] > _NARROW:
        full = np.ones(blocks.shape[1], bool)
        codes = np.asarray(blocks.any(axis=1), np.uint8)
        return Patterns(matrix.shape, block, codes, np.stack([~full, full]), 1)
    keys: Array = np.zeros(len(blocks), np.uint16)
    for place in range(blocks.shape[1]):
        keys |= blocks[:, place].astype(np.uint16) << np.uint16(place)
    counts = np.bincount(keys, minlength=2 ** blocks.shape[1])
    known = np.flatnonzero(counts)
    if len(known) > _MOST_PATTERNS:
        return None
    known = known[np.argsort(-counts[known], kind="stable")]
    table = (known[:, None] >> np.arange(blocks.shape[1])) & 1 != 0
    best: tuple[float, int, Array] | None = None
    for bits in range(1, 9):
        cover = _cover(table, 2**bits)
        if cover is None:
            continue
        fillers = (np.count_nonzero(table[cover], axis=1) - np.count_nonzero(table, axis=1)) @ counts[known]
        cost = len(blocks) * bits / 8 + min(2**bits, len(known)) * blocks.shape[1] + float(fillers) * itemsize
        if best is None or cost < best[0]:
            best = cost, bits, cover
        if 2**bits >= len(known):
            break
    if best is None:
        return None
    by_key = np.zeros(len(counts), np.uint8)
    by_key[known] = best[2]
    return Patterns(matrix.shape, block, by_key[keys.reshape(-1)], table[: 2 ** best[1]], best[1])


def _cover(table: Bools, size: int) -> Array | None:
    """Returns for each pattern which of the first ``size`` has all that it has and the least beside, or None if one has none."""
    kept, rest = table[:size], table[size:]
    missing = rest.astype(np.int32) @ (~kept).T.astype(np.int32)
    beside = np.where(missing == 0, np.count_nonzero(kept, axis=1)[None, :], table.shape[1] + 1)
    if len(rest) and beside.min(axis=1).max() > table.shape[1]:
        return None
    return np.concatenate([np.arange(len(kept)), beside.argmin(axis=1) if len(rest) else np.zeros(0, np.int64)])


def _tiled(matrix: Bools, block: tuple[int, int]) -> Bools:
    """Returns the blocks of a matrix, [blocks, elements of a block]; those at the edges go on as the last row or column does."""
    (rows, columns), (height, width) = matrix.shape, block
    down, across = -(-rows // height), -(-columns // width)
    whole = (down * height, across * width)
    padded = matrix if whole == matrix.shape else np.pad(matrix, ((0, whole[0] - rows), (0, whole[1] - columns)), mode="edge")
    return padded.reshape(down, height, across, width).transpose(0, 2, 1, 3).reshape(down * across, height * width)
