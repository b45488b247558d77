"""Shapes and run counts of every node, measured by running the model once in ONNX Runtime.

Static shape inference gives up at the first computed Reshape; ONNX Runtime's profiler writes the shapes that really occurred, in
If and Loop bodies too (https://onnxruntime.ai/docs/performance/tune-performance/profiling-tools.html). Optimisations are off, so that
nodes stay what they are in the file.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from onnxshrink.errors import UnsupportedModelError
from onnxshrink.graph.files import materialised
from onnxshrink.graph.ir import Graph, Node
from onnxshrink.graph.weights import Use
from onnxshrink.graph.work import multiply_accumulates as products_of

__all__ = ["NodeTrace", "multiply_accumulates", "node_macs", "trace"]

Shape = tuple[int, ...]
_KERNEL_SUFFIX = "_kernel_time"
_ERRORS_ONLY = 4


@dataclass(frozen=True)
class NodeTrace:
    """What one node did: the shapes of its inputs, but for packed weights, and outputs in its last run, and how often it ran."""

    input_shapes: tuple[Shape, ...]
    output_shapes: tuple[Shape, ...]
    runs: int


def trace(graph: Graph, feeds: Mapping[str, np.ndarray[Any, np.dtype[Any]]]) -> dict[int, NodeTrace]:
    """Returns what each executed node did on one sample, by id of the node; nodes of branches not taken are absent.

    Args:
        graph: the main graph; only read.
        feeds: one sample by input name.

    Raises:
        UnsupportedModelError: ONNX Runtime cannot run the model without optimisations.
    """
    named = graph.copy()
    originals: dict[str, Node] = {}
    for scope, copy in zip(graph.scopes(), named.scopes(), strict=True):
        for node, twin in zip(scope.graph.nodes, copy.graph.nodes, strict=True):
            twin.name = f"node{len(originals)}"
            originals[twin.name] = node
    events = _profile(named, feeds)
    traces: dict[int, NodeTrace] = {}
    for event in events:
        name = event["name"].removesuffix(_KERNEL_SUFFIX)
        if event["name"].endswith(_KERNEL_SUFFIX) and name in originals:
            key = id(originals[name])
            runs = traces[key].runs + 1 if key in traces else 1
            arguments = event["args"]
            traces[key] = NodeTrace(
                _shapes(arguments.get("input_type_shape", [])), _shapes(arguments.get("output_type_shape", [])), runs
            )
    return traces


def node_macs(graph: Graph, traces: Mapping[int, NodeTrace]) -> dict[int, float] | None:
    """Returns the multiply-accumulates of the nodes that ran, by id, of bodies too; None if none ran."""
    nodes = {id(node): node for scope in graph.scopes() for node in scope.graph.nodes}
    counts = {
        key: float(done.runs * products_of(nodes[key], done.input_shapes, done.output_shapes)) for key, done in traces.items()
    }
    return {key: count for key, count in counts.items() if count} if traces else None


def multiply_accumulates(use: Use, traces: Mapping[int, NodeTrace]) -> int | None:
    """Returns the multiply-accumulates that a node did with a weight, or None if it did not run.

    A matrix of rows·columns is applied once per output position; in ConvTranspose and the recurrent ops once per input position.
    """
    if use.op == "Gather":
        return 0
    done = traces.get(id(use.node))
    if done is None or use.view is None:
        return None
    rows, columns = use.view.shape
    if use.op == "ConvTranspose":
        positions = math.prod(done.input_shapes[0]) // max(1, done.input_shapes[0][1])
    elif use.op in ("GRU", "LSTM", "RNN"):
        positions = math.prod(done.input_shapes[0][:2])
    else:
        return done.runs * math.prod(done.output_shapes[0]) * columns
    return done.runs * positions * rows * columns


def _profile(graph: Graph, feeds: Mapping[str, np.ndarray[Any, np.dtype[Any]]]) -> list[dict[str, Any]]:
    options: Any = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = _ERRORS_ONLY
    options.enable_profiling = True
    with tempfile.TemporaryDirectory(prefix="onnxshrink-") as folder, materialised(graph) as (model, _):
        options.profile_file_prefix = os.path.join(folder, "profile")
        source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else model
        try:
            running: Any = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
            running.run(None, dict(feeds))
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            raise UnsupportedModelError(f"original model: it does not run without optimisations: {error}") from error
        events: list[dict[str, Any]] = json.loads(Path(running.end_profiling()).read_text())
    return [event for event in events if event.get("cat") == "Node"]


def _shapes(entries: list[dict[str, list[int]]]) -> tuple[Shape, ...]:
    return tuple(tuple(next(iter(entry.values()), ())) for entry in entries)
