"""The front door, used as a library: sources of models and inputs, what is split from what, and what comes back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

import onnxshrink
from onnxshrink import api
from onnxshrink.api import bench, compress, expand, inspect, verify
from onnxshrink.contract import Context, Pass, Report, Step
from onnxshrink.errors import InputsError, ModelReadError, OutputError, UnsupportedModelError, ValidationError
from onnxshrink.graph.exporter import to_model
from onnxshrink.graph.files import load
from onnxshrink.graph.ir import Graph
from onnxshrink.inputs import Samples
from onnxshrink.passes.share_weights import ShareWeights
from onnxshrink.passes.sparsify import Sparsify
from onnxshrink.passes.tidy import Tidy
from onnxshrink.recipe import default_recipe, parse_recipe
from onnxshrink.validate import Metric, Tolerance
from onnxshrink.variation import Variation
from tests import oracle

Array = np.ndarray[Any, np.dtype[Any]]
CLASSES = 12


def normal(*shape: int, seed: int = 0) -> Array:
    return (np.random.default_rng([seed, *shape]).standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)


def build(hidden: int = 64) -> onnx.ModelProto:
    """Returns a classifier of two layers; ``echo`` puts out its input, so that outputs say which sample they belong to."""
    return oracle.make_model(
        [
            helper.make_node("Gemm", ["x", "w1", "b1"], ["h"]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("Gemm", ["r", "w2"], ["scores"]),
            helper.make_node("Identity", ["x"], ["echo"]),
        ],
        [oracle.tensor("x", ["n", 16])],
        [oracle.tensor("scores", ["n", CLASSES]), oracle.tensor("echo", ["n", 16])],
        [
            oracle.value("w1", normal(16, hidden)),
            oracle.value("b1", normal(hidden, seed=1)),
            oracle.value("w2", normal(hidden, CLASSES)),
        ],
    )


MODEL = build()
X = np.random.default_rng(4).standard_normal((20, 16)).astype(np.float32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    target = tmp_path / "model.onnx"
    onnx.save(MODEL, target)
    return target


@pytest.fixture
def external(tmp_path: Path) -> Path:
    """A model whose weights lie in a second file."""
    target = tmp_path / "big.onnx"
    onnx.save(build(512), target, save_as_external_data=True, location="big.bin", size_threshold=0)
    return target


def written(model: onnx.ModelProto) -> bytes:
    return bytes(model.SerializeToString(deterministic=True))


def run(model: onnx.ModelProto | Path, x: Array = X) -> Array:
    return oracle.session(model).run(["scores"], {"x": x})[0]


class TestSources:
    def test_a_path_bytes_and_a_message_give_the_same(self, path: Path) -> None:
        results = [compress(source, [ShareWeights(bits=4)]) for source in (path, str(path), path.read_bytes(), MODEL)]
        assert len({written(result.to_model()) for result in results}) == 1
        assert [result.report.model for result in results] == [str(path), str(path), "graph", "graph"]

    def test_a_model_with_external_data(self, external: Path, tmp_path: Path) -> None:
        before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
        result = compress(external, [ShareWeights(bits=4)], calibration={"x": X})
        assert result.report.bytes_before > 512 * (16 + CLASSES) * 4
        out = tmp_path / "out" / "small.onnx"
        out.parent.mkdir()
        assert result.save(out) == sum(file.stat().st_size for file in out.parent.iterdir())
        assert abs(result.report.bytes_after - sum(file.stat().st_size for file in out.parent.iterdir())) < 50
        assert verify(external, out, inputs={"x": X}, tolerance=Tolerance(min_sqnr_db=10)).violation is None
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before

    @pytest.mark.parametrize("name", ["big.onnx", "big.bin"])
    def test_no_file_of_the_input_is_replaced(self, external: Path, name: str) -> None:
        target = external.parent / name
        before = target.read_bytes()
        for result in (compress(external, [ShareWeights()], calibration={"x": X}), expand(external)):
            with pytest.raises(OutputError, match=f"{name}: the output must not replace a file of the input"):
                result.save(target)
        assert target.read_bytes() == before

    def test_what_cannot_be_read_or_run_is_said(self, tmp_path: Path) -> None:
        with pytest.raises(ModelReadError, match="absent.onnx: cannot be read: No such file or directory"):
            compress(tmp_path / "absent.onnx")
        with pytest.raises(ModelReadError, match="bytes: not an ONNX model"):
            compress(b"\x08\x01")
        odd = build()
        odd.graph.node[1].op_type = "Nonsense"
        with pytest.raises(UnsupportedModelError, match="original model: ONNX Runtime cannot load it: "):
            compress(odd)


class TestSteps:
    def test_a_list_of_passes_a_list_of_steps_and_a_recipe_are_the_same(self) -> None:
        recipe = parse_recipe(
            'format = 1\n[[pass]]\nname = "tidy"\n[[pass]]\nname = "share-weights"\noptions = { bits = 4 }'
        )
        results = [
            compress(MODEL, [Tidy(), ShareWeights(bits=4)]),
            compress(MODEL, (Step(Tidy()), ShareWeights(bits=4))),
            compress(MODEL, recipe),
        ]
        assert len({written(result.to_model()) for result in results}) == 1

    def test_nothing_asked_is_the_default_recipe(self) -> None:
        result = compress(MODEL, calibration={"x": X})
        assert [step.name for step in result.report.passes] == [step.run.name for step in default_recipe().steps]
        assert result.report.tolerance == Tolerance(min_sqnr_db=30)
        assert result.report.ratio > 2
        same = compress(MODEL, default_recipe(calibrated=True), calibration={"x": X})
        assert written(result.to_model()) == written(same.to_model())

    def test_no_pass_at_all_gives_the_model_back(self) -> None:
        result = compress(MODEL, [])
        assert written(result.to_model()) == written(to_model(load(MODEL)))
        assert (result.report.ratio, result.report.passes, result.report.target_reached) == (1, [], True)
        assert all(output.sqnr_db == 300 for output in result.report.outputs)

    def test_a_limit_given_here_replaces_that_of_the_recipe(self) -> None:
        recipe = parse_recipe("format = 1\n[tolerance]\nmin-sqnr = 30\nmin-agreement = 0.5")
        assert compress(MODEL, recipe).report.tolerance == Tolerance(30, None, 0.5)
        assert compress(MODEL, recipe, tolerance=Tolerance(max_drift=0.1)).report.tolerance == Tolerance(
            None, 0.1, None
        )


def looking() -> tuple[Pass, Metric, dict[str, list[Any]]]:
    """Returns a pass that keeps the calibration data it sees, a measure that keeps what it judges, and where they keep that."""
    seen: dict[str, list[Any]] = {"counts": [], "given": [], "judged": []}

    @dataclass(frozen=True, kw_only=True)
    class Looks(Pass):
        """Looks at its calibration data."""

        name: ClassVar[str] = "looks"

        def apply(self, graph: Graph, context: Context) -> Report:
            assert context.activations is not None
            seen["counts"].append(context.activations.count)
            seen["given"] += [values["x"] for values in context.activations.samples(graph, ["x"])]
            return Report()

    def judge(original: Sequence[Mapping[str, Array]], candidate: Sequence[Mapping[str, Array]]) -> float:
        seen["judged"] = [outputs["echo"] for outputs in original]
        return 0.0

    return Looks(), judge, seen


class TestSamples:
    def test_that_judge_are_not_those_that_passes_see(self) -> None:
        looks, judge, seen = looking()
        report = compress(MODEL, [looks], calibration={"x": X}, metrics={"judge": judge}).report
        assert seen["counts"] == [15]
        given, judged = ({sample.tobytes() for sample in seen[part]} for part in ("given", "judged"))
        assert (len(given), len(judged)) == (15, 5)
        assert not given & judged
        assert given | judged == {row[None].tobytes() for row in X}
        assert (report.calibration_samples, report.validation_samples, report.synthetic) == (15, 5, False)

    def test_others_may_judge_and_passes_then_see_all(self) -> None:
        looks, judge, seen = looking()
        parts = {"calibration": {"x": X[:12]}, "validation": {"x": X[12:]}}
        report = compress(MODEL, [looks], **parts, metrics={"judge": judge}).report  # type: ignore[arg-type]
        np.testing.assert_array_equal(np.concatenate(seen["given"]), X[:12])
        np.testing.assert_array_equal(np.concatenate(seen["judged"]), X[12:])
        assert (report.calibration_samples, report.validation_samples, report.synthetic) == (12, 8, False)
        alone = compress(MODEL, [], validation={"x": X}).report
        assert (alone.calibration_samples, alone.validation_samples, alone.synthetic) == (0, 20, False)

    def test_the_same_inputs_do_not_calibrate_and_judge(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "x.npz", x=X)
        feeds = {"x": X}
        for one, other in ((feeds, feeds), (tmp_path / "x.npz", str(tmp_path / "x.npz"))):
            with pytest.raises(InputsError, match="^inputs: validation must be other inputs than calibration"):
                compress(MODEL, [], calibration=one, validation=other)

    def test_of_one_sample_it_judges(self) -> None:
        asked = []

        @dataclass(frozen=True, kw_only=True)
        class Asks(Pass):
            """Asks for calibration data."""

            name: ClassVar[str] = "asks"

            def apply(self, graph: Graph, context: Context) -> Report:
                asked.append(context.activations)
                return Report()

        report = compress(MODEL, [Asks()], calibration={"x": X[:1]}).report
        assert asked == [None]
        assert (report.calibration_samples, report.validation_samples) == (0, 1)
        assert "one input was given: it judges the result, and passes worked without calibration data" in report.notes

    def test_of_few_samples_it_is_said_that_they_are_few(self) -> None:
        def told(count: int) -> list[str]:
            x = np.random.default_rng(0).standard_normal((count, 16)).astype(np.float32)
            return [note for note in compress(MODEL, [], calibration={"x": x}).report.notes if "judged" in note]

        assert told(20) == ["the result was judged on 5 inputs only: on others the outputs may differ by more"]
        assert told(4) == ["the result was judged on 1 input only: on others the outputs may differ by more"]
        assert told(128) == []

    def test_made_up_ones_are_said_to_prove_less(self) -> None:
        report = compress(MODEL, [Tidy()], seed=5).report
        assert (report.synthetic, report.inputs, report.seed) == (True, "synthetic inputs (seed 5)", 5)
        assert (report.calibration_samples, report.validation_samples) == (0, 8)
        assert report.notes[0].startswith(
            "inputs are synthetic: they show that the result runs, and little of its quality"
        )

    def test_of_every_form_are_taken(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "x.npz", x=X)
        folder = tmp_path / "many"
        folder.mkdir()
        for index, row in enumerate(X):
            np.savez(folder / f"{index:03}.npz", x=row[None])
        sources: list[Any] = [
            {"x": X},
            [{"x": row[None]} for row in X],
            tmp_path / "x.npz",
            str(tmp_path / "x.npz"),
            folder,
        ]
        reports = [compress(MODEL, [Sparsify()], calibration=source).report for source in sources]
        assert all(report.validation_samples == 5 for report in reports)
        assert len({report.outputs for report in reports}) == 1

    def test_that_do_not_fit_are_refused(self) -> None:
        with pytest.raises(InputsError, match="'z' is no input of the model"):
            compress(MODEL, calibration={"z": X})


def sentences(count: int, words: int = 300, length: int = 12) -> list[dict[str, Array]]:
    """Returns samples of words by Zipf's law, of which every one has some that others lack."""
    rng = np.random.default_rng(count)
    return [{"ids": (words ** rng.random(length)).astype(np.int64)} for _ in range(count)]


def reader(echo: bool = False) -> onnx.ModelProto:
    """Returns a model that looks rows up in a table and multiplies them; with ``echo`` their numbers are put out as well."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"]),
        helper.make_node("MatMul", ["e", "w1"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "w2"], ["y"]),
    ]
    outputs = [oracle.tensor("y", ["n", 4])]
    if echo:
        nodes.append(helper.make_node("Identity", ["ids"], ["same"]))
        outputs.append(oracle.tensor("same", ["n"], onnx.TensorProto.INT64))
    values = [oracle.value("table", normal(300, 8)), oracle.value("w1", normal(8, 16)), oracle.value("w2", normal(16, 4))]
    return oracle.make_model(nodes, [oracle.tensor("ids", ["n"], onnx.TensorProto.INT64)], outputs, values)


class TestRandomRows:
    """Copies of samples with other rows of tables (`onnxshrink.variation`): passes are fitted to them, nothing is judged by them."""

    NOTE = "calibration inputs are few: layers were also shown {} copies of them with random ids"

    @staticmethod
    def notes(model: onnx.ModelProto, subject: Pass, **inputs: Any) -> list[str]:
        return [note for note in compress(model, [subject], **inputs).report.notes if "copies" in note]

    def test_are_told_of_exactly_where_they_were_looked_at(self) -> None:
        few, fit = sentences(12), Sparsify(sparsity=0.5, scope="layer", pack=False)
        assert self.notes(reader(), fit, calibration=few) == [self.NOTE.format(2 * 9)]
        assert self.notes(reader(), fit, calibration=few[:8], validation=few[8:]) == [self.NOTE.format(2 * 8)]
        assert self.notes(reader(), Tidy(), calibration=few) == []  # fits nothing
        assert self.notes(reader(), fit) == []  # nothing to copy
        assert self.notes(reader(), fit, validation=few) == []
        assert self.notes(reader(echo=True), fit, calibration=few) == []  # its inputs are more than numbers of rows
        assert self.notes(reader(), fit, calibration=few[:1] * 8) == []  # nothing varies
        assert self.notes(reader(), fit, calibration=sentences(12, words=10)) == []  # no words are new
        assert self.notes(MODEL, fit, calibration={"x": X}) == []
        enough = sentences(90, length=20)  # 67 for passes: 64 of them have 80 positions for each of 16 columns
        assert self.notes(reader(), fit, calibration=enough) == []
        assert self.notes(reader(), fit, calibration=enough[:84]) != []

    def test_are_the_same_each_time_and_go_by_the_seed(self) -> None:
        few, fit = sentences(12), Sparsify(sparsity=0.5, scope="layer", pack=False)
        results = [compress(reader(), [fit], calibration=few, seed=seed) for seed in (0, 0, 1)]
        assert written(results[0].to_model()) == written(results[1].to_model()) != written(results[2].to_model())
        assert results[0].report.notes == results[1].report.notes

    def test_are_made_of_what_passes_see_and_judge_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        given: list[bytes] = []
        judged: list[bytes] = []

        class Spy(Variation):
            def __call__(self, data: Samples) -> Samples:
                given.extend(feeds["ids"].tobytes() for feeds in data)
                return super().__call__(data)

        def judge(original: Sequence[Mapping[str, Array]], candidate: Sequence[Mapping[str, Array]]) -> float:
            judged.extend(outputs["y"].tobytes() for outputs in original)
            return 0.0

        monkeypatch.setattr(api, "Variation", Spy)
        inputs = sentences(20)
        report = compress(reader(), [Sparsify(sparsity=0.5, pack=False)], calibration=inputs, metrics={"judge": judge}).report
        running = oracle.session(reader())
        of = {oracle.run(running, feeds)[0].tobytes(): feeds["ids"].tobytes() for feeds in inputs}
        assert judged
        assert {of[outputs] for outputs in judged}.isdisjoint(given)
        assert set(given) | {of[outputs] for outputs in judged} == {feeds["ids"].tobytes() for feeds in inputs}
        assert (report.calibration_samples, report.validation_samples) == (15, 5)

    def test_are_used_where_it_is_inspected_what_repair_saves(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[int] = []

        class Spy(Variation):
            def __call__(self, data: Samples) -> Samples:
                asked.append(len(data))
                return super().__call__(data)

        monkeypatch.setattr(api, "Variation", Spy)
        inspect(reader(), ranks=True, calibration=sentences(8))
        assert asked == []  # it tells what outputs are on the calibration inputs
        inspect(reader(), sensitivity=True, repair=True, calibration=sentences(8))
        assert set(asked) == {6}
        asked.clear()
        inspect(reader(), sensitivity=True, calibration=sentences(8))
        assert asked == []


class TestReport:
    def test_is_about_the_files(self, path: Path, tmp_path: Path) -> None:
        result = compress(path, [ShareWeights(bits=3)], calibration={"x": X}, tolerance=Tolerance(min_sqnr_db=5))
        out = tmp_path / "small.onnx"
        assert result.save(out) == out.stat().st_size == result.report.bytes_after
        assert result.report.bytes_before == path.stat().st_size
        judged = X[::4]  # a quarter, interleaved
        before, after = run(path, judged).astype(np.float64), run(out, judged).astype(np.float64)
        drift = np.linalg.norm(after - before) / np.linalg.norm(before)
        (scores,) = [output for output in result.report.outputs if output.name == "scores"]
        assert scores.drift == pytest.approx(drift, rel=1e-4)
        assert scores.sqnr_db == pytest.approx(-20 * np.log10(drift), abs=1e-3)
        assert scores.agreement == np.mean(before.argmax(1) == after.argmax(1))

    def test_says_with_what_it_was_made(self) -> None:
        report = compress(MODEL, []).report
        assert report.versions["onnxshrink"] == onnxshrink.__version__
        assert report.versions["onnx"] == onnx.__version__
        assert (
            "no limit was set: nothing was rolled back for quality, only for an invalid model or new NaN or infinity"
            in report.notes
        )
        json.loads(report.to_json())

    def test_holds_a_model_that_fails_the_checker_to_what_it_passes(self) -> None:
        odd = build()
        odd.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 13  # says 13 classes and gives 12
        result = compress(odd, [ShareWeights(bits=6)], calibration={"x": X})
        assert result.report.passes[0].outcome == "kept"
        (note,) = [note for note in result.report.notes if "checker" in note]
        assert note.startswith("the original itself does not pass the ONNX checker, so the result is held to less: ")

    def test_of_a_model_that_does_not_repeat_itself_says_so(self) -> None:
        noisy = oracle.make_model(
            [helper.make_node("RandomNormalLike", ["x"], ["noise"]), helper.make_node("Add", ["x", "noise"], ["y"])],
            [oracle.tensor("x", [1, 4])],
            [oracle.tensor("y", [1, 4])],
        )
        notes = compress(noisy, []).report.notes
        assert (
            "the original does not reproduce its own outputs on the same inputs; small differences mean nothing"
            in notes
        )


class TestMetrics:
    def test_of_the_user_are_reported(self) -> None:
        def worst(original: Sequence[Mapping[str, Array]], candidate: Sequence[Mapping[str, Array]]) -> float:
            return max(float(np.abs(a["scores"] - b["scores"]).max()) for a, b in zip(original, candidate, strict=True))

        result = compress(MODEL, [ShareWeights(bits=4)], calibration={"x": X}, metrics={"worst": worst})
        (scores,) = [output for output in result.report.outputs if output.name == "scores"]
        assert result.report.metrics == {"worst": pytest.approx(scores.max_abs)}
        found = verify(MODEL, result.to_model(), inputs={"x": X}, metrics={"worst": worst})
        assert found.comparison.metrics["worst"] == pytest.approx(
            float(np.abs(run(MODEL) - run(result.to_model())).max())
        )

    def test_that_fail_are_named(self) -> None:
        with pytest.raises(ValidationError, match="metric 'bad': it raised ZeroDivisionError"):
            compress(MODEL, [], metrics={"bad": lambda original, candidate: 1 / 0})

    def test_labels_give_the_accuracy_of_both(self) -> None:
        scores = run(MODEL)
        labels = scores.argmax(1)
        labels[:5] = scores[:5].argmin(1)
        found = verify(MODEL, MODEL, inputs={"x": X, "labels": labels}).comparison.accuracy
        assert found is not None
        assert (found.output, found.labels, found.top1_original, found.top1_candidate) == ("scores", 20, 0.75, 0.75)


class TestVerify:
    def test_a_model_equals_itself(self) -> None:
        found = verify(
            MODEL, MODEL, inputs={"x": X}, tolerance=Tolerance(min_sqnr_db=300, max_drift=0, min_agreement=1)
        )
        assert found.violation is None
        assert found.bytes_before == found.bytes_after == MODEL.ByteSize()
        assert (found.synthetic, found.comparison.samples) == (False, 20)

    def test_a_broken_limit_is_a_violation(self) -> None:
        small = compress(MODEL, [ShareWeights(bits=2)]).to_model()
        found = verify(MODEL, small, tolerance=Tolerance(min_sqnr_db=60))
        assert found.violation is not None
        assert found.violation.startswith("output 'scores': SQNR must be at least 60 dB, got ")
        assert (found.synthetic, found.bytes_after) == (True, small.ByteSize())

    def test_a_candidate_that_cannot_be_compared_is_a_violation(self) -> None:
        other, broken = build(), build()
        other.graph.output[0].name = other.graph.node[2].output[0] = "points"
        broken.graph.node[1].op_type = "Nonsense"
        assert verify(MODEL, other).violation == "output 'scores': it is missing (sample 0)"
        found = verify(MODEL, broken)
        assert found.violation is not None
        assert found.violation.startswith("candidate model: ONNX Runtime cannot load it: ")
        assert found.comparison.outputs == ()

    def test_is_plain_for_machines(self) -> None:
        found = verify(MODEL, MODEL).to_dict()
        assert {
            "outputs",
            "failure",
            "samples",
            "violation",
            "inputs",
            "synthetic",
            "bytes_before",
            "bytes_after",
        } <= found.keys()
        assert json.loads(json.dumps(found, allow_nan=False))["outputs"][0]["name"] == "scores"


class TestExpand:
    @pytest.mark.parametrize(
        "subject", [ShareWeights(bits=4), ShareWeights(bits=3, method="uniform"), ShareWeights(bits=16)]
    )
    def test_undoes_the_codes_and_not_the_rounding(self, subject: ShareWeights) -> None:
        small = compress(MODEL, [subject]).to_model()
        result = expand(small)
        assert sorted(result.sites) == ["w1", "w2"]
        dense = to_model(result.graph)
        onnx.checker.check_model(dense, full_check=True)
        assert [node.op_type for node in dense.graph.node] == [node.op_type for node in MODEL.graph.node]
        shapes = {tensor.name: tuple(tensor.dims) for tensor in dense.graph.initializer}
        assert shapes == {tensor.name: tuple(tensor.dims) for tensor in MODEL.graph.initializer}
        assert run(dense).tobytes() == run(small).tobytes()
        assert (result.bytes_before, result.bytes_after) == (small.ByteSize(), dense.ByteSize())
        assert result.to_dict() == {
            "sites": list(result.sites),
            "bytes_before": small.ByteSize(),
            "bytes_after": dense.ByteSize(),
        }

    def test_of_exact_codes_is_the_original(self) -> None:
        model = build()
        for tensor in model.graph.initializer:
            values = np.resize(normal(9), tuple(tensor.dims))
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        small = compress(model, [ShareWeights()]).to_model()
        assert small.ByteSize() < model.ByteSize()
        dense = {tensor.name: tensor.raw_data for tensor in to_model(expand(small).graph).graph.initializer}
        assert dense == {tensor.name: tensor.raw_data for tensor in model.graph.initializer}

    def test_of_a_plain_model_changes_nothing(self, tmp_path: Path) -> None:
        result = expand(MODEL)
        assert (result.sites, result.bytes_before, result.bytes_after) == ((), MODEL.ByteSize(), MODEL.ByteSize())
        assert result.save(tmp_path / "out.onnx") == MODEL.ByteSize()
        assert written(onnx.load(tmp_path / "out.onnx")) == written(MODEL)


class TestBench:
    def test_measures_both(self) -> None:
        found = bench(MODEL, compress(MODEL, [ShareWeights()]).to_model(), inputs={"x": X}, seconds=0.01)
        assert found.runs >= 3
        assert found.threads == 1
        spreads = [found.a_ms, found.b_ms, found.ratio]
        assert all(0 < spread.low <= spread.median <= spread.high for spread in spreads)
        json.dumps(dataclasses.asdict(found), allow_nan=False)

    def test_refuses_what_does_not_fit(self) -> None:
        with pytest.raises(InputsError):
            bench(MODEL, MODEL, inputs={"x": X[:, :3]}, seconds=0.01)


def test_inspect_takes_every_source(path: Path, external: Path) -> None:
    assert inspect(path).weights == inspect(MODEL).weights == inspect(path.read_bytes()).weights
    assert (inspect(path).model, inspect(MODEL).model) == (str(path), "graph")
    assert [info.shape for info in inspect(external).weights] == [(16, 512), (512, CLASSES), (512,)]


def test_nothing_is_left_in_the_folder_for_temporary_files(
    external: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "tmp"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    result = compress(external, [ShareWeights()], calibration={"x": X})
    inspect(external)
    expand(external)
    verify(external, external)
    result.save(tmp_path / "out.onnx")
    del result
    assert list(place.iterdir()) == []


class TestLoad:
    @pytest.mark.parametrize("subject", [ShareWeights(bits=4), ShareWeights(bits=3, method="uniform"), ShareWeights(bits=16)])
    def test_runs_like_the_file_in_onnx_runtime(self, subject: ShareWeights, tmp_path: Path) -> None:
        path = tmp_path / "small.onnx"
        compress(MODEL, [subject]).save(path)
        own, plain = onnxshrink.load(path), oracle.session(onnx.load(path))
        for ours, theirs in zip(own.run(None, {"x": X[:4]}), oracle.run(plain, {"x": X[:4]}), strict=True):
            np.testing.assert_array_equal(ours, theirs)

    def test_takes_the_options_of_a_session(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxshrink.load(MODEL, sess_options=options, providers=["CPUExecutionProvider"])
        assert session.get_session_options().intra_op_num_threads == 1

    def test_external_data_is_read_where_it_lies(self, external: Path) -> None:
        plain = onnxruntime.InferenceSession(str(external), providers=["CPUExecutionProvider"])
        for ours, theirs in zip(onnxshrink.load(external).run(None, {"x": X}), plain.run(None, {"x": X}), strict=True):
            np.testing.assert_array_equal(ours, theirs)

    def test_what_onnx_runtime_does_not_load_is_one_line(self) -> None:
        model = onnx.ModelProto()
        model.CopyFrom(MODEL)
        model.graph.node[0].op_type = "NoSuchOp"
        with pytest.raises(UnsupportedModelError, match="ONNX Runtime cannot load it"):
            onnxshrink.load(model)
