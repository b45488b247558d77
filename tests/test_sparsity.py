"""How many zeros each layer gets and what is left of it, against numpy by hand and ONNX Runtime on inputs that were held out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, parser

from onnxshrink.calibrate import Calibration
from onnxshrink.contract import Context
from onnxshrink.errors import OptionError
from onnxshrink.graph.edit import set_values
from onnxshrink.graph.exporter import to_model
from onnxshrink.graph.files import load
from onnxshrink.graph.ir import Graph
from onnxshrink.graph.weights import weights
from onnxshrink.inputs import Feeds, Samples
from onnxshrink.numerics.patterns import Pattern
from onnxshrink.sparsity import Scope, Target, curves, removed_shares, sparsify_alone, sparsify_in_turn
from tests import oracle

Array = np.ndarray[Any, np.dtype[Any]]
PLAIN = Pattern.parse("unstructured")


def normal(*shape: int, seed: int = 0, dtype: Any = np.float32) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def correlated(count: int, *shape: int, seed: int = 5, dtype: Any = np.float32) -> list[Feeds]:
    """Returns inputs whose channels, along axis 1, hang together and have means: only then there is something to make up for."""
    rng = np.random.default_rng([99, *shape])
    mix, mean = rng.standard_normal((shape[1], shape[1])) * np.geomspace(1, 0.05, shape[1]), rng.standard_normal(shape[1])
    feeds = []
    for index in range(count):
        drawn = np.random.default_rng([seed, index]).standard_normal((shape[0], *shape[2:], shape[1]))
        feeds.append({"x": np.moveaxis(drawn @ mix.T + mean, -1, 1).astype(dtype)})
    return feeds


def calibration(feeds: Sequence[Feeds]) -> Calibration:
    return Calibration(Samples(lambda index: feeds[index], range(len(feeds)), "test"), threads=1)


def model_of(nodes: Sequence[onnx.NodeProto], shape: Sequence[int], arrays: dict[str, Array]) -> onnx.ModelProto:
    values = [oracle.value(name, array) for name, array in arrays.items()]
    kind = helper.np_dtype_to_tensor_dtype(next(iter(arrays.values())).dtype)
    return oracle.make_model(nodes, [oracle.tensor("x", list(shape), kind)], [oracle.tensor("y", None, kind)], values)


def chain(*matrices: Array, rows: int = 8) -> onnx.ModelProto:
    """Returns x·w0·w1·..., with Relu between."""
    nodes, at = [], "x"
    for index in range(len(matrices)):
        last = index == len(matrices) - 1
        nodes.append(helper.make_node("MatMul", [at, f"w{index}"], ["y" if last else f"h{index}"]))
        if not last:
            nodes.append(helper.make_node("Relu", [f"h{index}"], [f"r{index}"]))
            at = f"r{index}"
    return model_of(nodes, (rows, len(matrices[0])), {f"w{index}": matrix for index, matrix in enumerate(matrices)})


def targets_of(graph: Graph, pattern: Pattern = PLAIN, **options: Any) -> list[Target]:
    return [Target(weight, pattern, **options) for weight in weights(graph) if weight.obstacle is None and weight.computes]


def outputs(model: onnx.ModelProto, feeds: Sequence[Feeds]) -> Array:
    running = oracle.session(model, optimise=False)
    return np.stack([oracle.run(running, one)[0] for one in feeds]).astype(np.float64)


def drift(original: onnx.ModelProto, changed: onnx.ModelProto, feeds: Sequence[Feeds]) -> float:
    expected, got = outputs(original, feeds), outputs(changed, feeds)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def sparse(
    model: onnx.ModelProto, shares: float | Sequence[Sequence[float]], feeds: Sequence[Feeds] | None, alone: bool = False, **options: Any
) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """Returns the pruned model, biases and all, and the new weights."""
    graph = load(model)
    targets = targets_of(graph, **options)
    schedule = [[shares] * len(targets)] if isinstance(shares, float) else shares
    context = Context(activations=calibration(feeds) if feeds is not None else None)
    before = to_model(graph).SerializeToString()
    if alone:
        values: dict[str, Array] = sparsify_alone(graph, targets, schedule[-1], context)
    else:
        values, repaired = sparsify_in_turn(graph, targets, schedule, context)
    assert to_model(graph).SerializeToString() == before  # the graph is left alone
    for target in targets:
        set_values(target.weight.constant, values[target.weight.site])
    if not alone:
        for bias, shifted in repaired.biases.values():
            set_values(bias, shifted)
    return to_model(graph), values


# How many zeros each layer gets


@pytest.mark.parametrize("scope", ["layer", "global", "erk", "sensitivity"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("data", [False, True])
def test_shares_add_up_to_what_was_asked_for(scope: Scope, share: float, data: bool) -> None:
    model = chain(normal(8, 16), normal(16, 6, seed=1), normal(6, 4, seed=2))
    graph = load(model)
    context = Context(activations=calibration(correlated(6, 8, 8)) if data else None)
    targets = targets_of(graph)
    shares = removed_shares(graph, targets, scope, share, context)
    sizes = [target.weight.constant.size for target in targets]
    assert np.dot(shares, sizes) == pytest.approx(share * sum(sizes), abs=1e-6)
    assert all(0 <= one <= 1 for one in shares)
    values = sparsify_alone(graph, targets, shares, context)
    zeros = sum(int(np.count_nonzero(array == 0)) for array in values.values())
    assert share * sum(sizes) - len(sizes) < zeros <= share * sum(sizes) + 1e-6  # each layer rounds down


def test_no_layers_no_shares() -> None:
    graph = load(chain(normal(4, 4)))
    assert removed_shares(graph, [], "sensitivity", 0.5, Context()) == []
    assert sparsify_in_turn(graph, [], [[]], Context())[0] == {}
    assert sparsify_alone(graph, [], [], Context()) == {}


def test_bounds_hold_and_others_make_up_the_total() -> None:
    graph = load(chain(*(normal(10, 10, seed=index) for index in range(3)), rows=3))
    bounds = [(0.0, 0.2), (0.7, 1.0), (0.0, 1.0)]
    for scope in ("layer", "global", "erk", "sensitivity"):
        targets = [
            dataclasses.replace(target, least=least, most=most)
            for target, (least, most) in zip(targets_of(graph), bounds, strict=True)
        ]
        shares = removed_shares(graph, targets, scope, 0.5, Context())  # type: ignore[arg-type]
        assert sum(shares) == pytest.approx(1.5)
        assert shares[0] <= 0.2 + 1e-9
        assert shares[1] >= 0.7 - 1e-9
    with pytest.raises(OptionError, match="between"):
        removed_shares(graph, [dataclasses.replace(target, least=0.0, most=0.4) for target in targets], "erk", 0.5, Context())


def test_one_line_of_all_weights_by_lamp_or_by_magnitude() -> None:
    matrices = [normal(12, 10), 10 * normal(10, 14, seed=1), 0.1 * normal(14, 6, seed=2)]
    graph = load(chain(*matrices))

    def lamp(matrix: Array) -> Array:
        squares = np.square(matrix.astype(np.float64)).ravel()
        return np.array([square / squares[squares >= square].sum() for square in squares])

    for criterion, score in ((None, lamp), ("magnitude", lambda matrix: np.abs(matrix).ravel())):
        scores = [score(matrix) for matrix in matrices]
        threshold = np.sort(np.concatenate(scores))[172]  # half of 344
        expected = [float(np.mean(part < threshold)) for part in scores]
        shares = removed_shares(graph, targets_of(graph, criterion=criterion), "global", 0.5, Context())
        np.testing.assert_allclose(shares, expected, atol=1e-9)


def test_shapes_alone_decide_by_erdos_renyi_kernel() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["h"]),
        helper.make_node("ConvTranspose", ["h", "b"], ["y"], group=2),
    ]
    graph = load(model_of(nodes, (1, 6, 5, 5), {"a": normal(8, 6, 3, 3), "b": normal(8, 5, 2, 2)}))
    shares = removed_shares(graph, targets_of(graph), "erk", 0.5, Context())
    kept = np.array([sum((8, 6, 3, 3)) / (8 * 6 * 9), sum((10, 4, 2, 2)) / (10 * 4 * 4)])  # (out, in of a group, kernel)
    sizes = np.array([432, 160])
    scaled = kept * 296 / float(kept @ sizes)
    assert (scaled <= 1).all()
    np.testing.assert_allclose(shares, 1 - scaled, atol=1e-9)


def test_layers_that_do_not_matter_get_more_zeros() -> None:
    """One of two branches of equal weights hardly reaches the output."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("MatMul", ["x", "v"], ["k"]),
        helper.make_node("Mul", ["k", "little"], ["m"]),
        helper.make_node("Add", ["h", "m"], ["y"]),
    ]
    arrays = {"w": normal(12, 12), "v": normal(12, 12, seed=1), "little": np.float32(0.02)}
    graph = load(model_of(nodes, (6, 12), arrays))
    context = Context(activations=calibration(correlated(9, 6, 12)))
    for repair in (True, False):
        important, idle = removed_shares(graph, targets_of(graph), "sensitivity", 0.4, context, repair)
        assert important < 0.1
        assert idle > 0.7
    assert removed_shares(graph, targets_of(graph), "layer", 0.4, context) == pytest.approx([0.4, 0.4])


@pytest.mark.parametrize("repair", [True, False])
def test_curves_are_drifts_of_the_outputs_on_inputs_held_out(repair: bool) -> None:
    model, feeds = chain(normal(10, 12), normal(12, 5, seed=1), rows=6), correlated(9, 6, 10)
    graph = load(model)
    targets = targets_of(graph, criterion="magnitude")
    found = curves(graph, targets, [0.25, 0.5], Context(activations=calibration(feeds)), repair)
    fitting, judged = [one for index, one in enumerate(feeds) if index % 3], feeds[::3]
    for which, target in enumerate(targets):
        matrix = target.weight.layout.forward(target.weight.constant.values)
        for at, sparsity in enumerate((0.25, 0.5)):
            kept = np.abs(matrix) > np.sort(np.abs(matrix).ravel())[int(sparsity * matrix.size) - 1]
            changed = np.where(kept, matrix, 0).astype(np.float64)
            if repair:
                rows = np.concatenate([one["x"] for one in fitting]).astype(np.float64)
                rows = np.maximum(rows @ targets[0].weight.constant.values, 0) if which else rows
                gram = rows.T @ rows
                gram += np.trace(gram) / len(rows) * np.eye(len(gram))
                for row, mask, old in zip(changed, kept, matrix.astype(np.float64), strict=True):
                    row[mask] = np.linalg.solve(gram[np.ix_(mask, mask)], gram[mask] @ old)
            other = onnx.ModelProto()
            other.CopyFrom(model)
            other.graph.initializer[which].CopyFrom(oracle.value(target.weight.site, changed.T.astype(np.float32)))
            assert found[which].drifts[at] == pytest.approx(drift(model, other, judged) ** 2, rel=1e-3)


def test_without_outputs_to_judge_by_the_squares_that_go_count() -> None:
    graph = load(chain(normal(8, 8), np.zeros((8, 4), np.float32)))
    matrix = np.sort(np.abs(normal(8, 8)).ravel()).astype(np.float64)
    found = curves(graph, targets_of(graph), [0.25, 0.5], Context())
    expected = [np.sum(matrix[:count] ** 2) / np.sum(matrix**2) for count in (16, 32)]
    np.testing.assert_allclose(found[0].drifts, expected, rtol=1e-6)
    np.testing.assert_array_equal(found[1].drifts, 0.0)


# Which go


@pytest.mark.parametrize("criterion", ["wanda", "magnitude", None])
def test_criteria_without_repair(criterion: Any) -> None:
    matrix, feeds = normal(6, 9), correlated(5, 7, 6)
    _, values = sparse(chain(matrix, rows=7), 0.5, feeds, alone=True, criterion=criterion)
    rows = np.concatenate([one["x"] for one in feeds]).astype(np.float64)
    energy = np.square(rows).sum(0)
    energy += energy.sum() / len(rows)  # few positions: as `Gram.shrunk` says
    scores = np.abs(matrix) * (np.sqrt(energy)[:, None] if criterion == "wanda" else 1.0)
    expected = np.where(scores > np.sort(scores.ravel())[26], matrix, 0)
    np.testing.assert_array_equal(values["w0"], expected)


def test_random_zeros_go_by_the_seed_and_the_layer() -> None:
    graph = load(chain(normal(8, 8), normal(8, 8)))
    masks = []
    for seed in (0, 0, 1):
        values = sparsify_alone(graph, targets_of(graph, criterion="random"), [0.5, 0.5], Context(seed=seed))
        masks.append([values[name] != 0 for name in ("w0", "w1")])
        assert [np.count_nonzero(mask) for mask in masks[-1]] == [32, 32]
    np.testing.assert_array_equal(masks[0], masks[1])
    assert (masks[0][0] != masks[2][0]).any()
    assert (masks[0][0] != masks[0][1]).any()


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1x4", "rows", "columns"])
@pytest.mark.parametrize("criterion", [None, "obs"])
def test_zeros_of_every_pattern_lie_in_it(pattern: str, criterion: Any) -> None:
    parsed = Pattern.parse(pattern)
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"])
    model = model_of([node], (2, 8, 5, 5), {"w": normal(6, 8, 3, 3), "b": normal(6)})
    _, values = sparse(model, 0.5, correlated(4, 2, 8, 5, 5), pattern=parsed, criterion=criterion)
    zeros = values["w"].reshape(6, 8, 9) == 0
    if pattern == "2:4":
        assert (zeros.reshape(6, 2, 4, 9).sum(axis=2) == 2).all()
    elif pattern == "1x4":
        assert set(zeros.reshape(6, 18, 4).sum(axis=2).ravel()) == {0, 4}
    elif pattern in ("rows", "columns"):
        whole = zeros.reshape(6, 72).all(axis=1 if pattern == "rows" else 0)
        assert whole.sum() == (3 if pattern == "rows" else 36)
        assert zeros.sum() == 216
    else:
        assert zeros.sum() == 216


def test_a_threshold_is_one_of_the_original_weights() -> None:
    first, second = normal(8, 10), normal(10, 6, seed=1)
    _, values = sparse(chain(first, second), 0.5, correlated(6, 8, 8), threshold=0.6)
    for name, matrix in (("w0", first), ("w1", second)):
        np.testing.assert_array_equal(values[name] == 0, np.abs(matrix) <= np.float32(0.6))


# What is left is made up for


def dense() -> tuple[onnx.ModelProto, tuple[int, ...]]:
    return chain(normal(12, 16), normal(16, 16, seed=1), normal(16, 8, seed=2)), (8, 12)


def gemm() -> tuple[onnx.ModelProto, tuple[int, ...]]:
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)
    return model_of([node], (8, 12), {"w": normal(10, 12), "b": normal(10)}), (8, 12)


def conv(group: int = 1, outputs: int = 8, **attributes: Any) -> tuple[onnx.ModelProto, tuple[int, ...]]:
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], group=group, **attributes)
    return model_of([node], (2, 8, 6, 6), {"w": normal(outputs, 8 // group, 3, 3), "b": normal(outputs)}), (2, 8, 6, 6)


def conv_transpose() -> tuple[onnx.ModelProto, tuple[int, ...]]:
    node = helper.make_node("ConvTranspose", ["x", "w", "b"], ["y"], group=2, strides=[2, 2])
    return model_of([node], (2, 8, 5, 5), {"w": normal(8, 3, 2, 2), "b": normal(6)}), (2, 8, 5, 5)


def recurrent(op: str = "LSTM") -> tuple[onnx.ModelProto, tuple[int, ...]]:
    gates = {"LSTM": 4, "GRU": 3}[op]
    node = helper.make_node(op, ["x", "w", "r"], ["y"], hidden_size=6)
    return model_of([node], (7, 10, 10), {"w": normal(1, gates * 6, 10) / 3, "r": normal(1, gates * 6, 6) / 3}), (7, 10, 10)


LAYERS: dict[str, Callable[[], tuple[onnx.ModelProto, tuple[int, ...]]]] = {
    "MatMul": dense,
    "Gemm": gemm,
    "Conv": lambda: conv(pads=[1, 1, 1, 1]),
    "groups": lambda: conv(2, dilations=[2, 2]),
    "depthwise": lambda: conv(8),
    "ConvTranspose": conv_transpose,
    "LSTM": recurrent,
    "GRU": lambda: recurrent("GRU"),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_repaired_beats_unrepaired_on_inputs_held_out(kind: str) -> None:
    model, shape = LAYERS[kind]()
    feeds, held_out = correlated(24, *shape), correlated(8, *shape, seed=77)
    repaired, values = sparse(model, 0.5, feeds)
    plain, plain_values = sparse(model, 0.5, feeds, alone=True)
    assert drift(model, repaired, held_out) < 0.9 * drift(model, plain, held_out)
    for name, array in values.items():
        assert np.count_nonzero(array == 0) == np.count_nonzero(plain_values[name] == 0) == array.size // 2


@pytest.mark.parametrize("pattern", ["2:4", "4x1", "columns"])
def test_repaired_beats_unrepaired_in_patterns(pattern: str) -> None:
    model, shape = conv(pads=[1, 1, 1, 1])
    feeds, held_out = correlated(24, *shape), correlated(8, *shape, seed=77)
    repaired, _ = sparse(model, 0.5, feeds, pattern=Pattern.parse(pattern))
    plain, _ = sparse(model, 0.5, feeds, alone=True, pattern=Pattern.parse(pattern))
    assert drift(model, repaired, held_out) < 0.9 * drift(model, plain, held_out)


@pytest.mark.parametrize("criterion", [None, "magnitude", "random"])
def test_steps_of_a_schedule_keep_the_zeros_of_the_step_before(criterion: Any) -> None:
    model, feeds = chain(normal(8, 10), normal(10, 10, seed=1), normal(10, 4, seed=2)), correlated(3, 8, 8)
    steps = [[0.2, 0.1, 0.3], [0.4, 0.3, 0.5], [0.6, 0.5, 0.7]]
    found = [sparse(model, steps[: count + 1], feeds, criterion=criterion)[1] for count in range(3)]
    for name, shares in (("w0", (0.2, 0.4, 0.6)), ("w1", (0.1, 0.3, 0.5)), ("w2", (0.3, 0.5, 0.7))):
        masks = [values[name] == 0 for values in found]
        assert [int(mask.sum()) for mask in masks] == [int(share * masks[0].size + 1e-9) for share in shares]
        assert (masks[0] <= masks[1]).all()
        assert (masks[1] <= masks[2]).all()


@settings(deadline=None, max_examples=15)
@given(st.floats(0, 1), st.integers(0, 40), st.booleans())
def test_zeros_that_are_there_already_stay_and_count(share: float, zeros: int, data: bool) -> None:
    matrix = normal(8, 10)
    matrix.ravel()[np.random.default_rng(zeros).permutation(80)[:zeros]] = 0
    _, values = sparse(chain(matrix), share, correlated(4, 8, 8) if data else None)
    assert (values["w0"][matrix == 0] == 0).all()
    assert np.count_nonzero(values["w0"] == 0) == max(zeros, int(np.floor(share * 80 + 1e-9)))
    if zeros >= share * 80:
        np.testing.assert_array_equal(values["w0"], matrix)


def test_a_layer_that_gets_no_zeros_stays_as_it_is_though_others_before_it_change() -> None:
    arrays = {"w": normal(12, 10), "v": normal(10, 10, seed=1), "c": normal(10), "u": normal(10, 6, seed=2)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Gemm", ["h", "v", "c"], ["k"]),
        helper.make_node("MatMul", ["k", "u"], ["y"]),
    ]
    graph = load(model_of(nodes, (8, 12), arrays))
    context = Context(activations=calibration(correlated(8, 8, 12)))
    values, repaired = sparsify_in_turn(graph, targets_of(graph), [[0.5, 0.0, 0.5]], context)
    np.testing.assert_array_equal(values["v"], arrays["v"])
    assert "v" not in repaired.biases
    assert (values["u"] != arrays["u"]).sum() > 30  # those that are kept make up for what w lost


def test_threads_make_no_difference() -> None:
    graph = load(dense()[0])
    feeds, found = correlated(3, 8, 12), []
    with ThreadPoolExecutor(2) as executor:
        for given_executor in (None, executor, executor):
            context = Context(activations=calibration(feeds), executor=given_executor)
            found.append(sparsify_in_turn(graph, targets_of(graph), [[0.3] * 3, [0.6] * 3], context)[0])
    for other in found[1:]:
        assert {name: array.tobytes() for name, array in other.items()} == {name: array.tobytes() for name, array in found[0].items()}


# Weights of all sorts


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("data", [False, True])
def test_weights_of_nothing_but_zeros(share: float, data: bool) -> None:
    zero = np.zeros((8, 8), np.float32)
    feeds = correlated(4, 8, 8) if data else None
    _, values = sparse(chain(normal(8, 8), zero, normal(8, 4)), share, feeds)
    np.testing.assert_array_equal(values["w1"], zero)
    graph = load(chain(normal(8, 8), zero))
    context = Context(activations=calibration(feeds) if feeds is not None else None)
    for scope in ("global", "erk", "sensitivity"):
        shares = removed_shares(graph, targets_of(graph), scope, share, context)  # type: ignore[arg-type]
        assert sum(shares) == pytest.approx(2 * share)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_none_and_all(share: float) -> None:
    matrices = [normal(8, 8), normal(8, 4, seed=1)]
    _, values = sparse(chain(*matrices), share, correlated(4, 8, 8))
    for index, matrix in enumerate(matrices):
        np.testing.assert_array_equal(values[f"w{index}"], matrix * np.float32(1 - share))


@pytest.mark.parametrize("size", [5e3, 4e4])
def test_float16_stays_float16_and_finite(size: float) -> None:
    """Inputs are alike, so what an output keeps would have to be as large as all it had; beyond 65504 it stays as it was."""
    matrix = (size * (1 + normal(8, 8) / 100)).astype(np.float16)
    feeds = [{"x": np.repeat(normal(200, 1, seed=index) / 1000, 8, axis=1).astype(np.float16)} for index in range(4)]
    model = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], (200, 8), {"w": matrix})
    _, values = sparse(model, 0.5, feeds)
    kept = values["w"][values["w"] != 0]
    assert values["w"].dtype == np.float16
    assert kept.size == 32
    assert np.isfinite(kept).all()
    for now, before in zip(values["w"].T.astype(np.float64), matrix.T.astype(np.float64), strict=True):
        if before.sum() < 65504 * np.count_nonzero(now):
            assert now.sum() == pytest.approx(before.sum() if now.any() else 0.0, rel=0.15)  # less for the ridge
        else:
            np.testing.assert_array_equal(now[now != 0], before[now != 0])


def test_a_table_that_is_also_multiplied_with_is_pruned_by_magnitude() -> None:
    """Tied embeddings: looked up, and multiplied with as a transposed matrix; the two have no layout in common."""
    text = """<ir_version: 8, opset_import: ["": 17]> g (int64[3] ids) => (float[3, 20] y)
        { e = Gather(t, ids) r = Relu(e) s = Transpose<perm = [1, 0]>(t) y = MatMul(r, s) }"""
    model = parser.parse_model(text)
    table = normal(20, 8)
    model.graph.initializer.append(oracle.value("t", table))
    feeds = [{"ids": np.array([index, index + 7, 19 - index])} for index in range(6)]
    for criterion in (None, "wanda"):
        _, values = sparse(model, 0.5, feeds, criterion=criterion)
        np.testing.assert_array_equal(values["t"], np.where(np.abs(table) > np.sort(np.abs(table).ravel())[79], table, 0))
        graph = load(model)
        context = Context(activations=calibration(feeds))
        assert removed_shares(graph, targets_of(graph, criterion=criterion), "sensitivity", 0.5, context) == pytest.approx([0.5])


def test_a_weight_of_two_nodes_is_made_up_for_in_both() -> None:
    matrix = normal(12, 12)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Tanh", ["h"], ["t"]),
        helper.make_node("MatMul", ["t", "w"], ["y"]),
    ]
    model, feeds = model_of(nodes, (8, 12), {"w": matrix}), correlated(16, 8, 12)
    repaired, values = sparse(model, 0.4, feeds)
    plain, _ = sparse(model, 0.4, feeds, alone=True)
    held_out = correlated(6, 8, 12, seed=77)
    assert drift(model, repaired, held_out) < drift(model, plain, held_out)
    assert np.count_nonzero(values["w"] == 0) == 57


def test_weights_in_bodies_and_functions_are_pruned_by_magnitude() -> None:
    text = """<ir_version: 8, opset_import: ["": 17, "f": 1]> g (float[8, 6] x) => (float[8, 6] y)
        { h = f.inner(x) c = Constant<value = bool {1}>() y = If(c) <
            then_branch = t () => (float[8, 6] p) { p = MatMul(h, w) }, else_branch = e () => (float[8, 6] q) { q = Neg(h) }> }
        <domain: "f", opset_import: ["": 17]> inner (a) => (b) { b = MatMul(a, k) }"""
    model = parser.parse_model(text)
    body = next(attribute.g for attribute in model.graph.node[2].attribute if attribute.name == "then_branch")
    body.initializer.append(oracle.value("w", normal(6, 6)))
    held = helper.make_node("Constant", [], ["k"], value=oracle.value("k", normal(6, 6, seed=1)))
    model.functions[0].node.insert(0, held)
    graph, feeds = load(model), correlated(6, 8, 6)
    targets, context = targets_of(graph), Context(activations=calibration(feeds))
    assert len(targets) == 2
    shares = removed_shares(graph, targets, "sensitivity", 0.5, context)
    assert sum(shares) == pytest.approx(1.0)
    values, repaired = sparsify_in_turn(graph, targets, [[0.5, 0.5]], context)
    assert not repaired.sites
    for target in targets:
        original = target.weight.constant.values
        expected = np.where(np.abs(original) > np.sort(np.abs(original).ravel())[17], original, 0)
        np.testing.assert_array_equal(values[target.weight.site], expected)


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose", "Gemm", "MatMul"])
@pytest.mark.parametrize("inputs", [4, 6])
def test_hardware_takes_groups_within_the_input_channels(op: str, inputs: int) -> None:
    shapes = {"Conv": (3, inputs, 2, 2), "ConvTranspose": (2 * inputs, 4, 2, 2), "Gemm": (inputs, 3), "MatMul": (inputs, 3)}
    attributes = {"group": 2} if op == "ConvTranspose" else {}
    node = helper.make_node(op, ["x", "w"], ["y"], **attributes)
    kind = oracle.tensor("x", None, TensorProto.FLOAT)
    model = oracle.make_model([node], [kind], [oracle.tensor("y", None)], [oracle.value("w", normal(*shapes[op]))])
    (target,) = targets_of(load(model), Pattern.parse("2:4"))
    assert target.fits_hardware == (inputs == 4)
    assert target.inputs == inputs
    assert not dataclasses.replace(target, pattern=Pattern.parse("1:4")).fits_hardware
    assert sorted(target.columns) == list(range(target.weight.layout.shape[1]))
