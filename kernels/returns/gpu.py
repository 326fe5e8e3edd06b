"""Generalised advantage estimation in Triton: a scan over time, tile by tile from the last step.

Reads 14 bytes a step and writes 8; neighbouring lanes are neighbouring environments, so every load
is coalesced. One step at a time would wait T times for memory, because a load may not pass the
store before it: a tile loads `STEPS` steps at once and composes them, ``A -> delta + decay * A``
each, in a tree of fixed shape. A ticket's result depends neither on P nor on its neighbours.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import check_dtype
from ..examples import Example, meta
from ..jit import jit_kernel

STEPS = 32
LANES = 32


@triton.jit
def _then(decay, delta, later_decay, later_delta):
    """One affine map after another; what a decay of zero cuts off may be NaN."""
    carried = tl.where(later_decay == 0.0, 0.0, later_decay * delta)
    return decay * later_decay, later_delta + carried


@jit_kernel(fp_fusion=True)
def _gae_kernel(
    reward,  # [P, steps, envs], as all pointers
    value,
    next_value,
    terminated,
    truncated,
    advantage,  # written, as target
    target,
    lanes,  # P * envs
    steps,
    envs,
    gamma,
    decay,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
):
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    first = (lane // envs) * steps * envs + lane % envs  # [lanes], each lane's first step
    back = tl.arange(0, STEPS)[:, None]  # [steps, 1]
    following = tl.zeros([LANES], tl.float32)
    # Row 0 of a tile is its last step in time.
    for done in range(0, steps, STEPS):
        step = steps - 1 - done - back
        exists = (step >= 0) & (lane < lanes)[None, :]
        entry = first[None, :] + step * envs  # [steps, lanes]
        ended = tl.load(terminated + entry, mask=exists, other=0).to(tl.int1)
        cut = tl.load(truncated + entry, mask=exists, other=0).to(tl.int1)
        ahead = tl.load(next_value + entry, mask=exists & (ended == 0), other=0.0)
        now = tl.load(value + entry, mask=exists, other=0.0)
        delta = tl.load(reward + entry, mask=exists, other=0.0) + gamma * ahead - now
        kept = tl.where(ended | cut, 0.0, decay)
        reach, sums = tl.associative_scan((kept, delta), 0, _then)
        carried = tl.where(reach == 0.0, 0.0, reach * following[None, :])
        result = sums + carried
        tl.store(advantage + entry, result, mask=exists)
        tl.store(target + entry, result + now, mask=exists)
        following = tl.sum(tl.where(back == STEPS - 1, result, 0.0), 0)  # [lanes]


def gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    check_dtype("reward on the Triton backend", reward, torch.float32)
    advantage, target = torch.empty_like(reward), torch.empty_like(reward)
    tickets, steps, envs = reward.shape
    if reward.numel():
        with torch.cuda.device_of(reward):
            _gae_kernel[(triton.cdiv(tickets * envs, LANES),)](
                reward,
                value,
                next_value,
                terminated,
                truncated,
                advantage,
                target,
                tickets * envs,
                steps,
                envs,
                gamma,
                gamma * lam,
                STEPS=STEPS,
                LANES=LANES,
            )
    return advantage, target


def _example() -> None:
    number, end = meta(2, 9, 3), meta(2, 9, 3, dtype=torch.bool)
    gae(number, number, number, end, end, 0.99, 0.95)


EXAMPLES = [Example("any", _example)]
