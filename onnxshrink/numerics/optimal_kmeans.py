"""The best k-means clustering in one dimension, by dynamic programming.

Clusters of sorted points are slices. With D_j(i) the least error of the first i points in at most j clusters,

    D_j(i) = min over t <= i of D_(j-1)(t) + error of points t..i around their mean

(Wang & Song 2011, "Ckmeans.1d.dp: optimal k-means clustering in one dimension by dynamic programming"). The best t does
not fall as i grows, so a layer is filled by bisection, every point of a level at once: O(k n log n) in all.

A center that must stay at 0.0 cuts the problem in two: the points below zero that it does not own, and those above, are
clustered independently, and only the shares of the clusters are left to choose.
"""

from __future__ import annotations

import numpy as np

from onnxshrink.numerics.chunks import Array

__all__ = ["optimal_centers", "optimal_centers_with_zero"]


def optimal_centers(points: Array, weights: Array, k: int) -> Array:
    """Returns at most k centers of least weighted squared error.

    Args:
        points: float64 [n >= 1], ascending.
        weights: float64 [n], positive.
        k: at least 1.

    Returns:
        float64 [<= k], ascending.
    """
    layers = _Layers(points, weights)
    for _ in range(k):
        layers.grow()
    return layers.centers(k, points.size)


def optimal_centers_with_zero(points: Array, weights: Array, k: int) -> Array:
    """Returns at most k centers, one of them 0.0, of least weighted squared error; shapes as `optimal_centers`."""
    below, above = points < 0, points > 0
    sides = [_Side(points[below], weights[below]), _Side(-points[above][::-1], weights[above][::-1])]
    for side in sides:
        for _ in range(k - 1):
            side.layers.grow()
    lower_errors, upper_errors = (side.errors() for side in sides)
    lower = int(np.argmin(lower_errors + upper_errors[::-1]))
    return np.concatenate([sides[0].centers(lower), [0.0], -sides[1].centers(k - 1 - lower)[::-1]])


class _Side:
    """Points of one sign, ascending towards zero; the last few of them belong to the center at zero."""

    def __init__(self, points: Array, weights: Array) -> None:
        self.layers = _Layers(points, weights)
        terms = weights * points * points
        self.to_zero = np.append(np.cumsum(terms[::-1])[::-1], 0.0)  # error of points i.. around zero

    def errors(self) -> Array:
        """Returns the least error with 0, 1, 2, ... centers besides zero."""
        return np.array([np.min(errors + self.to_zero) for errors in self.layers.errors])

    def centers(self, count: int) -> Array:
        return self.layers.centers(count, int(np.argmin(self.layers.errors[count] + self.to_zero)))


class _Layers:
    """The table D, a layer per number of clusters, and where each best last cluster begins."""

    def __init__(self, points: Array, weights: Array) -> None:
        # around the middle of the mass, and summed from there outwards: a far outlier spoils only sums that hold it
        anchor = int(np.searchsorted(np.cumsum(weights), weights.sum() / 2)) if points.size else 0
        self.center = float(points[anchor]) if points.size else 0.0
        shifted = points - self.center
        self.mass = _sums_from(weights, anchor)
        self.moment = _sums_from(weights * shifted, anchor)
        self.energy = _sums_from(weights * shifted * shifted, anchor)
        self.errors = [np.append(0.0, np.full(points.size, np.inf))]
        self.begins: list[Array] = [np.zeros(points.size + 1, np.int32)]

    def grow(self) -> None:
        """Adds the layer of one more cluster, the values of D between known ones level by level."""
        previous, count = self.errors[-1], self.mass.size - 1
        errors, begins = np.zeros(count + 1), np.zeros(count + 1, np.int32)
        step = 1 << max(count.bit_length() - 1, 0)
        while step:
            ends = np.arange(step, count + 1, 2 * step)
            if ends.size:
                after = ends + step
                highest = np.where(after <= count, begins[np.minimum(after, count)], ends)
                errors[ends], begins[ends] = self._best(previous, ends, begins[ends - step], np.minimum(highest, ends))
            step >>= 1
        self.errors.append(errors)
        self.begins.append(begins)

    def centers(self, count: int, end: int) -> Array:
        """Returns the centers of the best clustering of the first `end` points in at most `count` clusters."""
        found = []
        for begins in self.begins[count:0:-1]:
            begin = int(begins[end])
            if begin < end:
                mass = self.mass[end] - self.mass[begin]
                found.append(self.center + (self.moment[end] - self.moment[begin]) / mass)
            end = begin
        return np.array(found[::-1], np.float64)

    def _best(self, previous: Array, ends: Array, lowest: Array, highest: Array) -> tuple[Array, Array]:
        """Returns the least errors and their begins for each end, over begins of lowest..highest."""
        lengths = highest - lowest + 1
        starts = np.cumsum(lengths) - lengths
        begins = np.arange(int(lengths.sum())) - np.repeat(starts - lowest, lengths)
        totals = previous[begins] + self._error(begins, np.repeat(ends, lengths))
        least = np.minimum.reduceat(totals, starts)
        hits = np.flatnonzero(totals == np.repeat(least, lengths))
        return least, begins[hits[np.searchsorted(hits, starts)]]

    def _error(self, begins: Array, ends: Array) -> Array:
        """Returns the error of points begin..end around their mean, 0 where there are none."""
        mass = self.mass[ends] - self.mass[begins]
        moment = self.moment[ends] - self.moment[begins]
        energy = self.energy[ends] - self.energy[begins]
        around = np.divide(moment * moment, mass, out=np.zeros_like(mass), where=ends > begins)
        return np.maximum(energy - around, 0.0)


def _sums_from(terms: Array, anchor: int) -> Array:
    """Returns prefix sums whose zero is at the anchor: the difference of two is the sum between them."""
    below = -np.cumsum(terms[:anchor][::-1])[::-1]
    return np.concatenate([below, [0.0], np.cumsum(terms[anchor:])])
