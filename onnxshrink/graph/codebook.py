"""Weights stored as a codebook and small codes, in standard ops that ONNX Runtime folds while a session starts.

    codes uint8 ── Cast ── Gather(codebook) ── W                      one codebook for the tensor
    codes ── Cast ── Add(offsets) ── Gather(codebooks) ── W           one codebook per output channel
    codes ── Cast ── Gather(codebook) ── Mul(scale) ── W              one codebook, scaled per output channel
    codes ── Cast ── Sub(zero point) ── Mul(scale) ── W               a uniform grid per output channel
    scales ── Gather(0 0 0 1 1 1 ...) ── Cast ── Mul                  one of either for a tile of several channels, or of a part of one
    float16 ── Cast ── W                                              no codes, half the bytes

Tables of embeddings stay coded while a model runs; `onnxshrink.graph.coded_table` makes those of the same steps.

Codes of 1, 2 or 4 bits are packed 8, 4 or 2 to a byte and unpacked with integer Div and Mod; 3, 5, 6 and 7 bits are the sum of
such planes, so b bits cost b bits at every opset from 7 on. ONNX Runtime folds a node only when its output shape is static and its
inputs are constant (constant_folding.cc), and not when the output is over 1 GiB, so a tensor whose 4-byte indices would be larger
is refused.

Ops used and their first opsets (onnx/docs/Changelog.md): Cast 6, Gather 1, Add, Sub, Mul, Div 7, Reshape 5, Slice 1 or 10, Mod 10.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import helper

from onnxshrink.graph.edit import Fragment, NameSource
from onnxshrink.graph.ir import Constant, Graph, Node, Tensor, Variable

__all__ = [
    "FIRST_OPSET",
    "MAX_FOLDED_BYTES",
    "Codebook",
    "DecoderBuilder",
    "Operands",
    "UniformGrid",
    "coded_weight",
    "first_opset",
    "half_weight",
    "spread",
    "spread_axes",
    "tiles_along",
]

Array = np.ndarray[Any, np.dtype[Any]]
Uint8s = np.ndarray[Any, np.dtype[np.uint8]]

FIRST_OPSET = 7
_FIRST_OPSET_IN_FUNCTIONS = 9  # where constants are Constant nodes, which held floats only before (Changelog.md, Constant-9)
_NAMED_AFTER_WEIGHT = ("codebook", "codes", "half", "scale", "zero_point")  # the rest get short names: names are bytes too
_PLANE_BYTES = 240  # what the nodes and constants that unpack a plane take: small tensors keep a byte a code
_LEAST_HALVES = 32  # scales from which on two bytes less for each pay for a Cast
MAX_FOLDED_BYTES = 2**30  # constant_folding.cc: larger results are not folded; indices are int32, so 4 bytes an element


@dataclass(frozen=True)
class Codebook:
    """Values by code.

    Attributes:
        values: [k] for the whole tensor, or [tiles, k].
        tile: how many neighbours along each axis of the tensor make a tile, in which all share one row of ``values`` or one scale;
            the last ones of an axis may be fewer. None for one codebook without scales.
        scale: [tiles] float32 that the values are multiplied by, or None. Values that have scales are of the order of 1 and are
            stored as float16: what that rounds off is far below the distance between 256 values.
    """

    values: Array
    tile: tuple[int, ...] | None = None
    scale: Array | None = None


@dataclass(frozen=True)
class UniformGrid:
    """value = (code - zero_point) · scale, in float32, per tile or for the whole tensor.

    Attributes:
        scale: [tiles] float32; stored as float16 where that holds every one exactly and the file gets smaller.
        zero_point: [tiles], whole numbers from 0 to 255; or [1], one for all tiles.
        tile: as of `Codebook`; None for one grid, with [1] scale and zero point.
    """

    scale: Array
    zero_point: Array
    tile: tuple[int, ...] | None


def first_opset(scope: Graph) -> int:
    """Returns the first opset at which a graph can hold and decode codes."""
    return _FIRST_OPSET_IN_FUNCTIONS if scope.is_function else FIRST_OPSET


def coded_weight(
    constant: Constant, codes: Uint8s, bits: int, values: Codebook | UniformGrid, scope: Graph, names: NameSource
) -> Fragment:
    """Returns nodes and constants that compute a constant from its codes.

    Args:
        constant: what is to be replaced; gives name, shape and dtype.
        codes: uint8, same shape, all below 2**bits.
        bits: 1 to 8.
        values: what the codes stand for.
        scope: the graph it will be a part of, for the opset.
        names: gives tensor names.
    """
    builder = DecoderBuilder(constant.name, scope, names)
    digits = builder.codes(codes, bits)
    operands = builder.operands(values, constant.shape, constant.dtype)
    builder.fragment.output = builder.decoded(digits, operands, constant.dtype)
    return builder.fragment


def half_weight(constant: Constant, scope: Graph, names: NameSource) -> Fragment:
    """Returns nodes and constants that compute a constant of float32 or float64 from its float16 rounding."""
    builder = DecoderBuilder(constant.name, scope, names)
    result = builder.cast(builder.constant("half", constant.values.astype(np.float16)), constant.dtype)
    assert isinstance(result, Variable)
    builder.fragment.output = result
    return builder.fragment


def tiles_along(shape: tuple[int, ...], tile: tuple[int, ...] | None) -> tuple[int, ...]:
    """Returns how many tiles a tensor has along each axis: the shape in which one number per tile is stored; () for one tile."""
    return () if tile is None else tuple(-(-size // part) for size, part in zip(shape, tile, strict=True))


def spread(numbers: Array, shape: tuple[int, ...], tile: tuple[int, ...] | None) -> Array:
    """Returns one number per tile, [tiles], such that it broadcasts to the shape of the tensor; what decoders compute."""
    along = numbers.reshape(tiles_along(shape, tile))
    for axis in spread_axes(shape, tile):
        assert tile is not None
        along = np.repeat(along, tile[axis], axis).take(np.arange(shape[axis]), axis)
    return along


def spread_axes(shape: tuple[int, ...], tile: tuple[int, ...] | None) -> list[int]:
    """Returns the axes along which tiles are several and larger than one element, so that numbers of tiles do not broadcast."""
    return [] if tile is None else [axis for axis, part in enumerate(tile) if 1 < part < shape[axis]]


@dataclass(frozen=True)
class Operands:
    """What decodes codes, as tensors; see `DecoderBuilder.operands`.

    Attributes:
        scale: float32, or None.
        zero_point: float32 of a grid, or None.
        codebook: [k] or several after each other, or None for a grid.
        offsets: int32, where in ``codebook`` each channel's values begin, or None.
    """

    scale: Tensor | None = None
    zero_point: Tensor | None = None
    codebook: Tensor | None = None
    offsets: Tensor | None = None


class DecoderBuilder:
    """Makes the nodes of one fragment, in order."""

    def __init__(self, stem: str, scope: Graph, names: NameSource) -> None:
        self.stem = stem
        self.opset = scope.opset
        self.names = names
        self.fragment = Fragment(Variable(""))
        self.tile_indices: dict[tuple[int, int], Tensor] = {}  # by size of an axis and of its tiles

    def codes(self, codes: Uint8s, bits: int) -> Tensor:
        """Returns the tensor of codes, in their shape; uint8 as stored, or int32 as unpacked."""
        widths = [width for width in (4, 2, 1) if bits & width]  # the binary digits of ``bits`` are the planes
        if codes.size * (8 - bits) // 8 <= _PLANE_BYTES * len(widths):
            return self.constant("codes", codes)
        padded = np.zeros(-(-codes.size // (8 // widths[-1])) * (8 // widths[-1]), np.uint8)  # whole bytes in every plane
        padded[: codes.size] = codes.reshape(-1)
        total, shift = self.plane(padded & (2 ** widths[0] - 1), widths[0]), widths[0]
        for width in widths[1:]:
            digits = self.plane((padded >> shift) & (2**width - 1), width)
            weight = self.constant("weight", np.array(2**shift, np.int32))
            total, shift = self.node("Add", [total, self.node("Mul", [digits, weight])]), shift + width
        if padded.size > codes.size:
            total = self.head(total, codes.size)
        return self.node("Reshape", [total, self.constant("shape", np.array(codes.shape, np.int64))])

    def operands(self, values: Codebook | UniformGrid, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Operands:
        """Returns constants, or what is computed of constants alone, that meet the tensor of codes.

        Args:
            values: what codes stand for.
            shape: of the weight.
            dtype: of the weight.
        """
        tile, along = values.tile, tiles_along(shape, values.tile)
        scale = None if values.scale is None else self.factor(values.scale.reshape(along), shape, tile)
        if isinstance(values, UniformGrid):
            return Operands(scale, self.zero_point(values.zero_point, shape, tile))
        offsets = None
        if values.values.ndim == 2:
            tiles, length = values.values.shape
            first = self.constant("offsets", (np.arange(tiles) * length).astype(np.int32).reshape(along))
            offsets = self.spread(first, shape, tile)
        if scale is None:
            return Operands(codebook=self.constant("codebook", values.values.astype(dtype).reshape(-1)), offsets=offsets)
        halves = self.cast(self.constant("codebook", values.values.astype(np.float16).reshape(-1)), np.float32)
        return Operands(scale, codebook=halves, offsets=offsets)

    def decoded(self, digits: Tensor, operands: Operands, dtype: np.dtype[Any]) -> Variable:
        """Returns the weight, or rows of it, of a dtype: in float32 first if scaled, as ONNX Runtime's CPU has no float16 Mul."""
        if operands.codebook is None:
            assert operands.zero_point is not None
            result: Tensor = self.node("Sub", [self.cast(digits, np.float32), operands.zero_point])
        else:
            indices = self.cast(digits, np.int32)
            if operands.offsets is not None:
                indices = self.node("Add", [indices, operands.offsets])
            result = self.node("Gather", [operands.codebook, indices])
        if operands.scale is not None:
            result = self.cast(self.node("Mul", [result, operands.scale]), dtype)
        assert isinstance(result, Variable)
        return result

    def plane(self, digits: Uint8s, width: int) -> Tensor:
        """Packs digits of ``width`` bits, first digit lowest, and returns the int32 vector of them unpacked."""
        shifts = (np.arange(8 // width) * width).astype(np.uint8)
        packed = np.bitwise_or.reduce(digits.reshape(-1, shifts.size) << shifts, axis=1)
        words = self.cast(self.constant("codes", packed.reshape(-1, 1)), np.int32)
        powers = self.constant("powers", 2 ** shifts.astype(np.int32).reshape(1, -1))
        digits_by_byte = self.modulo(self.node("Div", [words, powers]), 2**width)
        return self.node("Reshape", [digits_by_byte, self.constant("flat", np.array([-1], np.int64))])

    def modulo(self, tensor: Tensor, base: int) -> Tensor:
        """Returns an int32 tensor, none below 0, modulo a base."""
        divisor = self.constant("base", np.array(base, np.int32))
        if self.opset >= 10:
            return self.node("Mod", [tensor, divisor])
        multiple = self.node("Mul", [self.node("Div", [tensor, divisor]), divisor])
        return self.node("Sub", [tensor, multiple])

    def head(self, tensor: Tensor, size: int) -> Tensor:
        """Returns the first ``size`` elements of a vector."""
        if self.opset < 10:
            return self.node("Slice", [tensor], {"starts": [0], "ends": [size]})
        start, end = (self.constant(name, np.array([at], np.int64)) for name, at in (("start", 0), ("end", size)))
        return self.node("Slice", [tensor, start, end])

    def zero_point(self, zero_point: Array, shape: tuple[int, ...], tile: tuple[int, ...] | None) -> Tensor:
        """Returns the zero points as float32: bytes and a Cast for many, a plain scalar for one."""
        if zero_point.size == 1:
            return self.constant("zero_point", zero_point.astype(np.float32).reshape(()))
        stored = self.constant("zero_point", zero_point.astype(np.uint8).reshape(tiles_along(shape, tile)))
        return self.cast(self.spread(stored, shape, tile), np.float32)

    def factor(self, scale: Array, shape: tuple[int, ...], tile: tuple[int, ...] | None) -> Tensor:
        """Returns scales as float32: halves and a Cast for many that float16 holds exactly."""
        wide = scale.astype(np.float32)
        with np.errstate(over="ignore"):
            half = wide.astype(np.float16)
        exact = wide.size >= _LEAST_HALVES and np.array_equal(half.astype(np.float32), wide)
        return self.cast(self.spread(self.constant("scale", half if exact else wide), shape, tile), np.float32)

    def spread(self, numbers: Tensor, shape: tuple[int, ...], tile: tuple[int, ...] | None) -> Tensor:
        """Returns numbers of tiles such that they broadcast to the shape of the weight: each as often as its tile is long."""
        for axis in spread_axes(shape, tile):
            assert tile is not None
            key = (shape[axis], tile[axis])
            if key not in self.tile_indices:
                index = np.arange(shape[axis]) // tile[axis]
                narrow = np.min_scalar_type(-int(index[-1]))  # signed: what is unsigned are codes
                self.tile_indices[key] = self.cast(self.constant("tiles", index.astype(narrow)), np.int32)
            numbers = self.node("Gather", [numbers, self.tile_indices[key]], {"axis": axis})
        return numbers

    def cast(self, tensor: Tensor, dtype: Any) -> Tensor:
        """Returns a tensor as another type; itself if it is of that."""
        if tensor.dtype == np.dtype(dtype):
            return tensor
        return self.node("Cast", [tensor], {"to": helper.np_dtype_to_tensor_dtype(np.dtype(dtype))}, np.dtype(dtype))

    def constant(self, role: str, values: Array) -> Constant:
        """Adds a constant, named after what it is for."""
        named = role in _NAMED_AFTER_WEIGHT
        constant = Constant(self.names.fresh(f"{self.stem}.{role}" if named else role), values)
        self.fragment.constants.append(constant)
        return constant

    def node(self, op: str, inputs: list[Tensor], attrs: dict[str, Any] | None = None, dtype: Any = None) -> Variable:
        """Adds a node and returns its output, of the type of its first input unless another is given."""
        output = Variable(self.names.fresh(op.lower()), dtype or inputs[0].dtype)
        self.fragment.nodes.append(Node(op, inputs, [output], attrs))
        return output
