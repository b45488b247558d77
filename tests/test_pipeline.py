"""Steps one after the other: what is kept, what is rolled back without a trace, and what is written down about it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxshrink import api
from onnxshrink.api import Compressed, compress
from onnxshrink.contract import Change, Context, Pass, Report, Rule, Skip, Step
from onnxshrink.errors import OptionError
from onnxshrink.graph.edit import set_values
from onnxshrink.graph.exporter import to_model
from onnxshrink.graph.files import load
from onnxshrink.graph.ir import Constant, Graph, Node, Variable
from onnxshrink.graph.weights import weights
from onnxshrink.options import option
from onnxshrink.passes.share_weights import ShareWeights
from onnxshrink.passes.sparsify import Sparsify
from onnxshrink.passes.tidy import Tidy
from onnxshrink.pipeline import interface
from onnxshrink.report import PassReport
from onnxshrink.validate import Tolerance
from tests import oracle

Array = np.ndarray[Any, np.dtype[Any]]
WIDTH = 48


def normal(*shape: int, seed: int = 0) -> Array:
    return (np.random.default_rng([seed, *shape]).standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)


def layers(gains: Mapping[str, float], opset: int = 17) -> onnx.ModelProto:
    """Returns y = Σ gain · x · W over the names; an error in W counts in proportion to its gain."""
    nodes, values, last = [], [], ""
    for seed, (name, gain) in enumerate(gains.items()):
        values += [oracle.value(name, normal(WIDTH, WIDTH, seed=seed)), oracle.value(f"{name}_gain", np.float32(gain))]
        nodes.append(helper.make_node("MatMul", ["x", name], [f"{name}_h"], name=f"matmul_{name}"))
        nodes.append(helper.make_node("Mul", [f"{name}_h", f"{name}_gain"], [f"{name}_y"]))
        if last:
            nodes.append(helper.make_node("Add", [last, f"{name}_y"], [f"{name}_sum"]))
        last = f"{name}_sum" if last else f"{name}_y"
    nodes[-1].output[0] = "y"
    return oracle.make_model(
        nodes, [oracle.tensor("x", ["n", WIDTH])], [oracle.tensor("y", ["n", WIDTH])], values, opset=opset
    )


MODEL = layers({"a": 1.0, "b": 2.0})
SINGLE = layers({"a": 1.0})  # no site to spare
INPUTS = {"x": np.random.default_rng(9).standard_normal((40, WIDTH)).astype(np.float32)}


def squeezed(
    *steps: Pass | Step, model: onnx.ModelProto = MODEL, limit: float | None = None, **options: Any
) -> Compressed:
    """Compresses with a limit in dB, or none."""
    return compress(model, steps, calibration=INPUTS, tolerance=Tolerance(min_sqnr_db=limit), **options)


def written(result: Compressed | onnx.ModelProto) -> bytes:
    model = result if isinstance(result, onnx.ModelProto) else result.to_model()
    return bytes(model.SerializeToString(deterministic=True))


UNTOUCHED = written(to_model(load(MODEL)))


def only(result: Compressed) -> PassReport:
    (step,) = (step for step in result.report.passes if step.name != "pack-sparse")  # what sparsify ends with
    return step


def sqnr(original: onnx.ModelProto, result: onnx.ModelProto, x: Array) -> float:
    """Returns the SQNR in dB by a formula of its own."""
    before, after = (oracle.session(model).run(None, {"x": x})[0].astype(np.float64) for model in (original, result))
    return float(10 * np.log10(np.sum(before**2) / np.sum((after - before) ** 2)))


@dataclass(frozen=True, kw_only=True)
class Scale(Pass):
    """Multiplies weights, and claims that it saves bytes."""

    name: ClassVar[str] = "scale"
    factor: float = option(1.1, "by how much")
    steps: int = option(0, "how often a weaker form may be tried")

    def weaker(self) -> Self | None:
        return replace(self, factor=1 + (self.factor - 1) / 10, steps=self.steps - 1) if self.steps else None

    def apply(self, graph: Graph, context: Context) -> Report:
        changes, skips = [], []
        for weight in weights(graph):
            chosen = context.options(self, weight.names)
            if chosen is None or weight.constant.size < WIDTH or chosen.factor == 1:
                skips.append(Skip(weight.site, "left alone"))
                continue
            set_values(weight.constant, weight.constant.values * np.float32(chosen.factor))
            changes.append(Change(weight.site, 20, 10, f"times {chosen.factor:g}"))
        return Report(changes, skips, ["a note of its own"])


class TestKeeping:
    def test_a_result_within_the_limit_is_kept(self) -> None:
        result = squeezed(Scale(factor=1.001), limit=59)
        step = only(result)
        assert (step.outcome, step.reason, step.name, step.options) == (
            "kept",
            "",
            "scale",
            {"factor": 1.001, "steps": 0},
        )
        assert step.chosen == ("factor",)
        assert step.bytes_before == step.bytes_after == len(UNTOUCHED)
        assert sqnr(MODEL, result.to_model(), INPUTS["x"]) == pytest.approx(60, abs=0.1)
        assert step.outputs[0].sqnr_db == pytest.approx(60, abs=0.1)
        assert step.notes == ("a note of its own",)

    def test_the_original_is_what_every_step_is_compared_with(self) -> None:
        """Each step moves the outputs by 1 %: each would be within 35 dB of the one before, two are not of the original."""
        result = squeezed(*[Scale(factor=1.01)] * 3, model=SINGLE, limit=35)
        assert [step.outcome for step in result.report.passes] == ["kept", "dropped", "dropped"]
        assert written(result) == written(squeezed(Scale(factor=1.01), model=SINGLE))

    def test_nothing_to_do_is_unchanged(self) -> None:
        step = only(squeezed(Scale(factor=1.0), limit=100))
        assert (step.outcome, step.reason, step.changes) == ("unchanged", "", ())
        assert len(step.skips) == 2

    def test_without_changes_in_the_report_edits_do_not_count(self) -> None:
        result = squeezed(
            broken("Hides", lambda graph: set_values(big(graph)[0], 3 * big(graph)[0].values), changes=())
        )
        assert only(result).outcome == "unchanged"
        assert written(result) == UNTOUCHED

    def test_the_input_object_is_not_modified(self) -> None:
        model = layers({"a": 1.0, "b": 2.0})
        before = model.SerializeToString()
        squeezed(Tidy(), Sparsify(), ShareWeights(bits=3), model=model)
        assert model.SerializeToString() == before

    def test_progress_is_told(self) -> None:
        told: list[tuple[str, int, int]] = []
        squeezed(Tidy(), ShareWeights(bits=1), limit=38, progress=lambda *what: told.append(what))
        words = {what for what, _, _ in told}
        assert {
            "tidy (1 of 2): rewriting",
            "share-weights (2 of 2): rewriting",
            "share-weights (2 of 2): validating",
        } <= words
        assert all(0 <= done <= total or total == 0 for _, done, total in told)


def big(graph: Graph) -> list[Constant]:
    return [weight.constant for weight in weights(graph)]


def broken(title: str, damage: Callable[[Graph], Any], changes: Any = (Change("a", 20, 10, "damaged"),)) -> Pass:
    """Returns a pass that scales one weight, and then does damage."""

    def apply(self: Pass, graph: Graph, context: Context) -> Report:
        set_values(big(graph)[0], big(graph)[0].values * np.float32(1.5))
        damage(graph)
        return Report(changes)

    body = {"apply": apply, "name": "broken", "__annotations__": {"name": ClassVar[str]}, "__module__": __name__}
    return dataclass(frozen=True, kw_only=True)(type(title, (Pass,), body))()


def fail(graph: Graph) -> None:
    raise ZeroDivisionError("of all things")


def write_into_array(graph: Graph) -> None:
    big(graph)[0].values[0] = 7


def rename_output(graph: Graph) -> None:
    graph.outputs[0].name = "z"


def drop_input(graph: Graph) -> None:
    graph.inputs.clear()


def cycle(graph: Graph) -> None:
    graph.nodes[0].inputs[0] = graph.nodes[-1].outputs[0]


def read_from_nowhere(graph: Graph) -> None:
    graph.nodes[0].inputs[0] = Variable("nowhere")


def unknown_op(graph: Graph) -> None:
    graph.nodes[0].op = "Nonsense"


def wrong_type(graph: Graph) -> None:
    big(graph)[0].values = big(graph)[0].values.astype(np.float64)


def foreign_op(graph: Graph) -> None:
    graph.model.opset_import.add(domain="elsewhere", version=1)
    graph.nodes.append(Node("Mystery", [graph.outputs[0]], [Variable("m")], domain="elsewhere"))


def odd_attribute(graph: Graph) -> None:
    graph.nodes[0].attrs["odd"] = object()


def set_nan(graph: Graph) -> None:
    set_values(big(graph)[0], np.full_like(big(graph)[0].values, np.nan))


DAMAGES: list[tuple[Callable[[Graph], Any], str]] = [
    (fail, "it raised ZeroDivisionError: of all things"),
    (write_into_array, "it raised ValueError: assignment destination is read-only"),
    (rename_output, "it changed names, types or shapes of graph inputs or outputs"),
    (drop_input, "it changed names, types or shapes of graph inputs or outputs"),
    (cycle, "it raised PassError: graph 'graph': node "),
    (read_from_nowhere, "its result is not valid ONNX: "),
    (unknown_op, "its result is not valid ONNX: No Op registered for Nonsense"),
    (wrong_type, "its result is not valid ONNX: "),
    (foreign_op, "candidate model: ONNX Runtime cannot load it: "),
    (odd_attribute, "its result cannot be written: TypeError: "),
    (set_nan, "output 'y': NaN or infinity where the original has none (sample 0)"),
]


class TestRollback:
    @pytest.mark.parametrize("limit", [None, 20])
    @pytest.mark.parametrize(("damage", "reason"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
    def test_of_a_broken_pass_leaves_no_trace(
        self, damage: Callable[[Graph], Any], reason: str, limit: float | None
    ) -> None:
        result = squeezed(broken("Broken", damage), limit=limit)
        step = only(result)
        assert (step.outcome, step.changes) == ("dropped", ())
        assert step.reason.startswith(reason)
        assert written(result) == UNTOUCHED
        assert result.report.bytes_after == result.report.bytes_before == len(UNTOUCHED)
        assert not result.report.target_reached

    def test_of_a_pass_past_the_limit_leaves_no_trace(self) -> None:
        result = squeezed(Scale(factor=2), limit=20)
        assert only(result).outcome == "dropped"
        assert only(result).reason.startswith("output 'y': SQNR must be at least 20 dB, got ")
        assert written(result) == UNTOUCHED

    def test_goes_back_to_the_last_good_step_and_on_from_there(self) -> None:
        good, bad = ShareWeights(bits=6), broken("Broken", fail)
        result = squeezed(Tidy(), Scale(factor=3), good, bad, limit=30)
        assert [step.outcome for step in result.report.passes] == ["unchanged", "dropped", "kept", "dropped"]
        assert written(result) == written(squeezed(good))
        sizes = [(step.bytes_before, step.bytes_after) for step in result.report.passes]
        assert sizes == [(len(UNTOUCHED),) * 2] * 2 + [
            (len(UNTOUCHED), len(written(result))),
            (len(written(result)),) * 2,
        ]

    def test_an_interrupt_is_no_failure_of_a_pass(self) -> None:
        def interrupt(graph: Graph) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            squeezed(broken("Interrupted", interrupt))

    def test_a_pass_that_reports_nothing_at_all_is_dropped(self) -> None:
        subject = replace(broken("Silent", lambda graph: None))
        object.__setattr__(subject, "apply", lambda graph, context: None)
        step = only(squeezed(subject))
        assert step.outcome == "dropped"
        assert step.reason.startswith("it raised AttributeError")

    def test_of_outputs_of_another_shape(self) -> None:
        model = oracle.make_model(
            [helper.make_node("MatMul", ["x", "a"], ["h"]), helper.make_node("Reshape", ["h", "shape"], ["y"])],
            [oracle.tensor("x", [1, WIDTH])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["p", "q"])],
            [oracle.value("a", normal(WIDTH, WIDTH)), oracle.value("shape", [6, 8], np.int64)],
        )

        def turn(graph: Graph) -> None:
            (shape,) = [constant for constant in graph.constants if constant.name == "shape"]
            set_values(shape, np.array([8, 6]))

        step = only(squeezed(broken("Turns", turn), model=model))
        assert (step.outcome, step.reason) == ("dropped", "output 'y': shape must be [6, 8], got [8, 6] (sample 0)")


class TestWeakening:
    def test_the_first_form_within_the_limit_is_kept_and_told(self) -> None:
        result = squeezed(Scale(factor=2, steps=5), limit=35)
        step = only(result)
        assert step.outcome == "weakened"
        assert step.options["factor"] == pytest.approx(1.01)
        assert step.options["steps"] == 3
        assert step.reason.startswith(
            "with factor = 1.01, steps = 3 it stays within the limits; as asked: output 'y': SQNR must be at "
        )
        assert result.report.target_reached
        assert sqnr(MODEL, result.to_model(), INPUTS["x"]) >= 35

    def test_share_weights_takes_one_bit_more_at_a_time(self) -> None:
        step = only(squeezed(ShareWeights(bits=2, per="tensor"), limit=25))
        assert step.outcome == "weakened"
        bits = step.options["bits"]
        assert 3 <= bits <= 6
        assert squeezed(ShareWeights(bits=bits, per="tensor"), limit=25).report.passes[0].outcome == "kept"
        assert only(squeezed(ShareWeights(bits=bits - 1, per="tensor"), limit=25)).outcome == "weakened"

    def test_ends_after_eight_attempts(self) -> None:
        seen: list[float] = []

        def apply(self: Scale, graph: Graph, context: Context) -> Report:
            seen.append(self.factor)
            set_nan(graph)
            return Report([Change("a", 20, 10, "poisoned")])

        endless = dataclass(frozen=True, kw_only=True)(
            type(
                "Endless",
                (Scale,),
                {"apply": apply, "__module__": __name__, "weaker": lambda self: replace(self, factor=self.factor + 1)},
            )
        )
        step = only(squeezed(endless(factor=1.0)))
        assert seen == [1, 2, 3, 4, 5, 6, 7, 8]
        assert step.outcome == "dropped"
        assert step.reason.endswith("NaN or infinity where the original has none (sample 0) (after 8 attempts)")

    def test_is_not_tried_on_what_is_broken_otherwise(self) -> None:
        seen = []

        def apply(self: Scale, graph: Graph, context: Context) -> Report:
            seen.append(self.steps)
            return fail(graph)

        subject = dataclass(frozen=True, kw_only=True)(
            type("Fails", (Scale,), {"apply": apply, "__module__": __name__})
        )
        assert only(squeezed(subject(steps=5))).outcome == "dropped"
        assert seen == [5]

    def test_down_to_nothing_is_a_failure_and_not_a_success(self) -> None:
        class_body = {
            "weaker": lambda self: replace(self, factor=1.0) if self.factor != 1 else None,
            "__module__": __name__,
        }
        subject = dataclass(frozen=True, kw_only=True)(type("Vanishes", (Scale,), class_body))
        result = squeezed(subject(factor=5.0), limit=30)
        assert only(result).outcome == "dropped"
        assert only(result).reason.startswith("output 'y': SQNR must be at least 30 dB, got ")
        assert written(result) == UNTOUCHED


GAINS = {"a": 1.0, "b": 1.0, "sore": 100.0, "c": 1.0}
SORE = layers(GAINS)


class TestSparing:
    def test_a_site_that_cannot_bear_it_is_left_alone_and_the_rest_is_not(self) -> None:
        result = squeezed(Sparsify(pattern="2:4"), model=SORE, limit=30)
        step = only(result)
        assert step.outcome == "weakened"
        assert [change.site for change in step.changes] == ["a", "b", "c"]
        reasons = {skip.site: skip.reason for skip in step.skips}
        assert reasons["sore"].startswith("spared: by itself it moves the outputs by ")
        assert "1 of 4 sites were spared to stay within the limits: sore" in step.notes
        assert step.reason.startswith(
            "with some sites spared it stays within the limits; as asked: output 'y': SQNR must be "
        )
        np.testing.assert_array_equal(values_of(result)["sore"], normal(WIDTH, WIDTH, seed=2))
        assert (
            sqnr(SORE, result.to_model(), INPUTS["x"])
            >= 30
            > sqnr(SORE, squeezed(Sparsify(pattern="2:4"), model=SORE).to_model(), INPUTS["x"])
        )

    def test_the_share_in_the_reason_is_the_drift_of_that_site_alone(self) -> None:
        step = only(squeezed(Sparsify(pattern="2:4", repair=False), model=SORE, limit=30))
        told = next(skip.reason for skip in step.skips if skip.site == "sore").removeprefix(
            "spared: by itself it moves the outputs by "
        )
        alone = Step(Sparsify(pattern="2:4", repair=False), [Rule("*", skip=True), Rule("sore", skip=False)])
        drift = 10 ** (-sqnr(SORE, squeezed(alone, model=SORE).to_model(), INPUTS["x"]) / 20)
        assert float(told.rstrip("%")) / 100 == pytest.approx(drift, rel=0.1)  # a probe sees eight samples only

    def test_shared_weights_keep_a_spared_site_in_16_bits(self) -> None:
        result = squeezed(ShareWeights(bits=8, per="tensor", method="uniform"), model=SORE, limit=50)
        step = only(result)
        assert step.outcome == "weakened"
        details = {change.site: change.detail for change in step.changes}
        assert details.keys() == {"a", "b", "sore", "c"}
        assert details["sore"].startswith("float16; spared: by itself it moves the outputs by ")
        assert all(details[site] == "uniform grid of 8 bits, error feedback" for site in ("a", "b", "c"))
        assert sqnr(SORE, result.to_model(), INPUTS["x"]) >= 50
        assert result.report.bytes_after < result.report.bytes_before / 2

    def test_names_that_look_like_patterns_are_names(self) -> None:
        model = layers({"w[0]": 1.0, "w0": 1.0, "w[ab]": 100.0, "wa": 1.0})
        step = only(squeezed(Sparsify(pattern="2:4"), model=model, limit=30))
        assert [change.site for change in step.changes] == ["w[0]", "w0", "wa"]

    def test_rules_of_the_user_still_hold(self) -> None:
        rules = [Rule("a", skip=True), Rule("b", {"pattern": "1:4"})]
        step = only(squeezed(Step(Sparsify(pattern="2:4"), rules), model=SORE, limit=25))
        assert {change.site: change.detail.split(", ")[1] for change in step.changes} == {"b": "1:4", "c": "2:4"}
        reasons = {skip.site: skip.reason for skip in step.skips}
        assert reasons["a"] == "left alone by a rule"
        assert reasons["sore"].startswith("spared: ")

    def test_a_limit_that_no_site_bears_drops_the_pass(self) -> None:
        result = squeezed(Sparsify(pattern="2:4"), model=SORE, limit=120)
        assert only(result).outcome == "dropped"
        assert written(result) == written(to_model(load(SORE)))

    @pytest.mark.parametrize(
        "tolerance", [Tolerance(), Tolerance(min_sqnr_db=10), Tolerance(max_drift=0.5), Tolerance(min_agreement=0.1)]
    )
    def test_a_site_that_gives_nan_is_found_whatever_the_limit(self, tolerance: Tolerance) -> None:
        """The other output shows no error at all, which must not hide the NaN of this one."""
        model = layers({"a": 1.0, "b": 1.0})
        model.graph.node.append(helper.make_node("MatMul", ["x", "bad"], ["z"]))
        model.graph.output.append(oracle.tensor("z", ["n", WIDTH]))
        model.graph.initializer.append(oracle.value("bad", normal(WIDTH, WIDTH, seed=7)))

        def apply(self: Scale, graph: Graph, context: Context) -> Report:
            report = Scale.apply(self, graph, context)
            for weight in weights(graph):
                if weight.site == "bad" and any(change.site == "bad" for change in report.changes):
                    set_values(weight.constant, np.full_like(weight.constant.values, np.nan))
            return report

        subject = dataclass(frozen=True, kw_only=True)(
            type("Poisons", (Scale,), {"apply": apply, "__module__": __name__})
        )
        result = compress(model, [subject(factor=1.001)], calibration=INPUTS, tolerance=tolerance)
        step = only(result)
        assert step.outcome == "weakened"
        assert {change.site for change in step.changes} == {"a", "b"}
        reasons = {skip.site: skip.reason for skip in step.skips}
        assert reasons["bad"] == "spared: by itself it makes the model fail, or give NaN or infinity"

    @pytest.mark.parametrize(
        ("gains", "rounds"),
        [
            ({"a": 1.0, "sore": 100.0, "b": 1.0}, [0, 2, 2, 2, 1]),
            (
                {"a": 1.0, "sore": 100.0, "b": 1.0, "ill": 99.0},
                [0, 2, 2, 2, 2, 2],
            ),  # the limit says at once that both must go
        ],
    )
    def test_no_more_is_tried_than_is_needed(self, gains: dict[str, float], rounds: list[int]) -> None:
        """One attempt as asked, one probe for each site, one attempt without the sore ones; rules tell them apart."""
        applied, subject = counted(Sparsify)
        step = only(squeezed(subject(pattern="2:4"), model=layers(gains), limit=30))
        assert step.outcome == "weakened"
        assert applied == rounds

    def test_sites_that_depend_on_each_other_are_not_probed_one_by_one(self) -> None:
        applied, subject = counted(Sparsify)
        step = only(squeezed(subject(scope="global", sparsity=0.3), model=SORE, limit=120))
        assert step.outcome == "dropped"
        assert len(applied) > 1
        assert set(applied) == {0}

    @pytest.mark.parametrize("member", ["weaker", "spared", "with_options"])
    def test_a_pass_that_fails_on_the_way_is_dropped(self, member: str) -> None:
        body = {member: lambda *_: 1 / 0, "__module__": __name__}
        subject = dataclass(frozen=True, kw_only=True)(type("Fails", (Scale,), body))
        result = squeezed(Step(subject(factor=2.0), [Rule("a", {"factor": 1.5})]), Scale(factor=1.0001), limit=30)
        assert [step.outcome for step in result.report.passes] == ["dropped", "kept"]
        assert result.report.passes[0].reason == "it raised ZeroDivisionError: division by zero"

    def test_what_has_just_failed_is_not_tried_again(self) -> None:
        """Four equal layers err alike, so the whole errs twice as much as squares that add up say."""
        model = layers(dict.fromkeys("abcd", 1.0))
        for tensor in model.graph.initializer:
            if tensor.name in "abcd":
                tensor.CopyFrom(oracle.value(tensor.name, normal(WIDTH, WIDTH)))
        applied, subject = counted(Scale)
        step = only(compress(model, [subject(factor=1.01)], calibration=INPUTS, tolerance=Tolerance(max_drift=0.008)))
        assert step.outcome == "weakened"
        assert applied[:5] == [0, 2, 2, 2, 2]
        assert 0 not in applied[1:]


def counted(base: type[Pass]) -> tuple[list[int], type[Any]]:
    """Returns a list that grows by the number of rules each time the pass, a `base` otherwise, is applied."""
    applied: list[int] = []

    def apply(self: Pass, graph: Graph, context: Context) -> Report:
        applied.append(len(context.rules))
        return base.apply(self, graph, context)

    return applied, dataclass(frozen=True, kw_only=True)(
        type("Counted", (base,), {"apply": apply, "__module__": __name__})
    )


def values_of(result: Compressed) -> dict[str, Array]:
    return {constant.name: constant.values for constant in result.graph.constants}


class TestRules:
    def test_reach_sites_by_weight_node_and_output_name(self) -> None:
        rules = [Rule("a", {"factor": 2.0}), Rule("matmul_b", skip=True)]
        result = squeezed(Step(Scale(factor=1.5), rules), model=layers({"a": 1.0, "b": 1.0, "c": 1.0}))
        weight = {name: normal(WIDTH, WIDTH, seed=seed) for seed, name in enumerate("abc")}
        found = values_of(result)
        np.testing.assert_array_equal(found["a"], weight["a"] * np.float32(2))
        np.testing.assert_array_equal(found["b"], weight["b"])
        np.testing.assert_array_equal(found["c"], weight["c"] * np.float32(1.5))

    def test_the_last_match_wins(self) -> None:
        rules = [
            Rule("*", {"factor": 2.0}),
            Rule("a", {"factor": 3.0}),
            Rule("b", skip=True),
            Rule("?", {"factor": 4.0}, skip=False),
        ]
        found = values_of(squeezed(Step(Scale(), rules)))
        np.testing.assert_array_equal(found["a"], normal(WIDTH, WIDTH) * np.float32(4))
        np.testing.assert_array_equal(
            found["b"], normal(WIDTH, WIDTH, seed=1) * np.float32(4)
        )  # the last match does not skip

    def test_that_match_nothing_are_told(self) -> None:
        step = only(squeezed(Step(Sparsify(), [Rule("a"), Rule("misspelt*", {"sparsity": 0.9})])))
        assert [note for note in step.notes if "rule" in note] == ["rule 'misspelt*' matched no site"]


class TestRepetition:
    STEPS = (Tidy(), Sparsify(sparsity=0.3), ShareWeights(bits=5))

    def test_the_same_seed_gives_the_same_bytes_threads_or_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        results = []
        for workers in (1, 4):
            monkeypatch.setattr(api, "_workers", lambda workers=workers: workers)
            results.append(written(squeezed(*self.STEPS, model=SORE, limit=20)))
        assert results[0] == results[1] == written(squeezed(*self.STEPS, model=SORE, limit=20))

    def test_the_seed_reaches_the_pass(self) -> None:
        seeds: list[tuple[int, Executor | None]] = []

        def apply(self: Scale, graph: Graph, context: Context) -> Report:
            seeds.append((context.seed, context.executor))
            return Report()

        subject = dataclass(frozen=True, kw_only=True)(type("Asks", (Scale,), {"apply": apply, "__module__": __name__}))
        squeezed(subject(), seed=41)
        assert seeds[0][0] == 41
        assert isinstance(seeds[0][1], Executor)


class TestWhatComesLater:
    """A pass is told whether one after it rounds weights, each time it is tried."""

    @staticmethod
    def asks(told: list[bool], base: type[Pass] = Scale, rounds: bool = False) -> type[Any]:
        """Returns a pass like `base` that notes down what it was told."""

        def apply(self: Pass, graph: Graph, context: Context) -> Report:
            told.append(context.rounded_later)
            return base.apply(self, graph, context)

        body = {"apply": apply, "rounds_weights": rounds, "__annotations__": {"rounds_weights": ClassVar[bool]}, "__module__": __name__}
        return dataclass(frozen=True, kw_only=True)(type("Asks", (base,), body))

    @pytest.mark.parametrize(
        ("rounding", "expected"),
        [
            ([False], [False]),
            ([True], [False]),
            ([False, False], [False, False]),
            ([False, True], [True, False]),
            ([True, False], [False, False]),
            ([False, False, True, False], [True, True, False, False]),
            ([True, True, False], [True, False, False]),
        ],
    )
    def test_is_told_to_each_step(self, rounding: list[bool], expected: list[bool]) -> None:
        told: list[bool] = []
        squeezed(*[self.asks(told, rounds=rounds)(factor=1.001) for rounds in rounding], model=SINGLE)
        assert told == expected

    def test_is_told_of_the_passes_there_are(self) -> None:
        for later, expected in ((ShareWeights(bits=8), True), (Sparsify(sparsity=0.1), True), (Tidy(), False), (Scale(), False)):
            told: list[bool] = []
            squeezed(self.asks(told)(factor=1.001), Tidy(), later, model=SINGLE)
            assert told == [expected]

    def test_is_told_again_to_weaker_forms(self) -> None:
        told: list[bool] = []
        step = squeezed(self.asks(told)(factor=2.0, steps=3), ShareWeights(), model=SINGLE, limit=30).report.passes[0]
        assert step.outcome == "weakened"
        assert told == [True] * 3

    def test_is_told_again_where_sites_are_spared(self) -> None:
        told: list[bool] = []
        steps = squeezed(self.asks(told, Sparsify)(pattern="2:4"), ShareWeights(bits=8), model=SORE, limit=30).report.passes
        assert steps[0].outcome == "weakened"
        assert len(told) > 3
        assert all(told)


class TestLimits:
    @pytest.mark.parametrize(
        ("tolerance", "factor", "outcome"),
        [
            (Tolerance(max_drift=0.011), 1.01, "kept"),
            (Tolerance(max_drift=0.009), 1.01, "dropped"),
            (Tolerance(min_sqnr_db=39), 1.01, "kept"),
            (Tolerance(min_sqnr_db=41), 1.01, "dropped"),
            (Tolerance(min_sqnr_db=39, max_drift=0.009), 1.01, "dropped"),
            (Tolerance(min_agreement=1.0), 50.0, "kept"),  # a common factor moves no arg max
            (Tolerance(min_agreement=0.9), -1.0, "dropped"),
            (Tolerance(), -1.0, "kept"),
        ],
    )
    def test_decide(self, tolerance: Tolerance, factor: float, outcome: str) -> None:
        step = only(compress(SINGLE, [Scale(factor=factor)], calibration=INPUTS, tolerance=tolerance))
        assert step.outcome == outcome

    def test_on_agreement_need_an_output_that_decides(self) -> None:
        model = oracle.make_model(
            [helper.make_node("Mul", ["x", "a"], ["y"])],
            [oracle.tensor("x", [2, 3, 4, 5])],
            [oracle.tensor("y", [2, 3, 4, 5])],
            [oracle.value("a", normal(60).reshape(3, 4, 5))],
        )
        with pytest.raises(OptionError, match="min-agreement must be left out for this model"):
            compress(model, [Scale()], tolerance=Tolerance(min_agreement=0.5))


def test_the_interface_is_names_types_and_shapes_of_what_callers_see() -> None:
    graph = load(MODEL)
    assert [entry[0] for entry in interface(graph)] == ["x", "y"]
    assert interface(graph) == interface(graph.copy())
    for change in itertools.count():
        other = graph.copy()
        if change == 0:
            other.outputs[0].name = "z"
        elif change == 1:
            other.inputs[0].shape = (1, WIDTH)
        elif change == 2:
            other.outputs.append(other.nodes[0].outputs[0])
        else:
            break
        assert interface(other) != interface(graph)
