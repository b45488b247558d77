"""The groups of channels of a model, for people: what is cut together, how much work it is, and why something cannot be cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxshrink.graph.channel_costs import inferred_macs, macs_cost, stored_cost
from onnxshrink.graph.channel_groups import ChannelGroup, find_channels
from onnxshrink.graph.ir import Constant, Graph

__all__ = ["GroupInfo", "MemberInfo", "group_infos"]


@dataclass(frozen=True)
class MemberInfo:
    """An axis of a stored tensor on which channels of a group lie.

    Attributes:
        tensor: its name.
        axis: of it.
        size: of the axis.
        role: ``produces`` channels, ``consumes`` them, or ``follows``, as biases do.
    """

    tensor: str
    axis: int
    size: int
    role: str


@dataclass(frozen=True)
class GroupInfo:
    """Channels that are cut together.

    Attributes:
        name: of the first weight that produces them, else of what computes them.
        channels: how many there are.
        members: the stored tensors on whose axes they lie.
        macs: share of the model's multiply-accumulates that has to do with them; None if the model has none.
        params: share of the numbers stored in the main graph that has to do with them.
        obstacle: why none can be cut; empty if each can.
        resliced: sites of sums and means over the channels, which after a cut would be those of what is left.
    """

    name: str
    channels: int
    members: Sequence[MemberInfo]
    macs: float | None
    params: float
    obstacle: str
    resliced: Sequence[str]


def group_infos(graph: Graph, macs: Mapping[int, float] | None) -> list[GroupInfo]:
    """Returns the groups of a model, those that can be cut first, most work first.

    Args:
        graph: the main graph; only read.
        macs: multiply-accumulates by id of the node, where they were measured; else they are inferred.
    """
    channels = find_channels(graph)
    groups = channels.groups
    work = macs_cost(channels, groups, inferred_macs(channels) if macs is None else macs)
    stored = stored_cost(channels, groups, lambda constant: constant.size)
    sizes = np.array([group.size for group in groups], np.float64)
    without = sizes - np.diag(sizes)  # one row for each group, which is gone
    totals = float(work.of(sizes)), float(stored.of(sizes))
    gone = [np.maximum(total - cost.of(without), 0.0) for total, cost in zip(totals, (work, stored), strict=True)]
    infos = [
        GroupInfo(
            name=group.name,
            channels=group.size,
            members=_members(group),
            macs=float(gone[0][index]) / totals[0] if totals[0] else None,
            params=float(gone[1][index]) / totals[1] if totals[1] else 0.0,
            obstacle="" if group.reason is None else str(group.reason),
            resliced=group.resliced,
        )
        for index, group in enumerate(groups)
    ]
    return sorted(infos, key=lambda info: (bool(info.obstacle), -(info.macs or 0.0), -info.params))


def _members(group: ChannelGroup) -> list[MemberInfo]:
    return [
        MemberInfo(member.tensor.name, member.axis, len(member.places), member.role)
        for member in group.members
        if isinstance(member.tensor, Constant)
    ]
