"""How much of a spectrum is signal: measures of singular values, and the rank at which two factors stop paying.

`evbmf_rank` is the global solution of empirical variational Bayesian matrix factorization (Nakajima, Sugiyama, Babacan and Tomioka,
JMLR 14, 2013, theorem 2 and corollary 1): of a matrix [L, M], L <= M, that is one of low rank plus Gaussian noise of variance v, the
components stay whose singular values exceed

    sqrt(M v (1 + t) (1 + a / t))       a = L / M,  t = 2.5129 sqrt(a)

and v, unknown, minimizes the free energy, a function of one variable between known bounds.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import optimize

from onnxshrink.errors import must
from onnxshrink.numerics.chunks import Array

__all__ = ["evbmf_rank", "rank_at_energy", "stable_rank"]

_STARTS = 64  # of the free energy, which has several minima, on a logarithmic grid


def stable_rank(singular_values: Array) -> float:
    """Returns the sum of squares over the largest square: at most the rank, and little moved by small values; 0 for zeros.

    >>> stable_rank(np.array([2.0, 2.0, 0.0]))
    2.0
    """
    squares = np.asarray(singular_values, np.float64) ** 2
    return float(squares.sum() / squares.max()) if squares.any() else 0.0


def rank_at_energy(singular_values: Array, share: float) -> int:
    """Returns how many values, the largest first, hold a share of the sum of squares; 0 for zeros.

    Raises:
        ValueError: a share that is not from 0 to 1.

    >>> rank_at_energy(np.array([3.0, 1.0, 1.0]), 0.9)
    2
    """
    if not 0 <= share <= 1:
        raise ValueError(must("rank_at_energy", "share", "from 0 to 1", share))
    held = np.cumsum(np.sort(np.asarray(singular_values, np.float64).reshape(-1) ** 2)[::-1])
    return int(np.searchsorted(held, share * held[-1] * (1 - 1e-12))) + 1 if held.size and held[-1] > 0 and share > 0 else 0


def evbmf_rank(singular_values: Array, rows: int, columns: int) -> int:
    """Returns how many components are signal, as far as the singular values of a noisy matrix tell.

    Args:
        singular_values: of the matrix, all of them, in any order.
        rows: of the matrix.
        columns: of the matrix.

    Raises:
        ValueError: not as many values as the smaller side.
    """
    values = np.sort(np.asarray(singular_values, np.float64).reshape(-1))[::-1]
    short, long = min(rows, columns), max(rows, columns)
    if values.size != short:
        raise ValueError(must("evbmf_rank", "singular_values", f"{short} values", f"{values.size}"))
    if not short or not values[0] > 0:
        return 0
    squares = np.maximum((values / values[0]) ** 2, np.finfo(np.float64).eps ** 2) / long
    ratio = short / long
    tau = 2.5129 * math.sqrt(ratio)
    limit = (1 + tau) * (1 + ratio / tau)
    most = min(math.ceil(short / (1 + ratio)), short) - 1  # components that may be signal
    lowest = max(squares[most] / limit, squares[most:].mean())
    highest = max(squares.mean(), lowest)
    noise = _least(squares, ratio, limit, math.log(lowest), math.log(highest))
    return int(np.count_nonzero(squares > noise * limit))


def _least(squares: Array, ratio: float, limit: float, low: float, high: float) -> float:
    """Returns the noise variance of the least free energy: the best of a grid, refined between its neighbors."""

    def energy(logarithm: float) -> float:
        return _free_energy(squares, ratio, limit, math.exp(logarithm))

    grid = np.linspace(low, high, _STARTS)
    best = int(np.argmin([energy(at) for at in grid]))
    around = (grid[max(best - 1, 0)], grid[min(best + 1, _STARTS - 1)])
    if around[0] >= around[1]:
        return math.exp(low)
    found = optimize.minimize_scalar(energy, bounds=around, method="bounded", options={"xatol": 1e-9})
    return math.exp(min((float(grid[best]), float(found.x)), key=energy))


def _free_energy(squares: Array, ratio: float, limit: float, noise: float) -> float:
    """Returns the free energy up to constants, for squares s^2 / M (equation 36 with the variances optimized out)."""
    scaled = squares / noise
    signal, rest = scaled[scaled > limit], scaled[scaled <= limit]
    above = signal - (1 + ratio)
    tau = 0.5 * (above + np.sqrt(above**2 - 4 * ratio))
    gained = np.log((tau + 1) / signal) + ratio * np.log(tau / ratio + 1) + signal - tau
    return float((rest - np.log(rest)).sum() + gained.sum())
