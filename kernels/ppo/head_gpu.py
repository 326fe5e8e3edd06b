"""PPO's loss and its gradient by the networks' outputs, as a head of the training step in Triton.

The actor's samples are walked twice: for the mean and deviation of the advantages, and for the
loss; the second walk reads from L1. About 60 FLOPs and ``(8 + 2A) * 4`` bytes a sample.

Where a policy term or a value term is clipped, its gradient is zero, as autograd's is. A NaN of a
diverged ticket passes through.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import triton
import triton.language as tl

from ..training.head_gpu import GPUHead

if TYPE_CHECKING:
    from . import Batch, PPOConfig

_MEASURED = (0, 2, 3, 4), (1,)
"""Policy loss, entropy, KL and clipped samples; the value loss. See `Stats`."""

_LOG_SQRT_TWO_PI = tl.constexpr(0.5 * math.log(2.0 * math.pi))


# Not inlined: with it in the same function, the compiler gives the loop over the tiles of
# `fused_gpu.gradient_kernel` twice the registers, or more than there are.
@triton.jit(noinline=True)
def _standardise(advantage, index, count, BLOCK: tl.constexpr):
    """Mean and unbiased standard deviation of a minibatch's advantages, in two walks."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, count, BLOCK):
        inside = begin + lane < count
        at = tl.load(index + begin + lane, mask=inside, other=0)
        total += tl.load(advantage + at, mask=inside, other=0.0)
    mean = tl.sum(total, 0) / count
    square = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, count, BLOCK):
        inside = begin + lane < count
        at = tl.load(index + begin + lane, mask=inside, other=0)
        distance = tl.load(advantage + at, mask=inside, other=0.0) - mean
        square += tl.where(inside, distance * distance, 0.0)
    return mean, tl.sqrt_rn(tl.sum(square, 0) / (count - 1)) + 1e-8


@triton.jit
def _prepare(
    NUMBER: tl.constexpr, data, numbers, minibatch, OPTIONS: tl.constexpr, WALK: tl.constexpr
):
    """Mean and deviation of the advantages; the entropy's gradient is no sample's."""
    NORMALISE: tl.constexpr = OPTIONS[1]
    scale = (0.0, 1.0)
    if NORMALISE and NUMBER == 0:
        index, base, count = minibatch
        scale = _standardise(data.advantage + base, index, count, WALK)
    return scale, -numbers.entropy_coef


@triton.jit
def _loss(
    NUMBER: tl.constexpr,
    output,
    log_std,
    scale,
    data,
    numbers,
    place,
    count,
    OPTIONS: tl.constexpr,
    OUT: tl.constexpr,
    WIDE: tl.constexpr,
):
    CONTINUOUS: tl.constexpr = OPTIONS[0]
    CLIP_VALUE: tl.constexpr = OPTIONS[2]
    if NUMBER == 0:
        gradient, by_log_std, measured = _policy_loss(
            output, log_std, scale, data, numbers, place, count, CONTINUOUS, OUT, WIDE
        )
    else:
        gradient, by_log_std, measured = _value_loss(
            output, data, numbers, place, count, CLIP_VALUE, WIDE
        )
    return gradient, by_log_std, measured


@triton.jit
def _policy_loss(
    output,
    log_std,
    scale,
    data,
    numbers,
    place,
    count,
    CONTINUOUS: tl.constexpr,
    ACTIONS: tl.constexpr,
    PADDED: tl.constexpr,
):
    at, inside = place
    mean, deviation = scale
    a = tl.arange(0, PADDED)
    real = a < ACTIONS
    both = inside[:, None] & real[None, :]
    if CONTINUOUS:
        deviations = tl.exp(log_std)
        taken_at = at[:, None] * ACTIONS + a[None, :]
        taken = tl.load(data.action + taken_at, mask=both, other=0.0)
        score = (taken - output) / deviations[None, :]  # [rows, actions]
        terms = -0.5 * score * score - log_std[None, :] - _LOG_SQRT_TWO_PI
        new_logp = tl.sum(tl.where(both, terms, 0.0), 1)  # [rows]
        entropies = tl.where(real, 0.5 + _LOG_SQRT_TWO_PI + log_std, 0.0)
        entropy = tl.zeros_like(new_logp) + tl.sum(entropies, 0)
    else:
        logits = tl.where(real[None, :], output, float("-inf"))  # [rows, actions]
        shifted = logits - tl.max(logits, 1)[:, None]
        exponentials = tl.exp(shifted)
        normaliser = tl.sum(exponentials, 1)  # [rows]
        probability = exponentials / normaliser[:, None]
        log_probability = shifted - tl.log(normaliser)[:, None]
        taken = tl.load(data.action + at, mask=inside, other=0)
        chosen = a[None, :] == taken[:, None]  # [rows, actions]
        new_logp = tl.sum(tl.where(chosen, log_probability, 0.0), 1)
        # Of an action that is none, NaN: that is seen, where a check would wait for the device.
        new_logp = tl.where((taken >= 0) & (taken < ACTIONS), new_logp, float("nan"))
        # Where a probability is zero, so is its term: 0 * -inf would be NaN.
        safe = tl.where(real[None, :], log_probability, 0.0)
        entropy = -tl.sum(probability * safe, 1)  # [rows]

    log_ratio = new_logp - tl.load(data.logp + at, mask=inside, other=0.0)  # [rows]
    ratio = tl.exp(log_ratio)
    advantage = tl.load(data.advantage + at, mask=inside, other=0.0)
    gain = (advantage - mean) / deviation
    clip = numbers.clip
    plain = -gain * ratio
    limited = tl.where(ratio < 1.0 - clip, 1.0 - clip, ratio)
    limited = tl.where(limited > 1.0 + clip, 1.0 + clip, limited)
    limited = -gain * limited
    # Comparisons that a NaN fails keep it.
    policy = tl.where(limited > plain, limited, plain)
    slope = tl.where(limited > plain, 0.0, plain) / count
    if CONTINUOUS:
        gradient = slope[:, None] * score / deviations[None, :]
        by_log_std = slope[:, None] * (score * score - 1.0)
        by_log_std = tl.sum(tl.where(both, by_log_std, 0.0), 0)  # [actions]
    else:
        gradient = slope[:, None] * (tl.where(chosen, 1.0, 0.0) - probability)
        gradient += (numbers.entropy_coef / count) * probability * (safe + entropy[:, None])
        by_log_std = tl.zeros([PADDED], tl.float32)
    return (
        tl.where(both, gradient, 0.0),
        by_log_std,
        (
            tl.where(inside, policy, 0.0),
            tl.where(inside, entropy, 0.0),
            tl.where(inside, ratio - 1.0 - log_ratio, 0.0),
            tl.where(inside & (tl.abs(ratio - 1.0) > clip), 1.0, 0.0),
        ),
    )


@triton.jit
def _value_loss(
    output, data, numbers, place, count, CLIP_VALUE: tl.constexpr, PADDED: tl.constexpr
):
    """Of the first output."""
    at, inside = place
    only = tl.arange(0, PADDED)[None, :] == 0
    value = tl.sum(tl.where(only, output, 0.0), 1)  # [rows]
    wanted = tl.load(data.target + at, mask=inside, other=0.0)
    error = value - wanted
    if CLIP_VALUE:
        clip = numbers.clip
        old = tl.load(data.value + at, mask=inside, other=0.0)
        move = value - old
        bounded = tl.where(move < -clip, -clip, move)
        bounded = tl.where(bounded > clip, clip, bounded)
        other = old + bounded - wanted
        worse = other * other > error * error
        # Within the bounds the clipped error is the same but for rounding, and has a slope.
        within = (move >= -clip) & (move <= clip)
        slope = tl.where(worse, tl.where(within, other, 0.0), error)
        error = tl.where(worse, other, error)
    else:
        slope = error
    gradient = tl.where(inside, numbers.value_coef * slope / count, 0.0)
    gradient = tl.where(only, gradient[:, None], 0.0)  # [rows, outputs]
    by_log_std = tl.zeros([PADDED], tl.float32)
    return gradient, by_log_std, (tl.where(inside, 0.5 * error * error, 0.0),)


class _Coefficients(NamedTuple):
    clip: float
    value_coef: float
    entropy_coef: float


def head(batch: Batch, config: PPOConfig, *, continuous: bool) -> GPUHead:
    """PPO's loss on these samples, all contiguous; see `reference.loss`."""
    return GPUHead(
        "ppo",
        _prepare,
        _loss,
        _MEASURED,
        batch,
        _Coefficients(config.clip, config.value_coef, config.entropy_coef),
        (continuous, config.normalise_advantage, config.clip_value),
    )
