"""PPO's loss and its gradient with respect to the networks' outputs, in one Triton pass.

One program per ticket walks its minibatch twice: for the mean and deviation of the advantages, and
for the loss. Samples are read through the minibatch's indices, so nothing but the observations
has to be gathered; the second walk reads from L1. About 60 FLOPs and ``(8 + 2A) * 4`` bytes a
sample. Sums run in a fixed order over one ticket's samples alone.

Where a policy term or a value term is clipped, its gradient is zero, as autograd's is. A NaN of a
diverged ticket passes through.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compile import Case
from ..mlp.heads import cases, padded, prefer_launch

if TYPE_CHECKING:
    from . import Batch, PPOConfig

__all__ = ["COMPILE_CASES", "LOSS_STATISTICS", "loss_and_gradient"]

LOSS_STATISTICS = 5
"""Policy loss, value loss, entropy, KL and clip fraction: the first entries of a statistics row."""

_LOG_SQRT_TWO_PI = tl.constexpr(0.5 * math.log(2.0 * math.pi))


@triton.jit
def _gather(field, ticket, samples, index, inside):
    """One number of each of these samples."""
    return tl.load(field + ticket * samples + index, mask=inside, other=0.0)


@triton.jit
def _standardise(advantage, order, ticket, samples, first, count, BLOCK: tl.constexpr):
    """Mean and unbiased standard deviation of a minibatch's advantages, in two walks."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, count, BLOCK):
        inside = begin + lane < count
        index = tl.load(order + ticket * samples + first + begin + lane, mask=inside, other=0)
        total += _gather(advantage, ticket, samples, index, inside)
    mean = tl.sum(total, 0) / count
    square = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, count, BLOCK):
        inside = begin + lane < count
        index = tl.load(order + ticket * samples + first + begin + lane, mask=inside, other=0)
        distance = _gather(advantage, ticket, samples, index, inside) - mean
        square += tl.where(inside, distance * distance, 0.0)
    return mean, tl.sqrt_rn(tl.sum(square, 0) / (count - 1))


@triton.jit
def _loss_kernel(
    output,
    value,
    log_std,
    order,
    action,
    logp,
    old_value,
    advantage,
    target,
    d_output,
    d_value,
    d_log_std,
    statistics,
    row,
    d_row,
    samples,
    first,
    count,
    clip,
    value_coef,
    entropy_coef,
    share,
    NORMALISE: tl.constexpr,
    CLIP_VALUE: tl.constexpr,
    CONTINUOUS: tl.constexpr,
    ACTIONS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Samples ``order[p, first : first + count]`` of ticket p.

    Rows of ``log_std`` lie ``row`` apart, those of its gradient ``d_row``. Adds ``share`` of
    this minibatch's statistics to those of the ticket.
    """
    ticket = tl.program_id(0).to(tl.int64)
    mean, deviation = 0.0, 1.0
    if NORMALISE:
        mean, deviation = _standardise(advantage, order, ticket, samples, first, count, BLOCK)
        deviation += 1e-8

    lane = tl.arange(0, BLOCK)
    a = tl.arange(0, PADDED)
    real = a < ACTIONS
    zero = tl.zeros([BLOCK], tl.float32)
    policy_sum, value_sum, entropy_sum, kl_sum, clipped_sum = zero, zero, zero, zero, zero
    if CONTINUOUS:
        spread = tl.load(log_std + ticket * row + a, mask=real, other=0.0)
        deviations = tl.exp(spread)
        spread_gradient = tl.zeros([PADDED], tl.float32)
    for begin in range(0, count, BLOCK):
        inside = begin + lane < count
        index = tl.load(order + ticket * samples + first + begin + lane, mask=inside, other=0)
        both = inside[:, None] & real[None, :]
        place = (ticket * count + begin + lane)[:, None] * ACTIONS + a[None, :]
        if CONTINUOUS:
            means = tl.load(output + place, mask=both, other=0.0)
            taken_at = (ticket * samples + index)[:, None] * ACTIONS + a[None, :]
            taken = tl.load(action + taken_at, mask=both, other=0.0)
            score = (taken - means) / deviations[None, :]
            terms = -0.5 * score * score - spread[None, :] - _LOG_SQRT_TWO_PI
            new_logp = tl.sum(tl.where(both, terms, 0.0), 1)
            entropies = tl.where(real, 0.5 + _LOG_SQRT_TWO_PI + spread, 0.0)
            entropy = zero + tl.sum(entropies, 0)
        else:
            logits = tl.load(output + place, mask=both, other=float("-inf"))
            logits = tl.where(inside[:, None], logits, 0.0)
            shifted = logits - tl.max(logits, 1)[:, None]
            exponentials = tl.exp(shifted)
            normaliser = tl.sum(exponentials, 1)
            probability = exponentials / normaliser[:, None]
            log_probability = shifted - tl.log(normaliser)[:, None]
            taken = tl.load(action + ticket * samples + index, mask=inside, other=0)
            chosen = a[None, :] == taken[:, None]
            new_logp = tl.sum(tl.where(chosen, log_probability, 0.0), 1)
            # Where a probability is zero, so is its term: 0 * -inf would be NaN.
            safe = tl.where(real[None, :], log_probability, 0.0)
            entropy = -tl.sum(probability * safe, 1)

        log_ratio = new_logp - _gather(logp, ticket, samples, index, inside)
        ratio = tl.exp(log_ratio)
        gain = (_gather(advantage, ticket, samples, index, inside) - mean) / deviation
        plain = -gain * ratio
        limited = tl.where(ratio < 1.0 - clip, 1.0 - clip, ratio)
        limited = tl.where(limited > 1.0 + clip, 1.0 + clip, limited)
        limited = -gain * limited
        # Comparisons that a NaN fails keep it.
        policy = tl.where(limited > plain, limited, plain)
        slope = tl.where(limited > plain, 0.0, plain) / count
        policy_sum += tl.where(inside, policy, 0.0)
        kl_sum += tl.where(inside, ratio - 1.0 - log_ratio, 0.0)
        clipped_sum += tl.where(inside & (tl.abs(ratio - 1.0) > clip), 1.0, 0.0)
        entropy_sum += tl.where(inside, entropy, 0.0)

        if CONTINUOUS:
            gradient = slope[:, None] * score / deviations[None, :]
            by_spread = slope[:, None] * (score * score - 1.0)
            spread_gradient += tl.sum(tl.where(both, by_spread, 0.0), 0)
        else:
            gradient = slope[:, None] * (tl.where(chosen, 1.0, 0.0) - probability)
            gradient += (entropy_coef / count) * probability * (safe + entropy[:, None])
        tl.store(d_output + place, gradient, mask=both)

        at = ticket * count + begin + lane
        now = tl.load(value + at, mask=inside, other=0.0)
        wanted = _gather(target, ticket, samples, index, inside)
        error = now - wanted
        if CLIP_VALUE:
            old = _gather(old_value, ticket, samples, index, inside)
            move = now - old
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
        value_sum += tl.where(inside, 0.5 * error * error, 0.0)
        tl.store(d_value + at, value_coef * slope / count, mask=inside)

    if CONTINUOUS:
        tl.store(d_log_std + ticket * d_row + a, spread_gradient - entropy_coef, mask=real)
    here = statistics + ticket * 6
    tl.store(here, tl.load(here) + share * tl.sum(policy_sum, 0) / count)
    tl.store(here + 1, tl.load(here + 1) + share * tl.sum(value_sum, 0) / count)
    tl.store(here + 2, tl.load(here + 2) + share * tl.sum(entropy_sum, 0) / count)
    tl.store(here + 3, tl.load(here + 3) + share * tl.sum(kl_sum, 0) / count)
    tl.store(here + 4, tl.load(here + 4) + share * tl.sum(clipped_sum, 0) / count)


def loss_and_gradient(
    output: Tensor,
    value: Tensor,
    log_std: Tensor | None,
    order: Tensor,
    first: int,
    batch: Batch,
    config: PPOConfig,
    share: float,
    gradient: tuple[Tensor, Tensor, Tensor | None],
    statistics: Tensor,
) -> None:
    """Gradient of a minibatch's loss with respect to both heads; see `reference.loss`.

    Args:
        output: ``[P, M, A]`` float32, the actor's on the minibatch; contiguous.
        value: ``[P, M, 1]`` float32, the critic's; contiguous.
        log_std: ``[P, A]``, a view of the arena's rows, or None if actions are discrete.
        order: ``[P, S]`` int64, contiguous; the minibatch is ``order[:, first : first + M]``.
        first: see `order`.
        batch: of all S samples, contiguous.
        config: of the loss.
        share: of the minibatch in the statistics.
        gradient: written: shaped like ``output``, ``value`` and ``log_std``.
        statistics: ``[P, 6]`` float32, contiguous; the first `LOSS_STATISTICS` of a row are
            added to.
    """
    tickets, count, actions = output.shape
    d_output, d_value, d_log_std = gradient
    if tickets == 0:
        return
    launch = prefer_launch("ppo.loss", output, continuous=log_std is not None)
    with torch.cuda.device_of(output):
        _loss_kernel[(tickets,)](
            output,
            value,
            log_std,
            order,
            *batch[1:],
            d_output,
            d_value,
            d_log_std,
            statistics,
            0 if log_std is None else log_std.stride(0),
            0 if d_log_std is None else d_log_std.stride(0),
            order.shape[1],
            first,
            count,
            config.clip,
            config.value_coef,
            config.entropy_coef,
            share,
            NORMALISE=config.normalise_advantage,
            CLIP_VALUE=config.clip_value,
            CONTINUOUS=log_std is not None,
            ACTIONS=actions,
            PADDED=padded(actions),
            BLOCK=launch.block,
            **launch.options,
        )


def _cases(name: str, continuous: bool, actions: int, count: int) -> list[Case]:
    """One for every launch."""
    fields = ("logp", "old_value", "advantage", "target", "d_output", "d_value", "statistics")
    signature = dict.fromkeys(("output", "value", *fields), "*fp32:16")
    signature |= {"order": "*i64:16", "action": "*fp32:16" if continuous else "*i64:16"}
    signature |= dict.fromkeys(("row", "d_row", "samples", "first", "count"), "i32")
    signature |= dict.fromkeys(("clip", "value_coef", "entropy_coef", "share"), "fp32")
    constants: dict[str, object] = {"NORMALISE": True, "CLIP_VALUE": True}
    sizes = {"actions": actions, "count": count}
    return cases(name, _loss_kernel, signature, constants, continuous=continuous, **sizes)


COMPILE_CASES = [
    *_cases("loss_discrete", False, 2, 128),
    *_cases("loss_discrete_long", False, 2, 1024),
    *_cases("loss_discrete_wide", False, 18, 1024),
    *_cases("loss_continuous", True, 6, 128),
]
