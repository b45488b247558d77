"""What forms say they cost, against what the layers that come out cost; and the largest ranks that pay, by trying all."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, assume, given, reject, settings
from hypothesis import strategies as st

from onnxshrink.graph.exporter import to_model
from onnxshrink.graph.factor_forms import Form
from onnxshrink.graph.factoring import forms, split
from onnxshrink.graph.files import load
from onnxshrink.graph.ir import Graph, declared_type
from onnxshrink.graph.weights import weights
from onnxshrink.graph.work import multiply_accumulates
from tests.graph.factor_cases import LAYERS, Layer, random

Array = np.ndarray[Any, Any]
slow_to_draw = settings(max_examples=40, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow], deadline=None)


def forms_of(graph: Graph) -> tuple[Form, ...]:
    (found,) = (found for weight, found in forms(graph, weights(graph)) if weight.constant.name == "w")
    if isinstance(found, str):
        reject()
    return found


def macs(graph: Graph) -> int:
    """Returns the multiply-accumulates of all nodes, by the shapes that inference finds."""
    inferred = onnx.shape_inference.infer_shapes(to_model(graph)).graph
    shapes = {info.name: declared_type(info)[1] for info in (*inferred.input, *inferred.output, *inferred.value_info)}
    total = 0
    for node in graph.nodes:
        sides = [[list(shapes.get(tensor.name) or ()) for tensor in tensors] for tensors in (node.inputs, node.outputs[:1])]
        assume(all(isinstance(dim, int) and dim for dim in sides[1][0]) and (sides[1][0] or node.op == "MatMul"))
        total += multiply_accumulates(node, *sides)
    return total


@pytest.mark.parametrize("op", ["MatMul", "Gemm", "Conv", "ConvTranspose"])
@slow_to_draw
@given(st.data())
def test_costs_are_those_of_the_layers_that_come_out(op: str, data: st.DataObject) -> None:
    layer: Layer = data.draw(LAYERS[op])
    graph = load(layer.model())
    form = data.draw(st.sampled_from(forms_of(graph)))
    ranks = form.at(data.draw(st.floats(0, 1)))
    before = macs(graph)
    pieces = form.factor(form.matrix, ranks)
    assert form.fits(pieces)
    assert sum(piece.size for piece in pieces) == form.parameters(ranks)
    assert form.whole == layer.arrays["w"].size
    split(graph, form, pieces)
    assert math.isclose(macs(graph) / before, form.macs(ranks) / form.whole)


def test_where_sizes_are_unknown_strides_tell() -> None:
    layer = Layer("Conv", ("x", "w"), {"x": random(1, 4, 8, 8), "w": random(4, 4, 3, 3)}, {"strides": [2, 3]})
    model = layer.model()
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = f"n{axis}"
        model.graph.output[0].type.tensor_type.shape.dim[axis].ClearField("dim_value")
    assert {form.name: form.runs for form in forms_of(load(model))} == {
        "channel": (1, 1), "input": (6, 1), "interpolative": (1, 1, 1), "spatial": (3, 1), "tucker2": (6, 1, 1)
    }


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose", "recurrent", "MatMul"])
@slow_to_draw
@given(st.data())
def test_the_largest_ranks_that_pay(op: str, data: st.DataObject) -> None:
    layer: Layer = data.draw(LAYERS[op])
    for form in forms_of(load(layer.model())):
        for measure, cost in (("parameters", form.parameters), ("macs", form.macs)):
            steps = max(form.full)
            paying = [ranks for ranks in (form.at(step / steps) for step in range(1, steps + 1)) if cost(ranks) < form.whole]
            assert form.break_even(measure) == (paying[-1] if paying else (0,) * len(form.full))


def test_a_matrix_pays_up_to_the_break_even_rank() -> None:
    form, joined = forms_of(load(Layer("MatMul", ("x", "w"), {"x": random(1, 384), "w": random(384, 1536)}).model()))
    assert form.full == joined.full == (384,)
    assert joined.break_even() == joined.break_even("macs") == (383,)
    assert form.break_even() == form.break_even("macs") == (307,)
    assert form.parameters((307,)) < form.whole <= form.parameters((308,))


def test_the_ranks_of_tucker2_do_not_exceed_what_the_other_can_tell_apart() -> None:
    graph = load(Layer("Conv", ("x", "w"), {"x": random(1, 64, 5), "w": random(4, 64, 3)}).model())
    form = next(form for form in forms_of(graph) if form.name == "tucker2")
    assert form.full == (12, 4)
    for share in np.linspace(0, 1, 50):
        before, after = form.at(share)
        assert 1 <= before <= 3 * after
        assert 1 <= after <= 3 * before
        assert form.product(form.factor(form.matrix, (before, after))).shape == (4, 192)


def test_directions_share_what_comes_first() -> None:
    arrays = {"x": random(3, 2, 12), "w": random(2, 16, 12), "r": random(2, 16, 4)}
    (form,) = forms_of(load(Layer("LSTM", ("x", "w", "r"), arrays, {"hidden_size": 4, "direction": "bidirectional"}, ("w", "r")).model()))
    assert form.shapes((5,)) == ((1, 5, 12), (1, 32, 5))
    gram = np.diag(np.arange(12.0, 0, -1))
    whitened = form.factor(form.matrix, (5,), np.stack([gram, gram]))
    error = (form.matrix - form.product(whitened)) @ np.sqrt(gram)
    tail = np.linalg.svd(form.matrix @ np.sqrt(gram), compute_uv=False)[5:]
    assert math.isclose(np.square(error).sum(), np.square(tail).sum(), rel_tol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    form, _ = forms_of(load(Layer("MatMul", ("x", "w"), {"x": random(1, 8), "w": random(8, 6)}).model()))
    with pytest.raises(ValueError, match=r"^factor: matrix must be of shape \(6, 8\), got shape \(8, 6\)$"):
        form.factor(form.matrix.T, (1,))
    with pytest.raises(ValueError, match=r"^factor: ranks must be 1 of them, got \(1, 1\)$"):
        form.factor(form.matrix, (1, 1))
    with pytest.raises(ValueError, match=r"^factor: rank must be from 1 to 6, got 7$"):
        form.factor(form.matrix, (7,))
