"""The loss of the value of the action taken and its gradient, as a head in Triton.

A sample has 12 bytes beside its outputs and takes about 10 FLOPs. The value of an action that is
none is NaN: that is seen, where a check would wait for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..training.head_gpu import GPUHead


@triton.jit
def _prepare(
    NUMBER: tl.constexpr, data, numbers, minibatch, OPTIONS: tl.constexpr, WALK: tl.constexpr
):
    """Nothing: samples are judged one by one."""
    return 0.0, 0.0


@triton.jit
def _loss(
    NUMBER: tl.constexpr,
    output,
    log_std,
    known,
    data,
    numbers,
    place,
    count,
    OPTIONS: tl.constexpr,
    OUT: tl.constexpr,
    WIDE: tl.constexpr,
):
    KIND: tl.constexpr = OPTIONS[0]
    at, inside = place
    taken = tl.load(data.action + at, mask=inside, other=0)
    chosen = tl.arange(0, WIDE)[None, :] == taken[:, None]  # [rows, actions]
    exists = (taken >= 0) & (taken < OUT)  # [rows]
    value = tl.where(exists, tl.sum(tl.where(chosen, output, 0.0), 1), float("nan"))
    error = value - tl.load(data.wanted + at, mask=inside, other=0.0)
    if KIND == "huber":
        # Comparisons that a NaN fails keep it.
        slope = tl.where(error > 1.0, 1.0, error)
        slope = tl.where(slope < -1.0, -1.0, slope)
        loss = tl.where(tl.abs(error) < 1.0, 0.5 * error * error, tl.abs(error) - 0.5)
    else:
        slope = 2.0 * error
        loss = error * error
    touched = (chosen | (exists == 0)[:, None]) & inside[:, None]
    gradient = tl.where(touched, (slope / count)[:, None], 0.0)
    measured = tl.where(inside, loss, 0.0), tl.where(inside, value, 0.0)
    return gradient, tl.zeros([WIDE], tl.float32), measured


class _Values(NamedTuple):
    action: Tensor
    wanted: Tensor


def head(kind: str, action: Tensor, wanted: Tensor) -> GPUHead:
    """DQN's loss; see `reference.loss`.

    Args:
        kind: one of `reference.LOSSES`.
        action: ``[P, S]`` int64, contiguous.
        wanted: ``[P, S]`` float32, contiguous: what the values of these actions should be.
    """
    return GPUHead("dqn", _prepare, _loss, ((0, 1),), _Values(action, wanted), (), (kind,))
