"""Weights behind DequantizeLinear, cut in pieces of floats or left to the bit: what pays in bytes, what pays in work, and what is said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest

from onnxshrink.contract import Rule
from onnxshrink.graph.files import load
from onnxshrink.graph.weights import weights as weights_of
from onnxshrink.inputs import Feeds
from onnxshrink.passes.low_rank import LowRank
from onnxshrink.testing import check_pass
from tests import oracle
from tests.graph.test_channel_rules import build
from tests.passes.test_low_rank import Array, Clock, details, drift, reasons, run
from tests.test_factorization import feeds_of

ROWS, COLUMNS, RANK = 96, 80, 3  # of the weight of low rank: [inputs, outputs]
FED = (9, ROWS)
INTERPOLATIVE = 4 * RANK * (ROWS + COLUMNS - RANK)  # bytes of pieces
data = pytest.mark.parametrize("data", [True, False], ids=["data", "no data"])


def low_rank(rows: int = ROWS, columns: int = COLUMNS, zero: int = 0, dtype: Any = np.int8) -> Array:
    """Returns integers that are of low rank to the last bit, once the zero point is taken off."""
    rng = np.random.default_rng([rows, columns])
    return np.asarray(rng.integers(-1, 2, (rows, RANK)) @ rng.integers(-3, 4, (RANK, columns)) + zero).astype(dtype)


def full_rank(*shape: int) -> Array:
    return np.random.default_rng(shape).integers(-127, 128, shape).astype(np.int8)


def scales(*shape: int, dtype: Any = np.float32) -> Array:
    return np.asarray(np.random.default_rng(shape).uniform(0.01, 0.05, shape)).astype(dtype)


def fed(model: onnx.ModelProto, count: int = 4, seed: int = 0) -> list[Feeds]:
    """Returns inputs of a model, of its type."""
    kind = model.graph.input[0].type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    feeds = feeds_of([dim.dim_value for dim in kind.shape.dim], count, seed)
    return [{"x": np.asarray(feed["x"]).astype(dtype)} for feed in feeds]


def raw(model: onnx.ModelProto, names: Sequence[str]) -> dict[str, bytes]:
    """Returns initializers and nodes by the names of what they give, as they lie in the file."""
    every = {item.name: item for item in model.graph.initializer} | {node.output[0]: node for node in model.graph.node}
    return {name: every[name].SerializeToString(deterministic=True) for name in names}


def of_type(model: onnx.ModelProto, dtype: int) -> onnx.ModelProto:
    for item in (*model.graph.input, *model.graph.output):
        item.type.tensor_type.elem_type = dtype
    return model


def ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


SCALED: dict[str, tuple[dict[str, int], dict[str, Array]]] = {
    "per tensor": ({}, {"s": scales()}),
    "per tensor, moved": ({}, {"s": scales(), "z": np.asarray(5, np.int8)}),
    "per output": ({"axis": 1}, {"s": scales(COLUMNS), "z": np.full(COLUMNS, 5, np.int8)}),
    "per input": ({"axis": -2}, {"s": scales(ROWS)}),
}


def model_of(how: str) -> onnx.ModelProto:
    """Returns x Q1 Q2: the first of low rank, and small enough in pieces, the second of full rank, with a scale for each output."""
    attributes, arrays = SCALED[how]
    return build(
        [(f"DequantizeLinear q1 {' '.join(arrays)} -> w1", attributes), "MatMul x w1 -> h",
         ("DequantizeLinear q2 t z2 -> w2", {"axis": 1}), "MatMul h w2 -> y"],
        FED, q1=low_rank(zero=5 if "z" in arrays else 0), **arrays, q2=full_rank(COLUMNS, 60), t=scales(60), z2=np.zeros(60, np.int8),
    )  # fmt: skip


REST = ["q2", "t", "z2", "w2", "y"]


@data
@pytest.mark.parametrize("how", SCALED)
class TestWhatIsStored:
    def test_takes_fewer_bytes_or_stays(self, how: str, data: bool) -> None:
        """A budget of parameters is one of bytes: a float is worth four integers."""
        model = model_of(how)
        feeds = fed(model)
        found, report, result = run(LowRank(params=0.7), model, feeds=feeds if data else None)
        assert list(details(report)) == ["q1"]
        assert details(report)["q1"].startswith("interpolative, rank ")
        assert sum(array.nbytes for name, array in found.items() if name.startswith("q1.")) <= 0.7 * (ROWS + 60) * COLUMNS - 60 * COLUMNS
        assert result.ByteSize() < 0.8 * model.ByteSize()
        assert {name.split(".")[0] for name in found} == {"q1", "q2", "t", "z2"}
        assert raw(result, REST) == raw(model, REST)
        assert drift(model, result, fed(model, seed=7)) < 1e-4

    def test_is_cut_for_work_whatever_it_takes(self, how: str, data: bool) -> None:
        model = model_of(how)
        feeds = fed(model)
        _, report, result = run(LowRank(macs=0.4, round="none"), model, feeds=feeds if data else None, trials=Clock(feeds))
        assert "q1" in details(report)
        counted = [sum((Clock(feeds).macs(load(one)) or {}).values()) for one in (result, model)]
        assert counted[0] <= 0.4 * counted[1]
        assert drift(model, result, fed(model, seed=7)) < 0.9

    def test_at_a_rank_loses_nothing_and_the_rest_stays_to_the_bit(self, how: str, data: bool) -> None:
        model = model_of(how)
        found, report, result = run(LowRank(rank=RANK), model, Rule("q2", skip=True), feeds=fed(model) if data else None)
        assert (list(details(report)), reasons(report)["q2"]) == (["q1"], "left alone by a rule")
        (change,) = report.changes
        assert sum(array.nbytes for name, array in found.items() if name.startswith("q1.")) == INTERPOLATIVE
        untouched = run(LowRank(), model, Rule("*", skip=True))[2]
        assert abs(change.bytes_after - change.bytes_before - (result.ByteSize() - untouched.ByteSize())) <= 16  # scales that went with it
        assert ops(result) == ["MatMul", "MatMul", "Concat", "DequantizeLinear", "MatMul"]
        assert raw(result, REST) == raw(model, REST)
        assert drift(model, result, fed(model, seed=7)) < 1e-5

    def test_without_a_change_is_the_file_as_it_was(self, how: str, data: bool) -> None:
        model = model_of(how)
        for subject in (LowRank(rank=40), LowRank(share=0.9), LowRank(error=0.0), LowRank(params=1.0)):
            _, report, result = run(subject, model, feeds=fed(model) if data else None)
            assert not report.changes
            assert {"q1", "q2"} <= set(reasons(report))
            assert oracle.differences(result, run(LowRank(), model, Rule("*", skip=True))[2]) == []


@pytest.mark.parametrize(("dtype", "price"), [(np.float32, 4), (np.float16, 2)])
@pytest.mark.parametrize("form", ["interpolative", "two-products"])
def test_ranks_pay_up_to_where_bytes_are_as_many(form: str, dtype: Any, price: int) -> None:
    model = build(["DequantizeLinear q s -> w", "MatMul x w -> y"], FED, opset=19, q=full_rank(ROWS, COLUMNS), s=scales(dtype=dtype))
    if dtype == np.float16:
        of_type(model, onnx.TensorProto.FLOAT16)
    sizes = {rank: rank * (ROWS + COLUMNS - (rank if form == "interpolative" else 0)) for rank in range(1, COLUMNS + 1)}
    cheaper = max(rank for rank, size in sizes.items() if price * size < ROWS * COLUMNS)
    most = max(rank for rank in range(1, cheaper + 1) if run(LowRank(rank=rank, form=form), model)[1].changes)
    assert cheaper - 3 <= most <= cheaper  # nodes and names take some bytes as well
    found, report, result = run(LowRank(rank=most, form=form), model)
    assert result.ByteSize() < model.ByteSize()
    assert {array.dtype for array in found.values()} == {np.dtype(dtype)}
    assert sum(array.size for array in found.values()) == sizes[most]
    _, report, _ = run(LowRank(rank=most + 1, form=form), model)
    saves_nothing = f"stays whole: pieces as rank={most + 1} asks for would save nothing"
    assert reasons(report) == {"q": f"{saves_nothing} (break-even rank {cheaper} of {COLUMNS})"}


def test_four_bits_take_eight_times_as_much() -> None:
    stored = low_rank(zero=8, dtype=np.int16).clip(0, 15)
    nodes = [onnx.helper.make_node("DequantizeLinear", ["q", "s"], ["w"]), onnx.helper.make_node("MatMul", ["x", "w"], ["y"])]
    q = onnx.helper.make_tensor("q", onnx.TensorProto.UINT4, stored.shape, stored.ravel())
    model = oracle.make_model(nodes, [oracle.tensor("x", FED)], [oracle.tensor("y", None)], [q, oracle.value("s", scales())], opset=21, ir_version=10)
    most = max(rank for rank in range(1, COLUMNS) if 8 * rank * (ROWS + COLUMNS - rank) < ROWS * COLUMNS)
    _, report, _ = run(LowRank(rank=most), model)
    assert details(report)["q"].startswith(f"interpolative, rank {most} of")
    _, report, _ = run(LowRank(rank=most + 1), model)
    assert f"(break-even rank {most} of {COLUMNS})" in reasons(report)["q"]


def test_too_small_to_pay_in_bytes() -> None:
    model = build(["DequantizeLinear q s -> w", "MatMul x w -> y"], (9, 6), q=full_rank(6, 4), s=scales())
    _, report, _ = run(LowRank(params=0.5), model)
    assert reasons(report) == {"q": "pieces would save nothing, ranks in steps of 1 (break-even rank 0 of 4)"}
    assert report.missed == "asked for params x 0.5; x 1.000 is what pieces that pay can have, with rules as they are"
    _, report, _ = run(LowRank(macs=0.5, round="none"), model)
    assert list(details(report)) == ["q"]


class TestNotes:
    def test_count_bytes_as_parameters(self) -> None:
        model = model_of("per tensor")
        found, report, _ = run(LowRank(params=0.7), model)
        taken = sum(array.nbytes for name, array in found.items() if name.startswith("q"))
        assert report.notes[0].startswith(f"params x {taken / ((ROWS + 60) * COLUMNS):.3f} ")

    @pytest.mark.parametrize("rank", [RANK, 40])
    @pytest.mark.parametrize("how", SCALED)
    def test_scales_and_zero_points_that_stay_are_named(self, how: str, rank: int) -> None:
        """Each weight of the file that is still there is in the report, whether others are cut or not."""
        model = model_of(how)
        found, report, _ = run(LowRank(rank=rank), model)
        sites = {weight.site for weight in weights_of(load(model))}
        assert sites & set(found) <= {*details(report), *reasons(report)}

    def test_of_what_cannot_be_stored_as_floats(self) -> None:
        for lines, arrays, why in (
            (["Mul s s2 -> t", "DequantizeLinear q t -> w"], {"s2": scales()}, "the scale of DequantizeLinear 'w' is computed"),
            (["DequantizeLinear q s -> w", "DequantizeLinear q s2 -> v", "MatMul x v -> k"], {"s2": scales() * 2}, "nodes that share it read it in different types or scales"),
        ):
            extra = ["Add m k -> y"] if "MatMul x v -> k" in lines else ["Relu m -> y"]
            model = build([*lines, "MatMul x w -> m", *extra], FED, q=low_rank(), s=scales(), **arrays)
            for subject in (LowRank(rank=RANK), LowRank(params=0.5), LowRank(macs=0.5, round="none")):
                _, report, result = run(subject, model)
                assert reasons(report)["q"] == why
                assert not report.changes
                assert raw(result, ["q", "s", "w"]) == raw(model, ["q", "s", "w"])

    def test_of_infinities_that_scales_make(self) -> None:
        model = build(["DequantizeLinear q s -> w", "MatMul x w -> y"], FED, q=low_rank(), s=np.float32(3e38))
        _, report, _ = run(LowRank(rank=RANK), model)
        assert reasons(report) == {"q": "holds NaN or infinity"}


BIASED = {
    "Conv": ([("DequantizeLinear q s -> w", {"axis": 0}), "DequantizeLinear c t -> b", "Conv x w b -> y"], (2, ROWS, 5, 5), (COLUMNS, ROWS, 1, 1)),
    "Gemm": ([("DequantizeLinear q s -> w", {"axis": 0}), "DequantizeLinear c t -> b", ("Gemm x w b -> y", {"transB": 1})], FED, (COLUMNS, ROWS)),
}


@data
@pytest.mark.parametrize("form", ["auto", "interpolative", "factors"])
@pytest.mark.parametrize(("lines", "shape", "stored"), BIASED.values(), ids=BIASED)
@pytest.mark.parametrize("options", [{"rank": RANK}, {"params": 0.5}, {"macs": 0.5, "round": "none"}], ids=str)
def test_biases_behind_scales_of_their_own_are_not_lost(options: dict[str, Any], lines: list[Any], shape: tuple[int, ...], stored: tuple[int, ...], form: str, data: bool) -> None:
    bias = np.random.default_rng(0).integers(-5000, 5000, COLUMNS).astype(np.int32)
    model = build(lines, shape, q=low_rank().T.reshape(stored), s=scales(COLUMNS), c=bias, t=np.float32(1e-3))
    found, report, result = run(LowRank(form=form, **options), model, feeds=fed(model) if data else None)
    assert list(details(report)) == ["q"]
    assert drift(model, result, fed(model, seed=7)) < 1e-4
    assert ("c" in reasons(report)) <= ("c" in found)


def test_a_scale_that_others_read_stays() -> None:
    lines = [("DequantizeLinear q1 s -> w1", {"axis": 1}), "MatMul x w1 -> h", ("DequantizeLinear q2 s -> w2", {"axis": 1}), "MatMul x w2 -> k", "Add h k -> y"]
    model = build(lines, FED, q1=low_rank(), q2=full_rank(ROWS, COLUMNS), s=scales(COLUMNS))
    found, report, result = run(LowRank(rank=RANK), model, Rule("q2", skip=True))
    assert list(details(report)) == ["q1"]
    assert set(found) == {"q1.first", "q1.before", "q2", "s"} or set(found) == {"q1.first", "q1.after", "q2", "s"}
    assert raw(result, ["q2", "s", "w2"]) == raw(model, ["q2", "s", "w2"])
    assert drift(model, result, fed(model)) < 1e-5


@data
def test_with_activations_that_are_rounded_as_well(data: bool) -> None:
    """As quantizers export models: what a layer meets and what it gives passes through QuantizeLinear and DequantizeLinear."""
    lines = ["QuantizeLinear x sx zx -> qx", "DequantizeLinear qx sx zx -> dx", ("DequantizeLinear q s -> w", {"axis": 1}), "MatMul dx w -> h",
             "QuantizeLinear h sh zx -> qh", "DequantizeLinear qh sh zx -> y"]  # fmt: skip
    model = build(lines, FED, q=low_rank(), s=scales(COLUMNS), sx=np.float32(0.1), sh=np.float32(0.5), zx=np.int8(0))
    _, report, result = run(LowRank(params=0.6), model, feeds=fed(model) if data else None)
    assert list(details(report)) == ["q"]
    assert ops(result) == ["QuantizeLinear", "DequantizeLinear", "MatMul", "MatMul", "Concat", "QuantizeLinear", "DequantizeLinear"]
    assert drift(model, result, fed(model, seed=7)) < 0.05  # of values on the border between two levels some cross it
    _, report, _ = run(LowRank(macs=0.5, round="none"), model, feeds=fed(model) if data else None)
    assert reasons(report)["q"] == "meets quantized activations: pieces would be computed in floating point, not in integers"


@pytest.mark.parametrize("line", [("Cast q -> w", {"to": 1}), "DequantizeLinear q s -> w"], ids=["cast", "scaled"])
def test_behind_nodes_that_move(line: Any) -> None:
    """What lies between the scales and the layer goes with the weight."""
    model = build([line, ("Transpose w -> t", {"perm": [1, 0]}), "MatMul x t -> y"], FED, q=low_rank().T, s=scales())
    _, report, result = run(LowRank(rank=RANK), model)
    if "Cast" in line[0]:
        assert reasons(report)["q"] == "holds int8 values, not floating point"
    else:
        assert ops(result) == ["MatMul", "MatMul", "Concat"]
        assert drift(model, result, fed(model)) < 1e-5


@pytest.mark.parametrize("options", [{"rank": RANK}, {"params": 0.7}, {"macs": 0.5, "round": "none"}, {"rank": RANK, "form": "factors"}], ids=str)
def test_keeps_the_contract(options: dict[str, Any]) -> None:
    models = [(how, model_of(how)) for how in SCALED]
    for name, (lines, shape, stored) in BIASED.items():
        arrays = {"q": low_rank().T.reshape(stored), "s": scales(COLUMNS), "c": np.arange(COLUMNS, dtype=np.int32), "t": np.float32(1e-3)}
        models.append((name, build(lines, shape, **arrays)))
    for _, model in models:  # `check` wants what a graph returns to be described
        (output,) = oracle.run(running := oracle.session(model), oracle.random_feeds(running))
        model.graph.output[0].CopyFrom(oracle.tensor("y", output.shape))
    check_pass(LowRank(**options), models)
