"""Tests of uniform grids: what rounding promises, exact zeros and constants, and the arithmetic of ONNX in float32."""

from __future__ import annotations

import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxshrink.numerics import chunks as chunks_module
from onnxshrink.numerics.grids import Grid, decode, encode, fit_grid

FLOATS = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]
LARGEST = float(np.finfo(np.float32).max)

matrices = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 9)),
    elements=st.one_of(
        st.floats(-10, 10, width=32),
        st.floats(width=32, allow_nan=False, allow_infinity=False),
        st.sampled_from([0.0, -0.0, 1.0]),
    ),
)


def squared_errors(matrix, grid):
    difference = decode(encode(matrix, grid), grid).astype(np.float64) - matrix.astype(np.float64)
    return np.square(difference).sum(axis=1)


@given(matrices, st.integers(1, 8))
def test_codes_are_levels_and_zero_is_one_of_them(matrix, bits):
    grid = fit_grid(matrix, bits)
    codes, values = encode(matrix, grid), decode(encode(matrix, grid), grid)
    assert (grid.bits, grid.scale.dtype, grid.zero_point.dtype) == (bits, np.float32, np.float32)
    assert np.all(grid.scale > 0)
    assert np.isin(grid.zero_point, np.arange(2**bits)).all()
    assert not np.signbit(grid.zero_point).any()
    assert codes.dtype == np.uint8
    assert codes.max() < 2**bits
    assert values.dtype == np.float32
    assert np.isfinite(values).all()
    assert np.all(values[matrix == 0] == 0)
    assert np.array_equal(encode(values, grid), codes)


@given(matrices)
def test_eight_bits_err_by_half_a_step_at_most(matrix):
    grid = fit_grid(matrix, 8)
    scale = grid.scale[:, None].astype(np.float64)
    inside = np.abs(matrix) <= LARGEST / 2  # steps of larger ranges are held down lest the last level overflow
    error = np.abs(decode(encode(matrix, grid), grid).astype(np.float64) - matrix)
    # step, quotient and product are rounded to float32, each up to 255 steps times 2^-24
    assert np.all((error <= scale * (0.5 + 4 * 255 * 2.0**-24))[inside])


@given(matrices, st.integers(1, 8))
def test_levels_are_what_onnx_computes(matrix, bits):
    grid = fit_grid(matrix, bits)
    codes = encode(matrix, grid)
    values = decode(codes, grid)
    for (row, col), code in np.ndenumerate(codes):
        # Cast, Sub, Mul, each rounded to float32
        assert values[row, col] == (np.float32(code) - grid.zero_point[row]) * grid.scale[row]


@given(matrices, st.integers(1, 8))
def test_every_value_gets_the_nearest_level(matrix, bits):
    grid = fit_grid(matrix, bits)
    every_code = np.tile(np.arange(2**bits, dtype=np.uint8), (len(matrix), 1))
    with np.errstate(over="ignore"):  # a constant row's grid may have levels that none of its values takes
        levels = decode(every_code, grid).astype(np.float64)
    error = np.abs(decode(encode(matrix, grid), grid).astype(np.float64) - matrix)
    least = np.abs(levels[:, None, :] - matrix[:, :, None].astype(np.float64)).min(axis=2)
    assert np.all(error - least <= grid.scale[:, None].astype(np.float64) * 2 * 255 * 2.0**-24)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(1, 8), st.integers(1, 5))
def test_constant_rows_come_back_exactly(value, bits, cols):
    matrix = np.full((1, cols), value, np.float32)
    grid = fit_grid(matrix, bits)
    assert np.array_equal(decode(encode(matrix, grid), grid), matrix)


@given(st.floats(2.0**-100, 2.0**100, width=32), st.booleans())
def test_one_bit_is_exact_for_a_value_and_zero(value, negative):
    matrix = np.array([[0, value, 0, 0]], np.float32) * (-1 if negative else 1)
    grid = fit_grid(matrix, 1)
    assert np.array_equal(decode(encode(matrix, grid), grid), matrix)


def test_one_bit_takes_the_side_that_errs_least():
    matrix = np.array([[-1.0, 1, 1, 1], [-1, -1, -1, 1]])
    grid = fit_grid(matrix, 1)
    assert decode(encode(matrix, grid), grid).tolist() == [[0, 1, 1, 1], [-1, -1, -1, 0]]


@pytest.mark.parametrize("bits", range(2, 8))
def test_below_eight_bits_no_tried_ratio_errs_less(bits):
    matrix = np.random.default_rng(bits).standard_t(3, (30, 200)).astype(np.float32)
    matrix[::3] = np.abs(matrix[::3])
    chosen = squared_errors(matrix, fit_grid(matrix, bits))
    low = np.minimum(matrix.min(axis=1), 0).astype(np.float64)
    high = np.maximum(matrix.max(axis=1), 0).astype(np.float64)
    errors = []
    for ratio in (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3):
        scale = (ratio * (high - low) / (2**bits - 1)).astype(np.float32)
        zero_point = np.round(-ratio * low / scale).astype(np.float32)
        errors.append(squared_errors(matrix, Grid(scale, zero_point, bits)))
    # the choice compares errors whose terms are rounded to float32: 2^-24 of a level, of at most 127 half steps
    assert chosen == pytest.approx(np.min(errors, axis=0), rel=254 * 2.0**-23)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_clipping_pays_with_few_bits_and_tails(bits):
    matrix = np.random.default_rng(bits).laplace(size=(4, 2000))
    spanned = (matrix.max(axis=1) - matrix.min(axis=1)) / (2**bits - 1)
    assert np.all(fit_grid(matrix, bits).scale < 0.8 * spanned)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_rows_are_independent_of_company_layout_and_tiles(bits, monkeypatch):
    matrix = np.random.default_rng(0).standard_normal((6, 50)).astype(np.float32)
    grid = fit_grid(matrix, bits)
    codes = encode(matrix, grid)
    tiles = chunks_module.tiles
    for view in (np.asfortranarray(matrix), np.repeat(matrix, 2, axis=1)[:, ::2]):
        assert np.array_equal(encode(view, fit_grid(view, bits)), codes)
    alone = [fit_grid(row[None], bits) for row in matrix]
    assert np.array_equal(np.concatenate([one.scale for one in alone]), grid.scale)
    assert np.array_equal(np.concatenate([one.zero_point for one in alone]), grid.zero_point)
    monkeypatch.setattr("onnxshrink.numerics.grids.tiles", lambda shape: tiles(shape, 16))
    again = fit_grid(matrix, bits)
    assert np.array_equal(again.zero_point, grid.zero_point)
    assert np.array_equal(again.scale, grid.scale)
    assert np.array_equal(encode(matrix, grid), codes)


@pytest.mark.parametrize("dtype", FLOATS)
def test_all_float_dtypes_give_the_codes_of_float32(dtype):
    matrix = np.random.default_rng(0).standard_normal((5, 40)).astype(dtype)
    grid, reference = fit_grid(matrix, 5), fit_grid(matrix.astype(np.float32), 5)
    # float64 is rounded to float32 before it is coded, but not before its range is taken
    assert grid.scale == pytest.approx(reference.scale, rel=2.0**-23)
    assert np.array_equal(encode(matrix, reference), encode(matrix.astype(np.float32), reference))


def test_eight_bits_are_not_clipped():
    matrix = np.append(np.random.default_rng(0).standard_normal(10_000), 100)[None]
    grid = fit_grid(matrix, 8)
    assert decode(encode(matrix, grid), grid)[0, -1] == pytest.approx(100, rel=1e-2)


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_extreme_ranges_stay_finite(bits):
    tiny = np.float32(1e-45)
    matrix = np.array([[LARGEST, -LARGEST], [LARGEST, -1], [tiny, -tiny], [tiny, 0]], np.float32)
    grid = fit_grid(matrix, bits)
    assert np.isfinite(grid.scale).all()
    assert np.isfinite(decode(encode(matrix, grid), grid)).all()


def test_rows_of_zeros_and_no_rows_or_columns():
    for shape in ((2, 3), (2, 0), (0, 3)):
        matrix = np.zeros(shape)
        grid = fit_grid(matrix, 4)
        assert grid.scale.tolist() == [1.0] * shape[0]
        assert grid.zero_point.tolist() == [0.0] * shape[0]
        assert np.array_equal(decode(encode(matrix, grid), grid), matrix)


def test_encoding_beyond_the_range_gives_the_ends():
    grid = Grid(np.ones(1, np.float32), np.full(1, 2, np.float32), 3)
    assert encode(np.array([[-9.0, -2, 5, 6, 1e30]]), grid).tolist() == [[0, 0, 7, 7, 7]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit_grid(np.ones((1, 1)), 0), "fit_grid: bits must be between 1 and 8, got 0"),
        (lambda: fit_grid(np.ones((1, 1)), 9), "fit_grid: bits must be between 1 and 8, got 9"),
        (lambda: fit_grid(np.ones(3), 4), r"fit_grid: matrix must be 2-D, got shape \(3,\)"),
        (lambda: fit_grid(np.array([[np.nan]]), 4), "fit_grid: values must be finite"),
        (
            lambda: fit_grid(np.array([[1, -1e39]]), 4),
            "fit_grid: values must be in the range of float32, got a larger one",
        ),
        (lambda: fit_grid(np.ones((1, 1), np.int8), 4), "fit_grid: dtype must be float16"),
        (lambda: encode(np.ones((3, 1)), fit_grid(np.ones((2, 1)), 4)), "encode: matrix must be 2-D with 2 rows"),
        (lambda: encode(np.array([[np.inf]]), fit_grid(np.ones((1, 1)), 4)), "encode: values must be finite"),
        (
            lambda: decode(np.ones((3, 1), np.uint8), fit_grid(np.ones((2, 1)), 4)),
            "decode: matrix must be 2-D with 2 rows",
        ),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("shape", [(4096, 4096), (1, 1 << 24)])
def test_memory_does_not_grow_with_the_matrix(shape):
    matrix = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    matrix.flags.writeable = False
    tracemalloc.start()
    codes = encode(matrix, fit_grid(matrix, 8))
    peak = tracemalloc.get_traced_memory()[1] - codes.nbytes
    tracemalloc.stop()
    assert peak < matrix.nbytes / 2
