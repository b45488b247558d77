"""Stores weights as a codebook and small codes: W = codebook[codes].

A weight with at most 2^bits distinct values is stored exactly. Otherwise its values are grouped:

    kmeans     k = 2^bits values of least squared error Σ (w - codebook[code])² (Lloyd 1982): for the tensor, per output channel,
               or for the tensor after each channel c was divided by a scale s_c = √(max |w_c| · rms(w_c))
    uniform    an affine grid (code - zero point) · scale; |w - w'| ≤ scale / 2 within the range of the grid
    16 bits    no sharing: w rounded to float16, |w - w'| ≤ max(2^-11 |w|, 2^-25), for weights that cannot bear less
    auto       kmeans with scales, and uniform per channel where the codebook would weigh over an eighth of the codes

The scale lies between the two usual ones: dividing by max |w_c| spends codes on a few large weights, dividing by the rms leaves
these far out. Zeros survive exactly: the grid contains zero, and k-means keeps one value for it when the tensor has more zeros than
its share.
The result is decoded by standard ops that ONNX Runtime folds when a session starts (`onnxshrink.graph.codebook`), so it runs as
fast as before. A weight whose coded form is not smaller in the file stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np

from onnxshrink.contract import Change, Context, Pass, Report, Skip
from onnxshrink.errors import OptionError, must
from onnxshrink.graph.codebook import (
    MAX_FOLDED_BYTES,
    Codebook,
    UniformGrid,
    coded_weight,
    first_opset,
    half_weight,
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
_MOST_BITS, _HALF_BITS = 8, 16
_LEAST_CODES_PER_CODEBOOK = 8  # bits of codes per bit of codebook; with less, a uniform grid is the better bargain


@dataclass(frozen=True)
class _Coding:
    """What a weight becomes: codes below 2**bits, what they stand for, and one line about it."""

    codes: np.ndarray[Any, np.dtype[np.uint8]]
    bits: int
    values: Codebook | UniformGrid
    detail: str


@dataclass(frozen=True)
class _Half:
    """What a weight becomes when it is rounded to float16."""

    detail: str = "float16"


@dataclass(frozen=True, kw_only=True)
class ShareWeights(Pass):
    """Stores weights as codebook and codes: exactly where few values occur, else by k-means or on a uniform grid."""

    name: ClassVar[str] = "share-weights"
    bits: int = option(8, "bits per code, at most 2^bits values: 1 to 8; or 16, which stores float16", low=1, high=16)
    method: str = option("auto", "how values are grouped; exact changes none", choices=("auto", "exact", "kmeans", "uniform"))
    per: str = option(
        "scale",
        "one set of values for the tensor, one for each output channel, or one times a scale per channel",
        choices=("tensor", "channel", "scale"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if _MOST_BITS < self.bits < _HALF_BITS:
            raise OptionError(must(self.name, "bits", "1 to 8, or 16 for float16", self.bits))

    def spared(self) -> Mapping[str, Any]:
        """Returns the options of weights that cannot bear codes: float16."""
        return {"bits": _HALF_BITS}

    def weaker(self) -> Self | None:
        """Returns the pass with one bit more."""
        return replace(self, bits=self.bits + 1) if self.bits < _MOST_BITS else None

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


def _code(weight: Weight, chosen: ShareWeights | None) -> _Coding | _Half | Skip:
    """Returns how a weight is coded, or why it stays dense."""
    constant = weight.constant
    if chosen is None:
        return Skip(weight.site, "left alone by a rule")
    if not is_float(constant.dtype):
        return Skip(weight.site, f"holds {constant.dtype} values, not floating point")
    opset, first = weight.scope.graph.opset, first_opset(weight.scope.graph)
    if opset < first:
        return Skip(weight.site, f"opset {opset} is below {first}, the first that can decode it")
    if constant.size * max(constant.dtype.itemsize, 4) > MAX_FOLDED_BYTES:
        return Skip(weight.site, f"{constant.size} elements: ONNX Runtime folds at most {MAX_FOLDED_BYTES} bytes at session start")
    values = constant.values
    most = 2 ** min(chosen.bits, _MOST_BITS)
    distinct = distinct_values(values, most)
    if distinct is not None:
        bits = max(1, int(np.ceil(np.log2(len(distinct)))))
        return _Coding(codes_of(values, distinct), bits, Codebook(distinct), f"exact: {len(distinct)} distinct values")
    if chosen.method == "exact":
        return Skip(weight.site, f"more than {most} distinct values")
    if weight.obstacle is not None:
        return Skip(weight.site, f"more than {most} distinct values; {weight.obstacle}")
    if not np.isfinite(values).all():
        return Skip(weight.site, "holds NaN or infinity")
    if values.dtype == np.float64 and np.abs(values).max() > np.finfo(np.float32).max:
        return Skip(weight.site, "holds values beyond the range of float32")
    if chosen.bits == _HALF_BITS:
        return _halve(weight, values)
    return _approximate(values, weight.view.channel_axis if weight.view is not None else None, chosen)


def _halve(weight: Weight, values: Array) -> _Half | Skip:
    """Returns the float16 form of a weight of 4 or 8 bytes an element that fits its range."""
    if values.dtype.itemsize <= 2:
        return Skip(weight.site, f"is {values.dtype} already")
    if max(-values.min(), values.max()) > np.finfo(np.float16).max:
        return Skip(weight.site, "has values beyond the range of float16")
    return _Half()


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
    largest = np.where(largest > 0, largest, np.float32(1))
    relative = wide / largest[:, None]  # squares of the weights themselves may leave the range of float32
    mean_square = np.einsum("ij,ij->i", relative, relative) / np.float32(rows.shape[1])
    return np.where(mean_square > 0, largest * np.sqrt(np.sqrt(mean_square)), np.float32(1))


def _store(weight: Weight, coding: _Coding | _Half, names: NameSource) -> Change | Skip:
    """Replaces a weight by its coded form if that takes fewer bytes."""
    constant, scope = weight.constant, weight.scope.graph
    before = constant_bytes(constant, scope)
    listed = constant in scope.inputs
    fragment: Fragment = (
        half_weight(constant, scope, names)
        if isinstance(coding, _Half)
        else coded_weight(constant, coding.codes, coding.bits, coding.values, scope, names)
    )
    after = fragment.nbytes(scope)
    if after >= before:
        return Skip(weight.site, f"too small to gain: {after} bytes as codes ({coding.detail}), {before} bytes as it is")
    replace_constant(scope, constant, fragment)
    note = "; no longer a graph input that callers can override" if listed else ""
    return Change(weight.site, before, after, coding.detail + note)
