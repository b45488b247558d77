"""What the channels of each group are worth, by one of several criteria.

    reconstruction   what the outputs of the layers that read a channel miss once the other channels have made up for it
    activation       its energy: the sum of its squares over the calibration inputs
    bn-scale         |scale| of the normalization that it comes from (Liu et al., arXiv 1708.06519)
    l1 l2 fpgm lamp  of the weights that compute it, and l1, l2, lamp also of those that read it: `onnxshrink.numerics.importance`
    random           for control

Channels that are coupled are worth what all members of their group say of them together: scores of each member are divided by their sum,
and the mean over members is taken (Fang et al., DepGraph, arXiv 2301.12900).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import numpy as np

from onnxshrink.contract import Context
from onnxshrink.graph.channel_groups import ChannelGroup, Member
from onnxshrink.graph.channel_readers import Candidate, Reader
from onnxshrink.graph.channel_sites import CONSUMES, PRODUCES
from onnxshrink.graph.ir import Constant, Graph
from onnxshrink.numerics.elimination import eliminate
from onnxshrink.numerics.importance import Measure, filter_scores
from onnxshrink.repair import with_grams

__all__ = ["CHANNEL_CRITERIA", "ChannelCriterion", "channel_scores"]

Array = np.ndarray[Any, np.dtype[Any]]
ChannelCriterion = Literal["reconstruction", "activation", "bn-scale", "l1", "l2", "fpgm", "lamp", "random"]
CHANNEL_CRITERIA: tuple[str, ...] = get_args(ChannelCriterion)
_TINY = float(np.finfo(np.float64).tiny)


def channel_scores(graph: Graph, found: Sequence[Candidate], criterion: ChannelCriterion, context: Context) -> list[Array]:
    """Returns for each group the score of every channel, float64 [channels], not negative; what scores least goes first.

    By ``reconstruction`` a score is a squared error relative to the squared outputs of the layers that read the channel, summed over
    them, and without calibration data what weights before a layer let expect of its inputs; by others the scores of a group add up to 1, or
    are those of LAMP. Where inputs of layers are not known, or a group has no normalization, l2 stands in.

    Args:
        graph: the main graph; not changed.
        found: groups of it.
        criterion: one of the above.
        context: for activations and randomness.
    """
    if criterion == "reconstruction" or (criterion == "activation" and context.activations is not None):
        return _by_inputs(graph, found, criterion, context)
    if criterion == "random":
        return [context.rng(candidate.group.name).random(candidate.group.size) for candidate in found]
    if criterion == "bn-scale":
        return [_normalization(candidate.group) for candidate in found]
    measure: Measure = criterion if criterion in ("l1", "fpgm", "lamp") else "l2"
    return [_by_weights(candidate.group, measure) for candidate in found]


def _by_inputs(graph: Graph, found: Sequence[Candidate], criterion: ChannelCriterion, context: Context) -> list[Array]:
    scores = [np.zeros(candidate.group.size) for candidate in found]
    of: dict[str, list[tuple[int, Reader]]] = {}
    for index, candidate in enumerate(found):
        for reader in candidate.readers:
            of.setdefault(reader.weight.site, []).append((index, reader))
    readers = {reader.weight.site: reader.weight for jobs in of.values() for _, reader in jobs}
    rule = _missed if criterion == "reconstruction" else _energy
    done = 0
    for weight, grams in with_grams(graph, list(readers.values()), context, guess=True):
        for index, reader in of[weight.site]:
            scores[index] += rule(reader, grams, len(scores[index]))
        context.progress(done := done + 1, len(readers))
    if criterion == "activation":
        scores = [_normalized(one) for one in scores]
    return [one if one.any() else _by_weights(candidate.group, "l2") for one, candidate in zip(scores, found, strict=True)]


def _missed(reader: Reader, grams: Array | None, channels: int) -> Array:
    matrix = reader.weight.layout.forward(reader.weight.constant.values).astype(np.float64)
    if grams is not None and reader.columns is not None:
        return eliminate(matrix, grams, reader.columns, channels).scores
    return _shares(np.square(matrix), reader.owners, channels) / max(float(np.square(matrix).sum()), _TINY)


def _energy(reader: Reader, grams: Array | None, channels: int) -> Array:
    if grams is None or reader.columns is None:
        return np.zeros(channels)
    return _normalized(_shares(np.diagonal(grams, axis1=1, axis2=2).sum(axis=0), reader.columns, channels))


def _shares(amounts: Array, owners: Array, channels: int) -> Array:
    owned = owners >= 0
    shares: Array = np.bincount(owners[owned], amounts[owned], channels)
    return shares


def _normalized(scores: Array) -> Array:
    return scores / max(float(scores.sum()), _TINY)


def _by_weights(group: ChannelGroup, measure: Measure) -> Array:
    roles = (PRODUCES,) if measure == "fpgm" else (PRODUCES, CONSUMES)
    scored = [filter_scores(filters, measure) for filters in _filters(group, roles)]
    if not scored:
        return np.ones(group.size) / group.size
    mean: Array = np.mean([scores if measure == "lamp" else _normalized(scores) for scores in scored], axis=0)
    return mean


def _filters(group: ChannelGroup, roles: Sequence[str]) -> Iterator[Array]:
    """Yields the elements of each weight by channel: [channels, elements]; of channels with fewer than others, zeros for the rest."""
    for member in group.weights:
        if member.role in roles and isinstance(member.tensor, Constant):
            yield _by_channel(member, member.tensor, group.size)


def _by_channel(member: Member, constant: Constant, channels: int) -> Array:
    rows = np.moveaxis(constant.values, member.axis, 0).reshape(len(member.places), -1)
    order = np.argsort(member.places, kind="stable")
    owners = member.places[order]
    order, owners = order[owners >= 0], owners[owners >= 0]
    counts = np.bincount(owners, minlength=channels)
    at = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
    found = np.zeros((channels, int(counts.max(initial=0)), rows.shape[1]))
    found[owners, at] = rows[order]
    return found.reshape(channels, -1)


def _normalization(group: ChannelGroup) -> Array:
    """Returns the shares of |scale| over all BatchNormalizations of a group; those of l2 where it has none."""
    scored = []
    for member in group.weights:
        norms = [node for node in member.tensor.outputs if node.op == "BatchNormalization" and node.inputs[1] is member.tensor]
        if norms and isinstance(member.tensor, Constant):
            scored.append(_normalized(filter_scores(_by_channel(member, member.tensor, group.size), "l1")))
    if not scored:
        return _by_weights(group, "l2")
    mean: Array = np.mean(scored, axis=0)
    return mean
