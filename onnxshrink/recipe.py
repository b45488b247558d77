"""Recipes: which passes run, in what order, with which options and rules, and how much error is accepted.

    format = 1
    [tolerance]
    min-sqnr = 30.0
    [[pass]]
    name = "share-weights"
    options = { bits = 6 }
    [[pass.rule]]
    match = "*/layer4/*"
    options = { bits = 8 }

Every level is strict: an unknown key is an error that suggests the nearest known one.
"""

from __future__ import annotations

import math
import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxshrink.contract import Pass, Rule, Step
from onnxshrink.errors import OptionError, RecipeError, RegistryError, must
from onnxshrink.options import convert_options, did_you_mean, parse_options
from onnxshrink.registry import pass_class
from onnxshrink.validate import Tolerance

__all__ = ["FORMAT", "Recipe", "default_recipe", "finished", "parse_pass", "parse_recipe", "read_recipe"]

FORMAT = 1
_DEFAULT_SQNR_DB = 30.0
_FIRST_SQNR_DB, _MOST_SQNR_DB = 15.0, 100.0
_LIMITS = {"min-sqnr": "min_sqnr_db", "max-drift": "max_drift", "min-agreement": "min_agreement"}


@dataclass(frozen=True)
class Recipe:
    """Steps in order, and the error that is accepted after each of them."""

    steps: tuple[Step, ...]
    tolerance: Tolerance = Tolerance()


def default_recipe(limits: Tolerance | None = None, calibrated: bool = False) -> Recipe:
    """Returns what `compress` does when no passes are asked for: tidy, weight sharing, Huffman coding, held to 30 dB.

    With calibration data weights get as few bits as the limits allow; without, 8 bits, for nothing tells how many they need.

    Args:
        limits: that hold instead of 30 dB.
        calibrated: whether passes will have calibration data.
    """
    limits = limits if limits is not None and limits.is_set else Tolerance(min_sqnr_db=_DEFAULT_SQNR_DB)
    drift = limits.drift_limit
    aim = -20 * math.log10(drift) if drift else _FIRST_SQNR_DB  # agreement alone says no decibels: begin low, and go up
    options = {"sqnr": min(max(aim, 0.0), _MOST_SQNR_DB)} if calibrated else {}
    passes = (pass_class("tidy")(), pass_class("share-weights")(**options), pass_class("huffman")())
    return Recipe(tuple(Step(item) for item in passes), limits)


def finished(steps: Sequence[Step]) -> tuple[Step, ...]:
    """Returns the steps with the passes that they want to end with, each once, those that are among them already left out.

    Raises:
        RegistryError: a pass wants to end with one that does not exist.
    """
    present = {step.run.name for step in steps}
    wanted = dict.fromkeys(name for step in steps for name in step.run.finish_with if name not in present)
    end = len(steps)
    while end and steps[end - 1].run.runs_last:
        end -= 1
    return (*steps[:end], *(Step(pass_class(name)()) for name in wanted), *steps[end:])


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Reads a recipe file.

    Raises:
        RecipeError: it cannot be read, is no TOML, or says something that cannot be meant.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RecipeError(f"recipe {path}: cannot be read: {reason}") from error
    return parse_recipe(text, f"recipe {path}")


def parse_recipe(text: str, owner: str = "recipe") -> Recipe:
    """Returns the recipe that a TOML text describes.

    Args:
        text: the TOML.
        owner: named in errors.

    Raises:
        RecipeError: as for `read_recipe`.
    """
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # not only TOMLDecodeError: int() has a limit of its own
        raise RecipeError(f"{owner}: not valid TOML: {error}") from error
    try:
        _check_keys(owner, table, {"format": int, "tolerance": dict, "pass": list})
        if table.get("format") != FORMAT:
            raise RecipeError(must(owner, "format", str(FORMAT), table.get("format", "nothing"), "write: format = 1"))
        steps = tuple(_step(f"{owner}, pass {number}", entry) for number, entry in enumerate(table.get("pass", []), 1))
        return Recipe(steps, _tolerance(owner, table.get("tolerance", {})))
    except RecipeError:
        raise
    except ValueError as error:  # a number of so many digits that no message can show it
        raise RecipeError(f"{owner}: {error}") from error


def parse_pass(text: str) -> Pass:
    """Returns the pass that ``NAME[:key=value,...]`` describes.

    Raises:
        RegistryError: no pass of that name.
        OptionError: an option that does not exist, does not parse or is out of range.
    """
    name, _, rest = text.partition(":")
    cls = pass_class(name.strip())
    options: dict[str, str] = {}
    for pair in filter(None, rest.split(",")):
        key, equals, value = pair.partition("=")
        if not equals:
            raise OptionError(must(f"--pass {name}", "options", "key=value pairs, parted by commas", repr(pair)))
        if key.strip() in options:
            raise OptionError(f"--pass {name}: option '{key.strip()}' is given twice")
        options[key.strip()] = value.strip()
    return cls(**parse_options(name, cls, options))


def _step(owner: str, entry: Any) -> Step:
    _check_keys(owner, entry, {"name": str, "options": dict, "rule": list})
    if "name" not in entry:
        raise RecipeError(f"{owner}: name must be given, e.g. name = \"share-weights\"")
    try:
        cls = pass_class(entry["name"])
        instance = cls(**convert_options(entry["name"], cls, entry.get("options", {})))
    except (OptionError, RegistryError) as error:
        raise RecipeError(f"{owner}: {error}") from error
    rules = enumerate(entry.get("rule", []), 1)
    return Step(instance, tuple(_rule(f"{owner}, rule {number}", instance, rule) for number, rule in rules))


def _rule(owner: str, default: Pass, entry: Any) -> Rule:
    _check_keys(owner, entry, {"match": str, "options": dict, "skip": bool})
    if "match" not in entry:
        raise RecipeError(f"{owner}: match must be given, e.g. match = \"*/layer4/*\"")
    try:
        options = convert_options(default.name, type(default), entry.get("options", {}), per_site=True)
        default.with_options(options)  # range checks now, not in the middle of a run
    except OptionError as error:
        raise RecipeError(f"{owner}: {error}") from error
    return Rule(entry["match"], options, entry.get("skip"))


def _tolerance(owner: str, entry: Mapping[str, Any]) -> Tolerance:
    _check_keys(f"{owner}, tolerance", entry, dict.fromkeys(_LIMITS, (int, float)))
    try:
        return Tolerance(**{_LIMITS[key]: value for key, value in entry.items()})
    except OptionError as error:  # it begins with "tolerance"
        raise RecipeError(f"{owner}, {error}") from error


def _check_keys(owner: str, entry: Any, known: Mapping[str, type | tuple[type, ...]]) -> None:
    if not isinstance(entry, dict):
        raise RecipeError(must(owner, "entry", "a table", repr(entry)))
    for key, value in entry.items():
        if key not in known:
            raise RecipeError(f"{owner}: unknown key '{key}'; {did_you_mean(key, known)}")
        if not isinstance(value, known[key]) or (isinstance(value, bool) and known[key] is not bool):
            raise RecipeError(must(owner, key, f"a {_names(known[key])}", repr(value)))


def _names(kinds: type | tuple[type, ...]) -> str:
    words = {dict: "table", list: "list", str: "string", int: "number", float: "number", bool: "boolean"}
    each: Iterable[type] = kinds if isinstance(kinds, tuple) else (kinds,)
    return " or ".join(dict.fromkeys(words[kind] for kind in each))
