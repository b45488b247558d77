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

from onnxshrink.errors import OptionError
from onnxshrink.numerics import masks as module
from onnxshrink.numerics.chunks import tiles
from onnxshrink.numerics.masks import Pattern, expand_units, keep_largest, n_m_mask, scores, split_global

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


class TestPattern:
    @pytest.mark.parametrize(
        ("text", "pattern"),
        [
            ("unstructured", Pattern("unstructured")),
            ("2:4", Pattern("n:m", 2, 4)),
            ("4:8", Pattern("n:m", 4, 8)),
            ("1x4", Pattern("block", 1, 4)),
            ("16x1", Pattern("block", 16, 1)),
        ],
    )
    def test_text_and_back(self, text, pattern):
        assert Pattern.parse(text) == pattern
        assert str(pattern) == text

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("0:4", "N of N:M must be at least 1 and below M, got 0:4; 2:4 keeps 2 of 4"),
            ("5:4", "N of N:M must be at least 1 and below M, got 5:4"),
            ("4:4", "N of N:M must be at least 1 and below M, got 4:4"),
            ("2:0", "N of N:M must be at least 1 and below M, got 2:0"),
            ("0x1", "sides of a block must be at least 1, got 0x1"),
            ("4x0", "sides of a block must be at least 1, got 4x0"),
            ("", "text must be unstructured, N:M such as 2:4 or NxM such as 1x4, got ''"),
            ("2:4:8", "text must be unstructured, N:M such as 2:4 or NxM such as 1x4, got '2:4:8'"),
            ("-1x4", "text must be unstructured, N:M"),
            ("2/4", "text must be unstructured, N:M"),
            ("Unstructured", "text must be unstructured, N:M"),
        ],
    )
    def test_nonsense_is_refused(self, text, message):
        with pytest.raises(OptionError, match=f"^pattern: {message}"):
            Pattern.parse(text)
        assert issubclass(OptionError, ValueError)


class TestScores:
    @given(matrices, st.one_of(st.just(Pattern("unstructured")), st.just(Pattern("n:m", 2, 4))))
    def test_elements_are_scored_by_magnitude(self, matrix, pattern):
        found = scores(matrix, pattern)
        assert found.dtype == matrix.dtype
        assert np.array_equal(found, np.abs(matrix))

    @given(matrices, blocks)
    def test_blocks_are_scored_by_the_root_mean_square_of_their_members(self, matrix, pattern):
        found = scores(matrix, pattern)
        rows, cols = -(-matrix.shape[0] // pattern.n), -(-matrix.shape[1] // pattern.m)
        assert found.shape == (rows, cols)
        for row in range(rows):
            for col in range(cols):
                block = matrix[row * pattern.n : (row + 1) * pattern.n, col * pattern.m : (col + 1) * pattern.m]
                expected = np.sqrt(np.mean(np.square(block, dtype=np.float64)))
                # sums of 16 float64 may differ by 16 roundings; float32 has no finer numbers than 2^-149
                rel = 2.0**-23 if found.dtype == np.float32 else 16 * 2.0**-52
                assert found[row, col] == pytest.approx(expected, rel=rel, abs=2.0**-149)

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("pattern", ["unstructured", "3x5"])
    def test_every_dtype_and_layout_and_tile(self, dtype, pattern, monkeypatch):
        parsed = Pattern.parse(pattern)
        matrix = np.random.default_rng(0).standard_normal((20, 33)).astype(dtype)
        found = scores(matrix, parsed)
        assert found.dtype == (np.float64 if dtype is np.float64 else np.float32)
        assert np.array_equal(scores(np.asfortranarray(matrix), parsed), found)
        assert np.array_equal(found, scores(matrix.astype(found.dtype), parsed))
        monkeypatch.setattr(module, "tiles", lambda shape, _, n, m: tiles(shape, 40, n, m))
        assert np.array_equal(scores(matrix, parsed), found)

    def test_bad_matrices_are_refused(self):
        with pytest.raises(ValueError, match=r"scores: matrix must be 2-D, got shape \(3,\)"):
            scores(np.ones(3), Pattern("unstructured"))
        with pytest.raises(ValueError, match="scores: values must be finite"):
            scores(np.array([[np.nan]]), Pattern("block", 1, 2))


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


class TestExpand:
    @given(blocks, st.integers(0, 9), st.integers(0, 9), st.randoms(use_true_random=False))
    def test_a_unit_covers_its_elements(self, pattern, rows, cols, random):
        keep = np.array(
            [[random.random() < 0.5 for _ in range(-(-cols // pattern.m))] for _ in range(-(-rows // pattern.n))]
        )
        keep = keep.reshape(-(-rows // pattern.n), -(-cols // pattern.m)).astype(np.bool_)
        mask = expand_units(keep, pattern, (rows, cols))
        assert mask.flags.c_contiguous
        assert mask.shape == (rows, cols)
        for row in range(rows):
            for col in range(cols):
                assert mask[row, col] == keep[row // pattern.n, col // pattern.m]

    @pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
    def test_elements_stand_for_themselves(self, pattern):
        keep = np.array([[True, False, True]])
        assert np.array_equal(expand_units(keep, Pattern.parse(pattern), (1, 3)), keep)

    def test_other_shapes_are_refused(self):
        with pytest.raises(ValueError, match=r"expand_units: keep must be of shape \(2, 3\), got shape \(3, 2\)"):
            expand_units(np.ones((3, 2), np.bool_), Pattern("block", 2, 2), (4, 5))


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
