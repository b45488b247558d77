"""Channel rules of ops that multiply with weights: convolutions, matrix products, recurrent layers. Shapes as the ONNX operators page.

What a layer sums over may be cut without a trace in its output's shape; what it computes is cut in weight, bias and output alike.
A convolution in groups must keep groups of equal size: the same places go in every group, or, where groups have one input or
one output channel each, whole groups go and ``group`` shrinks.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnxshrink.graph.channel_sites import CONSUMES, PRODUCES, Edit, Kept, Rule, Site
from onnxshrink.graph.ir import Tensor

__all__ = ["RULES"]

_SPACE = "a spatial axis"


def _groups(site: Site) -> int:
    return int(site.node.attrs.get("group", 1))


def _conv(site: Site) -> None:
    """X [N, I, *], W [O, I/g, *k] (ConvTranspose: W [I, O/g, *k]), B [O] -> [N, O, *]."""
    (x, w), y, groups = site.node.inputs[:2], site.node.outputs[0], _groups(site)
    site.same(x, 0, y, 0)
    for tensor in (x, w, y):
        site.pin_all(tensor, _SPACE, range(2, site.rank(tensor)))
    if site.has(2):
        site.same(site.node.inputs[2], 0, y, 1)
    inputs, outputs = site.ids(x, 1), site.ids(y, 1)
    if inputs is None or outputs is None or site.ids(w, 0) is None or site.ids(w, 1) is None:
        site.barrier("the number of channels is unknown")
    else:
        whole, part = (inputs, outputs) if site.node.op == "ConvTranspose" else (outputs, inputs)
        _conv_channels(site, whole, part, groups)


def _conv_channels(site: Site, whole: np.ndarray, part: np.ndarray, groups: int) -> None:
    """Relates the channels on the weight's first axis (all of them) and on its second (those of one group)."""
    w, swap = site.node.inputs[1], site.node.op == "ConvTranspose"
    rows, columns = site.ids(w, 0), site.ids(w, 1)
    assert rows is not None
    assert columns is not None
    site.positions.tie(rows, whole)
    if groups > 1 and min(len(rows) // groups, len(columns)) == 1:  # whole groups go
        heads = site.positions.fresh(groups)
        site.positions.tie(whole, heads[np.arange(len(whole)) * groups // len(whole)])
        site.positions.tie(part, heads[np.arange(len(part)) * groups // len(part)])
        site.pin(w, 1, "the channels of one group, of which whole groups are cut")
        return
    site.positions.tie(part, columns[np.arange(len(part)) % len(columns)])
    if groups > 1:
        site.unify(whole, len(rows) // groups)
    site.role(1, 0, CONSUMES if swap else PRODUCES)
    site.role(1, 1, PRODUCES if swap else CONSUMES)


def _new_groups(site: Site, kept: Kept) -> Iterator[Edit]:
    """Sets how many groups are left: as many times fewer as there are channels fewer, where whole groups went."""
    groups, w = _groups(site), site.node.inputs[1]
    rows, before = kept.size(w, 0), site.dims(w)[0]
    if groups > 1 and rows is not None and isinstance(before, int):
        columns = site.dims(w)[1]
        if min(before // groups, columns if isinstance(columns, int) else 0) == 1 and rows != before:
            yield Edit(rows * groups // before, "group")


def _matmul(site: Site) -> None:
    """A [*, M, K], B [*, K, N] -> [*, M, N]; a vector A has no M, a vector B no N."""
    (a, b), y = site.node.inputs, site.node.outputs[0]
    left, right = site.rank(a), site.rank(b)
    site.same(a, -1, b, -2 if right > 1 else 0)
    if left > 1:
        site.same(a, -2, y, -2 if right > 1 else -1)
        site.role(0, -2, PRODUCES)
    if right > 1:
        site.same(b, -1, y, -1)
        site.role(1, -1, PRODUCES)
    site.role(0, -1, CONSUMES)
    site.role(1, -2 if right > 1 else 0, CONSUMES)
    if left > 1 and right > 1:
        site.broadcast([a, b], y, skip=2)
    else:
        for tensor in (a, b):
            if site.rank(tensor) > 2:
                lost = 1  # the other one is a vector: the result has one axis less
                for axis in range(site.rank(tensor) - 2):
                    site.same(tensor, axis, y, axis + site.rank(y) - site.rank(tensor) + lost)


def _gemm(site: Site) -> None:
    """A [M, K] or transposed, B [K, N] or transposed, C broadcast to [M, N]."""
    (a, b), y = site.node.inputs[:2], site.node.outputs[0]
    a_rows, b_rows = int(site.node.attrs.get("transA", 0)), int(site.node.attrs.get("transB", 0))
    site.same(a, 1 - a_rows, b, b_rows)
    site.same(a, a_rows, y, 0)
    site.same(b, 1 - b_rows, y, 1)
    site.role(0, a_rows, PRODUCES)
    site.role(0, 1 - a_rows, CONSUMES)
    site.role(1, 1 - b_rows, PRODUCES)
    site.role(1, b_rows, CONSUMES)
    if site.has(2):
        site.broadcast([site.node.inputs[2]], y)


def _einsum(site: Site) -> None:
    """Equal letters are equal channels; a letter that the output lacks is summed over."""
    equation = str(site.node.attrs["equation"]).replace(" ", "")
    if "." in equation:
        site.barrier("Einsum with an ellipsis")
        return
    inputs, arrow, output = equation.partition("->")
    letters = inputs.split(",")
    if not arrow:
        output = "".join(sorted(letter for letter in set(inputs) - {","} if inputs.count(letter) == 1))
    first: dict[str, tuple[Tensor, int]] = {letter: (site.node.outputs[0], axis) for axis, letter in enumerate(output)}
    for operand, word in enumerate(letters):
        for axis, letter in enumerate(word):
            tensor, size = site.node.inputs[operand], site.dims(site.node.inputs[operand])[axis]
            site.role(operand, axis, PRODUCES if letter in output else CONSUMES)
            site.free(tensor, axis)
            known, at = first.setdefault(letter, (tensor, axis))
            if size == 1 and site.dims(known)[at] != 1:
                site.barrier("Einsum that repeats an axis of size 1")
            elif (known, at) != (tensor, axis):
                site.same(tensor, axis, known, at)


def _recurrent(site: Site) -> None:
    """X [S, B, I], W [d, g·H, I], R [d, g·H, H], B [d, 2g·H], P [d, 3·H], states [d, B, H] -> Y [S, d, B, H], Y_h, Y_c [d, B, H]."""
    node = site.node
    if int(node.attrs.get("layout", 0)) or "activation_alpha" in node.attrs or "activation_beta" in node.attrs:
        site.barrier(f"{node.op} with layout 1 or parameters of its activations")
        return
    x, w, r = node.inputs[:3]
    hidden, size = site.ids(r, 2), site.dims(r)[2]
    if hidden is None or not isinstance(size, int):
        site.barrier("the number of hidden units is unknown")
        return
    site.same(x, 2, w, 2)
    site.pin(w, 0, "the directions of a recurrent layer")
    site.pin(r, 0, "the directions of a recurrent layer")
    states = [(tensor, 2) for tensor in node.inputs[5:7] if tensor.name] + [(tensor, -1) for tensor in node.outputs if tensor.name]
    wide = [(w, 1), (r, 1), *((node.inputs[operand], 1) for operand in (3, 7) if site.has(operand))]
    for tensor, axis in [*states, *wide]:
        ids = site.ids(tensor, axis)
        if ids is None:
            site.pin(r, 2, "hidden units of a state of unknown size")
        else:
            site.positions.tie(ids, hidden[np.arange(len(ids)) % size])
    for tensor in [*node.inputs[5:7], *node.outputs]:
        if tensor.name:
            site.same(tensor, -2, x, 1)
            site.pin(tensor, -3, "the directions of a recurrent layer")
    site.pin(x, 0, "the steps of a sequence")
    if node.outputs[0].name:
        site.pin(node.outputs[0], 0, "the steps of a sequence")
    for axis, role in ((1, PRODUCES), (2, CONSUMES)):
        site.role(1, axis, role)
        site.role(2, axis, role)
    for operand in (3, 7):
        if site.has(operand):
            site.pin(node.inputs[operand], 0, "the directions of a recurrent layer")
    if site.has(4):
        site.pin_all(node.inputs[4], "sequence lengths")
        site.pin(x, 1, "samples with sequence lengths of their own")


def _new_hidden_size(site: Site, kept: Kept) -> Iterator[Edit]:
    size = kept.size(site.node.inputs[2], 2)
    if kept.changes(site.node.inputs[2], 2) and "hidden_size" in site.node.attrs:
        yield Edit(size, "hidden_size")


RULES: dict[str, Rule] = {
    "Conv": Rule(_conv, _new_groups),
    "ConvTranspose": Rule(_conv, _new_groups),
    "Einsum": Rule(_einsum),
    "Gemm": Rule(_gemm),
    "MatMul": Rule(_matmul),
    **dict.fromkeys(("GRU", "LSTM", "RNN"), Rule(_recurrent, _new_hidden_size)),
}
