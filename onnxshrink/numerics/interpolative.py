"""A product of low rank that computes some rows as they are, and the others from those.

A matrix W' of rank r is told by r of its rows that are independent, and by how the others follow from these (interpolative decomposition:
Cheng, Gimbutas, Martinsson, Rokhlin, 2005; for layers: PIFA, arXiv 2501.19090):

    kept = W'[start : start + r]        others = A kept        W' = the one between the others

That takes r (rows + columns - r) elements where two thin pieces take r (rows + columns): fewer than W has, whatever the rank. W' is the
same, the best of its rank (`onnxshrink.numerics.low_rank`).

The kept rows are the first or the last ones, so that outputs are joined and never sorted: a Gather along the last axis takes as long as
the layer itself (ONNX Runtime 1.31: 12 layers of 384 x 384 at rank 212, 32 rows: 0.78 ms whole, 0.71 joined, 1.37 joined and sorted).
Rows that happen to depend on each other make a large A, which multiplies what rounding does to the kept outputs. So A solves least squares
with that noise, of a variance u^2 of each output's energy; of the two ends, the one with less error is taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import linalg

from onnxshrink.numerics.chunks import Array
from onnxshrink.numerics.low_rank import factor, outputs_gram

__all__ = ["interpolative_extra", "interpolative_factor"]

_ROUNDING = 2.0**-52
_NOTHING = 1e-12  # of the largest output: less than what float64 leaves of a zero


def interpolative_factor(matrix: Array, rank: int, grams: Array | None, unit: float, seed: int = 0) -> tuple[Array, Array, Array]:
    """Returns what computes some outputs of every group, and those before and after them from these.

    Args:
        matrix: [groups, rows, columns], finite.
        rank: from 1 to the smaller of rows and columns.
        grams: float64 [groups, columns, columns] of the inputs or None, as `factor` takes them.
        unit: the relative error of rounding in the dtype that the layer computes in.
        seed: as `factor` takes it.

    Returns:
        (kept [groups, rank, columns], before [groups, start, rank], after [groups, rows - rank - start, rank]), float64.

    Raises:
        ValueError: shapes that do not fit, or a rank out of range.
    """
    left, right = factor(matrix, rank, grams, seed)
    rows = matrix.shape[1]
    energies = [outputs_gram(one, None if grams is None else grams[group]) for group, one in enumerate(right)]
    found = []
    for start in dict.fromkeys((0, rows - rank)):
        ways = [_others(one, energy, start, unit) for one, energy in zip(left, energies, strict=True)]
        found.append((sum(error for _, error in ways), start, np.stack([others for others, _ in ways])))
    _, start, others = min(found, key=lambda way: way[:2])
    return left[:, start : start + rank] @ right, others[:, :start], others[:, start:]


def interpolative_extra(matrix: Array, ranks: Sequence[int], grams: Array | None, unit: float, seed: int = 0) -> list[float]:
    """Returns by how much the squared errors of `interpolative_factor` exceed those of the best product, at several ranks.

    Hardly anything, as a rule; much where the rows of neither end tell the others.

    Args:
        matrix: as there.
        ranks: one at least, from one decomposition.
        grams: as there.
        unit: as there.
        seed: as there.
    """
    left, right = factor(matrix, max(ranks), grams, seed)
    found = []
    for rank in ranks:
        energies = [outputs_gram(one[:rank], None if grams is None else grams[group]) for group, one in enumerate(right)]
        pairs = [(one[:, :rank], energy) for one, energy in zip(left, energies, strict=True)]
        found.append(min(sum(_others(*pair, start, unit)[1] for pair in pairs) for start in (0, matrix.shape[1] - rank)))
    return found


def _others(left: Array, energy: Array, start: int, unit: float) -> tuple[Array, float]:
    """Returns how other rows of ``left`` follow from those that are kept [rows - rank, rank], and the squared error of their outputs.

    Args:
        left: [rows, rank].
        energy: [rank, rank], the Gram matrix of what ``left`` multiplies.
        start: of the rows that are kept.
        unit: see `interpolative_factor`.
    """
    rank = left.shape[1]
    kept, others = left[start : start + rank], np.delete(left, slice(start, start + rank), axis=0)
    gram, cross = kept @ energy @ kept.T, others @ energy @ kept.T
    sizes = np.sqrt(np.maximum(np.diagonal(gram), 0.0))
    known = sizes > _NOTHING * sizes.max(initial=0.0)  # what is zero but for rounding tells nothing
    scale = np.divide(1.0, sizes, where=known, out=np.zeros_like(sizes))  # without it large outputs would hide small ones
    ways = _solved(gram * scale * scale[:, None], cross * scale, unit**2 + rank * _ROUNDING) * scale
    change = ways @ kept - others
    error = float(np.sum(change @ energy * change)) + unit**2 * float(np.sum(np.square(ways * sizes)))
    return ways, error


def _solved(gram: Array, cross: Array, ridge: float) -> Array:
    """Returns cross (gram + ridge I)^-1, of a gram that is positive semidefinite up to rounding."""
    try:
        lower = linalg.cholesky(gram + ridge * np.eye(len(gram)), lower=True, overwrite_a=True, check_finite=False)
    except linalg.LinAlgError:  # rounding has made it indefinite: the nearest matrix that is not
        values, vectors = np.linalg.eigh(gram)
        ways: Array = (cross @ vectors) / (np.maximum(values, 0.0) + ridge) @ vectors.T
        return ways
    solved: Array = linalg.cho_solve((lower, True), cross.T, check_finite=False).T
    return solved
