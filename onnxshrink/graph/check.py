"""Whether a model is valid ONNX, as far as the original was.

Some models that people deploy fail parts of the checker (retired experimental ops, shapes that do not infer strictly) and still run.
A rewritten model is held to the strictest level that the original passes.
"""

from __future__ import annotations

import enum
import os

import onnx
from onnx import checker, shape_inference

__all__ = ["Level", "check", "strictest_level"]


class Level(enum.IntEnum):
    """How much of `onnx.checker.check_model` a model passes."""

    NONE = 0
    STRUCTURE = 1
    SHAPES = 2  # full_check: strict shape and type inference as well


def check(model: onnx.ModelProto | str, level: Level) -> str | None:
    """Returns what the checker says against a model, in one line, or None if it passes at that level.

    Args:
        model: a message, or the path of a file (needed over 2 GiB and for external data).
        level: how much to check.
    """
    if level is Level.NONE:
        return None
    try:
        checker.check_model(model, full_check=level is Level.SHAPES)
    except (checker.ValidationError, shape_inference.InferenceError, ValueError, TypeError) as error:
        return " ".join(str(error).split())[:300]
    return None


def strictest_level(model: onnx.ModelProto | str | os.PathLike[str]) -> tuple[Level, str | None]:
    """Returns the strictest level that a model passes, and what it fails above that, if anything."""
    complaint = None
    for level in (Level.SHAPES, Level.STRUCTURE):
        reason = check(model if isinstance(model, onnx.ModelProto) else os.fspath(model), level)
        if reason is None:
            return level, complaint
        complaint = reason
    return Level.NONE, complaint
