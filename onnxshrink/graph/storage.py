"""Tensors as they lie in a file: read when asked for, never changed, external data by memory map.

External data (onnx.proto, TensorProto.external_data) is a key/value list: ``location`` relative to the model's folder,
``offset`` and ``length`` in bytes. The ONNX documentation forbids locations outside the model's folder, and so does this reader.
"""

from __future__ import annotations

import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnxshrink.errors import ModelReadError, UnsupportedModelError, must

__all__ = ["External", "Stored", "element_type", "is_float", "locate", "raw_nbytes"]

Array = np.ndarray[Any, np.dtype[Any]]

_SUB_BYTE_BITS = {
    TensorProto.INT4: 4,
    TensorProto.UINT4: 4,
    TensorProto.FLOAT4E2M1: 4,
    **{getattr(TensorProto, name): 2 for name in ("INT2", "UINT2") if hasattr(TensorProto, name)},
    **{getattr(TensorProto, name): 6 for name in ("FLOAT6E2M3", "FLOAT6E3M2") if hasattr(TensorProto, name)},
}


@dataclass(frozen=True)
class External:
    """A byte range of a file beside the model: ``length`` bytes from ``offset``."""

    path: Path
    offset: int
    length: int

    def read(self) -> bytes:
        """Returns the bytes."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.length)


class Stored(LazyValues):  # type: ignore[misc]  # GraphSurgeon ships no types
    """A dense or sparse tensor of the file. The protobuf message is shared and must not be written to.

    Attributes:
        tensor: the message as it was read.
        external: where the bytes are, or None when they are in the message.
        shape: dimensions.
        dtype: element type, ml_dtypes' for those numpy lacks, object for strings.
    """

    def __init__(self, tensor: TensorProto | onnx.SparseTensorProto, external: External | None = None) -> None:
        self.tensor = tensor
        self.external = external
        self.shape = tuple(tensor.dims)
        if any(dim < 0 for dim in self.shape):
            raise ModelReadError(must(f"tensor '{self._elements.name}'", "dimensions", "at least 0", list(self.shape)))
        self.dtype = element_type(self._elements.data_type)
        self.nbytes = raw_nbytes(math.prod(self.shape), self.dtype)

    @property
    def is_sparse(self) -> bool:
        """Whether this came from sparse_initializer."""
        return isinstance(self.tensor, onnx.SparseTensorProto)

    def load(self) -> Array:
        """Returns the values, read-only. External data of whole bytes is mapped, everything else is read.

        Raises:
            ModelReadError: the data does not fit element type and dimensions, or external data is gone by now.
        """
        try:
            if isinstance(self.tensor, onnx.SparseTensorProto):
                values = _densify(self.tensor)
            elif self.external is None:
                values = numpy_helper.to_array(self.tensor)
            else:
                values = self._load_external(self.external)
        except (ValueError, TypeError, LookupError, OSError) as error:
            name = self._elements.name
            raise ModelReadError(f"tensor '{name}': its data must be {self.dtype} {list(self.shape)}, got: {error}") from error
        values.flags.writeable = False
        return values

    @property
    def _elements(self) -> TensorProto:
        return self.tensor.values if isinstance(self.tensor, onnx.SparseTensorProto) else self.tensor

    def _load_external(self, external: External) -> Array:
        data_type = self._elements.data_type
        if data_type in _SUB_BYTE_BITS or external.length == 0:  # packed elements cannot be mapped
            inline = TensorProto(dims=self.shape, data_type=data_type, raw_data=external.read())
            return numpy_helper.to_array(inline)
        mapped = np.memmap(external.path, np.uint8, "r", external.offset, (external.length,))
        return np.asarray(mapped).view(self.dtype.newbyteorder("<")).reshape(self.shape)


def element_type(data_type: int) -> np.dtype[Any]:
    """Returns the numpy (or ml_dtypes) type of a TensorProto.DataType.

    Raises:
        UnsupportedModelError: the installed onnx package does not know the number.
    """
    try:
        return helper.tensor_dtype_to_np_dtype(data_type)
    except (KeyError, ValueError) as error:
        raise UnsupportedModelError(
            f"model: tensor element type {data_type} is not known to onnx {onnx.__version__}; upgrade the onnx package"
        ) from error


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether a dtype is a floating-point type of at least 16 bits, ml_dtypes' bfloat16 included."""
    return dtype.name in ("float16", "bfloat16", "float32", "float64")


def raw_nbytes(size: int, dtype: np.dtype[Any]) -> int:
    """Returns the bytes that ``size`` elements take as raw_data; elements of less than a byte are packed (onnx.proto)."""
    if dtype == object:
        return 0
    return (size * _SUB_BYTE_BITS.get(helper.np_dtype_to_tensor_dtype(dtype), dtype.itemsize * 8) + 7) // 8


def locate(tensor: TensorProto, folder: Path | None) -> External | None:
    """Returns where a tensor's external data lies, checked, or None when the data is in the message.

    Args:
        tensor: the message.
        folder: the model's folder, or None when the model did not come from a file.

    Raises:
        ModelReadError: no folder is known, or the file is missing, outside the folder, or too short.
    """
    if tensor.data_location != TensorProto.EXTERNAL:
        return None
    entries: dict[str, Any] = {entry.key: entry.value for entry in tensor.external_data}  # bytes where it is no UTF-8
    location = entries.get("location", "")
    owner = f"tensor '{tensor.name}'"
    if folder is None:
        raise ModelReadError(f"{owner}: its external data '{location}' needs the model's folder; give the path of the model")
    path = folder / location
    root = os.path.realpath(folder)
    inside = isinstance(location, str) and location and "\0" not in location and not os.path.isabs(location)
    if not inside or os.path.commonpath([root, os.path.realpath(path)]) != root:
        raise ModelReadError(f"{owner}: external data '{location}' must lie inside the model's folder; refused")
    size = raw_nbytes(math.prod(tensor.dims), element_type(tensor.data_type))
    try:
        offset = int(entries.get("offset", 0))
        length = int(entries.get("length", size))
        status = path.stat()
    except ValueError as error:
        raise ModelReadError(f"{owner}: external data offset and length must be integers, got {entries}") from error
    except OSError as error:
        raise ModelReadError(f"{owner}: external data file '{location}' cannot be read: {error.strerror}") from error
    available = status.st_size if stat.S_ISREG(status.st_mode) else 0
    if length != size or min(offset, length) < 0 or offset + length > available:
        raise ModelReadError(
            f"{owner}: external data must be {size} bytes, got offset {offset} and length {length} in '{location}' of "
            f"{available} bytes; the file is truncated or does not belong to this model"
        )
    return External(path, offset, length)


def _densify(sparse: onnx.SparseTensorProto) -> Array:
    """Returns the dense array; indices are linear [NNZ] or coordinates [NNZ, rank] (onnx.proto, SparseTensorProto)."""
    values = numpy_helper.to_array(sparse.values)
    indices = numpy_helper.to_array(sparse.indices)
    if indices.ndim == 2:
        indices = np.ravel_multi_index(tuple(indices.T), tuple(sparse.dims)) if len(indices) else indices[:, 0]
    dense = np.zeros(math.prod(sparse.dims), values.dtype)
    dense[indices] = values
    return dense.reshape(tuple(sparse.dims))
