"""How Numba kernels share the machine: as many threads as torch uses, one launch at a time.

Numba's thread pools differ by platform: `workqueue` breaks when two Python threads launch into it,
`omp` and `tbb` do not. Every parallel kernel is therefore launched under one lock:

    with launch():
        _kernel(...)

Kernels that work through tickets one by one take plain threads instead, `over_tickets`: Numba
compiles everything a parallel loop calls three times more, and a slice is the larger unit anyway.

Processes that use parallel kernels must be started by "spawn" or "forkserver", not by "fork" after
the first launch: GNU OpenMP does not survive a fork, and Numba ends the child with a message.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import TracebackType

import numba
import torch

__all__ = ["count_threads", "follow_torch", "launch", "over_tickets"]

# Slices per thread: enough to even out tickets that take longer, few enough to cost nothing.
_SLICES = 2


def follow_torch() -> None:
    """Give Numba's next parallel kernel `torch.get_num_threads()` threads, at most Numba's pool.

    The pool is sized once per process (``NUMBA_NUM_THREADS``, by default the number of cores);
    a larger torch setting is met by the whole pool. The count belongs to the calling thread.
    """
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))


class _Launch:
    """Holds the lock for one launch; re-entrant, so a launcher may call another launcher."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._threads: list[int] = []

    def __enter__(self) -> None:
        self._lock.acquire()
        try:
            self._threads.append(torch.get_num_threads())
            follow_torch()
        except BaseException:
            self._lock.release()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # A parallel region of Numba's OpenMP layer sets the thread count of torch's OpenMP too.
        threads = self._threads.pop()
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        self._lock.release()

    def renew(self) -> None:
        """Forget an owner that a fork left in the parent, and threads that it did not copy."""
        self._lock = threading.RLock()
        _pool.cache_clear()


_launch = _Launch()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_launch.renew)


def launch() -> _Launch:
    """Context manager for one parallel launch: takes the lock and sets the thread count."""
    return _launch


def count_threads(tickets: int) -> int:
    """How many threads `over_tickets` uses: as many as torch, at most one per ticket."""
    return max(1, min(torch.get_num_threads(), tickets))


def over_tickets(tickets: int, work: Callable[[int, int, int], None]) -> None:
    """Call ``work(thread, begin, end)`` for slices that partition the tickets, on several threads.

    A thread that is done with a slice takes the next, so which thread works on a ticket is not
    fixed: a ticket's result must not depend on it.

    Args:
        tickets: P.
        work: calls a Numba function compiled with ``nogil=True``; ``thread`` counts from 0 and
            tells apart what runs at once, e.g. for scratch.
    """
    threads = count_threads(tickets)
    slices = min(tickets, threads * _SLICES) if threads > 1 else min(tickets, 1)
    following = itertools.count()

    def take_slices(thread: int) -> None:
        while (slice_ := next(following)) < slices:
            work(thread, slice_ * tickets // slices, (slice_ + 1) * tickets // slices)

    helpers = [_pool().submit(take_slices, thread) for thread in range(1, threads)]
    try:
        # The caller works too: torch's idle threads spin for a while on the cores that helpers
        # need, and whoever gets to run takes the next slice.
        take_slices(0)
    finally:
        for helper in helpers:
            if not helper.cancel():
                helper.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="sparse_tickets")
