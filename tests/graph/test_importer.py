"""Everything in a model that GraphSurgeon alone would drop comes back, or the model is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf.descriptor import FieldDescriptor
from onnx import AttributeProto, TensorProto, helper, parser

from onnxshrink.errors import ModelError, ModelReadError, UnsupportedModelError
from onnxshrink.graph.edit import set_values
from onnxshrink.graph.exporter import to_model
from onnxshrink.graph.files import load
from onnxshrink.graph.ir import Constant
from tests.oracle import differences, make_model, run, same_bits, session, tensor, value

EVERYTHING = """
<ir_version: 8, opset_import: ["": 17, "local": 1], metadata_props: ["alphabet": "abc"]>
g (float[2, 3] x, bool c, seq(float[N]) s, optional(float[N]) o) => (float[2, 3] y, float[2, 3] z)
<float[3] b = {1, 2, 3}, float[2, 3] h>
{
    k = Constant <value = float[3] {1, 2, 3}> ()
    h = Add(x, k)
    y = If(c) <then_branch = t () => (float[2, 3] a) { a = Identity(h) },
               else_branch = e () => (float[2, 3] a) <float[3] w = {1, 1, 1}> { a = Add(h, w) }>
    z = local.f <alpha = 0.5> (x, b)
}
<domain: "local", opset_import: ["": 17]> f <alpha> (p, q) => (r)
{
    w = Constant <value = float[1] {3}> ()
    v = Elu <alpha: float = @alpha> (p)
    u = Add(v, w)
    r = Add(u, q)
}
"""
UNKNOWN_FIELD = b"\xf8\x3f\x01"  # field number 1023, varint 1
REFUSED_FIELDS = {  # setting this field makes a model that cannot be carried, and says why
    ("ModelProto", "training_info"): "training_info would be lost",
    ("AttributeProto", "g"): "graphs in attribute",
    ("AttributeProto", "graphs"): "graphs in attribute",
    ("AttributeProto", "ref_attr_name"): "graphs in attribute",  # on an attribute that has a graph of its own
    ("TensorProto", "data_location"): "external data",
    ("GraphProto", "initializer"): "element type 0",
    ("GraphProto", "sparse_initializer"): "element type 0",
    ("NodeProto", "input"): "no node, input or initializer defines it",
}


def everything() -> onnx.ModelProto:
    """Returns a model with a body, a function, sparse and dense tensors and all kinds of attributes."""
    model = parser.parse_model(EVERYTHING)
    sparse = sparse_tensor("sp", [1], [3])
    model.graph.sparse_initializer.append(sparse)
    attributes = {
        "type": helper.make_tensor_type_proto(TensorProto.FLOAT, [2]),
        "tensors": [value("", [1.0], "float32")],
        "sparse": [sparse_tensor("", [0], [2])],
        "strings": ["a", b"\xff"],
        "ints": [1, -(2**63)],
        "floats": [1.5, -0.0],
        "int": 1,
        "float": float("nan"),
        "text": "é",
        "bytes": b"\xff\x00",
    }
    model.graph.node.append(helper.make_node("Custom", ["x", "sp"], ["q"], domain="vendor", **attributes))
    empty = helper.make_attribute("nothing", [], attr_type=AttributeProto.INTS)
    model.graph.node[-1].attribute.append(empty)
    return model


def sparse_tensor(name: str, indices: Any, dims: list[int]) -> onnx.SparseTensorProto:
    return helper.make_sparse_tensor(
        value(name, np.arange(1, len(indices) + 1), "float32"), value("", indices, "int64"), dims
    )


def places(
    message: Any, path: tuple[tuple[str, int | None], ...] = ()
) -> Iterator[tuple[tuple[tuple[str, int | None], ...], Any]]:
    """Yields (path, message) for a message and all messages in it."""
    yield path, message
    for field, content in message.ListFields():
        if field.message_type is not None and field.is_repeated:
            for index, item in enumerate(content):
                yield from places(item, (*path, (field.name, index)))
        elif field.message_type is not None:
            yield from places(content, (*path, (field.name, None)))


def follow(message: Any, path: tuple[tuple[str, int | None], ...]) -> Any:
    for name, index in path:
        message = getattr(message, name) if index is None else getattr(message, name)[index]
    return message


def set_something(message: Any, field: FieldDescriptor) -> None:
    if field.message_type is not None:
        getattr(message, field.name).add() if field.is_repeated else getattr(message, field.name).SetInParent()
        return
    something: Any = 1
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        something = b"x" if field.type == FieldDescriptor.TYPE_BYTES else "x"
    if field.is_repeated:
        getattr(message, field.name).append(something)
    else:
        setattr(message, field.name, something)


def round_trip(model: onnx.ModelProto) -> list[str]:
    return differences(model, to_model(load(model)))


class TestFields:
    def test_the_whole_model_comes_back(self) -> None:
        assert round_trip(everything()) == []

    def test_every_field_that_onnx_knows_comes_back_or_is_refused(self) -> None:
        model = everything()
        lost, tried, refused = {}, 0, set()
        for path, message in list(places(model)):
            for field in message.DESCRIPTOR.fields:
                present = len(getattr(message, field.name)) if field.is_repeated else message.HasField(field.name)
                if present:
                    continue
                variant = copy.deepcopy(model)
                set_something(follow(variant, path), field)
                key, tried = (message.DESCRIPTOR.name, field.name), tried + 1
                try:
                    if found := round_trip(variant):
                        lost[path, key] = found
                except ModelError as error:
                    refused.add(key)
                    assert REFUSED_FIELDS.get(key, "nothing") in str(error)
        assert lost == {}
        assert refused == REFUSED_FIELDS.keys()
        assert tried > 400

    @pytest.mark.parametrize(
        "path",
        [
            (),
            (("graph", None),),
            (("graph", None), ("node", 0)),
            (("graph", None), ("node", 0), ("attribute", 0)),
            (("graph", None), ("node", 1)),
            (("graph", None), ("node", 2), ("attribute", 0)),
            (("graph", None), ("node", 2), ("attribute", 0), ("g", None)),
            (("graph", None), ("node", 2), ("attribute", 0), ("g", None), ("node", 0)),
            (("functions", 0),),
            (("functions", 0), ("node", 1), ("attribute", 0)),
        ],
        ids=lambda path: ".".join(name for name, _ in path) or "model",
    )
    def test_fields_of_a_newer_onnx_are_refused(self, path: tuple[tuple[str, int | None], ...]) -> None:
        model = everything()
        follow(model, path).MergeFromString(UNKNOWN_FIELD)
        with pytest.raises(UnsupportedModelError, match=r"unknown to onnx .*; upgrade the onnx package"):
            load(model)

    @pytest.mark.parametrize("field", ["initializer", "input", "value_info"])
    def test_fields_of_a_newer_onnx_in_tensors_and_types_are_carried(self, field: str) -> None:
        model = everything()
        getattr(model.graph, field)[0].MergeFromString(UNKNOWN_FIELD)
        exported = to_model(load(model))
        assert any(item.SerializeToString().endswith(UNKNOWN_FIELD) for item in getattr(exported.graph, field))

    def test_training_info_is_refused(self) -> None:
        model = everything()
        model.training_info.add()
        with pytest.raises(UnsupportedModelError, match="training_info would be lost; export the model for inference"):
            load(model)

    def test_an_unknown_element_type_is_refused_by_number(self) -> None:
        model = everything()
        model.graph.initializer[0].data_type = 1023
        with pytest.raises(UnsupportedModelError, match="element type 1023 is not known"):
            load(model)

    def test_the_message_is_left_alone(self) -> None:
        model = everything()
        before = model.SerializeToString()
        graph = load(model)
        to_model(graph).graph.node[0].name = "renamed"
        set_values(graph.constants[0], np.zeros(3, np.float32))
        to_model(graph)
        assert model.SerializeToString() == before


class TestAttributes:
    @pytest.mark.parametrize(
        ("attribute", "plain"),
        [
            (helper.make_attribute("a", 3), 3),
            (helper.make_attribute("a", -0.0), -0.0),
            (helper.make_attribute("a", "text"), "text"),
            (helper.make_attribute("a", ""), ""),
            (helper.make_attribute("a", [1, 2]), [1, 2]),
            (helper.make_attribute("a", [1.0, 2.0]), [1.0, 2.0]),
            (helper.make_attribute("a", ["x", "é"]), ["x", "é"]),
        ],
    )
    def test_plain_values_are_python_values(self, attribute: AttributeProto, plain: Any) -> None:
        model = make_model(
            [helper.make_node("Op", ["x"], ["y"], domain="vendor")], [tensor("x", [1])], [tensor("y", [1])]
        )
        model.graph.node[0].attribute.append(attribute)
        graph = load(model)
        found = graph.nodes[0].attrs["a"]
        assert (found, type(found)) == (plain, type(plain))
        assert round_trip(model) == []

    def test_an_attribute_given_twice_is_refused(self) -> None:
        model = make_model([helper.make_node("Cast", ["x"], ["y"], to=1)], [tensor("x", [1])], [tensor("y", [1])])
        model.graph.node[0].attribute.append(helper.make_attribute("to", 7))
        with pytest.raises(UnsupportedModelError, match="node 'Cast': an attribute must be given once"):
            load(model)

    def test_a_list_of_graphs_is_refused(self) -> None:
        body = helper.make_graph([], "body", [], [])
        node = helper.make_node("Op", [], ["y"], domain="vendor", bodies=[body])
        with pytest.raises(UnsupportedModelError, match="graphs in attribute 'bodies'"):
            load(make_model([node], [], [tensor("y", [1])]))

    @pytest.mark.parametrize("kind", ["t", "tensors", "sparse_initializer"])
    def test_external_data_where_it_cannot_follow_is_refused(self, kind: str) -> None:
        model = everything()
        if kind == "sparse_initializer":
            outside = model.graph.sparse_initializer[0].values
        elif kind == "tensors":
            outside = next(item for item in model.graph.node[-1].attribute if item.name == "tensors").tensors[0]
        else:
            outside = model.graph.node[-1].attribute.add(name="t", type=AttributeProto.TENSOR).t
        outside.data_location = TensorProto.EXTERNAL
        with pytest.raises(UnsupportedModelError, match="external data would be lost"):
            load(model)


class TestNames:
    W, X, Y = value("w", [1.0], "float32"), tensor("x", [1]), tensor("y", [1])

    @pytest.mark.parametrize(
        ("nodes", "initializers"),
        [
            ([helper.make_node("Add", ["x", "w"], ["y"])], [W, W]),
            ([helper.make_node("Abs", ["x"], ["w"]), helper.make_node("Abs", ["w"], ["y"])], [W]),
            ([helper.make_node("Abs", ["x"], ["y"]), helper.make_node("Neg", ["x"], ["y"])], []),
            ([helper.make_node("Abs", ["x"], ["x"]), helper.make_node("Neg", ["x"], ["y"])], []),
            ([helper.make_node("Constant", [], ["w"], value=W), helper.make_node("Add", ["x", "w"], ["y"])], [W]),
        ],
        ids=["initializers", "initializer and node", "nodes", "input and node", "initializer and Constant"],
    )
    def test_two_tensors_of_one_name_are_refused(self, nodes: list[Any], initializers: list[Any]) -> None:
        with pytest.raises(UnsupportedModelError, match=r"tensor '\w' must be defined once"):
            load(make_model(nodes, [self.X], [self.Y], initializers))

    def test_a_tensor_that_nobody_defines_is_refused(self) -> None:
        with pytest.raises(UnsupportedModelError, match="tensor 'missing' is read, but"):
            load(make_model([helper.make_node("Add", ["x", "missing"], ["y"])], [self.X], [self.Y]))

    def test_sibling_branches_may_reuse_names(self) -> None:
        model = parser.parse_model(
            """<ir_version: 8, opset_import: ["": 17]> g (float[3] x, bool c) => (float[3] y) {
                y = If(c) <then_branch = t () => (float[3] a) <float[3] w = {1, 1, 1}> { a = Add(x, w) },
                           else_branch = e () => (float[3] a) <float[3] w = {2, 2, 2}> { a = Mul(x, w) }>
            }"""
        )
        assert round_trip(model) == []
        graph = load(model)
        _, then_branch, else_branch = (scope.graph for scope in graph.scopes())
        set_values(then_branch.constants[0], np.full(3, 10, np.float32))
        assert else_branch.constants[0].values.tolist() == [2, 2, 2]
        running = session(to_model(graph))
        x = np.ones(3, np.float32)
        assert run(running, {"x": x, "c": np.array(True)})[0].tolist() == [11, 11, 11]
        assert run(running, {"x": x, "c": np.array(False)})[0].tolist() == [2, 2, 2]

    def test_nodes_out_of_order_are_read(self) -> None:
        nodes = [helper.make_node("Neg", ["h"], ["y"]), helper.make_node("Abs", ["x"], ["h"])]
        assert round_trip(make_model(nodes, [self.X], [self.Y])) == []

    def test_omitted_inputs_and_outputs_stay_omitted(self) -> None:
        nodes = [
            helper.make_node("Clip", ["x", "", "w"], ["h"]),
            helper.make_node("Dropout", ["h"], ["d", ""]),
            helper.make_node("LSTM", ["d", "a", "b", "", ""], ["", "y"]),
        ]
        weights = [
            value("w", 1, "float32"),
            value("a", np.ones((1, 4, 1)), "float32"),
            value("b", np.ones((1, 4, 1)), "float32"),
        ]
        assert round_trip(make_model(nodes, [self.X], [self.Y], weights)) == []


class TestDescriptions:
    """Of inputs, outputs and values in between."""

    def test_an_input_that_is_an_output_keeps_both_descriptions(self) -> None:
        node = helper.make_node("Abs", ["x"], ["y"])
        model = make_model([node], [tensor("x", [2])], [tensor("y", [2]), tensor("x", ["N"])])
        assert round_trip(model) == []

    @pytest.mark.parametrize("name", ["x", "y", "w", "nobody"])
    def test_a_description_that_repeats_a_border_stays(self, name: str) -> None:
        node = helper.make_node("Add", ["x", "w"], ["y"])
        model = make_model(
            [node], [tensor("x", [2])], [tensor("y", [2]), tensor("w", ["K"])], [value("w", [1, 2], "float32")]
        )
        model.graph.value_info.append(tensor(name, ["M"]))
        assert round_trip(model) == []

    def test_a_body_may_describe_what_it_reads_from_outside(self) -> None:
        model = parser.parse_model(
            """<ir_version: 8, opset_import: ["": 17]> g (float[2] x, bool c) => (float[2] y) <float[2] h> {
                h = Abs(x)
                y = If(c) <then_branch = t () => (float[2] a) <float[N] h> { a = Neg(h) },
                           else_branch = e () => (float[2] a) { a = Exp(h) }>
            }"""
        )
        assert len(model.graph.node[1].attribute[0].g.value_info) == 1
        assert round_trip(model) == []

    def test_denotations_and_typed_values_stay(self) -> None:
        sequence = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, ["N"]))
        optional = helper.make_optional_type_proto(sequence)
        mapping = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
        inputs = [
            helper.make_value_info(name, kind) for name, kind in [("s", sequence), ("o", optional), ("m", mapping)]
        ]
        image = tensor("x", [1, 3, "H", None])
        image.type.denotation = "IMAGE"
        image.type.tensor_type.shape.dim[1].denotation = "DATA_CHANNEL"
        node = helper.make_node("Op", ["s", "o", "m", "x"], ["y"], domain="vendor")
        assert round_trip(make_model([node], [*inputs, image], [helper.make_value_info("y", sequence)])) == []

    def test_quantization_annotation_stays(self) -> None:
        model = everything()
        annotation = model.graph.quantization_annotation.add(tensor_name="h")
        annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="b")
        assert round_trip(model) == []


class TestInitializersAsInputs:
    @staticmethod
    def model(ir_version: int) -> onnx.ModelProto:
        return make_model(
            [helper.make_node("Add", ["x", "w"], ["y"])],
            [tensor("x", [2]), tensor("w", [2])],
            [tensor("y", [2])],
            [value("w", [1, 2], "float32")],
            opset=8,
            ir_version=ir_version,
        )

    def test_they_stay_overridable(self) -> None:
        model = self.model(ir_version=8)
        assert round_trip(model) == []
        running = session(to_model(load(model)))
        assert [spec.name for spec in running.get_overridable_initializers()] == ["w"]
        ones = np.ones(2, np.float32)
        assert run(running, {"x": ones})[0].tolist() == [2, 3]
        assert run(running, {"x": ones, "w": 5 * ones})[0].tolist() == [6, 6]

    def test_ir_version_3_stays_while_all_are_listed(self) -> None:
        assert round_trip(self.model(ir_version=3)) == []

    def test_an_unlisted_one_raises_the_ir_version_to_4(self) -> None:
        graph = load(self.model(ir_version=3))
        graph.constants.append(Constant("more", np.ones(2, np.float32)))
        graph.nodes[0].inputs[1] = graph.constants[-1]
        exported = to_model(graph)
        assert exported.ir_version == 4
        onnx.checker.check_model(exported, full_check=True)
        assert run(session(exported), {"x": np.ones(2, np.float32)})[0].tolist() == [2, 2]

    def test_newer_ir_versions_are_never_lowered(self) -> None:
        assert to_model(load(self.model(ir_version=9))).ir_version == 9


class TestSparse:
    @pytest.mark.parametrize("indices", [[1, 4, 5], [[0, 1], [1, 1], [1, 2]]], ids=["linear", "coordinates"])
    def test_both_layouts_are_read_and_kept(self, indices: Any) -> None:
        model = make_model([helper.make_node("Add", ["x", "sp"], ["y"])], [tensor("x", [2, 3])], [tensor("y", [2, 3])])
        model.graph.sparse_initializer.append(sparse_tensor("sp", indices, [2, 3]))
        assert round_trip(model) == []
        constant = load(model).constants[0]
        dense = np.array([[0, 1, 0], [0, 2, 3]], np.float32)
        assert same_bits(constant.values, dense)
        assert (constant.shape, constant.dtype) == ((2, 3), np.dtype(np.float32))
        assert same_bits(run(session(to_model(load(model))), {"x": np.zeros((2, 3), np.float32)}), [dense])

    def test_an_edited_one_becomes_dense(self) -> None:
        model = make_model([helper.make_node("Add", ["x", "sp"], ["y"])], [tensor("x", [3])], [tensor("y", [3])])
        model.graph.sparse_initializer.append(sparse_tensor("sp", [2], [3]))
        graph = load(model)
        set_values(graph.constants[0], np.array([7, 8, 9], np.float32))
        exported = to_model(graph)
        assert len(exported.graph.sparse_initializer) == 0
        assert run(session(exported), {"x": np.zeros(3, np.float32)})[0].tolist() == [7, 8, 9]

    def test_one_without_any_value_is_zero(self) -> None:
        model = make_model([helper.make_node("Add", ["x", "sp"], ["y"])], [tensor("x", [3])], [tensor("y", [3])])
        model.graph.sparse_initializer.append(sparse_tensor("sp", np.zeros(0), [3]))
        assert load(model).constants[0].values.tolist() == [0, 0, 0]


class TestFunctions:
    def test_attributes_by_reference_still_arrive(self) -> None:
        model = parser.parse_model(EVERYTHING)
        del model.graph.input[2:]
        exported = to_model(load(model))
        feeds = {"x": -np.ones((2, 3), np.float32), "c": np.array(True)}
        expected = 0.5 * np.expm1(-1) + 3 + np.array([1, 2, 3])
        np.testing.assert_allclose(run(session(exported), feeds)[1], np.stack([expected] * 2), rtol=1e-6)
        assert same_bits(run(session(exported), feeds), run(session(model), feeds))

    @pytest.mark.parametrize("domain", ["", "ai.onnx"])
    def test_a_function_has_its_own_opset(self, domain: str) -> None:
        model = parser.parse_model(EVERYTHING)
        model.functions[0].opset_import[0].CopyFrom(helper.make_opsetid(domain, 13))
        graph = load(model)
        assert (graph.opset, graph.local_functions[0].opset) == (17, 13)

    def test_a_function_without_an_opset_has_the_models(self) -> None:
        model = parser.parse_model(EVERYTHING)
        del model.functions[0].opset_import[:]
        assert load(model).local_functions[0].opset == 17


@pytest.mark.parametrize(
    "break_it",
    [
        lambda model: model.graph.initializer[0].ClearField("data_type"),
        lambda model: model.graph.node[0].output.append("more"),
        lambda model: model.graph.node[0].ClearField("output"),
    ],
    ids=["no element type", "Constant with two outputs", "Constant without output"],
)
def test_malformed_models_raise_nothing_else(break_it: Callable[[onnx.ModelProto], None]) -> None:
    model = everything()
    break_it(model)
    try:
        to_model(load(model))
    except ModelError as error:
        assert isinstance(error, UnsupportedModelError | ModelReadError)
