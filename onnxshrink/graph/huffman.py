"""Huffman coded tensors inside a plain ONNX file: their data, the calls that decode it, and the way back.

    data, sizes, lane_starts, root_steps, lanes, length ── Huffman ── Split ── int8 vectors, one for each tensor

One call of `onnxshrink.graph.huffman_decoder` decodes a batch (`onnxshrink.numerics.huffman_batch`). Its bytes are one tensor
of parts, whose sizes are an attribute below opset 13:

    [0, 1,] stream, tree, values [, moves]        the first two bytes are there if batches wait for each other

Split has one part for each tensor, and one after each sequence for what the zeros at its end decode to. The last one also
takes the element where the decoder writes what is nothing.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnxshrink.errors import ModelReadError, must
from onnxshrink.graph.edit import NameSource, constant_bytes, node_bytes
from onnxshrink.graph.exporter import framed_bytes, node_message
from onnxshrink.graph.huffman_decoder import DECODER, DOMAIN, WEIGHT, DecoderShape, decoder_functions
from onnxshrink.graph.importer import from_model
from onnxshrink.graph.ir import Constant, Graph, Node, Scope, Variable
from onnxshrink.graph.storage import Stored
from onnxshrink.numerics.huffman_batch import Batch, decode, join
from onnxshrink.numerics.huffman_plan import Part, Sequenced

__all__ = [
    "Decoder",
    "Piece",
    "has_decoder",
    "inline_weight_call",
    "is_decoder_scope",
    "is_weight_call",
    "pieces",
    "remove_decoder",
]

Array = np.ndarray[Any, np.dtype[Any]]
Int8s = np.ndarray[Any, np.dtype[np.int8]]

_VERSION = 1  # of what calls, functions and data look like
_IR_VERSION = 8  # the first with model-local functions (onnx.proto)
_GATE = np.array([0, 1], np.uint8)
_SPLIT_SIZES_ARE_INPUT = 13


class Decoder:
    """Nodes, constants and functions, not yet in any graph, that decode batches.

    Attributes:
        outputs: the parts and the int8 vectors they come out as, in order.
        nodes: in order.
        constants: what they read.
        functions: what they call.
    """

    def __init__(
        self,
        opset: int,
        names: NameSource,
        batches: Sequence[Sequence[Sequenced]],
        functions: Sequence[onnx.FunctionProto] = (),
    ) -> None:
        """Makes the decoder of at least one batch of at least one sequence, all of the same lane size.

        Args:
            opset: of the model.
            names: gives tensor names.
            batches: in the order in which they are decoded.
            functions: others that go into the model with it.
        """
        joined = [join([sequence.coded for sequence in batch]) for batch in batches]
        coded = [sequence.coded for batch in batches for sequence in batch]
        self.shape = DecoderShape(
            opset=opset,
            lane_bytes=coded[0].lanes.shape[1],
            shortest=min(int(sequence.lengths[0]) for sequence in coded),
            has_runs=any(batch.moves is not None for batch in joined),
            gated=len(batches) > 1,
        )
        self.names = names
        self.nodes: list[Node] = []
        self.constants: list[Constant] = []
        self.outputs: list[tuple[Part, Variable]] = []
        self.functions = [*decoder_functions(self.shape), *functions]
        gate: Constant | Variable | None = self._numbers("gate", [1], TensorProto.INT64) if self.shape.gated else None
        for batch, parts in zip(joined, batches, strict=True):
            symbols, gate = self._call(batch, gate)
            self._split(symbols, parts)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        entry = helper.make_opsetid(DOMAIN, _VERSION)
        constants = sum(constant_bytes(constant, _plain_scope(self.shape.opset)) for constant in self.constants)
        shared = sum(framed_bytes(function.ByteSize()) for function in self.functions) + framed_bytes(entry.ByteSize())
        return constants + sum(node_bytes(node) for node in self.nodes) + shared

    def insert(self, graph: Graph) -> None:
        """Puts everything into a main graph."""
        graph.nodes[:0] = self.nodes
        graph.constants.extend(self.constants)
        model = onnx.ModelProto(functions=self.functions)
        model.opset_import.append(helper.make_opsetid("", self.shape.opset))
        graph.local_functions.extend(from_model(model).local_functions)
        graph.model.opset_import.append(helper.make_opsetid(DOMAIN, _VERSION))
        graph.raise_ir_version(_IR_VERSION)

    def _call(self, batch: Batch, gate: Constant | Variable | None) -> tuple[Variable, Variable | None]:
        """Adds the call for a batch; returns its symbols and the gate for the next one."""
        moves = batch.moves
        if moves is None and self.shape.has_runs:
            moves = np.minimum(np.arange(batch.values.size), 1).astype(np.uint8)
        parts = [batch.stream, batch.tree, batch.values.view(np.uint8), *([moves] if moves is not None else [])]
        sizes = [*([1] if gate else []), *(part.size for part in parts)]
        data = Constant(self.names.fresh("huffman"), np.concatenate([*([_GATE] if gate else []), *parts]))
        self.constants.append(data)
        inputs: list[Constant | Variable] = [data]
        if not self.shape.sizes_are_attribute:
            inputs.append(self._numbers("hs", sizes, TensorProto.INT64))
        inputs += [
            self._numbers("hl", batch.lane_starts.tolist(), TensorProto.INT32),
            self._numbers("hr", batch.root_steps.tolist(), TensorProto.INT32),
            self._numbers("hn", [batch.lanes], TensorProto.INT64),
            self._numbers("hk", [batch.length + 1], TensorProto.INT64),
        ]
        outputs = [Variable(self.names.fresh("h"))]
        if gate is not None:
            inputs.append(gate)
            outputs.append(Variable(self.names.fresh("hg")))
        attributes = {"e": sizes} if self.shape.sizes_are_attribute else {}
        note = onnx.NodeProto(doc_string=_checksum([tensor.values for tensor in inputs if isinstance(tensor, Constant)]))
        self.nodes.append(Node(DECODER, list(inputs), list(outputs), attributes, domain=DOMAIN, residue=note))
        return outputs[0], outputs[-1] if gate is not None else None

    def _split(self, symbols: Variable, parts: Sequence[Sequenced]) -> None:
        sizes, outputs = [], []
        for index, sequence in enumerate(parts):
            for part in sequence.parts:
                outputs.append(Variable(self.names.fresh("h"), np.dtype(np.int8)))
                sizes.append(part.stop - part.start)
                self.outputs.append((part, outputs[-1]))
            rest = sequence.coded.spare + (index == len(parts) - 1)
            if rest:
                sizes.append(rest)
                outputs.append(Variable(self.names.fresh("h")))
        inputs: list[Constant | Variable] = [symbols]
        if self.shape.opset >= _SPLIT_SIZES_ARE_INPUT:
            inputs.append(self._numbers("hs", sizes, TensorProto.INT64))
        attributes = {} if self.shape.opset >= _SPLIT_SIZES_ARE_INPUT else {"split": sizes}
        self.nodes.append(Node("Split", list(inputs), list(outputs), attributes))

    def _numbers(self, stem: str, numbers: list[int], kind: int) -> Constant:
        """Returns a vector in the form whose small numbers take few bytes (onnx.proto, TensorProto.int64_data: varints)."""
        message = helper.make_tensor("", kind, [len(numbers)], numbers)
        constant = Constant(self.names.fresh(stem), Stored(message))
        message.name = constant.name
        self.constants.append(constant)
        return constant


@dataclass(frozen=True, eq=False)
class _Call:
    """A call of the decoder and the Split after it, found in a graph."""

    node: Node
    split: Node
    graph: Graph

    @property
    def constants(self) -> list[Constant]:
        """What the two nodes read."""
        return [tensor for node in (self.node, self.split) for tensor in node.inputs if isinstance(tensor, Constant)]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the two nodes and what they read."""
        constants = sum(constant_bytes(constant, self.graph) for constant in self.constants)
        return node_bytes(self.node) + node_bytes(self.split) + constants

    @cached_property
    def symbols(self) -> Int8s:
        """All symbols, int8.

        Raises:
            ModelReadError: the data is damaged.
        """
        try:
            note = self.node.residue.doc_string if self.node.residue is not None else ""
            found = _checksum([tensor.values for tensor in self.node.inputs if isinstance(tensor, Constant)])
            if note and note != found:
                raise ValueError(must("data", "checksum", note, found))
            return decode(self._batch())
        except (ValueError, LookupError, TypeError) as error:
            raise ModelReadError(
                must(f"tensor '{self.node.site}'", "its Huffman coded data", "whole", f"{error}", "the file is damaged")
            ) from error

    def _batch(self) -> Batch:
        inputs = self.node.inputs[: 5 if "e" in self.node.attrs else 6]
        data, *numbers = [tensor.values for tensor in inputs if isinstance(tensor, Constant)]
        sizes = self.node.attrs["e"] if "e" in self.node.attrs else numbers.pop(0).tolist()
        starts, steps, lanes, length = numbers
        gated = len(self.node.outputs) > 1
        cuts = np.cumsum([gated, *sizes])
        if data.dtype != np.uint8 or data.ndim != 1 or min(sizes) < 0 or cuts[-1] != data.size:
            raise ValueError(must("data", "size", f"{cuts[-1]} bytes", f"{data.size}"))
        stream, tree, values, *moves = [data[start:end] for start, end in zip(cuts[gated:-1], cuts[gated + 1 :], strict=True)]
        return Batch(
            stream, tree, values.view(np.int8), moves[0] if moves else None, starts, steps, int(lanes[0]), int(length[0]) - 1
        )


@dataclass(frozen=True, eq=False)
class Piece:
    """A vector that a model decodes while it starts.

    Attributes:
        tensor: the output of the Split.
        start: its first element among the symbols of the batch.
        size: how many.
    """

    tensor: Variable
    start: int
    size: int
    _call: _Call

    @property
    def nbytes(self) -> float:
        """Its share, by elements, of the bytes of the batch; nothing of the functions."""
        siblings = _pieces_of(self._call.split, self._call.graph)
        return self._call.nbytes * self.size / max(sum(piece.size for piece in siblings), 1)

    @property
    def constants(self) -> list[Constant]:
        """All constants of the batch."""
        return self._call.constants

    def values(self) -> Int8s:
        """Returns the elements, int8 [size].

        Raises:
            ModelReadError: the data is damaged.
        """
        symbols = self._call.symbols
        if self.start + self.size > symbols.size:
            owner = f"tensor '{self.tensor.name}'"
            raise ModelReadError(must(owner, "its Huffman coded data", f"{self.size} codes or more", symbols.size - self.start))
        return symbols[self.start : self.start + self.size]


def _checksum(arrays: Sequence[Array]) -> str:
    """Returns the CRC-32 of what a call reads, as its doc_string holds it: most damaged streams decode to something."""
    return f"crc32 {zlib.crc32(b''.join(array.tobytes() for array in arrays)):08x}"


def has_decoder(graph: Graph) -> bool:
    """Whether the model has the functions of a decoder.

    Raises:
        ModelReadError: of one that this version does not know.
    """
    versions = {entry.version for entry in graph.model.opset_import if entry.domain == DOMAIN}
    if versions - {_VERSION}:
        reason = "use the version of onnxshrink that wrote it, or a later one"
        raise ModelReadError(f"{must('model', 'its Huffman decoder', f'version {_VERSION}', max(versions))}; {reason}")
    return any(function.domain == DOMAIN and function.name == DECODER for function in graph.local_functions)


def is_decoder_scope(scope: Scope) -> bool:
    """Whether a scope is a function of the decoder, or a body in one: nothing in it is the model's own."""
    return scope.path.startswith(f"{DOMAIN}::")


def is_weight_call(node: Node) -> bool:
    """Whether a node calls the function that turns a vector of codes into a weight."""
    return node.domain == DOMAIN and node.op == WEIGHT


def inline_weight_call(node: Node, proto: onnx.GraphProto) -> None:
    """Adds what a call of that function computes to a message, as nodes of standard ops."""
    call = node_message(node)
    shape, (attribute,) = TensorProto(), call.attribute
    sizes = helper.make_tensor("", TensorProto.INT64, [len(attribute.ints)], attribute.ints)
    shape.CopyFrom(attribute.t if attribute.HasField("t") else sizes)
    shape.name, shaped, wide, scale = (f"{call.output[0]}.{part}" for part in ("shape", "shaped", "wide", "scale"))
    proto.initializer.append(shape)
    proto.node.extend(
        [
            helper.make_node("Reshape", [call.input[0], shape.name], [shaped]),
            helper.make_node("Cast", [shaped], [wide], to=TensorProto.FLOAT),
            helper.make_node("Cast", [call.input[1]], [scale], to=TensorProto.FLOAT),
            helper.make_node("Mul", [wide, scale], call.output),
        ]
    )


def pieces(graph: Graph) -> dict[int, Piece]:
    """Returns what the main graph decodes, by id of the tensor."""
    if not has_decoder(graph):
        return {}
    return {id(piece.tensor): piece for node in graph.nodes for piece in _pieces_of(node, graph)}


def remove_decoder(graph: Graph) -> None:
    """Removes the functions of the decoder if nothing calls them any more."""
    outside = (scope.graph for scope in graph.scopes() if not is_decoder_scope(scope))
    if any(node.domain == DOMAIN for scope in outside for node in scope.nodes) or not has_decoder(graph):
        return
    graph.local_functions = [function for function in graph.local_functions if function.domain != DOMAIN]
    others = [entry for entry in graph.model.opset_import if entry.domain != DOMAIN]
    del graph.model.opset_import[:]
    graph.model.opset_import.extend(others)


def _pieces_of(node: Node, graph: Graph) -> Iterator[Piece]:
    """Yields the pieces that a Split after a call of the decoder cuts, and that something reads."""
    producers = node.inputs[0].inputs if node.op == "Split" and node.is_standard and node.inputs else []
    if not producers or producers[0].op != DECODER or producers[0].domain != DOMAIN:
        return
    sizes = node.attrs.get("split") if len(node.inputs) == 1 else getattr(node.inputs[1], "values", None)
    if sizes is None or len(sizes) != len(node.outputs):
        return
    call, start = _Call(producers[0], node, graph), 0
    for tensor, size in zip(node.outputs, map(int, sizes), strict=True):
        if isinstance(tensor, Variable) and tensor.outputs:
            yield Piece(tensor, start, size, call)
        start += size


def _plain_scope(opset: int) -> Graph:
    return Graph("", opset, onnx.GraphProto())
