"""Weights become codes: every value is rounded to one of its channel's levels, and the codes say to which.

`code_in_turn` does that for many weights, each made up for from calibration data where there is any (`onnxshrink.repair`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxshrink.contract import Context
from onnxshrink.graph.codebook import Codebook, UniformGrid, spread
from onnxshrink.graph.ir import Graph
from onnxshrink.graph.tiling import Tiling, tiling
from onnxshrink.graph.weights import Weight
from onnxshrink.numerics.code_lengths import entropy_bits
from onnxshrink.numerics.levels import BookLevels, GridLevels, Levels, RowLevels, placed, round_rows
from onnxshrink.repair import Repaired, rewrite_in_turn
from onnxshrink.targets import Target

__all__ = ["Coding", "LevelsOf", "code_in_turn"]

Array = np.ndarray[Any, np.dtype[Any]]
LevelsOf = Callable[[Weight, Array, "Array | None"], tuple[RowLevels, str]]
"""f(weight, rows [tiles, n], importance of their columns [n], or [tiles, n], or None) -> (levels of the rows, a line about them)."""

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
        table, shape, tile = self.values, self.codes.shape, self.values.tile
        decoded: Array
        if isinstance(table, UniformGrid):
            zero_point = table.zero_point.astype(np.float32)
            zero_point = spread(zero_point, shape, tile) if zero_point.size > 1 else zero_point.reshape(())
            decoded = (self.codes.astype(np.float32) - zero_point) * spread(table.scale, shape, tile)
        elif table.values.ndim == 2:
            decoded = table.values[spread(np.arange(len(table.values)), shape, tile), self.codes]
        elif table.scale is None:
            decoded = table.values[self.codes]
        else:
            decoded = table.values.astype(np.float32)[self.codes] * spread(table.scale, shape, tile)
        return decoded.astype(dtype)


def code_in_turn(
    graph: Graph,
    weights: Sequence[Weight],
    levels_of: LevelsOf,
    context: Context,
    tilings: Mapping[str, Tiling] | None = None,
    targets: Mapping[str, tuple[Target, float]] | None = None,
) -> tuple[dict[str, Coding], Repaired]:
    """Returns the coding of each weight by site, and what was done beside.

    Args:
        graph: the main graph; not changed.
        weights: of it, finite.
        levels_of: chooses the values that a weight may take; for all tiles alike or for each.
        context: with activations where weights are to be made up for.
        tilings: the tiles of the weights by site; without it, channels are.
        targets: by site, of weights that are pruned in the same turn, with their shares of zeros: what is left is solved for, then
            rounded, and both errors are made up for by the layers behind.
    """
    codings: dict[str, Coding] = {}

    def rewrite(weight: Weight, wanted: Array, grams: Array | None) -> Array:
        original = weight.layout.forward(weight.constant.values)
        if targets is not None and weight.site in targets:
            target, share = targets[weight.site]
            wanted = target.pruned(wanted, grams, share, original == 0, context)
            original = wanted.astype(original.dtype)
        tiles = tilings[weight.site] if tilings is not None else tiling(weight)
        importance = None
        if grams is not None:
            importance = tiles.cells.gather_columns(np.mean(np.diagonal(grams, axis1=1, axis2=2), axis=0))
        levels, detail = levels_of(weight, tiles.cells.gather(original), importance)
        of_matrix = placed(levels, tiles.cells)
        rounded = round_rows(wanted, grams, of_matrix, _pruned(original, of_matrix))
        detail = f"{detail}, error feedback" if grams is not None else detail
        codings[weight.site] = _coding(weight, of_matrix.codes(rounded), levels, tiles, detail)
        return rounded

    repaired = rewrite_in_turn(graph, weights, rewrite, context)
    return codings, repaired


def _pruned(matrix: Array, levels: Levels) -> Array | None:
    """Returns where the zeros of a pruned weight are, or None if it is not one, or its rows have no level for them."""
    zeros = matrix == 0
    return zeros if np.count_nonzero(zeros) > _FEW_ZEROS * matrix.size and levels.has_zero else None


def _coding(weight: Weight, matrix_codes: Array, levels: RowLevels, tiles: Tiling, detail: str) -> Coding:
    tile = tiles.tile if levels.count > 1 else None
    values: Codebook | UniformGrid
    if isinstance(levels, GridLevels):
        matrix_codes, grid = _trimmed(matrix_codes, levels)
        bits, zero_point = grid.bits, grid.zero_point if len(grid.zero_point) == 1 else tiles.stored(grid.zero_point)
        values = UniformGrid(tiles.stored(grid.scale) if tile is not None else grid.scale, zero_point, tile)
    elif isinstance(levels, BookLevels):
        bits, scale = _bits(levels.codebook), levels.scale
        values = Codebook(levels.codebook, tile, scale if scale is None or tile is None else tiles.stored(scale))
    else:
        bits, values = _bits(levels.codebooks), Codebook(tiles.stored(levels.codebooks), tile)
    codes = np.ascontiguousarray(weight.layout.inverse(matrix_codes)).reshape(weight.constant.shape)
    return Coding(codes, bits, values, detail)


def _bits(codebooks: Array) -> int:
    return max(1, int(codebooks.shape[-1] - 1).bit_length())


def _trimmed(codes: Array, levels: GridLevels) -> tuple[Array, Any]:
    """Returns codes from 0 on and the grid that fits them, where all channels have one zero point."""
    grid = levels.grid
    zero_point = grid.zero_point[:1]
    if not codes.size or (grid.zero_point != zero_point).any():
        return codes, grid
    least, most = min(int(codes.min()), int(zero_point[0])), max(int(codes.max()), int(zero_point[0]))
    bits = max(1, int(most - least).bit_length())
    return codes - np.uint8(least), type(grid)(grid.scale, zero_point - least, bits)
