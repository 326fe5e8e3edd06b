"""How Numba kernels share the machine: as many threads as torch uses, one launch at a time.

Numba's thread pools differ by platform: `workqueue` breaks when two Python threads launch into it,
`omp` and `tbb` do not. Every parallel kernel is therefore launched under one lock:

    with launch():
        _kernel(...)

Kernels that work through tickets one by one take plain threads instead, `share`: Numba compiles
everything a parallel loop calls three times more. Threads claim tickets from a counter in memory,
without Python, until none is left; the caller works too, so a helper that wakes late costs its
help only.

Processes that use parallel kernels must be started by "spawn" or "forkserver", not by "fork" after
the first launch: GNU OpenMP does not survive a fork, and Numba ends the child with a message.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import cache, partial
from queue import SimpleQueue
from types import TracebackType

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core.extending import intrinsic

__all__ = [
    "claim",
    "count_threads",
    "finish",
    "follow_torch",
    "launch",
    "over_tickets",
    "share",
]

# Slices per thread: enough to even out tickets that take longer, few enough to cost nothing.
_SLICES = 2

# Places in the progress of a launch, each on a cache line of its own.
_CLAIMED, _DONE, _PLACES = 0, 16, 32
# How often the caller looks whether its helpers are done before it sleeps: some 20 us, about what
# a helper still needs for its last ticket, and less than falling asleep and waking up.
_GLANCES = 20_000


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
        _helpers.cache_clear()


_launch = _Launch()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_launch.renew)


def launch() -> _Launch:
    """Context manager for one parallel launch: takes the lock and sets the thread count."""
    return _launch


def count_threads(tickets: int) -> int:
    """How many threads `over_tickets` uses: as many as torch, at most one per ticket."""
    return max(1, min(torch.get_num_threads(), tickets))


@intrinsic
def _count_up(typingctx, array, index):
    """Atomically add one; returns the old value. Orders all that was read and written before."""

    def generate(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        place = builder.gep(data, [arguments[1]])
        return builder.atomic_rmw("add", place, ir.Constant(ir.IntType(64), 1), "seq_cst")

    return types.int64(array, types.int64), generate


@intrinsic
def _look(typingctx, array, index):
    """Atomic load."""

    def generate(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.load_atomic(builder.gep(data, [arguments[1]]), "acquire", 8)

    return types.int64(array, types.int64), generate


@njit(cache=True)
def claim(progress):
    """Number of the next ticket nobody works on; at least P if there is none."""
    return _count_up(progress, _CLAIMED)


@njit(cache=True)
def finish(progress):
    """Say that a claimed ticket is done."""
    _count_up(progress, _DONE)


@njit(cache=True, nogil=True)
def _is_done(progress, tickets, glances):
    while glances > 0 and _look(progress, _DONE) < tickets:
        glances -= 1
    return glances > 0


def share(tickets: int, work: Callable[[int, np.ndarray], None]) -> None:
    """Call ``work(thread, progress)`` on several threads at once, until every ticket is done.

    Which thread works on a ticket is not fixed: a ticket's result must not depend on it.

    Args:
        tickets: P.
        work: calls a Numba function compiled with ``nogil=True`` that works on ticket
            ``claim(progress)`` while that is below P, and calls ``finish(progress)`` after each.
            ``thread`` counts from 0 and tells apart what runs at once, e.g. for scratch.
    """
    threads = count_threads(tickets)
    progress = np.zeros(_PLACES, np.int64)
    if threads == 1:
        work(0, progress)
        return
    ended: SimpleQueue[BaseException | None] = SimpleQueue()
    open_work: Callable[[int, np.ndarray], None] | None = work

    def help_out(thread: int) -> None:
        mine = open_work
        if mine is None:
            return
        try:
            mine(thread, progress)
        except BaseException as error:
            ended.put(error)
        else:
            ended.put(None)

    _helpers().start([partial(help_out, thread) for thread in range(1, threads)])
    try:
        _take_part(tickets, work, progress, threads, ended)
    finally:
        # A helper that wakes up late has nothing to do: until then it must keep no arrays alive.
        open_work = None


def _take_part(
    tickets: int,
    work: Callable[[int, np.ndarray], None],
    progress: np.ndarray,
    threads: int,
    ended: SimpleQueue[BaseException | None],
) -> None:
    """The caller's part of `share`: it works too, waits for helpers, and raises their errors."""
    try:
        work(0, progress)
    except BaseException:
        # Nobody claims any more: wait for who still works on the caller's arrays.
        progress[_CLAIMED] = tickets
        for _ in range(1, threads):
            ended.get()
        raise
    # A helper that never woke up is not waited for; it will find nothing to do.
    while not _is_done(progress, tickets, _GLANCES):
        error = ended.get()
        if error is not None:
            raise error


def over_tickets(tickets: int, work: Callable[[int, int, int], None]) -> None:
    """Call ``work(thread, begin, end)`` for slices that partition the tickets, on several threads.

    For kernels that take a range of tickets; otherwise as `share`.
    """
    threads = count_threads(tickets)
    slices = min(tickets, threads * _SLICES) if threads > 1 else min(tickets, 1)

    def take_slices(thread: int, progress: np.ndarray) -> None:
        while (slice_ := claim(progress)) < slices:
            work(thread, slice_ * tickets // slices, (slice_ + 1) * tickets // slices)
            finish(progress)

    share(slices, take_slices)


class _Helpers:
    """Threads that sleep until there is something to call; as many as were ever needed at once."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0

    def start(self, calls: list[Callable[[], None]]) -> None:
        """Have each of ``calls`` called by some thread, soon; none of them raises."""
        while self._threads < min(len(calls), os.cpu_count() or 1):
            with self._lock:
                self._threads += 1
            name = f"sparse_tickets_{self._threads}"
            threading.Thread(target=self._serve, name=name, daemon=True).start()
        for call in calls:
            self._calls.put(call)

    def _serve(self) -> None:
        while True:
            # Not kept in a variable: it would keep the last call's arrays alive.
            self._calls.get()()


@cache
def _helpers() -> _Helpers:
    return _Helpers()
