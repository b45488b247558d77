"""Graph inputs that do nothing but choose rows of stored tables: of these every row is a valid value, whatever a user has given."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
from onnx import TensorProto

from onnxshrink.graph.ir import Constant, Graph, Node, Tensor
from onnxshrink.graph.views import View, is_mover, reads_values, through

__all__ = ["table_rows"]

_EXACT = (TensorProto.INT32, TensorProto.INT64, TensorProto.UINT32, TensorProto.UINT64, TensorProto.FLOAT, TensorProto.DOUBLE)
"""What holds the number of any row: a narrower type, or a flag, makes another number of it."""


def table_rows(graph: Graph) -> dict[str, int]:
    """Returns, by name, the integer inputs of the main graph that only choose rows, and of how many: the fewest of all tables, over 1.

    A table is a constant, or what nodes that move, cast or dequantize it make of one, that Gather takes slices of, or what OneHot makes
    of an index (ONNX operator specification). What bodies of If, Loop and Scan read, and what callers may override, counts for neither.
    """
    outside = {id(output) for scope in graph.scopes() for output in scope.graph.outputs}
    inside = (node for scope in graph.scopes() if scope.graph is not graph for node in scope.graph.nodes)
    outside |= {id(tensor) for node in inside for tensor in node.inputs}
    open_to_callers = {id(constant) for constant in graph.overridable}
    found = {}
    for tensor in graph.inputs:
        if not isinstance(tensor, Constant) and tensor.dtype is not None and np.issubdtype(tensor.dtype, np.integer):
            rows = _rows(tensor, outside, open_to_callers)
            if rows > 1:
                found[tensor.name] = rows
    return found


def _rows(tensor: Tensor, outside: Collection[int], open_to_callers: Collection[int]) -> int:
    """Returns the rows of the shortest table that a tensor indexes; 0 if there is none, or if it is read in another way as well."""
    found: list[int] = []
    seen: set[int] = set()
    waiting = [tensor]
    while waiting:
        current = waiting.pop()
        if id(current) in outside:
            return 0
        if id(current) in seen:
            continue
        seen.add(id(current))
        for node, operand in _reads(current):
            if _keeps_numbers(node, operand):
                waiting += node.outputs
            else:
                found.append(_rows_read(node, operand, open_to_callers))
    return min(found, default=0)


def _reads(tensor: Tensor) -> Iterator[tuple[Node, int]]:
    """Yields the nodes that look at the values of a tensor, with the number of each operand that it is."""
    for node in {id(node): node for node in tensor.outputs if reads_values(node)}.values():
        yield from ((node, operand) for operand, read in enumerate(node.inputs) if read is tensor)


def _keeps_numbers(node: Node, operand: int) -> bool:
    if not is_mover(node, operand) or node.op == "DequantizeLinear":
        return False
    return node.op != "Cast" or node.attrs.get("to") in _EXACT


def _rows_read(node: Node, operand: int, open_to_callers: Collection[int]) -> int:
    """Returns how many rows the table has that an operand of a node indexes; 0 if it does something else."""
    if not node.is_standard:
        return 0
    if (node.op, operand) == ("OneHot", 0):
        depth = node.inputs[1]
        known = isinstance(depth, Constant) and id(depth) not in open_to_callers and depth.size == 1
        return int(depth.values.item()) if isinstance(depth, Constant) and known else 0
    if (node.op, operand) == ("Gather", 1):
        shape, axis = _stored_shape(node.inputs[0], open_to_callers), int(node.attrs.get("axis", 0))
        return shape[axis] if -len(shape) <= axis < len(shape) else 0
    return 0


def _stored_shape(tensor: Tensor, open_to_callers: Collection[int]) -> tuple[int, ...]:
    """Returns the shape of a constant, or of what nodes make of one that only move, cast or dequantize it; of anything else none."""
    path: list[Node] = []
    while not isinstance(tensor, Constant):
        if not tensor.inputs or not tensor.inputs[0].inputs:
            return ()
        path.append(tensor.inputs[0])
        tensor = path[-1].inputs[0]
    view: View | None = View((tensor.shape,)) if id(tensor) not in open_to_callers else None
    for node in reversed(path):
        view = through(view, node, 0) if view is not None else None
    return view.shape if view is not None else ()
