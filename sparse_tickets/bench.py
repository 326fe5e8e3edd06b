"""`sparse-tickets bench`: what sparsity gains on this machine, for layers of a size you name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from torch import Tensor

from sparse_tickets.ceilings import (
    BUSY,
    Ceilings,
    Neighbours,
    layer_cost,
    measure_ceilings,
)
from sparse_tickets.kernels.dispatch import Plan, use_backend
from sparse_tickets.kernels.linear import reference
from sparse_tickets.kernels.prune import prune
from sparse_tickets.linear import SparseLinear
from sparse_tickets.timing import (
    Budget,
    Contender,
    Spread,
    device_clock,
    mismatch,
    pinned_threads,
    verified_ratio,
)

__all__ = ["SPARSITIES", "Bench", "Line", "bench", "bench_table", "crossover"]

SPARSITIES = (0.0, 50.0, 80.0, 90.0, 95.0, 98.0, 99.0)
"""Percent of the weights pruned."""

_OURS, _DENSE = "sparse_tickets", "torch dense"
_DIRECTIONS = ("forward", "forward+backward")
_BAR = 12


@dataclass(frozen=True)
class Line:
    """One sparsity.

    Attributes:
        sparsity: percent pruned.
        direction: ``forward`` or ``forward+backward``.
        plan: what the layer runs, and why.
        dense: seconds of a call of torch's dense layer.
        ours: seconds of a call of ours.
        speedup: the one over the other, paired within rounds.
        bound: seconds below which no kernel of this format can get on this machine.
    """

    sparsity: float
    direction: str
    plan: Plan
    dense: Spread
    ours: Spread
    speedup: Spread
    bound: float

    @property
    def reached(self) -> float:
        """Share of the bound's rate that our layer reaches; 1 is the machine's limit."""
        return self.bound / self.ours.median


@dataclass(frozen=True)
class Bench:
    """What `bench` found.

    Attributes:
        lines: for every sparsity, ascending, one per direction.
        ceilings: of the machine, measured in the same run.
        busy: share of the cores that other processes used meanwhile.
    """

    lines: tuple[Line, ...]
    ceilings: Ceilings
    busy: float = 0.0


def bench(
    width: int = 256,
    batch: int = 2048,
    device: str = "cpu",
    *,
    sparsities: Sequence[float] = SPARSITIES,
    threads: int | None = None,
    budget: Budget | None = None,
) -> Bench:
    """Time a `SparseLinear` of ``width x width`` beside torch's dense one, after verifying both.

    Args:
        width: inputs and outputs.
        batch: rows.
        device: ``cpu`` or a CUDA device.
        sparsities: percents pruned.
        threads: for both sides; torch's current number by default.
        budget: how long to time.

    Raises:
        ValueError: a size below 1, a sparsity outside [0, 100], or a device torch does not have.
        Unverified: a result differs from the float64 reference: nothing is reported.
    """
    for name, size in (("width", width), ("batch", batch)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    for sparsity in sparsities:
        if not 0 <= sparsity <= 100:
            raise ValueError(f"sparsities must be in [0, 100], got {sparsity}")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must exist, got {device} and torch sees no GPU")
    budget, neighbours = budget or Budget(), Neighbours()
    with pinned_threads(torch.get_num_threads() if threads is None else threads):
        ceilings = measure_ceilings(budget, device)
        lines = [
            _measure(_Layer(width, batch, sparsity, device), direction, budget, ceilings)
            for sparsity in sorted(sparsities)
            for direction in _DIRECTIONS
        ]
    return Bench(tuple(lines), ceilings, neighbours.share())


def _measure(layer: _Layer, direction: str, budget: Budget, ceilings: Ceilings) -> Line:
    backward = direction != "forward"
    dense, ours = layer.contender(_DENSE, backward), layer.contender(_OURS, backward)
    found = verified_ratio(ours, [dense], budget, device_clock(layer.x.device))
    plan = layer.module.plan(len(layer.x), training=backward)
    return Line(
        sparsity=layer.sparsity,
        direction=direction,
        plan=plan,
        dense=Spread.of(found.timings[_DENSE].wall),
        ours=Spread.of(found.timings[_OURS].wall),
        speedup=found.speedup[_DENSE],
        bound=ceilings.bound(layer_cost(plan.format, layer.mask[None], len(layer.x), backward)),
    )


def crossover(points: Sequence[tuple[float, Spread]]) -> str:
    """From which sparsity on a speed-up lies above 1, interpolated between measured ones.

    A level counts as won only if its whole p20-p80 spread lies above 1.

    Args:
        points: sparsity and speed-up, ascending.
    """
    if not points:
        return "not measured"
    won = [spread.p20 > 1 for _, spread in points]
    if all(won):
        return f"faster at every level measured, from {points[0][0]:g}%"
    if not won[-1]:
        return f"not reached up to {points[-1][0]:g}%"
    last_loss = max(index for index, is_won in enumerate(won) if not is_won)
    (low, slow), (high, fast) = points[last_loss], points[last_loss + 1]
    below, above = math.log(slow.median), math.log(fast.median)
    if below >= 0:
        return f"within noise at {low:g}%, faster from {high:g}%"
    return f"about {low + (high - low) * -below / (above - below):.0f}%"


def bench_table(found: Bench) -> Group:
    """A table per direction with a bar per speed-up, losses red; what the numbers mean below."""
    rates = [rate.median for rate in found.ceilings.copies.values()]
    notes = (
        "Speed-up: median (p20-p80) of paired rounds, both results verified. Bound: the format's "
        "operations at the sgemm rate or its bytes at a copy's, whichever takes longer; here "
        f"{found.ceilings.sgemm.median / 1e9:,.0f} GFLOP/s and {min(rates) / 1e9:,.0f}-"
        f"{max(rates) / 1e9:,.0f} GB/s by size. Reached: its share of our time."
    )
    parts: list[RenderableType] = []
    for direction in _DIRECTIONS:
        lines = [line for line in found.lines if line.direction == direction]
        points = [(line.sparsity, line.speedup) for line in lines]
        parts += [_table(direction, lines), f"  Crossover: {crossover(points)}.", ""]
    if found.busy > BUSY:
        notes = (
            f"[yellow]Other processes used {found.busy:.0%} of the cores: neither times nor ratios "
            f"can be trusted.[/yellow] {notes}"
        )
    return Group(*parts, notes)


def _table(direction: str, lines: Sequence[Line]) -> Table:
    title = f"{direction}: SparseLinear against torch's dense layer"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("pruned", "dense, us", "ours, us", "speed-up"):
        table.add_column(column, justify="right")
    table.add_column("", no_wrap=True, min_width=_BAR)
    for column in ("bound, us", "reached"):
        table.add_column(column, justify="right")
    table.add_column("plan")
    longest = max((line.speedup.median for line in lines), default=1.0)
    for line in lines:
        gain = line.speedup
        # A win or a loss is one only if the whole spread lies on that side of 1.
        colour = "green" if gain.p20 > 1 else "red" if gain.p80 < 1 else "yellow"
        table.add_row(
            f"{line.sparsity:g}%",
            f"{1e6 * line.dense.median:,.1f}",
            f"{1e6 * line.ours.median:,.1f}",
            f"{gain.median:.2f}x ({gain.p20:.2f}-{gain.p80:.2f})",
            f"[{colour}]{'█' * max(1, round(_BAR * gain.median / longest))}[/{colour}]",
            f"{1e6 * line.bound:,.1f}",
            f"{line.reached:.0%}",
            f"{line.plan.backend}/{line.plan.format}",
        )
    return table


class _Layer:
    """One random layer, its inputs, and what the float64 reference makes of them."""

    def __init__(self, width: int, batch: int, sparsity: float, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        scores = torch.rand(1, width * width, generator=generator)
        everything = torch.ones_like(scores, dtype=torch.bool)
        with use_backend("reference"):
            kept = round((100 - sparsity) / 100 * width * width)
            mask = prune(scores, everything, kept).unflatten(1, (width, width))
        self.sparsity, self.mask = sparsity, mask[0].to(device)
        weight = torch.randn(width, width, generator=generator) * width**-0.5
        self.weight = weight.masked_fill_(~mask[0], 0).to(device)
        self.bias = torch.randn(width, generator=generator).to(device)
        self.x, self.dy = torch.randn(2, batch, width, generator=generator).to(device).unbind()
        self.module = SparseLinear(width, width, device=self.x.device, mask=self.mask)
        with torch.no_grad():
            self.module.weight.copy_(self.weight)
            self.module.bias.copy_(self.bias)
        self.module.apply_mask_()
        x, dy, exact = (t.double()[None] for t in (self.x, self.dy, self.weight))
        masks = self.mask[None]
        results = (
            reference.linear(x, exact, masks, self.bias.double()[None]),
            reference.linear_dx(dy, exact, masks),
            reference.linear_dw(dy, x, masks),
            dy.sum(1),
        )
        self.expected = tuple(result[0] for result in results)
        self.terms = (width, width, batch, batch)

    def contender(self, name: str, backward: bool) -> Contender:
        """Ours or torch's, forward alone or with gradients for x, weight and bias."""
        x = self.x.clone().requires_grad_(backward)
        weight, bias = self.weight.clone(), self.bias.clone()
        if name == _OURS:
            weight, bias = self.module.weight, self.module.bias
        parts = (x, weight.requires_grad_(backward), bias.requires_grad_(backward))

        def forward() -> Tensor:
            return self.module(x) if name == _OURS else F.linear(x, weight, bias)

        def forward_backward() -> tuple[Tensor, ...]:
            y = forward()
            return (y.detach(), *torch.autograd.grad(y, parts, self.dy))

        def error() -> float:
            results = forward_backward() if backward else (forward(),)
            # Torch's gradient is dense: masking it afterwards costs it nothing here.
            masked = [r.masked_fill(~self.mask, 0) if i == 2 else r for i, r in enumerate(results)]
            return mismatch(masked, self.expected[: len(masked)], self.terms[: len(masked)])

        return Contender(name, forward_backward if backward else forward, error)
