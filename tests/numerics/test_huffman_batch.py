"""Batches of Huffman coded sequences, against a decoder that walks the tree bit by bit as the format is described."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxshrink.numerics.code_lengths import coded_bits
from onnxshrink.numerics.huffman_batch import Batch, bounded_lengths, decode, encode, join

Array = np.ndarray[Any, np.dtype[Any]]


def codes(seed: int, size: int, spread: float) -> Array:
    return np.clip(np.rint(np.random.default_rng(seed).standard_normal(size) * spread), -128, 127).astype(np.int8)


def walked(batch: Batch) -> list[list[int]]:
    """Returns the codes of each sequence, what the zeros at its end decode to included."""
    lane_bytes = batch.stream.size // batch.lanes
    plane = [int(byte) >> bit & 1 for bit in range(8) for byte in batch.tree]
    is_leaf = dict(enumerate(plane))
    leaf_of, inner_of, leaves, inner = {}, {}, 0, 0
    roots = np.cumsum(batch.root_steps).tolist()
    for child in range(len(plane)):
        if child // 2 in roots and child % 2 == 0:
            inner = child // 2 + 1
        if is_leaf[child]:
            leaves += 1
            leaf_of[child] = leaves
        else:
            inner_of[child], inner = inner, inner + 1
    starts = [*batch.lane_starts.tolist(), batch.lanes]
    found = []
    for root, first, last in zip(roots, starts, starts[1:], strict=False):
        sequence: list[int] = []
        for lane in range(first, last):
            state = root
            for step in range(lane_bytes):
                for bit in range(8):
                    child = 2 * state + (int(batch.stream[step * batch.lanes + lane]) >> bit & 1)
                    if is_leaf[child]:
                        leaf = leaf_of[child]
                        moves = int(batch.moves[leaf]) if batch.moves is not None else 1
                        sequence += [0] * (moves - 1) + [int(batch.values[leaf])]
                        state = root
                    else:
                        state = inner_of[child]
        found.append(sequence)
    return found


class TestRoundTrip:
    @settings(max_examples=40, deadline=None)
    @given(
        st.lists(
            st.tuples(st.integers(1, 400), st.sampled_from([0.0, 0.3, 1.0, 4.0, 60.0]), st.sampled_from(["single", "runs"])),
            min_size=1,
            max_size=4,
        ),
        st.integers(2, 40),
        st.integers(1, 4),
        st.integers(0, 99),
    )
    def test_decodes_to_what_was_encoded_also_bit_by_bit(self, kinds: Any, lane_bytes: int, shortest: int, seed: int) -> None:
        vectors = [codes(seed + index, size, spread) for index, (size, spread, _) in enumerate(kinds)]
        parts = [encode(vector, lane_bytes, kind, shortest) for vector, (_, _, kind) in zip(vectors, kinds, strict=True)]
        batch = join(parts)
        found, at = decode(batch), 0
        assert found.size == batch.length
        for vector, part, slow in zip(vectors, parts, walked(batch), strict=True):
            assert part.count == vector.size
            assert found[at : at + vector.size].tolist() == vector.tolist()
            assert found[at : at + part.count + part.spare].tolist() == slow
            assert part.lengths.min() >= shortest
            at += part.count + part.spare

    def test_moves_are_kept_only_if_there_are_runs(self) -> None:
        assert join([encode(codes(0, 100, 2.0), 8, "single")]).moves is None
        assert join([encode(codes(0, 100, 0.1), 8, "runs")]).moves is not None


class TestBoundedLengths:
    @given(st.lists(st.integers(0, 1000), min_size=1, max_size=40).filter(any), st.integers(1, 8))
    def test_code_is_complete_and_no_codeword_is_shorter(self, counts: list[int], shortest: int) -> None:
        lengths = bounded_lengths(np.array(counts), shortest)
        used = lengths[lengths > 0].astype(int)
        assert used.min() >= min(shortest, 8)
        assert used.size >= 2
        assert sum(2.0**-used) == 1.0
        assert ((lengths[: len(counts)] > 0) == (np.array(counts) > 0)).all()

    def test_bound_of_one_changes_nothing(self) -> None:
        counts = np.array([7, 1, 0, 2])
        lengths = bounded_lengths(counts, 1)
        assert lengths.tolist() == [1, 2, 0, 2]
        assert coded_bits(counts, lengths) == 13


class TestDamage:
    @settings(max_examples=150, deadline=None)
    @given(st.data())
    def test_is_an_error_or_other_codes_but_nothing_else(self, data: st.DataObject) -> None:
        parts = [encode(codes(seed, 60, 2.0), 8, kind) for seed, kind in enumerate(("single", "runs"))]
        batch = join(parts)
        fields = ["stream", "tree", "values", "moves", "lane_starts", "root_steps", "lanes", "length"]
        field = data.draw(st.sampled_from(fields))
        value = getattr(batch, field)
        if isinstance(value, int):
            damaged = data.draw(st.sampled_from([-1, 0, value - 1, value + 1, 1 << 50]))
        elif data.draw(st.booleans()):
            damaged = value[: data.draw(st.integers(0, value.size))]
        else:
            damaged = value.copy()
            damaged[data.draw(st.integers(0, value.size - 1))] ^= data.draw(st.integers(1, 127))
        try:
            assert decode(replace(batch, **{field: damaged})).dtype == np.int8
        except ValueError as error:
            assert "\n" not in str(error)

    @pytest.mark.parametrize("change", [{"length": 59}, {"length": 61}, {"lanes": 1}])
    def test_of_the_numbers_is_refused(self, change: dict[str, int]) -> None:
        batch = join([encode(codes(0, 60, 2.0), 8, "single")])
        assert decode(batch).size == batch.length
        change = {key: value + (batch.length - 60 if key == "length" else 0) for key, value in change.items()}
        with pytest.raises(ValueError, match="must be"):
            decode(replace(batch, **change))
