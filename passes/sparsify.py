"""Sets the least important weights to zero, and makes up for them from calibration data.

With W seen as a matrix [rows = output channels, columns = what is summed over], X what it is multiplied with and a mask M,

    W' = argmin ‖(W - W') Xᵀ‖²    subject to    W' = M ∘ W'

which least squares solve row by row once M is chosen (optimal brain surgeon, Hassibi & Stork 1993); M is searched for by alternating
directions (ALPS, arXiv 2406.07831), or follows from a criterion. The error is never larger than that of zeroing the smallest weights.
Without calibration data these go and the rest stays, ‖W - W'‖² being the sum of the squares that were removed; where layers follow
normalizations their biases keep the mean output (`onnxshrink.graph.expectations`).

    unstructured    single weights
    N:M             N non-zeros in each M consecutive input channels (2:4 is what NVIDIA's sparse tensor cores take)
    RxC             blocks of R rows and C columns
    rows, columns   whole ones

How many weights each layer loses is up to the scope: `onnxshrink.sparsity`. Zeros make the file smaller once weights are coded
(`share-weights`, `huffman`), or packed, which `pack-sparse` does at the end where nothing else did.
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
from onnxshrink.graph.ir import Constant, Graph
from onnxshrink.graph.weights import Weight, weights
from onnxshrink.numerics.densities import cubic_schedule
from onnxshrink.numerics.patterns import Pattern
from onnxshrink.options import option
from onnxshrink.repair import Repaired
from onnxshrink.sparsity import removed_shares, sparsify_alone, sparsify_in_turn
from onnxshrink.targets import Target

__all__ = ["Sparsify"]

Array = np.ndarray[Any, np.dtype[Any]]
_DEFAULT_SPARSITY = 0.5
_DEFAULT_STEPS = 4
_LEAST_SPARSITY = 0.05  # below it, a weaker retry saves nothing worth having
_LEAST_THRESHOLD = 1e-6  # far below the weights of any layer that has not been scaled on purpose
_WEAKER = 0.75


@dataclass(frozen=True, kw_only=True)
class Sparsify(Pass):
    """Zeroes the least important weights and makes up for them: unstructured, N:M along the input channels, in blocks, rows or columns."""

    name: ClassVar[str] = "sparsify"
    rounds_weights: ClassVar[bool] = True
    sparsity: float | None = option(None, "share of weights set to zero; N:M patterns imply it, others use 0.5", low=0.0, high=1.0)
    threshold: float | None = option(None, "zero every |w| up to this instead of a share", low=0.0)
    pattern: str = option("unstructured", "unstructured, N:M (N kept of M), ROWSxCOLUMNS blocks, rows or columns, e.g. 2:4, 1x4")
    scope: str = option(
        "auto",
        "how many zeros each layer gets: the same share; by one line of all weights; by shape; by what zeros do to the outputs. "
        "auto is sensitivity with calibration data and global without; layer for N:M",
        choices=("auto", "layer", "global", "erk", "sensitivity"),
        per_site=False,
    )
    criterion: str = option(
        "auto",
        "what goes first; auto searches for the zeros that can be made up for best; wanda and obs go by calibration data",
        choices=("auto", "magnitude", "wanda", "obs", "lamp", "random"),
    )
    norm: str = option("auto", "puts the scores of a block, row or column together", choices=("auto", "l1", "l2"))
    least: float = option(0.0, "least share of zeros in a layer, where layers compete", low=0.0, high=1.0)
    most: float = option(1.0, "greatest share of zeros in a layer, where layers compete", low=0.0, high=1.0)
    schedule: str = option(
        "one-shot",
        "in one step; in equal steps; or in ever smaller ones (the cubic schedule), with activations measured anew after each",
        choices=("one-shot", "iterative", "gradual"),
        per_site=False,
    )
    steps: int = option(_DEFAULT_STEPS, "steps of a schedule", low=2, high=100, per_site=False)
    initial_sparsity: float = option(0.0, "sparsity that a schedule starts from", low=0.0, high=1.0, per_site=False)
    repair: bool = option(
        True, "whether zeros are made up for, as far as calibration data or, without any, normalizations tell how", per_site=False
    )
    pack: bool = option(True, "end with pack-sparse, which stores what is left in fewer bytes", per_site=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        pattern = Pattern.parse(self.pattern)
        if pattern.kind == "n:m" and self.sparsity not in (None, self.share):
            raise OptionError(must(self.name, "sparsity", f"{self.share:g} or left out for {pattern}", self.sparsity))
        if pattern.kind == "n:m" and self.scope not in ("auto", "layer"):
            raise OptionError(must(self.name, "scope", f"layer for {pattern}, which fixes every group", repr(self.scope)))
        if pattern.kind == "n:m" and self.schedule != "one-shot":
            raise OptionError(must(self.name, "schedule", f"one-shot for {pattern}, which fixes every group", repr(self.schedule)))
        if self.threshold is not None and (self.sparsity is not None or pattern.kind != "unstructured"):
            raise OptionError(f"{self.name}: a threshold sets the share of zeros by itself; leave sparsity and pattern out")
        if self.norm != "auto" and self.criterion == "auto":
            raise OptionError(f"{self.name}: the search for zeros scores no blocks; norm wants a criterion")
        if self.least > self.most:
            raise OptionError(must(self.name, "least", f"at most most, {self.most:g}", self.least))
        if self.schedule == "one-shot" and (self.steps != _DEFAULT_STEPS or self.initial_sparsity):
            raise OptionError(f"{self.name}: steps and initial-sparsity say how a schedule goes; one-shot has none")
        if self.initial_sparsity > self.share:
            raise OptionError(must(self.name, "initial-sparsity", f"at most the sparsity, {self.share:g}", self.initial_sparsity))

    @property
    def share(self) -> float:
        """The share of weights that becomes zero."""
        fixed = Pattern.parse(self.pattern).share
        if fixed is not None:
            return fixed
        return _DEFAULT_SPARSITY if self.sparsity is None else self.sparsity

    @property
    def finish_with(self) -> Sequence[str]:
        """The pass that makes the file smaller where the weights do not become codes."""
        return ("pack-sparse",) if self.pack else ()

    @property
    def sites_are_independent(self) -> bool:
        """Whether layers do not compete with each other."""
        return self.scope == "layer" or self.threshold is not None or Pattern.parse(self.pattern).kind == "n:m"

    def with_options(self, options: Mapping[str, Any]) -> Self:
        """Returns the pass with some options changed for a site.

        What a rule says of the share of zeros (a sparsity, a threshold, or an N:M pattern, which has its own) takes the place of what the
        pass says of it. Scope and schedule are the pass's and mean nothing for a single site.
        """
        if not options:
            return self
        own: dict[str, Any] = {"scope": "auto", "schedule": "one-shot", "steps": _DEFAULT_STEPS, "initial_sparsity": 0.0}
        if options.get("threshold") is not None:
            own |= {"sparsity": None, "pattern": "unstructured"}
        elif options.get("sparsity") is not None or "pattern" in options:
            own |= {"threshold": None}
        if Pattern.parse(options.get("pattern", "unstructured")).kind == "n:m":
            own |= {"sparsity": None}
        return replace(self, **{**own, **options})

    def weaker(self) -> Self | None:
        """Returns the pass with 3/4 of the sparsity or of the threshold; N:M patterns have no gentler form."""
        if self.threshold is not None:
            lower = self.threshold * _WEAKER
            return replace(self, threshold=lower) if lower >= _LEAST_THRESHOLD else None
        share = self.share * _WEAKER
        if Pattern.parse(self.pattern).kind == "n:m" or share < _LEAST_SPARSITY:
            return None
        return replace(self, sparsity=share, initial_sparsity=min(self.initial_sparsity, share), least=min(self.least, share))

    def apply(self, graph: Graph, context: Context) -> Report:
        """Edits the graph in place."""
        skips = [Skip(coded.site, _as_stored(coded.is_sparse)) for coded in coded_weights(graph)]
        sites: list[tuple[Weight, Sparsify]] = []
        found = weights(graph)
        for weight in found:
            chosen = context.options(self, weight.names)
            reason = "left alone by a rule" if chosen is None else _obstacle(weight, Pattern.parse(chosen.pattern))
            if chosen is None or reason is not None:
                skips.append(Skip(weight.site, reason or ""))
            else:
                sites.append((weight, chosen))
        values, repaired = self._sparse(graph, sites, context)
        biases = repaired.biases  # parts of their layers: what rules say of the weight holds for both
        changes: list[Change] = []
        for weight, chosen in sites:
            made_up_for = ", made up for" if weight.site in repaired.sites else ""
            answer = _settle(weight, values[weight.site], biases.get(weight.site), f"{chosen.pattern}{made_up_for}")
            if isinstance(answer, Change):
                changes.append(answer)
            else:
                skips.append(answer)
        moved = {id(biases[change.site][0]) for change in changes if change.site in biases}
        parts = {weight.site for weight in found if id(weight.constant) in moved}  # not left as they were, so no skips
        left = [skip for skip in skips if skip.site not in parts]
        notes = [*self._unheeded(sites, context), *_notes(sites, {change.site for change in changes})]
        return Report(changes, left, notes)

    def _sparse(
        self, graph: Graph, sites: Sequence[tuple[Weight, Sparsify]], context: Context
    ) -> tuple[dict[str, Array], Repaired]:
        """Returns the new values of weights by site, and what was done beside."""
        targets = [chosen.target(weight) for weight, chosen in sites]
        final = self._shares(graph, targets, [chosen for _, chosen in sites], context)
        if not self.repair:
            return sparsify_alone(graph, targets, final, context), Repaired()
        parts = [done / self.share if self.share else 1.0 for done in self._totals(context)]
        return sparsify_in_turn(graph, targets, [[part * share for share in final] for part in parts], context)

    def _totals(self, context: Context) -> Sequence[float]:
        """Returns the sparsity of the whole after each step; without calibration data nothing is measured, and one step does."""
        if self.schedule == "one-shot" or context.activations is None:
            return [self.share]
        if self.schedule == "gradual":
            return list(cubic_schedule(self.initial_sparsity, self.share, self.steps))
        return list(np.linspace(self.initial_sparsity, self.share, self.steps + 1)[1:])

    def _shares(
        self, graph: Graph, targets: Sequence[Target], options: Sequence[Sparsify], context: Context
    ) -> list[float]:
        """Returns the share of zeros of each weight; those that rules give another one, or a threshold, do not compete."""
        shares = {target.weight.site: chosen.share for target, chosen in zip(targets, options, strict=True)}
        scope = self.scope
        if scope == "auto":
            scope = "sensitivity" if self.repair and context.activations is not None else "global"
        if self.sites_are_independent or scope == "layer":
            return list(shares.values())
        competing = [
            target for target, chosen in zip(targets, options, strict=True) if self._competes(chosen, with_criterion=scope == "global")
        ]
        try:
            found = removed_shares(graph, competing, scope, self.share, context, self.repair)  # type: ignore[arg-type]  # one of its scopes
        except OptionError as error:
            raise OptionError(f"{self.name}: {str(error).removeprefix('densities: ')}; least and most bound every layer") from None
        shares |= {target.weight.site: share for target, share in zip(competing, found, strict=True)}
        return list(shares.values())

    def _unheeded(self, sites: Sequence[tuple[Weight, Sparsify]], context: Context) -> list[str]:
        """Returns what was asked for and could not be done, for want of calibration data or of repair."""
        notes, calibrated = [], context.activations is not None
        asking = sorted({chosen.criterion for weight, chosen in sites if chosen.target(weight).asks_for_inputs})
        if asking and not calibrated:
            notes.append(f"criterion {' and '.join(asking)} goes by calibration data, and there is none: the smallest weights went")
        if self.scope == "sensitivity" and not self.sites_are_independent and not calibrated:
            notes.append("scope sensitivity measures outputs on calibration data, and there is none: squares of weights stood for them")
        if self.schedule != "one-shot" and not (calibrated and self.repair):
            missing = "repair" if calibrated else "calibration data"
            notes.append(f"schedule {self.schedule} was taken in one step: without {missing} nothing is measured in between")
        return notes

    def _competes(self, chosen: Sparsify, *, with_criterion: bool) -> bool:
        """Whether a site of these options gets its share of zeros together with others."""
        same = (chosen.sparsity, chosen.threshold, chosen.pattern) == (self.sparsity, self.threshold, self.pattern)
        return same and (chosen.criterion == self.criterion or not with_criterion)

    def target(self, weight: Weight) -> Target:
        """Returns what these options make of a weight."""
        criterion: Any = None if self.criterion == "auto" else self.criterion
        norm: Any = None if self.norm == "auto" else self.norm
        return Target(weight, Pattern.parse(self.pattern), criterion, self.threshold, self.least, self.most, norm)


def _as_stored(is_sparse: bool) -> str:
    if is_sparse:
        return "is stored as values and where they are; expand the model to sparsify it further"
    return "is stored as codes; sparsify before sharing"


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


def _settle(weight: Weight, values: Array, bias: tuple[Constant, Array] | None, done: str) -> Change | Skip:
    """Gives a weight its new values, and its bias, if there are new zeros among them."""
    constant, scope = weight.constant, weight.scope.graph
    before, after = (1 - np.count_nonzero(array) / array.size for array in (constant.values, values))
    if after == before:
        return Skip(weight.site, f"{after:.1%} zeros already, in this pattern")
    edits = [(constant, values), *([bias] if bias is not None else [])]
    nbytes = [constant_bytes(tensor, scope) for tensor, _ in edits]
    for tensor, new in edits:
        set_values(tensor, new)
    detail = f"{after:.1%} zeros (was {before:.1%}), {done}{f', mean kept by {bias[0].name}' if bias is not None else ''}"
    return Change(weight.site, sum(nbytes), sum(constant_bytes(tensor, scope) for tensor, _ in edits), detail)


def _notes(sites: Sequence[tuple[Weight, Sparsify]], changed: set[str]) -> list[str]:
    """Returns how many zeros there are, and who takes them."""
    if not changed:
        return []
    total = sum(weight.constant.size for weight, _ in sites)
    zeros = sum(weight.constant.size - np.count_nonzero(weight.constant.values) for weight, _ in sites)
    notes = [f"{zeros / total:.1%} of {total} weights are zero"]
    hardware = [chosen.target(weight).fits_hardware for weight, chosen in sites if chosen.pattern == "2:4"]
    if hardware:
        notes.append(
            f"2:4 along the input channels, as TensorRT and cuSPARSELt take it, in {sum(hardware)} of {len(hardware)} weights"
            + ("; the others have a number of input channels that is no multiple of 4" if not all(hardware) else "")
        )
    return notes
