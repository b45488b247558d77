"""Copies of calibration samples with other rows of embedding tables: what layers would meet that few samples do not show.

Some dozen sentences use a few hundred rows of a table of many thousand. Layers that are fitted to what those few give lose on others:
MiniLM with 0.8 of its parameters, fitted to 64 sentences, had 10.6 dB on 300 others; with random tokens beside them, 11.4. The rows are
there to be looked at: an input that only chooses rows (`onnxshrink.graph.table_rows`) may choose any.

Rows that nobody chooses may be of another kind, though. So a third of the samples judges: rows that are new in them must be more likely,
as Gaussian ones, by the second moments of the others' rows with random ones than without. Where no row is new, nothing is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from onnxshrink.graph.ir import Graph, freeze
from onnxshrink.graph.table_rows import Table, tables
from onnxshrink.inputs import Feeds, Samples

__all__ = ["Variation"]

Array = np.ndarray[Any, np.dtype[Any]]
_COPIES = 2  # of every sample: four gained as much where ranks are cut, and lost a decibel where channels are
_MOST = 512  # samples in all, beyond which there are enough of them
_COMPARED = 8  # samples that tell what an input varies by itself
_THIRD, _ASKED, _ASKED_ROWS = 3, 128, 4096  # samples, and rows, that tell whether random rows are like those that samples choose
_FEWEST_NEW = 8  # rows; where fewer are new, samples show nearly all that there is to be seen
_MOST_COLUMNS = 1024  # of a table, evenly spread, which tell enough
_TINY = float(np.finfo(np.float64).tiny)


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
        self._tables = tables(graph)
        self._seed = seed
        self._shown: dict[str, set[int]] = {}

    def __call__(self, data: Samples) -> Samples:
        """Returns copies of samples in which inputs that only choose rows choose random ones; none where there are no such inputs."""
        wanted = min(_COPIES * len(data), _MOST - len(data))
        found = self._tables.items() if wanted > 0 else ()
        rows = {name: min(table.rows for table in some) for name, some in found if _varies(name, data) and self._tell(name, data)}
        copies = wanted if rows else 0

        def copy(number: int) -> Feeds:
            for name in rows:
                self._shown.setdefault(name, set()).add(number)
            return _with_random_rows(data[number % len(data)], rows, np.random.default_rng([self._seed, number]))

        return Samples(copy, range(copies), f"copies of {data.source}")

    def _tell(self, name: str, data: Samples) -> bool:
        """Whether random rows tell of what samples hold that others do not."""
        return all(_tells(table, name, data, np.random.default_rng(self._seed)) for table in self._tables[name])

    @property
    def note(self) -> str:
        """What was looked at, in one line, or nothing if nothing was."""
        if not self._shown:
            return ""
        most = max(map(len, self._shown.values()))
        return f"calibration inputs are few: layers were also shown {most} copies of them with random {' and '.join(self._shown)}"


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


def _tells(table: Table, name: str, data: Samples, rng: np.random.Generator) -> bool:
    """Whether second moments with random rows fit those rows of a third of the samples that are not in the others, better than without."""
    held = [np.asarray(data[index][name]).reshape(-1).astype(np.int64) % table.rows for index in range(min(_ASKED, len(data)))]
    chosen = np.concatenate([ids for index, ids in enumerate(held) if index % _THIRD])
    new = np.setdiff1d(np.concatenate(held[::_THIRD]), chosen)
    if len(new) < _FEWEST_NEW:
        return False
    values = table.values(_MOST_COLUMNS)
    if values.dtype.kind in "OSUc":
        return False  # strings and complex numbers are of no kind that moments describe
    random = rng.choice(table.rows, min(table.rows, _ASKED_ROWS), replace=False)
    real, made, wanted = (_moments(values, rows) for rows in (chosen, random, new))
    with_random = (real + _COPIES * made) / (1 + _COPIES)
    if not (np.isfinite(with_random).all() and np.isfinite(wanted).all()):
        return False  # such as a mask of negative infinity
    count = len(chosen)
    return _unlikeliness(with_random, count * (1 + _COPIES), wanted) < _unlikeliness(real, count, wanted)


def _moments(values: Array, rows: Array) -> Array:
    """Returns the mean x x^T of rows of a table, each as often as it is named: float64 [columns, columns]."""
    distinct, counts = np.unique(rows, return_counts=True)  # a word may be there a million times
    held = values[distinct].astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        found: Array = (held.T * counts) @ held / max(len(rows), 1)
    return found


def _unlikeliness(known: Array, count: int, met: Array) -> float:
    """Returns twice the mean negative logarithm of the density of rows with moments ``met``, up to a constant, by moments of a count."""
    shrunk = known + (np.trace(known) / count + _TINY) * np.eye(len(known))  # as `Gram.shrunk`
    return float(np.linalg.slogdet(shrunk)[1] + np.trace(np.linalg.solve(shrunk, met)))
