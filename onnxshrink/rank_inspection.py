"""How many dimensions the weights of a model need, for people: what `low-rank` could save before it hurts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxshrink.contract import Context
from onnxshrink.factor_options import singular_values
from onnxshrink.graph.dequantized import dequantized_copy
from onnxshrink.graph.factor_forms import Form
from onnxshrink.graph.factoring import forms
from onnxshrink.graph.ir import Graph
from onnxshrink.graph.weights import Weight, weights
from onnxshrink.numerics.ranks import rank_at_energy, stable_rank
from onnxshrink.repair import with_grams

__all__ = ["RankInfo", "rank_infos"]

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class RankInfo:
    """One weight that could be cut in two thin pieces; of a grouped convolution, the mean over groups.

    Attributes:
        site: model-wide name.
        op: what multiplies with it.
        sides: rows and columns of its matrix, of one group.
        full: the rank that it could have.
        stable: sum of squared singular values over the largest squared.
        at_90: rank that holds 90 % of the squares.
        at_99: rank that holds 99 %.
        outputs_at_90: rank that holds 90 % of the squared outputs on the calibration inputs; None without any.
        outputs_at_99: rank that holds 99 % of those.
        break_even: largest rank whose two thin pieces have fewer parameters than the weight; interpolative ones have fewer at any.
    """

    site: str
    op: str
    sides: tuple[int, int]
    full: int
    stable: float
    at_90: int
    at_99: int
    outputs_at_90: int | None
    outputs_at_99: int | None
    break_even: int


def rank_infos(graph: Graph, context: Context) -> list[RankInfo]:
    """Returns the weights that can be cut, largest first.

    Args:
        graph: the main graph; only read.
        context: with activations, whose outputs are then looked at too.
    """
    graph = dequantized_copy(graph)
    found = {weight.site: form for weight, form in _first_forms(graph)}
    infos = []
    for weight, grams in with_grams(graph, [form.weight for form in found.values()], context):
        infos.append(_info(found[weight.site], grams))
        context.progress(len(infos), len(found))
    return sorted(infos, key=lambda info: -info.sides[0] * info.sides[1])


def _first_forms(graph: Graph) -> Iterator[tuple[Weight, Form]]:
    for weight, several in forms(graph, weights(graph)):
        if not isinstance(several, str) and several and weight.obstacle is None and np.isfinite(weight.constant.values).all():
            yield weight, next((form for form in several if form.kind == "channel"), several[0])


def _info(form: Form, grams: Array | None) -> RankInfo:
    plain = singular_values(form, None)
    seen = singular_values(form, grams) if grams is not None else None
    geometry = form.geometry
    return RankInfo(
        site=form.weight.site,
        op="+".join(dict.fromkeys(use.op for use in form.weight.uses)),
        sides=(geometry.outputs, geometry.inputs * geometry.positions),
        full=max(form.full),
        stable=float(np.mean([stable_rank(values) for values in plain])),
        at_90=_mean_rank(plain, 0.9),
        at_99=_mean_rank(plain, 0.99),
        outputs_at_90=_mean_rank(seen, 0.9) if seen is not None else None,
        outputs_at_99=_mean_rank(seen, 0.99) if seen is not None else None,
        break_even=form.break_even()[0],
    )


def _mean_rank(values: Array, share: float) -> int:
    return round(float(np.mean([rank_at_energy(one, share) for one in values])))
