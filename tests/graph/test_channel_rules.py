"""Tests of channel rules: for every op, a graph without some channels computes what the original does with those set to zero."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from onnxshrink.graph.channel_groups import find_channels
from onnxshrink.graph.files import load
from tests import oracle
from tests.graph.channel_oracle import cut_and_compare

N, C, S = 2, 12, 5  # samples, channels, places


def build(lines: list[Any], shape: tuple[int | str, ...], opset: int = 17, ir_version: int = 8, **constants: Any) -> Any:
    """Returns a model from lines "Op a b -> c" or (line, attributes); w* and others not given are random of the shape given."""
    rng = np.random.default_rng(0)
    nodes = []
    for line in lines:
        text, attributes = line if isinstance(line, tuple) else (line, {})
        left, right = text.split(" -> ")
        op, *reads = left.split()
        nodes.append(helper.make_node(op, ["" if name == "." else name for name in reads], right.split(), **attributes))
    values = []
    for name, given in constants.items():
        is_shape = isinstance(given, tuple)
        values.append(oracle.value(name, (rng.standard_normal(given) / 2).astype(np.float32) if is_shape else np.asarray(given)))
    return oracle.make_model(
        nodes, [oracle.tensor("x", shape)], [oracle.tensor("y", None)], values, opset=opset, ir_version=ir_version
    )


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def between(*lines: Any, channels: int = C, opset: int = 17, **constants: Any) -> Any:
    """Returns a model of a Conv, what is given (from h to r), and another Conv."""
    first, last = "Conv x w1 b1 -> h", "Conv r w2 -> y"
    return build([first, *lines, last], (N, 4, S, S), opset, w1=(C, 4, 1, 1), b1=(C,), w2=(6, channels, 3, 3), **constants)


def positive(size: int = C) -> np.ndarray:
    return np.random.default_rng(1).uniform(0.5, 1.5, size).astype(np.float32)


def linear(*lines: Any, width: int = C, opset: int = 17, shape: tuple[int | str, ...] = (N, S, 4), **constants: Any) -> Any:
    """Returns a model of a MatMul, what is given (from h to r), and another MatMul."""
    return build(["MatMul x w1 -> h", *lines, "MatMul r w2 -> y"], shape, opset, w1=(4, C), w2=(width, 6), **constants)


SHAPE_OF_H = ["Shape h -> s", "Gather s zero -> n", "Unsqueeze n axes -> u", ("Concat u rest -> t", {"axis": 0})]
HEADS = [
    "MatMul x wq -> q0", "Add q0 bq -> q", "MatMul x wk -> k", "MatMul x wv -> v",
    "Reshape q split -> q4", "Reshape k split -> k4", "Reshape v split -> v4",
    ("Transpose q4 -> qt", {"perm": [0, 2, 1, 3]}), ("Transpose k4 -> kt", {"perm": [0, 2, 3, 1]}), ("Transpose v4 -> vt", {"perm": [0, 2, 1, 3]}),
    "MatMul qt kt -> a", ("Softmax a -> p", {"axis": -1}), "MatMul p vt -> o", ("Transpose o -> ot", {"perm": [0, 2, 1, 3]}),
    "Reshape ot join -> r", "MatMul r wo -> y",
]  # fmt: skip
CASES: dict[str, tuple[Any, dict[str, int]]] = {
    "Relu": (between("Relu h -> r"), {"w1": C}),
    "a function that is not 0 at 0": (between("Sigmoid h -> a", "Exp a -> r"), {"w1": C}),
    "Conv in groups": (between(("Conv h wg bg -> r", {"group": 3}), wg=(C, 4, 1, 1), bg=(C,)), {"w1": 4, "wg": 4}),
    "depthwise Conv": (between(("Conv h wg bg -> r", {"group": C}), wg=(C, 1, 3, 3), bg=(C,)), {"w1": C}),
    "depthwise Conv with a multiplier": (between(("Conv h wg -> r", {"group": C}), channels=24, wg=(24, 1, 1, 1)), {"w1": C}),
    "one output for each group": (between(("Conv h wg -> r", {"group": 4}), channels=4, wg=(4, 3, 1, 1)), {"w1": 4}),
    "ConvTranspose": (between("ConvTranspose h wt bt -> r", channels=8, wt=(C, 8, 2, 2), bt=(8,)), {"w1": C, "wt": 8}),
    "ConvTranspose in groups": (between(("ConvTranspose h wt -> r", {"group": 2}), channels=8, wt=(C, 4, 2, 2)), {"w1": 6, "wt": 4}),
    "depthwise ConvTranspose": (between(("ConvTranspose h wt -> r", {"group": C}), wt=(C, 1, 2, 2)), {"w1": C}),
    "BatchNormalization": (between("BatchNormalization h s c m v -> r", s=(C,), c=(C,), m=(C,), v=positive()), {"w1": C}),
    "InstanceNormalization": (between("InstanceNormalization h s c -> r", s=(C,), c=(C,)), {"w1": C}),
    "GroupNormalization 18": (between(("GroupNormalization h s c -> r", {"num_groups": 4}), opset=18, s=(4,), c=(4,)), {"w1": 4}),
    "GroupNormalization 21": (between(("GroupNormalization h s c -> r", {"num_groups": 4}), opset=21, s=(C,), c=(C,)), {"w1": 4}),
    "group normalization, taken apart": (
        between("Reshape h g -> a", "InstanceNormalization a s c -> i", "Shape h -> t", "Reshape i t -> r", g=ints(0, 4, -1), s=(4,), c=(4,)),
        {"w1": 4},
    ),
    "PRelu": (between("PRelu h slope -> r", slope=(C, 1, 1)), {"w1": C}),
    "pooling": (between(("MaxPool h -> p", {"kernel_shape": [2, 2]}), ("AveragePool p -> r", {"kernel_shape": [2, 2]})), {"w1": C}),
    "element-wise with broadcasting": (between("Mul h s -> a", "Add one a -> r", s=(1, C, 1, 1), one=(1,)), {"w1": C}),
    "Where": (between("Greater h s -> g", "Where g h s -> r", s=(C, 1, 1)), {"w1": C}),
    "Clip": (between("Clip h low . -> r", low=np.float32(-0.1)), {"w1": C}),
    "residual sum": (between("Conv h wa -> a", "Add a h -> r", wa=(C, C, 1, 1)), {"w1": C}),
    "squeeze and excite": (
        between("GlobalAveragePool h -> p", "Conv p wa -> a", "Relu a -> b", "Conv b wb -> c", "HardSigmoid c -> d", "Mul h d -> r", wa=(3, C, 1, 1), wb=(C, 3, 1, 1)),
        {"w1": C, "wa": 3},
    ),
    "Concat": (between("Relu h -> a", "Conv h wa -> b", ("Concat a b a -> r", {"axis": 1}), channels=29, wa=(5, C, 1, 1)), {"w1": C, "wa": 5}),
    "Split": (between(("Split h n -> a b", {"axis": 1}), ("Concat b a -> r", {"axis": -3}), n=ints(5, 7)), {"w1": 5, "w1 2": 7}),
    "Split in equal parts": (between(("Split h -> a b", {"axis": 1}), "Mul a b -> r", channels=6), {"w1": 6}),
    "Split 18": (between(("Split h -> a b", {"axis": 1, "num_outputs": 2}), "Conv a wa -> c", "Add b c -> r", channels=6, opset=18, wa=(6, 6, 1, 1)), {"w1": 6, "w1 2": 6}),
    "Split 11": (between(("Split h -> a b", {"axis": 1, "split": [4, 8]}), "Conv a wa -> c", "Add b c -> r", channels=8, opset=11, wa=(8, 4, 1, 1)), {"w1": 4, "w1 2": 8}),
    "Slice": (between("Slice h i j k -> r", channels=5, i=ints(3), j=ints(8), k=ints(1)), {"w1": 7, "w1 2": 5}),
    "Slice, and all of it": (between("Slice h i j k -> a", "Conv h wa -> c", "Conv a wb -> d", "Add c d -> r", channels=3, i=ints(-7), j=ints(2**62), k=ints(-3), wa=(3, C, 1, 1), wb=(3, 7, 1, 1)), {"w1": 5, "w1 2": 7, "wa": 3}),
    "Slice backwards": (between("Slice h i j k s -> a", "Conv h wa -> c", "Conv a wb -> d", "Add c d -> r", channels=3, i=ints(7), j=ints(-(2**62)), k=ints(1), s=ints(-1), wa=(3, C, 1, 1), wb=(3, 8, 1, 1)), {"w1": 8, "w1 2": 4, "wa": 3}),
    "Slice 9": (between(("Slice h -> r", {"axes": [1, 2], "starts": [2, 0], "ends": [100, 4]}), channels=10, opset=9), {"w1": 2, "w1 2": 10}),
    "Gather": (between(("Gather h i -> r", {"axis": 1}), channels=5, i=ints(3, -1, 7, 0, 5)), {"w1": 5, "w1 2": 7}),
    "Gather, twice the same": (between(("Gather h i -> r", {"axis": 1}), channels=4, i=ints(3, 3, 7, 0)), {"w1": 3, "w1 2": 9}),
    "Transpose": (build(["Conv x w1 -> h", ("Transpose h -> t", {"perm": [0, 2, 3, 1]}), "MatMul t w2 -> y"], (N, 4, S, S), w1=(C, 4, 1, 1), w2=(C, 6)), {"w1": C}),
    "Pad": (between("Pad h p -> r", p=ints(0, 0, 1, 1, 0, 0, 1, 1)), {"w1": C}),
    "Pad of channels": (between("Pad h p -> a", "Conv x wa -> b", "Add a b -> r", channels=15, p=ints(0, 1, 0, 0, 0, 2, 0, 0), wa=(15, 4, 1, 1)), {"w1": C, "wa": 3}),
    "Pad of channels, before opset 11": (between(("Pad h -> a", {"pads": [0, 1, 0, 0, 0, 2, 0, 0]}), "Conv x wa -> b", "Add a b -> r", channels=15, opset=9, wa=(15, 4, 1, 1)), {"w1": C, "wa": 3}),
    "Resize by scales": (between("Resize h . k -> r", k=np.float32([1, 1, 2, 2])), {"w1": C}),
    "Resize to sizes": (between("Resize h . . k -> r", k=ints(N, C, 7, 9)), {"w1": C}),
    "Upsample": (between("Upsample h k -> r", opset=9, k=np.float32([1, 1, 2, 2])), {"w1": C}),
    "DepthToSpace": (between(("DepthToSpace h -> r", {"blocksize": 2}), channels=3), {"w1": 3}),
    "DepthToSpace CRD": (between(("DepthToSpace h -> r", {"blocksize": 2, "mode": "CRD"}), channels=3), {"w1": 3}),
    "SpaceToDepth": (between(("DepthToSpace h -> a", {"blocksize": 2}), ("SpaceToDepth a -> r", {"blocksize": 2})), {"w1": 3}),
    "pixel shuffle, taken apart": (
        between("Reshape h a -> b", ("Transpose b -> c", {"perm": [0, 1, 4, 2, 5, 3]}), "Reshape c d -> r", channels=3, a=ints(N, 3, 2, 2, S, S), d=ints(N, 3, 10, 10)),
        {"w1": 3},
    ),
    "channel shuffle": (
        between(("Conv h wa -> g", {"group": 3}), "Reshape g a -> b", ("Transpose b -> c", {"perm": [0, 2, 1, 3, 4]}), "Reshape c d -> e", ("Conv e wb -> r", {"group": 3}), a=ints(N, 3, 4, S, S), d=ints(N, -1, S, S), wa=(C, 4, 1, 1), wb=(C, 4, 1, 1)),
        {"w1": 4, "wb": 4},
    ),
    "Flatten": (build(["Conv x w1 -> h", "Flatten h -> f", ("Gemm f w2 b2 -> y", {"transB": 1})], (N, 4, S, S), w1=(C, 4, 1, 1), w2=(6, C * S * S), b2=(6,)), {"w1": C}),
    "Reshape with a number of features": (build(["Conv x w1 -> h", "Reshape h a -> f", "Gemm f w2 -> y"], ("n", 4, S, S), w1=(C, 4, 1, 1), w2=(C * S * S, 6), a=ints(-1, C * S * S)), {"w1": C}),
    "Reshape by arithmetic of shapes": (
        build(["Conv x w1 -> h", *SHAPE_OF_H, "Reshape h t -> f", "Gemm f w2 -> y"], ("n", 4, S, S), w1=(C, 4, 1, 1), w2=(C * S * S, 6), zero=np.int64(0), axes=ints(0), rest=ints(C * S * S)),
        {"w1": C},
    ),
    "Reshape by arithmetic that has the channels": (
        build(["Conv x w1 -> h", "Shape h -> s", "Slice s i j -> c", ("Concat c p -> t", {"axis": 0}), "Reshape h t -> f", ("Transpose f -> f2", {"perm": [0, 2, 1]}), "MatMul f2 w2 -> y"], ("n", 4, S, S), w1=(C, 4, 1, 1), w2=(C, 6), i=ints(0), j=ints(2), p=ints(-1)),
        {"w1": C},
    ),
    "a size that scales": (
        linear("Shape h -> s", "Gather s two -> n", ("Cast n -> f", {"to": TensorProto.FLOAT}), "Sqrt f -> q", "Div h q -> r", two=np.int64(2)), {"w1": C},
    ),
    "Gather of several places, all of whose axes are cut": (
        build(["MatMul x w1 -> h", ("Gather h k -> g", {"axis": 1}), "Conv g w3 -> u", "MatMul h w2 -> y2", "ReduceSum u -> s", "Add y2 s -> y"], (N, 4), w1=(4, C), k=np.array([[0, 9, 4], [-1, 2, 9]]), w3=(5, 2, 1), w2=(C, 6)),
        {"w1": 7, "g": 2, "w3": 5},
    ),
    "Slice by sizes of 32 bits": (
        linear("Shape h -> s", "Gather s i -> n", "Div n i -> k", ("Cast k -> k32", {"to": TensorProto.INT32}), "Slice h k32 e a -> r", width=6, i=ints(2), e=np.array([C], np.int32), a=np.array([2], np.int32)),
        {"w1": 6, "w1 2": 6},
    ),
    "as many ones as there are channels": (
        linear("Shape h -> s", "Gather s two -> n", ("ConstantOfShape n -> o", {"value": oracle.value("one", np.ones(1, np.int64))}), ("Cast o -> f", {"to": TensorProto.FLOAT}), "ReduceSum f -> t", "Div h t -> u", "Mul u f -> r", two=ints(2)),
        {"w1": C},
    ),
    "TopK over places": (linear(("TopK h k -> v i", {"axis": -2}), ("Cast i -> f", {"to": TensorProto.FLOAT}), "Mul v f -> r", k=ints(3)), {"w1": C}),
    "Upsample before opset 9": (between(("Upsample h -> r", {"scales": [1.0, 1.0, 2.0, 2.0]}), opset=7), {"w1": C}),
    "Resize of some axes": (
        between(("Resize h . k -> a", {"axes": [2, 3]}), ("Resize a . . s -> r", {"axes": [-1]}), opset=18, k=np.array([2, 1], np.float32), s=ints(7)), {"w1": C},
    ),
    "Pad of some axes": (between("Pad h p . a -> r", channels=C + 3, opset=18, p=ints(1, 2, 0, 1), a=ints(-1, 1)), {"w1": C, "r": 3}),
    "Squeeze": (build(["Conv x w1 -> h", "GlobalAveragePool h -> p", "Squeeze p a -> q", "Unsqueeze q b -> u", "Squeeze u b -> r", "MatMul r w2 -> y"], (N, 4, S, S), w1=(C, 4, 1, 1), w2=(C, 6), a=ints(2, 3), b=ints(1)), {"w1": C}),
    "Expand": (between("Reshape s a -> e", "Expand e t -> f", "Mul h f -> r", s=(C,), a=ints(1, C, 1, 1), t=ints(N, C, S, S)), {"w1": C}),
    "ConstantOfShape": (linear("Shape h -> s", "ConstantOfShape s -> z", "Add h z -> r"), {"w1": C}),
    "Tile": (linear("Tile h k -> r", width=24, k=ints(1, 1, 2)), {"w1": C}),
    "ReduceSum": (linear("ReduceSum h a -> s", "Div h s -> r", a=ints(-1)), {"w1": C}),
    "ReduceL2 over places": (linear(("ReduceL2 h -> r", {"axes": [1], "keepdims": 0})), {"w1": C}),
    "ReduceMax over places": (linear(("ReduceMax h -> r", {"axes": [1]})), {"w1": C}),
    "Softmax over places": (linear(("Softmax h -> r", {"axis": 1})), {"w1": C}),
    "CumSum over places": (linear("CumSum h a -> r", a=np.int64(1)), {"w1": C}),
    "ArgMax over places": (linear(("ArgMax h -> i", {"axis": 1}), ("Cast i -> f", {"to": 1}), "Mul h f -> r"), {"w1": C}),
    "MatMul from the left": (build(["MatMul w1 x -> h", "Relu h -> r", "MatMul w2 r -> y"], (N, 4, S), w1=(C, 4), w2=(6, C)), {"w1": C}),
    "MatMul of several": (build(["MatMul x w1 -> h", "MatMul h w2 -> y"], (3, N, 4), w1=(3, 4, C), w2=(3, C, 6)), {"w1": C}),
    "MatMul with a vector": (build(["MatMul x w1 -> h", "MatMul h w2 -> y"], (3, N, 4), w1=(4, C), w2=(C,)), {"w1": C}),
    "Gemm, transposed": (build([("Gemm x w1 b1 -> h", {"transB": 1}), ("Gemm wt h -> y", {"transB": 1})], (N, 4), w1=(C, 4), b1=(C,), wt=(6, C)), {"w1": C}),
    "Gemm, transA": (build([("Gemm w1 x -> h", {"transA": 1, "transB": 1}), ("Gemm h w2 -> y", {"transA": 1})], (N, 4), w1=(4, C), w2=(C, 6)), {"w1": C}),
    "Einsum": (build([("Einsum x w1 -> h", {"equation": "bsi,ihd->bhsd"}), ("Einsum h w2 -> y", {"equation": "bhsd,hdo->bso"})], (N, S, 4), w1=(4, 3, 4), w2=(3, 4, 6)), {"w1": 3, "w1 2": 4}),
    "weights behind Transpose and DequantizeLinear": (
        build(["DequantizeLinear q s -> d", ("Transpose d -> w1", {"perm": [1, 0]}), "MatMul x w1 -> h", "MatMul h w2 -> y"], (N, 4), q=np.random.default_rng(0).integers(-9, 9, (C, 4)).astype(np.int8), s=np.float32(0.1), w2=(C, 6)),
        {"q": C},
    ),
    "DequantizeLinear per channel": (
        build([("DequantizeLinear q s z -> w1", {"axis": 1}), "MatMul x w1 -> h", "MatMul h w2 -> y"], (N, 4), q=np.random.default_rng(0).integers(-9, 9, (4, C)).astype(np.int8), s=positive(), z=np.zeros(C, np.int8), w2=(C, 6)),
        {"q": C},
    ),
    "embedding": (build([("Cast x -> i", {"to": 7}), "Gather w1 i -> h", "MatMul h w2 -> y"], (N, S), w1=(9, C), w2=(C, 6)), {"w1": C}),
    "heads": (build(HEADS, (N, S, 8), wq=(8, C), bq=(C,), wk=(8, C), wv=(8, C), wo=(C, 8), split=ints(0, 0, 3, 4), join=ints(0, 0, C)), {"wq": 3}),
    "packed heads": (
        build([
            "MatMul x w1 -> h", "Reshape h split -> a", ("Transpose a -> b", {"perm": [2, 0, 3, 1, 4]}),
            "Gather b zero -> q", "Gather b one -> k", "Gather b two -> v", ("Transpose k -> kt", {"perm": [0, 1, 3, 2]}),
            "MatMul q kt -> c", ("Softmax c -> p", {"axis": -1}), "MatMul p v -> o", ("Transpose o -> ot", {"perm": [0, 2, 1, 3]}),
            "Reshape ot join -> r", "MatMul r w2 -> y",
        ], (N, S, 8), w1=(8, 3 * C), w2=(C, 8), split=ints(N, S, 3, 3, 4), join=ints(N, S, C), zero=np.int64(0), one=np.int64(1), two=np.int64(2)),
        {"w1": 3},
    ),
    "IR 3": (build(["MatMul x w1 -> h", "MatMul h w2 -> y"], (N, 4), opset=8, ir_version=3, w1=(4, C), w2=(C, 6)), {"w1": C}),
    **{
        f"{op} {direction}": (
            build([
                "MatMul x w0 -> e", (f"{op} e w1 w2 b -> o", {"hidden_size": 6, "direction": direction}),
                ("Transpose o -> t", {"perm": [0, 2, 1, 3]}), "Reshape t join -> j", "MatMul j w3 -> y",
            ], (S, N, 4), w0=(4, 7), w1=(d, g * 6, 7), w2=(d, g * 6, 6), b=(d, 2 * g * 6), join=ints(S, N, d * 6), w3=(d * 6, 3)),
            {"w0": 7, "w1": 6},
        )
        for op, g in (("LSTM", 4), ("GRU", 3), ("RNN", 1)) for direction, d in (("forward", 1), ("bidirectional", 2))
    },
}  # fmt: skip


def free_sizes(model: Any, *, outer: bool = True) -> dict[str, int]:
    """Returns sizes by name; several groups of one name are numbered."""
    sizes: dict[str, int] = {}
    for group in find_channels(load(model), outer=outer).groups:
        if group.reason is None:
            count = sum(name.split()[0] == group.name for name in sizes)
            sizes[f"{group.name} {count + 1}" if count else group.name] = group.size
    return sizes


@pytest.mark.parametrize("case", CASES)
def test_what_is_left_computes_what_the_original_does_without_the_rest(case):
    model, _ = CASES[case]
    for seed in range(4):
        error, cut, channels = cut_and_compare(model, seed=seed, share=1.0)
        assert error < 3e-6
        assert channels
        assert sum(len(tensor.raw_data) for tensor in cut.graph.initializer) < sum(len(t.raw_data) for t in model.graph.initializer)


@pytest.mark.parametrize("case", CASES)
def test_channels_that_can_be_cut(case):
    model, expected = CASES[case]
    assert free_sizes(model) == expected
