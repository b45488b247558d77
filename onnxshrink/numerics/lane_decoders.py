"""From lanes of codewords to symbols, all lanes of a block in step.

A lane decoder takes lanes, uint8 [n, lane_bytes], and returns

    symbols      1-D, those of the first lane, then those of the second, and so on
    counts       int64 [n], how many symbols each lane has
    spare        uint8 [n], how many bits are left at the end of each lane, too few for a codeword

It reads no byte outside the lanes and ends after as many steps as a lane can have bytes, or symbols.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from onnxshrink.errors import must
from onnxshrink.numerics.chunks import Array
from onnxshrink.numerics.code_lengths import LONGEST, canonical_codes, canonical_order, code_tree

__all__ = ["LaneDecoder", "lane_decoder"]

LaneDecoder = Callable[[Array], tuple[Array, Array, Array]]

_MOST_STATES = 1 << 10  # of the machine: its tables then have a few megabytes; larger ones would be slower than windows
_TABLE_BITS = 18  # of windows: a megabyte
_CONTAINERS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}  # by bytes; only ever copied


def lane_decoder(lengths: Array) -> LaneDecoder:
    """Returns a decoder for a code; symbols are uint8 if there are at most 256 lengths, else uint16.

    Args:
        lengths: uint8 [k], of a complete code of two symbols or more, or of a lone symbol.
    """
    symbols = np.count_nonzero(lengths)
    if symbols == 1:
        return _LoneSymbol(int(np.flatnonzero(lengths)[0]))
    return _Machine(lengths) if symbols <= _MOST_STATES else _Windows(lengths)


class _LoneSymbol:
    """The decoder of a code whose only codeword is 0."""

    def __init__(self, symbol: int) -> None:
        self.symbol = symbol

    def __call__(self, lanes: Array) -> tuple[Array, Array, Array]:
        if lanes.any():
            raise ValueError(must("decode", "bits", "0 in a code of one symbol", 1))
        symbols = np.full(8 * lanes.size, self.symbol, np.uint16)
        return symbols, np.full(len(lanes), 8 * lanes.shape[1]), np.zeros(len(lanes), np.uint8)


class _Machine:
    """Takes a byte of each lane in a step: a state is an inner node of the code tree.

    Attributes:
        next: int64 [256 · states], 256 times the state after a state and a byte, which is index 256 · state + byte.
        found: [256 · states], the symbols that the byte completes, side by side in one item.
        counts: int64 [256 · states], how many these are.
        depths: uint8 [states], how many bits of a codeword have been read.
    """

    def __init__(self, lengths: Array) -> None:
        tree = code_tree(lengths)
        self.dtype = np.dtype(np.uint8 if lengths.size <= 256 else np.uint16)
        self.shortest = int(lengths[lengths > 0].min())
        self.depths = _depths(tree)
        slots = -(-8 // self.shortest)
        self.slots = 1 << (slots - 1).bit_length()  # an item for each of these sizes can be stored at once
        symbols = np.zeros((256 * len(tree), self.slots), self.dtype)
        states, octets = np.divmod(np.arange(len(symbols)), 256)
        self.counts = np.zeros(len(symbols), np.intp)
        for bit in range(7, -1, -1):
            children = tree[states, (octets >> bit) & 1]
            leaves = np.flatnonzero(children < 0)
            symbols[leaves, self.counts[leaves]] = ~children[leaves]
            self.counts[leaves] += 1
            states = np.maximum(children, 0).astype(np.intp)  # after a leaf comes the root
        self.next = 256 * states
        self.found: Array = symbols.view(_CONTAINERS[self.slots * self.dtype.itemsize])[:, 0]

    def __call__(self, lanes: Array) -> tuple[Array, Array, Array]:
        size, steps = lanes.shape
        octets = lanes.T.astype(np.intp, order="C")
        width = 8 * steps // self.shortest + self.slots  # whole items are stored: room for the last one's empty slots
        symbols = np.empty((size, width), self.dtype)
        # the same memory as items that begin at every symbol; lanes are apart, so what is stored at once never overlaps
        places = symbols.size - self.slots + 1
        items = np.ndarray((places,), self.found.dtype, symbols, strides=(self.dtype.itemsize,))
        starts = width * np.arange(size)
        positions, state = starts.copy(), np.zeros(size, np.intp)
        index, counts, found = np.empty(size, np.intp), np.empty(size, np.intp), np.empty(size, self.found.dtype)
        for step in range(steps):
            np.add(state, octets[step], out=index)
            # every index is valid; "wrap" only saves take from buffering what it writes to `out`
            self.next.take(index, out=state, mode="wrap")
            self.found.take(index, out=found, mode="wrap")
            self.counts.take(index, out=counts, mode="wrap")
            items[positions] = found
            positions += counts
        positions -= starts
        return symbols[np.arange(width) < positions[:, None]], positions, self.depths[state >> 8]


class _Windows:
    """Takes a codeword of each lane in a step, by a table of (symbol, length); long codewords are searched for."""

    def __init__(self, lengths: Array) -> None:
        self.ordered = canonical_order(lengths)
        self.lengths = lengths[self.ordered].astype(np.int64)
        self.starts = canonical_codes(lengths)[self.ordered].astype(np.int64) << (LONGEST - self.lengths)
        self.bits = min(int(self.lengths[-1]), _TABLE_BITS)
        self.has_long = self.lengths[-1] > self.bits
        firsts = np.arange(1 << self.bits) << (LONGEST - self.bits)
        self.table = self._entries(firsts)
        self.dtype = np.uint8 if lengths.size <= 256 else np.uint16

    def _entries(self, bits: Array) -> Array:
        """Returns length + 256 · symbol of the codewords that 24 bits begin with, uint32."""
        ranks = np.searchsorted(self.starts, bits, side="right") - 1
        entries: Array = (self.ordered[ranks] << 8) | self.lengths[ranks]
        return entries.astype(np.uint32)

    def __call__(self, lanes: Array) -> tuple[Array, Array, Array]:
        windows = _windows(lanes)
        starts = 8 * lanes.shape[1] * np.arange(len(lanes) + 1, dtype=np.uint32)
        positions, ends = starts[:-1].copy(), starts[1:]
        counts = np.zeros(len(lanes), np.int64)
        steps = []
        for _ in range(8 * lanes.shape[1] // int(self.lengths[0])):
            bits = windows.take(positions >> np.uint32(3), mode="wrap")
            bits <<= positions & np.uint32(7)
            entries = self.table.take(bits >> np.uint32(32 - self.bits), mode="wrap")
            if self.has_long:
                long = np.flatnonzero((entries & np.uint32(255)) > self.bits)
                entries[long] = self._entries(bits[long] >> np.uint32(8))
            moved = positions + (entries & np.uint32(255))
            fits = moved <= ends  # a lane that stops stays where it is, so it never goes on
            if not fits.any():
                break
            np.copyto(positions, moved, where=fits)
            counts += fits
            steps.append((entries >> np.uint32(8)).astype(self.dtype))
        mask = np.arange(len(steps)) < counts[:, None]
        return np.stack(steps, axis=1)[mask], counts, (ends - positions).astype(np.uint8)


def _windows(lanes: Array) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """Returns the 32 bits from each byte on, and zeros from the end on, uint32 [bytes + 1]."""
    octets = np.concatenate([lanes.reshape(-1), np.zeros(4, np.uint8)]).astype(np.uint32)
    count = lanes.size + 1
    windows = octets[:count]
    for offset in range(1, 4):
        windows = (windows << np.uint32(8)) | octets[offset : offset + count]
    return windows


def _depths(tree: Array) -> Array:
    """Returns the depth of each inner node, uint8."""
    depths = np.zeros(len(tree), np.uint8)
    level, depth = np.zeros(1, np.intp), 0
    while level.size:
        depths[level] = depth
        children = tree[level].ravel()
        level, depth = children[children >= 0], depth + 1
    return depths
