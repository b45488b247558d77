"""Tests of masks: exact counts, ties by index, patterns in every group, and the same mask for a masked matrix."""

from __future__ import annotations

import tracemalloc
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxshrink.numerics import masks as module
from onnxshrink.numerics.chunks import tiles
from onnxshrink.numerics.masks import choose, keep_largest, n_m_mask, split_global
from onnxshrink.numerics.patterns import Pattern, expand_units, scores, unit_sizes

FLOATS = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]

# many ties, both zeros, both signs
numbers = st.one_of(st.sampled_from([-2.0, -1.0, -0.0, 0.0, 0.5, 1.0, 2.0]), st.floats(-100, 100, width=32))
matrices = hnp.arrays(
    st.sampled_from([np.float32, np.float64]), st.tuples(st.integers(0, 7), st.integers(0, 9)), elements=numbers
)
score_arrays = hnp.arrays(st.sampled_from([np.float32, np.float64]), hnp.array_shapes(min_side=0), elements=numbers)
shares = st.one_of(st.floats(0, 1), st.integers(0, 20).map(lambda i: i / 20))
blocks = st.builds(Pattern, st.just("block"), st.integers(1, 4), st.integers(1, 4))
n_of_m = st.integers(2, 6).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m)))


def removed_first(ranked, count):
    """The flat indices that a stable sort puts first."""
    return np.argsort(ranked.ravel() + 0.0, kind="stable")[:count]


class TestKeepLargest:
    @given(score_arrays, shares)
    def test_removes_exactly_the_lowest_and_of_equals_the_first(self, ranked, share):
        keep = keep_largest(ranked, share)
        count = int(np.floor(share * ranked.size + 1e-9))
        expected = np.ones(ranked.size, np.bool_)
        expected[removed_first(ranked, count)] = False
        assert keep.dtype == np.bool_
        assert keep.shape == ranked.shape
        assert np.array_equal(keep.ravel(), expected)

    @pytest.mark.parametrize(("share", "removed"), [(0.0, 0), (0.1, 1), (0.3, 3), (0.7, 7), (0.75, 7), (1.0, 10)])
    def test_shares_that_floats_cannot_hold_count_as_meant(self, share, removed):
        assert np.sum(~keep_largest(np.arange(10.0), share)) == removed

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    def test_big_arrays_with_ties_across_chunks(self, dtype):
        ranked = np.random.default_rng(0).integers(0, 50, (3, 700_001)).astype(dtype)
        keep = keep_largest(ranked, 0.333)
        count = int(np.floor(0.333 * ranked.size + 1e-9))
        expected = np.ones(ranked.size, np.bool_)
        expected[removed_first(ranked, count)] = False
        assert np.array_equal(keep.ravel(), expected)

    def test_ties_follow_the_index_in_any_layout(self):
        ranked = np.zeros((3, 4), np.float32)
        assert np.array_equal(keep_largest(ranked.T, 0.5), np.arange(12).reshape(4, 3) >= 6)

    @pytest.mark.parametrize(("share", "bad"), [(-0.1, "-0.1"), (1.1, "1.1"), (float("nan"), "nan")])
    def test_bad_shares_are_refused(self, share, bad):
        with pytest.raises(ValueError, match=f"share_removed must be between 0 and 1, got {bad}"):
            keep_largest(np.ones(3), share)

    def test_nan_is_refused(self):
        with pytest.raises(ValueError, match="scores must be comparable, got a NaN"):
            keep_largest(np.array([1.0, np.nan]), 0.5)

    def test_memory_is_less_than_a_copy(self):
        ranked = np.random.default_rng(0).random((1 << 12, 1 << 12), dtype=np.float32)
        ranked.flags.writeable = False
        tracemalloc.start()
        keep = keep_largest(ranked, 0.5)
        peak = tracemalloc.get_traced_memory()[1] - keep.nbytes
        tracemalloc.stop()
        assert peak < ranked.nbytes / 2


class TestSplitGlobal:
    @given(st.lists(st.tuples(score_arrays, st.integers(1, 20)), max_size=4), shares)
    def test_removes_the_longest_beginning_of_the_line_that_fits(self, layers, share):
        weights = [weight for _, weight in layers]
        keeps = split_global([ranked for ranked, _ in layers], share, weights=weights)
        line = sorted(
            (float(score), layer, index)
            for layer, (ranked, _) in enumerate(layers)
            for index, score in enumerate(ranked.ravel().tolist())
        )
        budget = int(np.floor(share * sum(ranked.size * weight for ranked, weight in layers) + 1e-9))
        expected = [np.ones(ranked.size, np.bool_) for ranked, _ in layers]
        for _, layer, index in line:
            budget -= weights[layer]
            if budget < 0:
                break
            expected[layer][index] = False
        assert len(keeps) == len(layers)
        for keep, wanted, (ranked, _) in zip(keeps, expected, layers, strict=True):
            assert keep.shape == ranked.shape
            assert np.array_equal(keep.ravel(), wanted)

    @given(st.lists(score_arrays, max_size=3), shares)
    def test_units_stand_for_one_element_unless_said(self, layers, share):
        found, said = split_global(layers, share), split_global(layers, share, weights=[1] * len(layers))
        assert all(np.array_equal(a, b) for a, b in zip(found, said, strict=True))
        assert sum(int(np.sum(~keep)) for keep in found) == int(np.floor(share * sum(map(np.size, layers)) + 1e-9))

    def test_mixed_dtypes_compare_by_value(self):
        layers = [np.array([0.1], np.float32), np.array([0.1]), np.array([0.1], np.float16)]
        keeps = split_global(layers, 2 / 3)
        order = sorted(range(3), key=lambda i: Fraction(float(layers[i][0])))
        assert [bool(keep[0]) for keep in keeps] == [order.index(i) == 2 for i in range(3)]

    @pytest.mark.parametrize("weights", [[1], [1, 0], [1, -2], [1, 2, 3]])
    def test_bad_weights_are_refused(self, weights):
        with pytest.raises(ValueError, match=r"split_global: weights must be 2 positive integers, got \["):
            split_global([np.ones(2), np.ones(3)], 0.5, weights=weights)


class TestNofM:
    @given(matrices, n_of_m)
    def test_keeps_the_largest_of_each_group_and_of_equals_the_last(self, matrix, n_m):
        n, m = n_m
        mask = n_m_mask(matrix, n, m)
        assert mask.shape == matrix.shape
        for row, kept in zip(matrix, mask, strict=True):
            for start in range(0, row.size, m):
                group = np.abs(row[start : start + m])
                expected = np.ones(group.size, np.bool_)
                expected[removed_first(group, max(group.size - n, 0))] = False
                assert np.array_equal(kept[start : start + m], expected)

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("cols", [32, 35])
    def test_every_dtype_and_layout_and_tile(self, dtype, cols, monkeypatch):
        matrix = np.random.default_rng(0).standard_normal((20, cols)).astype(dtype)
        mask = n_m_mask(matrix, 2, 4)
        assert np.all(mask[:, :32].reshape(20, 8, 4).sum(axis=2) == 2)
        assert np.array_equal(n_m_mask(np.asfortranarray(matrix), 2, 4), mask)
        monkeypatch.setattr(module, "tiles", lambda shape, _, n, m: tiles(shape, 16, n, m))
        assert np.array_equal(n_m_mask(matrix, 2, 4), mask)

    @pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 4), (-1, 4)])
    def test_bad_counts_are_refused(self, n, m):
        with pytest.raises(ValueError, match=f"n_m_mask: n must be between 1 and 4, got {n}"):
            n_m_mask(np.ones((2, 4)), n, m)

    def test_bad_matrices_are_refused(self):
        with pytest.raises(ValueError, match="n_m_mask: values must be finite"):
            n_m_mask(np.array([[np.nan, 1.0]]), 1, 2)


class TestTwice:
    """A masked matrix gets the same mask again: what was removed is what is lowest."""

    @given(matrices, st.one_of(st.just(Pattern("unstructured")), blocks), shares)
    def test_shares(self, matrix, pattern, share):
        def mask_of(values):
            return expand_units(keep_largest(scores(values, pattern), share), pattern, values.shape)

        mask = mask_of(matrix)
        assert np.array_equal(mask_of(np.where(mask, matrix, 0).astype(matrix.dtype)), mask)

    @given(matrices, n_of_m)
    def test_n_of_m(self, matrix, n_m):
        mask = n_m_mask(matrix, *n_m)
        assert np.array_equal(n_m_mask(np.where(mask, matrix, 0).astype(matrix.dtype), *n_m), mask)

    @given(st.lists(matrices, min_size=1, max_size=3), blocks, shares)
    def test_global(self, layers, pattern, share):
        def masks_of(values):
            keeps = split_global(
                [scores(v, pattern) for v in values], share, weights=[pattern.n * pattern.m] * len(values)
            )
            return [expand_units(keep, pattern, v.shape) for keep, v in zip(keeps, values, strict=True)]

        masks = masks_of(layers)
        again = masks_of([np.where(mask, v, 0).astype(v.dtype) for mask, v in zip(masks, layers, strict=True)])
        assert all(np.array_equal(a, b) for a, b in zip(again, masks, strict=True))


class TestChoose:
    @given(matrices, st.one_of(st.sampled_from([Pattern("unstructured"), Pattern("rows"), Pattern("columns")]), blocks), shares)
    def test_what_goes_is_a_beginning_of_the_line_as_long_as_the_share_allows(self, matrix, pattern, share):
        mask = choose(matrix, pattern, share)
        sizes, units = unit_sizes(pattern, matrix.shape), scores(matrix, pattern)
        keep = mask[tuple(slice(None, None, side) for side in pattern.sides(matrix.shape))]
        assert np.array_equal(expand_units(keep, pattern, matrix.shape), mask)
        order = np.argsort(units, axis=None, kind="stable")
        budget = int(np.floor(share * matrix.size + 1e-9))
        count = int(np.searchsorted(np.cumsum(sizes.ravel()[order]), budget, side="right"))
        assert set(np.flatnonzero(~keep.ravel())) == set(order[:count])

    @given(matrices, blocks, shares)
    def test_the_share_is_right_to_less_than_a_unit_with_partial_blocks(self, matrix, pattern, share):
        removed = np.sum(~choose(matrix, pattern, share))
        budget = int(np.floor(share * matrix.size + 1e-9))
        assert budget - pattern.n * pattern.m < removed <= budget

    @given(matrices, shares, st.integers(0, 9))
    def test_frozen_weights_go_first_and_count(self, matrix, share, seed):
        frozen = np.random.default_rng(seed).random(matrix.shape) < 0.3
        mask = choose(np.abs(matrix), Pattern("unstructured"), share, frozen=frozen)
        assert not mask[frozen].any()
        assert np.sum(~mask) == max(int(np.floor(share * matrix.size + 1e-9)), frozen.sum())
        kept, gone = np.abs(matrix)[mask], np.abs(matrix)[~mask & ~frozen]
        assert not kept.size or not gone.size or gone.max() <= kept.min()

    @given(matrices, n_of_m, st.integers(0, 9))
    def test_n_of_m_has_its_own_share(self, matrix, n_m, seed):
        frozen = np.random.default_rng(seed).random(matrix.shape) < 0.3
        pattern = Pattern("n:m", *n_m)
        assert np.array_equal(choose(matrix, pattern), n_m_mask(matrix, *n_m))
        expected = n_m_mask(np.where(frozen, 0, matrix), *n_m) & ~frozen
        assert np.array_equal(choose(matrix, pattern, frozen=frozen), expected)

    def test_bad_arguments_are_refused(self):
        with pytest.raises(ValueError, match="choose: share_removed must be given for 1x4, got None"):
            choose(np.ones((2, 4)), Pattern("block", 1, 4))
        with pytest.raises(ValueError, match=r"choose: frozen must be of shape \(2, 4\), got shape \(4, 2\)"):
            choose(np.ones((2, 4)), Pattern("rows"), 0.5, frozen=np.ones((4, 2), np.bool_))

    @given(st.lists(st.tuples(matrices, blocks), max_size=3), shares)
    def test_units_of_different_sizes_compete_between_layers(self, layers, share):
        ranked = [scores(matrix, pattern) for matrix, pattern in layers]
        sizes = [unit_sizes(pattern, matrix.shape) for matrix, pattern in layers]
        keeps = split_global(ranked, share, weights=sizes)
        scored = np.concatenate([np.zeros(0), *map(np.ravel, ranked)])
        counts = np.concatenate([np.zeros(0, int), *map(np.ravel, sizes)])
        order = np.argsort(scored, kind="stable")
        fit = int(np.searchsorted(np.cumsum(counts[order]), np.floor(share * counts.sum() + 1e-9), side="right"))
        expected = np.ones(scored.size, np.bool_)
        expected[order[:fit]] = False
        assert np.array_equal(np.concatenate([np.zeros(0, np.bool_), *map(np.ravel, keeps)]), expected)
