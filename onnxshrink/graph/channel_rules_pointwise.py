"""Channel rules of ops that keep channels apart: element-wise functions, normalizations, pooling, reductions, quantization.

Where a statistic is taken over channels (LayerNormalization, a mean), a cut leaves the same function of the channels that remain; such
sites are noted as resliced. Where channels compete or look at each other (Softmax, ArgMax, LRN), the axis is pinned.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnxshrink.graph.channel_sites import Edit, Kept, Rule, Site

__all__ = ["RULES"]

_SPACE = "a spatial axis"


def _pointwise(site: Site) -> None:
    """All inputs broadcast to all outputs."""
    if "broadcast" in site.node.attrs or ("axis" in site.node.attrs and site.opset < 7):
        site.barrier("broadcasting by attributes, as before opset 7")
        return
    for result in site.node.outputs:
        if result.name:
            site.broadcast([tensor for tensor in site.node.inputs if tensor.name], result)


def _first_input(site: Site) -> None:
    """Outputs have the shape of the first input; the others are scalars or say nothing about channels."""
    for result in site.node.outputs:
        if result.name and site.positions.dims(result) is not None:  # the mask of Dropout may be left undescribed, if nobody reads it
            site.broadcast(site.node.inputs[:1], result)


def _cast_like(site: Site) -> None:
    """X, any tensor of the type -> Y."""
    _first_input(site)
    for axis in range(site.rank(site.node.inputs[1])):
        site.free(site.node.inputs[1], axis)


def _quantize(site: Site) -> None:
    """X, scale, zero point -> Y: a scale per tensor, or one for each place on an axis."""
    x, y = site.node.inputs[0], site.node.outputs[0]
    site.broadcast([x], y)
    axis = site.axis("axis", 1, site.rank(x))
    for operand in (1, 2):
        if not site.has(operand) or site.rank(site.node.inputs[operand]) == 0 or site.dims(site.node.inputs[operand]) == (1,):
            continue
        given = site.node.inputs[operand]
        if site.rank(given) != 1 or int(site.node.attrs.get("block_size", 0)):
            site.barrier("quantization in blocks")
            return
        site.same(given, 0, x, axis)


def _batch_norm(site: Site) -> None:
    """X [N, C, *], scale, B, mean, var [C] -> Y."""
    x, y = site.node.inputs[0], site.node.outputs[0]
    attrs = site.node.attrs
    if any(tensor.name for tensor in site.node.outputs[1:]) or attrs.get("training_mode", 0) or not attrs.get("spatial", 1):
        site.barrier("BatchNormalization for training, or by element")
        return
    site.broadcast([x], y)
    for operand in range(1, 5):
        site.same(site.node.inputs[operand], 0, x, 1)


def _instance_norm(site: Site) -> None:
    """X [N, C, *], scale, B [C] -> Y."""
    x, y = site.node.inputs[0], site.node.outputs[0]
    site.broadcast([x], y)
    site.pin_all(x, "statistics are taken over it", range(2, site.rank(x)))
    for operand in (1, 2):
        site.same(site.node.inputs[operand], 0, x, 1)


def _layer_norm(site: Site) -> None:
    """X, scale, B -> Y: statistics over the axes from ``axis`` on, with scale and B for each place there."""
    x, y = site.node.inputs[0], site.node.outputs[0]
    if any(tensor.name for tensor in site.node.outputs[1:]):
        site.barrier(f"{site.node.op} whose statistics are read")
        return
    site.broadcast([tensor for tensor in site.node.inputs if tensor.name], y)
    for axis in range(site.axis("axis", -1, site.rank(x)), site.rank(x)):
        site.statistic(x, axis)


def _lp_norm(site: Site) -> None:
    x, y = site.node.inputs[0], site.node.outputs[0]
    site.broadcast([x], y)
    site.statistic(x, site.axis("axis", -1, site.rank(x)))


def _group_norm(site: Site) -> None:
    """X [N, C, *], scale, B [C], before opset 21 [groups] -> Y: whole groups go, so that statistics stay as they are."""
    x, y, groups = site.node.inputs[0], site.node.outputs[0], int(site.node.attrs["num_groups"])
    site.broadcast([x], y)
    site.pin_all(x, "statistics are taken over it", range(2, site.rank(x)))
    heads = site.positions.fresh(groups)
    for tensor, axis in ((x, 1), (site.node.inputs[1], 0), (site.node.inputs[2], 0)):
        ids = site.ids(tensor, axis)
        if ids is None:
            site.barrier("the number of channels is unknown")
            return
        site.positions.tie(ids, heads[np.arange(len(ids)) * groups // len(ids)])


def _new_norm_groups(site: Site, kept: Kept) -> Iterator[Edit]:
    x, groups = site.node.inputs[0], int(site.node.attrs["num_groups"])
    size, before = kept.size(x, 1), site.dims(x)[1]
    if size is not None and isinstance(before, int) and size != before:
        yield Edit(size * groups // before, "num_groups")


def _pool(site: Site) -> None:
    """X [N, C, *] -> Y [N, C, *]."""
    x, y = site.node.inputs[0], site.node.outputs[0]
    if any(tensor.name for tensor in site.node.outputs[1:]):
        site.barrier("pooling that tells indices")
        return
    for axis in (0, 1):
        site.same(x, axis, y, axis)
    for tensor in (x, y):
        site.pin_all(tensor, _SPACE, range(2, site.rank(tensor)))


def _lrn(site: Site) -> None:
    """Each channel is divided by what its neighbors hold: a cut would bring others near."""
    x, y = site.node.inputs[0], site.node.outputs[0]
    site.broadcast([x], y)
    site.pin(x, 1, "LRN looks at neighboring channels")


def _competing(site: Site) -> None:
    """Softmax and its like: the axis is pinned; before opset 13 the function is over all axes from there on."""
    x, y = site.node.inputs[0], site.node.outputs[0]
    site.broadcast([x], y)
    is_old = site.opset < 13
    axis = site.axis("axis", 1 if is_old else -1, site.rank(x))
    last = site.rank(x) if is_old else axis + 1
    site.pin_all(x, f"{site.node.op} weighs its positions against each other", range(axis, last))


def _cumulated(site: Site) -> None:
    """CumSum: what comes out at a place depends on those before it."""
    x, axes = site.node.inputs[0], site.integers(1)
    site.broadcast([x], site.node.outputs[0])
    if axes is None or len(axes) != 1:
        site.barrier("CumSum along an axis that is not constant")
    else:
        site.pin(x, axes[0], "CumSum adds up its positions")


def _arg(site: Site) -> None:
    """ArgMax, ArgMin: positions of the axis are told, so it stays."""
    x = site.node.inputs[0]
    axis = site.axis("axis", 0, site.rank(x))
    site.pin(x, axis, f"{site.node.op} tells positions")
    _keep_others(site, {axis}, keeps=bool(site.node.attrs.get("keepdims", 1)))


def _top(site: Site) -> None:
    """TopK -> values, positions along the axis: what is beside the axis does not matter to either."""
    x = site.node.inputs[0]
    axis = site.axis("axis", -1, site.rank(x))
    for tensor in (x, *(tensor for tensor in site.node.outputs if tensor.name)):
        site.pin(tensor, axis, "TopK picks from its positions")
        for other in range(site.rank(x)):
            if other != axis:
                site.same(tensor, other, x, other)


def _keep_others(site: Site, gone: set[int], *, keeps: bool) -> None:
    """Says that all axes but those that a reduction takes are the same before and after."""
    x, y, after = site.node.inputs[0], site.node.outputs[0], 0
    for axis in range(site.rank(x)):
        if axis not in gone:
            site.same(x, axis, y, after)
        after += keeps or axis not in gone


_ADDITIVE = ("ReduceL1", "ReduceL2", "ReduceMean", "ReduceSum", "ReduceSumSquare")  # of fewer terms they mean the same


def _reduce(site: Site) -> None:
    """Sums may lose terms, a mean is then that of what is left; the largest of fewer is something else."""
    x = site.node.inputs[0]
    axes = site.integers(1, "axes")
    if axes is None and (site.has(1) or "axes" in site.node.attrs):
        site.barrier(f"{site.node.op} over axes that are not constant")
        return
    if not axes:
        axes = [] if site.node.attrs.get("noop_with_empty_axes", 0) else list(range(site.rank(x)))
    gone = {axis % site.rank(x) for axis in axes}
    for axis in gone:
        if site.node.op in _ADDITIVE:
            site.statistic(x, axis)
        else:
            site.pin(x, axis, f"{site.node.op} is taken over it")
    _keep_others(site, gone, keeps=bool(site.node.attrs.get("keepdims", 1)))


_POINTWISE = (
    "Abs Acos Acosh Add And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Ceil Celu Clip Cos Cosh Div Elu "
    "Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean "
    "Min Mish Mod Mul Neg Not Or PRelu Pow Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Sub Sum Swish "
    "Tan Tanh ThresholdedRelu Where Xor"
).split()
_POOLS = "AveragePool GlobalAveragePool GlobalLpPool GlobalMaxPool LpPool MaxPool".split()
_REDUCTIONS = "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare".split()

RULES: dict[str, Rule] = {
    **dict.fromkeys(_POINTWISE, Rule(_pointwise)),
    **dict.fromkeys(("Cast", "Dropout"), Rule(_first_input)),
    **dict.fromkeys(("DequantizeLinear", "QuantizeLinear"), Rule(_quantize)),
    **dict.fromkeys(_POOLS, Rule(_pool)),
    **dict.fromkeys(_REDUCTIONS, Rule(_reduce)),
    **dict.fromkeys(("ArgMax", "ArgMin"), Rule(_arg)),
    **dict.fromkeys(("Hardmax", "LogSoftmax", "Softmax"), Rule(_competing)),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), Rule(_layer_norm)),
    "BatchNormalization": Rule(_batch_norm),
    "CastLike": Rule(_cast_like),
    "CumSum": Rule(_cumulated),
    "GroupNormalization": Rule(_group_norm, _new_norm_groups),
    "InstanceNormalization": Rule(_instance_norm),
    "LRN": Rule(_lrn),
    "LpNormalization": Rule(_lp_norm),
    "TopK": Rule(_top),
    # retired experimental ops that ONNX Runtime still runs (onnxruntime/core/graph/contrib_ops/contrib_defs.cc)
    "Affine": Rule(_pointwise),
    "Crop": Rule(_pool),
}
