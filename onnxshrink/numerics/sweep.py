"""Pruning column by column with error feedback, the mask chosen on the way (SparseGPT, Frantar & Alistarh, arXiv 2301.00774).

As in `onnxshrink.numerics.feedback`: with H^-1 = U^T U, U upper triangular, putting v in the place of w_j costs (w_j - v)^2 / U_jj^2
when the columns after it make up for it as far as they can. What goes is decided block by block, from the weights as they are by then: of a
block of columns those of least w_j^2 / U_jj^2; of N:M and of blocks wider than one column, whole units. What is kept may be rounded
in the same sweep.

Columns are taken in order of falling H_jj, in bunches as wide as a unit. The share removed is that of the whole matrix after each
block of columns, so it is right at the end.
"""

from __future__ import annotations

import numpy as np
from scipy import linalg

from onnxshrink.errors import must
from onnxshrink.numerics.chunks import Array
from onnxshrink.numerics.feedback import Snap
from onnxshrink.numerics.masks import choose
from onnxshrink.numerics.patterns import Mask, Pattern
from onnxshrink.numerics.refit import check_grams

__all__ = ["prune_with_feedback"]

_BLOCK = 128  # columns between two choices, and between two updates of all the rest: SparseGPT's
_DAMPING = 0.01  # of the mean of the diagonal


def prune_with_feedback(
    matrix: Array,
    gram: Array,
    pattern: Pattern,
    share_removed: float | None = None,
    *,
    mask: Mask | None = None,
    frozen: Mask | None = None,
    snap: Snap | None = None,
    damping: float = _DAMPING,
) -> Array:
    """Returns the pruned matrix, what went made up for by columns that came later.

    Args:
        matrix: [rows, columns], finite.
        gram: float64 [columns, columns] of the inputs.
        pattern: of the zeros. Whole rows are chosen by what is left of them without any feedback: within a row nothing is left.
        share_removed: of the elements, from 0 to 1; None for N:M, or with a mask.
        mask: bool [rows, columns], True where kept: what is chosen already; or None.
        frozen: bool [rows, columns] or None: zeros already, which count as removed.
        snap: gives the allowed values of a column, or None for any.
        damping: what is added to the diagonal of the Gram matrix, relative to its mean.

    Returns:
        float64 [rows, columns].

    Raises:
        ValueError: shapes that do not fit, or a share out of range.
    """
    wanted = check_grams("prune_with_feedback", matrix, gram[None])
    for name, given in (("mask", mask), ("frozen", frozen)):
        if given is not None and given.shape != matrix.shape:
            raise ValueError(must("prune_with_feedback", name, f"of shape {matrix.shape}", f"shape {given.shape}"))
    if mask is None and pattern.kind == "rows":
        mask = choose(wanted * np.sqrt(np.maximum(np.diagonal(gram), 0.0)), pattern, share_removed, frozen=frozen)
    width = pattern.m if pattern.kind in ("n:m", "block") else 1
    order = _order(np.diagonal(gram), width)
    work = _Work(wanted, order, _root(gram, order, damping), mask, frozen)
    step = width * max(_BLOCK // width, 1)
    removed = 0
    for start in range(0, matrix.shape[1], step):
        stop = min(start + step, matrix.shape[1])
        if mask is None and pattern.kind != "n:m":
            goal = 0 if share_removed is None else int(np.floor(share_removed * stop * len(matrix) + 1e-9))
            part = None if share_removed is None else np.clip((goal - removed) / max((stop - start) * len(matrix), 1), 0.0, 1.0)
            work.choose(start, stop, pattern, part)
            removed += (stop - start) * len(matrix) - int(np.count_nonzero(work.kept[start:stop]))
        work.sweep(start, stop, pattern if mask is None and pattern.kind == "n:m" else None, snap)
    result = np.empty(matrix.shape)
    result.T[order] = work.values
    return result


class _Work:
    """The matrix on its way, columns first and in the order of the sweep."""

    def __init__(self, wanted: Array, order: Array, root: Array, mask: Mask | None, frozen: Mask | None) -> None:
        self.values = np.ascontiguousarray(wanted.T[order])
        self.kept = np.ones(self.values.shape, np.bool_) if mask is None else mask.T[order]
        self.frozen = None if frozen is None else frozen.T[order]
        if self.frozen is not None:
            self.kept = self.kept & ~self.frozen
        self.order = order
        self.root = root
        self.pivots = np.diagonal(root)

    def choose(self, start: int, stop: int, pattern: Pattern, share: float | None) -> None:
        """Decides what stays of some columns."""
        saliency = (self.values[start:stop] / self.pivots[start:stop, None]).T
        zeros = None if self.frozen is None else self.frozen[start:stop].T
        self.kept[start:stop] = choose(np.ascontiguousarray(saliency), pattern, share, frozen=zeros).T

    def sweep(self, start: int, stop: int, groups: Pattern | None, snap: Snap | None) -> None:
        """Fixes some columns one by one and passes their errors on; N:M is decided group by group."""
        values, root = self.values, self.root
        errors = np.empty((stop - start, values.shape[1]))
        for column in range(start, stop):
            if groups is not None and (column - start) % groups.m == 0:
                self.choose(column, min(column + groups.m, stop), groups, None)
            fixed = values[column] if snap is None else snap(values[column], int(self.order[column]))
            fixed = np.where(self.kept[column], fixed, 0.0)
            error = (values[column] - fixed) / self.pivots[column]
            values[column + 1 : stop] -= root[column, column + 1 : stop, None] * error
            values[column], errors[column - start] = fixed, error
        values[stop:] -= root[start:stop, stop:].T @ errors


def _order(energy: Array, width: int) -> Array:
    """Returns the columns by falling energy, in bunches of neighbours; what is left at the end of the matrix comes last."""
    columns = np.arange(len(energy))
    whole = len(energy) - len(energy) % width
    bunches = columns[:whole].reshape(-1, width)
    ranked = bunches[np.argsort(-energy[:whole].reshape(-1, width).sum(axis=1), kind="stable")]
    return np.concatenate([ranked.reshape(-1), columns[whole:]])


def _root(gram: Array, order: Array, damping: float) -> Array:
    """Returns upper triangular U with (H + damping)^-1 = U^T U, rows and columns in this order; dead columns stand alone."""
    energy = np.maximum(np.diagonal(gram)[order], 0.0)
    mean = float(energy.mean()) if energy.any() else 1.0
    dead = np.flatnonzero(energy <= 0)
    damped = gram[np.ix_(order, order)]
    damped[dead, :] = damped[:, dead] = 0.0
    every = np.arange(len(damped))
    while True:
        damped[every, every] = np.where(energy > 0, energy, mean) + damping * mean
        try:
            lower = linalg.cholesky(damped[::-1, ::-1], lower=True, check_finite=False)
        except linalg.LinAlgError:
            damping = max(10 * damping, 1e-6)
            if damping > 1e3:
                problem = "a matrix with large negative eigenvalues"
                raise ValueError(must("prune_with_feedback", "gram", "positive semidefinite", problem)) from None
            continue
        upper = np.asfortranarray(lower[::-1, ::-1])
        root: Array = np.triu(linalg.solve_triangular(upper, np.eye(len(damped)), lower=False, check_finite=False))
        return root
