"""Huffman coding in lanes: pieces of equal size that can all be decoded at the same time.

    lanes        uint8 [n, lane_bytes]; bits are read from the highest to the lowest of each byte
    one lane     as many whole codewords as fit, then the leading bits of the next one, which do not complete it
    next lane    begins with that codeword in full, so every lane starts at the root of the code tree
    last lane    zeros after the last codeword

Codewords are canonical (`code_lengths`), so lengths alone describe the code. Zeros decode to the first symbol of
canonical order: a decoder that does not know the number of symbols puts out some of these at the end (`emitted`).

A stream that `encode` did not write, for these lengths and this count, is refused by `decode` wherever that shows: each
bit is either part of a codeword or checked. Symbols changed by flipped bits may go unnoticed, as in any such code.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

import numpy as np

from onnxshrink.errors import must
from onnxshrink.numerics.chunks import CHUNK, Array, chunks
from onnxshrink.numerics.code_lengths import (
    LONGEST,
    canonical_codes,
    check_lengths,
    code_lengths,
    coded_bits,
    entropy_bits,
)
from onnxshrink.numerics.lane_decoders import lane_decoder

__all__ = ["code_lengths", "coded_bits", "decode", "emitted", "encode", "entropy_bits"]

Uint8s = np.ndarray[Any, np.dtype[np.uint8]]

_PIECE = CHUNK >> 3  # symbols that are encoded together: a dozen temporaries of eight bytes each
_BLOCK = 1 << 20  # symbols that are decoded together; long lanes are in larger blocks, for a step takes its time
_FEWEST_LANES, _LARGEST_BLOCK = 1 << 10, 1 << 23
_LONGEST_LANE = 1 << 16  # bytes: decoders take a step a byte, or more, for all lanes of a block


def encode(symbols: Array, lengths: Array, lane_bytes: int) -> Uint8s:
    """Returns the symbols as codewords, in lanes.

    Args:
        symbols: uint8 or uint16 [count].
        lengths: uint8 [k], of a complete code (or a lone symbol's, 1), as `code_lengths` returns.
        lane_bytes: bytes a lane, enough for the longest codeword.

    Returns:
        uint8 [lanes, lane_bytes]; no lane for no symbol.

    Raises:
        ValueError: lengths of no complete code, lanes too short, another shape or dtype, a symbol without codeword.
    """
    owner = "encode"
    check_lengths(owner, lengths)
    _check_lane_bytes(owner, lane_bytes, lengths)
    if symbols.ndim != 1 or symbols.dtype not in (np.uint8, np.uint16):
        raise ValueError(must(owner, "symbols", "1-D uint8 or uint16", f"{symbols.dtype} of shape {symbols.shape}"))
    counts = _counts(symbols)
    uncoded = np.pad(lengths, (0, max(counts.size - lengths.size, 0)))[: counts.size] == 0
    if np.any(uncoded & (counts > 0)):
        raise ValueError(must(owner, "symbols", "such that have a codeword", np.flatnonzero(uncoded & (counts > 0))[0]))
    bits = int(counts[: lengths.size] @ lengths[: counts.size].astype(np.int64))
    # a full lane leaves fewer bits than the longest codeword has; what is reserved in vain is never touched
    lanes = np.empty((bits // (8 * lane_bytes - int(lengths.max(initial=1)) + 1) + 1, lane_bytes), np.uint8)
    filled = 0
    for block in _encoded_pieces(symbols, lengths, lane_bytes):
        lanes[filled : filled + len(block)] = block
        filled += len(block)
    lanes.resize((filled, lane_bytes), refcheck=False)
    return lanes


def decode(lanes: Array, lengths: Array, count: int) -> Array:
    """Returns the symbols that were encoded.

    Args:
        lanes: uint8 [n, lane_bytes], as `encode` returns.
        lengths: uint8 [k], the same as for encoding.
        count: how many symbols.

    Returns:
        [count], uint8 if k <= 256, else uint16.

    Raises:
        ValueError: lengths of no complete code, lanes of another shape or dtype, a count out of range, fewer or more lanes
            than `count` symbols need, or bits between codewords that `encode` does not write.
    """
    owner = "decode"
    _check_lanes(owner, lanes, lengths)
    symbols = np.empty(_checked_count(lanes, lengths, count), np.uint8 if lengths.size <= 256 else np.uint16)
    spare = np.zeros(len(lanes), np.uint8)
    filled = before_last = 0
    for rows, found, counts, rest in _decoded_blocks(lanes, lengths):
        before_last = filled + found.size - int(counts[-1])
        if before_last >= count:
            raise ValueError(must(owner, "lanes", f"no more than {count} symbols need", len(lanes)))
        kept = found[: count - filled]
        symbols[filled : filled + kept.size] = kept
        filled += found.size
        spare[rows] = rest
    if filled < count:
        raise ValueError(must(owner, "lanes", f"long enough for {count} symbols", f"only {filled}"))
    if count:
        _check_fillers(lanes, spare)
        _check_end(lanes[-1], lengths[symbols[before_last:]].astype(np.int64).sum())
    return symbols


def emitted(lanes: Array, lengths: Array) -> int:
    """Returns how many symbols a decoder finds that is not told their number: all encoded ones, and some of zero bits.

    Args:
        lanes: uint8 [n, lane_bytes], as `encode` returns.
        lengths: uint8 [k], the same as for encoding.

    Raises:
        ValueError: lengths of no complete code, or lanes of another shape or dtype.
    """
    _check_lanes("emitted", lanes, lengths)
    return sum(found.size for _, found, _, _ in _decoded_blocks(lanes, lengths))


def _encoded_pieces(symbols: Array, lengths: Array, lane_bytes: int) -> Iterator[Uint8s]:
    """Yields all lanes of the symbols, some at a time, uint8 [n, lane_bytes]."""
    bits = 8 * lane_bytes
    codes = canonical_codes(lengths).astype(np.uint64)
    start, size = 0, max(_PIECE, 2 * bits)  # so that at least one lane is full
    while start < symbols.size:
        piece = symbols[start : start + size].astype(np.intp)
        widths = lengths[piece]
        ends = np.cumsum(widths, dtype=np.int64)
        cuts = _cuts(ends, bits, int(lengths[lengths > 0].min()))
        lasts = start + piece.size == symbols.size
        used = piece.size if lasts else cuts.pop()
        yield _packed(codes[piece], widths, ends, np.array(cuts), used, lane_bytes)
        start += used


def _cuts(ends: Array, bits: int, shortest: int) -> list[int]:
    """Returns the first symbol of each lane, from the bits up to the end of each symbol."""
    cuts, cut, done = [0], 0, 0
    numbers, most = ends.data, bits // shortest
    while True:
        cut = bisect_right(numbers, done + bits, cut, min(cut + most, len(numbers)))
        if cut == len(numbers):
            return cuts
        cuts.append(cut)
        done = numbers[cut - 1]


def _packed(codes: Array, widths: Array, ends: Array, cuts: Array, used: int, lane_bytes: int) -> Uint8s:
    """Returns lanes, uint8 [cuts, lane_bytes], of the first `used` codewords; the one that follows fills the last lane.

    Lanes are put together in words of 64 bits: from the codewords that end in a word, and the beginning of the one that
    ends in the next word.
    """
    words = -(-lane_bytes // 8)
    offsets = 64 * words * np.arange(len(cuts)) - np.where(cuts > 0, ends[cuts - 1], 0)
    last_bits = ends[:used] + np.repeat(offsets, np.diff(cuts, append=used)) - 1
    places, fills = last_bits >> 6, (last_bits & 63).astype(np.uint8) + np.uint8(1)
    shifted = codes[:used] << (np.uint8(64) - fills).astype(np.uint64)
    firsts = np.append(0, np.flatnonzero(places[1:] != places[:-1]) + 1)
    packed = np.zeros(len(cuts) * words, np.uint64)
    packed[places[firsts]] = np.bitwise_or.reduceat(shifted, firsts)
    straddling = np.flatnonzero(fills < widths[:used])  # at most one a word
    packed[places[straddling] - 1] |= codes[straddling] >> fills[straddling].astype(np.uint64)
    _fill(packed.reshape(-1, words), codes, widths, ends, np.append(cuts[1:], used), offsets, 8 * lane_bytes)
    return packed.byteswap().view(np.uint8).reshape(len(cuts), -1)[:, :lane_bytes]


def _fill(packed: Array, codes: Array, widths: Array, ends: Array, nexts: Array, offsets: Array, bits: int) -> None:
    """Writes the leading bits of the codewords that did not fit, symbols `nexts`, into the ends of their lanes."""
    nexts = nexts[nexts < codes.size]  # nothing follows the last symbol of all
    lane_starts = 64 * packed.shape[1] * np.arange(nexts.size)
    room = bits - (ends[nexts - 1] + offsets[: nexts.size] - lane_starts)
    fillers = codes[nexts] >> (widths[nexts] - room).astype(np.uint64)
    fill = np.uint64((bits - 1) % 64 + 1)  # bits of the last word that belong to the lane
    packed[: nexts.size, -1] |= fillers << (np.uint64(64) - fill)
    if fill < 64 and packed.shape[1] > 1:
        packed[: nexts.size, -2] |= fillers >> fill


def _decoded_blocks(lanes: Array, lengths: Array) -> Iterator[tuple[slice, Array, Array, Array]]:
    """Yields (which lanes, symbols, symbols of each lane, spare bits of each lane) in order, some lanes at a time."""
    if not len(lanes):
        return
    decoder = lane_decoder(lengths)
    most = 8 * lanes.shape[1] // int(lengths[lengths > 0].min())
    height = max(_BLOCK // most, min(_FEWEST_LANES, _LARGEST_BLOCK // most))
    for top in range(0, len(lanes), height):
        rows = slice(top, top + height)
        yield rows, *decoder(np.ascontiguousarray(lanes[rows]))


def _check_fillers(lanes: Array, spare: Array) -> None:
    """Checks that the spare bits at the end of each lane are the first ones of the next lane."""
    width = min(lanes.shape[1], 4)
    for top in range(0, len(lanes) - 1, _PIECE):
        bottom = min(top + _PIECE, len(lanes) - 1)
        bits = spare[top:bottom].astype(np.uint64)
        tails = _numbers(lanes[top:bottom, -width:]) & ((np.uint64(1) << bits) - np.uint64(1))
        if np.any(tails != _numbers(lanes[top + 1 : bottom + 1, :width]) >> (np.uint64(8 * width) - bits)):
            raise ValueError(must("decode", "spare bits of a lane", "the first of the next lane", "others"))


def _check_end(lane: Array, used: int) -> None:
    """Checks that only zeros follow the bits of a lane that are used."""
    if np.unpackbits(lane)[used:].any():
        raise ValueError(must("decode", "bits after the last symbol", "0", 1))


def _numbers(octets: Array) -> Array:
    """Returns rows of up to four bytes as big-endian numbers, uint64."""
    numbers: Array = np.pad(octets, ((0, 0), (8 - octets.shape[1], 0))).view(">u8")[:, 0].astype(np.uint64)
    return numbers


def _counts(symbols: Array) -> Array:
    """Returns how often each symbol occurs, int64 [1 to 65,536]."""
    counts = np.zeros(256**symbols.dtype.itemsize, np.int64)
    for piece in chunks(symbols, _PIECE):
        counts += np.bincount(piece, minlength=counts.size)
    return counts


def _check_lane_bytes(owner: str, lane_bytes: int, lengths: Array) -> None:
    least = max(-(-int(lengths.max(initial=0)) // 8), 1)
    if not least <= lane_bytes <= _LONGEST_LANE:
        raise ValueError(must(owner, "lane_bytes", f"{least} to {_LONGEST_LANE} for these codewords", lane_bytes))


def _check_lanes(owner: str, lanes: Array, lengths: Array) -> None:
    check_lengths(owner, lengths)
    if lanes.ndim != 2 or lanes.dtype != np.uint8:
        raise ValueError(must(owner, "lanes", "2-D uint8", f"{lanes.dtype} of shape {lanes.shape}"))
    _check_lane_bytes(owner, lanes.shape[1], lengths)
    if len(lanes) and not lengths.any():
        raise ValueError(must(owner, "lanes", "none, as no symbol has a codeword", len(lanes)))


def _checked_count(lanes: Array, lengths: Array, count: int) -> int:
    """Returns the count after checking that so many symbols may be in the lanes."""
    most = 8 * lanes.size // int(lengths[lengths > 0].min(initial=LONGEST))
    if not 0 <= count <= most:
        raise ValueError(must("decode", "count", f"0 to {most} with so many lanes", count))
    return count
