"""What the Triton products ask of their operands."""

from __future__ import annotations

from torch import Tensor

__all__ = ["check_span"]


def check_span(name: str, matrices: Tensor | None) -> None:
    """Raise ``ValueError`` unless 32 bits address every entry of one ticket's matrix."""
    if matrices is None:
        return
    _, rows, cols = matrices.shape
    _, row_stride, col_stride = matrices.stride()
    if rows * row_stride + cols * col_stride >= 2**31:
        raise ValueError(
            f"one ticket's {name} operand must span fewer than 2**31 elements, "
            f"got shape {tuple(matrices.shape[1:])} with strides {matrices.stride()[1:]}"
        )
