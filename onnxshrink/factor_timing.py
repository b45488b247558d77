"""Which ways to cut a layer make it faster: tried out, for what saves multiply-accumulates does not always save time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from onnxshrink.contract import Trials
from onnxshrink.factor_options import Option
from onnxshrink.graph.factoring import split
from onnxshrink.graph.ir import Constant, Graph
from onnxshrink.graph.weights import weights

__all__ = ["that_pay"]

_PAYS = 0.98  # of the time of a layer: pieces that take more save none


def that_pay(graph: Graph, options: Sequence[Option], trials: Trials) -> list[Option]:
    """Returns the options whose pieces take less time than the layer as it is, as far as a few of each form tell when they are run.

    Args:
        graph: the main graph; not changed.
        options: of one of its weights; one without a form always stays.
        trials: that run layers.
    """
    most: dict[str, float] = {}
    for name in dict.fromkeys(one.form.name for one in options if one.form is not None):
        mine = [one for one in options if one.form is not None and one.form.name == name]
        tried = [mine[index] for index in sorted({0, len(mine) // 2, len(mine) - 1})]
        most[name] = next((one.cost for one in tried if _time(graph, one, trials) < _PAYS), 0.0)
    return [one for one in options if one.form is None or one.cost <= most[one.form.name]]


def _time(graph: Graph, one: Option, trials: Trials) -> float:
    """Returns the time of a layer in pieces over that of the layer as it is."""
    assert one.form is not None
    copy = graph.copy()
    twin = next(weight for weight in weights(copy) if weight.site == one.form.weight.site)
    pieces = tuple(np.ones(shape, one.form.dtype) for shape in one.form.shapes(one.ranks))
    use = one.form.weight.uses[0]
    assert use.node is not None
    split(copy, replace(one.form, weight=twin), pieces)
    outputs = [tensor.name for tensor in use.node.outputs if tensor.name][:1]
    others = [tensor for index, tensor in enumerate(use.node.inputs) if index != use.operand]
    inputs = [tensor.name for tensor in others if tensor.name and not isinstance(tensor, Constant)]
    return trials.part_ratio(graph, copy, inputs, outputs)
