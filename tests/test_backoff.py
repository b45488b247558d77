"""Which sites are spared: against every possible choice, and against the rules that carry the choice out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxshrink.backoff import SiteError, only, probe, without, worst_per_byte
from onnxshrink.contract import Change, Context, Pass, Report, Rule, Step
from onnxshrink.graph.ir import Graph
from onnxshrink.options import option


@dataclass(frozen=True, kw_only=True)
class Plain(Pass):
    """Does nothing."""

    name: ClassVar[str] = "plain"
    level: int = option(0, "how much", low=0, high=9)

    def apply(self, graph: Graph, context: Context) -> Report:
        return Report()


@dataclass(frozen=True, kw_only=True)
class Gentle(Plain):
    """Does nothing, and less of it to sites that are spared."""

    name: ClassVar[str] = "gentle"

    def spared(self) -> Mapping[str, Any]:
        return {"level": 1}


def chosen(step: Step, site: str) -> Pass | None:
    return Context(rules=step.rules).options(step.run, [site])


SITES = ["a", "b", "layer[0]/w", "layer0/w", "*", "what?"]


class TestSteps:
    @pytest.mark.parametrize("site", SITES)
    def test_only_one_site_is_left_whatever_its_name(self, site: str) -> None:
        step = only(Step(Plain(level=5), [Rule("b", {"level": 2}), Rule("?", {"level": 3})]), site)
        acting = {name: found for name in SITES if (found := chosen(step, name)) is not None}
        level = {"a": 3, "b": 3, "*": 3}.get(site, 5)
        assert acting == {site: Plain(level=level)}

    @pytest.mark.parametrize("spared", [[], ["a"], ["layer[0]/w", "*"], SITES])
    def test_spared_sites_are_left_alone_whatever_their_names(self, spared: list[str]) -> None:
        step = without(Step(Plain(level=5), [Rule("b", {"level": 2})]), spared)
        assert {name for name in SITES if chosen(step, name) is None} == set(spared)
        assert chosen(without(Step(Plain(level=5), [Rule("b", {"level": 2})]), ["a"]), "b") == Plain(level=2)

    def test_spared_sites_get_what_the_pass_has_for_them(self) -> None:
        step = without(Step(Gentle(level=5), [Rule("*", {"level": 7})]), ["a"])
        assert chosen(step, "a") == Gentle(level=1)
        assert chosen(step, "b") == Gentle(level=7)


def errors_of(values: list[tuple[float, int]]) -> list[SiteError]:
    return [SiteError(f"site{index:02}", squared, saved) for index, (squared, saved) in enumerate(values)]


COSTS = st.floats(0, 100) | st.just(math.inf)
ERRORS = st.lists(st.tuples(COSTS, st.integers(1, 1000)), max_size=7).map(errors_of)


class TestChoice:
    def test_is_the_worst_for_their_bytes(self) -> None:
        errors = [SiteError("big", 4.0, 1000), SiteError("small", 3.0, 10), SiteError("fine", 0.1, 10)]
        assert worst_per_byte(errors, 100) == []
        assert worst_per_byte(errors, 5) == ["small"]
        assert worst_per_byte(errors, 3) == ["small", "fine", "big"]
        assert worst_per_byte(errors, 0) == ["small", "fine", "big"]

    def test_a_site_that_fails_always_goes(self) -> None:
        errors = [SiteError("a", 1.0, 1), SiteError("bad", math.inf, 10**9), SiteError("b", 1.0, 1)]
        assert worst_per_byte(errors, 1e300) == ["bad"]
        assert worst_per_byte(errors, 2.0) == ["bad"]
        assert worst_per_byte(errors, 1.0) == ["bad", "a"]

    def test_a_budget_of_their_exact_sum_spares_none(self) -> None:
        values = [0.1] * 10 + [1e-9, 3.3, 1e12]
        for order in (values, values[::-1]):
            assert worst_per_byte(errors_of([(value, 7) for value in order]), math.fsum(values)) == []

    @settings(deadline=None)
    @given(ERRORS, st.floats(0, 200))
    def test_keeps_within_the_budget_and_spares_no_more_than_it_must(
        self, errors: list[SiteError], budget: float
    ) -> None:
        spared = worst_per_byte(errors, budget)
        assert len(spared) == len(set(spared))
        kept = [error for error in errors if error.site not in spared]
        assert math.fsum(error.squared_drift for error in kept) <= budget
        if spared:
            last = next(error for error in errors if error.site == spared[-1])
            assert math.fsum([last.squared_drift, *(error.squared_drift for error in kept)]) > budget
        density = {error.site: error.squared_drift / error.bytes_saved for error in errors}
        assert all(density[gone] >= density[error.site] for gone in spared for error in kept)

    @settings(deadline=None, max_examples=60)
    @given(st.lists(st.tuples(st.floats(0, 10), st.integers(1, 50)), max_size=7).map(errors_of), st.floats(0, 30))
    def test_saves_nearly_what_the_best_choice_would(self, errors: list[SiteError], budget: float) -> None:
        """Greedy loses at most the bytes of the one site at the boundary (Dantzig 1957)."""
        spared = worst_per_byte(errors, budget)
        saved = sum(error.bytes_saved for error in errors if error.site not in spared)
        best = max(
            sum(error.bytes_saved for error in kept)
            for size in range(len(errors) + 1)
            for kept in itertools.combinations(errors, size)
            if math.fsum(error.squared_drift for error in kept) <= budget
        )
        boundary = next((error.bytes_saved for error in errors if spared and error.site == spared[-1]), 0)
        assert saved >= best - boundary


def test_each_change_is_probed_once() -> None:
    asked: list[str] = []
    drifts = {"a": 0.5, "b": None, "c": 0.0}

    def drift_of(site: str) -> float | None:
        asked.append(site)
        return drifts[site]

    changes = [Change("a", 100, 40, "-"), Change("b", 10, 10, "-"), Change("c", 10, 30, "-")]
    assert probe(changes, drift_of) == [SiteError("a", 0.25, 60), SiteError("b", math.inf, 1), SiteError("c", 0.0, 1)]
    assert asked == ["a", "b", "c"]
