"""Channel rules of ops that pick positions, Slice and Gather, and of those that take axes apart and join them, Reshape and Flatten."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from onnxshrink.graph.channel_shapes import factors, follow_shape, new_shape
from onnxshrink.graph.channel_sites import PRODUCES, Edit, Kept, Rule, Site
from onnxshrink.graph.ir import Tensor
from onnxshrink.graph.positions import Choice, Reason, Side
from onnxshrink.graph.static_shapes import same_size

__all__ = ["RULES"]

Array = np.ndarray[Any, np.dtype[Any]]
Axes = list[tuple[Tensor, int, int]]  # tensor, axis, size
_FIRST_PRIME, _NEXT_PRIMES = 1_000_003, (33, 37, 39, 81, 99, 117, 121, 133)  # primes past a million, for unknown sizes


def _reshape(site: Site) -> None:
    """X -> Y, the same elements in the same order, in a shape that is constant or computed from sizes."""
    x, y = site.node.inputs[0], site.node.outputs[0]
    if not site.has(1) or not follow_shape(site, 1, y, zeros=_zeros(site), infer=True):
        site.barrier("Reshape to a shape that is not known")
        return
    sizes = _sizes(site, x, y) or _last_sizes(site, x, y)
    for tensor, known in ((x, sizes[0]), (y, sizes[1])):
        site.pin_all(tensor, "reshaped from or to unknown sizes", range(site.rank(tensor) - len(known)))
    _regroup(site, *sizes)


def _new_reshape(site: Site, kept: Kept) -> Iterator[Edit]:
    yield from new_shape(site, kept, 1, site.node.outputs[0], zeros=_zeros(site), infer=True)


def _zeros(site: Site) -> Tensor | None:
    """Returns the tensor whose sizes a 0 in the shape stands for: the input, unless a 0 is just a zero."""
    return None if site.node.attrs.get("allowzero", 0) else site.node.inputs[0]


def _before(site: Site, x: Tensor) -> tuple[int, ...] | None:
    """Returns sizes with a large prime for each unknown one; None for an empty tensor."""
    primes = [_FIRST_PRIME, *(1_000_000 + offset for offset in _NEXT_PRIMES)]
    sizes = tuple(size if isinstance(size, int) else primes[axis % len(primes)] for axis, size in enumerate(site.dims(x)))
    return sizes if math.prod(sizes) and len(sizes) <= len(primes) else None


def _sizes(site: Site, x: Tensor, y: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Returns the sizes before and after a Reshape, with a large prime for each unknown one; None if they do not agree."""
    before, numbers, after = _before(site, x), site.numbers(1), list(site.dims(y))
    if before is None or numbers is None or numbers.size != len(after):
        return None
    for axis, number in enumerate(numbers):
        if isinstance(after[axis], int):
            continue
        if number.value == 0 and not number.reads and axis < len(before) and _zeros(site) is not None:
            after[axis] = before[axis]
        else:
            same = [place for place in range(len(before)) if same_size(site.positions.shapes, number, x, place)]
            after[axis] = before[same[0]] if same else None
    known = math.prod(size for size in after if isinstance(size, int))
    if after.count(None) == 1 and known and math.prod(before) % known == 0:
        after[after.index(None)] = math.prod(before) // known
    sizes = tuple(size for size in after if isinstance(size, int))
    return (before, sizes) if len(sizes) == len(after) and math.prod(sizes) == math.prod(before) else None


def _last_sizes(site: Site, x: Tensor, y: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the sizes of the last axes before and after that hold the same elements: they do if they hold as many."""
    runs = []
    for dims in (site.dims(x), site.dims(y)):
        plain = [size if isinstance(size, int) else 0 for size in dims]
        known = plain[max((axis + 1 for axis, size in enumerate(plain) if not size), default=0) :]
        runs.append([tuple(known[start:]) for start in range(len(known) + 1)])
    equal = [(before, after) for before, after in itertools.product(*runs) if math.prod(before) == math.prod(after)]
    return max(equal, key=lambda pair: (math.prod(pair[0]), len(pair[0]) + len(pair[1])))


def _flatten(site: Site) -> None:
    """X -> [axes before ``axis``, axes from there on]."""
    axis, before = site.axis("axis", 1, site.rank(site.node.inputs[0])), _before(site, site.node.inputs[0])
    if before is None:
        site.barrier("Flatten of an empty tensor")
    else:
        _regroup(site, before, (math.prod(before[:axis]), math.prod(before[axis:])))


def _regroup(site: Site, before: tuple[int, ...], after: tuple[int, ...]) -> None:
    """Relates the last axes of a reshape, in the smallest stretches whose sizes have the same product."""
    x, y, start, end = site.node.inputs[0], site.node.outputs[0], 0, 0
    skip, skipped = site.rank(x) - len(before), site.rank(y) - len(after)
    while start < len(before) or end < len(after):
        left, right = min(start + 1, len(before)), min(end + 1, len(after))
        while (product := math.prod(before[start:left])) != (other := math.prod(after[end:right])):
            if product < other:
                left += 1
            else:
                right += 1
        _stretch(
            site,
            [(x, skip + axis, before[axis]) for axis in range(start, left)],
            [(y, skipped + axis, after[axis]) for axis in range(end, right)],
        )
        start, end = left, right


def _stretch(site: Site, before: Axes, after: Axes) -> None:
    parts = factors(tuple(size for *_, size in before), tuple(size for *_, size in after))
    if parts is None:
        for tensor, axis, _ in (*before, *after):
            site.pin(tensor, axis, "reshaped into sizes that share no factors with it")
        return
    sides = [side for axes in (before, after) for side in _sides(site, axes, parts)]
    if len(parts) > 1:
        site.positions.choose(Choice(site.node.site, parts, tuple(sides)))
        return
    for side in sides[1:]:
        if side.ids is None or sides[0].ids is None:
            for each in (side, sides[0]):
                site.positions.pin(each.ids, Reason(site.node.site, "reshaped to an axis of unknown size"))
        else:
            site.positions.tie(side.ids, sides[0].ids)


def _sides(site: Site, axes: Axes, parts: tuple[int, ...]) -> Iterator[Side]:
    """Yields the axes of a size other than 1 with the factors they are made of."""
    last = 0
    for tensor, axis, size in axes:
        first = last
        while math.prod(parts[first:last]) < size:
            last += 1
        ids = site.ids(tensor, axis)
        if ids is not None and len(ids) != size:  # of [n, 8] -> [1, 8·n], where what follows demands 8
            site.pin(tensor, axis, "reshaped from or to an axis of unknown size")
            ids = None
        if size != 1:
            yield Side(ids, first, last)


def _gather(site: Site) -> None:
    """X, indices -> Y: the axis of X is replaced by the axes of the indices."""
    (x, indices), y = site.node.inputs, site.node.outputs[0]
    axis, width = site.axis("axis", 0, site.rank(x)), site.rank(indices)
    for other in range(site.rank(x)):
        if other != axis:
            site.same(x, other, y, other if other < axis else other + width - 1)
            site.role(0, other, PRODUCES)
    places, size = _places(site), site.dims(x)[axis]
    if places is not None and width == 1:
        site.same(indices, 0, y, axis)
        site.map(x, axis, y, axis, places, np.arange(len(places)))
        return
    ids = site.ids(x, axis)
    if places is not None and ids is not None:
        site.positions.pin(ids[places.reshape(-1)], Reason(site.node.site, "picked by Gather"))
    else:
        site.pin(x, axis, "looked up by position" if isinstance(size, int) else "of unknown size")
    for place in range(width):
        site.same(indices, place, y, axis + place)


def _places(site: Site) -> Array | None:
    """Returns the constant indices of a Gather, counted from the front."""
    x = site.node.inputs[0]
    size = site.dims(x)[site.axis("axis", 0, site.rank(x))]
    values = site.values(1)
    if values is None or not isinstance(size, int):
        return None
    places = values.astype(np.int64)
    return np.where(places < 0, places + size, places)


def _new_places(site: Site, kept: Kept) -> Iterator[Edit]:
    """Renumbers the indices, and drops those of positions that go."""
    x = site.node.inputs[0]
    axis, places = site.axis("axis", 0, site.rank(x)), _places(site)
    along = kept.along(x, axis)
    if places is not None and along is not None and not along.all():
        new = (np.cumsum(along) - 1)[places]
        yield Edit(kept.values(site.node.inputs[1], np.asarray(new)), operand=1)


def _bounds(site: Site) -> list[tuple[int, int, int, int]] | None:
    """Returns (axis, start, end, step) of a Slice for each axis that it names; None if they are not known."""
    rank = site.rank(site.node.inputs[0])
    starts, ends = site.integers(1, "starts"), site.integers(2, "ends")
    if starts is None or ends is None:
        return None
    axes = site.integers(3, "axes") if site.has(3) or "axes" in site.node.attrs else list(range(len(starts)))
    steps = site.integers(4) if site.has(4) else [1] * len(starts)
    if axes is None or steps is None or not len(axes) == len(starts) == len(ends) == len(steps):
        return None
    return [(axis % rank, *bound) for axis, *bound in zip(axes, starts, ends, steps, strict=True)]  # type: ignore[misc]


def _slice(site: Site) -> None:
    """X -> Y: along some axes, positions from start to end."""
    x, y, bounds = site.node.inputs[0], site.node.outputs[0], _bounds(site)
    if bounds is None:
        site.barrier("Slice with bounds that are not known")
        return
    named = {axis: bound for axis, *bound in bounds}
    for axis in range(site.rank(x)):
        size = site.dims(x)[axis]
        if axis not in named:
            site.same(x, axis, y, axis)
            continue
        start, end, step = named[axis]
        if not isinstance(size, int) or site.ids(y, axis) is None:
            site.pin(x, axis, "sliced to an unknown size")
            site.pin(y, axis, "sliced from an unknown size")
            continue
        places = np.arange(size)[slice(start, end, step)]
        site.map(x, axis, y, axis, places, np.arange(len(places)))
        if abs(step) != 1 or not len(places):
            site.pin(x, axis, "sliced in steps, or to nothing")


def _new_bounds(site: Site, kept: Kept) -> Iterator[Edit]:
    """Moves the bounds to where the positions between them have gone: neighbors stay neighbors."""
    x, bounds = site.node.inputs[0], _bounds(site)
    if bounds is None or not any(kept.changes(x, axis) for axis, *_ in bounds):
        return
    new = []
    for axis, start, end, step in bounds:
        along = kept.along(x, axis)
        if along is not None and not along.all():
            places = np.arange(len(along))[slice(start, end, step)]
            places = places[along[places]]
            before = int(along[: places.min()].sum())
            after = before + len(places)
            start, end = (before, after) if step > 0 else (after - 1, before - 1 if before else -(2**31))
        new.append((start, end))
    for operand, name in ((1, "starts"), (2, "ends")):
        values = [bound[operand - 1] for bound in new]
        yield Edit(values, name) if name in site.node.attrs else Edit(np.array(values, site.dtype(operand)), operand=operand)


RULES: dict[str, Rule] = {
    "Flatten": Rule(_flatten),
    "Gather": Rule(_gather, _new_places),
    "Reshape": Rule(_reshape, _new_reshape, shape_operands=(1,)),
    "Slice": Rule(_slice, _new_bounds),
}
