"""Tests of bit patterns: widths, and what counts as finite in each float dtype."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxshrink.numerics.floatbits import bits_of, check_finite, rounded_to, unit_roundoff

FLOATS = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


@pytest.mark.parametrize("dtype", [*FLOATS, np.int8, np.int64, np.bool_])
def test_bits_are_a_view_as_wide_as_the_elements(dtype):
    values = np.array([0, 1, 1], dtype)
    patterns = bits_of(values)
    assert patterns.dtype.kind == "u"
    assert patterns.dtype.itemsize == values.dtype.itemsize
    assert np.shares_memory(patterns, values)
    assert patterns.tobytes() == values.tobytes()


def test_other_widths_are_refused():
    with pytest.raises(ValueError, match=r"dtype must be 1, 2, 4 or 8 bytes wide, got complex128"):
        bits_of(np.zeros(2, np.complex128))


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_finite_value_passes(dtype):
    finite = ml_dtypes.finfo(dtype)
    extremes = [finite.max, finite.min, finite.tiny, finite.smallest_subnormal, dtype(0), dtype(-0.0)]
    check_finite("owner", np.array(extremes, dtype))
    check_finite("owner", np.zeros((0, 3), dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_one_value_that_is_not_finite_is_found_in_any_layout(dtype, bad):
    values = np.ones((5, 4), dtype)
    values[3, 2] = bad
    for view in (values, values.T, values[::-1], values[:, 2]):
        with pytest.raises(ValueError, match="owner: values must be finite, got a NaN or an infinity"):
            check_finite("owner", view)


def test_integers_are_refused():
    with pytest.raises(ValueError, match="owner: dtype must be float16, bfloat16, float32 or float64, got int8"):
        check_finite("owner", np.zeros(3, np.int8))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32, np.float64])
def test_no_subnormal_number_is_stored(dtype):
    least = float(ml_dtypes.finfo(dtype).smallest_normal)
    values = np.array([0.0, least / 2, -least / 3, least, 1.0, -3.0])
    rounded = rounded_to(values, np.dtype(dtype))
    assert rounded.dtype == dtype
    np.testing.assert_array_equal(rounded.astype(np.float64), [0.0, 0.0, 0.0, least, 1.0, -3.0])


def test_float16_keeps_its_subnormal_numbers_and_overflows_to_infinity():
    np.testing.assert_array_equal(rounded_to(np.array([6e-8, 1e6]), np.dtype(np.float16)), np.array([6e-8, np.inf], np.float16))


@pytest.mark.parametrize("dtype", FLOATS)
def test_half_of_the_step_after_one_is_the_unit(dtype):
    dtype = np.dtype(dtype)
    unit = unit_roundoff(dtype)
    assert unit == float(ml_dtypes.finfo(dtype).eps) / 2
    if dtype != np.float64:  # a number right between two goes to the even one, and a little more to the next
        np.testing.assert_array_equal(np.array([1 + unit, 1 + 1.01 * unit]).astype(dtype).astype(np.float64), [1.0, 1 + 2 * unit])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@given(value=st.floats(1e-4, 6e4), sign=st.sampled_from([1, -1]))
def test_no_number_is_moved_by_more_than_the_unit(dtype, value, sign):
    moved = abs(float(rounded_to(np.array(sign * value), np.dtype(dtype))) - sign * value)
    assert moved <= unit_roundoff(np.dtype(dtype)) * value
