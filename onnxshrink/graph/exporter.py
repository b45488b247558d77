"""`Graph` to ModelProto: what passes edit, merged with the residue of what they do not know."""

from __future__ import annotations

from collections.abc import Callable

import onnx
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from onnxshrink.graph.ir import FIRST_IR_WITH_OVERRIDES, Constant, Graph, Node, Tensor, declared_type

__all__ = ["TensorWriter", "framed_bytes", "inline_tensor", "node_message", "shell_tensor", "tensor_bytes", "to_model"]

TensorWriter = Callable[[Constant], TensorProto]


def to_model(graph: Graph, write_tensor: TensorWriter | None = None) -> onnx.ModelProto:
    """Returns the model of a graph.

    Args:
        graph: the main graph; only read.
        write_tensor: makes the TensorProto of a constant; the default puts all values into the message.
    """
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    write = write_tensor or inline_tensor
    _write_graph(graph, model.graph, write)
    listed = {tensor.name for tensor in graph.inputs}
    plain = any(constant.holder is None and constant.name not in listed for constant in graph.constants)
    model.ir_version = max(graph.ir_version, FIRST_IR_WITH_OVERRIDES if plain else 0)
    kept = {tensor.name for tensor in graph.inputs_at(model.ir_version)}
    for index in reversed(range(len(model.graph.input))):
        if model.graph.input[index].name not in kept:
            del model.graph.input[index]
    for function in graph.local_functions:
        _write_function(function, model.functions.add(), write)
    return model


def inline_tensor(constant: Constant) -> TensorProto:
    """Returns the TensorProto of a dense constant with its values inside the message; untouched ones as they were read."""
    stored = constant.stored
    if stored is None or isinstance(stored.tensor, onnx.SparseTensorProto):
        return numpy_helper.from_array(constant.values, constant.name)
    if stored.external is None:
        return stored.tensor
    tensor = TensorProto()
    tensor.CopyFrom(stored.tensor)
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")
    tensor.raw_data = stored.external.read()
    return tensor


def tensor_bytes(constant: Constant) -> int:
    """Returns the bytes of the message that `inline_tensor` would make."""
    stored = constant.stored
    if stored is not None and stored.external is None:
        return int(stored.tensor.ByteSize())
    return int(shell_tensor(constant).ByteSize()) + framed_bytes(constant.nbytes)


def framed_bytes(payload: int) -> int:
    """Returns the bytes of a length-delimited protobuf field: a tag of one byte, the length as a varint, the payload."""
    length, rest = 1, payload
    while rest >= 128:
        length, rest = length + 1, rest >> 7
    return 1 + length + payload


def shell_tensor(constant: Constant) -> TensorProto:
    """Returns the TensorProto of a constant without its values."""
    return TensorProto(
        name=constant.name, dims=constant.shape, data_type=helper.np_dtype_to_tensor_dtype(constant.dtype)
    )


def node_message(node: Node, write_tensor: TensorWriter | None = None) -> onnx.NodeProto:
    """Returns the NodeProto of a node, its bodies included."""
    proto = onnx.NodeProto()
    _write_node(node, proto, write_tensor or inline_tensor)
    return proto


def _write_graph(graph: Graph, proto: onnx.GraphProto, write: TensorWriter) -> None:
    assert isinstance(graph.residue, onnx.GraphProto)
    proto.CopyFrom(graph.residue)
    proto.name = graph.name
    for constant in graph.constants:
        if constant.holder is not None:
            _write_holder(constant, proto.node.add(), write)
        elif constant.stored is not None and isinstance(constant.stored.tensor, onnx.SparseTensorProto):
            proto.sparse_initializer.append(constant.stored.tensor)
        else:
            proto.initializer.append(write(constant))
            proto.initializer[-1].name = constant.name
    for node in graph.nodes:
        _write_node(node, proto.node.add(), write)
    proto.input.extend(_value_info(tensor) for tensor in graph.inputs)
    proto.output.extend(graph.output_infos.get(tensor.name) or _value_info(tensor) for tensor in graph.outputs)
    borders = {id(tensor) for tensor in [*graph.inputs, *graph.outputs]}
    inner: list[Tensor] = [*graph.constants, *(tensor for node in graph.nodes for tensor in node.outputs)]
    proto.value_info.extend(
        _value_info(tensor)
        for tensor in inner
        if tensor.info is not None and tensor.name and id(tensor) not in borders
    )


def _write_function(graph: Graph, proto: onnx.FunctionProto, write: TensorWriter) -> None:
    assert isinstance(graph.residue, onnx.FunctionProto)
    proto.CopyFrom(graph.residue)
    proto.name = graph.name
    proto.input.extend(tensor.name for tensor in graph.inputs)
    proto.output.extend(tensor.name for tensor in graph.outputs)
    for constant in graph.constants:
        _write_holder(constant, proto.node.add(), write)
    for node in graph.nodes:
        _write_node(node, proto.node.add(), write)


def _write_holder(constant: Constant, proto: onnx.NodeProto, write: TensorWriter) -> None:
    if constant.holder is not None:
        proto.CopyFrom(constant.holder)
    proto.op_type = "Constant"
    proto.output.append(constant.name)
    if constant.stored is not None and isinstance(constant.stored.tensor, onnx.SparseTensorProto):
        held = proto.attribute.add(name="sparse_value", type=AttributeProto.SPARSE_TENSOR)
        held.sparse_tensor.CopyFrom(constant.stored.tensor)
    else:
        proto.attribute.add(name="value", type=AttributeProto.TENSOR).t.CopyFrom(write(constant))


def _write_node(node: Node, proto: onnx.NodeProto, write: TensorWriter) -> None:
    if node.residue is not None:
        proto.CopyFrom(node.residue)
    proto.op_type = node.op
    if node.name:
        proto.name = node.name
    if node.domain is not None:
        proto.domain = node.domain
    proto.input.extend(tensor.name for tensor in node.inputs)
    proto.output.extend(tensor.name for tensor in node.outputs)
    for name, value in node.attrs.items():
        if isinstance(value, AttributeProto):
            proto.attribute.append(value)
        elif isinstance(value, Graph):
            _write_body(name, value, proto.attribute.add(), write)
        else:
            proto.attribute.append(helper.make_attribute(name, value))


def _write_body(name: str, body: Graph, proto: AttributeProto, write: TensorWriter) -> None:
    if body.holder is not None:
        proto.CopyFrom(body.holder)
    proto.name, proto.type = name, AttributeProto.GRAPH
    _write_graph(body, proto.g, write)


def _value_info(tensor: Tensor) -> onnx.ValueInfoProto:
    """Returns the message it was read from while dtype and shape still agree with it, else a new one."""
    if tensor.info is not None and (isinstance(tensor, Constant) or declared_type(tensor.info) == (tensor.dtype, tensor.shape)):
        return tensor.info
    if tensor.dtype is None:
        return onnx.ValueInfoProto(name=tensor.name)
    return helper.make_tensor_value_info(tensor.name, helper.np_dtype_to_tensor_dtype(tensor.dtype), tensor.shape)
