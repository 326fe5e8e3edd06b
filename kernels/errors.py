"""Argument checks shared by the ops: clear exceptions, never an assert."""

from __future__ import annotations

import operator

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad

__all__ = [
    "check_data",
    "check_device",
    "check_dtype",
    "check_integer",
    "check_shape",
    "check_untransformed",
    "has_data",
]


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Raise ``ValueError`` unless ``tensor`` has exactly the shape ``expected``."""
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name} must have shape {tuple(expected)}, got {tuple(tensor.shape)}")


def check_dtype(name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    """Raise ``TypeError`` unless the dtype of ``tensor`` is one of ``allowed``."""
    if tensor.dtype not in allowed:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(f"{name} must be {names}, got {str(tensor.dtype).removeprefix('torch.')}")


def check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    """Raise ``ValueError`` unless ``tensor`` lives where ``like`` lives."""
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {tensor.device}")


def has_data(tensor: Tensor) -> bool:
    """Whether anybody can look at the values: not of a meta tensor, nor of a fake one."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def check_data(name: str, tensor: Tensor) -> None:
    """Raise ``ValueError`` unless `has_data`."""
    if not has_data(tensor):
        kind = "a tensor on meta" if tensor.is_meta else "a FakeTensor"
        raise ValueError(f"{name} must hold data, got {kind}")


def check_integer(name: str, value: int, low: int, high: int) -> int:
    """The integer ``value``; raise unless it is one, and in ``[low, high)``."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r}") from None
    if not low <= number < high:
        limit = f"2**{high.bit_length() - 1}" if high > 9999 and not high & (high - 1) else high
        raise ValueError(f"{name} must be in [{low}, {limit}), got {number}")
    return number


def check_untransformed(op: str, *tensors: Tensor | None) -> None:
    """Raise unless ``op``, whose work torch does not see, gets tensors it may work on.

    ``RuntimeError`` inside ``torch.func`` transforms, whose tensors have no memory of their own;
    ``NotImplementedError`` where a tensor carries a forward-mode tangent, which would be lost.
    """
    if torch.compiler.is_compiling():
        return
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{op} must run outside of torch.func transforms (vmap, grad, jvp); for vmap it has an "
            "axis of tickets"
        )
    if forward_ad._current_level >= 0 and any(
        tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None
        for tensor in tensors
    ):
        raise NotImplementedError(
            f"{op} has no forward-mode derivative: its tensors must carry no tangent"
        )
