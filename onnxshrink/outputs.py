"""Outputs of many samples, in memory up to a budget and on disk beyond it."""

from __future__ import annotations

import math
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from typing import IO, Any, overload

import numpy as np

from onnxshrink.errors import OutputError

__all__ = ["OutputStore", "Outputs"]

Array = np.ndarray[Any, np.dtype[Any]]
Outputs = Mapping[str, Array]


class OutputStore(Sequence[Outputs]):
    """Outputs of many samples; those past the budget lie in a temporary file that vanishes with this object."""

    def __init__(self, memory_bytes: int) -> None:
        self._left = memory_bytes
        self._items: list[dict[str, Array | tuple[int, tuple[int, ...], np.dtype[Any]]]] = []
        self._file: IO[bytes] | None = None

    def append(self, outputs: Outputs) -> None:
        """Takes the outputs of the next sample."""
        self._items.append({name: self._keep(array) for name, array in outputs.items()})

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> Outputs: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Outputs]: ...
    def __getitem__(self, index: int | slice) -> Outputs | Sequence[Outputs]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        return {
            name: self._read(*item) if isinstance(item, tuple) else item for name, item in self._items[index].items()
        }

    def _keep(self, array: Array) -> Array | tuple[int, tuple[int, ...], np.dtype[Any]]:
        if array.nbytes <= self._left or not array.nbytes or array.dtype == object:  # text cannot go to a plain file
            self._left -= array.nbytes
            return array
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="onnxshrink-")  # noqa: SIM115  # lives as long as this object
                weakref.finalize(self, self._file.close)
            offset = self._file.seek(0, 2)
            self._file.write(array.tobytes())
        except OSError as error:
            raise OutputError(
                f"temporary file: outputs cannot be written: {error.strerror}; TMPDIR moves it"
            ) from error
        return offset, array.shape, array.dtype

    def _read(self, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        assert self._file is not None  # made by the `_keep` that gave this offset
        self._file.seek(offset)
        return np.frombuffer(self._file.read(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)
