"""Tests of scores of filters: against loops over filters."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxshrink.numerics.importance import filter_scores


def by_hand(filters, measure):
    """Returns the scores one filter at a time."""
    squares = [float(np.sum(one * one)) for one in filters]
    if measure == "l1":
        return [float(np.sum(np.abs(one))) for one in filters]
    if measure == "l2":
        return squares
    if measure == "fpgm":
        return [sum(float(np.linalg.norm(one - other)) for other in filters) for one in filters]
    scores = []
    for index, square in enumerate(squares):  # equal ones in their order
        left = sum(other for at, other in enumerate(squares) if (other, at) >= (square, index))
        scores.append(square / left if left > 0 else 0.0)
    return scores


@given(st.integers(0, 1000), st.integers(1, 8), st.integers(1, 6), st.sampled_from(["l1", "l2", "fpgm", "lamp"]), st.booleans())
def test_scores_are_those_of_the_papers(seed, count, elements, measure, coarse):
    filters = np.random.default_rng(seed).standard_normal((count, elements))
    filters = np.round(filters) if coarse else filters  # with equal filters and some of zeros
    found = filter_scores(filters.astype(np.float32).astype(np.float64), measure)
    assert found.dtype == np.float64
    assert (found >= 0).all()
    expected = by_hand(filters.astype(np.float32).astype(np.float64), measure)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-6)


def test_what_is_like_the_others_has_the_least_fpgm_even_if_it_is_large():
    filters = np.array([[5.0, 5.0], [5.1, 5.0], [5.0, 5.1], [0.1, 0.0], [9.0, 9.0]])
    assert np.argmin(filter_scores(filters, "fpgm")) in (0, 1, 2)
    assert np.argmin(filter_scores(filters, "l2")) == 3


def test_the_last_that_lamp_takes_scores_1():
    scores = filter_scores(np.random.default_rng(0).standard_normal((6, 4)), "lamp")
    assert scores.max() == 1.0
    order = np.argsort(filter_scores(np.random.default_rng(0).standard_normal((6, 4)), "l2"))
    assert (np.diff(scores[order]) >= 0).all()


@pytest.mark.parametrize("measure", ["l1", "l2", "fpgm", "lamp"])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1)])
def test_few_filters(measure, shape):
    scores = filter_scores(np.zeros(shape), measure)
    np.testing.assert_array_equal(scores, np.zeros(shape[0]))


def test_float16_does_not_overflow():
    filters = np.full((2, 3), 6e4, np.float16)
    np.testing.assert_allclose(filter_scores(filters, "l2"), 3 * float(np.float16(6e4)) ** 2)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="filter_scores: filters must be 2-D, got shape"):
        filter_scores(np.zeros(3), "l1")
    with pytest.raises(ValueError, match="filter_scores: measure must be l1, l2, fpgm or lamp, got 'l3'"):
        filter_scores(np.zeros((2, 2)), "l3")  # type: ignore[arg-type]
