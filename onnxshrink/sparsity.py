"""Zeros for many weights at once: how many each layer gets, and layers pruned in turn, each made up for.

    shares = removed_shares(graph, targets, "sensitivity", 0.5, context)
    sparse, repaired = sparsify_in_turn(graph, targets, shares, context)

Where calibration data is given, layers are pruned in the order in which the model runs (`onnxshrink.repair`): every one is solved again
against what the ORIGINAL computes, with the inputs that the layers before it, sparse already, give it. `onnxshrink.numerics.pruning`
says how zeros are chosen and what is left is solved for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np

from onnxshrink.contract import Context
from onnxshrink.errors import OptionError
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
from onnxshrink.numerics.floatbits import rounded_to
from onnxshrink.repair import Repaired, rewrite_in_turn, with_grams
from onnxshrink.sensitivity import OutputProbe, folds
from onnxshrink.targets import Target

__all__ = ["Scope", "curves", "probed_curves", "removed_shares", "sparsify_alone", "sparsify_in_turn"]

Array = np.ndarray[Any, np.dtype[Any]]
Scope = Literal["layer", "global", "erk", "sensitivity"]
_LITTLE_EFFORT = 0.25  # of choosing zeros, while layers are compared: a few tenths of a decibel worse, for all alike


def removed_shares(
    graph: Graph, targets: Sequence[Target], scope: Scope, share: float, context: Context, repair: bool = True
) -> list[float]:
    """Returns the share of zeros for each target, so that all together have ``share``.

    Args:
        graph: the main graph; not changed.
        targets: of it.
        scope: ``layer`` gives all the same; ``global`` lines all weights up by a saliency that layers share (LAMP unless the targets
            have another criterion); ``erk`` goes by shapes; ``sensitivity`` by what zeros in each layer do to the model's outputs.
        share: of the weights of all targets, from 0 to 1.
        context: for activations.
        repair: whether zeros will be made up for.

    Raises:
        OptionError: the bounds of the targets do not allow that share.
        ValidationError: the model does not run on the calibration inputs.
    """
    if not targets:
        return []
    sizes = [target.weight.constant.size for target in targets]
    try:
        bounds = Bounds.of(len(targets), [1 - target.most for target in targets], [1 - target.least for target in targets])
        kept = uniform(sizes, share, bounds)
    except ValueError as error:
        raise OptionError(str(error)) from None
    if scope == "layer" or share in (0.0, 1.0):
        return [float(removed) for removed in 1 - kept]
    if scope == "global":
        kept = by_global_threshold(_comparable(graph, targets, context), share, bounds)
    elif scope == "erk":
        kept = erdos_renyi_kernel([target.sides for target in targets], share, bounds)
    elif scope == "sensitivity":
        kept = by_sensitivity(sizes, curves(graph, targets, _points(share), context, repair), share, bounds)
    return [float(removed) for removed in 1 - kept]


def curves(
    graph: Graph, targets: Sequence[Target], sparsities: Sequence[float], context: Context, repair: bool = True
) -> list[Curve]:
    """Returns what zeros in each weight alone, the rest of it made up for, do to the outputs on inputs that took no part in it.

    Args:
        graph: the main graph; not changed.
        targets: of it. Weights without calibration activations are pruned by magnitude.
        sparsities: ascending, above 0.
        context: for activations; without them, and where outputs tell nothing, the squares that go, as a share of
            the weight's, stand for the drift.
        repair: whether the rest is made up for at all.
    """
    fitting, probe = folds(graph, context, 1)[0]
    return probed_curves(graph, targets, sparsities, fitting, probe, repair)


def probed_curves(
    graph: Graph,
    targets: Sequence[Target],
    sparsities: Sequence[float],
    context: Context,
    probe: OutputProbe | None,
    repair: bool = True,
) -> list[Curve]:
    """Returns what zeros in each weight alone do, told by a probe of the caller's.

    Args:
        graph: the main graph; not changed.
        targets: of it.
        sparsities: ascending, above 0.
        context: for activations to make up for zeros with; without them nothing is made up for.
        probe: on inputs that are not among those; without one, the squares that go stand for the drift.
        repair: whether the rest is made up for at all.
    """
    by_site = {target.weight.site: target for target in targets}
    found: dict[str, Curve] = {}
    for weight, grams in with_grams(graph, [target.weight for target in targets], _needed(targets, context, repair)):
        drifts = _drifts(by_site[weight.site], grams, sparsities, probe, context, repair)
        found[weight.site] = Curve(np.asarray(sparsities), np.asarray(drifts))
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
    by_site = {target.weight.site: (target, share) for target, share in zip(targets, shares, strict=True)}

    def zeros(found: tuple[Weight, Array | None]) -> tuple[str, Array]:
        weight, grams = found
        target, share = by_site[weight.site]
        matrix = weight.layout.forward(weight.constant.values)
        return weight.site, weight.layout.inverse(target.zeroed(matrix, grams, share, context))

    weights = [target.weight for target in targets]
    return dict(context.map(zeros, list(with_grams(graph, weights, _needed(targets, context, repair=False)))))


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
    """Prunes one weight in its turn and keeps its new values; one that gets no zeros stays as it is."""
    original, layout = weight.constant.values, weight.layout
    zeros = layout.forward(before.get(weight.site, original)) == 0
    sparse = by_site[weight.site].pruned(wanted, grams, share_of[weight.site], zeros, context)
    matrix = rounded_to(sparse, original.dtype)
    beyond = ~np.isfinite(matrix).all(axis=1, keepdims=True)  # the range of float16
    new = layout.inverse(np.where(beyond & (sparse != 0), layout.forward(original), matrix))
    values[weight.site] = new if np.count_nonzero(new) < np.count_nonzero(original) else original
    return layout.forward(values[weight.site]).astype(np.float64)


def _needed(targets: Sequence[Target], context: Context, repair: bool) -> Context:
    """Returns a context without activations where nothing would read them."""
    asked = repair or any(target.asks_for_inputs for target in targets)
    return context if asked else replace(context, activations=None)


def _drifts(
    target: Target,
    grams: Array | None,
    sparsities: Sequence[float],
    probe: OutputProbe | None,
    context: Context,
    repair: bool,
) -> list[float]:
    """Returns the squared drift at each sparsity."""
    weight = target.weight
    matrix = weight.layout.forward(weight.constant.values)
    wide = matrix.astype(np.float64)
    drifts = []
    for sparsity in sparsities:
        if repair:
            sparse = target.pruned(wide, grams, sparsity, wide == 0, context, _LITTLE_EFFORT)
        else:
            sparse = target.zeroed(matrix, grams, sparsity, context)
        if probe is None:
            drifts.append(float(np.square(sparse - wide).sum() / max(np.square(wide).sum(), np.finfo(np.float64).tiny)))
        else:
            with np.errstate(over="ignore"):
                drifts.append(probe.loss({weight.site: weight.layout.inverse(sparse).astype(matrix.dtype)}))
    return drifts


def _points(share: float) -> list[float]:
    """Returns sparsities on either side of a share: layers will get more of it or less."""
    return sorted({share * 0.6, share, share + (1 - share) / 3, share + (1 - share) * 2 / 3} - {0.0})


def _comparable(graph: Graph, targets: Sequence[Target], context: Context) -> list[Array]:
    """Returns saliencies of all weights that layers can be compared by."""
    by_site = {target.weight.site: target for target in targets}
    every = with_grams(graph, [target.weight for target in targets], _needed(targets, context, repair=False))
    scores = {weight.site: by_site[weight.site].comparable(grams, context) for weight, grams in every}
    return [scores[target.weight.site] for target in targets]
