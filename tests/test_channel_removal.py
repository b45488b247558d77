"""What a model becomes without some channels: masked and cut models against each other, repaired ones against those that are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

from onnxshrink.calibrate import Calibration
from onnxshrink.channel_removal import LossCurve, loss_curves, mask, repair_helps
from onnxshrink.contract import Context
from onnxshrink.graph.channel_groups import Channels, find_channels
from onnxshrink.graph.channel_readers import Candidate, candidates
from onnxshrink.graph.cutting import cut_channels
from onnxshrink.graph.edit import set_values
from onnxshrink.graph.exporter import to_model
from onnxshrink.graph.files import load
from onnxshrink.graph.ir import Graph
from onnxshrink.graph.weights import weights
from onnxshrink.inputs import Feeds, Samples
from onnxshrink.sensitivity import OutputProbe
from tests import oracle
from tests.graph.channel_oracle import distance, is_averaged
from tests.graph.test_channel_rules import CASES, C, N, S, between, build, linear, positive

Array = np.ndarray[Any, np.dtype[Any]]
NORMALIZED = ["BatchNormalization h s c m v -> n", "Relu n -> r"]
STATISTICS = {"s": (C,), "c": (C,), "m": (C,), "v": positive()}
MODELS = {
    name: CASES[name][0]
    for name in "Relu;Conv in groups;depthwise Conv;ConvTranspose;ConvTranspose in groups;residual sum;squeeze and excite;Concat;Split;Gather;channel shuffle;Flatten;"
    "BatchNormalization;heads;packed heads;LSTM bidirectional;GRU forward;MatMul of several;Gemm, transposed;Gemm, transA;DepthToSpace;Einsum;"
    "MatMul from the left;Pad of channels;GroupNormalization 21".split(";")
}
MODELS["biases"] = between("Relu h -> a", "Conv a wa ba -> r", channels=8, wa=(8, C, 3, 3), ba=(8,))
MODELS["bias in a normalization"] = build(["Conv x w1 -> h", *NORMALIZED, "Conv r w2 -> y"], (N, 4, S, S), w1=(C, 4, 1, 1), w2=(6, C, 3, 3), **STATISTICS)


def feeds_of(model: Any, count: int = 12, seed: int = 0) -> list[Feeds]:
    """Returns inputs whose channels hang together and have means: only then there is something to make up for."""
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    axis = 1 if len(shape) == 4 else -1
    mix = np.random.default_rng(99).standard_normal((shape[axis], shape[axis]))
    drawn = [np.random.default_rng([seed, index]).standard_normal(shape) for index in range(count)]
    return [{"x": np.moveaxis(np.moveaxis(one, axis, -1) @ mix + 0.5, -1, axis).astype(np.float32)} for one in drawn]


def context_of(feeds: Sequence[Feeds] | None) -> Context:
    return Context(activations=Calibration(Samples(lambda index: feeds[index], range(len(feeds)), "test"), threads=1) if feeds else None)


def found(model: Any) -> tuple[Graph, Channels, list[Candidate]]:
    graph = load(model)
    channels = find_channels(graph)
    return graph, channels, candidates(graph, [group for group in channels.groups if group.reason is None and not is_averaged(group)])


def chosen(found_: Sequence[Candidate], seed: int) -> dict[Candidate, Array]:
    """Returns a third of the channels of each group, at random."""
    rng = np.random.default_rng(seed)
    return {one: rng.permutation(one.group.size)[: max(one.group.size // 3, 1)] for one in found_ if one.group.size > 1}


def masked(graph: Graph, gone: Mapping[Candidate, Array], context: Context) -> tuple[onnx.ModelProto, set[str]]:
    """Masks the graph in place; returns the model, and the names of biases that moved."""
    before = to_model(graph).SerializeToString(deterministic=True)
    values, repaired = mask(graph, gone, context)
    assert to_model(graph).SerializeToString(deterministic=True) == before  # the graph is left alone
    by_site = {weight.site: weight.constant for weight in weights(graph)}
    for site, array in values.items():
        assert array.dtype == by_site[site].dtype
        set_values(by_site[site], array)
    for constant, array in repaired.biases.values():
        set_values(constant, array)
    return to_model(graph), {constant.name for constant, _ in repaired.biases.values()}


def outputs(model: onnx.ModelProto, feeds: Sequence[Feeds]) -> list[Array]:
    running = oracle.session(model, optimise=False)
    return [np.stack(values) for values in zip(*(oracle.run(running, one) for one in feeds), strict=True)]


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_a_masked_model_computes_what_it_does_once_cut(name: str, calibrated: bool) -> None:
    model = MODELS[name]
    feeds = feeds_of(model, 6)
    graph, channels, found_ = found(model)
    gone = chosen(found_, 1)
    assert gone
    wide, _ = masked(graph, gone, context_of(feeds if calibrated else None))
    cut_channels(channels, {candidate.group: which for candidate, which in gone.items()})
    narrow = to_model(graph)
    assert distance(outputs(wide, feeds), outputs(narrow, feeds)) < 1e-5
    assert narrow.ByteSize() < wide.ByteSize()


@pytest.mark.parametrize("name", MODELS)
def test_repair_gains_on_the_calibration_inputs(name: str) -> None:
    model = MODELS[name]
    feeds = feeds_of(model)
    expected = outputs(model, feeds)
    graph, channels, found_ = found(model)
    gone = chosen(found_, 1)
    repaired = distance(expected, outputs(masked(graph, gone, context_of(feeds))[0], feeds))
    graph, channels, found_ = found(model)
    cut_channels(channels, {candidate.group: which for candidate, which in chosen(found_, 1).items()})
    assert repaired <= distance(expected, outputs(to_model(graph), feeds)) * (1 + 1e-6)


def test_what_follows_from_what_is_kept_is_made_up_for_altogether() -> None:
    """Half of the channels are mixtures of the others."""
    rng = np.random.default_rng(0)
    half = rng.standard_normal((4, C // 2))
    model = linear("Mul h one -> r", one=np.float32(1))
    model.graph.initializer[0].CopyFrom(oracle.value("w1", np.concatenate([half, half @ rng.standard_normal((C // 2, C // 2))], axis=1), np.float32))
    feeds = feeds_of(model, 40)
    errors = []
    for data in (feeds, None):
        graph, _, (candidate,) = found(model)
        wide, _ = masked(graph, {candidate: np.arange(C // 2, C)}, context_of(data))
        errors.append(distance(outputs(model, feeds), outputs(wide, feeds)))
    graph, channels, (candidate,) = found(model)
    cut_channels(channels, {candidate.group: np.arange(C // 2, C)})
    unrepaired = distance(outputs(model, feeds), outputs(to_model(graph), feeds))
    assert errors[0] < 0.2 * unrepaired  # not 0: there is a ridge, for inputs are few
    assert errors[1] < 0.6 * unrepaired  # a guess from the weights before is drawn towards nothing by more of a ridge


@pytest.mark.parametrize(("name", "moved"), [("biases", {"ba"}), ("Relu", set())])
def test_biases_of_layers_that_read_take_the_mean(name: str, moved: set[str]) -> None:
    feeds = feeds_of(MODELS[name], 8)
    graph, _, found_ = found(MODELS[name])
    assert masked(graph, {found_[0]: np.arange(4)}, context_of(feeds))[1] == moved


def test_without_data_normalizations_tell_the_mean() -> None:
    model = build(["Conv x w1 -> h", *NORMALIZED, "Conv r w2 b2 -> y"], (N, 4, S, S), w1=(C, 4, 1, 1), w2=(6, C, 1, 1), b2=(6,), **STATISTICS)
    graph, _, (candidate,) = found(model)
    wide, moved = masked(graph, {candidate: np.arange(4)}, Context())
    assert moved == {"b2"}
    held = {tensor.name: numpy_helper.to_array(tensor).astype(np.float64) for one in (model, wide) for tensor in one.graph.initializer}
    before = numpy_helper.to_array(next(tensor for tensor in model.graph.initializer if tensor.name == "b2"))
    z = np.random.default_rng(0).standard_normal(200_000)
    means = np.maximum(held["c"][:, None] + np.abs(held["s"])[:, None] * z, 0).mean(axis=1)
    kernel = numpy_helper.to_array(next(tensor for tensor in model.graph.initializer if tensor.name == "w2"))[:, :, 0, 0]
    assert not held["w2"][:, :4].any()
    np.testing.assert_allclose(held["b2"] - before, (kernel - held["w2"][:, :, 0, 0]) @ means, atol=0.01)


def test_a_reader_of_two_groups_loses_both() -> None:
    model = between("Conv x wa -> a", ("Concat h a x -> r", {"axis": 1}), channels=C + 5 + 4, wa=(5, 4, 1, 1))
    graph, _, found_ = found(model)
    values, _ = mask(graph, {found_[0]: np.array([0, 11]), found_[1]: np.array([2])}, context_of(feeds_of(model)))
    zeros = ~values["w2"].any(axis=(0, 2, 3))
    assert list(np.flatnonzero(zeros)) == [0, 11, C + 2]


def test_nothing_goes_nothing_changes() -> None:
    graph, _, found_ = found(MODELS["Relu"])
    values, repaired = mask(graph, {}, context_of(feeds_of(MODELS["Relu"], 2)))
    assert (values, repaired.biases) == ({}, {})
    values, _ = mask(graph, {found_[0]: np.zeros(0, np.intp)}, Context())
    (reader,) = found_[0].readers
    np.testing.assert_array_equal(values["w2"], reader.weight.constant.values)


@pytest.mark.parametrize("calibrated", [True, False])
def test_float16_stays_float16_and_finite(calibrated: bool) -> None:
    """Channels are alike, so what is kept would have to be as large as all there was; beyond 65504 it stays as it was."""
    nodes = [onnx.helper.make_node("MatMul", ["x", "w1"], ["h"]), onnx.helper.make_node("MatMul", ["h", "w2"], ["y"])]
    second = np.stack([np.full(8, 6e4), np.full(8, 100.0)], axis=1).astype(np.float16)
    values = [oracle.value("w1", np.full((4, 8), 1e-3, np.float16)), oracle.value("w2", second)]
    model = oracle.make_model(nodes, [oracle.tensor("x", [9, 4], 10)], [oracle.tensor("y", None, 10)], values)
    feeds = [{"x": (one["x"] / 100).astype(np.float16)} for one in feeds_of(model, 20)]
    graph, _, (candidate,) = found(model)
    new, _ = mask(graph, {candidate: np.arange(4)}, context_of(feeds if calibrated else None))
    assert new["w2"].dtype == np.float16
    assert np.isfinite(new["w2"]).all()
    assert not new["w2"][:4].any()
    np.testing.assert_array_equal(new["w2"][4:, 0], second[4:, 0])
    if calibrated:
        np.testing.assert_allclose(new["w2"][4:, 1].astype(np.float64).mean(), 200.0, rtol=0.15)  # less for the ridge


def test_inputs_that_are_always_zero_are_no_reason_to_fail() -> None:
    model = linear("Sub h h -> r")
    graph, _, found_ = found(model)
    values, _ = mask(graph, {found_[0]: np.arange(4)}, context_of(feeds_of(model, 3)))
    (reader,) = found_[0].readers
    np.testing.assert_array_equal(values["w2"][4:], reader.weight.constant.values[4:])


@pytest.mark.parametrize("zero", [0, 7])
def test_integers_stay_what_they_are(zero: int) -> None:
    """Weights behind DequantizeLinear: what is stored is no matrix to be solved for."""
    rng = np.random.default_rng(0)
    model = build([("DequantizeLinear q s z -> w2", {"axis": 1}), "MatMul x w1 -> h", "MatMul h w2 -> y"], (N, 4), w1=(4, C),
                  q=rng.integers(-9, 9, (C, 6)).astype(np.int8), s=positive(6), z=np.full(6, zero, np.int8))  # fmt: skip
    feeds = feeds_of(model, 8)
    graph, channels, found_ = found(model)
    (candidate,) = (one for one in found_ if one.group.name == "w1")
    wide, _ = masked(graph, {candidate: np.arange(4)}, context_of(feeds))
    new, old = (numpy_helper.to_array(next(tensor for tensor in one.graph.initializer if tensor.name == "q")) for one in (wide, model))
    assert new.dtype == np.int8
    np.testing.assert_array_equal(new[4:], old[4:])
    cut_channels(channels, {candidate.group: np.arange(4)})
    kept = next(tensor for tensor in to_model(graph).graph.initializer if tensor.name == "q")
    np.testing.assert_array_equal(numpy_helper.to_array(kept), old[4:])


# Curves


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20))
def test_scores_add_up_from_the_least_on(scores: list[float]) -> None:
    curve = LossCurve.of(np.array(scores))
    assert curve.losses.shape == (len(scores) + 1,)
    np.testing.assert_allclose(curve.losses, np.concatenate([[0.0], np.cumsum(np.sort(scores))]))
    np.testing.assert_array_equal(np.array(scores)[curve.order], np.sort(scores))


@given(
    scores=st.lists(st.one_of(st.just(0.0), st.floats(1e-9, 1e3)), min_size=3, max_size=20),
    drifts=st.lists(st.one_of(st.floats(1e-14, 1e30)), min_size=3, max_size=3),
)
def test_a_curve_goes_through_what_was_measured(scores: list[float], drifts: list[float]) -> None:
    """And ascends from 0, whatever was expected before: what was thought to be free may turn out not to be."""
    counts = sorted({1, len(scores) // 2 + 1, len(scores)})
    measured = np.maximum.accumulate(drifts[: len(counts)])
    curve = LossCurve.of(np.array(scores)).through(counts, drifts[: len(counts)])
    assert curve.losses[0] == 0
    assert np.isfinite(curve.losses).all()
    assert (np.diff(curve.losses) >= 0).all()
    np.testing.assert_allclose(curve.losses[counts], measured, rtol=1e-6)


def test_between_two_points_a_curve_keeps_its_shape() -> None:
    curve = LossCurve.of(np.arange(1.0, 9.0))
    np.testing.assert_allclose(curve.through([2, 8], [3 * 7.0, 36 * 7.0]).losses, 7 * curve.losses)
    tried = curve.through([4], [1.0])
    np.testing.assert_allclose(tried.losses, curve.losses / 10)
    np.testing.assert_array_equal(tried.order, curve.order)


@pytest.mark.parametrize("repair", [True, False])
def test_curves_are_drifts_on_inputs_held_out(repair: bool) -> None:
    """Of a chain of two products, each with a quarter, half and so on of the channels that it reads gone."""
    model = linear("Relu h -> r", "MatMul r wa -> a", "Tanh a -> b", "MatMul b wb -> c", width=C, wa=(C, 8), wb=(8, C))
    model.graph.node[-1].input[0] = "c"
    fitting, judged = feeds_of(model, 9), feeds_of(model, 5, seed=7)
    graph, _, found_ = found(model)
    orders = [np.random.default_rng(3).permutation(one.group.size) for one in found_]
    before = [LossCurve(order, np.arange(len(order) + 1.0)) for order in orders]
    context = context_of(fitting)
    probe = OutputProbe(graph, Calibration(Samples(lambda index: judged[index], range(5), "test"), threads=1))
    assert context.activations is not None
    curves = loss_curves(graph, found_, before, context, probe, repair)
    grams = {weight.site: moments.shrunk[0] for weight, moments in context.activations.grams(graph, [reader.weight for one in found_ for reader in one.readers])}
    expected = outputs(model, judged)[0].astype(np.float64)
    for candidate, curve, order in zip(found_, curves, orders, strict=True):
        (reader,) = candidate.readers
        for share in (0.125, 0.25, 0.5, 0.75):
            count = round(share * len(order))
            matrix = reader.weight.constant.values.astype(np.float64)
            kept = np.setdiff1d(np.arange(len(order)), order[:count])
            other = np.zeros_like(matrix)
            other[kept] = matrix[kept]
            if repair:
                gram = grams[reader.weight.site]
                part = gram[np.ix_(kept, kept)]
                ridge = 1e-3 * np.diagonal(part).mean() * np.eye(len(kept))
                other[kept] += np.linalg.solve(part + ridge, gram[np.ix_(kept, order[:count])] @ matrix[order[:count]])
            changed = onnx.ModelProto()
            changed.CopyFrom(model)
            next(tensor for tensor in changed.graph.initializer if tensor.name == reader.weight.site).CopyFrom(oracle.value(reader.weight.site, other, np.float32))
            drift = np.square(outputs(changed, judged)[0] - expected).sum() / np.square(expected).sum()
            assert curve.losses[count] >= drift * (1 - 1e-3)  # made ascending
            if curve.losses[count] > curve.losses[count - 1] * 1.5 or count == 1:
                assert curve.losses[count] == pytest.approx(drift, rel=1e-3)


def test_a_group_that_no_weight_reads_is_tried_out_too() -> None:
    """Queries meet keys: what the outputs lose without them must not be taken for nothing."""
    model = build(
        ["MatMul x wq -> q", "MatMul x wk -> k", ("Transpose k -> kt", {"perm": [0, 2, 1]}), "MatMul q kt -> a", ("Softmax a -> p", {"axis": -1}), "MatMul p x -> o", "MatMul o wo -> y"],
        (N, S, 4), wq=(4, C), wk=(4, C), wo=(4, 6),
    )  # fmt: skip
    feeds = feeds_of(model, 6)
    graph, _, found_ = found(model)
    context = context_of(feeds)
    assert context.activations is not None
    before = [LossCurve.of(np.zeros(one.group.size)) for one in found_]
    curves = loss_curves(graph, found_, before, context, OutputProbe(graph, context.activations))
    (queries,) = (curve for one, curve in zip(found_, curves, strict=True) if one.group.name == "wq")
    assert queries.losses[C // 2] > 0


def test_no_groups_no_curves() -> None:
    model = MODELS["Relu"]
    context = context_of(feeds_of(model, 2))
    graph = load(model)
    assert context.activations is not None
    assert loss_curves(graph, [], [], context, OutputProbe(graph, context.activations)) == []


def test_repair_that_moves_outputs_further_is_told() -> None:
    model = MODELS["Relu"]
    feeds = feeds_of(model, 12)
    graph, _, found_ = found(model)
    gone, context = chosen(found_, 1), context_of(feeds)
    values, repaired = mask(graph, gone, context)
    assert repair_helps(graph, gone, values, repaired, context)
    wrong = {site: -3 * array for site, array in values.items()}
    assert not repair_helps(graph, gone, wrong, repaired, context)
    assert repair_helps(graph, gone, wrong, repaired, Context())  # nothing tells
