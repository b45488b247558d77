"""The real models that claims are measured on: where they are, what calibrates them, what judges them; the two never overlap.

The folder is ``../shared/corpus`` beside the repository, or what ONNXSHRINK_CORPUS names; its README says what is in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

CORPUS = Path(os.environ.get("ONNXSHRINK_CORPUS", Path(__file__).resolve().parents[2] / "shared" / "corpus"))
_MINILM_SENTENCES = 300
_SQUEEZENET_MEAN = np.array([103.9, 116.8, 123.7], np.float32)  # BGR, of the 0..255 scale

Feeds = Mapping[str, np.ndarray[Any, Any]]


def names() -> list[str]:
    """Returns the names of all models."""
    return [entry["name"] for entry in json.loads((CORPUS / "manifest.json").read_text())]


def model_path(name: str) -> Path:
    """Returns the model's file."""
    return CORPUS / name / "model.onnx"


def calibration(name: str) -> Path:
    """Returns the calibration inputs."""
    if name.startswith("cifar"):
        return CORPUS / "data" / "cifar10_calib.npz"
    return _either(CORPUS / name / "calib")


def evaluation(name: str) -> Path | list[Feeds] | Feeds:
    """Returns the evaluation inputs, with labels where there are any."""
    if name.startswith("cifar"):
        with np.load(CORPUS / "data" / "cifar10_eval.npz") as images:
            return {"input": images["input"], "labels": np.load(CORPUS / "data" / "cifar10_eval_labels.npy")}
    if name == "squeezenet_fp32up":
        with np.load(CORPUS / "data" / "imagenet_eval.npz") as data:
            bgr = data["images"][..., ::-1].astype(np.float32) - _SQUEEZENET_MEAN
            return {"data_0": np.ascontiguousarray(bgr.transpose(0, 3, 1, 2)), "labels": data["labels"]}
    if name == "mobilenetv2_tflq_deq":
        with np.load(CORPUS / "data" / "imagenet_eval.npz") as data:
            return {"input": data["images"], "labels": data["labels"] + 1}  # class 0 is background
    if name == "minilm_l6_v2":
        return list(_sentences())
    return _either(CORPUS / name / "eval")


def _sentences() -> Iterator[Feeds]:
    """Yields the first sentences of the STS-B pairs, one at a time, without their padding."""
    with np.load(CORPUS / "minilm_l6_v2" / "stsb_dev.npz") as data:
        for ids, mask in zip(data["ids_a"][:_MINILM_SENTENCES], data["mask_a"][:_MINILM_SENTENCES], strict=True):
            length = int(mask.sum())
            row = {"input_ids": ids[None, :length], "attention_mask": mask[None, :length]}
            yield {**row, "token_type_ids": np.zeros_like(row["input_ids"])}


def _either(stem: Path) -> Path:
    return stem if stem.is_dir() else stem.with_suffix(".npz")
