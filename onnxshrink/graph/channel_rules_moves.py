"""Channel rules of ops that move all elements: transposition, concatenation, repetition, padding, resizing, pixel shuffles."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnxshrink.graph.channel_shapes import follow_shape, new_shape
from onnxshrink.graph.channel_sites import Edit, Kept, Rule, Site

__all__ = ["RULES"]


def _squeeze(site: Site) -> None:
    """Axes of size 1 go."""
    x, y = site.node.inputs[0], site.node.outputs[0]
    axes = site.integers(1, "axes")
    if axes == [] or (axes is None and (site.has(1) or any(not isinstance(size, int) for size in site.dims(x)))):
        site.barrier("Squeeze of axes that are not known")
        return
    gone = {axis % site.rank(x) for axis in axes} if axes is not None else {at for at, size in enumerate(site.dims(x)) if size == 1}
    for axis in gone:
        site.pin(x, axis, "squeezed away")
    for place, axis in enumerate(axis for axis in range(site.rank(x)) if axis not in gone):
        if site.dims(x)[axis] == 1 or axes is not None:
            site.same(x, axis, y, place)
        else:  # without axes given, an axis that is cut down to one would go as well
            site.pin(x, axis, "an axis that Squeeze would take if one position were left")
            site.pin(y, place, "an axis that Squeeze would take if one position were left")


def _unsqueeze(site: Site) -> None:
    """Axes of size 1 come."""
    x, y = site.node.inputs[0], site.node.outputs[0]
    axes = site.integers(1, "axes")
    if axes is None:
        site.barrier("Unsqueeze of axes that are not constant")
        return
    new = {axis % site.rank(y) for axis in axes}
    for place, axis in enumerate(axis for axis in range(site.rank(y)) if axis not in new):
        site.same(x, place, y, axis)


def _transpose(site: Site) -> None:
    x, y = site.node.inputs[0], site.node.outputs[0]
    for place, axis in enumerate(site.node.attrs.get("perm", range(site.rank(x))[::-1])):
        site.same(x, int(axis), y, place)


def _expand(site: Site) -> None:
    """X broadcast with a shape."""
    x, y = site.node.inputs[0], site.node.outputs[0]
    if not follow_shape(site, 1, y, ones=x):
        site.barrier("Expand to a shape that is not known")
        return
    site.broadcast([x], y)


def _new_expand(site: Site, kept: Kept) -> Iterator[Edit]:
    yield from new_shape(site, kept, 1, site.node.outputs[0], ones=site.node.inputs[0])


def _constant_of_shape(site: Site) -> None:
    if not follow_shape(site, 0, site.node.outputs[0]):
        site.barrier("ConstantOfShape of a shape that is not known")


def _new_constant_of_shape(site: Site, kept: Kept) -> Iterator[Edit]:
    yield from new_shape(site, kept, 0, site.node.outputs[0])


def _tile(site: Site) -> None:
    """X repeated along axes: every copy of a channel goes."""
    x, y = site.node.inputs[0], site.node.outputs[0]
    repeats = site.integers(1)
    if repeats is None or len(repeats) != site.rank(x):
        site.barrier("Tile by repeats that are not constant")
        return
    for axis, count in enumerate(repeats):
        size = site.dims(x)[axis]
        if count == 1:
            site.same(x, axis, y, axis)
        elif isinstance(size, int):
            site.map(x, axis, y, axis, np.tile(np.arange(size), count), np.arange(size * count))
        else:
            site.pin(y, axis, "repeats an axis of unknown size")


def _concat(site: Site) -> None:
    y, start = site.node.outputs[0], 0
    axis = site.axis("axis", 1, site.rank(y))
    is_known = all(site.ids(tensor, axis) is not None for tensor in (y, *site.node.inputs))
    if not is_known:
        site.pin(y, axis, "concatenated of axes of which one has an unknown size")
    for tensor in site.node.inputs:
        for other in range(site.rank(y)):
            if other != axis:
                site.same(tensor, other, y, other)
        size = site.dims(tensor)[axis]
        if isinstance(size, int) and is_known:
            site.map(tensor, axis, y, axis, np.arange(size), np.arange(start, start + size))
            start += size
        else:
            site.pin(tensor, axis, "concatenated with an axis of unknown size")


def _split(site: Site) -> None:
    x, start = site.node.inputs[0], 0
    axis = site.axis("axis", 0, site.rank(x))
    sizes = [site.dims(tensor)[axis] if tensor.name else None for tensor in site.node.outputs]
    if not all(isinstance(size, int) for size in sizes) or site.ids(x, axis) is None:
        site.pin(x, axis, "split into parts of unknown size")
        for tensor in site.node.outputs:
            if tensor.name:
                site.pin(tensor, axis, "a part of an axis of unknown size")
    for tensor, size in zip(site.node.outputs, sizes, strict=True):
        if tensor.name:
            for other in range(site.rank(x)):
                if other != axis:
                    site.same(x, other, tensor, other)
        if isinstance(size, int) and None not in sizes and site.ids(x, axis) is not None:
            site.map(x, axis, tensor, axis, np.arange(start, start + size), np.arange(size))
            start += size


def _new_split(site: Site, kept: Kept) -> Iterator[Edit]:
    axis = site.axis("axis", 0, site.rank(site.node.inputs[0]))
    if kept.changes(site.node.inputs[0], axis):
        sizes = [kept.size(tensor, axis) for tensor in site.node.outputs]
        if site.opset < 13:
            yield Edit(sizes, "split")
        else:
            yield Edit(np.array(sizes, np.int64), operand=1)
            if "num_outputs" in site.node.attrs:
                yield Edit(None, "num_outputs")


def _pad(site: Site) -> None:
    """What is between the pads passes; pads of a constant value may be cut like channels, others need what they repeat."""
    x, y, pads = site.node.inputs[0], site.node.outputs[0], _pads(site)
    if pads is None:
        site.barrier("Pad by widths that are not known")
        return
    for axis in range(site.rank(x)):
        size, (before, after) = site.dims(x)[axis], pads.get(axis, (0, 0))
        if not before and not after:
            site.same(x, axis, y, axis)
        elif str(site.node.attrs.get("mode", "constant")) == "constant" and isinstance(size, int) and before >= 0 and after >= 0:
            site.map(x, axis, y, axis, np.arange(size), np.arange(before, before + size))
        else:
            site.pin(x, axis, "padded")
            site.pin(y, axis, "padded")


def _pads(site: Site) -> dict[int, tuple[int, int]] | None:
    """Returns the widths before and after each axis, in the order in which they are given; None if they are not known."""
    pads, rank = site.integers(1, "pads"), site.rank(site.node.inputs[0])
    axes = site.integers(3) if site.has(3) else list(range(rank))
    if pads is None or axes is None or len(pads) != 2 * len(axes):
        return None
    return {axis % rank: bounds for axis, *bounds in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True)}  # type: ignore[misc]


def _new_pads(site: Site, kept: Kept) -> Iterator[Edit]:
    pads = _pads(site)
    assert pads is not None  # else nothing that is padded is cut
    before, after = [], []
    for axis, widths in pads.items():
        along = kept.along(site.node.outputs[0], axis)
        if any(widths) and along is not None and not along.all():
            widths = int(along[: widths[0]].sum()), int(along[len(along) - widths[1] :].sum())
        before.append(widths[0])
        after.append(widths[1])
    if list(zip(before, after, strict=True)) != list(pads.values()):
        new = before + after
        yield Edit(new, "pads") if "pads" in site.node.attrs else Edit(np.array(new, np.int64), operand=1)


def _resize(site: Site) -> None:
    """Axes that keep their size pass; those that do not stay."""
    x, y, attrs = site.node.inputs[0], site.node.outputs[0], site.node.attrs
    if attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize" or site.opset < 7:
        site.barrier("Resize with a crop, or before opset 7")
        return
    if attrs.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        site.barrier("Resize that keeps the aspect ratio")
        return
    if "axes" in attrs:
        named = {int(axis) % site.rank(x) for axis in attrs["axes"]}
        site.pin_reads(site.reads(3), "its size is read for the size of something else")
    elif site.has(3) and not follow_shape(site, 3, y):
        site.barrier("Resize to sizes that are not known")
        return
    else:
        scales = _scales(site)
        named = {axis for axis in range(site.rank(x)) if not site.has(3) and (scales is None or scales[axis] != 1.0)}
    for axis in range(site.rank(x)):
        if axis not in named and isinstance(site.dims(x)[axis], int) and site.dims(x)[axis] == site.dims(y)[axis]:
            site.same(x, axis, y, axis)
        else:
            site.pin(x, axis, "resized")
            site.pin(y, axis, "resized")


def _scales(site: Site) -> list[float] | None:
    """Returns the constant factors of all axes: an attribute before opset 9, input 1 of Upsample, and of Resize before opset 11."""
    if "scales" in site.node.attrs:
        return [float(value) for value in site.node.attrs["scales"]]
    operand = 1 if site.opset < 11 or site.node.op == "Upsample" else 2
    values = site.values(operand) if site.has(operand) else None
    return values.tolist() if values is not None and values.size == site.rank(site.node.inputs[0]) else None


def _new_resize(site: Site, kept: Kept) -> Iterator[Edit]:
    if site.has(3) and "axes" not in site.node.attrs:
        yield from new_shape(site, kept, 3, site.node.outputs[0])


def _depth_to_space(site: Site) -> None:
    """X [N, C·b², H, W] -> Y [N, C, H·b, W·b]: in mode DCR the blocks come first, in CRD the channels; SpaceToDepth is DCR's inverse."""
    x, y = site.node.inputs[0], site.node.outputs[0]
    flat, few = (x, y) if site.node.op == "DepthToSpace" else (y, x)
    site.same(x, 0, y, 0)
    for tensor in (x, y):
        site.pin_all(tensor, "a spatial axis", range(2, 4))
    many, size = site.dims(flat)[1], site.dims(few)[1]
    if not isinstance(many, int) or not isinstance(size, int):
        for tensor in (x, y):
            site.pin(tensor, 1, "an unknown number of channels")
        return
    places = np.arange(many)
    is_channel_first = site.node.attrs.get("mode", "DCR") == "CRD"
    site.map(flat, 1, few, 1, places, places * size // many if is_channel_first else places % size)


RULES: dict[str, Rule] = {
    "Concat": Rule(_concat),
    "ConstantOfShape": Rule(_constant_of_shape, _new_constant_of_shape, shape_operands=(0,)),
    "DepthToSpace": Rule(_depth_to_space),
    "Expand": Rule(_expand, _new_expand, shape_operands=(1,)),
    "Pad": Rule(_pad, _new_pads),
    "Resize": Rule(_resize, _new_resize, shape_operands=(3,)),
    "SpaceToDepth": Rule(_depth_to_space),
    "Split": Rule(_split, _new_split),
    "Squeeze": Rule(_squeeze),
    "Tile": Rule(_tile),
    "Transpose": Rule(_transpose),
    "Unsqueeze": Rule(_unsqueeze),
    "Upsample": Rule(_resize),
}
