"""Copies of calibration samples with other rows of embedding tables: what layers would meet that few samples do not show.

Some dozen sentences use a few hundred rows of a table of many thousand. Layers that are fitted to what those few give lose on others:
MiniLM with 0.8 of its parameters, fitted to 64 sentences, had 10.6 dB on 300 others; with random tokens beside them, 11.7. The rows are
there to be looked at: an input that only chooses rows (`onnxshrink.graph.table_rows`) may choose any.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from onnxshrink.graph.ir import Graph, freeze
from onnxshrink.graph.table_rows import table_rows
from onnxshrink.inputs import Feeds, Samples

__all__ = ["Variation"]

Array = np.ndarray[Any, np.dtype[Any]]
_COPIES = 4  # of every sample: as many again gained a tenth of a decibel
_MOST = 512  # samples in all, beyond which there are enough of them
_COMPARED = 8  # samples that tell what an input varies by itself


class Variation:
    """Makes such copies, for `onnxshrink.calibrate.Calibration`, and remembers how many were looked at.

    An input that holds the same wherever samples have it, such as positions or segments, stays as it is.
    """

    def __init__(self, graph: Graph, seed: int) -> None:
        """Looks at what the inputs are for.

        Args:
            graph: the model.
            seed: of the rows; those of one copy depend on nothing else but its number.
        """
        self._rows = table_rows(graph)
        self._seed = seed
        self._shown: dict[str, set[int]] = {}

    def __call__(self, data: Samples) -> Samples:
        """Returns copies of samples in which inputs that only choose rows choose random ones; none where there are no such inputs."""
        wanted = min(_COPIES * len(data), _MOST - len(data))
        rows = {name: count for name, count in self._rows.items() if wanted > 0 and _varies(name, data)}
        copies = wanted if rows else 0

        def copy(number: int) -> Feeds:
            for name in rows:
                self._shown.setdefault(name, set()).add(number)
            return _with_random_rows(data[number % len(data)], rows, np.random.default_rng([self._seed, number]))

        return Samples(copy, range(copies), f"copies of {data.source}")

    @property
    def note(self) -> str:
        """What was looked at, in one line, or nothing if nothing was."""
        if not self._shown:
            return ""
        most = max(map(len, self._shown.values()))
        return f"calibration inputs are few: layers were fitted to {most} copies of them with random {' and '.join(self._shown)} as well"


def _with_random_rows(sample: Feeds, rows: Mapping[str, int], rng: np.random.Generator) -> Feeds:
    chosen: dict[str, Array] = {}
    for name, count in rows.items():
        shape, dtype = sample[name].shape, sample[name].dtype
        chosen[name] = freeze(rng.integers(0, min(count, int(np.iinfo(dtype).max) + 1), shape).astype(dtype))
    return {**sample, **chosen}


def _varies(name: str, data: Samples) -> bool:
    """Whether samples differ in more than half of the places of an input that they have in common."""
    held = [np.asarray(data[index][name]).reshape(-1) for index in range(min(_COMPARED, len(data)))]
    common = min(map(len, held), default=0)
    if len(held) < 2 or not common:
        return False
    together = np.stack([values[:common] for values in held])
    return bool(np.mean((together != together[0]).any(axis=0)) > 0.5)
