"""Coded weights are found by their structure, exactly those, and expanded to the same outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import parser

from onnxshrink.graph.codebook import Codebook, coded_weight
from onnxshrink.graph.coded import Coded, coded_weights, expand_coded
from onnxshrink.graph.edit import NameSource, replace_constant
from onnxshrink.graph.exporter import to_model
from onnxshrink.graph.files import load, model_bytes, save
from onnxshrink.graph.ir import Graph
from onnxshrink.graph.weights import weights
from tests.oracle import run, same_bits, session

W = "{0, 1, 2, 3, 4, 5}"
X = {"x": np.arange(4, dtype=np.float32).reshape(2, 2)}


def graph_of(text: str) -> Graph:
    return load(parser.parse_model(f'<ir_version: 8, opset_import: ["": 17, "local": 1]> {text}'))


def encode(graph: Graph, *names: str, bits: int = 8) -> Graph:
    """Stores the named constants, whose values are 0, 1, 2, ..., as codes."""
    for scope in list(graph.scopes()):
        for constant in [item for item in scope.graph.constants if item.name in names]:
            codes = constant.values.astype(np.uint8)
            book = Codebook(np.arange(2**bits).astype(constant.dtype))
            replace_constant(
                scope.graph, constant, coded_weight(constant, codes, bits, book, scope.graph, NameSource(graph))
            )
    return graph


def sites(found: list[Coded]) -> list[str]:
    return [coded.site for coded in found]


def assert_expands_to(graph: Graph, text: str, *, feeds: Any = None) -> None:
    """Whether the expanded graph has the nodes and constants of the original one, with the same outputs in between."""
    original = to_model(graph_of(text))
    feeds = X if feeds is None else feeds
    expected = run(session(original), feeds)
    assert same_bits(run(session(to_model(graph)), feeds), expected)
    expand_coded(graph)
    assert coded_weights(graph) == []
    expanded = to_model(graph)
    assert same_bits(run(session(expanded), feeds), expected)
    for ours, theirs in zip(expanded.graph.node, original.graph.node, strict=True):
        assert (ours.op_type, ours.input, ours.output) == (theirs.op_type, theirs.input, theirs.output)
    assert {item.name for item in expanded.graph.initializer} == {item.name for item in original.graph.initializer}


class TestFinding:
    TWO = f"g (float[2, 2] x) => (float[2, 3] y) <float[2, 3] w = {W}, float[3] b = {{1, 2, 3}}> {{ h = MatMul(x, w) y = Add(h, b) }}"

    @pytest.mark.parametrize("bits", [3, 8])
    def test_exactly_the_coded_ones_before_and_after_saving(self, tmp_path: Any, bits: int) -> None:
        graph = encode(graph_of(self.TWO), "w", bits=bits)
        assert sites(coded_weights(graph)) == ["w"]
        save(graph, tmp_path / "m.onnx")
        (found,) = coded_weights(load(tmp_path / "m.onnx"))
        assert found.site == "w"
        assert found.values().tolist() == [[0, 1, 2], [3, 4, 5]]
        assert {constant.dtype.name for constant in found.codes} == {"uint8"}
        assert [weight.site for weight in weights(graph)] == ["b"], "parts of coded weights are no weights"

    def test_names_do_not_matter(self) -> None:
        model = to_model(encode(graph_of(self.TWO), "w", bits=3))
        names = {name for node in model.graph.node for name in [*node.input, *node.output]} - {"x", "y"}
        renamed = {name: f"t{index}" for index, name in enumerate(sorted(names))}
        for node in model.graph.node:
            for field in (node.input, node.output):
                field[:] = [renamed.get(name, name) for name in field]
        for item in model.graph.initializer:
            item.name = renamed[item.name]
        del model.graph.value_info[:]
        assert sites(coded_weights(load(model))) == [renamed["w"]]

    def test_bytes_are_those_of_the_file(self) -> None:
        graph = encode(graph_of(self.TWO), "w")
        (found,) = coded_weights(graph)
        before, size = model_bytes(graph), found.nbytes
        expand_coded(graph)
        dense = model_bytes(load(parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {self.TWO}')))
        assert model_bytes(graph) == pytest.approx(dense, abs=16)
        weight = next(item for item in graph.constants if item.name == "w")
        assert before - size == pytest.approx(model_bytes(graph) - weight.nbytes, abs=20)

    def test_in_every_scope(self) -> None:
        text = f"""g (float[2, 2] x, bool c) => (float[2, 3] y, float[2, 3] z) {{
                y = If(c) <then_branch = t () => (float[2, 3] a) <float[2, 3] w = {W}> {{ a = MatMul(x, w) }},
                           else_branch = e () => (float[2, 3] a) <float[2, 3] w = {W}> {{ b = MatMul(x, w) a = Exp(b) }}>
                z = local.f(x)
            }}
            <domain: "local", opset_import: ["": 17]> f (p) => (r) {{ w = Constant <value = float[2, 3] {W}> () r = MatMul(p, w) }}"""
        graph = encode(graph_of(text), "w")
        assert sites(coded_weights(graph)) == ["y.then_branch/w", "y.else_branch/w", "local::f/w"]
        assert_expands_to(graph, text, feeds=X | {"c": np.array(True)})

    def test_none_in_models_that_nobody_coded(self, corpus_model: Any) -> None:
        assert sites(coded_weights(load(corpus_model))) == []

    @pytest.mark.parametrize(
        "nodes",
        [
            "v = Add(w, w) y = MatMul(x, v)",
            "q = Cast <to = 2> (w) v = Cast <to = 1> (q) y = MatMul(x, v)",
            "v = Gather(w, i) y = MatMul(x, v)",
            "q = Cast <to = 2> (x) v = Cast <to = 1> (q) y = MatMul(x, v)",
            "v = DequantizeLinear(u, s) y = MatMul(x, v)",
        ],
    )
    def test_other_computations_from_constants_are_none(self, nodes: str) -> None:
        graph = graph_of(
            f"""g (float[2, 2] x) => (float[2, n] y)
            <float[2, 3] w = {W}, int64[2] i = {{0, 1}}, uint8[2, 3] u = {W}, float s = {{2}}> {{ {nodes} }}"""
        )
        assert coded_weights(graph) == []

    def test_integers_of_a_picture_are_none(self) -> None:
        graph = graph_of(
            "g (float[2, 2] x) => (uint8[2] y) <uint8[3] u = {1, 2, 3}, int64[2] i = {0, 1}> { y = Gather(u, i) }"
        )
        assert coded_weights(graph) == []

    def test_a_function_attribute_in_the_way(self) -> None:
        graph = graph_of(
            f"""g (float[2, 2] x) => (float[2, 3] y) {{ y = local.f <to = 1> (x) }}
            <domain: "local", opset_import: ["": 17]> f <to> (p) => (r) {{
                u = Constant <value = uint8[2, 3] {W}> () w = Cast <to: int = @to> (u) r = MatMul(p, w)
            }}"""
        )
        assert coded_weights(graph) == []


class TestExpanding:
    """What reads a coded weight may itself look like a decoder."""

    @pytest.mark.parametrize(
        "nodes",
        [
            "y = MatMul(x, w)",
            "v = Reshape(w, s) y = MatMul(x, v)",
            "v = Reshape(w, s) h = MatMul(x, v) i = MatMul(x, w) y = Add(h, i)",
            "v = Slice(w, zero, one, one) y = MatMul(x, v)",
            "v = Mul(w, scale) y = MatMul(x, v)",
            "v = Mul(w, scale) h = MatMul(x, v) i = MatMul(x, w) y = Add(h, i)",
            "v = Add(w, w2) y = MatMul(x, v)",
            "v = Add(w, w2) h = MatMul(x, v) i = MatMul(x, w) y = Add(h, i)",
            "v = Gather(w, zero) y = MatMul(x, w)",
            "y = Identity(w)",
            "y = Reshape(w, s)",
        ],
    )
    def test_readers_of_all_kinds(self, nodes: str) -> None:
        text = f"""g (float[2, 2] x) => (float[n, m] y)
            <float[2, 3] w = {W}, float[2, 3] w2 = {W}, int64[2] s = {{2, 3}}, int64[1] zero = {{0}}, int64[1] one = {{1}},
             float[3] scale = {{2, 3, 4}}> {{ {nodes} }}"""
        graph = encode(graph_of(text), "w", "w2")
        found = coded_weights(graph)
        assert {site.removesuffix("2") for site in sites(found)} <= {"w", "v"}
        original = to_model(graph_of(text))
        expected = run(session(original), X)
        assert same_bits(run(session(to_model(graph)), X), expected)
        expand_coded(graph)
        expanded = to_model(graph)
        onnx.checker.check_model(expanded, full_check=True)
        assert coded_weights(graph) == []
        assert same_bits(run(session(expanded), X), expected)
        assert "uint8" not in {constant.dtype.name for constant in graph.constants}

    @pytest.mark.parametrize(
        "nodes",
        [
            "y = MatMul(x, w)",
            "v = Reshape(w, s) y = MatMul(x, v)",
            "v = Reshape(w, s) h = MatMul(x, v) i = MatMul(x, w) y = Add(h, i)",
            "v = Slice(w, zero, one, one) y = MatMul(x, v)",
            "v = Add(w, w2) y = MatMul(x, v)",
        ],
    )
    def test_what_moves_a_weight_is_no_part_of_it(self, nodes: str) -> None:
        text = f"""g (float[2, 2] x) => (float[n, m] y)
            <float[2, 3] w = {W}, float[2, 3] w2 = {W}, int64[2] s = {{2, 3}}, int64[1] zero = {{0}}, int64[1] one = {{1}}> {{ {nodes} }}"""
        graph = encode(graph_of(text), "w", "w2")
        assert set(sites(coded_weights(graph))) == ({"w", "w2"})
        assert_expands_to(graph, text)

    def test_weights_that_share_a_codebook(self) -> None:
        text = f"""g (float[2, 2] x) => (float[2, 3] y) <float[2, 3] w = {W}, float[2, 3] w2 = {W}> {{
            h = MatMul(x, w) i = MatMul(x, w2) y = Add(h, i) }}"""
        graph = encode(graph_of(text), "w", "w2")
        gathers = [node for node in graph.nodes if node.op == "Gather"]
        gathers[1].inputs[0] = gathers[0].inputs[0]
        assert sites(coded_weights(graph)) == ["w2", "w"]
        expand_coded(graph)
        assert {constant.name for constant in graph.constants} >= {"w", "w2"}
        assert same_bits(run(session(to_model(graph)), X), run(session(to_model(graph_of(text))), X))
