"""Pruning one matrix so that its outputs change little: choose a mask, solve for what is left.

    prune(matrix, grams, Pattern.parse("unstructured"), 0.7)     70 % zeros
    prune(matrix, grams, Pattern.parse("2:4"))                   2 of 4 kept
    prune(matrix, grams, pattern, mask=mask)                     zeros chosen elsewhere

Masks come from alternating directions (`mask_search`) and, where it costs little, from plain saliencies too; least squares (`refit`) tells
which does least harm. Without Gram matrices the largest weights stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnxshrink.errors import must
from onnxshrink.numerics.chunks import Array
from onnxshrink.numerics.mask_search import search_mask
from onnxshrink.numerics.masks import choose
from onnxshrink.numerics.patterns import Mask, Pattern, check_matrix
from onnxshrink.numerics.refit import check_grams, error_of_rows, refit, refit_with_errors
from onnxshrink.numerics.saliency import saliency

__all__ = ["prune"]

_TRIALS = 2e9  # multiplications of a product with the Gram matrix: up to here other masks are tried too


def prune(
    matrix: Array,
    grams: Array | None,
    pattern: Pattern,
    share_removed: float | None = None,
    *,
    mask: Mask | None = None,
    frozen: Mask | None = None,
    effort: float = 1.0,
) -> Array:
    """Returns the matrix with zeros in a pattern, repaired.

    Args:
        matrix: [rows, columns], one of the four float dtypes, finite: what is wanted. Its zeros stay, and count as removed.
        grams: float64 [groups, columns, columns] of the inputs for equal groups of rows, or None where they are not known.
        pattern: of the zeros.
        share_removed: of the elements, from 0 to 1; None for N:M, or with a mask.
        mask: bool [rows, columns], True where kept: chosen already; or None.
        frozen: bool [rows, columns] or None: more zeros that stay and count.
        effort: how many times the usual number of turns to take in search of a mask.

    Returns:
        float64 [rows, columns]. With Gram matrices its output error is at most that of plainly zeroing the smallest weights,
        respectively those outside of the mask.

    Raises:
        ValueError: shapes that do not fit, a share out of range, or values that are not finite.
    """
    check_matrix("prune", matrix)
    wanted = np.asarray(matrix, np.float64)
    zeros: Mask = wanted == 0 if frozen is None else (wanted == 0) | _fitting("frozen", frozen, wanted)
    if mask is not None:
        mask = _fitting("mask", mask, wanted) & ~zeros
    if grams is None or not matrix.size or not np.diagonal(grams, axis1=1, axis2=2).any():
        mask = choose(wanted, pattern, share_removed, frozen=zeros) if mask is None else mask
        return np.where(mask, wanted, 0.0)
    check_grams("prune", wanted, grams)
    if mask is not None:
        return refit(wanted, grams, mask)
    return _best(wanted, grams, _masks(wanted, grams, pattern, share_removed, zeros, effort))


def _masks(
    wanted: Array, grams: Array, pattern: Pattern, share: float | None, zeros: Mask, effort: float
) -> Iterator[tuple[Mask, bool]]:
    """Yields (mask, whether it is worth a refit)."""
    plain = choose(wanted, pattern, share, frozen=zeros)
    if np.array_equal(plain, ~zeros):  # nothing is left to choose
        yield plain, True
        return
    small = wanted.size * wanted.shape[1] <= _TRIALS
    yield search_mask(wanted, grams, pattern, share, frozen=zeros, effort=effort), True
    if small:
        yield choose(saliency(wanted, "wanda", grams), pattern, share, frozen=zeros), True
    yield plain, small


def _best(wanted: Array, grams: Array, masks: Iterator[tuple[Mask, bool]]) -> Array:
    """Returns the matrix of least output error."""
    best: tuple[float, Array] | None = None
    for mask, worth in masks:
        if worth:
            tried, errors = refit_with_errors(wanted, grams, mask)
        else:
            tried = np.where(mask, wanted, 0.0)
            errors = error_of_rows(tried - wanted, grams)
        error = float(errors.sum())
        if best is None or error < best[0]:
            best = error, tried
    if best is None:
        raise ValueError(must("prune", "masks", "one or more", 0))
    return best[1]


def _fitting(name: str, mask: Mask, matrix: Array) -> Mask:
    if mask.shape != matrix.shape:
        raise ValueError(must("prune", name, f"of shape {matrix.shape}", f"shape {mask.shape}"))
    return mask
