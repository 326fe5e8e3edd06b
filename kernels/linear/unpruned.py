"""A layer of which nothing is pruned: torch's own linear, for as long as that is so.

Autograd's nodes are torch's own too. One in Python, which would keep the mask as a saved tensor,
costs as much as a small layer; a hook on torch's node looks at the mask instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from .masking import keeps_all

_PLAIN = (Tensor, Parameter)


class Unpruned:
    """A full mask ``[O, I]`` made ready: every call and every backward pass looks whether it is.

    Args:
        mask: contiguous bool on the CPU, all True; referred to, not copied.
    """

    __slots__ = ("_at", "_check", "_count", "_inp", "_mask")

    def __init__(self, mask: Tensor) -> None:
        self._mask, self._at = mask, mask.data_ptr()
        self._count, self._inp = mask.numel(), mask.shape[1]
        self._check = _make_check(mask)

    def __call__(self, input: Tensor, weight: Any, bias: Tensor | None, mask: Any) -> Tensor | None:
        """``input weightᵀ + bias``, or None where something is pruned or not plain.

        Args:
            input: ``[..., I]``.
            weight: the layer's weight as it is now.
            bias: ``[O]`` or None.
            mask: the layer's mask as it is now.
        """
        shape = input.shape
        if (
            type(input) not in _PLAIN
            or type(weight) not in _PLAIN
            or not shape
            or shape[-1] != self._inp
            or not self.is_full(mask)
        ):
            return None
        output = F.linear(input, weight, bias)
        if weight.requires_grad and output.requires_grad:
            output.grad_fn.register_prehook(self._check)  # type: ignore[union-attr]
        return output

    def is_full(self, mask: Tensor) -> bool:
        """Whether nothing is pruned: the mask is the one prepared, and keeps everything."""
        return (
            mask is self._mask
            and mask.data_ptr() == self._at
            and mask.is_contiguous()
            and keeps_all(self._at, self._count)
        )

    fits = is_full


def _make_check(mask: Tensor) -> Callable[[Any], None]:
    """A hook that raises where the mask is no longer what it was: a function, called fastest."""
    at, count = mask.data_ptr(), mask.numel()

    def check(_: Any) -> None:
        if mask.data_ptr() != at or not keeps_all(at, count):
            raise RuntimeError(
                "mask must not change between forward and backward, got one that pruned nothing "
                "then and is another now: prune after the optimiser's step"
            )

    return check
