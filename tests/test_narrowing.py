"""How many channels groups keep: budgets against the graphs that are really left, latency against clocks that are known."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest

from onnxshrink.calibrate import Calibration
from onnxshrink.channel_removal import LossCurve
from onnxshrink.contract import Context
from onnxshrink.errors import PassError
from onnxshrink.graph.channel_costs import inferred_macs
from onnxshrink.graph.channel_groups import Channels, find_channels
from onnxshrink.graph.channel_readers import Candidate, candidates
from onnxshrink.graph.cutting import cut_channels
from onnxshrink.graph.exporter import to_model
from onnxshrink.graph.files import load
from onnxshrink.graph.ir import Graph
from onnxshrink.importance import channel_scores
from onnxshrink.inputs import Samples
from onnxshrink.narrowing import Bounds, Budget, Plan, known_shapes, plan_widths, scored
from onnxshrink.sensitivity import OutputProbe
from onnxshrink.trials import SampleTrials
from tests.graph.test_channel_rules import CASES, C, N, S, build, linear

Array = np.ndarray[Any, np.dtype[Any]]
WIDTHS = (48, 32, 40, 64)


def chain(widths: Sequence[int] = WIDTHS) -> Any:
    """Returns convolutions of so many channels, one after the other."""
    sizes = [4, *widths, 6]
    lines = [f"Conv {'x' if at == 0 else f'h{at}'} w{at} -> {'y' if at == len(widths) else f'h{at + 1}'}" for at in range(len(sizes) - 1)]
    return build(lines, (N, 4, S, S), **{f"w{at}": (sizes[at + 1], sizes[at], 1, 1) for at in range(len(sizes) - 1)})


@dataclass
class Trial:
    """A plan for a model, by name of group."""

    model: Any
    find: Callable[[Graph], Channels] = find_channels
    found: list[Candidate] = field(default_factory=list)
    plan: Plan = field(init=False)

    def make(self, budget: Budget | None, bounds: Bounds | Mapping[str, Bounds] | None = None, context: Context | None = None, **options: Any) -> dict[str, int]:
        graph = load(self.model)
        before = to_model(graph).SerializeToString(deterministic=True)
        self.channels = self.find(graph)
        self.found = candidates(graph, [group for group in self.channels.groups if group.reason is None])
        given = bounds if isinstance(bounds, Mapping) else {}
        default = bounds if isinstance(bounds, Bounds) else Bounds()
        curves = [LossCurve.of(scores) for scores in channel_scores(graph, self.found, "l2", Context())]
        every = [given.get(one.group.name, default) for one in self.found]
        self.plan = plan_widths(self.find, self.channels, self.found, curves, every, budget, context or Context(), **{"block": 1, **options})
        assert to_model(graph).SerializeToString(deterministic=True) == before
        assert [sorted(order) for order in self.plan.orders] == [list(range(one.group.size)) for one in self.found]
        return {one.group.name: int(width) for one, width in zip(self.found, self.plan.widths, strict=True)}

    def left(self) -> dict[str, float]:
        """Returns what is left once the plan is carried out."""
        graph = load(self.model)
        channels = self.find(graph)
        groups = [group for group in channels.groups if group.reason is None]
        before = [sum(inferred_macs(channels).values()), sum(one.size for one in graph.constants), sum(group.size for group in groups)]
        cut_channels(channels, {group: order[: group.size - width] for group, order, width in zip(groups, self.plan.orders, self.plan.widths, strict=True)})
        after = [sum(inferred_macs(self.find(graph)).values()), sum(one.size for one in graph.constants), sum(self.plan.widths)]
        return {name: now / then for name, now, then in zip(("macs", "params", "channels"), after, before, strict=True)}


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("block", [1, 8])
@pytest.mark.parametrize("share", [0.9, 0.5, 0.25])
@pytest.mark.parametrize("measure", ["macs", "params", "channels"])
def test_budgets_are_met_and_used(measure: Any, share: float, block: int, alike: bool) -> None:
    trial = Trial(chain())
    widths = trial.make(Budget(measure, share), block=block, alike=alike)
    assert trial.plan.shares == pytest.approx(trial.left())
    assert trial.plan.shares[measure] <= share + 1e-9
    assert trial.plan.shares[measure] > share - (0.05 if block == 1 else 0.3)
    sizes = {one.group.name: one.group.size for one in trial.found}
    assert all(width % block == 0 or width == sizes[name] for name, width in widths.items())


@pytest.mark.parametrize("case", ["residual sum", "Concat", "depthwise Conv", "Conv in groups", "heads", "LSTM bidirectional", "Flatten", "packed heads"])
def test_budgets_hold_in_every_kind_of_graph(case: str) -> None:
    for outer in (True, False):
        trial = Trial(CASES[case][0], partial(find_channels, outer=outer))
        trial.make(Budget("macs", 0.6))
        left = trial.left()
        assert [trial.plan.shares[name] for name in ("macs", "channels")] == pytest.approx([left["macs"], left["channels"]])  # type: ignore[index]
        assert trial.plan.shares["params"] == pytest.approx(left["params"], abs=0.03)  # but for shapes that are written anew
        assert trial.plan.shares["macs"] <= 0.6 or (trial.plan.widths == 1).all()


def test_groups_compete_by_what_they_lose() -> None:
    """The scores of a group add up to 1; so the one whose channels save more goes first."""
    widths = Trial(chain((16, 64, 16))).make(Budget("macs", 0.9))
    assert widths["w0"] == widths["w2"] == 16
    assert widths["w1"] < 64


def test_alike_groups_keep_one_share() -> None:
    widths = Trial(chain()).make(Budget("channels", 0.5), alike=True)
    assert list(widths.values()) == pytest.approx([0.5 * width for width in WIDTHS], abs=1)


@pytest.mark.parametrize("budget", [None, Budget("macs", 0.2)])
def test_a_group_may_keep_a_share_in_any_case(budget: Budget | None) -> None:
    bounds = {"w0": Bounds(keep=0.75), "w1": Bounds(keep=1.0), "w2": Bounds(keep=0.0)}
    widths = Trial(chain()).make(budget, bounds)
    assert (widths["w0"], widths["w1"], widths["w2"]) == (36, 32, 1)
    assert widths["w3"] == 64 if budget is None else widths["w3"] < 64


def test_a_share_to_keep_is_rounded_to_blocks_and_bounded() -> None:
    widths = Trial(chain()).make(None, {"w0": Bounds(keep=0.5), "w1": Bounds(least=0.5, keep=0.1)}, block=16)
    assert widths == {"w0": 32, "w1": 16, "w2": 40, "w3": 64}  # 24 lies between two: the wider


def test_no_group_goes_below_its_least() -> None:
    trial = Trial(chain())
    widths = trial.make(Budget("macs", 0.01), {"w0": Bounds(0.5), "w1": Bounds(0.3)})
    assert (widths["w0"], widths["w1"], widths["w2"]) == (24, 10, 1)
    assert trial.plan.shares["macs"] > 0.01  # as near as they let it come


@pytest.mark.parametrize("measure", ["macs", "params", "channels"])
def test_a_budget_of_all_cuts_nothing(measure: Any) -> None:
    trial = Trial(chain())
    assert list(trial.make(Budget(measure, 1.0)).values()) == list(WIDTHS)
    assert trial.plan.shares == {"macs": 1.0, "params": 1.0, "channels": 1.0}


def test_what_lies_side_by_side_is_counted_in_blocks_together() -> None:
    """Heads of 4 are a quarter of a block of 16; channels that are flattened to many places are counted where they are fewest."""
    trial = Trial(CASES["heads"][0])
    assert trial.make(Budget("macs", 0.01), block=4) == {"wq": 1}
    assert trial.make(Budget("macs", 0.01), block=8) == {"wq": 2}
    assert Trial(CASES["Flatten"][0]).make(Budget("macs", 0.01), block=8) == {"w1": 8}


def test_no_groups() -> None:
    model = build(["Relu x -> y"], (N, 4))
    trial = Trial(model)
    assert trial.make(Budget("macs", 0.5)) == {}
    assert trial.plan.shares == {"macs": 1.0, "params": 1.0, "channels": 1.0}


@dataclass
class Clock:
    """A machine whose time for a graph is a function of the widths of its convolutions."""

    time: Callable[[list[int]], float]
    asked: list[list[int]] = field(default_factory=list)

    def macs(self, graph: Graph) -> Mapping[int, float]:
        return inferred_macs(find_channels(graph))

    def shapes(self, graph: Graph) -> Mapping[str, tuple[int, ...]]:
        return {}

    def latency_ratio(self, before: Graph, after: Graph) -> float:
        old, new = ([constant.shape[0] for constant in graph.constants] for graph in (before, after))
        self.asked.append(new)
        return self.time(new) / self.time(old)


def staircase(widths: list[int]) -> float:
    """Returns the time of products of blocks of 16 channels, with as much again for what no width changes."""
    blocks = [-(-width // 16) for width in (4, *widths)]
    return 20.0 + sum(one * other for one, other in itertools.pairwise(blocks))


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize("share", [0.95, 0.8, 0.65])
def test_latency_is_reached_with_hardly_more_than_it_takes(share: float, block: int) -> None:
    clock, trial = Clock(staircase), Trial(chain())
    widths = list(trial.make(Budget("latency", share), context=Context(trials=clock), block=block).values())
    reached = staircase([*widths, 6]) / staircase([*WIDTHS, 6])
    assert reached <= share
    assert trial.plan.shares["latency"] == pytest.approx(reached)
    assert trial.left() == pytest.approx({name: trial.plan.shares[name] for name in ("macs", "params", "channels")})
    more = Trial(chain())
    wider = more.make(Budget("macs", min(trial.plan.shares["macs"] + 0.05, 1.0)), block=block)  # type: ignore[arg-type]
    assert list(wider.values()) == widths or staircase([*wider.values(), 6]) / staircase([*WIDTHS, 6]) > share
    assert len(clock.asked) <= 10


def test_latency_that_cannot_be_reached_leaves_the_narrowest() -> None:
    clock, trial = Clock(lambda widths: 1000.0 + sum(widths)), Trial(chain())
    widths = trial.make(Budget("latency", 0.5), Bounds(0.5), context=Context(trials=clock))
    assert list(widths.values()) == [24, 16, 20, 32]
    assert trial.plan.shares["latency"] == pytest.approx((1000 + 24 + 16 + 20 + 32 + 6) / (1000 + sum(WIDTHS) + 6))


def test_latency_of_all_is_reached_at_once() -> None:
    trial = Trial(chain())
    trial.make(Budget("latency", 1.0), context=Context(trials=Clock(staircase)))
    assert list(trial.plan.widths) == list(WIDTHS)


def test_latency_wants_something_that_runs() -> None:
    with pytest.raises(PassError, match="remove-channels: latency cannot be measured here; ask for macs"):
        Trial(chain()).make(Budget("latency", 0.5))


def test_graphs_that_are_timed_are_cut_like_the_result() -> None:
    """Heads or what each has, as the channels were found; only then widths are those of the plan."""
    clock = Clock(lambda widths: float(sum(widths)))
    trial = Trial(CASES["heads"][0], partial(find_channels, outer=False))
    trial.make(Budget("latency", 0.8), context=Context(trials=clock))
    graph = load(trial.model)
    channels = trial.find(graph)
    free = [group for group in channels.groups if group.reason is None]
    cut_channels(channels, {group: order[: group.size - width] for group, order, width in zip(free, trial.plan.orders, trial.plan.widths, strict=True)})
    assert sorted(constant.shape[0] for constant in graph.constants if constant.shape) in [sorted(widths) for widths in clock.asked if widths]


def test_work_is_counted_by_trials_where_there_are_any() -> None:
    class Skewed(Clock):
        def macs(self, graph: Graph) -> Mapping[int, float]:
            return {key: amount * (1000.0 if at == 1 else 1.0) for at, (key, amount) in enumerate(super().macs(graph).items())}

    widths = Trial(chain((32, 32, 32))).make(Budget("macs", 0.5), context=Context(trials=Skewed(staircase)))
    assert widths["w2"] == 32  # only the product of the first two counts
    assert widths["w0"] * widths["w1"] <= 0.505 * 32 * 32


@pytest.mark.parametrize(("shape", "known"), [((N, S, 4), {"h": (N, S, C), "r": (N, S, C), "y": (N, S, 6)}), (("n", S, 4), {})])
def test_shapes_are_known_where_no_run_could_show_others(shape: tuple[Any, ...], known: dict[str, Any]) -> None:
    graph = load(linear("Relu h -> r", shape=shape))
    trials = SampleTrials(Samples(lambda _: {"x": np.zeros((N, S, 4), np.float32)}, range(1), "test"))
    assert known_shapes(graph, Context(trials=trials)) == known
    assert known_shapes(graph, Context()) == {}


# Curves


def context_of(count: int, *shape: int) -> Context:
    feeds = [{"x": np.random.default_rng([index]).standard_normal(shape).astype(np.float32)} for index in range(count)]
    return Context(activations=Calibration(Samples(lambda index: feeds[index], range(count), "test"), threads=1))


def test_curves_are_sums_of_scores_unless_outputs_are_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = linear("MatMul h wa -> a", "Relu a -> r", width=C, wa=(C, C))
    graph = load(model)
    found = candidates(graph, [group for group in find_channels(graph).groups if group.reason is None])
    context = context_of(9, N, S, 4)
    plain = scored(graph, found, "l2", context, probed=False, repair=True)
    for curve, scores in zip(plain, channel_scores(graph, found, "l2", context), strict=True):
        np.testing.assert_allclose(curve.losses, LossCurve.of(scores).losses)
    judged: list[int] = []
    drift = OutputProbe.squared_drift

    def spy(self: OutputProbe, values: Mapping[str, Array]) -> float:
        judged.append(self._activations.count)
        return drift(self, values)

    monkeypatch.setattr(OutputProbe, "squared_drift", spy)
    probed = scored(graph, found, "l2", context, probed=True, repair=True)
    assert set(judged) == {3}  # a third of the inputs
    for curve, other in zip(probed, plain, strict=True):
        np.testing.assert_array_equal(curve.order, other.order)
        assert curve.losses[0] == 0 < curve.losses[1]
        assert (np.diff(curve.losses) >= 0).all()


def test_outputs_that_tell_nothing_are_not_probed() -> None:
    model = linear("Relu h -> a", "Sub a a -> r")
    graph = load(model)
    found = candidates(graph, [group for group in find_channels(graph).groups if group.reason is None])
    curves = scored(graph, found, "l2", context_of(6, N, S, 4), probed=True, repair=True)
    for curve, scores in zip(curves, channel_scores(graph, found, "l2", Context()), strict=True):
        np.testing.assert_allclose(curve.losses, LossCurve.of(scores).losses)
