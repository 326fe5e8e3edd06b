"""Rewind, Adam and SGD in Triton: partial norms in a fixed order, then one pass over the rows.

Two launches without atomics or host synchronisation, so that a CUDA graph can hold them. Blocks
lie inside a row and their number depends on the row's length only: a ticket's result does not
depend on P. Adam reads 4 (grad) + 1 (mask) bytes an entry for the norm, then 17 and writes 12;
about 15 FLOPs an entry: bound by memory. Scalars of a row, such as ``1 - beta2^step``, are float64.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compile import Case
from ..errors import check_dtype

__all__ = ["COMPILE_CASES", "adam_", "rewind_", "sgd_"]

BLOCK = 1024
MAX_PARTIALS = 1024
"""A long row has longer stretches per partial sum, not more partials: the update reads them all."""


@triton.jit
def _support(mask, ticket, column, prunable, size):
    """Which of these columns of a row exist and are not pruned."""
    masked = column < prunable
    keep = tl.load(mask + ticket * prunable + column, mask=masked, other=0).to(tl.int1)
    return (keep & masked) | ((column >= prunable) & (column < size))


@triton.jit
def _norm_kernel(
    grad, mask, partial, step, size, prunable, stretch, HAS_STEP: tl.constexpr, BLOCK: tl.constexpr
):
    """Sum of squares of ``stretch`` consecutive blocks of a row; one program also counts the step.

    The count belongs here and not to the update, whose programs all read it.
    """
    ticket = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for block in range(part * stretch, (part + 1) * stretch):
        column = block * BLOCK + lane
        keep = _support(mask, ticket, column, prunable, size)
        entry = tl.load(grad + ticket * size + column, mask=keep, other=0.0)
        total += entry * entry
    tl.store(partial + ticket * tl.num_programs(1) + part, tl.sum(total, 0))
    if HAS_STEP and part == 0:
        tl.store(step + ticket, tl.load(step + ticket) + 1)


@triton.jit
def _clip(partial, norm, ticket, max_norm, parts, CLIP: tl.constexpr, PARTS: tl.constexpr):
    """Norm of a row from its partial sums, stored once, and the coefficient of the clipping."""
    index = tl.arange(0, PARTS)
    squares = tl.load(partial + ticket * parts + index, mask=index < parts, other=0.0)
    length = tl.sqrt_rn(tl.sum(squares, 0))
    if tl.program_id(1) == 0:
        tl.store(norm + ticket, length)
    scale = tl.full([], 1.0, tl.float32)
    if CLIP:
        coefficient = tl.div_rn(max_norm, length + 1e-6)
        # Not a minimum, which would drop the NaN of a diverged ticket.
        scale = tl.where(coefficient > 1.0, 1.0, coefficient)
    return scale


@triton.jit
def _adam_kernel(
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
    prunable,
    parts,
    max_norm,
    log_beta1,
    beta2,
    log_beta2,
    rate1,
    rate2,
    eps,
    CLIP: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ticket = tl.program_id(0).to(tl.int64)
    scale = _clip(partial, norm, ticket, max_norm, parts, CLIP, PARTS)
    count = tl.load(step + ticket).to(tl.float64)
    # In float32, 1 - 0.999^1 would lose four of its seven digits.
    correction1 = 1.0 - tl.exp(count * log_beta1)
    correction2 = 1.0 - tl.exp(count * log_beta2)
    rate = (tl.load(lr + ticket).to(tl.float64) / correction1).to(tl.float32)
    root = tl.sqrt_rn(correction2.to(tl.float32))

    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = column < size
    keep = _support(mask, ticket, column, prunable, size)
    entry = ticket * size + column
    g = tl.load(grad + entry, mask=keep, other=0.0) * scale
    m_old = tl.load(m + entry, mask=keep, other=0.0)
    v_old = tl.load(v + entry, mask=keep, other=0.0)
    w_old = tl.load(weight + entry, mask=keep, other=0.0)
    m_new = m_old + rate1 * (g - m_old)
    v_new = v_old * beta2 + rate2 * (g * g)
    w_new = w_old - tl.div_rn(rate * m_new, tl.div_rn(tl.sqrt_rn(v_new), root) + eps)
    tl.store(weight + entry, tl.where(keep, w_new, 0.0), mask=exists)
    tl.store(m + entry, tl.where(keep, m_new, 0.0), mask=exists)
    tl.store(v + entry, tl.where(keep, v_new, 0.0), mask=exists)


@triton.jit
def _sgd_kernel(
    weight,
    grad,
    buffer,
    lr,
    mask,
    partial,
    norm,
    size,
    prunable,
    parts,
    max_norm,
    momentum,
    weight_decay,
    CLIP: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ticket = tl.program_id(0).to(tl.int64)
    scale = _clip(partial, norm, ticket, max_norm, parts, CLIP, PARTS)
    rate = tl.load(lr + ticket).to(tl.float32)

    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = column < size
    keep = _support(mask, ticket, column, prunable, size)
    entry = ticket * size + column
    g = tl.load(grad + entry, mask=keep, other=0.0) * scale
    old = tl.load(weight + entry, mask=keep, other=0.0)
    new = momentum * tl.load(buffer + entry, mask=keep, other=0.0) + (g + weight_decay * old)
    tl.store(weight + entry, tl.where(keep, old - rate * new, 0.0), mask=exists)
    tl.store(buffer + entry, tl.where(keep, new, 0.0), mask=exists)


@triton.jit
def _masked_copy_kernel(target, source, mask, size, prunable, BLOCK: tl.constexpr):
    """``target = source``, zero where the mask is False; 9 bytes an entry."""
    ticket = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = _support(mask, ticket, column, prunable, size)
    entry = ticket * size + column
    value = tl.load(source + entry, mask=keep, other=0.0)
    tl.store(target + entry, value, mask=column < size)


def rewind_(
    weight: Tensor,
    initial: Tensor,
    m: Tensor,
    v: Tensor,
    mask: Tensor,
    initial_m: Tensor | None,
    initial_v: Tensor | None,
) -> None:
    tickets, size = weight.shape
    grid = (tickets, triton.cdiv(size, BLOCK))
    for target, source in ((weight, initial), (m, initial_m), (v, initial_v)):
        if source is None:
            target.zero_()
        elif target.numel():
            _masked_copy_kernel[grid](target, source, mask, size, mask.shape[1], BLOCK=BLOCK)


def adam_(
    weight: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    step: Tensor,
    lr: Tensor,
    mask: Tensor,
    max_norm: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> Tensor:
    tickets, size = weight.shape
    norm = weight.new_zeros(tickets)
    partial = _partial_norms(weight, grad, mask, step)
    if weight.numel() == 0:
        step += 1
        return norm
    parts = partial.shape[1]
    _adam_kernel[(tickets, triton.cdiv(size, BLOCK))](
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
        mask.shape[1],
        parts,
        max_norm,
        _log(beta1),
        beta2,
        _log(beta2),
        1.0 - beta1,
        1.0 - beta2,
        eps,
        CLIP=math.isfinite(max_norm),
        PARTS=triton.next_power_of_2(parts),
        BLOCK=BLOCK,
    )
    return norm


def sgd_(
    weight: Tensor,
    grad: Tensor,
    buffer: Tensor,
    lr: Tensor,
    mask: Tensor,
    max_norm: float,
    momentum: float,
    weight_decay: float,
) -> Tensor:
    tickets, size = weight.shape
    norm = weight.new_zeros(tickets)
    partial = _partial_norms(weight, grad, mask, None)
    if weight.numel() == 0:
        return norm
    parts = partial.shape[1]
    _sgd_kernel[(tickets, triton.cdiv(size, BLOCK))](
        weight,
        grad,
        buffer,
        lr,
        mask,
        partial,
        norm,
        size,
        mask.shape[1],
        parts,
        max_norm,
        momentum,
        weight_decay,
        CLIP=math.isfinite(max_norm),
        PARTS=triton.next_power_of_2(parts),
        BLOCK=BLOCK,
    )
    return norm


def _partial_norms(weight: Tensor, grad: Tensor, mask: Tensor, step: Tensor | None) -> Tensor:
    """``[P, parts]`` sums of squares; also increments ``step`` if given."""
    check_dtype("weight on the Triton backend", weight, torch.float32)
    tickets, size = weight.shape
    blocks = triton.cdiv(size, BLOCK)
    stretch = triton.cdiv(blocks, MAX_PARTIALS)
    parts = triton.cdiv(blocks, max(stretch, 1))
    partial = weight.new_empty(tickets, parts)
    if weight.numel():
        _norm_kernel[(tickets, parts)](
            grad,
            mask,
            partial,
            step,
            size,
            mask.shape[1],
            stretch,
            HAS_STEP=step is not None,
            BLOCK=BLOCK,
        )
    return partial


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


_NORM = {"grad": "*fp32:16", "mask": "*i1:16", "partial": "*fp32:16"}
_SIZES = {"size": "i32", "prunable": "i32"}
_CLIP = {"norm": "*fp32:16", **_SIZES, "parts": "i32", "max_norm": "fp32"}
_ADAM_SCALARS = ("log_beta1", "beta2", "log_beta2", "rate1", "rate2", "eps")
_ROWS = {"weight": "*fp32:16", "lr": "*fp32:16", **_NORM}

COMPILE_CASES = [
    Case(
        "norm",
        _norm_kernel,
        {**_NORM, "step": "*i64:16", **_SIZES, "stretch": "i32"},
        {"HAS_STEP": True, "BLOCK": BLOCK},
        {},
    ),
    Case(
        "adam",
        _adam_kernel,
        {
            **_ROWS,
            **_CLIP,
            "m": "*fp32:16",
            "v": "*fp32:16",
            "step": "*i64:16",
            **dict.fromkeys(_ADAM_SCALARS, "fp32"),
        },
        {"CLIP": True, "PARTS": MAX_PARTIALS, "BLOCK": BLOCK},
        {},
    ),
    Case(
        "sgd",
        _sgd_kernel,
        {**_ROWS, **_CLIP, "buffer": "*fp32:16", "momentum": "fp32", "weight_decay": "fp32"},
        {"CLIP": True, "PARTS": MAX_PARTIALS, "BLOCK": BLOCK},
        {},
    ),
    Case(
        "masked_copy",
        _masked_copy_kernel,
        {"target": "*fp32:16", "source": "*fp32:16", "mask": "*i1:16", **_SIZES},
        {"BLOCK": BLOCK},
        {},
    ),
]
