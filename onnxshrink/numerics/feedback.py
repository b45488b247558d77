"""Rounding column by column with error feedback: what one column gets wrong, the columns after it make up for.

A layer computes W X^T. With the Gram matrix H = X^T X of its inputs, the squared error of its outputs is

    E(W') = trace((W - W') H (W - W')^T)

Rounding w_j to q_j alone costs (w_j - q_j)^2 H_jj. If the columns not yet rounded may move, the least cost is (w_j - q_j)^2 / [H^-1]_jj,
and they move by -(w_j - q_j) [H^-1]_j,: / [H^-1]_jj (optimal brain surgeon, Hassibi & Stork 1993). With H^-1 = U^T U, U upper
triangular, row j of U holds what that takes for column j once the columns before it are fixed (GPTQ, arXiv 2210.17323), so one
factorization serves all columns and all rows of W. Columns are rounded in order of falling H_jj: the cheap ones come last,
when few are left to make up for them. Updates of later columns are delayed and made a block at a time, as products of matrices.

What a value may become is up to the caller: the nearest level of a grid, a value of a codebook, zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import linalg

from onnxshrink.errors import must
from onnxshrink.numerics.chunks import Array

__all__ = ["Feedback", "Snap", "feedback", "retarget", "round_with_feedback"]

Snap = Callable[[Array, int], Array]
"""f(wanted float64 [rows], the column that they are of) -> for each row the allowed value that takes its place, float64 [rows]."""

_BLOCK = 64  # columns between two updates of all the rest
_DAMPING = 0.01  # of the mean of the diagonal: GPTQ's default; 0.003 and 0.03 gave the same within noise
_MOST_DAMPING = 1e3


@dataclass(frozen=True, eq=False)
class Feedback:
    """How errors of one column are passed on.

    Attributes:
        order: intp [columns]: the order of rounding.
        root: float64 [columns, columns], upper triangular U with H^-1 = U^T U, rows and columns in that order.
    """

    order: Array
    root: Array


def feedback(gram: Array, damping: float = _DAMPING) -> Feedback:
    """Factors a Gram matrix.

    A multiple of the identity is added, which keeps columns that the calibration inputs hardly tell apart from being traded
    against each other without limit. Columns that were zero in every input carry no error and take none.

    Args:
        gram: float64 [columns, columns], symmetric, positive semidefinite up to rounding.
        damping: what is added to the diagonal, relative to its mean; raised tenfold as long as the matrix is singular.

    Raises:
        ValueError: not a square matrix, or not finite.
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not np.isfinite(gram).all():
        raise ValueError(must("feedback", "gram", "a finite square matrix", f"shape {gram.shape}"))
    diagonal = np.diagonal(gram)
    order = np.argsort(-diagonal, kind="stable")
    mean = float(np.maximum(diagonal, 0.0).mean()) if (diagonal > 0).any() else 1.0
    damped = gram[np.ix_(order, order)]
    dead = np.flatnonzero(np.diagonal(damped) <= 0)
    damped[dead, :] = damped[:, dead] = 0.0
    damped[dead, dead] = mean
    every = np.arange(len(damped))
    while damping <= _MOST_DAMPING:
        damped[every, every] = np.where(diagonal[order] <= 0, mean, diagonal[order]) + damping * mean
        try:
            return Feedback(order, _inverse_root(damped))
        except linalg.LinAlgError:
            damping = max(10 * damping, 1e-6)
    raise ValueError(must("feedback", "gram", "positive semidefinite", "a matrix with large negative eigenvalues"))


def round_with_feedback(matrix: Array, through: Feedback, snap: Snap, frozen: Array | None = None) -> Array:
    """Replaces every value by an allowed one, so that the outputs W X^T change little.

    Args:
        matrix: [rows, columns], finite.
        through: of the Gram matrix of the inputs.
        snap: gives the allowed values of a column.
        frozen: bool [rows, columns] or None: zeros that stay zero, whatever the other columns ask for.

    Returns:
        float64 [rows, columns] of values that ``snap`` gave, and zeros.

    Raises:
        ValueError: shapes that do not fit.
    """
    columns = len(through.order)
    if matrix.ndim != 2 or matrix.shape[1] != columns:
        raise ValueError(must("round_with_feedback", "matrix", f"2-D with {columns} columns", f"shape {matrix.shape}"))
    if frozen is not None and frozen.shape != matrix.shape:
        raise ValueError(must("round_with_feedback", "frozen", f"of shape {matrix.shape}", f"shape {frozen.shape}"))
    wanted = np.ascontiguousarray(matrix.T[through.order], dtype=np.float64)  # columns become rows: contiguous in memory
    zeros = frozen.T[through.order] if frozen is not None else None
    pivots = np.diagonal(through.root)
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        errors = np.empty((stop - start, len(matrix)))
        for column in range(start, stop):
            values = snap(wanted[column], int(through.order[column]))
            if zeros is not None:
                values = np.where(zeros[column], 0.0, values)
            error = (wanted[column] - values) / pivots[column]
            wanted[column + 1 : stop] -= through.root[column, column + 1 : stop, None] * error
            wanted[column], errors[column - start] = values, error
        wanted[stop:] -= through.root[start:stop, stop:].T @ errors
    rounded = np.empty(matrix.shape)
    rounded.T[through.order] = wanted
    return rounded


def retarget(matrix: Array, gram: Array, error: Array, ridge: float) -> Array:
    """Returns the weights that make up for what the output of a layer lacks, as far as its inputs allow.

    The least-squares solution of D X'^T ≈ E, drawn towards none (ridge regression), on top of the weights:

        W' = W + (E X') (H' + r I)^-1        H' = X'^T X', r = ridge · mean of H's diagonal

    Where only the inputs have changed, from X to X', E = W (X - X')^T, and W' X'^T ≈ W X^T: what comes out is what came out before.

    Args:
        matrix: [rows, columns]: W.
        gram: float64 [columns, columns]: H'.
        error: float64 [rows, columns]: E X', the sum over positions of e x'^T.
        ridge: above 0; the larger, the fewer inputs it takes to be trusted.

    Returns:
        float64 [rows, columns].
    """
    columns = len(gram)
    mean = float(np.trace(gram)) / max(columns, 1)
    wide = np.asarray(matrix, np.float64)
    if not mean > 0.0:
        return wide
    damped = gram + ridge * mean * np.eye(columns)
    moved: Array = linalg.solve(damped, error.T, assume_a="pos").T
    return wide + moved


def _inverse_root(matrix: Array) -> Array:
    """Returns upper triangular U with matrix^-1 = U^T U.

    Cholesky from the last row upwards gives matrix = R R^T with R upper triangular, and U = R^-1: no inverse is squared.
    """
    if not matrix.size:  # LAPACK wants a row at least
        return matrix
    lower = linalg.cholesky(matrix[::-1, ::-1], lower=True, check_finite=False)
    trtri: Any = linalg.get_lapack_funcs("trtri", (lower,))
    upper, info = trtri(np.asfortranarray(lower[::-1, ::-1]), lower=0)
    if info:
        raise linalg.LinAlgError(f"trtri: {info}")
    return np.ascontiguousarray(np.triu(upper))
