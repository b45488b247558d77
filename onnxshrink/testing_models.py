"""Tiny models for `onnxshrink.testing.check_pass`, one for each way in which real models are awkward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["NEWEST_OPSET", "OLDEST_OPSET", "awkward_models"]

Array = np.ndarray[Any, np.dtype[Any]]
Kind = tuple[int, list[int]]
OLDEST_OPSET = 7
NEWEST_OPSET = 26  # of ONNX Runtime 1.31: it refuses to load opset 27
_IR_VERSION = 8
_WIDTH = 16


def awkward_models(seed: int = 0) -> Iterator[tuple[str, onnx.ModelProto]]:
    """Yields (what is awkward, model); every model is valid and runs in ONNX Runtime on synthetic inputs."""
    rng = np.random.default_rng(seed)
    for opset in range(OLDEST_OPSET, NEWEST_OPSET + 1):
        yield f"opset {opset}", _dense(rng, opset)
    yield "convolutions with BatchNormalization", _convolutions(rng)
    yield "shared weight", _shared(rng)
    yield "weight that is a graph output", _weight_as_output(rng)
    yield "weights in If branches and from the outer scope", _branches(rng)
    yield "weights in a model-local function", _function(rng)
    yield "weights in Constant nodes", _constant_nodes(rng)
    yield "IR 3: initializers listed as inputs", _listed_initializers(rng)
    yield "float16 weights", _dense(rng, 13, np.float16)
    yield "float64 weights", _dense(rng, 13, np.float64)
    yield "weight with few distinct values", _model([_node("MatMul", "x w -> y")], {"w": _few_values(rng)})
    yield "weight of zeros", _model([_node("MatMul", "x w -> y")], {"w": np.zeros((_WIDTH, _WIDTH), np.float32)})
    yield "dead nodes and duplicate weights", _untidy(rng)
    yield "no nodes", _model([], {}, inputs={"y": (TensorProto.FLOAT, [1, _WIDTH])})
    yield "no weights", _model([_node("Relu", "x -> y")], {})


def _dense(rng: np.random.Generator, opset: int, dtype: Any = np.float32) -> onnx.ModelProto:
    """Two unnamed MatMuls; the second weight sits behind a Transpose."""
    nodes = [
        _node("MatMul", "x w1 -> h"),
        _node("Relu", "h -> r"),
        _node("Transpose", "w2 -> t", perm=[1, 0]),
        _node("MatMul", "r t -> y"),
    ]
    weights = {"w1": _normal(rng, _WIDTH, 4 * _WIDTH).astype(dtype), "w2": _normal(rng, _WIDTH, 4 * _WIDTH).astype(dtype)}
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return _model(nodes, weights, opset=opset, inputs={"x": (kind, [1, _WIDTH])}, outputs={"y": (kind, [1, _WIDTH])})


def _convolutions(rng: np.random.Generator) -> onnx.ModelProto:
    norm = {name: np.abs(_normal(rng, 24)) + np.float32(0.5) for name in ("scale", "shift", "mean", "var")}
    nodes = [
        _node("Conv", "x c1 b1 -> h", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        _node("BatchNormalization", "h scale shift mean var -> n"),
        _node("Relu", "n -> r"),
        _node("Conv", "r c2 -> d", kernel_shape=[3, 3], pads=[1, 1, 1, 1], group=24),
        _node("ConvTranspose", "d c3 -> y", kernel_shape=[2, 2], strides=[2, 2], group=2),
    ]
    weights = {
        "c1": _normal(rng, 24, 8, 3, 3),
        "b1": _normal(rng, 24),
        "c2": _normal(rng, 24, 1, 3, 3),
        "c3": _normal(rng, 24, 6, 2, 2),
        **norm,
    }
    image, result = (TensorProto.FLOAT, [1, 8, 6, 6]), (TensorProto.FLOAT, [1, 12, 12, 12])
    return _model(nodes, weights, inputs={"x": image}, outputs={"y": result})


def _shared(rng: np.random.Generator) -> onnx.ModelProto:
    nodes = [_node("MatMul", "x w -> a"), _node("MatMul", "a w -> b"), _node("Gemm", "b w -> y", transB=1)]
    return _model(nodes, {"w": _normal(rng, _WIDTH, _WIDTH)})


def _weight_as_output(rng: np.random.Generator) -> onnx.ModelProto:
    float_matrix = (TensorProto.FLOAT, [_WIDTH, _WIDTH])
    outputs = {"y": (TensorProto.FLOAT, [1, _WIDTH]), "w": float_matrix}
    return _model([_node("MatMul", "x w -> y")], {"w": _normal(rng, _WIDTH, _WIDTH)}, outputs=outputs)


def _branches(rng: np.random.Generator) -> onnx.ModelProto:
    """Both branches call their own weight ``w``; one also reads ``outer`` of the main graph."""

    def branch(name: str, nodes: list[onnx.NodeProto]) -> onnx.GraphProto:
        result = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, [1, _WIDTH])
        weight = numpy_helper.from_array(_normal(rng, _WIDTH, _WIDTH), f"{name}_w")
        return helper.make_graph(nodes, name, [], [result], [weight])

    yes = branch("yes", [_node("MatMul", "x yes_w -> yes_h"), _node("MatMul", "yes_h outer -> yes_y")])
    no = branch("no", [_node("MatMul", "x no_w -> no_y")])
    choose = helper.make_node("If", ["flag"], ["y"], then_branch=yes, else_branch=no)
    inputs = {"x": (TensorProto.FLOAT, [1, _WIDTH]), "flag": (TensorProto.BOOL, [])}
    return _model([choose], {"outer": _normal(rng, _WIDTH, _WIDTH)}, inputs=inputs)


def _function(rng: np.random.Generator) -> onnx.ModelProto:
    """A function with a weight inside that is called twice with another weight as argument."""
    inner = helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(_normal(rng, _WIDTH, _WIDTH), "k"))
    body = [inner, _node("MatMul", "a k -> m"), _node("MatMul", "m b -> c")]
    function = helper.make_function("test", "Twice", ["a", "b"], ["c"], body, [helper.make_opsetid("", 17)])
    calls = [_node("Twice", "x w -> h", domain="test"), _node("Twice", "h w -> y", domain="test")]
    model = _model(calls, {"w": _normal(rng, _WIDTH, _WIDTH)}, opset=17)
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("test", 1))
    return model


def _constant_nodes(rng: np.random.Generator) -> onnx.ModelProto:
    holder = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(_normal(rng, _WIDTH, _WIDTH)))
    return _model([holder, _node("Identity", "w -> same"), _node("MatMul", "x same -> y")], {})


def _listed_initializers(rng: np.random.Generator) -> onnx.ModelProto:
    inputs = {"x": (TensorProto.FLOAT, [1, _WIDTH]), "w": (TensorProto.FLOAT, [_WIDTH, _WIDTH])}
    model = _model([_node("MatMul", "x w -> y")], {"w": _normal(rng, _WIDTH, _WIDTH)}, opset=8, inputs=inputs)
    model.ir_version = 3
    return model


def _untidy(rng: np.random.Generator) -> onnx.ModelProto:
    twin = _normal(rng, _WIDTH, _WIDTH)
    nodes = [
        _node("MatMul", "x w1 -> a"),
        _node("Identity", "a -> i"),
        _node("MatMul", "i w2 -> b"),
        _node("MatMul", "b unused -> dead"),
        _node("Reshape", "b shape -> y"),
        _node("Concat", "one width -> shape", axis=0),
    ]
    weights = {"w1": twin, "w2": twin.copy(), "unused": _normal(rng, _WIDTH, 3)}
    shapes = {"one": np.array([1], np.int64), "width": np.array([_WIDTH], np.int64)}
    return _model([nodes[5], *nodes[:5]], {**weights, **shapes})


def _few_values(rng: np.random.Generator) -> Array:
    return rng.choice(_normal(rng, 5), (_WIDTH, 4 * _WIDTH))[:, : _WIDTH * 4].astype(np.float32)[:, :_WIDTH]


def _normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[-1]))


def _node(op: str, signature: str, domain: str = "", **attributes: Any) -> onnx.NodeProto:
    """Returns an unnamed node from ``inputs -> outputs``."""
    reads, writes = signature.split("->")
    return helper.make_node(op, reads.split(), writes.split(), domain=domain, **attributes)


def _model(
    nodes: list[onnx.NodeProto],
    weights: dict[str, Array],
    opset: int = 13,
    inputs: Mapping[str, Kind] | None = None,
    outputs: Mapping[str, Kind] | None = None,
) -> onnx.ModelProto:
    """Returns a model; by default input x and output y are float [1, 16]."""
    vector = (TensorProto.FLOAT, [1, _WIDTH])
    reads = [helper.make_tensor_value_info(name, *kind) for name, kind in (inputs or {"x": vector}).items()]
    writes = [helper.make_tensor_value_info(name, *kind) for name, kind in (outputs or {"y": vector}).items()]
    initializers = [numpy_helper.from_array(values, name) for name, values in weights.items()]
    graph = helper.make_graph(nodes, "test", reads, writes, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], producer_name="onnxshrink")
    model.ir_version = _IR_VERSION
    return model
