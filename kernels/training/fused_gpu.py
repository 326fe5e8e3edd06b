"""The gradient of a minibatch in one Triton launch, for networks that registers hold.

A loss splits by network: the policy's terms need the actor alone, the value's the critic alone. So
a program takes a stretch of the minibatch through one network, tile by tile: it reads the samples
through the minibatch's indices, keeps activations, outputs and the gradient of every weight in
registers, lets the head judge the outputs, and writes the gradients once, as one row of the arena
per stretch, which `update.gpu.adam_` adds in order. No atomics: a result depends neither on P nor
on timing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arena import Arena, Net
from ..examples import Example
from ..jit import jit_kernel
from ..launch import Launch
from ..mlp import fused_gpu as mlp
from ..mlp.fused_gpu import (
    add_gradients,
    hidden_layers,
    multiply,
    no_gradients,
    store_gradients,
)
from ..mlp.geometry import Geometry
from ..mlp.gpu import choose
from ..mlp.launches_gpu import FUSED_STRETCH, cut
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

NARROW = 32
"""Width up to which any network fits that goes back in one launch."""

MOST_LAYERS = 3
"""Of wider ones, and of what narrower ones may be tuned to: four spill on some GPU."""

_WALK = 512
"""Samples that a program reads at once of what the head asks of a whole minibatch."""

_STRETCHES = tuple(Launch(samples=samples) for samples in (FUSED_STRETCH, 32, 128, 256))
"""Samples whose gradient a program sums up, the default first."""


@triton.jit
def _load_rows(field, place, SIZE: tl.constexpr, BLOCK: tl.constexpr, KNOWN: tl.constexpr):
    """These samples of a field ``[., SIZE]``, zero where nothing is."""
    at, inside = place
    col = tl.arange(0, BLOCK)[None, :]
    there = inside[:, None] & (col < SIZE)
    where = field + at[:, None] * SIZE + col
    if KNOWN:
        values = tl.load(where, mask=there, other=0.0)
    else:
        exists = (at >= 0)[:, None]
        values = tl.load(where, mask=there & exists, other=0.0)
        # All of a sample that does not exist is NaN, and so is what any network makes of it.
        values = tl.where(exists, values, float("nan"))
    return values


@triton.jit
def _learn(
    tensors,
    data,
    numbers,
    spans,
    NUMBER: tl.constexpr,
    NET: tl.constexpr,
    LOG_STD: tl.constexpr,
    KNOWN: tl.constexpr,
    MEASURED: tl.constexpr,
    PREPARE: tl.constexpr,
    LOSS: tl.constexpr,
    OPTIONS: tl.constexpr,
    ROWS: tl.constexpr,
    WALK: tl.constexpr,
):
    """`gradient_kernel` for one of the networks."""
    weight, obs, index, rows, sums = tensors
    size, index_row, apart, first, count, stretch, statistics = spans
    SIZES: tl.constexpr = NET[0]
    BLOCKS: tl.constexpr = NET[1]
    DEPTH: tl.constexpr = len(SIZES) - 1
    OUT: tl.constexpr = SIZES[DEPTH]
    WIDE: tl.constexpr = BLOCKS[DEPTH]
    ticket = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    program = ticket * tl.num_programs(1) + split
    weight += ticket * size
    rows += program * size
    minibatch = (index + ticket * index_row + first, ticket * apart, count)

    known, of_no_sample = PREPARE(NUMBER, data, numbers, minibatch, OPTIONS, WALK)
    log_std = load_log_std(None if LOG_STD is None else weight + LOG_STD, OUT, WIDE)
    by_log_std = tl.zeros([WIDE], tl.float32)
    totals = no_sums(len(MEASURED[NUMBER]), ROWS)
    grads, bias_grads = no_gradients(ROWS, NET, False)

    begin = split * stretch
    for done in range(begin, tl.minimum(begin + stretch, count), ROWS):
        place = place_samples(minibatch, done, ROWS)
        tile = _load_rows(obs, place, SIZES[0], BLOCKS[0], KNOWN)  # [rows, inputs]
        inputs = hidden_layers(tile, weight, None, NET)
        output = multiply(inputs[DEPTH - 1], weight, None, DEPTH - 1, NET)
        delta, slopes, measured = LOSS(
            NUMBER, output, log_std, known, data, numbers, place, count, OPTIONS, OUT, WIDE
        )
        by_log_std += slopes
        totals = add_sums(totals, measured)
        grads, bias_grads = add_gradients(
            grads, bias_grads, delta, inputs, weight, None, NET, False
        )

    store_gradients(rows, None, grads, bias_grads, count, NET)
    if LOG_STD is not None:
        # What is no sample's, the first stretch has.
        by_log_std += tl.where(split == 0, of_no_sample, 0.0)
        entry = tl.arange(0, WIDE)
        tl.store(rows + LOG_STD + entry, by_log_std, mask=entry < OUT)
    store_sums(sums + program * statistics, totals, MEASURED, NUMBER)


@jit_kernel(fp_fusion=True)
def gradient_kernel(
    weight,  # [P, size]
    obs,  # [., inputs]
    index,  # [P, index_row], of which the minibatch is a part
    rows,  # [P, stretches, size], written
    sums,  # [P, stretches, statistics], written
    data,  # the head's, as `numbers`
    numbers,
    size,
    index_row,
    apart,
    first,
    count,
    stretch,
    statistics,
    ACTOR: tl.constexpr,
    CRITIC: tl.constexpr,
    LOG_STD: tl.constexpr,
    KNOWN: tl.constexpr,
    MEASURED: tl.constexpr,
    PREPARE: tl.constexpr,
    LOSS: tl.constexpr,
    OPTIONS: tl.constexpr,
    ROWS: tl.constexpr,
    WALK: tl.constexpr,
):
    """Gradient of a ticket's network over ``stretch`` samples of the minibatch, and what they sum.

    See `Minibatch` and `GPUHead`; the axes of the grid are ticket, stretch, and actor or critic. A
    ticket takes 6·count·(weights) FLOPs, less 2 for the first layers, whose input needs no
    gradient. Each stretch reads the weights once, and writes its row of gradients; the samples are
    read once, beside what the head reads of a whole minibatch.
    ``ACTOR`` and ``CRITIC``, or None, are networks as `mlp.fused_gpu` takes them.
    """
    of = (weight, obs, index, rows, sums)
    spans = (size, index_row, apart, first, count, stretch, statistics)
    # Not in a tuple: the names of functions in one are all that Triton's cache would know of them.
    # fmt: off
    if tl.program_id(2) == 0:
        _learn(of, data, numbers, spans, 0, ACTOR, LOG_STD, KNOWN, MEASURED, PREPARE, LOSS, OPTIONS,
               ROWS, WALK)
    elif CRITIC is not None:
        _learn(of, data, numbers, spans, 1, CRITIC, None, KNOWN, MEASURED, PREPARE, LOSS, OPTIONS,
               ROWS, WALK)
    # fmt: on


def fits(nets: Sequence[Net]) -> bool:
    """Whether registers hold these networks' gradients beside their loss, on every GPU.

    A fixed function of their shapes.
    """
    return all(
        choose(net, "ieee").backward == "fused"
        and (max(net.sizes) <= NARROW or net.depth <= MOST_LAYERS)
        for net in nets
    )


def gradient(
    weight: Tensor,
    arena: Arena,
    nets: tuple[Net, ...],
    obs: Tensor,
    head: GPUHead,
    minibatch: Minibatch,
    sums: Tensor,
    stretch: int,
) -> Tensor:
    """Of a minibatch's loss for every parameter of `nets`, ``[P, stretches, size]``.

    Args:
        weight: ``[P, size]`` float32, zero off the mask; contiguous, as all tensors here.
        arena: its layout.
        nets: those that take part, the actor first; they `fits`.
        obs: ``[..., inputs]`` float32, of which the samples are rows.
        head: of the loss.
        minibatch: the samples.
        sums: ``[P, stretches, statistics]`` float32, written.
        stretch: samples of all stretches but the last; see `cut_minibatch`.
    """
    tickets, splits, statistics = sums.shape
    size = weight.shape[1]
    rows = weight.new_empty(tickets, splits, size)
    actor, critic = _networks(nets)
    launch = _prefer_launch(arena, nets, head, obs.device, minibatch.count)
    with torch.cuda.device_of(weight):
        gradient_kernel[(tickets, splits, len(nets))](
            weight,
            obs,
            minibatch.index,
            rows,
            sums,
            head.data,
            head.numbers,
            size,
            minibatch.index.shape[1],
            minibatch.apart,
            minibatch.first,
            minibatch.count,
            stretch,
            statistics,
            ACTOR=actor,
            CRITIC=critic,
            LOG_STD=arena.log_std,
            KNOWN=minibatch.apart > 0,
            **head.constants,
            WALK=_WALK,
            **launch.constexprs,
            **launch.options,
        )
    return rows


def cut_minibatch(
    nets: tuple[Net, ...], head: str, device: torch.device, count: int
) -> tuple[int, int]:
    """How many stretches ``count`` samples make, and the length of all but the last.

    By the shapes of one ticket, or as was measured for them.
    """
    chosen = prefer(
        _STRETCHES[0],
        f"{head}.stretch",
        device,
        among=_STRETCHES,
        layers=_label(nets),
        samples=count,
    )
    return cut(count, chosen.samples)


def _prefer_launch(
    arena: Arena, nets: tuple[Net, ...], head: GPUHead, device: torch.device, count: int
) -> Launch:
    among = _launches(nets)
    if len(among) == 1:
        return among[0]
    return prefer(
        among[0],
        f"{head.name}.gradient",
        device,
        among=among,
        layers=_label(nets),
        kind=arena.actor.activation,
        continuous=arena.log_std is not None,
        samples=count,
    )


@cache
def _launches(nets: tuple[Net, ...]) -> tuple[Launch, ...]:
    """What registers hold on every GPU: the default, and others for few layers with tanh."""
    blocks = (block for net in nets for block in Geometry.of(net, 0).blocks)
    launches = mlp.launches(tuple(blocks))
    few = all(net.depth <= MOST_LAYERS for net in nets)
    return launches if few and nets[0].activation == "tanh" else launches[:1]


@cache
def _networks(nets: tuple[Net, ...]) -> list[tuple[Any, ...] | None]:
    """The actor, and the critic or None, as the kernel takes them: zero off the mask already."""
    return [*(Geometry.of(net, 0).network for net in nets), None][:2]


def _label(nets: tuple[Net, ...]) -> str:
    """Of all networks, as `kernels.tuning` names them."""
    return "+".join(Geometry.of(net, 0).label for net in nets)


def examples(
    run: Callable[[tuple[int, ...], str, str], None], kinds: tuple[str, str]
) -> list[Example]:
    """Of networks like those that came closest to spilling.

    Args:
        run: ``run(sizes, activation, kind)`` launches a head's gradient.
        kinds: two kinds of it, for small networks and for large ones.
    """
    small, large = kinds
    return [
        Example(
            f"{'_'.join(map(str, sizes))}_{activation}_{kind}",
            partial(run, sizes, activation, kind),
        )
        for sizes, activation, kind in (
            ((4, 64, 64, 2), "tanh", small),
            ((17, 64, 64, 6), "tanh", large),
            ((4, 64, 64, 2), "relu", small),
            ((17, 64, 64, 6), "relu", large),
            ((64, 64, 64, 64), "tanh", small),
            ((64, 64, 64, 64), "relu", large),
            ((33, 61, 47, 20), "tanh", large),
            ((33, 61, 47, 20), "relu", small),
            ((64, 64, 64, 64), "elu", large),
            ((33, 61, 47, 20), "elu", small),
            ((4, 32, 32, 2), "relu", small),
            ((4, 32, 32, 2), "tanh", small),
            ((32, 32, 32, 32, 32), "tanh", large),
            ((32, 32, 32, 32, 32), "relu", large),
            ((32, 32, 32, 32, 32), "relu", small),
        )
    ]
