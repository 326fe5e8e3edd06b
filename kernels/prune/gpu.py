"""Exact-k pruning in Triton: a radix select over the bits of the scores, in one launch.

A program takes a ticket's row through five passes: four count how often each value of a digit of 8
bits occurs among what may still be the k-th largest score, and so fix that score digit by digit;
the last writes the mask, of ties the lowest positions. A row of up to `MOST` entries is read from
memory once (5 bytes an entry), a longer one five times, and its mask written once. Counts are
integers, nothing is atomic and nothing waits for the device: the same mask on every run.

A population's masks are drawn once a level, so rows are not cut into programs of their own, which
would be many times as fast for few long ones.

Blocks and warps may be measured (`kernels.tuning`), by the row's length: whatever they are, the
mask is the same.
"""

from __future__ import annotations

from functools import cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import check_dtype
from ..examples import Example, meta
from ..jit import jit_kernel
from ..launch import Launch
from ..tuning import prefer

MOST = 8192
"""Entries of a row that a program takes at a time."""


@triton.jit
def _ordered(score, MAGNITUDE: tl.constexpr):
    """Unsigned integers above zero in the order of the scores, -0.0 equal to 0.0."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.uint32, bitcast=True)
    if MAGNITUDE:
        # The sign makes room for the bit that keeps a zero above zero.
        return (bits << 1) | 1
    return tl.where(bits >> 31 == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _keys(scores, mask, ticket, column, prunable, stride, MAGNITUDE: tl.constexpr):
    """Ordered scores of a row's columns; zero outside the mask, where no score is read."""
    inside = tl.load(mask + ticket * prunable + column, mask=column < prunable, other=0).to(tl.int1)
    score = tl.load(scores + ticket * stride + column, mask=inside, other=0.0)
    return tl.where(inside, _ordered(score, MAGNITUDE), 0)


@triton.jit
def _histogram(key, candidate, shift):
    return tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=candidate)


@triton.jit
def _choose(counts, wanted):
    """Digit of the ``wanted``-th largest, and its rank among those with that digit.

    If none is wanted, the largest digit and rank 0, so that every score lies below or unranked.
    """
    at_least = tl.cumsum(counts, 0, reverse=True)  # [256]
    found = tl.sum((at_least >= wanted).to(tl.int32), 0) - 1
    above = tl.sum(tl.where(tl.arange(0, 256) > found, counts, 0), 0)
    return found.to(tl.uint32), wanted - above


@jit_kernel(fp_fusion=True)
def _select_kernel(
    scores,  # [P, prunable], rows strided
    mask,  # [P, prunable]
    out,  # [P, prunable], written
    k,  # [P]
    prunable,
    stride,
    MAGNITUDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row's k-th largest score, digit by digit, then its mask."""
    ticket = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    wanted = tl.load(k + ticket).to(tl.int32)
    threshold = tl.full([], 0, tl.uint32)
    for step in tl.static_range(4):
        shift = 24 - 8 * step
        counts = tl.zeros([256], tl.int32)  # by value of the digit
        for first in range(0, prunable, BLOCK):
            key = _keys(scores, mask, ticket, first + lane, prunable, stride, MAGNITUDE)  # [block]
            candidate = key != 0
            if step > 0:
                candidate = candidate & ((key ^ threshold) >> (shift + 8) == 0)
            counts += _histogram(key, candidate, shift)
        if step == 0:
            wanted = tl.minimum(wanted, tl.sum(counts, 0))
        digit, wanted = _choose(counts, wanted)
        threshold = threshold | (digit << shift)

    seen = tl.full([], 0, tl.int32)
    for first in range(0, prunable, BLOCK):
        column = first + lane
        key = _keys(scores, mask, ticket, column, prunable, stride, MAGNITUDE)
        tie = (key == threshold).to(tl.int32)
        rank = seen + tl.cumsum(tie, 0)
        kept = (key > threshold) | ((tie == 1) & (rank <= wanted))
        tl.store(out + ticket * prunable + column, kept, mask=column < prunable)
        seen += tl.sum(tie, 0)


def prune(scores: Tensor, mask: Tensor, k: Tensor, magnitude: bool) -> Tensor:
    """See the op; mask and k are contiguous."""
    check_dtype("scores on the Triton backend", scores, torch.float32)
    out = torch.empty_like(mask)
    tickets, prunable = mask.shape
    if mask.numel() == 0:
        return out
    if scores.stride(1) != 1:
        scores = scores.contiguous()
    among = _launches(min(triton.next_power_of_2(prunable), MOST))
    launch = prefer(
        among[0], "prune", mask.device, among=among, length=prunable, magnitude=magnitude
    )
    with torch.cuda.device_of(mask):
        _select_kernel[(tickets,)](
            scores,
            mask,
            out,
            k,
            prunable,
            scores.stride(0),
            MAGNITUDE=magnitude,
            **launch.constexprs,
            **launch.options,
        )
    return out


@cache
def _launches(length: int) -> tuple[Launch, ...]:
    """What a row can be launched with, the default first; beyond `MOST` all are alike."""
    block = max(length, 256)
    # Up to 16 entries a thread; in between, assemblers spill a little for more occupancy.
    default = Launch(block=block, warps=max(4, block // 512))
    return (default, Launch(block=block, warps=8)) if block == MOST else (default,)


def _example(length: int, magnitude: bool) -> None:
    mask = meta(2, length, dtype=torch.bool)
    prune(meta(2, length), mask, meta(2, dtype=torch.int64), magnitude)


EXAMPLES = [
    Example(f"{length}{'_magnitude' * magnitude}", partial(_example, length, magnitude))
    for magnitude in (False, True)
    for length in (256, MOST, 2 * MOST)
]
