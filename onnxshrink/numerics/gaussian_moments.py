"""Covariances of functions of normal variables, and of sums of them, from correlations and from values at quantiles.

Of x_i = f_i(z_i), z standard normal with correlations R, the Hermite series (Mehler's kernel, e.g. Daniely, Frostig, Singer,
arXiv 1602.05897, section 4) gives

    cov(x_i, x_j) = sum over n >= 1 of c_n(i) c_n(j) R_ij^n,     c_n(i) = E[f_i(z) He_n(z)] / sqrt(n!)

Elementwise powers of R are positive semidefinite, and so is the series where it is cut off; what is then left of the variances is given to
the next power, so that functions that are alike stay so.

A layer of windows sums over channels c and taps t of a kernel. If its input is as much alike at taps t and t' in every channel, T[t, t'],

    cov(sum of W[o, c, t] x[c, t], sum of W[p, d, t] x[d, t]) = sum over t, t' of T[t, t'] (W_t S W_t'^T)[o, p]

with S = cov(x_c, x_d) at one position: as many products of matrices as T has eigenvalues.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from onnxshrink.errors import must
from onnxshrink.numerics.chunks import Array

__all__ = ["DENSITY", "QUANTILES", "block_diagonal", "covariance", "nearness", "parted", "sum_covariance", "sum_variance"]

QUANTILES = np.linspace(-6.0, 6.0, 121)  # of a function with a kink the mean comes out within 4e-4 of the spread
DENSITY = np.exp(-0.5 * QUANTILES**2) / np.exp(-0.5 * QUANTILES**2).sum()
_TERMS = 5  # the covariance of two Relu comes out within 0.3 % of their variance
_DECAY = 0.5  # per pixel: between 0.3 and 0.7 images of three networks were estimated as well, at 0 and at 0.9 less


def covariance(values: Array, correlation: Array | None) -> Array:
    """Returns the covariances of functions of correlated normal variables.

    Args:
        values: float64 [channels, len(QUANTILES)]: what each function is at the quantiles.
        correlation: [channels, channels] of its variables, symmetric with ones on the diagonal; None where they are independent.

    Returns:
        float64 [channels, channels], positive semidefinite where the correlations are.
    """
    variance = np.square(values - (values @ DENSITY)[:, None]) @ DENSITY
    if correlation is None:
        return np.diag(variance)
    found = np.zeros(correlation.shape)
    power, left = np.ones(correlation.shape), variance.copy()
    for factors in _hermite_factors(values):
        power *= correlation
        found += np.outer(factors, factors) * power
        left -= factors**2
    rest = np.sqrt(np.maximum(left, 0.0))
    found += np.outer(rest, rest) * (power * correlation)
    np.fill_diagonal(found, variance)
    return found


def _hermite_factors(values: Array) -> Iterator[Array]:
    """Yields c_1, c_2, ... of each channel, float64 [channels]."""
    before, now = np.ones_like(QUANTILES), QUANTILES
    for order in range(1, _TERMS + 1):
        yield values @ (DENSITY * now) / math.sqrt(math.factorial(order))
        before, now = now, QUANTILES * now - order * before


def nearness(sizes: Sequence[int], dilations: Sequence[int], strides: Sequence[int] | None = None) -> Array:
    """Returns how much alike the values of a channel at two taps of a kernel are taken to be: ``0.5 ** distance``.

    Args:
        sizes: of the kernel, one for each spatial axis.
        dilations: as many.
        strides: of a transposed convolution, whose kernel meets the input with zeros between its elements: taps of which at most
            one meets an element have zero, and all of it is how often a tap meets one.

    Returns:
        float64 [taps, taps], positive semidefinite.
    """
    axes = [np.arange(size) * dilation for size, dilation in zip(sizes, dilations, strict=True)]
    taps = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes)) if axes else np.zeros((1, 0))
    steps = np.asarray(strides or [1] * len(axes), np.float64)
    distance = np.sqrt(np.square((taps[:, None] - taps[None]) / steps).sum(axis=-1))
    together = (np.mod(taps[:, None] - taps[None], steps) == 0).all(axis=-1)
    near: Array = np.where(together, _DECAY**distance, 0.0) / np.prod(steps)
    return near


def sum_covariance(rows: Array, inputs: Array, groups: int, near: Array) -> Array:
    """Returns the covariances of what a layer computes.

    Args:
        rows: [groups * rows of a group, channels of a group * taps], the weight, channels outermost.
        inputs: float64 [groups * channels of a group] squared, covariances of its input.
        groups: as in Conv: each has rows and channels of its own, in order.
        near: float64 [taps, taps], as from `nearness`.

    Returns:
        float64 [rows, rows].

    Raises:
        ValueError: the sizes do not fit.
    """
    weight = _by_tap(rows, inputs.shape[0], groups, near)
    if weight.shape[2] == 1 and groups == len(rows):  # depthwise: every W_t is diagonal
        return (weight[..., 0].T @ weight[..., 0]) * inputs
    found = np.zeros((len(rows), len(rows)))
    for one in weight:
        dense = block_diagonal(np.split(one, groups)) if groups > 1 else one
        found += dense @ inputs @ dense.T
    return 0.5 * (found + found.T)


def sum_variance(rows: Array, variances: Array, groups: int, near: Array) -> Array:
    """Returns the variances of what a layer computes from uncorrelated channels, float64 [rows].

    Args:
        rows: as for `sum_covariance`, like ``groups`` and ``near``.
        variances: float64 [groups * channels of a group].
        groups: of rows and channels.
        near: of taps.

    Raises:
        ValueError: the sizes do not fit.
    """
    weight = _by_tap(rows, len(variances), groups, near)
    each = np.square(weight).sum(axis=0).reshape(groups, -1, len(variances) // groups)
    found: Array = np.einsum("grc,gc->gr", each, variances.reshape(groups, -1)).reshape(-1)
    return found


def _by_tap(rows: Array, channels: int, groups: int, near: Array) -> Array:
    """Returns the weight turned to the eigenvectors of ``near``, [taps, rows, channels of a group], times the roots of its eigenvalues."""
    if channels % groups or len(rows) % groups or rows.shape[1] * groups != channels * len(near):
        sizes = f"[{len(rows)}, {rows.shape[1]}] with {groups} groups, {channels} channels and {len(near)} taps"
        raise ValueError(must("sum_covariance", "rows", "[groups * n, channels / groups * taps]", sizes))
    values, vectors = np.linalg.eigh(near)
    turned = rows.reshape(len(rows), channels // groups, len(near)) @ (vectors * np.sqrt(np.maximum(values, 0.0)))
    return np.moveaxis(turned, -1, 0)


def parted(covariances: Array) -> tuple[Array, Array]:
    """Returns (standard deviations float64 [channels], correlations float32 [channels, channels] with ones on the diagonal).

    A channel that does not vary is correlated with none.

    Args:
        covariances: [channels, channels], symmetric.
    """
    spread = np.sqrt(np.maximum(np.diagonal(covariances), 0.0))
    scale = np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 0)
    correlation = np.clip(covariances * scale[:, None] * scale, -1.0, 1.0).astype(np.float32)
    np.fill_diagonal(correlation, 1.0)
    return spread, correlation


def block_diagonal(blocks: Sequence[Array]) -> Array:
    """Returns the matrix that has these along its diagonal and zeros elsewhere, of the dtype of the first."""
    rows, columns = (sum(block.shape[axis] for block in blocks) for axis in (0, 1))
    found = np.zeros((rows, columns), blocks[0].dtype)
    row = column = 0
    for block in blocks:
        found[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return found
