"""Rewind and Adam as plain torch, one line per formula."""

from __future__ import annotations

import torch
from torch import Tensor


def _support(weight: Tensor, mask: Tensor | None) -> Tensor:
    """``[P, T]``: the mask continued with True."""
    support = torch.ones_like(weight, dtype=torch.bool)
    if mask is not None:
        support[:, : mask.shape[1]] = mask
    return support


def _clipped(grad: Tensor, support: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
    """Masked gradient scaled as `torch.nn.utils.clip_grad_norm_` does, and its norm before."""
    grad = torch.where(support, grad, 0)
    norm = torch.linalg.vector_norm(grad, dim=1)
    if max_norm == float("inf"):
        return grad, norm
    return grad * (max_norm / (norm + 1e-6)).clamp(max=1.0)[:, None], norm


def rewind_(
    weight: Tensor,
    initial: Tensor,
    m: Tensor,
    v: Tensor,
    mask: Tensor | None,
    initial_m: Tensor | None,
    initial_v: Tensor | None,
) -> None:
    pruned = None if mask is None else ~mask
    for target, source in ((weight, initial), (m, initial_m), (v, initial_v)):
        if source is None:
            target.zero_()
            continue
        target.copy_(source)
        if pruned is not None:
            target[:, : pruned.shape[1]].masked_fill_(pruned, 0)


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
    support = _support(weight, mask)
    grad, norm = _clipped(grad, support, max_norm)
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
