"""What a node reads of a stored weight, against what ONNX Runtime makes of it on the way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from onnxshrink.graph.files import load
from onnxshrink.graph.weight_values import computed_matrix, computed_type, conversions
from onnxshrink.graph.weights import Use, Weight, weights
from tests.oracle import make_model, run, session, tensor, value

Array = np.ndarray[Any, Any]


def found(nodes: list[Any], arrays: dict[str, Array], opset: int = 21) -> tuple[Weight, Use, Array]:
    """Returns the weight ``w`` of a model that ends in MatMul(x, m), its use, and m as ONNX Runtime computes it."""
    stored = [value(name, array) for name, array in arrays.items()]
    seen = make_model(nodes, [], [tensor("m", None)], stored, opset=opset, ir_version=10)
    (matrix,) = run(session(seen, optimise=False), {})
    product = helper.make_node("MatMul", ["x", "m"], ["y"])
    model = make_model([*nodes, product], [tensor("x", [1, matrix.shape[0]])], [tensor("y", None)], stored, opset=opset, ir_version=10)
    weight = next(weight for weight in weights(load(model)) if weight.constant.name == "w")
    return weight, weight.uses[0], matrix


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([np.int8, np.uint8]),
    st.sampled_from(["tensor", "axis", "blocks"]),
    st.sampled_from([0, 1, -1, -2]),
    st.booleans(),
    st.booleans(),
)
def test_quantized_weights(kind: Any, how: str, axis: int, has_zero: bool, transposed: bool) -> None:
    rng = np.random.default_rng(0)
    w = rng.integers(np.iinfo(kind).min, np.iinfo(kind).max, (6, 8)).astype(kind)
    shape = {"tensor": (), "axis": (w.shape[axis],), "blocks": tuple(size // 2 if index == axis % 2 else size for index, size in enumerate(w.shape))}[how]
    arrays = {"w": w, "s": (rng.random(shape) + 0.1).astype(np.float32)}
    if has_zero:
        arrays["z"] = rng.integers(0, 9, shape).astype(kind)
    attributes = {"tensor": {}, "axis": {"axis": axis}, "blocks": {"axis": axis, "block_size": 2}}[how]
    nodes = [helper.make_node("DequantizeLinear", list(arrays), ["d"], **attributes)]
    nodes.append(helper.make_node("Transpose" if transposed else "Identity", ["d"], ["m"]))
    weight, use, matrix = found(nodes, arrays)
    assert computed_type(weight, use) == np.float32
    np.testing.assert_allclose(computed_matrix(weight, use), matrix.T, rtol=1e-6)
    assert [step[0] for step in conversions(use)] == ["DequantizeLinear"]


def test_what_is_rounded_on_the_way_is_rounded() -> None:
    nodes = [
        helper.make_node("Cast", ["w"], ["a"], to=10),
        helper.make_node("Reshape", ["a", "shape"], ["b"]),
        helper.make_node("Cast", ["b"], ["m"], to=1),
    ]
    arrays = {"w": np.linspace(0, 1, 12, dtype=np.float32), "shape": np.array([3, 4])}
    weight, use, matrix = found(nodes, arrays, 17)
    assert computed_type(weight, use) == np.float32
    np.testing.assert_array_equal(computed_matrix(weight, use), matrix.T)
    assert (computed_matrix(weight, use) != arrays["w"].reshape(3, 4).T).any()


@pytest.mark.parametrize("scale", [np.float16, np.float32])
def test_the_scale_says_the_type(scale: Any) -> None:
    nodes = [helper.make_node("DequantizeLinear", ["w", "s"], ["d"]), helper.make_node("Cast", ["d"], ["m"], to=1)]
    arrays = {"w": np.arange(12, dtype=np.int8).reshape(3, 4), "s": np.array(0.1, scale)}
    weight, use, matrix = found(nodes, arrays)
    np.testing.assert_allclose(computed_matrix(weight, use), matrix.T, rtol=1e-3)
    start = Use(use.node, use.operand, use.path[:1], use.view)
    assert computed_type(weight, start) == scale
    assert computed_type(weight, use) == np.float32
