"""Tests of sums of products: against dense float64 products, whatever the chunks, layouts and dtypes; overflow, NaN, sharing."""

from __future__ import annotations

import itertools
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxshrink.numerics import gram as gram_module
from onnxshrink.numerics.products import Products, ProductSum

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


def positions(groups, count, columns, seed=0, dtype=np.float32):
    values = np.random.default_rng([seed, columns]).standard_normal((groups, count, columns))
    return (values + np.linspace(-1, 2, columns)).astype(dtype)


def summed(chunks, groups, rows, columns) -> Products:
    total = ProductSum("x", groups, rows, columns)
    for left, right in chunks:
        total.add(left, right)
    return total.result()


def check(found: Products, left, right, rtol=1e-5):
    first, second = left.astype(np.float64), right.astype(np.float64)
    assert found.matrix.dtype == found.mean.dtype == np.float64
    scale = np.sqrt(np.einsum("gpk,gpk->gk", first, first)[:, :, None] * np.einsum("gpk,gpk->gk", second, second)[:, None])
    error = np.abs(found.matrix - np.einsum("gpk,gpl->gkl", first, second))
    np.testing.assert_array_less(error, rtol * scale + 1e-30)  # Cauchy-Schwarz: no element is larger than the scale
    mean = first.sum(axis=1) / max(first.shape[1], 1)
    np.testing.assert_allclose(found.mean, mean, atol=rtol * 10 * (1 + np.abs(first).max(initial=0)))
    assert not found.matrix.flags.writeable
    assert not found.mean.flags.writeable


@given(
    groups=st.integers(1, 3),
    rows=st.sampled_from([1, 2, 40, 130]),
    columns=st.sampled_from([1, 2, 9, 65, 130]),
    cuts=st.lists(st.integers(0, 400), max_size=4),
    by_column=st.tuples(st.booleans(), st.booleans()),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    block=st.sampled_from([1, 100, gram_module._BLOCK_ELEMENTS]),
)
def test_products_of_any_chunks_and_layout_sum_to_the_dense_one(groups, rows, columns, cuts, by_column, dtypes, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gram_module, "_BLOCK_ELEMENTS", block * groups * max(rows, columns))
        sides = [positions(groups, 400, size, dtype=dtype) for size, dtype in zip((rows, columns), dtypes, strict=True)]
        for side, columns_first in enumerate(by_column):
            if columns_first:
                sides[side] = np.ascontiguousarray(sides[side].swapaxes(1, 2)).swapaxes(1, 2)
        cuts = list(itertools.pairwise([0, *sorted(cuts), 400]))
        left, right = sides
        check(summed([(left[:, start:end], right[:, start:end]) for start, end in cuts], groups, rows, columns), left, right)


def test_one_and_the_same_group_is_as_good_as_copies():
    sides = [np.broadcast_to(positions(1, 300, size), (3, 300, size)) for size in (20, 70)]
    others = [positions(3, 20, size, seed=1) for size in (20, 70)]
    chunks = [tuple(side[:, :7] for side in sides), tuple(others), tuple(side[:, 7:] for side in sides)]
    check(summed(chunks, 3, 20, 70), *(np.concatenate(both, axis=1) for both in zip(sides, others, strict=True)))
    check(summed([tuple(sides)], 3, 20, 70), *sides)
    check(summed([(others[0], sides[1][:, :20])], 3, 20, 70), others[0], sides[1][:, :20])  # one side alone


def test_what_is_kept_for_later_does_not_follow_the_chunk():
    left, right = positions(1, 20, 3), positions(1, 20, 4)
    chunks = left.copy(), right.copy()
    total = ProductSum("x", 1, 3, 4)
    total.add(*chunks)
    for chunk in chunks:
        chunk[:] = 0
    check(total.result(), left, right)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("columns", [2, 100])
def test_products_beyond_float32_are_made_in_float64(which, columns):
    pair = [positions(2, 200, columns), positions(2, 200, columns, seed=1)]
    pair[which][0, 5] = 1e30
    pair[1 - which][0, 5] = 1e25
    check(summed([pair], 2, columns, columns), *pair)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(("count", "dtype"), [(10, np.float32), (3000, np.float16), (10, np.float64)])
def test_what_is_not_finite_is_named(bad, which, count, dtype):
    pair = [positions(1, count, 3, dtype=dtype), positions(1, count, 3, dtype=dtype)]
    pair[which][0, 7, 1] = bad
    with pytest.raises(ValueError, match=r"^x: values must be finite, got a NaN, an infinity"):
        summed([pair], 1, 3, 3)


def test_shapes_that_do_not_fit_are_refused():
    def zeros(*shape):
        return np.zeros(shape, np.float32)

    with pytest.raises(ValueError, match=r"^x: chunk must be of 5 positions, as the other one, got 4$"):
        ProductSum("x", 1, 2, 3).add(zeros(1, 5, 2), zeros(1, 4, 3))
    with pytest.raises(ValueError, match=r"^x: chunk must be \[1, positions, 3\], got \[1, 4, 2\]$"):
        ProductSum("x", 1, 2, 3).add(zeros(1, 4, 2), zeros(1, 4, 2))
    with pytest.raises(ValueError, match=r"^x: chunk must be \[1, positions, 2\], got \[2, 4, 2\]$"):
        ProductSum("x", 1, 2, 3).add(zeros(2, 4, 2), zeros(1, 4, 3))


def test_nothing_summed_has_a_mean_of_zero():
    check(summed([], 2, 3, 5), np.zeros((2, 0, 3)), np.zeros((2, 0, 5)))


@pytest.mark.parametrize(("rows", "columns"), [(64, 512), (512, 64)])
def test_memory_is_bounded_and_foretold(rows, columns):
    left, right = positions(1, 100, rows), positions(1, 100, columns)
    tracemalloc.start()
    total = ProductSum("x", 1, rows, columns)
    for _ in range(20):
        total.add(left, right)
    held = tracemalloc.get_traced_memory()[0]
    ones = [np.broadcast_to(np.float16(1), (1, 1 << 16, size)) for size in (rows, columns)]
    total.add(*ones)  # up to 128 MB as float32
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert held <= 1.1 * ProductSum.nbytes(1, rows, columns)
    assert peak < held + 100 * 2**20
