"""Which positions along the axes of all tensors are the same channel, and which must stay.

Every position of every axis of known size gets a number. Rules tie numbers that must be cut together and pin those that must not be
cut; the connected components of the ties are the classes. A reshape that takes an axis apart leaves a choice: of [B, S, H·D] ->
[B, S, H, D] either H or D may carry the channels (position p of the long axis is the same as head p // D, or as p % D of every head),
but not both, because what is removed must be a product along the axes. `Positions.settle` chooses.

The idea of groups of coupled layers is DepGraph's (Fang et al., arXiv 2301.12900); the relation here is between single positions, so
index maps need no code of their own: they are what the labels say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from onnxshrink.graph.ir import Tensor
from onnxshrink.graph.tensor_shapes import Dims, Shapes

__all__ = ["Choice", "Ids", "Positions", "Reason", "Side"]

Array = np.ndarray[Any, np.dtype[Any]]
Axis = tuple[int, int]
Ids = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Reason:
    """Why something cannot be cut: what is in the way, at which node or tensor."""

    site: str
    text: str

    def __str__(self) -> str:
        """Says it in one line."""
        return f"{self.text} ('{self.site}')"


@dataclass(frozen=True, eq=False)
class Side:
    """One axis before or after a reshape: its positions, None if its size is unknown, and the factors [first, last) it is made of."""

    ids: Ids | None
    first: int
    last: int

    def digits(self, factors: Sequence[int], factor: int) -> Ids:
        """Returns for each position where it is along a factor, the last factor being the fastest."""
        assert self.ids is not None
        return np.arange(len(self.ids)) // math.prod(factors[factor + 1 : self.last]) % factors[factor]


@dataclass(frozen=True, eq=False)
class Choice:
    """Axes that a reshape turns into others, of which one factor may carry the channels.

    Attributes:
        site: of the node.
        factors: sizes, more than one.
        sides: the axes before and after, each a product of neighbouring factors.
    """

    site: str
    factors: tuple[int, ...]
    sides: tuple[Side, ...]

    def carriers(self, factor: int) -> list[Side]:
        """Returns the axes that a factor is a part of."""
        return [side for side in self.sides if side.first <= factor < side.last]


class Positions:
    """The relation.

    Attributes:
        shapes: dimensions by tensor id.
        axes: every axis of known size: tensor, axis, first position, size.
        reasons: of pins, in the order in which they were given.
        labels: the class of every position; of the last `settle`.
        pinned: the index of its reason for every class, -1 for those that can be cut.
    """

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes
        self.count = 0
        self.axes: list[tuple[Tensor, int, int, int]] = []
        self.reasons: list[Reason] = []
        self.labels: Ids = np.zeros(0, np.int64)
        self.pinned: Ids = np.zeros(0, np.int64)
        self._numbers: dict[Axis, int] = {}
        self._ties: list[tuple[Ids, Ids]] = []
        self._pins: list[tuple[Ids, int]] = []
        self._choices: list[Choice] = []
        self._reason_index: dict[Reason, int] = {}

    def dims(self, tensor: Tensor) -> Dims | None:
        """Returns the dimensions of a tensor, None if its rank is unknown."""
        return self.shapes.get(id(tensor))

    def ids(self, tensor: Tensor, axis: int) -> Ids | None:
        """Returns the numbers of the positions along an axis, None if its size is unknown."""
        return self.at((id(tensor), axis))

    def at(self, axis: Axis) -> Ids | None:
        """Returns the same of an axis given by (tensor id, axis)."""
        if axis not in self._numbers:
            return None
        _, _, first, size = self.axes[self._numbers[axis]]
        return np.arange(first, first + size)

    def order(self, axis: Axis) -> int:
        """Returns the first position of an axis, for sorting; -1 if its size is unknown."""
        return self.axes[self._numbers[axis]][2] if axis in self._numbers else -1

    def add(self, tensor: Tensor) -> None:
        """Gives numbers to the positions of all axes of a tensor whose sizes are known; once."""
        for axis, size in enumerate(self.dims(tensor) or ()):
            if isinstance(size, int) and (id(tensor), axis) not in self._numbers:
                self._numbers[id(tensor), axis] = len(self.axes)
                self.axes.append((tensor, axis, self.count, size))
                self.count += size

    def fresh(self, size: int) -> Ids:
        """Returns numbers that belong to no axis, to tie others to."""
        self.count += size
        return np.arange(self.count - size, self.count)

    def tie(self, left: Ids, right: Ids) -> None:
        """Says that positions are the same channels, one by one."""
        self._ties.append((left, right))

    def pin(self, ids: Ids | None, reason: Reason) -> None:
        """Says that positions must stay; those of an axis of unknown size stay anyway."""
        if ids is not None:
            if reason not in self._reason_index:
                self._reason_index[reason] = len(self.reasons)
                self.reasons.append(reason)
            self._pins.append((ids, self._reason_index[reason]))

    def choose(self, choice: Choice) -> None:
        """Leaves to `settle` which factor of a reshape carries the channels."""
        self._choices.append(choice)

    def settle(self, *, outer: bool) -> None:
        """Takes all choices and finds the classes.

        A factor that is pinned, or all of whose positions are one class, cannot carry channels. Where several can, the outermost is
        taken, or the innermost; every choice may decide others with which it shares classes, so those without alternative go first.

        Args:
            outer: whether to prefer outer factors (heads of attention) to inner ones (the size of each head).
        """
        while True:
            self._find_classes()
            if not self._choices:
                return
            left = []
            for choice in self._choices:
                able = [factor for factor in range(len(choice.factors)) if self._is_able(choice, factor)]
                if len(able) > 1:
                    left.append((choice, able))
                else:
                    self._take(choice, able)
            if len(left) == len(self._choices):
                left = self._take_apart(left, outer=outer)
            self._choices = [choice for choice, _ in left]

    def _take_apart(self, open_choices: list[tuple[Choice, list[int]]], *, outer: bool) -> list[tuple[Choice, list[int]]]:
        """Takes the first choice, and those that share no class with one taken, and returns the others."""
        seen, left = np.zeros(len(self.pinned), bool), []
        for choice, able in open_choices:
            classes = self.labels[np.concatenate([side.ids for side in choice.sides if side.ids is not None])]
            if seen[classes].any():
                left.append((choice, able))
            else:
                self._take(choice, able[:1] if outer else able[-1:])
            seen[classes] = True
        return left

    def _take(self, choice: Choice, able: list[int]) -> None:
        if not able:
            for side in choice.sides:
                self.pin(side.ids, Reason(choice.site, "reshaped into axes none of which can carry channels"))
            return
        factor = able[0]
        channels, carriers = self.fresh(choice.factors[factor]), choice.carriers(factor)
        for side in choice.sides:
            if not any(side is carrier for carrier in carriers):
                self.pin(side.ids, Reason(choice.site, "reshaped together with another axis that carries the channels"))
            elif side.ids is not None:
                self.tie(side.ids, channels[side.digits(choice.factors, factor)])

    def _is_able(self, choice: Choice, factor: int) -> bool:
        """Whether at least one of at least two values of a factor could be cut."""
        size, carriers = choice.factors[factor], choice.carriers(factor)
        if any(side.ids is None for side in carriers):
            return False
        labels = np.concatenate([self.labels[side.ids] for side in carriers])
        digits = np.concatenate([side.digits(choice.factors, factor) for side in carriers])
        known, places = np.unique(labels, return_inverse=True)
        count, joint = _components(size + len(known), digits, size + places)
        stuck = np.zeros(count, bool)
        stuck[joint[size:][self.pinned[known] >= 0]] = True
        return count > 1 and not stuck.all()

    def _find_classes(self) -> None:
        """Joins the classes found before by what has been tied since."""
        known, fresh = len(self.pinned), self.count - len(self.labels)
        labels = np.concatenate([self.labels, np.arange(known, known + fresh)])
        left, right = (np.concatenate([labels[tie[side]] for tie in self._ties] or [labels[:0]]) for side in (0, 1))
        count, joint = _components(known + fresh, left, right)
        self.labels, self._ties = joint[labels], []
        self.pinned = np.full(count, len(self.reasons), np.int64)
        if self._pins:
            ids = np.concatenate([ids for ids, _ in self._pins])
            reasons = np.repeat([index for _, index in self._pins], [len(ids) for ids, _ in self._pins])
            np.minimum.at(self.pinned, self.labels[ids], reasons)
        self.pinned[self.pinned == len(self.reasons)] = -1


def _components(count: int, left: Ids, right: Ids) -> tuple[int, Ids]:
    edges = coo_array((np.ones(len(left), np.bool_), (left, right)), shape=(count, count))
    number, labels = connected_components(edges, directed=False)
    return int(number), labels.astype(np.int64)
