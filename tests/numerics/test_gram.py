"""Tests of Gram matrices: against dense float64 products, whatever the chunks, layouts and dtypes; overflow, NaN, sharing."""

from __future__ import annotations

import itertools
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxshrink.numerics import gram as gram_module
from onnxshrink.numerics.gram import Gram, GramSum, PairedGram

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


def positions(groups, count, columns, seed=0, dtype=np.float32):
    values = np.random.default_rng(seed).standard_normal((groups, count, columns))
    return (values + np.linspace(-1, 2, columns)).astype(dtype)


def dense(values):
    wide = values.astype(np.float64)
    return np.einsum("gpk,gpl->gkl", wide, wide), wide.sum(axis=1)


def summed(chunks, groups, columns):
    total = GramSum("x", groups, columns)
    for chunk in chunks:
        total.add(chunk)
    return total.result()


def check(gram: Gram, values, rtol=1e-5):
    matrix, total = dense(values)
    assert gram.matrix.dtype == gram.total.dtype == gram.mean.dtype == np.float64
    assert gram.count == values.shape[1]
    np.testing.assert_array_equal(gram.matrix, gram.matrix.swapaxes(1, 2))
    scale = np.sqrt(np.einsum("gkk,gll->gkl", matrix, matrix))  # Cauchy-Schwarz: no element is larger
    np.testing.assert_array_less(np.abs(gram.matrix - matrix), rtol * scale + 1e-30)
    np.testing.assert_allclose(
        gram.total, total, atol=rtol * (1 + np.abs(values.astype(np.float64)).sum(axis=1).max(initial=0))
    )
    np.testing.assert_allclose(gram.mean, total / max(gram.count, 1), atol=rtol * 10)


@given(
    groups=st.integers(1, 4),
    columns=st.sampled_from([1, 2, 9, 63, 64, 65, 130, 300]),
    cuts=st.lists(st.integers(0, 400), max_size=4),
    by_column=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    block=st.sampled_from([1, 100, gram_module._BLOCK_ELEMENTS]),
)
def test_chunks_of_any_size_and_layout_sum_to_the_dense_product(groups, columns, cuts, by_column, dtype, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gram_module, "_BLOCK_ELEMENTS", block * groups * columns)
        values = positions(groups, 400, columns, dtype=dtype)
        if by_column:
            values = np.ascontiguousarray(values.swapaxes(1, 2)).swapaxes(1, 2)
        ends = [0, *sorted(cuts), 400]
        chunks = [values[:, start:end] for start, end in itertools.pairwise(ends)]
        check(summed(chunks, groups, columns), values)


def test_float64_is_multiplied_in_float64():
    values = positions(2, 50, 70, dtype=np.float64)
    check(summed([values], 2, 70), values, rtol=1e-14)


@given(groups=st.integers(2, 3), columns=st.sampled_from([3, 80]))
def test_one_and_the_same_group_is_as_good_as_copies(groups, columns):
    single, other = positions(1, 300, columns), positions(groups, 20, columns, seed=1)
    shared = np.broadcast_to(single, (groups, 300, columns))
    gram = summed([shared[:, :7], other, shared[:, 7:]], groups, columns)
    check(gram, np.concatenate([shared, other], axis=1))


def test_many_positions_lose_nothing():
    """A float32 sum of 2^22 ones stays exact only below 2^24: here the squares of a constant 3 pass that."""
    gram = summed([np.full((1, 1 << 18, 2), 3, np.float32)] * 16, 1, 2)
    np.testing.assert_array_equal(gram.matrix, np.full((1, 2, 2), 9.0 * (1 << 22)))
    np.testing.assert_array_equal(gram.total, np.full((1, 2), 3.0 * (1 << 22)))


@pytest.mark.parametrize("columns", [2, 100])
@pytest.mark.parametrize("groups", [1, 2])
def test_squares_beyond_float32_are_computed_in_float64(groups, columns):
    values = positions(groups, 200, columns)
    values[0, 5] = 1e30
    check(summed([values], groups, columns), values)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("groups", "columns"), [(1, 2), (2, 2), (2, 100)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_named(bad, groups, columns, dtype):
    values = positions(groups, 300, columns, dtype=dtype)
    values[-1, 7, 1] = bad
    with pytest.raises(ValueError, match=r"^conv1_in: values must be finite, got a NaN, an infinity"):
        total = GramSum("conv1_in", groups, columns)
        total.add(values)
        total.result()


def test_a_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"^x: chunk must be \[2, positions, 3\], got \[2, 5, 4\]$"):
        GramSum("x", 2, 3).add(np.zeros((2, 5, 4), np.float32))


def test_nothing_summed_has_a_mean_of_zero():
    gram = GramSum("x", 1, 3).result()
    assert gram.count == 0
    np.testing.assert_array_equal(gram.mean, np.zeros((1, 3)))
    np.testing.assert_array_equal(gram.matrix, np.zeros((1, 3, 3)))


def test_moments_of_two_sets_add_up():
    values = positions(2, 60, 5)
    both = summed([values[:, :20]], 2, 5) + summed([values[:, 20:]], 2, 5)
    check(both, values)
    for array in (both.matrix, both.total):
        assert not array.flags.writeable


def test_memory_is_bounded_and_foretold():
    columns = 512
    chunk = positions(1, 100, columns)
    tracemalloc.start()
    total = GramSum("x", 1, columns)
    for _ in range(20):
        total.add(chunk)
    held = tracemalloc.get_traced_memory()[0]
    long = np.broadcast_to(np.float16(1), (1, 1 << 18, columns))
    total.add(long)  # 512 MB as float32
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert held <= 1.1 * GramSum.nbytes(1, columns)
    assert peak < held + 100 * 2**20


def test_errors_of_two_sets_of_positions_add_up():
    rng = np.random.default_rng(0)
    error, now = rng.standard_normal((2, 60, 3)), rng.standard_normal((2, 60, 5))

    def moments(positions) -> PairedGram:
        parts = error[:, positions], now[:, positions]
        return PairedGram(summed([parts[1]], 2, 5), np.einsum("gpk,gpl->gkl", *parts), parts[0].mean(axis=1))

    both = moments(slice(0, 20)) + moments(slice(20, None))
    check(both.now, now)
    np.testing.assert_allclose(both.error, np.einsum("gpk,gpl->gkl", error, now))
    np.testing.assert_allclose(both.error_mean, error.mean(axis=1))
    assert not both.error.flags.writeable
    assert not both.error_mean.flags.writeable
    nothing = PairedGram(Gram(np.zeros((1, 5, 5)), np.zeros((1, 5)), 0), np.zeros((1, 3, 5)), np.zeros((1, 3)))
    np.testing.assert_array_equal((nothing + nothing).error_mean, np.zeros((1, 3)))
