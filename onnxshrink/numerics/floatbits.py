"""The bits of floats, seen as unsigned integers: float16, bfloat16, float32 and float64.

Sign first, then exponent, then mantissa: the top bits of the pattern bin values by sign and size at a constant relative
width, and values with every exponent bit set are the non-finite ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxshrink.errors import must
from onnxshrink.numerics.chunks import Array, chunks

__all__ = ["bits_of", "check_finite", "rounded_to", "unit_roundoff"]

_EXPONENTS = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F80_0000, "float64": 0x7FF0_0000_0000_0000}
_SUBNORMAL = {"bfloat16": 2.0**-126, "float32": 2.0**-126, "float64": 2.0**-1022}  # below it; those of float16 are computed with as float32
_MANTISSA = {"float16": 11, "bfloat16": 8, "float32": 24, "float64": 53}  # with the bit that is not stored
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def bits_of(values: Array) -> Array:
    """Returns the bit patterns, a view of unsigned integers as wide as the elements, whatever their dtype.

    Raises:
        ValueError: elements are not 1, 2, 4 or 8 bytes wide.
    """
    unsigned = _UNSIGNED.get(values.dtype.itemsize)
    if unsigned is None:
        raise ValueError(must("floatbits", "dtype", "1, 2, 4 or 8 bytes wide", values.dtype))
    return values.view(unsigned)


def check_finite(owner: str, values: Array) -> None:
    """Checks that values are floats, all of them finite.

    Args:
        owner: named in the error.
        values: any shape.

    Raises:
        ValueError: another dtype than float16, bfloat16, float32 or float64; a NaN or an infinity.
    """
    mask = _EXPONENTS.get(values.dtype.name)
    if mask is None:
        raise ValueError(must(owner, "dtype", "float16, bfloat16, float32 or float64", values.dtype))
    for chunk in chunks(values):
        patterns = bits_of(chunk)  # ufuncs on bfloat16 are slow
        if int((patterns & patterns.dtype.type(mask)).max()) == mask:
            raise ValueError(must(owner, "values", "finite", "a NaN or an infinity"))


def rounded_to(values: Array, dtype: np.dtype[Any]) -> Array:
    """Returns computed weights in the dtype that stores them: infinite beyond its range, and zero instead of subnormal.

    A product with a subnormal number takes a hundred times as long on x86 processors: 5,180 of 200,000 weights of a convolution made
    it 50 times slower (ONNX Runtime 1.31, AVX-512).
    """
    with np.errstate(over="ignore", under="ignore"):
        rounded = values.astype(dtype)
    least = _SUBNORMAL.get(dtype.name)
    return rounded if least is None else np.where(np.abs(values) < least, dtype.type(0), rounded)


def unit_roundoff(dtype: np.dtype[Any]) -> float:
    """Returns the largest relative error of rounding to the nearest number of a dtype of `check_finite`."""
    return 2.0 ** -_MANTISSA[dtype.name]
