"""What `inspect` says of a model: numbers against numpy, work against a count by hand, and passes asked for what they would do."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from scipy import stats

from onnxshrink import inspection
from onnxshrink.api import compress, inspect
from onnxshrink.contract import Context, Pass, Report, Rule, Step
from onnxshrink.errors import UnsupportedModelError
from onnxshrink.graph.files import load
from onnxshrink.graph.ir import Graph
from onnxshrink.inspection import Inspection, WeightInfo
from onnxshrink.passes.huffman import Huffman
from onnxshrink.passes.share_weights import ShareWeights
from onnxshrink.passes.sparsify import Sparsify
from onnxshrink.registry import pass_class, pass_names
from onnxshrink.tracing import NodeTrace, trace
from tests import oracle

Array = np.ndarray[Any, np.dtype[Any]]


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def layer(node: onnx.NodeProto, shape: list[int], weights: dict[str, Array], opset: int = 17) -> onnx.ModelProto:
    """Returns a model of one node that reads x and writes y."""
    values = [oracle.value(name, array) for name, array in weights.items()]
    return oracle.make_model([node], [oracle.tensor("x", shape)], [oracle.tensor("y", None)], values, opset=opset)


def weight_infos(model: onnx.ModelProto) -> dict[str, WeightInfo]:
    return {info.site: info for info in inspect(model).weights}


class TestNumbers:
    @pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
    def test_are_those_of_numpy(self, dtype: Any) -> None:
        rng = np.random.default_rng(3)
        values = rng.choice(
            np.array([0.0, -0.0, 0.5, -1.5, 2.25, 1e-3], dtype), (32, 16), p=[0.3, 0.1, 0.2, 0.2, 0.1, 0.1]
        )
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        model = oracle.make_model(
            [helper.make_node("MatMul", ["x", "w"], ["y"])],
            [oracle.tensor("x", [1, 32], kind)],
            [oracle.tensor("y", [1, 16], kind)],
            [oracle.value("w", values)],
        )
        info = weight_infos(model)["w"]
        _, counts = np.unique(values, return_counts=True)  # both zeros are one value to numpy as well
        shares = counts / values.size
        assert info.zeros == pytest.approx(np.mean(values == 0))
        assert info.distinct == len(counts)
        assert info.entropy_bits == pytest.approx(-np.sum(shares * np.log2(shares)))
        assert (info.shape, info.dtype, info.op, info.coded) == ((32, 16), np.dtype(dtype).name, "MatMul", False)
        assert info.nbytes == pytest.approx(values.nbytes, abs=32)
        assert info.bits == pytest.approx(8 * info.nbytes / values.size)

    def test_of_the_whole_model(self) -> None:
        model = layer(helper.make_node("MatMul", ["x", "w"], ["y"]), [1, 4], {"w": normal(4, 3), "idle": normal(50)})
        model.producer_name, model.producer_version = "maker", "2.1"
        found = inspect(model)
        assert found.nbytes == model.ByteSize()
        assert (found.opset, found.ir_version, found.producer) == (17, 8, "maker 2.1")
        assert found.inputs == ["x: float32 [1, 4]"]
        assert found.outputs == ["y: float32 [?]"]
        assert found.ops == {"MatMul": 1}
        assert [info.site for info in found.weights] == ["idle", "w"]  # largest first
        assert (found.weights[0].op, found.weights[0].macs) == ("unused", None)
        assert found.notes == []

    def test_ops_of_bodies_and_functions_are_counted(self) -> None:
        from onnxshrink.testing_models import awkward_models

        models = dict(awkward_models())
        assert inspect(models["weights in If branches and from the outer scope"]).ops == {"MatMul": 3, "If": 1}
        assert inspect(models["weights in a model-local function"]).ops == {"Twice": 2, "MatMul": 2}

    def test_are_plain_values(self) -> None:
        model = layer(helper.make_node("MatMul", ["x", "w"], ["y"]), [1, 4], {"w": normal(4, 3)})
        found = inspect(model)
        read = json.loads(json.dumps(found.to_dict(), allow_nan=False))
        assert read["weights"][0]["site"] == "w"
        assert read["weights"][0]["macs"] == 12
        assert read.keys() == Inspection.__dataclass_fields__.keys()


class TestWork:
    @pytest.mark.parametrize(
        ("node", "shape", "weights", "expected"),
        [
            (helper.make_node("MatMul", ["x", "w"], ["y"]), [2, 5, 8], {"w": normal(8, 3)}, {"w": 2 * 5 * 8 * 3}),
            (helper.make_node("MatMul", ["w", "x"], ["y"]), [2, 8, 5], {"w": normal(3, 8)}, {"w": 2 * 3 * 8 * 5}),
            (
                helper.make_node("Gemm", ["x", "w", "b"], ["y"]),
                [4, 8],
                {"w": normal(8, 3), "b": normal(3)},
                {"w": 4 * 8 * 3},
            ),
            (helper.make_node("Gemm", ["x", "w"], ["y"], transB=1), [4, 8], {"w": normal(3, 8)}, {"w": 4 * 8 * 3}),
            (
                helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1], strides=[2, 2]),
                [2, 4, 9, 9],
                {"w": normal(6, 4, 3, 3)},
                {"w": 2 * 6 * 5 * 5 * 4 * 3 * 3},
            ),
            (
                helper.make_node("Conv", ["x", "w"], ["y"], group=4),
                [1, 4, 9, 9],
                {"w": normal(8, 1, 3, 3)},
                {"w": 8 * 7 * 7 * 1 * 3 * 3},
            ),
            (helper.make_node("Conv", ["x", "w"], ["y"]), [1, 4, 16], {"w": normal(6, 4, 3)}, {"w": 6 * 14 * 4 * 3}),
            (
                helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2]),
                [2, 4, 5, 5],
                {"w": normal(4, 6, 3, 3)},
                {"w": 2 * 5 * 5 * 4 * 6 * 3 * 3},
            ),
            (
                helper.make_node("ConvTranspose", ["x", "w"], ["y"], group=2),
                [1, 4, 5, 5],
                {"w": normal(4, 3, 2, 2)},
                {"w": 5 * 5 * 4 * 3 * 2 * 2},
            ),
            (
                helper.make_node("LSTM", ["x", "w", "r"], ["y"], hidden_size=6),
                [7, 2, 5],
                {"w": normal(1, 24, 5), "r": normal(1, 24, 6)},
                {"w": 7 * 2 * 24 * 5, "r": 7 * 2 * 24 * 6},
            ),
            (
                helper.make_node("GRU", ["x", "w", "r"], ["y"], hidden_size=6, direction="bidirectional"),
                [7, 2, 5],
                {"w": normal(2, 18, 5), "r": normal(2, 18, 6)},
                {"w": 7 * 2 * 2 * 18 * 5, "r": 7 * 2 * 2 * 18 * 6},
            ),
        ],
        ids=["MatMul", "left", "Gemm", "transB", "Conv", "depthwise", "1-D", "ConvTranspose", "groups", "LSTM", "GRU"],
    )
    def test_is_counted_as_by_hand(
        self, node: onnx.NodeProto, shape: list[int], weights: dict[str, Array], expected: dict[str, int]
    ) -> None:
        found = inspect(layer(node, shape, weights))
        assert {info.site: info.macs for info in found.weights if info.macs is not None} == expected
        assert found.notes == []

    def test_of_a_look_up_is_none(self) -> None:
        model = oracle.make_model(
            [helper.make_node("Gather", ["table", "ids"], ["y"])],
            [oracle.tensor("ids", [3], TensorProto.INT64)],
            [oracle.tensor("y", [3, 4])],
            [oracle.value("table", normal(10, 4))],
        )
        assert weight_infos(model)["table"].macs == 0

    def test_of_a_shared_weight_is_the_sum(self) -> None:
        model = oracle.make_model(
            [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Gemm", ["h", "w"], ["y"], transB=1)],
            [oracle.tensor("x", [3, 8])],
            [oracle.tensor("y", [3, 8])],
            [oracle.value("w", normal(8, 8))],
        )
        info = weight_infos(model)["w"]
        assert (info.op, info.macs) == ("MatMul+Gemm", 2 * 3 * 8 * 8)

    def test_of_a_branch_that_is_not_taken_is_not_known(self) -> None:
        def branch(name: str) -> onnx.GraphProto:
            node = helper.make_node("MatMul", ["x", f"{name}_w"], [f"{name}_y"])
            return helper.make_graph(
                [node], name, [], [oracle.tensor(f"{name}_y", [1, 4])], [oracle.value(f"{name}_w", normal(4, 4))]
            )

        model = oracle.make_model(
            [
                helper.make_node("If", ["always"], ["h"], then_branch=branch("yes"), else_branch=branch("no")),
                helper.make_node("Relu", ["h"], ["y"]),
            ],
            [oracle.tensor("x", [1, 4])],
            [oracle.tensor("y", [1, 4])],
            [oracle.value("always", True)],
        )
        assert {site: info.macs for site, info in weight_infos(model).items()} == {
            "h.then_branch/yes_w": 16,
            "h.else_branch/no_w": None,
        }

    def test_of_a_loop_body_counts_each_round(self) -> None:
        model = loop(rounds=3)
        assert weight_infos(model)["y.body/w"].macs == 3 * 16

    def test_is_not_known_for_a_model_that_does_not_run(self) -> None:
        node = helper.make_node("MatMul", ["h", "w"], ["y"])
        model = layer(node, [1, 4], {"w": normal(4, 4)})
        model.graph.node.insert(0, helper.make_node("Mystery", ["x"], ["h"], domain="elsewhere"))
        model.opset_import.append(helper.make_opsetid("elsewhere", 1))
        found = inspect(model)
        assert [info.macs for info in found.weights] == [None]
        (note,) = found.notes
        assert note.startswith("MACs are not known: original model: ONNX Runtime cannot load it: ")


class TestCodes:
    def test_are_shown_as_such_with_the_values_they_stand_for(self) -> None:
        values = np.random.default_rng(0).choice(normal(4), (64, 64))
        model = layer(helper.make_node("MatMul", ["x", "w"], ["y"]), [1, 64], {"w": values})
        small = compress(model, [ShareWeights()])
        (info,) = inspect(small.to_model()).weights
        assert (info.site, info.op, info.shape, info.dtype, info.coded) == ("w", "codes", (64, 64), "float32", True)
        assert info.distinct == 4
        assert info.bits == pytest.approx(8 * info.nbytes / 4096)
        (change,) = small.report.passes[0].changes
        assert info.nbytes == pytest.approx(
            change.bytes_after, abs=16
        )  # the last node's output has the weight's name by now
        assert 2 <= info.bits < 3.5  # codes of 2 bits, and a few hundred bytes around them
        assert info.actions == {}
        assert set(info.obstacles) == {"huffman", "pack-sparse", "share-weights", "sparsify"}


class TestDryRuns:
    def test_say_what_each_pass_does(self) -> None:
        model = oracle.make_model(
            [
                helper.make_node("Conv", ["x", "c"], ["h"]),
                helper.make_node("BatchNormalization", ["h", "s", "b", "m", "v"], ["y"]),
            ],
            [oracle.tensor("x", [1, 8, 5, 5])],
            [oracle.tensor("y", None)],
            [oracle.value("c", normal(16, 8, 3, 3)), *(oracle.value(name, np.ones(16, np.float32)) for name in "sbmv")],
        )
        infos = weight_infos(model)
        for name in pass_names():
            report = pass_class(name)().apply(load(model), Context())
            changed = {change.site: change.detail for change in report.changes}
            skipped = {skip.site: skip.reason for skip in report.skips if skip.site not in changed}
            assert {site: i.actions[name] for site, i in infos.items() if name in i.actions} == {
                site: detail for site, detail in changed.items() if site in infos
            }
            assert {site: i.obstacles[name] for site, i in infos.items() if name in i.obstacles} == {
                site: reason for site, reason in skipped.items() if site in infos
            }
        assert {"share-weights", "sparsify"} <= set(infos["c"].actions)

    def test_leave_the_model_as_it_was(self) -> None:
        model = layer(helper.make_node("MatMul", ["x", "w"], ["y"]), [1, 64], {"w": normal(64, 64)})
        before = model.SerializeToString()
        assert inspect(model) == inspect(model)
        assert model.SerializeToString() == before
        assert not Sparsify().apply(load(model), Context()).skips  # there was something to change

    def test_a_pass_that_fails_is_a_note(self, monkeypatch: pytest.MonkeyPatch) -> None:
        @dataclass(frozen=True, kw_only=True)
        class Fails(Pass):
            """Fails."""

            name: ClassVar[str] = "fails"

            def apply(self, graph: Graph, context: Context) -> Report:
                raise ZeroDivisionError("of all things")

        monkeypatch.setattr(inspection, "pass_names", lambda: ["fails", "sparsify"])
        monkeypatch.setattr(inspection, "pass_class", lambda name: Fails if name == "fails" else Sparsify)
        found = inspect(layer(helper.make_node("MatMul", ["x", "w"], ["y"]), [1, 4], {"w": normal(4, 4)}))
        assert found.notes == ["fails does not say what it would do: ZeroDivisionError: of all things"]
        assert set(found.weights[0].actions) == {"sparsify"}


def loop(rounds: int) -> onnx.ModelProto:
    """Returns y = x · w^rounds, by a Loop."""
    body = helper.make_graph(
        [helper.make_node("MatMul", ["h", "w"], ["h_out"]), helper.make_node("Identity", ["go"], ["go_out"])],
        "body",
        [
            oracle.tensor("i", [], TensorProto.INT64),
            oracle.tensor("go", [], TensorProto.BOOL),
            oracle.tensor("h", [1, 4]),
        ],
        [oracle.tensor("go_out", [], TensorProto.BOOL), oracle.tensor("h_out", [1, 4])],
        [oracle.value("w", normal(4, 4))],
    )
    return oracle.make_model(
        [helper.make_node("Loop", ["count", "true", "x"], ["y"], body=body)],
        [oracle.tensor("x", [1, 4])],
        [oracle.tensor("y", [1, 4])],
        [oracle.value("count", rounds, np.int64), oracle.value("true", True)],
    )


def facts(found: NodeTrace) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    return found.input_shapes[0], found.output_shapes[0], found.runs


class TestTraces:
    def test_hold_the_shapes_that_occurred_and_the_number_of_runs(self) -> None:
        graph = load(loop(rounds=5))
        traces = trace(graph, {"x": normal(1, 4)})
        ((_, body),) = graph.nodes[0].bodies()
        assert facts(traces[id(body.nodes[0])]) == ((1, 4), (1, 4), 5)

    def test_know_sizes_that_no_inference_knows(self) -> None:
        model = oracle.make_model(
            [helper.make_node("Reshape", ["x", "shape"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["y"])],
            [oracle.tensor("x", None), oracle.tensor("shape", [2], TensorProto.INT64)],
            [oracle.tensor("y", None)],
            [oracle.value("w", normal(4, 3))],
        )
        graph = load(model)
        traces = trace(graph, {"x": normal(24), "shape": np.array([6, 4])})
        assert facts(traces[id(graph.nodes[1])]) == ((6, 4), (6, 3), 1)

    def test_leave_the_graph_and_the_working_folder_alone(self, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        graph = load(layer(helper.make_node("MatMul", ["x", "w"], ["y"], name="mine"), [1, 4], {"w": normal(4, 3)}))
        trace(graph, {"x": normal(1, 4)})
        assert [node.name for node in graph.nodes] == ["mine"]
        assert list(tmp_path.iterdir()) == []

    def test_of_inputs_that_do_not_fit_are_refused(self) -> None:
        graph = load(layer(helper.make_node("MatMul", ["x", "w"], ["y"]), [1, 4], {"w": normal(4, 3)}))
        with pytest.raises(UnsupportedModelError, match="original model: it does not run without optimisations: "):
            trace(graph, {"x": normal(1, 5)})


class TestEntropyOfCodes:
    WEIGHTS = (("wide", 0.3), ("narrow", 2.0))  # steps in rms: many levels, and few

    def coded(self, *passes: Pass) -> Inspection:
        rng = np.random.default_rng(5)
        values = [oracle.value(name, rng.standard_normal((256, 256)).astype(np.float32)) for name, _ in self.WEIGHTS]
        nodes = [helper.make_node("MatMul", ["x", "wide"], ["h"]), helper.make_node("MatMul", ["h", "narrow"], ["y"])]
        model = oracle.make_model(nodes, [oracle.tensor("x", ["n", 256])], [oracle.tensor("y", ["n", 256])], values)
        steps = [Rule(name, {"step": step}) for name, step in self.WEIGHTS]
        return inspect(compress(model, [Step(ShareWeights(per="tensor"), steps), *passes]).to_model())

    def test_entropy_is_that_of_rounded_normal_values(self) -> None:
        by_site = {info.site: info for info in self.coded().weights}
        for name, step in self.WEIGHTS:
            edges = (np.arange(-40, 41) - 0.5) * step
            shares = np.diff(stats.norm.cdf(edges))
            expected = -np.sum(shares * np.log2(np.maximum(shares, 1e-300)))
            assert by_site[name].code_entropy_bits == pytest.approx(expected, abs=0.03)

    def test_packed_codes_take_whole_bits(self) -> None:
        for info in self.coded().weights:
            assert info.code_bits == pytest.approx(np.ceil(info.code_bits), abs=1e-3)
            assert info.efficiency == pytest.approx(info.code_bits / info.code_entropy_bits)

    def test_huffman_codes_come_close_to_the_entropy(self) -> None:
        found = self.coded(Huffman()).weights
        assert all(info.coded and info.code_bits < 8 * info.nbytes / (256 * 256) for info in found)
        assert 1.0 <= min(info.efficiency for info in found) <= max(info.efficiency for info in found) < 1.12

    def test_dense_weights_have_no_codes(self) -> None:
        (info,) = inspect(
            oracle.make_model(
                [helper.make_node("MatMul", ["x", "w"], ["y"])],
                [oracle.tensor("x", ["n", 8])],
                [oracle.tensor("y", ["n", 8])],
                [oracle.value("w", np.arange(64, dtype=np.float32).reshape(8, 8))],
            )
        ).weights
        assert (info.coded, info.code_bits, info.code_entropy_bits, info.efficiency) == (False, None, None, None)
