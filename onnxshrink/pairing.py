"""What layers of a rewritten graph meet, and what their outputs lack of what the original's were: sums over samples of both.

    H' = sum of x' x'^T,  E = sum of e x'^T        x' what a layer meets now, e = what it should give - what it gives now

Of Conv, ConvTranspose, MatMul and Gemm, e is read off the outputs, in which a constant bias cancels out:

    e = (y - y') + (s - s') + ...        s what y is added to and nothing else reads (`onnxshrink.graph.residuals`)

LSTM, GRU and RNN have gates between the product and the output: there e = W (x - x'), and E = W (C - H') with C = sum of x x'^T. The
outputs cost less: E has as many rows as the weight, C as many as columns, nine times as many for a Conv of 3 x 3, and the original's
inputs need no unfolding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import numpy as np

from onnxshrink.graph.lowering import Lowering
from onnxshrink.graph.sources import Lowerings, Running
from onnxshrink.graph.weights import Weight
from onnxshrink.numerics.gram import Gram, GramSum, PairedGram
from onnxshrink.numerics.products import Products, ProductSum

__all__ = ["PairedSums", "Pairing"]

Array = np.ndarray[Any, np.dtype[Any]]
Values = Mapping[str, Array]
Names = tuple[str, ...]
Group = Sequence[Lowerings]


@dataclass(frozen=True)
class Pairing:
    """A rewritten graph and the original.

    Attributes:
        now: the graph that is being rewritten.
        before: the original.
        twins: the original's lowerings by those of ``now``.
        added: by site of a weight, for each of its lowerings, the names of the node's output and of what is added to it.
    """

    now: Running
    before: Running
    twins: Mapping[Lowering, Lowering]
    added: Mapping[str, tuple[Names, ...]]

    def wanted(self, group: Group, jobs: Mapping[Lowerings, Sequence[Weight]]) -> tuple[list[str], list[str]]:
        """Returns the names of all tensors that sums of a group are made from, here and in the original."""
        now = {name for job in group for name in self.now.wanted(job)}
        before = {name for one, names, _ in self.parts(group, jobs) if not names for name in self.before.wanted([self.twins[one]])}
        compared = {name for _, names, _ in self.parts(group, jobs) for name in names}
        return sorted(now | compared), sorted(before | compared)

    def parts(self, group: Group, jobs: Mapping[Lowerings, Sequence[Weight]]) -> Iterator[tuple[Lowering, Names, int]]:
        """Yields (lowering, names of tensors that give errors or none where inputs do, rows of E or C) for each sum."""
        for job in group:
            for weight in jobs[job]:
                for one, names in self.ways(weight, job):
                    yield one, names, weight.layout.shape[0] // one.groups if names else one.columns

    def ways(self, weight: Weight, job: Lowerings) -> Iterator[tuple[Lowering, Names]]:
        """Yields the lowerings of a weight, with the names of tensors that give errors; none where inputs do."""
        for one, names in zip(job, self.added[weight.site], strict=True):
            yield one, names if one.is_linear else ()

    def nbytes(self, job: Lowerings, jobs: Mapping[Lowerings, Sequence[Weight]]) -> dict[object, int]:
        """Returns the bytes that the sums of a job hold while they are being made, by what sums are shared by."""
        held: dict[object, int] = {one: GramSum.nbytes(one.groups, one.columns) for one in job}
        for one, names, rows in self.parts([job], jobs):
            held[one, names] = ProductSum.nbytes(one.groups, rows, one.columns)
        return held


class PairedSums:
    """Sums of a group of layers."""

    def __init__(self, pairing: Pairing, group: Group, jobs: Mapping[Lowerings, Sequence[Weight]]) -> None:
        """Empty sums.

        Args:
            pairing: the graphs.
            group: some of the keys of ``jobs``.
            jobs: weights by their lowerings.
        """
        self._pairing = pairing
        self._jobs = {job: jobs[job] for job in group}
        title = pairing.now.title
        self.grams = {one: GramSum(title(one), one.groups, one.columns) for job in group for one in job}
        self._products: dict[Lowering, dict[Names, ProductSum]] = {one: {} for one in self.grams}
        for one, names, rows in pairing.parts(group, jobs):
            if names not in self._products[one]:
                owner = f"output '{names[0]}' of a layer" if names else title(one)
                self._products[one][names] = ProductSum(owner, one.groups, rows, one.columns)

    def add(self, values: Values, originals: Values) -> None:
        """Adds a sample.

        Args:
            values: of the tensors that `Pairing.wanted` names, by name.
            originals: those of the original.

        Raises:
            ValueError: a value is not finite, or a tensor has another shape than in the original.
        """
        for one, gram in self.grams.items():
            products = self._products[one]
            errors = {names: self._errors(one, names, values, originals) for names in products}
            done = 0
            for chunk in one.chunks(self._pairing.now.values(one, values)):
                block = slice(done, done := done + chunk.shape[1])
                gram.add(chunk)
                for names, total in products.items():
                    total.add(errors[names][:, block], chunk)

    def result(self) -> list[tuple[Weight, PairedGram]]:
        """Returns the moments of each weight, summed over the places where it is used; nothing can be added after."""
        grams = {one: total.result() for one, total in self.grams.items()}
        products = {
            (one, names): total.result() for one, by_names in self._products.items() for names, total in by_names.items()
        }
        found = []
        for job, weights in self._jobs.items():
            for weight in weights:
                parts = [
                    _of_outputs(grams[one], products[one, names]) if names else _of_inputs(weight, grams[one], products[one, names])
                    for one, names in self._pairing.ways(weight, job)
                ]
                found.append((weight, reduce(add, parts)))
        return found

    def _errors(self, one: Lowering, names: Names, values: Values, originals: Values) -> Array:
        """Returns e, or x where inputs are compared: [groups, positions, ...]."""
        if names:
            return one.outputs(_difference(names, values, originals))
        twin = self._pairing.twins[one]
        mine, theirs = self._pairing.now.values(one, values), self._pairing.before.values(twin, originals)
        for now, before in zip(mine.values(), theirs.values(), strict=True):
            _check_shapes(self._pairing.now.title(one), now, before)
        chunks = list(twin.chunks(theirs))
        return chunks[0] if len(chunks) == 1 else np.concatenate(chunks, axis=1)


def _of_outputs(now: Gram, products: Products) -> PairedGram:
    return PairedGram(now, products.matrix, products.mean)


def _of_inputs(weight: Weight, now: Gram, cross: Products) -> PairedGram:
    """Returns the moments with the errors that changed inputs alone cause."""
    matrix = weight.layout.forward(weight.constant.values).astype(np.float64)
    grouped = matrix.reshape(len(now.matrix), -1, matrix.shape[1])
    mean: Array = np.matmul(grouped, (cross.mean - now.mean)[..., None])[..., 0]
    return PairedGram(now, np.matmul(grouped, cross.matrix - now.matrix), mean)


def _difference(names: Iterable[str], values: Values, originals: Values) -> Array:
    """Returns what tensors of the first one's shape lack together; the others are broadcast and left out."""
    output, *added = names
    total = _lack(output, values, originals)
    for name in added:
        if values[name].shape == total.shape:
            total = total + _lack(name, values, originals)
    return total


def _lack(name: str, values: Values, originals: Values) -> Array:
    now, before = values[name], originals[name]
    _check_shapes(f"'{name}'", now, before)
    exact = now.dtype == np.float64
    with np.errstate(over="ignore", invalid="ignore"):
        change = before - now if exact else before.astype(np.float32) - now.astype(np.float32)
    lack: Array = np.where(before == now, change.dtype.type(0), change)  # infinities that stay, of a mask, lack nothing
    return lack


def _check_shapes(title: str, value: Array, original: Array) -> None:
    """Refuses activations that have other shapes than in the original: their positions would not be the same ones."""
    if value.shape != original.shape:
        shapes = f"shape {list(original.shape)} in the original and {list(value.shape)} in its copy"
        raise ValueError(f"{title} has {shapes}: they cannot be compared position by position")
