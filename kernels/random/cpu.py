"""Philox4x32-10 in Numba: scalars to inline into fused kernels, then the batched ops.

`philox` is one block of four 32-bit words. The `fill_*` functions write one ticket's row; fused
kernels call them (or `philox` itself) and so draw exactly what the ops draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..compiling import njit
from ..threads import count_threads, share

_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_1 = np.uint64(0xCD9E8D57)
_WEYL_0 = np.uint32(0x9E3779B9)
_WEYL_1 = np.uint32(0xBB67AE85)
_HALF = np.uint64(32)
_UNIFORM_UNIT = np.float32(2.0**-24)
_WORD_UNIT = 2.0**-32
_RADIX_BITS = 8
_RADIX = 1 << _RADIX_BITS
_PASSES = 4
# Work per element, in the units of `count_threads`.
_WORK = 64


@njit(cache=True, forceinline=True)
def philox(c0, c1, c2, c3, k0, k1):
    """Four random words of one counter and key; everything is uint32."""
    for _ in range(10):
        product_0 = _MULTIPLIER_0 * np.uint64(c0)
        product_1 = _MULTIPLIER_1 * np.uint64(c2)
        c0 = np.uint32(np.uint32(product_1 >> _HALF) ^ c1 ^ k0)
        c2 = np.uint32(np.uint32(product_0 >> _HALF) ^ c3 ^ k1)
        c1 = np.uint32(product_1)
        c3 = np.uint32(product_0)
        k0 = np.uint32(k0 + _WEYL_0)
        k1 = np.uint32(k1 + _WEYL_1)
    return c0, c1, c2, c3


@njit(cache=True, forceinline=True)
def _block(block, key, stream, step):
    """Words ``4 * block ... 4 * block + 3`` of a draw; key and step are int64."""
    return philox(
        np.uint32(block),
        np.uint32(step),
        np.uint32(step >> 32),
        np.uint32(stream),
        np.uint32(key),
        np.uint32(key >> 32),
    )


@njit(cache=True)
def fill_words(out, key, stream, step):
    """Write the raw words of a draw to ``out [n]``, any integer dtype of 32 bits or more."""
    n = out.shape[0]
    full = n // 4
    for block in range(full):
        a, b, c, d = _block(block, key, stream, step)
        out[4 * block] = a
        out[4 * block + 1] = b
        out[4 * block + 2] = c
        out[4 * block + 3] = d
    words = _block(full, key, stream, step)
    for i in range(4 * full, n):
        out[i] = words[i - 4 * full]


@njit(cache=True, forceinline=True)
def _to_uniform(word):
    return np.float32(word >> np.uint32(8)) * _UNIFORM_UNIT


@njit(cache=True)
def fill_uniform(out, key, stream, step):
    """Write uniforms in ``[0, 1)`` to ``out [n]`` float32."""
    n = out.shape[0]
    full = n // 4
    for block in range(full):
        a, b, c, d = _block(block, key, stream, step)
        out[4 * block] = _to_uniform(a)
        out[4 * block + 1] = _to_uniform(b)
        out[4 * block + 2] = _to_uniform(c)
        out[4 * block + 3] = _to_uniform(d)
    words = _block(full, key, stream, step)
    for i in range(4 * full, n):
        out[i] = _to_uniform(words[i - 4 * full])


@njit(cache=True, forceinline=True)
def _box_muller(first, second):
    radius = math.sqrt(-2.0 * math.log((np.float64(first) + 1.0) * _WORD_UNIT))
    angle = 2.0 * math.pi * (np.float64(second) * _WORD_UNIT)
    return np.float32(radius * math.cos(angle)), np.float32(radius * math.sin(angle))


@njit(cache=True)
def fill_normal(out, key, stream, step):
    """Write standard normals to ``out [n]`` float32."""
    n = out.shape[0]
    for block in range((n + 3) // 4):
        a, b, c, d = _block(block, key, stream, step)
        w, x = _box_muller(a, b)
        y, z = _box_muller(c, d)
        values = (w, x, y, z)
        for i in range(min(4, n - 4 * block)):
            out[4 * block + i] = values[i]


@njit(cache=True)
def fill_permutation(out, words, index_scratch, words_scratch, key, stream, step):
    """Write the permutation of a draw to ``out [n]`` int32: the stable argsort of its words.

    A radix sort from the lowest digit, eight bits a pass. All three scratch rows have length n
    and are overwritten: ``words`` and ``words_scratch`` uint32, ``index_scratch`` int32.
    """
    n = out.shape[0]
    fill_words(words, key, stream, step)
    begin = np.zeros((_PASSES, _RADIX), np.int32)
    for i in range(n):
        out[i] = i
        word = words[i]
        for digit in range(_PASSES):
            begin[digit, (word >> np.uint32(_RADIX_BITS * digit)) & np.uint32(_RADIX - 1)] += 1
    for digit in range(_PASSES):
        total = 0
        for value in range(_RADIX):
            count = begin[digit, value]
            begin[digit, value] = total
            total += count

    source, source_words, target, target_words = out, words, index_scratch, words_scratch
    for digit in range(_PASSES):
        shift = np.uint32(_RADIX_BITS * digit)
        for i in range(n):
            word = source_words[i]
            value = (word >> shift) & np.uint32(_RADIX - 1)
            place = begin[digit, value]
            begin[digit, value] = place + 1
            target[place] = source[i]
            target_words[place] = word
        source, target = target, source
        source_words, target_words = target_words, source_words


@njit(cache=True)
def pick(probs, u):
    """Index drawn from ``probs [A]`` by ``u``, both float32; -1 where they are no distribution."""
    total = np.float32(0.0)
    last = -1
    for a in range(probs.shape[0]):
        if not probs[a] >= np.float32(0.0):
            return -1
        total += probs[a]
        if probs[a] > np.float32(0.0):
            last = a
    if last < 0 or not total < np.inf or not (np.float32(0.0) <= u < np.float32(1.0)):
        return -1
    threshold = u * total
    cumulative = np.float32(0.0)
    for a in range(probs.shape[0]):
        cumulative += probs[a]
        if threshold < cumulative:
            return a
    return last


@njit(cache=True)
def _bits_row(thread, ticket, out, key, stream, step):
    fill_words(out[ticket], key[ticket], stream, step[ticket])


@njit(cache=True, nogil=True)
def _bits(threads, out, key, stream, step):
    share(_bits_row, threads, out.shape[0], (out, key, stream, step))


@njit(cache=True)
def _uniform_row(thread, ticket, out, key, stream, step):
    fill_uniform(out[ticket], key[ticket], stream, step[ticket])


@njit(cache=True, nogil=True)
def _uniform(threads, out, key, stream, step):
    share(_uniform_row, threads, out.shape[0], (out, key, stream, step))


@njit(cache=True)
def _normal_row(thread, ticket, out, key, stream, step):
    fill_normal(out[ticket], key[ticket], stream, step[ticket])


@njit(cache=True, nogil=True)
def _normal(threads, out, key, stream, step):
    share(_normal_row, threads, out.shape[0], (out, key, stream, step))


@njit(cache=True)
def _permutation_row(thread, ticket, out, key, stream, step):
    n = out.shape[1]
    index = np.empty((2, n), np.int32)
    words = np.empty((2, n), np.uint32)
    fill_permutation(index[0], words[0], index[1], words[1], key[ticket], stream, step[ticket])
    for i in range(n):
        out[ticket, i] = index[0, i]


@njit(cache=True, nogil=True)
def _permutation(threads, out, key, stream, step):
    share(_permutation_row, threads, out.shape[0], (out, key, stream, step))


@njit(cache=True)
def _categorical(out, probs, u):
    refused = -1
    for row in range(out.shape[0]):
        out[row] = pick(probs[row], u[row])
        if out[row] < 0 and refused < 0:
            refused = row
    return refused


def _draw(
    kernel: Callable, dtype: torch.dtype, key: Tensor, n: int, stream: int, step: int | Tensor
) -> Tensor:
    out = torch.empty((key.shape[0], n), dtype=dtype, device="cpu")
    step = torch.as_tensor(step, dtype=torch.int64, device="cpu").expand_as(key).contiguous()
    threads = count_threads(len(out), _WORK * out.numel())
    kernel(threads, out.numpy(), key.numpy(), stream, step.numpy())
    return out


def bits(key: Tensor, n: int, stream: int, step: int | Tensor) -> Tensor:
    """Words ``[P, n]`` int64 of each ticket's draw."""
    return _draw(_bits, torch.int64, key, n, stream, step)


def uniform(key: Tensor, n: int, stream: int, step: int | Tensor) -> Tensor:
    """Uniforms ``[P, n]`` float32 in ``[0, 1)``."""
    return _draw(_uniform, torch.float32, key, n, stream, step)


def normal(key: Tensor, n: int, stream: int, step: int | Tensor) -> Tensor:
    """Standard normals ``[P, n]`` float32."""
    return _draw(_normal, torch.float32, key, n, stream, step)


def permutation(key: Tensor, n: int, stream: int, step: int | Tensor) -> Tensor:
    """Permutations ``[P, n]`` int64 of ``0 ... n - 1``."""
    return _draw(_permutation, torch.int64, key, n, stream, step)


def categorical(probs: Tensor, u: Tensor) -> tuple[Tensor, int]:
    """Indices ``[rows]`` int64 for ``probs [rows, A]``, and the first refused row or -1."""
    out = torch.empty(u.shape, dtype=torch.int64, device="cpu")
    return out, _categorical(out.numpy(), probs.numpy(), u.numpy())
