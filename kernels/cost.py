"""What an op must do at least: floating-point operations, and bytes between memory and chip.

Each op's folder has a ``cost.py`` with one function per product or pass, called like it and given
plain sizes; the benchmarks draw rooflines from these. A cost is a lower bound: every input read
once, every output written once, caches of no help between tickets.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Cost"]


class Cost(NamedTuple):
    """Work that no implementation of an op in a given layout can avoid.

    Attributes:
        flops: floating-point operations; a multiply-add is two, a transcendental one.
        bytes: moved between device memory and chip, reads and writes together.
    """

    flops: float
    bytes: float

    def plus(self, other: Cost) -> Cost:
        """The cost of both, one after the other."""
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def seconds(self, flops: float, bandwidth: float) -> float:
        """Roofline bound on a machine.

        Args:
            flops: peak rate of the unit that does the work, operations per second.
            bandwidth: of the memory, bytes per second.

        Raises:
            ValueError: a rate is not positive.
        """
        if flops <= 0 or bandwidth <= 0:
            raise ValueError(f"rates must be positive, got flops={flops}, bandwidth={bandwidth}")
        return max(self.flops / flops, self.bytes / bandwidth)
