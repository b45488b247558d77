"""Recipes: what a TOML file and ``--pass`` may say, and one clear error for everything else.

The fuzz tests draw from the recipes' own vocabulary and from anything TOML can hold; ONNXSHRINK_FUZZ_EXAMPLES raises their number.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from onnxshrink.contract import Rule, Step
from onnxshrink.errors import OptionError, RecipeError, RegistryError
from onnxshrink.options import option_infos
from onnxshrink.passes.huffman import Huffman
from onnxshrink.passes.share_weights import ShareWeights
from onnxshrink.passes.sparsify import Sparsify
from onnxshrink.passes.tidy import Tidy
from onnxshrink.recipe import FORMAT, Recipe, default_recipe, parse_pass, parse_recipe, read_recipe
from onnxshrink.registry import pass_class, pass_names
from onnxshrink.validate import Tolerance

EXAMPLES = int(os.environ.get("ONNXSHRINK_FUZZ_EXAMPLES", "150"))

WHOLE = """
format = 1

[tolerance]
min-sqnr = 30
max-drift = 0.05
min-agreement = 0.99

[[pass]]
name = "tidy"

[[pass]]
name = "sparsify"
options = { sparsity = 0.25, pattern = "unstructured", scope = "global" }

[[pass]]
name = "share-weights"
[pass.options]
bits = 6

[[pass.rule]]
match = "*/layer4/*"
options = { bits = 8, per = "channel" }

[[pass.rule]]
match = "head*"
skip = true
"""


def of(body: str) -> str:
    return f"format = 1\n{body}"


def entry(body: str) -> str:
    return of(f"[[pass]]\n{body}")


class TestReading:
    def test_a_whole_recipe(self) -> None:
        assert parse_recipe(WHOLE) == Recipe(
            (
                Step(Tidy()),
                Step(Sparsify(sparsity=0.25, scope="global")),
                Step(
                    ShareWeights(bits=6),
                    (Rule("*/layer4/*", {"bits": 8, "per": "channel"}), Rule("head*", {}, skip=True)),
                ),
            ),
            Tolerance(min_sqnr_db=30.0, max_drift=0.05, min_agreement=0.99),
        )

    def test_the_least_recipe_does_and_limits_nothing(self) -> None:
        recipe = parse_recipe("format = 1")
        assert recipe == Recipe(())
        assert not recipe.tolerance.is_set

    def test_the_default_tidies_shares_and_codes_within_30_db(self) -> None:
        steps = (Step(Tidy()), Step(ShareWeights(bits=8)), Step(Huffman()))
        assert default_recipe() == Recipe(steps, Tolerance(min_sqnr_db=30.0))

    @pytest.mark.parametrize(
        ("limits", "sqnr"),
        [
            (None, 30.0),
            (Tolerance(), 30.0),
            (Tolerance(min_sqnr_db=22.0), 22.0),
            (Tolerance(max_drift=0.01), 40.0),
            (Tolerance(max_drift=0.1, min_sqnr_db=35.0), 35.0),
            (Tolerance(min_agreement=0.99), 15.0),
            (Tolerance(min_sqnr_db=200.0), 100.0),
        ],
    )
    def test_with_calibration_data_the_default_aims_at_the_limit(self, limits: Tolerance | None, sqnr: float) -> None:
        recipe = default_recipe(limits, calibrated=True)
        assert [step.run for step in recipe.steps] == [Tidy(), ShareWeights(sqnr=recipe.steps[1].run.sqnr), Huffman()]
        assert recipe.steps[1].run.sqnr == pytest.approx(sqnr)
        assert recipe.tolerance == (limits if limits is not None and limits.is_set else Tolerance(min_sqnr_db=30.0))

    @pytest.mark.parametrize("name", pass_names())
    def test_every_option_can_be_set_to_its_default(self, name: str) -> None:
        cls = pass_class(name)
        values = {info.name: info.default for info in option_infos(cls) if info.default is not None}
        toml = ", ".join(f"{key} = {str(v).lower() if isinstance(v, bool) else repr(v)}" for key, v in values.items())
        assert parse_recipe(entry(f"name = '{name}'\noptions = {{ {toml} }}")).steps == (Step(cls()),)
        texts = ",".join(f"{key}={value}" for key, value in values.items())
        assert parse_pass(f"{name}:{texts}") == cls()

    def test_a_file_is_read_as_utf_8_and_named_in_errors(self, tmp_path: Path) -> None:
        path = tmp_path / "r.toml"
        path.write_bytes(entry('name = "share-weights"\n[[pass.rule]]\nmatch = "schicht_ä*"\nskip = true').encode())
        assert read_recipe(path).steps[0].rules[0].match == "schicht_ä*"
        path.write_text(of("tolerence = 3"))
        with pytest.raises(RecipeError, match=f"^recipe {path}: unknown key 'tolerence'; did you mean 'tolerance'"):
            read_recipe(path)

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (None, "cannot be read: No such file or directory"),
            (b"\xff\xfe\x00", "cannot be read: it is not UTF-8 text"),
            (b"", "format must be 1, got nothing; write: format = 1"),
            (b"<xml/>", "not valid TOML: "),
        ],
    )
    def test_a_file_that_is_no_recipe(self, tmp_path: Path, content: bytes | None, reason: str) -> None:
        path = tmp_path / "r.toml"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(RecipeError) as caught:
            read_recipe(path)
        assert str(caught.value).startswith(f"recipe {path}: {reason}")

    def test_a_folder_is_no_recipe(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match=f"^recipe {tmp_path}: cannot be read: Is a directory"):
            read_recipe(tmp_path)


SHARE = 'name = "share-weights"\n'
TOLERANCE = "[tolerance]\n"
RULE = entry(SHARE + "[[pass.rule]]\n")


REFUSED = [
    # keys, one level after the other
    (of("tolerence = {}"), "recipe: unknown key 'tolerence'; did you mean 'tolerance'? Known: format, pass, tolerance"),
    (of("[tolerance]\nmin_sqnr = 30"), "recipe, tolerance: unknown key 'min_sqnr'; did you mean 'min-sqnr'? Known: "),
    (entry('nane = "tidy"'), "recipe, pass 1: unknown key 'nane'; did you mean 'name'? Known: name, options, rule"),
    (entry("options = {}"), 'recipe, pass 1: name must be given, e.g. name = "share-weights"'),
    (entry('name = "tidi"'), "recipe, pass 1: unknown pass 'tidi'; did you mean 'tidy'? Known: "),
    (
        entry(SHARE + "options = { bit = 3 }"),
        "recipe, pass 1: share-weights: unknown option 'bit'; did you mean 'bits'? Known: bits, bits-per-weight, ",
    ),
    (
        f"{entry(SHARE)}\n[[pass]]\nnmae = 3",
        "recipe, pass 2: unknown key 'nmae'; did you mean 'name'? Known: name, options, rule",
    ),
    (RULE + "matches = '*'", "recipe, pass 1, rule 1: unknown key 'matches'; did you mean 'match'? Known: "),
    (RULE + "skip = true", 'recipe, pass 1, rule 1: match must be given, e.g. match = "*/layer4/*"'),
    (
        RULE + "match = '*'\nskip = true\n[[pass.rule]]\nmatch = '*'\noptions = { bitss = 3 }",
        "recipe, pass 1, rule 2: share-weights: unknown option 'bitss'; did you mean 'bits'?",
    ),
    # types
    ("format = '1'", "recipe: format must be a number, got '1'"),
    ("format = 1.0", "recipe: format must be a number, got 1.0"),
    ("format = true", "recipe: format must be a number, got True"),
    (of("pass = {}"), "recipe: pass must be a list, got {}"),
    (of("pass = ['tidy']"), "recipe, pass 1: entry must be a table, got 'tidy'"),
    (of("tolerance = 30"), "recipe: tolerance must be a table, got 30"),
    (of(TOLERANCE + "min-sqnr = '30'"), "recipe, tolerance: min-sqnr must be a number, got '30'"),
    (of(TOLERANCE + "min-sqnr = true"), "recipe, tolerance: min-sqnr must be a number, got True"),
    (entry("name = 3"), "recipe, pass 1: name must be a string, got 3"),
    (entry(SHARE + "options = 3"), "recipe, pass 1: options must be a table, got 3"),
    (entry(SHARE + "options = { bits = 3.0 }"), "recipe, pass 1: share-weights: bits must be a whole number, got 3.0"),
    (entry(SHARE + "options = { bits = '3' }"), "recipe, pass 1: share-weights: bits must be a whole number, got '3'"),
    (
        entry(SHARE + "options = { bits = true }"),
        "recipe, pass 1: share-weights: bits must be a whole number, got True",
    ),
    (entry(SHARE + "rule = {}"), "recipe, pass 1: rule must be a list, got {}"),
    (entry(SHARE + "rule = ['*']"), "recipe, pass 1, rule 1: entry must be a table, got '*'"),
    (RULE + "match = 3", "recipe, pass 1, rule 1: match must be a string, got 3"),
    (RULE + "match = '*'\nskip = 1", "recipe, pass 1, rule 1: skip must be a boolean, got 1"),
    # values
    ("format = 2", "recipe: format must be 1, got 2; write: format = 1"),
    (of(TOLERANCE + "min-agreement = 97"), "recipe, tolerance: min-agreement must be a number from 0 to 1, got 97"),
    (of(TOLERANCE + "max-drift = -1"), "recipe, tolerance: max-drift must be a number from 0 to 1e+15, got -1"),
    (of(TOLERANCE + "min-sqnr = nan"), "recipe, tolerance: min-sqnr-db must be a number from -300 to 300, got nan"),
    (entry(SHARE + "options = { bits = 0 }"), "recipe, pass 1: share-weights: bits must be "),
    (
        entry(SHARE + "options = { method = 'best' }"),
        "recipe, pass 1: share-weights: method must be one of auto, exact, ",
    ),
    (
        entry("name = 'sparsify'\noptions = { pattern = '2:2' }"),
        "recipe, pass 1: pattern: N of N:M must be at least 1 and below M, got 2:2; 2:4 keeps 2 of 4",
    ),
    (RULE + "match = '*'\noptions = { bits = 99 }", "recipe, pass 1, rule 1: share-weights: bits must be "),
    (
        entry("name = 'sparsify'\n[[pass.rule]]\nmatch = '*'\noptions = { scope = 'global' }"),
        "recipe, pass 1, rule 1: sparsify: option 'scope' holds for the whole pass; a rule cannot set it",
    ),
    # a rule is checked with the options it joins, not by itself
    (
        entry(
            "name = 'sparsify'\noptions = { pattern = '2:4' }\n[[pass.rule]]\nmatch = '*'\noptions = { sparsity = 0.7 }"
        ),
        "recipe, pass 1, rule 1: sparsify: sparsity must be 0.5 or left out for 2:4, got 0.7",
    ),
    # finds of the fuzz tests, and their kin
    (
        of(TOLERANCE + "min-sqnr = 1" + "0" * 400),
        "recipe, tolerance: min-sqnr-db must be a number from -300 to 300, got 1000",
    ),
    (
        entry("name = 'sparsify'\noptions = { sparsity = 1" + "0" * 400 + " }"),
        "recipe, pass 1: sparsify: sparsity must be a number from 0 to 1, got 1000",
    ),
    ("format = 1" + "0" * 5000, "recipe: not valid TOML: Exceeds the limit"),
    (entry(SHARE + "options = { bits = 0x1" + "0" * 5000 + " }"), "recipe: Exceeds the limit"),
    (of("pass = " + "[" * 5000), "recipe: not valid TOML: "),
    (of("format = 1"), "recipe: not valid TOML: "),
    (
        entry("name = 'tidy'\noptions = { fold-constants = true, fold_constants = false }"),
        "recipe, pass 1: tidy: option 'fold-constants' is given twice",
    ),
]


def test_a_pattern_of_a_rule_brings_its_own_sparsity() -> None:
    rule = "[[pass.rule]]\nmatch = 'w1'\noptions = { pattern = '2:4' }"
    (step,) = parse_recipe(entry(f"name = 'sparsify'\noptions = {{ sparsity = 0.7, scope = 'global' }}\n{rule}")).steps
    assert step.rules[0].options == {"pattern": "2:4"}


@pytest.mark.parametrize(("text", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_meant_is_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


class TestPassTexts:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("tidy", Tidy()),
            (" tidy ", Tidy()),
            ("tidy:", Tidy()),
            ("tidy:fold-constants=no,strip-notes=yes", Tidy(fold_constants=False, strip_notes=True)),
            ("share-weights:bits=3", ShareWeights(bits=3)),
            ("share-weights: bits = 3 , method = kmeans", ShareWeights(bits=3, method="kmeans")),
            ("share-weights:bits=3,", ShareWeights(bits=3)),
            ("sparsify:pattern=2:4", Sparsify(pattern="2:4")),
            ("sparsify:pattern=1x4,sparsity=.9", Sparsify(pattern="1x4", sparsity=0.9)),
            ("sparsify:sparsity=none", Sparsify()),
        ],
    )
    def test_are_read(self, text: str, expected: Any) -> None:
        assert parse_pass(text) == expected

    @pytest.mark.parametrize(
        ("text", "error", "message"),
        [
            ("", RegistryError, "unknown pass ''; known: "),
            ("tidi", RegistryError, "unknown pass 'tidi'; did you mean 'tidy'?"),
            ("Tidy", RegistryError, "unknown pass 'Tidy'; did you mean 'tidy'?"),
            ("share_weights", RegistryError, "unknown pass 'share_weights'; did you mean 'share-weights'?"),
            (
                "share-weights:bits",
                OptionError,
                "--pass share-weights: options must be key=value pairs, parted by commas, got 'bits'",
            ),
            ("share-weights:bits=", OptionError, "share-weights: bits must be a whole number, got ''"),
            ("share-weights:bits=3=4", OptionError, "share-weights: bits must be a whole number, got '3=4'"),
            ("share-weights:bits=33", OptionError, "share-weights: bits must be "),
            ("share-weights:bits=2,bits=3", OptionError, "--pass share-weights: option 'bits' is given twice"),
            ("share-weights:=3", OptionError, "share-weights: unknown option ''; known: bits, bits-per-weight, "),
            ("sparsify:sparsity=50%", OptionError, "sparsify: sparsity must be a number or none, got '50%'"),
        ],
    )
    def test_are_refused(self, text: str, error: type[Exception], message: str) -> None:
        with pytest.raises(error) as caught:
            parse_pass(text)
        assert str(caught.value).startswith(message)


def _vocabulary() -> list[str]:
    words = [
        "format",
        "tolerance",
        "pass",
        "name",
        "options",
        "rule",
        "match",
        "skip",
        "min-sqnr",
        "max-drift",
        "min-agreement",
    ]
    return [*words, *(info.name for name in pass_names() for info in option_infos(pass_class(name)))]


NAMES = st.sampled_from(pass_names())
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, 1, 2, 8, 0.5, 10**400])
SCALARS = (
    NUMBERS
    | st.booleans()
    | st.text(max_size=8)
    | st.sampled_from(["2:4", "1x4", "0:0", "kmeans", "global", *pass_names()])
)
KEYS = st.sampled_from(_vocabulary()) | st.text(max_size=6)
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=8
)
OPTIONS = st.dictionaries(KEYS, SCALARS, max_size=3) | TREES
RULES = st.fixed_dictionaries(
    {}, optional={"match": st.text(max_size=4) | TREES, "skip": st.booleans() | TREES, "options": OPTIONS}
)
STEPS = st.fixed_dictionaries(
    {"name": NAMES | SCALARS}, optional={"options": OPTIONS, "rule": st.lists(RULES, max_size=2) | TREES}
)
LIMITS = st.dictionaries(KEYS, SCALARS, max_size=3) | TREES
RECIPES = st.fixed_dictionaries(
    {"format": st.just(FORMAT) | SCALARS}, optional={"tolerance": LIMITS, "pass": st.lists(STEPS, max_size=3) | TREES}
)
FUZZ = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def to_toml(value: Any) -> str:
    """Writes a value as TOML, tables inline."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{to_toml(str(key))} = {to_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(to_toml, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + "".join(c if c.isalnum() and c.isascii() else f"\\U{ord(c):08x}" for c in value) + '"'
    return repr(value)


class TestFuzz:
    @FUZZ
    @given(RECIPES)
    def test_a_structured_recipe_is_read_or_refused(self, recipe: dict[str, Any]) -> None:
        text = "\n".join(f"{key} = {to_toml(value)}" for key, value in recipe.items())
        try:
            read = parse_recipe(text)
        except RecipeError as error:
            assert str(error).startswith("recipe")
            return
        assert [step.run.name for step in read.steps] == [step["name"] for step in recipe.get("pass", [])]
        assert [len(step.rules) for step in read.steps] == [
            len(step.get("rule", [])) for step in recipe.get("pass", [])
        ]
        for step, given_step in zip(read.steps, recipe.get("pass", []), strict=True):
            for key, value in given_step.get("options", {}).items():
                assert getattr(step.run, key.replace("-", "_")) == value

    @FUZZ
    @given(
        st.text()
        | st.lists(
            st.sampled_from([*_vocabulary(), "[", "]", "{", "}", "=", "\n", '"', "1", ".", "[[", "]]", "'"])
        ).map("".join)
    )
    def test_any_text_is_read_or_refused(self, text: str) -> None:
        try:
            assert isinstance(parse_recipe(text), Recipe)
        except RecipeError as error:
            assert str(error).startswith("recipe")

    @FUZZ
    @given(
        st.text()
        | st.tuples(NAMES, st.lists(st.tuples(KEYS, SCALARS.map(str)), max_size=3)).map(
            lambda pair: f"{pair[0]}:{','.join('='.join(item) for item in pair[1])}"
        )
    )
    @example("share-weights:bits=٣")  # int() reads the digits of every script
    def test_any_pass_text_is_read_or_refused(self, text: str) -> None:
        try:
            found = parse_pass(text)
        except (OptionError, RegistryError) as error:
            assert str(error)  # that it says anything
        else:
            assert found.name == text.partition(":")[0].strip()
