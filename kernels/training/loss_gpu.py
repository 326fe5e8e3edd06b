"""A head's loss on outputs in memory, and its gradient by them, in one Triton pass.

One program per ticket and network walks its minibatch. Samples are read through the minibatch's
indices, so nothing but the observations has to be gathered. Sums run in a fixed order over one
ticket's samples alone. A NaN of a diverged ticket passes through.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..jit import jit_kernel
from ..launch import Launch
from ..tuning import prefer
from .head_gpu import (
    GPUHead,
    Minibatch,
    add_sums,
    load_log_std,
    no_sums,
    place_samples,
    store_sums,
)

_MOST_BLOCK, _MOST_ENTRIES = 256, 1024
"""Samples, and samples times actions, of one step: more would not fit the registers."""


class Outputs(NamedTuple):
    """What a loss reads, and where it writes the gradients by it.

    Attributes:
        values: ``[P, B, outputs]`` of each network, contiguous.
        log_std: ``[P, A]``, a view of the arena's rows, or None if actions are discrete.
        d_values: shaped like ``values``.
        d_log_std: shaped like ``log_std``, contiguous.
    """

    values: tuple[Tensor, ...]
    log_std: Tensor | None
    d_values: tuple[Tensor, ...]
    d_log_std: Tensor | None


@triton.jit
def _judge(
    outputs,
    log_std,
    d_outputs,
    d_log_std,
    minibatch,
    sums,
    data,
    numbers,
    NUMBER: tl.constexpr,
    OUTS: tl.constexpr,
    WIDES: tl.constexpr,
    MEASURED: tl.constexpr,
    PREPARE: tl.constexpr,
    LOSS: tl.constexpr,
    OPTIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`loss_kernel` for one of the networks."""
    OUT: tl.constexpr = OUTS[NUMBER]
    WIDE: tl.constexpr = WIDES[NUMBER]
    _, _, count = minibatch
    ticket = tl.program_id(0).to(tl.int64)
    a = tl.arange(0, WIDE)
    known, of_no_sample = PREPARE(NUMBER, data, numbers, minibatch, OPTIONS, BLOCK)
    spread = load_log_std(log_std, OUT, WIDE)
    by_log_std = tl.zeros([WIDE], tl.float32)
    totals = no_sums(len(MEASURED[NUMBER]), BLOCK)
    for begin in range(0, count, BLOCK):
        place = place_samples(minibatch, begin, BLOCK)
        row = ticket * count + begin + tl.arange(0, BLOCK)
        both = place[1][:, None] & (a < OUT)[None, :]
        entry = row[:, None] * OUT + a[None, :]
        output = tl.load(outputs[NUMBER] + entry, mask=both, other=0.0)  # [block, outputs]
        delta, slopes, measured = LOSS(
            NUMBER, output, spread, known, data, numbers, place, count, OPTIONS, OUT, WIDE
        )
        tl.store(d_outputs[NUMBER] + entry, delta, mask=both)
        by_log_std += slopes
        totals = add_sums(totals, measured)
    if log_std is not None:
        tl.store(d_log_std + a, by_log_std + of_no_sample, mask=a < OUT)
    store_sums(sums, totals, MEASURED, NUMBER)


@jit_kernel(fp_fusion=True)
def loss_kernel(
    outputs,  # of each network [P, count, OUT]
    log_std,  # [P, OUT], or None
    d_outputs,  # written: as outputs, log_std
    d_log_std,
    index,  # [P, index_row], of which the minibatch is a part
    sums,  # [P, statistics], written
    data,  # the head's, as `numbers`
    numbers,
    row,
    d_row,
    index_row,
    apart,
    first,
    count,
    statistics,
    OUTS: tl.constexpr,
    WIDES: tl.constexpr,
    MEASURED: tl.constexpr,
    PREPARE: tl.constexpr,
    LOSS: tl.constexpr,
    OPTIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """See `Minibatch` and `GPUHead`; the axes of the grid are ticket, and actor or critic.

    Rows of ``log_std`` lie ``row`` apart, those of its gradient ``d_row``.
    """
    ticket = tl.program_id(0).to(tl.int64)
    minibatch = (index + ticket * index_row + first, ticket * apart, count)
    sums += ticket * statistics
    if log_std is not None:
        log_std += ticket * row
        d_log_std += ticket * d_row
    # fmt: off
    if tl.program_id(1) == 0:
        _judge(outputs, log_std, d_outputs, d_log_std, minibatch, sums, data, numbers, 0, OUTS,
               WIDES, MEASURED, PREPARE, LOSS, OPTIONS, BLOCK)
    elif len(OUTS) > 1:
        _judge(outputs, None, d_outputs, None, minibatch, sums, data, numbers, 1, OUTS,
               WIDES, MEASURED, PREPARE, LOSS, OPTIONS, BLOCK)
    # fmt: on


def loss_and_gradient(head: GPUHead, minibatch: Minibatch, sums: Tensor, outputs: Outputs) -> None:
    """Write the gradients of a minibatch's loss by the networks' outputs, and its statistics.

    Args:
        head: of the loss.
        minibatch: the samples.
        sums: ``[P, statistics]`` float32, contiguous; written.
        outputs: of the networks on the samples.
    """
    values, log_std, d_values, d_log_std = outputs
    tickets, count, _ = values[0].shape
    if tickets == 0:
        return
    widths = [value.shape[2] for value in values]
    launch = _prefer_launch(head.name, values[0], continuous=log_std is not None)
    with torch.cuda.device_of(sums):
        loss_kernel[(tickets, len(values))](
            values,
            log_std,
            d_values,
            d_log_std,
            minibatch.index,
            sums,
            head.data,
            head.numbers,
            0 if log_std is None else log_std.stride(0),
            0 if d_log_std is None else d_log_std.stride(0),
            minibatch.index.shape[1],
            minibatch.apart,
            minibatch.first,
            count,
            head.statistics,
            OUTS=tuple(widths),
            WIDES=tuple(map(_padded, widths)),
            **head.constants,
            BLOCK=launch.block,
            **launch.options,
        )


def _launch(block: int, warps: int) -> Launch:
    """Left alone, the assembler spills a little for an occupancy of no use to one program."""
    return Launch(block=block, warps=warps, maxnreg=255)


@cache
def launches(count: int, width: int) -> tuple[Launch, ...]:
    """What a loss can be launched with, the default first.

    Args:
        count: samples of a minibatch, rounded up to a power of two.
        width: of a tile that holds the actor's outputs of a sample.
    """
    block = min(max(16, min(_MOST_BLOCK, _MOST_ENTRIES // width)), max(16, count))
    longer = (_launch(2 * block, 8),) if 2 * block <= count else ()
    return (_launch(block, 2), _launch(block, 4), _launch(block, 8), *longer)


def _prefer_launch(head: str, output: Tensor, *, continuous: bool) -> Launch:
    """The default for ``output [P, B, A]``, or what was measured for this head on its device."""
    _, count, actions = output.shape
    among = launches(triton.next_power_of_2(count), _padded(actions))
    return prefer(
        among[0],
        f"{head}.loss",
        output.device,
        among=among,
        samples=count,
        actions=_padded(actions),
        continuous=continuous,
    )


def _padded(outputs: int) -> int:
    """Width of a tile that holds the outputs of a sample: a power of two, at least two."""
    return triton.next_power_of_2(max(2, outputs))
