"""A network in Triton, layer after layer through memory: for what registers cannot hold.

Forward, and down through the deltas (the gradients before each activation), one program takes some
rows of one ticket through every layer; what it writes it reads again at once, from L1 or L2.
The weights' gradients are one launch for all layers, a program per tile of a layer and stretch of
the samples; `add_kernel` adds stretches in order. No atomics: a result depends neither on P nor on
timing. ``deltas`` is ``[P, B, HIDDEN]``, all hidden units, layer by layer in a row; ``hidden`` is
``[P, B, KEPT]``: the units' outputs and, where an activation's derivative is read off its input,
the sums that went in, written once and read once; to compute them again would be a pass forward.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import triton
import triton.language as tl

from ..activations_gpu import activate, deactivate
from ..jit import jit_kernel
from ..launch import Launch
from .geometry import Geometry

ADD_BLOCK = 512
"""Entries of a row per program of `add_kernel`."""


@triton.jit
def _product(
    a,  # [rows, DEPTH], of one ticket
    a_row,
    b,  # [DEPTH, cols], of one ticket
    b_inner,
    b_col,
    mask,
    row,
    left,
    col,
    cols,
    DEPTH: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``[ROWS, COLS]`` of ``a b``; rows of a are contiguous, b and its mask are strided alike."""
    inner = tl.arange(0, STEP)  # [step]
    total = tl.zeros((ROWS, COLS), dtype=tl.float32)  # [rows, cols]
    for begin in range(0, DEPTH, STEP):
        step = begin + inner
        a_values = tl.load(
            a + row * a_row + step[None, :], mask=(row < left) & (step[None, :] < DEPTH), other=0.0
        )
        inside = (step[:, None] < DEPTH) & (col < cols)
        entry = step[:, None] * b_inner + col * b_col  # [step, cols]
        b_values = tl.load(b + entry, mask=inside, other=0.0)
        if MASKED:
            keep = tl.load(mask + entry, mask=inside, other=0) != 0
            b_values = tl.where(keep, b_values, 0.0)
        total = tl.dot(a_values, b_values, total, input_precision=PRECISION)
    return total


@jit_kernel(fp_fusion=True)
def forward_kernel(
    x,  # [P, samples, inputs]
    weight,  # [P, size]
    mask,  # [P, prunable], or None
    y,  # [P, samples, outputs], written
    hidden,  # [P, samples, KEPT], written
    samples,
    x_ticket,
    x_row,
    weight_ticket,
    mask_ticket,
    SIZES: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BIASES: tl.constexpr,
    MASKED: tl.constexpr,
    HIDDEN: tl.constexpr,
    KEPT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    SIDES: tl.constexpr,
    STEP: tl.constexpr,
):
    """``y[p] = network(x[p])`` and its hidden activations.

    A ticket takes 2·samples·(weights) FLOPs; it moves x once, activations twice, y once, and its
    weights and their mask once per tile of rows, from L2 after the first.
    """
    DEPTH: tl.constexpr = len(SIZES) - 1
    tiles = tl.cdiv(samples, ROWS)
    program = tl.program_id(0)
    ticket = (program // tiles).to(tl.int64)
    first = program % tiles * ROWS
    left = samples - first
    row = tl.arange(0, ROWS)[:, None]  # [rows, 1]
    weight += ticket * weight_ticket
    mask_row = weight if mask is None else mask + ticket * mask_ticket
    source = x + ticket * x_ticket + first.to(tl.int64) * x_row
    source_row = x_row
    hidden += (ticket * samples + first) * KEPT
    y += (ticket * samples + first) * SIZES[DEPTH]

    for layer in tl.static_range(DEPTH):
        for begin in range(0, SIZES[layer + 1], SIDES[layer + 1]):
            col = begin + tl.arange(0, SIDES[layer + 1])[None, :]  # [1, units]
            total = _product(
                source,
                source_row,
                weight + WEIGHTS[layer],
                1,
                SIZES[layer],
                mask_row + WEIGHTS[layer],
                row,
                left,
                col,
                SIZES[layer + 1],
                SIZES[layer],
                MASKED[layer],
                ROWS,
                SIDES[layer + 1],
                STEP,
                PRECISION,
            )
            inside = (row < left) & (col < SIZES[layer + 1])
            total += tl.load(weight + BIASES[layer] + col, mask=col < SIZES[layer + 1], other=0.0)
            if layer < DEPTH - 1:
                entry = row * KEPT + col
                tl.store(hidden + entry, activate(total, ACTIVATION), mask=inside)
                if KEPT > HIDDEN:
                    tl.store(hidden + HIDDEN + entry, total, mask=inside)
            else:
                tl.store(y + row * SIZES[DEPTH] + col, total, mask=inside)
        # Other threads of the program read what these wrote.
        tl.debug_barrier()
        source = hidden
        source_row = KEPT
        hidden += SIZES[layer + 1]


@jit_kernel(fp_fusion=True)
def delta_kernel(
    dy,  # [P, samples, outputs]
    weight,  # [P, size]
    mask,  # [P, prunable], or None
    hidden,  # [P, samples, KEPT]
    deltas,  # [P, samples, HIDDEN], written
    dx,  # [P, samples, inputs], written, or None
    samples,
    dy_ticket,
    dy_row,
    weight_ticket,
    mask_ticket,
    SIZES: tl.constexpr,
    WEIGHTS: tl.constexpr,
    MASKED: tl.constexpr,
    HIDDEN: tl.constexpr,
    KEPT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    SIDES: tl.constexpr,
    STEP: tl.constexpr,
):
    """Gradients of every hidden layer before its activation, and of the input unless dx is None.

    A ticket takes 2·samples·(weights) FLOPs, the first layer's only for dx; it moves dy and
    activations once, deltas twice, and its weights and their mask once per tile of rows.
    """
    DEPTH: tl.constexpr = len(SIZES) - 1
    tiles = tl.cdiv(samples, ROWS)
    program = tl.program_id(0)
    ticket = (program // tiles).to(tl.int64)
    first = program % tiles * ROWS
    left = samples - first
    row = tl.arange(0, ROWS)[:, None]  # [rows, 1]
    weight += ticket * weight_ticket
    mask_row = weight if mask is None else mask + ticket * mask_ticket
    source = dy + ticket * dy_ticket + first.to(tl.int64) * dy_row
    source_row = dy_row
    # Past the end of the row's last layer; each layer steps back by its own size.
    place = (ticket * samples + first) * HIDDEN + HIDDEN
    known = hidden + (ticket * samples + first) * KEPT + KEPT

    for layer in tl.static_range(DEPTH - 1, -1, -1):
        if layer > 0 or dx is not None:
            place -= SIZES[layer]
            known -= SIZES[layer]
            for begin in range(0, SIZES[layer], SIDES[layer]):
                col = begin + tl.arange(0, SIDES[layer])[None, :]  # [1, units]
                total = _product(
                    source,
                    source_row,
                    weight + WEIGHTS[layer],
                    SIZES[layer],
                    1,
                    mask_row + WEIGHTS[layer],
                    row,
                    left,
                    col,
                    SIZES[layer],
                    SIZES[layer + 1],
                    MASKED[layer],
                    ROWS,
                    SIDES[layer],
                    STEP,
                    PRECISION,
                )
                inside = (row < left) & (col < SIZES[layer])
                if layer > 0:
                    here = tl.load(known + row * KEPT + col, mask=inside, other=0.0)
                    delta = deactivate(total, here, ACTIVATION)  # [rows, units]
                    tl.store(deltas + place + row * HIDDEN + col, delta, mask=inside)
                else:
                    target = dx + (ticket * samples + first) * SIZES[0]
                    tl.store(target + row * SIZES[0] + col, total, mask=inside)
            # Other threads of the program read what these wrote.
            tl.debug_barrier()
            source = deltas + place
            source_row = HIDDEN


@triton.jit
def _gradient_tile(
    delta,  # [samples, OUT], of one ticket, as all pointers
    delta_row,
    source,  # [samples, INP]
    source_row,
    mask,  # [OUT, INP]
    grad,  # [OUT, INP], written
    bias_grad,  # [OUT], written
    begin,
    end,
    tile,
    OUT: tl.constexpr,
    INP: tl.constexpr,
    MASKED: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_INP: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of ``deltaᵀ source`` over samples ``[begin, end)``; the first ones sum the bias."""
    tiles_inp: tl.constexpr = (INP + TILE_INP - 1) // TILE_INP
    row = tile // tiles_inp * TILE_OUT + tl.arange(0, TILE_OUT)[:, None]  # [out, 1]
    col = tile % tiles_inp * TILE_INP + tl.arange(0, TILE_INP)[None, :]  # [1, inp]
    step = tl.arange(0, STEP)
    delta += begin.to(tl.int64) * delta_row
    source += begin.to(tl.int64) * source_row
    total = tl.zeros((TILE_OUT, TILE_INP), dtype=tl.float32)  # [out, inp]
    sums = tl.zeros((TILE_OUT, STEP), dtype=tl.float32)  # [out, step]
    for done in range(begin, end, STEP):
        left = end - done
        d = tl.load(
            delta + step[None, :] * delta_row + row,
            mask=(step[None, :] < left) & (row < OUT),
            other=0.0,
        )
        s = tl.load(
            source + step[:, None] * source_row + col,
            mask=(step[:, None] < left) & (col < INP),
            other=0.0,
        )
        total = tl.dot(d, s, total, input_precision=PRECISION)  # [out, step] [step, inp]
        sums += d
        delta += STEP * delta_row
        source += STEP * source_row
    inside = (row < OUT) & (col < INP)
    entry = row * INP + col
    if MASKED:
        total = tl.where(tl.load(mask + entry, mask=inside, other=0) != 0, total, 0.0)
    tl.store(grad + entry, total, mask=inside)
    if tile % tiles_inp == 0:
        out = tile // tiles_inp * TILE_OUT + tl.arange(0, TILE_OUT)
        tl.store(bias_grad + out, tl.sum(sums, 1), mask=out < OUT)


@jit_kernel(fp_fusion=True)
def gradient_kernel(
    dy,  # [P, samples, outputs]
    x,  # [P, samples, inputs]
    hidden,  # [P, samples, KEPT]
    deltas,  # [P, samples, HIDDEN]
    mask,  # [P, prunable], or None
    target,  # [P * stretches, size], written
    samples,
    stretch,
    dy_ticket,
    dy_row,
    x_ticket,
    x_row,
    mask_ticket,
    target_row,
    SIZES: tl.constexpr,
    SIDES: tl.constexpr,
    COUNTS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BIASES: tl.constexpr,
    MASKED: tl.constexpr,
    HIDDEN: tl.constexpr,
    KEPT: tl.constexpr,
    PRECISION: tl.constexpr,
    STEP: tl.constexpr,
):
    """One tile of one layer's gradient over ``stretch`` samples, in a row of `target`.

    Row ``ticket * stretches + split`` is laid out like one of the weights; entries of other
    networks are left alone. A ticket takes 2·samples·(weights) FLOPs; a layer's deltas are read
    once per tile of its inputs, its inputs once per tile of its outputs.
    """
    DEPTH: tl.constexpr = len(SIZES) - 1
    split = tl.program_id(1)
    tiles = 0
    for layer in tl.static_range(DEPTH):
        tiles += COUNTS[layer]
    program = tl.program_id(0)
    ticket = (program // tiles).to(tl.int64)
    tile = program % tiles
    begin = split * stretch
    end = tl.minimum(begin + stretch, samples)
    mask_row = target if mask is None else mask + ticket * mask_ticket
    place = ticket * tl.num_programs(1) + split
    target += place * target_row
    delta = deltas + ticket * samples * HIDDEN
    source = x + ticket * x_ticket
    source_row = x_row
    for layer in tl.static_range(DEPTH):
        if layer == DEPTH - 1:
            delta = dy + ticket * dy_ticket
        if (tile >= 0) & (tile < COUNTS[layer]):
            _gradient_tile(
                delta,
                dy_row if layer == DEPTH - 1 else HIDDEN,
                source,
                source_row,
                mask_row + WEIGHTS[layer],
                target + WEIGHTS[layer],
                target + BIASES[layer],
                begin,
                end,
                tile,
                SIZES[layer + 1],
                SIZES[layer],
                MASKED[layer],
                SIDES[layer + 1],
                SIDES[layer],
                STEP,
                PRECISION,
            )
        tile -= COUNTS[layer]
        delta += SIZES[layer + 1]
        if layer == 0:
            source = hidden + ticket * samples * KEPT
            source_row = KEPT
        else:
            source += SIZES[layer]


@jit_kernel(fp_fusion=True)
def add_kernel(
    partial,  # [P, splits, size]
    target,  # [P, size], written
    splits,
    size,
    target_row,
    SIZES: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BIASES: tl.constexpr,
    CLEAR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the stretches' rows in order; with `CLEAR`, entries of other networks become zero.

    Reads 4·splits and writes 4 bytes an entry: bound by memory, in L2 if it fits there.
    """
    ticket = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    owned = column < 0
    for layer in tl.static_range(len(SIZES) - 1):
        matrix = column - WEIGHTS[layer]
        bias = column - BIASES[layer]
        owned = owned | ((matrix >= 0) & (matrix < SIZES[layer + 1] * SIZES[layer]))
        owned = owned | ((bias >= 0) & (bias < SIZES[layer + 1]))
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    partial += ticket * splits * size + column
    for _ in range(splits):
        total += tl.load(partial, mask=owned, other=0.0)
        partial += size
    written = column < size if CLEAR else owned
    tl.store(target + ticket * target_row + column, total, mask=written)


def walk_constants(launch: Launch, geometry: Geometry, precision: str) -> dict[str, Any]:
    """How `forward_kernel` and `delta_kernel` cut samples and layers: sides of tiles by size."""
    sides = _sides(geometry, launch.cols)
    return {"ROWS": launch.rows, "SIDES": sides, "STEP": _step(precision)}


def gradient_constants(launch: Launch, geometry: Geometry, precision: str) -> dict[str, Any]:
    """How `gradient_kernel` cuts layers: sides of tiles by size, tiles of each, samples a step."""
    sides = _sides(geometry, launch.tile)
    across = [-(-size // side) for size, side in zip(geometry.sizes, sides, strict=True)]
    counts = tuple(inp * out for inp, out in pairwise(across))
    return {"SIDES": sides, "COUNTS": counts, "STEP": _step(precision)}


def _sides(geometry: Geometry, largest: int) -> tuple[int, ...]:
    """Side of the tiles that each size is cut into."""
    return tuple(min(largest, block) for block in geometry.blocks)


def _step(precision: str) -> int:
    """Depth as in the linear layer's products: IEEE dots and tf32x3 keep operands in registers."""
    return 32 if precision == "tf32" else 16


# Left alone, the assembler spills a little here and there for an occupancy of no use.
WALKS = tuple(
    Launch(rows=rows, cols=cols, warps=warps, stages=3, maxnreg=255)
    for rows, cols, warps in ((32, 64, 4), (16, 64, 4), (32, 64, 8), (32, 32, 4))
)
"""What a walk can be launched with, the default first: what spills on no GPU."""

GRADIENTS = tuple(
    Launch(tile=tile, warps=warps, stages=stages, maxnreg=168)
    for tile, warps, stages in ((64, 4, 3), (32, 4, 3), (64, 8, 3), (64, 4, 4))
)
"""The same of `gradient_kernel`."""
