"""What the filters of a layer are worth, seen by themselves: scores of which the lowest go first.

    l1, l2    sum of |w|, of w^2                                   Li et al., arXiv 1608.08710
    fpgm      sum of distances to all other filters of the layer   He et al., arXiv 1811.00250: what is near the median can be spared
    lamp      l2 over the sum of l2 of all that are not smaller    Lee et al., arXiv 2010.07611: comparable between layers
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from onnxshrink.errors import must
from onnxshrink.numerics.chunks import Array

__all__ = ["Measure", "filter_scores"]

Measure = Literal["l1", "l2", "fpgm", "lamp"]


def filter_scores(filters: Array, measure: Measure) -> Array:
    """Returns the score of every filter, float64 [filters], not negative.

    Args:
        filters: [filters, elements], finite.
        measure: one of the above.

    Raises:
        ValueError: another measure, or no matrix.
    """
    if filters.ndim != 2:
        raise ValueError(must("filter_scores", "filters", "2-D", f"shape {filters.shape}"))
    wide = np.asarray(filters, np.float64)
    if measure == "l1":
        absolute: Array = np.abs(wide).sum(axis=1)
        return absolute
    squares: Array = np.square(wide).sum(axis=1)
    if measure == "l2":
        return squares
    if measure == "lamp":
        order = np.argsort(squares, kind="stable")
        left = np.cumsum(squares[order][::-1])[::-1]
        scores = np.zeros(len(squares))
        scores[order] = np.divide(squares[order], left, out=np.zeros(len(squares)), where=left > 0)
        return scores
    if measure == "fpgm":
        distances = np.sqrt(np.maximum(squares[:, None] + squares - 2 * wide @ wide.T, 0.0))
        np.fill_diagonal(distances, 0.0)
        total: Array = distances.sum(axis=1)
        return total
    raise ValueError(must("filter_scores", "measure", "l1, l2, fpgm or lamp", repr(measure)))
