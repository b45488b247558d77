"""Tests of patterns: their texts, scores of units against plain loops, honest edges."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxshrink.errors import OptionError
from onnxshrink.numerics import patterns as module
from onnxshrink.numerics.chunks import tiles
from onnxshrink.numerics.patterns import Pattern, expand_units, scores, unit_sizes

FLOATS = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]

numbers = st.one_of(st.sampled_from([-2.0, -1.0, -0.0, 0.0, 0.5, 1.0, 2.0]), st.floats(-100, 100, width=32))
matrices = hnp.arrays(
    st.sampled_from([np.float32, np.float64]), st.tuples(st.integers(0, 7), st.integers(0, 9)), elements=numbers
)
blocks = st.builds(Pattern, st.just("block"), st.integers(1, 4), st.integers(1, 4))
units = st.one_of(blocks, st.sampled_from([Pattern("rows"), Pattern("columns"), Pattern("block", 90, 70)]))


def sides(pattern, shape):
    whole = {"rows": (1, max(shape[1], 1)), "columns": (max(shape[0], 1), 1)}
    return whole.get(pattern.kind, (pattern.n, pattern.m))


class TestPattern:
    @pytest.mark.parametrize(
        ("text", "pattern"),
        [
            ("unstructured", Pattern("unstructured")),
            ("2:4", Pattern("n:m", 2, 4)),
            ("4:8", Pattern("n:m", 4, 8)),
            ("1x4", Pattern("block", 1, 4)),
            ("16x1", Pattern("block", 16, 1)),
            ("rows", Pattern("rows")),
            ("columns", Pattern("columns")),
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
            ("", "text must be unstructured, rows, columns, N:M such as 2:4 or NxM such as 1x4, got ''"),
            ("2:4:8", "text must be unstructured, rows, columns, N:M such as 2:4 or NxM such as 1x4, got '2:4:8'"),
            ("-1x4", "text must be unstructured, rows, columns, N:M"),
            ("2/4", "text must be unstructured, rows, columns, N:M"),
            ("Unstructured", "text must be unstructured, rows, columns, N:M"),
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

    @given(matrices, units, st.sampled_from(["l1", "l2"]))
    def test_units_are_scored_by_the_mean_over_their_members(self, matrix, pattern, norm):
        found, sizes = scores(matrix, pattern, norm), unit_sizes(pattern, matrix.shape)
        height, width = sides(pattern, matrix.shape)
        rows, cols = -(-matrix.shape[0] // height), -(-matrix.shape[1] // width)
        assert found.shape == sizes.shape == (rows, cols)
        assert sizes.sum() == matrix.size
        for row in range(rows):
            for col in range(cols):
                block = matrix[row * height : (row + 1) * height, col * width : (col + 1) * width].astype(np.float64)
                expected = np.sqrt(np.mean(np.square(block))) if norm == "l2" else np.mean(np.abs(block))
                assert sizes[row, col] == block.size
                # sums of 16 float64 may differ by 16 roundings; float32 has no finer numbers than 2^-149
                rel = 2.0**-23 if found.dtype == np.float32 else 16 * 2.0**-52
                assert found[row, col] == pytest.approx(expected, rel=rel, abs=2.0**-149)

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("pattern", ["unstructured", "3x5", "rows", "columns"])
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


class TestExpand:
    @given(units, st.integers(0, 9), st.integers(0, 9), st.integers(0, 99))
    def test_a_unit_covers_its_elements(self, pattern, rows, cols, seed):
        height, width = sides(pattern, (rows, cols))
        keep = np.random.default_rng(seed).random((-(-rows // height), -(-cols // width))) < 0.5
        mask = expand_units(keep, pattern, (rows, cols))
        assert mask.flags.c_contiguous
        assert mask.shape == (rows, cols)
        for row in range(rows):
            for col in range(cols):
                assert mask[row, col] == keep[row // height, col // width]

    @pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
    def test_elements_stand_for_themselves(self, pattern):
        keep = np.array([[True, False, True]])
        assert np.array_equal(expand_units(keep, Pattern.parse(pattern), (1, 3)), keep)

    def test_other_shapes_are_refused(self):
        with pytest.raises(ValueError, match=r"expand_units: keep must be of shape \(2, 3\), got shape \(3, 2\)"):
            expand_units(np.ones((3, 2), np.bool_), Pattern("block", 2, 2), (4, 5))
