"""Processes that step environments side by side. How many there are changes no result.

They are programs of their own (`stepping.py`), not forks: no thread, lock or open file of this
process lives on in them, and no script is run a second time. One set of them steps all environments
of this process, and ends with the last of these, or with this process however that ends.
"""

from __future__ import annotations

import atexit
import itertools
import mmap
import os
import pickle
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from multiprocessing import Pipe
from multiprocessing.reduction import send_handle
from typing import Any

import cloudpickle
import gymnasium
import torch

from sparse_tickets.kernels.threads import end_idle_threads

from . import stepping
from .stepping import ArrayLayout

__all__ = ["Shared", "use_workers", "workers_for"]

# Fewer copies a process are not worth the messages.
_FEWEST = 4
_PATIENCE_S = 5.0
# Where cloudpickle says that code comes from which it carries.
_NOWHERE = "<dynamic-code>"
_SINGLE = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")

_chosen: ContextVar[int | None] = ContextVar("workers", default=None)


@contextmanager
def use_workers(count: int | None) -> Iterator[None]:
    """Step gymnasium environments made in this context in so many processes.

    Args:
        count: processes; 1 steps in this one. None leaves it to the copies: as many as torch has
            threads for what gymnasium knows by an id, this process for classes and functions.

    Raises:
        ValueError: fewer than one.
    """
    if count is not None and count < 1:
        raise ValueError(f"workers must be at least 1, got {count}")
    token = _chosen.set(count)
    try:
        with _crew.kept():
            yield
    finally:
        _chosen.reset(token)


def workers_for(asked: int | None, copies: int, by_id: bool) -> int:
    """How many processes step so many copies; 1 is this process.

    Args:
        asked: an environment's own number; without one that of `use_workers`.
        copies: of all tickets.
        by_id: whether gymnasium knows the environment.

    Raises:
        ValueError: fewer than one.
    """
    if asked is not None and asked < 1:
        raise ValueError(f"workers must be at least 1, got {asked}")
    count = _chosen.get() if asked is None else asked
    if count is not None:
        return min(count, copies)
    if not by_id or not hasattr(os, "memfd_create"):
        return 1
    return max(1, min(torch.get_num_threads(), copies // _FEWEST))


class Shared:
    """Copies of an environment in worker processes; otherwise what `stepping.Stepper` is.

    Args:
        make: makes one copy, in another process.
        layout: of the arrays.
        workers: how many processes share the copies.
        name: of the environment, in errors.
        copies: per ticket, in errors.

    Attributes:
        arrays: of all copies, zeros at first.

    Raises:
        ValueError: ``make`` cannot be sent to another process.
    """

    def __init__(
        self,
        make: Callable[[], gymnasium.Env],
        layout: ArrayLayout,
        workers: int,
        name: str,
        copies: int,
    ) -> None:
        made, self._file = _pickled(make, name)
        ends = [layout.rows * worker // workers for worker in range(workers + 1)]
        self._rows = [range(*pair) for pair in itertools.pairwise(ends)]
        self._name, self._number = name, _crew.enlist(workers)
        self._forget = weakref.finalize(self, _crew.leave, self._number)
        self._forget.atexit = False
        memory = os.memfd_create("sparse_tickets")
        try:
            os.ftruncate(memory, layout.size)
            self.arrays = layout.arrays(mmap.mmap(memory, layout.size))
            # Plain values: one of this package's classes would have a worker import it.
            fields = tuple(layout)
            given = [(sys.path, made, fields, rows, name, copies) for rows in self._rows]
            self._ask("open", given, memory)
        except BaseException:
            self._forget()
            raise
        finally:
            os.close(memory)

    def reset(self, seeds: Sequence[int]) -> None:
        """Start every copy afresh, from a seed of its own."""
        self._ask("reset", [(seeds[rows.start : rows.stop],) for rows in self._rows])

    def step(self) -> None:
        """Act in every copy that does not rest, and restart those whose episode ends."""
        self._ask("step", [()] * len(self._rows))

    def close(self) -> None:
        """Close every copy, whatever one of them raises."""
        if self._forget.alive:
            try:
                self._ask("close", [()] * len(self._rows))
            finally:
                self._forget()

    def _ask(
        self, command: str, given: Sequence[tuple[Any, ...]], memory: int | None = None
    ) -> None:
        end_idle_threads()
        answers = _crew.ask(command, self._number, self._name, given, memory)
        for answer in answers:
            if answer is not None:
                error = pickle.loads(answer)
                error.frames = [
                    (self._file if place == _NOWHERE else place, line)
                    for place, line in error.frames
                ]
                raise error


class _Worker:
    """A process, and the channel to it."""

    def __init__(self) -> None:
        self.channel, theirs = Pipe()
        with theirs:
            # In a group of its own: a terminal's Ctrl-C is for this process to answer.
            self.process = subprocess.Popen(
                [sys.executable, "-P", stepping.__file__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                env=os.environ | _SINGLE,
                pass_fds=[theirs.fileno()],
                process_group=0,
            )

    def end(self, patience: float) -> None:
        """Let it close what it holds; kill it where that takes too long."""
        self.channel.close()
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class _Crew:
    """The workers of this process; none, unless something is shared among them or keeps them."""

    def __init__(self) -> None:
        self.forget()
        os.register_at_fork(after_in_child=self.forget)
        atexit.register(self._end, _PATIENCE_S)

    def forget(self) -> None:
        """Begin without workers; after a fork they are the other process's."""
        for worker in getattr(self, "_workers", ()):
            worker.channel.close()
            worker.process.returncode = 0
        # Not reentrant: a garbage collection amid an exchange must not begin another.
        self._lock = threading.Lock()
        self._workers: list[_Worker] = []
        self._numbers = itertools.count()
        self._shared: set[int] = set()
        self._left: deque[int] = deque()
        self._keepers = 0

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Workers outlive what is shared among them, to the end of the context."""
        with self._lock:
            self._keepers += 1
        try:
            yield
        finally:
            with self._lock:
                self._keepers -= 1
                self._tidy()

    def enlist(self, count: int) -> int:
        """Start as many workers as are missing; the number of what they will share."""
        with self._lock:
            while len(self._workers) < count:
                self._workers.append(_Worker())
            number = next(self._numbers)
            self._shared.add(number)
            return number

    def leave(self, number: int) -> None:
        """Nobody holds what has this number any more; may be called at any moment."""
        self._left.append(number)
        if self._lock.acquire(blocking=False):
            try:
                self._tidy()
            finally:
                self._lock.release()

    def ask(
        self,
        command: str,
        number: int,
        name: str,
        given: Sequence[tuple[Any, ...]],
        memory: int | None,
    ) -> list[bytes | None]:
        """Have the first workers do something, each its own; what they answer."""
        with self._lock:
            if number not in self._shared:
                if command == "close":
                    return []
                raise RuntimeError(
                    f"{name} cannot go on: its worker processes were stopped, or belong to the "
                    "process that this one is a fork of; make the environment again"
                )
            self._tidy()
            try:
                answers = self._exchange(command, number, given, memory)
            except (EOFError, ConnectionError) as error:
                lost = self._lost()
                self._end(0.0)
                raise RuntimeError(
                    f"a worker process of {name} ended with status {lost}, perhaps for lack of "
                    "memory or by a crash of the simulator; workers=1 steps in this process"
                ) from error
            except BaseException:
                # Their answers would come when somebody waits for others.
                self._end(0.0)
                raise
            if command == "close":
                self._shared.discard(number)
        return answers

    def _exchange(
        self, command: str, number: int, given: Sequence[tuple[Any, ...]], memory: int | None
    ) -> list[bytes | None]:
        workers = self._workers[: len(given)]
        for worker, arguments in zip(workers, given, strict=True):
            worker.channel.send((command, number, *arguments))
            if memory is not None:
                send_handle(worker.channel, memory, worker.process.pid)
        return [worker.channel.recv() for worker in workers]

    def _tidy(self) -> None:
        """Close what nobody holds; let the workers go where nothing needs them."""
        while self._left:
            number = self._left.popleft()
            if number in self._shared:
                self._shared.discard(number)
                with suppress(EOFError, ConnectionError):
                    self._exchange("close", number, [()] * len(self._workers), None)
        if not self._shared and not self._keepers:
            self._end(_PATIENCE_S)

    def _lost(self) -> int | None:
        """Exit status of a worker that is ending by itself."""
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            for worker in self._workers:
                if worker.process.poll() is not None:
                    return worker.process.returncode
            time.sleep(0.01)
        return None

    def _end(self, patience: float) -> None:
        workers, self._workers = self._workers, []
        self._shared.clear()
        for worker in workers:
            worker.end(patience)


_crew = _Crew()


def _pickled(make: Callable[[], gymnasium.Env], name: str) -> tuple[bytes, str]:
    """A maker for another process, and its file where it has to go along: none could import it."""
    parts = [make, *make.args, *make.keywords.values()] if isinstance(make, partial) else [make]
    names = {str(getattr(part, "__module__", None)) for part in parts} & sys.modules.keys()
    carried = [sys.modules[name] for name in sorted(names) if not _importable(name)]
    for module in carried:
        cloudpickle.register_pickle_by_value(module)
    try:
        file = getattr(carried[0], "__file__", None) if carried else None
        return cloudpickle.dumps(make), file or _NOWHERE
    except Exception as error:
        raise ValueError(
            f"workers must be 1 for {name}, which cannot be sent to another process: {error}"
        ) from error
    finally:
        for module in carried:
            cloudpickle.unregister_pickle_by_value(module)


def _importable(module: str) -> bool:
    root = module.partition(".")[0]
    return any(finder.find_spec(root, None) is not None for finder in sys.meta_path)
