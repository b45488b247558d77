"""Three ways to turn a sequence of codes into symbols for an entropy coder; which is shortest depends on the codes.

    single   a token is a code
    pair     a token is a code and the next one: brings skewed codes nearer to their entropy
    runs     a token is r zeros, 0 <= r <= R, and a code; that is a zero only if r = R, or at the end

Runs are those of Deep Compression (arXiv 1510.00149, section 3). All three kinds decode alike. The output is filled with
the zero code first; then each token in turn writes a few codes from the current position on, and moves it:

    output[position + offsets[token, i]] = values[token, i]        position += advance[token]

The last pair may reach beyond the end: what it writes there is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from onnxshrink.errors import must
from onnxshrink.numerics.chunks import CHUNK, Array
from onnxshrink.numerics.code_lengths import code_lengths, coded_bits

__all__ = ["KINDS", "MOST_TOKENS", "Kind", "Tokens", "detokenise", "forms", "tokenise", "total_bytes"]

Uint8s = np.ndarray[Any, np.dtype[np.uint8]]
Kind = Literal["single", "pair", "runs"]

KINDS: tuple[Kind, ...] = get_args(Kind)
MOST_TOKENS = 4096  # distinct ones; tables for more would rarely be worth their bytes

_LONGEST_RUNS = (3, 7, 15, 31, 63)  # R of which the best is taken; a power of two less one, so shifts divide
_PIECE = CHUNK >> 3  # codes or tokens that are converted together; even, for pairs


@dataclass(frozen=True)
class Tokens:
    """A sequence of tokens, and what each token stands for.

    Attributes:
        kind: of the tokens.
        zero: the code of positions that no token writes.
        tokens: uint16 [m], below k.
        advance: int32 [k], by how many positions a token moves on.
        values: uint8 [k, width], the codes that a token writes.
        offsets: uint8 [k, width], how far from the current position it writes them.
    """

    kind: Kind
    zero: int
    tokens: np.ndarray[Any, np.dtype[np.uint16]]
    advance: np.ndarray[Any, np.dtype[np.int32]]
    values: Uint8s
    offsets: Uint8s

    @property
    def table_bytes(self) -> int:
        """The bytes of the codeword lengths, and of the codes and runs unless a token is its code."""
        return _table_bytes(self.kind, self.advance.size)


def tokenise(codes: Array, kind: Kind, zero: int) -> Tokens | None:
    """Returns the codes as tokens; None if there are more than 4096 different ones.

    Args:
        codes: uint8 [n].
        kind: of tokens.
        zero: the code that runs are made of, best the most frequent one; it also completes the last pair.

    Raises:
        ValueError: codes of another shape or dtype, another kind, or a zero code out of range.
    """
    _check_codes("tokenise", codes, zero)
    if kind not in KINDS:
        raise ValueError(must("tokenise", "kind", f"one of {', '.join(KINDS)}", repr(kind)))
    run, counts = _cheapest_histogram(codes, kind, zero)
    keys = _keys(kind, counts)
    if keys.size > MOST_TOKENS:
        return None
    numbers = np.zeros(counts.size, np.uint16)
    numbers[keys] = np.arange(keys.size)
    tokens, filled = np.empty(counts.sum(), np.uint16), 0
    for piece in _raw_tokens(codes, kind, zero, run):
        tokens[filled : filled + piece.size] = numbers[piece]
        filled += piece.size
    high, low = (keys >> 8).astype(np.int32), keys.astype(np.uint8)
    if kind == "pair":
        values = np.stack([high.astype(np.uint8), low], axis=1)
        offsets = np.tile(np.arange(2, dtype=np.uint8), (keys.size, 1))
        return Tokens(kind, zero, tokens, np.full(keys.size, 2, np.int32), values, offsets)
    return Tokens(kind, zero, tokens, high + 1, low[:, None], high.astype(np.uint8)[:, None])


def detokenise(tokens: Array, table: Tokens, count: int) -> Uint8s:
    """Returns the codes that tokens stand for.

    Args:
        tokens: integers [m].
        table: says what they stand for; its own tokens are not looked at.
        count: how many codes.

    Raises:
        ValueError: a token that is not in the table, or tokens that do not end with the last code.
    """
    owner = "detokenise"
    known = table.advance.size
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < known:
        raise ValueError(must(owner, "tokens", f"below {known}", tokens.max()))
    steps = table.advance[tokens[-1:]].sum()
    moved = sum(int(table.advance[tokens[at : at + _PIECE]].sum()) for at in range(0, tokens.size, _PIECE))
    if moved < count or (tokens.size and moved - steps >= count):
        raise ValueError(must(owner, "tokens", f"just enough for {count} codes", f"tokens for {moved}"))
    codes = np.full(moved, table.zero, np.uint8)
    start = 0
    for at in range(0, tokens.size, _PIECE):
        piece = tokens[at : at + _PIECE].astype(np.intp)
        ends = start + np.cumsum(table.advance[piece], dtype=np.int64)
        begins = ends - table.advance[piece]
        for values, offsets in zip(table.values.T, table.offsets.T, strict=True):
            codes[begins + offsets[piece]] = values[piece]
        start = int(ends[-1])
    return codes[:count]


def total_bytes(tokens: Tokens, limit: int = 15) -> int:
    """Returns the bytes of the Huffman coded tokens, without what lanes leave unused, and of their tables.

    Args:
        tokens: any.
        limit: longest codeword allowed.

    Raises:
        ValueError: a limit that `code_lengths` refuses.
    """
    counts = np.bincount(tokens.tokens, minlength=tokens.advance.size)
    return _stream_bytes(counts, limit) + tokens.table_bytes


def forms(codes: Array, zero: int) -> dict[Kind, int]:
    """Returns what `total_bytes` gives for each kind of tokens, without kinds that need too many different ones.

    Args:
        codes: uint8 [n].
        zero: the code that runs are made of.

    Raises:
        ValueError: codes of another shape or dtype, or a zero code out of range.
    """
    _check_codes("forms", codes, zero)
    sizes = {kind: _bytes(kind, _cheapest_histogram(codes, kind, zero)[1]) for kind in KINDS}
    return {kind: size for kind, size in sizes.items() if size is not None}


def _cheapest_histogram(codes: Array, kind: Kind, zero: int) -> tuple[int, Array]:
    """Returns the best longest run, 0 for other kinds, and how often each raw token occurs, int64."""
    if kind != "runs":
        counts = np.zeros(1 << 8 if kind == "single" else 1 << 16, np.int64)
        for piece in _raw_tokens(codes, kind, zero, 0):
            counts += np.bincount(piece, minlength=counts.size)
        return 0, counts
    candidates = [(run, np.zeros(256 * (run + 1), np.int64)) for run in _LONGEST_RUNS]
    for zeros, piece in _zeros_and_codes(codes, zero):
        for run, counts in candidates:
            counts[256 * run + zero] += (zeros >> run.bit_length()).sum()
            counts += np.bincount(((zeros & run) << 8) | piece, minlength=counts.size)
    return min(candidates, key=lambda candidate: _bytes(kind, candidate[1]) or math.inf)


def _keys(kind: Kind, counts: Array) -> Array:
    """Returns the raw token of each token, int64 ascending: those that occur, or all codes up to the last that does."""
    used = np.flatnonzero(counts)
    return np.arange(used[-1:].sum() + used[-1:].size) if kind == "single" else used


def _bytes(kind: Kind, counts: Array) -> int | None:
    """Returns the total bytes of tokens that occur so often; None if there are too many different ones."""
    keys = _keys(kind, counts)
    return None if keys.size > MOST_TOKENS else _stream_bytes(counts[keys], 15) + _table_bytes(kind, keys.size)


def _stream_bytes(counts: Array, limit: int) -> int:
    return -(-coded_bits(counts, code_lengths(counts, limit)) // 8)


def _table_bytes(kind: Kind, tokens: int) -> int:
    return tokens if kind == "single" else 3 * tokens


def _raw_tokens(codes: Array, kind: Kind, zero: int, run: int) -> Iterator[Array]:
    """Yields pieces of integers: code, 256 · code + next code, or 256 · zeros + code."""
    if kind == "runs":
        for zeros, piece in _zeros_and_codes(codes, zero):
            ends = np.cumsum((zeros >> run.bit_length()) + 1)
            tokens = np.full(ends[-1:].sum(), 256 * run + zero, np.uint16)
            tokens[ends - 1] = ((zeros & run) << 8) | piece
            yield tokens
        return
    for at in range(0, codes.size, _PIECE):
        piece = codes[at : at + _PIECE]
        if kind == "pair":
            seconds = np.pad(piece[1::2], (0, piece.size % 2), constant_values=zero)
            piece = (piece[::2].astype(np.uint16) << np.uint16(8)) | seconds
        yield piece


def _zeros_and_codes(codes: Array, zero: int) -> Iterator[tuple[Array, Array]]:
    """Yields pieces of (how many zeros are before, code), int64 and uint8, for all other codes and a zero at the end."""
    pending = 0
    for at in range(0, codes.size, _PIECE):
        piece = codes[at : at + _PIECE]
        places = np.flatnonzero(piece != zero)
        zeros = np.diff(places, prepend=-1 - pending) - 1
        pending = piece.size - 1 - int(places[-1]) if places.size else pending + piece.size
        yield zeros, piece[places]
    if pending:
        yield np.array([pending - 1]), np.array([zero], np.uint8)


def _check_codes(owner: str, codes: Array, zero: int) -> None:
    if codes.ndim != 1 or codes.dtype != np.uint8:
        raise ValueError(must(owner, "codes", "1-D uint8", f"{codes.dtype} of shape {codes.shape}"))
    if not 0 <= zero <= 255:
        raise ValueError(must(owner, "zero", "between 0 and 255", zero))
