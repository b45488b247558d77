"""What is built is what is in the tree, it can be imported from every place, and modules show the names they say they do."""

from __future__ import annotations

import ast
import importlib
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
STEM = f"{PROJECT['name']}-{PROJECT['version']}"
HEAVY = {"numpy", "onnx", "onnx_graphsurgeon", "onnxruntime", "scipy"}
TERMINAL = {"rich", "typer"}


def sources() -> list[str]:
    """Returns every file that a user needs, as the wheel names it."""
    found = [
        path.relative_to(ROOT)
        for pattern in ("onnxshrink/**/*.py", "passes/*.py", "onnxshrink/demo/*.*", "onnxshrink/py.typed")
        for path in ROOT.glob(pattern)
        if path.relative_to(ROOT).parts[:2] != ("onnxshrink", "passes")  # the link, where globs follow it
    ]
    return sorted({f"onnxshrink/{path}" if path.parts[0] == "passes" else str(path) for path in found})


def copy_tree(target: Path, *, link: bool) -> Path:
    """Copies what a build needs; without the link where links are not supported."""
    forget = shutil.ignore_patterns("__pycache__", "*.egg-info", *([] if link else ["passes"]))
    shutil.copytree(ROOT / "onnxshrink", target / "onnxshrink", symlinks=True, ignore=forget)
    for folder in ("passes", "tests", "benchmarks"):
        shutil.copytree(ROOT / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in [path for path in ROOT.iterdir() if path.is_file()]:
        shutil.copy(file, target)
    return target


def build(tree: Path, kind: str, target: Path) -> Path:
    """Runs one hook of the build backend, without pip, network or isolation, and returns what it wrote."""
    target.mkdir(parents=True, exist_ok=True)
    script = "import sys; from setuptools import build_meta; getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2])"
    subprocess.run([sys.executable, "-c", script, kind, str(target)], cwd=tree, check=True, capture_output=True)
    (built,) = target.iterdir()
    return built


def python(code: str, *site: Path, cwd: Path | None = None) -> str:
    """Runs code in an interpreter that knows the standard library and the given site folders only."""
    prepare = f"import site\nfor folder in {[str(folder) for folder in site]}: site.addsitedir(folder)\n"
    command = [sys.executable, "-S", "-c", prepare + code]
    return subprocess.run(command, cwd=cwd or os.sep, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("wheel")
    return build(copy_tree(place / "tree", link=True), "wheel", place / "dist")


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sdist")
    return build(copy_tree(place / "tree", link=True), "sdist", place / "dist")


def contents(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return sorted(name for name in archive.namelist() if not name.startswith(f"{STEM}.dist-info/"))


def unpack(archive: Path, target: Path) -> Path:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(target)
    else:
        with tarfile.open(archive) as opened:
            opened.extractall(target, filter="data")
    return target


class TestBuilds:
    def test_the_wheel_is_the_tree(self, wheel: Path) -> None:
        assert contents(wheel) == sources()
        assert {"onnxshrink/demo/digits.onnx", "onnxshrink/passes/tidy.py", "onnxshrink/py.typed"} <= set(sources())

    def test_the_sdist_holds_the_tree_and_its_tests(self, sdist: Path) -> None:
        with tarfile.open(sdist) as archive:
            files = {member.name.removeprefix(f"{STEM}/") for member in archive.getmembers() if member.isfile()}
        tests = {str(path.relative_to(ROOT)) for path in ROOT.glob("tests/**/*.py")}
        shipped = {name.removeprefix("onnxshrink/") if "/passes/" in name else name for name in sources()}
        assert shipped | tests <= files
        assert not [name for name in files if "__pycache__" in name or name.startswith("build/")]

    def test_the_wheel_from_the_sdist_is_the_same(self, wheel: Path, sdist: Path, tmp_path: Path) -> None:
        tree = unpack(sdist, tmp_path) / STEM
        assert not (tree / "onnxshrink" / "passes").exists()  # an sdist carries no link
        assert contents(build(tree, "wheel", tmp_path / "dist")) == contents(wheel)

    def test_an_installed_wheel_knows_its_version_and_command(self, wheel: Path, tmp_path: Path) -> None:
        site = unpack(wheel, tmp_path)
        version = "import onnxshrink; print(onnxshrink.__version__)"
        command = "from importlib.metadata import entry_points as e; print(*(x.value for x in e(name='onnxshrink')))"
        assert python(version, site) == PROJECT["version"]
        assert python(command, site) == PROJECT["scripts"]["onnxshrink"] == "onnxshrink.cli:main"

    @pytest.mark.parametrize("link", [True, False], ids=["with-link", "without-link"])
    def test_an_editable_install_reads_the_tree(self, tmp_path: Path, *, link: bool) -> None:
        tree = copy_tree(tmp_path / "tree", link=link)
        site = unpack(build(tree, "editable", tmp_path / "dist"), tmp_path / "site")
        code = "import onnxshrink.passes as p, importlib.util as u; print(u.find_spec('onnxshrink.passes.tidy').origin)"
        assert Path(python(code, site)).resolve() == tree / "passes" / "tidy.py"


class TestImports:
    def test_passes_are_not_a_package_of_their_own(self) -> None:
        code = "try: import passes\nexcept ImportError as error: print(error)"
        assert python(code, cwd=ROOT) == "import onnxshrink.passes, not passes"
        assert python("import onnxshrink.passes as p; print(p.__name__)", cwd=ROOT) == "onnxshrink.passes"

    @pytest.mark.parametrize(
        ("module", "absent"),
        [("onnxshrink", HEAVY | TERMINAL), ("onnxshrink.cli", HEAVY), ("onnxshrink.api", TERMINAL)],
    )
    def test_importing_brings_no_more_than_needed(self, module: str, absent: set[str]) -> None:
        code = f"import sys, {module}; print(*sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
        assert absent.intersection(done.stdout.split()) == set()


class Module:
    """The names of one file: what it offers, what it defines, and what it takes from its neighbours."""

    def __init__(self, file: str) -> None:
        self.name = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        source = ROOT / (file.removeprefix("onnxshrink/") if file.startswith("onnxshrink/passes/") else file)
        self.tree = ast.parse(source.read_text())
        self.offered = [
            ast.literal_eval(node.value)
            for node in self.tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        ]

    @property
    def public(self) -> set[str]:
        kinds = (ast.AsyncFunctionDef, ast.ClassDef, ast.FunctionDef)
        own = [node for node in self.tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
        return {node.name for node in own if not any("app." in ast.unparse(line) for line in node.decorator_list)}

    @property
    def taken(self) -> Iterator[tuple[str, str]]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("onnxshrink."):
                yield from ((node.module, alias.name) for alias in node.names)


MODULES = {module.name: module for module in map(Module, [name for name in sources() if name.endswith(".py")])}


class TestPublicNames:
    @pytest.mark.parametrize("module", [m for m in MODULES.values() if m.tree.body[1:]], ids=lambda module: module.name)
    def test_are_exactly_the_sorted_all(self, module: Module) -> None:
        if module.name == "onnxshrink.passes":
            assert module.offered == []
            return
        (offered,) = module.offered
        assert offered == sorted(set(offered), key=_constants_then_classes_then_the_rest)
        assert module.public - set(offered) == set()
        assert [name for name in offered if not hasattr(importlib.import_module(module.name), name)] == []

    @pytest.mark.parametrize("module", MODULES.values(), ids=lambda module: module.name)
    def test_no_room_reaches_for_what_another_does_not_offer(self, module: Module) -> None:
        hidden = [(home, name) for home, name in module.taken if name not in MODULES[home].offered[0]]
        assert [(home, name) for home, name in hidden if f"{home}.{name}" not in MODULES] == []

    def test_the_face_lists_itself(self) -> None:
        face = importlib.import_module("onnxshrink")
        assert set(dir(face)) == {*face.__all__, "__version__"}
        with pytest.raises(AttributeError, match="module 'onnxshrink' has no attribute 'nonsense'"):
            _ = face.nonsense


def _constants_then_classes_then_the_rest(name: str) -> tuple[bool, bool, str]:
    """The order of ruff's RUF022."""
    return not name.isupper(), not name[0].isupper(), name
