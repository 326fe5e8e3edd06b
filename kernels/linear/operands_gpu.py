"""What the Triton products of a layer share: limits of their operands and grids, and their sums."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor


def check_spans(**operands: Tensor | None) -> None:
    """Raise ``ValueError`` unless 32 bits address every entry of one ticket's matrix."""
    for name, matrices in operands.items():
        if matrices is None:
            continue
        _, rows, cols = matrices.shape
        _, row_stride, col_stride = matrices.stride()
        if rows * row_stride + cols * col_stride >= 2**31:
            raise ValueError(
                f"one ticket's {name} operand must span fewer than 2**31 elements, "
                f"got shape {tuple(matrices.shape[1:])} with strides {matrices.stride()[1:]}"
            )


def grid(programs: int) -> tuple[int]:
    """Of so many programs; raises ``ValueError`` where a GPU takes no such number."""
    if programs >= 2**31:
        raise ValueError(f"the product must take fewer than 2**31 tiles, got {programs}")
    return (programs,)


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """In which products of a dtype are added up."""
    return tl.float64 if dtype == torch.float64 else tl.float32
