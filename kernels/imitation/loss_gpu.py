"""KL(expert || student) and its gradient with respect to the student's outputs, in one Triton pass.

One program per ticket walks its minibatch; the expert's targets are read through the minibatch's
rows, so they are never gathered. A sample has 8 bytes of its row, and by action 12 FLOPs and 12
bytes, or 15 and 16 where actions are continuous. Sums run in a fixed order over one ticket's
samples alone. A NaN of a diverged ticket passes through; a row of -1, of no dataset, counts as NaN.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ..examples import Example, meta
from ..jit import jit_kernel
from ..training.loss_launches import padded, prefer_launch

# Below the logarithm of the smallest normal float32: an action the expert never takes.
_NEVER = tl.constexpr(-87.0)


@jit_kernel(fp_fusion=True)
def _loss_kernel(
    output,  # [P, count, actions]
    log_std,  # [P, actions], or None
    rows,  # [P, count]
    target,  # [all samples, actions], twice as wide where they are continuous
    d_output,  # written: as output, log_std
    d_log_std,
    losses,  # [P], added to
    row_stride,
    log_std_stride,
    d_log_std_stride,
    count,
    share,
    CONTINUOUS: tl.constexpr,
    ACTIONS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Samples ``target[rows[p, :count]]`` of ticket p; strides are those of its rows.

    Adds ``share`` of this minibatch's mean loss to the ticket's.
    """
    ticket = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    a = tl.arange(0, PADDED)
    real = a < ACTIONS
    loss = tl.zeros([BLOCK], tl.float32)
    if CONTINUOUS:
        spread = tl.load(log_std + ticket * log_std_stride + a, mask=real, other=0.0)
        precision = tl.exp(-2.0 * spread)
        spread_gradient = tl.zeros([PADDED], tl.float32)
    for begin in range(0, count, BLOCK):
        inside = begin + lane < count
        row = tl.load(rows + ticket * row_stride + begin + lane, mask=inside, other=0)  # [block]
        both = inside[:, None] & real[None, :]  # [block, actions]
        known = both & (row >= 0)[:, None]
        place = (ticket * count + begin + lane)[:, None] * ACTIONS + a[None, :]
        if CONTINUOUS:
            means = tl.load(output + place, mask=both, other=0.0)  # [block, actions]
            source = target + row[:, None] * (2 * ACTIONS) + a[None, :]
            wanted = tl.load(source, mask=known, other=float("nan"))
            wanted_spread = tl.load(source + ACTIONS, mask=known, other=0.0)
            error = means - wanted
            square = (tl.exp(2.0 * wanted_spread) + error * error) * precision[None, :]
            terms = spread[None, :] - wanted_spread + 0.5 * square - 0.5
            gradient = error * precision[None, :] / count
            spread_gradient += tl.sum(tl.where(both, 1.0 - square, 0.0), 0)  # [actions]
        else:
            logits = tl.load(output + place, mask=both, other=float("-inf"))  # [block, actions]
            logits = tl.where(inside[:, None], logits, 0.0)
            shifted = logits - tl.max(logits, 1)[:, None]
            exponentials = tl.exp(shifted)
            normaliser = tl.sum(exponentials, 1)  # [block]
            student = shifted - tl.log(normaliser)[:, None]
            source = target + row[:, None] * ACTIONS + a[None, :]
            expert = tl.load(source, mask=known, other=float("nan"))
            # Not a maximum, which would drop a NaN.
            expert = tl.where(expert < _NEVER, _NEVER, expert)
            probability = tl.where(both, tl.exp(expert), 0.0)
            terms = probability * tl.where(both, expert - student, 0.0)
            # Unless the expert's probabilities sum to one, their sum weighs the student's.
            mass = tl.sum(probability, 1)  # [block]
            gradient = exponentials * (mass / normaliser)[:, None] - probability
            gradient = gradient / count
        loss += tl.sum(tl.where(both, terms, 0.0), 1)
        tl.store(d_output + place, gradient, mask=both)
    if CONTINUOUS:
        tl.store(d_log_std + ticket * d_log_std_stride + a, spread_gradient / count, mask=real)
    here = losses + ticket
    tl.store(here, tl.load(here) + share * tl.sum(loss, 0) / count)


def loss_and_gradient(
    output: Tensor,
    log_std: Tensor | None,
    rows: Tensor,
    target: Tensor,
    share: float,
    gradient: tuple[Tensor, Tensor | None],
    losses: Tensor,
) -> None:
    """Gradient of a minibatch's loss with respect to the student's outputs; see `reference.loss`.

    Args:
        output: ``[P, B, A]`` float32, the student's on the minibatch; contiguous.
        log_std: ``[P, A]``, a view of the arena's rows, or None if actions are discrete.
        rows: ``[P, B]`` int64 with contiguous rows: of ``target.flatten(0, 1)``, or -1.
        target: ``[D, n, A]``, or ``[D, n, 2A]`` if actions are continuous; contiguous.
        share: of the minibatch in `losses`.
        gradient: written: shaped like ``output`` and ``log_std``.
        losses: ``[P]`` float32, contiguous; added to.
    """
    tickets, count, actions = output.shape
    d_output, d_log_std = gradient
    if tickets == 0:
        return
    continuous = log_std is not None
    launch = prefer_launch("imitation.loss", output, continuous=continuous)
    with torch.cuda.device_of(output):
        _loss_kernel[(tickets,)](
            output,
            log_std,
            rows,
            target,
            d_output,
            d_log_std,
            losses,
            rows.stride(0),
            0 if log_std is None else log_std.stride(0),
            0 if d_log_std is None else d_log_std.stride(0),
            count,
            share,
            CONTINUOUS=continuous,
            ACTIONS=actions,
            PADDED=padded(actions),
            BLOCK=launch.block,
            **launch.options,
        )


def _example(actions: int, count: int, *, continuous: bool) -> None:
    log_std = meta(2, actions + 1)[:, 1:] if continuous else None
    # A minibatch's rows begin anywhere in those of all updates.
    rows = meta(2, 3, count + 1, dtype=torch.int64)[:, 0, 1:]
    output, target = meta(2, count, actions), meta(3, 50, actions * (1 + continuous))
    gradient = meta(2, count, actions), log_std
    loss_and_gradient(output, log_std, rows, target, 0.5, gradient, meta(2))


EXAMPLES = [
    Example("discrete", lambda: _example(2, 128, continuous=False)),
    Example("discrete_long", lambda: _example(2, 1024, continuous=False)),
    Example("discrete_wide", lambda: _example(18, 1024, continuous=False)),
    Example("continuous", lambda: _example(6, 128, continuous=True)),
    Example("continuous_wide", lambda: _example(17, 1024, continuous=True)),
]
