"""Guessed moments: where inputs are as assumed, they are what is measured; and what alike producers make can be merged."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import parser

from onnxshrink.calibrate import Calibration
from onnxshrink.graph import expected_layers
from onnxshrink.graph.expected_moments import ExpectedMoments
from onnxshrink.graph.files import load
from onnxshrink.graph.weights import weights
from onnxshrink.inputs import Samples
from onnxshrink.numerics.gram import Gram
from tests import oracle

Array = np.ndarray[Any, np.dtype[Any]]
HEAD = '<ir_version: 9, opset_import: ["": 20]>'
CHANNELS = 6


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


K, C = normal(CHANNELS, CHANNELS, 1, 1, seed=5), normal(CHANNELS, seed=6)
LAST = normal(4, CHANNELS, 1, 1)


def model_of(body: str, weight: Array, shape: str = "1, 6, 48, 48", **more: Array) -> onnx.ModelProto:
    model = parser.parse_model(f"{HEAD} g (float[{shape}] x) => (float y) {{ {body} }}")
    model.graph.output[0].type.tensor_type.ClearField("shape")
    model.graph.initializer.extend(oracle.value(name, array) for name, array in {"w": weight, "k": K, "c": C, **more}.items() if name in body)
    return model


def guessed(model: onnx.ModelProto, site: str = "w") -> Gram | str:
    graph = load(model)
    weight = next(weight for weight in weights(graph) if weight.site == site)
    return ExpectedMoments(graph).gram(weight.uses[0])


def measured(model: onnx.ModelProto, count: int = 8) -> Gram:
    """Returns the moments that independent standard normal inputs lead to."""
    graph = load(model)
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    samples = Samples(lambda index: {"x": normal(*shape, seed=index + 100)}, range(count), "test")
    weight = next(weight for weight in weights(graph) if weight.site == "w")
    ((_, gram),) = Calibration(samples, threads=1).grams(graph, [weight])
    return gram


STATISTICS = {"s": normal(6, seed=11), "b": normal(6, seed=12)}
ORDINARY = {"m": C, "v": np.square(K[:, :, 0, 0]).sum(axis=1)}  # what k and c make of normal inputs
CASES: dict[str, tuple[str, Array, str, dict[str, Array]]] = {
    "a Conv": ("h = Conv(x, k, c) y = Conv(h, w)", LAST, "1, 6, 48, 48", {}),
    "Relu": ("h = Conv(x, k, c) r = Relu(h) y = Conv(r, w)", LAST, "1, 6, 48, 48", {}),
    "Relu6": ("h = Conv(x, k, c) r = Clip(h, lo, hi) y = Conv(r, w)", LAST, "1, 6, 48, 48", {"lo": np.float32(0), "hi": np.float32(1)}),
    "two layers": ("h = Conv(x, k, c) i = Tanh(h) j = Conv(i, k) y = Conv(j, w)", LAST, "1, 6, 48, 48", {}),
    "SiLU": ("h = Conv(x, k, c) g = Sigmoid(h) r = Mul(h, g) y = Conv(r, w)", LAST, "1, 6, 48, 48", {}),
    "Max": ("h = Conv(x, k, c) g = LeakyRelu(h) r = Max(h, g) y = Conv(r, w)", LAST, "1, 6, 48, 48", {}),
    "BatchNormalization": (
        "h = Conv(x, k, c) n = BatchNormalization<epsilon = 0.0>(h, s, b, m, v) r = Relu(n) y = Conv(r, w)",
        LAST, "1, 6, 48, 48", STATISTICS | ORDINARY,
    ),
    "InstanceNormalization": (
        "h = Conv(x, k) n = InstanceNormalization(h, s, b) r = Relu(n) y = Conv(r, w)", LAST, "1, 6, 48, 48", STATISTICS,
    ),
    "Concat": (
        "h = Conv(x, k, c) i = Conv(x, l) r = Relu(h) a = Concat<axis = 1>(r, h) y = Conv(h, w)", LAST, "1, 6, 48, 48", {"l": normal(3, 6, 1, 1)},
    ),
    "groups": (
        "h = Conv(x, k, c) r = Relu(h) g = Conv<group = 2>(r, l) y = Conv<group = 3>(g, w)",
        normal(3, 2, 1, 1), "1, 6, 48, 48", {"l": normal(6, 3, 1, 1)},
    ),
    "depthwise": ("h = Conv(x, k, c) d = Conv<group = 6>(h, l) y = Conv(d, w)", LAST, "1, 6, 48, 48", {"l": normal(6, 1, 1, 1)}),
    "Slice": (
        "h = Conv(x, k, c) p = Slice(h, one, five, one) r = Relu(p) y = Conv(r, w)",
        normal(4, 4, 1, 1), "1, 6, 48, 48", {"one": np.array([1]), "five": np.array([5])},
    ),
    "Slice of positions": (
        "h = Conv(x, k, c) p = Slice(h, zero, end, axis, two) r = Relu(p) y = Conv(r, w)",
        LAST, "1, 6, 48, 48", {"zero": np.array([0]), "end": np.array([99]), "axis": np.array([2]), "two": np.array([2])},
    ),
    "Pad of channels": (
        "h = Conv(x, k, c) r = Relu(h) p = Pad(r, pads, fill) y = Conv(p, w)",
        normal(4, 9, 1, 1), "1, 6, 48, 48", {"pads": np.array([0, 1, 0, 0, 0, 2, 0, 0]), "fill": np.float32(0.5)},
    ),
    "Pad by a shape": (
        "h = Conv(x, k, c) q = Shape(x) z = Sub(q, q) e = Add(z, pads) p = Concat<axis = 0>(z, e) r = Pad(h, p) y = Conv(r, w)",
        normal(4, 8, 1, 1), "1, 6, 48, 48", {"pads": np.array([0, 2, 0, 0])},
    ),
    "ConvTranspose": ("h = Conv(x, k, c) r = Relu(h) y = ConvTranspose(r, w)", normal(6, 4, 1, 1), "1, 6, 48, 48", {}),
    "behind a ConvTranspose": (
        "h = ConvTranspose<strides = [2, 2]>(x, l) y = Conv(h, w)", LAST, "1, 6, 24, 24", {"l": normal(6, 6, 2, 2)},
    ),
    "Gemm": ("h = Gemm<transB = 1>(x, l, c) r = Relu(h) y = Gemm<alpha = 0.5>(r, w)", normal(6, 3), "4000, 6", {"l": K[:, :, 0, 0]}),
    "MatMul and Gelu": (
        "h = MatMul(x, l) a = Add(h, c) q = Div(a, root) f = Erf(q) o = Add(f, one) g = Mul(a, o) y = MatMul(g, w)",
        normal(6, 3), "20, 200, 6", {"l": K[:, :, 0, 0], "root": np.float32(2**0.5), "one": np.float32([1])},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_moments_are_those_of_assumed_inputs(case: str) -> None:
    body, weight, shape, more = CASES[case]
    model = model_of(body, weight, shape, **more)
    found, expected = guessed(model), measured(model)
    assert not isinstance(found, str)
    scale = float(np.abs(expected.matrix).max() / expected.count)
    np.testing.assert_allclose(found.matrix / found.count, expected.matrix / expected.count, atol=0.03 * scale)
    np.testing.assert_allclose(found.mean, expected.mean, atol=0.03 * scale**0.5)
    assert not found.matrix.flags.writeable
    assert found.matrix.dtype == np.float64


def test_taps_of_a_kernel_are_alike_by_distance() -> None:
    body = "h = Conv(x, k, c) r = Relu(h) y = Conv<dilations = [1, 2]>(r, w)"
    one, kernel = guessed(model_of(body.replace("1, 2", "1, 1"), LAST)), guessed(model_of(body, normal(4, CHANNELS, 2, 2)))
    assert not isinstance(one, str)
    assert not isinstance(kernel, str)
    mean = one.mean[0]
    centred = one.matrix[0] / one.count - np.outer(mean, mean)
    distance = np.array([[0, 2, 1, 5**0.5], [2, 0, 5**0.5, 1], [1, 5**0.5, 0, 2], [5**0.5, 1, 2, 0]])
    means = np.repeat(mean, 4)
    np.testing.assert_allclose(kernel.mean[0], means)
    np.testing.assert_allclose(kernel.matrix[0] / kernel.count, np.kron(centred, 0.5**distance) + np.outer(means, means), atol=1e-9)


def test_a_transposed_kernel_meets_zeros_between_elements() -> None:
    model = model_of("h = Conv(x, k, c) r = Relu(h) y = ConvTranspose<strides = [2, 2]>(r, w)", normal(CHANNELS, 4, 3, 2))
    found, expected = guessed(model), measured(model)
    assert not isinstance(found, str)
    matrix, known = (gram.matrix[0].reshape(CHANNELS, 6, CHANNELS, 6) / gram.count for gram in (found, expected))
    scale = np.abs(known).max()
    np.testing.assert_allclose(np.einsum("itjt->tij", matrix), np.einsum("itjt->tij", known), atol=0.03 * scale)
    never = np.abs(known).max(axis=(0, 2)) == 0
    assert never.any()
    assert not matrix[:, never.nonzero()[0], :, never.nonzero()[1]].any()


def test_images_that_were_flattened() -> None:
    body = "h = Conv(x, k, c) f = Flatten(h) y = Gemm(f, w)"
    found = guessed(model_of(body, normal(CHANNELS * 4, 3), "1, 6, 2, 2"))
    assert not isinstance(found, str)
    single = guessed(model_of("h = Conv(x, k, c) y = Conv(h, w)", LAST))
    assert not isinstance(single, str)
    blocks = found.matrix[0].reshape(CHANNELS, 4, CHANNELS, 4) / found.count
    for tap in range(4):
        np.testing.assert_allclose(blocks[:, tap, :, tap], single.matrix[0] / single.count, atol=1e-9)


def test_sums_and_gates() -> None:
    plain = guessed(model_of("h = Conv(x, k, c) y = Conv(h, w)", LAST))
    total = guessed(model_of("h = Conv(x, k, c) i = Conv(h, l) a = Add(h, i) y = Conv(a, w)", LAST, l=np.zeros_like(K)))
    gate = "p = GlobalAveragePool(h) q = Conv(p, l, three) g = HardSigmoid<alpha = 0.1, beta = 0.0>(q) a = Mul(h, g)"
    gated = guessed(model_of(f"h = Conv(x, k, c) {gate} y = Conv(a, w)", LAST, l=np.zeros_like(K), three=np.full(6, 3, np.float32)))
    assert not any(isinstance(found, str) for found in (plain, total, gated))
    np.testing.assert_allclose(total.matrix / total.count, plain.matrix / plain.count, atol=1e-5)  # type: ignore[union-attr]
    np.testing.assert_allclose(gated.matrix / gated.count, 0.09 * plain.matrix / plain.count, atol=1e-5)  # type: ignore[union-attr]
    twice = guessed(model_of("h = Conv(x, k) i = Conv(x, l) a = Add(h, i) y = Conv(a, w)", LAST, l=K))
    variance = np.diagonal(twice.matrix[0]) / twice.count  # type: ignore[union-attr]
    np.testing.assert_allclose(variance, 2.6 * np.square(K[:, :, 0, 0]).sum(axis=1), rtol=1e-4)  # two of a kind, correlated by 0.3


def test_colors_are_alike() -> None:
    found = guessed(model_of("h = Conv(x, l) y = Conv(h, w)", normal(4, 2, 1, 1), "1, 3, 8, 8", l=np.float32([[[[1]], [[0]], [[0]]], [[[0]], [[1]], [[0]]]])))
    assert not isinstance(found, str)
    np.testing.assert_allclose(found.matrix[0] / found.count, [[1, 0.9], [0.9, 1]], atol=1e-4)


def test_channels_of_like_producers_are_merged() -> None:
    kernel = normal(8, CHANNELS, 3, 3, seed=1)
    kernel[5] = 2.0 * kernel[2]
    bias = normal(8, seed=2)
    bias[5] = 2.0 * bias[2]
    found = guessed(model_of("h = Conv(x, l, d) r = Relu(h) y = Conv(r, w)", normal(4, 8, 1, 1), l=kernel, d=bias))
    assert not isinstance(found, str)
    kept = np.array([0, 1, 2, 3, 4, 6, 7])
    merged = np.linalg.solve(found.matrix[0][np.ix_(kept, kept)], found.matrix[0][kept, 5])
    np.testing.assert_allclose(merged, 2.0 * (kept == 2), atol=0.02)
    weaker = np.linalg.solve(found.shrunk[0][np.ix_(kept, kept)], found.shrunk[0][kept, 5])
    assert weaker.argmax() == 2
    assert 0.5 < weaker[2] < 2.0


def test_computed_correlations_have_a_price_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("h = Conv(x, k, c) r = Relu(h) y = Conv(r, w)", LAST)
    whole = guessed(model)
    for name in ("_MOST_CHANNELS", "_MOST_WORK"):
        with monkeypatch.context() as patch:
            patch.setattr(expected_layers, name, 5)
            cheap = guessed(model)
        assert not isinstance(whole, str)
        assert not isinstance(cheap, str)
        np.testing.assert_allclose(cheap.mean, whole.mean)
        np.testing.assert_allclose(np.diagonal(cheap.matrix[0]), np.diagonal(whole.matrix[0]))
        np.testing.assert_allclose(cheap.matrix[0] / cheap.count - np.outer(cheap.mean, cheap.mean), np.diag(cheap.matrix[0].diagonal() / cheap.count - cheap.mean[0] ** 2), atol=1e-9)


@pytest.mark.parametrize(
    ("body", "weight", "reason"),
    [
        ("r = Relu(x) y = Conv(r, w)", LAST, "nothing that its inputs follow from is known"),
        ("h = Conv(x, k, c) a = Softmax<axis = 1>(h) y = Conv(a, w)", LAST, "nothing that its inputs follow from is known"),
        ("h = Conv(x, k, c) a = Transpose<perm = [0, 1, 3, 2]>(h) y = Conv(a, w)", LAST, "nothing that its inputs follow from is known"),
        ("h = Conv(x, k, c) a = Add(h, x) y = Conv(a, w)", LAST, "nothing that its inputs follow from is known"),
        ("h = Conv(x, k, c) a = Mul(h, h) b = Div(k, a) y = Conv(b, w)", LAST, "nothing that its inputs follow from is known"),
        ("h = Conv(x, k, c) y = MatMul(w, h)", normal(48, 48), "MatMul reads no channels with it"),
    ],
)
def test_what_is_not_known_is_said(body: str, weight: Array, reason: str) -> None:
    assert guessed(model_of(body, weight)) == reason


def test_too_many_columns_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxshrink.graph.expected_moments._MOST_COLUMNS", 5)
    assert guessed(model_of("h = Conv(x, k, c) y = Conv(h, w)", LAST)) == "6 columns are too many for a guessed Gram matrix"


def test_layers_behind_what_is_not_known_start_anew() -> None:
    body = "a = Softmax<axis = 1>(x) h = Conv(a, k, c) y = Conv(h, w)"
    assert not isinstance(guessed(model_of(body, LAST)), str)
    assert isinstance(guessed(model_of(body, LAST), "k"), str)
