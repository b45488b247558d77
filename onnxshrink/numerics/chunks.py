"""Walks over arrays of any size and layout in pieces, so that temporary memory stays bounded and inputs stay untouched.

A piece is a read-only view into the array where its layout allows that, else a small buffer that the next step reuses:
whoever wants to keep a piece copies it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np

__all__ = ["CHUNK", "Array", "chunks", "map_chunks", "tiles"]

Array = np.ndarray[Any, np.dtype[Any]]
CHUNK = 1 << 20  # elements: temporaries of eight bytes each stay in the last-level cache

_Scalar = TypeVar("_Scalar", bound=np.generic)


def chunks(values: Array, size: int = CHUNK) -> Iterator[Array]:
    """Yields 1-D pieces of at most `size` elements that together are `values`, in the order of memory."""
    # object views (ml_dtypes) and zero-length arrays need the flags; order K follows transposed layouts without a copy
    flags: Any = ["external_loop", "buffered", "zerosize_ok"]
    with np.nditer(values, flags=flags, op_flags=[["readonly"]], order="K", buffersize=size) as pieces:
        for piece in pieces:
            yield piece  # type: ignore[misc]  # one operand yields arrays, not tuples


def map_chunks(
    function: Callable[[Array], Array], values: Array, dtype: type[_Scalar], size: int = CHUNK
) -> np.ndarray[Any, np.dtype[_Scalar]]:
    """Returns `function` of every element, applied to 1-D pieces.

    Args:
        function: takes a 1-D piece, returns an array of the same length that casts to `dtype`.
        values: any shape and layout.
        dtype: of the result.
        size: most elements of a piece.

    Returns:
        A C-contiguous array of the shape of `values`.
    """
    result = np.empty(values.shape, dtype)
    flags: Any = ["external_loop", "buffered", "zerosize_ok"]
    ways: Any = [["readonly"], ["writeonly"]]
    with np.nditer([values, result], flags=flags, op_flags=ways, order="K", buffersize=size) as pieces:
        for piece, target in pieces:
            target[...] = function(piece)
    return result


def tiles(shape: tuple[int, ...], size: int = CHUNK) -> Iterator[tuple[slice, slice]]:
    """Yields (rows, cols) slices that cover a matrix of this shape with tiles of at most `size` elements.

    Rows stay whole where they fit, and tiles of the same rows follow each other.
    """
    rows, cols = shape
    width = max(min(cols, size), 1)
    height = max(size // width, 1)
    for top in range(0, rows, height):
        for left in range(0, cols, width):
            yield slice(top, min(top + height, rows)), slice(left, min(left + width, cols))
