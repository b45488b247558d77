"""Cuts channels out of a graph: weights lose rows and columns, attributes and shapes say what is left.

Everything is checked and computed before anything is changed, so a refusal leaves the graph as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from onnxshrink.errors import PassError, must
from onnxshrink.graph.channel_groups import ChannelGroup, Channels
from onnxshrink.graph.channel_sites import Edit, Kept, Rule, Site
from onnxshrink.graph.edit import NameSource, remove_dead
from onnxshrink.graph.ir import Constant, Graph, Node, Tensor, Variable

__all__ = ["cut_channels"]

Array = np.ndarray[Any, np.dtype[Any]]


def cut_channels(channels: Channels, cut: Mapping[ChannelGroup, Iterable[int] | Array]) -> None:
    """Removes channels from the graph in which they were found, in place; find them anew before the next cut.

    The result computes what the original computes once every weight that consumes a removed channel is zero there; a statistic over
    the channels (``ChannelGroup.resliced``) is that of those that are left. Bodies and functions are not touched. Of the initializers
    that callers may override, those that get another shape are no longer inputs.

    Args:
        channels: of the graph, in which only weights may have got new values since.
        cut: for each group which of its channels go, numbered from 0.

    Raises:
        PassError: the graph was changed since, a group of other channels, a channel that does not exist or cannot be cut, or an axis
            of which nothing would be left; the graph is unchanged.
    """
    change = channels.structure.change(channels.graph)
    if change is not None:
        raise PassError(f"channels: the graph must be as it was when they were found, got another: {change} changed; find them anew")
    kept = Kept(channels.positions, ~_gone(channels, cut)[channels.positions.labels])
    _refuse_empty(kept)
    edits = [(site.node, list(_edits(site, rule, kept))) for site, rule in channels.sites]
    edits = [(node, changes) for node, changes in edits if changes]
    values = [(constant, kept.values(constant, constant.values)) for constant in channels.graph.constants if _is_cut(constant, kept)]
    _apply(channels.graph, edits, values, kept)


def _gone(channels: Channels, cut: Mapping[ChannelGroup, Iterable[int] | Array]) -> Array:
    """Returns which classes go: bool [classes]."""
    gone, known = np.zeros(len(channels.positions.pinned), np.bool_), set(channels.groups)
    for group, indices in cut.items():
        if group not in known:
            raise PassError(f"group '{group.name}': must be one of the groups of the channels given, got one that was found another time")
        places = np.asarray(indices if isinstance(indices, np.ndarray) else list(indices))
        if not places.size:
            continue
        if places.dtype.kind not in "iu" or places.min() < 0 or places.max() >= group.size:
            raise PassError(must(f"group '{group.name}'", "channels", f"numbers from 0 to {group.size - 1}", places.tolist()))
        if group.reason is not None:
            raise PassError(f"group '{group.name}': cannot be cut: {group.reason}")
        gone[group.classes[places]] = True
    return gone


def _refuse_empty(kept: Kept) -> None:
    for tensor, axis, first, size in kept.positions.axes:
        if size and not kept.mask[first : first + size].any():
            raise PassError(must(f"tensor '{tensor.name}'", f"what is left of axis {axis}", "at least one channel", "none"))


def _edits(site: Site, rule: Rule, kept: Kept) -> Iterable[Edit]:
    """Yields what changes in a node, what computed numbers were before the cut among it."""
    touched = any(kept.changes(tensor, axis) for tensor in (*site.node.inputs, *site.node.outputs) for axis in _axes(kept, tensor))
    for operand, tensor in enumerate(site.node.inputs):
        sizes = site.sizes.get(id(tensor))
        if sizes is not None and any(_shrinks(kept, axis) for axis in sizes.reads):
            touched = True
            if operand not in rule.shape_operands:
                yield Edit(sizes.values, operand=operand)
    if touched and rule.rewrite is not None:
        yield from rule.rewrite(site, kept)


def _axes(kept: Kept, tensor: Tensor) -> range:
    return range(len(kept.positions.dims(tensor) or ()))


def _shrinks(kept: Kept, axis: tuple[int, int]) -> bool:
    along = kept.at(axis)
    return along is not None and not along.all()


def _is_cut(constant: Constant, kept: Kept) -> bool:
    return any(kept.changes(constant, axis) for axis in range(len(constant.shape)))


def _apply(graph: Graph, edits: list[tuple[Node, list[Edit]]], values: list[tuple[Constant, Array]], kept: Kept) -> None:
    names, suspects = NameSource(graph), set[Node | Constant]()
    for constant, array in values:
        constant.values = array
        constant.info = None
    shorter = {id(constant) for constant, _ in values}  # nobody can override what has another shape now
    graph.inputs = [tensor for tensor in graph.inputs if id(tensor) not in shorter or not isinstance(tensor, Constant)]
    made: dict[Any, Constant] = {}
    for node, changes in edits:
        for edit in changes:
            if edit.operand >= 0:
                suspects.update(_replace_operand(graph, node, edit, names, made))
            elif edit.value is None:
                del node.attrs[edit.attribute]
            else:
                node.attrs[edit.attribute] = edit.value
    for node in graph.nodes:
        for tensor in node.outputs:
            if isinstance(tensor, Variable) and tensor.shape is not None:
                _shorten(tensor, kept)
    remove_dead(graph, suspects)


def _replace_operand(graph: Graph, node: Node, edit: Edit, names: NameSource, made: dict[Any, Constant]) -> Iterable[Node | Constant]:
    """Gives a node a constant of its own, and returns what it read before."""
    while len(node.inputs) <= edit.operand:
        node.inputs.append(Variable(""))
    before = node.inputs[edit.operand]
    dtype = before.dtype if isinstance(before, Constant) else edit.value.dtype
    key = (id(before), edit.value.shape, edit.value.astype(dtype).tobytes())
    if key in made:  # what several nodes read, several nodes read anew
        node.inputs[edit.operand] = made[key]
        return []
    constant = made[key] = Constant(names.fresh(f"{node.site}_{node.op.lower()}_{edit.operand}"), edit.value.astype(dtype))
    graph.constants.append(constant)
    node.inputs[edit.operand] = constant
    return [before] if isinstance(before, Constant) else list(before.inputs)


def _shorten(tensor: Variable, kept: Kept) -> None:
    """Writes the new sizes to what the graph says of a tensor."""
    assert tensor.shape is not None
    if len(kept.positions.dims(tensor) or ()) == len(tensor.shape):
        changed = {axis: kept.size(tensor, axis) for axis in range(len(tensor.shape)) if kept.changes(tensor, axis)}
        if changed:
            tensor.shape = tuple(changed.get(axis, dim) for axis, dim in enumerate(tensor.shape))
