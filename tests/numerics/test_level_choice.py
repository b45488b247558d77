"""Tests of how levels are chosen: steps, clusters, scales, and those of cells against all that could be tried instead."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxshrink.numerics.grids import Grid, fit_grid
from onnxshrink.numerics.level_choice import (
    MOST_STEPS,
    cell_clusters,
    cell_grids,
    cluster_levels,
    halves,
    row_scales,
    step_levels,
)
from onnxshrink.numerics.levels import BookLevels, GridLevels

ROWS = 5


@given(seed=st.integers(0, 10**6), reach=st.sampled_from([1.0, 1e-3, 300.0]), columns=st.integers(1, 30))
def test_steps_are_kept_unless_a_byte_is_too_small(seed, reach, columns):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((ROWS, columns)) * reach
    step = np.exp(rng.standard_normal(ROWS)).astype(np.float32)
    levels = step_levels(rows, step)
    scale = levels.grid.scale
    coarser = scale.astype(np.float64) / step
    np.testing.assert_allclose(coarser, coarser[0], rtol=1e-6)
    largest = (np.abs(rows) / step[:, None]).max()
    assert coarser[0] == pytest.approx(max(1.0, largest / MOST_STEPS), rel=1e-6)
    decoded = levels.values(levels.codes(rows))
    assert np.all(np.abs(decoded - rows) <= scale[:, None] * (0.5 + 1e-4))
    assert set(levels.codes(np.zeros((ROWS, 2))).ravel()) == {MOST_STEPS + 1}
    beyond = np.full(ROWS, (MOST_STEPS + 1) * scale)  # feedback may ask for a step more, either way
    np.testing.assert_allclose(levels.snap(beyond), beyond)
    np.testing.assert_allclose(levels.snap(-beyond), -beyond)


def test_steps_of_nothing_are_kept():
    step = np.full(2, 0.25, np.float32)
    np.testing.assert_array_equal(step_levels(np.zeros((2, 3)), step).grid.scale, step)
    np.testing.assert_array_equal(step_levels(np.zeros((2, 0)), step).grid.scale, step)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize(("each", "scaled"), [(False, False), (False, True), (True, False)])
def test_clusters_err_less_than_a_grid_of_as_many_levels(dtype, each, scaled):
    rng = np.random.default_rng(0)
    rows = (rng.standard_t(4, (ROWS, 400)) * 0.1).astype(dtype)
    wide = rows.astype(np.float64)
    levels = cluster_levels(rows, 16, each=each, scaled=scaled)
    grid = GridLevels(fit_grid(rows, 4))
    errors = [np.sum((one.values(one.codes(rows)).astype(np.float64) - wide) ** 2) for one in (levels, grid)]
    assert errors[0] < errors[1] * 1.02
    assert levels.count == (1 if not (each or scaled) else ROWS)


@pytest.mark.parametrize(("each", "scaled"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize(("zeros", "kept"), [(100, True), (10, False)])
def test_zero_has_an_entry_where_it_is_common(each, scaled, zeros, kept):
    rows = np.random.default_rng(0).uniform(1, 2, (ROWS, 160)).astype(np.float32)
    rows[:, :zeros] = 0.0
    levels = cluster_levels(rows, 8, each=each, scaled=scaled)
    decoded = levels.values(levels.codes(rows))
    assert np.all(decoded[:, :zeros] == 0) or not kept


def test_scales_lie_between_the_greatest_and_the_rms():
    rows = np.random.default_rng(0).standard_normal((ROWS, 50)) * np.logspace(-30, 30, ROWS)[:, None]
    rows[2] = 0.0
    expected = np.sqrt(np.abs(rows).max(axis=1) * np.sqrt(np.mean(rows**2, axis=1)))
    expected[2] = 1.0
    np.testing.assert_allclose(row_scales(rows), expected, rtol=1e-5)


CHOICES = [cell_clusters, cell_grids]


def cells_of(count: int, size: int, seed: int = 0):
    """Returns cells that differ in size a hundredfold."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((count, size)) * np.exp(rng.uniform(-4, 0, (count, 1)))).astype(np.float32)


def chosen_by(choice, cells, bits, importance=None):
    return choice(cells, bits if choice is cell_grids else 2**bits, importance)


def errors_of(levels, cells):
    return np.sum((levels.values(levels.codes(cells)).astype(np.float64) - cells) ** 2, axis=1)


def scale_of(levels):
    return levels.grid.scale if isinstance(levels, GridLevels) else levels.scale


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("choice", CHOICES)
def test_scales_of_cells_are_halves_with_the_sign_of_the_greatest(choice, bits):
    cells = cells_of(60, 32)
    levels = chosen_by(choice, cells, bits)
    scale = scale_of(levels)
    np.testing.assert_array_equal(scale.astype(np.float16).astype(np.float32), scale)
    greatest = cells[np.arange(60), np.abs(cells).argmax(axis=1)]
    np.testing.assert_array_equal(np.sign(scale), np.sign(greatest))
    assert scale.dtype == np.float32
    if isinstance(levels, GridLevels):
        assert set(levels.grid.zero_point) == {2 ** (bits - 1) - 1}
        assert levels.grid.bits == bits


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_grids_of_many_levels_reach_the_greatest_value(bits):
    cells = cells_of(60, 32)
    levels = cell_grids(cells, bits)
    codes = levels.codes(cells)
    greatest = np.abs(cells).argmax(axis=1)
    assert set(codes[np.arange(60), greatest]) == {2**bits - 1}
    error = levels.values(codes) - cells
    assert (np.abs(error) <= 0.5001 * np.abs(levels.grid.scale)[:, None] + 1e-3 * np.abs(cells)).mean() > 0.97


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("choice", CHOICES)
def test_no_other_scale_near_is_much_better(choice, bits):
    """Against a fine search from a third to three times as much, cell by cell."""
    cells = cells_of(40, 32)
    levels = chosen_by(choice, cells, bits)
    best = np.full(40, np.inf)
    for ratio in np.geomspace(1 / 3, 3, 150):
        scale = (scale_of(levels) * ratio).astype(np.float32)
        if isinstance(levels, GridLevels):
            other = GridLevels(Grid(scale, levels.grid.zero_point, bits))
        else:
            other = BookLevels(levels.codebook, scale)
        best = np.minimum(best, errors_of(other, cells))
    assert errors_of(levels, cells).sum() < 1.12 * best.sum()


@pytest.mark.parametrize("bits", [3, 4])
def test_cells_err_less_than_with_a_scale_between_greatest_and_rms_alone(bits):
    cells = cells_of(200, 32)
    plain = errors_of(cluster_levels(cells, 2**bits), cells).sum()
    assert errors_of(cell_clusters(cells, 2**bits), cells).sum() < 0.85 * plain


@pytest.mark.parametrize("choice", CHOICES)
def test_errors_that_matter_more_are_smaller(choice):
    cells = cells_of(50, 32)
    importance = np.where(np.arange(32) < 8, 100.0, 1.0)
    plain, weighted = (chosen_by(choice, cells, 3, own) for own in (None, importance))
    sums = [np.sum((own.values(own.codes(cells)) - cells) ** 2.0 * importance) for own in (plain, weighted)]
    assert sums[1] < 0.9 * sums[0]
    by_cell = chosen_by(choice, cells, 3, np.broadcast_to(importance, cells.shape).copy())
    np.testing.assert_array_equal(scale_of(by_cell), scale_of(weighted))


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("choice", CHOICES)
def test_zeros_of_cells_stay_zero(choice, bits):
    cells = cells_of(50, 32)
    cells[np.random.default_rng(0).random(cells.shape) < 0.6] = 0
    cells[3] = 0
    levels = chosen_by(choice, cells, bits)
    assert levels.has_zero
    assert not levels.values(levels.codes(cells))[cells == 0].any()


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e-6, 1e25, 3e38])
@pytest.mark.parametrize("choice", CHOICES)
def test_extreme_cells_do_not_spoil_others(choice, size):
    cells = np.clip(cells_of(20, 32), -1, 1)
    cells[4] = np.clip(cells[4] / np.abs(cells[4]).max(), -1, 1) * np.float32(size)
    levels = chosen_by(choice, cells, 5)
    error = levels.values(levels.codes(cells)).astype(np.float64) - cells
    relative = np.linalg.norm(error, axis=1) / np.linalg.norm(cells.astype(np.float64), axis=1)
    assert np.delete(relative, 4).max() < 0.06
    assert relative[4] < (1.01 if size < 1e-37 else 0.06)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("choice", CHOICES)
def test_cells_of_every_float_type(choice, dtype):
    cells = cells_of(30, 16).astype(dtype)
    levels, wide = chosen_by(choice, cells, 6), chosen_by(choice, cells.astype(np.float32), 6)
    np.testing.assert_array_equal(scale_of(levels), scale_of(wide))
    np.testing.assert_array_equal(levels.codes(cells), wide.codes(cells.astype(np.float32)))


def test_scales_are_halves_all_or_none():
    within, beyond = np.array([0.1, -3.0, 60000.0]), np.array([0.1, 1e-6])
    np.testing.assert_array_equal(halves(within), within.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(halves(beyond), beyond.astype(np.float32))
    np.testing.assert_array_equal(halves(-beyond * 1e12), (-beyond * 1e12).astype(np.float32))
