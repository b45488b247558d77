"""Tests of activations and Gram matrices: values against numpy, laziness, memory, and that only what is needed runs."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, parser

from onnxshrink import relay
from onnxshrink.calibrate import Calibration
from onnxshrink.contract import Activations
from onnxshrink.errors import PassError, ValidationError
from onnxshrink.graph.files import load
from onnxshrink.graph.ir import Graph, Variable
from onnxshrink.graph.weights import weights
from onnxshrink.inputs import Feeds, Samples
from onnxshrink.numerics.gram import Gram, GramSum, PairedGram
from onnxshrink.numerics.products import ProductSum
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

    monkeypatch.setattr(relay, "session", spy)
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


TWO_LAYERS = """<ir_version: 8, opset_import: ["": 17]> g (float[N, 3] x) => (float[N, 2] y, float[N, 2] z)
    <float[3, 4] first = {1, -2, 3, 4, 5, -6, 1, 2, 3, 4, 5, 6}, float[3, 2] other = {1, 2, 3, 4, 5, 6}, float[2] bias = {1, 2},
     float[4, 2] last = {1, 2, 3, 4, 5, 6, 7, 8}>
    { n = Neg(x) h = MatMul(n, first) a = Relu(h) b = MatMul(a, last) y = Add(b, bias) z = Gemm(n, other) }"""


def grams(calibration: Calibration, graph: Graph) -> dict[str, Gram]:
    return {weight.site: gram for weight, gram in calibration.grams(graph, weights(graph))}


def dense(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    wide = rows.astype(np.float64)
    return wide.T @ wide


def test_grams_are_those_of_the_inputs_of_layers_over_all_samples() -> None:
    calibration: Activations = Calibration(data())
    graph = load(parser.parse_model(TWO_LAYERS))
    found = {weight.site: gram for weight, gram in calibration.grams(graph, weights(graph)[::-1])}
    assert list(found) == ["first", "other", "last"]  # as the graph runs; a bias is multiplied with nothing
    n = np.concatenate([-feeds["x"] for feeds in data()])
    a = np.concatenate([values["a"] for values in calibration.samples(graph, ["a"])])
    assert found["first"] is found["other"]  # MatMul and Gemm of one tensor
    for rows, gram in ((n, found["first"]), (a, found["last"])):
        np.testing.assert_allclose(gram.matrix[0], dense(rows), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(gram.mean[0], rows.mean(axis=0), rtol=1e-5, atol=1e-6)
        assert gram.count == len(rows) == 6


@pytest.mark.parametrize(("memory", "sessions"), [(1, 3), (1 << 30, 2)])
def test_layers_that_do_not_fit_in_memory_together_take_turns(
    memory: int, sessions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Graph] = []
    expected = grams(Calibration(data()), load(parser.parse_model(TWO_LAYERS)))
    monkeypatch.setattr(relay, "session", lambda *args: [started.append(args[0]), session(*args)][1])
    found = grams(Calibration(data(), memory=memory), load(parser.parse_model(TWO_LAYERS)))
    assert len(started) == sessions  # one that asks for shapes, one a group
    assert list(found) == list(expected)
    for site, gram in found.items():
        np.testing.assert_array_equal(gram.matrix, expected[site].matrix)


def test_the_shape_of_activations_decides_too(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Graph] = []
    monkeypatch.setattr(relay, "session", lambda *args: [started.append(args[0]), session(*args)][1])
    sums = GramSum.nbytes(1, 3) + GramSum.nbytes(1, 4)
    activations = 4 * 2 * (3 + 4)  # n and a
    for memory, sessions in ((sums + activations, 2), (sums + activations - 1, 3)):
        started.clear()
        grams(Calibration(data(), memory=memory), load(parser.parse_model(TWO_LAYERS)))
        assert len(started) == sessions


def test_grams_of_one_layer_start_one_session(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Graph] = []
    monkeypatch.setattr(relay, "session", lambda *args: [started.append(args[0]), session(*args)][1])
    graph = load(parser.parse_model(TWO_LAYERS))
    waiting = Calibration(data()).grams(graph, weights(graph)[-1:])
    assert not started
    assert len(list(waiting)) == len(started) == 1
    assert list(Calibration(data()).grams(graph, [])) == []


def test_edits_between_grams_change_nothing() -> None:
    graph = load(parser.parse_model(TWO_LAYERS))
    expected = grams(Calibration(data()), graph)
    for weight, gram in Calibration(data(), memory=1).grams(graph, weights(graph)):
        np.testing.assert_array_equal(gram.matrix, expected[weight.site].matrix)
        weight.constant.values = weight.constant.values * 0
        graph.nodes[0].op = "NoSuchOp"


def test_a_tied_weight_sums_over_its_uses() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[N, 2] x) => (float[N, 2] y) <float[2, 2] w = {1, 2, 3, -4}>
        { a = MatMul(x, w) y = MatMul(a, w) }"""
    graph = load(parser.parse_model(text))
    samples = data(shape=(5, 2))
    ((_, gram),) = Calibration(samples).grams(graph, weights(graph))
    rows = [array for values in Calibration(samples).samples(graph, ["x", "a"]) for array in values.values()]
    np.testing.assert_allclose(gram.matrix[0], dense(np.concatenate(rows)), rtol=1e-5)
    assert gram.count == 30


@pytest.mark.parametrize("name", ["y", ""])
def test_hidden_states_that_the_model_does_not_name(name: str) -> None:
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]> g (float[S, 1, 2] x) => (float[1, 1, 2] last)
        { y, last = LSTM<hidden_size = 2>(x, w, r) }""")
    arrays = {name: np.random.default_rng(0).standard_normal((1, 8, 2)).astype(np.float32) for name in ("w", "r")}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    samples = data(shape=(4, 1, 2))
    before = [
        np.vstack([np.zeros((1, 2)), y["y"][:-1, 0, 0]]) for y in Calibration(samples).samples(load(model), ["y"])
    ]
    model.graph.node[0].output[0] = name
    graph = load(model)
    found = grams(Calibration(samples), graph)
    np.testing.assert_allclose(found["r"].matrix[0], sum(map(dense, before)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["w"].matrix[0], sum(dense(feeds["x"][:, 0]) for feeds in samples), rtol=1e-5)
    assert graph.nodes[0].outputs[0].name == name


def test_activations_that_are_not_finite_are_named() -> None:
    graph = load(parser.parse_model(TWO_LAYERS.replace("a = Relu(h)", "zero = Sub(h, h) a = Div(h, zero)")))
    with pytest.raises(ValidationError, match=r"^calibration: input 'a' of a layer: values must be finite, got a NaN"):
        grams(Calibration(data()), graph)


def edited(graph: Graph, *names: str) -> Graph:
    """Returns a copy in which the named constants are rounded coarsely."""
    copy = graph.copy()
    for constant in copy.constants:
        if constant.name in names:
            step = np.abs(constant.values).max() / 3
            constant.values = (np.rint(constant.values / step) * step).astype(constant.dtype)
    return copy


def pairs(calibration: Calibration, graph: Graph, original: Graph) -> dict[str, PairedGram]:
    portions = calibration.paired_grams(graph, original, [weights(graph)])
    return {weight.site: pair for portion in portions for weight, pair in portion}


def check_pair(pair: PairedGram, errors: list[np.ndarray[Any, Any]], now: list[np.ndarray[Any, Any]]) -> None:
    """Compares with dense float64 products of positions [count, rows] and [count, columns] of one group."""
    first, second = (np.concatenate(rows).astype(np.float64) for rows in (errors, now))
    assert pair.now.count == len(first) == len(second)
    assert pair.error.dtype == pair.error_mean.dtype == np.float64
    np.testing.assert_allclose(pair.now.matrix[0], second.T @ second, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(pair.error[0], first.T @ second, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(pair.error_mean[0], first.mean(axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(pair.now.mean[0], second.mean(axis=0), rtol=1e-5, atol=1e-6)


def test_pairs_hold_what_layers_meet_now_and_what_their_outputs_lack() -> None:
    calibration: Activations = Calibration(data())
    original = load(parser.parse_model(TWO_LAYERS))
    graph = edited(original, "first", "bias")
    (portion,) = calibration.paired_grams(graph, original, [weights(graph)[::-1]])
    found = {weight.site: (weight, pair) for weight, pair in portion}
    assert list(found) == ["first", "other", "last"]
    assert found["first"][1].now is found["other"][1].now
    assert all(any(weight.constant is constant for constant in graph.constants) for weight, _ in found.values())
    before, now = (
        [(values["a"], values["b"]) for values in calibration.samples(one, ["a", "b"])] for one in (original, graph)
    )
    errors = [y - changed for (_, y), (_, changed) in zip(before, now, strict=True)]
    assert np.abs(np.concatenate(errors)).max() > 0.1
    check_pair(found["last"][1], errors, [a for a, _ in now])
    n = [-feeds["x"] for feeds in data()]
    first = {constant.name: constant.values for one in (original, graph) for constant in one.constants}
    lost = next(constant.values for constant in original.constants if constant.name == "first") - first["first"]
    check_pair(found["first"][1], [rows @ lost for rows in n], n)  # for a changed weight its error is no other one
    check_pair(found["other"][1], [np.zeros((2, 2))] * 3, n)  # nothing before it has changed


@pytest.mark.parametrize("memory", [1, 1 << 30])
def test_pairs_of_equal_graphs_lack_nothing(memory: int) -> None:
    graph = load(parser.parse_model(TWO_LAYERS))
    expected = grams(Calibration(data()), graph)
    found = pairs(Calibration(data(), memory=memory), graph.copy(), graph)
    assert list(found) == list(expected)
    for site, pair in found.items():
        np.testing.assert_array_equal(pair.now.matrix, expected[site].matrix)
        assert pair.error.shape == (1, 4 if site == "first" else 2, pair.now.matrix.shape[-1])
        assert not pair.error.any()
        assert not pair.error_mean.any()


def test_pairs_of_layers_that_do_not_fit_in_memory_together_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Graph] = []
    monkeypatch.setattr(relay, "session", lambda *args: [started.append(args[0]), session(*args)][1])
    original = load(parser.parse_model(TWO_LAYERS))
    sums = GramSum.nbytes(1, 3) + GramSum.nbytes(1, 4)
    sums += sum(ProductSum.nbytes(1, *shape) for shape in ((4, 3), (2, 3), (2, 4)))
    activations = 4 * 2 * (3 + 4 + 4 + 2 + 2)  # n, a, and the outputs h, z and b
    for memory, sessions in ((sums + activations, 1 + 2), (sums + activations - 1, 1 + 4)):
        started.clear()
        pairs(Calibration(data(), memory=2 * memory), edited(original, "first"), original)
        assert len(started) == sessions  # one that asks for shapes, two a group


def test_pairs_of_groups_and_of_a_tied_weight() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[1, 4, 5] x) => (float[1, 4, 5] y)
        { e = Conv<kernel_shape = [1]>(x, point)
          a = Conv<group = 2, pads = [1, 1]>(e, wide) y = Conv<group = 2, pads = [1, 1]>(a, wide) }"""
    rng = np.random.default_rng(0)
    model = parser.parse_model(text)
    for name, shape in (("point", (4, 4, 1)), ("wide", (4, 2, 3))):
        model.graph.initializer.append(
            onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        )
    original = load(model)
    graph = edited(original, "point")
    calibration = Calibration(data(shape=(1, 4, 5)))
    pair = pairs(calibration, graph, original)["wide"]
    error, mean = np.zeros((2, 2, 6)), np.zeros((2, 2))
    names = ["e", "a", "y"]
    for before, now in zip(calibration.samples(original, names), calibration.samples(graph, names), strict=True):
        for source, output in itertools.pairwise(names):
            lacks = before[output][0].astype(np.float64) - now[output][0]
            moved = np.pad(now[source][0].astype(np.float64), ((0, 0), (1, 1)))
            for group, at in itertools.product(range(2), range(5)):
                rows = slice(2 * group, 2 * group + 2)
                error[group] += np.outer(lacks[rows, at], moved[rows, at : at + 3].ravel())
                mean[group] += lacks[rows, at] / 30
    assert pair.now.count == 30
    np.testing.assert_allclose(pair.error, error, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(pair.error_mean, mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_pairs_of_recurrent_layers_lack_what_their_inputs_do(direction: str) -> None:
    """Between their products and their outputs are gates: what is lacking is W (x - x')."""
    both = 2 if direction == "bidirectional" else 1
    model = parser.parse_model(f"""<ir_version: 8, opset_import: ["": 17]> g (float[S, 2, 3] x) => (float[S, {both}, 2, 2] y)
        {{ h = MatMul(x, first) y = LSTM<hidden_size = 2, direction = "{direction}">(h, w, r) }}""")
    rng = np.random.default_rng(0)
    for name, shape in (("first", (3, 3)), ("w", (both, 8, 3)), ("r", (both, 8, 2))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    original = load(model)
    graph = edited(original, "first")
    calibration = Calibration(data(shape=(4, 2, 3)))
    found = pairs(calibration, graph, original)
    before, now = ([values["h"].reshape(-1, 3) for values in calibration.samples(one, ["h"])] for one in (original, graph))
    for direction in range(both):
        weight = next(constant for constant in original.constants if constant.name == "w").values[direction]
        errors = np.concatenate(before) - np.concatenate(now)
        expected = (errors @ weight.T).T @ np.concatenate(now)
        np.testing.assert_allclose(found["w"].error[direction], expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found["w"].error_mean[direction], (errors @ weight.T).mean(axis=0), rtol=1e-4, atol=1e-5)
    before, now = ([values["y"] for values in calibration.samples(one, ["y"])] for one in (original, graph))
    states = [np.concatenate([np.vstack([np.zeros((1, 2, 2)), y[:-1, 0]]).reshape(-1, 2) for y in run]) for run in (before, now)]
    weight = next(constant for constant in original.constants if constant.name == "r").values[0]
    expected = ((states[0] - states[1]) @ weight.T).T @ states[1]
    np.testing.assert_allclose(found["r"].error[0], expected, rtol=1e-4, atol=1e-4)


def test_infinities_that_stay_lack_nothing() -> None:
    """Attention masks add them to what is left out; where they move, what is lacking is not a number."""
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[2, 3] x) => (float[2, 3] y)
        { s = MatMul(x, first) mask = Div(one, zeros) k = Add(s, mask) m = MatMul(x, last) y = Add(m, k) }"""
    model = parser.parse_model(text)
    zeros = np.array([[1, 1, 0]], np.float32)
    arrays = {"first": np.eye(3), "last": np.eye(3) + 1, "one": np.ones(1), "zeros": zeros}
    for name, array in arrays.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    original = load(model)
    graph = original.copy()
    found = {weight.site: weight for weight in weights(graph)}
    portions = Calibration(data()).paired_grams(graph, original, [[found["first"]], [found["last"]]])
    next(portions)
    found["first"].constant.values = np.eye(3, dtype=np.float32) * 0.5
    ((_, pair),) = next(portions)
    lacks = [np.where([True, True, False], 0.5 * feeds["x"], 0) for feeds in data()]
    check_pair(pair, lacks, [feeds["x"] for feeds in data()])


def test_only_what_pairs_need_runs_in_either_graph() -> None:
    original = load(
        parser.parse_model(TWO_LAYERS.replace("y = Add(b, bias)", "s = Shape(b) t = Mul(s, s) y = Reshape(b, t)"))
    )
    graph = edited(original, "first")
    assert len(pairs(Calibration(data()), graph, original)) == 3


def test_samples_of_pairs_are_read_once() -> None:
    read: list[int] = []
    original = load(parser.parse_model(TWO_LAYERS))
    samples = Samples(lambda index: [read.append(index), data()[index]][1], range(3), "test")
    graph = original.copy()
    only = [weight for weight in weights(graph) if weight.site == "last"]
    list(Calibration(samples).paired_grams(graph, original, [only]))
    assert sorted(read) == [0, 1, 2]


def test_moments_take_samples_from_all_over_and_stop_when_there_are_enough() -> None:
    read: list[int] = []
    graph = load(parser.parse_model(TWO_LAYERS))
    first = data()[0]
    wide = {name: np.concatenate([array] * 40) for name, array in first.items()}
    samples = Samples(lambda index: [read.append(index), wide][1], range(1000), "test")
    only = [weight for weight in weights(graph) if weight.site == "last"]
    list(Calibration(samples).grams(graph, only))
    assert len(read) < 200
    assert np.abs(np.quantile(read, [0.0, 0.25, 0.5, 0.75, 1.0]) - [0, 250, 500, 750, 1000]).max() < 60


def test_pairs_of_another_model_are_refused() -> None:
    graph = load(parser.parse_model(TWO_LAYERS))
    for text in (
        TWO_LAYERS.replace("last", "ultima"),
        TWO_LAYERS.replace("z = Gemm(n, other)", "z = Gemm<alpha = 2.0>(n, other)"),
    ):
        with pytest.raises(
            PassError, match=r"^calibration: the original does not multiply with '\w+' as its copy does$"
        ):
            pairs(Calibration(data()), graph, load(parser.parse_model(text)))


def test_activations_that_change_their_shape_have_no_pairs() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[N, 2] x) => (float[K, 2] y)
        <float[2, 2] first = {1, 2, 3, -4}, float[2, 2] last = {1, 2, 3, 4}, float[2] ones = {1, 1}>
        { a = MatMul(x, first) s = MatMul(a, ones) zero = Sub(s, s) c = Greater(s, zero) k = Compress<axis = 0>(a, c) y = MatMul(k, last) }"""
    original = load(parser.parse_model(text))
    graph = original.copy()
    graph.constants[0].values = -original.constants[0].values
    expected = r"^calibration: 'y' has shape \[\d, 2\] in the original and \[\d, 2\] in its copy: they cannot be"
    with pytest.raises(ValidationError, match=expected):
        pairs(Calibration(data(shape=(5, 2))), graph, original)


def test_every_convolution_of_a_real_model_has_a_gram() -> None:
    path = corpus.model_path("squeezenet_fp32up")
    if not path.exists():
        pytest.skip(corpus.ABSENT)
    graph = load(path)
    with session(path, role="original") as running:
        feeds = corpus.sample("squeezenet_fp32up", [spec.name for spec in running.inputs if not spec.optional])
    found = grams(Calibration(Samples(lambda index: feeds, range(1), "test")), graph)
    kernels = {node.inputs[1].name: node.inputs[1].shape for node in graph.nodes if node.op == "Conv"}
    assert found.keys() == kernels.keys()
    assert len(kernels) == 26
    for site, gram in found.items():
        assert gram.matrix.shape == (1, *[np.prod(kernels[site][1:])] * 2)
        eigenvalues = np.linalg.eigvalsh(gram.matrix[0])
        assert eigenvalues[0] >= -1e-5 * eigenvalues[-1]
        assert eigenvalues[-1] > 0


GROWING = """<ir_version: 8, opset_import: ["": 17]> g (float[N, 3] x) => (float[N, 2] y)
    <float[3, 4] first = {1, -2, 3, 4, 5, -6, 1, 2, 3, 4, 5, 6}, float[4, 2] last = {1, 2, 3, 4, 5, 6, 7, 8}>
    { n = Neg(x) h = MatMul(n, first) e = Exp(h) y = MatMul(e, last) }"""


class TestMoreSamples:
    """Those that `varied` makes: for moments alone, after the real ones, where these are too few, and where they do."""

    @staticmethod
    def alike(count: int, scale: float = 1.0, read: list[int] | None = None) -> Samples:
        """Returns samples that tell of themselves: the first column counts them."""

        def load(index: int) -> Feeds:
            if read is not None:
                read.append(index)
            return {"x": np.array([[scale * (index + 1), 1, -1], [0, 0, 2]], np.float32)}

        return Samples(load, range(count), "more")

    @staticmethod
    def both(calibration: Calibration, graph: Graph, edited_first: bool = False) -> list[dict[str, Gram]]:
        """Returns the moments in both ways: alone, and those of now in pairs, the weights rewritten in turn or not."""
        copy = graph.copy()
        found = {weight.site: weight for weight in weights(copy)}
        paired = {}
        for portion in calibration.paired_grams(copy, graph, [[found["first"]], [found["last"]]]):
            for weight, pair in portion:
                paired[weight.site] = pair.now
                if edited_first:
                    weight.constant.values = weight.constant.values * np.float32(0.5)
        return [grams(calibration, graph), paired]

    def test_are_added_to_the_moments_and_to_nothing_else(self) -> None:
        graph, more = load(parser.parse_model(TWO_LAYERS)), self.alike(5)
        calibration = Calibration(data(), varied=lambda given: more)
        assert calibration.count == 3
        assert [values["x"].tolist() for values in calibration.samples(graph, ["x"])] == [feeds["x"].tolist() for feeds in data()]
        rows = np.concatenate([-feeds["x"] for feeds in (*data(), *more)])
        for found in self.both(calibration, graph):
            assert found["first"].count == 16
            np.testing.assert_allclose(found["first"].matrix[0], dense(rows), rtol=1e-5)

    def test_are_made_of_all_samples(self) -> None:
        given: list[Samples] = []
        list(Calibration(data(7), varied=lambda one: [given.append(one), one[:0]][1]).grams(chain(), weights(chain())))
        assert [len(one) for one in given] == [7]

    def test_come_after_the_real_ones(self) -> None:
        read: list[str] = []
        real, more = data(9), self.alike(4)

        def tell(name: str, one: Samples) -> Samples:
            return Samples(lambda index: [read.append(name), one[index]][1], range(len(one)), name)

        graph = chain()
        list(Calibration(tell("real", real), varied=lambda given: tell("more", more)).grams(graph, weights(graph)))
        assert read[-13:] == ["real"] * 9 + ["more"] * 4

    @pytest.mark.parametrize("count", [64, 65, 100])
    def test_are_not_looked_at_where_the_real_ones_do(self, count: int) -> None:
        """64 positions for each of 4 columns, and 64 samples: one more is not even read."""
        read: list[int] = []
        graph = load(parser.parse_model(TWO_LAYERS))
        real = {"x": np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)}
        seen: list[int] = []
        samples = Samples(lambda index: [seen.append(index), real][1], range(count), "test")
        calibration = Calibration(samples, memory=1, varied=lambda given: self.alike(9, read=read))
        alone = {weight.site: gram for weight, gram in calibration.grams(graph, [one for one in weights(graph) if one.site == "last"])}
        assert alone["last"].count == 4 * 64
        assert len(seen) <= 64 + 1  # and the first once more, for its shapes
        assert [gram.count for found in self.both(calibration, graph) for gram in found.values()] == [256] * 5
        assert read == []

    @pytest.mark.parametrize(("count", "positions"), [(63, 100), (64, 3), (200, 1)])
    def test_are_looked_at_where_there_are_too_few(self, count: int, positions: int) -> None:
        read: list[int] = []
        graph = load(parser.parse_model(TWO_LAYERS))
        real = {"x": np.ones((positions, 3), np.float32)}
        samples = Samples(lambda index: real, range(count), "test")
        list(Calibration(samples, varied=lambda given: self.alike(300, read=read)).grams(graph, weights(graph)))
        assert len(read) > 0

    def test_of_a_fold_are_made_of_the_rest_alone(self) -> None:
        def varied(given: Samples) -> Samples:
            return Samples(lambda index: {"x": -given[index]["x"]}, range(len(given)), "more")

        graph = chain()
        rest, fold = Calibration(data(7), varied=varied).fold(1, 3)
        assert (rest.count, fold.count) == (5, 2)
        held = {1, 4}
        fitted = np.concatenate([feeds["x"] for index, feeds in enumerate(data(7)) if index not in held])
        judged = np.concatenate([feeds["x"] for index, feeds in enumerate(data(7)) if index in held])
        np.testing.assert_allclose(grams(rest, graph)["w"].matrix[0], 2 * dense(fitted), rtol=1e-5)
        np.testing.assert_allclose(grams(fold, graph)["w"].matrix[0], dense(judged), rtol=1e-5)  # real ones judge
        inner, _ = rest.fold(0, 5)
        assert grams(inner, graph)["w"].count == 2 * 2 * 4

    @pytest.mark.parametrize("memory", [1, 1 << 30])
    @pytest.mark.parametrize("edited_first", [False, True])
    @pytest.mark.parametrize("count", [1, 5])
    def test_that_lead_to_infinities_are_left_out(self, memory: int, edited_first: bool, count: int) -> None:
        """From the layer on that does not bear them: a stage before may have been rewritten with them."""
        graph, more = load(parser.parse_model(GROWING)), self.alike(count, scale=-1e4)
        given = Calibration(data(), memory=memory, varied=lambda one: more)
        real = Calibration(data(), memory=memory)
        for found, expected in zip(self.both(given, graph, edited_first), self.both(real, graph, edited_first), strict=True):
            assert list(found) == ["first", "last"]
            assert found["last"].count == 6
            np.testing.assert_allclose(found["last"].matrix, expected["last"].matrix, rtol=1e-6)
        assert self.both(given, graph)[1]["first"].count == 6 + 2 * count

    @pytest.mark.parametrize("memory", [1, 1 << 30])
    def test_that_do_not_run_are_left_out(self, memory: int) -> None:
        graph = load(parser.parse_model(TWO_LAYERS))
        bad = Samples(lambda index: {"x": np.ones((2, 5), np.float32)}, range(4), "more")
        for found in self.both(Calibration(data(), memory=memory, varied=lambda one: bad), graph):
            assert [gram.count for gram in found.values()] == [6] * len(found)

    @pytest.mark.parametrize("more", [0, 4])
    def test_do_not_hide_what_is_wrong_with_real_ones(self, more: int) -> None:
        graph = load(parser.parse_model(GROWING))
        calibration = Calibration(self.alike(3, scale=-1e4), varied=lambda given: self.alike(more))
        with pytest.raises(ValidationError, match="must be finite"):
            grams(calibration, graph)
        with pytest.raises(ValidationError, match="must be finite"):
            self.both(calibration, graph)

    @pytest.mark.parametrize("memory", [1, 1 << 30])
    def test_are_looked_at_by_the_portions_that_want_them(self, memory: int) -> None:
        """The first and the last of three have 3 positions for each of 6 columns: after one that wants no more, they are taken up again."""
        text = """<ir_version: 8, opset_import: ["": 17]> g (float[N, 6] x) => (float[N, 2] y) {
            h = MatMul(x, first) e = Tanh(h) m = MatMul(e, mid) r = Relu(m) y = MatMul(r, last) }"""
        rng, model = np.random.default_rng(0), parser.parse_model(text)
        for name, shape in (("first", (6, 1)), ("mid", (1, 6)), ("last", (6, 2))):
            model.graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
        more = data(200, shape=(3, 6))[70:]
        original = load(model)
        read: set[int] = set()
        varied = Samples(lambda index: [read.add(index), more[index]][1], range(130), "more")
        graph = original.copy()
        found = {weight.site: weight for weight in weights(graph)}
        counts: dict[str, int] = {}
        known: list[tuple[str, PairedGram]] = []
        calibration = Calibration(data(64, shape=(3, 6)), memory=memory, varied=lambda given: varied)
        for portion in calibration.paired_grams(graph, original, [[found[name]] for name in ("first", "mid", "last")]):
            for weight, pair in portion:
                counts[weight.site] = pair.now.count
                known.append((weight.site, pair))
                weight.constant.values = weight.constant.values * np.float32(0.5)
            assert len(read) >= 64
        assert counts == {"first": 384, "mid": 192, "last": 384}
        taken = [*data(64, shape=(3, 6)), *varied]
        order = sorted(range(130), key=lambda index: (index * (5**0.5 - 1) / 2) % 1.0)[:64]
        taken = taken[:64] + [taken[64 + index] for index in order]
        x = np.concatenate([feeds["x"] for feeds in taken])
        w = {constant.name: constant.values for constant in original.constants}
        now = np.maximum(np.tanh(x @ w["first"] / 2) @ w["mid"] / 2, 0)
        before = np.maximum(np.tanh(x @ w["first"]) @ w["mid"], 0)
        check_pair(known[-1][1], [(before - now) @ w["last"]], [now])
