"""Where the real models are, and one stored sample for each."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["ABSENT", "CORPUS", "model_names", "model_path", "sample"]

CORPUS = Path(os.environ.get("ONNXSHRINK_CORPUS", Path(__file__).parents[2] / "shared" / "corpus"))
ABSENT = f"no corpus of real models at {CORPUS}; set ONNXSHRINK_CORPUS"

_SHARED_SAMPLES = {"cifar_resnet20": "cifar10_calib.npz", "cifar_resnet32_dynamo": "cifar10_calib.npz"}


def model_names() -> list[str]:
    """Returns the names of all models, sorted; none when there is no corpus."""
    return sorted(path.parent.name for path in CORPUS.glob("*/model.onnx"))


def model_path(name: str) -> Path:
    """Returns where a model is."""
    return CORPUS / name / "model.onnx"


def sample(name: str, inputs: list[str]) -> dict[str, np.ndarray[Any, Any]]:
    """Returns the first calibration sample of a model as it is fed."""
    if name in _SHARED_SAMPLES:
        with np.load(CORPUS / "data" / _SHARED_SAMPLES[name]) as stored:
            return {inputs[0]: stored[stored.files[0]][:1].astype(np.float32)}
    whole = CORPUS / name / "calib" / "000.npz"
    with np.load(whole if whole.exists() else CORPUS / name / "calib.npz") as stored:
        return {key: stored[key] if whole.exists() else stored[key][:1] for key in inputs}
