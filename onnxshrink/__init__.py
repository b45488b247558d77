"""onnxshrink: makes ONNX models smaller and faster after training, and proves that they still work.

Names are imported when they are first used: ``onnxshrink --help`` must not wait for ONNX Runtime.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxshrink.api import Compressed, Verification, bench, compress, expand, inspect, load, verify
    from onnxshrink.contract import Pass, Rule, Step
    from onnxshrink.errors import ShrinkError
    from onnxshrink.recipe import Recipe, read_recipe
    from onnxshrink.validate import Tolerance

__all__ = [
    "Compressed",
    "Pass",
    "Recipe",
    "Rule",
    "ShrinkError",
    "Step",
    "Tolerance",
    "Verification",
    "bench",
    "compress",
    "expand",
    "inspect",
    "load",
    "read_recipe",
    "verify",
]

_HOMES = {
    "api": ("Compressed", "Verification", "bench", "compress", "expand", "inspect", "load", "verify"),
    "contract": ("Pass", "Rule", "Step"),
    "errors": ("ShrinkError",),
    "recipe": ("Recipe", "read_recipe"),
    "validate": ("Tolerance",),
}

try:
    __version__ = version("onnxshrink")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"onnxshrink.{module}"), name)
    raise AttributeError(f"module 'onnxshrink' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
