"""The house rules of imports: contracts in pyproject.toml, kept by the tree, and broken by a tree that has a wrong import."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("onnxshrink", "passes")
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
VAGUE_NAMES = {"base", "common", "core", "helper", "helpers", "misc", "util", "utils"}

pytestmark = pytest.mark.skipif(
    not (ROOT / "onnxshrink" / "passes").is_dir(), reason="the link onnxshrink/passes is absent: import-linter would not see passes/"
)


def lint(root: Path, contract: str) -> subprocess.CompletedProcess[str]:
    script = "import sys; from importlinter.cli import lint_imports as lint; sys.exit(lint(limit_to_contracts=sys.argv[1:], no_cache=True))"
    return subprocess.run([sys.executable, "-c", script, contract], cwd=root, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, root / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    return root


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract["id"])
def test_the_tree_keeps(contract: dict[str, object]) -> None:
    done = lint(ROOT, str(contract["id"]))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{contract['name']} KEPT" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("contract", "file", "line"),
    [
        ("layers", "onnxshrink/contract.py", "import onnxshrink.pipeline"),
        ("layers", "onnxshrink/graph/ir.py", "import onnxshrink.contract"),
        ("layers", "onnxshrink/numerics/chunks.py", "import onnxshrink.options"),
        ("layers", "onnxshrink/errors.py", "def late():\n    import onnxshrink.report"),
        ("layers", "passes/tidy.py", "from onnxshrink.validate import compare"),
        ("layers", "onnxshrink/newcomer.py", ""),
        ("cycles", "onnxshrink/graph/ir.py", "import onnxshrink.graph.exporter"),
        ("passes", "passes/tidy.py", "import onnxshrink.passes.sparsify"),
        ("onnxruntime", "passes/tidy.py", "import onnxruntime"),
        ("onnxruntime", "onnxshrink/validate.py", "import onnxruntime"),
        ("graphsurgeon", "passes/tidy.py", "from onnx_graphsurgeon import Graph"),
        ("numerics", "onnxshrink/numerics/chunks.py", "from onnx import numpy_helper"),
        ("terminal", "onnxshrink/api.py", "import rich"),
        ("pictures", "onnxshrink/tables.py", "import matplotlib"),
        ("frameworks", "onnxshrink/testing.py", "import torch"),
    ],
)
def test_a_wrong_import_breaks(copied: Path, contract: str, file: str, line: str) -> None:
    path = copied / file
    before = path.read_text() if path.exists() else None
    path.write_text((before or "") + f"\n{line}\n")
    try:
        done = lint(copied, contract)
    finally:
        if before is None:
            path.unlink()
        else:
            path.write_text(before)
    module = "onnxshrink." + file.removeprefix("onnxshrink/").removesuffix(".py").replace("/", ".")
    assert done.returncode == 1, done.stdout + done.stderr
    assert module in done.stdout or Path(file).stem in done.stdout
    assert "BROKEN" in done.stdout


def test_every_contract_is_seen_to_break() -> None:
    (marks,) = test_a_wrong_import_breaks.pytestmark
    assert {case[0] for case in marks.args[1]} == {contract["id"] for contract in CONTRACTS}


def test_files_say_what_is_in_them() -> None:
    files = [path for folder in (*FOLDERS, "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    assert [str(path.relative_to(ROOT)) for path in files if path.stem in VAGUE_NAMES] == []
