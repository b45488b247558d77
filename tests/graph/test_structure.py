"""Tests of what counts as a change of a graph's structure."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper

from onnxshrink.graph.excerpt import tensors_by_name
from onnxshrink.graph.files import load
from onnxshrink.graph.ir import Constant, Graph, Node, Variable
from onnxshrink.graph.structure import Structure
from tests import oracle
from tests.graph.test_channel_rules import build, ints


def model() -> Any:
    """Returns a model of a MatMul, a Reshape with a stored shape, and an If whose bodies read what was computed."""
    body = helper.make_graph([helper.make_node("Relu", ["r"], ["inner"])], "body", [], [oracle.tensor("inner", None)])
    built = build(["MatMul x w -> h", "Reshape h s -> r"], (2, 3), w=(3, 4), s=ints(4, 2), flag=np.bool_(True))
    built.graph.node.append(helper.make_node("If", ["flag"], ["y"], then_branch=body, else_branch=body))
    return built


def constant(graph: Graph, name: str) -> Constant:
    found = tensors_by_name(graph)[name]
    assert isinstance(found, Constant)
    return found


def append_a_node(graph: Graph) -> None:
    graph.nodes.append(Node("Relu", [graph.outputs[0]], [Variable("late")]))


def drop_a_constant(graph: Graph) -> None:
    graph.constants.pop()


def replace_an_input(graph: Graph) -> None:
    graph.nodes[1].inputs[0] = graph.inputs[0]


def replace_what_a_body_reads(graph: Graph) -> None:
    (_, body), *_ = graph.nodes[2].bodies()
    body.nodes[0].inputs[0] = tensors_by_name(graph)["h"]


def set_another_shape(graph: Graph) -> None:
    constant(graph, "s").values = ints(2, 4)


def widen_a_weight(graph: Graph) -> None:
    constant(graph, "w").values = np.zeros((3, 5), np.float32)


def round_a_weight(graph: Graph) -> None:
    constant(graph, "w").values = constant(graph, "w").values.astype(np.float16)


def name_another_op(graph: Graph) -> None:
    graph.nodes[0].op = "Gemm"


def add_an_input(graph: Graph) -> None:
    graph.inputs.append(Variable("more"))


CHANGES = {
    append_a_node: "node 'late'", drop_a_constant: "the number of nodes or constants", replace_an_input: "node 'r'", replace_what_a_body_reads: "node 'y'",
    set_another_shape: "tensor 's'", widen_a_weight: "tensor 'w'", round_a_weight: "tensor 'w'", name_another_op: "node 'h'",
    add_an_input: "the graph's inputs",
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_named(change):
    graph = load(model())
    structure = Structure.of(graph, {id(constant(graph, "s"))})
    change(graph)
    assert structure.change(graph) == CHANGES[change]


def test_new_values_of_weights_and_new_names_are_no_change():
    graph = load(model())
    structure = Structure.of(graph)
    constant(graph, "w").values = -constant(graph, "w").values
    graph.nodes[0].name = "renamed"
    assert structure.change(graph) is None
    assert Structure.of(graph).change(graph) is None


def test_a_copy_is_another_graph():
    graph = load(model())
    assert Structure.of(graph).change(graph.copy()) is not None
