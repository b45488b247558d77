"""Packed sparse weights: the smallest form for each, the same bits, the same optimized graph, and without being asked after sparsify."""

from __future__ import annotations

import re
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

import onnxshrink
from onnxshrink.contract import Context, Pass, Report, Rule, Step
from onnxshrink.errors import RegistryError
from onnxshrink.graph.coded import coded_weights
from onnxshrink.graph.edit import constant_bytes, sort_nodes
from onnxshrink.graph.exporter import to_model
from onnxshrink.graph.files import load, save
from onnxshrink.graph.ir import Graph
from onnxshrink.graph.storage import is_float
from onnxshrink.graph.weights import weights
from onnxshrink.passes.huffman import Huffman
from onnxshrink.passes.pack_sparse import PackSparse
from onnxshrink.passes.share_weights import ShareWeights
from onnxshrink.passes.shorten_names import ShortenNames
from onnxshrink.passes.sparsify import Sparsify
from onnxshrink.recipe import finished, parse_pass
from onnxshrink.testing import check_pass
from onnxshrink.testing_models import awkward_models
from tests import oracle
from tests.corpus import ABSENT, model_names, model_path

Array = np.ndarray[Any, np.dtype[Any]]


def normal(*shape: int, seed: int = 0, zeros: float = 0.0) -> Array:
    rng = np.random.default_rng([seed, *shape])
    values = rng.standard_normal(shape).astype(np.float32)
    return np.where(rng.random(shape) < zeros, np.float32(0), values)


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


def packed(model: onnx.ModelProto, *rules: Rule) -> tuple[onnx.ModelProto, Report]:
    graph = load(model)
    report = PackSparse().apply(graph, Context(rules=rules))
    sort_nodes(graph)
    return to_model(graph), report


def outputs(model: onnx.ModelProto, path: Path | None = None) -> list[Any]:
    running = oracle.session(model, optimised_to=path)
    return oracle.run(running, oracle.random_feeds(running))


def reasons(report: Report) -> dict[str, str]:
    return {skip.site: skip.reason for skip in report.skips}


def with_zeros() -> Any:
    """Yields the awkward models with 9 of 10 weights zero, and many more of them."""
    for name, model in awkward_models():
        graph = load(model)
        for weight in weights(graph):
            if is_float(weight.constant.dtype):
                values = weight.constant.values.copy()
                values.reshape(-1)[np.arange(values.size) % 10 != 0] = 0
                weight.constant.values = values
        yield name, to_model(graph)


def candidates(graph: Graph) -> list[str]:
    found = [weight for weight in weights(graph) if is_float(weight.constant.dtype)]
    return [weight.site for weight in found if not weight.constant.values.all()]


def test_contract() -> None:
    check_pass(PackSparse(), sites=candidates)


def test_contract_where_it_changes_something() -> None:
    models = [*with_zeros(), *((f"chain {opset}", chain(normal(99, 80, zeros=0.6), normal(80, 70, zeros=0.9), opset=opset)) for opset in (9, 17))]
    assert sum(len(packed(model)[1].changes) for _, model in models) > 20
    check_pass(PackSparse(), models, sites=candidates)


class TestChoice:
    @settings(max_examples=25, deadline=None)
    @given(st.integers(7, 25), st.sampled_from([0.1, 0.5, 0.8, 0.95, 0.999]), st.sampled_from([(30, 40), (200, 90)]))
    def test_the_file_is_the_smallest_of_all(self, opset: int, zeros: float, shape: tuple[int, int]) -> None:
        model = chain(normal(*shape, zeros=zeros), opset=opset)
        coded, report = packed(model)
        onnx.checker.check_model(coded, full_check=True)
        assert oracle.same_bits(outputs(model), outputs(coded))
        before = constant_bytes(load(model).constants[0], load(model))
        for change in report.changes:
            others = [int(size) for size in re.findall(r" (\d+)[,)]", change.detail)]
            assert before in others
            assert change.bytes_after < min(others)
            assert abs(coded.ByteSize() - model.ByteSize() - change.bytes_after + change.bytes_before) <= 8
        for reason in reasons(report).values():
            assert before <= min(int(size) for size in re.findall(r"[a-z] (\d+)[,)]", reason))

    @pytest.mark.parametrize(
        ("zeros", "opset", "kind"),
        [(0.5, 17, "mask"), (0.95, 17, "gaps"), (0.9999, 17, "constant"), (0.5, 8, "mask"), (0.95, 8, "mask")],
    )
    def test_of_unstructured_zeros(self, zeros: float, opset: int, kind: str) -> None:
        _, report = packed(chain(normal(300, 300, zeros=zeros), opset=opset))
        (change,) = report.changes
        assert f", {kind}" in change.detail

    @pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "1x4", "4x1", "16x1", "4x4"])
    def test_of_structured_zeros(self, pattern: str) -> None:
        graph = load(chain(normal(320, 320)))
        Sparsify(pattern=pattern).apply(graph, Context())
        report = PackSparse().apply(graph, Context())
        assert ", patterns " in report.changes[0].detail

    def test_where_there_is_no_zero_nothing_is_said(self) -> None:
        _, report = packed(chain(normal(50, 50), normal(50, 50, zeros=0.02)))
        assert not report.changes
        assert list(reasons(report)) == ["w1"]
        assert "too few to gain: 10016 bytes as it is (not " in reasons(report)["w1"]

    def test_negative_zeros_are_values(self) -> None:
        model = chain(-np.zeros((100, 100), np.float32))
        assert packed(model) == (model, Report([], []))

    def test_a_rule_leaves_a_weight_alone(self) -> None:
        model = chain(normal(100, 100, zeros=0.8), normal(100, 100, zeros=0.8, seed=1))
        _, report = packed(model, Rule("w1", skip=True))
        assert [change.site for change in report.changes] == ["w0"]
        assert reasons(report) == {"w1": "left alone by a rule"}


class TestAfterwards:
    MODEL = chain(normal(100, 100, zeros=0.6), normal(100, 100, zeros=0.9), normal(100, 100, zeros=0.9995))

    def test_a_second_run_says_what_there_is(self) -> None:
        coded, first = packed(self.MODEL)
        assert len(first.changes) == 3
        again, report = packed(coded)
        assert again == coded
        assert not report.changes
        found = reasons(report)
        assert found["w0"] == found["w1"] == "is stored as values and where they are already"
        assert found["w2"].startswith("is stored as a sparse tensor already: ")

    def test_expand_gives_the_model_back(self) -> None:
        coded, _ = packed(self.MODEL)
        expanded = onnxshrink.expand(coded)
        assert sorted(expanded.sites) == ["w0", "w1", "w2"]
        dense = {t.name: t for t in to_model(expanded.graph).graph.initializer}
        held = [node.attribute[0].t for node in to_model(expanded.graph).graph.node if node.op_type == "Constant"]
        values = [onnx.numpy_helper.to_array(tensor) for tensor in [dense["w0"], dense["w1"], *held]]
        for value, stored in zip(values, self.MODEL.graph.initializer, strict=True):
            assert value.tobytes() == onnx.numpy_helper.to_array(stored).tobytes()

    def test_inspect_shows_the_weights(self) -> None:
        coded, report = packed(self.MODEL)
        found = {info.site: info for info in onnxshrink.inspect(coded).weights}
        assert set(found) == {"w0", "w1", "w2"}
        assert [found[f"w{i}"].op for i in range(3)] == ["sparse", "sparse", "MatMul"]
        assert {(info.coded, info.code_bits) for info in found.values()} == {(False, None)}
        assert found["w1"].zeros == pytest.approx(0.9, abs=0.02)
        for change in report.changes:
            assert abs(found[change.site].nbytes - change.bytes_after) <= 8

    def test_load_decodes_with_numpy(self) -> None:
        coded, _ = packed(self.MODEL)
        feeds = {"x0": normal(3, 100)}
        assert oracle.same_bits(onnxshrink.load(coded).run(None, feeds), onnxshrink.load(self.MODEL).run(None, feeds))

    def test_other_passes_leave_it_as_it_is_or_keep_it_exact(self) -> None:
        graph = load(packed(self.MODEL)[0])
        for subject in (ShareWeights(method="exact"), Huffman(), ShortenNames()):
            subject.apply(graph, Context())
            sort_nodes(graph)
        assert oracle.same_bits(outputs(to_model(graph)), outputs(self.MODEL))

    def test_other_passes_say_how_it_is_stored(self) -> None:
        model, _ = packed(self.MODEL)
        for subject, way_out in ((ShareWeights(), "to share them"), (Sparsify(), "to sparsify it further"), (Huffman(), "not as codes")):
            found = [reason for reason in reasons(subject.apply(load(model), Context())).values() if "and where they are" in reason]
            assert found
            assert all(reason.startswith("is stored as values") and reason.endswith(way_out) for reason in found)

    def test_weights_that_are_codes_are_left_to_huffman(self) -> None:
        graph = load(self.MODEL)
        ShareWeights(bits=4).apply(graph, Context())
        sort_nodes(graph)
        codes = to_model(graph)
        coded, report = packed(codes)
        assert coded == codes
        assert set(reasons(report).values()) == {"is stored as codes, which huffman makes smaller"}
        assert Huffman().apply(graph, Context()).changes
        sort_nodes(graph)
        assert set(reasons(packed(to_model(graph))[1]).values()) == {"is Huffman coded already"}

    def test_the_optimized_graph_is_that_of_the_dense_model(self, tmp_path: Path) -> None:
        coded, _ = packed(self.MODEL)
        found = []
        for name, model in (("dense", self.MODEL), ("coded", coded)):
            outputs(model, tmp_path / f"{name}.onnx")
            found.append(Counter(node.op_type for node in onnx.load(tmp_path / f"{name}.onnx").graph.node))
        assert found[0] == found[1]

    def test_external_data_goes_in_and_out(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source, size = tmp_path / "dense.onnx", self.MODEL.ByteSize()
        onnx.save_model(deepcopy(self.MODEL), source, save_as_external_data=True, location="dense.data", size_threshold=0)
        graph = load(source)
        report = PackSparse().apply(graph, Context())
        assert len(report.changes) == 3
        sort_nodes(graph)
        monkeypatch.setattr("onnxshrink.graph.files.MAX_MESSAGE_BYTES", 5000)
        assert save(graph, tmp_path / "small.onnx") < size / 2
        assert (tmp_path / "small.onnx.data").stat().st_size > 10_000
        feeds = {"x0": normal(3, 100)}
        results = [oracle.run(oracle.session(path), feeds) for path in (source, tmp_path / "small.onnx")]
        assert oracle.same_bits(*results)


class TestFinishing:
    """Sparsify ends with it, unless the recipe has it or says otherwise."""

    MODEL = chain(normal(100, 120), normal(120, 60))

    @staticmethod
    def names(*passes: Pass) -> list[str]:
        return [step.run.name for step in finished([Step(item) for item in passes])]

    def test_is_added_once_and_last(self) -> None:
        assert self.names(Sparsify(), Huffman(), Sparsify()) == ["sparsify", "huffman", "sparsify", "pack-sparse"]
        assert self.names(Sparsify(), ShortenNames()) == ["sparsify", "pack-sparse", "shorten-names"]

    def test_is_not_added_where_it_is_or_is_not_wanted(self) -> None:
        assert self.names(Sparsify(), PackSparse(), Huffman()) == ["sparsify", "pack-sparse", "huffman"]
        assert self.names(Sparsify(pack=False)) == ["sparsify"]
        assert self.names(parse_pass("sparsify:pack=false")) == ["sparsify"]
        assert self.names(Huffman()) == ["huffman"]

    def test_rules_of_a_step_stay_with_it(self) -> None:
        step = Step(Sparsify(), [Rule("w0", skip=True)])
        first, last = finished([step])
        assert first is step
        assert not last.rules

    def test_a_pass_that_does_not_exist_is_said(self) -> None:
        class Odd(Sparsify):
            finish_with = ("pack-spares",)

        with pytest.raises(RegistryError, match="unknown pass 'pack-spares'; did you mean 'pack-sparse'"):
            finished([Step(Odd())])

    def test_compress_makes_the_file_smaller_without_being_asked(self) -> None:
        result = onnxshrink.compress(self.MODEL, Sparsify(sparsity=0.5))
        assert [step.name for step in result.report.passes] == ["sparsify", "pack-sparse"]
        assert [step.outcome for step in result.report.passes] == ["kept", "kept"]
        assert result.report.bytes_after < 0.56 * result.report.bytes_before
        assert result.report.passes[1].changes

    def test_weights_that_became_codes_stay_codes(self) -> None:
        result = onnxshrink.compress(self.MODEL, [Sparsify(sparsity=0.5), ShareWeights(bits=4)])
        assert [step.outcome for step in result.report.passes] == ["kept", "kept", "unchanged"]
        assert not any(coded.is_sparse for coded in coded_weights(result.graph))

    def test_switched_off_the_bytes_stay(self) -> None:
        result = onnxshrink.compress(self.MODEL, Sparsify(sparsity=0.5, pack=False))
        assert result.report.bytes_after == result.report.bytes_before


@pytest.mark.skipif(not model_names(), reason=ABSENT)
@pytest.mark.parametrize("name", ["cifar_resnet20", "squeezenet_fp32up"])
def test_real_models(tmp_path: Path, name: str) -> None:
    graph = load(model_path(name))
    Sparsify(sparsity=0.7, scope="global").apply(graph, Context())
    sparse = to_model(graph)
    coded, report = packed(sparse)
    assert coded.ByteSize() < 0.36 * sparse.ByteSize()
    found = []
    for label, model in (("sparse", sparse), ("coded", coded)):
        values = outputs(model, tmp_path / f"{label}.onnx")
        found.append((values, Counter(node.op_type for node in onnx.load(tmp_path / f"{label}.onnx").graph.node)))
    assert oracle.same_bits(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert report.changes
