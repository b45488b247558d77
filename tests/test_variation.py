"""Copies of samples with random rows: which inputs are varied, how, how often, and that they make layers fit what was not shown.

Samples are of words as texts are: by Zipf's law, so that every one has some that others lack.
"""

from __future__ import annotations

import tracemalloc
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxshrink import api
from onnxshrink.api import compress
from onnxshrink.contract import Pass, Rule, Step
from onnxshrink.graph.files import load
from onnxshrink.inputs import Feeds, Samples
from onnxshrink.passes.low_rank import LowRank
from onnxshrink.passes.sparsify import Sparsify
from onnxshrink.variation import Variation
from tests import oracle

Array = np.ndarray[Any, np.dtype[Any]]
ROWS = {"ids": 400, "segments": 7, "positions": 90}
COLUMNS = 16
WORDS, USED = 1000, 300  # of a table of which some are never used


def zipf(rng: np.random.Generator, rows: int, shape: int | tuple[int, ...]) -> Array:
    """Returns numbers from 1 up to below ``rows``, one as likely as its logarithm is far from the next: about 1 / number."""
    drawn: Array = (rows ** rng.random(shape)).astype(np.int64)
    return drawn


def model(kind: type[np.generic] = np.int64, rows: Mapping[str, int] = ROWS, shape: Sequence[int | str] = (1, "n")) -> onnx.ModelProto:
    """Returns a model that adds up what it looks up in one table for each input, of normal rows, and a number."""
    rng = np.random.default_rng(5)
    dtype = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    inputs = [oracle.tensor(name, shape, dtype) for name in rows]
    casts = [helper.make_node("Cast", [name], [f"{name}_wide"], to=TensorProto.INT64) for name in rows]
    looks = [helper.make_node("Gather", [f"{name}_table", f"{name}_wide"], [f"{name}_rows"]) for name in rows]
    total = helper.make_node("Sum", [*(f"{name}_rows" for name in rows), "x"], ["y"])
    tables = [oracle.value(f"{name}_table", rng.standard_normal((count, COLUMNS)), np.float32) for name, count in rows.items()]
    return oracle.make_model([*casts, *looks, total], [*inputs, oracle.tensor("x", [])], [oracle.tensor("y", None)], tables)


def variation(kind: type[np.generic] = np.int64, rows: Mapping[str, int] = ROWS, seed: int = 0) -> Variation:
    return Variation(load(model(kind, rows)), seed)


def sample(length: int, seed: int, kind: type[np.generic] = np.int64) -> dict[str, Array]:
    rng = np.random.default_rng([seed, 7])
    return {
        "ids": zipf(rng, ROWS["ids"], (1, length)).astype(kind),
        "segments": np.zeros((1, length), kind),
        "positions": np.arange(length)[None].astype(kind),
        "x": np.array(seed, np.float32),
    }


def samples(count: int, kind: type[np.generic] = np.int64, lengths: Sequence[int] = (20, 12, 33)) -> Samples:
    feeds = [sample(lengths[index % len(lengths)], index, kind) for index in range(count)]
    return given(feeds)


def given(feeds: Sequence[Feeds]) -> Samples:
    return Samples(feeds.__getitem__, range(len(feeds)), "test")


def test_chooses_other_rows_and_keeps_the_rest() -> None:
    originals = samples(9, lengths=(160, 144, 180))
    copies = variation()(originals)
    assert len(copies) == 2 * 9
    for number, copy in enumerate(copies):
        real = originals[number % 9]
        assert list(copy) == list(real)
        for name in ("segments", "positions", "x"):  # the same wherever samples have them
            np.testing.assert_array_equal(copy[name], real[name])
        assert (copy["ids"].dtype, copy["ids"].shape) == (real["ids"].dtype, real["ids"].shape)
        assert copy["ids"].min() >= 0
        assert not copy["ids"].flags.writeable
    assert set(np.concatenate([copy["ids"].ravel() for copy in copies]).tolist()) == set(range(ROWS["ids"]))
    for index, real in enumerate(originals):
        assert all(np.array_equal(real[name], sample((160, 144, 180)[index % 3], index)[name]) for name in real)


def test_copies_run() -> None:
    running = oracle.session(model())
    for copy in variation()(samples(3)):
        oracle.run(running, copy)


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int16, np.int32, np.int64, np.uint64])
@pytest.mark.parametrize("rows", [100, 128, 129, 256, 300])
def test_every_type_holds_the_rows_it_can(kind: type[np.generic], rows: int) -> None:
    rng = np.random.default_rng(rows)
    most = min(rows, np.iinfo(kind).max + 1)  # type: ignore[type-var]
    feeds = [{"ids": np.resize(rng.integers(0, most, 3), (1, 100)).astype(kind)} for _ in range(40)]  # of three words each
    copies = variation(kind, {"ids": rows})(given(feeds))
    found = np.concatenate([copy["ids"].ravel() for copy in copies])
    assert found.dtype == kind
    assert (found.min(), found.max()) == (0, most - 1)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3, 2)])
def test_inputs_of_every_rank(shape: tuple[int, ...]) -> None:
    subject = Variation(load(model(rows={"ids": 1000}, shape=shape)), 0)
    rng = np.random.default_rng(0)
    feeds = [{"ids": np.asarray(rng.integers(0, 1000, shape)), "x": np.zeros((), np.float32)} for _ in range(60)]
    copies = subject(given(feeds))
    assert len(copies) == 120
    assert all(isinstance(copy["ids"], np.ndarray) and copy["ids"].shape == shape for copy in copies)
    assert len({copy["ids"].tobytes() for copy in copies}) > 100


@pytest.mark.parametrize(
    ("count", "expected"), [(0, 0), (1, 0), (2, 4), (64, 128), (170, 340), (171, 341), (400, 112), (511, 1), (512, 0), (600, 0)]
)
def test_there_are_as_many_as_it_takes(count: int, expected: int) -> None:
    subject = variation()
    copies = subject(samples(count))
    assert len(copies) == expected
    assert "copies of test" in repr(copies)


def test_enough_samples_are_not_read() -> None:
    def load_none(index: int) -> Feeds:
        raise AssertionError(f"sample {index} is read")

    assert len(variation()(Samples(load_none, range(512), "test"))) == 0


def test_inputs_that_are_the_same_in_all_samples_stay() -> None:
    feeds = [sample(10, 0)] * 9
    assert len(variation()(given(feeds))) == 0


@pytest.mark.parametrize(("differing", "expected"), [(0, 0), (5, 0), (6, 16), (10, 16)])
def test_it_takes_more_than_half_of_the_places_that_samples_share(differing: int, expected: int) -> None:
    rng = np.random.default_rng(0)
    own = [rng.integers(2, ROWS["ids"], 6 * index) for index in range(8)]  # where the shortest has nothing
    feeds = [{"ids": np.concatenate([np.zeros(10, np.int64), words])[None]} for words in own]
    feeds[5]["ids"][0, :differing] = 1
    assert len(variation(rows={"ids": ROWS["ids"]})(given(feeds))) == expected


def test_samples_without_a_place_in_common_show_nothing() -> None:
    assert len(variation()(samples(8, lengths=(0, 50)))) == 0


def test_copies_depend_on_the_seed_and_their_number_alone() -> None:
    def drawn(seed: int, order: Sequence[int], count: int = 4) -> dict[int, bytes]:
        copies = variation(seed=seed)(samples(count, lengths=(30,)))
        return {number: copies[number]["ids"].tobytes() for number in order}

    assert drawn(0, range(8)) == drawn(0, range(7, -1, -1))
    assert drawn(0, [3, 3, 7]).items() <= drawn(0, range(20), 10).items()
    assert len({*drawn(0, range(8)).values(), *drawn(1, range(8)).values()}) == 16


def test_the_note_says_what_was_looked_at() -> None:
    subject = variation(rows={**ROWS, "segments": 300})
    copies = subject(samples(8))
    assert subject.note == ""
    for number in (3, 5, 3):
        copies[number]
    assert subject.note == "calibration inputs are few: layers were also shown 2 copies of them with random ids"
    rng = np.random.default_rng(0)
    subject(given([{**one, "segments": zipf(rng, 300, one["ids"].shape)} for one in samples(7)]))[0]
    assert subject.note == "calibration inputs are few: layers were also shown 3 copies of them with random ids and segments"


def test_a_model_without_tables_has_no_copies() -> None:
    nodes = [helper.make_node("Neg", ["ids"], ["y"])]
    plain = oracle.make_model(nodes, [oracle.tensor("ids", [3], TensorProto.INT64)], [oracle.tensor("y", [3], TensorProto.INT64)])
    subject = Variation(load(plain), 0)
    feeds = [{"ids": np.arange(3) * index} for index in range(9)]
    assert len(subject(given(feeds))) == 0
    assert subject.note == ""


def looker(table: Array) -> onnx.ModelProto:
    """Returns a model that looks rows up."""
    nodes = [helper.make_node("Gather", ["table", "ids"], ["y"])]
    return oracle.make_model(nodes, [oracle.tensor("ids", ["n"], TensorProto.INT64)], [oracle.tensor("y", None)], [oracle.value("table", table)])


def copies_of(table: Array, ids: Sequence[Any]) -> int:
    """Returns how many copies of samples of such a model are made, and fails at any warning."""
    subject = Variation(load(looker(table)), 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return len(subject(given([{"ids": np.asarray(one, np.int64)} for one in ids])))


def of_another_kind(scale: float, seed: int = 0) -> Array:
    """Returns a table whose first rows lie near 16 of 64 dimensions, and the others, so many times as large, in all."""
    rng = np.random.default_rng([seed, 3])
    used = rng.standard_normal((USED, 16)) @ rng.standard_normal((16, 64)) / 4 + 0.02 * rng.standard_normal((USED, 64))
    table: Array = np.concatenate([used, scale * rng.standard_normal((WORDS - USED, 64))]).astype(np.float32)
    return table


class TestWhetherRandomRowsTell:
    """Of words that are new in every third sample, by all others."""

    NORMAL: ClassVar[Array] = np.random.default_rng(0).standard_normal((400, COLUMNS)).astype(np.float32)

    @staticmethod
    def ids(rows: int = 400, seed: int = 0) -> list[Array]:
        rng = np.random.default_rng(seed)
        return [zipf(rng, rows, 20) for _ in range(12)]

    @pytest.mark.parametrize("seed", range(10))
    def test_of_those_of_the_same_kind(self, seed: int) -> None:
        assert copies_of(self.NORMAL, self.ids(seed=seed)) == 24

    @pytest.mark.parametrize("scale", [1, 3, 30])
    @pytest.mark.parametrize("seed", range(5))
    def test_not_of_those_of_another_kind(self, scale: float, seed: int) -> None:
        assert copies_of(of_another_kind(scale, seed), self.ids(USED, seed)) == 0

    @pytest.mark.parametrize(("new", "expected"), [(0, 0), (7, 0), (8, 24), (20, 24)])
    def test_not_where_samples_hold_nearly_all_their_words(self, new: int, expected: int) -> None:
        rng = np.random.default_rng(0)
        ids = [rng.permutation(20) for _ in range(12)]
        for words in ids[1:3]:
            words[:] = np.arange(20)  # others have them all
        ids[6][:new] = np.arange(100, 100 + new)
        ids[7] = np.arange(200, 220)  # not asked
        assert copies_of(self.NORMAL, ids) == expected

    def test_samples_of_few_words_show_them_all(self) -> None:
        rng = np.random.default_rng(0)
        assert copies_of(self.NORMAL, [rng.integers(0, 30, 20) for _ in range(30)]) == 0

    def test_negative_numbers_count_from_the_end(self) -> None:
        rng = np.random.default_rng(0)
        ids = [rng.permutation(20) for _ in range(12)]
        ids[1] = np.arange(20)  # every word but seven of the seventh
        ids[6][:7] = np.arange(100, 107)
        ids[6][7] -= 400  # the same by another name
        assert copies_of(self.NORMAL, ids) == 0
        ids[6][7] += 200
        assert copies_of(self.NORMAL, ids) == 24
        back = [words - 400 for words in self.ids()]
        assert copies_of(self.NORMAL, back) == 24
        assert copies_of(of_another_kind(3), [words - WORDS for words in self.ids(USED)]) == 0

    @pytest.mark.parametrize("seed", [0, 1])
    def test_of_some_rows_of_a_table_that_is_long_and_some_columns_of_one_that_is_wide(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        assert copies_of(rng.standard_normal((9000, 4)).astype(np.float32), self.ids(9000, seed)) == 24
        assert copies_of(rng.standard_normal((400, 1500)).astype(np.float32), self.ids(400, seed)) == 24

    @pytest.mark.parametrize("value", [1, -3.5, 1e-7, 6e4])
    @pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
    def test_rows_that_are_all_the_same_break_nothing(self, value: float, kind: type[np.generic]) -> None:
        assert copies_of(np.full((400, COLUMNS), value, kind), self.ids()) in (0, 24)

    def test_rows_of_zeros(self) -> None:
        some = self.NORMAL.copy()
        some[300:] = 0
        assert copies_of(np.zeros_like(some), self.ids()) == 0
        assert copies_of(some[::-1], self.ids(100)) == 0  # all that are used are
        some[300:390] = self.NORMAL[300:390]
        assert copies_of(some, self.ids(300)) == 24  # some that nobody uses are
        assert copies_of(np.zeros((400, 0), np.float32), self.ids()) == 0

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
    @pytest.mark.parametrize("where", [slice(None), slice(1, 9), slice(390, 400), slice(100, None, 7)], ids=str)
    def test_rows_without_moments_tell_nothing(self, value: float, where: slice) -> None:
        table = self.NORMAL.astype(np.float64)
        table[where, 3] = value
        assert copies_of(table, self.ids()) == 0

    def test_what_is_no_real_number_tells_nothing(self) -> None:
        assert copies_of(np.array([f"word {index}" for index in range(400)], object), self.ids()) == 0
        assert copies_of(self.NORMAL.astype(np.complex64), self.ids()) == 0

    @pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int32, bool])
    def test_rows_of_integers_and_flags(self, kind: type[np.generic]) -> None:
        assert copies_of((self.NORMAL > 0).astype(kind), self.ids()) == 24

    def test_words_of_two_tables_are_judged_by_both(self) -> None:
        def of(*tables: Array) -> int:
            nodes = [helper.make_node("Gather", [f"t{at}", "ids"], [f"y{at}"]) for at in range(len(tables))]
            values = [oracle.value(f"t{at}", table) for at, table in enumerate(tables)]
            outputs = [oracle.tensor(f"y{at}", None) for at in range(len(tables))]
            both = oracle.make_model(nodes, [oracle.tensor("ids", ["n"], TensorProto.INT64)], outputs, values)
            return len(Variation(load(both), 0)(given([{"ids": one} for one in self.ids(USED)])))

        assert (of(self.NORMAL), of(self.NORMAL, self.NORMAL[::-1])) == (24, 24)
        assert (of(of_another_kind(3)), of(self.NORMAL, of_another_kind(3)), of(of_another_kind(3), self.NORMAL)) == (0, 0, 0)

    def test_a_word_that_is_there_a_million_times_is_looked_up_once(self) -> None:
        """Its rows as often would be 300 MB."""
        wide = np.random.default_rng(0).standard_normal((400, 50)).astype(np.float32)
        ids = [np.tile(words, 5000) for words in self.ids()]
        tracemalloc.start()
        try:
            assert copies_of(wide, ids) == 24
            assert tracemalloc.get_traced_memory()[1] < 60e6
        finally:
            tracemalloc.stop()


class TestWhatItIsFor:
    """An embedding and two layers that are fitted to some sentences, and judged by words that are not in them."""

    WIDTH = 32

    @staticmethod
    def build(table: Array, seed: int) -> onnx.ModelProto:
        rng, width = np.random.default_rng([seed, 1]), table.shape[1]
        nodes = [
            helper.make_node("Gather", ["table", "ids"], ["e"]),
            helper.make_node("MatMul", ["e", "w1"], ["h"]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("MatMul", ["r", "w2"], ["y"]),
        ]
        weights = [
            oracle.value("table", table, np.float32),
            oracle.value("w1", rng.standard_normal((width, 64)) / width**0.5, np.float32),
            oracle.value("w2", rng.standard_normal((64, 16)) / 8, np.float32),
        ]
        ids, output = oracle.tensor("ids", ["n"], TensorProto.INT64), oracle.tensor("y", ["n", 16])
        return oracle.make_model(nodes, [ids], [output], weights)

    def error(self, subject: Pass, seed: int) -> float:
        """Returns the relative error of a compressed model on words that no calibration sample has, in dB."""
        rng = np.random.default_rng([seed, 2])
        original = self.build(rng.standard_normal((500, self.WIDTH)) * np.linspace(2, 0.1, self.WIDTH), seed)
        feeds = [{"ids": zipf(rng, 500, 12)} for _ in range(12)]
        small = compress(original, [Step(subject, (Rule("table", skip=True),))], calibration=feeds).to_model()
        others = {"ids": np.setdiff1d(np.arange(500), np.concatenate([one["ids"] for one in feeds]))}
        (before,), (after,) = (oracle.run(oracle.session(one), others) for one in (original, small))
        return float(20 * np.log10(np.linalg.norm(after - before) / np.linalg.norm(before)))

    @pytest.mark.parametrize("subject", [Sparsify(sparsity=0.6, scope="layer", pack=False), LowRank(params=0.6)], ids=["sparsify", "low-rank"])
    def test_the_error_on_words_that_were_not_shown_is_smaller(self, subject: Pass, monkeypatch: pytest.MonkeyPatch) -> None:
        varied = [self.error(subject, seed) for seed in range(3)]
        monkeypatch.setattr(api, "Variation", lambda graph, seed: _Nothing())
        plain = [self.error(subject, seed) for seed in range(3)]
        gains = np.subtract(plain, varied)
        assert gains.min() > 0
        assert gains.mean() > 1

    @pytest.mark.parametrize("scale", [1, 3, 30])
    def test_rows_of_another_kind_that_nobody_chooses_change_nothing(self, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
        original, rng = self.build(of_another_kind(scale), 0), np.random.default_rng(0)
        feeds = [{"ids": zipf(rng, USED, 12)} for _ in range(24)]

        def found() -> tuple[bytes, list[str]]:
            result = compress(original, [LowRank(params=0.5)], calibration=feeds)
            return result.to_model().SerializeToString(deterministic=True), [note for note in result.report.notes if "copies" in note]

        varied = found()
        assert varied[0] != original.SerializeToString(deterministic=True)
        monkeypatch.setattr(api, "Variation", lambda graph, seed: _Nothing())
        assert varied == found()
        assert varied[1] == []


class _Nothing:
    note = ""

    def __call__(self, data: Samples) -> Samples:
        return data[:0]
