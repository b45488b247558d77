"""Tests of pruning with repair: brute force over all masks, patterns, shares, bounds on the error, odd matrices."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxshrink.numerics import mask_search
from onnxshrink.numerics.mask_search import search_mask
from onnxshrink.numerics.masks import choose
from onnxshrink.numerics.patterns import Pattern
from onnxshrink.numerics.pruning import prune
from onnxshrink.numerics.refit import error_of_rows, refit
from tests.numerics.test_refit import example

ANY, TWO_OF_FOUR = Pattern("unstructured"), Pattern("n:m", 2, 4)
patterns = st.sampled_from(["unstructured", "2:4", "4x1", "1x4", "3x2", "rows", "columns"]).map(Pattern.parse)


def error(matrix, pruned, grams):
    return error_of_rows(pruned - matrix, grams).sum()


def test_masks_are_near_the_best_of_all():
    excess = []
    for seed in range(5):
        matrix, _, grams = example(seed, 1, 8, 60)
        best = np.inf
        for kept in itertools.combinations(range(8), 4):
            mask = np.zeros((1, 8), np.bool_)
            mask[0, list(kept)] = True
            best = min(best, error(matrix, refit(matrix, grams, mask), grams))
        found = error(matrix, prune(matrix, grams, ANY, 0.5), grams)
        assert found >= best * (1 - 1e-6)
        excess.append(found / best)
    assert np.median(excess) < 1.01
    assert np.mean(excess) < 1.2


def test_groups_of_two_of_four_are_near_the_best_of_all():
    excess = []
    for seed in range(5):
        matrix, _, grams = example(seed, 1, 8, 60)
        best = np.inf
        for first, second in itertools.product(itertools.combinations(range(4), 2), repeat=2):
            mask = np.zeros((1, 8), np.bool_)
            mask[0, [*first, *(column + 4 for column in second)]] = True
            best = min(best, error(matrix, refit(matrix, grams, mask), grams))
        excess.append(error(matrix, prune(matrix, grams, TWO_OF_FOUR), grams) / best)
    assert min(excess) >= 1 - 1e-6
    assert np.median(excess) < 1.01


@settings(max_examples=15)
@given(patterns, st.integers(0, 1000), st.floats(0, 1), st.integers(1, 2), st.integers(0, 3))
def test_patterns_shares_and_errors(pattern, seed, share, groups, dead):
    matrix, _, grams = example(seed, 3, 10, 30, groups, dead)
    asked = None if pattern.kind == "n:m" else share
    found = prune(matrix, grams, pattern, asked, effort=0.1)
    height, width = pattern.sides(matrix.shape)
    if pattern.kind == "n:m":
        for start in range(0, 10, 4):
            assert (np.count_nonzero(found[:, start : start + 4], axis=1) <= 2).all()
    else:
        budget = int(np.floor(share * matrix.size + 1e-9))
        assert budget - height * width < np.sum(found == 0) <= budget
        for row, column in itertools.product(range(0, len(matrix), height), range(0, 10, width)):
            block = found[row : row + height, column : column + width]
            assert (block == 0).all() or (block != 0).all()
    plain = np.where(choose(matrix, pattern, asked), matrix, 0.0)
    assert error(matrix, found, grams) <= error(matrix, plain, grams) * (1 + 1e-9)
    assert np.array_equal(found, prune(matrix, grams, pattern, asked, effort=0.1))


def test_masks_beat_those_of_magnitudes_after_the_same_refit():
    for pattern, share in ((ANY, 0.5), (ANY, 0.8), (TWO_OF_FOUR, None), (Pattern("block", 4, 1), 0.5)):
        matrix, _, grams = example(0, 32, 48, 400)
        plain = error(matrix, refit(matrix, grams, choose(matrix, pattern, share)), grams)
        assert error(matrix, refit(matrix, grams, search_mask(matrix, grams, pattern, share)), grams) < 0.9 * plain


def test_inverses_find_what_eigenvectors_find(monkeypatch):
    matrix, _, grams = example(0, 32, 48, 400)
    spectral = error(matrix, refit(matrix, grams, search_mask(matrix, grams, ANY, 0.7, effort=0.08)), grams)
    monkeypatch.setattr(mask_search, "_SPECTRAL", 0)
    found = error(matrix, refit(matrix, grams, search_mask(matrix, grams, ANY, 0.7, effort=0.08)), grams)
    assert found == pytest.approx(spectral, rel=0.1)
    low = grams - 0.01 * np.mean(np.diagonal(grams[0])) * np.eye(48)  # with negative eigenvalues
    assert np.sum(~search_mask(matrix, low, ANY, 0.7)) == int(0.7 * matrix.size)


def test_zeros_stay_and_count():
    matrix, _, grams = example(0, 6, 10, 60)
    matrix[:, 3] = matrix[2] = 0.0
    for share in (0.0, 0.2, 0.5):
        found = prune(matrix, grams, ANY, share)
        assert not found[matrix == 0].any()
        assert np.sum(found == 0) == max(int(share * 60), 15)
    assert np.array_equal(prune(matrix, grams, ANY, 0.25), matrix)
    frozen = np.zeros(matrix.shape, np.bool_)
    frozen[0] = True
    found = prune(matrix, grams, ANY, 0.5, frozen=frozen)
    assert not found[0].any()
    assert np.sum(found == 0) == 30


def test_everything_or_nothing():
    matrix, _, grams = example(0, 6, 10, 60)
    assert np.array_equal(prune(matrix, grams, ANY, 0.0), matrix)
    assert not prune(matrix, grams, ANY, 1.0).any()
    assert not prune(np.zeros((6, 10)), grams, ANY, 0.5).any()
    assert prune(np.zeros((0, 10)), grams, ANY, 0.5).shape == (0, 10)


def test_columns_that_carry_nothing_go_first():
    matrix, _, grams = example(0, 6, 10, 60)
    grams[0, :4, :] = grams[0, :, :4] = 0.0
    found = prune(matrix, grams, ANY, 0.4)
    assert not found[:, :4].any()
    assert found[:, 4:] == pytest.approx(matrix[:, 4:])


def test_without_known_inputs_the_largest_stay_as_they_are():
    matrix, _, grams = example(0, 6, 10, 60)
    expected = np.where(choose(matrix, ANY, 0.5), matrix, 0.0)
    assert np.array_equal(prune(matrix, None, ANY, 0.5), expected)
    assert np.array_equal(prune(matrix, np.zeros_like(grams), ANY, 0.5), expected)


def test_a_mask_is_kept_to():
    matrix, _, grams = example(0, 6, 10, 60)
    mask = np.random.default_rng(0).random(matrix.shape) < 0.5
    found = prune(matrix, grams, ANY, mask=mask)
    assert np.array_equal(found != 0, mask)
    assert np.array_equal(found, refit(matrix, grams, mask))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_extreme_scales(dtype):
    matrix, _, grams = example(0, 6, 10, 60)
    usual = prune(matrix.astype(dtype), grams, ANY, 0.5, effort=0.1)
    large = prune(matrix.astype(dtype), grams * 1e30, ANY, 0.5, effort=0.1)
    small = prune(matrix.astype(dtype), grams * 1e-30, ANY, 0.5, effort=0.1)
    assert large == pytest.approx(usual, rel=1e-4)
    assert small == pytest.approx(usual, rel=1e-4)


def test_bad_arguments_are_refused():
    matrix, _, grams = example(0, 6, 10, 60)
    with pytest.raises(ValueError, match=r"prune: frozen must be of shape \(6, 10\), got shape \(10, 6\)"):
        prune(matrix, grams, ANY, 0.5, frozen=np.ones((10, 6), np.bool_))
    with pytest.raises(ValueError, match="share_removed must be between 0 and 1"):
        prune(matrix, grams, ANY, 1.5)
    with pytest.raises(ValueError, match="choose: share_removed must be given for unstructured"):
        prune(matrix, grams, ANY)
    with pytest.raises(ValueError, match=r"prune: grams must be \[groups, 10, 10\]"):
        prune(matrix, grams[:, :5, :5], ANY, 0.5)
    with pytest.raises(ValueError, match="prune: values must be finite"):
        prune(np.full((6, 10), np.inf), grams, ANY, 0.5)
