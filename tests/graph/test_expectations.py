"""Mean inputs from normalizations, against closed forms and against what ONNX Runtime computes from normally distributed inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, parser
from scipy.stats import norm

from onnxshrink.calibrate import Calibration
from onnxshrink.graph.expectations import Expectations, is_inference
from onnxshrink.graph.files import load
from onnxshrink.graph.weights import Weight, weights
from onnxshrink.inputs import Samples
from tests import oracle

Array = np.ndarray[Any, np.dtype[Any]]
HEAD = '<ir_version: 8, opset_import: ["": 17]>'
CHANNELS = 6


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def statistics(seed: int = 3) -> dict[str, Array]:
    """Returns scale, shift, mean and variance; one scale is negative, as training may leave it, and one is zero."""
    scale = normal(CHANNELS, seed=seed)
    scale[1] = 0.0
    return {"s": scale, "b": normal(CHANNELS, seed=seed + 1), "m": normal(CHANNELS, seed=seed + 2), "v": np.exp(normal(CHANNELS, seed=seed + 3))}


def model_of(body: str, weight: Array, shape: str = "2, 6, 40, 40", **more: Array) -> onnx.ModelProto:
    model = parser.parse_model(f"{HEAD} g (float[{shape}] x) => (float y) {{ n = BatchNormalization<epsilon = 0.0>(x, s, b, m, v) {body} }}")
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    model.graph.output[0].type.tensor_type.ClearField("shape")
    arrays = {**statistics(), "w": weight, **more}
    model.graph.initializer.extend(oracle.value(name, array) for name, array in arrays.items())
    return model


def weight_of(model: onnx.ModelProto) -> tuple[Weight, Array | str]:
    graph = load(model)
    weight = next(weight for weight in weights(graph) if weight.site == "w")
    return weight, Expectations(graph).mean_input(weight.uses[0])


def measured(model: onnx.ModelProto, count: int = 12) -> Array:
    """Returns what the columns of the weight meet on average when the normalization's statistics hold."""
    graph, known = load(model), statistics()
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    along = (1, -1, *[1] * (len(shape) - 2))

    def feed(index: int) -> dict[str, Array]:
        drawn = np.random.default_rng(index).standard_normal(shape)
        return {"x": (drawn * np.sqrt(known["v"]).reshape(along) + known["m"].reshape(along)).astype(np.float32)}

    calibration = Calibration(Samples(feed, range(count), "test"), threads=1)
    weight = next(weight for weight in weights(graph) if weight.site == "w")
    ((_, gram),) = calibration.grams(graph, [weight])
    return gram.mean


CONV = normal(4, CHANNELS, 1, 1)
CASES: dict[str, tuple[str, Array, dict[str, Array]]] = {
    "nothing": ("y = Conv(n, w)", CONV, {}),
    "Relu": ("r = Relu(n) y = Conv(r, w)", CONV, {}),
    "Relu6": ("r = Clip(n, zero, six) y = Conv(r, w)", CONV, {"zero": np.float32(0), "six": np.float32(0.6)}),
    "Clip from below": ("r = Clip(n, low) y = Conv(r, w)", CONV, {"low": np.float32(-0.2)}),
    "LeakyRelu": ("r = LeakyRelu<alpha = 0.3>(n) y = Conv(r, w)", CONV, {}),
    "Sigmoid": ("r = Sigmoid(n) y = Conv(r, w)", CONV, {}),
    "Tanh": ("r = Tanh(n) y = Conv(r, w)", CONV, {}),
    "HardSigmoid": ("r = HardSigmoid<alpha = 0.4, beta = 0.3>(n) y = Conv(r, w)", CONV, {}),
    "HardSwish": ("r = HardSwish(n) y = Conv(r, w)", CONV, {}),
    "SiLU": ("g = Sigmoid(n) r = Mul(n, g) y = Conv(r, w)", CONV, {}),
    "HardSwish in parts": (
        "a = Add(n, three) c = Clip(a, zero, six) q = Mul(n, c) r = Div(q, six) y = Conv(r, w)",
        CONV,
        {"three": np.float32([3]), "zero": np.float32(0), "six": np.float32(6)},
    ),
    "constants of channels": ("q = Sub(k, n) r = Relu(q) y = Conv(r, w)", CONV, {"k": normal(1, CHANNELS, 1, 1)}),
    "sum of two": ("a = Relu(n) c = Add(a, n) y = Conv(c, w)", CONV, {}),
    "Identity": ("i = Identity(n) r = Relu(i) d = Dropout(r) y = Conv(d, w)", CONV, {}),
    "kernel": ("r = Relu(n) y = Conv(r, w)", normal(4, CHANNELS, 3, 3), {}),
    "groups": ("r = Relu(n) y = Conv<group = 2>(r, w)", normal(4, CHANNELS // 2, 3, 3), {}),
    "depthwise": ("r = Relu(n) y = Conv<group = 6, dilations = [2, 2]>(r, w)", normal(CHANNELS, 1, 3, 3), {}),
    "ConvTranspose": ("r = Relu(n) y = ConvTranspose<group = 2>(r, w)", normal(CHANNELS, 2, 1, 1), {}),
    "ConvTranspose with strides": (
        "r = Relu(n) y = ConvTranspose<strides = [2, 2], group = 2>(r, w)", normal(CHANNELS, 2, 2, 2), {},
    ),
    "AveragePool": ("r = Relu(n) p = AveragePool<kernel_shape = [2, 2], strides = [2, 2]>(r) y = Conv(p, w)", CONV, {}),
    "GlobalAveragePool": ("r = Relu(n) p = GlobalAveragePool(r) y = Conv(p, w)", CONV, {}),
    "Flatten": ("r = Relu(n) p = GlobalAveragePool(r) f = Flatten(p) y = Gemm(f, w)", normal(CHANNELS, 3), {}),
    "Flatten of an image": (
        "r = Relu(n) p = AveragePool<kernel_shape = [20, 20], strides = [20, 20]>(r) f = Flatten(p) y = Gemm<transB = 1>(f, w)",
        normal(3, CHANNELS * 4), {},
    ),
    "Reshape": ("r = Relu(n) p = GlobalAveragePool(r) f = Reshape(p, to) y = MatMul(f, w)", normal(CHANNELS, 3), {"to": np.array([-1, CHANNELS])}),
    "Squeeze": ("r = Relu(n) p = GlobalAveragePool(r) f = Squeeze(p, ax) y = MatMul(f, w)", normal(CHANNELS, 3), {"ax": np.array([2, 3])}),
    "ReduceMean": ("r = Relu(n) f = ReduceMean<axes = [2, 3], keepdims = 0>(r) y = MatMul(f, w)", normal(CHANNELS, 3), {}),
    "behind a Conv": (
        "r = Relu(n) d = Conv<group = 6>(r, k, c) y = Conv(d, w)", CONV, {"k": normal(CHANNELS, 1, 3, 3), "c": normal(CHANNELS)},
    ),
    "behind a ConvTranspose": (
        "r = Relu(n) d = ConvTranspose<strides = [2, 2], group = 2>(r, k) y = Conv(d, w)", CONV, {"k": normal(CHANNELS, 3, 2, 2)},
    ),
    "behind a Gemm": (
        "p = GlobalAveragePool(n) f = Flatten(p) h = Gemm<transB = 1>(f, k, c) y = MatMul(h, w)",
        normal(5, 3), {"k": normal(5, CHANNELS), "c": normal(5)},
    ),
    "behind a MatMul and a sum": (
        "p = GlobalAveragePool(n) f = Flatten(p) h = MatMul(f, k) a = Add(h, h) y = MatMul(a, w)", normal(5, 3), {"k": normal(CHANNELS, 5)},
    ),
    "behind a sum of means": (
        "d = Conv(n, k) a = Sub(d, n) t = Mul(a, two) y = Conv(t, w)", CONV, {"k": normal(CHANNELS, CHANNELS, 1, 1), "two": np.float32(2)},
    ),
    "Concat": ("r = Relu(n) c = Concat<axis = 1>(n, r) y = Conv(c, w)", normal(4, 2 * CHANNELS, 1, 1), {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_mean_inputs_are_those_of_normally_distributed_channels(case: str) -> None:
    body, weight, more = CASES[case]
    model = model_of(body, weight, **more)
    _, mean = weight_of(model)
    assert not isinstance(mean, str)
    expected = measured(model)
    assert mean.shape == expected.shape
    spread = float(np.abs(statistics()["s"]).max())
    np.testing.assert_allclose(mean, expected, atol=0.03 * spread)


def test_closed_forms() -> None:
    known = statistics()
    mean, spread = known["b"].astype(np.float64), np.maximum(np.abs(known["s"].astype(np.float64)), 1e-12)
    _, found = weight_of(model_of("r = Relu(n) y = Conv(r, w)", CONV))
    relu = mean * norm.cdf(mean / spread) + spread * norm.pdf(mean / spread)
    np.testing.assert_allclose(np.reshape(found, -1), relu, atol=1e-3)  # type: ignore[arg-type]
    _, found = weight_of(model_of("y = Conv(n, w)", CONV))
    np.testing.assert_allclose(np.reshape(found, -1), mean, atol=1e-9)  # type: ignore[arg-type]


def test_the_sum_of_two_normalized_tensors_is_normal_again() -> None:
    more = {"s2": normal(CHANNELS, seed=8), "b2": normal(CHANNELS, seed=9)}
    body = "k = BatchNormalization(x, s2, b2, m, v) a = Add(n, k) r = Relu(a) y = Conv(r, w)"
    _, found = weight_of(model_of(body, CONV, **more))
    known = statistics()
    mean = (known["b"] + more["b2"]).astype(np.float64)
    spread = np.sqrt(known["s"].astype(np.float64) ** 2 + more["s2"].astype(np.float64) ** 2)
    expected = mean * norm.cdf(mean / spread) + spread * norm.pdf(mean / spread)
    np.testing.assert_allclose(np.reshape(found, -1), expected, atol=1e-3)  # type: ignore[arg-type]


def test_two_axes_are_enough_for_a_matrix_product() -> None:
    for op in ("MatMul", "Gemm"):
        model = model_of(f"r = Relu(n) y = {op}(r, w)", normal(CHANNELS, 4), "4000, 6")
        model.graph.value_info.append(oracle.tensor("r", [4000, CHANNELS]))
        _, mean = weight_of(model)
        np.testing.assert_allclose(mean, measured(model, 4), atol=0.05)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("body", "weight", "more"),
    [
        ("r = MaxPool<kernel_shape = [2, 2]>(n) y = Conv(r, w)", CONV, {}),
        ("r = Relu(x) y = Conv(r, w)", CONV, {}),
        ("y = MatMul(n, w)", normal(40, 4), {}),  # along the last axis there are no channels
        ("f = Reshape(n, to) y = MatMul(f, w)", normal(CHANNELS, 4), {"to": np.array([-1, CHANNELS])}),  # mixes channels
        ("g = Sigmoid(x) r = Mul(n, g) y = Conv(r, w)", CONV, {}),
        ("r = Add(n, k) y = Conv(r, w)", CONV, {"k": normal(1, 1, 1, 40)}),
        ("c = Concat<axis = 1>(n, x) y = Conv(c, w)", normal(4, 2 * CHANNELS, 1, 1), {}),
        ("c = Concat<axis = 2>(n, n) y = Conv(c, w)", CONV, {}),
        ("r = Transpose<perm = [0, 1, 3, 2]>(n) y = Conv(r, w)", CONV, {}),
        ("h = Log(zero) r = Mul(n, h) y = Conv(r, w)", CONV, {"zero": np.float32(0)}),
        ("d = Conv(n, k) r = Relu(d) y = Conv(r, w)", CONV, {"k": normal(CHANNELS, CHANNELS, 1, 1)}),
        ("d = Conv(n, k) r = Mul(d, d) y = Conv(r, w)", CONV, {"k": normal(CHANNELS, CHANNELS, 1, 1)}),
        ("d = Conv(n, k) r = Div(one, d) y = Conv(r, w)", CONV, {"k": normal(CHANNELS, CHANNELS, 1, 1), "one": np.float32(1)}),
        ("c = Identity(b) d = Conv(n, k, c) y = Conv(d, w)", CONV, {"k": normal(CHANNELS, CHANNELS, 1, 1)}),
        ("r = Div(n, zero) y = Conv(r, w)", CONV, {"zero": np.float32(0)}),
    ],
)  # fmt: skip
def test_what_does_not_follow_is_not_guessed(body: str, weight: Array, more: dict[str, Array]) -> None:
    _, mean = weight_of(model_of(body, weight, **more))
    assert mean == "its inputs do not follow from normalized ones"


def test_other_operands_have_no_mean() -> None:
    for body, weight in (("y = MatMul(w, n)", normal(40, 40)), ("f = Flatten(n) y = Gemm<transA = 1>(f, w)", normal(2, 4))):
        _, mean = weight_of(model_of(body, weight))
        assert isinstance(mean, str)


def test_training_mode_and_computed_statistics_tell_nothing() -> None:
    training = model_of("r = Relu(n) y = Conv(r, w)", CONV)
    training.graph.node[0].attribute.append(helper.make_attribute("training_mode", 1))
    computed = model_of("r = Relu(n) y = Conv(r, w)", CONV)
    computed.graph.node.insert(0, helper.make_node("Identity", ["b"], ["b2"]))
    computed.graph.node[1].input[2] = "b2"
    for model, inference in ((training, False), (computed, True)):
        _, mean = weight_of(model)
        assert isinstance(mean, str)
        node = next(node for node in load(model).nodes if node.op == "BatchNormalization")
        assert is_inference(node) == inference
