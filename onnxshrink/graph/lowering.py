"""What a node multiplies a weight with: rows of a matrix, cut from activations in the order of the weight's columns.

The view of a weight operand is a matrix W [rows, columns]; its rows fall into equal groups, neighbors together, and for every
group g the node computes

    Y_g = W_g X_g^T        W_g [rows / groups, columns], X_g [positions, columns]

    op                      groups                      x, one position
    MatMul, Gemm            product of W's batch dims   a row of the left operand, or a column of the right one
    Conv                    group                       the patch that the kernel meets
    ConvTranspose           group                       the patch of the input with zeros between its elements
    LSTM, GRU, RNN: W       directions                  the input of a step
    LSTM, GRU, RNN: R       directions                  the hidden state before a step
    GRU: R                  3 directions                that, for the third gate times the reset gate (linear_before_reset = 0)

Y is the node's output before its bias, its elements rearranged; shapes and attributes follow the ONNX operator specification,
paddings ONNX Runtime where the specification is silent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxshrink.errors import must
from onnxshrink.graph.ir import Graph, Node, Tensor
from onnxshrink.graph.unfolding import (
    Convolution,
    Linear,
    Product,
    ResetStates,
    States,
    StepInputs,
    Transposed,
    Unfold,
    Window,
)
from onnxshrink.graph.views import COMPUTE_OPS, View
from onnxshrink.graph.weights import Use, Weight

__all__ = ["Lowering", "Source", "lowering", "lowerings"]

Array = np.ndarray[Any, np.dtype[Any]]
Source = Tensor | Node


@dataclass(frozen=True)
class Lowering:
    """How activations become the positions that a weight operand is multiplied with.

    Lowerings that are equal give the same positions, so weights that have equal ones can share what is computed from them.

    Attributes:
        sources: what to ask for: tensors of the main graph, and nodes for their first output, which the model may not name.
        groups: of rows of the weight's matrix.
        columns: of the weight's matrix.
        unfold: makes positions from the values of the sources.
    """

    sources: tuple[Source, ...]
    groups: int
    columns: int
    unfold: Unfold

    def matches(self, other: Lowering) -> bool:
        """Whether both make the same positions from equal values of their sources."""
        return (self.groups, self.columns, self.unfold) == (other.groups, other.columns, other.unfold)

    def chunks(self, values: Mapping[Source, Array]) -> Iterator[Array]:
        """Yields the positions [groups, positions, columns] of one run, in chunks of any layout and of the activations' dtype.

        Args:
            values: of the sources at least.
        """
        return self.unfold(*(values[source] for source in self.sources))

    @property
    def is_linear(self) -> bool:
        """Whether the node's output is the product, rearranged, and what is added to it; gates of LSTM, GRU and RNN are in between."""
        return isinstance(self.unfold, Linear)

    def outputs(self, output: Array) -> Array:
        """Returns an array of the shape of the node's output as [groups, positions, rows / groups], in the order of `chunks`.

        Raises:
            TypeError: the lowering is not linear.
        """
        if not isinstance(self.unfold, Linear):
            raise TypeError(must("lowering", "unfold", "linear", type(self.unfold).__name__))
        return self.unfold.outputs(output)


def lowerings(graph: Graph, weights: Sequence[Weight]) -> list[tuple[Weight, tuple[Lowering, ...] | str]]:
    """Returns, for each weight, the lowerings of all nodes that multiply with it, or why there are none.

    Uses that look rows up (Gather) have none and do not stand in the way.

    Args:
        graph: the main graph.
        weights: some of its weights.
    """
    nodes = {id(node) for node in graph.nodes}
    return [(weight, _of_weight(weight, nodes)) for weight in weights]


def lowering(use: Use) -> Lowering | str:
    """Returns how the input of a node of the main graph meets a weight, or why it cannot be said, in one line."""
    if use.node is None or not use.is_operand:
        return f"read as input {use.operand} of {use.op}, which is no weight operand"
    if use.view is None:
        return f"rearranged in an unknown way before {use.op} '{use.node.site}'"
    rule = _RULES.get((use.op, use.operand))
    if rule is None:
        return f"{use.op} does not multiply with it in a known order"
    return rule(use.node, use.view)


def _of_weight(weight: Weight, nodes: set[int]) -> tuple[Lowering, ...] | str:
    uses = [use for use in weight.uses if use.is_operand and use.op in COMPUTE_OPS]
    if not uses:
        return "no node multiplies with it"
    if any(id(use.node) not in nodes for use in uses):
        return "weights inside bodies have no calibration activations"
    if any(use.view != uses[0].view for use in uses):
        return "nodes that share it read it as different matrices"
    found: list[Lowering] = []
    for use in uses:
        one = lowering(use)
        if isinstance(one, str):
            return one
        found.append(one)
    if any(one.groups != found[0].groups for one in found):
        return "nodes that share it have different groups"
    return tuple(found)


def _product(node: Node, view: View, operand: int, transposed: bool, batch: tuple[int, ...]) -> Lowering:
    """Lowers MatMul and Gemm; ``transposed`` says that positions are columns of the other operand."""
    scale = float(node.attrs.get("alpha", 1.0)) if node.op == "Gemm" else 1.0
    unfold = Product(batch, transposed, operand == 0, scale)
    return Lowering((node.inputs[1 - operand],), math.prod(batch), view.shape[1], unfold)


def _matmul_left(node: Node, view: View) -> Lowering:
    return _product(node, view, 0, True, view.shapes[-2][:-2])


def _matmul_right(node: Node, view: View) -> Lowering:
    return _product(node, view, 1, False, view.shapes[-3][:-2])


def _gemm_left(node: Node, view: View) -> Lowering:
    return _product(node, view, 0, not node.attrs.get("transB", 0), ())


def _gemm_right(node: Node, view: View) -> Lowering:
    return _product(node, view, 1, bool(node.attrs.get("transA", 0)), ())


def _conv(node: Node, view: View) -> Lowering | str:
    shape = view.shapes[-2]
    window = _window(node, shape[2:])
    return Lowering((node.inputs[0],), window.groups, view.shape[1], Convolution(window))


def _conv_transpose(node: Node, view: View) -> Lowering | str:
    shape = view.shapes[-4]
    rank = len(shape) - 2
    extra = tuple(node.attrs.get("output_padding") or [0] * rank)
    asked = tuple(node.attrs.get("output_shape") or ())[-rank:]  # some exporters count samples and channels too
    window = _window(node, shape[2:])
    return Lowering((node.inputs[0],), window.groups, view.shape[1], Transposed(window, extra, asked))


def _window(node: Node, kernel: tuple[int, ...]) -> Window:
    attrs, rank = node.attrs, len(kernel)
    return Window(
        kernel,
        tuple(attrs.get("strides") or [1] * rank),
        tuple(attrs.get("dilations") or [1] * rank),
        tuple(attrs.get("pads") or [0] * 2 * rank),
        str(attrs.get("auto_pad") or "NOTSET"),
        int(attrs.get("group", 1)),
    )


def _recurrent_input(node: Node, view: View) -> Lowering | str:
    unfold = StepInputs(_directions(view), bool(node.attrs.get("layout", 0)))
    return Lowering((node.inputs[0], *_given(node, 4)), unfold.directions, view.shape[1], unfold)


def _hidden(node: Node, view: View) -> Lowering | str:
    unfold = _states(node, view)
    return Lowering((node, *_given(node, 4), *_given(node, 5)), unfold.directions, view.shape[1], unfold)


def _gru_hidden(node: Node, view: View) -> Lowering | str:
    if node.attrs.get("linear_before_reset", 0):  # the reset gate comes after the product
        return _hidden(node, view)
    kinds = node.attrs.get("activations") or ["Sigmoid", "Tanh"]
    if any(str(kind).lower() != "sigmoid" for kind in kinds[::2]):
        return f"the reset gate of GRU '{node.site}' has another activation than Sigmoid"
    states = _states(node, view)
    unfold = ResetStates(states, bool(_given(node, 3)), float(node.attrs.get("clip") or 0.0))
    sources = (node, *_given(node, 4), *_given(node, 5), *node.inputs[:3], *_given(node, 3))
    return Lowering(sources, 3 * states.directions, view.shape[1], unfold)


def _states(node: Node, view: View) -> States:
    reverse = str(node.attrs.get("direction", "forward")) == "reverse"
    batch_first = bool(node.attrs.get("layout", 0))
    return States(_directions(view), reverse, batch_first, bool(_given(node, 4)), bool(_given(node, 5)))


def _directions(view: View) -> int:
    return view.shapes[-2][0]


def _given(node: Node, index: int) -> tuple[Tensor, ...]:
    """Returns an optional input, or nothing."""
    return tuple(tensor for tensor in node.inputs[index : index + 1] if tensor.name)


_RULES: dict[tuple[str, int], Callable[[Node, View], Lowering | str]] = {
    ("Conv", 1): _conv,
    ("ConvTranspose", 1): _conv_transpose,
    ("Gemm", 0): _gemm_left,
    ("Gemm", 1): _gemm_right,
    ("MatMul", 0): _matmul_left,
    ("MatMul", 1): _matmul_right,
    **{(op, 1): _recurrent_input for op in ("GRU", "LSTM", "RNN")},
    **{(op, 2): _hidden for op in ("LSTM", "RNN")},
    ("GRU", 2): _gru_hidden,
}
