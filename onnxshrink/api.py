"""The front door: compress, verify, expand, load, inspect and bench, as library calls.

    from onnxshrink import compress, Tolerance
    from onnxshrink.passes.share_weights import ShareWeights

    result = compress("model.onnx", [ShareWeights(bits=6)], calibration="inputs.npz", tolerance=Tolerance(min_sqnr_db=30))
    result.save("small.onnx")
    print(result.report.ratio, result.report.outputs)
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx

from onnxshrink import __version__
from onnxshrink.calibrate import Calibration
from onnxshrink.contract import Context, Pass, Step
from onnxshrink.degradation import Degradation, degradation
from onnxshrink.errors import OptionError, must
from onnxshrink.evidence import Evidence, gather, parted, samples_for
from onnxshrink.graph.check import strictest_level
from onnxshrink.graph.coded import expand_coded
from onnxshrink.graph.edit import sort_nodes
from onnxshrink.graph.exporter import to_model
from onnxshrink.graph.files import ModelSource, materialised, model_bytes, save, source_paths
from onnxshrink.graph.files import load as read_model
from onnxshrink.graph.ir import Graph
from onnxshrink.inputs import InputSource
from onnxshrink.inspection import Inspection, inspect_graph
from onnxshrink.latency import LatencyReport
from onnxshrink.latency import bench as measure_latency
from onnxshrink.pipeline import Candidate, Settings, run_steps
from onnxshrink.rank_inspection import RankInfo, rank_infos
from onnxshrink.recipe import Recipe, default_recipe, finished
from onnxshrink.report import CompressionReport, PassReport
from onnxshrink.runtime import plain_session, session
from onnxshrink.threads import one_blas_thread
from onnxshrink.trials import SampleTrials
from onnxshrink.validate import Comparison, Metric, Reference, Tolerance, compare
from onnxshrink.variation import Variation

__all__ = ["Compressed", "Expanded", "Verification", "bench", "compress", "expand", "inspect", "load", "verify"]

Progress = Callable[[str, int, int], None]
_FEW_SAMPLES = 32  # below it, one unlucky input more or less changes the SQNR by decibels
_PACKAGES = ("onnx", "onnxruntime", "onnx-graphsurgeon", "numpy")


@dataclass(frozen=True)
class Compressed:
    """A compressed model, what was done to it, and the files it was read from, which `save` does not replace."""

    graph: Graph
    report: CompressionReport
    sources: frozenset[Path] = frozenset()

    def save(self, path: str | os.PathLike[str]) -> int:
        """Writes the model, atomically, and returns its bytes, external data included.

        Raises:
            OutputError: the place cannot be written, or it is the input.
        """
        return save(self.graph, path, keep=self.sources)

    def to_model(self) -> onnx.ModelProto:
        """Returns the model as a message; only for models under 2 GiB."""
        return to_model(self.graph)


@dataclass(frozen=True)
class Verification:
    """How a candidate compares with its original, and which limit it breaks, if any.

    Attributes:
        comparison: metrics per output.
        violation: one line, or None when every limit holds.
        inputs: where the samples came from.
        synthetic: whether they were made up.
        bytes_before: of the original.
        bytes_after: of the candidate.
    """

    comparison: Comparison
    violation: str | None
    inputs: str
    synthetic: bool
    bytes_before: int
    bytes_after: int

    def to_dict(self) -> dict[str, Any]:
        """Returns plain dicts, lists, strings and finite numbers; what was compared stands at the top level."""
        plain = asdict(self)
        return {**plain.pop("comparison"), **plain}


@dataclass(frozen=True)
class Expanded:
    """A model with dense weights, the sites that were stored as codes or packed zeros, and the files that `save` does not replace."""

    graph: Graph
    sites: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    sources: frozenset[Path] = frozenset()

    def save(self, path: str | os.PathLike[str]) -> int:
        """Writes the model, atomically, and returns its bytes.

        Raises:
            OutputError: the place cannot be written, or it is the input.
        """
        return save(self.graph, path, keep=self.sources)

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures without the graph."""
        return {"sites": list(self.sites), "bytes_before": self.bytes_before, "bytes_after": self.bytes_after}


def compress(
    model: ModelSource,
    passes: Recipe | Sequence[Pass | Step] | Pass | Step | None = None,
    *,
    calibration: InputSource | None = None,
    validation: InputSource | None = None,
    tolerance: Tolerance | None = None,
    metrics: Mapping[str, Metric] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Compressed:
    """Compresses a model; the input is never changed.

    Args:
        model: a path, the bytes of a file, or a ModelProto.
        passes: a pass, or passes or steps in order, or a recipe; by default `onnxshrink.recipe.default_recipe`. Some passes want
            another to run last (`sparsify` wants `pack-sparse`, so that zeros make the file smaller); it is added unless it is there.
        calibration: inputs as `onnxshrink.inputs.read_inputs` takes them. A quarter is held out to judge the result. Without
            any, seeded synthetic inputs are made, and the report says that they prove less.
        validation: other inputs, to judge the result by instead; passes then see all of ``calibration``.
        tolerance: limits that hold after every pass; those of the recipe by default, and none for a list of passes.
        metrics: your own measures by name, f(outputs of the original, outputs of the result) -> float; reported, not limited.
            Each argument is a sequence of one dict per sample, from output names to arrays.
        seed: of all randomness: same input, seed and version give the same bytes.
        progress: called with what is being done, the part done and the total (0 when unknown).

    Raises:
        ModelError: the model cannot be read, or ONNX Runtime cannot run it.
        InputsError: calibration or validation inputs do not fit the model, or are the same.
        OptionError: an option or a limit is out of range, or a limit has no meaning for this model.
    """
    if seed < 0:
        raise OptionError(must("compress", "seed", "at least 0", seed))
    asked = _as_recipe(passes)
    report_progress = progress or _silent
    graph = read_model(model)
    sources = _sources(model, graph)
    report_progress("running the original", 0, 0)
    evidence = gather(graph, calibration, seed, validation)
    recipe = asked or default_recipe(tolerance, evidence.given is not None)
    variation = Variation(graph, seed)
    limits = tolerance if asked is not None and tolerance is not None else recipe.tolerance
    with materialised(graph) as (original, nbytes), ThreadPoolExecutor(_workers()) as executor, one_blas_thread():
        level, complaint = strictest_level(original)
        start = Candidate(graph, nbytes, compare(evidence.reference, original, metrics=metrics))
        limits.violation(start.comparison)  # raises, before any long work, where a limit has no meaning for this model
        settings = Settings(
            reference=evidence.reference,
            probe=functools.cache(lambda: Reference(graph, evidence.probing)),
            metrics=metrics or {},
            tolerance=limits,
            level=level,
            seed=seed,
            activations=Calibration(evidence.given, varied=variation) if evidence.given is not None else None,
            executor=executor,
            progress=report_progress,
            trials=SampleTrials(evidence.probing),
        )
        result, steps = run_steps(start, finished(recipe.steps), settings)
    notes = _notes(evidence, limits, complaint, start.comparison) + ([variation.note] if variation.note else [])
    report = _report(_name(model, graph), start, result, steps, evidence, limits, seed, notes)
    return Compressed(result.graph, report, sources)


def verify(
    original: ModelSource,
    candidate: ModelSource,
    *,
    inputs: InputSource | None = None,
    tolerance: Tolerance | None = None,
    metrics: Mapping[str, Metric] | None = None,
    seed: int = 0,
) -> Verification:
    """Compares a candidate with its original, on given inputs or on synthetic ones; arguments as for `compress`.

    A candidate that does not run, or has other outputs, is a violation and not an error.

    Raises:
        ModelError: one of them cannot be read, or the original cannot be run.
        ValidationError: one of your metrics fails.
        InputsError: the inputs do not fit the original.
        OptionError: a limit has no meaning for this model.
    """
    limits = tolerance or Tolerance()
    first, second = read_model(original), read_model(candidate)
    with session(first, role="original") as running:
        samples, synthetic = samples_for(first, running, inputs, seed)
        reference = Reference(first, samples, running=running)
    comparison = compare(reference, second, metrics=metrics)
    violation = limits.violation(comparison)
    return Verification(comparison, violation, samples.source, synthetic, _nbytes(first), _nbytes(second))


def expand(model: ModelSource) -> Expanded:
    """Returns the model with every weight that is stored as codes or packed zeros as a plain dense tensor again.

    Raises:
        ModelError: the model cannot be read.
    """
    graph = read_model(model)
    sources, before = _sources(model, graph), _nbytes(graph)
    sites = tuple(coded.site for coded in expand_coded(graph))
    sort_nodes(graph)
    return Expanded(graph, sites, before, _nbytes(graph), sources)


def load(model: ModelSource, **options: Any) -> Any:
    """Returns an onnxruntime.InferenceSession of a model, its coded weights decoded by numpy before the session starts.

    ONNX Runtime decodes them itself when it is given the file. Here numpy does, one weight after the other, so that only the dense
    model is given to ONNX Runtime: for builds and versions that do not fold at session start.

    Args:
        model: a path, the bytes of a file, or a ModelProto.
        options: of InferenceSession, e.g. ``sess_options``, ``providers``; the CPU provider by default.

    Raises:
        ModelError: the model cannot be read, or its coded weights are damaged.
        UnsupportedModelError: ONNX Runtime cannot load it.
    """
    graph = read_model(model)
    expand_coded(graph, tables=False)  # what stays coded at run time saves memory there
    sort_nodes(graph)
    return plain_session(graph, **options)


def inspect(
    model: ModelSource,
    *,
    sensitivity: bool = False,
    ranks: bool = False,
    calibration: InputSource | None = None,
    repair: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Inspection:
    """Returns what is in a model, weight by weight, and what each pass would do with it.

    Args:
        model: a path, the bytes of a file, or a ModelProto.
        sensitivity: also zeroes weights by magnitude, layer by layer and in all layers at once, at several sparsities, and measures
            what becomes of the outputs: see `onnxshrink.degradation`.
        ranks: also says how many dimensions each weight needs: see `onnxshrink.rank_inspection`.
        calibration: inputs to measure either on, as for `compress`; without any, seeded synthetic ones show what zeros do.
        repair: measures the whole model a second time, every zero made up for. A quarter of the inputs then judges, the rest repairs.
        seed: of synthetic inputs.
        progress: called with what is being done, the part done and the total (0 when unknown).

    Raises:
        ModelError: the model cannot be read, or, to be measured, cannot be run.
        InputsError: the inputs do not fit the model.
        OptionError: inputs are given without sensitivity or ranks, repair without sensitivity, or repair without two inputs.
        ValidationError: the model with zeros does not run, or an activation is not finite.
    """
    if not sensitivity and (repair or (calibration is not None and not ranks)):
        raise OptionError(must("inspect", "calibration and repair", "left out without sensitivity", "one of them"))
    graph = read_model(model)
    report_progress = progress or _silent
    found = inspect_graph(graph, _name(model, graph), report_progress)
    if ranks:
        found = replace(found, ranks=_ranks(graph, calibration, seed, report_progress))
    if not sensitivity:
        return found
    return replace(found, sensitivity=_degradation(graph, calibration, repair, seed, report_progress))


def bench(
    a: ModelSource, b: ModelSource, *, inputs: InputSource | None = None, threads: int = 1, seconds: float = 5.0, seed: int = 0
) -> LatencyReport:
    """Measures two models on the same inputs, in interleaved runs.

    Raises:
        ModelError: one of them cannot be read, or the first cannot be run.
        ValidationError: the second cannot be run on the first one's inputs.
        InputsError: the inputs do not fit the first.
    """
    first, second = read_model(a), read_model(b)
    with session(first, role="original") as running:
        samples, _ = samples_for(first, running, inputs, seed)
    return measure_latency(first, second, samples, seconds=seconds, threads=threads)


def _degradation(
    graph: Graph, calibration: InputSource | None, repair: bool, seed: int, progress: Progress
) -> Degradation:
    with session(graph, role="original") as running:
        samples, synthetic = samples_for(graph, running, calibration, seed)
    given, judged = parted(samples) if repair else (None, samples)
    if repair and (synthetic or given is None):
        got = "none" if synthetic else "one"
        raise OptionError(must("inspect", "inputs for repair", "two or more", got, "some repair, the others judge"))
    with ThreadPoolExecutor(_workers()) as executor, one_blas_thread():
        activations = Calibration(given, varied=Variation(graph, seed)) if given is not None else None
        found = degradation(graph, judged, Context(seed, activations=activations, executor=executor), progress)
    if not synthetic:
        return found
    note = "inputs are synthetic: they show little of what zeros do to real ones; pass real ones as calibration"
    return replace(found, notes=[note, *found.notes])


def _ranks(graph: Graph, calibration: InputSource | None, seed: int, progress: Progress) -> list[RankInfo]:
    activations = None
    if calibration is not None:
        with session(graph, role="original") as running:
            activations = Calibration(samples_for(graph, running, calibration, seed)[0])
    context = Context(seed, activations=activations, progress=lambda done, total: progress("looking at ranks", done, total))
    return rank_infos(graph, context)


def _as_recipe(passes: Recipe | Sequence[Pass | Step] | Pass | Step | None) -> Recipe | None:
    if passes is None or isinstance(passes, Recipe):
        return passes
    if isinstance(passes, Pass | Step):
        passes = [passes]
    if not all(isinstance(item, Pass | Step) for item in passes):
        raise OptionError(must("compress", "passes", "a list of passes such as [Tidy(), ShareWeights(bits=6)]", repr(passes)))
    return Recipe(tuple(item if isinstance(item, Step) else Step(item) for item in passes))


def _report(
    name: str,
    start: Candidate,
    result: Candidate,
    steps: Sequence[PassReport],
    evidence: Evidence,
    limits: Tolerance,
    seed: int,
    notes: Sequence[str],
) -> CompressionReport:
    return CompressionReport(
        model=name,
        bytes_before=start.nbytes,
        bytes_after=result.nbytes,
        tolerance=limits,
        inputs=evidence.source,
        validation_samples=len(evidence.judged),
        calibration_samples=len(evidence.given) if evidence.given is not None else 0,
        synthetic=evidence.synthetic,
        seed=seed,
        passes=steps,
        outputs=result.comparison.outputs,
        accuracy=result.comparison.accuracy,
        metrics=result.comparison.metrics,
        notes=notes,
        versions={"onnxshrink": __version__, **{package: version(package) for package in _PACKAGES}},
    )


def _notes(evidence: Evidence, limits: Tolerance, complaint: str | None, itself: Comparison) -> list[str]:
    notes = []
    if evidence.synthetic:
        notes.append("inputs are synthetic: they show that the result runs, and little of its quality; pass real ones as calibration")
    elif evidence.given is None and len(evidence.judged) == 1:
        notes.append("one input was given: it judges the result, and passes worked without calibration data")
    if evidence.given is not None and len(evidence.judged) < _FEW_SAMPLES:
        count = len(evidence.judged)
        few = f"{count} input{'s' if count > 1 else ''} only"
        notes.append(f"the result was judged on {few}: on others the outputs may differ by more")
    if not limits.is_set:
        notes.append("no limit was set: nothing was rolled back for quality, only for an invalid model or new NaN or infinity")
    if complaint is not None:
        notes.append(f"the original itself does not pass the ONNX checker, so the result is held to less: {complaint}")
    blank = [output.name for output in itself.outputs if output.blank]
    if blank:
        notes.append(f"empty or all zero on every sample, so that no limit can bind on it: {', '.join(blank)}")
    if any(output.max_abs > 0 for output in itself.outputs):
        notes.append("the original does not reproduce its own outputs on the same inputs; small differences mean nothing")
    return notes


def _sources(model: ModelSource, graph: Graph) -> frozenset[Path]:
    """Returns the files that a model was read from."""
    own = [Path(model)] if isinstance(model, str | os.PathLike) else []
    return frozenset({*own, *source_paths(graph)})


def _name(model: ModelSource, graph: Graph) -> str:
    return os.fspath(model) if isinstance(model, str | os.PathLike) else graph.name or "model"


def _silent(what: str, done: int, total: int) -> None:
    """Reports progress to nobody."""


def _nbytes(graph: Graph) -> int:
    """Returns the bytes of the model; of one with external data without writing it."""
    return model_bytes(graph) if source_paths(graph) else to_model(graph).ByteSize()


def _workers() -> int:
    return max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
