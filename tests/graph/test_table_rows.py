"""Which inputs only choose rows: every way to read one, against what the ONNX operator specification says of it; and of which values."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, parser

from onnxshrink.graph.files import load
from onnxshrink.graph.table_rows import Table, table_rows, tables
from tests import oracle

Array = np.ndarray[Any, np.dtype[Any]]
HEAD = '<ir_version: 8, opset_import: ["": {}]> '
CONSTANTS = {
    "table": np.zeros((9, 4), np.float32),
    "short": np.zeros((5, 2), np.float32),
    "one": np.zeros((1, 4), np.float32),
    "none": np.zeros((0, 4), np.float32),
    "wide": np.zeros((2, 7, 3), np.float32),
    "codes": np.zeros((6, 4), np.uint8),
    "scale": np.float32(0.1),
    "depth": np.int64(8),
    "depths": np.array([3]),
    "onoff": np.array([0, 1], np.float32),
    "flat": np.array([-1]),
    "first": np.array([0]),
    "two": np.array([2, 3]),
    "three": np.array(3, np.int64),
    "rows3": np.array([0, 0, 1, 0]),
    "few": np.array([[1, 2, 3]]),
}


def rows(text: str, kind: str = "int64[2, 3]", opset: int = 17, outputs: str = "float[M, N] y", inputs: str = "") -> dict[str, int]:
    """Returns what is found of a body of nodes that reads ``ids`` and any of the constants."""
    heading = HEAD.format(opset) + f"g ({kind} ids{inputs}) => ({outputs})"
    model = parser.parse_model(heading + " { " + text + " }")
    model.graph.initializer.extend(oracle.value(name, array) for name, array in CONSTANTS.items())
    return table_rows(load(model))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("y = Gather(table, ids)", 9),
        ("y = Gather<axis = 0>(wide, ids)", 2),
        ("y = Gather<axis = 1>(wide, ids)", 7),
        ("y = Gather<axis = 2>(wide, ids)", 3),
        ("y = Gather<axis = -1>(wide, ids)", 3),
        ("y = Gather<axis = -2>(wide, ids)", 7),
        ("y = Gather<axis = -3>(wide, ids)", 2),
        ("y = Gather(codes, ids)", 6),
        ("y = OneHot(ids, depth, onoff)", 8),
        ("y = OneHot<axis = 0>(ids, depths, onoff)", 3),
        ("y = Gather(table, ids) z = Gather(short, ids) w = Gather(wide, ids)", 2),
        ("y = Gather(short, ids) z = OneHot(ids, depth, onoff)", 5),
        ("y = Gather(table, ids) s = Shape(ids) n = Size(ids)", 9),
    ],
)
def test_of_tables_are_those_along_the_axis_and_the_fewest(text: str, expected: int) -> None:
    assert rows(text) == {"ids": expected}


@pytest.mark.parametrize("kind", ["int32", "int64", "uint8", "int8", "uint16", "int16", "uint64"])
@pytest.mark.parametrize("shape", ["", "[3]", "[N, M]"])
def test_inputs_of_every_integer_type_and_rank(kind: str, shape: str) -> None:
    assert rows("i = Cast<to = 7>(ids) y = Gather(table, i)", f"{kind}{shape}") == {"ids": 9}


@pytest.mark.parametrize("kind", ["float[2, 3]", "bool[2, 3]", "double[2, 3]", "string[2, 3]"])
def test_inputs_of_other_types_choose_nothing(kind: str) -> None:
    assert rows("i = Cast<to = 7>(ids) y = Gather(table, i)", kind) == {}


@pytest.mark.parametrize(
    "move",
    [
        "i = Identity(ids)",
        "i = Cast<to = 6>(ids)",
        "i = Reshape(ids, flat)",
        "i = Unsqueeze(ids, first)",
        "i = Squeeze(ids, first)",
        "i = Transpose(ids)",
        "i = Flatten(ids)",
        "i = Expand(ids, two)",
        "i = Tile(ids, two)",
        "i = Slice(ids, first, depths)",
        "i = Pad(ids, rows3)",
        "i = Concat<axis = 0>(ids, few)",
        "i = Concat<axis = 0>(few, ids)",
        "i = Concat<axis = 0>(ids, ids)",
        "i, j = Split(ids)",
        "j, i = Split(ids)",
        "a = Identity(ids) b = Unsqueeze(a, first) c = Cast<to = 6>(b) i = Reshape(c, flat)",
        "a = Cast<to = 1>(ids) i = Cast<to = 7>(a)",
    ],
)
def test_what_only_moves_stands_between(move: str) -> None:
    assert rows(f"{move} y = Gather(table, i)") == {"ids": 9}


@pytest.mark.parametrize("opset", [11, 12, 13, 18, 21])
def test_in_every_version_of_the_operators(opset: int) -> None:
    """Unsqueeze and Squeeze have their axes in an attribute before opset 13, and Split has its number of outputs since 18."""
    wide, narrow = ("Unsqueeze<axes = [0]>(ids)", "Squeeze<axes = [0]>(u)") if opset < 13 else ("Unsqueeze(ids, first)", "Squeeze(u, first)")
    assert rows(f"u = {wide} i = {narrow} y = Gather(table, i)", opset=opset) == {"ids": 9}
    assert rows(f"u = {wide} i = {narrow} y = OneHot(i, depth, onoff)", opset=opset) == {"ids": 8}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("t = DequantizeLinear(codes, scale) y = Gather(t, ids)", 6),
        ("t = Cast<to = 1>(codes) y = Gather(t, ids)", 6),
        ("t = Identity(table) y = Gather(t, ids)", 9),
        ("t = Transpose(table) y = Gather(t, ids)", 4),
        ("t = Transpose(table) y = Gather<axis = 1>(t, ids)", 9),
        ("t = Reshape(table, flat) y = Gather(t, ids)", 36),
        ("a = Cast<to = 10>(table) b = Cast<to = 1>(a) y = Gather(b, ids)", 9),
    ],
)
def test_tables_may_be_made_of_constants(text: str, expected: int) -> None:
    assert rows(text) == {"ids": expected}


@pytest.mark.parametrize(
    "text",
    [
        "e = Equal(ids, three) y = Gather(table, ids)",
        "i = Add(ids, three) y = Gather(table, i)",
        "i = Mul(ids, three) y = Gather(table, ids) z = Neg(i)",
        "g = Gather(table, ids) f = Cast<to = 1>(ids) y = Mul(f, scale)",
        "i = Clip(ids) y = Gather(table, i)",
        "g = Gather(table, ids) y = ReduceMax(ids)",
        "g = Gather(table, ids) r = Reshape(ids, flat) y = ConstantOfShape(r)",
        "y = Gather(ids, first)",
        "g = Gather(table, ids) y = Gather(ids, first)",
        "y = Gather(ids, ids)",
        "y = GatherElements(table, ids)",
        "g = Gather(table, ids) y = GatherElements(table, ids)",
        "y = GatherND(table, ids)",
        "g = Gather(table, ids) r = Reshape(ids, flat) y = Reshape(table, r)",
        "g = Gather(table, ids) r = Reshape(ids, flat) y = Expand(table, r)",
        "g = Gather(table, ids) r = Reshape(ids, flat) y = OneHot(first, r, onoff)",
        "g = Gather(table, ids) y = OneHot(first, depth, ids)",
        "g = Gather(table, ids) c = Concat<axis = 0>(ids, few) y = ReduceSum(c)",
        "g = Gather(table, ids) i, j = Split(ids) y = Neg(j)",
        "g = Gather(table, ids) y = NonZero(ids)",
        "i = Cast<to = 9>(ids) j = Cast<to = 7>(i) y = Gather(table, j)",
        "i = Cast<to = 3>(ids) j = Cast<to = 7>(i) y = Gather(table, j)",
        "i = Cast<to = 10>(ids) j = Cast<to = 7>(i) y = Gather(table, j)",
        "s = Shape(ids) y = Cast<to = 1>(s)",
        "s = Shape(ids) i = Cast<to = 7>(ids) n = Size(i) y = Gather(table, s)",
        "t = Neg(table) y = Gather(t, ids)",
        "t = ConstantOfShape(two) y = Gather(t, ids)",
        "y = Gather(one, ids)",
        "y = Gather(none, ids)",
        "y = Gather(table, ids) z = Gather(one, ids)",
        "y = Neg(table)",
    ],
)
def test_what_is_read_otherwise_or_leaves_no_choice(text: str) -> None:
    assert rows(text) == {}


def test_quantized_numbers_are_no_numbers_of_rows() -> None:
    assert rows("f = DequantizeLinear(ids, scale) y = OneHot(f, depth, onoff)", "uint8[2, 3]") == {}


@pytest.mark.parametrize("echo", ["y = Gather(table, ids) z = Identity(ids)", "z = Reshape(ids, flat) y = Gather(table, z)"])
def test_what_is_put_out_is_read(echo: str) -> None:
    assert rows(echo, outputs="float[M, N] y, int64[K] z") == {}
    assert rows("y = Gather(table, ids)", outputs="float[M, N] y, int64[2, 3] ids") == {}


def test_tables_that_are_not_stored_count_for_nothing() -> None:
    assert rows("y = Gather(x, ids)", inputs=", float[9, 4] x") == {}
    assert rows("y = Gather(table, ids) z = Gather(x, ids)", inputs=", float[9, 4] x") == {}
    assert rows("y = OneHot(ids, d, onoff)", inputs=", int64 d") == {}
    assert rows("t = DequantizeLinear(codes, s) y = Gather(t, ids)", inputs=", float s") == {}
    assert rows("t = DequantizeLinear(codes, scale, z) y = Gather(t, ids)", inputs=", uint8 z") == {}
    assert rows("s = Neg(scale) t = DequantizeLinear(codes, s) y = Gather(t, ids)") == {}
    assert rows("y = Gather(table, ids) z = Gather(short, others)", inputs=", int32[5] others") == {"ids": 9, "others": 5}


@pytest.mark.parametrize(("ir_version", "expected"), [(3, {"ids": 9}), (8, {})])
def test_tables_that_callers_may_override_are_not_stored(ir_version: int, expected: dict[str, int]) -> None:
    """Below IR version 4 every initializer is listed as an input."""
    inputs = [oracle.tensor("ids", [3], TensorProto.INT64), oracle.tensor("table", [9, 4])]
    nodes, table = [helper.make_node("Gather", ["table", "ids"], ["y"])], [oracle.value("table", CONSTANTS["table"])]
    model = oracle.make_model(nodes, inputs, [oracle.tensor("y", [3, 4])], table, ir_version=ir_version, opset=9)
    assert table_rows(load(model)) == expected


def test_operators_of_others_are_unknown() -> None:
    def of(domain: str) -> dict[str, int]:
        nodes = [helper.make_node("Gather", ["table", "ids"], ["y"], domain=domain)]
        inputs, outputs = [oracle.tensor("ids", [3], TensorProto.INT64)], [oracle.tensor("y", [3, 4])]
        return table_rows(load(oracle.make_model(nodes, inputs, outputs, [oracle.value("table", CONSTANTS["table"])], opsets={"own": 1})))

    assert of("own") == {}
    assert of("") == {"ids": 9}


@pytest.mark.parametrize("read", ["Gather(table, ids)", "Gather(table, i)", "Gather(table, k)", "Cast<to = 1>(j)", "Cast<to = 1>(ids)"])
@pytest.mark.parametrize("nested", [False, True])
def test_what_a_body_reads_from_outside(read: str, nested: bool) -> None:
    """Directly, or what is made of it: never varied, whatever the body does with it."""
    inner = f"then_branch = t () => (float[A, B] p) {{ p = {read} }}, else_branch = e () => (float[A, B] q) {{ q = Identity(table) }}"
    if nested:
        inner = f"""then_branch = o () => (float[A, B] r) {{ r = If(flag) <{inner}> }},
            else_branch = u () => (float[A, B] s) {{ s = Identity(table) }}"""
    text = f"i = Identity(ids) j = Unsqueeze(i, first) k = Reshape(j, flat) y = If(flag) <{inner}> z = Gather<axis = 0>(table, ids)"
    assert rows(text, inputs=", bool flag") == {}
    harmless = text.replace(read, "Neg(table)")
    assert rows(harmless, inputs=", bool flag") == {"ids": 9}


def test_what_a_loop_is_given() -> None:
    body = "body = b (int64 n, bool c, int64[2, 3] v) => (bool o, int64[2, 3] w) { o = Identity(c) w = Identity(v) }"
    assert rows(f"g = Gather(table, ids) y = Loop(three, flag, ids) <{body}>", inputs=", bool flag") == {}
    assert rows(f"g = Gather(table, ids) y = Loop(three, flag, few) <{body}>", inputs=", bool flag") == {"ids": 9}


_MOVES = ("Identity({})", "Cast<to = 6>({})", "Reshape({}, flat)", "Concat<axis = 0>({0}, {0})", "Unsqueeze({}, first)")


@settings(max_examples=30, deadline=None)
@given(
    chain=st.lists(st.sampled_from(_MOVES), max_size=40),
    tables=st.lists(st.sampled_from(["table", "short", "wide", "codes"]), min_size=1, max_size=3),
    spoiled=st.booleans(),
    data=st.data(),
)
def test_however_many_nodes_stand_between(chain: Sequence[str], tables: Sequence[str], spoiled: bool, data: st.DataObject) -> None:
    """Found if and only if nothing along the way reads it otherwise; also where the ways fork and meet again 40 times."""
    text = " ".join(f"t{index + 1} = {move.format(f't{index}')}" for index, move in enumerate(chain))
    places = [data.draw(st.integers(0, len(chain))) for _ in tables]
    text = f"t0 = Identity(ids) {text} "
    text += " ".join(f"y{index or ''} = Gather({name}, t{at})" for index, (name, at) in enumerate(zip(tables, places, strict=True)))
    text += f" bad = Abs(t{data.draw(st.integers(0, len(chain)))})" if spoiled else ""
    assert rows(text) == ({} if spoiled else {"ids": min(len(CONSTANTS[name]) for name in tables)})


NORMAL = np.random.default_rng(0).standard_normal((4, 6, 5))
STORED: Mapping[str, Array] = {
    "table": NORMAL[0].astype(np.float32),
    "half": NORMAL[0].astype(np.float16),
    "line": NORMAL[0, 0].astype(np.float32),
    "wide": NORMAL.astype(np.float32),
    "codes": np.random.default_rng(1).integers(0, 256, (6, 4), np.uint8),
    "signed": np.random.default_rng(2).integers(-128, 128, (6, 4), np.int8),
    "huge": np.array([[1e30, -1e30], [1, 2]], np.float32),
    "scale": np.float32(0.013),
    "zero": np.uint8(131),
    "per_row": np.linspace(0.1, 0.9, 6, dtype=np.float32),
    "per_column": np.linspace(-0.1, 0.9, 4, dtype=np.float32),
    "blocks": np.linspace(0.1, 0.9, 12, dtype=np.float32).reshape(3, 4),
    "depth": np.int64(8),
    "depths": np.array([3]),
    "onoff": np.array([0, 1], np.float32),
    "two": np.array([3, 10]),
    "first": np.array([0]),
}


def looked_up(text: str, opset: int = 21) -> tuple[onnx.ModelProto, list[Table]]:
    """Returns a model that reads ``ids`` in some way, and the tables that are found of it."""
    model = parser.parse_model(HEAD.format(opset).replace("ir_version: 8", "ir_version: 10") + f"g (int64[N] ids) => (y) {{ {text} }}")
    model.graph.initializer.extend(oracle.value(name, array) for name, array in STORED.items() if name in text)
    return model, tables(load(model))["ids"]


@pytest.mark.parametrize(
    ("text", "axis"),
    [
        ("y = Gather(table, ids)", 0),
        ("y = Gather(line, ids)", 0),
        ("y = Gather<axis = 1>(table, ids)", 1),
        ("y = Gather<axis = -1>(table, ids)", 1),
        ("y = Gather(wide, ids)", 0),
        ("y = Gather<axis = 1>(wide, ids)", 1),
        ("y = Gather<axis = -2>(wide, ids)", 1),
        ("y = Gather<axis = -1>(wide, ids)", 2),
        ("y = Gather(half, ids)", 0),
        ("t = Cast<to = 1>(half) y = Gather(t, ids)", 0),
        ("t = Cast<to = 10>(table) u = Cast<to = 1>(t) y = Gather(u, ids)", 0),
        ("t = Cast<to = 10>(huge) y = Gather(t, ids)", 0),
        ("t = Transpose(table) y = Gather(t, ids)", 0),
        ("t = Transpose<perm = [2, 0, 1]>(wide) y = Gather<axis = -1>(t, ids)", 2),
        ("t = Reshape(table, two) y = Gather(t, ids)", 0),
        ("t = Transpose(table) u = Reshape(t, two) v = Cast<to = 11>(u) y = Gather<axis = -1>(v, ids)", 1),
        ("t = Unsqueeze(table, first) y = Gather<axis = 1>(t, ids)", 1),
        ("t = Flatten<axis = 2>(wide) y = Gather(t, ids)", 0),
        ("t = DequantizeLinear(codes, scale) y = Gather(t, ids)", 0),
        ("t = DequantizeLinear(codes, scale, zero) y = Gather<axis = 1>(t, ids)", 1),
        ("t = DequantizeLinear<axis = 0>(signed, per_row) y = Gather(t, ids)", 0),
        ("t = DequantizeLinear<axis = -1>(signed, per_column) u = Transpose(t) y = Gather(u, ids)", 0),
        ("u = Transpose(signed) t = DequantizeLinear(u, per_row) y = Gather<axis = -1>(t, ids)", 1),
        ("t = DequantizeLinear<axis = 0, block_size = 2>(codes, blocks) y = Gather(t, ids)", 0),
        ("y = OneHot(ids, depth, onoff)", 0),
        ("y = OneHot(ids, depths, onoff)", 0),
    ],
)
def test_values_are_what_onnx_runtime_gives_for_all_numbers(text: str, axis: int) -> None:
    model, (table,) = looked_up(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = table.values()
    (expected,) = oracle.run(oracle.session(model), {"ids": np.arange(table.rows)})
    np.testing.assert_array_equal(found, np.moveaxis(expected, axis, 0).reshape(table.rows, -1), strict=True)
    (behind,) = oracle.run(oracle.session(model), {"ids": np.arange(-table.rows, 0)})  # numbers from the end
    np.testing.assert_array_equal(behind, expected)


def test_an_input_has_a_table_for_each_node_that_reads_it() -> None:
    _, found = looked_up("a = Gather(table, ids) i = Identity(ids) b = Gather<axis = 2>(wide, i) y = OneHot(ids, depth, onoff)")
    assert sorted((table.node.op, table.rows, table.values().shape) for table in found) == [
        ("Gather", 5, (5, 24)),
        ("Gather", 6, (6, 5)),
        ("OneHot", 8, (8, 8)),
    ]


@settings(max_examples=30, deadline=None)
@given(columns=st.integers(1, 40), most=st.integers(1, 45), onehot=st.booleans())
def test_of_many_columns_some_are_taken_evenly(columns: int, most: int, onehot: bool) -> None:
    nodes = [helper.make_node("OneHot", ["ids", "depth", "onoff"], ["y"]) if onehot else helper.make_node("Gather", ["table", "ids"], ["y"])]
    values = {"table": np.eye(7, columns), "depth": np.int64(columns + 1), "onoff": np.array([0, 1], np.float32)}
    stored = [oracle.value(name, array) for name, array in values.items() if name in nodes[0].input]
    model = oracle.make_model(nodes, [oracle.tensor("ids", [3], TensorProto.INT64)], [oracle.tensor("y", None)], stored)
    (table,) = tables(load(model))["ids"]
    full, some = table.values(), table.values(most)
    assert some.shape == full.shape if full.shape[1] <= most else some.shape[1] <= most < 2 * some.shape[1] + 1
    assert any(np.array_equal(full[:, ::step], some) for step in range(1, full.shape[1] + 1))


def test_of_one_hot_of_many_rows_no_more_is_made_than_asked_for() -> None:
    """All of it would be 40 GB."""
    nodes = [helper.make_node("OneHot", ["ids", "depth", "onoff"], ["y"])]
    stored = [oracle.value("depth", np.int64(100_000)), oracle.value("onoff", np.array([0, 1], np.float32))]
    model = oracle.make_model(nodes, [oracle.tensor("ids", [3], TensorProto.INT64)], [oracle.tensor("y", None)], stored)
    (table,) = tables(load(model))["ids"]
    found = table.values(16)
    assert found.shape == (100_000, 16)
    assert (found.argmax(axis=0) == np.arange(16) * 6250).all()
    assert found.sum() == 16
