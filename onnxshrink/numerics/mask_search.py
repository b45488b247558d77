"""Which weights a layer can best do without when those left make up for them: alternating directions over weights and mask.

With the Gram matrix H of a layer's inputs, scaled to a diagonal of ones as D^-1/2 H D^-1/2 (and W to W D^1/2),

    minimise trace((V - W) H (V - W)^T)    subject to V = Z, Z zero outside of a mask of the pattern

is solved in turns (ALPS, Meng et al., arXiv 2406.07831; Boyd et al. 2011), with U the running sum of V - Z:

    Z = the nearest matrix of the pattern to V + U          keep what is largest
    V = W + r (Z - U - W) (H + r I)^-1                      least squares, drawn towards Z - U
    U = U + V - Z

while r rises: at first weights are traded freely, in the end V is nearly of the pattern. With r from 0.01 to 1 in geometric steps, the
output error was 1 to 6 dB below that of masks by |w|, |w|·||x|| or OBS saliency, each followed by least squares, and below SparseGPT's,
on layers of a ResNet-20, SqueezeNet and MiniLM at 50, 70 and 80 %, 2:4 and 4x1. Rising r by how much the mask still changes, as ALPS
does, from 0.1 on was 0.1 to 1 dB worse; over-relaxation of 1.6, 0.1 to 1 dB; a sparsity that rises cubically meanwhile, 0.1 to 1 dB.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import linalg

from onnxshrink.numerics.chunks import Array
from onnxshrink.numerics.masks import choose
from onnxshrink.numerics.patterns import Mask, Pattern
from onnxshrink.numerics.refit import check_grams

__all__ = ["search_mask"]

_WORK = 1e11  # multiplications: about a second
_FEWEST, _MOST = 12, 150  # turns; from 12 to 150 gained 0.1 to 1 dB, the more the smaller the layer
_SCHEDULES = ((16, 0.1, 0.6), (32, 0.05, 1.0), (10**9, 0.01, 1.0))  # up to so many turns r goes from here to there
_SPECTRAL = 1536  # columns up to which eigenvectors, which serve every r, cost less than an inverse for some
_INVERSES = 3  # with as many values of r, 12 turns did as well as with one for each
_RIDGE = 1e-6  # that float32 notices


def search_mask(
    matrix: Array,
    grams: Array,
    pattern: Pattern,
    share_removed: float | None = None,
    *,
    frozen: Mask | None = None,
    effort: float = 1.0,
) -> Mask:
    """Returns a mask with which least squares leaves little error.

    Args:
        matrix: [rows, columns], finite: what is wanted.
        grams: float64 [groups, columns, columns] for equal groups of rows.
        pattern: of the zeros, in the whole matrix.
        share_removed: of the elements, from 0 to 1; None for N:M.
        frozen: bool [rows, columns] or None: zeros already, which count as removed.
        effort: how many times the usual number of turns to take.

    Returns:
        bool [rows, columns], True where kept.

    Raises:
        ValueError: shapes that do not fit, or a share out of range.
    """
    wanted = check_grams("search_mask", matrix, grams)
    if not matrix.size:
        return choose(wanted, pattern, share_removed, frozen=frozen)
    weights, scaled = _scaled(wanted, grams)
    turns = _turns(matrix.shape, len(grams), effort)
    first, last = next((first, last) for most, first, last in _SCHEDULES if turns <= most)
    rates = np.geomspace(first, last, turns)
    if grams.shape[1] <= _SPECTRAL:
        pull = _spectral(scaled)
    else:
        levels = np.geomspace(first, last, _INVERSES)
        rates, pull = np.repeat(levels, -(-turns // _INVERSES))[:turns], _inverse(scaled)
    relaxed, sums, before = weights, np.zeros_like(weights), rates[0]
    for rate in rates:
        sums *= before / rate  # U is in units of 1 / r
        near = relaxed + sums
        near *= choose(near.reshape(matrix.shape), pattern, share_removed, frozen=frozen).reshape(near.shape)
        relaxed = pull(near - sums - weights, float(rate))
        relaxed += weights
        sums += relaxed
        sums -= near
        before = rate
    return choose((relaxed + sums).reshape(matrix.shape), pattern, share_removed, frozen=frozen)


def _turns(shape: tuple[int, ...], groups: int, effort: float) -> int:
    rows, columns = shape
    each = 2.0 * rows * columns * columns + columns * groups  # two products a turn
    return max(round(effort * float(np.clip(_WORK / each, _FEWEST, _MOST))), 1)


def _scaled(wanted: Array, grams: Array) -> tuple[Array, Array]:
    """Returns (weights, Grams of unit diagonal), float32 [groups, rows, columns] and [groups, columns, columns]; weights at most 1.

    Columns that were zero in every input weigh nothing: they go first.
    """
    energy = np.diagonal(grams, axis1=1, axis2=2)
    alive = energy > 0
    root = np.sqrt(np.where(alive, energy, 0.0))
    inverse = np.where(alive, 1 / np.where(alive, root, 1.0), 0.0)
    weights = wanted.reshape(len(grams), -1, wanted.shape[1]) * root[:, None]
    largest = float(np.abs(weights).max())
    scaled = (grams * inverse[:, :, None] * inverse[:, None]).astype(np.float32)
    return (weights / (largest or 1.0)).astype(np.float32), scaled


def _spectral(scaled: Array) -> Callable[[Array, float], Array]:
    """Returns f(D, r) = r D (H + r I)^-1 for every r."""
    values, vectors = np.linalg.eigh(scaled.astype(np.float64))
    values, vectors = np.maximum(values, 0.0).astype(np.float32), vectors.astype(np.float32)

    def pull(change: Array, rate: float) -> Array:
        shrink = (np.float32(rate) / (values + np.float32(rate)))[:, None]
        pulled: Array = np.matmul(np.matmul(change, vectors) * shrink, vectors.swapaxes(1, 2))
        return pulled

    return pull


def _inverse(scaled: Array) -> Callable[[Array, float], Array]:
    """Returns the same f, quick where r is the one of the call before."""
    known: dict[float, Array] = {}

    def pull(change: Array, rate: float) -> Array:
        if rate not in known:
            known.clear()
            known[rate] = np.stack([np.float32(rate) * _inverted(gram, rate + _RIDGE) for gram in scaled])
        pulled: Array = np.matmul(change, known[rate])
        return pulled

    return pull


def _inverted(gram: Array, shift: float) -> Array:
    """Returns (H + shift I)^-1, float32."""
    shifted = np.array(gram, order="F")
    shifted.reshape(-1, order="A")[:: len(gram) + 1] += np.float32(shift)
    factor, info = linalg.lapack.spotrf(shifted, lower=1, clean=0, overwrite_a=1)
    while info:  # eigenvalues that rounding made negative
        shift *= 10
        shifted = np.array(gram + np.float32(shift) * np.eye(len(gram), dtype=np.float32), order="F")
        factor, info = linalg.lapack.spotrf(shifted, lower=1, clean=0, overwrite_a=1)
    lower, _ = linalg.lapack.spotri(factor, lower=1, overwrite_c=1)
    triangle = np.tril(lower)
    inverse: Array = triangle + np.tril(lower, -1).T
    return inverse
