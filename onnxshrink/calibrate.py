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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any, TypeVar

import numpy as np

from onnxshrink.errors import PassError, ValidationError
from onnxshrink.graph.edit import NameSource
from onnxshrink.graph.excerpt import tensors_by_name
from onnxshrink.graph.ir import Constant, Graph, Node, Variable
from onnxshrink.graph.lowering import Lowering
from onnxshrink.graph.residuals import summands
from onnxshrink.graph.sources import Lowerings, Running, lowered, named, running_order, twin_lowerings
from onnxshrink.graph.weights import Weight
from onnxshrink.inputs import Samples
from onnxshrink.numerics.gram import Gram, GramSum, PairedGram
from onnxshrink.options import did_you_mean
from onnxshrink.pairing import PairedSums, Pairing
from onnxshrink.relay import Portion, Relay

__all__ = ["Calibration"]

Array = np.ndarray[Any, np.dtype[Any]]
_GOLDEN = (5**0.5 - 1) / 2  # multiples of it, modulo 1, leave no large gap (Steinhaus's three-gap theorem)
_LEAST_SAMPLES, _ENOUGH_POSITIONS = 64, 64  # positions for each column
_Varied = Callable[[Samples], Samples]
_Moments = TypeVar("_Moments")


def _nothing(data: Samples) -> Samples:
    return data[:0]


class Calibration:
    """The `Activations` of onnxshrink.contract, made by ONNX Runtime."""

    def __init__(self, data: Samples, threads: int | None = None, memory: int = 1 << 30, varied: _Varied = _nothing) -> None:
        """Keeps the samples; runs nothing.

        Args:
            data: inputs of the original model, which every rewritten graph still has.
            threads: of ONNX Runtime, or None for its choice.
            memory: bytes that Gram matrices in the making may take, with one sample's activations that they are made from;
                layers that need more together are done one group after the other, and one that needs more alone, alone.
            varied: makes more samples of those there are, for moments alone, and only where there are too few to settle them; they
                count for nothing where the model does not run on them, or not without infinities.
        """
        self._data = data
        self._threads = threads
        self._memory = memory
        self._varied = varied

    @property
    def count(self) -> int:
        """How many samples there are."""
        return len(self._data)

    def fold(self, index: int, count: int) -> tuple[Calibration, Calibration]:
        """Returns (the rest, every ``count``-th sample from ``index`` on): what was fitted to the one is judged by the other."""
        rest, fold = self._data.fold(index, count)
        return Calibration(rest, self._threads, self._memory, self._varied), Calibration(fold, self._threads, self._memory)

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
        sizes = functools.cache(lambda: self._activation_bytes(running.graph, set(running.names.values())))

        def needs(job: Lowerings) -> dict[object, int]:
            sums: dict[object, int] = {one: GramSum.nbytes(one.groups, one.columns) for one in job}
            return {**sums, **{name: sizes()[name] for name in running.wanted(job)}}

        groups = list(_groups(list(jobs), needs, self._memory))
        names = [running.wanted(one for ways in group for one in ways) for group in groups]

        def start(parts: Sequence[Samples]) -> Callable[[int], dict[Lowering, Gram]]:
            unchanged, memory = [()] * len(groups), self._memory // len(parts)
            relays = [self._relay(running.graph, names, unchanged, data, memory) for data in parts]
            return lambda number: self._sums(running, groups[number], relays, number)

        sums = self._varied_if_possible(start)
        for number, group in enumerate(groups):
            moments = sums(number)
            for ways in group:
                total = reduce(add, [moments[one] for one in ways])
                yield from ((weight, total) for weight in jobs[ways])
            del moments  # before the next are made

    def paired_grams(
        self, graph: Graph, original: Graph, stages: Sequence[Sequence[Weight]]
    ) -> Iterator[list[tuple[Weight, PairedGram]]]:
        """Yields the moments of what weights are multiplied with, and of what the outputs of their layers lack (`onnxshrink.pairing`).

        Both graphs run on all samples, side by side. A stage whose moments do not fit in memory
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
        pairing = Pairing(now, before, twins, summands(graph, stages))
        orders = [running_order(graph, stage) for stage in found]
        names = {name for jobs in orders for name in pairing.wanted(list(jobs), jobs)[0]}
        sizes, half = functools.cache(lambda: self._activation_bytes(graph, names)), self._memory // 2
        portions: list[tuple[dict[Lowerings, list[Weight]], list[Lowerings]]] = []
        for jobs in orders:

            def needs(job: Lowerings, jobs: dict[Lowerings, list[Weight]] = jobs) -> dict[object, int]:
                return {**pairing.nbytes(job, jobs), **{name: sizes()[name] for name in pairing.wanted([job], jobs)[0]}}

            portions += [(jobs, group) for group in _groups(list(jobs), needs, half)]
        changed = [[weight.constant for ways in group for weight in jobs[ways]] for jobs, group in portions]
        asked = [pairing.wanted(group, jobs) for jobs, group in portions]

        def start(parts: Sequence[Samples]) -> Callable[[int], list[tuple[Weight, PairedGram]]]:
            relays, memory = [], half // len(parts)
            for data in map(_read_once, parts):
                mine = self._relay(graph, [names for names, _ in asked], changed, data, memory)
                theirs = self._relay(before.graph, [names for _, names in asked], [()] * len(asked), data, memory)
                relays.append((mine, theirs))
            return lambda number: self._paired_sums(PairedSums(pairing, portions[number][1], portions[number][0]), relays, number)

        yield from map(self._varied_if_possible(start), range(len(portions)))

    def _relay(
        self,
        graph: Graph,
        names: Sequence[Sequence[str]],
        changed: Sequence[Sequence[Constant]],
        data: Samples,
        memory: int,
    ) -> Relay:
        portions = [Portion(*portion) for portion in zip(names, changed, strict=True)]
        return Relay(graph, portions, data, self._threads, memory)

    def _activation_bytes(self, graph: Graph, names: Collection[str]) -> dict[str, int]:
        """Returns the bytes of tensors by name, of float32 elements, from the shapes that they have in the first sample."""
        copy, fresh = graph.copy(), NameSource(graph)
        known = tensors_by_name(copy)
        shapes: dict[str, str] = {}
        for name in names:
            tensor = known[name]
            if isinstance(tensor, Variable) and tensor.inputs:  # inputs and constants are in memory anyway
                shapes[name] = fresh.fresh(f"{name}_shape")
                copy.nodes.append(Node("Shape", [tensor], [Variable(shapes[name])]))
        first = next(self.samples(copy, list(shapes.values())), None) if shapes else None
        if first is None:
            return dict.fromkeys(names, 0)
        sizes = {name: 4 * math.prod(first[shape].tolist()) for name, shape in shapes.items()}
        return {name: sizes.get(name, 0) for name in names}

    def _sums(self, running: Running, group: Iterable[Lowerings], relays: Sequence[Relay], number: int) -> dict[Lowering, Gram]:
        """Returns the moments of all lowerings of a group, from a run over the samples, or as many as it takes."""
        ways = {one for job in group for one in job}
        sums = {one: GramSum(running.title(one), one.groups, one.columns) for one in ways}

        def add(values: Mapping[str, Array]) -> None:
            for one, total in sums.items():
                for chunk in one.chunks(running.values(one, values)):
                    total.add(chunk)

        _run([(relay,) for relay in relays], number, sums.values(), add)
        with _refusals():
            return {one: total.result() for one, total in sums.items()}

    def _paired_sums(
        self, sums: PairedSums, relays: Sequence[tuple[Relay, Relay]], number: int
    ) -> list[tuple[Weight, PairedGram]]:
        """Returns the moments of a group, from a run of both graphs over the samples, or as many as it takes."""
        _run(relays, number, sums.grams.values(), sums.add)
        with _refusals():
            return sums.result()

    def _varied_if_possible(self, start: Callable[[Sequence[Samples]], Callable[[int], _Moments]]) -> Callable[[int], _Moments]:
        """Returns a function that makes the moments of a portion, from the real samples alone once the others turn out not to do.

        What was made up may lead to infinities, or through branches that do not run: no reason to give up.

        Args:
            start: makes that function for real samples and, if there are any, others; portions are asked for in order, and maybe not
                from the first on.
        """
        real, more = _spread(self._data), _spread(self._varied(self._data))
        makers = [start(parts) for parts in ([[real, more]] if more else []) + [[real]]]

        def moments(number: int) -> _Moments:
            try:
                return makers[0](number)
            except ValidationError:
                if len(makers) == 1:
                    raise
                del makers[0]
            return makers[0](number)

        return moments


def _spread(data: Samples) -> Samples:
    """Returns samples in an order whose beginnings are spread evenly: files often hold one class after the other."""
    return data.take(sorted(range(len(data)), key=lambda index: (index * _GOLDEN) % 1.0))


def _run(
    parts: Sequence[tuple[Relay, ...]], number: int, sums: Collection[GramSum], add: Callable[..., None]
) -> None:
    """Adds the values of a portion, in one graph or in several side by side, for as many samples as it takes.

    A part of the samples that is not needed is not even begun, whatever later portions may want of it: they can start from the inputs.
    """
    done = 0
    for relays in parts:
        if _suffices(done, sums):
            return
        for values in zip(*(relay.values(number) for relay in relays), strict=True):
            if not _suffices(done, sums):
                with _refusals():
                    add(*values)
            done += 1
            if not any(relay.hands_on for relay in relays) and _suffices(done, sums):
                return


def _groups(
    jobs: list[Lowerings], needs: Callable[[Lowerings], Mapping[object, int]], memory: int
) -> Iterator[list[Lowerings]]:
    """Yields the jobs in groups that need no more than memory: bytes, by what jobs may share."""
    if len(jobs) < 2:
        yield from [jobs] if jobs else []
        return
    group: list[Lowerings] = []
    held: dict[object, int] = {}
    for job in jobs:
        needed = needs(job)
        if group and sum({**held, **needed}.values()) > memory:
            yield group
            group, held = [], {}
        group.append(job)
        held.update(needed)
    yield group


def _read_once(data: Samples) -> Samples:
    """Returns samples that two graphs can run on side by side, each read from where it is once."""
    return Samples(functools.lru_cache(maxsize=1)(data.__getitem__), range(len(data)), data.source)


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Turns what sums refuse, activations that are not finite or not comparable, into a `ValidationError`."""
    try:
        yield
    except ValueError as error:
        raise ValidationError(f"calibration: {error}") from None


def _suffices(samples: int, sums: Iterable[GramSum]) -> bool:
    """Whether more samples would cost time and hardly change the moments."""
    return samples >= _LEAST_SAMPLES and all(total.positions_per_column >= _ENOUGH_POSITIONS for total in sums)
