"""Everything a person can get wrong: one line on stderr that says what and where, the right exit code, and no other trace.

The folder is compared before and after, byte by byte: nothing is half written, no temporary file is left, no input is touched.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from typer.testing import CliRunner

from onnxshrink import cli
from tests import oracle

ROOT = Path(__file__).parents[1]
X = np.random.default_rng(4).standard_normal((20, 16)).astype(np.float32)
COMPRESS = ("compress", "model.onnx", "-o", "small.onnx")


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(list(shape)).standard_normal(shape).astype(np.float32)


def build(op: str = "MatMul", opset: int = 17) -> onnx.ModelProto:
    node = helper.make_node(op, ["x", "w"], ["y"])
    inputs, outputs = [oracle.tensor("x", ["n", 16])], [oracle.tensor("y", ["n", 24])]
    return oracle.make_model([node], inputs, outputs, [oracle.value("w", normal(16, 24))], opset=opset)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a good model and good inputs, and nothing outside that could be written to by accident."""
    folder = tmp_path / "place"
    folder.mkdir()
    onnx.save(build(), folder / "model.onnx")
    np.savez(folder / "inputs.npz", x=X)
    monkeypatch.chdir(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@contextmanager
def untouched(folder: Path) -> Iterator[None]:
    before = contents(folder)
    yield
    after = contents(folder)
    assert after.keys() == before.keys()
    assert [name for name in before if before[name] != after[name]] == []


def refused(*args: str, code: int) -> str:
    """Runs a command that must fail in the house's way, and returns its one line without "error: "."""
    with untouched(Path.cwd()):
        result = CliRunner().invoke(cli.app, list(args), env={"COLUMNS": "80"})
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ")
    assert "internal error" not in result.stderr
    return result.stderr.removeprefix("error: ").rstrip("\n")


def external(change: Callable[[dict[str, str]], Any] = lambda entries: None) -> onnx.ModelProto:
    """Returns a model whose weight is said to lie in ``weights.bin``, or wherever ``change`` says."""
    model = build()
    tensor = model.graph.initializer[0]
    entries = {"location": "weights.bin", "offset": "0", "length": str(len(tensor.raw_data))}
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    change(entries)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return model


def dangling() -> onnx.ModelProto:
    model = build()
    model.graph.node[0].input[1] = "nowhere"
    return model


def doubled() -> onnx.ModelProto:
    model = build()
    model.graph.initializer.append(model.graph.initializer[0])
    return model


GOOD = build().SerializeToString()
UNREADABLE: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "bad.onnx: cannot be read: No such file or directory"),
    "empty": (b"", "bad.onnx: not an ONNX model: it must have a graph and an IR version"),
    "text": (b"this is no model\n", "bad.onnx: not an ONNX model, or a truncated one: the protobuf does not parse"),
    "page": (b"<!DOCTYPE html><html></html>", "bad.onnx: not an ONNX model"),
    "truncated": (
        GOOD[: len(GOOD) // 2],
        "bad.onnx: not an ONNX model, or a truncated one: the protobuf does not parse",
    ),
    "zeros": (bytes(1000), "bad.onnx: not an ONNX model"),
    "tensor": (build().graph.initializer[0].SerializeToString(), "bad.onnx: not an ONNX model"),
    "no data": (
        external().SerializeToString(),
        "bad.onnx: tensor 'w': external data file 'weights.bin' cannot be read: No such file or directory",
    ),
    "short data": (
        external(lambda e: e.update(location="inputs.npz", length="1536", offset="99999")).SerializeToString(),
        "bad.onnx: tensor 'w': external data must be 1536 bytes, got offset 99999 and length 1536 in 'inputs.npz' of ",
    ),
    "data above": (
        external(lambda e: e.update(location="../secret.bin")).SerializeToString(),
        "bad.onnx: tensor 'w': external data '../secret.bin' must lie inside the model's folder; refused",
    ),
    "data elsewhere": (
        external(lambda e: e.update(location="/etc/passwd")).SerializeToString(),
        "bad.onnx: tensor 'w': external data '/etc/passwd' must lie inside the model's folder; refused",
    ),
    "dangling": (
        dangling().SerializeToString(),
        "tensor 'nowhere' is read, but no node, input or initializer defines it",
    ),
    "doubled": (doubled().SerializeToString(), "tensor 'w' must be defined once, got a second definition"),
}


class TestModels:
    @pytest.mark.parametrize("case", UNREADABLE)
    @pytest.mark.parametrize(
        "args",
        [
            ("compress", "bad.onnx", "-o", "small.onnx"),
            ("inspect", "bad.onnx"),
            ("expand", "bad.onnx", "-o", "dense.onnx"),
            ("verify", "bad.onnx", "model.onnx"),
            ("verify", "model.onnx", "bad.onnx"),
            ("bench", "model.onnx", "bad.onnx", "--json"),
        ],
        ids=lambda args: args[0] + (" candidate" if args[-1] == "bad.onnx" and args[0] == "verify" else ""),
    )
    def test_that_cannot_be_read(self, place: Path, case: str, args: tuple[str, ...]) -> None:
        data, message = UNREADABLE[case]
        (place.parent / "secret.bin").write_bytes(bytes(1536))
        if data is not None:
            (place / "bad.onnx").write_bytes(data)
        assert message in refused(*args, code=5)

    def test_that_are_folders(self, place: Path) -> None:
        (place / "bad.onnx").mkdir()
        assert refused("compress", "bad.onnx", "-o", "small.onnx", code=5) == "bad.onnx: cannot be read: Is a directory"

    @pytest.mark.parametrize("opset", [40, 99])
    def test_newer_than_onnx_runtime(self, place: Path, opset: int) -> None:
        model = build()
        model.opset_import[0].version = opset
        onnx.save(model, "bad.onnx")
        for args in (("compress", "bad.onnx", "-o", "small.onnx"), ("verify", "bad.onnx", "model.onnx")):
            message = refused(*args, code=5)
            assert message.startswith("original model: ONNX Runtime cannot load it: ")
            assert f"pset {opset}" in message

    @pytest.mark.parametrize("opset", [1, 3, 5])
    def test_older_than_any_coding_are_left_as_they_are(self, place: Path, opset: int) -> None:
        onnx.save(build(opset=opset), "old.onnx")
        result = CliRunner().invoke(
            cli.app, ["compress", "old.onnx", "-o", "small.onnx", "--pass", "share-weights"], env={"COLUMNS": "200"}
        )
        assert (result.exit_code, result.stderr) == (0, "")
        assert f"opset {opset} is below " in result.stdout
        assert (place / "small.onnx").stat().st_size == (place / "old.onnx").stat().st_size

    def test_that_onnx_runtime_cannot_load(self, place: Path) -> None:
        onnx.save(build("Nonsense"), "bad.onnx")
        message = refused("compress", "bad.onnx", "-o", "small.onnx", code=5)
        assert message.startswith("original model: ONNX Runtime cannot load it: ")
        assert "No Op registered for Nonsense" in message

    def test_that_onnx_runtime_cannot_run(self, place: Path) -> None:
        model = build()
        model.graph.initializer[0].CopyFrom(oracle.value("w", normal(17, 24)))
        model.graph.input[0].CopyFrom(oracle.tensor("x", ["n", "m"]))
        onnx.save(model, "bad.onnx")
        message = refused("compress", "bad.onnx", "-o", "small.onnx", "--calib", "inputs.npz", code=2)
        assert message.startswith(
            "inputs.npz: sample 0: the model does not run on it: original model: ONNX Runtime cannot run it: MatMul node"
        )

    def test_that_fail_the_checker_are_compressed_with_a_note(self, place: Path) -> None:
        model = build()
        model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 25
        onnx.save(model, "odd.onnx")
        result = CliRunner().invoke(
            cli.app, ["compress", "odd.onnx", "-o", "small.onnx", "--pass", "tidy"], env={"COLUMNS": "200"}
        )
        assert result.exit_code == 0
        assert "the original itself does not pass the ONNX checker" in result.stdout


def damaged(data: bytes) -> bytes:
    middle = data.index(b"NUMPY") + 140
    return data[:middle] + bytes(byte ^ 0xFF for byte in data[middle : middle + 9]) + data[middle + 9 :]


ARRAYS: dict[str, tuple[Mapping[str, Any], str]] = {
    "names": ({"z": X}, "bad.npz: sample 0: 'z' is no input of the model; known: x"),
    "near names": ({"X": X}, "bad.npz: sample 0: 'X' is no input of the model; "),
    "more names": ({"x": X, "extra": X}, "bad.npz: sample 0: 'extra' is no input of the model; known: x"),
    "no arrays": ({}, "bad.npz: sample 0: inputs must be complete, got no array for 'x'"),
    "labels only": (
        {"labels": np.arange(3)},
        "bad.npz: sample 0: inputs must be complete, got no array for 'x'; there are: labels",
    ),
    "dtype": (
        {"x": X.astype(np.float64)},
        "bad.npz: sample 0: input 'x' must be float32, got float64; array.astype('float32') converts it",
    ),
    "bytes": (
        {"x": (X * 9).astype(np.uint8)},
        "bad.npz: sample 0: input 'x' must be float32, got uint8; array.astype('float32') converts it",
    ),
    "text": ({"x": np.array([["a"] * 16])}, "bad.npz: sample 0: input 'x' must be float32, got "),
    "byte order": ({"x": X.astype(">f4")}, "bad.npz: sample 0: input 'x' must be float32, got >f4; "),
    "shape": ({"x": X[:, :3]}, "bad.npz: sample 0: input 'x' must be of shape [n, 16], got [1, 3]"),
    "rank": (
        {"x": X[0]},
        "bad.npz: sample 0: input 'x' must be of shape [n, 16], got [16]; array[None] adds the sample axis",
    ),
    "scalar": ({"x": np.float32(3)}, "bad.npz: sample 0: input 'x' must be of shape [n, 16], got []"),
    "nan": (
        {"x": np.where(X[7, 3] == X, np.nan, X).astype(np.float32)},
        "bad.npz: sample 7: input 'x' must be finite, got NaN or infinity",
    ),
    "infinity": (
        {"x": np.where(X[7, 3] == X, np.inf, X).astype(np.float32)},
        "bad.npz: sample 7: input 'x' must be finite, got ",
    ),
    "no samples": ({"x": X[:0]}, "bad.npz: number of samples must be at least 1, got 0"),
    "few labels": ({"x": X, "labels": np.arange(5)}, "bad.npz: number of labels must be 20, one for each row, got 5"),
    "labels beyond": (
        {"x": X, "labels": np.full(20, 24)},
        "bad.npz: labels must be integers from 0 to 23, got int64 from 24 to 24",
    ),
    "labels as text": (
        {"x": X, "labels": np.array(["cat"] * 20)},
        "bad.npz: labels must be integers from 0 to 23, got ",
    ),
    "objects": (
        {"x": np.array([{}], object)},
        "bad.npz: array 'x': holds pickled Python objects, which are refused; save plain arrays",
    ),
}
FILES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty file": (lambda data: b"", "bad.npz: cannot be read: it is not what np.savez writes, or truncated"),
    "truncated file": (
        lambda data: data[:300],
        "bad.npz: cannot be read: it is not what np.savez writes, or truncated",
    ),
    "text file": (lambda data: b"1 2 3\n", "bad.npz: cannot be read: it is not what np.savez writes, or truncated"),
    "flipped bits": (damaged, "bad.npz: array 'x': cannot be read: Bad CRC-32"),
}


class TestInputs:
    @pytest.mark.parametrize("case", ARRAYS)
    def test_with_the_wrong_arrays(self, place: Path, case: str) -> None:
        arrays, message = ARRAYS[case]
        np.savez(place / "bad.npz", **arrays)
        assert refused(*COMPRESS, "--calib", "bad.npz", code=2).startswith(message)
        assert refused("verify", "model.onnx", "model.onnx", "--inputs", "bad.npz", code=2).startswith(message)

    @pytest.mark.parametrize("case", FILES)
    def test_in_a_damaged_file(self, place: Path, case: str) -> None:
        damage, message = FILES[case]
        (place / "bad.npz").write_bytes(damage((place / "inputs.npz").read_bytes()))
        assert refused(*COMPRESS, "--calib", "bad.npz", code=2).startswith(message)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("absent.npz", "absent.npz: cannot be read: there is no such file or folder"),
            ("absent", "absent: cannot be read: there is no such file or folder"),
            (
                "model.onnx",
                "model.onnx: inputs must be a .npz file or a folder, got a '.onnx' file; np.savez(path, **{'x': array}) makes one",
            ),
            ("folder", "folder: folder must be one of .npz files or of test_data_set_* folders, got none of them"),
        ],
    )
    def test_in_the_wrong_place(self, place: Path, name: str, message: str) -> None:
        (place / "folder").mkdir()
        assert refused(*COMPRESS, "--calib", name, code=2) == message
        assert refused("bench", "model.onnx", "model.onnx", "--inputs", name, code=2) == message

    def test_in_a_folder_name_the_file(self, place: Path) -> None:
        folder = place / "many"
        folder.mkdir()
        np.savez(folder / "000.npz", x=X[:1])
        np.savez(folder / "001.npz", x=X[:1, :5])
        assert (
            refused(*COMPRESS, "--calib", "many", code=2)
            == "many/001.npz: input 'x' must be of shape [n, 16], got [1, 5]"
        )

    def test_in_a_damaged_test_data_set(self, place: Path) -> None:
        folder = place / "test_data_set_0"
        folder.mkdir()
        (folder / "input_0.pb").write_bytes(b"\xff\xff\xff")
        assert refused(*COMPRESS, "--calib", "test_data_set_0", code=2).startswith(
            "test_data_set_0/input_0.pb: cannot be read as a TensorProto: "
        )


LONG = "x" * 300


class TestOutputs:
    @pytest.mark.parametrize(
        ("output", "message"),
        [
            ("absent/small.onnx", "absent/small.onnx: cannot be written: No such file or directory"),
            ("model.onnx/small.onnx", "model.onnx/small.onnx: cannot be written: Not a directory"),
            (LONG, f"{LONG}: cannot be written: File name too long"),
            ("folder", "folder: cannot be written: it is a folder"),
            (".", ".: cannot be written: it is a folder"),
            ("model.onnx", "model.onnx: the output must not replace a file of the input; choose another name"),
            (
                "./folder/../model.onnx",
                "folder/../model.onnx: the output must not replace a file of the input; choose another name",
            ),
            ("link.onnx", "link.onnx: the output must not replace a file of the input; choose another name"),
            ("/dev/null", "/dev/null: cannot be written: it is no regular file"),
        ],
    )
    @pytest.mark.parametrize("command", ["compress", "expand"])
    def test_that_cannot_be(self, place: Path, command: str, output: str, message: str) -> None:
        (place / "folder").mkdir()
        (place / "link.onnx").symlink_to("model.onnx")
        assert refused(command, "model.onnx", "-o", output, code=2) == message

    def test_must_not_replace_the_samples_or_the_recipe(self, place: Path) -> None:
        (place / "recipe.toml").write_text('format = 1\n[[pass]]\nname = "tidy"\n')
        for name in ("inputs.npz", "recipe.toml"):
            args = ("compress", "model.onnx", "-o", name, "--calib", "inputs.npz", "--recipe", "recipe.toml")
            assert (
                refused(*args, code=2)
                == f"{name}: the output must not replace a file of the input; choose another name"
            )

    @pytest.mark.parametrize(
        ("report", "message"),
        [
            ("report.txt", "--report: file name must be one that ends in .json or .md, got report.txt"),
            ("report", "--report: file name must be one that ends in .json or .md, got report"),
            ("absent/report.md", "absent/report.md: cannot be written: No such file or directory"),
            ("folder.md", "folder.md: cannot be written: it is a folder"),
        ],
    )
    def test_a_report_that_cannot_be(self, place: Path, report: str, message: str) -> None:
        (place / "folder.md").mkdir()
        assert refused(*COMPRESS, "--report", report, code=2) == message

    def test_a_report_in_place_of_the_model(self, place: Path) -> None:
        (place / "model.json").write_bytes((place / "model.onnx").read_bytes())
        refused("compress", "model.json", "-o", "small.onnx", "--report", "model.json", code=2)
        refused("compress", "model.onnx", "-o", "small.json", "--report", "small.json", code=2)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_in_a_folder_that_must_not_be_written(self, place: Path) -> None:
        locked = place / "locked"
        locked.mkdir(mode=0o500)
        assert (
            refused("compress", "model.onnx", "-o", "locked/small.onnx", code=2)
            == "locked/small.onnx: cannot be written: Permission denied"
        )

    @pytest.mark.parametrize("command", ["compress", "expand"])
    def test_on_a_full_disk(self, place: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
        """Only when the result itself is written does the disk turn out to be full."""
        calls = []

        def fsync(descriptor: int) -> None:
            calls.append(descriptor)
            if len(calls) > 1:  # the first is the check before any work
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", fsync)
        (place / "small.onnx").write_text("an older one")
        assert (
            refused(command, "model.onnx", "-o", "small.onnx", code=2)
            == "small.onnx: cannot be written: No space left on device"
        )
        assert len(calls) == 2


class TestTexts:
    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (("--pass", "sparsfy"), "unknown pass 'sparsfy'; did you mean 'sparsify'? Known: "),
            (
                ("--pass", "share-weights:bit=3"),
                "share-weights: unknown option 'bit'; did you mean 'bits'? Known: bits, bits-per-weight, block, ",
            ),
            (("--pass", "share-weights:bits=many"), "share-weights: bits must be a whole number, got 'many'"),
            (("--pass", "share-weights:bits=99"), "share-weights: bits must be "),
            (
                ("--pass", "share-weights:bits"),
                "--pass share-weights: options must be key=value pairs, parted by commas, got 'bits'",
            ),
            (
                ("--pass", "sparsify:pattern=2of4"),
                "pattern: text must be unstructured, rows, columns, N:M such as 2:4 or NxM such as 1x4, got '2of4'",
            ),
            (("--recipe", "absent.toml"), "recipe absent.toml: cannot be read: No such file or directory"),
            (("--recipe", "model.onnx"), "recipe model.onnx: cannot be read: it is not UTF-8 text"),
            (
                ("--recipe", "key.toml"),
                "recipe key.toml, tolerance: unknown key 'min_sqnr'; did you mean 'min-sqnr'? Known: ",
            ),
            (("--recipe", "pass.toml"), "recipe pass.toml, pass 1: unknown pass 'tidi'; did you mean 'tidy'? Known: "),
            (("--recipe", "syntax.toml"), "recipe syntax.toml: not valid TOML: "),
            (
                ("--pass", "tidy", "--min-agreement", "0.9"),
                "tolerance: min-agreement must be left out for this model, got 0.9; ",
            ),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
    )
    def test_that_cannot_be_meant(self, place: Path, args: tuple[str, ...], message: str) -> None:
        (place / "key.toml").write_text("format = 1\n[tolerance]\nmin_sqnr = 3\n")
        (place / "pass.toml").write_text('format = 1\n[[pass]]\nname = "tidi"\n')
        (place / "syntax.toml").write_text("format = \n")
        if "--min-agreement" in args:  # a picture has no classes to agree on
            node = helper.make_node("Relu", ["x"], ["y"])
            picture = [oracle.tensor(name, [1, 3, 4, 4]) for name in "xy"]
            onnx.save(oracle.make_model([node], picture[:1], picture[1:]), place / "model.onnx")
        assert refused(*COMPRESS, *args, code=2).startswith(message)


PROLOGUE = """
import os, sys, time
from pathlib import Path
from onnxshrink import cli

def hang(*args, **kwargs):
    Path(os.environ["STARTED"]).touch()
    while True:
        time.sleep(0.01)

"""
HANGING = {
    "in a pass": "from onnxshrink.passes.sparsify import Sparsify\nSparsify.apply = hang\n",
    "in a worker": "from onnxshrink import repair\nrepair.retarget = lambda *args: Path(os.environ['STARTED']).touch() or time.sleep(0.5)\n",
    "while writing": "real = os.fsync\ncount = []\nos.fsync = lambda fd: (count.append(fd), hang() if len(count) > 1 else real(fd))\n",
}


class TestInterrupts:
    @pytest.mark.parametrize("where", HANGING)
    def test_leave_nothing_behind(self, place: Path, tmp_path: Path, where: str) -> None:
        started, temporary = tmp_path / "started", tmp_path / "temporary"
        temporary.mkdir()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "STARTED": str(started), "TMPDIR": str(temporary)}
        code = PROLOGUE + HANGING[where] + "cli.main()"
        with untouched(place):
            command = [sys.executable, "-c", code, *COMPRESS, "--pass", "sparsify", "--calib", "inputs.npz"]
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
            )
            while not started.exists():
                assert process.poll() is None, process.communicate()
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            stdout, stderr = process.communicate(timeout=60)
        assert (process.returncode, stdout) == (130, "")
        assert stderr == "error: interrupted\n"
        assert [path.name for path in temporary.iterdir() if path.name != ".ses"] == []  # that one is ONNX Runtime's

    @pytest.mark.skipif(sys.platform != "linux", reason="the limit on the size of files is tried on Linux")
    def test_a_file_that_may_not_grow_is_no_file(self, place: Path) -> None:
        """A real write that fails half-way: the operating system allows files of 1,000 bytes only."""
        code = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\nfrom onnxshrink import cli\ncli.main()"
        with untouched(place):
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            command = [sys.executable, "-c", code, *COMPRESS, "--pass", "tidy"]
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "error: small.onnx: cannot be written: File too large\n"
