"""Tests of what is known of shapes: arithmetic that exporters write, and sizes that inference loses."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from onnxshrink.graph.channel_shapes import factors
from onnxshrink.graph.excerpt import tensors_by_name
from onnxshrink.graph.files import load
from onnxshrink.graph.positions import Choice, Positions, Reason, Side
from onnxshrink.graph.static_shapes import shapes_and_sizes
from onnxshrink.graph.tensor_shapes import tensor_shapes
from tests import oracle
from tests.graph.test_channel_rules import build, ints


def known(model: Any, name: str) -> list[int | None]:
    """Returns the values of a tensor as far as they are known."""
    graph = load(model)
    _, sizes = shapes_and_sizes(graph)
    return [number.value for number in sizes[id(tensors_by_name(graph)[name])].numbers.reshape(-1)]


ARITHMETIC = {
    "sizes": (["Shape x -> y"], [None, 6, 4]),
    "some sizes": ([("Shape x -> y", {"start": 1, "end": -1})], [6]),
    "the number of elements": (["Gather x i -> g", "Size g -> y"], [24]),
    "products": (["Shape x -> s", "Slice s one three -> t", "ReduceProd t -> y"], [24]),
    "quotients": (["Shape x -> s", "Slice s one three -> t", "Div t minusfour -> y"], [-1, -1]),
    "sums and differences": (["Shape x -> s", "Add s three -> t", "Sub t one -> y"], [None, 8, 6]),
    "concatenation": (["Shape x -> s", ("Concat s three -> y", {"axis": 0})], [None, 6, 4, 3]),
    "axes that come and go": (["Shape x -> s", "Unsqueeze s zero -> t", "Squeeze t zero -> u", ("Cast u -> v", {"to": 6}), "Identity v -> y"], [None, 6, 4]),
    "turned around": (["Shape x -> s", "Slice s minusone far zero minusone -> y"], [4, 6, None]),
    "sizes or ones": (["Shape x -> s", "Equal s minusone -> e", "Where e three s -> y"], [None, 6, 4]),
    "pads as PyTorch writes them": (
        [("Concat pads four -> p", {"axis": 0}), "Reshape p pairs -> q", "Slice q minusone far zero minusone -> r", ("Transpose r -> t", {"perm": [1, 0]}), "Reshape t flat -> y"],
        [3, 1, 4, 2],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ARITHMETIC)
def test_arithmetic_of_shapes_is_what_runs(case):
    lines, expected = ARITHMETIC[case]
    numbers = {"zero": 0, "one": 1, "three": 3, "four": 4, "minusone": -1, "minusfour": -4, "far": -(2**62), "flat": -1}
    constants = {name: ints(value) for name, value in numbers.items()}
    constants |= {"i": np.int64(0), "pads": ints(1, 2, 3), "pairs": ints(-1, 2)}
    model = build(lines, ("n", 6, 4), **constants)
    model.graph.output[0].CopyFrom(oracle.tensor("y", None, {"axes that come and go": 6}.get(case, 7)))
    running = oracle.session(model, optimise=False)
    (result,) = oracle.run(running, {"x": np.zeros((5, 6, 4), np.float32)})
    found = known(model, "y")
    assert found == expected
    if case != "quotients":
        assert all(value in (None, seen) for value, seen in zip(found, result.reshape(-1), strict=True))


def test_quotients_are_rounded_as_onnx_runtime_does():
    model = build(["Shape x -> s", "Div s minusfour -> y"], (7, 6, 4), minusfour=ints(-4))
    model.graph.output[0].CopyFrom(oracle.tensor("y", None, 7))
    (result,) = oracle.run(running := oracle.session(model, optimise=False), oracle.random_feeds(running))
    assert known(model, "y") == result.tolist()


def test_names_that_stand_for_anything_are_not_taken_for_one_size():
    model = build(["Relu x -> y"], ("?", "?", 4))
    graph = load(model)
    first, second, last = tensor_shapes(graph)[id(graph.inputs[0])]
    assert isinstance(first, str)
    assert isinstance(second, str)
    assert first != second
    assert last == 4


def test_what_a_file_says_of_inner_tensors_is_not_believed():
    model = build(["Relu x -> h", "Relu h -> y"], (2, 3))
    model.graph.value_info.append(helper.make_tensor_value_info("h", 1, (2, 99)))
    graph = load(model)
    assert tensor_shapes(graph)[id(tensors_by_name(graph)["h"])] == (2, 3)


def test_shapes_that_are_known_help_inference():
    model = build([("Foo x -> h", {"domain": "test"}), "Relu h -> y"], (2, 3))
    model.opset_import.append(helper.make_opsetid("test", 1))
    graph = load(model)
    tensors = tensors_by_name(graph)
    assert id(tensors["h"]) not in tensor_shapes(graph)
    assert tensor_shapes(graph, {"h": (2, 7)})[id(tensors["h"])] == (2, 7)


sizes = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)


@given(parts=sizes, cuts=st.tuples(st.sets(st.integers(1, 3)), st.sets(st.integers(1, 3))))
def test_factors_multiply_to_all_shapes(parts, cuts):
    shapes = []
    for chosen in cuts:
        bounds = [0, *sorted(cut for cut in chosen if cut < len(parts)), len(parts)]
        shapes.append(tuple(int(np.prod(parts[low:high])) for low, high in itertools.pairwise(bounds)))
    found = factors(*shapes)
    assert found is not None
    for shape in shapes:
        places = {int(np.prod(found[place:])) for place in range(len(found) + 1)}
        assert {int(np.prod(shape[place:])) for place in range(len(shape) + 1)} <= places


def test_a_choice_takes_the_factor_that_is_free():
    positions = Positions({})
    wide, narrow, other = positions.fresh(12), positions.fresh(3), positions.fresh(4)
    positions.pin(narrow, Reason("here", "held"))
    positions.choose(Choice("r", (3, 4), (Side(wide, 0, 2), Side(narrow, 0, 1), Side(other, 1, 2))))
    positions.settle(outer=True)
    assert np.array_equal(positions.labels[wide], positions.labels[other][np.arange(12) % 4])
    assert (positions.pinned[positions.labels[other]] < 0).all()
    assert (positions.pinned[positions.labels[narrow]] == 0).all()
