"""Raised opsets: the same outputs in ONNX Runtime, bit for bit, and not a byte of the model changed that need not be."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import AttributeProto, TensorProto, helper

from onnxshrink.errors import PassError
from onnxshrink.graph.check import Level, check, strictest_level
from onnxshrink.graph.edit import NameSource
from onnxshrink.graph.exporter import to_model
from onnxshrink.graph.files import load
from onnxshrink.graph.opset import HIGHEST, LOWEST, obstacle_to_opset, raise_opset
from onnxshrink.graph.opset_rules import RULES
from tests import oracle
from tests.corpus import ABSENT, model_names, model_path, sample

OLD = (
    "fsanet_1x1",
    "mnist_cntk",
    "squeezenet_fp16",
    "squeezenet_fp32up",
    "subpixel_cnn",
    "ultraface_rfb_320_simplified",
)
NARROWED = {("Erf", 13)}  # to floats: ONNX Runtime never had it for others


def raised(model: onnx.ModelProto, target: int) -> onnx.ModelProto:
    graph = load(model)
    before = to_model(graph).ByteSize()
    growth = raise_opset(graph, target)
    result = to_model(graph)
    assert abs(result.ByteSize() - before - growth) <= 16  # lengths of bodies and functions take a byte more or less
    return result


def assert_same_outputs(before: onnx.ModelProto, after: onnx.ModelProto, feeds: Any = None, seed: int = 0) -> None:
    onnx.checker.check_model(after, full_check=True)
    for optimise in (True, False):
        sessions = [oracle.session(model, optimise=optimise) for model in (before, after)]
        fed = feeds or oracle.random_feeds(sessions[0], seed)
        assert oracle.same_bits(*(oracle.run(running, fed) for running in sessions))


def one(
    op: str,
    shape: Sequence[int] = (2, 3, 4, 4),
    *,
    opset: int = 7,
    operands: Sequence[Any] = (),
    dtype: int = TensorProto.FLOAT,
    outputs: int = 1,
    overridable: bool = False,
    **attributes: Any,
) -> onnx.ModelProto:
    """Returns a model of one node, between two Identity nodes: the types around it are not declared."""
    constants = [oracle.value(f"c{i}", operand) for i, operand in enumerate(operands)]
    inputs = [oracle.tensor("x", shape, dtype)]
    if overridable:
        inputs += [oracle.tensor(item.name, list(item.dims), item.data_type) for item in constants]
    names = [f"n{i}" for i in range(outputs)]
    nodes = [
        helper.make_node("Identity", ["x"], ["i"]),
        helper.make_node(op, ["i", *(item.name for item in constants)], names, **attributes),
        helper.make_node("Identity", ["n0"], ["y"]),
    ]
    model = oracle.make_model(nodes, inputs, [oracle.tensor("y", None, dtype)], constants, opset=opset, ir_version=4)
    model.graph.output[0].CopyFrom(
        onnx.shape_inference.infer_shapes(model).graph.output[0]
    )  # the checker wants a shape
    return model


NORMALIZED = [np.float32([1, 2, 3]), np.float32([0, 1, 2]), np.float32([3, 2, 1]), np.float32([1, 2, 4])]
WEIGHT = np.random.default_rng(0).standard_normal((3, 2, 3, 3)).astype(np.float32)
CASES = {
    "clip": one("Clip", min=-0.25, max=0.1),
    "clip from below": one("Clip", min=0.1),
    "clip from above": one("Clip", max=0.1),
    "clip nothing": one("Clip"),
    "pad": one("Pad", pads=[0, 0, 1, 2, 0, 0, 0, 1]),
    "pad with a value": one("Pad", pads=[0, 0, 1, 2, 0, 0, 0, 1], value=0.5),
    "pad by reflection": one("Pad", pads=[0, 0, 1, 2, 0, 0, 0, 1], mode="reflect", value=0.5),
    "crop": one("Pad", pads=[0, 0, -1, 0, 0, 0, -1, 0]),
    "slice": one("Slice", starts=[1, -3], ends=[2**31 - 1, -1], axes=[1, 3]),
    "slice of the first axes": one("Slice", starts=[0, 1], ends=[1, 3]),
    "top": one("TopK", k=3, axis=2, outputs=2),
    "upsample": one("Upsample", scales=[1.0, 1.0, 2.0, 3.0], mode="nearest"),
    "upsample by fractions": one("Upsample", scales=[1.0, 1.0, 1.6, 2.3], mode="nearest"),
    "upsample linearly": one("Upsample", scales=[1.0, 1.0, 1.6, 2.0], mode="linear"),
    "upsample by an input": one("Upsample", opset=9, operands=[np.float32([1, 1, 1.7, 2])], mode="nearest"),
    "upsample by any input": one("Upsample", opset=9, operands=[np.float32([1, 1, 1.7, 2])], overridable=True),
    "resize": one("Resize", opset=10, operands=[np.float32([1, 1, 1.7, 2])], mode="nearest"),
    "shrink linearly": one("Resize", opset=10, operands=[np.float32([1, 1, 0.6, 0.5])], mode="linear"),
    "normalize": one("BatchNormalization", operands=NORMALIZED, epsilon=1e-3),
    "normalize by channel": one("BatchNormalization", operands=NORMALIZED, spatial=1),
    "dropout": one("Dropout", outputs=2, ratio=0.3),
    "dropout of the default": one("Dropout"),
    "scatter": one("Scatter", [3, 4], opset=9, operands=[np.int64([[0, 2]]), np.float32([[5, 6]])], axis=1),
    "softmax": one("Softmax", [3, 4]),
    "softmax of pixels": one("Softmax", [2, 5, 1, 1]),
    "softmax of the last": one("Softmax", [2, 3, 4], opset=11, axis=-1),
    "log softmax": one("LogSoftmax", [3, 4], axis=1),
    "split": one("Split", [2, 6], split=[2, 4], axis=1, outputs=2),
    "halves": one("Split", [2, 6], axis=1, outputs=2),
    "squeeze": one("Squeeze", [1, 3, 1], axes=[2]),
    "squeeze all": one("Squeeze", [1, 3, 1]),
    "unsqueeze": one("Unsqueeze", [3], axes=[0, 2]),
    "sum": one("ReduceSum", axes=[1, 3], keepdims=0),
    "sum of all": one("ReduceSum"),
    "transposed convolution": one("ConvTranspose", operands=[WEIGHT], strides=[2, 2], pads=[1, 1, 1, 1]),
    "clip half": one("Clip", [4], dtype=TensorProto.FLOAT, min=-1e39, max=1.0),
    "pooling": one("MaxPool", kernel_shape=[3, 3], strides=[2, 2]),
    "mean": one("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
}


@pytest.mark.parametrize("target", [11, 12, 13])
@pytest.mark.parametrize("case", CASES)
def test_outputs_stay_bit_for_bit(case: str, target: int):
    model = CASES[case]
    assert_same_outputs(model, raised(model, target))


@given(st.lists(st.floats(1, 4, width=32), min_size=2, max_size=2), st.sampled_from(["nearest", "linear"]))
@settings(max_examples=25, deadline=None)
def test_enlarged_pixels_are_the_same_at_any_scale(scales: list[float], mode: str):
    model = one("Upsample", scales=[1.0, 1.0, *scales], mode=mode)
    assert_same_outputs(model, raised(model, 11))


@given(st.integers(-6, 6), st.one_of(st.integers(-6, 6), st.just(2**31 - 1)), st.integers(0, 2))
@settings(max_examples=25, deadline=None)
def test_slices_are_the_same_at_any_bounds(start: int, end: int, axis: int):
    model = one("Slice", [4, 3, 5], starts=[start], ends=[end], axes=[axis])
    assert_same_outputs(model, raised(model, 11))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            one("ImageScaler", scale=2.0, bias=[0.0, 0.0, 0.0]),
            "ImageScaler 'n0': opset 7 of the standard has no such op",
        ),
        (one("Upsample", opset=10, operands=[np.float32([1, 1, 2, 2])]), "opset 10 of the standard has no such op"),
        (one("BatchNormalization", operands=NORMALIZED, spatial=0), "spatial = 0 has no equal"),
        (one("Resize", opset=10, operands=[np.float32([1, 1, 0.5, 2])]), "only where it is known to enlarge"),
        (
            one("Resize", opset=10, operands=[np.float32([1, 1, 2, 2])], overridable=True),
            "only where it is known to enlarge",
        ),
        (one("OneHot", [3], opset=9, operands=[np.int64(3), np.float32([0, 1])]), "negative indices"),
        (one("ConvTranspose", operands=[WEIGHT], strides=[2, 2], auto_pad="SAME_UPPER"), "pads the other side"),
        (one("ConvTranspose", operands=[WEIGHT], strides=[2, 2], output_shape=[8, 8]), "pads the other side"),
        (one("Scan", opset=8), "no batches"),
        (one("Softmax", [2, 3, 4], axis=1), "works along one axis"),
        (one("Relu", opset=6), "opset must be at least 7 to be raised, got 6"),
    ],
    ids=str,
)
def test_what_has_no_equal_keeps_the_model_as_it_is(model: onnx.ModelProto, reason: str):
    graph = load(model)
    before = to_model(graph).SerializeToString(deterministic=True)
    with pytest.raises(PassError) as error:
        raise_opset(graph, 13)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
    assert obstacle_to_opset(graph, 13) == str(error.value)
    assert to_model(graph).SerializeToString(deterministic=True) == before


def test_an_obstacle_late_in_the_graph_leaves_no_trace_in_what_came_before():
    model = one("Clip", min=0.0)
    model.graph.node.append(helper.make_node("Crop", ["n0"], ["z"]))
    graph = load(model)
    before = to_model(graph)
    with pytest.raises(PassError, match="Crop 'z'"):
        raise_opset(graph, 11)
    assert oracle.differences(before, to_model(graph)) == []


def test_opsets_beyond_the_table_are_refused_and_lower_ones_change_nothing():
    model = one("Clip", min=0.0)
    graph = load(model)
    assert obstacle_to_opset(graph, HIGHEST + 1) == f"model: the opset to raise it to must be at most {HIGHEST}, got 14"
    assert raise_opset(graph, 6) == 0
    assert oracle.differences(model, to_model(graph)) == []


def test_the_mask_of_a_dropout_goes_only_where_nobody_reads_it():
    model = one("Dropout", outputs=2)
    model.graph.value_info.append(oracle.tensor("n1", [2, 3, 4, 4]))
    result = raised(model, 11)
    assert [list(node.output) for node in result.graph.node] == [["i"], ["n0"], ["y"]]
    assert not result.graph.value_info
    model.graph.node.append(helper.make_node("Identity", ["n1"], ["z"]))
    assert (
        obstacle_to_opset(load(model), 11)
        == "Dropout 'n0': its mask is read, which is of another type from opset 10 on"
    )
    assert obstacle_to_opset(load(model), 9) is None


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT16, TensorProto.DOUBLE])
def test_limits_and_values_are_of_the_type_of_the_tensor(dtype: int):
    nodes = [
        helper.make_node("Abs", ["x"], ["a"]),
        helper.make_node("Clip", ["a"], ["b"], min=0.1, max=1e6),
        helper.make_node("Pad", ["b"], ["y"], pads=[1, 0], value=0.3),
    ]
    model = oracle.make_model(nodes, [oracle.tensor("x", [3], dtype)], [oracle.tensor("y", [4], dtype)], opset=7)
    result = raised(model, 11)
    onnx.checker.check_model(result, full_check=True)
    held = {node.output[0]: node.attribute[0].t for node in result.graph.node if node.op_type == "Constant"}
    assert {name: tensor.data_type for name, tensor in held.items()} == {
        "clip.min": dtype,
        "clip.max": dtype,
        "pad.pads": TensorProto.INT64,
        "pad.value": dtype,
    }
    numpy_type = helper.tensor_dtype_to_np_dtype(dtype)
    expected = np.float32(0.1).astype(numpy_type)
    assert onnx.numpy_helper.to_array(held["clip.min"]) == expected


def test_an_unknown_type_is_an_obstacle():
    nodes = [helper.make_node("Unknown", ["x"], ["a"], domain="d"), helper.make_node("Clip", ["a"], ["y"], min=0.0)]
    output = onnx.ValueInfoProto(name="y")
    model = oracle.make_model(nodes, [oracle.tensor("x", [3])], [output], opset=9, opsets={"d": 1})
    assert obstacle_to_opset(load(model), 11) == (
        "Clip 'y': the type of its input must be known, and shape inference does not find it"
    )


def test_equal_operands_are_stored_once_in_a_scope_under_names_that_nobody_has():
    nodes = [helper.make_node("Clip", [f"t{i}"], [f"t{i + 1}"], min=0.0, max=6.0) for i in range(3)]
    nodes.append(helper.make_node("Add", ["t3", "clip.min"], ["y"]))
    constants = [oracle.value("clip.min", np.float32([1, 2]))]
    model = oracle.make_model(nodes, [oracle.tensor("t0", [2])], [oracle.tensor("y", [2])], constants, opset=7)
    result = raised(model, 11)
    assert [node.output[0] for node in result.graph.node if node.op_type == "Constant"] == ["clip.min_2", "clip.max"]
    assert_same_outputs(model, result)


def test_names_can_be_shared_with_other_edits():
    graph = load(one("Clip", min=0.0))
    names = NameSource(graph)
    assert names.fresh("clip.min") == "clip.min"
    raise_opset(graph, 11, names)
    assert [constant.name for constant in graph.constants] == ["clip.min_2"]


def branch(name: str, limit: float) -> onnx.GraphProto:
    nodes = [helper.make_node("Clip", ["x"], [name], min=limit)]
    return helper.make_graph(nodes, name, [], [oracle.tensor(name, [3])])


def test_bodies_are_raised_too():
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch("t", 0.5), else_branch=branch("e", -0.5))
    inputs = [oracle.tensor("c", [], TensorProto.BOOL), oracle.tensor("x", [3])]
    model = oracle.make_model([node], inputs, [oracle.tensor("y", [3])], opset=9)
    result = raised(model, 11)
    for taken in (True, False):
        assert_same_outputs(model, result, {"c": np.array(taken), "x": np.float32([-1, 0.2, 1])})


def with_function(body: list[onnx.NodeProto], domain: str = "d", opset: int = 9, **call: Any) -> onnx.ModelProto:
    attributes = list(call)
    function = helper.make_function(
        domain, "F", ["a"], ["b"], body, [helper.make_opsetid("", opset)], attributes=attributes
    )
    node = helper.make_node("F", ["x"], ["y"], domain=domain, **call)
    opsets = {domain: 1} if domain else {}
    inputs, outputs = [oracle.tensor("x", [1, 3])], [oracle.tensor("y", [1, None])]
    return oracle.make_model([node], inputs, outputs, opset=9, opsets=opsets, functions=[function])


def test_functions_are_raised_too():
    body = [
        helper.make_node("Slice", ["a"], ["s"], starts=[1], ends=[3], axes=[1]),
        helper.make_node("Relu", ["s"], ["b"]),
    ]
    model = with_function(body)
    result = raised(model, 13)
    assert result.functions[0].opset_import[0].version == 13
    assert_same_outputs(model, result)


def test_a_function_of_the_opset_stays_as_it_is():
    body = [helper.make_node("Relu", ["a"], ["b"])]
    model = with_function(body, opset=11)
    assert raised(model, 11).functions[0] == model.functions[0]


def test_arguments_of_a_function_cannot_become_inputs():
    node = helper.make_node("Slice", ["a"], ["b"], ends=[3], axes=[1])
    node.attribute.add(name="starts", ref_attr_name="from", type=AttributeProto.INTS)
    model = with_function([node], **{"from": [1]})
    assert (
        obstacle_to_opset(load(model), 11) == "Slice 'b': attribute 'starts' must be a plain value to become an input"
    )


def test_functions_in_the_domain_of_the_standard_are_an_obstacle():
    model = with_function([helper.make_node("Relu", ["a"], ["b"])], domain="ai.onnx")
    model.graph.node[0].op_type = model.functions[0].name = "Relu"
    assert "may mean anything" in str(obstacle_to_opset(load(model), 11))


def test_everything_else_stays():
    model = one("Clip", min=0.5)
    model.metadata_props.add(key="alphabet", value="abc")
    model.doc_string, model.graph.doc_string, model.producer_name = "model", "graph", "somebody"
    model.graph.metadata_props.add(key="a", value="b")
    clip = model.graph.node[1]
    clip.doc_string, clip.name = "limits", "my clip"
    clip.metadata_props.add(key="source", value="layer.py")
    model.graph.node[0].doc_string = "first"
    weight = oracle.value("w", np.eye(4, dtype=np.float32))
    weight.doc_string = "weight"
    model.graph.initializer.append(weight)
    model.graph.sparse_initializer.append(
        helper.make_sparse_tensor(oracle.value("s", np.float32([1])), oracle.value("", np.int64([3])), [4, 4])
    )
    model.graph.quantization_annotation.add(tensor_name="x").quant_parameter_tensor_names.add(
        key="SCALE_TENSOR", value="w"
    )
    model.graph.value_info.append(oracle.tensor("i", ["N", 3, 4, 4]))
    model.opset_import.add(domain="com.example", version=3)
    expected = copy.deepcopy(model)
    expected.opset_import[0].version = 11
    del expected.graph.node[1].attribute[:]
    expected.graph.node[1].input.append("clip.min")
    constant = helper.make_node("Constant", [], ["clip.min"], value=oracle.value("clip.min", np.float32(0.5)))
    expected.graph.node.insert(0, constant)
    assert oracle.differences(expected, raised(model, 11)) == []


@pytest.mark.parametrize(
    "name", [name for name in OLD if name in model_names()] or [pytest.param("", marks=pytest.mark.skip(ABSENT))]
)
def test_real_models(name: str):
    original = onnx.load(model_path(name))
    level, _ = strictest_level(original)
    running = oracle.session(original)
    feeds = sample(name, [spec.name for spec in running.get_inputs()])
    expected = oracle.run(running, feeds)
    for target in (11, 13):
        result = raised(original, target)
        assert level is Level.SHAPES
        assert check(result, level) is None
        outputs = oracle.run(oracle.session(result), feeds)
        if (name, target) == ("squeezenet_fp16", 13):  # another kernel for Softmax
            np.testing.assert_allclose(outputs[0], expected[0], rtol=1e-3)
        else:
            assert oracle.same_bits(outputs, expected)
        assert oracle.differences(original, undone(result, original)) == []


def undone(result: onnx.ModelProto, original: onnx.ModelProto) -> onnx.ModelProto:
    """Returns the raised model with the original's opset and without what the ops that lost attributes brought along."""
    patched = copy.deepcopy(result)
    known = {name for node in original.graph.node for name in node.output}
    nodes = [node for node in patched.graph.node if known.intersection(node.output)]
    assert [node.output[0] for node in oracle.canonical(original).graph.node if node.op_type != "Constant"] == [
        node.output[0] for node in nodes if node.op_type != "Constant"
    ]
    theirs = {node.output[0]: node for node in original.graph.node}
    for node in nodes:
        if node.op_type in ("Dropout", "Pad", "ReduceSum", "Slice", "Softmax", "Squeeze", "Unsqueeze"):
            node.CopyFrom(theirs[node.output[0]])
    del patched.graph.node[:]
    patched.graph.node.extend(nodes)
    masks = {name for node in original.graph.node if node.op_type == "Dropout" for name in node.output[1:]}
    patched.graph.value_info.extend(info for info in original.graph.value_info if info.name in masks)
    patched.opset_import[0].version = original.opset_import[0].version
    return patched


@pytest.mark.skipif("fns_candy" not in model_names(), reason=ABSENT)
def test_retired_experimental_ops_are_refused_in_one_line():
    graph = load(model_path("fns_candy"))
    assert obstacle_to_opset(graph, 11) == (
        "ImageScaler 'inputImage2': opset 7 of the standard has no such op; retired experimental ops have no successor"
    )


def changes() -> list[tuple[onnx.defs.OpSchema, onnx.defs.OpSchema]]:
    """Returns all pairs of successive definitions of an op, of which the second came with an opset in the table."""
    known: dict[str, list[onnx.defs.OpSchema]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "":
            known.setdefault(schema.name, []).append(schema)
    pairs = []
    for versions in known.values():
        versions.sort(key=lambda schema: schema.since_version)
        pairs += [pair for pair in pairwise(versions) if LOWEST < pair[1].since_version <= HIGHEST]
    return pairs


def test_the_table_has_one_entry_for_every_change_in_the_standard():
    assert {(new.name, new.since_version) for _, new in changes()} == set(RULES)


@pytest.mark.parametrize(
    ("old", "new"), [pytest.param(*pair, id=f"{pair[1].name}-{pair[1].since_version}") for pair in changes()]
)
def test_what_the_table_calls_the_same_takes_everything_that_it_took(old: onnx.defs.OpSchema, new: onnx.defs.OpSchema):
    if RULES[new.name, new.since_version].__name__ != "<lambda>":
        return
    assert not new.deprecated
    assert [item.name for item in new.inputs[: len(old.inputs)]] == [item.name for item in old.inputs]
    assert [item.name for item in new.outputs[: len(old.outputs)]] == [item.name for item in old.outputs]
    for name, attribute in old.attributes.items():
        assert new.attributes[name].type == attribute.type
        assert new.attributes[name].default_value == attribute.default_value
    assert not any(new.attributes[name].required for name in new.attributes.keys() - old.attributes.keys())
    if (new.name, new.since_version) in NARROWED:
        return
    types = {constraint.type_param_str: set(constraint.allowed_type_strs) for constraint in new.type_constraints}
    assert all(set(item.allowed_type_strs) <= types[item.type_param_str] for item in old.type_constraints)
