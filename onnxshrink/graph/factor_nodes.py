"""Nodes that compute with the pieces of a weight, in place of those that computed with the weight.

    MatMul          x B = (x B1) B2                A x = A2 (A1 x)
    Gemm            the same, transposed or not as before; alpha, beta and C stay with the last
    channel         the convolution with fewer outputs, and all of its attributes; then Conv 1x1, in the same groups
    input           Conv 1x1, in the same groups; then the convolution with fewer inputs, and all of its attributes
    spatial         the convolution along one axis with what the attributes say of that axis, then along the others
    tucker2         Conv 1x1, the convolution, Conv 1x1
    LSTM, GRU, RNN  x V, then the node
    interpolative   the node with fewer outputs; of these the others, by products or Conv 1x1; then Concat

Only the last has the bias: zero padding of what has none is what it was. Of the interpolative form each has its part.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnxshrink.graph.edit import NameSource
from onnxshrink.graph.factor_forms import Form, Pieces
from onnxshrink.graph.ir import Constant, Graph, Node, Tensor, Variable
from onnxshrink.numerics.floatbits import rounded_to

__all__ = ["Cut", "insert_pieces"]

Array = np.ndarray[Any, np.dtype[Any]]
_OPTIONAL_C = 11  # the opset from which Gemm does without C (operator changelog)
_PER_AXIS = {"dilations": 1, "kernel_shape": 1, "output_padding": 0, "strides": 1}  # and what says nothing along an axis


@dataclass
class Cut:
    """What stands in a weight's place.

    Attributes:
        constants: the pieces, in the order in which they run, and what else is needed.
        nodes: that read them.
    """

    constants: list[Constant] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)


def insert_pieces(graph: Graph, form: Form, pieces: Pieces, names: NameSource) -> Cut:
    """Adds pieces to the main graph and makes all nodes that read the weight read them; the weight itself stays.

    Args:
        graph: the main graph.
        form: the pieces are of.
        pieces: of the form's shapes, in its dtype.
        names: of the graph.
    """
    maker = _Maker(graph, form, names, Cut())
    roles = _ROLES.get(form.kind, ("first", "last"))
    named = {role: maker.constant(role, array) for role, array in zip(roles, maker.operands(pieces), strict=True) if array.size}
    constants = list(named.values())
    for use in form.weight.uses:
        assert use.node is not None
        if form.kind == "interpolative":
            maker.joined(use.node, use.operand, pieces, named)
        elif form.geometry.stores == "recurrent":
            maker.recurrent(use.node, constants)
        elif form.geometry.is_kernel:
            maker.convolutions(use.node, constants)
        else:
            maker.products(use.node, use.operand, constants)
    return maker.cut


_ROLES = {"interpolative": ("first", "before", "after"), "tucker2": ("first", "core", "last")}


@dataclass
class _Maker:
    graph: Graph
    form: Form
    names: NameSource
    cut: Cut
    zero: Constant | None = None

    def operands(self, pieces: Pieces) -> list[Array]:
        """Returns pieces as operands of the new nodes."""
        stores, shape = self.form.geometry.stores, self.form.geometry.shape
        if stores == "recurrent":
            return [pieces[0][0].T, pieces[1].reshape(*shape[:2], -1)]
        if self.form.geometry.is_kernel:
            return [self.kernel(index, piece) for index, piece in enumerate(pieces)]
        batched = [piece.reshape(*shape[:-2], *piece.shape[1:]) for piece in pieces]
        return batched if stores == "rows last" else [piece.swapaxes(-1, -2) for piece in batched]

    def kernel(self, index: int, piece: Array) -> Array:
        """Returns a piece as the weight of a Conv or ConvTranspose."""
        sizes, (groups, first, second) = self.sizes[index], piece.shape[:3]
        if self.form.kind in ("channel", "interpolative") and index == 0:
            second = self.form.geometry.inputs
        wide = piece.reshape(groups, first, second, *sizes)
        if self.ops[index] == "ConvTranspose":
            wide = wide.swapaxes(1, 2)
        return wide.reshape(-1, *wide.shape[2:])

    @property
    def sizes(self) -> list[tuple[int, ...]]:
        """The kernel of each piece."""
        kernel, axis = self.form.geometry.kernel, self.form.geometry.rows_axis
        point = (1,) * len(kernel)
        if self.form.kind == "spatial":
            rows = tuple(size if index == axis else 1 for index, size in enumerate(kernel))
            return [rows, tuple(1 if index == axis else size for index, size in enumerate(kernel))]
        kinds = {"channel": [kernel, point], "input": [point, kernel], "interpolative": [kernel, point, point]}
        return kinds.get(self.form.kind, [point, kernel, point])

    @property
    def ops(self) -> list[str]:
        """The op that reads each piece of a kernel: a 1x1 is a Conv in any case."""
        op = "Conv" if self.form.geometry.stores == "kernel" else "ConvTranspose"
        if self.form.kind == "spatial":
            return [op, op]
        kinds = {"channel": [op, "Conv"], "input": ["Conv", op], "interpolative": [op, "Conv", "Conv"]}
        return kinds.get(self.form.kind, ["Conv", op, "Conv"])

    def attributes(self, node: Node) -> list[dict[str, Any]]:
        """Returns the attributes of the nodes that read the pieces of a kernel."""
        geometry = self.form.geometry
        point = self.point
        if self.form.kind == "spatial":
            return [_along(node.attrs, {geometry.rows_axis}, len(geometry.kernel)),
                    _along(node.attrs, set(range(len(geometry.kernel))) - {geometry.rows_axis}, len(geometry.kernel))]  # fmt: skip
        whole = dict(node.attrs)
        return {"channel": [whole, point], "input": [point, whole], "tucker2": [point, whole, point]}[self.form.kind]

    @property
    def point(self) -> dict[str, Any]:
        """The attributes of a Conv 1x1."""
        groups = self.form.geometry.groups
        return {"kernel_shape": [1] * len(self.form.geometry.kernel), **({"group": groups} if groups > 1 else {})}

    def convolutions(self, node: Node, constants: list[Constant]) -> None:
        """Makes a convolution the last of several."""
        data: Tensor = node.inputs[0]
        attributes = self.attributes(node)
        for op, constant, attrs in zip(self.ops[:-1], constants[:-1], attributes[:-1], strict=True):
            data = self.before(node, op, [data, constant], attrs)
        node.op, node.attrs = self.ops[-1], attributes[-1]
        node.inputs = [data, constants[-1], *node.inputs[2:]]
        self.cut.nodes.append(node)

    def products(self, node: Node, operand: int, constants: list[Constant]) -> None:
        """Makes a product the second of two."""
        first, last = constants
        op, inputs, attrs = "MatMul", _placed(node.inputs[1 - operand], first, operand), {}
        flags = {name: 1 for name in ("transA", "transB") if node.attrs.get(name, 0)} if node.op == "Gemm" else {}
        if flags:  # else MatMul computes it, of all opsets
            op, attrs = "Gemm", flags
            inputs += self.absent()
        between = self.before(node, op, inputs, attrs)
        if node.op == "Gemm":  # what came between is not transposed
            other = "transB" if operand == 0 else "transA"
            node.attrs = {name: value for name, value in node.attrs.items() if name != other}
        node.inputs = [*_placed(between, last, operand), *node.inputs[2:]]
        self.cut.nodes.append(node)

    def joined(self, node: Node, operand: int, pieces: Pieces, constants: dict[str, Constant]) -> None:
        """Makes a node the one that joins its outputs: those before the kept ones, these, and those after."""
        biases = self.biases(node, operand, pieces)
        data = [constants["first"] if index == operand else tensor for index, tensor in enumerate(node.inputs[:2])]
        first = self.before(node, node.op, [*data, *biases.get("first", [])], dict(node.attrs))
        parts = {"first": first}
        for role in [role for role in constants if role != "first"]:
            parts[role] = self.before(node, *self.following(node, operand, first, constants[role], biases.get(role, [])))
        along_rows = {"Gemm": 0, "MatMul": -2}
        axis = along_rows[node.op] + operand if node.op in along_rows else 1
        node.op, node.attrs, node.inputs = "Concat", {"axis": axis}, [parts[role] for role in ("before", "first", "after") if role in parts]
        self.cut.nodes.append(node)

    def following(
        self, node: Node, operand: int, first: Tensor, way: Constant, bias: list[Tensor]
    ) -> tuple[str, list[Tensor], dict[str, Any]]:
        """Returns op, inputs and attributes of what computes other outputs from the kept ones."""
        if self.form.geometry.is_kernel:
            return "Conv", [first, way, *bias], self.point
        inputs, own = _placed(first, way, operand), "transB" if operand else "transA"
        if not node.attrs.get(own, 0) and not bias:
            return "MatMul", inputs, {}
        return "Gemm", [*inputs, *(bias or self.absent())], {own: 1} if node.attrs.get(own, 0) else {}

    def biases(self, node: Node, operand: int, pieces: Pieces) -> dict[str, list[Tensor]]:
        """Returns what is added to each part of the outputs: what the kept ones have already been given is taken off the others."""
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if not isinstance(bias, Constant):
            return {}
        values, start = bias.values.astype(np.float64).reshape(-1), pieces[1].shape[1]
        kept = values[start : start + pieces[0].shape[1]]
        others = np.delete(values, slice(start, start + len(kept))) - np.concatenate(pieces[1:], axis=1)[0].astype(np.float64) @ kept
        others *= float(node.attrs.get("beta", 1.0))
        shape = ([-1] if self.form.geometry.is_kernel else [1, -1] if operand else [-1, 1])[-len(bias.shape) :]
        parts = {"first": kept, "before": others[:start], "after": others[start:]}
        return {
            role: [self.constant(f"{role}.bias", rounded_to(part, bias.dtype).reshape(shape))] for role, part in parts.items() if part.size
        }

    def recurrent(self, node: Node, constants: list[Constant]) -> None:
        """Puts a product before an LSTM, GRU or RNN."""
        node.inputs = [self.before(node, "MatMul", [node.inputs[0], constants[0]], {}), constants[1], *node.inputs[2:]]
        self.cut.nodes.append(node)

    def before(self, node: Node, op: str, inputs: list[Tensor], attrs: dict[str, Any]) -> Variable:
        """Adds a node right before another one, and returns its output."""
        output = Variable(self.names.fresh(f"{node.site}_thin"), self.form.dtype)
        added = Node(op, inputs, [output], attrs)
        self.graph.nodes.insert(self.graph.nodes.index(node), added)
        self.cut.nodes.append(added)
        return output

    def constant(self, role: str, values: Array) -> Constant:
        """Adds a constant, named after the weight."""
        constant = Constant(self.names.fresh(f"{self.form.weight.constant.name}.{role}"), values)
        self.graph.constants.append(constant)
        self.cut.constants.append(constant)
        return constant

    def absent(self) -> list[Tensor]:
        """Returns the C of a Gemm that adds nothing, where it needs one; one for all."""
        if self.graph.opset >= _OPTIONAL_C:
            return []
        self.zero = self.zero or self.constant("zero", np.zeros(1, self.form.dtype))
        return [self.zero]


def _placed(data: Tensor, constant: Constant, operand: int) -> list[Tensor]:
    return [constant, data] if operand == 0 else [data, constant]


def _along(attrs: dict[str, Any], axes: set[int], rank: int) -> dict[str, Any]:
    """Returns the attributes of a convolution along some of its axes, with a kernel of 1 along the others."""
    found = dict(attrs)
    for name, neutral in _PER_AXIS.items():
        if attrs.get(name):
            found[name] = [size if axis in axes else neutral for axis, size in enumerate(attrs[name])]
    if attrs.get("pads"):
        found["pads"] = [pad if index % rank in axes else 0 for index, pad in enumerate(attrs["pads"])]
    return found
