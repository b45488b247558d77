"""What it costs a model to lose channels, and what the layers that read them become.

    curves = loss_curves(graph, found, scores, context)       what so many channels less of each group do to the outputs
    values, repaired = mask(graph, {candidate: channels}, context)
    cut_channels(...)                                         once nothing reads the channels they can go without a trace

Cutting is exact once every weight that reads a channel is zero there, so a model is repaired at its full size, with elements masked: in
the order in which it runs, every layer that reads a channel that goes is solved again against what the ORIGINAL computes, with the inputs
that the layers before it, masked and solved already, give it (`onnxshrink.repair`; He et al., arXiv 1707.06168).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxshrink.contract import Context
from onnxshrink.graph.channel_readers import Candidate
from onnxshrink.graph.ir import Constant, Graph
from onnxshrink.graph.weights import Weight, weights
from onnxshrink.numerics.elimination import solve_kept
from onnxshrink.numerics.floatbits import rounded_to
from onnxshrink.repair import Repaired, rewrite_in_turn, with_grams
from onnxshrink.sensitivity import OutputProbe

__all__ = ["LossCurve", "loss_curves", "mask", "repair_helps"]

Array = np.ndarray[Any, np.dtype[Any]]
_SHARES = (0.125, 0.25, 0.5, 0.75)  # of a group's channels: how many less are tried out
_FREE = 1e-12  # of the whole loss: what was thought to cost less may turn out not to
_TINY = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True, eq=False)
class LossCurve:
    """What a group loses with its channels.

    Attributes:
        order: intp [channels]: which go first.
        losses: float64 [channels + 1], ascending from 0: the loss once so many are gone; losses of groups add up.
    """

    order: Array
    losses: Array

    @classmethod
    def of(cls, scores: Array) -> LossCurve:
        """Returns the curve of channels whose scores [channels] add up."""
        order = np.argsort(scores, kind="stable")
        return cls(order, np.concatenate([[0.0], np.cumsum(scores[order])]))

    def through(self, counts: Sequence[int], losses: Sequence[float]) -> LossCurve:
        """Returns a curve of this one's shape through what was measured once so many channels were gone."""
        every = np.arange(len(self.losses))
        measured = np.maximum(np.maximum.accumulate(losses), _TINY)
        shape = self.losses / self.losses[-1] if self.losses[-1] > 0 else every / every[-1]
        shape = np.maximum(shape, _FREE)
        factors = np.log(measured) - np.log(shape[list(counts)])
        curve = shape * np.exp(np.interp(every, counts, factors))
        ends = np.searchsorted(counts, every)  # of two points that were tried out, what lies between is between their losses
        curve = np.clip(curve, np.concatenate([[0.0], measured])[ends], np.concatenate([measured, [np.inf]])[ends])
        curve[list(counts)] = measured
        curve[0] = 0.0
        return LossCurve(self.order, np.maximum.accumulate(curve))


def loss_curves(
    graph: Graph, found: Sequence[Candidate], curves: Sequence[LossCurve], context: Context, probe: OutputProbe, repair: bool = True
) -> list[LossCurve]:
    """Returns what so many channels less of each group, whole and by itself, do to the outputs: squared drifts.

    Args:
        graph: the main graph; not changed.
        found: its groups.
        curves: for each in which order channels go, and the shape of the curve between the points that are tried out.
        context: with activations to solve the readers again.
        probe: on inputs that are not among those.
        repair: whether they are solved again at all.
    """
    trials = [sorted({max(round(share * len(curve.order)), 1) for share in _SHARES}) for curve in curves]
    waiting = [{reader.weight.site: reader for reader in candidate.readers} for candidate in found]
    values: list[list[dict[str, Array]]] = [[{} for _ in counts] for counts in trials]
    every = {reader.weight.site: reader.weight for candidate in found for reader in candidate.readers}
    measured = list(curves)
    done = 0

    def measure(index: int, tried: Iterable[Mapping[str, Array]]) -> None:
        nonlocal done
        measured[index] = curves[index].through(trials[index], [probe.loss(one) for one in tried])
        context.progress(done := done + 1, len(found))

    for index, candidate in enumerate(found):
        if not waiting[index]:  # products of two things computed: what computes the channels is zero instead
            measure(index, (_silenced(graph, candidate, curves[index].order[:count]) for count in trials[index]))
    for weight, grams in with_grams(graph, list(every.values()), context):
        matrix = weight.layout.forward(weight.constant.values).astype(np.float64)
        for index, left in enumerate(waiting):
            reader = left.pop(weight.site, None)
            if reader is None:
                continue
            for tried, count in zip(values[index], trials[index], strict=True):
                kept = ~np.isin(reader.owners, curves[index].order[:count])
                tried[weight.site] = _stored(weight, _masked(matrix, grams if repair else None, kept))
            if not left:
                measure(index, values[index])
                values[index] = []
    return measured


def mask(
    graph: Graph, gone: Mapping[Candidate, Array], context: Context, *, repair: bool = True
) -> tuple[dict[str, Array], Repaired]:
    """Returns new values of weights by site, with nothing left of what reads the channels that go, and what was done beside.

    Args:
        graph: the main graph; not changed.
        gone: the channels of each group that go.
        context: with activations to solve the rest again; without, by what the weights before a layer let expect of its inputs.
        repair: whether the rest is solved again.

    Raises:
        ValidationError: the model does not run on the calibration inputs, or an activation is not finite.
    """
    kept: dict[str, Array] = {}
    readers: dict[str, Weight] = {}
    for candidate, channels in gone.items():
        for reader in candidate.readers:
            stays = ~np.isin(reader.owners, channels)
            kept[reader.weight.site] = kept.get(reader.weight.site, np.True_) & stays
            readers[reader.weight.site] = reader.weight
    if not repair:
        whole = {site: weight.layout.forward(weight.constant.values).astype(np.float64) for site, weight in readers.items()}
        return {site: _stored(readers[site], np.where(kept[site], matrix, 0.0)) for site, matrix in whole.items()}, Repaired()
    values: dict[str, Array] = {}

    def rewrite(weight: Weight, wanted: Array, grams: Array | None) -> Array:
        values[weight.site] = _stored(weight, _masked(wanted, grams, kept[weight.site]))
        return weight.layout.forward(values[weight.site]).astype(np.float64)

    return values, rewrite_in_turn(graph, list(readers.values()), rewrite, context, guess=True)


def _silenced(graph: Graph, candidate: Candidate, gone: Array) -> dict[str, Array]:
    sites = {id(weight.constant): weight.site for weight in weights(graph)}
    values: dict[str, Array] = {}
    for member in candidate.group.weights:
        site = sites.get(id(member.tensor))
        if site is not None and isinstance(member.tensor, Constant):
            stays = ~np.isin(member.places, gone).reshape([-1 if axis == member.axis else 1 for axis in range(member.rank)])
            values[site] = np.where(stays, values.get(site, member.tensor.values), 0).astype(member.tensor.dtype)
    return values


def repair_helps(
    graph: Graph, gone: Mapping[Candidate, Array], values: Mapping[str, Array], repaired: Repaired, context: Context
) -> bool:
    """Whether the outputs on calibration inputs are nearer to the original's with repair than without; True where nothing tells.

    Args:
        graph: the main graph; not changed.
        gone: the channels of each group that go.
        values: of the readers, repaired, by site.
        repaired: what was done beside.
        context: with activations to measure on.
    """
    if context.activations is None or not (probe := OutputProbe(graph, context.activations)).is_possible:
        return True
    sites = {id(weight.constant): weight.site for weight in weights(graph)}
    biases = {sites[id(constant)]: array for constant, array in repaired.biases.values() if id(constant) in sites}
    plain, _ = mask(graph, gone, context, repair=False)
    return probe.squared_drift({**values, **biases}) <= probe.squared_drift(plain)


def _masked(wanted: Array, grams: Array | None, kept: Array) -> Array:
    """Returns a matrix with some elements zero, the rest solved again where inputs are known and whole columns go."""
    if grams is not None and (kept == kept[0]).all():
        return solve_kept(wanted, grams, kept[0])
    return np.where(kept, wanted, 0.0)


def _stored(weight: Weight, matrix: Array) -> Array:
    """Returns a matrix as the tensor that stores it; rows that float16 cannot hold stay as they are, but for zeros."""
    original = weight.layout.forward(weight.constant.values)
    new = rounded_to(matrix, original.dtype)
    beyond = ~np.isfinite(new).all(axis=1, keepdims=True)
    values: Array = weight.layout.inverse(np.where(beyond, np.where(matrix == 0, matrix, original), new).astype(original.dtype))
    return values
