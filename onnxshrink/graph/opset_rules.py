"""What each version of the ONNX standard changed in each op, and what that makes of a node: the table behind `onnxshrink.graph.opset`.

There is one entry for each op and each version that defines it anew (onnx/docs/Changelog.md, opsets 8 to 13):

    same        more types, broadcasting, negative axes, or new attributes whose defaults are what was before
    rewritten   attributes that became inputs (Clip, Pad, Slice, TopK, Split, Squeeze, ...), Upsample and Scatter, which are Resize
                and ScatterElements now, BatchNormalization without ``spatial``, Softmax where its axis means the same
    refused     what has no equal, or none that is certain
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import AttributeProto, TensorProto, shape_inference

from onnxshrink.errors import PassError
from onnxshrink.graph.edit import output_ids
from onnxshrink.graph.exporter import inline_tensor, shell_tensor, to_model
from onnxshrink.graph.importer import from_model
from onnxshrink.graph.ir import Constant, Graph, Node, Tensor, Variable

__all__ = ["RULES", "Call", "Operand", "Rule", "Types"]

Array = np.ndarray[Any, np.dtype[Any]]

_SMALL_BYTES = 1024  # shape inference reads values of shapes and axes, not of weights

_SAME = {
    8: "Max MaxPool Mean Min Sum",
    9: "Cast Constant Flatten Gemm Greater Less MatMul PRelu",
    10: "AveragePool MaxPool",
    11: """ArgMax ArgMin AveragePool Compress Concat Constant Conv DepthToSpace Equal Flatten Gather Gemm Hardmax If LogSoftmax
        Loop LpPool MaxPool MaxUnpool NonMaxSuppression ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean
        ReduceMin ReduceProd ReduceSum ReduceSumSquare Scan Slice Softmax Split Squeeze TopK Unsqueeze""",
    12: "ArgMax ArgMin Clip Constant GatherND Max MaxPool Min Pow ReduceMax ReduceMin",
    13: """Abs Add ArgMax ArgMin Cast Ceil Clip Concat Constant DepthToSpace DequantizeLinear Div Dropout Equal Erf Exp Expand
        Flatten Floor Gather GatherElements GatherND Gemm Greater Identity If IsNaN LRN Less Log Loop MatMul Max Mean
        MeanVarianceNormalization Min Mod Mul Neg NegativeLogLikelihoodLoss NonZero Pad Pow QuantizeLinear Reciprocal ReduceL1
        ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSumSquare Relu Reshape
        ScatterElements ScatterND Shape Sigmoid Sign Size Slice SoftmaxCrossEntropyLoss SpaceToDepth Sqrt Sub Sum Tanh Tile
        Transpose""",
}


class Types:
    """What is known of tensors; shape inference runs when it is first needed."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.inferred: dict[int, Tensor] | None = None
        self.outputs = output_ids(graph)

    def __call__(self, tensor: Tensor) -> tuple[np.dtype[Any] | None, tuple[Any, ...] | None]:
        """Returns (dtype, shape), None for what is not known."""
        if tensor.dtype is None or tensor.shape is None:
            if self.inferred is None:
                self.inferred = dict(self._infer())
            tensor = self.inferred.get(id(tensor), tensor)
        return tensor.dtype, tensor.shape

    def is_read(self, tensor: Tensor) -> bool:
        """Whether a node reads a tensor, or a graph returns it."""
        return bool(tensor.outputs) or id(tensor) in self.outputs

    def is_input(self, constant: Constant) -> bool:
        """Whether whoever runs the model may replace a constant: it is listed as a graph input."""
        return any(tensor is constant for tensor in self.graph.inputs)

    def _infer(self) -> Iterator[tuple[int, Tensor]]:
        """Yields the id of each tensor that a node computes, and its twin in the model after shape inference."""
        model = shape_inference.infer_shapes(to_model(self.graph, _small_tensor))
        twins = from_model(model).scopes()
        for scope, twin in zip(self.graph.scopes(), twins, strict=True):
            for node, other in zip(scope.graph.nodes, twin.graph.nodes, strict=True):
                yield from zip(map(id, node.outputs), other.outputs, strict=True)


@dataclass(frozen=True)
class Operand:
    """A constant that a node will read: what it is to the op, and its values."""

    name: str
    values: Array


class Call:
    """What will become of a node: rules edit this, and the node stays as it is until all rules have been through."""

    def __init__(self, node: Node, types: Types) -> None:
        self.node = node
        self.types = types
        self.op = node.op
        self.attrs = dict(node.attrs)
        self.inputs: list[Tensor | Operand] = list(node.inputs)
        self.outputs = list(node.outputs)

    @property
    def is_changed(self) -> bool:
        """Whether any rule edited it."""
        node = self.node
        return (self.op, self.attrs.keys(), len(self.inputs), len(self.outputs)) != (
            node.op,
            node.attrs.keys(),
            len(node.inputs),
            len(node.outputs),
        )

    def refuse(self, reason: str) -> PassError:
        """Returns the error that says why this node keeps the model at its opset."""
        return PassError(f"{self.node.op} '{self.node.site}': {reason}")

    def take(self, name: str, default: Any = None) -> Any:
        """Removes an attribute and returns its value.

        Raises:
            PassError: it is not a plain value: an argument of a model-local function, or stored in an unusual way.
        """
        value = self.attrs.pop(name, default)
        if isinstance(value, AttributeProto):
            raise self.refuse(f"attribute '{name}' must be a plain value to become an input")
        return value

    def become_input(self, name: str, values: Any, dtype: Any) -> None:
        """Adds an input; None stands for one that is left out, as do trailing ones."""
        if values is None:
            self.inputs.append(Variable(""))
            return
        with np.errstate(over="ignore"):  # a limit of Clip beyond float16 is none
            self.inputs.append(Operand(name, np.array(values).astype(dtype)))

    def trim(self) -> None:
        """Drops inputs that are left out at the end."""
        while isinstance(self.inputs[-1], Variable) and not self.inputs[-1].name:
            self.inputs.pop()

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the first input.

        Raises:
            PassError: nobody knows.
        """
        for tensor in (self.node.inputs[0], self.node.outputs[0]):
            dtype, _ = self.types(tensor)
            if dtype is not None:
                return dtype
        raise self.refuse("the type of its input must be known, and shape inference does not find it")


Rule = Callable[[Call], None]


def _batch_normalization(call: Call) -> None:
    if call.take("spatial", 1) != 1:
        raise call.refuse("spatial = 0 has no equal from opset 9 on")


def _clip(call: Call) -> None:
    limits = {name: call.take(name) for name in ("min", "max")}
    if any(value is not None for value in limits.values()):
        for name, value in limits.items():
            call.become_input(name, value, call.dtype)
        call.trim()


def _conv_transpose(call: Call) -> None:
    if "output_shape" in call.attrs or call.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise call.refuse("opset 11 of the standard pads the other side where padding is automatic and odd")


def _dropout_mask(call: Call) -> None:
    """The mask became boolean: one that nobody reads goes."""
    if any(call.types.is_read(tensor) for tensor in call.outputs[1:]):
        raise call.refuse("its mask is read, which is of another type from opset 10 on")
    del call.outputs[1:]


def _dropout_ratio(call: Call) -> None:
    """Nothing is dropped without the new input training_mode, but what the model says stays said."""
    if (ratio := call.take("ratio")) is not None:
        call.become_input("ratio", ratio, np.float32)


def _one_hot(call: Call) -> None:
    raise call.refuse("negative indices count from the end from opset 11 on, and gave no hot value before")


def _pad(call: Call) -> None:
    call.become_input("pads", call.take("pads"), np.int64)
    value = call.take("value", 0.0)
    if value != 0 and call.attrs.get("mode") not in ("edge", "reflect"):  # these have no use for it
        call.become_input("value", value, call.dtype)


def _resize(call: Call) -> None:
    """Resize-10 has no words for how it rounds: in ONNX Runtime down where it enlarges, up where it shrinks (upsamplebase.h)."""
    mode, scales = call.attrs.get("mode", "nearest"), call.inputs[1]
    is_sure = isinstance(scales, Constant) and not call.types.is_input(scales)
    enlarges = call.node.op == "Upsample" or (is_sure and bool((scales.values >= 1).all()))
    if mode not in ("nearest", "linear") or (mode == "nearest" and not enlarges):
        raise call.refuse(
            "how it rounds has an equal in opset 11 only where it is known to enlarge, by constant scales"
        )
    call.attrs["coordinate_transformation_mode"] = "asymmetric"
    if mode == "nearest":
        call.attrs["nearest_mode"] = "floor"
    call.inputs.insert(1, Operand("roi", np.zeros(0, np.float32)))


def _resize_13(call: Call) -> None:
    mode = call.attrs.get("coordinate_transformation_mode", "")
    if not isinstance(mode, str) or mode == "tf_half_pixel_for_nn":
        raise call.refuse("the mode tf_half_pixel_for_nn is gone from opset 13 on")


def _scan(call: Call) -> None:
    raise call.refuse("it has no batches from opset 9 on")


def _scatter(call: Call) -> None:
    call.op = "ScatterElements"


def _slice(call: Call) -> None:
    for name in ("starts", "ends", "axes"):
        if name != "axes" or name in call.attrs:
            call.become_input(name, call.take(name), np.int64)


def _softmax(call: Call) -> None:
    """Before opset 13 everything from the axis on was one dimension: the same if all behind the axis is of size 1."""
    axis = call.take("axis", 1)
    _, shape = call.types(call.node.inputs[0])
    if axis != -1 and (shape is None or any(size != 1 for size in shape[axis + 1 :])):
        raise call.refuse("it works along one axis from opset 13 on, not along all from this one on")
    call.attrs["axis"] = axis


def _axes(call: Call) -> None:
    if (axes := call.take("axes")) is not None:
        call.become_input("axes", axes, np.int64)


def _split(call: Call) -> None:
    if (sizes := call.take("split")) is not None:
        call.become_input("split", sizes, np.int64)


def _top_k(call: Call) -> None:
    call.become_input("k", [call.take("k")], np.int64)


def _upsample_scales(call: Call) -> None:
    call.become_input("scales", call.take("scales"), np.float32)


def _upsample(call: Call) -> None:
    call.op = "Resize"


RULES: dict[tuple[str, int], Rule] = {
    ("BatchNormalization", 9): _batch_normalization,
    ("Scan", 9): _scan,
    ("Upsample", 9): _upsample_scales,
    ("Dropout", 10): _dropout_mask,
    ("Slice", 10): _slice,
    ("TopK", 10): _top_k,
    ("Upsample", 10): _upsample,
    ("Clip", 11): _clip,
    ("ConvTranspose", 11): _conv_transpose,
    ("OneHot", 11): _one_hot,
    ("Pad", 11): _pad,
    ("Resize", 11): _resize,
    ("Scatter", 11): _scatter,
    ("Dropout", 12): _dropout_ratio,
    ("Hardmax", 13): _softmax,
    ("LogSoftmax", 13): _softmax,
    ("ReduceSum", 13): _axes,
    ("Resize", 13): _resize_13,
    ("Softmax", 13): _softmax,
    ("Split", 13): _split,
    ("Squeeze", 13): _axes,
    ("Unsqueeze", 13): _axes,
    **{(op, version): lambda call: None for version, ops in _SAME.items() for op in ops.split()},
}


def _small_tensor(constant: Constant) -> TensorProto:
    """Returns the TensorProto of a constant, without its values if there are many."""
    return inline_tensor(constant) if constant.nbytes <= _SMALL_BYTES else shell_tensor(constant)
