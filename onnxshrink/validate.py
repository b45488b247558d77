"""Two models on the same inputs: how far the candidate's outputs are from the original's.

    reference = Reference("model.onnx", samples)          # runs the original once
    comparison = compare(reference, "small.onnx")
    broken = Tolerance(min_sqnr_db=30).violation(comparison)

Each metric is one number over ALL samples, from sums in float64 (y original, y' candidate, over all elements):

    drift = ‖y'-y‖ / ‖y‖    SQNR = -20 log10(drift) dB    cosine = <y,y'> / (‖y‖ ‖y'‖)    max_abs = max |y'-y|

SQNR is kept within ±300 dB and drift below 1e15, the resolution of float64, because JSON has no infinity: 300 dB means
equal, and drift 1e15 that the original is zero and the candidate is not. Where both are zero, cosine is 1.

Agreement is, for class scores, the share of positions with the same arg max; for integers, booleans and strings, the
share of equal elements. Class scores are float outputs [batch, C] or [batch, C, 1, ...] with C >= 2, and [batch, T, C]
straight from a Softmax over C. Integers straight from QuantizeLinear are numbers, and scores, like floats.

Where the original itself is not finite the candidate must be equal, and the position is left out; NaN or infinity
anywhere else is a failure, as is an output that is missing or has another shape or dtype.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from onnxshrink.errors import InputsError, OptionError, UnsupportedModelError, ValidationError, must
from onnxshrink.graph.files import load
from onnxshrink.graph.ir import Graph, Node, Tensor
from onnxshrink.inputs import Samples
from onnxshrink.metrics import DRIFT_LIMIT, SQNR_LIMIT_DB, OutputMetrics, Tally, complaint, hits
from onnxshrink.options import check_options, option
from onnxshrink.outputs import Outputs, OutputStore
from onnxshrink.runtime import AnyModel, Session, is_floating, is_integer, session

__all__ = ["Accuracy", "Comparison", "Metric", "OutputMetrics", "Reference", "Tolerance", "compare"]

Array = np.ndarray[Any, np.dtype[Any]]
Metric = Callable[[Sequence[Outputs], Sequence[Outputs]], float]

_MEMORY_BYTES = 512 << 20


@dataclass(frozen=True)
class Accuracy:
    """Share of labels that the two models hit with the best, and with one of the five best, classes of ``output``."""

    output: str
    labels: int
    top1_original: float
    top1_candidate: float
    top5_original: float
    top5_candidate: float


@dataclass(frozen=True)
class Comparison:
    """What comparing two models gave.

    Attributes:
        outputs: all that could be compared to the end; none where the candidate does not run.
        failure: why the candidate is broken, in one line, or None.
        samples: how many there are.
        accuracy: against labels, where labels came with the samples and an output has class scores.
        metrics: results of the user's own metrics by name; empty after a failure.
    """

    outputs: tuple[OutputMetrics, ...]
    failure: str | None
    samples: int
    accuracy: Accuracy | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    def worst(self, metric: Literal["sqnr_db", "drift", "agreement"]) -> OutputMetrics | None:
        """Returns the output with the worst value, or None; the error of exact outputs counts only if all are exact."""
        judged = [output for output in self.outputs if getattr(output, metric) is not None]
        if metric != "agreement":
            judged = [output for output in judged if not output.exact] or judged
        pick = max if metric == "drift" else min
        return pick(judged, key=lambda output: getattr(output, metric), default=None)


@dataclass(frozen=True)
class Tolerance:
    """How far outputs may be from the original's; None is no limit. The worst output counts."""

    min_sqnr_db: float | None = option(None, "lowest SQNR", low=-SQNR_LIMIT_DB, high=SQNR_LIMIT_DB)
    max_drift: float | None = option(None, "highest drift", low=0.0, high=DRIFT_LIMIT)
    min_agreement: float | None = option(None, "lowest share of equal decisions", low=0.0, high=1.0)

    def __post_init__(self) -> None:
        check_options("tolerance", self)

    def __str__(self) -> str:
        limits = [
            *([] if self.min_sqnr_db is None else [f"SQNR at least {self.min_sqnr_db:g} dB"]),
            *([] if self.max_drift is None else [f"drift at most {self.max_drift:g}"]),
            *([] if self.min_agreement is None else [f"agreement at least {self.min_agreement:g}"]),
        ]
        return ", ".join(limits) or "none"

    @property
    def is_set(self) -> bool:
        """Whether there is any limit."""
        return self != Tolerance()

    @property
    def drift_limit(self) -> float | None:
        """The stricter of the limits on SQNR and drift, as a drift; None if there is neither."""
        limits = [] if self.max_drift is None else [self.max_drift]
        limits += [] if self.min_sqnr_db is None else [10 ** (-self.min_sqnr_db / 20)]
        return min(limits, default=None)

    def violation(self, comparison: Comparison) -> str | None:
        """Returns one line on what is broken or which output is past which limit, or None.

        Raises:
            OptionError: a limit on agreement, and no output has any.
        """
        if comparison.failure is not None:
            return comparison.failure
        sqnr, drift = comparison.worst("sqnr_db"), comparison.worst("drift")
        agreement = comparison.worst("agreement")
        if self.min_sqnr_db is not None and sqnr is not None and sqnr.sqnr_db < self.min_sqnr_db:
            return f"output '{sqnr.name}': SQNR must be at least {self.min_sqnr_db:g} dB, got {sqnr.sqnr_db:.2f} dB"
        if self.max_drift is not None and drift is not None and drift.drift > self.max_drift:
            return f"output '{drift.name}': drift must be at most {self.max_drift:g}, got {drift.drift:.4g}"
        if self.min_agreement is None:
            return None
        if agreement is None or agreement.agreement is None:
            way_out = "no output has class scores, ids, flags or text to agree on; limit the SQNR instead"
            raise OptionError(
                must("tolerance", "min-agreement", "left out for this model", self.min_agreement, way_out)
            )
        if agreement.agreement >= self.min_agreement:
            return None
        got = f"{agreement.agreement:.4f}"
        return f"output '{agreement.name}': agreement must be at least {self.min_agreement:g}, got {got}"


class Reference:
    """The original's outputs for given samples, computed once and kept in memory, or on disk past a budget.

    Attributes:
        samples: the inputs.
        outputs: the outputs of each sample.
        probabilities: names of outputs that come straight from a Softmax over their last axis.
        quantized: names of outputs that come straight from QuantizeLinear.
    """

    def __init__(
        self,
        original: AnyModel,
        samples: Samples,
        *,
        threads: int | None = None,
        running: Session | None = None,
        memory_bytes: int = _MEMORY_BYTES,
    ) -> None:
        """Runs the original.

        Args:
            original: a path, the bytes of a file, a ModelProto or a graph; only read.
            samples: at least one.
            threads: of ONNX Runtime, or None for its choice.
            running: a session of the original to use, left open, instead of a new one.
            memory_bytes: of outputs to keep in memory; the rest goes to a temporary file.

        Raises:
            InputsError: there is no sample, or the original fails on one.
            ModelError: it cannot be read or loaded.
        """
        if not samples:
            raise InputsError(must(samples.source, "number of samples", "at least 1", 0))
        graph = original if isinstance(original, Graph) else load(original)
        self.samples = samples
        self.probabilities = {
            tensor.name for tensor in graph.outputs if _is_probability(_producer(tensor), graph.opset)
        }
        self.quantized = {t.name for t in graph.outputs if (node := _producer(t)) and node.op == "QuantizeLinear"}
        self.outputs = OutputStore(memory_bytes)
        with contextlib.ExitStack() as stack:
            running = running or stack.enter_context(session(original, threads, "original"))
            for index, feeds in enumerate(samples):
                try:
                    self.outputs.append(running.run(feeds))
                except UnsupportedModelError as error:
                    raise InputsError(
                        f"{samples.source}: sample {index}: the model does not run on it: {error}"
                    ) from None


def compare(
    reference: Reference,
    candidate: AnyModel,
    *,
    metrics: Mapping[str, Metric] | None = None,
    threads: int | None = None,
) -> Comparison:
    """Compares a candidate with the original; what is wrong with it is a failure, not an error.

    Args:
        reference: the original's outputs.
        candidate: a path, the bytes of a file, a ModelProto or a graph; only read.
        metrics: name -> f(outputs of the original, outputs of the candidate), each a sequence over samples of dicts
            output name -> array; returns a finite number.
        threads: of ONNX Runtime, or None for its choice.

    Raises:
        InputsError: the labels do not fit the class scores.
        ValidationError: a user's metric fails.
    """
    judge = _Judge(reference)
    kept = OutputStore(_MEMORY_BYTES)
    try:
        with session(candidate, threads) as running:
            for index, (feeds, expected) in enumerate(zip(reference.samples, reference.outputs, strict=True)):
                outputs = running.run(feeds)
                judge.add(expected, outputs, f"(sample {index})")
                judge.add_labels(reference.samples.labels(index), expected, outputs)
                if metrics:
                    kept.append(outputs)
    except ValidationError as error:
        return Comparison((), str(error), len(reference.samples))
    found = {}
    if metrics and judge.failure is None:
        found = {name: _measure(name, metric, reference.outputs, kept) for name, metric in metrics.items()}
    return Comparison(judge.outputs(), judge.failure, len(reference.samples), judge.accuracy(), found)


class _Judge:
    """Adds up the outputs of all samples; ``failure`` is the first thing that is wrong with them."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.tallies: dict[str, Tally] = {}
        self.failure: str | None = None
        self.scored: str | None = None
        self.labels = 0
        self.hits = np.zeros((2, 2), np.int64)  # [original, candidate] x [top 1, top 5]

    def add(self, expected: Outputs, outputs: Outputs, where: str) -> None:
        """Takes the two models' outputs for one sample."""
        for name, original in expected.items():
            tally = self.tallies.setdefault(name, Tally())
            tally.broken = tally.broken or complaint(original, outputs.get(name))
            if tally.broken is None:
                tally.add(original, outputs[name], self._is_exact(name, original), self._scores(name, original))
            else:
                self.failure = self.failure or f"output '{name}': {tally.broken} {where}"
        for name in sorted(outputs.keys() - expected.keys()):
            self.failure = self.failure or f"output '{name}': the original has no such output {where}"

    def add_labels(self, labels: Array | None, expected: Outputs, outputs: Outputs) -> None:
        """Takes the class labels of the same sample, where it has any and an output has class scores."""
        names = [name for name in expected if self._scores(name, expected[name])]
        if labels is None or not labels.size or not names or names[0] not in outputs:
            return
        self.scored = names[0]
        classes = self._scores(names[0], expected[names[0]])
        owner = self.reference.samples.source
        if len(labels) * classes != expected[names[0]].size:
            rows = expected[names[0]].size // classes
            raise InputsError(must(owner, "number of labels", f"{rows}, as output '{names[0]}' has rows", len(labels)))
        if not is_integer(labels.dtype) or not 0 <= labels.min() <= labels.max() < classes:
            got = f"{labels.dtype} from {labels.min()} to {labels.max()}" if labels.dtype.kind in "iuf" else labels.dtype
            raise InputsError(must(owner, "labels", f"integers from 0 to {classes - 1}", got))
        self.labels += len(labels)
        if outputs[names[0]].shape == expected[names[0]].shape:
            self.hits += [hits(side[names[0]].reshape(-1, classes), labels) for side in (expected, outputs)]

    def outputs(self) -> tuple[OutputMetrics, ...]:
        """Returns the metrics of the outputs that can be compared."""
        return tuple(tally.metrics(name) for name, tally in self.tallies.items() if tally.broken is None)

    def accuracy(self) -> Accuracy | None:
        """Returns the two models' hits on the labels, where there were any."""
        if self.scored is None or not self.labels or self.failure is not None:
            return None
        (top1, top5), (candidate_top1, candidate_top5) = (self.hits / self.labels).tolist()
        return Accuracy(self.scored, self.labels, top1, candidate_top1, top5, candidate_top5)

    def _is_exact(self, name: str, array: Array) -> bool:
        return not is_floating(array.dtype) and name not in self.reference.quantized

    def _scores(self, name: str, array: Array) -> int:
        """Returns the number of classes that an output scores, or 0; see the module."""
        if self._is_exact(name, array) or array.ndim < 2:
            return 0
        if array.ndim == 3 and name in self.reference.probabilities and array.shape[2] > 1:
            return int(array.shape[2])
        return int(array.shape[1]) if array.shape[1] > 1 and array.size == array.shape[0] * array.shape[1] else 0


def _measure(name: str, metric: Metric, original: Sequence[Outputs], candidate: Sequence[Outputs]) -> float:
    try:
        value = float(metric(original, candidate))
    except Exception as error:  # the user's code
        raise ValidationError(f"metric '{name}': it raised {type(error).__name__}: {error}") from error
    if not math.isfinite(value):
        raise ValidationError(must(f"metric '{name}'", "result", "a finite number", value))
    return value


def _producer(tensor: Tensor) -> Node | None:
    """Returns the node that computes a tensor, seen through Identity."""
    node = tensor.inputs[0] if tensor.inputs else None
    while node is not None and node.op == "Identity":
        node = node.inputs[0].inputs[0] if node.inputs[0].inputs else None
    return node


def _is_probability(node: Node | None, opset: int) -> bool:
    """Whether a node is a Softmax over the last of three axes; the default is -1, and 1 before opset 13 (onnx.ai)."""
    if node is None or node.op not in ("Softmax", "LogSoftmax"):
        return False
    return node.attrs.get("axis", -1 if opset >= 13 else 1) in (-1, 2)
