"""Which weights go to zero: the units of least score.

Matrices are [rows = output channels, cols = reduction axis], and True means kept. Units of a pattern go or stay as a whole, see
`onnxshrink.numerics.patterns`. Those of least score go first; of equal scores the one of lower index. So a matrix
that has been masked gets the same mask again: its zeros are the lowest scores.

Only the threshold between removed and kept is sought, by counting: first the top 16 bits of all scores, then the next
16 bits of the scores at the boundary, and so on (a radix selection). Nothing is sorted or copied, so many layers cost
no memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from onnxshrink.errors import must
from onnxshrink.numerics.chunks import CHUNK, Array, chunks, tiles
from onnxshrink.numerics.floatbits import bits_of
from onnxshrink.numerics.patterns import (
    Mask,
    Norm,
    Pattern,
    check_matrix,
    expand_units,
    score_dtype,
    scores,
    unit_sizes,
)

__all__ = ["choose", "keep_largest", "n_m_mask", "split_global"]

_DIGIT = 16  # bits of a score counted in one pass


def keep_largest(scores: Array, share_removed: float) -> Mask:
    """Returns which units to keep when the lowest go, exactly ``floor(share_removed * scores.size + 1e-9)`` of them.

    Args:
        scores: floats of any shape, no NaN.
        share_removed: from 0 to 1.

    Returns:
        bool, the shape of `scores`; of equal scores the first are removed.

    Raises:
        ValueError: a share out of range, or a NaN.
    """
    return split_global([scores], share_removed)[0]


def split_global(
    score_list: Sequence[Array], share_removed: float, *, weights: Sequence[int | Array] | None = None
) -> list[Mask]:
    """Returns which units to keep when those of all layers compete.

    All units are lined up by score, equal ones by layer and then by index; the longest beginning of that line goes
    whose elements number at most ``floor(share_removed * all elements + 1e-9)``.

    Args:
        score_list: of each layer, floats of any shape, no NaN.
        share_removed: share of all elements, from 0 to 1.
        weights: how many elements a unit of each layer stands for, or integers of the shape of its scores where units differ; 1 if
            None.

    Returns:
        For each layer bool, the shape of its scores.

    Raises:
        ValueError: a share out of range, a NaN, or weights that are not positive or do not fit the layers.
    """
    owner = "split_global"
    if not 0 <= share_removed <= 1:
        raise ValueError(must(owner, "share_removed", "between 0 and 1", share_removed))
    layers = [np.ascontiguousarray(layer) for layer in score_list]  # ties are broken in C order
    sizes = [np.ones((), np.int64)] * len(layers) if weights is None else [np.asarray(weight) for weight in weights]
    if len(sizes) != len(layers) or any((size < 1).any() or size.dtype.kind not in "iu" for size in sizes):
        raise ValueError(must(owner, "weights", f"{len(layers)} positive integers", weights))
    if any(size.shape not in ((), layer.shape) for size, layer in zip(sizes, layers, strict=True)):
        raise ValueError(must(owner, "weights", "of the shapes of the scores", [size.shape for size in sizes]))
    sizes = [np.ravel(size).astype(np.int64, copy=False) for size in sizes]
    dtype = np.result_type(np.float32, *(layer.dtype for layer in layers))
    each = zip(sizes, layers, strict=True)
    elements = sum(int(size.sum()) * (layer.size if size.size == 1 else 1) for size, layer in each)
    budget = int(np.floor(share_removed * elements + 1e-9))
    if budget >= elements:
        return [np.zeros(layer.shape, np.bool_) for layer in layers]
    threshold, budget = _threshold(layers, sizes, budget, dtype)
    masks = []
    for layer, size in zip(layers, sizes, strict=True):
        mask, budget = _split(layer, size, threshold, budget, dtype)
        masks.append(mask)
    return masks


def choose(
    saliency: Array, pattern: Pattern, share_removed: float | None = None, *, norm: Norm = "l2", frozen: Mask | None = None
) -> Mask:
    """Returns the mask of one matrix in a pattern.

    Args:
        saliency: [rows, cols], not negative, finite: the higher, the sooner a weight is kept.
        pattern: its own share holds where it is N:M.
        share_removed: of the elements, from 0 to 1; at most that many go, less than a unit fewer. None for N:M.
        norm: how the saliencies of a unit are put together, see `scores`.
        frozen: bool [rows, cols] or None: zeros already. They are removed in any case, count as removed, and score nothing.

    Returns:
        bool [rows, cols], True where kept.

    Raises:
        ValueError: a share out of range, or none where the pattern needs one; shapes that do not fit, or a saliency that is not finite.
    """
    if frozen is not None:
        if frozen.shape != saliency.shape:
            raise ValueError(must("choose", "frozen", f"of shape {saliency.shape}", f"shape {frozen.shape}"))
        # below all others, so that elements that are zero go before those that only count for nothing
        lowest = -1.0 if pattern.sides(saliency.shape) == (1, 1) and pattern.kind != "n:m" else 0.0
        saliency = np.where(frozen, 0.0, saliency)
    if pattern.kind == "n:m":
        mask = n_m_mask(saliency, pattern.n, pattern.m)
    elif share_removed is None:
        raise ValueError(must("choose", "share_removed", f"given for {pattern}", None))
    else:
        units = scores(saliency, pattern, norm)
        if frozen is not None and lowest < 0:
            units[frozen] = lowest
        sizes = 1 if units.shape == saliency.shape else _common(unit_sizes(pattern, saliency.shape))
        (keep,) = split_global([units], share_removed, weights=[sizes])
        mask = expand_units(keep, pattern, saliency.shape)
    return mask if frozen is None else mask & ~frozen


def n_m_mask(matrix: Array, n: int, m: int) -> Mask:
    """Returns the mask that keeps the n elements of largest magnitude in each group of m along cols.

    Args:
        matrix: [rows, cols], one of the four float dtypes.
        n: from 1 to m.
        m: a last group of r < m elements keeps min(n, r).

    Returns:
        bool [rows, cols]; of equal magnitudes the first are removed.

    Raises:
        ValueError: n out of range, no matrix, another dtype, or a value that is not finite.
    """
    if not 1 <= n <= m:
        raise ValueError(must("n_m_mask", "n", f"between 1 and {m}", n))
    check_matrix("n_m_mask", matrix)
    mask = np.ones(matrix.shape, np.bool_)
    for rows, cols in tiles(matrix.shape, CHUNK, 1, m):
        magnitudes = np.abs(matrix[rows, cols].astype(score_dtype(matrix), order="C"))
        height, width = magnitudes.shape
        whole = width - width % m
        groups = magnitudes[:, :whole].reshape(height, whole // m, m)
        kept = mask[rows, cols]
        kept[:, :whole] = _largest_of_last_axis(groups, n).reshape(height, whole)
        kept[:, whole:] = _largest_of_last_axis(magnitudes[:, whole:], n)
    return mask


def _largest_of_last_axis(magnitudes: Array, n: int) -> Mask:
    mask = np.ones(magnitudes.shape, np.bool_)
    order = np.argsort(magnitudes, axis=-1, kind="stable")
    np.put_along_axis(mask, order[..., : max(magnitudes.shape[-1] - n, 0)], False, axis=-1)
    return mask


def _common(sizes: Array) -> int | Array:
    """Returns one number where all sizes are the same, which is quicker to count with."""
    return int(sizes.flat[0]) if sizes.size and (sizes == sizes.flat[0]).all() else sizes


def _threshold(layers: Sequence[Array], sizes: Sequence[Array], budget: int, dtype: np.dtype[Any]) -> tuple[Any, int]:
    """Returns (key, rest): all units of lower keys fit in the budget and leave the rest; those of this key do not."""
    width = 8 * dtype.itemsize
    prefix = 0
    for shift in range(width - _DIGIT, -1, -_DIGIT):
        counts = np.zeros(1 << _DIGIT, np.int64)
        for layer, size in zip(layers, sizes, strict=True):
            done = 0
            for keys in _keys(layer, dtype) if layer.size else ():
                part, done = size[done : done + keys.size] if size.size > 1 else size, done + keys.size
                if shift + _DIGIT < width:
                    here = keys >> keys.dtype.type(shift + _DIGIT) == prefix
                    keys, part = keys[here], part[here] if size.size > 1 else size
                digits = ((keys >> keys.dtype.type(shift)) & keys.dtype.type((1 << _DIGIT) - 1)).astype(np.intp)
                if size.size == 1:
                    counts += size * np.bincount(digits, minlength=counts.size)
                else:  # whole numbers far below 2^53
                    counts += np.bincount(digits, part, counts.size).astype(np.int64)
        totals = np.cumsum(counts)
        digit = int(np.searchsorted(totals, budget, side="right"))
        budget -= int(totals[digit - 1]) if digit else 0
        prefix = prefix << _DIGIT | digit
    return prefix, budget


def _split(
    layer: Array, size: Array, threshold: int, budget: int, dtype: np.dtype[Any]
) -> tuple[Mask, int]:
    """Returns (mask, rest): keys below the threshold go, and the first ties at it that fit in the budget, which leave the rest."""
    mask, done = np.empty(layer.size, np.bool_), 0
    for keys in _keys(layer, dtype):
        part = mask[done : done + keys.size]
        np.greater(keys, threshold, out=part)
        ties = np.flatnonzero(keys == threshold)
        taken = np.cumsum(size[done + ties] if size.size > 1 else np.broadcast_to(size, ties.shape))
        fit = int(np.searchsorted(taken, budget, side="right"))
        part[ties[fit:]] = True
        budget = 0 if fit < ties.size else budget - int(taken[-1]) if fit else budget
        done += keys.size
    return mask.reshape(layer.shape), budget


def _keys(layer: Array, dtype: np.dtype[Any]) -> Iterator[Array]:
    """Yields the scores chunk by chunk as unsigned integers of the same order, both zeros as one.

    Raises:
        ValueError: a NaN, which has no place in the order.
    """
    for chunk in chunks(layer):
        values = chunk.astype(dtype) + dtype.type(0)  # -0.0 + 0.0 is +0.0
        if np.isnan(values).any():
            raise ValueError(must("split_global", "scores", "comparable", "a NaN"))
        patterns = bits_of(values)
        sign = patterns.dtype.type(8 * dtype.itemsize - 1)
        # flip the sign bit of positive numbers, every bit of negative ones
        yield patterns ^ ((np.zeros_like(patterns) - (patterns >> sign)) | (patterns.dtype.type(1) << sign))
