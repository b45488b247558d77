"""Multiply-accumulates of nodes, against ONNX Runtime on ones: where each product is 1, the outputs sum to the number of products."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper

from onnxshrink.graph.files import load
from onnxshrink.graph.ir import Constant, Node, Variable
from onnxshrink.graph.work import multiply_accumulates, multiplying_ops
from onnxshrink.tracing import trace
from tests import oracle

CASES: dict[str, tuple[str, list[tuple[int, ...]], dict[str, Any]]] = {
    "Conv": ("Conv", [(2, 4, 7, 6), (6, 4, 3, 2)], {}),
    "Conv with strides and dilations": ("Conv", [(2, 4, 9, 9), (6, 4, 3, 3)], {"strides": [2, 1], "dilations": [1, 2]}),
    "Conv of one axis": ("Conv", [(3, 4, 9), (6, 4, 3)], {}),
    "Conv in groups": ("Conv", [(2, 6, 5, 5), (9, 2, 3, 3)], {"group": 3}),
    "depthwise Conv": ("Conv", [(2, 6, 5, 5), (12, 1, 3, 3)], {"group": 6}),
    "ConvTranspose": ("ConvTranspose", [(2, 4, 5, 3), (4, 6, 3, 2)], {"strides": [2, 3]}),
    "ConvTranspose in groups": ("ConvTranspose", [(2, 6, 5, 5), (6, 2, 2, 2)], {"group": 3}),
    "Gemm": ("Gemm", [(3, 4), (4, 5)], {}),
    "Gemm transA": ("Gemm", [(4, 3), (4, 5)], {"transA": 1}),
    "Gemm transB": ("Gemm", [(3, 4), (5, 4)], {"transB": 1}),
    "Gemm transA and transB": ("Gemm", [(4, 3), (5, 4)], {"transA": 1, "transB": 1}),
    "MatMul": ("MatMul", [(3, 4), (4, 5)], {}),
    "MatMul, batched": ("MatMul", [(2, 3, 6, 4), (2, 3, 4, 5)], {}),
    "MatMul, batched by one side": ("MatMul", [(7, 2, 6, 4), (4, 5)], {}),
    "MatMul, batches that are repeated": ("MatMul", [(3, 1, 6, 4), (2, 4, 5)], {}),
    "MatMul with a vector": ("MatMul", [(2, 3, 4), (4,)], {}),
    "MatMul of a vector": ("MatMul", [(4,), (2, 4, 5)], {}),
    "MatMul of two vectors": ("MatMul", [(4,), (4,)], {}),
    "Einsum": ("Einsum", [(2, 5, 4), (4, 3, 6)], {"equation": "bsi, ihd -> bhsd"}),
    "Einsum without an arrow": ("Einsum", [(2, 5), (5, 3)], {"equation": "ij,jk"}),
    "Einsum of three": ("Einsum", [(2, 3), (3, 4), (4, 2)], {"equation": "ij,jk,kl->il"}),
    "Einsum with an ellipsis": ("Einsum", [(2, 3, 5, 4), (4, 6)], {"equation": "...i,io->...o"}),
    "Einsum that repeats an axis of size 1": ("Einsum", [(2, 5), (1, 3)], {"equation": "ij,jk->ik"}),
}


@pytest.mark.parametrize("stored", [False, True], ids=["computed", "stored"])
@pytest.mark.parametrize("case", CASES)
def test_every_product_counts_once(case: str, stored: bool) -> None:
    op, shapes, attributes = CASES[case]
    names = [f"x{index}" for index in range(len(shapes))]
    ones = {name: np.ones(shape, np.float32) for name, shape in zip(names, shapes, strict=True)}
    held = [oracle.value(name, ones[name]) for name in names[1:] if stored]
    inputs = [oracle.tensor(name, array.shape) for name, array in ones.items() if not stored or name == "x0"]
    model = oracle.make_model([helper.make_node(op, names, ["y"], **attributes)], inputs, [oracle.tensor("y", None)], held)
    feeds = {info.name: ones[info.name] for info in inputs}
    (output,) = oracle.run(oracle.session(model), feeds)
    graph = load(model)
    (done,) = trace(graph, feeds).values()
    assert multiply_accumulates(graph.nodes[0], done.input_shapes, done.output_shapes) == output.sum()


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_recurrent_layers_multiply_input_and_state_at_each_step(op: str, gates: int, directions: int) -> None:
    steps, batch, inputs, hidden = 5, 2, 3, 4
    weights = [oracle.value("w", np.ones((directions, gates * hidden, inputs), np.float32)), oracle.value("r", np.ones((directions, gates * hidden, hidden), np.float32))]
    for outputs in (["y"], ["", "y"]):
        node = helper.make_node(op, ["x", "w", "r"], outputs, hidden_size=hidden, direction="bidirectional" if directions == 2 else "forward")
        model = oracle.make_model([node], [oracle.tensor("x", [steps, batch, inputs])], [oracle.tensor("y", None)], weights)
        graph = load(model)
        (done,) = trace(graph, {"x": np.ones((steps, batch, inputs), np.float32)}).values()
        expected = sum(inputs + hidden for _ in range(steps) for _ in range(batch) for _ in range(directions) for _ in range(gates * hidden))
        assert multiply_accumulates(graph.nodes[0], done.input_shapes, done.output_shapes) == expected


def test_shapes_of_constants_need_not_be_given() -> None:
    node = Node("MatMul", [Variable("x"), Constant("w", np.ones((4, 5), np.float32))], [Variable("y")])
    assert multiply_accumulates(node, [(3, 4)], [(3, 5)]) == 60
    assert multiply_accumulates(node, [(3, 4), (99, 99)], [(3, 5)]) == 60


def test_what_is_no_product_counts_nothing() -> None:
    assert set(multiplying_ops()) == {"Conv", "ConvTranspose", "Einsum", "GRU", "Gemm", "LSTM", "MatMul", "RNN"}
    assert multiply_accumulates(Node("Relu", [Variable("x")], [Variable("y")]), [(3, 4)], [(3, 4)]) == 0
    other = Node("MatMul", [Variable("x"), Variable("w")], [Variable("y")], domain="test")
    assert multiply_accumulates(other, [(3, 4), (4, 5)], [(3, 5)]) == 0
