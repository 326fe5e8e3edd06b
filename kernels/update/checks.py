"""What the updates refuse, and with which words."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import check_device, check_dtype, check_shape
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
    "check_vector",
]

PARTIALS_LIMIT = 8192
"""Partial sums a row's norm may come in: on a GPU every program of the row adds them up."""


def check_rows(mask: Tensor | None, **rows: Tensor) -> None:
    """Rows that an op writes: alike, contiguous, and at least as long as the mask."""
    weight = rows["weight"]
    if weight.ndim != 2:
        raise ValueError(f"weight must have shape [P, T], got {tuple(weight.shape)}")
    check_dtype("weight", weight, torch.float32, torch.float64)
    for name, tensor in rows.items():
        check_like(name, tensor, weight)
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    if mask is None:
        return
    check_dtype("mask", mask, torch.bool)
    check_device("mask", mask, weight)
    if mask.ndim != 2 or mask.shape[0] != weight.shape[0] or mask.shape[1] > weight.shape[1]:
        raise ValueError(
            f"mask must have shape [{weight.shape[0]}, N] with N <= {weight.shape[1]}, "
            f"got {tuple(mask.shape)}"
        )


def check_like(name: str, tensor: Tensor, weight: Tensor) -> None:
    """A tensor of one number per weight."""
    check_shape(name, tensor, tuple(weight.shape))
    check_dtype(name, tensor, weight.dtype)
    check_device(name, tensor, weight)


def check_vector(name: str, tensor: Tensor, weight: Tensor, *dtypes: torch.dtype) -> None:
    """A tensor of one number per ticket."""
    check_shape(name, tensor, (weight.shape[0],))
    check_dtype(name, tensor, *dtypes)
    check_device(name, tensor, weight)


def check_count(count: Tensor | None, mask: Tensor | None, weight: Tensor) -> None:
    """Valid entries per row; values are not looked at, and every backend cuts them to the row."""
    if count is None:
        return
    if mask is not None:
        raise ValueError("count must be None where a mask is given: a row is packed or masked")
    check_vector("count", count, weight, torch.int64)


def check_partials(partials: Tensor | None, weight: Tensor) -> None:
    """Sums of squares that together make each row's squared norm."""
    if partials is None:
        return
    check_dtype("norm_partials", partials, weight.dtype)
    check_device("norm_partials", partials, weight)
    tickets = weight.shape[0]
    fits = partials.ndim == 2 and 1 <= partials.shape[1] <= PARTIALS_LIMIT
    if not fits or partials.shape[0] != tickets:
        raise ValueError(
            f"norm_partials must have shape [{tickets}, parts], parts in [1, {PARTIALS_LIMIT}], "
            f"got {tuple(partials.shape)}"
        )


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
