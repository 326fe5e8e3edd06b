"""What the updates refuse, and with which words."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import check_tensor, refuse_shape
from ..memory import check_separate

__all__ = [
    "PARTIALS_LIMIT",
    "check_count",
    "check_like",
    "check_max_norm",
    "check_partials",
    "check_range",
    "check_rewind_separate",
    "check_rows",
]

PARTIALS_LIMIT = 8192
"""Partial sums a row's norm may come in: on a GPU every program of the row adds them up."""


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


def check_count(count: Tensor | None, mask: Tensor | None, weight: Tensor) -> None:
    """Valid entries per row; values are not looked at, and every backend cuts them to the row."""
    if count is None:
        return
    if mask is not None:
        raise ValueError("count must be None where a mask is given: a row is packed or masked")
    check_tensor("count", count, (len(weight),), torch.int64, like=weight)


def check_partials(partials: Tensor | None, weight: Tensor) -> None:
    """Sums of squares that together make each row's squared norm."""
    if partials is None:
        return
    shape = (len(weight), f"1 to {PARTIALS_LIMIT}")
    check_tensor("norm_partials", partials, shape, weight.dtype, like=weight)
    if not 1 <= partials.shape[1] <= PARTIALS_LIMIT:
        refuse_shape("norm_partials", partials, shape)


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
