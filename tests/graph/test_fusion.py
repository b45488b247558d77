"""A folded BatchNormalization changes nothing but rounding, and what cannot be folded says why."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper, parser
from onnx.reference import ReferenceEvaluator

from onnxshrink.graph.edit import NameSource, output_ids
from onnxshrink.graph.exporter import to_model
from onnxshrink.graph.files import load
from onnxshrink.graph.fusion import fold_batch_norm, obstacle_to_folding
from onnxshrink.graph.ir import Graph, Node
from tests.oracle import make_model, run, session, tensor, value

few = st.integers(1, 3)


def norm_model(
    op: str = "Conv",
    shape: tuple[int, ...] = (4, 3, 3, 3),
    channels: int = 4,
    bias: bool = True,
    dtype: str = "float32",
    norm: dict[str, Any] | None = None,
    **attributes: Any,
) -> onnx.ModelProto:
    """Returns x -> convolution -> BatchNormalization -> y with random parameters."""
    rng = np.random.default_rng(0)
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    tensors = [
        value("w", rng.standard_normal(shape), dtype),
        *([value("b", rng.standard_normal(channels), dtype)] if bias else []),
        value("scale", rng.uniform(0.5, 2, channels), dtype),
        value("shift", rng.standard_normal(channels), dtype),
        value("mean", rng.standard_normal(channels), dtype),
        value("variance", rng.uniform(0.1, 2, channels), dtype),
    ]
    nodes = [
        helper.make_node(op, ["x", "w", "b"] if bias else ["x", "w"], ["h"], **attributes),
        helper.make_node("BatchNormalization", ["h", "scale", "shift", "mean", "variance"], ["y"], **(norm or {})),
    ]
    dims = ["N", "C", *(f"d{axis}" for axis in range(len(shape) - 2))]
    return make_model(
        nodes, [tensor("x", dims, element)], [tensor("y", dims[:2] + [None] * (len(dims) - 2), element)], tensors
    )


def norm_of(graph: Graph) -> Node:
    return next(node for node in graph.nodes if node.op == "BatchNormalization")


def fold(model: onnx.ModelProto) -> Graph:
    graph = load(model)
    assert obstacle_to_folding(norm_of(graph), output_ids(graph)) is None
    fold_batch_norm(graph, graph, norm_of(graph), NameSource(graph))
    return graph


def reason(model: onnx.ModelProto) -> str | None:
    graph = load(model)
    return obstacle_to_folding(norm_of(graph), output_ids(graph))


@settings(max_examples=40, deadline=None)
@given(
    op=st.sampled_from(["Conv", "ConvTranspose"]),
    groups=few,
    inputs=few,
    outputs=few,
    kernel=st.lists(few, min_size=1, max_size=2),
    bias=st.booleans(),
    epsilon=st.sampled_from([1e-5, 0.1]),
)
def test_outputs_are_the_same(
    op: str, groups: int, inputs: int, outputs: int, kernel: list[int], bias: bool, epsilon: float
) -> None:
    if op == "Conv":
        shape = (groups * outputs, inputs, *kernel)
    else:
        shape = (groups * inputs, outputs, *kernel)
    model = norm_model(op, shape, groups * outputs, bias, norm={"epsilon": epsilon}, group=groups)
    graph = fold(model)
    exported = to_model(graph)
    onnx.checker.check_model(exported)
    assert [node.op_type for node in exported.graph.node] == [op]
    assert len(exported.graph.initializer) == 2
    x = np.random.default_rng(1).standard_normal((2, groups * inputs, *[4] * len(kernel))).astype(np.float32)
    np.testing.assert_allclose(
        run(session(exported), {"x": x})[0], run(session(model, optimise=False), {"x": x})[0], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-2), ("float64", 1e-12)])
def test_other_float_types(dtype: str, tolerance: float) -> None:
    model = norm_model(dtype=dtype)
    x = np.random.default_rng(1).standard_normal((1, 3, 5, 5)).astype(dtype)
    folded = to_model(fold(model))
    assert {item.data_type for item in folded.graph.initializer} == {model.graph.initializer[0].data_type}
    expected = ReferenceEvaluator(model).run(None, {"x": x})[0]  # ONNX Runtime has no convolution of float64
    np.testing.assert_allclose(
        ReferenceEvaluator(folded).run(None, {"x": x})[0], expected, rtol=tolerance, atol=tolerance
    )


def test_the_default_epsilon_is_that_of_the_standard() -> None:
    folded, stated = fold(norm_model()), fold(norm_model(norm={"epsilon": 1e-5}))
    np.testing.assert_array_equal(folded.constants[0].values, stated.constants[0].values)


def test_parameters_that_others_read_stay() -> None:
    model = norm_model()
    model.graph.node.append(helper.make_node("Add", ["mean", "b"], ["z"]))
    model.graph.output.append(tensor("z", [4]))
    graph = fold(model)
    assert {constant.name for constant in graph.constants} == {"w", "w.bias", "mean", "b"}
    running = session(to_model(graph))
    x = np.zeros((1, 3, 4, 4), np.float32)
    expected = sum(numpy_helper.to_array(model.graph.initializer[index]) for index in (1, 4))
    np.testing.assert_array_equal(run(running, {"x": x})[1], expected)


def test_in_a_branch_with_weights_from_outside() -> None:
    model = parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]> g (float[1, 1, 3] x, bool c) => (float[1, 1, k] y)
        <float[1, 1, 2] w = {1, 2}, float[1] scale = {2}, float[1] mean = {1}, float[1] variance = {4}> {
            y = If(c) <then_branch = t () => (float[1, 1, k] a) <float[1] shift = {5}> {
                           h = Conv(x, w)
                           a = BatchNormalization(h, scale, shift, mean, variance) },
                       else_branch = e () => (float[1, 1, 3] a) { a = Identity(x) }>
        }"""
    )
    graph = load(model)
    body = graph.nodes[0].attrs["then_branch"]
    norm = norm_of(body)
    assert obstacle_to_folding(norm, output_ids(graph)) is None
    fold_batch_norm(body, graph, norm, NameSource(graph))
    assert [constant.name for constant in graph.constants] == ["w"]
    assert [node.op for node in body.nodes] == ["Conv"]
    feeds = {"x": np.array([[[1, 2, 3]]], np.float32), "c": np.array(True)}
    expected = run(session(model), feeds)[0]
    np.testing.assert_allclose(run(session(to_model(graph)), feeds)[0], expected, rtol=1e-5)


class TestObstacles:
    def test_no_convolution_before_it(self) -> None:
        model = norm_model()
        model.graph.node[0].op_type = "Add"
        assert reason(model) == "no convolution directly before it"
        model.graph.node[0].CopyFrom(helper.make_node("Conv", ["x", "w"], ["h"], domain="vendor"))
        assert reason(model) == "no convolution directly before it"
        del model.graph.node[0]
        model.graph.node[0].input[0] = "x"
        assert reason(model) == "no convolution directly before it"

    def test_training_mode(self) -> None:
        assert reason(norm_model(norm={"training_mode": 1})) == "it runs in training mode"
        model = norm_model()
        model.graph.node[1].output.extend(["running_mean", "running_variance"])
        assert reason(model) == "it runs in training mode"

    def test_normalization_of_each_position(self) -> None:
        model = norm_model(norm={"spatial": 0})
        assert reason(model) == "it normalizes each position by itself (spatial = 0)"

    def test_another_reader_of_the_convolution(self) -> None:
        model = norm_model()
        model.graph.node.append(helper.make_node("Exp", ["h"], ["z"]))
        assert reason(model) == "the convolution's output is also read elsewhere"
        del model.graph.node[2]
        model.graph.output.append(tensor("h", None))
        assert reason(model) == "the convolution's output is also read elsewhere"

    @pytest.mark.parametrize("name", ["w", "b", "scale", "mean"])
    def test_parameters_that_are_computed(self, name: str) -> None:
        model = norm_model()
        index = next(index for index, item in enumerate(model.graph.initializer) if item.name == name)
        del model.graph.initializer[index]
        model.graph.input.append(tensor(name, None))
        assert reason(model) == "its parameters, or the convolution's, are computed while the model runs"

    def test_a_shared_weight(self) -> None:
        model = norm_model()
        model.graph.node.append(helper.make_node("Conv", ["x", "w"], ["z"]))
        assert reason(model) == "the convolution's weight is shared"
        del model.graph.node[2]
        model.graph.output.append(tensor("w", None))
        assert reason(model) == "the convolution's weight is shared"

    def test_a_weight_of_a_strange_shape(self) -> None:
        model = norm_model()
        model.graph.initializer[0].CopyFrom(value("w", np.zeros(4, np.float32)))
        assert reason(model) == "the convolution's weight has an unexpected shape"

    def test_attributes_known_only_where_the_function_is_called(self) -> None:
        model = parser.parse_model(
            """<ir_version: 8, opset_import: ["": 17, "local": 1]>
            g (float[1, 1, 3] x) => (float[1, 1, k] y) { y = local.f <eps = 0.1> (x) }
            <domain: "local", opset_import: ["": 17]> f <eps> (x) => (y) {
                w = Constant <value = float[1, 1, 2] {1, 2}> ()
                one = Constant <value = float[1] {1}> ()
                h = Conv(x, w)
                y = BatchNormalization <epsilon: float = @eps> (h, one, one, one, one)
            }"""
        )
        graph = load(model)
        found = obstacle_to_folding(norm_of(graph.local_functions[0]), output_ids(graph))
        assert found == "an attribute of it is set where the function is called"


def test_no_obstacle_where_there_is_none() -> None:
    assert reason(norm_model()) is None
    assert reason(norm_model(op="ConvTranspose", shape=(3, 4, 2, 2))) is None
    model = norm_model()
    assert model.graph.initializer[0].data_type == TensorProto.FLOAT
