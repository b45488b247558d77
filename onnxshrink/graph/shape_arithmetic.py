"""What a model computes from the sizes of its tensors: every number of it, and which axes it was read from.

Exporters write ``Reshape(x, Concat(Gather(Shape(x), 0), 128))`` for what PyTorch calls ``x.view(x.shape[0], 128)``. A cut of channels
changes what Shape returns, so whoever cuts must know where each of these numbers comes from and who reads it. Nodes that compute
integers from nothing but sizes and constants are evaluated on arrays of `Number`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import AttributeProto, helper, numpy_helper

from onnxshrink.graph.ir import Constant, Graph, Node, Tensor
from onnxshrink.graph.tensor_shapes import Shapes

__all__ = ["Number", "Sizes", "constant_numbers", "shape_arithmetic"]

Array = np.ndarray[Any, np.dtype[Any]]
Axis = tuple[int, int]
_MAX_ELEMENTS = 64  # of a constant that takes part


@dataclass(frozen=True)
class Number:
    """An integer that a model computes from sizes.

    Attributes:
        value: what it is, None where it depends on an unknown size.
        axis: (id of a tensor, axis) whose size it is, None if it is anything else.
        reads: the axes whose sizes it depends on.
    """

    value: int | None
    axis: Axis | None = None
    reads: frozenset[Axis] = frozenset()


@dataclass(frozen=True, eq=False)
class Sizes:
    """The values of a tensor that is computed from sizes.

    Attributes:
        numbers: objects of `Number`, in the tensor's shape.
        dtype: of the tensor.
    """

    numbers: Array
    dtype: np.dtype[Any]

    @property
    def reads(self) -> frozenset[Axis]:
        """The axes whose sizes any of the numbers depends on."""
        return frozenset().union(*(number.reads for number in self.numbers.reshape(-1)))

    @property
    def values(self) -> Array | None:
        """The values as numbers, None if one is unknown."""
        values = [number.value for number in self.numbers.reshape(-1)]
        return None if None in values else np.array(values, self.dtype).reshape(self.numbers.shape)


def constant_numbers(values: Array) -> Array:
    """Returns an array of `Number` that depend on nothing."""
    numbers = np.empty(values.shape, object)
    numbers.reshape(-1)[:] = [Number(int(value)) for value in values.reshape(-1)]
    return numbers


def shape_arithmetic(graph: Graph, shapes: Shapes) -> dict[int, Sizes]:
    """Returns what is known of each tensor that is computed from sizes and integer constants alone, by the tensor's id."""
    known: dict[int, Sizes] = {}
    for node in graph.nodes:
        rule = _RULES.get(node.op) if node.is_standard else None
        outputs = [tensor for tensor in node.outputs if tensor.name]
        if rule is None or len(outputs) != 1:
            continue
        if node.op in ("Shape", "Size"):
            found = _sizes_read(node, shapes, known)
        else:
            found = _evaluated(node, [_operand(tensor, known) for tensor in node.inputs], rule)
        if found is not None:
            known[id(outputs[0])] = found
    return known


def _sizes_read(node: Node, shapes: Shapes, known: Mapping[int, Sizes]) -> Sizes | None:
    """Returns what Shape or Size gives; how many numbers a tensor computed from sizes has depends on no size."""
    key = id(node.inputs[0])
    dims = known[key].numbers.shape if key in known else shapes.get(key)
    if dims is None:
        return None
    numbers = np.empty(len(dims), object)
    for axis, dim in enumerate(dims):
        value = dim if isinstance(dim, int) else None
        numbers[axis] = Number(value) if key in known else Number(value, (key, axis), frozenset({(key, axis)}))
    if node.op == "Size":
        return Sizes(np.array(_product(numbers), object), np.dtype(np.int64))
    return Sizes(numbers[slice(node.attrs.get("start"), node.attrs.get("end"))], np.dtype(np.int64))


def _operand(tensor: Tensor, known: dict[int, Sizes]) -> Sizes | None:
    if isinstance(tensor, Constant) and tensor.size <= _MAX_ELEMENTS and np.issubdtype(tensor.dtype, np.integer):
        return Sizes(constant_numbers(tensor.values), tensor.dtype)
    return known.get(id(tensor))


def _evaluated(node: Node, operands: list[Sizes | None], rule: Callable[..., Array | None]) -> Sizes | None:
    given = [operand for operand in operands if operand is not None]
    if not given or len(given) != len(operands) or any(type(value) is AttributeProto and value.ints for value in node.attrs.values()):
        return None
    dtype = given[0].dtype
    if node.op == "ConstantOfShape" and isinstance(value := node.attrs.get("value"), AttributeProto):
        dtype = numpy_helper.to_array(value.t).dtype
    if node.op == "Cast":
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(int(node.attrs["to"])))
        if dtype not in (np.int64, np.int32):
            return None
    if node.op in ("Equal", "Where"):
        dtype = np.dtype(np.bool_) if node.op == "Equal" else given[1].dtype
    numbers = rule(node, *(operand.numbers for operand in given))
    return Sizes(np.asarray(numbers, object), dtype) if numbers is not None else None


def _arithmetic(function: Callable[[int, int], int]) -> Callable[[Node, Array, Array], Array]:
    def apply(left: Number, right: Number) -> Number:
        known = left.value is not None and right.value is not None
        value = function(left.value, right.value) if left.value is not None and right.value is not None else None
        assert known or value is None
        return Number(value, None, left.reads | right.reads)

    ufunc = np.frompyfunc(apply, 2, 1)
    return lambda _, left, right: np.asarray(ufunc(left, right), object)


def _is_equal(left: Number, right: Number) -> Number:
    reads = left.reads | right.reads
    if left.value is not None and right.value is not None:
        return Number(int(left.value == right.value), None, reads)
    is_size, other = (left.axis, right.value) if left.axis is not None else (right.axis, left.value)
    if is_size is not None and other is not None and other < 0:
        return Number(0)  # whatever the size is
    return Number(None, None, reads)


def _chosen(condition: Number, left: Number, right: Number) -> Number:
    if condition.value is None:
        return Number(None, None, condition.reads | left.reads | right.reads)
    taken = left if condition.value else right
    return Number(taken.value, None if condition.reads else taken.axis, taken.reads | condition.reads)


def _quotient(left: int, right: int) -> int:
    return int(math.copysign(1, left * right)) * (abs(left) // abs(right)) if right else 0  # ONNX Runtime truncates


def _product(numbers: Array) -> Number:
    values = [number.value for number in numbers.reshape(-1)]
    reads = frozenset().union(*(number.reads for number in numbers.reshape(-1)))
    return Number(None if None in values else math.prod(value for value in values if value is not None), None, reads)


def _plain(numbers: Array) -> list[int] | None:
    """Returns the values of numbers that depend on no size."""
    flat = [number.value for number in numbers.reshape(-1) if number.value is not None and not number.reads]
    return flat if len(flat) == numbers.size else None


def _gather(node: Node, data: Array, indices: Array) -> Array | None:
    places = _plain(indices)
    if places is None:
        return None
    taken = np.take(data, np.array(places, np.intp).reshape(indices.shape), axis=int(node.attrs.get("axis", 0)))
    return np.asarray(taken, object)


def _slice(node: Node, data: Array, *bounds: Array) -> Array | None:
    if bounds:
        given = [_plain(bound) for bound in bounds]
    else:
        given = [node.attrs["starts"], node.attrs["ends"], *([node.attrs["axes"]] if "axes" in node.attrs else [])]
    if any(bound is None or len(bound) != 1 for bound in given):
        return None
    start, end, *rest = (bound[0] for bound in given if bound is not None)
    axis, step = rest[0] % data.ndim if rest else 0, rest[1] if len(rest) > 1 else 1
    return data[(slice(None),) * axis + (slice(start, end, step),)]


def _constant_of_shape(node: Node, shape: Array) -> Array | None:
    dims, value = _plain(shape), node.attrs.get("value")  # where a size says how many, it is a tensor like any other
    if dims is None or math.prod(dims) > _MAX_ELEMENTS or not isinstance(value, AttributeProto):
        return None
    filling = numpy_helper.to_array(value.t)
    return constant_numbers(np.full(dims, filling.reshape(-1)[0])) if filling.dtype in (np.int64, np.int32) else None


def _axes(node: Node, operands: tuple[Array, ...]) -> list[int] | None:
    return _plain(operands[0]) if operands else node.attrs.get("axes")


def _unsqueeze(node: Node, data: Array, *operands: Array) -> Array | None:
    axes = _axes(node, operands)
    return np.expand_dims(data, tuple(axes)) if axes is not None else None


def _squeeze(node: Node, data: Array, *operands: Array) -> Array | None:
    axes = _axes(node, operands)
    return data.squeeze(tuple(axes)) if axes is not None else data.squeeze()


def _reshape(_: Node, data: Array, *operands: Array) -> Array | None:
    shape = _plain(operands[0]) if operands else None
    return data.reshape(shape) if shape is not None and 0 not in shape else None


def _reduce_prod(node: Node, data: Array, *operands: Array) -> Array | None:
    if data.ndim != 1:
        return None
    result = np.array(_product(data), object)
    return result.reshape(1) if node.attrs.get("keepdims", 1) else result


_RULES: dict[str, Callable[..., Array | None]] = {
    "Add": _arithmetic(operator.add),
    "Cast": lambda _, data: data,
    "Concat": lambda node, *parts: np.concatenate(parts, axis=int(node.attrs["axis"])),
    "ConstantOfShape": _constant_of_shape,
    "Div": _arithmetic(_quotient),
    "Equal": lambda _, left, right: np.asarray(np.frompyfunc(_is_equal, 2, 1)(left, right), object),
    "Gather": _gather,
    "Identity": lambda _, data: data,
    "Mul": _arithmetic(operator.mul),
    "ReduceProd": _reduce_prod,
    "Reshape": _reshape,
    "Shape": lambda _, data: data,
    "Size": lambda _, data: data,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Sub": _arithmetic(operator.sub),
    "Transpose": lambda node, data: data.transpose(node.attrs.get("perm")),
    "Unsqueeze": _unsqueeze,
    "Where": lambda _, *operands: np.asarray(np.frompyfunc(_chosen, 3, 1)(*operands), object),
}
