"""From a configuration to a record: build it, verify every contender, time them side by side.

The timing itself is `sparse_tickets.timing`, which users' own `bench` runs on too. A configuration
whose result is not the float64 reference's becomes a `Refusal` with the reason, never a number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch

from sparse_tickets.timing import (
    Budget,
    Comparison,
    Contender,
    Spread,
    Unverified,
    device_clock,
    interleave,
    verified_ratio,
)

from .peers import Unavailable

__all__ = ["Budget", "Case", "Contest", "Measured", "Record", "Refusal", "measure", "sgemm_flops"]


@dataclass
class Contest:
    """Who runs in a configuration.

    Attributes:
        subject: whose speed-up is reported.
        peers: over whom.
        skipped: peers that cannot run, and why.
    """

    subject: Contender
    peers: list[Contender] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

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
        unit: what times are per: ``call`` or ``agent-step``.
    """

    op: str
    shape: dict[str, int]
    sparsity: float
    build: Callable[[], Contest]
    unit: str = "call"

    @property
    def label(self) -> str:
        """Op, sizes and sparsity in one line."""
        sizes = " ".join(f"{name}={size}" for name, size in self.shape.items())
        return f"{self.op} {sizes} {self.sparsity:g}%"


@dataclass(frozen=True)
class Measured:
    """One contender in one configuration; seconds are per unit.

    Attributes:
        wall: elapsed time.
        cpu: of all threads together.
        error: share of the tolerance used up; None if nothing corresponds to its numbers.
        plan: which kernels ran, if known.
        calls: calls per sample.
    """

    wall: Spread
    cpu: Spread
    error: float | None
    plan: str
    calls: int


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
    """

    op: str
    shape: dict[str, int]
    sparsity: float
    unit: str
    subject: str
    contenders: dict[str, Measured]
    speedup: dict[str, Spread]
    skipped: dict[str, str]

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for the same configuration of two runs."""
        return (self.op, *sorted(self.shape.items()), self.sparsity)

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
        contenders = {
            name: Measured(**{**item, "wall": Spread(**item["wall"]), "cpu": Spread(**item["cpu"])})
            for name, item in data["contenders"].items()
        }
        speedup = {name: Spread(**item) for name, item in data["speedup"].items()}
        return cls(**{**data, "contenders": contenders, "speedup": speedup})


@dataclass(frozen=True)
class Refusal:
    """A configuration for which no number is reported, and why."""

    label: str
    reason: str


def measure(case: Case, budget: Budget, device: str = "cpu") -> Record | Refusal:
    """Verify, then time, one configuration."""
    contest = case.build()
    try:
        found = verified_ratio(contest.subject, contest.peers, budget, device_clock(device))
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
        )
        for contender in (contest.subject, *contest.peers)
    }
    return Record(
        case.op,
        case.shape,
        case.sparsity,
        case.unit,
        contest.subject.name,
        contenders,
        found.speedup,
        contest.skipped,
    )


def sgemm_flops(budget: Budget, device: str = "cpu", size: int = 1024) -> Spread:
    """Floating-point operations per second of torch's float32 product of two square matrices.

    The yardstick of this machine, with the threads of this moment.
    """
    left, right = torch.rand(2, size, size).to(device).unbind()
    product = torch.empty(size, size, device=device)
    gemm = Contender("sgemm", lambda: torch.mm(left, right, out=product), None)
    wall = interleave([gemm], budget, device_clock(device))["sgemm"].wall
    return Spread.of([2 * size**3 / seconds for seconds in wall])
