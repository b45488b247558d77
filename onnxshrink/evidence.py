"""What a compression is judged by: inputs, those that passes may see apart from those that judge, and the original's outputs."""

from __future__ import annotations

from dataclasses import dataclass

from onnxshrink.graph.ir import Graph
from onnxshrink.inputs import InputSource, Samples, read_inputs
from onnxshrink.runtime import Session, session
from onnxshrink.synthetic import synthetic_samples
from onnxshrink.validate import Reference

__all__ = ["Evidence", "gather", "samples_for"]

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
        probing: a few inputs by which sites are compared; others than those that judge, unless there is only one.
        reference: the original's outputs on those.
    """

    source: str
    synthetic: bool
    given: Samples | None
    judged: Samples
    probing: Samples
    reference: Reference


def gather(graph: Graph, calibration: InputSource | None, seed: int) -> Evidence:
    """Runs the original on the inputs that judge; see `onnxshrink.api.compress` for the arguments and errors."""
    with session(graph, role="original") as running:
        samples, synthetic = samples_for(graph, running, calibration, seed)
        if synthetic:
            given, judged, probing = None, samples[_PROBING_SAMPLES:], samples[:_PROBING_SAMPLES]
        else:
            given, judged = _split(samples)
            most = judged if given is None else given
            probing = most[:: -(-len(most) // _PROBING_SAMPLES)]  # from all over: files often hold one class after the other
        reference = Reference(graph, judged, running=running)
        return Evidence(samples.source, synthetic, given, judged, probing, reference)


def samples_for(graph: Graph, running: Session, inputs: InputSource | None, seed: int) -> tuple[Samples, bool]:
    """Returns the samples, and whether they are synthetic."""
    if inputs is not None:
        return read_inputs(inputs, running.inputs), False
    return synthetic_samples(graph, running, _SYNTHETIC_SAMPLES, seed), True


def _split(samples: Samples) -> tuple[Samples | None, Samples]:
    """Returns (for passes, for judging); a single sample is for judging."""
    if len(samples) < 2:
        return None, samples
    return samples.split(1 - _HELD_OUT_SHARE)
