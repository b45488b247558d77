"""Tests of reading inputs: every kind of source, the cut into samples, each error message, splitting."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper

from onnxshrink.errors import InputsError
from onnxshrink.inputs import Samples, read_inputs
from onnxshrink.runtime import InputSpec

F32, I64 = np.dtype(np.float32), np.dtype(np.int64)
IMAGE = [InputSpec("x", F32, ("N", 2, 3))]
TOKENS = [InputSpec("ids", I64, ("batch", "seq")), InputSpec("mask", I64, ("batch", "seq"))]


def images(count: int) -> np.ndarray[Any, Any]:
    return np.arange(count * 6, dtype=np.float32).reshape(count, 2, 3)


def error_of(source: Any, specs: list[InputSpec]) -> str:
    with pytest.raises(InputsError) as caught:
        read_inputs(source, specs)
    return str(caught.value)


def assert_feeds(samples: Samples, expected: list[dict[str, Any]]) -> None:
    assert len(samples) == len(expected)
    for feeds, wanted in zip(samples, expected, strict=True):
        assert feeds.keys() == wanted.keys()
        for name, array in wanted.items():
            np.testing.assert_array_equal(feeds[name], array, strict=True)


class TestStackedArrays:
    def test_rows_become_samples(self, tmp_path: Path) -> None:
        x = images(5)
        np.savez(tmp_path / "in.npz", x=x)
        samples = read_inputs(tmp_path / "in.npz", IMAGE)
        assert_feeds(samples, [{"x": x[k : k + 1]} for k in range(5)])
        assert samples.source == str(tmp_path / "in.npz")
        np.testing.assert_array_equal(samples[-1]["x"], x[4:])

    def test_fixed_batch_sizes_are_kept(self) -> None:
        x = images(6)
        samples = read_inputs({"x": x}, [InputSpec("x", F32, (2, 2, 3))])
        assert_feeds(samples, [{"x": x[k : k + 2]} for k in (0, 2, 4)])

    def test_rows_must_fill_the_batches(self) -> None:
        message = error_of({"x": images(5)}, [InputSpec("x", F32, (2, 2, 3))])
        assert message == "inputs: number of rows must be a multiple of 2, the model's batch size, got 5"

    def test_several_inputs_are_cut_together(self) -> None:
        ids = np.arange(12).reshape(3, 4)
        samples = read_inputs({"ids": ids, "mask": ids + 1}, TOKENS)
        assert_feeds(samples, [{"ids": ids[k : k + 1], "mask": ids[k : k + 1] + 1} for k in range(3)])

    def test_one_sample_where_the_length_is_the_models_own(self) -> None:
        assert_feeds(read_inputs({"x": images(2)}, [InputSpec("x", F32, (2, 2, 3))]), [{"x": images(2)}])

    def test_one_sample_where_an_input_has_no_rows(self) -> None:
        specs = [*IMAGE, InputSpec("rate", I64, ())]
        feeds = {"x": images(3), "rate": np.array(16000)}
        assert_feeds(read_inputs(feeds, specs), [feeds])

    def test_one_sample_where_lengths_or_fixed_sizes_differ(self) -> None:
        specs = [InputSpec("x", F32, ("N", 2, 3)), InputSpec("state", F32, (2, 4))]
        feeds = {"x": images(3), "state": np.zeros((2, 4), np.float32)}
        assert_feeds(read_inputs(feeds, specs), [feeds])
        specs = [InputSpec("a", F32, (1, 2)), InputSpec("b", F32, (2, 2))]
        same = {"a": np.zeros((2, 2), np.float32), "b": np.zeros((2, 2), np.float32)}
        assert error_of(same, specs) == "inputs: sample 0: input 'a' must be of shape [1, 2], got [2, 2]"

    def test_no_rows(self) -> None:
        assert error_of({"x": images(0)}, IMAGE) == "inputs: number of samples must be at least 1, got 0"

    @pytest.mark.parametrize("name", ["labels", "label", "y"])
    def test_labels_are_kept_beside_the_feeds(self, name: str) -> None:
        samples = read_inputs({"x": images(3), name: np.array([[7], [8], [9]])}, IMAGE)
        assert samples[1].keys() == {"x"}
        assert [samples.labels(k) for k in range(3)] == [[7], [8], [9]]
        assert read_inputs({"x": images(3)}, IMAGE).labels(0) is None

    def test_labels_of_batches_and_of_one_sample(self) -> None:
        batches = read_inputs({"x": images(4), "y": np.arange(4)}, [InputSpec("x", F32, (2, 2, 3))])
        np.testing.assert_array_equal(batches.labels(1), [2, 3])
        one = read_inputs({"x": images(1), "y": np.array(5)}, IMAGE)
        np.testing.assert_array_equal(one.labels(0), [5])

    def test_labels_must_be_one_a_row(self) -> None:
        message = error_of({"x": images(3), "y": np.arange(2)}, IMAGE)
        assert message == "inputs: number of labels must be 3, one for each row, got 2"

    def test_an_input_called_y_is_no_label(self) -> None:
        samples = read_inputs({"y": images(2)}, [InputSpec("y", F32, ("N", 2, 3))])
        assert samples.labels(0) is None
        assert samples[0].keys() == {"y"}


class TestFoldersAndIterables:
    def test_folder_of_npz_sorted_by_name(self, tmp_path: Path) -> None:
        for number in (2, 0, 1):
            np.savez(tmp_path / f"{number:03}.npz", x=images(3)[number : number + 1], label=number)
        samples = read_inputs(str(tmp_path), IMAGE)
        assert_feeds(samples, [{"x": images(3)[k : k + 1]} for k in range(3)])
        assert [samples.labels(k) for k in range(3)] == [[0], [1], [2]]

    def test_files_of_a_folder_are_not_cut(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", x=images(4))
        assert_feeds(read_inputs(tmp_path, IMAGE), [{"x": images(4)}])

    def test_folder_is_read_when_needed(self, tmp_path: Path) -> None:
        for number in range(2):
            np.savez(tmp_path / f"{number}.npz", x=images(1))
        samples = read_inputs(tmp_path, IMAGE)
        (tmp_path / "1.npz").unlink()
        np.testing.assert_array_equal(samples[0]["x"], images(1))
        with pytest.raises(InputsError, match=r"1\.npz: cannot be read: No such file or directory$"):
            samples[1]

    def test_test_data_set(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        specs = [InputSpec(f"in{k}", F32, (2,)) for k in range(11)] + [InputSpec("w", F32, (2,), optional=True)]
        for number in range(2):
            (folder := tmp_path / f"test_data_set_{number}").mkdir()
            for k in range(11):
                array = rng.standard_normal(2).astype(np.float32)
                (folder / f"input_{k}.pb").write_bytes(numpy_helper.from_array(array).SerializeToString())
        expected = []
        for number in range(2):
            files = [tmp_path / f"test_data_set_{number}" / f"input_{k}.pb" for k in range(11)]
            tensors = [TensorProto.FromString(file.read_bytes()) for file in files]
            expected.append({f"in{k}": numpy_helper.to_array(t) for k, t in enumerate(tensors)})
        assert_feeds(read_inputs(tmp_path, specs), expected)
        assert_feeds(read_inputs(tmp_path / "test_data_set_1", specs), expected[1:])

    def test_test_data_by_the_tensors_own_names(self, tmp_path: Path) -> None:
        specs = [InputSpec("a", F32, (1,)), InputSpec("b", F32, (1,))]
        for file, name in (("input_0.pb", "b"), ("input_1.pb", "a")):
            array = np.array([ord(name)], np.float32)
            (tmp_path / file).write_bytes(numpy_helper.from_array(array, name).SerializeToString())
        samples = read_inputs(tmp_path, specs)
        assert {name: int(array[0]) for name, array in samples[0].items()} == {"a": 97, "b": 98}

    def test_too_many_test_data_inputs(self, tmp_path: Path) -> None:
        for k in range(2):
            (tmp_path / f"input_{k}.pb").write_bytes(numpy_helper.from_array(images(1)).SerializeToString())
        assert error_of(tmp_path, IMAGE) == f"{tmp_path}: number of input_*.pb files must be 1, got 2"

    def test_iterable_of_dicts(self) -> None:
        def feeds() -> Iterator[dict[str, Any]]:
            yield {"x": images(2)}
            yield {"x": images(5), "labels": [3]}

        samples = read_inputs(feeds(), IMAGE)
        assert_feeds(samples, [{"x": images(2)}, {"x": images(5)}])
        assert samples.labels(0) is None
        assert samples.labels(1) == [3]

    def test_samples_are_checked_against_the_model_and_keep_labels(self) -> None:
        samples = read_inputs({"x": images(2), "y": np.arange(2)}, IMAGE)
        again = read_inputs(samples, IMAGE)
        assert_feeds(again, list(samples))
        assert again.labels(1) == [1]
        assert "did you mean" in error_of(samples, [InputSpec("xx", F32, ("N", 2, 3))])

    def test_feeds_are_read_only_and_the_users_arrays_are_not(self) -> None:
        x = images(2)
        sample = read_inputs({"x": x}, IMAGE)[0]
        with pytest.raises(ValueError, match="read-only"):
            sample["x"][0] = 1
        x[0, 0, 0] = 5


class TestWhatDoesNotFit:
    def test_nothing_there(self, tmp_path: Path) -> None:
        assert error_of("no/such", IMAGE) == "no/such: cannot be read: there is no such file or folder"
        assert error_of([], IMAGE) == "inputs: number of samples must be at least 1, got 0"
        message = error_of(tmp_path, IMAGE)
        assert (
            message == f"{tmp_path}: folder must be one of .npz files or of test_data_set_* folders, got none of them"
        )

    def test_other_kinds_of_sources(self, tmp_path: Path) -> None:
        np.save(tmp_path / "x.npy", images(1))
        message = error_of(tmp_path / "x.npy", IMAGE)
        assert message.endswith(
            "x.npy: inputs must be a .npz file or a folder, got a '.npy' file; np.savez(path, **{'x': array}) makes one"
        )
        assert error_of(3, IMAGE) == "inputs: source must be a path, or one or more dicts of arrays, got int"
        message = error_of(images(2), IMAGE)
        assert message == "inputs: sample 0 must be a dict of arrays, got ndarray; {'x': array} is one"

    def test_unknown_name(self) -> None:
        message = error_of({"id": np.zeros((1, 2), int), "mask": np.zeros((1, 2), int)}, TOKENS)
        assert message == "inputs: sample 0: 'id' is no input of the model; did you mean 'ids'? Known: ids, mask"

    def test_missing_name(self) -> None:
        message = error_of({"ids": np.zeros((1, 2), np.int64)}, TOKENS)
        assert message == "inputs: sample 0: inputs must be complete, got no array for 'mask'; there are: ids"

    def test_optional_inputs_may_be_missing_or_given(self) -> None:
        specs = [*IMAGE, InputSpec("scale", F32, (1,), optional=True)]
        scale = np.ones(1, np.float32)
        assert_feeds(read_inputs([{"x": images(1)}], specs), [{"x": images(1)}])
        assert_feeds(read_inputs([{"x": images(1), "scale": scale}], specs), [{"x": images(1), "scale": scale}])

    @pytest.mark.parametrize(("dtype", "got"), [("f8", "float64"), ("u1", "uint8"), (">f4", ">f4"), ("O", "object")])
    def test_dtype(self, dtype: str, got: str, tmp_path: Path) -> None:
        message = error_of([{"x": images(1)}, {"x": images(1).astype(dtype)}], IMAGE)
        wanted = f"inputs: sample 1: input 'x' must be float32, got {got}; array.astype('float32') converts it"
        assert message == wanted

    @pytest.mark.parametrize("shape", [(1, 2, 4), (1, 3, 3), (1, 2, 3, 1)])
    def test_shape(self, shape: tuple[int, ...]) -> None:
        message = error_of([{"x": np.zeros(shape, np.float32)}], IMAGE)
        assert message == f"inputs: sample 0: input 'x' must be of shape [N, 2, 3], got {list(shape)}"

    def test_missing_sample_axis(self) -> None:
        message = error_of({"x": np.zeros((2, 3), np.float32)}, [InputSpec("x", F32, (None, 2, 3))])
        assert message.endswith("must be of shape [?, 2, 3], got [2, 3]; array[None] adds the sample axis")

    def test_equal_symbols_are_equal_sizes(self) -> None:
        message = error_of([{"ids": np.zeros((1, 4), np.int64), "mask": np.zeros((1, 5), np.int64)}], TOKENS)
        assert message == "inputs: sample 0: input 'mask' must be 4 long on axis 1 ('seq', as in input 'ids'), got 5"

    @pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16, ml_dtypes.float8_e5m2])
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_not_finite(self, dtype: Any, bad: float) -> None:
        x = np.zeros((3, 2, 3), dtype)
        x[2, 1, 1] = bad
        message = error_of({"x": x}, [InputSpec("x", np.dtype(dtype), ("N", 2, 3))])
        assert message == "inputs: sample 2: input 'x' must be finite, got NaN or infinity"

    def test_text_and_bfloat16_survive_a_file(self, tmp_path: Path) -> None:
        specs = [InputSpec("s", np.dtype(object), ("N",)), InputSpec("b", np.dtype(ml_dtypes.bfloat16), ("N",))]
        np.savez(tmp_path / "in.npz", s=np.array(["a", "bcd"]), b=np.array([1, 2.5]).astype(ml_dtypes.bfloat16))
        samples = read_inputs(tmp_path / "in.npz", specs)
        assert [feeds["s"].tolist() for feeds in samples] == [["a"], ["bcd"]]
        assert [feeds["b"].astype(float).tolist() for feeds in samples] == [[1.0], [2.5]]


class TestDamagedFiles:
    def test_no_archive(self, tmp_path: Path) -> None:
        (tmp_path / "in.npz").write_bytes(b"junk")
        message = error_of(tmp_path / "in.npz", IMAGE)
        assert message.endswith("in.npz: cannot be read: it is not what np.savez writes, or truncated")

    def test_flipped_and_missing_bytes(self, tmp_path: Path) -> None:
        np.savez(path := tmp_path / "in.npz", x=images(40))
        data = bytearray(path.read_bytes())
        data[500] ^= 0xFF
        path.write_bytes(data)
        assert "in.npz: array 'x': cannot be read: Bad CRC-32" in error_of(path, IMAGE)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", b"\x93NUMPY\x01\x00")
        assert "in.npz: array 'x': cannot be read: " in error_of(path, IMAGE)

    def test_pickles_are_refused_and_not_run(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "in.npz", x=np.array([{"a": 1}], object))
        message = error_of(tmp_path / "in.npz", IMAGE)
        assert message.endswith("in.npz: array 'x': holds pickled Python objects, which are refused; save plain arrays")
        with zipfile.ZipFile(tmp_path / "in.npz", "w") as archive:
            archive.writestr("x", pickle.dumps(1))
        assert error_of(tmp_path / "in.npz", IMAGE).endswith("in.npz: array 'x': cannot be read: it is no array")

    def test_a_bad_file_of_a_folder_is_named(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "0.npz", x=images(1))
        np.savez(tmp_path / "1.npz", x=images(1).astype(np.float64))
        assert error_of(tmp_path, IMAGE).startswith(f"{tmp_path / '1.npz'}: input 'x' must be float32, got float64")

    def test_bad_tensor_files(self, tmp_path: Path) -> None:
        (file := tmp_path / "input_0.pb").write_bytes(b"\xff\xff\xff")
        assert error_of(tmp_path, IMAGE).startswith(f"{file}: cannot be read as a TensorProto: ")
        outside = TensorProto(data_type=1, dims=[1, 2, 3], data_location=TensorProto.EXTERNAL)
        file.write_bytes(outside.SerializeToString())
        assert error_of(tmp_path, IMAGE).endswith("TensorProto: external data is not supported here")


class TestSplit:
    @given(count=st.integers(2, 60), share=st.floats(0.01, 0.99))
    def test_parts_are_disjoint_complete_and_spread(self, count: int, share: float) -> None:
        samples = Samples(lambda index: {"x": np.array(index)}, range(count), "test", lambda index: np.array([index]))
        parts = [[int(feeds["x"]) for feeds in part] for part in samples.split(share)]
        assert sorted(parts[0] + parts[1]) == list(range(count))
        assert all(parts)
        assert abs(len(parts[0]) - count * share) <= 1
        for end in range(1, count + 1):  # evenly: any start of the sequence holds its share of the first part
            first = sum(index < end for index in parts[0])
            assert abs(first - end * len(parts[0]) / count) < 1
        calibration, holdout = samples.split(share)
        assert [int(calibration.labels(k)[0]) for k in range(len(calibration))] == parts[0]  # type: ignore[index]
        assert [int(feeds["x"]) for feeds in holdout[1:]] == parts[1][1:]

    def test_what_cannot_be_split(self) -> None:
        samples = Samples(lambda index: {}, range(1), "one.npz")
        with pytest.raises(InputsError, match=r"^one\.npz: number of samples to split must be at least 2, got 1$"):
            samples.split(0.5)
        for share in (0, 1, -1, 1.5, float("nan")):
            with pytest.raises(InputsError, match="split share must be between 0 and 1, both excluded"):
                samples.split(share)
