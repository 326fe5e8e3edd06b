"""From a configuration to a record: build it, verify every contender, time them side by side.

The timing itself is `sparse_tickets.timing`, which users' own `bench` runs on too. A configuration
whose result is not the float64 reference's becomes a `Refusal` with the reason, never a number.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field

from sparse_tickets.kernels.cost import Cost
from sparse_tickets.timing import (
    Budget,
    Comparison,
    Contender,
    Spread,
    Unverified,
    device_clock,
    evictor,
    pinned_threads,
    verified_ratio,
)

from .peers import Unavailable

__all__ = ["Budget", "Case", "Contest", "Measured", "Record", "Refusal", "measure"]


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
    """

    op: str
    shape: dict[str, int]
    sparsity: float
    build: Callable[[], Contest]
    unit: str = "call"
    cold: bool = False
    threads: int | None = None

    @property
    def label(self) -> str:
        """Op, sizes and sparsity in one line."""
        sizes = " ".join(f"{name}={size}" for name, size in self.shape.items())
        return f"{self.op} {sizes} {self.sparsity:g}%"


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
        sizes = " ".join(f"{name}={size}" for name, size in self.shape.items())
        return f"{self.op} {sizes} {self.sparsity:g}%"

    @property
    def per_second(self) -> float:
        """Units per second of the subject."""
        return 1.0 / self.contenders[self.subject].wall.median

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> Record:
        """Of `to_dict`'s data.

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


def measure(case: Case, budget: Budget, device: str = "cpu") -> Record | Refusal:
    """Verify, then time, one configuration."""
    with nullcontext() if case.threads is None else pinned_threads(case.threads):
        contest = case.build()
        evict = evictor(device) if case.cold else None
        clock = device_clock(device)
        try:
            found = verified_ratio(contest.subject, contest.peers, budget, clock, evict)
        except Unverified as error:
            return Refusal(case.label, str(error))
    return _record(case, contest, found)


def _record(case: Case, contest: Contest, found: Comparison) -> Record:
    contenders = {
        contender.name: Measured(
            wall=Spread.of(found.timings[contender.name].wall),
            cpu=Spread.of(found.timings[contender.name].cpu),
            error=found.errors.get(contender.name),
            plan=contender.plan,
            calls=found.timings[contender.name].calls,
            cold=Spread.of(found.cold[contender.name]) if found.cold else None,
        )
        for contender in (contest.subject, *contest.peers)
    }
    return Record(
        op=case.op,
        shape=case.shape,
        sparsity=case.sparsity,
        unit=case.unit,
        subject=contest.subject.name,
        contenders=contenders,
        speedup=found.speedup,
        skipped=contest.skipped,
        cold_speedup=found.cold_speedup,
        cost=contest.cost,
    )
