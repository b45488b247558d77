"""The shapes that zeros may have: any, N of each M, blocks, whole rows or columns; and what is in each unit of them.

Matrices are [rows = output channels, cols = reduction axis]. What goes or stays as a whole is a unit: an element, a block, a row or
a column. Blocks at the edges of the matrix may be smaller. They are scored by the mean over what is really there, so they compete on
equal terms, and count for the elements that they really have, so the share of zeros is what was asked for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from onnxshrink.errors import OptionError, must
from onnxshrink.numerics.chunks import CHUNK, Array, map_chunks, tiles
from onnxshrink.numerics.floatbits import check_finite

__all__ = ["Mask", "Norm", "Pattern", "check_matrix", "expand_units", "score_dtype", "scores", "unit_sizes"]

Mask = np.ndarray[Any, np.dtype[np.bool_]]
Norm = Literal["l1", "l2"]

Kind = Literal["unstructured", "n:m", "block", "rows", "columns"]
_PLAIN: dict[str, Kind] = {"unstructured": "unstructured", "rows": "rows", "columns": "columns"}
_SHORT = 64  # elements: up to here adding strided slices beats a reduction by groups


@dataclass(frozen=True)
class Pattern:
    """A shape that zeros must have.

    Attributes:
        kind: ``unstructured``; ``n:m``, at most n non-zeros in each m consecutive elements along cols (2:4 is
            NVIDIA's); ``block``, n rows x m cols zeroed as a whole; ``rows`` or ``columns``, zeroed as a whole.
        n: see kind; 1 where it has none.
        m: see kind; 1 where it has none.
    """

    kind: Kind
    n: int = 1
    m: int = 1

    def __post_init__(self) -> None:
        if self.kind == "n:m" and not 1 <= self.n < self.m:
            raise OptionError(must("pattern", "N of N:M", "at least 1 and below M", str(self), "2:4 keeps 2 of 4"))
        if self.n < 1 or self.m < 1:
            raise OptionError(must("pattern", "sides of a block", "at least 1", str(self)))

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Returns the pattern of a text such as ``unstructured``, ``2:4``, ``1x4``, ``16x1``, ``rows`` or ``columns``.

        Raises:
            OptionError: a ValueError; the text names no pattern, or an empty or full one.
        """
        if text in _PLAIN:
            return cls(_PLAIN[text])
        found = re.fullmatch(r"([0-9]{1,6})([:x])([0-9]{1,6})", text)
        if not found:
            known = "unstructured, rows, columns, N:M such as 2:4 or NxM such as 1x4"
            raise OptionError(must("pattern", "text", known, repr(text)))
        return cls("n:m" if found[2] == ":" else "block", int(found[1]), int(found[3]))

    @property
    def share(self) -> float | None:
        """The share of zeros that an N:M pattern has by itself; None where it is not fixed."""
        return 1 - self.n / self.m if self.kind == "n:m" else None

    def __str__(self) -> str:
        if self.kind in ("n:m", "block"):
            return f"{self.n}{':' if self.kind == 'n:m' else 'x'}{self.m}"
        return self.kind

    def sides(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Returns (height, width) of a unit in a matrix of this shape [rows, cols]; those of N:M are elements."""
        if self.kind == "block":
            return self.n, self.m
        return max(shape[0], 1) if self.kind == "columns" else 1, max(shape[1], 1) if self.kind == "rows" else 1

    def unit_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Returns (units along rows, units along cols) of a matrix of this shape [rows, cols]."""
        height, width = self.sides(shape)
        return -(-shape[0] // height), -(-shape[1] // width)


def scores(values: Array, pattern: Pattern, norm: Norm = "l2") -> Array:
    """Returns a score for each unit from values of its elements: weights, or saliencies of weights.

    Args:
        values: [rows, cols], one of the four float dtypes.
        pattern: elements, also those of N:M, are scored by their absolute value, larger units by the mean over their members.
        norm: ``l2`` for the root mean square, ``l1`` for the mean absolute value.

    Returns:
        [rows, cols], or [ceil(rows / n), ceil(cols / m)] for blocks, [rows, 1] for rows, [1, cols] for columns; float64 for float64
        values, else float32.

    Raises:
        ValueError: no matrix, another dtype, or a value that is not finite.
    """
    check_matrix("scores", values)
    dtype = score_dtype(values)
    height, width = pattern.sides(values.shape)
    if height == width == 1:
        return map_chunks(lambda chunk: np.abs(chunk.astype(dtype)), values, dtype)
    result = np.empty(pattern.unit_shape(values.shape), dtype)
    for rows, cols in tiles(values.shape, CHUNK, height, width):
        # in float64, where no square of a smaller float overflows or vanishes
        wide = values[rows, cols].astype(np.float64)
        terms = np.square(wide) if norm == "l2" else np.abs(wide)
        means = _sums_of_groups(_sums_of_groups(terms, width).T, height).T / _sizes(wide.shape, height, width)
        part = result[rows.start // height : -(-rows.stop // height), cols.start // width : -(-cols.stop // width)]
        part[...] = np.sqrt(means) if norm == "l2" else means
    return result


def unit_sizes(pattern: Pattern, shape: tuple[int, int]) -> Array:
    """Returns how many elements each unit of a matrix of this shape really has, int64 of the shape that `scores` returns."""
    return _sizes(shape, *pattern.sides(shape))


def expand_units(keep: Mask, pattern: Pattern, shape: tuple[int, int]) -> Mask:
    """Returns the mask of elements that a mask of units stands for.

    Args:
        keep: bool, of the shape that `scores` returns for a matrix of this shape.
        pattern: what the units are.
        shape: (rows, cols) of the matrix.

    Returns:
        bool [rows, cols].

    Raises:
        ValueError: `keep` has another shape.
    """
    expected = pattern.unit_shape(shape)
    if keep.shape != expected:
        raise ValueError(must("expand_units", "keep", f"of shape {expected}", f"shape {keep.shape}"))
    height, width = pattern.sides(shape)
    if height == width == 1:
        return keep
    tall = np.repeat(keep, height, axis=0)[: shape[0]]
    return np.ascontiguousarray(np.repeat(tall, width, axis=1)[:, : shape[1]])


def check_matrix(owner: str, matrix: Array) -> None:
    """Checks that values are a matrix of finite floats.

    Raises:
        ValueError: it has another number of axes, another dtype, or a value that is not finite.
    """
    if matrix.ndim != 2:
        raise ValueError(must(owner, "matrix", "2-D", f"shape {matrix.shape}"))
    check_finite(owner, matrix)


def score_dtype(values: Array) -> type[np.floating[Any]]:
    """Returns the dtype in which values are compared: float64 for float64, else float32."""
    return np.float64 if values.dtype == np.float64 else np.float32


def _sums_of_groups(values: Array, length: int) -> Array:
    """Returns [a, ceil(b / length)]: sums of neighbours along the last axis of [a, b]; a last group may be shorter."""
    if length > _SHORT and values.size:
        sums: Array = np.add.reduceat(values, np.arange(0, values.shape[1], length), axis=1)
        return sums
    sums = np.ascontiguousarray(values[:, ::length])
    for offset in range(1, min(length, values.shape[1])):
        members = values[:, offset::length]
        sums[:, : members.shape[1]] += members
    return sums


def _sizes(shape: tuple[int, ...], height: int, width: int) -> Array:
    sizes: Array = np.outer(_group_lengths(shape[0], height), _group_lengths(shape[1], width))
    return sizes


def _group_lengths(size: int, length: int) -> Array:
    lengths = np.full(-(-size // length), length)
    if size % length:
        lengths[-1] = size % length
    return lengths
