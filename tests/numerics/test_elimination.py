"""Tests of elimination: against least squares on explicit inputs, channel by channel."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxshrink.numerics import elimination
from onnxshrink.numerics.elimination import eliminate, solve_kept

DAMPING = 1e-3  # of the mean of each Gram matrix's diagonal


def example(seed: int, rows: int, owner: list[int], count: int, groups: int = 1):
    """Returns (weights [groups · rows, columns], inputs [groups, count, columns], owners)."""
    rng = np.random.default_rng(seed)
    columns = len(owner)
    inputs = rng.standard_normal((groups, count, columns)) @ (np.eye(columns) + 0.5 * rng.standard_normal((columns, columns)))
    return rng.standard_normal((groups * rows, columns)), inputs, np.array(owner, np.int64)


def gram_of(inputs):
    return np.matmul(inputs.swapaxes(1, 2), inputs)


def damped(inputs):
    """Returns inputs with as many more as damp the whole of them: [groups, count + columns, columns]."""
    means = np.diagonal(gram_of(inputs), axis1=1, axis2=2).mean(axis=1)
    more = np.sqrt(np.where(means > 0, DAMPING * means, 1.0))[:, None, None] * np.eye(inputs.shape[2])
    return np.concatenate([inputs, more], axis=1)


def least_error(matrix, inputs, kept):
    """Returns the squared error of the outputs with the best weights in some columns and none in the others."""
    total = 0.0
    for rows, positions in zip(np.split(matrix, len(inputs)), inputs, strict=True):
        wanted = positions @ rows.T
        best = np.linalg.lstsq(positions[:, kept], wanted, rcond=None)[0]
        total += float(np.square(positions[:, kept] @ best - wanted).sum())
    return total


def energy_of(matrix, inputs):
    return sum(float(np.square(x @ rows.T).sum()) for rows, x in zip(np.split(matrix, len(inputs)), inputs, strict=True))


owners = st.lists(st.integers(-1, 5), min_size=1, max_size=10)  # blocks of any size, columns of nobody, channels without columns


@settings(max_examples=60)
@given(seed=st.integers(0, 1000), rows=st.integers(1, 4), owner=owners, groups=st.integers(1, 3), count=st.integers(2, 40))
def test_every_step_takes_the_least_missed_and_tells_what_it_costs(seed, rows, owner, groups, count):
    matrix, inputs, owned = example(seed, rows, owner, count, groups)
    found = eliminate(matrix, gram_of(inputs), owned, 6)
    assert sorted(found.order) == list(range(6))
    more, energy = damped(inputs), energy_of(matrix, inputs)
    kept, lost = np.ones(len(owner), bool), 0.0
    for step, channel in enumerate(found.order):
        left = found.order[step:]
        costs = np.array([least_error(matrix, more, kept & (owned != other)) for other in left]) - lost
        assert costs[0] <= costs.min() + 1e-7 * energy
        assert found.losses[step] * energy == pytest.approx(costs[0], rel=1e-6, abs=1e-8 * energy)
        kept &= owned != channel
        lost += costs[0]


@settings(max_examples=30)
@given(seed=st.integers(0, 1000), owner=owners)
def test_scores_ascend_along_the_order_and_are_never_below_what_is_lost(seed, owner):
    matrix, inputs, owned = example(seed, 3, owner, 20)
    found = eliminate(matrix, gram_of(inputs), owned, 6)
    along = found.scores[found.order]
    assert (np.diff(along) >= 0).all()
    assert (along >= found.losses).all()
    assert set(along) <= set(found.losses)


def test_of_two_channels_that_say_the_same_the_first_is_free_and_the_second_is_not():
    matrix, inputs, owned = example(0, 4, [0, 1, 2, 3, 4], 200)
    inputs[:, :, 3] = inputs[:, :, 1]
    found = eliminate(matrix, gram_of(inputs), owned, 5)
    assert found.order[0] in (1, 3)
    assert found.losses[0] < 2e-3  # for the damping
    twin = 4 - found.order[0]
    assert found.losses[list(found.order).index(twin)] > 20 * found.losses[0]


def test_a_channel_without_columns_costs_nothing_and_goes_first():
    matrix, inputs, _ = example(1, 3, [0] * 4, 30)
    found = eliminate(matrix, gram_of(inputs), np.array([0, 2, -1, 2]), 4)
    assert list(found.order[:2]) == [1, 3]
    assert list(found.losses[:2]) == [0.0, 0.0]
    assert found.losses[2] > 0


@pytest.mark.parametrize("owner", [[], [-1, -1]])
def test_without_channels_there_is_nothing_to_take(owner):
    matrix, inputs, owned = example(2, 2, owner or [0], 5)
    found = eliminate(matrix, gram_of(inputs), np.full(len(owned), -1), 0)
    assert found.order.shape == found.losses.shape == found.scores.shape == (0,)


@pytest.mark.parametrize("scale", [1e-120, 1.0, 1e120])
def test_losses_are_relative(scale):
    matrix, inputs, owned = example(3, 3, [0, 1, 1, 2], 30)
    plain, found = (eliminate(matrix * times, gram_of(inputs), owned, 3) for times in (1.0, scale))
    np.testing.assert_array_equal(found.order, plain.order)
    np.testing.assert_allclose(found.losses, plain.losses, rtol=1e-9)


@pytest.mark.parametrize("spoil", ["inputs", "weights", "both"])
def test_outputs_of_zero_leave_finite_losses(spoil):
    matrix, inputs, owned = example(4, 3, [0, 1, 1, 2], 30)
    matrix, inputs = matrix * (spoil == "inputs"), inputs * (spoil == "weights")
    found = eliminate(matrix, gram_of(inputs), owned, 3)
    assert np.isfinite(found.losses).all()
    assert np.isfinite(found.scores.sum())


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_a_group_of_rows_that_meets_nothing_has_no_say(scale):
    matrix, inputs, owned = example(5, 3, [0, 1, 2, 2, 3], 30, groups=2)
    inputs = inputs * scale
    inputs[1] = 0.0
    found, alone = eliminate(matrix, gram_of(inputs), owned, 4), eliminate(matrix[:3], gram_of(inputs[:1]), owned, 4)
    np.testing.assert_array_equal(found.order, alone.order)
    np.testing.assert_allclose(found.losses, alone.losses)


def test_several_at_a_time_come_close_to_one_at_a_time(monkeypatch):
    matrix, inputs, owned = example(6, 8, list(range(160)), 400)
    grams, more, energy = gram_of(inputs), damped(inputs), energy_of(matrix, inputs)
    together = eliminate(matrix, grams, owned, 160)
    monkeypatch.setattr(elimination, "_ROUNDS", 160)
    single = eliminate(matrix, grams, owned, 160)
    assert (together.order != single.order).any()
    for count in (40, 80, 120):
        errors = [least_error(matrix, more, ~np.isin(owned, one.order[:count])) for one in (together, single)]
        assert errors[0] <= 1.1 * errors[1]
        assert together.losses[:count].sum() * energy == pytest.approx(errors[0], rel=0.05)
        assert single.losses[:count].sum() * energy == pytest.approx(errors[1], rel=1e-6)


@pytest.mark.parametrize(
    ("matrix", "grams", "owner"),
    [((3, 2), (2, 2, 2), 2), ((3, 2), (1, 3, 3), 2), ((3, 2), (1, 2, 2), 3), ((3, 2), (2, 2), 2), ((3, 2, 1), (1, 2, 2), 2)],
)
def test_shapes_that_do_not_fit_are_refused(matrix, grams, owner):
    with pytest.raises(ValueError, match=r"eliminate: matrix, grams and owner must be \[rows, n\], \[groups, n, n\] and \[n\], got shapes"):
        eliminate(np.zeros(matrix), np.zeros(grams), np.zeros(owner, np.int64), 2)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 1000), rows=st.integers(1, 4), columns=st.integers(1, 9), groups=st.integers(1, 3), count=st.integers(2, 30)
)
def test_kept_columns_are_those_of_least_squares(seed, rows, columns, groups, count):
    matrix, inputs, _ = example(seed, rows, [0] * columns, count, groups)
    kept = np.random.default_rng(seed).random(columns) < 0.5
    found = solve_kept(matrix, gram_of(inputs), kept)
    assert found.dtype == np.float64
    assert not found[:, ~kept].any()
    for now, wide, positions in zip(np.split(found, groups), np.split(matrix, groups), inputs, strict=True):
        if kept.any():  # the change of what is kept is drawn towards nothing
            ridge = np.sqrt(DAMPING * np.square(positions[:, kept]).sum(axis=0).mean()) * np.eye(kept.sum())
            lost = np.concatenate([positions[:, ~kept] @ wide[:, ~kept].T, np.zeros((kept.sum(), rows))])
            moved = np.linalg.lstsq(np.concatenate([positions[:, kept], ridge]), lost, rcond=None)[0].T
            np.testing.assert_allclose(now[:, kept], wide[:, kept] + moved, rtol=1e-6, atol=1e-6)


def test_what_all_columns_keep_stays_as_it_is():
    matrix, inputs, _ = example(0, 3, [0] * 4, 20)
    np.testing.assert_allclose(solve_kept(matrix, gram_of(inputs), np.ones(4, bool)), matrix, rtol=1e-12)


def test_without_inputs_what_is_kept_stays_as_it_is():
    matrix, _, _ = example(0, 3, [0] * 4, 20)
    kept = np.array([True, False, True, False])
    np.testing.assert_array_equal(solve_kept(matrix, np.zeros((1, 4, 4)), kept), matrix * kept)
