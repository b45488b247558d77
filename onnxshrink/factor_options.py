"""What may become of a weight that can be factored: every form at some ranks, with what it costs and what its layer loses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxshrink.graph.factor_forms import Form, Ranks
from onnxshrink.graph.weights import Weight
from onnxshrink.numerics.low_rank import spectrum
from onnxshrink.numerics.widths import rungs

__all__ = ["Option", "Target", "layer_losses", "layer_options", "singular_values", "worth_their_cost"]

Array = np.ndarray[Any, np.dtype[Any]]
_SPECTRAL = ("channel", "interpolative", "recurrent-input", "two-products")  # whose error at every rank follows from one decomposition
_ROUNDING = 1e-8  # of the squared outputs: what pieces in float32 lose at most, beyond the ranks that are cut
_TRIED = 6  # of these, to see what such a form loses beyond it
_LARGE = 1024  # rank beyond which trying one takes seconds
_RANKS, _FEW_RANKS = 24, 8  # of a form that are considered
_TINY = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True, eq=False)
class Target:
    """A weight that may be factored.

    Attributes:
        weight: it.
        forms: in which it may be cut.
        cost: of the weight as it is, in the unit of the budget.
        by_work: whether that is multiply-accumulates; else it is parameters.
        block: ranks are multiples of it.
        stored: bytes of the weight in the file; 0 if it does not matter what pieces take.
    """

    weight: Weight
    forms: tuple[Form, ...]
    cost: float
    by_work: bool = False
    block: int = 1
    stored: int = 0

    @property
    def price(self) -> float:
        """Bytes that an element of pieces takes for each byte of one of the weight: other than 1 where they are of another type."""
        form = self.forms[0]
        return form.dtype.itemsize * form.whole / self.stored if self.stored else 1.0

    def cost_at(self, form: Form, ranks: Ranks) -> float:
        """Returns what the pieces of a form cost at some ranks."""
        return self.cost * (form.macs(ranks) if self.by_work else self.price * form.parameters(ranks)) / form.whole

    def break_even(self, form: Form) -> Ranks:
        """Returns the largest ranks of a form that cost less than the weight, whatever the block; zeros if none do."""
        return form.break_even("macs") if self.by_work else form.break_even("parameters", self.price)

    def pays(self, form: Form, ranks: Ranks) -> bool:
        """Whether pieces cost less than the weight, and take fewer bytes with their nodes unless it is work that is to be saved."""
        fits = self.by_work or not self.stored or form.nbytes(ranks) + form.node_bytes < self.stored
        return fits and self.cost_at(form, ranks) < self.cost

    def paying(self, form: Form) -> list[Ranks]:
        """Returns the ranks of a form that pay, largest first."""
        full = max(form.full)
        every = dict.fromkeys(form.at(width / full) for width in rungs(full, self.block, self.block))
        return [ranks for ranks in every if self.pays(form, ranks)]

    def ranks(self, form: Form, *, every: bool = False) -> list[Ranks]:
        """Returns some of them, evenly spread, that are tried out; all if that is asked for and costs next to nothing."""
        paying, most = self.paying(form), _RANKS if form.kind in _SPECTRAL else _FEW_RANKS
        if every and form.kind in _SPECTRAL:
            return paying
        return [paying[index] for index in np.unique(np.linspace(0, len(paying) - 1, most).round().astype(int))] if paying else []


@dataclass(frozen=True, eq=False)
class Option:
    """What may become of a weight.

    Attributes:
        form: None for the weight as it is.
        ranks: of the form.
        cost: in the unit of the budget.
        loss: squared, relative: of the layer's outputs, or, once that was tried out, of the model's.
    """

    form: Form | None
    ranks: Ranks
    cost: float
    loss: float


def layer_options(target: Target, grams: Array | None) -> list[Option]:
    """Returns the options of one weight, dearest first: as it is, and all that lose less than any that costs no more.

    Args:
        target: it.
        grams: float64 [groups, columns, columns] of what it meets; without any, losses are those of the weight itself.
    """
    shared = next((singular_values(form, grams) for form in target.forms if form.kind in _SPECTRAL), None)
    tried = [
        Option(form, ranks, target.cost_at(form, ranks), loss)
        for form in target.forms
        for tried_ranks in [target.ranks(form)]
        for ranks, loss in zip(tried_ranks, layer_losses(form, tried_ranks, grams, shared), strict=True)
    ]
    return [Option(None, (), target.cost, 0.0), *reversed(worth_their_cost(tried))]


def worth_their_cost(options: Sequence[Option]) -> list[Option]:
    """Returns the options that lose less than any that costs no more, beyond what rounding does; cheapest first."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda option: (option.cost, option.loss)):
        if not kept or option.loss + _ROUNDING < kept[-1].loss:
            kept.append(option)
    return kept


def layer_losses(form: Form, every: Sequence[Ranks], grams: Array | None, known: Array | None = None) -> list[float]:
    """Returns the squared error of a layer's outputs at each of several ranks, relative to their squares.

    Args:
        form: of the layer's weight.
        every: ranks of it.
        grams: of what the layer meets, or None.
        known: `singular_values` of the weight, all forms of which have the same.
    """
    if not every:
        return []
    if form.kind in _SPECTRAL:
        squares = np.square(singular_values(form, grams) if known is None else known)
        total = max(float(squares.sum()), _TINY)
        cut = np.array([float(squares[:, ranks[0] :].sum()) for ranks in every])
        return list((cut + _extra(form, every, grams)) / total)
    matrix = form.matrix
    return [_error(matrix, form.product(form.factor(matrix, ranks, grams)), grams) for ranks in every]


def _extra(form: Form, every: Sequence[Ranks], grams: Array | None) -> Array:
    """Returns what a form loses beyond the singular values that are cut: measured at a few ranks, and taken to be as much in between."""
    ranks = np.array([one[0] for one in every])
    count = _TRIED if ranks.max() <= _LARGE else 2
    tried = np.unique(np.quantile(ranks, np.linspace(0, 1, count), method="nearest"))
    measured = np.array(form.extra_losses([(int(rank),) for rank in tried], grams))
    found: Array = np.maximum(measured[np.searchsorted(tried, ranks)], measured[np.searchsorted(tried, ranks, side="right") - 1])
    return found


def _error(matrix: Array, product: Array, grams: Array | None) -> float:
    """Returns the squared error of a layer's outputs relative to their squares; of its weights where inputs are not known."""
    change = product - matrix
    if grams is None:
        return float(np.square(change).sum()) / max(float(np.square(matrix).sum()), _TINY)
    parts = zip(np.split(change, len(grams)), np.split(matrix, len(grams)), grams, strict=True)
    wrong, right = np.sum([(np.sum(one @ gram * one), np.sum(other @ gram * other)) for one, other, gram in parts], axis=0)
    return float(max(wrong, 0.0) / max(right, _TINY))


def singular_values(form: Form, grams: Array | None) -> Array:
    """Returns the whitened singular values of a weight, of all groups of rows: float64 [groups, smaller side], descending."""
    geometry = form.geometry
    if form.kind == "recurrent-input" and grams is not None:  # directions meet the same inputs
        grams = grams.mean(axis=0, keepdims=True)
    values: Array = spectrum(form.matrix.reshape(geometry.groups, geometry.outputs, -1), grams)
    return values
