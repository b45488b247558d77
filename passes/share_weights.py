"""Stores weights as a codebook and small codes: W = codebook[codes].

A weight with at most 2^bits distinct values is stored exactly. Otherwise its values are grouped:

    kmeans     k = 2^bits values of least squared error Σ (w - codebook[code])² (Lloyd 1982): for the tensor, per output channel,
               or for the tensor after each channel c was divided by a scale s_c = √(max |w_c| · rms(w_c))
    uniform    an affine grid (code - zero point) · scale; |w - w'| ≤ scale / 2 within the range of the grid
    auto       kmeans with scales, and uniform per channel where the codebook would weigh over an eighth of the codes

The scale lies between the two usual ones: dividing by max |w_c| spends codes on a few large weights, dividing by the rms leaves
these far out. Zeros survive exactly: the grid contains zero, and k-means keeps one value for it when the tensor has more zeros than
its share.
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
_LEAST_CODES_PER_CODEBOOK = 8  # bits of codes per bit of codebook; with less, a uniform grid is the better bargain


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
    method: str = option("auto", "how values are grouped; exact changes none", choices=("auto", "exact", "kmeans", "uniform"))
    per: str = option(
        "scale",
        "one set of values for the tensor, one for each output channel, or one times a scale per channel",
        choices=("tensor", "channel", "scale"),
    )

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
    """Returns the coding of least error among those that the options allow; rows are channels, or one for the tensor."""
    axis = None if chosen.per == "tensor" else channel_axis
    rows = values.reshape(1, -1) if axis is None else np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
    where = "" if axis is None else f", {len(rows)} channels"
    codebook_pays = values.size * chosen.bits >= _LEAST_CODES_PER_CODEBOOK * 2**chosen.bits * 16
    coded: Codebook | UniformGrid
    if chosen.method == "uniform" or (chosen.method == "auto" and not codebook_pays):
        grid = fit_grid(rows, chosen.bits)
        codes, coded = encode(rows, grid), UniformGrid(grid.scale, grid.zero_point, axis)
        detail = f"uniform grid of {chosen.bits} bits{where}"
    else:
        codes, coded = _cluster(rows, axis, chosen)
        detail = f"k-means to {coded.values.shape[-1]} values{where}{'' if coded.scale is None else ', scaled'}"
    if axis is not None:
        others = tuple(dim for index, dim in enumerate(values.shape) if index != axis)
        codes = np.moveaxis(codes.reshape(values.shape[axis], *others), 0, axis)
    return _Coding(np.ascontiguousarray(codes).reshape(values.shape), chosen.bits, coded, detail)


def _cluster(rows: Array, axis: int | None, chosen: ShareWeights) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], Codebook]:
    """Returns codes [rows, columns] and the codebook they refer to."""
    k = 2**chosen.bits
    keep_zero = bool(np.count_nonzero(rows == 0) * k > rows.size)
    if axis is not None and chosen.per == "channel":
        codebooks = kmeans_rows(rows, k, keep_zero=keep_zero).astype(rows.dtype)
        return nearest_rows(rows, codebooks), Codebook(codebooks, axis)
    if axis is None:
        codebook = kmeans_1d(rows, k, keep_zero=keep_zero).astype(rows.dtype)
        return nearest(rows, codebook), Codebook(codebook)
    scale = _channel_scales(rows)
    scaled = rows.astype(np.float32) / scale[:, None]
    codebook = kmeans_1d(scaled, k, keep_zero=keep_zero).astype(np.float16)  # as it is stored, so that codes fit it
    return nearest(scaled, codebook), Codebook(codebook, axis, scale)


def _channel_scales(rows: Array) -> Array:
    """Returns √(max |w| · rms(w)) of each row, float32; 1 for rows of zeros."""
    wide = rows.astype(np.float32, copy=False)
    largest = np.maximum(wide.max(axis=1), -wide.min(axis=1))
    rms = np.sqrt(np.einsum("ij,ij->i", wide, wide) / np.float32(rows.shape[1]))
    scale = np.sqrt(largest) * np.sqrt(rms)  # the roots first: the product may overflow
    return np.where(scale > 0, scale, np.float32(1))


def _store(weight: Weight, coding: _Coding, names: NameSource) -> Change | Skip:
    """Replaces a weight by its coded form if that takes fewer bytes."""
    constant, scope = weight.constant, weight.scope.graph
    before = constant_bytes(constant, scope)
    listed = constant in scope.inputs
    fragment: Fragment = coded_weight(constant, coding.codes, coding.bits, coding.values, scope, names)
    after = fragment.nbytes(scope)
    if after >= before:
        return Skip(weight.site, f"too small to gain: {after} bytes as codes ({coding.detail}), {before} bytes as it is")
    replace_constant(scope, constant, fragment)
    note = "; no longer a graph input that callers can override" if listed else ""
    return Change(weight.site, before, after, coding.detail + note)
