"""Graph inputs that do nothing but choose rows of stored tables: of these every row is a valid value, whatever a user has given."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto

from onnxshrink.graph.ir import Constant, Graph, Node, Tensor
from onnxshrink.graph.storage import element_type
from onnxshrink.graph.views import View, is_mover, reads_values, through
from onnxshrink.graph.weight_values import dequantized

__all__ = ["Table", "table_rows", "tables"]

Array = np.ndarray[Any, np.dtype[Any]]
_EXACT = (TensorProto.INT32, TensorProto.INT64, TensorProto.UINT32, TensorProto.UINT64, TensorProto.FLOAT, TensorProto.DOUBLE)
"""What holds the number of any row: a narrower type, or a flag, makes another number of it."""


@dataclass(frozen=True)
class Table:
    """What a node, Gather or OneHot, takes rows of.

    Attributes:
        node: it.
        rows: how many there are.
    """

    node: Node
    rows: int

    def values(self, most: int | None = None) -> Array:
        """Returns the rows, [rows, columns] of any dtype: of OneHot the identity.

        Args:
            most: columns, evenly spread where there are more; None for all. OneHot of many rows is only made as far as it is asked for.
        """
        if self.node.op == "OneHot":
            step = _step(self.rows, most)
            found = np.zeros((self.rows, -(-self.rows // step)), np.float32)
            found[::step] = np.eye(found.shape[1], dtype=np.float32)
            return found
        constant, path = _stored(self.node.inputs[0])
        assert constant is not None
        values = constant.values
        for node in path:
            if node.op == "Cast":
                with np.errstate(over="ignore", invalid="ignore"):
                    values = values.astype(element_type(int(node.attrs["to"])))
            elif node.op == "DequantizeLinear":
                values = dequantized(node, values)
            move = through(View((values.shape,)), node, 0)
            assert move is not None
            values = move.forward(values)
        values = np.moveaxis(values, int(self.node.attrs.get("axis", 0)), 0).reshape(self.rows, -1)
        return values[:, :: _step(values.shape[1], most)]


def table_rows(graph: Graph) -> dict[str, int]:
    """Returns, by name, the integer inputs of the main graph that only choose rows, and of how many: the fewest of all `tables`."""
    return {name: min(table.rows for table in found) for name, found in tables(graph).items()}


def tables(graph: Graph) -> dict[str, list[Table]]:
    """Returns, by name, the integer inputs of the main graph that only choose rows, and of which tables, all of more than one row.

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
            indexed = _indexed(tensor, outside, open_to_callers)
            if indexed and all(table.rows > 1 for table in indexed):
                found[tensor.name] = indexed
    return found


def _indexed(tensor: Tensor, outside: Collection[int], open_to_callers: Collection[int]) -> list[Table]:
    """Returns the tables that a tensor indexes; none, or one without rows, if it is read in another way as well."""
    found: list[Table] = []
    seen: set[int] = set()
    waiting = [tensor]
    while waiting:
        current = waiting.pop()
        if id(current) in outside:
            return []
        if id(current) in seen:
            continue
        seen.add(id(current))
        for node, operand in _reads(current):
            if _keeps_numbers(node, operand):
                waiting += node.outputs
            else:
                found.append(Table(node, _rows_read(node, operand, open_to_callers)))
    return found


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
    constant, path = _stored(tensor)
    view = View((constant.shape,)) if constant is not None and _is_stored(constant, open_to_callers) else None
    for node in path:
        known = node.op != "DequantizeLinear" or all(_is_stored(scale, open_to_callers) for scale in node.inputs[1:] if scale.name)
        view = through(view, node, 0) if view is not None and known else None
    return view.shape if view is not None else ()


def _is_stored(tensor: Tensor, open_to_callers: Collection[int]) -> bool:
    return isinstance(tensor, Constant) and id(tensor) not in open_to_callers


def _step(columns: int, most: int | None) -> int:
    """Returns how far apart columns are of which there are no more than that."""
    return 1 if most is None else max(1, -(-columns // most))


def _stored(tensor: Tensor) -> tuple[Constant | None, list[Node]]:
    """Returns the constant that a tensor is made of by nodes of which each reads the one before first, and these; None if it is not."""
    path: list[Node] = []
    while not isinstance(tensor, Constant):
        if not tensor.inputs or not tensor.inputs[0].inputs:
            return None, []
        path.insert(0, tensor.inputs[0])
        tensor = path[0].inputs[0]
    return tensor, path
