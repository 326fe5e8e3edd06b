"""Parameter updates of a population: rewind to the initialisation, masked Adam and masked SGD.

All three work in place on rows of the arena, ``[P, T]`` with the N prunable entries first, and
leave weights and moments exactly zero where the mask is False. A packed arena stores the unpruned
entries only and has no mask: ``mask=None`` counts every entry, and ``count [P]`` tells where a
row's padding begins. Nothing crosses tickets: a row's result does not depend on P. The optimisers
compute `torch.nn.utils.clip_grad_norm_` followed by `torch.optim.Adam` or `torch.optim.SGD` on
every row by itself. None has a derivative, forward-mode tangents are refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import implementation
from ..errors import check_tensor, check_untransformed
from ..memory import check_separate, mark_written
from ..registration import declare
from .checks import (
    check_count,
    check_like,
    check_max_norm,
    check_partials,
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
    count: Tensor | None = None,
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
        count: ``[P]`` int64, valid entries of each row; those beyond count as pruned. Without a
            mask only.
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
        count,
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
    count: Tensor | None = None,
    norm_partials: Tensor | None = None,
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
        count: ``[P]`` int64, valid entries of each row; those beyond count as pruned. Without a
            mask only.
        norm_partials: ``[P, parts]`` of weight's dtype, sums of squares that make up each ticket's
            squared norm, to take instead of reading `grad` once more.
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
    check_untransformed("adam_", weight, grad, m, v, lr, norm_partials)
    return torch.ops.sparse_tickets.adam_(
        weight.detach(),
        grad.detach(),
        m.detach(),
        v.detach(),
        step,
        lr.detach(),
        mask,
        count,
        None if norm_partials is None else norm_partials.detach(),
        check_max_norm(max_norm),
        beta1,
        beta2,
        eps,
    )


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _optional(
    mask: Tensor | None, count: Tensor | None, norm_partials: Tensor | None
) -> dict[str, Tensor | None]:
    """By name, in the order in which the backends take them."""
    given = {"mask": mask, "count": count, "norm_partials": norm_partials}
    return {name: _contiguous(tensor) for name, tensor in given.items()}


# Whoever calls an op by its name has passed no other check; kernels read memory by these shapes.


def _check_rewind(
    weight: Tensor,
    initial: Tensor,
    m: Tensor,
    v: Tensor,
    mask: Tensor | None,
    count: Tensor | None,
    initial_m: Tensor | None,
    initial_v: Tensor | None,
) -> None:
    check_rows(mask, weight=weight, m=m, v=v)
    for name, given in (("initial", initial), ("initial_m", initial_m), ("initial_v", initial_v)):
        if given is not None:
            check_like(name, given, weight)
    check_count(count, mask, weight)


def _check_adam(
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
    check_count(count, mask, weight)
    check_partials(norm_partials, weight)


def _rewind(
    weight: Tensor,
    initial: Tensor,
    m: Tensor,
    v: Tensor,
    mask: Tensor | None,
    count: Tensor | None,
    initial_m: Tensor | None,
    initial_v: Tensor | None,
) -> None:
    _check_rewind(weight, initial, m, v, mask, count, initial_m, initial_v)
    initial = initial.contiguous()
    initial_m, initial_v = _contiguous(initial_m), _contiguous(initial_v)
    mask, count = _contiguous(mask), _contiguous(count)
    rows = (weight, initial, m, v)
    check_rewind_separate(*rows, initial_m, initial_v, mask=mask, count=count)
    implementation(__name__, weight.device).rewind_(*rows, mask, count, initial_m, initial_v)
    mark_written(weight, m, v)


def _adam(
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
    numbers = (max_norm, beta1, beta2, eps)
    _check_adam(weight, grad, m, v, step, lr, mask, count, norm_partials, *numbers)
    grad, lr = grad.contiguous(), lr.contiguous()
    optional = _optional(mask, count, norm_partials)
    written = {"weight": weight, "m": m, "v": v, "step": step}
    check_separate(written, {"grad": grad, "lr": lr, **optional})
    backend = implementation(__name__, weight.device)
    norm = backend.adam_(weight, grad, m, v, step, lr, *optional.values(), *numbers)
    mark_written(weight, m, v, step)
    return norm


# Where shapes alone are known, the same is refused.


def _adam_fake(weight: Tensor, *rest: Any) -> Tensor:
    _check_adam(weight, *rest)
    return weight.new_empty(weight.shape[0])


declare("rewind_", _rewind, _check_rewind, written=("weight", "m", "v"))
declare("adam_", _adam, _adam_fake, written=("weight", "m", "v", "step"))
