"""A weight stored as DequantizeLinear makes it, against what ONNX Runtime makes of it: every bit that a node reads stays."""

from __future__ import annotations

from typing import Any

import ml_dtypes  # names its types to numpy
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, parser
from onnx.reference import ReferenceEvaluator

from onnxshrink.errors import PassError
from onnxshrink.graph.dequantized import is_dequantized, obstacle, store_dequantized
from onnxshrink.graph.exporter import to_model
from onnxshrink.graph.files import load
from onnxshrink.graph.ir import Graph
from onnxshrink.graph.weights import Weight, weights
from tests.oracle import differences, make_model, random_feeds, run, same_bits, session, tensor, value

Array = np.ndarray[Any, Any]
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
CASTS = {"Cast float16": "float16", "Cast float32": "float32", "Cast int8": "int8"}
HEAD = '<ir_version: 10, opset_import: ["": 21]> '


def integers(kind: str, *shape: int) -> Array:
    limits = ml_dtypes.iinfo(np.dtype(kind))  # type: ignore[no-untyped-call]
    drawn = np.random.default_rng(shape).integers(int(limits.min), int(limits.max), shape, endpoint=True)
    return np.asarray(drawn).astype(kind)


def scales(kind: str, *shape: int) -> Array:
    return np.asarray(np.random.default_rng(shape).random(shape) / 50 + 0.001).astype(kind)


def described(model: onnx.ModelProto) -> onnx.ModelProto:
    """Returns the model with the types of all its tensors, which must be right afterwards as well."""
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def chain(steps: list[str], arrays: dict[str, Array], result: str = "float32", opset: int = 21, **attributes: Any) -> onnx.ModelProto:
    """Returns a model that puts out rows of what nodes make of ``w``, one after the other; a DequantizeLinear reads all arrays."""
    nodes, at = [], "w"
    for index, step in enumerate(steps):
        op = step.split()[0]
        inputs = [at, *list(arrays)[1:]] if op == "DequantizeLinear" else [at]
        given = attributes if op == "DequantizeLinear" else {}
        if step in CASTS:
            given = {"to": helper.np_dtype_to_tensor_dtype(np.dtype(CASTS[step]))}
        nodes.append(helper.make_node(op, inputs, [at := f"t{index}"], **given))
    nodes.append(helper.make_node("Gather", [at, "rows"], ["y"]))
    stored = [value(name, array) for name, array in arrays.items()]
    fed, put_out = [tensor("rows", ["n"], TensorProto.INT64)], [tensor("y", None, TYPES[result])]
    return described(make_model(nodes, fed, put_out, stored, opset=opset, ir_version=11 if opset > 21 else 10))


def with_arrays(text: str, **arrays: Any) -> onnx.ModelProto:
    model = parser.parse_model(HEAD + text)
    model.graph.initializer.extend(value(name, array) for name, array in arrays.items())
    return described(model)


def named(graph: Graph, *names: str) -> list[Weight]:
    return [weight for weight in weights(graph) if weight.constant.name in names]


def stored(model: onnx.ModelProto, *names: str) -> onnx.ModelProto:
    """Returns the model with weights stored, checked."""
    graph = load(model)
    found = named(graph, *names)
    assert [weight.constant.name for weight in found] == list(names)
    assert all(is_dequantized(weight) and obstacle(graph, weight) is None for weight in found)
    store_dequantized(graph, found)
    after = named(graph, *names)
    assert [(weight.site, weight.constant.shape) for weight in after] == [(weight.site, weight.constant.shape) for weight in found]
    assert not any(map(is_dequantized, after))
    made = to_model(graph)
    onnx.checker.check_model(made, full_check=True)
    return made


def check(model: onnx.ModelProto, *names: str, **feeds: Array) -> onnx.ModelProto:
    """Returns the model with weights stored, in which ONNX Runtime must compute the same bits."""
    made = stored(model, *names)
    before, after = session(model, optimise=False), session(made, optimise=False)
    feeds = {**random_feeds(before), **feeds}
    for left, right in zip(run(after, feeds), run(before, feeds), strict=True):
        assert same_bits(left, right)
    return made


def initializers(model: onnx.ModelProto) -> dict[str, Array]:
    return {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}


def ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


KINDS = {13: ["int8", "uint8", "int32"], 19: ["int8", "uint8", "int32"], 21: ["int8", "uint8", "int16", "uint16", "int4", "uint4", "int32"]}
MOVES = [[], ["Transpose"], ["Identity", "Transpose"]]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_what_nodes_read_stays_the_same_to_the_bit(data: st.DataObject) -> None:
    opset = data.draw(st.sampled_from(list(KINDS)))
    kind = data.draw(st.sampled_from(KINDS[opset]))
    scale = data.draw(st.sampled_from(["float32", "float16"] if opset > 13 else ["float32"]))
    how = data.draw(st.sampled_from(["tensor", "one element", "axis", "blocks"] if opset > 19 else ["tensor", "one element", "axis"]))
    before = data.draw(st.sampled_from(MOVES[: 2 if "int4" in kind else 3]))  # ONNX Runtime 1.31 has no Identity of int4
    after = data.draw(st.sampled_from([*MOVES, ["Cast float16"], ["Transpose", "Cast float32"]]))
    axis, block = data.draw(st.sampled_from([0, 1, -1, -2])), data.draw(st.integers(1, 8))
    shape = (7, 5) if "Transpose" in before else (5, 7)
    blocks = tuple(-(-size // block) if index == axis % 2 else size for index, size in enumerate(shape))
    places: tuple[int, ...] = {"tensor": (), "one element": (1,), "axis": (shape[axis],), "blocks": blocks}[how]
    attributes = {"axis": {"axis": axis}, "blocks": {"axis": axis, "block_size": block}}.get(how, {})
    arrays = {"w": integers(kind, 5, 7), "s": scales(scale, *places)}
    if kind != "int32" and data.draw(st.booleans()):
        arrays["z"] = integers(kind, *places)
    result = CASTS.get(after[-1], scale) if after else scale
    model = chain([*before, "DequantizeLinear", *after], arrays, result, opset, **attributes)
    made = check(model, "w", rows=np.arange(shape[1] if "Transpose" in after else shape[0]))
    assert ops(made) == [*before, *(step.split()[0] for step in after), "Gather"]
    assert {name: array.dtype for name, array in initializers(made).items()} == {"w": scale}


@pytest.mark.parametrize("scale", ["float32", "float16"])
@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"])
def test_of_eight_bits_that_are_floats(kind: str, scale: str) -> None:
    w = np.random.default_rng(0).standard_normal((5, 7)).astype(kind)
    for arrays in ({"w": w, "s": scales(scale, 5)}, {"w": w, "s": scales(scale), "z": np.zeros((), kind)}):
        check(chain(["DequantizeLinear"], arrays, scale, axis=0), "w", rows=np.arange(5))


@pytest.mark.parametrize(("kind", "opset"), [("int2", 25), ("uint2", 25), ("int4", 21), ("uint4", 21)])
def test_of_less_than_a_byte(kind: str, opset: int) -> None:
    arrays = {"w": integers(kind, 3, 3), "s": scales("float32", 3, 2), "z": integers(kind, 3, 2)}
    check(chain(["DequantizeLinear"], arrays, opset=opset, block_size=2), "w", rows=np.arange(3))


@pytest.mark.parametrize(("scale", "output"), [("float32", "float16"), ("float16", "float32"), ("float32", "float32")])
def test_an_output_dtype(scale: str, output: str) -> None:
    arrays = {"w": integers("int16", 64, 64), "s": scales(scale)}
    made = check(chain(["DequantizeLinear"], arrays, output, 23, output_dtype=TYPES[output]), "w", rows=np.arange(64))
    assert initializers(made)["w"].dtype == output


@pytest.mark.parametrize("scale", ["float32", "float16"])
def test_numbers_that_a_float_has_no_room_for_are_rounded_as_often(scale: str) -> None:
    for arrays in (
        {"w": integers("int16", 64, 64), "s": scales(scale), "z": np.array(-32768, np.int16)},
        {"w": integers("int32", 64, 64), "s": np.array(1.1e-3, scale)},
        {"w": integers("int32", 64, 64) // 2, "s": np.array(1.1e-3, scale), "z": np.array(5, np.int32)},
        {"w": integers("int32", 64, 64), "s": np.array(3e4, scale)},  # of float16, mostly infinite
    ):
        check(chain(["DequantizeLinear"], arrays, scale), "w", rows=np.arange(64))


@pytest.mark.parametrize(
    ("kind", "scale", "output"),
    [("int8", "bfloat16", "bfloat16"), ("float4_e2m1fn", "float32", "float32"), ("int8", "float8_e8m0fnu", "float32")],
)
def test_types_that_onnx_runtime_lacks_are_as_the_reference_has_them(kind: str, scale: str, output: str) -> None:
    w = np.random.default_rng(0).standard_normal((5, 7)) * 3
    arrays = {"w": w.astype(kind), "s": np.array(0.25 if "e8" in scale else 0.3, scale)}
    model = chain(["DequantizeLinear"], arrays, output, 25, output_dtype=TYPES[output])
    (expected,) = ReferenceEvaluator(model).run(None, {"rows": np.arange(5)})
    assert same_bits(initializers(stored(model, "w"))["w"], expected)


def test_a_cast_before_goes_too() -> None:
    arrays = {"w": integers("int4", 5, 7), "s": scales("float32", 5), "z": integers("int8", 5)}
    made = check(chain(["Transpose", "Cast int8", "DequantizeLinear"], arrays, axis=1), "w", rows=np.arange(7))
    assert ops(made) == ["Transpose", "Gather"]


def test_reshaped_on_the_way() -> None:
    text = """g (float[2, 12] x) => (float[2, 5] y) {
        a = Transpose(w) b = Reshape(a, folded) c = DequantizeLinear <axis = 0> (b, s, z) d = Reshape(c, flat) y = MatMul(x, d)
    }"""
    arrays = {"w": integers("int8", 5, 12), "folded": np.array([4, 3, 5]), "flat": np.array([12, 5]), "z": integers("int8", 4)}
    made = check(with_arrays(text, **arrays, s=np.array([0.5, 1, 2, 4], np.float32)), "w", x=np.ones((2, 12), np.float32))
    assert ops(made) == ["Transpose", "Reshape", "Reshape", "MatMul"]


TIES = {
    "one node": "d = DequantizeLinear(w, s) a = Gather(d, i) b = Add(x, d)",
    "two alike": "d = DequantizeLinear(w, s) e = DequantizeLinear(w, s) a = Gather(d, i) b = Add(x, e)",
    "two of equal scales": "d = DequantizeLinear(w, s) e = DequantizeLinear <axis = 0> (w, same) a = Gather(d, i) b = Add(x, e)",
    "one moved before": "d = DequantizeLinear(w, s) t = Transpose(w) u = DequantizeLinear(t, s) e = Transpose(u) a = Gather(d, i) b = Add(x, e)",
    "one cast after": "d = DequantizeLinear(w, s) h = Cast <to = 10> (d) e = Cast <to = 1> (h) a = Gather(d, i) b = Add(x, e)",
    "its shape is read": "d = DequantizeLinear(w, s) k = Shape(w) e = Reshape(x, k) a = Gather(d, i) b = Add(e, d)",
    "read in a body": "d = DequantizeLinear(w, s) a = Gather(d, i) b = If(c) <then_branch = t () => (float[4, 4] p) { p = Add(x, x) }, else_branch = f () => (float[4, 4] q) { k = Shape(d) q = Reshape(x, k) }>",
}


@pytest.mark.parametrize("body", TIES.values(), ids=TIES)
def test_a_weight_of_several_nodes(body: str) -> None:
    model = with_arrays(
        f"g (int64[n] i, float[4, 4] x, bool c) => (float[n, 4] a, float[4, 4] b) {{ {body} }}",
        w=integers("int8", 4, 4),
        s=np.array(0.3, np.float32),
        same=np.array([0.3], np.float32),
    )
    made = check(model, "w", i=np.arange(4), c=np.array(False))
    assert "DequantizeLinear" not in ops(made)
    assert "s" not in initializers(made)


def test_layers_compute_the_same() -> None:
    text = """g (float[1, 3, 8, 8] x) => (float[1, 4, 5] y) {
        k = DequantizeLinear <axis = 0> (kernel, s) b = DequantizeLinear(bias, t) h = Conv(x, k, b)
        f = Reshape(h, flat) m = DequantizeLinear <axis = 0, block_size = 9> (w, u, z) y = MatMul(f, m)
    }"""
    arrays = {"kernel": integers("int8", 4, 3, 3, 3), "bias": integers("int32", 4) // 2**20, "w": integers("uint4", 36, 5), "z": integers("uint4", 4, 5), "flat": np.array([1, 4, 36])}
    arrays |= {"s": np.array([0.5, 1, 2, 4], np.float32), "t": np.array(0.5, np.float32), "u": np.exp2(integers("int4", 4, 5).astype(np.float32) // 4)}
    model = with_arrays(text, **arrays)
    x = np.arange(3 * 64, dtype=np.float32).reshape(1, 3, 8, 8) % 3  # all sums are exact, in whatever order
    made = check(model, "kernel", "bias", "w", x=x)
    assert ops(made) == ["Conv", "Reshape", "MatMul"]
    assert sorted(initializers(made)) == ["bias", "flat", "kernel", "w"]
    only = check(model, "w", x=x)
    assert ops(only) == ["DequantizeLinear", "DequantizeLinear", "Conv", "Reshape", "MatMul"]
    kept = {name: array for name, array in initializers(model).items() if name not in ("w", "u", "z")}
    for name, array in kept.items():
        assert same_bits(initializers(only)[name], array)
    assert sorted(initializers(only)) == sorted([*kept, "w"])


def test_what_others_read_stays_and_what_nobody_read_before() -> None:
    text = """g (int64[n] i) => (float[n, 4] a, float[n, 4] b) {
        d = DequantizeLinear(w, s, z) e = DequantizeLinear(v, s, z) a = Gather(d, i) b = Gather(e, i) unused = Exp(e)
    }"""
    arrays = {"w": integers("int8", 4, 4), "v": integers("int8", 3, 4), "s": scales("float32", 4), "z": integers("int8", 4), "spare": scales("float32", 3)}
    made = check(with_arrays(text, **arrays), "w", i=np.arange(3))
    assert ops(made) == ["DequantizeLinear", "Gather", "Gather", "Exp"]
    assert sorted(initializers(made)) == ["s", "spare", "v", "w", "z"]
    assert all(same_bits(initializers(made)[name], array) for name, array in arrays.items() if name != "w")


def test_a_constant_node_stays_one() -> None:
    text = "g (int64[n] i) => (float[n, 2] y) { w = Constant <value = int8[2, 2] {1, 2, 3, 4}> () d = DequantizeLinear(w, s) y = Gather(d, i) }"
    made = check(with_arrays(text, s=np.array(0.5, np.float32)), "w", i=np.arange(2))
    assert ops(made) == ["Constant", "Gather"]
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(made.graph.node[0].attribute[0].t), [[0.5, 1], [1.5, 2]])


@pytest.mark.parametrize("ir_version", [3, 8])
def test_listed_as_inputs(ir_version: int) -> None:
    model = with_arrays("g (int64[n] i) => (float[n, 4] y) { d = DequantizeLinear(w, s) y = Gather(d, i) }", w=integers("int8", 4, 4), s=scales("float32"))
    model.graph.input.extend([tensor("w", [4, 4], TensorProto.INT8), tensor("s", [])])
    model.ir_version, model.opset_import[0].version = ir_version, 13
    graph = load(model)
    store_dequantized(graph, named(graph, "w"))
    made = to_model(graph)
    listed = {item.name: item.type.tensor_type.elem_type for item in made.graph.input}
    assert listed == {"i": TensorProto.INT64} | ({"w": TensorProto.FLOAT} if ir_version < 4 and made.ir_version < 4 else {})
    i = np.arange(4)
    assert same_bits(run(session(made, optimise=False), {"i": i}), run(session(model, optimise=False), {"i": i}))


def test_others_are_left_as_they_are() -> None:
    text = "g (int64[n] i) => (float[n, 4] a, float[n, 4] b) { d = DequantizeLinear(w, s) a = Gather(d, i) b = Gather(f, i) }"
    model = with_arrays(text, w=integers("int8", 4, 4), f=scales("float32", 4, 4), s=scales("float32", 4))
    graph = load(model)
    found = weights(graph)
    assert [is_dequantized(weight) for weight in found] == [True, False, False]
    store_dequantized(graph, [weight for weight in found if weight.constant.name != "w"])
    assert differences(to_model(graph), model) == []
    store_dequantized(graph, [*found, *weights(graph)])  # named twice, it is stored once
    assert [weight.constant.name for weight in weights(graph)] == ["w", "f"]


BODY = "b = If(c) <then_branch = t () => (float[n, 4] p) { %s }, else_branch = f () => (float[n, 4] q) { q = Gather(v, i) }>"
REFUSED = {
    "another scale": ("d = DequantizeLinear(w, s) e = DequantizeLinear(w, other) a = Gather(d, i) b = Gather(e, i)", "nodes that share it read it in different types or scales"),
    "as it is": ("d = DequantizeLinear(w, s) a = Gather(d, i) e = Gather(w, i) b = Cast <to = 1> (e)", "nodes that share it read it in different types or scales"),
    "cast": ("d = DequantizeLinear(w, s) a = Gather(d, i) e = Cast <to = 1> (w) b = Gather(e, i)", "nodes that share it read it in different types or scales"),
    "other rows": ("d = DequantizeLinear <axis = 0> (w, each) t = Transpose(w) e = DequantizeLinear <axis = 0> (t, each) a = Gather(d, i) b = Gather(e, i)", "nodes that share it read it in different types or scales"),
    "another scale, unread": ("d = DequantizeLinear(w, s) dead = DequantizeLinear(w, other) a = Gather(d, i) b = Gather(v, i)", "DequantizeLinear 'dead' reads it as well, and nothing reads that"),
    "moved, unread": ("d = DequantizeLinear(w, s) dead = Transpose(w) a = Gather(d, i) b = Gather(v, i)", "Transpose 'dead' reads it as well, and nothing reads that"),
    "moved, then unread": ("d = DequantizeLinear(w, s) t = Transpose(w) e = DequantizeLinear(t, s) dead = Cast <to = 1> (t) a = Gather(d, i) b = Gather(e, i)", "Cast 'dead' reads it as well, and nothing reads that"),
    "computed scale": ("u = Add(s, x) d = DequantizeLinear(w, u) a = Gather(d, i) b = Gather(v, i)", "the scale of DequantizeLinear 'd' is computed"),
    "output": ("b = DequantizeLinear(w, s) a = Gather(b, i)", "is a graph output"),
    "unknown": ("d = DequantizeLinear(w, s) e = Concat <axis = 0> (d, v) a = Gather(e, i) b = Gather(v, i)", "rearranged in an unknown way by Concat 'e'"),
    "in a body": ("d = DequantizeLinear(w, s) a = Gather(d, i) " + BODY % "p = Gather(d, i)", "Gather 'p' reads it inside of a body or a function"),
    "dequantized in a body": ("a = Gather(v, i) " + BODY % "d = DequantizeLinear(w, s) p = Gather(d, i)", "Gather 'p' reads it inside of a body or a function"),
    "stored in a body": ("a = Gather(v, i) " + BODY % "w = Constant <value = int8[2, 4] {1, 2, 3, 4, 5, 6, 7, 8}> () d = DequantizeLinear(w, s) p = Gather(d, i)", "it is stored in a body or a function"),
}


@pytest.mark.parametrize(("body", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused_and_nothing_is_changed(body: str, reason: str) -> None:
    arrays = {"w": integers("int8", 4, 4), "s": np.array(0.5, np.float32), "v": scales("float32", 4, 4), "other": np.array(0.25, np.float32)}
    arrays |= {"each": scales("float32", 4), "good": integers("int8", 4, 4)}
    if "w = Constant" in body:
        del arrays["w"]
    text = "g (int64[n] i, float x, bool c) => (float[n, 4] a, float[k, 4] b, float[n, 4] y) { fine = DequantizeLinear(good, s) y = Gather(fine, i) "
    model = with_arrays(text + body + "}", **arrays)
    graph = load(model)
    before = to_model(graph)
    (weight,) = named(graph, "w")
    assert obstacle(graph, weight) == reason
    with pytest.raises(PassError, match="cannot be stored as what DequantizeLinear makes of it: " + reason):
        store_dequantized(graph, named(graph, "good", "w"))
    assert differences(to_model(graph), before) == []


def test_a_weight_without_scales_has_nothing_to_be_stored_as() -> None:
    model = with_arrays("g (int64[n] i) => (float[n, 4] y) { y = Gather(w, i) }", w=scales("float32", 4, 4))
    graph = load(model)
    assert obstacle(graph, *weights(graph)) == "no node reads it through DequantizeLinear"
