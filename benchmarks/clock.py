"""Time contenders on a GPU: with launches, replayed from a CUDA graph, and with cold caches.

`sparse_tickets.timing` takes the turns, as on a CPU, by a clock that waits for the device.
*Launches*: calls one after another from Python, caches warm; short kernels then wait for Python.
*Replay*: the same call captured once in a CUDA graph (`triton.testing.do_bench_cudagraph` captures
it anew in every turn, and does not survive what cannot be captured). *Cold*: single replays by
`triton.testing.do_bench`, which empties L2 before each; the host runs ahead meanwhile, so no launch
counts. A call that cannot be captured says why, and is compared by its direct calls.

A capture that breaks off leaves torch's allocator believing that it goes on, and a fatal error of
the device ends all work of the process: see `GpuTimer.spoiled` and `is_lost`. Most calls that
cannot be captured are found out before, since they wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from sparse_tickets.timing import (
    Budget,
    Comparison,
    Contender,
    Spread,
    device_clock,
    interleave,
    paired,
    process_clock,
    turns,
    verify,
)

_WARMUP = 3
_COLD_MS = 2
"""Of single calls, at least one, in a turn."""


class GpuTimer(Protocol):
    """How a device is timed.

    Attributes:
        spoiled: a capture broke off, and no other will succeed in this process.
    """

    spoiled: bool

    def clock(self) -> tuple[float, float]:
        """Wall and CPU seconds, the device's work being done."""

    def cold(self, run: Callable[[], Any]) -> float:
        """Seconds of a call that finds nothing in the caches."""

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """The same call replayed.

        Raises:
            RuntimeError: it cannot be captured.
        """


class CudaTimer:
    """A GPU's."""

    def __init__(self) -> None:
        self.spoiled, self.clock = False, device_clock("cuda")
        # One for all captures: cuBLAS keeps a workspace for every stream it has seen.
        self._stream = torch.cuda.Stream()

    def cold(self, run: Callable[[], Any]) -> float:
        from triton.testing import do_bench

        return do_bench(run, warmup=1, rep=_COLD_MS, return_mode="median") / 1e3

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

    def clock(self) -> tuple[float, float]:
        return process_clock()

    def cold(self, run: Callable[[], Any]) -> float:
        before, _ = self.clock()
        run()
        return self.clock()[0] - before

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        return run


def make_timer(device: torch.device) -> GpuTimer:
    """The timer of a device."""
    return CudaTimer() if device.type == "cuda" else HostTimer()


@dataclass(frozen=True)
class OnGpu(Comparison):
    """What `compare` found.

    Attributes:
        replay: by contender, seconds per unit of replayed calls; without those not captured.
        replay_speedup: as `speedup`; a peer that cannot be captured runs as it can, since it must
            not drop out of the comparison.
        left_out: peers that failed, or whose result was wrong, and why.
        notes: by contender, why it was not captured.
    """

    replay: dict[str, tuple[float, ...]] = field(default_factory=dict)
    replay_speedup: dict[str, Spread] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def compare(
    subject: Contender,
    peers: Sequence[Contender],
    budget: Budget,
    timer: GpuTimer,
    *,
    cold: bool = True,
) -> OnGpu:
    """Verify contenders, then time them in turn.

    A peer that fails, or whose result is wrong, is left out and does not take the subject with it.

    Args:
        subject: whose speed-ups are asked for.
        peers: over whom; all names differ.
        budget: how long to time.
        timer: see `make_timer`.
        cold: time cold calls too.

    Raises:
        Unverified: the subject's result is not the reference's; nothing was timed.
        ValueError: two contenders share a name.
    """
    names = [contender.name for contender in (subject, *peers)]
    if len(set(names)) < len(names):
        raise ValueError(f"contenders must have different names, got {names}")
    found = OnGpu({}, {}, {})
    ready = [_verified(subject, found.errors)]
    for peer in peers:
        try:
            ready.append(_verified(peer, found.errors))
        except Exception as error:  # Compilers and other people's kernels fail in many ways.
            found.left_out[peer.name] = f"{type(error).__name__}: {_first_line(error)}"
    found.timings.update(interleave(ready, budget, timer.clock))
    captured = []
    for contender in ready:
        if contender.without is not None:
            continue
        try:
            captured.append(replace(contender, run=timer.capture(contender.run)))
        except (RuntimeError, ValueError) as error:
            found.notes[contender.name] = f"not captured in a graph: {_first_line(error)}"
    timings = interleave(captured, budget, timer.clock) if captured else {}
    found.replay.update({name: timing.wall for name, timing in timings.items()})
    if cold:
        replayed = {contender.name: contender for contender in captured}
        coldest = [replayed.get(contender.name, contender) for contender in ready]
        found.cold.update(_cold(coldest, budget, timer))
    walls = {name: timing.wall for name, timing in found.timings.items()}
    for ratios, seconds in (
        (found.speedup, walls),
        (found.replay_speedup, walls | found.replay if subject.name in found.replay else {}),
        (found.cold_speedup, found.cold),
    ):
        ratios.update(paired(subject, ready[1:], seconds))
    return found


def _cold(
    contenders: Sequence[Contender], budget: Budget, timer: GpuTimer
) -> dict[str, tuple[float, ...]]:
    """As `timing.interleave_cold`."""
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for contender in turns(contenders, budget, timer.clock):
        seconds[contender.name].append(timer.cold(contender.run) / contender.units)
    return {name: tuple(values) for name, values in seconds.items()}


def _verified(contender: Contender, errors: dict[str, float]) -> Contender:
    """The contender, having run once."""
    verify(contender, errors)
    contender.run()
    return contender


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:160]
