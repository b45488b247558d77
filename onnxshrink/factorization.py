"""Which weights become products of thin pieces, at which ranks, and what the pieces hold.

    lists = option_lists(graph, targets, context, probe)       for each weight: forms and ranks, what they cost and what they lose
    chosen = choose(lists, budget)                             one of them for each, or none, of least total loss
    pieces, repaired = factor_in_turn(graph, chosen, context)  what `onnxshrink.graph.factoring.split` puts in their place

Weights are factored in the order in which the model runs: each is wanted as it gives the ORIGINAL's outputs from the inputs that the layers
before it, factored already, give it (`onnxshrink.repair`), and then cut where its OUTPUT changes least (SVD-LLM, arXiv 2403.07378).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from onnxshrink.contract import Context
from onnxshrink.graph.factor_forms import Form, Pieces, Ranks
from onnxshrink.graph.ir import Graph
from onnxshrink.graph.weights import Weight
from onnxshrink.numerics.low_rank import spectrum
from onnxshrink.numerics.ranks import evbmf_rank
from onnxshrink.numerics.widths import Ladder, choose_widths, rungs
from onnxshrink.repair import Repaired, rewrite_in_turn, with_grams
from onnxshrink.sensitivity import OutputProbe

__all__ = ["Option", "Rule", "Target", "by_rules", "choose", "factor_in_turn", "filled", "option_lists", "singular_values"]

Array = np.ndarray[Any, np.dtype[Any]]
_SPECTRAL = ("channel", "recurrent-input", "two-products")  # whose error at every rank follows from one decomposition
_RANKS, _FEW_RANKS = 24, 8  # of a form that are considered
_PROBED = (0.5, 0.8)  # of a weight's cost: where it is tried out what its error does to the outputs
_TINY = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True, eq=False)
class Target:
    """A weight that may be factored.

    Attributes:
        weight: it.
        forms: in which it may be cut.
        cost: of the weight as it is, in the unit of the budget.
        by_work: whether that is multiply-accumulates; else it is parameters.
        block: ranks are multiples of it.
    """

    weight: Weight
    forms: tuple[Form, ...]
    cost: float
    by_work: bool = False
    block: int = 1

    def cost_at(self, form: Form, ranks: Ranks) -> float:
        """Returns what the pieces of a form cost at some ranks."""
        return self.cost * (form.macs(ranks) if self.by_work else form.parameters(ranks)) / form.whole

    def paying(self, form: Form) -> list[Ranks]:
        """Returns the ranks of a form that cost less than the weight, largest first."""
        full = max(form.full)
        every = dict.fromkeys(form.at(width / full) for width in rungs(full, self.block, self.block))
        return [ranks for ranks in every if self.cost_at(form, ranks) < self.cost]

    def ranks(self, form: Form, *, every: bool = False) -> list[Ranks]:
        """Returns some of them, evenly spread, that are tried out; all if that is asked for and costs next to nothing."""
        paying, most = self.paying(form), _RANKS if form.kind in _SPECTRAL else _FEW_RANKS
        if every and form.kind in _SPECTRAL:
            return paying
        return [paying[index] for index in np.unique(np.linspace(0, len(paying) - 1, most).round().astype(int))] if paying else []


@dataclass(frozen=True, eq=False)
class Option:
    """What may become of a weight.

    Attributes:
        form: None for the weight as it is.
        ranks: of the form.
        cost: in the unit of the budget.
        loss: squared, relative: of the layer's outputs, or, once that was tried out, of the model's.
    """

    form: Form | None
    ranks: Ranks
    cost: float
    loss: float


@dataclass(frozen=True)
class Rule:
    """How a weight gets its rank by itself; one of these.

    Attributes:
        rank: the number.
        share: of the full rank.
        energy: share of the squared singular values that is kept, at the least cost.
        error: relative error of the layer's outputs, at the least cost.
        evbmf: the rank that empirical variational Bayes takes for signal (`onnxshrink.numerics.ranks`).
    """

    rank: int | None = None
    share: float | None = None
    energy: float | None = None
    error: float | None = None
    evbmf: bool = False


def by_rules(graph: Graph, targets: Sequence[Target], rules: Sequence[Rule], context: Context) -> list[Option]:
    """Returns what becomes of each weight by its own rule: the form of least error, or of least cost where the error is given.

    Args:
        graph: the main graph; not changed.
        targets: of it.
        rules: one for each.
        context: with activations, which whiten.
    """
    found: dict[str, Option] = {}
    of = {target.weight.site: (target, rule) for target, rule in zip(targets, rules, strict=True)}
    for weight, grams in with_grams(graph, [target.weight for target in targets], context):
        found[weight.site] = _by_rule(*of[weight.site], grams)
        context.progress(len(found), len(targets))
    return [found[target.weight.site] for target in targets]


def _by_rule(target: Target, rule: Rule, grams: Array | None) -> Option:
    if rule.energy is not None or rule.error is not None:
        limit = 1 - rule.energy if rule.energy is not None else float(rule.error or 0.0) ** 2
        return next(option for option in reversed(_options(target, grams, every=True)) if option.loss <= limit)
    found = []
    for form in target.forms:
        full = max(form.full)
        if rule.evbmf:
            values = singular_values(form, grams)
            wanted = _rounded(max(evbmf_rank(one, *_sides(form)) for one in values), target.block) / full
        elif rule.rank is not None:
            wanted = rule.rank / full
        else:
            wanted = _rounded(float(rule.share or 0.0) * full, target.block) / full
        ranks = form.at(min(wanted, 1.0))
        if (cost := target.cost_at(form, ranks)) < target.cost:
            found.append(Option(form, ranks, cost, _losses(form, [ranks], grams)[0]))
    return min(found, key=lambda option: option.loss, default=Option(None, (), target.cost, 0.0))


def _rounded(rank: float, block: int) -> int:
    """Returns the nearest multiple of a block, one block at least."""
    return max(round(rank / block), 1) * block


def _sides(form: Form) -> tuple[int, int]:
    geometry = form.geometry
    return geometry.outputs, geometry.inputs * geometry.positions


def option_lists(graph: Graph, targets: Sequence[Target], context: Context, probe: OutputProbe | None) -> list[list[Option]]:
    """Returns for each weight its options, dearest first: as it is, and all that lose less than any that costs no more.

    Args:
        graph: the main graph; not changed.
        targets: of it.
        context: with activations, which whiten; without any, losses are those of the weights themselves.
        probe: on other inputs: losses are then those of the model's outputs.
    """
    by_site = {target.weight.site: target for target in targets}
    found: dict[str, list[Option]] = {}
    for weight, grams in with_grams(graph, [target.weight for target in targets], context):
        target = by_site[weight.site]
        options = _options(target, grams)
        factor = 1.0 if probe is None or len(options) < 2 else _effect(target, options, grams, probe)
        found[weight.site] = [replace(option, loss=option.loss * factor) for option in options]
        context.progress(len(found), len(targets))
    return [found[target.weight.site] for target in targets]


def choose(lists: Sequence[Sequence[Option]], budget: float, fixed: float = 0.0) -> list[Option]:
    """Returns an option for each weight, of small total loss within a budget; the cheapest of all where it cannot be met.

    Args:
        lists: for each weight, dearest first.
        budget: of the sum of all costs.
        fixed: what costs anyway.
    """
    if not lists:
        return []
    longest, tops = max(map(len, lists)), np.array([len(options) for options in lists])
    table = np.array([[one.cost for one in options] + [options[-1].cost] * (longest - len(options)) for options in lists])
    ladders = [Ladder(len(options) - np.arange(len(options)), np.array([one.loss for one in options])) for options in lists]

    def costs(widths: Array) -> Array:
        total: Array = fixed + table[np.arange(len(lists)), (tops - widths).astype(np.int64)].sum(axis=-1)
        return total

    widths = choose_widths(ladders, costs, budget)
    return [options[top - width] for options, top, width in zip(lists, tops, widths, strict=True)]


def filled(
    targets: Sequence[Target], chosen: Sequence[Option], room: float, lists: Sequence[Sequence[Option]] | None = None
) -> list[Option]:
    """Returns the options with larger ranks where a budget leaves room, those that lose most first.

    Args:
        targets: the weights.
        chosen: an option for each.
        room: what more they may cost together.
        lists: of options, none of whose forms is to cost more than it does there.
    """
    found = list(chosen)
    for index in sorted(range(len(found)), key=lambda index: -found[index].loss):
        target, option = targets[index], found[index]
        if option.form is not None and room > 0:
            larger = [(target.cost_at(option.form, ranks), ranks) for ranks in target.paying(option.form)]
            known = [one.cost for one in lists[index] if one.form is option.form] if lists is not None else [target.cost]
            most = min(option.cost + room, max([*known, option.cost]))
            cost, ranks = max((pair for pair in larger if option.cost <= pair[0] <= most), default=(option.cost, option.ranks))
            room -= cost - option.cost
            found[index] = replace(option, ranks=ranks, cost=cost)
    return found


def factor_in_turn(
    graph: Graph, chosen: Mapping[str, Option], weights: Sequence[Weight], context: Context
) -> tuple[dict[str, Pieces], Repaired]:
    """Returns the pieces of each weight by site, and what was done beside.

    Args:
        graph: the main graph; not changed.
        chosen: for each site an option with a form.
        weights: of the graph, with these sites.
        context: with activations where layers are to make up for those before them.

    Raises:
        ValidationError: the model does not run on the calibration inputs, or an activation is not finite.
    """
    pieces: dict[str, Pieces] = {}

    def rewrite(weight: Weight, wanted: Array, grams: Array | None) -> Array:
        option = chosen[weight.site]
        assert option.form is not None
        pieces[weight.site] = option.form.factor(wanted, option.ranks, grams)
        return option.form.product(pieces[weight.site])

    return pieces, rewrite_in_turn(graph, weights, rewrite, context)


def singular_values(form: Form, grams: Array | None) -> Array:
    """Returns the whitened singular values of a weight, of all groups of rows: float64 [groups, smaller side], descending."""
    geometry = form.geometry
    if form.kind == "recurrent-input" and grams is not None:  # directions meet the same inputs
        grams = grams.mean(axis=0, keepdims=True)
    values: Array = spectrum(form.matrix.reshape(geometry.groups, geometry.outputs, -1), grams)
    return values


def _options(target: Target, grams: Array | None, *, every: bool = False) -> list[Option]:
    """Returns the options of one weight, their losses those of its layer."""
    tried = [
        Option(form, ranks, target.cost_at(form, ranks), loss)
        for form in target.forms
        for tried_ranks in [target.ranks(form, every=every)]
        for ranks, loss in zip(tried_ranks, _losses(form, tried_ranks, grams), strict=True)
    ]
    kept: list[Option] = []
    for option in sorted(tried, key=lambda option: (option.cost, option.loss)):
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return [Option(None, (), target.cost, 0.0), *reversed(kept)]


def _losses(form: Form, every: Sequence[Ranks], grams: Array | None) -> list[float]:
    """Returns the squared error of a layer's outputs at each of several ranks, relative to their squares."""
    if not every:
        return []
    if form.kind in _SPECTRAL:
        squares = np.square(singular_values(form, grams))
        total = max(float(squares.sum()), _TINY)
        return [float(squares[:, ranks[0] :].sum()) / total for ranks in every]
    matrix = form.matrix
    return [_error(matrix, form.product(form.factor(matrix, ranks, grams)), grams) for ranks in every]


def _error(matrix: Array, product: Array, grams: Array | None) -> float:
    """Returns the squared error of a layer's outputs relative to their squares; of its weights where inputs are not known."""
    change = product - matrix
    if grams is None:
        return float(np.square(change).sum()) / max(float(np.square(matrix).sum()), _TINY)
    parts = zip(np.split(change, len(grams)), np.split(matrix, len(grams)), grams, strict=True)
    wrong, right = np.sum([(np.sum(one @ gram * one), np.sum(other @ gram * other)) for one, other, gram in parts], axis=0)
    return float(max(wrong, 0.0) / max(right, _TINY))


def _effect(target: Target, options: Sequence[Option], grams: Array | None, probe: OutputProbe) -> float:
    """Returns the squared drift of the model's outputs for each squared error of the layer's: a mean over what was tried out."""
    weight, ratios = target.weight, []
    for share in _PROBED:
        option = min(options[1:], key=lambda one: abs(one.cost - share * target.cost))
        if option.form is not None and option.loss > 0:
            matrix = option.form.product(option.form.factor(option.form.matrix, option.ranks, grams))
            with np.errstate(over="ignore"):
                values = weight.layout.inverse(matrix).astype(weight.constant.dtype)
            ratios.append(np.log(max(probe.loss({weight.site: values}), _TINY)) - np.log(option.loss))
    return float(np.exp(np.mean(ratios))) if ratios else 1.0
