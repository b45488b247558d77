"""Short names: the same model to its callers, in fewer bytes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxshrink import compress
from onnxshrink.contract import Context, Rule
from onnxshrink.graph.exporter import to_model
from onnxshrink.graph.files import load
from onnxshrink.passes.share_weights import ShareWeights
from onnxshrink.passes.shorten_names import ShortenNames
from onnxshrink.testing import check_pass
from tests import corpus, oracle


def chain(layers: int = 4) -> onnx.ModelProto:
    """Returns a chain of MatMul and Relu with an exporter's kind of names, and types for what lies between."""
    rng = np.random.default_rng(0)
    nodes, values, infos, last = [], [], [], "x"
    for index in range(layers):
        weight, product, result = (f"/model/layer.{index}/linear/{role}" for role in ("weight", "MatMul_output_0", "Relu_output_0"))
        result = "y" if index == layers - 1 else result
        values.append(oracle.value(weight, rng.standard_normal((8, 8)).astype(np.float32)))
        nodes.append(helper.make_node("MatMul", [last, weight], [product], name=f"/model/layer.{index}/linear/MatMul"))
        nodes.append(helper.make_node("Relu", [product], [result], name=f"/model/layer.{index}/Relu"))
        infos.append(helper.make_tensor_value_info(product, TensorProto.FLOAT, ["n", 8]))
        last = result
    model = oracle.make_model(nodes, [oracle.tensor("x", ["n", 8])], [oracle.tensor("y", ["n", 8])], values)
    model.graph.value_info.extend(infos)
    return model


def branches() -> onnx.ModelProto:
    """Returns an If whose bodies read an outer tensor and weights, each body with inner names of its own."""

    def body(name: str, op: str) -> onnx.GraphProto:
        nodes = [
            helper.make_node("MatMul", ["outer_hidden_tensor", "shared_outer_weight"], [f"{name}_inner_product"]),
            helper.make_node(op, [f"{name}_inner_product"], [f"{name}_result"], name=f"{name}_node"),
        ]
        return helper.make_graph(nodes, name, [], [oracle.tensor(f"{name}_result", ["n", 8])])

    nodes = [
        helper.make_node("Relu", ["x"], ["outer_hidden_tensor"]),
        helper.make_node(
            "If", ["which"], ["y"], then_branch=body("positive", "Neg"), else_branch=body("negative", "Abs"), name="choice"
        ),
    ]
    weight = oracle.value("shared_outer_weight", np.eye(8, dtype=np.float32))
    inputs = [oracle.tensor("x", ["n", 8]), helper.make_tensor_value_info("which", TensorProto.BOOL, [])]
    return oracle.make_model(nodes, inputs, [oracle.tensor("y", ["n", 8])], [weight])


def shortened(model: onnx.ModelProto) -> onnx.ModelProto:
    graph = load(model)
    report = ShortenNames().apply(graph, Context())
    result = to_model(graph)
    (change,) = report.changes
    described = sum(info.ByteSize() for info in model.graph.value_info)
    assert change.bytes_before - change.bytes_after == model.ByteSize() - result.ByteSize() or described
    return result


def all_names(graph: onnx.GraphProto) -> list[str]:
    found = [tensor.name for tensor in graph.initializer]
    for node in graph.node:
        found += [name for name in node.output if name]
        found += [name for attribute in node.attribute if attribute.HasField("g") for name in all_names(attribute.g)]
    return found


@pytest.mark.parametrize("make", [chain, branches])
def test_outputs_are_the_same_and_names_of_the_border_stay(make: object) -> None:
    model = make()  # type: ignore[operator]
    result = shortened(model)
    onnx.checker.check_model(result, full_check=True)
    assert [value.name for value in result.graph.input] == [value.name for value in model.graph.input]
    assert [value.name for value in result.graph.output] == ["y"]
    for which in (True, False):
        feeds = {"x": np.random.default_rng(1).standard_normal((3, 8)).astype(np.float32)}
        if make is branches:
            feeds["which"] = np.array(which)
        before, after = (oracle.run(oracle.session(one), feeds) for one in (model, result))
        assert all(map(oracle.same_bits, before, after))


@pytest.mark.parametrize("make", [chain, branches])
def test_names_are_short_and_distinct_and_nodes_have_none(make: object) -> None:
    result = shortened(make())  # type: ignore[operator]
    names = all_names(result.graph)
    assert len(names) == len(set(names))
    assert max(map(len, names)) == 1
    assert not any(node.name for node in result.graph.node)
    assert {info.name for info in result.graph.value_info} <= set(names)


def test_the_saving_is_what_the_report_says() -> None:
    model = chain()
    del model.graph.value_info[:]
    graph = load(model)
    (change,) = ShortenNames().apply(graph, Context()).changes
    assert change.bytes_before - change.bytes_after == model.ByteSize() - to_model(graph).ByteSize() > 500


def test_a_second_time_there_is_nothing_to_do() -> None:
    graph = load(shortened(chain()))
    assert [skip.reason for skip in ShortenNames().apply(graph, Context()).skips] == ["names are short already"]


def test_what_refers_to_tensors_by_name_is_left_alone() -> None:
    model = chain()
    model.graph.quantization_annotation.add(tensor_name=model.graph.node[0].output[0])
    graph = load(model)
    (skip,) = ShortenNames().apply(graph, Context()).skips
    assert "quantization annotations" in skip.reason
    assert to_model(graph).SerializeToString() == to_model(load(model)).SerializeToString()


def test_a_rule_can_leave_it_alone() -> None:
    report = ShortenNames().apply(load(chain()), Context(rules=[Rule("*", skip=True)]))
    assert not report.changes


def test_after_weight_sharing_the_file_expands_as_before() -> None:
    result = compress(chain(), [ShareWeights(bits=2, per="tensor"), ShortenNames()], calibration={"x": np.eye(8, dtype=np.float32)})
    assert result.report.passes[-1].outcome == "kept"


def test_keeps_the_contract() -> None:
    check_pass(ShortenNames())


@pytest.mark.skipif(not corpus.model_names(), reason=corpus.ABSENT)
@pytest.mark.parametrize("name", ["cifar_resnet20", "silero_vad", "gtcrn"])
def test_real_models_still_load_and_are_smaller(name: str) -> None:
    graph = load(corpus.model_path(name))
    (change,) = ShortenNames().apply(graph, Context()).changes
    assert change.bytes_after < change.bytes_before
    oracle.session(to_model(graph))
