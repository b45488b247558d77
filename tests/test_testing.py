"""The contract suite: it lets every pass of ours through, and each of these broken passes trips the clause it breaks.

A broken pass is `Halve`, which keeps the contract, with one thing done wrong.
"""

from __future__ import annotations

import copy
import itertools
import logging
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxshrink.contract import Change, Context, Pass, Report, Skip
from onnxshrink.errors import PassError
from onnxshrink.graph.edit import constant_bytes, set_values
from onnxshrink.graph.files import load
from onnxshrink.graph.ir import Constant, Graph, Node, Variable
from onnxshrink.graph.weights import weights
from onnxshrink.options import option
from onnxshrink.registry import pass_class, pass_names
from onnxshrink.testing import check_pass
from onnxshrink.testing_models import NEWEST_OPSET, OLDEST_OPSET, awkward_models
from tests import oracle

MODELS = list(awkward_models())
FEW_MODELS = [
    item for item in MODELS if item[0] in ("opset 7", "opset 13", "opset 26") or not item[0].startswith("opset")
]
SMALL = oracle.make_model(
    [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "v"], ["y"])],
    [oracle.tensor("x", [1, 8])],
    [oracle.tensor("y", [1, 8])],
    [oracle.value(name, np.random.default_rng(0).standard_normal((8, 8)), np.float32) for name in ("w", "v")],
    opset=13,
)


def sites(graph: Graph) -> list[str]:
    return [weight.site for weight in weights(graph)]


class TestOurPasses:
    @pytest.mark.parametrize("name", pass_names())
    def test_keep_the_contract_on_every_model(self, name: str) -> None:
        """Passes whose candidates are the dense weights answer for each of them; others have other candidates, or one graph."""
        check_pass(pass_class(name)(), MODELS, sites=sites if name in ("share-weights", "sparsify") else None)

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("tidy", {"fold_constants": False, "fold_batch_norm": False}),
            ("tidy", {"strip_notes": True}),
            ("sparsify", {"sparsity": 0.9, "scope": "global"}),
            ("sparsify", {"pattern": "2:4"}),
            ("sparsify", {"pattern": "4x2", "sparsity": 0.3}),
            ("sparsify", {"sparsity": 1.0}),
            ("sparsify", {"sparsity": 0.0}),
            ("share-weights", {"bits": 1, "method": "kmeans"}),
            ("share-weights", {"bits": 3, "per": "tensor"}),
            ("share-weights", {"bits": 4, "method": "uniform", "per": "channel"}),
            ("share-weights", {"bits": 2, "method": "kmeans", "per": "channel"}),
            ("share-weights", {"method": "exact"}),
        ],
        ids=str,
    )
    def test_keep_it_with_other_options(self, name: str, options: dict[str, Any]) -> None:
        check_pass(pass_class(name)(**options), FEW_MODELS, sites=None if name == "tidy" else sites, seed=7)


class TestAwkwardModels:
    def test_have_names_of_their_own_and_cover_every_opset(self) -> None:
        names = [name for name, _ in MODELS]
        assert len(names) == len(set(names))
        assert {f"opset {version}" for version in range(OLDEST_OPSET, NEWEST_OPSET + 1)} <= set(names)

    @pytest.mark.parametrize("model", [model for _, model in MODELS], ids=[name for name, _ in MODELS])
    def test_are_valid_and_run(self, model: onnx.ModelProto) -> None:
        onnx.checker.check_model(model, full_check=True)
        running = oracle.session(model)
        assert all(np.isfinite(output).all() for output in running.run(None, oracle.random_feeds(running)))

    def test_are_the_same_every_time(self) -> None:
        assert [model.SerializeToString() for _, model in awkward_models()] == [
            m.SerializeToString() for _, m in MODELS
        ]
        other = dict(awkward_models(seed=1))["opset 13"]
        assert other.SerializeToString() != dict(MODELS)["opset 13"].SerializeToString()


@dataclass(frozen=True, kw_only=True)
class Halve(Pass):
    """Halves every weight that is not halved yet, which it knows by a first element of zero."""

    name: ClassVar[str] = "halve"
    factor: float = option(0.5, "what remains", low=0.0, high=1.0)

    def apply(self, graph: Graph, context: Context) -> Report:
        answers = [self.halve(graph, weight.constant) for weight in weights(graph)]
        return Report(
            [answer for answer in answers if isinstance(answer, Change)],
            [answer for answer in answers if isinstance(answer, Skip)],
        )

    def halve(self, graph: Graph, constant: Constant) -> Change | Skip:
        values = constant.values * np.float32(self.factor)
        if values.flat[0] == 0:
            return Skip(constant.name, "is halved already")
        values.flat[0] = 0
        size = constant_bytes(constant, graph)
        set_values(constant, values)
        return Change(constant.name, size, constant_bytes(constant, graph), "halved")


def broken(name: str, **members: Any) -> Pass:
    """Returns a `Halve` of which one member is replaced."""
    body = {
        "__doc__": "Halves, badly.",
        "__module__": __name__,
        "name": "halve",
        "__annotations__": {"name": ClassVar[str]},
    }
    return dataclass(frozen=True, kw_only=True)(type(name, (Halve,), {**body, **members}))()


Apply = Callable[[Halve, Graph, Context], Report]


def after(work: Callable[[Graph, Context], Any]) -> Apply:
    """Returns an apply that halves, and then does something else."""

    def apply(self: Halve, graph: Graph, context: Context) -> Report:
        report = Halve.apply(self, graph, context)
        work(graph, context)
        return report

    return apply


def reported(change: Callable[[Report], Report]) -> Apply:
    """Returns an apply that halves, and reports something else."""
    return lambda self, graph, context: change(Halve.apply(self, graph, context))


def log(graph: Graph, context: Context) -> None:
    logging.getLogger("halve").warning("halved")


def rename_output(graph: Graph, context: Context) -> None:
    graph.outputs[0].name = "z"


def widen_input(graph: Graph, context: Context) -> None:
    assert isinstance(graph.inputs[0], Variable)
    graph.inputs[0].shape = ("batch", 8)


def change_skipped(self: Halve, graph: Graph, context: Context) -> Report:
    set_values(weights(graph)[0].constant, np.zeros((8, 8), np.float32))
    return Report(skips=[Skip("w", "all good"), Skip("v", "all good")])


def write_to_shared_message(self: Halve, graph: Graph, context: Context) -> Report:
    graph.constants[0].stored.tensor.raw_data = bytes(graph.constants[0].nbytes)
    return Halve.apply(self, graph, context)


def append_unknown_op(graph: Graph, context: Context) -> None:
    graph.nodes.append(Node("Nonsense", [graph.outputs[0]], [Variable("unused")]))


def set_nan(self: Halve, graph: Graph, context: Context) -> Report:
    values = weights(graph)[0].constant.values
    set_values(weights(graph)[0].constant, np.full_like(values, np.nan))
    return Report([Change("w", 9, 9, "poisoned")], [Skip("v", "no need")], ["it poisons again and again"])


COUNTER = itertools.count(1)


def count_up(graph: Graph, context: Context) -> None:
    constant = weights(graph)[1].constant
    set_values(constant, constant.values + np.float32(next(COUNTER)))


def depend_on_threads(graph: Graph, context: Context) -> None:
    if context.executor is not None:
        constant = weights(graph)[1].constant
        set_values(constant, constant.values + np.float32(1))


def again_and_again(self: Halve, graph: Graph, context: Context) -> Report:
    changes = []
    for weight in weights(graph):
        set_values(weight.constant, weight.constant.values * np.float32(self.factor))
        changes.append(Change(weight.site, 9, 9, "halved"))
    return Report(changes)


def silent_the_second_time(self: Halve, graph: Graph, context: Context) -> Report:
    report = again_and_again(self, graph, context)
    first = weights(graph)[0].constant
    if first.values.flat[1] == 0:
        return Report(notes=["nothing to do"])
    values = first.values.copy()
    values.flat[1] = 0
    set_values(first, values)
    return report


BROKEN: list[tuple[Pass, str]] = [
    (broken("Loud", apply=after(lambda *_: print("done"))), "it must print nothing, got 'done\\n'"),  # noqa: T201
    (broken("Loud", apply=after(lambda *_: sys.stderr.write("oh"))), "it must print nothing, got 'oh'"),
    (broken("Logs", apply=after(log)), "it must log nothing, got 'halved'"),
    (broken("Random", apply=after(lambda *_: random.random())), "it must not use global random generators"),
    (broken("Random", apply=after(lambda *_: np.random.rand())), "it must not use global random generators"),  # noqa: NPY002
    (broken("Seeds", apply=after(lambda *_: np.random.seed(5))), "it must not use global random generators"),  # noqa: NPY002
    (
        broken("Twice", apply=reported(lambda r: replace(r, skips=[*r.skips, Skip("w", "again")]))),
        "every site must be answered for once, got w twice",
    ),
    (
        broken("Mute", apply=lambda *_: Report(skips=[Skip("w", "fine"), Skip("v", "")])),
        "every skip must give a reason",
    ),
    (
        broken("Mute", apply=reported(lambda r: replace(r, changes=[replace(c, detail="") for c in r.changes]))),
        "every change must say what it did",
    ),
    (
        broken("Forgets", apply=reported(lambda r: replace(r, changes=r.changes[:1]))),
        "every candidate site must be a Change or a Skip, got nothing for ['v']",
    ),
    (broken("Renames", apply=after(rename_output)), "graph inputs and outputs must keep names, types and shapes"),
    (broken("Widens", apply=after(widen_input)), "graph inputs and outputs must keep names, types and shapes"),
    (
        broken("Drops", apply=after(lambda graph, _: graph.outputs.clear())),
        "graph inputs and outputs must keep names, types and shapes",
    ),
    (broken("Sly", apply=change_skipped), "'w' was skipped, so its values must not change"),
    (
        broken("Writes", apply=write_to_shared_message),
        "it must not change the graph it was copied from, nor its arrays",
    ),
    (
        broken("Boasts", apply=reported(lambda r: replace(r, changes=[replace(c, bytes_after=1) for c in r.changes]))),
        "bytes_after - bytes_before must sum to the measured 0 within 24 bytes, got -",
    ),
    (
        broken("Invents", apply=after(append_unknown_op)),
        "its result must be valid ONNX, got: No Op registered for Nonsense",
    ),
    (broken("Poisons", apply=set_nan), "outputs must stay finite"),
    (broken("Counts", apply=after(count_up)), "the same input and seed must give the same bytes, threads or not"),
    (
        broken("Races", apply=after(depend_on_threads)),
        "the same input and seed must give the same bytes, threads or not",
    ),
    (
        broken("Grinds", apply=again_and_again),
        "a second application must change nothing or say why in a note, got ['w', 'v']",
    ),
    (broken("Sneaks", apply=silent_the_second_time), "a second application that changes something must report it"),
]


class TestBrokenPasses:
    def test_the_unbroken_one_is_let_through(self) -> None:
        check_pass(Halve(), [("two layers", SMALL)], sites=sites)
        check_pass(broken("Same"), [("two layers", SMALL)], sites=sites)

    @pytest.mark.parametrize(("subject", "clause"), BROKEN, ids=[type(subject).__name__ for subject, _ in BROKEN])
    def test_trip_their_clause(self, subject: Pass, clause: str) -> None:
        with pytest.raises(PassError) as caught:
            check_pass(subject, [("two layers", copy.deepcopy(SMALL))], sites=sites)
        assert str(caught.value).startswith(f"halve, on a model with two layers: {clause}")

    def test_a_note_excuses_a_second_change(self) -> None:
        def apply(self: Halve, graph: Graph, context: Context) -> Report:
            return replace(again_and_again(self, graph, context), notes=["it is a product, not a state"])

        check_pass(broken("Explains", apply=apply), [("two layers", SMALL)], sites=sites)

    def test_outputs_must_keep_their_shape_when_it_is_not_declared(self) -> None:
        model = oracle.make_model(
            [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Reshape", ["h", "shape"], ["y"])],
            [oracle.tensor("x", [1, 8])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["a", "b"])],
            [oracle.value("w", np.ones((8, 8)), np.float32), oracle.value("shape", [2, 4], np.int64)],
        )

        def apply(self: Halve, graph: Graph, context: Context) -> Report:
            (shape,) = [constant for constant in graph.constants if constant.name == "shape"]
            size = constant_bytes(shape, graph)
            set_values(shape, np.array([4, 2], np.int64))
            return Report([Change("shape", size, size, "turned")])

        with pytest.raises(PassError, match="ONNX Runtime must give outputs of the same names, shapes and types"):
            check_pass(broken("Turns", apply=apply), [("a reshape", model)])

    def test_what_a_pass_raises_comes_out(self) -> None:
        def apply(self: Halve, graph: Graph, context: Context) -> Report:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            check_pass(broken("Fails", apply=apply), [("two layers", SMALL)])


def endless(self: Halve) -> Halve:
    return replace(self, factor=self.factor / 2)


def another(self: Halve) -> Pass:
    return Halve()


def never_applied(self: Any, graph: Graph, context: Context) -> Report:
    raise AssertionError("declarations are checked first")


def undeclared() -> Iterator[tuple[str, Pass, str]]:
    body = {"__module__": __name__, "apply": never_applied}
    named = {**body, "name": "broken", "__annotations__": {"name": ClassVar[str]}}
    documented = {**named, "__doc__": "Does something."}
    frozen = dataclass(frozen=True, kw_only=True)
    for name in ("Broken", "broken_pass", "broken-", "-broken", "broken pass", "bröken", ""):
        yield name, frozen(type("B", (Pass,), {**documented, "name": name}))(), "B: its name must be kebab-case"
    yield "no docstring", frozen(type("C", (Pass,), named))(), "C: it must say in its docstring what it does"
    yield "blank docstring", frozen(type("D", (Pass,), {**named, "__doc__": "  "}))(), "D: it must say in its docstring"
    plain = type("E", (Pass,), documented)
    yield "no dataclass", plain(), "E: it must be a frozen keyword-only dataclass"
    number = {**documented, "number": option(1, "a number"), "__annotations__": {"name": ClassVar[str], "number": int}}
    positional = dataclass(frozen=True)(type("F", (Pass,), number))
    yield "positional", positional(), "F: it must be a frozen keyword-only dataclass"
    bare = {**number, "number": 1}
    yield "bare field", frozen(type("G", (Pass,), bare))(), "G: field 'number' must be declared with option()"
    yield "endless", broken("H", weaker=endless), "H: weaker() must come to an end within 64 steps"
    yield "itself", broken("I", weaker=lambda self: self), "I: weaker() must come to an end within 64 steps"
    yield "another", broken("J", weaker=another), "J: weaker() must return a pass of the same class, or None"


class TestDeclarations:
    @pytest.mark.parametrize(
        ("subject", "message"), [case[1:] for case in undeclared()], ids=[case[0] or "empty" for case in undeclared()]
    )
    def test_are_checked_before_anything_runs(self, subject: Pass, message: str) -> None:
        with pytest.raises(PassError) as caught:
            check_pass(subject, [("two layers", SMALL)])
        assert str(caught.value).startswith(message)

    def test_a_pass_may_become_weaker_64_times_at_most(self) -> None:
        def weaker(self: Halve) -> Self | None:
            return replace(self, factor=self.factor - 1 / 128) if self.factor > 1 / 128 else None

        check_pass(broken("Patient", weaker=weaker), [("two layers", SMALL)])


def test_the_subject_is_loaded_afresh_for_each_model() -> None:
    """`Halve` applied to a model that it has changed would skip; both copies of the model must be changed."""
    seen = []

    def apply(self: Halve, graph: Graph, context: Context) -> Report:
        report = Halve.apply(self, graph, context)
        seen.append(len(report.changes))
        return report

    check_pass(broken("Seen", apply=apply), [("a", SMALL), ("b", SMALL)])
    assert seen == [2, 2, 2, 0] * 2
    assert load(SMALL).constants[0].values.flat[0] != 0
