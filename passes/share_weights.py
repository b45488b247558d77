"""Stores weights as a codebook and small codes: W = codebook[codes].

A weight with at most 2^bits distinct values is stored exactly. Otherwise its values are grouped:

    kmeans     k = 2^bits values of least squared error Σ (w - codebook[code])² (Lloyd 1982), for the tensor or per output channel
    uniform    an affine grid (code - zero point) · scale per output channel; |w - w'| ≤ scale / 2 within the range of the grid

Zeros survive exactly: the grid contains zero, and k-means keeps one value for it when the tensor has more zeros than its share.
The result is decoded by standard ops that ONNX Runtime folds when a session starts (`onnxshrink.graph.codebook`), so it runs as
fast as before. A weight whose coded form is not smaller in the file stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np

from onnxshrink.contract import Change, Context, Pass, Report, Skip
from onnxshrink.graph.codebook import (
    FIRST_OPSET,
    MAX_FOLDED_ELEMENTS,
    Codebook,
    UniformGrid,
    coded_weight,
)
from onnxshrink.graph.coded import coded_weights
from onnxshrink.graph.edit import Fragment, NameSource, constant_bytes, replace_constant
from onnxshrink.graph.ir import Graph
from onnxshrink.graph.storage import is_float
from onnxshrink.graph.weights import Weight, weights
from onnxshrink.numerics.clusters import kmeans_1d, kmeans_rows, nearest, nearest_rows
from onnxshrink.numerics.distribution import codes_of, distinct_values
from onnxshrink.numerics.grids import encode, fit_grid
from onnxshrink.options import option

__all__ = ["ShareWeights"]

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class _Coding:
    """What a weight becomes: codes below 2**bits, what they stand for, and one line about it."""

    codes: np.ndarray[Any, np.dtype[np.uint8]]
    bits: int
    values: Codebook | UniformGrid
    detail: str


@dataclass(frozen=True, kw_only=True)
class ShareWeights(Pass):
    """Stores weights as codebook and codes: exactly where few values occur, else by k-means or on a uniform grid."""

    name: ClassVar[str] = "share-weights"
    bits: int = option(8, "bits per code: at most 2^bits values", low=1, high=8)
    method: str = option("uniform", "how values are grouped; exact changes no value", choices=("exact", "kmeans", "uniform"))
    per: str = option("channel", "one set of values for the tensor or for each output channel", choices=("tensor", "channel"))

    def weaker(self) -> Self | None:
        """Returns the pass with one bit more."""
        return replace(self, bits=self.bits + 1) if self.bits < 8 else None

    def apply(self, graph: Graph, context: Context) -> Report:
        """Edits the graph in place."""
        coded = [Skip(coded.site, "is stored as codes already") for coded in coded_weights(graph)]
        found = weights(graph)
        codings = context.map(lambda weight: _code(weight, context.options(self, weight.names)), found)
        names = NameSource(graph)
        answers = [
            coding if isinstance(coding, Skip) else _store(weight, coding, names)
            for weight, coding in zip(found, codings, strict=True)
        ]
        return Report(
            changes=[answer for answer in answers if isinstance(answer, Change)],
            skips=[*coded, *(answer for answer in answers if isinstance(answer, Skip))],
        )


def _code(weight: Weight, chosen: ShareWeights | None) -> _Coding | Skip:
    """Returns how a weight is coded, or why it stays dense."""
    constant = weight.constant
    if chosen is None:
        return Skip(weight.site, "left alone by a rule")
    if not is_float(constant.dtype):
        return Skip(weight.site, f"holds {constant.dtype} values, not floating point")
    if weight.scope.graph.opset < FIRST_OPSET:
        return Skip(weight.site, f"opset {weight.scope.graph.opset} is below {FIRST_OPSET}, the first that can decode")
    if constant.size > MAX_FOLDED_ELEMENTS:
        return Skip(weight.site, f"{constant.size} elements: ONNX Runtime folds at most {MAX_FOLDED_ELEMENTS} at session start")
    values = constant.values
    distinct = distinct_values(values, 2**chosen.bits)
    if distinct is not None:
        bits = max(1, int(np.ceil(np.log2(len(distinct)))))
        return _Coding(codes_of(values, distinct), bits, Codebook(distinct), f"exact: {len(distinct)} distinct values")
    if chosen.method == "exact":
        return Skip(weight.site, f"more than {2**chosen.bits} distinct values")
    if weight.obstacle is not None:
        return Skip(weight.site, f"more than {2**chosen.bits} distinct values, and it {weight.obstacle}")
    if not np.isfinite(values).all():
        return Skip(weight.site, "holds NaN or infinity")
    return _approximate(values, weight.view.channel_axis if weight.view is not None else None, chosen)


def _approximate(values: Array, channel_axis: int | None, chosen: ShareWeights) -> _Coding:
    axis = channel_axis if chosen.per == "channel" else None
    rows = values.reshape(1, -1) if axis is None else np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
    keep_zero = np.count_nonzero(values == 0) * 2**chosen.bits > values.size
    where = "one for the tensor" if axis is None else f"one for each of {len(rows)} channels"
    coded: Codebook | UniformGrid
    if chosen.method == "uniform":
        grid = fit_grid(rows, chosen.bits)
        codes, coded = encode(rows, grid), UniformGrid(grid.scale, grid.zero_point, axis)
        detail = f"uniform grid of {chosen.bits} bits, {where}"
    elif axis is None:
        codebook = kmeans_1d(rows, 2**chosen.bits, keep_zero=keep_zero)
        codes, coded = nearest(rows, codebook), Codebook(codebook)
        detail = f"k-means to {len(codebook)} values, {where}"
    else:
        codebooks = kmeans_rows(rows, 2**chosen.bits, keep_zero=keep_zero)
        codes, coded = nearest_rows(rows, codebooks), Codebook(codebooks, axis)
        detail = f"k-means to {codebooks.shape[1]} values, {where}"
    if axis is not None:
        others = tuple(dim for index, dim in enumerate(values.shape) if index != axis)
        codes = np.moveaxis(codes.reshape(values.shape[axis], *others), 0, axis)
    return _Coding(np.ascontiguousarray(codes).reshape(values.shape), chosen.bits, coded, detail)


def _store(weight: Weight, coding: _Coding, names: NameSource) -> Change | Skip:
    """Replaces a weight by its coded form if that takes fewer bytes."""
    constant, scope = weight.constant, weight.scope.graph
    before = constant_bytes(constant, scope)
    listed = constant in scope.inputs
    fragment: Fragment = coded_weight(constant, coding.codes, coding.bits, coding.values, scope, names)
    after = fragment.nbytes(scope)
    if after >= before:
        return Skip(weight.site, f"{coding.detail} would take {after} bytes, dense it takes {before}")
    replace_constant(scope, constant, fragment)
    note = "; no longer a graph input that callers can override" if listed else ""
    return Change(weight.site, before, after, coding.detail + note)
