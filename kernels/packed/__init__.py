"""Packed weights of a population: only what is on the mask, in one copy for every product.

At a high sparsity most bytes of a population's training step are pruned weights, their gradients
and their moments. Packed, a ticket keeps k values, one bit a weight and a count a tile (`layout`);
`linear_packed` multiplies by them without a dense weight in memory, and its gradient arrives packed
as well, so an optimiser passes over k entries::

    pattern = build_pattern(mask, arena.prunable_layers(), width=k)
    values = pack(weight, pattern)                       # [P, k]
    y = linear_packed(x, values, pattern, 0, bias)       # layer 0
    (gradient,) = torch.autograd.grad(y.sum(), values)   # [P, k]

Autograd's gradient by `values` covers all layers: every call's is zero outside its own layer, and
autograd adds them up. A hand-written backward pass spares the additions: `write_gradient_` fills
one layer's entries of a buffer, and the norm's partial sums on the way::

    write_gradient_(gradient, dy, x, pattern, 0, squares=squares)
    adam_(values, gradient, m, v, step, lr, None, count=pattern.count, norm_partials=squares)

The format is a GPU's, whose memory it spares: elsewhere plain torch unpacks for every product.
A pattern is a snapshot. A mask that changes needs a new one, and values packed anew.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import Plan, resolve_backend
from ..errors import check_density, check_device, check_integer, check_untransformed
from ..linear import PRECISIONS, check_precision, under_autocast
from . import registration
from .checks import check_values
from .layout import PackedLayer, PackedPattern, build_pattern

__all__ = [
    "PRECISIONS",
    "PackedLayer",
    "PackedPattern",
    "build_pattern",
    "linear_packed",
    "pack",
    "plan",
    "unpack",
    "write_gradient_",
]


def linear_packed(
    x: Tensor,
    values: Tensor,
    pattern: PackedPattern,
    layer: int,
    bias: Tensor | None = None,
    *,
    precision: str = "ieee",
) -> Tensor:
    """``y[p] = x[p] w[p]ᵀ + bias[p]`` by one layer of packed weights.

    Differentiable any number of times in reverse mode, traceable by ``torch.compile``, and under
    autocast computed in its dtype. All inputs may be strided or expanded.

    Args:
        x: ``[P, B, I]`` float32, float64, float16 or bfloat16; halves accumulate in float32.
        values: ``[P, k]``, dtype of `x`: of all layers, see `pack`.
        pattern: where they lie.
        layer: which of ``pattern.layers``; its ``inp`` is I, its ``out`` is O.
        bias: ``[P, O]``, dtype of `x`, or None.
        precision: ``ieee``, ``tf32`` or ``tf32x3``: float32 products of the Triton backend. Other
            backends follow torch's own setting. On a GPU tf32x3 is the quicker way to float32's
            accuracy: it runs on tensor cores, ``ieee`` cannot.

    Returns:
        ``[P, B, O]``, dtype of `x`.

    Raises:
        TypeError: a dtype is not as above, or the pattern is no `PackedPattern`.
        ValueError: a shape, a device, the layer or the precision is not as above.
        RuntimeError: from the backward pass, if an input was changed in place in between.
        NotImplementedError: from forward-mode differentiation.
    """
    _check_pattern(pattern)
    check_device("x", x, pattern.bits)
    x, values, bias = under_autocast(x, values, bias)
    check_values("values", values, pattern.bits, pattern.width)
    # Before torch sees them, which takes no other types.
    check_precision(precision)
    layer = check_integer("layer", layer, 0, len(pattern.layers))
    return registration.LINEAR(
        x, values, pattern.bits, pattern.start, bias, pattern.shapes, layer, precision
    )


def pack(dense: Tensor, pattern: PackedPattern) -> Tensor:
    """The entries on the mask, in tile order; differentiable, the transpose of `unpack`.

    Args:
        dense: ``[P, N or more]`` float32, float64, float16 or bfloat16: rows of the arena. What
            lies beyond N is left out.
        pattern: of the mask.

    Returns:
        ``[P, k]``; zero beyond each ticket's count.

    Raises:
        TypeError: a dtype is not as above, or the pattern is no `PackedPattern`.
        ValueError: a shape or a device is not as above.
    """
    _check_pattern(pattern)
    return registration.PACK(dense, pattern.bits, pattern.start, pattern.shapes, pattern.width)


def unpack(values: Tensor, pattern: PackedPattern) -> Tensor:
    """Dense weights, exactly zero off the mask; differentiable, the transpose of `pack`.

    Args:
        values: ``[P, k]`` float32, float64, float16 or bfloat16.
        pattern: of the mask.

    Returns:
        ``[P, N]``, dtype of `values`.

    Raises:
        TypeError: a dtype is not as above, or the pattern is no `PackedPattern`.
        ValueError: a shape or a device is not as above.
    """
    _check_pattern(pattern)
    check_values("values", values, pattern.bits, pattern.width)
    return registration.UNPACK(values, pattern.bits, pattern.start, pattern.shapes)


def write_gradient_(
    gradient: Tensor,
    dy: Tensor,
    x: Tensor,
    pattern: PackedPattern,
    layer: int,
    *,
    precision: str = "ieee",
    squares: Tensor | None = None,
) -> None:
    """One layer's entries of the gradient by the values, ``dyᵀ x`` on the mask; no autograd.

    For hand-written backward passes: all layers fill one buffer, and nothing is cleared or added.

    Args:
        gradient: ``[P, k]``, contiguous, dtype of `x`; only the layer's entries are written.
        dy: ``[P, B, O]``, dtype of `x`.
        x: ``[P, B, I]`` float32, float64, float16 or bfloat16.
        pattern: of the mask.
        layer: which of ``pattern.layers``.
        precision: see `linear_packed`.
        squares: ``[P, tiles]`` float32 or float64, contiguous, or None: is given the sum of squares
            of each of the layer's tiles. Once every layer has written, ``squares.sum(1)`` is the
            squared norm of the gradient, without a pass over it.

    Raises:
        TypeError: a dtype is not as above, or the pattern is no `PackedPattern`.
        ValueError: a shape, a stride, a device, the layer or the precision is not as above; or a
            tensor that is written shares memory with another.
        NotImplementedError: from forward-mode differentiation.
    """
    _check_pattern(pattern)
    check_values("gradient", gradient, pattern.bits, pattern.width)
    check_precision(precision)
    layer = check_integer("layer", layer, 0, len(pattern.layers))
    check_untransformed("write_gradient_", gradient, dy, x, squares)
    registration.WRITE(
        gradient.detach(),
        dy.detach(),
        x.detach(),
        pattern.bits,
        pattern.start,
        pattern.shapes,
        layer,
        precision,
        None if squares is None else squares.detach(),
    )


def plan(
    out: int, inp: int, batch: int, density: float, dtype: torch.dtype, device: torch.device | str
) -> Plan:
    """What `linear_packed` does with such inputs now, and why.

    Args:
        out: O.
        inp: I.
        batch: B, rows per ticket.
        density: share of the weights on the mask.
        dtype: of `x` and the values.
        device: where they live.

    Raises:
        ValueError: the density is not in [0, 1], or the chosen backend cannot run on the device.
    """
    check_density(density)
    device = torch.device(device)
    backend = registration.choose(device, dtype)
    if backend == "triton":
        reason = "tiles expanded in registers, no dense weight or gradient in memory"
        return Plan("linear_packed", backend, "packed", reason)
    reason = "unpacked for every product, then torch's dense product"
    if resolve_backend(device) == "triton":
        reason += ": the kernels know float32 and halves"
    return Plan("linear_packed", backend, "dense", reason)


def _check_pattern(pattern: PackedPattern) -> None:
    if not isinstance(pattern, PackedPattern):
        raise TypeError(f"pattern must be a PackedPattern, got {type(pattern).__name__}")
