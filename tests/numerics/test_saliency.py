"""Tests of saliencies: against loops, and OBS against what solving again for all other weights of a row really costs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxshrink.numerics.saliency import additive, saliency

seeds = st.integers(0, 1000)


def example(seed: int, groups: int = 2, rows: int = 3, columns: int = 5):
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((groups, 40, columns)) @ rng.standard_normal((columns, columns))
    return rng.standard_normal((groups * rows, columns)), np.matmul(inputs.swapaxes(1, 2), inputs)


@given(seeds)
def test_wanda_is_what_leaving_out_one_weight_costs(seed):
    matrix, grams = example(seed)
    found = saliency(matrix, "wanda", grams)
    for row, weights in enumerate(matrix):
        for column, weight in enumerate(weights):
            assert found[row, column] == pytest.approx(abs(weight) * np.sqrt(grams[row // 3, column, column]))


@given(seeds)
def test_obs_is_what_is_left_when_all_others_make_up_for_it(seed):
    matrix, grams = example(seed)
    found = saliency(matrix, "obs", grams)
    for row, weights in enumerate(matrix):
        gram = grams[row // 3] + 0.01 * np.mean(np.diagonal(grams[row // 3])) * np.eye(5)
        for column, weight in enumerate(weights):
            others = np.delete(np.arange(5), column)
            change = np.zeros(5)
            change[column] = -weight
            change[others] = np.linalg.solve(gram[np.ix_(others, others)], gram[others, column] * weight)
            assert found[row, column] == pytest.approx(change @ gram @ change, rel=1e-6)


@given(st.lists(st.sampled_from([0.0, 1.0, -1.0, 0.5, 3.0]), min_size=1, max_size=12))
def test_lamp_weighs_each_square_against_those_not_smaller(values):
    squares = np.square(values)
    order = np.argsort(squares, kind="stable")
    expected = np.zeros(len(values))
    for rank, index in enumerate(order):
        rest = squares[order[rank:]].sum()
        expected[index] = squares[index] / rest if rest else 0.0
    assert saliency(np.array([values]), "lamp")[0] == pytest.approx(expected)


def test_magnitude_squared_and_random():
    matrix = np.array([[1.0, -2.0], [0.0, 3.0]], np.float32)
    assert saliency(matrix, "magnitude").tolist() == [[1, 2], [0, 3]]
    assert saliency(matrix, "squared").tolist() == [[1, 4], [0, 9]]
    assert saliency(matrix, "magnitude").dtype == np.float32
    drawn = saliency(matrix, "random", seed=1)
    assert np.array_equal(drawn, saliency(matrix, "random", seed=1))
    assert not np.array_equal(drawn, saliency(matrix, "random", seed=2))
    assert [additive(name) for name in ("magnitude", "wanda", "obs")] == ["l2", "l2", "l1"]


@pytest.mark.parametrize("criterion", ["wanda", "obs"])
def test_columns_that_were_zero_in_every_input_are_worth_nothing(criterion):
    matrix, grams = example(0)
    grams[1, 2, :] = grams[1, :, 2] = 0.0
    found = saliency(matrix, criterion, grams)
    assert (found[3:, 2] == 0).all()
    assert (found[:3] > 0).all()


def test_bad_arguments_are_refused():
    matrix, grams = example(0)
    with pytest.raises(ValueError, match=r"saliency: grams must be \[groups, 5, 5\] for obs, got None"):
        saliency(matrix, "obs")
    with pytest.raises(ValueError, match=r"got shape \(2, 5, 5\)"):
        saliency(matrix[:5], "wanda", grams)
    with pytest.raises(ValueError, match="saliency: criterion must be one of magnitude, squared"):
        saliency(matrix, "size")
