"""What layers with constant weights make of what is expected of their inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from onnxshrink.graph.expected_values import Certainty, Channels
from onnxshrink.graph.ir import Constant, Node
from onnxshrink.graph.storage import is_float
from onnxshrink.graph.views import View, operand_view
from onnxshrink.numerics.gaussian_moments import QUANTILES, nearness, parted, sum_covariance, sum_variance

__all__ = ["LAYERS", "as_columns", "expected_result", "fits", "taps"]

Array = np.ndarray[Any, np.dtype[Any]]
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_MOST_CHANNELS = 4096  # beyond, correlations take more memory than they are worth
_MOST_WORK = 2e11  # multiplications for the correlations of one layer's outputs: some seconds
_COLORS, _COLORS_ALIKE = 4, 0.9  # so few channels from nowhere are colors of a picture, which are much the same


def fits(node: Node, met: Channels) -> bool:
    """Whether the channels that a layer meets lie along the axis that it sums over."""
    if node.op == "Gemm":
        return not node.attrs.get("transA", 0) and not met.last
    if node.op == "MatMul":
        return met.flat or met.last or len(getattr(node.inputs[0], "shape", None) or ()) == 2
    return not met.flat and not met.last


def as_columns(each: Array, node: Node, groups: int, columns: int) -> Array | None:
    """Returns the means of what the columns of a layer's weight meet, [groups, columns], or None if the channels do not fit.

    Args:
        each: float64 [channels], the means of the layer's input.
        node: the layer.
        groups: of its weight.
        columns: of its weight's matrix.
    """
    if not each.size or each.size % groups or columns * groups % each.size:
        return None
    times = columns * groups // each.size  # positions of a kernel, or of an image that was flattened
    repeated: Array = np.repeat(each.reshape(groups, -1), times, axis=1)
    if node.op == "ConvTranspose":  # zeros between the elements: each position of the kernel meets one of so many
        repeated = repeated / float(np.prod(node.attrs.get("strides") or [1]))
    return repeated


def taps(node: Node, channels: int, columns: int, kernel: tuple[int, ...]) -> Array:
    """Returns how much alike the columns of one channel are, float64 [columns / channels] squared.

    Args:
        node: the layer.
        channels: of one group of its weight.
        columns: of its weight's matrix.
        kernel: the sizes of its kernel, () for a product of matrices, whose columns then are the positions of an image, row by row.
    """
    if node.op in ("Conv", "ConvTranspose"):
        ones = [1] * len(kernel)
        strides = node.attrs.get("strides") or ones
        return nearness(kernel, node.attrs.get("dilations") or ones, strides if node.op == "ConvTranspose" else None)
    times = columns // max(channels, 1)
    side = round(times**0.5)
    return nearness((side, side), (1, 1)) if side * side == times else nearness((times,), (1,))


def expected_result(node: Node, met: Channels | None, guess: bool) -> Channels | None:
    """Returns what a layer with constant weight and bias computes, or None where that does not follow.

    Args:
        node: the layer, one of `LAYERS`.
        met: what its input holds; where that is not known, and guesses are wanted, independent standard normal channels are assumed.
        guess: whether spreads and correlations are wanted that follow from the weights alone.
    """
    weight, *rest = node.inputs[1:]
    bias = next((tensor for tensor in rest if tensor.name), None)
    plain = node.attrs.get("alpha", 1.0) == 1.0 == node.attrs.get("beta", 1.0)
    if not plain or not isinstance(weight, Constant) or not is_float(weight.dtype) or (bias is not None and not isinstance(bias, Constant)):
        return None
    view = operand_view(View((weight.shape,)), node, 1)
    if view is None or (weight.shape[2:] != () and node.op not in ("Conv", "ConvTranspose")):
        return None
    groups = int(node.attrs.get("group", 1))
    if met is not None and not fits(node, met):
        met = None
    if met is None and guess and not node.attrs.get("transA", 0):
        met = _from_nowhere(node, weight.shape, groups)
    columns = as_columns(met.mean, node, groups, view.shape[1]) if met is not None else None
    if met is None or columns is None:
        return None
    rows = view.forward(weight.values).astype(np.float64)
    means = np.concatenate([part @ mean for part, mean in zip(np.split(rows, groups), columns, strict=True)])
    if isinstance(bias, Constant):
        if bias.size != means.size or bias.shape[-1:] != (means.size,):
            return None
        means = means + bias.values.astype(np.float64).reshape(-1)
    if not np.isfinite(means).all():
        return None
    certainty = min(met.certainty, Certainty.MEANS)
    values, related = np.repeat(means[:, None], len(QUANTILES), axis=1), None
    if guess:
        near = taps(node, len(met.values) // groups, view.shape[1], weight.shape[2:] if node.op.startswith("Conv") else ())
        spread, related = _spread(rows, met, groups, near)
        values = values + spread[:, None] * QUANTILES
        if not np.isfinite(values).all():
            return None
    one = met.pooled and all(side == 1 for side in weight.shape[2:])
    product = node.op in ("Gemm", "MatMul")
    return Channels(values, node, certainty, related, pooled=one, flat=product and not met.last, last=product and met.last)


def _from_nowhere(node: Node, shape: tuple[int, ...], groups: int) -> Channels:
    """Returns what is assumed of the input of a layer of which nothing is known."""
    channels = shape[1] * groups if node.op == "Conv" else shape[1 if node.op == "Gemm" and node.attrs.get("transB", 0) else 0]
    values = np.repeat(QUANTILES[None], channels, axis=0)
    found = Channels(values, node, Certainty.GUESS)
    if node.op in ("Gemm", "MatMul"):
        two = node.op == "Gemm" or len(getattr(node.inputs[0], "shape", None) or ()) == 2
        return replace(found, flat=two, last=not two)
    if channels > _COLORS:
        return found
    related = np.full((channels, channels), _COLORS_ALIKE, np.float32)
    np.fill_diagonal(related, 1.0)
    return replace(found, related=related)


def _spread(rows: Array, met: Channels, groups: int, near: Array) -> tuple[Array, Array | None]:
    """Returns (standard deviations [rows], their correlations, or None where those would take too long)."""
    outputs, inputs = len(rows), len(met.values)
    depthwise = groups == outputs == inputs
    work = len(near) * (outputs**2 if depthwise else outputs * inputs * (outputs + inputs))
    if max(outputs, inputs) > _MOST_CHANNELS or work > _MOST_WORK:
        return np.sqrt(sum_variance(rows, met.variance, groups, near)), None
    return parted(sum_covariance(rows, met.covariance, groups, near))
