"""Gram matrices of what a layer multiplies its weights with, summed over positions: H = sum of x x^T.

To second order, changing the rows W of a layer by D changes its outputs by trace(D H D^T) in squared error, whatever the
rest of the network is: the quantity that optimal brain surgeon, GPTQ (arXiv 2210.17323) and least-squares repair work on.

Products of at most `MAX_POSITIONS` positions are made in float32 by BLAS, half of the work where one factor is the other
transposed (ssyrk), and are summed in float64. So the relative error does not grow with the number of samples: it stays
near 2^-24 times the error growth within one block. Products below float32's range vanish; blocks whose products exceed it are
computed in float64.

OpenBLAS waits actively for its threads: where other programs take the cores, products of this size took 10 to 40 times as long
with two threads as with OPENBLAS_NUM_THREADS=1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.linalg import blas

from onnxshrink.errors import must
from onnxshrink.numerics.chunks import Array

__all__ = ["MAX_POSITIONS", "Gram", "GramSum", "PairedGram", "block_positions", "buffer_positions", "frozen"]

MAX_POSITIONS = 4096  # a block: enough for BLAS to be fast, few enough for sums in float32
_BLOCK_ELEMENTS = 1 << 24  # 64 MB of float32
_SMALL_COLUMNS = 64  # up to here one batched product beats one BLAS call a group


@dataclass(frozen=True, eq=False)
class Gram:
    """The moments of the inputs of a layer, one matrix a group.

    Attributes:
        matrix: float64 [groups, columns, columns], read-only: sum of x x^T, symmetric, positive semidefinite up to rounding.
        total: float64 [groups, columns], read-only: sum of x.
        count: how many positions x were summed.
    """

    matrix: Array
    total: Array
    count: int

    @property
    def mean(self) -> Array:
        """The mean x, float64 [groups, columns]; zero when there were no positions."""
        mean: Array = self.total / max(self.count, 1)
        return mean

    @property
    def shrunk(self) -> Array:
        """The matrices, float64 [groups, columns, columns], with more on the diagonal where positions are few.

        A matrix made of few positions lets errors hide in directions that no input happened to show. Added is the mean of the
        diagonal times columns / count: nothing much where positions abound, as much as is there where they are as few as
        columns. A quarter of it did as well on two models; the weight of oracle approximating shrinkage (Chen, Wiesel, Eldar,
        Hero 2010), which trusts correlated inputs more, lost up to a decibel on other inputs than those.
        """
        mean = np.trace(self.matrix, axis1=1, axis2=2) / max(self.count, 1)
        shrunk: Array = self.matrix + mean[:, None, None] * np.eye(self.matrix.shape[-1])
        return shrunk

    def __add__(self, other: Gram) -> Gram:
        """Returns the moments of both sets of positions together."""
        return Gram(frozen(self.matrix + other.matrix), frozen(self.total + other.total), self.count + other.count)


@dataclass(frozen=True, eq=False)
class PairedGram:
    """The moments of what a layer meets now, x', together with the error of its output, e = what it should be - what it is now.

    Attributes:
        now: of x'.
        error: float64 [groups, rows, columns], read-only: sum of e x'^T. Without any other reason for errors than the changed
            inputs, e = W (x - x'), x being what the layer met before.
        error_mean: float64 [groups, rows], read-only: the mean e; zero when there were no positions.
    """

    now: Gram
    error: Array
    error_mean: Array

    def __add__(self, other: PairedGram) -> PairedGram:
        """Returns the moments of both sets of positions together."""
        now, error = self.now + other.now, frozen(self.error + other.error)
        total = self.error_mean * self.now.count + other.error_mean * other.now.count
        return PairedGram(now, error, frozen(total / max(now.count, 1)))


class GramSum:
    """Sums Gram matrices over chunks of positions; few positions wait in a buffer until BLAS is worth calling."""

    def __init__(self, name: str, groups: int, columns: int) -> None:
        """An empty sum.

        Args:
            name: what is summed, for errors.
            groups: each with a matrix of its own.
            columns: of every matrix.
        """
        self.name = name
        self.groups = groups
        self.columns = columns
        self.count = 0
        self._matrix = np.zeros((groups, columns, columns))  # the lower triangle holds
        self._total = np.zeros((groups, columns))
        self._block = block_positions(groups, columns)
        self._buffer: Array | None = None
        self._waiting = 0
        self._shared: GramSum | None = None

    @staticmethod
    def nbytes(groups: int, columns: int) -> int:
        """Returns the bytes that a sum of this size holds while it is being made."""
        return groups * columns * (8 * columns + 4 * buffer_positions(groups, columns))

    @property
    def positions_per_column(self) -> float:
        """How many positions there are so far for each column."""
        shared = self._shared.count if self._shared is not None else 0
        return (self.count + shared) / max(self.columns, 1)

    def add(self, chunk: Array) -> None:
        """Adds positions.

        Args:
            chunk: [groups, positions, columns] of any layout, float16, bfloat16, float32 or float64 (multiplied in
                float64). Only read. Groups that are one and the same, broadcast, are multiplied once.

        Raises:
            ValueError: another shape, or a value that is not finite.
        """
        if chunk.ndim != 3 or chunk.shape[::2] != (self.groups, self.columns):
            raise ValueError(must(self.name, "chunk", f"[{self.groups}, positions, {self.columns}]", list(chunk.shape)))
        if self.groups > 1 and chunk.strides[0] == 0:
            self._shared = self._shared or GramSum(self.name, 1, self.columns)
            self._shared.add(chunk[:1])
            return
        self.count += chunk.shape[1]
        if chunk.dtype != np.float64 and chunk.shape[1] * 2 <= buffer_positions(self.groups, self.columns):
            self._keep(chunk)
            return
        for start in range(0, chunk.shape[1], self._block):
            block = chunk[:, start : start + self._block]
            self._multiply(block if block.dtype == np.float64 else block.astype(np.float32, copy=False))

    def result(self) -> Gram:
        """Returns the sum of everything added; nothing can be added after."""
        self._flush()
        self._buffer = None
        if self._shared is not None:
            shared, self._shared = self._shared.result(), None
            self._matrix += shared.matrix
            self._total += shared.total
            self.count += shared.count
        for matrix in self._matrix:
            _mirror(matrix)
        return Gram(frozen(self._matrix), frozen(self._total), self.count)

    def _keep(self, chunk: Array) -> None:
        if self._buffer is None:
            self._buffer = self._new_buffer(rows_first=chunk.strides[2] <= chunk.strides[1])
        if self._waiting + chunk.shape[1] > self._buffer.shape[1]:
            self._flush()
        self._buffer[:, self._waiting : self._waiting + chunk.shape[1]] = chunk
        self._waiting += chunk.shape[1]

    def _new_buffer(self, rows_first: bool) -> Array:
        capacity = buffer_positions(self.groups, self.columns)
        if rows_first:
            return np.empty((self.groups, capacity, self.columns), np.float32)
        return np.empty((self.groups, self.columns, capacity), np.float32).swapaxes(1, 2)

    def _flush(self) -> None:
        if self._buffer is not None and self._waiting:
            self._multiply(self._buffer[:, : self._waiting])
            self._waiting = 0

    def _multiply(self, block: Array) -> None:
        """Adds a block of float32 or float64."""
        with np.errstate(over="ignore", invalid="ignore"):
            total = np.matmul(np.ones(block.shape[1], block.dtype), block)
            if not (_add_squares(self._matrix, block) and np.isfinite(total).all()):
                self._recover(block)
                return
        self._total += total

    def _recover(self, block: Array) -> None:
        """Adds a block whose sums are not finite in its own precision, or says that its values are not."""
        if block.dtype == np.float64 or not np.isfinite(block).all():
            raise ValueError(must(self.name, "values", "finite", "a NaN, an infinity or squares beyond float64"))
        self._multiply(block.astype(np.float64))


def _add_squares(matrix: Array, block: Array) -> bool:
    """Adds to the lower triangles; returns False, adding nothing, where a product is not finite."""
    if block.shape[2] <= _SMALL_COLUMNS and len(block) > 1:
        products = np.matmul(block.swapaxes(1, 2), block)
        if not np.isfinite(np.diagonal(products, axis1=1, axis2=2)).all():  # the diagonal bounds the rest
            return False
        matrix += products
        return True
    squares = [_lower_square(positions) for positions in block]
    if not all(np.isfinite(np.diagonal(square)).all() for square in squares):
        return False
    for target, square in zip(matrix, squares, strict=True):
        target += square
    return True


def _lower_square(positions: Array) -> Array:
    """Returns the lower triangle of x^T x [columns, columns] of x [positions, columns]; above it are zeros."""
    multiply: Any = blas.ssyrk if positions.dtype == np.float32 else blas.dsyrk
    if positions.strides[0] > positions.strides[1]:  # BLAS thinks in columns: whichever factor needs no copy
        upper = multiply(1.0, positions.T)
    else:
        upper = multiply(1.0, positions, trans=1)
    lower: Array = upper.T
    return lower


def _mirror(matrix: Array) -> None:
    """Copies the lower triangle onto the upper one, in tiles that stay in the cache."""
    tile = 128
    for start in range(0, len(matrix), tile):
        diagonal = matrix[start : start + tile, start : start + tile]
        diagonal[...] = np.tril(diagonal) + np.tril(diagonal, -1).T
        for below in range(start + tile, len(matrix), tile):
            matrix[start : start + tile, below : below + tile] = matrix[below : below + tile, start : start + tile].T


def block_positions(groups: int, columns: int) -> int:
    """Returns how many positions are multiplied at a time."""
    return min(max(_BLOCK_ELEMENTS // max(groups * columns, 1), 1), MAX_POSITIONS)


def buffer_positions(groups: int, columns: int) -> int:
    """Returns how many positions the buffer holds: about as many as columns, when adding up costs little."""
    return min(max(columns, 256), block_positions(groups, columns))


def frozen(array: Array) -> Array:
    """Returns the array itself, read-only from now on."""
    array.flags.writeable = False
    return array
