"""Budgets: the entropy or the error asked for is what comes out, measured with numpy and with ONNX Runtime on the coded model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from onnxshrink.budget import code_for_rate, code_for_sqnr
from onnxshrink.calibrate import Calibration
from onnxshrink.coding import Coding, code_in_turn
from onnxshrink.contract import Context
from onnxshrink.graph.edit import set_values
from onnxshrink.graph.exporter import to_model
from onnxshrink.graph.files import load
from onnxshrink.graph.ir import Graph
from onnxshrink.graph.weights import Weight, weights
from onnxshrink.inputs import Feeds, Samples
from onnxshrink.numerics.level_choice import step_levels
from onnxshrink.repair import Repaired
from tests import oracle

Array = np.ndarray[Any, np.dtype[Any]]
Coded = tuple[dict[str, Coding], Repaired, list[str]]
SIZES = (40, 56, 48, 64, 24)


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


@cache
def network(seed: int = 0) -> onnx.ModelProto:
    """Returns four layers in a row and two faint ones beside them: they matter very differently."""
    nodes, values, last = [], [], "x"
    for index, (rows, columns) in enumerate(itertools.pairwise(SIZES)):
        weight = normal(rows, columns, seed=seed + index) * np.float32(3.0 ** (1 - index) / np.sqrt(rows))
        bias = normal(columns, seed=seed) * np.float32(0.1 * 3.0 ** (1 - index))
        values += [oracle.value(f"w{index}", weight), oracle.value(f"b{index}", bias)]
        nodes += [helper.make_node("Gemm", [last, f"w{index}", f"b{index}"], [f"h{index}"])]
        nodes += [helper.make_node("Relu", [f"h{index}"], [f"a{index}"])]
        last = f"a{index}"
    values += [oracle.value("faint1", normal(40, 80)), oracle.value("faint2", normal(80, 24))]
    values += [oracle.value("gain", np.float32(2e-5))]
    nodes += [helper.make_node("MatMul", ["x", "faint1"], ["f"]), helper.make_node("MatMul", ["f", "faint2"], ["k"])]
    nodes += [helper.make_node("Mul", ["k", "gain"], ["g"])]
    nodes += [helper.make_node("Add", ["h3", "g"], ["y"])]
    return oracle.make_model(nodes, [oracle.tensor("x", ["n", 40])], [oracle.tensor("y", ["n", 24])], values)


def samples(count: int, seed: int = 100, rows: int = 40) -> list[Feeds]:
    """Returns correlated inputs of one distribution, whatever the seed."""
    mixing = normal(12, 40)
    return [
        {"x": normal(rows, 12, seed=seed + index) @ mixing + 0.3 * normal(rows, 40, seed=seed + index)}
        for index in range(count)
    ]


def calibration(feeds: Sequence[Feeds]) -> Calibration:
    return Calibration(Samples(lambda index: feeds[index], range(len(feeds)), "test"), threads=1)


def operands(graph: Graph) -> list[Weight]:
    return [weight for weight in weights(graph) if weight.obstacle is None]


def coded(
    code: Callable[[Graph, Sequence[Weight], float, Context], Coded],
    amount: float,
    feeds: Sequence[Feeds] | None,
    model: onnx.ModelProto | None = None,
    **more: Any,
) -> tuple[Coded, onnx.ModelProto]:
    """Returns what a budget gives, and the model with the decoded weights and the new biases."""
    graph = load(model or network())
    found = operands(graph)
    result = code(graph, found, amount, Context(activations=calibration(feeds) if feeds else None, **more))
    assert to_model(graph).SerializeToString() == to_model(load(model or network())).SerializeToString()  # left alone
    return result, applied(graph, found, result[0], result[1])


def applied(graph: Graph, found: Sequence[Weight], codings: dict[str, Coding], repaired: Repaired) -> onnx.ModelProto:
    for weight in found:
        if weight.site in codings:
            set_values(weight.constant, codings[weight.site].decoded(weight.constant.dtype))
    for bias, values in repaired.biases.values():
        set_values(bias, values)
    return to_model(graph)


def sqnr(result: onnx.ModelProto, feeds: Sequence[Feeds], model: onnx.ModelProto | None = None) -> float:
    sessions = [oracle.session(one) for one in (model or network(), result)]
    expected, got = (
        np.concatenate([oracle.run(one, feed)[0] for feed in feeds]).astype(np.float64) for one in sessions
    )
    return float(-10 * np.log10(np.sum((got - expected) ** 2) / np.sum(expected**2)))


def entropy(codings: dict[str, Coding]) -> float:
    """Returns bits a weight."""
    total = 0.0
    for coding in codings.values():
        _, counts = np.unique(coding.codes, return_counts=True)
        total -= float(np.sum(counts * np.log2(counts / coding.codes.size)))
    return total / sum(coding.codes.size for coding in codings.values())


@pytest.mark.parametrize("feeds", [None, samples(9)], ids=["alone", "calibrated"])
@pytest.mark.parametrize("bits", [2.0, 2.5, 4.0, 5.5])
def test_the_entropy_asked_for_is_reached(bits: float, feeds: Sequence[Feeds] | None) -> None:
    (codings, _, notes), _ = coded(code_for_rate, bits, feeds)
    assert sorted(codings) == ["faint1", "faint2", "w0", "w1", "w2", "w3"]
    assert entropy(codings) == pytest.approx(bits, abs=0.05)
    assert notes[0].endswith(f"codes of {entropy(codings):.2f} bits entropy a weight")
    for coding in codings.values():
        assert f"entropy {entropy({'': coding}):.2f} bits" in coding.detail


@pytest.mark.parametrize("relative", [False, True], ids=["one step", "in proportion"])
@pytest.mark.parametrize("bits", [2.5, 4.0])
def test_steps_by_sensitivity_beat_equal_steps_of_the_same_entropy(bits: float, relative: bool) -> None:
    feeds, others = samples(9), samples(6, seed=500)
    (codings, _, _), result = coded(code_for_rate, bits, feeds)
    step = 0.3
    for _ in range(5):
        graph = load(network())
        found = operands(graph)

        def levels_of(weight: Weight, rows: Array, _: Any, step: float = step) -> Any:
            size = float(np.sqrt(np.mean(np.square(rows)))) if relative else 1.0
            return step_levels(rows, np.full(len(rows), step * size, np.float32)), ""

        plain, repaired = code_in_turn(graph, found, levels_of, Context(activations=calibration(feeds)))
        step *= 2 ** (entropy(plain) - entropy(codings))
    assert entropy(plain) == pytest.approx(entropy(codings), abs=0.02)
    assert sqnr(result, others) > sqnr(applied(graph, found, plain, repaired), others) + 3


@cache
def aimed_at(decibels: float) -> tuple[Coded, onnx.ModelProto]:
    return coded(code_for_sqnr, decibels, samples(15))


@pytest.mark.parametrize("decibels", [15.0, 25.0, 32.0])
def test_the_sqnr_asked_for_is_reached(decibels: float) -> None:
    feeds = samples(15)
    (codings, _, notes), result = aimed_at(decibels)
    assert len(codings) == 6
    assert notes[1].endswith(f" dB on calibration inputs that took no part in it, aiming at {decibels:g}")
    assert decibels - 0.1 <= sqnr(result, feeds) <= decibels + 2  # they took part
    assert decibels - 0.5 <= sqnr(result, samples(9, seed=500)) <= decibels + 1.5


def test_what_is_said_to_be_reached_is_what_the_coded_model_gives() -> None:
    feeds = samples(4)  # too few to keep some apart: those that steps are tried on are those that weights are fitted to
    (_, _, notes), result = coded(code_for_sqnr, 15.0, feeds)
    reached = float(notes[1].split(" dB")[0])
    assert reached == pytest.approx(sqnr(result, feeds), abs=0.051)
    assert notes[1].endswith(" dB on calibration inputs it was fitted to, aiming at 15")


def test_more_decibels_take_more_bits() -> None:
    rates = [entropy(aimed_at(decibels)[0][0]) for decibels in (15.0, 25.0, 32.0)]
    assert rates[0] + 1 < rates[1] < rates[2] - 0.7


def test_without_data_every_weight_bears_its_share_of_the_error() -> None:
    (codings, repaired, notes), _ = coded(code_for_sqnr, 20.0, None)
    assert not repaired.biases
    assert notes[1] == "no calibration data: steps follow from the weights alone"
    errors = []
    for weight in operands(load(network())):
        values = weight.constant.values.astype(np.float64)
        got = codings[weight.site].decoded(weight.constant.dtype)
        errors.append((np.sum((got - values) ** 2) / np.sum(values**2), values.size))
    assert 10 * np.log10(sum(error for error, _ in errors)) == pytest.approx(-20, abs=0.5)


def test_a_weight_with_an_outlier_makes_no_other_pay_for_it() -> None:
    model = onnx.ModelProto()
    model.CopyFrom(network())
    for tensor in model.graph.initializer:
        if tensor.name == "w1":
            values = onnx.numpy_helper.to_array(tensor).copy()
            values[3, 4] = -100 * np.abs(values).max()  # and the Relu behind it gives zero
            tensor.CopyFrom(oracle.value("w1", values))
    (codings, _, _), result = coded(code_for_sqnr, 30.0, samples(9), model)
    assert {"faint1", "faint2", "w0", "w2", "w3"} <= codings.keys()
    assert 29.0 < sqnr(result, samples(9, seed=500), model) < 31.5  # and the others do not have to pay for it


def test_no_weight_is_coded_where_a_byte_has_too_few_levels_for_all() -> None:
    assert not coded(code_for_sqnr, 95.0, samples(9))[0][0]


@pytest.mark.parametrize(("code", "amount"), [(code_for_rate, 3.0), (code_for_sqnr, 18.0)], ids=["rate", "sqnr"])
def test_threads_change_nothing(code: Any, amount: float) -> None:
    results = []
    for workers in (0, 3):
        if workers:
            with ThreadPoolExecutor(workers) as executor:
                (_, _, notes), result = coded(code, amount, samples(6), executor=executor)
        else:
            (_, _, notes), result = coded(code, amount, samples(6))
        results.append((notes, result.SerializeToString()))
    assert results[0] == results[1]


def test_outputs_that_tell_nothing_are_as_good_as_no_data() -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("ArgMax", ["h"], ["y"], axis=1)]
    model = oracle.make_model(
        nodes,
        [oracle.tensor("x", ["n", 40])],
        [oracle.tensor("y", ["n", 1], onnx.TensorProto.INT64)],
        [oracle.value("w", normal(40, 30))],
    )
    (codings, _, _), _ = coded(code_for_rate, 3.0, samples(6), model)
    assert entropy(codings) == pytest.approx(3, abs=0.1)
    (codings, _, notes), _ = coded(code_for_sqnr, 20.0, samples(6), model)
    assert list(codings) == ["w"]
    assert notes[1] == "the outputs on calibration inputs tell nothing: steps follow from the weights alone"


def test_a_rate_below_what_the_coarsest_steps_leave_is_said_to_be_missed() -> None:
    (codings, _, notes), _ = coded(code_for_rate, 0.5, None)
    assert entropy(codings) > 0.6
    assert notes[1:] == ["0.5 bits a weight were asked for; coarser grids would leave nothing of some layers"]


def test_a_rate_that_bytes_cannot_reach_is_reported() -> None:
    (codings, _, notes), _ = coded(code_for_rate, 8.0, None)
    assert entropy(codings) < 7.9
    assert notes[1:] == ["8 bits a weight were asked for; codes of a byte take no finer grids"]
