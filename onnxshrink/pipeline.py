"""Runs passes one after the other; keeps each result only if it is valid and within the tolerance.

The last good graph is never edited: a pass gets a structural copy that shares the frozen arrays, so dropping the copy is the whole
rollback. After each pass the copy is sorted, checked, loaded and run in ONNX Runtime and compared with the ORIGINAL, not with its
predecessor. Past the tolerance the pass is retried in weaker forms, as long as it offers one; then without the sites that do most
harm for the bytes they save (`onnxshrink.backoff`); and is else dropped.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

from onnxshrink.backoff import SiteError, only, probe, without, worst_per_byte
from onnxshrink.contract import Activations, Context, Pass, Report, Skip, Step, Trials
from onnxshrink.errors import ShrinkError
from onnxshrink.graph.check import Level, check
from onnxshrink.graph.edit import sort_nodes
from onnxshrink.graph.files import materialised
from onnxshrink.graph.ir import Constant, Graph
from onnxshrink.report import Outcome, PassReport, format_option
from onnxshrink.validate import Comparison, Metric, Reference, Tolerance, compare

__all__ = ["Candidate", "Settings", "interface", "run_steps"]

_MOST_ATTEMPTS = 8
_MOST_BACKOFFS = 5
_SMALLER_BUDGET = 0.5  # each further attempt may have this share of the squared error of the one before


@dataclass(frozen=True)
class Settings:
    """What holds for every step.

    Attributes:
        reference: the original's outputs, on the samples that judge.
        probe: returns its outputs on a few other samples, by which sites are compared.
        tolerance: how far a result's may be from them.
        level: the strictest level of the ONNX checker that the original passes.
        metrics: the user's own measures.
        seed: of all randomness.
        activations: calibration data for passes, or None.
        executor: for parallel work within a pass, or None.
        progress: called with what is being done, the part done and the total.
        trials: runs of whole graphs, for passes that ask for them, or None.
        rounded_later: whether a step after this one rounds weights.
    """

    reference: Reference
    probe: Callable[[], Reference]
    tolerance: Tolerance
    level: Level
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    seed: int = 0
    activations: Activations | None = None
    executor: Executor | None = None
    progress: Callable[[str, int, int], None] = lambda what, done, total: None
    trials: Trials | None = None
    rounded_later: bool = False


@dataclass(frozen=True)
class Candidate:
    """A graph that has been checked: its bytes in a file, and how its outputs compare with the original's."""

    graph: Graph
    nbytes: int
    comparison: Comparison


@dataclass(frozen=True)
class _Attempt:
    """A pass that ran: the candidate it made, or None and why not; ``too_far`` if a weaker form may do."""

    report: Report
    candidate: Candidate | None
    failure: str = ""
    too_far: bool = False
    spared: bool = False


def run_steps(good: Candidate, steps: Sequence[Step], settings: Settings) -> tuple[Candidate, list[PassReport]]:
    """Returns the last good candidate and what became of each step.

    Args:
        good: the original, compared with itself.
        steps: in order.
        settings: for all of them.
    """
    reports = []
    for number, step in enumerate(steps, 1):
        prefix = f"{step.run.name} ({number} of {len(steps)})"
        start = time.perf_counter()
        mine = dataclasses.replace(settings, rounded_later=any(later.run.rounds_weights for later in steps[number:]))
        try:
            good, report = _run_step(good, step, mine, prefix)
        except Exception as error:  # of a third party's weaker() or spared(): what is good by now stands, and the run goes on
            reason = f"it raised {type(error).__name__}: {error}"
            report = _report(step.run, step.run, "dropped", [reason], good, _Attempt(Report(), None), start)
        reports.append(report)
    return good, reports


def interface(graph: Graph) -> list[tuple[str, Any, Any]]:
    """Returns name, dtype and shape of every required input and every output: what a pass must not change."""
    tensors = [tensor for tensor in graph.inputs if not isinstance(tensor, Constant)] + graph.outputs
    return [
        (tensor.name, tensor.info.type.SerializeToString(deterministic=True) if tensor.info else None, tensor.shape)
        for tensor in tensors
    ]


def _run_step(good: Candidate, step: Step, settings: Settings, prefix: str) -> tuple[Candidate, PassReport]:
    start = time.perf_counter()
    current: Pass | None = step.run
    failures: list[str] = []
    while current is not None and len(failures) < _MOST_ATTEMPTS:
        weakest = Step(current, step.rules)
        attempt = _attempt(good, weakest, settings, prefix)
        if attempt.candidate is good and failures:
            break  # so weak that nothing is left of it
        if attempt.candidate is not None:
            outcome: Outcome = "unchanged" if attempt.candidate is good else "weakened" if failures else "kept"
            return attempt.candidate, _report(step.run, current, outcome, failures, good, attempt, start)
        failures.append(attempt.failure)
        current = current.weaker() if attempt.too_far else None
    if attempt.too_far and len(attempt.report.changes) > 1 and weakest.run.sites_are_independent:
        spared = _spare_sites(good, weakest, attempt.report, settings, prefix)
        if spared is not None:
            report = _report(step.run, weakest.run, "weakened", failures, good, spared, start)
            return spared.candidate or good, report
    return good, _report(step.run, step.run, "dropped", failures, good, attempt, start)


def _spare_sites(good: Candidate, step: Step, report: Report, settings: Settings, prefix: str) -> _Attempt | None:
    """Returns an attempt within the limits that leaves some sites alone, or None if there is none worth keeping."""
    reference = settings.probe()
    quick = dataclasses.replace(settings, activations=None)  # to compare sites, what they do without repair will do
    total = len(report.changes)
    done = 0

    def drift_of(site: str) -> float | None:
        nonlocal done
        settings.progress(f"{prefix}: probing sites", done := done + 1, total)
        graph = _rewrite(good, only(step, site), quick)[0]
        if graph is None:
            return None
        try:
            comparison = compare(reference, graph)
        except ShrinkError:  # a site that does not even run by itself is the worst of all
            return None
        worst = comparison.worst("drift")
        return worst.drift if worst is not None and comparison.failure is None else None

    errors = probe(report.changes, drift_of)
    budget = _first_budget(errors, settings.tolerance.drift_limit)
    for _ in range(_MOST_BACKOFFS):
        spared = worst_per_byte(errors, budget)
        attempt = _attempt(good, without(step, spared), settings, prefix)
        if attempt.candidate is good:
            return None
        if attempt.candidate is not None:
            return dataclasses.replace(attempt, report=_with_reasons(attempt.report, spared, errors), spared=True)
        budget *= _SMALLER_BUDGET
    return None


def _first_budget(errors: Sequence[SiteError], limit: float | None) -> float:
    """Returns the sum of squared drifts to begin with: the limit's, and less than that of all sites, which is too much."""
    finite = [error.squared_drift for error in errors if math.isfinite(error.squared_drift)]
    fewer = math.fsum(finite) * (_SMALLER_BUDGET if len(finite) == len(errors) else 1.0)
    return fewer if limit is None else min(fewer, limit**2)


def _with_reasons(report: Report, spared: Sequence[str], errors: Sequence[SiteError]) -> Report:
    """Returns the report with the reason why each spared site was treated otherwise."""
    reasons = {error.site: _reason(error) for error in errors if error.site in spared}
    skips = [Skip(skip.site, reasons.get(skip.site, skip.reason)) for skip in report.skips]
    changes = [
        dataclasses.replace(change, detail=f"{change.detail}; {reasons[change.site]}") if change.site in reasons else change
        for change in report.changes
    ]
    names = ", ".join(spared[:5]) + (", ..." if len(spared) > 5 else "")
    note = f"{len(spared)} of {len(errors)} sites were spared to stay within the limits: {names}"
    return dataclasses.replace(report, changes=changes, skips=skips, notes=[*report.notes, note])


def _reason(error: SiteError) -> str:
    if math.isinf(error.squared_drift):
        return "spared: by itself it makes the model fail, or give NaN or infinity"
    return f"spared: by itself it moves the outputs by {100 * math.sqrt(error.squared_drift):.3g} %"


def _attempt(good: Candidate, step: Step, settings: Settings, prefix: str) -> _Attempt:
    def progress(done: int, total: int) -> None:
        settings.progress(f"{prefix}: rewriting", done, total)

    progress(0, 0)
    graph, report, failure = _rewrite(good, step, settings, progress)
    if graph is None:
        return _Attempt(report, None, failure)
    if not report.changes:
        return _Attempt(report, good)
    settings.progress(f"{prefix}: validating", 0, 0)
    return _validate(graph, report, settings)


def _rewrite(
    good: Candidate, step: Step, settings: Settings, progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[Graph | None, Report, str]:
    """Applies a pass to a copy; returns the sorted graph, or None and what is wrong."""
    graph = good.graph.copy()
    context = Context(
        settings.seed, step.rules, settings.activations, settings.executor, progress, settings.trials, settings.rounded_later
    )
    try:
        report = step.run.apply(graph, context)
        unmet = [f"rule '{match}' matched no site" for match in context.unmet_rules]
        report = dataclasses.replace(report, notes=[*report.notes, *unmet])
        if interface(graph) != interface(good.graph):
            return None, report, "it changed names, types or shapes of graph inputs or outputs"
        sort_nodes(graph)
    except Exception as error:  # third-party code: whatever it raises, the model before it stands and the run goes on
        return None, Report(), f"it raised {type(error).__name__}: {error}"
    return graph, report, ""


def _validate(graph: Graph, report: Report, settings: Settings) -> _Attempt:
    try:
        with materialised(graph) as (model, nbytes):
            complaint = check(model, settings.level)
            if complaint is not None:
                return _Attempt(report, None, f"its result is not valid ONNX: {complaint}")
            comparison = compare(settings.reference, model, metrics=settings.metrics)
    except ShrinkError as error:
        return _Attempt(report, None, str(error))
    except Exception as error:  # third-party code may leave behind what protobuf does not take
        return _Attempt(report, None, f"its result cannot be written: {type(error).__name__}: {error}")
    violation = settings.tolerance.violation(comparison)
    if violation is not None:
        return _Attempt(report, None, violation, too_far=True)
    return _Attempt(report, Candidate(graph, nbytes, comparison))


def _report(
    asked: Pass, ran: Pass, outcome: Outcome, failures: list[str], before: Candidate, attempt: _Attempt, start: float
) -> PassReport:
    after = attempt.candidate or before
    reason = ""
    if outcome == "dropped":
        reason = failures[-1] if len(failures) == 1 else f"{failures[-1]} (after {len(failures)} attempts)"
    elif outcome == "weakened":
        names = [field.name for field in dataclasses.fields(ran) if getattr(ran, field.name) != getattr(asked, field.name)]
        changed = ", ".join(f"{name.replace('_', '-')} = {format_option(getattr(ran, name))}" for name in names)
        means = filter(None, [changed, "some sites spared" if attempt.spared else ""])
        reason = f"with {' and '.join(means)} it stays within the limits; as asked: {failures[0]}"
    return PassReport(
        name=asked.name,
        options=dataclasses.asdict(ran),
        outcome=outcome,
        reason=reason,
        bytes_before=before.nbytes,
        bytes_after=after.nbytes,
        seconds=time.perf_counter() - start,
        chosen=tuple(
            field.name
            for field in dataclasses.fields(ran)
            if getattr(ran, field.name) != field.default or getattr(ran, field.name) != getattr(asked, field.name)
        ),
        changes=() if outcome == "dropped" else tuple(attempt.report.changes),
        skips=tuple(attempt.report.skips),
        notes=tuple(attempt.report.notes),
        outputs=after.comparison.outputs,
        missed=attempt.report.missed,
    )
