"""Adam in Numba: one ticket per thread, each row passed over once per stage.

Every loop is elementwise, so LLVM vectorises it without reassociating anything: a row's numbers
depend neither on P, nor on the number of threads, nor on the machine's vector width. Nothing is
compiled with `fastmath`; `error_model="numpy"` keeps Numba's check for division by zero, which
would stop the vectoriser, out of the loops.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..compiling import njit
from ..threads import count_threads, share

# Work per entry, in the units of `count_threads`.
_WORK = 16

LANES = 512
"""Partial sums of a norm: a power of two, small enough for L1, enough to hide the add's latency."""


@njit(cache=True, error_model="numpy")
def squared_norm(grad, mask):
    """Sum of squares of ``grad [T]`` without the entries where ``mask [N]``, N <= T, is False.

    Entry i goes to lane i mod LANES (counted from N in the part without a mask); the lanes are
    then folded in halves.
    """
    prunable = mask.shape[0]
    zero = grad.dtype.type(0)
    lanes = np.zeros(LANES, grad.dtype)
    for begin in range(0, prunable, LANES):
        block = grad[begin : min(begin + LANES, prunable)]
        keep = mask[begin : begin + LANES]
        for lane in range(block.shape[0]):
            entry = block[lane] if keep[lane] else zero
            lanes[lane] += entry * entry
    for begin in range(prunable, grad.shape[0], LANES):
        block = grad[begin : begin + LANES]
        for lane in range(block.shape[0]):
            lanes[lane] += block[lane] * block[lane]
    half = LANES // 2
    while half > 0:
        for lane in range(half):
            lanes[lane] += lanes[lane + half]
        half //= 2
    return lanes[0]


@njit(cache=True, error_model="numpy")
def clip_coefficient(norm, max_norm):
    """``min(1, max_norm / (norm + 1e-6))`` as in `clip_grad_norm_`; 1 if ``max_norm`` is inf.

    A NaN norm stays NaN, so that a diverged ticket is seen and not trained on.
    """
    if math.isinf(max_norm):
        return 1.0
    coefficient = max_norm / (norm + 1e-6)
    return 1.0 if coefficient > 1.0 else coefficient


@njit(cache=True, error_model="numpy")
def blend(old, new, rate):
    """As `torch.lerp` from the nearer end: at a rate of 1 nothing of a huge ``old`` is left."""
    difference = new - old
    if rate < 0.5:
        return old + rate * difference
    return new - (difference - rate * difference)


@njit(cache=True, error_model="numpy")
def _adam_entry(weight, grad, m, v, rate1, beta2, rate2, size, inverse_root, eps):
    m = blend(m, grad, rate1)
    v = v * beta2 + rate2 * (grad * grad)
    weight = weight - size * m / (math.sqrt(v) * inverse_root + eps)
    return weight, m, v


@njit(cache=True, error_model="numpy")
def adam_row(weight, grad, m, v, mask, lr, step, max_norm, beta1, beta2, eps):
    """One clipped Adam step on one ticket, in place; callable from other Numba kernels.

    Args:
        weight: ``[T]`` float32 or float64, contiguous; the other rows share its dtype.
        grad: ``[T]``; read only, entries off the mask are never used.
        m: ``[T]`` first moment.
        v: ``[T]`` second moment.
        mask: ``[N]`` bool, N <= T.
        lr: learning rate, a scalar.
        step: number of this step, counted from 1 (the launcher has incremented it).
        max_norm: largest gradient norm, ``math.inf`` for no clipping.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the corrected second moment.

    Returns:
        The norm of the masked gradient before clipping.
    """
    norm = np.sqrt(squared_norm(grad, mask))
    kind = weight.dtype.type
    zero = kind(0)
    scale = kind(clip_coefficient(norm, max_norm))
    count = float(step)
    size = kind(lr / (1.0 - beta1**count))
    inverse_root = kind(1.0 / math.sqrt(1.0 - beta2**count))
    rate1, rate2 = kind(1.0 - beta1), kind(1.0 - beta2)
    decay2, eps = kind(beta2), kind(eps)

    prunable = mask.shape[0]
    for i in range(prunable):
        keep = mask[i]
        new_weight, new_m, new_v = _adam_entry(
            weight[i], grad[i] * scale, m[i], v[i], rate1, decay2, rate2, size, inverse_root, eps
        )
        weight[i] = new_weight if keep else zero
        m[i] = new_m if keep else zero
        v[i] = new_v if keep else zero
    weight, grad, m, v = weight[prunable:], grad[prunable:], m[prunable:], v[prunable:]
    for i in range(weight.shape[0]):
        weight[i], m[i], v[i] = _adam_entry(
            weight[i], grad[i] * scale, m[i], v[i], rate1, decay2, rate2, size, inverse_root, eps
        )
    return norm


@njit(cache=True, error_model="numpy")
def _adam_ticket(
    thread, ticket, weight, grad, m, v, mask, lr, step, max_norm, beta1, beta2, eps, norm
):
    step[ticket] += 1
    norm[ticket] = adam_row(
        weight[ticket],
        grad[ticket],
        m[ticket],
        v[ticket],
        mask[ticket],
        lr[ticket],
        step[ticket],
        max_norm,
        beta1,
        beta2,
        eps,
    )


@njit(cache=True, nogil=True, error_model="numpy")
def _adam_rows(threads, tickets, arguments):
    share(_adam_ticket, threads, tickets, arguments)


def _count_threads(weight: Tensor) -> int:
    return count_threads(len(weight), _WORK * weight.numel())


def _prefix(weight: Tensor, mask: Tensor | None) -> Tensor:
    """The mask, of no column if there is none."""
    return weight.new_empty(len(weight), 0, dtype=torch.bool) if mask is None else mask


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
) -> Tensor:
    norm = weight.new_empty(weight.shape[0])
    tensors = (weight, grad, m, v, _prefix(weight, mask), lr, step)
    arguments = (*(t.numpy() for t in tensors), max_norm, beta1, beta2, eps, norm.numpy())
    _adam_rows(_count_threads(weight), len(weight), arguments)
    return norm
