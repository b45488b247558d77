"""Tests of patches: every element against its definition, in any chunking."""

from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from onnxshrink.numerics.patches import padded, patches, spread

few = st.integers(1, 3)


@st.composite
def geometries(draw):
    rank = draw(few)
    per_axis = st.lists(few, min_size=rank, max_size=rank).map(tuple)
    kernel, strides, dilations = draw(per_axis), draw(per_axis), draw(per_axis)
    extra = draw(st.lists(st.integers(0, 3), min_size=rank, max_size=rank))
    space = [(size - 1) * dilation + 1 + more for size, dilation, more in zip(kernel, dilations, extra, strict=True)]
    groups = draw(few)
    return (draw(few), groups * draw(few), *space), kernel, strides, dilations, groups


@given(geometries(), st.booleans(), st.sampled_from([(1, 1 << 22), (5, 1 << 22), (4096, 40), (4096, 1 << 22)]))
def test_patches_are_what_the_kernel_meets(geometry, mirrored, limits):
    shape, kernel, strides, dilations, groups = geometry
    images = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    chunks = list(patches(images, kernel, strides, dilations, groups, mirrored, *limits))
    found = np.concatenate(chunks, axis=1)
    spans = [(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True)]
    outputs = [range(0, size - span + 1, stride) for size, span, stride in zip(shape[2:], spans, strides, strict=True)]
    each = shape[1] // groups
    expected = [
        [
            [
                images[
                    (sample, group * each + channel, *(start + step for start, step in zip(corner, steps, strict=True)))
                ]
                for channel in range(each)
                for steps in itertools.product(
                    *(
                        [(size - 1 - k if mirrored else k) * dilation for k in range(size)]
                        for size, dilation in zip(kernel, dilations, strict=True)
                    )
                )
            ]
            for sample in range(shape[0])
            for corner in itertools.product(*outputs)
        ]
        for group in range(groups)
    ]
    np.testing.assert_array_equal(found, np.array(expected, np.float32))
    line = math.prod(map(len, outputs[1:]))
    most = max(min(limits[0], limits[1] // found[0, 0].size // groups), line)
    assert all(chunk.shape[1] <= most for chunk in chunks)


def test_a_pointwise_kernel_copies_nothing():
    images = np.ones((1, 8, 5, 5), np.float32)
    (chunk,) = patches(images, (1, 1), (1, 1), (1, 1))
    assert np.shares_memory(chunk, images)


@given(st.lists(st.integers(-2, 2), min_size=4, max_size=4))
def test_padding_adds_zeros_or_cuts(widths):
    images = np.arange(1, 26, dtype=np.float32).reshape(1, 1, 5, 5)
    wide = np.pad(images, [(0, 0), (0, 0), (2, 2), (2, 2)])
    top, left, bottom, right = widths
    expected = wide[:, :, 2 - top : 7 + bottom, 2 - left : 7 + right]
    np.testing.assert_array_equal(padded(images, (top, left), (bottom, right)), expected)


def test_spreading_puts_zeros_between():
    images = np.arange(1, 7, dtype=np.float16).reshape(1, 1, 2, 3)
    found = spread(images, (2, 3))
    assert found.dtype == np.float16
    assert found[0, 0].tolist() == [[1, 0, 0, 2, 0, 0, 3], [0] * 7, [4, 0, 0, 5, 0, 0, 6]]
    assert spread(images, (1, 1)) is images
