"""Copies of samples with random rows: which inputs are varied, how, how often, and that they make layers fit what was not shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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
ROWS = {"ids": 50, "segments": 7, "positions": 90}


def model(kind: type[np.generic] = np.int64, rows: Mapping[str, int] = ROWS, shape: Sequence[int | str] = (1, "n")) -> onnx.ModelProto:
    """Returns a model that adds up what it looks up in one table for each input, and a number."""
    dtype = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    inputs = [oracle.tensor(name, shape, dtype) for name in rows]
    casts = [helper.make_node("Cast", [name], [f"{name}_wide"], to=TensorProto.INT64) for name in rows]
    looks = [helper.make_node("Gather", [f"{name}_table", f"{name}_wide"], [f"{name}_rows"]) for name in rows]
    total = helper.make_node("Sum", [*(f"{name}_rows" for name in rows), "x"], ["y"])
    tables = [oracle.value(f"{name}_table", np.ones((count, 2)), np.float32) for name, count in rows.items()]
    return oracle.make_model([*casts, *looks, total], [*inputs, oracle.tensor("x", [])], [oracle.tensor("y", None)], tables)


def variation(kind: type[np.generic] = np.int64, rows: Mapping[str, int] = ROWS, seed: int = 0) -> Variation:
    return Variation(load(model(kind, rows)), seed)


def sample(length: int, seed: int, kind: type[np.generic] = np.int64) -> dict[str, Array]:
    rng = np.random.default_rng([seed, 7])
    return {
        "ids": rng.integers(0, 5, (1, length)).astype(kind),  # of 50
        "segments": np.zeros((1, length), kind),
        "positions": np.arange(length)[None].astype(kind),
        "x": np.array(seed, np.float32),
    }


def samples(count: int, kind: type[np.generic] = np.int64, lengths: Sequence[int] = (20, 12, 33)) -> Samples:
    feeds = [sample(lengths[index % len(lengths)], index, kind) for index in range(count)]
    return Samples(feeds.__getitem__, range(count), "test")


def test_chooses_other_rows_and_keeps_the_rest() -> None:
    given = samples(9)
    copies = variation()(given)
    assert len(copies) == 4 * 9
    for number, copy in enumerate(copies):
        real = given[number % 9]
        assert list(copy) == list(real)
        for name in ("segments", "positions", "x"):  # the same wherever samples have them
            np.testing.assert_array_equal(copy[name], real[name])
        assert (copy["ids"].dtype, copy["ids"].shape) == (real["ids"].dtype, real["ids"].shape)
        assert copy["ids"].min() >= 0
        assert not copy["ids"].flags.writeable
    assert set(np.concatenate([copy["ids"].ravel() for copy in copies]).tolist()) == set(range(50))
    for index, real in enumerate(given):
        assert all(np.array_equal(real[name], sample((20, 12, 33)[index % 3], index)[name]) for name in real)


def test_copies_run() -> None:
    running = oracle.session(model())
    for copy in variation()(samples(3)):
        oracle.run(running, copy)


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int16, np.int32, np.int64, np.uint64])
@pytest.mark.parametrize("rows", [100, 128, 129, 256, 300])
def test_every_type_holds_the_rows_it_can(kind: type[np.generic], rows: int) -> None:
    copies = variation(kind, {"ids": rows})(samples(64, kind, (100,)))
    found = np.concatenate([copy["ids"].ravel() for copy in copies])
    assert found.dtype == kind
    assert (found.min(), found.max()) == (0, min(rows - 1, np.iinfo(kind).max))  # type: ignore[type-var]


@pytest.mark.parametrize("shape", [(), (1,), (2, 3, 2)])
def test_inputs_of_every_rank(shape: tuple[int, ...]) -> None:
    subject = Variation(load(model(rows={"ids": 30}, shape=shape)), 0)
    rng = np.random.default_rng(0)
    feeds = [{"ids": rng.integers(0, 30, shape), "x": np.zeros((), np.float32)} for _ in range(8)]
    copies = subject(Samples(feeds.__getitem__, range(8), "test"))
    assert len(copies) == 32
    assert all(isinstance(copy["ids"], np.ndarray) and copy["ids"].shape == shape for copy in copies)
    assert len({copy["ids"].tobytes() for copy in copies}) > 10


@pytest.mark.parametrize(
    ("count", "expected"), [(0, 0), (1, 0), (2, 8), (64, 256), (102, 408), (103, 409), (400, 112), (511, 1), (512, 0), (600, 0)]
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
    assert len(variation()(Samples(feeds.__getitem__, range(9), "test"))) == 0


@pytest.mark.parametrize(("differing", "expected"), [(0, 0), (5, 0), (6, 32), (10, 32)])
def test_it_takes_more_than_half_of_the_places_that_samples_share(differing: int, expected: int) -> None:
    feeds = [{**sample(10 + index, 0), "ids": np.zeros((1, 10 + index), np.int64)} for index in range(8)]
    feeds[5]["ids"][0, :differing] = 1
    feeds[3]["ids"][0, 10:] = 2  # where the shortest has nothing
    assert len(variation()(Samples(feeds.__getitem__, range(8), "test"))) == expected


def test_samples_without_a_place_in_common_show_nothing() -> None:
    assert len(variation()(samples(8, lengths=(0, 5)))) == 0


def test_copies_depend_on_the_seed_and_their_number_alone() -> None:
    def drawn(seed: int, order: Sequence[int], count: int = 4) -> dict[int, bytes]:
        copies = variation(seed=seed)(samples(count, lengths=(6,)))
        return {number: copies[number]["ids"].tobytes() for number in order}

    assert drawn(0, range(16)) == drawn(0, range(15, -1, -1))
    assert drawn(0, [3, 3, 9]).items() <= drawn(0, range(40), 10).items()
    assert len({*drawn(0, range(16)).values(), *drawn(1, range(16)).values()}) == 32


def test_the_note_says_what_was_looked_at() -> None:
    subject = variation()
    copies = subject(samples(8))
    assert subject.note == ""
    for number in (3, 5, 3):
        copies[number]
    assert subject.note == "calibration inputs are few: layers were fitted to 2 copies of them with random ids as well"
    feeds = [{**one, "segments": one["segments"] + index} for index, one in enumerate(samples(7))]
    subject(Samples(feeds.__getitem__, range(7), "test"))[0]
    assert subject.note == "calibration inputs are few: layers were fitted to 3 copies of them with random ids and segments as well"


def test_a_model_without_tables_has_no_copies() -> None:
    nodes = [helper.make_node("Neg", ["ids"], ["y"])]
    plain = oracle.make_model(nodes, [oracle.tensor("ids", [3], TensorProto.INT64)], [oracle.tensor("y", [3], TensorProto.INT64)])
    subject = Variation(load(plain), 0)
    feeds = [{"ids": np.arange(3) * index} for index in range(9)]
    assert len(subject(Samples(feeds.__getitem__, range(9), "test"))) == 0
    assert subject.note == ""


class TestWhatItIsFor:
    """An embedding and two layers that are fitted to some sentences of a few words, and judged by words that are not among them."""

    VOCABULARY, WIDTH, KNOWN = 500, 32, 30

    def build(self, seed: int) -> onnx.ModelProto:
        rng = np.random.default_rng([seed, 1])
        table = rng.standard_normal((self.VOCABULARY, self.WIDTH)) * np.linspace(2, 0.1, self.WIDTH)
        nodes = [
            helper.make_node("Gather", ["table", "ids"], ["e"]),
            helper.make_node("MatMul", ["e", "w1"], ["h"]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("MatMul", ["r", "w2"], ["y"]),
        ]
        weights = [
            oracle.value("table", table, np.float32),
            oracle.value("w1", rng.standard_normal((self.WIDTH, 64)) / self.WIDTH**0.5, np.float32),
            oracle.value("w2", rng.standard_normal((64, 16)) / 8, np.float32),
        ]
        ids, output = oracle.tensor("ids", ["n"], TensorProto.INT64), oracle.tensor("y", ["n", 16])
        return oracle.make_model(nodes, [ids], [output], weights)

    def error(self, subject: Pass, seed: int) -> float:
        """Returns the relative error of a compressed model on words that no calibration sample has, in dB."""
        original, rng = self.build(seed), np.random.default_rng([seed, 2])
        feeds = [{"ids": rng.integers(0, self.KNOWN, 12)} for _ in range(24)]
        small = compress(original, [Step(subject, (Rule("table", skip=True),))], calibration=feeds).to_model()
        others = {"ids": np.arange(self.KNOWN, self.VOCABULARY)}
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


class _Nothing:
    note = ""

    def __call__(self, data: Samples) -> Samples:
        return data[:0]
