"""What a tensor's channels hold, as functions of normal variables, and what becomes of it in nodes that move values about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import numpy as np

from onnxshrink.graph.ir import Constant, Node, Tensor
from onnxshrink.numerics.gaussian_moments import DENSITY, QUANTILES, block_diagonal, covariance

__all__ = ["MOVES", "Certainty", "Channels", "concatenated", "padded"]

Array = np.ndarray[Any, np.dtype[Any]]


class Certainty(IntEnum):
    """What of a tensor's channels follows from normalizations."""

    GUESS = 0
    MEANS = 1
    SPREADS = 2  # and means


@dataclass(frozen=True, eq=False)
class Channels:
    """What a tensor holds: x_i = f_i(z_i), z_i standard normal, for each channel i.

    Attributes:
        values: float64 [channels, len(QUANTILES)]: each f_i at the quantiles.
        source: what z is: tensors of one source are functions of the same z.
        certainty: how much of it is more than a guess.
        related: float32 [channels, channels], the correlations of z; None where nothing is known of them, or none are asked for.
        pooled: whether there is one position left.
        flat: whether the channels, each with all its positions, lie along the last of two axes; else along axis 1.
        last: whether they lie along the last of more than two axes.
    """

    values: Array
    source: object
    certainty: Certainty = Certainty.SPREADS
    related: Array | None = None
    pooled: bool = False
    flat: bool = False
    last: bool = False

    @property
    def mean(self) -> Array:
        """float64 [channels]."""
        mean: Array = self.values @ DENSITY
        return mean

    @property
    def variance(self) -> Array:
        """float64 [channels]."""
        variance: Array = np.square(self.values) @ DENSITY - self.mean**2
        return np.maximum(variance, 0.0)

    @property
    def covariance(self) -> Array:
        """float64 [channels, channels]."""
        return covariance(self.values, self.related)

    @property
    def lie(self) -> tuple[bool, bool, bool]:
        """How they lie: what elementwise nodes of two tensors must agree on."""
        return self.flat, self.last, self.pooled


def concatenated(parts: list[Channels], source: object) -> Channels:
    """Returns channels one after the other, those of different parts as uncorrelated; all lie as those of the first."""
    related = None
    if any(part.related is not None for part in parts):
        each = [np.eye(len(part.values), dtype=np.float32) if part.related is None else part.related for part in parts]
        related = block_diagonal(each)
    certainty, pooled = min(part.certainty for part in parts), all(part.pooled for part in parts)
    values = np.concatenate([part.values for part in parts])
    return replace(parts[0], values=values, source=source, certainty=certainty, related=related, pooled=pooled)


def _flatten(found: Channels, node: Node) -> Channels | None:
    return replace(found, flat=True) if node.attrs.get("axis", 1) == 1 and not found.last else None


def _reshape(found: Channels, node: Node) -> Channels | None:
    """Returns what [samples, everything else] holds, or None for other shapes."""
    target = node.inputs[1] if len(node.inputs) > 1 else None
    if not isinstance(target, Constant) or target.size != 2 or found.last:
        return None
    samples, rest = (int(dim) for dim in target.values.reshape(-1))
    fits = rest == -1 or samples == 0 or (found.pooled and rest == len(found.values))
    return replace(found, flat=True) if fits else None


def _squeeze(found: Channels, node: Node) -> Channels | None:
    axes = _constant_axes(node)
    leaves_two = found.pooled and not found.flat and axes is not None and not {0, 1} & axes
    return replace(found, flat=True) if leaves_two and len(axes or ()) == 2 else None


def _reduce_mean(found: Channels, node: Node) -> Channels | None:
    axes = _constant_axes(node)
    if found.flat or found.last or axes not in ({2, 3}, {-1, -2}):
        return None
    keeps = bool(node.attrs.get("keepdims", 1))
    return replace(found, pooled=True, flat=not keeps)


def _constant_axes(node: Node) -> set[int] | None:
    """Returns the axes of a node, an attribute or, from opset 13 or 18 on, an input; None where they are not given."""
    given = node.inputs[1] if len(node.inputs) > 1 else None
    if isinstance(given, Constant):
        return {int(axis) for axis in given.values.reshape(-1)}
    axes = node.attrs.get("axes")
    return None if axes is None else {int(axis) for axis in axes}


def _same(found: Channels, _: Node) -> Channels:
    return found


def _pool(found: Channels, _: Node) -> Channels | None:
    return None if found.flat or found.last else found


def _pool_all(found: Channels, node: Node) -> Channels | None:
    return replace(found, pooled=True) if _pool(found, node) is not None else None


def _guessed(found: Channels, node: Node) -> Channels | None:
    """Returns the same values, as a guess: taking the larger of a few as larger made estimates worse, not better."""
    return replace(found, certainty=Certainty.GUESS) if _pool(found, node) is not None else None


def padded(found: Channels, node: Node, computed: Array | None) -> Channels | None:
    """Returns channels between padded ones, or None where that cannot be said; positions that are padded are not seen.

    Args:
        found: what is padded.
        node: a Pad.
        computed: its pads, where they are not constant.
    """
    pads = _numbers(node.attrs.get("pads"), node.inputs[1:2]) if computed is None else [int(number) for number in computed]
    if pads is None or len(pads) % 2 or len(pads) < 4 or found.flat or found.last or len(node.inputs) > 3:
        return None
    before, after = pads[1], pads[len(pads) // 2 + 1]
    guess = replace(found, certainty=Certainty.GUESS)
    if before == after == 0:
        return guess
    given = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
    if node.attrs.get("mode", "constant") != "constant" or min(before, after) < 0 or not (given is None or isinstance(given, Constant)):
        return None
    value = float(node.attrs.get("value", 0.0) if given is None else given.values.reshape(()))
    sides = [replace(guess, values=np.full((size, len(QUANTILES)), value), related=None) for size in (before, after)]
    return concatenated([sides[0], guess, sides[1]], node)


def _slice(found: Channels, node: Node) -> Channels | None:
    """Returns some of the channels; of positions all are alike."""
    starts, ends, axes, steps = (
        _numbers(node.attrs.get(name), node.inputs[index : index + 1])
        for index, name in enumerate(("starts", "ends", "axes", "steps"), start=1)
    )
    if starts is None or ends is None or found.flat or found.last:
        return None
    axes = axes or list(range(len(starts)))
    taken = dict(zip(axes, zip(starts, ends, steps or [1] * len(axes), strict=False), strict=False))
    if any(axis < 1 for axis in taken):
        return None
    if 1 not in taken:
        return replace(found, certainty=Certainty.GUESS)
    start, end, step = taken[1]
    places = np.arange(len(found.values))[start:end:step]
    if not places.size:
        return None
    related = None if found.related is None else found.related[np.ix_(places, places)]
    return replace(found, values=found.values[places], source=node, certainty=Certainty.GUESS, related=related)


def _numbers(attribute: Any, inputs: list[Tensor]) -> list[int] | None:
    """Returns integers that are an attribute in old opsets and an input in new ones, or None if not constant or not given."""
    if inputs and inputs[0].name:
        given = inputs[0]
        return [int(number) for number in given.values.reshape(-1)] if isinstance(given, Constant) else None
    return None if attribute is None else [int(number) for number in attribute]


MOVES: dict[str, Callable[[Channels, Node], Channels | None]] = {
    "AveragePool": _pool,
    "Dropout": _same,
    "Flatten": _flatten,
    "GlobalAveragePool": _pool_all,
    "Identity": _same,
    "MaxPool": _guessed,
    "ReduceMean": _reduce_mean,
    "Reshape": _reshape,
    "Resize": _guessed,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Upsample": _guessed,
}
"""By op: f(what its first input holds, the node, without attributes that refer to a function's) -> what its first output holds, or None."""
