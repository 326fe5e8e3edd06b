"""The k largest magnitudes of several weights together, without a copy of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce

import torch
from torch import Tensor

__all__ = ["keep_largest"]

_BLOCK = 1 << 18
_DIGIT = 16


@torch.no_grad()
def keep_largest(weights: Sequence[Tensor], masks: Sequence[Tensor], k: int) -> list[Tensor]:
    """Masks that keep exactly ``min(k, kept)`` weights: the largest of all by magnitude.

    A radix select as in `kernels.prune`, but over blocks of rows: ranked where they lie, in the
    widest of the weights' dtypes, without a copy of all of them.

    Args:
        weights: matrices of any floating dtype, device and stride, without NaN inside the masks.
        masks: which of their entries may be kept, bool; each like its weight.
        k: entries to keep in all.

    Returns:
        One mask per weight; ties keep the earlier weight and the lower position.
    """
    if k >= sum(int(mask.count_nonzero()) for mask in masks):
        return [mask.clone(memory_format=torch.contiguous_format) for mask in masks]
    kept = [torch.zeros_like(mask, memory_format=torch.contiguous_format) for mask in masks]
    if k == 0:
        return kept
    dtype = reduce(torch.promote_types, (weight.dtype for weight in weights), torch.float32)
    threshold, ties = _kth_largest(weights, masks, k, dtype)
    for weight, mask, out in zip(weights, masks, kept, strict=True):
        for rows, key in _keys(weight, mask, dtype):
            equal = key == threshold
            among = int(equal.sum())
            if among > ties:
                equal &= (equal.flatten().cumsum(0) <= ties).view_as(equal)
            ties -= min(ties, among)
            out[rows] = (key > threshold) | equal
    return kept


def _kth_largest(
    weights: Sequence[Tensor], masks: Sequence[Tensor], k: int, dtype: torch.dtype
) -> tuple[int, int]:
    """The key of the k-th largest, and how many of those equal to it are among the k largest."""
    prefix = 0
    for shift in range(torch.finfo(dtype).bits - _DIGIT, -1, -_DIGIT):
        count = torch.zeros(1 << _DIGIT, dtype=torch.int64, device="cpu")
        for weight, mask in zip(weights, masks, strict=True):
            for _, key in _keys(weight, mask, dtype):
                # Twice, because a shift by all of an integer's bits is undefined.
                digit = key[key >> shift >> _DIGIT == prefix] >> shift & ((1 << _DIGIT) - 1)
                count += digit.bincount(minlength=1 << _DIGIT).cpu()
        above = count.flip(0).cumsum(0)
        place = int((above < k).sum())
        k -= int(above[place - 1]) if place else 0
        prefix = prefix << _DIGIT | ((1 << _DIGIT) - 1 - place)
    return prefix, k


def _keys(weight: Tensor, mask: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows as integers in the order of the magnitudes, -1 off the mask."""
    height = max(1, _BLOCK // max(1, weight.shape[1]))
    integer = torch.int32 if dtype == torch.float32 else torch.int64
    for start in range(0, weight.shape[0], height):
        rows = slice(start, start + height)
        key = weight[rows].to(dtype).abs().view(integer)
        yield rows, key.masked_fill_(~mask[rows], -1)
