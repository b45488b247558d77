"""Which input channels a layer misses least once the others have taken over what they can.

A layer computes W X^T; channel b owns some columns of W. With P = H^-1, H = X^T X, the least squared error that taking its columns
away causes, everything else being solved again, is

    E_b = trace(W_b (P_bb)^-1 W_b^T)        W <- W - W_b (P_bb)^-1 P_b:        P <- P - P_:b (P_bb)^-1 P_b:

(optimal brain surgeon, Hassibi & Stork 1993, for blocks). Channels go backwards, the least missed first, and every one is told what the
others before it have changed: of two channels that say the same the first is free and the second is not. That is the reconstruction
of ThiNet (Luo et al., arXiv 1707.06342) and of He et al. (arXiv 1707.06168), with greedy elimination in place of sampling or lasso.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import linalg

from onnxshrink.errors import must
from onnxshrink.numerics.chunks import Array

__all__ = ["Elimination", "eliminate", "solve_kept"]

_ROUNDS = 96  # into which the channels are divided: with more of them several go at a time, for the whole inverse is updated
_DAMPING = 1e-3  # of the mean of the diagonal


@dataclass(frozen=True, eq=False)
class Elimination:
    """What taking channels away one after the other costs.

    Attributes:
        order: intp [channels]: the first to go first.
        losses: float64 [channels], in that order: the squared error of the outputs that each adds, relative to their squares.
    """

    order: Array
    losses: Array

    @property
    def scores(self) -> Array:
        """The losses by channel, made ascending along the order: float64 [channels]."""
        scores = np.empty(len(self.order))
        scores[self.order] = np.maximum.accumulate(self.losses)
        return scores


def eliminate(matrix: Array, grams: Array, owner: Array, channels: int) -> Elimination:
    """Takes all channels away, one after the other or, of many, a few at a time.

    Args:
        matrix: [rows, columns], finite.
        grams: float64 [groups, columns, columns] of the inputs of equal groups of rows, positive semidefinite.
        owner: int [columns]: the channel that each column belongs to, -1 for those that stay.
        channels: how many there are; one without columns costs nothing.

    Raises:
        ValueError: shapes that do not fit.
    """
    if matrix.ndim != 2 or grams.ndim != 3 or len(matrix) % max(len(grams), 1) or not (
        grams.shape[1] == grams.shape[2] == matrix.shape[1] == len(owner)
    ):
        shapes = f"shapes {matrix.shape}, {grams.shape} and {owner.shape}"
        raise ValueError(must("eliminate", "matrix, grams and owner", "[rows, n], [groups, n, n] and [n]", shapes))
    alive = np.asarray(np.diagonal(grams, axis1=1, axis2=2).any(axis=1))  # rows that meet nothing miss nothing
    weights = np.asarray(matrix, np.float64).reshape(len(grams), -1, matrix.shape[1]) * alive[:, None, None]
    damped = grams + _damping(grams)[:, None, None] * np.eye(matrix.shape[1])
    energy = max(float(np.einsum("grc,gcd,grd->", weights, grams, weights, optimize=True)), np.finfo(np.float64).tiny)
    inverse = np.stack([linalg.inv(gram) for gram in damped])
    state = _State(weights.copy(), inverse, np.asarray(owner, np.int64))
    left = np.arange(channels)
    order, losses = [], []
    while left.size:
        scores = state.scores(left)
        going = left[np.argsort(scores, kind="stable")[: -(-channels // _ROUNDS)]]
        before = np.sort(scores)[: len(going)]
        order.append(going)
        losses.append(before)
        state.remove(going)
        left = np.setdiff1d(left, going)
    every = np.concatenate(losses) if losses else np.zeros(0)
    return Elimination(np.concatenate(order) if order else np.zeros(0, np.intp), np.maximum(every, 0.0) / energy)


def solve_kept(matrix: Array, grams: Array, kept: Array) -> Array:
    """Returns the matrix with some columns zero and the others solved again for the same outputs.

    Args:
        matrix: [rows, columns], finite.
        grams: float64 [groups, columns, columns] of the inputs of equal groups of rows.
        kept: bool [columns].

    Returns:
        float64 [rows, columns].
    """
    found = np.zeros(matrix.shape)
    if not kept.any():
        return found
    for rows, wide, gram in zip(np.split(found, len(grams)), np.split(matrix, len(grams)), grams, strict=True):
        part = gram[np.ix_(kept, kept)]
        rows[:, kept] = wide[:, kept]
        if not (mean := float(np.diagonal(part).mean())) > 0:
            continue
        damped = part + _DAMPING * mean * np.eye(len(part))
        lost = np.asarray(wide, np.float64)[:, ~kept] @ gram[np.ix_(~kept, kept)]
        rows[:, kept] += linalg.solve(damped, lost.T, assume_a="pos").T
    return found


def _damping(grams: Array) -> Array:
    mean: Array = np.diagonal(grams, axis1=1, axis2=2).mean(axis=1)
    return np.where(mean > 0, _DAMPING * mean, 1.0)


class _State:
    """The weights and the inverse over the columns that are left."""

    def __init__(self, weights: Array, inverse: Array, owner: Array) -> None:
        self.weights, self.inverse, self.owner = weights, inverse, owner

    def scores(self, channels: Array) -> Array:
        """Returns what each channel would cost if it went next."""
        scores = np.zeros(len(channels))
        order = np.argsort(self.owner, kind="stable")
        first = np.searchsorted(self.owner[order], channels)
        counts = np.searchsorted(self.owner[order], channels, side="right") - first
        for count in np.unique(counts[counts > 0]):
            which = np.flatnonzero(counts == count)
            columns = order[first[which, None] + np.arange(count)]
            blocks = self.inverse[:, columns[:, :, None], columns[:, None, :]]
            wide = self.weights[:, :, columns]
            squares = np.einsum("grbk,grbl->gbkl", wide, wide, optimize=True)
            scores[which] = np.trace(np.linalg.solve(blocks, squares), axis1=2, axis2=3).sum(axis=0)
        return scores

    def remove(self, channels: Array) -> None:
        """Takes the columns of some channels away."""
        gone = np.isin(self.owner, channels)
        if not gone.any():
            return
        across = self.inverse[:, gone][:, :, ~gone]
        moved = np.linalg.solve(self.inverse[:, gone][:, :, gone], across)
        self.weights = self.weights[:, :, ~gone] - self.weights[:, :, gone] @ moved
        self.inverse = self.inverse[:, ~gone][:, :, ~gone] - across.swapaxes(1, 2) @ moved
        self.owner = self.owner[~gone]
