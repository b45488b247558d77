"""Multiply-accumulates of nodes, from the shapes of what they read and compute; formulas follow the ONNX operator specification."""

from __future__ import annotations

import math
from collections.abc import Sequence

from onnxshrink.graph.ir import Constant, Node

__all__ = ["einsum_words", "multiply_accumulates", "multiplying_ops"]

Shape = Sequence[int]
_RECURRENT = ("GRU", "LSTM", "RNN")


def multiplying_ops() -> tuple[str, ...]:
    """Returns the ops whose work is counted."""
    return ("Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul", *_RECURRENT)


def einsum_words(node: Node) -> list[str]:
    """Returns the letters of the axes of each input of an Einsum."""
    return str(node.attrs["equation"]).replace(" ", "").partition("->")[0].split(",")


def multiply_accumulates(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    """Returns how many products of two numbers a node sums, 0 for ops that are no product.

    Args:
        node: of the standard's ops; one of another domain counts nothing.
        inputs: shapes of what it reads. Those of constants are read from the node, and may be missing at the end.
        outputs: shapes of what it computes, of the first at least.
    """
    if not node.is_standard or node.op not in multiplying_ops() or not outputs:
        return 0
    shapes = [
        list(tensor.shape) if isinstance(tensor, Constant) else list(inputs[index]) if index < len(inputs) else []
        for index, tensor in enumerate(node.inputs)
    ]
    if node.op == "Conv":
        return math.prod(outputs[0]) * math.prod(shapes[1][1:])
    if node.op == "ConvTranspose":
        return math.prod(shapes[0]) * math.prod(shapes[1][1:])
    if node.op in _RECURRENT:
        return math.prod(shapes[0][:2]) * (math.prod(shapes[1]) + math.prod(shapes[2]))
    if node.op == "Einsum":
        sizes: dict[str | int, int] = {}
        for word, shape in zip(einsum_words(node), shapes, strict=True):
            before, dots, after = word.partition("...")
            more = range(len(before) + len(after) - len(shape), 0) if dots else ()  # axes of an ellipsis count from the right
            for letter, size in zip([*before, *more, *after], shape, strict=False):
                sizes[letter] = max(sizes.get(letter, 1), size)
        return math.prod(sizes.values())
    if node.op == "Gemm":
        return math.prod(outputs[0]) * shapes[0][0 if node.attrs.get("transA", 0) else 1]
    return math.prod(outputs[0]) * (shapes[0][-1] if shapes[0] else shapes[1][-2 if len(shapes[1]) > 1 else 0])
