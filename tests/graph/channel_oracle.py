"""What a graph without some channels must compute: the original, with those channels set to zero wherever they are summed over.

The reference is the original file with a Mul before every input of every op that sums over an axis (convolutions, products, recurrent
layers, sums), computed operands and weights alike. It knows nothing of rules and roles, only where each channel lies.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper

from onnxshrink.graph.channel_groups import ChannelGroup, find_channels
from onnxshrink.graph.check import strictest_level
from onnxshrink.graph.cutting import cut_channels
from onnxshrink.graph.exporter import to_model
from onnxshrink.graph.files import load
from tests import oracle

Array = np.ndarray[Any, np.dtype[Any]]
Masks = dict[str, list[Array]]
SUMMING = (
    "Conv ConvTranspose Einsum GRU Gemm LSTM MatMul RNN ReduceL1 ReduceL2 ReduceSum ReduceSumSquare GlobalLpPool LpNormalization"
).split()
AVERAGING = ("LayerNormalization", "ReduceMean", "RMSNormalization")


def masks_of(cut: Mapping[ChannelGroup, Iterable[int]]) -> Masks:
    """Returns by tensor name which positions stay, in a shape that broadcasts, for every axis that a cut touches."""
    masks: Masks = {}
    for group, indices in cut.items():
        for member in group.members:
            kept = ~np.isin(member.places, list(indices))
            masks.setdefault(member.tensor.name, []).append(kept.reshape([-1 if at == member.axis else 1 for at in range(member.rank)]))
    return masks


def zeroed(model: onnx.ModelProto, masks: Masks) -> onnx.ModelProto:
    """Returns the reference; unknown element types are float."""
    model = copy.deepcopy(model)
    types = {info.name: info.type.tensor_type.elem_type for info in onnx.shape_inference.infer_shapes(model).graph.value_info}
    types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for index, node in enumerate(model.graph.node):
        node = copy.deepcopy(node)
        for operand, name in enumerate(node.input) if node.op_type in SUMMING else ():
            for count, mask in enumerate(masks.get(name, [])):
                constant, result = f"mask_{index}_{operand}_{count}", f"masked_{index}_{operand}_{count}"
                dtype = helper.tensor_dtype_to_np_dtype(types.get(name) or onnx.TensorProto.FLOAT)
                model.graph.initializer.append(oracle.value(constant, mask.astype(dtype)))
                nodes.append(helper.make_node("Mul", [node.input[operand], constant], [result]))
                node.input[operand] = result
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.ir_version = max(model.ir_version, 4)
    return model


def distance(left: Iterable[Any], right: Iterable[Any]) -> float:
    """Returns the largest relative L2 distance between outputs; shapes must agree."""
    worst = 0.0
    for one, other in zip(left, right, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        one, other = one.astype(np.float64), other.astype(np.float64)
        worst = max(worst, float(np.linalg.norm(one - other) / max(np.linalg.norm(one), 1e-6)))
    return worst


def is_averaged(group: ChannelGroup) -> bool:
    """Whether a mean is taken over the channels: then nothing set to zero does the same."""
    producers = [node for member in group.members for node in member.tensor.outputs if node.op in AVERAGING]
    return any(node.site in group.resliced for node in producers)


def cut_and_compare(
    model: onnx.ModelProto,
    cut: Mapping[str, Iterable[int]] | None = None,
    feeds: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    outer: bool = True,
    share: float = 0.5,
) -> tuple[float, onnx.ModelProto, dict[str, int]]:
    """Cuts channels, checks the model, and returns its distance from the reference, itself, and how many channels went by group.

    Args:
        model: the original.
        cut: channels by the group's name; at random by default.
        feeds: inputs; random by default.
        seed: of all that is random.
        outer: see `find_channels`.
        share: how many groups are cut, of those that can be.
    """
    graph, rng = load(model), np.random.default_rng(seed)
    level = strictest_level(to_model(graph))[0]
    channels = find_channels(graph, outer=outer)
    chosen: dict[ChannelGroup, Array] = {}
    for group in channels.groups:
        if cut is not None and group.name in cut and group.reason is None:
            chosen[group] = np.asarray(list(cut[group.name]))
        elif cut is None and group.reason is None and group.size > 1 and not is_averaged(group) and rng.random() < share:
            chosen[group] = rng.choice(group.size, rng.integers(1, group.size), replace=False)
    assert cut is None or len(chosen) == len(cut), [group.name for group in channels.groups]
    reference = zeroed(model, masks_of(chosen))
    cut_channels(channels, chosen)
    result = to_model(graph)
    assert strictest_level(result)[0] >= level, strictest_level(result)
    before, after = oracle.session(reference, optimise=False), oracle.session(result, optimise=False)
    given = dict(feeds) if feeds is not None else oracle.random_feeds(before, seed)
    error = distance(oracle.run(before, given), oracle.run(after, given))
    return error, result, {group.name: len(indices) for group, indices in chosen.items()}
