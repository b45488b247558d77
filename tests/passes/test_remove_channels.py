"""Channels removed by the pass: what is left against the very cuts, errors in ONNX Runtime, options, rules and reasons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxshrink.calibrate import Calibration
from onnxshrink.contract import Context, Report, Rule
from onnxshrink.errors import OptionError, PassError
from onnxshrink.graph.check import strictest_level
from onnxshrink.graph.edit import sort_nodes
from onnxshrink.graph.exporter import to_model
from onnxshrink.graph.files import load
from onnxshrink.graph.ir import Graph
from onnxshrink.graph.weights import weights as weights_of
from onnxshrink.importance import CHANNEL_CRITERIA
from onnxshrink.inputs import Feeds, Samples
from onnxshrink.passes.remove_channels import RemoveChannels
from onnxshrink.recipe import parse_recipe
from onnxshrink.testing import check_pass
from onnxshrink.trials import SampleTrials
from tests import oracle
from tests.graph.channel_oracle import distance
from tests.graph.test_channel_rules import CASES, HEADS, C, N, S, between, build, ints, linear, positive
from tests.test_channel_removal import feeds_of

Array = np.ndarray[Any, np.dtype[Any]]
PLAIN = between("Relu h -> a", "Conv a wa ba -> r", channels=8, wa=(8, C, 3, 3), ba=(8,))


def network() -> Any:
    """Returns a network of a residual sum, a concatenation, a depthwise convolution and attention, all over the same pictures."""
    lines = [
        ("Conv x w1 b1 -> t1", {"pads": [1, 1, 1, 1]}), "BatchNormalization t1 ns nc nm nv -> t2", "Relu t2 -> t3",
        "Conv t3 w2 -> t4", ("Conv t4 wd -> t5", {"group": 16, "pads": [1, 1, 1, 1]}), "Relu t5 -> t6", "Conv t6 w3 b3 -> t7", "Add t7 t3 -> t8",
        "Conv x w4 -> t9", ("Concat t8 t9 -> t10", {"axis": 1}), "Conv t10 w5 b5 -> t11",
        "Reshape t11 flat -> t12", ("Transpose t12 -> seq", {"perm": [0, 2, 1]}),
        *[line.replace(" x ", " seq ") if isinstance(line, str) else line for line in HEADS],
    ]  # fmt: skip
    constants = {
        "w1": (24, 4, 3, 3), "b1": (24,), "ns": (24,), "nc": (24,), "nm": (24,), "nv": positive(24), "w2": (16, 24, 1, 1), "wd": (16, 1, 3, 3),
        "w3": (24, 16, 1, 1), "b3": (24,), "w4": (8, 4, 1, 1), "w5": (8, 32, 1, 1), "b5": (8,), "flat": ints(N, 8, S * S),
        "wq": (8, C), "bq": (C,), "wk": (8, C), "wv": (8, C), "wo": (C, 8), "split": ints(0, 0, 3, 4), "join": ints(0, 0, C),
    }  # fmt: skip
    return build(lines, (N, 4, S, S), **constants)


def samples(feeds: Sequence[Feeds]) -> Samples:
    return Samples(lambda index: feeds[index], range(len(feeds)), "test")


def run(subject: RemoveChannels, model: Any, *rules: Rule, feeds: Sequence[Feeds] | None = None, **more: Any) -> tuple[dict[str, Array], Report, onnx.ModelProto]:
    """Returns the initializers of the result by name, the report, and the result, which is valid and runs."""
    graph = load(model)
    level = strictest_level(to_model(graph))[0]
    data = Calibration(samples(feeds), threads=1) if feeds is not None else None
    report = subject.apply(graph, Context(rules=rules, activations=data, **more))
    sort_nodes(graph)
    result = to_model(graph)
    assert strictest_level(result)[0] >= level
    named = [*(change.site for change in report.changes), *(skip.site for skip in report.skips)]
    assert len(named) == len(set(named))
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in result.graph.initializer}, report, result


def drift(model: Any, other: Any, feeds: Sequence[Feeds]) -> float:
    running = [oracle.session(one, optimise=False) for one in (model, other)]
    expected, got = (np.stack([oracle.run(one, feed)[0] for feed in feeds]) for one in running)
    return distance([expected], [got])


def width(found: Mapping[str, Array], name: str = "w1", axis: int = 0) -> int:
    return found[name].shape[axis]


def reasons(report: Report) -> dict[str, str]:
    return {skip.site: skip.reason for skip in report.skips}


class TestResult:
    @pytest.mark.parametrize("heads", [True, False])
    @pytest.mark.parametrize("calibrated", [True, False])
    def test_is_smaller_valid_and_nearer_with_repair(self, calibrated: bool, heads: bool) -> None:
        model = network()
        feeds, held_out = feeds_of(model, 24), feeds_of(model, 6, seed=7)
        errors = {}
        for repair in (True, False):
            subject = RemoveChannels(macs=0.6, round="none", repair=repair, heads=heads)
            _, report, result = run(subject, model, feeds=feeds if calibrated else None)
            assert result.ByteSize() < 0.9 * model.ByteSize()
            assert report.notes[0].startswith("macs x 0.")
            errors[repair] = drift(model, result, held_out)
        assert errors[True] < errors[False] if calibrated else errors[True] <= errors[False] * 1.05

    @pytest.mark.parametrize("case", ["Conv in groups", "ConvTranspose in groups", "channel shuffle", "squeeze and excite", "packed heads", "LSTM bidirectional", "GRU forward", "Flatten", "embedding", "IR 3", "GroupNormalization 21"])
    def test_is_valid_for_every_kind_of_group(self, case: str) -> None:
        model = CASES[case][0]
        feeds = feeds_of(model, 6)
        if case == "embedding":
            feeds = [{"x": np.abs(feed["x"]) % 9} for feed in feeds]
        for data in (feeds, None):
            _, report, result = run(RemoveChannels(macs=0.6, round="none"), model, feeds=data)
            assert report.changes
            assert np.isfinite(drift(model, result, feeds))
            assert result.ByteSize() < model.ByteSize()

    def test_integers_are_left_alone(self) -> None:
        model = CASES["DequantizeLinear per channel"][0]
        _, report, _ = run(RemoveChannels(macs=0.6, round="none"), model, feeds=feeds_of(model, 6))
        assert not report.changes
        assert any("remove channels before quantizing" in skip.reason for skip in report.skips)

    def test_is_what_is_left_of_each_weight(self) -> None:
        """Without repair: rows of what computes a channel, columns of what reads it."""
        found, report, _ = run(RemoveChannels(channels=0.5, round="none", repair=False), PLAIN)
        before = {tensor.name: numpy_helper.to_array(tensor) for tensor in PLAIN.graph.initializer}
        kept = [index for index, row in enumerate(before["w1"]) if any((row == other).all() for other in found["w1"])]
        inner = [index for index, value in enumerate(before["ba"]) if value in found["ba"]]
        np.testing.assert_array_equal(found["w1"], before["w1"][kept])
        np.testing.assert_array_equal(found["b1"], before["b1"][kept])
        np.testing.assert_array_equal(found["wa"], before["wa"][np.ix_(inner, kept)])
        np.testing.assert_array_equal(found["w2"], before["w2"][:, inner])
        assert len(kept) + len(inner) == 10
        details = {change.site: change.detail for change in report.changes}
        assert details["b1"] == f"12 -> {len(kept)}: without {12 - len(kept)} of 12 channels of 'w1'"
        assert details["wa"] == f"8x12x3x3 -> {len(inner)}x{len(kept)}x3x3: without {12 - len(kept)} of 12 channels of 'w1', {8 - len(inner)} of 8 channels of 'wa'"

    def test_claims_the_bytes_that_it_saves(self) -> None:
        _, report, result = run(RemoveChannels(macs=0.5, round="none"), PLAIN)
        claimed = sum(change.bytes_after - change.bytes_before for change in report.changes)
        assert abs(claimed - (result.ByteSize() - to_model(load(PLAIN)).ByteSize())) <= 8 * (1 + len(report.changes))

    def test_biases_of_layers_that_read_move(self) -> None:
        before = {tensor.name: numpy_helper.to_array(tensor) for tensor in PLAIN.graph.initializer}
        for repair in (True, False):
            subject = RemoveChannels(macs=1.0, round="none", repair=repair)
            found, report, _ = run(subject, PLAIN, Rule("w1", {"keep": 0.5}), feeds=feeds_of(PLAIN))
            assert width(found) == 6
            assert (found["ba"] != before["ba"]).any() == repair
            assert ("ba" in reasons(report)) == (not repair)

    def test_is_the_same_again(self) -> None:
        model = network()
        feeds = feeds_of(model, 9)
        first = run(RemoveChannels(macs=0.6, round="none"), model, feeds=feeds)[2].SerializeToString(deterministic=True)
        with ThreadPoolExecutor(2) as executor:
            second = run(RemoveChannels(macs=0.6, round="none"), model, feeds=feeds, executor=executor)[2]
        assert second.SerializeToString(deterministic=True) == first

    def test_of_float16_is_float16(self) -> None:
        rng = np.random.default_rng(0)
        nodes = [onnx.helper.make_node("MatMul", ["x", "w1"], ["h"]), onnx.helper.make_node("MatMul", ["h", "w2"], ["y"])]
        values = [oracle.value("w1", rng.standard_normal((4, C)), np.float16), oracle.value("w2", rng.standard_normal((C, 6)), np.float16)]
        model = oracle.make_model(nodes, [oracle.tensor("x", [9, 4], 10)], [oracle.tensor("y", None, 10)], values)
        feeds = [{"x": feed["x"].astype(np.float16)} for feed in feeds_of(model)]
        found, _, result = run(RemoveChannels(channels=0.5, round="none"), model, feeds=feeds)
        assert (found["w1"].dtype, found["w2"].dtype, width(found, axis=1)) == (np.float16, np.float16, 6)
        assert drift(model, result, feeds) < 0.1  # 4 inputs cannot make 12 different channels


class TestTargets:
    @pytest.mark.parametrize("scope", ["auto", "local", "global", "sensitivity"])
    @pytest.mark.parametrize(("name", "share"), [("macs", 0.5), ("params", 0.7), ("channels", 0.4)])
    def test_are_met(self, name: str, share: float, scope: str) -> None:
        model = network()
        subject = RemoveChannels(**{name: share}, round="none", scope=scope, least=0.0)
        for feeds in (feeds_of(model, 6), None):
            _, report, _ = run(subject, model, feeds=feeds)
            reached = float(report.notes[0].split(f"{name} x ")[1].split()[0].rstrip(","))
            assert reached <= share + 1e-3
            assert not report.missed

    def test_of_latency_is_measured(self) -> None:
        class Clock(SampleTrials):
            def latency_ratio(self, before: Graph, after: Graph) -> float:
                return sum(one.size for one in after.constants) / sum(one.size for one in before.constants)

        feeds = feeds_of(PLAIN, 6)
        _, report, result = run(RemoveChannels(latency=0.6, round="none"), PLAIN, feeds=feeds, trials=Clock(samples(feeds)))
        assert "latency x 0.5" in report.notes[0] or "latency x 0.6" in report.notes[0]
        sizes = [sum(int(np.prod(tensor.dims)) for tensor in one.graph.initializer) for one in (result, PLAIN)]
        assert 0.5 * sizes[1] < sizes[0] <= 0.6 * sizes[1]

    def test_of_latency_want_something_that_runs(self) -> None:
        with pytest.raises(PassError, match="latency cannot be measured here"):
            run(RemoveChannels(latency=0.6), PLAIN)

    def test_that_are_missed_are_said(self) -> None:
        _, report, _ = run(RemoveChannels(macs=0.1, round="none", least=0.8), PLAIN)
        assert report.missed.startswith("asked for macs x 0.1; macs x 0.")
        assert report.missed.endswith(" is what can be had with rules, least and heads as they are")
        _, report, _ = run(RemoveChannels(channels=0.1, round="8"), PLAIN)
        assert report.missed == "asked for channels x 0.1; channels x 0.800 is what can be had with rules, least and heads as they are in blocks of 8 (round)"

    def test_that_are_missed_for_want_of_groups_are_said(self) -> None:
        model = build(["MatMul x w1 -> y"], (N, 4), w1=(4, C))
        _, report, _ = run(RemoveChannels(macs=0.5, round="none"), model)
        assert not report.changes
        assert report.missed == "asked for macs x 0.5; macs x 1.000 is what can be had with rules, least and heads as they are"

    def test_are_three_quarters_of_the_work_unless_given(self) -> None:
        _, report, _ = run(RemoveChannels(round="none"), PLAIN)
        assert 0.65 < float(report.notes[0].split()[2].rstrip(",")) <= 0.75

    def test_of_all_change_nothing(self) -> None:
        before = to_model(load(PLAIN)).SerializeToString(deterministic=True)
        _, report, result = run(RemoveChannels(macs=1.0, round="none"), PLAIN, feeds=feeds_of(PLAIN, 6))
        assert not report.changes
        assert result.SerializeToString(deterministic=True) == before


class TestOptions:
    def test_a_share_of_its_own_is_no_target(self) -> None:
        with pytest.raises(OptionError, match="keep gives every group its share, so macs has nothing to say"):
            RemoveChannels(macs=0.5, keep=0.3)
        assert RemoveChannels(macs=0.5).with_options({"keep": 0.3}) == RemoveChannels(keep=0.3)

    @pytest.mark.parametrize("data", [True, False])
    @pytest.mark.parametrize("criterion", ["auto", *CHANNEL_CRITERIA])
    def test_criteria(self, criterion: str, data: bool) -> None:
        found, report, _ = run(RemoveChannels(channels=0.5, round="none", criterion=criterion), PLAIN, feeds=feeds_of(PLAIN, 6) if data else None)
        assert width(found) + width(found, "wa") == 10
        warned = any("no calibration inputs were left" in note or "none were left" in note for note in report.notes)
        assert warned != data

    def test_l1_takes_the_least(self) -> None:
        model = linear("Relu h -> r")
        found, _, _ = run(RemoveChannels(channels=0.5, round="none", criterion="l1", repair=False), model)
        first, second = (numpy_helper.to_array(tensor) for tensor in model.graph.initializer)
        scores = np.abs(first).sum(axis=0) / np.abs(first).sum() + np.abs(second).sum(axis=1) / np.abs(second).sum()
        kept = np.sort(np.argsort(scores)[6:])
        np.testing.assert_array_equal(found["w1"], first[:, kept])
        np.testing.assert_array_equal(found["w2"], second[kept])

    def test_random_channels_go_by_the_seed(self) -> None:
        results = [run(RemoveChannels(channels=0.5, round="none", criterion="random"), PLAIN, seed=seed)[0]["b1"] for seed in (0, 0, 1)]
        np.testing.assert_array_equal(results[0], results[1])
        assert results[0].shape != results[2].shape or (results[0] != results[2]).any()

    @pytest.mark.parametrize(("round_", "block"), [("none", 1), ("1", 1), ("4", 4), ("6", 6)])
    def test_widths_are_rounded(self, round_: str, block: int) -> None:
        found, report, _ = run(RemoveChannels(channels=0.55, round=round_), PLAIN)
        for name, size in (("w1", C), ("wa", 8)):
            assert width(found, name) % block == 0 or width(found, name) == size
        assert width(found) < C
        assert not any(note.startswith("widths are multiples") for note in report.notes)

    def test_widths_are_rounded_to_what_the_processor_computes_at_a_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("onnxshrink.shares.channel_block", lambda: 4)
        found, report, _ = run(RemoveChannels(macs=0.6), PLAIN)
        assert width(found) in (4, 8, 12)
        assert any(note.startswith("widths are multiples of 4, which this processor computes at a time") for note in report.notes)
        found, report, _ = run(RemoveChannels(params=0.7), PLAIN)  # bytes are saved by every channel
        assert RemoveChannels(params=0.7).block == 1
        assert not any(note.startswith("widths are multiples") for note in report.notes)

    def test_whole_heads_or_the_same_places_of_each(self) -> None:
        model = build(HEADS, (N, S, 8), wq=(8, C), bq=(C,), wk=(8, C), wv=(8, C), wo=(C, 8), split=ints(0, 0, 3, 4), join=ints(0, 0, C))
        found, _, _ = run(RemoveChannels(channels=0.7, round="none"), model)
        assert {name: found[name].shape for name in ("wq", "wk", "wv", "wo")} == {"wq": (8, 8), "wk": (8, 8), "wv": (8, 8), "wo": (8, 8)}
        found, _, _ = run(RemoveChannels(channels=0.5, round="none", heads=False), model)
        assert width(found, "wq", 1) % 3 == width(found, "wv", 1) % 3 == 0
        assert width(found, "wq", 1) + width(found, "wv", 1) == C

    def test_queries_and_keys_are_not_for_free(self) -> None:
        """No weight reads them, and still the outputs miss them: with data the cut is no worse than without."""
        lines = ["MatMul x wq -> q", "MatMul x wk -> k", ("Transpose k -> kt", {"perm": [0, 2, 1]}), "MatMul q kt -> a", ("Softmax a -> p", {"axis": -1}), "MatMul x wv -> v", "MatMul p v -> o", "MatMul o wo -> y"]  # fmt: skip
        model = build(lines, (N, S, 4), wq=(4, 16), wk=(4, 16), wv=(4, 16), wo=(16, 4))
        found, _, _ = run(RemoveChannels(channels=0.7, round="none"), model, feeds=feeds_of(model, 12))
        assert width(found, "wv", 1) < 16  # 4 inputs, 16 channels: most of them say the same
        assert width(found, "wq", 1) > 2  # what least alone would leave

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"macs": 0.5, "params": 0.5}, "remove-channels: macs and params are two targets; give one of them"),
            ({"macs": 0.5, "channels": 0.5, "latency": 0.5}, "remove-channels: macs and channels are two targets; give one of them"),
            ({"macs": 0.0}, "remove-channels: macs must be a number from 0.01 to 1, got 0.0"),
            ({"latency": 1.5}, "remove-channels: latency must be a number from 0.01 to 1, got 1.5"),
            ({"round": "0"}, "remove-channels: round must be auto, none or a number from 1 to 1024, got '0'"),
            ({"round": "1025"}, "remove-channels: round must be auto, none or a number from 1 to 1024, got '1025'"),
            ({"round": "-8"}, "remove-channels: round must be auto, none or a number from 1 to 1024, got '-8'"),
            ({"round": "eight"}, "remove-channels: round must be auto, none or a number from 1 to 1024, got 'eight'"),
            ({"scope": "layer"}, "remove-channels: scope must be one of auto, local, global, sensitivity, got 'layer'"),
            ({"criterion": "l0"}, "remove-channels: criterion must be one of auto, reconstruction, activation, bn-scale, l1, l2, fpgm, lamp, random, got 'l0'"),
            ({"keep": -0.1}, "remove-channels: keep must be a number from 0 to 1, got -0.1"),
            ({"least": 2.0}, "remove-channels: least must be a number from 0 to 1, got 2.0"),
        ],
    )
    def test_that_make_no_sense_are_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(OptionError) as caught:
            RemoveChannels(**options)
        assert str(caught.value) == message

    def test_weaker_is_three_quarters_of_the_cut(self) -> None:
        shares, subject = [], RemoveChannels(criterion="l1")
        while subject is not None:
            assert subject.criterion == "l1"
            assert subject.budget is not None
            assert subject.budget.measure == "macs"
            shares.append(subject.budget.share)
            subject = subject.weaker()
        np.testing.assert_allclose(shares, 1 - 0.25 * 0.75 ** np.arange(len(shares)))
        assert 0.95 < shares[-1] <= 0.97
        softer = RemoveChannels(latency=0.6).weaker()
        assert softer is not None
        assert softer.latency == pytest.approx(0.7)
        assert softer.macs is None
        assert RemoveChannels(keep=0.5).weaker() is None
        assert RemoveChannels(macs=0.99).weaker() is None

    def test_sites_hang_together(self) -> None:
        assert not RemoveChannels().sites_are_independent


class TestRules:
    def test_leave_groups_alone(self) -> None:
        for name in ("w1", "b1", "wa"):  # any member of a group
            found, report, _ = run(RemoveChannels(channels=0.7, round="none"), PLAIN, Rule(name, skip=True))
            left_alone = {"w1": "w1", "b1": "w1", "wa": "wa"}[name]
            assert width(found, left_alone) == {"w1": C, "wa": 8}[left_alone]
            assert "left alone by a rule" in reasons(report)["b1" if name != "wa" else "ba"]

    def test_match_nodes_too(self) -> None:
        found, _, _ = run(RemoveChannels(channels=0.7, round="none"), PLAIN, Rule("h", skip=True))
        assert width(found) == C

    def test_keep_a_share_of_some_groups(self) -> None:
        found, _, _ = run(RemoveChannels(macs=0.3, round="none"), PLAIN, Rule("w1", {"keep": 0.75}))
        assert width(found) == 9
        found, report, _ = run(RemoveChannels(keep=0.5, round="none"), PLAIN)
        assert (width(found), width(found, "wa")) == (6, 4)
        assert not report.missed

    def test_of_a_weight_hold_for_its_group(self) -> None:
        """Its bias, which no rule names, has no say."""
        found, _, _ = run(RemoveChannels(keep=0.5, round="none"), PLAIN, Rule("w1", {"keep": 0.25}))
        assert width(found) == 3
        found, _, _ = run(RemoveChannels(macs=0.01, round="none", least=0.5), PLAIN, Rule("w1", {"least": 0.0}))
        assert width(found) == 1

    def test_bound_what_is_left(self) -> None:
        found, _, _ = run(RemoveChannels(macs=0.01, round="none"), PLAIN, Rule("w1", {"least": 0.5}))
        assert width(found) == 6
        assert width(found, "wa") == 1

    def test_of_the_whole_model_are_no_rules(self) -> None:
        recipe = 'format = 1\n[[pass]]\nname = "remove-channels"\n[[pass.rule]]\nmatch = "w1"\noptions = { macs = 0.5 }\n'
        with pytest.raises(OptionError, match="macs"):
            parse_recipe(recipe)


class TestReasons:
    def test_of_every_weight(self) -> None:
        model = between("Relu h -> a", ("Softmax a -> r", {"axis": 1}), "Conv x wa -> b", "Relu b -> d", wa=(5, 4, 1, 1))
        model.graph.node.insert(len(model.graph.node) - 1, onnx.helper.make_node("ReduceMean", ["d"], ["e"], axes=[1]))
        model.graph.node.insert(len(model.graph.node) - 1, onnx.helper.make_node("Add", ["r", "e"], ["f"]))
        model.graph.node[-1].input[0] = "f"
        _, report, _ = run(RemoveChannels(macs=0.5, round="none"), model)
        found = reasons(report)
        assert "weighs its positions" in found["w1"]
        assert "a sum or mean over these channels would become that of fewer ('e')" in found["wa"]
        assert all(found.values())

    def test_of_groups_of_one_block(self) -> None:
        _, report, _ = run(RemoveChannels(macs=0.5, round="16"), PLAIN)
        assert reasons(report)["b1"] == "its 12 channels fill no more than one block of 16: fewer would save no time (round=none cuts them)"

    def test_of_heads_that_stay(self) -> None:
        """3 heads of 16 are three blocks of 16, not a part of one."""
        shape = {"split": ints(0, 0, 3, 16), "join": ints(0, 0, 48)}
        model = build(HEADS, (N, S, 8), wq=(8, 48), bq=(48,), wk=(8, 48), wv=(8, 48), wo=(48, 8), **shape)
        _, report, _ = run(RemoveChannels(macs=1.0, round="16"), model)
        assert "one block" not in reasons(report)["wq"]

    def test_of_groups_that_a_rule_keeps_whole(self) -> None:
        _, report, _ = run(RemoveChannels(channels=0.8, round="none"), PLAIN, Rule("*", {"keep": 1.0}))
        assert "others cost less" not in reasons(report)["b1"]

    def test_of_groups_that_stay(self) -> None:
        _, report, _ = run(RemoveChannels(macs=1.0, round="none"), PLAIN)
        assert reasons(report)["b1"] == "all 12 channels stay: others cost less for what they save"

    def test_of_what_holds_no_channels(self) -> None:
        model = linear("Reshape h s -> r", s=ints(N, S, C))
        _, report, _ = run(RemoveChannels(macs=1.0), model)
        assert reasons(report)["s"] == "holds no channels that could be cut"


class TestAwkward:
    @pytest.mark.parametrize("value", [np.nan, np.inf])
    @pytest.mark.parametrize("calibrated", [True, False])
    @pytest.mark.parametrize("name", ["w1", "w2"])
    def test_weights_that_are_not_finite_are_left_alone(self, name: str, calibrated: bool, value: float) -> None:
        """Nothing is known of what they compute, so nothing is cut for them; the rest of the model is as usual."""
        model = between("Relu h -> a", "Conv x wa -> b", "Relu b -> d", "Conv d wb -> e", "Add a e -> r", wa=(6, 4, 1, 1), wb=(C, 6, 1, 1))
        tensor = next(one for one in model.graph.initializer if one.name == name)
        spoiled = numpy_helper.to_array(tensor).copy()
        spoiled[0, 0] = value
        tensor.CopyFrom(oracle.value(name, spoiled))
        feeds = feeds_of(model, 6) if calibrated and name == "w2" else None
        _, report, _ = run(RemoveChannels(macs=0.6, round="none"), model, feeds=feeds)
        assert "holds NaN or infinity" in reasons(report).get(name, "")

    def test_products_of_whole_numbers(self) -> None:
        rng = np.random.default_rng(0)
        model = build([("Cast x -> i", {"to": 6}), "MatMul i w1 -> h", "MatMul h w2 -> j", ("Cast j -> y", {"to": 1})], (N, 4),
                      w1=rng.integers(-5, 5, (4, C)).astype(np.int32), w2=rng.integers(-5, 5, (C, 6)).astype(np.int32))  # fmt: skip
        _, _, result = run(RemoveChannels(macs=0.6, round="none"), model, feeds=feeds_of(model, 6))
        assert np.isfinite(drift(model, result, feeds_of(model, 2)))

    @pytest.mark.parametrize("zero", [0, 7])
    def test_stored_integers_are_not_made_worse(self, zero: int) -> None:
        rng = np.random.default_rng(0)
        model = build(["DequantizeLinear q s z -> w2", "MatMul x w1 -> h", "Relu h -> r", "MatMul r w2 -> y"], (N, 4), w1=(4, C),
                      q=rng.integers(-120, 120, (C, 6)).astype(np.int8), s=np.float32(0.1), z=np.int8(zero))  # fmt: skip
        feeds = feeds_of(model, 12)
        results = [run(RemoveChannels(channels=0.5, round="none", repair=repair), model, feeds=feeds) for repair in (True, False)]
        assert results[0][0]["q"].dtype == np.int8
        errors = [drift(model, result, feeds) for _, _, result in results]
        assert errors[0] <= errors[1] * 1.001

    def test_inputs_that_are_always_zero(self) -> None:
        model = linear("Sub h h -> r")
        _, report, _ = run(RemoveChannels(channels=0.5, round="none"), model, feeds=feeds_of(model, 6))
        assert report.changes

    def test_a_weight_in_several_places(self) -> None:
        """Tied: multiplied with from both sides, so as a matrix it has no columns of its own."""
        model = build(["MatMul x w1 -> h", "MatMul h w2 -> a", ("Gemm h w2 -> b", {"transB": 1}), "Add a b -> r", "MatMul r w3 -> y"], (N, 4), w1=(4, C), w2=(C, C), w3=(C, 6))
        feeds = feeds_of(model, 6)
        found, _, result = run(RemoveChannels(channels=0.6, round="none"), model, feeds=feeds)
        assert width(found, "w2") == width(found, "w2", 1) == width(found, "w1", 1) < C
        assert np.isfinite(drift(model, result, feeds))

    @pytest.mark.parametrize("lines", [["Relu x -> y"], ["MatMul x w1 -> y"]], ids=["no weights", "no group"])
    def test_models_without_any_group(self, lines: list[str]) -> None:
        model = build(lines, (N, 4), **({"w1": (4, C)} if len(lines[0]) > 11 else {}))
        _, report, result = run(RemoveChannels(macs=0.5), model, feeds=feeds_of(model, 6))
        assert not report.changes
        assert result.SerializeToString(deterministic=True) == to_model(load(model)).SerializeToString(deterministic=True)

    def test_groups_of_one_channel(self) -> None:
        model = build(["MatMul x w1 -> h", "MatMul h w2 -> y"], (N, 4), w1=(4, 1), w2=(1, 6))
        _, report, _ = run(RemoveChannels(macs=0.1, round="none", least=0.0), model, feeds=feeds_of(model, 6))
        assert not report.changes

    def test_dead_channels_go_first(self) -> None:
        """A third of the channels are always zero: the outputs do not miss them, and all others stay as they are."""
        shift = np.where(np.arange(C) % 3 == 0, -1e4, 0.0).astype(np.float32)
        model = linear("Add h b -> a", "Relu a -> r", b=shift)
        feeds = feeds_of(model, 12)
        found, _, result = run(RemoveChannels(channels=2 / 3 + 1e-6, round="none", criterion="activation"), model, feeds=feeds)
        np.testing.assert_array_equal(found["b"], 0.0)
        assert drift(model, result, feeds) < 1e-3


@pytest.mark.parametrize("options", [{"macs": 0.5, "round": "none"}, {"channels": 0.5, "round": "4", "scope": "local", "criterion": "fpgm", "heads": False}, {"keep": 0.5, "repair": False, "round": "8"}], ids=str)
def test_keeps_the_contract_of_passes(options: dict[str, Any]) -> None:
    check_pass(RemoveChannels(**options), sites=lambda graph: [weight.site for weight in weights_of(graph)])


def test_keeps_the_contract_on_a_network() -> None:
    models = [("a bit of everything", network()), ("heads", CASES["heads"][0]), ("LSTM", CASES["LSTM bidirectional"][0]), ("shuffle", CASES["channel shuffle"][0])]
    for _, model in models:  # `check` wants what a graph returns to be described
        (output,) = oracle.run(running := oracle.session(model), oracle.random_feeds(running))
        model.graph.output[0].CopyFrom(oracle.tensor("y", output.shape))
    check_pass(RemoveChannels(macs=0.6, round="none"), models)
