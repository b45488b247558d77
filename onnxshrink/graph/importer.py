"""ModelProto to `Graph`, with nothing lost; `onnxshrink.graph.exporter` goes back.

Every message is split in two: the fields that passes edit become objects, all others go to a ``residue`` message of the same
type and are merged back on the way out. What is modelled is listed in one table, so a field added to ONNX tomorrow is carried
and not dropped. Fields that the installed onnx package cannot even name make the model refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet
from onnx import AttributeProto, TensorProto, helper

from onnxshrink.errors import ModelReadError, UnsupportedModelError, must
from onnxshrink.graph.ir import Constant, Graph, Node, Tensor, Variable, declared_type
from onnxshrink.graph.storage import Stored, locate

__all__ = ["from_model"]

_MODELLED = {
    onnx.ModelProto: {"ir_version", "graph", "functions"},
    onnx.GraphProto: {"name", "node", "initializer", "sparse_initializer", "input", "output", "value_info"},
    onnx.FunctionProto: {"name", "node", "input", "output"},
    onnx.NodeProto: {"name", "op_type", "domain", "input", "output", "attribute"},
    onnx.AttributeProto: {"name", "type", "g"},  # of a body; other attributes stay whole where they are no plain value
}


def from_model(model: onnx.ModelProto, folder: Path | None = None) -> Graph:
    """Returns the graph of a model. The message is only read, but tensors keep referring to its parts.

    Args:
        model: a model whose external data, if any, has not been loaded.
        folder: where its external data lies.

    Raises:
        ModelReadError: external data is missing or out of bounds.
        UnsupportedModelError: something in the model could not be written back.
    """
    if model.training_info:
        raise UnsupportedModelError("model: training_info would be lost; export the model for inference")
    graph = _Reader(folder, _opset(model.opset_import, 1), {}).graph(model.graph)
    graph.model = _residue(model)
    graph.ir_version = model.ir_version
    for function in model.functions:
        opset = _opset(function.opset_import, graph.opset)
        graph.local_functions.append(_Reader(folder, opset, {}).function(function))
    return graph


class _Reader:
    """Reads one scope; ``outer`` are the tensors of the scopes around it."""

    def __init__(self, folder: Path | None, opset: int, outer: dict[str, Tensor]) -> None:
        self.folder = folder
        self.opset = opset
        self.outer = outer
        self.local: dict[str, Tensor] = {}
        self.constants: list[Constant] = []

    def graph(self, proto: onnx.GraphProto) -> Graph:
        graph = Graph(proto.name, self.opset, _residue(proto))
        infos: dict[str, onnx.ValueInfoProto] = {}
        for info in [*proto.value_info, *proto.output, *proto.input]:
            infos[info.name] = info
        for initializer in proto.initializer:
            self.constant(initializer, infos)
        for sparse in proto.sparse_initializer:
            self.constant(sparse, infos)
        for info in proto.input:
            graph.inputs.append(self.local.get(info.name) or self.variable(info.name, infos))
        self.fill(graph, proto.node, infos)
        graph.outputs = [self.resolve(info.name) for info in proto.output]
        described = zip(graph.outputs, proto.output, strict=True)
        graph.output_infos = {info.name: info for tensor, info in described if tensor.info != info}
        inner = self.local.keys() - {info.name for info in [*proto.input, *proto.output]}
        graph.residue.value_info.extend(info for info in proto.value_info if info.name not in inner)
        return graph

    def function(self, proto: onnx.FunctionProto) -> Graph:
        graph = Graph(proto.name, self.opset, _residue(proto))
        graph.inputs = [self.variable(name, {}) for name in proto.input]
        self.fill(graph, proto.node, {})
        graph.outputs = [self.resolve(name) for name in proto.output]
        return graph

    def fill(self, graph: Graph, nodes: Iterable[onnx.NodeProto], infos: dict[str, onnx.ValueInfoProto]) -> None:
        nodes = list(nodes)
        for node in nodes:  # outputs first: a node of an unsorted graph may read what a later one writes
            if _is_tensor_holder(node):
                self.constant(node, infos)
                continue
            for name in filter(None, node.output):
                self.variable(name, infos)
        graph.nodes = [self.node(node) for node in nodes if not _is_tensor_holder(node)]
        graph.constants = self.constants

    def constant(
        self, proto: TensorProto | onnx.SparseTensorProto | onnx.NodeProto, infos: dict[str, onnx.ValueInfoProto]
    ) -> None:
        holder = _residue(proto, **_header(proto)) if isinstance(proto, onnx.NodeProto) else None
        tensor = _held(proto.attribute[0]) if isinstance(proto, onnx.NodeProto) else proto
        if isinstance(tensor, onnx.SparseTensorProto):
            name, external = tensor.values.name, None
            _refuse_external(f"sparse tensor '{name}'", tensor.values, tensor.indices)
        else:
            name, external = tensor.name, locate(tensor, self.folder)
        if isinstance(proto, onnx.NodeProto):
            name = proto.output[0]
            _refuse_unreadable(proto.attribute[0])
        self.declare(name, constant := Constant(name, Stored(tensor, external), infos.get(name), holder))
        self.constants.append(constant)

    def variable(self, name: str, infos: dict[str, onnx.ValueInfoProto]) -> Variable:
        info = infos.get(name)
        variable = Variable(name, *declared_type(info), info=info)
        self.declare(name, variable)
        return variable

    def declare(self, name: str, tensor: Tensor) -> None:
        _refuse_bytes("name of a tensor", name)
        if name in self.local:
            raise UnsupportedModelError(f"model: tensor '{name}' must be defined once, got a second definition")
        self.local[name] = tensor

    def resolve(self, name: str) -> Tensor:
        tensor = self.local.get(name) or self.outer.get(name)
        if tensor is None:
            raise UnsupportedModelError(f"model: tensor '{name}' is read, but no node, input or initializer defines it")
        return tensor

    def node(self, proto: onnx.NodeProto) -> Node:
        inputs = [self.resolve(name) if name else Variable("") for name in proto.input]
        outputs = [self.local[name] if name else Variable("") for name in proto.output]
        attrs = {attribute.name: self.attribute(attribute, proto) for attribute in proto.attribute}
        if len(attrs) != len(proto.attribute):
            raise UnsupportedModelError(f"node '{proto.name or proto.op_type}': an attribute must be given once, got it twice")
        domain = proto.domain if proto.HasField("domain") else None
        residue = _residue(proto, **{name: value for name, value in _header(proto).items() if not value})
        return Node(
            proto.op_type, inputs, outputs, attrs, proto.name, domain, residue if residue.ByteSize() else None
        )

    def attribute(self, proto: AttributeProto, node: onnx.NodeProto) -> Any:
        _refuse_unreadable(proto)
        if proto.type == AttributeProto.GRAPH and not proto.ref_attr_name:
            body = _Reader(self.folder, self.opset, {**self.outer, **self.local}).graph(proto.g)
            body.holder = holder if (holder := _residue(proto)).ByteSize() else None
            return body
        if proto.graphs or proto.HasField("g"):
            raise UnsupportedModelError(
                f"node '{node.name or node.op_type}': what the graphs in attribute '{proto.name}' read would be lost; "
                "only attributes of type GRAPH are understood"
            )
        _refuse_external(f"attribute '{proto.name}' of node '{node.name or node.op_type}'", proto.t, *proto.tensors)
        value = _decoded(helper.get_attribute_value(proto)) if not proto.ref_attr_name else None
        if isinstance(value, int | float | str) or (value and isinstance(value, list)):
            with contextlib.suppress(TypeError, ValueError):
                if helper.make_attribute(proto.name, value) == proto:
                    return value  # a plain Python value, where it writes back to the same message
        return proto


def _opset(imports: Iterable[onnx.OperatorSetIdProto], default: int) -> int:
    """Returns the version of the ONNX standard's ops; its domain has two names."""
    versions = {entry.domain: entry.version for entry in imports}
    return versions.get("", versions.get("ai.onnx", default))


def _is_tensor_holder(node: onnx.NodeProto) -> bool:
    """Whether this is a Constant node that holds one tensor of its own, and nothing that `Constant` cannot carry."""
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx") or node.input or len(node.attribute) != 1:
        return False
    if len(node.output) != 1 or not node.output[0]:
        return False
    attribute = node.attribute[0]
    present = {field.name for field, _ in attribute.ListFields()}
    kinds = {"value": (AttributeProto.TENSOR, "t"), "sparse_value": (AttributeProto.SPARSE_TENSOR, "sparse_tensor")}
    kind, field = kinds.get(attribute.name, (None, ""))
    return attribute.type == kind and present == {"name", "type", field}


def _held(attribute: AttributeProto) -> TensorProto | onnx.SparseTensorProto:
    """Returns the tensor that a Constant node holds, dense or sparse."""
    return attribute.t if attribute.name == "value" else attribute.sparse_tensor


def _residue(message: Any, **keep: Any) -> Any:
    """Returns a message of the same type with only the fields that are not modelled, plus ``keep``."""
    _refuse_unreadable(message)
    residue = type(message)(**keep)
    for field, value in message.ListFields():
        if field.name in _MODELLED[type(message)]:
            continue
        if field.is_repeated:
            getattr(residue, field.name).extend(value)
        elif field.message_type is not None:
            getattr(residue, field.name).CopyFrom(value)
        else:
            setattr(residue, field.name, value)
    return residue


def _refuse_external(owner: str, *tensors: TensorProto) -> None:
    if any(tensor.data_location == TensorProto.EXTERNAL for tensor in tensors):
        raise UnsupportedModelError(f"{owner}: its external data would be lost; save the model with the data inside")


def _header(node: onnx.NodeProto) -> dict[str, str]:
    """Returns the name and domain that are present, empty or not: an exporter's empty name is written back."""
    return {field: getattr(node, field) for field in ("name", "domain") if node.HasField(field)}


def _refuse_unreadable(message: Message) -> None:
    if len(UnknownFieldSet(message)):
        raise UnsupportedModelError(
            f"model: a {message.DESCRIPTOR.name} has fields unknown to onnx {onnx.__version__}; upgrade the onnx package"
        )
    for field, content in message.ListFields():
        if field.type == FieldDescriptor.TYPE_STRING:
            for text in content if field.is_repeated else [content]:
                _refuse_bytes(f"{message.DESCRIPTOR.name}.{field.name}", text)


def _refuse_bytes(what: str, text: Any) -> None:
    if isinstance(text, bytes):  # protobuf's way to hand out a text field that holds no UTF-8
        raise ModelReadError(must("model", what, "UTF-8 text", text))


def _decoded(value: Any) -> Any:
    """Returns bytes, or a list of them, as text where they are UTF-8."""
    try:
        if isinstance(value, bytes):
            return value.decode()
        if isinstance(value, list) and value and isinstance(value[0], bytes):
            return [item.decode() for item in value]
    except UnicodeDecodeError:
        return value
    return value
