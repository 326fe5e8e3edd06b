"""The minibatches of consecutive cloning updates in one Triton launch: drawn by Philox, gathered.

A program draws 128 samples of one update of one ticket, the very ones `random.integers` draws, and
copies their observations: per sample 4 I bytes read and as many written, and 8 of its row, through
which the loss reads the targets. The number of the first update lies on the device, so that a
captured CUDA graph counts on.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..examples import Example, meta
from ..jit import jit_kernel
from ..random import Stream
from ..random.gpu import philox

__all__ = ["EXAMPLES", "draw"]

_BLOCK = 32
"""Blocks of four words that a program draws."""
_MOST_COLUMNS = 16
"""Features copied at once; more would take the registers of many programs."""


@jit_kernel(
    fp_fusion=True,
    do_not_specialize=["samples", "datasets", "batch", "updates", "skipped", "inputs"],
)
def _draw_kernel(
    key_pointer,
    dataset,
    first_update,
    obs,
    row_pointer,
    minibatch,
    samples,
    datasets,
    batch,
    updates,
    skipped,
    inputs,
    STREAM: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``4 * BLOCK`` samples of update ``first_update + skipped + update``."""
    chunks = tl.cdiv(batch, 4 * BLOCK)
    chunk = tl.program_id(0) % chunks
    update = (tl.program_id(0) // chunks) % updates
    ticket = (tl.program_id(0) // chunks // updates).to(tl.int64)
    key = tl.load(key_pointer + ticket)
    step = tl.load(first_update) + skipped + update
    block = chunk * BLOCK + tl.arange(0, BLOCK)
    zero = tl.zeros([BLOCK], tl.uint32)
    w, x, y, z = philox(
        block.to(tl.uint32),
        zero + step.to(tl.uint32),
        zero + (step >> 32).to(tl.uint32),
        zero + STREAM,
        zero + key.to(tl.uint32),
        zero + (key >> 32).to(tl.uint32),
    )
    # (w, x, y, z) side by side: element 4 * block + word.
    words = tl.reshape(tl.join(tl.join(w, y), tl.join(x, z)), [4 * BLOCK])
    index = (words.to(tl.int64) * samples) >> 32

    which = tl.load(dataset + ticket)
    known = (which >= 0) & (which < datasets)
    row = which * samples + index
    sample = chunk * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    inside = sample < batch
    place = (ticket * updates + update) * batch + sample
    tl.store(row_pointer + place, tl.where(known, row, -1), mask=inside)
    readable = tl.where(known, inputs, 0)
    for begin in range(0, inputs, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        both = inside[:, None] & (column < inputs)[None, :]
        read = inside[:, None] & (column < readable)[None, :]
        source = obs + row[:, None] * inputs + column[None, :]
        values = tl.load(source, mask=read, other=float("nan"))
        tl.store(minibatch + place[:, None] * inputs + column[None, :], values, mask=both)


def draw(
    obs: Tensor,
    dataset: Tensor,
    key: Tensor,
    first_update: Tensor,
    skipped: int,
    updates: int,
    batch: int,
) -> tuple[Tensor, Tensor]:
    """The minibatches of updates ``first_update + skipped`` and the following.

    A ticket whose dataset is none of the D gets NaN, and -1 for rows: that is seen, where a check
    would wait for the device.

    Args:
        obs: ``[D, n, I]`` float32, contiguous.
        dataset: ``[P]`` int64, contiguous.
        key: ``[P]`` int64, contiguous.
        first_update: 0-dim int64.
        skipped: updates before the first of these.
        updates: U.
        batch: B, samples of an update.

    Returns:
        ``[P, U, B]`` int64, rows of ``obs.flatten(0, 1)``; and ``[P, U, B, I]``, their content.
    """
    tickets, (datasets, samples, inputs) = key.shape[0], obs.shape
    rows = key.new_empty(tickets, updates, batch)
    minibatches = obs.new_empty(tickets, updates, batch, inputs)
    if tickets:
        with torch.cuda.device_of(obs):
            _draw_kernel[(tickets * updates * triton.cdiv(batch, 4 * _BLOCK),)](
                key,
                dataset,
                first_update,
                obs,
                rows,
                minibatches,
                samples,
                datasets,
                batch,
                updates,
                skipped,
                inputs,
                STREAM=int(Stream.MINIBATCH),
                COLUMNS=min(_MOST_COLUMNS, triton.next_power_of_2(inputs)),
                BLOCK=_BLOCK,
            )
    return rows, minibatches


def _example(inputs: int) -> None:
    tickets = meta(2, dtype=torch.int64)
    draw(meta(3, 50, inputs), tickets, tickets, meta(dtype=torch.int64), 5, 4, 9)


EXAMPLES = [Example(f"{inputs}", partial(_example, inputs)) for inputs in (1, 4, 8, _MOST_COLUMNS)]
