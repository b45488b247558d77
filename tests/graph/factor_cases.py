"""Random layers with a constant weight ``w``, for the tests of factorization: every op and attribute that a form can meet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from hypothesis import assume
from hypothesis import strategies as st
from onnx import helper

from tests.oracle import make_model, run, session, tensor, value

Array = np.ndarray[Any, Any]
FLOATS = {np.dtype(np.float16): onnx.TensorProto.FLOAT16, np.dtype(np.float32): onnx.TensorProto.FLOAT, np.dtype(np.int32): onnx.TensorProto.INT32}
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
few, flag, some = st.integers(1, 3), st.booleans(), st.integers(2, 5)


def random(*shape: int, dtype: Any = np.float32) -> Array:
    return np.random.default_rng(shape).standard_normal(shape).astype(dtype)


@dataclass(frozen=True)
class Layer:
    """One node, its inputs by name in order of use; those in ``stored`` are initializers."""

    op: str
    inputs: tuple[str, ...]
    arrays: dict[str, Array]
    attributes: dict[str, Any] = field(default_factory=dict)
    stored: tuple[str, ...] = ("w", "b")
    outputs: tuple[str, ...] = ("y",)
    opset: int = 17

    def model(self, **others: Array) -> onnx.ModelProto:
        """Returns the model of it, some arrays replaced."""
        arrays = {**self.arrays, **others}
        node = helper.make_node(self.op, list(self.inputs), list(self.outputs), name="layer", **self.attributes)
        fed = [name for name in arrays if name not in self.stored]
        model = make_model(
            [node],
            [tensor(name, arrays[name].shape, FLOATS[arrays[name].dtype]) for name in fed],
            [tensor(name, None, FLOATS[arrays["w"].dtype]) for name in self.outputs],
            [value(name, arrays[name]) for name in arrays if name in self.stored],
            opset=self.opset,
        )
        return onnx.shape_inference.infer_shapes(model)  # gives the outputs the shapes that a full check asks for

    def feeds(self) -> dict[str, Array]:
        return {name: array for name, array in self.arrays.items() if name not in self.stored}

    def run(self, model: onnx.ModelProto) -> list[Array]:
        return run(session(model, optimise=False), self.feeds())


@st.composite
def matmuls(draw: st.DrawFn) -> Layer:
    rows, inner, columns = draw(some), draw(some), draw(some)
    left, own = draw(flag), tuple(draw(st.lists(few, max_size=2)))
    other = tuple(draw(st.sampled_from([1, dim])) for dim in own)[draw(st.integers(0, len(own))) :]
    other = (*(draw(st.lists(few, max_size=1)) if len(other) == len(own) else ()), *other)
    if left:
        w, x = random(*own, rows, inner), random(*other, inner, columns)
        x = x[..., 0] if not own and not other and draw(flag) else x
    else:
        x, w = random(*other, rows, inner), random(*own, inner, columns)
        x = x[0] if not own and not other and draw(flag) else x
    return Layer("MatMul", ("w", "x") if left else ("x", "w"), {"x": x, "w": w})


@st.composite
def gemms(draw: st.DrawFn) -> Layer:
    rows, inner, columns = draw(some), draw(some), draw(some)
    trans_a, trans_b, left, opset = draw(flag), draw(flag), draw(flag), draw(st.sampled_from([7, 10, 11, 13, 17]))
    a = random(inner, rows) if trans_a else random(rows, inner)
    b = random(columns, inner) if trans_b else random(inner, columns)
    attributes = {"transA": int(trans_a), "transB": int(trans_b), "alpha": draw(st.sampled_from([1.0, -0.5])), "beta": draw(st.sampled_from([1.0, 2.0]))}
    attributes = {name: number for name, number in attributes.items() if draw(flag) or number != (0 if "trans" in name else 1)}
    arrays = {"w": a, "x": b} if left else {"x": a, "w": b}
    if opset < 11 or draw(flag):
        arrays["b"] = random(*draw(st.sampled_from([(columns,), (rows, 1), (rows, columns), (1,)])))
    return Layer("Gemm", tuple(arrays), arrays, attributes, opset=opset)


@st.composite
def convolutions(draw: st.DrawFn) -> Layer:
    rank, groups = draw(few), draw(few)
    per_axis = st.lists(few, min_size=rank, max_size=rank)
    kernel, strides = draw(per_axis), draw(per_axis)
    auto = draw(st.sampled_from(["NOTSET", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    attributes: dict[str, Any] = {"group": groups, "strides": strides}
    if auto != "NOTSET":
        attributes["auto_pad"] = auto
    elif draw(flag):
        attributes["pads"] = draw(st.lists(st.integers(0, 2), min_size=2 * rank, max_size=2 * rank))
    if not auto.startswith("SAME"):  # ONNX Runtime refuses dilations there
        attributes["dilations"] = draw(per_axis)
    if draw(flag):
        attributes["kernel_shape"] = kernel
    attributes = {name: given for name, given in attributes.items() if given != [1] * rank or draw(flag)}
    inputs, outputs = draw(few), groups * draw(few)
    space = draw(st.lists(st.integers(7, 9), min_size=rank, max_size=rank))
    arrays = {"x": random(draw(st.integers(1, 2)), groups * inputs, *space), "w": random(outputs, inputs, *kernel)}
    if draw(flag):
        arrays["b"] = random(outputs)
    assume(arrays["w"].size > 1)
    return Layer("Conv", tuple(arrays), arrays, attributes)


@st.composite
def transposed_convolutions(draw: st.DrawFn) -> Layer:
    rank, groups, inputs, outputs = draw(few), draw(few), draw(few), draw(few)
    per_axis = st.lists(few, min_size=rank, max_size=rank)
    kernel, strides, dilations, space = draw(per_axis), draw(per_axis), draw(per_axis), draw(per_axis)
    attributes: dict[str, Any] = {"group": groups, "strides": strides, "dilations": dilations}
    extra = [draw(st.integers(0, stride - 1)) for stride in strides] if draw(flag) else [0] * rank
    full = [
        (size - 1) * stride + more + (k - 1) * dilation + 1
        for size, stride, more, k, dilation in zip(space, strides, extra, kernel, dilations, strict=True)
    ]
    if any(extra):
        attributes["output_padding"] = extra
    auto = draw(st.sampled_from(["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    if auto != "NOTSET":
        attributes["auto_pad"] = auto
    elif draw(flag):
        pads = attributes["pads"] = [draw(st.integers(0, (size - 1) // 2)) for size in [*full, *full]]
        assert all(size > pads[axis] + pads[axis + rank] for axis, size in enumerate(full))
    if auto != "VALID" and "pads" not in attributes and draw(flag):
        attributes["output_shape"] = [draw(st.integers(max(1, size - 3), size)) for size in full]
    arrays = {"x": random(draw(st.integers(1, 2)), groups * inputs, *space), "w": random(groups * inputs, outputs, *kernel)}
    if draw(flag):
        arrays["b"] = random(groups * outputs)
    assume(arrays["w"].size > 1)
    return Layer("ConvTranspose", tuple(arrays), arrays, attributes)


@st.composite
def recurrences(draw: st.DrawFn) -> Layer:
    op = draw(st.sampled_from(list(GATES)))
    steps, batch, inputs, hidden, gates = draw(few), draw(few), draw(some), draw(few), GATES[op]
    direction = draw(st.sampled_from(["forward", "reverse", "bidirectional"]))
    both = 2 if direction == "bidirectional" else 1
    arrays = {
        "x": random(steps, batch, inputs),
        "w": random(both, gates * hidden, inputs),
        "r": random(both, gates * hidden, hidden),
        "b": random(both, 2 * gates * hidden),
        "lengths": np.array(draw(st.lists(st.integers(1, steps), min_size=batch, max_size=batch)), np.int32),
        "initial": random(both, batch, hidden),
    }
    attributes: dict[str, Any] = {"hidden_size": hidden, "direction": direction}
    if op == "GRU":
        attributes["linear_before_reset"] = draw(st.integers(0, 1))
    if draw(flag):
        attributes["clip"] = 0.5
    names = ("x", "w", "r", *(name if draw(flag) else "" for name in ("b", "lengths", "initial")))
    used = {name: arrays[name] for name in names if name}
    return Layer(op, names, used, attributes, ("w", "r", "b"), ("y", "last"))


LAYERS = {"MatMul": matmuls(), "Gemm": gemms(), "Conv": convolutions(), "ConvTranspose": transposed_convolutions(), "recurrent": recurrences()}
