"""What `tidy` removes, folds and merges, and what it must leave: outputs in ONNX Runtime stay what they were, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxshrink.contract import Context, Report, Rule
from onnxshrink.graph.edit import sort_nodes
from onnxshrink.graph.exporter import to_model
from onnxshrink.graph.files import load
from onnxshrink.passes.tidy import Tidy
from tests import oracle

Array = np.ndarray[Any, np.dtype[Any]]
Node = onnx.NodeProto


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def node(op: str, signature: str, **attributes: Any) -> Node:
    """Returns a node from ``inputs -> outputs``."""
    reads, writes = signature.split("->")
    return helper.make_node(op, reads.split(), writes.split(), **attributes)


def model(
    nodes: Sequence[Node],
    values: Mapping[str, Any],
    *,
    shape: Sequence[int] = (1, 8),
    outputs: Mapping[str, tuple[int, list[int]]] | None = None,
    opset: int = 17,
) -> onnx.ModelProto:
    """Returns a model with input x and, unless said otherwise, a float output y of the same shape."""
    described = outputs or {"y": (TensorProto.FLOAT, list(shape))}
    return oracle.make_model(
        nodes,
        [oracle.tensor("x", shape)],
        [oracle.tensor(name, dims, kind) for name, (kind, dims) in described.items()],
        [oracle.value(name, array) for name, array in values.items()],
        opset=opset,
    )


def tidied(original: onnx.ModelProto, subject: Tidy | None = None, *rules: Rule) -> tuple[onnx.ModelProto, Report]:
    """Returns the result, valid and with the outputs of the original, and the report, whose bytes are right."""
    graph = load(original)
    report = (subject or Tidy()).apply(graph, Context(rules=rules))
    sort_nodes(graph)
    result = to_model(graph)
    onnx.checker.check_model(result, full_check=True)
    claimed = sum(change.bytes_after - change.bytes_before for change in report.changes)
    assert abs(claimed - (result.ByteSize() - original.ByteSize())) <= 8 * (1 + len(report.changes))
    return result, report


def unchanged_outputs(original: onnx.ModelProto, result: onnx.ModelProto) -> bool:
    sessions = oracle.session(original), oracle.session(result)
    feeds = oracle.random_feeds(sessions[0])
    return all(map(oracle.same_bits, *(oracle.run(running, feeds) for running in sessions)))


def ops(found: onnx.ModelProto) -> list[str]:
    return [entry.op_type for entry in found.graph.node]


def names(found: onnx.ModelProto) -> set[str]:
    return {tensor.name for tensor in found.graph.initializer}


def details(report: Report) -> dict[str, str]:
    return {change.site: change.detail for change in report.changes}


def reasons(report: Report) -> dict[str, str]:
    return {skip.site: skip.reason for skip in report.skips}


class TestUnused:
    def test_nodes_and_initializers_go_with_what_only_they_read(self) -> None:
        original = model(
            [
                node("MatMul", "x w -> y"),
                node("MatMul", "x dead_w -> d1"),
                node("Relu", "d1 -> d2"),
                node("Add", "d2 w2 -> d3"),
            ],
            {"w": normal(8, 8), "dead_w": normal(8, 5), "w2": normal(5), "lonely": normal(30)},
        )
        result, report = tidied(original)
        assert ops(result) == ["MatMul"]
        assert names(result) == {"w"}
        assert details(report) == {
            "d1": "unused MatMul removed",
            "d2": "unused Relu removed",
            "d3": "unused Add removed",
            "dead_w": "unused constant removed",
            "w2": "unused constant removed",
            "lonely": "unused constant removed",
        }
        assert unchanged_outputs(original, result)

    def test_constant_nodes_go_as_well(self) -> None:
        holder = helper.make_node("Constant", [], ["c"], value=oracle.value("c", normal(5)))
        result, report = tidied(model([holder, node("Relu", "x -> y")], {}))
        assert ops(result) == ["Relu"]
        assert details(report) == {"c": "unused constant removed"}

    def test_what_a_body_reads_is_used(self) -> None:
        branches = {
            f"{name}_branch": helper.make_graph(
                [node("MatMul", f"x {name} -> {name}_y")], name, [], [oracle.tensor(f"{name}_y", [1, 8])]
            )
            for name in ("then", "else")
        }
        original = model(
            [helper.make_node("If", ["go"], ["y"], **branches)],
            {"go": True, "then": normal(8, 8), "else": normal(8, 8, seed=1), "idle": normal(9)},
        )
        result, report = tidied(original)
        assert names(result) == {"go", "then", "else"}
        assert list(details(report)) == ["idle"]
        assert unchanged_outputs(original, result)

    def test_a_node_with_one_used_output_stays(self) -> None:
        original = model([node("Split", "x -> y z", axis=1, num_outputs=2)], {}, outputs={"y": (1, [1, 4])}, opset=18)
        result, report = tidied(original)
        assert ops(result) == ["Split"]
        assert not report.changes

    def test_a_tidy_model_is_left_byte_for_byte(self) -> None:
        original = model([node("MatMul", "x w -> y")], {"w": normal(8, 8)})
        result, report = tidied(original)
        assert result.SerializeToString() == original.SerializeToString()
        assert report == Report([], [], notes=[])


class TestIdentity:
    def test_is_removed_for_every_reader(self) -> None:
        original = model(
            [
                node("Identity", "x -> i"),
                node("Identity", "i -> j"),
                node("Relu", "j -> a"),
                node("Neg", "i -> b"),
                node("Add", "a b -> y"),
            ],
            {},
        )
        result, report = tidied(original)
        assert ops(result) == ["Relu", "Neg", "Add"]
        assert details(report) == {"i": "Identity removed", "j": "Identity removed"}
        assert unchanged_outputs(original, result)

    def test_of_a_graph_output_stays(self) -> None:
        original = model(
            [node("Relu", "x -> h"), node("Identity", "h -> y"), node("Identity", "x -> z")],
            {},
            outputs={"y": (1, [1, 8]), "z": (1, [1, 8])},
        )
        result, report = tidied(original)
        assert ops(result) == ["Relu", "Identity", "Identity"]
        assert not report.changes

    def test_in_a_body_is_removed_but_for_its_output(self) -> None:
        def branch(name: str) -> onnx.GraphProto:
            nodes = [
                node("Identity", f"x -> {name}_i"),
                node("Relu", f"{name}_i -> {name}_r"),
                node("Identity", f"{name}_r -> {name}_y"),
            ]
            return helper.make_graph(nodes, name, [], [oracle.tensor(f"{name}_y", [1, 8])])

        original = model(
            [helper.make_node("If", ["go"], ["y"], then_branch=branch("a"), else_branch=branch("b"))], {"go": True}
        )
        result, report = tidied(original)
        assert sorted(details(report)) == ["y.else_branch/b_i", "y.then_branch/a_i"]
        inner = [attribute.g for attribute in result.graph.node[0].attribute]
        assert [[entry.op_type for entry in body.node] for body in inner] == [["Relu", "Identity"]] * 2
        assert unchanged_outputs(original, result)


class TestDropout:
    @pytest.mark.parametrize(
        ("dropout", "values", "opset"),
        [
            (node("Dropout", "x -> d", ratio=0.3), {}, 11),
            (node("Dropout", "x -> d mask", ratio=0.3), {}, 7),
            (node("Dropout", "x ratio -> d"), {"ratio": np.float32(0.3)}, 17),
            (node("Dropout", "x ratio training -> d mask"), {"ratio": np.float32(0.3), "training": False}, 17),
        ],
    )
    def test_in_inference_is_removed(self, dropout: Node, values: dict[str, Any], opset: int) -> None:
        original = model([dropout, node("Relu", "d -> y")], values, opset=opset)
        result, report = tidied(original)
        assert ops(result) == ["Relu"]
        assert names(result) == set()
        assert details(report)["d"] == "Dropout removed"
        assert unchanged_outputs(original, result)

    @pytest.mark.parametrize(
        ("nodes", "values", "opset"),
        [
            ([node("Dropout", "x ratio training -> d")], {"ratio": np.float32(0.3), "training": True}, 17),
            (
                [node("Not", "flag -> training"), node("Dropout", "x ratio training -> d")],
                {"flag": np.array([False]), "ratio": np.float32(0.3)},
                17,
            ),
        ],
        ids=["training", "computed"],
    )
    def test_that_may_train_stays(self, nodes: list[Node], values: dict[str, Any], opset: int) -> None:
        original = model([*nodes, node("Relu", "d -> y")], values, opset=opset)
        graph = load(original)
        Tidy(fold_constants=False).apply(graph, Context())
        assert "Dropout" in [entry.op for entry in graph.nodes]

    @pytest.mark.parametrize("opset", [11, 17])
    def test_whose_mask_is_read_stays(self, opset: int) -> None:
        read = model(
            [node("Dropout", "x -> d mask"), node("Cast", "mask -> m", to=1), node("Add", "d m -> y")], {}, opset=opset
        )
        shown = model(
            [node("Dropout", "x -> d mask"), node("Relu", "d -> y")],
            {},
            outputs={"y": (TensorProto.FLOAT, [1, 8]), "mask": (TensorProto.BOOL, [1, 8])},
            opset=opset,
        )
        for original in (read, shown):
            result, report = tidied(original)
            assert "Dropout" in ops(result)
            assert not report.changes


class TestConstantFolding:
    def test_computes_what_depends_on_constants_only(self) -> None:
        original = model(
            [
                node("Concat", "one rest -> shape", axis=0),
                node("Transpose", "w -> t", perm=[1, 0]),
                node("Mul", "t two -> m"),
                node("MatMul", "x m -> h"),
                node("Reshape", "h shape -> y"),
            ],
            {"one": np.array([1]), "rest": np.array([2, 4]), "w": normal(8, 8), "two": np.float32(2)},
            outputs={"y": (1, [1, 2, 4])},
        )
        result, report = tidied(original)
        assert ops(result) == ["MatMul", "Reshape"]
        folded = {tensor.name: numpy_helper.to_array(tensor) for tensor in result.graph.initializer}
        assert folded.keys() == {"shape", "m"}
        np.testing.assert_array_equal(folded["m"], normal(8, 8).T * 2)
        assert details(report) == {
            "shape": "Concat of constants computed",
            "t": "Transpose of constants computed",
            "m": "Mul of constants computed",
        }
        assert unchanged_outputs(original, result)

    def test_never_grows_the_file(self) -> None:
        original = model(
            [node("Cast", "w -> wide", to=TensorProto.FLOAT), node("MatMul", "x wide -> y")],
            {"w": normal(8, 8).astype(np.float16)},
        )
        result, report = tidied(original)
        assert ops(result) == ["Cast", "MatMul"]
        assert list(reasons(report)) == ["wide"]
        assert reasons(report)["wide"].startswith("folding this Cast would grow the file")
        assert result.ByteSize() == original.ByteSize()

    def test_never_computes_an_outer_product(self) -> None:
        column, row = np.arange(100_000).reshape(-1, 1), np.arange(100_000).reshape(1, -1)
        original = model(
            [node("Add", "column row -> huge"), node("Shape", "huge -> s"), node("Reshape", "x s -> y")],
            {"column": column, "row": row},
            outputs={"y": (1, [100_000, 100_000])},
        )
        graph = load(original)
        report = Tidy().apply(graph, Context())  # 80 GB if it were computed
        assert reasons(report) == {"huge": "folding this Add would grow the file"}

    def test_counts_what_a_shared_constant_still_costs(self) -> None:
        """w stays for its other reader, so folding its Transpose would store it twice."""
        original = model(
            [node("Transpose", "w -> t", perm=[1, 0]), node("MatMul", "x w -> h"), node("MatMul", "h t -> y")],
            {"w": normal(8, 8)},
        )
        result, report = tidied(original)
        assert ops(result) == ["Transpose", "MatMul", "MatMul"]
        assert list(reasons(report)) == ["t"]

    def test_leaves_graph_outputs_to_their_node(self) -> None:
        original = model(
            [node("Add", "a b -> c"), node("Relu", "x -> y")],
            {"a": normal(4), "b": normal(4, seed=1)},
            outputs={"y": (1, [1, 8]), "c": (1, [4])},
        )
        result, report = tidied(original)
        assert ops(result) == ["Add", "Relu"]
        assert reasons(report) == {"c": "this Add computes a graph output"}
        assert unchanged_outputs(original, result)

    def test_computes_the_output_of_a_branch(self) -> None:
        def branch(name: str) -> onnx.GraphProto:
            values = [oracle.value(f"{name}_v", normal(8, seed=len(name)))]
            return helper.make_graph(
                [node("Neg", f"{name}_v -> {name}_y")], name, [], [oracle.tensor(f"{name}_y", [8])], values
            )

        original = model(
            [
                helper.make_node("If", ["go"], ["h"], then_branch=branch("yes"), else_branch=branch("no")),
                node("Add", "x h -> y"),
            ],
            {"go": True},
        )
        result, report = tidied(original)
        assert sorted(details(report)) == ["h.else_branch/no_y", "h.then_branch/yes_y"]
        assert unchanged_outputs(original, result)

    def test_is_an_option(self) -> None:
        original = model([node("Neg", "w -> n"), node("MatMul", "x n -> y")], {"w": normal(8, 8)})
        assert ops(tidied(original)[0]) == ["MatMul"]
        result, report = tidied(original, Tidy(fold_constants=False))
        assert ops(result) == ["Neg", "MatMul"]
        assert report == Report([], [], notes=[])


def normalised(op: str = "Conv", bias: bool = True, **attributes: Any) -> onnx.ModelProto:
    weights = {"w": normal(4, 6, 3, 3) if op == "ConvTranspose" else normal(6, 4, 3, 3)}
    statistics = {
        name: np.abs(normal(6, seed=seed)) + np.float32(0.5) for seed, name in enumerate(("s", "b", "m", "v"), 5)
    }
    return model(
        [node(op, f"x w {'c' if bias else ''} -> h"), node("BatchNormalization", "h s b m v -> y", **attributes)],
        {**weights, **({"c": normal(6)} if bias else {}), **statistics},
        shape=[1, 4, 8, 8],
        outputs={"y": (1, [1, 6, 10, 10] if op == "ConvTranspose" else [1, 6, 6, 6])},
    )


class TestBatchNormalization:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
    def test_goes_into_the_convolution_before_it(self, op: str, bias: bool) -> None:
        original = normalised(op, bias, epsilon=1e-3)
        result, report = tidied(original)
        assert ops(result) == [op]
        assert len(names(result)) == 2
        assert details(report) == {"y": f"BatchNormalization folded into {op}"}
        sessions = oracle.session(original), oracle.session(result)
        feeds = oracle.random_feeds(sessions[0])
        before, after = (running.run(None, feeds)[0] for running in sessions)
        np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)

    def test_the_new_weights_are_those_of_the_formula(self) -> None:
        original = normalised(epsilon=1e-3)
        old = {tensor.name: numpy_helper.to_array(tensor).astype(np.float64) for tensor in original.graph.initializer}
        result, _ = tidied(original)
        weight, bias = (
            next(numpy_helper.to_array(t) for t in result.graph.initializer if t.name == result.graph.node[0].input[at])
            for at in (1, 2)
        )
        factor = old["s"] / np.sqrt(old["v"] + 1e-3)
        np.testing.assert_array_equal(weight, (old["w"] * factor[:, None, None, None]).astype(np.float32))
        np.testing.assert_allclose(bias, (old["c"] - old["m"]) * factor + old["b"], rtol=1e-6)

    def test_stays_where_something_else_reads_the_convolution(self) -> None:
        original = normalised()
        original.graph.output.append(oracle.tensor("h", [1, 6, 6, 6]))
        result, report = tidied(original)
        assert ops(result) == ["Conv", "BatchNormalization"]
        assert reasons(report) == {"y": "BatchNormalization stays: the convolution's output is also read elsewhere"}

    def test_stays_without_a_convolution(self) -> None:
        statistics = {name: np.ones(8, np.float32) for name in ("s", "b", "m", "v")}
        statistics["s"] = normal(8)
        original = model([node("Relu", "x -> h"), node("BatchNormalization", "h s b m v -> y")], statistics)
        _, report = tidied(original)
        assert reasons(report) == {"y": "BatchNormalization stays: no convolution directly before it"}

    def test_is_an_option(self) -> None:
        result, report = tidied(normalised(), Tidy(fold_batch_norm=False))
        assert ops(result) == ["Conv", "BatchNormalization"]
        assert report == Report([], [], notes=[])


class TestDuplicates:
    def test_become_one(self) -> None:
        twin = normal(8, 8)
        original = model(
            [node("MatMul", "x a -> h"), node("MatMul", "h b -> i"), node("MatMul", "i c -> y")],
            {"a": twin, "b": twin, "c": twin + np.float32(1)},
        )
        result, report = tidied(original)
        assert names(result) == {"a", "c"}
        assert [list(entry.input) for entry in result.graph.node] == [["x", "a"], ["h", "a"], ["i", "c"]]
        assert details(report) == {"b": "same as a"}
        assert unchanged_outputs(original, result)

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (np.zeros((8, 1), np.float32), np.zeros((1, 8), np.float32)),  # another shape
            (np.zeros((1, 8), np.float32), -np.zeros((1, 8), np.float32)),  # another sign of zero
            (np.ones((1, 8), np.float32), np.full((1, 8), 0x3F800000, np.int32)),  # another type, same bytes
        ],
    )
    def test_must_agree_in_type_shape_and_bits(self, one: Array, other: Array) -> None:
        cast = [node("Cast", "b -> f", to=1), node("Add", "h f -> y")]
        original = model(
            [node("Add", "x a -> h"), *cast],
            {"a": one, "b": other},
            outputs={"y": (1, list((one + other + np.ones((1, 8))).shape))},
        )
        result, report = tidied(original, Tidy(fold_constants=False))
        assert names(result) == {"a", "b"}
        assert not report.changes

    def test_that_callers_see_stay(self) -> None:
        twin = normal(8, 8)
        original = model(
            [node("MatMul", "x a -> h"), node("MatMul", "h b -> i"), node("MatMul", "i c -> y")],
            {"a": twin, "b": twin, "c": twin},
            outputs={"y": (1, [1, 8]), "b": (1, [8, 8])},
        )
        original.graph.input.append(oracle.tensor("a", [8, 8]))  # may be overridden
        result, report = tidied(original)
        assert names(result) == {"a", "b", "c"}
        assert not report.changes

    def test_of_different_branches_stay_in_theirs(self) -> None:
        def branch(name: str) -> onnx.GraphProto:
            values = [oracle.value(f"{name}_w", normal(8, 8))]
            return helper.make_graph(
                [node("MatMul", f"x {name}_w -> {name}_y")], name, [], [oracle.tensor(f"{name}_y", [1, 8])], values
            )

        original = model(
            [helper.make_node("If", ["go"], ["y"], then_branch=branch("a"), else_branch=branch("b"))], {"go": True}
        )
        result, report = tidied(original)
        assert not report.changes
        assert unchanged_outputs(original, result)


class TestNotes:
    @staticmethod
    def chatty(length: int) -> onnx.ModelProto:
        branches = {
            f"{name}_branch": helper.make_graph(
                [node("Neg", f"x -> {name}_y", doc_string="n" * length)], name, [], [oracle.tensor(f"{name}_y", [1, 8])]
            )
            for name in ("then", "else")
        }
        relu = node("Relu", "h -> y")
        relu.metadata_props.add(key="pkg.torch.onnx.stack_trace", value="s" * length)
        original = model([helper.make_node("If", ["go"], ["h"], **branches), relu], {"go": True})
        original.doc_string = original.graph.doc_string = "keep this"
        original.metadata_props.add(key="alphabet", value="abc")
        return original

    def test_go_on_request_and_those_of_the_model_stay(self) -> None:
        original = self.chatty(5000)
        result, report = tidied(original, Tidy(strip_notes=True))
        assert original.ByteSize() - result.ByteSize() > 15_000
        assert (result.doc_string, result.graph.doc_string, result.metadata_props[0].value) == (
            "keep this",
            "keep this",
            "abc",
        )
        assert not result.graph.node[1].metadata_props
        assert [attribute.g.node[0].doc_string for attribute in result.graph.node[0].attribute] == ["", ""]
        assert {change.detail for change in report.changes} == {"notes on nodes dropped"}
        assert unchanged_outputs(original, result)
        assert tidied(result, Tidy(strip_notes=True))[1].changes == []

    def test_are_told_of_when_they_are_many(self) -> None:
        result, report = tidied(self.chatty(5000))
        assert result.ByteSize() == self.chatty(5000).ByteSize()
        (note,) = report.notes
        assert note.startswith("exporter's notes on nodes take 15")
        assert note.endswith("bytes; tidy:strip-notes=true drops them")
        assert tidied(self.chatty(100))[1].notes == []


def test_one_rewrite_clears_the_way_for_the_next() -> None:
    twin = normal(8, 8)
    original = model(
        [
            node("Identity", "a -> i"),
            node("Transpose", "i -> t", perm=[1, 0]),
            node("Dropout", "x -> d"),
            node("MatMul", "d t -> h"),
            node("MatMul", "h b -> y"),
        ],
        {"a": twin, "b": np.ascontiguousarray(twin.T)},
    )
    result, report = tidied(original)
    assert ops(result) == ["MatMul", "MatMul"]
    assert len(result.graph.initializer) == 1
    assert details(report) == {
        "i": "Identity removed",
        "d": "Dropout removed",
        "t": "Transpose of constants computed; same as b",
    }
    assert len(report.changes) == 3  # one for each site
    assert unchanged_outputs(original, result)
    assert tidied(result)[1].changes == []


def test_weaker_is_without_the_rewrite_that_rounds() -> None:
    weaker = Tidy(strip_notes=True).weaker()
    assert weaker == Tidy(strip_notes=True, fold_batch_norm=False)
    assert weaker.weaker() is None


class TestOverrides:
    """Since IR version 4, an initializer that is listed as a graph input may be replaced by the caller."""

    def test_of_what_is_folded_or_unused_are_told(self) -> None:
        original = model([node("Neg", "w -> n"), node("MatMul", "x n -> y")], {"w": normal(8, 8), "idle": normal(9)})
        original.graph.input.extend([oracle.tensor("w", [8, 8]), oracle.tensor("idle", [9])])
        result, report = tidied(original)
        assert [value.name for value in result.graph.input] == ["x"]
        assert report.notes == [
            f"'{name}' is no longer a graph input that callers can override" for name in ("w", "idle")
        ]

    @pytest.mark.parametrize(("ir_version", "expected"), [(8, ["Conv", "BatchNormalization"]), (3, ["Conv"])])
    def test_of_a_batch_normalization_keep_it(self, ir_version: int, expected: list[str]) -> None:
        """Before IR version 4 every initializer had to be listed, so that says nothing."""
        original = normalised()
        original.graph.input.extend(oracle.tensor(tensor.name, tensor.dims) for tensor in original.graph.initializer)
        original.ir_version = ir_version
        original.opset_import[0].version = 8
        graph = load(original)
        report = Tidy().apply(graph, Context())
        assert [entry.op for entry in graph.nodes] == expected
        reason = "BatchNormalization stays: callers can override its parameters, which are listed as graph inputs"
        assert reasons(report) == ({"y": reason} if ir_version == 8 else {})
