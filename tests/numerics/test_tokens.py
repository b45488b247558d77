"""Tests of tokens against readers and writers that go code by code, and of their bytes against real coding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxshrink.numerics import tokens as tokens_module
from onnxshrink.numerics.code_lengths import code_lengths
from onnxshrink.numerics.huffman import encode
from onnxshrink.numerics.tokens import KINDS, MOST_TOKENS, Tokens, detokenise, forms, tokenise, total_bytes

small_codes = st.lists(
    st.one_of(st.just(3), st.lists(st.just(3), max_size=70), st.integers(0, 5), st.integers(0, 255)), max_size=40
).map(
    lambda parts: np.array([code for part in parts for code in (part if isinstance(part, list) else [part])], np.uint8)
)


def replay(tokens, count):
    """Returns what the tokens write, one after the other, as the module says."""
    written = [tokens.zero] * (count + 512)
    position = 0
    for token in tokens.tokens.tolist():
        for value, offset in zip(tokens.values[token].tolist(), tokens.offsets[token].tolist(), strict=True):
            written[position + offset] = value
        position += int(tokens.advance[token])
    return written[:count], position


def normals(count, deviation, seed=0):
    return np.clip(np.rint(np.random.default_rng(seed).normal(20, deviation, count)), 0, 255).astype(np.uint8)


@given(small_codes, st.sampled_from(KINDS), st.sampled_from([0, 3, 200]))
def test_tokens_give_the_codes_back(codes, kind, zero):
    tokens = tokenise(codes, kind, zero)
    assert (tokens.kind, tokens.zero) == (kind, zero)
    assert (tokens.tokens.dtype, tokens.advance.dtype) == (np.uint16, np.int32)
    assert (tokens.values.dtype, tokens.offsets.dtype) == (np.uint8, np.uint8)
    assert tokens.values.shape == tokens.offsets.shape == (tokens.advance.size, 2 if kind == "pair" else 1)
    assert np.all(tokens.offsets < tokens.advance[:, None])
    codes_again, end = replay(tokens, codes.size)
    assert codes_again == codes.tolist()
    assert end == codes.size + (kind == "pair" and codes.size % 2)
    decoded = detokenise(tokens.tokens, tokens, codes.size)
    assert decoded.dtype == np.uint8
    assert np.array_equal(decoded, codes)


def test_kinds_by_example(monkeypatch):
    monkeypatch.setattr(tokens_module, "_LONGEST_RUNS", (3,))
    codes = np.array([7, 0, 0, 0, 0, 9, 0], np.uint8)
    single, pair, runs = (tokenise(codes, kind, 0) for kind in KINDS)
    assert single.tokens.tolist() == codes.tolist()
    assert single.advance.size == 10
    assert [pair.values[token].tolist() for token in pair.tokens] == [[7, 0], [0, 0], [0, 9], [0, 0]]
    described = [(runs.offsets[token, 0], runs.values[token, 0], runs.advance[token]) for token in runs.tokens]
    assert described == [(0, 7, 1), (3, 0, 4), (0, 9, 1), (0, 0, 1)]
    assert (single.table_bytes, pair.table_bytes, runs.table_bytes) == (10, 9, 12)


@given(st.integers(0, 300), st.integers(0, 300))
def test_runs_of_any_length(before, after):
    codes = np.concatenate([np.full(before, 5, np.uint8), [1], np.full(after, 5, np.uint8)]).astype(np.uint8)
    tokens = tokenise(codes, "runs", 5)
    assert replay(tokens, codes.size)[0] == codes.tolist()


@pytest.mark.parametrize("piece", [2, 6, 64])
@pytest.mark.parametrize("deviation", [0.01, 0.2, 0.6, 3])
def test_pieces_leave_no_trace(monkeypatch, deviation, piece):
    codes = normals(1001, deviation)
    whole = [tokenise(codes, kind, 20) for kind in KINDS]
    monkeypatch.setattr(tokens_module, "_PIECE", piece)
    for kind, before in zip(KINDS, whole, strict=True):
        tokens = tokenise(codes, kind, 20)
        assert np.array_equal(tokens.tokens, before.tokens)
        assert np.array_equal(detokenise(tokens.tokens, tokens, codes.size), codes)


@pytest.mark.parametrize("deviation", [0.05, 0.3, 0.6, 5])
@pytest.mark.parametrize("lane_bytes", [16, 64])
def test_bytes_are_those_of_the_stream_up_to_lanes(deviation, lane_bytes):
    codes = normals(100_001, deviation)
    sizes = forms(codes, 20)
    assert list(sizes) == list(KINDS)
    for kind, size in sizes.items():
        tokens = tokenise(codes, kind, 20)
        assert total_bytes(tokens) == size
        lengths = code_lengths(np.bincount(tokens.tokens, minlength=tokens.advance.size))
        lanes = encode(tokens.tokens, lengths, lane_bytes)
        stream = size - tokens.table_bytes
        unused = len(lanes) * (int(lengths.max()) - 1) / 8 + lane_bytes
        assert stream <= lanes.nbytes <= stream + unused


def test_each_kind_has_its_codes():
    """Few dense codes want no tables, thirds want pairs, and mostly zeros runs."""
    cheapest = []
    thirds = np.random.default_rng(0).integers(20, 23, 50_000).astype(np.uint8)
    for codes in (normals(5000, 9), thirds, normals(50_000, 0.2)):
        sizes = forms(codes, 20)
        cheapest.append(min(sizes, key=sizes.get))
    assert cheapest == ["single", "pair", "runs"]


def test_too_many_tokens_are_not_offered():
    codes = np.random.default_rng(0).integers(0, 256, 100_000).astype(np.uint8)
    assert tokenise(codes, "pair", 0) is None
    assert "pair" not in forms(codes, 0)
    assert forms(codes, 0).keys() >= {"single", "runs"}
    firsts = np.arange(MOST_TOKENS + 1)
    for count in (MOST_TOKENS, MOST_TOKENS + 1):
        pairs = np.stack([firsts >> 6, firsts & 63], axis=1).astype(np.uint8)[:count].ravel()
        pairs[2 * MOST_TOKENS :] = 255
        assert (tokenise(pairs, "pair", 0) is None) == (count > MOST_TOKENS)


def test_no_codes():
    for kind in KINDS:
        tokens = tokenise(np.zeros(0, np.uint8), kind, 0)
        assert tokens.tokens.size == tokens.advance.size == total_bytes(tokens) == 0
        assert detokenise(tokens.tokens, tokens, 0).size == 0
    assert forms(np.zeros(0, np.uint8), 0) == dict.fromkeys(KINDS, 0)


def table() -> Tokens:
    tokens = tokenise(np.array([0, 0, 0, 1, 2], np.uint8), "runs", 0)
    assert tokens.advance.tolist() == [1, 4]
    return tokens


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tokenise(np.zeros(3), "pair", 0), r"tokenise: codes must be 1-D uint8, got float64 of shape \(3,\)"),
        (lambda: tokenise(np.zeros(3, np.uint8), "pair", 256), "tokenise: zero must be between 0 and 255, got 256"),
        (
            lambda: tokenise(np.zeros(3, np.uint8), "pairs", 0),
            "tokenise: kind must be one of single, pair, runs, got 'pairs'",
        ),
        (lambda: forms(np.zeros((1, 1), np.uint8), 0), "forms: codes must be 1-D"),
        (lambda: detokenise(np.array([2]), table(), 1), "detokenise: tokens must be below 2, got 2"),
        (lambda: detokenise(np.array([-1]), table(), 1), "detokenise: tokens must be below 2"),
        (
            lambda: detokenise(np.array([0, 1]), table(), 6),
            "detokenise: tokens must be just enough for 6 codes, got tokens for 5",
        ),
        (
            lambda: detokenise(np.array([1, 0]), table(), 4),
            "detokenise: tokens must be just enough for 4 codes, got tokens for 5",
        ),
        (
            lambda: detokenise(np.array([0]), table(), 0),
            "detokenise: tokens must be just enough for 0 codes, got tokens for 1",
        ),
        (
            lambda: detokenise(np.zeros(0, np.int64), table(), 1),
            "detokenise: tokens must be just enough for 1 codes, got tokens for 0",
        ),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
