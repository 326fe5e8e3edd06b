"""KL(expert || student) and its gradient by the student's outputs, as a head in Triton.

The expert's targets are read through the minibatch's rows, so they are never gathered. A sample has
8 bytes of its row, and by action 12 FLOPs and 12 bytes, or 15 and 16 where actions are continuous.
A row of -1, of no dataset, counts as NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..training.head_gpu import GPUHead

# Below the logarithm of the smallest normal float32: an action the expert never takes.
_NEVER = tl.constexpr(-87.0)


@triton.jit
def _prepare(
    NUMBER: tl.constexpr, data, numbers, minibatch, OPTIONS: tl.constexpr, WALK: tl.constexpr
):
    """Nothing: samples are judged one by one."""
    return 0.0, 0.0


@triton.jit
def _loss(
    NUMBER: tl.constexpr,
    output,
    log_std,
    known,
    data,
    numbers,
    place,
    count,
    OPTIONS: tl.constexpr,
    OUT: tl.constexpr,
    WIDE: tl.constexpr,
):
    CONTINUOUS: tl.constexpr = OPTIONS[0]
    at, inside = place
    a = tl.arange(0, WIDE)
    real = a < OUT
    both = inside[:, None] & real[None, :]  # [rows, actions]
    there = both & (at >= 0)[:, None]
    by_log_std = tl.zeros([WIDE], tl.float32)
    if CONTINUOUS:
        precision = tl.exp(-2.0 * log_std)
        source = data.target + at[:, None] * (2 * OUT) + a[None, :]
        wanted = tl.load(source, mask=there, other=float("nan"))
        spread = tl.load(source + OUT, mask=there, other=0.0)
        error = output - wanted
        square = (tl.exp(2.0 * spread) + error * error) * precision[None, :]
        terms = log_std[None, :] - spread + 0.5 * square - 0.5
        gradient = error * precision[None, :]
        by_log_std = tl.sum(tl.where(both, 1.0 - square, 0.0), 0) / count  # [actions]
    else:
        logits = tl.where(real[None, :], output, float("-inf"))
        shifted = logits - tl.max(logits, 1)[:, None]
        exponentials = tl.exp(shifted)
        normaliser = tl.sum(exponentials, 1)  # [rows]
        student = shifted - tl.log(normaliser)[:, None]
        source = data.target + at[:, None] * OUT + a[None, :]
        expert = tl.load(source, mask=there, other=float("nan"))
        # Not a maximum, which would drop a NaN.
        expert = tl.where(expert < _NEVER, _NEVER, expert)
        probability = tl.where(both, tl.exp(expert), 0.0)
        terms = probability * tl.where(both, expert - student, 0.0)
        # Unless the expert's probabilities sum to one, their sum weighs the student's.
        mass = tl.sum(probability, 1)  # [rows]
        gradient = exponentials * (mass / normaliser)[:, None] - probability
    loss = tl.sum(tl.where(both, terms, 0.0), 1)
    return tl.where(both, gradient / count, 0.0), by_log_std, (loss,)


class _Targets(NamedTuple):
    target: Tensor


def head(target: Tensor, *, continuous: bool) -> GPUHead:
    """Cloning of an expert; see `reference.loss`.

    Args:
        target: ``[D, n, A]`` float32, or ``[D, n, 2A]`` where actions are continuous; contiguous.
        continuous: whether they are.
    """
    return GPUHead("imitation", _prepare, _loss, ((0,),), _Targets(target), (), (continuous,))
