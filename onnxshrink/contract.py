"""What a pass is, what it is given, and what it must give back.

A pass is a frozen keyword-only dataclass whose fields are its options:

    @dataclass(frozen=True, kw_only=True)
    class Sparsify(Pass):
        name: ClassVar[str] = "sparsify"
        sparsity: float = option(0.5, "share of weights set to zero", low=0.0, high=1.0)

        def apply(self, graph: Graph, context: Context) -> Report: ...

It edits the graph it is given, which is its own copy, and answers for every candidate site with a `Change` or a `Skip`. It writes
into no array (arrays are frozen and shared between copies), logs nothing, prints nothing, reads no file and uses no global
randomness: same input and seed, same bytes. `onnxshrink.testing.check_pass` holds any pass to this.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self, TypeVar

import numpy as np

from onnxshrink.graph.ir import Graph
from onnxshrink.graph.weights import Weight
from onnxshrink.numerics.gram import Gram, PairedGram
from onnxshrink.options import check_options

__all__ = ["Activations", "Change", "Context", "Pass", "Report", "Rule", "Skip", "Step", "Trials"]

_In = TypeVar("_In")
_Out = TypeVar("_Out")
_PassT = TypeVar("_PassT", bound="Pass")


@dataclass(frozen=True)
class Change:
    """One site that a pass rewrote.

    Attributes:
        site: model-wide name of the tensor, or of the node's first output.
        bytes_before: bytes in the file that the site's tensors and nodes took.
        bytes_after: bytes that what replaces them takes.
        detail: one line for people.
    """

    site: str
    bytes_before: int
    bytes_after: int
    detail: str


@dataclass(frozen=True)
class Skip:
    """One site that a pass left exactly as it was, and why."""

    site: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What a pass did: every candidate site once, in ``changes`` or in ``skips``; ``notes`` for the rest.

    ``missed`` says which target of the pass's own could not be reached, and what was; the result counts as the best there is.
    """

    changes: Sequence[Change] = ()
    skips: Sequence[Skip] = ()
    notes: Sequence[str] = ()
    missed: str = ""


class Activations(Protocol):
    """Calibration data, seen from a pass. Nothing runs before the first value is asked for."""

    @property
    def count(self) -> int:
        """How many samples there are."""

    def fold(self, index: int, count: int) -> tuple[Activations, Activations]:
        """Returns (the rest, every ``count``-th sample from ``index`` on): what was fitted to the one is judged by the other."""

    def samples(self, graph: Graph, names: Sequence[str]) -> Iterator[Mapping[str, np.ndarray[Any, np.dtype[Any]]]]:
        """Yields, for each calibration sample, the values of the named tensors of the main graph, by name."""

    def grams(self, graph: Graph, weights: Sequence[Weight]) -> Iterator[tuple[Weight, Gram]]:
        """Yields the moments, over as many samples as it takes, of what each weight is multiplied with.

        In the order in which the graph runs; weights that meet the same values come together and share one Gram object. Weights
        that have no `onnxshrink.graph.lowering` are left out: `lowerings` there says why.
        """

    def paired_grams(
        self, graph: Graph, original: Graph, stages: Sequence[Sequence[Weight]]
    ) -> Iterator[Sequence[tuple[Weight, PairedGram]]]:
        """Yields, portion by portion, the moments of what weights meet now, and of what the outputs of their layers lack of the original's.

        ``graph`` is a copy of ``original`` made for this; ``stages`` are of its weights, each after all that it depends on. Between
        two portions, those that came may get new values.
        """


class Trials(Protocol):
    """Runs of whole graphs, seen from a pass. Nothing runs before it is asked for."""

    def macs(self, graph: Graph) -> Mapping[int, float] | None:
        """Returns the multiply-accumulates of every node that ran on one sample, by id; of main graph and bodies. None if unknown."""

    def shapes(self, graph: Graph) -> Mapping[str, tuple[int, ...]]:
        """Returns the shapes of what the nodes of the main graph computed from one sample, by name."""

    def latency_ratio(self, before: Graph, after: Graph) -> float:
        """Returns the time of the second graph over that of the first, measured in turns."""

    def part_ratio(self, before: Graph, after: Graph, inputs: Sequence[str], outputs: Sequence[str]) -> float:
        """Returns the same of what computes some tensors of the main graphs from others, by name; infinite if it does not run."""


@dataclass(frozen=True)
class Rule:
    """Options for the sites whose tensor or node names match a glob; the last matching rule wins, option by option.

    Attributes:
        match: shell-style pattern, case-sensitive, e.g. ``*/layer4/*``.
        options: constructor arguments of the pass that differ for these sites.
        skip: True leaves these sites alone, False takes them up again after an earlier rule; None leaves that as it was.
    """

    match: str
    options: Mapping[str, Any] = field(default_factory=dict)
    skip: bool | None = None

    def matches(self, names: Iterable[str]) -> bool:
        """Whether any of the names fits the pattern."""
        return any(fnmatch.fnmatchcase(name, self.match) for name in names)


@dataclass(frozen=True)
class Context:
    """What a pass may use beside the graph.

    Attributes:
        seed: of all randomness.
        rules: per-site options.
        activations: calibration data, or None.
        executor: for parallel work, or None to work in this thread.
        trials: runs of whole graphs, on a sample that may be synthetic, or None where nothing is to run.
        rounded_later: whether a pass that comes after this one rounds weights, so that what it makes must bear that.
        progress: called with the number of sites done and their total.
    """

    seed: int = 0
    rules: Sequence[Rule] = ()
    activations: Activations | None = None
    executor: Executor | None = None
    progress: Callable[[int, int], None] = lambda done, total: None
    trials: Trials | None = None
    rounded_later: bool = False
    _met: set[str] = field(default_factory=set, compare=False, repr=False)

    @property
    def unmet_rules(self) -> list[str]:
        """The globs that no site asked about has matched so far: misspelt ones must not pass in silence."""
        return [rule.match for rule in self.rules if rule.match not in self._met]

    def options(self, default: _PassT, names: Iterable[str]) -> _PassT | None:
        """Returns the pass with the options that hold for a site of these names, or None when a rule skips it."""
        names = list(names)
        chosen, skip = default, False
        for rule in self.rules:
            if rule.matches(names):
                self._met.add(rule.match)
                skip = skip if rule.skip is None else rule.skip
                chosen = chosen.with_options(rule.options)
        return None if skip else chosen

    def rng(self, site: str) -> np.random.Generator:
        """Returns a generator that depends on the seed and the site alone, not on the order of work."""
        return np.random.default_rng([self.seed, zlib.crc32(site.encode())])

    def map(self, function: Callable[[_In], _Out], items: Sequence[_In], done: int = 0, total: int | None = None) -> list[_Out]:
        """Returns the results in order, computed by the executor, and reports progress as they come.

        Args:
            function: called from several threads.
            items: what it is called with.
            done: how many were done before, where these are a part of the work.
            total: of the work; these alone by default.
        """
        results = []
        for result in (self.executor.map if self.executor else map)(function, items):
            results.append(result)
            self.progress(done + len(results), len(items) if total is None else total)
        return results


@dataclass(frozen=True, kw_only=True)
class Pass(ABC):
    """A rewrite of the graph. Subclasses are frozen keyword-only dataclasses whose fields are declared with `option`."""

    name: ClassVar[str]
    runs_last: ClassVar[bool] = False  # passes that others want to end with (`finish_with`) come before it nevertheless
    rounds_weights: ClassVar[bool] = False  # whether it moves weights off their values: to levels, to zero

    def __post_init__(self) -> None:
        check_options(self.name, self)

    @abstractmethod
    def apply(self, graph: Graph, context: Context) -> Report:
        """Edits the graph in place and reports every candidate site."""

    @property
    def sites_are_independent(self) -> bool:
        """Whether rules can switch single sites off without changing what becomes of the others."""
        return True

    @property
    def finish_with(self) -> Sequence[str]:
        """Names of passes that must run after all others for this one to pay, unless the recipe has them anyway."""
        return ()

    def with_options(self, options: Mapping[str, Any]) -> Self:
        """Returns the pass with some options changed, as a rule asks for."""
        return dataclasses.replace(self, **options)

    def weaker(self) -> Self | None:
        """Returns a gentler variant to try when the result is past the tolerance, or None."""
        return None

    def spared(self) -> Mapping[str, Any] | None:
        """Returns options for single sites that cannot bear this pass at full strength, or None to leave those alone."""
        return None


@dataclass(frozen=True)
class Step:
    """A pass and the rules that change its options for some sites."""

    run: Pass
    rules: Sequence[Rule] = ()
