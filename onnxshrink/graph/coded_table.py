"""Tables of embeddings that stay coded while a model runs: what is looked up are codes, and only those rows are decoded.

    codes ── Gather(ids) ── Cast ── Sub(zero point) ── Mul(scale) ── rows                    a uniform grid
    codes ── Gather(ids) ── Cast [── Add(offsets)] ── Gather(codebook) [── Mul(scale)] ── rows    codebooks
    scale [V, 1] ── Gather(ids) ── Mul                                    what differs from row to row is looked up as well

The steps are those of `onnxshrink.graph.codebook`, on fewer elements, so the rows come out the same bit for bit. Because ``ids``
is known only when the model runs, ONNX Runtime cannot fold them (constant_folding.cc wants constant inputs), and keeps a byte
for each element of the table where it would keep 2, 4 or 8. Codes of fewer bits, and Huffman coded ones, are unpacked to such
bytes when a session starts. The tensor of codes has the name that the table had.

    table [V, *d] by its codes [V, *d]: rows[i, *d] = decode(codes[ids[i], *d]) = decode(codes)[ids[i], *d]
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import numpy as np
from onnx import TensorProto

from onnxshrink.graph.codebook import Codebook, DecoderBuilder, Operands, UniformGrid, broadcast_shape
from onnxshrink.graph.edit import Fragment, NameSource, drop_constant, node_bytes, remove_dead
from onnxshrink.graph.ir import Constant, Graph, Node, Tensor, Variable
from onnxshrink.graph.storage import is_float

__all__ = ["LEAST_BYTES", "CodedTable", "Lookup", "TableFragment", "coded_table", "coded_tables", "expand_table", "lookups"]

Array = np.ndarray[Any, np.dtype[Any]]
Uint8s = np.ndarray[Any, np.dtype[np.uint8]]

LEAST_BYTES = 2**20  # dense; below that memory is not worth the nodes that run each time
_GRID_OR_CODEBOOK = re.compile("FS?MC?|IA*G(MC?)?")  # the steps after a lookup, by the letters that `_letter` gives them


def lookups(constant: Constant, scope: Graph) -> list[Node]:
    """Returns the nodes that look up rows of a table by ids known only at run time, or none if anything else reads it.

    Args:
        constant: any constant; one of less than `LEAST_BYTES` is no table.
        scope: that owns it, and that the nodes must be in.
    """
    readers = list({id(node): node for node in constant.outputs}.values())
    inside = {id(node) for node in scope.nodes}
    if constant.nbytes < LEAST_BYTES or any(tensor is constant for tensor in scope.outputs):
        return []
    found = all(id(node) in inside and _looks_up(node, constant) for node in readers)
    return readers if found else []


@dataclass
class TableFragment:
    """What takes the place of a table and of the nodes that look its rows up; not yet in any graph.

    Attributes:
        codes: the tensor of codes, a byte each, with the name of the table.
        fragment: what computes that when a session starts, and all constants.
        rows: for each node that looks up, a stand-in for its ids, and what takes its place.
    """

    codes: Tensor
    fragment: Fragment
    rows: list[tuple[Node, Variable, list[Node]]] = field(default_factory=list)

    def nbytes(self, scope: Graph) -> int:
        """Returns the bytes it takes in the file as a part of ``scope``, less those of the nodes that look rows up now."""
        nodes = sum(sum(map(node_bytes, after)) - node_bytes(before) for before, _, after in self.rows)
        return self.fragment.nbytes(scope) + nodes

    def insert(self, scope: Graph, constant: Constant) -> None:
        """Puts it where the table and its lookups were."""
        position = {id(node): index for index, node in enumerate(scope.nodes)}
        nodes: list[list[Node]] = [[node] for node in scope.nodes]
        for before, stand_in, after in self.rows:
            (rows,), ids = list(before.outputs), before.inputs[1]
            before.inputs.clear()
            before.outputs.clear()
            for node in list(stand_in.outputs):
                node.inputs[1] = ids
            after[-1].outputs[0] = rows
            nodes[position[id(before)]] = after
        drop_constant(scope, constant)
        scope.nodes = [*self.fragment.nodes, *(node for several in nodes for node in several)]
        scope.constants.extend(self.fragment.constants)


def coded_table(
    constant: Constant,
    readers: Sequence[Node],
    codes: Uint8s,
    bits: int,
    values: Codebook | UniformGrid,
    scope: Graph,
    names: NameSource,
) -> TableFragment:
    """Returns what computes rows of a table from its codes.

    Args:
        constant: the table; gives name, shape and dtype.
        readers: as `lookups` returned them.
        codes: uint8, same shape, all below 2**bits.
        bits: 1 to 8.
        values: what the codes stand for.
        scope: the graph it will be a part of.
        names: gives tensor names.
    """
    builder = DecoderBuilder(constant.name, scope, names)
    table = builder.cast(builder.codes(codes, bits), np.uint8)
    table.name = constant.name
    if isinstance(table, Variable):
        table.shape = constant.shape
    by_row = values.axis == 0
    shape = broadcast_shape(constant.shape, values.axis)
    operands = builder.operands(values, shape if by_row else shape[1:], constant.dtype)
    folded = len(builder.fragment.nodes)
    result = TableFragment(table, builder.fragment)
    for reader in readers:
        ids = Variable(reader.inputs[1].name)
        rows = builder.node("Gather", [table, ids])
        _take_over(builder.fragment.nodes[-1], reader)
        picked = _picked(operands, len(constant.shape), builder, ids) if by_row else operands
        last = builder.decoded(rows, picked, constant.dtype)
        last.name, last.info = reader.outputs[0].name, reader.outputs[0].info
        result.rows.append((reader, ids, builder.fragment.nodes[folded:]))
        del builder.fragment.nodes[folded:]
    return result


def _picked(operands: Operands, rank: int, builder: DecoderBuilder, ids: Tensor) -> Operands:
    """Returns operands of one number per row as those of the rows looked up; one number for all rows stays."""

    def of_rows(tensor: Tensor | None) -> Tensor | None:
        shape = _shape(tensor) if tensor is not None else None
        return builder.node("Gather", [tensor, ids]) if tensor is not None and shape is not None and len(shape) == rank else tensor

    return Operands(of_rows(operands.scale), of_rows(operands.zero_point), operands.codebook, of_rows(operands.offsets))


def _take_over(node: Node, reader: Node) -> None:
    """Gives a node what a reader of the table was called and said beside its inputs and outputs."""
    node.name, node.attrs, node.residue = reader.name, dict(reader.attrs), reader.residue


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

    def stored_operand(self, op: str) -> Constant | None:
        """Returns the constant that a step of an op, Sub or Gather, decodes with, or None if there is no such step."""
        step = next((step for step in self.lookups[0].steps if step.op == op), None)
        tensor = step.inputs[0 if op == "Gather" else 1] if step is not None else None
        while isinstance(tensor, Variable):
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
        return source is not None and id(source) in self.known and _looks_up(node, source) and id(node.inputs[1]) not in self.known

    def table(self, codes: Tensor) -> CodedTable | None:
        """Returns the table of a tensor of codes: it ends where the lookups cease to be alike."""
        shape, readers = _shape(codes), {id(node): node for node in codes.outputs}.values()
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
            one_axis = len(_shape(side) or ()) == 1 and node.attrs.get("axis", 0) == 0
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
        known = _shape(source) if id(source) in self.known else None
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


def _looks_up(node: Node, table: Tensor) -> bool:
    """Whether a node does nothing with a table but look up rows, by ids that are no constant."""
    if node.op != "Gather" or not node.is_standard or len(node.inputs) != 2 or node.attrs.get("axis", 0) != 0:
        return False
    return node.inputs[0] is table and node.inputs[1] is not table and isinstance(node.inputs[1], Variable)


def _shape(tensor: Tensor) -> tuple[int, ...] | None:
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
