"""Tests of rows that tell the others: against LAPACK's SVD of the whitened matrix, and against rounding that was really done."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import example as with_example
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxshrink.numerics.interpolative import interpolative_factor
from tests.numerics.test_low_rank import example, gram_of, whitened

UNITS = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SINGLE = UNITS["float32"]
sides, seeds, several = st.integers(1, 9), st.integers(0, 10**6), st.integers(1, 3)


def product(pieces):
    kept, before, after = pieces
    return np.concatenate([before @ kept, kept, after @ kept], axis=1)


def best(matrix, rank, root=None):
    """Returns, for each group, the matrix of a rank with the least error of its products with L, and the singular values."""
    root = np.broadcast_to(np.eye(matrix.shape[2]), (len(matrix), *[matrix.shape[2]] * 2)) if root is None else root
    left, values, right = np.linalg.svd(matrix @ root, full_matrices=False)
    cut = (left[..., :rank] * values[:, None, :rank]) @ right[:, :rank]
    return np.linalg.solve(root.swapaxes(1, 2), cut.swapaxes(1, 2)).swapaxes(1, 2), values


def largest(pieces):
    return max(np.abs(others).max(initial=0.0) for others in pieces[1:])


@given(seed=seeds, rows=sides, columns=sides, groups=several, known=st.booleans(), data=st.data())
def test_the_product_is_the_best_of_its_rank(seed, rows, columns, groups, known, data):
    """Whitened by inputs of full rank, or plain."""
    matrix, inputs = example(seed, rows, columns, 40, groups)
    rank = data.draw(st.integers(1, min(rows, columns)))
    grams = gram_of(inputs) if known else None
    pieces = interpolative_factor(matrix, rank, grams, SINGLE)
    kept, before, after = pieces
    assert kept.shape == (groups, rank, columns)
    assert before.shape[::2] == after.shape[::2] == (groups, rank)
    assert (before.shape[1], after.shape[1]) in [(0, rows - rank), (rows - rank, 0)]
    assert all(piece.dtype == np.float64 for piece in pieces)
    root = np.linalg.cholesky(grams) if known else None
    expected, values = best(matrix, rank, root)
    root = np.eye(columns) if root is None else root
    size = np.linalg.norm(matrix @ root, axis=(1, 2))
    bound = (1e-6 + 1e-7 * largest(pieces)) * size  # of large factors, which are rare, a little is taken off
    error = np.linalg.norm((matrix - product(pieces)) @ root, axis=(1, 2))
    np.testing.assert_array_less(np.abs(error - np.linalg.norm(values[:, rank:], axis=1)), bound)
    apart = rank == values.shape[1] or bool((values[:, rank - 1] > 1.05 * values[:, rank]).all())
    if apart:  # else there is more than one that is as good
        np.testing.assert_array_less(np.linalg.norm((product(pieces) - expected) @ root, axis=(1, 2)), 1e3 * bound)


@given(seed=seeds, rows=sides, columns=sides, groups=several, data=st.data())
def test_what_is_kept_is_a_part_of_the_product(seed, rows, columns, groups, data):
    matrix, _ = example(seed, rows, columns, 1, groups)
    rank = data.draw(st.integers(1, min(rows, columns)))
    kept, before, _ = interpolative_factor(matrix, rank, None, SINGLE)
    expected, values = best(matrix, rank)
    if rank == values.shape[1] or (values[:, rank - 1] > 1.05 * values[:, rank]).all():
        start = before.shape[1]
        np.testing.assert_allclose(kept, expected[:, start : start + rank], atol=1e-6 * values.max())


@given(seed=seeds, rows=sides, more=st.integers(0, 5), groups=several, known=st.booleans())
def test_with_all_rows_kept_nothing_is_left_to_compute(seed, rows, more, groups, known):
    matrix, inputs = example(seed, rows, rows + more, 40, groups)
    kept, before, after = interpolative_factor(matrix, rows, gram_of(inputs) if known else None, SINGLE)
    assert before.shape == after.shape == (groups, 0, rows)
    np.testing.assert_allclose(kept, matrix, atol=1e-6 * np.abs(matrix).max())


@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS)
@pytest.mark.parametrize("dependent", ["zeros", "copies", "copies of those kept"])
@pytest.mark.parametrize("where", ["first", "last"])
@given(seed=seeds, rank=st.integers(2, 4), groups=several, known=st.booleans())
@settings(max_examples=15)
def test_rows_that_depend_on_each_other_are_not_the_ones_kept(where, dependent, unit, seed, rank, groups, known):
    """Of a matrix of that very rank, whose other end tells everything."""
    _, inputs = example(seed, 1, 7, 40, groups)
    rng = np.random.default_rng(seed)
    sound = np.linalg.qr(rng.standard_normal((groups, 7, rank)))[0].swapaxes(1, 2)
    ends = {"zeros": np.zeros((groups, rank, 7)), "copies": sound[:, [0] * rank], "copies of those kept": sound[:, [*range(1, rank), 1]]}[dependent]
    matrix = np.concatenate([ends, sound] if where == "first" else [sound, ends], axis=1)
    pieces = interpolative_factor(matrix, rank, gram_of(inputs) if known else None, unit)
    assert (pieces[1].shape[1], pieces[2].shape[1]) == ((rank, 0) if where == "first" else (0, rank))
    assert largest(pieces) < 1 + 1e-3
    np.testing.assert_allclose(product(pieces), matrix, atol=max(1e-6, 16 * unit))


@given(seed=seeds, rows=sides, columns=sides, groups=several, data=st.data())
def test_inputs_that_say_nothing_count_as_none(seed, rows, columns, groups, data):
    matrix, _ = example(seed, rows, columns, 1, groups)
    rank = data.draw(st.integers(1, min(rows, columns)))
    blind = interpolative_factor(matrix, rank, np.zeros((groups, columns, columns)), SINGLE)
    for one, other in zip(blind, interpolative_factor(matrix, rank, None, SINGLE), strict=True):
        np.testing.assert_array_equal(one, other)


@given(seed=seeds, rows=sides, columns=st.integers(2, 9), count=st.integers(1, 8), groups=several, data=st.data())
def test_inputs_of_few_directions(seed, rows, columns, count, groups, data):
    """The Gram matrix is singular: outputs are still those of the best product, and pieces are what float32 can hold."""
    matrix, inputs = example(seed, rows, columns, min(count, columns - 1), groups)
    rank = data.draw(st.integers(1, min(rows, columns)))
    pieces = interpolative_factor(matrix, rank, gram_of(inputs), SINGLE)
    assert all(np.isfinite(piece).all() for piece in pieces)
    values = np.linalg.svd(whitened(matrix, inputs), compute_uv=False)
    size = np.linalg.norm(whitened(matrix, inputs)) + np.linalg.norm(matrix) * np.linalg.norm(inputs)
    error = np.linalg.norm(whitened(matrix - product(pieces), inputs), axis=(1, 2))
    tail = np.sqrt(np.square(values[:, rank:]).sum(axis=1))
    np.testing.assert_allclose(error, tail, atol=2e-4 * size)


def awkward(seed, kind, rows, columns):
    """Returns a matrix [1, rows, columns] whose rows hang together, or hardly differ from zero."""
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((rows, columns))
    if kind == "zero rows":
        matrix[rng.random(rows) < 0.5] = 0.0
    elif kind == "one row":
        matrix[:] = matrix[0]
    elif kind == "copies":
        matrix[: rows // 2] = matrix[0]
    elif kind == "low rank":
        matrix = matrix[:, :1] @ matrix[:1] + matrix[:, -1:] @ matrix[-1:]
    elif kind == "decay":
        matrix *= np.exp(-2.0 * np.arange(columns))
    elif kind == "sizes":
        matrix *= np.exp(5 * rng.standard_normal((rows, 1)))
    return matrix[None]


AWKWARD = ["zero rows", "one row", "copies", "low rank", "decay", "sizes"]


@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS)
@pytest.mark.parametrize("kind", AWKWARD)
@given(
    seed=seeds, rows=st.integers(1, 30), columns=st.integers(1, 30), known=st.sampled_from(["no", "few", "of many sizes"]),
    exponents=st.tuples(st.integers(-10, 10), st.integers(-10, 10)), data=st.data(),
)  # fmt: skip
@settings(max_examples=25)
def test_nothing_blows_up(kind, unit, seed, rows, columns, known, exponents, data):
    """Whatever the matrix and its inputs, and whatever their sizes: finite pieces, and no warning."""
    matrix = awkward(seed, kind, rows, columns) * 10.0 ** exponents[0]
    grams = None
    if known != "no":
        inputs = example(seed, 1, columns, 2 if known == "few" else 60)[1]
        sizes = 10.0 ** np.random.default_rng(seed).uniform(-8, 4, columns) if known == "of many sizes" else 1.0
        grams = gram_of(inputs * sizes) * 10.0 ** exponents[1]
    rank = data.draw(st.integers(1, min(rows, columns)))
    for piece in interpolative_factor(matrix, rank, grams, unit):
        assert np.isfinite(piece.astype(np.float32)).all()


@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS)
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("decay", [1.0, 0.8])
def test_rows_that_are_zero_up_to_rounding_tell_nothing(decay, known, unit):
    """Every second one is: what is left of it in factors must not be blown up to the size of others."""
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((1, 32, 32)) * decay ** np.arange(32)
    matrix[:, ::2] = 0.0
    matrix = matrix @ np.linalg.qr(rng.standard_normal((32, 32)))[0]
    grams = gram_of(example(1, 1, 32, 100)[1]) if known else None
    for rank in range(1, 33):
        pieces = interpolative_factor(matrix, rank, grams, unit)
        assert largest(pieces) < 1e3 / unit
        assert all(np.isfinite(piece.astype(np.float32)).all() for piece in pieces)


@pytest.mark.parametrize("kind", AWKWARD)
def test_normal_matrices_as_good_as_singular(kind):
    """Rounding makes them indefinite, or so ill-conditioned that a solve warns."""
    for (rows, columns), known, seed in itertools.product([(12, 30), (30, 12), (30, 30)], [False, True], range(3)):
        matrix = awkward(seed, kind, rows, columns)
        inputs = example(seed, 1, columns, 60)[1] * 10.0 ** np.linspace(-8, 4, columns)
        for rank, unit in itertools.product((1, 5, 11, 12), UNITS.values()):
            pieces = interpolative_factor(matrix, rank, gram_of(inputs) if known else None, unit)
            assert all(np.isfinite(piece).all() for piece in pieces)


def noise(pieces, truth, root, unit):
    """Returns the expected squared error of the other outputs, of kept ones with noise of a share of their sizes."""
    kept, before, after = pieces
    ways, start = np.concatenate([before, after], axis=1), before.shape[1]
    others = np.delete(truth, slice(start, start + kept.shape[1]), axis=1)
    sizes = np.linalg.norm(kept @ root, axis=2)
    return np.square((ways @ kept - others) @ root).sum() + unit**2 * np.square(ways * sizes[:, None]).sum()


def naive(truth, rank, start):
    """Returns pieces as a plain solve makes them."""
    kept = truth[:, start : start + rank]
    others = np.delete(truth, slice(start, start + rank), axis=1)
    ways = np.stack([np.linalg.lstsq(one.T, other.T)[0].T for one, other in zip(kept, others, strict=True)])
    return kept, ways[:, :start], ways[:, start:]


@pytest.mark.parametrize("unit", [UNITS["float16"], UNITS["bfloat16"], 0.1])
@given(seed=seeds, rows=st.integers(2, 9), columns=st.integers(2, 9), groups=several, known=st.booleans(), near=st.floats(0, 6), data=st.data())
def test_rounding_does_no_more_than_to_a_plain_solve_at_either_end(unit, seed, rows, columns, groups, known, near, data):
    """Of rows as near to dependent on each other as it comes."""
    matrix, inputs = example(seed, rows, columns, 40, groups)
    matrix[:, : rows // 2 + 1] = matrix[:, :1] + 10.0**-near * matrix[:, : rows // 2 + 1]
    rank = data.draw(st.integers(1, min(rows, columns)))
    grams = gram_of(inputs) if known else None
    root = np.linalg.cholesky(grams) if known else np.eye(columns)
    truth, _ = best(matrix, rank, np.linalg.cholesky(grams) if known else None)
    found = noise(interpolative_factor(matrix, rank, grams, unit), truth, root, unit)
    slack = (1e-6 * np.linalg.norm(matrix @ root)) ** 2
    for start in (0, rows - rank):
        assert found <= 1.001 * noise(naive(truth, rank, start), truth, root, unit) + slack


def test_outputs_that_were_really_rounded_are_nearer_than_those_of_a_plain_solve():
    rng = np.random.default_rng(0)
    basis, inputs = rng.standard_normal((6, 12)), rng.standard_normal((500, 12))
    turned = rng.standard_normal((18, 6))
    turned[:6] = turned[:1] + 1e-3 * turned[:6]
    turned[-6:] = turned[-1:] + 1e-3 * turned[-6:]
    matrix = (turned @ basis)[None]
    errors = {}
    for name, (kept, before, after) in {
        "plain, first": naive(matrix, 6, 0),
        "plain, last": naive(matrix, 6, 12),
        "ours": interpolative_factor(matrix, 6, inputs.T[None] @ inputs, UNITS["float16"]),
    }.items():
        outputs = (inputs @ kept[0].T).astype(np.float16).astype(np.float64)
        got = np.concatenate([outputs @ before[0].T, outputs, outputs @ after[0].T], axis=1)
        errors[name] = np.linalg.norm(got - inputs @ matrix[0].T) / np.linalg.norm(inputs @ matrix[0].T)
    assert errors["ours"] < 0.5 * min(errors["plain, first"], errors["plain, last"])


@with_example(seed=0, groups=2)
@given(seed=seeds, groups=several)
def test_groups_keep_the_same_rows_those_with_less_error_in_all(seed, groups):
    """Of one group the first rows depend on each other and all its outputs are large, of the others the last ones do."""
    rng = np.random.default_rng(seed)
    matrix = np.linalg.qr(rng.standard_normal((groups + 1, 7, 6)))[0].swapaxes(1, 2)
    matrix[0, :3] = 0.0
    matrix[0] *= 1e3
    matrix[1:, 3:] = matrix[1:, :1]
    kept, before, after = interpolative_factor(matrix, 3, None, SINGLE)
    assert (before.shape[1], after.shape[1]) == (3, 0)
    np.testing.assert_allclose(product((kept, before, after))[0], matrix[0], atol=1e-3)


@given(seed=seeds, rows=sides, columns=sides, groups=several, data=st.data())
def test_is_the_same_again_and_leaves_what_it_was_given(seed, rows, columns, groups, data):
    matrix, inputs = example(seed, rows, columns, 20, groups)
    rank = data.draw(st.integers(1, min(rows, columns)))
    given_ = matrix.astype(np.float32), gram_of(inputs)
    copies = [array.copy() for array in given_]
    found = [interpolative_factor(given_[0], rank, given_[1], SINGLE) for _ in range(2)]
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)
    for array, copy in zip(given_, copies, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_zeros_have_pieces_of_zeros():
    for grams in (None, np.ones((2, 4, 4))):
        kept, before, after = interpolative_factor(np.zeros((2, 5, 4)), 2, grams, SINGLE)
        assert not kept.any()
        assert not before.any()
        assert not after.any()


@pytest.mark.parametrize(
    ("matrix", "rank", "grams", "message"),
    [
        (np.ones((2, 3)), 1, None, r"^factor: matrix must be \[groups, rows, columns\], got shape \(2, 3\)$"),
        (np.ones((1, 2, 3)), 3, None, r"^factor: rank must be from 1 to 2, got 3$"),
        (np.ones((1, 2, 3)), 0, None, r"^factor: rank must be from 1 to 2, got 0$"),
        (np.ones((1, 2, 3)), 1, np.ones((3, 3)), r"^factor: grams must be of shape \(1, 3, 3\), got shape \(3, 3\)$"),
    ],
)
def test_what_does_not_fit_is_refused(matrix, rank, grams, message):
    with pytest.raises(ValueError, match=message):
        interpolative_factor(matrix, rank, grams, SINGLE)
