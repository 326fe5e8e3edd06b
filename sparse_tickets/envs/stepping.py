"""Copies of an environment, stepped one after another on rows of arrays that processes may share.

Run as a program this file is a worker, which holds such copies for another process: `workers.py` is
the other side. A worker starts fast and stays small: it imports neither torch nor this package.
"""

from __future__ import annotations

import mmap
import os
import pickle
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium.spaces import Discrete, Space

__all__ = ["ArrayLayout", "Arrays", "Stepper", "describe", "flatten"]

_ALIGNMENT = 64


class ArrayLayout(NamedTuple):
    """Which arrays N copies need.

    Attributes:
        rows: N.
        features: D, of a flat observation.
        shape: of one action.
        dtype: of one action.
    """

    rows: int
    features: int
    shape: tuple[int, ...]
    dtype: str

    def fields(self) -> list[tuple[tuple[int, ...], str]]:
        """Shape and dtype of each of `Arrays`."""
        one, flat = (self.rows,), (self.rows, self.features)
        action = ((self.rows, *self.shape), self.dtype)
        return [action, (one, "?"), (flat, "f8"), (flat, "f8"), (one, "f8"), (one, "?"), (one, "?")]

    def arrays(self, memory: Any = None) -> Arrays:
        """The arrays in a memory of `size` bytes, or of zeros in one of their own."""
        memory = bytearray(self.size) if memory is None else memory
        found, begin = [], 0
        for shape, dtype in self.fields():
            found.append(np.ndarray(shape, dtype, memory, begin))
            begin += _aligned(found[-1].nbytes)
        return Arrays(*found)

    @property
    def size(self) -> int:
        """Bytes of all arrays."""
        return sum(
            _aligned(int(np.prod(shape)) * np.dtype(dtype).itemsize)
            for shape, dtype in self.fields()
        )


class Arrays(NamedTuple):
    """What N copies are told, and what they tell: a row each.

    Attributes:
        action: ``[N, ...]``, as the environment takes it.
        resting: ``[N]`` bool, who does not act.
        obs: ``[N, D]`` float64, flat: what to act on next.
        final_obs: ``[N, D]`` float64, flat: what the action led to.
        reward: ``[N]`` float64.
        terminated: ``[N]`` bool.
        truncated: ``[N]`` bool, also where `terminated` is.
    """

    action: np.ndarray
    resting: np.ndarray
    obs: np.ndarray
    final_obs: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray


class Stepper:
    """Some of an environment's copies.

    Args:
        make: makes one.
        arrays: of all copies.
        rows: those of these copies.
        name: of the environment.
        copies: per ticket.

    Attributes:
        arrays: as given.
        envs: the copies.
    """

    def __init__(
        self,
        make: Callable[[], gymnasium.Env],
        arrays: Arrays,
        rows: range,
        name: str,
        copies: int,
    ) -> None:
        self.arrays = arrays
        self.envs: list[gymnasium.Env] = []
        self._rows, self._who = rows, partial(describe, name, copies)
        try:
            for _ in rows:
                self.envs.append(make())
        except BaseException:
            self.close()
            raise

    def reset(self, seeds: Sequence[int]) -> None:
        """Start every copy afresh, from a seed of its own."""
        row = self._rows.start
        try:
            for row, env, seed in zip(self._rows, self.envs, seeds, strict=True):
                observation, _ = env.reset(seed=seed)
                self.arrays.obs[row] = self._flat(observation, row)
        except Exception as error:
            error.add_note(f"at the reset of {self._who(row)}")
            raise

    def step(self) -> None:
        """Act in every copy that does not rest, and restart those whose episode ends."""
        arrays, rows = self.arrays, slice(self._rows.start, self._rows.stop)
        # Not shared: an environment may keep its action.
        actions = arrays.action[rows].copy()
        row = rows.start
        try:
            for index in np.flatnonzero(~arrays.resting[rows]).tolist():
                row, env = rows.start + index, self.envs[index]
                observation, reward, ended, cut, _ = env.step(actions[index])
                arrays.reward[row] = self._number(reward, row)
                arrays.terminated[row], arrays.truncated[row] = ended, cut
                flat = self._flat(observation, row)
                arrays.final_obs[row] = flat
                if ended or cut:
                    observation, _ = env.reset()
                    flat = self._flat(observation, row)
                arrays.obs[row] = flat
        except Exception as error:
            error.add_note(f"at a step of {self._who(row)}")
            raise

    def close(self) -> None:
        """Close every copy, whatever one of them raises."""
        with ExitStack() as stack:
            for env in self.envs:
                stack.callback(env.close)
        self.envs.clear()

    def _flat(self, observation: Any, row: int) -> np.ndarray:
        return flatten(self.envs[0].observation_space, observation, partial(self._who, row))

    def _number(self, reward: Any, row: int) -> float:
        try:
            return float(reward)
        except (TypeError, ValueError):
            raise TypeError(
                f"{self._who(row)} must return a number as reward, got {reward!r}"
            ) from None


def describe(name: str, copies: int, row: int) -> str:
    """Which copy a row is."""
    ticket, own = divmod(row, copies)
    return f"{name} (ticket {ticket}, copy {own})"


def flatten(space: Space[Any], observation: Any, who: Callable[[], str]) -> np.ndarray:
    """One observation as a vector of numbers; it may share the observation's memory.

    Raises:
        ValueError: it is not what its space promises.
    """
    if isinstance(space, Discrete):
        flat = np.zeros(int(space.n))
        index = int(observation) - int(space.start)
        if not 0 <= index < space.n:
            raise ValueError(f"{who()} must return observations in {space}, got {observation!r}")
        flat[index] = 1.0
        return flat
    given = np.asarray(observation)
    if given.shape != space.shape:
        raise ValueError(
            f"{who()} must return observations of its space's shape {space.shape}, "
            f"got {given.shape}"
        )
    return given.reshape(-1)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _serve(channel: Connection) -> None:
    """Do what the other process asks until it is gone; answer None, or an error and its place."""
    steppers: dict[int, Stepper] = {}
    while True:
        try:
            command, number, *given = channel.recv()
            answer: Any = None
            try:
                if command == "open":
                    steppers[number] = _open(channel, *given)
                elif command == "reset":
                    steppers[number].reset(*given)
                elif command == "step":
                    steppers[number].step()
                elif number in steppers:  # not so where opening it failed, or others share it
                    steppers.pop(number).close()
            except Exception as error:
                answer = _portable(error)
            channel.send(answer)
        except (EOFError, ConnectionError):
            break
    for stepper in steppers.values():
        stepper.close()
    # Nothing is left that taking an interpreter down would save.
    sys.stdout.flush()
    os._exit(0)


def _open(
    channel: Connection,
    path: list[str],
    made: bytes,
    fields: tuple[Any, ...],
    rows: range,
    name: str,
    copies: int,
) -> Stepper:
    memory, layout = recv_handle(channel), ArrayLayout(*fields)
    try:
        shared = mmap.mmap(memory, layout.size)
    finally:
        os.close(memory)
    sys.path[:] = path
    return Stepper(pickle.loads(made), layout.arrays(shared), rows, name, copies)


def _portable(error: Exception) -> bytes:
    """An error that knows the places it passed through; its text, where it cannot be pickled."""
    frames = traceback.extract_tb(error.__traceback__)
    told = "in a worker process:\n" + "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(told)
    error.frames = [(frame.filename, frame.lineno) for frame in frames]  # type: ignore[attr-defined]
    return pickle.dumps(error)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
