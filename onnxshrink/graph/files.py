"""Models from files and to files: external data stays on disk, and a file appears whole or not at all.

Protobuf limits a message to 2 GiB (protobuf.dev, "Total Size of the Message"), so larger models keep tensors in a second file,
``<model>.data``. It is written tensor by tensor, byte ranges of the source being copied by the kernel, so memory never holds
more than one tensor. Both files are written under temporary names and renamed at the end, data first.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto

from onnxshrink.errors import ModelReadError, OutputError
from onnxshrink.graph.exporter import framed_bytes, inline_tensor, shell_tensor, tensor_bytes, to_model
from onnxshrink.graph.importer import from_model
from onnxshrink.graph.ir import Constant, Graph
from onnxshrink.graph.storage import Stored

__all__ = ["MAX_MESSAGE_BYTES", "ModelSource", "atomic_file", "check_output", "load", "materialised", "model_bytes", "save", "source_paths"]

ModelSource = str | os.PathLike[str] | bytes | onnx.ModelProto
MAX_MESSAGE_BYTES = 2**31 - 1
_SMALL_TENSOR_BYTES = 1024  # stays in the message: shapes and scalars are needed there for shape inference
_ALIGNMENT = 16  # of every tensor in the data file: the widest element type
_PAGE, _PAGED_BYTES = 4096, 1 << 20  # larger tensors begin on a page, to be mapped (onnx.proto, external_data); padding must not show


def load(source: ModelSource) -> Graph:
    """Reads a model; weights in external data stay on disk.

    Args:
        source: a path, the bytes of a file, or a ModelProto, which is never changed.

    Raises:
        ModelReadError: the file is missing, empty, truncated or no ONNX model, or its external data is.
        UnsupportedModelError: something in the model could not be written back.
    """
    if isinstance(source, onnx.ModelProto):
        return from_model(source)
    if isinstance(source, bytes):
        return from_model(_parse(source, "bytes"))
    path = Path(source)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelReadError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        return from_model(_parse(data, str(path)), path.parent)
    except ModelReadError as error:
        message = str(error)
        raise ModelReadError(message if message.startswith(str(path)) else f"{path}: {message}") from error


def save(graph: Graph, path: str | os.PathLike[str], *, keep: Iterable[str | os.PathLike[str]] = ()) -> int:
    """Writes a model, atomically; large or formerly external tensors go to ``<path>.data`` when they must.

    Args:
        graph: only read.
        path: of the model file.
        keep: files that must not be replaced, beside those that the graph still reads.

    Returns:
        The bytes written, both files together.

    Raises:
        OutputError: the place cannot be written, the disk is full, or the output is a file to keep.
    """
    target = Path(path)
    protected = {os.path.realpath(source) for source in (*source_paths(graph), *keep)}
    data_target = target.with_name(target.name + ".data")
    for place in (target, data_target):
        if os.path.realpath(place) in protected:
            raise OutputError(f"{place}: the output must not replace a file of the input; choose another name")
    if not _needs_external(graph):
        with atomic_file(target) as file:
            return file.write(to_model(graph).SerializeToString(deterministic=True))
    with atomic_file(target) as file, atomic_file(data_target) as data:  # left in reverse: the data file is renamed first
        writer = _ExternalWriter(data, data_target.name)
        message_bytes = file.write(to_model(graph, writer).SerializeToString(deterministic=True))
        _to_disk(file)  # now, so that a full disk is noticed before the data file is renamed
        return message_bytes + data.tell()


@contextlib.contextmanager
def materialised(graph: Graph) -> Iterator[tuple[onnx.ModelProto | str, int]]:
    """Gives a model as a message, or as the path of a temporary file when it is too large for one, and its bytes."""
    if not _needs_external(graph):
        model = to_model(graph)
        yield model, model.ByteSize()
        return
    with tempfile.TemporaryDirectory(prefix="onnxshrink-") as folder:
        path = os.path.join(folder, "model.onnx")
        yield path, save(graph, path)


def model_bytes(graph: Graph) -> int:
    """Returns the bytes of the model with all its tensors inside, without building it; exact to a few length bytes."""
    constants = [constant for scope in graph.scopes() for constant in scope.graph.constants]
    constants = [constant for constant in constants if constant.stored is None or not constant.stored.is_sparse]
    shell_bytes = {id(constant): TensorProto(name=constant.name).ByteSize() for constant in constants}
    shells = to_model(graph, lambda constant: TensorProto(name=constant.name)).ByteSize()
    return shells + sum(
        framed_bytes(tensor_bytes(constant)) - framed_bytes(shell_bytes[id(constant)]) for constant in constants
    )


def source_paths(graph: Graph) -> set[Path]:
    """Returns the external data files that the graph still reads."""
    stored = (constant.stored for scope in graph.scopes() for constant in scope.graph.constants)
    return {item.external.path for item in stored if item is not None and item.external is not None}


def check_output(path: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]] = ()) -> None:
    """Checks, before any long work, that a result can be written there.

    Args:
        path: of the result.
        inputs: files that it must not replace.

    Raises:
        OutputError: the folder is missing or not writable, the path is a folder or a device, or it is one of the inputs.
    """
    target = Path(path)
    if any(os.path.realpath(target) == os.path.realpath(source) for source in inputs):
        raise OutputError(f"{target}: the output must not replace a file of the input; choose another name")
    with atomic_file(target, replace=False):
        pass


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], *, replace: bool = True) -> Iterator[BinaryIO]:
    """Opens a binary file under a temporary name in the same folder; renames it on success, removes it on any failure.

    Args:
        path: of the file in the end.
        replace: False only tries whether the place can be written, and leaves nothing.

    Raises:
        OutputError: the folder is missing or not writable, the path is a folder or a device, or the disk is full.
    """
    target = Path(path)
    temporary = None
    try:
        if target.exists() and not target.is_file():  # renaming onto /dev/null would replace it
            kind = "a folder" if target.is_dir() else "no regular file"
            raise OutputError(f"{target}: cannot be written: it is {kind}")
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
            temporary = Path(file.name)
            yield file  # type: ignore[misc]  # the wrapper has BinaryIO's methods
            _to_disk(file)
        if not replace:
            return
        os.chmod(temporary, 0o666 & ~_umask())  # temporary files are private; results follow the user's umask
        os.replace(temporary, target)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


class _ExternalWriter:
    """Writes tensors to the data file as the message is built, and puts references into the message."""

    def __init__(self, file: BinaryIO, location: str) -> None:
        self.file = file
        self.location = location

    def __call__(self, constant: Constant) -> TensorProto:
        stored = constant.stored
        if stored is None or stored.external is None:
            tensor = inline_tensor(constant)
            if constant.nbytes < _SMALL_TENSOR_BYTES or not tensor.HasField("raw_data"):
                return tensor
        reference = shell_tensor(constant)
        reference.data_location = TensorProto.EXTERNAL
        if stored is not None and isinstance(stored.tensor, TensorProto):
            if stored.tensor.HasField("doc_string"):
                reference.doc_string = stored.tensor.doc_string
            reference.metadata_props.extend(stored.tensor.metadata_props)
        step = _PAGE if constant.nbytes >= _PAGED_BYTES else _ALIGNMENT
        offset = -(-self.file.tell() // step) * step
        self.file.seek(offset)
        if stored is not None and stored.external is not None:
            _copy_range(stored, self.file)
        else:
            self.file.write(tensor.raw_data)
        entries = {"location": self.location, "offset": offset, "length": self.file.tell() - offset}
        for key, value in entries.items():
            reference.external_data.add(key=key, value=str(value))
        return reference


def _copy_range(stored: Stored, target: BinaryIO) -> None:
    """Copies an external tensor's bytes file to file, in pieces."""
    external = stored.external
    assert external is not None
    try:
        source = external.path.open("rb")
    except OSError as error:
        raise ModelReadError(f"{external.path}: cannot be read: {error.strerror}") from error
    with source:
        source.seek(external.offset)
        left = external.length
        while left:
            piece = source.read(min(left, 1 << 24))
            if not piece:
                raise ModelReadError(f"{external.path}: {left} bytes are missing; the file was cut while the model was open")
            target.write(piece)
            left -= len(piece)


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _needs_external(graph: Graph) -> bool:
    return bool(source_paths(graph)) or model_bytes(graph) > MAX_MESSAGE_BYTES


def _parse(data: bytes, owner: str) -> onnx.ModelProto:
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise ModelReadError(f"{owner}: not an ONNX model, or a truncated one: the protobuf does not parse") from error
    if not model.HasField("graph") or not model.ir_version:
        raise ModelReadError(f"{owner}: not an ONNX model: it must have a graph and an IR version")
    return model


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
