"""Trials: work as ONNX Runtime's profile tells it, and a ratio of latencies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper, parser

from onnxshrink import trials
from onnxshrink.graph.files import load
from onnxshrink.inputs import Samples
from onnxshrink.latency import LatencyReport, Spread
from onnxshrink.trials import SampleTrials
from tests import oracle
from tests.graph.test_channel_rules import C, N, S, build, linear


def samples(**arrays: Any) -> Samples:
    return Samples(lambda _: arrays, range(1), "test")


def test_work_is_that_of_the_sample() -> None:
    graph = load(linear("Relu h -> r", shape=("n", "m", 4)))
    for rows in (1, 7):
        found = SampleTrials(samples(x=np.zeros((2, rows, 4), np.float32))).macs(graph)
        assert found == {id(graph.nodes[0]): 2 * rows * 4 * C, id(graph.nodes[2]): 2 * rows * C * 6}  # and none of Relu


def test_work_in_a_loop_counts_each_time() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[3, 4] x) => (float[3, 4] y) {
        n = Constant<value = int64 {5}>() c = Constant<value = bool {1}>()
        y = Loop(n, c, x) <body = b (int64 i, bool go, float[3, 4] a) => (bool on, float[3, 4] z) { on = Identity(go) z = MatMul(a, w) }>
    }"""
    model = parser.parse_model(text)
    model.graph.initializer.append(oracle.value("w", np.eye(4, dtype=np.float32)))
    graph = load(model)
    found = SampleTrials(samples(x=np.zeros((3, 4), np.float32))).macs(graph)
    assert list(found.values()) == [5 * 3 * 4 * 4]
    assert not {id(node) for node in graph.nodes} & set(found)


def test_a_branch_that_is_not_taken_does_no_work() -> None:
    bodies = [helper.make_graph([helper.make_node("MatMul", ["x", "w"], [f"{name}_y"])], name, [], [oracle.tensor(f"{name}_y", [3, 4])]) for name in ("yes", "no")]
    node = helper.make_node("If", ["flag"], ["y"], then_branch=bodies[0], else_branch=bodies[1])
    inputs = [oracle.tensor("x", [3, 4]), oracle.tensor("flag", [], 9)]
    graph = load(oracle.make_model([node], inputs, [oracle.tensor("y", None)], [oracle.value("w", np.eye(4, dtype=np.float32))]))
    found = SampleTrials(samples(x=np.zeros((3, 4), np.float32), flag=np.array(True))).macs(graph)
    assert list(found.values()) == [3 * 4 * 4]


def test_of_a_model_that_does_not_run_nothing_is_known() -> None:
    wrong = SampleTrials(samples(x=np.zeros((2, 3, 5), np.float32)))
    assert wrong.macs(load(linear("Relu h -> r"))) is None
    assert wrong.shapes(load(linear("Relu h -> r"))) == {}


def test_latency_is_the_median_of_pairs_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def bench(before: Any, after: Any, data: Samples, *, seconds: float) -> LatencyReport:
        asked.append((before, after, data, seconds))
        return LatencyReport(Spread(2, 1, 3), Spread(1, 1, 1), Spread(0.4, 0.3, 0.9), 0.0, 0.0, 9, 1)

    monkeypatch.setattr(trials, "bench", bench)
    before, after = load(linear("Relu h -> r")), load(linear("Sigmoid h -> r"))
    data = samples(x=np.zeros((N, S, 4), np.float32))
    assert SampleTrials(data, 0.5).latency_ratio(before, after) == 0.4
    assert asked == [(before, after, data, 0.5)]


def test_a_graph_can_be_timed_against_itself() -> None:
    graph = load(linear("Relu h -> r"))
    ratio = SampleTrials(samples(x=np.zeros((N, S, 4), np.float32)), 0.0).latency_ratio(graph, graph.copy())
    assert ratio > 0


def test_shapes_are_those_of_the_sample() -> None:
    graph = load(linear("Relu h -> r", shape=("n", "m", 4)))
    found = SampleTrials(samples(x=np.zeros((2, 7, 4), np.float32))).shapes(graph)
    assert found == {"h": (2, 7, C), "r": (2, 7, C), "y": (2, 7, 6)}


WIDE = 384
THICK = build(["MatMul x w1 -> h", "Relu h -> r", "MatMul r w2 -> y"], (64, WIDE), w1=(WIDE, WIDE), w2=(WIDE, WIDE))
THIN = build(["MatMul x w1 -> h", "Relu h -> r", "MatMul r v -> t", "MatMul t w2 -> y"], (64, WIDE), w1=(WIDE, WIDE), v=(WIDE, 2), w2=(2, WIDE))
FED = {"x": np.random.default_rng(0).standard_normal((64, WIDE)).astype(np.float32)}


@pytest.mark.parametrize("inputs", [["r"], ["h"]], ids=["of a tensor", "of one before"])
def test_a_part_with_less_work_takes_less_time(inputs: list[str]) -> None:
    """2/192 of the work: whatever the machine does beside, one side is far from the other. The part's inputs are computed by the graph."""
    subject = SampleTrials(samples(**FED))
    assert subject.part_ratio(load(THICK), load(THIN), inputs, ["y"]) < 0.8
    assert subject.part_ratio(load(THIN), load(THICK), inputs, ["y"]) > 1.25


def test_a_part_may_begin_with_an_input_of_the_model() -> None:
    """And with what the model computes from it, at the same time."""
    subject, model = SampleTrials(samples(**FED)), build(["MatMul x w1 -> h", "Add h x -> y"], (64, WIDE), w1=(WIDE, WIDE))
    thin = build(["MatMul x v -> t", "MatMul t w1 -> h", "Add h x -> y"], (64, WIDE), v=(WIDE, 2), w1=(2, WIDE))
    assert subject.part_ratio(load(model), load(thin), ["x"], ["h"]) < 0.8
    assert subject.part_ratio(load(model), load(thin), ["x"], ["y"]) < 1
    assert 0 < subject.part_ratio(load(model), load(thin), ["h", "x"], ["y"]) < float("inf")


def test_only_the_part_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the values that the model computes on the first sample, nothing before them and nothing after."""
    asked: list[tuple[Any, Any, Samples, float]] = []

    def bench(before: Any, after: Any, data: Samples, *, seconds: float) -> LatencyReport:
        asked.append((before, after, data, seconds))
        return LatencyReport(Spread(2, 1, 3), Spread(1, 1, 1), Spread(0.4, 0.3, 0.9), 0.0, 0.0, 9, 1)

    monkeypatch.setattr(trials, "bench", bench)
    before, after = load(THICK), load(THIN)
    assert SampleTrials(samples(**FED)).part_ratio(before, after, ["h"], ["r"]) == 0.4
    ((first, second, data, _),) = asked
    for part in (first, second):
        assert [node.op for node in part.nodes] == ["Relu"]
        assert [tensor.name for tensor in part.inputs] == ["h"]
        assert [tensor.name for tensor in part.outputs] == ["r"]
    weight = next(constant.values for constant in before.constants if constant.name == "w1")
    (found,) = data[0].values()
    np.testing.assert_allclose(found, FED["x"] @ weight, rtol=0, atol=1e-4)
    assert len(data) == 1


def test_a_part_that_does_not_run_takes_forever() -> None:
    wrong = build(["MatMul x w1 -> h", "Relu h -> r", "MatMul r w2 -> y"], (64, WIDE), w1=(WIDE, WIDE), w2=(WIDE + 1, WIDE))
    subject = SampleTrials(samples(**FED))
    assert subject.part_ratio(load(THICK), load(wrong), ["r"], ["y"]) == float("inf")
    assert subject.part_ratio(load(wrong), load(THICK), ["r"], ["y"]) == float("inf")
    other = SampleTrials(samples(x=FED["x"][:, 1:]))
    assert other.part_ratio(load(THICK), load(THIN), ["r"], ["y"]) == float("inf")
