"""Inputs made up from the graph, for when nobody hands over any. They prove less than real ones.

Floats are standard normal (between 0 and 1 should outputs else not be finite), booleans a coin. Integers follow their
use in the graph, seen through Cast, Reshape and the like, into bodies and local functions. One that

* indexes a table (Gather, OneHot): any row of the smallest such table;
* is compared by Equal with constants: one of them;
* has 8 bits, like pixels and bytes: its whole range;
* is a mask (by its name, or a Cast of it feeds Sub or Mul): 1;
* is a shape, a count or a length (Reshape, Expand, LSTM ...): 1;
* is used otherwise: 0 or 1.

Sizes that the model leaves open are guessed: 1 for whatever stands on axis 0, equal symbols alike, the others from a
ladder of usual sizes, first all the same, then combined, until ONNX Runtime runs the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from onnxshrink.errors import InputsError, ShrinkError, must
from onnxshrink.graph.ir import Constant, Graph, Node, Tensor, freeze
from onnxshrink.inputs import Feeds, Samples
from onnxshrink.runtime import InputSpec, Session, is_floating, is_integer

__all__ = ["synthetic_samples"]

Array = np.ndarray[Any, np.dtype[Any]]
Key = str | tuple[str, int]  # a symbol, or (input, axis) of a nameless dimension
Sizes = Mapping[Key, int]

_LADDER = (64, 224, 32, 320, 48, 16, 8, 128, 512, 1, 256, 640, 2, 4)
_MOST_COMBINATIONS = 350
_WAY_OUT = "give real inputs (--calib, --inputs)"
_SEEN_THROUGH = {
    *("Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Transpose", "Flatten"),
    *("Expand", "Tile", "Slice", "Split", "Concat"),
}
# where an integer is a shape, a count or a length (https://onnx.ai/onnx/operators): op -> input positions
_LENGTHS = {
    **dict.fromkeys(("Reshape", "Expand", "Tile", "TopK"), (1,)),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), (4,)),
    "ConstantOfShape": (0,),
    "Range": (0, 1, 2),
    "Resize": (3,),
    "Loop": (0,),
}


def synthetic_samples(graph: Graph, running: Session, count: int, seed: int = 0) -> Samples:
    """Returns seeded samples on which the model runs; each is drawn when asked for, the same every time.

    Args:
        graph: the original model, only read.
        running: a session of it.
        count: number of samples.
        seed: of all of them.

    Raises:
        InputsError: the count is below 1, an input's type cannot be made up, or no guess of the open sizes runs.
    """
    if count < 1:
        raise InputsError(must("synthetic inputs", "number of samples", "at least 1", count))
    specs = [spec for spec in running.inputs if not spec.optional]
    tensors = {tensor.name: tensor for tensor in graph.inputs}
    draws = {spec.name: _draw_for(spec, list(_uses(tensors[spec.name], graph))) for spec in specs}
    sizes = _find_sizes(specs, draws, running, seed)
    if not _all_finite(running.run(_sample(specs, draws, sizes, [seed, 0]))):
        tamer = {name: _Draw(uniform=True) if draw == _Draw() else draw for name, draw in draws.items()}
        if _all_finite(running.run(_sample(specs, tamer, sizes, [seed, 0]))):
            draws = tamer
    return Samples(
        lambda index: _sample(specs, draws, sizes, [seed, index]), range(count), f"synthetic inputs (seed {seed})"
    )


@dataclass(frozen=True)
class _Draw:
    """How to fill one input: from the values of ``pool``, or with ``low <= integer < high``, or with floats."""

    pool: tuple[Any, ...] = ()
    low: int = 0
    high: int = 0
    uniform: bool = False

    def __call__(self, rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        if self.pool:
            return np.array(self.pool, dtype)[rng.integers(len(self.pool), size=shape)].reshape(shape)
        if self.high > self.low:
            return rng.integers(self.low, self.high, shape).astype(dtype).reshape(shape)
        floats = rng.random(shape) if self.uniform else rng.standard_normal(shape)
        return np.asarray(floats).astype(dtype)


def _draw_for(spec: InputSpec, uses: Sequence[tuple[Node, int, bool]]) -> _Draw:
    """Returns how to fill an input, given the (node, input position, behind a Cast) that it reaches."""
    if is_floating(spec.dtype):
        return _Draw()
    if spec.dtype == object:
        lists = [node.attrs.get(key, []) for node, _, _ in uses for key in ("keys_strings", "cats_strings")]
        words = [word.decode() if isinstance(word, bytes) else word for known in lists for word in known]
        return _Draw(pool=tuple(words) or ("a",))
    if spec.dtype == bool:
        return _Draw(pool=(False, True))
    if not is_integer(spec.dtype):
        raise InputsError(
            must("synthetic inputs", f"input '{spec.name}'", "of a real number type", spec.dtype, _WAY_OUT)
        )
    low, high = 0, 1  # what fits in 2 and 4 bits, signed or not
    if spec.dtype.isbuiltin == 1:
        low, high = int(np.iinfo(spec.dtype).min), int(np.iinfo(spec.dtype).max)
    if rows := [bound for node, position, _ in uses if (bound := _table_rows(node, position)) is not None]:
        return _Draw(high=min(*rows, high + 1))
    compared = dict.fromkeys(value for node, _, _ in uses for value in _compared_with(node))
    if pool := tuple(value for value in compared if low <= value <= high):
        single = all(dim == 1 for dim in spec.shape)
        return _Draw(pool=pool[:1] if single else pool if len(pool) > 1 else (*pool, 0, 1))
    if spec.dtype.itemsize == 1:  # 8 bits and fewer: quantized data or bytes, no flags
        return _Draw(low=low, high=high + 1)
    is_mask = "mask" in spec.name.lower() or any(cast and node.op in ("Sub", "Mul") for node, _, cast in uses)
    if is_mask or any(position in _LENGTHS.get(node.op, ()) for node, position, _ in uses):
        return _Draw(pool=(1,))
    return _Draw(high=2)


def _uses(tensor: Tensor, graph: Graph) -> Iterator[tuple[Node, int, bool]]:
    """Yields (node, input position, behind a Cast) for every use of a tensor's values, moved but not computed with."""
    functions = {
        (function.residue.domain, function.name): function
        for function in graph.local_functions
        if isinstance(function.residue, onnx.FunctionProto)
    }
    seen: set[tuple[int, int]] = set()
    stack: list[tuple[Tensor, bool]] = [(tensor, False)]
    while stack:
        current, cast = stack.pop()
        for node in current.outputs:
            for position in (index for index, source in enumerate(node.inputs) if source is current):
                if (id(node), position) in seen:
                    continue
                seen.add((id(node), position))
                yield node, position, cast
                if node.op in _SEEN_THROUGH and (position == 0 or node.op == "Concat"):
                    stack.extend((output, cast or node.op == "Cast") for output in node.outputs)
                inner = [body for _, body in node.bodies()]
                if (function := functions.get((node.domain or "", node.op))) is not None:
                    inner.append(function)
                stack.extend((body.inputs[position], cast) for body in inner if position < len(body.inputs))


def _table_rows(node: Node, position: int) -> int | None:
    """Returns how many rows the table has that this input indexes, or None."""
    if position == 1 and node.op in ("Gather", "GatherElements"):
        shape, axis = node.inputs[0].shape, node.attrs.get("axis", 0)
        if shape is None or not isinstance(axis, int) or not -len(shape) <= axis < len(shape):  # set by a caller, or wrong
            return None
        rows = shape[axis]
        return rows if isinstance(rows, int) else None
    if position == 0 and node.op == "OneHot":
        depth = _constant_behind(node.inputs[1])
        return None if depth is None else int(depth.values.reshape(-1)[0])
    return None


def _compared_with(node: Node) -> list[int]:
    """Returns the constants that an Equal compares its other input with."""
    if node.op != "Equal":
        return []
    constants = [constant for tensor in node.inputs if (constant := _constant_behind(tensor)) is not None]
    return [int(value) for constant in constants for value in constant.values.reshape(-1)]


def _constant_behind(tensor: Tensor) -> Constant | None:
    """Returns the constant whose values, in some order, are a tensor's."""
    while not isinstance(tensor, Constant):
        if not tensor.inputs or tensor.inputs[0].op not in _SEEN_THROUGH - {"Concat", "Slice", "Split"}:
            return None
        tensor = tensor.inputs[0].inputs[0]
    return tensor


def _sample(specs: Sequence[InputSpec], draws: Mapping[str, _Draw], sizes: Sizes, seed: Sequence[int]) -> Feeds:
    rng = np.random.default_rng(seed)
    feeds = {}
    for spec in specs:
        shape = tuple(dim if isinstance(dim, int) else sizes[key] for key, dim in _keys(spec))
        feeds[spec.name] = freeze(draws[spec.name](rng, shape, spec.dtype))
    return feeds


def _find_sizes(specs: Sequence[InputSpec], draws: Mapping[str, _Draw], running: Session, seed: int) -> Sizes:
    """Returns the first guess of the open sizes with which the model runs."""
    reason = ""
    for number, sizes in enumerate(_guesses(specs), 1):
        try:
            running.run(_sample(specs, draws, sizes, [seed, 0]))
        except ShrinkError as error:
            reason = f"{number} guesses at the open sizes, the last with {_show(sizes)}: {error}"
        else:
            return sizes
    raise InputsError(f"synthetic inputs: the model runs with none of {reason}; {_WAY_OUT}")


def _guesses(specs: Sequence[InputSpec]) -> Iterator[Sizes]:
    """Yields sizes for all open dimensions, likely ones first; 1 for many comes late, for broadcasting hides mistakes."""
    opened = dict.fromkeys(key for spec in specs for key, dim in _keys(spec) if not isinstance(dim, int))
    batch = {key: 1 for spec in specs for key, dim in _keys(spec)[:1] if not isinstance(dim, int)}
    free = [key for key in opened if key not in batch]
    if not free:
        yield batch
    else:
        yield from ({**batch, **dict.fromkeys(free, size)} for size in _LADDER if size > 1)
        choices = itertools.islice(_combinations(len(free)), _MOST_COMBINATIONS)
        yield from ({**batch, **dict(zip(free, choice, strict=True))} for choice in choices)
        yield {**batch, **dict.fromkeys(free, 1)}
    if batch:
        yield from (dict.fromkeys(opened, size) for size in _LADDER)


def _combinations(length: int) -> Iterator[tuple[int, ...]]:
    """Yields ladder sizes for several dimensions, those low on the ladder first, none of them all alike."""
    for total in range(1, length * (len(_LADDER) - 1)):
        yield from (tuple(_LADDER[step] for step in steps) for steps in _steps(length, total) if len(set(steps)) > 1)


def _steps(length: int, total: int) -> Iterator[tuple[int, ...]]:
    """Yields the tuples of ``length`` steps on the ladder that sum to ``total``."""
    if length == 1:
        if total < len(_LADDER):
            yield (total,)
        return
    for first in range(min(total, len(_LADDER) - 1) + 1):
        yield from ((first, *rest) for rest in _steps(length - 1, total - first))


def _keys(spec: InputSpec) -> list[tuple[Key, int | str | None]]:
    """Returns (key, dimension) for each axis; the key of a fixed dimension is not used."""
    return [(dim if isinstance(dim, str) else (spec.name, axis), dim) for axis, dim in enumerate(spec.shape)]


def _all_finite(outputs: Mapping[str, Array]) -> bool:
    return all(np.isfinite(array.astype(np.float64)).all() for array in outputs.values() if is_floating(array.dtype))


def _show(sizes: Sizes) -> str:
    """Returns sizes as text: ``seq=64, x[2]=32``."""
    named = ((key if isinstance(key, str) else f"{key[0]}[{key[1]}]", size) for key, size in sizes.items())
    return ", ".join(f"{name}={size}" for name, size in named) or "fixed shapes"
