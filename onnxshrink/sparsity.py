"""Zeros for many weights at once: how many each layer gets, and layers pruned in turn, each made up for.

    shares = removed_shares(graph, targets, "sensitivity", 0.5, context)
    sparse, repaired = sparsify_in_turn(graph, targets, shares, context)

Where calibration data is given, layers are pruned in the order in which the model runs (`onnxshrink.repair`): every one is solved again
against what the ORIGINAL computes, with the inputs that the layers before it, sparse already, give it. `onnxshrink.numerics.pruning`
says how zeros are chosen and what is left is solved for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np

from onnxshrink.contract import Context
from onnxshrink.graph.ir import Graph
from onnxshrink.graph.weights import Weight
from onnxshrink.numerics.densities import (
    Bounds,
    Curve,
    by_global_threshold,
    by_sensitivity,
    erdos_renyi_kernel,
    uniform,
)
from onnxshrink.numerics.masks import choose
from onnxshrink.numerics.patterns import Mask, Pattern
from onnxshrink.numerics.pruning import prune
from onnxshrink.numerics.saliency import Criterion, additive, saliency
from onnxshrink.repair import Repaired, rewrite_in_turn, with_grams
from onnxshrink.sensitivity import OutputProbe, folds

__all__ = ["Scope", "Target", "curves", "removed_shares", "sparsify_alone", "sparsify_in_turn"]

Array = np.ndarray[Any, np.dtype[Any]]
Scope = Literal["layer", "global", "erk", "sensitivity"]
_LITTLE_EFFORT = 0.25  # of choosing zeros, while layers are compared: a few tenths of a decibel worse, for all alike


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
    """

    weight: Weight
    pattern: Pattern
    criterion: Criterion | None = None
    threshold: float | None = None
    least: float = 0.0
    most: float = 1.0

    @cached_property
    def columns(self) -> Array:
        """The order in which a group of an N:M pattern takes columns: intp [columns].

        Along the input channels, for every position of a kernel by itself: what TensorRT and cuSPARSELt take (TensorRT documentation,
        Structured Sparsity: of weights [K, C, R, S] each four along C, for every k, r and s).
        """
        weight = self.weight
        columns = weight.layout.shape[1]
        places = int(np.prod(weight.constant.shape[2:])) if _is_kernel(weight) else 1
        if self.pattern.kind != "n:m" or places == 1 or columns % places:
            return np.arange(columns)
        return np.arange(columns).reshape(-1, places).T.reshape(-1)

    @property
    def fits_hardware(self) -> bool:
        """Whether every group of four lies within the input channels: 2:4 runs faster where their number is a multiple of four."""
        weight = self.weight
        inputs = weight.constant.shape[1] if _is_kernel(weight) else weight.layout.shape[1]
        return str(self.pattern) == "2:4" and weight.view is not None and inputs % 4 == 0


def removed_shares(
    graph: Graph, targets: Sequence[Target], scope: Scope, share: float, context: Context
) -> list[float]:
    """Returns the share of zeros for each target, so that all together have ``share``.

    Args:
        graph: the main graph; not changed.
        targets: of it.
        scope: ``layer`` gives all the same; ``global`` lines all weights up by a saliency that layers share (LAMP unless the targets
            have another criterion); ``erk`` goes by shapes; ``sensitivity`` by what zeros in each layer do to the model's outputs.
        share: of the weights of all targets, from 0 to 1.
        context: for activations.

    Raises:
        ValueError: the bounds of the targets do not allow that share.
    """
    if not targets:
        return []
    sizes = [target.weight.constant.size for target in targets]
    bounds = Bounds.of(len(targets), [1 - target.most for target in targets], [1 - target.least for target in targets])
    if scope == "global":
        kept = by_global_threshold(_comparable(graph, targets, context), share, bounds)
    elif scope == "erk":
        kept = erdos_renyi_kernel([_sides(target.weight) for target in targets], share, bounds)
    elif scope == "sensitivity":
        kept = by_sensitivity(sizes, curves(graph, targets, _points(share), context), share, bounds)
    else:
        kept = uniform(sizes, share, bounds)
    return [float(removed) for removed in 1 - kept]


def curves(graph: Graph, targets: Sequence[Target], sparsities: Sequence[float], context: Context) -> list[Curve]:
    """Returns what zeros in each weight alone, the rest of it made up for, do to the outputs on inputs that took no part in it.

    Args:
        graph: the main graph; not changed.
        targets: of it. Weights without calibration activations are pruned by magnitude.
        sparsities: ascending, above 0.
        context: for activations; without them, and where outputs tell nothing, the squares that go stand for the drift.
    """
    fitting, probe = folds(graph, context)[0]
    by_site = {target.weight.site: target for target in targets}
    found: dict[str, Curve] = {}
    for weight, grams in with_grams(graph, [target.weight for target in targets], fitting):
        target = by_site[weight.site]
        found[weight.site] = Curve(np.asarray(sparsities), np.asarray(_drifts(target, grams, sparsities, probe, context)))
        context.progress(len(found), len(targets))
    return [found[target.weight.site] for target in targets]


def sparsify_in_turn(
    graph: Graph, targets: Sequence[Target], schedule: Sequence[Sequence[float]], context: Context
) -> tuple[dict[str, Array], Repaired]:
    """Returns the new values of each weight by site, what is left made up for, and what was done beside.

    Args:
        graph: the main graph; not changed.
        targets: of it.
        schedule: shares of zeros for the targets, one list for each step. Every step starts from the original's weights with the zeros
            of the step before, and with activations measured anew.
        context: with activations where weights are to be made up for.

    Raises:
        ValidationError: the model does not run on the calibration inputs, or an activation is not finite.
    """
    by_site = {target.weight.site: target for target in targets}
    before: dict[str, Array] = {}
    repaired = Repaired()
    for shares in schedule:
        share_of = {target.weight.site: share for target, share in zip(targets, shares, strict=True)}
        values: dict[str, Array] = {}
        rewrite = partial(_rewrite, by_site, share_of, before, values, context)
        repaired = rewrite_in_turn(graph, [target.weight for target in targets], rewrite, context)
        before = values
    return before, repaired


def sparsify_alone(
    graph: Graph, targets: Sequence[Target], shares: Sequence[float], context: Context
) -> dict[str, Array]:
    """Returns the new values of each weight by site, with nothing made up for.

    Args:
        graph: the main graph; not changed.
        targets: of it.
        shares: of zeros for each.
        context: with activations for criteria that go by the inputs of layers.
    """
    weights = [target.weight for target in targets]
    asks = any(target.criterion in ("wanda", "obs") for target in targets)
    plain = context if asks else replace(context, activations=None)
    by_site = {target.weight.site: (target, share) for target, share in zip(targets, shares, strict=True)}

    def zeros(found: tuple[Weight, Array | None]) -> tuple[str, Array]:
        weight, grams = found
        target, share = by_site[weight.site]
        matrix = weight.layout.forward(weight.constant.values)
        kept = _kept(target, matrix, grams, share, matrix == 0, context)
        return weight.site, weight.layout.inverse(np.where(kept, matrix, matrix.dtype.type(0)))

    return dict(context.map(zeros, list(with_grams(graph, weights, plain))))


def _rewrite(
    by_site: Mapping[str, Target],
    share_of: Mapping[str, float],
    before: Mapping[str, Array],
    values: dict[str, Array],
    context: Context,
    weight: Weight,
    wanted: Array,
    grams: Array | None,
) -> Array:
    """Prunes one weight in its turn and keeps its new values."""
    zeros = weight.layout.forward(before.get(weight.site, weight.constant.values)) == 0
    sparse = _pruned(by_site[weight.site], wanted, grams, share_of[weight.site], zeros, context)
    values[weight.site] = weight.layout.inverse(sparse).astype(weight.constant.dtype)
    return weight.layout.forward(values[weight.site]).astype(np.float64)


def _pruned(
    target: Target,
    wanted: Array,
    grams: Array | None,
    share: float,
    zeros: Mask,
    context: Context,
    effort: float = 1.0,
) -> Array:
    """Returns a matrix with zeros, the rest made up for where Gram matrices are given.

    Args:
        target: whose matrix it is.
        wanted: float64 [rows, columns], in the weight's layout.
        grams: float64 [groups, columns, columns], or None.
        share: of zeros; N:M has its own.
        zeros: bool [rows, columns], that stay and count.
        context: for randomness.
        effort: times the usual one of the search for zeros.
    """
    order = target.columns
    moments = grams[:, order[:, None], order] if grams is not None else None
    if target.criterion is None and target.threshold is None:
        removed = None if target.pattern.kind == "n:m" else share
        found = prune(wanted[:, order], moments, target.pattern, removed, frozen=zeros[:, order], effort=effort)
    else:
        kept = _kept(target, wanted, grams, share, zeros, context)[:, order]
        found = prune(wanted[:, order], moments, target.pattern, mask=kept)
    return found[:, np.argsort(order)]


def _kept(
    target: Target, matrix: Array, grams: Array | None, share: float, zeros: Mask, context: Context
) -> Mask:
    """Returns which weights a criterion keeps, bool [rows, columns]; magnitudes count where it needs inputs that are not known."""
    if target.threshold is not None:
        original = target.weight.layout.forward(target.weight.constant.values)
        return (np.abs(original) > target.threshold) & ~zeros
    criterion, order = target.criterion or "magnitude", target.columns
    if grams is None and criterion in ("wanda", "obs"):
        criterion = "magnitude"
    seed = int(context.rng(target.weight.site).integers(2**31))
    scores = saliency(matrix, criterion, grams, seed=seed)[:, order]
    removed = None if target.pattern.kind == "n:m" else share
    kept = choose(scores, target.pattern, removed, norm=additive(criterion), frozen=zeros[:, order])
    return kept[:, np.argsort(order)]


def _drifts(
    target: Target, grams: Array | None, sparsities: Sequence[float], probe: OutputProbe | None, context: Context
) -> list[float]:
    """Returns the squared drift at each sparsity."""
    weight = target.weight
    matrix = weight.layout.forward(weight.constant.values).astype(np.float64)
    drifts = []
    for sparsity in sparsities:
        sparse = _pruned(target, matrix, grams, sparsity, matrix == 0, context, _LITTLE_EFFORT)
        if probe is None:
            drifts.append(float(np.square(sparse - matrix).sum() / max(np.square(matrix).sum(), 1e-300)))
        else:
            drifts.append(
                probe.squared_drift({weight.site: weight.layout.inverse(sparse).astype(weight.constant.dtype)})
            )
    return [min(drift, 1e30) for drift in drifts]  # what is not finite is as bad as can be


def _points(share: float) -> list[float]:
    """Returns sparsities on either side of a share: layers will get more of it or less."""
    return sorted({share * 0.6, share, share + (1 - share) / 3, share + (1 - share) * 2 / 3} - {0.0})


def _comparable(graph: Graph, targets: Sequence[Target], context: Context) -> list[Array]:
    """Returns saliencies of all weights that layers can be compared by."""
    scores: dict[str, Array] = {}
    grams = dict[str, "Array | None"]()
    if any(target.criterion in ("wanda", "obs") for target in targets):
        grams = {weight.site: found for weight, found in with_grams(graph, [item.weight for item in targets], context)}
    for target in targets:
        weight, criterion = target.weight, target.criterion or "lamp"
        matrix, found = weight.layout.forward(weight.constant.values), grams.get(weight.site)
        seed = int(context.rng(weight.site).integers(2**31))
        if criterion in ("wanda", "obs") and found is None:
            criterion = "lamp"
        scores[weight.site] = saliency(matrix, criterion, found, seed=seed)
    return [scores[target.weight.site] for target in targets]


def _sides(weight: Weight) -> tuple[int, ...]:
    """Returns (out, in, kernel sides...) of a weight."""
    rows, columns = weight.layout.shape
    kernel = weight.constant.shape[2:] if _is_kernel(weight) else ()
    return (rows, max(columns // max(int(np.prod(kernel)), 1), 1), *kernel)


def _is_kernel(weight: Weight) -> bool:
    """Whether the weight is stored as the kernels of a convolution, sides last."""
    return len(weight.constant.shape) > 2 and any(use.op in ("Conv", "ConvTranspose") and not use.path for use in weight.uses)
