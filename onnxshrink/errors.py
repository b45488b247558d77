"""Every way onnxshrink can fail, in one screen.

    ShrinkError
    ├── OptionError(ValueError)        an option of a pass, or the text that sets it, is wrong     exit 2
    │   └── RecipeError                a recipe file is wrong                                      exit 2
    ├── RegistryError(LookupError)     no pass, or two passes, of that name                        exit 2
    ├── InputsError(ValueError)        calibration or evaluation inputs do not fit the model       exit 2
    ├── OutputError(OSError)           a result cannot be written                                  exit 2
    ├── PassError(RuntimeError)        a pass broke its contract                                   exit 4
    ├── ValidationError(ValueError)    two models cannot be compared, or the candidate is broken   exit 4
    └── ModelError(ValueError)         the model cannot be used                                    exit 5
        ├── ModelReadError             not readable: no file, no protobuf, data missing
        └── UnsupportedModelError      readable, but something in it would be lost or cannot run

Each class also inherits the built-in exception a caller would expect. A message reads
``<owner>: <what> must be <constraint>, got <value>``, followed by the way out where there is one; `must` writes it.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "InputsError",
    "ModelError",
    "ModelReadError",
    "OptionError",
    "OutputError",
    "PassError",
    "RecipeError",
    "RegistryError",
    "ShrinkError",
    "UnsupportedModelError",
    "ValidationError",
    "must",
]


class ShrinkError(Exception):
    """The root of every error that onnxshrink raises on purpose."""

    exit_code: ClassVar[int] = 2


class OptionError(ShrinkError, ValueError):
    """An option of a pass is out of range, unknown, or does not parse."""


class RecipeError(OptionError):
    """A recipe has an unknown key, a wrong type or a wrong format number."""


class RegistryError(ShrinkError, LookupError):
    """A pass name is unknown, or two packages claim the same one."""


class InputsError(ShrinkError, ValueError):
    """Calibration or evaluation inputs do not fit the model."""


class OutputError(ShrinkError, OSError):
    """A result file cannot be written."""


class PassError(ShrinkError, RuntimeError):
    """A pass broke its contract."""

    exit_code = 4


class ValidationError(ShrinkError, ValueError):
    """Two models cannot be compared, or the candidate does not run."""

    exit_code = 4


class ModelError(ShrinkError, ValueError):
    """The model given by the user cannot be used."""

    exit_code = 5


class ModelReadError(ModelError):
    """The model cannot be read: no such file, not a protobuf, external data missing."""


class UnsupportedModelError(ModelError):
    """The model was read, but ONNX Runtime cannot run it or something in it would be lost."""


def must(owner: str, what: str, constraint: str, got: object, way_out: str = "") -> str:
    """Returns the one message shape: who complains, about what, what is allowed, what came, and the way out.

    >>> must("sparsify", "sparsity", "between 0 and 1", 3, "0.5 zeroes half of the weights")
    'sparsify: sparsity must be between 0 and 1, got 3; 0.5 zeroes half of the weights'
    """
    message = f"{owner}: {what} must be {constraint}, got {got}"
    return f"{message}; {way_out}" if way_out else message
