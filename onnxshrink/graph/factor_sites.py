"""How a node reads the weight it multiplies with: the matrix's geometry, the forms it allows, and at how many positions pieces would run.

What a node's attributes mean follows the ONNX operator specification. A combination that no form is known for is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from onnxshrink.graph.ir import Constant, Graph, Node, Tensor
from onnxshrink.graph.tensor_shapes import Shapes
from onnxshrink.graph.views import is_mover
from onnxshrink.graph.weights import Use

__all__ = ["Geometry", "Kind", "Site", "Storage", "factor_site"]

Kind = Literal["channel", "input", "interpolative", "recurrent-input", "spatial", "tucker2", "two-products"]
Storage = Literal["columns first", "kernel", "recurrent", "rows last", "transposed kernel"]
_FIRST_GEMM_BROADCAST = 7  # the opset from which Gemm's C is broadcast without an attribute (operator changelog)
_FIRST_CONCAT_FROM_BACK = 11  # the opset from which Concat counts axes from the last one (operator changelog)
_CONV_ATTRIBUTES = {"auto_pad", "dilations", "group", "kernel_shape", "pads", "strides"}
_ATTRIBUTES = {
    "Conv": _CONV_ATTRIBUTES,
    "ConvTranspose": {*_CONV_ATTRIBUTES, "output_padding", "output_shape"},
    "Gemm": {"alpha", "beta", "broadcast", "transA", "transB"},
    "MatMul": set[str](),
}
_RECURRENT = ("GRU", "LSTM", "RNN")  # whatever their attributes are, the gates see the product alone
_STEPS: Mapping[Storage, int] = {"columns first": 2, "kernel": 1, "recurrent": 1, "rows last": 1, "transposed kernel": 3}
"""How many steps of a view `onnxshrink.graph.views` makes of an operand that lies so."""


@dataclass(frozen=True)
class Geometry:
    """A weight's matrix [groups * outputs, inputs * kernel], and how it lies in the operand that a node reads.

    Attributes:
        groups: of rows, each with inputs of its own.
        outputs: of a group.
        inputs: of a group, before the kernel.
        stores: how the operand lies: [*batch, K, N] or [*batch, N, K] for a product of N outputs and K inputs, [O, I/g, *k] of a Conv,
            [I, O/g, *k] of a ConvTranspose, [d, gates, I] of LSTM, GRU and RNN.
        shape: of the operand.
    """

    groups: int
    outputs: int
    inputs: int
    stores: Storage
    shape: tuple[int, ...]

    @property
    def kernel(self) -> tuple[int, ...]:
        """The sizes of a convolution's kernel; empty for other ops."""
        return self.shape[2:] if self.is_kernel else ()

    @property
    def is_kernel(self) -> bool:
        """Whether it is a convolution's."""
        return self.stores in ("kernel", "transposed kernel")

    @property
    def positions(self) -> int:
        """The number of the kernel's elements."""
        return math.prod(self.kernel)

    @property
    def rows_axis(self) -> int:
        """The axis of the kernel that the first piece of the spatial form has: the first that is longer than 1."""
        return next((axis for axis, size in enumerate(self.kernel) if size > 1), 0)

    @property
    def sides(self) -> tuple[int, int]:
        """The sizes of the kernel along that axis and along all others."""
        height = self.kernel[self.rows_axis] if self.kernel else 1
        return height, self.positions // height


@dataclass(frozen=True)
class Site:
    """How a node reads a weight.

    Attributes:
        geometry: of its matrix.
        runs: by the kinds of forms that it allows, at how many positions each piece would run for each one that the multiply-accumulates
            of the node as it is are counted at: those of the output, and of the input for ConvTranspose.
    """

    geometry: Geometry
    runs: Mapping[Kind, tuple[float, ...]]


def factor_site(graph: Graph, use: Use, shapes: Shapes) -> Site | str:
    """Returns how a node of the main graph reads a weight, or in one line why that weight cannot be cut.

    Args:
        graph: the main graph.
        use: of a weight of it.
        shapes: of the graph's tensors.
    """
    node = use.node
    if node is None or not use.is_operand or use.op not in (*_ATTRIBUTES, *_RECURRENT):
        return f"no form is known for what {use.op} reads"
    if use.view is None:
        return f"rearranged in an unknown way before {use.op} '{node.site}'"
    unknown = set(node.attrs) - _ATTRIBUTES.get(use.op, set(node.attrs))
    if unknown:
        return f"{use.op} '{node.site}' has an unknown attribute {min(unknown)}"
    stores = _stores(use, node)
    geometry = _geometry(stores, use.view.shapes[-1 - _STEPS[stores]], int(node.attrs.get("group", 1)))
    if stores == "recurrent" and use.operand != 1:
        return f"{node.op} '{node.site}' multiplies it with its state, inside of the node"
    if _is_stored(node.inputs[0 if stores == "recurrent" else 1 - use.operand]):
        return f"what {use.op} '{node.site}' multiplies it with is constant as well"
    if stores == "recurrent":
        return Site(geometry, {"recurrent-input": (1.0, 1.0)})
    if geometry.is_kernel:
        if geometry.groups * geometry.outputs != use.view.shape[0]:
            return f"the groups of {use.op} '{node.site}' do not divide its channels"
        runs = _kernel_runs(node, geometry, shapes)
        if "channel" in runs and _can_be_joined(graph, node, use.operand, geometry, shapes):
            runs["interpolative"] = (*runs["channel"], runs["channel"][1])
        return Site(geometry, runs) if runs else f"the output_shape of {use.op} '{node.site}' leaves what follows without a known shape"
    obstacle = _product_obstacle(graph, node, use.operand, geometry, shapes)
    if obstacle is not None:
        return obstacle
    joined = _can_be_joined(graph, node, use.operand, geometry, shapes)
    return Site(geometry, {"two-products": (1.0, 1.0), **({"interpolative": (1.0, 1.0, 1.0)} if joined else {})})


def _stores(use: Use, node: Node) -> Storage:
    if node.op in ("Conv", "ConvTranspose"):
        return "kernel" if node.op == "Conv" else "transposed kernel"
    if node.op in _RECURRENT:
        return "recurrent"
    transposed = bool(node.attrs.get("transB" if use.operand else "transA", 0)) if node.op == "Gemm" else False
    return "rows last" if transposed == (use.operand == 1) else "columns first"


def _geometry(stores: Storage, shape: tuple[int, ...], groups: int) -> Geometry:
    if stores == "kernel":
        return Geometry(groups, shape[0] // groups, shape[1], stores, shape)
    if stores == "transposed kernel":
        return Geometry(groups, shape[1], shape[0] // groups, stores, shape)
    if stores == "recurrent":
        return Geometry(1, shape[0] * shape[1], shape[2], stores, shape)
    *batch, rows, columns = shape
    if stores == "columns first":
        rows, columns = columns, rows
    return Geometry(math.prod(batch), rows, columns, stores, shape)


def _is_stored(tensor: Tensor) -> bool:
    """Whether a tensor holds what the file holds, rearranged or not."""
    while tensor.inputs and is_mover(tensor.inputs[0], 0):
        tensor = tensor.inputs[0].inputs[0]
    return isinstance(tensor, Constant)


def _product_obstacle(graph: Graph, node: Node, operand: int, geometry: Geometry, shapes: Shapes) -> str | None:
    """Returns why a product of MatMul or Gemm cannot become two."""
    if node.op == "Gemm":
        old = graph.opset < _FIRST_GEMM_BROADCAST
        return f"Gemm '{node.site}' is of an opset before {_FIRST_GEMM_BROADCAST}" if old else None
    dims = shapes.get(id(node.inputs[1 - operand]))
    if len(geometry.shape) > 2 and (dims is None or len(dims) < 2):  # of a vector a batch of matrices makes one matrix, not a batch
        return f"MatMul '{node.site}' multiplies a batch of matrices with what may be a vector"
    return None


def _can_be_joined(graph: Graph, node: Node, operand: int, geometry: Geometry, shapes: Shapes) -> bool:
    """Whether some outputs may come of a node of their own: they lie side by side, and what is added to each is known."""
    if geometry.is_kernel:
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        return geometry.groups == 1 and (bias is None or not bias.name or isinstance(bias, Constant))
    if node.op == "MatMul":
        dims = shapes.get(id(node.inputs[1 - operand]))
        has_rows = operand == 1 or (dims is not None and len(dims) > 1)  # a matrix times a vector is a vector
        return graph.opset >= _FIRST_CONCAT_FROM_BACK and has_rows
    added = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
    along = (1, geometry.outputs) if operand == 1 else (geometry.outputs, 1)
    return added is None or (isinstance(added, Constant) and (*(1,) * (2 - len(added.shape)), *added.shape) == along)


def _kernel_runs(node: Node, geometry: Geometry, shapes: Shapes) -> dict[Kind, tuple[float, ...]]:
    """Returns the forms of a convolution."""
    sizes = _sizes(node, len(geometry.kernel), shapes)
    before, after = (math.prod(size[side] for size in sizes) for side in (0, 1))
    axis = geometry.rows_axis
    between = math.prod(size[1 if index == axis else 0] for index, size in enumerate(sizes))
    forward = node.op == "Conv"
    counted = after if forward else before
    runs: dict[Kind, tuple[float, ...]] = {}
    if _leaves_a_shape(node, shapes):
        runs["channel"] = (1.0, after / counted)
    if geometry.positions > 1:
        runs["input"] = (before / counted, 1.0)
        if min(geometry.sides) > 1 and not node.attrs.get("output_shape"):  # asks for all axes at once: what comes between is not said
            runs["spatial"] = (between / counted, 1.0) if forward else (1.0, between / counted)
        if "channel" in runs:
            runs["tucker2"] = (before / counted, 1.0, after / counted)
    return runs


def _leaves_a_shape(node: Node, shapes: Shapes) -> bool:
    """Whether a Conv may follow a convolution.

    Of a ConvTranspose whose output_shape is less than the input's, shape inference infers no spatial axes, and the checker then takes the
    next Conv's input for a matrix (onnx 1.23, convTransposeShapeInference).
    """
    asked = node.attrs.get("output_shape") or []
    sizes = (shapes.get(id(node.inputs[0])) or ())[2:]
    pairs = list(zip(sizes, asked, strict=False))
    return not asked or (len(sizes) == len(asked) and all(isinstance(size, int) and size <= most for size, most in pairs))


def _sizes(node: Node, rank: int, shapes: Shapes) -> list[tuple[float, float]]:
    """Returns input and output sizes along each spatial axis, up to a common factor: by strides where one is not known."""
    strides = [int(stride) for stride in node.attrs.get("strides") or [1] * rank]
    found = []
    known = [shapes.get(id(tensor)) or () for tensor in (node.inputs[0], node.outputs[0])]
    for axis, stride in enumerate(strides):
        before, after = (dims[axis + 2] if len(dims) == rank + 2 else None for dims in known)
        if isinstance(before, int) and isinstance(after, int) and before > 0 and after > 0:
            found.append((float(before), float(after)))
        else:
            found.append((float(stride), 1.0) if node.op == "Conv" else (1.0, float(stride)))
    return found
