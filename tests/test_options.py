"""Options of a pass: read from text and from recipes, checked, and described, each by the same field."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Optional

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxshrink.errors import OptionError
from onnxshrink.options import (
    OptionInfo,
    check_options,
    convert_options,
    did_you_mean,
    option,
    option_infos,
    parse_options,
)


@dataclass(frozen=True, kw_only=True)
class Sample:
    share: float = option(0.5, "a share", low=0.0, high=1.0)
    most_rows: int = option(4, "a count", low=1, high=9)
    least: int | None = option(None, "a lower bound", low=2)
    limit: float | None = option(None, "an upper bound", high=8)
    fast: bool = option(True, "a switch")
    mode: str = option("plain", "a choice", choices=("plain", "fancy"), per_site=False)
    label: str = option("", "any text")
    old: Optional[float] = option(None, "the other way to write it")  # noqa: UP045
    private: int = 3  # no option: nobody may set it by name

    def __post_init__(self) -> None:
        check_options("sample", self)


class TestChecks:
    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"share": -0.01}, "sample: share must be a number from 0 to 1, got -0.01"),
            ({"share": 1.01}, "sample: share must be a number from 0 to 1, got 1.01"),
            ({"share": math.nan}, "sample: share must be a number from 0 to 1, got nan"),
            ({"share": math.inf}, "sample: share must be a number from 0 to 1, got inf"),
            ({"share": None}, "sample: share must be a number, got None"),
            ({"share": "0.5"}, "sample: share must be a number, got '0.5'"),
            ({"share": True}, "sample: share must be a number, got True"),
            ({"most_rows": 0}, "sample: most-rows must be a whole number from 1 to 9, got 0"),
            ({"most_rows": 2.0}, "sample: most-rows must be a whole number, got 2.0"),
            ({"most_rows": True}, "sample: most-rows must be a whole number, got True"),
            ({"least": 1}, "sample: least must be a whole number, at least 2, got 1"),
            ({"limit": 8.5}, "sample: limit must be a number, at most 8, got 8.5"),
            ({"fast": 1}, "sample: fast must be true or false, got 1"),
            ({"mode": "Plain"}, "sample: mode must be one of plain, fancy, got 'Plain'"),
            ({"label": 3}, "sample: label must be text, got 3"),
            ({"old": "x"}, "sample: old must be a number or none, got 'x'"),
        ],
    )
    def test_refuses(self, values: dict[str, Any], message: str) -> None:
        with pytest.raises(OptionError) as caught:
            Sample(**values)
        assert str(caught.value) == message
        assert isinstance(caught.value, ValueError)

    @pytest.mark.parametrize(
        "values",
        [
            {"share": 0.0},
            {"share": 1},
            {"most_rows": 9},
            {"least": None},
            {"least": 2},
            {"limit": -1e300},
            {"limit": 8},
            {"old": None},
            {"old": 1e9},
            {"label": "any: text, at all"},
        ],
    )
    def test_takes(self, values: dict[str, Any]) -> None:
        made = Sample(**values)
        assert {name: getattr(made, name) for name in values} == values


class TestText:
    @pytest.mark.parametrize(
        ("texts", "arguments"),
        [
            ({}, {}),
            ({"share": "0.25"}, {"share": 0.25}),
            ({"share": "1e-3"}, {"share": 0.001}),
            ({"share": "1"}, {"share": 1.0}),
            ({"most-rows": "7"}, {"most_rows": 7}),
            ({"most_rows": "7"}, {"most_rows": 7}),
            ({"least": "NONE"}, {"least": None}),
            ({"least": "5"}, {"least": 5}),
            ({"limit": "none"}, {"limit": None}),
            ({"old": "none"}, {"old": None}),
            ({"old": "2"}, {"old": 2.0}),
            ({"fast": "No"}, {"fast": False}),
            ({"fast": "TRUE", "mode": "fancy"}, {"fast": True, "mode": "fancy"}),
            ({"label": "none"}, {"label": "none"}),
        ],
    )
    def test_is_read(self, texts: dict[str, str], arguments: dict[str, Any]) -> None:
        got = parse_options("sample", Sample, texts)
        assert got == arguments
        assert [type(value) for value in got.values()] == [type(value) for value in arguments.values()]

    @pytest.mark.parametrize(
        ("texts", "message"),
        [
            ({"shar": "1"}, "sample: unknown option 'shar'; did you mean 'share'? Known: fast, label, "),
            ({"private": "1"}, "sample: unknown option 'private'; known: fast, "),
            ({"": "1"}, "sample: unknown option ''; known: fast, "),
            ({"share": ""}, "sample: share must be a number, got ''"),
            ({"share": "half"}, "sample: share must be a number, got 'half'"),
            ({"share": "none"}, "sample: share must be a number, got 'none'"),
            ({"most-rows": "2.0"}, "sample: most-rows must be a whole number, got '2.0'"),
            ({"least": "x"}, "sample: least must be a whole number or none, got 'x'"),
            ({"fast": "1"}, "sample: fast must be true or false, got '1'"),
            ({"most-rows": "1", "most_rows": "2"}, "sample: option 'most-rows' is given twice"),
        ],
    )
    def test_is_refused(self, texts: dict[str, str], message: str) -> None:
        with pytest.raises(OptionError) as caught:
            parse_options("sample", Sample, texts)
        assert str(caught.value).startswith(message)

    @settings(deadline=None)
    @given(st.floats(0, 1), st.integers(1, 9), st.none() | st.integers(2, 10**20), st.booleans())
    def test_what_is_written_is_read_back(self, share: float, rows: int, least: int | None, fast: bool) -> None:
        given_values = {"share": share, "most_rows": rows, "least": least, "fast": fast}
        read = parse_options("sample", Sample, {name: str(value) for name, value in given_values.items()})
        assert read == given_values
        assert Sample(**read) == Sample(**given_values)


class TestValues:
    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"Share": 0.5}, "sample: unknown option 'Share'; did you mean 'share'?"),
            ({"share": "0.5"}, "sample: share must be a number, got '0.5'"),
            ({"share": True}, "sample: share must be a number, got True"),
            ({"most-rows": 1.5}, "sample: most-rows must be a whole number, got 1.5"),
            ({"most-rows": [1]}, "sample: most-rows must be a whole number, got [1]"),
            ({"fast": "yes"}, "sample: fast must be true or false, got 'yes'"),
            ({"label": {"a": 1}}, "sample: label must be text, got {'a': 1}"),
            ({"most-rows": 1, "most_rows": 1}, "sample: option 'most-rows' is given twice"),
        ],
    )
    def test_of_the_wrong_kind_are_refused(self, values: dict[str, Any], message: str) -> None:
        with pytest.raises(OptionError) as caught:
            convert_options("sample", Sample, values)
        assert str(caught.value).startswith(message)

    def test_become_arguments(self) -> None:
        assert convert_options("sample", Sample, {"least": "none"}) == {"least": None}
        assert convert_options("sample", Sample, {"most-rows": 2, "share": 1, "fast": False}) == {
            "most_rows": 2,
            "share": 1,
            "fast": False,
        }

    def test_for_some_layers_must_be_options_of_a_site(self) -> None:
        assert convert_options("rule", Sample, {"share": 0.1}, per_site=True) == {"share": 0.1}
        assert convert_options("pass", Sample, {"mode": "fancy"}) == {"mode": "fancy"}
        with pytest.raises(OptionError, match="^rule: option 'mode' holds for the whole pass; a rule cannot set it$"):
            convert_options("rule", Sample, {"mode": "fancy"}, per_site=True)

    def test_of_any_size_are_refused_by_range(self) -> None:
        values = convert_options("sample", Sample, {"share": 10**400})
        with pytest.raises(OptionError, match="sample: share must be a number from 0 to 1, got 1000"):
            Sample(**values)


def test_infos_say_what_people_need() -> None:
    infos = {info.name: info for info in option_infos(Sample)}
    assert list(infos) == ["share", "most-rows", "least", "limit", "fast", "mode", "label", "old"]
    assert infos["share"] == OptionInfo("share", "a number", 0.5, "a number from 0 to 1", "a share", True)
    assert (infos["least"].type, infos["least"].allowed) == ("a whole number or none", "a whole number, at least 2")
    assert (infos["mode"].allowed, infos["mode"].per_site) == ("one of plain, fancy", False)
    assert [infos[name].allowed for name in ("fast", "label", "limit")] == [
        "true or false",
        "text",
        "a number, at most 8",
    ]


def test_the_nearest_word_is_suggested() -> None:
    assert did_you_mean("sparsty", ["sparsity", "scope"]) == "did you mean 'sparsity'? Known: scope, sparsity"
    assert did_you_mean("zzz", ["b", "a"]) == "known: a, b"
    assert did_you_mean("zzz", []) == "known: none"
