"""Which weights sum over the channels of a group, and which of their elements meet which channel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from onnxshrink.graph.channel_groups import FOLLOWS, ChannelGroup
from onnxshrink.graph.channel_sites import CONSUMES
from onnxshrink.graph.ir import Graph
from onnxshrink.graph.storage import is_float
from onnxshrink.graph.weights import Weight, weights

__all__ = ["Candidate", "Reader", "candidates"]

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class Reader:
    """A weight that sums over channels of a group.

    Attributes:
        weight: it.
        owners: int32, of the shape of the weight's layout: the channel that each element is multiplied with, -1 for none of the group's.
    """

    weight: Weight
    owners: Array

    @cached_property
    def columns(self) -> Array | None:
        """The channel that each column is multiplied with, int32 [columns]; None where that depends on the row."""
        first: Array = self.owners[0]
        return first if (self.owners == first).all() else None


@dataclass(frozen=True, eq=False)
class Candidate:
    """A group that can be cut, with the weights that sum over its channels."""

    group: ChannelGroup
    readers: tuple[Reader, ...]


def candidates(graph: Graph, groups: Sequence[ChannelGroup]) -> list[Candidate]:
    """Returns groups with their readers.

    Args:
        graph: the main graph.
        groups: found in it.
    """
    known = {id(weight.constant): weight for weight in weights(graph)}
    return [Candidate(group, tuple(_readers(group, known))) for group in groups]


def _readers(group: ChannelGroup, known: Mapping[int, Weight]) -> Iterator[Reader]:
    for member in group.weights:
        weight = known.get(id(member.tensor))
        if weight is None or not is_float(weight.constant.dtype) or (member.role != CONSUMES and not weight.computes):
            continue
        along = [1] * member.rank
        along[member.axis] = -1
        everywhere = np.broadcast_to(member.places.astype(np.int32).reshape(along), weight.constant.shape)
        reader = Reader(weight, weight.layout.forward(everywhere))
        if member.role == CONSUMES or (member.role == FOLLOWS and weight.view is not None and reader.columns is not None):
            yield reader  # the latter behind a Reshape, which roles do not pass
