"""Lloyd's iteration in one dimension, for many rows of weighted points at once.

Points are sorted, so a cluster is a slice and the sums over it are differences of prefix sums: one iteration over k
clusters costs O(k log points), whatever the number of points (Lloyd 1982, "Least squares quantization in PCM"). Rows
iterate together and leave when they have settled.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from onnxshrink.numerics.chunks import Array

__all__ = ["companded_centers", "companded_ranks", "lloyd", "squared_errors", "thresholds", "uniform_centers"]

_ITERATIONS = 1000  # fifty are usual; a bound for rounding that never comes to rest
_REPAIRS = 16  # one or two are usual
_CLIPPINGS = 4  # each lowers the total that shares are measured by, until few remain above


def lloyd(points: Array, weights: Array, centers: Array, *, keep_zero: bool = False) -> Array:
    """Returns centers that Lloyd's iteration does not move, or hardly.

    A cluster that owns no point is sent to the farthest point of one of the worst clusters, so that k distinct points
    leave no cluster empty.

    Args:
        points: [rows, n] floats, each row ascending.
        weights: [rows, n] float64, not negative.
        centers: [rows, k] float64, each row ascending, to start from.
        keep_zero: whether an entry that is 0.0 stays where it is.

    Returns:
        float64 [rows, k], each row ascending; up to rounding, the squared error is at most that of the start.
    """
    cloud = _Cloud(points, weights, keep_zero)
    for _ in range(_REPAIRS):
        centers = cloud.settle(centers)
        repaired = cloud.repair(centers)
        if np.array_equal(repaired, centers):
            break
        centers = repaired
    return cloud.exact_means(centers)


def companded_ranks(points: Array, weights: Array, most: float = 1.0) -> Array:
    """Returns where points stand, from 0 to 1, on a scale where the clusters of a fine quantizer are spread evenly.

    The density of the clusters is proportional to density^(1/3) (Panter & Dite 1951, "Quantization distortion in
    pulse-count modulation with nonuniform spacing of levels"). A point of weight w amid a gap g has density w / g, so
    its share of the clusters is ``g (w / g)^(1/3)``.

    Args:
        points: [rows, n >= 1] floats, each row ascending.
        weights: [rows, n] float64, positive.
        most: the greatest share of a row that a single point may have, about.

    Returns:
        float64 [rows, n], ascending; the last of a row is 1, unless all its points are the same.
    """
    gaps = np.diff(points.astype(np.float64), axis=1)
    around = np.zeros(points.shape)
    around[:, :-1] += gaps / 2
    around[:, 1:] += gaps / 2
    shares = np.cbrt(weights) * np.cbrt(around) ** 2
    for _ in range(_CLIPPINGS):
        np.minimum(shares, shares.sum(axis=1, keepdims=True) * most, out=shares)
    ranks = np.cumsum(shares, axis=1)
    total = ranks[:, -1:]
    np.divide(ranks, total, out=ranks, where=total > 0)
    return ranks


def companded_centers(points: Array, weights: Array, k: int) -> Array:
    """Returns float64 [rows, k]: points that are spread as a fine quantizer spreads its clusters.

    Args and shapes are those of `companded_ranks`.
    """
    targets = np.broadcast_to((np.arange(k) + 0.5) / max(k, 1), (len(points), k))
    places = np.minimum(_counts_up_to(companded_ranks(points, weights), targets), points.shape[1] - 1)
    return np.take_along_axis(points, places, axis=1).astype(np.float64)


def uniform_centers(lowest: Array, highest: Array, k: int, keep_zero: bool = False) -> Array:
    """Returns k evenly spaced centers a row, from the lowest to the highest.

    Args:
        lowest: [rows, 1].
        highest: [rows, 1].
        k: at least 1; a single center is the lowest.
        keep_zero: whether the center nearest to zero becomes 0.0.

    Returns:
        float64 [rows, k], ascending.
    """
    centers = np.linspace(lowest[:, 0].astype(np.float64), highest[:, 0], k, axis=1)
    if keep_zero:
        centers[np.arange(len(centers)), np.argmin(np.abs(centers), axis=1)] = 0.0
    return np.sort(centers, axis=1)


def thresholds(codebooks: Array) -> Array:
    """Returns what separates the values of neighbouring entries: a value's index is how many thresholds are below it.

    Args:
        codebooks: [..., k] float64, ascending along the last axis.

    Returns:
        float64 [..., k - 1], ascending. Of repeated entries only the first is ever chosen.
    """
    lower, upper = codebooks[..., :-1], codebooks[..., 1:]
    middles = lower / 2 + upper / 2
    middles = np.where(middles < upper, middles, lower)  # where no float64 lies between
    middles[lower == upper] = np.inf
    # a repeated entry is passed only together with the last of its kind
    passed: Array = np.minimum.accumulate(middles[..., ::-1], axis=-1)[..., ::-1]
    return passed


def squared_errors(points: Array, weights: Array, centers: Array) -> Array:
    """Returns float64 [rows]: the weighted squared distances of points to their nearest centers, summed."""
    errors: Array = _Cloud(points, weights, keep_zero=False).errors(centers).sum(axis=1)
    return errors


class _Cloud:
    """Rows of sorted weighted points, with prefix sums along them."""

    def __init__(self, points: Array, weights: Array, keep_zero: bool) -> None:
        self.points, self.weights, self.keep_zero = points, weights, keep_zero

    @cached_property
    def mass(self) -> Array:
        return _prefix_sums(self.weights)

    @cached_property
    def moment(self) -> Array:
        return _prefix_sums(self.weights * self.points)

    def settle(self, centers: Array) -> Array:
        """Returns the centers after iterating each row until its clusters stay the same."""
        centers = centers.copy()
        active = np.arange(len(centers))
        cuts = np.full((len(centers), centers.shape[1] - 1), -1)
        for _ in range(_ITERATIONS):
            fresh = _counts_up_to(self.points, thresholds(centers[active]), active)
            moving = (fresh != cuts[active]).any(axis=1)
            active, fresh = active[moving], fresh[moving]
            if not active.size:
                break
            cuts[active] = fresh
            centers[active] = self._means(fresh, centers[active], active)
        return centers

    def repair(self, centers: Array) -> Array:
        """Returns the centers with those of empty clusters moved to where the error is largest."""
        bounds = self._bounds(centers)
        empty = np.diff(bounds, axis=1) == 0
        if self.keep_zero:
            zero = centers == 0.0
            empty &= ~zero | (np.cumsum(zero, axis=1) > 1)  # a second zero may go elsewhere
        rows = np.flatnonzero(empty.any(axis=1))
        if not rows.size:
            return centers
        repaired = centers.copy()
        errors = self.errors(centers)[rows]
        worst = np.argsort(-errors, axis=1, kind="stable")
        idle = np.argsort(~empty[rows], axis=1, kind="stable")
        farthest = np.take_along_axis(self._farthest(centers, bounds)[rows], worst, axis=1)
        useful = np.take_along_axis(empty[rows], idle, axis=1) & (np.take_along_axis(errors, worst, axis=1) > 0)
        row, rank = np.nonzero(useful)  # the idle center of each rank goes to the worst cluster of that rank
        repaired[rows[row], idle[row, rank]] = farthest[row, rank]
        return np.sort(repaired, axis=1)

    def errors(self, centers: Array) -> Array:
        """Returns float64 [rows, k]: the squared error of each cluster, summed without cancellation."""
        bounds = self._bounds(centers)
        labels = self._labels(bounds)
        distances = self.points.ravel() - centers.ravel()[labels]
        return self._sums(labels, self.weights.ravel() * distances * distances, centers)

    def exact_means(self, centers: Array) -> Array:
        """Returns the clusters' means, each summed over its own points only: equal points give exactly that point."""
        labels = self._labels(self._bounds(centers))
        mass = self._sums(labels, self.weights.ravel(), centers)
        moment = self._sums(labels, (self.weights * self.points).ravel(), centers)
        means = np.divide(moment, mass, out=centers.copy(), where=mass > 0)
        return np.sort(np.where(centers == 0.0, 0.0, means) if self.keep_zero else means, axis=1)

    def _means(self, cuts: Array, centers: Array, rows: Array) -> Array:
        count = self.points.shape[1]
        bounds = np.pad(cuts, ((0, 0), (1, 1)), constant_values=((0, 0), (0, count)))
        flat = bounds + rows[:, None] * (count + 1)
        mass, moment = np.diff(self.mass.ravel()[flat], axis=1), np.diff(self.moment.ravel()[flat], axis=1)
        means = np.divide(moment, mass, out=centers.copy(), where=mass > 0)
        if self.keep_zero:
            means[centers == 0.0] = 0.0
        return np.maximum.accumulate(means, axis=1)  # rounding of the prefix sums may swap close neighbours

    def _bounds(self, centers: Array) -> Array:
        """Returns [rows, k + 1]: where each cluster begins among the points, and where the last one ends."""
        cuts = _counts_up_to(self.points, thresholds(centers))
        return np.pad(cuts, ((0, 0), (1, 1)), constant_values=((0, 0), (0, self.points.shape[1])))

    def _labels(self, bounds: Array) -> Array:
        """Returns the flat index of each point's cluster."""
        lengths = np.diff(bounds, axis=1).ravel()
        return np.repeat(np.arange(lengths.size), lengths)

    def _sums(self, labels: Array, terms: Array, centers: Array) -> Array:
        return np.bincount(labels, weights=terms, minlength=centers.size).reshape(centers.shape)

    def _farthest(self, centers: Array, bounds: Array) -> Array:
        """Returns [rows, k]: of each cluster the point farthest from its center (its first or its last)."""
        last_place = self.points.shape[1] - 1
        first = np.take_along_axis(self.points, np.minimum(bounds[:, :-1], last_place), axis=1)
        last = np.take_along_axis(self.points, np.maximum(bounds[:, 1:] - 1, 0), axis=1)
        return np.where(centers - first >= last - centers, first, last).astype(np.float64)


def _prefix_sums(terms: Array) -> Array:
    sums = np.zeros((terms.shape[0], terms.shape[1] + 1))
    np.cumsum(terms, axis=1, out=sums[:, 1:])
    return sums


def _counts_up_to(points: Array, limits: Array, rows: Array | None = None) -> Array:
    """Returns how many of its row's points are at most each limit: a binary search of all rows at once.

    Args:
        points: [rows, n], each row ascending.
        limits: [m, j], each row ascending.
        rows: int [m], the row of points that each row of limits belongs to; all in order if None.

    Returns:
        int64 [m, j].
    """
    if len(points) == 1 and points.dtype == limits.dtype:
        return np.searchsorted(points[0], limits, side="right")
    count = points.shape[1]
    starts = (np.arange(len(points)) if rows is None else rows)[:, None] * count
    flat, found = points.ravel(), np.zeros(limits.shape, np.int64)
    step = 1 << (count.bit_length() - 1)
    while step:
        tried = np.minimum(found + step, count)
        found = np.where(flat[starts + np.maximum(tried - 1, 0)] <= limits, tried, found)
        step >>= 1
    return found
