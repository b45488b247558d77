"""Sums of e x^T over positions, e and x belonging together, as `onnxshrink.numerics.gram` makes those of x x^T."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxshrink.errors import must
from onnxshrink.numerics.chunks import Array
from onnxshrink.numerics.gram import block_positions, buffer_positions, frozen

__all__ = ["ProductSum", "Products"]


@dataclass(frozen=True, eq=False)
class Products:
    """What a `ProductSum` comes to.

    Attributes:
        matrix: float64 [groups, rows, columns], read-only: sum of e x^T.
        mean: float64 [groups, rows], read-only: the mean e; zero when there were no positions.
    """

    matrix: Array
    mean: Array


class ProductSum:
    """Sums `Products` over chunks; few positions wait in copies until BLAS is worth calling."""

    def __init__(self, name: str, groups: int, rows: int, columns: int) -> None:
        """An empty sum.

        Args:
            name: what is summed, for errors.
            groups: each with a matrix of its own.
            rows: of every matrix: how many numbers e has.
            columns: of every matrix: how many numbers x has.
        """
        self.name = name
        self._count = 0
        self._matrix = np.zeros((groups, rows, columns))
        self._total = np.zeros((groups, rows))
        self._waiting: list[tuple[Array, Array]] = []
        self._held = 0
        self._block = block_positions(groups, max(rows, columns))
        self._capacity = buffer_positions(groups, max(rows, columns))
        self._shared: ProductSum | None = None

    @staticmethod
    def nbytes(groups: int, rows: int, columns: int) -> int:
        """Returns the bytes that a sum of this size holds while it is being made."""
        waiting = 4 * (rows + columns) * buffer_positions(groups, max(rows, columns))
        return groups * (8 * rows * columns + waiting)

    def add(self, left: Array, right: Array) -> None:
        """Adds positions.

        Args:
            left: e [groups, positions, rows] of any layout, float16, bfloat16, float32 or float64 (multiplied in float64). Only read.
            right: x [groups, positions, columns], likewise. Where on both sides groups are one and the same, broadcast, they
                are multiplied once.

        Raises:
            ValueError: a wrong shape, another number of positions, or a value that is not finite.
        """
        groups, rows, columns = self._matrix.shape
        for chunk, size in ((left, rows), (right, columns)):
            if chunk.ndim != 3 or chunk.shape[::2] != (groups, size):
                raise ValueError(must(self.name, "chunk", f"[{groups}, positions, {size}]", list(chunk.shape)))
        if left.shape[1] != right.shape[1]:
            raise ValueError(must(self.name, "chunk", f"of {left.shape[1]} positions, as the other one", right.shape[1]))
        if groups > 1 and left.strides[0] == 0 == right.strides[0]:
            self._shared = self._shared or ProductSum(self.name, 1, rows, columns)
            self._shared.add(left[:1], right[:1])
            return
        count = left.shape[1]
        self._count += count
        if np.float64 not in (left.dtype, right.dtype) and count * 2 <= self._capacity:
            if self._held + count > self._capacity:
                self._flush()
            self._waiting.append((left.astype(np.float32), right.astype(np.float32)))
            self._held += count
            return
        for start in range(0, count, self._block):
            block = slice(start, start + self._block)
            self._multiply(left[:, block], right[:, block])

    def result(self) -> Products:
        """Returns the sum of everything added; nothing can be added after."""
        self._flush()
        if self._shared is not None:
            shared, self._shared = self._shared, None
            shared._flush()
            self._matrix += shared._matrix
            self._total += shared._total
            self._count += shared._count
        return Products(frozen(self._matrix), frozen(self._total / max(self._count, 1)))

    def _flush(self) -> None:
        if self._waiting:
            left, right = (np.concatenate(parts, axis=1) for parts in zip(*self._waiting, strict=True))
            self._waiting, self._held = [], 0
            self._multiply(left, right)

    def _multiply(self, left: Array, right: Array) -> None:
        """Adds the products of a block, in float64 where either is float64 or float32 does not hold them."""
        exact = np.float64 in (left.dtype, right.dtype)
        dtype = np.float64 if exact else np.float32
        left, right = left.astype(dtype, copy=False), right.astype(dtype, copy=False)
        with np.errstate(over="ignore", invalid="ignore"):
            products = np.matmul(left.swapaxes(1, 2), right)
            total = np.matmul(np.ones(left.shape[1], dtype), left)
        if np.isfinite(products).all() and np.isfinite(total).all():
            self._matrix += products
            self._total += total
        elif exact or not (np.isfinite(left).all() and np.isfinite(right).all()):
            raise ValueError(must(self.name, "values", "finite", "a NaN, an infinity or squares beyond float64"))
        else:
            self._multiply(left.astype(np.float64), right.astype(np.float64))
