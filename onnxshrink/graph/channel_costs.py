"""What a model costs as a function of how many channels each group keeps: multiply-accumulates, parameters, bytes.

Work and weights are products of the sizes of axes, and what an axis keeps is the sum of what the groups on it keep:

    cost(widths) = fixed + sum over terms of  amount * prod over axes of (pinned + sum over groups of share * width)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxshrink.graph.channel_groups import ChannelGroup, Channels
from onnxshrink.graph.ir import Constant, Node, Tensor
from onnxshrink.graph.work import einsum_words, multiply_accumulates, multiplying_ops

__all__ = ["Cost", "channel_count", "inferred_macs", "macs_cost", "stored_cost"]

Array = np.ndarray[Any, np.dtype[Any]]
Axes = list[tuple[Tensor, int]]


@dataclass(frozen=True, eq=False)
class Cost:
    """A cost as a function of some groups' widths.

    Attributes:
        amounts: float64 [terms], before any cut.
        axes: intp [terms, axes of the term that has most]: which rows of ``shares``; the last row stands for no axis.
        pinned: float64 [axes + 1]: the share of an axis that belongs to none of the groups.
        shares: float64 [axes + 1, groups]: the share of an axis that one channel of a group is, on average.
        fixed: what no cut changes.
    """

    amounts: Array
    axes: Array
    pinned: Array
    shares: Array
    fixed: float

    def of(self, widths: Array) -> Array:
        """Returns the cost [...] of widths [..., groups]."""
        kept = self.pinned + np.asarray(widths, np.float64) @ self.shares.T
        found: Array = self.fixed + kept[..., self.axes].prod(axis=-1) @ self.amounts
        return found


def macs_cost(channels: Channels, groups: Sequence[ChannelGroup], macs: Mapping[int, float]) -> Cost:
    """Returns the multiply-accumulates of groups' widths.

    Args:
        channels: of the graph.
        groups: some of them, free to be cut.
        macs: of nodes as they are, by id; those of bodies stay.
    """
    known = {id(node): node for node in channels.graph.nodes if node.is_standard and node.op in multiplying_ops()}
    terms = [term for key, amount in macs.items() if key in known for term in _work(known[key], amount)]
    return _cost(channels, groups, terms, float(sum(amount for key, amount in macs.items() if key not in known)))


def stored_cost(channels: Channels, groups: Sequence[ChannelGroup], amount: Callable[[Constant], float]) -> Cost:
    """Returns what the constants of the main graph cost, each in proportion to its size.

    Args:
        channels: of the graph.
        groups: some of them, free to be cut.
        amount: of a constant, e.g. its bytes.
    """
    constants = channels.graph.constants
    terms = [(amount(constant), [(constant, axis) for axis in range(len(constant.shape))]) for constant in constants]
    return _cost(channels, groups, terms, 0.0)


def channel_count(groups: Sequence[ChannelGroup]) -> Cost:
    """Returns the number of channels."""
    count = len(groups)
    sizes = np.array([group.size for group in groups], np.float64)
    shares = np.concatenate([np.diag(1 / sizes) if count else np.zeros((0, 0)), np.zeros((1, count))])
    return Cost(sizes, np.arange(count)[:, None], np.concatenate([np.zeros(count), [1.0]]), shares, 0.0)


def inferred_macs(channels: Channels) -> dict[int, float]:
    """Returns the multiply-accumulates of nodes by id as far as inferred shapes tell them; an unknown size counts once."""

    def shape(tensor: Tensor) -> list[int]:
        return [dim if isinstance(dim, int) else 1 for dim in channels.positions.dims(tensor) or ()]

    found = {}
    for node in channels.graph.nodes:
        if (node.outputs and channels.positions.dims(node.outputs[0]) is not None) or node.op in ("GRU", "LSTM", "RNN"):
            shapes = [shape(tensor) for tensor in node.outputs]
            found[id(node)] = float(multiply_accumulates(node, [shape(tensor) for tensor in node.inputs], shapes))
    return {key: amount for key, amount in found.items() if amount}


def _work(node: Node, amount: float) -> Iterator[tuple[float, Axes]]:
    """Yields what a node does, with the axes whose product it is."""
    a, b, *rest = [*node.inputs, node.outputs[0]] if len(node.inputs) == 1 else node.inputs
    output = node.outputs[0]
    if node.op in ("Conv", "ConvTranspose"):
        yield amount, [(a, 0), (b, 0), (b, 1)]
    elif node.op in ("GRU", "LSTM", "RNN"):
        parts = [weight.size if isinstance(weight, Constant) else 1 for weight in (b, rest[0])]
        for weight, part in zip((b, rest[0]), parts, strict=True):
            yield amount * part / sum(parts), [(a, 1), (weight, 1), (weight, 2)]
    elif node.op == "Einsum":
        words = einsum_words(node)
        pairs = [(letter, (tensor, axis)) for word, tensor in zip(words, node.inputs, strict=True) for axis, letter in enumerate(word)]
        yield amount, list(dict(pairs).values())
    else:
        summed = 0 if node.op == "Gemm" and node.attrs.get("transA", 0) else -1
        yield amount, [(a, summed), *((output, -1 - axis) for axis in range(6))]  # rows, columns, and batches such as heads


def _cost(channels: Channels, groups: Sequence[ChannelGroup], terms: Sequence[tuple[float, Axes]], fixed: float) -> Cost:
    """Returns the cost of terms, each an amount and the axes that it is a product of."""
    positions = channels.positions
    group_of = np.full(len(positions.pinned), -1)
    for index, group in enumerate(groups):
        group_of[group.classes] = index
    rows: dict[tuple[int, int], int] = {}
    pinned: list[float] = []
    shares: list[Array] = []
    wide: list[tuple[float, list[int]]] = []
    for amount, axes in terms:
        used = []
        for tensor, axis in axes:
            rank = len(positions.dims(tensor) or ())
            if not -rank <= axis < rank or (ids := positions.ids(tensor, axis % rank)) is None or not ids.size:
                continue
            owners = group_of[positions.labels[ids]]
            if (owners >= 0).any():
                key = (id(tensor), axis % rank)
                if key not in rows:
                    rows[key] = len(shares)
                    counts = np.bincount(owners[owners >= 0], minlength=len(groups))
                    shares.append(counts / np.array([group.size for group in groups]) / ids.size)
                    pinned.append(float((owners < 0).mean()))
                used.append(rows[key])
        if used:
            wide.append((amount, used))
        else:
            fixed += amount
    last = len(shares)
    columns = list(itertools.zip_longest(*(used for _, used in wide), fillvalue=last))
    return Cost(
        np.array([amount for amount, _ in wide], np.float64),
        np.array(columns, np.intp).reshape(len(columns), len(wide)).T,
        np.array([*pinned, 1.0]),
        np.array([*shares, np.zeros(len(groups))]).reshape(last + 1, len(groups)),
        fixed,
    )
