"""Parameter updates of a population: rewind to the initialisation, masked Adam and masked SGD.

All three work in place on rows of the arena, ``[P, T]`` with the N prunable entries first, and
leave weights and moments exactly zero where the mask is False. Nothing crosses tickets: a row's
result does not depend on P. The optimisers compute `torch.nn.utils.clip_grad_norm_` followed by
`torch.optim.Adam` or `torch.optim.SGD` on every row by itself.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

from ..dispatch import resolve_backend
from ..errors import check_device, check_dtype, check_shape
from . import cpu, reference

__all__ = ["adam_", "rewind_", "sgd_"]


def rewind_(
    weight: Tensor,
    initial: Tensor,
    m: Tensor,
    v: Tensor,
    mask: Tensor,
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
        mask: ``[P, N]`` bool, N <= T; entries from N on are never pruned.
        initial_m: ``[P, T]`` first moment at that early step, or None.
        initial_v: ``[P, T]`` second moment at that early step, or None.

    Raises:
        ValueError: a shape, a device, or a row that is not contiguous.
        TypeError: a dtype.
    """
    _check_rows(mask, weight=weight, m=m, v=v)
    for name, given in (("initial", initial), ("initial_m", initial_m), ("initial_v", initial_v)):
        if given is not None:
            _check_like(name, given, weight)
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
    mask: Tensor,
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
        mask: ``[P, N]`` bool, N <= T; entries from N on are never pruned.
        max_norm: largest gradient norm, or None (or inf) for no clipping.
        beta1: decay of the first moment, in [0, 1).
        beta2: decay of the second moment, in [0, 1).
        eps: added to the denominator, >= 0.

    Returns:
        ``[P]``: norm of each ticket's masked gradient before clipping.

    Raises:
        ValueError: a shape, a device, a row that is not contiguous, or a number out of its range.
        TypeError: a dtype; the Triton backend takes float32 only.
    """
    _check_rows(mask, weight=weight, m=m, v=v)
    _check_like("grad", grad, weight)
    _check_vector("step", step, weight, torch.int64)
    _check_vector("lr", lr, weight, torch.float32, torch.float64)
    if not step.is_contiguous():
        raise ValueError(f"step must be contiguous, got strides {step.stride()}")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        _check_range(name, beta, 0 <= beta < 1, "in [0, 1)")
    _check_range("eps", eps, eps >= 0, ">= 0")
    limit = _check_max_norm(max_norm)
    return torch.ops.sparse_tickets.adam_(
        weight.detach(),
        grad.detach(),
        m.detach(),
        v.detach(),
        step,
        lr.detach(),
        mask,
        limit,
        beta1,
        beta2,
        eps,
    )


def sgd_(
    weight: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    lr: Tensor,
    mask: Tensor,
    *,
    max_norm: float | None = 0.5,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
) -> Tensor:
    """One SGD step on every ticket, clipped by that ticket's own gradient norm, in place.

    `torch.optim.SGD` with ``dampening=0``, no Nesterov, and a buffer that starts at zero.

    Args:
        weight: ``[P, T]`` float32 or float64, contiguous; updated.
        grad: ``[P, T]``; unchanged.
        momentum_buffer: ``[P, T]``; updated.
        lr: ``[P]`` float32 or float64 learning rates.
        mask: ``[P, N]`` bool, N <= T; entries from N on are never pruned.
        max_norm: largest gradient norm, or None (or inf) for no clipping.
        momentum: decay of the buffer, >= 0.
        weight_decay: added to the clipped gradient times the weight, >= 0.

    Returns:
        ``[P]``: norm of each ticket's masked gradient before clipping.

    Raises:
        ValueError: a shape, a device, a row that is not contiguous, or a number out of its range.
        TypeError: a dtype; the Triton backend takes float32 only.
    """
    _check_rows(mask, weight=weight, momentum_buffer=momentum_buffer)
    _check_like("grad", grad, weight)
    _check_vector("lr", lr, weight, torch.float32, torch.float64)
    _check_range("momentum", momentum, momentum >= 0, ">= 0")
    _check_range("weight_decay", weight_decay, weight_decay >= 0, ">= 0")
    limit = _check_max_norm(max_norm)
    return torch.ops.sparse_tickets.sgd_(
        weight.detach(),
        grad.detach(),
        momentum_buffer.detach(),
        lr.detach(),
        mask,
        limit,
        momentum,
        weight_decay,
    )


def _check_rows(mask: Tensor, **rows: Tensor) -> None:
    """Rows that an op writes: alike, contiguous, and at least as long as the mask."""
    weight = rows["weight"]
    if weight.ndim != 2:
        raise ValueError(f"weight must have shape [P, T], got {tuple(weight.shape)}")
    check_dtype("weight", weight, torch.float32, torch.float64)
    for name, tensor in rows.items():
        _check_like(name, tensor, weight)
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    check_dtype("mask", mask, torch.bool)
    check_device("mask", mask, weight)
    if mask.ndim != 2 or mask.shape[0] != weight.shape[0] or mask.shape[1] > weight.shape[1]:
        raise ValueError(
            f"mask must have shape [{weight.shape[0]}, N] with N <= {weight.shape[1]}, "
            f"got {tuple(mask.shape)}"
        )


def _check_like(name: str, tensor: Tensor, weight: Tensor) -> None:
    check_shape(name, tensor, tuple(weight.shape))
    check_dtype(name, tensor, weight.dtype)
    check_device(name, tensor, weight)


def _check_vector(name: str, tensor: Tensor, weight: Tensor, *dtypes: torch.dtype) -> None:
    check_shape(name, tensor, (weight.shape[0],))
    check_dtype(name, tensor, *dtypes)
    check_device(name, tensor, weight)


def _check_range(name: str, value: float, holds: bool, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {allowed}, got {value}")


def _check_max_norm(max_norm: float | None) -> float:
    if max_norm is None:
        return math.inf
    _check_range("max_norm", max_norm, max_norm > 0, "> 0 or None")
    return float(max_norm)


def _backend(device: torch.device) -> ModuleType:
    name = resolve_backend(device)
    if name == "triton":
        from . import gpu

        return gpu
    return cpu if name == "cpu" else reference


def _mutated(*tensors: Tensor) -> None:
    """Tell autograd, which does not see below the dispatcher, that these were written."""
    for tensor in tensors:
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def _rewind_impl(
    weight: Tensor,
    initial: Tensor,
    m: Tensor,
    v: Tensor,
    mask: Tensor,
    initial_m: Tensor | None,
    initial_v: Tensor | None,
) -> None:
    sources = (None if t is None else t.contiguous() for t in (initial_m, initial_v))
    _backend(weight.device).rewind_(
        weight,
        initial.contiguous(),
        m,
        v,
        mask.contiguous(),
        *sources,
    )
    _mutated(weight, m, v)


def _adam_impl(
    weight: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    step: Tensor,
    lr: Tensor,
    mask: Tensor,
    max_norm: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> Tensor:
    norm = _backend(weight.device).adam_(
        weight,
        grad.contiguous(),
        m,
        v,
        step,
        lr.contiguous(),
        mask.contiguous(),
        max_norm,
        beta1,
        beta2,
        eps,
    )
    _mutated(weight, m, v, step)
    return norm


def _sgd_impl(
    weight: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    lr: Tensor,
    mask: Tensor,
    max_norm: float,
    momentum: float,
    weight_decay: float,
) -> Tensor:
    norm = _backend(weight.device).sgd_(
        weight,
        grad.contiguous(),
        momentum_buffer,
        lr.contiguous(),
        mask.contiguous(),
        max_norm,
        momentum,
        weight_decay,
    )
    _mutated(weight, momentum_buffer)
    return norm


_library = torch.library.Library("sparse_tickets", "FRAGMENT")
_library.define(
    "rewind_(Tensor(a!) weight, Tensor initial, Tensor(b!) m, Tensor(c!) v, Tensor mask, "
    "Tensor? initial_m, Tensor? initial_v) -> ()"
)
_library.define(
    "adam_(Tensor(a!) weight, Tensor grad, Tensor(b!) m, Tensor(c!) v, Tensor(d!) step, "
    "Tensor lr, Tensor mask, float max_norm, float beta1, float beta2, float eps) -> Tensor"
)
_library.define(
    "sgd_(Tensor(a!) weight, Tensor grad, Tensor(b!) momentum_buffer, Tensor lr, Tensor mask, "
    "float max_norm, float momentum, float weight_decay) -> Tensor"
)
for _key in ("CPU", "CUDA"):
    _library.impl("rewind_", _rewind_impl, _key)
    _library.impl("adam_", _adam_impl, _key)
    _library.impl("sgd_", _sgd_impl, _key)


@torch.library.register_fake("sparse_tickets::rewind_", lib=_library)
def _rewind_fake(weight, initial, m, v, mask, initial_m, initial_v):
    return None


@torch.library.register_fake("sparse_tickets::adam_", lib=_library)
def _adam_fake(weight, grad, m, v, step, lr, mask, max_norm, beta1, beta2, eps):
    return weight.new_empty(weight.shape[0])


@torch.library.register_fake("sparse_tickets::sgd_", lib=_library)
def _sgd_fake(weight, grad, momentum_buffer, lr, mask, max_norm, momentum, weight_decay):
    return weight.new_empty(weight.shape[0])
