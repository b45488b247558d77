"""A table that stays coded at run time: the rows of the dense table bit for bit, bytes in memory, found and expanded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, parser

from onnxshrink.contract import Context
from onnxshrink.graph import coded_table as subject
from onnxshrink.graph.codebook import Codebook, UniformGrid
from onnxshrink.graph.coded import coded_weights, expand_coded
from onnxshrink.graph.coded_table import coded_table, lookups
from onnxshrink.graph.edit import NameSource, constant_bytes, sort_nodes
from onnxshrink.graph.exporter import to_model
from onnxshrink.graph.files import load, model_bytes
from onnxshrink.graph.ir import Graph, Node, Variable
from onnxshrink.graph.weights import weights
from onnxshrink.passes.huffman import Huffman
from tests import oracle
from tests.graph.test_codebook import DTYPES, WORDS, Coding, coding

Array = np.ndarray[Any, Any]
IDS = {"i": np.array([[3, 0, 6], [6, 6, 1]], np.int64), "j": np.array(-2, np.int32)}
OPSETS = (*range(7, 22), 25, 26)


@pytest.fixture(autouse=True)
def small_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "LEAST_BYTES", 1)


def dense_model(table: Array, opset: int = 17) -> onnx.ModelProto:
    """Returns y = w[i], z = w[j]."""
    kind = helper.np_dtype_to_tensor_dtype(table.dtype)
    nodes = [
        helper.make_node("Gather", ["w", "i"], ["y"], name="first"),
        helper.make_node("Gather", ["w", "j"], ["z"], axis=0),
    ]
    rest = table.shape[1:]
    outputs = [oracle.tensor("y", ["a", "b", *rest], kind), oracle.tensor("z", rest, kind)]
    inputs = [oracle.tensor("i", ["a", "b"], TensorProto.INT64), oracle.tensor("j", [], TensorProto.INT32)]
    kind = {"opset": opset, "ir_version": 10 if opset > 20 else 8}
    return oracle.make_model(nodes, inputs, outputs, [oracle.value("w", table)], **kind)


def encode(graph: Graph, made: Coding, bits: int) -> int:
    """Stores the table w as codes; returns the bytes that that takes."""
    scope, constant = next((s.graph, c) for s in graph.scopes() for c in s.graph.constants if c.name == "w")
    fragment = coded_table(
        constant, lookups(constant, scope), made.codes, bits, made.values, scope, NameSource(graph)
    )
    nbytes = fragment.nbytes(scope)
    fragment.insert(scope, constant)
    return nbytes


def rows(model: onnx.ModelProto, folder: Path) -> tuple[list[Array], onnx.GraphProto]:
    """Returns the outputs and the graph that ONNX Runtime runs."""
    running = oracle.session(model, optimised_to=folder / "optimised.onnx")
    return oracle.run(running, IDS), onnx.load(folder / "optimised.onnx").graph


def assert_stays_coded(made: Coding, bits: int, opset: int, folder: Path) -> None:
    """Encodes, checks, runs, looks at what ONNX Runtime keeps in memory, finds, and expands."""
    original = dense_model(made.dense, opset)
    graph = load(original)
    before = model_bytes(graph)
    weight_bytes = constant_bytes(graph.constants[0], graph)
    counted = encode(graph, made, bits)
    assert model_bytes(graph) - before == pytest.approx(counted - weight_bytes, abs=24)
    model = to_model(graph)
    onnx.checker.check_model(model, full_check=True)
    found, optimised = rows(model, folder)
    for name, got in zip(IDS, found, strict=True):
        assert got.tobytes() == made.dense[IDS[name]].tobytes()
    kept = {item.data_type for item in optimised.initializer if list(item.dims) == list(made.dense.shape)}
    assert kept == {TensorProto.UINT8}
    assert not {node.op_type for node in optimised.node} - {"Add", "Cast", "Gather", "Mul", "Sub"}

    (coded,) = coded_weights(load(model))
    assert coded.site == "w"
    assert coded.table is not None
    assert len(coded.table.lookups) == 2
    assert coded.values().tobytes() == made.dense.tobytes()
    assert weights(load(model)) == []
    assert_expands(graph, original)


def assert_expands(graph: Graph, original: onnx.ModelProto) -> None:
    assert [item.site for item in expand_coded(graph)] == ["w"]
    assert coded_weights(graph) == []
    sort_nodes(graph)
    assert oracle.differences(to_model(graph), to_model(load(original))) == []


@pytest.mark.parametrize("opset", OPSETS)
def test_every_opset(opset: int, tmp_path: Path) -> None:
    for index, word in enumerate(WORDS):
        for bits in (3 + index, 8):
            assert_stays_coded(coding(word, bits, (7, 5)), bits, opset, tmp_path)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("word", WORDS)
def test_every_width_of_codes(word: str, bits: int, tmp_path: Path) -> None:
    for shape in [(7, 150), (7, 3, 5)]:
        assert_stays_coded(coding(word, bits, shape), bits, 17, tmp_path)
    if word in ("codebook", "grid"):
        assert_stays_coded(coding(word, bits, (7,)), bits, 17, tmp_path)
    else:
        assert_stays_coded(coding(word, bits, (7, 3, 5), axis=1), bits, 17, tmp_path)
        assert_stays_coded(coding(word, bits, (7, 3, 5), axis=2), bits, 17, tmp_path)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_every_float_type(dtype: np.dtype[Any], tmp_path: Path) -> None:
    for word in WORDS:
        for opset in (7, 13, 21):
            if dtype.name != "bfloat16" or opset >= 13:  # before it the standard has no op for bfloat16
                for bits in (5, 8):
                    assert_stays_coded(coding(word, bits, (7, 150), dtype), bits, opset, tmp_path)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_ids(data: st.DataObject) -> None:
    word, bits = data.draw(st.sampled_from(WORDS)), data.draw(st.integers(1, 8))
    made = coding(word, bits, (data.draw(st.integers(1, 40)), data.draw(st.integers(1, 9))))
    ids = data.draw(st.lists(st.integers(-len(made.dense), len(made.dense) - 1), max_size=9))
    graph = load(dense_model(made.dense))
    encode(graph, made, bits)
    feeds = {"i": np.array(ids, np.int64).reshape(1, -1), "j": np.array(-1, np.int32)}
    (first, second) = oracle.run(oracle.session(to_model(graph)), feeds)
    assert oracle.same_bits([first, second], [made.dense[feeds["i"]], made.dense[-1]])


W = "{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13}"


def graph_of(nodes: str, tables: str = "") -> Graph:
    return load(
        parser.parse_model(f"""<ir_version: 8, opset_import: ["": 17]>
        g (int64[n] i, int64[m] j, bool c) => (float[p, q] y)
        <float[7, 2] w = {W}, float[2] two = {{2, 3}}, float[1, 2] four = {{2, 3}}, int64[2] k = {{1, 2}}, int64[1] one = {{1}}, float[7, 1] s = {{1, 2, 3, 4, 5, 6, 7}}, int64[2] t = {{7, 2}} {tables}> {{ {nodes} }}""")
    )


COUNT = np.arange(14, dtype=np.uint8).reshape(7, 2)
BOOK = Coding(COUNT, Codebook(np.arange(14, dtype=np.float32)), COUNT.astype(np.float32))
GRID = Coding(COUNT, UniformGrid(np.ones(7, np.float32), np.zeros(7, np.float32), (1, *COUNT.shape[1:])), COUNT.astype(np.float32))


class TestWhichTables:
    @pytest.mark.parametrize(
        "nodes",
        [
            "y = Gather <axis = 1> (w, i)",
            "y = Gather(w, k)",
            "h = Identity(w) y = Gather(h, i)",
            "h = Gather(w, i) a = MatMul(h, two) y = Add(w, a)",
            "a = Gather(w, i) y = Identity(w)",
            "y = GatherND(w, i)",
            "y = If(c) <then_branch = t () => (float[p, q] a) { a = Gather(w, i) }, else_branch = e () => (float[p, q] b) { b = Gather(w, j) }>",
        ],
    )
    def test_others_are_left(self, nodes: str) -> None:
        graph = graph_of(nodes)
        assert lookups(next(item for item in graph.constants if item.name == "w"), graph) == []

    def test_outputs_and_small_ones_are_left(self, monkeypatch: pytest.MonkeyPatch) -> None:
        graph = graph_of("y = Gather(w, i)")
        constant = next(item for item in graph.constants if item.name == "w")
        assert [node.site for node in lookups(constant, graph)] == ["y"]
        graph.outputs.append(constant)
        assert lookups(constant, graph) == []
        graph.outputs.pop()
        monkeypatch.setattr(subject, "LEAST_BYTES", constant.nbytes + 1)
        assert lookups(constant, graph) == []

    def test_in_bodies_and_functions(self, tmp_path: Path) -> None:
        model = parser.parse_model(f"""<ir_version: 8, opset_import: ["": 17, "local": 1]>
            g (int64[n] i, bool c) => (float[n, 2] y, float[n, 2] z) {{
                y = If(c) <then_branch = t () => (float[n, 2] a) <float[7, 2] w = {W}> {{ a = Gather(w, i) }},
                           else_branch = e () => (float[n, 2] a) <float[7, 2] v = {W}> {{ b = Gather(v, i) a = Exp(b) }}>
                z = local.f(i)
            }}
            <domain: "local", opset_import: ["": 17]> f (p) => (r) {{ u = Constant <value = float[7, 2] {W}> () r = Gather(u, p) }}""")
        graph = load(model)
        names = NameSource(graph)
        for scope in graph.scopes():
            for constant in list(scope.graph.constants):
                found = lookups(constant, scope.graph)
                coded_table(constant, found, COUNT, 4, GRID.values, scope.graph, names).insert(scope.graph, constant)
        assert [item.site for item in coded_weights(graph)] == ["y.then_branch/w", "y.else_branch/v", "local::f/u"]
        coded = to_model(graph)
        onnx.checker.check_model(coded, full_check=True)
        expand_coded(graph)
        for condition in (True, False):
            feeds = {"i": np.array([1, 6]), "c": np.array(condition)}
            expected = oracle.run(oracle.session(model), feeds)
            assert oracle.same_bits(oracle.run(oracle.session(coded), feeds), expected)
            assert oracle.same_bits(oracle.run(oracle.session(to_model(graph)), feeds), expected)


class TestReaders:
    """What reads the rows may itself look like a step of decoding."""

    @pytest.mark.parametrize("made", [BOOK, GRID], ids=["codebook", "grid"])
    @pytest.mark.parametrize(
        "nodes",
        [
            "y = Gather(w, i)",
            "h = Gather(w, i) y = Mul(h, two)",
            "h = Gather(w, i) y = Mul(h, four)",
            "h = Gather(w, i) y = Sub(h, two)",
            "h = Gather(w, i) r = Gather(s, i) y = Mul(h, r)",
            "h = Gather(w, i) r = Gather(s, j) y = Mul(h, r)",
            "h = Gather(w, i) d = Cast <to = 11> (h) y = Cast <to = 1> (d)",
            "a = Gather(w, i) b = Gather(w, j) d = Mul(a, two) y = Add(b, d)",
            "a = Gather(w, i) b = Gather(w, j) d = Mul(a, two) e = Mul(b, two) y = Add(e, d)",
            "a = Gather(w, i) b = Gather(w, i) y = Mul(a, b)",
            "a = Gather(w, i) y = Mul(a, a)",
            "a = Gather(w, i) d = Cast <to = 7> (a) e = ReduceMin <keepdims = 0> (d) f = Gather(w, e) y = Add(a, f)",
            "h = Gather(w, i) y = If(c) <then_branch = t () => (float[p, q] a) { a = Mul(h, two) }, else_branch = e () => (float[p, q] b) { b = Identity(h) }>",
        ],
    )
    def test_of_all_kinds(self, nodes: str, made: Coding) -> None:
        feeds = {"i": np.array([1, 5]), "j": np.array([0, 6]), "c": np.array(True)}
        original = to_model(graph_of(nodes))
        expected = oracle.run(oracle.session(original), feeds)
        graph = load(original)
        encode(graph, made, 4)
        assert [item.site for item in coded_weights(graph)] == ["w"]
        assert oracle.same_bits(oracle.run(oracle.session(to_model(graph)), feeds), expected)
        expand_coded(graph)
        expanded = to_model(graph)
        onnx.checker.check_model(expanded, full_check=True)
        assert coded_weights(graph) == []
        assert "uint8" not in {constant.dtype.name for constant in graph.constants}
        assert oracle.same_bits(oracle.run(oracle.session(expanded), feeds), expected)

    @pytest.mark.parametrize(
        "nodes",
        [
            "h = Gather(u, i) a = Cast <to = 1> (h) y = Mul(a, four)",
            "h = Gather(u, i) a = Cast <to = 1> (h) y = Sub(a, two)",
            "h = Gather(u, i) a = Cast <to = 1> (h) y = Add(a, two)",
            "h = Gather(u, i) a = Cast <to = 1> (h) r = Gather(s, j) y = Mul(a, r)",
            "h = Gather(u, i) a = Cast <to = 1> (h) b = Mul(a, two) d = Shape(u) e = Cast <to = 1> (d) y = Add(b, e)",
            "h = Gather(u, i) a = Cast <to = 1> (h) b = Mul(a, two) g = Gather(u, j) y = Cast <to = 1> (g)",
        ],
    )
    def test_other_bytes_are_no_tables(self, nodes: str) -> None:
        assert coded_weights(graph_of(nodes, f", uint8[7, 2] u = {W}")) == []

    def test_names_do_not_matter_but_for_the_site(self) -> None:
        graph = graph_of("y = Gather(w, i)")
        encode(graph, GRID, 4)
        model = to_model(graph)
        names = {name for node in model.graph.node for name in [*node.input, *node.output]} - {"i", "y"}
        renamed = {name: f"t{index}" for index, name in enumerate(sorted(names))}
        for node in model.graph.node:
            for spelled in (node.input, node.output):
                spelled[:] = [renamed.get(name, name) for name in spelled]
        for item in model.graph.initializer:
            item.name = renamed.get(item.name, item.name)
        graph = load(model)
        assert [item.site for item in coded_weights(graph)] == [renamed["w"]]
        expand_coded(graph)
        assert [node.op for node in graph.nodes] == ["Gather"]


class TestHuffman:
    @pytest.mark.parametrize("bits", [4, 5, 8])
    @pytest.mark.parametrize("word", WORDS)
    def test_coded_tables_decode_to_bytes(self, word: str, bits: int, tmp_path: Path) -> None:
        made = skewed(word, bits)
        original = dense_model(made.dense)
        graph = load(original)
        encode(graph, made, bits)
        before = model_bytes(graph)
        report = Huffman().apply(graph, Context())
        assert [change.site for change in report.changes] == ["w"]
        sort_nodes(graph)
        (change,) = report.changes
        assert model_bytes(graph) - before == pytest.approx(change.bytes_after - change.bytes_before, abs=16)
        model = to_model(graph)
        onnx.checker.check_model(model, full_check=True)
        found, optimised = rows(model, tmp_path)
        assert oracle.same_bits(found, [made.dense[ids] for ids in IDS.values()])
        assert not {node.op_type for node in optimised.node} - {"Add", "Cast", "Gather", "Mul", "Sub"}
        kept = {item.data_type for item in optimised.initializer if list(item.dims) == list(made.dense.shape)}
        assert kept == {TensorProto.INT8}
        graph = load(model)
        (coded,) = coded_weights(graph)
        assert (coded.site, len(coded.pieces)) == ("w", 1)
        assert coded.values().tobytes() == made.dense.tobytes()
        assert weights(graph) == []
        assert_expands(graph, original)

    @pytest.mark.parametrize("huffman", [False, True])
    def test_only_codes_are_expanded_on_request(self, huffman: bool, tmp_path: Path) -> None:
        made = skewed("grid per channel", 5)
        graph = load(dense_model(made.dense))
        encode(graph, made, 5)
        if huffman:
            Huffman().apply(graph, Context())
        assert [item.site for item in expand_coded(graph, tables=False)] == ["w"]
        assert not graph.local_functions
        (codes,) = [constant for constant in graph.constants if constant.name == "w"]
        assert (codes.dtype.itemsize, codes.shape) == (1, made.dense.shape)
        sort_nodes(graph)
        found, _ = rows(to_model(graph), tmp_path)
        assert oracle.same_bits(found, [made.dense[ids] for ids in IDS.values()])

    def test_a_zero_point_that_others_compute_with_stays(self) -> None:
        graph = load(dense_model((made := skewed("grid per channel", 8)).dense))
        encode(graph, made, 8)
        floats = next(node for node in graph.nodes if node.op == "Cast" and "zero_point" in node.inputs[0].name).outputs[0]
        graph.nodes.append(Node("Identity", [floats], [output := Variable("o", np.dtype(np.float32), (7, 1))]))
        graph.outputs.append(output)
        before = to_model(graph).SerializeToString()
        assert not Huffman().apply(graph, Context()).changes
        assert to_model(graph).SerializeToString() == before

    def test_tables_that_share_operands(self, tmp_path: Path) -> None:
        made = skewed("grid", 8)
        other = Coding(made.codes[::-1], made.values, made.dense[::-1])
        model = dense_model(made.dense)
        model.graph.node[1].input[0] = "w2"
        model.graph.initializer.append(oracle.value("w2", other.dense))
        graph = load(model)
        encode(graph, made, 8)
        constant = next(item for item in graph.constants if item.name == "w2")
        coded_table(
            constant, lookups(constant, graph), other.codes, 8, other.values, graph, NameSource(graph)
        ).insert(graph, constant)
        subtractions = [node for node in graph.nodes if node.op == "Sub"]
        subtractions[1].inputs[1] = subtractions[0].inputs[1]
        report = Huffman().apply(graph, Context())
        assert len(report.changes) == 2
        sort_nodes(graph)
        onnx.checker.check_model(to_model(graph), full_check=True)
        found, _ = rows(to_model(graph), tmp_path)
        assert oracle.same_bits(found, [made.dense[IDS["i"]], other.dense[IDS["j"]]])


def skewed(word: str, bits: int) -> Coding:
    """Returns a coding of a table whose codes are far from even, with the largest one among them."""
    made = coding(word, bits, (7, 4000))
    draws = np.random.default_rng(bits).binomial(2**bits - 1, 0.15, made.codes.shape).astype(np.uint8)
    draws[0, :2] = 0, 2**bits - 1
    if word.startswith("codebook per"):
        table = made.values.values
        return Coding(draws, made.values, table[np.arange(7)[:, None], draws])
    if isinstance(made.values, Codebook):
        dense = made.values.values[draws]
        if made.values.scale is not None:
            dense = dense * made.values.scale[:, None]
        return Coding(draws, made.values, dense)
    along = (-1, 1) if made.values.tile is not None else ()
    zero_point = made.values.zero_point.reshape(along)
    return Coding(draws, made.values, (draws.astype(np.float32) - zero_point) * made.values.scale.reshape(along))
