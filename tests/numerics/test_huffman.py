"""Tests of Huffman coding in lanes against a coder of bit strings, and of what damaged streams do."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxshrink.numerics import huffman as huffman_module
from onnxshrink.numerics import lane_decoders
from onnxshrink.numerics.code_lengths import LONGEST, canonical_codes
from onnxshrink.numerics.huffman import code_lengths, coded_bits, decode, emitted, encode, entropy_bits

PROBABILITIES = {"even": 1.0, "skewed": 0.6, "very skewed": 0.03}


@pytest.fixture(params=["machine", "windows"])
def every_decoder(request, monkeypatch):
    if request.param == "windows":
        monkeypatch.setattr(lane_decoders, "_MOST_STATES", 0)
        monkeypatch.setattr(lane_decoders, "_TABLE_BITS", 5)  # so that there are long codewords


@st.composite
def sequences(draw):
    """Draws symbols of an alphabet, a limit for its codewords, and bytes of a lane that such a codeword fits in."""
    alphabet = draw(st.sampled_from([1, 2, 3, 7, 256, 300, 65_536]))
    few = draw(st.lists(st.integers(0, alphabet - 1), min_size=1, max_size=draw(st.sampled_from([1, 2, 9, 40]))))
    symbols = draw(st.lists(st.sampled_from(few), max_size=200))
    limit = draw(st.integers(6, LONGEST))
    lane_bytes = draw(st.one_of(st.integers((limit + 7) // 8, 9), st.sampled_from([16, 64])))
    return np.array(symbols, np.uint8 if alphabet <= 256 else np.uint16), alphabet, limit, lane_bytes


def coded(sequence):
    symbols, alphabet, limit, lane_bytes = sequence
    lengths = code_lengths(np.bincount(symbols, minlength=alphabet), limit)
    return encode(symbols, lengths, lane_bytes), lengths


def lanes_of_strings(symbols, lengths, lane_bytes):
    """Returns the lanes as lists of bytes, written as the format says."""
    codes = canonical_codes(lengths)
    words = [format(codes[symbol], f"0{lengths[symbol]}b") for symbol in symbols.tolist()]
    lanes, lane = [], ""
    for word in words:
        if len(lane) + len(word) > 8 * lane_bytes:
            lanes.append((lane + word)[: 8 * lane_bytes])
            lane = ""
        lane += word
    if words:
        lanes.append(lane.ljust(8 * lane_bytes, "0"))
    return [[int(lane[at : at + 8], 2) for at in range(0, len(lane), 8)] for lane in lanes]


def symbols_of_strings(lanes, lengths):
    """Returns all symbols that the bits of each lane decode to."""
    codes = canonical_codes(lengths)
    by_word = {format(codes[symbol], f"0{lengths[symbol]}b"): int(symbol) for symbol in np.flatnonzero(lengths)}
    found = []
    for lane in lanes:
        word = ""
        for bit in np.unpackbits(lane):
            word += str(bit)
            if word in by_word:
                found.append(by_word[word])
                word = ""
    return found


def geometric(alphabet, count, ratio, seed=0):
    """Returns random symbols, each probability `ratio` times the last one."""
    probabilities = np.maximum(ratio ** np.arange(alphabet, dtype=np.float64), 1e-9)
    symbols = np.random.default_rng(seed).choice(alphabet, count, p=probabilities / probabilities.sum())
    return symbols.astype(np.uint8 if alphabet <= 256 else np.uint16)


@given(sequences())
def test_lanes_are_what_the_format_says(sequence):
    lanes, lengths = coded(sequence)
    symbols, _, _, lane_bytes = sequence
    assert (lanes.dtype, lanes.shape[1]) == (np.uint8, lane_bytes)
    assert lanes.tolist() == lanes_of_strings(symbols, lengths, lane_bytes)


@pytest.mark.usefixtures("every_decoder")
class TestEveryDecoder:
    @given(sequences())
    def test_decoding_inverts_encoding(self, sequence):
        lanes, lengths = coded(sequence)
        symbols = sequence[0]
        lanes.flags.writeable = False
        decoded = decode(lanes, lengths, symbols.size)
        assert decoded.dtype == (np.uint8 if lengths.size <= 256 else np.uint16)
        assert np.array_equal(decoded, symbols)

    @given(sequences())
    def test_a_decoder_that_is_not_told_the_number_finds_as_many_as_said(self, sequence):
        lanes, lengths = coded(sequence)
        symbols = sequence[0].tolist()
        found = symbols_of_strings(lanes, lengths)
        assert emitted(lanes, lengths) == len(found)
        first = [symbol for symbol, length in enumerate(lengths) if length and length == lengths[lengths > 0].min()][:1]
        assert found == symbols + first * (len(found) - len(symbols))

    @given(sequences(), st.data())
    def test_what_damaged_lanes_decode_to_encodes_to_them(self, sequence, data):
        """So every bit that `encode` would not write is noticed, and no other."""
        lanes, lengths = coded(sequence)
        count = sequence[0].size
        for _ in range(data.draw(st.integers(0, 3))):
            if lanes.size:
                lanes.reshape(-1)[data.draw(st.integers(0, lanes.size - 1))] ^= data.draw(st.integers(1, 255))
        lanes = lanes[data.draw(st.integers(0, 1)) : len(lanes) - data.draw(st.integers(0, 1))]
        if data.draw(st.booleans()):
            lanes = np.concatenate([lanes, data.draw(st.sampled_from([lanes[:1], np.zeros_like(lanes[:1])]))])
        count += data.draw(st.sampled_from([-1, 0, 0, 1, 10**15]))
        try:
            symbols = decode(lanes, lengths, count)
        except ValueError as error:
            assert str(error).startswith("decode: ")
            return
        assert symbols.size == count
        assert np.array_equal(encode(symbols, lengths, lanes.shape[1]), lanes)

    @pytest.mark.parametrize("lane_bytes", [3, 61, 1000])
    def test_random_bytes_end_with_an_error_or_with_symbols(self, lane_bytes):
        lengths = code_lengths((1 + 1e6 * 0.8 ** np.arange(100)).astype(np.int64))
        lanes = np.random.default_rng(0).integers(0, 256, (50, lane_bytes), np.uint8)
        found = emitted(lanes, lengths)
        assert found == len(symbols_of_strings(lanes, lengths))
        for count in (0, 1, found - 1, found, found + 1, 8 * lanes.size, -1):
            with pytest.raises(ValueError, match="decode: "):
                decode(lanes, lengths, count)

    def test_pieces_and_blocks_leave_no_trace(self, monkeypatch):
        symbols = geometric(40, 30_000, 0.8)
        lengths = code_lengths(np.bincount(symbols, minlength=40))
        lanes = encode(symbols, lengths, 7)
        for name, size in (("_PIECE", 999), ("_BLOCK", 4000), ("_FEWEST_LANES", 1)):
            monkeypatch.setattr(huffman_module, name, size)
        assert np.array_equal(encode(symbols, lengths, 7), lanes)
        assert np.array_equal(decode(lanes, lengths, symbols.size), symbols)
        lanes[500, -1] ^= 1
        with pytest.raises(ValueError, match="decode: "):
            decode(lanes, lengths, symbols.size)


@pytest.mark.parametrize("ratio", PROBABILITIES.values(), ids=PROBABILITIES)
@pytest.mark.parametrize("alphabet", [1, 2, 3, 40, 256, 1500, 65_536])
@pytest.mark.parametrize("lane_bytes", [4, 64])
def test_sizes_are_those_of_the_codewords(alphabet, ratio, lane_bytes):
    symbols = geometric(alphabet, 200_000, ratio)
    counts = np.bincount(symbols, minlength=alphabet)
    lengths = code_lengths(counts, LONGEST)
    lanes, bits = encode(symbols, lengths, lane_bytes), coded_bits(counts, lengths)
    assert bits == int(lengths.astype(np.int64)[symbols].sum())
    assert bits <= entropy_bits(counts) + symbols.size
    longest = int(lengths.max())
    fewest = -(-bits // (8 * lane_bytes))
    assert fewest <= len(lanes) <= -(-bits // (8 * lane_bytes - longest + 1))
    assert np.array_equal(decode(lanes, lengths, symbols.size), symbols)


def test_layout_and_mutability_of_the_input_do_not_matter():
    symbols = geometric(9, 5000, 0.7)
    lengths = code_lengths(np.bincount(symbols, minlength=9))
    lanes = encode(symbols, lengths, 16)
    spread = np.repeat(symbols, 3)[::3]
    spread.flags.writeable = False
    assert np.array_equal(encode(spread, lengths, 16), lanes)
    assert np.array_equal(decode(np.asfortranarray(lanes), lengths, 5000), symbols)
    assert np.array_equal(encode(symbols.astype(np.uint16), lengths, 16), lanes)


def test_memory_is_that_of_input_and_output():
    symbols = geometric(40, 1 << 23, 0.8)
    lengths = code_lengths(np.bincount(symbols, minlength=40))
    tracemalloc.start()
    lanes = encode(symbols, lengths, 64)
    encoding = tracemalloc.get_traced_memory()[1] - 1.05 * lanes.nbytes
    tracemalloc.reset_peak()
    decoding = -tracemalloc.get_traced_memory()[0]
    decode(lanes, lengths, symbols.size)
    decoding += tracemalloc.get_traced_memory()[1] - symbols.nbytes
    tracemalloc.stop()
    assert max(encoding, decoding) < 1 << 25


HALVES = np.array([1, 1], np.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: encode(np.array([2], np.uint8), HALVES, 1),
            "encode: symbols must be such that have a codeword, got 2",
        ),
        (
            lambda: encode(np.array([0, 1], np.uint8), np.array([1, 0], np.uint8), 1),
            "encode: symbols must be such that have a codeword, got 1",
        ),
        (
            lambda: encode(np.array([0], np.uint8), np.zeros(0, np.uint8), 1),
            "encode: symbols must be such that have a codeword, got 0",
        ),
        (
            lambda: encode(np.array([0]), HALVES, 1),
            r"encode: symbols must be 1-D uint8 or uint16, got int64 of shape \(1,\)",
        ),
        (lambda: encode(np.zeros((1, 1), np.uint8), HALVES, 1), "encode: symbols must be 1-D"),
        (lambda: encode(np.zeros(1, np.uint8), HALVES[:0].astype(np.int64), 1), "encode: lengths must be 1-D uint8"),
        (
            lambda: encode(np.zeros(1, np.uint8), np.array([1, 2], np.uint8), 1),
            "encode: lengths must be of a complete code",
        ),
        (
            lambda: encode(np.zeros(1, np.uint8), HALVES, 0),
            "encode: lane_bytes must be 1 to 65536 for these codewords, got 0",
        ),
        (
            lambda: encode(np.zeros(1, np.uint8), HALVES, 65_537),
            "encode: lane_bytes must be 1 to 65536 for these codewords, got 65537",
        ),
        (
            lambda: encode(np.zeros(1, np.uint8), code_lengths(2 ** np.arange(10)), 1),
            "encode: lane_bytes must be 2 to 65536",
        ),
        (
            lambda: decode(np.zeros((1, 1), np.uint8), np.array([1, 2], np.uint8), 1),
            "decode: lengths must be of a complete code",
        ),
        (
            lambda: decode(np.zeros((1, 1), np.uint8), np.zeros(3, np.uint8), 0),
            "decode: lanes must be none, as no symbol has a codeword, got 1",
        ),
        (lambda: decode(np.zeros(1, np.uint8), HALVES, 1), "decode: lanes must be 2-D uint8"),
        (lambda: decode(np.zeros((1, 1)), HALVES, 1), "decode: lanes must be 2-D uint8, got float64"),
        (lambda: decode(np.zeros((1, 0), np.uint8), HALVES, 1), "decode: lane_bytes must be 1 to"),
        (
            lambda: decode(np.zeros((1, 1), np.uint8), HALVES, -1),
            "decode: count must be 0 to 8 with so many lanes, got -1",
        ),
        (
            lambda: decode(np.zeros((1, 1), np.uint8), HALVES, 9),
            "decode: count must be 0 to 8 with so many lanes, got 9",
        ),
        (
            lambda: decode(np.zeros((1, 1), np.uint8), HALVES, 0),
            "decode: lanes must be no more than 0 symbols need, got 1",
        ),
        (
            lambda: decode(np.zeros((2, 1), np.uint8), HALVES, 8),
            "decode: lanes must be no more than 8 symbols need, got 2",
        ),
        (lambda: decode(np.array([[1]], np.uint8), HALVES, 7), "decode: bits after the last symbol must be 0, got 1"),
        (
            lambda: decode(np.array([[3]], np.uint8), np.array([1, 2, 2], np.uint8), 8),
            "decode: lanes must be long enough for 8 symbols, got only 7",
        ),
        (
            lambda: decode(np.array([[1], [0]], np.uint8), np.array([1, 2, 2], np.uint8), 8),
            "decode: spare bits of a lane must be the first of the next lane, got others",
        ),
        (
            lambda: decode(np.array([[1]], np.uint8), np.array([0, 1], np.uint8), 2),
            "decode: bits must be 0 in a code of one symbol, got 1",
        ),
        (lambda: emitted(np.zeros(1, np.uint8), HALVES), "emitted: lanes must be 2-D uint8"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
