"""Tests of the ONNX Runtime session: types in and out, names of what is no tensor, errors of one line, nothing printed."""

from __future__ import annotations

import gc
import os
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, parser

from onnxshrink.errors import ModelReadError, ShrinkError, UnsupportedModelError, ValidationError
from onnxshrink.graph.files import load
from onnxshrink.runtime import InputSpec, is_floating, is_integer, session

SMALL = '<ir_version: 8, opset_import: ["": 17]> g (float[N, 4] x) => (float[N, 4] y, float[N, 4] z) { y = Neg(x) z = Abs(x) }'
X = np.array([[1, -2, 3, -4]], np.float32)


def model_of(nodes: list[Any], inputs: list[Any], outputs: list[Any], **more: Any) -> onnx.ModelProto:
    """Returns a checked-by-nobody model of ai.onnx 21 and ai.onnx.ml 3."""
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("ai.onnx.ml", 3)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, **more)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def tensor(name: str, element: int, shape: list[Any] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, element, shape)


def with_external_data(folder: Path) -> Path:
    """Returns the path of y = x + w, with w [1024] in a second file."""
    weight = np.arange(1024, dtype=np.float32)
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[1024] x) => (float[1024] y) { y = Add(x, w) }'
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(model, folder / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    return folder / "m.onnx"


class TestSources:
    def test_path_bytes_message_and_graph_give_the_same_outputs(self, tmp_path: Path) -> None:
        model = parser.parse_model(SMALL)
        onnx.save(model, tmp_path / "m.onnx")
        sources = [tmp_path / "m.onnx", str(tmp_path / "m.onnx"), model.SerializeToString(), model, load(model)]
        for source in sources:
            with session(source) as running:
                outputs = running.run({"x": X})
            assert list(outputs) == ["y", "z"]
            np.testing.assert_array_equal(outputs["y"], -X)
            np.testing.assert_array_equal(outputs["z"], np.abs(X))

    def test_only_the_named_outputs_are_returned(self) -> None:
        assert list(session(parser.parse_model(SMALL)).run({"x": X}, ["z"])) == ["z"]

    @pytest.mark.parametrize("drop", ["close", "collect"])
    def test_graph_with_external_data_leaves_no_temporary_files(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drop: str
    ) -> None:
        path = with_external_data(tmp_path)
        (scratch := tmp_path / "scratch").mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(scratch))
        running = session(load(path))
        x = np.ones(1024, np.float32)
        np.testing.assert_array_equal(running.run({"x": x})["y"], np.arange(1024) + 1)
        assert os.listdir(scratch)
        if drop == "close":
            running.close()
        del running
        gc.collect()
        assert not os.listdir(scratch)

    def test_graph_that_does_not_load_leaves_no_temporary_files(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        graph = load(with_external_data(tmp_path))
        graph.nodes[0].op = "NoSuchOp"
        (scratch := tmp_path / "scratch").mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(scratch))
        with pytest.raises(ValidationError):
            session(graph)
        gc.collect()
        assert not os.listdir(scratch)

    def test_path_with_external_data_is_loaded_in_place(self, tmp_path: Path) -> None:
        outputs = session(with_external_data(tmp_path)).run({"x": np.zeros(1024, np.float32)})
        np.testing.assert_array_equal(outputs["y"], np.arange(1024))

    def test_message_whose_external_data_is_elsewhere_is_an_error(self, tmp_path: Path) -> None:
        model = onnx.load(with_external_data(tmp_path), load_external_data=False)
        with pytest.raises(ModelReadError, match=r"'w'.*needs the model's folder"):
            session(model)

    def test_missing_file(self) -> None:
        with pytest.raises(ModelReadError, match=r"^no/such\.onnx: cannot be read: there is no such file$"):
            session("no/such.onnx")

    def test_threads_reach_onnx_runtime(self) -> None:
        running = session(parser.parse_model(SMALL), threads=1)
        assert running._ort.get_session_options().intra_op_num_threads == 1
        assert running.start_ms > 0


class TestInputSpecs:
    def test_dtype_shape_and_symbols(self) -> None:
        text = (
            '<ir_version: 8, opset_import: ["": 17]> g (float16[N, 3] a, uint8[] b) => (float16[N, 3] c) { c = Neg(a) }'
        )
        assert session(parser.parse_model(text)).inputs == (
            InputSpec("a", np.dtype(np.float16), ("N", 3)),
            InputSpec("b", np.dtype(np.uint8), ()),
        )

    @pytest.mark.parametrize("dim", ["?", "None", "-1", None, -1])
    def test_the_ways_to_write_unknown_are_one(self, dim: str | int | None) -> None:
        model = model_of(
            [helper.make_node("Neg", ["x"], ["y"])],
            [tensor("x", TensorProto.FLOAT, [dim, 3])],
            [tensor("y", TensorProto.FLOAT, None)],
        )
        assert session(model).inputs[0].shape == (None, 3)

    def test_initializer_listed_as_input_is_optional_and_last(self) -> None:
        model = parser.parse_model(
            '<ir_version: 4, opset_import: ["": 9]> g (float[2] w, float[2] x) => (float[2] y) { y = Add(x, w) }'
        )
        model.graph.initializer.append(helper.make_tensor("w", TensorProto.FLOAT, [2], [1, 2]))
        running = session(model)
        assert [(spec.name, spec.optional) for spec in running.inputs] == [("x", False), ("w", True)]
        zeros, tens = np.zeros(2, np.float32), np.full(2, 10, np.float32)
        np.testing.assert_array_equal(running.run({"x": zeros})["y"], [1, 2])
        np.testing.assert_array_equal(running.run({"x": zeros, "w": tens})["y"], tens)
        model.ir_version = 3  # initializers had to be listed then, and ONNX Runtime takes them for constants
        assert [spec.name for spec in session(model).inputs] == ["x"]

    def test_input_of_optional_type_may_be_left_out(self) -> None:
        kind = helper.make_optional_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, [2]))
        model = model_of(
            [helper.make_node("OptionalHasElement", ["x"], ["y"])],
            [helper.make_value_info("x", kind)],
            [tensor("y", TensorProto.BOOL, [])],
        )
        running = session(model)
        assert running.inputs == (InputSpec("x", np.dtype(np.float32), (2,), optional=True),)
        assert not running.run({})["y"]
        assert running.run({"x": np.ones(2, np.float32)})["y"]

    def test_input_that_is_no_tensor_is_refused(self) -> None:
        kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, None))
        nodes = [helper.make_node("SequenceLength", ["x"], ["y"])]
        model = model_of(nodes, [helper.make_value_info("x", kind)], [tensor("y", TensorProto.INT64, [])])
        with pytest.raises(UnsupportedModelError, match=r"^original model: input 'x' must be a tensor, got seq\("):
            session(model, role="original")


class TestOutputsThatAreNoTensors:
    def test_sequence_is_numbered(self) -> None:
        kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, None))
        model = model_of(
            [helper.make_node("SequenceConstruct", ["x", "x2"], ["s"]), helper.make_node("Neg", ["x"], ["x2"])][::-1],
            [tensor("x", TensorProto.FLOAT, [2])],
            [helper.make_value_info("s", kind)],
        )
        x = np.array([1, 2], np.float32)
        outputs = session(model).run({"x": x})
        assert list(outputs) == ["s[0]", "s[1]"]
        np.testing.assert_array_equal(outputs["s[1]"], -x)

    @pytest.mark.parametrize("keys", [{"classlabels_strings": ["no", "yes"]}, {"classlabels_int64s": [7, 9]}])
    def test_sequence_of_maps_is_a_table_and_its_keys(self, keys: dict[str, Any]) -> None:
        element = TensorProto.STRING if "classlabels_strings" in keys else TensorProto.INT64
        kind = helper.make_map_type_proto(element, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
        model = model_of(
            [helper.make_node("ZipMap", ["x"], ["p"], domain="ai.onnx.ml", **keys)],
            [tensor("x", TensorProto.FLOAT, ["N", 2])],
            [helper.make_value_info("p", helper.make_sequence_type_proto(kind))],
        )
        x = np.array([[0.25, 0.75], [0.5, 0.5], [1, 0]], np.float32)
        outputs = session(model).run({"x": x})
        assert outputs["p"].dtype == np.float32
        np.testing.assert_array_equal(outputs["p"], x)
        assert outputs["p.keys"].tolist() == next(iter(keys.values()))

    def test_absent_optional_is_left_out(self) -> None:
        inner = helper.make_tensor_type_proto(TensorProto.FLOAT, [2])
        outer = helper.make_optional_type_proto(inner)
        model = model_of(
            [helper.make_node("Optional", ["x"], ["full"]), helper.make_node("Optional", [], ["empty"], type=inner)],
            [tensor("x", TensorProto.FLOAT, [2])],
            [helper.make_value_info("full", outer), helper.make_value_info("empty", outer)],
        )
        assert list(session(model).run({"x": np.ones(2, np.float32)})) == ["full"]

    def test_two_outputs_of_one_derived_name_are_an_error(self) -> None:
        kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, None))
        model = model_of(
            [helper.make_node("SequenceConstruct", ["x"], ["s"]), helper.make_node("Neg", ["x"], ["s[0]"])],
            [tensor("x", TensorProto.FLOAT, [2])],
            [helper.make_value_info("s", kind), tensor("s[0]", TensorProto.FLOAT, [2])],
        )
        with pytest.raises(ValidationError, match=r"two of its outputs would be called 's\[0\]'"):
            session(model).run({"x": np.ones(2, np.float32)})


class TestRareElementTypes:
    @pytest.mark.parametrize("shape", [(2, 3), (5,), (), (0, 3)])
    @pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
    def test_in_and_out(self, name: str, shape: tuple[int, ...]) -> None:
        dtype = np.dtype(getattr(ml_dtypes, name))
        element = helper.np_dtype_to_tensor_dtype(dtype)
        dims = [None] * len(shape)
        nodes = [helper.make_node("Identity", ["x"], ["y"]), helper.make_node("Cast", ["x"], ["f"], to=1)]
        outputs = [tensor("y", element, dims), tensor("f", TensorProto.FLOAT, dims)]
        running = session(model_of(nodes, [tensor("x", element, dims)], outputs))
        assert running.inputs[0].dtype == dtype
        x = np.random.default_rng(0).standard_normal(shape).astype(dtype)
        results = running.run({"x": x})
        assert results["y"].dtype == dtype
        np.testing.assert_array_equal(results["y"].astype(np.float32), x.astype(np.float32))
        np.testing.assert_array_equal(running.run({"x": x}, ["f"])["f"], x.astype(np.float32))

    def test_packed_4_bit_integers(self) -> None:
        scale = [
            helper.make_tensor("s", TensorProto.FLOAT, [], [1.0]),
            helper.make_tensor("z", TensorProto.INT4, [], [0]),
        ]
        nodes = [
            helper.make_node("DequantizeLinear", ["x", "s"], ["f"]),
            helper.make_node("Neg", ["f"], ["n"]),
            helper.make_node("QuantizeLinear", ["n", "s", "z"], ["y"]),
        ]
        int4, dims = TensorProto.INT4, ["N"]
        running = session(model_of(nodes, [tensor("x", int4, dims)], [tensor("y", int4, dims)], initializer=scale))
        x = np.array([1, -2, 3, -7, 5]).astype(ml_dtypes.int4)
        np.testing.assert_array_equal(running.run({"x": x})["y"].astype(np.int8), -x.astype(np.int8))

    def test_strings(self) -> None:
        nodes = [helper.make_node("Identity", ["x"], ["y"])]
        text = TensorProto.STRING
        running = session(model_of(nodes, [tensor("x", text, ["N"])], [tensor("y", text, ["N"])]))
        assert running.inputs[0].dtype == object
        y = running.run({"x": np.array(["a", "b\u00e9"], object)})["y"]
        assert y.dtype == object
        assert y.tolist() == ["a", "b\u00e9"]

    def test_big_endian_arrays_are_refused(self) -> None:
        with pytest.raises(ValidationError, match=r"input 'x' must be in native byte order, got >f4"):
            session(parser.parse_model(SMALL)).run({"x": X.astype(">f4")})

    def test_kinds_of_numbers(self) -> None:
        floats = [np.dtype(name) for name in ("f2", "f4", "f8", ml_dtypes.bfloat16, ml_dtypes.float8_e5m2)]
        integers = [np.dtype(name) for name in ("u1", "i8", ml_dtypes.int4, ml_dtypes.uint2)]
        assert [is_floating(dtype) for dtype in [*floats, *integers]] == [True] * 5 + [False] * 4
        assert [is_integer(dtype) for dtype in [*floats, *integers]] == [False] * 5 + [True] * 4
        assert not is_integer(np.dtype(bool))
        assert not is_floating(np.dtype(object))


def _no_such_op() -> onnx.ModelProto:
    model = parser.parse_model(SMALL)
    model.graph.node[0].op_type = "NoSuchOp"
    return model


def _no_such_output() -> onnx.ModelProto:
    model = parser.parse_model(SMALL)
    model.graph.output.append(onnx.ValueInfoProto(name="nope"))
    return model


class TestErrors:
    @pytest.mark.parametrize(
        ("model", "reason"),
        [
            (b"junk", "Failed to load model because protobuf parsing failed."),
            (_no_such_op(), "This is an invalid model. In Node"),
            (_no_such_output(), "This is an invalid model. Graph output (nope) does not exist in the graph."),
        ],
    )
    @pytest.mark.parametrize(("role", "kind"), [("original", UnsupportedModelError), ("candidate", ValidationError)])
    def test_load_in_one_clear_line_and_silence(
        self,
        model: onnx.ModelProto | bytes,
        reason: str,
        role: Any,
        kind: type[ShrinkError],
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        with pytest.raises(kind) as caught:
            session(model, role=role)
        message = str(caught.value)
        assert message.startswith(f"{role} model: ONNX Runtime cannot load it: {reason}")
        assert "\n" not in message
        assert ".cc" not in message
        assert "ONNXRuntimeError" not in message
        assert caught.value.__suppress_context__
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize(
        ("feeds", "reason"),
        [
            ({"x": np.ones((1, 5), np.float32)}, "Got invalid dimensions for input: x"),
            (
                {"x": np.ones((1, 4))},
                "Unexpected input data type. Actual: (tensor(double)) , expected: (tensor(float))",
            ),
            ({}, "Required inputs (['x']) are missing"),
            ({"x": X, "q": X}, "Invalid input name: q"),
        ],
    )
    def test_run(self, feeds: dict[str, Any], reason: str, capfd: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(ValidationError) as caught:
            session(parser.parse_model(SMALL)).run(feeds)
        assert str(caught.value).startswith(f"candidate model: ONNX Runtime cannot run it: {reason}")
        assert "\n" not in str(caught.value)
        assert capfd.readouterr() == ("", "")

    def test_warnings_are_not_printed(self, capfd: pytest.CaptureFixture[str]) -> None:
        text = '<ir_version: 8, opset_import: ["": 17]> g (float[N] x) => (float[3] y) { y = Relu(x) }'
        assert session(parser.parse_model(text)).run({"x": np.ones(2, np.float32)})["y"].shape == (2,)
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize(
        ("node", "reason"),
        [
            ("MatMul(x, w)", "MatMul node: MatMul dimension mismatch"),
            ("Reshape(x, s)", "Reshape node: input_shape_size == requested_shape_size was false."),
            ("Gather(x, s)", "Gather node: indices element out of data bounds, idx=9"),
        ],
    )
    def test_a_failing_node_is_named_without_places_in_cpp(self, node: str, reason: str) -> None:
        text = f"""<ir_version: 8, opset_import: ["": 17]>
            g (float[a, b] x, float[c, d] w, int64[n] s) => (float[e, f] y) {{ y = {node} }}"""
        feeds = {"x": np.ones((2, 2), np.float32), "w": np.ones((3, 3), np.float32), "s": np.array([9])}
        with pytest.raises(ValidationError) as caught:
            session(parser.parse_model(text)).run(feeds)
        assert str(caught.value).startswith(f"candidate model: ONNX Runtime cannot run it: {reason}")

    def test_the_reason_says_which_opset_is_the_last(self) -> None:
        model = parser.parse_model(SMALL)
        model.opset_import[0].version = 99
        with pytest.raises(ValidationError, match=r"cannot load it: ONNX Runtime only .* is till opset \d+\.$"):
            session(model)

    def test_long_reasons_are_cut_at_a_word(self) -> None:
        model = parser.parse_model(SMALL)
        model.graph.node[0].op_type = "Long" * 300
        with pytest.raises(ValidationError) as caught:
            session(model)
        message = str(caught.value)
        assert message.startswith("candidate model: ONNX Runtime cannot load it: ")
        assert message.endswith(" ...")
        assert len(message) < 560
