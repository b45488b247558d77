"""Tests of code lengths against Huffman's algorithm on a heap, and against all complete codes under a limit."""

from __future__ import annotations

import heapq
import math
from fractions import Fraction
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxshrink.numerics.code_lengths import (
    LONGEST,
    canonical_codes,
    canonical_order,
    check_lengths,
    code_lengths,
    code_tree,
    coded_bits,
    entropy_bits,
)

some_counts = st.lists(st.one_of(st.just(0), st.integers(0, 9), st.integers(0, 10**6)), max_size=60).map(
    lambda numbers: np.array(numbers, np.int64)
)


def huffman_bits(counts):
    """Returns the bits of Huffman's code: each merge adds a bit to every symbol below it."""
    heap = [count for count in counts.tolist() if count]
    if len(heap) == 1:
        return heap[0]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        total += merged
        heapq.heappush(heap, merged)
    return total


@cache
def complete_codes(symbols, limit):
    """Returns the sorted lengths of every complete code with so many symbols, found by splitting leaves."""
    codes = {(0,)}
    for _ in range(symbols - 1):
        codes = {
            tuple(sorted((*code[:at], *code[at + 1 :], code[at] + 1, code[at] + 1)))
            for code in codes
            for at in range(len(code))
            if code[at] < limit
        }
    return sorted(codes)


@given(some_counts)
def test_without_a_binding_limit_it_is_huffmans_code(counts):
    lengths = code_lengths(counts, LONGEST)
    check_lengths("test", lengths)
    assert (lengths.dtype, lengths.shape) == (np.uint8, counts.shape)
    assert np.array_equal(lengths > 0, counts > 0)
    if lengths.max(initial=0) < LONGEST:
        assert coded_bits(counts, lengths) == huffman_bits(counts)
    assert entropy_bits(counts) <= coded_bits(counts, lengths) + 1e-6


@given(st.lists(st.integers(1, 200), min_size=2, max_size=8), st.integers(0, 3))
def test_under_a_limit_no_complete_code_is_shorter(numbers, slack):
    limit = (len(numbers) - 1).bit_length() + slack
    counts = np.array(numbers)
    lengths = code_lengths(counts, limit)
    check_lengths("test", lengths)
    assert lengths.max() <= limit
    descending = sorted(numbers, reverse=True)
    least = min(sum(map(math.prod, zip(descending, code, strict=True))) for code in complete_codes(len(numbers), limit))
    assert coded_bits(counts, lengths) == least


@pytest.mark.parametrize("symbols", [256, 65_536])
def test_the_tightest_limit_gives_equal_lengths(symbols):
    counts = np.random.default_rng(0).integers(1, 10**6, symbols)
    assert code_lengths(counts, symbols.bit_length() - 1).tolist() == [symbols.bit_length() - 1] * symbols


def test_fibonacci_counts_are_held_by_the_limit():
    counts = np.array([1, 1])
    while counts.size < 60:
        counts = np.append(counts, counts[-1] + counts[-2])
    lengths = code_lengths(counts)
    check_lengths("test", lengths)
    assert lengths.max() == 15
    assert coded_bits(counts, lengths) < 1.001 * huffman_bits(counts)


def test_many_skewed_symbols():
    counts = (1e12 / np.arange(1, 65_537) ** 1.1).astype(np.int64)
    lengths = code_lengths(counts, LONGEST)
    check_lengths("test", lengths)
    assert coded_bits(counts, lengths) == huffman_bits(counts)
    assert coded_bits(counts, lengths) < entropy_bits(counts) + counts.sum()


@given(some_counts, st.integers(6, LONGEST))
def test_codewords_are_canonical(counts, limit):
    lengths = code_lengths(counts, limit)
    words = [
        format(code, f"0{length}b") if length else ""
        for code, length in zip(canonical_codes(lengths), lengths, strict=True)
    ]
    used = [symbol for symbol, word in enumerate(words) if word]
    assert canonical_order(lengths).tolist() == sorted(used, key=lambda symbol: (lengths[symbol], symbol))
    in_order = [words[symbol] for symbol in canonical_order(lengths)]
    assert [len(word) for word in words] == lengths.tolist()
    assert in_order == sorted(in_order)
    assert all(not later.startswith(earlier) for earlier, later in pairwise(in_order))
    if len(used) > 1:
        fractions = [Fraction(int(word, 2), 2 ** len(word)) for word in in_order]
        steps = np.cumsum([0] + [2 ** (LONGEST - len(word)) for word in in_order])
        assert fractions == [Fraction(int(step), 2**LONGEST) for step in steps[:-1]]


def test_the_example_of_rfc_1951():
    words = ["010", "011", "100", "101", "110", "00", "1110", "1111"]
    lengths = np.array([len(word) for word in words], np.uint8)
    assert canonical_codes(lengths).tolist() == [int(word, 2) for word in words]


@given(some_counts.filter(lambda counts: np.count_nonzero(counts) > 1))
def test_every_codeword_is_a_path_in_the_tree(counts):
    lengths = code_lengths(counts)
    tree = code_tree(lengths)
    assert tree.shape == (np.count_nonzero(counts) - 1, 2)
    inner = tree[tree >= 0]
    assert inner.tolist() == list(range(1, len(tree)))  # breadth first, each once
    for symbol in np.flatnonzero(lengths):
        node = 0
        for bit in format(canonical_codes(lengths)[symbol], f"0{lengths[symbol]}b"):
            assert node >= 0
            node = int(tree[node, int(bit)])
        assert ~node == symbol


def test_none_and_one():
    assert code_lengths(np.zeros(0, np.int64)).tolist() == []
    assert code_lengths(np.array([0, 0])).tolist() == [0, 0]
    assert code_lengths(np.array([0, 7, 0]), 1).tolist() == [0, 1, 0]
    assert coded_bits(np.array([0, 7]), np.array([0, 1])) == 7
    assert entropy_bits(np.array([0, 7])) == 0
    assert entropy_bits(np.array([4, 4, 8])) == 24
    assert entropy_bits(np.zeros(0, np.int64)) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: code_lengths(np.ones(5, np.int64), 2), "code_lengths: limit must be at least 3 for 5 symbols, got 2"),
        (lambda: code_lengths(np.ones(5, np.int64), 0), "code_lengths: limit must be between 1 and 24, got 0"),
        (lambda: code_lengths(np.ones(5, np.int64), 25), "code_lengths: limit must be between 1 and 24, got 25"),
        (lambda: code_lengths(np.array([1, -1])), "code_lengths: counts must be zero or positive, got -1"),
        (
            lambda: code_lengths(np.ones(2)),
            r"code_lengths: counts must be 1-D integers for 65,536 symbols at most, got float64 of shape \(2,\)",
        ),
        (lambda: code_lengths(np.ones((2, 2), np.int64)), "counts must be 1-D"),
        (lambda: code_lengths(np.ones(65_537, np.int64), 20), "counts must be 1-D"),
        (
            lambda: coded_bits(np.ones(2, np.int64), np.array([1, 0])),
            "coded_bits: lengths must be positive for symbols that occur, got 0",
        ),
        (
            lambda: coded_bits(np.ones(2, np.int64), np.array([1])),
            r"coded_bits: lengths must be 2 numbers, got shape \(1,\)",
        ),
        (lambda: entropy_bits(np.array([-1])), "entropy_bits: counts must be zero or positive"),
        (lambda: check_lengths("a", np.array([1, 1])), "a: lengths must be 1-D uint8"),
        (lambda: check_lengths("a", np.zeros(65_537, np.uint8)), "a: lengths must be 1-D uint8"),
        (lambda: check_lengths("a", np.array([1, 25], np.uint8)), "a: codewords must be at most 24 bits long, got 25"),
        (
            lambda: check_lengths("a", np.array([1, 2], np.uint8)),
            "a: lengths must be of a complete code, Kraft sum 1, got Kraft sum 0.75",
        ),
        (lambda: check_lengths("a", np.array([1, 1, 2], np.uint8)), "Kraft sum 1.25"),
        (lambda: check_lengths("a", np.array([2], np.uint8)), "Kraft sum 0.25"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
