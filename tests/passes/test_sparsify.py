"""Sparsity against masks made by hand: sorting, grouping and cutting in plain numpy, outputs in ONNX Runtime."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxshrink.calibrate import Calibration
from onnxshrink.contract import Context, Report, Rule
from onnxshrink.errors import OptionError
from onnxshrink.graph.edit import sort_nodes
from onnxshrink.graph.exporter import to_model
from onnxshrink.graph.files import load
from onnxshrink.graph.weights import weights as weights_of
from onnxshrink.inputs import Samples
from onnxshrink.passes.share_weights import ShareWeights
from onnxshrink.passes.sparsify import Sparsify
from onnxshrink.testing import check_pass
from tests import oracle

Array = np.ndarray[Any, np.dtype[Any]]


def normal(*shape: int, seed: int = 0, dtype: Any = np.float32) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def run(subject: Sparsify, model: onnx.ModelProto, *rules: Rule) -> tuple[dict[str, Array], Report, onnx.ModelProto]:
    """Returns the initializers of the result by name, the report, and the result."""
    graph = load(model)
    report = subject.apply(graph, Context(rules=rules))
    sort_nodes(graph)
    result = to_model(graph)
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in result.graph.initializer}, report, result


def chain(*weights: Array, op: str = "MatMul", dtype: int = TensorProto.FLOAT, **attributes: Any) -> onnx.ModelProto:
    """Returns a model that multiplies its input by one weight after the other, called w0, w1, ..."""
    names = ["x", *(f"h{index}" for index in range(len(weights) - 1)), "y"]
    nodes = [
        helper.make_node(op, [source, f"w{index}"], [target], **attributes)
        for index, (source, target) in enumerate(itertools.pairwise(names))
    ]
    return oracle.make_model(
        nodes,
        [oracle.tensor("x", None, dtype)],
        [oracle.tensor("y", None, dtype)],
        [oracle.value(f"w{index}", weight) for index, weight in enumerate(weights)],
    )


def smallest(values: Array, count: int) -> Array:
    """Returns values with the ``count`` smallest magnitudes set to zero; of equal ones the first."""
    result = values.copy()
    order = np.argsort(np.abs(values.astype(np.float64)).ravel(), kind="stable")
    result.ravel()[order[:count]] = 0
    return result


def keep_n_of_m(values: Array, axis: int, n: int, m: int) -> Array:
    """Returns values with all but the n largest of each m consecutive ones along an axis set to zero."""
    moved = np.moveaxis(values, axis, -1)
    flat = moved.reshape(-1, moved.shape[-1]).copy()
    for row in flat:
        for start in range(0, len(row), m):
            group = row[start : start + m]
            order = sorted(range(len(group)), key=lambda at: (abs(float(group[at])), at))
            for at in order[: max(0, len(group) - n)]:
                group[at] = 0
    return np.moveaxis(flat.reshape(moved.shape), -1, axis)


class TestUnstructured:
    @settings(deadline=None, max_examples=40)
    @given(st.lists(st.tuples(st.integers(1, 9), st.integers(2, 9)), min_size=1, max_size=3), st.floats(0, 1))
    def test_zeroes_the_smallest_of_each_layer(self, shapes: list[tuple[int, int]], share: float) -> None:
        weights = [normal(*shape, seed=index) for index, shape in enumerate(shapes)]
        found, report, _ = run(Sparsify(sparsity=share, scope="layer"), chain(*weights))
        for index, weight in enumerate(weights):
            count = int(np.floor(share * weight.size + 1e-9))
            np.testing.assert_array_equal(found[f"w{index}"], smallest(weight, count))
        assert len(report.changes) + len(report.skips) == len(weights)

    def test_of_all_layers_together_zeroes_the_smallest_of_all(self) -> None:
        weights = [normal(12, 10), 10 * normal(10, 14, seed=1), 0.1 * normal(14, 6, seed=2)]
        found, _, _ = run(Sparsify(sparsity=0.6, scope="global", criterion="magnitude"), chain(*weights))
        total = sum(weight.size for weight in weights)
        expected = smallest(np.concatenate([weight.ravel() for weight in weights]), int(0.6 * total))
        np.testing.assert_array_equal(np.concatenate([found[f"w{i}"].ravel() for i in range(3)]), expected)
        assert np.count_nonzero(found["w2"]) == 0 < np.count_nonzero(found["w1"] == 0)  # layers do compete

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    def test_in_every_float_type(self, dtype: Any) -> None:
        weight = normal(16, 16, dtype=dtype)
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        found, _, result = run(Sparsify(sparsity=0.75), chain(weight, dtype=kind))
        np.testing.assert_array_equal(found["w0"], smallest(weight, 192))
        assert found["w0"].dtype == dtype
        assert result.ByteSize() == chain(weight, dtype=kind).ByteSize()

    def test_existing_zeros_count(self) -> None:
        weight = smallest(normal(20, 10), 60)  # 30 %
        found, report, _ = run(Sparsify(sparsity=0.5), chain(weight))
        np.testing.assert_array_equal(found["w0"], smallest(weight, 100))
        assert report.changes[0].detail == "50.0% zeros (was 30.0%), unstructured"
        found, report, _ = run(Sparsify(sparsity=0.2), chain(weight))
        np.testing.assert_array_equal(found["w0"], weight)
        assert [(skip.site, skip.reason) for skip in report.skips] == [("w0", "30.0% zeros already, in this pattern")]

    @pytest.mark.parametrize("share", [0.0, 1.0])
    def test_at_the_ends_of_the_range(self, share: float) -> None:
        weight = normal(8, 8)
        found, report, _ = run(Sparsify(sparsity=share), chain(weight))
        np.testing.assert_array_equal(found["w0"], weight * (1 - share))
        assert len(report.changes) == share


class TestPatterns:
    @pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2), (3, 8), (4, 16)])
    @pytest.mark.parametrize(
        ("node", "shape", "axis"),
        [
            (helper.make_node("MatMul", ["x", "w"], ["y"]), (18, 6), 0),
            (helper.make_node("MatMul", ["x", "w"], ["y"]), (3, 18, 6), 1),
            (helper.make_node("MatMul", ["w", "x"], ["y"]), (6, 18), 1),
            (helper.make_node("Gemm", ["x", "w"], ["y"]), (18, 6), 0),
            (helper.make_node("Gemm", ["x", "w"], ["y"], transB=1), (6, 18), 1),
            (helper.make_node("Conv", ["x", "w"], ["y"]), (6, 18), 1),  # [O, I, 1, 1]
            (helper.make_node("LSTM", ["x", "w", "r"], ["y"], hidden_size=6), (1, 24, 18), 2),
        ],
        ids=["MatMul", "batched", "left", "Gemm", "transB", "Conv", "LSTM"],
    )
    def test_n_of_m_lie_along_what_is_summed_over(
        self, node: onnx.NodeProto, shape: tuple[int, ...], axis: int, n: int, m: int
    ) -> None:
        weight = normal(*shape)
        stored = weight.reshape(6, 18, 1, 1) if node.op_type == "Conv" else weight
        recurrent = oracle.value("r", normal(1, 24, 6))
        values = [oracle.value("w", stored), *([recurrent] if node.op_type == "LSTM" else [])]
        model = oracle.make_model([node], [oracle.tensor("x", None)], [oracle.tensor("y", None)], values)
        found, report, _ = run(Sparsify(pattern=f"{n}:{m}"), model)
        np.testing.assert_array_equal(found["w"].reshape(shape), keep_n_of_m(weight, axis, n, m))
        assert f"{n}:{m}" in report.changes[0].detail

    @pytest.mark.parametrize("moved", [False, True])
    @pytest.mark.parametrize("groups", [1, 2])
    def test_n_of_m_in_a_kernel_lie_along_the_input_channels_of_each_position(self, groups: int, moved: bool) -> None:
        weight = normal(4, 8, 3, 3)
        reads = [helper.make_node("Cast", ["w"], ["v"], to=TensorProto.FLOAT)] if moved else []
        node = helper.make_node("Conv", ["x", "v" if moved else "w"], ["y"], group=groups)
        inputs, outputs = [oracle.tensor("x", None)], [oracle.tensor("y", None)]
        model = oracle.make_model([*reads, node], inputs, outputs, [oracle.value("w", weight)])
        found, report, _ = run(Sparsify(pattern="2:4"), model)
        expected = weight.copy()
        for out, row, column, first in itertools.product(range(4), range(3), range(3), (0, 4)):
            four = [abs(float(weight[out, first + at, row, column])) for at in range(4)]
            for at in sorted(range(4), key=four.__getitem__)[:2]:
                expected[out, first + at, row, column] = 0
        np.testing.assert_array_equal(found["w"], expected)
        assert report.notes[-1] == "2:4 along the input channels, as TensorRT and cuSPARSELt take it, in 1 of 1 weights"

    def test_n_of_m_in_a_transposed_kernel_lie_along_the_input_channels_of_each_position(self) -> None:
        weight = normal(8, 3, 2, 2)  # [inputs, outputs / groups, ...]
        node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], group=2)
        model = oracle.make_model([node], [oracle.tensor("x", None)], [oracle.tensor("y", None)], [oracle.value("w", weight)])
        found, report, _ = run(Sparsify(pattern="2:4"), model)
        expected = weight.copy()
        for out, row, column, first in itertools.product(range(3), range(2), range(2), (0, 4)):  # 4 inputs to a group
            four = [abs(float(weight[first + at, out, row, column])) for at in range(4)]
            for at in sorted(range(4), key=four.__getitem__)[:2]:
                expected[first + at, out, row, column] = 0
        np.testing.assert_array_equal(found["w"], expected)
        assert report.notes[-1].endswith("in 1 of 1 weights")

    def test_says_which_weights_the_hardware_takes(self) -> None:
        nodes = [
            helper.make_node("Conv", ["x", "a"], ["h"]),  # 3 input channels
            helper.make_node("Conv", ["h", "b"], ["k"], group=8),  # one each
            helper.make_node("Conv", ["k", "c"], ["y"]),
        ]
        weights = {"a": normal(8, 3, 3, 3), "b": normal(8, 1, 3, 3), "c": normal(4, 8, 1, 1)}
        values = [oracle.value(name, array) for name, array in weights.items()]
        model = oracle.make_model(nodes, [oracle.tensor("x", None)], [oracle.tensor("y", None)], values)
        _, report, _ = run(Sparsify(pattern="2:4"), model)
        assert report.notes[-1] == (
            "2:4 along the input channels, as TensorRT and cuSPARSELt take it, in 1 of 3 weights; "
            "the others have a number of input channels that is no multiple of 4"
        )
        _, report, _ = run(Sparsify(pattern="4:8"), model)
        assert len(report.notes) == 1

    def test_n_of_m_behind_a_transpose(self) -> None:
        weight = normal(6, 18)
        nodes = [
            helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
            helper.make_node("MatMul", ["x", "t"], ["y"]),
        ]
        model = oracle.make_model(
            nodes, [oracle.tensor("x", None)], [oracle.tensor("y", None)], [oracle.value("w", weight)]
        )
        found, _, _ = run(Sparsify(pattern="2:4"), model)
        np.testing.assert_array_equal(found["w"], keep_n_of_m(weight, 1, 2, 4))

    @settings(deadline=None, max_examples=40)
    @given(*[st.integers(1, 4)] * 2, *[st.integers(2, 11)] * 2, st.floats(0, 1))
    def test_blocks_of_least_root_mean_square_go(
        self, high: int, wide: int, outputs: int, inputs: int, share: float
    ) -> None:
        weight = normal(inputs, outputs, dtype=np.float64)
        found, _, _ = run(Sparsify(pattern=f"{high}x{wide}", sparsity=share, scope="layer"), chain(weight, dtype=TensorProto.DOUBLE))
        rows = weight.T  # [outputs, inputs]: blocks are counted there
        corners = list(itertools.product(range(0, outputs, high), range(0, inputs, wide)))
        blocks = [(slice(top, top + high), slice(left, left + wide)) for top, left in corners]
        strength = [np.sqrt(np.mean(rows[block] ** 2)) for block in blocks]
        expected = rows.copy()
        budget = int(np.floor(share * weight.size + 1e-9))
        for at in np.argsort(strength, kind="stable"):  # those at the edges have fewer elements
            budget -= rows[blocks[at]].size
            if budget < 0:
                break
            expected[blocks[at]] = 0
        np.testing.assert_array_equal(found["w0"], expected.T)

    def test_blocks_of_all_layers_compete(self) -> None:
        strong, weak = normal(8, 8) + 3, 0.01 * normal(8, 8, seed=1)
        found, _, _ = run(Sparsify(pattern="2x2", scope="global", criterion="magnitude"), chain(strong, weak))
        assert np.count_nonzero(found["w1"]) == 0
        np.testing.assert_array_equal(found["w0"], strong)


class TestOutputs:
    @pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4x1"])
    def test_are_those_of_a_model_masked_by_hand(self, pattern: str) -> None:
        kernel, head = normal(8, 4, 3, 3), normal(288, 10)
        nodes = [
            helper.make_node("Conv", ["x", "c", "b"], ["h"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("Flatten", ["r"], ["f"]),
            helper.make_node("Gemm", ["f", "g"], ["y"]),
        ]

        def model(kernel: Array, head: Array) -> onnx.ModelProto:
            values = [oracle.value("c", kernel), oracle.value("b", normal(8)), oracle.value("g", head)]
            return oracle.make_model(nodes, [oracle.tensor("x", [2, 4, 6, 6])], [oracle.tensor("y", [2, 10])], values)

        def masked(rows: Array) -> Array:
            if pattern == "unstructured":
                return smallest(rows, rows.size // 2)
            if pattern == "2:4":
                places = 9 if rows.shape[1] == 36 else 1
                by_place = rows.reshape(len(rows), -1, places).swapaxes(1, 2)  # channels of one position side by side
                return keep_n_of_m(by_place, 2, 2, 4).swapaxes(1, 2).reshape(rows.shape)
            blocks = [
                (slice(top, top + 4), column) for top in range(0, len(rows), 4) for column in range(rows.shape[1])
            ]
            result = rows.copy()
            strength = [np.sqrt(np.mean(rows[block].astype(np.float64) ** 2)) for block in blocks]
            budget = rows.size // 2
            for at in np.argsort(np.float32(strength), kind="stable"):  # those at the edge have two rows
                budget -= rows[blocks[at]].size
                if budget < 0:
                    break
                result[blocks[at]] = 0
            return result

        expected = model(masked(kernel.reshape(8, 36)).reshape(kernel.shape), masked(head.T).T)
        _, _, result = run(Sparsify(pattern=pattern, scope="layer"), model(kernel, head))
        sessions = oracle.session(expected), oracle.session(result)
        feeds = oracle.random_feeds(sessions[0])
        assert all(map(oracle.same_bits, *(oracle.run(running, feeds) for running in sessions)))


class TestSites:
    def test_a_tied_weight_is_changed_once_for_all(self) -> None:
        weight = normal(8, 8)
        nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["y"])]
        model = oracle.make_model(
            nodes, [oracle.tensor("x", None)], [oracle.tensor("y", None)], [oracle.value("w", weight)]
        )
        found, report, _ = run(Sparsify(), model)
        np.testing.assert_array_equal(found["w"], smallest(weight, 32))
        assert [change.site for change in report.changes] == ["w"]

    def test_tied_uses_that_disagree_allow_only_what_has_no_direction(self) -> None:
        weight = normal(8, 8)
        nodes = [helper.make_node("Gemm", ["x", "w"], ["h"]), helper.make_node("Gemm", ["h", "w"], ["y"], transB=1)]
        model = oracle.make_model(
            nodes, [oracle.tensor("x", None)], [oracle.tensor("y", None)], [oracle.value("w", weight)]
        )
        found, _, _ = run(Sparsify(), model)
        np.testing.assert_array_equal(found["w"], smallest(weight, 32))
        for pattern in ("2:4", "2x2"):
            found, report, _ = run(Sparsify(pattern=pattern), model)
            np.testing.assert_array_equal(found["w"], weight)
            assert (
                report.skips[0].reason
                == f"its uses disagree on what the reduction axis is, so {pattern} has no meaning"
            )

    def test_what_is_left_alone_says_why(self) -> None:
        spoilt = normal(4, 4, seed=5)
        spoilt[1, 2] = np.nan
        values = {
            "table": normal(10, 4),
            "w": normal(4, 4),
            "bias": normal(4),
            "shown": normal(4, 4, seed=1),
            "spoilt": spoilt,
            "idle": normal(3, 3),
            "shape": np.array([1, 4]),
        }
        nodes = [
            helper.make_node("Gather", ["table", "ids"], ["e"]),
            helper.make_node("Gemm", ["e", "w", "bias"], ["a"]),
            helper.make_node("MatMul", ["a", "shown"], ["b"]),
            helper.make_node("MatMul", ["b", "spoilt"], ["c"]),
            helper.make_node("Reshape", ["c", "shape"], ["y"]),
        ]
        outputs = [oracle.tensor("y", [1, 4]), oracle.tensor("shown", [4, 4])]
        model = oracle.make_model(
            nodes,
            [oracle.tensor("ids", [1], TensorProto.INT64)],
            outputs,
            [oracle.value(name, array) for name, array in values.items()],
        )
        found, report, _ = run(Sparsify(), model)
        assert {skip.site: skip.reason for skip in report.skips} == {
            "table": "is only looked up, so zeros save no arithmetic",
            "bias": "is read as input 2 of Gemm, which is no weight operand",
            "shown": "is a graph output",
            "spoilt": "holds NaN or infinity",
            "idle": "is not used",
            "shape": "holds int64 values, not floating point",
        }
        assert [change.site for change in report.changes] == ["w"]
        for name in report_names(report):
            np.testing.assert_array_equal(found[name], values[name])

    def test_coded_weights_are_left_alone(self) -> None:
        graph = load(chain(normal(64, 64)))
        assert ShareWeights(bits=4).apply(graph, Context()).changes
        before = to_model(graph).SerializeToString(deterministic=True)
        report = Sparsify().apply(graph, Context())
        assert [(skip.site, skip.reason) for skip in report.skips] == [
            ("w0", "is stored as codes; sparsify before sharing")
        ]
        assert to_model(graph).SerializeToString(deterministic=True) == before

    def test_rules_set_each_layer_by_itself(self) -> None:
        weights = [normal(8, 8, seed=index) for index in range(3)]
        rules = [Rule("w*", {"sparsity": 0.25}), Rule("w1", {"pattern": "1:4", "sparsity": None}), Rule("y", skip=True)]
        found, report, _ = run(Sparsify(sparsity=0.9), chain(*weights), *rules)
        np.testing.assert_array_equal(found["w0"], smallest(weights[0], 16))
        np.testing.assert_array_equal(found["w1"], keep_n_of_m(weights[1], 0, 1, 4))
        np.testing.assert_array_equal(found["w2"], weights[2])  # matched by the node that reads it
        assert [(skip.site, skip.reason) for skip in report.skips] == [("w2", "left alone by a rule")]

    def test_a_rule_may_ask_for_another_kind_of_pattern(self) -> None:
        """N:M implies its own sparsity, so that of the pass does not hold for the layer any more."""
        weights = [normal(8, 8, seed=index) for index in range(2)]
        found, _, _ = run(Sparsify(sparsity=0.9), chain(*weights), Rule("w1", {"pattern": "2:4"}))
        np.testing.assert_array_equal(found["w0"], smallest(weights[0], 57))
        np.testing.assert_array_equal(found["w1"], keep_n_of_m(weights[1], 0, 2, 4))
        with pytest.raises(OptionError, match="sparsity must be 0.5 or left out for 2:4, got 0.7"):
            run(Sparsify(), chain(*weights), Rule("w1", {"pattern": "2:4", "sparsity": 0.7}))

    def test_a_layer_with_options_of_its_own_does_not_compete(self) -> None:
        weights = [normal(8, 8, seed=index) for index in range(3)]
        found, _, _ = run(
            Sparsify(sparsity=0.5, scope="global", criterion="magnitude"), chain(*weights), Rule("w1", {"sparsity": 0.25})
        )
        np.testing.assert_array_equal(found["w1"], smallest(weights[1], 16))
        rest = smallest(np.concatenate([weights[0].ravel(), weights[2].ravel()]), 64)
        np.testing.assert_array_equal(np.concatenate([found["w0"].ravel(), found["w2"].ravel()]), rest)


    @pytest.mark.parametrize(
        ("subject", "options", "expected"),
        [
            (Sparsify(scope="global"), {"pattern": "2:4"}, ("2:4", 0.5, None)),
            (Sparsify(schedule="gradual", initial_sparsity=0.3), {"sparsity": 0.2}, ("unstructured", 0.2, None)),
            (Sparsify(schedule="iterative"), {"pattern": "1:4"}, ("1:4", 0.75, None)),
            (Sparsify(sparsity=0.9), {"threshold": 0.1}, ("unstructured", 0.5, 0.1)),
            (Sparsify(pattern="2:4"), {"threshold": 0.1}, ("unstructured", 0.5, 0.1)),
            (Sparsify(threshold=0.1), {"sparsity": 0.2}, ("unstructured", 0.2, None)),
            (Sparsify(threshold=0.1), {"pattern": "1x4"}, ("1x4", 0.5, None)),
            (Sparsify(threshold=0.1), {"criterion": "random"}, ("unstructured", 0.5, 0.1)),
        ],
    )
    def test_a_rule_has_the_last_word_on_the_share(
        self, subject: Sparsify, options: dict[str, Any], expected: tuple[str, float, float | None]
    ) -> None:
        chosen = subject.with_options(options)
        assert (chosen.pattern, chosen.share, chosen.threshold) == expected
        assert subject.with_options({}) == subject

    def test_rules_bound_the_share_of_layers_that_compete(self) -> None:
        weights = [normal(10, 10, seed=index) for index in range(4)]
        rules = [Rule("w1", {"most": 0.1}), Rule("w2", {"least": 0.9}), Rule("w3", {"least": 0.3, "most": 0.3})]
        found, _, _ = run(Sparsify(scope="global"), chain(*weights), *rules)
        zeros = [100 - np.count_nonzero(found[f"w{index}"]) for index in range(4)]
        assert (zeros[1], zeros[2], zeros[3]) == (10, 90, 30)
        assert sum(zeros) == 200

    def test_bounds_that_leave_no_way_are_an_error(self) -> None:
        with pytest.raises(OptionError, match=r"sparsify: sparsity must be between 0 and 0.2 with these bounds, got 0.5; least and most"):
            run(Sparsify(most=0.2), chain(normal(8, 8), normal(8, 8)))


class TestThreshold:
    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    @pytest.mark.parametrize("threshold", [0.0, 0.1, 0.7, 1e6])
    def test_everything_up_to_it_goes(self, dtype: Any, threshold: float) -> None:
        weight = normal(12, 12, dtype=dtype)
        weight[0, 0], weight[0, 1] = -0.7, 0.7  # as near as the type holds it, which counts as equal
        found, report, _ = run(Sparsify(threshold=threshold), chain(weight, dtype=helper.np_dtype_to_tensor_dtype(np.dtype(dtype))))
        small = np.abs(weight.astype(np.float64)) <= (float(dtype(threshold)) if threshold < 1e4 else threshold)
        np.testing.assert_array_equal(found["w0"], np.where(small, dtype(0), weight))
        assert len(report.changes) == bool(small.any())

    def test_a_rule_gives_a_layer_one_of_its_own(self) -> None:
        weights = [normal(8, 8, seed=index) for index in range(2)]
        found, _, _ = run(Sparsify(sparsity=0.25, scope="layer"), chain(*weights), Rule("w1", {"threshold": 0.3}))
        np.testing.assert_array_equal(found["w0"], smallest(weights[0], 16))
        np.testing.assert_array_equal(found["w1"], np.where(np.abs(weights[1]) > np.float32(0.3), weights[1], 0))


class TestRepair:
    """With calibration data; how weights are made up for is tested with `onnxshrink.sparsity`."""

    def trial(
        self, subject: Sparsify, *rules: Rule, shared: bool = False
    ) -> tuple[dict[str, Array], Report, dict[str, Array], onnx.ModelProto]:
        nodes = [
            helper.make_node("Conv", ["x", "w", "b"], ["h"]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("Conv", ["r", "v", "b" if shared else "c"], ["y"], pads=[1, 1, 1, 1]),
        ]
        arrays = {"w": normal(8, 8, 1, 1), "b": normal(8), "v": normal(8, 8, 3, 3), **({} if shared else {"c": normal(8, seed=1)})}
        shape: list[int | str | None] = [1, 8, 6, 6]
        values = [oracle.value(name, array) for name, array in arrays.items()]
        model = oracle.make_model(nodes, [oracle.tensor("x", shape)], [oracle.tensor("y", shape)], values)
        graph = load(model)
        feeds = [{"x": normal(1, 8, 6, 6, seed=index) + np.float32(0.5)} for index in range(12)]
        context = Context(rules=rules, activations=Calibration(Samples(lambda at: feeds[at], range(12), "test"), threads=1))
        report = subject.apply(graph, context)
        result = to_model(graph)
        return {tensor.name: numpy_helper.to_array(tensor) for tensor in result.graph.initializer}, report, arrays, result

    def test_a_bias_is_part_of_its_layer(self) -> None:
        found, report, arrays, result = self.trial(Sparsify())
        assert [change.site for change in report.changes] == ["w", "v"]
        assert report.changes[0].detail.endswith("unstructured, made up for, mean kept by b")
        assert not report.skips  # neither was left as it was
        assert all((found[name] != arrays[name]).any() for name in "bc")
        assert sum(np.count_nonzero(found[name] == 0) for name in "wv") in (319, 320)  # half; a layer rounds down
        original = {tensor.name: tensor for tensor in to_model(load(result)).graph.initializer}
        claimed = sum(change.bytes_after for change in report.changes)
        assert abs(claimed - sum(tensor.ByteSize() + 3 for tensor in original.values())) < 16

    def test_a_bias_goes_by_the_rules_of_its_weight(self) -> None:
        found, report, arrays, _ = self.trial(Sparsify(scope="layer"), Rule("v", skip=True))
        for name in ("v", "c"):
            np.testing.assert_array_equal(found[name], arrays[name])
        assert {skip.site for skip in report.skips} == {"v", "c"}
        assert (found["b"] != arrays["b"]).any()

    def test_a_shared_bias_stays(self) -> None:
        found, report, arrays, _ = self.trial(Sparsify(scope="layer"), shared=True)
        np.testing.assert_array_equal(found["b"], arrays["b"])
        assert [(skip.site, skip.reason) for skip in report.skips] == [("b", "is read as input 2 of Conv, which is no weight operand")]

    def test_a_layer_without_new_zeros_stays_as_it_is(self) -> None:
        found, report, arrays, _ = self.trial(Sparsify(scope="layer"), Rule("v", {"sparsity": 0.0}))
        for name in ("v", "c"):
            np.testing.assert_array_equal(found[name], arrays[name])
        assert [change.site for change in report.changes] == ["w"]
        assert {skip.site for skip in report.skips} == {"v", "c"}

    def test_without_it_what_is_kept_stays_as_it_is(self) -> None:
        found, report, arrays, _ = self.trial(Sparsify(repair=False))
        for name in arrays:
            kept = found[name] != 0
            np.testing.assert_array_equal(found[name][kept], arrays[name][kept])
        assert not any("made up for" in change.detail for change in report.changes)

    @pytest.mark.parametrize(
        ("options", "without_data", "with_data"),
        [
            ({}, 0, 0),
            ({"criterion": "wanda", "scope": "sensitivity"}, 2, 0),
            ({"criterion": "magnitude", "schedule": "gradual"}, 1, 0),
            ({"schedule": "iterative", "repair": False}, 1, 1),
            ({"criterion": "obs", "pattern": "2:4"}, 1, 0),
            ({"criterion": "random", "scope": "sensitivity", "threshold": 0.1}, 0, 0),
        ],
        ids=str,
    )
    def test_says_what_it_could_not_heed(self, options: dict[str, Any], without_data: int, with_data: int) -> None:
        words = ("criterion ", "scope ", "schedule ")
        _, report, _ = run(Sparsify(**options), chain(normal(8, 8)))
        assert len([note for note in report.notes if note.startswith(words)]) == without_data
        _, report, _, _ = self.trial(Sparsify(**options))
        assert len([note for note in report.notes if note.startswith(words)]) == with_data

    @pytest.mark.parametrize("options", [{}, {"schedule": "gradual", "steps": 2, "scope": "erk"}, {"criterion": "random", "scope": "layer"}])
    def test_gives_the_same_bytes_again(self, options: dict[str, Any]) -> None:
        first, second = (self.trial(Sparsify(**options))[3].SerializeToString(deterministic=True) for _ in range(2))
        assert first == second

    @pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1x4", "rows"])
    def test_a_second_time_changes_nothing(self, pattern: str) -> None:
        subject = Sparsify(pattern=pattern, scope="layer" if pattern != "2:4" else "auto", sparsity=0.5)
        *_, model = self.trial(subject)
        graph = load(model)
        feeds = [{"x": normal(1, 8, 6, 6, seed=index)} for index in range(6)]
        before = to_model(graph).SerializeToString(deterministic=True)
        report = subject.apply(graph, Context(activations=Calibration(Samples(lambda at: feeds[at], range(6), "test"), threads=1)))
        assert not report.changes
        assert to_model(graph).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(
    "options",
    [{}, {"pattern": "2:4"}, {"pattern": "4x1", "scope": "erk", "criterion": "random"}],
)
def test_keeps_the_contract_of_passes(options: dict[str, Any]) -> None:
    floats = ("float16", "float32", "float64")
    check_pass(
        Sparsify(**options),
        sites=lambda graph: [weight.site for weight in weights_of(graph) if weight.constant.dtype.name in floats],
    )


def report_names(report: Report) -> Sequence[str]:
    return [skip.site for skip in report.skips]


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"sparsity": 1.5}, "sparsify: sparsity must be a number from 0 to 1, got 1.5"),
            ({"scope": "model"}, "sparsify: scope must be one of auto, layer, global, erk, sensitivity, got 'model'"),
            ({"pattern": "2:4", "sparsity": 0.6}, "sparsify: sparsity must be 0.5 or left out for 2:4, got 0.6"),
            (
                {"pattern": "1:4", "scope": "global"},
                "sparsify: scope must be layer for 1:4, which fixes every group, got 'global'",
            ),
            ({"pattern": "4:4"}, "pattern: N of N:M must be at least 1 and below M, got 4:4"),
            ({"pattern": "0x4"}, "pattern: sides of a block must be at least 1, got 0x4"),
            (
                {"pattern": "2:4", "schedule": "gradual"},
                "sparsify: schedule must be one-shot for 2:4, which fixes every group, got 'gradual'",
            ),
            (
                {"threshold": 0.1, "sparsity": 0.5},
                "sparsify: a threshold sets the share of zeros by itself; leave sparsity and pattern out",
            ),
            ({"threshold": 0.1, "pattern": "1x4"}, "sparsify: a threshold sets the share of zeros by itself"),
            ({"least": 0.6, "most": 0.5}, "sparsify: least must be at most most, 0.5, got 0.6"),
            (
                {"sparsity": 0.5, "initial_sparsity": 0.6, "schedule": "gradual"},
                "sparsify: initial-sparsity must be at most the sparsity, 0.5, got 0.6",
            ),
            ({"steps": 8}, "sparsify: steps and initial-sparsity say how a schedule goes; one-shot has none"),
            ({"initial_sparsity": 0.1}, "sparsify: steps and initial-sparsity say how a schedule goes; one-shot has none"),
            (
                {"pattern": "blocks"},
                "pattern: text must be unstructured, rows, columns, N:M such as 2:4 or NxM such as 1x4, got 'blocks'",
            ),
        ],
    )
    def test_that_make_no_sense_are_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(OptionError) as caught:
            Sparsify(**options)
        assert str(caught.value).startswith(message)

    @pytest.mark.parametrize(
        ("subject", "share"),
        [
            (Sparsify(), 0.5),
            (Sparsify(sparsity=0.8), 0.8),
            (Sparsify(pattern="1:4"), 0.75),
            (Sparsify(pattern="2:4", sparsity=0.5), 0.5),
            (Sparsify(pattern="2x2"), 0.5),
        ],
    )
    def test_say_the_share_of_zeros(self, subject: Sparsify, share: float) -> None:
        assert subject.share == share

    def test_weaker_is_three_quarters_down_to_five_percent(self) -> None:
        shares, subject = [], Sparsify(sparsity=0.5, scope="global")
        while subject is not None:
            assert (subject.pattern, subject.scope) == ("unstructured", "global")
            shares.append(subject.share)
            subject = subject.weaker()
        np.testing.assert_allclose(shares, 0.5 * 0.75 ** np.arange(len(shares)))
        assert shares[-1] >= 0.05 > 0.75 * shares[-1]
        assert Sparsify(pattern="2:4").weaker() is None
        softer = Sparsify(sparsity=0.4, least=0.35, initial_sparsity=0.38, schedule="gradual").weaker()
        assert softer is not None
        assert (softer.share, softer.least, softer.initial_sparsity) == pytest.approx((0.3, 0.3, 0.3))

    def test_weaker_thresholds_shrink(self) -> None:
        softer = Sparsify(threshold=0.2).weaker()
        assert softer is not None
        assert softer.threshold == pytest.approx(0.15)
        assert Sparsify(threshold=1e-6).weaker() is None
        assert Sparsify(threshold=0.0).weaker() is None


class TestNorms:
    """Scores of blocks: a single large weight counts more in the L2 norm than several middling ones."""

    def test_put_blocks_together(self) -> None:
        block = {"spiky": [9.0, 0.1, 0.1, 0.1], "flat": [4.0, 4.0, 4.0, 4.0]}
        weight = np.array([block["spiky"] + block["flat"]], np.float32).T.repeat(4, axis=1)
        nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
        model = oracle.make_model(
            nodes, [oracle.tensor("x", ["n", 8])], [oracle.tensor("y", ["n", 4])], [oracle.value("w", weight)]
        )
        for norm, kept in (("l1", slice(4, 8)), ("l2", slice(0, 4))):
            graph = load(model)
            Sparsify(pattern="1x4", criterion="magnitude", scope="layer", norm=norm).apply(graph, Context())
            (found,) = (constant.values for constant in graph.constants if constant.name == "w")
            expected = np.zeros_like(weight)
            expected[kept] = weight[kept]
            np.testing.assert_array_equal(found, expected)

    def test_want_a_criterion(self) -> None:
        with pytest.raises(OptionError, match="^sparsify: the search for zeros scores no blocks; norm wants a criterion$"):
            Sparsify(norm="l1")
