"""Tests of comparing models: every metric against plain numpy on all samples at once, failures, labels, limits, spilling."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, parser

from onnxshrink.errors import InputsError, ModelReadError, OptionError, UnsupportedModelError, ValidationError
from onnxshrink.graph.files import load
from onnxshrink.inputs import Samples, read_inputs
from onnxshrink.metrics import OutputMetrics
from onnxshrink.runtime import session
from onnxshrink.validate import Accuracy, Comparison, Reference, Tolerance, compare

Array = np.ndarray[Any, np.dtype[Any]]


def chooser(source: str, element: int, rank: int = 2, op: str = "Identity", **attrs: Any) -> onnx.ModelProto:
    """Returns a model whose output y is op(source), source being one of its inputs a and b: any two outputs can be compared."""
    dims = [None] * rank
    inputs = [helper.make_tensor_value_info(name, element, dims) for name in ("a", "b")]
    outputs = [helper.make_tensor_value_info("y", element, dims)]
    graph = helper.make_graph([helper.make_node(op, [source], ["y"], **attrs)], "g", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def samples_of(pairs: list[tuple[Array, Array]], labels: list[Array] | None = None) -> Samples:
    """Returns samples with these values for a and b, unchecked, so that they may hold NaN."""
    feeds = [{"a": a, "b": b} for a, b in pairs]
    return Samples(feeds.__getitem__, range(len(feeds)), "test", lambda index: labels[index] if labels else None)


def compared(pairs: list[tuple[Array, Array]], labels: list[Array] | None = None, **options: Any) -> Comparison:
    """Returns the comparison of outputs a with outputs b."""
    a = pairs[0][0]
    element = TensorProto.STRING if a.dtype == object else helper.np_dtype_to_tensor_dtype(a.dtype)
    original, candidate = (chooser(source, element, a.ndim, **options) for source in "ab")
    return compare(Reference(original, samples_of(pairs, labels)), candidate)


def one(comparison: Comparison) -> OutputMetrics:
    assert comparison.failure is None
    (output,) = comparison.outputs
    return output


def random_pairs(
    count: int, shape: tuple[int, ...], dtype: Any = np.float32, noise: float = 0.1
) -> list[tuple[Array, Array]]:
    rng = np.random.default_rng(0)
    originals = [rng.standard_normal(shape) for _ in range(count)]
    return [(a.astype(dtype), (a + noise * rng.standard_normal(shape)).astype(dtype)) for a in originals]


def joined(pairs: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Returns all originals and all candidates as two flat float64 arrays."""
    sides = [np.concatenate([np.asarray(pair[side], np.float64).reshape(-1) for pair in pairs]) for side in (0, 1)]
    return sides[0], sides[1]


class TestNumbers:
    @pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
    def test_metrics_are_those_of_all_samples_at_once(self, dtype: Any) -> None:
        pairs = random_pairs(7, (3, 5), dtype)
        pairs = [(a * np.asarray(10**k, dtype), b * np.asarray(10**k, dtype)) for k, (a, b) in enumerate(pairs[:4])]
        y, z = joined(pairs)
        output = one(compared(pairs))
        drift = np.linalg.norm(z - y) / np.linalg.norm(y)
        assert output.name == "y"
        assert output.drift == pytest.approx(drift, rel=1e-12)
        assert output.sqnr_db == pytest.approx(-20 * np.log10(drift), rel=1e-12)
        assert output.cosine == pytest.approx(y @ z / np.linalg.norm(y) / np.linalg.norm(z), rel=1e-12)
        assert output.max_abs == np.abs(z - y).max()
        per_sample = [
            np.linalg.norm(b.astype(float) - a.astype(float)) / np.linalg.norm(a.astype(float)) for a, b in pairs
        ]
        assert abs(output.drift / np.mean(per_sample) - 1) > 0.01  # the mean of per-sample drifts is another number

    @settings(max_examples=40, deadline=None)
    @given(
        data=st.data(),
        shape=hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4),
        count=st.integers(1, 4),
        power=st.integers(-20, 20),
    )
    def test_streaming_is_batch_and_scale_does_not_matter(
        self, data: st.DataObject, shape: tuple[int, ...], count: int, power: int
    ) -> None:
        arrays = hnp.arrays(np.float32, shape, elements=st.floats(-1e6, 1e6, width=32))
        pairs = [(data.draw(arrays), data.draw(arrays)) for _ in range(count)]
        output = one(compared(pairs))
        y, z = joined(pairs)
        error, norm = np.linalg.norm(z - y), np.linalg.norm(y)
        expected = error / norm if norm else 1e15 * (error > 0)
        assert output.drift == pytest.approx(min(expected, 1e15), rel=1e-9)
        assert -300 <= output.sqnr_db <= 300
        assert -1 <= output.cosine <= 1
        assert output.max_abs == np.abs(z - y).max(initial=0)
        scale = 2.0**power
        scaled = one(compared([(a.astype(float) * scale, b.astype(float) * scale) for a, b in pairs]))
        assert scaled.drift == pytest.approx(output.drift, rel=1e-9)
        assert scaled.cosine == pytest.approx(output.cosine, abs=1e-9)
        assert scaled.max_abs == output.max_abs * scale
        assert scaled.agreement == output.agreement

    def test_arrays_longer_than_a_chunk(self) -> None:
        pairs = random_pairs(1, ((1 << 20) + 3,))
        y, z = joined(pairs)
        assert one(compared(pairs)).drift == pytest.approx(np.linalg.norm(z - y) / np.linalg.norm(y), rel=1e-12)

    def test_equal_is_300_db(self) -> None:
        pairs = random_pairs(2, (1, 4), noise=0)
        assert one(compared(pairs)) == OutputMetrics("y", 0.0, 300.0, pytest.approx(1.0), 0.0, 1.0)

    @pytest.mark.parametrize(
        ("y", "z", "drift", "sqnr", "cosine"),
        [(0, 0, 0.0, 300.0, 1.0), (0, 1, 1e15, -300.0, 0.0), (1, 0, 1.0, 0.0, 0.0), (1, -1, 2.0, -6.0206, -1.0)],
    )
    def test_zeros(self, y: float, z: float, drift: float, sqnr: float, cosine: float) -> None:
        output = one(compared([(np.full((4,), y, np.float32), np.full((4,), z, np.float32))]))
        assert (output.drift, output.cosine) == (drift, cosine)
        assert output.sqnr_db == pytest.approx(sqnr, abs=1e-4)

    def test_nothing_is_infinite_even_where_squares_overflow(self) -> None:
        huge = np.array([1e300, -1e308])
        for pair in [(huge, huge), (huge, -huge), (huge, huge * 0.5), (huge * 0, huge)]:
            json.dumps(asdict(one(compared([pair]))), allow_nan=False)
        assert one(compared([(huge, huge)])).sqnr_db == 300

    def test_empty_outputs_are_equal(self) -> None:
        empty = np.zeros((0, 5), np.float32)
        assert one(compared([(empty, empty)])) == OutputMetrics("y", 0.0, 300.0, 1.0, 0.0, None, blank=True)

    def test_shapes_may_differ_between_samples(self) -> None:
        pairs = random_pairs(1, (1, 4)) + random_pairs(1, (3, 2))
        y, z = joined(pairs)
        assert one(compared(pairs)).drift == pytest.approx(np.linalg.norm(z - y) / np.linalg.norm(y), rel=1e-12)


class TestAgreement:
    @pytest.mark.parametrize("shape", [(4, 10), (4, 10, 1, 1), (2, 2)])
    def test_class_scores(self, shape: tuple[int, ...]) -> None:
        pairs = random_pairs(9, shape, noise=1.0)
        classes = shape[1]
        same = [a.reshape(-1, classes).argmax(1) == b.reshape(-1, classes).argmax(1) for a, b in pairs]
        share = np.concatenate(same).mean()
        assert 0 < share < 1
        assert one(compared(pairs)).agreement == share

    @pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 10, 2), (2, 3, 4, 5), (4, 1, 1)])
    def test_other_outputs_have_none(self, shape: tuple[int, ...]) -> None:
        assert one(compared(random_pairs(2, shape))).agreement is None

    @pytest.mark.parametrize(
        ("opset", "op", "attrs", "is_scores"),
        [
            (17, "Softmax", {}, True),
            (17, "LogSoftmax", {"axis": 2}, True),
            (17, "Softmax", {"axis": 1}, False),
            (11, "Softmax", {}, False),
            (11, "Softmax", {"axis": 2}, True),
            (17, "Relu", {}, False),
        ],
    )
    @pytest.mark.parametrize("tail", [[], [helper.make_node("Identity", ["s"], ["y"])]])
    def test_sequences_of_class_scores(
        self, opset: int, op: str, attrs: dict[str, int], is_scores: bool, tail: list[onnx.NodeProto]
    ) -> None:
        models = []
        for source in "ab":
            model = chooser(source, TensorProto.FLOAT, 3, op, **attrs)
            model.opset_import[0].version = opset
            model.graph.node[0].output[0] = "s" if tail else "y"
            model.graph.node.extend(tail)
            models.append(model)
        pairs = random_pairs(3, (2, 5, 4), noise=2.0)
        samples = samples_of(pairs)
        output = one(compare(Reference(models[0], samples), models[1]))
        share = np.mean([a.argmax(2) == b.argmax(2) for a, b in pairs])
        assert 0 < share < 1
        assert output.agreement == (share if is_scores else None)

    @pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.int32])
    def test_integers_are_ids(self, dtype: Any) -> None:
        rng = np.random.default_rng(1)
        pairs = [(rng.integers(0, 3, (2, 5)).astype(dtype), rng.integers(0, 3, (2, 5)).astype(dtype)) for _ in range(3)]
        y, z = joined(pairs)
        output = one(compared(pairs))
        assert output.agreement == np.mean(y == z)
        assert output.exact
        assert output.drift == pytest.approx(np.linalg.norm(z - y) / np.linalg.norm(y))

    @pytest.mark.parametrize("dtype", [bool, object])
    def test_flags_and_text_are_equal_or_not(self, dtype: Any) -> None:
        a, b = np.array([1, 0, 0, 1, 1]), np.array([1, 1, 0, 1, 0])
        words = np.array(["no", "yes"], object)
        pair = (words[a], words[b]) if dtype is object else (a.astype(bool), b.astype(bool))
        output = one(compared([pair]))
        assert (output.agreement, output.exact, output.max_abs) == (0.6, True, 1.0)
        assert output.drift == pytest.approx(math.sqrt(0.4))
        assert one(compared([(pair[0], pair[0])])).sqnr_db == 300

    def test_quantized_scores_are_numbers(self) -> None:
        models = []
        for source in "ab":
            model = parser.parse_model(
                f"""<ir_version: 8, opset_import: ["": 17]> g (float[n, 9] a, float[n, 9] b) => (uint8[n, 9] y)
                <float s = {{0.02}}, uint8 z = {{128}}> {{ y = QuantizeLinear({source}, s, z) }}"""
            )
            models.append(model)
        samples = samples_of(random_pairs(8, (4, 9), noise=0.5))
        output = one(compare(Reference(models[0], samples), models[1]))
        outputs = [[session(model).run(feeds)["y"] for feeds in samples] for model in models]
        assert not output.exact
        assert output.agreement == np.mean([y.argmax(1) == z.argmax(1) for y, z in zip(*outputs, strict=True)])


class TestLabels:
    def test_top_1_and_top_5_of_both(self) -> None:
        pairs = random_pairs(6, (10, 12), noise=1.0)
        rng = np.random.default_rng(2)
        labels = [rng.integers(0, 12, 10) for _ in pairs]
        for rows, (a, _) in zip(labels, pairs, strict=True):
            rows[:4] = a[:4].argmax(1)
        found = compared(pairs, labels).accuracy
        expected = {}
        for side, name in ((0, "original"), (1, "candidate")):
            order = [np.argsort(-pair[side], 1) for pair in pairs]
            for k in (1, 5):
                hits = [(o[:, :k] == rows[:, None]).any(1) for o, rows in zip(order, labels, strict=True)]
                expected[f"top{k}_{name}"] = float(np.mean(hits))
        assert found == Accuracy(output="y", labels=60, **expected)
        assert expected["top1_original"] > expected["top1_candidate"]

    def test_ties_go_to_the_lower_id_as_in_arg_max(self) -> None:
        scores = np.array([[1, 1, 0], [1, 1, 0]], np.float32)
        found = compared([(scores, scores)], [np.array([0, 1])]).accuracy
        assert found is not None
        assert found.top1_original == 0.5

    def test_labels_without_class_scores_are_left_alone(self) -> None:
        assert compared(random_pairs(1, (4,)), [np.array([1])]).accuracy is None

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            (np.arange(3), "test: number of labels must be 2, as output 'y' has rows, got 3"),
            (np.array([0, 4]), "test: labels must be integers from 0 to 3, got int64 from 0 to 4"),
            (np.array([-1, 0]), "test: labels must be integers from 0 to 3, got int64 from -1 to 0"),
            (np.array([0.0, 1.0]), "test: labels must be integers from 0 to 3, got float64 from 0.0 to 1.0"),
        ],
    )
    def test_labels_that_do_not_fit(self, labels: Array, message: str) -> None:
        with pytest.raises(InputsError) as caught:
            compared(random_pairs(1, (2, 4)), [labels])
        assert str(caught.value) == message


class TestFailures:
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_new_nan_or_infinity(self, bad: float) -> None:
        pairs = random_pairs(3, (1, 4))
        pairs[1][1][0, 2] = bad
        found = compared(pairs)
        assert found.failure == "output 'y': NaN or infinity where the original has none (sample 1)"
        assert found.outputs == ()
        assert Tolerance().violation(found) == found.failure

    def test_nan_of_the_original_is_left_out_where_equal(self) -> None:
        pairs = random_pairs(2, (1, 6))
        for side in (0, 1):
            pairs[1][side][0, :3] = [np.nan, np.inf, -np.inf]
        y, z = joined(pairs)
        keep = np.isfinite(y)
        expected = np.linalg.norm(z[keep] - y[keep]) / np.linalg.norm(y[keep])
        assert one(compared(pairs)).drift == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize(("y", "z"), [(np.nan, 0), (np.inf, 1), (np.inf, -np.inf), (np.nan, np.inf)])
    def test_nan_of_the_original_must_stay(self, y: float, z: float) -> None:
        pair = (np.array([1, y], np.float32), np.array([1, z], np.float32))
        found = compared([pair])
        assert found.failure == "output 'y': NaN and infinity must be where the original has them (sample 0)"

    @pytest.mark.parametrize(
        ("candidate", "message"),
        [
            ("(float[N] x) => (float[N] y) { y = Neg(x) }", "output 'z': it is missing (sample 0)"),
            (
                "(float[N] x) => (float[N] y, float[N] z, float[N] w) { y = Neg(x) z = Abs(x) w = Neg(x) }",
                "output 'w': the original has no such output (sample 0)",
            ),
            (
                "(float[N] x) => (double[N] y, float[N] z) { y = Cast<to = 11>(x) z = Abs(x) }",
                "output 'y': dtype must be float32, got float64 (sample 0)",
            ),
            (
                "(float[N] x) => (float[M] y, float[N] z) { y = Concat<axis = 0>(x, x) z = Abs(x) }",
                "output 'y': shape must be [3], got [6] (sample 0)",
            ),
            (
                "(float[N, 2] x) => (float[N, 2] y, float[N, 2] z) { y = Neg(x) z = Abs(x) }",
                "candidate model: ONNX Runtime cannot run it: Invalid rank for input: x Got: 1 Expected: 2",
            ),
            ("(float[N] x) => (float[N] y) { y = Nope(x) }", "candidate model: ONNX Runtime cannot load it: "),
        ],
    )
    def test_what_does_not_compare(self, candidate: str, message: str) -> None:
        header = '<ir_version: 8, opset_import: ["": 17]> g '
        original = parser.parse_model(header + "(float[N] x) => (float[N] y, float[N] z) { y = Neg(x) z = Abs(x) }")
        samples = read_inputs([{"x": np.ones(3, np.float32)}, {"x": np.ones(4, np.float32)}], session(original).inputs)
        found = compare(Reference(original, samples), parser.parse_model(header + candidate))
        assert found.failure is not None
        assert found.failure.startswith(message)
        assert found.samples == 2
        assert all(output.name == "z" or "missing" in message or "no such" in message for output in found.outputs)

    def test_outputs_that_do_compare_are_still_measured(self) -> None:
        header = '<ir_version: 8, opset_import: ["": 17]> g (float[N] x) => '
        original = parser.parse_model(header + "(float[N] y, float[N] z) { y = Abs(x) z = Neg(x) }")
        candidate = parser.parse_model(header + "(float[N] y, float[N] z) { y = Sqrt(x) z = Neg(x) }")
        samples = read_inputs([{"x": np.array([1, -1], np.float32)}], session(original).inputs)
        found = compare(Reference(original, samples), candidate)
        assert found.failure == "output 'y': NaN or infinity where the original has none (sample 0)"
        assert [(output.name, output.sqnr_db) for output in found.outputs] == [("z", 300.0)]

    def test_original_that_fails(self) -> None:
        header = '<ir_version: 8, opset_import: ["": 17]> g '
        original = parser.parse_model(header + "(float[N] x, float[M] w) => (float[N] y) { y = Add(x, w) }")
        feeds = [{"x": np.ones(2, np.float32), "w": np.ones(size, np.float32)} for size in (2, 3)]
        with pytest.raises(
            InputsError, match=r"^inputs: sample 1: the model does not run on it: original model: .* Add node"
        ):
            Reference(original, read_inputs(feeds, session(original).inputs))
        original.graph.node[0].op_type = "Nope"
        with pytest.raises(UnsupportedModelError, match=r"^original model: ONNX Runtime cannot load it: "):
            Reference(original, samples_of([]).__class__(feeds.__getitem__, range(1), "test"))

    def test_no_samples_prove_nothing(self) -> None:
        with pytest.raises(InputsError, match=r"^test: number of samples must be at least 1, got 0$"):
            Reference(chooser("a", 1), samples_of([]))

    def test_missing_candidate_file_is_an_error(self) -> None:
        reference = Reference(chooser("a", 1), samples_of(random_pairs(1, (1, 2))))
        with pytest.raises(ModelReadError, match=r"no\.onnx"):
            compare(reference, "no.onnx")


class TestUsersMetrics:
    def test_they_see_all_outputs(self) -> None:
        pairs = random_pairs(3, (2, 4))
        reference = Reference(chooser("a", 1), samples_of(pairs))

        def worst(original: Any, candidate: Any) -> float:
            return max(float(np.abs(y["y"] - z["y"]).max()) for y, z in zip(original, candidate, strict=True))

        found = compare(reference, chooser("b", 1), metrics={"worst": worst, "count": lambda y, z: len(y) + len(z)})
        assert found.metrics == {"worst": pytest.approx(found.outputs[0].max_abs, rel=1e-6), "count": 6.0}

    def test_they_do_not_run_on_broken_outputs(self) -> None:
        pairs = [(np.zeros((1, 2), np.float32), np.full((1, 2), np.nan, np.float32))]
        found = compare(
            Reference(chooser("a", 1), samples_of(pairs)), chooser("b", 1), metrics={"m": lambda y, z: 1 / 0}
        )
        assert found.failure is not None
        assert found.metrics == {}

    @pytest.mark.parametrize(
        ("metric", "message"),
        [
            (lambda y, z: 1 / 0, "metric 'm': it raised ZeroDivisionError: division by zero"),
            (lambda y, z: "high", "metric 'm': it raised ValueError: could not convert string to float: 'high'"),
            (lambda y, z: float("nan"), "metric 'm': result must be a finite number, got nan"),
        ],
    )
    def test_their_errors(self, metric: Any, message: str) -> None:
        reference = Reference(chooser("a", 1), samples_of(random_pairs(1, (1, 2))))
        with pytest.raises(ValidationError) as caught:
            compare(reference, chooser("b", 1), metrics={"m": metric})
        assert str(caught.value) == message


class TestReference:
    @pytest.mark.parametrize("memory_bytes", [0, 20, 1 << 30])
    @pytest.mark.parametrize("dtype", [np.float32, np.int64, bool, ml_dtypes.bfloat16, object])
    def test_outputs_survive_the_disk(self, dtype: Any, memory_bytes: int) -> None:
        rng = np.random.default_rng(0)
        shapes = [(2, 3), (0, 3), (1, 1), (5, 7), (2, 3)]
        arrays = [rng.integers(0, 2, shape).astype(dtype) for shape in shapes]
        if dtype is object:
            arrays = [np.array(["no", "yes"], object)[array.astype(int)] for array in arrays]
        element = TensorProto.STRING if dtype is object else helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        model = chooser("a", element)
        if dtype is ml_dtypes.bfloat16:
            model.opset_import[0].version = 21
        samples = samples_of([(array, array) for array in arrays])
        reference = Reference(model, samples, memory_bytes=memory_bytes)
        assert len(reference.outputs) == len(arrays)
        for index in (3, 0, 1, 2, 4, -1):
            np.testing.assert_array_equal(reference.outputs[index]["y"], arrays[index], strict=True)
        assert [item["y"].shape for item in reference.outputs[1:3]] == shapes[1:3]
        assert (reference.outputs._file is not None) == (memory_bytes < 200 and dtype is not object)  # type: ignore[attr-defined]
        assert one(compare(reference, model)).sqnr_db == 300

    def test_the_original_runs_once_and_a_given_session_stays_open(self) -> None:
        model = chooser("a", 1)
        pairs = random_pairs(2, (1, 2))
        running = session(model, role="original")
        calls = []
        run = running.run
        running.run = lambda *args: calls.append(1) or run(*args)  # type: ignore[method-assign,func-returns-value]
        reference = Reference(model, samples_of(pairs), running=running)
        for _ in range(3):
            compare(reference, model)
        assert len(calls) == 2
        assert run(samples_of(pairs)[0])

    def test_graph_bytes_and_path_are_models_too(self, tmp_path: Path) -> None:
        model = chooser("a", 1)
        onnx.save(model, tmp_path / "m.onnx")
        samples = samples_of(random_pairs(1, (1, 2)))
        for source in (load(model), model.SerializeToString(), tmp_path / "m.onnx"):
            assert one(compare(Reference(source, samples), source)).sqnr_db == 300


def comparison_of(*outputs: tuple[str, float, float | None, bool]) -> Comparison:
    """Returns a comparison with outputs of (name, SQNR in dB, agreement, exact)."""
    made = [OutputMetrics(n, 10 ** (-db / 20), db, 1.0, 0.0, agreement, exact) for n, db, agreement, exact in outputs]
    return Comparison(tuple(made), None, 1)


class TestTolerance:
    def test_the_worst_output_counts(self) -> None:
        found = comparison_of(("good", 40, 1.0, False), ("bad", 20, 0.9, False), ("fair", 30, None, False))
        limits = {
            Tolerance(min_sqnr_db=25): "output 'bad': SQNR must be at least 25 dB, got 20.00 dB",
            Tolerance(max_drift=0.05): "output 'bad': drift must be at most 0.05, got 0.1",
            Tolerance(min_agreement=0.95): "output 'bad': agreement must be at least 0.95, got 0.9000",
            Tolerance(min_sqnr_db=20, max_drift=0.1, min_agreement=0.9): None,
            Tolerance(): None,
        }
        assert {tolerance: tolerance.violation(found) for tolerance in limits} == limits
        worst = [found.worst("sqnr_db"), found.worst("drift"), found.worst("agreement")]
        assert worst == [found.outputs[1]] * 3

    def test_ids_are_judged_by_agreement_only(self) -> None:
        found = comparison_of(("scores", 40, None, False), ("ids", 5, 0.9, True))
        assert Tolerance(min_sqnr_db=30, max_drift=0.1).violation(found) is None
        found = comparison_of(("scores", 40, 1.0, False), ("ids", 5, 0.9, True))
        violation = Tolerance(min_sqnr_db=30, min_agreement=0.95).violation(found)
        assert violation == "output 'ids': agreement must be at least 0.95, got 0.9000"

    def test_ids_have_an_sqnr_where_there_is_nothing_else(self) -> None:
        found = comparison_of(("ids", 5, 0.9, True), ("more", 50, 1.0, True))
        assert Tolerance(min_sqnr_db=30).violation(found) == "output 'ids': SQNR must be at least 30 dB, got 5.00 dB"

    def test_agreement_that_does_not_exist(self) -> None:
        with pytest.raises(OptionError) as caught:
            Tolerance(min_agreement=0.9).violation(comparison_of(("y", 40, None, False)))
        assert str(caught.value) == (
            "tolerance: min-agreement must be left out for this model, got 0.9; "
            "no output has class scores, ids, flags or text to agree on; limit the SQNR instead"
        )

    @pytest.mark.parametrize(
        ("limit", "value", "allowed"),
        [
            ("min_sqnr_db", 301, "a number from -300 to 300"),
            ("min_sqnr_db", float("nan"), "a number from -300 to 300"),
            ("max_drift", -0.1, "a number from 0 to 1e+15"),
            ("max_drift", float("inf"), "a number from 0 to 1e+15"),
            ("min_agreement", 99, "a number from 0 to 1"),
            ("min_agreement", "high", "a number or none"),
        ],
    )
    def test_limits_out_of_range(self, limit: str, value: Any, allowed: str) -> None:
        with pytest.raises(OptionError) as caught:
            Tolerance(**{limit: value})
        assert str(caught.value) == f"tolerance: {limit.replace('_', '-')} must be {allowed}, got {value!r}"

    def test_for_people(self) -> None:
        assert not Tolerance().is_set
        assert Tolerance(max_drift=0.0).is_set
        assert str(Tolerance()) == "none"
        limits = str(Tolerance(min_sqnr_db=30, max_drift=0.1, min_agreement=0.99))
        assert limits == "SQNR at least 30 dB, drift at most 0.1, agreement at least 0.99"
