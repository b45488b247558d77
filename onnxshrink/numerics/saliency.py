"""What single weights are worth: scores of which the lowest go first.

With W [rows, columns] and H = X^T X, the Gram matrix of what W is multiplied with,

    magnitude   |w|                                  Han et al., arXiv 1506.02626
    squared     w^2
    wanda       |w| sqrt(H_jj) = |w| · ||x_j||       Sun et al., arXiv 2306.11695: the change of outputs if nothing makes up for it
    obs         w^2 / [H^-1]_jj                      Hassibi & Stork 1993; Frantar & Alistarh, arXiv 2208.11580 and 2301.00774: the
                                                     squared change of outputs when all other weights of the row make up for it
    lamp        w^2 / sum of v^2 over |v| >= |w|     Lee et al., arXiv 2010.07611: comparable between layers
    random      uniform                              for control

Squared errors add up, so units of a pattern are best put together by the mean (``l1``) of squared, obs and lamp, and by the root mean
square (``l2``) of the others, see `onnxshrink.numerics.patterns.scores`.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from onnxshrink.errors import must
from onnxshrink.numerics.chunks import Array
from onnxshrink.numerics.feedback import feedback
from onnxshrink.numerics.patterns import Norm, check_matrix, score_dtype

__all__ = ["Criterion", "additive", "saliency"]

Criterion = Literal["magnitude", "squared", "wanda", "obs", "lamp", "random"]


def saliency(matrix: Array, criterion: Criterion, grams: Array | None = None, *, seed: int = 0) -> Array:
    """Returns the score of every weight.

    Args:
        matrix: [rows, columns], one of the four float dtypes.
        criterion: one of the above.
        grams: float64 [groups, columns, columns] for equal groups of rows; only wanda and obs read it.
        seed: of ``random``.

    Returns:
        [rows, columns], not negative: float64 for a float64 matrix and for wanda, obs and lamp, else float32. Weights of columns that were
        zero in every input score 0 by wanda and obs.

    Raises:
        ValueError: no matrix, another dtype, a value that is not finite, grams that are needed and missing or do not fit, or an unknown
            criterion.
    """
    check_matrix("saliency", matrix)
    if criterion in ("wanda", "obs"):
        importance = _importance(matrix.shape, criterion, grams)
        size = len(matrix) // len(importance)
        terms = np.square(matrix.astype(np.float64)).reshape(len(importance), size, -1) * importance[:, None]
        scored: Array = np.sqrt(terms) if criterion == "wanda" else terms
        return scored.reshape(matrix.shape)
    if criterion == "lamp":
        return _lamp(np.square(matrix.astype(np.float64)))
    wide: Array = matrix.astype(score_dtype(matrix))
    if criterion == "magnitude":
        magnitudes: Array = np.abs(wide)
        return magnitudes
    if criterion == "squared":
        squares: Array = np.square(wide)
        return squares
    if criterion == "random":
        drawn: Array = np.random.default_rng(seed).random(matrix.shape, dtype=score_dtype(matrix))
        return drawn
    raise ValueError(must("saliency", "criterion", f"one of {', '.join(get_args(Criterion))}", repr(criterion)))


def additive(criterion: Criterion) -> Norm:
    """Returns the norm that puts the scores of a unit together as their squared errors add up."""
    return "l1" if criterion in ("squared", "obs", "lamp") else "l2"


def _importance(shape: tuple[int, ...], criterion: Criterion, grams: Array | None) -> Array:
    """Returns [groups, columns]: what a squared weight counts."""
    columns = shape[1]
    if grams is None or grams.ndim != 3 or grams.shape[1:] != (columns, columns) or not len(grams) or shape[0] % len(grams):
        got = None if grams is None else f"shape {grams.shape}"
        raise ValueError(must("saliency", "grams", f"[groups, {columns}, {columns}] for {criterion}", got))
    energy: Array = np.maximum(np.diagonal(grams, axis1=1, axis2=2), 0.0)
    if criterion == "wanda":
        return energy
    inverse = np.empty(energy.shape)
    for group, gram in enumerate(grams):
        through = feedback(gram)
        inverse[group, through.order] = np.einsum("ij,ij->j", through.root, through.root)
    importance: Array = np.where(energy > 0, 1 / inverse, 0.0)
    return importance


def _lamp(squares: Array) -> Array:
    flat = squares.ravel()
    order = np.argsort(flat, kind="stable")
    left = np.cumsum(flat[order][::-1])[::-1]  # from each weight on, of those not smaller
    scores = np.zeros(flat.size)
    scores[order] = np.divide(flat[order], left, out=np.zeros(flat.size), where=left > 0)
    shaped: Array = scores.reshape(squares.shape)
    return shaped
