"""How much the outputs of a model move when some of its weights change: measured on calibration inputs, by running both.

    probe = OutputProbe(graph, activations)
    probe.squared_drift({site: values})      # of the worst output

To first order, small changes of different layers move the outputs in nearly uncorrelated ways, so squared drifts add up.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from onnxshrink.contract import Activations, Context
from onnxshrink.graph.edit import set_values
from onnxshrink.graph.ir import Graph, Tensor
from onnxshrink.graph.storage import is_float
from onnxshrink.graph.weights import weights

__all__ = ["OutputProbe", "folds"]

Array = np.ndarray[Any, np.dtype[Any]]
_SAMPLES = 32  # tell layers apart well enough; all of them would make probing the longest part of the work
_FOLDS, _FEWEST_TO_PART, _MOST_TO_ROTATE = 3, 6, 40
_WORST = 1e30
_ELEMENTS = 1 << 24  # of reference outputs that are held, 64 MiB as float32


class OutputProbe:
    """The original's outputs on a few calibration inputs, to compare changed copies with."""

    def __init__(self, graph: Graph, activations: Activations) -> None:
        """Runs the original.

        Args:
            graph: the main graph; kept, and read again for every question.
            activations: calibration data; of much of it a part, spread evenly, for files often hold one class after the other.

        Raises:
            ValidationError: the model does not run on them.
        """
        stride = -(-activations.count // _SAMPLES)
        self._graph = graph
        self._activations = activations.fold(0, stride)[1] if stride > 1 else activations
        self._names = list(dict.fromkeys(tensor.name for tensor in graph.outputs if _is_tensor(tensor)))
        self._expected: list[dict[str, Array]] = []
        elements = 0
        for values in self._activations.samples(graph, self._names):
            floats = {name: values[name] for name in self._names if is_float(values[name].dtype)}
            elements += sum(array.size for array in floats.values())
            if self._expected and elements > _ELEMENTS:
                break
            self._expected.append(floats)
        self._names = [name for name in self._names if self._expected and all(name in floats for floats in self._expected)]

    @property
    def is_possible(self) -> bool:
        """Whether there is an output to measure: floating point, and neither zero nor NaN on all inputs."""
        return any(np.any(floats[name][np.isfinite(floats[name])]) for floats in self._expected for name in self._names)

    def squared_drift(self, values: Mapping[str, Array]) -> float:
        """Returns the squared relative L2 error of the worst output, over the samples; infinite if one is not finite.

        Args:
            values: new values of weights, of their shape and dtype, by site.

        Raises:
            ValidationError: the changed model does not run.
        """
        copy = self._graph.copy()
        for weight in weights(copy):
            if weight.site in values:
                set_values(weight.constant, values[weight.site])
        errors, powers = dict.fromkeys(self._names, 0.0), dict.fromkeys(self._names, 0.0)
        found = itertools.islice(self._activations.samples(copy, self._names), len(self._expected))
        for expected, got in zip(self._expected, found, strict=True):
            for name in self._names:
                if got[name].shape != expected[name].shape:
                    return float("inf")
                usual = np.isfinite(expected[name])  # what is infinite, as in masks, stays so or is no small change
                wide = expected[name][usual].astype(np.float64)
                errors[name] += float(np.square(got[name][usual] - wide).sum())
                powers[name] += float(np.square(wide).sum())
        drifts = [errors[name] / powers[name] for name in self._names if powers[name] > 0]
        worst = float(np.max(drifts, initial=0.0))  # NaN if one is
        return worst if np.isfinite(worst) else float("inf")

    def loss(self, values: Mapping[str, Array]) -> float:
        """Returns `squared_drift`, or a number larger than any for outputs that are not finite: losses can be added and compared."""
        return min(self.squared_drift(values), _WORST)


def _is_tensor(output: Tensor) -> bool:
    """Whether a graph output is described as a tensor, not as a sequence, a map or an optional."""
    return output.info is None or output.info.type.WhichOneof("value") in (None, "tensor_type")


def folds(graph: Graph, context: Context, most: int = _FOLDS) -> list[tuple[Context, OutputProbe | None]]:
    """Returns contexts with two thirds of the calibration data, each with a probe on the rest: what was fitted must not judge.

    A few inputs tell little of what a weight is worth, so with few every third is held back once; one of many is enough.
    """
    data = context.activations
    if data is None:
        return [(context, None)]
    if data.count < _FEWEST_TO_PART:
        parts = [(data, data)]
    else:
        parts = [data.fold(index, _FOLDS) for index in range(min(most, _FOLDS) if data.count <= _MOST_TO_ROTATE else 1)]
    probes = [(replace(context, activations=fitting), OutputProbe(graph, judging)) for fitting, judging in parts]
    return [(fitting, probe if probe.is_possible else None) for fitting, probe in probes]
