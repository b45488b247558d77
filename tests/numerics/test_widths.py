"""Tests of the choice of widths: against every combination of small problems whose costs are products of neighbors' widths."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxshrink.numerics.widths import Ladder, choose_widths, rungs, uniform_widths


class Problem:
    """A few groups with losses that grow as they get narrower, and the work of layers between them."""

    def __init__(self, seed: int, groups: int, convex: bool = True) -> None:
        rng = np.random.default_rng(seed)
        self.ladders = []
        for _ in range(groups):
            widths = np.sort(rng.choice(np.arange(1, 40), rng.integers(1, 6), replace=False))[::-1]
            steps = rng.exponential(size=len(widths) - 1)
            steps = np.sort(steps) if convex else steps
            self.ladders.append(Ladder(widths, np.concatenate([[0.0], np.cumsum(steps)])))
        self.pairs = np.triu(rng.exponential(size=(groups, groups)) * (rng.random((groups, groups)) < 0.6), 1)
        self.alone = rng.exponential(size=groups) * 10

    def costs(self, widths):
        wide = np.asarray(widths, np.float64)
        return 5.0 + wide @ self.alone + np.einsum("...i,ij,...j->...", wide, self.pairs, wide)

    def loss(self, widths) -> float:
        return sum(float(one.losses[list(one.widths).index(width)]) for one, width in zip(self.ladders, widths, strict=True))

    def every(self):
        return np.array(list(itertools.product(*(ladder.widths for ladder in self.ladders))))

    @property
    def full(self):
        return np.array([ladder.widths[0] for ladder in self.ladders])

    @property
    def narrowest(self):
        return np.array([ladder.widths[-1] for ladder in self.ladders])

    def best(self, budget: float) -> float:
        every = self.every()
        return min(self.loss(widths) for widths in every[self.costs(every) <= budget])


problems = st.builds(Problem, st.integers(0, 100_000), st.integers(1, 4), st.booleans())


@given(problem=problems, share=st.floats(0, 1))
def test_the_budget_holds_wherever_it_can(problem, share):
    budget = share * float(problem.costs(problem.full))
    for choose in (choose_widths, uniform_widths):
        found = choose(problem.ladders, problem.costs, budget)
        assert all(width in ladder.widths for width, ladder in zip(found, problem.ladders, strict=True))
        if problem.costs(problem.narrowest) <= budget:
            assert problem.costs(found) <= budget
        else:
            np.testing.assert_array_equal(found, problem.narrowest)


@given(problem=problems, share=st.floats(0, 1))
def test_no_single_group_could_be_wider(problem, share):
    budget = share * float(problem.costs(problem.full))
    found = choose_widths(problem.ladders, problem.costs, budget)
    for group, ladder in enumerate(problem.ladders):
        for width in ladder.widths[ladder.widths > found[group]]:
            wider = found.copy()
            wider[group] = width
            gain = problem.loss(found) - problem.loss(wider)
            assert problem.costs(wider) > budget or gain <= 1e-12


@given(problem=problems, share=st.floats(0, 1))
def test_the_loss_is_near_the_least_there_is(problem, share):
    budget = share * float(problem.costs(problem.full))
    if problem.costs(problem.narrowest) <= budget:
        found = problem.loss(choose_widths(problem.ladders, problem.costs, budget))
        assert problem.best(budget) - 1e-9 <= found <= 3 * problem.best(budget) + 1e-9


def test_the_loss_is_mostly_the_least_there_is():
    ratios = []
    for seed in range(150):
        problem = Problem(seed, 4)
        budget = 0.6 * float(problem.costs(problem.full))
        if problem.costs(problem.narrowest) <= budget and problem.best(budget) > 0:
            ratios.append(problem.loss(choose_widths(problem.ladders, problem.costs, budget)) / problem.best(budget))
    assert len(ratios) > 80
    assert np.quantile(ratios, 0.8) < 1 + 1e-9
    assert np.mean(ratios) < 1.05


def test_an_exchange_mends_a_greedy_step():
    """The group that loses least for what it saves saves too little, and the next one then more than enough."""
    ladders = [Ladder(np.array([10, 9]), np.array([0.0, 0.1])), Ladder(np.array([10, 5]), np.array([0.0, 1.0]))]
    found = choose_widths(ladders, lambda widths: np.asarray(widths, np.float64).sum(axis=-1), 15.0)
    assert list(found) == [10, 5]


def test_what_costs_nothing_stays():
    ladders = [Ladder(np.array([8, 4]), np.array([0.0, 0.0])), Ladder(np.array([8, 4]), np.array([0.0, 1.0]))]
    found = choose_widths(ladders, lambda widths: np.asarray(widths, np.float64)[..., 1], 4.0)
    assert list(found) == [8, 4]


@pytest.mark.parametrize("choose", [choose_widths, uniform_widths])
def test_no_groups_no_widths(choose):
    found = choose([], lambda widths: np.asarray(widths, np.float64).sum(axis=-1) + 7.0, 1.0)
    assert found.shape == (0,)


@pytest.mark.parametrize("share", [0.15, 0.5, 0.77, 1.0])
def test_uniform_widths_are_as_near_to_one_share_as_they_can_be(share):
    ladders = [Ladder(np.arange(size, 0, -step), np.zeros(len(range(size, 0, -step)))) for size, step in ((64, 1), (30, 2), (16, 8))]
    total = sum(ladder.widths[0] for ladder in ladders)
    found = uniform_widths(ladders, lambda widths: np.asarray(widths, np.float64).sum(axis=-1), share * total)
    assert found.sum() <= share * total
    assert abs(found[0] / 64 - share) < 0.11  # the coarse ladder may take more than its share
    for width, ladder in zip(found, ladders, strict=True):
        away = np.abs(ladder.widths / ladder.widths[0] - found[0] / 64)
        assert abs(width / ladder.widths[0] - found[0] / 64) <= away.min() + 1 / 64


@given(size=st.integers(1, 200), block=st.integers(1, 40), least=st.integers(0, 250), most=st.integers(2, 30))
def test_rungs_are_multiples_of_the_block_below_the_full_size(size: int, block: int, least: int, most: int) -> None:
    every = rungs(size, block, least)
    assert list(every) == [size, *(width for width in range((size - 1) // block * block, 0, -block) if width >= max(least, 1))]
    few = rungs(size, block, least, most)
    assert set(few) <= set(every)
    assert len(few) == min(len(every), most + 1)
    assert (few[0], few[-1]) == (every[0], every[-1])


@pytest.mark.parametrize(
    ("size", "block", "least", "expected"),
    [(64, 16, 0, [64, 48, 32, 16]), (60, 16, 20, [60, 48, 32]), (16, 16, 0, [16]), (5, 1, 2, [5, 4, 3, 2]), (1, 1, 0, [1]), (4, 1, 9, [4])],
)
def test_rungs(size, block, least, expected):
    assert rungs(size, block, least).tolist() == expected
