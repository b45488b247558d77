"""How many channels each group of a model keeps, so that all together cost what was asked for.

A group may keep any width of its ladder (`onnxshrink.numerics.widths`): all channels, or a multiple of the block that the runtime computes
at a time. A budget of multiply-accumulates, parameters or channels is a function of all widths; one of latency is met by trying graphs
with fewer and fewer multiply-accumulates, cut but not repaired, for time does not depend on values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from onnxshrink.channel_removal import LossCurve, loss_curves
from onnxshrink.contract import Context
from onnxshrink.errors import PassError
from onnxshrink.graph.channel_costs import Cost, channel_count, inferred_macs, macs_cost, stored_cost
from onnxshrink.graph.channel_groups import Channels
from onnxshrink.graph.channel_readers import Candidate
from onnxshrink.graph.cutting import cut_channels
from onnxshrink.graph.edit import sort_nodes
from onnxshrink.graph.fixed_shapes import fixed_shapes
from onnxshrink.graph.ir import Graph
from onnxshrink.importance import ChannelCriterion, channel_scores
from onnxshrink.numerics.widths import Ladder, choose_widths, rungs, uniform_widths
from onnxshrink.sensitivity import folds

__all__ = ["Bounds", "Budget", "Plan", "known_shapes", "plan_widths", "scored"]

Array = np.ndarray[Any, np.dtype[Any]]
Measure = Literal["macs", "params", "channels", "latency"]
_RUNGS = 40  # of a group's ladder: more are slower and lose no less
_TRIALS = 7  # of latency: the share of multiply-accumulates is known within a hundredth or so then


@dataclass(frozen=True)
class Budget:
    """What is to be kept of what: a share, from 0 to 1."""

    measure: Measure
    share: float


@dataclass(frozen=True)
class Bounds:
    """What one group may keep.

    Attributes:
        least: share of its channels that stays at least.
        keep: share that stays in any case, nearest to it; None to let groups compete.
    """

    least: float = 0.0
    keep: float | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """Widths, and what they cost.

    Attributes:
        widths: int [groups].
        orders: for each group, its channels in the order in which they go: intp [channels].
        shares: what is left of multiply-accumulates, parameters and channels, by measure; of latency, where it was measured.
        choices: how many widths each group could have had.
    """

    widths: Array
    orders: Sequence[Array]
    shares: dict[Measure, float]
    choices: Sequence[int]


def known_shapes(graph: Graph, context: Context) -> dict[str, tuple[int, ...]]:
    """Returns the shapes, by name, of tensors that have the same in every run, as one run shows them; nothing without trials."""
    if context.trials is None or not (fixed := fixed_shapes(graph)):
        return {}
    return {name: shape for name, shape in context.trials.shapes(graph).items() if name in fixed}


def scored(
    graph: Graph, found: Sequence[Candidate], criterion: ChannelCriterion, context: Context, *, probed: bool, repair: bool
) -> list[LossCurve]:
    """Returns for each group in which order channels go and what is lost.

    Args:
        graph: the main graph; not changed.
        found: groups of it.
        criterion: by which channels go.
        context: with activations; two thirds of them choose and the rest judges.
        probed: whether losses are what the outputs lose, as far as that can be measured; otherwise they are sums of scores.
        repair: whether layers will be solved again.
    """
    fitting, probe = folds(graph, context, 1)[0] if probed else (context, None)
    curves = [LossCurve.of(scores) for scores in channel_scores(graph, found, criterion, fitting)]
    return curves if probe is None else loss_curves(graph, found, curves, fitting, probe, repair)


def plan_widths(
    find: Callable[[Graph], Channels],
    channels: Channels,
    found: Sequence[Candidate],
    curves: Sequence[LossCurve],
    bounds: Sequence[Bounds],
    budget: Budget | None,
    context: Context,
    *,
    block: int,
    alike: bool = False,
) -> Plan:
    """Returns how many channels each group keeps.

    Args:
        find: finds the channels of a graph, as they were found in this one.
        channels: of the graph.
        found: groups of it, free to be cut.
        curves: for each what is lost with its channels.
        bounds: for each what it may keep.
        budget: for all of them; None where bounds say everything.
        context: to count work and measure latency.
        block: widths are multiples of it.
        alike: whether all groups keep the same share, as nearly as they can.

    Raises:
        PassError: latency is asked for and nothing can be run.
    """
    groups = [candidate.group for candidate in found]
    ladders = [_ladder(candidate, curve, bound, block) for candidate, curve, bound in zip(found, curves, bounds, strict=True)]
    sizes = np.array([group.size for group in groups], np.int64)
    macs = context.trials.macs(channels.graph) if context.trials is not None else None
    costs: dict[Measure, Cost] = {
        "macs": macs_cost(channels, groups, inferred_macs(channels) if macs is None else macs),
        "params": stored_cost(channels, groups, lambda constant: constant.size),
        "channels": channel_count(groups),
    }
    choose = uniform_widths if alike else choose_widths

    def widths_at(measure: Measure, share: float) -> Array:
        cost = costs[measure]
        return choose(ladders, cost.of, share * float(cost.of(sizes)))

    orders = [curve.order for curve in curves]
    latency: dict[Measure, float] = {}
    if budget is None:
        widths = np.array([ladder.widths[0] for ladder in ladders], np.int64)
    elif budget.measure == "latency":
        if context.trials is None:
            raise PassError("remove-channels: latency cannot be measured here; ask for macs")
        trials = context.trials

        def ratio_of(widths: Array) -> float:
            gone = [order[: size - width] for order, size, width in zip(orders, sizes, widths, strict=True)]
            return trials.latency_ratio(channels.graph, _cut_copy(find, channels, found, gone))

        widths, latency["latency"] = _by_latency(lambda share: widths_at("macs", share), ratio_of, budget.share)
    else:
        widths = widths_at(budget.measure, budget.share)
    shares: dict[Measure, float] = {name: _share(cost, widths, sizes) for name, cost in costs.items()}
    return Plan(widths, orders, shares | latency, [len(ladder.widths) for ladder in ladders])


def _share(cost: Cost, widths: Array, sizes: Array) -> float:
    whole = float(cost.of(sizes))
    return float(cost.of(widths)) / whole if whole else 1.0


def _ladder(candidate: Candidate, curve: LossCurve, bound: Bounds, block: int) -> Ladder:
    group = candidate.group
    apart = min((int((member.places >= 0).sum()) // group.size for member in group.weights if member.role), default=1)
    most = _RUNGS if bound.keep is None else None
    widths = rungs(group.size, max(block // max(apart, 1), 1), int(np.ceil(bound.least * group.size)), most)
    if bound.keep is not None:
        widths = widths[[np.argmin(np.abs(widths - bound.keep * group.size))]]
    return Ladder(widths, curve.losses[group.size - widths])


def _by_latency(narrower: Callable[[float], Array], ratio_of: Callable[[Array], float], share: float) -> tuple[Array, float]:
    """Returns the widths of most work that were seen to take no more than a share of the time, with that share.

    Args:
        narrower: gives widths for a share of the work.
        ratio_of: measures the time of widths.
        share: of the time, that is to be reached. Where nothing reaches it, the narrowest are returned.
    """
    low, high = 0.0, 1.0
    work = share  # as if time were work
    best = narrower(0.0)
    reached: float | None = None
    for _ in range(_TRIALS):
        widths = narrower(work)
        ratio = ratio_of(widths)
        if ratio <= share:
            best, reached, low = widths, ratio, work
        else:
            high = work
        work = (low + high) / 2
    return best, ratio_of(best) if reached is None else reached


def _cut_copy(find: Callable[[Graph], Channels], channels: Channels, found: Sequence[Candidate], gone: Sequence[Array]) -> Graph:
    """Returns a copy of the graph without some channels of each group, nothing made up for."""
    copy = channels.graph.copy()
    twins = find(copy)
    place = {id(group): index for index, group in enumerate(channels.groups)}
    cut_channels(twins, {twins.groups[place[id(one.group)]]: which for one, which in zip(found, gone, strict=True)})
    sort_nodes(copy)
    return copy
