"""The values that weights may take, by row or by block of a matrix, used to round it, whole or one column at a time.

`numerics.grids` and `numerics.clusters` round whole matrices to the nearest value; with error feedback (`numerics.feedback`) the
next column is known only once the last is rounded, so here a column at a time is rounded as well. `numerics.level_choice` chooses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import numpy as np

from onnxshrink.numerics.cells import Cells
from onnxshrink.numerics.chunks import Array
from onnxshrink.numerics.clusters import nearest, nearest_rows
from onnxshrink.numerics.feedback import feedback, round_with_feedback
from onnxshrink.numerics.grids import Grid, decode, encode
from onnxshrink.numerics.lloyd import thresholds

__all__ = ["BlockLevels", "BookLevels", "GridLevels", "Levels", "RowBookLevels", "RowLevels", "placed", "round_rows"]

Uint8s = np.ndarray[Any, np.dtype[np.uint8]]


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

    @property
    def has_zero(self) -> bool:
        """Whether every row has a level for zero."""
        return True

    def snap(self, values: Array, _: int = 0) -> Array:
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

    def rounded(self, matrix: Array) -> Array:
        """Returns the nearest allowed values of a matrix, or the best at their price, float64 [rows, columns]."""
        return self.snap(matrix) if self.price is not None else self.values(self.codes(matrix)).astype(np.float64)


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

    @property
    def has_zero(self) -> bool:
        """Whether there is a level for zero."""
        return bool((self.codebook == 0).any())

    def snap(self, column: Array, _: int = 0) -> Array:
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

    def rounded(self, matrix: Array) -> Array:
        """Returns the nearest allowed values of a matrix, float64 [rows, columns]."""
        return self.values(self.codes(matrix)).astype(np.float64)


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

    @property
    def has_zero(self) -> bool:
        """Whether every row has a level for zero."""
        return bool((self.codebooks == 0).any(axis=1).all())

    def snap(self, column: Array, _: int = 0) -> Array:
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

    def rounded(self, matrix: Array) -> Array:
        """Returns the nearest allowed values of a matrix, float64 [rows, columns]."""
        return self.values(self.codes(matrix)).astype(np.float64)


RowLevels = GridLevels | BookLevels | RowBookLevels


@dataclass(frozen=True, eq=False)
class BlockLevels:
    """Levels that differ from one block of columns to the next.

    Attributes:
        blocks: the levels of every row in each block.
        columns: integers [columns], the block of each column.
    """

    blocks: tuple[RowLevels, ...]
    columns: Array

    @property
    def count(self) -> int:
        """How many rows have levels of their own; 1 where all share them."""
        return self.blocks[0].count

    def rows(self, index: Array) -> Self:
        """Returns the levels of a selection of rows."""
        return replace(self, blocks=tuple(block.rows(index) for block in self.blocks))

    @property
    def has_zero(self) -> bool:
        """Whether every row has a level for zero in every block."""
        return all(block.has_zero for block in self.blocks)

    def snap(self, values: Array, column: int) -> Array:
        """Returns the nearest allowed value of a column for each row, float64 [rows]."""
        own: RowLevels = self.blocks[self.columns[column]]
        return own.snap(values)

    def codes(self, matrix: Array) -> Uint8s:
        """Returns the code of the nearest level of each value, uint8 [rows, columns]."""
        return self._each(lambda block, values: block.codes(values), matrix, np.dtype(np.uint8))

    def values(self, codes: Uint8s) -> Array:
        """Returns what codes stand for, float32 [rows, columns]."""
        return self._each(lambda block, values: block.values(values), codes, np.dtype(np.float32))

    def rounded(self, matrix: Array) -> Array:
        """Returns the nearest allowed values of a matrix, or the best at their price, float64 [rows, columns]."""
        return self._each(lambda block, values: block.rounded(values), matrix, np.dtype(np.float64))

    def _each(self, function: Callable[[RowLevels, Array], Array], matrix: Array, dtype: np.dtype[Any]) -> Array:
        """Returns what a function makes of each block and its columns, side by side as those were."""
        result = np.empty(matrix.shape, dtype)
        for number, block in enumerate(self.blocks):
            own = np.flatnonzero(self.columns == number)
            result[:, own] = function(block, matrix[:, own])
        return result


Levels = RowLevels | BlockLevels


def placed(levels: RowLevels, cells: Cells) -> Levels:
    """Returns the levels of a matrix, by row and where they differ by block, from those of its cells.

    Args:
        levels: one for each cell, or one for all.
        cells: of the matrix.
    """
    if levels.count == 1:
        return levels.rows(np.zeros_like(cells.rows))
    first = cells.rows * cells.blocks
    if cells.blocks == 1:
        return levels.rows(first)
    return BlockLevels(tuple(levels.rows(first + block) for block in range(cells.blocks)), cells.columns)


def round_rows(matrix: Array, grams: Array | None, levels: Levels, frozen: Array | None = None) -> Array:
    """Returns a matrix with every value at one of its row's levels: with error feedback, or the nearest.

    Args:
        matrix: float64 [rows, columns].
        grams: float64 [groups, columns, columns] for equal groups of rows, or None for no feedback.
        levels: of the rows.
        frozen: bool [rows, columns], zeros that stay zero; or None.
    """
    if grams is None:
        rounded = levels.rounded(matrix)
        return rounded if frozen is None else np.where(frozen, 0.0, rounded)
    size = len(matrix) // len(grams)
    parts = []
    for group, gram in enumerate(grams):
        rows = np.arange(group * size, (group + 1) * size)
        zeros = frozen[rows] if frozen is not None else None
        parts.append(round_with_feedback(matrix[rows], feedback(gram), levels.rows(rows).snap, zeros))
    return np.concatenate(parts)
