"""Every form of a sparse weight: the weight bit for bit in ONNX Runtime and in numpy, the bytes that were promised, no node left."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from onnxshrink.errors import ModelReadError
from onnxshrink.graph.coded import coded_weights, expand_coded
from onnxshrink.graph.edit import NameSource, constant_bytes, set_values, sort_nodes
from onnxshrink.graph.exporter import to_model
from onnxshrink.graph.files import load
from onnxshrink.graph.ir import Constant, Graph
from onnxshrink.graph.sparse_form import sparse_forms, store_sparse
from tests import oracle

Array = np.ndarray[Any, np.dtype[Any]]
OLD = {"mask", "patterns"}
SHAPES = [(3,), (257,), (1, 1), (20, 30), (9, 5, 3, 3), (2, 8, 31)]


def sparse(shape: tuple[int, ...], zeros: float | str, dtype: Any = np.float32, seed: int = 0) -> Array:
    """Returns normal values, a share of them zero, or by a pattern; the first is -0.0."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape).astype(dtype)
    matrix = values.reshape(shape[0], -1)
    if zeros == "rows":
        matrix[rng.random(len(matrix)) < 0.5] = 0
    elif zeros == "blocks":
        blocks = rng.random((-(-matrix.shape[0] // 4), -(-matrix.shape[1] // 2))) < 0.5
        matrix[np.kron(blocks, np.ones((4, 2)))[: matrix.shape[0], : matrix.shape[1]] > 0] = 0
    elif zeros == "n:m":
        matrix[:, ::4] = 0
        matrix[:, 1::4] = 0
    else:
        values[rng.random(shape) < zeros] = 0
    values.reshape(-1)[:1] = -0.0
    return values


def with_weight(weight: Array, opset: int = 17) -> onnx.ModelProto:
    """Returns a model that transposes its weight, of any type."""
    kind = helper.np_dtype_to_tensor_dtype(weight.dtype)
    result = oracle.tensor("y", weight.shape[::-1], kind)
    node = helper.make_node("Transpose", ["w"], ["y"])
    return oracle.make_model([node], [oracle.tensor("x", [1])], [result], [oracle.value("w", weight)], opset=opset)


def owner(graph: Graph, name: str) -> tuple[Graph, Constant]:
    return next((s.graph, c) for s in graph.scopes() for c in s.graph.constants if c.name == name)


def kinds(model: onnx.ModelProto, name: str = "w", **where: bool) -> list[str]:
    graph = load(model)
    scope, constant = owner(graph, name)
    return [form.kind for form in sparse_forms(constant, scope, NameSource(graph), **where)]


def stored_as(model: onnx.ModelProto, kind: str, name: str = "w") -> onnx.ModelProto:
    """Returns the model with a weight in a form, which takes the bytes that it says."""
    graph = load(model)
    scope, constant = owner(graph, name)
    form = next(form for form in sparse_forms(constant, scope, NameSource(graph)) if form.kind == kind)
    promised = form.nbytes - constant_bytes(constant, scope)
    store_sparse(constant, scope, form)
    sort_nodes(graph)
    result = to_model(graph)
    onnx.checker.check_model(result, full_check=True)
    assert abs(result.ByteSize() - model.ByteSize() - promised) <= 8
    return result


def outputs(model: onnx.ModelProto) -> list[Any]:
    running = oracle.session(model)
    return oracle.run(running, oracle.random_feeds(running))


def assert_exact(model: onnx.ModelProto, weight: Array, kind: str, name: str = "w") -> onnx.ModelProto:
    """Whether a form gives what the dense weight gives, is found in the file, and expands to the very weight."""
    coded = stored_as(model, kind, name)
    assert oracle.same_bits(outputs(model), outputs(coded))
    graph = load(coded)
    found = [item.site.rpartition("/")[2] for item in coded_weights(graph) if item.is_sparse]
    assert found == ([name] if kind != "constant" else [])
    assert [item.site.rpartition("/")[2] for item in expand_coded(graph)] == [name]
    dense = owner(graph, name)[1]
    assert dense.stored is None
    assert (dense.dtype, dense.shape, dense.values.tobytes()) == (weight.dtype, weight.shape, weight.tobytes())
    sort_nodes(graph)
    assert oracle.same_bits(outputs(model), outputs(to_model(graph)))
    return coded


@settings(max_examples=120, deadline=None)
@given(
    st.integers(7, 26),
    st.sampled_from([np.float16, np.float32, np.float64]),
    st.sampled_from(SHAPES),
    st.sampled_from([0.0, 0.3, 0.9, 0.99, 1.0, "rows", "blocks", "n:m"]),
    st.integers(0, 9),
)
def test_all_forms_are_exact(opset: int, dtype: Any, shape: tuple[int, ...], zeros: float | str, seed: int) -> None:
    weight = sparse(shape, zeros, dtype, seed)
    model = with_weight(weight, opset)
    found = kinds(model)
    assert {"mask"} <= set(found) <= (OLD if opset < 11 else OLD | {"gaps", "constant"})
    for kind in found:
        assert_exact(model, weight, kind)


def test_of_no_value_at_all() -> None:
    weight = np.zeros((40, 50), np.float32)
    model = with_weight(weight)
    assert "gaps" not in kinds(model)
    for kind in kinds(model):
        assert_exact(model, weight, kind)


def test_bits_of_nan_and_of_subnormal_numbers_stay() -> None:
    weight = sparse((30, 40), 0.7)
    weight[1, :3] = np.frombuffer(np.array([0x7FC00123, 0xFF800001, 0x00000001], np.uint32).tobytes(), np.float32)
    for kind in kinds(with_weight(weight)):
        graph = load(stored_as(with_weight(weight), kind))
        expand_coded(graph)
        assert owner(graph, "w")[1].values.tobytes() == weight.tobytes()


@pytest.mark.parametrize("kind", ["mask", "patterns", "gaps", "constant"])
def test_bfloat16(kind: str) -> None:
    weight = sparse((64, 64), "n:m").astype(helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16))
    assert_exact(with_weight(weight), weight, kind)


@pytest.mark.parametrize("kind", ["mask", "patterns", "gaps", "constant"])
class TestPlaces:
    def test_in_a_branch(self, kind: str) -> None:
        weight = sparse((40, 50), "n:m")

        def branch(name: str, weight_name: str) -> onnx.GraphProto:
            node = helper.make_node("MatMul", ["x", weight_name], [f"{name}_y"])
            return helper.make_graph([node], name, [], [oracle.tensor(f"{name}_y", [1, 50])], [oracle.value(weight_name, weight)])

        choose = helper.make_node("If", ["flag"], ["y"], then_branch=branch("yes", "w"), else_branch=branch("no", "v"))
        inputs = [oracle.tensor("x", [1, 40]), oracle.tensor("flag", [], TensorProto.BOOL)]
        assert_exact(oracle.make_model([choose], inputs, [oracle.tensor("y", [1, 50])]), weight, kind)

    def test_in_a_loop(self, kind: str) -> None:
        weight = sparse((40, 40), "n:m")
        nodes = [helper.make_node("MatMul", ["h", "w"], ["h2"]), helper.make_node("Identity", ["go"], ["go2"])]
        body = helper.make_graph(
            nodes,
            "body",
            [oracle.tensor("i", [], TensorProto.INT64), oracle.tensor("go", [], TensorProto.BOOL), oracle.tensor("h", [1, 40])],
            [oracle.tensor("go2", [], TensorProto.BOOL), oracle.tensor("h2", [1, 40])],
            [oracle.value("w", weight)],
        )
        loop = helper.make_node("Loop", ["times", "", "x"], ["y"], body=body)
        times = oracle.value("times", np.array(3, np.int64))
        model = oracle.make_model([loop], [oracle.tensor("x", [1, 40])], [oracle.tensor("y", [1, 40])], [times])
        assert_exact(model, weight, kind)

    def test_in_a_function(self, kind: str) -> None:
        weight = sparse((40, 40), "n:m")
        held = helper.make_node("Constant", [], ["w"], value=oracle.value("w", weight))
        body = [held, helper.make_node("MatMul", ["a", "w"], ["b"])]
        function = helper.make_function("test", "F", ["a"], ["b"], body, [helper.make_opsetid("", 17)])
        calls = [helper.make_node("F", ["x"], ["h"], domain="test"), helper.make_node("F", ["h"], ["y"], domain="test")]
        ends = [oracle.tensor("x", [1, 40])], [oracle.tensor("y", [1, 40])]
        model = oracle.make_model(calls, *ends, functions=[function], opsets={"test": 1})
        if kind == "constant":
            assert kind not in kinds(model, in_function=True), "ONNX Runtime 1.31 crashes where it inlines it twice"
        else:
            assert_exact(model, weight, kind)

    def test_tied_and_a_graph_output(self, kind: str) -> None:
        weight = sparse((40, 40), "n:m")
        nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Gemm", ["h", "w"], ["y"], transB=1)]
        results = [oracle.tensor("y", [1, 40]), oracle.tensor("w", [40, 40])]
        model = oracle.make_model(nodes, [oracle.tensor("x", [1, 40])], results, [oracle.value("w", weight)])
        if kind == "constant":
            assert kind not in kinds(model), "ONNX Runtime would give a SparseTensor"
        else:
            assert_exact(model, weight, kind)

    def test_a_constant_node_and_a_listed_initializer(self, kind: str) -> None:
        weight = sparse((40, 40), "n:m")
        held = helper.make_node("Constant", [], ["w"], name="holder", value=oracle.value("w", weight))
        ends = [oracle.tensor("x", [1, 40])], [oracle.tensor("y", [1, 40])]
        multiply = helper.make_node("MatMul", ["x", "w"], ["y"])
        assert_exact(oracle.make_model([held, multiply], *ends), weight, kind)
        listed = oracle.make_model([multiply], [*ends[0], oracle.tensor("w", [40, 40])], ends[1], [oracle.value("w", weight)])
        graph = load(listed)
        scope, constant = owner(graph, "w")
        form = next(form for form in sparse_forms(constant, scope, NameSource(graph)) if form.kind == kind)
        store_sparse(constant, scope, form)
        sort_nodes(graph)
        coded = to_model(graph)
        onnx.checker.check_model(coded, full_check=True)
        assert [info.name for info in coded.graph.input] == ["x"]
        feeds = {"x": np.ones((1, 40), np.float32)}
        dense, result = (oracle.run(oracle.session(model), feeds)[0] for model in (listed, coded))
        np.testing.assert_allclose(dense, result, rtol=1e-5, atol=1e-5)  # only one of the weights is a constant to ONNX Runtime


def ops(model: onnx.ModelProto, path: Path) -> Counter[str]:
    oracle.session(model, optimised_to=path)
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize("opset", [7, 9, 10, 11, 13, 18, 25])
@pytest.mark.parametrize("kind", ["mask", "patterns", "gaps", "constant"])
def test_no_node_is_left_when_a_session_has_started(tmp_path: Path, opset: int, kind: str) -> None:
    if opset < 11 and kind not in OLD:
        return
    weights = {f"w{i}": sparse((64, 64), "n:m", seed=i) for i in range(2)}
    nodes = [helper.make_node("MatMul", ["x", "w0"], ["h"]), helper.make_node("MatMul", ["h", "w1"], ["y"])]
    values = [oracle.value(name, weight) for name, weight in weights.items()]
    model = oracle.make_model(nodes, [oracle.tensor("x", [1, 64])], [oracle.tensor("y", [1, 64])], values, opset=opset)
    coded = stored_as(stored_as(model, kind, "w0"), kind, "w1")
    assert ops(coded, tmp_path / "coded.onnx") == ops(model, tmp_path / "dense.onnx")
    left = [onnx.load(tmp_path / f"{name}.onnx").graph for name in ("coded", "dense")]
    shapes = [sorted(tuple(t.dims) for t in [*graph.initializer, *graph.sparse_initializer]) for graph in left]
    assert shapes[0] == shapes[1]


def test_an_empty_or_old_scope_has_no_form() -> None:
    weight = sparse((40, 40), 0.5)
    held = helper.make_node("Constant", [], ["w"], value=oracle.value("w", weight))
    body = [held, helper.make_node("MatMul", ["a", "w"], ["b"])]
    function = helper.make_function("test", "F", ["a"], ["b"], body, [helper.make_opsetid("", 8)])
    call = helper.make_node("F", ["x"], ["y"], domain="test")
    ends = [oracle.tensor("x", [1, 40])], [oracle.tensor("y", [1, 40])]
    model = oracle.make_model([call], *ends, functions=[function], opsets={"test": 1}, opset=8)
    assert kinds(model) == []


def test_a_weight_whose_places_are_too_large_to_fold_is_only_a_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxshrink.graph.sparse_form.MAX_FOLDED_BYTES", 4 * 1600 - 1)
    assert kinds(with_weight(sparse((40, 40), 0.5))) == ["constant"]


def test_names_of_forms_that_are_not_stored_stay_free() -> None:
    graph = load(with_weight(sparse((40, 40), 0.5)))
    names = NameSource(graph)
    before = set(names.taken)
    forms = list(sparse_forms(graph.constants[0], graph, names))
    assert names.taken == before
    store_sparse(graph.constants[0], graph, next(form for form in forms if form.kind == "mask"))
    assert {tensor.name for tensor in graph.constants} <= names.taken


class TestSparseConstants:
    """What a Constant node holds as sparse_value is a constant like any other."""

    MODEL = staticmethod(lambda: stored_as(with_weight(sparse((40, 50), 0.9)), "constant"))

    def test_come_and_go_unchanged(self) -> None:
        assert oracle.differences(to_model(load(self.MODEL())), self.MODEL()) == []

    def test_are_dense_once_they_have_new_values(self) -> None:
        graph = load(self.MODEL())
        scope, constant = owner(graph, "w")
        set_values(constant, np.ones((40, 50), np.float32))
        result = to_model(graph)
        assert [attribute.name for attribute in result.graph.node[0].attribute] == ["value"]
        assert np.array_equal(outputs(result)[0], np.ones((50, 40)))
        assert scope.nodes

    def test_what_is_damaged_is_said(self) -> None:
        model = self.MODEL()
        model.graph.node[0].attribute[0].sparse_tensor.indices.int64_data[-1] = 2000
        with pytest.raises(ModelReadError, match="its data must be float32"):
            expand_coded(load(model))

    def test_sparse_initializers_expand_too(self) -> None:
        model = self.MODEL()
        held = model.graph.node[0].attribute[0].sparse_tensor
        held.values.name = "w"
        model.graph.sparse_initializer.append(held)
        del model.graph.node[0]
        graph = load(model)
        assert [item.site for item in expand_coded(graph)] == ["w"]
        assert to_model(graph).graph.initializer[0].name == "w"


def test_a_sparse_initializer_fails_the_full_check() -> None:
    """Why it is not among the forms; should this test fail one day, it may become one."""
    model = stored_as(with_weight(sparse((40, 50), 0.9)), "constant")
    held = model.graph.node[0].attribute[0].sparse_tensor
    held.values.name = "w"
    model.graph.sparse_initializer.append(held)
    del model.graph.node[0]
    onnx.checker.check_model(model)
    with pytest.raises(onnx.shape_inference.InferenceError, match="sparse_tensor"):
        onnx.checker.check_model(model, full_check=True)


def test_damaged_places_are_said() -> None:
    graph = load(stored_as(with_weight(sparse((40, 50), 0.9)), "gaps"))
    gaps = next(constant for constant in graph.constants if constant.dtype == np.uint8)
    gaps.values = np.full_like(gaps.values, 255)
    with pytest.raises(ModelReadError, match="the file is damaged"):
        expand_coded(graph)
