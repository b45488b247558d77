"""Shapes that one run tells: compared with the shapes that ONNX Runtime computes from different data."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxshrink.graph.files import load
from onnxshrink.graph.fixed_shapes import fixed_shapes
from tests import oracle

INT64 = TensorProto.INT64


def model(*nodes: onnx.NodeProto, constants: tuple[Any, ...] = (), sides: tuple[Any, ...] = (2, 6)) -> onnx.ModelProto:
    outputs = [oracle.tensor(nodes[-1].output[0], None)]
    return oracle.make_model(list(nodes), [oracle.tensor("x", sides)], outputs, list(constants), opset=18)


def shapes_of(proto: onnx.ModelProto, data: np.ndarray) -> dict[str, tuple[int, ...]]:
    """Returns what ONNX Runtime computes for every tensor."""
    wide = onnx.ModelProto()
    wide.CopyFrom(proto)
    del wide.graph.output[:]
    names = [name for node in wide.graph.node for name in node.output]
    wide.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    running = oracle.session(wide, optimise=False)
    return {name: np.shape(value) for name, value in zip(names, oracle.run(running, {"x": data}), strict=True)}


CASES = {
    "element-wise": model(helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Abs", ["a"], ["y"])),
    "sizes of sizes": model(
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("ConstantOfShape", ["s"], ["z"]),
        helper.make_node("Add", ["z", "x"], ["y"]),
    ),
    "as long as the data says": model(
        helper.make_node("NonZero", ["x"], ["n"]),
        helper.make_node("Shape", ["n"], ["s"]),
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("ConstantOfShape", ["s"], ["y"]),
    ),
    "sizes from data": model(
        helper.make_node("ReduceMax", ["x"], ["m"], keepdims=0),
        helper.make_node("Cast", ["m"], ["i"], to=INT64),
        helper.make_node("Range", ["zero", "i", "one"], ["r"]),
        helper.make_node("Cast", ["r"], ["y"], to=TensorProto.FLOAT),
        constants=(oracle.value("zero", np.int64(0)), oracle.value("one", np.int64(1))),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_called_fixed_is_the_same_for_all_data(name: str) -> None:
    found = fixed_shapes(load(CASES[name]))
    few, many = (shapes_of(CASES[name], np.array(data, np.float32)) for data in ([[0, 0, 1, 0, 0, 0]] * 2, [[1, 2, 3, 4, 5, 6]] * 2))
    assert found == {key for key in few if few[key] == many[key]}


def test_nothing_is_fixed_where_an_input_is_not() -> None:
    assert fixed_shapes(load(model(helper.make_node("Relu", ["x"], ["y"]), sides=("N", 6)))) == set()


def test_bodies_and_ops_of_others_are_not_trusted() -> None:
    foreign = helper.make_node("Gelu", ["x"], ["g"], domain="com.microsoft")
    assert fixed_shapes(load(model(foreign, helper.make_node("Relu", ["g"], ["y"])))) == set()
