"""Activations for passes: the current graph runs on the calibration samples, one sample after the other.

    activations = Calibration(samples)
    for values in activations.samples(graph, ["conv1_in", "fc_in"]):  # dicts: tensor name -> array
        ...
    for weight, gram in activations.grams(graph, weights(graph)):
        ...
    for pairs in activations.paired_grams(edited, graph, stages):
        ...

Nothing runs before the first value is asked for. Only what the named tensors depend on is given to ONNX Runtime, so early layers
of a deep network cost little, and layers that are asked for in portions go on where the portion before stopped
(`onnxshrink.relay`). A new graph output needs no type: ONNX Runtime infers it from a ValueInfoProto that has just a name (1.31,
tried, although onnx.checker wants a type).

Gram matrices are made outside of ONNX Runtime: it has no product that makes one triangle only, and its Gemm of X^T and X took 1.3 to
3 times as long as ssyrk of BLAS (1.31, one thread, 144 to 1,536 columns).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any, TypeVar

import numpy as np

from onnxshrink.errors import PassError, ValidationError
from onnxshrink.graph.edit import NameSource
from onnxshrink.graph.excerpt import tensors_by_name
from onnxshrink.graph.ir import Constant, Graph, Node, Variable
from onnxshrink.graph.lowering import Lowering
from onnxshrink.graph.sources import Lowerings, Running, lowered, named, running_order, twin_lowerings
from onnxshrink.graph.weights import Weight
from onnxshrink.inputs import Samples
from onnxshrink.numerics.gram import Gram, GramSum, PairedGram, PairedGramSum
from onnxshrink.options import did_you_mean
from onnxshrink.relay import Portion, Relay

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
        return Relay(graph, [Portion(names)], self._data, self._threads, 0).values(0)

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
        jobs = running_order(graph, found)
        sizes = functools.cache(lambda: self._activation_bytes(running))
        groups = list(_groups(running, list(jobs), GramSum.nbytes, sizes, self._memory))
        relay = self._relay(running, groups, [()] * len(groups), self._mixed(), self._memory)
        for number, group in enumerate(groups):
            moments = self._sums(running, group, relay, number)
            yield from _by_weight(jobs, group, moments)
            del moments  # before the next are made

    def paired_grams(
        self, graph: Graph, original: Graph, stages: Sequence[Sequence[Weight]]
    ) -> Iterator[list[tuple[Weight, PairedGram]]]:
        """Yields the moments of what weights are multiplied with, with those of what they met in the original.

        Both graphs run on all samples, side by side; sharing is as for `grams`. A stage whose moments do not fit in memory
        together comes in several portions.

        Args:
            graph: a copy of ``original`` made for this: tensors without a name that are asked for get one. Between two portions,
                the weights that have been yielded, and what is added to the outputs of their layers, may get new values.
            original: with the same nodes, tensors, names and weights.
            stages: weights of ``graph``, each stage after all that its inputs depend on. Weights without a lowering are left out;
                `lowerings` says why.

        Yields:
            (weight, moments) of a portion, in the order of `grams`.

        Raises:
            PassError: the original has no such weight, or reads it in another way.
            ValidationError: a graph does not run, an activation is not finite, or has another shape than in the original.
        """
        found = [lowered(graph, stage) for stage in stages]
        every = [pair for stage in found for pair in stage]
        twins = twin_lowerings(every, original)
        now = named(graph, (ways for _, ways in every), in_place=True)
        before = named(original, [tuple(twins.values())])
        orders = [running_order(graph, stage) for stage in found]
        sizes, half = functools.cache(lambda: self._activation_bytes(now)), self._memory // 2
        portions = [
            (jobs, group) for jobs in orders for group in _groups(now, list(jobs), PairedGramSum.nbytes, sizes, half)
        ]
        changed = [[weight.constant for ways in group for weight in jobs[ways]] for jobs, group in portions]
        groups, data = [group for _, group in portions], _read_once(self._mixed())
        mine = self._relay(now, groups, changed, data, half)
        others = [[tuple(twins[one] for one in ways) for ways in group] for group in groups]
        theirs = self._relay(before, others, [()] * len(groups), data, half)
        for number, (jobs, group) in enumerate(portions):
            moments = self._paired_sums((now, before), twins, group, (mine, theirs), number)
            yield list(_by_weight(jobs, group, moments))
            del moments  # before the next are made

    def _relay(
        self,
        running: Running,
        groups: Sequence[Sequence[Lowerings]],
        changed: Sequence[Sequence[Constant]],
        data: Samples,
        memory: int,
    ) -> Relay:
        names = [running.wanted(one for ways in group for one in ways) for group in groups]
        portions = [Portion(*portion) for portion in zip(names, changed, strict=True)]
        return Relay(running.graph, portions, data, self._threads, memory)

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

    def _sums(self, running: Running, group: Iterable[Lowerings], relay: Relay, number: int) -> dict[Lowering, Gram]:
        """Returns the moments of all lowerings of a group, from a run over the samples, or as many as it takes."""
        ways = {one for job in group for one in job}
        sums = {one: GramSum(running.title(one), one.groups, one.columns) for one in ways}
        for done, values in enumerate(relay.values(number)):
            if not _suffices(done, sums.values()):
                for one, total in sums.items():
                    with _refusals():
                        for chunk in one.chunks(running.values(one, values)):
                            total.add(chunk)
            elif not relay.hands_on:
                break
        with _refusals():
            return {one: total.result() for one, total in sums.items()}

    def _paired_sums(
        self,
        running: tuple[Running, Running],
        twins: Mapping[Lowering, Lowering],
        group: Iterable[Lowerings],
        relays: tuple[Relay, Relay],
        number: int,
    ) -> dict[Lowering, PairedGram]:
        """Returns the moments of all lowerings of a group, from a run of both graphs over the samples, or as many as it takes."""
        now, before = running
        sums = {one: PairedGramSum(now.title(one), one.groups, one.columns) for job in group for one in job}
        runs = zip(*(relay.values(number) for relay in relays), strict=True)
        for done, (values, originals) in enumerate(runs):
            if _suffices(done, sums.values()):
                if not any(relay.hands_on for relay in relays):
                    break
                continue
            for one, total in sums.items():
                mine, theirs = now.values(one, values), before.values(twins[one], originals)
                _check_shapes(now.title(one), mine.values(), theirs.values())
                with _refusals():
                    for chunk, original in zip(one.chunks(mine), twins[one].chunks(theirs), strict=True):
                        total.add(original, chunk)
        with _refusals():
            return {one: total.result() for one, total in sums.items()}

    def _mixed(self) -> Samples:
        """Returns the samples in an order whose beginnings are spread evenly: files often hold one class after the other."""
        return self._data.take(sorted(range(len(self._data)), key=lambda index: (index * _GOLDEN) % 1.0))


def _groups(
    running: Running,
    jobs: list[Lowerings],
    nbytes: Callable[[int, int], int],
    activation_bytes: Callable[[], Mapping[str, int]],
    memory: int,
) -> Iterator[list[Lowerings]]:
    """Yields the jobs in groups whose sums, of f(groups, columns) bytes each, fit in memory with the activations by name."""
    if len(jobs) < 2:
        yield from [jobs] if jobs else []
        return
    group: list[Lowerings] = []
    held: dict[Lowering | str, int] = {}
    for job in jobs:
        needs: dict[Lowering | str, int] = {one: nbytes(one.groups, one.columns) for one in job}
        needs.update((name, activation_bytes()[name]) for name in running.wanted(job))
        if group and sum((held | needs).values()) > memory:
            yield group
            group, held = [], {}
        group.append(job)
        held |= needs
    yield group


def _by_weight(
    jobs: Mapping[Lowerings, list[Weight]], group: Iterable[Lowerings], found: Mapping[Lowering, _Moments]
) -> Iterator[tuple[Weight, _Moments]]:
    """Yields the weights of a group with their moments, summed over the places where they are used."""
    for ways in group:
        moments = reduce(add, [found[one] for one in ways])
        yield from ((weight, moments) for weight in jobs[ways])


def _read_once(data: Samples) -> Samples:
    """Returns samples that two graphs can run on side by side, each read from where it is once."""
    return Samples(functools.lru_cache(maxsize=1)(data.__getitem__), range(len(data)), data.source)


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Turns what sums refuse, activations that are not finite, into a `ValidationError`."""
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
