"""`sparse-tickets bench`: what sparsity gains on this machine, for layers of a size you name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from sparse_tickets.kernels.dispatch import Plan, use_backend
from sparse_tickets.kernels.linear import linear, plan, reference
from sparse_tickets.kernels.prune import prune
from sparse_tickets.timing import (
    Budget,
    Contender,
    Spread,
    Timing,
    device_clock,
    mismatch,
    pinned_threads,
    verified_ratio,
)

__all__ = ["SPARSITIES", "Line", "bench", "bench_table"]

SPARSITIES = (0.0, 50.0, 80.0, 90.0, 95.0, 98.0, 99.0)
"""Percent of the weights pruned."""

_OURS, _DENSE = "sparse_tickets", "torch dense"
_BAR = 20


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
    """

    sparsity: float
    direction: str
    plan: Plan
    dense: Spread
    ours: Spread
    speedup: Spread


def bench(
    width: int = 256,
    batch: int = 2048,
    device: str = "cpu",
    *,
    sparsities: Sequence[float] = SPARSITIES,
    threads: int | None = None,
    budget: Budget | None = None,
) -> list[Line]:
    """Time a masked ``width x width`` layer beside torch's dense one, after verifying both.

    Args:
        width: inputs and outputs.
        batch: rows.
        device: ``cpu`` or a CUDA device.
        sparsities: percents pruned.
        threads: for both sides; torch's current number by default.
        budget: how long to time.

    Returns:
        For every sparsity a line for ``forward`` and one for ``forward+backward``.

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
    lines = []
    with pinned_threads(torch.get_num_threads() if threads is None else threads):
        for sparsity in sparsities:
            layer = _Layer(width, batch, sparsity, device)
            chosen = plan(width, width, batch, 1 - sparsity / 100, torch.float32, device)
            for backward in (False, True):
                dense, ours = layer.contender(_DENSE, backward), layer.contender(_OURS, backward)
                found = verified_ratio(ours, [dense], budget or Budget(), device_clock(device))

                def spread(timing: Timing) -> Spread:
                    return Spread.of(timing.wall)

                lines.append(
                    Line(
                        sparsity,
                        "forward+backward" if backward else "forward",
                        chosen,
                        spread(found.timings[_DENSE]),
                        spread(found.timings[_OURS]),
                        found.speedup[_DENSE],
                    )
                )
    return lines


def bench_table(lines: Sequence[Line]) -> Table:
    """Lines of `bench` with a bar per speed-up; losses are red."""
    table = Table(title="against torch's dense layer: median (p20-p80); both verified")
    for column in ("pruned", "direction", "dense", "ours", "speed-up", "", "format"):
        left = column in ("direction", "", "format")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    longest = max((line.speedup.median for line in lines), default=1.0)
    for line in lines:
        gain = line.speedup
        # A win or a loss is one only if the whole spread lies on that side of 1.
        colour = "green" if gain.p20 > 1 else "red" if gain.p80 < 1 else "yellow"
        table.add_row(
            f"{line.sparsity:g}%",
            line.direction,
            f"{1e6 * line.dense.median:,.0f} us",
            f"{1e6 * line.ours.median:,.0f} us",
            f"{gain.median:.2f}x ({gain.p20:.2f}-{gain.p80:.2f})",
            f"[{colour}]{'█' * max(1, round(_BAR * gain.median / longest))}[/{colour}]",
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
        weight = torch.randn(1, width, width, generator=generator) * width**-0.5
        self.mask = mask.to(device)
        self.weight = weight.masked_fill_(~mask, 0).to(device)
        self.bias = torch.randn(1, width, generator=generator).to(device)
        self.x, self.dy = torch.randn(2, 1, batch, width, generator=generator).to(device).unbind()
        x, dy, exact = self.x.double(), self.dy.double(), self.weight.double()
        self.expected = (
            reference.linear(x, exact, self.mask, self.bias.double()),
            reference.linear_dx(dy, exact, self.mask),
            reference.linear_dw(dy, x, self.mask),
            dy.sum(1),
        )
        self.terms = (width, width, batch, batch)

    def contender(self, name: str, backward: bool) -> Contender:
        """Ours or torch's, forward alone or with gradients for x, weight and bias."""
        inputs = [self.x, self.weight, self.bias]
        if backward:
            inputs = [tensor.clone().requires_grad_() for tensor in inputs]
        x, weight, bias = inputs

        def forward() -> Tensor:
            if name == _OURS:
                return linear(x, weight, self.mask, bias)
            return F.linear(x[0], weight[0], bias[0]).unsqueeze(0)

        def forward_backward() -> tuple[Tensor, ...]:
            y = forward()
            return (y.detach(), *torch.autograd.grad(y, inputs, self.dy))

        def error() -> float:
            results = forward_backward() if backward else (forward(),)
            # Torch's gradient is dense: masking it afterwards costs it nothing here.
            masked = [r.masked_fill(~self.mask, 0) if i == 2 else r for i, r in enumerate(results)]
            return mismatch(masked, self.expected[: len(masked)], self.terms[: len(masked)])

        return Contender(name, forward_backward if backward else forward, error)
