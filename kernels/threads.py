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
from types import TracebackType

import numba
import torch

__all__ = ["count_threads", "follow_torch", "launch", "over_tickets"]

# Slices per thread: enough to even out tickets that take longer, few enough to cost nothing.
_SLICES = 4


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

    def __enter__(self) -> None:
        self._lock.acquire()
        try:
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
        self._lock.release()

    def renew(self) -> None:
        """Forget an owner that a fork left in the parent."""
        self._lock = threading.RLock()


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
    if threads == 1:
        if tickets:
            work(0, 0, tickets)
        return
    slices = min(tickets, threads * _SLICES)
    following = itertools.count()

    def take_slices(thread: int) -> None:
        while (slice_ := next(following)) < slices:
            work(thread, slice_ * tickets // slices, (slice_ + 1) * tickets // slices)

    with ThreadPoolExecutor(threads) as pool:
        # Drained, because an exception surfaces only where its result is asked for.
        for _ in pool.map(take_slices, range(threads)):
            pass
