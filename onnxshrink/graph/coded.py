"""Finds weights that are stored as codes, and computes them back to dense tensors.

A coded weight is what `onnxshrink.graph.codebook` writes, recognised by its structure and not by its names: a floating-point tensor
that a few standard ops compute from nothing but constants, unsigned integers of at most 8 bits among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper
from onnx.reference import ReferenceEvaluator

from onnxshrink.graph.convert import inline_tensor, node_message
from onnxshrink.graph.edit import item_bytes, output_ids, replace_node
from onnxshrink.graph.ir import Constant, Graph, Node, Scope, Tensor, Variable
from onnxshrink.graph.storage import is_float

__all__ = ["Coded", "coded_weights", "expand_coded"]

Array = np.ndarray[Any, np.dtype[Any]]
_DECODING_OPS = ("Add", "Cast", "Div", "Gather", "Mod", "Mul", "Reshape", "Slice", "Sub")
_CODE_TYPES = ("uint8", "uint4", "uint2")


@dataclass(frozen=True, eq=False)
class Coded:
    """A weight stored as codes.

    Attributes:
        site: model-wide name of the tensor that is computed.
        scope: where it is computed.
        output: that tensor.
        nodes: what computes it, in order.
        constants: what those nodes read.
    """

    site: str
    scope: Scope
    output: Variable
    nodes: tuple[Node, ...]
    constants: tuple[Constant, ...]

    @property
    def codes(self) -> tuple[Constant, ...]:
        """The constants that hold codes."""
        return tuple(constant for constant in self.constants if constant.dtype.name in _CODE_TYPES)

    @property
    def nbytes(self) -> int:
        """Bytes in the file; parts that several weights share count for each."""
        return sum(item_bytes(item, self.scope.graph) for item in [*self.nodes, *self.constants])

    def values(self) -> Array:
        """Returns the dense tensor."""
        graph = onnx.GraphProto(
            name="decoder",
            node=[node_message(node) for node in self.nodes],
            output=[onnx.ValueInfoProto(name=self.output.name)],
        )
        for constant in self.constants:
            graph.initializer.append(inline_tensor(constant))
            graph.initializer[-1].name = constant.name
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.scope.graph.opset)])
        return np.asarray(ReferenceEvaluator(model).run(None, {})[0])


def coded_weights(graph: Graph) -> list[Coded]:
    """Returns the coded weights of every scope, in graph order."""
    outputs = output_ids(graph)
    return [coded for scope in graph.scopes() for coded in _in_scope(scope, outputs)]


def expand_coded(graph: Graph) -> list[Coded]:
    """Replaces every coded weight by its dense tensor, of the same name; returns what was replaced."""
    found = coded_weights(graph)
    for coded in found:
        dense = Constant(coded.output.name, coded.values())
        replace_node(coded.scope.graph, graph, coded.nodes[-1], [dense])
    return found


def _in_scope(scope: Scope, outputs: set[int]) -> Iterator[Coded]:
    owned = {id(constant) for constant in scope.graph.constants}
    decoding: dict[int, Node] = {}
    for node in scope.graph.nodes:
        reads = [tensor for tensor in node.inputs if tensor.name]
        if node.op in _DECODING_OPS and node.is_standard and all(
            id(tensor) in owned or any(id(producer) in decoding for producer in tensor.inputs) for tensor in reads
        ):
            decoding[id(node)] = node
    for node in decoding.values():
        output = node.outputs[0]
        inner = output.outputs and all(id(reader) in decoding for reader in output.outputs)
        if (inner and id(output) not in outputs) or not isinstance(output, Variable):
            continue
        dtype = _dtype(output)
        nodes = _cone(node, decoding)
        constants = {id(t): t for inner_node in nodes for t in inner_node.inputs if isinstance(t, Constant)}
        coded = Coded(scope.address(output.name), scope, output, tuple(nodes), tuple(constants.values()))
        if dtype is not None and is_float(dtype) and coded.codes:
            yield coded


def _cone(last: Node, decoding: dict[int, Node]) -> list[Node]:
    """Returns the decoding nodes that a node depends on, itself included, in graph order."""
    needed: set[int] = set()
    queue = [last]
    while queue:
        node = queue.pop()
        if id(node) not in needed:
            needed.add(id(node))
            queue.extend(producer for tensor in node.inputs for producer in tensor.inputs if id(producer) in decoding)
    return [node for key, node in decoding.items() if key in needed]


def _dtype(tensor: Tensor) -> np.dtype[Any] | None:
    """Returns the element type that decoding ops compute: Cast's own, else that of their first input."""
    while isinstance(tensor, Variable):
        node = tensor.inputs[0]
        if node.op == "Cast":
            return helper.tensor_dtype_to_np_dtype(int(node.attrs["to"]))
        tensor = node.inputs[0]
    return tensor.dtype
