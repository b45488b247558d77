"""Removes whole channels: a narrower graph, which any runtime runs faster.

Channels that are coupled, through residual sums, concatenations, gates or heads, are one group (`onnxshrink.graph.channel_groups`) and go
together. With Y = W X^T what a layer computes, S the channels that stay and X'_S what they hold once earlier layers were cut,

    W'_S = argmin ‖W X^T - W'_S X'_S^T‖²

is solved for every layer that reads the group, in the order in which the model runs, from the moments of calibration inputs (channel
pruning with least squares, He et al., arXiv 1707.06168). Without any, moments are guessed from the weights before a layer
(`onnxshrink.graph.expected_moments`): what goes is merged into what is like it, and biases take over the mean of the rest.

How many channels each group keeps follows from what their loss does to the outputs, tried out group by group, per unit of what is to
be saved: squared errors of groups add up (`onnxshrink.narrowing`). Widths are multiples of the block of channels that the runtime
computes at a time, for what lies between saves no time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Self

import numpy as np

from onnxshrink.channel_removal import mask, repair_helps
from onnxshrink.contract import Change, Context, Pass, Report, Skip
from onnxshrink.errors import OptionError
from onnxshrink.graph.channel_groups import ChannelGroup, Channels, find_channels
from onnxshrink.graph.channel_readers import Candidate, candidates
from onnxshrink.graph.cutting import cut_channels
from onnxshrink.graph.edit import constant_bytes, set_values
from onnxshrink.graph.ir import Graph
from onnxshrink.graph.storage import is_float
from onnxshrink.graph.weights import Weight, weights
from onnxshrink.importance import CHANNEL_CRITERIA
from onnxshrink.narrowing import Bounds, Budget, Plan, known_shapes, plan_widths, scored
from onnxshrink.options import option
from onnxshrink.shares import CLOSE, block_of, charged, check_round, gentler

__all__ = ["RemoveChannels"]

_MEASURES = ("macs", "params", "channels", "latency")
_DEFAULT_MACS = 0.75


@dataclass(frozen=True, kw_only=True)
class RemoveChannels(Pass):
    """Removes whole channels, heads and hidden units, and makes up for them: a narrower model that runs faster."""

    name: ClassVar[str] = "remove-channels"
    macs: float | None = option(
        None, "share of the multiply-accumulates that is left; 0.75 if no target is given", low=0.01, high=1.0, per_site=False
    )
    params: float | None = option(None, "share of the parameters that is left, instead", low=0.01, high=1.0, per_site=False)
    channels: float | None = option(None, "share of the channels that is left, instead", low=0.01, high=1.0, per_site=False)
    latency: float | None = option(None, "share of the measured time that is left, instead", low=0.01, high=1.0, per_site=False)
    keep: float | None = option(None, "share of its channels that a group keeps whatever the target, mostly for rules", low=0.0, high=1.0)
    least: float = option(0.125, "share of its channels that every group keeps at least", low=0.0, high=1.0)
    scope: str = option(
        "auto",
        "how many channels each group loses: the same share; by scores summed over all groups; by what their loss does to the outputs. "
        "auto is sensitivity with calibration data and global without",
        choices=("auto", "local", "global", "sensitivity"),
        per_site=False,
    )
    criterion: str = option(
        "auto",
        "which channels go first; auto is reconstruction: those whose loss the layers that read them make up for best",
        choices=("auto", *CHANNEL_CRITERIA),
        per_site=False,
    )
    round: str = option(
        "auto", "widths are multiples of this: a number, none, or auto: the block that this processor computes at a time, 1 with params",
        per_site=False,
    )
    heads: bool = option(True, "whether attention loses whole heads; otherwise the same places of every head", per_site=False)
    repair: bool = option(True, "whether the layers that read channels make up for those that go", per_site=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in _MEASURES if getattr(self, name) is not None]
        if len(given) > 1:
            raise OptionError(f"{self.name}: {' and '.join(given[:2])} are two targets; give one of them")
        if given and self.keep is not None:
            raise OptionError(f"{self.name}: keep gives every group its share, so {given[0]} has nothing to say; give one of them")
        check_round(self.name, self.round)

    def with_options(self, options: Mapping[str, Any]) -> Self:
        """Returns the pass with some options changed for a site: its own share takes the place of the target."""
        own: dict[str, Any] = dict.fromkeys(_MEASURES) if options.get("keep") is not None else {}
        return replace(self, **{**own, **options})

    @property
    def budget(self) -> Budget | None:
        """What is to be left of what; None where every group keeps a share of its own."""
        for name in _MEASURES:
            share = getattr(self, name)
            if share is not None:
                return Budget(name, share)  # type: ignore[arg-type]  # one of its measures
        return Budget("macs", _DEFAULT_MACS) if self.keep is None else None

    @property
    def block(self) -> int:
        """Widths are multiples of it."""
        budget = self.budget
        return block_of(self.round, for_time=budget is None or budget.measure != "params")

    @property
    def sites_are_independent(self) -> bool:
        """Whether layers do not depend on each other: they share channels."""
        return False

    def weaker(self) -> Self | None:
        """Returns the pass with 3/4 of the cut."""
        budget = self.budget
        if budget is None:
            return None
        share = gentler(budget.share)
        changed: dict[str, Any] = {budget.measure: share}
        return replace(self, **changed) if share is not None else None

    def apply(self, graph: Graph, context: Context) -> Report:
        """Edits the graph in place."""
        find = partial(find_channels, shapes=known_shapes(graph, context), outer=self.heads)
        channels = find(graph)
        known = weights(graph)
        reasons, bounds = self._bounds(channels, known, context)
        found = candidates(graph, [group for group in channels.groups if id(group) not in reasons])
        plan = self._plan(find, channels, found, [bounds[id(candidate.group)] for candidate in found], context)
        gone = {
            candidate: order[: candidate.group.size - width]
            for candidate, order, width in zip(found, plan.orders, plan.widths, strict=True)
            if width < candidate.group.size
        }
        for one, choices in zip(found, plan.choices, strict=True):
            if one not in gone:
                reasons[id(one.group)] = self._uncut(one.group, bounds[id(one.group)], choices)
        before = {weight.site: (weight.constant.shape, constant_bytes(weight.constant, weight.scope.graph)) for weight in known}
        stored = _stored_bytes(graph)
        moved, notes = self._cut(graph, channels, gone, known, context) if gone else (set[int](), [])
        changes, skips = _answers(channels, known, gone, reasons, before, moved)
        changes = charged(changes, _stored_bytes(graph) - stored)  # constants that hold sizes belong to all of them
        return Report(changes, skips, self._notes(plan, len(gone), len(channels.groups), context) + notes, self._missed(plan))

    def _bounds(self, channels: Channels, known: Sequence[Weight], context: Context) -> tuple[dict[int, str], dict[int, Bounds]]:
        """Returns by group why it stays as it is, or what it may keep."""
        by_constant = {id(weight.constant): weight for weight in known}
        reasons, bounds = {}, {}
        for group in channels.groups:
            members = [by_constant[id(member.tensor)] for member in group.weights if id(member.tensor) in by_constant]
            chosen = [context.options(self, weight.names) for weight in members]
            given = [options for options in chosen if options is not None]
            if group.reason is not None:
                reasons[id(group)] = str(group.reason)
            elif len(given) < len(chosen):
                named = next(weight.site for weight, options in zip(members, chosen, strict=True) if options is None)
                reasons[id(group)] = f"left alone by a rule, for '{named}' or what is coupled with it"
            elif integers := [weight.constant.dtype for weight in members if weight.computes and not is_float(weight.constant.dtype)]:
                reasons[id(group)] = f"a weight holds {integers[0]} values; remove channels before quantizing"
            elif any(not np.isfinite(weight.constant.values).all() for weight in members if is_float(weight.constant.dtype)):
                reasons[id(group)] = "a weight holds NaN or infinity"
            elif group.resliced:
                reasons[id(group)] = f"a sum or mean over these channels would become that of fewer ('{group.resliced[0]}')"
            else:
                leasts = {options.least for options in given} - {self.least} or {self.least}  # what rules say goes first
                kept = [options.keep for options in given if options.keep is not None]
                keeps = [share for share in kept if share != self.keep] or kept
                bounds[id(group)] = Bounds(max(leasts), max(keeps, default=None))
        return reasons, bounds

    def _plan(
        self, find: Any, channels: Channels, found: Sequence[Candidate], bounds: Sequence[Bounds], context: Context
    ) -> Plan:
        calibrated = context.activations is not None
        scope = ("sensitivity" if calibrated else "global") if self.scope == "auto" else self.scope
        criterion: Any = "reconstruction" if self.criterion == "auto" else self.criterion
        probed = scope == "sensitivity" and calibrated
        curves = scored(channels.graph, found, criterion, context, probed=probed, repair=self.repair)
        return plan_widths(find, channels, found, curves, bounds, self.budget, context, block=self.block, alike=scope == "local")

    def _cut(
        self, graph: Graph, channels: Channels, gone: Mapping[Candidate, Any], known: Sequence[Weight], context: Context
    ) -> tuple[set[int], list[str]]:
        """Repairs, unless outputs would be further from the original's for it, and cuts; returns what biases moved, by id, and notes."""
        moved: set[int] = set()
        notes: list[str] = []
        if self.repair:
            values, repaired = mask(graph, gone, context)
            if repair_helps(graph, gone, values, repaired, context):
                by_site = {weight.site: weight for weight in known}
                edits = [(by_site[site].constant, array) for site, array in values.items()]
                for constant, array in edits + list(repaired.biases.values()):
                    set_values(constant, array)
                moved = {id(constant) for constant, _ in repaired.biases.values()}
            else:
                notes.append("nothing was made up for: outputs on the calibration inputs would be further from the original's")
        cut_channels(channels, {candidate.group: which for candidate, which in gone.items()})
        return moved, notes

    def _uncut(self, group: ChannelGroup, bound: Bounds, choices: int) -> str:
        """Returns why a group that could be cut was not."""
        if choices > 1:
            return f"all {group.size} channels stay: others cost less for what they save"
        blocks = f" in blocks of {self.block} (round)" if self.block > 1 else ""
        if group.size <= self.block:
            return f"its {group.size} channels fill no more than one block of {self.block}: fewer would save no time (round=none cuts them)"
        if bound.least > 0 and (bound.keep is None or bound.keep <= bound.least):
            return f"at least {bound.least:.3g} of its {group.size} channels stay (least), which leaves none to go{blocks}"
        if bound.keep is not None:
            return f"all of its {group.size} channels are nearest to {bound.keep:.3g} of them (keep){blocks}"
        return f"its {group.size} channels leave none to go{blocks}"

    def _notes(self, plan: Plan, cut: int, groups: int, context: Context) -> list[str]:
        """Returns what was reached, and what is worth knowing of the way."""
        left = ", ".join(f"{name} x {plan.shares[name]:.3f}" for name in _MEASURES if name in plan.shares)
        notes = [f"{left} of the model as it came to this pass; {cut} of {groups} groups cut"]
        if cut and self.round == "auto" and self.block > 1:
            notes.append(f"widths are multiples of {self.block}, which this processor computes at a time; round=N is for another one")
        if context.activations is None:
            notes += self._without_data(cut)
        return notes

    def _without_data(self, cut: int) -> list[str]:
        """Returns what was asked for and could not be done without calibration inputs, and what was done instead."""
        notes = []
        if self.scope == "sensitivity":
            notes.append("scope sensitivity measures on calibration inputs, and none were left for this pass: scores were summed instead")
        if self.criterion == "activation":
            notes.append("criterion activation goes by calibration inputs, and none were left for this pass: l2 stood for it")
        if cut and (self.repair or self.criterion in ("auto", "reconstruction")):
            notes.append("no calibration inputs were left for this pass: what channels hold was guessed from the weights that compute them")
        return notes

    def _missed(self, plan: Plan) -> str:
        """Returns that the target was missed, if it was."""
        budget = self.budget
        if budget is None or plan.shares[budget.measure] <= budget.share + CLOSE:
            return ""
        blocks = f" in blocks of {self.block} (round)" if self.block > 1 else ""
        asked = "asked for" if getattr(self, budget.measure) is not None else "the default is"
        reached = f"{budget.measure} x {plan.shares[budget.measure]:.3f}"
        return f"{asked} {budget.measure} x {budget.share:g}; {reached} is what can be had with rules, least and heads as they are{blocks}"


def _stored_bytes(graph: Graph) -> int:
    return sum(constant_bytes(constant, graph) for constant in graph.constants)


def _answers(
    channels: Channels,
    known: Sequence[Weight],
    gone: Mapping[Candidate, Any],
    reasons: Mapping[int, str],
    before: Mapping[str, tuple[tuple[int, ...], int]],
    moved: set[int],
) -> tuple[list[Change], list[Skip]]:
    """Returns what became of every weight."""
    cut = {id(candidate.group): candidate for candidate in gone}
    on: dict[int, list[ChannelGroup]] = {}
    for group in channels.groups:
        for tensor in dict.fromkeys(member.tensor for member in group.weights):
            on.setdefault(id(tensor), []).append(group)
    changes, skips = [], []
    left = {id(constant) for scope in channels.graph.scopes() for constant in scope.graph.constants}
    for weight in known:
        if id(weight.constant) not in left:  # held sizes, and others took its place
            continue
        groups = on.get(id(weight.constant), [])
        shape, nbytes = before[weight.site]
        if weight.constant.shape != shape:
            lost = [f"{len(gone[cut[id(group)]])} of {group.size} channels of '{group.name}'" for group in groups if id(group) in cut]
            sides = " -> ".join("x".join(map(str, sides)) for sides in (shape, weight.constant.shape))
            after = constant_bytes(weight.constant, weight.scope.graph)
            changes.append(Change(weight.site, nbytes, after, f"{sides}: without {', '.join(lost)}"))
        elif id(weight.constant) not in moved:
            why = dict.fromkeys(reasons[id(group)] for group in groups if id(group) in reasons)
            skips.append(Skip(weight.site, "; ".join(why) or "holds no channels that could be cut"))
    return changes, skips
