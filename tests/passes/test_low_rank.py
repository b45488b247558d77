"""Weights cut in pieces by the pass: budgets, rules, what calibration gains, reasons, and the company of other passes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxshrink import compress
from onnxshrink.contract import Context, Report, Rule
from onnxshrink.errors import OptionError
from onnxshrink.graph.check import strictest_level
from onnxshrink.graph.edit import sort_nodes
from onnxshrink.graph.exporter import to_model
from onnxshrink.graph.files import load
from onnxshrink.graph.ir import Graph
from onnxshrink.graph.weights import weights as weights_of
from onnxshrink.inputs import Feeds, Samples
from onnxshrink.passes.huffman import Huffman
from onnxshrink.passes.low_rank import LowRank
from onnxshrink.passes.share_weights import ShareWeights
from onnxshrink.recipe import parse_pass, parse_recipe
from onnxshrink.testing import check_pass
from onnxshrink.trials import SampleTrials
from tests import oracle
from tests.graph.test_channel_rules import build
from tests.test_factorization import NETWORK, calibrated, feeds_of

Array = np.ndarray[Any, np.dtype[Any]]
CUT = ("w1", "w2", "w3", "w4")  # what can be cut of the network
BIASES = {"b1": "w1", "b2": "w2", "b4": "w4"}  # and what is added to the outputs of each
OF_PRODUCTS = {"auto": "interpolative", "factors": "two-matmuls"}  # the form that products are then cut in
forms = pytest.mark.parametrize("form", ["auto", "factors"])
SEQUENCE = (9, 24)
TWO = build(["MatMul x w1 -> h", "Relu h -> r", "MatMul r w2 -> y"], SEQUENCE, w1=(24, 32), w2=(32, 20))
Found = tuple[dict[str, Array], Report, onnx.ModelProto]


class Clock(SampleTrials):
    """Trials whose parts take as long as they are told."""

    def __init__(self, feeds: Sequence[Feeds], ratio: float = 0.5) -> None:
        super().__init__(Samples(lambda index: feeds[index], range(len(feeds)), "test"))
        self.ratio = ratio
        self.asked: list[tuple[Sequence[str], Sequence[str]]] = []

    def part_ratio(self, before: Graph, after: Graph, inputs: Sequence[str], outputs: Sequence[str]) -> float:
        self.asked.append((inputs, outputs))
        return self.ratio


def run(subject: LowRank, model: Any = NETWORK, *rules: Rule, feeds: Sequence[Feeds] | None = None, **more: Any) -> Found:
    """Returns the initializers of the result by name, the report, and the result, which is valid and runs."""
    graph = load(model)
    level = strictest_level(to_model(graph))[0]
    data = calibrated(feeds).activations if feeds is not None else None
    before = {constant.name: constant.values for constant in graph.constants}
    report = subject.apply(graph, Context(rules=rules, activations=data, **more))
    sort_nodes(graph)
    result = to_model(graph)
    assert strictest_level(result)[0] >= level
    named = [*(change.site for change in report.changes), *(skip.site for skip in report.skips)]
    assert len(named) == len(set(named))
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in result.graph.initializer}
    for skip in report.skips:
        np.testing.assert_array_equal(found[skip.site], before[skip.site])
    return found, report, result


def drift(model: Any, other: Any, feeds: Sequence[Feeds]) -> float:
    running = [oracle.session(one, optimise=False) for one in (model, other)]
    expected, got = (np.stack([oracle.run(one, feed)[0].astype(np.float64) for feed in feeds]) for one in running)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def details(report: Report) -> dict[str, str]:
    return {change.site: change.detail for change in report.changes}


def reasons(report: Report) -> dict[str, str]:
    return {skip.site: skip.reason for skip in report.skips}


def elements(found: dict[str, Array], without: Sequence[str] = (*BIASES, "flat")) -> int:
    """Returns the parameters that are stored, biases and what pieces make of them apart."""
    return sum(array.size for name, array in found.items() if name not in without and not re.search(r"\.bias(_\d+)?$", name))


def full(model: Any = NETWORK) -> int:
    return elements({tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer})


def answered(graph: Graph) -> list[str]:
    """Returns the weights that a report must name; a bias is part of its layer, and goes where that is cut in pieces with one each."""
    return [weight.site for weight in weights_of(graph) if not any(use.operand == 2 and use.op in ("Conv", "Gemm") for use in weight.uses)]


class TestBudgets:
    @forms
    @pytest.mark.parametrize("data", [True, False])
    @pytest.mark.parametrize("params", [0.9, 0.7, 0.4])
    def test_of_parameters_are_met(self, params: float, data: bool, form: str) -> None:
        found, report, _ = run(LowRank(params=params, form=form), feeds=feeds_of() if data else None)
        assert params - 0.05 < elements(found) / full() <= params
        assert report.notes[0] == f"params x {elements(found) / full():.3f} of the layers that can be cut, as they came to this pass"
        assert not report.missed
        assert any("no calibration inputs" in note for note in report.notes) == (not data)

    @forms
    @pytest.mark.parametrize("macs", [0.85, 0.5])
    def test_of_work_are_met(self, macs: float, form: str) -> None:
        """As ONNX Runtime's own account of the nodes has it, and as it follows from shapes where nothing can be run."""
        feeds = feeds_of()
        for trials in (Clock(feeds), None):
            _, report, result = run(LowRank(macs=macs, round="none", form=form), feeds=feeds, trials=trials)
            counted = [sum((Clock(feeds).macs(load(model)) or {}).values()) for model in (result, NETWORK)]
            assert macs - 0.06 < counted[0] / counted[1] <= macs + 1e-6
            assert report.notes[0].startswith(f"macs x {counted[0] / counted[1]:.3f} ")

    @forms
    def test_are_four_fifths_of_the_parameters_unless_given(self, form: str) -> None:
        assert LowRank().budget == ("params", 0.8)
        found, _, _ = run(LowRank(form=form))
        assert 0.75 < elements(found) / full() <= 0.8

    def test_of_all_change_nothing(self) -> None:
        before = to_model(load(NETWORK)).SerializeToString(deterministic=True)
        for subject in (LowRank(params=1.0), LowRank(macs=1.0), LowRank(energy=1.0), LowRank(share=1.0), LowRank(rank=1 << 20), LowRank(error=0.0)):
            _, report, result = run(subject, feeds=feeds_of())
            assert not report.changes
            assert not report.missed
            assert result.SerializeToString(deterministic=True) == before

    @forms
    def test_that_are_missed_are_said(self, form: str) -> None:
        found, report, _ = run(LowRank(params=0.01, form=form))
        assert f"params x {elements(found) / full():.3f} " in report.notes[0]
        left = report.notes[0].split(" x ")[1].split()[0]
        assert report.missed == f"asked for params x 0.01; x {left} is what pieces that pay can have, with rules as they are"
        _, report, _ = run(LowRank(macs=0.5, round="512"))
        assert not report.changes
        assert report.missed == "asked for macs x 0.5; x 1.000 is what pieces that pay can have, with rules as they are, ranks in steps of 512 (round)"

    @forms
    def test_next_to_ranks_of_single_weights_are_met(self, form: str) -> None:
        """What those cost counts, more or less than their share."""
        for rule in (Rule("w1", {"rank": 2}), Rule("w1", {"energy": 0.99}), Rule("w4", {"share": 0.1, "form": "auto"})):
            found, report, _ = run(LowRank(params=0.7, form=form), NETWORK, rule, feeds=feeds_of())
            assert elements(found) / full() <= 0.7
            assert not report.missed
        found, report, _ = run(LowRank(params=0.6, form=form), NETWORK, Rule("w1", {"rank": 1000}))
        assert "w1" in found
        assert report.missed.startswith("asked for params x 0.6; x 0.")  # it is most of the model

    def test_of_work_refuse_what_takes_longer(self) -> None:
        feeds = feeds_of()
        clock = Clock(feeds, 1.0)
        _, report, _ = run(LowRank(macs=0.7, round="none"), feeds=feeds, trials=clock)
        assert not report.changes
        assert report.missed.startswith("asked for macs x 0.7; x 1.000 ")
        assert set(map(str, clock.asked)) == {"(['x'], ['h'])", "(['r'], ['p'])", "(['t'], ['m'])", "(['f'], ['y'])"}
        clock = Clock(feeds, 1.0)
        _, report, _ = run(LowRank(params=0.7), feeds=feeds, trials=clock)
        assert report.changes  # bytes were asked for
        assert not clock.asked

    @forms
    def test_of_work_are_not_filled_with_what_takes_longer(self, form: str) -> None:
        class Steep(Clock):
            """Half of the work and less pays, more does not."""

            def part_ratio(self, before: Graph, after: Graph, inputs: Sequence[str], outputs: Sequence[str]) -> float:
                work = [sum(constant.size for constant in graph.constants if constant.size > 40) for graph in (before, after)]
                return 0.5 if work[1] < 0.5 * work[0] else 1.0

        model = build(["MatMul x w1 -> y"], SEQUENCE, w1=(24, 32))
        feeds = feeds_of(SEQUENCE)
        found, report, _ = run(LowRank(macs=0.95, round="none", form=form), model, feeds=feeds, trials=Steep(feeds))
        assert report.changes
        assert elements(found) < 0.5 * 24 * 32

    def test_of_work_are_met_where_parts_are_timed(self) -> None:
        """By ONNX Runtime itself: layers wide enough that pieces save time on any machine."""
        model = build(["MatMul x w1 -> h", "Relu h -> r", "MatMul r w2 -> y"], (64, 384), w1=(384, 384), w2=(384, 384))
        feeds = feeds_of((64, 384), 2)
        graph = load(model)
        report = LowRank(macs=0.1, round="none").apply(graph, Context(trials=SampleTrials(Samples(lambda index: feeds[index], range(2), "test"))))
        assert len(report.changes) == 2

    def test_of_work_leave_what_did_not_run_alone(self) -> None:
        feeds = feeds_of(SEQUENCE)

        class Lazy(Clock):
            def macs(self, graph: Graph) -> dict[int, float] | None:
                return {id(node): 24.0 * 32 * 9 for node in graph.nodes if node.outputs[0].name == "h"}

        _, report, _ = run(LowRank(macs=0.5, round="none"), TWO, trials=Lazy(feeds))
        assert list(details(report)) == ["w1"]
        assert "work" in reasons(report)["w2"]


class TestGains:
    @forms
    def test_with_data_outputs_are_nearer(self, form: str) -> None:
        """At the same cost, on inputs that were not seen: inputs whose channels hang together need fewer ranks."""
        feeds, held_out = feeds_of(count=16), feeds_of(count=4, seed=7)
        for options in ({"params": 0.6}, {"share": 0.3}, {"rank": 4}):
            found = {repair: run(LowRank(repair=repair, form=form, **options), feeds=feeds) for repair in (True, False)}
            errors = {repair: drift(NETWORK, result, held_out) for repair, (_, _, result) in found.items()}
            assert errors[True] < 0.8 * errors[False]
            told = {repair: " ".join(details(report).values()) for repair, (_, report, _) in found.items()}
            assert "as its outputs lose least" in told[True]
            assert "as it loses least itself" in told[False]

    @pytest.mark.parametrize("data", [True, False])
    @pytest.mark.parametrize(("form", "stored"), [("auto", 3 * (44 - 3)), ("factors", 3 * 44)])
    def test_what_was_of_low_rank_loses_nothing(self, form: str, stored: int, data: bool) -> None:
        rng = np.random.default_rng(0)
        weight = (rng.standard_normal((24, 3)) @ rng.standard_normal((3, 20))).astype(np.float32)
        model = build(["MatMul x w -> y"], SEQUENCE, w=weight)
        least = "its outputs lose least" if data else "it loses least itself"
        for subject in (LowRank(energy=1 - 1e-6, form=form), LowRank(error=1e-4, form=form), LowRank(rank=3, form=form)):
            found, report, result = run(subject, model, feeds=feeds_of(SEQUENCE) if data else None)
            assert details(report)["w"] == f"{OF_PRODUCTS[form]}, rank 3 of 20, as {least}"
            assert elements(found) == stored
            assert drift(model, result, feeds_of(SEQUENCE, 2)) < 1e-5

    @pytest.mark.parametrize("data", [True, False])
    @pytest.mark.parametrize("options", [{"params": 0.8}, {"params": 0.5}, {"macs": 0.7, "round": "none"}], ids=str)
    def test_pieces_that_keep_outputs_lose_less_for_what_they_cost(self, options: dict[str, Any], data: bool) -> None:
        feeds = feeds_of(SEQUENCE)
        results = [run(LowRank(form=form, **options), TWO, feeds=feeds if data else None)[2] for form in ("auto", "factors")]
        errors = [drift(TWO, result, feeds_of(SEQUENCE, 4, seed=7)) for result in results]
        assert errors[0] < 0.95 * errors[1]

    @pytest.mark.parametrize("form", ["auto", "factors", "interpolative"])
    def test_biases_move_with_their_layers(self, form: str) -> None:
        """Where layers make up for others; else they stay, or what kept outputs were given stays."""
        before = {tensor.name: numpy_helper.to_array(tensor) for tensor in NETWORK.graph.initializer}
        for repair in (True, False):
            found, report, _ = run(LowRank(rank=3, repair=repair, form=form), feeds=feeds_of())
            for bias, name in BIASES.items():
                parts = f"{name}.first.bias" in found
                assert parts == details(report)[name].startswith("interpolative")
                assert parts == (bias not in found)
                assert (bias in reasons(report)) == (not repair and not parts)
                if parts:
                    kept, start = found[f"{name}.first.bias"], found.get(f"{name}.before.bias", np.zeros(0)).size
                    assert (kept != before[bias][start : start + len(kept)]).any() == repair
                else:
                    assert (found[bias] != before[bias]).any() == repair

    @forms
    def test_bytes_are_those_saved(self, form: str) -> None:
        for feeds in (feeds_of(), None):
            _, report, result = run(LowRank(params=0.5, form=form), feeds=feeds)
            claimed = sum(change.bytes_after - change.bytes_before for change in report.changes)
            assert abs(claimed - (result.ByteSize() - to_model(load(NETWORK)).ByteSize())) <= 8 * (1 + len(report.changes))

    @forms
    def test_is_the_same_again(self, form: str) -> None:
        for feeds in (feeds_of(), None):
            first = run(LowRank(params=0.6, form=form), feeds=feeds)[2].SerializeToString(deterministic=True)
            with ThreadPoolExecutor(2) as executor:
                second = run(LowRank(params=0.6, form=form), feeds=feeds, executor=executor)[2]
            assert second.SerializeToString(deterministic=True) == first

    @forms
    @pytest.mark.parametrize("data", [True, False])
    def test_of_float16_is_float16(self, data: bool, form: str) -> None:
        rng = np.random.default_rng(0)
        values = [oracle.value(name, rng.standard_normal(shape) / 4, np.float16) for name, shape in (("w1", (24, 32)), ("w2", (32, 20)))]
        nodes = [onnx.helper.make_node("MatMul", ["x", "w1"], ["h"]), onnx.helper.make_node("MatMul", ["h", "w2"], ["y"])]
        model = oracle.make_model(nodes, [oracle.tensor("x", SEQUENCE, 10)], [oracle.tensor("y", None, 10)], values)
        feeds = [{"x": feed["x"].astype(np.float16)} for feed in feeds_of(SEQUENCE)]
        found, report, result = run(LowRank(params=0.8, form=form), model, feeds=feeds if data else None)
        assert report.changes
        assert {array.dtype for array in found.values()} == {np.dtype(np.float16)}
        assert drift(model, result, feeds) < 0.5

    @pytest.mark.parametrize(("form", "shapes"), [("auto", [(6, 18), (24, 6)]), ("factors", [(6, 24), (24, 6)])])
    def test_tied_weights_are_cut_once(self, form: str, shapes: list[tuple[int, ...]]) -> None:
        model = build(["MatMul x w -> h", "Relu h -> r", "MatMul r w -> y"], SEQUENCE, w=(24, 24))
        for feeds in (feeds_of(SEQUENCE), None):
            found, report, result = run(LowRank(rank=6, form=form), model, feeds=feeds)
            assert list(details(report)) == ["w"]
            assert sorted(array.shape for array in found.values()) == shapes
            assert [node.op_type for node in result.graph.node].count("MatMul") == 4


class TestRules:
    @forms
    def test_of_rank_hold_for_every_weight(self, form: str) -> None:
        _, report, _ = run(LowRank(rank=4, form=form))
        assert set(details(report)) == set(CUT)
        assert all(", rank 4 of " in detail or ", rank 4 x " in detail or " x 4 of " in detail for detail in details(report).values())

    @forms
    def test_change_single_weights(self, form: str) -> None:
        _, report, _ = run(LowRank(rank=4, form=form), NETWORK, Rule("w4", {"energy": 0.3}), Rule("w3", {"rank": 2}), Rule("w2", skip=True))
        assert details(report)["w3"].startswith(f"{OF_PRODUCTS[form]}, rank 2 of 16")
        assert "rank" in details(report)["w4"]
        assert "rank 4 of" not in details(report)["w4"]
        assert reasons(report)["w2"] == "left alone by a rule"

    @pytest.mark.parametrize("options", [{"error": 0.0}, {"share": 0.0}, {"energy": 0.0}], ids=str)
    @pytest.mark.parametrize("subject", [LowRank(params=0.8), LowRank(macs=0.8, round="none"), LowRank(rank=4)], ids=["params", "macs", "rank"])
    def test_of_nothing_are_rules_too(self, subject: LowRank, options: dict[str, float]) -> None:
        _, report, _ = run(subject, NETWORK, Rule("w3", options))
        if "error" in options:
            assert "w3" in reasons(report)
        else:
            assert details(report)["w3"].startswith("interpolative, rank 1 of 16")

    def test_may_take_a_rule_away(self) -> None:
        _, report, _ = run(LowRank(evbmf=True), NETWORK, Rule("w3", {"evbmf": False}))
        assert "w3" in reasons(report)
        assert "w4" in details(report)

    def test_of_the_whole_model_are_no_rules(self) -> None:
        recipe = 'format = 1\n[[pass]]\nname = "low-rank"\n[[pass.rule]]\nmatch = "w1"\noptions = { params = 0.5 }\n'
        with pytest.raises(OptionError, match="params"):
            parse_recipe(recipe)

    def test_match_nodes_too(self) -> None:
        _, report, _ = run(LowRank(rank=4), NETWORK, Rule("h", skip=True))
        assert reasons(report)["w1"] == "left alone by a rule"


class TestOptions:
    @pytest.mark.parametrize("form", ["channel", "input", "spatial", "tucker2"])
    def test_forms_of_kernels(self, form: str) -> None:
        """Products have none of these, and are cut as ever."""
        _, report, _ = run(LowRank(share=0.3, form=form))
        assert details(report)["w1"].startswith(f"{form}, rank ")
        assert details(report)["w3"].startswith("interpolative, rank 5 of 16")
        assert details(report)["w4"].startswith("interpolative, rank 5 of 18")
        assert (reasons(report).get("w2") == f"cannot be cut in the form {form}") == (form != "channel")

    def test_forms_of_products(self) -> None:
        kernels = {"channel", "input", "spatial", "tucker2"}
        for form, products, convolutions in (
            ("interpolative", ["interpolative", "interpolative"], {"interpolative"}),
            ("two-products", ["two-matmuls", "gemm"], {*kernels, "interpolative"}),
            ("factors", ["two-matmuls", "gemm"], kernels),
        ):
            _, report, _ = run(LowRank(share=0.3, form=form))
            told = {site: detail.split(",")[0] for site, detail in details(report).items()}
            assert [told["w3"], told["w4"]] == products
            assert {told["w1"], told["w2"]} <= convolutions

    def test_auto_takes_the_form_that_loses_least(self) -> None:
        """Of the same ranks all forms are worse than it, whichever it is."""
        feeds, losses = feeds_of(count=4), {}
        for form in ("auto", "channel", "input", "interpolative", "spatial", "tucker2"):
            _, _, result = run(LowRank(share=0.3, form=form, repair=False), NETWORK, Rule("w[234]", skip=True))
            losses[form] = drift(NETWORK, result, feeds)
        assert losses["auto"] in [losses[form] for form in losses if form != "auto"]
        assert losses["auto"] < max(losses.values())

    @forms
    @pytest.mark.parametrize(("round_", "block"), [("none", 1), ("1", 1), ("4", 4), ("6", 6)])
    def test_ranks_are_rounded(self, round_: str, block: int, form: str) -> None:
        for options in ({"params": 0.7}, {"share": 0.25}, {"energy": 0.6}):
            _, report, _ = run(LowRank(round=round_, form=form, **options), NETWORK, Rule("w1", {"form": "channel"}))
            assert report.changes
            for detail in details(report).values():
                assert int(detail.split("rank ")[1].split()[0]) % block == 0

    def test_ranks_are_rounded_to_what_the_processor_computes_at_a_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("onnxshrink.shares.channel_block", lambda: 4)
        assert [LowRank(**options).block for options in ({"macs": 0.5}, {"params": 0.5}, {"rank": 3}, {"macs": 0.5, "round": "2"})] == [4, 1, 1, 2]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"params": 0.5, "macs": 0.5}, "low-rank: params and macs both set the ranks; give one of them"),
            ({"macs": 0.5, "rank": 3}, "low-rank: macs and rank both set the ranks; give one of them"),
            ({"energy": 0.5, "evbmf": True}, "low-rank: energy and evbmf both set the ranks; give one of them"),
            ({"share": 0.0, "error": 0.0}, "low-rank: share and error both set the ranks; give one of them"),
            ({"params": 0.0}, "low-rank: params must be a number from 0.01 to 1, got 0.0"),
            ({"rank": 0}, "low-rank: rank must be a whole number from 1 to "),
            ({"energy": 1.5}, "low-rank: energy must be a number from 0 to 1, got 1.5"),
            ({"error": -0.5}, "low-rank: error must be a number from 0 to 1, got -0.5"),
            ({"form": "cp"}, "low-rank: form must be one of auto, factors, channel, input, interpolative, spatial, tucker2, two-products, got 'cp'"),
            ({"round": "0"}, "low-rank: round must be auto, none or a number from 1 to 1024, got '0'"),
            ({"round": "eight"}, "low-rank: round must be auto, none or a number from 1 to 1024, got 'eight'"),
        ],
    )
    def test_that_make_no_sense_are_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(OptionError) as caught:
            LowRank(**options)
        assert str(caught.value).startswith(message)

    def test_are_read_from_recipes(self) -> None:
        assert parse_pass("low-rank:macs=0.8,round=none,form=spatial") == LowRank(macs=0.8, round="none", form="spatial")
        assert parse_pass("low-rank") == LowRank()

    def test_weaker_is_three_quarters_of_the_cut(self) -> None:
        for name, subject in (("params", LowRank(form="input")), ("macs", LowRank(macs=0.6, form="input"))):
            shares: list[float] = []
            weaker: LowRank | None = subject
            while weaker is not None:
                assert weaker.budget is not None
                assert (weaker.budget[0], weaker.form) == (name, "input")
                shares.append(weaker.budget[1])
                weaker = weaker.weaker()
            np.testing.assert_allclose(shares, 1 - (1 - shares[0]) * 0.75 ** np.arange(len(shares)))
            assert 0.95 < shares[-1] <= 0.97
        for alone in (LowRank(rank=3), LowRank(energy=0.5), LowRank(evbmf=True), LowRank(params=0.99)):
            assert alone.weaker() is None

    def test_sites_hang_together_where_they_share_a_budget(self) -> None:
        assert not LowRank().sites_are_independent
        assert not LowRank(macs=0.5).sites_are_independent
        assert LowRank(rank=3).sites_are_independent
        assert LowRank(evbmf=True).sites_are_independent


class TestReasons:
    @forms
    def test_of_every_weight(self, form: str) -> None:
        """Those biases apart that pieces have taken apart."""
        found, report, _ = run(LowRank(params=0.5, form=form))
        gone = {bias for bias in BIASES if bias not in found}
        assert set(details(report)) | set(reasons(report)) == {weight.site for weight in weights_of(load(NETWORK))} - gone
        assert gone == {bias for bias, name in BIASES.items() if details(report).get(name, "").startswith("interpolative")}
        assert bool(gone) == (form == "auto")
        if form == "factors":
            assert reasons(report)["b1"] == "is read as input 2 of Conv 'h', which is no weight operand"

    def test_of_what_is_too_small(self) -> None:
        model = build(["MatMul x w1 -> h", "MatMul h w2 -> y"], SEQUENCE, w1=(24, 2), w2=(2, 30))
        _, report, _ = run(LowRank(params=0.5, round="2"), model)
        assert reasons(report) == {
            "w1": "pieces would save nothing, ranks in steps of 2 (break-even rank 1 of 2)",
            "w2": "pieces would save nothing, ranks in steps of 2 (break-even rank 1 of 2)",
        }

    def test_of_one_weight_of_one_row(self) -> None:
        _, report, _ = run(LowRank(params=0.5), build(["MatMul x w1 -> y"], SEQUENCE, w1=(24, 1)))
        assert not report.changes
        assert "break-even rank 0 of 1" in reasons(report)["w1"]
        assert report.missed

    @forms
    def test_of_what_stays(self, form: str) -> None:
        _, report, _ = run(LowRank(params=0.999, form=form))
        assert any(reason.startswith("stays whole: ") and "break-even rank" in reason for reason in reasons(report).values())

    @pytest.mark.parametrize(("form", "share", "known"), [("auto", 1.0, (23, 19)), ("factors", 0.9, (13, 12))])
    def test_of_what_its_own_rank_leaves_whole(self, form: str, share: float, known: tuple[int, int]) -> None:
        """Other weights have nothing to do with that."""
        _, report, _ = run(LowRank(share=share, form=form), TWO)
        whole = f"stays whole: pieces as share={share:g} asks for would save nothing (break-even rank {{}} of {{}})"
        assert reasons(report) == {"w1": whole.format(known[0], 24), "w2": whole.format(known[1], 20)}

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_of_what_is_not_finite(self, value: float) -> None:
        model = type(TWO).FromString(TWO.SerializeToString())
        spoiled = numpy_helper.to_array(model.graph.initializer[1]).copy()
        spoiled[0, 0] = value
        model.graph.initializer[1].CopyFrom(oracle.value("w2", spoiled))
        for subject in (LowRank(params=0.6), LowRank(rank=3), LowRank(macs=0.6, round="none")):
            _, report, _ = run(subject, model)
            assert reasons(report)["w2"] == "holds NaN or infinity"

    @pytest.mark.parametrize("line", ["DequantizeLinear q s z -> w", ("Cast q -> w", {"to": 1})], ids=["scaled", "cast"])
    def test_of_stored_integers(self, line: Any) -> None:
        """They stay, or the outputs stay: as pieces of what the node reads, not of what is stored."""
        rng = np.random.default_rng(0)
        stored = np.rint(rng.standard_normal((24, 3)) @ rng.standard_normal((3, 20)) * 20).clip(-127, 127).astype(np.int8)
        model = build([line, "MatMul x w -> y"], SEQUENCE, q=stored, s=np.float32(0.01), z=np.int8(3))
        for feeds in (feeds_of(SEQUENCE), None):
            _, report, result = run(LowRank(rank=8), model, feeds=feeds)
            assert "q" in {*details(report), *reasons(report)}
            assert drift(model, result, feeds_of(SEQUENCE, 2)) < 0.1

    @forms
    def test_of_zeros(self, form: str) -> None:
        model = build(["MatMul x w -> y"], SEQUENCE, w=np.zeros((24, 20), np.float32))
        for options in ({"params": 0.5}, {"energy": 0.9}, {"error": 0.1}, {"evbmf": True}, {"rank": 2}):
            for feeds in (feeds_of(SEQUENCE), None):
                _, report, result = run(LowRank(form=form, **options), model, feeds=feeds)
                assert report.changes
                np.testing.assert_array_equal(oracle.run(oracle.session(result), feeds_of(SEQUENCE)[0])[0], 0)

    @forms
    def test_inputs_that_are_always_zero(self, form: str) -> None:
        model = build(["Sub x x -> o", "MatMul o w1 -> h", "MatMul h w2 -> y"], SEQUENCE, w1=(24, 32), w2=(32, 20))
        _, report, _ = run(LowRank(params=0.6, form=form), model, feeds=feeds_of(SEQUENCE))
        assert report.changes

    @pytest.mark.parametrize("lines", [["Relu x -> y"], ["Add x w1 -> y"]], ids=["no weights", "none that multiplies"])
    def test_models_without_any(self, lines: list[str]) -> None:
        constants: dict[str, Any] = {"w1": (24,)} if "w1" in lines[0] else {}
        model = build(lines, SEQUENCE, **constants)
        for options in ({"params": 0.5}, {"macs": 0.5}, {"rank": 3}):
            _, report, result = run(LowRank(**options), model, feeds=feeds_of(SEQUENCE))
            assert not report.changes
            assert result.SerializeToString(deterministic=True) == to_model(load(model)).SerializeToString(deterministic=True)


def test_pieces_can_be_shared_and_coded() -> None:
    """Through the front door; each pass finds what the one before left."""
    model = build(["MatMul x w1 -> h", "Relu h -> r", "MatMul r w2 -> y"], (9, 320), w1=(320, 512), w2=(512, 320))
    feeds = feeds_of((9, 320), 12)
    model.graph.output[0].CopyFrom(oracle.tensor("y", (9, 320)))
    done = compress(model, [LowRank(params=0.6), ShareWeights(bits=5), Huffman(raise_opset=True)], calibration=feeds)
    alone = compress(model, [LowRank(params=0.6)], calibration=feeds)
    cut, shared = (len(step.changes) for step in done.report.passes[:2])
    assert cut >= 1
    assert shared == 2 + cut
    assert len(done.report.passes[2].changes) >= 1
    assert done.report.bytes_after < 0.5 * alone.report.bytes_after < 0.5 * 0.65 * done.report.bytes_before
    assert drift(model, done.to_model(), feeds_of((9, 320), 2, seed=4)) < drift(model, alone.to_model(), feeds_of((9, 320), 2, seed=4)) + 0.1


def test_keeps_the_contract_of_passes() -> None:
    check_pass(LowRank(params=0.6), sites=answered)


@pytest.mark.parametrize("options", [{"macs": 0.6, "round": "none"}, {"energy": 0.8}, {"error": 0.5, "form": "spatial"}, {"evbmf": True}, {"share": 0.3, "form": "tucker2", "round": "2", "repair": False}], ids=str)
def test_keeps_the_contract_on_networks(options: dict[str, Any]) -> None:
    models = [("convolutions and products", NETWORK), ("two products", TWO)]
    for _, model in models:  # `check` wants what a graph returns to be described
        (output,) = oracle.run(running := oracle.session(model), oracle.random_feeds(running))
        model.graph.output[0].CopyFrom(oracle.tensor("y", output.shape))
    check_pass(LowRank(**options), models, sites=answered)
    if "form" not in options:
        check_pass(LowRank(form="factors", **options), models, sites=lambda graph: [weight.site for weight in weights_of(graph)])
