"""How many weights each layer keeps when all together keep a given share.

    uniform             the same share everywhere
    Erdos-Renyi-kernel  in proportion to the sum of a weight's sides over their product: narrow layers keep more (Evci et al.,
                        Rigging the Lottery, arXiv 1911.11134)
    global threshold    what one threshold over comparable scores of all layers leaves
    by sensitivity      the shares of least summed squared drift, by dynamic programming over measured curves (Frantar & Alistarh,
                        SPDY, arXiv 2201.13096)

Each layer's share may have a floor and a ceiling. The totals are exact, whichever bounds hold: shares are multiples of one number,
clipped to their bounds, and the number is solved for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxshrink.errors import must
from onnxshrink.numerics.chunks import Array

__all__ = [
    "Bounds",
    "Curve",
    "by_global_threshold",
    "by_sensitivity",
    "cubic_schedule",
    "erdos_renyi_kernel",
    "uniform",
]

_GRID = 100  # shares that a layer may take, beside none
_BUCKETS = 10_000  # of all weights, that the dynamic programming counts in


@dataclass(frozen=True)
class Bounds:
    """The least and the most that each layer may keep, float64 [layers]; 0 and 1 where nothing is said."""

    floor: Array
    ceiling: Array

    @classmethod
    def of(cls, layers: int, floor: Sequence[float] | None = None, ceiling: Sequence[float] | None = None) -> Bounds:
        """Returns the bounds of so many layers.

        Raises:
            ValueError: not as many as layers, or not 0 <= floor <= ceiling <= 1.
        """
        low = np.zeros(layers) if floor is None else np.asarray(floor, np.float64)
        high = np.ones(layers) if ceiling is None else np.asarray(ceiling, np.float64)
        if low.shape != (layers,) or high.shape != (layers,) or not ((low >= 0) & (low <= high) & (high <= 1)).all():
            raise ValueError(must("densities", "bounds", f"{layers} each, with 0 <= floor <= ceiling <= 1", (floor, ceiling)))
        return cls(low, high)


@dataclass(frozen=True, eq=False)
class Curve:
    """What zeros in one layer do, measured.

    Attributes:
        sparsities: [points], ascending, above 0 and at most 1.
        drifts: [points], squared relative changes of the model's outputs; made ascending where noise is not.
    """

    sparsities: Array
    drifts: Array

    def at(self, sparsity: Array) -> Array:
        """Returns the squared drift at any sparsities from 0 to 1, of their shape.

        Between the points the logarithm is interpolated. Below the first it goes with the cube: where the density of weights near zero
        is constant, the threshold grows with the share and the squares that are removed with its cube. Beyond the last it goes on as
        between the last two.
        """
        known, drifts = np.asarray(self.sparsities, np.float64), np.maximum.accumulate(np.asarray(self.drifts, np.float64))
        if known.ndim != 1 or known.shape != drifts.shape or not known.size or not (np.diff(known, prepend=0.0) > 0).all():
            raise ValueError(must("densities", "sparsities", "ascending, above 0, one for each drift", known))
        if not np.isfinite(drifts).all() or drifts[0] < 0 or known[-1] > 1:
            raise ValueError(must("densities", "drifts", "finite, not negative, up to a sparsity of 1", drifts))
        logs = np.log(np.maximum(drifts, np.finfo(np.float64).tiny))
        slope = (logs[-1] - logs[-2]) / (known[-1] - known[-2]) if known.size > 1 else 0.0
        found = np.interp(sparsity, known, logs) + slope * np.maximum(sparsity - known[-1], 0.0)
        near: Array = np.exp(np.minimum(found, 600.0)) * np.minimum(np.asarray(sparsity) / known[0], 1.0) ** 3
        return near


def uniform(sizes: Sequence[int], share_removed: float, bounds: Bounds | None = None) -> Array:
    """Returns the share that each layer keeps, the same for all within bounds.

    Args:
        sizes: how many weights each layer has.
        share_removed: of all weights together, from 0 to 1.
        bounds: of the shares, or None.

    Returns:
        float64 [layers].

    Raises:
        ValueError: a share or a size out of range, or a total that the bounds do not allow.
    """
    return _fill(sizes, np.ones(len(sizes)), share_removed, bounds)


def erdos_renyi_kernel(shapes: Sequence[tuple[int, ...]], share_removed: float, bounds: Bounds | None = None) -> Array:
    """Returns the share that each layer keeps, in proportion to the sum of the sides of its weight over their product.

    Args:
        shapes: of the weights, as convolutions and matrices have them: (out, in, kernel sides...).
        share_removed: of all weights together, from 0 to 1.
        bounds: of the shares, or None. No layer keeps more than all; what that leaves over goes to the others.

    Returns:
        float64 [layers].

    Raises:
        ValueError: a share or a side out of range, or a total that the bounds do not allow.
    """
    sizes = [int(np.prod(shape)) for shape in shapes]
    sums = [float(sum(shape)) for shape in shapes]
    return _fill(sizes, np.asarray(sums) / np.maximum(sizes, 1), share_removed, bounds)


def by_global_threshold(score_list: Sequence[Array], share_removed: float, bounds: Bounds | None = None) -> Array:
    """Returns the share that each layer keeps when one threshold holds for all scores, within bounds.

    Args:
        score_list: of each layer, floats of any shape, comparable between layers, no NaN.
        share_removed: of all scores together, from 0 to 1.
        bounds: of the shares, or None.

    Returns:
        float64 [layers]; equal scores at the threshold go in proportion.

    Raises:
        ValueError: a share out of range, an empty layer, a NaN, or a total that the bounds do not allow.
    """
    ranked = [np.sort(np.ravel(scores).astype(np.float64)) for scores in score_list]
    sizes = [scores.size for scores in ranked]
    limits, wanted = _checked(sizes, share_removed, bounds)
    if any(np.isnan(scores[-1]) for scores in ranked):
        raise ValueError(must("densities", "scores", "comparable", "a NaN"))
    total = np.asarray(sizes, np.float64)

    def kept(threshold: float, side: str) -> Array:
        below = [np.searchsorted(scores, threshold, "right" if side == "right" else "left") for scores in ranked]
        shares: Array = np.clip(1 - np.asarray(below) / total, limits.floor, limits.ceiling)
        return shares

    every = np.unique(np.concatenate(ranked))  # ascending: the more goes, the less is kept
    low, high = 0, every.size - 1  # the first threshold at which no more than wanted is kept
    while low < high:
        middle = (low + high) // 2
        enough = float(total @ kept(every[middle], "right")) <= wanted
        low, high = (low, middle) if enough else (middle + 1, high)
    more, less = kept(every[low], "left"), kept(every[low], "right")
    between = float(total @ (more - less))
    part = (wanted - float(total @ less)) / between if between > 0 else 0.0
    result: Array = less + np.clip(part, 0.0, 1.0) * (more - less)
    return result


def by_sensitivity(sizes: Sequence[int], curves: Sequence[Curve], share_removed: float, bounds: Bounds | None = None) -> Array:
    """Returns the share that each layer keeps so that the summed squared drift is least.

    Layers choose between a hundred steps of sparsity, and weights are counted in ten thousandths of all; what that rounds is
    put right at the end by one factor. Within this the minimum is exact, also where curves are not convex.

    Args:
        sizes: how many weights each layer has.
        curves: of each layer.
        share_removed: of all weights together, from 0 to 1.
        bounds: of the shares, or None.

    Returns:
        float64 [layers].

    Raises:
        ValueError: a share or a size out of range, curves that are none, or a total that the bounds do not allow.
    """
    limits, wanted = _checked(sizes, share_removed, bounds)
    if len(curves) != len(sizes):
        raise ValueError(must("densities", "curves", f"{len(sizes)}", len(curves)))
    bucket = sum(sizes) / _BUCKETS
    goal = round((sum(sizes) - wanted) / bucket)
    best = np.full(goal + len(sizes) + 1, np.inf)  # by buckets removed so far; room for what rounding adds
    best[0] = 0.0
    chosen, options = [], []
    for layer, (size, curve) in enumerate(zip(sizes, curves, strict=True)):
        sparsities = np.linspace(1 - limits.ceiling[layer], 1 - limits.floor[layer], _GRID + 1)
        best, choice = _step(best, np.rint(sparsities * size / bucket).astype(np.int64), curve.at(sparsities))
        chosen.append(choice)
        options.append((sparsities, np.rint(sparsities * size / bucket).astype(np.int64)))
    reached = np.flatnonzero(np.isfinite(best))
    left = int(reached[np.argmin(np.abs(reached - goal))])  # bounds may lie between buckets
    kept = np.empty(len(sizes))
    for layer in reversed(range(len(sizes))):
        option = chosen[layer][left]
        sparsities, cost = options[layer]
        kept[layer] = 1 - sparsities[option]
        left -= int(cost[option])
    return _settle(np.asarray(sizes, np.float64), kept, wanted, limits)


def cubic_schedule(initial: float, final: float, steps: int) -> Array:
    """Returns the sparsity after each step: fast while much is redundant, slowly in the end (Zhu & Gupta, arXiv 1710.01878).

    Args:
        initial: before the first step, from 0 to 1.
        final: after the last, not below.
        steps: 1 or more.

    Returns:
        float64 [steps], ascending, ``final + (initial - final) (1 - t / steps)^3`` for t from 1 to steps.

    Raises:
        ValueError: out of range.
    """
    if not 0 <= initial <= final <= 1 or steps < 1:
        raise ValueError(must("densities", "schedule", "0 <= initial <= final <= 1 in 1 step or more", (initial, final, steps)))
    left = 1 - np.arange(1, steps + 1) / steps
    schedule: Array = final + (initial - final) * left**3
    return schedule


def _step(best: Array, costs: Array, drifts: Array) -> tuple[Array, Array]:
    """Returns (least drift, option taken) by buckets removed, with one more layer."""
    after, choice = np.full(best.size, np.inf), np.zeros(best.size, np.int16)
    for option, (cost, drift) in enumerate(zip(costs.tolist(), drifts.tolist(), strict=True)):
        if cost >= best.size:
            break
        tried = best[: best.size - cost] + drift
        better = tried < after[cost:]
        after[cost:][better], choice[cost:][better] = tried[better], option
    return after, choice


def _fill(sizes: Sequence[int], base: Array, share_removed: float, bounds: Bounds | None) -> Array:
    """Returns clip(e · base, floor, ceiling) for the e with which the total is right."""
    limits, wanted = _checked(sizes, share_removed, bounds)
    total = np.asarray(sizes, np.float64)
    # the total is piecewise linear in e, with corners where a layer meets a bound
    corners = np.unique(np.concatenate([[0.0], limits.floor / base, limits.ceiling / base]))
    totals = np.clip(corners[:, None] * base, limits.floor, limits.ceiling) @ total
    factor = np.interp(wanted, totals, corners)
    return _settle(total, np.clip(factor * base, limits.floor, limits.ceiling), wanted, limits)


def _settle(total: Array, kept: Array, wanted: float, limits: Bounds) -> Array:
    """Returns shares with what is missing or too much taken from all, in proportion to the room that each has."""
    missing = wanted - float(total @ kept)
    room = limits.ceiling - kept if missing > 0 else kept - limits.floor
    space = float(total @ room)
    moved: Array = kept + room * np.clip(missing / space, -1.0, 1.0) if space > 0 else kept
    return np.clip(moved, limits.floor, limits.ceiling)


def _checked(sizes: Sequence[int], share_removed: float, bounds: Bounds | None) -> tuple[Bounds, float]:
    """Returns (bounds, how many weights are to be kept)."""
    if not 0 <= share_removed <= 1:
        raise ValueError(must("densities", "share_removed", "between 0 and 1", share_removed))
    if not len(sizes) or any(size < 1 for size in sizes):
        raise ValueError(must("densities", "sizes", "one positive integer or more", list(sizes)))
    limits = Bounds.of(len(sizes)) if bounds is None else bounds
    if limits.floor.shape != (len(sizes),):
        raise ValueError(must("densities", "bounds", f"those of {len(sizes)} layers", limits.floor.shape))
    total = np.asarray(sizes, np.float64)
    wanted, slack = (1 - share_removed) * float(total.sum()), 1e-9 * float(total.sum())
    least, most = float(total @ limits.floor), float(total @ limits.ceiling)
    if not least - slack <= wanted <= most + slack:
        span = f"between {1 - most / total.sum():.3g} and {1 - least / total.sum():.3g} with these bounds"
        raise ValueError(must("densities", "sparsity", span, share_removed))
    return limits, wanted
