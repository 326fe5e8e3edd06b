"""What the sweep's driver calls of Ray, in one process: for tests, and to time the driver alone."""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any


class TaskError(Exception):
    """As Ray's: what a task raised is its cause."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Lost(Exception):
    """A task is gone with its process, machine or memory more often than it may be repeated."""


class PretendedRay:
    """A cluster of so many CPUs: tasks run here, and end in an order that is drawn.

    Args:
        cpus: tasks that run at once; others wait.
        at_once: tasks that end between two looks of the driver.
        train: what takes the place of the driver's task; None runs it.
        gpus: that tasks share, if they ask for some.

    Attributes:
        put_bytes: of all that was put into the cluster's memory.
        most_running: the most tasks that ever ran at once.
    """

    exceptions = SimpleNamespace(
        RayTaskError=TaskError, WorkerCrashedError=Lost, OutOfMemoryError=Lost, NodeDiedError=Lost
    )

    def __init__(
        self,
        cpus: int,
        at_once: int = 1,
        train: Callable[..., Any] | None = None,
        gpus: float = 0.0,
    ) -> None:
        self._cpus, self._at_once, self._train, self._gpus = cpus, at_once, train, gpus
        self._slots = cpus
        self._draw = random.Random(0)
        self._numbers = itertools.count()
        self._running: dict[int, Callable[[], Any]] = {}
        self._queue: dict[int, Callable[[], Any]] = {}
        self._done: dict[int, Any] = {}
        self.put_bytes = 0
        self.most_running = 0

    @contextmanager
    def installed(self) -> Iterator[PretendedRay]:
        """Be what ``import ray`` gives."""
        before = sys.modules.pop("ray", None)
        sys.modules["ray"] = self  # type: ignore[assignment]
        try:
            yield self
        finally:
            # Not `mock.patch.dict`, which would unload whatever was imported meanwhile.
            del sys.modules["ray"]
            if before is not None:
                sys.modules["ray"] = before

    def is_initialized(self) -> bool:
        return True

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": float(self._cpus)} | ({"GPU": self._gpus} if self._gpus else {})

    def put(self, value: Any) -> Any:
        if isinstance(value, dict):
            self.put_bytes += sum(map(len, value.values()))
        return SimpleNamespace(value=value)

    def remote(self, **options: Any) -> Callable[..., Any]:
        if options["num_gpus"]:
            self._slots = min(self._cpus, int(self._gpus / options["num_gpus"]))

        def decorated(task: Callable[..., Any]) -> Any:
            return SimpleNamespace(remote=lambda *given: self._submit(self._train or task, given))

        return decorated

    def _submit(self, task: Callable[..., Any], given: Sequence[Any]) -> int:
        number = next(self._numbers)
        # What is put is handed over itself where it is an argument of its own.
        given = [each.value if isinstance(each, SimpleNamespace) else each for each in given]
        self._queue[number] = lambda: task(*given)
        return number

    def wait(
        self, references: list[int], num_returns: int, timeout: float
    ) -> tuple[list[int], list[int]]:
        """Let some tasks end, unless some have; at most so many of those that have."""
        for number in list(itertools.islice(self._queue, self._slots - len(self._running))):
            self._running[number] = self._queue.pop(number)
        self.most_running = max(self.most_running, len(self._running))
        if not self._done:
            running = list(self._running)
            for number in self._draw.sample(running, min(self._at_once, len(running))):
                task = self._running.pop(number)
                try:
                    self._done[number] = task()
                except Lost as error:
                    self._done[number] = error
                except Exception as error:
                    self._done[number] = TaskError(error)
        done = [number for number in references if number in self._done][:num_returns]
        return done, [number for number in references if number not in done]

    def get(self, reference: Any) -> Any:
        if isinstance(reference, SimpleNamespace):
            return reference.value
        result = self._done.pop(reference)
        if isinstance(result, TaskError | Lost):
            raise result
        return result

    def cancel(self, reference: int, force: bool) -> None:
        for place in (self._queue, self._running, self._done):
            place.pop(reference, None)
