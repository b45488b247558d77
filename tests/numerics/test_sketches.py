"""Tests of sketches: nothing is lost but what the width of a bin hides."""

from __future__ import annotations

import math
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxshrink.numerics.sketches import sketch

BIG = (1 << 16) + 1000  # more than is kept exactly


def assert_exact(values):
    found = sketch(values)
    means, counts = np.unique(values.astype(np.float64), return_counts=True)
    assert np.array_equal(found.means, means)
    assert np.array_equal(found.counts, counts)
    assert not np.signbit(found.means[found.means == 0]).any()


@given(
    hnp.arrays(
        st.sampled_from([np.float16, np.float32, np.float64]),
        hnp.array_shapes(max_dims=3),
        elements=st.sampled_from([-3.0, -0.0, 0.0, 0.5, 6e-8, 1000.0]) | st.floats(-100, 100, width=16),
    )
)
def test_small_tensors_are_exact(values):
    assert_exact(values)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_16_bit_tensors_of_any_size_are_exact(dtype):
    values = np.random.default_rng(0).standard_normal((300, 1000)).astype(dtype)
    values[::7] = -0.0
    assert_exact(values.T)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_bins_hold_every_value_within_their_width(dtype, scale):
    values = (np.random.default_rng(0).standard_t(2, BIG) * scale).astype(dtype)
    found = sketch(values)
    assert found.counts.sum() == BIG
    assert found.counts.min() >= 1
    assert np.all(np.diff(found.means) > 0)
    assert math.fsum((found.means * found.counts).tolist()) == pytest.approx(math.fsum(values.tolist()), rel=1e-9)
    places = np.clip(np.searchsorted(found.means, values), 1, found.means.size - 1)
    distance = np.minimum(np.abs(values - found.means[places - 1]), np.abs(values - found.means[places]))
    assert np.all(distance <= 2.0**-11 * np.abs(values))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("offset", [1.0, -1000.0])
def test_a_common_offset_does_not_coarsen_the_bins(dtype, offset):
    spread = abs(offset) * 1e-4
    values = (offset + np.random.default_rng(0).random(BIG) * spread).astype(dtype)
    found = sketch(values)
    places = np.clip(np.searchsorted(found.means, values), 1, found.means.size - 1)
    distance = np.minimum(np.abs(values - found.means[places - 1]), np.abs(values - found.means[places]))
    assert distance.max() <= 2.0**-11 * spread


@pytest.mark.parametrize("scale", [1e-42, 1e-300, 1e300])
def test_tiny_and_huge_values_have_bins_too(scale):
    dtype = np.float32 if scale == 1e-42 else np.float64
    values = (np.random.default_rng(0).integers(-100, 100, BIG) * scale).astype(dtype)
    assert sketch(values).means == pytest.approx(np.unique(values.astype(np.float64)), rel=1e-12, abs=0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [0.1, -3.0, 0.0, 1e-40])
def test_a_constant_is_exact(dtype, value):
    found = sketch(np.full(BIG, value, dtype))
    assert (found.means.tolist(), found.counts.tolist()) == ([float(dtype(value))], [BIG])


def test_values_on_few_levels_are_exact_in_float32():
    levels = np.array([-0.3, -0.1, 0, 1e-6, 0.1, 0.7, 40.0], np.float32)
    values = np.random.default_rng(0).choice(levels, BIG)
    assert np.array_equal(sketch(values).means, levels.astype(np.float64))


def test_what_cannot_be_sketched_is_refused():
    with pytest.raises(ValueError, match=r"sketch: values must be not empty, got shape \(0, 3\)"):
        sketch(np.zeros((0, 3), np.float32))
    with pytest.raises(ValueError, match="sketch: dtype must be float16, bfloat16, float32 or float64, got int64"):
        sketch(np.zeros(3, np.int64))
    for bad in (np.nan, np.inf):
        values = np.zeros(BIG, np.float32)
        values[-1] = bad
        with pytest.raises(ValueError, match="sketch: values must be finite"):
            sketch(values)


def weighted_oracle(values, importance):
    """Returns distinct values that matter, and the sums of their importance relative to the greatest."""
    weights = np.broadcast_to(importance.astype(np.float64), values.shape) / importance.astype(np.float64).max()
    sums: dict[float, list[float]] = {}
    for value, weight in zip(values.astype(np.float64).ravel().tolist(), weights.ravel().tolist(), strict=True):
        if weight > 0:
            sums.setdefault(value + 0.0, []).append(weight)
    return sorted(sums), [math.fsum(sums[value]) for value in sorted(sums)]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(6, 9), (9,), (6, 1), (), (1, 1)])
@given(seed=st.integers(0, 10**6))
def test_importance_is_summed_for_each_value(dtype, shape, seed):
    rng = np.random.default_rng(seed)
    values = (rng.integers(-4, 5, (6, 9)) / 4).astype(dtype)
    importance = np.asarray(rng.exponential(size=shape) * (rng.random(shape) < 0.8) * 1e20)
    importance.flat[0] = 1e20
    found = sketch(values, importance)
    means, counts = weighted_oracle(values, importance)
    assert found.means.tolist() == means
    assert found.counts.dtype == np.float64
    np.testing.assert_allclose(found.counts, counts, rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("layout", ["rows", "columns", "every"])
def test_importance_in_bins_of_big_tensors(dtype, layout):
    rng = np.random.default_rng(0)
    values = rng.standard_t(3, (256, 300)).astype(dtype)
    importance = rng.exponential(size={"rows": (256, 1), "columns": (300,), "every": (256, 300)}[layout])
    importance[:2] = 0.0
    for array in (values, values.T):
        weights = importance if array is values else np.broadcast_to(importance, (256, 300)).T
        found = sketch(array, weights)
        every = np.broadcast_to(importance, values.shape) / importance.max()
        assert found.counts.min() > 0
        assert np.all(np.diff(found.means) > 0)
        assert found.counts.sum() == pytest.approx(every.sum(), rel=1e-12)
        assert found.means @ found.counts == pytest.approx(float(np.sum(values.astype(np.float64) * every)), rel=1e-9)
        important = values[every > 0].astype(np.float64)
        places = np.clip(np.searchsorted(found.means, important), 1, found.means.size - 1)
        distance = np.minimum(np.abs(important - found.means[places - 1]), np.abs(important - found.means[places]))
        assert np.all(distance <= 2.0**-11 * np.abs(important))


@pytest.mark.parametrize("size", [100, BIG])
def test_equal_importance_gives_the_plain_sketch(size):
    values = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    plain = sketch(values)
    for importance in (np.float32([7]), np.zeros(1), np.full(size, 1e-300)):
        found = sketch(values, importance)
        np.testing.assert_allclose(found.means, plain.means, rtol=1e-12)
        np.testing.assert_array_equal(found.counts, plain.counts)


@pytest.mark.parametrize("size", [100, BIG])
def test_next_to_nothing_is_nothing(size):
    values = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    importance = np.where(np.arange(size) == 5, 1e300, 1e-300)
    found = sketch(values, importance)
    assert (found.means.tolist(), found.counts.tolist()) == ([float(values[5])], [1.0])


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        (np.ones(4), r"sketch: importance must be of a shape that broadcasts to \(2, 3\), got shape \(4,\)"),
        (
            np.ones((1, 2, 3)),
            r"sketch: importance must be of a shape that broadcasts to \(2, 3\), got shape \(1, 2, 3\)",
        ),
        (np.array([1.0, -2.0, 3.0]), "sketch: importance must be not negative, got -2.0"),
        (np.array([1.0, np.nan, 3.0]), "sketch: importance: values must be finite"),
        (np.ones(3, np.int64), "sketch: importance: dtype must be float16"),
    ],
)
def test_importance_that_makes_no_sense_is_refused(importance, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        sketch(np.ones((2, 3), np.float32), importance)


@pytest.mark.parametrize("importance", [None, np.arange(1.0, 4097)])
def test_memory_does_not_grow_with_the_tensor(importance):
    values = np.random.default_rng(0).standard_normal((1 << 12, 1 << 12), dtype=np.float32)
    values.flags.writeable = False
    tracemalloc.start()
    sketch(values, importance)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < values.nbytes  # 64 MiB; a float64 copy would be 128
