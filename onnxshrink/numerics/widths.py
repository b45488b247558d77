"""How many channels each group keeps, so that a cost that depends on all of them stays within a budget at the least loss.

The work of a layer is the product of what comes in and what goes out, so what a channel costs depends on the widths of its neighbours and
no knapsack by itself will do. Widths start full; the group and the width that lose least for what they save are taken, the cost is
computed anew, and so on until the budget is met. Then pairs are tried: one group wider and another narrower, as long as that loses less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from onnxshrink.numerics.chunks import Array

__all__ = ["Ladder", "choose_widths", "rungs", "uniform_widths"]

Costs = Callable[[Array], Array]
"""f(widths float64 [..., groups]) -> cost [...], which never grows when a width shrinks."""

_SWAPS = 200
_NOTHING = 1e-9  # of the loss: below it an exchange gains nothing


@dataclass(frozen=True, eq=False)
class Ladder:
    """The widths that a group may take.

    Attributes:
        widths: int [rungs], descending, the first being the full one.
        losses: float64 [rungs]: what each loses, ascending from 0; losses of groups add up.
    """

    widths: Array
    losses: Array


def rungs(size: int, block: int, least: int, most: int | None = None) -> Array:
    """Returns the widths that a group may take, descending from its full size.

    Args:
        size: how many channels it has.
        block: widths below are multiples of it.
        least: the smallest.
        most: how many widths there are at most, about evenly spread, the narrowest among them; None for all.
    """
    below = np.arange((size - 1) // block * block, max(least, 1) - 1, -block, dtype=np.int64)
    if most is not None and len(below) > most:
        below = below[np.unique(np.linspace(0, len(below) - 1, most).round().astype(np.int64))]
    return np.concatenate([[size], below]).astype(np.int64)


def uniform_widths(ladders: Sequence[Ladder], costs: Costs, budget: float) -> Array:
    """Returns widths of the same share of every group, each the nearest that it may take, within the budget where that is possible.

    Args:
        ladders: of the groups.
        costs: of widths.
        budget: that the cost should not exceed.
    """
    low, high = 0.0, 1.0
    best = np.array([ladder.widths[-1] for ladder in ladders], np.int64)
    for _ in range(30):
        middle = (low + high) / 2
        widths = np.array([_nearest(ladder.widths, middle) for ladder in ladders], np.int64)
        if costs(widths) <= budget:
            best, low = widths, middle
        else:
            high = middle
    return best


def choose_widths(ladders: Sequence[Ladder], costs: Costs, budget: float) -> Array:
    """Returns the widths, int [groups]: of small total loss within the budget, the narrowest of all where it cannot be met.

    Args:
        ladders: of the groups.
        costs: of widths.
        budget: that the cost should not exceed.
    """
    at = np.zeros(len(ladders), np.int64)
    moves = _moves(ladders)
    while costs(_widths(ladders, at)) > budget:
        step = _best_step(ladders, moves, at, costs, budget)
        if step is None:
            break
        at[step[0]] = step[1]
    return _widths(ladders, _improved(ladders, at, costs, budget))


def _nearest(widths: Array, share: float) -> int:
    return int(widths[np.argmin(np.abs(widths - share * widths[0]))])


def _widths(ladders: Sequence[Ladder], at: Array) -> Array:
    return np.array([ladder.widths[rung] for ladder, rung in zip(ladders, at, strict=True)], np.int64)


def _moves(ladders: Sequence[Ladder]) -> Array:
    """Returns every (group, rung): [moves, 2]."""
    pairs = [(group, rung) for group, ladder in enumerate(ladders) for rung in range(len(ladder.widths))]
    return np.array(pairs, np.int64).reshape(-1, 2)


def _after(ladders: Sequence[Ladder], moves: Array, at: Array) -> Array:
    """Returns the widths after each move alone: [moves, groups]."""
    widths = np.repeat(_widths(ladders, at)[None], len(moves), axis=0)
    widths[np.arange(len(moves)), moves[:, 0]] = [ladders[group].widths[rung] for group, rung in moves]
    return widths


def _losses(ladders: Sequence[Ladder], moves: Array, at: Array) -> Array:
    """Returns what each move loses beyond what is lost now: [moves]."""
    now = np.array([ladder.losses[rung] for ladder, rung in zip(ladders, at, strict=True)])
    return np.array([ladders[group].losses[rung] - now[group] for group, rung in moves])


def _best_step(
    ladders: Sequence[Ladder], moves: Array, at: Array, costs: Costs, budget: float
) -> tuple[int, int] | None:
    """Returns the move down that loses least for what it saves; what it saves beyond the budget does not count."""
    down = moves[moves[:, 1] > at[moves[:, 0]]]
    if not len(down):
        return None
    saved = float(costs(_widths(ladders, at))) - np.maximum(costs(_after(ladders, down, at)), budget)
    useful = saved > 0
    if not useful.any():
        return None
    down, rates = down[useful], _losses(ladders, down[useful], at) / saved[useful]
    group, rung = down[int(np.argmin(rates))]
    return int(group), int(rung)


def _improved(ladders: Sequence[Ladder], at: Array, costs: Costs, budget: float) -> Array:
    """Returns rungs that lose no more and cost no more than the budget, by single moves up and by exchanges of two groups."""
    at, moves = at.copy(), _moves(ladders)
    if costs(_widths(ladders, at)) > budget:
        return at
    for _ in range(_SWAPS):
        lost = sum(float(ladder.losses[rung]) for ladder, rung in zip(ladders, at, strict=True))
        found: tuple[float, list[tuple[int, int]]] = (-_NOTHING * lost, [])
        up = [(int(group), int(at[group]) - 1) for group in range(len(ladders)) if at[group] > 0]
        for group, rung in up:
            trial = at.copy()
            trial[group] = rung
            gain = ladders[group].losses[rung] - ladders[group].losses[at[group]]
            if costs(_widths(ladders, trial)) <= budget:
                found = min(found, (gain, [(group, rung)]))
                continue
            down = moves[(moves[:, 1] > trial[moves[:, 0]]) & (moves[:, 0] != group)]
            fits = down[costs(_after(ladders, down, trial)) <= budget] if len(down) else down
            if len(fits):
                losses = _losses(ladders, fits, trial)
                best = int(np.argmin(losses))
                found = min(found, (gain + float(losses[best]), [(group, rung), (int(fits[best, 0]), int(fits[best, 1]))]))
        if not found[1]:
            return at
        for group, rung in found[1]:
            at[group] = rung
    return at
