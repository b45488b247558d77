"""Which elements of a weight share a scale: those of one tile, some output channels by some inputs of each.

A tile is a box of the stored tensor: ``channels`` neighbours on its axis of output channels, ``block`` on the axis that is summed
over, and all of any other axis. So a block of a Conv's weight spans the whole kernel, and one of an LSTM's both directions.

    Conv              W [O, I/g, *k]    tile [channels, block, *k]
    ConvTranspose     W [I, O, *k]      tile [block, channels, *k]        of one group
    MatMul, Gemm      B [*b, K, N]      tile [*b, block, channels]
    LSTM, GRU, RNN    W [d, gates·H, I] tile [d, channels, block]
    no block          any               tile of all that a channel has
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxshrink.graph.weights import Weight
from onnxshrink.numerics.cells import Cells

__all__ = ["Tiling", "tiling"]

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class Tiling:
    """A weight in tiles.

    Attributes:
        tile: its size along each axis of the stored tensor; the last ones of an axis may be smaller.
        cells: the tiles as cells of the weight's layout, [rows, columns].
        channels_first: whether the axis of channels comes before that of blocks in the stored tensor.
        text: how many there are, for people; nothing if all is one tile.
    """

    tile: tuple[int, ...]
    cells: Cells
    channels_first: bool
    text: str

    def stored(self, by_cell: Array) -> Array:
        """Returns what each cell has, [groups · blocks, ...], in the order of the tiles in the stored tensor, [tiles, ...]."""
        if self.channels_first or self.cells.blocks == 1:
            return by_cell
        apart = by_cell.reshape(self.cells.groups, self.cells.blocks, *by_cell.shape[1:])
        return np.ascontiguousarray(apart.swapaxes(0, 1)).reshape(by_cell.shape)


def tiling(weight: Weight, channels: int = 1, block: int | None = None) -> Tiling:
    """Returns the tiles of a weight.

    A table whose rows are looked up has tiles of one row, and a weight without an axis of channels is one tile: there neither
    argument has a meaning, and the text says so. Nor has ``block`` where no axis is summed over for all channels alike.

    Args:
        weight: any.
        channels: how many neighbouring output channels a tile has.
        block: how many neighbours it has along the axis that is summed over; None for all.
    """
    tile, axis = list(weight.constant.shape), weight.layout.channel_axis
    columns, first, why = np.zeros(weight.layout.shape[1], np.intp), True, ""
    asked = channels > 1 or block is not None
    if axis is None or not weight.computes:
        why = "" if not asked else "no tiles: its rows are looked up" if axis is not None else "no tiles: no axis is that of channels"
        channels, block = 1, None
    if axis is not None:
        tile[axis] = channels = min(channels, tile[axis])
    if axis is not None and block is not None:
        along = _summed_axis(weight)
        if along is None:
            why = "no blocks: no axis is summed over for all channels alike"
        else:
            tile[along[0]], columns, first = min(block, tile[along[0]]), along[1] // block, axis < along[0]
    cells = Cells(weight.channels // channels, columns)
    return Tiling(tuple(tile), cells, first, ", ".join(filter(None, (_text(cells, channels, block), why))))


def _text(cells: Cells, channels: int, block: int | None) -> str:
    if cells.groups * cells.blocks == 1:
        return ""
    plural = "s" if cells.groups > 1 else ""
    groups = f"{cells.groups} channel{plural}" if channels == 1 else f"{cells.groups} group{plural} of {channels} channels"
    return groups if cells.blocks == 1 else f"{groups} in {cells.blocks} blocks of {block}"


def _summed_axis(weight: Weight) -> tuple[int, Array] | None:
    """Returns the stored axis that is summed over, the outermost if there are several, and where on it each column lies."""
    layout, shape = weight.layout, weight.constant.shape
    for axis, size in enumerate(shape):
        if axis != layout.channel_axis and size > 1:
            own = np.arange(size, dtype=np.int32).reshape([size if at == axis else 1 for at in range(len(shape))])
            places = layout.forward(np.broadcast_to(own, shape))
            if np.array_equal(places, np.broadcast_to(places[0], places.shape)) and (np.diff(places[0]) >= 0).all():
                return axis, places[0].astype(np.intp)
    return None
