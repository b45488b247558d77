"""The best k-means clustering in one dimension, by dynamic programming, for many rows of weighted points at once.

Clusters of sorted points are slices. With D_j(i) the least error of the first i points in at most j clusters,

    D_j(i) = min over t <= i of D_(j-1)(t) + error of points t..i around their mean

(Wang & Song 2011, "Ckmeans.1d.dp: optimal k-means clustering in one dimension by dynamic programming"). The best t
falls neither as i grows nor as j does, so a layer is filled by bisection, all points of a level at once: O(k n log n)
in all.

A center that must stay at 0.0 cuts the problem in two: the points below zero that it does not own, and those above, are
clustered independently, and only the shares of the clusters are left to choose.
"""

from __future__ import annotations

import numpy as np

from onnxshrink.numerics.chunks import Array

__all__ = ["optimal_centers"]


def optimal_centers(points: Array, weights: Array, k: int, *, keep_zero: bool = False) -> Array:
    """Returns the centers of least weighted squared error.

    Args:
        points: float64 [rows, n >= 1], each row ascending.
        weights: float64 [rows, n], not negative, not all zero.
        k: at least 1.
        keep_zero: whether one center must be 0.0.

    Returns:
        float64 [rows, k], each row ascending; where fewer centers are as good, the last one is repeated.
    """
    if not keep_zero:
        tail = np.full((len(points), points.shape[1] + 1), np.inf)
        tail[:, -1] = 0.0  # no point is left over
        return _filled(_Layers(points, weights, tail, k).centers(np.full(len(points), k)))
    below = _Layers(*_towards_zero(points, weights), k - 1)
    above = _Layers(*_towards_zero(-points[:, ::-1], weights[:, ::-1]), k - 1)
    lower = np.argmin(below.least + above.least[:, ::-1], axis=1)
    sides = below.centers(lower), -above.centers(k - 1 - lower)
    return _filled(np.concatenate([sides[0], np.zeros((len(points), 1)), sides[1]], axis=1))[:, :k]


def _towards_zero(points: Array, weights: Array) -> tuple[Array, Array, Array]:
    """Returns (points, weights, tail) of the negative points, ascending; the others weigh nothing.

    Tail is the error around zero, float64 [rows, n + 1], of the points from each on: zero owns the last of them.
    """
    negative, mass = np.minimum(points, 0.0), np.where(points < 0, weights, 0.0)
    terms = mass * negative * negative
    return negative, mass, np.pad(np.cumsum(terms[:, ::-1], axis=1)[:, ::-1], ((0, 0), (0, 1)))


def _filled(centers: Array) -> Array:
    """Returns the centers ascending, with infinite ones replaced by the last finite one."""
    ascending = np.sort(np.where(np.isfinite(centers), centers, np.inf), axis=1)
    last = np.max(ascending, axis=1, initial=-np.inf, where=np.isfinite(ascending), keepdims=True)
    filled: Array = np.minimum(ascending, last)
    return filled


class _Layers:
    """The table D of every row, a layer per number of clusters.

    Attributes:
        least: float64 [rows, k + 1]: the least error, tail included, with 0, 1, ... k clusters.
    """

    def __init__(self, points: Array, weights: Array, tail: Array, k: int) -> None:
        # around the middle of the mass, and summed from there outwards: a far outlier spoils only sums that hold it
        rising = np.cumsum(weights, axis=1)
        anchors = np.sum(rising < rising[:, -1:] / 2, axis=1, keepdims=True)
        self.middles = np.take_along_axis(points, anchors, axis=1)
        shifted = points - self.middles
        self.mass = _sums_from(weights, anchors)
        self.moment = _sums_from(weights * shifted, anchors)
        self.energy = _sums_from(weights * shifted * shifted, anchors)
        errors = np.full(tail.shape, np.inf)
        errors[:, 0] = 0.0
        self.begins: list[Array] = []  # for each number of clusters, where the last one best begins
        totals = [errors + tail]
        for _ in range(k):
            errors, begins = self._grown(errors, self.begins[-1] if self.begins else np.zeros(tail.shape, np.int32))
            self.begins.append(begins)
            totals.append(errors + tail)
        self.ends = np.stack([np.argmin(total, axis=1) for total in totals], axis=1)
        self.least = np.stack([np.min(total, axis=1) for total in totals], axis=1)

    def centers(self, counts: Array) -> Array:
        """Returns [rows, k]: the centers of the best clusterings in so many clusters, infinite where unused."""
        rows = np.arange(len(counts))
        ends = self.ends[rows, counts]
        found = np.full((len(self.begins), len(counts)), np.inf)
        for index in range(len(self.begins) - 1, -1, -1):
            starts = np.where(index < counts, self.begins[index][rows, ends], ends)
            mass = self.mass[rows, ends] - self.mass[rows, starts]
            moment = self.moment[rows, ends] - self.moment[rows, starts]
            np.divide(moment, mass, out=found[index], where=mass > 0)
            ends = starts
        centers: Array = found.T + self.middles
        return centers

    def _grown(self, previous: Array, least_begins: Array) -> tuple[Array, Array]:
        """Returns (errors, begins) of one more cluster, the entries between known ones level by level."""
        rest = previous - self.energy  # the sum of squares up to a cluster's end does not depend on its begin
        count = previous.shape[1] - 1
        errors, begins = np.zeros(previous.shape), np.zeros(previous.shape, np.int32)
        step = 1 << (count.bit_length() - 1)
        while step:
            ends = np.arange(step, count + 1, 2 * step)
            after = np.minimum(ends + step, count)
            highest = np.where(ends + step <= count, begins[:, after], ends)
            lowest = np.maximum(begins[:, ends - step], least_begins[:, ends])
            highest = np.maximum(np.minimum(highest, ends), lowest)  # rounding may turn near ties around
            errors[:, ends], begins[:, ends] = self._best(rest, ends, lowest, highest)
            step >>= 1
        return errors, begins

    def _best(self, rest: Array, ends: Array, lowest: Array, highest: Array) -> tuple[Array, Array]:
        """Returns (least errors, their begins), [rows, ends], over begins from lowest to highest."""
        shape = lowest.shape
        lengths = (highest - lowest + 1).ravel()
        firsts = np.cumsum(lengths) - lengths
        begins = np.arange(int(lengths.sum())) - np.repeat(firsts - lowest.ravel(), lengths)
        rows = np.repeat(np.arange(shape[0]) * rest.shape[1], shape[1])
        places = begins + np.repeat(rows, lengths)
        mass = np.repeat(self.mass[:, ends].ravel(), lengths) - self.mass.ravel()[places]
        moment = np.repeat(self.moment[:, ends].ravel(), lengths) - self.moment.ravel()[places]
        moment *= moment
        totals = rest.ravel()[places] - np.divide(moment, mass, out=np.zeros_like(mass), where=mass > 0)
        least = np.minimum.reduceat(totals, firsts)
        hits = np.flatnonzero(totals == np.repeat(least, lengths))
        errors = np.maximum(least.reshape(shape) + self.energy[:, ends], 0.0)
        return errors, begins[hits[np.searchsorted(hits, firsts)]].reshape(shape)


def _sums_from(terms: Array, anchors: Array) -> Array:
    """Returns [rows, n + 1]: prefix sums, zero at the row's anchor; the difference of two is the sum between them."""
    is_after = np.arange(terms.shape[1]) >= anchors
    sums = np.zeros((terms.shape[0], terms.shape[1] + 1))
    np.cumsum(np.where(is_after, terms, 0.0), axis=1, out=sums[:, 1:])
    sums[:, :-1] -= np.cumsum(np.where(is_after, 0.0, terms)[:, ::-1], axis=1)[:, ::-1]
    return sums
