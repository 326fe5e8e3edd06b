"""SAC's squashed Gaussian: actions, their log-probability and both gradients in one call each.

``action = tanh(mean + std * noise)`` and, summed over an action's numbers,
``log_prob = log N(noise) - log_std - log(1 - action^2 + epsilon)`` (Haarnoja et al. 2018,
appendix C), with the epsilon that Stable-Baselines3 adds; `kernels.squashed` has populations' own,
without. In torch these are some twenty operations, each with a node of autograd.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..linear import is_watched
from .squashed_cpu import BACKWARD_SCRATCH, FORWARD_SCRATCH, kernels

_grads_are_recorded = torch.is_grad_enabled


def reference(
    mean: Tensor, log_std: Tensor, noise: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """The actions ``[B, A]`` and their log-probability ``[B]``, in plain torch."""
    action = torch.tanh(mean + log_std.exp() * noise)
    terms = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    return action, (terms - torch.log(1 - action.square() + epsilon)).sum(1)


def can_squash(mean: Tensor, log_std: Tensor) -> bool:
    """Whether `squash` takes these: ordinary float32 matrices of one shape on the CPU."""
    return (
        type(mean) is Tensor
        and type(log_std) is Tensor
        and mean.is_cpu
        and mean.dtype is log_std.dtype is torch.float32
        and mean.ndim == 2
        and mean.shape == log_std.shape
        and not is_watched()
    )


def squash(mean: Tensor, log_std: Tensor, noise: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """`reference` by kernels, differentiable any number of times by ``mean`` and ``log_std``.

    Args:
        mean: ``[B, A]``; `can_squash` says what is taken.
        log_std: ``[B, A]``, the logarithm of the standard deviation.
        noise: ``[B, A]``, standard normal.
        epsilon: keeps the logarithm from zero where tanh is one.

    Returns:
        Actions ``[B, A]`` and their log-probability ``[B]``.
    """
    return _Squash.apply(mean.contiguous(), log_std.contiguous(), noise, epsilon)


class _Squash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, mean: Tensor, log_std: Tensor, noise: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        batch, size = mean.shape
        action, log_prob = torch.empty_like(mean), mean.new_empty(batch)
        scratch = mean.new_empty(batch * size + FORWARD_SCRATCH)
        kernels()[0](
            0, mean.data_ptr(), log_std.data_ptr(), noise.data_ptr(), action.data_ptr(),
            log_prob.data_ptr(), scratch.data_ptr(), batch, size, epsilon,
        )  # fmt: skip
        ctx.save_for_backward(mean, log_std, noise, action)
        ctx.epsilon = epsilon
        ctx.set_materialize_grads(False)
        return action, log_prob

    @staticmethod
    def backward(
        ctx: Any, daction: Tensor | None, dlog_prob: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        mean, log_std, noise, action = ctx.saved_tensors
        if _grads_are_recorded() or is_watched():
            return (
                *_differentiable(mean, log_std, noise, ctx.epsilon, daction, dlog_prob),
                None,
                None,
            )
        batch, size = action.shape
        dmean, dlog_std = torch.empty_like(action), torch.empty_like(action)
        scratch = action.new_empty(2 * batch * size + BACKWARD_SCRATCH)
        given = [None if d is None else d.contiguous() for d in (daction, dlog_prob)]
        kernels()[1](
            0, action.data_ptr(), log_std.data_ptr(), noise.data_ptr(),
            *(0 if d is None else d.data_ptr() for d in given),
            dmean.data_ptr(), dlog_std.data_ptr(), scratch.data_ptr(), batch, size, ctx.epsilon,
        )  # fmt: skip
        return dmean, dlog_std, None, None


def _differentiable(
    mean: Tensor,
    log_std: Tensor,
    noise: Tensor,
    epsilon: float,
    daction: Tensor | None,
    dlog_prob: Tensor | None,
) -> tuple[Tensor, ...]:
    """Both gradients as autograd's own ops, which may be differentiated in turn."""
    again = torch.is_grad_enabled()
    m, s = (t.view_as(t) if again else t.detach().requires_grad_() for t in (mean, log_std))
    with torch.enable_grad():
        outputs = reference(m, s, noise, epsilon)
        asked = [
            (y, dy) for y, dy in zip(outputs, (daction, dlog_prob), strict=True) if dy is not None
        ]
        return torch.autograd.grad(
            [y for y, _ in asked], [m, s], [dy for _, dy in asked], create_graph=again
        )
