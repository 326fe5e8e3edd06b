"""What advantage estimation must do at least: read every step of a rollout once, write two."""

from __future__ import annotations

from ..cost import Cost

__all__ = ["gae"]


def gae(tickets: int, steps: int, envs: int, *, itemsize: int = 4) -> Cost:
    """Three numbers and two flags in, two numbers out; 6 operations a step.

    Args:
        tickets: P.
        steps: T.
        envs: E, environments of a ticket.
        itemsize: bytes of a number.
    """
    entries = tickets * steps * envs
    return Cost(6 * entries, entries * (5 * itemsize + 2))
