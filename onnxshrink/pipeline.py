"""Runs passes one after the other; keeps each result only if it is valid and within the tolerance.

The last good graph is never edited: a pass gets a structural copy that shares the frozen arrays, so dropping the copy is the whole
rollback. After each pass the copy is sorted, checked, loaded and run in ONNX Runtime and compared with the ORIGINAL, not with its
predecessor. Past the tolerance the pass is retried in weaker forms, as long as it offers one, and else dropped.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

from onnxshrink.contract import Activations, Context, Pass, Report, Step
from onnxshrink.errors import ShrinkError
from onnxshrink.graph.check import Level, check
from onnxshrink.graph.edit import sort_nodes
from onnxshrink.graph.files import materialised
from onnxshrink.graph.ir import Constant, Graph
from onnxshrink.report import Outcome, PassReport
from onnxshrink.validate import Comparison, Metric, Reference, Tolerance, compare

__all__ = ["Candidate", "Settings", "interface", "run_steps"]

_MOST_ATTEMPTS = 8


@dataclass(frozen=True)
class Settings:
    """What holds for every step.

    Attributes:
        reference: the original's outputs.
        tolerance: how far a result's may be from them.
        level: the strictest level of the ONNX checker that the original passes.
        metrics: the user's own measures.
        seed: of all randomness.
        activations: calibration data for passes, or None.
        executor: for parallel work within a pass, or None.
        progress: called with what is being done, the part done and the total.
    """

    reference: Reference
    tolerance: Tolerance
    level: Level
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    seed: int = 0
    activations: Activations | None = None
    executor: Executor | None = None
    progress: Callable[[str, int, int], None] = lambda what, done, total: None


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
        good, report = _run_step(good, step, settings, prefix)
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
        attempt = _attempt(good, Step(current, step.rules), settings, prefix)
        if attempt.candidate is not None:
            outcome: Outcome = "unchanged" if attempt.candidate is good else "weakened" if failures else "kept"
            return attempt.candidate, _report(step.run, current, outcome, failures, good, attempt, start)
        failures.append(attempt.failure)
        current = current.weaker() if attempt.too_far else None
    return good, _report(step.run, step.run, "dropped", failures, good, attempt, start)


def _attempt(good: Candidate, step: Step, settings: Settings, prefix: str) -> _Attempt:
    graph = good.graph.copy()

    def progress(done: int, total: int) -> None:
        settings.progress(f"{prefix}: rewriting", done, total)

    context = Context(settings.seed, step.rules, settings.activations, settings.executor, progress)
    try:
        report = step.run.apply(graph, context)
        unmet = [f"rule '{match}' matched no site" for match in context.unmet_rules]
        report = dataclasses.replace(report, notes=[*report.notes, *unmet])
        if not report.changes:
            return _Attempt(report, good)
        if interface(graph) != interface(good.graph):
            return _Attempt(report, None, "it changed names, types or shapes of graph inputs or outputs")
        sort_nodes(graph)
    except Exception as error:  # third-party code: whatever it raises, the model before it stands and the run goes on
        return _Attempt(Report(), None, f"it raised {type(error).__name__}: {error}")
    settings.progress(f"{prefix}: validating", 0, 0)
    return _validate(graph, report, settings)


def _validate(graph: Graph, report: Report, settings: Settings) -> _Attempt:
    with materialised(graph) as (model, nbytes):
        complaint = check(model, settings.level)
        if complaint is not None:
            return _Attempt(report, None, f"its result is not valid ONNX: {complaint}")
        try:
            comparison = compare(settings.reference, model, metrics=settings.metrics)
        except ShrinkError as error:
            return _Attempt(report, None, str(error))
    if comparison.failure is not None:
        return _Attempt(report, None, comparison.failure, too_far=True)
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
        changed = {f.name: getattr(ran, f.name) for f in dataclasses.fields(ran) if getattr(ran, f.name) != getattr(asked, f.name)}
        settings = ", ".join(f"{name} = {value}" for name, value in changed.items())
        reason = f"{settings} stays within the limits; as asked: {failures[0]}"
    return PassReport(
        name=asked.name,
        options=dataclasses.asdict(ran),
        outcome=outcome,
        reason=reason,
        bytes_before=before.nbytes,
        bytes_after=after.nbytes,
        seconds=time.perf_counter() - start,
        changes=() if outcome == "dropped" else tuple(attempt.report.changes),
        skips=tuple(attempt.report.skips),
        notes=tuple(attempt.report.notes),
        outputs=after.comparison.outputs,
    )
