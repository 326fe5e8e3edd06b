"""Rewind, Adam and SGD as plain torch, one line per formula."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["adam_", "rewind_"]


def _support(weight: Tensor, mask: Tensor | None, count: Tensor | None) -> Tensor:
    """``[P, T]``: the mask continued with True, or the first ``count`` entries of each row."""
    support = torch.ones_like(weight, dtype=torch.bool)
    if mask is not None:
        support[:, : mask.shape[1]] = mask
    if count is not None:
        support &= torch.arange(weight.shape[1], device=weight.device) < count[:, None]
    return support


def _clipped(
    grad: Tensor, support: Tensor, norm_partials: Tensor | None, max_norm: float
) -> tuple[Tensor, Tensor]:
    """Masked gradient scaled as `torch.nn.utils.clip_grad_norm_` does, and its norm before."""
    grad = torch.where(support, grad, 0)
    if norm_partials is None:
        norm = torch.linalg.vector_norm(grad, dim=1)
    else:
        norm = norm_partials.sum(dim=1).sqrt()
    if max_norm == float("inf"):
        return grad, norm
    return grad * (max_norm / (norm + 1e-6)).clamp(max=1.0)[:, None], norm


def rewind_(
    weight: Tensor,
    initial: Tensor,
    m: Tensor,
    v: Tensor,
    mask: Tensor | None,
    count: Tensor | None,
    initial_m: Tensor | None,
    initial_v: Tensor | None,
) -> None:
    support = _support(weight, mask, count)
    for target, source in ((weight, initial), (m, initial_m), (v, initial_v)):
        target.zero_() if source is None else target.copy_(torch.where(support, source, 0))


def adam_(
    weight: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    step: Tensor,
    lr: Tensor,
    mask: Tensor | None,
    count: Tensor | None,
    norm_partials: Tensor | None,
    max_norm: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> Tensor:
    support = _support(weight, mask, count)
    grad, norm = _clipped(grad, support, norm_partials, max_norm)
    step += 1
    new_m = m.lerp(grad, 1 - beta1)
    new_v = beta2 * v + (1 - beta2) * grad * grad
    count = step.to(torch.float64)[:, None]
    size = (lr.to(torch.float64)[:, None] / (1 - beta1**count)).to(weight.dtype)
    root = (1 - beta2**count).sqrt().to(weight.dtype)
    new_weight = weight - size * new_m / (new_v.sqrt() / root + eps)
    for target, new in ((weight, new_weight), (m, new_m), (v, new_v)):
        target.copy_(torch.where(support, new, 0))
    return norm
