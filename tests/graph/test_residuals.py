"""What the outputs of layers are added to: found where it may be made up for, and settled by then, whatever later weights become."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, parser

from onnxshrink.graph.exporter import to_model
from onnxshrink.graph.files import load
from onnxshrink.graph.ir import Graph
from onnxshrink.graph.residuals import summands
from onnxshrink.graph.weights import Weight, weights
from tests import oracle

HEAD = '<ir_version: 8, opset_import: ["": 17]> '
SQUARE = "float[2, 2] {} = {{1, 2, 3, 4}}"


def operands(graph: Graph) -> dict[str, Weight]:
    return {weight.site: weight for weight in weights(graph) if weight.computes}


def found(text: str, *stages: str) -> dict[str, tuple[tuple[str, ...], ...]]:
    """Returns the summands in a body of nodes over x [2, 2] with weights of one letter that ``stages`` name, and a bias b."""
    names = sorted({*"".join(stages)})
    constants = ", ".join([*(SQUARE.format(name) for name in names), "float[2] b = {1, 2}"])
    graph = load(parser.parse_model(f"{HEAD} g (float[2, 2] x, bool flag) => (float[2, 2] y) <{constants}> {{ {text} }}"))
    found = operands(graph)
    return summands(graph, [[found[name] for name in stage] for stage in stages])


def test_a_branch_is_added_to_what_went_around_it() -> None:
    text = "s = MatMul(x, v) r = Relu(s) m = MatMul(r, w) c = Add(b, m) t = Add(s, c) y = Relu(t)"
    assert found(text, "v", "w") == {"v": (("s",),), "w": (("m", "s"),)}


def test_sums_of_several_and_chains_of_sums() -> None:
    text = "s = MatMul(x, v) r = Relu(s) m = MatMul(r, w) q = Neg(s) c = Sum(q, m, b) t = Add(c, r) y = Relu(t)"
    assert found(text, "v", "w")["w"] == (("m", "q", "r"),)


def test_what_is_rewritten_later_or_in_the_same_stage_is_not_known_yet() -> None:
    text = "m = MatMul(x, v) n = MatMul(x, w) k = MatMul(n, u) t = Sum(m, n, k, x) y = Neg(t)"
    assert found(text, "vw", "u") == {"v": (("m",),), "w": (("n",),), "u": (("k", "m", "n"),)}
    assert found(text, "v", "w", "u") == {"v": (("m",),), "w": (("n",),), "u": (("k", "m", "n"),)}  # n itself goes elsewhere too
    alone = "m = MatMul(x, v) n = MatMul(x, w) t = Add(m, n) y = Neg(t)"
    assert found(alone, "v", "w") == {"v": (("m",),), "w": (("n", "m"),)}


@pytest.mark.parametrize(
    "rest",
    [
        "t = Mul(m, s) y = Neg(t)",
        "t = Add(m, s) n = Neg(m) y = Add(t, n)",
        "t = Add(m, m) y = Add(t, s)",
        "k = Identity(m) y = Add(k, s)",
        "t = If(flag) <then_branch = p () => (float[2, 2] o) { o = Add(m, s) }, else_branch = e () => (float[2, 2] q) { q = Neg(s) }> y = Neg(t)",
    ],
)
def test_other_ways_end_the_search(rest: str) -> None:
    assert found(f"s = MatMul(x, v) r = Relu(s) m = MatMul(r, w) {rest}", "v", "w")["w"] == (("m",),)


def test_outputs_of_the_graph_are_right_themselves() -> None:
    assert found("s = MatMul(x, v) y = MatMul(s, w) t = Add(y, s)", "v", "w")["w"] == (("y",),)
    assert found("s = MatMul(x, v) m = MatMul(s, w) y = Add(m, s) t = Add(y, x)", "v", "w")["w"] == (("m", "s"),)


def test_every_use_of_a_tied_weight_has_its_own() -> None:
    text = "s = MatMul(x, v) r = Relu(s) m = MatMul(r, w) t = Add(m, s) k = Relu(t) n = MatMul(k, w) y = Add(n, r)"
    assert found(text, "v", "w")["w"] == (("m", "s"), ("n", "r"))


@st.composite
def networks(draw: st.DrawFn) -> onnx.ModelProto:
    """Returns a random model of MatMul, Add, Sum and Relu on tensors of one shape."""
    tensors, nodes, count = ["x"], [], 0
    for index in range(draw(st.integers(2, 12))):
        kind = draw(st.sampled_from(["MatMul", "MatMul", "Add", "Sum", "Relu"]))
        inputs = [draw(st.sampled_from(tensors[-4:])) for _ in range({"Relu": 1, "MatMul": 1, "Add": 2, "Sum": 3}[kind])]
        if kind == "MatMul":
            inputs.append(f"w{count}")
            count += 1
        nodes.append(helper.make_node(kind, inputs, [f"t{index}"]))
        tensors.append(f"t{index}")
    rng = np.random.default_rng(0)
    values = [oracle.value(f"w{index}", rng.standard_normal((3, 3)).astype(np.float32)) for index in range(count)]
    shape = oracle.tensor("x", [2, 3])
    return oracle.make_model(nodes, [shape], [oracle.tensor(tensors[-1], [2, 3])], values)


def values(model: onnx.ModelProto) -> dict[str, np.ndarray[Any, Any]]:
    """Returns all tensors for one input, by ONNX Runtime."""
    asked = onnx.ModelProto()
    asked.CopyFrom(model)
    names = [node.output[0] for node in model.graph.node]
    known = [value.name for value in model.graph.output]
    asked.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    running = oracle.session(asked, optimise=False)
    outputs = [value.name for value in running.get_outputs()]
    return dict(zip(outputs, oracle.run(running, {"x": np.ones((2, 3), np.float32)}), strict=True))


@given(networks(), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_what_is_added_is_settled_and_is_not_moved_by_later_weights(model: onnx.ModelProto, order: Any) -> None:
    graph = load(model)
    ours = sorted(operands(graph).items())
    order.shuffle(ours)
    stages = [[weight] for _, weight in ours]
    before = values(to_model(graph))
    for number, (names,) in enumerate(summands(graph, stages)[site] for site, _ in ours):
        changed = load(model)
        twins = operands(changed)
        for site, _ in ours[number:]:
            twins[site].constant.values = twins[site].constant.values + np.float32(1)
        after = values(to_model(changed))
        for name in names[1:]:
            np.testing.assert_array_equal(after[name], before[name])
        assert names[0] == ours[number][1].uses[0].node.outputs[0].name
