"""Files appear whole or not at all, the input is never harmed, and whatever is read raises nothing but ModelError."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from onnx import helper, parser

from onnxshrink.errors import ModelError, ModelReadError, OutputError
from onnxshrink.graph import files
from onnxshrink.graph.coded import coded_weights
from onnxshrink.graph.edit import set_values
from onnxshrink.graph.exporter import to_model
from onnxshrink.graph.files import atomic_file, check_output, load, materialised, model_bytes, save, source_paths
from onnxshrink.graph.ir import Constant, Graph
from onnxshrink.graph.weights import weights
from tests.oracle import differences, make_model, run, same_bits, session, tensor, value

SMALL = """
<ir_version: 8, opset_import: ["": 17, "local": 1], metadata_props: ["alphabet": "abc"]>
g (float[2, 3] x, bool c) => (float[2, 3] y, float[2, 3] z) <float[3] b = {1, 2, 3}, float[2, 3] h>
{
    k = Constant <value = float[3] {1, 2, 3}> ()
    t = Transpose <perm = [1, 0]> (x)
    u = Transpose (t)
    h = Add(u, k)
    y = If(c) <then_branch = t () => (float[2, 3] a) { a = Identity(h) },
               else_branch = e () => (float[2, 3] a) <float[3] w = {1, 1, 1}> { a = Add(h, w) }>
    z = local.f <alpha = 0.5> (x, b)
}
<domain: "local", opset_import: ["": 17]> f <alpha> (p, q) => (r)
{
    w = Constant <value = float[1] {3}> ()
    v = Elu <alpha: float = @alpha> (p)
    u = Add(v, w)
    r = Add(u, q)
}
"""
SMALL_BYTES = parser.parse_model(SMALL).SerializeToString()
W = np.arange(4000, dtype=np.float32).reshape(40, 100)


@pytest.fixture
def small() -> Graph:
    return load(SMALL_BYTES)


@pytest.fixture
def external(tmp_path: Path) -> Path:
    """The path of y = (x + w) * v + s with w [40, 100] and v [40, 100] in weights.bin."""
    folder = tmp_path / "input"
    folder.mkdir()
    nodes = [
        helper.make_node("Add", ["x", "w"], ["h"]),
        helper.make_node("Mul", ["h", "v"], ["i"]),
        helper.make_node("Add", ["i", "s"], ["y"]),
    ]
    tensors = [value("w", W), value("v", -W), value("s", 3, "float32")]
    model = make_model(nodes, [tensor("x", W.shape)], [tensor("y", W.shape)], tensors)
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=100)
    return folder / "model.onnx"


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


class TestLoad:
    def test_path_text_bytes_and_message_give_the_same_graph(self, tmp_path: Path) -> None:
        path = tmp_path / "m.onnx"
        path.write_bytes(SMALL_BYTES)
        sources = [path, str(path), SMALL_BYTES, onnx.load_from_string(SMALL_BYTES)]
        assert len({to_model(load(source)).SerializeToString() for source in sources}) == 1

    @pytest.mark.parametrize(
        ("content", "complaint"),
        [
            (None, "cannot be read: No such file or directory"),
            ("folder", "cannot be read: Is a directory"),
            (b"", "not an ONNX model: it must have a graph and an IR version"),
            (b"PK\x03\x04 a zip file", "the protobuf does not parse"),
            (SMALL_BYTES[:-5], "the protobuf does not parse"),
            (onnx.ModelProto(ir_version=8).SerializeToString(), "it must have a graph"),
            (onnx.ModelProto(graph=onnx.GraphProto()).SerializeToString(), "and an IR version"),
        ],
    )
    def test_what_is_no_model_is_refused_in_one_line(self, tmp_path: Path, content: Any, complaint: str) -> None:
        path = tmp_path / "m.onnx"
        if content == "folder":
            path.mkdir()
        elif content is not None:
            path.write_bytes(content)
        with pytest.raises(ModelReadError, match=complaint) as caught:
            load(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)


class TestSave:
    def test_it_returns_the_bytes_written(self, small: Graph, tmp_path: Path) -> None:
        assert save(small, tmp_path / "m.onnx") == (tmp_path / "m.onnx").stat().st_size
        assert names(tmp_path) == ["m.onnx"]

    def test_the_same_graph_gives_the_same_bytes(self, small: Graph, tmp_path: Path) -> None:
        for name in ("a.onnx", "b.onnx"):
            save(small.copy(), tmp_path / name)
        assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()

    def test_a_plain_model_may_replace_its_file(self, tmp_path: Path) -> None:
        path = tmp_path / "m.onnx"
        path.write_bytes(SMALL_BYTES)
        save(load(path), path)
        assert differences(onnx.load(path), onnx.load_from_string(SMALL_BYTES)) == []

    def test_permissions_follow_the_umask(self, small: Graph, tmp_path: Path) -> None:
        before = os.umask(0o027)
        try:
            save(small, tmp_path / "m.onnx")
            assert os.umask(0o027) == 0o027, "the umask itself stays"
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "m.onnx").stat().st_mode) == 0o640

    @pytest.mark.parametrize("place", ["missing/m.onnx", "folder", "file/m.onnx", "x" * 300])
    def test_a_bad_place_is_refused(self, small: Graph, tmp_path: Path, place: str) -> None:
        (tmp_path / "folder").mkdir()
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(OutputError, match="cannot be written") as caught:
            save(small, tmp_path / place)
        assert str(caught.value).startswith(f"{tmp_path / place}: ")
        assert names(tmp_path) == ["file", "folder"]

    def test_a_read_only_folder_is_refused(self, small: Graph, tmp_path: Path) -> None:
        tmp_path.chmod(0o500)
        if os.access(tmp_path, os.W_OK):
            pytest.skip("this user may write everywhere")
        with pytest.raises(OutputError, match="Permission denied"):
            save(small, tmp_path / "m.onnx")
        assert names(tmp_path) == []

    def test_a_file_system_that_takes_no_files_is_refused(self, small: Graph) -> None:
        if not Path("/proc/self").is_dir():
            pytest.skip("no /proc here")
        with pytest.raises(OutputError, match="/proc/m.onnx: cannot be written"):
            save(small, "/proc/m.onnx")

    def test_what_is_no_file_is_not_replaced(self, small: Graph, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")  # as /dev/null would be
        with pytest.raises(OutputError, match="pipe: cannot be written: it is no regular file"):
            check_output(tmp_path / "pipe")
        with pytest.raises(OutputError, match="pipe: cannot be written: it is no regular file"):
            save(small, tmp_path / "pipe")
        assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)

    def test_a_place_can_be_tried_in_advance(self, tmp_path: Path) -> None:
        check_output(tmp_path / "m.onnx")
        (tmp_path / "old.onnx").write_bytes(b"old")
        check_output(tmp_path / "old.onnx")
        assert (tmp_path / "old.onnx").read_bytes() == b"old"
        assert names(tmp_path) == ["old.onnx"]
        with pytest.raises(OutputError, match="cannot be written"):
            check_output(tmp_path / "missing" / "m.onnx")
        (tmp_path / "link.onnx").symlink_to(tmp_path / "old.onnx")
        with pytest.raises(OutputError, match="must not replace a file of the input"):
            check_output(tmp_path / "link.onnx", [tmp_path / "old.onnx"])


class TestSaveExternal:
    def test_data_moves_to_a_second_file(self, external: Path, tmp_path: Path) -> None:
        written = save(load(external), tmp_path / "out.onnx")
        assert names(tmp_path) == ["input", "out.onnx", "out.onnx.data"]
        assert written == sum((tmp_path / name).stat().st_size for name in ("out.onnx", "out.onnx.data"))
        assert differences(onnx.load(external), onnx.load(tmp_path / "out.onnx")) == []

        saved = onnx.load(tmp_path / "out.onnx", load_external_data=False)
        entries = [{entry.key: entry.value for entry in item.external_data} for item in saved.graph.initializer]
        assert [entry.get("location") for entry in entries] == ["out.onnx.data", "out.onnx.data", None]
        assert [entry.get("offset") for entry in entries] == ["0", "16000", None]
        assert [entry.get("length") for entry in entries] == ["16000", "16000", None]

    def test_padding_does_not_show_and_large_tensors_begin_on_a_page(self, tmp_path: Path) -> None:
        arrays = {"w": np.ones((512, 512), np.float32), **{f"b{number}": np.ones(9, np.float32) for number in range(99)}}
        model = make_model([helper.make_node("Relu", ["x"], ["y"])], [tensor("x", [1])], [tensor("y", [1])])
        model.graph.initializer.extend(value(name, array) for name, array in reversed(arrays.items()))
        onnx.save(model, tmp_path / "in.onnx", save_as_external_data=True, location="in.bin", size_threshold=0)
        before = sum((tmp_path / name).stat().st_size for name in ("in.onnx", "in.bin"))
        assert save(load(tmp_path / "in.onnx"), tmp_path / "out.onnx") < before + 4096 + 99 * 32

        saved = onnx.load(tmp_path / "out.onnx", load_external_data=False)
        entries = {item.name: {entry.key: entry.value for entry in item.external_data} for item in saved.graph.initializer}
        assert int(entries["w"]["offset"]) % 4096 == 0
        assert all(int(entry["offset"]) % 16 == 0 for entry in entries.values())

    def test_outputs_stay_the_same(self, external: Path, tmp_path: Path) -> None:
        save(load(external), tmp_path / "out.onnx")
        save(load(tmp_path / "out.onnx"), tmp_path / "again.onnx")
        feeds = {"x": np.ones(W.shape, np.float32)}
        expected = run(session(external), feeds)
        assert same_bits(run(session(tmp_path / "out.onnx"), feeds), expected)
        assert same_bits(run(session(tmp_path / "again.onnx"), feeds), expected)

    def test_edited_large_tensors_go_outside_and_small_ones_inside(self, external: Path, tmp_path: Path) -> None:
        graph = load(external)
        set_values(graph.constants[0], W + 1)
        set_values(graph.constants[2], np.float32(4).reshape(()))
        save(graph, tmp_path / "out.onnx")
        saved = onnx.load(tmp_path / "out.onnx", load_external_data=False)
        assert [item.data_location for item in saved.graph.initializer] == [1, 1, 0]
        assert same_bits(load(tmp_path / "out.onnx").constants[0].values, W + 1)
        assert same_bits(load(tmp_path / "out.onnx").constants[1].values, -W)

    def test_what_describes_a_tensor_stays_with_it(self, external: Path, tmp_path: Path) -> None:
        model = onnx.load(external, load_external_data=False)
        model.graph.initializer[0].doc_string = "read me"
        model.graph.initializer[0].metadata_props.add(key="a", value="b")
        external.write_bytes(model.SerializeToString())
        save(load(external), tmp_path / "out.onnx")
        assert differences(onnx.load(external), onnx.load(tmp_path / "out.onnx")) == []

    def test_the_same_graph_gives_the_same_bytes(self, external: Path, tmp_path: Path) -> None:
        for folder in ("a", "b"):
            (tmp_path / folder).mkdir()
            save(load(external), tmp_path / folder / "m.onnx")
        for name in ("m.onnx", "m.onnx.data"):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

    def test_a_graph_without_links_to_files_comes_in_one(self, external: Path, tmp_path: Path) -> None:
        graph = load(external)
        assert source_paths(graph) == {external.parent / "weights.bin"}
        for constant in graph.constants[:2]:
            set_values(constant, constant.values + 1)
        assert source_paths(graph) == set()
        save(graph, tmp_path / "out.onnx")
        assert names(tmp_path) == ["input", "out.onnx"]

    @pytest.mark.parametrize("link", [False, True])
    @pytest.mark.parametrize("output", ["weights.bin", "weights"])
    def test_the_data_of_the_input_is_never_replaced(self, external: Path, output: str, link: bool) -> None:
        data = external.parent / "weights.bin"
        if output == "weights":  # whose data file would be weights.data
            data = data.rename(external.parent / "weights.data")
            model = onnx.load(external, load_external_data=False)
            for item in model.graph.initializer[:2]:
                item.external_data[0].value = "weights.data"
            external.write_bytes(model.SerializeToString())
        target = external.parent / output
        if link:
            (external.parent.parent / "link").symlink_to(external.parent)
            target = external.parent.parent / "link" / output
        before = data.read_bytes()
        with pytest.raises(OutputError, match="must not replace a file of the input; choose another name"):
            save(load(external), target)
        assert data.read_bytes() == before
        assert len(names(external.parent)) == 2

    def test_saving_over_the_model_itself_keeps_both_readable(self, external: Path) -> None:
        graph, before = load(external), onnx.load(external)
        save(graph, external)
        assert names(external.parent) == ["model.onnx", "model.onnx.data", "weights.bin"]
        assert differences(before, onnx.load(external)) == []
        with pytest.raises(OutputError, match="must not replace a file of the input"):
            save(load(external), external)

    def test_models_over_the_limit_of_a_message_are_split(
        self, small: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        small.constants.append(Constant("big", W))
        monkeypatch.setattr(files, "MAX_MESSAGE_BYTES", 10_000)
        save(small, tmp_path / "m.onnx")
        assert (tmp_path / "m.onnx.data").stat().st_size == W.nbytes
        saved = onnx.load(tmp_path / "m.onnx")
        saved.graph.initializer[1].ClearField("data_location")  # set by the onnx package while it loads the data
        assert differences(to_model(small), saved) == []
        onnx.checker.check_model(tmp_path / "m.onnx", full_check=True)
        with materialised(small) as (source, size):
            assert Path(source).is_file()
            assert size == sum(item.stat().st_size for item in Path(source).parent.iterdir())
        assert not Path(source).exists()

    def test_small_models_are_materialised_as_messages(self, small: Graph) -> None:
        with materialised(small) as (model, size):
            assert differences(model, to_model(small)) == []
            assert size == model.ByteSize() == model_bytes(small)


class TestAtomicity:
    """Whatever goes wrong, at every single call of the operating system: no half file, no temporary file, no harm."""

    @pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
    @pytest.mark.parametrize("existing", [False, True])
    @pytest.mark.parametrize("place", ["write", "fsync", "chmod"])
    def test_plain(
        self, small: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, existing: bool, failure: Any
    ) -> None:
        if existing:
            (tmp_path / "m.onnx").write_bytes(b"old")
        with _failing(monkeypatch, place, failure, at=0), pytest.raises(_as_raised(failure)):
            save(small, tmp_path / "m.onnx")
        assert names(tmp_path) == (["m.onnx"] if existing else [])
        assert not existing or (tmp_path / "m.onnx").read_bytes() == b"old"

    @pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
    @pytest.mark.parametrize("at", [0, 1])
    @pytest.mark.parametrize("place", ["write", "fsync"])
    def test_with_external_data(
        self, external: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, at: int, failure: Any
    ) -> None:
        target = tmp_path / "out" / "m.onnx"
        target.parent.mkdir()
        target.write_bytes(b"old model")
        (tmp_path / "out" / "m.onnx.data").write_bytes(b"old data")
        with _failing(monkeypatch, place, failure, at), pytest.raises(_as_raised(failure)):
            save(load(external), target)
        assert names(target.parent) == ["m.onnx", "m.onnx.data"]
        assert target.read_bytes() == b"old model"
        assert target.with_name("m.onnx.data").read_bytes() == b"old data"

    def test_what_fails_in_the_block_leaves_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(ZeroDivisionError), atomic_file(tmp_path / "m") as file:
            file.write(b"half")
            assert names(tmp_path) != []
            1 / 0  # noqa: B018
        assert names(tmp_path) == []

    def test_nothing_is_visible_under_the_name_until_the_end(self, tmp_path: Path) -> None:
        with atomic_file(tmp_path / "m") as file:
            file.write(b"whole")
            assert not (tmp_path / "m").exists()
        assert (tmp_path / "m").read_bytes() == b"whole"
        assert names(tmp_path) == ["m"]


def _as_raised(failure: BaseException) -> type[BaseException]:
    return OutputError if isinstance(failure, OSError) else type(failure)


class _failing:  # noqa: N801  # reads as a statement
    """Makes the ``at``-th call of something that writes fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, place: str, failure: BaseException, at: int) -> None:
        self.monkeypatch, self.place, self.failure, self.left = monkeypatch, place, failure, at

    def __enter__(self) -> None:
        if self.place == "write":
            real_open = files.tempfile.NamedTemporaryFile
            opened = iter(range(100))

            def opens(*args: Any, **kwargs: Any) -> Any:
                wrapper = real_open(*args, **kwargs)
                if next(opened) == self.left:
                    wrapper.write = self.fail
                return wrapper

            self.monkeypatch.setattr(files.tempfile, "NamedTemporaryFile", opens)
        else:
            self.monkeypatch.setattr(os, self.place, self.countdown(getattr(os, self.place)))

    def __exit__(self, *_: object) -> None:
        self.monkeypatch.undo()
        assert self.left < 0, "nothing has failed"

    def fail(self, *_: object) -> Any:
        self.left = -1
        raise self.failure

    def countdown(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise self.failure
            return real(*args, **kwargs)

        return call


def _read_everything(data: bytes) -> None:
    """Does what a person's first command does with a model."""
    graph = load(data)
    to_model(graph.copy()).SerializeToString()
    model_bytes(graph)
    coded_weights(graph)
    for weight in weights(graph):
        assert isinstance(weight.obstacle, str | None)
        if weight.constant.size < 1e6:
            assert weight.constant.values.shape == weight.constant.shape


def _mutations() -> Iterator[Any]:
    flips = st.lists(st.tuples(st.integers(0, len(SMALL_BYTES) - 1), st.integers(0, 255)), min_size=1, max_size=6)
    cuts = st.tuples(st.integers(0, len(SMALL_BYTES)), st.integers(0, 40), st.binary(max_size=20))
    yield flips.map(_flipped)
    yield cuts.map(lambda cut: SMALL_BYTES[: cut[0]] + cut[2] + SMALL_BYTES[cut[0] + cut[1] :])
    yield st.integers(0, len(SMALL_BYTES)).map(lambda end: SMALL_BYTES[:end])
    yield st.binary(max_size=300)


def _flipped(changes: list[tuple[int, int]]) -> bytes:
    data = bytearray(SMALL_BYTES)
    for place, byte in changes:
        data[place] = byte
    return bytes(data)


@settings(
    max_examples=int(os.environ.get("ONNXSHRINK_FUZZ_EXAMPLES", "400")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(st.one_of(*_mutations()))
@example(b"")
def test_a_damaged_model_raises_nothing_but_model_errors(data: bytes) -> None:
    try:
        _read_everything(data)
    except ModelError as error:
        assert str(error)
