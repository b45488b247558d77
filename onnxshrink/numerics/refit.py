"""Least squares over the weights that are left: what is removed, the others of the row make up for as far as they can.

A layer computes W X^T. With the Gram matrix H = X^T X of its inputs and S the weights of a row that are kept, the row w' with

    w'_S = w_S + H_SS^-1 H_SR w_R,    w'_R = 0        R: those removed

minimises (w' - w) H (w' - w)^T. Rows with equal masks share one Cholesky factorization. Where that costs too much, conjugate
gradients run in all rows at once, preconditioned by the diagonal of H (Meng et al., ALPS, arXiv 2406.07831): products of matrices in
float32, and a check in float64 that no row got worse. Columns that were zero in every input stay as they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import linalg

from onnxshrink.errors import must
from onnxshrink.numerics.chunks import Array
from onnxshrink.numerics.patterns import Mask

__all__ = ["check_grams", "error_of_rows", "refit", "refit_with_errors"]

_EXACT_WORK = 2e10  # multiplications: a second or two
_RIDGE = 1e-9  # of each diagonal entry: far below what float32 Gram products hold
_STEPS = 12  # of conjugate gradients: on layers of SqueezeNet and MiniLM 10 came within 0.13 dB of the end, mostly within 0.02
_ENOUGH = 1e-4  # of the first residual's norm


def refit(matrix: Array, grams: Array, mask: Mask, start: Array | None = None, exact: bool | None = None) -> Array:
    """Returns the matrix of least output error among those with zeros where the mask says.

    Args:
        matrix: [rows, columns], finite: what is wanted.
        grams: float64 [groups, columns, columns] for equal groups of rows.
        mask: bool [rows, columns], True where kept.
        start: [rows, columns] to begin from; ``matrix`` if None. Zeroed outside of the mask.
        exact: whether to factorize; None where it costs little.

    Returns:
        float64 [rows, columns]; no row of it is worse than that of the masked start.

    Raises:
        ValueError: shapes that do not fit.
    """
    return refit_with_errors(matrix, grams, mask, start, exact)[0]


def refit_with_errors(
    matrix: Array, grams: Array, mask: Mask, start: Array | None = None, exact: bool | None = None
) -> tuple[Array, Array]:
    """Returns what `refit` does, and the squared error of each output, float64 [rows], as `error_of_rows` has it."""
    wanted = check_grams("refit", matrix, grams)
    if mask.shape != matrix.shape:
        raise ValueError(must("refit", "mask", f"of shape {matrix.shape}", f"shape {mask.shape}"))
    begun = np.where(mask, wanted if start is None else start, 0.0)
    size = len(wanted) // len(grams)
    parts = []
    for group, gram in enumerate(grams):
        rows = slice(group * size, (group + 1) * size)
        parts.append(_refit(wanted[rows], gram, mask[rows], begun[rows], exact))
    matrices, errors = zip(*parts, strict=True)
    return np.concatenate(matrices), np.concatenate(errors)


def error_of_rows(change: Array, grams: Array) -> Array:
    """Returns d H d^T of each row d, float64 [rows]: the squared error of each output when weights change by D [rows, columns]."""
    grouped = change.reshape(len(grams), -1, change.shape[1])
    errors: Array = np.einsum("gij,gij->gi", np.matmul(grouped, grams), grouped)
    return errors.reshape(-1)


def check_grams(owner: str, matrix: Array, grams: Array) -> Array:
    """Returns a matrix as float64 [rows, columns].

    Raises:
        ValueError: it is none, or there is no Gram matrix of its columns for equal groups of its rows.
    """
    if matrix.ndim != 2 or not np.isfinite(matrix).all():
        raise ValueError(must(owner, "matrix", "2-D and finite", f"shape {matrix.shape}"))
    rows, columns = matrix.shape
    if grams.ndim != 3 or not len(grams) or grams.shape[1:] != (columns, columns) or rows % len(grams):
        raise ValueError(must(owner, "grams", f"[groups, {columns}, {columns}] for equal groups of {rows} rows", grams.shape))
    return np.asarray(matrix, np.float64)


def _refit(wanted: Array, gram: Array, mask: Mask, start: Array, exact: bool | None) -> tuple[Array, Array]:
    """Returns (rows, their errors) of one group."""
    if mask.all():
        return wanted, np.zeros(len(wanted))
    residual = (wanted - start) @ gram
    before = np.einsum("ij,ij->i", residual, wanted - start)
    if not mask.any():
        return start, before
    if exact is None or exact:
        masks, first, which = _distinct(mask)
        work = float(np.sum(np.count_nonzero(mask[first], axis=1) ** 3.0)) / 3
        exact = work <= _EXACT_WORK if exact is None else exact
    moved = start + (_solve(gram, masks, which, residual) if exact else _descend(gram, mask, residual))
    change = wanted - moved
    after = np.einsum("ij,ij->i", change @ gram, change)
    return np.where((after < before)[:, None], moved, start), np.minimum(after, before)


def _distinct(mask: Mask) -> tuple[Mask, Array, Array]:
    """Returns (the masks that rows have, a row of each, which one each row has)."""
    _, first, which = np.unique(np.packbits(mask, axis=1), axis=0, return_index=True, return_inverse=True)
    return mask[first], first, which.reshape(-1)


def _solve(gram: Array, masks: Mask, which: Array, residual: Array) -> Array:
    """Returns the changes that leave no residual in the kept columns, by one factorization for each mask."""
    moves = np.zeros(residual.shape)
    order = np.argsort(which, kind="stable")
    ends = np.searchsorted(which[order], np.arange(1, len(masks)))
    alive = np.diagonal(gram) > 0
    for mask, rows in zip(masks, np.split(order, ends), strict=True):
        kept = np.flatnonzero(mask & alive)
        if kept.size:
            moves[np.ix_(rows, kept)] = _least_squares(gram[np.ix_(kept, kept)], residual[np.ix_(rows, kept)].T).T
    return moves


def _least_squares(gram: Array, right: Array) -> Array:
    """Returns the solution of a positive semidefinite system, one of the least where there are many."""
    every = np.arange(len(gram))
    scale = 1 / np.sqrt(gram[every, every])
    scaled = gram * scale[:, None] * scale
    scaled[every, every] += _RIDGE
    try:
        factor = linalg.cho_factor(scaled, lower=True, overwrite_a=True, check_finite=False)
    except linalg.LinAlgError:  # negative eigenvalues beyond the ridge
        solved: Array = linalg.lstsq(gram, right)[0]
        return solved
    solution: Array = linalg.cho_solve(factor, right * scale[:, None], check_finite=False) * scale[:, None]
    return solution


def _descend(gram: Array, mask: Mask, residual: Array) -> Array:
    """Returns nearly the changes that leave no residual in the kept columns, by conjugate gradients in all rows."""
    energy = np.diagonal(gram)
    scale = np.where(energy > 0, 1 / np.sqrt(np.where(energy > 0, energy, 1.0)), 0.0)
    curved = (gram * scale[:, None] * scale).astype(np.float32)
    kept = mask.astype(np.float32)
    left = residual * scale
    size = np.sqrt(np.einsum("ij,ij->i", left, left))[:, None]
    unit = np.where(size > 0, size, 1.0)  # rows are solved at unit size: float32 holds them all
    left = (left / unit).astype(np.float32) * kept
    way, moved = left.copy(), np.zeros_like(left)
    square = np.einsum("ij,ij->i", left, left)
    goal = _ENOUGH**2 * square
    for _ in range(_STEPS):
        pulled: Array = way @ curved
        pulled *= kept
        slope = np.einsum("ij,ij->i", way, pulled)
        step = np.divide(square, slope, out=np.zeros_like(square), where=(slope > 0) & (square > goal))
        moved += step[:, None] * way
        left -= step[:, None] * pulled
        after = np.einsum("ij,ij->i", left, left)
        if not (after > goal).any():
            break
        way *= np.divide(after, square, out=np.zeros_like(square), where=square > 0)[:, None]
        way += left
        square = after
    result: Any = moved.astype(np.float64) * (unit * scale)
    return np.asarray(result)
