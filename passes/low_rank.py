"""Cuts weights in thin pieces: a layer of rank r computes Y = U (V X^T) instead of W X^T.

    MatMul, Gemm        two products, [K, r] and [r, N]
    Conv                k x k then 1 x 1 (channel), 1 x 1 then k x k (input), k x 1 then 1 x k (spatial), 1 x 1, k x k, 1 x 1 (tucker2)
    ConvTranspose       the same, as far as attributes allow
    LSTM, GRU, RNN      the input weight, its first piece shared by all directions

Any but recurrent weights may be cut in the interpolative form as well: some outputs as they were, the others from these, which takes fewer
parameters at the same rank.

With the Gram matrix H = L L^T of what the layer meets, U V is the truncated SVD of W L times L^-1: of all products of rank r it changes
the OUTPUT least, by the sum of the squared singular values that were cut (SVD-LLM, arXiv 2403.07378). Without calibration inputs H is
the identity, and it is W that changes least. A budget of parameters or multiply-accumulates is given out so that the outputs of the model
suffer least (`onnxshrink.factorization`); `rank`, `share`, `energy`, `error` and `evbmf` set ranks layer by layer instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np

from onnxshrink.contract import Context, Pass, Report, Skip
from onnxshrink.errors import OptionError
from onnxshrink.factor_cutting import cut_in_turn
from onnxshrink.factor_options import Option, Target
from onnxshrink.factor_timing import that_pay
from onnxshrink.factorization import Rule, by_rules, choose, filled, option_lists
from onnxshrink.graph.channel_costs import inferred_macs
from onnxshrink.graph.channel_groups import find_channels
from onnxshrink.graph.dequantized import dequantized_copy, is_dequantized, meets_integers, obstacle
from onnxshrink.graph.factor_forms import Form
from onnxshrink.graph.factoring import forms
from onnxshrink.graph.ir import Graph
from onnxshrink.graph.weights import Weight, weights
from onnxshrink.options import option
from onnxshrink.sensitivity import folds
from onnxshrink.shares import CLOSE, block_of, check_round, gentler

__all__ = ["LowRank"]

_OF_KERNELS = ("channel", "input", "interpolative", "spatial", "tucker2")
_OF_PRODUCTS = ("interpolative", "two-products")
_FORMS = ("auto", "factors", *sorted({*_OF_KERNELS, *_OF_PRODUCTS}))
_BUDGETS, _RULES = ("params", "macs"), ("rank", "share", "energy", "error")
_DEFAULT_PARAMS = 0.8


@dataclass(frozen=True, kw_only=True)
class LowRank(Pass):
    """Cuts weights in thin pieces of low rank, so that outputs of layers change least: fewer parameters, less work."""

    name: ClassVar[str] = "low-rank"
    params: float | None = option(
        None, "share of the parameters of layers that can be cut that is left; 0.8 if nothing is given", low=0.01, high=1.0, per_site=False
    )
    macs: float | None = option(
        None, "share of the multiply-accumulates of layers that can be cut that is left, instead", low=0.01, high=1.0, per_site=False
    )
    rank: int | None = option(None, "rank of every weight, instead of a budget", low=1, high=1 << 20)
    share: float | None = option(None, "share of its full rank that every weight keeps, instead", low=0.0, high=1.0)
    energy: float | None = option(None, "share of the squared singular values that every weight keeps, instead", low=0.0, high=1.0)
    error: float | None = option(None, "relative error of the outputs of every layer, instead", low=0.0, high=1.0)
    evbmf: bool = option(False, "ranks by empirical variational Bayes, instead")
    form: str = option(
        "auto",
        "into which pieces weights are cut, where they have such a form: auto takes what loses least for its cost, factors so all but"
        " interpolative, which bear no codes",
        choices=_FORMS,
    )
    round: str = option(
        "auto",
        "ranks are multiples of this: a number, none, or auto for the block that this processor computes at a time, with params none",
        per_site=False,
    )
    repair: bool = option(True, "whether calibration data, if any, says what to keep, and layers make up for those before", per_site=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in (*_BUDGETS, *_RULES) if getattr(self, name) is not None] + ["evbmf"] * self.evbmf
        if len(given) > 1:
            raise OptionError(f"{self.name}: {' and '.join(given[:2])} both set the ranks; give one of them")
        check_round(self.name, self.round)

    @property
    def budget(self) -> tuple[str, float] | None:
        """What is to be left of what; None where every weight has a rule of its own."""
        if self.macs is not None:
            return "macs", self.macs
        own = self.evbmf or any(getattr(self, name) is not None for name in _RULES)
        return None if own else ("params", _DEFAULT_PARAMS if self.params is None else self.params)

    @property
    def rule(self) -> Rule | None:
        """How every weight gets its rank by itself, or None."""
        return None if self.budget is not None else Rule(self.rank, self.share, self.energy, self.error, self.evbmf)

    @property
    def block(self) -> int:
        """Ranks are multiples of it."""
        return block_of(self.round, for_time=self.macs is not None)

    @property
    def sites_are_independent(self) -> bool:
        """Whether layers do not share a budget."""
        return self.budget is None

    def with_options(self, options: Mapping[str, Any]) -> Self:
        """Returns the pass with some options changed for a site; what sets ranks takes the place of what did."""
        own: dict[str, Any] = {}
        if options.get("evbmf") or any(options.get(name) is not None for name in _RULES):
            own = {**dict.fromkeys((*_BUDGETS, *_RULES)), "evbmf": False}
        return replace(self, **{**own, **options})

    def wants(self, form: Form, context: Context) -> bool:
        """Whether weights may be cut so: the option says it only of those that can have such pieces at all."""
        if form.kind == "interpolative" and (self.form == "factors" or (context.rounded_later and self.form != "interpolative")):
            return False
        meant = _OF_KERNELS if form.geometry.is_kernel else () if form.kind == "recurrent-input" else _OF_PRODUCTS
        return self.form == form.kind or self.form not in meant

    def weaker(self) -> Self | None:
        """Returns the pass with 3/4 of the cut."""
        if self.budget is None:
            return None
        name, left = self.budget
        share = gentler(left)
        changed: dict[str, Any] = {name: share}
        return replace(self, **changed) if share is not None else None

    def apply(self, graph: Graph, context: Context) -> Report:
        """Edits the graph in place."""
        context = context if self.repair else replace(context, activations=None)
        work = dequantized_copy(graph)
        targets, rules, skips = self._targets(work, {weight.site: weight for weight in weights(graph)}, context)
        skips += _others(graph, [*(target.weight.site for target in targets), *(skip.site for skip in skips)])
        chosen = self._options(work, targets, rules, context)
        cut = {target.weight.site: one for target, one in zip(targets, chosen, strict=True) if one.form is not None}
        skips += [Skip(one.weight.site, _whole(one, rule)) for one, rule in zip(targets, rules, strict=True) if one.weight.site not in cut]
        changes, moved = cut_in_turn(graph, cut, context)
        skips = [skip for skip in skips if skip.site not in moved]  # biases and scales are parts of their layers, not left as they were
        left = sum(one.cost for one in chosen), sum(target.cost for target in targets)
        return Report(changes, skips, self._notes(*left, len(changes), context) if targets else [], self._missed(*left))

    def _targets(
        self, graph: Graph, originals: Mapping[str, Weight], context: Context
    ) -> tuple[list[Target], list[Rule | None], list[Skip]]:
        macs = _macs(graph, context) if self.macs is not None else {}
        targets, rules, skips = [], [], []
        for weight, found in forms(graph, weights(graph)):
            chosen = context.options(self, weight.names)
            if chosen is None:
                skips.append(Skip(weight.site, "left alone by a rule"))
            elif isinstance(found, str):
                skips.append(Skip(weight.site, found))
            elif reason := (obstacle(graph, weight) if is_dequantized(weight) else weight.obstacle):
                skips.append(Skip(weight.site, reason))
            elif not np.isfinite(weight.constant.values).all():
                skips.append(Skip(weight.site, "holds NaN or infinity"))
            elif self.budget is None and chosen.rule is None:
                skips.append(Skip(weight.site, "no rank is set for it"))
            elif self.macs is not None and is_dequantized(originals[weight.site]) and meets_integers(weight):
                skips.append(Skip(weight.site, "meets quantized activations: pieces would be computed in floating point, not in integers"))
            elif not (mine := [form for form in found if chosen.wants(form, context)]):
                skips.append(Skip(weight.site, f"cannot be cut in the form {chosen.form}"))
            else:
                work = sum(macs.get(id(use.node), 0.0) for use in weight.uses)
                cost = float(work if self.macs is not None else mine[0].whole)
                stored = originals[weight.site].constant.nbytes
                targets.append(Target(weight, tuple(mine), cost, self.macs is not None, self.block, stored))
                rules.append(chosen.rule)
        return targets, rules, skips

    def _options(self, graph: Graph, targets: Sequence[Target], rules: Sequence[Rule | None], context: Context) -> list[Option]:
        """Returns what becomes of each weight: by its own rule, or by what is best for all together."""
        found: dict[str, Option] = {}
        ruled = [(target, rule) for target, rule in zip(targets, rules, strict=True) if rule is not None]
        ranked = by_rules(graph, [target for target, _ in ruled], [rule for _, rule in ruled], context)
        found |= {target.weight.site: one for (target, _), one in zip(ruled, ranked, strict=True)}
        budget, others = self.budget, [target for target, rule in zip(targets, rules, strict=True) if rule is None]
        if budget is not None and others:
            fitting, probe = folds(graph, context, 1)[0]
            lists = option_lists(graph, others, fitting, probe)
            trials = context.trials if budget[0] == "macs" else None
            if trials is not None:
                lists = [that_pay(graph, options, trials) for options in lists]
            total, spent = sum(target.cost for target in targets), sum(one.cost for one in found.values())
            best = choose(lists, budget[1] * total, spent)
            best = filled(others, best, budget[1] * total - spent - sum(one.cost for one in best), lists if trials is not None else None)
            found |= {target.weight.site: one for target, one in zip(others, best, strict=True)}
        return [found[target.weight.site] for target in targets]

    def _notes(self, left: float, whole: float, cut: int, context: Context) -> list[str]:
        unit = "macs" if self.macs is not None else "params"
        notes = [f"{unit} x {left / max(whole, 1.0):.3f} of the layers that can be cut, as they came to this pass"]
        if self.form != "interpolative" and context.rounded_later:
            notes.append("no interpolative pieces, which a later pass that rounds weights would ruin; form=interpolative asks for them")
        if cut and context.activations is None:
            why = "no calibration inputs were left to say what layers meet" if self.repair else "repair is off"
            notes.append(f"weights change least, not outputs: {why}")
        return notes

    def _missed(self, left: float, whole: float) -> str:
        budget = self.budget
        if budget is None or left <= (budget[1] + CLOSE) * whole:
            return ""
        asked = "asked for" if getattr(self, budget[0]) is not None else "the default is"
        steps = f", ranks in steps of {self.block} (round)" if self.block > 1 else ""
        return f"{asked} {budget[0]} x {budget[1]:g}; x {left / whole:.3f} is what pieces that pay can have, with rules as they are{steps}"


def _macs(graph: Graph, context: Context) -> Mapping[int, float]:
    measured = context.trials.macs(graph) if context.trials is not None else None
    return inferred_macs(find_channels(graph)) if measured is None else measured


def _whole(target: Target, rule: Rule | None) -> str:
    """Returns why a weight stays as it is."""
    if target.by_work and not target.cost:
        return "does no work as far as is known, so none can be saved"
    paying = [form for form in target.forms if target.paying(form)]
    form = max(paying or target.forms, key=lambda form: target.break_even(form)[0] / form.full[0])
    known = f"(break-even rank {target.break_even(form)[0]} of {form.full[0]})"
    if not paying:
        return f"pieces would save nothing, ranks in steps of {target.block} {known}"
    if rule is not None:
        return f"stays whole: pieces as {rule.asked} asks for would save nothing {known}"
    slower = ", or pieces take longer" if target.by_work else ""
    return f"stays whole: others lose less for what they save{slower} {known}"


def _others(graph: Graph, named: Sequence[str]) -> list[Skip]:
    """Returns why scales and zero points, which the copy without DequantizeLinear does not have, stay as they are."""
    found = [weight for weight in weights(graph) if weight.site not in named]
    return [Skip(weight.site, weight.obstacle or "belongs to DequantizeLinear") for weight in found]
