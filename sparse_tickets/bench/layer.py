"""What sparsity gains a single layer of a size you name, beside `nn.Linear`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from sparse_tickets.bench.machine import check_machine, name_machine
from sparse_tickets.ceilings import (
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
    alternate,
    device_clock,
    mismatch,
    pinned_threads,
    verified_ratio,
)

__all__ = ["DIRECTIONS", "SPARSITIES", "Bench", "BenchLine", "bench_layer"]

SPARSITIES = (0.0, 50.0, 80.0, 90.0, 95.0, 98.0, 99.0)
"""Percent of the weights pruned."""

_OURS, _DENSE = "sparse_tickets", "nn.Linear"
DIRECTIONS = ("forward", "forward+backward")


@dataclass(frozen=True)
class BenchLine:
    """One sparsity.

    Attributes:
        sparsity: percent pruned.
        direction: ``forward`` or ``forward+backward``.
        plan: what the layer runs, and why.
        dense: seconds of a call of torch's dense layer.
        ours: seconds of a call of ours.
        speedup: the one over the other, paired within rounds; warm repeats with pauses between.
        loop: the same of calls that take turns one by one, as in a program's loop.
        bound: seconds below which no kernel of this format can get on this machine.
    """

    sparsity: float
    direction: str
    plan: Plan
    dense: Spread
    ours: Spread
    speedup: Spread
    loop: Spread
    bound: float

    @property
    def reached(self) -> float:
        """Share of the bound's rate that our layer reaches; 1 is the machine's limit."""
        return self.bound / self.ours.median


@dataclass(frozen=True)
class Bench:
    """What `bench_layer` found.

    Attributes:
        lines: for every sparsity, ascending, one per direction.
        ceilings: of the machine, measured in the same run.
        busy: share of the cores that other processes used meanwhile.
        what: the layer and the machine, in words.
    """

    lines: tuple[BenchLine, ...]
    ceilings: Ceilings
    busy: float = 0.0
    what: str = ""


def bench_layer(
    width: int = 256,
    batch: int = 2048,
    device: str = "cpu",
    *,
    sparsities: Sequence[float] = SPARSITIES,
    threads: int | None = None,
    budget: Budget | None = None,
    on_line: Callable[[BenchLine], None] | None = None,
) -> Bench:
    """Time a `SparseLinear` of ``width x width`` beside `nn.Linear`, after verifying both.

    Args:
        width: inputs and outputs.
        batch: rows.
        device: ``cpu`` or a CUDA device.
        sparsities: percents pruned.
        threads: for both sides; torch's current number by default.
        budget: how long to time.
        on_line: called with each line as it is measured.

    Raises:
        ValueError: a size below 1, no sparsity or one outside [0, 100], a device other than
            ``cpu`` and ``cuda``, or one that torch does not have.
        Unverified: a result differs from the float64 reference: nothing is reported.
    """
    for name, size in (("width", width), ("batch", batch)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if not sparsities:
        raise ValueError("sparsities must not be empty")
    for sparsity in sparsities:
        if not 0 <= sparsity <= 100:
            raise ValueError(f"sparsities must be in [0, 100], got {sparsity}")
    check_machine(device, threads)
    budget, neighbours = budget or Budget(), Neighbours()
    with pinned_threads(torch.get_num_threads() if threads is None else threads):
        where = name_machine(device)
        ceilings = measure_ceilings(budget, device)
        lines = []
        for sparsity in sorted(set(sparsities)):
            layer = _Layer(width, batch, sparsity, device)
            for direction in DIRECTIONS:
                lines.append(_measure(layer, direction, budget, ceilings))
                if on_line is not None:
                    on_line(lines[-1])
    what = f"{width} x {width}, batch {batch}, float32, {where}"
    return Bench(tuple(lines), ceilings, neighbours.share(), what)


def _measure(layer: _Layer, direction: str, budget: Budget, ceilings: Ceilings) -> BenchLine:
    backward = direction != "forward"
    dense, ours = layer.contender(_DENSE, backward), layer.contender(_OURS, backward)
    clock = device_clock(layer.x.device)
    found = verified_ratio(ours, [dense], budget, clock)
    loop = alternate((dense, ours), budget, clock)
    plan = layer.module.plan(len(layer.x), training=backward)
    return BenchLine(
        sparsity=layer.sparsity,
        direction=direction,
        plan=plan,
        dense=Spread.of(found.timings[_DENSE].wall),
        ours=Spread.of(found.timings[_OURS].wall),
        speedup=found.speedup[_DENSE],
        loop=Spread.of([a / b for a, b in zip(loop[_DENSE], loop[_OURS], strict=True)]),
        bound=ceilings.bound(layer_cost(plan.format, layer.mask[None], len(layer.x), backward)),
    )


class _Layer:
    """One random layer, its inputs, and what the float64 reference makes of them."""

    def __init__(self, width: int, batch: int, sparsity: float, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        draw = partial(torch.randn, generator=generator, dtype=torch.float32, device="cpu")
        scores = draw(1, width * width)
        everything = torch.ones_like(scores, dtype=torch.bool)
        with use_backend("reference"):
            kept = round((100 - sparsity) / 100 * width * width)
            mask = prune(scores, everything, kept).unflatten(1, (width, width))
        self.sparsity, self.mask = sparsity, mask[0].to(device)
        weight = draw(width, width) * width**-0.5
        self.weight = weight.masked_fill_(~mask[0], 0).to(device)
        self.bias = draw(width).to(device)
        self.x, self.dy = draw(2, batch, width).to(device).unbind()
        dtype, on = self.x.dtype, self.x.device
        self.module = SparseLinear(width, width, mask=self.mask, dtype=dtype, device=on)
        with torch.no_grad():
            self.module.weight.copy_(self.weight)
            self.module.bias.copy_(self.bias)
        self.module.apply_mask_()
        self.dense = nn.Linear(width, width, dtype=dtype, device=on)
        self.dense.load_state_dict({"weight": self.weight, "bias": self.bias})
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
        module = self.module if name == _OURS else self.dense
        x = self.x.clone().requires_grad_(backward)
        module.requires_grad_(backward)
        parts = (x, module.weight, module.bias)

        def forward() -> Tensor:
            return module(x)

        def forward_backward() -> tuple[Tensor, ...]:
            y = forward()
            return (y.detach(), *torch.autograd.grad(y, parts, self.dy))

        def error() -> float:
            results = forward_backward() if backward else (forward(),)
            # Torch's gradient is dense: masking it afterwards costs it nothing here.
            masked = [r.masked_fill(~self.mask, 0) if i == 2 else r for i, r in enumerate(results)]
            return mismatch(masked, self.expected[: len(masked)], self.terms[: len(masked)])

        return Contender(name, forward_backward if backward else forward, error)
