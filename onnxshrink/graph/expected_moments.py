"""What layers meet, up to second moments, guessed from the graph alone: channels whose producers are alike are correlated.

Without calibration data, least squares needs a Gram matrix from somewhere. Here it follows from the weights before a layer:

    from nowhere         independent channels N(0, 1); up to four, colors, are alike with a correlation of 0.9
    Conv, Gemm, ...      cov = sum over taps of W S W^T, values at two taps of a kernel alike with 0.5 ** distance
    BatchNormalization   its own means and spreads, the correlations of what it normalizes
    Relu, Clip, ...      the Hermite series of `onnxshrink.numerics.gaussian_moments`
    Add of two           covariances add; each channel is taken to be correlated with what is added to it by 0.3
    Concat               covariances of the parts, nothing between them
    gates                a channel times one number: its mean
    MaxPool, Resize      as if they were not there

That is less than real inputs tell: of the decibels that least squares gains on a layer with the moments of real inputs, merging removed
channels by these gains about a third. Weights that meet nothing but an assumption have no moments.
"""

from __future__ import annotations

import numpy as np

from onnxshrink.graph.expectations import known_lowering, met_channels
from onnxshrink.graph.expected_layers import as_columns, taps
from onnxshrink.graph.ir import Constant, Graph
from onnxshrink.graph.weights import Use
from onnxshrink.numerics.gram import Gram, frozen

__all__ = ["ExpectedMoments"]

_MOST_COLUMNS = 8192  # half a gigabyte
_WORTH = 3  # positions for each column: with `Gram.shrunk` a ridge of a third of the diagonal; 0.1 and 0.3 did as well, 0.03 and 1 less


class ExpectedMoments:
    """Guessed moments of the inputs of layers of a main graph."""

    def __init__(self, graph: Graph) -> None:
        """Looks at every node once.

        Args:
            graph: the main graph, its nodes in order; not changed.
        """
        self._nodes = list(graph.nodes)  # keeps the ids
        self._met = met_channels(graph, guess=True)

    def gram(self, use: Use) -> Gram | str:
        """Returns the moments of what a weight's columns meet, or why there are none, in one line.

        The count, three positions for each column, says what the guess is worth beside a ridge; the scale of a whole matrix is as
        uncertain as that of the model's inputs, but least squares does not depend on it.

        Args:
            use: of a weight in the graph.
        """
        way = known_lowering(use)
        if isinstance(way, str):
            return way
        node, met = use.node, self._met.get(id(use.node))
        if node is None or met is None:
            return "nothing that its inputs follow from is known"
        if way.columns > _MOST_COLUMNS:
            return f"{way.columns} columns are too many for a guessed Gram matrix"
        scale = float(node.attrs.get("alpha", 1.0)) if node.op == "Gemm" else 1.0
        means = as_columns(scale * met.mean, node, way.groups, way.columns)
        if means is None or not isinstance(node.inputs[1], Constant):
            return f"{len(met.values)} channels do not fit {way.groups} x {way.columns} columns"
        channels = len(met.values) // way.groups
        near = taps(node, channels, way.columns, node.inputs[1].shape[2:] if node.op.startswith("Conv") else ())
        related = scale**2 * met.covariance
        often = near.diagonal()[0]  # how often a tap of a transposed convolution meets an element
        together = np.tile(near > 0, (channels, channels)) / often if often < 1 else 1.0
        blocks = [related[at : at + channels, at : at + channels] for at in range(0, len(related), channels)]
        matrices = [np.kron(block, near) + together * np.outer(mean, mean) for block, mean in zip(blocks, means, strict=True)]
        count = _WORTH * way.columns
        return Gram(frozen(count * np.stack(matrices)), frozen(count * means), count)

