"""Finds tables of embeddings that stay coded while a model runs (`onnxshrink.graph.coded_table` writes them), and expands them.

A table is a tensor of bytes, stored or computed when a session starts, that is read by nothing but Gathers of rows by ids that
are known only at run time, whose codes all go through the same steps of decoding:

    Cast to float32 [── Sub] ── Mul [── Cast]                       a uniform grid
    Cast to int32 [── Add ...] ── Gather [── Mul [── Cast]]         codebooks

The second operand of Add, Sub and Mul is a constant without the table's first axis, or is looked up by the same ids: then each
element of the rows depends on its code and its place in the table alone. Where the reader of the rows looks like one more step,
it may be taken for one. That is no mistake: the table is then the one after that step.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
from onnx import TensorProto

from onnxshrink.graph.edit import remove_dead
from onnxshrink.graph.ir import Constant, Graph, Node, Tensor, Variable
from onnxshrink.graph.storage import is_float

__all__ = ["CodedTable", "Lookup", "coded_tables", "expand_table", "looks_up", "static_shape"]

Array = np.ndarray[Any, np.dtype[Any]]
_GRID_OR_CODEBOOK = re.compile("FS?MC?|IA*G(MC?)?")  # the steps after a lookup, by the letters that `_Step` gives them


@dataclass(frozen=True, eq=False)
class Lookup:
    """One place where rows of a coded table are looked up.

    Attributes:
        gather: looks up codes.
        steps: compute rows of the table from them, in order.
        sides: look up what else the steps want of those rows.
    """

    gather: Node
    steps: tuple[Node, ...]
    sides: tuple[Node, ...]

    @property
    def nodes(self) -> tuple[Node, ...]:
        """All of them."""
        return (self.gather, *self.sides, *self.steps)


@dataclass(frozen=True, eq=False)
class CodedTable:
    """A table that stays coded at run time, found in a graph.

    Attributes:
        codes: the tensor of codes; stored, or computed when a session starts.
        lookups: all that reads it; one at least, alike in how they decode.
    """

    codes: Tensor
    lookups: tuple[Lookup, ...]

    @property
    def picks(self) -> set[int]:
        """Ids of the Gathers that pick rows: without them, the steps compute the whole table."""
        return {id(node) for lookup in self.lookups for node in (lookup.gather, *lookup.sides)}

    @property
    def rows(self) -> Tensor:
        """What the first lookup computes."""
        return self.lookups[0].steps[-1].outputs[0]

    @property
    def has_zero_points(self) -> bool:
        """Whether it is on a grid that does not begin at 0."""
        return any(step.op == "Sub" for step in self.lookups[0].steps)

    @property
    def zero_point(self) -> int | None:
        """The zero point of a grid that has one for all rows; None of others, or if it is no whole number."""
        stored = self._operand("Sub")
        number = stored.values.item() if stored is not None and stored.size == 1 else 0.5
        return int(number) if number == int(number) else None

    def operand_for(self, centre: int) -> tuple[Constant, Array] | None:
        """Returns what must change where all codes become less by a centre.

        Zero points become less too, and the codebook is rotated: as an index, a code below 0 counts from the end (Gather-11).

        Args:
            centre: a code, or 128 where a code is over 127.

        Returns:
            The constant and its new values, or None where there is none, or others read what is computed from it.
        """
        if (zero_points := self._operand("Sub")) is not None:
            signed = np.dtype(np.int8) if zero_points.dtype == np.uint8 else zero_points.dtype
            return zero_points, (zero_points.values.astype(np.float32) - centre).astype(signed)
        codebook = self._operand("Gather")
        return (codebook, np.roll(codebook.values, -centre)) if codebook is not None else None

    def _operand(self, op: str) -> Constant | None:
        """Returns the constant that the step of an op decodes with, if there is such a step and Casts of it are read by no other."""
        step = next((step for step in self.lookups[0].steps if step.op == op), None)
        tensor = step.inputs[0 if op == "Gather" else 1] if step is not None else None
        own = {id(node) for lookup in self.lookups for node in lookup.nodes}
        while isinstance(tensor, Variable):
            if not all(id(reader) in own for reader in tensor.outputs):
                return None
            own.add(id(tensor.inputs[0]))
            tensor = tensor.inputs[0].inputs[0]
        return tensor


def coded_tables(scope: Graph, known: Mapping[int, np.dtype[Any]], outputs: set[int]) -> list[CodedTable]:
    """Returns the tables of a scope that stay coded at run time.

    Args:
        scope: one graph; bodies below it are scopes of their own.
        known: element types of its constants and of what is computed from them alone, by id.
        outputs: ids of the tensors that are outputs of a scope.
    """
    finder = _Finder({id(node) for node in scope.nodes}, known, outputs)
    tensors = {id(node.inputs[0]): node.inputs[0] for node in scope.nodes if node.op == "Gather" and finder.picks_codes(node)}
    found = (finder.table(tensor) for tensor in tensors.values())
    return [table for table in found if table is not None]


def expand_table(scope: Graph, graph: Graph, table: CodedTable, values: Array) -> None:
    """Puts a dense table where a coded one was, with one Gather for each lookup.

    Args:
        scope: that it is in.
        graph: the main graph.
        table: to be replaced.
        values: of the dense table.
    """
    dense = Constant(table.codes.name, values)
    scope.constants.append(dense)
    ends = []
    for lookup in table.lookups:
        last = lookup.steps[-1]
        (rows,) = list(last.outputs)
        last.outputs.clear()
        lookup.gather.outputs.clear()
        lookup.gather.outputs.append(rows)
        lookup.gather.inputs[0] = dense
        ends.append(last)
    codes = table.codes
    remove_dead(graph, [*ends, codes if isinstance(codes, Constant) else codes.inputs[0]])


@dataclass(frozen=True)
class _Finder:
    """Looks for coded tables in a scope; see `coded_tables`."""

    nodes: set[int]
    known: Mapping[int, np.dtype[Any]]
    outputs: set[int]

    def picks_codes(self, node: Node) -> bool:
        """Whether a node looks up rows of unsigned bytes, or of signed ones that are no constant: the Huffman decoder's."""
        codes = node.inputs[0]
        types = ("uint8",) if isinstance(codes, Constant) else ("int8", "uint8")
        return self.picks(node) and self.known[id(codes)].name in types

    def picks(self, node: Node) -> bool:
        """Whether a node looks up rows of something known, by ids that are not."""
        source = node.inputs[0] if node.inputs else None
        return source is not None and id(source) in self.known and looks_up(node, source) and id(node.inputs[1]) not in self.known

    def table(self, codes: Tensor) -> CodedTable | None:
        """Returns the table of a tensor of codes: it ends where the lookups cease to be alike."""
        shape, readers = static_shape(codes), {id(node): node for node in codes.outputs}.values()
        if shape is None or id(codes) in self.outputs or not all(id(node) in self.nodes and self.picks_codes(node) for node in readers):
            return None
        found = [list(self.steps(node, shape)) for node in readers]
        alike = list(takewhile(lambda steps: len({step.key for step in steps}) == 1, zip(*found, strict=False)))
        match = _GRID_OR_CODEBOOK.match("".join(steps[0].letter for steps in alike))
        if match is None or not alike[match.end() - 1][0].floats:
            return None
        return CodedTable(
            codes,
            tuple(
                Lookup(node, tuple(step.node for step in steps), tuple(step.side for step in steps if step.side is not None))
                for node, steps in zip(readers, (every[: match.end()] for every in found), strict=True)
            ),
        )

    def steps(self, gather: Node, shape: tuple[int, ...]) -> Iterator[_Step]:
        """Yields what may decode the codes that a node looks up, one step after the other."""
        tensor, floats = gather.outputs[0], False
        while len(tensor.outputs) == 1 and id(tensor) not in self.outputs and id(tensor.outputs[0]) in self.nodes:
            step = self.step(tensor.outputs[0], tensor, floats, gather.inputs[1], shape)
            if step is None:
                return
            yield step
            tensor, floats = step.node.outputs[0], step.floats

    def step(self, node: Node, tensor: Tensor, floats: bool, ids: Tensor, shape: tuple[int, ...]) -> _Step | None:
        """Returns a reader of a tensor as a step, or None if it is none.

        Args:
            node: the reader.
            tensor: what it reads.
            floats: whether that is floating point.
            ids: by which rows were looked up.
            shape: of the table.
        """
        if not node.is_standard or len(node.outputs) != 1:
            return None
        if node.op == "Cast":
            letter = {TensorProto.FLOAT: "F", TensorProto.INT32: "I"}.get(node.attrs.get("to", 0), "C") if not floats else "C"
            wide = node.attrs.get("to") in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)
            return _Step(node, letter, wide, (letter, node.attrs.get("to")), None) if wide or letter == "I" else None
        if len(node.inputs) != 2 or node.op not in ("Add", "Gather", "Mul", "Sub"):
            return None
        is_index = node.op == "Gather"
        side = node.inputs[0 if is_index else 1]
        if node.inputs[1 if is_index else 0] is not tensor or floats != (node.op in ("Mul", "Sub")) or side is tensor:
            return None
        if is_index:
            one_axis = len(static_shape(side) or ()) == 1 and node.attrs.get("axis", 0) == 0
            fits = one_axis and is_float(self.known.get(id(side), np.dtype(np.int32)))
            return _Step(node, "G", True, ("G", id(side)), None) if fits else None
        return self.with_side(node, side, ids, shape)

    def with_side(self, node: Node, side: Tensor, ids: Tensor, shape: tuple[int, ...]) -> _Step | None:
        """Returns a step with one number for all rows, or one looked up for each."""
        source, pick = side, None
        if isinstance(side, Variable) and side.inputs and self.picks(side.inputs[0]) and side.inputs[0].inputs[1] is ids:
            pick = side.inputs[0]
            source = pick.inputs[0]
            if len(side.outputs) != 1 or id(side) in self.outputs or id(pick) not in self.nodes:
                return None
        known = static_shape(source) if id(source) in self.known else None
        if known is None or (len(known) >= len(shape) if pick is None else (len(known), known[0]) != (len(shape), shape[0])):
            return None
        return _Step(node, node.op[0], node.op != "Add", (node.op, id(source), pick is None), pick)


@dataclass(frozen=True)
class _Step:
    """A node that may be a step of decoding.

    Attributes:
        node: the node.
        letter: F and I for Casts to float32 and int32, C for other Casts; A, G, M, S for the ops.
        floats: whether it computes floating point.
        key: what must be the same in all lookups.
        side: looks up its second operand, or None.
    """

    node: Node
    letter: str
    floats: bool
    key: tuple[Any, ...]
    side: Node | None


def looks_up(node: Node, table: Tensor) -> bool:
    """Whether a node does nothing with a tensor but look up rows of it, by ids that are no constant."""
    if node.op != "Gather" or not node.is_standard or len(node.inputs) != 2 or node.attrs.get("axis", 0) != 0:
        return False
    return node.inputs[0] is table and node.inputs[1] is not table and isinstance(node.inputs[1], Variable)


def static_shape(tensor: Tensor) -> tuple[int, ...] | None:
    """Returns the shape of a constant, or of what Casts and a Reshape make of one."""
    while isinstance(tensor, Variable):
        producer = tensor.inputs[0] if tensor.inputs else None
        if producer is not None and producer.op == "Reshape" and isinstance(producer.inputs[1], Constant):
            dims = producer.inputs[1].values.tolist()
            return tuple(dims) if all(dim > 0 for dim in dims) else None
        if producer is None or producer.op != "Cast":
            return None
        tensor = producer.inputs[0]
    return tensor.shape
