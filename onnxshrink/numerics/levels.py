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
from onnxshrink.numerics.sketches import sketch

__all__ = [
    "MOST_STEPS",
    "BookLevels",
    "GridLevels",
    "Levels",
    "RowBookLevels",
    "by_channel",
    "cluster_levels",
    "relative_scales",
    "round_rows",
    "row_scales",
    "step_levels",
]

Uint8s = np.ndarray[Any, np.dtype[np.uint8]]
MOST_STEPS = 126  # on either side of zero, one less than a byte has room for: feedback asks for more than the weight had


@dataclass(frozen=True, eq=False)
class GridLevels:
    """A uniform grid a row.

    Attributes:
        grid: of each row.
        price: [levels], squared steps that a code costs beside its error, or None. A value then goes one step further towards zero
            where that is worth it (entropy-constrained scalar quantization; Chou, Lookabaugh & Gray 1989).
    """

    grid: Grid
    price: Array | None = None

    @property
    def count(self) -> int:
        """How many rows have levels of their own; 1 where all share them."""
        return len(self.grid.scale)

    def rows(self, index: Array) -> Self:
        """Returns the levels of a selection of rows."""
        return replace(self, grid=Grid(self.grid.scale[index], self.grid.zero_point[index], self.grid.bits))

    def snap(self, values: Array) -> Array:
        """Returns the nearest allowed value for each row, or the best at its price, as float32 has it.

        Args:
            values: float64 [rows], a column, or [rows, columns].
        """
        scale, lowest = (array.reshape(-1, *[1] * (values.ndim - 1)) for array in (self.grid.scale, -self.grid.zero_point))
        wanted = values / scale.astype(np.float64)
        steps = np.clip(np.rint(wanted), lowest, lowest + (2**self.grid.bits - 1))
        if self.price is not None:
            nearer = steps - np.sign(steps)
            costs = [(wanted - level) ** 2 + self.price[(level - lowest).astype(np.intp)] for level in (steps, nearer)]
            steps = np.where(costs[1] < costs[0], nearer, steps)
        snapped: Array = (steps.astype(np.float32) * scale).astype(np.float64)
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


def step_levels(rows: Array, step: Array, rate_weight: float = 0.0) -> GridLevels:
    """Returns grids of given steps, all with one zero point, so that a code means the same number of steps in every row.

    Args:
        rows: [rows, columns] finite.
        step: float32 [rows], positive; made larger, all by one factor, where more than 256 levels would be needed.
        rate_weight: how many squared steps of error a bit is worth; 0 for the nearest level always. At high rate the slope of error
            over bits is 2 ln 2 / 12, about 0.12. The bits of a level are those that plain rounding would need.
    """
    reach = np.abs(rows).max(axis=1, initial=0.0) / step
    coarser = max(1.0, float(reach.max(initial=0.0)) / MOST_STEPS)
    scale = (step * coarser).astype(np.float32)
    grid = Grid(scale, np.full(len(scale), float(MOST_STEPS + 1), np.float32), 8)
    if not rate_weight:
        return GridLevels(grid)
    counts = np.bincount(encode(rows, grid).reshape(-1), minlength=256) + 0.5  # none is impossible
    return GridLevels(grid, -rate_weight * np.log2(counts / counts.sum()))


def cluster_levels(
    rows: Array, k: int, *, each: bool = False, scaled: bool = True, importance: Array | None = None
) -> BookLevels | RowBookLevels:
    """Returns codebooks of least squared error, with an entry for zero where there are more zeros than an entry's share.

    Args:
        rows: [rows, columns] of one of the four float dtypes, finite.
        k: entries, 2 to 256.
        each: whether every row has a codebook of its own.
        scaled: whether rows are divided by a scale each before they share one.
        importance: [columns], not negative: what squared errors in a column count. The diagonal of the Gram matrix of the inputs
            makes them squared errors of the outputs (Choi et al., arXiv 1612.01543); without one all count alike.
    """
    keep_zero = bool(np.count_nonzero(rows == 0) * k > rows.size)
    if each:
        return RowBookLevels(kmeans_rows(rows, k, keep_zero=keep_zero, importance=importance).astype(rows.dtype))
    if not scaled:
        return BookLevels(kmeans_1d(sketch(rows, importance), k, keep_zero=keep_zero).astype(rows.dtype))
    scale = row_scales(rows)
    counts = None if importance is None else np.square(scale[:, None], dtype=np.float64) * importance
    codebook = kmeans_1d(sketch(rows.astype(np.float32) / scale[:, None], counts), k, keep_zero=keep_zero)
    return BookLevels(codebook.astype(np.float16), scale)  # as it is stored, so that codes fit it


def relative_scales(rows: Array, exponent: float = 0.5) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Returns a power of each row's rms, relative to their geometric mean, for rows [rows, columns]; 1 for rows of zeros."""
    rms = np.sqrt(np.mean(np.square(rows, dtype=np.float64), axis=1))
    used = rms > 0
    if not used.any():
        return np.ones(len(rows), np.float32)
    typical = np.exp(np.mean(np.log(rms[used])))
    return (np.where(used, rms / typical, 1.0) ** exponent).astype(np.float32)


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
        priced = isinstance(levels, GridLevels) and levels.price is not None
        rounded = levels.snap(matrix) if priced else levels.values(levels.codes(matrix)).astype(np.float64)
        return rounded if frozen is None else np.where(frozen, 0.0, rounded)
    size = len(matrix) // len(grams)
    parts = []
    for group, gram in enumerate(grams):
        rows = np.arange(group * size, (group + 1) * size)
        zeros = frozen[rows] if frozen is not None else None
        parts.append(round_with_feedback(matrix[rows], feedback(gram), levels.rows(rows).snap, zeros))
    return np.concatenate(parts)
