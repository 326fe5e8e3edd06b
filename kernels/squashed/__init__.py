"""The squashed Gaussian: actions between -1 and 1, the hyperbolic tangents of a Gaussian's samples.

A policy of soft actor-critic (Haarnoja et al., 2018): the mean and the logarithm of the standard
deviation of each number of an action are the network's outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import resolve_backend
from ..errors import check_tensor, check_untransformed
from . import reference

__all__ = ["half_spans", "sample", "within_bounds"]


@torch.no_grad()
def sample(head: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Actions of every ticket, and how likely they were; a ticket's depend on its own rows alone.

    Args:
        head: ``[P, B, 2A]`` float32 (float64 too with the reference backend), means, then log
            standard deviations.
        noise: ``[P, B, A]``, standard normals; zeros for the greedy action.

    Returns:
        ``(action [P, B, A], logp [P, B])``: in [-1, 1], and the logarithm of their density, of what
        lies between -1 and 1 after squashing.

    Raises:
        ValueError: a shape or a device.
        TypeError: a dtype.
    """
    check_untransformed("sample", head, noise)
    backend = resolve_backend(head.device)
    floats = (torch.float32, torch.float64) if backend == "reference" else (torch.float32,)
    check_tensor("head", head, ("P", "B", "2A"), *floats, like=head)
    shape = (*head.shape[:2], head.shape[2] // 2)
    check_tensor("noise", noise, shape, head.dtype, like=head)
    if backend == "cpu":
        from . import cpu

        return cpu.sample(head, noise)
    return reference.sample(head, noise)


def within_bounds(action: Tensor, low: tuple[float, ...], high: tuple[float, ...]) -> Tensor:
    """Actions ``[..., A]`` in [-1, 1] as an environment of these bounds takes them."""
    lowest, half = action.new_tensor(low), action.new_tensor(half_spans(low, high))
    return lowest + (action + 1.0) * half


def half_spans(low: tuple[float, ...], high: tuple[float, ...]) -> list[float]:
    """Half of what lies between each pair of bounds."""
    return [0.5 * (last - first) for first, last in zip(low, high, strict=True)]
