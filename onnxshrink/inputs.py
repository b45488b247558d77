"""What people hand over as calibration or evaluation data, checked and cut into samples.

    samples = read_inputs("calib.npz", running.inputs)   # running: a session of the original
    calibration, holdout = samples.split(0.8)

* ``inputs.npz`` or a dict of arrays, one per graph input. Where all have their input's rank and one common length N on
  axis 0, and N is more than the model's own fixed length B there (1 if it has none): N / B samples of B rows. Else one
  sample, arrays as they are.
* A folder of ``.npz``: one sample a file, sorted by name, read when needed.
* An ONNX ``test_data_set_*`` folder, or a folder of such: one sample each; ``input_0.pb`` ... are the required inputs
  in order, unless a tensor carries an input's name.
* An iterable of dicts: one sample each.

An array called ``labels``, ``label`` or ``y`` that is no input is kept beside the feeds, as class labels; every other
unknown name is an error. Nothing is cast: a wrong dtype is an error too, and so is NaN. All samples are checked before
the first is used.
"""

from __future__ import annotations

import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from google.protobuf.message import DecodeError
from onnx import TensorProto, numpy_helper

from onnxshrink.errors import InputsError, must
from onnxshrink.graph.ir import freeze
from onnxshrink.options import did_you_mean
from onnxshrink.runtime import InputSpec, is_floating

__all__ = ["Feeds", "InputSource", "Samples", "read_inputs"]

Array = np.ndarray[Any, np.dtype[Any]]
Feeds = Mapping[str, Array]
InputSource = str | os.PathLike[str] | Feeds | Iterable[Feeds]

_LABELS = ("labels", "label", "y")
# what numpy, zipfile and protobuf raise on damaged files; RuntimeError: encrypted, MemoryError: a lying header
_UNREADABLE = (
    *(OSError, ValueError, TypeError, EOFError, KeyError, RuntimeError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, DecodeError),
)


class Samples(Sequence[Feeds]):
    """An immutable sequence of feeds (dict: input name -> array), each made when asked for.

    Attributes:
        source: where they come from, for people.
    """

    def __init__(
        self,
        load: Callable[[int], Feeds],
        indices: Sequence[int],
        source: str,
        load_labels: Callable[[int], Array | None] = lambda index: None,
    ) -> None:
        """Samples made by functions.

        Args:
            load: returns the feeds of an index, the same every time.
            indices: of the samples, in order.
            source: where they come from, for people.
            load_labels: returns the class labels of an index, or None.
        """
        self._load = load
        self._indices = tuple(indices)
        self._load_labels = load_labels
        self.source = source

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Feeds: ...
    @overload
    def __getitem__(self, index: slice) -> Samples: ...
    def __getitem__(self, index: int | slice) -> Feeds | Samples:
        if isinstance(index, slice):
            return Samples(self._load, self._indices[index], self.source, self._load_labels)
        return self._load(self._indices[index])

    def __iter__(self) -> Iterator[Feeds]:
        return map(self._load, self._indices)

    def __repr__(self) -> str:
        return f"<{len(self)} samples from {self.source}>"

    def labels(self, index: int) -> Array | None:
        """Returns the class labels that came with a sample, flat, or None."""
        labels = self._load_labels(self._indices[index])
        return None if labels is None else labels.reshape(-1)

    def split(self, share: float) -> tuple[Samples, Samples]:
        """Returns (calibration, holdout), disjoint and interleaved, so that sorted data stays mixed in both.

        Args:
            share: of the calibration part, between 0 and 1; both parts get at least one sample.

        Raises:
            InputsError: the share is out of range, or there is only one sample.
        """
        if not 0 < share < 1:
            raise InputsError(must("inputs", "split share", "between 0 and 1, both excluded", share))
        if (count := len(self)) < 2:
            raise InputsError(must(self.source, "number of samples to split", "at least 2", count))
        first = min(max(round(count * share), 1), count - 1)
        parts: tuple[list[int], list[int]] = ([], [])
        for position, index in enumerate(self._indices):  # Bresenham's line: the first part grows evenly
            chosen = (position + 1) * first // count > position * first // count
            parts[0 if chosen else 1].append(index)
        calibration, holdout = (Samples(self._load, part, self.source, self._load_labels) for part in parts)
        return calibration, holdout

    def take(self, positions: Sequence[int]) -> Samples:
        """Returns the samples at some positions, in that order."""
        return Samples(self._load, [self._indices[position] for position in positions], self.source, self._load_labels)

    def fold(self, index: int, count: int) -> tuple[Samples, Samples]:
        """Returns (the rest, every ``count``-th sample from ``index`` on), as cross-validation parts them."""
        every = range(len(self))
        return self.take([position for position in every if position % count != index]), self.take(every[index::count])


def read_inputs(source: InputSource, specs: Sequence[InputSpec]) -> Samples:
    """Returns the samples of a source, every one of them checked against the model's inputs.

    Args:
        source: see the module.
        specs: the model's inputs, as ``Session.inputs`` gives them.

    Raises:
        InputsError: nothing is there, a file cannot be read, or a sample does not fit the model.
    """
    if isinstance(source, Samples):
        samples = _checked(source.__getitem__, len(source), source.source, specs, source.labels)
    elif isinstance(source, str | os.PathLike):
        samples = _read_path(Path(source), specs)
    elif isinstance(source, Mapping):
        samples = _cut({name: np.asarray(value) for name, value in source.items()}, specs, "inputs")
    elif isinstance(source, Iterable):
        samples = _from_items(source, specs)
    else:
        raise InputsError(must("inputs", "source", "a path, or one or more dicts of arrays", type(source).__name__))
    if not samples:
        raise InputsError(must(samples.source, "number of samples", "at least 1", 0))
    for _ in samples:  # every check, now rather than an hour later
        pass
    return samples


def _read_path(path: Path, specs: Sequence[InputSpec]) -> Samples:
    if path.is_dir():
        return _read_folder(path, specs)
    if not path.exists():
        raise InputsError(f"{path}: cannot be read: there is no such file or folder")
    if path.suffix != ".npz":
        way_out = f"np.savez(path, **{{'{specs[0].name}': array}}) makes one" if specs else ""
        raise InputsError(must(str(path), "inputs", "a .npz file or a folder", f"a '{path.suffix}' file", way_out))
    return _cut(_read_npz(path), specs, str(path))


def _read_folder(path: Path, specs: Sequence[InputSpec]) -> Samples:
    required = [spec.name for spec in specs if not spec.optional]
    sets = [path] if any(path.glob("input_*.pb")) else sorted(path.glob("test_data_set_*"), key=_natural)
    if sets:
        return _checked(lambda index: _read_test_data(sets[index], required), len(sets), str(path), specs, names=sets)
    files = sorted(path.glob("*.npz"))
    if not files:
        raise InputsError(must(str(path), "folder", "one of .npz files or of test_data_set_* folders", "none of them"))
    return _checked(
        lambda index: _read_npz(files[index]),
        *(len(files), str(path), specs),
        lambda index: _labels_of(_read_npz(files[index], _LABELS), specs),
        files,
    )


def _read_npz(path: Path, only: Sequence[str] | None = None) -> dict[str, Array]:
    """Returns the arrays of a file, or those called ``only`` that it has."""
    name = None
    try:
        with path.open("rb") as opened:
            if not zipfile.is_zipfile(opened):
                raise ValueError("it is not what np.savez writes, or truncated")
        with np.load(path, allow_pickle=False) as file:
            arrays: dict[str, Array] = {}
            for name in file.files:
                if only is None or name in only:
                    arrays[name] = file[name]
                    if not isinstance(arrays[name], np.ndarray):  # numpy gives the bytes of members it does not know
                        raise ValueError("it is no array")
            return arrays
    except _UNREADABLE as error:
        where = f"{path}: array '{name}'" if name else str(path)
        if "allow_pickle" in str(error):
            raise InputsError(f"{where}: holds pickled Python objects, which are refused; save plain arrays") from error
        raise InputsError(f"{where}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _read_test_data(folder: Path, required: Sequence[str]) -> dict[str, Array]:
    """Returns the inputs of a test data set: by the tensor's own name where that is an input, else by position."""
    files = sorted(folder.glob("input_*.pb"), key=_natural)
    arrays: dict[str, Array] = {}
    for position, file in enumerate(files):
        tensor = TensorProto()
        try:
            tensor.ParseFromString(file.read_bytes())
            if tensor.data_location == TensorProto.EXTERNAL:
                raise ValueError("external data is not supported here")
            array = numpy_helper.to_array(tensor)
        except _UNREADABLE as error:
            raise InputsError(f"{file}: cannot be read as a TensorProto: {error}") from error
        if tensor.name not in required and position >= len(required):
            raise InputsError(must(str(folder), "number of input_*.pb files", f"{len(required)}", len(files)))
        arrays[tensor.name if tensor.name in required else required[position]] = array
    return arrays


def _from_items(items: Iterable[object], specs: Sequence[InputSpec]) -> Samples:
    arrays: list[dict[str, Array]] = []
    for index, item in enumerate(items):
        if not isinstance(item, Mapping):
            way_out = f"{{'{specs[0].name}': array}} is one" if specs else ""
            raise InputsError(must("inputs", f"sample {index}", "a dict of arrays", type(item).__name__, way_out))
        arrays.append({name: np.asarray(value) for name, value in item.items()})
    return _checked(arrays.__getitem__, len(arrays), "inputs", specs, lambda index: _labels_of(arrays[index], specs))


def _cut(arrays: Mapping[str, Array], specs: Sequence[InputSpec], owner: str) -> Samples:
    """Returns the samples of stacked arrays, or the one sample that they are."""
    ranks = {spec.name: len(spec.shape) for spec in specs}
    fed = {name: array for name, array in arrays.items() if name in ranks}
    fixed = {spec.shape[0] for spec in specs if spec.name in fed and spec.shape and isinstance(spec.shape[0], int)}
    lengths = {array.shape[0] if array.ndim and array.ndim == ranks[name] else None for name, array in fed.items()}
    labels = _labels_of(arrays, specs)
    length, size = lengths.pop() if len(lengths) == 1 else None, fixed.pop() if fixed else 1
    if length == 0:
        raise InputsError(must(owner, "number of samples", "at least 1", 0))
    if fixed or length is None or length <= size:  # two different fixed lengths cannot both be cut from N
        return _checked(lambda index: arrays, 1, owner, specs, lambda index: labels)
    if length % size:
        raise InputsError(must(owner, "number of rows", f"a multiple of {size}, the model's batch size", length))
    if labels is not None and len(labels) != length:
        raise InputsError(must(owner, "number of labels", f"{length}, one for each row", len(labels)))

    def rows(index: int) -> slice:
        return slice(index * size, (index + 1) * size)

    return _checked(
        lambda index: {name: array[rows(index)] if name in fed else array for name, array in arrays.items()},
        *(length // size, owner, specs),
        lambda index: None if labels is None else labels[rows(index)],
    )


def _checked(
    read: Callable[[int], Mapping[str, Array]],
    count: int,
    source: str,
    specs: Sequence[InputSpec],
    labels: Callable[[int], Array | None] = lambda index: None,
    names: Sequence[Path] | None = None,
) -> Samples:
    """Returns samples that are checked whenever one is made; ``names`` are the files to blame."""

    def load(index: int) -> Feeds:
        return _fit(read(index), specs, str(names[index]) if names else f"{source}: sample {index}")

    return Samples(load, range(count), source, labels)


def _fit(arrays: Mapping[str, Array], specs: Sequence[InputSpec], owner: str) -> Feeds:
    """Returns the feeds among the arrays of a sample, read-only.

    Raises:
        InputsError: a name, dtype, shape or value does not fit.
    """
    known = [spec.name for spec in specs]
    required = [spec.name for spec in specs if not spec.optional]
    if unknown := [name for name in arrays if name not in known and name not in _LABELS]:
        names = ", ".join(f"'{name}'" for name in unknown)
        raise InputsError(f"{owner}: {names} is no input of the model; {did_you_mean(unknown[0], required)}")
    if missing := [name for name in required if name not in arrays]:
        names = ", ".join(f"'{name}'" for name in missing)
        raise InputsError(must(owner, "inputs", "complete", f"no array for {names}", f"there are: {', '.join(arrays)}"))
    sizes: dict[str, tuple[int, str]] = {}
    return {spec.name: _fit_one(arrays[spec.name], spec, sizes, owner) for spec in specs if spec.name in arrays}


def _fit_one(array: Array, spec: InputSpec, sizes: dict[str, tuple[int, str]], owner: str) -> Array:
    what = f"input '{spec.name}'"
    array = _typed(array, spec)
    if array.dtype != spec.dtype:
        got = array.dtype.name if array.dtype.isnative else array.dtype.str
        raise InputsError(must(owner, what, spec.dtype.name, got, f"array.astype('{spec.dtype.name}') converts it"))
    fits = len(array.shape) == len(spec.shape) and all(
        not isinstance(want, int) or want == got for want, got in zip(spec.shape, array.shape, strict=True)
    )
    if not fits:
        want = "[" + ", ".join("?" if dim is None else str(dim) for dim in spec.shape) + "]"
        way_out = "array[None] adds the sample axis" if array.ndim == len(spec.shape) - 1 else ""
        raise InputsError(must(owner, what, f"of shape {want}", list(array.shape), way_out))
    for axis, (dim, size) in enumerate(zip(spec.shape, array.shape, strict=True)):
        if isinstance(dim, str):
            before, other = sizes.setdefault(dim, (size, what))
            if size != before:
                raise InputsError(must(owner, what, f"{before} long on axis {axis} ('{dim}', as in {other})", size))
    if is_floating(spec.dtype) and not np.isfinite(array).all():
        raise InputsError(must(owner, what, "finite", "NaN or infinity"))
    return freeze(array)


def _typed(array: Array, spec: InputSpec) -> Array:
    """Undoes what numpy's files do to dtypes they have no name for: text gets a width, bfloat16 becomes 2 raw bytes."""
    if spec.dtype == object and array.dtype.kind == "U":
        return array.astype(object)
    if array.dtype.kind == "V" and spec.dtype.isbuiltin == 2 and array.dtype.itemsize == spec.dtype.itemsize:
        return array.view(spec.dtype)
    return array


def _labels_of(arrays: Mapping[str, Array], specs: Sequence[InputSpec]) -> Array | None:
    inputs = {spec.name for spec in specs}
    return next((arrays[name] for name in _LABELS if name in arrays and name not in inputs), None)


def _natural(path: Path) -> list[str | int]:
    """Sorts input_10 after input_9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]
