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

from dataclasses import dataclass

import numpy as np
from scipy import linalg
from scipy.linalg import blas

from onnxshrink.errors import must
from onnxshrink.numerics.chunks import Array
from onnxshrink.numerics.eigenvectors import eigenvalues, leading

__all__ = ["balanced", "factor", "outputs_gram", "spectrum"]

_FLOOR = 1e-8  # of the mean of H's diagonal: far below what is seen, and far above what rounding leaves of what is not
_BLOCK = 1024  # rows or columns of W at a time, so that neither W in float64 nor W H is ever held whole


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
    ways = _wide if rows <= columns else _tall
    if groups == 1:  # often large: without a copy
        left, right = ways(matrix[0], rank, None if grams is None else grams[0], seed)
        return left[None], right[None]
    lefts, rights = np.empty((groups, rows, rank)), np.empty((groups, rank, columns))
    for group in range(groups):
        lefts[group], rights[group] = ways(matrix[group], rank, None if grams is None else grams[group], seed)
    return lefts, rights


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
        small = outputs_gram if rows <= columns else _inputs_gram
        values[:] = np.sqrt(eigenvalues(small(matrix[group], None if grams is None else grams[group])))
    return found


def outputs_gram(matrix: Array, gram: Array | None) -> Array:
    """Returns W H W^T, float64 [rows, rows].

    Args:
        matrix: [rows, columns].
        gram: H, as `factor` takes it for a group.
    """
    floor = _floor(gram)
    found = np.empty((len(matrix), len(matrix)))
    blocks = _blocks(len(matrix))
    for index, rows in enumerate(blocks):
        part = np.asarray(matrix[rows], np.float64)
        seen = part
        if gram is not None and floor:
            seen = part @ gram
            seen += floor * part
        np.matmul(seen, part.T, out=found[rows, rows])
        del part
        for others in blocks[index + 1 :]:
            np.matmul(seen, np.asarray(matrix[others], np.float64).T, out=found[rows, others])
            found[others, rows] = found[rows, others].T
    return found


def balanced(left: Array, right: Array) -> tuple[Array, Array]:
    """Returns the factors with the scale of every component shared evenly, and its sign such that ``left`` has a positive peak.

    Args:
        left: float64 [rows, rank].
        right: float64 [rank, columns].
    """
    outer, inner = _scales(left, right)
    return left * outer, right * inner[:, None]


def _balanced(left: Array, right: Array) -> tuple[Array, Array]:
    """Returns the same as `balanced`, in the memory of what it is given."""
    outer, inner = _scales(left, right)
    left *= outer
    right *= inner[:, None]
    return left, right


def _scales(left: Array, right: Array) -> tuple[Array, Array]:
    """Returns what balances columns of ``left`` and rows of ``right``, [rank] each."""
    if not left.size or not right.size:
        return np.ones(left.shape[1]), np.ones(len(right))
    norms = np.sqrt(np.einsum("ij,ij->j", left, left)), np.sqrt(np.einsum("ij,ij->i", right, right))
    alive = (norms[0] > 0) & (norms[1] > 0)
    ratio = np.sqrt(norms[1], where=alive, out=np.zeros_like(norms[1])) / np.sqrt(norms[0], where=alive, out=np.ones_like(norms[0]))
    most, least = left.max(axis=0), left.min(axis=0)
    negative, tied = -least > most, np.flatnonzero(-least == most)
    negative[tied] = left[np.abs(left[:, tied]).argmax(axis=0), tied] < 0  # of two as large, the first
    scale = np.where(negative, -ratio, ratio)
    return scale, np.divide(1.0, scale, where=alive, out=np.zeros_like(scale))


def _check(owner: str, matrix: Array, grams: Array | None) -> None:
    if matrix.ndim != 3:
        raise ValueError(must(owner, "matrix", "[groups, rows, columns]", f"shape {matrix.shape}"))
    wanted = (matrix.shape[0], matrix.shape[2], matrix.shape[2])
    if grams is not None and grams.shape != wanted:
        raise ValueError(must(owner, "grams", f"of shape {wanted}", f"shape {grams.shape}"))


def _wide(matrix: Array, rank: int, gram: Array | None, seed: int) -> tuple[Array, Array]:
    basis = leading(outputs_gram(matrix, gram), rank, seed)
    right = np.empty((rank, matrix.shape[1]))
    for columns in _blocks(matrix.shape[1]):
        np.matmul(basis.T, np.asarray(matrix[:, columns], np.float64), out=right[:, columns])
    return _balanced(basis, right)


def _tall(matrix: Array, rank: int, gram: Array | None, seed: int) -> tuple[Array, Array]:
    inner, right = _either_side(leading(_inputs_gram(matrix, gram), rank, seed), gram)
    left = np.empty((len(matrix), rank))
    for rows in _blocks(len(matrix)):
        np.matmul(np.asarray(matrix[rows], np.float64), inner, out=left[rows])
    return _balanced(left, right)


def _either_side(basis: Array, gram: Array | None) -> tuple[Array, Array]:
    """Returns L V and V^T L^-1."""
    root = _root(gram)  # for the second time: that is fast, and the eigenvectors needed the memory
    if root is None:
        return basis, np.ascontiguousarray(basis.T)
    return root.times(basis), np.ascontiguousarray(root.inversely_times(basis).T)


def _inputs_gram(matrix: Array, gram: Array | None) -> Array:
    """Returns L^T W^T W L [columns, columns]."""
    root = _root(gram)
    plain = np.zeros((matrix.shape[1], matrix.shape[1]))
    for rows in _blocks(len(matrix)):
        part = np.asarray(matrix[rows], np.float64)
        plain += part.T @ part
    return plain if root is None else root.around(plain)


@dataclass(frozen=True)
class _Root:
    """L with H = L L^T: lower triangular, or eigenvectors times roots of eigenvalues, which ``squares`` are."""

    matrix: Array
    squares: Array | None = None

    def times(self, vectors: Array) -> Array:
        """Returns L v."""
        product: Array = self.matrix @ vectors
        return product

    def inversely_times(self, vectors: Array) -> Array:
        """Returns L^-T v."""
        if self.squares is not None:
            return self.times(vectors / self.squares[:, None])
        found: Array = linalg.solve_triangular(self.matrix, vectors, trans="T", lower=True, check_finite=False)
        return found

    def around(self, inner: Array) -> Array:
        """Returns L^T S L of a symmetric S, whose memory is used."""
        if self.squares is not None:
            product: Array = self.matrix.T @ (inner @ self.matrix)
            return product
        half = blas.dtrmm(1.0, self.matrix, inner.T, side=1, lower=1, overwrite_b=1)  # S L
        whole: Array = blas.dtrmm(1.0, self.matrix, half, lower=1, trans_a=1, overwrite_b=1)
        return whole.T


def _root(gram: Array | None) -> _Root | None:
    """Returns the root of H and its floor, or None where H counts as the identity."""
    floor = _floor(gram)
    if gram is None or floor == 0.0:
        return None
    raised = np.array(gram, np.float64)
    raised.flat[:: len(raised) + 1] += floor
    try:
        return _Root(linalg.cholesky(raised.T, lower=True, overwrite_a=True, check_finite=False))  # LAPACK's order: in place
    except linalg.LinAlgError:  # rounding has made it indefinite: a root of the nearest matrix that is not
        values, vectors = np.linalg.eigh(gram)
        squares = np.maximum(values, 0.0) + floor
        return _Root(vectors * np.sqrt(squares), squares)


def _blocks(count: int) -> list[slice]:
    """Returns slices of so many rows or columns as are taken at a time."""
    return [slice(start, start + _BLOCK) for start in range(0, count, _BLOCK)]


def _floor(gram: Array | None) -> float:
    """Returns what is added to the diagonal; 0 if the matrix says nothing."""
    mean = float(np.trace(gram)) / max(len(gram), 1) if gram is not None else 0.0
    return _FLOOR * mean if mean > 0 else 0.0
