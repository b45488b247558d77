"""Functions of one variable that nodes apply to every element, as ONNX defines them, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.special import erf

from onnxshrink.graph.ir import Constant, Node

__all__ = ["FUNCTIONS"]

Array = np.ndarray[Any, np.dtype[Any]]


def _clip(values: Array, node: Node) -> Array | None:
    """Clips; the limits are attributes before opset 11, and inputs since."""
    limits = [float(node.attrs.get("min", -np.inf)), float(node.attrs.get("max", np.inf))]
    for index, tensor in enumerate(node.inputs[1:3]):
        if tensor.name:
            if not isinstance(tensor, Constant):
                return None
            limits[index] = float(tensor.values.reshape(()))
    clipped: Array = np.clip(values, limits[0], limits[1])
    return clipped


def _hard_sigmoid(values: Array, alpha: float, beta: float) -> Array:
    clipped: Array = np.clip(alpha * values + beta, 0.0, 1.0)
    return clipped


def _sigmoid(values: Array) -> Array:
    halves: Array = 0.5 + 0.5 * np.tanh(0.5 * values)
    return halves


def _elu(values: Array, node: Node) -> Array:
    found: Array = np.where(values > 0, values, float(node.attrs.get("alpha", 1.0)) * np.expm1(np.minimum(values, 0.0)))
    return found


def _gelu(values: Array, node: Node) -> Array | None:
    kind = str(node.attrs.get("approximate", "none"))
    inner = erf(values / np.sqrt(2)) if kind == "none" else np.tanh(np.sqrt(2 / np.pi) * (values + 0.044715 * values**3))
    return 0.5 * values * (1 + inner) if kind in ("none", "tanh") else None


FUNCTIONS: dict[str, Callable[[Array, Node], Array | None]] = {
    "Clip": _clip,
    "Elu": _elu,
    "Erf": lambda x, _: erf(x),
    "Gelu": _gelu,
    "HardSigmoid": lambda x, node: _hard_sigmoid(x, float(node.attrs.get("alpha", 0.2)), float(node.attrs.get("beta", 0.5))),
    "HardSwish": lambda x, _: x * _hard_sigmoid(x, 1 / 6, 0.5),
    "LeakyRelu": lambda x, node: np.where(x > 0, x, float(node.attrs.get("alpha", 0.01)) * x),
    "Neg": lambda x, _: -x,
    "Relu": lambda x, _: np.maximum(x, 0.0),
    "Sigmoid": lambda x, _: _sigmoid(x),
    "Softplus": lambda x, _: np.logaddexp(0.0, x),
    "Tanh": lambda x, _: np.tanh(x),
}
"""By op: f(values float64 of any shape, the node) -> values of that shape, or None where an operand is not constant."""
