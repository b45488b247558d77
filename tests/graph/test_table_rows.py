"""Which inputs only choose rows: every way to read one, against what the ONNX operator specification says of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, parser

from onnxshrink.graph.files import load
from onnxshrink.graph.table_rows import table_rows
from tests import oracle

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
