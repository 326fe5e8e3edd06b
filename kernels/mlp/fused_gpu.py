"""A network forward and backward in Triton with activations and weight gradients in registers.

For networks up to 64 wide. Forward, a program takes some rows of one ticket through all layers.
Backward, it takes a stretch of the rows tile by tile, recomputes their activations, and sums the
gradient of every weight in its registers; it writes these once, one row of the arena per stretch,
which `split_gpu` adds in order. No atomics: a result depends neither on P nor on timing.

What a kernel knows of a network is one constant, ``NET``: sizes, the blocks that hold them, offsets
of weights and of biases in a row, what is masked, and the activation; see `Geometry.network`.

Dots on CUDA cores only: a tensor-core dot keeps its operands' fragments, and sm_80 spills.
"""

from __future__ import annotations

from functools import cache

import triton
import triton.language as tl

from ..activations_gpu import activate, deactivate
from ..jit import jit_kernel
from ..launch import Launch


@triton.jit
def zeros(ROWS: tl.constexpr, COLS: tl.constexpr):
    return tl.zeros((ROWS, COLS), dtype=tl.float32)


@triton.jit
def _load_rows(source, stride, left, SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """``[ROWS, BLOCK]`` of which ``[left, SIZE]`` exists and the rest is zero."""
    row = tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    return tl.load(source + row * stride + col, mask=(row < left) & (col < SIZE), other=0.0)


@triton.jit
def load_weight(weight, mask, layer: tl.constexpr, NET: tl.constexpr):
    """A layer in whole blocks ``[out, inp]``, zero off the mask and beyond its size."""
    SIZES: tl.constexpr = NET[0]
    BLOCKS: tl.constexpr = NET[1]
    row = tl.arange(0, BLOCKS[layer + 1])[:, None]  # [out, 1]
    col = tl.arange(0, BLOCKS[layer])[None, :]
    inside = (row < SIZES[layer + 1]) & (col < SIZES[layer])
    entry = NET[2][layer] + row * SIZES[layer] + col
    values = tl.load(weight + entry, mask=inside, other=0.0)  # [out, inp]
    if NET[4][layer]:
        values = tl.where(tl.load(mask + entry, mask=inside, other=0) != 0, values, 0.0)
    return values


@triton.jit
def multiply(inputs, weight, mask, layer: tl.constexpr, NET: tl.constexpr):
    """What a layer makes of a tile of rows before its activation, ``[rows, out]``."""
    matrix = load_weight(weight, mask, layer, NET)
    col = tl.arange(0, NET[1][layer + 1])
    bias = tl.load(weight + NET[3][layer] + col, mask=col < NET[0][layer + 1], other=0.0)
    return tl.dot(inputs, tl.trans(matrix), input_precision="ieee") + bias[None, :]


@triton.jit
def hidden_layers(x, weight, mask, NET: tl.constexpr, APART: tl.constexpr = False):
    """The input of every layer for a tile of rows: `x` and the hidden activations.

    ``APART`` keeps the compiler from loading a layer's weights before it is done with the last.
    """
    ACTIVATION: tl.constexpr = NET[5]
    inputs = (x,)
    for layer in tl.static_range(len(NET[0]) - 2):
        if APART and layer > 0:
            tl.debug_barrier()
        total = multiply(inputs[layer], weight, mask, layer, NET)
        inputs += (activate(total, ACTIVATION),)  # [rows, units]
    return inputs


@jit_kernel(fp_fusion=True)
def forward_kernel(
    x,  # [P, samples, inputs]
    weight,  # [P, size]
    mask,  # [P, prunable], or None
    y,  # [P, samples, outputs], written
    samples,
    x_ticket,
    x_row,
    weight_ticket,
    mask_ticket,
    NET: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``y[p] = network(x[p])``; y is contiguous, a row of x and of the arena too.

    A ticket takes 2·samples·(weights) FLOPs, and moves x and y once; its weights and their mask
    once per tile of rows, from L2 after the first.
    """
    SIZES: tl.constexpr = NET[0]
    BLOCKS: tl.constexpr = NET[1]
    DEPTH: tl.constexpr = len(SIZES) - 1
    DEEP: tl.constexpr = DEPTH > 3
    tiles = tl.cdiv(samples, ROWS)
    program = tl.program_id(0)
    ticket = (program // tiles).to(tl.int64)
    begin = program % tiles * ROWS
    left = samples - begin
    weight += ticket * weight_ticket
    if mask is not None:
        mask += ticket * mask_ticket
    x += ticket * x_ticket + begin.to(tl.int64) * x_row
    y += (ticket * samples + begin) * SIZES[DEPTH]

    tile = _load_rows(x, x_row, left, SIZES[0], BLOCKS[0], ROWS)  # [rows, inputs]
    inputs = hidden_layers(tile, weight, mask, NET, DEEP)
    if DEEP:
        # Else the compiler loads the last layer early, and spills.
        tl.debug_barrier()
    total = multiply(inputs[DEPTH - 1], weight, mask, DEPTH - 1, NET)
    row = tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCKS[DEPTH])[None, :]
    tl.store(y + row * SIZES[DEPTH] + col, total, mask=(row < left) & (col < SIZES[DEPTH]))


@triton.jit
def no_gradients(ROWS: tl.constexpr, NET: tl.constexpr, DEEP: tl.constexpr):
    """Sums of a network's gradients, from the output down, the order in which a tile adds to them.

    The bias's has a row for each of the tile's, added up once at the end: a sum per tile would be
    one more barrier. ``DEEP`` networks are short of registers: it has a row for two of which one
    thread has both.
    """
    BLOCKS: tl.constexpr = NET[1]
    DEPTH: tl.constexpr = len(BLOCKS) - 1
    grads = ()
    bias_grads = ()
    for layer in tl.static_range(DEPTH - 1, -1, -1):
        grads += (zeros(BLOCKS[layer + 1], BLOCKS[layer]),)  # [out, inp]
        if DEEP and layer < DEPTH - 1 and BLOCKS[layer + 1] == 64:
            bias_grads += (zeros(ROWS // 2, BLOCKS[layer + 1]),)
        else:
            bias_grads += (zeros(ROWS, BLOCKS[layer + 1]),)
    return grads, bias_grads


@triton.jit
def add_gradients(
    grads, bias_grads, delta, inputs, weight, mask, NET: tl.constexpr, DEEP: tl.constexpr
):
    """Both sums with a tile's gradients, from the output's ``delta [rows, out]`` down.

    ``DEEP`` makes all deltas before all gradients: between two deltas, the compiler fills registers
    with operands of a gradient, and with four layers it spills others for them.
    """
    ACTIVATION: tl.constexpr = NET[5]
    DEPTH: tl.constexpr = len(NET[0]) - 1
    deltas = (delta,)
    new_grads = ()
    new_bias_grads = ()
    for layer in tl.static_range(DEPTH - 1, -1, -1):
        delta = deltas[DEPTH - 1 - layer]  # [rows, out]
        new_bias_grads += (_add_rows(bias_grads[DEPTH - 1 - layer], delta),)
        if not DEEP:
            new_grads += (_add_product(grads[DEPTH - 1 - layer], delta, inputs[layer]),)
        if layer > 0:
            matrix = load_weight(weight, mask, layer, NET)
            delta = tl.dot(delta, matrix, input_precision="ieee")  # [rows, inp]
            deltas += (deactivate(delta, inputs[layer], ACTIVATION),)
    if DEEP:
        for layer in tl.static_range(DEPTH - 1, -1, -1):
            delta = deltas[DEPTH - 1 - layer]
            new_grads += (_add_product(grads[DEPTH - 1 - layer], delta, inputs[layer]),)
    return new_grads, new_bias_grads


@triton.jit
def _add_product(grad, delta, inputs):
    """A tile's gradient of a weight matrix ``[out, inp]``, added up."""
    return tl.dot(tl.trans(delta), inputs, grad, input_precision="ieee")


@triton.jit
def _add_rows(total, delta):
    """Add the rows of ``delta`` to those of ``total``, by twos if there are half as many."""
    if total.shape[0] < delta.shape[0]:
        delta = tl.sum(tl.reshape(delta, [total.shape[0], 2, total.shape[1]]), 1)
    return total + delta


@triton.jit
def store_gradients(target, mask, grads, bias_grads, samples, NET: tl.constexpr):
    """Into a row of the arena: both kinds from the output down, with a bias's rows still apart."""
    SIZES: tl.constexpr = NET[0]
    BLOCKS: tl.constexpr = NET[1]
    DEPTH: tl.constexpr = len(SIZES) - 1
    for layer in tl.static_range(DEPTH):
        row = tl.arange(0, BLOCKS[layer + 1])
        grad = grads[DEPTH - 1 - layer]
        bias_grad = tl.sum(bias_grads[DEPTH - 1 - layer], 0)  # [out]
        # Plus 0, as the compiler cannot know: else registers keep through the loop what the
        # loads of the weights found of their entries.
        row += (samples < 0).to(tl.int32)
        col = tl.arange(0, BLOCKS[layer])[None, :]  # [1, inp]
        inside = (row[:, None] < SIZES[layer + 1]) & (col < SIZES[layer])
        entry = NET[2][layer] + row[:, None] * SIZES[layer] + col
        if NET[4][layer]:
            grad = tl.where(tl.load(mask + entry, mask=inside, other=0) != 0, grad, 0.0)
        tl.store(target + entry, grad, mask=inside)
        tl.store(target + NET[3][layer] + row, bias_grad, mask=row < SIZES[layer + 1])


@jit_kernel(fp_fusion=True)
def backward_kernel(
    dy,  # [P, samples, outputs]
    x,  # [P, samples, inputs]
    weight,  # [P, size]
    mask,  # [P, prunable], or None
    target,  # [P * stretches, size], written
    samples,
    stretch,
    dy_ticket,
    dy_row,
    x_ticket,
    x_row,
    weight_ticket,
    mask_ticket,
    target_row,
    NET: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Gradient of a ticket's parameters over ``stretch`` of its samples, as a row of `target`.

    Row ``ticket * stretches + split`` is laid out like one of `weight`; entries of other networks
    are left alone. A ticket takes 6·samples·(weights) FLOPs less 2 for the last layer, which is
    not recomputed, and the first, whose input needs no gradient; it moves x and dy once, weights
    once and masks twice per stretch, and writes its gradient once per stretch.
    """
    SIZES: tl.constexpr = NET[0]
    BLOCKS: tl.constexpr = NET[1]
    DEPTH: tl.constexpr = len(SIZES) - 1
    DEEP: tl.constexpr = DEPTH > 3
    ticket = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    weight += ticket * weight_ticket
    if mask is not None:
        mask += ticket * mask_ticket
    begin = split * stretch
    x += ticket * x_ticket + begin.to(tl.int64) * x_row
    dy += ticket * dy_ticket + begin.to(tl.int64) * dy_row
    place = ticket * tl.num_programs(1) + split

    grads, bias_grads = no_gradients(ROWS, NET, DEEP)
    for done in range(begin, tl.minimum(begin + stretch, samples), ROWS):
        left = samples - done
        tile = _load_rows(x, x_row, left, SIZES[0], BLOCKS[0], ROWS)  # [rows, inputs]
        inputs = hidden_layers(tile, weight, mask, NET)
        delta = _load_rows(dy, dy_row, left, SIZES[DEPTH], BLOCKS[DEPTH], ROWS)  # [rows, out]
        grads, bias_grads = add_gradients(grads, bias_grads, delta, inputs, weight, mask, NET, DEEP)
        x += ROWS * x_row
        dy += ROWS * dy_row

    target += place * target_row
    store_gradients(target, mask, grads, bias_grads, samples, NET)


def _launch(rows: int, warps: int) -> Launch:
    """One stage: to prefetch weights that every tile reads again would cost shared memory."""
    return Launch(rows=rows, warps=warps, stages=1, maxnreg=255)


_DEFAULT = _launch(16, 8)
"""With 64 columns 16 rows are all that dots on CUDA cores can take unspilled."""

_NARROW = 32


@cache
def launches(blocks: tuple[int, ...]) -> tuple[Launch, ...]:
    """What a pass can be launched with, the default first: what registers hold on every GPU.

    Beyond 32 wide that is the default alone: more rows, and fewer or more warps, were compiled, and
    spill somewhere. ``blocks`` are those of `Geometry`.
    """
    if max(blocks) > _NARROW:
        return (_DEFAULT,)
    return (_DEFAULT, _launch(16, 4), _launch(32, 8))
