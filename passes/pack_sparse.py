"""Stores weights with many zeros in as few bytes as they need, and changes no bit of them.

A tensor of n elements of s bytes, k of them not zero, takes (`onnxshrink.graph.sparse_form` says how each is decoded)

    dense       n·s
    mask        n/8 + k·s            smaller from 1/32 zeros on in float32, 1/16 in float16
    patterns    between n/8 and nothing, + k·s: where zeros come N:M, in blocks or in rows
    gaps        k·(s + 1/4 to 1)     the least where more than about 4 in 5 are zero
    constant    k·(s + 1 to 4)       the one with fewest nodes, for a handful of values

and each the bytes of its nodes, names and constants, so small tensors stay dense. The smallest in the file is taken, tensor by tensor.
Weights that are codes already are left to `huffman`. All forms but the last are computed when a session starts, and are gone then: the
model runs with dense weights, as fast as before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxshrink.contract import Change, Context, Pass, Report, Skip
from onnxshrink.graph.coded import Coded, coded_weights
from onnxshrink.graph.edit import NameSource, constant_bytes
from onnxshrink.graph.ir import Graph
from onnxshrink.graph.sparse_form import SparseForm, sparse_forms, store_sparse
from onnxshrink.graph.storage import is_float
from onnxshrink.graph.weights import Weight, weights
from onnxshrink.numerics.sparse_codes import set_bits

__all__ = ["PackSparse"]


@dataclass(frozen=True, kw_only=True)
class PackSparse(Pass):
    """Stores weights with many zeros as the other values and where they are; nothing about the values changes."""

    name: ClassVar[str] = "pack-sparse"

    def apply(self, graph: Graph, context: Context) -> Report:
        """Edits the graph in place."""
        coded = coded_weights(graph)
        answers: list[Change | Skip] = [Skip(item.site, _as_stored(item)) for item in coded]
        found = [weight for weight in weights(graph) if is_float(weight.constant.dtype)]
        names, in_functions = NameSource(graph), {id(scope.graph) for function in graph.local_functions for scope in function.scopes()}
        for number, weight in enumerate(found, 1):  # one after the other: forms of several gigabytes must not add up
            if (stored := int(np.count_nonzero(set_bits(weight.constant.values)))) < weight.constant.size:
                chosen = context.options(self, weight.names)
                inside = id(weight.scope.graph) in in_functions
                answer = Skip(weight.site, "left alone by a rule") if chosen is None else _pack(weight, stored, names, inside)
                answers.append(answer)
            context.progress(number, len(found))
        return Report(
            [answer for answer in answers if isinstance(answer, Change)],
            [answer for answer in answers if isinstance(answer, Skip)],
        )


def _as_stored(coded: Coded) -> str:
    if coded.is_sparse:
        return "is stored as values and where they are already"
    return "is Huffman coded already" if coded.pieces else "is stored as codes, which huffman makes smaller"


def _pack(weight: Weight, stored: int, names: NameSource, in_function: bool) -> Change | Skip:
    """Stores a weight in its smallest form."""
    constant, scope = weight.constant, weight.scope.graph
    before = constant_bytes(constant, scope)
    present = "sparse" if constant.stored is not None and constant.stored.is_sparse else "dense"
    sizes = {present: before}
    best: SparseForm | None = None
    for form in sparse_forms(constant, scope, names, in_function=in_function):
        sizes[form.kind] = form.nbytes
        if form.nbytes < (before if best is None else best.nbytes):
            best = form
    zeros = f"{1 - stored / constant.size:.1%} zeros"
    if best is None:
        if present == "sparse":
            return Skip(weight.site, f"is stored as a sparse tensor already: {_listed(sizes, [present])}")
        if len(sizes) == 1:
            return Skip(weight.site, f"{zeros}, and no other form at opset {scope.opset} or of {constant.size} elements")
        return Skip(weight.site, f"{zeros}, too few to gain: {before} bytes as it is (not {_listed(sizes, [present])})")
    note = "; no longer a graph input that callers can override" if constant in scope.overridable else ""
    detail = f"{zeros}, {best.kind}{f' {best.detail}' if best.detail else ''} and values (not {_listed(sizes, [best.kind])})"
    store_sparse(constant, scope, best)
    return Change(weight.site, before, best.nbytes, detail + note)


def _listed(sizes: dict[str, int], without: Sequence[str]) -> str:
    return ", ".join(f"{kind} {size}" for kind, size in sizes.items() if kind not in without)
