"""What ONNX Runtime makes of a Huffman coded model when a session starts: the graph of the dense one, with no decoder left in it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from onnxshrink.contract import Context
from onnxshrink.graph.edit import sort_nodes
from onnxshrink.graph.exporter import to_model
from onnxshrink.graph.files import load
from onnxshrink.passes.huffman import Huffman
from onnxshrink.passes.share_weights import ShareWeights
from tests import oracle
from tests.corpus import ABSENT, model_names, model_path

Array = np.ndarray[Any, np.dtype[Any]]
OPSETS = (11, 13, 17, 21)


def normal(*shape: int) -> Array:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def conv_and_matmul(opset: int) -> onnx.ModelProto:
    """Returns y = softmax(flatten(relu(conv(x))) · W)."""
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["c"], kernel_shape=[3, 3]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Flatten", ["r"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["m"]),
        helper.make_node("Softmax", ["m"], ["y"], axis=1),
    ]
    return oracle.make_model(
        nodes,
        [oracle.tensor("x", [1, 32, 6, 6])],
        [oracle.tensor("y", [1, 60])],
        [oracle.value("k", normal(64, 32, 3, 3)), oracle.value("w", normal(1024, 60))],
        opset=opset,
    )


def huffman_coded(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """Returns the model with 5-bit codes, Huffman coded, and how many weights are."""
    graph = load(model)
    ShareWeights(bits=5, method="uniform", per="scale").apply(graph, Context())
    report = Huffman(raise_opset=True).apply(graph, Context())
    sort_nodes(graph)
    return to_model(graph), len(report.changes)


def optimized(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """Returns what ONNX Runtime makes of a model at its default level, and runs."""
    oracle.session(model, optimised_to=path)
    return onnx.load(path)


def all_ops(nodes: Any) -> Counter[tuple[str, str]]:
    """Counts (domain, op) of nodes and of those in their bodies."""
    found: Counter[tuple[str, str]] = Counter()
    for node in nodes:
        found[node.domain, node.op_type] += 1
        for attribute in node.attribute:
            found += all_ops(attribute.g.node)
    return found


def assert_decoder_folds(dense: onnx.ModelProto, tmp_path: Path) -> None:
    coded, count = huffman_coded(dense)
    assert count > 0
    assert coded.functions, "it has a decoder"
    before, after = optimized(dense, tmp_path / "dense.onnx"), optimized(coded, tmp_path / "coded.onnx")
    assert all_ops(after.graph.node) == all_ops(before.graph.node)
    assert not after.functions
    kinds = (before, after)
    shapes = [Counter((tuple(item.dims), item.data_type) for item in model.graph.initializer) for model in kinds]
    assert shapes[0] == shapes[1], "weights are dense, and nothing of codes, tables or streams is kept"


@pytest.mark.parametrize("opset", OPSETS)
def test_of_a_generated_model(tmp_path: Path, opset: int) -> None:
    assert_decoder_folds(conv_and_matmul(opset), tmp_path)


def test_the_proof_would_see_a_decoder_that_stays(tmp_path: Path) -> None:
    """With optimization switched off, the ops of the decoder are in the graph, so equal counts mean something."""
    coded, _ = huffman_coded(conv_and_matmul(17))
    path = tmp_path / "inlined.onnx"
    oracle.session(coded, optimise=False, optimised_to=path)
    ops = all_ops(onnx.load(path).graph.node)
    assert ops["", "ScatterElements"] > 0
    assert sum(ops.values()) > 50


@pytest.mark.skipif(not model_names(), reason=ABSENT)
@pytest.mark.parametrize("name", ["cifar_resnet20", "squeezenet_fp32up"])
def test_of_real_models(tmp_path: Path, name: str) -> None:
    """SqueezeNet is of IR version 3, which lists weights and biases as inputs: they must stay constants in the newer file."""
    assert_decoder_folds(onnx.load(model_path(name)), tmp_path)
