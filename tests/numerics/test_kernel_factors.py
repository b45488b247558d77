"""Tests of kernels' factors: exact with all of the rank, exact least squares for the last factor, and better than what ignores inputs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxshrink.numerics.kernel_factors import input_factor, spatial_factor, tucker2_factor

sides, seeds = st.integers(1, 4), st.integers(0, 10**6)


def example(seed: int, *shape: int, count: int = 200):
    """Returns (kernel, inputs [groups, count, n]) with neighbors in space correlated."""
    rng = np.random.default_rng(seed)
    columns = int(np.prod(shape[2:]))
    mixed = np.eye(columns) + rng.standard_normal((columns, columns)) / 2
    return rng.standard_normal(shape), rng.standard_normal((shape[0], count, columns)) @ mixed * np.exp(rng.standard_normal(columns))


def gram_of(inputs):
    return inputs.swapaxes(1, 2) @ inputs


def flat(kernel):
    return kernel.reshape(*kernel.shape[:2], -1)


def energy(change, inputs) -> float:
    """Returns the squared error of the outputs."""
    return float(np.square(flat(change) @ inputs.swapaxes(1, 2)).sum())


def spatial(kernel, rank, grams=None):
    first, second = spatial_factor(kernel, rank, grams)
    return np.einsum("grih,gorw->goihw", first, second)


def through_inputs(kernel, rank, grams=None):
    first, second = input_factor(kernel, rank, grams)
    return np.einsum("gri,gorw->goiw", first, second)


def tucker2(kernel, ranks, grams=None):
    return np.einsum("gri,gsrw,gos->goiw", *tucker2_factor(kernel, ranks, grams))


@given(seeds, st.integers(1, 2), sides, sides, sides, sides, st.integers(1, 40))
def test_all_of_the_rank_gives_the_kernel_back(seed, groups, outputs, inputs, height, width, count):
    kernel, seen = example(seed, groups, outputs, inputs, height, width, count=count)
    merged = kernel.reshape(*kernel.shape[:3], -1)
    unseen = count < inputs * height * width  # directions that are kept by a ridge of 1e-8 alone, rarely worse than 1e-5
    for grams in (None, gram_of(seen), np.zeros_like(gram_of(seen))):
        loose = 5e-3 if unseen and grams is not None and grams.any() else 2e-5
        np.testing.assert_allclose(spatial(kernel, min(outputs * width, inputs * height), grams), kernel, atol=loose)
        np.testing.assert_allclose(through_inputs(merged, min(inputs, outputs * height * width), grams), merged, atol=loose)
        ranks = min(inputs, outputs * height * width), min(outputs, inputs * height * width)
        np.testing.assert_allclose(tucker2(merged, ranks, grams), merged, atol=loose)


@given(seeds, st.integers(1, 2), sides, sides, sides, sides, st.data())
def test_plain_factors_are_the_best_there_are(seed, groups, outputs, inputs, height, width, data):
    kernel, _ = example(seed, groups, outputs, inputs, height, width)
    rank = data.draw(st.integers(1, min(outputs * width, inputs * height)))
    rows = kernel.transpose(0, 1, 4, 2, 3).reshape(groups, outputs * width, inputs * height)
    tail = np.square(np.linalg.svd(rows, compute_uv=False)[:, rank:]).sum()
    np.testing.assert_allclose(np.square(kernel - spatial(kernel, rank)).sum(), tail, atol=1e-6)
    merged = kernel.reshape(*kernel.shape[:3], -1)
    rank = min(rank, inputs)
    rows = merged.transpose(0, 1, 3, 2).reshape(groups, -1, inputs)
    tail = np.square(np.linalg.svd(rows, compute_uv=False)[:, rank:]).sum()
    np.testing.assert_allclose(np.square(merged - through_inputs(merged, rank)).sum(), tail, atol=1e-6)


@settings(max_examples=50)
@given(seeds, st.integers(1, 2), sides, sides, sides, sides, st.data())
def test_the_last_factor_is_the_least_squares_solution(seed, groups, outputs, inputs, height, width, data):
    kernel, seen = example(seed, groups, outputs, inputs, height, width)
    rank = data.draw(st.integers(1, min(outputs * width, inputs * height)))
    first, second = spatial_factor(kernel, rank, gram_of(seen))
    for group, positions in enumerate(seen):
        between = np.einsum("rih,nihw->nrw", first[group], positions.reshape(-1, inputs, height, width)).reshape(len(positions), -1)
        wanted = positions @ flat(kernel)[group].T
        best = np.linalg.lstsq(between, wanted, rcond=None)[0]
        found = second[group].reshape(outputs, -1).T
        least, size = np.square(between @ best - wanted).sum(), np.square(wanted).sum()
        assert np.square(between @ found - wanted).sum() <= least + 1e-6 * size


@pytest.mark.parametrize("seed", range(8))
def test_known_inputs_make_for_less_error_than_unknown_ones(seed):
    kernel, seen = example(seed, 1, 8, 6, 3, 3)
    grams, merged = gram_of(seen), kernel.reshape(1, 8, 6, 9)
    for rank in (1, 3, 5):
        assert energy(kernel - spatial(kernel, rank, grams), seen) < energy(kernel - spatial(kernel, rank), seen)
        assert energy(merged - through_inputs(merged, rank, grams), seen) < energy(merged - through_inputs(merged, rank), seen)
        assert energy(merged - tucker2(merged, (rank, rank), grams), seen) < energy(merged - tucker2(merged, (rank, rank)), seen)


@pytest.mark.parametrize("seed", range(4))
def test_a_kernel_that_is_of_low_rank_is_found_out(seed):
    rng = np.random.default_rng(seed)
    first, core, last = rng.standard_normal((2, 3, 8)), rng.standard_normal((2, 4, 3, 9)), rng.standard_normal((2, 10, 4))
    kernel = np.einsum("gri,gsrw,gos->goiw", first, core, last)
    _, seen = example(seed, 2, 10, 8, 9)
    for grams in (None, gram_of(seen)):
        np.testing.assert_allclose(tucker2(kernel, (3, 4), grams), kernel, atol=1e-6)
        np.testing.assert_allclose(through_inputs(kernel, 3, grams), kernel, atol=1e-6)


def test_sweeps_lower_the_error():
    """More than one of them does better than the higher-order SVD, which cuts inputs and outputs without asking the other."""
    kernel, _ = example(0, 1, 12, 12, 9)
    found = np.square(kernel - tucker2(kernel, (3, 3))).sum()
    (one,) = kernel
    sides = [np.linalg.svd(np.moveaxis(one, axis, 0).reshape(12, -1))[0][:, :3] for axis in (0, 1)]
    projected = np.einsum("oa,pa,ib,jb,piw->ojw", sides[0], sides[0], sides[1], sides[1], one, optimize=True)
    assert found <= np.square(one - projected).sum() * (1 + 1e-9)


@pytest.mark.parametrize("function", [spatial_factor, input_factor, tucker2_factor])
def test_zeros_have_factors_of_zeros(function):
    shape = (1, 4, 3, 2, 2) if function is spatial_factor else (1, 4, 3, 4)
    found = function(np.zeros(shape), (2, 2) if function is tucker2_factor else 2)
    assert not any(piece.any() for piece in found if piece is found[-1])
    assert all(np.isfinite(piece).all() for piece in found)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: input_factor(np.ones((2, 3, 4)), 1), r"^input_factor: kernel must be of 4 axes, got shape \(2, 3, 4\)$"),
        (lambda: input_factor(np.ones((1, 3, 4, 2)), 5), r"^input_factor: rank must be from 1 to 4, got 5$"),
        (lambda: spatial_factor(np.ones((1, 3, 4, 2, 2)), 7), r"^spatial_factor: rank must be from 1 to 6, got 7$"),
        (lambda: tucker2_factor(np.ones((1, 3, 4, 2)), (3, 1)), r"^tucker2_factor: rank must be from 1 to 2, got 3$"),
        (lambda: input_factor(np.ones((1, 3, 4, 2)), 1, np.ones((1, 4, 4))), r"^input_factor: grams must be of shape \(1, 8, 8\), got shape \(1, 4, 4\)$"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
