"""What is in a model, weight by weight: bytes, zeros, entropy, work, and what each pass would do with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from onnxshrink.contract import Context
from onnxshrink.errors import ShrinkError
from onnxshrink.graph.coded import coded_weights
from onnxshrink.graph.edit import constant_bytes
from onnxshrink.graph.files import materialised
from onnxshrink.graph.ir import Constant, Graph
from onnxshrink.graph.weights import Weight, weights
from onnxshrink.numerics.distribution import distribution
from onnxshrink.registry import pass_class, pass_names
from onnxshrink.runtime import session
from onnxshrink.synthetic import synthetic_samples
from onnxshrink.tracing import NodeTrace, multiply_accumulates, trace

__all__ = ["Inspection", "WeightInfo", "inspect_graph"]


@dataclass(frozen=True)
class WeightInfo:
    """One stored weight.

    Attributes:
        site: model-wide name.
        op: what reads it; several ops are joined by +.
        shape: of the tensor.
        dtype: of the values.
        nbytes: in the file, as stored now.
        zeros: share of exact zeros.
        distinct: number of distinct values.
        entropy_bits: Shannon entropy of the values, bits per weight; no coding of single values is shorter.
        bits: bits per weight as stored now.
        macs: multiply-accumulates for one synthetic sample; None if no node that uses it ran, or only ones that ONNX Runtime
            inlined from a model-local function.
        coded: whether it is stored as codes.
        actions: per pass that would change it with default options, what it would do.
        obstacles: per other pass, why it would not.
    """

    site: str
    op: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    zeros: float
    distinct: int
    entropy_bits: float
    bits: float
    macs: int | None
    coded: bool
    actions: Mapping[str, str]
    obstacles: Mapping[str, str]


@dataclass(frozen=True)
class Inspection:
    """A model as a whole and its weights, largest first."""

    model: str
    nbytes: int
    opset: int
    ir_version: int
    producer: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    ops: Mapping[str, int]
    weights: Sequence[WeightInfo]
    notes: Sequence[str] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns plain dicts, lists, strings and finite numbers."""
        return asdict(self)


def inspect_graph(graph: Graph, name: str, progress: Callable[[str, int, int], None]) -> Inspection:
    """Returns what is in a model.

    Args:
        graph: the main graph; only read.
        name: how to call it.
        progress: called with what is being done, the part done and the total.
    """
    notes: list[str] = []
    progress("tracing one run", 0, 0)
    traces = _traces(graph, notes)
    answers = _dry_runs(graph, notes, progress)
    infos = []
    found = weights(graph)
    for number, weight in enumerate(found):
        progress("reading weights", number, len(found))
        infos.append(_weight_info(weight, traces, answers))
    for coded in coded_weights(graph):
        infos.append(_info(coded.site, "codes", coded.values(), coded.nbytes, None, True, answers))
    with materialised(graph) as (_, nbytes):
        total = nbytes
    ops = Counter(node.op for scope in graph.scopes() for node in scope.graph.nodes)
    return Inspection(
        model=name,
        nbytes=total,
        opset=graph.opset,
        ir_version=graph.ir_version,
        producer=f"{graph.model.producer_name} {graph.model.producer_version}".strip(),
        inputs=[_signature(tensor) for tensor in graph.inputs if not isinstance(tensor, Constant)],
        outputs=[_signature(tensor) for tensor in graph.outputs],
        ops=dict(ops.most_common()),
        weights=sorted(infos, key=lambda info: -info.nbytes),
        notes=notes,
    )


def _traces(graph: Graph, notes: list[str]) -> Mapping[int, NodeTrace]:
    """Returns what the nodes do on one synthetic sample; nothing, with a note, when ONNX Runtime does not run the model."""
    try:
        with session(graph, role="original") as running:
            sample = synthetic_samples(graph, running, 1)[0]
        return trace(graph, sample)
    except ShrinkError as error:
        notes.append(f"MACs are not known: {error}")
        return {}


def _dry_runs(
    graph: Graph, notes: list[str], progress: Callable[[str, int, int], None]
) -> dict[str, dict[str, tuple[bool, str]]]:
    """Returns, per pass, whether and how it would change each site: every pass runs on a copy that is then dropped."""
    answers = {}
    for name in pass_names():
        progress(f"asking {name}", 0, 0)
        try:
            report = pass_class(name)().apply(graph.copy(), Context())
        except Exception as error:  # third-party code: the other passes answer all the same
            notes.append(f"{name} does not say what it would do: {type(error).__name__}: {error}")
            continue
        changed = {change.site: (True, change.detail) for change in report.changes}
        answers[name] = {**{skip.site: (False, skip.reason) for skip in report.skips}, **changed}
    return answers


def _weight_info(weight: Weight, traces: Mapping[int, NodeTrace], answers: dict[str, dict[str, tuple[bool, str]]]) -> WeightInfo:
    macs = [multiply_accumulates(use, traces) for use in weight.uses if use.is_operand]
    ran = [count for count in macs if count is not None]
    ops = "+".join(dict.fromkeys(use.op for use in weight.uses)) or "unused"
    nbytes = constant_bytes(weight.constant, weight.scope.graph)
    return _info(weight.site, ops, weight.constant.values, nbytes, sum(ran) if ran else None, False, answers)


def _info(
    site: str,
    op: str,
    values: np.ndarray[Any, np.dtype[Any]],
    nbytes: int,
    macs: int | None,
    coded: bool,
    answers: dict[str, dict[str, tuple[bool, str]]],
) -> WeightInfo:
    spread = distribution(values)
    mine = {name: by_site[site] for name, by_site in answers.items() if site in by_site}
    return WeightInfo(
        site=site,
        op=op,
        shape=tuple(values.shape),
        dtype=str(values.dtype),
        nbytes=nbytes,
        zeros=spread.zeros / spread.size,
        distinct=spread.distinct,
        entropy_bits=spread.entropy_bits,
        bits=8 * nbytes / spread.size,
        macs=macs,
        coded=coded,
        actions={name: text for name, (acts, text) in mine.items() if acts},
        obstacles={name: text for name, (acts, text) in mine.items() if not acts},
    )



def _signature(tensor: Any) -> str:
    dims = "?" if tensor.shape is None else ", ".join("?" if dim is None else str(dim) for dim in tensor.shape)
    return f"{tensor.name}: {tensor.dtype or 'unknown'} [{dims}]"
