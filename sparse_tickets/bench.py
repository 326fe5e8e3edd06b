"""`sparse-tickets bench`: what sparsity gains on this machine, for layers of a size you name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

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
    alternate,
    device_clock,
    mismatch,
    pinned_threads,
    verified_ratio,
)

__all__ = ["SPARSITIES", "Bench", "BenchLine", "bench", "bench_table", "crossover"]

SPARSITIES = (0.0, 50.0, 80.0, 90.0, 95.0, 98.0, 99.0)
"""Percent of the weights pruned."""

_OURS, _DENSE = "sparse_tickets", "nn.Linear"
_DIRECTIONS = ("forward", "forward+backward")
_BAR = 10


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
    """What `bench` found.

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


def bench(
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
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    if not sparsities:
        raise ValueError("sparsities must not be empty")
    for sparsity in sparsities:
        if not 0 <= sparsity <= 100:
            raise ValueError(f"sparsities must be in [0, 100], got {sparsity}")
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must exist, got {device} and torch sees no GPU")
    budget, neighbours = budget or Budget(), Neighbours()
    with pinned_threads(torch.get_num_threads() if threads is None else threads):
        count = torch.get_num_threads()
        where = f"{count} thread" if count == 1 else f"{count} threads"
        if kind == "cuda":
            where = torch.cuda.get_device_name(device)
        ceilings = measure_ceilings(budget, device)
        lines = []
        for sparsity in sorted(set(sparsities)):
            layer = _Layer(width, batch, sparsity, device)
            for direction in _DIRECTIONS:
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
    """A table per direction with a bar per speed-up, losses hollow; what it says below."""
    parts: list[RenderableType] = []
    if found.busy > BUSY:
        parts.append(
            f"[yellow]Other processes used {found.busy:.0%} of the cores: neither times nor ratios "
            "can be trusted.[/yellow]"
        )
    for direction in _DIRECTIONS:
        lines = [line for line in found.lines if line.direction == direction]
        if lines:
            parts += [_table(f"{direction}, {found.what}", lines), _said(lines), ""]
    rates = [rate.median / 1e9 for rate in found.ceilings.copies.values()]
    gflops = found.ceilings.sgemm.median / 1e9
    return Group(
        *parts,
        _hanging(
            (
                "speed-up",
                "time of nn.Linear over that of SparseLinear, in warm repeats of each that took "
                "turns, with pauses: median, and half of p80 - p20. Above 1 we are faster. Both "
                "results were verified first.",
            ),
            (
                "loop",
                "the same where the two are called in turn, one call each and no pause, as a "
                "program does: caches and threads are as the other left them.",
            ),
            (
                "bound",
                "no kernel that keeps the weight so can be faster on this machine: its operations "
                f"at {gflops:,.0f} GFLOP/s, the rate of a large product here, or its bytes at "
                f"{min(rates):.3g}-{max(rates):.3g} GB/s, that of a copy by size; whichever "
                "takes longer.",
            ),
            ("crossover", "the sparsity from which we are faster, between measured ones."),
            ("reached", "the bound over our time: 100% is the machine's limit."),
            ("plan", "how the weight is kept: csr is compressed rows, dense torch's own layout."),
        ),
    )


def _hanging(*rows: tuple[str, str]) -> Table:
    """Words and what is said of them, each in a column of its own."""
    table = Table.grid(padding=(0, 2))
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _table(title: str, lines: Sequence[BenchLine]) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    for column in ("pruned", "dense", "ours", "speed-up", ""):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True, min_width=_BAR)
    for column in ("loop", "bound", "reached"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("plan", no_wrap=True)
    longest = max((line.speedup.median for line in lines), default=1.0)
    for line in lines:
        gain = line.speedup
        # A win or a loss is one only if the whole spread lies on that side of 1.
        colour = "green" if gain.p20 > 1 else "red" if gain.p80 < 1 else "yellow"
        bar = ("█" if gain.median >= 1 else "░") * max(1, round(_BAR * gain.median / longest))
        table.add_row(
            f"{line.sparsity:g}%",
            _microseconds(line.dense.median),
            _microseconds(line.ours.median),
            f"[{colour}]{gain.median:.2f}x[/{colour}]",
            f"± {gain.noise:.0%}",
            f"[{colour}]{bar}[/{colour}]",
            f"{line.loop.median:.2f}x",
            _microseconds(line.bound),
            f"{line.reached:.0%}",
            line.plan.format,
        )
    return table


def _said(lines: Sequence[BenchLine]) -> Table:
    """From where on sparsity pays, and why each plan was chosen."""
    rows = [("crossover", crossover([(line.sparsity, line.speedup) for line in lines]))]
    for _, several in groupby(lines, lambda line: (line.plan.backend, line.plan.format)):
        alike = list(several)
        ends = dict.fromkeys((f"{alike[0].sparsity:g}", f"{alike[-1].sparsity:g}"))
        # Of neighbours with the same plan, the last one's reason.
        plan = alike[-1].plan
        rows.append((f"plan at {'-'.join(ends)}%", f"{plan.backend}/{plan.format}: {plan.reason}"))
    return _hanging(*rows)


def _microseconds(seconds: float) -> str:
    """``4.2 us``, ``970 us``, ``12.3 ms``: three digits."""
    value, unit = (1e3 * seconds, "ms") if seconds >= 1e-3 else (1e6 * seconds, "us")
    return f"{value:,.{max(0, 2 - math.floor(math.log10(max(value, 0.1))))}f} {unit}"


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
