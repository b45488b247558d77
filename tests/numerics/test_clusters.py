"""Tests of codebooks and codes: the least error where it can be enumerated, the uniform grid as a bound elsewhere."""

from __future__ import annotations

import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxshrink.numerics import clusters as module
from onnxshrink.numerics.clusters import kmeans_1d, kmeans_rows, nearest, nearest_rows
from onnxshrink.numerics.optimal_kmeans import optimal_centers
from onnxshrink.numerics.sketches import Sketch, sketch
from tests.numerics.test_optimal_kmeans import error_of, least_error

FLOATS = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]
DISTRIBUTIONS = {
    "normal": lambda g, size: g.standard_normal(size),
    "uniform": lambda g, size: g.random(size),
    "heavy tails": lambda g, size: g.standard_t(1.5, size),
    "lumps": lambda g, size: g.choice([-3, -0.2, 0, 0.1, 0.7, 9], size) + g.normal(0, 0.003, size),
    "sparse": lambda g, size: g.standard_normal(size) * (g.random(size) < 0.3),
    "offset": lambda g, size: 1 + 1e-4 * g.random(size),
}


def squared_error(values, codebook):
    """Summed over values, each taken to its nearest entry, in float64."""
    values = np.asarray(values, np.float64).ravel()
    places = np.searchsorted((codebook[1:] + codebook[:-1]) / 2, values)
    return float(np.square(values - codebook[places]).sum())


def weighted_error(matrix, importance, codebook):
    """Summed over values, each taken to its nearest entry, times what its column matters."""
    values = matrix.astype(np.float64)
    places = np.searchsorted((codebook[1:] + codebook[:-1]) / 2, values)
    return float((np.square(values - codebook[places]) * importance).sum())


def samples(name, size, dtype=np.float32, seed=0):
    return DISTRIBUTIONS[name](np.random.default_rng(seed), size).astype(dtype)


few_numbers = st.lists(st.integers(-20, 20).map(lambda i: i / 8), min_size=1, max_size=8)


class TestKmeans:
    @given(few_numbers, st.integers(1, 4), st.booleans(), st.sampled_from(FLOATS))
    def test_no_codebook_errs_less(self, values, k, keep_zero, dtype):
        codebook = kmeans_1d(np.array(values, dtype), k, keep_zero)
        assert codebook.dtype == np.float64
        assert 1 <= codebook.size <= k
        assert np.all(np.diff(codebook) > 0)
        assert not keep_zero or 0.0 in codebook
        error = error_of(values, [1] * len(values), codebook.tolist())
        assert abs(error - least_error(sorted(values), [1] * len(values), k, keep_zero)) < 1e-12

    @pytest.mark.parametrize("name", DISTRIBUTIONS)
    @pytest.mark.parametrize("k", [2, 16, 256])
    @pytest.mark.parametrize("size", [3000, 100_000])
    def test_never_worse_than_the_uniform_grid(self, name, k, size):
        values = samples(name, size)
        uniform = np.linspace(values.min().astype(np.float64), values.max(), k)
        assert squared_error(values, kmeans_1d(values, k)) <= squared_error(values, uniform)

    @pytest.mark.parametrize("name", DISTRIBUTIONS)
    @pytest.mark.parametrize("keep_zero", [False, True])
    def test_groups_and_lloyd_come_within_a_thousandth_of_the_optimum(self, name, keep_zero, monkeypatch):
        found = sketch(samples(name, 3000, np.float64))
        optimum = optimal_centers(found.means[None], found.counts[None] * 1.0, 8, keep_zero=keep_zero)[0]
        monkeypatch.setattr(module, "_FEWEST_GROUPS", 512)
        monkeypatch.setattr(module, "_OPTIMAL_WORK", 0)
        codebook = kmeans_1d(found, 8, keep_zero)
        points = np.repeat(found.means, found.counts)
        assert squared_error(points, codebook) <= 1.001 * squared_error(points, optimum)
        assert not keep_zero or 0.0 in codebook

    def test_a_bad_start_is_replaced_by_the_uniform_grid(self, monkeypatch):
        generator = np.random.default_rng(0)
        values = np.concatenate([level + generator.normal(0, 1e-3, 1000) for level in range(8)])
        uniform = np.linspace(values.min(), values.max(), 8)
        monkeypatch.setattr(module, "optimal_centers", lambda points, weights, k, keep_zero: np.full((1, k), -9.0))
        monkeypatch.setattr(module, "lloyd", lambda points, weights, centers, keep_zero: centers)
        assert kmeans_1d(values, 8) == pytest.approx(uniform, rel=1e-15)

    @given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=12), st.booleans())
    def test_few_distinct_values_are_kept_exactly(self, values, keep_zero):
        distinct = sorted({*values, *([0.0] if keep_zero else [])})
        assert kmeans_1d(np.array(values * 3, np.float32), len(distinct), keep_zero).tolist() == distinct

    def test_few_distinct_values_of_a_big_tensor_too(self):
        levels = np.array([-0.3, 0.1, 0.2, 1e-6], np.float32)
        values = np.random.default_rng(0).choice(levels, 100_000)
        assert np.array_equal(kmeans_1d(values, 4), np.sort(levels))

    def test_counts_weigh(self):
        assert kmeans_1d(Sketch(np.array([0.0, 1, 9]), np.array([1, 3, 5])), 2).tolist() == [0.75, 9]

    def test_zero_is_kept_among_values_far_from_it(self):
        assert kmeans_1d(np.array([5.0, 6, 9, 9]), 3, keep_zero=True).tolist() == [0, 5.5, 9]
        assert kmeans_1d(np.array([5.0, 6, 9, 9]), 1, keep_zero=True).tolist() == [0]

    @given(few_numbers, st.data(), st.integers(1, 4), st.booleans(), st.sampled_from(FLOATS))
    def test_no_codebook_errs_less_where_values_matter_unequally(self, values, data, k, keep_zero, dtype):
        values = sorted(values)
        weights = data.draw(st.lists(st.sampled_from([0, 1, 2, 8, 64]), min_size=len(values), max_size=len(values)))
        weights[0] = 64  # the greatest: importance is relative to it
        codebook = kmeans_1d(sketch(np.array(values, dtype), np.array(weights, np.float32)), k, keep_zero)
        used = [(value, weight / 64) for value, weight in zip(values, weights, strict=True) if weight]
        points, masses = zip(*used, strict=True)
        error = error_of(points, masses, codebook.tolist())
        assert abs(error - least_error(points, masses, k, keep_zero)) < 1e-12

    @pytest.mark.parametrize("name", DISTRIBUTIONS)
    @pytest.mark.parametrize("k", [4, 64])
    def test_importance_pays_where_it_varies(self, name, k):
        rng = np.random.default_rng(1)
        matrix, importance = samples(name, (200, 500)), np.exp(2 * rng.standard_normal(500))
        matrix = (matrix * np.where(importance > 1, 1, 2)).astype(np.float32)
        errors = [
            weighted_error(matrix, importance, codebook)
            for codebook in (kmeans_1d(sketch(matrix, importance), k), kmeans_1d(matrix, k))
        ]
        assert errors[0] <= errors[1] * 1.001

    def test_bad_arguments_are_refused(self):
        with pytest.raises(ValueError, match="kmeans_1d: k must be at least 1, got 0"):
            kmeans_1d(np.ones(3), 0)
        with pytest.raises(ValueError, match="values must be finite"):
            kmeans_1d(np.array([1.0, np.nan]), 2)


class TestKmeansRows:
    @pytest.mark.parametrize("name", DISTRIBUTIONS)
    @pytest.mark.parametrize("k", [2, 16, 100])
    @pytest.mark.parametrize("cols", [9, 64, 1500])
    def test_every_row_is_no_worse_than_its_uniform_grid(self, name, k, cols):
        matrix = samples(name, (6, cols))
        codebooks = kmeans_rows(matrix, k)
        assert codebooks.shape == (6, k)
        assert codebooks.dtype == np.float64
        assert np.all(np.diff(codebooks, axis=1) >= 0)
        for row, codebook in zip(matrix, codebooks, strict=True):
            uniform = np.linspace(row.min().astype(np.float64), row.max(), k)
            assert squared_error(row, codebook) <= squared_error(row, uniform)

    @pytest.mark.parametrize("name", DISTRIBUTIONS)
    @pytest.mark.parametrize("keep_zero", [False, True])
    def test_rows_come_within_a_hundredth_of_the_optimum(self, name, keep_zero):
        matrix = samples(name, (5, 600))
        for row, codebook in zip(matrix, kmeans_rows(matrix, 16, keep_zero), strict=True):
            assert squared_error(row, codebook) <= 1.01 * squared_error(row, kmeans_1d(row, 16, keep_zero))
            assert not keep_zero or 0.0 in codebook

    @pytest.mark.parametrize("name", DISTRIBUTIONS)
    @pytest.mark.parametrize("keep_zero", [False, True])
    @pytest.mark.parametrize("dtype", [np.float16, np.float32])
    def test_rows_with_importance_come_within_a_hundredth_of_the_optimum(self, name, keep_zero, dtype):
        matrix = samples(name, (5, 600), dtype)
        importance = np.random.default_rng(2).exponential(size=600)
        importance[::7] = 0.0
        found = kmeans_rows(matrix, 16, keep_zero, importance)
        for row, codebook in zip(matrix, found, strict=True):
            optimum = kmeans_1d(sketch(row, importance), 16, keep_zero)
            assert weighted_error(row, importance, codebook) <= 1.01 * weighted_error(row, importance, optimum)
            assert not keep_zero or 0.0 in codebook

    @pytest.mark.parametrize("columns", [300, 3000])
    def test_equal_importance_changes_nothing_and_none_neither(self, columns, monkeypatch):
        monkeypatch.setattr(module, "CHUNK", 1000)
        matrix = samples("normal", (4, columns))
        expected = kmeans_rows(matrix, 8)
        for importance in (np.full(columns, 3.0), np.zeros(columns), np.ones(1, np.float32)):
            np.testing.assert_allclose(kmeans_rows(matrix, 8, importance=importance), expected, rtol=1e-12)

    def test_columns_that_do_not_matter_are_as_good_as_gone(self):
        matrix, importance = samples("normal", (4, 300)), np.ones(300)
        matrix[:, 100:200] *= 1e3
        importance[100:200] = 0.0
        expected = kmeans_rows(np.delete(matrix, np.s_[100:200], axis=1), 8)
        np.testing.assert_allclose(kmeans_rows(matrix, 8, importance=importance), expected, rtol=1e-12)

    def test_importance_that_does_not_fit_is_refused(self):
        with pytest.raises(ValueError, match=r"^kmeans_rows: importance must be of a shape that broadcasts to \(5,\)"):
            kmeans_rows(np.ones((2, 5), np.float32), 3, importance=np.ones(4))
        with pytest.raises(ValueError, match=r"^kmeans_rows: importance must be not negative, got -1.0$"):
            kmeans_rows(np.ones((2, 5), np.float32), 3, importance=-np.ones(5))

    @pytest.mark.parametrize("k", [4, 80])
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("keep_zero", [False, True])
    def test_a_row_does_not_depend_on_its_company_or_layout(self, k, dtype, keep_zero, monkeypatch):
        matrix = samples("sparse", (7, 300), dtype)
        together = kmeans_rows(matrix, k, keep_zero)
        alone = np.concatenate([kmeans_rows(row[None], k, keep_zero) for row in matrix])
        assert np.array_equal(together, alone)
        assert np.array_equal(kmeans_rows(np.asfortranarray(matrix), k, keep_zero), together)
        monkeypatch.setattr(module, "_ROWS_SIZE", 900)
        assert np.array_equal(kmeans_rows(matrix, k, keep_zero), together)

    @pytest.mark.parametrize("k", [5, 90])
    @pytest.mark.parametrize("keep_zero", [False, True])
    def test_few_distinct_values_are_kept_exactly_and_the_last_repeats(self, k, keep_zero):
        levels = np.array([-0.7, 0.1, 0.2, 3e8], np.float32)
        matrix = np.random.default_rng(0).choice(levels, (10, 200))
        expected = np.union1d(levels.astype(np.float64), [0.0]) if keep_zero else levels.astype(np.float64)
        padded = np.pad(expected, (0, k - expected.size), mode="edge")
        assert np.array_equal(kmeans_rows(matrix, k, keep_zero), np.tile(padded, (10, 1)))

    def test_a_row_longer_than_a_chunk_goes_through_a_sketch(self, monkeypatch):
        monkeypatch.setattr(module, "CHUNK", 1000)
        matrix = np.random.default_rng(0).standard_normal((2, 1001), dtype=np.float32)
        matrix[1] = np.tile([1, 2, 3], 334)[:1001]
        codebooks = kmeans_rows(matrix, 5)
        assert np.array_equal(codebooks[0], kmeans_1d(matrix[0], 5))
        assert codebooks[1].tolist() == [1, 2, 3, 3, 3]

    def test_no_rows_give_no_codebooks(self):
        assert kmeans_rows(np.zeros((0, 3)), 4).shape == (0, 4)

    @pytest.mark.parametrize(
        ("matrix", "k", "message"),
        [
            (np.ones((2, 2)), 0, "k must be at least 1, got 0"),
            (np.ones(2), 1, r"matrix must be 2-D with a column at least, got shape \(2,\)"),
            (np.ones((2, 0)), 1, r"matrix must be 2-D with a column at least, got shape \(2, 0\)"),
            (np.array([[np.inf]]), 1, "values must be finite"),
        ],
    )
    def test_bad_arguments_are_refused(self, matrix, k, message):
        with pytest.raises(ValueError, match=f"kmeans_rows: {message}"):
            kmeans_rows(matrix, k)


def nearest_by_distance(values, codebook):
    """The first entry of least distance; distances of these small numbers are exact in float64."""
    return np.argmin(np.abs(np.asarray(values, np.float64)[..., None] - codebook), axis=-1)


# quarters below 2^6: exact in every dtype, and so are midpoints and distances
quarters = st.integers(-255, 255).map(lambda i: i / 4)
codebooks_st = st.lists(quarters, min_size=1, max_size=40).map(lambda entries: np.array(sorted(entries)))


class TestNearest:
    @pytest.mark.parametrize("path", ["search", "table"])
    @given(data=st.data(), codebook=codebooks_st, dtype=st.sampled_from(FLOATS))
    def test_equals_the_least_distance_and_ties_go_down(self, path, data, codebook, dtype):
        size = 0 if path == "table" else 1 << 30
        values = data.draw(hnp.arrays(np.float64, hnp.array_shapes(max_dims=3), elements=quarters)).astype(dtype)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_TABLE_SIZE", size)
            patch.setattr(module, "_PATTERNS_SIZE", size)
            patch.setattr(module, "_TABLE_BITS", 12)
            codes = nearest(values, codebook)
        assert codes.dtype == np.uint8
        assert np.array_equal(codes, nearest_by_distance(values, codebook))

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("entries", [2, 16, 256])
    def test_big_tensors_get_the_codes_of_small_ones(self, dtype, entries, monkeypatch):
        values = samples("heavy tails", (300, 700), np.float32).clip(-1e4, 1e4).astype(dtype)
        codebook = np.sort(samples("normal", entries, np.float64, seed=1))
        expected = np.searchsorted((codebook[1:] + codebook[:-1]) / 2, values.astype(np.float64))
        for table_size in (0, 1 << 30):
            monkeypatch.setattr(module, "_TABLE_SIZE", table_size)
            monkeypatch.setattr(module, "_PATTERNS_SIZE", table_size)
            assert np.array_equal(nearest(values, codebook), expected)
            assert np.array_equal(nearest(values.T, codebook), expected.T)

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_many_entries_in_one_bin(self, dtype, monkeypatch):
        monkeypatch.setattr(module, "_TABLE_SIZE", 0)
        values = (1 + np.random.default_rng(0).random(5000) * 1e-4).astype(dtype)
        codebook = np.linspace(1, 1 + 1e-4, 256)
        expected = np.searchsorted((codebook[1:] + codebook[:-1]) / 2, values.astype(np.float64))
        assert np.array_equal(nearest(values, codebook), expected)

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_neighbouring_floats_are_told_apart(self, dtype):
        entries = [dtype(1)]
        while len(entries) < 6:
            entries.append(np.nextafter(entries[-1], dtype(2)))
        values = np.array(entries)
        assert nearest(values, values.astype(np.float64)).tolist() == [0, 1, 2, 3, 4, 5]

    def test_values_beyond_the_range_of_float32_limits(self):
        values = np.array([-3e38, 0, 3e38], np.float32)
        assert nearest(values, np.array([-1e300, -1.0, 1e300])).tolist() == [1, 1, 1]

    def test_a_single_entry_and_an_empty_tensor(self):
        assert nearest(np.array([[-1, 2]], np.float32), np.array([5.0])).tolist() == [[0, 0]]
        assert nearest(np.zeros((0, 3), np.float32), np.array([5.0])).shape == (0, 3)

    @pytest.mark.parametrize(
        ("values", "codebook", "message"),
        [
            ([1.0, np.nan], [0.0], "values must be finite, got a NaN or an infinity"),
            ([np.inf], [0.0], "values must be finite, got a NaN or an infinity"),
            ([1.0], [], r"codebook must be 1-D with 1 to 256 entries, got shape \(0,\)"),
            ([1.0], [0.0] * 257, r"codebook must be 1-D with 1 to 256 entries, got shape \(257,\)"),
            ([1.0], [[0.0]], r"codebook must be 1-D with 1 to 256 entries, got shape \(1, 1\)"),
            ([1.0], [1.0, 0.0], "codebook must be finite and ascending"),
            ([1.0], [1.0, np.nan], "codebook must be finite and ascending"),
        ],
    )
    def test_bad_arguments_are_refused(self, values, codebook, message):
        with pytest.raises(ValueError, match=f"nearest: {message}"):
            nearest(np.array(values), np.array(codebook))

    def test_memory_does_not_grow_with_the_tensor(self):
        values = np.random.default_rng(0).standard_normal(1 << 24, dtype=np.float32)
        values.flags.writeable = False
        tracemalloc.start()
        codes = nearest(values, np.linspace(-3, 3, 16))
        peak = tracemalloc.get_traced_memory()[1] - codes.nbytes
        tracemalloc.stop()
        assert peak < values.nbytes / 2


class TestNearestRows:
    @pytest.mark.parametrize("entries", [1, 4, 25, 26, 100])  # both sides of where searching takes over
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_equals_nearest_of_each_row(self, entries, dtype):
        matrix = samples("normal", (5, 300), dtype)
        codebooks = np.sort(samples("normal", (5, entries), np.float64, seed=1), axis=1)
        expected = np.stack([nearest(row, codebook) for row, codebook in zip(matrix, codebooks, strict=True)])
        codes = nearest_rows(matrix, codebooks)
        assert codes.dtype == np.uint8
        assert np.array_equal(codes, expected)
        assert np.array_equal(nearest_rows(np.asfortranarray(matrix), codebooks), expected)

    @pytest.mark.parametrize("padding", [1, 60])
    def test_padding_is_never_used(self, padding):
        codebooks = np.array([[-1.0, 2, 5] + [5] * padding])
        assert nearest_rows(np.array([[-9.0, 1, 4, 5, 99]]), codebooks).tolist() == [[0, 1, 2, 2, 2]]

    def test_bad_arguments_are_refused(self):
        with pytest.raises(ValueError, match=r"nearest_rows: matrix must be 2-D with a row for each of 3 codebooks"):
            nearest_rows(np.ones((2, 4)), np.ones((3, 1)))
        with pytest.raises(ValueError, match="nearest_rows: codebook must be 2-D with 1 to 256 entries"):
            nearest_rows(np.ones((2, 4)), np.ones(3))
        with pytest.raises(ValueError, match="nearest_rows: values must be finite"):
            nearest_rows(np.array([[np.nan]]), np.ones((1, 1)))
