"""Sets the least important weights to zero by magnitude.

With W seen as a matrix [rows = output channels, columns = what is summed over] and a mask M of the same shape,

    W' = M ∘ W,    ‖W - W'‖² = sum of the squares that were removed

which magnitude masks minimise for their pattern (Han et al., arXiv 1506.02626):

    unstructured    the smallest |w| of the layer, or of all layers together (scope=global)
    N:M             N non-zeros in each M consecutive weights of the reduction axis (2:4 is what NVIDIA's sparse tensor cores take)
    RxC             blocks of R rows and C columns, by root mean square

Zeros do not make the file smaller by themselves: the bytes stay as they are until the weights are coded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np

from onnxshrink.contract import Change, Context, Pass, Report, Skip
from onnxshrink.errors import OptionError, must
from onnxshrink.graph.coded import coded_weights
from onnxshrink.graph.edit import constant_bytes, set_values
from onnxshrink.graph.ir import Graph
from onnxshrink.graph.weights import Weight, weights
from onnxshrink.numerics.masks import Pattern, expand_units, keep_largest, n_m_mask, scores, split_global
from onnxshrink.options import option

__all__ = ["Sparsify"]

Array = np.ndarray[Any, np.dtype[Any]]
_DEFAULT_SPARSITY = 0.5
_LEAST_SPARSITY = 0.05  # below it, a weaker retry saves nothing worth having


@dataclass(frozen=True, kw_only=True)
class Sparsify(Pass):
    """Zeroes the smallest weights: unstructured, N:M along the reduction axis, or in blocks."""

    name: ClassVar[str] = "sparsify"
    sparsity: float | None = option(None, "share of weights set to zero; N:M patterns imply it, others use 0.5", low=0.0, high=1.0)
    pattern: str = option("unstructured", "unstructured, N:M (N kept of M) or ROWSxCOLUMNS blocks, e.g. 2:4, 1x4")
    scope: str = option("layer", "compare magnitudes within a layer or over all", choices=("layer", "global"), per_site=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        pattern = Pattern.parse(self.pattern)
        if pattern.kind == "n:m" and self.sparsity not in (None, self.share):
            raise OptionError(must(self.name, "sparsity", f"{self.share:g} or left out for {pattern}", self.sparsity))
        if pattern.kind == "n:m" and self.scope == "global":
            raise OptionError(must(self.name, "scope", f"layer for {pattern}, which fixes every group", "'global'"))

    @property
    def share(self) -> float:
        """The share of weights that becomes zero."""
        pattern = Pattern.parse(self.pattern)
        if pattern.kind == "n:m":
            return 1 - pattern.n / pattern.m
        return _DEFAULT_SPARSITY if self.sparsity is None else self.sparsity

    @property
    def sites_are_independent(self) -> bool:
        """Whether layers do not compete with each other."""
        return self.scope == "layer"

    def with_options(self, options: Mapping[str, Any]) -> Self:
        """Returns the pass with some options changed; an N:M pattern has its own sparsity, not the one it replaces."""
        pattern = Pattern.parse(options.get("pattern", "unstructured"))
        own: dict[str, Any] = {"sparsity": None} if pattern.kind == "n:m" else {}
        return replace(self, **{**own, **options})

    def weaker(self) -> Self | None:
        """Returns the pass with 3/4 of the sparsity; N:M patterns have no gentler form."""
        share = self.share * 0.75
        fixed = Pattern.parse(self.pattern).kind == "n:m"
        return None if fixed or share < _LEAST_SPARSITY else replace(self, sparsity=share)

    def apply(self, graph: Graph, context: Context) -> Report:
        """Edits the graph in place."""
        skips = [Skip(coded.site, "is stored as codes; sparsify before sharing") for coded in coded_weights(graph)]
        sites: list[tuple[Weight, Sparsify]] = []
        for weight in weights(graph):
            chosen = context.options(self, weight.names)
            reason = "left alone by a rule" if chosen is None else _obstacle(weight, Pattern.parse(chosen.pattern))
            if chosen is None or reason is not None:
                skips.append(Skip(weight.site, reason or ""))
            else:
                sites.append((weight, chosen))
        together = [weight for weight, chosen in sites if self.scope == "global" and chosen == self]
        masks = dict(zip(map(id, together), self._global_masks(together), strict=True))
        answers = context.map(lambda site: _sparsify(*site, masks.get(id(site[0]))), sites)
        return Report(
            changes=[answer for answer in answers if isinstance(answer, Change)],
            skips=[*skips, *(answer for answer in answers if isinstance(answer, Skip))],
        )

    def _global_masks(self, together: Sequence[Weight]) -> list[Array]:
        """Returns the masks of layers whose units compete with each other."""
        pattern = Pattern.parse(self.pattern)
        matrices = [_matrix(weight, pattern) for weight in together]
        kept = split_global([scores(matrix, pattern) for matrix in matrices], self.share)
        return [expand_units(keep, pattern, matrix.shape) for keep, matrix in zip(kept, matrices, strict=True)]


def _obstacle(weight: Weight, pattern: Pattern) -> str | None:
    if weight.obstacle is not None:
        return weight.obstacle
    if not weight.computes:
        return "is only looked up, so zeros save no arithmetic"
    if not np.isfinite(weight.constant.values).all():
        return "holds NaN or infinity"
    if weight.view is None and pattern.kind != "unstructured":
        return f"its uses disagree on what the reduction axis is, so {pattern} has no meaning"
    return None


def _matrix(weight: Weight, pattern: Pattern) -> Array:
    values = weight.constant.values
    return values.reshape(1, -1) if weight.view is None or pattern.kind == "unstructured" else weight.view.forward(values)


def _sparsify(weight: Weight, chosen: Sparsify, mask: Array | None) -> Change | Skip:
    pattern = Pattern.parse(chosen.pattern)
    matrix = _matrix(weight, pattern)
    if mask is None:
        mask = (
            n_m_mask(matrix, pattern.n, pattern.m)
            if pattern.kind == "n:m"
            else expand_units(keep_largest(scores(matrix, pattern), chosen.share), pattern, matrix.shape)
        )
    zeros_before = 1 - np.count_nonzero(matrix) / matrix.size
    sparse = np.where(mask, matrix, matrix.dtype.type(0))
    zeros = 1 - np.count_nonzero(sparse) / sparse.size
    if zeros == zeros_before:
        return Skip(weight.site, f"{zeros:.1%} zeros already, in this pattern")
    nbytes = constant_bytes(weight.constant, weight.scope.graph)
    view = None if pattern.kind == "unstructured" else weight.view
    set_values(weight.constant, sparse.reshape(weight.constant.shape) if view is None else view.inverse(sparse))
    after = constant_bytes(weight.constant, weight.scope.graph)
    return Change(weight.site, nbytes, after, f"{zeros:.1%} zeros (was {zeros_before:.1%}), {pattern}")
