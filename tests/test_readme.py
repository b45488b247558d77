"""The README is true: its Python runs, its recipe parses, its tables are those of the measured figures."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from onnxshrink.cli import app
from onnxshrink.recipe import parse_recipe
from onnxshrink.registry import pass_names

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_python_example_runs_and_says_what_it_did(tmp_path):
    (code,) = blocks("python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert re.fullmatch(r"\d+\.\dx smaller at \d+ dB\n", run.stdout)
    assert (tmp_path / "small.onnx").stat().st_size > 0


def test_recipe_parses():
    (text,) = blocks("toml")
    assert parse_recipe(text).steps[0].rules[0].match == "*/layer4/*"


def test_commands_and_passes_are_all_named():
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert set(re.findall(r"^\| `onnxshrink (\w+)", README, flags=re.MULTILINE)) == commands
    assert set(re.findall(r"^\| `([\w-]+)` \|", README, flags=re.MULTILINE)) == set(pass_names())


def test_tables_are_those_of_the_measured_figures():
    run = subprocess.run([sys.executable, ROOT / "benchmarks" / "readme_tables.py", "--check"], check=False)
    assert run.returncode == 0, "run benchmarks/readme_tables.py"
