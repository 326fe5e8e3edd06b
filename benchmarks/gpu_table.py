"""The GPU's table of targets: every row verified, timed three ways, with its roofline bound.

A row is one configuration against the best that torch can do with it in the same precision. What
this machine can do at best, a large copy and a large product, is measured in the same run. A row
may end the process that measures it: `fill` goes on in another, with the rows that are left.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from sparse_tickets.ceilings import measure_ceilings
from sparse_tickets.kernels import use_backend
from sparse_tickets.kernels.cost import Cost
from sparse_tickets.kernels.linear import cost as linear_cost
from sparse_tickets.kernels.prune import cost as prune_cost
from sparse_tickets.kernels.prune import prune
from sparse_tickets.kernels.update import cost as update_cost
from sparse_tickets.timing import Budget, Unverified

from . import gpu_ours, gpu_packed, gpu_peers, ours
from .costs import policy_cost
from .gpu_clock import Timer, Times, compare, is_lost, make_timer, ratio
from .gpu_problems import LayerProblem, random_masks_on
from .gpu_process import DIED, watched
from .measure import Contest, Record, Refusal
from .peers import masked_bmm, torch_compile, torch_dense
from .problems import PolicyProblem
from .results import Run
from .suites import FUSED_DENSE, is_ours, told_apart

__all__ = [
    "REAL",
    "TINY",
    "Rates",
    "Row",
    "Sizes",
    "fill",
    "forget_compiled",
    "measure_rates",
    "precision_of_torch",
    "rows",
]

_NO_DOTS = "none"
"""Precision of a row that multiplies no matrices."""
_TOLD_APART = "told apart"
_ROW_S = 45.0
"""From a row's beginning: no further round then, from the third on."""
_HANG_S = 120.0
"""A row that takes longer never ends. Compilers have taken half of it."""

# What is asked for: the subject's speed over its strongest peer's, by sparsity, or by width.
_STEP = {50.0: 1.4, 80.0: 2.5, 90.0: 3.3}
_ADAM = 6.0
_DENSE_AND_MASK = 0.97
_BLOCKED = 1.8
_POLICY = {64: 3.0, 128: 2.0}
_PRUNE = 5.0


@dataclass(frozen=True)
class Sizes:
    """How large the rows are.

    Attributes:
        tickets: of a population of layers.
        batch: rows per ticket.
        width: of a layer.
        sparsities: of the whole step.
        curve: sparsities of dense+mask.
        wide: width of the one blocked layer.
        wide_batch: its rows.
        policies: tickets of a population of policies.
        policy_batch: rows per policy.
        policy_widths: hidden sizes.
        pruned: tickets and weights of each for pruning.
        agents: tickets of the PPO iteration; 0 leaves it out.
        matrix: side of the product and million bytes of the copy that show what is possible.
        rounds: samples.
    """

    tickets: int = 1024
    batch: int = 64
    width: int = 256
    sparsities: tuple[float, ...] = (50.0, 80.0, 90.0)
    curve: tuple[float, ...] = (0.0, 50.0, 80.0, 90.0, 95.0, 99.0)
    wide: int = 1024
    wide_batch: int = 8192
    policies: int = 60
    policy_batch: int = 128
    policy_widths: tuple[int, ...] = (64, 128)
    pruned: tuple[int, int] = (1024, 130_000)
    agents: int = 60
    matrix: int = 8192
    rounds: int = 9


REAL = Sizes()
TINY = Sizes(
    tickets=2,
    batch=16,
    width=32,
    sparsities=(90.0,),
    curve=(0.0, 90.0),
    wide=64,
    wide_batch=32,
    policies=2,
    policy_batch=8,
    policy_widths=(16,),
    pruned=(2, 100),
    agents=0,
    matrix=64,
    rounds=2,
)
"""For a rehearsal without a GPU."""


@dataclass(frozen=True)
class Row:
    """One configuration.

    Attributes:
        target: what the row answers, e.g. ``step``; rows of one target stand together.
        op: what is computed.
        shape: sizes.
        sparsity: percent pruned.
        precision: of products: ``tf32``, ``ieee`` or ``bf16``; ``none`` without any.
        build: makes inputs and contenders.
        asked: ratio to the strongest peer that is the target; None if there is none.
        unit: what times are per.
    """

    target: str
    op: str
    shape: dict[str, int]
    sparsity: float
    precision: str
    build: Callable[[], Contest]
    asked: float | None = None
    unit: str = "call"

    @property
    def label(self) -> str:
        """Op, sizes, precision and sparsity in one line."""
        sizes = " ".join(f"{name}={size}" for name, size in self.shape.items())
        return f"{self.op} {sizes} {self.precision} {self.sparsity:g}%"


@dataclass(frozen=True)
class Rates:
    """What the device does at best.

    Attributes:
        products: floating-point operations per second of a large product, by precision.
        copy: bytes per second of a large copy, read and written.
    """

    products: dict[str, float] = field(default_factory=dict)
    copy: float = 0.0

    def bound(self, cost: Cost, precision: str) -> float:
        """Seconds that work of this cost takes at least."""
        slowest = min(self.products.values())
        return cost.seconds(self.products.get(precision, slowest), self.copy)


def rows(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Every row, those asked for first."""
    yield from _steps(sizes, device)
    yield from _adam(sizes, device)
    yield from _blocked(sizes, device)
    yield from _policies(sizes, device)
    yield from _prune(sizes, device)
    yield from _dense_and_mask(sizes, device)
    if sizes.agents:
        yield _told_apart(sizes, device)


def fill(
    run: Run,
    sizes: Sizes,
    device: torch.device,
    deadline: float,
    save: Callable[[], None],
    report: Callable[[str], None] = print,
) -> bool:
    """Measure row after row into ``run``, saving after each; stops at the deadline.

    Args:
        run: takes records, refusals and ``parts["table"]``; goes on with what is there.
        sizes: see `Sizes`.
        device: a GPU, or for a rehearsal the CPU.
        deadline: by `time.monotonic`.
        save: called before and after every row.
        report: takes a line per row.

    Returns:
        Whether there are rows left that only another process can measure: see `gpu_clock`.
    """
    timer = make_timer(device)
    table = run.parts.get("table") or _begin(run, sizes, device, timer)
    if table["at"]:
        table["failed"][table["at"]] = DIED
    table |= {"at": "", "left_out": []}
    done = {entry["label"] for entry in table["rows"]}.union(table["failed"], table["refused"])
    rates = Rates(**table["rates"])
    for row in rows(sizes, device):
        if row.label in done:
            continue
        if time.monotonic() > deadline:
            table["left_out"].append(row.label)
            continue
        table["at"] = row.label
        save()
        limit = min(deadline, time.monotonic() + _ROW_S)
        try:
            with precision_of_torch(row.precision), watched(_HANG_S):
                record, entry = _measure(row, timer, rates, sizes.rounds, limit)
        except Unverified as error:
            table["refused"].append(row.label)
            run.refused.append(Refusal(row.label, str(error)))
            report(f"{row.label}: refused: {error}")
        except Exception as error:  # A row that fails must not take the others with it.
            table["failed"][row.label] = f"{type(error).__name__}: {error}"
            report(f"{row.label}: failed: {type(error).__name__}: {error}")
        else:
            run.records.append(record)
            table["rows"].append(entry)
            report(_line(entry))
        table["at"] = ""
        save()
        if timer.spoiled or is_lost(device):
            return True
        forget_compiled(device)
    save()
    return False


def _begin(run: Run, sizes: Sizes, device: torch.device, timer: Timer) -> dict[str, Any]:
    """An empty table, and what the machine can do."""
    ceilings = measure_ceilings(Budget(rounds=5, limit_seconds=2.0), device)
    run.sgemm, run.copies = ceilings.sgemm, ceilings.copies
    rates = measure_rates(sizes, device, timer)
    table: dict[str, Any] = {
        "rates": {"products": rates.products, "copy": rates.copy},
        "rows": [],
        "refused": [],
        "failed": {},
        "at": "",
    }
    run.parts["table"] = table
    return table


def forget_compiled(device: torch.device) -> None:
    """Free what was measured; the next shapes are then compiled as if they were the first.

    For a second shape `torch.compile` would make slower code that fits any.
    """
    if device.type == "cuda":
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


def measure_rates(sizes: Sizes, device: torch.device, timer: Timer) -> Rates:
    """A large product in every precision, and a large copy, on random data."""
    products = {}
    side = sizes.matrix
    for precision, dtype in (
        ("ieee", torch.float32),
        ("tf32", torch.float32),
        ("bf16", torch.bfloat16),
    ):
        left, right = torch.randn(2, side, side, device=device).to(dtype).unbind()
        out = torch.empty_like(left)
        with precision_of_torch(precision):
            seconds = _best(
                timer, lambda left=left, right=right, out=out: torch.mm(left, right, out=out)
            )
        products[precision] = 2.0 * side**3 / seconds
    source = torch.randn(side * side, device=device)
    target = torch.empty_like(source)
    seconds = _best(timer, lambda: target.copy_(source))
    return Rates(products, 2 * source.nbytes / seconds)


def _best(timer: Timer, run: Callable[[], Any]) -> float:
    timer.seconds(run, 3)
    return sorted(timer.seconds(run, 5) for _ in range(5))[2]


@contextmanager
def precision_of_torch(name: str) -> Iterator[None]:
    """Let torch multiply float32 in TF32, or exactly."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _measure(
    row: Row, timer: Timer, rates: Rates, rounds: int, deadline: float
) -> tuple[Record, dict[str, Any]]:
    contest = row.build()
    times, left_out = compare(
        contest.subject, contest.peers, timer, rounds=rounds, deadline=deadline
    )
    contenders = [c for c in (contest.subject, *contest.peers) if c.name in times]
    subject = times[contest.subject.name]

    def ratios(kind: str) -> dict[str, Any]:
        found = {
            peer.name: ratio(_at_best(times[peer.name], kind), getattr(subject, kind))
            for peer in contenders[1:]
        }
        return {name: spread for name, spread in found.items() if spread is not None}

    plain = row.target == _TOLD_APART or row.precision == _NO_DOTS
    record = Record(
        op=row.op if plain else f"{row.op}, {row.precision}",
        shape=row.shape,
        sparsity=row.sparsity,
        unit=row.unit,
        subject=contest.subject.name,
        contenders={c.name: times[c.name].measured(c.plan) for c in contenders},
        speedup=ratios("wall"),
        skipped=contest.skipped | left_out,
        cold_speedup=ratios("cold"),
        replay_speedup=ratios("replay"),
    )
    return record, _entry(row, record, times, contest.cost, rates)


def _at_best(peer: Times, kind: str) -> list[float]:
    """A peer that cannot be captured runs as it can: it must not drop out of the comparison."""
    return getattr(peer, kind) or peer.wall


def _entry(
    row: Row, record: Record, times: dict[str, Times], cost: Cost | None, rates: Rates
) -> dict[str, Any]:
    """What the table of targets shows: the strongest peer that is not our own, by kind."""
    subject = record.contenders[record.subject]
    kinds = {
        "launches": (subject.wall, record.speedup),
        "replay": (subject.replay, record.replay_speedup),
        "cold": (subject.cold, record.cold_speedup),
    }
    entry: dict[str, Any] = {
        "target": row.target,
        "label": row.label,
        "sparsity": row.sparsity,
        "asked": row.asked,
        "skipped": record.skipped,
    }
    for kind, (spread, speedup) in kinds.items():
        others = {name: x.median for name, x in speedup.items() if not is_ours(name)}
        best = min(others, key=lambda name: others[name], default=None)
        entry[kind] = {
            "seconds": None if spread is None else spread.median,
            "best_peer": best,
            "ratio": None if best is None else others[best],
            "over_our_dense": next(
                (x.median for name, x in speedup.items() if is_ours(name)), None
            ),
        }
    if cost is not None:
        entry["bound_s"] = rates.bound(cost, row.precision)
        entry["bytes"], entry["flops"] = cost.bytes, cost.flops
    entry["notes"] = {name: each.note for name, each in times.items() if each.note}
    return entry


def _line(entry: dict[str, Any]) -> str:
    parts = []
    for kind in ("launches", "replay", "cold"):
        found = entry[kind]
        if found["ratio"] is not None:
            parts.append(f"{kind} {found['ratio']:.2f}x over {found['best_peer']}")
    return f"{entry['label']}: {'; '.join(parts) or 'no peer'}"


def _layer_shape(tickets: int, batch: int, width: int) -> dict[str, int]:
    return {"P": tickets, "B": batch, "I": width, "O": width}


def _steps(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """One layer of a population, forward + backward + Adam, packed."""
    tickets, batch, width = sizes.tickets, sizes.batch, sizes.width

    def build(sparsity: float) -> Contest:
        problem = LayerProblem(tickets, batch, width, width, sparsity, device=device)
        contest = Contest(gpu_packed.step(problem), cost=gpu_packed.step_cost(problem))
        contest.peers.append(gpu_ours.step_masked(problem))
        contest.invite(gpu_peers.DENSE, lambda: gpu_peers.step_dense(problem))
        contest.invite(gpu_peers.MASKED, lambda: gpu_peers.step_masked(problem))
        contest.invite(gpu_peers.COMPILED, lambda: gpu_peers.step_compiled(problem))
        return contest

    for sparsity in sizes.sparsities:
        yield Row(
            "step", "layer forward+backward+Adam", _layer_shape(tickets, batch, width), sparsity,
            "tf32", lambda sparsity=sparsity: build(sparsity), _STEP.get(sparsity),
        )  # fmt: skip


def _adam(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Adam alone on the packed arena."""
    tickets, width = sizes.tickets, sizes.width

    def build() -> Contest:
        problem = LayerProblem(tickets, sizes.batch, width, width, 90.0, device=device)
        kept = int(problem.mask[0].sum())
        contest = Contest(gpu_packed.adam(problem), cost=update_cost.adam(tickets, kept))
        contest.peers.append(gpu_ours.adam_masked(problem))
        contest.invite(gpu_peers.DENSE, lambda: gpu_peers.adam_dense(problem))
        contest.invite(gpu_peers.COMPILED, lambda: gpu_peers.adam_compiled(problem))
        return contest

    shape = {"P": tickets, "weights": width * width}
    yield Row("Adam", "Adam, packed", shape, 90.0, _NO_DOTS, build, _ADAM)


def _dense_and_mask(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """The mask on top of a dense layer at every sparsity: it must cost nothing."""
    tickets, batch, width = sizes.policies, sizes.policy_batch, sizes.width

    def build(sparsity: float) -> Contest:
        problem = LayerProblem(tickets, batch, width, width, sparsity, device=device)
        contest = Contest(gpu_ours.backward_masked(problem))
        contest.cost = _backward_cost(tickets, batch, width)
        contest.invite(gpu_peers.DENSE, lambda: gpu_peers.backward_dense(problem))
        contest.invite(gpu_peers.MASKED, lambda: gpu_peers.backward_masked(problem))
        return contest

    for sparsity in sizes.curve:
        yield Row(
            "dense+mask", "layer forward+backward, dense+mask",
            _layer_shape(tickets, batch, width), sparsity, "tf32",
            lambda sparsity=sparsity: build(sparsity), _DENSE_AND_MASK,
        )  # fmt: skip


def _backward_cost(tickets: int, batch: int, width: int) -> Cost:
    cost = linear_cost.forward(tickets, batch, width, width)
    cost = cost.plus(linear_cost.dx(tickets, batch, width, width))
    cost = cost.plus(linear_cost.dw(tickets, batch, width, width))
    return cost.plus(linear_cost.db(tickets, batch, width))


def _blocked(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """One wide layer whose mask is made of blocks of 32."""
    width, batch, block = sizes.wide, sizes.wide_batch, 32

    def build(dtype: torch.dtype, precision: str) -> Contest:
        problem = LayerProblem(
            1,
            batch,
            width,
            width,
            90.0,
            device=device,
            dtype=dtype,
            precision=precision,
            block=block,
        )
        contest = Contest(gpu_ours.backward_blocked(problem, block))
        contest.invite(gpu_peers.DENSE, lambda: gpu_peers.backward_dense(problem))
        contest.invite(gpu_peers.MASKED, lambda: gpu_peers.backward_masked(problem))
        blocks = float(problem.mask.sum()) / block**2
        sizes_of = (1, batch, width, width, blocks, block)
        item = problem.x.element_size()
        cost = linear_cost.blocked_forward(*sizes_of, itemsize=item)
        cost = cost.plus(linear_cost.blocked_dx(*sizes_of, itemsize=item))
        cost = cost.plus(linear_cost.blocked_dw(*sizes_of, itemsize=item))
        contest.cost = cost.plus(linear_cost.db(1, batch, width, itemsize=item))
        return contest

    shape = {**_layer_shape(1, batch, width), "block": block}
    yield Row(
        "blocked", "layer forward+backward, blocked", shape, 90.0, "tf32",
        lambda: build(torch.float32, "tf32"), _BLOCKED,
    )  # fmt: skip
    # Triton's interpreter corrupts bfloat16.
    if device.type == "cuda":
        yield Row(
            "blocked", "layer forward+backward, blocked", shape, 90.0, "bf16",
            lambda: build(torch.bfloat16, "ieee"), _BLOCKED,
        )  # fmt: skip


def _policies(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Whole policies, forward and backward."""
    tickets, batch = sizes.policies, sizes.policy_batch

    def build(width: int, sparsity: float) -> Contest:
        network = (4, width, width, 2)
        problem = PolicyProblem(tickets, batch, network, sparsity, device=device)
        contest = Contest(ours.policy(problem))
        contest.cost = policy_cost(problem, contest.subject.plan)
        if sparsity:
            contest.peers.append(ours.policy(problem, density=1.0, name=FUSED_DENSE))
        contest.invite(torch_dense.NAME, lambda: torch_dense.policy(problem))
        contest.invite(masked_bmm.NAME, lambda: masked_bmm.policy(problem))

        def compiled() -> Any:
            gpu_peers.can_compile(device)
            return torch_compile.policy(problem)

        contest.invite(torch_compile.NAME, compiled)
        return contest

    for width in sizes.policy_widths:
        for sparsity in (0.0, 90.0):
            yield Row(
                "policy", "policy forward+backward",
                {"P": tickets, "B": batch, "width": width}, sparsity, "ieee",
                lambda width=width, sparsity=sparsity: build(width, sparsity), _POLICY.get(width),
            )  # fmt: skip


def _prune(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """The next level's masks of many tickets."""
    tickets, prunable = sizes.pruned

    def build() -> Contest:
        mask = random_masks_on(device, tickets, prunable, 50.0)
        # All different, so that no tie leaves torch a choice.
        scores = torch.rand(tickets, prunable, device=device).argsort(1).float()
        kept = round(0.4 * prunable)
        with use_backend("reference"):
            expected = prune(scores, mask, kept)
        contest = Contest(gpu_ours.prune_to(scores, mask, kept, expected))
        contest.cost = prune_cost.prune(tickets, prunable)
        contest.peers.append(gpu_peers.topk_prune(scores, mask, kept, expected))
        return contest

    yield Row("prune", "prune", {"P": tickets, "N": prunable}, 60.0, _NO_DOTS, build, _PRUNE)


def _told_apart(sizes: Sizes, device: torch.device) -> Row:
    """Batching, fusion and sparsity, one after the other, on a whole PPO iteration."""
    case = told_apart(tickets=sizes.agents, device=str(device))
    return Row(_TOLD_APART, case.op, case.shape, case.sparsity, "ieee", case.build, unit=case.unit)
