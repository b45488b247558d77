"""The demo's model and pictures: small, disjoint, and as good as they claim."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

FOLDER = Path(__file__).parents[1] / "onnxshrink" / "demo"
CLASSES = 10


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return onnx.load(FOLDER / "digits.onnx")


@pytest.fixture(scope="module")
def calibration() -> np.ndarray:
    with np.load(FOLDER / "digits_calibration.npz") as stored:
        assert stored.files == ["image"]  # no labels
        return stored["image"]


@pytest.fixture(scope="module")
def evaluation() -> tuple[np.ndarray, np.ndarray]:
    with np.load(FOLDER / "digits_evaluation.npz") as stored:
        assert sorted(stored.files) == ["image", "labels"]
        return stored["image"], stored["labels"]


def test_the_model_is_plain_and_has_something_to_shrink(model: onnx.ModelProto) -> None:
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]
    assert {"Add", "BatchNormalization", "Conv", "Flatten", "Gemm"} <= {node.op_type for node in model.graph.node}
    assert all(tensor.data_type == onnx.TensorProto.FLOAT for tensor in model.graph.initializer)
    assert 100_000 <= sum(np.prod(tensor.dims) for tensor in model.graph.initializer) <= 200_000


def test_the_files_are_small() -> None:
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir() if path.is_file()}
    assert sizes["digits.onnx"] < 700_000
    assert sum(sizes.values()) < 1_000_000


def test_the_pictures_are_what_the_model_takes(calibration: np.ndarray, evaluation: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = evaluation
    assert calibration.shape == (128, 1, 8, 8)
    assert images.shape == (500, 1, 8, 8)
    for pictures in (calibration, images):
        assert pictures.dtype == np.float32
        assert (pictures.min(), pictures.max()) == (0, 1)
    assert (labels.dtype, labels.shape) == (np.int64, (500,))
    assert np.bincount(labels, minlength=CLASSES).min() >= 30  # every digit is well represented


def test_no_picture_is_in_two_parts(calibration: np.ndarray, evaluation: tuple[np.ndarray, np.ndarray]) -> None:
    seen, judged = ({picture.tobytes() for picture in part} for part in (calibration, evaluation[0]))
    assert len(seen) == len(calibration)
    assert len(judged) == len(evaluation[0])
    assert not seen & judged


@pytest.mark.parametrize("batch", [1, 500])
def test_the_accuracy_is_as_claimed(model: onnx.ModelProto, evaluation: tuple[np.ndarray, np.ndarray], batch: int) -> None:
    images, labels = evaluation
    session = onnxruntime.InferenceSession(FOLDER / "digits.onnx", providers=["CPUExecutionProvider"])
    parts = [images[start : start + batch] for start in range(0, len(images), batch)]
    logits = np.concatenate([session.run(["logits"], {"image": part})[0] for part in parts])
    assert logits.shape == (len(images), CLASSES)
    accuracy = np.mean(logits.argmax(axis=1) == labels)
    claimed = float({entry.key: entry.value for entry in model.metadata_props}["accuracy"])
    assert accuracy == pytest.approx(claimed, abs=1.5 / len(images))  # one near tie may fall the other way elsewhere
    assert accuracy > 0.97
