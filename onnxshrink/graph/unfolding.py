"""The arithmetic behind `onnxshrink.graph.lowering`: from the values of activations to positions, op by op.

Each class is a frozen description of the geometry, and calling it yields chunks [groups, positions, columns]. Descriptions that
are equal unfold equal activations equally. Where a node's output is nothing but the product, and what is added to it, ``outputs``
brings that in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit

from onnxshrink.numerics.patches import padded, patches, spread

__all__ = ["Convolution", "Linear", "Product", "ResetStates", "States", "StepInputs", "Transposed", "Unfold", "Window"]

Array = np.ndarray[Any, np.dtype[Any]]
Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Product:
    """MatMul and Gemm.

    Attributes:
        batch: the dimensions of the weight before the last two; each combination is a group.
        transposed: whether positions are columns of the operand.
        on_left: whether they are columns of the output: the weight stands on the left.
        scale: of the product (Gemm's alpha).
    """

    batch: Sizes
    transposed: bool
    on_left: bool
    scale: float = 1.0

    def __call__(self, operand: Array) -> Iterator[Array]:
        """Yields the rows of the operand, or its columns."""
        if operand.ndim == 1:  # MatMul: a row on the left, a column on the right
            operand = operand[:, None] if self.transposed else operand[None]
        rows = operand.swapaxes(-1, -2) if self.transposed else operand
        if self.scale != 1.0:
            rows = rows * rows.dtype.type(self.scale)
        rank = max(rows.ndim - 2, len(self.batch))
        own = (1,) * (rank - len(self.batch)) + self.batch
        rows = rows.reshape((1,) * (rank + 2 - rows.ndim) + rows.shape)
        grouped = [axis for axis in range(rank) if own[axis] > 1]
        summed = [axis for axis in range(rank) if own[axis] == 1]
        groups, columns = math.prod(self.batch), rows.shape[-1]
        if all(rows.shape[axis] == 1 for axis in grouped):  # all groups meet the same rows
            yield np.broadcast_to(rows.reshape(1, -1, columns), (groups, rows.size // max(columns, 1), columns))
            return
        shape = tuple(max(one, other) if other > 1 else one for one, other in zip(rows.shape, own, strict=False))
        rows = np.broadcast_to(rows, (*shape, *rows.shape[-2:])).transpose(*grouped, *summed, rank, rank + 1)
        yield rows.reshape(groups, -1, columns)

    def outputs(self, output: Array) -> Array:
        """Returns the node's output, or anything of its shape, as [groups, positions, rows / groups]."""
        if output.ndim < len(self.batch) + 2:  # the operand had one axis
            output = output[..., None] if self.on_left else output[..., None, :]
        rows = output.swapaxes(-1, -2) if self.on_left else output
        rank = rows.ndim - 2
        own = (1,) * (rank - len(self.batch)) + self.batch
        order = sorted(range(rank), key=lambda axis: own[axis] == 1)  # those of the groups first
        return rows.transpose(*order, rank, rank + 1).reshape(math.prod(self.batch), -1, rows.shape[-1])


@dataclass(frozen=True)
class Window:
    """The geometry that Conv and ConvTranspose share, as their attributes say it, one number a spatial axis.

    Attributes:
        kernel: its sizes.
        strides: of the window, or between the elements of the spread input.
        dilations: between elements of the kernel.
        pads: all begins, then all ends; heeded where ``auto_pad`` is NOTSET.
        auto_pad: NOTSET, VALID, SAME_UPPER or SAME_LOWER.
        groups: of channels.
    """

    kernel: Sizes
    strides: Sizes
    dilations: Sizes
    pads: Sizes
    auto_pad: str
    groups: int

    @property
    def spans(self) -> Sizes:
        """How far the dilated kernel reaches."""
        return tuple((size - 1) * dilation + 1 for size, dilation in zip(self.kernel, self.dilations, strict=True))

    @property
    def fixed_pads(self) -> tuple[Sizes, Sizes] | None:
        """Begins and ends where they do not depend on sizes."""
        rank = len(self.kernel)
        if self.auto_pad.startswith("SAME"):
            return None
        pads = (0,) * 2 * rank if self.auto_pad == "VALID" else self.pads
        return pads[:rank], pads[rank:]

    def outputs(self, output: Array) -> Array:
        """Returns the node's output [samples, channels, *space], or anything of its shape, as [groups, positions, channels / groups]."""
        samples, channels = output.shape[:2]
        by_group = output.reshape(samples, self.groups, channels // self.groups, -1).transpose(1, 2, 0, 3)
        return by_group.reshape(self.groups, channels // self.groups, -1).swapaxes(1, 2)


@dataclass(frozen=True)
class Convolution:
    """Conv."""

    window: Window

    def __call__(self, images: Array) -> Iterator[Array]:
        """Yields the patches of images [samples, channels, *space]."""
        window = self.window
        begins, ends = window.fixed_pads or self._same_pads(images.shape[2:])
        wide = padded(images, begins, ends)
        return patches(wide, window.kernel, window.strides, window.dilations, window.groups)

    def outputs(self, output: Array) -> Array:
        """Returns what `Window.outputs` does."""
        return self.window.outputs(output)

    def _same_pads(self, space: Sizes) -> tuple[Sizes, Sizes]:
        """Returns the pads with which the output has size / stride elements, rounded up."""
        window = self.window
        needed = [
            max((-(-size // stride) - 1) * stride + span - size, 0)
            for size, stride, span in zip(space, window.strides, window.spans, strict=True)
        ]
        less, more = tuple(total // 2 for total in needed), tuple(total - total // 2 for total in needed)
        return (less, more) if window.auto_pad == "SAME_UPPER" else (more, less)


@dataclass(frozen=True)
class Transposed:
    """ConvTranspose.

    Attributes:
        window: its geometry.
        extra: output_padding, which makes the output longer at its end.
        asked: output_shape of the spatial axes, or empty; pads follow from it.
    """

    window: Window
    extra: Sizes
    asked: Sizes

    def __call__(self, images: Array) -> Iterator[Array]:
        """Yields the patches of images [samples, channels, *space], spread and padded."""
        window = self.window
        wide = spread(images, window.strides)
        begins, outputs = [], []
        for axis, (size, stride, span) in enumerate(zip(images.shape[2:], window.strides, window.spans, strict=True)):
            begin, output = self._begin_and_output(axis, size, stride, (size - 1) * stride + self.extra[axis] + span)
            begins.append(begin)
            outputs.append(output)
        # Output p meets spread inputs p + begin - (span - 1) to p + begin.
        before = tuple(span - 1 - begin for span, begin in zip(window.spans, begins, strict=True))
        after = tuple(
            output + begin - size for output, begin, size in zip(outputs, begins, wide.shape[2:], strict=True)
        )
        ones = (1,) * len(window.kernel)
        return patches(padded(wide, before, after), window.kernel, ones, window.dilations, window.groups, mirrored=True)

    def outputs(self, output: Array) -> Array:
        """Returns what `Window.outputs` does."""
        return self.window.outputs(output)

    def _begin_and_output(self, axis: int, size: int, stride: int, full: int) -> tuple[int, int]:
        """Returns the begin pad and the output's size; ``full`` is its size without pads.

        As ConvTransposeAttributes::ComputeTransposePadAndOutputShape of ONNX Runtime has it.
        """
        fixed = self.window.fixed_pads
        if fixed is not None and not self.asked:
            return fixed[0][axis], full - fixed[0][axis] - fixed[1][axis]
        wanted = self.asked[axis] if self.asked else size * stride
        total = max(full - wanted, 0)
        output = wanted if self.asked else full - total
        return (total // 2 if self.window.auto_pad == "SAME_UPPER" else total - total // 2), output


@dataclass(frozen=True)
class StepInputs:
    """The inputs of LSTM, GRU and RNN, the same for every direction.

    Attributes:
        directions: 1 or 2.
        batch_first: whether the batch axis comes before the steps (layout = 1).
    """

    directions: int
    batch_first: bool

    def __call__(self, inputs: Array, lengths: Array | None = None) -> Iterator[Array]:
        """Yields the steps of inputs [steps, batch, columns]; ``lengths`` is sequence_lens."""
        steps = inputs.swapaxes(0, 1) if self.batch_first else inputs
        rows = steps[_inside(lengths, steps.shape)] if lengths is not None else steps.reshape(-1, steps.shape[-1])
        yield np.broadcast_to(rows, (self.directions, *rows.shape))


@dataclass(frozen=True)
class States:
    """The hidden states before each step of LSTM, GRU and RNN, from those after.

    Attributes:
        directions: 1 or 2.
        reverse: whether a single direction runs backward; of two, the second does.
        batch_first: whether batch axes come first (layout = 1).
        has_lengths: whether sequence_lens is given: steps past a sequence's length are left out.
        has_initial: whether initial_h is given; zeros else.
    """

    directions: int
    reverse: bool
    batch_first: bool
    has_lengths: bool
    has_initial: bool

    def __call__(self, after: Array, *rest: Array) -> Iterator[Array]:
        """Yields the states; arguments as of `before`."""
        states, kept = self.before(after, *rest)
        yield states[:, kept]

    def before(self, after: Array, *rest: Array) -> tuple[Array, Array]:
        """Returns the states [directions, steps, batch, hidden], and which are of a sequence: bool [steps, batch].

        Args:
            after: the node's first output, [steps, directions, batch, hidden] or [batch, steps, directions, hidden].
            rest: sequence_lens and initial_h, where given.
        """
        optional = iter(rest)
        lengths = next(optional) if self.has_lengths else None
        initial = next(optional) if self.has_initial else None
        if self.batch_first:
            after = after.transpose(1, 2, 0, 3)
            initial = initial.swapaxes(0, 1) if initial is not None else None
        steps, _, batch, _ = after.shape
        kept = _inside(lengths, (steps, batch))
        states = np.zeros((self.directions, steps, batch, after.shape[3]), after.dtype)
        for direction in range(self.directions):
            start = initial[direction] if initial is not None else states.dtype.type(0)
            if self.reverse or direction == 1:
                states[direction, :-1] = after[1:, direction]
                last = kept & ~np.vstack([kept[1:], np.zeros((1, batch), bool)])
                states[direction][last] = np.broadcast_to(start, (steps, *after.shape[2:]))[last]
            else:
                states[direction, 1:] = after[:-1, direction]
                states[direction, :1] = start
        return states, kept


@dataclass(frozen=True)
class ResetStates:
    """The hidden states before each step of a GRU that resets them before it multiplies: z and r see h, the third gate r * h.

    Attributes:
        states: where the states come from.
        has_bias: whether B is given.
        clip: bound of what goes into activations, 0 for none.
    """

    states: States
    has_bias: bool
    clip: float

    def __call__(self, after: Array, *rest: Array) -> Iterator[Array]:
        """Yields the states; ``rest`` goes on with the node's X, W, R and, where given, B."""
        rest, weights = rest[: (own := self.states.has_lengths + self.states.has_initial)], rest[own:]
        before, kept = self.states.before(after, *rest)
        inputs, input_weights, recurrent, *bias = weights
        hidden = before.shape[-1]
        gate = slice(hidden, 2 * hidden)
        steps = inputs.swapaxes(0, 1) if self.states.batch_first else inputs
        for_gates = []
        for direction, state in enumerate(before[:, kept]):
            reset = steps[kept] @ input_weights[direction, gate].T + state @ recurrent[direction, gate].T
            if self.has_bias:
                inner, outer = bias[0][direction].reshape(2, 3 * hidden)
                reset = reset + inner[gate] + outer[gate]
            if self.clip:
                reset = np.clip(reset, -self.clip, self.clip)
            for_gates.extend([state, state, expit(reset).astype(state.dtype) * state])
        yield np.stack(for_gates)


Linear = Product | Convolution | Transposed
Unfold = Linear | StepInputs | States | ResetStates


def _inside(lengths: Array | None, shape: Sizes) -> Array:
    """Returns bool [steps, batch]: which steps come before their sequence's end."""
    steps, batch = shape[:2]
    return np.broadcast_to(np.arange(steps)[:, None] < (lengths if lengths is not None else steps), (steps, batch))
