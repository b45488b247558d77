"""What is in a model, weight by weight: bytes, zeros, entropy, work, and what each pass would do with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from onnxshrink.contract import Context
from onnxshrink.degradation import Degradation
from onnxshrink.errors import ShrinkError
from onnxshrink.graph.coded import Coded, coded_weights
from onnxshrink.graph.edit import constant_bytes
from onnxshrink.graph.files import materialised
from onnxshrink.graph.huffman import is_decoder_scope
from onnxshrink.graph.huffman_weights import centred
from onnxshrink.graph.ir import Constant, Graph
from onnxshrink.graph.weights import Weight, weights
from onnxshrink.group_inspection import GroupInfo, group_infos
from onnxshrink.numerics.code_lengths import entropy_bits
from onnxshrink.numerics.distribution import distribution
from onnxshrink.rank_inspection import RankInfo
from onnxshrink.registry import pass_class, pass_names
from onnxshrink.runtime import session
from onnxshrink.synthetic import synthetic_samples
from onnxshrink.tracing import NodeTrace, multiply_accumulates, node_macs, trace

__all__ = ["Inspection", "WeightInfo", "inspect_graph"]


@dataclass(frozen=True)
class WeightInfo:
    """One stored weight.

    Attributes:
        site: model-wide name.
        op: what reads it; several ops are joined by +. ``codes`` or ``sparse`` where it is computed from what is stored.
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
        code_entropy_bits: Shannon entropy of its codes, bits a code, which no code of single codes undercuts; None if not coded.
        code_bits: bits a code as stored now, packed or Huffman coded, without codebook, scales and decoder; of what is Huffman
            coded together, the share that the entropy asks for. None if not coded.
        efficiency: code_bits over code_entropy_bits; None if not coded, or if the entropy is 0.
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
    code_entropy_bits: float | None
    code_bits: float | None
    efficiency: float | None
    actions: Mapping[str, str]
    obstacles: Mapping[str, str]


@dataclass(frozen=True)
class Inspection:
    """A model as a whole, its weights, largest first, and groups of channels; ranks, and what zeros do to it, where asked for."""

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
    sensitivity: Degradation | None = None
    groups: Sequence[GroupInfo] = ()
    ranks: Sequence[RankInfo] = ()

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
    stored = coded_weights(graph)
    for coded, codes in zip(stored, _codes(stored), strict=True):
        beside = coded.nbytes - round(sum(piece.nbytes for piece in coded.pieces))
        nbytes = beside + round(codes.nbytes) if coded.pieces else coded.nbytes
        op, codes_if_any = ("sparse", None) if coded.is_sparse else ("codes", codes)
        infos.append(_info(coded.site, op, coded.values(), nbytes, None, answers, codes_if_any))
    with materialised(graph) as (_, nbytes):
        total = nbytes
    ops = Counter(node.op for scope in graph.scopes() if not is_decoder_scope(scope) for node in scope.graph.nodes)
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
        groups=group_infos(graph, node_macs(graph, traces)),
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
    return _info(weight.site, ops, weight.constant.values, nbytes, sum(ran) if ran else None, answers)


@dataclass(frozen=True)
class _Codes:
    """How a weight's codes are stored: their number, their entropy in bits (None if unknown), and their bytes in the file."""

    count: int
    entropy: float | None
    nbytes: float


def _codes(found: Sequence[Coded]) -> list[_Codes]:
    """Returns how the codes of each weight are stored.

    Weights that are Huffman coded together share a stream, and often a code; each counts as many bytes of it as its entropy asks.
    """
    each = [_codes_of(coded) for coded in found]
    needs = {id(coded): codes.count * (codes.entropy or 0.0) for coded, codes in zip(found, each, strict=True) if coded.pieces}
    stream = sum(piece.nbytes for coded in found for piece in coded.pieces)
    total = sum(needs.values())
    return [
        replace(codes, nbytes=stream * needs[id(coded)] / total) if total and id(coded) in needs else codes
        for coded, codes in zip(found, each, strict=True)
    ]


def _codes_of(coded: Coded) -> _Codes:
    if coded.pieces:
        codes = np.concatenate([piece.values() for piece in coded.pieces]).astype(np.int16)
    else:
        whole = centred(coded)
        codes = whole.codes.astype(np.int16) if whole is not None else np.zeros(0, np.int16)
    nbytes = float(sum(constant.nbytes for constant in coded.codes)) + sum(piece.nbytes for piece in coded.pieces)
    if not codes.size:
        return _Codes(max(coded.values().size, 1), None, nbytes)
    return _Codes(codes.size, entropy_bits(np.bincount(codes - codes.min())) / codes.size, nbytes)


def _info(
    site: str,
    op: str,
    values: np.ndarray[Any, np.dtype[Any]],
    nbytes: int,
    macs: int | None,
    answers: dict[str, dict[str, tuple[bool, str]]],
    codes: _Codes | None = None,
) -> WeightInfo:
    spread = distribution(values)
    code_bits = 8 * codes.nbytes / codes.count if codes is not None else None
    code_entropy = codes.entropy if codes is not None else None
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
        coded=codes is not None,
        code_entropy_bits=code_entropy,
        code_bits=code_bits,
        efficiency=code_bits / code_entropy if code_bits is not None and code_entropy else None,
        actions={name: text for name, (acts, text) in mine.items() if acts},
        obstacles={name: text for name, (acts, text) in mine.items() if not acts},
    )


def _signature(tensor: Any) -> str:
    dims = "?" if tensor.shape is None else ", ".join("?" if dim is None else str(dim) for dim in tensor.shape)
    return f"{tensor.name}: {tensor.dtype or 'unknown'} [{dims}]"
