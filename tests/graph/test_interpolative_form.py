"""Layers that compute some outputs as they were, and the others from those: ONNX Runtime against the layer with the product for a weight."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from onnxshrink.errors import PassError
from onnxshrink.graph.exporter import to_model
from onnxshrink.graph.factor_forms import Form
from onnxshrink.graph.factoring import forms, split
from onnxshrink.graph.files import load
from onnxshrink.graph.weights import weights
from tests.graph.factor_cases import FLOATS, Layer, random
from tests.graph.test_factoring import close, cut, forms_of, with_arrays
from tests.oracle import run, session, tensor

Array = np.ndarray[Any, Any]
KIND = "interpolative"


def offered(layer: Layer) -> bool:
    return KIND in {form.kind for form in forms_of(load(layer.model()))}


def form_of(model: onnx.ModelProto, name: str = "w") -> Form:
    (form,) = (form for form in forms_of(load(model), name) if form.kind == KIND)
    return form


def ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def stored(model: onnx.ModelProto) -> dict[str, Array]:
    return {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}


def check(layer: Layer, tolerance: float = 1e-4) -> list[onnx.ModelProto]:
    """Returns the layer cut at every rank, having compared what each computes with what the layer does with the product."""
    (full,), results = form_of(layer.model()).full, []
    for rank in range(1, full + 1):
        made, product = cut(layer.model(), KIND, (rank,))
        close(layer.run(made), layer.run(layer.model(w=product.astype(layer.arrays["w"].dtype))), tolerance)
        if rank == full:
            close(layer.run(made), layer.run(layer.model()), tolerance)
        results.append(made)
    return results


def gemm(operand: int, flipped: tuple[bool, bool], opset: int, added: Array | None, stores: bool = True, **attributes: float) -> Layer:
    """Returns a Gemm of [5, 6] and [6, 4], its weight one of them, either transposed or not."""
    a, b = random(5, 6), random(6, 4)
    arrays = dict(zip(("x", "w") if operand else ("w", "x"), (a.T if flipped[0] else a, b.T if flipped[1] else b), strict=True))
    if added is not None:
        arrays["b"] = added
    given: dict[str, Any] = {"transA": int(flipped[0]), "transB": int(flipped[1]), **attributes}
    return Layer("Gemm", tuple(arrays), arrays, given, ("w", "b") if stores else ("w",), opset=opset)


BOTH = list(itertools.product((False, True), repeat=2))
FITTING = {0: [(5, 1)], 1: [(4,), (1, 4)]}  # shapes of a C that says what is added to each output


class TestGemm:
    @pytest.mark.parametrize("opset", [7, 17])
    @pytest.mark.parametrize("operand", [0, 1])
    @pytest.mark.parametrize("attributes", [{}, {"alpha": -0.5, "beta": 2.0}, {"beta": 0.0}], ids=str)
    def test_with_what_is_added(self, operand: int, opset: int, attributes: dict[str, float]) -> None:
        for flipped, shape in itertools.product(BOTH, FITTING[operand]):
            for made in check(gemm(operand, flipped, opset, random(*shape), **attributes))[:-1]:
                assert ops(made) == ["Gemm", "Gemm", "Concat"]
                assert sum(name.startswith("w.") for name in stored(made)) == len(stored(made)) == 4
                assert sum(array.size for name, array in stored(made).items() if name.endswith(".bias")) == max(shape)

    @pytest.mark.parametrize("opset", [11, 17])
    @pytest.mark.parametrize("operand", [0, 1])
    def test_without(self, operand: int, opset: int) -> None:
        """Others need no C then, and are no Gemm unless it has to transpose."""
        for flipped in BOTH:
            layer = gemm(operand, flipped, opset, None, alpha=-0.5)
            for made in check(layer)[:-1]:
                assert ops(made) == ["Gemm", "Gemm" if flipped[operand] else "MatMul", "Concat"]
                assert len(stored(made)) == 2
        layer = Layer("Gemm", ("x", "w", ""), {"x": random(5, 6), "w": random(6, 4)}, opset=opset)
        check(layer)

    @pytest.mark.parametrize("opset", [7, 17])
    @pytest.mark.parametrize("operand", [0, 1])
    def test_only_where_what_is_added_is_known_of_each_output(self, operand: int, opset: int) -> None:
        shapes = [(), (1,), (4,), (1, 4), (5, 1), (5, 4), (1, 1)]
        found = {shape for shape in shapes if offered(gemm(operand, (False, False), opset, random(*shape) if shape else np.asarray(0.5, np.float32)))}
        assert found == set(FITTING[operand])
        assert not any(offered(gemm(operand, (False, False), opset, random(*shape), stores=False)) for shape in shapes if shape)

    @pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
    def test_of_one_output(self, shape: tuple[int, ...]) -> None:
        arrays = {"x": random(5, 6), "w": random(6, 1), "b": np.full(shape, 0.5, np.float32)}
        (made,) = check(Layer("Gemm", ("x", "w", "b"), arrays, {"beta": 2.0}))
        assert ops(made) == ["Gemm", "Concat"]

    def test_of_the_first_opset_with_zero_added(self) -> None:
        """Where C has to be there, and none is known of each output, nothing is offered; two products are."""
        layer = gemm(1, (False, True), 10, random(5, 4))
        assert [form.kind for form in forms_of(load(layer.model()))] == ["two-products"]


class TestMatMul:
    @pytest.mark.parametrize("opset", [11, 17])
    @pytest.mark.parametrize("own", [(), (3,), (2, 3)], ids=str)
    @pytest.mark.parametrize("other", [(), (3,), (2, 1), (5, 2, 3)], ids=str)
    def test_in_batches(self, own: tuple[int, ...], other: tuple[int, ...], opset: int) -> None:
        """Of which either may be broadcast."""
        for names in (("x", "w"), ("w", "x")):
            arrays = dict(zip(names, (random(*(own if names[0] == "w" else other), 4, 6), random(*(own if names[1] == "w" else other), 6, 5)), strict=True))
            for made in check(Layer("MatMul", names, arrays, opset=opset))[:-1]:
                assert ops(made) == ["MatMul", "MatMul", "Concat"]

    def test_not_before_concat_counts_from_the_back(self) -> None:
        arrays = {"x": random(2, 6), "w": random(6, 4)}
        assert {opset for opset in (9, 10, 11, 13) if offered(Layer("MatMul", ("x", "w"), arrays, opset=opset))} == {11, 13}

    def test_vectors(self) -> None:
        """A matrix times a vector has its outputs along the only axis there is, but a Concat of axis -2 would not find it."""
        check(Layer("MatMul", ("x", "w"), {"x": random(6), "w": random(6, 4)}))
        assert not offered(Layer("MatMul", ("w", "x"), {"x": random(6), "w": random(4, 6)}))

    def test_of_inputs_whose_rank_is_not_known(self) -> None:
        found = {}
        for names, shape in ((("x", "w"), (6, 4)), (("w", "x"), (4, 6))):
            text = f"g (float[n, m] u, int64[k] s) => (float y) {{ x = Reshape(u, s) y = MatMul({', '.join(names)}) }}"
            model = with_arrays(text, w=random(*shape))
            model.graph.output[0].type.tensor_type.ClearField("shape")
            found[names[0]] = {form.kind for form in forms_of(load(model))}
        assert found == {"x": {KIND, "two-products"}, "w": {"two-products"}}


def conv(arrays: dict[str, Array], op: str = "Conv", stores: tuple[str, ...] = ("w", "b"), **attributes: Any) -> Layer:
    return Layer(op, tuple(arrays), arrays, attributes, stores)


CONVOLUTIONS = {
    "1x1": ("Conv", (7, 4, 1, 1), (2, 4, 5, 6), {}),
    "1-D": ("Conv", (7, 2, 3), (2, 2, 9), {"strides": [2], "pads": [1, 0], "dilations": [2]}),
    "2-D": ("Conv", (7, 2, 3, 2), (1, 2, 7, 8), {"strides": [1, 2], "pads": [1, 0, 2, 1], "kernel_shape": [3, 2]}),
    "2-D, of the same size": ("Conv", (7, 2, 3, 2), (1, 2, 7, 8), {"auto_pad": "SAME_UPPER"}),
    "3-D": ("Conv", (5, 2, 1, 2, 3), (1, 2, 3, 4, 5), {}),
    "transposed": ("ConvTranspose", (3, 6, 3, 2), (2, 3, 4, 5), {"strides": [2, 2], "output_padding": [1, 0], "pads": [1, 0, 0, 1]}),
    "transposed 1-D": ("ConvTranspose", (4, 6, 3), (2, 4, 5), {"dilations": [2]}),
    "transposed, of a size": ("ConvTranspose", (3, 6, 2, 2), (1, 3, 4, 4), {"output_shape": [4, 5]}),
}


class TestConvolutions:
    @pytest.mark.parametrize("bias", ["stored", "none", "left out"])
    @pytest.mark.parametrize(("op", "shape", "fed", "attributes"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
    def test_with_and_without_bias(self, op: str, shape: tuple[int, ...], fed: tuple[int, ...], attributes: dict[str, Any], bias: str) -> None:
        outputs = shape[0 if op == "Conv" else 1]
        arrays = {"x": random(*fed), "w": random(*shape)}
        if bias == "stored":
            arrays["b"] = random(outputs)
        layer = conv(arrays, op, **attributes)
        if bias == "left out":
            layer = Layer(op, ("x", "w", ""), arrays, attributes)
        for made in check(layer)[:-1]:
            assert ops(made) == [op, "Conv", "Concat"]
            assert len(stored(made)) == (4 if bias == "stored" else 2)
            assert "b" not in stored(made)

    def test_not_in_groups_nor_with_a_bias_that_is_computed(self) -> None:
        w, b = random(6, 2, 3), random(6)
        assert offered(conv({"x": random(1, 2, 9), "w": w, "b": b}))
        assert not offered(conv({"x": random(1, 4, 9), "w": w, "b": b}, group=2))
        assert not offered(conv({"x": random(1, 2, 9), "w": w, "b": b}, stores=("w",)))
        text = "g (float[1, 2, 9] x) => (float[1, 6, 7] y) { c = Exp(b) y = Conv(x, w, c) }"
        assert KIND not in {form.kind for form in forms_of(load(with_arrays(text, w=w, b=b)))}
        text = "g (float[1, 2, 9] x) => (float[1, 6, 7] y) { c = DequantizeLinear(b, s) y = Conv(x, w, c) }"
        dequantized = with_arrays(text, w=w, b=np.arange(6, dtype=np.int32), s=np.asarray(0.5, np.float32))
        assert KIND not in {form.kind for form in forms_of(load(dequantized))}


SHARED = """g (float[1, 2, 9] x) => (float[1, 6, 7] y, float[1, 6, 7] z) {
    y = Conv(x, w, b)
    z = Conv(x, v, b) }"""


class TestSharing:
    def test_of_a_bias(self) -> None:
        """It stays as long as another layer reads it."""
        arrays = {"w": random(6, 2, 3), "v": random(6, 2, 3) - 1, "b": random(6)}
        model, x = with_arrays(SHARED, **arrays), {"x": random(1, 2, 9)}
        made, product = cut(model, KIND, (3,))
        np.testing.assert_array_equal(stored(made)["b"], arrays["b"])
        close(run(session(made), x), run(session(with_arrays(SHARED, **{**arrays, "w": product.astype(np.float32)})), x))
        both, other = cut(made, KIND, (2,), "v")
        assert "b" not in stored(both)
        dense = {**arrays, "w": product.astype(np.float32), "v": other.astype(np.float32)}
        close(run(session(both), x), run(session(with_arrays(SHARED, **dense)), x))

    def test_of_a_bias_that_is_put_out(self) -> None:
        text = "g (float[1, 2, 9] x) => (float[1, 6, 7] y, float[6] b) { y = Conv(x, w, b) }"
        arrays = {"w": random(6, 2, 3), "b": random(6)}
        made, product = cut(with_arrays(text, **arrays), KIND, (3,))
        x = {"x": random(1, 2, 9)}
        close(run(session(made), x), run(session(with_arrays(text, w=product.astype(np.float32), b=arrays["b"])), x))

    def test_of_a_weight_by_layers_with_a_bias_each(self) -> None:
        text = """g (float[1, 2, 9] x) => (float[1, 6, 7] y, float[1, 6, 4] z, float[1, 6, 7] u) {
            y = Conv(x, w, b) z = Conv<strides = [2]>(x, w, c) u = Conv(x, w) }"""
        arrays = {"b": random(6), "c": random(6) + 1}
        made, product = cut(with_arrays(text, w=random(6, 2, 3), **arrays), KIND, (2,))
        assert len(stored(made)) == 2 + 2 * 2
        assert ops(made) == ["Conv", "Conv", "Concat"] * 3
        x = {"x": random(1, 2, 9)}
        close(run(session(made), x), run(session(with_arrays(text, w=product.astype(np.float32), **arrays)), x))

    def test_only_where_all_readers_have_the_form(self) -> None:
        text = "g (float[1, 2, 9] x, float[6] c) => (float[1, 6, 7] y, float[1, 6, 7] z) { y = Conv(x, w, b) z = Conv(x, w, c) }"
        found = forms_of(load(with_arrays(text, w=random(6, 2, 3), b=random(6))))
        assert KIND not in {form.kind for form in found}
        assert "channel" in {form.kind for form in found}

    def test_of_a_tensor_by_weight_and_bias(self) -> None:
        """What is added is what is multiplied with: the pieces stand for the weight alone."""
        text = "g (float[5, 6] x) => (float[5, 1] y, float[5, 6] z) { y = Gemm<transB = 1>(x, w) z = Add(x, w) }"
        graph = load(with_arrays(text, w=random(1, 6)))
        ((_, found),) = forms(graph, weights(graph))
        assert found == "is read as input 1 of Add 'z', which is no weight operand"
        text = "g (float[5, 4] x) => (float[5, 4] y) { y = Gemm(x, w, w) }"
        graph = load(with_arrays(text, w=random(4, 4)))
        ((_, found),) = forms(graph, weights(graph))
        assert found == "is read as input 2 of Gemm 'y', which is no weight operand"


@pytest.mark.parametrize("ir_version", [3, 8])
def test_weights_and_biases_that_are_listed_as_inputs(ir_version: int) -> None:
    layer = conv({"x": random(1, 2, 9), "w": random(6, 2, 3), "b": random(6)})
    model = layer.model()
    model.graph.input.extend([tensor("w", [6, 2, 3]), tensor("b", [6])])
    model.ir_version = ir_version
    made, product = cut(model, KIND, (3,))
    assert {item.name for item in made.graph.input} - set(stored(made)) == {"x"}
    close(layer.run(made), layer.run(layer.model(w=product.astype(np.float32))))


@pytest.mark.parametrize(
    "layer",
    [
        Layer("MatMul", ("x", "w"), {"x": random(5, 8, dtype=np.float16), "w": random(8, 6, dtype=np.float16)}),
        Layer("Gemm", ("x", "w", "b"), {"x": random(5, 8, dtype=np.float16), "w": random(8, 6, dtype=np.float16), "b": random(6, dtype=np.float16)}, {"beta": 2.0}),
        conv({"x": random(2, 3, 9, dtype=np.float16), "w": random(6, 3, 3, dtype=np.float16), "b": random(6, dtype=np.float16)}),
    ],
    ids=lambda layer: layer.op,
)
def test_float16_stays_float16(layer: Layer) -> None:
    """Rounding of the kept outputs stays what it is: it is not multiplied."""
    for made in check(layer, 1e-2):
        assert {item.data_type for item in made.graph.initializer} == {TensorProto.FLOAT16}
        assert {array.dtype for array in layer.run(made)} <= set(FLOATS)


def test_whichever_outputs_are_kept() -> None:
    """The first or the last: where the others are zero at the other end, they are told by zeros."""
    for dead, roles in ((slice(None, 3), ["w.first", "w.before"]), (slice(3, None), ["w.first", "w.after"])):
        w, b = random(6, 8), random(6)
        w[dead] = 0
        layer = Layer("Gemm", ("x", "w", "b"), {"x": random(5, 8), "w": w, "b": b}, {"transB": 1})
        made, product = cut(layer.model(), KIND, (3,))
        np.testing.assert_allclose(product, w, atol=1e-6)
        assert [name for name in stored(made) if not name.endswith(".bias")] == roles
        assert np.abs(stored(made)[roles[1]]).max() < 1e-6
        close(layer.run(made), layer.run(layer.model()))


def test_pieces_fit_wherever_the_kept_outputs_are() -> None:
    """Those in the middle as well, should a caller have such."""
    layer = Layer("Gemm", ("x", "w", "b"), {"x": random(5, 8), "w": random(6, 8), "b": random(6)}, {"transB": 1, "beta": -1.5})
    form = form_of(layer.model())
    kept, ways = random(2, 8), random(4, 2)
    pieces = kept[None], ways[None, :1], ways[None, 1:]
    assert form.fits(pieces)
    expected = np.concatenate([ways[:1] @ kept, kept, ways[1:] @ kept])
    np.testing.assert_allclose(form.product(pieces), expected, atol=1e-6)
    graph = load(layer.model())
    (form,) = (form for form in forms_of(graph) if form.kind == KIND)
    split(graph, form, pieces)
    made = to_model(graph)
    onnx.checker.check_model(made, full_check=True)
    assert ops(made) == ["Gemm", "Gemm", "Gemm", "Concat"]
    close(layer.run(made), layer.run(layer.model(w=expected)))


@pytest.mark.parametrize(
    "shapes",
    [
        [(1, 2, 8), (1, 4, 2)],
        [(1, 2, 8), (1, 0, 2), (1, 3, 2)],
        [(1, 2, 8), (1, 1, 2), (1, 4, 2)],
        [(1, 2, 8), (1, 0, 3), (1, 4, 3)],
        [(1, 2, 7), (1, 0, 2), (1, 4, 2)],
        [(1, 0, 8), (1, 0, 0), (1, 6, 0)],
        [(2, 8), (0, 2), (4, 2)],
        [(2, 2, 8), (2, 0, 2), (2, 4, 2)],
    ],
    ids=str,
)
def test_other_pieces_do_not_fit(shapes: list[tuple[int, ...]]) -> None:
    graph = load(Layer("MatMul", ("x", "w"), {"x": random(5, 8), "w": random(8, 6)}).model())
    (form,) = (form for form in forms_of(graph) if form.kind == KIND)
    pieces = tuple(np.zeros(shape, np.float32) for shape in shapes)
    assert not form.fits(pieces)
    with pytest.raises(PassError, match=r"^low-rank: pieces of 'w' must be of the form's shapes at some ranks, got"):
        split(graph, form, pieces)
    assert [node.op for node in graph.nodes] == ["MatMul"]


def test_costs_less_than_the_weight_at_every_rank_but_the_last() -> None:
    for rows, columns in ((6, 8), (8, 6), (6, 6)):
        form = form_of(Layer("MatMul", ("x", "w"), {"x": random(5, columns), "w": random(columns, rows)}).model())
        for rank in range(1, min(rows, columns) + 1):
            assert form.parameters((rank,)) == form.macs((rank,)) == rank * (rows + columns - rank)
        assert form.break_even() == (min(rows, columns) - 1,)
        assert form.parameters(form.full) == form.whole


def test_break_even_at_a_price() -> None:
    """Of pieces whose elements take four times the bytes."""
    form = form_of(Layer("MatMul", ("x", "w"), {"x": random(5, 40), "w": random(40, 40)}).model())
    for price in (0.5, 1.0, 2.0, 4.0, 400.0):
        paying = [rank for rank in range(1, 41) if price * rank * (80 - rank) < 1600]
        assert form.break_even("parameters", price) == (max(paying, default=0),)


def test_bytes_are_the_same_each_time() -> None:
    layer = conv({"x": random(1, 2, 9), "w": random(6, 2, 3), "b": random(6)})
    once, again = (cut(layer.model(), KIND, (3,))[0].SerializeToString(deterministic=True) for _ in range(2))
    assert once == again
