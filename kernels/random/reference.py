"""Philox4x32-10 in plain torch, the truth every backend equals bit for bit.

Words are held in int64. A product of two 32-bit words needs 64 bits and may wrap to a negative
number, but wraps to the right bits, so that a shift and a mask still give its two halves.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four random words of four counter words and two key words: int64 holding 32 bits each."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product_0, product_1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0 = ((product_1 >> 32) & _MASK) ^ c1 ^ k0
        c2 = ((product_0 >> 32) & _MASK) ^ c3 ^ k1
        c1, c3 = product_1 & _MASK, product_0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def bits(key: Tensor, n: int, stream: int, step: int | Tensor) -> Tensor:
    """Words ``[P, n]`` int64 of each ticket's draw."""
    block = torch.arange((n + 3) // 4, device=key.device).expand(key.shape[0], -1)
    number = torch.as_tensor(step, dtype=torch.int64, device=key.device).reshape(-1, 1)
    low, high = (number & _MASK).expand_as(block), ((number >> 32) & _MASK).expand_as(block)
    tag = torch.full_like(block, stream)
    key_words = (key[:, None] & _MASK, (key[:, None] >> 32) & _MASK)
    return torch.stack(philox((block, low, high, tag), key_words), -1).flatten(1)[:, :n].clone()


def uniform(key: Tensor, n: int, stream: int, step: int | Tensor) -> Tensor:
    """Uniforms ``[P, n]`` float32 in ``[0, 1)``: the upper 24 bits of each word."""
    return (bits(key, n, stream, step) >> 8).float() * 2.0**-24


def normal(key: Tensor, n: int, stream: int, step: int | Tensor) -> Tensor:
    """Standard normals ``[P, n]`` float32 by Box and Muller, computed in float64."""
    first, second = bits(key, n + n % 2, stream, step).unflatten(1, (-1, 2)).double().unbind(-1)
    radius = (-2.0 * ((first + 1.0) * 2.0**-32).log()).sqrt()
    angle = 2.0 * math.pi * (second * 2.0**-32)
    pairs = torch.stack((radius * angle.cos(), radius * angle.sin()), -1)
    return pairs.flatten(1)[:, :n].float()


def permutation(key: Tensor, n: int, stream: int, step: int | Tensor) -> Tensor:
    """Permutations ``[P, n]`` int64: the stable argsort of the words."""
    return bits(key, n, stream, step).argsort(dim=1, stable=True)


def categorical(probs: Tensor, u: Tensor) -> tuple[Tensor, int]:
    """Indices ``[rows]`` int64 for ``probs [rows, A]``, and the first refused row or -1."""
    total = torch.zeros_like(u)
    cumulative = torch.empty_like(probs)
    for action in range(probs.shape[1]):
        total = total + probs[:, action]
        cumulative[:, action] = total
    accepted = (probs >= 0).all(1) & (total > 0) & (total < math.inf) & (u >= 0) & (u < 1)
    refused = (~accepted).nonzero()
    above = (u * total)[:, None] < cumulative
    last = probs.shape[1] - 1 - (probs > 0).flip(1).int().argmax(1)
    out = torch.where(above.any(1), above.int().argmax(1), last)
    return out, int(refused[0]) if len(refused) else -1
