"""The command line replaces no file that it was asked to read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from typer.testing import CliRunner

from onnxshrink.cli import app
from tests.oracle import make_model, tensor


@pytest.mark.parametrize(
    "arguments",
    [
        ["m.onnx", "-o", "m.onnx"],
        ["m.onnx", "-o", "x.npz", "--calib", "x.npz"],
        ["m.onnx", "-o", "r.toml", "--recipe", "r.toml"],
        ["m.onnx", "-o", "out.json", "--report", "out.json"],
    ],
)
def test_no_file_is_both_read_and_written(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = make_model([helper.make_node("Relu", ["x"], ["y"])], [tensor("x", [1, 4])], [tensor("y", [1, 4])])
    onnx.save(model, "m.onnx")
    np.savez("x.npz", x=np.ones((4, 4), np.float32))
    Path("r.toml").write_text("format = 1\n", encoding="utf-8")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    found = CliRunner().invoke(app, ["compress", *arguments])
    assert found.exit_code == 2
    assert "must not replace a file of the input" in found.output
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
