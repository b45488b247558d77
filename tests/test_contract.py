"""What a pass is given: rules that pick options for a site, randomness that depends on the site, work in order."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxshrink.contract import Context, Pass, Report, Rule, Step
from onnxshrink.errors import OptionError
from onnxshrink.graph.ir import Graph
from onnxshrink.options import option


@dataclass(frozen=True, kw_only=True)
class Dial(Pass):
    """Does nothing, at two settings."""

    name: ClassVar[str] = "dial"
    level: int = option(0, "how much", low=0, high=9)
    width: int = option(0, "how wide", low=0, high=9)

    def apply(self, graph: Graph, context: Context) -> Report:
        return Report()


class TestRules:
    @pytest.mark.parametrize(
        ("pattern", "names", "expected"),
        [
            ("*", ["anything"], True),
            ("*", [], False),
            ("*/layer4/*", ["a/layer4/b"], True),
            ("*/layer4/*", ["layer4/b"], False),
            ("*/layer4/*", ["other", "x/layer4/"], True),
            ("conv?", ["conv1"], True),
            ("conv?", ["conv12"], False),
            ("conv[12]", ["conv2"], True),
            ("conv[12]", ["conv3"], False),
            ("Conv", ["conv"], False),
            ("conv", ["conv", "other"], True),
            ("", [""], True),
            ("", ["w"], False),
        ],
    )
    def test_match_by_case_sensitive_glob_on_any_name(self, pattern: str, names: list[str], expected: bool) -> None:
        assert Rule(pattern).matches(names) is expected

    def test_the_last_match_wins_option_by_option(self) -> None:
        rules = [Rule("w*", {"level": 1, "width": 1}), Rule("*2", {"level": 2}), Rule("other", {"width": 9})]
        context = Context(rules=rules)
        assert context.options(Dial(width=5), ["w2"]) == Dial(level=2, width=1)
        assert context.options(Dial(width=5), ["w1"]) == Dial(level=1, width=1)
        assert context.options(Dial(width=5), ["v2"]) == Dial(level=2, width=5)
        assert context.options(Dial(width=5), ["v"]) == Dial(width=5)
        assert context.options(Dial(width=5), []) == Dial(width=5)

    def test_skip_is_undone_by_a_later_match(self) -> None:
        rules = [Rule("w*", skip=True), Rule("w2", {"level": 3}, skip=False), Rule("w3", {"level": 4})]
        context = Context(rules=rules)
        assert context.options(Dial(), ["w1"]) is None
        assert context.options(Dial(), ["w2"]) == Dial(level=3)
        assert context.options(Dial(), ["w3"]) is None, "a rule that says nothing of skipping leaves that as it was"

    def test_values_out_of_range_do_not_get_through(self) -> None:
        with pytest.raises(OptionError, match="dial: level must be a whole number from 0 to 9, got 10"):
            Context(rules=[Rule("*", {"level": 10})]).options(Dial(), ["w"])

    def test_unmet_rules_are_those_that_no_site_matched(self) -> None:
        context = Context(rules=[Rule("w*"), Rule("misspelt"), Rule("v")])
        assert context.unmet_rules == ["w*", "misspelt", "v"]
        context.options(Dial(), ["w1"])
        context.options(Dial(), ["v"])
        assert context.unmet_rules == ["misspelt"]
        assert Context(rules=context.rules).unmet_rules == ["w*", "misspelt", "v"]  # each run counts anew

    @settings(deadline=None)
    @given(
        st.lists(
            st.builds(
                Rule,
                st.sampled_from(["*", "a", "b", "a*", "*b", "?"]),
                st.dictionaries(st.sampled_from(["level", "width"]), st.integers(0, 9)),
                st.none() | st.booleans(),
            ),
            max_size=6,
        ),
        st.text("ab", max_size=3),
    )
    def test_are_resolved_as_if_each_were_applied_in_turn(self, rules: list[Rule], name: str) -> None:
        fits = {
            "*": True,
            "a": name == "a",
            "b": name == "b",
            "a*": name.startswith("a"),
            "*b": name.endswith("b"),
            "?": len(name) == 1,
        }
        expected: Mapping[str, Any] = {"level": 5, "width": 5}
        skip = False
        for rule in rules:
            if fits[rule.match]:
                expected, skip = {**expected, **rule.options}, skip if rule.skip is None else rule.skip
        got = Context(rules=rules).options(Dial(level=5, width=5), [name])
        assert got == (None if skip else Dial(**expected))


    def test_are_applied_one_after_the_other(self) -> None:
        """So that a pass can let what a later one sets take the place of what an earlier one did."""

        @dataclass(frozen=True, kw_only=True)
        class Either(Dial):
            """At one setting or the other."""

            def __post_init__(self) -> None:
                super().__post_init__()
                if self.level and self.width:
                    raise OptionError("either: level and width both set it")

            def with_options(self, options: Mapping[str, Any]) -> Either:
                return dataclasses.replace(self, **{**dict.fromkeys(("level", "width") if any(options.values()) else (), 0), **options})

        rules = [Rule("*", {"level": 1}), Rule("*2", {"width": 2}), Rule("w*", {}), Rule("w3", {"width": 3}), Rule("w3", {"level": 4})]
        context = Context(rules=rules)
        assert context.options(Either(width=9), ["w1"]) == Either(level=1)
        assert context.options(Either(width=9), ["w2"]) == Either(width=2)
        assert context.options(Either(width=9), ["w3"]) == Either(level=4)
        assert Context().options(Either(width=9), ["w3"]) == Either(width=9)
        with pytest.raises(OptionError, match="^either: level and width both set it$"):
            Context(rules=[Rule("*", {"level": 1, "width": 1})]).options(Either(), ["w"])


class TestRandomness:
    def test_depends_on_seed_and_site_alone(self) -> None:
        def draw(seed: int, site: str) -> int:
            return int(Context(seed=seed).rng(site).integers(2**62))

        cases = list(itertools.product((0, 1, 12345), ("", "w", "w2", "a/ä")))
        first = [draw(*case) for case in cases]
        assert [draw(*case) for case in reversed(cases)] == first[::-1]
        assert len(set(first)) == len(first)

    def test_one_context_gives_a_site_the_same_numbers_again(self) -> None:
        context = Context(seed=3)
        first = context.rng("w").random(4)
        context.rng("v").random(100)
        np.testing.assert_array_equal(context.rng("w").random(4), first)


class TestWork:
    @pytest.mark.parametrize("threads", [0, 3])
    def test_results_come_in_order_and_progress_counts_them(self, threads: int) -> None:
        seen: list[tuple[int, int]] = []
        with ThreadPoolExecutor(max(threads, 1)) as executor:
            context = Context(
                executor=executor if threads else None, progress=lambda done, total: seen.append((done, total))
            )
            assert context.map(lambda number: number * number, range(5)) == [0, 1, 4, 9, 16]
        assert seen == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]

    @pytest.mark.parametrize("threads", [0, 3])
    def test_a_part_of_the_work_counts_on_from_what_was_done(self, threads: int) -> None:
        seen: list[tuple[int, int]] = []
        with ThreadPoolExecutor(max(threads, 1)) as executor:
            context = Context(
                executor=executor if threads else None, progress=lambda done, total: seen.append((done, total))
            )
            assert context.map(str, [1, 2, 3], 0, 5) == ["1", "2", "3"]
            assert context.map(str, [], 3, 5) == []
            assert context.map(str, [4, 5], done=3, total=5) == ["4", "5"]
            assert context.map(str, [6], done=2) == ["6"]
        assert seen == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5), (3, 1)]

    def test_the_executor_does_it(self) -> None:
        import threading

        with ThreadPoolExecutor(1, thread_name_prefix="worker") as executor:
            names = Context(executor=executor).map(lambda _: threading.current_thread().name, [1, 2])
        assert all(name.startswith("worker") for name in names)

    def test_what_a_site_raises_comes_out(self) -> None:
        with ThreadPoolExecutor(2) as executor, pytest.raises(ZeroDivisionError):
            Context(executor=executor).map(lambda number: 1 // number, [1, 0, 1])


class TestPass:
    def test_is_abstract_and_frozen(self) -> None:
        with pytest.raises(TypeError, match="abstract"):
            Pass()  # type: ignore[abstract]
        with pytest.raises(dataclasses.FrozenInstanceError):
            Dial().level = 3  # type: ignore[misc]
        with pytest.raises(TypeError):
            Dial(3)  # type: ignore[misc]

    def test_has_nothing_weaker_unless_it_says_so(self) -> None:
        assert Dial(level=9).weaker() is None

    def test_rounds_no_weights_unless_it_says_so(self) -> None:
        assert not Dial.rounds_weights
        assert not Context().rounded_later

    def test_is_its_options(self) -> None:
        assert Dial(level=2) == Dial(level=2) != Dial(level=3)
        assert Step(Dial()) == Step(Dial(), ())
