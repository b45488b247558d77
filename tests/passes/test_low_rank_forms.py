"""Which pieces the pass takes by itself: none that later rounding would ruin, none that cannot be what they promise, and by which rule."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest

from onnxshrink import Compressed, compress
from onnxshrink.contract import Pass, Rule, Step
from onnxshrink.errors import OptionError
from onnxshrink.graph.files import load
from onnxshrink.passes.huffman import Huffman
from onnxshrink.passes.low_rank import LowRank
from onnxshrink.passes.share_weights import ShareWeights
from onnxshrink.passes.sparsify import Sparsify
from onnxshrink.passes.tidy import Tidy
from onnxshrink.recipe import parse_recipe
from tests import oracle
from tests.graph.test_channel_rules import build
from tests.passes.test_low_rank import CUT, Array, Clock, details, drift, reasons, run
from tests.test_factorization import NETWORK, feeds_of

SEQUENCE = (9, 32)
WIDE = build(["MatMul x w1 -> h", "Relu h -> r", "MatMul r w2 -> y"], SEQUENCE, w1=(32, 96), w2=(96, 48))  # nodes take next to nothing
NOTE = "no interpolative pieces, which a later pass that rounds weights would ruin; form=interpolative asks for them"
data = pytest.mark.parametrize("data", [True, False], ids=["data", "no data"])


def taken(details: dict[str, str]) -> set[str]:
    """Returns the forms that details tell of."""
    return {detail.split(",")[0] for detail in details.values()}


class TestRoundedLater:
    @data
    @pytest.mark.parametrize("options", [{"params": 0.6}, {"macs": 0.6, "round": "none"}, {"rank": 4}, {"energy": 0.8}, {"evbmf": True}], ids=str)
    def test_takes_what_bears_it(self, options: dict[str, Any], data: bool) -> None:
        feeds = feeds_of() if data else None
        _, report, result = run(LowRank(**options), feeds=feeds, rounded_later=True)
        assert report.changes
        assert "interpolative" not in taken(details(report))
        assert NOTE in report.notes
        _, other, factors = run(LowRank(form="factors", **options), feeds=feeds)
        assert result.SerializeToString(deterministic=True) == factors.SerializeToString(deterministic=True)
        assert NOTE not in other.notes
        _, alone, _ = run(LowRank(**options), WIDE, feeds=feeds_of(SEQUENCE) if data else None)
        assert "interpolative" in taken(details(alone))
        assert NOTE not in alone.notes

    def test_takes_what_it_is_told_to(self) -> None:
        _, report, _ = run(LowRank(rank=4, form="interpolative"), rounded_later=True)
        assert taken(details(report)) == {"interpolative"}
        assert NOTE not in report.notes
        _, report, _ = run(LowRank(rank=4), NETWORK, Rule("w3", {"form": "interpolative"}), rounded_later=True)
        assert [site for site, detail in details(report).items() if detail.startswith("interpolative")] == ["w3"]
        _, report, _ = run(LowRank(rank=4, form="channel"), rounded_later=True)
        assert details(report)["w1"].startswith("channel")

    @staticmethod
    def compressed(*steps: Pass | Step, model: onnx.ModelProto | None = None) -> Compressed:
        model = model or build(["MatMul x w1 -> h", "Relu h -> r", "MatMul r w2 -> y"], SEQUENCE, w1=(32, 48), w2=(48, 32))
        model.graph.output[0].CopyFrom(oracle.tensor("y", SEQUENCE))
        return compress(model, steps, calibration=feeds_of(SEQUENCE))

    def forms(self, *steps: Pass | Step) -> tuple[set[str], Sequence[str]]:
        report = next(step for step in self.compressed(*steps).report.passes if step.name == "low-rank")
        assert report.changes
        return taken({change.site: change.detail for change in report.changes}), report.notes

    def test_is_said_by_the_passes_that_come_after(self) -> None:
        for later in (ShareWeights(bits=5), Step(Sparsify(sparsity=0.2), [Rule("*", skip=True)])):
            forms, notes = self.forms(LowRank(params=0.6), Tidy(), later)
            assert forms == {"two-matmuls"}
            assert NOTE in notes
        for steps in ([LowRank(params=0.6)], [LowRank(params=0.6), Tidy(), Huffman(raise_opset=True)]):
            forms, notes = self.forms(*steps)
            assert forms == {"interpolative"}
            assert NOTE not in notes
        forms, notes = self.forms(LowRank(params=0.6, form="interpolative"), ShareWeights(bits=5))
        assert forms == {"interpolative"}
        assert NOTE not in notes

    def test_is_the_better_choice(self) -> None:
        """Codes of few bits: what they do to the kept outputs is multiplied by what may be large."""
        rng = np.random.default_rng(1)
        pairs = [(rng.standard_normal((rows, 12)), rng.standard_normal((12, columns))) for rows, columns in ((32, 48), (48, 32))]
        weights = {f"w{index}": (left @ right / 20).astype(np.float32) for index, (left, right) in enumerate(pairs, 1)}
        model = build(["MatMul x w1 -> h", "Relu h -> r", "MatMul r w2 -> y"], SEQUENCE, **weights)
        errors = {}
        for form in ("auto", "interpolative"):
            done = self.compressed(LowRank(rank=12, form=form), ShareWeights(bits=6), model=model)
            errors[form] = drift(model, done.to_model(), feeds_of(SEQUENCE, 2, seed=5))
        assert errors["auto"] < 0.5 * errors["interpolative"]


class TestRulesInTurn:
    def test_the_last_that_sets_a_rank_wins(self) -> None:
        ranks = {"rank": 2, "share": 0.5, "energy": 0.97, "error": 0.7}
        alone = {name: details(run(LowRank(rank=9), NETWORK, Rule("w3", {name: setting}))[1])["w3"] for name, setting in ranks.items()}
        assert len(set(alone.values())) == len(ranks)
        for first, second in itertools.permutations(ranks, 2):
            rules = [Rule("w*", {first: ranks[first]}), Rule("w3", {second: ranks[second]})]
            _, report, _ = run(LowRank(rank=9), NETWORK, *rules)
            assert details(report)["w3"] == alone[second]
        for subject in (LowRank(params=0.99), LowRank(macs=0.99, round="none"), LowRank(evbmf=True)):
            _, report, _ = run(subject, NETWORK, *rules)
            assert details(report)["w3"] == alone[second]

    def test_what_they_do_not_say_stays(self) -> None:
        rules = [Rule("w*", {"share": 0.3, "form": "two-products"}), Rule("w3", {"rank": 3}), Rule("w4", {"form": "interpolative"})]
        _, report, _ = run(LowRank(params=0.9), NETWORK, *rules)
        assert details(report)["w3"].startswith("two-matmuls, rank 3 of 16")
        assert details(report)["w4"].startswith("interpolative, rank 5 of 18")

    def test_of_empirical_bayes(self) -> None:
        rules = [Rule("w*", {"evbmf": True}), Rule("w3", {"rank": 2}), Rule("w4", {"rank": 2}), Rule("w4", {"evbmf": True})]
        _, report, _ = run(LowRank(rank=9), NETWORK, *rules)
        _, bayes, _ = run(LowRank(evbmf=True))
        assert details(report)["w3"].startswith("interpolative, rank 2 of 16")
        assert {site: detail for site, detail in details(report).items() if site != "w3"} == {
            site: detail for site, detail in details(bayes).items() if site != "w3"
        }

    @pytest.mark.parametrize("options", [{"rank": 2, "share": 0.5}, {"evbmf": True, "error": 0.5}, {"energy": 0.5, "error": 0.0}], ids=str)
    def test_one_that_sets_it_twice_is_refused(self, options: dict[str, Any]) -> None:
        with pytest.raises(OptionError, match=r"^low-rank: \w+ and \w+ both set the ranks; give one of them$"):
            run(LowRank(), NETWORK, Rule("w3", options))

    def test_in_recipes(self) -> None:
        recipe = """
            format = 1
            [[pass]]
            name = "low-rank"
            [[pass.rule]]
            match = "w*"
            options = { rank = 2 }
            [[pass.rule]]
            match = "w3"
            options = { share = 0.5, form = "factors" }
        """
        (step,) = parse_recipe(recipe).steps
        assert isinstance(step.run, LowRank)
        _, report, _ = run(step.run, NETWORK, *step.rules)
        assert details(report)["w3"].startswith("two-matmuls, rank 8 of 16")
        assert set(details(report)) == set(CUT)


def alive(size: int, which: str) -> Array:
    """Returns which outputs are of use."""
    found = np.ones(size, bool)
    if which == "every second":
        found[::2] = False
    else:
        found[: size // 4] = found[-(size // 4) :] = False
    return found


class TestDeadOutputs:
    """Outputs that are zero, or copies of one, do not tell the others: what the pass says of its pieces must be so of all of them."""

    ALL = pytest.mark.parametrize("which", ["every second", "both ends"])

    @data
    @ALL
    @pytest.mark.parametrize("copies", [False, True], ids=["zeros", "copies"])
    def test_of_a_weight_of_low_rank(self, copies: bool, which: str, data: bool) -> None:
        """Nothing is lost by factors, so nothing may be."""
        rng = np.random.default_rng(0)
        weight = (rng.standard_normal((32, 4)) @ rng.standard_normal((4, 40))).astype(np.float32)
        weight[:, ~alive(40, which)] = weight[:, 20:21] if copies else 0
        model = build(["MatMul x w -> y"], (9, 32), w=weight)
        choices: list[dict[str, Any]] = [{"rank": 4}, {"energy": 1 - 1e-6}, {"error": 1e-3}, {"params": 0.45}]
        drifts = {}
        for options in choices:
            _, report, result = run(LowRank(**options), model, feeds=feeds_of((9, 32)) if data else None)
            assert "w" in details(report)
            drifts[str(options)] = drift(model, result, feeds_of((9, 32), 2, seed=5))
        assert max(drifts.values()) < 2e-3, drifts

    @data
    @ALL
    def test_of_layers_in_a_row(self, which: str, data: bool) -> None:
        """At the same budget no worse than factors, which do not mind."""
        weights = {}
        for seed, name in enumerate(("w1", "w2")):
            rng = np.random.default_rng(seed)
            left, right = (np.linalg.qr(rng.standard_normal((32, 32)))[0] for _ in range(2))
            weights[name] = np.where(alive(32, which), (left * 0.8 ** np.arange(32)) @ right, 0).astype(np.float32)
        model = build(["MatMul x w1 -> h", "MatMul h w2 -> y"], (9, 32), **weights)
        feeds = feeds_of((9, 32)) if data else None
        errors = [drift(model, run(LowRank(params=0.4, form=form), model, feeds=feeds)[2], feeds_of((9, 32), 4, seed=5)) for form in ("auto", "factors")]
        assert errors[0] < 1.1 * errors[1] + 1e-4

    @ALL
    def test_of_kernels(self, which: str) -> None:
        rng = np.random.default_rng(0)
        weight = (rng.standard_normal((40, 4)) @ rng.standard_normal((4, 12 * 9))).astype(np.float32)
        weight[~alive(40, which)] = 0
        model = build([("Conv x w b -> y", {"pads": [1, 1, 1, 1]})], (2, 12, 6, 6), w=weight.reshape(40, 12, 3, 3), b=(40,))
        for feeds in (feeds_of((2, 12, 6, 6)), None):
            _, report, result = run(LowRank(rank=4), model, feeds=feeds)
            assert "w" in details(report)
            assert drift(model, result, feeds_of((2, 12, 6, 6), 2, seed=5)) < 1e-4


class TestWorkAndTime:
    def test_joining_is_timed_with_the_rest(self) -> None:
        """Each form by itself, pieces as they would stand in the file."""
        feeds = feeds_of(SEQUENCE)
        seen: list[list[str]] = []

        class Watching(Clock):
            def part_ratio(self, before: Any, after: Any, inputs: Sequence[str], outputs: Sequence[str]) -> float:
                seen.append([node.op for node in after.nodes])
                return 2.0 if any(node.op == "Concat" for node in after.nodes) else 0.5

        model = build(["MatMul x w1 -> h", "Relu h -> r", "MatMul r w2 -> y"], SEQUENCE, w1=(32, 48), w2=(48, 32))
        _, report, _ = run(LowRank(macs=0.6, round="none"), model, feeds=feeds, trials=Watching(feeds))
        assert taken(details(report)) == {"two-matmuls"}
        assert any("Concat" in ops for ops in seen)
        assert "MatMul" in seen[0]

    def test_macs_of_pieces_are_those_that_run(self) -> None:
        model = build(["MatMul x w1 -> h", "Relu h -> r", "MatMul r w2 -> y"], SEQUENCE, w1=(32, 48), w2=(48, 32))
        clock = Clock(feeds_of(SEQUENCE))
        for rank in (5, 20):
            found, report, _ = run(LowRank(rank=rank, form="interpolative"), model)
            assert not reasons(report)
            assert sum(array.size for array in found.values()) == 2 * rank * (32 + 48 - rank)
        _, report, result = run(LowRank(macs=0.7, round="none", form="interpolative"), model, trials=clock)
        counted = [sum((clock.macs(load(one)) or {}).values()) for one in (result, model)]
        assert 0.65 < counted[0] / counted[1] <= 0.7
