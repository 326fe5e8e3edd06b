"""Argument checks shared by the ops: clear exceptions, never an assert."""

from __future__ import annotations

import operator
from typing import NoReturn

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Raise ``ValueError`` unless ``tensor`` has exactly the shape ``expected``."""
    if tensor.shape != expected:
        refuse_shape(name, tensor, expected)


def check_dtype(name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    """Raise ``TypeError`` unless the dtype of ``tensor`` is one of ``allowed``."""
    if tensor.dtype not in allowed:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(f"{name} must be {names}, got {str(tensor.dtype).removeprefix('torch.')}")


def check_tensor(
    name: str, tensor: Tensor, shape: tuple[int | str, ...], *dtypes: torch.dtype, like: Tensor
) -> None:
    """Raise unless ``tensor`` is as an op takes it.

    Args:
        name: of the argument.
        tensor: what was given.
        shape: of it: sizes, and words for those that may be any.
        dtypes: of which it has one.
        like: a tensor on its device.

    Raises:
        TypeError: another dtype.
        ValueError: another shape or device.
    """
    if tensor.shape != shape and not _fits(tensor.shape, shape):
        refuse_shape(name, tensor, shape)
    if tensor.dtype not in dtypes:
        check_dtype(name, tensor, *dtypes)
    if tensor.device != like.device:
        check_device(name, tensor, like)


def refuse_shape(name: str, tensor: Tensor, shape: tuple[int | str, ...]) -> NoReturn:
    """Raise `check_tensor`'s ``ValueError`` where ``shape`` says more than it can check."""
    expected = ", ".join(map(str, shape)) + "," * (len(shape) == 1)
    raise ValueError(f"{name} must have shape ({expected}), got {tuple(tensor.shape)}")


def _fits(given: torch.Size, shape: tuple[int | str, ...]) -> bool:
    return len(given) == len(shape) and all(
        isinstance(wanted, str) or size == wanted for size, wanted in zip(given, shape, strict=True)
    )


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


def check_density(density: float) -> None:
    """Raise ``ValueError`` unless ``density`` is in [0, 1]."""
    if not 0.0 <= density <= 1.0:
        raise ValueError(f"density must be in [0, 1], got {density}")


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
