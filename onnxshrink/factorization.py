"""Which weights become products of thin pieces, at which ranks, and what the pieces hold.

    lists = option_lists(graph, targets, context, probe)       for each weight: forms and ranks, what they cost and what they lose
    chosen = choose(lists, budget)                             one of them for each, or none, of least total loss
    pieces, repaired = factor_in_turn(graph, chosen, context)  what `onnxshrink.graph.factoring.split` puts in their place

Weights are factored in the order in which the model runs: each is wanted as it gives the ORIGINAL's outputs from the inputs that the layers
before it, factored already, give it (`onnxshrink.repair`), and then cut where its OUTPUT changes least (SVD-LLM, arXiv 2403.07378).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from onnxshrink.contract import Context
from onnxshrink.factor_options import Option, Target, layer_losses, layer_options, singular_values, worth_their_cost
from onnxshrink.graph.factor_forms import Form, Pieces
from onnxshrink.graph.ir import Graph
from onnxshrink.graph.weights import Weight
from onnxshrink.numerics.ranks import evbmf_rank
from onnxshrink.numerics.widths import Ladder, choose_widths
from onnxshrink.repair import Repaired, rewrite_in_turn, with_grams
from onnxshrink.sensitivity import OutputProbe

__all__ = ["Rule", "by_rules", "choose", "factor_in_turn", "filled", "option_lists"]

Array = np.ndarray[Any, np.dtype[Any]]
_PROBED = (0.5, 0.8)  # of a weight's cost: where it is tried out what its error does to the outputs
_TRIED = 4  # ranks that seem small enough
_AT_ONCE = 1 << 28  # bytes of Gram matrices that are held while layers are looked at side by side
_TINY = float(np.finfo(np.float64).tiny)
_Found = TypeVar("_Found")


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

    @property
    def asked(self) -> str:
        """It, as people give it."""
        given = ((name, getattr(self, name)) for name in ("rank", "share", "energy", "error"))
        return next((f"{name}={value:g}" for name, value in given if value is not None), "evbmf")


def by_rules(graph: Graph, targets: Sequence[Target], rules: Sequence[Rule], context: Context) -> list[Option]:
    """Returns what becomes of each weight by its own rule: the form of least error, or of least cost where the error is given.

    Args:
        graph: the main graph; not changed.
        targets: of it.
        rules: one for each.
        context: with activations, which whiten.
    """
    of = {target.weight.site: rule for target, rule in zip(targets, rules, strict=True)}
    return _each(graph, targets, context, lambda target, grams: _by_rule(target, of[target.weight.site], grams))


def _by_rule(target: Target, rule: Rule, grams: Array | None) -> Option:
    if rule.energy is not None or rule.error is not None:
        limit = 1 - rule.energy if rule.energy is not None else float(rule.error or 0.0) ** 2
        fitting = [option for form in target.forms for option in _smallest(target, form, grams, limit)]
        return min(fitting, key=lambda option: option.cost, default=Option(None, (), target.cost, 0.0))
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
        if target.pays(form, ranks):
            found.append(Option(form, ranks, target.cost_at(form, ranks), layer_losses(form, [ranks], grams)[0]))
    return next(iter(worth_their_cost(found)[-1:]), Option(None, (), target.cost, 0.0))


def _smallest(target: Target, form: Form, grams: Array | None, limit: float) -> list[Option]:
    """Returns the option of a form of least cost that loses no more than a limit, as far as a few ranks tell; none if none does."""
    every = target.ranks(form, every=True)[::-1]
    ranks = [ranks for ranks, loss in zip(every, layer_losses(form, every, grams), strict=True) if loss <= limit]
    for tried in ranks[:: max(len(ranks) // _TRIED, 1)]:  # what was measured at other ranks may not hold here
        (loss,) = layer_losses(form, [tried], grams)
        if loss <= limit:
            return [Option(form, tried, target.cost_at(form, tried), loss)]
    return []


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

    def options_of(target: Target, grams: Array | None) -> list[Option]:
        options = layer_options(target, grams)
        factor = 1.0 if probe is None or len(options) < 2 else _effect(target, options, grams, probe)
        return [replace(option, loss=option.loss * factor) for option in options]

    return _each(graph, targets, context, options_of)


def _each(
    graph: Graph, targets: Sequence[Target], context: Context, function: Callable[[Target, Array | None], _Found]
) -> list[_Found]:
    """Returns f(target, Gram matrices of what it meets) for each, computed by the executor, as many at once as memory allows."""
    by_site = {target.weight.site: target for target in targets}
    found: dict[str, _Found] = {}
    for pairs in _portions(with_grams(graph, [target.weight for target in targets], context)):
        results = context.map(lambda pair: function(by_site[pair[0].site], pair[1]), pairs, len(found), len(targets))
        found |= {weight.site: result for (weight, _), result in zip(pairs, results, strict=True)}
    return [found[target.weight.site] for target in targets]


def _portions(pairs: Iterator[tuple[Weight, Array | None]]) -> Iterator[list[tuple[Weight, Array | None]]]:
    """Yields weights with their Gram matrices in portions of some bytes."""
    portion: list[tuple[Weight, Array | None]] = []
    for pair in pairs:
        portion.append(pair)
        if sum(grams.nbytes for _, grams in portion if grams is not None) > _AT_ONCE:
            yield portion
            portion = []
    if portion:
        yield portion


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
