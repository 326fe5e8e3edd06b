"""Exact-k pruning in Triton: a radix select over the bits of the scores, one program per ticket.

Four passes of eight bits find the k-th largest score, a fifth writes the mask, ranking ties by a
prefix sum in order of position. Integer counts only: the same mask on every run, no atomics on
global memory, no wait for the device. Reads 25 bytes an entry, mostly from L2, and writes one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compile import Case
from ..errors import check_dtype

__all__ = ["COMPILE_CASES", "prune"]

BLOCK = 2048


@triton.jit
def _keys(scores, mask, ticket, column, prunable):
    """Signed integers in the order of the scores, and which of them are inside the mask."""
    entry = ticket * prunable + column
    inside = tl.load(mask + entry, mask=column < prunable, other=0).to(tl.int1)
    score = tl.load(scores + entry, mask=inside, other=0.0)
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF), inside


@triton.jit
def _prune_kernel(scores, mask, k, out, prunable, BLOCK: tl.constexpr):
    ticket = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    digits = tl.arange(0, 256)
    blocks = tl.cdiv(prunable, BLOCK)
    threshold = tl.full([], 0, tl.int32)
    wanted = tl.load(k + ticket).to(tl.int32)

    for step in tl.static_range(4):
        shift = 24 - 8 * step
        counts = tl.zeros([256], tl.int32)
        for block in range(blocks):
            key, inside = _keys(scores, mask, ticket, block * BLOCK + lane, prunable)
            digit = (key >> shift) & 255
            if step == 0:
                # Of a signed number the top digit counts from -128.
                digit = digit ^ 128
            else:
                inside = inside & (((key ^ threshold) >> (shift + 8)) == 0)
            counts += tl.histogram(digit, 256, mask=inside)
        if step == 0:
            wanted = tl.minimum(wanted, tl.sum(counts, 0))
        at_least = tl.cumsum(counts, 0, reverse=True)
        found = tl.sum((at_least >= wanted).to(tl.int32), 0) - 1
        if step == 0:
            some = wanted > 0
        wanted -= tl.sum(tl.where(digits > found, counts, 0), 0)
        if step == 0:
            threshold = (found ^ 128) << shift
        else:
            threshold = threshold | (found << shift)

    # `wanted` is now the number of entries equal to the threshold that stay.
    seen = tl.full([], 0, tl.int32)
    for block in range(blocks):
        column = block * BLOCK + lane
        key, inside = _keys(scores, mask, ticket, column, prunable)
        tie = (inside & (key == threshold)).to(tl.int32)
        rank = seen + tl.cumsum(tie, 0)
        kept = inside & ((key > threshold) | ((tie == 1) & (rank <= wanted))) & some
        tl.store(out + ticket * prunable + column, kept, mask=column < prunable)
        seen += tl.sum(tie, 0)


def prune(scores: Tensor, mask: Tensor, k: Tensor) -> Tensor:
    check_dtype("scores on the Triton backend", scores, torch.float32)
    out = torch.empty_like(mask)
    if mask.numel():
        _prune_kernel[(mask.shape[0],)](scores, mask, k, out, mask.shape[1], BLOCK=BLOCK)
    return out


COMPILE_CASES = [
    Case(
        "prune",
        _prune_kernel,
        {
            "scores": "*fp32:16",
            "mask": "*i1:16",
            "k": "*i64:16",
            "out": "*i1:16",
            "prunable": "i32",
        },
        {"BLOCK": BLOCK},
        {},
    ),
]
