"""How many vectors of codes are best put into Huffman coded sequences and batches (`huffman_batch`).

Four things are chosen, each for the fewest bytes, and the last for memory:

    kind        of tokens, for each vector: single codes, or runs of zeros
    sequences   vectors that share a code: its table, and on average half a lane at its end, against bits lost because the
                distributions differ. The two whose union saves most are joined until none saves anything
    lanes       long ones leave fewer bits unused at their ends, short ones fewer at the ends of sequences
    shortest    codeword allowed. A decoder writes ⌈8 / shortest⌉ symbols for each byte, needed or not: as long as possible
    batches     of decreasing size: what a batch needs while it is decoded, some fifty bytes a code, comes on top of the four
                bytes that each code decoded before it has become; so the sum stays the same. A vector may go on in the next one
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxshrink.numerics.chunks import Array
from onnxshrink.numerics.code_lengths import coded_bits
from onnxshrink.numerics.huffman_batch import Coded, bounded_lengths, encode, table_bytes
from onnxshrink.numerics.tokens import Kind, tokenise

__all__ = ["Mapper", "Part", "Sequenced", "best_kind", "kind_bytes", "plan"]

_KINDS: tuple[Kind, ...] = ("single", "runs")
_LEAST_GAIN_OF_RUNS = 0.99
_LANES = (32, 64, 128)
_LONGEST_LANE_OF_BATCHES = 64  # the time to set up a batch grows with its steps
_LANE_LOSS = 0.3  # bytes that a lane leaves unused: about half a codeword of four or five bits
_BYTES_OF_STEPS = 10  # that the decoder needs for each byte of a lane
_BYTES_OF_SLOT = 390
_TOLERANCE = 1.002  # bytes that one slot less may cost
_MOST_SHARED = 1 << 18  # codes of a vector that may share its code: the table of a larger one weighs next to nothing
_MOST_BATCHES = 9  # ONNX Runtime folds in at most 10 steps, one a batch
_CODES_PER_BATCH = 1 << 20
_SHRINKING = 0.92  # size of a batch by that of the batch before: 1 - 4 / 50
_LEAST_PART = 1 << 16  # codes; a vector is not cut for less

Mapper = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]
Int8s = np.ndarray[Any, np.dtype[np.int8]]


@dataclass(frozen=True)
class Part:
    """Elements ``start`` to ``stop`` of vector number ``vector``."""

    vector: int
    start: int
    stop: int


@dataclass(frozen=True)
class Sequenced:
    """A coded sequence and the parts of vectors it consists of, in order."""

    coded: Coded
    parts: tuple[Part, ...]


def kind_bytes(codes: Int8s) -> dict[Kind, int]:
    """Returns the bytes of a vector's codewords and their table, for each kind of tokens that the decoder knows and that fits.

    Args:
        codes: int8 [n], n >= 1.
    """
    sizes: dict[Kind, int] = {}
    for kind in _KINDS:
        tokens = tokenise(codes.view(np.uint8), kind, 0)
        if tokens is not None:
            counts, lengths = _padded(np.bincount(tokens.tokens, minlength=tokens.advance.size), 1)
            sizes[kind] = -(-coded_bits(counts, lengths) // 8) + table_bytes(int(np.count_nonzero(lengths)), kind == "runs")
    return sizes


def best_kind(sizes: Mapping[Kind, int]) -> Kind:
    """Returns the kind of tokens to use; runs only where they save so much that the tables they need pay."""
    return "runs" if sizes.get("runs", np.inf) < _LEAST_GAIN_OF_RUNS * sizes["single"] else "single"


def plan(vectors: Sequence[Int8s], kinds: Sequence[Kind], mapper: Mapper = map) -> list[list[Sequenced]]:
    """Returns batches of sequences in which all elements of all vectors are.

    Args:
        vectors: int8, flat, none empty.
        kinds: of tokens, for each vector.
        mapper: maps a function over sequences, for work in parallel.
    """
    histograms = [_histogram(vector, kind) for vector, kind in zip(vectors, kinds, strict=True)]
    groups = _groups(vectors, kinds)
    bits = sum(coded_bits(*_padded(counts, 1)) for counts in histograms)
    batches = _batches(groups, [vector.size for vector in vectors])
    lanes = _LANES if len(batches) == 1 else [lane for lane in _LANES if lane <= _LONGEST_LANE_OF_BATCHES]
    lane_bytes = min(lanes, key=lambda lane: _lane_cost(lane, bits // 8, len(groups)))
    shortest = _shortest(histograms)

    def coded(parts: Sequence[Part]) -> Sequenced:
        codes = np.concatenate([vectors[part.vector][part.start : part.stop] for part in parts])
        return Sequenced(encode(codes, lane_bytes, kinds[parts[0].vector], shortest), tuple(parts))

    done = iter(mapper(coded, [parts for batch in batches for parts in batch]))
    return [[next(done) for _ in batch] for batch in batches]


def _histogram(vector: Int8s, kind: Kind) -> Array:
    tokens = tokenise(vector.view(np.uint8), kind, 0)
    assert tokens is not None, "no more than 4096 different tokens"
    return np.bincount(tokens.tokens, minlength=tokens.advance.size)


def _padded(counts: Array, shortest: int) -> tuple[Array, Array]:
    """Returns counts and codeword lengths of equal size."""
    lengths = bounded_lengths(counts, shortest)
    return np.pad(counts, (0, lengths.size - counts.size)), lengths


def _groups(vectors: Sequence[Int8s], kinds: Sequence[Kind]) -> list[list[int]]:
    """Returns which vectors share a code, each group and the groups in the order of vectors."""
    described = enumerate(zip(vectors, kinds, strict=True))
    small = [index for index, (vector, kind) in described if kind == "single" and vector.size <= _MOST_SHARED]
    counts = np.array([np.bincount(vectors[index].view(np.uint8), minlength=256) for index in small]).reshape(-1, 256)
    counts = counts[:, counts.any(axis=0)]  # a few dozen: the time of what follows goes with them
    members = [[index] for index in small]
    costs = _cost(counts)
    unions = [_cost(counts[row] + counts) for row in range(len(counts))]
    savings = np.array([costs[row] + costs - union for row, union in enumerate(unions)]).reshape(len(counts), len(counts))
    np.fill_diagonal(savings, -np.inf)
    while savings.size and savings.max() > 0:
        one, other = sorted(divmod(int(savings.argmax()), len(counts)))
        members[one] += members[other]
        members[other] = []
        counts[one] += counts[other]
        costs[one] = _cost(counts[one : one + 1])[0]
        savings[other], savings[:, other] = -np.inf, -np.inf
        alive = np.flatnonzero([bool(group) for group in members])
        row = np.full(len(counts), -np.inf)
        row[alive] = costs[one] + costs[alive] - _cost(counts[one] + counts[alive])
        row[one] = -np.inf
        savings[one], savings[:, one] = row, row
    shared = [sorted(group) for group in members if group]
    alone = [[index] for index in range(len(vectors)) if index not in set(small)]
    return sorted([*shared, *alone])


def _cost(counts: Array) -> Array:
    """Returns about how many bytes codes of these histograms [n, 256] take as one sequence each, float64 [n]."""
    total = counts.sum(axis=1, keepdims=True)
    bits = (counts * np.log2(np.maximum(total, 1) / np.maximum(counts, 1))).sum(axis=1)
    leaves = np.count_nonzero(counts, axis=1)
    return np.asarray(bits / 8 + 1.25 * leaves + 4 + 32)


def _lane_cost(lane: int, nbytes: int, sequences: int) -> float:
    """Returns the bytes that lanes of this size cost: unused ends of lanes and of sequences, and the steps of the decoder."""
    return nbytes / lane * _LANE_LOSS + sequences * lane / 2 + lane * _BYTES_OF_STEPS


def _shortest(histograms: Sequence[Array]) -> int:
    """Returns the bits that the shortest codeword should have at least."""
    totals = {}
    for shortest in (1, 2, 3, 4):
        bits = sum(coded_bits(*_padded(counts, shortest)) for counts in histograms)
        totals[shortest] = bits / 8 + -(-8 // shortest) * _BYTES_OF_SLOT
    return max(bits for bits, total in totals.items() if total <= _TOLERANCE * min(totals.values()))


def _batches(groups: list[list[int]], sizes: list[int]) -> list[list[list[Part]]]:
    """Returns batches of sequences of parts."""
    total = sum(sizes)
    count = min(max(total // _CODES_PER_BATCH, 1), _MOST_BATCHES)
    weights = _SHRINKING ** np.arange(count)
    targets = np.diff(np.round(total * np.cumsum(weights) / weights.sum()), prepend=0).astype(np.int64).tolist()
    batches: list[list[list[Part]]] = [[]]
    room = targets.pop(0)
    for group in groups:
        batches[-1].append([])
        for vector in group:
            start = 0
            while start < sizes[vector]:
                if room < _LEAST_PART and targets:
                    room += targets.pop(0)
                    if batches[-1][-1] or len(batches[-1]) > 1:
                        batches.append([[]])
                stop = min(sizes[vector], start + room) if targets else sizes[vector]
                if sizes[vector] - stop < _LEAST_PART:
                    stop = sizes[vector]
                batches[-1][-1].append(Part(vector, start, stop))
                room -= stop - start
                start = stop
    return [[parts for parts in batch if parts] for batch in batches]
