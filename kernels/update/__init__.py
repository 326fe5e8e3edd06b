"""Parameter updates of a population: rewind to the initialisation, and masked Adam.

Both work in place on rows of the arena, ``[P, T]`` with the N prunable entries first, and
leave weights and moments exactly zero where the mask is False. Nothing crosses tickets: a row's
result does not depend on P. Adam computes `torch.nn.utils.clip_grad_norm_` followed by
`torch.optim.Adam` on every row by itself. Neither has a derivative; forward-mode tangents are
refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import implementation
from ..errors import check_tensor, check_untransformed
from ..memory import check_separate, mark_written
from ..registration import declare
from . import reference
from .checks import (
    check_like,
    check_max_norm,
    check_range,
    check_rewind_separate,
    check_rows,
)

__all__ = ["adam_", "rewind_"]


def rewind_(
    weight: Tensor,
    initial: Tensor,
    m: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    initial_m: Tensor | None = None,
    initial_v: Tensor | None = None,
) -> None:
    """Set ``weight = initial`` on the mask and zero off it, and reset the moments, in place.

    Args:
        weight: ``[P, T]`` float32 or float64, contiguous; overwritten.
        initial: ``[P, T]`` weights to return to: the initialisation, or those of an early step
            (Frankle et al. 2020, "Linear mode connectivity and the lottery ticket hypothesis").
        m: ``[P, T]`` first moment, overwritten with `initial_m` on the mask, or with zeros.
        v: ``[P, T]`` second moment, likewise with `initial_v`.
        mask: ``[P, N]`` bool, N <= T; entries from N on are never pruned. None prunes nothing.
        initial_m: ``[P, T]`` first moment at that early step, or None.
        initial_v: ``[P, T]`` second moment at that early step, or None.

    Raises:
        ValueError: a shape, a device, or a row that is not contiguous or shares memory with another
            one; only a source and its own target may be the same.
        TypeError: a dtype.
    """
    check_untransformed("rewind_", weight, initial, m, v, initial_m, initial_v)
    torch.ops.sparse_tickets.rewind_(
        weight.detach(),
        initial.detach(),
        m.detach(),
        v.detach(),
        mask,
        None if initial_m is None else initial_m.detach(),
        None if initial_v is None else initial_v.detach(),
    )


def adam_(
    weight: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    step: Tensor,
    lr: Tensor,
    mask: Tensor | None,
    *,
    max_norm: float | None = 0.5,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-5,
) -> Tensor:
    """One Adam step on every ticket, clipped by that ticket's own gradient norm, in place.

    Kingma & Ba 2015 in `torch.optim.Adam`'s form: ``eps`` is added to the root of the corrected
    second moment. The gradient of a pruned entry counts as exactly zero, in the norm too, even if
    it is NaN. A ticket whose norm is NaN or infinite gets NaN weights, as in torch.

    Args:
        weight: ``[P, T]`` float32 or float64, contiguous; updated.
        grad: ``[P, T]``; unchanged.
        m: ``[P, T]`` first moment; updated.
        v: ``[P, T]`` second moment; updated.
        step: ``[P]`` int64, steps taken so far; incremented before use.
        lr: ``[P]`` float32 or float64 learning rates.
        mask: ``[P, N]`` bool, N <= T; entries from N on are never pruned. None prunes nothing.
        max_norm: largest gradient norm, or None (or inf) for no clipping.
        beta1: decay of the first moment, in [0, 1).
        beta2: decay of the second moment, in [0, 1).
        eps: added to the denominator, >= 0.

    Returns:
        ``[P]``: norm of each ticket's masked gradient before clipping.

    Raises:
        ValueError: a shape, a device, a row that is not contiguous or shares memory with another
            one, or a number out of its range.
        TypeError: a dtype; the Triton backend takes float32 only.
    """
    check_untransformed("adam_", weight, grad, m, v, lr)
    return torch.ops.sparse_tickets.adam_(
        weight.detach(),
        grad.detach(),
        m.detach(),
        v.detach(),
        step,
        lr.detach(),
        mask,
        check_max_norm(max_norm),
        beta1,
        beta2,
        eps,
    )


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


# Whoever calls an op by its name has passed no other check; kernels read memory by these shapes.


def _check_rewind(
    weight: Tensor,
    initial: Tensor,
    m: Tensor,
    v: Tensor,
    mask: Tensor | None,
    initial_m: Tensor | None,
    initial_v: Tensor | None,
) -> None:
    check_rows(mask, weight=weight, m=m, v=v)
    for name, given in (("initial", initial), ("initial_m", initial_m), ("initial_v", initial_v)):
        if given is not None:
            check_like(name, given, weight)


def _check_adam(
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
) -> None:
    check_rows(mask, weight=weight, m=m, v=v)
    check_like("grad", grad, weight)
    check_tensor("step", step, (len(weight),), torch.int64, like=weight)
    check_tensor("lr", lr, (len(weight),), torch.float32, torch.float64, like=weight)
    if not step.is_contiguous():
        raise ValueError(f"step must be contiguous, got strides {step.stride()}")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        check_range(name, beta, 0 <= beta < 1, "in [0, 1)")
    check_range("eps", eps, eps >= 0, ">= 0")
    check_range("max_norm", max_norm, max_norm > 0, "> 0")


def _rewind(
    weight: Tensor,
    initial: Tensor,
    m: Tensor,
    v: Tensor,
    mask: Tensor | None,
    initial_m: Tensor | None,
    initial_v: Tensor | None,
) -> None:
    _check_rewind(weight, initial, m, v, mask, initial_m, initial_v)
    initial, mask = initial.contiguous(), _contiguous(mask)
    initial_m, initial_v = _contiguous(initial_m), _contiguous(initial_v)
    rows = (weight, initial, m, v)
    check_rewind_separate(*rows, initial_m, initial_v, mask=mask)
    reference.rewind_(*rows, mask, initial_m, initial_v)
    mark_written(weight, m, v)


def _adam(
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
    numbers = (max_norm, beta1, beta2, eps)
    _check_adam(weight, grad, m, v, step, lr, mask, *numbers)
    grad, lr, mask = grad.contiguous(), lr.contiguous(), _contiguous(mask)
    written = {"weight": weight, "m": m, "v": v, "step": step}
    check_separate(written, {"grad": grad, "lr": lr, "mask": mask})
    backend = implementation(__name__, weight.device)
    norm = backend.adam_(weight, grad, m, v, step, lr, mask, *numbers)
    mark_written(weight, m, v, step)
    return norm


# Where shapes alone are known, the same is refused.


def _adam_fake(weight: Tensor, *rest: Any) -> Tensor:
    _check_adam(weight, *rest)
    return weight.new_empty(weight.shape[0])


declare("rewind_", _rewind, _check_rewind, written=("weight", "m", "v"))
declare("adam_", _adam, _adam_fake, written=("weight", "m", "v", "step"))
