"""How far one output is from the original's: sums over all samples, in float64, and what makes comparing impossible."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxshrink.runtime import is_floating

__all__ = ["DRIFT_LIMIT", "SQNR_LIMIT_DB", "OutputMetrics", "Tally", "complaint", "hits"]

Array = np.ndarray[Any, np.dtype[Any]]

SQNR_LIMIT_DB = 300.0
DRIFT_LIMIT = 1e15
_CHUNK = 1 << 20  # elements that are compared at a time: bounds the float64 copies


@dataclass(frozen=True)
class OutputMetrics:
    """How far one output is from the original's, over all samples.

    Attributes:
        name: of the output.
        drift: relative L2 error, 0 to 1e15.
        sqnr_db: -20 log10(drift), within ±300 dB.
        cosine: of the angle between the two, -1 to 1.
        max_abs: largest absolute difference.
        agreement: share of equal decisions, 0 to 1, or None where the output decides nothing.
        exact: whether values are ids, flags or text, which are right or wrong and never near. Flags and text count as 1
            where they are equal and 0 where not, against 1.
        blank: whether the original's output was empty or zero on every sample, so that comparing with it shows little.
    """

    name: str
    drift: float
    sqnr_db: float
    cosine: float
    max_abs: float
    agreement: float | None
    exact: bool = False
    blank: bool = False


class Tally:
    """The sums for one output: squares, products and the largest difference in float64, and equal decisions."""

    def __init__(self) -> None:
        self.broken: str | None = None
        self.exact = False
        self.error = self.original = self.candidate = self.product = self.largest = 0.0
        self.equal = self.decisions = 0

    def add(self, original: Array, candidate: Array, exact: bool, classes: int) -> None:
        """Takes one sample's arrays, of the same dtype and shape."""
        self.exact = exact
        one, two = (
            array.astype(np.float32) if array.dtype.isbuiltin == 2 else array for array in (original, candidate)
        )
        if classes:
            self._decide(one.reshape(-1, classes).argmax(1) == two.reshape(-1, classes).argmax(1))
        elif exact:
            same = np.asarray(one == two)
            self._decide(same)
            if original.dtype.kind in "bOUS":
                one, two = np.ones(same.shape), same
        one, two = one.reshape(-1), two.reshape(-1)
        for start in range(0, one.size, _CHUNK):
            self._measure(*(array[start : start + _CHUNK].astype(np.float64) for array in (one, two)))

    def metrics(self, name: str) -> OutputMetrics:
        """Returns the sums as metrics."""
        drift = math.sqrt(self.error / self.original) if self.original else DRIFT_LIMIT * (self.error > 0)
        drift = min(drift, DRIFT_LIMIT) if math.isfinite(drift) else DRIFT_LIMIT  # squares of float64 may overflow
        norms = math.sqrt(self.original) * math.sqrt(self.candidate)
        cosine = self.product / norms if norms else float(self.original == self.candidate)
        return OutputMetrics(
            name=name,
            drift=drift,
            sqnr_db=-20 * math.log10(max(drift, 1 / DRIFT_LIMIT)),
            cosine=min(max(cosine, -1.0), 1.0) if math.isfinite(cosine) else float(self.error == 0),
            max_abs=min(self.largest, sys.float_info.max),
            agreement=self.equal / self.decisions if self.decisions else None,
            exact=self.exact,
            blank=not self.original and not self.exact,
        )

    def _decide(self, same: Array) -> None:
        self.equal += int(np.count_nonzero(same))
        self.decisions += same.size

    def _measure(self, one: Array, two: Array) -> None:
        finite = np.isfinite(one)
        if not finite.all():
            one, two = one[finite], two[finite]
        with np.errstate(over="ignore", invalid="ignore"):
            difference = two - one
            self.error += float(difference @ difference)
            self.original += float(one @ one)
            self.candidate += float(two @ two)
            self.product += float(one @ two)
        self.largest = max(self.largest, float(np.abs(difference).max(initial=0.0)))


def complaint(original: Array, candidate: Array | None) -> str | None:
    """Returns what makes a candidate's output impossible to compare or worse than inexact, or None."""
    if candidate is None:
        return "it is missing"
    if candidate.dtype != original.dtype:
        return f"dtype must be {original.dtype}, got {candidate.dtype}"
    if candidate.shape != original.shape:
        return f"shape must be {list(original.shape)}, got {list(candidate.shape)}"
    if not is_floating(original.dtype):
        return None
    one, two = (array.astype(np.float32) if array.dtype.isbuiltin == 2 else array for array in (original, candidate))
    finite = np.isfinite(one)
    if not np.isfinite(two[finite]).all():
        return "NaN or infinity where the original has none"
    if not np.array_equal(one[~finite], two[~finite], equal_nan=True):
        return "NaN and infinity must be where the original has them"
    return None


def hits(scores: Array, labels: Array) -> tuple[int, int]:
    """Returns how many labels [rows] are first, and among the first five, of scores [rows, C]; lower ids win ties."""
    scores = scores.astype(np.float64)
    label = labels[:, None]
    own = np.take_along_axis(scores, label, 1)
    before = (scores > own) | ((scores == own) & (np.arange(scores.shape[1]) < label))
    rank = np.where(np.isnan(own[:, 0]), scores.shape[1], before.sum(1))
    return int(np.count_nonzero(rank < 1)), int(np.count_nonzero(rank < 5))
