"""Which weights go to zero: any, N of each M, or whole blocks.

Matrices are [rows = output channels, cols = reduction axis], and True means kept. What goes or stays as a whole is a
unit: an element, or a block. The units of least score go first; of equal scores the one of lower index. So a matrix
that has been masked gets the same mask again: its zeros are the lowest scores.

Only the threshold between removed and kept is sought, by counting: first the top 16 bits of all scores, then the next
16 bits of the scores at the boundary, and so on (a radix selection). Nothing is sorted or copied, so many layers cost
no memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from onnxshrink.errors import OptionError, must
from onnxshrink.numerics.chunks import CHUNK, Array, chunks, map_chunks, tiles
from onnxshrink.numerics.floatbits import bits_of, check_finite

__all__ = ["Pattern", "expand_units", "keep_largest", "n_m_mask", "scores", "split_global"]

Mask = np.ndarray[Any, np.dtype[np.bool_]]

_DIGIT = 16  # bits of a score counted in one pass


@dataclass(frozen=True)
class Pattern:
    """A shape that zeros must have.

    Attributes:
        kind: ``unstructured``; ``n:m``, at most n non-zeros in each m consecutive elements along cols (2:4 is
            NVIDIA's); or ``block``, n rows x m cols zeroed as a whole.
        n: see kind; 1 if unstructured.
        m: see kind; 1 if unstructured.
    """

    kind: Literal["unstructured", "n:m", "block"]
    n: int = 1
    m: int = 1

    def __post_init__(self) -> None:
        if self.kind == "n:m" and not 1 <= self.n < self.m:
            raise OptionError(must("pattern", "N of N:M", "at least 1 and below M", str(self), "2:4 keeps 2 of 4"))
        if self.n < 1 or self.m < 1:
            raise OptionError(must("pattern", "sides of a block", "at least 1", str(self)))

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Returns the pattern of a text such as ``unstructured``, ``2:4``, ``1x4`` or ``16x1``.

        Raises:
            OptionError: a ValueError; the text names no pattern, or an empty or full one.
        """
        if text == "unstructured":
            return cls("unstructured")
        found = re.fullmatch(r"([0-9]{1,6})([:x])([0-9]{1,6})", text)
        if not found:
            raise OptionError(must("pattern", "text", "unstructured, N:M such as 2:4 or NxM such as 1x4", repr(text)))
        return cls("n:m" if found[2] == ":" else "block", int(found[1]), int(found[3]))

    def __str__(self) -> str:
        if self.kind == "unstructured":
            return self.kind
        return f"{self.n}{':' if self.kind == 'n:m' else 'x'}{self.m}"


def scores(matrix: Array, pattern: Pattern) -> Array:
    """Returns the magnitude of each unit.

    Args:
        matrix: [rows, cols], one of the four float dtypes.
        pattern: blocks are scored by the root mean square of their members, so a smaller block at the edge competes on
            equal terms; elements, also those of N:M, by their absolute value.

    Returns:
        [rows, cols], or [ceil(rows / n), ceil(cols / m)] for blocks; float64 for a float64 matrix, else float32.

    Raises:
        ValueError: no matrix, another dtype, or a value that is not finite.
    """
    _check_matrix("scores", matrix)
    dtype = _score_dtype(matrix)
    if pattern.kind != "block":
        return map_chunks(lambda chunk: np.abs(chunk.astype(dtype)), matrix, dtype)
    n, m = pattern.n, pattern.m
    result = np.empty(_unit_shape(pattern, matrix.shape), dtype)
    for rows, cols in tiles(matrix.shape, CHUNK, n, m):
        # in float64, where no square of a smaller float overflows or vanishes
        squares = np.square(matrix[rows, cols].astype(np.float64))
        members = np.outer(_group_lengths(squares.shape[0], n), _group_lengths(squares.shape[1], m))
        sums = _sums_of_groups(_sums_of_groups(squares, m).T, n).T
        result[rows.start // n : -(-rows.stop // n), cols.start // m : -(-cols.stop // m)] = np.sqrt(sums / members)
    return result


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
    score_list: Sequence[Array], share_removed: float, *, weights: Sequence[int] | None = None
) -> list[Mask]:
    """Returns which units to keep when those of all layers compete.

    All units are lined up by score, equal ones by layer and then by index; the longest beginning of that line goes
    whose elements number at most ``floor(share_removed * all elements + 1e-9)``.

    Args:
        score_list: of each layer, floats of any shape, no NaN.
        share_removed: share of all elements, from 0 to 1.
        weights: how many elements a unit of each layer stands for; 1 if None.

    Returns:
        For each layer bool, the shape of its scores.

    Raises:
        ValueError: a share out of range, a NaN, or weights that are not positive or not as many as layers.
    """
    owner = "split_global"
    if not 0 <= share_removed <= 1:
        raise ValueError(must(owner, "share_removed", "between 0 and 1", share_removed))
    sizes = [1] * len(score_list) if weights is None else [int(weight) for weight in weights]
    if len(sizes) != len(score_list) or any(size < 1 for size in sizes):
        raise ValueError(must(owner, "weights", f"{len(score_list)} positive integers", weights))
    layers = [np.ascontiguousarray(layer) for layer in score_list]  # ties are broken in C order
    dtype = np.result_type(np.float32, *(layer.dtype for layer in layers))
    elements = sum(size * layer.size for size, layer in zip(sizes, layers, strict=True))
    budget = int(np.floor(share_removed * elements + 1e-9))
    if budget >= elements:
        return [np.zeros(layer.shape, np.bool_) for layer in layers]
    threshold, budget = _threshold(layers, sizes, budget, dtype)
    masks = []
    for layer, size in zip(layers, sizes, strict=True):
        mask, ties = _split(layer, threshold, budget // size, dtype)
        masks.append(mask)
        budget = budget - ties * size if ties * size <= budget else 0
    return masks


def expand_units(keep: Mask, pattern: Pattern, shape: tuple[int, int]) -> Mask:
    """Returns the mask of elements that a mask of units stands for.

    Args:
        keep: bool, of the shape that `scores` returns for a matrix of this shape.
        pattern: what the units are.
        shape: (rows, cols) of the matrix.

    Returns:
        bool [rows, cols].

    Raises:
        ValueError: `keep` has another shape.
    """
    expected = _unit_shape(pattern, shape)
    if keep.shape != expected:
        raise ValueError(must("expand_units", "keep", f"of shape {expected}", f"shape {keep.shape}"))
    if pattern.kind != "block":
        return keep
    tall = np.repeat(keep, pattern.n, axis=0)[: shape[0]]
    return np.ascontiguousarray(np.repeat(tall, pattern.m, axis=1)[:, : shape[1]])


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
    _check_matrix("n_m_mask", matrix)
    mask = np.ones(matrix.shape, np.bool_)
    for rows, cols in tiles(matrix.shape, CHUNK, 1, m):
        magnitudes = np.abs(matrix[rows, cols].astype(_score_dtype(matrix), order="C"))
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


def _threshold(layers: Sequence[Array], sizes: Sequence[int], budget: int, dtype: np.dtype[Any]) -> tuple[Any, int]:
    """Returns (key, rest): all units of lower keys fit in the budget and leave the rest; those of this key do not."""
    width = 8 * dtype.itemsize
    prefix = 0
    for shift in range(width - _DIGIT, -1, -_DIGIT):
        counts = np.zeros(1 << _DIGIT, np.int64)
        for layer, size in zip(layers, sizes, strict=True):
            for keys in _keys(layer, dtype):
                if shift + _DIGIT < width:
                    keys = keys[keys >> keys.dtype.type(shift + _DIGIT) == prefix]
                digits = (keys >> keys.dtype.type(shift)) & keys.dtype.type((1 << _DIGIT) - 1)
                counts += size * np.bincount(digits.astype(np.intp), minlength=counts.size)
        totals = np.cumsum(counts)
        digit = int(np.searchsorted(totals, budget, side="right"))
        budget -= int(totals[digit - 1]) if digit else 0
        prefix = prefix << _DIGIT | digit
    return prefix, budget


def _split(layer: Array, threshold: int, most_ties: int, dtype: np.dtype[Any]) -> tuple[Mask, int]:
    """Returns (mask, ties): keys below the threshold go, and the first `most_ties` of the ties at it."""
    mask, done, ties = np.empty(layer.size, np.bool_), 0, 0
    for keys in _keys(layer, dtype):
        part = mask[done : done + keys.size]
        np.greater(keys, threshold, out=part)
        at_threshold = np.flatnonzero(keys == threshold)
        part[at_threshold[max(most_ties - ties, 0) :]] = True
        done, ties = done + keys.size, ties + at_threshold.size
    return mask.reshape(layer.shape), ties


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


def _sums_of_groups(values: Array, length: int) -> Array:
    """Returns [a, ceil(b / length)]: sums of neighbours along the last axis of [a, b]; a last group may be shorter."""
    sums = np.ascontiguousarray(values[:, ::length])
    for offset in range(1, min(length, values.shape[1])):
        members = values[:, offset::length]
        sums[:, : members.shape[1]] += members
    return sums


def _group_lengths(size: int, length: int) -> Array:
    lengths = np.full(-(-size // length), length)
    if size % length:
        lengths[-1] = size % length
    return lengths


def _unit_shape(pattern: Pattern, shape: tuple[int, ...]) -> tuple[int, ...]:
    if pattern.kind != "block":
        return tuple(shape)
    return -(-shape[0] // pattern.n), -(-shape[1] // pattern.m)


def _score_dtype(matrix: Array) -> type[np.floating[Any]]:
    return np.float64 if matrix.dtype == np.float64 else np.float32


def _check_matrix(owner: str, matrix: Array) -> None:
    if matrix.ndim != 2:
        raise ValueError(must(owner, "matrix", "2-D", f"shape {matrix.shape}"))
    check_finite(owner, matrix)
