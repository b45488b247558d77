"""Which tensors have the same shape in every run, so that one run tells it.

Where all graph inputs have fixed sizes, a shape can vary only with values: behind an op whose output is as long as its data says (NonZero),
behind one whose sizes are an input that was computed from data (Reshape, Slice, Range, ...), and behind bodies. Everything else is what one
run shows it to be, however little shape inference makes of it.
"""

from __future__ import annotations

from onnxshrink.graph.excerpt import reads
from onnxshrink.graph.ir import Constant, Graph, Node, Tensor

__all__ = ["fixed_shapes"]

_BY_DATA = ("Compress", "ImageDecoder", "NonMaxSuppression", "NonZero", "StringSplit", "Unique")
_SIZES = {  # which inputs say how large the output is: ONNX operators page
    "AffineGrid": (1,),
    "BlackmanWindow": (0,),
    "CenterCropPad": (1,),
    "Col2Im": (1, 2),
    "ConstantOfShape": (0,),
    "DFT": (1, 2),
    "Expand": (1,),
    "HammingWindow": (0,),
    "HannWindow": (0,),
    "MaxUnpool": (2,),
    "MelWeightMatrix": (0, 1),
    "OneHot": (1,),
    "Pad": (1, 3),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "STFT": (1, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Unsqueeze": (1,),
    "Upsample": (1,),
}


def fixed_shapes(graph: Graph) -> set[str]:
    """Returns the names of the outputs of nodes that have one and the same shape in every run.

    Args:
        graph: the main graph, its nodes in order; only read.
    """
    given = [tensor for tensor in graph.inputs if not isinstance(tensor, Constant)]
    if any(tensor.shape is None or not all(isinstance(dim, int) for dim in tensor.shape) for tensor in given):
        return set()
    data = {id(tensor) for tensor in given}  # whose values differ from run to run
    loose: set[int] = set()  # whose shapes do
    for node in graph.nodes:
        sources = list(reads(node))
        is_shape = node.is_standard and node.op in ("Shape", "Size")
        if not is_shape and (any(id(tensor) in loose for tensor in sources) or _is_loose(node, data)):
            loose.update(id(tensor) for tensor in node.outputs)
        random = node.op.startswith(("Random", "Bernoulli", "Multinomial"))
        if random or any(id(tensor) in (loose if is_shape else data) for tensor in sources):
            data.update(id(tensor) for tensor in node.outputs)
    return {tensor.name for node in graph.nodes for tensor in node.outputs if tensor.name and id(tensor) not in loose}


def _is_loose(node: Node, data: set[int]) -> bool:
    """Whether the shapes of what a node computes depend on values that differ from run to run."""
    if not node.is_standard or any(True for _ in node.bodies()) or node.op in _BY_DATA or node.op.startswith(("Sequence", "Optional")):
        return True
    sizes: list[Tensor] = [node.inputs[index] for index in _SIZES.get(node.op, ()) if index < len(node.inputs)]
    if node.op.startswith("Reduce"):
        sizes += node.inputs[1:]
    return any(id(tensor) in data for tensor in sizes)
