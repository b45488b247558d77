"""Groups of channels that layers share: what must be cut together, and why something cannot be.

    >>> from onnxshrink.graph.files import load                                            # doctest: +SKIP
    >>> channels = find_channels(load("model.onnx"))                                       # doctest: +SKIP
    >>> [(group.name, group.size, str(group.reason or "")) for group in channels.groups]   # doctest: +SKIP

A channel is a class of positions, one or more along each of some axes: rows of the weight that computes it, its bias and statistics,
columns of every weight that sums over it. Channels on the same axes form a group; of each group, any may be cut but not all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import AttributeProto

from onnxshrink.graph.channel_roles import stored_roles
from onnxshrink.graph.channel_rules import rule_of
from onnxshrink.graph.channel_sites import PRODUCES, Rule, Site
from onnxshrink.graph.excerpt import reads
from onnxshrink.graph.ir import Constant, Graph, Node, Tensor
from onnxshrink.graph.positions import Ids, Positions, Reason
from onnxshrink.graph.shape_arithmetic import Sizes
from onnxshrink.graph.static_shapes import shapes_and_sizes
from onnxshrink.graph.structure import Structure
from onnxshrink.graph.tensor_shapes import Dims

__all__ = ["FOLLOWS", "ChannelGroup", "Channels", "Member", "channel_groups", "find_channels"]

Array = np.ndarray[Any, np.dtype[Any]]
FOLLOWS = "follows"


@dataclass(frozen=True, eq=False)
class Member:
    """An axis on which channels of a group lie.

    Attributes:
        tensor: a constant, or what a node computes.
        axis: of it.
        rank: how many axes it has.
        role: of a constant: ``produces`` the channels, ``consumes`` them (sums over them), or ``follows`` (a bias, a depthwise weight);
            empty for what nodes compute.
        places: for each position of the axis the channel of the group that it belongs to, -1 if none: [size].
    """

    tensor: Tensor
    axis: int
    rank: int
    role: str
    places: Ids


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that lie on the same axes.

    Attributes:
        name: of the first constant that produces them, else of what computes them; that of another group, where only a part of what a
            constant produces has the same fate.
        classes: what `Positions` calls each channel: [size].
        members: every axis, in the order of the graph, constants first.
        reason: why none of them can be cut, None if each can.
        resliced: sites of sums and means over these channels, which after a cut are those of what is left.
    """

    name: str
    classes: Ids
    members: tuple[Member, ...]
    reason: Reason | None
    resliced: tuple[str, ...]

    @property
    def size(self) -> int:
        """The number of channels."""
        return len(self.classes)

    @property
    def weights(self) -> list[Member]:
        """The members that are stored, biases and statistics among them."""
        return [member for member in self.members if isinstance(member.tensor, Constant)]


@dataclass(frozen=True, eq=False)
class Channels:
    """What is known of the channels of a graph, until the graph is changed.

    Attributes:
        graph: the main graph.
        positions: the relation behind the groups.
        sites: the nodes whose op has a rule, with it.
        groups: those on whose axes weights produce or consume channels, or are read by an op without a rule; in graph order.
        barriers: how many nodes of which op stand in the way for want of a rule.
        structure: of the graph when they were found.
    """

    graph: Graph
    positions: Positions
    sites: tuple[tuple[Site, Rule], ...]
    groups: tuple[ChannelGroup, ...]
    barriers: Mapping[str, int]
    structure: Structure


def channel_groups(graph: Graph, shapes: Mapping[str, Dims] | None = None, *, outer: bool = True) -> list[ChannelGroup]:
    """Returns the groups of a graph; see `find_channels`."""
    return list(find_channels(graph, shapes, outer=outer).groups)


def find_channels(graph: Graph, shapes: Mapping[str, Dims] | None = None, *, outer: bool = True) -> Channels:
    """Finds the channels of a graph.

    Args:
        graph: the main graph; only read.
        shapes: dimensions of tensors by name where they are known better than inference knows them, None for sizes that vary.
        outer: where a reshape takes channels apart in two ways, whether the outer axis carries them, or the inner: whole heads of
            attention, or the same place of all heads. Having cut one way, find the channels again to cut the other.
    """
    dims, sizes = shapes_and_sizes(graph, shapes)
    positions = Positions(dims)
    for tensor in _tensors(graph):
        positions.add(tensor)
    finder = _Finder(graph, positions, sizes)
    finder.pin_borders()
    for node in graph.nodes:
        finder.relate(node)
    positions.settle(outer=outer)
    structure = Structure.of(graph, finder.fixed)
    return Channels(graph, positions, tuple(finder.sites), tuple(finder.groups()), dict(finder.barriers), structure)


def _tensors(graph: Graph) -> Iterator[Tensor]:
    yield from graph.constants
    yield from graph.inputs
    for node in graph.nodes:
        yield from (tensor for tensor in node.outputs if tensor.name)


class _Finder:
    """Applies rules to all nodes, and makes groups of the classes that come out."""

    def __init__(self, graph: Graph, positions: Positions, sizes: Mapping[int, Sizes]) -> None:
        self.graph, self.positions, self.sizes = graph, positions, sizes
        self.sites: list[tuple[Site, Rule]] = []
        self.barriers: Counter[str] = Counter()
        self.roles: dict[tuple[int, int], str] = {}
        self.resliced: list[tuple[Ids, str]] = []
        self.fixed: set[int] = set()

    def site(self, node: Node) -> Site:
        return Site(node, self.graph.opset, self.positions, self.sizes, self.roles, self.resliced, fixed=self.fixed)

    def pin(self, tensor: Tensor, site: str, text: str) -> None:
        for axis in range(len(self.positions.dims(tensor) or ())):
            self.positions.pin(self.positions.ids(tensor, axis), Reason(site, text))

    def pin_borders(self) -> None:
        """Pins what callers see."""
        for tensor in self.graph.inputs:
            if not isinstance(tensor, Constant):
                self.pin(tensor, tensor.name, "a graph input")
        for tensor in _tensors(self.graph):
            if id(tensor) in self.sizes:
                self.pin(tensor, tensor.name, "computed from sizes")
        for tensor in self.graph.outputs:
            self.pin(tensor, tensor.name, "a graph output")
            if id(tensor) in self.sizes:
                self.pin_reads(tensor, Reason(tensor.name, "its size is a graph output"))

    def pin_reads(self, tensor: Tensor, reason: Reason) -> None:
        for axis in sorted(self.sizes[id(tensor)].reads, key=self.positions.order):
            self.positions.pin(self.positions.at(axis), reason)

    def relate(self, node: Node) -> None:
        """Lets the rule of a node speak, or makes it a barrier."""
        outputs = [tensor for tensor in node.outputs if tensor.name]
        if outputs and all(id(tensor) in self.sizes for tensor in outputs):
            for tensor in node.inputs:
                if isinstance(tensor, Constant):
                    self.pin(tensor, node.site, "used in the arithmetic of shapes")
                    self.fixed.add(id(tensor))
            return
        rule = rule_of(node)
        text = self.obstacle(node, rule)
        if rule is None or text is not None:
            assert text is not None
            self.barriers[node.op if rule is None else f"{node.op}: {text}"] += 1
            for tensor in (*reads(node), *node.outputs):
                self.pin(tensor, node.site or node.op, text)
                if isinstance(tensor, Constant) and len(tensor.shape) > 1:  # so that it is listed, with the reason
                    self.roles.update({(id(tensor), axis): FOLLOWS for axis in range(len(tensor.shape))})
                if id(tensor) in self.sizes:
                    self.pin_reads(tensor, Reason(node.site, f"its size is read by {node.op}"))
            return
        site = self.site(node)
        for operand, tensor in enumerate(node.inputs):
            if id(tensor) in self.sizes and operand not in rule.shape_operands and self.sizes[id(tensor)].values is None:
                self.pin_reads(tensor, Reason(node.site, f"its size is read by {node.op}"))
        self.sites.append((site, rule))
        rule.relate(site)
        site.pin_unsaid()

    def obstacle(self, node: Node, rule: Rule | None) -> str | None:
        """Returns why a node cannot be left to a rule."""
        if any(True for _ in node.bodies()):
            return f"read or computed by {node.op}"
        if rule is None:
            return f"{node.op} has no rule"
        if any(isinstance(value, AttributeProto) and value.type != AttributeProto.TENSOR for value in node.attrs.values()):
            return f"{node.op} has an attribute that is not understood"
        unread = [] if node.op != "Dropout" else [mask for mask in node.outputs[1:] if not mask.outputs and mask not in self.graph.outputs]
        seen = [tensor for tensor in (*node.inputs, *node.outputs) if tensor.name and tensor not in unread]
        if any(self.positions.dims(tensor) is None for tensor in seen):  # inference forgets the mask of Dropout before opset 12
            return f"{node.op} reads or computes a tensor of unknown rank"
        return None

    def groups(self) -> Iterator[ChannelGroup]:
        """Yields the groups of classes on the axes along which a weight produces or consumes."""
        axes, roles = self.positions.axes, stored_roles(self.graph, self.positions, self.roles)
        stored = {id(constant) for constant in self.graph.constants}
        weighty = [index for index, (tensor, axis, *_) in enumerate(axes) if id(tensor) in stored and (id(tensor), axis) in roles]
        classes, holds = _classes_on(self.positions, weighty)  # in the order of their first positions
        family = _families(holds, self.positions.pinned[classes])
        starts = np.searchsorted(holds[:, 0], np.arange(len(classes) + 1))
        _, firsts = np.unique(family, return_index=True)
        for first in np.sort(firsts):
            on = holds[starts[first] : starts[first + 1], 1]
            yield self.group(classes[family == family[first]], [axes[index] for index in on], roles)

    def group(self, classes: Ids, axes: list[tuple[Tensor, int, int, int]], roles: Mapping[tuple[int, int], str]) -> ChannelGroup:
        index = np.full(len(self.positions.pinned), -1)
        index[classes] = np.arange(len(classes))
        members = []
        for tensor, axis, first, size in axes:
            role = roles.get((id(tensor), axis), FOLLOWS) if isinstance(tensor, Constant) else ""
            places = index[self.positions.labels[first : first + size]]
            members.append(Member(tensor, axis, len(self.positions.shapes[id(tensor)]), role, places))
        by_role = {member.role: member.tensor.name for member in reversed(members)}
        name = by_role.get(PRODUCES) or by_role.get("") or members[0].tensor.name
        pinned = int(self.positions.pinned[classes[0]])
        resliced = [site for ids, site in self.resliced if (index[self.positions.labels[ids]] >= 0).any()]
        reason = self.positions.reasons[pinned] if pinned >= 0 else None
        return ChannelGroup(name, classes, tuple(members), reason, tuple(dict.fromkeys(resliced)))


def _classes_on(positions: Positions, axes: list[int]) -> tuple[Ids, Ids]:
    """Returns the classes that lie on some axes, and for each, by its place in that list, all axes that it lies on: [pairs, 2]."""
    spans = [np.arange(first, first + size) for _, _, first, size in (positions.axes[index] for index in axes)]
    on = positions.labels[np.concatenate(spans or [np.zeros(0, np.int64)])]
    found, firsts = np.unique(on, return_index=True)
    classes = found[np.argsort(firsts)]
    place = np.full(len(positions.pinned), -1)
    place[classes] = np.arange(len(classes))
    owner = np.full(positions.count, -1)
    for index, (_, _, first, size) in enumerate(positions.axes):
        owner[first : first + size] = index
    here = (place[positions.labels] >= 0) & (owner >= 0)
    count = max(len(positions.axes), 1)
    keys = np.unique(place[positions.labels[here]] * count + owner[here])
    return classes, np.stack([keys // count, keys % count], axis=1)


def _families(holds: Ids, pinned: Ids) -> Ids:
    """Returns a number for each class, equal for classes on the same axes with the same reason.

    Args:
        holds: (class, axis), sorted, each once: [pairs, 2].
        pinned: the reason of each class.
    """
    counts = np.bincount(holds[:, 0], minlength=len(pinned))
    starts, family, known = np.cumsum(counts) - counts, np.zeros(len(pinned), np.int64), 0
    for count in np.unique(counts):
        classes = np.flatnonzero(counts == count)
        axes = holds[starts[classes, np.newaxis] + np.arange(count), 1]
        found, which = np.unique(np.column_stack([pinned[classes], axes]), axis=0, return_inverse=True)
        family[classes] = known + which.reshape(-1)
        known += len(found)
    return family
