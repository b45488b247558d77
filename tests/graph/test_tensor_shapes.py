"""Shapes of tensors behind ops that onnx no longer knows, compared with what ONNX Runtime computes."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from onnxshrink.graph.excerpt import tensors_by_name
from onnxshrink.graph.files import load
from onnxshrink.graph.tensor_shapes import tensor_shapes
from tests import oracle


def test_retired_ops_keep_or_crop_their_input() -> None:
    weights = np.random.default_rng(0).standard_normal((5, 3, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("ImageScaler", ["x"], ["scaled"], scale=2.0, bias=[1.0, 2.0, 3.0]),
        helper.make_node("Conv", ["scaled", "w"], ["c"]),
        helper.make_node("Crop", ["c"], ["cropped"], border=[1, 2, 3, 1]),
        helper.make_node("Affine", ["cropped"], ["y"], alpha=2.0, beta=1.0),
    ]
    outputs = [onnx.ValueInfoProto(name=name) for name in ("scaled", "c", "cropped", "y")]
    model = oracle.make_model(nodes, [oracle.tensor("x", (1, 3, 12, 14))], outputs, [oracle.value("w", weights)], opset=7)
    running = oracle.session(model, optimise=False)
    expected = [np.shape(value) for value in oracle.run(running, {"x": np.ones((1, 3, 12, 14), np.float32)})]
    graph = load(model)
    shapes, tensors = tensor_shapes(graph), tensors_by_name(graph)
    assert [shapes[id(tensors[name])] for name in ("scaled", "c", "cropped", "y")] == expected
