"""What a machine can do at best, so that a time can be told as a share of it, and who else uses it.

A roofline: no kernel with a given `Cost` is faster than its operations at the rate of a large
product, or its bytes at the rate of a copy of as many.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sparse_tickets.kernels.cost import Cost
from sparse_tickets.kernels.linear import cost
from sparse_tickets.timing import Budget, Contender, Spread, device_clock, interleave

__all__ = ["BUSY", "Ceilings", "Neighbours", "layer_cost", "measure_ceilings"]

BUSY = 0.05
"""Above this share of the cores in other hands, times are noise and reports say so."""

_COPIES = (1 << 20, 4 << 20, 16 << 20, 64 << 20, 256 << 20)
"""Bytes that copies move, reads and writes together: from what caches hold to what none does."""


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
        return work.seconds(self.sgemm.median, self.bandwidth(work.bytes))


def layer_cost(format: str, mask: Tensor, batch: int, training: bool) -> Cost:
    """What float32 linear layers in a format do at least, forward or forward and backward.

    The backward pass computes all gradients from one reading of dy.

    Args:
        format: of the layer's plan: ``dense``, ``dense+mask``, ``csr``, ``blocked-16``...
        mask: ``[P, O, I]`` bool.
        batch: B, rows per ticket.
        training: forward and backward.
    """
    tickets, out, inp = mask.shape
    sizes = tickets, batch, out, inp
    kept = int(mask.count_nonzero()) / max(tickets, 1)
    if format == "csr":
        products = [f(*sizes, kept) for f in (cost.csr_forward, cost.csr_dx, cost.csr_dw)]
    elif format.startswith("blocked"):
        block = int(format.partition("-")[2])
        passes = cost.blocked_forward, cost.blocked_dx, cost.blocked_dw
        products = [f(*sizes, kept / block**2, block) for f in passes]
    else:
        masked = format != "dense"
        products = [cost.forward(*sizes), cost.dx(*sizes), cost.dw(*sizes, masked=masked)]
    forward, dx, dw = products
    if not training:
        return forward
    read_again = Cost(0.0, -2.0 * 4 * tickets * batch * out)
    return forward.plus(dx).plus(dw).plus(cost.db(tickets, batch, out)).plus(read_again)


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
