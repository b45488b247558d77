"""What one weight is to become when it is pruned, and how: its pattern, criterion and bounds, applied to its matrix."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from onnxshrink.contract import Context
from onnxshrink.graph.weights import Weight
from onnxshrink.numerics.masks import choose
from onnxshrink.numerics.patterns import Mask, Norm, Pattern
from onnxshrink.numerics.pruning import prune
from onnxshrink.numerics.saliency import Criterion, additive, saliency

__all__ = ["Target"]

Array = np.ndarray[Any, np.dtype[Any]]
_HARDWARE_GROUP = 4
_KERNEL = {"Conv": -2, "ConvTranspose": -4, "DeformConv": -2}  # which of a view's shapes is the operand's, [channels, channels, *kernel]


@dataclass(frozen=True, eq=False)
class Target:
    """What one weight is to become.

    Attributes:
        weight: finite; of the main graph or of a scope below it.
        pattern: of the zeros.
        criterion: by which weights go; None searches for those whose loss the others make up for best.
        threshold: of |w|, at and below which weights go, instead of a share; or None.
        least: share of zeros that it gets at least where layers compete.
        most: share of zeros that it gets at most.
        norm: that puts the scores of a block, row or column together; None for the one that fits the criterion.
    """

    weight: Weight
    pattern: Pattern
    criterion: Criterion | None = None
    threshold: float | None = None
    least: float = 0.0
    most: float = 1.0
    norm: Norm | None = None

    @property
    def asks_for_inputs(self) -> bool:
        """Whether its criterion goes by the inputs of the layer."""
        return self.threshold is None and self.criterion in ("wanda", "obs")

    @property
    def kernel(self) -> tuple[int, ...]:
        """The sides of the kernel, if it is one of a convolution, else nothing."""
        found = [use for use in self.weight.uses if use.view is not None and use.op in _KERNEL]
        return found[0].view.shapes[_KERNEL[found[0].op]][2:] if self.weight.view and found and found[0].view else ()

    @property
    def inputs(self) -> int:
        """How many input channels a row of the layout meets."""
        return self.weight.layout.shape[1] // max(int(np.prod(self.kernel)), 1)

    @property
    def sides(self) -> tuple[int, ...]:
        """(out, in, kernel sides...)."""
        return (self.weight.layout.shape[0], max(self.inputs, 1), *self.kernel)

    @cached_property
    def columns(self) -> Array:
        """The order in which a group of an N:M pattern takes columns: intp [columns].

        Along the input channels, for every position of a kernel by itself: what TensorRT and cuSPARSELt take (TensorRT documentation,
        Structured Sparsity: of weights [K, C, R, S] each four along C, for every k, r and s).
        """
        columns = np.arange(self.weight.layout.shape[1])
        return columns.reshape(self.inputs, -1).T.reshape(-1) if self.pattern.kind == "n:m" and columns.size else columns

    @property
    def fits_hardware(self) -> bool:
        """Whether every group of four lies within the input channels: 2:4 runs faster where their number is a multiple of four."""
        return str(self.pattern) == "2:4" and self.weight.view is not None and self.inputs % _HARDWARE_GROUP == 0

    def pruned(
        self, wanted: Array, grams: Array | None, share: float, zeros: Mask, context: Context, effort: float = 1.0
    ) -> Array:
        """Returns a matrix with zeros, the rest made up for where Gram matrices are given: float64 [rows, columns].

        Args:
            wanted: float64 [rows, columns], in the weight's layout.
            grams: float64 [groups, columns, columns], or None.
            share: of zeros; N:M and thresholds have their own.
            zeros: bool [rows, columns], that stay and count.
            context: for randomness.
            effort: times the usual one of the search for zeros.
        """
        order = self.columns
        moments = grams[:, order[:, None], order] if grams is not None else None
        if self.criterion is None and self.threshold is None:
            removed = None if self.pattern.kind == "n:m" else share
            found = prune(wanted[:, order], moments, self.pattern, removed, frozen=zeros[:, order], effort=effort)
        else:
            kept = self.kept(wanted, grams, share, zeros, context)[:, order]
            found = prune(wanted[:, order], moments, self.pattern, mask=kept)
        return found[:, np.argsort(order)]

    def zeroed(self, matrix: Array, grams: Array | None, share: float, context: Context) -> Array:
        """Returns the weight's own matrix [rows, columns] with zeros and nothing made up for; in its dtype."""
        kept = self.kept(matrix, grams, share, matrix == 0, context)
        return np.where(kept, matrix, matrix.dtype.type(0))

    def kept(self, matrix: Array, grams: Array | None, share: float, zeros: Mask, context: Context) -> Mask:
        """Returns which weights the criterion keeps, bool [rows, columns]; without one, or without inputs it asks for, the largest."""
        if self.threshold is not None:
            original = self.weight.layout.forward(self.weight.constant.values)
            with np.errstate(over="ignore"):  # beyond the range of float16 everything goes
                return (np.abs(original) > np.asarray(self.threshold).astype(original.dtype)) & ~zeros
        order, criterion = self.columns, self._criterion(grams)
        scores = saliency(matrix, criterion, grams, seed=self._seed(context))[:, order]
        removed = None if self.pattern.kind == "n:m" else share
        kept = choose(scores, self.pattern, removed, norm=self.norm or additive(criterion), frozen=zeros[:, order])
        return kept[:, np.argsort(order)]

    def comparable(self, grams: Array | None, context: Context) -> Array:
        """Returns saliencies [rows, columns] that compare with those of other weights: LAMP scores unless there is another criterion."""
        criterion = "lamp" if self.criterion is None or (grams is None and self.asks_for_inputs) else self.criterion
        matrix = self.weight.layout.forward(self.weight.constant.values)
        return saliency(matrix, criterion, grams, seed=self._seed(context))

    def _criterion(self, grams: Array | None) -> Criterion:
        return "magnitude" if self.criterion is None or (grams is None and self.asks_for_inputs) else self.criterion

    def _seed(self, context: Context) -> int:
        return int(context.rng(self.weight.site).integers(2**31))
