"""What a rule of `onnxshrink.graph.channel_rules` sees of a node: its tensors' axes, and what will remain of them after a cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnxshrink.graph.ir import Constant, Node, Tensor
from onnxshrink.graph.positions import Ids, Positions, Reason
from onnxshrink.graph.shape_arithmetic import Sizes, constant_numbers
from onnxshrink.graph.tensor_shapes import Dims

__all__ = ["CONSUMES", "PRODUCES", "Edit", "Kept", "Rule", "Site"]

Array = np.ndarray[Any, np.dtype[Any]]
PRODUCES, CONSUMES = "produces", "consumes"


@dataclass(frozen=True, eq=False)
class Site:
    """A node of the main graph, for rules.

    Attributes:
        node: it.
        opset: the model's.
        positions: the relation that the rule adds to.
        sizes: what is computed from sizes, by tensor id.
        roles: by (tensor id, axis): whether a weight computes channels along it, or sums over it. Rules add to it.
        resliced: where sums and means over channels are taken, with the positions. Rules add to it.
        said: the axes, by (tensor id, axis), of which the rule said something.
        fixed: ids of the constants by whose values rules go.
    """

    node: Node
    opset: int
    positions: Positions
    sizes: Mapping[int, Sizes]
    roles: dict[tuple[int, int], str] = field(default_factory=dict)
    resliced: list[tuple[Ids, str]] = field(default_factory=list)
    said: set[tuple[int, int]] = field(default_factory=set)
    fixed: set[int] = field(default_factory=set)

    def has(self, operand: int) -> bool:
        """Whether an optional input is given."""
        return operand < len(self.node.inputs) and bool(self.node.inputs[operand].name)

    def dims(self, tensor: Tensor) -> Dims:
        """Returns the dimensions of a tensor of known rank."""
        dims = self.positions.dims(tensor)
        assert dims is not None
        return dims

    def rank(self, tensor: Tensor) -> int:
        """Returns the number of axes."""
        return len(self.dims(tensor))

    def axis(self, name: str, default: int, rank: int) -> int:
        """Returns an attribute that names an axis, counted from the front."""
        axis = int(self.node.attrs.get(name, default))
        return axis + rank if axis < 0 else axis

    def ids(self, tensor: Tensor, axis: int) -> Ids | None:
        """Returns the positions along an axis, None if its size is unknown; whoever asks for them has something to say of it."""
        axis %= max(self.rank(tensor), 1)
        self.said.add((id(tensor), axis))
        return self.positions.ids(tensor, axis)

    def free(self, tensor: Tensor, axis: int) -> None:
        """Says that an axis of an input may be cut on its own: the op sums over it, or does not look at what lies there."""
        self.said.add((id(tensor), axis % max(self.rank(tensor), 1)))

    def pin_unsaid(self) -> None:
        """Pins the axes of inputs of which nothing was said."""
        for tensor in self.node.inputs:
            for axis, size in enumerate(self.positions.dims(tensor) or () if tensor.name else ()):
                if size != 1 and (id(tensor), axis) not in self.said:
                    self.pin(tensor, axis, f"{self.node.op} may need all of it")

    def same(self, left: Tensor, left_axis: int, right: Tensor, right_axis: int) -> None:
        """Says that two axes have the same channels in the same order."""
        one, other = self.ids(left, left_axis), self.ids(right, right_axis)
        if one is not None and other is not None and len(one) == len(other):
            self.positions.tie(one, other)
        else:
            self._pin_both(left, left_axis, right, right_axis)

    def map(self, left: Tensor, left_axis: int, right: Tensor, right_axis: int, left_places: Array, right_places: Array) -> None:
        """Says that some positions of two axes are the same channels, or pins both axes where a size is unknown."""
        one, other = self.ids(left, left_axis), self.ids(right, right_axis)
        if one is not None and other is not None:
            self.positions.tie(one[left_places], other[right_places])
        else:
            self._pin_both(left, left_axis, right, right_axis)

    def _pin_both(self, left: Tensor, left_axis: int, right: Tensor, right_axis: int) -> None:
        differ = self.ids(left, left_axis) is not None and self.ids(right, right_axis) is not None
        self.pin(left, left_axis, "goes with an axis of another size" if differ else "an axis of unknown size follows from it")
        self.pin(right, right_axis, "goes with an axis of another size" if differ else "it follows from an axis of unknown size")

    def broadcast(self, operands: Sequence[Tensor], result: Tensor, skip: int = 0) -> None:
        """Says that axes, aligned from the last one on, are the same; an axis of size 1 is repeated and follows none.

        Args:
            operands: what broadcasts.
            result: what it broadcasts to.
            skip: how many of the last axes are something else.
        """
        for tensor in operands:
            for back in range(1 + skip, min(self.rank(tensor), self.rank(result)) + 1):
                if self.dims(tensor)[-back] != 1 or self.dims(result)[-back] == 1:
                    self.same(tensor, -back, result, -back)

    def unify(self, ids: Ids | None, modulus: int) -> None:
        """Says that positions with the same remainder go together."""
        if ids is not None:
            self.positions.tie(ids, ids[np.arange(len(ids)) % modulus])

    def pin(self, tensor: Tensor, axis: int, text: str) -> None:
        """Says that an axis must stay as it is."""
        self.positions.pin(self.ids(tensor, axis), Reason(self.node.site or self.node.op, text))

    def pin_all(self, tensor: Tensor, text: str, axes: range | None = None) -> None:
        """Says that all axes of a tensor must stay, or those of a range."""
        for axis in axes if axes is not None else range(len(self.positions.dims(tensor) or ())):
            self.pin(tensor, axis, text)

    def barrier(self, text: str) -> None:
        """Says that nothing the node reads or computes can be cut."""
        for tensor in (*self.node.inputs, *self.node.outputs):
            if tensor.name:
                self.pin_all(tensor, text)
            if id(tensor) in self.sizes:
                self.pin_reads(self.sizes[id(tensor)].reads, f"its size is read: {text}")

    def role(self, operand: int, axis: int, role: str) -> None:
        """Says what a weight does along an axis: `PRODUCES` channels, or `CONSUMES` them."""
        tensor = self.node.inputs[operand]
        self.roles[id(tensor), axis % self.rank(tensor)] = role

    def statistic(self, tensor: Tensor, axis: int) -> None:
        """Says that a sum or mean is taken along an axis: after a cut it is that of what is left."""
        ids = self.ids(tensor, axis)
        if ids is not None:
            self.resliced.append((ids, self.node.site))

    def values(self, operand: int) -> Array | None:
        """Returns the values of a constant input, None for any other; what is found holds only while they stay the same."""
        tensor = self.node.inputs[operand]
        if not isinstance(tensor, Constant):
            return None
        self.fixed.add(id(tensor))
        return tensor.values

    def numbers(self, operand: int) -> Array | None:
        """Returns `Number` objects for an input that is constant or computed from sizes, None for any other."""
        tensor = self.node.inputs[operand]
        values = self.values(operand)
        if values is not None:
            self.pin_all(tensor, f"{self.node.op} goes by its values")
            return constant_numbers(values)
        return self.sizes[id(tensor)].numbers if id(tensor) in self.sizes else None

    def integers(self, operand: int, attribute: str = "") -> list[int] | None:
        """Returns the known values of an input, or of the attribute that it was in older opsets; None if there are none."""
        if attribute and attribute in self.node.attrs:
            return [int(value) for value in self.node.attrs[attribute]]
        numbers = self.numbers(operand) if self.has(operand) else None
        values = [number.value for number in numbers.reshape(-1)] if numbers is not None else [None]
        return None if None in values else [value for value in values if value is not None]

    def reads(self, operand: int) -> frozenset[tuple[int, int]]:
        """Returns the axes whose sizes an input is computed from, by (tensor id, axis)."""
        sizes = self.sizes.get(id(self.node.inputs[operand])) if self.has(operand) else None
        return sizes.reads if sizes is not None else frozenset()

    def dtype(self, operand: int) -> np.dtype[Any]:
        """Returns the element type of an input that is constant or computed from sizes."""
        tensor = self.node.inputs[operand]
        return tensor.dtype if isinstance(tensor, Constant) else self.sizes[id(tensor)].dtype

    def pin_reads(self, reads: frozenset[tuple[int, int]], text: str) -> None:
        """Pins axes by (tensor id, axis)."""
        for axis in sorted(reads, key=self.positions.order):
            self.positions.pin(self.positions.at(axis), Reason(self.node.site, text))


@dataclass(frozen=True, eq=False)
class Kept:
    """What remains of every axis after a cut.

    Attributes:
        positions: the relation.
        mask: by position, whether it stays: [positions].
    """

    positions: Positions
    mask: Array

    def along(self, tensor: Tensor, axis: int) -> Array | None:
        """Returns which positions of an axis stay: bool [size], None if the size is unknown."""
        return self.at((id(tensor), axis))

    def at(self, axis: tuple[int, int]) -> Array | None:
        """Returns the same of an axis given by (tensor id, axis)."""
        ids = self.positions.at(axis)
        return self.mask[ids] if ids is not None else None

    def values(self, tensor: Tensor, values: Array) -> Array:
        """Returns what remains of an array in the shape that a tensor had before the cut."""
        for axis in range(values.ndim):
            along = self.along(tensor, axis)
            if along is not None and not along.all():
                values = np.compress(along, values, axis=axis)
        return values

    def size(self, tensor: Tensor, axis: int) -> int | None:
        """Returns the new size of an axis, None if it is unknown."""
        along = self.along(tensor, axis)
        return int(along.sum()) if along is not None else None

    def changes(self, tensor: Tensor, axis: int) -> bool:
        """Whether an axis loses positions."""
        along = self.along(tensor, axis)
        return along is not None and not bool(along.all())


@dataclass(frozen=True)
class Edit:
    """A change to a node that a cut brings with it.

    Attributes:
        attribute: which one gets the value, or
        operand: which input becomes a constant of that value; neither for an attribute that goes (value None).
        value: an attribute's value, or an array.
    """

    value: Any
    attribute: str = ""
    operand: int = -1


@dataclass(frozen=True)
class Rule:
    """How an op passes channels on.

    Attributes:
        relate: adds ties and pins to ``site.positions``. An axis of an output of which it says nothing may be cut on its own; one of
            an input stays, unless it is said to be free.
        rewrite: yields the attributes and the shape-like inputs that change with a cut; weights and biases need no mention: constants
            lose what their axes lose.
        shape_operands: inputs of which ``rewrite`` sees to it that they say the new sizes, where they are computed from sizes; what
            another input holds is kept as it was before the cut.
    """

    relate: Callable[[Site], None]
    rewrite: Callable[[Site, Kept], Iterator[Edit]] | None = None
    shape_operands: tuple[int, ...] = ()
