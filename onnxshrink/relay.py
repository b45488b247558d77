"""Runs a graph on calibration samples in portions, each from where the one before stopped.

Between two portions the caller may give weights new values: those that only later portions depend on. A portion hands on, sample by
sample, the tensors that later ones start from, so every node runs once for each sample however many portions there are. Where
these would take too much memory, the next portion starts from the inputs again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxshrink.errors import ValidationError
from onnxshrink.graph.excerpt import excerpt, needed, tensors_by_name
from onnxshrink.graph.ir import Constant, Graph, Tensor
from onnxshrink.graph.residuals import last_changes
from onnxshrink.inputs import Samples
from onnxshrink.runtime import session

__all__ = ["Portion", "Relay"]

Array = np.ndarray[Any, np.dtype[Any]]
Values = Mapping[str, Array]


@dataclass(frozen=True)
class Portion:
    """What is asked for in one go.

    Attributes:
        names: of tensors.
        changed: constants that may get other values once these are known.
    """

    names: Sequence[str]
    changed: Sequence[Constant] = ()


class Relay:
    """The values of portions, in order; see the module.

    Attributes:
        hands_on: whether the portion that is being run keeps something for later ones, and so should be run to its end.
    """

    def __init__(
        self, graph: Graph, portions: Sequence[Portion], data: Samples, threads: int | None, memory: int
    ) -> None:
        """Runs nothing.

        Args:
            graph: the main graph; read when a portion is run.
            portions: in order; tensors of one must not depend on what an earlier one changes only later.
            data: inputs, in the order in which they are run.
            threads: of ONNX Runtime, or None for its choice.
            memory: bytes that what is handed on may take.
        """
        self._graph = graph
        self._portions = portions
        self._data = data
        self._threads = threads
        self._memory = memory
        self._known = tensors_by_name(graph)
        self._changes = last_changes(graph, [portion.changed for portion in portions])
        self._done: set[int] = set()  # ids of tensors that are known for good, as far as what is held goes
        self.hands_on = False
        self._held: list[dict[str, Array]] = []  # by sample, or empty: then everything starts from the inputs

    def values(self, number: int) -> Iterator[Values]:
        """Yields the values of a portion's tensors, by name, for one sample after the other.

        If the iteration is left before its end, the next portion starts from the inputs.

        Args:
            number: of the portion; they have to be asked for in order.

        Raises:
            ValidationError: the graph does not run, or a name is no tensor.
        """
        wanted = [self._known[name] for name in self._portions[number].names]
        done = self._done | self._reached(wanted, number)
        handed_on = self._handed_on(done, number)
        held, self._held, self._done = self._held, [], set()
        kept: list[dict[str, Array]] = []
        self.hands_on = bool(handed_on)
        for values in self._run(wanted, handed_on, held):
            if self.hands_on:
                kept.append({name: values[name] for name in handed_on if name in values})
                self.hands_on = self._fits(kept[0], handed_on)
            yield {tensor.name: values[tensor.name] for tensor in wanted}
        if self.hands_on and len(kept) == len(self._data):
            self._held, self._done = kept, done

    def _reached(self, wanted: Sequence[Tensor], number: int) -> set[int]:
        """Returns the tensors that are computed on the way to a portion's and that it does not change."""
        nodes, _ = needed(wanted, stop=self._done)
        final = (node for node in self._graph.nodes if id(node) in nodes and self._changes[id(node)] < number)
        return {id(tensor) for node in final for tensor in node.outputs}

    def _handed_on(self, done: set[int], number: int) -> list[str]:
        """Returns the tensors that later portions start from."""
        later = [self._known[name] for portion in self._portions[number + 1 :] for name in portion.names]
        _, tensors = needed(later, stop=done)
        return [name for name, tensor in self._known.items() if id(tensor) in tensors & done]

    def _run(
        self, wanted: Sequence[Tensor], handed_on: Sequence[str], held: list[dict[str, Array]]
    ) -> Iterator[dict[str, Array]]:
        """Yields the values of tensors, known or computed, by name; those of ``handed_on`` where they are tensors."""
        constants = {tensor.name: tensor.values for tensor in wanted if isinstance(tensor, Constant)}
        known = {*constants, *(held[0] if held else ()), *(tensor.name for tensor in self._graph.inputs)}
        names = dict.fromkeys([*(tensor.name for tensor in wanted), *handed_on])
        computed = [name for name in names if name not in known]
        if not computed:
            for index, feeds in enumerate(self._data):
                yield {**constants, **feeds, **_taken(held, index)}
            return
        start = self._start(computed, held[0] if held else {})
        dtypes = {name: held[0][name].dtype for name in start}
        with session(excerpt(self._graph, computed, dtypes), self._threads) as running:
            for index, feeds in enumerate(self._data):
                before = _taken(held, index)
                given = {name: before[name] for name in start}
                values = {**constants, **feeds, **before, **running.run({**feeds, **given})}
                missing = {tensor.name for tensor in wanted} - values.keys()
                if missing:
                    raise ValidationError(f"calibration: '{min(missing)}' has no value: it is not a tensor")
                yield values

    def _start(self, computed: Sequence[str], held: Collection[str]) -> list[str]:
        """Returns those of the held tensors that others are computed from: ONNX Runtime refuses inputs that a graph does not have."""
        _, tensors = needed((self._known[name] for name in computed), stop={id(self._known[name]) for name in held})
        return [name for name in held if id(self._known[name]) in tensors]

    def _fits(self, first: dict[str, Array], handed_on: Sequence[str]) -> bool:
        """Whether what one sample hands on is all tensors, and there is memory for that of all samples."""
        return len(first) == len(handed_on) and len(self._data) * sum(array.nbytes for array in first.values()) <= self._memory


def _taken(held: list[dict[str, Array]], index: int) -> dict[str, Array]:
    """Returns what is held of a sample and lets go of it: the next portion's takes its place in memory."""
    if not held:
        return {}
    values, held[index] = held[index], {}
    return values
