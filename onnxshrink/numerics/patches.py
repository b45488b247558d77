"""Convolutions as matrix products: the patches of an input that a kernel meets (im2col).

A convolution multiplies, at every output position, its kernel with a patch of its padded input. A transposed convolution is
a plain one over the input with zeros between its elements, its kernel mirrored (Dumoulin and Visin, arXiv 1603.07285,
chapter 4).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from onnxshrink.numerics.chunks import Array

__all__ = ["padded", "patches", "spread"]

Sizes = tuple[int, ...]


def padded(images: Array, begins: Sizes, ends: Sizes) -> Array:
    """Returns images [samples, channels, *space] with zeros around the spatial axes; negative widths cut instead."""
    for axis, (begin, end) in enumerate(zip(begins, ends, strict=True), start=2):
        keep = slice(max(-begin, 0), images.shape[axis] + min(end, 0))
        images = images[(*(slice(None),) * axis, keep)]
    widths = [(0, 0), (0, 0), *((max(begin, 0), max(end, 0)) for begin, end in zip(begins, ends, strict=True))]
    return np.pad(images, widths) if any(map(any, widths)) else images


def spread(images: Array, strides: Sizes) -> Array:
    """Returns images [samples, channels, *space] with stride - 1 zeros between neighbors along each spatial axis."""
    if all(stride == 1 for stride in strides):
        return images
    space = [(size - 1) * stride + 1 for size, stride in zip(images.shape[2:], strides, strict=True)]
    wide = np.zeros((*images.shape[:2], *space), images.dtype)
    steps = tuple(slice(None, None, stride) for stride in strides)
    wide[(slice(None), slice(None), *steps)] = images
    return wide


def patches(
    images: Array,
    kernel: Sizes,
    strides: Sizes,
    dilations: Sizes,
    groups: int = 1,
    mirrored: bool = False,
    most: int = 4096,
    elements: int = 1 << 20,
) -> Iterator[Array]:
    """Yields the patches in chunks [groups, positions, channels / groups * kernel], memory ordered by column.

    Args:
        images: [samples, channels, *space], padded.
        kernel: its sizes; a patch is ordered like one output channel of a Conv kernel: channel, then kernel positions.
        strides: between patches, one a spatial axis.
        dilations: between elements of a patch, one a spatial axis.
        groups: of channels, neighbors together.
        mirrored: whether kernel position 0 meets the far end of the patch, as in a transposed convolution.
        most: positions of a chunk.
        elements: of a chunk, about, unless one line of positions has more.
    """
    rank = len(kernel)
    spans = tuple((size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True))
    windows = np.lib.stride_tricks.sliding_window_view(images, spans, axis=tuple(range(2, rank + 2)))
    steps = (
        *(slice(None, None, stride) for stride in strides),
        *(slice(None, None, dilation) for dilation in dilations),
    )
    if mirrored:
        steps = (*steps[:rank], *(slice(None, None, -dilation) for dilation in dilations))
    windows = windows[(slice(None), slice(None), *steps)]
    samples, channels, *space = windows.shape[: rank + 2]
    windows = windows.reshape(samples, groups, channels // groups, *space, *kernel)
    order = (1, 2, *range(rank + 3, 2 * rank + 3), 0, *range(3, rank + 3))
    windows = windows.transpose(order)  # [groups, channels of a group, *kernel, samples, *space]
    columns = channels // groups * math.prod(kernel)
    lead = (slice(None),) * (rank + 2)
    for part in _parts(samples, tuple(space), min(most, elements // max(groups * columns, 1))):
        yield windows[lead + part].reshape(groups, columns, -1).swapaxes(1, 2)


def _parts(samples: int, space: Sizes, most: int) -> Iterator[tuple[slice, slice]]:
    """Yields slices of samples and of the first spatial axis that leave at most about so many positions each."""
    if (each := math.prod(space)) <= most:
        together = max(most // max(each, 1), 1)
        for sample in range(0, samples, together):
            yield slice(sample, sample + together), slice(None)
        return
    lines = max(most // math.prod(space[1:]), 1)
    for sample in range(samples):
        for start in range(0, space[0], lines):
            yield slice(sample, sample + 1), slice(start, start + lines)
