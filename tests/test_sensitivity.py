"""The drift of outputs, against one computed by hand from ONNX Runtime's outputs of both models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import parser

from onnxshrink.calibrate import Calibration
from onnxshrink.errors import ValidationError
from onnxshrink.graph.exporter import to_model
from onnxshrink.graph.files import load
from onnxshrink.graph.weights import weights
from onnxshrink.inputs import Feeds, Samples
from onnxshrink.sensitivity import OutputProbe
from tests import oracle

Array = np.ndarray[Any, np.dtype[Any]]
HEAD = '<ir_version: 8, opset_import: ["": 17]> '
TWO_OUTPUTS = f"""{HEAD} g (float[3, 4] x) => (float[3, 2] y, float[3, 5] z, int64[3, 1] best) {{
    h = MatMul(x, w) y = Tanh(h) a = Abs(x) z = MatMul(a, v) best = ArgMax<axis = 1>(z) }}"""


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def model_of(text: str, **arrays: Array) -> onnx.ModelProto:
    model = parser.parse_model(text)
    model.graph.initializer.extend(oracle.value(name, array) for name, array in arrays.items())
    return model


def samples(count: int, *shape: int) -> list[Feeds]:
    return [{"x": normal(*shape, seed=index)} for index in range(count)]


def probe(model: onnx.ModelProto, feeds: Sequence[Feeds]) -> OutputProbe:
    calibration = Calibration(Samples(lambda index: feeds[index], range(len(feeds)), "test"), threads=1)
    return OutputProbe(load(model), calibration)


def changed(model: onnx.ModelProto, values: Mapping[str, Array]) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.name in values:
            tensor.CopyFrom(oracle.value(tensor.name, values[tensor.name]))
    return copy


def by_hand(model: onnx.ModelProto, values: Mapping[str, Array], feeds: Sequence[Feeds], output: int) -> float:
    """Returns the squared relative error of one output, all samples together; what was not finite does not count."""
    sessions = [oracle.session(one) for one in (model, changed(model, values))]
    expected, got = (np.stack([oracle.run(one, feed)[output] for feed in feeds]).astype(np.float64) for one in sessions)
    usual = np.isfinite(expected)
    return float(np.sum((got[usual] - expected[usual]) ** 2) / np.sum(expected[usual] ** 2))


MODEL = model_of(TWO_OUTPUTS, w=normal(4, 2), v=normal(4, 5))


@pytest.mark.parametrize(("scale_w", "scale_v"), [(1e-3, 0.0), (0.1, 0.3), (0.3, 0.1), (2.0, 2.0)])
def test_drift_is_that_of_the_worst_output_over_all_samples(scale_w: float, scale_v: float) -> None:
    feeds = samples(7, 3, 4)
    values = {
        "w": normal(4, 2) + np.float32(scale_w) * normal(4, 2, seed=1),
        "v": normal(4, 5) + np.float32(scale_v) * normal(4, 5, seed=1),
    }
    expected = max(by_hand(MODEL, values, feeds, output) for output in (0, 1))
    assert probe(MODEL, feeds).squared_drift(values) == pytest.approx(expected, rel=1e-5)


def test_each_question_is_about_the_original() -> None:
    feeds = samples(3, 3, 4)
    subject = probe(MODEL, feeds)
    values = {"v": normal(4, 5, seed=2)}
    first = subject.squared_drift(values)
    assert subject.squared_drift({"w": normal(4, 2, seed=2)}) != first
    assert subject.squared_drift(values) == first
    assert subject.squared_drift({}) == 0.0


def test_the_graph_is_left_as_it_was() -> None:
    graph = load(MODEL)
    feeds = samples(2, 3, 4)
    subject = OutputProbe(graph, Calibration(Samples(lambda index: feeds[index], range(2), "test")))
    subject.squared_drift({"w": normal(4, 2, seed=2)})
    assert to_model(graph).SerializeToString() == to_model(load(MODEL)).SerializeToString()


@pytest.mark.parametrize(("count", "stride"), [(32, 1), (40, 2), (97, 4)])
def test_a_few_samples_are_enough_if_they_are_from_everywhere(count: int, stride: int) -> None:
    """Files are often sorted by class: the first samples would stand for one class only."""
    feeds = samples(count, 3, 4)
    values = {"w": normal(4, 2, seed=2)}
    assert probe(MODEL, feeds).squared_drift(values) == pytest.approx(by_hand(MODEL, values, feeds[::stride], 0), rel=1e-5)


def test_fewer_samples_are_held_where_outputs_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    feeds = samples(9, 3, 4)
    values = {"w": normal(4, 2, seed=2)}
    for elements, count in ((1, 1), (3 * (2 + 5) * 4, 4), (3 * (2 + 5) * 4 - 1, 3)):
        monkeypatch.setattr("onnxshrink.sensitivity._ELEMENTS", elements)
        expected = by_hand(MODEL, values, feeds[:count], 0)
        assert probe(MODEL, feeds).squared_drift(values) == pytest.approx(expected, rel=1e-5)


def test_a_weight_in_a_body_goes_by_its_site() -> None:
    text = f"""{HEAD} g (float[3, 4] x) => (float[3, 2] y) {{ c = Constant<value = bool {{1}}>() y = If(c) <
        then_branch = t () => (float[3, 2] p) {{ p = MatMul(x, w) }},
        else_branch = e () => (float[3, 2] q) {{ q = MatMul(x, v) }}> }}"""
    model = model_of(text, v=normal(4, 2))
    body = next(attribute.g for attribute in model.graph.node[1].attribute if attribute.name == "then_branch")
    body.initializer.append(oracle.value("w", normal(4, 2)))
    (site,) = [weight.site for weight in weights(load(model)) if weight.site.endswith("/w")]
    feeds = samples(3, 3, 4)
    rows = np.concatenate([feed["x"] for feed in feeds]).astype(np.float64)
    new = normal(4, 2, seed=1)
    expected = np.sum((rows @ (new - normal(4, 2)).astype(np.float64)) ** 2) / np.sum((rows @ normal(4, 2)) ** 2)
    assert probe(model, feeds).squared_drift({site: new}) == pytest.approx(expected, rel=1e-4)


MASKED = f"""{HEAD} g (float[3, 4] x) => (float[3, 4] y) {{
    h = MatMul(x, w) z = Constant<value = float {{0.0}}>() o = Greater(x, z)
    i = Constant<value = float {{-inf}}>() m = Where(o, h, i) y = Identity(m) }}"""


def test_what_was_infinite_does_not_count() -> None:
    model = model_of(MASKED.replace("{-inf}", "{-1.0}"), w=normal(4, 4))
    holder = next(node for node in model.graph.node if list(node.output) == ["i"])
    for special in (-np.inf, np.nan):
        holder.attribute[0].t.CopyFrom(oracle.value("", np.float32(special)))
        feeds = samples(4, 3, 4)
        values = {"w": normal(4, 4, seed=1)}
        subject = probe(model, feeds)
        assert subject.is_possible
        assert subject.squared_drift(values) == pytest.approx(by_hand(model, values, feeds, 0), rel=1e-5)


@pytest.mark.parametrize("output", ["y", "z"])
@pytest.mark.parametrize("special", [np.nan, np.inf])
def test_what_turns_infinite_is_infinitely_wrong(special: float, output: str) -> None:
    feeds = samples(3, 3, 4)
    name, shape = ("w", (4, 2)) if output == "y" else ("v", (4, 5))
    spoiled = normal(*shape)
    spoiled[0, 0] = special
    model = model_of(TWO_OUTPUTS.replace("Tanh(h)", "Identity(h)"), w=normal(4, 2), v=normal(4, 5))
    other = {"w": normal(4, 2, seed=1), "v": normal(4, 5, seed=1)}
    assert probe(model, feeds).squared_drift({**other, name: spoiled}) == np.inf


def test_an_output_of_another_shape_is_infinitely_wrong() -> None:
    text = f"""{HEAD} g (float[3, 4] x) => (float[N] y) {{
        h = MatMul(x, w) z = Constant<value = float {{0.0}}>() o = Greater(h, z)
        m = Constant<value_ints = [-1]>() f = Reshape(o, m) y = Compress(h, f) }}"""
    subject = probe(model_of(text, w=normal(4, 2)), samples(3, 3, 4))
    assert subject.squared_drift({"w": normal(4, 2) * 2}) == pytest.approx(1.0)
    assert subject.squared_drift({"w": -normal(4, 2)}) == np.inf


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("z = Sub(x, x) y = MatMul(z, w)", "float[3, 2]"),
        ("h = MatMul(x, w) y = ArgMax<axis = 1>(h)", "int64[3, 1]"),
        ("z = Sub(x, x) n = Div(z, z) y = MatMul(n, w)", "float[3, 2]"),
    ],
    ids=["zero", "whole numbers", "NaN"],
)
def test_outputs_that_tell_nothing(body: str, kind: str) -> None:
    model = model_of(f"{HEAD} g (float[3, 4] x) => ({kind} y) {{ {body} }}", w=normal(4, 2))
    subject = probe(model, samples(2, 3, 4))
    assert not subject.is_possible
    assert subject.squared_drift({"w": normal(4, 2, seed=1)}) == 0.0


def test_a_model_that_does_not_run_is_refused() -> None:
    with pytest.raises(ValidationError):
        probe(MODEL, [{"x": normal(3, 5)}])


def test_an_output_that_is_no_tensor_tells_nothing_either() -> None:
    text = f"{HEAD} g (float[3, 4] x) => (float[3, 2] y, seq(float[3, 2]) s) {{ y = MatMul(x, w) s = SequenceConstruct(y, y) }}"
    model, feeds = model_of(text, w=normal(4, 2)), samples(3, 3, 4)
    values = {"w": normal(4, 2, seed=1)}
    assert probe(model, feeds).squared_drift(values) == pytest.approx(by_hand(model, values, feeds, 0), rel=1e-5)
