"""Cutting is right when ONNX Runtime computes the same: with all of the rank what it did, with less what the product of the pieces says."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx import parser

from onnxshrink.errors import PassError
from onnxshrink.graph.edit import NameSource
from onnxshrink.graph.exporter import to_model
from onnxshrink.graph.factor_forms import Form, Ranks
from onnxshrink.graph.factoring import forms, split
from onnxshrink.graph.files import load
from onnxshrink.graph.ir import Graph
from onnxshrink.graph.weights import weights
from tests.graph.factor_cases import LAYERS, Layer, random, recurrences
from tests.oracle import make_model, run, session, tensor, value

Array = np.ndarray[Any, Any]
HEAD = '<ir_version: 8, opset_import: ["": 17]> '
slow_to_draw = settings(max_examples=60, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow], deadline=None)


def forms_of(graph: Graph, name: str = "w") -> tuple[Form, ...]:
    (found,) = (found for weight, found in forms(graph, weights(graph)) if weight.constant.name == name)
    assert not isinstance(found, str), found
    return found


def forms_of_layer(layer: Layer) -> tuple[Form, ...]:
    """Returns the forms of a random layer; of a ConvTranspose, only where what follows would know its shape."""
    graph = load(layer.model())
    (found,) = (found for weight, found in forms(graph, weights(graph)) if weight.constant.name == "w")
    assume(found != "the output_shape of ConvTranspose 'y' leaves what follows without a known shape")
    return forms_of(graph)


def reason(text: str, name: str = "w", **arrays: Array) -> str:
    """Returns why a weight of a model cannot be cut."""
    graph = load(with_arrays(text, **arrays))
    (found,) = (found for weight, found in forms(graph, weights(graph)) if weight.constant.name == name)
    assert isinstance(found, str), found
    return found


def with_arrays(text: str, **arrays: Array) -> onnx.ModelProto:
    model = parser.parse_model(HEAD + text)
    model.graph.initializer.extend(value(name, array) for name, array in arrays.items())
    return model


def cut(model: onnx.ModelProto, kind: str, ranks: Ranks, name: str = "w") -> tuple[onnx.ModelProto, Array]:
    """Returns the model with a weight cut, checked, and what stands for the weight now, as it was stored."""
    graph = load(model)
    (form,) = (form for form in forms_of(graph, name) if form.kind == kind)
    pieces = form.factor(form.matrix, ranks)
    product = form.weight.layout.inverse(form.product(pieces))
    done = split(graph, form, pieces)
    assert [constant.shape for constant in done.constants if "zero" not in constant.name] != []
    assert all(node in graph.nodes for node in done.nodes)
    made = to_model(graph)
    onnx.checker.check_model(made, full_check=True)
    tensors = [initializer.name for initializer in made.graph.initializer]
    assert name not in tensors
    return made, product


def close(found: list[Array], expected: list[Array], tolerance: float = 1e-4) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        size = np.abs(other.astype(np.float64)).max(initial=1.0)
        np.testing.assert_allclose(one.astype(np.float64), other.astype(np.float64), rtol=0, atol=tolerance * size)


@pytest.mark.parametrize("op", LAYERS)
@slow_to_draw
@given(st.data())
def test_all_of_the_rank_changes_nothing(op: str, data: st.DataObject) -> None:
    layer: Layer = data.draw(LAYERS[op])
    model = layer.model()
    expected = layer.run(model)
    for form in forms_of_layer(layer):
        made, product = cut(model, form.kind, form.full)
        np.testing.assert_allclose(product, layer.arrays["w"], atol=1e-5)
        close(layer.run(made), expected)


@pytest.mark.parametrize("op", LAYERS)
@slow_to_draw
@given(st.data())
def test_with_less_the_layer_computes_with_the_product(op: str, data: st.DataObject) -> None:
    layer: Layer = data.draw(LAYERS[op])
    model = layer.model()
    form = data.draw(st.sampled_from(forms_of_layer(layer)))
    ranks = form.at(data.draw(st.floats(0, 1)))
    made, product = cut(model, form.kind, ranks)
    close(layer.run(made), layer.run(layer.model(w=product.astype(np.float32))))
    pieces = [item for item in made.graph.initializer if item.name.startswith("w.") and not item.name.endswith((".bias", ".zero"))]
    stored = sum(np.prod(item.dims) for item in pieces)
    assert stored == form.parameters(ranks)
    assert form.nbytes(ranks) == 4 * stored


@slow_to_draw
@given(recurrences())
def test_states_are_multiplied_inside_of_the_node(layer: Layer) -> None:
    graph = load(layer.model())
    found = {weight.constant.name: found for weight, found in forms(graph, weights(graph))}
    if "r" in found:
        assert found["r"] == f"{layer.op} 'y' multiplies it with its state, inside of the node"


KINDS = {
    "Conv 1x1": ("Conv", (4, 3, 1, 1), {}, {"channel", "interpolative"}),
    "Conv in groups": ("Conv", (4, 1, 1, 1), {"group": 2}, {"channel"}),
    "Conv 1-D": ("Conv", (4, 3, 5), {}, {"channel", "input", "interpolative", "tucker2"}),
    "Conv 3x1": ("Conv", (4, 3, 3, 1), {}, {"channel", "input", "interpolative", "tucker2"}),
    "Conv": ("Conv", (4, 3, 3, 3), {}, {"channel", "input", "interpolative", "spatial", "tucker2"}),
    "Conv 1x3x3": ("Conv", (4, 3, 1, 3, 3), {}, {"channel", "input", "interpolative", "spatial", "tucker2"}),
    "ConvTranspose": ("ConvTranspose", (3, 4, 2, 2), {}, {"channel", "input", "interpolative", "spatial", "tucker2"}),
    "with output_shape": ("ConvTranspose", (3, 4, 2, 2), {"output_shape": [7, 7]}, {"channel", "input", "interpolative", "tucker2"}),
}


@pytest.mark.parametrize(("op", "shape", "attributes", "expected"), KINDS.values(), ids=KINDS)
def test_which_forms_a_convolution_has(op: str, shape: tuple[int, ...], attributes: dict[str, Any], expected: set[str]) -> None:
    inputs = 2 if "group" in attributes else 3
    layer = Layer(op, ("x", "w"), {"x": random(1, inputs, *[6] * (len(shape) - 2)), "w": random(*shape)}, attributes)
    assert {form.name for form in forms_of(load(layer.model()))} == expected


def test_what_follows_a_shape_that_inference_loses_is_refused() -> None:
    layer = Layer("ConvTranspose", ("x", "w"), {"x": random(1, 3, 5, 5), "w": random(3, 4, 1, 1)}, {"output_shape": [4, 5]})
    graph = load(layer.model())
    ((_, found),) = forms(graph, weights(graph))
    assert found == "the output_shape of ConvTranspose 'y' leaves what follows without a known shape"


def test_float16_stays_float16() -> None:
    arrays = {"x": random(2, 8, dtype=np.float16), "w": random(8, 6, dtype=np.float16)}
    layer = Layer("MatMul", ("x", "w"), arrays)
    made, product = cut(layer.model(), "two-products", (6,))
    assert {item.data_type for item in made.graph.initializer} == {onnx.TensorProto.FLOAT16}
    np.testing.assert_allclose(product, arrays["w"], atol=5e-3)
    close(layer.run(made), layer.run(layer.model()), 1e-2)


def test_the_way_to_the_weight_goes_with_it() -> None:
    stored = random(3, 8).astype(np.float16)
    model = with_arrays("g (float[4, 8] x) => (float[4, 3] y) { a = Cast<to = 1>(w) b = Transpose(a) y = MatMul(x, b) }", w=stored)
    made, product = cut(model, "two-products", (2,))
    assert [node.op_type for node in made.graph.node] == ["MatMul", "MatMul"]
    assert {item.data_type for item in made.graph.initializer} == {onnx.TensorProto.FLOAT}
    x = random(4, 8)
    close(run(session(made), {"x": x}), [(x @ product.T).astype(np.float32)])


def test_quantized_weights_are_cut_as_what_they_mean() -> None:
    codes, scale, zero = np.arange(-12, 12, dtype=np.int8).reshape(4, 6), random(6) ** 2 + 0.1, np.arange(6, dtype=np.int8)
    model = with_arrays(
        "g (float[5, 4] x) => (float[5, 6] y) { a = DequantizeLinear<axis = -1>(w, s, z) y = MatMul(x, a) }", w=codes, s=scale, z=zero
    )
    x = random(5, 4)
    expected = run(session(model), {"x": x})
    made, _ = cut(model, "two-products", (4,))
    assert {item.name for item in made.graph.initializer} == {"w.first", "w.last"}
    close(run(session(made), {"x": x}), expected)


def test_shared_weights_are_cut_once_for_all() -> None:
    w, x = random(6, 6), random(2, 6)
    text = "g (float[2, 6] x) => (float[2, 6] y) { a = MatMul(x, w) b = Relu(a) t = Transpose(w) c = Gemm(b, t, i) y = Relu(c) }"
    other = "g (float[2, 6] x) => (float[2, 6] y) { a = MatMul(x, w) b = Relu(a) c = Gemm(b, w, i) y = Relu(c) }"
    assert reason(text, w=w, i=random(6)) == "nodes that share it read it as different matrices"
    model = with_arrays(other, w=w, i=random(6))
    assert [form.name for form in forms_of(load(model))] == ["two-matmuls", "interpolative"]
    made, product = cut(model, "two-products", (3,))
    assert len(made.graph.initializer) == 3
    assert [node.op_type for node in made.graph.node] == ["MatMul", "MatMul", "Relu", "MatMul", "Gemm", "Relu"]
    close(run(session(made), {"x": x}), run(session(with_arrays(other, w=product.astype(np.float32), i=random(6))), {"x": x}))


def test_two_convolutions_of_one_kernel_cost_what_both_do() -> None:
    text = """g (float[1, 4, 8, 8] x) => (y, z) {
        y = Conv<pads = [1, 1, 1, 1]>(x, w)
        z = Conv<strides = [2, 2], pads = [1, 1, 1, 1]>(x, w) }"""
    graph = load(with_arrays(text.replace("(y, z)", "(float[1, 4, 8, 8] y, float[1, 4, 4, 4] z)"), w=random(4, 4, 3, 3)))
    runs = {form.name: form.runs for form in forms_of(graph)}
    assert runs == {"channel": (1, 1), "input": (2.5, 1), "interpolative": (1, 1, 1), "spatial": (1.5, 1), "tucker2": (2.5, 1, 1)}


REFUSED = {
    "is a graph output": "g (float[2, 4] x) => (float[2, 4] y, float[4, 4] w) { y = MatMul(x, w) }",
    "is read as input 1 of Add 'z', which is no weight operand": "g (float[2, 4] x) => (float[2, 4] y, float[4, 4] z) { y = MatMul(x, w) z = Add(y, w) }",
    "no form is known for what Gather reads": "g (float[2, 4] x, int64[1] i) => (float[2, 4] y, float[1, 4] z) { y = MatMul(x, w) z = Gather(w, i) }",
    "what MatMul 'y' multiplies it with is constant as well": "g () => (float[4, 4] y) <float[4, 4] v = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7}> { y = MatMul(v, w) }",
    "what Gemm 'y' multiplies it with is constant as well": "g () => (float[4, 4] y) <float[4, 4] v = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7}> { t = Transpose(v) y = Gemm(t, w) }",
    "nodes that share it read it as different matrices": "g (float[4, 4] x) => (float[4, 4] y) { a = MatMul(x, w) y = MatMul(w, a) }",
    "rearranged in an unknown way before MatMul 'y'": "g (float[2, 8] x) => (float[2, 4] y) { a = Concat<axis = 0>(w, w) y = MatMul(x, a) }",
    "the scale of DequantizeLinear 'a' is computed": "g (float[2, 4] x, float s) => (float[2, 4] y) { c = Cast<to = 3>(w) a = DequantizeLinear(c, s) y = MatMul(x, a) }",
    "nodes that share it read it in different types or scales": "g (float[2, 4] x, float16[2, 4] h) => (float[2, 4] y, float16[2, 4] z) { y = MatMul(x, w) a = Cast<to = 10>(w) z = MatMul(h, a) }",
}


@pytest.mark.parametrize(("said", "text"), REFUSED.items())
def test_refusals(said: str, text: str) -> None:
    assert reason(text, w=random(4, 4)) == said


def test_refusals_of_other_shapes() -> None:
    vector = "g (float[4] x) => (float[3, 5] y) { y = MatMul(x, w) }"
    assert reason(vector, w=random(3, 4, 5)) == "MatMul 'y' multiplies a batch of matrices with what may be a vector"
    body = "g (bool c, float[2, 4] x) => (float[2, 4] y) { y = If(c) <then_branch = a () => (float[2, 4] p) { p = MatMul(x, w) }, else_branch = b () => (float[2, 4] q) { q = Identity(x) }> }"
    assert reason(body, w=random(4, 4)) == "MatMul 'p' reads it inside of a body or a function"
    graph = load(with_arrays("g (float[2, 4] x) => (float[2, 4] y) { y = Gemm(x, w, b) }", w=random(4, 4), b=random(4)))
    graph.opset = 6
    assert dict(zip("wb", (found for _, found in forms(graph, weights(graph))), strict=True))["w"] == "Gemm 'y' is of an opset before 7"
    graph.opset = 17
    graph.nodes[0].attrs["mode"] = "new"
    (found, _) = (found for _, found in forms(graph, weights(graph)))
    assert found == "Gemm 'y' has an unknown attribute mode"


def test_a_weight_inside_of_a_body_is_left_alone() -> None:
    then = parser.parse_graph("a () => (float[2, 4] p) { p = MatMul(x, v) }")
    then.initializer.append(value("v", random(4, 4)))
    node = onnx.helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=parser.parse_graph("b () => (float[2, 4] q) { q = Identity(x) }"))
    model = make_model([node], [tensor("c", [], onnx.TensorProto.BOOL), tensor("x", [2, 4])], [tensor("y", [2, 4])])
    graph = load(model)
    assert [found for _, found in forms(graph, weights(graph))] == ["it is stored in a body or a function"]


def test_a_graph_that_has_changed_is_refused_and_left_as_it_is() -> None:
    graph = load(Layer("MatMul", ("x", "w"), {"x": random(2, 4), "w": random(4, 4)}).model())
    form, _ = forms_of(graph)
    pieces = form.factor(form.matrix, (1,))
    with pytest.raises(PassError, match=r"^low-rank: pieces of 'w' must be of the form's shapes at some ranks, got"):
        split(graph, form, pieces[:1])
    with pytest.raises(PassError, match=r"^low-rank: pieces of 'w' must be finite as float32, got an infinity or a NaN$"):
        split(graph, form, (pieces[0] * np.inf, pieces[1]))
    assert [node.op for node in graph.nodes] == ["MatMul"]
    split(graph, form, pieces)
    with pytest.raises(PassError, match=r"^low-rank: 'w' is no longer read by MatMul as it was when its forms were found$"):
        split(graph, form, pieces)


def test_names_are_fresh_and_bytes_the_same_each_time() -> None:
    text = "g (float[2, 8] x, float[2] y_thin) => (float[2, 6] y) { a = MatMul(x, w) y = Add(a, w.first) }"
    model = with_arrays(text.replace("w.first", "b"), w=random(8, 6), b=random(6))
    model.graph.initializer[1].name = model.graph.node[1].input[1] = "w.first"
    once, again = cut(model, "two-products", (2,))[0], cut(model, "two-products", (2,))[0]
    assert once.SerializeToString(deterministic=True) == again.SerializeToString(deterministic=True)
    assert [item.name for item in once.graph.initializer] == ["w.first", "w.first_2", "w.last"]


def test_one_source_of_names_serves_many_weights() -> None:
    model = with_arrays(
        "g (float[2, 8] x) => (float[2, 6] y) { a = MatMul(x, v) y = MatMul(a, w) }", v=random(8, 8), w=random(8, 6)
    )
    graph, x = load(model), random(2, 8)
    names = NameSource(graph)
    for weight, found in forms(graph, weights(graph)):
        assert not isinstance(found, str), weight
        split(graph, found[0], found[0].factor(found[0].matrix, found[0].full), names)
    made = to_model(graph)
    onnx.checker.check_model(made, full_check=True)
    assert [node.output[0] for node in made.graph.node] == ["a_thin", "a", "y_thin", "y"]
    close(run(session(made), {"x": x}), run(session(model), {"x": x}))
