"""Raises the opset of a model where that changes no result: op by op, and only as far as `onnxshrink.graph.opset_rules` is sure of it.

An op that no version after the model's defines anew stays as it is; others become what the rules say, or the whole model stays
at its opset. Nothing but those nodes is touched, neither order nor names nor metadata. `onnx.version_converter` is not used: as of
onnx 1.23 it drops model-local functions, quantization annotations, metadata of nodes and graphs and doc strings of tensors without
a word, adds value_info, and fails on sparse initializers.
"""

from __future__ import annotations

import onnx

from onnxshrink.errors import PassError, must
from onnxshrink.graph.edit import NameSource, constant_bytes, node_bytes
from onnxshrink.graph.ir import Constant, Graph, Node
from onnxshrink.graph.opset_rules import RULES, Call, Operand, Types

__all__ = ["HIGHEST", "LOWEST", "obstacle_to_opset", "raise_opset"]

LOWEST, HIGHEST = 7, 13  # what the rules know; ONNX Runtime runs nothing below 7 (onnxruntime/docs/Versioning.md)
_Operands = dict[tuple[str, str, tuple[int, ...], bytes], Constant]
_STANDARD = ("", "ai.onnx")  # the two names of the default domain


def obstacle_to_opset(graph: Graph, target: int) -> str | None:
    """Returns why the opset of a model cannot be raised, in one line, or None if it can; the graph is only read.

    Args:
        graph: the main graph.
        target: the opset to have at least.
    """
    try:
        _plan(graph, target)
    except PassError as error:
        return str(error)
    return None


def raise_opset(graph: Graph, target: int, names: NameSource | None = None) -> int:
    """Raises the opset of a model and of its functions in place; those that have it already, or a higher one, stay as they are.

    Args:
        graph: the main graph.
        target: the opset to have at least.
        names: gives names to the constants that were attributes; made from the graph by default.

    Returns:
        By how many bytes the model grew.

    Raises:
        PassError: the opset cannot be raised; the graph is as it was.
    """
    plan = _plan(graph, target)
    names = names or NameSource(graph)
    growth = 0
    for scope, calls in plan:
        operands: _Operands = {}
        growth += sum(_apply(call, scope, names, operands) for call in calls)
        growth += sum(constant_bytes(constant, scope) for constant in operands.values())
        scope.opset = target
        imports = graph.model.opset_import
        if isinstance(scope.residue, onnx.FunctionProto):
            imports = scope.residue.opset_import
        elif scope is not graph:
            continue
        for entry in imports:
            if entry.domain in _STANDARD:
                entry.version = target
    return growth


def _plan(graph: Graph, target: int) -> list[tuple[Graph, list[Call]]]:
    """Returns each graph whose opset is to be raised, with what becomes of those of its nodes that change."""
    if target > HIGHEST:
        raise PassError(must("model", "the opset to raise it to", f"at most {HIGHEST}", target))
    types = Types(graph)
    plan = []
    for scope in graph.scopes():
        owner = scope.graph
        if owner.opset >= target:
            continue
        if owner.opset < LOWEST:
            raise PassError(must("model", "opset", f"at least {LOWEST} to be raised", owner.opset))
        calls = [_raised(node, owner.opset, target, types) for node in owner.nodes if node.is_standard]
        plan.append((owner, [call for call in calls if call.is_changed]))
    if any(function.domain in _STANDARD for function in graph.local_functions) and plan:
        raise PassError("model: it defines functions in the domain of the standard's ops, so its ops may mean anything")
    return plan


def _raised(node: Node, opset: int, target: int, types: Types) -> Call:
    """Returns what becomes of a node, version by version."""
    call = Call(node, types)
    schema = _schema(node.op, opset)
    if schema is None or schema.deprecated:
        raise call.refuse(f"opset {opset} of the standard has no such op; retired experimental ops have no successor")
    for version in range(opset + 1, target + 1):
        schema = _schema(call.op, version)
        if schema is not None and schema.since_version == version:
            rule = RULES.get((call.op, version))
            if rule is None:
                raise call.refuse(f"what opset {version} changed in it is not known here")
            rule(call)
    return call


def _schema(op: str, opset: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op, opset, "")
    except onnx.defs.SchemaError:
        return None


def _apply(call: Call, scope: Graph, names: NameSource, operands: _Operands) -> int:
    """Makes a node what it is to be; returns by how many bytes it grew. ``operands``: constants of the scope to share."""
    node = call.node
    before = node_bytes(node)
    node.op, node.attrs = call.op, call.attrs
    while len(node.outputs) > len(call.outputs):
        del node.outputs[-1]
    for index, tensor in enumerate(call.inputs):
        if isinstance(tensor, Operand):
            key = (tensor.name, tensor.values.dtype.name, tensor.values.shape, tensor.values.tobytes())
            if key not in operands:  # in a Constant node: an initializer would have to be an input before IR version 4
                name = names.fresh(f"{node.op.lower()}.{tensor.name}")
                operands[key] = Constant(name, tensor.values, holder=onnx.NodeProto())
                scope.constants.append(operands[key])
            tensor = operands[key]
        if index == len(node.inputs) or node.inputs[index] is not tensor:
            node.inputs.insert(index, tensor)
    return node_bytes(node) - before
