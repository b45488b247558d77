"""What zeros do to a model before anything is made up for: each layer alone, and the whole model at rising sparsity.

    found = degradation(graph, judged, Context())
    found.layers[0].curves["unstructured"]      # the most sensitive layer: SQNR of the outputs at a few sparsities
    found.curves[0].points                      # all layers at the same sparsity, 0.1 to 0.9

Zeros take the smallest magnitudes: of single weights (``unstructured``), or of whole output channels, by their L2 norm (``rows``).
Layers are tied sets, zeroed one at a time with all others as they were. This is the plain degradation that papers plot (Han et al.,
arXiv 1506.02626; Li et al., arXiv 1608.08710), with nothing trained or solved again. Given activations, the curves of the whole model
are measured once more with what is left solved again, on the same inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from onnxshrink.calibrate import Calibration
from onnxshrink.contract import Context
from onnxshrink.graph.coded import coded_weights
from onnxshrink.graph.edit import set_values
from onnxshrink.graph.ir import Graph
from onnxshrink.graph.weights import Weight, weights
from onnxshrink.inputs import Samples
from onnxshrink.metrics import DRIFT_LIMIT, SQNR_LIMIT_DB
from onnxshrink.numerics.patterns import Pattern
from onnxshrink.sensitivity import OutputProbe
from onnxshrink.sparsity import probed_curves, sparsify_alone, sparsify_in_turn
from onnxshrink.targets import Target
from onnxshrink.validate import Comparison, Reference, compare

__all__ = [
    "LAYER_SPARSITIES",
    "MODEL_SPARSITIES",
    "PATTERNS",
    "Degradation",
    "LayerCurves",
    "LayerPoint",
    "ModelCurve",
    "ModelPoint",
    "degradation",
]

PATTERNS = ("unstructured", "rows")
LAYER_SPARSITIES = (0.3, 0.5, 0.8)
MODEL_SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_MOST_SAMPLES = 128  # that the whole model is judged on; layers are told apart by fewer


@dataclass(frozen=True)
class LayerPoint:
    """What zeros in one layer do to the worst output.

    Attributes:
        sparsity: share of the layer's weights that are zero.
        drift: relative L2 error, 0 to 1e15.
        sqnr_db: -20 log10(drift), within ±300 dB.
    """

    sparsity: float
    drift: float
    sqnr_db: float


@dataclass(frozen=True)
class LayerCurves:
    """One layer: a stored weight with all its uses.

    Attributes:
        site: model-wide name.
        op: what reads it; several ops are joined by +.
        shape: of the tensor.
        share: of the elements of all layers that are probed.
        curves: by pattern, points of ascending sparsity; without ``rows`` where tied uses disagree on what a row is.
    """

    site: str
    op: str
    shape: tuple[int, ...]
    share: float
    curves: Mapping[str, Sequence[LayerPoint]]


@dataclass(frozen=True)
class ModelPoint:
    """What zeros in all layers at once do.

    Attributes:
        sparsity: share of zeros that every layer was asked for.
        zeros: share that there really are, over all layers: rows are zeroed whole, and some layers have none.
        drift: of the worst output, 0 to 1e15.
        sqnr_db: of the worst output, within ±300 dB.
        agreement: of the worst output, share of decisions equal to the original's; None where no output decides anything.
        top1: share of labels that are hit, where labels came with the inputs; else None.
        failure: what is broken, NaN or infinity, in one line; the other figures are then the worst there are. Or None.
    """

    sparsity: float
    zeros: float
    drift: float
    sqnr_db: float
    agreement: float | None
    top1: float | None
    failure: str | None


@dataclass(frozen=True)
class ModelCurve:
    """The whole model at rising sparsity, every layer at the same one.

    Attributes:
        pattern: of the zeros.
        repaired: whether layers, in the order in which they run, make up for the zeros.
        points: of ascending sparsity.
    """

    pattern: str
    repaired: bool
    points: Sequence[ModelPoint]


@dataclass(frozen=True)
class Degradation:
    """What zeros do to a model.

    Attributes:
        inputs: where they come from.
        samples: how many of them judged the whole model.
        ranked_at: the sparsity, unstructured, by which layers are ranked.
        layers: the most sensitive first.
        curves: of the whole model; none where there is no layer.
        top1: share of labels that the original hits, where labels came with the inputs; else None.
        notes: what to know besides.
    """

    inputs: str
    samples: int
    ranked_at: float
    layers: Sequence[LayerCurves]
    curves: Sequence[ModelCurve]
    top1: float | None
    notes: Sequence[str] = ()


def degradation(
    graph: Graph,
    judged: Samples,
    context: Context,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    *,
    patterns: Sequence[str] = PATTERNS,
    layer_sparsities: Sequence[float] = LAYER_SPARSITIES,
    model_sparsities: Sequence[float] = MODEL_SPARSITIES,
) -> Degradation:
    """Measures what zeros do.

    Args:
        graph: the main graph; only read.
        judged: inputs to judge by, at least one; of many a part, spread evenly.
        context: with activations, from other inputs, the whole model is measured repaired as well; layers never are.
        progress: called with what is being done, the part done and the total.
        patterns: of zeros, as `Pattern.parse` takes them, with a share: no N:M.
        layer_sparsities: ascending, above 0 and at most 1; layers are ranked by the middle one of the first pattern.
        model_sparsities: the same for the whole model.

    Raises:
        InputsError: the model does not run on an input, or labels do not fit its class scores.
        ValidationError: a changed model does not run.
    """
    found = [weight for weight in weights(graph) if _can_be_probed(weight)]
    used = judged[:: -(-len(judged) // _MOST_SAMPLES)]
    ranked_at = layer_sparsities[len(layer_sparsities) // 2]
    notes = _coded(graph)
    if not found:
        notes.append("no layer has weights that could be zeroed")
        return Degradation(used.source, len(used), ranked_at, [], [], None, notes)
    reference = Reference(graph, used)
    targets = {pattern: _targets(found, pattern) for pattern in patterns}
    probe = OutputProbe(graph, Calibration(judged))
    if not probe.is_possible:
        notes.append("no output tells layers apart: their figures are the squares of the weights that go, over all squares")
    layers = _layers(graph, targets, layer_sparsities, probe if probe.is_possible else None, context, progress)
    layers.sort(key=lambda layer: -_drift_at(layer, patterns[0], ranked_at))  # stable: equals stay in file order
    curves = list(_curves(reference, graph, targets, model_sparsities, context, progress))
    accuracy = compare(reference, graph).accuracy
    return Degradation(
        used.source, len(used), ranked_at, layers, curves, accuracy.top1_original if accuracy is not None else None, notes
    )


def _can_be_probed(weight: Weight) -> bool:
    return weight.obstacle is None and weight.computes and bool(np.isfinite(weight.constant.values).all())


def _coded(graph: Graph) -> list[str]:
    """Returns a note on weights that are stored as codes or packed zeros, where there are any."""
    found = coded_weights(graph)
    count, packed = len(found), any(item.is_sparse for item in found)
    stored = "as codes or packed zeros" if packed else "as codes"
    left = f"{count} weight{'s' * (count != 1)} stored {stored} left alone: expand the model to probe what is in them"
    return [left] if count else []


def _targets(found: Sequence[Weight], pattern: str) -> list[Target]:
    """Returns the weights in which zeros of a pattern have a meaning; see `Weight.view`."""
    parsed = Pattern.parse(pattern)
    fitting = [weight for weight in found if weight.view is not None or parsed.kind == "unstructured"]
    return [Target(weight, parsed, "magnitude") for weight in fitting]


def _layers(
    graph: Graph,
    targets: Mapping[str, Sequence[Target]],
    sparsities: Sequence[float],
    probe: OutputProbe | None,
    context: Context,
    progress: Callable[[str, int, int], None],
) -> list[LayerCurves]:
    """Returns the curves of every layer, in file order."""
    by_site: dict[str, dict[str, list[LayerPoint]]] = {}
    of_site: dict[str, Weight] = {}
    for pattern, mine in targets.items():
        plain = replace(context, activations=None, progress=partial(progress, f"probing layers, {pattern}"))
        for target, curve in zip(mine, probed_curves(graph, mine, sparsities, plain, probe), strict=True):
            points = [_layer_point(*point) for point in zip(sparsities, curve.drifts.tolist(), strict=True)]
            by_site.setdefault(target.weight.site, {})[pattern] = points
            of_site[target.weight.site] = target.weight
    total = sum(weight.constant.size for weight in of_site.values())
    return [
        LayerCurves(site, _ops(weight), weight.constant.shape, weight.constant.size / total, by_site[site])
        for site, weight in of_site.items()
    ]


def _layer_point(sparsity: float, squared: float) -> LayerPoint:
    drift = min(math.sqrt(squared), DRIFT_LIMIT)
    return LayerPoint(sparsity, drift, -20 * math.log10(max(drift, 1 / DRIFT_LIMIT)))


def _drift_at(layer: LayerCurves, pattern: str, sparsity: float) -> float:
    """Returns the drift by which a layer is ranked; 0 where it has no such zeros."""
    return next((point.drift for point in layer.curves.get(pattern, ()) if point.sparsity == sparsity), 0.0)


def _ops(weight: Weight) -> str:
    return "+".join(dict.fromkeys(use.op for use in weight.uses))


def _curves(
    reference: Reference,
    graph: Graph,
    targets: Mapping[str, Sequence[Target]],
    sparsities: Sequence[float],
    context: Context,
    progress: Callable[[str, int, int], None],
) -> Iterator[ModelCurve]:
    """Yields the curves of the whole model, each pattern plain, and then repaired where there are activations."""
    size = sum(target.weight.constant.size for target in max(targets.values(), key=len))
    silent = replace(context, progress=lambda done, total: None)
    for pattern, mine in targets.items():
        for repaired in (False, True) if context.activations is not None else (False,):
            what = f"zeroing the whole model, {pattern}{', made up for' if repaired else ''}"
            points = []
            for number, sparsity in enumerate(sparsities):
                progress(what, number, len(sparsities))
                sparse, zeros = _sparse(graph, mine, sparsity, silent if repaired else replace(silent, activations=None))
                points.append(_model_point(sparsity, zeros / size, compare(reference, sparse)))
            yield ModelCurve(pattern, repaired, points)


def _sparse(graph: Graph, targets: Sequence[Target], share: float, context: Context) -> tuple[Graph, int]:
    """Returns a copy with the same share of zeros in every target, made up for where there are activations, and their number."""
    copy = graph.copy()
    twins = {weight.site: weight for weight in weights(copy)}
    mine = [replace(target, weight=twins[target.weight.site]) for target in targets]
    shares = [share] * len(mine)
    if context.activations is None:
        values = sparsify_alone(copy, mine, shares, context)
    else:
        values, repaired = sparsify_in_turn(copy, mine, [shares], context)
        for bias, shifted in repaired.biases.values():
            set_values(bias, shifted)
    for site, array in values.items():
        set_values(twins[site].constant, array)
    return copy, sum(array.size - int(np.count_nonzero(array)) for array in values.values())


def _model_point(sparsity: float, zeros: float, found: Comparison) -> ModelPoint:
    worst, agreement = found.worst("drift"), found.worst("agreement")
    if found.failure is not None or worst is None:
        return ModelPoint(sparsity, zeros, DRIFT_LIMIT, -SQNR_LIMIT_DB, None, None, found.failure)
    return ModelPoint(
        sparsity=sparsity,
        zeros=zeros,
        drift=worst.drift,
        sqnr_db=worst.sqnr_db,
        agreement=agreement.agreement if agreement is not None else None,
        top1=found.accuracy.top1_candidate if found.accuracy is not None else None,
        failure=None,
    )
