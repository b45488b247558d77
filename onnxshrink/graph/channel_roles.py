"""What stored tensors do along their axes, where nodes that only move elements stand between them and the op that multiplies with them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from onnxshrink.graph.ir import Graph, Node
from onnxshrink.graph.positions import Positions
from onnxshrink.graph.tensor_shapes import Dims

__all__ = ["stored_roles"]

_KEEPING = ("Cast", "DequantizeLinear", "Identity")
_RESHAPING = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")


def stored_roles(graph: Graph, positions: Positions, roles: Mapping[tuple[int, int], str]) -> dict[tuple[int, int], str]:
    """Returns roles by (tensor id, axis), with those that constants have through nodes that keep, permute, join or split axes.

    Args:
        graph: the main graph.
        positions: with the dimensions of its tensors.
        roles: by (tensor id, axis), of what ops multiply with.
    """
    found, stored, moves = dict(roles), {id(constant) for constant in graph.constants}, []
    for node in graph.nodes:
        if node.is_standard and node.op in (*_KEEPING, *_RESHAPING, "Transpose") and id(node.inputs[0]) in stored:
            stored.add(id(node.outputs[0]))
            moves.append(node)
    for node in reversed(moves):
        source, output = node.inputs[0], node.outputs[0]
        for origin, axis in _origins(node, positions.dims(source) or (), positions.dims(output) or ()):
            if (id(output), axis) in found:
                found.setdefault((id(source), origin), found[id(output), axis])
    return found


def _origins(node: Node, before: Dims, after: Dims) -> Iterator[tuple[int, int]]:
    """Yields (axis before, axis after) for axes on which the same elements are told apart."""
    axes = range(len(before))
    if node.op in _KEEPING:
        yield from zip(axes, axes, strict=True)
    elif node.op == "Transpose":
        yield from ((int(origin), axis) for axis, origin in enumerate(node.attrs.get("perm", axes[::-1])))
    else:
        inner, outer = _spans(before), _spans(after)
        for origin, (first, last) in enumerate(inner):
            yield from ((origin, axis) for axis, (start, end) in enumerate(outer) if max(first, start) < min(last, end))


def _spans(dims: Dims) -> list[tuple[int, int]]:
    """Returns for each axis how many parts the elements are in before it and after it divides them; none if a size is unknown."""
    sizes = [size for size in dims if isinstance(size, int)]
    if len(sizes) < len(dims):
        return []
    return [(math.prod(sizes[:axis]), math.prod(sizes[: axis + 1])) for axis in range(len(sizes))]
