"""Chooses the values that the rows of a matrix may take, or its cells (`numerics.cells`).

Codebooks for many rows are shared after each row was divided by a scale, s = sqrt(max |w| · rms(w)). It lies between the two usual
ones: dividing by the greatest |w| spends values on a few large weights, dividing by the rms leaves these far out.

Cells of a few dozen values are too many to afford more than a float16 scale each. So much is made of that:

    sign        of the value of greatest magnitude: it then lies at the same end of the levels in all cells, and that end reaches
                farther, as in the 4-bit formats of ggml (block_q4_0, ggml-common.h)
    size        of several near sqrt(max · rms), or for grids of several at or below the greatest, the one of least squared error

Grids of 4 bits and more reach the greatest value: cutting it off gains squared error of the weights, but lost up to 1.8 dB at a real
model's outputs (SqueezeNet, blocks of 64), as large weights count for more there and error feedback asks for yet larger ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from onnxshrink.numerics.chunks import Array, tiles
from onnxshrink.numerics.clusters import kmeans_1d, kmeans_rows
from onnxshrink.numerics.grids import Grid, encode
from onnxshrink.numerics.levels import BookLevels, GridLevels, RowBookLevels
from onnxshrink.numerics.sketches import sketch

__all__ = [
    "MOST_STEPS",
    "cell_clusters",
    "cell_grids",
    "cluster_levels",
    "halves",
    "relative_scales",
    "row_scales",
    "step_levels",
]

Float32s = np.ndarray[Any, np.dtype[np.float32]]
MOST_STEPS = 126  # on either side of zero, one less than a byte has room for: feedback asks for more than the weight had
_LEAST_UNCUT_BITS = 4
_GRID_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4)
_BOOK_RATIOS = (1.0, 0.8, 0.85, 0.9, 0.95, 1.05, 1.1, 1.15, 1.2)
_BOOK_ROUNDS = 2  # of choosing a codebook and then the scales; a third gains a hundredth of a decibel


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


def cell_clusters(cells: Array, k: int, importance: Array | None = None) -> BookLevels:
    """Returns one codebook, and for each cell a scale that float16 holds, of least squared error or nearly.

    Args:
        cells: [cells, n] of one of the four float dtypes, finite.
        k: entries, 2 to 256. One is zero where there are more zeros than an entry's share.
        importance: what squared errors count, of a shape that broadcasts to that of the cells; without it all alike.
    """
    keep_zero = bool(np.count_nonzero(cells == 0) * k > cells.size)
    wide = cells.astype(np.float32, copy=False)
    scale = halves(np.copysign(row_scales(wide), _greatest(wide)))
    for _ in range(_BOOK_ROUNDS):
        counts = None if importance is None else np.square(scale[:, None], dtype=np.float64) * importance
        codebook = kmeans_1d(sketch(wide / scale[:, None], counts), k, keep_zero=keep_zero).astype(np.float16)
        scale = _best_scales(wide, scale, _BOOK_RATIOS, partial(BookLevels, codebook), importance)
    return BookLevels(codebook, scale)


def cell_grids(cells: Array, bits: int, importance: Array | None = None) -> GridLevels:
    """Returns a grid for each cell, all with one zero point, of steps that float16 holds.

    Args:
        cells: [cells, n] of one of the four float dtypes, of float32's range.
        bits: 1 to 8.
        importance: what squared errors count below 4 bits, of a shape that broadcasts to that of the cells; without it all alike.
    """
    below = 2 ** (bits - 1) - 1  # levels on the side of the values of lesser magnitude; one more on the other
    wide = cells.astype(np.float32, copy=False)
    greatest = _greatest(wide)
    scale = halves(np.where(greatest == 0, np.float32(1), greatest / np.float32(below + 1)))

    def levels_of(scale: Array) -> GridLevels:
        return GridLevels(Grid(scale, np.full(len(scale), below, np.float32), bits))

    return levels_of(scale if bits >= _LEAST_UNCUT_BITS else _best_scales(wide, scale, _GRID_RATIOS, levels_of, importance))


def halves(scale: Array) -> Float32s:
    """Returns numbers as float16 rounds them, or as float32 does if one of them lies beyond the normal range of float16."""
    limits, size = np.finfo(np.float16), np.abs(scale)
    if size.min(initial=1.0) < limits.tiny or size.max(initial=1.0) > limits.max:
        return scale.astype(np.float32)
    return scale.astype(np.float16).astype(np.float32)


def _greatest(rows: Array) -> Array:
    """Returns the value of greatest magnitude of each row."""
    return np.take_along_axis(rows, np.abs(rows).argmax(axis=1)[:, None], axis=1)[:, 0]


def _best_scales(
    cells: Array,
    scale: Array,
    ratios: tuple[float, ...],
    levels_of: Callable[[Array], BookLevels | GridLevels],
    importance: Array | None,
) -> Float32s:
    """Returns for each cell that of the scales, times ratios, of least squared error; the first of equal ones."""
    candidates = halves(np.outer(np.asarray(ratios, np.float32), scale))
    errors = np.zeros(candidates.shape)
    for rows, columns in tiles(cells.shape):
        own = cells[rows, columns]
        counts = None if importance is None else np.broadcast_to(importance, cells.shape)[rows, columns]
        for index, tried in enumerate(candidates):
            levels = levels_of(tried[rows])
            squares = np.square(levels.values(levels.codes(own)) - own, dtype=np.float64)
            errors[index, rows] += (squares if counts is None else squares * counts).sum(axis=1)
    best: Float32s = candidates[errors.argmin(axis=0), np.arange(len(scale))]
    return best


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
