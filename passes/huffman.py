"""Huffman codes the codes of shared weights; ONNX Runtime decodes them while a session starts.

The codes c of a weight, W = f(c), are replaced by what a finite-state machine of standard ops decodes from

    bits(W) = Σ_c n_c · l_c        entropy ≤ bits(W) / n < entropy + 1

where n_c is how often code c of n occurs, and l_c the length of its codeword. Tokens are single codes, or runs of zeros and a
code (Deep Compression, arXiv 1510.00149), whichever takes fewer bytes. The codes that come out are the same, so the outputs of
the model are too. One model-local function decodes all weights (`onnxshrink.graph.huffman`); it is folded away at session
start, so the model runs as fast as before, and needs IR version 8.

Weights of similar statistics share a code. A weight whose form, with its share of the decoder, is not smaller stays as it is,
and all do if together they do not pay for the decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from onnxshrink.contract import Change, Context, Pass, Report, Skip
from onnxshrink.graph.codebook import MAX_FOLDED_BYTES
from onnxshrink.graph.coded import Coded, coded_weights
from onnxshrink.graph.huffman import has_decoder
from onnxshrink.graph.huffman_decoder import FIRST_OPSET
from onnxshrink.graph.huffman_weights import Centred, Rewrite, centred
from onnxshrink.graph.ir import Graph
from onnxshrink.graph.opset import obstacle_to_opset
from onnxshrink.numerics.huffman_plan import best_kind, kind_bytes
from onnxshrink.numerics.tokens import Kind
from onnxshrink.options import option

__all__ = ["Huffman"]


@dataclass(frozen=True)
class _Candidate:
    """A weight, and the bytes of its codewords and table for each kind of tokens."""

    weight: Centred
    kind: Kind
    sizes: dict[Kind, int]

    @property
    def site(self) -> str:
        return self.weight.coded.site

    @property
    def detail(self) -> str:
        rejected = ", ".join(f"{kind} {size}" for kind, size in self.sizes.items() if kind != self.kind)
        bits = 8 * self.sizes[self.kind] / self.weight.codes.size
        return f"Huffman coded, {self.kind}: {self.sizes[self.kind]} bytes, {bits:.2f} bits a code (not {rejected})"


@dataclass(frozen=True, kw_only=True)
class Huffman(Pass):
    """Huffman codes the codes of shared weights, decoded by a function that folds away when a session starts."""

    name: ClassVar[str] = "huffman"
    raise_opset: bool = option(False, f"raise the model's opset to {FIRST_OPSET} where that changes no result", per_site=False)

    @property
    def sites_are_independent(self) -> bool:
        """They are not: all share one decoder, and some share a code."""
        return False

    def apply(self, graph: Graph, context: Context) -> Report:
        """Edits the graph in place."""
        found = coded_weights(graph)
        general = self._general_obstacle(graph) if found else ""
        obstacles = {id(coded): self._obstacle(coded, graph, context) or general for coded in found}
        answers = context.map(lambda coded: _candidate(coded, obstacles[id(coded)]), found)
        skips = [answer for answer in answers if isinstance(answer, Skip)]
        candidates = [answer for answer in answers if isinstance(answer, _Candidate)]
        while candidates:
            kinds = [item.kind for item in candidates]
            opset = max(graph.opset, FIRST_OPSET)
            rewrite = Rewrite(graph, opset, [item.weight for item in candidates], kinds, context.map)
            losers = _losers(candidates, rewrite)
            if not losers:
                notes = [f"the opset was raised from {graph.opset} to {opset}"] if opset > graph.opset else []
                before, after = rewrite.apply()
                described = [(item.site, item.detail) for item in candidates]
                changes = [Change(s, b, a, d) for (s, d), b, a in zip(described, before, after, strict=True)]
                return Report(changes, skips, notes)
            skips += losers.values()
            candidates = [item for index, item in enumerate(candidates) if index not in losers]
        return Report(skips=skips, notes=[] if found else ["no weight is stored as codes: run share-weights before"])

    def _general_obstacle(self, graph: Graph) -> str:
        """Returns why no weight of a model can be Huffman coded, or nothing."""
        if graph.opset < FIRST_OPSET:
            why = obstacle_to_opset(graph, FIRST_OPSET) if self.raise_opset else "raise-opset=true raises it"
            if why is not None:
                return f"opset {graph.opset} is below {FIRST_OPSET}, the first that can decode it; {why}"
        if has_decoder(graph):
            return "the model has a Huffman decoder already; expand the model first to code all of its weights"
        return ""

    def _obstacle(self, coded: Coded, graph: Graph, context: Context) -> str:
        """Returns why a weight cannot be Huffman coded though others can, or nothing."""
        if coded.is_sparse:
            return "is stored as values and where they are, not as codes"
        if coded.pieces:
            return "is Huffman coded already"
        readers = [name for node in coded.output.outputs for name in (node.name, node.site) if name]
        if context.options(self, [coded.site, *readers]) is None:
            return "left alone by a rule"
        if any(coded.scope.graph is scope.graph for function in graph.local_functions for scope in function.scopes()):
            return "is in a model-local function, which cannot read what is decoded outside"
        return ""


def _candidate(coded: Coded, obstacle: str) -> _Candidate | Skip:
    """Returns a weight with its sizes, or why it stays as it is."""
    if obstacle:
        return Skip(coded.site, obstacle)
    weight = centred(coded)
    if weight is None:
        return Skip(coded.site, "is not computed from one tensor of codes")
    if 4 * weight.codes.size > MAX_FOLDED_BYTES:
        reason = f"{weight.codes.size} codes: ONNX Runtime folds at most {MAX_FOLDED_BYTES} bytes at session start"
        return Skip(coded.site, reason)
    sizes = kind_bytes(weight.codes)
    return _Candidate(weight, best_kind(sizes), sizes)


def _losers(candidates: Sequence[_Candidate], rewrite: Rewrite) -> dict[int, Skip]:
    """Returns those that do not get smaller, by index; all of them if together they do not."""
    lost = {
        index: Skip(item.site, f"too small to gain: {after} bytes Huffman coded ({item.kind}), {before} bytes as it is")
        for index, (item, before, after) in enumerate(zip(candidates, rewrite.before, rewrite.own, strict=True))
        if after >= before
    }
    if not lost and sum(rewrite.own) + rewrite.shared >= sum(rewrite.before):
        reason = (
            f"{sum(rewrite.own)} bytes for all weights Huffman coded, and {rewrite.shared} for the decoder, "
            f"are no less than {sum(rewrite.before)}"
        )
        return {index: Skip(item.site, reason) for index, item in enumerate(candidates)}
    return lost
