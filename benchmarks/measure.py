"""From a configuration to a record: build it, verify every contender, time them side by side.

The timing itself is `sparse_tickets.timing`, which users' own `bench` runs on too. A configuration
whose result is not the float64 reference's becomes a `Refusal` with the reason, never a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch

from sparse_tickets.ceilings import Cost
from sparse_tickets.timing import (
    Budget,
    Comparison,
    Contender,
    Spread,
    Unverified,
    evictor,
    pinned_threads,
    verified_ratio,
)

from .clock import GpuTimer, OnGpu, compare
from .peers import Unavailable


@dataclass
class Contest:
    """Who runs in a configuration.

    Attributes:
        subject: whose speed-up is reported.
        peers: over whom.
        skipped: peers that cannot run, and why.
        cost: of the subject's work in the format it runs in, per unit; None if not counted.
    """

    subject: Contender
    peers: list[Contender] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    cost: Cost | None = None

    def invite(self, name: str, build: Callable[[], Contender]) -> None:
        """Add a peer, or note why it cannot run."""
        try:
            self.peers.append(build())
        except Unavailable as reason:
            self.skipped[name] = str(reason)


@dataclass(frozen=True)
class Case:
    """One configuration.

    Attributes:
        op: what is computed, e.g. ``linear forward``; cases of one op share a table.
        shape: sizes, e.g. ``{"P": 1, "B": 2048, "I": 256, "O": 256}``.
        sparsity: percent pruned.
        build: makes inputs and contenders.
        unit: what times are per: ``call``, ``layer`` or ``agent-step``.
        cold: time single calls with cold caches too.
        threads: of everyone; None leaves them as the run has them.
        precision: of torch's float32 products: ``tf32``, else exact.
        asked: the ratio to the strongest peer that is the target; None if there is none.
    """

    op: str
    shape: dict[str, int]
    sparsity: float
    build: Callable[[], Contest]
    unit: str = "call"
    cold: bool = False
    threads: int | None = None
    precision: str = ""
    asked: float | None = None

    @property
    def label(self) -> str:
        """Op, sizes and sparsity in one line."""
        return _label(self.op, self.shape, self.sparsity)

    @property
    def table(self) -> tuple[object, ...]:
        """As `Record.table`."""
        return (self.op, *sorted(self.shape.items()))


@dataclass(frozen=True)
class Measured:
    """One contender in one configuration; seconds are per unit.

    Attributes:
        wall: elapsed time of calls one after another, with warm caches; on a GPU launches count,
            and the clock waits for the device at the end of a sample.
        cpu: of all threads together.
        error: share of the tolerance used up; None if nothing corresponds to its numbers.
        plan: which kernels ran, if known.
        calls: calls per sample.
        cold: elapsed time of a single call with cold caches; None if not measured.
        replay: on a GPU, of a call replayed from a CUDA graph: the kernels without their launches;
            None if not measured.
    """

    wall: Spread
    cpu: Spread
    error: float | None
    plan: str
    calls: int
    cold: Spread | None = None
    replay: Spread | None = None


@dataclass(frozen=True)
class Record:
    """A verified, timed configuration: what is stored.

    Attributes:
        op: see `Case`.
        shape: see `Case`.
        sparsity: see `Case`.
        unit: see `Case`.
        subject: name of the contender whose speed-ups these are.
        contenders: by name, the subject first.
        speedup: by peer: its time over the subject's, paired within rounds.
        skipped: peers that could not run, and why.
        cold_speedup: as `speedup`, of the cold calls.
        replay_speedup: as `speedup`, of the replayed calls.
        cost: operations and bytes that the subject's work takes at least, per unit.
        precision: see `Case`.
        asked: see `Case`.
    """

    op: str
    shape: dict[str, int]
    sparsity: float
    unit: str
    subject: str
    contenders: dict[str, Measured]
    speedup: dict[str, Spread]
    skipped: dict[str, str]
    cold_speedup: dict[str, Spread] = field(default_factory=dict)
    replay_speedup: dict[str, Spread] = field(default_factory=dict)
    cost: Cost | None = None
    precision: str = ""
    asked: float | None = None

    @property
    def table(self) -> tuple[object, ...]:
        """Equal for records of one table: op and sizes."""
        return (self.op, *sorted(self.shape.items()))

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for the same configuration of two runs."""
        return (*self.table, self.sparsity)

    @property
    def label(self) -> str:
        """As `Case.label`."""
        return _label(self.op, self.shape, self.sparsity)

    @property
    def per_second(self) -> float:
        """Units per second of the subject."""
        return 1.0 / self.contenders[self.subject].wall.median

    @classmethod
    def from_dict(cls, data: dict) -> Record:
        """Of `dataclasses.asdict`'s data.

        Raises:
            KeyError, TypeError: the data is of another layout.
        """
        contenders = {name: _measured(item) for name, item in data["contenders"].items()}
        spreads = {
            key: {name: Spread(**item) for name, item in data.get(key, {}).items()}
            for key in ("speedup", "cold_speedup", "replay_speedup")
        }
        cost = None if data.get("cost") is None else Cost(*data["cost"])
        return cls(**{**data, **spreads, "contenders": contenders, "cost": cost})


def _measured(data: dict) -> Measured:
    spreads = {
        key: None if data.get(key) is None else Spread(**data[key])
        for key in ("wall", "cpu", "cold", "replay")
    }
    return Measured(**{**data, **spreads})


@dataclass(frozen=True)
class Refusal:
    """A configuration for which no number is reported, and why."""

    label: str
    reason: str


def _label(op: str, shape: Mapping[str, int], sparsity: float) -> str:
    sizes = " ".join(f"{name}={size}" for name, size in shape.items())
    return f"{op} {sizes} {sparsity:g}%"


@contextmanager
def precision_of_torch(name: str) -> Iterator[None]:
    """Let torch multiply float32 in ``tf32``, or exactly."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def measure(
    case: Case, budget: Budget, device: str = "cpu", timer: GpuTimer | None = None
) -> Record | Refusal:
    """Verify, then time, one configuration.

    Args:
        case: the configuration.
        budget: how long to time.
        device: whose caches are emptied for cold calls.
        timer: on a GPU, which captures calls in graphs; see `clock.compare`.
    """
    threads = nullcontext() if case.threads is None else pinned_threads(case.threads)
    with threads, precision_of_torch(case.precision):
        contest = case.build()
        subject, peers = contest.subject, contest.peers
        try:
            if timer is not None:
                found = compare(subject, peers, budget, timer, cold=case.cold)
            else:
                evict = evictor(device) if case.cold else None
                found = verified_ratio(subject, peers, budget, evict=evict)
        except Unverified as error:
            return Refusal(case.label, str(error))
    return _record(case, contest, found)


def _record(case: Case, contest: Contest, found: Comparison) -> Record:
    gpu = found if isinstance(found, OnGpu) else OnGpu({}, {}, {})
    contenders = {
        each.name: Measured(
            wall=Spread.of(found.timings[each.name].wall),
            cpu=Spread.of(found.timings[each.name].cpu),
            error=found.errors.get(each.name),
            plan="; ".join(filter(None, (each.plan, gpu.notes.get(each.name)))),
            calls=found.timings[each.name].calls,
            cold=Spread.of(found.cold[each.name]) if found.cold else None,
            replay=Spread.of(gpu.replay[each.name]) if each.name in gpu.replay else None,
        )
        for each in (contest.subject, *contest.peers)
        if each.name in found.timings
    }
    return Record(
        op=case.op,
        shape=case.shape,
        sparsity=case.sparsity,
        unit=case.unit,
        subject=contest.subject.name,
        contenders=contenders,
        speedup=found.speedup,
        skipped=contest.skipped | gpu.left_out,
        cold_speedup=found.cold_speedup,
        replay_speedup=gpu.replay_speedup,
        cost=contest.cost,
        precision=case.precision,
        asked=case.asked,
    )
