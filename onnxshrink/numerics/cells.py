"""A matrix in cells: rows come in groups, columns in blocks, and what one group has in one block is a cell.

    blocks          0   0   0   1   1          the cells, each a row of its own:
    groups  0     [ a   b   c   d   e ]            a b c f g h       group 0, block 0
            0     [ f   g   h   i   j ]            d e d i j i       group 0, block 1: shorter, so it repeats its values
            1     [ k   l   m   n   o ]            k l m k l m       group 1, block 0
                                                   n o n n o n       group 1, block 1

Repeated values leave the range, the mean square and the histogram of a cell as they are, or nearly where they do not come out even,
so whatever chooses levels for rows chooses them for cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from onnxshrink.numerics.chunks import Array

__all__ = ["Cells", "by_channel"]


@dataclass(frozen=True, eq=False)
class Cells:
    """Which cell each element of a matrix is in.

    Attributes:
        rows: integers [rows], the group of each row, from 0 on, none left out.
        columns: integers [columns], the block of each column, likewise.
    """

    rows: Array
    columns: Array

    @cached_property
    def groups(self) -> int:
        """How many groups of rows there are."""
        return int(self.rows.max(initial=0)) + 1

    @cached_property
    def blocks(self) -> int:
        """How many blocks of columns there are."""
        return int(self.columns.max(initial=0)) + 1

    def gather(self, matrix: Array) -> Array:
        """Returns the cells of a matrix [rows, columns], each a row, [groups · blocks, n]: those of the first group come first."""
        by_group = matrix[_places(self.rows)]
        if self.blocks <= 1:
            return by_group.reshape(self.groups, -1)
        each = by_group[:, :, _places(self.columns)]
        return each.transpose(0, 2, 1, 3).reshape(self.groups * self.blocks, -1)

    def gather_columns(self, values: Array) -> Array:
        """Returns what each column [columns] has, as `gather` orders it: for all rows of cells [n], or for each [cells, n]."""
        size = len(_places(self.rows)[0])
        by_block = np.tile(Cells(np.zeros(1, np.intp), self.columns).gather(values[None]), (1, size))
        return by_block[0] if self.blocks <= 1 else np.tile(by_block, (self.groups, 1))


def by_channel(matrix: Array, channels: Array) -> Array:
    """Returns the rows [rows, columns] of each channel side by side: [channels, rows / channels · columns]."""
    return Cells(channels, np.zeros(matrix.shape[1], np.intp)).gather(matrix)


def _places(labels: Array) -> Array:
    """Returns where each label stands, [labels, most], those of rarer ones again and again."""
    counts = np.bincount(labels)
    first = np.cumsum(counts) - counts
    every = np.arange(counts.max(initial=0))
    places: Array = np.argsort(labels, kind="stable")[first[:, None] + every % counts[:, None]]
    return places
