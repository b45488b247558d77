"""Weights become codes: every value is rounded to one of its channel's levels, and the codes say to which.

`code_in_turn` does that for many weights, each made up for from calibration data where there is any (`onnxshrink.repair`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxshrink.contract import Context
from onnxshrink.graph.codebook import Codebook, UniformGrid
from onnxshrink.graph.ir import Graph
from onnxshrink.graph.weights import Weight
from onnxshrink.numerics.code_lengths import entropy_bits
from onnxshrink.numerics.levels import BookLevels, GridLevels, Levels, by_channel, round_rows
from onnxshrink.repair import Repaired, rewrite_in_turn

__all__ = ["Coding", "LevelsOf", "code_in_turn"]

Array = np.ndarray[Any, np.dtype[Any]]
LevelsOf = Callable[[Weight, Array, "Array | None"], tuple[Levels, str]]
"""f(weight, rows [channels, n], importance of the columns [columns] or None) -> (levels, one line about them)."""

_FEW_ZEROS = 1 / 64  # a weight with fewer was not pruned: what is zero there may become something else


@dataclass(frozen=True)
class Coding:
    """What a weight becomes.

    Attributes:
        codes: uint8, of the weight's shape, below 2**bits.
        bits: of a code.
        values: what the codes stand for.
        detail: one line for people.
    """

    codes: np.ndarray[Any, np.dtype[np.uint8]]
    bits: int
    values: Codebook | UniformGrid
    detail: str

    @property
    def entropy(self) -> float:
        """Shannon entropy of the codes, bits a code."""
        return entropy_bits(np.bincount(self.codes.reshape(-1))) / max(self.codes.size, 1)

    def decoded(self, dtype: np.dtype[Any]) -> Array:
        """Returns the values that the codes stand for, as ONNX Runtime will compute them."""
        axis, table = self.values.axis, self.values
        along = tuple(size if index == axis else 1 for index, size in enumerate(self.codes.shape)) if axis is not None else ()
        decoded: Array
        if isinstance(table, UniformGrid):
            zero_point = table.zero_point.astype(np.float32).reshape(along if table.zero_point.size > 1 else ())
            decoded = (self.codes.astype(np.float32) - zero_point) * table.scale.reshape(along)
        elif table.values.ndim == 2:
            decoded = table.values[np.arange(len(table.values)).reshape(along), self.codes]
        elif table.scale is None:
            decoded = table.values[self.codes]
        else:
            decoded = table.values.astype(np.float32)[self.codes] * table.scale.reshape(along)
        return decoded.astype(dtype)


def code_in_turn(
    graph: Graph, weights: Sequence[Weight], levels_of: LevelsOf, context: Context
) -> tuple[dict[str, Coding], Repaired]:
    """Returns the coding of each weight by site, and what was done beside.

    Args:
        graph: the main graph; not changed.
        weights: of it, finite.
        levels_of: chooses the values that a weight may take; of one row for all channels or one for each.
        context: with activations where weights are to be made up for.
    """
    codings: dict[str, Coding] = {}

    def rewrite(weight: Weight, wanted: Array, grams: Array | None) -> Array:
        original = weight.layout.forward(weight.constant.values)
        channels = weight.channels
        rows = by_channel(original, channels)
        importance = None
        if grams is not None:
            importance = np.tile(np.mean(np.diagonal(grams, axis1=1, axis2=2), axis=0), rows.shape[1] // original.shape[1])
        levels, detail = levels_of(weight, rows, importance)
        of_rows = levels.rows(channels if levels.count > 1 else np.zeros_like(channels))
        rounded = round_rows(wanted, grams, of_rows, _pruned(original, of_rows))
        codings[weight.site] = _coding(weight, of_rows.codes(rounded), levels, detail, repaired=grams is not None)
        return rounded

    repaired = rewrite_in_turn(graph, weights, rewrite, context)
    return codings, repaired


def _pruned(matrix: Array, levels: Levels) -> Array | None:
    """Returns where the zeros of a pruned weight are, or None if it is not one, or its rows have no level for them."""
    zeros = matrix == 0
    pruned = np.count_nonzero(zeros) > _FEW_ZEROS * matrix.size and not levels.snap(np.zeros(len(matrix))).any()
    return zeros if pruned else None


def _coding(weight: Weight, matrix_codes: Array, levels: Levels, detail: str, repaired: bool) -> Coding:
    axis = weight.layout.channel_axis if levels.count > 1 else None
    values: Codebook | UniformGrid
    if isinstance(levels, GridLevels):
        matrix_codes, grid = _trimmed(matrix_codes, levels)
        bits, values = grid.bits, UniformGrid(grid.scale, grid.zero_point, axis)
    else:
        book = levels.codebook if isinstance(levels, BookLevels) else levels.codebooks
        bits = max(1, (book.shape[-1] - 1).bit_length())
        values = Codebook(book, axis, levels.scale if isinstance(levels, BookLevels) else None)
    codes = np.ascontiguousarray(weight.layout.inverse(matrix_codes)).reshape(weight.constant.shape)
    return Coding(codes, bits, values, f"{detail}, error feedback" if repaired else detail)


def _trimmed(codes: Array, levels: GridLevels) -> tuple[Array, Any]:
    """Returns codes from 0 on and the grid that fits them, where all channels have one zero point."""
    grid = levels.grid
    zero_point = grid.zero_point[:1]
    if not codes.size or (grid.zero_point != zero_point).any():
        return codes, grid
    least, most = min(int(codes.min()), int(zero_point[0])), max(int(codes.max()), int(zero_point[0]))
    bits = max(1, int(most - least).bit_length())
    return codes - np.uint8(least), type(grid)(grid.scale, zero_point - least, bits)
