"""Tests of activations: values against numpy, what may be named, laziness, and that only what is needed runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, parser

from onnxshrink import calibrate
from onnxshrink.calibrate import Calibration
from onnxshrink.contract import Activations
from onnxshrink.errors import PassError, ValidationError
from onnxshrink.graph.files import load
from onnxshrink.graph.ir import Graph, Variable
from onnxshrink.inputs import Feeds, Samples
from onnxshrink.runtime import Session, session
from tests import corpus

CHAIN = """<ir_version: 8, opset_import: ["": 17]> g (float[N, 3] x) => (float[N, 2] y)
    <float[3, 2] w = {1, 2, 3, 4, 5, 6}> { h = MatMul(x, w) a = Relu(h) y = Neg(a) }"""
W = np.arange(1, 7, dtype=np.float32).reshape(3, 2)


def data(count: int = 3, name: str = "x", shape: tuple[int, ...] = (2, 3)) -> Samples:
    arrays = np.random.default_rng(0).standard_normal((count, *shape)).astype(np.float32)
    return Samples(lambda index: {name: arrays[index]}, range(count), "test")


def chain() -> Graph:
    return load(parser.parse_model(CHAIN))


def test_values_are_those_of_every_sample() -> None:
    calibration: Activations = Calibration(data())
    assert calibration.count == 3
    found = list(calibration.samples(chain(), ["h", "a"]))
    assert len(found) == 3
    for values, feeds in zip(found, data(), strict=True):
        assert list(values) == ["h", "a"]
        np.testing.assert_allclose(values["h"], feeds["x"] @ W, rtol=1e-6)
        np.testing.assert_array_equal(values["a"], np.maximum(values["h"], 0))


def test_inputs_constants_and_outputs_have_values_too() -> None:
    for names in (["x", "w"], ["w", "y", "x"]):
        for values, feeds in zip(Calibration(data()).samples(chain(), names), data(), strict=True):
            assert list(values) == names
            np.testing.assert_array_equal(values["x"], feeds["x"])
            np.testing.assert_array_equal(values["w"], W)
            if "y" in names:
                np.testing.assert_allclose(values["y"], -np.maximum(feeds["x"] @ W, 0), rtol=1e-6)


def test_an_output_that_is_an_input_or_a_default() -> None:
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[2] x, float[2] w) => (float[2] y) { y = Add(x, w) }'
    )
    model.graph.initializer.append(helper.make_tensor("w", TensorProto.FLOAT, [2], [1, 2]))
    (values,) = Calibration(data(1, shape=(2,))).samples(load(model), ["w", "y"])
    np.testing.assert_array_equal(values["w"], [1, 2])
    np.testing.assert_array_equal(values["y"], data(1, shape=(2,))[0]["x"] + values["w"])


def test_the_graph_that_is_given_is_the_one_that_runs() -> None:
    graph = chain()
    graph.constants[0].values = W * 10
    (values,) = Calibration(data(1)).samples(graph, ["h"])
    np.testing.assert_allclose(values["h"], data(1)[0]["x"] @ W * 10, rtol=1e-6)


def test_the_graph_is_left_as_it_was() -> None:
    graph = chain()
    before = [tensor.name for tensor in graph.outputs], [node.op for node in graph.nodes], graph.outputs[0].shape
    list(Calibration(data()).samples(graph, ["h"]))
    assert before == (
        [tensor.name for tensor in graph.outputs],
        [node.op for node in graph.nodes],
        graph.outputs[0].shape,
    )


def test_wrong_types_from_before_a_rewrite_do_no_harm() -> None:
    graph = chain()
    hidden = graph.nodes[0].outputs[0]
    assert isinstance(hidden, Variable)
    hidden.dtype, hidden.shape = np.dtype(np.int64), (7,)
    (values,) = Calibration(data(1)).samples(graph, ["h"])
    assert values["h"].dtype == np.float32
    assert values["h"].shape == (2, 2)


def test_only_what_the_names_depend_on_runs() -> None:
    text = CHAIN.replace("y = Neg(a)", "s = Shape(a) t = Mul(s, s) b = Reshape(a, t) y = Neg(b)")
    graph = load(parser.parse_model(text))
    assert len(list(Calibration(data()).samples(graph, ["a"]))) == 3
    with pytest.raises(ValidationError, match="ONNX Runtime cannot run it: Reshape node"):
        list(Calibration(data()).samples(graph, ["b"]))


def test_only_the_constants_they_depend_on_are_given_to_onnx_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Graph] = []

    def spy(graph: Graph, threads: int | None) -> Session:
        given.append(graph)
        return session(graph, threads)

    monkeypatch.setattr(calibrate, "session", spy)
    graph = load(parser.parse_model(CHAIN.replace("y = Neg(a)", "c = Constant<value = float {2}>() y = Mul(a, c)")))
    list(Calibration(data()).samples(graph, ["h"]))
    assert [constant.name for constant in given[0].constants] == ["w"]
    assert [node.op for node in given[0].nodes] == ["MatMul"]


def test_what_a_branch_reads_from_outside_runs() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[2, 3] x) => (float[2, 3] y) {
        h = Neg(x) k = Abs(x) c = Constant<value = bool {1}>() i = If(c) <
            then_branch = t () => (float[2, 3] p) { q = Constant<value = bool {1}>() p = If(q) <
                then_branch = t2 () => (float[2, 3] r) { r = Mul(h, h) },
                else_branch = e2 () => (k) { }> },
            else_branch = e () => (float[2, 3] u) { u = Identity(x) }>
        y = Neg(i) }"""
    model = parser.parse_model(
        text.replace("else_branch = e2 () => (k) { }", "else_branch = e2 () => (float[2, 3] v) { v = Neg(k) }")
    )
    (values,) = Calibration(data(1)).samples(load(model), ["i"])
    np.testing.assert_allclose(values["i"], data(1)[0]["x"] ** 2, rtol=1e-6)


def test_unknown_names_are_refused_at_once() -> None:
    with pytest.raises(PassError) as caught:
        Calibration(data()).samples(chain(), ["h", "hh"])
    assert str(caught.value) == (
        "calibration: the main graph has no tensor 'hh'; did you mean 'h'? Known: a, h, w, x, y"
    )


def test_a_sequence_has_no_value() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[2, 3] x) => (float[2, 3] y)
        { s = SequenceConstruct(x, x) z = Constant<value = int64 {0}>() y = SequenceAt(s, z) }"""
    with pytest.raises(ValidationError, match=r"^calibration: 's' has no value: it is not a tensor$"):
        list(Calibration(data(1)).samples(load(parser.parse_model(text)), ["s"]))


def test_nothing_runs_before_it_is_asked_for_and_samples_come_one_by_one() -> None:
    read: list[int] = []

    def feeds(index: int) -> Feeds:
        read.append(index)
        return data()[index]

    broken = chain()
    broken.nodes[0].op = "NoSuchOp"
    calibration = Calibration(Samples(feeds, range(3), "test"))
    waiting = calibration.samples(broken, ["h"])
    assert not read
    with pytest.raises(ValidationError, match="cannot load it"):
        next(waiting)
    values = calibration.samples(chain(), ["h"])
    next(values)
    assert read == [0]
    next(values)
    assert read == [0, 1]


def test_real_models_give_every_kind_of_tensor(corpus_name: str) -> None:
    path = corpus.model_path(corpus_name)
    graph = load(path)
    with session(path, role="original") as running:
        feeds = corpus.sample(corpus_name, [spec.name for spec in running.inputs if not spec.optional])
        expected = running.run(feeds)
    inner = [tensor.name for node in graph.nodes for tensor in node.outputs if tensor.name]
    names = inner[:: max(1, len(inner) // 10)] + [tensor.name for tensor in graph.outputs]
    (values,) = Calibration(Samples(lambda index: feeds, range(1), "test")).samples(graph, names)
    assert set(values) == set(names)
    for name, array in expected.items():  # more outputs, fewer fusions: the last bits may move
        tolerance = 0.01 * float(np.abs(array.astype(np.float64)).max())
        np.testing.assert_allclose(values[name].astype(np.float64), array.astype(np.float64), rtol=0, atol=tolerance)


def test_a_large_external_model_needs_no_message(tmp_path: Path) -> None:
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[2, 3] x) => (float[2, 1024] y) { h = MatMul(x, w) y = Neg(h) }'
    )
    weight = np.random.default_rng(0).standard_normal((3, 1024)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    (values,) = Calibration(data(1)).samples(load(tmp_path / "m.onnx"), ["h"])
    np.testing.assert_allclose(values["h"], data(1)[0]["x"] @ weight, rtol=1e-5, atol=1e-5)
