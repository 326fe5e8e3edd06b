"""Adam in Triton: partial norms in a fixed order, then one pass over the rows.

Two launches without atomics or host synchronisation, so that a CUDA graph can hold them. Blocks
lie inside a row and their number depends on the row's length only: a ticket's result does not
depend on P. Adam reads 4 (grad) + 1 (mask) bytes an entry for the norm, then 17 and writes 12;
about 15 FLOPs an entry: bound by memory. Without a mask none is read; a gradient in stretches the
first launch adds up in order, and writes the sum. Scalars of a row, such as ``1 - beta2^step``,
are float64.

Blocks of Adam and of its norm may be measured (`kernels.tuning`), by the row's length.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import check_dtype
from ..examples import Example, meta
from ..jit import jit_kernel
from ..launch import Launch
from ..tuning import prefer

BLOCK = 1024
MAX_PARTIALS = 1024
"""A long row has longer stretches per partial sum, not more partials: the update reads them all."""


LAUNCHES = tuple(
    Launch(block=block, warps=warps)
    for block, warps in ((BLOCK, 4), (2 * BLOCK, 8), (BLOCK, 8), (BLOCK // 2, 4))
)
"""What Adam and its norm can be launched with, the default first."""


@triton.jit
def _touched(column, size, FROZEN: tl.constexpr):
    """Which of these columns of a row exist, and lie in no span that stays as it is."""
    touched = column < size
    for span in tl.static_range(len(FROZEN) // 2):
        touched = touched & ((column < FROZEN[2 * span]) | (column >= FROZEN[2 * span + 1]))
    return touched


@triton.jit
def _support(mask, ticket, column, prunable, among):
    """Which columns of a row, ``among`` these, are not pruned."""
    keep = among
    if mask is not None:
        masked = column < prunable
        inside = tl.load(mask + ticket * prunable + column, mask=masked, other=0).to(tl.int1)
        keep = keep & (inside | (column >= prunable))
    return keep


@jit_kernel(fp_fusion=True)
def _norm_kernel(
    grad,  # [P, size], or [P, summands, size]
    summed,  # [P, size], written, or None
    mask,  # [P, prunable], or None
    partial,  # [P, parts], written
    step,  # [P], written
    size,
    prunable,
    parts,
    stretch,
    summands,
    FROZEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum of squares of ``stretch`` consecutive blocks of a row; one program also counts the step.

    The count belongs here and not to the update, whose programs all read it. Of each row of
    ``summed``, unless None, ``grad`` holds the ``summands``.
    """
    ticket = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for block in range(part * stretch, (part + 1) * stretch):
        column = block * BLOCK + lane
        keep = _support(mask, ticket, column, prunable, _touched(column, size, FROZEN))
        if summed is None:
            entry = tl.load(grad + ticket * size + column, mask=keep, other=0.0)
        else:
            entry = tl.zeros([BLOCK], tl.float32)
            for summand in range(summands):
                row = ticket * summands + summand
                entry += tl.load(grad + row * size + column, mask=keep, other=0.0)
            tl.store(summed + ticket * size + column, entry, mask=keep)
        total += entry * entry
    tl.store(partial + ticket * parts + part, tl.sum(total, 0))
    if part == 0:
        tl.store(step + ticket, tl.load(step + ticket) + 1)


@triton.jit
def _clip(partial, norm, ticket, block, max_norm, parts, CLIP: tl.constexpr, PARTS: tl.constexpr):
    """Norm of a row from its partial sums, stored once, and the coefficient of the clipping."""
    index = tl.arange(0, PARTS)
    squares = tl.load(partial + ticket * parts + index, mask=index < parts, other=0.0)
    length = tl.sqrt_rn(tl.sum(squares, 0))
    if block == 0:
        tl.store(norm + ticket, length)
    scale = tl.full([], 1.0, tl.float32)
    if CLIP:
        coefficient = tl.div_rn(max_norm, length + 1e-6)
        # Not a minimum, which would drop the NaN of a diverged ticket.
        scale = tl.where(coefficient > 1.0, 1.0, coefficient)
    return scale


@jit_kernel(fp_fusion=True)
def _adam_kernel(
    weight,  # [P, size], written, as m and v
    grad,  # [P, size]
    m,
    v,
    step,  # [P]
    lr,  # [P]
    mask,  # [P, prunable], or None
    partial,  # [P, parts], of `_norm_kernel`
    norm,  # [P], written
    size,
    prunable,
    blocks,
    parts,
    max_norm,
    log_beta1,
    beta2,
    log_beta2,
    rate1,
    rate2,
    eps,
    FROZEN: tl.constexpr,
    CLIP: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ticket = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    scale = _clip(partial, norm, ticket, block, max_norm, parts, CLIP, PARTS)
    steps = tl.load(step + ticket).to(tl.float64)
    # In float32, 1 - 0.999^1 would lose four of its seven digits.
    correction1 = 1.0 - tl.exp(steps * log_beta1)
    correction2 = 1.0 - tl.exp(steps * log_beta2)
    rate = (tl.load(lr + ticket).to(tl.float64) / correction1).to(tl.float32)
    root = tl.sqrt_rn(correction2.to(tl.float32))

    column = block * BLOCK + tl.arange(0, BLOCK)
    touched = _touched(column, size, FROZEN)
    keep = _support(mask, ticket, column, prunable, touched)
    entry = ticket * size + column
    g = tl.load(grad + entry, mask=keep, other=0.0) * scale
    m_old = tl.load(m + entry, mask=keep, other=0.0)
    v_old = tl.load(v + entry, mask=keep, other=0.0)
    w_old = tl.load(weight + entry, mask=keep, other=0.0)
    # As `torch.lerp` from the nearer end: at a rate of 1 nothing of a huge moment is left.
    change = g - m_old
    m_new = tl.where(rate1 < 0.5, m_old + rate1 * change, g - (change - rate1 * change))
    v_new = v_old * beta2 + rate2 * (g * g)
    w_new = w_old - tl.div_rn(rate * m_new, tl.div_rn(tl.sqrt_rn(v_new), root) + eps)
    tl.store(weight + entry, tl.where(keep, w_new, 0.0), mask=touched)
    tl.store(m + entry, tl.where(keep, m_new, 0.0), mask=touched)
    tl.store(v + entry, tl.where(keep, v_new, 0.0), mask=touched)


def adam_(
    weight: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    step: Tensor,
    lr: Tensor,
    mask: Tensor | None,
    max_norm: float,
    beta1: float,
    beta2: float,
    eps: float,
    *,
    frozen: tuple[int, ...] = (),
    norm: Tensor | None = None,
) -> Tensor:
    """See `update.adam_`, which has neither stretches, nor spans, nor a place for the norm.

    Args:
        weight, grad, m, v, step, lr, mask: see `update.adam_`; ``grad`` may also be
            ``[P, stretches, T]``: rows to add up.
        max_norm, beta1, beta2, eps: see `update.adam_`; infinite for None.
        frozen: where spans of columns begin and end, one by one; in these spans neither weights
            nor moments change, and gradients do not count.
        norm: ``[P]``, written and returned.
    """
    check_dtype("weight on the Triton backend", weight, torch.float32)
    tickets, size = weight.shape
    if norm is None:
        norm = weight.new_empty(tickets)
    if weight.numel() == 0:
        step += 1
        return norm.zero_()
    with torch.cuda.device_of(weight):
        grad, partial = _partial_norms(grad, mask, step, frozen)
        parts = partial.shape[1]
        launch = _launch("adam", weight, mask)
        blocks = triton.cdiv(size, launch.block)
        _adam_kernel[(tickets * blocks,)](
            weight,
            grad,
            m,
            v,
            step,
            lr,
            mask,
            partial,
            norm,
            size,
            _prunable(mask),
            blocks,
            parts,
            max_norm,
            _log(beta1),
            beta2,
            _log(beta2),
            1.0 - beta1,
            1.0 - beta2,
            eps,
            FROZEN=frozen,
            CLIP=math.isfinite(max_norm),
            PARTS=triton.next_power_of_2(parts),
            **launch.constexprs,
            **launch.options,
        )
    return norm


def _partial_norms(
    grad: Tensor,
    mask: Tensor | None,
    step: Tensor,
    frozen: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """The gradient as one row, and ``[P, parts]`` sums of squares; increments ``step``."""
    tickets, *stretches, size = grad.shape
    summands = math.prod(stretches)
    grad = grad.reshape(tickets * summands, size)
    summed = None if summands == 1 else grad.new_empty(tickets, size)
    launch = _launch("norm", grad, mask)
    blocks = triton.cdiv(size, launch.block)
    stretch = triton.cdiv(blocks, MAX_PARTIALS)
    parts = triton.cdiv(blocks, stretch)
    partial = grad.new_empty(tickets, parts)
    _norm_kernel[(tickets * parts,)](
        grad,
        summed,
        mask,
        partial,
        step,
        size,
        _prunable(mask),
        parts,
        stretch,
        summands,
        FROZEN=frozen,
        **launch.constexprs,
        **launch.options,
    )
    return (grad if summed is None else summed), partial


def _launch(kernel: str, rows: Tensor, mask: Tensor | None) -> Launch:
    """What was measured on this device for such rows, or the default."""
    shapes = {"masked": mask is not None, "size": rows.shape[1]}
    return prefer(LAUNCHES[0], f"update.{kernel}", rows.device, among=LAUNCHES, **shapes)


def _prunable(mask: Tensor | None) -> int:
    return 0 if mask is None else mask.shape[1]


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


def _example(
    size: int = 8902,
    prunable: int | None = 4480,
    *,
    stretches: int = 1,
    frozen: tuple[int, ...] = (),
) -> None:
    """A row under a mask, or without one."""
    weight, m, v = (meta(2, size) for _ in range(3))
    mask = None if prunable is None else meta(2, prunable, dtype=torch.bool)
    grad = meta(2, stretches, size) if stretches > 1 else meta(2, size)
    step, lr = meta(2, dtype=torch.int64), meta(2)
    numbers = (0.5, 0.9, 0.999, 1e-8)
    adam_(weight, grad, m, v, step, lr, mask, *numbers, frozen=frozen)


EXAMPLES = [
    Example("masked", _example),
    Example("unmasked", lambda: _example(prunable=None)),
    # As PPO launches it on the rows of stretches of a minibatch, and as cloning does, where a
    # policy's critic stays as it is.
    Example("stretches", lambda: _example(stretches=3)),
    Example("frozen", lambda: _example(frozen=(4480, 8704, 8770, 8899))),
    Example("longest", lambda: _example(MAX_PARTIALS * BLOCK)),
]
