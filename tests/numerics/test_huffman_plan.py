"""Plans cover every element once, in order, and choose what takes fewer bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxshrink.numerics import huffman_plan
from onnxshrink.numerics.huffman_batch import decode, join
from onnxshrink.numerics.huffman_plan import Sequenced, best_kind, kind_bytes, plan

Array = np.ndarray[Any, np.dtype[Any]]


def codes(seed: int, size: int, spread: float) -> Array:
    return np.clip(np.rint(np.random.default_rng(seed).standard_normal(size) * spread), -128, 127).astype(np.int8)


def assembled(batches: list[list[Sequenced]], sizes: list[int]) -> list[Array]:
    found = [np.full(size, 99, np.int8) for size in sizes]
    for batch in batches:
        decoded, at = decode(join([sequence.coded for sequence in batch])), 0
        for sequence in batch:
            for part in sequence.parts:
                size = part.stop - part.start
                found[part.vector][part.start : part.stop] = decoded[at : at + size]
                at += size
            at += sequence.coded.spare
    return found


class TestPlan:
    @settings(max_examples=25, deadline=None)
    @given(
        st.lists(st.tuples(st.integers(1, 9000), st.sampled_from([0.1, 1.0, 6.0, 50.0])), min_size=1, max_size=7),
        st.booleans(),
    )
    def test_every_element_is_in_one_sequence(self, described: Any, tiny: bool) -> None:
        vectors = [codes(seed, *each) for seed, each in enumerate(described)]
        with pytest.MonkeyPatch.context() as patch:
            if tiny:
                patch.setattr(huffman_plan, "_CODES_PER_BATCH", 3000)
                patch.setattr(huffman_plan, "_LEAST_PART", 100)
            batches = plan(vectors, [best_kind(kind_bytes(vector)) for vector in vectors])
        assert 1 <= len(batches) <= 9
        assert all(batch for batch in batches)
        found = assembled(batches, [vector.size for vector in vectors])
        assert all(map(np.array_equal, found, vectors))

    def test_large_models_are_cut_into_batches_of_decreasing_size(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(huffman_plan, "_CODES_PER_BATCH", 1000)
        monkeypatch.setattr(huffman_plan, "_LEAST_PART", 10)
        batches = plan([codes(0, 20_000, 3.0)], ["single"])
        sizes = [sum(sequence.coded.count for sequence in batch) for batch in batches]
        assert len(sizes) == 9
        assert sizes == sorted(sizes, reverse=True)
        assert sum(sizes) == 20_000

    def test_small_alike_vectors_share_a_code_and_others_do_not(self) -> None:
        vectors = [codes(0, 500, 5.0), codes(1, 500, 0.6), codes(2, 500, 5.0)]
        (batch,) = plan(vectors, ["single"] * 3)
        assert sorted(tuple(part.vector for part in sequence.parts) for sequence in batch) == [(0, 2), (1,)]
        far = [codes(0, 50_000, 5.0), codes(1, 50_000, 20.0)]
        assert len(plan(far, ["single"] * 2)[0]) == 2

    def test_large_vectors_keep_their_own_code(self) -> None:
        assert len(plan([codes(0, 300_000, 5.0), codes(1, 300_000, 5.0)], ["single"] * 2)[0]) == 2

    def test_one_short_codeword_does_not_slow_the_rest_down(self) -> None:
        skewed = np.where(np.arange(2000) % 9, 0, 5).astype(np.int8)
        (batch,) = plan([codes(0, 400_000, 6.0), skewed], ["single", "single"])
        assert min(int(sequence.coded.lengths[0]) for sequence in batch) >= 2


class TestKinds:
    def test_runs_for_many_zeros_only(self) -> None:
        sparse = np.where(np.random.default_rng(0).random(20_000) < 0.9, 0, codes(1, 20_000, 4.0)).astype(np.int8)
        assert best_kind(kind_bytes(sparse)) == "runs"
        assert best_kind(kind_bytes(codes(0, 20_000, 5.0))) == "single"

    @pytest.mark.parametrize("kind", ["single", "runs"])
    def test_bytes_are_about_those_of_the_sequence(self, kind: Any) -> None:
        vector = np.where(np.random.default_rng(0).random(50_000) < 0.6, 0, codes(1, 50_000, 4.0)).astype(np.int8)
        (batch,) = plan([vector], [kind])
        assert batch[0].coded.nbytes == pytest.approx(kind_bytes(vector)[kind], rel=0.02)
