"""Huffman coded models: the outputs of the model with plain codes, bit for bit, the same optimized graph, and fewer bytes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, parser

import onnxshrink
from onnxshrink.contract import Context, Report, Rule
from onnxshrink.graph.coded import coded_weights, expand_coded
from onnxshrink.graph.edit import sort_nodes
from onnxshrink.graph.exporter import to_model
from onnxshrink.graph.files import load
from onnxshrink.graph.ir import Graph
from onnxshrink.graph.weights import weights
from onnxshrink.numerics import huffman_plan
from onnxshrink.passes.huffman import Huffman
from onnxshrink.passes.share_weights import ShareWeights
from onnxshrink.testing import check_pass
from onnxshrink.testing_models import awkward_models
from tests import oracle
from tests.corpus import ABSENT, model_names, model_path, sample

Array = np.ndarray[Any, np.dtype[Any]]


def normal(*shape: int, seed: int = 0, dtype: Any = np.float32) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def sparse(*shape: int, seed: int = 0) -> Array:
    return np.where(np.random.default_rng([seed, 1]).random(shape) < 0.85, 0, normal(*shape, seed=seed)).astype(np.float32)


def chain(*layers: Array, opset: int = 17) -> onnx.ModelProto:
    """Returns y = x · w0 · w1 · ..."""
    nodes = [helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"x{i + 1}"]) for i in range(len(layers))]
    return oracle.make_model(
        nodes,
        [oracle.tensor("x0", [3, len(layers[0])])],
        [oracle.tensor(f"x{len(layers)}", [3, layers[-1].shape[1]])],
        [oracle.value(f"w{i}", layer) for i, layer in enumerate(layers)],
        opset=opset,
    )


def tables(*tables: Array, opset: int = 17) -> onnx.ModelProto:
    """Returns y0 = w0[ids], y1 = w1[ids], ..."""
    return oracle.make_model(
        [helper.make_node("Gather", [f"w{i}", "ids"], [f"y{i}"]) for i in range(len(tables))],
        [oracle.tensor("ids", ["n"], TensorProto.INT64)],
        [oracle.tensor(f"y{i}", ["n", *table.shape[1:]]) for i, table in enumerate(tables)],
        [oracle.value(f"w{i}", table) for i, table in enumerate(tables)],
        opset=opset,
    )


def shared(model: onnx.ModelProto, **options: Any) -> Graph:
    """Returns the graph of a model with its weights as codes."""
    graph = load(model)
    ShareWeights(**options).apply(graph, Context())
    sort_nodes(graph)
    return graph


def apply(graph: Graph, *rules: Rule) -> tuple[Graph, Report]:
    result = graph.copy()
    report = Huffman().apply(result, Context(rules=rules))
    sort_nodes(result)
    return result, report


def assert_same(codes: Graph, coded: Graph, tmp_path: Path, feeds: Any = None, fewer: str = "") -> None:
    """Whether both give the same outputs bit for bit, run the same optimized nodes, and the file is valid and smaller.

    Nodes of the op ``fewer`` may be missing afterwards.
    """
    before, after = to_model(codes), to_model(coded)
    onnx.checker.check_model(after, full_check=True)
    assert after.ByteSize() < before.ByteSize()
    found, ops = [], []
    for name, model in (("before", before), ("after", after)):
        path = tmp_path / f"{name}.onnx"
        running = oracle.session(model, optimised_to=path)
        found.append(oracle.run(running, feeds if feeds is not None else oracle.random_feeds(running)))
        ops.append(Counter(op for op in op_types(onnx.load(path).graph)))
    assert oracle.same_bits(*found)
    assert set(ops[0] - ops[1]) <= {fewer}
    assert not ops[1] - ops[0]


def op_types(graph: onnx.GraphProto) -> list[str]:
    """Returns the ops of a graph and of all its bodies."""
    inner = [op for node in graph.node for attribute in node.attribute for op in op_types(attribute.g)]
    return [*(node.op_type for node in graph.node), *inner]


def reasons(report: Report) -> dict[str, str]:
    return {skip.site: skip.reason for skip in report.skips}


def coded_awkward_models() -> Any:
    for name, model in awkward_models():
        if name.startswith("opset") and name not in ("opset 7", "opset 11", "opset 26"):
            continue  # they differ in nothing but that
        graph = shared(model, bits=3)
        yield name, to_model(graph)


def test_contract() -> None:
    check_pass(Huffman(), coded_awkward_models())


def test_contract_where_it_changes_something() -> None:
    chains = {f"opset {opset}": chain(sparse(160, 160), normal(160, 90), opset=opset) for opset in (11, 17)}
    chains["tables"] = tables(normal(4096, 64), normal(4096, 64, seed=1))
    models = [(name, to_model(shared(model, bits=5))) for name, model in chains.items()]
    check_pass(Huffman(), models, sites=lambda graph: [coded.site for coded in coded_weights(graph)])


class TestOutputs:
    @pytest.mark.parametrize("opset", [11, 17])
    @pytest.mark.parametrize(
        "options",
        [
            {"bits": 5, "method": "uniform", "per": "tensor"},
            {"bits": 5, "method": "uniform", "per": "channel"},
            {"bits": 8, "method": "uniform"},
            {"bits": 4, "method": "kmeans", "per": "tensor"},
            {"bits": 6, "method": "kmeans", "per": "scale"},
            {"bits": 3, "method": "kmeans", "per": "channel"},
        ],
        ids=lambda options: "-".join(map(str, options.values())),
    )
    def test_same_as_with_plain_codes(self, tmp_path: Path, opset: int, options: dict[str, Any]) -> None:
        codes = shared(chain(normal(150, 200), sparse(200, 180), normal(180, 90, seed=2), opset=opset), **options)
        coded, report = apply(codes)
        assert report.changes
        assert_same(codes, coded, tmp_path)

    @pytest.mark.parametrize("dtype", [np.float16, np.float64])
    def test_of_other_types(self, tmp_path: Path, dtype: Any) -> None:
        model = chain(normal(300, 300).astype(dtype))
        for info in (model.graph.input[0], model.graph.output[0]):
            info.type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        codes = shared(model, bits=5, method="uniform")
        coded, report = apply(codes)
        assert len(report.changes) == 1
        assert_same(codes, coded, tmp_path, {"x0": normal(3, 300).astype(dtype)})

    def test_in_several_batches(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(huffman_plan, "_CODES_PER_BATCH", 20_000)
        monkeypatch.setattr(huffman_plan, "_LEAST_PART", 1000)
        codes = shared(chain(normal(300, 300), normal(300, 200)), bits=5, method="uniform", per="tensor")
        coded, _ = apply(codes)
        assert sum(node.op == "Huffman" for node in coded.nodes) == 7
        assert any(node.op == "Concat" for node in coded.nodes), "a weight goes on in the next batch"
        assert_same(codes, coded, tmp_path)
        values = {found.site: found.values() for found in coded_weights(codes)}
        assert all(np.array_equal(found.values(), values[found.site]) for found in coded_weights(load(to_model(coded))))
        expand_coded(coded)
        assert not coded.local_functions

    def test_weights_in_bodies_are_lifted(self, tmp_path: Path) -> None:
        codes = shared(in_bodies(), bits=4, method="uniform", per="tensor")
        coded, report = apply(codes)
        assert [change.site for change in report.changes] == ["y.then_branch/w", "y.else_branch/w"]
        for condition in (True, False):
            assert_same(codes, coded, tmp_path, {"x": normal(2, 256), "c": np.array(condition)})

    def test_weights_in_loops_are_lifted_from_several_batches(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(huffman_plan, "_CODES_PER_BATCH", 40_000)
        monkeypatch.setattr(huffman_plan, "_LEAST_PART", 1000)
        model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
            g (float[2, 400] x) => (float[2, 400] y) <int64 n = {3}> {
                y = Loop(n, , x) <body = b (int64 i, bool c, float[2, 400] a) => (bool d, float[2, 400] e) {
                    d = Identity(c) f = MatMul(a, w) e = Tanh(f) }>
            }""")
        model.graph.node[0].attribute[0].g.initializer.append(oracle.value("w", normal(400, 400)))
        codes = shared(model, bits=5, method="uniform", per="tensor")
        coded, report = apply(codes)
        assert [change.site for change in report.changes] == ["y.body/w"]
        assert sum(node.op == "Huffman" for node in coded.nodes) > 1
        assert_same(codes, coded, tmp_path)

    @pytest.mark.parametrize("opset", [11, 17, 21])
    @pytest.mark.parametrize(
        "options", [{"bits": 8, "method": "uniform"}, {"bits": 4, "per": "tensor"}, {"step": 0.5}], ids=str
    )
    def test_of_tables_that_stay_coded_at_run_time(self, tmp_path: Path, opset: int, options: dict[str, Any]) -> None:
        model = tables(normal(4096, 64), normal(4096, 64, seed=1), opset=opset)
        codes = shared(model, **options)
        coded, report = apply(codes)
        assert [change.site for change in report.changes] == ["w0", "w1"]
        feeds = {"ids": np.random.default_rng(0).integers(-4096, 4096, 70)}
        assert_same(codes, coded, tmp_path, feeds, fewer="Sub")  # a zero point that is 0 now; ONNX Runtime drops it
        found = {item.site: item for item in coded_weights(load(to_model(coded)))}
        assert all(item.table is not None and item.pieces for item in found.values())
        values = {item.site: item.values() for item in coded_weights(codes)}
        assert all(np.array_equal(item.values(), values[site]) for site, item in found.items())
        assert set(found) == {"w0", "w1"}

    @pytest.mark.skipif(not model_names(), reason=ABSENT)
    @pytest.mark.parametrize("name", ["cifar_resnet20", "silero_vad"])
    def test_of_real_models(self, tmp_path: Path, name: str) -> None:
        codes = shared(onnx.load(model_path(name)), bits=5, method="uniform")
        coded, _ = apply(codes)
        inputs = [tensor.name for tensor in codes.inputs]
        assert_same(codes, coded, tmp_path, sample(name, inputs))


def in_bodies() -> onnx.ModelProto:
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
        g (float[2, 256] x, bool c) => (float[2, 256] y) {
            y = If(c) <then_branch = t () => (float[2, 256] a) { a = MatMul(x, w) },
                       else_branch = e () => (float[2, 256] a) { b = MatMul(x, w) a = Exp(b) }>
        }""")
    for index, attribute in enumerate(model.graph.node[0].attribute):
        attribute.g.initializer.append(oracle.value("w", normal(256, 256, seed=index)))
    return model


class TestAnswers:
    def test_detail_names_the_form_and_the_one_rejected(self) -> None:
        _, report = apply(shared(chain(sparse(300, 300), normal(300, 300)), bits=5, method="uniform", per="tensor"))
        details = {change.site: change.detail for change in report.changes}
        assert details["w0"].startswith("Huffman coded, runs: ")
        assert "(not single " in details["w0"]
        assert details["w1"].startswith("Huffman coded, single: ")
        assert "(not runs " in details["w1"]

    def test_nothing_changes_where_the_decoder_does_not_pay(self) -> None:
        codes = shared(chain(normal(90, 90)), bits=5, method="uniform", per="tensor")
        coded, report = apply(codes)
        assert "and 5" in reasons(report)["w0"] or "for the decoder" in reasons(report)["w0"]
        assert to_model(coded).SerializeToString() == to_model(codes).SerializeToString()

    def test_a_weight_that_does_not_get_smaller_stays(self) -> None:
        even = np.random.default_rng(0).permutation(np.arange(200 * 300) % 256).reshape(200, 300).astype(np.float32)
        uneven = [np.rint(4 * normal(300, 300, seed=seed)) for seed in (0, 1)]
        codes = shared(chain(even, *uneven), bits=8, method="exact")
        coded, report = apply(codes)
        assert sorted(change.site for change in report.changes) == ["w1", "w2"]
        assert reasons(report)["w0"].startswith("too small to gain: 6")
        assert [constant.name for constant in coded.constants if constant.name in ("w0.codes", "w1.codes")] == ["w0.codes"]

    def test_old_opsets_are_left(self) -> None:
        _, report = apply(shared(chain(normal(300, 300), opset=10), bits=5))
        assert reasons(report) == {"w0": "opset 10 is below 11, the first that can decode it; raise-opset=true raises it"}

    @pytest.mark.parametrize("opset", [7, 10])
    def test_old_opsets_are_raised_where_that_is_allowed(self, tmp_path: Path, opset: int) -> None:
        model = chain(normal(300, 300), normal(300, 300), opset=opset)
        model.graph.node[0].output[0] = "h"
        model.graph.node.append(helper.make_node("Clip", ["h"], ["x1"], min=-1.0, max=1.0))
        model.graph.value_info.append(oracle.tensor("h", [3, 300]))
        codes = shared(model, bits=5, method="uniform")
        coded = codes.copy()
        report = Huffman(raise_opset=True).apply(coded, Context())
        sort_nodes(coded)
        assert coded.opset == 11
        assert report.notes == [f"the opset was raised from {opset} to 11"]
        assert_same(codes, coded, tmp_path)
        check_pass(Huffman(raise_opset=True), [("an old opset", to_model(codes))])

    def test_the_opset_stays_where_nothing_else_changes(self) -> None:
        codes = shared(chain(normal(30, 30), opset=9), bits=5)
        before = to_model(codes).SerializeToString()
        report = Huffman(raise_opset=True).apply(codes, Context())
        assert not report.changes
        assert to_model(codes).SerializeToString() == before

    def test_what_stands_in_the_way_of_a_higher_opset_is_said(self) -> None:
        model = chain(normal(300, 300), opset=9)
        model.graph.node.append(helper.make_node("Affine", ["x1"], ["retired"]))
        model.graph.output.append(oracle.tensor("retired", [3, 300]))
        report = Huffman(raise_opset=True).apply(graph := shared(model, bits=5), Context())
        assert "first that can decode it; Affine 'retired': " in reasons(report)["w0"]
        assert graph.opset == 9

    def test_rules_leave_weights_alone(self) -> None:
        codes = shared(chain(normal(300, 300), normal(300, 300)), bits=5, method="uniform")
        _, report = apply(codes, Rule("w1", skip=True))
        assert reasons(report) == {"w1": "left alone by a rule"}
        assert [change.site for change in report.changes] == ["w0"]

    def test_weights_in_functions_are_left(self) -> None:
        model = chain(normal(300, 300), normal(300, 300))
        body = [
            helper.make_node("Constant", [], ["w"], value=oracle.value("", normal(300, 300))),
            helper.make_node("MatMul", ["p", "w"], ["r"]),
        ]
        model.functions.append(helper.make_function("local", "f", ["p"], ["r"], body, [helper.make_opsetid("", 17)]))
        model.opset_import.append(helper.make_opsetid("local", 1))
        model.graph.node.append(helper.make_node("f", ["x0"], ["z"], domain="local"))
        model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [3, 300]))
        _, report = apply(shared(model, bits=5, method="uniform"))
        assert len(report.changes) == 2
        assert reasons(report) == {"local::f/w": "is in a model-local function, which cannot read what is decoded outside"}

    def test_where_nothing_is_coded_it_says_what_to_do(self) -> None:
        _, report = apply(load(chain(normal(30, 30))))
        assert (list(report.changes), list(report.skips)) == ([], [])
        assert list(report.notes) == ["no weight is stored as codes: run share-weights before"]

    def test_a_second_time_says_why_not(self) -> None:
        coded, _ = apply(shared(chain(normal(300, 300), normal(300, 300)), bits=5, method="uniform"))
        again, report = apply(coded)
        assert set(reasons(report).values()) == {"is Huffman coded already"}
        assert to_model(again).SerializeToString() == to_model(coded).SerializeToString()


class TestOtherRooms:
    def test_expanding_gives_the_dense_model_back(self) -> None:
        codes = shared(chain(normal(300, 300), sparse(300, 300)), bits=5, method="uniform")
        coded, _ = apply(codes)
        coded = load(to_model(coded))
        assert sorted(found.site for found in expand_coded(coded)) == ["w0", "w1"]
        expand_coded(codes)
        ours, theirs = to_model(coded), to_model(codes)
        assert {item.name: item.raw_data for item in ours.graph.initializer} == {
            item.name: item.raw_data for item in theirs.graph.initializer
        }
        assert [node.op_type for node in ours.graph.node] == ["MatMul", "MatMul"]
        assert not ours.functions
        assert [entry.domain for entry in ours.opset_import] == [""]

    def test_decoder_and_data_are_no_weights(self) -> None:
        coded, _ = apply(shared(chain(normal(300, 300), normal(300, 300)), bits=5, method="uniform"))
        assert weights(load(to_model(coded))) == []

    def test_inspect_knows_the_bits(self, tmp_path: Path) -> None:
        coded, report = apply(shared(chain(normal(300, 300), normal(300, 300)), bits=5, method="uniform"))
        path = tmp_path / "m.onnx"
        onnx.save(to_model(coded), path)
        found = {info.site: info for info in onnxshrink.inspect(path).weights}
        assert set(found) == {"w0", "w1"}
        assert all(info.coded and 3 < info.bits < 5.5 for info in found.values())
        assert len(report.changes) == 2


def test_what_a_model_multiplies_a_decoded_weight_by_is_no_scale(tmp_path: Path) -> None:
    """The weight ends before: as a product with what is known only at run time, it would not be folded."""
    codes = np.random.default_rng(0).binomial(15, 0.05, (200, 300)).astype(np.uint8)
    nodes = [
        helper.make_node("Cast", ["codes"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["wide", "zero"], ["w"]),
        helper.make_node("Mul", ["w", "x"], ["y"]),
    ]
    values = [oracle.value("codes", codes), oracle.value("zero", np.float32(1))]
    model = oracle.make_model(nodes, [oracle.tensor("x", [300])], [oracle.tensor("y", [200, 300])], values, opset=17)
    graph = load(model)
    assert [found.site for found in coded_weights(graph)] == ["w"]
    coded, report = apply(graph)
    assert [change.site for change in report.changes] == ["w"]
    assert_same(graph, coded, tmp_path)
