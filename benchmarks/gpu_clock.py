"""Time contenders on a GPU three ways: with launches, replayed from a CUDA graph, and cold.

Everything is timed by events on the device, contenders in turn, as `sparse_tickets.timing` does on
a CPU. *Launches*: calls one after another from Python, caches warm; short kernels then wait for
Python. *Replay*: the same call captured once in a CUDA graph. *Cold*: a single replay after 256 MB
were written, so that nothing of it is left in L2; the host runs ahead meanwhile, so no launch
counts. A call that cannot be captured says why, and is compared by its direct calls.

A capture that breaks off leaves torch's allocator believing that it goes on, and a fatal error of
the device ends all work of the process: see `Timer.spoiled` and `is_lost`. Most calls that cannot
be captured are found out before, since they wait for the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from sparse_tickets.timing import Contender, Spread, Unverified

from .measure import Measured

__all__ = ["CudaTimer", "HostTimer", "Timer", "Times", "compare", "is_lost", "make_timer", "ratio"]

_FLUSH = 256 << 20
_SAMPLE_S = 0.005
_WARMUP = 3


class Timer(Protocol):
    """Seconds on some device.

    Attributes:
        spoiled: a capture broke off, and no other will succeed in this process.
    """

    spoiled: bool

    def seconds(self, run: Callable[[], Any], count: int) -> float:
        """Per call, of ``count`` calls in a row."""

    def cold_seconds(self, run: Callable[[], Any]) -> float:
        """Of one call that finds nothing in the caches."""

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """The same call replayed.

        Raises:
            RuntimeError: it cannot be captured.
        """


class CudaTimer:
    """Times by CUDA events on the current stream."""

    def __init__(self) -> None:
        self.spoiled = False
        self._buffer = torch.empty(_FLUSH // 4, device="cuda")
        # One for all captures: cuBLAS keeps a workspace for every stream it has seen.
        self._stream = torch.cuda.Stream()

    def seconds(self, run: Callable[[], Any], count: int) -> float:
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / count

    def cold_seconds(self, run: Callable[[], Any]) -> float:
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Keeps the device busy while the host enqueues the call.
        self._buffer.zero_()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            for _ in range(_WARMUP):
                run()
            with _refusing_to_wait():
                run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                kept = run()
        except Exception:
            self.spoiled = True
            raise
        torch.cuda.synchronize()

        def replay() -> object:
            graph.replay()
            return kept

        return replay


@contextmanager
def _refusing_to_wait() -> Iterator[None]:
    """Raise where the host would wait for the device, which breaks a capture."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def is_lost(device: torch.device) -> bool:
    """Whether every further call will fail, as after an illegal access on a GPU."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


class HostTimer:
    """Stands in where there is no GPU: the same calls by the wall clock; a rehearsal, no result."""

    spoiled = False

    def seconds(self, run: Callable[[], Any], count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            run()
        return (time.perf_counter() - began) / count

    def cold_seconds(self, run: Callable[[], Any]) -> float:
        return self.seconds(run, 1)

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        return run


def make_timer(device: torch.device) -> Timer:
    """The timer of a device."""
    return CudaTimer() if device.type == "cuda" else HostTimer()


@dataclass
class Times:
    """Seconds per unit of one contender, one entry per round.

    Attributes:
        wall: with launches.
        replay: replayed; empty if it could not be captured.
        cold: with cold caches.
        error: share of the tolerance used up.
        calls: per sample with launches.
        note: why it could not be captured.
    """

    wall: list[float] = field(default_factory=list)
    replay: list[float] = field(default_factory=list)
    cold: list[float] = field(default_factory=list)
    error: float | None = None
    calls: int = 1
    note: str = ""

    def measured(self, plan: str) -> Measured:
        """As a record keeps it; the host's CPU time is not measured here."""
        wall = Spread.of(self.wall)
        return Measured(
            wall=wall,
            cpu=wall,
            error=self.error,
            plan="; ".join(filter(None, (plan, self.note))),
            calls=self.calls,
            cold=Spread.of(self.cold),
            replay=Spread.of(self.replay) if self.replay else None,
        )


def compare(
    subject: Contender,
    peers: Sequence[Contender],
    timer: Timer,
    *,
    rounds: int,
    deadline: float,
) -> tuple[dict[str, Times], dict[str, str]]:
    """Verify contenders, then time them in turn.

    A peer that fails, or whose result is wrong, is left out and does not take the subject with it.

    Args:
        subject: whose speed-ups are asked for.
        peers: over whom; all names differ.
        timer: see `make_timer`.
        rounds: samples per contender and kind, fewer after the deadline, but at least three.
        deadline: by `time.monotonic`.

    Returns:
        Times of the subject and of the peers that are right; why the others were left out.

    Raises:
        Unverified: the subject's result is not the reference's; nothing was timed.
        ValueError: two contenders share a name.
    """
    names = [contender.name for contender in (subject, *peers)]
    if len(set(names)) < len(names):
        raise ValueError(f"contenders must have different names, got {names}")
    ready, left_out = [_prepare(subject, timer)], {}
    for peer in peers:
        try:
            ready.append(_prepare(peer, timer))
        except Exception as error:  # Compilers and other people's kernels fail in many ways.
            left_out[peer.name] = f"{type(error).__name__}: {_first_line(error)}"
    for index in range(rounds):
        if index >= min(3, rounds) and time.monotonic() > deadline:
            break
        first = index % len(ready)
        for each in (*ready[first:], *ready[:first]):
            run, times, units = each.contender.run, each.times, each.contender.units
            times.wall.append(timer.seconds(run, times.calls) / units)
            if each.replay is not None:
                times.replay.append(timer.seconds(each.replay, each.replays) / units)
            times.cold.append(timer.cold_seconds(each.replay or run) / units)
    return {each.contender.name: each.times for each in ready}, left_out


@dataclass
class _Ready:
    contender: Contender
    times: Times
    replay: Callable[[], Any] | None = None
    replays: int = 1
    """Per sample."""


def _prepare(contender: Contender, timer: Timer) -> _Ready:
    """Verified, warmed up, and captured in a graph if it can be."""
    times = Times()
    if contender.error is not None:
        times.error = contender.error()
        if not times.error <= 1:
            raise Unverified(
                f"{contender.name} must match the float64 reference, its error is "
                f"{times.error:.3g} times what is allowed"
            )
    times.calls = _calls(min(timer.seconds(contender.run, 1) for _ in range(_WARMUP)))
    try:
        replay = timer.capture(contender.run)
    except (RuntimeError, ValueError) as error:
        times.note = f"not captured in a graph: {_first_line(error)}"
        return _Ready(contender, times)
    return _Ready(contender, times, replay, _calls(timer.seconds(replay, _WARMUP)))


def _calls(once: float) -> int:
    """That make a sample long enough for the clock."""
    return max(1, min(1000, round(_SAMPLE_S / max(once, 1e-7))))


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:160]


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> Spread | None:
    """Their time over ours, paired within rounds; None if either was not measured."""
    if not theirs or not ours:
        return None
    return Spread.of([their / own for their, own in zip(theirs, ours, strict=True)])
