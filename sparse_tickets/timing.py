"""The one way things are timed here: interleaved, side by side, and only after they were verified.

Contenders take turns (A B C, B C A, ...), so that a machine that slows down slows all of them, and
a ratio is taken within each round. Between turns there is a pause and an untimed sample: idle
threads of one contender's pool spin for a while, on the cores that the next one needs. A speed-up
is reported by `verified_ratio` alone, which first compares every contender's own result with the
float64 reference and refuses if one is wrong.

Samples are warm: a call finds in the caches what the one before it left. `interleave_cold` times
single calls after the caches were overwritten; `alternate` times calls in turn, as a plain loop
makes them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Budget",
    "Comparison",
    "Contender",
    "Spread",
    "Timing",
    "Unverified",
    "alternate",
    "evictor",
    "interleave",
    "interleave_cold",
    "mismatch",
    "paired",
    "pinned_threads",
    "tolerance",
    "turns",
    "verified_ratio",
    "verify",
]

Clock = Callable[[], tuple[float, float]]
"""Seconds of wall and of CPU time (all threads of the process) since some fixed moment."""

_CACHE = 32 << 20
"""Bytes of the last-level cache where the system does not tell."""


class Unverified(RuntimeError):
    """No time is reported: a result is not the reference's, or a difference drowns in noise."""


@dataclass(frozen=True)
class Spread:
    """Median, 20th and 80th percentile of a sample."""

    median: float
    p20: float
    p80: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Percentiles interpolated linearly.

        Raises:
            ValueError: no values.
        """
        if not values:
            raise ValueError("values must not be empty")
        ordered = sorted(values)

        def percentile(share: float) -> float:
            position = share * (len(ordered) - 1)
            low = math.floor(position)
            high = min(low + 1, len(ordered) - 1)
            return ordered[low] + (position - low) * (ordered[high] - ordered[low])

        return cls(percentile(0.5), percentile(0.2), percentile(0.8), len(ordered))

    @property
    def noise(self) -> float:
        """Half of p80 - p20, as a share of the median."""
        return (self.p80 - self.p20) / (2 * self.median) if self.median else 0.0


@dataclass(frozen=True)
class Contender:
    """One way of computing a result.

    Attributes:
        name: as tables show it.
        run: computes the result once; this is timed.
        error: the result's distance from the float64 reference as a share of what is allowed, so
            that 1 is the largest error accepted. Called before anything is timed. None for a peer
            that is a system of its own, whose numbers correspond to nobody else's.
        units: what one `run` is worth, e.g. agent-steps; times are per unit.
        plan: which kernels run, for the record.
        without: the same work without the part of interest, timed in the same turn; the difference
            counts, which is what that part costs where it stands.
    """

    name: str
    run: Callable[[], Any]
    error: Callable[[], float] | None
    units: float = 1.0
    plan: str = ""
    without: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Budget:
    """How much timing is enough.

    Attributes:
        rounds: samples per contender.
        sample_seconds: a sample repeats its call until it lasts this long.
        warmup_seconds: each contender runs at least once, and at least this long, untimed.
        limit_seconds: no further round starts after this, from the third on.
        settle_seconds: pause before each sample.
    """

    rounds: int = 15
    sample_seconds: float = 0.01
    warmup_seconds: float = 0.02
    limit_seconds: float = 12.0
    settle_seconds: float = 0.005

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")


@dataclass(frozen=True)
class Timing:
    """Seconds per unit, one entry per round.

    Attributes:
        wall: elapsed time.
        cpu: time of all threads together.
        calls: calls per sample.
    """

    wall: tuple[float, ...]
    cpu: tuple[float, ...]
    calls: int


@dataclass(frozen=True)
class Comparison:
    """What `verified_ratio` found.

    Attributes:
        timings: by contender, the subject first.
        errors: by contender, see `Contender.error`; without those that cannot be compared.
        speedup: by peer: the peer's time over the subject's, paired within rounds; above 1 the
            subject is faster.
        cold: by contender, seconds per unit of single calls with cold caches; empty if not asked.
        cold_speedup: as `speedup`, of the cold calls.
    """

    timings: dict[str, Timing]
    errors: dict[str, float]
    speedup: dict[str, Spread]
    cold: dict[str, tuple[float, ...]] = field(default_factory=dict)
    cold_speedup: dict[str, Spread] = field(default_factory=dict)


def alternate(
    contenders: Sequence[Contender], budget: Budget, clock: Clock | None = None
) -> dict[str, tuple[float, ...]]:
    """Seconds per call in a plain loop, one entry per round: call by call, without any pause.

    Each contender finds caches, branches and idle threads as the others left them, which is how an
    operation is met in a program.

    Args:
        contenders: verified by the caller.
        budget: rounds, and how long each contender's calls last in one, at least.
        clock: `process_clock` by default.
    """
    clock = clock or process_clock
    found: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    begin, warm = clock()[0], 0
    while warm < 3 or clock()[0] - begin < budget.warmup_seconds:
        for contender in contenders:
            contender.run()
        warm += 1
    total = max(clock()[0] - begin, 1e-9)
    calls = max(1, math.ceil(budget.sample_seconds * len(contenders) * warm / total))
    for _ in range(budget.rounds):
        taken = dict.fromkeys(found, 0.0)
        for _ in range(calls):
            for contender in contenders:
                start = clock()[0]
                contender.run()
                taken[contender.name] += clock()[0] - start
        for name, seconds in taken.items():
            found[name].append(seconds / calls)
    return {name: tuple(seconds) for name, seconds in found.items()}


def process_clock() -> tuple[float, float]:
    """Wall and CPU seconds of this process."""
    return time.perf_counter(), time.process_time()


def device_clock(device: torch.device | str) -> Clock:
    """A clock that waits for the device's work to finish before it is read."""
    if torch.device(device).type != "cuda":
        return process_clock

    def read() -> tuple[float, float]:
        torch.cuda.synchronize(device)
        return process_clock()

    return read


@contextmanager
def pinned_threads(count: int) -> Iterator[None]:
    """Give torch, its BLAS and the Numba kernels (which follow torch) the same thread count.

    Raises:
        ValueError: a count below 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def tolerance(dtype: torch.dtype, terms: int) -> float:
    """Largest error accepted, relative to the result's largest entry.

    Sums of ``terms`` products accumulate in float32 (float64 for float64) with errors that add up
    like a random walk; the result is rounded once to `dtype`.
    """
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    walk = 2 * torch.finfo(accumulator).eps * math.sqrt(max(terms, 1))
    return walk + torch.finfo(dtype).eps


def mismatch(
    actual: Sequence[Tensor], expected: Sequence[Tensor], terms: Sequence[int] | int
) -> float:
    """Largest error of any tensor as a share of its `tolerance`; infinite for NaN.

    Args:
        actual: results.
        expected: the same in float64.
        terms: length of the sums behind each tensor, or one for all.

    Raises:
        ValueError: the two do not correspond in number or shape.
    """
    lengths = [terms] * len(expected) if isinstance(terms, int) else list(terms)
    if not len(actual) == len(expected) == len(lengths):
        raise ValueError(
            f"actual, expected and terms must be equally many, got {len(actual)}, "
            f"{len(expected)} and {len(lengths)}"
        )
    worst = 0.0
    for index, (got, want, length) in enumerate(zip(actual, expected, lengths, strict=True)):
        if got.shape != want.shape:
            raise ValueError(
                f"actual[{index}] must have shape {tuple(want.shape)}, got {tuple(got.shape)}"
            )
        if want.numel() == 0:
            continue
        scale = float(want.abs().max()) or 1.0
        error = float((got.double() - want).abs().max()) / scale
        if not math.isfinite(error):
            return math.inf
        worst = max(worst, error / tolerance(got.dtype, length))
    return worst


def interleave(
    contenders: Sequence[Contender], budget: Budget, clock: Clock = process_clock
) -> dict[str, Timing]:
    """Time contenders in turn, each round starting with the next one.

    Args:
        contenders: with names of their own.
        budget: see `Budget`.
        clock: see `Clock`; on a GPU `device_clock`.

    Raises:
        ValueError: two contenders share a name.
    """
    names = [contender.name for contender in contenders]
    if len(set(names)) != len(names):
        raise ValueError(f"contenders must have different names, got {names}")
    calls = {c.name: _calls(c, budget, clock) for c in contenders}
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    for contender in turns(contenders, budget, clock):
        count = calls[contender.name]
        sample = _sample(contender.run, count, budget, clock)
        if contender.without is not None:
            less = _sample(contender.without, count, budget, clock)
            sample = sample[0] - less[0], sample[1] - less[1]
        units = count * contender.units
        wall[contender.name].append(sample[0] / units)
        cpu[contender.name].append(sample[1] / units)
    return {name: Timing(tuple(wall[name]), tuple(cpu[name]), calls[name]) for name in names}


def turns(contenders: Sequence[Contender], budget: Budget, clock: Clock) -> Iterator[Contender]:
    """Contenders round by round, each round starting with the next, as long as the budget says."""
    began = clock()[0]
    for index in range(budget.rounds):
        if index >= 3 and clock()[0] - began > budget.limit_seconds:
            return
        first = index % len(contenders)
        yield from (*contenders[first:], *contenders[:first])


def _sample(
    run: Callable[[], Any], count: int, budget: Budget, clock: Clock
) -> tuple[float, float]:
    """Wall and CPU seconds of ``count`` calls, after a pause and as many untimed ones.

    As many, because a core that idled takes milliseconds to come up to speed: one untimed call of a
    slow contender covers them, one of a fast contender does not.
    """
    time.sleep(budget.settle_seconds)
    for _ in range(count if count > 1 else 0):
        run()
    wall_before, cpu_before = clock()
    for _ in range(count):
        run()
    wall_after, cpu_after = clock()
    return wall_after - wall_before, cpu_after - cpu_before


def _calls(contender: Contender, budget: Budget, clock: Clock) -> int:
    """Warm up, and find how many calls make a sample."""
    contender.run()
    done, began = 0, clock()[0]
    while True:
        contender.run()
        done += 1
        spent = clock()[0] - began
        if spent >= budget.warmup_seconds:
            return max(1, math.ceil(budget.sample_seconds * done / spent)) if spent else 1


def interleave_cold(
    contenders: Sequence[Contender],
    budget: Budget,
    evict: Callable[[], None],
    clock: Clock = process_clock,
) -> dict[str, tuple[float, ...]]:
    """Seconds per unit of single calls, in turn, each after ``evict`` and a pause.

    Threads sleep by then too, so waking them counts: this is a call that comes out of the blue.

    Args:
        contenders: warmed up, with names of their own.
        budget: rounds, pause and limit count.
        evict: overwrites the caches; see `evictor`.
        clock: see `Clock`.
    """
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for contender in turns(contenders, budget, clock):
        evict()
        time.sleep(budget.settle_seconds)
        before = clock()[0]
        contender.run()
        seconds[contender.name].append((clock()[0] - before) / contender.units)
    return {name: tuple(values) for name, values in seconds.items()}


def evictor(device: torch.device | str) -> Callable[[], None]:
    """A call that fills every cache of the device with other data, on all of torch's threads.

    It reads and writes a buffer of twice the last-level cache: each core a part of it that is far
    larger than the caches of its own.
    """
    device = torch.device(device)
    if device.type == "cuda":
        size = torch.cuda.get_device_properties(device).L2_cache_size
    else:
        size = _last_level_cache()
    buffer = torch.zeros(2 * max(size, _CACHE) // 4, dtype=torch.float32, device=device)

    def evict() -> None:
        buffer.add_(1.0)

    return evict


def _last_level_cache() -> int:
    """Bytes of the largest cache of this processor."""
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KMG") or 0) * scale)
    return max(sizes) or _CACHE


def verified_ratio(
    subject: Contender,
    peers: Sequence[Contender],
    budget: Budget,
    clock: Clock = process_clock,
    evict: Callable[[], None] | None = None,
) -> Comparison:
    """Speed-up of ``subject`` over each of ``peers``, once all of them were found correct.

    Args:
        subject: whose speed-ups these are.
        peers: over whom.
        budget: how long to time.
        clock: see `Clock`.
        evict: if given, cold calls are timed too; see `interleave_cold`.

    Raises:
        Unverified: an error exceeds 1 or is NaN, and nothing was timed; or a contender with a
            `without` was not slower than that in some round, so that its part is noise.
        ValueError: the subject has no `error`.
    """
    if subject.error is None:
        raise ValueError(f"subject must be comparable with the reference, {subject.name} is not")
    contenders = (subject, *peers)
    errors: dict[str, float] = {}
    for contender in contenders:
        verify(contender, errors)
    timings = interleave(contenders, budget, clock)
    for contender in contenders:
        # A round that was interrupted may come out negative, and then counts against us.
        if contender.without is not None and Spread.of(timings[contender.name].wall).p20 <= 0:
            raise Unverified(
                f"{contender.name} must take longer with the part of interest than without it, "
                "in a fifth of the rounds it did not: their difference is noise here"
            )
    warm = {name: timing.wall for name, timing in timings.items()}
    cold = interleave_cold(contenders, budget, evict, clock) if evict is not None else {}
    return Comparison(
        timings, errors, paired(subject, peers, warm), cold, paired(subject, peers, cold)
    )


def verify(contender: Contender, errors: dict[str, float]) -> None:
    """Note a contender's error, if it has one; raise `Unverified` if it exceeds 1 or is NaN."""
    if contender.error is None:
        return
    errors[contender.name] = error = contender.error()
    if not error <= 1:
        raise Unverified(
            f"{contender.name} must match the float64 reference, its error is {error:.3g} "
            "times what is allowed"
        )


def paired(
    subject: Contender, peers: Sequence[Contender], seconds: dict[str, tuple[float, ...]]
) -> dict[str, Spread]:
    """Each peer's time over the subject's, round by round; nothing without times.

    Where one was timed for fewer rounds, the others' last ones count for nothing.
    """
    if not seconds:
        return {}
    ours = seconds[subject.name]
    return {
        peer.name: Spread.of(
            [theirs / own for theirs, own in zip(seconds[peer.name], ours, strict=False)]
        )
        for peer in peers
    }
