"""The graph that passes edit: GraphSurgeon's classes, with identity for equality and every field of the file kept.

GraphSurgeon's tensors and nodes compare by name, its importer skips attribute kinds it does not know and its copies share
what they should not. The subclasses here compare by identity, so sibling branches may reuse names, and carry as
``residue`` every protobuf field that GraphSurgeon has no room for; `onnxshrink.graph.importer` fills it, the exporter empties it.

A constant is one kind of object wherever it hides: an initializer, an initializer listed as graph input, a sparse
initializer or the tensor of a Constant node are all a `Constant` in the ``constants`` of the scope that owns it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxshrink.graph.storage import Stored, element_type, raw_nbytes

__all__ = ["FIRST_IR_WITH_OVERRIDES", "Constant", "Graph", "Node", "Scope", "Tensor", "Variable", "declared_type", "freeze"]

FIRST_IR_WITH_OVERRIDES = 4  # before it, every initializer had to be listed as an input (onnx.proto, IR_VERSION)

Array = np.ndarray[Any, np.dtype[Any]]
Dims = tuple["int | str | None", ...]


class Variable(gs.Variable):  # type: ignore[misc]  # GraphSurgeon ships no types
    """A tensor known only when the model runs.

    Attributes:
        info: the ValueInfoProto it was read from, or None; written back as it was while dtype and shape are unchanged.
    """

    name: str
    dtype: np.dtype[Any] | None
    shape: Dims | None
    inputs: list[Node]
    outputs: list[Node]
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __init__(
        self,
        name: str,
        dtype: np.dtype[Any] | None = None,
        shape: Dims | None = None,
        info: onnx.ValueInfoProto | None = None,
    ) -> None:
        super().__init__(name, dtype, shape)
        self.info = info

    def clone(self) -> Variable:
        """Returns a copy without links to nodes."""
        return Variable(self.name, self.dtype, self.shape, self.info)


class Constant(gs.Constant):  # type: ignore[misc]  # GraphSurgeon ships no types
    """A tensor whose values are in the file, or in a frozen array once a pass has replaced them.

    Attributes:
        info: the ValueInfoProto it carries as a graph input or in value_info, or None.
        holder: the Constant node it was read from, without its tensor, or None for an initializer.
    """

    name: str
    inputs: list[Node]
    outputs: list[Node]
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __init__(
        self,
        name: str,
        values: Stored | Array,
        info: onnx.ValueInfoProto | None = None,
        holder: onnx.NodeProto | None = None,
    ) -> None:
        super().__init__(name, values if isinstance(values, Stored) else freeze(values))
        self.info = info
        self.holder = holder

    @property
    def values(self) -> Array:
        """The values, read-only, any shape and dtype. Stored values are read anew each time and never kept."""
        stored: Stored | Array = self._values
        return stored.load() if isinstance(stored, Stored) else stored

    @values.setter
    def values(self, values: Stored | Array) -> None:
        self._values = values if isinstance(values, Stored) else freeze(values)

    @property
    def stored(self) -> Stored | None:
        """The untouched tensor of the file, or None once a pass has replaced the values."""
        return self._values if isinstance(self._values, Stored) else None

    @property
    def shape(self) -> tuple[int, ...]:
        """The dimensions."""
        return tuple(self._values.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The element type; ml_dtypes' for those numpy lacks."""
        dtype: np.dtype[Any] = self._values.dtype
        return dtype

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the values as an ONNX file stores them (two 4-bit elements to a byte)."""
        return raw_nbytes(self.size, self.dtype)

    def clone(self) -> Constant:
        """Returns a copy without links to nodes that shares the frozen values."""
        return Constant(self.name, self._values, self.info, self.holder)


Tensor = Variable | Constant


class Node(gs.Node):  # type: ignore[misc]  # GraphSurgeon ships no types
    """One operation.

    Attributes:
        attrs: attribute values by name: Python numbers, strings and lists, a `Graph` for a body, and an AttributeProto
            for anything else.
        residue: the fields of the NodeProto that have no place here (doc_string, metadata_props, ...), or None.
    """

    op: str
    name: str
    domain: str | None
    attrs: dict[str, Any]
    inputs: list[Tensor]
    outputs: list[Tensor]
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __init__(
        self,
        op: str,
        inputs: list[Tensor],
        outputs: list[Tensor],
        attrs: dict[str, Any] | None = None,
        name: str = "",
        domain: str | None = None,
        residue: onnx.NodeProto | None = None,
    ) -> None:
        super().__init__(op, name, dict(attrs or {}), inputs, outputs, domain)
        self.residue = residue

    @property
    def is_standard(self) -> bool:
        """Whether the op belongs to the ONNX standard's default domain."""
        return self.domain in (None, "", "ai.onnx")

    @property
    def site(self) -> str:
        """The name of the first output, by which reports and rules address the node."""
        return next((tensor.name for tensor in self.outputs if tensor.name), self.name)

    @property
    def overload(self) -> str:
        """Which of the model-local functions of the op's name this calls, since IR version 10."""
        return self.residue.overload if self.residue is not None else ""

    def bodies(self) -> Iterator[tuple[str, Graph]]:
        """Yields (attribute name, body) for each If, Loop or Scan body."""
        yield from ((name, value) for name, value in self.attrs.items() if isinstance(value, Graph))


@dataclass(frozen=True)
class Scope:
    """A graph and where it is: ``path`` is empty for the main graph, else e.g. ``If_0_out.then_branch``."""

    path: str
    graph: Graph

    def address(self, name: str) -> str:
        """Returns the model-wide name of a tensor of this scope: sibling branches may reuse plain names."""
        return f"{self.path}/{name}" if self.path else name


class Graph(gs.Graph):  # type: ignore[misc]  # GraphSurgeon ships no types
    """The main graph, the body of a node, or a model-local function.

    Attributes:
        inputs: graph inputs in order, a `Constant` where an initializer is listed among them.
        constants: every constant this scope owns, used or not.
        local_functions: the model's functions (main graph only).
        residue: fields of the GraphProto or FunctionProto that have no place here.
        model: fields of the ModelProto that have no place here (main graph only).
        holder: fields of the AttributeProto that a body was read from that have no place here, or None.
        output_infos: by name, of outputs that are described otherwise than the tensor is where it is defined.
    """

    nodes: list[Node]
    inputs: list[Tensor]
    outputs: list[Tensor]
    name: str
    opset: int
    ir_version: int
    __hash__ = object.__hash__
    __eq__ = object.__eq__

    def __init__(self, name: str, opset: int, residue: onnx.GraphProto | onnx.FunctionProto) -> None:
        super().__init__(name=name, opset=opset)
        self.residue = residue
        self.constants: list[Constant] = []
        self.local_functions: list[Graph] = []
        self.model = onnx.ModelProto()
        self.holder: onnx.AttributeProto | None = None
        self.output_infos: dict[str, onnx.ValueInfoProto] = {}

    @property
    def is_function(self) -> bool:
        """Whether this is a model-local function, where constants can only be Constant nodes."""
        return isinstance(self.residue, onnx.FunctionProto)

    @property
    def domain(self) -> str:
        """The domain of a model-local function; empty for other graphs."""
        return self.residue.domain if isinstance(self.residue, onnx.FunctionProto) else ""

    @property
    def overload(self) -> str:
        """What tells model-local functions of one domain and name apart, since IR version 10."""
        return self.residue.overload if isinstance(self.residue, onnx.FunctionProto) else ""

    @property
    def items(self) -> list[Node | Constant]:
        """What this scope owns: its constants, then its nodes; not those of bodies."""
        return [*self.constants, *self.nodes]

    def scopes(self) -> Iterator[Scope]:
        """Yields this graph, every body below it, and every function with its bodies; outer before inner."""
        yield from _scopes(self, "")
        for function in self.local_functions:
            yield from _scopes(function, f"{function.domain}::{function.name}")

    @property
    def overridable(self) -> list[Constant]:
        """The initializers that are listed as inputs and that callers may therefore give other values."""
        listed = [tensor for tensor in self.inputs if isinstance(tensor, Constant)]
        return listed if (self.ir_version or 0) >= FIRST_IR_WITH_OVERRIDES else []  # bodies have no version, nor callers

    def inputs_at(self, ir_version: int) -> list[Tensor]:
        """Returns the inputs that a file of an IR version lists.

        Below IR version 4 every initializer is an input by name, and a constant all the same (onnxruntime_c_api.h,
        Graph_GetInitializers). From 4 on, listing it invites callers to override it, and ONNX Runtime neither folds nor packs it.
        """
        if self.ir_version < FIRST_IR_WITH_OVERRIDES <= ir_version:
            return [tensor for tensor in self.inputs if not isinstance(tensor, Constant)]
        return self.inputs

    def raise_ir_version(self, ir_version: int) -> None:
        """Makes sure that the model is of an IR version at least; what was constant stays constant."""
        self.inputs = self.inputs_at(ir_version)
        self.ir_version = max(self.ir_version, ir_version)

    def copy(self) -> Graph:
        """Returns a structural copy: new nodes, tensors and lists; shared frozen arrays and stored tensors."""
        return _Copier().graph(self)


class _Copier:
    """Copies graphs by identity, so that a body's outer tensors become the copies of those very tensors."""

    def __init__(self) -> None:
        self.clones: dict[int, Tensor] = {}

    def tensor(self, tensor: Tensor) -> Tensor:
        clone = self.clones.get(id(tensor))
        if clone is None:
            clone = self.clones[id(tensor)] = tensor.clone()
        return clone

    def constant(self, constant: Constant) -> Constant:
        clone = self.tensor(constant)
        assert isinstance(clone, Constant)
        return clone

    def graph(self, graph: Graph) -> Graph:
        copy = Graph(graph.name, graph.opset, deepcopy(graph.residue))
        copy.model, copy.ir_version, copy.holder = deepcopy(graph.model), graph.ir_version, deepcopy(graph.holder)
        copy.output_infos = dict(graph.output_infos)
        copy.inputs = [self.tensor(tensor) for tensor in graph.inputs]
        copy.constants = [self.constant(tensor) for tensor in graph.constants]
        copy.nodes = [self.node(node) for node in graph.nodes]
        copy.outputs = [self.tensor(tensor) for tensor in graph.outputs]
        copy.local_functions = [_Copier().graph(function) for function in graph.local_functions]
        return copy

    def node(self, node: Node) -> Node:
        attrs = {name: self.attribute(value) for name, value in node.attrs.items()}
        inputs = [self.tensor(tensor) for tensor in node.inputs]
        outputs = [self.tensor(tensor) for tensor in node.outputs]
        return Node(node.op, inputs, outputs, attrs, node.name, node.domain, deepcopy(node.residue))

    def attribute(self, value: Any) -> Any:
        if isinstance(value, Graph):
            return self.graph(value)
        return list(value) if isinstance(value, list) else value


def declared_type(info: onnx.ValueInfoProto | None) -> tuple[np.dtype[Any] | None, tuple[int | str | None, ...] | None]:
    """Returns (dtype, shape) of a dense tensor type, None for what is not said or not a dense tensor."""
    if info is None or info.type.WhichOneof("value") != "tensor_type":
        return None, None
    tensor = info.type.tensor_type
    dtype = element_type(tensor.elem_type) if tensor.elem_type else None
    if not tensor.HasField("shape"):
        return dtype, None
    dims = tensor.shape.dim
    return dtype, tuple(getattr(dim, kind) if (kind := dim.WhichOneof("value")) else None for dim in dims)


def freeze(array: Array) -> Array:
    """Returns the array, C-contiguous and read-only, so that copies of a graph can share it."""
    frozen = np.ascontiguousarray(array).reshape(array.shape)  # ascontiguousarray makes scalars 1-D
    frozen.flags.writeable = False
    return frozen


def _scopes(graph: Graph, path: str) -> Iterator[Scope]:
    yield Scope(path, graph)
    for node in graph.nodes:
        for name, body in node.bodies():
            inner = f"{node.site}.{name}"
            yield from _scopes(body, f"{path}/{inner}" if path else inner)
