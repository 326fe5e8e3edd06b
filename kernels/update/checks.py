"""What the updates refuse, and with which words."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import check_tensor, refuse_shape
from ..memory import check_separate


def check_rows(mask: Tensor | None, **rows: Tensor) -> None:
    """Rows that an op writes: alike, contiguous, and at least as long as the mask."""
    weight = rows["weight"]
    check_tensor("weight", weight, ("P", "T"), torch.float32, torch.float64, like=weight)
    for name, tensor in rows.items():
        check_like(name, tensor, weight)
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    if mask is None:
        return
    shape = (len(weight), f"N <= {weight.shape[1]}")
    check_tensor("mask", mask, shape, torch.bool, like=weight)
    if mask.shape[1] > weight.shape[1]:
        refuse_shape("mask", mask, shape)


def check_like(name: str, tensor: Tensor, weight: Tensor) -> None:
    """A tensor of one number per weight."""
    check_tensor(name, tensor, weight.shape, weight.dtype, like=weight)


def check_range(name: str, value: float, holds: bool, allowed: str) -> None:
    """A number for which ``holds`` is True, or the message says what is allowed."""
    if not holds:
        raise ValueError(f"{name} must be {allowed}, got {value}")


def check_max_norm(max_norm: float | None) -> float:
    """The limit as a number: None is infinite."""
    if max_norm is None:
        return math.inf
    check_range("max_norm", max_norm, max_norm > 0, "> 0 or None")
    return float(max_norm)


def check_rewind_separate(
    weight: Tensor,
    initial: Tensor,
    m: Tensor,
    v: Tensor,
    initial_m: Tensor | None,
    initial_v: Tensor | None,
    **read: Tensor | None,
) -> None:
    """What is written shares no memory, but a row may be rewound to itself: that only masks it."""
    sources = {
        name: source
        for name, source, target in (
            ("initial", initial, weight),
            ("initial_m", initial_m, m),
            ("initial_v", initial_v, v),
        )
        if source is not None and source.data_ptr() != target.data_ptr()
    }
    check_separate({"weight": weight, "m": m, "v": v}, {**sources, **read})
