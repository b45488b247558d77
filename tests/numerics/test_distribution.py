"""Tests of distinct values, exact codes and entropy, against numpy's unique and a counter."""

from __future__ import annotations

import math
import tracemalloc
from collections import Counter

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxshrink.numerics import distribution as module
from onnxshrink.numerics.distribution import Distribution, codes_of, distinct_values, distribution

FLOATS = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]
DTYPES = [*FLOATS, np.int8, np.uint8, np.int16, np.int32, np.int64, np.uint64, np.bool_]

# patterns rather than numbers: every NaN, both zeros, few distinct values
patterns = st.sampled_from(DTYPES).flatmap(
    lambda dtype: hnp.arrays(
        np.dtype(f"u{np.dtype(dtype).itemsize}"),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=6),
        elements=st.one_of(st.integers(0, 3), st.integers(0, 2 ** (8 * np.dtype(dtype).itemsize) - 1)),
    ).map(lambda bits: bits.astype(np.bool_) if dtype is np.bool_ else bits.view(dtype))
)


def bits(values):
    return np.asarray(values).view(f"u{values.dtype.itemsize}")


class TestDistinctValues:
    @given(patterns, st.integers(0, 40))
    def test_finds_every_bit_pattern_once_or_refuses(self, values, limit):
        expected = np.unique(bits(values))
        found = distinct_values(values, limit)
        if expected.size > limit:
            assert found is None
        else:
            assert found.dtype == values.dtype
            assert np.array_equal(np.sort(bits(found)), expected)

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_floats_ascend_with_negative_zero_before_zero_and_nan_last(self, dtype):
        ascending = np.array([-np.inf, -2, -1, -0.0, 0.0, 0.5, np.inf, np.nan], dtype)
        found = distinct_values(np.tile(ascending[::-1], 3).reshape(4, 6), 8)
        assert bits(found).tolist() == bits(ascending).tolist()

    @pytest.mark.parametrize("dtype", [np.int8, np.int64])
    def test_integers_ascend(self, dtype):
        assert distinct_values(np.array([3, -1, 3, -128, 0], dtype), 4).tolist() == [-128, -1, 0, 3]

    def test_stops_reading_past_the_limit(self, monkeypatch):
        read = []
        original = module.chunks

        def counted(values, size):
            for chunk in original(values, size):
                read.append(chunk.size)
                yield chunk

        monkeypatch.setattr(module, "chunks", counted)
        values = np.random.default_rng(0).standard_normal(1 << 21).astype(np.float32)
        assert distinct_values(values, 256) is None
        assert sum(read) <= 1 << 18

    def test_finds_the_last_element_of_a_long_tensor(self):
        values = np.zeros(3 << 19, np.float32)
        values[-1] = 1
        assert distinct_values(values, 2).tolist() == [0, 1]
        assert distinct_values(values, 1) is None


class TestCodes:
    @given(patterns)
    def test_codes_give_the_values_back_bit_for_bit(self, values):
        codebook = distinct_values(values, 256)
        if codebook.size:
            codes = codes_of(values, codebook)
            assert codes.dtype == np.uint8
            assert codes.shape == values.shape
            assert np.array_equal(bits(codebook[codes]), bits(values))

    @pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
    @pytest.mark.parametrize("stride", [1, 2, 256, 1 << 12])
    def test_regular_patterns_get_apart(self, dtype, stride):
        width = np.dtype(dtype).itemsize
        codebook = (np.arange(256 if stride < 4096 else 16, dtype=f"u{width}") * stride).view(dtype)
        values = np.random.default_rng(0).permutation(np.tile(codebook, 5)).reshape(-1, 8)
        assert np.array_equal(bits(codebook[codes_of(values, codebook)]), bits(values))

    def test_codebooks_may_be_in_any_order_and_layouts_keep_places(self):
        values = np.array([[1, 2, 3], [3, 1, 2]], np.float32)
        codebook = np.array([3, 1, 2], np.float32)
        assert codes_of(values.T, codebook).tolist() == [[1, 0], [2, 1], [0, 2]]

    @pytest.mark.parametrize(
        ("codebook", "message"),
        [
            (np.array([1.0], np.float32), "complete, got a value that it lacks"),
            (np.array([1.0, -0.0], np.float32), "complete, got a value that it lacks"),
            (np.array([1.0, 0.0]), "of the values' dtype float32, got float64"),
            (np.array([], np.float32), r"1-D with 1 to 256 entries, got shape \(0,\)"),
            (np.arange(257, dtype=np.float32), r"1-D with 1 to 256 entries, got shape \(257,\)"),
            (np.array([0, 1, 1], np.float32), "free of repeats, got 3 entries with repeats"),
        ],
    )
    def test_bad_codebooks_are_refused(self, codebook, message):
        with pytest.raises(ValueError, match=f"codes_of: codebook must be {message}"):
            codes_of(np.array([0, 1, 0], np.float32), codebook)


def expected_distribution(values):
    """Counts with a dictionary; NaNs by their bits, both zeros as one."""
    counts: Counter = Counter()
    for pattern, value in zip(bits(values).ravel().tolist(), values.ravel().tolist(), strict=True):
        counts[("nan", pattern) if value != value else value] += 1
    entropy = math.fsum(count / values.size * math.log2(values.size / count) for count in counts.values())
    return Distribution(values.size, counts.get(0, 0), len(counts), entropy)


def assert_same(found, expected):
    assert (found.size, found.zeros, found.distinct) == (expected.size, expected.zeros, expected.distinct)
    assert found.entropy_bits == pytest.approx(expected.entropy_bits, rel=1e-13, abs=0)


class TestDistribution:
    @given(patterns)
    def test_equals_counting(self, values):
        assert_same(distribution(values), expected_distribution(values))

    @pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
    @pytest.mark.parametrize("spread", ["all distinct", "few", "mostly zero", "heavy tail"])
    def test_parts_of_a_big_tensor_add_up(self, dtype, spread, monkeypatch):
        monkeypatch.setattr(module, "_PART", 1 << 14)
        monkeypatch.setattr(module, "_FEW", 1000)
        generator = np.random.default_rng(1)
        size = (1 << 20) + 12345  # more than one chunk
        values = {
            "all distinct": lambda: generator.permutation(size) - size // 2,
            "few": lambda: generator.integers(-5, 5, size),
            "mostly zero": lambda: generator.integers(0, 1 << 22, size) * (generator.random(size) < 0.2) * -1.0,
            "heavy tail": lambda: generator.zipf(1.3, size).clip(0, 1 << 23),
        }[spread]().astype(dtype)
        _, counts = np.unique(values, return_counts=True)
        entropy = math.fsum((counts / size * np.log2(size / counts)).tolist())
        assert_same(distribution(values), Distribution(size, int(np.sum(values == 0)), counts.size, entropy))

    def test_a_constant_has_no_entropy_at_all(self):
        assert distribution(np.full(1000, 0.1, np.float32)) == Distribution(1000, 0, 1, 0.0)
        assert distribution(np.zeros((3, 7))) == Distribution(21, 21, 1, 0.0)

    def test_an_empty_tensor(self):
        assert distribution(np.zeros((0, 4), np.float32)) == Distribution(0, 0, 0, 0.0)

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_zeros_are_one_value_and_infinities_are_values(self, dtype):
        values = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1, 1, 0], dtype)
        found = distribution(values)
        assert (found.zeros, found.distinct) == (3, 5)
        assert found.entropy_bits == pytest.approx(3 / 8 * math.log2(8 / 3) + 2 / 8 * 2 + 3 / 8 * 3, rel=1e-15)

    def test_float8_of_which_minus_zero_is_nan(self):
        values = np.array([0, 0x80, 0, 1], np.uint8).view(ml_dtypes.float8_e4m3fnuz)
        assert (distribution(values).zeros, distribution(values).distinct) == (2, 3)

    def test_memory_is_a_fraction_of_the_tensor(self, monkeypatch):
        monkeypatch.setattr(module, "_PART", 1 << 16)
        values = np.random.default_rng(0).standard_normal(1 << 24, dtype=np.float32)
        tracemalloc.start()
        distribution(values)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < values.nbytes / 2
