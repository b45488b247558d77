"""Tests of the stopwatch, on a clock that only models move: no assertion depends on the machine."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Self

import numpy as np
import pytest
from onnx import parser

from onnxshrink import latency
from onnxshrink.errors import InputsError, OptionError, UnsupportedModelError, ValidationError
from onnxshrink.inputs import Feeds, Samples
from onnxshrink.latency import Spread, bench

MODEL = parser.parse_model('<ir_version: 8, opset_import: ["": 17]> g (float[N] x) => (float[N] y) { y = Neg(x) }')
SAMPLES = Samples(lambda index: {"x": np.full(index + 1, index, np.float32)}, range(2), "test")


class FakeClock:
    """A clock in seconds, and sessions that move it: "a" by 2 ms and 1 ms for the second sample, "b" by half of that."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []
        self.closed: list[str] = []

    def perf_counter(self) -> float:
        return self.now

    def session(self, model: str, threads: int, role: str) -> Any:
        self.calls.append(f"start {model} {threads} {role}")
        return FakeSession(self, model)


class FakeSession:
    def __init__(self, clock: FakeClock, model: str) -> None:
        self.clock, self.model = clock, model
        self.start_ms = {"a": 10.0, "b": 40.0}[model]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.clock.closed.append(self.model)

    def run(self, feeds: Feeds) -> dict[str, Any]:
        self.clock.calls.append(f"{self.model}{len(feeds['x'])}")
        self.clock.now += {"a": 0.002, "b": 0.001}[self.model] / len(feeds["x"])
        return {}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    fake = FakeClock()
    monkeypatch.setattr(latency, "time", fake)
    monkeypatch.setattr(latency, "session", fake.session)
    return fake


def test_models_take_turns_on_the_same_sample(clock: FakeClock) -> None:
    report = bench("a", "b", SAMPLES, seconds=0.008, warmup=1, threads=3)
    starts = [call for call in clock.calls if call.startswith("start")]
    first, second = "start a 3 original", "start b 3 candidate"
    assert starts == [first, second, second, first, first, second]
    assert clock.calls[len(starts) :] == ["a1", "b1", "a1", "b1", "b2", "a2", "a1", "b1", "b2", "a2"]
    assert (report.runs, report.threads) == (4, 3)
    assert clock.closed.count("a") == clock.closed.count("b") == 3


def test_medians_quartiles_and_ratios(clock: FakeClock) -> None:
    report = bench("a", "b", SAMPLES, seconds=0.02, warmup=0)
    a_ms = np.array([2.0, 1.0] * (report.runs // 2) + [2.0] * (report.runs % 2))
    assert dataclasses.astuple(report.a_ms) == pytest.approx((np.median(a_ms), *np.percentile(a_ms, (25, 75))))
    assert dataclasses.astuple(report.b_ms) == pytest.approx(np.array(dataclasses.astuple(report.a_ms)) / 2)
    assert dataclasses.astuple(report.ratio) == pytest.approx((0.5, 0.5, 0.5))
    assert (report.a_start_ms, report.b_start_ms) == (10.0, 40.0)
    json.dumps(dataclasses.asdict(report), allow_nan=False)


def test_three_runs_at_least(clock: FakeClock) -> None:
    assert bench("a", "b", SAMPLES, seconds=0).runs == 3


def test_real_models() -> None:
    report = bench(MODEL, MODEL.SerializeToString(), SAMPLES, seconds=0, warmup=1)
    assert report.runs == 3
    for spread in (report.a_ms, report.b_ms, report.ratio):
        assert isinstance(spread, Spread)
        assert 0 < spread.low <= spread.median <= spread.high
    assert report.a_start_ms > 0
    assert report.b_start_ms > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seconds": -1}, "bench: seconds must be at least 0, got -1"),
        ({"seconds": float("nan")}, "bench: seconds must be at least 0, got nan"),
        ({"warmup": -1}, "bench: warmup must be at least 0, got -1"),
        ({"threads": 0}, "bench: threads must be at least 1, got 0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        bench(MODEL, MODEL, SAMPLES, **options)
    assert str(caught.value) == message


def test_no_samples() -> None:
    with pytest.raises(InputsError, match=r"^test: number of samples must be at least 1, got 0$"):
        bench(MODEL, MODEL, SAMPLES[:0])


def test_models_that_do_not_load_are_named_by_their_place() -> None:
    with pytest.raises(UnsupportedModelError, match=r"^original model: "):
        bench(b"junk", MODEL, SAMPLES)
    with pytest.raises(ValidationError, match=r"^candidate model: "):
        bench(MODEL, b"junk", SAMPLES)
