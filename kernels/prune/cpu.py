"""Exact-k pruning in Numba: a radix select over the bits of the scores, one ticket per thread.

Four passes of eight bits (eight for float64) find the k-th largest score without sorting: each
counts the candidates by digit, and only those with the digit in question stay candidates.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..compiling import njit
from ..threads import count_threads, share

# Work per entry, in the units of `count_threads`.
_WORK = 256


def _ordered_image(scores: Tensor, magnitude: bool) -> Tensor:
    """Signed integers in the order of the floats; adding 0.0 makes -0.0 and 0.0 one."""
    integer = torch.int32 if scores.dtype == torch.float32 else torch.int64
    limit = torch.iinfo(integer)
    if magnitude:
        return scores.view(integer) & limit.max
    bits = (scores + 0.0).view(integer)
    return bits ^ ((bits >> (limit.bits - 1)) & limit.max)


@njit(cache=True)
def _kth_largest(keys, count, k, bits):
    """The k-th largest of ``keys[:count]``, and how many equal to it are among the k largest.

    Overwrites `keys`; needs ``1 <= k <= count``.
    """
    digits = np.empty(256, np.int64)
    for shift in range(bits - 8, -1, -8):
        # Of a signed number the top digit counts from -128.
        sign = 128 if shift == bits - 8 else 0
        digits[:] = 0
        for i in range(count):
            digits[((keys[i] >> shift) & 255) ^ sign] += 1
        digit = 255
        while digits[digit] < k:
            k -= digits[digit]
            digit -= 1
        kept = 0
        for i in range(count):
            if ((keys[i] >> shift) & 255) ^ sign == digit:
                keys[kept] = keys[i]
                kept += 1
        count = kept
    return keys[0], k


@njit(cache=True)
def _prune_row(thread, ticket, keys, mask, k, bits, out):
    key, inside, kept = keys[ticket], mask[ticket], out[ticket]
    kept[:] = False
    candidates = np.empty(key.shape[0], np.int64)
    count = 0
    for i in range(key.shape[0]):
        if inside[i]:
            candidates[count] = key[i]
            count += 1
    wanted = min(k[ticket], count)
    if wanted > 0:
        threshold, ties = _kth_largest(candidates, count, wanted, bits)
        for i in range(key.shape[0]):
            if inside[i]:
                if key[i] > threshold:
                    kept[i] = True
                elif key[i] == threshold and ties > 0:
                    kept[i] = True
                    ties -= 1


@njit(cache=True, nogil=True)
def _prune_rows(threads, keys, mask, k, bits, out):
    share(_prune_row, threads, mask.shape[0], (keys, mask, k, bits, out))


def prune(scores: Tensor, mask: Tensor, k: Tensor, magnitude: bool = False) -> Tensor:
    out = torch.empty_like(mask)
    keys = _ordered_image(scores, magnitude).contiguous()
    bits = torch.iinfo(keys.dtype).bits
    threads = count_threads(len(mask), _WORK * mask.numel())
    _prune_rows(threads, keys.numpy(), mask.numpy(), k.numpy(), bits, out.numpy())
    return out
