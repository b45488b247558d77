"""Tensors come out as numpy_helper reads them, whatever their type and layout, and external data is mapped and checked."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxshrink.errors import ModelReadError
from onnxshrink.graph.edit import set_values
from onnxshrink.graph.exporter import to_model
from onnxshrink.graph.files import load, model_bytes, save
from onnxshrink.graph.ir import Graph
from onnxshrink.graph.storage import Stored, is_float, raw_nbytes
from tests.oracle import differences, make_model, run, same_bits, session, tensor, value

ELEMENT_TYPES = sorted(set(TensorProto.DataType.keys()) - {"UNDEFINED"})
SHAPES = [(3, 5), (), (0, 3), (7,)]


def array_of(element_type: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Returns values that any element type can hold."""
    if element_type == "STRING":
        return np.full(shape, "tëxt", object)
    dtype = helper.tensor_dtype_to_np_dtype(getattr(TensorProto, element_type))
    return np.random.default_rng(0).integers(0, 2, shape).astype(dtype)


def model_of(*tensors: TensorProto) -> onnx.ModelProto:
    """Returns a model whose outputs are the tensors."""
    nodes = [helper.make_node("Identity", [item.name], [f"{item.name}_out"]) for item in tensors]
    outputs = [tensor(f"{item.name}_out", list(item.dims), item.data_type) for item in tensors]
    return make_model(nodes, [], outputs, tensors, opset=21, ir_version=10)


class TestElementTypes:
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("element_type", ELEMENT_TYPES)
    def test_values_are_those_of_numpy_helper(self, element_type: str, shape: tuple[int, ...]) -> None:
        array = array_of(element_type, shape)
        stored = numpy_helper.from_array(array, "w")
        constant = load(model_of(stored)).constants[0]
        assert same_bits(constant.values, numpy_helper.to_array(stored))
        assert (constant.shape, constant.dtype, constant.size) == (shape, array.dtype, array.size)
        assert constant.nbytes == len(stored.raw_data)
        assert not constant.values.flags.writeable

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("element_type", ELEMENT_TYPES)
    def test_tensors_survive_untouched_and_replaced(self, element_type: str, shape: tuple[int, ...]) -> None:
        model = model_of(numpy_helper.from_array(array_of(element_type, shape), "w"))
        graph = load(model)
        assert differences(model, to_model(graph)) == []
        set_values(graph.constants[0], graph.constants[0].values.copy())
        assert differences(model, to_model(graph)) == []

    def test_typed_fields_stay_typed(self) -> None:
        typed = {
            TensorProto.FLOAT: ("float_data", [1.5, 2.0]),
            TensorProto.FLOAT16: ("int32_data", [15360, 16384]),
            TensorProto.INT8: ("int32_data", [-1, 2]),
            TensorProto.INT64: ("int64_data", [1, 2**40]),
            TensorProto.DOUBLE: ("double_data", [0.1, 0.2]),
            TensorProto.UINT64: ("uint64_data", [1, 2**63]),
        }
        tensors = [
            TensorProto(name=f"w{element}", data_type=element, dims=[2], **{field: content})
            for element, (field, content) in typed.items()
        ]
        model = model_of(*tensors)
        graph = load(model)
        for constant, original in zip(graph.constants, tensors, strict=True):
            assert same_bits(constant.values, numpy_helper.to_array(original))
        assert to_model(graph).SerializeToString() == model.SerializeToString()

    @pytest.mark.parametrize(
        ("break_it", "name"),
        [
            (lambda item: item.dims.append(7), "too few bytes"),
            (lambda item: setattr(item, "raw_data", b"123"), "half an element"),
            (lambda item: item.dims.extend([2**40, 2**40]), "astronomic"),
        ],
        ids=lambda case: case if isinstance(case, str) else "",
    )
    def test_data_that_does_not_fit_is_named(self, break_it: Callable[[TensorProto], None], name: str) -> None:
        broken = value("weight", [1, 2], "float32")
        break_it(broken)
        constant = load(model_of(broken)).constants[0]
        with pytest.raises(ModelReadError, match="tensor 'weight': its data must be float32"):
            constant.values  # noqa: B018  # reading is what fails

    def test_negative_dimensions_are_refused(self) -> None:
        broken = value("weight", [1, 2], "float32")
        broken.dims[0] = -2
        with pytest.raises(ModelReadError, match=r"tensor 'weight': dimensions must be at least 0, got \[-2\]"):
            load(model_of(broken))

    def test_strings_that_are_no_text_are_carried_but_not_read(self) -> None:
        model = model_of(TensorProto(name="s", data_type=TensorProto.STRING, dims=[1], string_data=[b"\xff"]))
        graph = load(model)
        assert differences(model, to_model(graph)) == []
        with pytest.raises(ModelReadError, match="tensor 's'"):
            graph.constants[0].values  # noqa: B018

    @pytest.mark.parametrize("indices", [[9], [[0, 9]]], ids=["linear", "coordinates"])
    def test_sparse_indices_out_of_bounds_are_named(self, indices: list[Any]) -> None:
        sparse = helper.make_sparse_tensor(value("sp", [1], "float32"), value("", indices, "int64"), [2, 3])
        with pytest.raises(ModelReadError, match="tensor 'sp'"):
            Stored(sparse).load()

    def test_sparse_indices_of_an_unknown_type_are_named(self) -> None:
        sparse = helper.make_sparse_tensor(value("sp", [1], "float32"), value("", [0], "int64"), [2, 3])
        sparse.indices.data_type = 71
        with pytest.raises(ModelReadError, match="tensor 'sp'"):
            Stored(sparse).load()

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("float16", True),
            ("bfloat16", True),
            ("float32", True),
            ("float64", True),
            ("float8_e4m3fn", False),
            ("int8", False),
        ],
    )
    def test_floats_are_types_of_16_bits_and_more(self, name: str, expected: bool) -> None:
        dtype = next(dtype for dtype in map(helper.tensor_dtype_to_np_dtype, range(1, 24)) if dtype.name == name)
        assert is_float(dtype) is expected

    def test_packed_sizes_round_up(self) -> None:
        int4 = helper.tensor_dtype_to_np_dtype(TensorProto.INT4)
        assert [raw_nbytes(size, int4) for size in range(5)] == [0, 1, 1, 2, 2]


def save_external(folder: Path, *tensors: TensorProto, location: str = "weights.bin") -> Path:
    """Writes the model of some tensors with all their data in a second file, by the onnx package; returns its path."""
    path = folder / "model.onnx"
    model = model_of(*tensors)
    onnx.save(model, path, save_as_external_data=True, location=location, size_threshold=0)
    assert (folder / location).exists()
    return path


def point_to(path: Path, **entries: str | None) -> None:
    """Changes where the first tensor of a model file says that its data is; None removes an entry."""
    model = onnx.load(path, load_external_data=False)
    kept = {entry.key: entry.value for entry in model.graph.initializer[0].external_data} | entries
    del model.graph.initializer[0].external_data[:]
    for key, content in kept.items():
        if content is not None:
            model.graph.initializer[0].external_data.add(key=key, value=content)
    path.write_bytes(model.SerializeToString())


class TestExternalData:
    W = np.arange(4000, dtype=np.float32).reshape(40, 100)

    def test_it_is_mapped_and_never_kept(self, tmp_path: Path) -> None:
        constant = load(save_external(tmp_path, value("w", self.W))).constants[0]
        values = constant.values
        base = values
        while base is not None and not isinstance(base, np.memmap):
            base = base.base
        assert isinstance(base, np.memmap)
        assert constant.stored is not None
        assert same_bits(values, self.W)
        with pytest.raises(ValueError, match="read-only"):
            values[0, 0] = 1

    @pytest.mark.parametrize("shape", [(3, 5), ()], ids=str)
    @pytest.mark.parametrize("element_type", sorted(set(ELEMENT_TYPES) - {"STRING"}))
    def test_every_element_type_can_be_external(
        self, tmp_path: Path, element_type: str, shape: tuple[int, ...]
    ) -> None:
        array = array_of(element_type, shape)
        first = value("first", np.ones(3, np.int8))  # so that the second one is not aligned
        path = save_external(tmp_path, first, numpy_helper.from_array(array, "w"))
        graph = load(path)
        assert same_bits(graph.constants[1].values, array)
        original = onnx.load(path)
        exported = to_model(graph)
        assert [item.raw_data for item in exported.graph.initializer] == [
            item.raw_data for item in original.graph.initializer
        ]

    def test_the_model_alone_is_refused_and_told_what_to_do(self, tmp_path: Path) -> None:
        message = onnx.load(save_external(tmp_path, value("w", self.W)), load_external_data=False)
        for source in (message, message.SerializeToString()):
            with pytest.raises(
                ModelReadError, match=r"'weights.bin' needs the model's folder; give the path of the model"
            ):
                load(source)

    def test_offset_and_length_may_be_left_out(self, tmp_path: Path) -> None:
        path = save_external(tmp_path, value("w", self.W))
        point_to(path, offset=None, length=None, checksum="0123")
        assert same_bits(load(path).constants[0].values, self.W)

    @pytest.mark.parametrize(
        "location",
        ["../weights.bin", "/etc/hostname", "a/../../weights.bin", "", ".", "w\0.bin", "link.bin", "folder/link.bin"],
    )
    def test_a_place_outside_the_models_folder_is_refused(self, tmp_path: Path, location: str) -> None:
        folder = tmp_path / "inside"
        (folder / "folder").mkdir(parents=True)
        (folder / "a").mkdir()
        (tmp_path / "weights.bin").write_bytes(bytes(16000))
        (folder / "link.bin").symlink_to(tmp_path / "weights.bin")
        (folder / "folder" / "link.bin").symlink_to(folder / "link.bin")
        path = save_external(folder, value("w", self.W))
        point_to(path, location=location)
        with pytest.raises(ModelReadError) as caught:
            load(path)
        _assert_one_line(caught.value, path)
        assert "tensor 'w'" in str(caught.value)

    def test_a_link_that_stays_inside_is_followed(self, tmp_path: Path) -> None:
        path = save_external(tmp_path, value("w", self.W))
        (tmp_path / "link.bin").symlink_to(tmp_path / "weights.bin")
        point_to(path, location="link.bin")
        assert same_bits(load(path).constants[0].values, self.W)

    @pytest.mark.parametrize(
        ("entries", "complaint"),
        [
            ({"location": "missing.bin"}, "'missing.bin' cannot be read: No such file or directory"),
            ({"location": "x" * 300}, "cannot be read: File name too long"),
            ({"location": "folder"}, "must be 16000 bytes, .* of 0 bytes"),
            ({"location": "pipe"}, "must be 16000 bytes, .* of 0 bytes"),
            ({"offset": "1"}, "offset 1 and length 16000 in 'weights.bin' of 16000 bytes; the file is truncated"),
            ({"offset": "-1"}, "offset -1"),
            ({"offset": "99999999999999999999999"}, "offset 99999999999999999999999"),
            ({"length": "15999"}, "must be 16000 bytes, got offset 0 and length 15999"),
            ({"length": "-16000"}, "length -16000"),
            ({"length": "many"}, "offset and length must be integers"),
        ],
    )
    def test_a_file_that_does_not_fit_is_refused(self, tmp_path: Path, entries: dict[str, str], complaint: str) -> None:
        path = save_external(tmp_path, value("w", self.W))
        (tmp_path / "folder").mkdir()
        os.mkfifo(tmp_path / "pipe")
        point_to(path, **entries)
        with pytest.raises(ModelReadError, match=complaint) as caught:
            load(path)
        _assert_one_line(caught.value, path)

    def test_negative_dimensions_are_refused(self, tmp_path: Path) -> None:
        path = save_external(tmp_path, value("w", self.W))
        model = onnx.load(path, load_external_data=False)
        model.graph.initializer[0].dims[0] = -40
        path.write_bytes(model.SerializeToString())
        point_to(path, length="-16000")
        with pytest.raises(ModelReadError, match="tensor 'w'"):
            load(path)

    def test_a_file_that_goes_away_later_is_named(self, tmp_path: Path) -> None:
        path = save_external(tmp_path, value("w", self.W))
        graph = load(path)
        (tmp_path / "weights.bin").unlink()
        with pytest.raises(ModelReadError, match="tensor 'w'"):
            graph.constants[0].values  # noqa: B018
        with pytest.raises(ModelReadError, match="weights.bin: cannot be read: No such file"):
            save(graph, tmp_path / "out.onnx")
        assert sorted(item.name for item in tmp_path.iterdir()) == ["model.onnx"]

    def test_a_file_that_is_cut_later_does_not_hang(self, tmp_path: Path) -> None:
        path = save_external(tmp_path, value("w", self.W))
        graph = load(path)
        os.truncate(tmp_path / "weights.bin", 1000)
        with pytest.raises(ModelReadError, match="15000 bytes are missing"):
            save(graph, tmp_path / "out.onnx")
        assert sorted(item.name for item in tmp_path.iterdir()) == ["model.onnx", "weights.bin"]

    def test_data_of_constant_nodes_and_bodies_is_found(self, tmp_path: Path) -> None:
        graph = load(_save_hidden(tmp_path))
        values = {scope.address(item.name): item for scope in graph.scopes() for item in scope.graph.constants}
        assert sorted(values) == ["k", "w", "y.then_branch/v"]
        for constant in values.values():
            assert constant.stored is not None
            assert constant.stored.external is not None
            assert same_bits(constant.values, self.W)

    def test_hidden_data_still_runs_after_saving(self, tmp_path: Path) -> None:
        path = _save_hidden(tmp_path)
        save(load(path), tmp_path / "out.onnx")
        feeds = {"x": np.ones((40, 100), np.float32), "c": np.array(True)}
        for flag in (True, False):
            feeds["c"] = np.array(flag)
            expected = [1 + (3 if flag else 2) * self.W]
            assert same_bits(run(session(path), feeds), expected)
            assert same_bits(run(session(tmp_path / "out.onnx"), feeds), expected)


def test_the_size_of_a_model_is_known_without_building_it() -> None:
    sparse = helper.make_sparse_tensor(value("sp", [1], "float32"), value("", [3], "int64"), [1000])
    model = model_of(value("w", np.zeros((30, 30), np.float32)), value("s", np.full(3, "text", object)))
    model.graph.sparse_initializer.append(sparse)
    model.graph.node.append(helper.make_node("Constant", [], ["k"], value=value("k", np.zeros(500, np.float32))))
    graph = load(model)
    _assert_size_is_known(graph)
    set_values(graph.constants[0], np.ones((30, 30), np.float32))
    _assert_size_is_known(graph)


def _assert_size_is_known(graph: Graph) -> None:
    assert abs(model_bytes(graph) - to_model(graph).ByteSize()) <= 2 * len(graph.constants)


def _assert_one_line(error: ModelReadError, path: Path) -> None:
    assert str(error).startswith(f"{path}: ")
    assert "\n" not in str(error)


def _save_hidden(folder: Path) -> Path:
    """Writes a model with external data in an initializer, a Constant node and a branch."""
    w = TestExternalData.W
    then_branch = helper.make_graph(
        [helper.make_node("Add", ["h", "v"], ["a"])], "t", [], [tensor("a", w.shape)], [value("v", w)]
    )
    else_branch = helper.make_graph([helper.make_node("Identity", ["h"], ["b"])], "e", [], [tensor("b", w.shape)])
    nodes = [
        helper.make_node("Constant", [], ["k"], value=value("k", w)),
        helper.make_node("Add", ["x", "k"], ["g"]),
        helper.make_node("Add", ["g", "w"], ["h"]),
        helper.make_node("If", ["c"], ["y"], then_branch=then_branch, else_branch=else_branch),
    ]
    inputs = [tensor("x", w.shape), tensor("c", [], TensorProto.BOOL)]
    model = make_model(nodes, inputs, [tensor("y", w.shape)], [value("w", w)])
    path = folder / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0, convert_attribute=True)
    assert model.graph.node[0].attribute[0].t.data_location == TensorProto.EXTERNAL
    return path
