"""Exact-k pruning in Triton: a radix select over the bits of the scores.

A row of up to `SHORT` entries stays in the registers of one program, in one launch: it is read
once (5 bytes an entry) and its mask written (1).

A longer row is cut into chunks, their number a function of its length alone, in six launches:

    count, choose   digits of 8 bits per chunk; the k-th largest score's first digit
    count, choose   among the entries with that digit its second, and how many share both
    split           every entry above or below these 16 bits is decided; the few others are listed
    finish          the remaining 16 bits and the ties among the listed, one program per ticket

which reads a row three times and writes its mask once: 16 bytes an entry. Counts are integers and
lists are in order of position: the same mask on every run, no atomics, no wait for the device.
Finishing is slow only where very many scores agree in 16 bits, as ties do.

Blocks and warps of `count`, `split` and of short rows may be measured (`kernels.tuning`), by the
row's length: whatever they are, the mask is the same. `choose` and `finish`, which a program per
ticket runs through in no time, keep theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
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

__all__ = ["EXAMPLES", "prune"]

SHORT = 8192
CHUNK = 8192
"""Entries of a chunk, or of each stretch of a longer one: blocks divide it."""
MAX_CHUNKS = 512
"""A very long row has longer chunks, not more of them: one program adds up their counts."""
CHOOSE_ROWS = 32
FINISH_BLOCK = 2048


COUNTS = tuple(Launch(block=b, warps=w) for b, w in ((8192, 8), (8192, 16), (4096, 8)))
"""What `count` can be launched with, the default first."""

SPLITS = tuple(Launch(block=b, warps=w) for b, w in ((4096, 8), (4096, 16), (2048, 8), (2048, 4)))
"""The same of `split`."""


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
    at_least = tl.cumsum(counts, 0, reverse=True)
    found = tl.sum((at_least >= wanted).to(tl.int32), 0) - 1
    above = tl.sum(tl.where(tl.arange(0, 256) > found, counts, 0), 0)
    return found.to(tl.uint32), wanted - above


@jit_kernel(fp_fusion=True)
def _short_kernel(
    scores, mask, out, k, prunable, stride, MAGNITUDE: tl.constexpr, BLOCK: tl.constexpr
):
    """A whole row in registers: four digits, then the mask."""
    ticket = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    key = _keys(scores, mask, ticket, column, prunable, stride, MAGNITUDE)
    wanted = tl.load(k + ticket).to(tl.int32)
    threshold = tl.full([], 0, tl.uint32)
    candidate = key != 0
    wanted = tl.minimum(wanted, tl.sum(candidate.to(tl.int32), 0))
    for step in tl.static_range(4):
        shift = 24 - 8 * step
        digit, wanted = _choose(_histogram(key, candidate, shift), wanted)
        threshold = threshold | (digit << shift)
        candidate = candidate & ((key ^ threshold) >> shift == 0)
    tie = (key == threshold).to(tl.int32)
    kept = (key > threshold) | ((tie == 1) & (tl.cumsum(tie, 0) <= wanted))
    tl.store(out + ticket * prunable + column, kept, mask=column < prunable)


@jit_kernel(fp_fusion=True)
def _count_kernel(
    scores,
    mask,
    prefix,
    counts,
    prunable,
    stride,
    chunks,
    stretch,
    SECOND: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How often each value of a digit occurs in a chunk: the first digit, or the second."""
    ticket = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    total = tl.zeros([256], tl.int32)
    first = tl.full([], 0, tl.uint32)
    if SECOND:
        first = tl.load(prefix + ticket).to(tl.uint32)
    for block in range(chunk * stretch, (chunk + 1) * stretch):
        column = block * BLOCK + tl.arange(0, BLOCK)
        key = _keys(scores, mask, ticket, column, prunable, stride, MAGNITUDE)
        candidate = key != 0
        if SECOND:
            candidate = candidate & (key >> 24 == first)
            total += _histogram(key, candidate, 16)
        else:
            total += _histogram(key, candidate, 24)
    tl.store(counts + (ticket * chunks + chunk) * 256 + tl.arange(0, 256), total)


@jit_kernel(fp_fusion=True)
def _choose_kernel(
    counts, k, prefix, wanted, begin, chunks, SECOND: tl.constexpr, ROWS: tl.constexpr
):
    """A ticket's digit from the counts of its chunks; after the second, where each list begins."""
    ticket = tl.program_id(0).to(tl.int64)
    digits = tl.arange(0, 256)
    lane = tl.arange(0, ROWS)
    of_ticket = counts + ticket * chunks * 256
    total = tl.zeros([256], tl.int32)
    for first in range(0, chunks, ROWS):
        row = first + lane[:, None]
        total += tl.sum(tl.load(of_ticket + row * 256 + digits, mask=row < chunks, other=0), 0)
    if SECOND:
        digit, left = _choose(total, tl.load(wanted + ticket))
        above = tl.load(prefix + ticket).to(tl.uint32) << 8
        tl.store(prefix + ticket, (above | digit).to(tl.int32))
        before = tl.full([], 0, tl.int32)
        for first in range(0, chunks, ROWS):
            row = first + lane
            listed = tl.load(of_ticket + row * 256 + digit, mask=row < chunks, other=0)
            place = before + tl.cumsum(listed, 0) - listed
            tl.store(begin + ticket * (chunks + 1) + row, place, mask=row < chunks)
            before += tl.sum(listed, 0)
        tl.store(begin + ticket * (chunks + 1) + chunks, before)
    else:
        asked = tl.minimum(tl.load(k + ticket).to(tl.int32), tl.sum(total, 0))
        digit, left = _choose(total, asked)
        tl.store(prefix + ticket, digit.to(tl.int32))
    tl.store(wanted + ticket, left)


@jit_kernel(fp_fusion=True)
def _split_kernel(
    scores,
    mask,
    out,
    prefix,
    begin,
    undecided,
    prunable,
    stride,
    chunks,
    stretch,
    MAGNITUDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write what the first 16 bits decide, and list the positions they do not."""
    ticket = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    high = tl.load(prefix + ticket).to(tl.uint32)
    place = tl.load(begin + ticket * (chunks + 1) + chunk)
    for block in range(chunk * stretch, (chunk + 1) * stretch):
        column = block * BLOCK + tl.arange(0, BLOCK)
        key = _keys(scores, mask, ticket, column, prunable, stride, MAGNITUDE)
        kept = key >> 16 > high
        unsure = (key >> 16 == high) & (key != 0)
        decided = (column < prunable) & (unsure == 0)
        tl.store(out + ticket * prunable + column, kept, mask=decided)
        listed = unsure.to(tl.int32)
        position = place + tl.cumsum(listed, 0) - 1
        tl.store(undecided + ticket * prunable + position, column, mask=unsure)
        place += tl.sum(listed, 0)


@jit_kernel(fp_fusion=True)
def _finish_kernel(
    scores,
    out,
    prefix,
    wanted,
    begin,
    undecided,
    prunable,
    stride,
    chunks,
    MAGNITUDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Decide the listed: two more digits, then ties in order of position."""
    ticket = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    listed = undecided + ticket * prunable
    length = tl.load(begin + ticket * (chunks + 1) + chunks)
    left = tl.load(wanted + ticket)
    threshold = tl.load(prefix + ticket).to(tl.uint32) << 16
    for step in tl.static_range(2):
        shift = 8 - 8 * step
        counts = tl.zeros([256], tl.int32)
        for first in range(0, length, BLOCK):
            exists = first + lane < length
            column = tl.load(listed + first + lane, mask=exists, other=0)
            score = tl.load(scores + ticket * stride + column, mask=exists, other=0.0)
            key = _ordered(score, MAGNITUDE)
            candidate = exists & ((key ^ threshold) >> (shift + 8) == 0)
            counts += _histogram(key, candidate, shift)
        digit, left = _choose(counts, left)
        threshold = threshold | (digit << shift)

    seen = tl.full([], 0, tl.int32)
    for first in range(0, length, BLOCK):
        exists = first + lane < length
        column = tl.load(listed + first + lane, mask=exists, other=0)
        score = tl.load(scores + ticket * stride + column, mask=exists, other=0.0)
        key = _ordered(score, MAGNITUDE)
        tie = (exists & (key == threshold)).to(tl.int32)
        rank = seen + tl.cumsum(tie, 0)
        kept = exists & ((key > threshold) | ((tie == 1) & (rank <= left)))
        tl.store(out + ticket * prunable + column, kept, mask=exists)
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
    with torch.cuda.device_of(mask):
        if prunable > SHORT:
            _select_long(scores, mask, out, k, magnitude)
            return out
        launch = _launch(
            "short", _short_launches(triton.next_power_of_2(prunable)), mask, magnitude
        )
        _short_kernel[(tickets,)](
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


def _select_long(scores: Tensor, mask: Tensor, out: Tensor, k: Tensor, magnitude: bool) -> None:
    """Write the mask of every row to ``out``."""
    tickets, prunable = mask.shape
    stretches = triton.cdiv(prunable, CHUNK)
    length = triton.cdiv(stretches, MAX_CHUNKS) * CHUNK
    chunks = triton.cdiv(prunable, length)
    stride = scores.stride(0)
    count = _launch("count", COUNTS, mask, magnitude)
    split = _launch("split", SPLITS, mask, magnitude)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=mask.device)

    counts, begin = empty(tickets, chunks, 256), empty(tickets, chunks + 1)
    prefix, wanted, undecided = empty(tickets), empty(tickets), empty(tickets, prunable)
    for second in (False, True):
        _count_kernel[(tickets * chunks,)](
            scores,
            mask,
            prefix,
            counts,
            prunable,
            stride,
            chunks,
            length // count.block,
            SECOND=second,
            MAGNITUDE=magnitude,
            **count.constexprs,
            **count.options,
        )
        _choose_kernel[(tickets,)](
            counts, k, prefix, wanted, begin, chunks, SECOND=second, ROWS=CHOOSE_ROWS, num_warps=8
        )
    _split_kernel[(tickets * chunks,)](
        scores,
        mask,
        out,
        prefix,
        begin,
        undecided,
        prunable,
        stride,
        chunks,
        length // split.block,
        MAGNITUDE=magnitude,
        **split.constexprs,
        **split.options,
    )
    _finish_kernel[(tickets,)](
        scores,
        out,
        prefix,
        wanted,
        begin,
        undecided,
        prunable,
        stride,
        chunks,
        MAGNITUDE=magnitude,
        BLOCK=FINISH_BLOCK,
        num_warps=8,
    )


@cache
def _short_launches(length: int) -> tuple[Launch, ...]:
    """What a row of up to ``length``, a power of two, can be launched with, the default first."""
    block = max(length, 256)
    # Up to 16 entries a thread; in between, assemblers spill a little for more occupancy.
    default = Launch(block=block, warps=max(4, block // 512))
    return (default, Launch(block=block, warps=8)) if block == SHORT else (default,)


def _launch(kernel: str, among: Sequence[Launch], mask: Tensor, magnitude: bool) -> Launch:
    """What was measured on this device for rows of this length, or the first of these."""
    if len(among) == 1:
        return among[0]
    op, length = f"prune.{kernel}", mask.shape[1]
    return prefer(among[0], op, mask.device, among=among, length=length, magnitude=magnitude)


def _example(length: int, magnitude: bool) -> None:
    mask = meta(2, length, dtype=torch.bool)
    prune(meta(2, length), mask, meta(2, dtype=torch.int64), magnitude)


EXAMPLES = [
    Example(f"{length}{'_magnitude' * magnitude}", partial(_example, length, magnitude))
    for magnitude in (False, True)
    for length in (256, SHORT, 2 * CHUNK)
]
