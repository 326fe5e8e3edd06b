"""Tell the user what Numba compiles: it happens once per machine, and it takes seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from numba.core import event

__all__ = ["on_compile"]


class _Listener(event.Listener):
    """Reports the outermost kernel of this library under compilation; a load from cache is none."""

    def __init__(self, notify: Callable[[str | None], None]) -> None:
        self._notify = notify
        self._depth = 0

    def on_start(self, event: Any) -> None:
        self._depth += 1
        if self._depth == 1:
            function = event.data["dispatcher"].py_func
            module = function.__module__.removeprefix("sparse_tickets.kernels.")
            self._notify(f"{module.removesuffix('.cpu')}{function.__name__}".replace("_", " "))

    def on_end(self, event: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._notify(None)


@contextmanager
def on_compile(notify: Callable[[str | None], None]) -> Iterator[None]:
    """Call ``notify`` with a kernel's name when its compilation starts, and with None when it ends.

    Compiled kernels are cached on disk, so this happens on a machine's first run of each kernel.
    """
    listener = _Listener(notify)
    event.register("numba:compile", listener)
    try:
        yield
    finally:
        event.unregister("numba:compile", listener)
