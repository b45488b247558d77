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

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from onnxshrink.graph.codebook import Codebook, DecoderBuilder, Operands, UniformGrid, tiles_along
from onnxshrink.graph.edit import Fragment, NameSource, drop_constant, node_bytes
from onnxshrink.graph.ir import Constant, Graph, Node, Tensor, Variable
from onnxshrink.graph.table_lookups import looks_up, static_shape

__all__ = ["LEAST_BYTES", "TableFragment", "coded_table", "lookups"]

Uint8s = np.ndarray[Any, np.dtype[np.uint8]]

LEAST_BYTES = 2**20  # dense; below that memory is not worth the nodes that run each time


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
    found = all(id(node) in inside and looks_up(node, constant) for node in readers)
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
    shape, tile = constant.shape, values.tile
    by_row = tile is not None and tiles_along(shape, tile)[0] > 1
    if tile is not None and not by_row:  # any row, whatever the rank of the ids
        values, shape = replace(values, tile=tile[1:]), shape[1:]
    operands = builder.operands(values, shape, constant.dtype)
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
        shape = static_shape(tensor) if tensor is not None else None
        return builder.node("Gather", [tensor, ids]) if tensor is not None and shape is not None and len(shape) == rank else tensor

    return Operands(of_rows(operands.scale), of_rows(operands.zero_point), operands.codebook, of_rows(operands.offsets))


def _take_over(node: Node, reader: Node) -> None:
    """Gives a node what a reader of the table was called and said beside its inputs and outputs."""
    node.name, node.attrs, node.residue = reader.name, dict(reader.attrs), reader.residue
