"""Peers whose steps run in a process of their own, where what they load disturbs nobody.

The process waits while others take their turns. It is asked for one step at a time by what the
step is of, and keeps the steps of one problem and number of threads.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Hashable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

Step = Callable[[], Tensor]
Turn = Callable[[int], tuple[float, Tensor]]
"""Runs so many steps; returns their seconds and what the last one gave."""


class Apart:
    """One peer's process.

    Args:
        build: makes a step of a problem and a sparsity, with torch's number of threads set; found
            by its name in the new process.
    """

    def __init__(self, build: Callable[[Any, float], Step]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(build, other), daemon=True)
        self._process.start()
        other.close()

    def turn(self, problem: Hashable, sparsity: float, threads: int) -> Turn:
        """The turns of one step, which is built at the first; raises what goes wrong there."""

        def run(count: int) -> tuple[float, Tensor]:
            self._pipe.send((problem, sparsity, threads, count))
            found = self._pipe.recv()
            if isinstance(found, Exception):
                raise found
            seconds, result = found
            return seconds, torch.tensor(result)

        return run

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(10)
        self._process.kill()


def take(step: Step) -> Turn:
    """The turns of a step in this process."""

    def run(count: int) -> tuple[float, Tensor]:
        begin = time.perf_counter()
        for _ in range(count):
            result = step()
        return time.perf_counter() - begin, result

    return run


def _serve(build: Callable[[Any, float], Step], pipe: Connection) -> None:
    """Answer what is asked for until nobody can ask any more."""
    present, turns = None, {}
    with suppress(EOFError):
        while True:
            problem, sparsity, threads, count = pipe.recv()
            try:
                if present != (problem, threads):
                    present, turns = (problem, threads), {}
                    torch.set_num_threads(threads)
                    torch.compiler.reset()
                if sparsity not in turns:
                    turns[sparsity] = take(build(problem, sparsity))
                seconds, result = turns[sparsity](count)
                pipe.send((seconds, result.tolist()))
            except Exception as error:
                pipe.send(error)
