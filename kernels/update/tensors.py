"""Adam, SGD and RMSprop in one pass over many tensors of any shape, for `sparse_tickets.optim`.

Everything is read where it lies, by address: a small policy's six tensors take a few microseconds,
which as torch operations are a hundred times their arithmetic. A tensor with a mask is updated on
its support: entry by entry from a list where little is kept, otherwise whole, with zeros selected.
Tensors are cut into chunks by their size alone, and norms are summed chunk by chunk in order, so
results do not depend on the number of threads. Per entry 4 bytes each of weight, gradient and
every moment, read and (but the gradient) written.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numba import carray, types

from ..addresses import find_machine_code, pointer
from ..compiling import njit
from ..threads import share
from ..vector import LANES, fma, gather, load, scatter, splat, store
from .cpu import blend

# Columns of a tensor's row: addresses (0: there is none), the entries it has and updates, the row
# of its group's numbers, whether its momentum starts with this step, and the address of memory for
# its gradient on the support: clipping reads it there first.
(
    PARAM, GRAD, FIRST, SECOND, THIRD, STEP, SUPPORT, MASK, SIZE, LENGTH, GROUP, FRESH, PICKED,
    PLACES,
) = range(14)  # fmt: skip
NUMBERS = 8
"""Numbers per group, in the order in which an optimiser's kernel names them."""

CHUNK = 8192
"""Entries of a tensor that one thread updates at a time."""

WORK = 16
"""Work per entry, in the units of `count_threads`."""

_BLOCK = 256
_SUMS = 32


@njit
def _floats(address, size):
    return carray(pointer(address), (size,), np.float32)


@njit
def _integers(address, rows, columns):
    return carray(pointer(address), (rows, columns), np.int64)


def _make_update(entry: Callable, first: bool, second: bool, third: bool) -> Callable:
    """``entry(w, g, a, b, c, k) -> (w, a, b, c)`` on a chunk of a tensor, three ways.

    Moments that are not there read as zero and are not written.
    """
    zero = np.float32(0.0)

    @njit(error_model="numpy")
    def update_listed(w, g, is_picked, a, b, c, position, k):
        buffer = np.empty((5, _BLOCK), np.float32)
        w_, g_, a_, b_, c_ = buffer[0], buffer[1], buffer[2], buffer[3], buffer[4]
        for begin in range(0, position.size, _BLOCK):
            at = position[begin : begin + _BLOCK]
            whole = at.size // LANES * LANES
            for j in range(0, whole, LANES):
                store(w_, j, gather(w, 0, at, j))
                store(g_, j, load(g, begin + j) if is_picked else gather(g, 0, at, j))
                store(a_, j, gather(a, 0, at, j) if first else splat(zero))
                store(b_, j, gather(b, 0, at, j) if second else splat(zero))
                store(c_, j, gather(c, 0, at, j) if third else splat(zero))
            for j in range(whole, at.size):
                i = np.uint32(at[j])
                w_[j], g_[j] = w[i], g[begin + j] if is_picked else g[i]
                a_[j] = a[i] if first else zero
                b_[j] = b[i] if second else zero
                c_[j] = c[i] if third else zero
            for j in range(at.size):
                w_[j], a_[j], b_[j], c_[j] = entry(w_[j], g_[j], a_[j], b_[j], c_[j], k)
            for j in range(0, whole, LANES):
                scatter(w, 0, at, j, load(w_, j))
                if first:
                    scatter(a, 0, at, j, load(a_, j))
                if second:
                    scatter(b, 0, at, j, load(b_, j))
                if third:
                    scatter(c, 0, at, j, load(c_, j))
            for j in range(whole, at.size):
                i = np.uint32(at[j])
                w[i] = w_[j]
                if first:
                    a[i] = a_[j]
                if second:
                    b[i] = b_[j]
                if third:
                    c[i] = c_[j]

    @njit(error_model="numpy")
    def update_masked(w, g, a, b, c, mask, k):
        for i in range(w.size):
            new, x, y, z = entry(
                w[i], g[i], a[i] if first else zero, b[i] if second else zero,
                c[i] if third else zero, k,
            )  # fmt: skip
            keep = mask[i]
            w[i] = new if keep else zero
            if first:
                a[i] = x if keep else zero
            if second:
                b[i] = y if keep else zero
            if third:
                c[i] = z if keep else zero

    @njit(error_model="numpy")
    def update_all(w, g, a, b, c, k):
        for i in range(w.size):
            new, x, y, z = entry(
                w[i], g[i], a[i] if first else zero, b[i] if second else zero,
                c[i] if third else zero, k,
            )  # fmt: skip
            w[i] = new
            if first:
                a[i] = x
            if second:
                b[i] = y
            if third:
                c[i] = z

    @njit(error_model="numpy")
    def update(place, begin, end, clips, k):
        size = place[SIZE]
        w, g = _floats(place[PARAM], size), _floats(place[GRAD], size)
        a = _floats(place[FIRST], size) if first else w
        b = _floats(place[SECOND], size) if second else w
        c = _floats(place[THIRD], size) if third else w
        if place[SUPPORT]:
            position = carray(pointer(place[SUPPORT]), (place[LENGTH],), np.int32)
            if clips:
                g = _floats(place[PICKED], place[LENGTH])[begin:end]
            update_listed(w, g, clips, a, b, c, position[begin:end], k)
        elif place[MASK]:
            mask = carray(pointer(place[MASK]), (size,), np.bool_)
            update_masked(
                w[begin:end], g[begin:end], a[begin:end], b[begin:end], c[begin:end],
                mask[begin:end], k,
            )  # fmt: skip
        else:
            update_all(w[begin:end], g[begin:end], a[begin:end], b[begin:end], c[begin:end], k)

    return update


@njit(error_model="numpy")
def _adam_entry(w, g, a, b, c, k):
    sign, decay, shrink, rate1, decay2, rate2, size, inverse_root, eps, _ = k
    w = w * shrink
    g = sign * g + decay * w
    a = blend(a, g, rate1)
    b = b * decay2 + rate2 * (g * g)
    w = w - size * a / (math.sqrt(b) * inverse_root + eps)
    return w, a, b, c


@njit(error_model="numpy")
def _amsgrad_entry(w, g, a, b, c, k):
    sign, decay, shrink, rate1, decay2, rate2, size, inverse_root, eps, _ = k
    w = w * shrink
    g = sign * g + decay * w
    a = blend(a, g, rate1)
    b = b * decay2 + rate2 * (g * g)
    # Not max(): a NaN must not be forgotten.
    c = c if c > b else b
    w = w - size * a / (math.sqrt(c) * inverse_root + eps)
    return w, a, b, c


_adam_update = _make_update(_adam_entry, True, True, False)
_amsgrad_update = _make_update(_amsgrad_entry, True, True, True)


@njit(error_model="numpy")
def _adam_chunk(thread, chunk, chunks, places, numbers, scale, clips):
    place = places[chunks[chunk, 0]]
    if not place[GRAD]:
        return
    lr, beta1, beta2, eps, decay, decoupled, amsgrad, sign = numbers[place[GROUP]]
    count = np.float64(_floats(place[STEP], 1)[0])
    one = np.float32
    k = (
        one(sign * scale),
        one(0.0 if decoupled else decay),
        one(1.0 - lr * decay if decoupled else 1.0),
        one(1.0 - beta1),
        one(beta2),
        one(1.0 - beta2),
        one(lr / (1.0 - beta1**count)),
        one(1.0 / math.sqrt(1.0 - beta2**count)),
        one(eps),
        one(0.0),
    )
    if amsgrad:
        _amsgrad_update(place, chunks[chunk, 1], chunks[chunk, 2], clips, k)
    else:
        _adam_update(place, chunks[chunk, 1], chunks[chunk, 2], clips, k)


@njit(error_model="numpy")
def _plain_entry(w, g, a, b, c, k):
    sign, decay, lr = k[0], k[1], k[2]
    return w - lr * (sign * g + decay * w), a, b, c


@njit(error_model="numpy")
def _momentum_entry(w, g, a, b, c, k):
    sign, decay, lr, momentum, rate, ahead, behind = k[0], k[1], k[2], k[3], k[4], k[5], k[6]
    g = sign * g + decay * w
    a = momentum * a + rate * g
    # Nesterov's direction is g + momentum a, the plain one is a.
    return w - lr * (ahead * g + behind * a), a, b, c


_plain_update = _make_update(_plain_entry, False, False, False)
_momentum_update = _make_update(_momentum_entry, True, False, False)


@njit(error_model="numpy")
def _sgd_chunk(thread, chunk, chunks, places, numbers, scale, clips):
    place = places[chunks[chunk, 0]]
    if not place[GRAD]:
        return
    lr, momentum, dampening, decay, nesterov, sign, _, _ = numbers[place[GROUP]]
    one, zero = np.float32, np.float32(0.0)
    k = (
        one(sign * scale),
        one(decay),
        one(lr),
        one(momentum),
        one(1.0 if place[FRESH] else 1.0 - dampening),
        one(1.0 if nesterov else 0.0),
        one(momentum if nesterov else 1.0),
        zero,
        zero,
        zero,
    )
    if momentum != 0.0:
        _momentum_update(place, chunks[chunk, 1], chunks[chunk, 2], clips, k)
    else:
        _plain_update(place, chunks[chunk, 1], chunks[chunk, 2], clips, k)


@njit(error_model="numpy")
def _rms_entry(w, g, a, b, c, k):
    sign, decay, lr, momentum, decay2, rate2, eps = k[0], k[1], k[2], k[3], k[4], k[5], k[6]
    g = sign * g + decay * w
    a = a * decay2 + rate2 * (g * g)
    b = momentum * b + g / (math.sqrt(a) + eps)
    return w - lr * b, a, b, c


@njit(error_model="numpy")
def _centered_entry(w, g, a, b, c, k):
    sign, decay, lr, momentum, decay2, rate2, eps = k[0], k[1], k[2], k[3], k[4], k[5], k[6]
    g = sign * g + decay * w
    a = a * decay2 + rate2 * (g * g)
    c = c + rate2 * (g - c)
    b = momentum * b + g / (math.sqrt(a - c * c) + eps)
    return w - lr * b, a, b, c


_rms_update = _make_update(_rms_entry, True, False, False)
_rms_momentum_update = _make_update(_rms_entry, True, True, False)
_centered_update = _make_update(_centered_entry, True, False, True)
_centered_momentum_update = _make_update(_centered_entry, True, True, True)


@njit(error_model="numpy")
def _rmsprop_chunk(thread, chunk, chunks, places, numbers, scale, clips):
    place = places[chunks[chunk, 0]]
    if not place[GRAD]:
        return
    lr, alpha, eps, decay, momentum, centered, sign, _ = numbers[place[GROUP]]
    one, zero = np.float32, np.float32(0.0)
    k = (
        one(sign * scale), one(decay), one(lr), one(momentum), one(alpha), one(1.0 - alpha),
        one(eps), zero, zero, zero,
    )  # fmt: skip
    begin, end = chunks[chunk, 1], chunks[chunk, 2]
    if centered:
        if momentum > 0.0:
            _centered_momentum_update(place, begin, end, clips, k)
        else:
            _centered_update(place, begin, end, clips, k)
    elif momentum > 0.0:
        _rms_momentum_update(place, begin, end, clips, k)
    else:
        _rms_update(place, begin, end, clips, k)


@njit(error_model="numpy")
def _square_chunk(thread, chunk, chunks, places, squares):
    """Sum of squares of a chunk's gradient, on the support where there is one, picked there."""
    place = places[chunks[chunk, 0]]
    begin, end = chunks[chunk, 1], chunks[chunk, 2]
    zero = np.float32(0.0)
    squares[chunk] = 0.0
    if not place[GRAD]:
        return
    g = _floats(place[GRAD], place[SIZE])
    sums = np.zeros(_SUMS, np.float32)
    if place[SUPPORT]:
        position = carray(pointer(place[SUPPORT]), (place[LENGTH],), np.int32)
        picked = _floats(place[PICKED], place[LENGTH])
        whole = begin + (end - begin) // LANES * LANES
        total = splat(zero)
        for i in range(begin, whole, LANES):
            value = gather(g, 0, position, i)
            store(picked, i, value)
            total = fma(value, value, total)
        store(sums, 0, total)
        for i in range(whole, end):
            value = picked[i] = g[np.uint32(position[i])]
            sums[LANES + i - whole] = value * value
    elif place[MASK]:
        mask = carray(pointer(place[MASK]), (place[SIZE],), np.bool_)
        for first in range(begin, end, _SUMS):
            for j in range(min(_SUMS, end - first)):
                value = g[first + j] if mask[first + j] else zero
                sums[j] += value * value
    else:
        whole = begin + (end - begin) // _SUMS * _SUMS
        for first in range(begin, whole, _SUMS):
            for j in range(_SUMS):
                sums[j] += g[first + j] * g[first + j]
        for i in range(whole, end):
            sums[i - whole] += g[i] * g[i]
    total = 0.0
    for j in range(_SUMS):
        total += np.float64(sums[j])
    squares[chunk] = total


@njit(error_model="numpy")
def _begin(
    counts, threads, places_at, tensors, numbers_at, groups, chunks_at, parts, squares_at, limit
):
    """Count the step and find the gradient's norm; what chunks take, and the norm."""
    places = _integers(places_at, tensors, PLACES)
    chunks = _integers(chunks_at, parts, 3)
    numbers = carray(pointer(numbers_at), (groups, NUMBERS), np.float64)
    norm, scale = 0.0, 1.0
    if limit >= 0.0:
        squares = carray(pointer(squares_at), (parts,), np.float64)
        share(_square_chunk, threads, parts, (chunks, places, squares))
        for chunk in range(parts):
            norm += squares[chunk]
        norm = math.sqrt(norm)
        scale = limit / (norm + 1e-6)
        # A NaN stays NaN, so that a diverged policy is seen and not trained on.
        scale = 1.0 if scale > 1.0 else scale
    if counts:
        for tensor in range(tensors):
            if places[tensor, STEP]:
                _floats(places[tensor, STEP], 1)[0] += np.float32(1.0)
    return (chunks, places, numbers, scale, limit >= 0.0), norm


@njit(cache=True, nogil=True, error_model="numpy")
def _adam_step(threads, places, tensors, numbers, groups, chunks, parts, squares, limit):
    taken, norm = _begin(
        True, threads, places, tensors, numbers, groups, chunks, parts, squares, limit
    )
    share(_adam_chunk, threads, parts, taken)
    return norm


@njit(cache=True, nogil=True, error_model="numpy")
def _sgd_step(threads, places, tensors, numbers, groups, chunks, parts, squares, limit):
    taken, norm = _begin(
        False, threads, places, tensors, numbers, groups, chunks, parts, squares, limit
    )
    share(_sgd_chunk, threads, parts, taken)
    return norm


@njit(cache=True, nogil=True, error_model="numpy")
def _rmsprop_step(threads, places, tensors, numbers, groups, chunks, parts, squares, limit):
    taken, norm = _begin(
        True, threads, places, tensors, numbers, groups, chunks, parts, squares, limit
    )
    share(_rmsprop_chunk, threads, parts, taken)
    return norm


_STEPS = {"adam": _adam_step, "sgd": _sgd_step, "rmsprop": _rmsprop_step}
_SIGNATURE = (types.int64,) * 8 + (types.float64,)


def compiled(name: str) -> Callable[..., float]:
    """The step of ``adam``, ``sgd`` or ``rmsprop`` without Numba's dispatch, which takes as long.

    It takes the number of threads, then address and number of rows of the tensors ``[n, PLACES]``,
    of the numbers ``[groups, NUMBERS]``, of the chunks (`cut`), the address of a float64 per chunk,
    and the largest norm of all gradients together, negative for no clipping.
    """
    _STEPS[name].compile(_SIGNATURE)
    return _STEPS[name].get_overload(_SIGNATURE)


def address(name: str) -> int:
    """Where the machine code of that step begins."""
    return find_machine_code(_STEPS[name], _SIGNATURE)


def cut(lengths: list[int]) -> np.ndarray:
    """``[chunks, 3]`` int64: tensor, begin and end in its entries, of every `CHUNK`."""
    rows = [
        (tensor, begin, min(begin + CHUNK, length))
        for tensor, length in enumerate(lengths)
        for begin in range(0, length, CHUNK)
    ]
    return np.array(rows, np.int64).reshape(-1, 3)


@njit(cache=True)
def find_support(mask):
    """Positions ``[kept]`` int32 of the entries that a flat mask keeps."""
    position = np.empty(np.sum(mask), np.int32)
    count = 0
    for i in range(mask.size):
        if mask[i]:
            position[count] = i
            count += 1
    return position
