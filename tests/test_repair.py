"""Weights rewritten in turn: order, least squares and bias correction, against numpy and against ONNX Runtime's own outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, parser

from onnxshrink.calibrate import Calibration
from onnxshrink.contract import Context
from onnxshrink.errors import ValidationError
from onnxshrink.graph.edit import set_values
from onnxshrink.graph.exporter import to_model
from onnxshrink.graph.files import load
from onnxshrink.graph.ir import Graph
from onnxshrink.graph.weights import Weight, weights
from onnxshrink.inputs import Feeds, Samples
from onnxshrink.numerics.gram import Gram, PairedGram
from onnxshrink.repair import Repaired, rewrite_in_turn
from tests import oracle

Array = np.ndarray[Any, np.dtype[Any]]
WIDTH = 4
Edit = Callable[[Array], Array]


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def calibration(feeds: Sequence[Feeds]) -> Calibration:
    return Calibration(Samples(lambda index: feeds[index], range(len(feeds)), "test"), threads=1)


def batches(count: int, *shape: int, name: str = "x", seed: int = 5) -> list[Feeds]:
    """Returns inputs whose mean is far from zero, so that biases have something to make up for."""
    return [{name: normal(*shape, seed=seed + index) + np.float32(0.7)} for index in range(count)]


def outputs(model: onnx.ModelProto, feeds: Sequence[Feeds], name: str) -> list[Array]:
    """Returns the values of a tensor, by ONNX Runtime."""
    asked = onnx.ModelProto()
    asked.CopyFrom(model)
    if name not in [value.name for value in asked.graph.output]:
        asked.graph.output.append(onnx.ValueInfoProto(name=name))
    running = oracle.session(asked, optimise=False)
    place = [value.name for value in running.get_outputs()].index(name)
    return [oracle.run(running, one)[place] for one in feeds]


@dataclass
class Trial:
    """What `rewrite_in_turn` asked for and did, and the model that comes of it."""

    model: onnx.ModelProto
    wanted: dict[str, Array] = field(default_factory=dict)
    grams: dict[str, Array | None] = field(default_factory=dict)
    repaired: Repaired = field(default_factory=Repaired)
    result: onnx.ModelProto = field(default_factory=onnx.ModelProto)

    def values(self, name: str) -> Array:
        return next(
            onnx.numpy_helper.to_array(tensor) for tensor in self.result.graph.initializer if tensor.name == name
        )


def operands(graph: Graph) -> list[Weight]:
    return [weight for weight in weights(graph) if weight.obstacle is None]


def rewritten(
    model: onnx.ModelProto, edit: Edit | dict[str, Edit], feeds: Sequence[Feeds] | None, **more: Any
) -> Trial:
    """Rewrites every weight operand by a function of the wanted matrix, or those that have one; the others become what is wanted."""
    trial, graph, made = Trial(model), load(model), {}

    def rewrite(weight: Weight, wanted: Array, grams: Array | None) -> Array:
        trial.wanted[weight.site], trial.grams[weight.site] = wanted, grams
        chosen = edit if callable(edit) else edit.get(weight.site, lambda matrix: matrix)
        made[weight.site] = chosen(wanted)
        return made[weight.site]

    context = Context(activations=calibration(feeds) if feeds is not None else None, **more)
    found = operands(graph)
    trial.repaired = rewrite_in_turn(graph, found, rewrite, context)
    assert to_model(graph).SerializeToString() == to_model(load(model)).SerializeToString()  # the graph is left alone
    for weight in found:
        set_values(weight.constant, weight.layout.inverse(made[weight.site]).astype(weight.constant.dtype))
    for bias, values in trial.repaired.biases.values():
        set_values(bias, values)
    trial.result = to_model(graph)
    return trial


def coarse(matrix: Array) -> Array:
    """Returns a matrix rounded to very few values, so that means move too."""
    step = np.abs(matrix).max() / 2
    return np.floor(matrix / step) * step


# Order


@dataclass(frozen=True)
class Spy:
    """Activations that know nothing, and note which weights are asked for together."""

    asked: list[list[str]]

    def paired_grams(
        self, graph: Graph, original: Graph, stages: Sequence[Sequence[Weight]]
    ) -> Iterator[list[tuple[Weight, PairedGram]]]:
        for stage in stages:
            self.asked.append([weight.site for weight in stage])
            sizes = [weight.layout.shape[1] for weight in stage]
            eyes = [np.eye(columns)[None] for columns in sizes]
            zeros = [np.zeros((1, columns)) for columns in sizes]
            moments = [
                PairedGram(Gram(eye, zero, 10), 0 * eye, zero) for eye, zero in zip(eyes, zeros, strict=True)
            ]
            yield list(zip(stage, moments, strict=True))


@st.composite
def dags(draw: st.DrawFn) -> tuple[onnx.ModelProto, dict[str, set[int]], list[set[int]]]:
    """Returns a random model, the nodes that use each weight, and the nodes that each node depends on."""
    tensors, needs = ["x"], [set()]  # what a tensor depends on, by node
    nodes, users, depends, names = [], {}, [], []
    for index in range(draw(st.integers(1, 12))):
        first, second = (draw(st.integers(0, len(tensors) - 1)) for _ in range(2))
        kind = draw(st.sampled_from(["MatMul", "MatMul", "MatMul", "Add", "If"]))
        output = f"t{index}"
        if kind == "MatMul":
            shared = names and draw(st.integers(0, 3)) == 0
            name = draw(st.sampled_from(names)) if shared else f"w{len(names)}"
            names += [] if shared else [name]
            users.setdefault(name, set()).add(index)
            nodes.append(helper.make_node("MatMul", [tensors[first], name], [output]))
            second = first
        elif kind == "Add":
            nodes.append(helper.make_node("Add", [tensors[first], tensors[second]], [output]))
        else:
            branches = []
            for name in ("then", "else"):
                body = helper.make_node("Add", [tensors[first], tensors[second]], [f"{output}_{name}"])
                result = oracle.tensor(f"{output}_{name}", None)
                branches.append(helper.make_graph([body], name, [], [result]))
            nodes.append(helper.make_node("If", ["flag"], [output], then_branch=branches[0], else_branch=branches[1]))
        depends.append(needs[first] | needs[second])
        needs.append(depends[-1] | {index})
        tensors.append(output)
    inputs = [oracle.tensor("x", [1, WIDTH]), oracle.tensor("flag", [], TensorProto.BOOL)]
    values = [oracle.value(name, normal(WIDTH, WIDTH, seed=seed)) for seed, name in enumerate(names)]
    model = oracle.make_model(nodes, inputs, [oracle.tensor(tensors[-1], None)], values)
    return model, users, depends


@given(dags())
def test_no_layer_meets_another_one_of_its_stage(
    dag: tuple[onnx.ModelProto, dict[str, set[int]], list[set[int]]],
) -> None:
    model, users, depends = dag
    graph, asked = load(model), []
    found = operands(graph)[::-1]
    rewrite_in_turn(graph, found, lambda weight, wanted, grams: wanted, Context(activations=Spy(asked)))
    assert sorted(site for stage in asked for site in stage) == sorted(users)

    def meets(site: str, other: str) -> bool:
        return any(depends[node] & users[other] for node in users[site])

    for stage in asked:
        assert not [(one, two) for one in stage for two in stage if one != two and meets(one, two)]
    done = [site for stage in asked for site in stage]
    tied = any(len(nodes) > 1 for nodes in users.values())
    for place, site in enumerate(done):
        assert tied or not any(meets(site, later) for later in done[place + 1 :])  # after all that it depends on


def test_what_does_not_depend_on_each_other_is_rewritten_together() -> None:
    nodes = [helper.make_node("MatMul", ["x", f"w{index}"], [f"h{index}"]) for index in range(3)]
    nodes += [helper.make_node("MatMul", [f"h{index}", f"v{index}"], [f"y{index}"]) for index in range(3)]
    nodes += [helper.make_node("Sum", ["y0", "y1", "y2"], ["y"])]
    order = [0, 3, 1, 4, 2, 5, 6]  # each branch from end to end
    values = [oracle.value(name, normal(WIDTH, WIDTH)) for name in ("w0", "w1", "w2", "v0", "v1", "v2")]
    model = oracle.make_model(
        [nodes[at] for at in order], [oracle.tensor("x", [1, WIDTH])], [oracle.tensor("y", [1, WIDTH])], values
    )
    graph, asked = load(model), []
    rewrite_in_turn(graph, operands(graph), lambda weight, wanted, grams: wanted, Context(activations=Spy(asked)))
    assert [sorted(stage) for stage in asked] == [["w0", "w1", "w2"], ["v0", "v1", "v2"]]


def test_of_weights_that_depend_on_each_other_the_one_read_first_comes_first() -> None:
    """Circle: a - b - a again; c is behind it, and first in the file."""
    chain = [("x", "a"), ("h0", "b"), ("h1", "a"), ("h2", "c")]
    nodes = [helper.make_node("MatMul", [source, name], [f"h{index}"]) for index, (source, name) in enumerate(chain)]
    values = [oracle.value(name, normal(WIDTH, WIDTH)) for name in ("c", "b", "a")]
    model = oracle.make_model(nodes, [oracle.tensor("x", [1, WIDTH])], [oracle.tensor("h3", [1, WIDTH])], values)
    graph, asked = load(model), []
    rewrite_in_turn(graph, operands(graph), lambda weight, wanted, grams: wanted, Context(activations=Spy(asked)))
    assert asked == [["a"], ["b"], ["c"]]


# Least squares


def chain(first: Array, second: Array, relu: bool = True) -> onnx.ModelProto:
    middle = "Relu" if relu else "Identity"
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"]),
        helper.make_node(middle, ["h"], ["a"]),
        helper.make_node("MatMul", ["a", "w2"], ["y"]),
    ]
    values = [oracle.value("w1", first), oracle.value("w2", second)]
    sizes = (len(first), second.shape[1])
    return oracle.make_model(
        nodes, [oracle.tensor("x", ["n", sizes[0]])], [oracle.tensor("y", ["n", sizes[1]])], values
    )


def test_a_layer_behind_a_crippled_one_is_the_ridge_solution_against_the_original() -> None:
    first, second = normal(6, 8), normal(8, 5)
    feeds = batches(12, 20, 6)
    model = chain(first, second)
    crippled = normal(8, 6, seed=3).astype(np.float64)
    trial = rewritten(model, {"w1": lambda _: crippled}, feeds)
    np.testing.assert_allclose(trial.wanted["w1"], first.T, rtol=1e-12)  # its inputs are those of the original
    rows = np.concatenate([one["x"] for one in feeds]).astype(np.float64)
    before, now = np.maximum(rows @ first, 0), np.maximum(rows @ crippled.T.astype(np.float32), 0)
    gram = now.T @ now
    shrinkage = trial.grams["w2"][0] - gram
    added = np.mean(np.diagonal(shrinkage))
    np.testing.assert_allclose(shrinkage, added * np.eye(8), atol=1e-4 * np.trace(gram))
    ridge = added + 0.3 * np.mean(np.diagonal(gram) + added)  # drawn towards w2
    tall = np.concatenate([now, np.sqrt(ridge) * np.eye(8)])
    target = np.concatenate([before @ second, np.sqrt(ridge) * second])
    expected, *_ = np.linalg.lstsq(tall, target, rcond=None)
    np.testing.assert_allclose(trial.wanted["w2"], expected.T, rtol=1e-4, atol=1e-5)
    plain = np.linalg.norm(now @ second - before @ second)
    assert np.linalg.norm(now @ trial.wanted["w2"].T - before @ second) < 0.8 * plain


def test_layers_left_as_they_are_ask_for_nothing_else() -> None:
    model = chain(normal(6, 8), normal(8, 5))
    trial = rewritten(model, lambda matrix: matrix, batches(3, 20, 6))
    for name in ("w1", "w2"):
        np.testing.assert_array_equal(trial.values(name), Trial(model, result=model).values(name))
    assert trial.repaired.sites == {"w1", "w2"}


def test_without_calibration_data_weights_are_rewritten_as_they_are() -> None:
    first, second = normal(6, 8), normal(8, 5)
    trial = rewritten(chain(first, second), coarse, None)
    np.testing.assert_array_equal(trial.wanted["w1"], first.T)
    np.testing.assert_array_equal(trial.wanted["w2"], second.T)
    assert trial.grams == {"w1": None, "w2": None}
    assert (trial.repaired.sites, trial.repaired.biases) == (set(), {})


BODIES = """<ir_version: 8, opset_import: ["": 17]> g (float[N, 4] x, bool flag) => (float[N, 4] y)
    { h = MatMul(x, w1) b = If(flag) <
        then_branch = t () => (float[N, 4] p) { p = MatMul(h, w2) }, else_branch = e () => (float[N, 4] q) { q = Neg(h) }>
      y = MatMul(b, w3) }"""


def test_weights_in_bodies_are_rewritten_without_repair_and_those_behind_make_up_for_them() -> None:
    model = parser.parse_model(BODIES)
    body = next(attribute.g for attribute in model.graph.node[1].attribute if attribute.name == "then_branch")
    arrays = {name: normal(WIDTH, WIDTH, seed=seed) for seed, name in enumerate(("w1", "w2", "w3"))}
    model.graph.initializer.extend(oracle.value(name, arrays[name]) for name in ("w1", "w3"))
    body.initializer.append(oracle.value("w2", arrays["w2"]))
    feeds = [{**one, "flag": np.array(True)} for one in batches(4, 30, WIDTH)]
    inner = next(weight.site for weight in operands(load(model)) if weight.site not in ("w1", "w3"))
    trial = rewritten(model, {inner: coarse}, feeds)
    np.testing.assert_array_equal(trial.wanted[inner], arrays["w2"].T)
    assert trial.grams[inner] is None
    assert trial.repaired.sites == {"w1", "w3"}
    rows = np.concatenate([one["x"] for one in feeds]).astype(np.float64) @ arrays["w1"]
    before, now = rows @ arrays["w2"], rows @ coarse(arrays["w2"].T.astype(np.float64)).T
    wanted = trial.wanted["w3"].T
    assert np.linalg.norm(now @ wanted - before @ arrays["w3"]) < 0.8 * np.linalg.norm((now - before) @ arrays["w3"])


# Sums


def collected(original: onnx.ModelProto, edited: onnx.ModelProto, feeds: Sequence[Feeds], *names: str) -> list[list[Array]]:
    """Returns the values of tensors in the original, then those of tensors in the edited model, as lists over samples, float64."""
    return [[array.astype(np.float64) for array in outputs(model, feeds, name)] for name in names for model in (original, edited)]


def ridge_solution(trial: Trial, name: str, rows: Array, target: Array, weight: Array) -> Array:
    """Returns the least-squares weights [rows, columns] for positions [count, columns] and outputs, drawn towards the original's."""
    added = np.mean(np.diagonal(trial.grams[name][0] - rows.T @ rows))
    ridge = added + 0.3 * np.mean(np.diagonal(rows.T @ rows) + added)
    tall = np.concatenate([rows, np.sqrt(ridge) * np.eye(rows.shape[1])])
    solution, *_ = np.linalg.lstsq(tall, np.concatenate([target, np.sqrt(ridge) * weight.T]), rcond=None)
    return solution.T


def with_values(model: onnx.ModelProto, arrays: dict[str, Array]) -> onnx.ModelProto:
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for tensor in changed.graph.initializer:
        if tensor.name in arrays:
            tensor.CopyFrom(oracle.value(tensor.name, arrays[tensor.name]))
    return changed


RESIDUAL_CONV = """<ir_version: 8, opset_import: ["": 17]> g (float[N, 3, 7, 6] x) => (float[N, 4, 4, 3] y)
    { s = Conv<strides = [2, 2]>(x, around) h = Conv<pads = [1, 1, 1, 1]>(x, w1, b1) a = Relu(h)
      m = Conv<strides = [2, 2], pads = [1, 1, 1, 1]>(a, w2, b2) t = Add(m, s) y = Relu(t) }"""


def residual_conv(**bias: Array) -> tuple[onnx.ModelProto, dict[str, Array]]:
    shapes = {"around": (4, 3, 1, 1), "w1": (5, 3, 3, 3), "b1": (5,), "w2": (4, 5, 3, 3), "b2": (4,)}
    arrays = {name: normal(*shape) for name, shape in shapes.items()} | bias
    model = parser.parse_model(RESIDUAL_CONV)
    model.graph.initializer.extend(oracle.value(name, array) for name, array in arrays.items())
    return model, arrays


def test_a_branch_of_convs_makes_up_for_what_goes_around_it() -> None:
    model, arrays = residual_conv(b1=np.zeros(5, np.float32))
    feeds = batches(20, 2, 3, 7, 6)
    trial = rewritten(model, {"around": coarse, "w1": coarse}, feeds)
    crippled = with_values(model, {name: trial.values(name) for name in ("around", "w1", "b1")})
    _, a, t, now = collected(model, crippled, feeds, "a", "t")
    wide = [np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1))) for images in a]
    rows = np.array([
        images[n, :, i : i + 3, j : j + 3].ravel() for images in wide for n in range(2) for i in range(0, 7, 2) for j in range(0, 6, 2)
    ])  # fmt: skip
    kernel = arrays["w2"].reshape(4, -1).astype(np.float64)
    lack = np.concatenate([x.transpose(0, 2, 3, 1).reshape(-1, 4) for x in t]) - np.concatenate(
        [x.transpose(0, 2, 3, 1).reshape(-1, 4) for x in now]
    )
    expected = ridge_solution(trial, "w2", rows, lack + rows @ kernel.T, kernel)
    np.testing.assert_allclose(trial.wanted["w2"], expected, rtol=1e-3, atol=1e-4)
    result = with_values(crippled, {"w2": trial.values("w2"), "b2": trial.values("b2")})
    left = np.concatenate(t) - np.concatenate(outputs(result, feeds, "t"))
    assert np.linalg.norm(left) < 0.9 * np.linalg.norm(lack)


def test_the_mean_of_the_sum_stays() -> None:
    model, arrays = residual_conv()
    feeds = batches(20, 2, 3, 7, 6)
    trial = rewritten(model, coarse, feeds)

    def means(result: onnx.ModelProto, name: str) -> Array:
        return np.concatenate(outputs(result, feeds, name)).astype(np.float64).mean(axis=(0, 2, 3))

    expected = means(model, "t")
    moved = np.abs(means(with_values(trial.result, {"b2": arrays["b2"]}), "t") - expected)
    assert moved.min() > 0.05
    np.testing.assert_array_less(np.abs(means(trial.result, "t") - expected), 2.01 / (20 * 2 * 12 + 2) * moved + 1e-4)
    assert np.abs(means(trial.result, "m") - means(model, "m")).max() > 0.05  # that of the branch does not


RESIDUAL_MATMUL = """<ir_version: 8, opset_import: ["": 17]> g (float[2, 5, 6] x) => (float[2, 5, 6] y)
    { s = MatMul(x, around) h = MatMul(s, w1) a = Relu(h) m = MatMul(a, w2) c = Add(m, b) d = Add(GLUE, c) y = Tanh(d) }"""


@pytest.mark.parametrize(("glue", "counts"), [("s", True), ("pooled", False)])
def test_a_branch_of_products_makes_up_for_what_goes_around_it_unless_that_is_broadcast(glue: str, counts: bool) -> None:
    text = RESIDUAL_MATMUL.replace("d = Add", "pooled = ReduceMean<axes = [1]>(s) d = Add").replace("GLUE", glue)
    model = parser.parse_model(text)
    arrays = {"around": normal(6, 6), "w1": normal(6, 8), "w2": normal(8, 6), "b": normal(6)}
    model.graph.initializer.extend(oracle.value(name, array) for name, array in arrays.items())
    feeds = batches(20, 2, 5, 6)
    trial = rewritten(model, {"around": coarse, "w1": coarse}, feeds)
    crippled = with_values(model, {name: trial.values(name) for name in ("around", "w1")})
    _, a, wanted, now = (np.concatenate(one).reshape(-1, one[0].shape[-1]) for one in collected(model, crippled, feeds, "a", "c"))
    lack = wanted - now
    if counts:
        _, _, wanted, now = (np.concatenate(one).reshape(-1, one[0].shape[-1]) for one in collected(model, crippled, feeds, "a", "d"))
        assert np.abs(wanted - now - lack).max() > 0.05
        lack = wanted - now
    expected = ridge_solution(trial, "w2", a, lack + a @ arrays["w2"], arrays["w2"].T.astype(np.float64))
    np.testing.assert_allclose(trial.wanted["w2"], expected, rtol=1e-3, atol=1e-4)


# Biases


def graph_of(nodes: Sequence[onnx.NodeProto], inputs: Array, arrays: dict[str, Array]) -> onnx.ModelProto:
    shape: list[int | None] = list(inputs.shape)
    values = [oracle.value(name, array) for name, array in arrays.items()]
    return oracle.make_model(nodes, [oracle.tensor("x", shape)], [oracle.tensor("y", None)], values)


def conv(group: int, **attrs: Any) -> tuple[onnx.ModelProto, int]:
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], group=group, **attrs)
    arrays = {"w": normal(8, 8 // group, 3, 3), "b": normal(8)}
    return graph_of([node], np.empty((1, 8, 7, 6)), arrays), 1


def conv_transpose(group: int) -> tuple[onnx.ModelProto, int]:
    node = helper.make_node("ConvTranspose", ["x", "w", "b"], ["y"], group=group, strides=[2, 1])
    return graph_of([node], np.empty((1, 8, 7, 6)), {"w": normal(8, 12 // group, 3, 3), "b": normal(12)}), 1


def gemm(**attrs: Any) -> tuple[onnx.ModelProto, int]:
    weight = normal(9, 6) if attrs.get("transB") else normal(6, 9)
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], **attrs)
    return graph_of([node], np.empty((6, 6)), {"w": weight, "b": normal(9)}), -1


def matmul(bias: tuple[int, ...], flipped: bool = False) -> tuple[onnx.ModelProto, int]:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Add", ["b", "h"] if flipped else ["h", "b"], ["y"]),
    ]
    return graph_of(nodes, np.empty((2, 5, 6)), {"w": normal(6, 9), "b": normal(*bias)}), -1


def from_left() -> tuple[onnx.ModelProto, int]:
    nodes = [helper.make_node("MatMul", ["w", "x"], ["h"]), helper.make_node("Add", ["h", "b"], ["y"])]
    return graph_of(nodes, np.empty((2, 6, 9)), {"w": normal(9, 6), "b": normal(9, 1)}), -2


CORRECTED = {
    "conv": lambda: conv(1, pads=[1, 1, 1, 1]),
    "strided and dilated": lambda: conv(1, strides=[2, 1], dilations=[1, 2]),
    "groups": lambda: conv(2),
    "depthwise": lambda: conv(8, pads=[1, 1, 1, 1]),
    "transposed": lambda: conv_transpose(1),
    "transposed groups": lambda: conv_transpose(4),
    "gemm": gemm,
    "gemm, transposed": lambda: gemm(transB=1),
    "matmul and add": lambda: matmul((9,)),
    "add from the left": lambda: matmul((1, 1, 9), flipped=True),
    "left operand": from_left,
}


@pytest.mark.parametrize("kind", CORRECTED)
def test_mean_outputs_of_each_channel_stay(kind: str) -> None:
    model, axis = CORRECTED[kind]()
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    feeds = batches(6, *shape)
    trial = rewritten(model, coarse, feeds)
    assert list(trial.repaired.biases) == ["w"]

    def means(result: onnx.ModelProto) -> Array:
        got = np.stack(outputs(result, feeds, "y")).astype(np.float64)
        at = axis % (got.ndim - 1) + 1
        return got.mean(axis=tuple(other for other in range(got.ndim) if other != at))

    expected, got = means(model), means(trial.result)
    uncorrected = onnx.ModelProto()
    uncorrected.CopyFrom(trial.result)
    for tensor in uncorrected.graph.initializer:
        if tensor.name == "b":
            tensor.CopyFrom(next(one for one in model.graph.initializer if one.name == "b"))
    moved = np.abs(means(uncorrected) - expected)
    assert moved.max() > 0.05
    count = sum(one.size for one in outputs(model, feeds, "y")) / len(expected)  # of positions
    np.testing.assert_array_less(np.abs(got - expected), 2.01 / (count + 2) * moved + 1e-5 * np.abs(expected).max())


def test_each_of_several_layers_keeps_its_means() -> None:
    """The last layer's inputs are those that the corrected layers give it."""
    nodes = []
    for index, source in enumerate(["x", "a0", "a1"]):
        nodes.append(helper.make_node("Gemm", [source, f"w{index}", f"b{index}"], [f"h{index}"]))
        nodes.append(helper.make_node("Relu", [f"h{index}"], [f"a{index}"]))
    arrays = {f"w{index}": normal(6, 6, seed=index) for index in range(3)}
    arrays |= {f"b{index}": normal(6, seed=index) for index in range(3)}
    model = graph_of([*nodes, helper.make_node("Identity", ["a2"], ["y"])], np.empty((300, 6)), arrays)
    feeds = batches(10, 300, 6)
    trial = rewritten(model, coarse, feeds)
    for name in ("h0", "h1", "h2"):
        expected, got = (np.concatenate(outputs(one, feeds, name)).mean(axis=0) for one in (model, trial.result))
        np.testing.assert_allclose(got, expected, atol=0.02)


def two_gemms(arrays: dict[str, Array], *names: str, extra: Sequence[onnx.NodeProto] = ()) -> onnx.ModelProto:
    """Returns x·w + b, added to what another Gemm gives, with weights and biases of these names."""
    first = helper.make_node("Gemm", ["x", names[0], names[1]], ["h"])
    second = helper.make_node("Gemm", ["x", names[2], names[3]], ["k"])
    return graph_of([first, second, helper.make_node("Add", ["h", "k"], ["y"]), *extra], np.empty((6, 6)), arrays)


def test_a_bias_that_others_read_is_left_alone() -> None:
    arrays = {"w": normal(6, 6), "v": normal(6, 6, seed=1), "b": normal(6)}
    assert not rewritten(two_gemms(arrays, "w", "b", "v", "b"), coarse, batches(5, 6, 6)).repaired.biases
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["h"]), helper.make_node("Mul", ["h", "b"], ["y"])]
    model = graph_of(nodes, np.empty((6, 6)), {"w": normal(6, 6), "b": normal(6)})
    assert not rewritten(model, coarse, batches(5, 6, 6)).repaired.biases


def test_a_bias_that_is_an_output_is_left_alone() -> None:
    model, _ = gemm()
    model.graph.output.append(oracle.tensor("b", [9]))
    assert not rewritten(model, coarse, batches(5, 6, 6)).repaired.biases


def test_a_tied_weight_has_no_bias_of_its_own() -> None:
    arrays = {"w": normal(6, 6), "b": normal(6), "c": normal(6, seed=1)}
    assert not rewritten(two_gemms(arrays, "w", "b", "w", "c"), coarse, batches(5, 6, 6)).repaired.biases


@pytest.mark.parametrize(
    ("nodes", "bias"),
    [
        ([helper.make_node("Gemm", ["x", "w", "b"], ["y"])], (6, 1)),
        ([helper.make_node("Gemm", ["w", "x", "b"], ["y"])], (6,)),
        ([helper.make_node("Gemm", ["x", "w", "b"], ["y"], alpha=2.0)], (6,)),
        ([helper.make_node("Gemm", ["x", "w", "b"], ["y"], beta=2.0)], (6,)),
        ([helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Add", ["h", "b"], ["y"])], (6, 1)),
        ([helper.make_node("MatMul", ["w", "x"], ["h"]), helper.make_node("Add", ["h", "b"], ["y"])], (6,)),
        ([helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Add", ["h", "b"], ["y"])], (6, 6)),
        ([helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Add", ["h", "b"], ["y"])], (6, 1, 1)),
        ([helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Sub", ["b", "h"], ["y"])], (6,)),
    ],
    ids=["rows", "left", "alpha", "beta", "add to rows", "add beside", "matrix", "batch", "sub"],
)
def test_what_is_not_added_to_channels_is_no_bias(nodes: list[onnx.NodeProto], bias: tuple[int, ...]) -> None:
    model = graph_of(nodes, np.empty((6, 6)), {"w": normal(6, 6), "b": normal(*bias)})
    trial = rewritten(model, coarse, batches(5, 6, 6))
    assert not trial.repaired.biases
    assert trial.repaired.sites == {"w"}


def test_a_bias_of_float16_is_corrected_in_its_own_type() -> None:
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"])
    arrays = {"w": normal(6, 9).astype(np.float16), "b": normal(9).astype(np.float16)}
    model = graph_of([node], np.empty((6, 6)), arrays)
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    feeds = [{"x": one["x"].astype(np.float16)} for one in batches(5, 6, 6)]
    ((bias, values),) = rewritten(model, coarse, feeds).repaired.biases.values()
    assert (bias.name, values.dtype, values.shape) == ("b", np.float16, (9,))


# Layers of other kinds


def lstm() -> tuple[onnx.ModelProto, tuple[int, ...]]:
    node = helper.make_node("LSTM", ["x", "w", "r", "b"], ["", "y", ""], hidden_size=5, direction="bidirectional")
    arrays = {"w": normal(2, 20, 6), "r": normal(2, 20, 5), "b": normal(2, 40)}
    return graph_of([node], np.empty((7, 3, 6)), arrays), (7, 3, 6)


def batched() -> tuple[onnx.ModelProto, tuple[int, ...]]:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Add", ["h", "b"], ["y"])]
    return graph_of(nodes, np.empty((3, 5, 6)), {"w": normal(3, 6, 9), "b": normal(3, 1, 9)}), (3, 5, 6)


KINDS = {
    "grouped": lambda: (conv(4)[0], (1, 8, 7, 6)),
    "depthwise": lambda: (conv(8)[0], (1, 8, 7, 6)),
    "bidirectional LSTM": lstm,
    "batched MatMul": batched,
}


@pytest.mark.parametrize("kind", KINDS)
def test_groups_have_matrices_of_their_own(kind: str) -> None:
    model, shape = KINDS[kind]()
    feeds = batches(5, *shape)
    trial = rewritten(model, lambda matrix: matrix, feeds)
    groups = {"grouped": 4, "depthwise": 8, "bidirectional LSTM": 2, "batched MatMul": 3}[kind]
    assert trial.repaired.sites == {name for name in ("w", "r") if name in trial.wanted}
    for name in trial.wanted:
        grams = trial.grams[name]
        assert grams is not None
        assert grams.shape == (groups, *2 * trial.wanted[name].shape[1:])
        original = Trial(model, result=model).values(name)
        np.testing.assert_allclose(trial.values(name), original, rtol=1e-5, atol=1e-6)
    if kind == "batched MatMul":
        for index, gram in enumerate(trial.grams["w"]):
            rows = np.concatenate([one["x"][index] for one in feeds]).astype(np.float64)
            between = ~np.eye(6, dtype=bool)  # the diagonal is raised
            np.testing.assert_allclose(gram[between], (rows.T @ rows)[between], rtol=1e-4, atol=1e-3)


# Threads and failures


def test_threads_change_nothing() -> None:
    nodes = [helper.make_node("MatMul", ["x", f"w{index}"], [f"h{index}"]) for index in range(6)]
    nodes += [helper.make_node("Sum", [f"h{index}" for index in range(6)], ["s"])]
    nodes += [helper.make_node("Gemm", ["s", "v", "b"], ["y"])]
    arrays = {f"w{index}": normal(24, 24, seed=index) for index in range(6)} | {"v": normal(24, 24), "b": normal(24)}
    model, feeds = graph_of(nodes, np.empty((30, 24)), arrays), batches(4, 30, 24)
    expected = rewritten(model, coarse, feeds).result.SerializeToString()
    for threads in (1, 2, 5):
        with ThreadPoolExecutor(threads) as executor:
            assert rewritten(model, coarse, feeds, executor=executor).result.SerializeToString() == expected


def test_activations_that_are_not_finite_are_refused() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[N, 4] x) => (float[N, 4] y)
        { z = Sub(x, x) i = Div(z, z) y = MatMul(i, w) }"""
    model = parser.parse_model(text)
    model.graph.initializer.append(oracle.value("w", normal(4, 4)))
    with pytest.raises(ValidationError, match="values must be finite"):
        rewritten(model, coarse, batches(2, 3, 4))


# Without calibration data


def normalized(*, bias: bool = False, after: bool = False, shared: bool = False) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """Returns Conv(Relu(BatchNormalization(x))), with a bias of its own, or normalized again, and what it holds."""
    names = ("s", "b", "m", "v")
    arrays = {name: normal(6, seed=seed) for seed, name in enumerate(names)} | {"w": normal(5, 6, 3, 3)}
    arrays["v"] = np.exp(arrays["v"])
    nodes = [
        helper.make_node("BatchNormalization", ["x", *names], ["n"]),
        helper.make_node("Relu", ["n"], ["r"]),
        helper.make_node("Conv", ["r", "w", *(["c"] if bias else [])], ["h" if after else "y"]),
    ]
    if bias:
        arrays["c"] = normal(5)
    if after:
        more = {"s2": np.exp(normal(5)), "b2": normal(5, seed=1), "m2": normal(5, seed=2), "v2": np.exp(normal(5, seed=3))}
        arrays |= more
        nodes.append(helper.make_node("BatchNormalization", ["h", *more], ["z" if shared else "y"]))
    if shared:
        nodes.append(helper.make_node("Add", ["z", "h"], ["y"]))
    return graph_of(nodes, np.empty((2, 6, 12, 12)), arrays), arrays


def as_normalized(arrays: dict[str, Array], count: int = 20) -> list[Feeds]:
    """Returns inputs that the first normalization makes standard normal, as its statistics say."""
    mean, spread = arrays["m"].reshape(1, -1, 1, 1), np.sqrt(arrays["v"]).reshape(1, -1, 1, 1)
    return [{"x": normal(2, 6, 12, 12, seed=index) * spread + mean} for index in range(count)]


def channel_means(model: onnx.ModelProto, feeds: Sequence[Feeds]) -> Array:
    return np.mean(np.stack(outputs(model, feeds, "y")).astype(np.float64), axis=(0, 1, 3, 4))


@pytest.mark.parametrize("after", [False, True])
def test_means_follow_from_normalizations_where_there_is_no_calibration_data(after: bool) -> None:
    model, arrays = normalized(bias=not after, after=after)
    trial = rewritten(model, coarse, None)
    ((constant, values),) = trial.repaired.biases.values()
    assert (constant.name, values.dtype) == ("m2" if after else "c", np.float32)
    assert not trial.repaired.sites
    uncorrected = onnx.ModelProto()
    uncorrected.CopyFrom(trial.result)
    for tensor in uncorrected.graph.initializer:
        if tensor.name == constant.name:
            tensor.CopyFrom(oracle.value(constant.name, arrays[constant.name]))
    feeds = as_normalized(arrays)
    before, now, plain = (channel_means(one, feeds) for one in (model, trial.result, uncorrected))
    assert np.linalg.norm(now - before) < 0.05 * np.linalg.norm(plain - before)


def test_without_a_bias_or_where_others_read_the_layer_nothing_moves() -> None:
    for model in (normalized()[0], normalized(after=True, shared=True)[0], two_gemms(gemm_arrays(), "w", "b", "v", "c")):
        assert not rewritten(model, coarse, None).repaired.biases


def gemm_arrays() -> dict[str, Array]:
    return {"w": normal(6, 6), "v": normal(6, 6, seed=1), "b": normal(6), "c": normal(6, seed=1)}


def test_a_weight_that_comes_back_as_it_was_keeps_its_bias() -> None:
    model, arrays = normalized(bias=True)
    assert not rewritten(model, lambda matrix: matrix, None).repaired.biases
    assert not rewritten(model, {"w": lambda _: arrays["w"].reshape(5, -1).astype(np.float64)}, as_normalized(arrays, 4)).repaired.biases


def test_the_running_mean_of_a_normalization_is_a_bias() -> None:
    model, arrays = normalized(after=True)
    feeds = [{"x": one["x"] + np.float32(0.5)} for one in as_normalized(arrays, 6)]
    trial = rewritten(model, coarse, feeds)
    ((constant, _),) = trial.repaired.biases.values()
    assert constant.name == "m2"
    moved = channel_means(trial.result, feeds) - channel_means(model, feeds)
    assert np.abs(moved).max() < 0.02 * np.abs(channel_means(model, feeds)).max()


def test_a_table_that_is_multiplied_with_too_is_rewritten_as_it_is() -> None:
    """Its two uses have no layout in common, so the Gram matrix of the one does not fit."""
    text = """<ir_version: 8, opset_import: ["": 17]> g (int64[3] ids) => (float[3, 20] y)
        { e = Gather(t, ids) r = Relu(e) s = Transpose<perm = [1, 0]>(t) y = MatMul(r, s) }"""
    model = parser.parse_model(text)
    model.graph.initializer.append(oracle.value("t", normal(20, 8)))
    trial = rewritten(model, coarse, [{"ids": np.array([index, 3, 7])} for index in range(4)])
    assert trial.grams == {"t": None}
    np.testing.assert_array_equal(trial.wanted["t"], normal(20, 8).reshape(1, -1))
