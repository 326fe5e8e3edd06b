"""Random numbers that depend on a key and a counter, on nothing else: Philox4x32-10.

Each ticket has its own 64-bit key. Element ``i`` of a draw is word ``i % 4`` of the block whose
counter is ``(i // 4, step & 0xffffffff, step >> 32, stream)``; the low half of the key is key word
0. So a draw is the same on every backend and whatever tickets share the batch, its first elements
do not depend on its length, and resuming needs only the step number. The step may be a tensor on
the key's device: a CUDA graph replays integers as they were captured.

`bits`, `uniform`, `permutation` and `integers` are equal bit for bit on every backend. `normal` is
Box-Muller in float64 rounded once to float32: equal up to the libraries' logarithm, sine and
cosine, a difference of at most one unit in the last place plus 1e-15 near zeros of the sine.
"""

from __future__ import annotations

import hashlib
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from ..dispatch import implementation
from ..errors import check_tensor, refuse_shape
from ..registration import declare

__all__ = [
    "Stream",
    "bits",
    "categorical",
    "derive_key",
    "integers",
    "normal",
    "permutation",
    "uniform",
]


class Stream(IntEnum):
    """What a draw is for: draws of the same key and step on different streams are independent."""

    INIT = 0
    RESET = 1
    ACTION = 2
    MINIBATCH = 3
    EVAL_RESET = 4
    EVAL_ACTION = 5
    MASK = 6
    PERMUTE = 7
    DATASET_RESET = 8
    DATASET_ACTION = 9
    NOISE = 10
    EVAL_NOISE = 11
    EXPLORE = 12
    UPDATE_ACTION = 13


def derive_key(*parts: str | int) -> int:
    """A key from what names it, e.g. ``derive_key("CartPole-v1", "ppo", seed, condition, level)``.

    The first 8 bytes of BLAKE2b over the parts, each written with its type and length, so that
    ``("ab", "c")``, ``("a", "bc")`` and ``("1",)``, ``(1,)`` all differ.

    Returns:
        A signed 64-bit integer.

    Raises:
        TypeError: a part is neither a string nor an integer.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, str | int):
            raise TypeError(f"parts must be str or int, got {part!r}")
        tag = "s" if isinstance(part, str) else "i"
        text = str(part).encode() if isinstance(part, str) else str(int(part)).encode()
        digest.update(f"{tag}{len(text)}:".encode() + text)
    return int.from_bytes(digest.digest(), "little", signed=True)


def bits(key: Tensor, n: int, *, stream: int, step: int | Tensor) -> Tensor:
    """Raw words of a draw.

    Args:
        key: ``[P]`` int64.
        n: words per ticket, below 2^31.
        stream: a `Stream`, or any integer in ``[0, 2^32)``.
        step: number of the draw within its stream, in ``[0, 2^63)``: one integer, or an int64
            tensor ``[]`` or ``[P]`` on the key's device, whose values are not looked at.

    Returns:
        ``[P, n]`` int64 in ``[0, 2^32)``.

    Raises:
        TypeError: `key` or `step` is not int64, or `n` or `stream` no integer.
        ValueError: `key` is not 1-D, `n`, `stream` or `step` out of range, or the shape or device
            of `step` does not fit.
    """
    return _draw("bits", key, n, stream, step)


def uniform(key: Tensor, n: int, *, stream: int, step: int | Tensor) -> Tensor:
    """Uniforms in ``[0, 1)``: multiples of 2^-24, the upper 24 bits of each word.

    Args:
        key: ``[P]`` int64.
        n: numbers per ticket.
        stream: see `bits`.
        step: see `bits`.

    Returns:
        ``[P, n]`` float32.

    Raises:
        TypeError, ValueError: see `bits`.
    """
    return _draw("uniform", key, n, stream, step)


def normal(key: Tensor, n: int, *, stream: int, step: int | Tensor) -> Tensor:
    """Standard normals by Box and Muller: elements 2j and 2j + 1 from words 2j and 2j + 1.

    Args:
        key: ``[P]`` int64.
        n: numbers per ticket.
        stream: see `bits`.
        step: see `bits`.

    Returns:
        ``[P, n]`` float32.

    Raises:
        TypeError, ValueError: see `bits`.
    """
    return _draw("normal", key, n, stream, step)


def permutation(key: Tensor, n: int, *, stream: int, step: int | Tensor) -> Tensor:
    """Permutations of ``0 ... n - 1``: the stable argsort of the draw's words.

    Args:
        key: ``[P]`` int64.
        n: length.
        stream: see `bits`.
        step: see `bits`.

    Returns:
        ``[P, n]`` int64.

    Raises:
        TypeError, ValueError: see `bits`.
    """
    return _draw("permutation", key, n, stream, step)


def integers(key: Tensor, n: int, high: int, *, stream: int, step: int | Tensor) -> Tensor:
    """Integers in ``[0, high)``: ``word * high >> 32``; no value is likelier by more than 2^-32.

    Args:
        key: ``[P]`` int64.
        n: numbers per ticket.
        high: exclusive upper bound, in ``[1, 2^31]``.
        stream: see `bits`.
        step: see `bits`.

    Returns:
        ``[P, n]`` int64.

    Raises:
        TypeError, ValueError: see `bits`, and `high` out of range.
    """
    if not isinstance(high, int):
        raise TypeError(f"high must be an int, got {high!r}")
    if not 1 <= high <= 2**31:
        raise ValueError(f"high must be in [1, 2**31], got {high}")
    return (bits(key, n, stream=stream, step=step) * high) >> 32


def categorical(probs: Tensor, u: Tensor) -> Tensor:
    """Indices drawn by inverting the cumulative distribution.

    The float32 sums run in index order on every backend. The result is the first index whose
    cumulative sum exceeds ``u * total``, or, where rounding leaves none, the last index with a
    probability above zero: an index of probability zero is never drawn.

    Args:
        probs: ``[..., A]`` float32, at least zero; need not sum to one.
        u: ``[...]`` float32 in ``[0, 1)``.

    Returns:
        ``[...]`` int64.

    Raises:
        TypeError: an argument is not float32.
        ValueError: the shapes do not fit, or a row of `probs` has a NaN, a negative value or a
            sum that is zero or infinite, or `u` lies outside ``[0, 1)``. On a GPU values are not
            looked at, since that would wait for them; indices stay in ``[0, A)``.
    """
    return torch.ops.sparse_tickets.random_categorical(probs.detach(), u.detach())


def _draw(op: str, key: Tensor, n: int, stream: int, step: int | Tensor) -> Tensor:
    """Check the numbers, of which torch takes others, and call the registered op."""
    _check_int("n", n, 31)
    _check_int("stream", stream, 32)
    if not isinstance(step, Tensor):
        _check_int("step", step, 63)
    packet = getattr(torch.ops.sparse_tickets, f"random_{op}")
    # By name: for an overload that takes an integer torch would fetch the tensor from the device.
    draw = packet.on_device if isinstance(step, Tensor) else packet.default
    return draw(key, n, int(stream), step)


def _check_int(name: str, value: int, limit: int) -> None:
    if not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if not 0 <= value < 1 << limit:
        raise ValueError(f"{name} must be in [0, 2**{limit}), got {value}")


# Whoever calls an op by its name has passed no other check; kernels read memory by these shapes.


def _check_key(key: Tensor, step: int | Tensor) -> None:
    check_tensor("key", key, ("P",), torch.int64, like=key)
    if isinstance(step, Tensor):
        check_tensor("step", step, key.shape if step.dim() else (), torch.int64, like=key)


def _check_categorical(probs: Tensor, u: Tensor) -> None:
    if probs.dim() < 1 or probs.shape[-1] < 1:
        refuse_shape("probs", probs, ("...", "A >= 1"))
    check_tensor("probs", probs, probs.shape, torch.float32, like=probs)
    check_tensor("u", u, probs.shape[:-1], torch.float32, like=probs)


def _declare_draw(op: str, dtype: torch.dtype) -> None:
    """As one op for steps that are integers and one for those on a device."""
    for overload, kind in (("", "int"), (".on_device", "Tensor")):

        def draw(key: Tensor, n: int, stream: int, step: Any) -> Tensor:
            _check_key(key, step)
            kernels = implementation(__name__, key.device)
            return getattr(kernels, op)(key.contiguous(), n, stream, step)

        def fake(key: Tensor, n: int, stream: int, step: Any) -> Tensor:
            _check_key(key, step)
            return key.new_empty((key.shape[0], n), dtype=dtype)

        draw.__annotations__["step"] = kind
        declare(f"random_{op}{overload}", draw, fake, symbolic=True)


def _categorical(probs: Tensor, u: Tensor) -> Tensor:
    _check_categorical(probs, u)
    rows = probs.reshape(-1, probs.shape[-1]).contiguous()
    index, refused = implementation(__name__, probs.device).categorical(
        rows, u.reshape(-1).contiguous()
    )
    if refused >= 0:
        raise ValueError(
            "probs must be >= 0 with a finite sum above 0, and u in [0, 1), got "
            f"probs={rows[refused].tolist()}, u={u.reshape(-1)[refused].item()} in row {refused}"
        )
    return index.view(u.shape)


def _categorical_fake(probs: Tensor, u: Tensor) -> Tensor:
    _check_categorical(probs, u)
    return u.new_empty(u.shape, dtype=torch.int64)


_declare_draw("bits", torch.int64)
_declare_draw("uniform", torch.float32)
_declare_draw("normal", torch.float32)
_declare_draw("permutation", torch.int64)
declare("random_categorical", _categorical, _categorical_fake)
