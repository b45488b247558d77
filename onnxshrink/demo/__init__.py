"""A small trained model with its data, compressed before the user's eyes.

``digits.onnx`` classifies the 8x8 pictures of scikit-learn's digits. ``benchmarks/train_demo.py`` made it, and split the data into
pictures for training, for calibration and for evaluation; the last have labels, and nothing but the accuracy is measured on them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from onnxshrink.api import Compressed, Verification, compress, verify
from onnxshrink.contract import Pass
from onnxshrink.passes.huffman import Huffman
from onnxshrink.passes.share_weights import ShareWeights
from onnxshrink.passes.shorten_names import ShortenNames
from onnxshrink.passes.tidy import Tidy
from onnxshrink.validate import Tolerance

__all__ = ["DemoResult", "run_demo"]

_PASSES: tuple[Pass, ...] = (Tidy(), ShareWeights(bits_per_weight=2.5), Huffman(), ShortenNames())
_LIMITS = Tolerance(min_agreement=0.97)


@dataclass(frozen=True)
class DemoResult:
    """The compression, and how the written file does on evaluation pictures that it was never judged on."""

    compressed: Compressed
    verification: Verification

    def to_dict(self) -> dict[str, Any]:
        """Returns plain dicts, lists, strings and finite numbers."""
        return {**self.compressed.report.to_dict(), "evaluation": self.verification.to_dict()}


def run_demo(progress: Callable[[str, int, int], None] | None = None) -> DemoResult:
    """Compresses the demo model and evaluates the file that comes out."""
    folder = files("onnxshrink.demo")
    with (
        as_file(folder / "digits.onnx") as model,
        as_file(folder / "digits_calibration.npz") as calibration,
        as_file(folder / "digits_evaluation.npz") as evaluation,
        tempfile.TemporaryDirectory(prefix="onnxshrink-demo-") as place,
    ):
        compressed = compress(model, _PASSES, calibration=calibration, tolerance=_LIMITS, progress=progress)
        small = Path(place) / "small.onnx"
        compressed.save(small)
        return DemoResult(compressed, verify(model, small, inputs=evaluation, tolerance=_LIMITS))
