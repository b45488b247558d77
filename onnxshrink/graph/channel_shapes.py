"""Inputs that hold a shape, as those of Reshape and Expand: whether they follow a cut by themselves, and how to write them if not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np

from onnxshrink.graph.channel_sites import Edit, Kept, Site
from onnxshrink.graph.ir import Constant, Tensor
from onnxshrink.graph.shape_arithmetic import Number
from onnxshrink.graph.static_shapes import same_size

__all__ = ["factors", "follow_shape", "new_shape"]


def follow_shape(
    site: Site, operand: int, result: Tensor, *, zeros: Tensor | None = None, ones: Tensor | None = None, infer: bool = False
) -> bool:
    """Makes sure, while relating, that `new_shape` will be able to write the shape; pins what it could not. See there.

    Returns:
        Whether the operand is known at all; if not, the caller must make it a barrier.
    """
    numbers = site.numbers(operand)
    if numbers is None or numbers.ndim != 1 or numbers.size > site.rank(result):
        return False
    if isinstance(site.node.inputs[operand], Constant) or _entries(site, operand, result, zeros, ones, infer=infer) is not None:
        return True
    offset = site.rank(result) - numbers.size
    for axis, number in enumerate(numbers):
        if infer and number.value == -1 and not number.reads:
            continue
        here = site.ids(result, axis + offset)
        source = site.positions.at(number.axis) if number.axis is not None else None
        if source is not None and here is not None and len(source) == len(here):
            site.positions.tie(source, here)  # then they stay equal
        else:
            site.pin_reads(number.reads, "its size is read for a shape that cannot be written down")
            site.pin(result, axis + offset, "its size is computed, and the shape cannot be written down")
    return True


def new_shape(
    site: Site,
    kept: Kept,
    operand: int,
    result: Tensor,
    *,
    zeros: Tensor | None = None,
    ones: Tensor | None = None,
    infer: bool = False,
) -> Iterator[Edit]:
    """Yields the edit of a shape operand, if it needs one: sizes that follow by themselves stay as they are written.

    Args:
        site: the node.
        kept: the cut.
        operand: the shape, of ``result`` or of its last axes.
        result: the tensor that must come out with its new sizes.
        zeros: the tensor whose sizes a 0 stands for, if it may.
        ones: the tensor that is repeated along axes of size 1, so that a 1 stands for its sizes, if it may.
        infer: whether one -1 may stand for what remains.
    """
    numbers = site.numbers(operand)
    assert numbers is not None
    offset = site.rank(result) - numbers.size
    if all(_follows(kept, number, axis, offset, result, zeros) for axis, number in enumerate(numbers)):
        return
    entries = _entries(site, operand, result, zeros, ones, infer=infer)
    assert entries is not None  # else `follow_shape` has pinned whatever does not follow
    sizes = [kept.size(result, axis + offset) for axis in range(len(entries))]
    shape = [entry if size is None or entry == -1 else size for size, entry in zip(sizes, entries, strict=True)]
    yield Edit(np.array(shape, np.int64), operand=operand)


def _follows(kept: Kept, number: Number, axis: int, offset: int, result: Tensor, zeros: Tensor | None) -> bool:
    """Whether an entry of a shape still says what it must."""
    size = kept.size(result, axis + offset)
    if number.value == 0 and zeros is not None and not number.reads:
        return size == kept.size(zeros, axis)
    if any((along := kept.at(read)) is not None and not along.all() for read in number.reads):
        along = kept.at(number.axis) if number.axis is not None else None
        return along is not None and int(along.sum()) == size
    return number.value == -1 or not kept.changes(result, axis + offset)


def _entries(site: Site, operand: int, result: Tensor, zeros: Tensor | None, ones: Tensor | None, *, infer: bool) -> list[int] | None:
    """Returns the shape as constants that hold for every unknown size: known sizes, 0 or 1 for "as the input's", one -1; or None."""
    numbers = site.numbers(operand)
    assert numbers is not None
    dims, entries = site.dims(result)[site.rank(result) - numbers.size :], []
    for axis, (number, size) in enumerate(zip(numbers, dims, strict=True)):
        if number.value is not None and not number.reads:
            entries.append(size if isinstance(size, int) and number.value != -1 else number.value)
        elif isinstance(size, int):
            entries.append(size)
        else:
            shapes = site.positions.shapes
            is_zero = zeros is not None and same_size(shapes, number, zeros, axis)
            is_one = ones is not None and same_size(shapes, number, ones, axis + site.rank(ones) - numbers.size)
            entries.append(0 if is_zero else 1 if is_one else -1)
    inferred = isinstance(site.node.inputs[operand], Constant) or entries.count(-1) <= infer
    return entries if inferred else None


def factors(*shapes: tuple[int, ...]) -> tuple[int, ...] | None:
    """Returns sizes of which the sizes of all shapes are products, in order, or None if there are none.

    >>> factors((12, 32), (384,)), factors((6, 4), (2, 12)), factors((4, 6), (6, 4))
    ((12, 32), (2, 3, 4), None)
    """
    bounds = sorted({math.prod(shape[index:]) for shape in shapes for index in range(len(shape) + 1)})
    pairs = list(itertools.pairwise(bounds))
    if any(large % small for small, large in pairs):
        return None
    return tuple(large // small for small, large in pairs)[::-1]
