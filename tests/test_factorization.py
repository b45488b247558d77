"""Forms and ranks of weights: losses against outputs that were computed, choices against all there are, pieces against ONNX Runtime."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxshrink.calibrate import Calibration
from onnxshrink.contract import Context
from onnxshrink.factorization import (
    Option,
    Rule,
    Target,
    by_rules,
    choose,
    factor_in_turn,
    filled,
    option_lists,
    singular_values,
)
from onnxshrink.graph.edit import set_values, sort_nodes
from onnxshrink.graph.exporter import to_model
from onnxshrink.graph.factor_forms import Pieces
from onnxshrink.graph.factoring import forms, split
from onnxshrink.graph.files import load
from onnxshrink.graph.ir import Graph
from onnxshrink.graph.weights import weights
from onnxshrink.inputs import Feeds, Samples
from onnxshrink.numerics.gram import Gram
from onnxshrink.numerics.ranks import evbmf_rank, rank_at_energy
from onnxshrink.repair import Repaired, with_grams
from onnxshrink.sensitivity import OutputProbe
from tests import oracle
from tests.graph.test_channel_rules import build

Array = np.ndarray[Any, np.dtype[Any]]
SIZES = (6, 12, 7, 7)  # of the input of the network
NETWORK = build(
    [("Conv x w1 b1 -> h", {"pads": [1, 1, 1, 1]}), "Relu h -> r", "Conv r w2 b2 -> p", ("Transpose p -> t", {"perm": [0, 2, 3, 1]}),
     "MatMul t w3 -> m", "Reshape m flat -> f", ("Gemm f w4 b4 -> y", {"transB": 1})],
    SIZES, w1=(20, 12, 3, 3), b1=(20,), w2=(16, 20, 1, 1), b2=(16,), w3=(16, 24), flat=np.array([-1, 24]), w4=(18, 24), b4=(18,),
)  # fmt: skip


def feeds_of(shape: Sequence[int] = SIZES, count: int = 8, seed: int = 0) -> list[Feeds]:
    """Returns inputs whose channels hang together."""
    axis = 1 if len(shape) == 4 else len(shape) - 1
    mix = np.random.default_rng(99).standard_normal((shape[axis], shape[axis])) * 0.7 ** np.arange(shape[axis])
    drawn = [np.random.default_rng([seed, index]).standard_normal(shape) for index in range(count)]
    return [{"x": np.moveaxis(np.moveaxis(one, axis, -1) @ mix.T + 0.3, -1, axis).astype(np.float32)} for one in drawn]


def calibrated(feeds: Sequence[Feeds]) -> Context:
    return Context(activations=Calibration(Samples(lambda index: feeds[index], range(len(feeds)), "test"), threads=1))


def targets_of(graph: Graph, by_work: bool = False, block: int = 1, kinds: Sequence[str] = ()) -> list[Target]:
    """Returns all weights that can be cut, of some forms; work is made up."""
    found = [(weight, some) for weight, some in forms(graph, weights(graph)) if not isinstance(some, str)]
    kept = [(weight, tuple(form for form in some if not kinds or form.kind in kinds)) for weight, some in found]
    return [Target(weight, some, float(some[0].whole * (3 if by_work else 1)), by_work, block) for weight, some in kept if some]


def option(cost: float, loss: float) -> Option:
    return Option(None, (), cost, loss)


@st.composite
def ladders(draw: st.DrawFn, most: int = 4) -> list[list[Option]]:
    """Options of some weights, dearest first, each losing less than any that costs no more."""
    found = []
    for _ in range(draw(st.integers(1, most))):
        size = draw(st.integers(1, 5))
        costs = sorted(draw(st.lists(st.integers(0, 60), min_size=size, max_size=size, unique=True)), reverse=True)
        losses = [0, *sorted(draw(st.lists(st.integers(1, 60), min_size=size - 1, max_size=size - 1, unique=True)))]
        found.append([option(cost, loss) for cost, loss in zip(costs, losses, strict=True)])
    return found


def total(chosen: Sequence[Option]) -> tuple[float, float]:
    return sum(one.cost for one in chosen), sum(one.loss for one in chosen)


class TestChoice:
    @given(ladders(), st.integers(0, 200), st.integers(0, 30))
    @settings(max_examples=150, deadline=None)
    def test_keeps_to_the_budget_wherever_that_is_possible(self, lists: list[list[Option]], budget: int, fixed: int) -> None:
        chosen = choose(lists, budget, fixed)
        assert all(one in options for one, options in zip(chosen, lists, strict=True))
        least = sum(options[-1].cost for options in lists)
        assert total(chosen)[0] + fixed <= budget if least + fixed <= budget else total(chosen)[0] == least

    @given(ladders(most=1), st.integers(0, 60))
    @settings(max_examples=60, deadline=None)
    def test_of_one_weight_is_the_best_there_is(self, lists: list[list[Option]], budget: int) -> None:
        fitting = [one for one in lists[0] if one.cost <= budget] or [lists[0][-1]]
        assert choose(lists, budget) == fitting[:1]

    def test_is_the_best_of_all_combinations_or_nearly(self) -> None:
        """Of ladders as weights have them: at twice the saving more than twice the loss."""
        rng, ratios = np.random.default_rng(0), []
        for _ in range(60):
            lists = []
            for _ in range(4):
                costs, scale = np.sort(rng.choice(50, 5, replace=False))[::-1] + 1, rng.uniform(0.1, 10)
                lists.append([option(float(cost), float(scale * (costs[0] - cost) ** 2)) for cost in costs])
            budget = rng.uniform(0.3, 0.95) * sum(options[0].cost for options in lists)
            every = [total(combination) for combination in itertools.product(*lists)]
            best = min((loss for cost, loss in every if cost <= budget), default=None)
            if best:
                ratios.append(total(choose(lists, budget))[1] / best)
        assert min(ratios) >= 1 - 1e-9
        assert np.median(ratios) <= 1 + 1e-9
        assert np.mean(ratios) < 1.05

    def test_of_nothing_is_nothing(self) -> None:
        assert choose([], 5.0) == []


class TestOptions:
    @pytest.mark.parametrize("data", [True, False])
    @pytest.mark.parametrize(("by_work", "block"), [(False, 1), (True, 4)])
    def test_lose_less_than_any_that_costs_no_more(self, by_work: bool, block: int, data: bool) -> None:
        graph = load(NETWORK)
        targets = targets_of(graph, by_work, block)
        lists = option_lists(graph, targets, calibrated(feeds_of()) if data else Context(), None)
        assert [target.weight.site for target in targets] == ["w1", "w2", "w3", "w4"]
        for target, options in zip(targets, lists, strict=True):
            assert (options[0].form, options[0].cost, options[0].loss) == (None, target.cost, 0.0)
            assert len(options) > 2
            for dearer, cheaper in itertools.pairwise(options):
                assert dearer.cost > cheaper.cost
                assert dearer.loss < cheaper.loss <= 1 + 1e-9
            for one in options[1:]:
                assert one.form in target.forms
                assert one.cost == pytest.approx(target.cost_at(one.form, one.ranks))
                assert one.form.kind == "tucker2" or one.ranks[0] % block == 0

    @pytest.mark.parametrize("kind", ["channel", "input", "interpolative", "spatial", "tucker2", "two-products"])
    def test_losses_are_those_of_outputs(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of each layer alone, on the very inputs: what it computes with the product of the pieces, next to what it computed."""
        monkeypatch.setattr(Gram, "shrunk", property(lambda self: self.matrix))  # of these inputs, not of what others may be
        feeds = feeds_of(count=16)
        graph = load(NETWORK)
        context = calibrated(feeds)
        for target in (targets := targets_of(graph, kinds=[kind])):
            (options,) = option_lists(graph, [target], context, None)
            for one in options[1 :: max(len(options) // 3, 1)]:
                pieces = factor_alone(graph, target, one, context)
                assert self.error(target, one, pieces, feeds) == pytest.approx(one.loss, rel=1e-3, abs=1e-6)
        assert len(targets) == {"channel": 2, "interpolative": 4, "two-products": 2}.get(kind, 1)

    @staticmethod
    def error(target: Target, one: Option, pieces: Pieces, feeds: Sequence[Feeds]) -> float:
        name, outputs = target.weight.site, {"w1": "h", "w2": "p", "w3": "m", "w4": "y"}
        changed = load(NETWORK)
        assert one.form is not None
        twin = next(weight for weight in weights(changed) if weight.site == name)
        set_values(twin.constant, twin.layout.inverse(one.form.product(pieces)).astype(np.float32))
        bias = {"w1": "b1", "w2": "b2", "w4": "b4"}.get(name)
        results = []
        for model in (NETWORK, to_model(changed)):
            model = type(model).FromString(model.SerializeToString())
            model.graph.output[0].CopyFrom(oracle.tensor(outputs[name], None))
            running = oracle.session(model)
            results.append(np.stack([oracle.run(running, feed)[0].astype(np.float64) for feed in feeds]))
        expected = results[0]
        if bias is not None:  # which is not what the weight computes
            values = next(constant.values for constant in changed.constants if constant.name == bias)
            expected = expected - values.reshape((-1, 1, 1) if name != "w4" else (-1,))
        return float(np.square(results[0] - results[1]).sum() / np.square(expected).sum())

    def test_without_data_lose_what_weights_do(self) -> None:
        graph = load(NETWORK)
        for target in targets_of(graph):
            (options,) = option_lists(graph, [target], Context(), None)
            for one in options[1:]:
                assert one.form is not None
                matrix = one.form.matrix
                product = one.form.product(one.form.factor(matrix, one.ranks))
                assert one.loss == pytest.approx(np.square(product - matrix).sum() / np.square(matrix).sum(), rel=1e-3, abs=1e-9)

    def test_with_a_probe_lose_what_the_model_does(self) -> None:
        """All options of a weight by the same factor: what its errors do to the outputs."""
        graph, feeds = load(NETWORK), feeds_of(count=6)
        context = calibrated(feeds)
        assert context.activations is not None
        targets = targets_of(graph)
        plain = option_lists(graph, targets, context, None)
        probed = option_lists(graph, targets, context, OutputProbe(graph, context.activations))
        for before, after in zip(plain, probed, strict=True):
            factors = np.array([one.loss / other.loss for one, other in zip(after[1:], before[1:], strict=True) if other.loss > 1e-12])
            np.testing.assert_allclose(factors, factors[0], rtol=1e-6)
            assert (after[0].loss, after[0].form) == (0.0, None)
        last = probed[-1][1:]  # nothing but a bias comes after it
        for one, other in zip(last, plain[-1][1:], strict=True):
            assert 0.3 < one.loss / other.loss < 3

    @pytest.mark.parametrize("price", [0.5, 1.0, 2.0, 4.0, 100.0])
    def test_of_pieces_at_a_price_are_those_that_pay(self, price: float) -> None:
        """Where an element of a piece takes more or less than one of the weight; work is the same of either."""
        graph = load(NETWORK)
        for target in targets_of(graph):
            stored = round(4 * target.forms[0].whole / price)
            dear, price = Target(target.weight, target.forms, target.cost, stored=stored), 4 * target.forms[0].whole / stored
            assert dear.price == price
            for form in target.forms:
                every = dict.fromkeys(form.at(step / max(form.full)) for step in range(max(form.full), 0, -1))
                cheaper = [ranks for ranks in every if price * form.parameters(ranks) < form.whole]
                assert dear.break_even(form) == (cheaper[0] if cheaper else (0,) * len(form.full))
                paying = [ranks for ranks in cheaper if form.nbytes(ranks) + form.node_bytes < stored]
                assert dear.paying(form) == paying
                for ranks in paying:
                    assert dear.cost_at(form, ranks) == pytest.approx(price * target.cost_at(form, ranks))
            (options,) = option_lists(graph, [dear], Context(), None)
            assert all(one.cost < target.cost for one in options[1:])
            work = [Target(target.weight, target.forms, target.cost, by_work=True, stored=some) for some in (0, stored)]
            for form in target.forms:
                assert work[0].paying(form) == work[1].paying(form)
                assert work[0].break_even(form) == work[1].break_even(form)

    def test_of_weights_without_work_are_none(self) -> None:
        graph = load(NETWORK)
        target = targets_of(graph)[0]
        idle = Target(target.weight, target.forms, 0.0, by_work=True)
        ((only,),) = option_lists(graph, [idle], Context(), None)
        assert only.form is None
        assert choose([[only]], 0.0) == [only]


class TestRules:
    def found(self, rule: Rule, context: Context | None = None, block: int = 1) -> dict[str, tuple[Target, Option]]:
        graph = load(NETWORK)
        targets = targets_of(graph, block=block)
        options = by_rules(graph, targets, [rule] * len(targets), context or Context())
        return {target.weight.site: (target, one) for target, one in zip(targets, options, strict=True)}

    def test_rank_is_what_was_asked_for_or_the_weight_stays(self) -> None:
        for rank in (1, 3, 5, 9, 30):
            for target, one in self.found(Rule(rank=rank)).values():
                ranks = {form.kind: form.at(min(rank / max(form.full), 1.0)) for form in target.forms}
                paying = [form for form in target.forms if ranks[form.kind] in target.paying(form)]
                assert (one.form is None) == (not paying)
                if one.form is not None:
                    assert max(one.ranks) == rank
                    assert one.cost == one.form.parameters(one.ranks) < target.cost

    def test_share_is_of_the_full_rank(self) -> None:
        for share in (0.0, 0.2, 0.4):
            for _, one in self.found(Rule(share=share)).values():
                assert one.form is not None
                assert one.ranks == one.form.at(share)

    @pytest.mark.parametrize("data", [True, False])
    @pytest.mark.parametrize("energy", [0.3, 0.7, 0.95, 1.0])
    def test_energy_is_kept_at_the_least_cost(self, energy: float, data: bool) -> None:
        found = self.found(Rule(energy=energy), calibrated(feeds_of()) if data else None)
        for target, one in found.values():
            assert one.loss <= 1 - energy + 1e-12
            if one.form is None or one.form.kind != "two-products":
                continue
            graph = load(NETWORK)
            twin = next(other for other in targets_of(graph) if other.weight.site == target.weight.site)
            grams = grams_of(graph, twin, calibrated(feeds_of())) if data else None
            assert one.ranks == (max(rank_at_energy(singular_values(one.form, grams), energy), 1),)

    def test_error_is_not_passed(self) -> None:
        for error in (0.0, 0.2, 0.6, 1.0):
            for target, one in self.found(Rule(error=error), calibrated(feeds_of())).values():
                assert one.loss <= error**2 + 1e-12
                assert one.cost <= target.cost
                assert error != 1.0 or one.ranks == (1,) or one.ranks == (1, 1)

    def test_error_is_that_of_each_layer(self) -> None:
        """With data and without they are of different things, so ranks differ where inputs hang together."""
        with_data, without = (self.found(Rule(error=0.3), context)["w3"][1] for context in (calibrated(feeds_of()), None))
        assert with_data.cost < without.cost

    def test_evbmf_finds_what_was_put_in(self) -> None:
        rng = np.random.default_rng(0)
        weight = rng.standard_normal((60, 4)) @ rng.standard_normal((4, 50)) + 0.1 * rng.standard_normal((60, 50))
        model = build(["MatMul x w -> y"], (5, 60), w=weight.astype(np.float32))
        graph = load(model)
        targets = targets_of(graph)
        (one,) = by_rules(graph, targets, [Rule(evbmf=True)], Context())
        assert evbmf_rank(np.linalg.svd(weight, compute_uv=False), 60, 50) == 4
        assert one.ranks == (4,)

    def test_of_no_weights_are_none(self) -> None:
        assert by_rules(load(NETWORK), [], [], Context()) == []
        assert option_lists(load(NETWORK), [], Context(), None) == []

    def test_are_for_each_its_own(self) -> None:
        graph = load(NETWORK)
        targets = targets_of(graph)
        found = by_rules(graph, targets[::-1], [Rule(rank=2), Rule(energy=0.5), Rule(error=0.0), Rule(rank=1)], Context())
        assert (found[0].ranks, found[2].form, max(found[3].ranks)) == ((2,), None, 1)
        assert 0 < found[1].loss <= 0.5


class TestRoom:
    @given(st.lists(st.integers(0, 6), min_size=4, max_size=4), st.floats(0, 1), st.booleans())
    @settings(max_examples=60, deadline=None)
    def test_is_never_passed(self, steps: list[int], share: float, by_work: bool) -> None:
        graph = load(NETWORK)
        targets = targets_of(graph, by_work)
        chosen = []
        for target, step in zip(targets, steps, strict=True):
            form = target.forms[step % len(target.forms)]
            paying = target.paying(form)
            ranks = paying[-1 - min(step, len(paying) - 1)]
            one = Option(form, ranks, target.cost_at(form, ranks), float(step))
            chosen.append(one if step else option(target.cost, 0.0))
        room = share * sum(target.cost - one.cost for target, one in zip(targets, chosen, strict=True))
        found = filled(targets, chosen, room)
        assert total(found)[0] <= total(chosen)[0] + room + 1e-6
        for target, before, after in zip(targets, chosen, found, strict=True):
            assert after.form is before.form
            assert after.cost >= before.cost
            if after.form is not None:
                assert after.cost == pytest.approx(target.cost_at(after.form, after.ranks))
                assert after.cost < target.cost
        left = room - (total(found)[0] - total(chosen)[0])
        for target, one in zip(targets, found, strict=True):  # no more of any fits in
            if one.form is not None:
                assert not any(one.cost + 1e-6 < target.cost_at(one.form, ranks) <= one.cost + left - 1e-6 for ranks in target.paying(one.form))

    def test_goes_to_what_loses_most(self) -> None:
        graph = load(NETWORK)
        targets = targets_of(graph, kinds=["two-products"])
        chosen = [Option(target.forms[0], (2,), target.cost_at(target.forms[0], (2,)), loss) for target, loss in zip(targets, (0.1, 0.2), strict=True)]
        found = filled(targets, chosen, 3 * 42.0)
        assert [one.ranks for one in found] == [(2,), (5,)]  # each rank of the second costs 18 + 24
        assert [one.ranks for one in filled(targets, chosen, -1.0)] == [(2,), (2,)]
        assert filled([], [], 5.0) == []


def factor_alone(graph: Graph, target: Target, one: Option, context: Context) -> Pieces:
    """Returns the pieces of one weight, whitened, with nothing else made up for."""
    assert one.form is not None
    return one.form.factor(one.form.matrix, one.ranks, grams_of(graph, target, context))


def grams_of(graph: Graph, target: Target, context: Context) -> Array | None:
    ((_, grams),) = list(with_grams(graph, [target.weight], context))
    return grams


class TestPieces:
    @pytest.mark.parametrize("data", [True, False])
    def test_reproduce_what_the_cut_model_computes(self, data: bool) -> None:
        """The same model with the product of the pieces for weights, and with the same biases, in ONNX Runtime."""
        for kind in ("auto", "input", "spatial", "tucker2"):
            graph = load(NETWORK)
            targets = targets_of(graph, kinds=() if kind == "auto" else ("two-products", kind))
            context = calibrated(feeds_of()) if data else Context()
            lists = option_lists(graph, targets, context, None)
            chosen = {target.weight.site: options[len(options) // 2] for target, options in zip(targets, lists, strict=True)}
            before = to_model(graph).SerializeToString(deterministic=True)
            pieces, repaired = factor_in_turn(graph, chosen, [target.weight for target in targets], context)
            assert to_model(graph).SerializeToString(deterministic=True) == before
            assert repaired.sites == (set(chosen) if data else set())
            assert set(repaired.biases) == ({"w1", "w2", "w4"} & set(chosen) if data else set())
            dense = load(NETWORK)
            for other in (graph, dense):
                by_name = {constant.name: constant for constant in other.constants}
                for constant, values in repaired.biases.values():
                    set_values(by_name[constant.name], values)
            for weight in weights(dense):
                if weight.site in chosen:
                    form = chosen[weight.site].form
                    assert form is not None
                    set_values(weight.constant, weight.layout.inverse(form.product(pieces[weight.site])).astype(np.float32))
            for target in targets:
                form = chosen[target.weight.site].form
                assert form is not None
                split(graph, form, pieces[target.weight.site])
            sort_nodes(graph)
            expected, got = (oracle.run(oracle.session(to_model(one), optimise=False), feeds_of(count=1, seed=5)[0])[0] for one in (dense, graph))
            np.testing.assert_allclose(got, expected, rtol=0, atol=2e-4 * np.abs(expected).max())

    def test_make_up_for_those_before(self) -> None:
        """In turn, a layer's outputs are nearer to the original's than with each weight cut by itself."""
        feeds, held_out = feeds_of(count=16), feeds_of(count=4, seed=3)
        errors = []
        for in_turn in (True, False):
            graph = load(NETWORK)
            context = calibrated(feeds)
            targets = targets_of(graph)
            lists = option_lists(graph, targets, context, None)
            chosen = {target.weight.site: options[2 * len(options) // 3] for target, options in zip(targets, lists, strict=True)}
            pieces, repaired = factor_in_turn(graph, chosen, [target.weight for target in targets], context)
            if not in_turn:
                pieces = {target.weight.site: factor_alone(graph, target, chosen[target.weight.site], context) for target in targets}
                repaired = Repaired()
            for constant, values in repaired.biases.values():
                set_values(constant, values)
            for target in targets:
                form = chosen[target.weight.site].form
                assert form is not None
                split(graph, form, pieces[target.weight.site])
            sort_nodes(graph)
            results = [np.stack([oracle.run(oracle.session(one), feed)[0] for feed in held_out]) for one in (NETWORK, to_model(graph))]
            errors.append(np.linalg.norm(results[0] - results[1]))
        assert errors[0] < errors[1]
