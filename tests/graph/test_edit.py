"""Edits do what they say, clean up after themselves, and their byte counts are those of the file."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, parser

from onnxshrink.errors import PassError
from onnxshrink.graph.edit import (
    Fragment,
    NameSource,
    constant_bytes,
    drop_constant,
    footprint,
    item_bytes,
    node_bytes,
    nodes_bytes,
    output_ids,
    remove_dead,
    replace_constant,
    replace_everywhere,
    replace_node,
    set_values,
    site_of,
    sort_nodes,
)
from onnxshrink.graph.exporter import to_model
from onnxshrink.graph.files import load
from onnxshrink.graph.ir import Constant, Graph, Node, Variable
from tests.oracle import make_model, run, same_bits, session, tensor, value

MODEL = """
<ir_version: 8, opset_import: ["": 17, "local": 1]>
g (float[3] x, bool c, float[3] v) => (float[3] y, float[3] z)
<float[3] w = {1, 2, 3}, float[3] v = {4, 5, 6}, float[3] unused = {7, 8, 9}, float[3] h, float[3] k>
{
    k = Constant <value = float[3] {1, 2, 3}> ()
    h = Add(x, k)
    dead = Mul(h, v)
    deader = Exp(dead)
    y = If(c) <then_branch = t () => (float[3] a) { a = Mul(h, w) },
               else_branch = e () => (float[3] a) <float[3] u = {1, 1, 1}> { b = Add(h, u) d = Exp(b) a = Add(h, u) }>
    z = local.f(x)
}
<domain: "local", opset_import: ["": 17]> f (p) => (r) {
    q = Constant <value = float[3] {3, 3, 3}> () s = Constant <value = float[3] {3, 3, 3}> () d = Exp(s) r = Add(p, q)
}
"""


def graph_of(text: str) -> Graph:
    """Returns the graph of a model given by its inputs, outputs and nodes in ONNX's text form."""
    return load(parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {text}'))


def model_size(graph: Graph) -> int:
    return to_model(graph).ByteSize()


def sites(items: list[Node | Constant]) -> list[str]:
    return sorted(map(site_of, items))


class TestRemoveDead:
    def test_everything_that_nobody_needs_goes(self) -> None:
        graph = load(parser.parse_model(MODEL))
        removed = remove_dead(graph)
        assert sites(removed) == ["b", "d", "d", "dead", "deader", "s", "unused", "v"]
        exported = to_model(graph)
        onnx.checker.check_model(exported, full_check=True)
        assert [info.name for info in exported.graph.input] == ["x", "c"], "an unused default goes with its input"
        assert [node.op_type for node in exported.functions[0].node] == ["Constant", "Add"]

    def test_outputs_are_the_same_afterwards(self) -> None:
        model = parser.parse_model(MODEL)
        graph = load(model)
        remove_dead(graph)
        for flag in (True, False):
            feeds = {"x": np.arange(3, dtype=np.float32), "c": np.array(flag)}
            assert same_bits(run(session(model), feeds), run(session(to_model(graph)), feeds))

    def test_nothing_else_goes(self) -> None:
        graph = load(parser.parse_model(MODEL))
        remove_dead(graph)
        before = to_model(graph).SerializeToString()
        assert remove_dead(graph) == []
        assert to_model(graph).SerializeToString() == before

    def test_only_suspects_and_what_they_needed_go(self) -> None:
        graph = load(parser.parse_model(MODEL))
        deader = next(node for node in graph.nodes if node.op == "Exp")
        assert sites(remove_dead(graph, [deader])) == ["dead", "deader", "v"]
        assert "unused" in {constant.name for constant in graph.constants}

    def test_a_suspect_that_is_read_stays(self) -> None:
        graph = load(parser.parse_model(MODEL))
        assert remove_dead(graph, [graph.nodes[0], graph.constants[0]]) == []

    def test_what_only_a_dead_body_read_goes_with_it(self) -> None:
        graph = graph_of(
            """g (float[3] x, bool c) => (float[3] y) <float[3] w = {1, 2, 3}> {
                h = Exp(x)
                dead = If(c) <then_branch = t () => (float[3] a) { a = Mul(h, w) },
                              else_branch = e () => (float[3] a) <float[3] u = {1, 2, 3}> { b = Neg(u) a = Add(h, b) }>
                y = Neg(x)
            }"""
        )
        before, items = model_size(graph), {id(item): item_bytes(item, graph) for item in graph.items}
        removed = remove_dead(graph)
        assert sites(removed) == ["dead", "h", "w"], "what is inside the body goes with the node and is not named again"
        assert before - model_size(graph) == pytest.approx(sum(items[id(item)] for item in removed), abs=4)

    def test_a_node_stays_while_one_of_its_outputs_is_read(self) -> None:
        graph = graph_of("g (float[4] x) => (float[2] y) <int64[2] s = {2, 2}> { y, z = Split(x, s) }")
        assert remove_dead(graph) == []

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=25),
        st.sets(st.integers(0, 25), min_size=1),
    )
    def test_what_stays_is_what_outputs_reach(self, edges: list[tuple[int, int]], wanted: set[int]) -> None:
        """Against a search backwards from the outputs, on random graphs of Add."""
        names = ["x", "w"]
        nodes, needs = [], {"x": set(), "w": set()}
        for left, right in edges:
            pair = (names[left % len(names)], names[right % len(names)])
            nodes.append(helper.make_node("Add", pair, [name := f"n{len(names)}"]))
            needs[name] = set(pair)
            names.append(name)
        outputs = sorted({names[index % len(names)] for index in wanted} - {"x", "w"})
        reached, queue = set(), list(outputs)
        while queue:
            if (name := queue.pop()) not in reached:
                reached.add(name)
                queue.extend(needs[name])
        infos = [tensor(name, [1]) for name in outputs]
        graph = load(make_model(nodes, [tensor("x", [1])], infos, [value("w", [1], "float32")]))
        remove_dead(graph)
        assert {site_of(item) for item in graph.items} == reached - {"x"}


class TestReplace:
    def fragment(self, graph: Graph, scale: float = 2) -> Fragment:
        """Returns ``constant * scale`` for a constant [3] of value 1, 1, 1."""
        names = NameSource(graph)
        ones, factor = (
            Constant(names.fresh("ones"), np.ones(3, np.float32)),
            Constant(names.fresh("by"), np.full(3, scale, np.float32)),
        )
        output = Variable(names.fresh("product"), np.dtype(np.float32))
        return Fragment(output, [Node("Mul", [ones, factor], [output])], [ones, factor])

    def test_a_fragment_takes_the_place_and_the_name_of_a_constant(self) -> None:
        graph = load(parser.parse_model(MODEL))
        replace_constant(graph, graph.constants[0], self.fragment(graph))
        exported = to_model(graph)
        onnx.checker.check_model(exported, full_check=True)
        assert exported.graph.node[1].output == ["w"]
        outputs = run(session(exported), {"x": np.ones(3, np.float32), "c": np.array(True)})
        assert outputs[0].tolist() == [4, 6, 8], "the branch reads it too"

    def test_a_listed_input_is_no_input_any_more(self) -> None:
        graph = load(parser.parse_model(MODEL))
        replace_constant(graph, graph.constants[1], self.fragment(graph))
        assert [tensor.name for tensor in graph.inputs] == ["x", "c"]
        onnx.checker.check_model(to_model(graph), full_check=True)

    def test_in_a_function_constants_become_nodes(self) -> None:
        graph = load(parser.parse_model(MODEL))
        function = graph.local_functions[0]
        replace_constant(function, function.constants[0], self.fragment(graph))
        exported = to_model(graph)
        onnx.checker.check_model(exported, full_check=True)
        outputs = run(session(exported), {"x": np.ones(3, np.float32), "c": np.array(True)})
        assert outputs[1].tolist() == [3, 3, 3]

    def test_a_constant_that_is_an_output_keeps_its_description(self) -> None:
        model = make_model(
            [helper.make_node("Abs", ["x"], ["y"])], [tensor("x", [3])], [tensor("y", [3]), tensor("w", [3])]
        )
        model.graph.initializer.append(value("w", [1, 2, 3], "float32"))
        model.graph.output[1].doc_string = "read me"
        graph = load(model)
        replace_constant(graph, graph.constants[0], self.fragment(graph))
        assert to_model(graph).graph.output[1] == model.graph.output[1]
        assert run(session(to_model(graph)), {"x": np.ones(3, np.float32)})[1].tolist() == [2, 2, 2]

    def test_constants_take_the_place_of_a_node(self) -> None:
        graph = graph_of(
            "g (float[2] x) => (float[2] y) <float[2] w = {1, 2}, float[2] v = {3, 4}> { h = Neg(w) y = Add(x, h) z = Add(w, v) }"
        )
        replace_node(graph, graph, graph.nodes[0], [Constant("h", np.array([7, 8], np.float32))])
        assert [node.op for node in graph.nodes] == ["Add", "Add"]
        assert run(session(to_model(graph)), {"x": np.zeros(2, np.float32)})[0].tolist() == [7, 8]
        assert [constant.name for constant in graph.constants] == ["w", "v", "h"], "w is still read"

    def test_a_replaced_output_stays_an_output(self) -> None:
        graph = graph_of("g (float[2] x) => (float[2] y) <float[2] y = {1, 2}> { z = Add(x, y) }")
        new = Constant("y", np.array([7, 8], np.float32))
        replace_everywhere(graph, graph.constants[0], new)
        drop_constant(graph, graph.constants[0])
        graph.constants.append(new)
        assert run(session(to_model(graph)), {"x": np.zeros(2, np.float32)})[0].tolist() == [7, 8]

    def test_an_input_read_twice_is_replaced_twice(self) -> None:
        graph = graph_of("g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { y = Mul(w, w) }")
        old, new = graph.constants[0], Constant("new", np.array([3, 4], np.float32))
        replace_everywhere(graph, old, new)
        assert graph.nodes[0].inputs == [new, new]
        assert old.outputs == []
        assert new.outputs == [graph.nodes[0]] * 2

    @pytest.mark.parametrize("values", [np.zeros(4, np.float32), np.zeros(3), np.zeros((1, 3), np.float32)])
    def test_values_of_another_kind_are_refused(self, values: Any) -> None:
        graph = load(parser.parse_model(MODEL))
        with pytest.raises(PassError, match=r"tensor 'w': new values must be float32 \(3,\), got"):
            set_values(graph.constants[0], values)


class TestSort:
    def test_it_makes_a_shuffled_graph_valid(self) -> None:
        model = parser.parse_model(MODEL)
        shuffled = load(model)
        for scope in shuffled.scopes():
            scope.graph.nodes.reverse()
        with pytest.raises(onnx.checker.ValidationError):
            onnx.checker.check_model(to_model(shuffled))
        sort_nodes(shuffled)
        onnx.checker.check_model(to_model(shuffled), full_check=True)

    def test_a_sorted_graph_stays_as_it_is(self, corpus_model: Any) -> None:
        graph = load(corpus_model)
        order = [[id(node) for node in scope.graph.nodes] for scope in graph.scopes()]
        sort_nodes(graph)
        assert [[id(node) for node in scope.graph.nodes] for scope in graph.scopes()] == order

    @settings(max_examples=60, deadline=None)
    @given(st.permutations(range(8)), st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=12))
    def test_the_order_is_the_first_valid_one(self, order: list[int], edges: list[tuple[int, int]]) -> None:
        """Of all valid orders, the one that always takes the earliest node that may come next."""
        tensors = [Variable(f"t{index}") for index in range(8)]
        needs: dict[int, set[int]] = {index: {a for a, b in edges if b == index and a < b} for index in range(8)}
        nodes = {index: Node("Op", [tensors[need] for need in needs[index]], [tensors[index]]) for index in order}
        graph = Graph("g", 17, onnx.GraphProto())
        graph.nodes = [nodes[index] for index in order]
        sort_nodes(graph)
        expected: list[int] = []
        while len(expected) < 8:
            expected.append(next(index for index in order if index not in expected and needs[index] <= set(expected)))
        assert [tensors.index(node.outputs[0]) for node in graph.nodes] == expected

    def test_what_a_body_reads_comes_before_its_node(self) -> None:
        graph = graph_of(
            """g (float[3] x, bool c) => (float[3] y) {
                y = If(c) <then_branch = t () => (float[3] a) {
                        a = If(c) <then_branch = tt () => (float[3] b) { b = Neg(h) },
                                   else_branch = te () => (float[3] b) { b = Abs(h) }> },
                    else_branch = e () => (float[3] a) { a = Neg(x) }>
                h = Exp(x)
            }"""
        )
        sort_nodes(graph)
        assert [node.op for node in graph.nodes] == ["Exp", "If"]

    @pytest.mark.parametrize(
        "nodes",
        [
            "a = Neg(b) b = Neg(a) y = Neg(b)",
            "y = Add(x, y)",
            """y = If(c) <then_branch = t () => (float[1] a) { a = Neg(y) }, else_branch = e () => (float[1] a) { a = Neg(x) }>""",
        ],
    )
    def test_cycles_are_refused(self, nodes: str) -> None:
        with pytest.raises(PassError, match="must not depend on itself, got a cycle"):
            sort_nodes(graph_of(f"g (float[1] x, bool c) => (float[1] y) {{ {nodes} }}"))

    def test_ten_thousand_nodes_in_a_row(self) -> None:
        names = ["x", *(f"h{index}" for index in range(10_000))]
        nodes = [helper.make_node("Neg", [a], [b]) for a, b in itertools.pairwise(names)]
        graph = load(make_model(nodes[::-1], [tensor("x", [1])], [tensor(names[-1], [1])]))
        start = time.perf_counter()
        sort_nodes(graph)
        assert [node.outputs[0].name for node in graph.nodes] == names[1:]
        assert remove_dead(graph.copy()) == []
        graph.outputs = [graph.inputs[0]]
        assert len(remove_dead(graph)) == 10_000
        assert time.perf_counter() - start < 10, "it takes a fraction of a second"


class TestNames:
    def test_fresh_names_are_new_in_every_scope(self) -> None:
        graph = load(parser.parse_model(MODEL))
        names = NameSource(graph)
        assert [names.fresh(stem) for stem in ("new", "new", "w", "u", "q", "x", "w")] == [
            "new",
            "new_2",
            "w_2",
            "u_2",
            "q_2",
            "x_2",
            "w_3",
        ]

    def test_they_avoid_names_of_their_own_form(self) -> None:
        names = NameSource(graph_of("g (float[1] w, float[1] w_2) => (float[1] w_3) { w_3 = Add(w, w_2) }"))
        assert names.fresh("w") == "w_4"

    def test_they_are_deterministic(self) -> None:
        graph = load(parser.parse_model(MODEL))
        first, second = NameSource(graph), NameSource(graph.copy())
        assert [first.fresh("w") for _ in range(5)] == [second.fresh("w") for _ in range(5)]


CONSTANTS = {
    "initializer": lambda graph: (graph, "w"),
    "listed as input": lambda graph: (graph, "v"),
    "Constant node": lambda graph: (graph, "k"),
    "in a branch": lambda graph: (graph.nodes[3].attrs["else_branch"], "u"),
    "in a function": lambda graph: (graph.local_functions[0], "q"),
}
_LENGTH_BYTES = 4  # outer lengths may need a byte more or less, once per level


class TestBytes:
    """Counts equal differences in the size of the file."""

    @staticmethod
    def constant(graph: Graph, find: Callable[[Graph], tuple[Graph, str]]) -> tuple[Graph, Constant]:
        scope, name = find(graph)
        return scope, next(constant for constant in scope.constants if constant.name == name)

    @pytest.mark.parametrize("edited", [False, True])
    @pytest.mark.parametrize("find", CONSTANTS.values(), ids=CONSTANTS.keys())
    def test_of_a_constant(self, find: Callable[[Graph], tuple[Graph, str]], edited: bool) -> None:
        graph = load(parser.parse_model(MODEL))
        scope, constant = self.constant(graph, find)
        if edited:
            set_values(constant, np.full(3, 5, np.float32))
        before = model_size(graph)
        drop_constant(scope, constant)
        assert before - model_size(graph) == pytest.approx(constant_bytes(constant, scope), abs=_LENGTH_BYTES)
        assert item_bytes(constant, scope) == constant_bytes(constant, scope)

    @pytest.mark.parametrize("size", [0, 1, 31, 32, 1000, 100_000])
    @pytest.mark.parametrize("find", CONSTANTS.values(), ids=CONSTANTS.keys())
    def test_of_a_constant_added(self, find: Callable[[Graph], tuple[Graph, str]], size: int) -> None:
        graph = load(parser.parse_model(MODEL))
        scope, _ = find(graph)
        before = model_size(graph)
        scope.constants.append(constant := Constant("added", np.zeros(size, np.float16)))
        assert model_size(graph) - before == pytest.approx(constant_bytes(constant, scope), abs=2 * _LENGTH_BYTES)

    def test_of_every_node(self) -> None:
        model = parser.parse_model(MODEL)
        model.graph.node[4].doc_string = "read me"
        paths = [(scope.path, index) for scope in load(model).scopes() for index in range(len(scope.graph.nodes))]
        for path, index in paths:
            graph = load(model)
            scope = next(scope.graph for scope in graph.scopes() if scope.path == path)
            before, node = model_size(graph), scope.nodes[index]
            is_output = any(tensor in scope.outputs for tensor in node.outputs)
            described = sum(
                2 + tensor.info.ByteSize() for tensor in node.outputs if is_output and tensor.info is not None
            )
            del scope.nodes[index]
            expected = node_bytes(node) - described  # outputs of a graph stay described
            assert before - model_size(graph) == pytest.approx(expected, abs=_LENGTH_BYTES)

    def test_of_nodes_each_counts_once(self) -> None:
        graph = load(parser.parse_model(MODEL))
        first, second = graph.nodes[:2]
        assert nodes_bytes([first, second, first]) == node_bytes(first) + node_bytes(second)

    def test_of_a_node_and_what_only_it_reads(self) -> None:
        graph = graph_of(
            """g (float[3] x) => (float[3] y) <float[3] own = {1, 2, 3}, float[3] shared = {1, 2, 3}> {
                h = Sum(x, own, shared, own) y = Mul(x, shared)
            }"""
        )
        counted = footprint([graph.nodes[0]], graph, output_ids(graph))
        before = model_size(graph)
        assert sites(remove_dead(graph, [graph.nodes[0]])) == ["h", "own"]
        assert before - model_size(graph) == pytest.approx(counted, abs=_LENGTH_BYTES)

    def test_a_constant_that_is_an_output_is_not_for_its_reader_alone(self) -> None:
        graph = graph_of("g (float[3] x) => (float[3] y, float[3] w) <float[3] w = {1, 2, 3}> { y = Add(x, w) }")
        assert footprint(graph.nodes, graph, output_ids(graph)) == node_bytes(graph.nodes[0])

    def test_of_a_fragment(self) -> None:
        graph = load(parser.parse_model(MODEL))
        fragment = TestReplace().fragment(graph)
        before = model_size(graph)
        graph.nodes[:0] = fragment.nodes
        graph.constants.extend(fragment.constants)
        assert model_size(graph) - before == pytest.approx(fragment.nbytes(graph), abs=_LENGTH_BYTES)

    def test_of_a_whole_model_add_up(self, corpus_model: Any) -> None:
        """Everything in the main graph, item by item, is what the file is made of, but for its head and its borders."""
        graph = load(corpus_model)
        whole = model_size(graph)
        counted = sum(item_bytes(item, graph) for item in graph.items)
        graph.nodes, graph.constants = [], []
        graph.inputs = [tensor for tensor in graph.inputs if not isinstance(tensor, Constant)]
        described = {tensor.name for tensor in graph.outputs}
        counted -= sum(len(to_model(graph).graph.output[i].SerializeToString()) + 2 for i, _ in enumerate(described))
        assert whole - model_size(graph) == pytest.approx(counted, abs=4 * _LENGTH_BYTES)
