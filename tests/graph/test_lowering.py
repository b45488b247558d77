"""A lowering is right when W X^T is what ONNX Runtime computes: that proves column order, pads, strides, groups and all."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx import helper, parser

from onnxshrink.graph.files import load
from onnxshrink.graph.lowering import Lowering, lowerings
from onnxshrink.graph.weights import Weight, weights
from tests.oracle import make_model, run, session, tensor, value

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]
few = st.integers(1, 3)
flag = st.booleans()


def random(*shape: int) -> Array:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


@dataclass(frozen=True)
class Case:
    """One node with the weight ``w``, its other inputs by name in order of use, and its outputs."""

    op: str
    inputs: tuple[str, ...]
    arrays: dict[str, Array]
    attributes: dict[str, Any] = field(default_factory=dict)
    outputs: tuple[str, ...] = ("y",)

    def model(self, constants: tuple[str, ...] = ("w",)) -> onnx.ModelProto:
        node = helper.make_node(self.op, list(self.inputs), list(self.outputs), **self.attributes)
        types = {np.dtype(np.float32): onnx.TensorProto.FLOAT, np.dtype(np.int32): onnx.TensorProto.INT32}
        fed = [name for name in self.arrays if name not in constants]
        return make_model(
            [node],
            [tensor(name, self.arrays[name].shape, types[self.arrays[name].dtype]) for name in fed],
            [tensor(name, None) for name in self.outputs if name],
            [value(name, self.arrays[name]) for name in constants],
        )

    def checked(self) -> Case:
        """Returns itself if both weights have more than one number: a single one is no weight."""
        assume(self.arrays["w"].size > 1 and self.arrays.get("r", self.arrays["w"]).size > 1)
        return self

    def run(self) -> Array:
        output: Array = run(session(self.model(()), optimise=False), self.arrays)[0]
        return output

    def lowered(self) -> tuple[Weight, Lowering]:
        ((weight, ways),) = lowerings(graph := load(self.model()), weights(graph))
        assert isinstance(ways, tuple), ways
        (lowering,) = ways
        return weight, lowering

    def positions(self, **others: Array) -> tuple[Array, Array]:
        """Returns W [groups, rows, columns] and X [groups, positions, columns], float64."""
        weight, lowering = self.lowered()
        values = {source: {**self.arrays, **others}[name_of(source)] for source in lowering.sources}
        chunks = list(lowering.chunks(values))
        assert all(chunk.shape[::2] == (lowering.groups, lowering.columns) for chunk in chunks)
        assert weight.view is not None
        matrix = weight.view.forward(self.arrays["w"])
        assert matrix.shape[1] == lowering.columns
        stacked = np.concatenate(chunks, axis=1)
        return matrix.reshape(lowering.groups, -1, lowering.columns).astype(np.float64), stacked.astype(np.float64)

    def products(self, **others: Array) -> Array:
        """Returns W X^T, [rows, positions]."""
        matrix, positions = self.positions(**others)
        return (matrix @ positions.swapaxes(1, 2)).reshape(-1, positions.shape[1])


    def check_outputs(self) -> None:
        """Compares ``outputs`` of what the node computes with the products that it should be, group by group."""
        _, lowering = self.lowered()
        matrix, positions = self.positions()
        assert lowering.is_linear
        close(lowering.outputs(self.run()), positions @ matrix.swapaxes(1, 2))


def name_of(source: Any) -> str:
    return str(getattr(source, "site", source.name))


def close(found: Array, expected: Array) -> None:
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@st.composite
def products(draw: st.DrawFn) -> tuple[Case, Array]:
    rows, inner, columns = draw(few), draw(few), draw(few)
    left = draw(flag)
    own = tuple(draw(st.lists(few, max_size=3)))
    other = tuple(draw(st.sampled_from([1, dim])) if dim > 1 else draw(few) for dim in own)
    other = other[draw(st.integers(0, len(other))) :] if draw(flag) else (*draw(st.lists(few, max_size=1)), *other)
    if left:
        w, x = random(*own, rows, inner), random(*other, inner, columns)
        x = x[..., 0] if not other and draw(flag) else x
    else:
        x, w = random(*other, rows, inner), random(*own, inner, columns)
        x = x[0] if not other and draw(flag) else x
    case = Case("MatMul", ("w", "x") if left else ("x", "w"), {"x": x, "w": w})
    case.checked()
    y = np.matmul(w, x[:, None] if x.ndim == 1 else x) if left else np.matmul(x[None] if x.ndim == 1 else x, w)
    y = case.run().reshape(y.shape)
    rank = y.ndim - 2
    batch = (1,) * (rank - len(own)) + own
    grouped = [axis for axis in range(rank) if batch[axis] > 1]
    summed = [axis for axis in range(rank) if axis not in grouped]
    order = (*grouped, rank, *summed, rank + 1) if left else (*grouped, rank + 1, *summed, rank)
    return case, y.transpose(order).reshape(math.prod(own) * (rows if left else columns), -1)


@given(products())
def test_matmul(drawn: tuple[Case, Array]) -> None:
    case, expected = drawn
    close(case.products(), expected)
    case.check_outputs()


@given(few, few, few, flag, flag, flag, st.sampled_from([1.0, 0.5, -2.0]))
def test_gemm(rows: int, inner: int, columns: int, trans_a: bool, trans_b: bool, left: bool, alpha: float) -> None:
    a = random(inner, rows) if trans_a else random(rows, inner)
    b = random(columns, inner) if trans_b else random(inner, columns)
    attributes = {"transA": int(trans_a), "transB": int(trans_b), "alpha": alpha}
    arrays = {"w": a, "x": b} if left else {"x": a, "w": b}
    case = Case("Gemm", tuple(arrays), arrays, attributes).checked()
    close(case.products(), case.run() if left else case.run().T)
    case.check_outputs()


@st.composite
def convolutions(draw: st.DrawFn) -> Case:
    rank, groups = draw(few), draw(few)
    per_axis = st.lists(few, min_size=rank, max_size=rank)
    kernel, strides, dilations = draw(per_axis), draw(per_axis), draw(per_axis)
    auto = draw(st.sampled_from(["NOTSET", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    attributes: dict[str, Any] = {"group": groups, "strides": strides}
    if auto == "NOTSET":
        attributes["pads"] = draw(st.lists(st.integers(0, 2), min_size=2 * rank, max_size=2 * rank))
    else:
        attributes["auto_pad"] = auto
    if not auto.startswith("SAME"):  # ONNX Runtime refuses dilations there
        attributes["dilations"] = dilations
    if draw(flag):
        attributes["kernel_shape"] = kernel
    per_group = draw(few)
    space = draw(st.lists(st.integers(7, 9), min_size=rank, max_size=rank))
    x, w = random(draw(few), groups * per_group, *space), random(groups * draw(few), per_group, *kernel)
    return Case("Conv", ("x", "w"), {"x": x, "w": w}, attributes).checked()


@given(convolutions())
def test_conv(case: Case) -> None:
    expected = case.run()
    assume(expected.size)
    close(case.products(), np.moveaxis(expected, 1, 0).reshape(expected.shape[1], -1))
    case.check_outputs()


@st.composite
def transposed_convolutions(draw: st.DrawFn) -> Case:
    rank, groups, per_group, outputs = draw(st.integers(1, 3)), draw(few), draw(few), draw(few)
    per_axis = st.lists(few, min_size=rank, max_size=rank)
    kernel, strides, dilations, space = draw(per_axis), draw(per_axis), draw(per_axis), draw(per_axis)
    attributes: dict[str, Any] = {"group": groups, "strides": strides, "dilations": dilations}
    extra = [draw(st.integers(0, stride - 1)) for stride in strides]
    if draw(flag):
        attributes["output_padding"] = extra
    else:
        extra = [0] * rank
    auto = draw(st.sampled_from(["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    full = [
        (size - 1) * stride + more + (k - 1) * dilation + 1
        for size, stride, more, k, dilation in zip(space, strides, extra, kernel, dilations, strict=True)
    ]
    if auto != "NOTSET":
        attributes["auto_pad"] = auto
    elif draw(flag):
        attributes["pads"] = draw(st.lists(st.integers(0, 2), min_size=2 * rank, max_size=2 * rank))
        pads = attributes["pads"]
        assume(all(size > pads[axis] + pads[axis + rank] for axis, size in enumerate(full)))
    if auto != "VALID" and "pads" not in attributes and draw(flag):
        attributes["output_shape"] = [draw(st.integers(max(1, size - 3), size)) for size in full]
    x, w = random(draw(few), groups * per_group, *space), random(groups * per_group, outputs, *kernel)
    return Case("ConvTranspose", ("x", "w"), {"x": x, "w": w}, attributes).checked()


@settings(suppress_health_check=[HealthCheck.filter_too_much])
@given(transposed_convolutions())
def test_conv_transpose(case: Case) -> None:
    expected = case.run()
    close(case.products(), np.moveaxis(expected, 1, 0).reshape(expected.shape[1], -1))
    case.check_outputs()


GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


@st.composite
def recurrences(draw: st.DrawFn, op: str) -> Case:
    steps, batch, inputs, hidden = draw(st.integers(1, 4)), draw(few), draw(few), draw(few)
    direction = draw(st.sampled_from(["forward", "reverse", "bidirectional"]))
    both, gates = 2 if direction == "bidirectional" else 1, GATES[op]
    arrays = {
        "x": random(steps, batch, inputs),
        "w": random(both, gates * hidden, inputs),
        "r": random(both, gates * hidden, hidden),
        "b": random(both, 2 * gates * hidden),
        "lengths": np.array(draw(st.lists(st.integers(1, steps), min_size=batch, max_size=batch)), np.int32),
        "initial": random(both, batch, hidden),
    }
    attributes: dict[str, Any] = {"hidden_size": hidden, "direction": direction}
    if op == "GRU":
        attributes["linear_before_reset"] = draw(st.integers(0, 1))
        if draw(flag):
            attributes["clip"] = 0.5
    names = ("x", "w", "r", *(name if draw(flag) else "" for name in ("b", "lengths", "initial")))
    return Case(op, names, {name: arrays[name] for name in names if name}, attributes).checked()


def swapped(case: Case) -> Case:
    """Returns the case with the recurrent weight called w."""
    swap = {"w": "r", "r": "w"}
    arrays = {swap.get(name, name): array for name, array in case.arrays.items()}
    return Case(case.op, tuple(swap.get(name, name) for name in case.inputs), arrays, case.attributes)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def cells(case: Case) -> tuple[Array, Array]:
    """Returns what the cells put out, [directions, positions, hidden], from lowered inputs and states alone, and what they should."""
    y = case.run()
    steps, both, batch, hidden = y.shape
    lengths = case.arrays.get("lengths", np.full(batch, steps))
    kept = np.arange(steps)[:, None] < lengths
    inputs = case.products().reshape(both, -1, int(kept.sum()))
    own_weight, states = swapped(case).positions(y=y)
    gates = GATES[case.op]
    own = (own_weight @ states.swapaxes(1, 2)).reshape(both, -1, int(kept.sum()))
    bias = case.arrays.get("b", np.zeros((both, 2 * gates * hidden)))
    ins = (inputs + bias[:, : gates * hidden, None]).reshape(both, gates, hidden, -1)
    recs = (own + bias[:, gates * hidden :, None]).reshape(both, gates, hidden, -1)
    before = states.reshape(both, -1, *states.shape[1:])[:, 0].swapaxes(1, 2)
    clip = case.attributes.get("clip", np.inf)
    if case.op == "RNN":
        found = np.tanh(ins + recs)[:, 0]
    elif case.op == "GRU":
        z, r = (sigmoid(np.clip(ins[:, gate] + recs[:, gate], -clip, clip)) for gate in (0, 1))
        third = ins[:, 2] + (r * recs[:, 2] if case.attributes["linear_before_reset"] else recs[:, 2])
        found = (1 - z) * np.tanh(np.clip(third, -clip, clip)) + z * before
    else:
        found = remembered(ins + recs, kept, case.attributes["direction"])
    return found.swapaxes(1, 2), np.moveaxis(y, 1, 0)[:, kept]


def remembered(gates: Array, kept: Array, direction: str) -> Array:
    """Returns the outputs of LSTM cells [directions, hidden, positions] from what goes into their gates."""
    i, o, f, c = gates.swapaxes(0, 1)
    i, o, f, c = sigmoid(i), sigmoid(o), sigmoid(f), np.tanh(c)
    place = np.cumsum(kept.reshape(-1)).reshape(kept.shape) - 1
    outputs = np.empty(i.shape)
    for way in range(len(i)):
        for column in range(kept.shape[1]):
            cell = np.zeros(i.shape[1])
            order = place[:, column][kept[:, column]]
            for at in order[::-1] if direction == "reverse" or way else order:
                cell = f[way, :, at] * cell + i[way, :, at] * c[way, :, at]
                outputs[way, :, at] = o[way, :, at] * np.tanh(cell)
    return outputs


@pytest.mark.parametrize("op", GATES)
@given(st.data())
def test_recurrences(op: str, data: st.DataObject) -> None:
    found, expected = cells(case := data.draw(recurrences(op)))
    close(found, expected)
    _, lowering = case.lowered()
    assert not lowering.is_linear
    with pytest.raises(TypeError, match=r"^lowering: unfold must be linear, got StepInputs$"):
        lowering.outputs(case.run())


@pytest.mark.parametrize("op", GATES)
def test_batch_first(op: str) -> None:
    """Layout 1, which ONNX Runtime 1.31 has on no CPU: the same numbers in another order."""
    gates, both, steps, batch, inputs, hidden = GATES[op], 2, 4, 3, 2, 3
    arrays = {
        "x": random(steps, batch, inputs),
        "r": random(both, gates * hidden, inputs),
        "w": random(both, gates * hidden, hidden),
        "lengths": np.array([4, 2, 3], np.int32),
        "initial": random(both, batch, hidden),
    }
    names = ("x", "r", "w", "", "lengths", "initial")
    case = Case(op, names, arrays, {"hidden_size": hidden, "direction": "bidirectional"})
    y = case.run()
    moved = {"x": arrays["x"].swapaxes(0, 1), "initial": arrays["initial"].swapaxes(0, 1)}
    other = Case(op, names, arrays | moved, case.attributes | {"layout": 1})
    np.testing.assert_array_equal(other.positions(y=y.transpose(2, 0, 1, 3))[1], case.positions(y=y)[1])
    np.testing.assert_array_equal(swapped(other).positions()[1], swapped(case).positions()[1])


def found(text: str) -> dict[str, tuple[Lowering, ...] | str]:
    graph = load(parser.parse_model(text))
    return {weight.constant.name: ways for weight, ways in lowerings(graph, weights(graph))}


HEAD = '<ir_version: 8, opset_import: ["": 17]> '


def test_movers_on_the_way_change_nothing() -> None:
    stored, x = random(3, 2).astype(np.float16), random(4, 2)
    model = parser.parse_model(
        f"{HEAD} g (float[4, 2] x) => (float[4, 3] y) {{ a = Cast<to = 1>(w) b = Transpose(a) y = MatMul(x, b) }}"
    )
    model.graph.initializer.append(value("w", stored))
    graph = load(model)
    (weight,) = weights(graph)
    ((_, ways),) = lowerings(graph, [weight])
    assert isinstance(ways, tuple)
    (chunk,) = ways[0].chunks({ways[0].sources[0]: x})
    assert weight.view is not None
    close(weight.view.forward(stored).astype(np.float32) @ chunk[0].T, (x @ stored.astype(np.float32).T).T)


def test_layers_with_one_input_and_geometry_are_lowered_alike() -> None:
    ways = found(f"""{HEAD} g (float[1, 2, 4, 4] x) => (float[1, 2, 4, 4] y, float[1, 3, 4, 4] z, float[1, 2, 2, 2] s)
        <float[2, 2, 1, 1] q = {{1, 2, 3, 4}}, float[3, 2, 1, 1] k = {{1, 2, 3, 4, 5, 6}}, float[2, 2, 1, 1] v = {{1, 2, 3, 4}}>
        {{ y = Conv(x, q) z = Conv(x, k) s = Conv<strides = [2, 2]>(x, v) }}""")
    assert ways["q"] == ways["k"] != ways["v"]
    assert hash(ways["q"]) == hash(ways["k"])


def test_a_tied_weight_has_a_lowering_for_each_use() -> None:
    ways = found(f"""{HEAD} g (float[4, 2] x) => (float[4, 2] y) <float[2, 2] w = {{1, 2, 3, 4}}>
        {{ a = MatMul(x, w) y = MatMul(a, w) }}""")["w"]
    assert isinstance(ways, tuple)
    assert [source.name for way in ways for source in way.sources] == ["x", "a"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<float[2, 2] w = {1, 2, 3, 4}> { y = Add(x, w) }", "no node multiplies with it"),
        ("<float[2, 2] w = {1, 2, 3, 4}> { a = MatMul(x, w) y = Gemm<transB = 1>(a, w) }", "nodes that share it read it as different matrices"),
        ("<float[2] w = {1, 2}> { a = MatMul(x, w) y = Identity(a) }", "rearranged in an unknown way before MatMul 'a'"),
        ("<float[1, 2] w = {1, 2}> { c = Concat<axis = 0>(w, x) y = MatMul(x, c) }", "rearranged in an unknown way before MatMul 'y'"),
    ],
)  # fmt: skip
def test_reasons(text: str, reason: str) -> None:
    assert found(f"{HEAD} g (float[2, 2] x) => (float[2, 2] y) {text}")["w"] == reason


def test_groups_of_tied_convolutions_must_agree() -> None:
    ways = found(f"""{HEAD} g (float[1, 1, 4] x, float[1, 2, 4] z) => (float[1, 2, 4] y, float[1, 2, 4] v)
        <float[2, 1, 1] w = {{1, 2}}> {{ y = Conv(x, w) v = Conv<group = 2>(z, w) }}""")
    assert ways["w"] == "nodes that share it have different groups"


def test_a_deformed_convolution_has_no_order() -> None:
    text = """<ir_version: 9, opset_import: ["": 19]> g (float[1, 1, 3, 3] x, float[1, 8, 2, 2] o) => (float[1, 1, 2, 2] y)
        <float[1, 1, 2, 2] w = {1, 2, 3, 4}> { y = DeformConv(x, w, o) }"""
    assert found(text)["w"] == "DeformConv does not multiply with it in a known order"


def test_another_reset_activation_is_refused() -> None:
    case = Case("GRU", ("x", "r", "w"), {"x": random(2, 1, 2), "r": random(1, 6, 2), "w": random(1, 6, 2)},
                {"hidden_size": 2, "activations": ["Tanh", "Tanh"]})  # fmt: skip
    graph = load(case.model(("w", "r")))
    ways = {weight.constant.name: way for weight, way in lowerings(graph, weights(graph))}
    assert ways["w"] == "the reset gate of GRU 'y' has another activation than Sigmoid"
    assert isinstance(ways["r"], tuple)


def test_weights_inside_bodies_have_none() -> None:
    text = f"""{HEAD} g (float[2, 2] x, bool c) => (float[2, 2] y) <float[2, 2] w = {{1, 2, 3, 4}}> {{ y = If(c) <
        then_branch = t () => (float[2, 2] p) {{ p = MatMul(x, w) }}, else_branch = e () => (float[2, 2] q) {{ q = Neg(x) }}> }}"""
    assert found(text)["w"] == "weights inside bodies have no calibration activations"
