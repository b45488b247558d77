"""Plans: what rounding a layer costs, measured; against the drift of outputs that ONNX Runtime gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, parser

from onnxshrink import allocation
from onnxshrink.allocation import Plan, plan
from onnxshrink.calibrate import Calibration
from onnxshrink.contract import Context
from onnxshrink.graph.exporter import to_model
from onnxshrink.graph.files import load
from onnxshrink.graph.weights import weights
from onnxshrink.inputs import Feeds, Samples
from onnxshrink.numerics.level_choice import MOST_STEPS, relative_scales
from onnxshrink.numerics.rates import Layer, predicted_bits, rounded_entropy, steps_for_error
from onnxshrink.sensitivity import OutputProbe
from tests import oracle

Array = np.ndarray[Any, np.dtype[Any]]
WIDTH = 24


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def samples(count: int = 4) -> list[Feeds]:
    return [{"x": normal(40, WIDTH, seed=10 + index)} for index in range(count)]


def layers(gains: dict[str, float], size: float = 1.0) -> onnx.ModelProto:
    """Returns y = Σ gain · x · W over the names: an error in W counts in proportion to its gain."""
    nodes, values = [], []
    for seed, (name, gain) in enumerate(gains.items()):
        values += [oracle.value(name, normal(WIDTH, WIDTH, seed=seed) * np.float32(size))]
        values += [oracle.value(f"{name}_gain", np.float32(gain))]
        nodes.append(helper.make_node("MatMul", ["x", name], [f"{name}_h"]))
        nodes.append(helper.make_node("Mul", [f"{name}_h", f"{name}_gain"], [f"{name}_y"]))
    nodes.append(helper.make_node("Sum", [f"{name}_y" for name in gains], ["y"]))
    return oracle.make_model(nodes, [oracle.tensor("x", ["n", WIDTH])], [oracle.tensor("y", ["n", WIDTH])], values)


def bits_at_20_db(found: list[Layer]) -> tuple[float, float]:
    return predicted_bits(found, steps_for_error(found, 0.01)), 0.0


def planned(
    model: onnx.ModelProto, feeds: Sequence[Feeds] | None, *, probed: bool = True, **more: Any
) -> dict[str, Plan]:
    graph = load(model)
    data = Calibration(Samples(lambda index: feeds[index], range(len(feeds)), "test"), threads=1) if feeds else None
    probe = OutputProbe(graph, data) if data is not None and probed else None
    found = [weight for weight in weights(graph) if weight.obstacle is None]
    plans = plan(graph, found, [(Context(activations=data, **more), probe)], bits_at_20_db)
    assert [item.weight for item in plans] == found
    assert to_model(graph).SerializeToString() == to_model(load(model)).SerializeToString()  # the graph is left alone
    return {item.weight.site: item for item in plans}


@given(
    rows=st.integers(1, 6),
    seed=st.integers(0, 1000),
    empty=st.integers(0, 3),
    exponent=st.integers(-30, 30),
)
def test_scales_are_roots_of_rms_with_a_geometric_mean_of_one(rows: int, seed: int, empty: int, exponent: int) -> None:
    matrix = normal(rows, 5, seed=seed).astype(np.float64) * 10.0**exponent * np.geomspace(1, 100, rows)[:, None]
    matrix[:empty] = 0
    scales = relative_scales(matrix)
    used = matrix.any(axis=1)
    assert scales.dtype == np.float32
    np.testing.assert_allclose(np.exp(np.mean(np.log(scales, dtype=np.float64))), 1, rtol=1e-5)
    np.testing.assert_array_equal(scales[~used], 1)
    if used.any():
        rms = np.sqrt(np.mean(matrix[used] ** 2, axis=1))
        np.testing.assert_allclose((scales[used] / scales[used][0]) ** 2, rms / rms[0], rtol=1e-5)


def test_costs_are_quadratic_in_the_step_whatever_step_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = []
    for tried in (0.125, 0.25, 0.5):
        monkeypatch.setattr(allocation, "_PROBED_STEP", tried)
        costs.append([item.layer.cost for item in planned(layers({"a": 1.0, "b": 3.0}), samples()).values()])
    np.testing.assert_allclose(costs, np.broadcast_to(np.mean(costs, axis=0), np.shape(costs)), rtol=0.1)


def test_costs_are_the_drift_that_plain_rounding_gives_by_hand() -> None:
    """Without a Gram matrix, here of a table, the nearest level is taken, and all can be done again in numpy."""
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]> g (int64[N] x) => (float[N, 6] y)
        { y = Gather(table, x) }""")
    table = normal(40, 6) * np.geomspace(0.3, 3, 40).astype(np.float32)[:, None]
    model.graph.initializer.append(oracle.value("table", table))
    feeds = [{"x": np.arange(40)}]
    item = planned(model, feeds)["table"]
    relative = table / item.scales[:, None]
    step = 0.5 * np.sqrt(np.mean(relative.astype(np.float64) ** 2))
    steps = (step * item.scales)[:, None]
    drift = np.sum((np.rint(table / steps) * steps - table) ** 2) / np.sum(table.astype(np.float64) ** 2)
    assert item.layer.cost == pytest.approx(drift / step**2, rel=1e-3)


def test_layers_are_ranked_by_what_they_do_to_the_outputs() -> None:
    gains = {"a": 3.0, "b": 1.0, "c": 10.0, "d": 0.1}
    plans = planned(layers(gains), samples())
    costs = {name: plans[name].layer.cost for name in gains}
    assert sorted(gains, key=lambda name: costs[name]) == ["d", "b", "a", "c"]
    for name, gain in gains.items():  # in proportion to the squared gain: the weights are alike
        assert costs[name] / costs["b"] == pytest.approx(gain**2, rel=0.25)


def test_costs_are_of_relative_error_and_of_a_step_of_one() -> None:
    """With weights ten times as large, the same step is ten times as fine."""
    small, large = (planned(layers({"a": 1.0, "b": 2.0}, size), samples()) for size in (1.0, 10.0))
    for name in "ab":
        assert large[name].layer.cost == pytest.approx(small[name].layer.cost / 100, rel=1e-2)


def test_error_feedback_makes_a_layer_cheaper() -> None:
    """Inputs of few directions: feedback puts errors where they do not count."""
    mixed = [{"x": normal(40, 4, seed=index) @ normal(4, WIDTH)} for index in range(4)]
    model = layers({"a": 1.0, "b": 2.0})
    calibrated = planned(model, mixed)
    graph = load(model)
    data = Calibration(Samples(lambda index: mixed[index], range(4), "test"), threads=1)
    plain = plan(graph, weights(graph), [(Context(), OutputProbe(graph, data))], bits_at_20_db)
    for item in plain:
        assert calibrated[item.weight.site].layer.cost < 0.3 * item.layer.cost


@pytest.mark.parametrize("feeds", [None, samples()], ids=["no data", "no probe"])
def test_without_a_probe_costs_are_unknown(feeds: Sequence[Feeds] | None) -> None:
    plans = planned(layers({"a": 1.0, "b": 2.0}), feeds, probed=False)
    assert [item.layer.cost for item in plans.values()] == [None, None]


def test_values_and_bounds_are_in_units_of_the_scales() -> None:
    plans = planned(layers({"a": 1.0, "b": 2.0}), None)
    for item in plans.values():
        rows = item.weight.constant.values.T.astype(np.float64)
        relative = rows / item.scales[:, None]
        assert item.layer.size == rows.size
        np.testing.assert_allclose(np.sort(item.layer.values), np.sort(relative.reshape(-1)), rtol=1e-6)
        assert item.layer.finest == pytest.approx(np.abs(relative).max() / MOST_STEPS)
        steps = np.rint(rows / (0.3 * item.scales[:, None]))
        _, counts = np.unique(steps, return_counts=True)
        entropy = float(-np.sum(counts / steps.size * np.log2(counts / steps.size)))
        assert rounded_entropy(item.layer.values, 0.3) == pytest.approx(entropy, abs=0.02)


def test_a_layer_that_ruins_the_outputs_has_no_cost_to_go_by() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[N, 24] x) => (float[N, 24] y)
        { h = MatMul(x, w) s = Mul(h, h) l = Sub(s, k) r = Sqrt(l) y = Identity(r) }"""
    model = parser.parse_model(text)
    feeds = samples(1)
    square = (feeds[0]["x"] @ normal(24, 24)) ** 2
    model.graph.initializer.extend(
        [oracle.value("w", normal(24, 24)), oracle.value("k", (square * (1 - 1e-3)).astype(np.float32))]
    )
    assert planned(model, feeds)["w"].layer.cost is None  # roots of negative numbers


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [1e-44, 1e-40, 1e-30, 1e30, 3e36])
def test_extreme_sizes_do_no_harm(size: float) -> None:
    model = layers({"a": 1.0, "b": 1.0})
    tiny = (normal(WIDTH, WIDTH) * size).astype(np.float32)
    model.graph.initializer[0].CopyFrom(oracle.value("a", tiny))
    item = planned(model, samples())["a"]
    assert np.isfinite(item.scales).all()
    assert (item.scales > 0).all()
    assert item.layer.finest > 0


def test_weights_of_zeros_have_a_plan_too() -> None:
    model = layers({"a": 1.0, "b": 1.0})
    model.graph.initializer[0].CopyFrom(oracle.value("a", np.zeros((WIDTH, WIDTH), np.float32)))
    item = planned(model, samples())["a"]
    np.testing.assert_array_equal(item.scales, 1)
    assert item.layer.cost == 0.0
    assert item.layer.finest > 0


def test_progress_is_told_of_every_weight() -> None:
    told = []
    planned(layers({"a": 1.0, "b": 1.0}), samples(), progress=lambda *done: told.append(done))
    assert told == [(1, 2), (2, 2)]


@pytest.mark.parametrize(("normalised", "exponent"), [(True, 1.0), (False, 0.5)])
def test_steps_go_with_the_power_of_the_rms_that_takes_fewer_bits(normalised: bool, exponent: float) -> None:
    """Behind a normalisation all channels matter alike, relative to their size; without one all errors do."""
    rms = np.geomspace(0.01, 10, WIDTH).astype(np.float32)
    weight = normal(WIDTH, WIDTH) * rms
    gain = 1 / rms if normalised else np.ones_like(rms)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Mul", ["h", "gain"], ["y"])]
    model = oracle.make_model(
        nodes,
        [oracle.tensor("x", ["n", WIDTH])],
        [oracle.tensor("y", ["n", WIDTH])],
        [oracle.value("w", weight), oracle.value("gain", gain.astype(np.float32))],
    )
    plans = planned(model, samples())
    np.testing.assert_array_equal(plans["w"].scales, relative_scales(weight.T, exponent))
