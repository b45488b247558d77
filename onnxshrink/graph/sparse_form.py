"""Forms in which a file holds a weight with many zeros, bit for bit, in standard ops that ONNX Runtime folds when a session starts.

    mask      bits of 8 elements to a byte ── unpack ── CumSum ── Mul(bits) ── Reshape ── Gather([0, values]) ── W
    patterns  codes of blocks ── Gather(table) ── to the weight's order ── CumSum ── Mul(bits) ── Reshape ── Gather([0, values]) ── W
    gaps      gaps ── CumSum ── ScatterElements(zeros, 1, 2, 3, ...) ── Reshape ── Gather([0, values]) ── W
    constant  Constant(sparse_value): values and linear indices, which ONNX Runtime makes dense when it reads the file

The running sum of the bits counts the stored values, so times the bit it is the place of an element's value, or 0, where a zero
stands: integers throughout, and the values are copied, never computed with. Below opset 11 there is no CumSum; there the sum within
a row of at most 256 bits is a MatMul with a triangle of ones (exact in float32), and where a row's count begins is stored. Gaps need
ScatterElements and the constant its sparse_value, both of opset 11.

``sparse_initializer`` is not among the forms: ONNX's shape inference takes the tensor for a sparse_tensor (as of onnx 1.23,
shape_inference/implementation.cc), which no op but ONNX Runtime's own accepts, so that `onnx.checker.check_model(full_check=True)`
fails for whatever reads it. The sparse_value of a Constant node is the same message and gives a dense tensor (Constant-11). Its
indices must be INT64 (checker.cc), but as int64_data, a packed varint, they take 1 to 4 bytes each and not the 8 of raw_data. It is
not used in model-local functions: ONNX Runtime 1.31 crashes now and then when it inlines one of those twice.

Ops used beside those of `onnxshrink.graph.codebook` and their first opsets (onnx/docs/Changelog.md): Less 7 with broadcasting, MatMul 1,
Transpose 1, ConstantOfShape 9, BitShift, CumSum, Range and ScatterElements 11.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnxshrink.graph.codebook import MAX_FOLDED_BYTES, DecoderBuilder, first_opset
from onnxshrink.graph.edit import Fragment, NameSource, held_bytes, replace_constant
from onnxshrink.graph.exporter import framed_bytes, shell_tensor
from onnxshrink.graph.ir import Constant, Graph, Tensor
from onnxshrink.graph.storage import Stored
from onnxshrink.numerics.sparse_codes import best_gap_bits, best_patterns, gap_codes, set_bits

__all__ = ["SparseForm", "sparse_forms", "store_sparse"]

Array = np.ndarray[Any, np.dtype[Any]]
_FIRST_WITH_SUMS = 11  # CumSum, BitShift, Range, ScatterElements, Constant's sparse_value
_LONGEST_ROW, _SHORTEST_ROW = 256, 8  # of bits that a MatMul sums: the triangle is no larger than 256 KB while a session starts
_INDEX_BYTES = 4


@dataclass(frozen=True, eq=False)
class SparseForm:
    """One way to store a weight.

    Attributes:
        kind: "mask", "patterns", "gaps" or "constant".
        detail: one or two words more about it, or nothing.
        nbytes: in the file, nodes, constants and names included.
        fragment: what computes the weight, or None for a constant.
        names: that the fragment has taken, or None.
    """

    kind: str
    detail: str
    nbytes: int
    fragment: Fragment | None = None
    names: _TrialNames | None = None


def sparse_forms(constant: Constant, scope: Graph, names: NameSource, *, in_function: bool = False) -> Iterator[SparseForm]:
    """Yields the forms in which a weight can be stored, one after the other; nothing is changed.

    Args:
        constant: of floating point, any shape, of any number of zeros. Elements with any bit set are stored, -0.0 too.
        scope: the graph that owns it.
        names: of the model; a form that is stored takes its own from it.
        in_function: whether the scope is a model-local function or a body in one.
    """
    values = constant.values
    stored = set_bits(values)
    is_output = any(tensor is constant for tensor in scope.outputs)  # of which ONNX Runtime would make a SparseTensor
    if scope.opset >= _FIRST_WITH_SUMS and not is_output and not in_function:
        yield SparseForm("constant", "", _sparse_constant_bytes(constant, scope, np.flatnonzero(stored)))
    if scope.opset < first_opset(scope) or _INDEX_BYTES * values.size > MAX_FOLDED_BYTES:
        return
    builders = [_mask, _patterns, *([_gaps] if scope.opset >= _FIRST_WITH_SUMS and stored.any() else [])]
    for make in builders:
        trial = _TrialNames(names)
        builder = _SparseBuilder(constant.name, scope, trial)
        kind = make(builder, values, stored)
        if kind:
            builder.fragment.output.info = constant.info if is_output else None  # as it will be; it counts
            yield SparseForm(*kind, builder.fragment.nbytes(scope), builder.fragment, trial)


def store_sparse(constant: Constant, scope: Graph, form: SparseForm) -> None:
    """Puts a form where a weight was; an initializer that was listed as a graph input no longer is.

    Args:
        constant: as it was when `sparse_forms` made the form.
        scope: that owns it.
        form: of it.
    """
    if form.fragment is not None and form.names is not None:
        replace_constant(scope, constant, form.fragment)
        form.names.keep()
        return
    constant.values = Stored(_sparse_tensor(constant.values))
    constant.holder = constant.holder or onnx.NodeProto()
    scope.inputs = [tensor for tensor in scope.inputs if tensor is not constant]


def _mask(builder: _SparseBuilder, values: Array, stored: Array) -> tuple[str, str] | None:
    """Adds a mask of a bit for each element."""
    flat = stored.reshape(-1)
    whole = 8 if builder.opset >= _FIRST_WITH_SUMS else min(_LONGEST_ROW, 2 ** max(3, (flat.size - 1).bit_length() // 2 + 1))
    padded = np.zeros(-(-flat.size // whole) * whole, bool)
    padded[: flat.size] = flat
    places = builder.ranks(builder.unpacked(padded), padded, whole)
    if padded.size > flat.size:
        places = builder.head(places, flat.size)
    if values.ndim != 1:
        places = builder.reshaped(places, values.shape)
    builder.look_up(places, values.reshape(-1)[flat])
    return "mask", ""


def _patterns(builder: _SparseBuilder, values: Array, stored: Array) -> tuple[str, str] | None:
    """Adds codes of blocks, if those are fewer bits than a mask."""
    found = best_patterns(stored, values.dtype.itemsize)
    row = next((size for size in range(_LONGEST_ROW, _SHORTEST_ROW - 1, -1) if values.size % size == 0), 0)
    if found is None or (builder.opset < _FIRST_WITH_SUMS and not row):
        return None
    codes = builder.cast(builder.codes(found.codes, found.bits), np.int32)
    bits: Tensor = builder.node("Gather", [builder.constant("table", found.table.astype(np.uint8)), codes], dtype=np.dtype(np.uint8))
    (height, width), (down, across) = found.block, found.grid
    if height > 1 and across > 1:
        whole = builder.reshaped(bits, (down, across, height, width))
        bits = builder.node("Transpose", [whole], {"perm": [0, 2, 1, 3]})
    if (down * height, across * width) != found.matrix:
        bits = builder.corner(builder.reshaped(bits, (down * height, across * width)), found.matrix)
    places = builder.ranks(builder.reshaped(bits, (-1,)), found.stored, row)
    builder.look_up(builder.reshaped(places, values.shape), values.reshape(found.matrix)[found.stored])
    return "patterns", f"{len(found.table)} of {height}x{width}"


def _gaps(builder: _SparseBuilder, values: Array, stored: Array) -> tuple[str, str] | None:
    """Adds gaps between the stored elements."""
    flat = stored.reshape(-1)
    bits = best_gap_bits(flat, values.dtype.itemsize)
    gaps, at = gap_codes(flat, bits)
    steps = builder.cast(builder.codes(gaps, bits), np.int32)
    ends = builder.node("CumSum", [steps, builder.constant("axis", np.array(0, np.int32))])
    one, stop = builder.constant("one", np.array(1, np.int32)), builder.constant("stop", np.array(gaps.size + 1, np.int32))
    order = builder.node("Range", [one, stop, one])
    zero = helper.make_attribute("value", helper.make_tensor("", TensorProto.INT32, [1], [0]))
    size = builder.constant("size", np.array([values.size], np.int64))
    zeros = builder.node("ConstantOfShape", [size], {"value": zero}, np.dtype(np.int32))
    places = builder.node("ScatterElements", [zeros, ends, order])
    builder.look_up(builder.reshaped(places, values.shape) if values.ndim != 1 else places, values.reshape(-1)[at])
    return "gaps", f"of {bits} bits"


class _SparseBuilder(DecoderBuilder):
    """Makes the nodes of one sparse weight."""

    def unpacked(self, bits: Array) -> Tensor:
        """Packs bits, whole bytes of them, first bit lowest, and returns the vector of them unpacked: uint8, or int32 below opset 11."""
        if self.opset < _FIRST_WITH_SUMS:
            return self.plane(bits.astype(np.uint8), 1)
        packed = self.constant("codes", np.packbits(bits, bitorder="little").reshape(-1, 1))
        shifts = self.constant("shifts", np.arange(8, dtype=np.uint8).reshape(1, -1))
        shifted = self.node("BitShift", [packed, shifts], {"direction": "RIGHT"})
        lowest = self.node("Mod", [shifted, self.constant("base", np.array(2, np.uint8))])
        return self.reshaped(lowest, (-1,))

    def ranks(self, bits: Tensor, known: Array, row: int) -> Tensor:
        """Returns int32: the number of set bits up to each of them, itself among them, or 0 for bits that are not set.

        Args:
            bits: a vector of integers.
            known: what they are.
            row: how many to sum at a time below opset 11; a divisor of their number.
        """
        counted = self.cast(bits, np.int32)
        if self.opset >= _FIRST_WITH_SUMS:
            sums = self.node("CumSum", [counted, self.constant("axis", np.array(0, np.int32))])
            return self.node("Mul", [sums, counted])
        rows = self.cast(self.reshaped(counted, (-1, row)), np.float32)
        before, after = (np.arange(row, dtype=np.float32) + shift for shift in (-0.5, 0.0))
        upper = [self.constant("before", before.reshape(-1, 1)), self.constant("after", after.reshape(1, -1))]
        triangle = self.cast(self.node("Less", upper, dtype=np.dtype(np.bool_)), np.float32)
        within = self.cast(self.node("MatMul", [rows, triangle]), np.int32)
        counts = np.count_nonzero(known.reshape(-1, row), axis=1)
        starts = self.constant("starts", (np.cumsum(counts) - counts).astype(np.int32).reshape(-1, 1))
        sums = self.reshaped(self.node("Add", [within, starts]), (-1,))
        return self.node("Mul", [sums, counted])

    def reshaped(self, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Returns a tensor in another shape."""
        return self.node("Reshape", [tensor, self.constant("shape", np.array(shape, np.int64))])

    def corner(self, tensor: Tensor, shape: tuple[int, int]) -> Tensor:
        """Returns the first rows and columns of a matrix."""
        if self.opset < 10:
            return self.node("Slice", [tensor], {"starts": [0, 0], "ends": list(shape)})
        return self.node("Slice", [tensor, *(self.constant("corner", np.array(at, np.int64)) for at in ((0, 0), shape))])

    def look_up(self, places: Tensor, values: Array) -> None:
        """Ends the fragment with the values at their places, and zeros at place 0."""
        known = self.constant("values", np.concatenate([np.zeros(1, values.dtype), values]))
        self.fragment.output = self.node("Gather", [known, places])
        self.fragment.output.name = self.stem  # that it will have, for the count of bytes


class _TrialNames(NameSource):
    """Names that are given back unless the fragment they are for is kept."""

    def __init__(self, source: NameSource) -> None:
        self.source = source
        self.used = dict(source.used)
        self.taken: set[str] = set()

    def fresh(self, stem: str) -> str:
        """Returns a name that neither the model nor the fragment has."""
        name = stem
        while name in self.taken or name in self.source.taken:
            self.used[stem] = self.used.get(stem, 1) + 1
            name = f"{stem}_{self.used[stem]}"
        self.taken.add(name)
        return name

    def keep(self) -> None:
        """Takes the names for good."""
        self.source.taken |= self.taken
        self.source.used = self.used


def _sparse_tensor(values: Array) -> onnx.SparseTensorProto:
    """Returns the message of a tensor's stored elements, with linear indices, in order, as varints."""
    places = np.flatnonzero(set_bits(values))
    kept = onnx.numpy_helper.from_array(values.reshape(-1)[places])
    indices = TensorProto(dims=[places.size], data_type=TensorProto.INT64, int64_data=places.tolist())
    return onnx.SparseTensorProto(values=kept, indices=indices, dims=values.shape)


def _sparse_constant_bytes(constant: Constant, scope: Graph, places: Array) -> int:
    """Returns the bytes of a Constant node with the message that `_sparse_tensor` makes, without making it."""
    varints = places.size + sum(int(np.count_nonzero(places >> 7 * more)) for more in range(1, 9))
    indices = TensorProto(dims=[places.size], data_type=TensorProto.INT64).ByteSize()
    indices += framed_bytes(varints) if places.size else 0
    kept = shell_tensor(Constant("", np.zeros(0, constant.dtype)))
    kept.ClearField("name")
    kept.dims[:] = [places.size]
    values = kept.ByteSize() + framed_bytes(places.size * constant.dtype.itemsize)
    tensor = onnx.SparseTensorProto(dims=constant.shape).ByteSize() + framed_bytes(values) + framed_bytes(indices)
    described = framed_bytes(constant.info.ByteSize()) if constant.info is not None else 0
    return held_bytes(constant, tensor, is_sparse=True) + described
