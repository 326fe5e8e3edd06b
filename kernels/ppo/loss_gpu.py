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

from ..examples import Example, meta
from ..jit import jit_kernel
from ..training.loss_launches import padded, prefer_launch

if TYPE_CHECKING:
    from . import Batch, PPOConfig

SUMS = 5
"""What a minibatch adds up: policy loss, value loss, entropy, KL, clipped samples; see `Stats`."""

_LOG_SQRT_TWO_PI = tl.constexpr(0.5 * math.log(2.0 * math.pi))


@triton.jit
def _gather(field, place):
    """One number of each of these samples ``[ROWS]``.

    ``place`` is the ticket, how many samples each has, their index, and whether they are there.
    """
    ticket, samples, index, inside = place
    return tl.load(field + ticket * samples + index, mask=inside, other=0.0)


# Not inlined: with it in the same function, the compiler gives the loop over the tiles of
# `fused_gpu.gradient_kernel` twice the registers, or more than there are.
@triton.jit(noinline=True)
def standardise(advantage, order, ticket, samples, first, count, BLOCK: tl.constexpr):
    """Mean and unbiased standard deviation of a minibatch's advantages, in two walks."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, count, BLOCK):
        inside = begin + lane < count
        index = tl.load(order + ticket * samples + first + begin + lane, mask=inside, other=0)
        total += _gather(advantage, (ticket, samples, index, inside))
    mean = tl.sum(total, 0) / count
    square = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, count, BLOCK):
        inside = begin + lane < count
        index = tl.load(order + ticket * samples + first + begin + lane, mask=inside, other=0)
        distance = _gather(advantage, (ticket, samples, index, inside)) - mean
        square += tl.where(inside, distance * distance, 0.0)
    return mean, tl.sqrt_rn(tl.sum(square, 0) / (count - 1)) + 1e-8


@triton.jit
def load_spread(log_std, ACTIONS: tl.constexpr, PADDED: tl.constexpr):
    """A ticket's log standard deviations, or as many zeros where actions are discrete."""
    spread = tl.zeros([PADDED], tl.float32)
    if log_std is not None:
        a = tl.arange(0, PADDED)
        spread = tl.load(log_std + a, mask=a < ACTIONS, other=0.0)
    return spread


@triton.jit
def policy_loss(
    output,
    spread,
    batch,
    place,
    scale,
    count,
    clip,
    entropy_coef,
    CONTINUOUS: tl.constexpr,
    ACTIONS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Gradient of these samples' policy loss and entropy, and what statistics add up.

    Of ``output [ROWS, PADDED]``; ``batch`` is action, logp and advantage of all samples, ``place``
    what `_gather` takes, ``scale`` mean and deviation of the advantages.

    Returns:
        The gradients of the output and of the spread (but for the entropy's), zero where nothing
        is; policy loss, entropy, KL and whether it was clipped of each sample, zero outside.
    """
    action, logp, advantage = batch
    ticket, samples, index, inside = place
    mean, deviation = scale
    a = tl.arange(0, PADDED)
    real = a < ACTIONS
    both = inside[:, None] & real[None, :]
    if CONTINUOUS:
        deviations = tl.exp(spread)
        taken_at = (ticket * samples + index)[:, None] * ACTIONS + a[None, :]
        taken = tl.load(action + taken_at, mask=both, other=0.0)
        score = (taken - output) / deviations[None, :]  # [rows, actions]
        terms = -0.5 * score * score - spread[None, :] - _LOG_SQRT_TWO_PI
        new_logp = tl.sum(tl.where(both, terms, 0.0), 1)  # [rows]
        entropies = tl.where(real, 0.5 + _LOG_SQRT_TWO_PI + spread, 0.0)
        entropy = tl.zeros_like(new_logp) + tl.sum(entropies, 0)
    else:
        logits = tl.where(real[None, :], output, float("-inf"))  # [rows, actions]
        shifted = logits - tl.max(logits, 1)[:, None]
        exponentials = tl.exp(shifted)
        normaliser = tl.sum(exponentials, 1)  # [rows]
        probability = exponentials / normaliser[:, None]
        log_probability = shifted - tl.log(normaliser)[:, None]
        taken = tl.load(action + ticket * samples + index, mask=inside, other=0)
        chosen = a[None, :] == taken[:, None]  # [rows, actions]
        new_logp = tl.sum(tl.where(chosen, log_probability, 0.0), 1)
        # Where a probability is zero, so is its term: 0 * -inf would be NaN.
        safe = tl.where(real[None, :], log_probability, 0.0)
        entropy = -tl.sum(probability * safe, 1)  # [rows]

    log_ratio = new_logp - _gather(logp, place)  # [rows]
    ratio = tl.exp(log_ratio)
    gain = (_gather(advantage, place) - mean) / deviation
    plain = -gain * ratio
    limited = tl.where(ratio < 1.0 - clip, 1.0 - clip, ratio)
    limited = tl.where(limited > 1.0 + clip, 1.0 + clip, limited)
    limited = -gain * limited
    # Comparisons that a NaN fails keep it.
    policy = tl.where(limited > plain, limited, plain)
    slope = tl.where(limited > plain, 0.0, plain) / count
    if CONTINUOUS:
        gradient = slope[:, None] * score / deviations[None, :]
        by_spread = slope[:, None] * (score * score - 1.0)
        by_spread = tl.sum(tl.where(both, by_spread, 0.0), 0)  # [actions]
    else:
        gradient = slope[:, None] * (tl.where(chosen, 1.0, 0.0) - probability)
        gradient += (entropy_coef / count) * probability * (safe + entropy[:, None])
        by_spread = tl.zeros([PADDED], tl.float32)
    return (
        tl.where(both, gradient, 0.0),
        by_spread,
        tl.where(inside, policy, 0.0),
        tl.where(inside, entropy, 0.0),
        tl.where(inside, ratio - 1.0 - log_ratio, 0.0),
        tl.where(inside & (tl.abs(ratio - 1.0) > clip), 1.0, 0.0),
    )


@triton.jit
def store_policy_sums(sums, policy, entropy, kl, clipped):
    """What `policy_loss` gave of all samples; `SUMS` tells the order, in which the value's is 1."""
    tl.store(sums, tl.sum(policy, 0))
    tl.store(sums + 2, tl.sum(entropy, 0))
    tl.store(sums + 3, tl.sum(kl, 0))
    tl.store(sums + 4, tl.sum(clipped, 0))


@triton.jit
def value_loss(value, old_value, target, place, count, clip, value_coef, CLIP_VALUE: tl.constexpr):
    """Gradient of these samples' value loss, and the loss of each; both zero outside.

    ``place`` is what `_gather` takes.
    """
    _, _, _, inside = place
    wanted = _gather(target, place)  # [rows]
    error = value - wanted
    if CLIP_VALUE:
        old = _gather(old_value, place)
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
    gradient = tl.where(inside, value_coef * slope / count, 0.0)
    return gradient, tl.where(inside, 0.5 * error * error, 0.0)


@jit_kernel(fp_fusion=True)
def _loss_kernel(
    output,  # [P, count, actions]
    value,  # [P, count]
    log_std,  # [P, actions], or None
    order,  # [P, samples]
    action,  # [P, samples], or with [actions] where they are continuous
    logp,  # [P, samples], as the next three
    old_value,
    advantage,
    target,
    d_output,  # written: as output, value, log_std
    d_value,
    d_log_std,
    sums,  # [P, 5], written
    row,
    d_row,
    samples,
    first,
    count,
    clip,
    value_coef,
    entropy_coef,
    NORMALISE: tl.constexpr,
    CLIP_VALUE: tl.constexpr,
    CONTINUOUS: tl.constexpr,
    ACTIONS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Samples ``order[p, first : first + count]`` of ticket p.

    Rows of ``log_std`` lie ``row`` apart, those of its gradient ``d_row``.
    """
    ticket = tl.program_id(0).to(tl.int64)
    mean, deviation = 0.0, 1.0
    if NORMALISE:
        mean, deviation = standardise(advantage, order, ticket, samples, first, count, BLOCK)

    lane = tl.arange(0, BLOCK)
    a = tl.arange(0, PADDED)
    real = a < ACTIONS
    if CONTINUOUS:
        log_std += ticket * row
    spread = load_spread(log_std, ACTIONS, PADDED)
    spread_gradient = tl.zeros([PADDED], tl.float32)
    zero = tl.zeros([BLOCK], tl.float32)
    policy_sum, value_sum, entropy_sum, kl_sum, clipped_sum = zero, zero, zero, zero, zero
    for begin in range(0, count, BLOCK):
        inside = begin + lane < count
        index = tl.load(order + ticket * samples + first + begin + lane, mask=inside, other=0)
        at = ticket * count + begin + lane
        both = inside[:, None] & real[None, :]
        place = at[:, None] * ACTIONS + a[None, :]
        gradient, by_spread, policy, entropy, kl, clipped = policy_loss(
            tl.load(output + place, mask=both, other=0.0),
            spread,
            (action, logp, advantage),
            (ticket, samples, index, inside),
            (mean, deviation),
            count,
            clip,
            entropy_coef,
            CONTINUOUS,
            ACTIONS,
            PADDED,
        )
        tl.store(d_output + place, gradient, mask=both)
        spread_gradient += by_spread
        policy_sum += policy
        entropy_sum += entropy
        kl_sum += kl
        clipped_sum += clipped

        slope, error = value_loss(
            tl.load(value + at, mask=inside, other=0.0),
            old_value,
            target,
            (ticket, samples, index, inside),
            count,
            clip,
            value_coef,
            CLIP_VALUE,
        )
        tl.store(d_value + at, slope, mask=inside)
        value_sum += error

    if CONTINUOUS:
        tl.store(d_log_std + ticket * d_row + a, spread_gradient - entropy_coef, mask=real)
    sums += ticket * 5
    store_policy_sums(sums, policy_sum, entropy_sum, kl_sum, clipped_sum)
    tl.store(sums + 1, tl.sum(value_sum, 0))


def loss_and_gradient(
    output: Tensor,
    value: Tensor,
    log_std: Tensor | None,
    order: Tensor,
    first: int,
    batch: Batch,
    config: PPOConfig,
    gradient: tuple[Tensor, Tensor, Tensor | None],
    sums: Tensor,
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
        gradient: written: shaped like ``output``, ``value`` and ``log_std``.
        sums: ``[P, SUMS]`` float32, contiguous; written.
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
            sums,
            0 if log_std is None else log_std.stride(0),
            0 if d_log_std is None else d_log_std.stride(0),
            order.shape[1],
            first,
            count,
            config.clip,
            config.value_coef,
            config.entropy_coef,
            NORMALISE=config.normalise_advantage,
            CLIP_VALUE=config.clip_value,
            CONTINUOUS=log_std is not None,
            ACTIONS=actions,
            PADDED=padded(actions),
            BLOCK=launch.block,
            **launch.options,
        )


def _example(actions: int, count: int, *, continuous: bool) -> None:
    from . import Batch, PPOConfig

    samples = 3 * count + 1
    action = meta(2, samples, actions) if continuous else meta(2, samples, dtype=torch.int64)
    batch = Batch(meta(2, samples, 4), action, *(meta(2, samples) for _ in range(4)))
    log_std = meta(2, actions + 1)[:, 1:] if continuous else None
    heads = meta(2, count, actions), meta(2, count, 1)
    order = meta(2, samples, dtype=torch.int64)
    config = PPOConfig(normalise_advantage=True, clip_value=True)
    gradient = (*heads, log_std)
    loss_and_gradient(*heads, log_std, order, count, batch, config, gradient, meta(2, SUMS))


EXAMPLES = [
    Example("discrete", lambda: _example(2, 128, continuous=False)),
    Example("discrete_long", lambda: _example(2, 1024, continuous=False)),
    Example("discrete_wide", lambda: _example(18, 1024, continuous=False)),
    Example("continuous", lambda: _example(6, 128, continuous=True)),
]
