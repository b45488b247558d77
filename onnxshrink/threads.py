"""How many threads linear algebra may use while several threads of ours work.

OpenBLAS, which numpy and scipy bring along, waits actively for the threads that it splits a product between. Where their cores
have other work, each product waits for the slowest of them: summing Gram matrices took several times as long as with one thread.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from threadpoolctl import threadpool_limits

__all__ = ["one_blas_thread"]


class _Limit:
    """A limit for the whole process, held as long as anyone wants it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._limits: threadpool_limits | None = None

    def take(self) -> None:
        with self._lock:
            if not self._holders:
                self._limits = threadpool_limits(limits=1, user_api="blas")
            self._holders += 1

    def give_back(self) -> None:
        with self._lock:
            self._holders -= 1
            if not self._holders and self._limits is not None:
                self._limits.restore_original_limits()
                self._limits = None


_LIMIT = _Limit()


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Limits the BLAS libraries loaded so far to one thread each, in the whole process; ONNX Runtime keeps its own threads.

    May be nested, and held by several threads at a time: the last to leave restores what was. What threadpoolctl does not
    know, Apple's Accelerate for one, stays as it is.
    """
    _LIMIT.take()
    try:
        yield
    finally:
        _LIMIT.give_back()
