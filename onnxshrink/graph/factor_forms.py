"""In which thin pieces a layer can be cut, what they cost, and what they are made of.

The weight of a layer is a matrix W [groups * outputs, inputs * kernel] in its layout, one W_g for every group of rows. A form says which
smaller arrays stand in its place, in the order in which they run:

    form              pieces                                                              W_g =
    two-matmuls       [g, r, inputs]  [g, outputs, r]                                     second @ first
    gemm              the same
    recurrent-input   [1, r, inputs]  [1, directions * gates, r]                          second @ first, one first for all directions
    channel           [g, r, inputs * kernel]  [g, outputs, r]                            second @ first: k x k, then 1 x 1
    input             [g, r, inputs]  [g, outputs, r, kernel]                             1 x 1, then k x k
    spatial           [g, r, inputs, height]  [g, outputs, r, width]                      k x 1, then 1 x k
    tucker2           [g, r, inputs]  [g, s, r, kernel]  [g, outputs, s]                  1 x 1, k x k, 1 x 1
    interpolative     [g, r, inputs * kernel]  [g, s, r]  [g, outputs - r - s, r]         outputs: second @ first, first, third @ first

`onnxshrink.graph.factoring` finds the forms of a weight and puts pieces in its place.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from onnxshrink.errors import must
from onnxshrink.graph.factor_sites import Geometry, Kind
from onnxshrink.graph.storage import raw_nbytes
from onnxshrink.graph.weight_values import computed_matrix
from onnxshrink.graph.weights import Weight
from onnxshrink.numerics.floatbits import rounded_to, unit_roundoff
from onnxshrink.numerics.interpolative import interpolative_extra, interpolative_factor
from onnxshrink.numerics.kernel_factors import input_factor, spatial_factor, tucker2_factor
from onnxshrink.numerics.low_rank import factor

__all__ = ["Form", "Pieces", "Ranks"]

_NODE_BYTES, _KERNEL_NODE_BYTES = 60, 160  # of a node and its constant beside names: op, attributes, field headers (protobuf encoding)

Array = np.ndarray[Any, np.dtype[Any]]
Pieces = tuple[Array, ...]
Ranks = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Form:
    """One way to cut a weight.

    Attributes:
        kind: see the module; ``name`` tells Gemm from MatMul.
        weight: it, of the main graph.
        geometry: of its matrix.
        dtype: that its nodes compute in, and that the pieces are stored in.
        runs: at how many positions each piece runs, as `Site.runs` says; the mean over nodes that share the weight.
    """

    kind: Kind
    weight: Weight
    geometry: Geometry
    dtype: np.dtype[Any]
    runs: tuple[float, ...]

    @property
    def name(self) -> str:
        """The name people know it by."""
        if self.kind == "two-products":
            return "gemm" if all(use.op == "Gemm" for use in self.weight.uses) else "two-matmuls"
        return self.kind

    @property
    def matrix(self) -> Array:
        """What the nodes multiply with now: float64 [rows, columns], of the weight's layout, through Cast and DequantizeLinear."""
        return computed_matrix(self.weight, self.weight.uses[0])

    @property
    def full(self) -> Ranks:
        """The ranks at which nothing is lost: one, or two for tucker2."""
        found = self.geometry
        if self.kind == "tucker2":
            return min(found.inputs, found.outputs * found.positions), min(found.outputs, found.inputs * found.positions)
        if self.kind == "spatial":
            height, width = found.sides
            return (min(found.outputs * width, found.inputs * height),)
        if self.kind == "input":
            return (min(found.inputs, found.outputs * found.positions),)
        return (min(found.outputs, found.inputs * found.positions),)

    def at(self, share: float) -> Ranks:
        """Returns a share of the full ranks, rounded, at least 1 each; of tucker2's neither exceeds what the other can tell apart."""
        ranks = tuple(min(max(round(share * full), 1), full) for full in self.full)
        if self.kind != "tucker2":
            return ranks
        before, after = ranks
        before = min(before, after * self.geometry.positions)
        return before, min(after, before * self.geometry.positions)

    def shapes(self, ranks: Ranks) -> tuple[tuple[int, ...], ...]:
        """Returns the shapes of the pieces, in the order in which they run; as if the first outputs were those that are kept."""
        found = self.geometry
        groups, outputs, inputs, positions = found.groups, found.outputs, found.inputs, found.positions
        if self.kind == "tucker2":
            before, after = ranks
            return (groups, before, inputs), (groups, after, before, positions), (groups, outputs, after)
        (rank,) = ranks
        if self.kind == "interpolative":
            return (groups, rank, inputs * positions), (groups, 0, rank), (groups, outputs - rank, rank)
        if self.kind == "spatial":
            height, width = found.sides
            return (groups, rank, inputs, height), (groups, outputs, rank, width)
        if self.kind == "input":
            return (groups, rank, inputs), (groups, outputs, rank, positions)
        return (groups, rank, inputs * positions), (groups, outputs, rank)

    def fits(self, pieces: Pieces) -> bool:
        """Whether pieces have the shapes of the form at some ranks."""
        shapes = tuple(piece.shape for piece in pieces)
        ranks = tuple(shape[1] for shape in shapes[: len(self.full)] if len(shape) > 1)
        if len(ranks) != len(self.full) or min(ranks) < 1 or len(shapes) != len(self.shapes(ranks)):
            return False
        if self.kind == "interpolative" and all(len(shape) == 3 for shape in shapes):  # whichever outputs are kept
            kept, before, after = shapes
            shapes = kept, (before[0], 0, before[2]), (after[0], before[1] + after[1], after[2])
        return shapes == self.shapes(ranks)

    @property
    def whole(self) -> int:
        """The elements of the weight: its multiply-accumulates at one position as well, of all groups."""
        found = self.geometry
        return found.groups * found.outputs * found.inputs * found.positions

    def parameters(self, ranks: Ranks) -> int:
        """Returns the elements of all pieces."""
        return sum(map(math.prod, self.shapes(ranks)))

    def nbytes(self, ranks: Ranks) -> int:
        """Returns the bytes of all pieces as they are stored."""
        return sum(raw_nbytes(math.prod(shape), self.dtype) for shape in self.shapes(ranks))

    @property
    def node_bytes(self) -> int:
        """About what the nodes that a form adds take in a file, with names."""
        sites, name = [len(use.node.site) for use in self.weight.uses if use.node is not None], len(self.weight.constant.name)
        fixed = _KERNEL_NODE_BYTES if self.geometry.is_kernel else _NODE_BYTES
        return (len(self.runs) - 1) * sum(fixed + 3 * site + 2 * name for site in sites)

    def macs(self, ranks: Ranks) -> float:
        """Returns the multiply-accumulates of all pieces where the layer as it is has ``whole``."""
        return sum(run * math.prod(shape) for run, shape in zip(self.runs, self.shapes(ranks), strict=True))

    def break_even(self, cost: Literal["parameters", "macs"] = "parameters", price: float = 1.0) -> Ranks:
        """Returns the largest of the ranks `at` gives that cost less than the weight as it is; zeros if none do.

        Args:
            cost: of what.
            price: of one of the pieces, that of one of the weight being 1.
        """
        measure: Callable[[Ranks], float] = self.parameters if cost == "parameters" else self.macs
        steps = max(self.full)
        below = bisect_left(range(1, steps + 1), True, key=lambda step: price * measure(self.at(step / steps)) >= self.whole)
        return self.at(below / steps) if below else (0,) * len(self.full)

    def factor(self, matrix: Array, ranks: Ranks, grams: Array | None = None) -> Pieces:
        """Returns the pieces that come nearest to a matrix, in the form's dtype.

        Args:
            matrix: of the weight's layout, [rows, columns], finite.
            ranks: as `full` has them, none larger.
            grams: float64 [groups, columns, columns] of what the layer meets, or None.

        Raises:
            ValueError: shapes that do not fit, or ranks out of range.
        """
        found = self.geometry
        rows = found.groups * found.outputs
        columns = found.inputs * found.positions
        if matrix.shape != (rows, columns):
            raise ValueError(must("factor", "matrix", f"of shape {(rows, columns)}", f"shape {matrix.shape}"))
        if len(ranks) != len(self.full):
            raise ValueError(must("factor", "ranks", f"{len(self.full)} of them", ranks))
        if self.kind == "recurrent-input" and grams is not None:  # directions meet the same inputs
            grams = grams.mean(axis=0, keepdims=True)
        kernels = matrix.reshape(found.groups, found.outputs, found.inputs, found.positions)
        return tuple(rounded_to(piece, self.dtype) for piece in self._factor(kernels, ranks, grams))

    def _factor(self, kernels: Array, ranks: Ranks, grams: Array | None) -> Pieces:
        if self.kind == "tucker2":
            return tucker2_factor(kernels, (ranks[0], ranks[1]), grams)
        if self.kind == "spatial":
            return spatial_factor(kernels.reshape(*kernels.shape[:3], *self.geometry.sides), ranks[0], grams)
        if self.kind == "input":
            return input_factor(kernels, ranks[0], grams)
        if self.kind == "interpolative":
            return interpolative_factor(kernels.reshape(*kernels.shape[:2], -1), ranks[0], grams, unit_roundoff(self.dtype))
        left, right = factor(kernels.reshape(*kernels.shape[:2], -1), ranks[0], grams)
        return right, left

    def extra_losses(self, every: Sequence[Ranks], grams: Array | None = None) -> list[float]:
        """Returns the squared errors of the layer's outputs at several ranks, beyond those of the best matrix of these ranks.

        Of the forms that can be any matrix of a rank only the interpolative one has some, from outputs at both ends that do not tell
        the others, and from rounding.

        Args:
            every: ranks, as `full` has them.
            grams: as `factor` takes them.
        """
        if self.kind != "interpolative":
            return [0.0] * len(every)
        kernels = self.matrix.reshape(self.geometry.groups, self.geometry.outputs, -1)
        return interpolative_extra(kernels, [ranks[0] for ranks in every], grams, unit_roundoff(self.dtype))

    def product(self, pieces: Pieces) -> Array:
        """Returns what the pieces stand for: the matrix in the weight's layout, float64 [rows, columns]."""
        first, *rest = (piece.astype(np.float64) for piece in pieces)
        if self.kind == "tucker2":
            found = np.einsum("gri,gsrk,gos->goik", first, *rest, optimize=True)
        elif self.kind == "spatial":
            found = np.einsum("grih,gorw->goihw", first, *rest, optimize=True)
        elif self.kind == "input":
            found = np.einsum("gri,gork->goik", first, *rest, optimize=True)
        elif self.kind == "interpolative":
            found = np.concatenate([rest[0] @ first, first, rest[1] @ first], axis=1)
        else:
            found = rest[0] @ first
        matrix: Array = found.reshape(self.geometry.groups * self.geometry.outputs, -1)
        return matrix
