"""When: how far the density has come from the initial to the final one."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["SCHEDULES", "Schedule"]

Schedule = Callable[[float], float]
"""From the way through the pruning phase, in [0, 1], to the share of the pruning that is done."""

_CYCLES = 4


def constant(way: float) -> float:
    """The final density from the beginning: static sparse training, SET, RigL."""
    return 1.0


def one_shot(way: float) -> float:
    """The final density at once, when the phase begins."""
    return 1.0


def cubic(way: float) -> float:
    """``1 - (1 - u)^3``: most is pruned early, when most is redundant (Zhu and Gupta 2017)."""
    return 1.0 - (1.0 - way) ** 3


def cyclic(way: float) -> float:
    """Four times the cubic curve, each from the initial density (Srinivas et al. 2022).

    The density rises between two of them, so something must grow.
    """
    return 1.0 if way >= 1.0 else cubic(way * _CYCLES % 1.0)


SCHEDULES: dict[str, Schedule] = {
    "constant": constant,
    "one-shot": one_shot,
    "cubic": cubic,
    "cyclic": cyclic,
}
"""Every schedule by its name. Before the phase all but ``constant`` keep the initial density."""
