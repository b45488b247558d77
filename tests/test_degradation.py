"""What zeros do to a model: against ONNX Runtime, run on copies that numpy put the zeros into."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper, parser

from onnxshrink.api import compress, inspect
from onnxshrink.contract import Context
from onnxshrink.degradation import LAYER_SPARSITIES, MODEL_SPARSITIES, Degradation, degradation
from onnxshrink.errors import InputsError, OptionError
from onnxshrink.graph.files import load
from onnxshrink.inputs import Samples
from onnxshrink.metrics import SQNR_LIMIT_DB
from onnxshrink.passes.share_weights import ShareWeights
from tests import oracle

Array = np.ndarray[Any, np.dtype[Any]]
HEAD = '<ir_version: 8, opset_import: ["": 17]> '
CLASSES = 5


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def model_of(text: str, **arrays: Array) -> onnx.ModelProto:
    model = parser.parse_model(HEAD + text)
    model.graph.initializer.extend(oracle.value(name, array) for name, array in arrays.items())
    return model


def cnn() -> onnx.ModelProto:
    """Returns a convolution, one that is used twice, and class scores; the kernels differ in size, so that rows do."""
    return model_of(
        """g (float[1, 3, 6, 6] x) => (float[1, 5] y) {
            a = Conv<pads = [1, 1, 1, 1]>(x, first, bias) b = Relu(a)
            c = Conv(b, twice) d = Relu(c) e = Conv(d, twice) f = Relu(e)
            h = GlobalAveragePool(f) i = Flatten(h) y = MatMul(i, head) }""",
        first=normal(8, 3, 3, 3),
        bias=normal(8, seed=1),
        twice=normal(8, 8, 1, 1) * np.linspace(0.2, 1, 8, dtype=np.float32)[:, None, None, None],
        head=normal(8, CLASSES),
    )


def pictures(count: int) -> Array:
    return normal(count, 3, 6, 6, seed=7)


def outputs(model: onnx.ModelProto, inputs: Array) -> Array:
    running = oracle.session(model)
    return np.concatenate([running.run(None, {"x": sample[None]})[0] for sample in inputs]).astype(np.float64)


def without(model: onnx.ModelProto, share: float, pattern: str, only: Sequence[str]) -> onnx.ModelProto:
    """Returns the model with the smallest weights, or output channels of least norm, set to zero."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.name in only:
            values = numpy_helper.to_array(tensor).copy()
            rows = values.T if values.ndim == 2 else values.reshape(len(values), -1)  # a view either way
            keys = np.abs(rows).reshape(-1) if pattern == "unstructured" else np.linalg.norm(rows, axis=1)
            gone = np.argsort(keys)[: int(share * len(keys) + 1e-9)]  # never more than was asked for
            if pattern == "unstructured":
                rows[np.unravel_index(gone, rows.shape)] = 0
            else:
                rows[gone] = 0
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return copy


def decibels(expected: Array, got: Array) -> float:
    return float(-10 * np.log10(max(np.square(got - expected).sum() / np.square(expected).sum(), 1e-30)))


def measured(model: onnx.ModelProto, inputs: Any, **options: Any) -> Degradation:
    found = inspect(model, sensitivity=True, calibration=inputs, **options).sensitivity
    assert found is not None
    return found


class TestLayers:
    def test_are_what_onnx_runtime_says_of_zeros_in_one_at_a_time(self) -> None:
        model, x = cnn(), pictures(9)
        found, expected = measured(model, {"x": x}), outputs(model, x)
        assert {layer.site for layer in found.layers} == {"first", "twice", "head"}
        for layer in found.layers:
            assert list(layer.curves) == ["unstructured", "rows"]
            for pattern, points in layer.curves.items():
                assert [point.sparsity for point in points] == list(LAYER_SPARSITIES)
                for point in points:
                    got = decibels(expected, outputs(without(model, point.sparsity, pattern, [layer.site]), x))
                    assert point.sqnr_db == pytest.approx(got, abs=1e-3)
                    assert point.sqnr_db == pytest.approx(-20 * math.log10(point.drift))

    def test_come_with_their_share_and_most_sensitive_first(self) -> None:
        found = measured(cnn(), {"x": pictures(6)})
        total = 8 * 27 + 64 + 8 * CLASSES
        assert {(layer.site, layer.op, layer.shape, layer.share) for layer in found.layers} == {
            ("first", "Conv", (8, 3, 3, 3), 8 * 27 / total),
            ("twice", "Conv", (8, 8, 1, 1), 64 / total),
            ("head", "MatMul", (8, CLASSES), 8 * CLASSES / total),
        }
        at_half = [layer.curves["unstructured"][1].sqnr_db for layer in found.layers]
        assert (found.ranked_at, at_half) == (0.5, sorted(at_half))

    def test_whose_uses_disagree_have_no_rows(self) -> None:
        model = model_of(
            """g (float[2, 4] x) => (float[2, 4] y) { a = MatMul(x, w) t = Transpose(w) y = MatMul(a, t) }""", w=normal(4, 4)
        )
        found = measured(model, {"x": normal(8, 4)})
        assert [list(layer.curves) for layer in found.layers] == [["unstructured"]]
        assert [curve.pattern for curve in found.curves] == ["unstructured", "rows"]
        assert all(point.zeros == 0 for point in found.curves[1].points)

    def test_are_told_apart_by_squares_where_outputs_tell_nothing(self) -> None:
        model = model_of("g (float[1, 4] x) => (int64[1, 1] y) { a = MatMul(x, w) y = ArgMax<axis = 1>(a) }", w=normal(4, 6))
        found = measured(model, {"x": normal(8, 4)})
        assert "no output tells layers apart" in found.notes[0]
        kept = numpy_helper.to_array(without(model, 0.5, "unstructured", ["w"]).graph.initializer[0])
        share = 1 - np.square(kept).sum() / np.square(normal(4, 6)).sum()
        assert found.layers[0].curves["unstructured"][1].drift == pytest.approx(np.sqrt(share), rel=1e-5)


class TestWholeModel:
    @pytest.mark.parametrize("index", [0, 1])
    def test_is_what_onnx_runtime_says_of_zeros_in_all_layers(self, index: int) -> None:
        model, x = cnn(), pictures(12)
        labels = np.arange(12) % CLASSES
        found, expected = measured(model, {"x": x, "labels": labels}), outputs(model, x)
        curve = found.curves[index]
        assert (curve.pattern, curve.repaired, found.samples) == (("unstructured", "rows")[index], False, 12)
        assert found.top1 == np.mean(expected.argmax(1) == labels)
        assert [point.sparsity for point in curve.points] == list(MODEL_SPARSITIES)
        for point in curve.points:
            sparse = without(model, point.sparsity, curve.pattern, ["first", "twice", "head"])
            weights = [numpy_helper.to_array(t) for t in sparse.graph.initializer if t.name != "bias"]
            assert point.zeros == pytest.approx(sum((w == 0).sum() for w in weights) / sum(w.size for w in weights))
            got = outputs(sparse, x)
            assert point.sqnr_db == pytest.approx(decibels(expected, got), abs=1e-3)
            assert point.agreement == np.mean(expected.argmax(1) == got.argmax(1))
            assert point.top1 == np.mean(got.argmax(1) == labels)
            assert point.failure is None

    def test_has_no_shares_where_nothing_is_decided_or_labelled(self) -> None:
        model = model_of("g (float[7] x) => (float[3] y) { y = MatMul(x, w) }", w=normal(7, 3))
        found = measured(model, [{"x": normal(7, seed=seed)} for seed in range(3)])
        assert found.top1 is None
        assert {(point.agreement, point.top1) for curve in found.curves for point in curve.points} == {(None, None)}

    def test_that_breaks_says_so(self) -> None:
        model = model_of(
            "g (float[1, 4] x) => (float[1, 4] y) { a = MatMul(x, w) b = Abs(a) s = ReduceMin<axes = [1]>(b) y = Div(b, s) }",
            w=normal(4, 4),
        )
        points = measured(model, {"x": normal(6, 4)}).curves[1].points
        assert points[-1].failure is not None
        assert "NaN" in points[-1].failure
        assert (points[-1].sqnr_db, points[-1].agreement) == (-SQNR_LIMIT_DB, None)

    def test_is_better_made_up_for_on_inputs_that_judged_the_plain_one(self) -> None:
        found = measured(cnn(), {"x": pictures(40)}, repair=True)
        assert [(curve.pattern, curve.repaired) for curve in found.curves] == [
            *(("unstructured", False), ("unstructured", True)),
            *(("rows", False), ("rows", True)),
        ]
        assert found.samples == 10  # a quarter
        for plain, repaired in (found.curves[:2], found.curves[2:]):
            gains = [b.sqnr_db - a.sqnr_db for a, b in zip(plain.points, repaired.points, strict=True)]
            assert np.mean(gains) > 1
            assert [point.zeros for point in repaired.points] == [point.zeros for point in plain.points]

    def test_is_judged_on_a_part_of_many_inputs(self) -> None:
        model = model_of("g (float[1, 4] x) => (float[1, 3] y) { y = MatMul(x, w) }", w=normal(4, 3))
        found = measured(model, {"x": normal(300, 4)})
        assert found.samples == 100


class TestPython:
    def test_takes_other_patterns_and_sparsities(self) -> None:
        samples = Samples(lambda index: {"x": pictures(4)[index : index + 1]}, range(4), "pictures")
        found = degradation(
            load(cnn()), samples, Context(), patterns=["2x4"], layer_sparsities=[0.25], model_sparsities=[0.5, 1.0]
        )
        assert {tuple(layer.curves) for layer in found.layers} == {("2x4",)}
        assert [[point.sparsity for point in curve.points] for curve in found.curves] == [[0.5, 1.0]]
        assert (found.curves[0].points[1].zeros, found.inputs) == (1.0, "pictures")

    def test_is_plain_json_without_infinity(self) -> None:
        found = inspect(cnn(), sensitivity=True, calibration={"x": pictures(6)}).to_dict()
        plain = json.loads(json.dumps(found, allow_nan=False))["sensitivity"]
        assert plain.keys() == {"inputs", "samples", "ranked_at", "layers", "curves", "top1", "notes"}
        assert plain["layers"][0].keys() == {"site", "op", "shape", "share", "curves"}
        assert plain["layers"][0]["curves"]["rows"][0].keys() == {"sparsity", "drift", "sqnr_db"}
        assert plain["curves"][0].keys() == {"pattern", "repaired", "points"}
        point = {"sparsity", "zeros", "drift", "sqnr_db", "agreement", "top1", "failure"}
        assert plain["curves"][0]["points"][0].keys() == point
        assert inspect(cnn()).to_dict()["sensitivity"] is None

    def test_same_inputs_same_answer(self) -> None:
        first, second = (measured(cnn(), {"x": pictures(8)}, repair=True) for _ in range(2))
        assert first == second
        assert measured(cnn(), None) == measured(cnn(), None) != measured(cnn(), None, seed=1)

    def test_without_inputs_says_that_they_are_synthetic(self) -> None:
        found = measured(cnn(), None)
        assert found.notes[0].startswith("inputs are synthetic")

    def test_tells_how_far_it_is(self) -> None:
        seen: list[tuple[str, int, int]] = []
        inspect(cnn(), sensitivity=True, progress=lambda *step: seen.append(step))
        assert ("probing layers, rows", 3, 3) in seen
        assert ("zeroing the whole model, unstructured", 8, 9) in seen

    def test_leaves_coded_weights_alone(self) -> None:
        model = model_of("g (float[1, 64] x) => (float[1, 64] y) { y = MatMul(x, w) }", w=normal(64, 64))
        coded = compress(model, ShareWeights(bits=4)).to_model()
        found = measured(coded, {"x": normal(4, 64)})
        assert (found.layers, found.curves) == ([], [])
        assert found.notes == [
            "1 weight stored as codes left alone: expand the model to probe what is in them",
            "no layer has weights that could be zeroed",
        ]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"calibration": {"x": pictures(2)}}, "calibration and repair must be left out without sensitivity"),
            ({"repair": True}, "calibration and repair must be left out without sensitivity"),
            ({"sensitivity": True, "repair": True}, "inputs for repair must be two or more, got none"),
            ({"sensitivity": True, "repair": True, "calibration": {"x": pictures(1)}}, "must be two or more, got one"),
        ],
    )
    def test_refuses_what_has_no_meaning(self, options: Mapping[str, Any], message: str) -> None:
        with pytest.raises(OptionError, match=message):
            inspect(cnn(), **options)

    def test_refuses_inputs_that_do_not_fit(self) -> None:
        with pytest.raises(InputsError, match="x"):
            inspect(cnn(), sensitivity=True, calibration={"x": normal(2, 3)})


def test_unknown_sizes_and_scopes_do_no_harm() -> None:
    branch = helper.make_graph(
        [helper.make_node("MatMul", ["x", "inner"], ["z"])], "b", [], [oracle.tensor("z", None)], [oracle.value("inner", normal(4, 3))]
    )
    nodes = [helper.make_node("If", ["flag"], ["y"], then_branch=branch, else_branch=branch)]
    model = oracle.make_model(
        nodes, [oracle.tensor("x", ["n", 4]), oracle.tensor("flag", [], onnx.TensorProto.BOOL)], [oracle.tensor("y", ["n", 3])]
    )
    found = measured(model, [{"x": normal(2, 4, seed=seed), "flag": np.array(seed % 2 == 0)} for seed in range(4)])
    assert len(found.layers) == 2
    assert all(point.sqnr_db < 100 for layer in found.layers for point in layer.curves["unstructured"])
