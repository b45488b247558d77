"""Weights are found wherever they hide, with every use, and what must not be changed says why."""

from __future__ import annotations

import itertools
import time

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, parser

from onnxshrink.graph.edit import set_values
from onnxshrink.graph.exporter import to_model
from onnxshrink.graph.files import load
from onnxshrink.graph.weights import Weight, weights
from tests import corpus
from tests.oracle import make_model, run, session, tensor, value

W23 = "{1, 2, 3, 4, 5, 6}"
LESS_IS_WEIGHTS = {  # the share of float bytes that are weight operands, where it is below 98 %
    "fsanet_1x1": 0.76,  # a fifth of its initializers is used by no node
    "gtcrn": 0.87,  # many normalisations by Mul and Add
    "ppocrv2_cls": 0.92,  # BatchNormalization is not folded
}


def found(model: str | onnx.ModelProto) -> dict[str, Weight]:
    """Returns the weights of a model, or of a graph body in ONNX's text form, by site."""
    if isinstance(model, str):
        model = parser.parse_model(f'<ir_version: 10, opset_import: ["": 17, "local": 1]> {model}')
    return {weight.site: weight for weight in weights(load(model))}


def summary(weight: Weight) -> list[str]:
    """Returns every use as "op:operand" behind the ops of its path."""
    return [">".join([*(node.op for node in use.path), f"{use.op}:{use.operand}"]) for use in weight.uses]


class TestHiding:
    """Each place where a weight may be stored or be passed through."""

    def test_initializers_and_constant_nodes(self) -> None:
        weight = found(
            f"""g (float[1, 2] x) => (float[1, 3] y, float[1, 3] z) <float[2, 3] w = {W23}> {{
                k = Constant <value = float[2, 3] {W23}> ()
                y = MatMul(x, w)
                z = MatMul(x, k)
            }}"""
        )
        assert {site: summary(item) for site, item in weight.items()} == {"w": ["MatMul:1"], "k": ["MatMul:1"]}
        assert {item.obstacle for item in weight.values()} == {None}

    def test_initializers_that_are_graph_inputs(self) -> None:
        model = make_model(
            [helper.make_node("MatMul", ["x", "w"], ["y"])],
            [tensor("x", [1, 2]), tensor("w", [2, 3])],
            [tensor("y", [1, 3])],
            [value("w", np.ones((2, 3)), "float32")],
            ir_version=3,
        )
        assert summary(found(model)["w"]) == ["MatMul:1"]
        assert found(model)["w"].obstacle is None

    def test_sparse_initializers(self) -> None:
        model = make_model(
            [helper.make_node("MatMul", ["x", "w"], ["y"])], [tensor("x", [1, 2])], [tensor("y", [1, 3])]
        )
        values, indices = value("w", [1.0], "float32"), value("", [4], "int64")
        model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [2, 3]))
        assert found(model)["w"].obstacle is None

    @pytest.mark.parametrize(
        ("mover", "path"),
        [
            ("v = Identity(w)", ["Identity>MatMul:1"]),
            ("v = Cast <to = 1> (w)", ["Cast>MatMul:1"]),
            ("t = Transpose(w) v = Transpose(t)", ["Transpose>Transpose>MatMul:1"]),
            ("v = Reshape(w, s)", ["Reshape>MatMul:1"]),
            ("t = Unsqueeze(w, a) v = Squeeze(t, a)", ["Unsqueeze>Squeeze>MatMul:1"]),
            ("v = Flatten(w)", ["Flatten>MatMul:1"]),
        ],
    )
    def test_behind_movers(self, mover: str, path: list[str]) -> None:
        weight = found(
            f"""g (float[1, 2] x) => (float[1, 3] y)
            <float[2, 3] w = {W23}, int64[2] s = {{2, 3}}, int64[1] a = {{0}}> {{ {mover} y = MatMul(x, v) }}"""
        )["w"]
        assert summary(weight) == path
        assert weight.obstacle is None
        assert weight.view is not None
        np.testing.assert_array_equal(weight.view.forward(weight.constant.values), [[1, 4], [2, 5], [3, 6]])

    def test_behind_dequantize_linear(self) -> None:
        weight = found(
            f"""g (float[1, 2] x) => (float[1, 3] y) <int8[2, 3] q = {W23}, float[3] scale = {{1, 2, 3}}, int8[3] zero = {{0, 0, 0}}> {{
                w = DequantizeLinear <axis = 1> (q, scale, zero)
                y = MatMul(x, w)
            }}"""
        )
        assert summary(weight["q"]) == ["DequantizeLinear>MatMul:1"]
        assert weight["q"].obstacle == "holds int8 values, not floating point"
        assert weight["scale"].obstacle == "is read as input 1 of DequantizeLinear, which is no weight operand"

    def test_tied_weights_are_one(self) -> None:
        weight = found(
            f"""g (int64[2] i, float[1, 3] x) => (float[2, 3] e, float[1, 2] y) <float[2, 3] table = {W23}> {{
                e = Gather(table, i)
                t = Transpose(table)
                y = MatMul(x, t)
            }}"""
        )
        assert summary(weight["table"]) == ["Gather:0", "Transpose>MatMul:1"]
        assert weight["table"].computes
        assert weight["table"].obstacle is None
        assert weight["table"].view is None, "the two uses see different matrices"

    def test_uses_that_agree_share_a_view(self) -> None:
        weight = found(
            f"""g (float[1, 2] x) => (float[1, 3] y, float[1, 3] z) <float[2, 3] w = {W23}> {{
                y = MatMul(x, w)
                z = Gemm(x, w)
            }}"""
        )["w"]
        assert summary(weight) == ["MatMul:1", "Gemm:1"]
        assert weight.view is not None

    def test_one_node_may_read_a_weight_twice(self) -> None:
        weight = found("g () => (float[2, 2] y) <float[2, 2] w = {1, 2, 3, 4}> { y = MatMul(w, w) }")["w"]
        assert summary(weight) == ["MatMul:0", "MatMul:1"]
        assert weight.view is None

    def test_in_branches_and_from_outside_them(self) -> None:
        weight = found(
            f"""g (float[1, 2] x, bool c) => (float[1, 3] y) <float[2, 3] outer = {W23}> {{
                y = If(c) <
                    then_branch = t () => (float[1, 3] a) <float[2, 3] w = {W23}> {{ a = MatMul(x, w) }},
                    else_branch = e () => (float[1, 3] a) {{
                        w = Constant <value = float[2, 3] {W23}> ()
                        b = MatMul(x, w) d = MatMul(x, outer) a = Add(b, d)
                    }}>
            }}"""
        )
        assert sorted(weight) == ["outer", "y.else_branch/w", "y.then_branch/w"]
        assert [summary(item) for item in weight.values()] == [["MatMul:1"]] * 3
        assert weight["outer"].scope.path == ""
        assert weight["y.else_branch/w"].scope.path == "y.else_branch"

    def test_integers_are_found_too(self) -> None:
        weight = found("g (float[2, 3] x) => (float[3, 2] y) <int64[2] s = {3, 2}> { y = Reshape(x, s) }")["s"]
        assert weight.obstacle == "holds int64 values, not floating point"

    def test_in_loop_and_scan_bodies(self) -> None:
        weight = found(
            """g (float[2, 2] x, int64 n, bool c) => (float[2, 2] y, float[k, 2] z) {
                y = Loop(n, c, x) <body = b (int64 i, bool d, float[2, 2] h) => (bool e, float[2, 2] o)
                    <float[2, 2] w = {1, 2, 3, 4}> { e = Identity(d) o = MatMul(h, w) }>
                z = Scan <num_scan_inputs = 1, body = s (float[2] row) => (float[2] o)
                    <float[2, 2] w = {1, 2, 3, 4}> { o = MatMul(row, w) }> (x)
            }"""
        )
        assert {site: summary(item) for site, item in weight.items()} == {
            "y.body/w": ["MatMul:1"],
            "z.body/w": ["MatMul:1"],
        }

    def test_behind_slices_and_concat_without_a_view(self) -> None:
        weight = found(
            f"""g (float[1, 2] x) => (float[1, 3] y)
            <float[2, 3] w = {W23}, int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] three = {{3}}> {{
                a = Slice(w, zero, one, one)
                b = Slice(w, one, three, one)
                v = Concat <axis = 1> (b, a)
                y = MatMul(x, v)
            }}"""
        )
        assert summary(weight["w"]) == ["Slice>Concat>MatMul:1"]
        assert weight["w"].obstacle is None
        assert weight["w"].view is None
        assert weight["w"].computes

    def test_uses_of_the_shape_alone_do_not_count(self) -> None:
        weight = found(
            f"""g (float[1, 2] x) => (float[1, 3] y, int64[2] s, int64 n) <float[2, 3] w = {W23}> {{
                s = Shape(w) n = Size(w) y = MatMul(x, w)
            }}"""
        )["w"]
        assert summary(weight) == ["MatMul:1"]
        assert weight.obstacle is None

    def test_scalars_and_texts_are_no_weights(self) -> None:
        model = make_model(
            [helper.make_node("Add", ["x", "one"], ["y"]), helper.make_node("Identity", ["words"], ["z"])],
            [tensor("x", [1])],
            [tensor("y", [1]), tensor("z", [2], TensorProto.STRING)],
            [value("one", [1.0], "float32"), value("words", np.array(["a", "b"], object))],
        )
        assert found(model) == {}


class TestFunctions:
    """Model-local functions own weights, are passed some, and may hand them back."""

    def test_inside_a_function(self) -> None:
        weight = found(
            f"""g (float[1, 2] x) => (float[1, 3] y) {{ y = local.f(x) }}
            <domain: "local", opset_import: ["": 17]> f (p) => (r) {{ w = Constant <value = float[2, 3] {W23}> () r = MatMul(p, w) }}"""
        )
        assert {site: summary(item) for site, item in weight.items()} == {"local::f/w": ["MatMul:1"]}
        assert weight["local::f/w"].obstacle is None

    def test_passed_to_a_function_at_each_call(self) -> None:
        weight = found(
            f"""g (float[1, 2] x) => (float[1, 3] y, float[1, 3] z) <float[2, 3] w = {W23}, float[3, 2] v = {W23}> {{
                y = local.f(x, w)
                t = Transpose(v)
                z = local.f(x, t)
            }}
            <domain: "local", opset_import: ["": 17]> f (p, q) => (r) {{ r = MatMul(p, q) }}"""
        )
        assert summary(weight["w"]) == ["f>MatMul:1"]
        assert summary(weight["v"]) == ["Transpose>f>MatMul:1"]
        for item in weight.values():
            assert item.obstacle is None
            assert item.view is not None
            assert item.view.shape == (3, 2)

    def test_handed_on_by_a_function(self) -> None:
        weight = found(
            f"""g (float[1, 2] x) => (float[1, 3] y, float[2, 3] z) <float[3, 2] w = {W23}, float[3, 2] v = {W23}> {{
                t = local.turn(w)
                y = MatMul(x, t)
                u = local.turn(v)
                z = Exp(u)
            }}
            <domain: "local", opset_import: ["": 17]> turn (p) => (r) {{ r = Transpose(p) }}"""
        )
        assert summary(weight["w"]) == ["turn>Transpose>MatMul:1"]
        assert weight["w"].obstacle is None
        assert summary(weight["v"]) == ["turn>Transpose>Exp:0"]
        assert weight["v"].obstacle == "is read as input 0 of Exp, which is no weight operand"

    def test_owned_by_a_function_and_read_where_it_is_called(self) -> None:
        weight = found(
            f"""g (float[1, 2] x) => (float[1, 3] y, float[2, 3] z) {{
                t = local.outer() y = MatMul(x, t)
                u = local.outer() z = Exp(u)
            }}
            <domain: "local", opset_import: ["": 17]> inner () => (r) {{ w = Constant <value = float[2, 3] {W23}> () r = Identity(w) }}
            <domain: "local", opset_import: ["": 17, "local": 1]> outer () => (r) {{ r = local.inner() }}"""
        )["local::inner/w"]
        assert summary(weight) == ["Identity>MatMul:1", "Identity>Exp:0"]
        assert weight.obstacle == "is read as input 0 of Exp, which is no weight operand"

    def test_a_function_of_functions_returns_to_the_right_call(self) -> None:
        weight = found(
            f"""g (float[1, 2] x) => (float[1, 3] y, float[2, 2] z) <float[2, 3] w = {W23}, float[2, 2] v = {{1, 2, 3, 4}}> {{
                t = local.twice(w) y = MatMul(x, t)
                u = local.twice(v) z = Exp(u)
            }}
            <domain: "local", opset_import: ["": 17]> turn (p) => (r) {{ r = Transpose(p) }}
            <domain: "local", opset_import: ["": 17, "local": 1]> twice (p) => (r) {{ q = local.turn(p) r = local.turn(q) }}"""
        )
        assert summary(weight["w"]) == ["twice>turn>Transpose>turn>Transpose>MatMul:1"]
        assert weight["w"].obstacle is None

    def test_functions_of_one_name_differ_by_overload(self) -> None:
        model = parser.parse_model(
            f"""<ir_version: 10, opset_import: ["": 17, "local": 1]>
            g (float[1, 2] x) => (float[1, 3] y, float[2, 3] z) <float[2, 3] w = {W23}> {{ y = local.f(x, w) z = local.f(w, w) }}
            <domain: "local", opset_import: ["": 17]> f (p, q) => (r) {{ r = MatMul(p, q) }}
            <domain: "local", opset_import: ["": 17]> f (p, q) => (r) {{ r = Add(p, q) }}"""
        )
        for index, overload in enumerate(["product", "sum"]):
            model.graph.node[index].overload = model.functions[index].overload = overload
        assert summary(found(model)["w"]) == ["f>MatMul:1", "f>Add:0", "f>Add:1"]

    def test_a_function_that_calls_itself_ends(self) -> None:
        weight = found(
            f"""g () => (float[2, 3] y) <float[2, 3] w = {W23}> {{ y = local.f(w) }}
            <domain: "local", opset_import: ["": 17, "local": 1]> f (p) => (r) {{ q = Transpose(p) r = local.f(q) }}"""
        )["w"]
        assert weight.obstacle is not None


class TestObstacles:
    @pytest.mark.parametrize(
        ("nodes", "reason"),
        [
            ("y = Add(x, w)", "is read as input 1 of Add, which is no weight operand"),
            ("y = MatMul(x, w) z = Exp(w)", "is read as input 0 of Exp, which is no weight operand"),
            ("y = Identity(x)", "is not used"),
            ("y = Identity(w)", "is a graph output"),
            ("h = Transpose(w) y = Softmax(h)", "is read as input 0 of Softmax, which is no weight operand"),
            ("t = Cast <to = 7> (w) y = Gather(x, t)", "is read as input 1 of Gather, which is no weight operand"),
        ],
    )
    def test_why_it_must_stay(self, nodes: str, reason: str) -> None:
        assert (
            found(f"g (float[2, 2] x) => (float[n, m] y) <float[2, 2] w = {{1, 2, 3, 4}}> {{ {nodes} }}")["w"].obstacle
            == reason
        )

    def test_a_tensor_that_is_itself_an_output(self) -> None:
        weight = found(
            "g (float[2, 2] x) => (float[2, 2] y, float[2, 2] w) <float[2, 2] w = {1, 2, 3, 4}> { y = MatMul(x, w) }"
        )["w"]
        assert weight.obstacle == "is a graph output"

    def test_the_initial_state_of_a_loop(self) -> None:
        weight = found(
            """g (int64 n, bool c) => (float[2] y) <float[2] w = {1, 2}> {
                y = Loop(n, c, w) <body = b (int64 i, bool d, float[2] h) => (bool e, float[2] o) { e = Identity(d) o = Exp(h) }>
            }"""
        )["w"]
        assert weight.obstacle == "is read as input 2 of Loop, which is no weight operand"

    def test_looking_up_is_no_arithmetic(self) -> None:
        weight = found(f"g (int64[2] i) => (float[2, 3] y) <float[2, 3] w = {W23}> {{ y = Gather(w, i) }}")["w"]
        assert weight.obstacle is None
        assert not weight.computes


class TestNames:
    def test_rules_may_name_the_tensor_its_nodes_and_their_outputs(self) -> None:
        model = make_model(
            [
                helper.make_node("MatMul", ["x", "w"], ["y"], name="/layer4/MatMul"),
                helper.make_node("MatMul", ["x", "w"], ["z"]),
            ],
            [tensor("x", [1, 2])],
            [tensor("y", [1, 3]), tensor("z", [1, 3])],
            [value("w", np.ones((2, 3)), "float32")],
        )
        assert found(model)["w"].names == ("w", "/layer4/MatMul", "y", "z")

    def test_a_weight_of_a_body_is_named_with_its_path(self) -> None:
        weight = found(
            """g (float[1, 2] x, bool c) => (float[1, 2] y) {
                y = If(c) <then_branch = t () => (float[1, 2] a) <float[2, 2] w = {1, 2, 3, 4}> { a = MatMul(x, w) },
                           else_branch = e () => (float[1, 2] a) { a = Identity(x) }>
            }"""
        )
        assert weight["y.then_branch/w"].names[0] == "y.then_branch/w"


class TestSize:
    def test_long_chains_need_no_recursion(self) -> None:
        names = ["w", *(f"h{index}" for index in range(5000))]
        nodes = [helper.make_node("Identity", [source], [target]) for source, target in itertools.pairwise(names)]
        nodes.append(helper.make_node("MatMul", ["x", names[-1]], ["y"]))
        model = make_model(
            nodes, [tensor("x", [1, 2])], [tensor("y", [1, 3])], [value("w", np.ones((2, 3)), "float32")]
        )
        assert len(found(model)["w"].uses[0].path) == 5000

    def test_ways_that_part_and_meet_are_walked_once(self) -> None:
        names = ["w", *(f"h{index}" for index in range(60))]
        nodes = [helper.make_node("Concat", [a, a], [b], axis=0) for a, b in itertools.pairwise(names)]
        nodes.append(helper.make_node("Gather", [names[-1], "i"], ["y"]))
        model = make_model(
            nodes, [tensor("i", [1], TensorProto.INT64)], [tensor("y", None)], [value("w", [1, 2], "float32")]
        )
        start = time.perf_counter()
        assert found(model)["w"].obstacle is None
        assert time.perf_counter() - start < 5

    def test_cycles_end(self) -> None:
        nodes = [helper.make_node("Concat", ["w", "b"], ["a"], axis=0), helper.make_node("Identity", ["a"], ["b"])]
        model = make_model(nodes, [], [tensor("b", None)], [value("w", [1, 2], "float32")])
        assert found(model)["w"].obstacle == "is a graph output"


def test_editing_a_weight_changes_what_onnx_runtime_computes() -> None:
    model = parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]> g (float[1, 2] x) => (float[1, 3] y) <float[2, 3] w = {W23}> {{
            t = Transpose(w) v = Transpose(t) y = MatMul(x, v)
        }}"""
    )
    graph = load(model)
    weight = weights(graph)[0]
    assert weight.view is not None
    matrix = weight.view.forward(weight.constant.values).copy()
    matrix[1] = 0
    set_values(weight.constant, weight.view.inverse(matrix))
    assert run(session(to_model(graph)), {"x": np.ones((1, 2), np.float32)})[0].tolist() == [[5, 0, 9]]


class TestCorpus:
    def test_most_bytes_of_every_model_are_seen(self, corpus_name: str) -> None:
        """Bytes of floating-point constants without an obstacle, of all there are; the rest is named by its obstacle."""
        found_weights = [
            weight for weight in weights(load(corpus.model_path(corpus_name))) if weight.constant.dtype.kind == "f"
        ]
        total = sum(weight.constant.nbytes for weight in found_weights)
        free = sum(weight.constant.nbytes for weight in found_weights if weight.obstacle is None)
        assert free >= LESS_IS_WEIGHTS.get(corpus_name, 0.98) * total

    def test_what_is_called_unused_is_read_by_no_node(self, corpus_name: str) -> None:
        model = onnx.load(corpus.model_path(corpus_name))
        unused = {
            weight.site
            for weight in weights(load(model))
            if weight.obstacle == "is not used" and weight.scope.path == ""
        }
        assert unused == {item.name for item in model.graph.initializer if _could_be_weight(item)} - _names_read(
            model.graph
        )


def _could_be_weight(item: TensorProto) -> bool:
    return item.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16) and np.prod(item.dims) > 1


def _names_read(graph: onnx.GraphProto) -> set[str]:
    """Returns the names that nodes of a graph, or of bodies in it, read the values of, and those of its outputs."""
    names = {info.name for info in graph.output}
    for node in graph.node:
        names |= set(node.input) if node.op_type != "Shape" else set()
        for attribute in node.attribute:
            names |= _names_read(attribute.g)
    return names
