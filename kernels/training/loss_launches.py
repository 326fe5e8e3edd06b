"""How a loss on a network's outputs is launched: one program per ticket walks its minibatch."""

from __future__ import annotations

from functools import cache

from torch import Tensor

from ..launch import Launch
from ..tuning import prefer

_MOST_BLOCK, _MOST_ENTRIES = 256, 1024
"""Samples, and samples times actions, of one step: more would not fit the registers."""


def _launch(block: int, warps: int) -> Launch:
    """Left alone, the assembler spills a little for an occupancy of no use to one program."""
    return Launch(block=block, warps=warps, maxnreg=255)


def padded(actions: int) -> int:
    """Width of a tile that holds the outputs of a sample: a power of two, at least two."""
    return _power_of_two(max(2, actions))


@cache
def launches(count: int, width: int) -> tuple[Launch, ...]:
    """What a loss can be launched with, the default first.

    Args:
        count: samples of a minibatch, rounded up to a power of two.
        width: `padded` outputs.
    """
    block = min(max(16, min(_MOST_BLOCK, _MOST_ENTRIES // width)), max(16, count))
    longer = (_launch(2 * block, 8),) if 2 * block <= count else ()
    return (_launch(block, 2), _launch(block, 4), _launch(block, 8), *longer)


def prefer_launch(op: str, output: Tensor, *, continuous: bool) -> Launch:
    """The default for ``output [P, B, A]``, or what was measured for ``op`` on its device."""
    _, count, actions = output.shape
    among = launches(_power_of_two(count), padded(actions))
    return prefer(
        among[0],
        op,
        output.device,
        among=among,
        samples=count,
        actions=padded(actions),
        continuous=continuous,
    )


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
