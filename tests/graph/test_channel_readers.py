"""Which elements of which weights meet which channel, against the positions of the group, element by element."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnxshrink.graph.channel_groups import find_channels
from onnxshrink.graph.channel_readers import Candidate, Reader, candidates
from onnxshrink.graph.files import load
from onnxshrink.graph.weights import weights
from tests.graph.test_channel_rules import CASES, C, N, S, between, build, ints, linear


def found(model: Any, *, outer: bool = True) -> dict[str, Candidate]:
    graph = load(model)
    groups = [group for group in find_channels(graph, outer=outer).groups if group.reason is None]
    return {candidate.group.name: candidate for candidate in candidates(graph, groups)}


def readers(candidate: Candidate) -> dict[str, Reader]:
    return {reader.weight.site: reader for reader in candidate.readers}


def test_a_convolution_reads_a_channel_with_a_kernel_of_every_row() -> None:
    (reader,) = found(between("Relu h -> r"))["w1"].readers
    assert (reader.weight.site, reader.owners.dtype) == ("w2", np.int32)
    np.testing.assert_array_equal(reader.owners, np.broadcast_to(np.repeat(np.arange(C), 9), (6, C * 9)))
    np.testing.assert_array_equal(reader.columns, np.repeat(np.arange(C), 9))


def test_groups_read_channels_at_the_same_places() -> None:
    both = found(CASES["Conv in groups"][0])
    np.testing.assert_array_equal(readers(both["w1"])["wg"].columns, np.arange(4))
    np.testing.assert_array_equal(readers(both["wg"])["w2"].columns, np.repeat(np.tile(np.arange(4), 3), 9))


def test_a_depthwise_convolution_reads_nothing() -> None:
    assert list(readers(found(CASES["depthwise Conv"][0])["w1"])) == ["w2"]


def test_a_transposed_convolution_reads_along_its_first_axis() -> None:
    (reader,) = found(CASES["ConvTranspose"][0])["w1"].readers
    assert reader.owners.shape == (8, C * 4)
    np.testing.assert_array_equal(reader.columns, np.repeat(np.arange(C), 4))


def test_two_groups_lie_side_by_side_in_one_reader() -> None:
    model = between("Conv x wa -> a", ("Concat h a x -> r", {"axis": 1}), channels=C + 5 + 4, wa=(5, 4, 1, 1))
    both = found(model)
    own = [readers(both[name])["w2"].columns for name in ("w1", "wa")]
    np.testing.assert_array_equal(own[0], np.repeat([*range(C), *[-1] * 9], 9))
    np.testing.assert_array_equal(own[1], np.repeat([*[-1] * C, *range(5), *[-1] * 4], 9))


def test_every_layer_that_sums_over_a_channel_is_there_once() -> None:
    assert set(readers(found(CASES["residual sum"][0])["w1"])) == {"wa", "w2"}
    assert set(readers(found(CASES["squeeze and excite"][0])["w1"])) == {"wa", "w2"}
    assert set(readers(found(CASES["LSTM forward"][0])["w1"])) == {"w2", "w3"}


def test_flattened_channels_have_many_columns() -> None:
    (reader,) = found(CASES["Flatten"][0])["w1"].readers
    np.testing.assert_array_equal(reader.columns, np.arange(C * S * S) // (S * S))


def test_a_stored_left_operand_reads_along_its_rows() -> None:
    (reader,) = found(CASES["Gemm, transposed"][0])["w1"].readers
    np.testing.assert_array_equal(reader.owners, np.broadcast_to(np.arange(C), (6, C)))


@pytest.mark.parametrize("case", ["Transpose", "DequantizeLinear per channel", "weights behind Transpose and DequantizeLinear"])
def test_weights_behind_nodes_that_move_them_are_readers(case: str) -> None:
    (candidate,) = found(CASES[case][0]).values()
    assert [reader.weight.site for reader in candidate.readers] == ["w2"]


@pytest.mark.parametrize(
    ("lines", "constants"),
    [
        (["Transpose k -> w2"], {"k": (6, C)}),
        (["Identity k -> w2"], {"k": (C, 6)}),
        (["Unsqueeze k a -> u", "Squeeze u a -> w2"], {"k": (C, 6), "a": ints(0)}),
        (["Reshape k a -> w2"], {"k": (C, 2, 3), "a": ints(C, 6)}),
    ],
    ids=["Transpose", "Identity", "Unsqueeze", "Reshape"],
)
def test_a_reader_may_be_moved_before_it_is_multiplied_with(lines: list[str], constants: dict[str, Any]) -> None:
    model = build(["MatMul x w1 -> h", *lines, "MatMul h w2 -> y"], (N, 4), w1=(4, C), **constants)
    (reader,) = found(model)["w1"].readers
    assert reader.weight.site == "k"
    np.testing.assert_array_equal(reader.columns, np.arange(C))


def test_a_reader_whose_uses_disagree_is_one_row_of_elements() -> None:
    """Multiplied with from both sides: as a matrix it has no columns of its own."""
    model = build(["MatMul x w1 -> h", "MatMul h w2 -> a", ("Gemm h w2 -> b", {"transB": 1}), "Add a b -> y"], (N, 4), w1=(4, C), w2=(C, C))
    own = [reader for candidate in found(model).values() for reader in candidate.readers if reader.weight.site == "w2"]
    for reader in own:
        assert reader.owners.shape == (1, C * C)


def test_columns_that_depend_on_the_row_are_none() -> None:
    (weight,) = weights(load(build(["MatMul x w -> y"], (N, 2), w=(2, 3))))
    assert Reader(weight, np.array([[0, 1], [0, 1], [1, 0]], np.int32)).columns is None
    np.testing.assert_array_equal(Reader(weight, np.array([[0, -1]] * 3, np.int32)).columns, [0, -1])


def test_heads_or_what_each_has() -> None:
    model = CASES["heads"][0]
    np.testing.assert_array_equal(readers(found(model)["wq"])["wo"].columns, np.repeat(np.arange(3), 4))
    inner = found(model, outer=False)
    np.testing.assert_array_equal(readers(inner["wv"])["wo"].columns, np.tile(np.arange(4), 3))
    assert not inner["wq"].readers  # queries meet keys, no weight


def test_only_the_groups_that_are_asked_for() -> None:
    graph = load(linear("Relu h -> r"))
    assert candidates(graph, []) == []
