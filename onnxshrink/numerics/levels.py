"""The values that weights may take: chosen for a matrix, then used to round it, whole or one column at a time.

`numerics.grids` and `numerics.clusters` choose values and round whole matrices to the nearest; with error feedback
(`numerics.feedback`) the next column is known only once the last is rounded, so here a column at a time is rounded as well.

Codebooks for many rows are shared after each row was divided by a scale, s = sqrt(max |w| · rms(w)). It lies between the two usual
ones: dividing by the greatest |w| spends values on a few large weights, dividing by the rms leaves these far out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import numpy as np

from onnxshrink.numerics.chunks import Array
from onnxshrink.numerics.clusters import kmeans_1d, kmeans_rows, nearest, nearest_rows
from onnxshrink.numerics.feedback import feedback, round_with_feedback
from onnxshrink.numerics.grids import Grid, decode, encode
from onnxshrink.numerics.lloyd import thresholds

__all__ = [
    "MOST_STEPS",
    "BookLevels",
    "GridLevels",
    "Levels",
    "RowBookLevels",
    "by_channel",
    "cluster_levels",
    "round_rows",
    "row_scales",
    "step_levels",
]

Uint8s = np.ndarray[Any, np.dtype[np.uint8]]
MOST_STEPS = (
    126  # on either side of zero, one less than a byte has room for: feedback may ask for more than the weight had
)


@dataclass(frozen=True, eq=False)
class GridLevels:
    """A uniform grid a row."""

    grid: Grid

    @property
    def count(self) -> int:
        """How many rows have levels of their own; 1 where all share them."""
        return len(self.grid.scale)

    def rows(self, index: Array) -> Self:
        """Returns the levels of a selection of rows."""
        return replace(self, grid=Grid(self.grid.scale[index], self.grid.zero_point[index], self.grid.bits))

    def snap(self, column: Array) -> Array:
        """Returns the nearest allowed value for each row, float64 [rows], as float32 has it."""
        lowest = -self.grid.zero_point
        steps = np.clip(np.rint(column / self.grid.scale.astype(np.float64)), lowest, lowest + (2**self.grid.bits - 1))
        snapped: Array = (steps.astype(np.float32) * self.grid.scale).astype(np.float64)
        return snapped

    def codes(self, matrix: Array) -> Uint8s:
        """Returns the code of the nearest level of each value, uint8 [rows, columns]."""
        return encode(matrix, self.grid)

    def values(self, codes: Uint8s) -> Array:
        """Returns what codes stand for, float32 [rows, columns]."""
        return decode(codes, self.grid)


@dataclass(frozen=True, eq=False)
class BookLevels:
    """One codebook, times a scale a row if there are any.

    Attributes:
        codebook: [k], ascending.
        scale: float32 [rows], positive, or None.
    """

    codebook: Array
    scale: Array | None = None

    @property
    def count(self) -> int:
        """How many rows have levels of their own; 1 where all share them."""
        return 1 if self.scale is None else len(self.scale)

    def rows(self, index: Array) -> Self:
        """Returns the levels of a selection of rows."""
        return replace(self, scale=None if self.scale is None else self.scale[index])

    def snap(self, column: Array) -> Array:
        """Returns the nearest allowed value for each row, float64 [rows], as `values` has it."""
        relative = column if self.scale is None else column / self.scale.astype(np.float64)
        values = self.codebook[np.searchsorted(thresholds(self.codebook.astype(np.float64)), relative)]
        snapped: Array = values if self.scale is None else values.astype(np.float32) * self.scale
        return snapped.astype(np.float64)

    def codes(self, matrix: Array) -> Uint8s:
        """Returns the code of the nearest value of each value, uint8 [rows, columns]."""
        return nearest(
            matrix if self.scale is None else (matrix / self.scale[:, None]).astype(np.float32), self.codebook
        )

    def values(self, codes: Uint8s) -> Array:
        """Returns what codes stand for, float32 or the codebook's dtype where that has no scale, [rows, columns]."""
        if self.scale is None:
            return self.codebook[codes]
        scaled: Array = self.codebook.astype(np.float32)[codes] * self.scale[:, None]
        return scaled


@dataclass(frozen=True, eq=False)
class RowBookLevels:
    """A codebook a row, [rows, k], each ascending."""

    codebooks: Array

    @property
    def count(self) -> int:
        """How many rows have levels of their own; 1 where all share them."""
        return len(self.codebooks)

    def rows(self, index: Array) -> Self:
        """Returns the levels of a selection of rows."""
        return replace(self, codebooks=self.codebooks[index])

    def snap(self, column: Array) -> Array:
        """Returns the nearest allowed value for each row, float64 [rows]."""
        every, index, step = np.arange(len(column)), np.zeros(len(column), np.intp), 256
        while step := step // 2:  # a binary search in all rows at once
            tried = np.minimum(index + step, self._limits.shape[1])
            index = np.where(self._limits[every, tried - 1] < column, tried, index)
        snapped: Array = self.codebooks[every, index].astype(np.float64)
        return snapped

    @cached_property
    def _limits(self) -> Array:
        """What separates an entry from the next; beyond the last there is nothing."""
        return np.pad(thresholds(self.codebooks.astype(np.float64)), ((0, 0), (0, 1)), constant_values=np.inf)

    def codes(self, matrix: Array) -> Uint8s:
        """Returns the code of the nearest value of its row for each value, uint8 [rows, columns]."""
        return nearest_rows(matrix, self.codebooks)

    def values(self, codes: Uint8s) -> Array:
        """Returns what codes stand for, [rows, columns] of the codebooks' dtype."""
        return np.take_along_axis(self.codebooks, codes.astype(np.intp), axis=1)


Levels = GridLevels | BookLevels | RowBookLevels


def step_levels(rows: Array, step: Array) -> GridLevels:
    """Returns grids of given steps, all with one zero point, so that a code means the same number of steps in every row.

    Args:
        rows: [rows, columns] finite.
        step: float32 [rows], positive; made larger, all by one factor, where more than 256 levels would be needed.
    """
    reach = np.abs(rows).max(axis=1, initial=0.0) / step
    coarser = max(1.0, float(reach.max(initial=0.0)) / MOST_STEPS)
    scale = (step * coarser).astype(np.float32)
    return GridLevels(Grid(scale, np.full(len(scale), float(MOST_STEPS + 1), np.float32), 8))


def cluster_levels(rows: Array, k: int, *, each: bool = False, scaled: bool = True) -> BookLevels | RowBookLevels:
    """Returns codebooks of least squared error, with an entry for zero where there are more zeros than an entry's share.

    Args:
        rows: [rows, columns] of one of the four float dtypes, finite.
        k: entries, 2 to 256.
        each: whether every row has a codebook of its own.
        scaled: whether rows are divided by a scale each before they share one.
    """
    keep_zero = bool(np.count_nonzero(rows == 0) * k > rows.size)
    if each:
        return RowBookLevels(kmeans_rows(rows, k, keep_zero=keep_zero).astype(rows.dtype))
    if not scaled:
        return BookLevels(kmeans_1d(rows, k, keep_zero=keep_zero).astype(rows.dtype))
    scale = row_scales(rows)
    codebook = kmeans_1d(rows.astype(np.float32) / scale[:, None], k, keep_zero=keep_zero)
    return BookLevels(codebook.astype(np.float16), scale)  # as it is stored, so that codes fit it


def row_scales(rows: Array) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Returns sqrt(max |w| · rms(w)) of each row; 1 for rows of zeros."""
    wide = rows.astype(np.float32, copy=False)
    largest = np.maximum(wide.max(axis=1), -wide.min(axis=1))
    largest = np.where(largest > 0, largest, np.float32(1))
    relative = wide / largest[:, None]  # squares of the weights themselves may leave the range of float32
    mean_square = np.einsum("ij,ij->i", relative, relative) / np.float32(rows.shape[1])
    return np.where(mean_square > 0, largest * np.sqrt(np.sqrt(mean_square)), np.float32(1))


def by_channel(matrix: Array, channels: Array) -> Array:
    """Returns the rows [rows, columns] of each channel side by side: [channels, rows / channels · columns]."""
    order = np.argsort(channels, kind="stable")
    return matrix[order].reshape(int(channels.max(initial=0)) + 1, -1)


def round_rows(matrix: Array, grams: Array | None, levels: Levels, frozen: Array | None = None) -> Array:
    """Returns a matrix with every value at one of its row's levels: with error feedback, or the nearest.

    Args:
        matrix: float64 [rows, columns].
        grams: float64 [groups, columns, columns] for equal groups of rows, or None for no feedback.
        levels: of the rows.
        frozen: bool [rows, columns], zeros that stay zero; or None.
    """
    if grams is None:
        rounded = levels.values(levels.codes(matrix)).astype(np.float64)
        return rounded if frozen is None else np.where(frozen, 0.0, rounded)
    size = len(matrix) // len(grams)
    parts = []
    for group, gram in enumerate(grams):
        rows = np.arange(group * size, (group + 1) * size)
        zeros = frozen[rows] if frozen is not None else None
        parts.append(round_with_feedback(matrix[rows], feedback(gram), levels.rows(rows).snap, zeros))
    return np.concatenate(parts)
