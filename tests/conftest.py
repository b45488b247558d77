"""Fixtures that several rooms of the tests share, and the lines that a run prints at its end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import corpus

_LINES = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_LINES] = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "corpus_name" in metafunc.fixturenames:
        skipped = [pytest.param("", marks=pytest.mark.skip(reason=corpus.ABSENT), id="absent")]
        metafunc.parametrize("corpus_name", corpus.model_names() or skipped)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash[_LINES]:
        terminalreporter.write_line(line)


@pytest.fixture
def corpus_model(corpus_name: str) -> Path:
    """The path of one real model after the other."""
    return corpus.model_path(corpus_name)


@pytest.fixture(scope="session")
def tell(pytestconfig: pytest.Config) -> Callable[[str], None]:
    """Prints a line at the end of the run, whether tests pass or fail."""
    return pytestconfig.stash[_LINES].append
