"""Rows of a view are output channels, shown by computation: zeroing row r of the matrix zeroes channel r in ONNX Runtime.

The same holds for one index along `channel_axis` of the stored tensor, whatever only moves elements on the way to the operand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from onnxshrink.graph.files import load
from onnxshrink.graph.ir import Constant, Node, Variable
from onnxshrink.graph.views import View, is_mover, is_weight_operand, operand_view, reads_values, through
from onnxshrink.graph.weights import Weight, weights
from tests.oracle import make_model, run, session, tensor, value

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]
few = st.integers(1, 3)


@dataclass(frozen=True)
class Product:
    """A node that computes with operand ``w`` and other inputs; its output rearranged has one row for each channel.

    Attributes:
        shape: of the operand.
        inputs: of the node, ``w`` among them.
        data: shapes of the other inputs; integer ones are given as arrays.
        rows: how the output axes are moved so that the first ``row_axes`` of them make the rows.
        axis: of the operand, on which channels lie; None when there is none.
    """

    op: str
    shape: Shape
    inputs: tuple[str, ...]
    data: dict[str, Shape | Array]
    rows: tuple[int, ...]
    row_axes: int
    axis: int | None
    attributes: dict[str, Any] = field(default_factory=dict)

    def channels(self, output: Array) -> Array:
        """Returns the output with one row for each row of the matrix."""
        moved = np.moveaxis(output, self.rows, range(len(self.rows)))
        return moved.reshape(math.prod(moved.shape[: self.row_axes]), -1)


@st.composite
def convolutions(draw: st.DrawFn) -> Product:
    groups, inputs, outputs = draw(few), draw(few), draw(few)
    kernel = tuple(draw(st.lists(few, min_size=1, max_size=2)))
    shape = (groups * outputs, inputs, *kernel)
    return Product(
        "Conv", shape, ("x", "w"), {"x": (2, groups * inputs, *[4] * len(kernel))}, (1,), 1, 0, {"group": groups}
    )


@st.composite
def transposed_convolutions(draw: st.DrawFn) -> Product:
    groups, inputs, outputs = draw(few), draw(few), draw(few)
    kernel = tuple(draw(st.lists(few, min_size=1, max_size=2)))
    axis = 1 if groups == 1 else 0 if inputs == outputs == 1 else None
    shape, data = (groups * inputs, outputs, *kernel), {"x": (2, groups * inputs, *[4] * len(kernel))}
    return Product("ConvTranspose", shape, ("x", "w"), data, (1,), 1, axis, {"group": groups})


@st.composite
def gemms(draw: st.DrawFn) -> Product:
    rows, inner, columns = draw(few), draw(few), draw(few)
    trans_a, trans_b, left = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    a = (inner, rows) if trans_a else (rows, inner)
    b = (columns, inner) if trans_b else (inner, columns)
    attributes = {"transA": int(trans_a), "transB": int(trans_b)}
    if left:
        return Product("Gemm", a, ("w", "x"), {"x": b}, (0,), 1, 1 if trans_a else 0, attributes)
    return Product("Gemm", b, ("x", "w"), {"x": a}, (1,), 1, 0 if trans_b else 1, attributes)


@st.composite
def matmuls(draw: st.DrawFn) -> Product:
    rows, inner, columns = draw(few), draw(few), draw(few)
    batch = tuple(draw(st.lists(few, max_size=2)))
    other = draw(st.sampled_from([batch, ()]))
    rank = len(batch)
    if draw(st.booleans()):
        left, right = (*batch, rows, inner), (*other, inner, columns)
        return Product("MatMul", left, ("w", "x"), {"x": right}, tuple(range(rank + 1)), rank + 1, rank)
    left, right = (*other, rows, inner), (*batch, inner, columns)
    return Product("MatMul", right, ("x", "w"), {"x": left}, (*range(rank), rank + 1), rank + 1, rank + 1)


@st.composite
def lookups(draw: st.DrawFn) -> Product:
    shape = tuple(draw(st.lists(few, min_size=1, max_size=3)))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    indices = np.arange(shape[axis])
    return Product("Gather", shape, ("w", "i"), {"i": indices}, (axis,), 1, axis % len(shape), {"axis": axis})


PRODUCTS = st.one_of(convolutions(), transposed_convolutions(), gemms(), matmuls(), lookups())


@st.composite
def chains(draw: st.DrawFn, final: Shape, reshapes: bool) -> tuple[Shape, list[tuple[str, Any]]]:
    """Returns the shape of a stored tensor and movers (op, argument) that bring it to the shape ``final``."""
    steps: list[tuple[str, Any]] = []
    shape = final
    kinds = ["Transpose", "Unsqueeze", "Squeeze", "Identity", "Cast", *(["Reshape", "Flatten"] if reshapes else [])]
    for kind in draw(st.lists(st.sampled_from(kinds), max_size=4)):  # backwards, from the operand to the stored tensor
        rank = len(shape)
        if kind == "Transpose" and rank:
            axes = draw(st.permutations(range(rank)))
            steps.append((kind, list(axes)))
            before = [0] * rank
            for place, axis in enumerate(axes):
                before[axis] = shape[place]
            shape = tuple(before)
        elif kind == "Unsqueeze" and 1 in shape:
            axis = draw(st.sampled_from([axis for axis, dim in enumerate(shape) if dim == 1]))
            steps.append((kind, draw(st.sampled_from([axis, axis - rank]))))
            shape = shape[:axis] + shape[axis + 1 :]
        elif kind == "Squeeze":
            axis = draw(st.integers(0, rank))
            steps.append((kind, draw(st.sampled_from([axis, axis - rank - 1]))))
            shape = (*shape[:axis], 1, *shape[axis:])
        elif kind == "Reshape":
            steps.append((kind, [*shape[:-1], -1] if shape else []))
            shape = draw(factorisations(math.prod(shape)))
        elif kind == "Flatten" and rank == 2:
            columns = draw(factorisations(shape[1]))
            steps.append((kind, 1))
            shape = (shape[0], *columns)
        else:
            steps.append(("Identity" if kind in ("Unsqueeze", "Flatten", "Transpose") else kind, None))
    return shape, steps[::-1]


@st.composite
def factorisations(draw: st.DrawFn, size: int) -> Shape:
    shape = []
    for _ in range(draw(st.integers(0, 2))):
        factor = draw(st.sampled_from([divisor for divisor in range(1, size + 1) if size % divisor == 0]))
        shape.append(factor)
        size //= factor
    return (*shape, size)


def mover(op: str, argument: Any, source: str, target: str) -> tuple[onnx.NodeProto, list[TensorProto]]:
    """Returns a node and the initializers that it needs."""
    if op in ("Unsqueeze", "Squeeze", "Reshape"):
        axes = value(f"{target}.argument", np.reshape(argument, -1), "int64")
        return helper.make_node(op, [source, axes.name], [target]), [axes]
    attributes = {"Transpose": "perm", "Flatten": "axis"}
    given_attributes = (
        {attributes[op]: argument} if op in attributes else {"to": TensorProto.FLOAT} if op == "Cast" else {}
    )
    return helper.make_node(op, [source], [target], **given_attributes), []


def build(product: Product, stored: Shape, steps: list[tuple[str, Any]]) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """Returns a model with the stored tensor as its input ``stored``, and feeds for all inputs."""
    rng = np.random.default_rng(0)
    nodes, initializers, name = [], [], "stored"
    for index, (op, argument) in enumerate(steps):
        node, more = mover(op, argument, name, name := f"moved{index}")
        nodes.append(node)
        initializers += more
    inputs = [name if other == "w" else other for other in product.inputs]
    nodes.append(helper.make_node(product.op, inputs, ["y"], **product.attributes))
    feeds = {"stored": rng.uniform(1, 2, stored).astype(np.float32)}
    for other, data in product.data.items():
        feeds[other] = data if isinstance(data, np.ndarray) else rng.uniform(1, 2, data).astype(np.float32)
    infos = [tensor(key, array.shape, helper.np_dtype_to_tensor_dtype(array.dtype)) for key, array in feeds.items()]
    return make_model(nodes, infos, [tensor("y", None)], initializers), feeds


def weight_of(model: onnx.ModelProto, stored: Array) -> Weight | None:
    """Returns what `weights` finds when the input ``stored`` is an initializer; tensors of one element are no weights."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    model.graph.initializer.append(value("stored", stored))
    kept = [info for info in model.graph.input if info.name != "stored"]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    return next((weight for weight in weights(load(model)) if weight.site == "stored"), None)


def zero_channels(product: Product, running: Any, feeds: dict[str, Array], stored: Array) -> set[int]:
    """Returns which channels of the output are zero for that stored tensor."""
    channels = product.channels(run(running, feeds | {"stored": stored})[0])
    return {int(row) for row in np.flatnonzero((channels == 0).all(axis=1))}


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_rows_are_output_channels(data: st.DataObject) -> None:
    product = data.draw(PRODUCTS)
    stored_shape, steps = data.draw(chains(product.shape, reshapes=True))
    model, feeds = build(product, stored_shape, steps)
    stored = feeds["stored"]
    weight = weight_of(model, stored)
    if weight is None:
        assert stored.size == 1
        return
    view = weight.view
    assert view is not None
    assert weight.obstacle is None
    matrix = view.forward(stored)
    assert matrix.shape == view.shape
    np.testing.assert_array_equal(view.inverse(matrix), stored)
    running = session(model, optimise=False)
    whole = product.channels(run(running, feeds)[0])
    assert matrix.shape[0] == len(whole)
    for row in range(len(matrix)):
        cut = matrix.copy()
        cut[row] = 0
        channels = product.channels(run(running, feeds | {"stored": view.inverse(cut)})[0])
        assert not channels[row].any()
        np.testing.assert_array_equal(np.delete(channels, row, 0), np.delete(whole, row, 0))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_channel_axis_holds_output_channels(data: st.DataObject) -> None:
    product = data.draw(PRODUCTS)
    reshapes = data.draw(st.booleans())
    stored_shape, steps = data.draw(chains(product.shape, reshapes))
    model, feeds = build(product, stored_shape, steps)
    stored = feeds["stored"]
    weight = weight_of(model, stored)
    if weight is None or weight.view is None:
        assert stored.size == 1
        return
    axis = weight.view.channel_axis
    if axis is None:
        assert reshapes or product.axis is None or product.shape[product.axis] == 1
        return
    assert product.axis is not None
    channels = product.shape[product.axis]
    assert stored.shape[axis] == channels
    running = session(model, optimise=False)
    rows = np.arange(weight.view.shape[0]).reshape(-1, channels)  # every batch has all channels
    for index in range(channels):
        cut = stored.copy()
        cut[(slice(None),) * axis + (index,)] = 0
        assert zero_channels(product, running, feeds, cut) == set(rows[:, index].tolist())


@pytest.mark.parametrize(
    ("product", "stored", "steps", "axis"),
    [
        (
            Product("Conv", (4, 3, 2, 2), ("x", "w"), {"x": (1, 3, 4, 4)}, (1,), 1, 0),
            (4, 12),
            [("Reshape", [4, 3, 2, 2])],
            0,
        ),
        (
            Product("MatMul", (6, 4), ("x", "w"), {"x": (2, 6)}, (1,), 1, 1),
            (4, 2, 3),
            [("Flatten", 1), ("Transpose", [1, 0])],
            0,
        ),
        (Product("MatMul", (6, 4), ("x", "w"), {"x": (2, 6)}, (1,), 1, 1), (2, 3, 4), [("Reshape", [6, -1])], 2),
        (
            Product("MatMul", (6, 4), ("x", "w"), {"x": (2, 6)}, (1,), 1, 1),
            (4, 6),
            [("Reshape", [4, 2, 3]), ("Transpose", [1, 2, 0]), ("Reshape", [6, 4])],
            0,
        ),
        (Product("MatMul", (6, 4), ("x", "w"), {"x": (2, 6)}, (1,), 1, 1), (24,), [("Reshape", [6, 4])], None),
        (Product("MatMul", (6, 4), ("x", "w"), {"x": (2, 6)}, (1,), 1, 1), (6, 2, 2), [("Reshape", [6, 4])], None),
    ],
)
def test_the_channel_axis_survives_reshapes_that_leave_it_whole(
    product: Product, stored: Shape, steps: list[tuple[str, Any]], axis: int | None
) -> None:
    model, feeds = build(product, stored, steps)
    weight = weight_of(model, feeds["stored"])
    assert weight is not None
    assert weight.view is not None
    assert weight.view.channel_axis == axis
    if axis is not None:
        cut = feeds["stored"].copy()
        cut[(slice(None),) * axis + (0,)] = 0
        assert zero_channels(product, session(model, optimise=False), feeds, cut) == {0}


@settings(max_examples=40, deadline=None)
@given(groups=few, inputs=few, outputs=few, kernel=st.lists(few, min_size=1, max_size=2), transposed=st.booleans())
def test_columns_of_a_convolution_are_inputs_by_kernel_places(
    groups: int, inputs: int, outputs: int, kernel: list[int], transposed: bool
) -> None:
    """On a picture as large as the kernel, or of one pixel that the kernel spreads, a channel is a sum over columns."""
    rng = np.random.default_rng(0)
    op, places = ("ConvTranspose", [1] * len(kernel)) if transposed else ("Conv", kernel)
    shape = (groups * inputs, outputs, *kernel) if transposed else (groups * outputs, inputs, *kernel)
    w = rng.standard_normal(shape).astype(np.float32)
    x = rng.standard_normal((1, groups * inputs, *places)).astype(np.float32)
    node = helper.make_node(op, ["x", "w"], ["y"], group=groups)
    model = make_model([node], [tensor("x", x.shape)], [tensor("y", None)], [value("w", w)])
    view = operand_view(View((shape,)), load(model).nodes[0], 1)
    assert view is not None
    matrix = view.forward(w).reshape(groups, outputs, inputs, -1)
    expected = matrix * x.reshape(groups, 1, inputs, -1)
    expected = expected.sum(axis=2) if transposed else expected.sum(axis=(2, 3))
    np.testing.assert_allclose(run(session(model), {"x": x})[0].ravel(), expected.ravel(), rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.one_of(gemms(), matmuls(), lookups()))
def test_columns_of_a_product_are_what_is_summed_over(product: Product) -> None:
    model, feeds = build(product, product.shape, [])
    weight = weight_of(model, feeds["stored"])
    if weight is None or weight.view is None:
        assert math.prod(product.shape) == 1
        return
    matrix = weight.view.forward(feeds["stored"])
    channels = product.channels(run(session(model), feeds)[0])
    if product.op == "Gather":
        np.testing.assert_array_equal(channels, matrix)
        return
    other = feeds["x"]
    side = 0 if product.inputs[0] == "x" else 1
    if product.attributes.get(("transA", "transB")[side]):
        other = other.T
    vectors = other if side == 0 else np.swapaxes(other, -1, -2)  # [*batch, vector, summed over]
    vectors = np.broadcast_to(vectors, (*product.shape[:-2], *vectors.shape[-2:]))
    rows = matrix.reshape(*product.shape[:-2], -1, matrix.shape[1])
    expected = np.einsum("...rk,...vk->...rv", rows, vectors)
    np.testing.assert_allclose(channels, expected.reshape(channels.shape), rtol=1e-5)


class TestRecurrent:
    """Gates lie on the rows; checked by computing one step of the cell from the matrices."""

    HIDDEN, INPUTS, BATCH = 3, 4, 2

    @staticmethod
    def sigmoid(x: Array) -> Array:
        return 1 / (1 + np.exp(-x))

    def step(self, op: str, gates: Array, state: Array) -> Array:
        """Returns the new hidden state for the sums of the gates [gates, H, B], without memory cell."""
        if op == "RNN":
            return np.tanh(gates[0])
        if op == "GRU":
            update = self.sigmoid(gates[0])
            return (1 - update) * np.tanh(gates[2]) + update * state
        return self.sigmoid(gates[1]) * np.tanh(self.sigmoid(gates[0]) * np.tanh(gates[3]))

    @pytest.mark.parametrize("directions", [1, 2])
    @pytest.mark.parametrize(("op", "gates"), [("RNN", 1), ("GRU", 3), ("LSTM", 4)])
    def test_rows_are_gates_of_all_directions(self, op: str, gates: int, directions: int) -> None:
        rng = np.random.default_rng(0)
        w = rng.standard_normal((directions, gates * self.HIDDEN, self.INPUTS)).astype(np.float32)
        r = np.zeros((directions, gates * self.HIDDEN, self.HIDDEN), np.float32)
        direction = "bidirectional" if directions == 2 else "forward"
        node = helper.make_node(op, ["x", "w", "r"], ["y"], hidden_size=self.HIDDEN, direction=direction)
        model = make_model(
            [node], [tensor("x", (1, self.BATCH, self.INPUTS))], [tensor("y", None)], [value("w", w), value("r", r)]
        )
        views = {weight.site: weight.view for weight in weights(load(model))}
        assert views["w"] is not None
        assert views["w"].channel_axis == 1
        assert views["r"] is not None
        assert views["r"].shape == (directions * gates * self.HIDDEN, self.HIDDEN)
        x = rng.standard_normal((1, self.BATCH, self.INPUTS)).astype(np.float32)
        sums = views["w"].forward(w) @ x[0].T
        expected = [self.step(op, part, 0) for part in sums.reshape(directions, gates, self.HIDDEN, self.BATCH)]
        found = run(session(model), {"x": x})[0][0]
        np.testing.assert_allclose(found, np.stack(expected).transpose(0, 2, 1), atol=1e-5)


def test_rows_of_a_deformable_convolution_are_output_channels() -> None:
    rng = np.random.default_rng(0)
    w = rng.uniform(1, 2, (4, 2, 2, 2)).astype(np.float32)
    node = helper.make_node("DeformConv", ["x", "w", "offset"], ["y"], group=2)
    inputs = [tensor("x", (1, 4, 4, 4)), tensor("offset", (1, 8, 3, 3))]
    model = make_model([node], inputs, [tensor("y", None)], [value("w", w)], opset=19)
    view = weights(load(model))[0].view
    assert view is not None
    assert (view.shape, view.channel_axis) == ((4, 8), 0)
    cut = view.forward(w).copy()
    cut[2] = 0
    model.graph.initializer[0].CopyFrom(value("w", view.inverse(cut)))
    feeds = {"x": rng.uniform(1, 2, (1, 4, 4, 4)).astype(np.float32), "offset": np.zeros((1, 8, 3, 3), np.float32)}
    channels = ReferenceEvaluator(model).run(None, feeds)[0][0]
    assert (channels.reshape(4, -1) == 0).all(axis=1).tolist() == [False, False, True, False]


class TestEdges:
    """What has no view, and which inputs count as what."""

    @staticmethod
    def node(op: str, constants: tuple[Array, ...] = (), **attributes: Any) -> Node:
        inputs = [Variable("x"), *(Constant(f"c{index}", array) for index, array in enumerate(constants))]
        return Node(op, inputs, [Variable("y")], attributes)

    @pytest.mark.parametrize(
        "node",
        [
            node("Reshape", (np.array([5, -1]),)),
            node("Reshape", (np.array([0, 0, 0]),)),
            node("Reshape", (np.array([2, 3]),), allowzero=1),
            node("Reshape"),
            node("Slice", (np.array([0]), np.array([1]))),
            node("Transpose", perm=[0, 0]),
            node("Transpose", perm=[0]),
            node("Flatten", axis=3),
            node("Squeeze", axes=[0]),
            node("Squeeze", axes=[2]),
            node("Unsqueeze", axes=[0, 0]),
            Node("Reshape", [Variable("x"), Variable("shape")], [Variable("y")]),
            Node("Unsqueeze", [Variable("x"), Variable("axes")], [Variable("y")]),
            Node("Squeeze", [Variable("x"), Variable("axes")], [Variable("y")]),
            Node("Identity", [Variable("x")], [Variable("y")], domain="vendor"),
            Node("Transpose", [Variable("x")], [Variable("y")], {"perm": onnx.AttributeProto(ref_attr_name="perm")}),
        ],
    )
    def test_there_is_no_view_through_what_is_not_known(self, node: Node) -> None:
        assert through(View(((2, 3),)), node, 0) is None

    @pytest.mark.parametrize(
        ("node", "shape"),
        [
            (node("Reshape", (np.array([0, -1, 1]),)), (2, 3, 1)),
            (node("Transpose"), (3, 2)),
            (node("Flatten", axis=0), (1, 6)),
            (node("Flatten", axis=-1), (2, 3)),
            (node("Flatten", axis=2), (6, 1)),
            (node("Unsqueeze", axes=[0, -1]), (1, 2, 3, 1)),
            (node("Unsqueeze", (np.array([1]),)), (2, 1, 3)),
            (node("Cast", to=1), (2, 3)),
            (node("DequantizeLinear", (np.ones(1, np.float32),)), (2, 3)),
        ],
    )
    def test_shapes_after_movers(self, node: Node, shape: Shape) -> None:
        view = through(View(((2, 3),)), node, 0)
        assert view is not None
        assert view.shape == shape

    @pytest.mark.parametrize(
        ("attributes", "constants", "shape"),
        [({}, (), (2, 3)), ({"axes": [0]}, (), (2, 3, 1)), ({}, (np.array([-1]),), (1, 2, 3))],
    )
    def test_squeeze_drops_the_named_ones_or_all(self, attributes: Any, constants: Any, shape: Shape) -> None:
        view = through(View(((1, 2, 3, 1),)), self.node("Squeeze", constants, **attributes), 0)
        assert view is not None
        assert view.shape == shape

    @pytest.mark.parametrize(
        ("op", "operand", "shape"),
        [
            ("Conv", 1, (3,)),
            ("ConvTranspose", 1, (3, 3)),
            ("MatMul", 1, (3,)),
            ("MatMul", 0, (3,)),
            ("LSTM", 1, (3, 4)),
            ("Gather", 0, ()),
        ],
    )
    def test_tensors_of_another_rank_have_no_matrix(self, op: str, operand: int, shape: Shape) -> None:
        assert operand_view(View((shape,)), self.node(op), operand) is None

    @pytest.mark.parametrize("groups", [0, -1, 2])
    def test_groups_that_do_not_divide_the_inputs_have_no_matrix(self, groups: int) -> None:
        assert operand_view(View(((3, 2, 2),)), self.node("ConvTranspose", group=groups), 1) is None

    def test_which_inputs_are_what(self) -> None:
        assert is_mover(self.node("Concat"), 3)
        assert is_mover(self.node("Split"), 0)
        assert not is_mover(self.node("Split"), 1)
        assert not is_mover(Node("Concat", [], [], domain="vendor"), 0)
        assert is_weight_operand(self.node("Conv"), 1)
        assert not is_weight_operand(self.node("Conv"), 2)
        assert not is_weight_operand(Node("Conv", [], [], domain="vendor"), 1)
        assert not reads_values(self.node("Shape"))
        assert reads_values(self.node("Add"))
        assert reads_values(Node("Shape", [], [], domain="vendor"))
