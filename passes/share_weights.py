"""Stores weights as a codebook and small codes: W = codebook[codes].

A weight with at most 2^bits distinct values is stored exactly. Otherwise its values are grouped:

    kmeans     k = 2^bits values of least squared error Σ h (w - codebook[code])² (Lloyd 1982), h from the inputs of the layer where
               they are known: for the tensor, per output channel, or for the tensor after each channel was divided by a scale
    uniform    an affine grid (code - zero point) · scale; |w - w'| ≤ scale / 2 within the range of the grid
    16 bits    no sharing: w rounded to float16, |w - w'| ≤ max(2^-11 |w|, 2^-25), for weights that cannot bear less
    auto       kmeans with scales, and uniform per channel where the codebook would weigh over an eighth of the codes

Scales, grids and codebooks belong to tiles (`onnxshrink.graph.tiling`): one output channel, or ``channels-per-scale`` of them, times
all inputs, or ``block`` of them. Blocks have scales of float16, and grids of one zero point, chosen for least squared error.

With ``bits-per-weight`` or ``sqnr`` the weights share one budget instead: uniform grids, with steps that follow from what each weight
does to the outputs (`onnxshrink.allocation`). Codes then vary in frequency, which pays together with `huffman`.

With calibration data, layers are rewritten in turn, and every column of a weight makes up for the errors of the columns before it
(`onnxshrink.repair`, `onnxshrink.numerics.feedback`). With ``sparsity`` or an N:M ``pattern`` weights are pruned in the same turn: what is
left is solved for, then rounded. Zeros survive exactly: a grid contains zero, and k-means keeps a value for it
when the tensor has more zeros than its share.

The result is decoded by standard ops that ONNX Runtime folds when a session starts (`onnxshrink.graph.codebook`), so it runs as
fast as before. Large embedding tables stay coded in memory: what Gather looks up is decoded then. A weight whose coded form is not
smaller in the file stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np

from onnxshrink.budget import code_for_rate, code_for_sqnr
from onnxshrink.coding import Coding, code_in_turn
from onnxshrink.contract import Change, Context, Pass, Report, Skip
from onnxshrink.errors import OptionError, must
from onnxshrink.graph.codebook import MAX_FOLDED_BYTES, Codebook, first_opset
from onnxshrink.graph.coded import coded_weights
from onnxshrink.graph.edit import NameSource, set_values
from onnxshrink.graph.ir import Graph
from onnxshrink.graph.storage import is_float
from onnxshrink.graph.tiling import Tiling, tiling
from onnxshrink.graph.weights import Weight, weights
from onnxshrink.numerics.distribution import codes_of, distinct_values
from onnxshrink.numerics.grids import fit_grid
from onnxshrink.numerics.level_choice import (
    cell_clusters,
    cell_grids,
    cluster_levels,
    halves,
    relative_scales,
    step_levels,
)
from onnxshrink.numerics.levels import GridLevels, RowLevels
from onnxshrink.numerics.patterns import Pattern
from onnxshrink.options import option
from onnxshrink.repair import Repaired
from onnxshrink.stored import Half, halved, stored
from onnxshrink.targets import Target

__all__ = ["ShareWeights"]

Array = np.ndarray[Any, np.dtype[Any]]
_MOST_BITS, _HALF_BITS = 8, 16
_LEAST_CODES_PER_CODEBOOK = 8  # bits of codes per bit of codebook; with less, a uniform grid is the better bargain
_WEAKER_SQNR_DB, _WEAKER_RATE, _WEAKER_STEP = 1.5, 1.1, 0.7
_FINEST_STEP = 0.02  # in rms: codes of a byte reach no finer with weights of a few rms among the others
_HIGHEST_SQNR_DB = 70.0  # codes of a byte reach no further


@dataclass(frozen=True, kw_only=True)
class ShareWeights(Pass):
    """Stores weights as codebook and codes: exactly where few values occur, else by k-means or on a uniform grid."""

    name: ClassVar[str] = "share-weights"
    rounds_weights: ClassVar[bool] = True
    bits: int = option(8, "bits per code, at most 2^bits values: 1 to 8; or 16, which stores float16", low=1, high=16)
    method: str = option("auto", "how values are grouped; exact changes none", choices=("auto", "exact", "kmeans", "uniform"))
    per: str = option(
        "scale",
        "one set of values for the tensor, one for each output channel, or one times a scale per channel",
        choices=("tensor", "channel", "scale"),
    )
    bits_per_weight: float | None = option(
        None, "mean entropy of all codes, given out so that the outputs suffer least", low=0.1, high=8.0, per_site=False
    )
    sqnr: float | None = option(
        None, "SQNR of the outputs to aim at, in dB, with as few bits as that takes", low=-20.0, high=120.0, per_site=False
    )
    step: float | None = option(None, "step of a uniform grid, in rms of the weights; instead of bits", low=0.001, high=8.0)
    rate_weight: float = option(
        0.0, "squared steps of error that a bit of entropy is worth, for grids with steps", low=0.0, high=4.0, per_site=False
    )
    block: int | None = option(
        None, "inputs in a row that share a scale in each channel: a block of the axis that is summed over", low=4, high=65536
    )
    channels_per_scale: int = option(1, "neighbouring output channels that share scales or values", low=1, high=65536)
    sparsity: float | None = option(
        None, "share of weights set to zero in the same turn, in every layer; N:M patterns imply it", low=0.0, high=1.0
    )
    pattern: str | None = option(None, "of these zeros, as for sparsify; unstructured unless given")
    repair: bool = option(True, "whether calibration data, if any, is used to make up for errors", per_site=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if _MOST_BITS < self.bits < _HALF_BITS:
            raise OptionError(must(self.name, "bits", "1 to 8, or 16 for float16", self.bits))
        given = [_kebab(name) for name in ("bits_per_weight", "sqnr", "step") if getattr(self, name) is not None]
        if len(given) > 1:
            raise OptionError(f"{self.name}: {' and '.join(given[:2])} both set the steps; give one of them")
        if given and self.method == "kmeans":
            raise OptionError(f"{self.name}: {given[0]} sets the steps of uniform grids; leave out method=kmeans")
        if self.per != "scale" and self.has_budget:
            raise OptionError(f"{self.name}: {given[0]} gives every channel a step of its own; leave out per={self.per}")
        tiled = [_kebab(name) for name in ("block", "channels_per_scale") if getattr(self, name) not in (None, 1)]
        if tiled and self.has_budget:
            raise OptionError(f"{self.name}: {given[0]} gives every channel a step of its own; leave out {' and '.join(tiled)}")
        if tiled and self.per == "tensor":
            raise OptionError(f"{self.name}: per=tensor has no scales to share; leave out per=tensor or {' and '.join(tiled)}")
        if self.zeros is not None and self.has_budget:  # asking for zeros checks them, too
            raise OptionError(f"{self.name}: zeros in the same turn want bits or step; with {given[0]} run sparsify before")
        if self.block is not None and self.per == "channel":
            raise OptionError(f"{self.name}: a set of values for every block would outweigh its codes; block wants per=scale")

    @property
    def zeros(self) -> tuple[Pattern, float] | None:
        """The pattern and the share of zeros that weights get before they are rounded, or None.

        Raises:
            OptionError: a pattern or a share that cannot be meant.
        """
        if self.pattern is None and self.sparsity is None:
            return None
        pattern = Pattern.parse(self.pattern or "unstructured")
        if pattern.share is not None and self.sparsity not in (None, pattern.share):
            raise OptionError(must(self.name, "sparsity", f"{pattern.share:g} or left out for {pattern}", self.sparsity))
        share = self.sparsity if pattern.share is None else pattern.share
        if share is None:
            raise OptionError(must(self.name, "sparsity", f"given for {pattern}", None))
        return pattern, share

    @property
    def has_budget(self) -> bool:
        """Whether the weights share one budget."""
        return self.bits_per_weight is not None or self.sqnr is not None

    @property
    def sites_are_independent(self) -> bool:
        """Not if they share one budget."""
        return not self.has_budget

    def spared(self) -> Mapping[str, Any]:
        """Returns the options of weights that cannot bear codes: float16."""
        return {"bits": _HALF_BITS}

    def weaker(self) -> Self | None:
        """Returns the pass with one bit more, a finer step, or a larger budget."""
        if self.sqnr is not None:
            higher = self.sqnr + _WEAKER_SQNR_DB
            return replace(self, sqnr=higher) if higher <= _HIGHEST_SQNR_DB else None
        if self.bits_per_weight is not None:
            more = self.bits_per_weight * _WEAKER_RATE
            return replace(self, bits_per_weight=more) if more <= _MOST_BITS else None
        if self.step is not None and self.bits != _HALF_BITS:
            finer = self.step * _WEAKER_STEP
            return replace(self, step=finer) if finer >= _FINEST_STEP else None
        return replace(self, bits=self.bits + 1) if self.bits < _MOST_BITS else None

    def apply(self, graph: Graph, context: Context) -> Report:
        """Edits the graph in place."""
        coded = [Skip(coded.site, _as_stored(coded.is_sparse)) for coded in coded_weights(graph)]
        found = weights(graph)
        options = {weight.site: context.options(self, weight.names) for weight in found}
        settled = context.map(lambda weight: _settled(weight, options[weight.site]), found)
        lossy = [weight for weight, answer in zip(found, settled, strict=True) if answer is None]
        codings, repaired, notes = self._code(graph, lossy, options, context)
        names = NameSource(graph)
        layers = {id(bias): site for site, (bias, _) in repaired.biases.items()}
        answers = [
            stored(weight, answer or codings.get(weight.site) or halved(weight, weight.constant.values), names)
            for weight, answer in zip(found, settled, strict=True)
            if id(weight.constant) not in layers
        ]
        changed = {answer.site for answer in answers if isinstance(answer, Change)}
        for site, (bias, values) in repaired.biases.items():
            if site in changed:
                set_values(bias, values)
        for weight in found:
            form = _settled(weight, options[weight.site]) if id(weight.constant) in layers else None
            if form is not None:
                answer = stored(weight, form, names)
                if isinstance(answer, Change) or layers[id(weight.constant)] not in changed:
                    answers.append(answer)  # a bias that moved and stays dense is part of its layer, no site left as it was
        changes = [answer for answer in answers if isinstance(answer, Change)]
        return Report(changes, [*coded, *(answer for answer in answers if isinstance(answer, Skip))], notes)

    def _code(
        self, graph: Graph, lossy: Sequence[Weight], options: Mapping[str, Any], context: Context
    ) -> tuple[dict[str, Coding], Repaired, list[str]]:
        """Returns the codings of weights that do not come out exactly, by site; what was done beside; and what to say of it."""
        context = context if self.repair else replace(context, activations=None)
        if not lossy or not self.has_budget:

            def tiles_of(weight: Weight) -> Tiling:
                chosen: ShareWeights = options[weight.site]
                return tiling(weight, chosen.channels_per_scale, chosen.block)

            tilings = {weight.site: tiles for weight, tiles in zip(lossy, context.map(tiles_of, lossy), strict=True)}

            def levels_of(weight: Weight, rows: Array, importance: Array | None) -> tuple[RowLevels, str]:
                return _levels(rows, importance, options[weight.site], tilings[weight.site])

            targets = {
                weight.site: (Target(weight, zeros[0]), zeros[1])
                for weight in lossy
                if (zeros := options[weight.site].zeros) is not None and _can_be_pruned(weight, options[weight.site])
            }
            return *code_in_turn(graph, lossy, levels_of, context, tilings, targets), []
        if self.sqnr is not None:
            codings, repaired, notes = code_for_sqnr(graph, lossy, self.sqnr, context, self.rate_weight)
        else:
            rate = self.bits_per_weight or _MOST_BITS
            codings, repaired, notes = code_for_rate(graph, lossy, rate, context, self.rate_weight)
        if ruled := [weight.site for weight in lossy if options[weight.site] != self]:
            notes = [*notes, f"what rules say of {', '.join(ruled)} has no effect: all weights share one budget"]
        return codings, repaired, notes


def _as_stored(is_sparse: bool) -> str:
    return "is stored as values and where they are; expand the model to share them" if is_sparse else "is stored as codes already"


def _can_be_pruned(weight: Weight, chosen: ShareWeights) -> bool:
    """Whether the zeros that are asked for have a meaning for a weight; tables that are only looked up save nothing by them."""
    return weight.computes and (weight.view is not None or chosen.pattern in (None, "unstructured"))


def _settled(weight: Weight, chosen: ShareWeights | None) -> Coding | Half | Skip | None:
    """Returns what becomes of a weight that need not be approximated, or why it stays dense; None if it is up to grouping."""
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
        return Coding(codes_of(values, distinct), bits, Codebook(distinct), f"exact: {len(distinct)} distinct values")
    if chosen.method == "exact":
        return Skip(weight.site, f"more than {most} distinct values")
    if weight.obstacle is not None:
        return Skip(weight.site, f"more than {most} distinct values; {weight.obstacle}")
    if not np.isfinite(values).all():
        return Skip(weight.site, "holds NaN or infinity")
    if values.dtype == np.float64 and np.abs(values).max() > np.finfo(np.float32).max:
        return Skip(weight.site, "holds values beyond the range of float32")
    return halved(weight, values) if chosen.bits == _HALF_BITS else None


def _levels(rows: Array, importance: Array | None, chosen: ShareWeights, tiles: Tiling) -> tuple[RowLevels, str]:
    """Returns the values that the options give tiles, or all of them where there are none, and one line about them."""
    where = f", {tiles.text}" if tiles.text else ""
    if chosen.per == "tensor":
        importance = None if importance is None else np.tile(importance, len(rows))
        rows, where = rows.reshape(1, -1), ""
    in_blocks = tiles.cells.blocks > 1  # with many scales, two bytes less for each count
    if chosen.step is not None:
        rms = np.float32(np.sqrt(np.mean(np.square(rows, dtype=np.float64))) or 1.0)
        steps = chosen.step * rms * relative_scales(rows, {"tensor": 0.0, "scale": 0.5, "channel": 1.0}[chosen.per])
        steps = halves(steps) if in_blocks else steps
        return step_levels(rows, steps, chosen.rate_weight), f"uniform grid, steps of {chosen.step:g} rms{where}"
    codebook_pays = rows.size * chosen.bits >= _LEAST_CODES_PER_CODEBOOK * 2**chosen.bits * 16
    if chosen.method == "uniform" or (chosen.method == "auto" and not codebook_pays):
        grids = cell_grids(rows, chosen.bits, importance) if in_blocks else GridLevels(fit_grid(rows, chosen.bits))
        return grids, f"uniform grid of {chosen.bits} bits{where}"
    detail = f"k-means to {2**chosen.bits} values{where}"
    if in_blocks:
        return cell_clusters(rows, 2**chosen.bits, importance), f"{detail}, scaled"
    scaled = len(rows) > 1 and chosen.per == "scale"
    each = len(rows) > 1 and chosen.per == "channel"
    levels = cluster_levels(rows, 2**chosen.bits, each=each, scaled=scaled, importance=importance)
    if chosen.zeros is not None and not levels.has_zero:  # too few for a codebook to have an entry for them
        return GridLevels(fit_grid(rows, chosen.bits)), f"uniform grid of {chosen.bits} bits{where}"
    return levels, f"{detail}{', scaled' if scaled else ''}"


def _kebab(name: str) -> str:
    return name.replace("_", "-")
