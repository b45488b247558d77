"""Models in ONNX Runtime: a typed session on the CPU, every output an array, every failure one line.

    with session("model.onnx") as running:
        outputs = running.run({"x": x})  # dict: output name -> array

What ONNX Runtime 1.31 does with types, tried (the API is at https://onnxruntime.ai/docs/api/python/api_summary.html):

* numpy arrays of bfloat16, float8 and 4 or 2-bit elements are refused as inputs and cannot be read as outputs, but
  their raw bytes can be written to and read from an OrtValue. They are laid out as TensorProto.raw_data (onnx.proto).
* A big-endian array is read as if it were little-endian, in silence: byte order is checked here.
* Outputs that are no tensors arrive as Python lists and dicts. They are given stable names: a sequence ``out`` becomes
  ``out[0]``, ``out[1]``, ...; a map, or the sequence of maps of a scikit-learn classifier (ZipMap), becomes the array
  of its values ``out`` [N, keys] and ``out.keys`` [keys]; an absent optional output is left out.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from onnxshrink.errors import ModelReadError, ShrinkError, UnsupportedModelError, ValidationError, must
from onnxshrink.graph.files import MAX_MESSAGE_BYTES, load, materialised
from onnxshrink.graph.ir import Graph
from onnxshrink.graph.storage import element_type

__all__ = ["AnyModel", "InputSpec", "Role", "Session", "is_floating", "is_integer", "plain_session", "session"]

Array = np.ndarray[Any, np.dtype[Any]]
AnyModel = str | os.PathLike[str] | bytes | onnx.ModelProto | Graph
Role = Literal["original", "candidate"]

_ERRORS: dict[Role, type[ShrinkError]] = {"original": UnsupportedModelError, "candidate": ValidationError}
_LONGEST_REASON = 500
_FATAL = 4  # OrtLoggingLevel: everything less goes to stderr from C++; what matters comes as an exception
_ELEMENT = re.compile(r"(?:optional\()?tensor\((\w+)\)\)?")
_SEQUENCE_OF_MAPS = re.compile(r"(?:seq\()?map\((\w+),tensor\((\w+)\)\)\)?")


@dataclass(frozen=True)
class InputSpec:
    """One input of a model.

    Attributes:
        name: of the graph input.
        dtype: element type, ml_dtypes' for those numpy lacks, object for strings.
        shape: a number, a symbol, or None for each dimension; symbols of one model that are equal mean equal sizes.
        optional: whether it may be left out: an initializer listed as input, or an input of ONNX's optional type.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]
    optional: bool = False


class Session:
    """A model loaded on the CPU with the default optimisations. Made by `session`; closing it frees memory and files.

    Attributes:
        inputs: required inputs in the order of the graph, then optional ones.
        outputs: names of the graph outputs.
        start_ms: milliseconds that ONNX Runtime took to load, optimise and prepare the model.
    """

    def __init__(
        self, source: str | bytes, threads: int | None, role: Role, cleanup: Callable[[], None] = lambda: None
    ) -> None:
        self.role = role
        self._cleanup = weakref.finalize(self, cleanup)
        options: Any = onnxruntime.SessionOptions()
        options.log_severity_level = _FATAL
        options.intra_op_num_threads = threads or 0  # 0 lets ONNX Runtime choose
        start = time.perf_counter()
        try:
            self._ort: Any = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions share no base class of their own
            self.close()
            raise self._error("load", error) from None
        self.start_ms = (time.perf_counter() - start) * 1000
        required = [self._spec(value, optional=value.type.startswith("optional")) for value in self._ort.get_inputs()]
        overridable = [self._spec(value, optional=True) for value in self._ort.get_overridable_initializers()]
        self.inputs: tuple[InputSpec, ...] = (*required, *overridable)
        self._types: dict[str, str] = {value.name: value.type for value in self._ort.get_outputs()}
        self.outputs: tuple[str, ...] = tuple(value.name for value in self._ort.get_outputs())
        self._exotic = {spec.name: spec for spec in self.inputs if _is_exotic(spec.dtype)}

    def run(self, feeds: Mapping[str, Array], names: Sequence[str] | None = None) -> dict[str, Array]:
        """Returns the outputs by name, all of them or those of ``names``; see the module for what is no tensor.

        Args:
            feeds: arrays by input name, of the inputs' dtypes in native byte order.
            names: graph outputs.

        Raises:
            UnsupportedModelError: the original model fails on these inputs.
            ValidationError: a candidate fails on them.
        """
        wanted = list(self.outputs if names is None else names)
        for name, array in feeds.items():
            if not array.dtype.isnative:
                raise self._error("run", f"input '{name}' must be in native byte order, got {array.dtype}")
        exotic = any(_is_exotic_type(self._types.get(name, "")) for name in wanted)
        try:
            values = self._run_values(feeds, wanted) if exotic else self._ort.run(wanted, self._feeds(feeds))
        except Exception as error:  # see above
            raise self._error("run", error) from None
        outputs: dict[str, Array] = {}
        for name, value in zip(wanted, values, strict=True):
            for key, array in _flatten(name, value, self._types[name]):
                if key in outputs:
                    raise self._error("compare", f"two of its outputs would be called '{key}'")
                outputs[key] = array
        return outputs

    def close(self) -> None:
        """Frees the memory and the temporary folder; running is over."""
        self._ort = None
        self._cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _feeds(self, feeds: Mapping[str, Array]) -> dict[str, Any]:
        return {name: _to_value(array) if name in self._exotic else array for name, array in feeds.items()}

    def _run_values(self, feeds: Mapping[str, Array], names: list[str]) -> list[Any]:
        """Runs with raw values, the only way to outputs that numpy has no type for."""
        values = {name: _to_value(array) for name, array in feeds.items()}
        return [_from_value(value) for value in self._ort.run_with_ort_values(names, values)]

    def _spec(self, value: Any, optional: bool) -> InputSpec:
        match = _ELEMENT.fullmatch(value.type)
        if match is None:
            raise _ERRORS[self.role](must(f"{self.role} model", f"input '{value.name}'", "a tensor", value.type))
        shape = tuple(_dim(dim) for dim in value.shape)
        return InputSpec(value.name, element_type(getattr(TensorProto, match[1].upper())), shape, optional)

    def _error(self, verb: str, cause: object) -> ShrinkError:
        return _ERRORS[self.role](f"{self.role} model: ONNX Runtime cannot {verb} it: {_reason(str(cause))}")


def session(model: AnyModel, threads: int | None = None, role: Role = "candidate") -> Session:
    """Loads a model in ONNX Runtime, on the CPU, with nothing printed.

    Args:
        model: a path, the bytes of a file, a ModelProto or a graph; only read. A graph of 2 GiB and more, or one with
            external data, goes through a temporary folder, which is removed when the session is closed or collected.
        threads: within an op, or None for ONNX Runtime's choice.
        role: what to call the model in errors, and which error to raise.

    Raises:
        ModelReadError: there is no such file.
        UnsupportedModelError: the original cannot be loaded.
        ValidationError: the candidate cannot be loaded.
    """
    if isinstance(model, onnx.ModelProto) and (_has_external(model) or model.ByteSize() > MAX_MESSAGE_BYTES):
        model = load(model)
    if isinstance(model, Graph):
        with contextlib.ExitStack() as stack:
            model, _ = stack.enter_context(materialised(model))
            if isinstance(model, str):
                files = stack.pop_all()
                return Session(model, threads, role, files.close)
    if isinstance(model, onnx.ModelProto):
        return Session(model.SerializeToString(), threads, role)
    if not isinstance(model, bytes) and not Path(model).is_file():
        raise ModelReadError(f"{os.fspath(model)}: cannot be read: there is no such file")
    return Session(model if isinstance(model, bytes) else os.fspath(model), threads, role)


def plain_session(graph: Graph, **options: Any) -> Any:
    """Returns an onnxruntime.InferenceSession of a graph, for callers who want that and not ours.

    Args:
        graph: only read.
        options: of InferenceSession; the CPU provider by default.

    Raises:
        UnsupportedModelError: ONNX Runtime cannot load it.
    """
    options.setdefault("providers", ["CPUExecutionProvider"])
    with materialised(graph) as (model, _):  # ONNX Runtime keeps external data open or mapped: the files may go
        source = model if isinstance(model, str) else model.SerializeToString()
        try:
            return onnxruntime.InferenceSession(source, **options)
        except Exception as error:  # its exceptions share no base class of their own
            reason = _reason(str(error))
            raise UnsupportedModelError(f"model: ONNX Runtime cannot load it: {reason}") from None


def is_floating(dtype: np.dtype[Any]) -> bool:
    """Whether elements are real floating-point numbers, ml_dtypes' included.

    >>> is_floating(np.dtype("float16")), is_floating(np.dtype("int8"))
    (True, False)
    """
    return dtype.kind == "f" or dtype.name.startswith(("bfloat", "float"))


def is_integer(dtype: np.dtype[Any]) -> bool:
    """Whether elements are integers, ml_dtypes' 4 and 2-bit ones included; booleans are none."""
    return dtype.kind in "iu" or dtype.name.startswith(("int", "uint"))


def _has_external(model: onnx.ModelProto) -> bool:
    return any(tensor.data_location == TensorProto.EXTERNAL for tensor in model.graph.initializer)


def _dim(dim: int | str | None) -> int | str | None:
    """Returns None for the ways exporters write "unknown": Paddle's -1 and "?", CoreML's "None"."""
    if isinstance(dim, str):
        return None if dim in ("", "?", "None", "-1") else dim
    return None if dim is None or dim < 0 else dim


def _is_exotic(dtype: np.dtype[Any]) -> bool:
    """Whether the type is ml_dtypes', which ONNX Runtime's Python interface does not know."""
    return dtype.isbuiltin == 2  # numpy: registered by another package


def _is_exotic_type(ort_type: str) -> bool:
    match = _ELEMENT.fullmatch(ort_type)
    return match is not None and _is_exotic(element_type(getattr(TensorProto, match[1].upper())))


def _to_value(array: Array) -> Any:
    """Returns an OrtValue with the array's bytes, elements of 4 and 2 bits packed."""
    if not _is_exotic(array.dtype):
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array).reshape(array.shape))
    raw = numpy_helper.from_array(array).raw_data
    element = helper.np_dtype_to_tensor_dtype(array.dtype)
    value: Any = onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(array.shape), element)
    if raw:
        ctypes.memmove(value.data_ptr(), raw, len(raw))
    return value


def _from_value(value: Any) -> Any:
    """Returns the array of an OrtValue, whatever its element type."""
    if not value.is_tensor() or not _is_exotic_type(value.data_type()):
        return value.numpy()
    shape, size = value.shape(), value.tensor_size_in_bytes()
    raw = ctypes.string_at(value.data_ptr(), size) if size else b""
    return numpy_helper.to_array(TensorProto(dims=shape, data_type=value.element_type(), raw_data=raw))


def _flatten(name: str, value: Any, ort_type: str) -> Iterator[tuple[str, Array]]:
    """Yields (stable name, array) for whatever an output is."""
    maps = _SEQUENCE_OF_MAPS.fullmatch(ort_type)
    if maps is not None:
        rows = [value] if isinstance(value, dict) else value
        keys = list(rows[0]) if rows else []
        table = [[row[key] for key in keys] for row in rows]
        dtype = element_type(getattr(TensorProto, maps[2].upper()))
        yield name, np.array(table[0] if isinstance(value, dict) else table, dtype)
        yield f"{name}.keys", np.array(keys, object if maps[1] == "string" else np.int64)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield f"{name}[{index}]", np.asarray(item)
    elif value is not None:
        yield name, np.asarray(value)


def _reason(text: str) -> str:
    """Returns an ONNX Runtime message as one short line, without its error codes and the places in its C++ source."""
    text = " ".join(text.split())
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    preamble = r"Non-zero status code returned while running (\S+) node\. Name:'(.*?)' Status Message: "
    text = re.sub(preamble, r"\1 node '\2': ", text)
    arguments = r"\((?:[^()]|\([^()]*\))*\)"
    signature = rf"[^()]*?::[^()]*?{arguments}(?: const)?(?:::<lambda{arguments}>)?(?: \[with [^\]]*\])? "
    text = re.sub(rf"\S+\.(?:cc|h|hpp|cpp|cu):\d+ (?:{signature}|\w+ )", "", text)
    text = text.replace(" node ''", " node")
    return text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON].rsplit(" ", 1)[0] + " ..."
