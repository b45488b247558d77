"""Tests of channel groups and of cutting them: what is refused and why, what a mean becomes, random graphs, real models."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnxshrink.errors import PassError
from onnxshrink.graph.channel_groups import channel_groups, find_channels
from onnxshrink.graph.channel_rules import _RULES, register_rule, rule_of, ruled_ops
from onnxshrink.graph.channel_sites import Rule
from onnxshrink.graph.cutting import cut_channels
from onnxshrink.graph.edit import remove_dead, replace_everywhere
from onnxshrink.graph.exporter import to_model
from onnxshrink.graph.files import load
from onnxshrink.graph.ir import Constant, Graph, Node
from tests import corpus, oracle
from tests.graph.channel_oracle import cut_and_compare, distance
from tests.graph.test_channel_rules import CASES, HEADS, C, N, S, between, build, ints, linear


def reason(model: Any, name: str = "w1") -> str:
    """Returns why the first group of that name that cannot be cut cannot be."""
    return next(str(group.reason) for group in channel_groups(load(model)) if group.name == name and group.reason is not None)


UNKNOWN = ["NonZero x -> z", ("Cast z -> u", {"to": 1}), ("ReduceMean u -> m", {"axes": [1]})]  # u [2, how many are not zero], m [2, 1]
REFUSED = {
    "an op without a rule": (between(("Trilu h -> r", {})), "Trilu has no rule"),
    "a graph output": (build(["Conv x w1 -> y"], (N, 4, S, S), w1=(C, 4, 1, 1)), "a graph output ('y')"),
    "Softmax": (between(("Softmax h -> r", {"axis": 1})), "weighs its positions"),
    "Softmax before opset 13": (between(("Softmax h -> r", {"axis": 1}), opset=11), "weighs its positions"),
    "LRN": (between(("LRN h -> r", {"size": 3})), "neighboring channels"),
    "ArgMax": (linear(("ArgMax h -> i", {"axis": -1}), ("Cast i -> f", {"to": 1}), "Mul h f -> r"), "ArgMax tells positions"),
    "ReduceMax": (linear(("ReduceMax h -> m", {"axes": [2]}), "Sub h m -> r"), "ReduceMax is taken over it"),
    "CumSum": (linear("CumSum h a -> r", a=np.int64(-1)), "CumSum adds up"),
    "a reshape that mixes": (build(["MatMul x w1 -> h", "Reshape h s -> r", "MatMul r w2 -> y"], (3, 4), w1=(4, C), w2=(9, 6), s=ints(4, 9)), "share no factors"),
    "positions looked up": (build(["MatMul x w1 -> h", ("Cast x -> i", {"to": 7}), ("Gather h i -> g", {"axis": 1}), ("ReduceSum g -> y", {})], (2, 2), w1=(2, C)), "looked up"),
    "padding that repeats": (between(("Pad h p -> r", {"mode": "edge"}), channels=14, p=ints(0, 1, 0, 0, 0, 1, 0, 0)), "padded"),
    "steps": (between("Slice h i j k s -> r", channels=6, i=ints(0), j=ints(C), k=ints(1), s=ints(2)), "sliced in steps"),
    "Squeeze of whatever is 1": (build(["MatMul x w1 -> h", "Squeeze h -> r", "MatMul r w2 -> y"], (N, 1, 4), w1=(4, C), w2=(C, 6)), "Squeeze would take"),
    "a shape that is only known at run time": (build(["MatMul x w1 -> h", ("Cast x -> c", {"to": 7}), "Reshape h c -> r", "Relu r -> y"], (2,), w1=(2, C)), "Reshape"),
    "TopK": (between(("TopK h k -> r i", {"axis": 1}), channels=5, k=ints(5)), "TopK picks"),
    "BatchNormalization for training": (between(("BatchNormalization h s c m v -> r rm rv", {"training_mode": 1}), s=(C,), c=(C,), m=(C,), v=(C,)), "for training"),
    "steps of a sequence": (
        build(["Conv x w1 -> h", ("Transpose h -> t", {"perm": [1, 0, 2]}), ("GRU t wg rg -> g", {"hidden_size": 3}), "ReduceSum g -> y"], (N, 4, S), w1=(C, 4, 1), wg=(1, 9, S), rg=(1, 9, 3)), "the steps of a sequence",
    ),
    "Resize that keeps the aspect ratio": (between(("Resize h . . s -> r", {"keep_aspect_ratio_policy": "not_larger"}), opset=18, s=ints(N, C, 9, 10)), "keeps the aspect ratio"),
    "a constant that is data and a shape": (build(["MatMul x w1 -> h", ("Cast k -> f", {"to": 1}), "Mul h f -> r", "Reshape r k -> q", "ReduceSum q -> y"], (1, 4), w1=(4, 3), k=ints(1, 3, 1)), "Reshape goes by its values"),
    "concatenated with who knows how many": (build([*UNKNOWN, "MatMul m w1 -> h", ("Concat u h -> r", {"axis": 1}), "MatMul r w2 -> y"], (2, 2), w1=(1, C), w2=(C + 4, 6)), "concatenated with an axis of unknown size"),
    "who knows how many, repeated": (build([*UNKNOWN, "Tile u k -> w1", "MatMul w1 w2 -> y"], (2, 2), k=ints(1, 2), w2=(8, 6)), "repeats an axis of unknown size"),
    "flattened with who knows how many": (build(["MatMul x w1 -> h", ("Transpose h -> t", {}), ("Flatten t -> f", {"axis": 0}), "MatMul f w2 -> y"], ("n", 4), w1=(4, C), w2=(C, 6)), "none of which can carry channels"),
    "whether a size equals an unknown one": (
        build(["MatMul x w1 -> h", "Shape h -> s", "Gather s one -> c", "Gather s zero -> n", "Equal c n -> e", "Where e two five -> q", ("Cast q -> f", {"to": 1}), "Div h f -> r", "MatMul r w2 -> y"], ("n", 4),
              w1=(4, C), w2=(C, 6), zero=np.int64(0), one=np.int64(1), two=np.int64(2), five=np.int64(5)), "its size is read by Cast",
    ),
    "a size that is read with unknown ones": (
        build(["MatMul x w1 -> h", "Size h -> n", ("Cast n -> f", {"to": 1}), "Div h f -> r", "MatMul r w2 -> y"], ("n", 4), w1=(4, C), w2=(C, 6)), "its size is read by Cast",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_cut_says_why(case):
    model, text = REFUSED[case]
    assert text in reason(model)


def test_what_a_body_reads_cannot_be_cut():
    body = helper.make_graph([helper.make_node("Relu", ["h"], ["inner"])], "body", [], [oracle.tensor("inner", None)])
    model = build(["MatMul x w1 -> h", "MatMul h w2 -> z"], (N, 4), w1=(4, C), w2=(C, 6), flag=np.bool_(True))
    model.graph.node.append(helper.make_node("If", ["flag"], ["r"], then_branch=body, else_branch=body))
    model.graph.node.append(helper.make_node("ReduceSum", ["r"], ["s"]))
    model.graph.node.append(helper.make_node("Add", ["z", "s"], ["y"]))
    assert reason(model) == "read or computed by If ('r')"


def test_what_a_rule_says_nothing_about_stays():
    model = build(["MatMul x w1 -> h", ("Quiet h -> r", {"domain": "test.quiet"}), "MatMul r w2 -> y"], (N, 4), w1=(4, C), w2=(C, 6))
    model.opset_import.append(helper.make_opsetid("test.quiet", 1))
    register_rule("Quiet", Rule(lambda site: None), "test.quiet")
    groups = channel_groups(load(model), {"h": (N, C), "r": (N, C), "y": (N, 6)})
    assert {(group.name, str(group.reason)) for group in groups if group.size == C} == {("w1", "Quiet may need all of it ('r')"), ("r", "None")}


def test_a_refused_cut_changes_nothing():
    graph = load(between("Relu h -> r"))
    before = to_model(graph).SerializeToString(deterministic=True)
    channels = find_channels(graph)
    inner, outer = (next(group for group in channels.groups if group.name == name) for name in ("w1", "w2"))
    with pytest.raises(PassError, match="what is left of axis 0 must be at least one channel, got none"):
        cut_channels(channels, {inner: range(C)})
    with pytest.raises(PassError, match=r"group 'w2': cannot be cut: a graph output \('y'\)"):
        cut_channels(channels, {outer: [0]})
    for wrong in ([C], [-1], [0.5], np.arange(C) > 5):
        with pytest.raises(PassError, match=f"group 'w1': channels must be numbers from 0 to {C - 1}, got"):
            cut_channels(channels, {inner: wrong})
    with pytest.raises(PassError, match="group 'w1': must be one of the groups of the channels given"):
        cut_channels(find_channels(graph), {inner: [0]})
    assert to_model(graph).SerializeToString(deterministic=True) == before
    cut_channels(channels, {inner: []})
    assert to_model(graph).SerializeToString(deterministic=True) == before


def change_nothing(graph: Graph) -> None:
    weight(graph, "w1").values = weight(graph, "w1").values + np.float32(1)


def drop_a_node(graph: Graph) -> None:
    relu = next(node for node in graph.nodes if node.op == "Relu")
    replace_everywhere(graph, relu.outputs[0], relu.inputs[0])
    remove_dead(graph, [relu])


def change_an_attribute(graph: Graph) -> None:
    graph.nodes[0].attrs["pads"] = [1, 1, 1, 1]


def change_a_shape(graph: Graph) -> None:
    weight(graph, "w2").values = weight(graph, "w2").values[:3]


def change_places(graph: Graph) -> None:
    weight(graph, "k").values = weight(graph, "k").values[::-1]


def change_an_output(graph: Graph) -> None:
    graph.outputs.append(graph.nodes[0].outputs[0])


def weight(graph: Graph, name: str) -> Constant:
    return next(constant for constant in graph.constants if constant.name == name)


CHANGES = {
    change_nothing: None, drop_a_node: "node 'r' changed", change_an_attribute: "node 'h' changed", change_a_shape: "tensor 'w2' changed",
    change_places: "tensor 'k' changed", change_an_output: "the graph's outputs changed",
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_channels_of_a_graph_that_was_changed_are_refused(change):
    graph = load(between("Relu h -> a", ("Gather a k -> r", {"axis": 1}), channels=4, k=ints(5, 1, 3, 0)))
    channels = find_channels(graph)
    change(graph)
    cut = {next(group for group in channels.groups if group.name == "w1"): [0]}
    if CHANGES[change] is None:
        cut_channels(channels, cut)
    before = to_model(graph).SerializeToString(deterministic=True)
    with pytest.raises(PassError, match=f"{CHANGES[change] or 'changed'}; find them anew"):  # having been cut is a change as well
        cut_channels(channels, cut)
    assert to_model(graph).SerializeToString(deterministic=True) == before


def test_weights_of_an_op_without_a_rule_are_listed_with_the_reason():
    model = between("LSTM h3 wl rl -> r", wl=(1, 8, 3), rl=(1, 8, 2))
    model.graph.node[1].op_type, model.graph.node[1].domain = "Foo", "test"
    model.graph.node[1].input[0] = "h"
    model.opset_import.append(helper.make_opsetid("test", 1))
    channels = find_channels(load(model))
    assert {str(group.reason) for group in channels.groups if group.name in ("wl", "rl")} == {"Foo has no rule ('r')"}
    assert channels.barriers["Foo"] == 1


def test_members_and_roles():
    model = between(("Conv h wg -> a", {"group": C}), "BatchNormalization a s c m v -> r", wg=(C, 1, 3, 3), s=(C,), c=(C,), m=(C,), v=(C,))
    group = next(group for group in channel_groups(load(model)) if group.name == "w1")
    roles = {(member.tensor.name, member.axis): member.role for member in group.members if member.role}
    assert roles == {
        ("w1", 0): "produces", ("b1", 0): "follows", ("w2", 1): "consumes", ("wg", 0): "follows",
        **{(name, 0): "follows" for name in "scmv"},
    }  # fmt: skip
    assert [member.tensor.name for member in group.members if not member.role] == ["h", "a", "r"]
    assert all(np.array_equal(member.places, np.arange(C)) for member in group.members)


@pytest.mark.parametrize(
    ("lines", "shape", "produces"),
    [
        ([("Transpose k -> w1", {})], (C, 4), [0]),
        ([("Transpose k -> w1", {"perm": [1, 0]})], (C, 4), [0]),
        ([("Transpose k -> t", {"perm": [2, 0, 1]}), "Reshape t two -> w1"], (2, C, 2), [1]),
        (["Unsqueeze k one -> u", "Identity u -> i", "Squeeze i one -> w1"], (4, C), [1]),
        ([("Flatten k -> w1", {})], (4, 3, 4), [1, 2]),
        ([("Flatten k -> w1", {"axis": 2})], (2, 2, C), [2]),
    ],
    ids=["reversed", "transposed", "transposed and reshaped", "unsqueezed and squeezed", "joined columns", "joined rows"],
)
def test_roles_of_weights_that_are_moved(lines, shape, produces):
    model = build([*lines, "MatMul x w1 -> h", "MatMul h w2 -> y"], (N, 4), k=shape, w2=(C, 6), one=ints(1), two=ints(4, C))
    roles = {(m.tensor.name, m.axis): m.role for group in channel_groups(load(model)) for m in group.weights if group.reason is None}
    assert {axis for (name, axis), role in roles.items() if name == "k" and role == "produces"} <= set(produces)
    assert roles["k", produces[0]] == "produces"
    assert roles["w2", 0] == "consumes"


def test_flattened_channels_lie_on_many_places():
    model, _ = CASES["Flatten"]
    group = channel_groups(load(model))[0]
    flat = next(member for member in group.members if member.tensor.name == "w2")
    assert (flat.axis, flat.role) == (1, "consumes")
    assert np.array_equal(flat.places, np.arange(C * S * S) // (S * S))


def test_heads_or_what_each_head_has():
    model, _ = CASES["heads"]
    inner = {(group.name, group.size) for group in channel_groups(load(model), outer=False) if group.reason is None}
    assert inner == {("wq", 4), ("wv", 4)}  # queries and keys go together, values on their own
    for seed in range(3):
        error, _, _ = cut_and_compare(model, seed=seed, outer=False, share=1.0)
        assert error < 1e-6


def test_heads_of_unknown_batch_and_sequence():
    lines = ["Shape x -> s", "Gather s zero -> n", "Gather s one -> m", "Unsqueeze n axes -> nu", "Unsqueeze m axes -> mu",
             ("Concat nu mu three four -> split", {"axis": 0}), ("Concat nu mu all -> join", {"axis": 0}), *HEADS]  # fmt: skip
    model = build(lines, ("n", "m", 8), wq=(8, C), bq=(C,), wk=(8, C), wv=(8, C), wo=(C, 8), zero=np.int64(0), one=np.int64(1),
                  axes=ints(0), three=ints(3), four=ints(4), all=ints(C))  # fmt: skip
    feeds = {"x": np.random.default_rng(0).standard_normal((3, 7, 8)).astype(np.float32)}
    for outer, size in ((True, 3), (False, 4)):
        assert {group.size for group in channel_groups(load(model), outer=outer) if group.reason is None} == {size}
        error, cut, _ = cut_and_compare(model, feeds=feeds, outer=outer, share=1.0)
        assert error < 1e-6
        assert [dim.dim_param for dim in cut.graph.input[0].type.tensor_type.shape.dim[:2]] == ["n", "m"]


def averaged(opset: int, width: int, *, keep: np.ndarray | None = None) -> Any:
    """Returns MatMul, LayerNormalization in one node or in seven, and MatMul, with all channels or only some."""
    rng, kept = np.random.default_rng(0), np.arange(width) if keep is None else keep
    first, second = rng.standard_normal((4, width)).astype(np.float32), rng.standard_normal((width, 6)).astype(np.float32)
    scale, shift = rng.standard_normal((2, width)).astype(np.float32)
    whole = [("LayerNormalization h s b -> r", {"axis": -1})]
    parts = [("ReduceMean h -> m", {"axes": [-1]}), "Sub h m -> d", "Mul d d -> e", ("ReduceMean e -> v", {"axes": [-1]}), "Add v small -> f", "Sqrt f -> g", "Div d g -> i", "Mul i s -> j", "Add j b -> r"]  # fmt: skip
    constants = {"w1": first[:, kept], "w2": second[kept], "s": scale[kept], "b": shift[kept]}
    more = {} if opset >= 17 else {"small": np.float32(1e-5)}
    return build(["MatMul x w1 -> h", *(whole if opset >= 17 else parts), "MatMul r w2 -> y"], (N, S, 4), opset, **constants, **more)


@pytest.mark.parametrize("opset", [13, 17])
def test_a_mean_over_channels_is_that_of_what_is_left(opset):
    keep = np.array([0, 2, 3, 7, 11])
    channels = find_channels(load(averaged(opset, C)))
    group = next(group for group in channels.groups if group.name == "w1")
    assert group.reason is None
    assert group.size == C
    assert group.resliced == (("r",) if opset == 17 else ("m", "v"))
    cut_channels(channels, {group: np.setdiff1d(np.arange(C), keep)})
    left, right = oracle.session(to_model(channels.graph)), oracle.session(averaged(opset, C, keep=keep))
    feeds = oracle.random_feeds(left)
    assert distance(oracle.run(left, feeds), oracle.run(right, feeds)) < 1e-6


def test_a_size_that_is_read_keeps_its_value():
    model, _ = CASES["a size that scales"]
    _, cut, channels = cut_and_compare(model, {"w1": range(8)})
    assert channels == {"w1": 8}
    assert "Shape" not in [node.op_type for node in cut.graph.node]  # replaced by what it was, and gone
    assert [C] in [numpy_helper.to_array(tensor).reshape(-1).tolist() for tensor in cut.graph.initializer]


def test_a_shape_that_follows_by_itself_stays_as_it_is_written():
    model, _ = CASES["Reshape by arithmetic that has the channels"]
    _, cut, _ = cut_and_compare(model, {"w1": [1, 5]})
    assert [node.op_type for node in cut.graph.node] == [node.op_type for node in model.graph.node]
    assert [tensor.name for tensor in cut.graph.initializer] == [tensor.name for tensor in model.graph.initializer]


def test_shapes_that_are_known_better():
    model = build([("Foo x -> f", {"domain": "test"}), "MatMul f w1 -> h", "MatMul h w2 -> y"], (N, 4), w1=(4, C), w2=(C, 6))
    model.opset_import.append(helper.make_opsetid("test", 1))
    assert not any(group.reason is None for group in channel_groups(load(model)))
    assert [group.size for group in channel_groups(load(model), {"f": (N, 4)}) if group.reason is None] == []
    assert [group.size for group in channel_groups(load(model), {"f": (N, 4), "h": (N, C), "y": (N, 6)}) if group.reason is None] == [C]


def test_third_parties_add_rules():
    node = Node("Foo", [], [], domain="test.rules")
    assert rule_of(node) is None
    register_rule("Foo", rule := Rule(lambda site: site.barrier("Foo")), "test.rules")
    assert rule_of(node) is rule
    register_rule("Foo", rule, "ai.onnx")
    assert rule_of(Node("Foo", [], [])) is rule
    del _RULES["", "Foo"]
    assert "Foo" not in ruled_ops()
    assert len(ruled_ops()) > 120


CORPUS = "cifar_resnet20 dtln_1 fsanet_1x1 magika_v3_3 mnist_cntk ppocrv2_cls squeezenet_fp32up subpixel_cnn yolox_nano".split()


@pytest.mark.parametrize("name", CORPUS)
def test_real_models(name, tell):
    path = corpus.model_path(name)
    if not path.exists():
        pytest.skip(corpus.ABSENT)
    model = onnx.load(path)
    initializers = {tensor.name for tensor in model.graph.initializer}
    feeds = corpus.sample(name, [info.name for info in model.graph.input if info.name not in initializers])
    for seed in range(2):
        error, cut, channels = cut_and_compare(model, feeds=feeds, seed=seed, outer=seed != 1, share=0.5)
        assert error < 3e-6
    tell(f"channels of {name}: {sum(channels.values())} channels of {len(channels)} groups cut, {model.ByteSize()} -> {cut.ByteSize()} bytes, off by {error:.1e}")
