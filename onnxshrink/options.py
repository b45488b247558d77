"""Options of a pass: dataclass fields that know their range, their help and how to be read from text.

    sparsity: float = option(0.5, "share of weights set to zero", low=0.0, high=1.0)

The command line, recipes, range checks and the table of `onnxshrink passes` all follow from such fields.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from onnxshrink.errors import OptionError, must

__all__ = ["OptionInfo", "check_options", "convert_options", "did_you_mean", "option", "option_infos", "parse_options"]

_KEY = "onnxshrink"
_WORDS: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "none"}


@dataclasses.dataclass(frozen=True)
class OptionInfo:
    """What a person needs to know of one option: its kebab-case name, type, default, allowed values and meaning."""

    name: str
    type: str
    default: Any
    allowed: str
    help: str
    per_site: bool


@dataclasses.dataclass(frozen=True)
class _Meta:
    help: str
    low: float | None
    high: float | None
    choices: tuple[str, ...]
    per_site: bool


def option(
    default: Any,
    help: str,  # noqa: A002  # argparse's and click's word for it
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Iterable[str] = (),
    per_site: bool = True,
) -> Any:
    """Declares a field of a pass as an option.

    Args:
        default: value when nobody says otherwise.
        help: one line for people.
        low: smallest allowed number, included.
        high: largest allowed number, included.
        choices: allowed strings.
        per_site: whether a recipe's rule may set it for some layers only.
    """
    return dataclasses.field(default=default, metadata={_KEY: _Meta(help, low, high, tuple(choices), per_site)})


def check_options(owner: str, instance: Any) -> None:
    """Checks every option of a dataclass instance against its type and range.

    Raises:
        OptionError: names the option, what is allowed, and the value that came.
    """
    for field, kinds, meta in _fields(type(instance)):
        name, value = _kebab(field.name), getattr(instance, field.name)
        if value is None and type(None) in kinds:
            continue
        if not _is_of(value, kinds):
            raise OptionError(must(owner, name, _type_name(kinds), repr(value)))
        in_range = not isinstance(value, int | float) or (
            (meta.low is None or value >= meta.low) and (meta.high is None or value <= meta.high)
        )
        if not in_range or (meta.choices and value not in meta.choices):
            raise OptionError(must(owner, name, _allowed(meta, kinds), repr(value)))


def parse_options(owner: str, cls: type, texts: Mapping[str, str]) -> dict[str, Any]:
    """Returns constructor arguments from ``key=value`` texts of a command line.

    Raises:
        OptionError: an unknown key (with the nearest known one), or a text that is no value of the option's type.
    """
    return {field.name: _from_text(owner, field.name, kinds, text) for field, kinds, text in _match(owner, cls, texts)}


def convert_options(owner: str, cls: type, values: Mapping[str, Any], *, per_site: bool = False) -> dict[str, Any]:
    """Returns constructor arguments from the typed values of a recipe.

    Args:
        owner: named in errors.
        cls: the pass.
        values: by kebab-case or snake_case option name.
        per_site: whether these come from a rule for some layers; then only such options are allowed.

    Raises:
        OptionError: an unknown key, a wrong type, or an option that a rule cannot set.
    """
    arguments = {}
    for field, kinds, value in _match(owner, cls, values):
        if per_site and not field.metadata[_KEY].per_site:
            raise OptionError(f"{owner}: option '{_kebab(field.name)}' holds for the whole pass; a rule cannot set it")
        if value == "none" and type(None) in kinds and str not in kinds:  # TOML has no other word for it
            value = None
        if not _is_of(value, kinds):
            raise OptionError(must(owner, _kebab(field.name), _type_name(kinds), repr(value)))
        arguments[field.name] = value
    return arguments


def option_infos(cls: type) -> list[OptionInfo]:
    """Returns the options of a pass in the order of their declaration."""
    return [
        OptionInfo(_kebab(field.name), _type_name(kinds), field.default, _allowed(meta, kinds), meta.help, meta.per_site)
        for field, kinds, meta in _fields(cls)
    ]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns the tail of a message about an unknown word.

    >>> did_you_mean("sparsty", ["sparsity", "scope"])
    "did you mean 'sparsity'? Known: scope, sparsity"
    """
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}{'Known' if hint else 'known'}: {', '.join(names) or 'none'}"


def _fields(cls: type) -> list[tuple[dataclasses.Field[Any], tuple[type, ...], _Meta]]:
    hints = typing.get_type_hints(cls)
    return [
        (field, _kinds(hints[field.name]), field.metadata[_KEY])
        for field in dataclasses.fields(cls)
        if _KEY in field.metadata
    ]


def _match(owner: str, cls: type, values: Mapping[str, Any]) -> list[tuple[dataclasses.Field[Any], tuple[type, ...], Any]]:
    known = {_kebab(field.name): (field, kinds) for field, kinds, _ in _fields(cls)}
    matched: dict[str, tuple[dataclasses.Field[Any], tuple[type, ...], Any]] = {}
    for key, value in values.items():
        if (name := _kebab(key)) not in known:
            raise OptionError(f"{owner}: unknown option '{key}'; {did_you_mean(name, known)}")
        if name in matched:
            raise OptionError(f"{owner}: option '{name}' is given twice")
        matched[name] = (*known[name], value)
    return list(matched.values())


def _from_text(owner: str, name: str, kinds: tuple[type, ...], text: str) -> Any:
    if type(None) in kinds and text.lower() == "none":
        return None
    words = {"true": True, "yes": True, "false": False, "no": False}
    for kind in (bool, int, float, str):
        if kind not in kinds:
            continue
        try:
            return words[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError):
            continue
    raise OptionError(must(owner, _kebab(name), _type_name(kinds), repr(text)))


def _kinds(hint: Any) -> tuple[type, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _is_of(value: Any, kinds: tuple[type, ...]) -> bool:
    if isinstance(value, bool):  # Python counts True as an int; people do not
        return bool in kinds
    return isinstance(value, kinds) or (isinstance(value, int) and float in kinds)


def _type_name(kinds: tuple[type, ...]) -> str:
    return " or ".join(_WORDS[kind] for kind in kinds)


def _allowed(meta: _Meta, kinds: tuple[type, ...]) -> str:
    if meta.choices:
        return "one of " + ", ".join(meta.choices)
    words = _WORDS[kinds[0]]
    if meta.low is not None and meta.high is not None:
        return f"{words} from {_number(meta.low)} to {_number(meta.high)}"
    if meta.low is not None:
        return f"{words}, at least {_number(meta.low)}"
    if meta.high is not None:
        return f"{words}, at most {_number(meta.high)}"
    return words


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _kebab(name: str) -> str:
    return name.replace("_", "-")
