"""Portions of a graph: values equal those of a whole run, every node runs once, weights may change in between."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, parser

from onnxshrink import relay
from onnxshrink.errors import ValidationError
from onnxshrink.graph.edit import set_values
from onnxshrink.graph.files import load
from onnxshrink.graph.ir import Constant, Graph
from onnxshrink.inputs import Samples
from onnxshrink.relay import Portion, Relay
from onnxshrink.runtime import session
from tests import oracle

Array = np.ndarray[Any, np.dtype[Any]]
LAYERS, WIDTH, COUNT = 5, 3, 4
AMPLE = 1 << 30


def normal(*shape: int, seed: int) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def data(count: int = COUNT) -> Samples:
    return Samples(lambda index: {"x": normal(2, WIDTH, seed=index)}, range(count), "test")


def network(sources: Sequence[int]) -> onnx.ModelProto:
    """Returns layers h1 = relu(h0 w1), ..., where layer n also adds h of ``sources[n]``, an earlier one: 0 is the input."""
    nodes, values = [], []
    for layer, source in enumerate(sources, 1):
        before = "x" if layer == 1 else f"h{layer - 1}"
        values.append(oracle.value(f"w{layer}", normal(WIDTH, WIDTH, seed=layer)))
        nodes.append(helper.make_node("MatMul", [before, f"w{layer}"], [f"m{layer}"]))
        nodes.append(helper.make_node("Relu", [f"m{layer}"], [f"r{layer}"]))
        nodes.append(helper.make_node("Add", [f"r{layer}", "x" if source == 0 else f"h{source}"], [f"h{layer}"]))
    last = f"h{len(sources)}"
    return oracle.make_model(nodes, [oracle.tensor("x", [2, WIDTH])], [oracle.tensor(last, [2, WIDTH])], values)


def constants(graph: Graph) -> dict[str, Constant]:
    return {constant.name: constant for constant in graph.constants}


def in_turn(graph: Graph) -> list[Portion]:
    """Returns for each layer a portion that asks for its input, after which its weight may change."""
    names = ["x", *(f"h{layer}" for layer in range(1, LAYERS))]
    return [Portion([name], [constants(graph)[f"w{layer}"]]) for layer, name in enumerate(names, 1)]


def whole(graph: Graph, name: str, feeds: Samples) -> list[Array]:
    """Returns the values of a tensor as the graph is now, computed from the inputs."""
    return [values[name] for values in Relay(graph, [Portion([name])], feeds, 1, 0).values(0)]


@given(st.tuples(*(st.integers(0, layer - 1) for layer in range(1, LAYERS + 1))), st.sampled_from([0, 200, AMPLE]), st.booleans())
@settings(max_examples=40)
def test_values_are_those_of_the_graph_as_it_is_by_then(sources: Sequence[int], memory: int, outputs: bool) -> None:
    graph = load(network(sources))
    portions = in_turn(graph)
    if outputs:  # of the layer itself, as they are before its weight changes, and what that is added to: others may need it no more
        portions = [
            Portion([*portion.names, f"m{layer}", f"h{source}" if source else "x"], portion.changed)
            for layer, (source, portion) in enumerate(zip(sources, portions, strict=True), 1)
        ]
    running = Relay(graph, portions, data(), 1, memory)
    for number, portion in enumerate(portions):
        (weight,) = portion.changed
        found = list(running.values(number))
        for name in portion.names:
            np.testing.assert_array_equal(np.stack([values[name] for values in found]), np.stack(whole(graph, name, data())))
        set_values(weight, weight.values * np.float32(0.5) + np.float32(0.25))


def test_every_node_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: Counter[str] = Counter()

    def counting(graph: Graph, *rest: Any) -> Any:
        ran.update(node.outputs[0].name for node in graph.nodes)
        return session(graph, *rest)

    monkeypatch.setattr(relay, "session", counting)
    graph = load(network([0, 0, 1, 2, 3]))
    running = Relay(graph, in_turn(graph), data(), 1, AMPLE)
    for number in range(LAYERS):
        assert len(list(running.values(number))) == COUNT
    assert set(ran.values()) == {1}
    assert set(ran) == {f"{kind}{layer}" for kind in "mrh" for layer in range(1, LAYERS)}
    ran.clear()
    running = Relay(graph, in_turn(graph), data(), 1, 0)  # no memory to hand anything on
    for number in range(LAYERS):
        list(running.values(number))
    assert ran["m1"] == LAYERS - 1


def test_a_portion_that_is_left_early_makes_the_next_one_start_anew() -> None:
    graph = load(network([0] * LAYERS))
    running = Relay(graph, in_turn(graph), data(), 1, AMPLE)
    for number in range(LAYERS):
        values = running.values(number)
        next(values)
        assert running.hands_on == (number not in (0, LAYERS - 1))  # the first needs no node, after the last comes none
        values.close()
    found = [values["h4"] for values in Relay(graph, in_turn(graph), data(), 1, AMPLE).values(4)]
    np.testing.assert_array_equal(found, whole(graph, "h4", data()))


def test_a_tied_weight_that_its_own_input_depends_on() -> None:
    """What depends on a weight is not handed on from the portion after which it changes."""
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[2, 3] x) => (float[2, 3] y) <float[3, 3] w, float[3, 3] v>
        { a = MatMul(x, w) b = Tanh(a) c = MatMul(b, w) d = Tanh(c) y = MatMul(d, v) }"""
    model = parser.parse_model(text)
    for name in "wv":
        model.graph.initializer.append(oracle.value(name, normal(WIDTH, WIDTH, seed=ord(name))))
    graph = load(model)
    w, v = constants(graph)["w"], constants(graph)["v"]
    running = Relay(graph, [Portion(["x", "b"], [w]), Portion(["d"], [v])], data(), 1, AMPLE)
    first = [values["b"] for values in running.values(0)]
    np.testing.assert_array_equal(first, whole(graph, "b", data()))
    set_values(w, w.values * np.float32(-0.5))
    np.testing.assert_array_equal([values["d"] for values in running.values(1)], whole(graph, "d", data()))


def test_bodies_read_what_was_handed_on() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[2, 3] x, bool c) => (float[2, 3] y) <float[3, 3] w, float[3, 3] v>
        { a = Tanh(x) b = MatMul(a, w)
          d = If(c) <then_branch = t () => (float[2, 3] p) { p = Add(a, b) }, else_branch = e () => (float[2, 3] q) { q = Sub(a, b) }>
          y = MatMul(d, v) }"""
    model = parser.parse_model(text)
    for name in "wv":
        model.graph.initializer.append(oracle.value(name, normal(WIDTH, WIDTH, seed=ord(name))))
    graph = load(model)
    feeds = Samples(lambda index: {"x": normal(2, 3, seed=index), "c": np.array(index % 2 == 0)}, range(COUNT), "test")
    running = Relay(graph, [Portion(["a"], [constants(graph)["w"]]), Portion(["d"])], feeds, 1, AMPLE)
    list(running.values(0))
    set_values(constants(graph)["w"], normal(WIDTH, WIDTH, seed=9))
    np.testing.assert_array_equal([values["d"] for values in running.values(1)], whole(graph, "d", feeds))


def test_what_is_no_tensor_is_not_handed_on_but_computed_again() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[2, 3] x) => (float[2, 3] y) <float[3, 3] w, int64 one = {1}>
        { t = Tanh(x) s = SplitToSequence<axis = 0>(t) m = MatMul(t, w) p = SequenceAt(s, one) y = Add(m, p) }"""
    model = parser.parse_model(text)
    model.graph.initializer.append(oracle.value("w", normal(WIDTH, WIDTH, seed=1)))
    graph = load(model)
    running = Relay(graph, [Portion(["t", "p"], [constants(graph)["w"]]), Portion(["y"])], data(), 1, AMPLE)
    list(running.values(0))
    np.testing.assert_array_equal([values["y"] for values in running.values(1)], whole(graph, "y", data()))
    running = Relay(graph, [Portion(["s"])], data(), 1, AMPLE)
    with pytest.raises(ValidationError, match=r"^calibration: 's' has no value: it is not a tensor$"):
        list(running.values(0))
