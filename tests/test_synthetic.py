"""Tests of made-up inputs: each rule for integers, the search for sizes, and every model of the corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, parser

from onnxshrink.errors import InputsError
from onnxshrink.graph.files import load
from onnxshrink.inputs import Samples, read_inputs
from onnxshrink.runtime import session
from onnxshrink.synthetic import synthetic_samples


def samples_of(model: str | onnx.ModelProto, count: int = 20, seed: int = 0, **tables: tuple[int, ...]) -> Samples:
    """Returns samples for a model, or for the inputs, outputs and nodes of one in ONNX's text.

    Args:
        model: the model or the text.
        count: of samples.
        seed: of the samples.
        **tables: name -> shape of float initializers, all zero.
    """
    if isinstance(model, str):
        model = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17, "ai.onnx.ml": 3]> g {model}')
    for name, shape in tables.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(shape, np.float32), name))
    return synthetic_samples(load(model), session(model, role="original"), count, seed)


def values(samples: Samples, name: str) -> set[Any]:
    return set(np.concatenate([feeds[name].reshape(-1) for feeds in samples]).tolist())


class TestValues:
    def test_floats_are_standard_normal_in_their_own_type(self) -> None:
        text = "(float[1000] x, float16[1000] h, double[1000] d) => (float[1000] y) { y = Neg(x) }"
        samples = samples_of(text)
        for name, dtype in (("x", np.float32), ("h", np.float16), ("d", np.float64)):
            drawn = np.concatenate([feeds[name] for feeds in samples])
            assert drawn.dtype == dtype
            assert abs(float(drawn.mean(dtype=np.float64))) < 0.03
            assert abs(float(drawn.std(dtype=np.float64)) - 1) < 0.03

    def test_pixels_bytes_and_booleans_use_their_range(self) -> None:
        text = "(uint8[1000] u, int8[1000] i, bool[1000] b) => (float[1000] y) { f = Cast<to = 1>(u) y = Sub(f, f) }"
        samples = samples_of(text)
        assert values(samples, "u") == set(range(256))
        assert values(samples, "i") == set(range(-128, 128))
        assert values(samples, "b") == {False, True}

    @pytest.mark.parametrize(
        ("path", "dims"),
        [
            ("i = Identity(x)", "a, b"),
            ("c = Cast<to = 6>(x) i = Cast<to = 7>(c)", "a, b"),
            ("a = Constant<value_ints = [5, 10]>() r = Reshape(x, a) i = Transpose(r)", "a, b, c"),
            ("f = Flatten(x) z = Sub(f, f) i = Concat<axis = 0>(z, f)", "a, b, c"),
        ],
    )
    def test_an_id_stays_inside_the_smallest_table(self, path: str, dims: str) -> None:
        text = f"(int64[50] x) => (float[{dims}] y) {{ {path} w = Gather(big, i) y = Gather(small, i) }}"
        assert values(samples_of(text, big=(7, 2), small=(5, 2)), "x") == set(range(5))

    def test_an_id_along_another_axis(self) -> None:
        text = "(int32[50] x) => (float[2, 50] y) { y = Gather<axis = -1>(t, x) }"
        assert values(samples_of(text, t=(2, 3)), "x") == {0, 1, 2}

    def test_a_narrow_id_of_a_large_table(self) -> None:
        text = "(int8[999] x) => (float[999] y) { i = Cast<to = 7>(x) y = Gather(t, i) }"
        assert values(samples_of(text, t=(1000,)), "x") == set(range(128))

    def test_an_axis_that_the_caller_of_a_function_sets_is_not_known(self) -> None:
        model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17, "local": 1]>
            g (int64[50] x) => (float[50] y) { y = local.Look <along = 0> (x) }
            <domain: "local", opset_import: ["": 17]> Look <along> (k) => (h) {
                t = Constant<value = float[2] {3, 4}>() h = Gather <axis: int = @along> (t, k) }""")
        assert values(samples_of(model), "x") == {0, 1}

    def test_an_id_that_is_made_one_hot(self) -> None:
        text = "(int64[50] x) => (float[50, 4] y) <int64 depth = {4}, float[2] v = {0, 1}> { y = OneHot(x, depth, v) }"
        assert values(samples_of(text), "x") == {0, 1, 2, 3}

    def test_an_id_inside_a_branch(self) -> None:
        text = """(int64[50] x, bool f) => (float[50] y) { y = If(f) <
            then_branch = t () => (float[50] a) { a = Gather(t, x) },
            else_branch = e () => (float[50] b) { b = Gather(t, x) }> }"""
        assert values(samples_of(text, t=(6,)), "x") == set(range(6))

    def test_an_id_inside_a_loop(self) -> None:
        text = """(int64[50] x) => (int64[50] z, float[n, 50] y) <int64 n = {2}, bool c = {1}> {
            z, y = Loop(n, c, x) <body = b (int64 i, bool d, int64[50] v) => (bool e, int64[50] w, float[50] a)
                { e = Identity(d) w = Identity(v) a = Gather(t, v) }> }"""
        assert values(samples_of(text, t=(6,)), "x") == set(range(6))

    def test_an_id_inside_a_function(self) -> None:
        model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17, "local": 1]>
            g (int64[50] x) => (float[50, 3] y) { y = local.Look(x) }
            <domain: "local", opset_import: ["": 17]> Look (k) => (h) {
                d = Constant<value_int = 3>() v = Constant<value_floats = [0.0, 1.0]>() h = OneHot(k, d, v) }""")
        constant = model.functions[0].node[0].attribute[0]
        constant.CopyFrom(helper.make_attribute("value", helper.make_tensor("", TensorProto.INT64, [], [3])))
        assert values(samples_of(model), "x") == {0, 1, 2}

    def test_a_scalar_compared_with_constants_is_the_first_of_them(self) -> None:
        text = """(int64 sr) => (bool a, bool b) <int64 c = {16000}, int64 d = {8000}>
            { a = Equal(sr, c) b = Equal(d, sr) }"""
        assert len(values(samples_of(text), "sr")) == 1
        assert values(samples_of(text), "sr") <= {16000, 8000}

    def test_comparison_inside_a_branch(self) -> None:
        text = """(int64 sr, bool f) => (bool y) { y = If(f) <
            then_branch = t () => (bool a) { c = Constant<value_int = 16000>() k = Constant<value = int64 {8000}>() a = Equal(sr, k) },
            else_branch = e () => (bool b) { b = Not(f) }> }"""
        assert values(samples_of(text), "sr") == {8000}

    def test_a_tensor_compared_with_many_constants_takes_all_of_them(self) -> None:
        text = "(int32[99, 1] x) => (bool[99, 3] y) <int32[3] c = {5, 70, 900}> { y = Equal(x, c) }"
        assert values(samples_of(text), "x") == {5, 70, 900}

    def test_a_tensor_compared_with_one_constant_is_not_always_it(self) -> None:
        text = "(int64[99] x) => (bool[99] y) <int64 pad = {3}> { y = Equal(x, pad) }"
        assert values(samples_of(text), "x") == {0, 1, 3}

    @pytest.mark.parametrize(
        ("name", "use"),
        [
            ("attention_mask", "y = Neg(x)"),
            ("x", "f = Cast<to = 1>(x) y = Sub(f, f)"),
            ("x", "f = Cast<to = 1>(x) y = Mul(f, f)"),
        ],
    )
    def test_masks_are_ones(self, name: str, use: str) -> None:
        text = f"(int64[20] {name}) => (float[20] y) {{ {use.replace('x', name)} }}"
        model = text.replace("(float[20] y)", "(int64[20] y)") if "Neg" in use else text
        assert values(samples_of(model), name) == {1}

    @pytest.mark.parametrize(
        "text",
        [
            "(float[1, 1] a, int64[2] x) => (float[b, c] y) { y = Reshape(a, x) }",
            "(float[1, 4] a, int64[2] x) => (float[b, c] y) { y = Expand(a, x) }",
            "(int64[2] x) => (float[b, c] y) { y = ConstantOfShape(x) }",
            "(float[1, 4] a, int64[1] x) => (float[b, c] y, int64[d, e] z) { y, z = TopK(a, x) }",
        ],
    )
    def test_shapes_and_counts_are_ones(self, text: str) -> None:
        assert values(samples_of(text), "x") == {1}

    def test_other_integers_are_0_or_1(self) -> None:
        assert values(samples_of("(int64[20] x) => (int64[20] y) { y = Neg(x) }"), "x") == {0, 1}

    def test_text_is_what_the_encoder_knows(self) -> None:
        text = """(string[20] x) => (int64[20] y)
            { y = ai.onnx.ml.LabelEncoder<keys_strings = ["cat", "dog"], values_int64s = [0, 1]>(x) }"""
        assert values(samples_of(text), "x") == {"cat", "dog"}
        assert values(samples_of("(string[2] x) => (string[2] y) { y = Identity(x) }"), "x") == {"a"}

    def test_floats_are_tamed_where_outputs_would_not_be_finite(self) -> None:
        drawn = values(samples_of("(float[100] x) => (float[100] y) { y = Sqrt(x) }"), "x")
        assert min(drawn) >= 0
        assert max(drawn) <= 1
        never = values(samples_of("(float[100] x) => (float[100] y) { z = Sub(x, x) y = Div(z, z) }"), "x")
        assert min(never) < 0


class TestSamples:
    def test_seed_and_index_decide(self) -> None:
        text = "(float[4] x, bool[4] b) => (float[4] y) { y = Neg(x) }"
        one, same, other = samples_of(text, 3, 1), samples_of(text, 3, 1), samples_of(text, 3, 2)
        for index in (2, 0, 1):
            np.testing.assert_array_equal(one[index]["x"], same[index]["x"])
            np.testing.assert_array_equal(one[index]["b"], same[index]["b"])
            assert (one[index]["x"] != other[index]["x"]).all()
        assert (one[0]["x"] != one[1]["x"]).all()
        assert len(one) == 3
        assert one.source == "synthetic inputs (seed 1)"

    def test_optional_inputs_are_not_fed(self) -> None:
        model = parser.parse_model(
            '<ir_version: 8, opset_import: ["": 17]> g (float[2] x, float[2] w) => (float[2] y) { y = Add(x, w) }'
        )
        model.graph.initializer.append(helper.make_tensor("w", TensorProto.FLOAT, [2], [1, 2]))
        assert samples_of(model)[0].keys() == {"x"}

    def test_count_must_be_positive(self) -> None:
        with pytest.raises(InputsError, match=r"^synthetic inputs: number of samples must be at least 1, got 0$"):
            samples_of("(float[4] x) => (float[4] y) { y = Neg(x) }", 0)


class TestSizes:
    @pytest.mark.parametrize(
        ("text", "tables", "shapes"),
        [
            ("(float[N, 3] x) => (float[N, 3] y) { y = Neg(x) }", {}, {"x": (1, 3)}),
            ("(float[b, s] x, float[b, s] z) => (float[b, s] y) { y = Add(x, z) }", {}, {"x": (1, 64), "z": (1, 64)}),
            ("(float[b, s] x, float[2, b] z) => (float[2, b] y) { y = Neg(z) }", {}, {"x": (1, 64), "z": (2, 1)}),
            ("(float[b, s] x) => (float[c, d] y) { y = MatMul(x, w) }", {"w": (224, 2)}, {"x": (1, 224)}),
            (
                "(float[b, s] x, float[b, t] z) => (float[c, d] y, float[e, f] v) { y = MatMul(x, w) v = MatMul(z, u) }",
                {"w": (320, 2), "u": (48, 2)},
                {"x": (1, 320), "z": (1, 48)},
            ),
            ("(float[n] x) => (float y) { y = MatMul(x, w) }", {"w": (32,)}, {"x": (32,)}),
        ],
    )
    def test_open_sizes_that_run_are_found(self, text: str, tables: dict[str, Any], shapes: dict[str, Any]) -> None:
        sample = samples_of(text, **tables)[0]
        assert {name: array.shape for name, array in sample.items()} == shapes

    def test_past_and_total_lengths_are_found(self) -> None:
        text = """(float[b, s] x, float[b, past] p, float[b, total] m) => (float[b, total] y)
            { c = Concat<axis = 1>(p, x) y = Mul(c, m) }"""
        sample = samples_of(text)[0]
        assert sample["m"].shape[1] == sample["x"].shape[1] + sample["p"].shape[1]

    def test_nameless_sizes_are_independent(self) -> None:
        model = parser.parse_model(
            """<ir_version: 8, opset_import: ["": 17]> g (float[p, q] x, float[2, q, 4] h) => (float[2, 1, 4] y, float[p, q] z)
            { s = Constant<value_ints = [2, 1, 4]>() y = Reshape(h, s) t = Constant<value_ints = [1, 64]>() z = Reshape(x, t) }"""
        )
        with pytest.raises(InputsError):  # one symbol, two sizes
            samples_of(model)
        for value in model.graph.input:
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param:
                    dim.Clear()
        sample = samples_of(model)[0]
        assert sample["h"].shape == (2, 1, 4)
        assert sample["x"].shape == (1, 64)

    def test_none_runs(self) -> None:
        with pytest.raises(InputsError) as caught:
            samples_of("(float[b, s] x) => (float[c, d] y) { y = MatMul(x, w) }", w=(17, 2))
        message = str(caught.value)
        assert message.startswith("synthetic inputs: the model runs with none of 28 guesses at the open sizes, ")
        assert "the last with b=4, s=4: original model: ONNX Runtime cannot run it: MatMul node" in message
        assert message.endswith("; give real inputs (--calib, --inputs)")

    def test_fixed_sizes_that_do_not_run(self) -> None:
        text = "(float[2] x) => (float[a] y) { t = Shape(x) u = Mul(t, t) y = Reshape(x, u) }"
        with pytest.raises(InputsError, match="none of 1 guesses at the open sizes, the last with fixed shapes: "):
            samples_of(text)

    def test_the_search_is_bounded(self) -> None:
        inputs = ", ".join(f"float[b, s{k}] x{k}" for k in range(6))
        with pytest.raises(InputsError, match="none of 378 guesses"):
            samples_of(f"({inputs}) => (float[c, d] y) {{ y = MatMul(x0, w) }}", w=(17, 2))


class TestCorpus:
    def test_every_model_runs_and_accepts_its_inputs(self, corpus_model: Path) -> None:
        with session(corpus_model, role="original") as running:
            samples = synthetic_samples(load(corpus_model), running, 2, seed=1)
            for feeds in read_inputs(samples, running.inputs)[:1]:
                outputs = running.run(feeds)
                assert outputs
                assert all(np.isfinite(array.astype(np.float64)).all() for array in outputs.values())
