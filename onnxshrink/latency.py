"""How fast two models are, measured side by side.

The models take turns, A B then B A, on the same samples, so that a clock that slows down or a busy neighbour hits
both. Medians and interquartile ranges are reported; the ratio is the median over pairs of runs, which is steadier than
a ratio of medians.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxshrink.errors import InputsError, OptionError, must
from onnxshrink.inputs import Samples
from onnxshrink.runtime import AnyModel, Role, Session, session

__all__ = ["LatencyReport", "Spread", "bench"]

Array = np.ndarray[Any, np.dtype[Any]]

_STARTS = 3
_FEWEST_RUNS = 3


@dataclass(frozen=True)
class Spread:
    """The quartiles of a measurement; half of all values lie between ``low`` and ``high``."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class LatencyReport:
    """How long one inference takes.

    Attributes:
        a_ms: milliseconds for the first model.
        b_ms: milliseconds for the second model.
        ratio: time of the second over time of the first, pair by pair; below 1 the second is faster.
        a_start_ms: milliseconds to load and prepare the first model, a median.
        b_start_ms: the same for the second.
        runs: timed inferences of each.
        threads: within an op.
    """

    a_ms: Spread
    b_ms: Spread
    ratio: Spread
    a_start_ms: float
    b_start_ms: float
    runs: int
    threads: int


def bench(
    a: AnyModel, b: AnyModel, samples: Samples, *, seconds: float = 5.0, warmup: int = 3, threads: int = 1
) -> LatencyReport:
    """Times two models on the same inputs.

    Args:
        a: the original: a path, the bytes of a file, a ModelProto or a graph.
        b: the candidate, likewise.
        samples: taken in turn, read outside the timed part.
        seconds: to spend on timed runs; at least three of each are made.
        warmup: untimed runs of each before.
        threads: within an op; one is the steadiest.

    Raises:
        OptionError: seconds, warmup or threads are out of range.
        InputsError: there is no sample.
        ModelError: the first model does not load or run.
        ValidationError: the second does not.
    """
    for name, value, low in (("seconds", seconds, 0), ("warmup", warmup, 0), ("threads", threads, 1)):
        if not value >= low:
            raise OptionError(must("bench", name, f"at least {low}", value))
    if not samples:
        raise InputsError(must(samples.source, "number of samples", "at least 1", 0))
    starts, (first, second) = _start(a, b, threads)
    with first, second:
        for index in range(warmup):
            feeds = samples[index % len(samples)]
            first.run(feeds)
            second.run(feeds)
        times = _take_turns((first, second), samples, seconds)
    return LatencyReport(
        a_ms=_spread(times[:, 0]),
        b_ms=_spread(times[:, 1]),
        ratio=_spread(times[:, 1] / times[:, 0]),
        a_start_ms=float(np.median(starts[:, 0])),
        b_start_ms=float(np.median(starts[:, 1])),
        runs=len(times),
        threads=threads,
    )


def _start(a: AnyModel, b: AnyModel, threads: int) -> tuple[Array, tuple[Session, Session]]:
    """Returns start times [starts, 2] in ms and the sessions started last; the models take turns at being first."""
    times = np.empty((_STARTS, 2))
    models: tuple[tuple[AnyModel, Role], ...] = ((a, "original"), (b, "candidate"))
    pair: dict[int, Session] = {}
    for turn in range(_STARTS):
        for earlier in pair.values():
            earlier.close()
        for which in _order(turn):
            pair[which] = session(models[which][0], threads, models[which][1])
            times[turn, which] = pair[which].start_ms
    return times, (pair[0], pair[1])


def _take_turns(pair: tuple[Session, Session], samples: Samples, seconds: float) -> Array:
    """Returns run times [runs, 2] in ms, of as many runs as fit in the time."""
    rows: list[list[float]] = []
    end = time.perf_counter() + seconds
    while len(rows) < _FEWEST_RUNS or time.perf_counter() < end:
        feeds = samples[len(rows) % len(samples)]
        row = [0.0, 0.0]
        for which in _order(len(rows)):
            start = time.perf_counter()
            pair[which].run(feeds)
            row[which] = (time.perf_counter() - start) * 1000
        rows.append(row)
    return np.array(rows)


def _order(turn: int) -> tuple[int, int]:
    return (0, 1) if turn % 2 == 0 else (1, 0)


def _spread(values: Array) -> Spread:
    low, median, high = np.percentile(values, (25, 50, 75))
    return Spread(float(median), float(low), float(high))
