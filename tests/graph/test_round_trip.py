"""Loading and saving changes nothing: all models of the corpus, and all test models of the ONNX standard.

Each exported message equals the original up to the order of initializers, value_info and Constant nodes, and ONNX Runtime gives
identical outputs for both, bit for bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.backend.test.case.node import collect_testcases
from onnx.backend.test.loader import load_model_tests

from onnxshrink.errors import ModelReadError, UnsupportedModelError
from onnxshrink.graph.exporter import to_model
from onnxshrink.graph.files import load, save
from tests import corpus
from tests.oracle import differences, random_feeds, run, same_bits, session

_ON_DISK = ("simple", "pytorch-converted", "pytorch-operator")
_NEWEST_IR_OF_ORT = (
    13  # cases of a newer IR version use nothing of it; a lower number lets ONNX Runtime load more of them
)
_REFUSED: dict[str, str] = {}  # case -> reason, exactly


@dataclass(frozen=True)
class Case:
    """A model of the ONNX standard's backend test, with inputs by name, or None where it comes without."""

    name: str
    model: onnx.ModelProto
    feeds: Mapping[str, Any] | None


def test_a_real_model_survives(corpus_name: str, corpus_model: Path, tmp_path: Path) -> None:
    original = onnx.load(corpus_model)
    graph = load(corpus_model)
    assert differences(original, to_model(graph)) == []
    assert differences(original, to_model(graph.copy())) == []

    assert save(graph, tmp_path / "saved.onnx") == (tmp_path / "saved.onnx").stat().st_size
    assert differences(original, onnx.load(tmp_path / "saved.onnx")) == []

    before = session(corpus_model)
    feeds = corpus.sample(corpus_name, [spec.name for spec in before.get_inputs()])
    assert same_bits(run(before, feeds), run(session(tmp_path / "saved.onnx"), feeds))


@pytest.mark.slow
def test_every_model_of_the_standard_survives(tell: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLOW_RELEASED_ONNX_OPSET_ONLY", "0")  # ONNX Runtime: try opsets newer than it knows
    total, same, not_runnable, refused, different = 0, 0, 0, {}, {}
    for case in _cases():
        total += 1
        try:
            exported = to_model(load(case.model))
        except (ModelReadError, UnsupportedModelError) as error:
            refused[case.name] = str(error)
            continue
        places = differences(case.model, exported)
        if places:
            different[case.name] = str(places)
            continue
        ran = _outputs(case.model, case.feeds)
        if ran is None:
            not_runnable += 1
        elif same_bits(ran, _outputs(exported, case.feeds)):
            same += 1
        else:
            different[case.name] = "outputs"
    tell(f"round trip of {total} models: same={same}, refused={len(refused)}, not runnable={not_runnable}")
    assert different == {}
    assert refused == _REFUSED
    assert same + len(refused) + not_runnable == total
    assert same > 0.8 * total, "a runtime that cannot run the models proves nothing"


def _cases() -> Iterator[Case]:
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # the cases are computed on import and divide by zero on purpose
        node_cases = collect_testcases(None)
    for case in node_cases:
        names = [info.name for info in case.model.graph.input]
        values = map(_value, case.data_sets[0][0])
        yield Case(case.name, case.model, dict(zip(names, values, strict=True)))
    for kind in _ON_DISK:
        for case in load_model_tests(kind=kind):
            model = onnx.load(Path(case.model_dir) / "model.onnx")
            yield Case(case.name, model, _stored_feeds(model, Path(case.model_dir) / "test_data_set_0"))
    light = Path(onnx.backend.test.__file__).parent / "data" / "light"
    for path in sorted(light.glob("*.onnx")):
        yield Case(path.stem, onnx.load(path), None)


def _stored_feeds(model: onnx.ModelProto, folder: Path) -> dict[str, Any]:
    feeds = {}
    for index, info in enumerate(model.graph.input):
        if not (path := folder / f"input_{index}.pb").exists():
            break
        kinds = {"sequence_type": onnx.SequenceProto, "optional_type": onnx.OptionalProto}
        message = kinds.get(info.type.WhichOneof("value"), onnx.TensorProto)()
        message.ParseFromString(path.read_bytes())
        feeds[info.name] = _value(message)
    return feeds


def _value(stored: Any) -> Any:
    """Returns what ONNX Runtime takes for an input of a case."""
    if isinstance(stored, onnx.TensorProto):
        return onnx.numpy_helper.to_array(stored)
    if isinstance(stored, onnx.SequenceProto):
        return onnx.numpy_helper.to_list(stored)
    if isinstance(stored, onnx.OptionalProto):
        return onnx.numpy_helper.to_optional(stored)
    if isinstance(stored, list | tuple):
        return [_value(item) for item in stored]
    return None if stored is None else np.asarray(stored)


def _outputs(model: onnx.ModelProto, feeds: Mapping[str, Any] | None) -> list[Any] | None:
    """Returns the outputs, or None if ONNX Runtime cannot load or run the model."""
    runnable = onnx.ModelProto()
    runnable.CopyFrom(model)
    runnable.ir_version = min(runnable.ir_version, _NEWEST_IR_OF_ORT)
    try:
        running = session(runnable)
        return run(running, random_feeds(running) if feeds is None else feeds)
    except Exception:  # its exceptions share no base class of their own
        return None
