"""What a machine can do at best, so that a time can be told as a share of it, and who else uses it.

A roofline: no kernel with a given `Cost` is faster than its operations at the rate of a large
product, or its bytes at the rate of a copy of as many.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_tickets.timing import Budget, Contender, Spread, device_clock, interleave

__all__ = ["BUSY", "Ceilings", "Cost", "Neighbours", "layer_cost", "measure_ceilings"]

BUSY = 0.05
"""Above this share of the cores in other hands, times are noise and reports say so."""

_COPIES = (1 << 20, 4 << 20, 16 << 20, 64 << 20, 256 << 20)
"""Bytes that copies move, reads and writes together: from what caches hold to what none does."""

# Bytes of a column, of a block's index or a count of blocks; and of where a compressed row begins.
_INDEX, _POINTER = 4, 8


class Cost(NamedTuple):
    """Work that no implementation in a given format can avoid.

    Every input is read once, every output written once; caches are of no help between tickets.

    Attributes:
        flops: floating-point operations; a multiply-add is two, a transcendental one.
        bytes: moved between memory and chip, reads and writes together.
    """

    flops: float
    bytes: float


@dataclass(frozen=True)
class Ceilings:
    """Rates of one machine.

    Attributes:
        sgemm: floating-point operations per second of a large float32 product.
        copies: bytes per second of copies, by the bytes that each reads and writes.
    """

    sgemm: Spread
    copies: dict[int, Spread]

    def bandwidth(self, moved: float) -> float:
        """Bytes per second at which so many can be moved, from whichever cache holds them.

        The fastest copy that is not smaller, since one of few bytes is all overhead.

        Raises:
            ValueError: no copy was measured.
        """
        if not self.copies:
            raise ValueError("copies must have a rate, none was measured")
        start = max((size for size in self.copies if size <= moved), default=0)
        return max(rate.median for size, rate in self.copies.items() if size >= start)

    def bound(self, work: Cost) -> float:
        """Seconds that work of this cost takes at least.

        Raises:
            ValueError: no copy was measured.
        """
        seconds = work.flops / self.sgemm.median
        return max(seconds, work.bytes / self.bandwidth(work.bytes))


def layer_cost(format: str, mask: Tensor, batch: int, training: bool, itemsize: int = 4) -> Cost:
    """What linear layers in a format do at least, forward or forward and backward.

    Every product reads its two factors and writes its result once; the weight's gradient is written
    dense in every format, zeros included. The backward pass computes all gradients from one reading
    of dy.

    Args:
        format: of the layer's plan: ``dense``, ``dense+mask``, ``csr``, ``blocked-16``...
        mask: ``[P, O, I]`` bool.
        batch: B, rows per ticket.
        training: forward and backward.
        itemsize: bytes of a number.
    """
    tickets, out, inp = mask.shape
    kept = int(mask.count_nonzero()) / max(tickets, 1)
    # Bytes that say where weights are, in the forward product, dX and dW.
    if format == "csr":
        # Of each kept weight its column, and where each row begins.
        rows, columns = (_INDEX * kept + _POINTER * (lines + 1) for lines in (out, inp))
        where = rows, columns, rows
    elif format.startswith("blocked"):
        block = int(format.partition("-")[2])
        rows, columns = (_INDEX * (kept / block**2 + lines // block) for lines in (out, inp))
        # dW reads where its zeros lie, too: the lists name the pruned blocks after the kept ones.
        where = rows, columns, _INDEX * (out // block) * (1 + inp // block)
    else:
        kept = out * inp
        where = 0, 0, 0 if format == "dense" else out * inp
    activations, products = batch * (inp + out), 2 * kept * batch
    forward = products + batch * out, itemsize * (activations + kept + out) + where[0]
    if not training:
        return Cost(*(tickets * each for each in forward))
    dx = products, itemsize * (activations + kept) + where[1]
    dw = products, itemsize * (activations + out * inp) + where[2]
    db = batch * out, itemsize * (batch + 1) * out
    flops, moved = (sum(each) for each in zip(forward, dx, dw, db, strict=True))
    return Cost(tickets * flops, tickets * (moved - 2 * itemsize * batch * out))


def measure_ceilings(
    budget: Budget, device: torch.device | str = "cpu", size: int = 1024
) -> Ceilings:
    """Time torch's product of two ``size`` x ``size`` matrices and its copies, threads as they are.

    Args:
        budget: how long.
        device: whose ceilings.
        size: of the matrices.
    """
    left, right = torch.rand(2, size, size, dtype=torch.float32, device=device).unbind()
    product = torch.empty(size, size, dtype=torch.float32, device=device)
    gemm = Contender("sgemm", lambda: torch.mm(left, right, out=product), None, 2.0 * size**3)
    copies = []
    for moved in _COPIES:
        source = torch.zeros(moved // 8, dtype=torch.float32, device=device)
        copy = partial(torch.empty_like(source).copy_, source)
        copies.append(Contender(f"copy of {moved} bytes", copy, None, float(moved)))
    found = interleave([gemm, *copies], budget, device_clock(device))
    rates = [Spread.of([1 / seconds for seconds in timing.wall]) for timing in found.values()]
    return Ceilings(rates[0], dict(zip(_COPIES, rates[1:], strict=True)))


class Neighbours:
    """Watches, from its creation on, the share of all cores that other processes use."""

    def __init__(self) -> None:
        self._total, self._used = self._read()

    def share(self) -> float:
        """Between 0 and 1; 0 where the system does not say."""
        total, used = self._read()
        passed = total - self._total
        if passed <= 0:
            return 0.0
        return min(1.0, max(0.0, (used - self._used) / passed))

    @staticmethod
    def _read() -> tuple[float, float]:
        """Seconds of all cores since boot, and those in which others ran."""
        stat = Path("/proc/stat")
        if not stat.exists():
            return 0.0, 0.0
        # user, nice, system, idle, iowait, irq, softirq, steal
        fields = [int(field) for field in stat.read_text().split(maxsplit=9)[1:9]]
        ticks = os.sysconf("SC_CLK_TCK")
        own = sum(os.times()[:4])
        return sum(fields) / ticks, (sum(fields) - fields[3] - fields[4]) / ticks - own
