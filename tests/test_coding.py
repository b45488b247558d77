"""Codings against ONNX Runtime: what a code stands for, bit for bit, and what stays zero."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxshrink.calibrate import Calibration
from onnxshrink.coding import Coding, code_in_turn
from onnxshrink.contract import Context
from onnxshrink.graph.codebook import Codebook, UniformGrid, coded_weight
from onnxshrink.graph.edit import NameSource, replace_constant
from onnxshrink.graph.exporter import to_model
from onnxshrink.graph.files import load
from onnxshrink.graph.tiling import tiling
from onnxshrink.graph.weights import Weight, weights
from onnxshrink.inputs import Feeds, Samples
from onnxshrink.numerics.feedback import feedback, round_with_feedback
from onnxshrink.numerics.grids import fit_grid
from onnxshrink.numerics.level_choice import cell_clusters, cell_grids, cluster_levels, step_levels
from onnxshrink.numerics.levels import GridLevels, RowLevels
from tests import oracle

Array = np.ndarray[Any, np.dtype[Any]]


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def calibration(count: int, *shape: int) -> Calibration:
    feeds: Sequence[Feeds] = [{"x": normal(*shape, seed=10 + index)} for index in range(count)]
    return Calibration(Samples(lambda index: feeds[index], range(count), "test"), threads=1)


def dense(weight: Array) -> onnx.ModelProto:
    """Returns y = x · w in float32, with the weight itself as another output."""
    nodes = [
        helper.make_node("Cast", ["w"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "wide"], ["y"]),
    ]
    kind = helper.np_dtype_to_tensor_dtype(weight.dtype)
    outputs = [oracle.tensor("y", ["n", weight.shape[1]])]
    model = oracle.make_model(nodes, [oracle.tensor("x", ["n", len(weight)])], outputs, [oracle.value("w", weight)])
    model.graph.value_info.append(oracle.tensor("w", list(weight.shape), kind))
    return model


def decoded(model: onnx.ModelProto, coding: Coding) -> Array:
    """Returns what ONNX Runtime makes of the codes of weight w."""
    graph = load(model)
    (constant,) = [weight.constant for weight in weights(graph) if weight.site == "w"]
    fragment = coded_weight(constant, coding.codes, coding.bits, coding.values, graph, NameSource(graph))
    replace_constant(graph, constant, fragment)
    result = to_model(graph)
    onnx.checker.check_model(result, full_check=True)
    result.graph.output.append(onnx.ValueInfoProto(name="w"))
    running = oracle.session(result)
    got: Array = oracle.run(running, oracle.random_feeds(running))[-1]
    return got


def levels_of(kind: str, rows: Array) -> RowLevels:
    each = rows.reshape(1, -1) if kind.endswith("tensor") else rows
    if kind.startswith("k-means"):
        return cluster_levels(each, 16, each=kind == "k-means, channel", scaled=kind == "k-means, scale")
    if kind == "steps":
        return step_levels(each, np.geomspace(0.02, 0.1, len(each)).astype(np.float32))
    return GridLevels(fit_grid(each, 3 if kind == "grid, channel" else 5))


def levels_of_cells(kind: str, cells: Array) -> RowLevels:
    return cell_clusters(cells, 16) if kind == "k-means" else cell_grids(cells, 5)


KINDS = ("k-means, tensor", "k-means, channel", "k-means, scale", "grid, channel", "grid, tensor", "steps")


def code(model: onnx.ModelProto, kind: str, context: Context) -> Coding:
    graph = load(model)
    found = [weight for weight in weights(graph) if weight.site == "w"]
    codings, _ = code_in_turn(graph, found, lambda weight, rows, _: (levels_of(kind, rows), kind), context)
    assert list(codings) == ["w"]
    return codings["w"]


@pytest.mark.parametrize("calibrated", [False, True], ids=["alone", "calibrated"])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_what_codes_stand_for_is_what_onnx_runtime_computes(kind: str, dtype: Any, calibrated: bool) -> None:
    weight = (normal(60, 20) * np.geomspace(0.1, 3, 20)).astype(dtype)
    model = dense(weight)
    coding = code(model, kind, Context(activations=calibration(5, 40, 60) if calibrated else None))
    values = coding.decoded(weight.dtype)
    assert (values.dtype, values.shape) == (weight.dtype, weight.shape)
    assert int(coding.codes.max()) < 2**coding.bits
    assert decoded(model, coding).tobytes() == values.tobytes()
    assert coding.detail.endswith(", error feedback") == calibrated
    error = values.astype(np.float64) - weight.astype(np.float64)
    assert np.linalg.norm(error) < 0.3 * np.linalg.norm(weight.astype(np.float64))


@pytest.mark.parametrize("kind", ["k-means, channel", "k-means, scale", "grid, channel", "steps"])
@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_channels_lie_on_any_axis(kind: str, axis: int) -> None:
    shape = [3, 4, 5, 6]
    along = [size if at == axis else 1 for at, size in enumerate(shape)]
    tile = tuple(1 if at == axis else size for at, size in enumerate(shape))
    rng, channels = np.random.default_rng(0), shape[axis]
    codes = rng.integers(0, 8, shape).astype(np.uint8)
    scale = rng.uniform(0.1, 1, channels).astype(np.float32)
    values: Codebook | UniformGrid
    if kind == "k-means, channel":
        book = np.sort(normal(channels, 8))
        values, expected = Codebook(book, tile), np.empty(shape, np.float32)
        for channel in range(channels):
            place = tuple(channel if at == axis else slice(None) for at in range(4))
            expected[place] = book[channel][codes[place]]
    elif kind == "k-means, scale":
        book = np.sort(normal(8)).astype(np.float16)
        values, expected = Codebook(book, tile, scale), book.astype(np.float32)[codes] * scale.reshape(along)
    else:
        zero_point = np.array([3.0]) if kind == "steps" else rng.integers(0, 8, channels).astype(np.float32)
        values = UniformGrid(scale, zero_point, tile)
        expected = codes.astype(np.float32) - zero_point.astype(np.float32).reshape(
            along if zero_point.size > 1 else ()
        )
        expected = expected * scale.reshape(along)
    got = Coding(codes, 3, values, "").decoded(np.dtype(np.float32))
    np.testing.assert_array_equal(got, expected)


def pruned(share: float, *shape: int) -> Array:
    weight = normal(*shape) + np.float32(0.05)
    weight[np.abs(weight) < np.quantile(np.abs(weight), share)] = 0
    return weight


@pytest.mark.parametrize("calibrated", [False, True], ids=["alone", "calibrated"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
@pytest.mark.parametrize("kind", KINDS)
def test_zeros_of_a_pruned_weight_stay(kind: str, share: float, calibrated: bool) -> None:
    weight = pruned(share, 60, 20)
    values = code(dense(weight), kind, Context(activations=calibration(5, 40, 60) if calibrated else None)).decoded(
        weight.dtype
    )
    assert not values[weight == 0].any()
    assert values.any()


def test_zeros_too_few_for_a_value_of_their_own_are_made_up_for_like_others() -> None:
    """Six zeros in a hundred: the nearest of 16 values takes their place, and the rest of the row knows."""
    weight = pruned(0.06, 60, 20)
    feeds: Sequence[Feeds] = [{"x": normal(400, 6, seed=10) @ normal(6, 60) + np.float32(0.1) * normal(400, 60)}]
    data = Calibration(Samples(lambda index: feeds[index], range(1), "test"), threads=1)
    values = code(dense(weight), "k-means, tensor", Context(activations=data)).decoded(weight.dtype)
    assert values[weight == 0].all()  # no zero among the values
    graph = load(dense(weight))
    ((_, moments),) = data.grams(graph, [one for one in weights(graph) if one.site == "w"])
    levels = levels_of("k-means, tensor", weight.T)
    expected = round_with_feedback(weight.T, feedback(moments.shrunk[0]), levels.snap)
    assert np.mean(values == expected.T.astype(np.float32)) > 0.99  # but for ties


def test_codes_of_one_zero_point_take_no_more_bits_than_they_need() -> None:
    weight = np.clip(normal(60, 20), -1.2, 2.4)
    graph = load(dense(weight))
    found = [one for one in weights(graph) if one.site == "w"]
    step = np.full(20, 0.5, np.float32)
    codings, _ = code_in_turn(graph, found, lambda _, rows, __: (step_levels(rows, step), "steps"), Context())
    coding = codings["w"]
    assert isinstance(coding.values, UniformGrid)
    assert (coding.bits, coding.codes.min(), coding.codes.max()) == (3, 0, 7)  # -2 to 5
    np.testing.assert_array_equal(coding.values.zero_point, [2])
    np.testing.assert_array_equal(coding.decoded(weight.dtype), np.rint(weight / 0.5) * np.float32(0.5))


def test_importance_is_that_of_the_columns_and_none_without_inputs() -> None:
    model, asked = dense(normal(60, 20)), []
    data = calibration(5, 40, 60)

    def levels(weight: Weight, rows: Array, importance: Array | None) -> tuple[RowLevels, str]:
        asked.append((rows, importance))
        return levels_of("grid, channel", rows), ""

    for context in (Context(), Context(activations=data)):
        graph = load(model)
        code_in_turn(graph, [one for one in weights(graph) if one.site == "w"], levels, context)
    for rows, _ in asked:
        np.testing.assert_array_equal(rows, normal(60, 20).T)
    assert asked[0][1] is None
    positions = np.concatenate([values["x"] for values in data.samples(load(model), ["x"])]).astype(np.float64)
    squares = np.sum(positions**2, axis=0)
    np.testing.assert_allclose(
        asked[1][1] - squares, np.mean(asked[1][1] - squares), rtol=1e-4
    )  # the diagonal is raised
    assert asked[1][1].shape == (60,)


@pytest.mark.parametrize("calibrated", [False, True], ids=["alone", "calibrated"])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize(("channels", "block"), [(1, 16), (3, None), (3, 25)])
@pytest.mark.parametrize("kind", ["k-means", "grid"])
def test_codes_of_tiles_are_what_onnx_runtime_computes(
    kind: str, channels: int, block: int | None, dtype: Any, calibrated: bool
) -> None:
    weight = (normal(60, 20) * np.geomspace(0.1, 3, 20)).astype(dtype)
    model = dense(weight)
    graph = load(model)
    found = [one for one in weights(graph) if one.site == "w"]
    context = Context(activations=calibration(5, 40, 60) if calibrated else None)
    tilings = {"w": tiling(found[0], channels, block)}
    codings, _ = code_in_turn(graph, found, lambda _, cells, __: (levels_of_cells(kind, cells), kind), context, tilings)
    coding = codings["w"]
    assert coding.values.tile == (block or 60, channels)
    values = coding.decoded(weight.dtype)
    assert decoded(model, coding).tobytes() == values.tobytes()
    error = values.astype(np.float64) - weight.astype(np.float64)
    assert np.linalg.norm(error) < 0.2 * np.linalg.norm(weight.astype(np.float64))


@pytest.mark.parametrize("kind", ["k-means", "grid"])
def test_error_feedback_uses_the_scale_of_each_block(kind: str) -> None:
    """Blocks that differ tenfold: values stay near what their own block had, and outputs gain by feedback."""
    weight = normal(60, 20) * np.repeat(np.geomspace(0.1, 1, 4), 15)[:, None].astype(np.float32)
    feeds: Sequence[Feeds] = [{"x": normal(400, 6, seed=10) @ normal(6, 60) + np.float32(0.1) * normal(400, 60)}]
    data = Calibration(Samples(lambda index: feeds[index], range(1), "test"), threads=1)
    errors = []
    for context in (Context(), Context(activations=data)):
        graph = load(dense(weight))
        found = [one for one in weights(graph) if one.site == "w"]
        tilings = {"w": tiling(found[0], 1, 15)}
        codings, _ = code_in_turn(graph, found, lambda _, cells, __: (levels_of_cells(kind, cells), kind), context, tilings)
        values = codings["w"].decoded(weight.dtype)
        relative = np.linalg.norm((values - weight).reshape(4, -1), axis=1) / np.linalg.norm(weight.reshape(4, -1), axis=1)
        assert relative.max() < 0.6
        errors.append(float(np.linalg.norm(feeds[0]["x"] @ (values - weight))))
    assert errors[1] < 0.4 * errors[0]


def test_importance_is_that_of_each_block() -> None:
    model, asked = dense(normal(60, 20)), []
    data = calibration(5, 40, 60)

    def levels(weight: Weight, cells: Array, importance: Array | None) -> tuple[RowLevels, str]:
        asked.append((cells, importance))
        return cell_grids(cells, 4, importance), ""

    graph = load(model)
    found = [one for one in weights(graph) if one.site == "w"]
    code_in_turn(graph, found, levels, Context(activations=data), {"w": tiling(found[0], 2, 20)})
    ((_, moments),) = data.grams(graph, found)
    diagonal = np.diagonal(moments.shrunk[0])
    ((cells, importance),) = asked
    for cell, own, counts in zip(range(30), cells, importance, strict=True):
        block = slice(20 * (cell % 3), 20 * (cell % 3) + 20)
        channel = 2 * (cell // 3)
        np.testing.assert_array_equal(own.reshape(2, 20), normal(60, 20).T[channel : channel + 2, block])
        np.testing.assert_array_equal(counts.reshape(2, 20), np.tile(diagonal[block], (2, 1)))


@pytest.mark.parametrize("kind", ["k-means, scale", "steps"])
def test_threads_change_nothing(kind: str) -> None:
    nodes = [helper.make_node("MatMul", ["x", f"w{index}"], [f"h{index}"]) for index in range(4)]
    nodes += [
        helper.make_node("Sum", [f"h{index}" for index in range(4)], ["s"]),
        helper.make_node("MatMul", ["s", "v"], ["y"]),
    ]
    values = [oracle.value(name, normal(24, 24, seed=at)) for at, name in enumerate(["w0", "w1", "w2", "w3", "v"])]
    model = oracle.make_model(nodes, [oracle.tensor("x", ["n", 24])], [oracle.tensor("y", ["n", 24])], values)
    results = []
    for workers in (0, 1, 3):
        executor = ThreadPoolExecutor(workers) if workers else None
        graph = load(model)
        context = Context(activations=calibration(4, 30, 24), executor=executor)
        codings, _ = code_in_turn(graph, weights(graph), lambda weight, rows, _: (levels_of(kind, rows), kind), context)
        results.append(
            {
                site: (coding.codes.tobytes(), coding.decoded(np.dtype(np.float32)).tobytes())
                for site, coding in codings.items()
            }
        )
        if executor is not None:
            executor.shutdown()
    assert results[0] == results[1] == results[2]
    assert sorted(results[0]) == ["v", "w0", "w1", "w2", "w3"]
