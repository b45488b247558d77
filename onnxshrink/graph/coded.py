"""Finds weights that are stored as codes, or as values and where they are, and computes them back to dense tensors.

A coded weight is what `onnxshrink.graph.codebook` writes, recognised by its structure and not by its names: a floating-point
tensor that a few standard ops compute from nothing but constants, unsigned integers of at most 8 bits among them, or from what
the Huffman decoder of the file puts out (`onnxshrink.graph.huffman`). Tables that stay coded at run time are found by
`onnxshrink.graph.table_lookups`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnxshrink.errors import ModelReadError
from onnxshrink.graph.edit import constant_bytes, nodes_bytes, output_ids, replace_node
from onnxshrink.graph.exporter import inline_tensor, node_message
from onnxshrink.graph.huffman import Piece, inline_weight_call, is_weight_call, pieces, remove_decoder
from onnxshrink.graph.ir import Constant, Graph, Node, Scope, Tensor, Variable
from onnxshrink.graph.sparse_steps import QUICK_OPS, counts_bits, is_sparse_decoder
from onnxshrink.graph.storage import element_type, is_float
from onnxshrink.graph.table_lookups import CodedTable, coded_tables, expand_table

__all__ = ["Coded", "coded_weights", "expand_coded"]

Array = np.ndarray[Any, np.dtype[Any]]
_DECODING_OPS = ("Add", "Cast", "Div", "Gather", "Mod", "Mul", "Reshape", "Slice", "Sub")
_SCALING_OPS = ("Cast", "Mul", "Sub")
_CODE_TYPES = ("uint8", "uint4", "uint2")


@dataclass(frozen=True, eq=False)
class Coded:
    """A weight stored as codes, or, if `is_sparse`, as values and where they are.

    Attributes:
        site: model-wide name of the tensor that is computed.
        scope: where it is computed.
        output: that tensor; of a table that stays coded at run time, the tensor of its codes.
        nodes: what computes it, in order; of such a table, what computes the rows that are looked up.
        constants: what those nodes read.
        pieces: what they read of a Huffman decoder.
        table: of a table that stays coded at run time, where it is looked up; else None.
    """

    site: str
    scope: Scope
    output: Tensor
    nodes: tuple[Node, ...]
    constants: tuple[Constant, ...]
    pieces: tuple[Piece, ...] = ()
    table: CodedTable | None = None

    @property
    def codes(self) -> tuple[Constant, ...]:
        """The constants that hold codes."""
        return tuple(constant for constant in self.constants if constant.dtype.name in _CODE_TYPES)

    @property
    def is_sparse(self) -> bool:
        """Whether it is stored as values and where they are."""
        return any(is_sparse_decoder(node) for node in self.nodes)

    @property
    def parts(self) -> tuple[Constant, ...]:
        """All constants that exist only for this weight and others like it."""
        return (*self.constants, *(constant for piece in self.pieces for constant in piece.constants))

    @property
    def nbytes(self) -> int:
        """Bytes in the file; parts that several weights share count for each, but Huffman coded data in proportion."""
        constants = sum(constant_bytes(constant, self.scope.graph) for constant in self.constants)
        return nodes_bytes(self.nodes) + constants + round(sum(piece.nbytes for piece in self.pieces))

    def values(self) -> Array:
        """Returns the dense tensor.

        Raises:
            ModelReadError: Huffman coded data is damaged.
        """
        return self.evaluate(self.output if self.table is None else self.table.rows)

    def evaluate(self, tensor: Tensor) -> Array:
        """Returns the values of the weight or of a tensor on the way to it; for rows of a table, those of all rows.

        Raises:
            ModelReadError: the codes are damaged.
        """
        if isinstance(tensor, Constant):
            return tensor.values
        graph = onnx.GraphProto(name="decoder", output=[onnx.ValueInfoProto(name=tensor.name)])
        picks = self.table.picks if self.table is not None else set()
        nodes = _cone(tensor.inputs, {id(node): node for node in self.nodes})
        for node in nodes:
            if is_weight_call(node):
                inline_weight_call(node, graph)
            elif id(node) in picks:
                graph.node.append(helper.make_node("Identity", [node.inputs[0].name], [node.outputs[0].name]))
            else:
                graph.node.append(node_message(node))
        read = {id(operand) for node in nodes for operand in node.inputs}
        for constant in (constant for constant in self.constants if id(constant) in read):
            graph.initializer.append(inline_tensor(constant))
            graph.initializer[-1].name = constant.name
        decoded = (piece for piece in self.pieces if id(piece.tensor) in read)
        graph.initializer.extend(numpy_helper.from_array(piece.values(), piece.tensor.name) for piece in decoded)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.scope.graph.opset)])
        try:
            results: Any = ReferenceEvaluator(model, new_ops=QUICK_OPS).run(None, {})
        except (IndexError, ValueError, TypeError, RuntimeError) as error:  # of numpy, for codes that no codebook has
            raise ModelReadError(f"tensor '{self.site}': its codes cannot be decoded: {error}; the file is damaged") from error
        return np.asarray(results[0])


def coded_weights(graph: Graph) -> list[Coded]:
    """Returns the coded weights of every scope, tables that stay coded at run time first, else in graph order."""
    outputs, decoded = output_ids(graph), pieces(graph)
    return [coded for scope in graph.scopes() for coded in _in_scope(scope, outputs, decoded)]


def expand_coded(graph: Graph, *, tables: bool = True) -> list[Coded]:
    """Replaces every coded weight, every one kept in float16 and every sparse tensor by a dense one; returns what was replaced.

    Args:
        graph: the main graph.
        tables: whether those that stay coded at run time become dense too. Otherwise their codes become a constant, a byte each.

    Raises:
        ModelReadError: Huffman coded data is damaged.
    """
    coded = coded_weights(graph)
    parts = {id(node) for item in coded for node in item.nodes}  # a codebook may itself be kept in float16
    found = [*coded, *(half for half in _half_weights(graph) if id(half.nodes[0]) not in parts), *_sparse_tensors(graph)]
    for item in found:
        if not item.nodes and item.table is None and isinstance(item.output, Constant):
            item.output.values = item.values()
            continue
        if item.table is not None and not tables:
            if isinstance(item.output, Variable):
                codes = Constant(item.output.name, item.evaluate(item.output))
                replace_node(item.scope.graph, graph, item.output.inputs[0], [codes])
        elif item.table is not None:
            expand_table(item.scope.graph, graph, item.table, item.values())
        else:
            replace_node(item.scope.graph, graph, item.nodes[-1], [Constant(item.output.name, item.values())])
    remove_decoder(graph)
    return found


def _half_weights(graph: Graph) -> list[Coded]:
    """Returns the tensors that are nothing but the Cast of a stored float16 one to a wider type."""
    found = []
    for scope in graph.scopes():
        halves = {id(constant) for constant in scope.graph.constants if constant.dtype == np.float16}
        for node in scope.graph.nodes:
            if node.op != "Cast" or not node.is_standard or node.attrs.get("to") not in (TensorProto.FLOAT, TensorProto.DOUBLE):
                continue
            source, output = node.inputs[0], node.outputs[0]
            if isinstance(source, Constant) and id(source) in halves and isinstance(output, Variable):
                found.append(Coded(scope.address(output.name), scope, output, (node,), (source,)))
    return found


def _sparse_tensors(graph: Graph) -> list[Coded]:
    """Returns the tensors that are stored as ONNX's own sparse ones."""
    return [
        Coded(scope.address(constant.name), scope, constant, (), (constant,))
        for scope in graph.scopes()
        for constant in scope.graph.constants
        if constant.stored is not None and constant.stored.is_sparse
    ]


def _in_scope(scope: Scope, outputs: set[int], decoded: dict[int, Piece]) -> Iterator[Coded]:
    known = {id(constant): constant.dtype for constant in scope.graph.constants} | dict.fromkeys(decoded, np.dtype(np.int8))
    decoding: dict[int, Node] = {}
    for node in scope.graph.nodes:
        dtype = _step(node, known, outputs, decoded)
        if dtype is not None:
            decoding[id(node)] = node
            known[id(node.outputs[0])] = dtype
    tables = coded_tables(scope.graph, known, outputs)
    of_tables: set[int] = set()
    for table in tables:
        own = {id(node): node for lookup in table.lookups for node in lookup.nodes}
        before = _cone([producer for node in own.values() for tensor in node.inputs for producer in tensor.inputs], decoding)
        of_tables.update(id(node) for node in before)
        yield _coded(scope, table.codes, [*before, *own.values()], decoded, table)
    for node in decoding.values():
        output = node.outputs[0]
        ends = len(output.outputs) != 1 or id(output) in outputs or id(output.outputs[0]) not in decoding
        if ends and is_float(known[id(output)]) and isinstance(output, Variable) and id(node) not in of_tables:
            coded = _coded(scope, output, _cone([node], decoding), decoded)
            if coded.codes or coded.pieces:
                yield coded


def _coded(
    scope: Scope, output: Tensor, nodes: Sequence[Node], decoded: dict[int, Piece], table: CodedTable | None = None
) -> Coded:
    reads = {id(tensor): tensor for node in nodes for tensor in node.inputs}
    constants = tuple(tensor for tensor in reads.values() if isinstance(tensor, Constant))
    own = tuple(decoded[key] for key in reads if key in decoded)
    return Coded(scope.address(output.name), scope, output, tuple(nodes), constants, own, table)


def _step(
    node: Node, known: dict[int, np.dtype[Any]], outputs: set[int], decoded: dict[int, Piece]
) -> np.dtype[Any] | None:
    """Returns the element type that a node computes, if it may be a step from codes to a weight, else None.

    Integers go through all decoding ops. Once they are floating point they are only scaled and converted, and a tensor that is
    read more than once is a weight: what comes after it belongs to its readers.

    Args:
        node: the node.
        known: element types of the constants and of the results of earlier steps, by id.
        outputs: ids of the tensors that are outputs of a scope.
        decoded: what a Huffman decoder puts out, by id.
    """
    if (counted := counts_bits(node, known)) is not None:
        return counted
    reads = [tensor for tensor in node.inputs if tensor.name]
    joins = node.op == "Concat" and all(id(tensor) in decoded for tensor in reads)
    decodes = (node.is_standard and (node.op in _DECODING_OPS or joins) and len(node.outputs) == 1) or is_weight_call(node)
    if not decodes or not reads or not all(id(tensor) in known for tensor in reads):
        return None
    for tensor in reads:
        if isinstance(tensor, Variable) and is_float(known[id(tensor)]):
            continues = len(tensor.outputs) == 1 and id(tensor) not in outputs
            if not continues or not (_is_operand(tensor) or (tensor is reads[0] and node.op in _SCALING_OPS)):
                return None
    if is_weight_call(node):
        return np.dtype(np.float32)
    if node.op != "Cast":
        return known[id(reads[0])]
    target = node.attrs.get("to")
    return element_type(target) if isinstance(target, int) else None


def _is_operand(tensor: Tensor) -> bool:
    """Whether a tensor is a stored one, converted or looked up for each element.

    Codebooks and zero points are kept in smaller types, and numbers that tiles of the weight share in the shape of those.
    """
    while isinstance(tensor, Variable):
        maker = tensor.inputs[0]
        source = maker.inputs[0]
        spreads = maker.op == "Gather" and (isinstance(source, Variable) or len(source.shape) > 1)
        if not (maker.op == "Cast" or spreads):
            return False
        tensor = source
    return True


def _cone(last: Iterable[Node], decoding: Mapping[int, Node]) -> list[Node]:
    """Returns those of the decoding nodes that some nodes depend on or are, in graph order."""
    needed: set[int] = set()
    queue = [node for node in last if id(node) in decoding]
    while queue:
        node = queue.pop()
        if id(node) not in needed:
            needed.add(id(node))
            queue.extend(producer for tensor in node.inputs for producer in tensor.inputs if id(producer) in decoding)
    return [node for key, node in decoding.items() if key in needed]
