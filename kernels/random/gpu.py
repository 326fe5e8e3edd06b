"""Philox4x32-10 in Triton: `philox` to call from other kernels, then the ops.

A program of `_draw_kernel` makes ``4 * BLOCK`` words of one ticket: 10 rounds of two 32 x 32 bit
products for every 16 bytes written, so the draw is bound by arithmetic, not by memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..examples import Example, meta
from ..jit import jit_kernel

_BLOCK = 256
_ROWS = 128


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Four random words of one counter and key; everything is uint32, scalars or blocks."""
    for _ in tl.static_range(10):
        product_0 = c0.to(tl.uint64) * 0xD2511F53
        product_1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product_1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (product_0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = product_1.to(tl.uint32)
        c3 = product_0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def box_muller(first, second):
    """Two float32 standard normals of two words, computed in float64."""
    radius = tl.sqrt(-2.0 * tl.log((first.to(tl.float64) + 1.0) * 2.0**-32))
    angle = 6.283185307179586 * (second.to(tl.float64) * 2.0**-32)
    return (radius * tl.cos(angle)).to(tl.float32), (radius * tl.sin(angle)).to(tl.float32)


@jit_kernel(
    fp_fusion=True, do_not_specialize=["n", "step_low", "step_high", "stream", "step_stride"]
)
def _draw_kernel(
    key_pointer,  # [P]
    out_pointer,  # [P, n], written
    n,
    step_low,
    step_high,
    stream,
    step_pointer,  # [P], or one step for all, or None
    step_stride,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``4 * BLOCK`` elements of a ticket's draw; the step as two words, or behind a pointer."""
    chunks = tl.cdiv(n, 4 * BLOCK)
    ticket = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    key = tl.load(key_pointer + ticket)
    block = chunk * BLOCK + tl.arange(0, BLOCK)  # [block], four words each
    zero = tl.zeros([BLOCK], tl.uint32)
    low, high = step_low, step_high
    if step_pointer is not None:
        step = tl.load(step_pointer + ticket * step_stride)
        low, high = step, step >> 32
    a, b, c, d = philox(
        block.to(tl.uint32),
        zero + low.to(tl.uint32),
        zero + high.to(tl.uint32),
        zero + stream.to(tl.uint32),
        zero + key.to(tl.uint32),
        zero + (key >> 32).to(tl.uint32),
    )
    if KIND == "bits":
        w, x, y, z = a.to(tl.int64), b.to(tl.int64), c.to(tl.int64), d.to(tl.int64)
    elif KIND == "uniform":
        w = (a >> 8).to(tl.float32) * 2.0**-24
        x = (b >> 8).to(tl.float32) * 2.0**-24
        y = (c >> 8).to(tl.float32) * 2.0**-24
        z = (d >> 8).to(tl.float32) * 2.0**-24
    else:
        w, x = box_muller(a, b)
        y, z = box_muller(c, d)
    # (w, x, y, z) side by side: element 4 * block + word.
    values = tl.reshape(tl.join(tl.join(w, y), tl.join(x, z)), [4 * BLOCK])
    element = chunk.to(tl.int64) * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    tl.store(out_pointer + ticket * n + element, values, mask=element < n)


@triton.jit
def pick(probs_pointer, u, ACTIONS: tl.constexpr, inside):
    """Index drawn from the ``ACTIONS`` float32 at each of ``probs_pointer`` by uniforms ``u``."""
    total = tl.zeros_like(u)  # [rows]
    for action in range(ACTIONS):
        total += tl.load(probs_pointer + action, mask=inside, other=1.0)
    threshold = u * total
    cumulative = tl.zeros_like(u)
    index = tl.zeros_like(u).to(tl.int64)
    found = index
    for action in range(ACTIONS):
        probability = tl.load(probs_pointer + action, mask=inside, other=1.0)
        cumulative += probability
        index = tl.where((found == 0) & (probability > 0.0), action, index)
        found = tl.where(threshold < cumulative, 1, found)
    return index


@jit_kernel(fp_fusion=True, do_not_specialize=["rows"])
def _categorical_kernel(
    probs_pointer, u_pointer, out_pointer, rows, ACTIONS: tl.constexpr, ROWS: tl.constexpr
):
    # Of ``probs [rows, ACTIONS]`` and ``u [rows]``.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    inside = row < rows
    u = tl.load(u_pointer + row, mask=inside, other=0.0)
    tl.store(out_pointer + row, pick(probs_pointer + row * ACTIONS, u, ACTIONS, inside), inside)


def _signed(word: int) -> int:
    """A 32-bit word as the int32 of the same bits: one kernel signature for every step."""
    return (word & 0xFFFFFFFF) - ((word & 0x80000000) << 1)


def _draw(
    kind: str, dtype: torch.dtype, key: Tensor, n: int, stream: int, step: int | Tensor
) -> Tensor:
    tickets = key.shape[0]
    out = torch.empty((tickets, n), dtype=dtype, device=key.device)
    if out.numel():
        grid = (triton.cdiv(n, 4 * _BLOCK) * tickets,)
        if isinstance(step, Tensor):
            low, high, pointer, stride = 0, 0, step, step.stride(0) if step.ndim else 0
        else:
            low, high, pointer, stride = _signed(step), _signed(step >> 32), None, 0
        with torch.cuda.device_of(key):
            _draw_kernel[grid](
                key, out, n, low, high, _signed(stream), pointer, stride, KIND=kind, BLOCK=_BLOCK
            )
    return out


def bits(key: Tensor, n: int, stream: int, step: int | Tensor) -> Tensor:
    """Words ``[P, n]`` int64 of each ticket's draw."""
    return _draw("bits", torch.int64, key, n, stream, step)


def uniform(key: Tensor, n: int, stream: int, step: int | Tensor) -> Tensor:
    """Uniforms ``[P, n]`` float32 in ``[0, 1)``."""
    return _draw("uniform", torch.float32, key, n, stream, step)


def normal(key: Tensor, n: int, stream: int, step: int | Tensor) -> Tensor:
    """Standard normals ``[P, n]`` float32."""
    return _draw("normal", torch.float32, key, n, stream, step)


def permutation(key: Tensor, n: int, stream: int, step: int | Tensor) -> Tensor:
    """Permutations ``[P, n]`` int64 of ``0 ... n - 1``, by torch's stable sort of our words."""
    return bits(key, n, stream, step).argsort(dim=1, stable=True)


def categorical(probs: Tensor, u: Tensor) -> tuple[Tensor, int]:
    """Indices ``[rows]`` int64 for ``probs [rows, A]``, and -1: to refuse would mean to wait."""
    out = torch.empty(u.shape, dtype=torch.int64, device=u.device)
    rows = u.shape[0]
    if rows:
        grid = (triton.cdiv(rows, _ROWS),)
        with torch.cuda.device_of(u):
            _categorical_kernel[grid](probs, u, out, rows, ACTIONS=probs.shape[1], ROWS=_ROWS)
    return out, -1


def _draw_example(draw: Callable[..., Tensor], *, on_device: bool = False) -> None:
    key = meta(2, dtype=torch.int64)
    draw(key, 9, 7, key if on_device else 5)


EXAMPLES = [
    *(Example(draw.__name__, partial(_draw_example, draw)) for draw in (bits, uniform, normal)),
    Example("uniform_step_on_device", partial(_draw_example, uniform, on_device=True)),
    Example("three", lambda: categorical(meta(9, 3), meta(9))),
]
