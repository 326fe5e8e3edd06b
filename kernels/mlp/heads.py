"""How a loss on a network's outputs is launched: one program per ticket walks its minibatch."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor

from ..compile import Case
from ..launch import Launch
from ..tuning import prefer

__all__ = ["cases", "launches", "padded", "prefer_launch"]

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


def cases(
    name: str,
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, object],
    *,
    continuous: bool,
    actions: int,
    count: int,
) -> list[Case]:
    """A loss compiled with every launch it can have; the default's case has the plain name.

    Args:
        name: of the case.
        kernel: takes CONTINUOUS, ACTIONS, PADDED and BLOCK, and `log_std` with its gradient.
        signature: of its other arguments.
        constants: its other constants.
        continuous: whether actions are.
        actions: outputs of a sample.
        count: samples of a minibatch, a power of two.
    """
    constants = {**constants, "CONTINUOUS": continuous, "ACTIONS": actions}
    constants["PADDED"] = padded(actions)
    if continuous:
        signature = {**signature, "log_std": "*fp32", "d_log_std": "*fp32"}
    else:
        constants |= {"log_std": None, "d_log_std": None}
    default, *others = launches(count, padded(actions))
    named = [(name, default), *((f"{name}_{x.label}", x) for x in others)]
    return [
        Case(full, kernel, signature, constants | launch.constexprs, launch.options)
        for full, launch in named
    ]


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
