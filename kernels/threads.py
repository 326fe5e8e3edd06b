"""How Numba kernels share the machine: as many threads as torch uses, one launch at a time.

Numba's thread pools differ by platform: `workqueue` breaks when two Python threads launch into it,
`omp` and `tbb` do not. Every parallel kernel is therefore launched under one lock:

    with launch():
        _kernel(...)

Processes that use these kernels must be started by "spawn" or "forkserver", not by "fork" after
the first launch: GNU OpenMP does not survive a fork, and Numba ends the child with a message.
"""

from __future__ import annotations

import os
import threading
from types import TracebackType

import numba
import torch

__all__ = ["follow_torch", "launch"]


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
