"""The Huffman decoder as model-local functions of standard ops, which ONNX Runtime folds away while a session starts.

A finite-state machine reads all lanes of all tensors of a batch in step, a byte at a time. A state is an inner node of a code
tree. The trees of all codes are numbered one after the other, breadth first, so the children of node s are items 2s and
2s + 1 of the list of all nodes that are no roots, and one bit for each of these, leaf or inner node, describes the trees.

    Huffman(data, sizes, lane_starts, root_steps, lanes, length) -> symbols
        tables      next[byte · S + state]: the state after a byte; moved[...]: by how many symbols the position moves on
                    place_k[...], value_k[...]: where, from the end of the move, to write which symbol, for slot k
        steps       index = byte · S + state, state = next[index], for lanes side by side        `Step`: eight of them
        symbols     position = Σ moved[index] up to each byte, lane after lane
                    symbols[position + place_k[index]] += value_k[index], for each slot k
    Bit             extends the tables from the first b bits of a byte to b + 1

Slot k belongs to as many neighbouring bits of a byte as the shortest codeword has: no two codewords end in it. Where none ends,
nothing is added; below opset 16, where ScatterElements cannot add, the place is huge, and what is beyond the end is written to
one last element that nobody reads. Bits are taken from the lowest to the highest of each byte: so tables grow at the end.

Memory. The constant folding of ONNX Runtime (constant_folding.cc, graph_transformer.cc) keeps every result until it has been
through the whole graph; only then, at the end of one of its 10 steps, unused ones are freed. So the batches of large models
wait for each other: in the ``gated`` decoder all data goes through a Slice that starts at the gate, an output of the batch
before. It is in an If, whose condition is the gate too. The shape of the Slice is unknown until the If has been inlined, and
nodes of unknown shape are not folded. So step k folds batch k only. Should that fail, nothing but memory is lost.

Ops and attributes are those of any opset from 11 on (onnx/docs/Changelog.md): Split takes its sizes as input from 13 and the
number of outputs from 18, Min takes integers from 12, ScatterElements adds from 16. ONNX Runtime's GatherElements takes 1 ns an
element where its Gather takes 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import AttributeProto, TensorProto, helper

__all__ = [
    "DECODER",
    "DOMAIN",
    "FIRST_OPSET",
    "FIRST_WITH_INTS",
    "STEPS",
    "WEIGHT",
    "DecoderShape",
    "decoder_functions",
    "weight_function",
]

DOMAIN = "onnxshrink"
DECODER = "Huffman"
WEIGHT = "Weight"
FIRST_OPSET = 11  # CumSum, GatherElements, ScatterElements
_FIRST_WITH_REDUCTION = 16  # of ScatterElements
FIRST_WITH_INTS = 12  # Constant-12 takes value_ints
STEPS = 8  # bytes of a lane that one call of _STEP reads
_STEP, _BIT = "Step", "Bit"
_FAR = 1 << 28  # no place: more than all symbols of a batch, and with them below 2^31
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"

_NODE_LIST = list[onnx.NodeProto]


@dataclass(frozen=True)
class DecoderShape:
    """What the decoder of a model depends on.

    Attributes:
        opset: of the model.
        lane_bytes: bytes of a lane, a multiple of `STEPS`.
        shortest: bits of the shortest codeword of all.
        has_runs: whether codewords move by other than one symbol; each then has its move in the data.
        gated: whether batches wait for each other; the decoder then has a gate as last input and as second output.
    """

    opset: int
    lane_bytes: int
    shortest: int
    has_runs: bool
    gated: bool

    @property
    def sizes_are_attribute(self) -> bool:
        """Whether the sizes of the parts of the data are an attribute of the call and no input."""
        return self.opset < 13


def decoder_functions(shape: DecoderShape) -> list[onnx.FunctionProto]:
    """Returns the functions of a decoder, the one to call first."""
    inputs = ["d", "e", "f", "m", "l", "n", "g"]
    if shape.sizes_are_attribute:
        inputs.remove("e")
    if not shape.gated:
        inputs.remove("g")
    body = _Body(shape.opset)
    symbols, gate = _decode(body, shape)
    outputs = [symbols]
    if shape.gated:
        outputs, body = ["o", "p"], _gated(body, symbols, gate, shape.opset)
    attributes = ["e"] if shape.sizes_are_attribute else []
    return [
        _function(DECODER, inputs, outputs, body, attributes),
        _step_function(shape.opset),
        _bit_function(shape.opset),
    ]


def weight_function(opset: int) -> onnx.FunctionProto:
    """Returns the function `Weight`: (codes, scale) -> codes, in the shape of attribute s, times scale, in float32."""
    shape = onnx.NodeProto(op_type="Constant", output=["t"])
    name, kind = ("value_ints", AttributeProto.INTS) if opset >= FIRST_WITH_INTS else ("value", AttributeProto.TENSOR)
    shape.attribute.add(name=name, ref_attr_name="s", type=kind)
    nodes = [
        shape,
        helper.make_node("Reshape", ["c", "t"], ["r"]),
        helper.make_node("Cast", ["r"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["s"], ["g"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["f", "g"], ["w"]),
    ]
    return helper.make_function(DOMAIN, WEIGHT, ["c", "s"], ["w"], nodes, [helper.make_opsetid("", opset)], attributes=["s"])


class _Body:
    """Makes the nodes of a function, with short names: they are bytes of the file."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: _NODE_LIST = []
        self.made = 0

    def several(self, count: int, op: str, *inputs: str, domain: str = "", **attributes: Any) -> list[str]:
        outputs = [self.name() for _ in range(count)]
        node = helper.make_node(op, inputs, outputs, **attributes)
        if domain:
            node.domain = domain
        self.nodes.append(node)
        return outputs

    def __call__(self, op: str, *inputs: str, **attributes: Any) -> str:
        return self.several(1, op, *inputs, **attributes)[0]

    def name(self) -> str:
        """Returns a name that no input has."""
        self.made += 1
        high, low = divmod(self.made - 1, len(_LETTERS))
        return f"{_LETTERS[high]}{_LETTERS[low]}"

    def int32(self, *values: int, shape: Sequence[int] = (1,)) -> str:
        return self("Constant", value=helper.make_tensor("", TensorProto.INT32, shape, values))

    def int64(self, *values: int) -> str:
        if self.opset >= FIRST_WITH_INTS:
            return self("Constant", value_ints=values)
        return self("Constant", value=helper.make_tensor("", TensorProto.INT64, [len(values)], values))

    def cast(self, tensor: str, kind: int) -> str:
        return self("Cast", tensor, to=kind)

    def equal_parts(self, tensor: str, count: int) -> list[str]:
        if self.opset >= 18:
            return self.several(count, "Split", tensor, num_outputs=count)
        return self.several(count, "Split", tensor)

    def parts(self, tensor: str, count: int) -> list[str]:
        """Cuts the data into parts of the sizes that the call says."""
        if self.opset >= 13:
            return self.several(count, "Split", tensor, "e")
        outputs = self.several(count, "Split", tensor)
        self.nodes[-1].attribute.add(name="split", ref_attr_name="e", type=AttributeProto.INTS)
        return outputs

    def at_most(self, tensor: str, limit: str) -> str:
        if self.opset >= 12:
            return self("Min", tensor, limit)
        return self("Where", self("Less", tensor, limit), tensor, limit)


def _decode(body: _Body, shape: DecoderShape) -> tuple[str, str]:
    """Adds the decoder; returns the names of its symbols, int8 [length], and of the gate, int64 [1] (or empty)."""
    zero = body("Constant", value=helper.make_tensor("", TensorProto.INT64, [], [0]))
    one, far = body.int32(1), body.int32(_FAR)
    two = body("Add", one, one)
    flat = body.int64(-1)
    data, gate = "d", ""
    if shape.gated:
        data = body("Slice", "d", "g", body.int64(1 << 31))
    parts = body.parts(data, 3 + shape.has_runs + shape.gated)
    if shape.gated:
        gate = body.cast(parts.pop(0), TensorProto.INT64)
    stream, tree, values, *moves = parts

    # one item for each child of an inner node: whether it is a leaf, the state behind it, what it writes and how far it moves
    powers = body.int32(*(1 << bit for bit in range(8)), shape=(8, 1))
    leaf = body("Reshape", body("Mod", body("Div", body.cast(tree, TensorProto.INT32), powers), two), flat)
    steps = body("ScatterElements", body("Sub", leaf, leaf), body("Mul", body("CumSum", "m", zero), two), "m")
    inner = body("Sub", one, leaf)
    number = body("CumSum", body("Add", inner, body("Sign", steps)), zero)
    is_leaf = body.cast(leaf, TensorProto.BOOL)
    child = body("Mul", body("Where", is_leaf, body("CumSum", steps, zero), number), two)
    rank = body("Mul", body("CumSum", leaf, zero), leaf)
    value = body("GatherElements", body.cast(values, TensorProto.INT32), rank)
    move = body("GatherElements", body.cast(moves[0], TensorProto.INT32), rank) if moves else leaf
    step = body("Sub", move, body("Mul", leaf, far))

    # tables, from 0 to 8 bits: state after them, position after them, and what the codeword that ended in this slot writes
    half = body.equal_parts(leaf, 2)[0]
    nothing = body("Sub", half, half)
    state = body("CumSum", body("Add", nothing, two), zero, exclusive=1)
    count = body.cast(body("Shape", half), TensorProto.INT32)
    place, written, slots = nothing, nothing, []
    adds = shape.opset >= _FIRST_WITH_REDUCTION
    for bit in range(8):
        if bit % shape.shortest == 0:
            place, written = body("Add", place, far), body("Sub", written, written) if bit else written
        state, place, written = body.several(3, _BIT, state, place, written, child, step, value, one, domain=DOMAIN)
        if (bit + 1) % shape.shortest == 0 or bit == 7:
            before, place = place, body("Mod", place, far)
            slots.append((place if adds else before, written, 1 << (7 - bit)))
    moved = place
    end = body("Add", moved, one)

    # lanes side by side: the machine
    row = body.int64(1, -1)
    root = body("ConstantOfShape", "l", value=helper.make_tensor("", TensorProto.INT32, [1], [0]))
    root = body("Reshape", body("CumSum", body("ScatterElements", root, "f", "m"), zero), row)
    following = body("Reshape", body("Div", state, two), row)
    blocks = [body("Reshape", stream, body.int64(shape.lane_bytes, -1))]
    if shape.lane_bytes > STEPS:
        blocks = body.equal_parts(blocks[0], shape.lane_bytes // STEPS)
    found = []
    for block in blocks:
        *indices, root = body.several(STEPS + 1, _STEP, block, root, following, count, domain=DOMAIN)
        found += indices
    index = body("Concat", *found, axis=0)
    index = body("Reshape", body("Transpose", index, perm=[1, 0]), flat)

    # symbols
    position = body("CumSum", body("GatherElements", moved, index), zero)
    symbols = body("ConstantOfShape", "n", value=helper.make_tensor("", TensorProto.INT8, [1], [0]))
    last = "" if adds else body("Sub", body.cast("n", TensorProto.INT32), one)
    for place, written, repeats in slots:
        if repeats > 1:
            times = body.int64(repeats)
            place, written = body("Tile", place, times), body("Tile", written, times)
        where = body("Add", position, body("GatherElements", body("Sub", place, end), index))
        what = body("GatherElements", body.cast(written, TensorProto.INT8), index)
        if adds:
            symbols = body("ScatterElements", symbols, where, what, reduction="add")
        else:
            symbols = body("ScatterElements", symbols, body.at_most(where, last), what)
    return symbols, gate


def _gated(body: _Body, symbols: str, gate: str, opset: int) -> _Body:
    """Returns a body that runs another as a branch of an If. The other branch is never run; it gives the shapes."""
    other = _Body(opset)
    other("ConstantOfShape", "n", value=helper.make_tensor("", TensorProto.INT8, [1], [0]))
    other("Identity", "g")
    outer = _Body(opset)
    branches: dict[str, Any] = {
        "then_branch": _branch(body.nodes, [symbols, gate]),
        "else_branch": _branch(other.nodes, [name for node in other.nodes for name in node.output]),
    }
    outer.nodes.append(helper.make_node("Cast", ["g"], ["c"], to=TensorProto.BOOL))
    outer.nodes.append(helper.make_node("If", ["c"], ["o", "p"], **branches))
    return outer


def _branch(nodes: _NODE_LIST, outputs: list[str]) -> onnx.GraphProto:
    return helper.make_graph(nodes, "b", [], [onnx.ValueInfoProto(name=name) for name in outputs])


def _step_function(opset: int) -> onnx.FunctionProto:
    """Eight steps: (bytes uint8 [8, lanes], states, next, number of states) -> (indices, 8 times; states), int32 [1, lanes]."""
    body = _Body(opset)
    state, found = "s", []
    for octet in body.equal_parts(body("Mul", body.cast("d", TensorProto.INT32), "c"), STEPS):
        found.append(body("Add", octet, state))
        state = body("GatherElements", "t", found[-1], axis=1)
    return _function(_STEP, ["d", "s", "t", "c"], [*found, state], body)


def _bit_function(opset: int) -> onnx.FunctionProto:
    """One bit more: (states, places, values; state, step and value behind each child; 1) -> (states, places, values)."""
    body = _Body(opset)
    child = body("Concat", "s", body("Add", "s", "i"), axis=0)
    state = body("GatherElements", "t", child)
    place = body("Add", body("Concat", "p", "p", axis=0), body("GatherElements", "u", child))
    written = body("Add", body("Concat", "v", "v", axis=0), body("GatherElements", "w", child))
    return _function(_BIT, ["s", "p", "v", "t", "u", "w", "i"], [state, place, written], body)


def _function(
    name: str, inputs: list[str], outputs: list[str], body: _Body, attributes: Sequence[str] = ()
) -> onnx.FunctionProto:
    imports = [helper.make_opsetid("", body.opset)]
    if any(domain == DOMAIN for domain in _domains(body.nodes)):
        imports.append(helper.make_opsetid(DOMAIN, 1))
    return helper.make_function(DOMAIN, name, inputs, outputs, body.nodes, imports, attributes=attributes)


def _domains(nodes: _NODE_LIST) -> list[str]:
    bodies = [attribute.g.node for node in nodes for attribute in node.attribute]
    return [node.domain for node in nodes] + [domain for inner in bodies for domain in _domains(list(inner))]
