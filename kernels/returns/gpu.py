"""Generalised advantage estimation in Triton: one lane per ticket and environment, T in sequence.

Reads 14 bytes a step and writes 8; neighbouring lanes are neighbouring environments, so every
load is coalesced. Bound by the latency of T dependent steps where P * E is small.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compile import Case
from ..errors import check_dtype

__all__ = ["COMPILE_CASES", "gae"]

BLOCK = 128


@triton.jit
def _gae_kernel(
    reward,
    value,
    next_value,
    terminated,
    truncated,
    advantage,
    target,
    lanes,
    steps,
    envs,
    gamma,
    decay,
    BLOCK: tl.constexpr,
):
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = lane < lanes
    first = (lane // envs) * steps * envs + lane % envs
    following = tl.zeros([BLOCK], tl.float32)
    for back in range(1, steps + 1):
        entry = first + (steps - back) * envs
        ended = tl.load(terminated + entry, mask=exists, other=0).to(tl.int1)
        cut = tl.load(truncated + entry, mask=exists, other=0).to(tl.int1)
        ahead = tl.load(next_value + entry, mask=exists & ~ended, other=0.0)
        now = tl.load(value + entry, mask=exists, other=0.0)
        delta = tl.load(reward + entry, mask=exists, other=0.0) + gamma * ahead - now
        following = delta + decay * tl.where(ended | cut, 0.0, following)
        tl.store(advantage + entry, following, mask=exists)
        tl.store(target + entry, following + now, mask=exists)


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
        _gae_kernel[(triton.cdiv(tickets * envs, BLOCK),)](
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
            BLOCK=BLOCK,
        )
    return advantage, target


COMPILE_CASES = [
    Case(
        "gae",
        _gae_kernel,
        {
            **dict.fromkeys(("reward", "value", "next_value", "advantage", "target"), "*fp32:16"),
            **dict.fromkeys(("terminated", "truncated"), "*i1:16"),
            **dict.fromkeys(("lanes", "steps", "envs"), "i32"),
            **dict.fromkeys(("gamma", "decay"), "fp32"),
        },
        {"BLOCK": BLOCK},
        {},
    ),
]
