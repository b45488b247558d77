"""Folds a BatchNormalization into the convolution before it.

    y = (W·x + b - mean) · s + B   with   s = scale / sqrt(var + epsilon)
      = (s·W)·x + (b - mean)·s + B

Inference mode only (ONNX, BatchNormalization: training_mode = 0; before opset 14 a single output means inference). The new
weights are computed in float64 and rounded once, so the result differs from the original by float rounding.
"""

from __future__ import annotations

import numpy as np
import onnx

from onnxshrink.graph.edit import NameSource, remove_dead, set_values
from onnxshrink.graph.ir import Constant, Graph, Node
from onnxshrink.graph.storage import is_float
from onnxshrink.graph.views import View, operand_view

__all__ = ["fold_batch_norm", "obstacle_to_folding"]


def obstacle_to_folding(norm: Node, outputs: set[int]) -> str | None:
    """Returns why a BatchNormalization cannot be folded into the node before it, or None when it can.

    Args:
        norm: the BatchNormalization.
        outputs: ids of the tensors that are outputs of any scope.
    """
    data = norm.inputs[0]
    conv = data.inputs[0] if data.inputs else None
    if conv is None or conv.op not in ("Conv", "ConvTranspose") or not conv.is_standard:
        return "no convolution directly before it"
    if any(isinstance(value, onnx.AttributeProto) for value in norm.attrs.values()):
        return "an attribute of it is set where the function is called"
    if norm.attrs.get("training_mode", 0) or sum(bool(tensor.name) for tensor in norm.outputs) > 1:
        return "it runs in training mode"
    if norm.attrs.get("spatial", 1) == 0:
        return "it normalizes each position by itself (spatial = 0)"
    if len(data.outputs) > 1 or id(data) in outputs:
        return "the convolution's output is also read elsewhere"
    parameters = [*norm.inputs[1:], *(tensor for tensor in conv.inputs[1:] if tensor.name)]
    if not all(isinstance(tensor, Constant) and is_float(tensor.dtype) for tensor in parameters):
        return "its parameters, or the convolution's, are computed while the model runs"
    weight = conv.inputs[1]
    if len(weight.outputs) > 1 or id(weight) in outputs:
        return "the convolution's weight is shared"
    if operand_view(View((weight.shape or (),)), conv, 1) is None:  # type: ignore[arg-type]  # a Constant's shape is ints
        return "the convolution's weight has an unexpected shape"
    return None


def fold_batch_norm(scope: Graph, graph: Graph, norm: Node, names: NameSource) -> None:
    """Folds a BatchNormalization that has no obstacle, and removes it."""
    conv = norm.inputs[0].inputs[0]
    weight = conv.inputs[1]
    assert isinstance(weight, Constant)
    scale, shift, mean, variance = (tensor.values.astype(np.float64) for tensor in norm.inputs[1:5] if isinstance(tensor, Constant))
    factor = scale / np.sqrt(variance + float(norm.attrs.get("epsilon", 1e-5)))
    view = operand_view(View((weight.shape,)), conv, 1)
    assert view is not None
    rows = view.forward(weight.values.astype(np.float64)) * factor[:, None]
    set_values(weight, view.inverse(rows).astype(weight.dtype))

    old_bias = conv.inputs[2] if len(conv.inputs) > 2 else None
    before = old_bias.values.astype(np.float64) if isinstance(old_bias, Constant) else 0.0
    bias = Constant(names.fresh(f"{weight.name}.bias"), ((before - mean) * factor + shift).astype(weight.dtype))
    scope.constants.append(bias)
    result, orphans = norm.outputs[0], [*norm.inputs[1:], *([old_bias] if old_bias is not None else [])]
    norm.inputs.clear()
    norm.outputs.clear()
    conv.inputs = [conv.inputs[0], weight, bias]
    conv.outputs = [result]
    scope.nodes = [node for node in scope.nodes if node is not norm]
    remove_dead(graph, [tensor for tensor in orphans if isinstance(tensor, Constant)])
