"""Names to passes: the built-in ones, those of installed packages, and what happens when two claim one name.

The packages are real ones for `importlib.metadata`: a folder on sys.path with a module and a ``.dist-info``.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from onnxshrink.contract import Pass
from onnxshrink.errors import RegistryError
from onnxshrink.recipe import parse_pass, parse_recipe
from onnxshrink.registry import ENTRY_POINT_GROUP, describe_passes, pass_class, pass_names

BUILT_IN = sorted(path.stem.replace("_", "-") for path in (Path(__file__).parents[1] / "passes").glob("[!_]*.py"))

SOURCE = '''
from dataclasses import dataclass
from typing import ClassVar
from onnxshrink.contract import Pass, Report
from onnxshrink.options import option

@dataclass(frozen=True, kw_only=True)
class Round(Pass):
    """Rounds weights.

    More about it.
    """
    name: ClassVar[str] = "round-weights"
    digits: int = option(3, "digits to keep", low=1)

    def apply(self, graph, context):
        return Report()

class NoPass:
    name = "no-pass"

not_a_class = Round()
'''

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a package on sys.path: its name, what its entry points say, the source of its module, and where."""

    def put(package: str, points: str, source: str = SOURCE, place: str = "site") -> None:
        site = tmp_path / f"{place}-{package}"
        info = site / f"{package}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{ENTRY_POINT_GROUP}]\n{points}\n")
        (site / f"{package}_passes.py").write_text(source)
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.delitem(sys.modules, f"{package}_passes", raising=False)

    return put


class TestBuiltIn:
    def test_every_file_of_passes_is_registered_under_its_name(self) -> None:
        assert pass_names() == BUILT_IN

    @pytest.mark.parametrize("name", BUILT_IN)
    def test_a_class_has_the_name_of_its_file(self, name: str) -> None:
        cls = pass_class(name)
        assert issubclass(cls, Pass)
        assert cls.name == name
        assert cls.__module__ == f"onnxshrink.passes.{name.replace('-', '_')}"
        assert cls() == cls()

    def test_an_unknown_name_is_answered_with_the_nearest(self) -> None:
        with pytest.raises(
            RegistryError, match=r"^unknown pass 'sparsity'; did you mean 'sparsify'\? Known: "
        ) as caught:
            pass_class("sparsity")
        assert all(name in str(caught.value) for name in BUILT_IN)
        assert isinstance(caught.value, LookupError)

    def test_only_the_asked_module_is_imported(self) -> None:
        code = "import sys; from onnxshrink.registry import pass_class; pass_class('tidy'); print(*sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        loaded = {name for name in done.stdout.split() if name.startswith("onnxshrink.passes.")}
        assert loaded == {"onnxshrink.passes.tidy"}


class TestThirdParty:
    def test_a_pass_is_found_and_used_like_any_other(self, install: Install) -> None:
        install("acme", "round-weights = acme_passes:Round")
        assert pass_names() == sorted([*BUILT_IN, "round-weights"])
        cls = pass_class("round-weights")
        assert cls.__module__ == "acme_passes"
        assert parse_pass("round-weights:digits=5") == cls(digits=5)
        recipe = parse_recipe('format = 1\n[[pass]]\nname = "round-weights"\noptions = { digits = 2 }')
        assert [step.run for step in recipe.steps] == [cls(digits=2)]
        (info,) = [info for info in describe_passes() if info.name == "round-weights"]
        assert info.summary == "Rounds weights."
        assert [(option.name, option.default, option.allowed) for option in info.options] == [
            ("digits", 3, "a whole number, at least 1")
        ]

    def test_suggestions_include_it(self, install: Install) -> None:
        install("acme", "round-weights = acme_passes:Round")
        with pytest.raises(RegistryError, match="did you mean 'round-weights'"):
            pass_class("round-weight")

    def test_a_clash_with_a_built_in_pass_names_both_owners(self, install: Install) -> None:
        install("acme", "tidy = acme_passes:Round")
        for ask in (pass_names, lambda: pass_class("tidy"), lambda: pass_class("sparsify"), describe_passes):
            with pytest.raises(
                RegistryError, match="^pass 'tidy' is claimed by onnxshrink and by acme; uninstall or rename"
            ):
                ask()

    def test_a_clash_of_two_packages_names_both_owners(self, install: Install) -> None:
        install("acme", "round-weights = acme_passes:Round")
        install("zeta", "round-weights = zeta_passes:Round")
        with pytest.raises(
            RegistryError, match="^pass 'round-weights' is claimed by (acme and by zeta|zeta and by acme); "
        ):
            pass_names()

    def test_one_package_seen_twice_is_no_clash(self, install: Install) -> None:
        install("acme", "round-weights = acme_passes:Round")
        install("acme", "round-weights = acme_passes:Round", place="again")
        assert pass_names().count("round-weights") == 1

    @pytest.mark.parametrize(
        ("point", "got"),
        [
            ("no-pass = acme_passes:NoPass", "<class 'acme_passes.NoPass'>"),
            ("round-weights = acme_passes:not_a_class", "Round(digits=3)"),
            ("other-name = acme_passes:Round", "<class 'acme_passes.Round'>"),
            ("whole-module = acme_passes", "<module 'acme_passes'"),
        ],
    )
    def test_what_is_no_pass_of_that_name_is_refused(self, install: Install, point: str, got: str) -> None:
        install("acme", point)
        name = point.partition(" ")[0]
        assert name in pass_names()
        message = f"pass '{name}': the entry point must name a Pass subclass with name = '{name}', got {got}"
        with pytest.raises(RegistryError) as caught:
            pass_class(name)
        assert str(caught.value).startswith(message)

    @pytest.mark.parametrize(
        ("source", "point", "reason"),
        [
            ("import not_there_at_all", "acme_passes:Round", "ModuleNotFoundError: No module named 'not_there_at_all'"),
            ("1 / 0", "acme_passes:Round", "ZeroDivisionError: division by zero"),
            (SOURCE, "acme_passes:Absent", "AttributeError: "),
            (SOURCE, "acme_absent:Round", "ModuleNotFoundError: No module named 'acme_absent'"),
        ],
    )
    def test_a_package_that_does_not_import_is_named(
        self, install: Install, source: str, point: str, reason: str
    ) -> None:
        install("acme", f"round-weights = {point}", source)
        with pytest.raises(RegistryError) as caught:
            pass_class("round-weights")
        assert str(caught.value).startswith(f"pass 'round-weights' of acme cannot be imported: {reason}")
        assert pass_class("tidy").name == "tidy"  # the others are as good as before
