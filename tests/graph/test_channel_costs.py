"""Costs of widths, against the very graphs that are left once channels are cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxshrink.graph.channel_costs import channel_count, inferred_macs, macs_cost, stored_cost
from onnxshrink.graph.channel_groups import ChannelGroup, Channels, find_channels
from onnxshrink.graph.cutting import cut_channels
from onnxshrink.graph.files import load
from onnxshrink.graph.ir import Constant
from tests import corpus
from tests.graph.test_channel_random import networks
from tests.graph.test_channel_rules import CASES, HEADS, C, N, S, between, build, ints, linear


def elements(constant: Constant) -> float:
    """Returns how many there are; whole numbers of 32 and 64 bits are shapes, which a cut writes anew."""
    return float(constant.size) if constant.dtype not in (np.int32, np.int64) else 0.0


def free(channels: Channels) -> list[ChannelGroup]:
    return [group for group in channels.groups if group.reason is None]


def is_even(group: ChannelGroup) -> bool:
    """Whether every channel takes as many positions of each axis as the others do: else a cost depends on which ones stay."""
    counts = [np.bincount(member.places[member.places >= 0], minlength=group.size) for member in group.members]
    return all((one == one[0]).all() for one in counts)


def after(model: Any, widths: Sequence[int], rng: np.random.Generator, outer: bool) -> tuple[float, float]:
    """Returns (multiply-accumulates, elements) of the graph in which groups have so many channels left, any of them."""
    graph = load(model)
    channels = find_channels(graph, outer=outer)
    cut_channels(channels, {group: rng.permutation(group.size)[width:] for group, width in zip(free(channels), widths, strict=True)})
    return sum(inferred_macs(find_channels(graph, outer=outer)).values()), sum(map(elements, graph.constants))


def compare(model: Any, seed: int = 0, outer: bool = True) -> int:
    """Compares costs at random widths with those of cut graphs, and returns how many groups there are."""
    rng = np.random.default_rng(seed)
    channels = find_channels(load(model), outer=outer)
    groups = free(channels)
    macs, stored = macs_cost(channels, groups, inferred_macs(channels)), stored_cost(channels, groups, elements)
    sizes = np.array([group.size for group in groups], np.int64)
    assert macs.of(sizes) == pytest.approx(sum(inferred_macs(channels).values()), rel=1e-9)
    widths = np.where([is_even(group) for group in groups], rng.integers(1, sizes + 1), sizes)
    expected = after(model, list(widths), rng, outer)
    assert (float(macs.of(widths)), float(stored.of(widths))) == pytest.approx(expected, rel=1e-9)
    together = np.stack([sizes, widths])
    np.testing.assert_allclose(macs.of(together), [macs.of(sizes), macs.of(widths)])
    return len(groups)


@pytest.mark.parametrize("case", CASES)
def test_every_rule(case: str) -> None:
    for seed in range(2):
        assert compare(CASES[case][0], seed) > 0


@pytest.mark.parametrize("outer", [True, False])
def test_heads_and_what_each_of_them_has(outer: bool) -> None:
    """The products of queries, keys and values are linear in the number of heads, and in the size of each."""
    model = build(HEADS, (N, S, 8), wq=(8, C), bq=(C,), wk=(8, C), wv=(8, C), wo=(C, 8), split=ints(N, S, 3, 4), join=ints(N, S, C))
    for seed in range(3):
        assert compare(model, seed, outer) == (1 if outer else 2)
    channels = find_channels(load(model), outer=outer)
    cost = macs_cost(channels, free(channels), inferred_macs(channels))
    products, scores = 4 * N * S * 8 * C, N * S * S * C  # with weights; of queries and keys, and as much for values
    assert cost.of([3] if outer else [4, 4]) == products + 2 * scores
    assert cost.of([1] if outer else [2, 4]) == pytest.approx((products + 2 * scores) / 3 if outer else 0.75 * products + 1.5 * scores)


def test_channels_that_become_a_batch() -> None:
    """Each channel is a sample of a convolution that knows one channel only."""
    model = between("Reshape h a -> b", "Conv b wb -> c", "Reshape c d -> r", a=ints(N * C, 1, S, S), wb=(1, 1, 1, 1), d=ints(N, C, S, S))
    assert compare(model) > 0


def test_one_axis_of_several_groups_and_of_what_stays() -> None:
    """A concatenation of two groups and the input."""
    model = between("Conv x wa -> a", ("Concat h a x -> r", {"axis": 1}), channels=C + 5 + 4, wa=(5, 4, 1, 1))
    channels = find_channels(load(model))
    groups = free(channels)
    assert [group.size for group in groups] == [C, 5]
    cost = macs_cost(channels, groups, inferred_macs(channels))
    first, second, last = N * S * S * 4, N * S * S * 4, N * (S - 2) ** 2 * 9 * 6
    for one, two in ((C, 5), (3, 1), (1, 4)):
        assert cost.of([one, two]) == pytest.approx(first * one + second * two + last * (one + two + 4))


def test_a_channel_that_lies_on_an_axis_twice_costs_what_all_do_on_average() -> None:
    model, _ = CASES["Gather, twice the same"]
    channels = find_channels(load(model))
    groups = free(channels)
    uneven = next(index for index, group in enumerate(groups) if not is_even(group))
    sizes = np.array([group.size for group in groups])
    cost = macs_cost(channels, groups, inferred_macs(channels))
    costs = []
    for gone in range(sizes[uneven]):
        graph = load(model)
        twins = find_channels(graph)
        cut_channels(twins, {free(twins)[uneven]: [gone]})
        costs.append(sum(inferred_macs(find_channels(graph)).values()))
    assert len(set(costs)) > 1
    assert cost.of(sizes - np.eye(len(sizes))[uneven]) == pytest.approx(np.mean(costs))


def test_only_some_groups_are_free() -> None:
    model = linear("MatMul h wa -> a", "Relu a -> r", width=7, wa=(C, 7))
    channels = find_channels(load(model))
    first, second = free(channels)
    macs = inferred_macs(channels)
    both, one = macs_cost(channels, [first, second], macs), macs_cost(channels, [second], macs)
    for width in (1, 4, 7):
        assert one.of([width]) == pytest.approx(float(both.of([C, width])))
    assert macs_cost(channels, [], macs).of(np.zeros(0)) == sum(macs.values())


def test_what_is_not_in_the_main_graph_or_no_product_stays() -> None:
    channels = find_channels(load(linear("Relu h -> r")))
    macs = inferred_macs(channels)
    groups, more = free(channels), {-1: 1000.0}
    assert macs_cost(channels, groups, macs | more).of([3]) == macs_cost(channels, groups, macs).of([3]) + 1000


def test_channels_are_counted() -> None:
    channels = find_channels(load(linear("MatMul h wa -> a", "Relu a -> r", width=7, wa=(C, 7))))
    cost = channel_count(free(channels))
    np.testing.assert_allclose(cost.of([[C, 7], [3, 2]]), [C + 7, 5])
    assert channel_count([]).of(np.zeros(0)) == 0.0


def test_unknown_sizes_count_once() -> None:
    channels = find_channels(load(linear("Relu h -> r", shape=("n", S, 4))))
    assert sum(inferred_macs(channels).values()) == S * (4 * C + C * 6)


@settings(max_examples=25, deadline=None)
@given(model=networks(), seed=st.integers(0, 99), outer=st.booleans())
def test_random_networks(model: Any, seed: int, outer: bool) -> None:
    compare(model, seed, outer)


@pytest.mark.parametrize("name", "cifar_resnet20 mnist_cntk squeezenet_fp32up subpixel_cnn ultraface_rfb_320_simplified".split())
def test_real_models(name: str) -> None:
    path = corpus.model_path(name)
    if not path.exists():
        pytest.skip(corpus.ABSENT)
    assert compare(onnx.load(path)) > 0
