"""Short names for what a model's callers do not name: inner tensors and nodes.

Every tensor's name stands in the file where it is computed and once more for every node that reads it. In small models names take
more bytes than coded weights do.
"""

from __future__ import annotations

import itertools
import string
from collections import Counter
from collections.abc import Iterator

import onnx

from onnxshrink.graph.ir import Constant, Graph, Tensor

__all__ = ["obstacle_to_shortening", "shorten_names"]

_LETTERS = string.ascii_lowercase + string.ascii_uppercase


def obstacle_to_shortening(graph: Graph) -> str | None:
    """Returns why the names of a model must stay, or None: something in it refers to tensors by name, outside of nodes."""
    if graph.model.training_info:
        return "training information refers to tensors by name"
    for scope in graph.scopes():
        if isinstance(scope.graph.residue, onnx.GraphProto) and scope.graph.residue.quantization_annotation:
            return "quantization annotations refer to tensors by name"
    return None


def shorten_names(graph: Graph) -> int:
    """Gives inner tensors the shortest names there are, most used first, and takes the names of nodes; returns how many tensors.

    Names of the model's inputs and outputs stay, and so do functions, whose names are their own. In bodies of If, Loop and Scan
    inputs and outputs go by position (ONNX IR specification), so they count as inner; all names of a model stay distinct, for a body
    must not reuse a name of a scope around it.
    """
    scopes = [scope.graph for scope in graph.scopes() if not _is_in_function(scope.graph, graph)]
    borders = {tensor.name for tensor in [*graph.inputs, *graph.outputs]}
    borders |= {constant.name for scope in scopes for constant in scope.constants if _is_sparse(constant)}
    described = [(scope, tensor, scope.output_infos.get(tensor.name)) for scope in scopes for tensor in scope.outputs]
    uses: Counter[int] = Counter()
    tensors: dict[int, Tensor] = {}
    for scope in scopes:
        for tensor in _mentioned(scope):
            tensors[id(tensor)] = tensor
            uses[id(tensor)] += 1
        for node in scope.nodes:
            node.name = ""
    fresh = (name for name in _names() if name not in borders)
    renamed = 0
    for key, _ in uses.most_common():
        tensor = tensors[key]
        if tensor.name and tensor.name not in borders:
            _rename(tensor, next(fresh))
            renamed += 1
    for scope in scopes:
        scope.output_infos = {}
    for scope, tensor, info in described:
        if info is not None:
            scope.output_infos[tensor.name] = _renamed(info, tensor.name)
    return renamed


def _mentioned(scope: Graph) -> Iterator[Tensor]:
    """Yields every tensor of a scope, once for each place where its name is written."""
    yield from scope.constants
    yield from scope.inputs
    yield from scope.outputs
    for node in scope.nodes:
        yield from node.inputs
        yield from node.outputs


def _rename(tensor: Tensor, name: str) -> None:
    tensor.name = name
    if tensor.info is not None:
        tensor.info = _renamed(tensor.info, name)
    if isinstance(tensor, Constant) and tensor.holder is not None:
        holder = onnx.NodeProto()
        holder.CopyFrom(tensor.holder)
        holder.ClearField("name")
        tensor.holder = holder


def _renamed(info: onnx.ValueInfoProto, name: str) -> onnx.ValueInfoProto:
    copy = onnx.ValueInfoProto()
    copy.CopyFrom(info)  # the original is shared with other copies of the graph
    copy.name = name
    return copy


def _is_sparse(constant: Constant) -> bool:
    """Whether a constant is written as the sparse initializer that it was read from, name included."""
    return constant.holder is None and constant.stored is not None and constant.stored.is_sparse


def _names() -> Iterator[str]:
    for length in itertools.count(1):
        yield from map("".join, itertools.product(_LETTERS, repeat=length))


def _is_in_function(scope: Graph, graph: Graph) -> bool:
    return any(scope is inner.graph for function in graph.local_functions for inner in function.scopes())
