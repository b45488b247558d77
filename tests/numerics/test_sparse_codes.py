"""Tests of where the values of a sparse tensor are: gaps and patterns lead back to the mask, and are as small as promised."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxshrink.numerics.sparse_codes import best_gap_bits, best_patterns, gap_codes, set_bits

masks = st.builds(
    lambda shape, share, seed: np.random.default_rng(seed).random(shape) < share,
    st.sampled_from([(1,), (700,), (13, 40), (40, 13), (8, 3, 3, 3), (2, 6, 50), (1, 1), (5, 0), ()]),
    st.sampled_from([0.0, 0.003, 0.1, 0.5, 1.0]),
    st.integers(0, 99),
)


def bits_of_gaps(stored, bits, itemsize):
    gaps, _ = gap_codes(stored.reshape(-1), bits)
    return gaps.size * (bits + 8 * itemsize)


def mask_of(patterns):
    """Puts the blocks of patterns side by side, one after the other."""
    (rows, columns), (height, width), (down, across) = patterns.matrix, patterns.block, patterns.grid
    whole = np.zeros((down * height, across * width), bool)
    for number, code in enumerate(patterns.codes):
        top, left = height * (number // across), width * (number % across)
        whole[top : top + height, left : left + width] = patterns.table[code].reshape(height, width)
    return whole[:rows, :columns]


class TestSetBits:
    @pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
    def test_only_positive_zero_has_none(self, dtype):
        values = np.array([[0.0, -0.0, np.nan], [np.inf, 1e-7, 0.0]], dtype)
        assert set_bits(values).tolist() == [[False, True, True], [True, True, False]]
        assert set_bits(values.T).tolist() == [[False, True], [True, True], [True, False]]

    def test_of_a_scalar_and_of_nothing(self):
        assert set_bits(np.float32(2)).shape == ()
        assert set_bits(np.zeros((3, 0), np.float32)).shape == (3, 0)


class TestGaps:
    @given(masks, st.integers(2, 8))
    def test_lead_to_all_that_is_stored_and_to_fillers(self, mask, bits):
        gaps, places = gap_codes(mask.reshape(-1), bits)
        assert gaps.dtype == np.uint8
        assert gaps.max(initial=0) < 2**bits
        assert np.array_equal(np.cumsum(gaps.astype(int)), places)
        assert len(set(places.tolist())) == len(places)
        stored = np.flatnonzero(mask)
        assert set(stored) <= set(places.tolist())
        assert len(places) <= len(stored) + mask.size // (2**bits - 1)
        assert not len(places) or places[-1] == stored[-1]

    @given(masks, st.sampled_from([2, 4, 8]))
    def test_of_the_chosen_width_are_the_smallest(self, mask, itemsize):
        chosen = best_gap_bits(mask.reshape(-1), itemsize)
        sizes = {bits: bits_of_gaps(mask, bits, itemsize) for bits in range(2, 9)}
        assert sizes[chosen] == min(sizes.values())

    @pytest.mark.parametrize("share", [0.03, 0.1, 0.15])
    def test_take_a_third_more_than_the_entropy_of_places(self, share):
        mask = np.random.default_rng(0).random(100_000) < share
        entropy = -(share * np.log2(share) + (1 - share) * np.log2(1 - share))
        bits = bits_of_gaps(mask, best_gap_bits(mask, 4), 4) - 32 * np.count_nonzero(mask)
        assert entropy * mask.size * 0.95 < bits < entropy * mask.size * 1.34


class TestPatterns:
    @given(masks, st.sampled_from([2, 4, 8]))
    def test_cover_what_is_stored_in_fewer_bytes_than_a_mask(self, mask, itemsize):
        found = best_patterns(mask, itemsize)
        if found is None:
            return
        covered = mask_of(found).reshape(mask.shape)
        assert np.all(covered | ~mask)
        assert found.nbytes(itemsize) < mask.size / 8 + itemsize * np.count_nonzero(mask)
        assert np.array_equal(covered, found.stored.reshape(mask.shape))
        assert len(found.table) <= 2**found.bits <= 256

    @pytest.mark.parametrize(("n", "m", "bits"), [(2, 4, 3), (1, 4, 2), (4, 8, 7), (1, 8, 3), (1, 16, 4)])
    @pytest.mark.parametrize("axis", [0, 1])
    def test_of_n_in_m(self, n, m, bits, axis):
        order = np.argsort(np.random.default_rng(0).random((320, 320 // m, m)), axis=2)
        mask = (order < n).reshape(320, 320)
        found = best_patterns(mask.T if axis == 0 else mask, 4)
        assert found is not None
        assert 8 * found.codes.size * found.bits / mask.size <= 8 * bits / m
        assert np.count_nonzero(found.stored) == np.count_nonzero(mask)

    @pytest.mark.parametrize("block", [(1, 4), (4, 1), (16, 1), (5, 3), (1, 200), (150, 1), (32, 32)])
    def test_of_blocks_are_a_bit_each(self, block):
        down, across = -(-150 // block[0]), -(-200 // block[1])
        blocks = np.random.default_rng(1).random((down, across)) < 0.5
        mask = np.kron(blocks, np.ones(block))[:150, :200] > 0
        found = best_patterns(mask, 4)
        assert found is not None
        assert np.array_equal(found.stored.reshape(mask.shape), mask)
        assert found.nbytes(4) - 4 * np.count_nonzero(mask) <= down * across / 8 + 2 * np.prod(block)

    def test_bear_a_few_zeros_among_what_is_stored(self):
        """Kept weights may be zero by chance: blocks with one are covered by full ones, and store a zero."""
        rng = np.random.default_rng(2)
        mask = np.kron(rng.random((100, 50)) < 0.5, np.ones((1, 4))) > 0
        mask &= rng.random(mask.shape) > 0.001
        found = best_patterns(mask, 4)
        assert found is not None
        assert found.nbytes(4) < mask.size / 8 * 0.8 + 4 * np.count_nonzero(mask)

    @given(masks)
    def test_same_answer_twice(self, mask):
        first, second = best_patterns(mask, 4), best_patterns(mask.copy(), 4)
        assert (first is None) == (second is None)
        if first is not None and second is not None:
            assert (first.block, first.codes.tobytes()) == (second.block, second.codes.tobytes())

    def test_of_noise_there_are_none(self):
        assert best_patterns(np.random.default_rng(3).random((300, 300)) < 0.5, 4) is None
