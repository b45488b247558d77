"""The command line as people and machines use it: exact forms, exit codes, one JSON document on stdout and nothing else.

Most tests run the commands in this process; `TestProcess` runs them as the installed script does.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from typer.testing import CliRunner, Result

import onnxshrink
from onnxshrink import api, cli
from onnxshrink.registry import describe_passes, pass_names
from tests import oracle

ROOT = Path(__file__).parents[1]
ENTRY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["onnxshrink"]
X = np.random.default_rng(4).standard_normal((20, 16)).astype(np.float32)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng([seed, *shape]).standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model, inputs for it, and a recipe."""
    nodes = [
        helper.make_node("MatMul", ["x", "layer1/w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "head/w"], ["y"]),
    ]
    values = [oracle.value("layer1/w", normal(16, 64)), oracle.value("head/w", normal(64, 12))]
    onnx.save(
        oracle.make_model(nodes, [oracle.tensor("x", ["n", 16])], [oracle.tensor("y", ["n", 12])], values),
        tmp_path / "model.onnx",
    )
    np.savez(tmp_path / "inputs.npz", x=X)
    (tmp_path / "recipe.toml").write_text(
        """
        format = 1
        [tolerance]
        min-sqnr = 5.0
        [[pass]]
        name = "share-weights"
        options = { bits = 3 }
        [[pass.rule]]
        match = "head*"
        options = { bits = 6 }
        """
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*args: str) -> Result:
    """Runs a command in this process."""
    return CliRunner().invoke(cli.app, list(args), env={"COLUMNS": "200"})


def read_json(result: Result | str) -> dict[str, Any]:
    """Returns the one JSON document that stdout must be."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    found = json.loads(result if isinstance(result, str) else result.stdout, parse_constant=refuse)
    assert isinstance(found, dict)
    return found


class TestCompress:
    def test_by_default_tidies_and_shares_eight_bits(self, place: Path) -> None:
        result = run("compress", "model.onnx", "-o", "small.onnx")
        assert (result.exit_code, result.stderr) == (0, "")
        expected = api.compress(place / "model.onnx").to_model().SerializeToString(deterministic=True)
        assert (place / "small.onnx").read_bytes() == expected
        assert "share-weights" in result.stdout
        assert "SQNR at least 30 dB" in result.stdout
        assert "synthetic" in result.stdout

    def test_with_everything(self, place: Path) -> None:
        result = run(
            *("compress", "model.onnx", "-o", "small.onnx", "--recipe", "recipe.toml", "--pass", "tidy"),
            *("--pass", "sparsify:sparsity=0.1,pattern=unstructured,pack=false", "--calib", "inputs.npz", "--min-sqnr", "1"),
            *("--max-drift", "0.9", "--min-agreement", "0.1", "--report", "report.json", "--seed", "3", "--json"),
        )
        assert (result.exit_code, result.stderr) == (0, "")
        found = read_json(result)
        assert [step["name"] for step in found["passes"]] == ["share-weights", "tidy", "sparsify"]
        assert found["tolerance"] == {"min_sqnr_db": 1, "max_drift": 0.9, "min_agreement": 0.1}
        assert (found["seed"], found["calibration_samples"], found["validation_samples"]) == (3, 15, 5)
        assert found["inputs"] == "inputs.npz"
        assert found["output"] == "small.onnx"
        assert found["bytes_before"] == (place / "model.onnx").stat().st_size
        assert found["bytes_after"] == (place / "small.onnx").stat().st_size
        assert {"name", "sqnr_db", "cosine", "max_abs", "agreement"} <= found["outputs"][0].keys()
        assert all({"changes", "skips"} <= step.keys() for step in found["passes"])
        assert [change["site"] for change in found["passes"][0]["changes"]] == ["layer1/w", "head/w"]
        written = json.loads((place / "report.json").read_text())
        assert written == {key: value for key, value in found.items() if key != "output"}

    def test_a_recipe_alone_brings_its_own_limits_and_rules(self, place: Path) -> None:
        result = run("compress", "model.onnx", "-o", "small.onnx", "--recipe", "recipe.toml", "--json")
        found = read_json(result)
        assert found["tolerance"] == {"min_sqnr_db": 5.0, "max_drift": None, "min_agreement": None}
        bits = {change["site"]: change["detail"] for change in found["passes"][0]["changes"]}
        assert "8 values" in bits["layer1/w"] or "3 bits" in bits["layer1/w"]
        assert "64 values" in bits["head/w"] or "6 bits" in bits["head/w"]

    def test_passes_alone_bring_no_limit(self, place: Path) -> None:
        found = read_json(run("compress", "model.onnx", "-o", "small.onnx", "--pass", "share-weights:bits=1", "--json"))
        assert found["tolerance"] == {"min_sqnr_db": None, "max_drift": None, "min_agreement": None}
        assert found["passes"][0]["outcome"] == "kept"

    def test_a_report_in_markdown(self, place: Path) -> None:
        assert run("compress", "model.onnx", "-o", "small.onnx", "--report", "report.md").exit_code == 0
        text = (place / "report.md").read_text()
        assert text.startswith("# model.onnx\n")
        assert "| layer1/w |" in text

    def test_a_dropped_pass_exits_with_3_and_the_best_is_written(self, place: Path) -> None:
        limits = ["--calib", "inputs.npz", "--min-sqnr", "40", "--json"]
        result = run(
            "compress",
            "model.onnx",
            "-o",
            "small.onnx",
            "--pass",
            "sparsify:pattern=1:4,pack=false",
            "--pass",
            "share-weights:bits=8",
            *limits,
        )
        assert result.exit_code == 3
        found = read_json(result)
        assert [step["outcome"] for step in found["passes"]] == ["dropped", "kept"]
        assert found["target_reached"] is False
        assert "SQNR must be at least 40 dB" in found["passes"][0]["reason"]
        alone = read_json(run("compress", "model.onnx", "-o", "alone.onnx", "--pass", "share-weights:bits=8", *limits))
        assert alone["target_reached"] is True
        assert (place / "small.onnx").read_bytes() == (place / "alone.onnx").read_bytes()

    def test_a_dropped_pass_is_said_in_the_table(self, place: Path) -> None:
        result = run("compress", "model.onnx", "-o", "small.onnx", "--pass", "sparsify:pattern=1:4", "--min-sqnr", "40")
        assert result.exit_code == 3
        assert "dropped" in result.stdout
        assert "SQNR must be at least 40 dB" in result.stdout

    def test_the_same_command_gives_the_same_bytes(self, place: Path) -> None:
        for name in ("one.onnx", "two.onnx"):
            run(
                "compress",
                "model.onnx",
                "-o",
                name,
                "--pass",
                "sparsify",
                "--pass",
                "share-weights:bits=4",
                "--seed",
                "7",
            )
        assert (place / "one.onnx").read_bytes() == (place / "two.onnx").read_bytes()

    def test_the_result_may_replace_an_older_one(self, place: Path) -> None:
        (place / "small.onnx").write_text("an older one")
        assert run("compress", "model.onnx", "-o", "small.onnx").exit_code == 0
        onnx.checker.check_model(onnx.load(place / "small.onnx"))

    def test_nothing_else_is_left(self, place: Path) -> None:
        before = {file.name for file in place.iterdir()}
        run("compress", "model.onnx", "-o", "small.onnx", "--report", "r.md")
        assert {file.name for file in place.iterdir()} == before | {"small.onnx", "r.md"}

    def test_a_recipe_without_passes_has_nothing_to_do(self, place: Path) -> None:
        (place / "empty.toml").write_text("format = 1\n")
        result = run("compress", "model.onnx", "-o", "small.onnx", "--recipe", "empty.toml")
        assert result.exit_code == 2
        assert "has no pass" in result.stderr
        assert not (place / "small.onnx").exists()


@pytest.fixture
def small(place: Path) -> Path:
    assert run("compress", "model.onnx", "-o", "small.onnx", "--pass", "share-weights:bits=5").exit_code == 0
    return place / "small.onnx"


class TestVerify:
    def test_within_the_limits(self, small: Path) -> None:
        result = run(
            "verify",
            "model.onnx",
            "small.onnx",
            "--inputs",
            "inputs.npz",
            "--min-sqnr",
            "10",
            "--max-drift",
            "0.3",
            "--min-agreement",
            "0.1",
        )
        assert (result.exit_code, result.stderr) == (0, "")
        assert "within the limits" in result.stdout

    @pytest.mark.parametrize(
        ("limit", "words"),
        [
            (["--min-sqnr", "200"], "output 'y': SQNR must be at least 200 dB, got "),
            (["--max-drift", "1e-9"], "output 'y': drift must be at most 1e-09, got "),
            (["--min-agreement", "1"], "output 'y': agreement must be at least 1, got "),
        ],
    )
    def test_a_broken_limit_exits_with_4(self, small: Path, limit: list[str], words: str) -> None:
        np.savez(small.parent / "many.npz", x=np.random.default_rng(0).standard_normal((500, 16)).astype(np.float32))
        result = run("verify", "model.onnx", "small.onnx", "--inputs", "many.npz", *limit, "--json")
        assert result.exit_code == 4
        assert result.stderr.startswith(f"error: {words}")
        assert result.stderr.count("\n") == 1
        assert read_json(result)["violation"].startswith(words)

    def test_for_machines(self, small: Path) -> None:
        found = read_json(run("verify", "model.onnx", "small.onnx", "--inputs", "inputs.npz", "--json"))
        assert (found["bytes_before"], found["bytes_after"]) == (
            (small.parent / "model.onnx").stat().st_size,
            small.stat().st_size,
        )
        assert {"name", "sqnr_db", "cosine", "max_abs", "agreement"} <= found["outputs"][0].keys()
        assert (found["violation"], found["synthetic"], found["samples"]) == (None, False, 20)

    def test_a_candidate_that_does_not_run_exits_with_4(self, place: Path) -> None:
        model = onnx.load("model.onnx")
        model.graph.node[1].op_type = "Nonsense"
        onnx.save(model, "broken.onnx")
        result = run("verify", "model.onnx", "broken.onnx", "--json")
        assert result.exit_code == 4
        assert result.stderr.startswith("error: candidate model: ONNX Runtime cannot load it: ")
        assert read_json(result)["outputs"] == []

    def test_without_inputs_they_are_made_up_and_that_is_said(self, small: Path) -> None:
        result = run("verify", "model.onnx", "small.onnx")
        assert result.exit_code == 0
        assert "inputs are synthetic" in result.stdout


class TestInspect:
    def test_for_people(self, place: Path) -> None:
        result = run("inspect", "model.onnx")
        assert (result.exit_code, result.stderr) == (0, "")
        for word in ("layer1/w", "head/w", "16x64", "share-weights", "MatMul", "x: float32"):
            assert word in result.stdout

    def test_for_machines(self, small: Path) -> None:
        found = read_json(run("inspect", "small.onnx", "--json"))
        assert found["nbytes"] == small.stat().st_size
        assert {info["site"]: info["coded"] for info in found["weights"]} == {"layer1/w": True, "head/w": True}

    def test_of_a_model_that_does_not_run(self, place: Path) -> None:
        model = onnx.load("model.onnx")
        model.graph.node[1].op_type = "Nonsense"
        onnx.save(model, "broken.onnx")
        result = run("inspect", "broken.onnx")
        assert result.exit_code == 0
        assert "MACs are not known" in result.stdout

    def test_sensitivity_for_people_with_a_picture(self, place: Path) -> None:
        asked = ("--sensitivity", "--calib", "inputs.npz", "--repair", "--plot", "curves.png")
        result = run("inspect", "model.onnx", *asked)
        assert (result.exit_code, result.stderr) == (0, "")
        for word in ("in one layer alone", "57.1%", "of inputs.npz", "agreement", "The same, made up for:", "rows", "curves drawn to curves.png"):
            assert word in result.stdout
        assert (place / "curves.png").read_bytes().startswith(b"\x89PNG")

    def test_sensitivity_for_machines(self, place: Path) -> None:
        found = read_json(run("inspect", "model.onnx", "--sensitivity", "--calib", "inputs.npz", "--json"))
        expected = api.inspect(place / "model.onnx", sensitivity=True, calibration=place / "inputs.npz")
        plain = json.loads(json.dumps(expected.to_dict()["sensitivity"]))
        assert found["sensitivity"] == {**plain, "inputs": "inputs.npz"}
        assert {layer["site"] for layer in plain["layers"]} == {"layer1/w", "head/w"}

    def test_sensitivity_on_synthetic_inputs_says_so(self, place: Path) -> None:
        result = run("inspect", "model.onnx", "--sensitivity")
        assert result.exit_code == 0
        assert "inputs are synthetic" in result.stdout

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["--plot", "curves.png"], "--plot must be left out without --sensitivity"),
            (["--calib", "inputs.npz"], "--calib must be left out without --sensitivity"),
            (["--repair"], "--repair must be left out without --sensitivity"),
            (["--sensitivity", "--repair"], "inputs for repair must be two or more"),
            (["--sensitivity", "--plot", "curves.gif"], "must be one that ends in .pdf, .png, .svg, got curves.gif"),
            (["--sensitivity", "--plot", "missing/curves.png"], "cannot be written"),
            (["--sensitivity", "--calib", "missing.npz"], "no such file"),
        ],
    )
    def test_sensitivity_that_cannot_be(self, place: Path, args: list[str], message: str) -> None:
        before = sorted(place.iterdir())
        result = run("inspect", "model.onnx", *args)
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
        assert message in result.stderr
        assert sorted(place.iterdir()) == before

    def test_a_picture_without_matplotlib(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        result = run("inspect", "model.onnx", "--sensitivity", "--plot", "curves.png")
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.endswith("not installed: pip install 'onnxshrink[plot]'\n")


class TestExpand:
    def test_writes_plain_weights(self, small: Path) -> None:
        result = run("expand", "small.onnx", "-o", "dense.onnx")
        assert (result.exit_code, result.stderr) == (0, "")
        assert "2 coded weights expanded" in result.stdout
        dense = small.parent / "dense.onnx"
        assert [node.op_type for node in onnx.load(dense).graph.node] == ["MatMul", "Relu", "MatMul"]
        outputs = [oracle.session(path).run(None, {"x": X})[0].tobytes() for path in (small, dense)]
        assert outputs[0] == outputs[1]

    def test_for_machines(self, small: Path) -> None:
        found = read_json(run("expand", "small.onnx", "-o", "dense.onnx", "--json"))
        assert found == {
            "output": "dense.onnx",
            "sites": found["sites"],
            "bytes_before": small.stat().st_size,
            "bytes_after": (small.parent / "dense.onnx").stat().st_size,
        }
        assert sorted(found["sites"]) == ["head/w", "layer1/w"]

    def test_of_a_plain_model_says_so(self, place: Path) -> None:
        result = run("expand", "model.onnx", "-o", "same.onnx")
        assert result.exit_code == 0
        assert "no coded weights" in result.stdout


class TestBench:
    def test_for_people_and_machines(self, small: Path) -> None:
        result = run("bench", "model.onnx", "small.onnx", "--inputs", "inputs.npz", "--seconds", "0.1")
        assert (result.exit_code, result.stderr) == (0, "")
        assert "B / A = " in result.stdout
        found = read_json(run("bench", "model.onnx", "small.onnx", "--seconds", "0.1", "--threads", "2", "--json"))
        assert (found["a"], found["b"], found["threads"]) == ("model.onnx", "small.onnx", 2)
        assert found["runs"] >= 3
        assert found["ratio"]["median"] > 0


class TestPasses:
    def test_all_with_their_options(self) -> None:
        result = run("passes")
        assert (result.exit_code, result.stderr) == (0, "")
        for info in describe_passes():
            assert info.name in result.stdout
            assert all(option.name in result.stdout for option in info.options)

    def test_for_machines(self) -> None:
        found = read_json(run("passes", "--json"))
        assert [entry["name"] for entry in found["passes"]] == pass_names()
        (bits,) = [option for entry in found["passes"] for option in entry["options"] if option["name"] == "bits"]
        assert (bits["default"], bits["per_site"]) == (8, True)


class TestDemo:
    def test_for_machines(self) -> None:
        result = run("demo", "--json")
        assert (result.exit_code, result.stderr) == (0, "")
        found = read_json(result)
        assert found["ratio"] > 5
        assert found["target_reached"] is True
        accuracy = found["evaluation"]["accuracy"]
        assert accuracy["labels"] == 500
        assert accuracy["top1_candidate"] > 0.95
        assert found["evaluation"]["bytes_after"] == found["bytes_after"]
        assert found["evaluation"]["violation"] is None

    def test_for_people(self) -> None:
        result = run("demo")
        assert (result.exit_code, result.stderr) == (0, "")
        assert "top-1 " in result.stdout
        assert "onnxshrink compress model.onnx -o small.onnx --calib inputs.npz --min-sqnr 30" in " ".join(
            result.stdout.split()
        )


class TestUsage:
    @pytest.mark.parametrize(
        "args",
        [
            [],
            ["nonsense"],
            ["compress"],
            ["compress", "model.onnx"],
            ["compress", "-o", "small.onnx"],
            ["compress", "model.onnx", "-o", "small.onnx", "--seed", "-1"],
            ["compress", "model.onnx", "-o", "small.onnx", "--seed", "x"],
            ["compress", "model.onnx", "-o", "small.onnx", "--min-sqnr", "loud"],
            ["compress", "model.onnx", "-o", "small.onnx", "--min-sqnr", "nan"],
            ["compress", "model.onnx", "-o", "small.onnx", "--min-sqnr", "1e9"],
            ["compress", "model.onnx", "-o", "small.onnx", "--max-drift", "-1"],
            ["compress", "model.onnx", "-o", "small.onnx", "--min-agreement", "97"],
            ["compress", "model.onnx", "-o", "small.onnx", "--unknown"],
            ["verify", "model.onnx"],
            ["bench", "model.onnx", "model.onnx", "--seconds", "0"],
            ["bench", "model.onnx", "model.onnx", "--threads", "0"],
            ["inspect", "model.onnx", "model.onnx"],
        ],
        ids=" ".join,
    )
    def test_that_is_wrong_exits_with_2_and_writes_nothing(self, place: Path, args: list[str]) -> None:
        before = sorted(place.iterdir())
        result = run(*args)
        assert result.exit_code == 2
        assert "Traceback" not in result.output
        assert result.stderr or not args
        assert sorted(place.iterdir()) == before

    @pytest.mark.parametrize("command", ["compress", "verify", "inspect", "expand", "bench", "passes", "demo"])
    def test_every_command_has_help_and_json(self, command: str) -> None:
        for flag in ("-h", "--help"):
            result = run(command, flag)
            assert (result.exit_code, result.stderr) == (0, "")
            assert "--json" in result.stdout

    def test_the_version_is_told(self) -> None:
        result = run("--version")
        assert (result.exit_code, result.stdout, result.stderr) == (0, f"onnxshrink {onnxshrink.__version__}\n", "")

    def test_an_internal_error_is_one_line_and_the_way_to_more(
        self, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise ZeroDivisionError("of all things")

        monkeypatch.setattr(api, "inspect", fail)
        result = run("inspect", "model.onnx")
        assert result.exit_code == 1
        assert result.stderr.startswith("error: internal error: ZeroDivisionError: of all things; ")
        assert result.stderr.count("\n") == 1
        monkeypatch.setenv("ONNXSHRINK_TRACEBACK", "1")
        assert "Traceback" in run("inspect", "model.onnx").stderr


def script(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs the command line in a process of its own, as the script that pip writes does."""
    module, _, function = ENTRY.partition(":")
    code = f"import sys; from {module} import {function}; sys.argv[0] = 'onnxshrink'; sys.exit({function}())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, env=environment, check=False, **options
    )


class TestProcess:
    def test_the_entry_point_is_there(self) -> None:
        module, _, function = ENTRY.partition(":")
        assert getattr(importlib.import_module(module), function) is cli.main

    def test_compress_verify_and_inspect(self, place: Path) -> None:
        done = script("compress", "model.onnx", "-o", "small.onnx", "--calib", "inputs.npz", "--json")
        assert (done.returncode, done.stderr) == (0, "")
        assert read_json(done.stdout)["bytes_after"] == (place / "small.onnx").stat().st_size
        done = script("verify", "model.onnx", "small.onnx", "--min-sqnr", "200")
        assert done.returncode == 4
        assert done.stderr.startswith("error: output 'y': SQNR must be at least 200 dB, got ")
        done = script("inspect", "small.onnx", "--json")
        assert (done.returncode, done.stderr) == (0, "")
        assert len(read_json(done.stdout)["weights"]) == 2

    def test_what_libraries_print_does_not_reach_stdout(self, place: Path) -> None:
        """The ONNX checker warns of experimental ops from C++, on stdout."""
        nodes = [
            helper.make_node("ImageScaler", ["x"], ["h"], scale=2.0, bias=[1.0]),
            helper.make_node("MatMul", ["h", "w"], ["y"]),
        ]
        shapes = [oracle.tensor("x", [1, 1, 4, 64])], [oracle.tensor("y", [1, 1, 4, 64])]
        onnx.save(oracle.make_model(nodes, *shapes, [oracle.value("w", normal(64, 64))], opset=9), "odd.onnx")
        done = script("compress", "odd.onnx", "-o", "small.onnx", "--json")
        assert done.returncode == 0
        assert read_json(done.stdout)["bytes_after"] == (place / "small.onnx").stat().st_size
        assert "experimental" in done.stderr

    def test_a_pipe_that_closes_early_is_no_crash(self, place: Path) -> None:
        module, _, function = ENTRY.partition(":")
        code = f"from {module} import {function}; {function}()"
        read, write = os.pipe()
        os.close(read)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", code, "passes"],
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            check=False,
        )
        os.close(write)
        assert "Traceback" not in done.stderr
        assert "internal error" not in done.stderr

    def test_a_terminal_that_knows_ascii_only_is_no_crash(self, place: Path) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONIOENCODING": "ascii",
            "PYTHONUTF8": "0",
            "LC_ALL": "C",
        }
        module, _, function = ENTRY.partition(":")
        code = f"from {module} import {function}; {function}()"
        command = [sys.executable, "-c", code, "compress", "model.onnx", "-o", "small.onnx"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert (done.returncode, done.stderr) == (0, "")
