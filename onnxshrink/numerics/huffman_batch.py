"""Several sequences of codes as one block of bytes that a finite-state machine can decode all at once.

Each sequence has a code of its own, of single codes or of runs of zeros and a code (`tokens`), and lanes of its own
(`huffman`). What the machine needs is kept as it reads it:

    stream    uint8 [lane_bytes · lanes]: the first byte of each lane, then the second byte of each, and so on; the first bit
              of a codeword is the lowest of its byte
    tree      uint8: the children of all inner nodes of the code trees, tree after tree, breadth first, a bit for each, 1 for a
              leaf, filled up with ones. On each level leaves come first. Item j of n has bits j, n + j, 2n + j, ...
    values    int8 [1 + leaves]: 0, then what each leaf stands for, in this order
    moves     uint8 [1 + leaves]: 0, then by how many positions it moves on; it writes its value at the last of them. None if
              all of them are 1

The bits of a lane after the last codeword that fits, and the zeros at the end of a sequence, are as `huffman.encode` writes
them. The zeros decode to codes too: the batch says how many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxshrink.errors import must
from onnxshrink.numerics.chunks import Array
from onnxshrink.numerics.code_lengths import LONGEST, canonical_order, code_lengths
from onnxshrink.numerics.huffman import emitted
from onnxshrink.numerics.huffman import encode as encode_lanes
from onnxshrink.numerics.lane_decoders import lane_decoder
from onnxshrink.numerics.tokens import Kind, tokenise

__all__ = ["Batch", "Coded", "bounded_lengths", "decode", "encode", "join", "table_bytes"]

Uint8s = np.ndarray[Any, np.dtype[np.uint8]]
Int8s = np.ndarray[Any, np.dtype[np.int8]]
Int32s = np.ndarray[Any, np.dtype[np.int32]]

_LIMIT = 15  # bits of a codeword; longer ones would save nothing to speak of
_REVERSED = np.packbits(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)[:, ::-1], axis=1)[:, 0]


@dataclass(frozen=True)
class Coded:
    """One sequence.

    Attributes:
        lanes: uint8 [n, lane_bytes], as `huffman.encode` returns.
        lengths: uint8 [k] ascending, of the codewords in canonical order; k >= 2.
        values: int8 [k], what they stand for.
        moves: uint8 [k], by how many positions they move on.
        count: codes.
        spare: how many positions the zeros after the last codeword move on.
    """

    lanes: Uint8s
    lengths: Uint8s
    values: Int8s
    moves: Uint8s
    count: int
    spare: int

    @property
    def nbytes(self) -> int:
        """Bytes of the lanes and, about, of what else the batch holds for this sequence."""
        return self.lanes.size + table_bytes(self.lengths.size, bool(self.moves.max() > 1))


@dataclass(frozen=True)
class Batch:
    """Sequences joined; see the module.

    Attributes:
        stream: bytes of all lanes.
        tree: bits of all trees.
        values: of all leaves.
        moves: of all leaves, or None.
        lane_starts: int32 [sequences], the first lane of each.
        root_steps: int32 [sequences], how many inner nodes the tree before has; 0 for the first.
        lanes: how many.
        length: how many positions all codewords, those of zeros at the ends included, move on.
    """

    stream: Uint8s
    tree: Uint8s
    values: Int8s
    moves: Uint8s | None
    lane_starts: Int32s
    root_steps: Int32s
    lanes: int
    length: int


def encode(codes: Int8s, lane_bytes: int, kind: Kind, shortest: int = 1) -> Coded:
    """Returns a sequence of codes in Huffman's code.

    Args:
        codes: int8 [n], n >= 1.
        lane_bytes: bytes of a lane, at least 2.
        kind: "single", or "runs" of zeros if `tokenise` takes them.
        shortest: bits that the shortest codeword shall have at least, 1 to 8.
    """
    tokens = tokenise(codes.view(np.uint8), kind, 0)
    assert tokens is not None, "no more than 4096 different tokens"
    lengths = bounded_lengths(np.bincount(tokens.tokens, minlength=tokens.advance.size), shortest)
    lanes = encode_lanes(tokens.tokens, lengths, lane_bytes)
    order = canonical_order(lengths)
    surplus = emitted(lanes, lengths) - tokens.tokens.size
    unused = lengths.size - tokens.advance.size
    values = np.pad(tokens.values[:, 0], (0, unused)).view(np.int8)[order]
    moves = np.pad(tokens.advance, (0, unused), constant_values=1).astype(np.uint8)[order]
    moved = int(tokens.advance[tokens.tokens].sum()) + surplus * int(moves[0])
    return Coded(lanes, lengths[order], values, moves, codes.size, moved - codes.size)


def bounded_lengths(counts: Array, shortest: int) -> Uint8s:
    """Returns the lengths of a complete code of two codewords or more, none below a bound.

    Codewords below it are made longer, and symbols that do not occur take what that leaves free.

    Args:
        counts: integers [k], how often each symbol occurs.
        shortest: the bound, 1 to 8.

    Returns:
        uint8 [k or more], the lengths of the unused symbols at the end.
    """
    lengths = code_lengths(counts, _LIMIT)
    lengths[lengths > 0] = np.maximum(lengths[lengths > 0], shortest)
    free = (1 << _LIMIT) - int((1 << (_LIMIT - lengths[lengths > 0].astype(np.int64))).sum())
    wide, rest = divmod(free, 1 << (_LIMIT - shortest))
    filling = [bits for bits in range(shortest + 1, _LIMIT + 1) if rest >> (_LIMIT - bits) & 1]
    return np.append(lengths, np.array([shortest] * wide + filling, np.uint8))


def table_bytes(leaves: int, has_runs: bool) -> int:
    """Returns about how many bytes a code of so many codewords takes beside its lanes: leaves, two bits a leaf, two numbers."""
    return leaves * (2 if has_runs else 1) + leaves // 4 + 4


def join(sequences: Sequence[Coded]) -> Batch:
    """Returns the batch of at least one sequence; all lanes must be of equal size."""
    trees = [_tree(sequence.lengths) for sequence in sequences]
    tree = np.concatenate(trees)
    padding = -tree.size % 8
    tree = np.pad(tree, (0, padding), constant_values=1)
    bits = np.packbits(tree.reshape(8, -1).T, axis=1, bitorder="little")[:, 0]
    values = np.concatenate([[0], *(sequence.values for sequence in sequences), np.zeros(padding)]).astype(np.int8)
    moves = np.concatenate([[0], *(sequence.moves for sequence in sequences), np.ones(padding)]).astype(np.uint8)
    lanes = np.concatenate([sequence.lanes for sequence in sequences])
    starts = np.cumsum([0, *(len(sequence.lanes) for sequence in sequences)])
    steps = [0, *(part.size // 2 for part in trees)]
    return Batch(
        stream=np.ascontiguousarray(_REVERSED[lanes].T).reshape(-1),
        tree=bits,
        values=values,
        moves=moves if moves.max() > 1 else None,
        lane_starts=starts[:-1].astype(np.int32),
        root_steps=np.array(steps[:-1], np.int32),
        lanes=len(lanes),
        length=sum(sequence.count + sequence.spare for sequence in sequences),
    )


def decode(batch: Batch) -> Int8s:
    """Returns all codes, int8 [length], what the zeros at the ends decode to included.

    Raises:
        ValueError: parts that do not fit each other.
    """
    owner = "batch"
    starts, ends = batch.lane_starts, np.append(batch.lane_starts[1:], batch.lanes)
    if batch.lanes < 1 or batch.stream.size % batch.lanes or not starts.size or starts[0] or np.any(starts >= ends):
        raise ValueError(must(owner, "lane_starts", f"ascending from 0 and below {batch.lanes}", starts.tolist()[:9]))
    lanes = _REVERSED[batch.stream.reshape(-1, batch.lanes).T]
    trees = _lengths(batch)
    moves = np.ones_like(batch.values, np.uint8) if batch.moves is None else batch.moves
    if moves.size != batch.values.size or sum(map(len, trees)) >= batch.values.size:
        raise ValueError(must(owner, "values and moves", "one for each leaf", f"{batch.values.size} and {moves.size}"))
    most = 8 * batch.stream.size * int(moves.max())
    if not 0 < batch.length <= most:
        raise ValueError(must(owner, "length", f"1 to {most} with so many bytes", batch.length))
    codes = np.zeros(batch.length, np.int8)
    leaf, filled = 1, 0
    for start, end, lengths in zip(starts, ends, trees, strict=True):
        ranks = lane_decoder(lengths)(np.ascontiguousarray(lanes[start:end]))[0]
        leaves = slice(leaf, leaf + lengths.size)
        leaf += lengths.size
        steps = moves[leaves].astype(np.int64)[ranks]
        stop = filled + int(steps.sum())
        if stop > batch.length:
            raise ValueError(must(owner, "codewords", f"for {batch.length} codes", "more"))
        if batch.moves is None:
            codes[filled:stop] = batch.values[leaves][ranks]
        else:
            codes[filled + np.cumsum(steps) - 1] = batch.values[leaves][ranks]
        filled = stop
    if filled != batch.length:
        raise ValueError(must(owner, "codewords", f"for {batch.length} codes", f"for {filled}"))
    return codes


def _tree(lengths: Uint8s) -> Uint8s:
    """Returns which nodes but the root are leaves, breadth first, uint8 [2 · (k - 1)]."""
    counts = np.bincount(lengths, minlength=LONGEST + 1)
    parts, inner = [], 1
    for leaves in counts[1 : int(lengths[-1]) + 1].tolist():
        inner = 2 * inner - leaves
        parts.append(np.repeat(np.array([1, 0], np.uint8), [leaves, inner]))
    return np.concatenate(parts)


def _lengths(batch: Batch) -> list[Uint8s]:
    """Returns the lengths of the codewords of each sequence, ascending."""
    bits = np.unpackbits(batch.tree[:, None], axis=1, bitorder="little").T.reshape(-1)
    roots = 2 * np.cumsum(batch.root_steps, dtype=np.int64)
    if roots.size != batch.lane_starts.size or roots[0] != 0:
        raise ValueError(must("batch", "root_steps", "0 first, and one for each sequence", batch.root_steps.tolist()[:9]))
    found = []
    for at, following in zip(roots, [*roots[1:], None], strict=True):
        level, depth, lengths = 2, 0, []
        while level and depth < LONGEST and at + level <= bits.size and at >= 0:
            nodes, depth = bits[at : at + level], depth + 1
            leaves = int(nodes.sum())
            if not nodes[:leaves].all():
                break
            lengths.append(np.full(leaves, depth, np.uint8))
            at, level = at + level, 2 * (level - leaves)
        if level or (following is not None and at != following):
            raise ValueError(must("batch", "tree", "of complete codes, leaves before inner nodes", "another"))
        found.append(np.concatenate(lengths))
    return found
