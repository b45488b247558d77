"""What a compression is judged by: inputs, those that passes may see apart from those that judge, and the original's outputs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from onnxshrink.errors import InputsError, must
from onnxshrink.graph.ir import Graph
from onnxshrink.inputs import InputSource, Samples, read_inputs
from onnxshrink.runtime import Session, session
from onnxshrink.synthetic import synthetic_samples
from onnxshrink.validate import Reference

__all__ = ["Evidence", "gather", "parted", "samples_for"]

_PROBING_SAMPLES = 8
_SYNTHETIC_SAMPLES = 2 * _PROBING_SAMPLES  # half to probe with, half to judge by
_HELD_OUT_SHARE = 0.25  # of the given inputs: passes never see what the result is judged on


@dataclass(frozen=True)
class Evidence:
    """Inputs, and the original's outputs on those that judge.

    Attributes:
        source: where they come from.
        synthetic: whether they were made up.
        given: for passes; None when there are none to spare.
        judged: what the result is judged on; disjoint from the former.
        probing: a few inputs by which sites are compared; others than those that judge, unless none are to spare.
        reference: the original's outputs on those.
    """

    source: str
    synthetic: bool
    given: Samples | None
    judged: Samples
    probing: Samples
    reference: Reference


def gather(
    graph: Graph, calibration: InputSource | None, seed: int, validation: InputSource | None = None
) -> Evidence:
    """Runs the original on the inputs that judge; see `onnxshrink.api.compress` for the arguments and errors."""
    if validation is not None and _is_same(calibration, validation):
        raise InputsError(must("inputs", "validation", "other inputs than calibration: what was fitted must not judge", validation))
    with session(graph, role="original") as running:
        samples, synthetic = samples_for(graph, running, calibration if calibration is not None else validation, seed)
        source = samples.source
        given: Samples | None
        if validation is not None:
            given = samples if calibration is not None else None
            judged = read_inputs(validation, running.inputs)
            source = f"{source}, judged by {judged.source}" if given is not None else source
        elif synthetic:
            given, judged = None, samples[_PROBING_SAMPLES:]
        else:
            given, judged = parted(samples)
        most = judged if given is None else given
        few = most[:: -(-len(most) // _PROBING_SAMPLES)]  # from all over: files often hold one class after the other
        probing = samples[:_PROBING_SAMPLES] if synthetic else few
        reference = Reference(graph, judged, running=running)
        return Evidence(source, synthetic, given, judged, probing, reference)


def _is_same(calibration: InputSource | None, validation: InputSource) -> bool:
    """Whether both are one object or one place."""
    if isinstance(calibration, str | os.PathLike) and isinstance(validation, str | os.PathLike):
        return Path(calibration).resolve() == Path(validation).resolve()
    return calibration is validation


def samples_for(graph: Graph, running: Session, inputs: InputSource | None, seed: int) -> tuple[Samples, bool]:
    """Returns the samples, and whether they are synthetic."""
    if inputs is not None:
        return read_inputs(inputs, running.inputs), False
    return synthetic_samples(graph, running, _SYNTHETIC_SAMPLES, seed), True


def parted(samples: Samples) -> tuple[Samples | None, Samples]:
    """Returns (for passes, for judging); a single sample is for judging."""
    if len(samples) < 2:
        return None, samples
    return samples.split(1 - _HELD_OUT_SHARE)
