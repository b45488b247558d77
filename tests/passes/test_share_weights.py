"""Shared weights as ONNX Runtime decodes them, against weights made by hand with the public functions of numerics.

`decoded` asks ONNX Runtime for the weight itself, as one more output: nothing of onnxshrink takes part in the decoding.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxshrink import compress, expand
from onnxshrink import load as load_session
from onnxshrink.calibrate import Calibration
from onnxshrink.contract import Change, Context, Report, Rule
from onnxshrink.errors import OptionError
from onnxshrink.graph.coded import coded_weights, expand_coded
from onnxshrink.graph.edit import sort_nodes
from onnxshrink.graph.exporter import to_model
from onnxshrink.graph.files import load
from onnxshrink.inputs import Feeds, Samples
from onnxshrink.numerics.clusters import kmeans_1d, kmeans_rows, nearest, nearest_rows
from onnxshrink.numerics.grids import decode, encode, fit_grid
from onnxshrink.passes.huffman import Huffman
from onnxshrink.passes.share_weights import ShareWeights
from onnxshrink.passes.tidy import Tidy
from onnxshrink.testing import check_pass
from onnxshrink.testing_models import awkward_models
from tests import oracle

Array = np.ndarray[Any, np.dtype[Any]]
OPSETS = (7, 9, 10, 13, 21, 26)


def normal(*shape: int, seed: int = 0, dtype: Any = np.float32) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def uneven(*shape: int) -> Array:
    """Returns weights whose output channels, on the last axis, differ in size a hundredfold."""
    return normal(*shape) * np.geomspace(0.1, 10, shape[-1]).astype(np.float32)


def dense(weight: Array, opset: int = 13) -> onnx.ModelProto:
    """Returns y = x · w, computed in float32 or float64."""
    kind = helper.np_dtype_to_tensor_dtype(weight.dtype)
    wide = TensorProto.DOUBLE if weight.dtype == np.float64 else TensorProto.FLOAT
    nodes = [helper.make_node("Cast", ["w"], ["wide"], to=wide), helper.make_node("MatMul", ["x", "wide"], ["y"])]
    if kind == wide:
        nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    inputs, outputs = [oracle.tensor("x", [1, len(weight)], wide)], [oracle.tensor("y", [1, weight.shape[1]], wide)]
    return oracle.make_model(nodes, inputs, outputs, [oracle.value("w", weight)], opset=opset)


def looked_up(*tables: Array) -> onnx.ModelProto:
    """Returns y0 = w0[ids], y1 = w1[ids], ..."""
    nodes = [helper.make_node("Gather", [f"w{at}", "ids"], [f"y{at}"]) for at in range(len(tables))]
    kinds = [helper.np_dtype_to_tensor_dtype(table.dtype) for table in tables]
    outputs = [oracle.tensor(f"y{at}", ["n", "m", 64], kind) for at, kind in enumerate(kinds)]
    values = [oracle.value(f"w{at}", table) for at, table in enumerate(tables)]
    return oracle.make_model(nodes, [oracle.tensor("ids", ["n", "m"], TensorProto.INT64)], outputs, values)


def run(
    subject: ShareWeights,
    model: onnx.ModelProto,
    *rules: Rule,
    feeds: Sequence[Feeds] = (),
    executor: Executor | None = None,
) -> tuple[onnx.ModelProto, Report]:
    """Returns what the pass makes of a model, with calibration data if there are feeds."""
    graph = load(model)
    data = Calibration(Samples(lambda index: feeds[index], range(len(feeds)), "test"), threads=1) if feeds else None
    report = subject.apply(graph, Context(rules=rules, activations=data, executor=executor))
    sort_nodes(graph)
    result = to_model(graph)
    onnx.checker.check_model(result, full_check=True)
    return result, report


def decoded(model: onnx.ModelProto, name: str = "w") -> Array:
    """Returns what ONNX Runtime makes of a tensor."""
    model = copy.deepcopy(model)
    model.graph.output.append(onnx.ValueInfoProto(name=name))
    running = oracle.session(model)
    return oracle.run(running, oracle.random_feeds(running))[-1]


def shared(subject: ShareWeights, weight: Array, opset: int = 13) -> tuple[Array, onnx.ModelProto, Report]:
    """Returns the weight as decoded, the model, and the report of a pass that did share it."""
    result, report = run(subject, dense(weight, opset))
    assert [change.site for change in report.changes] == ["w"]
    return decoded(result), result, report


def same_outputs(one: onnx.ModelProto, other: onnx.ModelProto) -> bool:
    sessions = oracle.session(one), oracle.session(other)
    feeds = oracle.random_feeds(sessions[0])
    return all(map(oracle.same_bits, *(oracle.run(running, feeds) for running in sessions)))


def quantized(weight: Array, bits: int, method: str, per: str) -> Array:
    """Returns the weight, [inputs, outputs], as the options say it is stored; not for scales, which have a test of their own."""
    rows = weight.reshape(1, -1) if per == "tensor" else np.ascontiguousarray(weight.T)
    if method == "uniform":
        grid = fit_grid(rows, bits)
        values = decode(encode(rows, grid), grid)
    elif per == "tensor":
        codebook = kmeans_1d(rows, 2**bits).astype(weight.dtype)
        values = codebook[nearest(rows, codebook)]
    else:
        codebooks = kmeans_rows(rows, 2**bits).astype(weight.dtype)
        values = np.take_along_axis(codebooks, nearest_rows(rows, codebooks).astype(np.intp), axis=1)
    return (values.reshape(weight.shape) if per == "tensor" else values.T).astype(weight.dtype)


class TestExact:
    @pytest.mark.parametrize("opset", OPSETS)
    @pytest.mark.parametrize("distinct", [1, 2, 3, 16, 17, 100, 256])
    def test_few_values_come_back_bit_for_bit(self, distinct: int, opset: int) -> None:
        palette = normal(distinct)
        weight = np.resize(palette, (64, 48))
        np.random.default_rng(0).shuffle(weight.ravel())
        got, result, report = shared(ShareWeights(method="exact"), weight, opset)
        assert got.tobytes() == weight.tobytes()
        assert same_outputs(dense(weight, opset), result)
        assert report.changes[0].detail == f"exact: {distinct} distinct values"

    @pytest.mark.parametrize("method", ["auto", "exact", "kmeans", "uniform"])
    def test_is_tried_first_whatever_the_method(self, method: str) -> None:
        weight = np.resize(normal(16), (32, 32))
        got, _, report = shared(ShareWeights(bits=4, method=method), weight)
        assert got.tobytes() == weight.tobytes()
        assert report.changes[0].detail == "exact: 16 distinct values"

    def test_signs_of_zero_and_what_is_not_finite_survive(self) -> None:
        weight = np.resize(np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-42], np.float32), (32, 32))
        weight[0, 0] = np.array([0x7FC12345], np.uint32).view(np.float32)[0]
        got, _, report = shared(ShareWeights(), weight)
        assert got.tobytes() == weight.tobytes()
        assert report.changes[0].detail == "exact: 7 distinct values"

    def test_what_has_more_values_is_left_alone(self) -> None:
        weight = np.resize(normal(17), (32, 32))
        model = dense(weight)
        result, report = run(ShareWeights(bits=4, method="exact"), model)
        assert result.SerializeToString() == to_model(load(model)).SerializeToString()
        assert [skip.reason for skip in report.skips] == ["more than 16 distinct values"]

    def test_reaches_weights_that_must_not_change(self) -> None:
        """A bias or an added constant may be stored otherwise, as long as it stays what it is."""
        constant = np.resize(normal(3), (32, 32))
        node = helper.make_node("Add", ["x", "w"], ["y"])
        model = oracle.make_model(
            [node], [oracle.tensor("x", [32, 32])], [oracle.tensor("y", [32, 32])], [oracle.value("w", constant)]
        )
        result, report = run(ShareWeights(), model)
        assert decoded(result).tobytes() == constant.tobytes()
        model.graph.initializer[0].CopyFrom(oracle.value("w", normal(32, 32)))
        _, report = run(ShareWeights(), model)
        assert [skip.reason for skip in report.skips] == [
            "more than 256 distinct values; is read as input 1 of Add, which is no weight operand"
        ]


class TestApproximate:
    @pytest.mark.parametrize("per", ["tensor", "channel"])
    @pytest.mark.parametrize("method", ["kmeans", "uniform"])
    @pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
    def test_is_what_the_options_say(self, bits: int, method: str, per: str) -> None:
        weight = uneven(800 if per == "channel" else 40, 24)  # long rows: a codebook for each must pay
        expected = quantized(weight, bits, method, per)
        got, result, _ = shared(ShareWeights(bits=bits, method=method, per=per), weight)
        np.testing.assert_array_equal(got, expected)
        assert same_outputs(dense(expected), result)

    @pytest.mark.parametrize("bits", [1, 2, 5, 8])
    def test_with_scales_is_a_codebook_of_halves_times_a_scale_of_each_channel(self, bits: int) -> None:
        weight = uneven(400, 24)
        got, result, report = shared(ShareWeights(bits=bits, method="kmeans"), weight)
        (scale,) = [array for name, array in initializers(result).items() if name == "w.scale"]
        wide = weight.astype(np.float64)
        wanted = np.sqrt(np.abs(wide).max(axis=0) * np.sqrt(np.mean(wide**2, axis=0)))
        np.testing.assert_allclose(scale, wanted[None], rtol=1e-5)
        scaled = np.ascontiguousarray((weight / scale).T)
        codebook = kmeans_1d(scaled, 2**bits).astype(np.float16)
        expected = (codebook[nearest(scaled, codebook)].astype(np.float32) * scale.T).T
        np.testing.assert_array_equal(got, expected)
        assert same_outputs(dense(expected), result)
        assert report.changes[0].detail == f"k-means to {2**bits} values, 24 channels, scaled"

    @pytest.mark.parametrize(("rows", "words"), [(400, "k-means to 16 values, "), (8, "uniform grid of 4 bits, ")])
    def test_auto_takes_a_codebook_where_it_pays(self, rows: int, words: str) -> None:
        _, _, report = shared(ShareWeights(bits=4), uneven(rows, 60))
        assert report.changes[0].detail.startswith(words)

    def test_more_bits_are_never_worse(self) -> None:
        weight = uneven(300, 16)
        for method, per in (("kmeans", "scale"), ("kmeans", "tensor"), ("uniform", "channel")):
            errors = [
                float(np.sum((shared(ShareWeights(bits=bits, method=method, per=per), weight)[0] - weight) ** 2.0))
                for bits in (1, 2, 3, 5, 7)
            ]
            assert errors == sorted(errors, reverse=True)
            assert errors[-1] < 2e-3 * errors[0]

    @pytest.mark.parametrize("bits", [1, 3, 4, 6, 7])
    def test_is_the_same_at_every_opset(self, bits: int) -> None:
        weight = normal(61, 37)  # no multiple of eight: the last byte of every plane is padded
        expected = quantized(weight, bits, "kmeans", "tensor")
        for opset in OPSETS:
            got, _, _ = shared(ShareWeights(bits=bits, method="kmeans", per="tensor"), weight, opset)
            np.testing.assert_array_equal(got, expected)

    @pytest.mark.parametrize("opset", OPSETS)
    def test_16_bits_are_float16(self, opset: int) -> None:
        weight = normal(32, 32)
        got, result, report = shared(ShareWeights(bits=16), weight, opset)
        np.testing.assert_array_equal(got, weight.astype(np.float16).astype(np.float32))
        assert same_outputs(dense(got, opset), result)
        assert report.changes[0].detail == "float16"

    @pytest.mark.parametrize("spoil", [np.nan, np.inf])
    def test_is_not_for_what_is_not_finite(self, spoil: float) -> None:
        weight = normal(32, 32)
        weight[3, 4] = spoil
        _, report = run(ShareWeights(), dense(weight))
        assert [skip.reason for skip in report.skips] == ["holds NaN or infinity"]


class TestZeros:
    @pytest.mark.parametrize("per", ["tensor", "channel", "scale"])
    @pytest.mark.parametrize("method", ["kmeans", "uniform", "auto"])
    @pytest.mark.parametrize("bits", [1, 2, 4])
    def test_of_a_pruned_weight_survive(self, bits: int, method: str, per: str) -> None:
        weight = uneven(200, 16) + np.float32(0.02)
        weight[np.abs(weight) < np.quantile(np.abs(weight), 0.7, axis=0)] = 0
        got, _, _ = shared(ShareWeights(bits=bits, method=method, per=per), weight)
        assert not got[weight == 0].any()
        assert got[weight != 0].any()


class TestRange:
    @pytest.mark.parametrize("size", [1e-42, 1e-30, 1e25, 3e38])
    def test_one_channel_of_extreme_size_does_not_spoil_itself_or_others(self, size: float) -> None:
        weight = np.clip(normal(400, 16), -1, 1)
        weight[:, 3] *= np.float32(size)
        got, _, _ = shared(ShareWeights(bits=6), weight)
        for column in range(16):
            wanted, found = weight[:, column].astype(np.float64), got[:, column].astype(np.float64)
            assert np.linalg.norm(found - wanted) < 0.05 * np.linalg.norm(wanted)

    def test_channels_of_zeros_and_of_one_value_stay_what_they_are(self) -> None:
        weight = normal(400, 16)
        weight[:, 2], weight[:, 5] = 0, 0.25
        got, _, _ = shared(ShareWeights(bits=5), weight)
        assert not got[:, 2].any()
        np.testing.assert_allclose(got[:, 5], 0.25, rtol=0.05)

    def test_beyond_float32_a_weight_is_left_alone(self) -> None:
        weight = normal(64, 64, dtype=np.float64)
        weight[0, 0] = 1e300
        _, report = run(ShareWeights(bits=4), dense(weight))
        assert [skip.reason for skip in report.skips] == ["holds values beyond the range of float32"]

    def test_beyond_float16_a_weight_is_not_halved(self) -> None:
        weight = normal(64, 64)
        weight[0, 0] = 1e5
        _, report = run(ShareWeights(bits=16), dense(weight))
        assert [skip.reason for skip in report.skips] == ["has values beyond the range of float16"]


class TestTypes:
    @pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
    @pytest.mark.parametrize(
        ("bits", "method", "per"), [(4, "kmeans", "tensor"), (4, "uniform", "tensor"), (5, "kmeans", "scale")]
    )
    def test_are_kept(self, dtype: Any, bits: int, method: str, per: str) -> None:
        weight = normal(96, 64, dtype=dtype)
        result, report = run(ShareWeights(bits=bits, method=method, per=per), dense(weight))
        assert [change.site for change in report.changes] == ["w"]
        got = decoded(result)
        got = got.view(dtype).reshape(weight.shape) if got.dtype == np.uint8 else got  # bfloat16 comes as bytes
        assert got.dtype == weight.dtype
        if per == "tensor":
            np.testing.assert_array_equal(got, quantized(weight, bits, method, per))
        error, scale = (got.astype(np.float64) - weight.astype(np.float64)), np.std(weight.astype(np.float64))
        assert np.sqrt(np.mean(error**2)) < 0.2 * scale

    @pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
    def test_of_two_bytes_are_not_halved(self, dtype: Any) -> None:
        _, report = run(ShareWeights(bits=16), dense(normal(64, 64, dtype=dtype)))
        assert [skip.reason for skip in report.skips] == [f"is {np.dtype(dtype).name} already"]

    def test_of_integers_are_left_alone(self) -> None:
        node = helper.make_node("Gather", ["w", "x"], ["y"])
        ids = oracle.tensor("x", [3], TensorProto.INT64)
        values = np.resize(np.arange(5), (100, 8))
        model = oracle.make_model(
            [node], [ids], [oracle.tensor("y", [3, 8], TensorProto.INT64)], [oracle.value("w", values)]
        )
        _, report = run(ShareWeights(), model)
        assert [skip.reason for skip in report.skips] == ["holds int64 values, not floating point"]


class TestSize:
    @pytest.mark.parametrize("bits", [1, 2, 3, 5, 7, 8])
    @pytest.mark.parametrize(("method", "per"), [("kmeans", "tensor"), ("kmeans", "scale"), ("uniform", "channel")])
    def test_is_about_the_bits_asked_for(self, bits: int, method: str, per: str) -> None:
        weight = normal(256, 64)
        result, report = run(ShareWeights(bits=bits, method=method, per=per), dense(weight))
        payload = bits * weight.size / 8
        assert payload < result.ByteSize() < payload + 4000  # nodes, 256 values, scales and zero points of 64 channels
        measured = result.ByteSize() - dense(weight).ByteSize()
        assert abs(sum(c.bytes_after - c.bytes_before for c in report.changes) - measured) <= 16

    def test_never_grows(self) -> None:
        grown, kept = [], 0
        for count in (2, 5, 20, 60, 100, 200, 300, 500, 1000, 3000):
            for subject in (
                ShareWeights(),
                ShareWeights(bits=1),
                ShareWeights(bits=8, per="channel"),
                ShareWeights(bits=16),
            ):
                model = dense(normal(count, 2))
                result, report = run(subject, model)
                grown += [(count, subject)] if result.ByteSize() > model.ByteSize() else []
                kept += len(report.skips)
                if report.skips:
                    assert report.skips[0].reason.startswith("too small to gain: ")
                    assert result.SerializeToString() == to_model(load(model)).SerializeToString()
        assert grown == []
        assert 10 < kept < 40  # both happened

    @pytest.mark.parametrize(
        "subject", [ShareWeights(bits=4), ShareWeights(bits=3, method="uniform"), ShareWeights(bits=16)]
    )
    @pytest.mark.parametrize("opset", OPSETS)
    def test_nothing_is_left_to_decode_at_run_time(self, tmp_path: Path, subject: ShareWeights, opset: int) -> None:
        model = dense(normal(128, 64), opset)
        result, _ = run(subject, model)
        ops = []
        for name, candidate in (("before", model), ("after", result)):
            path = tmp_path / f"{name}.onnx"
            oracle.session(candidate, optimised_to=path)
            ops.append([node.op_type for node in onnx.load(path).graph.node])
        assert ops[0] == ops[1] == ["MatMul"]


class TestSites:
    def test_below_opset_7_nothing_can_decode(self) -> None:
        model = oracle.make_model(
            [helper.make_node("MatMul", ["x", "w"], ["y"])],
            [oracle.tensor("x", [1, 64])],
            [oracle.tensor("y", [1, 64])],
            [oracle.value("w", normal(64, 64))],
            opset=6,
        )
        result, report = run(ShareWeights(), model)
        assert [(skip.site, skip.reason) for skip in report.skips] == [
            ("w", "opset 6 is below 7, the first that can decode it")
        ]
        assert result.SerializeToString() == to_model(load(model)).SerializeToString()

    @pytest.mark.parametrize(
        ("node", "shape", "weight", "axis"),
        [
            (helper.make_node("Conv", ["x", "w"], ["y"]), [1, 8, 9, 9], (32, 8, 3, 3), 0),
            (helper.make_node("ConvTranspose", ["x", "w"], ["y"]), [1, 8, 9, 9], (8, 32, 3, 3), 1),
            (helper.make_node("Gemm", ["x", "w"], ["y"], transB=1), [1, 64], (32, 64), 0),
            (helper.make_node("MatMul", ["x", "w"], ["y"]), [3, 1, 64], (3, 64, 32), 2),
            (helper.make_node("MatMul", ["w", "x"], ["y"]), [64, 2], (32, 64), 0),
        ],
        ids=["Conv", "ConvTranspose", "transB", "batched", "left"],
    )
    def test_channels_are_those_of_the_op(
        self, node: onnx.NodeProto, shape: list[int], weight: tuple[int, ...], axis: int
    ) -> None:
        sizes = np.geomspace(0.01, 100, weight[axis]).astype(np.float32)
        values = normal(*weight) * sizes.reshape([-1 if at == axis else 1 for at in range(len(weight))])
        rank = max(len(shape), len(weight))
        model = oracle.make_model(
            [node], [oracle.tensor("x", shape)], [oracle.tensor("y", [None] * rank)], [oracle.value("w", values)]
        )
        result, _ = run(ShareWeights(bits=4, method="uniform", per="channel"), model)
        rows = np.moveaxis(values, axis, 0).reshape(weight[axis], -1)
        grid = fit_grid(rows, 4)
        others = [size for at, size in enumerate(weight) if at != axis]
        expected = np.moveaxis(decode(encode(rows, grid), grid).reshape(weight[axis], *others), 0, axis)
        np.testing.assert_array_equal(decoded(result), expected)

    def test_a_grouped_transposed_convolution_has_no_channel_axis(self) -> None:
        values = normal(8, 16, 3, 3)
        node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], group=2)
        model = oracle.make_model(
            [node], [oracle.tensor("x", [1, 8, 5, 5])], [oracle.tensor("y", [1, 32, 7, 7])], [oracle.value("w", values)]
        )
        result, _ = run(ShareWeights(bits=4, method="kmeans", per="channel"), model)
        np.testing.assert_array_equal(decoded(result), quantized(values, 4, "kmeans", "tensor"))

    def test_a_tied_weight_is_stored_once(self) -> None:
        nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["y"])]
        model = oracle.make_model(
            nodes, [oracle.tensor("x", [1, 64])], [oracle.tensor("y", [1, 64])], [oracle.value("w", normal(64, 64))]
        )
        result, report = run(ShareWeights(bits=4), model)
        assert [change.site for change in report.changes] == ["w"]
        assert [name for name in initializers(result) if "codes" in name] == ["w.codes"]

    def test_rules_set_each_layer_by_itself(self) -> None:
        names = ["a", "b", "c", "d"]
        nodes = [
            helper.make_node("MatMul", [source, name], [f"{name}_out"], name=f"node_{name}")
            for source, name in zip("xabc", names, strict=True)
        ]
        for node, source in zip(nodes[1:], names, strict=False):
            node.input[0] = f"{source}_out"
        values = {name: normal(64, 64, seed=index) for index, name in enumerate(names)}
        model = oracle.make_model(
            nodes,
            [oracle.tensor("x", [1, 64])],
            [oracle.tensor("d_out", [1, 64])],
            [oracle.value(*item) for item in values.items()],
        )
        rules = [Rule("b", {"bits": 3, "per": "tensor"}), Rule("node_c", skip=True), Rule("d_out", {"bits": 16})]
        result, report = run(ShareWeights(bits=2, method="kmeans", per="tensor"), model, *rules)
        assert [len(np.unique(decoded(result, name))) for name in ("a", "b")] == [4, 8]
        np.testing.assert_array_equal(decoded(result, "c"), values["c"])
        np.testing.assert_array_equal(decoded(result, "d"), values["d"].astype(np.float16).astype(np.float32))
        assert [(skip.site, skip.reason) for skip in report.skips] == [("c", "left alone by a rule")]

    def test_an_initializer_that_callers_could_override_is_told(self) -> None:
        model = dense(np.resize(normal(9), (64, 64)), opset=8)
        model.graph.input.append(oracle.tensor("w", [64, 64]))
        result, report = run(ShareWeights(), model)
        assert report.changes[0].detail == "exact: 9 distinct values; no longer a graph input that callers can override"
        assert [value.name for value in result.graph.input] == ["x"]

    @pytest.mark.parametrize("options", [{"bits": 8}, {"bits": 5, "method": "uniform"}, {"bits_per_weight": 4.5}], ids=str)
    def test_a_large_table_stays_coded_at_run_time(self, options: dict[str, Any], tmp_path: Path) -> None:
        model = looked_up(normal(4096, 64), normal(4095, 64), np.resize(normal(9), (4096, 64)))
        result, report = run(ShareWeights(**options), model)
        details = {change.site: change.detail for change in report.changes}
        at_run_time = {site for site, detail in details.items() if detail.endswith(", coded at run time")}
        assert (set(details), at_run_time) == ({"w0", "w1", "w2"}, {"w0", "w2"}), "the other has less than a MiB"
        running = oracle.session(result, optimised_to=tmp_path / "optimised.onnx")
        expanded = load(result)
        expand_coded(expanded)
        dense_again = {constant.name: constant.values for constant in expanded.constants}
        feeds = {"ids": np.random.default_rng(0).integers(0, 4095, (3, 50))}
        outputs = oracle.run(running, feeds)
        for index, output in enumerate(outputs):
            assert output.tobytes() == dense_again[f"w{index}"][feeds["ids"]].tobytes()
        kept = onnx.load(tmp_path / "optimised.onnx").graph.initializer
        large = {item.data_type for item in kept if list(item.dims) == [4096, 64]}
        assert large == {TensorProto.UINT8}
        again, report = run(ShareWeights(bits=2), result)
        assert again.SerializeToString() == result.SerializeToString()
        assert {skip.site for skip in report.skips if skip.reason == "is stored as codes already"} == {"w0", "w1", "w2"}

    def test_keeps_the_contract_with_tables(self) -> None:
        model = looked_up(normal(4096, 64), normal(4096, 64, seed=1).astype(np.float16), np.resize(normal(9), (4096, 64)))
        for subject in (ShareWeights(bits=8, method="uniform"), ShareWeights(bits=3, per="tensor")):
            check_pass(subject, [("tables", model)])
            check_pass(Tidy(), [("coded tables", run(subject, model)[0])])

    def test_what_is_coded_already_is_left_alone(self) -> None:
        once, _ = run(ShareWeights(bits=4), dense(normal(64, 64)))
        twice, report = run(ShareWeights(bits=2), once)
        assert twice.SerializeToString() == once.SerializeToString()
        assert ("w", "is stored as codes already") in [(skip.site, skip.reason) for skip in report.skips]
        assert not report.changes


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"bits": 0}, "share-weights: bits must be a whole number from 1 to 16, got 0"),
            ({"bits": 17}, "share-weights: bits must be a whole number from 1 to 16, got 17"),
            ({"bits": 12}, "share-weights: bits must be 1 to 8, or 16 for float16, got 12"),
            ({"method": "huffman"}, "share-weights: method must be one of auto, exact, kmeans, uniform, got 'huffman'"),
            ({"per": "row"}, "share-weights: per must be one of tensor, channel, scale, got 'row'"),
            ({"bits_per_weight": 0.01}, "share-weights: bits-per-weight must be a number from 0.1 to 8, got 0.01"),
            ({"bits_per_weight": 9.0}, "share-weights: bits-per-weight must be a number from 0.1 to 8, got 9.0"),
            ({"sqnr": 121.0}, "share-weights: sqnr must be a number from -20 to 120, got 121.0"),
            ({"repair": 1}, "share-weights: repair must be true or false, got 1"),
            (
                {"bits_per_weight": 3.0, "sqnr": 30.0},
                "share-weights: bits-per-weight and sqnr both set the steps; give one of them",
            ),
            ({"step": 0.3, "sqnr": 30.0}, "share-weights: sqnr and step both set the steps; give one of them"),
            (
                {"step": 0.3, "method": "kmeans"},
                "share-weights: step sets the steps of uniform grids; leave out method=kmeans",
            ),
            (
                {"sqnr": 30.0, "per": "tensor"},
                "share-weights: sqnr gives every channel a step of its own; leave out per=tensor",
            ),
            ({"block": 3}, "share-weights: block must be a whole number from 4 to 65536, got 3"),
            ({"channels_per_scale": 0}, "share-weights: channels-per-scale must be a whole number from 1 to 65536, got 0"),
            (
                {"block": 32, "sqnr": 30.0},
                "share-weights: sqnr gives every channel a step of its own; leave out block",
            ),
            (
                {"block": 32, "channels_per_scale": 2, "bits_per_weight": 3.0},
                "share-weights: bits-per-weight gives every channel a step of its own; leave out block and channels-per-scale",
            ),
            (
                {"channels_per_scale": 2, "per": "tensor"},
                "share-weights: per=tensor has no scales to share; leave out per=tensor or channels-per-scale",
            ),
            (
                {"block": 32, "per": "channel"},
                "share-weights: a set of values for every block would outweigh its codes; block wants per=scale",
            ),
        ],
    )
    def test_that_make_no_sense_are_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(OptionError) as caught:
            ShareWeights(**options)
        assert str(caught.value) == message

    def test_weaker_is_one_bit_more_up_to_eight(self) -> None:
        seen, subject = [], ShareWeights(bits=3, method="uniform", per="channel")
        while subject is not None:
            assert (subject.method, subject.per) == ("uniform", "channel")
            seen.append(subject.bits)
            subject = subject.weaker()
        assert seen == [3, 4, 5, 6, 7, 8]
        assert ShareWeights(bits=16).weaker() is None

    def test_weaker_is_a_finer_step(self) -> None:
        seen, subject = [], ShareWeights(step=0.5, bits=4)
        while subject is not None:
            assert subject.bits == 4
            seen.append(subject.step)
            subject = subject.weaker()
        assert seen == pytest.approx(list(0.5 * 0.7 ** np.arange(len(seen))))
        assert 0.02 <= seen[-1] < 0.02 / 0.7
        assert ShareWeights(step=0.5, bits=16).weaker() is None

    @pytest.mark.parametrize("least", [0.1, 1.0, 3.0, 7.9])
    def test_weaker_is_a_tenth_more_bits_up_to_eight(self, least: float) -> None:
        seen, subject = [], ShareWeights(bits_per_weight=least)
        while subject is not None:
            seen.append(subject.bits_per_weight)
            subject = subject.weaker()
        assert seen == pytest.approx(list(least * 1.1 ** np.arange(len(seen))))
        assert 8 / 1.1 < seen[-1] <= 8
        assert len(seen) <= 60

    @pytest.mark.parametrize("least", [-20.0, 0.0, 30.0, 69.0, 119.0])
    def test_weaker_is_more_decibels_and_comes_to_an_end(self, least: float) -> None:
        seen, subject = [], ShareWeights(sqnr=least)
        while subject is not None:
            seen.append(subject.sqnr)
            subject = subject.weaker()
        assert seen == pytest.approx(list(least + 1.5 * np.arange(len(seen))))
        assert len(seen) <= 64

    def test_a_spared_site_is_stored_in_16_bits(self) -> None:
        for subject in (ShareWeights(bits=2), ShareWeights(bits_per_weight=2), ShareWeights(sqnr=30)):
            assert subject.spared() == {"bits": 16}

    def test_sites_are_independent_unless_they_share_a_budget(self) -> None:
        assert ShareWeights(bits=2).sites_are_independent
        assert not ShareWeights(bits_per_weight=2).sites_are_independent
        assert not ShareWeights(sqnr=30).sites_are_independent


def of_op(op: str, *shape: int, operand: int = 1, **attributes: Any) -> onnx.ModelProto:
    """Returns one node that computes with a weight w of a shape, whose sizes differ along all axes."""
    weight = normal(*shape)
    for axis, size in enumerate(shape):
        weight *= np.geomspace(0.3, 3, size).astype(np.float32).reshape([-1 if at == axis else 1 for at in range(len(shape))])
    values, x = [oracle.value("w", weight)], {"Conv": 4, "LSTM": 3}.get(op, 2)
    inputs = ["x", "w"] if operand == 1 else ["w", "x"]
    if op == "LSTM":
        inputs.append("r")
        values.append(oracle.value("r", np.resize(normal(2), (shape[0], shape[1], shape[1] // 4))))
    node = helper.make_node(op, inputs, ["y"], **attributes)
    shape_in = {
        "Conv": [1, shape[1] * attributes.get("group", 1), 5, 5], "LSTM": [2, 1, shape[-1]], "ConvTranspose": [1, shape[0], 5, 5]
    }.get(op, [2, shape[1] if attributes.get("transB") else shape[0]] if operand == 1 else [shape[1], 2])
    rank = {"Conv": 4, "ConvTranspose": 4, "LSTM": 4}.get(op, x)
    return oracle.make_model([node], [oracle.tensor("x", shape_in)], [oracle.tensor("y", [None] * rank)], values)


class TestTiles:
    """The scales are read from the file, spread by hand over the tiles that are wanted, and divided out of what ONNX Runtime decodes."""

    CASES = (
        ("Conv", of_op("Conv", 24, 40, 3, 3), 0, 1),
        ("Conv in groups", of_op("Conv", 24, 40, 3, 3, group=2), 0, 1),
        ("ConvTranspose", of_op("ConvTranspose", 40, 24, 3, 3), 1, 0),
        ("MatMul, right", of_op("MatMul", 100, 24), 1, 0),
        ("MatMul, left", of_op("MatMul", 24, 100, operand=0), 0, 1),
        ("Gemm", of_op("Gemm", 100, 24), 1, 0),
        ("Gemm, transB", of_op("Gemm", 24, 100, transB=1), 0, 1),
        ("LSTM", of_op("LSTM", 2, 24, 100, hidden_size=6, direction="bidirectional"), 1, 2),
    )

    @pytest.mark.parametrize(("channels", "block"), [(1, 32), (1, 20), (4, None), (5, 32), (24, 16)])
    @pytest.mark.parametrize("method", ["kmeans", "uniform"])
    @pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
    def test_share_one_scale(self, case: Any, method: str, channels: int, block: int | None) -> None:
        _, model, channel_axis, summed_axis = case
        values = initializers(model)["w"]
        subject = ShareWeights(bits=4, method=method, channels_per_scale=channels, block=block)
        result, report = run(subject, model)
        got = decoded(result)
        stored = initializers(result)["w.scale"]
        tile = list(values.shape)
        tile[channel_axis] = channels
        tile[summed_axis] = block or tile[summed_axis]
        assert stored.shape == tuple(-(-size // part) for size, part in zip(values.shape, tile, strict=True))
        assert stored.dtype == (np.float16 if block is not None and stored.size >= 32 else np.float32)
        scale = stored.astype(np.float32)
        for axis, part in enumerate(tile):
            scale = np.take(np.repeat(scale, part, axis), np.arange(values.shape[axis]), axis)
        if method == "uniform":
            steps = got / scale
            np.testing.assert_allclose(steps, np.rint(steps), atol=1e-4)
            least = steps.min() if block is not None else -15
            assert steps.max() - least < 31
        else:
            book = initializers(result)["w.codebook"].astype(np.float32)
            assert book.size == 16
            assert (np.abs(got[..., None] - book * scale[..., None]).min(axis=-1) <= 1e-6 * np.abs(got)).all()
        error = np.linalg.norm(got - values) / np.linalg.norm(values)
        assert error < (0.15 if method == "kmeans" and block is not None else 0.35)
        assert same_outputs(with_weight(model, got), result)
        (change,) = [change for change in report.changes if change.site == "w"]
        assert ("blocks of" in change.detail) == (block is not None)
        assert ("groups of" in change.detail or "group of" in change.detail) == (channels > 1)

    @pytest.mark.parametrize("options", [{"block": 32}, {"channels_per_scale": 8}, {"block": 25, "channels_per_scale": 3}], ids=str)
    @pytest.mark.parametrize("method", ["kmeans", "uniform"])
    @pytest.mark.parametrize("share", [0.4, 0.7])
    def test_keep_zeros(self, share: float, method: str, options: dict[str, int]) -> None:
        weight = uneven(200, 24) + np.float32(0.02)
        weight[np.abs(weight) < np.quantile(np.abs(weight), share, axis=0)] = 0
        for bits, feeds in ((2, ()), (4, samples_of(200))):
            result, _ = run(ShareWeights(bits=bits, method=method, **options), dense(weight), feeds=feeds)
            got = decoded(result)
            assert not got[weight == 0].any()
            assert got[weight != 0].any()

    @pytest.mark.parametrize("method", ["kmeans", "uniform"])
    def test_are_coded_the_same_at_every_opset(self, method: str) -> None:
        weight, found = uneven(100, 24), []
        for opset in OPSETS:
            got, _, _ = shared(ShareWeights(bits=4, method=method, block=32, channels_per_scale=5), weight, opset)
            found.append(got.tobytes())
        assert len(set(found)) == 1

    @pytest.mark.parametrize("block", [16, 64])
    def test_err_less_the_smaller_they_are(self, block: int) -> None:
        weight = normal(256, 64) * np.repeat(np.geomspace(0.1, 1, 16), 16)[:, None].astype(np.float32)
        for method in ("kmeans", "uniform"):
            errors = [
                float(np.sum((shared(ShareWeights(bits=4, method=method, block=size), weight)[0] - weight) ** 2.0))
                for size in (block, 2 * block, None)
            ]
            assert errors == sorted(errors)

    @pytest.mark.parametrize("repair", [True, False])
    def test_make_up_for_errors_with_calibration_data(self, repair: bool) -> None:
        model, feeds = network(), samples(6)
        subject = ShareWeights(bits=3, block=16, channels_per_scale=2, repair=repair)
        result, report = run(subject, model, feeds=feeds)
        assert all(("error feedback" in change.detail) == repair for change in report.changes)
        plain, _ = run(subject, model)
        gain = sqnr(result, model, samples(6, seed=900)) - sqnr(plain, model, samples(6, seed=900))
        assert gain > 2 if repair else gain == 0

    @pytest.mark.parametrize("options", [{"block": 32}, {"block": 32, "method": "uniform"}, {"channels_per_scale": 4}], ids=str)
    def test_go_through_huffman_coding_and_back(self, options: dict[str, Any], tmp_path: Path) -> None:
        weight = np.random.default_rng(0).laplace(size=(300, 200)).astype(np.float32)
        model = dense(np.where(np.abs(weight) < 1.2, np.float32(0), weight))
        small = compress(model, [ShareWeights(bits=5, **options), Huffman()])
        assert [step.outcome for step in small.report.passes] == ["kept", "kept"]
        shared_alone = compress(model, [ShareWeights(bits=5, **options)]).to_model()
        path = tmp_path / "small.onnx"
        small.save(path)
        assert decoded(onnx.load(path)).tobytes() == decoded(shared_alone).tobytes()
        assert same_outputs(shared_alone, onnx.load(path))
        feeds = oracle.random_feeds(oracle.session(model))
        (expected,) = oracle.run(oracle.session(shared_alone), feeds)
        np.testing.assert_array_equal(load_session(path).run(None, feeds)[0], expected)
        expand(path).save(tmp_path / "dense.onnx")
        (again,) = onnx.load(tmp_path / "dense.onnx").graph.initializer
        assert onnx.numpy_helper.to_array(again).tobytes() == decoded(shared_alone).tobytes()
        if options.get("method") == "uniform":  # the zero point goes into the codes, and the scale into one node
            assert {"Sub", "Reshape"}.isdisjoint(node.op_type for node in onnx.load(path).graph.node)

    def test_are_not_coded_twice(self) -> None:
        once, _ = run(ShareWeights(bits=4, block=32, channels_per_scale=3), dense(normal(100, 64)))
        twice, report = run(ShareWeights(bits=2, block=16), once)
        assert twice.SerializeToString() == once.SerializeToString()
        assert ("w", "is stored as codes already") in [(skip.site, skip.reason) for skip in report.skips]

    def test_of_tables_are_rows(self) -> None:
        result, report = run(ShareWeights(bits=4, block=16, channels_per_scale=4), looked_up(normal(600, 64)))
        assert report.changes[0].detail == "k-means to 16 values, 600 channels, no tiles: its rows are looked up, scaled"
        assert initializers(result)["w0.scale"].shape == (600, 1)

    @pytest.mark.parametrize("bits", [2, 4])
    @pytest.mark.parametrize("step", [0.3, 1.0])
    def test_have_steps_of_their_own(self, step: float, bits: int) -> None:
        weight = uneven(100, 24)
        got, result, _ = shared(ShareWeights(bits=bits, step=step, block=25), weight)
        scale = np.repeat(initializers(result)["w.scale"].astype(np.float32), 25, 0)
        np.testing.assert_allclose(got / scale, np.rint(got / scale), atol=1e-4)
        assert (np.abs(got - weight) <= 0.501 * scale).all()

    @pytest.mark.parametrize("subject", [ShareWeights(bits=3, block=8), ShareWeights(bits=4, channels_per_scale=3)], ids=str)
    def test_keep_the_contract(self, subject: ShareWeights) -> None:
        models = [model for index, model in enumerate(awkward_models()) if index % 4 == 0 or not model[0].startswith("opset")]
        check_pass(subject, models)


def with_weight(model: onnx.ModelProto, values: Array) -> onnx.ModelProto:
    """Returns a model with other values of w."""
    changed = copy.deepcopy(model)
    next(tensor for tensor in changed.graph.initializer if tensor.name == "w").CopyFrom(oracle.value("w", values))
    return changed


def samples_of(size: int) -> Sequence[Feeds]:
    return [{"x": normal(1, size, seed=700 + at)} for at in range(12)]


def initializers(model: onnx.ModelProto) -> dict[str, Array]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


SIZES = (40, 64, 48, 24)
BUDGETS = (ShareWeights(bits_per_weight=3.0), ShareWeights(sqnr=20.0))
CALIBRATED = (ShareWeights(bits=3), ShareWeights(bits=4, method="uniform"), *BUDGETS)


def named(subject: ShareWeights) -> str:
    if subject.has_budget:
        return f"{subject.bits_per_weight} bits" if subject.sqnr is None else f"{subject.sqnr} dB"
    return f"{subject.bits}, {subject.method}"


@cache
def network(seed: int = 0) -> onnx.ModelProto:
    """Returns three Gemms with Relu between them."""
    nodes, values, last = [], [], "x"
    for index in range(3):
        rows, columns = SIZES[index : index + 2]
        weight = normal(rows, columns, seed=seed + index) / np.float32(np.sqrt(rows))
        values += [oracle.value(f"w{index}", weight), oracle.value(f"b{index}", normal(columns, seed=seed + index))]
        nodes.append(helper.make_node("Gemm", [last, f"w{index}", f"b{index}"], [f"h{index}"]))
        nodes.append(helper.make_node("Relu", [f"h{index}"], [f"a{index}"]))
        last = f"a{index}"
    nodes[-2].output[0] = "y"
    return oracle.make_model(
        nodes[:-1], [oracle.tensor("x", ["n", SIZES[0]])], [oracle.tensor("y", ["n", SIZES[-1]])], values
    )


def samples(count: int, rows: int = 40, seed: int = 100) -> list[Feeds]:
    """Returns inputs of one distribution, whatever the seed: correlated, as activations are."""
    mixing = normal(12, SIZES[0])
    return [
        {"x": normal(rows, 12, seed=seed + at) @ mixing + np.float32(0.3) * normal(rows, SIZES[0], seed=seed + at)}
        for at in range(count)
    ]


def outputs(model: onnx.ModelProto, feeds: Sequence[Feeds]) -> Array:
    running = oracle.session(model)
    return np.concatenate([oracle.run(running, one)[0] for one in feeds]).astype(np.float64)


def sqnr(result: onnx.ModelProto, model: onnx.ModelProto, feeds: Sequence[Feeds]) -> float:
    expected, got = outputs(model, feeds), outputs(result, feeds)
    return float(-10 * np.log10(np.sum((got - expected) ** 2) / np.sum(expected**2)))


@cache
def unrepaired(subject: ShareWeights, seed: int) -> float:
    """Returns the SQNR on inputs that no test calibrates with."""
    model = network(seed)
    return sqnr(run(dataclasses.replace(subject, repair=False), model)[0], model, samples(8, seed=900))


class TestRepair:
    @pytest.mark.parametrize("seed", [0, 10, 20])
    @pytest.mark.parametrize(
        "subject",
        [ShareWeights(bits=3), ShareWeights(bits=2, method="kmeans"), ShareWeights(bits=4, method="uniform")],
        ids=named,
    )
    def test_with_hundreds_of_inputs_others_come_out_better(self, subject: ShareWeights, seed: int) -> None:
        model, others = network(seed), samples(8, seed=900)
        repaired, report = run(subject, model, feeds=samples(10))
        assert sqnr(repaired, model, others) > unrepaired(subject, seed) + 3
        assert all(change.detail.endswith(", error feedback") for change in report.changes if change.site[0] == "w")

    @pytest.mark.parametrize("rows", [1, 4, 24])
    @pytest.mark.parametrize("subject", [ShareWeights(bits=3), ShareWeights(bits=4, method="uniform")], ids=named)
    def test_with_very_few_inputs_others_come_out_about_as_well(self, subject: ShareWeights, rows: int) -> None:
        others = samples(8, seed=900)
        for seed in (0, 10, 20):
            model = network(seed)
            repaired, _ = run(subject, model, feeds=samples(1, rows, seed=100 + seed))
            assert sqnr(repaired, model, others) > unrepaired(subject, seed) - 0.5

    def test_not_asked_for_changes_nothing(self) -> None:
        subject = ShareWeights(bits=3, repair=False)
        assert run(subject, network(), feeds=samples(4))[0] == run(ShareWeights(bits=3), network())[0]

    @pytest.mark.parametrize("subject", CALIBRATED, ids=named)
    def test_zeros_of_a_pruned_model_stay(self, subject: ShareWeights) -> None:
        model = onnx.ModelProto()
        model.CopyFrom(network())
        dense_values = initializers(model)
        for tensor in model.graph.initializer:
            if tensor.name.startswith("w"):
                values = dense_values[tensor.name].copy()
                values[np.abs(values) < np.quantile(np.abs(values), 0.6)] = 0
                tensor.CopyFrom(oracle.value(tensor.name, values))
        for feeds in ((), samples(6)):
            result, _ = run(subject, model, feeds=feeds)
            for name in ("w0", "w1", "w2"):
                zeros = initializers(model)[name] == 0
                got = decoded(result, name)
                assert not got[zeros].any()
                assert np.count_nonzero(got) > 0.5 * np.count_nonzero(~zeros)

    @pytest.mark.parametrize("subject", CALIBRATED, ids=named)
    def test_threads_and_repetition_change_nothing(self, subject: ShareWeights) -> None:
        expected = run(subject, network(), feeds=samples(6))
        assert run(subject, network(), feeds=samples(6)) == expected
        with ThreadPoolExecutor(3) as executor:
            assert run(subject, network(), feeds=samples(6), executor=executor) == expected


class TestBias:
    def test_makes_up_for_means(self) -> None:
        model, feeds = network(), samples(6)
        result, report = run(ShareWeights(bits=2, method="kmeans"), model, feeds=feeds)
        expected, got = outputs(model, feeds).mean(axis=0), outputs(result, feeds).mean(axis=0)
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
        assert not np.array_equal(initializers(result)["b0"], initializers(model)["b0"])
        assert [skip.site for skip in report.skips] == []  # a bias that moves is part of its layer

    @pytest.mark.parametrize("values", [np.zeros(600), np.resize([0.5, -0.5, 0.25], 600)], ids=["zeros", "few values"])
    def test_of_few_values_is_not_stored_as_it_was(self, values: Array) -> None:
        """Its own values would come out exactly; but those are not the ones that are wanted now."""
        node = helper.make_node("Gemm", ["x", "w", "b"], ["y"])
        arrays = [oracle.value("w", normal(40, 600)), oracle.value("b", values.astype(np.float32))]
        model = oracle.make_model([node], [oracle.tensor("x", ["n", 40])], [oracle.tensor("y", ["n", 600])], arrays)
        feeds = samples(6)
        result, report = run(ShareWeights(bits=2, method="uniform"), model, feeds=feeds)
        expected, got = outputs(model, feeds).mean(axis=0), outputs(result, feeds).mean(axis=0)
        np.testing.assert_allclose(got, expected, atol=4e-3 * np.abs(expected).max())
        assert [change.site for change in report.changes] == ["w"]

    def test_of_a_layer_that_stays_dense_stays_too(self) -> None:
        node = helper.make_node("Gemm", ["x", "w", "b"], ["y"])
        arrays = [oracle.value("w", normal(40, 2)), oracle.value("b", normal(2))]
        model = oracle.make_model([node], [oracle.tensor("x", ["n", 40])], [oracle.tensor("y", ["n", 2])], arrays)
        result, report = run(ShareWeights(bits=8, per="channel", method="kmeans"), model, feeds=samples(3))
        assert result.SerializeToString() == to_model(load(model)).SerializeToString()
        assert [skip.site for skip in report.skips] == ["w", "b"]


class TestBudget:
    @pytest.mark.parametrize("feeds", [(), samples(6)], ids=["alone", "calibrated"])
    def test_of_bits_is_kept(self, feeds: Sequence[Feeds]) -> None:
        result, report = run(ShareWeights(bits_per_weight=3.0), network(), feeds=feeds)
        assert [change.site for change in report.changes] == ["w0", "w1", "w2"]
        total, size = 0.0, 0
        for name in ("w0", "w1", "w2"):
            steps = decoded(result, name) / initializers(result)[f"{name}.scale"].astype(np.float32)
            _, counts = np.unique(np.rint(steps), return_counts=True)
            np.testing.assert_allclose(steps, np.rint(steps), atol=1e-4)  # one grid a channel
            total, size = total - float(np.sum(counts * np.log2(counts / steps.size))), size + steps.size
        assert total / size == pytest.approx(3.0, abs=0.06)
        assert report.notes[0] == f"{size} weights on uniform grids, codes of {total / size:.2f} bits entropy a weight"

    def test_of_decibels_is_kept_for_other_inputs(self) -> None:
        result, report = run(ShareWeights(sqnr=22.0), network(), feeds=samples(12))
        assert 21.5 < sqnr(result, network(), samples(8, seed=900)) < 23.5
        assert report.notes[1].endswith(" aiming at 22")

    @pytest.mark.parametrize("subject", BUDGETS, ids=named)
    def test_is_for_the_layers_that_no_rule_takes_out(self, subject: ShareWeights) -> None:
        model, feeds = network(), samples(6)
        result, report = run(subject, model, Rule("w1", skip=True), Rule("y", {"bits": 16}), feeds=feeds)
        assert ("w1", "left alone by a rule") in [(skip.site, skip.reason) for skip in report.skips]
        assert [change.detail for change in report.changes if change.site == "w2"] == ["float16"]
        for name in ("w1", "b1", "b2"):
            np.testing.assert_array_equal(initializers(result)[name], initializers(model)[name])
        halves = initializers(model)["w2"].astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(decoded(result, "w2"), halves)
        assert report.notes[0].startswith(f"{SIZES[0] * SIZES[1]} weights on uniform grids")

    @pytest.mark.parametrize("subject", BUDGETS, ids=named)
    def test_that_rules_cannot_change_it_is_said(self, subject: ShareWeights) -> None:
        plain, _ = run(subject, network())
        ruled, report = run(subject, network(), Rule("w1", {"bits": 7}), Rule("w2", {"bits": subject.bits}))
        assert report.notes[-1] == "what rules say of w1 has no effect: all weights share one budget"
        assert ruled.SerializeToString() == plain.SerializeToString()

    @pytest.mark.parametrize("subject", BUDGETS, ids=named)
    def test_leaves_exact_weights_and_tables_to_their_own(self, subject: ShareWeights) -> None:
        """Few values are stored exactly; a table has no inputs, but it has steps."""
        nodes = [helper.make_node("Gather", ["table", "ids"], ["h"]), helper.make_node("MatMul", ["h", "few"], ["k"])]
        nodes.append(helper.make_node("MatMul", ["k", "w"], ["y"]))
        few = np.resize(normal(5), (32, 48))
        values = {"table": normal(200, 32), "few": few, "w": normal(48, 64)}
        model = oracle.make_model(
            nodes,
            [oracle.tensor("ids", ["n"], TensorProto.INT64)],
            [oracle.tensor("y", ["n", 64])],
            [oracle.value(*item) for item in values.items()],
        )
        feeds = [{"ids": np.random.default_rng(at).integers(0, 200, 50)} for at in range(6)]
        result, report = run(subject, model, feeds=feeds)
        assert sorted(change.site for change in report.changes) == ["few", "table", "w"]
        np.testing.assert_array_equal(decoded(result, "few"), few)
        assert report.notes[0].startswith(f"{200 * 32 + 48 * 64} weights")
        details = {change.site: change.detail for change in report.changes}
        assert ("error feedback" in details["w"], "error feedback" in details["table"]) == (True, False)

    def test_that_leaves_nothing_to_code_says_nothing(self) -> None:
        weight = np.resize(normal(5), (32, 48))
        for subject in BUDGETS:
            _, report = run(subject, dense(weight))
            assert [change.detail for change in report.changes] == ["exact: 5 distinct values"]
            assert list(report.notes) == []


@pytest.mark.parametrize("subject", [*BUDGETS, ShareWeights(bits=3, repair=False), ShareWeights(sqnr=-20.0)], ids=named)
def test_keeps_the_contract(subject: ShareWeights) -> None:
    models = [
        model for index, model in enumerate(awkward_models()) if index % 4 == 0 or not model[0].startswith("opset")
    ]
    check_pass(subject, models)


@pytest.mark.parametrize("subject", [ShareWeights(bits=3), *BUDGETS], ids=named)
def test_keeps_the_contract_with_calibration_data(subject: ShareWeights) -> None:
    """What `check_pass` holds a pass to, with data: sites, bytes, validity, and nothing left to do a second time."""
    model, feeds = network(), samples(6)
    result, report = run(subject, model, feeds=feeds)
    sites = [item.site for item in (*report.changes, *report.skips)]
    assert len(sites) == len(set(sites))
    before, after = initializers(model), initializers(result)
    for skip in report.skips:
        np.testing.assert_array_equal(after[skip.site], before[skip.site])
    measured = result.ByteSize() - to_model(load(model)).ByteSize()
    claimed = sum(change.bytes_after - change.bytes_before for change in report.changes if isinstance(change, Change))
    assert abs(claimed - measured) <= 8 * (1 + len(report.changes))
    again, second = run(subject, result, feeds=feeds)
    assert not second.changes
    assert again.SerializeToString() == result.SerializeToString()


class TestZerosInTheSameTurn:
    """Pruned, solved for and rounded at once."""

    X = np.random.default_rng(1).standard_normal((60, 32)).astype(np.float32) @ np.random.default_rng(2).standard_normal(
        (32, 32)
    ).astype(np.float32)

    def model(self) -> onnx.ModelProto:
        weight = np.random.default_rng(3).standard_normal((32, 96)).astype(np.float32)
        nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
        return oracle.make_model(
            nodes, [oracle.tensor("x", ["n", 32])], [oracle.tensor("y", ["n", 96])], [oracle.value("w", weight)]
        )

    def decoded(self, run: ShareWeights, *, calibrated: bool = True) -> Array:
        graph = load(self.model())
        samples = Samples(lambda index: {"x": self.X[index : index + 1]}, range(len(self.X)), "test")
        activations = Calibration(samples, threads=1) if calibrated else None
        run.apply(graph, Context(activations=activations))
        (coded,) = coded_weights(graph)
        return coded.values()

    @pytest.mark.parametrize("calibrated", [True, False])
    @pytest.mark.parametrize("method", ["uniform", "kmeans"])
    @pytest.mark.parametrize("share", [0.05, 0.5, 0.8])
    def test_the_share_is_exact_and_levels_are_few(self, share: float, method: str, calibrated: bool) -> None:
        found = self.decoded(ShareWeights(bits=3, method=method, per="tensor", sparsity=share), calibrated=calibrated)
        assert np.count_nonzero(found == 0) >= int(share * found.size)
        assert np.unique(found).size <= 8

    def test_patterns_hold(self) -> None:
        found = self.decoded(ShareWeights(bits=4, method="uniform", pattern="2:4"))
        groups = found.T.reshape(96, 8, 4)  # along what is summed over
        assert (np.count_nonzero(groups, axis=2) <= 2).all()

    def test_outputs_are_closer_than_of_magnitude_zeros_and_nearest_levels(self) -> None:
        weight = self.model().graph.initializer[0]
        dense = onnx.numpy_helper.to_array(weight)
        errors = [
            np.linalg.norm(self.X @ (self.decoded(ShareWeights(bits=4, method="uniform", sparsity=0.5), calibrated=asked) - dense))
            for asked in (True, False)
        ]
        assert errors[0] < 0.7 * errors[1]

    def test_what_cannot_be_meant_is_refused(self) -> None:
        for options, message in (
            ({"sparsity": 0.5, "sqnr": 30.0}, "share-weights: zeros in the same turn want bits or step; with sqnr run sparsify before"),
            ({"pattern": "1x4"}, "share-weights: sparsity must be given for 1x4, got None"),
            ({"pattern": "2:4", "sparsity": 0.3}, "share-weights: sparsity must be 0.5 or left out for 2:4, got 0.3"),
            ({"pattern": "2of4"}, "pattern: text must be unstructured, "),
        ):
            with pytest.raises(OptionError, match=f"^{re.escape(message)}"):
                ShareWeights(**options)  # type: ignore[arg-type]
