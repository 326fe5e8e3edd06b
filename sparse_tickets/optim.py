"""torch's Adam, AdamW, SGD and RMSprop in one pass over all parameters, on the masks alone.

A drop-in for `torch.optim`: same arguments, same ``state_dict`` in both directions, same schedulers
and hooks, and each class is a subclass of torch's. On a CPU all float32 parameters are updated by
one compiled call; a pruned weight of a `SparseLinear` is never touched and stays zero, with its
state. Whatever else an optimiser holds (another device or dtype) takes torch's own step.

    optimizer = sparse_tickets.optim.Adam(policy.parameters(), lr=3e-4, max_grad_norm=0.5)

With ``max_grad_norm`` the step clips by the norm of all gradients together, as
`torch.nn.utils.clip_grad_norm_` before it would, and leaves ``.grad`` as it is.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from sparse_tickets.fused import FusedOptimizer
from sparse_tickets.kernels.update import tensors

__all__ = ["SGD", "Adam", "AdamW", "RMSprop", "fuse_"]


class Adam(FusedOptimizer, torch.optim.Adam):
    """`torch.optim.Adam` in one pass.

    Args:
        params: as in torch.
        lr: learning rate.
        betas: decay of both moments.
        eps: added to the root of the corrected second moment.
        weight_decay: L2 penalty, or decoupled decay in `AdamW`.
        amsgrad: divide by the largest second moment so far.
        max_grad_norm: clip by the norm of all gradients together; None does not.
        **options: torch's others. ``foreach`` and ``fused`` change nothing here.

    Raises:
        ValueError: ``capturable`` or ``differentiable`` is asked for, or a number is out of range.

    Example:
        >>> layer = SparseLinear(64, 64).prune_(0.1)
        >>> optimizer = Adam(layer.parameters(), lr=1e-3, max_grad_norm=0.5)
        >>> layer(torch.ones(8, 64)).sum().backward()
        >>> optimizer.step()
        >>> int(layer.weight.count_nonzero()) == int(layer.mask.count_nonzero())
        True
    """

    _kernel = "adam"
    _torch: type[torch.optim.Optimizer] = torch.optim.Adam
    _lists = 6
    _names = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay")
    _hyper = staticmethod(itemgetter(*_names))

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        max_grad_norm: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **options)
        self._set_up(max_grad_norm)

    def _moments(self, group: dict[str, Any]) -> list[tuple[int, str]]:
        names = [(tensors.FIRST, "exp_avg"), (tensors.SECOND, "exp_avg_sq")]
        return [*names, (tensors.THIRD, "max_exp_avg_sq")] if group["amsgrad"] else names

    def _numbers(self, group: dict[str, Any]) -> tuple[float, ...]:
        beta1, beta2 = group["betas"]
        return (
            *(float(group["lr"]), float(beta1), float(beta2), group["eps"]),
            *(group["weight_decay"], group["decoupled_weight_decay"], group["amsgrad"]),
            -1.0 if group["maximize"] else 1.0,
        )


class AdamW(Adam, torch.optim.AdamW):
    """`torch.optim.AdamW` in one pass: `Adam` with decoupled weight decay."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        max_grad_norm: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, max_grad_norm=max_grad_norm, **options
        )


class SGD(FusedOptimizer, torch.optim.SGD):
    """`torch.optim.SGD` in one pass, with momentum, dampening and Nesterov's direction.

    Args:
        params: as in torch.
        lr: learning rate.
        momentum: decay of the buffer.
        dampening: of the gradient that goes into the buffer.
        weight_decay: L2 penalty.
        nesterov: look ahead.
        max_grad_norm: clip by the norm of all gradients together; None does not.
        **options: torch's others. ``foreach`` and ``fused`` change nothing here.

    Raises:
        ValueError: ``differentiable`` is asked for, or a number is out of range.
    """

    _kernel = "sgd"
    _torch: type[torch.optim.Optimizer] = torch.optim.SGD
    _lists = 3
    _names = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
    _hyper = staticmethod(itemgetter(*_names))

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        max_grad_norm: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, **options)
        self._set_up(max_grad_norm)

    def _moments(self, group: dict[str, Any]) -> list[tuple[int, str]]:
        return [(tensors.FIRST, "momentum_buffer")] if group["momentum"] != 0 else []

    def _start_state(self, group: dict[str, Any]) -> None:
        """torch makes a buffer in its first step, of the gradient; here it starts at zero."""
        self._beginners: set[int] = getattr(self, "_beginners", set())
        for p in group["params"] if group["momentum"] != 0 else ():
            if p.grad is not None and self.state[p].get("momentum_buffer") is None:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                self._beginners.add(id(p))

    def _start_momentum(self, params: list[Tensor], groups: list[int], places: np.ndarray) -> bool:
        for row, p in enumerate(params):
            places[row, tensors.FRESH] = id(p) in self._beginners
        self._beginners.clear()
        return bool(places[:, tensors.FRESH].any())

    def _numbers(self, group: dict[str, Any]) -> tuple[float, ...]:
        return (
            *(float(group["lr"]), group["momentum"], group["dampening"]),
            *(float(group["weight_decay"]), group["nesterov"]),
            *(-1.0 if group["maximize"] else 1.0, 0.0, 0.0),
        )


class RMSprop(FusedOptimizer, torch.optim.RMSprop):
    """`torch.optim.RMSprop` in one pass, with momentum and the centred second moment.

    Args:
        params: as in torch.
        lr: learning rate.
        alpha: decay of the second moment.
        eps: added to its root.
        weight_decay: L2 penalty.
        momentum: decay of the buffer.
        centered: subtract the square of the mean gradient.
        max_grad_norm: clip by the norm of all gradients together; None does not.
        **options: torch's others. ``foreach`` changes nothing here.

    Raises:
        ValueError: ``capturable`` or ``differentiable`` is asked for, or a number is out of range.
    """

    _kernel = "rmsprop"
    _torch: type[torch.optim.Optimizer] = torch.optim.RMSprop
    _lists = 6
    _names = ("lr", "alpha", "eps", "weight_decay", "momentum", "centered", "maximize")
    _hyper = staticmethod(itemgetter(*_names))

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        *,
        max_grad_norm: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            params, lr, alpha, eps, weight_decay, momentum, centered=centered, **options
        )
        self._set_up(max_grad_norm)

    def _moments(self, group: dict[str, Any]) -> list[tuple[int, str]]:
        names = [(tensors.FIRST, "square_avg")]
        if group["momentum"] > 0:
            names.append((tensors.SECOND, "momentum_buffer"))
        if group["centered"]:
            names.append((tensors.THIRD, "grad_avg"))
        return names

    def _numbers(self, group: dict[str, Any]) -> tuple[float, ...]:
        return (
            *(float(group["lr"]), group["alpha"], group["eps"], group["weight_decay"]),
            *(group["momentum"], group["centered"]),
            *(-1.0 if group["maximize"] else 1.0, 0.0),
        )


_OURS: dict[type[torch.optim.Optimizer], type[FusedOptimizer]] = {
    getattr(torch.optim, kind.__name__): kind for kind in (Adam, AdamW, SGD, RMSprop)
}


def fuse_(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Make an optimiser of torch's the one of ours with its name, by changing its class alone.

    State, ``param_groups``, hooks and whoever refers to it stay. An optimiser of any other class,
    one that is ``capturable`` or ``differentiable``, and one whose ``step`` was replaced (torch's
    learning rate schedulers do) stays what it is.

    Args:
        optimizer: changed in place.

    Returns:
        The optimiser.

    Example:
        >>> optimizer = torch.optim.AdamW(torch.nn.Linear(4, 2).parameters())
        >>> type(fuse_(optimizer)) is AdamW
        True
    """
    ours: Any = _OURS.get(type(optimizer))
    asks = any(g.get("capturable") or g.get("differentiable") for g in optimizer.param_groups)
    if ours is not None and not asks and "step" not in optimizer.__dict__:
        optimizer.__class__ = ours
        cast(FusedOptimizer, optimizer)._set_up(None)
    return optimizer
