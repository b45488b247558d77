"""A coded weight is plain ONNX: checked, folded away by ONNX Runtime, exactly the dense tensor, and as small as its bits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from onnxshrink.graph.codebook import FIRST_OPSET, Codebook, UniformGrid, coded_weight, half_weight
from onnxshrink.graph.coded import coded_weights, expand_coded
from onnxshrink.graph.edit import NameSource, replace_constant
from onnxshrink.graph.exporter import to_model
from onnxshrink.graph.files import load, model_bytes, save
from onnxshrink.graph.ir import Constant, Graph
from tests.oracle import make_model, run, session, tensor, value

Array = np.ndarray[Any, Any]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = (np.dtype(np.float16), BFLOAT16, np.dtype(np.float32), np.dtype(np.float64))
DECODING_OPS = {"Add", "Cast", "Div", "Gather", "Mod", "Mul", "Reshape", "Slice", "Sub"}
WORDS = ("codebook", "codebook per channel", "scaled codebook", "grid", "grid per channel")


def _is_known(opset: int) -> bool:
    """Whether the installed onnx and ONNX Runtime both know an opset."""
    node = helper.make_node("Identity", ["x"], ["y"])
    try:
        session(
            make_model([node], [tensor("x", [1])], [tensor("y", [1])], opset=opset, ir_version=10 if opset > 20 else 8)
        )
    except Exception:  # ONNX Runtime's exceptions share no base class of their own
        return False
    return opset <= onnx.defs.onnx_opset_version()


OPSETS = [opset for opset in (7, 8, 9, 10, 11, 13, 18, 21, 25, 26) if opset <= 21 or _is_known(opset)]


@dataclass(frozen=True)
class Coding:
    """Random codes, what they stand for, and the dense tensor that numpy makes of them."""

    codes: Array
    values: Codebook | UniformGrid
    dense: Array


def coding(word: str, bits: int, shape: tuple[int, ...], dtype: np.dtype[Any] = DTYPES[2], axis: int = 0) -> Coding:
    """Returns a coding; ``axis`` is where channels lie if it has any."""
    rng = np.random.default_rng(bits)
    channels, length = shape[axis], 2**bits
    codes = rng.integers(0, length, shape).astype(np.uint8)
    by_channel = [channels if index == axis else 1 for index in range(len(shape))]
    scale = rng.uniform(0.01, 2, channels).astype(np.float32)
    zero_point = rng.integers(0, length, channels).astype(np.float32)
    tile = tuple(1 if index == axis else size for index, size in enumerate(shape))
    if word == "codebook":
        table = rng.standard_normal(length).astype(dtype)
        return Coding(codes, Codebook(table), table[codes])
    if word == "codebook per channel":
        table = rng.standard_normal((channels, length)).astype(dtype)
        return Coding(codes, Codebook(table, tile), table[np.arange(channels).reshape(by_channel), codes])
    if word == "scaled codebook":
        table = rng.standard_normal(length).astype(np.float16).astype(np.float32)  # they are stored as float16
        return Coding(codes, Codebook(table, tile, scale), (table[codes] * scale.reshape(by_channel)).astype(dtype))
    if word == "grid":
        dense = (codes.astype(np.float32) - zero_point[:1]) * scale[:1]
        return Coding(codes, UniformGrid(scale[:1], zero_point[:1], None), dense.astype(dtype))
    dense = (codes.astype(np.float32) - zero_point.reshape(by_channel)) * scale.reshape(by_channel)
    return Coding(codes, UniformGrid(scale, zero_point, tile), dense.astype(dtype))


def dense_model(dense: Array, opset: int, place: str) -> onnx.ModelProto:
    """Returns y = Concat(x, w) with the weight in the main graph, a branch, a loop body or a function."""
    element = helper.np_dtype_to_tensor_dtype(dense.dtype)
    row, both = [1, *dense.shape[1:]], [1 + dense.shape[0], *dense.shape[1:]]
    x, y, w = tensor("x", row, element), tensor("y", both, element), value("w", dense)
    join = helper.make_node("Concat", ["x", "w"], ["o"], axis=0)
    o = tensor("o", both, element)
    kind = {"opset": opset, "ir_version": 10 if opset > 20 else 8}
    condition = value("c", True, "bool")
    if place == "main":
        join.output[0] = "y"
        return make_model([join], [x], [y], [w], **kind)
    if place == "branch":
        repeat = helper.make_node("Concat", ["x"] * both[0], ["p"], axis=0)
        other = helper.make_graph([repeat], "e", [], [tensor("p", both, element)])
        node = helper.make_node(
            "If", ["c"], ["y"], then_branch=helper.make_graph([join], "t", [], [o], [w]), else_branch=other
        )
        return make_model([node], [x, tensor("c", [], TensorProto.BOOL)], [y], **kind)
    if place == "loop":
        keep = [helper.make_node("Identity", ["going"], ["on"]), helper.make_node("Identity", ["old"], ["new"])]
        turn, going, old = (
            tensor("turn", [], TensorProto.INT64),
            tensor("going", [], TensorProto.BOOL),
            tensor("old", row, element),
        )
        results = [tensor("on", [], TensorProto.BOOL), tensor("new", row, element), o]
        body = helper.make_graph([*keep, join], "b", [turn, going, old], results, [w])
        node = helper.make_node("Loop", ["n", "c", "x"], ["last", "y"], body=body)
        return make_model([node], [x], [tensor("y", [1, *both], element)], [condition, value("n", 1, "int64")], **kind)
    holder = helper.make_node("Constant", [], ["w"], value=w)
    imports = [helper.make_opsetid("", opset)]
    function = helper.make_function("local", "f", ["x"], ["o"], [holder, join], imports)
    node = helper.make_node("f", ["x"], ["y"], domain="local")
    return make_model([node], [x], [y], functions=[function], opsets={"local": 1}, **kind)


def weight_in(graph: Graph) -> tuple[Graph, Constant]:
    """Returns the scope that owns the tensor ``w``, and the tensor."""
    return next((scope.graph, item) for scope in graph.scopes() for item in scope.graph.constants if item.name == "w")


def encode(graph: Graph, made: Coding, bits: int) -> int:
    """Puts codes in the place of ``w``; returns the bytes that they take."""
    scope, constant = weight_in(graph)
    fragment = coded_weight(constant, made.codes, bits, made.values, scope, NameSource(graph))
    nbytes = fragment.nbytes(scope)
    replace_constant(scope, constant, fragment)
    return nbytes


def outputs_of(model: onnx.ModelProto, dense: Array, folder: Path) -> tuple[bytes, list[onnx.NodeProto]]:
    """Returns the output's bytes for x = 1, 1, 1, ..., and all nodes, in bodies too, that ONNX Runtime's optimizer left."""
    feeds = {"x": np.ones((1, *dense.shape[1:]), dense.dtype), "c": np.array(True)}
    running = session(model, optimised_to=folder / "optimised.onnx")
    output = run(running, {spec.name: feeds[spec.name] for spec in running.get_inputs()})[0]
    return output.tobytes(), list(_all_nodes(onnx.load(folder / "optimised.onnx").graph))


def assert_exact(made: Coding, bits: int, opset: int, place: str, folder: Path) -> None:
    """Encodes, checks, runs, looks for decoding nodes left by the optimizer, and decodes."""
    original = dense_model(made.dense, opset, place)
    graph = load(original)
    encode(graph, made, bits)
    model = to_model(graph)
    onnx.checker.check_model(model, full_check=True)
    output, nodes = outputs_of(model, made.dense, folder)
    assert output == np.concatenate([np.ones((1, *made.dense.shape[1:]), made.dense.dtype), made.dense]).tobytes()
    assert not {node.op_type for node in nodes} & DECODING_OPS, "ONNX Runtime has not folded the decoder"
    assert len(nodes) <= 4

    (found,) = coded_weights(load(model))
    assert found.output.name == "w"
    assert found.values().tobytes() == made.dense.tobytes()
    assert len(expand_coded(graph)) == 1
    assert coded_weights(graph) == []
    scope, constant = weight_in(graph)
    assert (constant.values.tobytes(), constant.shape, constant.dtype) == (
        made.dense.tobytes(),
        made.dense.shape,
        made.dense.dtype,
    )
    assert len(scope.nodes) == len(weight_in(load(original))[0].nodes)
    assert outputs_of(to_model(graph), made.dense, folder)[0] == output


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("word", WORDS)
def test_every_width_of_codes(word: str, bits: int, tmp_path: Path) -> None:
    for shape in [(3, 5, 7), (1, 1), (4, 2), (13,)]:
        assert_exact(coding(word, bits, shape), bits, 17, "main", tmp_path)
    if word not in ("codebook", "grid"):
        assert_exact(coding(word, bits, (3, 5, 7), axis=1), bits, 17, "main", tmp_path)
        assert_exact(coding(word, bits, (3, 5, 7), axis=2), bits, 17, "main", tmp_path)


@pytest.mark.parametrize(
    ("place", "opset"),
    [
        *((place, opset) for place in ("main", "branch", "loop") for opset in OPSETS),
        *(
            ("function", opset) for opset in OPSETS if opset >= 9
        ),  # functions hold constants in nodes, before 9 of floats only
    ],
)
def test_every_opset_and_place(place: str, opset: int, tmp_path: Path) -> None:
    for index, word in enumerate(WORDS):
        for bits in (3 + index, 8 - index):
            assert_exact(coding(word, bits, (3, 5, 7)), bits, opset, place, tmp_path)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("word", WORDS)
def test_every_float_type(word: str, dtype: np.dtype[Any], tmp_path: Path) -> None:
    for opset in (7, 10, 13, 21):
        if dtype != BFLOAT16 or opset >= 13:  # before it the standard has no op for bfloat16
            for bits in (1, 5, 8):
                assert_exact(coding(word, bits, (3, 5, 7), dtype), bits, opset, "main", tmp_path)


TILED_WORDS = ("grid", "grid of one zero point", "scaled codebook", "codebook per tile")


def tiled(word: str, bits: int, shape: tuple[int, ...], tile: tuple[int, ...], dtype: np.dtype[Any] = DTYPES[2]) -> Coding:
    """Returns a coding of tiles; each is filled by itself."""
    rng = np.random.default_rng(bits)
    corners = list(product(*(range(0, size, part) for size, part in zip(shape, tile, strict=True))))
    codes = rng.integers(0, 2**bits, shape).astype(np.uint8)
    scale = rng.uniform(-2, 2, len(corners)).astype(np.float16).astype(np.float32)
    zero_point = rng.integers(0, 2**bits, len(corners)).astype(np.float32)
    book = rng.standard_normal(2**bits).astype(np.float16)
    books = rng.standard_normal((len(corners), 2**bits)).astype(dtype)
    dense = np.empty(shape, dtype)
    for number, corner in enumerate(corners):
        box = tuple(slice(start, start + part) for start, part in zip(corner, tile, strict=True))
        dense[box] = {
            "grid": (codes[box].astype(np.float32) - zero_point[number]) * scale[number],
            "grid of one zero point": (codes[box].astype(np.float32) - zero_point[0]) * scale[number],
            "scaled codebook": book.astype(np.float32)[codes[box]] * scale[number],
            "codebook per tile": books[number][codes[box]],
        }[word].astype(dtype)
    values: dict[str, Codebook | UniformGrid] = {
        "grid": UniformGrid(scale, zero_point, tile),
        "grid of one zero point": UniformGrid(scale, zero_point[:1], tile),
        "scaled codebook": Codebook(book, tile, scale),
        "codebook per tile": Codebook(books, tile),
    }
    return Coding(codes, values[word], dense)


TILINGS = [
    ((6, 8), (1, 4)),
    ((6, 8), (2, 8)),
    ((7, 9), (3, 4)),  # neither comes out even
    ((9, 7), (4, 1)),
    ((6, 8, 3, 2), (1, 5, 3, 2)),  # a Conv in blocks of channels
    ((2, 9, 4), (2, 4, 2)),  # several matrices
]


@pytest.mark.parametrize(("shape", "tile"), TILINGS)
@pytest.mark.parametrize("word", TILED_WORDS)
def test_tiles_share_what_stands_for_them(word: str, shape: tuple[int, ...], tile: tuple[int, ...], tmp_path: Path) -> None:
    for bits in (2, 5, 8):
        assert_exact(tiled(word, bits, shape, tile), bits, 17, "main", tmp_path)


@pytest.mark.parametrize("opset", OPSETS)
def test_tiles_at_every_opset_and_place(opset: int, tmp_path: Path) -> None:
    for index, word in enumerate(TILED_WORDS):
        for place in ("main", "branch", "loop", "function"):
            if place != "function" or opset >= 9:
                assert_exact(tiled(word, 3 + index, (7, 9), (3, 4)), 3 + index, opset, place, tmp_path)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_tiles_of_every_float_type(dtype: np.dtype[Any], tmp_path: Path) -> None:
    for word in TILED_WORDS:
        for opset in (7, 13, 21) if dtype != BFLOAT16 else (13, 21):
            assert_exact(tiled(word, 4, (7, 9), (3, 4), dtype), 4, opset, "main", tmp_path)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    word=st.sampled_from(TILED_WORDS),
    bits=st.integers(1, 8),
    sides=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 14)), min_size=2, max_size=4),
)
def test_tiles_of_any_size(word: str, bits: int, sides: list[tuple[int, int]], tmp_path: Path) -> None:
    shape = tuple(size for size, _ in sides)
    assert_exact(tiled(word, bits, shape, tuple(min(pair) for pair in sides)), bits, 13, "main", tmp_path)


def test_more_tiles_than_a_byte_counts(tmp_path: Path) -> None:
    assert_exact(tiled("scaled codebook", 4, (2, 700), (1, 2)), 4, 17, "main", tmp_path)


def test_scales_of_tiles_take_two_bytes_and_their_places_one(tmp_path: Path) -> None:
    made = tiled("grid of one zero point", 4, (100, 402), (1, 32))
    graph = load(dense_model(made.dense, 17, "main"))
    counted = encode(graph, made, 4)
    assert 0 < counted - made.codes.size // 2 - 2 * 100 * 13 - 402 < 700


@pytest.mark.parametrize("word", ["codebook", "codebook per channel", "grid per channel"])
def test_rows_looked_up_in_a_decoded_weight_are_its_readers(word: str) -> None:
    """Numbers of tiles are looked up by constants too; but those have an axis for each of the weight's."""
    made = coding(word, 4, (3, 5, 7))
    node = helper.make_node("Gather", ["w", "ids"], ["y"])
    ids = value("ids", np.array([0, 2], np.int64))
    model = make_model([node], [], [tensor("y", [2, 5, 7])], [value("w", made.dense), ids], opset=17)
    graph = load(model)
    encode(graph, made, 4)
    assert [found.output.name for found in coded_weights(graph)] == ["w"]


def test_the_first_opset_is_the_first_that_is_tested() -> None:
    assert min(OPSETS) == FIRST_OPSET


@pytest.mark.parametrize("place", ["main", "branch", "loop", "function"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_weight_may_be_kept_in_half(dtype: str, place: str, tmp_path: Path) -> None:
    dense = np.random.default_rng(0).standard_normal((3, 5, 7)).astype(np.float16).astype(dtype)
    for opset in OPSETS:
        if place == "function" and opset < 9:
            continue
        graph = load(dense_model(dense, opset, place))
        scope, constant = weight_in(graph)
        replace_constant(scope, constant, half_weight(constant, scope, NameSource(graph)))
        model = to_model(graph)
        onnx.checker.check_model(model, full_check=True)
        output, nodes = outputs_of(model, dense, tmp_path)
        assert output == np.concatenate([np.ones((1, 5, 7), dtype), dense]).tobytes()
        assert "Cast" not in {node.op_type for node in nodes}
        assert model_bytes(graph) < model_bytes(load(dense_model(dense, opset, place))) - dense.nbytes // 2 + 100
        assert coded_weights(graph) == []
        assert [found.output.name for found in expand_coded(graph)] == ["w"]
        assert weight_in(graph)[1].values.tobytes() == dense.tobytes()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("word", WORDS)
def test_codes_of_b_bits_take_b_bits(word: str, bits: int, tmp_path: Path) -> None:
    made = coding(word, bits, (100, 401))
    graph = load(dense_model(made.dense, 17, "main"))
    dense_bytes = save(graph, tmp_path / "dense.onnx")
    counted = encode(graph, made, bits)
    saved_bytes = save(graph, tmp_path / "coded.onnx")
    channels, length = made.codes.shape[0], 2**bits
    tables = {
        "codebook": 4 * length,
        "codebook per channel": 4 * length * channels + 4 * channels,  # with 4 bytes for the place of each
        "scaled codebook": 2 * length + 4 * channels,
        "grid": 4 + 1,
        "grid per channel": (4 + 1) * channels,
    }
    overhead = counted - math.ceil(made.codes.size * bits / 8) - tables[word]
    assert 0 < overhead < 1200, "what is not codes or tables: nodes, names, shapes"
    assert dense_bytes - saved_bytes == pytest.approx(made.dense.nbytes - counted, abs=60)


def test_the_same_codes_give_the_same_bytes() -> None:
    made = coding("codebook per channel", 5, (3, 5, 7))
    models = []
    for _ in range(2):
        graph = load(dense_model(made.dense, 17, "main"))
        encode(graph, made, 5)
        models.append(to_model(graph).SerializeToString())
    assert models[0] == models[1]


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from _all_nodes(attribute.g)
