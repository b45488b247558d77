"""Tests of tiles: for every op, what shares a number in the matrix is what shares one in the stored tensor."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from onnxshrink.graph.codebook import spread, tiles_along
from onnxshrink.graph.files import load
from onnxshrink.graph.tiling import tiling
from onnxshrink.graph.weights import Weight, weights
from tests import oracle


def weight_of(op: str, shape: tuple[int, ...], operand: int = 1, before: str | None = None, **attributes: Any) -> Weight:
    """Returns the weight w, a random tensor that an op reads, through a node that moves it or not."""
    name, nodes = "w", []
    if before is not None:
        nodes.append(helper.make_node(before, ["w"], ["v"]))
        name = "v"
    reads = ["x", name] if operand == 1 else [name, "x"]
    reads = ["x", "other", name] if operand == 2 else reads
    nodes.append(helper.make_node(op, reads, ["y"], **attributes))
    values = [oracle.value("w", np.random.default_rng(0).standard_normal(shape).astype(np.float32))]
    if operand == 2:
        values.append(oracle.value("other", np.zeros((shape[0], shape[1], 3), np.float32)))
    inputs = [onnx.helper.make_tensor_value_info("x", 1, None)]
    model = oracle.make_model(nodes, inputs, [onnx.helper.make_tensor_value_info("y", 1, None)], values)
    return next(weight for weight in weights(load(model)) if weight.site == "w")


CASES = {
    "Conv": (weight_of("Conv", (6, 10, 3, 2)), 0, 1),
    "Conv in groups": (weight_of("Conv", (6, 10, 3), group=2), 0, 1),
    "depthwise Conv": (weight_of("Conv", (6, 1, 7, 2), group=6), 0, 2),
    "Conv over a kernel of one": (weight_of("Conv", (6, 10, 1, 1)), 0, 1),
    "ConvTranspose": (weight_of("ConvTranspose", (10, 6, 3, 2)), 1, 0),
    "depthwise ConvTranspose": (weight_of("ConvTranspose", (6, 1, 7), group=6), 0, 2),
    "MatMul, right": (weight_of("MatMul", (10, 6)), 1, 0),
    "MatMul, left": (weight_of("MatMul", (6, 10), operand=0), 0, 1),
    "MatMul of several": (weight_of("MatMul", (2, 10, 6)), 2, 1),
    "Gemm": (weight_of("Gemm", (10, 6)), 1, 0),
    "Gemm, transB": (weight_of("Gemm", (6, 10), transB=1), 0, 1),
    "Gemm, transA": (weight_of("Gemm", (10, 6), operand=0, transA=1), 1, 0),
    "MatMul, transposed": (weight_of("MatMul", (6, 10), before="Transpose"), 0, 1),
    "LSTM, W": (weight_of("LSTM", (2, 12, 10), hidden_size=3, direction="bidirectional"), 1, 2),
    "LSTM, R": (weight_of("LSTM", (1, 12, 3), operand=2, hidden_size=3), 1, 2),
}


@pytest.mark.parametrize("case", CASES)
@given(channels=st.integers(1, 8), block=st.none() | st.integers(1, 12))
def test_cells_of_the_matrix_are_tiles_of_the_tensor(case, channels, block):
    weight, channel_axis, summed_axis = CASES[case]
    shape = weight.constant.shape
    tiles = tiling(weight, channels, block)
    expected = list(shape)
    expected[channel_axis] = min(channels, shape[channel_axis])
    if block is not None:
        expected[summed_axis] = min(block, shape[summed_axis])
    assert tiles.tile == tuple(expected)
    cells = tiles.cells
    by_cell = np.arange(cells.groups * cells.blocks)
    assert np.prod(tiles_along(shape, tiles.tile)) == by_cell.size
    in_tensor = np.broadcast_to(spread(tiles.stored(by_cell), shape, tiles.tile), shape)
    in_matrix = cells.rows[:, None] * cells.blocks + cells.columns
    np.testing.assert_array_equal(weight.layout.forward(in_tensor), in_matrix)
    tables = np.stack([by_cell, by_cell + 100], axis=1)  # as codebooks are
    np.testing.assert_array_equal(tiles.stored(tables)[:, 0], tiles.stored(by_cell))
    index = np.indices(shape)
    np.testing.assert_array_equal(  # a box, wherever it is
        np.unique(in_tensor).size, np.unique(sum(index[at] // size * 1000**at for at, size in enumerate(expected))).size
    )


@pytest.mark.parametrize(
    ("channels", "block", "text"),
    [
        (1, None, "6 channels"),
        (1, 4, "6 channels in 3 blocks of 4"),
        (4, 4, "2 groups of 4 channels in 3 blocks of 4"),
        (2, None, "3 groups of 2 channels"),
        (1, 10, "6 channels"),
        (6, None, ""),
        (9, 5, "1 group of 6 channels in 2 blocks of 5"),
    ],
)
def test_says_how_many_there_are(channels, block, text):
    assert tiling(CASES["MatMul, right"][0], channels, block).text == text


FALLBACKS = {
    "rows are looked up": (weight_of("Gather", (10, 6), operand=0), "10 channels", "no tiles: its rows are looked up", (1, 6)),
    "channels on two axes": (
        weight_of("ConvTranspose", (4, 3, 3), group=2), "", "no tiles: no axis is that of channels", (4, 3, 3)
    ),
    "used in two ways": (weight_of("Add", (10, 6)), "", "no tiles: no axis is that of channels", (10, 6)),
    "nothing summed alike": (
        weight_of("ConvTranspose", (6, 1, 1), group=6), "6 channels", "no blocks: no axis is summed over for all channels alike", (1, 1, 1)
    ),
}


@pytest.mark.parametrize("case", FALLBACKS)
def test_says_where_blocks_have_no_meaning(case):
    weight, plain, why, tile = FALLBACKS[case]
    assert tiling(weight).text == plain
    tiles = tiling(weight, 1, 4)
    assert (tiles.tile, tiles.cells.blocks) == (tile, 1)
    assert tiles.text == ", ".join(filter(None, (plain, why)))


def test_spreads_numbers_of_tiles_that_come_out_uneven():
    numbers = np.array([1, 2, 3, 4])
    np.testing.assert_array_equal(
        spread(numbers, (3, 5), (2, 3)), [[1, 1, 1, 2, 2], [1, 1, 1, 2, 2], [3, 3, 3, 4, 4]]
    )
    assert spread(numbers, (4, 5), (1, 5)).shape == (4, 1)
    assert spread(numbers[:1], (4, 5), None).shape == ()
    assert spread(numbers[:1], (4, 5), (4, 5)).shape == (1, 1)
