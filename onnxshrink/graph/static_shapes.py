"""Shapes and what is computed from them, each found with the help of the other.

Inference stops where a shape is computed in ways it does not follow; the arithmetic of shapes needs the shapes of what Shape reads. So the
two take turns. What is known of a computed shape only in part still goes a long way: known entries, sizes that are those of an
input, what a constant demands of the tensor it is multiplied with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from onnxshrink.graph.ir import Constant, Graph, Tensor
from onnxshrink.graph.shape_arithmetic import Number, Sizes, shape_arithmetic
from onnxshrink.graph.tensor_shapes import Dims, Shapes, tensor_shapes

__all__ = ["same_size", "shapes_and_sizes"]

Array = np.ndarray[Any, np.dtype[Any]]
_MAX_ROUNDS = 8  # of inference; each finds shapes that hung on those found before


def shapes_and_sizes(graph: Graph, given: Mapping[str, Dims] | None = None) -> tuple[dict[int, Dims], dict[int, Sizes]]:
    """Returns the shapes of tensors and what is computed from them, each found with the help of the other.

    Args:
        graph: the main graph; only read.
        given: dimensions by name that are known better.
    """
    known: dict[int, Sizes] = {}
    values: dict[int, Array] = {}
    targets: dict[str, Array] = {}
    demanded: dict[str, Dims] = {}
    for _ in range(_MAX_ROUNDS):
        shapes, count = tensor_shapes(graph, {**demanded, **(given or {})}, values, targets), len(values) + len(targets) + len(demanded)
        known = shape_arithmetic(graph, shapes)
        values = {key: found for key, sizes in known.items() if (found := sizes.values) is not None}
        targets = dict(_reshape_targets(graph, shapes, known))
        demanded |= dict(_demanded(graph, shapes, known))
        if len(values) + len(targets) + len(demanded) == count:
            break
    for _ in range(_MAX_ROUNDS):
        names = dict(_equal_names(graph, shapes, known))
        if not names:
            break
        shapes = {key: tuple(names.get(dim, dim) if isinstance(dim, str) else dim for dim in dims) for key, dims in shapes.items()}
    return shapes, known


def _equal_names(graph: Graph, shapes: Shapes, known: Mapping[int, Sizes]) -> Iterator[tuple[str, str]]:
    """Yields names of unknown sizes with the names that the shape of a Reshape or Expand says they are equal to."""
    for node in graph.nodes:
        sizes = known.get(id(node.inputs[1])) if node.op in ("Expand", "Reshape") and len(node.inputs) > 1 else None
        dims, before = shapes.get(id(node.outputs[0])), shapes.get(id(node.inputs[0]))
        if sizes is None or dims is None or before is None:
            continue
        for axis, number in enumerate(sizes.numbers.reshape(-1), len(dims) - sizes.numbers.size):
            name, source = dims[axis], shapes[number.axis[0]][number.axis[1]] if number.axis is not None else None
            if isinstance(name, str) and isinstance(source, str) and name != source:
                repeated = before[axis - len(dims)] if len(dims) - axis <= len(before) else 1
                if node.op == "Reshape" or repeated in (1, source):
                    yield name, source


def same_size(shapes: Shapes, number: Number, tensor: Tensor, axis: int) -> bool:
    """Whether a number is the size of an axis: read from it, or known by the same name."""
    dims = shapes.get(id(tensor), ())
    if number.axis is None or not 0 <= axis < len(dims):
        return False
    name, (source, at) = dims[axis], number.axis
    return number.axis == (id(tensor), axis) or (isinstance(name, str) and name == shapes[source][at])


def _demanded(graph: Graph, shapes: Shapes, known: Mapping[int, Sizes]) -> Iterator[tuple[str, Dims]]:
    """Yields shapes of which more is known than inference finds: what MatMul demands of its inputs, and what Expand is told."""
    for node in graph.nodes:
        if node.op not in ("Expand", "MatMul") or not node.is_standard:
            continue
        x, other = node.inputs
        dims = shapes.get(id(x))
        if node.op == "MatMul" and isinstance(other, Constant) and len(other.shape) > 1 and dims and not isinstance(dims[-1], int):
            yield x.name, (*dims[:-1], other.shape[-2])
        elif node.op == "Expand" and dims is not None and id(other) in known:
            before, wide = shapes.get(id(node.outputs[0])), _expanded(dims, known[id(other)].numbers, shapes)
            if before is None or [dim for dim in wide if isinstance(dim, int)] != [dim for dim in before if isinstance(dim, int)]:
                yield node.outputs[0].name, wide


def _expanded(dims: Dims, numbers: Array, shapes: Shapes) -> Dims:
    """Returns what dimensions become when they are broadcast with a shape."""
    rank = max(len(dims), numbers.size)
    wide: list[int | str | None] = []
    for size, number in zip((1,) * (rank - len(dims)) + dims, [Number(1)] * (rank - numbers.size) + list(numbers), strict=True):
        name = shapes[number.axis[0]][number.axis[1]] if number.axis is not None else None
        if number.value is not None and number.value != 1:
            wide.append(number.value)
        elif number.value == 1 or (isinstance(size, int) and size != 1):
            wide.append(size)
        else:
            wide.append(name if size in (1, name) else None)
    return tuple(wide)


def _reshape_targets(graph: Graph, shapes: Shapes, known: Mapping[int, Sizes]) -> Iterator[tuple[str, Array]]:
    """Yields constants that mean the same as shapes of which not all is known."""
    for node in graph.nodes:
        sizes = known.get(id(node.inputs[1])) if node.op == "Reshape" and len(node.inputs) > 1 else None
        if sizes is None or sizes.values is not None or node.attrs.get("allowzero", 0):
            continue
        x, entries = node.inputs[0], []
        for axis, number in enumerate(sizes.numbers.reshape(-1)):
            unknown = 0 if same_size(shapes, number, x, axis) else -1
            entries.append(number.value if number.value is not None else unknown)
        if entries.count(-1) <= 1:
            yield node.outputs[0].name, np.array(entries, np.int64)
