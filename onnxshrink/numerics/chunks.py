"""Walks over arrays of any size and layout in pieces, so that temporary memory stays bounded and inputs stay untouched.

A piece is a read-only view into the array where its layout allows that, else a small buffer that the next step reuses:
whoever wants to keep a piece copies it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, TypeVar, cast

import numpy as np

__all__ = ["CHUNK", "Array", "chunk_pairs", "chunks", "map_chunks", "tiles"]

Array = np.ndarray[Any, np.dtype[Any]]
CHUNK = 1 << 20  # elements: temporaries of eight bytes each stay in the last-level cache

_FLAGS: tuple[Literal["external_loop", "buffered", "zerosize_ok"], ...] = ("external_loop", "buffered", "zerosize_ok")

_Scalar = TypeVar("_Scalar", bound=np.generic)


def chunks(values: Array, size: int = CHUNK) -> Iterator[Array]:
    """Yields 1-D pieces of at most `size` elements that together are `values`, in the order of memory."""
    with np.nditer(values, flags=_FLAGS, order="K", buffersize=size) as pieces:
        yield from cast(Iterable[Array], pieces)


def chunk_pairs(values: Array, others: Array, size: int = CHUNK) -> Iterator[tuple[Array, Array]]:
    """Yields `chunks` of two arrays of one shape, the elements of both in the same order."""
    ways: list[list[Literal["readonly"]]] = [["readonly"], ["readonly"]]
    with np.nditer([values, others], flags=_FLAGS, op_flags=ways, order="K", buffersize=size) as pieces:
        yield from cast(Iterable[tuple[Array, Array]], pieces)


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
    ways: list[list[Literal["readonly", "writeonly"]]] = [["readonly"], ["writeonly"]]
    with np.nditer([values, result], flags=_FLAGS, op_flags=ways, order="K", buffersize=size) as pieces:
        for piece, target in pieces:
            target[...] = function(piece)
    return result


def tiles(
    shape: tuple[int, ...], size: int = CHUNK, row_step: int = 1, col_step: int = 1
) -> Iterator[tuple[slice, slice]]:
    """Yields (rows, cols) slices that cover a matrix of this shape with tiles of about `size` elements at most.

    Tiles start at multiples of the steps. Rows stay whole where they fit, and tiles of the same rows follow each other.
    """
    rows, cols = shape
    width = max(min(cols, size // row_step) // col_step, 1) * col_step
    if width + col_step > cols:
        width = max(cols, 1)
    height = max(size // width // row_step, 1) * row_step
    for top in range(0, rows, height):
        for left in range(0, cols, width):
            yield slice(top, min(top + height, rows)), slice(left, min(left + width, cols))
