"""A copy of a graph is equal, independent and shares the frozen arrays."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import parser

from onnxshrink.graph.edit import remove_dead, replace_everywhere, set_values
from onnxshrink.graph.exporter import to_model
from onnxshrink.graph.files import load
from onnxshrink.graph.ir import Constant, Graph, Node, Variable, freeze
from tests import oracle
from tests.oracle import differences

MODEL = """
<ir_version: 8, opset_import: ["": 17, "local": 1]>
g (float[3] x, bool c) => (float[3] y, float[3] z)
<float[3] w = {1, 2, 3}, float[3] h>
{
    k = Constant <value = float[3] {1, 2, 3}> ()
    h = Add(x, k)
    y = If(c) <then_branch = t () => (float[3] a) { a = Mul(h, w) },
               else_branch = e () => (float[3] a) <float[3] v = {1, 1, 1}> { a = Add(h, v) }>
    s = Transpose <perm = [0]> (x)
    z = local.f(s)
}
<domain: "local", opset_import: ["": 17]> f (p) => (r) { q = Constant <value = float[1] {3}> () r = Add(p, q) }
"""


@pytest.fixture
def graph() -> Graph:
    return load(parser.parse_model(MODEL))


class TestCopy:
    def test_it_exports_the_same_message(self, graph: Graph) -> None:
        assert to_model(graph.copy()).SerializeToString() == to_model(graph).SerializeToString()

    def test_it_shares_no_object_that_can_be_edited(self, graph: Graph) -> None:
        ours, theirs = _objects(graph), _objects(graph.copy())
        assert len(ours) == len(theirs) > 30
        assert not {id(item) for item in ours} & {id(item) for item in theirs}

    def test_edits_of_the_copy_do_not_show(self, graph: Graph) -> None:
        before = to_model(graph).SerializeToString()
        copy = graph.copy()
        for scope in copy.scopes():
            for constant in scope.graph.constants:
                set_values(constant, np.zeros_like(constant.values))
            for node in scope.graph.nodes:
                node.name, node.attrs["more"] = "renamed", 1
                for attribute in node.attrs.values():
                    if isinstance(attribute, list):
                        attribute.append(7)
            scope.graph.name = "renamed"
            scope.graph.constants.append(Constant("more", np.ones(1)))
            scope.graph.residue.doc_string = "edited"
        replace_everywhere(copy, copy.inputs[0], copy.constants[0])
        copy.model.opset_import[0].version = 21
        copy.model.metadata_props.add(key="edited", value="yes")
        copy.nodes.clear()
        copy.outputs.clear()
        copy.local_functions[0].nodes.clear()
        remove_dead(copy)
        assert to_model(graph).SerializeToString() == before

    def test_edits_of_the_original_do_not_show(self, graph: Graph) -> None:
        copy = graph.copy()
        before = to_model(copy).SerializeToString()
        graph.outputs.clear()
        remove_dead(graph)
        assert graph.nodes == []
        assert to_model(copy).SerializeToString() == before

    def test_bodies_read_the_copies_of_outer_tensors(self, graph: Graph) -> None:
        copy = graph.copy()
        body = copy.nodes[1].attrs["then_branch"]
        assert body.nodes[0].inputs == [copy.nodes[0].outputs[0], copy.constants[0]]

    def test_arrays_are_shared(self, graph: Graph) -> None:
        set_values(graph.constants[0], np.zeros(3, np.float32))
        assert np.shares_memory(graph.copy().constants[0].values, graph.constants[0].values)
        assert graph.copy().constants[1].stored is graph.constants[1].stored


class TestFreeze:
    def test_values_cannot_be_written_to(self, graph: Graph) -> None:
        set_values(graph.constants[0], np.zeros(3, np.float32))
        for constant in graph.constants:
            with pytest.raises(ValueError, match="read-only"):
                constant.values[0] = 1

    def test_the_callers_array_stays_writeable(self) -> None:
        array = np.zeros(3)
        assert not freeze(array).flags.writeable
        array[0] = 1

    @pytest.mark.parametrize("array", [np.float32(3).reshape(()), np.zeros((0, 3)), np.arange(6).reshape(2, 3).T])
    def test_shape_and_values_stay_and_memory_is_contiguous(self, array: np.ndarray) -> None:
        frozen = freeze(array)
        assert frozen.flags.c_contiguous
        assert (frozen.shape, frozen.dtype) == (array.shape, array.dtype)
        np.testing.assert_array_equal(frozen, array)


class TestIdentity:
    def test_tensors_and_nodes_of_equal_content_differ(self) -> None:
        assert Variable("a") != Variable("a")
        assert Constant("a", np.ones(1)) != Constant("a", np.ones(1))
        assert Node("Abs", [], []) != Node("Abs", [], [])
        assert len({Variable("a"), Variable("a")}) == 2

    def test_sizes_of_a_constant(self) -> None:
        constant = Constant("w", np.zeros((2, 3), np.float16))
        assert (constant.shape, constant.size, constant.nbytes, constant.dtype) == ((2, 3), 6, 12, np.dtype(np.float16))
        assert Constant("s", np.float32(1).reshape(())).size == 1


class TestScopes:
    def test_outer_scopes_come_first_and_have_addresses(self, graph: Graph) -> None:
        assert [scope.path for scope in graph.scopes()] == ["", "y.then_branch", "y.else_branch", "local::f"]
        scopes = {scope.path: scope for scope in graph.scopes()}
        assert scopes[""].address("w") == "w"
        assert scopes["y.else_branch"].address("v") == "y.else_branch/v"
        assert [scope.graph.is_function for scope in scopes.values()] == [False, False, False, True]

    def test_a_body_in_a_body_is_addressed_through_both(self) -> None:
        model = parser.parse_model(
            """<ir_version: 8, opset_import: ["": 17]> g (bool c) => (float[1] y) {
                y = If(c) <then_branch = t () => (float[1] a) {
                               a = If(c) <then_branch = tt () => (float[1] b) <float[1] w = {1}> { b = Abs(w) },
                                          else_branch = te () => (float[1] b) <float[1] w = {2}> { b = Abs(w) }> },
                           else_branch = e () => (float[1] a) <float[1] w = {3}> { a = Abs(w) }>
            }"""
        )
        paths = [scope.address("w") for scope in load(model).scopes() if scope.graph.constants]
        assert paths == ["y.then_branch/a.then_branch/w", "y.then_branch/a.else_branch/w", "y.else_branch/w"]
        assert differences(model, to_model(load(model))) == []


def _objects(graph: Graph) -> list[object]:
    """Returns everything of a graph that an edit may change in place; frozen values and stored messages are none."""
    found: list[object] = [graph.model]
    for scope in graph.scopes():
        tensors = {
            id(tensor): tensor
            for tensor in [
                *scope.graph.inputs,
                *scope.graph.outputs,
                *scope.graph.constants,
                *(tensor for node in scope.graph.nodes for tensor in [*node.inputs, *node.outputs]),
            ]
        }
        lists = [scope.graph.nodes, scope.graph.constants, scope.graph.inputs, scope.graph.outputs]
        attributes = [node.attrs for node in scope.graph.nodes]
        values = [item for attrs in attributes for item in attrs.values() if isinstance(item, list)]
        found += [scope.graph, scope.graph.residue, *lists, *scope.graph.nodes, *attributes, *values, *tensors.values()]
    return found


def test_the_fixture_is_valid(graph: Graph) -> None:
    onnx.checker.check_model(to_model(graph), full_check=True)


class TestListedInitializers:
    """A model of IR version 3 lists its initializers as inputs, where they are constants; in a newer file they would be defaults."""

    def model(self, ir_version: int) -> onnx.ModelProto:
        text = """g (float[2] x, float[2] w, float[2] b) => (float[2] y) <float[2] w = {1, 2}, float[2] b = {3, 4}>
            { m = Mul (x, w) y = Add (m, b) }"""
        model = parser.parse_model(f'<ir_version: {ir_version}, opset_import: ["": 8]> {text}')
        assert [info.name for info in model.graph.input] == ["x", "w", "b"]
        return model

    def test_stay_inputs_while_the_version_stays(self) -> None:
        for ir_version in (3, 8):
            model = self.model(ir_version)
            assert to_model(load(model)) == model

    def test_are_no_defaults_that_callers_override_in_a_newer_file(self) -> None:
        graph = load(self.model(3))
        assert not graph.overridable
        graph.constants.append(Constant("new", np.ones(2, np.float32)))
        written = to_model(graph)
        assert written.ir_version == 4
        assert [info.name for info in written.graph.input] == ["x"]
        assert not oracle.session(written).get_overridable_initializers()
        assert graph.ir_version == 3, "writing changes nothing"

    def test_of_a_newer_file_stay_overridable(self) -> None:
        graph = load(self.model(8))
        assert [constant.name for constant in graph.overridable] == ["w", "b"]
        graph.raise_ir_version(9)
        assert [info.name for info in to_model(graph).graph.input] == ["x", "w", "b"]

    def test_raising_the_version_drops_them(self) -> None:
        graph = load(self.model(3))
        graph.raise_ir_version(8)
        assert [tensor.name for tensor in graph.inputs] == ["x"]
        assert graph.ir_version == 8
