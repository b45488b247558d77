"""Coded weights that read their codes from the Huffman decoder: the integer part of their nodes is replaced, the rest stays.

    codes ── Cast ── Sub(zero point) ── Mul(scale) ── W    becomes    vector ── Weight(scale) ── W
    codes ── Cast ── Gather(codebook) ── ... ── W          becomes    vector ── Reshape [── Cast ── Add] ── ... ── W

`Weight` is a model-local function, Reshape, Cast and Mul in one node of few bytes. What is coded are the codes less a *centre*
that makes them fit an int8, so that runs of the centre are runs of zeros: the zero point of a grid, which then needs no Sub,
or a code that is most of all, or 128 for codes beyond 127.

    codes ── Gather(ids) ── ... ── rows                    becomes    vector ── Reshape ── codes less centre ── Gather(ids) ── ... ── rows

A table that stays coded at run time keeps its nodes. Its zero points get less by the centre, or its codebook is rotated by it: as
an index, a code below 0 counts from the end (Gather-11).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import AttributeProto, TensorProto, helper

from onnxshrink.graph.coded import Coded
from onnxshrink.graph.edit import (
    Fragment,
    NameSource,
    constant_bytes,
    footprint,
    item_bytes,
    output_ids,
    remove_dead,
    replace_everywhere,
)
from onnxshrink.graph.exporter import framed_bytes
from onnxshrink.graph.huffman import Decoder
from onnxshrink.graph.huffman_decoder import DOMAIN, FIRST_WITH_INTS, WEIGHT, weight_function
from onnxshrink.graph.ir import Constant, Graph, Node, Tensor, Variable
from onnxshrink.graph.opset import raise_opset
from onnxshrink.graph.table_lookups import CodedTable
from onnxshrink.numerics.huffman_plan import Mapper, plan
from onnxshrink.numerics.tokens import Kind

__all__ = ["Centred", "Rewrite", "centred"]

Array = np.ndarray[Any, np.dtype[Any]]
Int8s = np.ndarray[Any, np.dtype[np.int8]]


@dataclass(frozen=True, eq=False)
class Centred:
    """The codes of a weight.

    Attributes:
        coded: the weight.
        codes: int8, flat: code less centre.
        centre: 0 to 255.
        target: the tensor that is computed from the codes instead: the weight before it is converted, or the codes themselves.
        scale: of a grid, stored or spread over the weight, before it is converted; or None.
        shape: of the weight.
        moved: of a table that stays coded at run time and whose centre is not 0: the constant that depends on the centre,
            and its values for codes less centre.
    """

    coded: Coded
    codes: Int8s
    centre: int
    target: Tensor
    scale: Tensor | None
    shape: tuple[int, ...]
    moved: tuple[Constant, Array] | None = None


def centred(coded: Coded) -> Centred | None:
    """Returns the codes of a weight, or None where its nodes do not begin with one tensor of codes."""
    if coded.table is not None:
        return _centred_table(coded, coded.table)
    digits = _digits(coded)
    codes = coded.evaluate(digits).astype(np.int32) if digits is not None else np.zeros(0, np.int32)
    if digits is None or codes.size == 0 or codes.min() < 0 or codes.max() > 255:
        return None
    grid = _grid(digits, coded)
    if grid is not None:
        product, zero_point, scale = grid
        if codes.min() - zero_point >= -128 and codes.max() - zero_point <= 127:
            return Centred(coded, (codes - zero_point).astype(np.int8).reshape(-1), zero_point, product, scale, codes.shape)
    centre = _centre(codes)
    return Centred(coded, (codes - centre).astype(np.int8).reshape(-1), centre, digits, None, codes.shape)


def _centred_table(coded: Coded, table: CodedTable) -> Centred | None:
    """Returns the codes of a table; None where they do not fit an int8 and nothing can make up for a centre."""
    codes = coded.evaluate(table.codes).astype(np.int32)
    if not codes.size:
        return None
    centre, zero_point = _centre(codes), table.zero_point
    if zero_point is not None and codes.min() - zero_point >= -128 and codes.max() - zero_point <= 127:
        centre = zero_point
    elif centre and table.has_zero_points:
        centre = 128 * int(codes.max() > 127)  # with it, zero points of rows from 0 to 255 fit an int8 too
    moved = table.operand_for(centre) if centre else None
    if centre and moved is None:
        return None
    return Centred(coded, (codes - centre).astype(np.int8).reshape(-1), centre, table.codes, None, codes.shape, moved)


def _decoded_weight(
    weight: Centred, vector: Variable, opset: int, names: NameSource, shapes: dict[tuple[int, ...], Constant]
) -> Fragment:
    """Returns what computes the weight's target from its vector of codes.

    Args:
        weight: as `centred` returned it.
        vector: int8, flat.
        opset: of the model.
        names: gives tensor names.
        shapes: constants of shapes that the scope has already; what is made goes into it.
    """
    target, table = weight.target, weight.coded.table
    fragment = Fragment(Variable(names.fresh("h") if isinstance(target, Constant) and table is None else target.name))
    if weight.scale is not None:
        attributes = {"s": _shape_attribute(weight.shape, opset)}
        scale = Variable(weight.scale.name)  # stands for it until the fragment is in the graph
        fragment.nodes.append(Node(WEIGHT, [vector, scale], [fragment.output], attributes, domain=DOMAIN))
        return fragment
    if weight.shape not in shapes:
        shapes[weight.shape] = Constant(names.fresh("hs"), np.array(weight.shape, np.int64))
        fragment.constants.append(shapes[weight.shape])
    steps: list[tuple[str, list[Tensor], dict[str, Any]]] = [("Reshape", [shapes[weight.shape]], {})]
    if table is None and (weight.centre or target.dtype != np.uint8):
        steps.append(("Cast", [], {"to": TensorProto.INT32}))
    if table is None and weight.centre:
        centre = Constant(names.fresh("hc"), np.array(weight.centre, np.int32))
        fragment.constants.append(centre)
        steps.append(("Add", [centre], {}))
    tensor = vector
    for number, (op, operands, attributes) in enumerate(steps):
        output = fragment.output if number == len(steps) - 1 else Variable(names.fresh("h"))
        fragment.nodes.append(Node(op, [tensor, *operands], [output], attributes))
        tensor = output
    if weight.moved is not None:
        old, values = weight.moved
        fragment.constants.append(Constant(old.name if _is_private(old, weight.coded) else names.fresh("hc"), values))
    return fragment


def _is_private(constant: Constant, coded: Coded) -> bool:
    """Whether nothing but the nodes of a weight reads a constant."""
    own = {id(node) for node in coded.nodes}
    outside = any(tensor is constant for tensor in coded.scope.graph.outputs)
    return not outside and all(id(node) in own for node in constant.outputs)


def _shape_attribute(shape: tuple[int, ...], opset: int) -> Any:
    if opset >= FIRST_WITH_INTS and shape:
        return list(shape)
    if opset >= FIRST_WITH_INTS:
        return AttributeProto(name="s", type=AttributeProto.INTS)
    return helper.make_attribute("s", helper.make_tensor("", TensorProto.INT64, [len(shape)], shape))


def _digits(coded: Coded) -> Tensor | None:
    """Returns the tensor of codes that the weight's nodes begin with: stored as such, or what unpacking ends with."""
    tensor: Tensor = coded.output
    own = {id(node) for node in coded.nodes}
    while isinstance(tensor, Variable):
        producer = tensor.inputs[0] if tensor.inputs else None
        if producer is None or id(producer) not in own:
            return None
        if producer.op == "Reshape":
            return tensor
        if producer.op not in ("Add", "Cast", "Gather", "Mul", "Sub"):
            return None
        tensor = producer.inputs[1 if producer.op == "Gather" else 0]
    return tensor if tensor in coded.codes else None


def _grid(digits: Tensor, coded: Coded) -> tuple[Variable, int, Tensor] | None:
    """Returns (product, zero point, scale) if the codes are only read as (code - zero point) · scale, in float32."""
    cast = _only_reader(digits, "Cast")
    subtraction = _only_reader(cast.outputs[0], "Sub") if cast is not None else None
    product = _only_reader(subtraction.outputs[0], "Mul") if subtraction is not None else None
    if cast is None or subtraction is None or product is None or cast.attrs.get("to") != TensorProto.FLOAT:
        return None
    zero_points, scale = _unconverted(subtraction.inputs[1]), _unconverted(product.inputs[1])
    result = product.outputs[0]
    if not isinstance(zero_points, Constant) or not isinstance(result, Variable) or product not in coded.nodes:
        return None
    values = zero_points.values.reshape(-1)
    if values.size == 0 or np.any(values != values[0]) or not 0 <= values[0] <= 255 or values[0] != int(values[0]):
        return None
    return result, int(values[0]), scale


def _only_reader(tensor: Tensor, op: str) -> Node | None:
    """Returns the node that reads a tensor first and alone, if it is of this op."""
    reads = len(tensor.outputs) == 1 and tensor.outputs[0].inputs[0] is tensor and tensor.outputs[0].op == op
    return tensor.outputs[0] if reads else None


def _unconverted(tensor: Tensor) -> Tensor:
    """Returns what a tensor is the Cast of, or itself."""
    is_cast = isinstance(tensor, Variable) and tensor.inputs and tensor.inputs[0].op == "Cast"
    return tensor.inputs[0].inputs[0] if is_cast else tensor


def _centre(codes: Array) -> int:
    """Returns the code that is most of all, if the others lie within 128 of it; else 0, or 128 for codes beyond 127."""
    counts = np.bincount(codes.reshape(-1))
    most = int(counts.argmax())
    if 2 * counts[most] > codes.size and codes.min() - most >= -128 and codes.max() - most <= 127:
        return most
    return 128 if codes.max() > 127 else 0


class Rewrite:
    """Weights about to read their codes from a decoder; nothing is changed until `apply`.

    Attributes:
        before: about how many bytes go, for each weight.
        own: how many bytes each weight takes afterwards, its data included.
        shared: bytes of the decoder.
    """

    def __init__(
        self, graph: Graph, opset: int, weights: Sequence[Centred], kinds: Sequence[Kind], mapper: Mapper
    ) -> None:
        """Makes everything that is to be put into the graph.

        Args:
            graph: the main graph.
            opset: that it will have; it is raised to that by `apply`.
            weights: at least one, of the main graph or of bodies.
            kinds: of tokens, for each weight.
            mapper: maps a function over items, for work in parallel.
        """
        self.graph, self.weights, self.opset, self.names = graph, weights, opset, (names := NameSource(graph))
        batches = plan([weight.codes for weight in weights], kinds, mapper)
        functions = [weight_function(opset)] if any(weight.scale is not None for weight in weights) else []
        self.decoder = Decoder(opset, names, batches, functions)
        vectors: list[list[Variable]] = [[] for _ in weights]
        for part, vector in self.decoder.outputs:
            vectors[part.vector].append(vector)
        shapes: dict[int, dict[tuple[int, ...], Constant]] = {}
        self.fragments = []
        for weight, parts in zip(weights, vectors, strict=True):
            scope = weight.coded.scope.graph
            fragment = _decoded_weight(weight, parts[0], opset, names, shapes.setdefault(id(scope), {}))
            if len(parts) > 1:
                whole = Variable(names.fresh("h"))
                fragment.nodes[0].inputs[0] = whole
                fragment.nodes.insert(0, Node("Concat", list(parts), [whole], {"axis": 0}))
            self.fragments.append(fragment)
        outputs = output_ids(graph)
        self.before = [_replaced_bytes(weight, outputs) for weight in weights]
        data = [0.0] * len(weights)
        for sequence in (sequence for batch in batches for sequence in batch):
            for part in sequence.parts:
                data[part.vector] += sequence.coded.nbytes * (part.stop - part.start) / sequence.coded.count
        nodes = [
            fragment.nbytes(weight.coded.scope.graph) + _renamings(weight, fragment)
            for weight, fragment in zip(weights, self.fragments, strict=True)
        ]
        self.own = [size + round(share) for size, share in zip(nodes, data, strict=True)]
        self.shared = self.decoder.nbytes + sum(nodes) - sum(self.own)

    def apply(self) -> tuple[list[int], list[int]]:
        """Changes the graph; returns the bytes that went and that came for each weight, which sum to those of the file."""
        scopes = [scope.graph for scope in self.graph.scopes()]
        sizes = {id(item): item_bytes(item, scope) for scope in scopes for item in scope.items}
        before = [
            sum(sizes[id(item)] for item in self._replace(weight, fragment))
            for weight, fragment in zip(self.weights, self.fragments, strict=True)
        ]
        if self.opset > self.graph.opset:
            self.shared += raise_opset(self.graph, self.opset, self.names)
        self.decoder.insert(self.graph)
        total = sum(self.own)
        ends = [self.shared * amount // total for amount in np.cumsum(self.own).tolist()]
        return before, [own + end - start for own, start, end in zip(self.own, [0, *ends], ends, strict=False)]

    def _replace(self, weight: Centred, fragment: Fragment) -> list[Node | Constant]:
        """Puts a fragment where the target of a weight was; returns what went."""
        scope, target, output = weight.coded.scope.graph, weight.target, fragment.output
        if weight.scale is not None:
            fragment.nodes[-1].inputs[1] = weight.scale
        output.dtype, output.shape = target.dtype, target.shape
        if weight.coded.table is not None:
            output.dtype, output.shape = np.dtype(np.int8), weight.shape
        if isinstance(target, Variable):
            output.info = target.info
        replace_everywhere(scope, target, output)
        gone = [target if isinstance(target, Constant) else target.inputs[0]]
        if weight.moved is not None:
            gone.append(weight.moved[0])
            _reread(weight.coded.nodes, weight.moved[0], fragment.constants[-1])
        scope.nodes[:0] = fragment.nodes
        scope.constants.extend(fragment.constants)
        return remove_dead(self.graph, gone)


def _reread(nodes: Sequence[Node], old: Tensor, new: Tensor) -> None:
    """Makes nodes read another tensor."""
    for node in nodes:
        for index, tensor in enumerate(node.inputs):
            if tensor is old:
                node.inputs[index] = new


def _renamings(weight: Centred, fragment: Fragment) -> int:
    """Returns by how many bytes the readers of what a fragment replaces grow."""
    target = weight.target
    grown = _renaming(target, fragment.output.name, target.outputs)
    if weight.moved is None:
        return grown
    return grown + _renaming(weight.moved[0], fragment.constants[-1].name, weight.coded.nodes)


def _renaming(target: Tensor, name: str, readers: Sequence[Node]) -> int:
    """Returns by how many bytes nodes grow when a tensor that they read gets another name."""
    reads = sum(tensor is target for node in readers for tensor in node.inputs)
    return reads * (framed_bytes(len(name.encode())) - framed_bytes(len(target.name.encode())))


def _replaced_bytes(weight: Centred, outputs: set[int]) -> int:
    """Returns the bytes of what only the target of a weight needs, without the scale that stays and what computes it."""
    scope = weight.coded.scope.graph
    moved = constant_bytes(weight.moved[0], scope) if weight.moved and _is_private(weight.moved[0], weight.coded) else 0
    if isinstance(weight.target, Constant):
        return constant_bytes(weight.target, scope) + moved
    size = footprint(_before(weight.target, weight.coded), scope, outputs) + moved
    if isinstance(weight.scale, Constant):
        return size - constant_bytes(weight.scale, scope)
    return size if weight.scale is None else size - footprint(_before(weight.scale, weight.coded), scope, outputs)


def _before(tensor: Tensor, coded: Coded) -> list[Node]:
    """Returns the nodes of a weight that compute a tensor."""
    own = {id(node): node for node in coded.nodes}
    needed: dict[int, Node] = {}
    queue = list(tensor.inputs)
    while queue:
        node = queue.pop()
        if id(node) in own and id(node) not in needed:
            needed[id(node)] = node
            queue.extend(producer for tensor in node.inputs for producer in tensor.inputs)
    return list(needed.values())
