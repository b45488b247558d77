"""A matrix as the product of two thin ones, so that what it computes, or the matrix itself, changes least.

A layer computes W X^T. With the Gram matrix H = X^T X of its inputs, the squared error of its outputs is

    E(W') = trace((W - W') H (W - W')^T) = ||(W - W') L||^2        H = L L^T

and the W' of rank r with the least is the SVD of W L, cut after r singular values, times L^-1 (SVD-LLM, arXiv 2403.07378); the error is
what was cut, the sum of s_i^2 over i > r. With H = I that is the SVD of W itself, and the spectral norm of W - W' is the first one cut.

What is left of W L is the projection of W L on its leading left singular vectors U, eigenvectors of S = W H W^T, so no root and no
inverse is needed where W is wide:

    rows <= columns     W' = U (U^T W)              U leading eigenvectors of W H W^T
    rows > columns      W' = (W L V) (V^T L^-1)     V leading eigenvectors of L^T W^T W L

Either is an eigendecomposition of the smaller side. In float64 it finds directions down to 1e-8 of the largest singular value, which
is less than what rounding the factors to float32 moves.

To H a trace of the identity is added: what no input ever showed is still kept by its plain size, as far as the rank allows, and with all
of the rank W' is W.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import linalg

from onnxshrink.errors import must
from onnxshrink.numerics.chunks import Array
from onnxshrink.numerics.eigenvectors import eigenvalues, leading

__all__ = ["balanced", "factor", "spectrum"]

_FLOOR = 1e-8  # of the mean of H's diagonal: far below what is seen, and far above what rounding leaves of what is not
_ROWS = 1024  # of W at a time, so that W H is never held whole


def factor(matrix: Array, rank: int, grams: Array | None = None, seed: int = 0) -> tuple[Array, Array]:
    """Returns the best factors of every group: W' = left @ right.

    Both factors of a component have the same Euclidean norm, and the largest element of every column of ``left`` is positive.

    Args:
        matrix: [groups, rows, columns], finite.
        rank: from 1 to the smaller of rows and columns.
        grams: float64 [groups, columns, columns], symmetric, positive semidefinite up to rounding, or None for plain SVD. One that is
            zero says nothing and counts as the identity.
        seed: of the random start where few of many components are wanted (`onnxshrink.numerics.eigenvectors`).

    Returns:
        (left [groups, rows, rank], right [groups, rank, columns]), float64.

    Raises:
        ValueError: shapes that do not fit, or a rank out of range.
    """
    _check("factor", matrix, grams)
    groups, rows, columns = matrix.shape
    if not 1 <= rank <= min(rows, columns):
        raise ValueError(must("factor", "rank", f"from 1 to {min(rows, columns)}", rank))
    left, right = np.empty((groups, rows, rank)), np.empty((groups, rank, columns))
    for group in range(groups):
        weights, gram = np.asarray(matrix[group], np.float64), None if grams is None else grams[group]
        one = _wide(weights, rank, gram, seed) if rows <= columns else _tall(weights, rank, gram, seed)
        left[group], right[group] = balanced(*one)
    return left, right


def spectrum(matrix: Array, grams: Array | None = None) -> Array:
    """Returns the singular values of W, or of W L: their squares are what components add to the energy of the outputs.

    Args:
        matrix: [groups, rows, columns], finite.
        grams: as in `factor`.

    Returns:
        float64 [groups, min(rows, columns)], descending; those below 1e-8 of the largest are rounding.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check("spectrum", matrix, grams)
    _, rows, columns = matrix.shape
    found = np.empty((len(matrix), min(rows, columns)))
    for group, values in enumerate(found):
        weights, gram = np.asarray(matrix[group], np.float64), None if grams is None else grams[group]
        small = _outputs_gram(weights, gram) if rows <= columns else _inputs_gram(weights, gram)[0]
        values[:] = np.sqrt(eigenvalues(small))
    return found


def balanced(left: Array, right: Array) -> tuple[Array, Array]:
    """Returns the factors with the scale of every component shared evenly, and its sign such that ``left`` has a positive peak.

    Args:
        left: float64 [rows, rank].
        right: float64 [rank, columns].
    """
    if not left.size or not right.size:
        return left, right
    norms = np.linalg.norm(left, axis=0), np.linalg.norm(right, axis=1)
    alive = (norms[0] > 0) & (norms[1] > 0)
    ratio = np.sqrt(norms[1], where=alive, out=np.zeros_like(norms[1])) / np.sqrt(norms[0], where=alive, out=np.ones_like(norms[0]))
    peaks = left[np.abs(left).argmax(axis=0), np.arange(left.shape[1])]
    scale = np.where(peaks < 0, -ratio, ratio)
    inverse = np.divide(1.0, scale, where=alive, out=np.zeros_like(scale))
    return left * scale, right * inverse[:, None]


def _check(owner: str, matrix: Array, grams: Array | None) -> None:
    if matrix.ndim != 3:
        raise ValueError(must(owner, "matrix", "[groups, rows, columns]", f"shape {matrix.shape}"))
    wanted = (matrix.shape[0], matrix.shape[2], matrix.shape[2])
    if grams is not None and grams.shape != wanted:
        raise ValueError(must(owner, "grams", f"of shape {wanted}", f"shape {grams.shape}"))


def _wide(matrix: Array, rank: int, gram: Array | None, seed: int) -> tuple[Array, Array]:
    basis = leading(_outputs_gram(matrix, gram), rank, seed)
    return basis, basis.T @ matrix


def _tall(matrix: Array, rank: int, gram: Array | None, seed: int) -> tuple[Array, Array]:
    small, root, unroot = _inputs_gram(matrix, gram)
    basis = leading(small, rank, seed)
    return matrix @ root(basis), unroot(basis).T


def _outputs_gram(matrix: Array, gram: Array | None) -> Array:
    """Returns W H W^T [rows, rows]."""
    floor = _floor(gram)
    if gram is None or floor == 0.0:
        return matrix @ matrix.T
    found = np.empty((len(matrix), len(matrix)))
    for start in range(0, len(matrix), _ROWS):
        part = matrix[start : start + _ROWS]
        seen = part @ gram
        seen += floor * part
        np.matmul(seen, matrix.T, out=found[start : start + _ROWS])
    return found


_Map = Callable[[Array], Array]


def _inputs_gram(matrix: Array, gram: Array | None) -> tuple[Array, _Map, _Map]:
    """Returns L^T W^T W L [columns, columns], and what multiplies by L and by L^-T."""
    plain = matrix.T @ matrix
    floor = _floor(gram)
    if gram is None or floor == 0.0:
        return plain, lambda vectors: vectors, lambda vectors: vectors
    raised = gram + floor * np.eye(len(gram))
    try:
        lower = linalg.cholesky(raised, lower=True, overwrite_a=True, check_finite=False)
    except linalg.LinAlgError:  # rounding has made it indefinite: a root of the nearest matrix that is not
        values, vectors = np.linalg.eigh(gram)
        spread = np.sqrt(np.maximum(values, 0.0) + floor)
        root, unroot = vectors * spread, vectors / spread
        return root.T @ plain @ root, lambda found: root @ found, lambda found: unroot @ found
    return (
        lower.T @ plain @ lower,
        lambda found: lower @ found,
        lambda found: linalg.solve_triangular(lower, found, trans="T", lower=True, check_finite=False),
    )


def _floor(gram: Array | None) -> float:
    """Returns what is added to the diagonal; 0 if the matrix says nothing."""
    mean = float(np.trace(gram)) / max(len(gram), 1) if gram is not None else 0.0
    return _FLOOR * mean if mean > 0 else 0.0
