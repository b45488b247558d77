"""Activations for passes: the current graph runs on the calibration samples, one sample after the other.

    activations = Calibration(samples)
    for values in activations.samples(graph, ["conv1_in", "fc_in"]):  # dicts: tensor name -> array
        ...
    for weight, gram in activations.grams(graph, weights(graph)):
        ...
    for weight, pair in activations.paired_grams(edited, weights(edited), graph):
        ...

Nothing runs before the first value is asked for, and one sample's values are in memory at a time. Only what the named
tensors depend on is given to ONNX Runtime, so early layers of a deep network cost little. A new graph output needs no
type: ONNX Runtime infers it from a ValueInfoProto that has just a name (1.31, tried, although onnx.checker wants a
type).

Gram matrices are made outside of ONNX Runtime: it has no product that makes one triangle only, and its Gemm of X^T and X took 1.3 to
3 times as long as ssyrk of BLAS (1.31, one thread, 144 to 1,536 columns).
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial, reduce
from operator import add
from typing import Any, TypeVar

import numpy as np

from onnxshrink.errors import PassError, ValidationError
from onnxshrink.graph.edit import NameSource
from onnxshrink.graph.excerpt import excerpt, tensors_by_name
from onnxshrink.graph.ir import Constant, Graph, Node, Variable
from onnxshrink.graph.lowering import Lowering, lookups
from onnxshrink.graph.sources import Lowerings, Running, lowered, named, running_order, twin_lowerings
from onnxshrink.graph.weights import Weight
from onnxshrink.inputs import Feeds, Samples
from onnxshrink.numerics.gram import Gram, GramSum, PairedGram, PairedGramSum
from onnxshrink.options import did_you_mean
from onnxshrink.runtime import session

__all__ = ["Calibration"]

Array = np.ndarray[Any, np.dtype[Any]]
_GOLDEN = (5**0.5 - 1) / 2  # multiples of it, modulo 1, leave no large gap (Steinhaus's three-gap theorem)
_LEAST_SAMPLES, _ENOUGH_POSITIONS = 64, 64  # positions for each column
_Moments = TypeVar("_Moments", Gram, PairedGram)


class Calibration:
    """The `Activations` of onnxshrink.contract, made by ONNX Runtime."""

    def __init__(self, data: Samples, threads: int | None = None, memory: int = 1 << 30) -> None:
        """Keeps the samples; runs nothing.

        Args:
            data: inputs of the original model, which every rewritten graph still has.
            threads: of ONNX Runtime, or None for its choice.
            memory: bytes that Gram matrices in the making may take, with one sample's activations that they are made from;
                layers that need more together are done one group after the other, and one that needs more alone, alone.
        """
        self._data = data
        self._threads = threads
        self._memory = memory

    @property
    def count(self) -> int:
        """How many samples there are."""
        return len(self._data)

    def fold(self, index: int, count: int) -> tuple[Calibration, Calibration]:
        """Returns (the rest, every ``count``-th sample from ``index`` on): what was fitted to the one is judged by the other."""
        rest, fold = self._data.fold(index, count)
        return Calibration(rest, self._threads, self._memory), Calibration(fold, self._threads, self._memory)

    def samples(self, graph: Graph, names: Sequence[str]) -> Iterator[Mapping[str, Array]]:
        """Yields, for each calibration sample, the values of the named tensors of the main graph, by name.

        Args:
            graph: as it is now; only read, and not to be edited before the iteration is over.
            names: graph inputs, constants and outputs of nodes of the main graph, typed or not.

        Raises:
            PassError: a name is unknown (at once).
            ValidationError: the graph does not run, or a name is no tensor (while iterating).
        """
        known = tensors_by_name(graph)
        for name in names:
            if name not in known:
                raise PassError(f"calibration: the main graph has no tensor '{name}'; {did_you_mean(name, known)}")
        return self._iterate(graph, names, self._data)

    def grams(self, graph: Graph, weights: Sequence[Weight]) -> Iterator[tuple[Weight, Gram]]:
        """Yields the moments, over as many samples as it takes, of what each weight is multiplied with, see `onnxshrink.graph.lowering`.

        Layers are taken in groups that fit in memory, and each group is one run. Weights that meet the same
        positions share one Gram object; the moments of a tied weight are summed over its uses.

        Args:
            graph: as it is when the first value is asked for; what runs is a copy, so edits in between change nothing.
            weights: some of its weights. Those without a lowering are left out; `lowerings` says why.

        Yields:
            (weight, moments) in the order in which the graph runs; weights that share moments come with the first of them.

        Raises:
            ValidationError: the graph does not run, or an activation is not finite (while iterating).
        """
        found = lowered(graph, weights)
        running = named(graph, (ways for _, ways in found))
        yield from self._moments(running, running_order(graph, found), GramSum.nbytes, partial(self._sums, running))

    def paired_grams(
        self, graph: Graph, weights: Sequence[Weight], original: Graph
    ) -> Iterator[tuple[Weight, PairedGram]]:
        """Yields the moments of what each weight is multiplied with, with those of what it met in the original.

        Both graphs run on all samples, one after the other on each, in groups and with sharing as for `grams`.

        Args:
            graph: a copy of ``original`` in which some constants have new values.
            weights: some of its weights. Those without a lowering are left out; `lowerings` says why.
            original: with the same nodes, tensors, names and weights.

        Yields:
            (weight, moments), in the order of `grams`.

        Raises:
            PassError: the original has no such weight, or reads it in another way.
            ValidationError: a graph does not run, an activation is not finite, or has another shape than in the original.
        """
        found = lowered(graph, weights)
        twins = twin_lowerings(found, original)
        now = named(graph, (ways for _, ways in found))
        before = named(original, [tuple(twins.values())])
        sums = partial(self._paired_sums, now, before, twins)
        yield from self._moments(now, running_order(graph, found), PairedGramSum.nbytes, sums, graphs=2)

    def row_counts(self, graph: Graph, weights: Sequence[Weight]) -> Iterator[tuple[Weight, Array]]:
        """Yields how often, over all samples, Gather looks up each row of a weight that is its table.

        Args:
            graph: as it is now; only read, and not to be edited before the iteration is over.
            weights: some of its weights. Those that are no table of a Gather in the main graph are left out.

        Yields:
            (weight, int64 [rows of its view]); a tied weight's counts are summed over its uses.

        Raises:
            ValidationError: the graph does not run (while iterating).
        """
        found = [
            (weight, ids, _table_rows(weight)) for weight, ids in lookups(graph, weights) if not isinstance(ids, str)
        ]
        counts = [np.zeros(rows, np.int64) for _, _, rows in found]
        names = {tensor.name for _, ids, _ in found for tensor in ids}
        for values in self.samples(graph, sorted(names)) if names else ():
            for (_, ids, rows), count in zip(found, counts, strict=True):
                for tensor in ids:  # negative ids count from the end
                    count += np.bincount(values[tensor.name].reshape(-1).astype(np.int64) % rows, minlength=rows)
        for (weight, _, _), count in zip(found, counts, strict=True):
            yield weight, count

    def _moments(
        self,
        running: Running,
        jobs: dict[Lowerings, list[Weight]],
        nbytes: Callable[[int, int], int],
        sums: Callable[[list[Lowerings]], dict[Lowering, _Moments]],
        graphs: int = 1,
    ) -> Iterator[tuple[Weight, _Moments]]:
        """Yields the moments of weights, group by group.

        Args:
            running: to know the sizes of activations.
            jobs: the weights by what they are multiplied with, in order.
            nbytes: what sums take, f(groups, columns).
            sums: returns the moments of a group of jobs.
            graphs: how many run at the same time.
        """
        for group in self._groups(running, list(jobs), nbytes, graphs):
            found = sums(group)
            for ways in group:
                moments = reduce(add, [found[one] for one in ways])
                yield from ((weight, moments) for weight in jobs.pop(ways))
            del found, moments  # before the next group is made

    def _groups(
        self, running: Running, jobs: list[Lowerings], nbytes: Callable[[int, int], int], graphs: int
    ) -> Iterator[list[Lowerings]]:
        """Yields the jobs in groups that fit in memory."""
        if len(jobs) < 2:
            yield from [jobs] if jobs else []
            return
        activations = self._activation_bytes(running)
        group: list[Lowerings] = []
        held: dict[Lowering | str, int] = {}
        for job in jobs:
            needs: dict[Lowering | str, int] = {one: nbytes(one.groups, one.columns) for one in job}
            needs.update((name, graphs * activations[name]) for name in running.wanted(job))
            if group and sum((held | needs).values()) > self._memory:
                yield group
                group, held = [], {}
            group.append(job)
            held |= needs
        yield group

    def _activation_bytes(self, running: Running) -> dict[str, int]:
        """Returns the bytes of the sources by name, of float32 elements, from the shapes that they have in the first sample."""
        copy, fresh = running.graph.copy(), NameSource(running.graph)
        known = tensors_by_name(copy)
        shapes: dict[str, str] = {}
        for name in running.names.values():
            tensor = known[name]
            if isinstance(tensor, Variable) and tensor.inputs:  # inputs and constants are in memory anyway
                shapes[name] = fresh.fresh(f"{name}_shape")
                copy.nodes.append(Node("Shape", [tensor], [Variable(shapes[name])]))
        first = next(self.samples(copy, list(shapes.values())), None) if shapes else None
        if first is None:
            return dict.fromkeys(running.names.values(), 0)
        sizes = {name: 4 * math.prod(first[shape].tolist()) for name, shape in shapes.items()}
        return {name: sizes.get(name, 0) for name in running.names.values()}

    def _sums(self, running: Running, group: Iterable[Lowerings]) -> dict[Lowering, Gram]:
        """Returns the moments of all lowerings of a group, from one run over the samples, or as many as it takes."""
        ways = {one for job in group for one in job}
        sums = {one: GramSum(running.title(one), one.groups, one.columns) for one in ways}
        for done, values in enumerate(self._iterate(running.graph, running.wanted(ways), self._mixed()), 1):
            for one, total in sums.items():
                with _refusals():
                    for chunk in one.chunks(running.values(one, values)):
                        total.add(chunk)
            if _suffices(done, sums.values()):
                break
        with _refusals():
            return {one: total.result() for one, total in sums.items()}

    def _paired_sums(
        self, now: Running, before: Running, twins: Mapping[Lowering, Lowering], group: Iterable[Lowerings]
    ) -> dict[Lowering, PairedGram]:
        """Returns the moments of all lowerings of a group, from one run of both graphs over the samples, or as many as it takes."""
        ways = {one for job in group for one in job}
        sums = {one: PairedGramSum(now.title(one), one.groups, one.columns) for one in ways}
        feeds, again = itertools.tee(self._mixed())
        runs = (
            self._iterate(running.graph, running.wanted(wanted), data)
            for running, wanted, data in ((now, ways, feeds), (before, [twins[one] for one in ways], again))
        )
        for done, (values, originals) in enumerate(zip(*runs, strict=True), 1):
            for one, total in sums.items():
                mine, theirs = now.values(one, values), before.values(twins[one], originals)
                _check_shapes(now.title(one), mine.values(), theirs.values())
                with _refusals():
                    for chunk, original in zip(one.chunks(mine), twins[one].chunks(theirs), strict=True):
                        total.add(original, chunk)
            if _suffices(done, sums.values()):
                break
        with _refusals():
            return {one: total.result() for one, total in sums.items()}

    def _mixed(self) -> Iterator[Feeds]:
        """Yields the samples in an order whose beginnings are spread evenly: files often hold one class after the other."""
        count = len(self._data)
        return (self._data[index] for index in sorted(range(count), key=lambda index: (index * _GOLDEN) % 1.0))

    def _iterate(self, graph: Graph, names: Sequence[str], data: Iterable[Feeds]) -> Iterator[Mapping[str, Array]]:
        known = tensors_by_name(graph)
        wanted = {name: known[name] for name in names}
        constants = {name: tensor.values for name, tensor in wanted.items() if isinstance(tensor, Constant)}
        computed = [name for name, tensor in wanted.items() if tensor.inputs and not isinstance(tensor, Constant)]
        if not computed:
            for feeds in data:
                yield {name: feeds[name] if name in feeds else constants[name] for name in wanted}
            return
        with session(excerpt(graph, computed), self._threads) as running:
            for feeds in data:
                values = {**constants, **feeds, **running.run(feeds)}
                if missing := [name for name in wanted if name not in values]:
                    raise ValidationError(f"calibration: '{missing[0]}' has no value: it is not a tensor")
                yield {name: values[name] for name in wanted}


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Turns what sums refuse, activations that are not finite, into the error of this room."""
    try:
        yield
    except ValueError as error:
        raise ValidationError(f"calibration: {error}") from None


def _suffices(samples: int, sums: Iterable[GramSum | PairedGramSum]) -> bool:
    """Whether more samples would cost time and hardly change the moments."""
    return samples >= _LEAST_SAMPLES and all(total.positions_per_column >= _ENOUGH_POSITIONS for total in sums)


def _check_shapes(title: str, values: Iterable[Array], originals: Iterable[Array]) -> None:
    """Refuses activations that have other shapes than in the original: their positions would not be the same ones."""
    for value, original in zip(values, originals, strict=True):
        if value.shape != original.shape:
            shapes = f"shape {list(original.shape)} in the original and {list(value.shape)} in its copy"
            raise ValidationError(f"calibration: {title} has {shapes}: they cannot be compared position by position")


def _table_rows(weight: Weight) -> int:
    return next(use.view.shape[0] for use in weight.uses if use.op == "Gather" and use.view is not None)
