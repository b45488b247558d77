"""Pass names to pass classes: built-in ones by a table of strings, third parties' by the entry-point group below."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from onnxshrink.contract import Pass
from onnxshrink.errors import RegistryError
from onnxshrink.options import OptionInfo, did_you_mean, option_infos

__all__ = ["ENTRY_POINT_GROUP", "PassInfo", "describe_passes", "pass_class", "pass_names"]

ENTRY_POINT_GROUP = "onnxshrink.passes"
_BUILT_IN = {
    "huffman": "onnxshrink.passes.huffman:Huffman",
    "low-rank": "onnxshrink.passes.low_rank:LowRank",
    "pack-sparse": "onnxshrink.passes.pack_sparse:PackSparse",
    "remove-channels": "onnxshrink.passes.remove_channels:RemoveChannels",
    "share-weights": "onnxshrink.passes.share_weights:ShareWeights",
    "shorten-names": "onnxshrink.passes.shorten_names:ShortenNames",
    "sparsify": "onnxshrink.passes.sparsify:Sparsify",
    "tidy": "onnxshrink.passes.tidy:Tidy",
}


@dataclass(frozen=True)
class PassInfo:
    """A pass for people: its name, the first line of its docstring, its options."""

    name: str
    summary: str
    options: tuple[OptionInfo, ...]


def describe_passes() -> list[PassInfo]:
    """Returns every pass that can be used here, sorted by name."""
    classes = [pass_class(name) for name in pass_names()]
    return [PassInfo(cls.name, (cls.__doc__ or "").strip().split("\n")[0], tuple(option_infos(cls))) for cls in classes]


def pass_names() -> list[str]:
    """Returns the names of all passes that can be used here, sorted.

    Raises:
        RegistryError: two owners claim one name.
    """
    return sorted({**_BUILT_IN, **_third_party()})


def pass_class(name: str) -> type[Pass]:
    """Returns the class of a pass; only its own module is imported.

    Raises:
        RegistryError: nobody, or more than one, has a pass of that name, or its module does not hold one.
    """
    third_party = _third_party()
    if name in third_party:
        loaded = _load(third_party[name])
    elif name in _BUILT_IN:
        module, _, attribute = _BUILT_IN[name].partition(":")
        loaded = getattr(importlib.import_module(module), attribute)
    else:
        raise RegistryError(f"unknown pass '{name}'; {did_you_mean(name, {**_BUILT_IN, **third_party})}")
    if not (isinstance(loaded, type) and issubclass(loaded, Pass) and getattr(loaded, "name", None) == name):
        raise RegistryError(f"pass '{name}': the entry point must name a Pass subclass with name = '{name}', got {loaded!r}")
    return loaded


def _third_party() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        if entry.name in _BUILT_IN:
            raise RegistryError(f"pass '{entry.name}' is claimed by onnxshrink and by {_owner(entry)}; uninstall or rename one")
        if entry.name in found and found[entry.name].value != entry.value:
            owners = f"{_owner(found[entry.name])} and by {_owner(entry)}"
            raise RegistryError(f"pass '{entry.name}' is claimed by {owners}; uninstall or rename one")
        found[entry.name] = entry
    return found


def _load(entry: EntryPoint) -> Any:
    try:
        return entry.load()
    except Exception as error:  # importing runs third-party code
        reason = f"{type(error).__name__}: {error}"
        raise RegistryError(f"pass '{entry.name}' of {_owner(entry)} cannot be imported: {reason}") from error


def _owner(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else entry.value
