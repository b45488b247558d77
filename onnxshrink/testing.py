"""The contract suite for passes, for the built-in ones and for anybody's.

    from onnxshrink.testing import check_pass

    def test_my_pass_keeps_the_contract():
        check_pass(MyPass(strength=3))

Each clause is checked on two dozen tiny models, one for each way in which real ones are awkward. A broken clause raises a `PassError`
that names the pass, the model and the clause.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import random
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnx

from onnxshrink.contract import Context, Pass, Report
from onnxshrink.errors import PassError
from onnxshrink.graph.check import Level, check
from onnxshrink.graph.edit import sort_nodes
from onnxshrink.graph.exporter import to_model
from onnxshrink.graph.files import load
from onnxshrink.graph.ir import Graph
from onnxshrink.pipeline import interface
from onnxshrink.runtime import session
from onnxshrink.synthetic import synthetic_samples
from onnxshrink.testing_models import awkward_models

__all__ = ["Sites", "check_pass"]

Sites = Callable[[Graph], Iterable[str]]
_LENGTH_BYTES = 8  # lengths of the messages around a site may take a byte or so more or less than the site's own bytes
_MOST_WEAKENINGS = 64


def check_pass(
    subject: Pass,
    models: Iterable[tuple[str, onnx.ModelProto]] | None = None,
    *,
    sites: Sites | None = None,
    seed: int = 0,
) -> None:
    """Holds a pass to its contract.

    Args:
        subject: the pass, with the options to test.
        models: (name, model) pairs; by default `onnxshrink.testing_models.awkward_models`.
        sites: returns the candidate sites of a graph, each of which must then be answered for.
        seed: given to the pass.

    Raises:
        PassError: a clause is broken.
    """
    _check_declaration(subject)
    for name, model in awkward_models() if models is None else models:
        _Trial(subject, name, model, seed).run(sites)


def _check_declaration(subject: Pass) -> None:
    cls = type(subject)

    def demand(condition: bool, clause: str) -> None:
        if not condition:
            raise PassError(f"{cls.__name__}: {clause}")

    demand(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", cls.name) is not None, "its name must be kebab-case")
    written = (cls.__doc__ or "").strip()
    demand(bool(written) and not written.startswith(f"{cls.__name__}("), "it must say in its docstring what it does")
    parameters = cls.__dict__.get("__dataclass_params__")  # its own, not those of Pass
    keyword_only = all(field.kw_only for field in dataclasses.fields(subject))
    demand(parameters is not None and parameters.frozen and keyword_only, "it must be a frozen keyword-only dataclass")
    for field in dataclasses.fields(subject):
        demand("onnxshrink" in field.metadata, f"field '{field.name}' must be declared with option()")
    weaker: Pass | None = subject
    for _ in range(_MOST_WEAKENINGS):
        weaker = weaker.weaker() if weaker is not None else None
        demand(weaker is None or type(weaker) is cls, "weaker() must return a pass of the same class, or None")
    demand(weaker is None, f"weaker() must come to an end within {_MOST_WEAKENINGS} steps")


@dataclasses.dataclass
class _Trial:
    """One pass on one model."""

    subject: Pass
    name: str
    model: onnx.ModelProto
    seed: int

    def run(self, sites: Sites | None) -> None:
        original = load(self.model)
        before = _serialised(original)
        result, report = self.apply(original)
        self.demand(_serialised(original) == before, "it must not change the graph it was copied from, nor its arrays")
        self.check_report(original, report, sites)
        self.demand(interface(result) == interface(original), "graph inputs and outputs must keep names, types and shapes")
        self.check_skips(original, result, report)
        self.check_bytes(before, result, report)
        self.check_validity(original, result)
        self.check_repetition(original, result)

    def demand(self, condition: bool, clause: str) -> None:
        if not condition:
            raise PassError(f"{self.subject.name}, on a model with {self.name}: {clause}")

    def apply(self, graph: Graph, context: Context | None = None) -> tuple[Graph, Report]:
        """Applies the pass to a copy and sorts the result; nothing may be printed, no global generator used."""
        work = graph.copy()
        states = (random.getstate(), str(np.random.get_state()))  # noqa: NPY002  # the very state that must not move
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), _logged() as logged:
            report = self.subject.apply(work, context or Context(seed=self.seed))
        self.demand(not logged, f"it must log nothing, got {''.join(logged)[:80]!r}")
        self.demand(not printed.getvalue(), f"it must print nothing, got {printed.getvalue()[:80]!r}")
        unmoved = states == (random.getstate(), str(np.random.get_state()))  # noqa: NPY002  # as above
        self.demand(unmoved, "it must not use global random generators")
        sort_nodes(work)
        return work, report

    def check_report(self, original: Graph, report: Report, sites: Sites | None) -> None:
        named = [*(change.site for change in report.changes), *(skip.site for skip in report.skips)]
        self.demand(len(named) == len(set(named)), f"every site must be answered for once, got {_repeated(named)} twice")
        self.demand(all(skip.reason for skip in report.skips), "every skip must give a reason")
        self.demand(all(change.detail for change in report.changes), "every change must say what it did")
        missing = set(sites(original)) - set(named) if sites is not None else set()
        self.demand(not missing, f"every candidate site must be a Change or a Skip, got nothing for {sorted(missing)}")

    def check_skips(self, original: Graph, result: Graph, report: Report) -> None:
        """A skipped tensor is left exactly as it was."""
        old, new = _constants(original), _constants(result)
        for skip in report.skips:
            if skip.site in old and skip.site in new:
                same = old[skip.site].tobytes() == new[skip.site].tobytes()
                self.demand(same, f"'{skip.site}' was skipped, so its values must not change")

    def check_bytes(self, before: bytes, result: Graph, report: Report) -> None:
        claimed = sum(change.bytes_after - change.bytes_before for change in report.changes)
        measured = len(_serialised(result)) - len(before)
        allowed = _LENGTH_BYTES * (1 + len(report.changes))
        self.demand(
            abs(claimed - measured) <= allowed,
            f"bytes_after - bytes_before must sum to the measured {measured} within {allowed} bytes, got {claimed}",
        )

    def check_validity(self, original: Graph, result: Graph) -> None:
        complaint = check(to_model(result), Level.SHAPES)
        self.demand(complaint is None, f"its result must be valid ONNX, got: {complaint}")
        with session(original, role="original") as running, session(result) as shrunk:
            feeds = synthetic_samples(original, running, 1, self.seed)[0]
            expected, got = running.run(feeds), shrunk.run(feeds)
        self.demand(
            {name: (array.shape, array.dtype) for name, array in expected.items()}
            == {name: (array.shape, array.dtype) for name, array in got.items()},
            "ONNX Runtime must give outputs of the same names, shapes and types",
        )
        finite = all(np.isfinite(array).all() for array in got.values() if array.dtype.kind == "f")
        self.demand(finite, "outputs must stay finite")

    def check_repetition(self, original: Graph, result: Graph) -> None:
        expected = _serialised(result)
        with ThreadPoolExecutor(2) as executor:
            for context in (Context(seed=self.seed), Context(seed=self.seed, executor=executor)):
                again, _ = self.apply(original, context)
                self.demand(_serialised(again) == expected, "the same input and seed must give the same bytes, threads or not")
        twice, report = self.apply(result)
        unchanged = _serialised(twice) == expected
        self.demand(unchanged or bool(report.changes), "a second application that changes something must report it")
        self.demand(
            not report.changes or bool(report.notes),
            f"a second application must change nothing or say why in a note, got {[c.site for c in report.changes][:3]}",
        )


@contextlib.contextmanager
def _logged() -> Iterator[list[str]]:
    """Gives a list of what is logged meanwhile."""
    messages: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(listener)
    try:
        yield messages
    finally:
        logging.getLogger().removeHandler(listener)


def _serialised(graph: Graph) -> bytes:
    return bytes(to_model(graph).SerializeToString(deterministic=True))


def _constants(graph: Graph) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
    return {
        scope.address(constant.name): constant.values for scope in graph.scopes() for constant in scope.graph.constants
    }


def _repeated(names: list[str]) -> str:
    return next((name for name in names if names.count(name) > 1), "")
