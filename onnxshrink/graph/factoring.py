"""Which weights can be cut in thin pieces, in which forms, and the cutting: the graph then computes the same, up to the pieces' error.

A weight is cut for all nodes that read it, or for none: as long as one of them needs it whole, it stays in the file. Weights may lie behind
nodes that move or convert elements; pieces are plain constants, and what only led to the weight goes with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxshrink.errors import PassError
from onnxshrink.graph.edit import NameSource, remove_dead
from onnxshrink.graph.factor_forms import Form, Pieces
from onnxshrink.graph.factor_nodes import Cut, insert_pieces
from onnxshrink.graph.factor_sites import Site, factor_site
from onnxshrink.graph.ir import Constant, Graph, Tensor
from onnxshrink.graph.storage import is_float
from onnxshrink.graph.tensor_shapes import Shapes, tensor_shapes
from onnxshrink.graph.weight_values import computed_type, conversions
from onnxshrink.graph.weights import Use, Weight

__all__ = ["forms", "split"]

Array = np.ndarray[Any, np.dtype[Any]]


def forms(graph: Graph, weights: Sequence[Weight], shapes: Shapes | None = None) -> list[tuple[Weight, tuple[Form, ...] | str]]:
    """Returns, for each weight, the forms it can be cut in, or why in none, in one line.

    What a form costs, and whether it ever pays, is up to the caller: see `Form.break_even`.

    Args:
        graph: the main graph.
        weights: some of the model's.
        shapes: of the graph's tensors; inferred by default.
    """
    known = tensor_shapes(graph) if shapes is None else shapes
    nodes = {id(node) for node in graph.nodes}
    return [(weight, _forms(graph, weight, nodes, known)) for weight in weights]


def split(graph: Graph, form: Form, pieces: Pieces, names: NameSource | None = None) -> Cut:
    """Puts pieces in a weight's place, in every node that reads it.

    The node itself becomes the last one of the new ones, so that it keeps its name, its output and its bias.

    Args:
        graph: the main graph.
        form: of one of its weights, as `forms` found it.
        pieces: of the shapes that the form has at some ranks; stored in the form's dtype.
        names: of the graph; made anew by default, which takes a look at the whole graph.

    Returns:
        The constants that hold the pieces, and the nodes that read them.

    Raises:
        PassError: the graph has changed since and no longer reads the weight so, or adds something computed; the pieces have other
            shapes, or values that are not finite in that dtype.
    """
    weight = form.weight
    nodes = {id(node) for node in graph.nodes}
    for use in weight.uses:
        if not _reads(use, weight.constant, nodes):
            raise PassError(f"low-rank: '{weight.site}' is no longer read by {use.op} as it was when its forms were found")
        if form.kind == "interpolative" and not _has_known_bias(use):
            raise PassError(f"low-rank: what {use.op} adds is not known as it was when the forms of '{weight.site}' were found")
    stored = _stored(form, pieces)
    old = {id(tensor): tensor for use in weight.uses if use.node is not None for tensor in use.node.inputs}
    cut = insert_pieces(graph, form, stored, names or NameSource(graph))
    remove_dead(graph, [item for tensor in old.values() for item in ([tensor] if isinstance(tensor, Constant) else tensor.inputs)])
    return cut


def _forms(graph: Graph, weight: Weight, nodes: set[int], shapes: Shapes) -> tuple[Form, ...] | str:
    obstacle = _obstacle(graph, weight, nodes)
    if obstacle is not None:
        return obstacle
    sites: list[Site] = []
    for use in weight.uses:
        site = factor_site(graph, use, shapes)
        if isinstance(site, str):
            return site
        sites.append(site)
    geometry = sites[0].geometry
    if weight.view is None or any(site.geometry != geometry for site in sites):
        return "nodes that share it read it as different matrices"
    dtype = _dtype(weight)
    if isinstance(dtype, str):
        return dtype
    found = []
    for kind in sites[0].runs:
        if all(kind in site.runs for site in sites):
            runs = zip(*(site.runs[kind] for site in sites), strict=True)
            found.append(Form(kind, weight, geometry, dtype, tuple(sum(run) / len(sites) for run in runs)))
    return tuple(found) or "nodes that share it have no form in common"


def _obstacle(graph: Graph, weight: Weight, nodes: set[int]) -> str | None:
    """Returns what about the uses of a weight, not their ops, is in the way."""
    if weight.scope.graph is not graph:
        return "it is stored in a body or a function"
    if not weight.uses:
        return "is not used"
    for use in weight.uses:
        if use.node is None:
            return "is a graph output"
        if id(use.node) not in nodes:
            return f"{use.op} '{use.node.site}' reads it inside of a body or a function"
        if not use.is_operand:
            return f"is read as input {use.operand} of {use.op} '{use.node.site}', which is no weight operand"
    return None


def _dtype(weight: Weight) -> np.dtype[Any] | str:
    """Returns the dtype that all nodes read a weight in, or why there is none."""
    dtype = computed_type(weight, weight.uses[0])
    if isinstance(dtype, str):
        return dtype
    if any(conversions(use) != conversions(weight.uses[0]) for use in weight.uses):
        return "nodes that share it read it in different types or scales"
    return dtype if is_float(dtype) else f"is read as {dtype} values, not floating point"


def _has_known_bias(use: Use) -> bool:
    """Whether what a node adds, if anything, is stored."""
    bias = use.node.inputs[2] if use.node is not None and len(use.node.inputs) > 2 else None
    return bias is None or not bias.name or isinstance(bias, Constant)


def _reads(use: Use, constant: Constant, nodes: set[int]) -> bool:
    """Whether a node is still there and reads a constant through the nodes that lay between when the use was found."""
    node = use.node
    if node is None or id(node) not in nodes or use.operand >= len(node.inputs):
        return False
    tensor: Tensor = node.inputs[use.operand]
    for mover in reversed(use.path):
        if not mover.inputs or not any(output is tensor for output in mover.outputs):
            return False
        tensor = mover.inputs[0]
    return tensor is constant


def _stored(form: Form, pieces: Pieces) -> Pieces:
    """Returns pieces in the form's dtype, checked."""
    if not form.fits(pieces):
        shapes = tuple(piece.shape for piece in pieces)
        raise PassError(f"low-rank: pieces of '{form.weight.site}' must be of the form's shapes at some ranks, got {shapes}")
    with np.errstate(over="ignore"):  # looked at next
        stored = tuple(piece.astype(form.dtype, copy=False) for piece in pieces)
    if not all(np.isfinite(piece.astype(np.float64, copy=False)).all() for piece in stored):
        raise PassError(f"low-rank: pieces of '{form.weight.site}' must be finite as {form.dtype}, got an infinity or a NaN")
    return stored
