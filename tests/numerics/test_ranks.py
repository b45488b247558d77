"""Tests of what spectra say: by definition, by planted ranks, and against a search over all noise levels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxshrink.numerics.ranks import evbmf_rank, rank_at_energy, stable_rank

spectra = st.lists(st.floats(0, 100), max_size=12).map(np.array)


@given(spectra, st.floats(0, 1))
def test_the_rank_at_a_share_is_the_least_that_holds_it(values, share):
    rank = rank_at_energy(values, share)
    squares = np.sort(values)[::-1] ** 2
    assert squares[:rank].sum() >= share * squares.sum() * (1 - 1e-9)
    if rank:
        assert squares[: rank - 1].sum() < share * squares.sum() * (1 + 1e-9)


@given(spectra)
def test_the_stable_rank_is_below_the_rank(values):
    found = stable_rank(values)
    assert 0 <= found <= np.count_nonzero(values) * (1 + 1e-9)
    assert stable_rank(np.ones(7)) == 7
    assert stable_rank(np.zeros(7)) == 0


@pytest.mark.parametrize("shape", [(100, 300), (300, 100), (120, 120)])
@pytest.mark.parametrize("planted", [0, 1, 5, 20])
def test_a_planted_rank_is_found_in_noise(shape, planted):
    rng = np.random.default_rng(planted)
    signal = rng.standard_normal((shape[0], planted)) @ rng.standard_normal((planted, shape[1]))
    noise = rng.standard_normal(shape)
    for scale in (1e-3, 1.0, 1e3):
        assert evbmf_rank(np.linalg.svd(scale * (signal + 0.7 * noise), compute_uv=False), *shape) == planted


def reference(values, short, long):
    """Returns the rank at the noise level of the least free energy, found by trying many levels."""
    ratio, best, rank = short / long, np.inf, 0
    tau = 2.5129 * np.sqrt(ratio)
    limit = (1 + tau) * (1 + ratio / tau)
    for noise in np.geomspace(values[-1] ** 2 / long / limit / 10, (values**2).mean() * 10 / long, 3000):
        x = values**2 / (long * noise)
        free = 0.0
        for one in x:
            if one > limit:
                t = (one - 1 - ratio + np.sqrt((one - 1 - ratio) ** 2 - 4 * ratio)) / 2
                free += np.log(t + 1) - np.log(one) + ratio * np.log(t / ratio + 1) + one - t
            else:
                free += one - np.log(one)
        if free < best:
            best, rank = free, int((x > limit).sum())
    return rank


@pytest.mark.parametrize("seed", range(6))
def test_the_noise_level_is_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    short, long = 12, 12 + 6 * seed
    matrix = rng.standard_normal((short, 3)) @ rng.standard_normal((3, long)) * 1.5 + rng.standard_normal((short, long))
    values = np.linalg.svd(matrix, compute_uv=False)
    assert evbmf_rank(values, short, long) == reference(values, short, long)


def test_degenerate_spectra():
    assert evbmf_rank(np.zeros(5), 5, 9) == 0
    assert evbmf_rank(np.zeros(0), 0, 9) == 0
    assert evbmf_rank(np.array([3.0]), 1, 9) == 0
    assert evbmf_rank(np.array([3.0, 2.0, 0.0, 0.0, 0.0, 0.0]), 6, 9) == 2
    with pytest.raises(ValueError, match=r"^evbmf_rank: singular_values must be 5 values, got 4$"):
        evbmf_rank(np.ones(4), 5, 9)
    with pytest.raises(ValueError, match=r"^rank_at_energy: share must be from 0 to 1, got 2$"):
        rank_at_energy(np.ones(3), 2)
