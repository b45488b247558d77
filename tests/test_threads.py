"""Tests of the limit on BLAS threads: it holds inside, however it is nested, and nothing of it is left outside."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import scipy.linalg  # brings a BLAS of its own
from onnx import parser
from threadpoolctl import threadpool_info, threadpool_limits

from onnxshrink.api import compress
from onnxshrink.contract import Context, Pass, Report
from onnxshrink.graph.ir import Graph
from onnxshrink.threads import one_blas_thread

assert scipy.linalg


def blas_threads() -> set[int]:
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


pytestmark = pytest.mark.skipif(not blas_threads(), reason="threadpoolctl knows none of the BLAS libraries here")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """So that a limit shows on any machine."""
    with threadpool_limits(2, user_api="blas"):
        yield


def test_one_thread_inside_and_as_many_as_before_outside() -> None:
    assert blas_threads() == {2}
    with one_blas_thread():
        assert blas_threads() == {1}
        with one_blas_thread():
            assert blas_threads() == {1}
        assert blas_threads() == {1}
    assert blas_threads() == {2}


def test_it_holds_in_other_threads_too() -> None:
    with one_blas_thread(), ThreadPoolExecutor(2) as executor:
        assert all(threads == {1} for threads in executor.map(lambda _: blas_threads(), range(4)))


def test_an_error_ends_it() -> None:
    with pytest.raises(KeyError), one_blas_thread():
        raise KeyError
    assert blas_threads() == {2}


def test_the_last_to_leave_restores_what_was() -> None:
    first, second = one_blas_thread(), one_blas_thread()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert blas_threads() == {1}
    second.__exit__(None, None, None)
    assert blas_threads() == {2}


seen: list[set[int]] = []


@dataclass(frozen=True, kw_only=True)
class Spy(Pass):
    """Notes how many threads it may use."""

    name: ClassVar[str] = "spy"

    def apply(self, graph: Graph, context: Context) -> Report:
        seen.extend(context.map(lambda _: blas_threads(), [0, 1]))
        return Report()


def test_passes_work_under_it() -> None:
    seen.clear()
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]> g (float[N, 2] x) => (float[N, 2] y)
        <float[2, 2] w = {1, 2, 3, 4}> { y = MatMul(x, w) }""")
    compress(model, Spy(), calibration=[{"x": np.ones((1, 2), np.float32)}] * 4)
    assert seen == [{1}, {1}]
    assert blas_threads() == {2}
