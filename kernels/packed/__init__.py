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

A pattern is a snapshot. A mask that changes needs a new one, and values packed anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import Library

from ..dispatch import Backend, Plan, resolve_backend, use_backend
from ..errors import (
    check_device,
    check_dtype,
    check_integer,
    check_shape,
    check_untransformed,
)
from ..memory import check_separate, mark_written
from . import reference
from .layout import Layer, Pattern, build_pattern, lay_out

__all__ = [
    "PRECISIONS",
    "Layer",
    "Pattern",
    "build_pattern",
    "linear_packed",
    "pack",
    "plan",
    "unpack",
    "write_gradient_",
]

PRECISIONS = ("ieee", "tf32", "tf32x3")
"""How a GPU multiplies float32: exactly, rounded to 10 bits of mantissa, or as three of these."""

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def linear_packed(
    x: Tensor,
    values: Tensor,
    pattern: Pattern,
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
        TypeError: a dtype is not as above, or the pattern is no `Pattern`.
        ValueError: a shape, a device, the layer or the precision is not as above.
        RuntimeError: from the backward pass, if an input was changed in place in between.
        NotImplementedError: from forward-mode differentiation.
    """
    _check_pattern(pattern)
    check_device("x", x, pattern.bits)
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, values = _autocast(x, dtype), _autocast(values, dtype)
        bias = None if bias is None else _autocast(bias, dtype)
    place = _check_product(values, pattern, layer, precision)
    _check_batch("x", x, values, place.inp)
    if bias is not None:
        check_shape("bias", bias, (pattern.tickets, place.out))
        check_dtype("bias", bias, x.dtype)
        check_device("bias", bias, x)
    return _LINEAR(x, values, pattern.bits, pattern.start, bias, pattern.shapes, layer, precision)


def pack(dense: Tensor, pattern: Pattern) -> Tensor:
    """The entries on the mask, in tile order; differentiable, the transpose of `unpack`.

    Args:
        dense: ``[P, N or more]`` float32, float64, float16 or bfloat16: rows of the arena. What
            lies beyond N is left out.
        pattern: of the mask.

    Returns:
        ``[P, k]``; zero beyond each ticket's count.

    Raises:
        TypeError: a dtype is not as above, or the pattern is no `Pattern`.
        ValueError: a shape or a device is not as above.
    """
    _check_pattern(pattern)
    if dense.dim() != 2 or dense.shape[0] != pattern.tickets or dense.shape[1] < pattern.size:
        raise ValueError(
            f"dense must have shape ({pattern.tickets}, {pattern.size} or more), "
            f"got {tuple(dense.shape)}"
        )
    check_dtype("dense", dense, *_DTYPES)
    check_device("dense", dense, pattern.bits)
    return _PACK(dense, pattern.bits, pattern.start, pattern.shapes, pattern.width)


def unpack(values: Tensor, pattern: Pattern) -> Tensor:
    """Dense weights, exactly zero off the mask; differentiable, the transpose of `pack`.

    Args:
        values: ``[P, k]`` float32, float64, float16 or bfloat16.
        pattern: of the mask.

    Returns:
        ``[P, N]``, dtype of `values`.

    Raises:
        TypeError: a dtype is not as above, or the pattern is no `Pattern`.
        ValueError: a shape or a device is not as above.
    """
    _check_values(values, pattern)
    return _UNPACK(values, pattern.bits, pattern.start, pattern.shapes)


def write_gradient_(
    gradient: Tensor,
    dy: Tensor,
    x: Tensor,
    pattern: Pattern,
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
        TypeError: a dtype is not as above, or the pattern is no `Pattern`.
        ValueError: a shape, a stride, a device, the layer or the precision is not as above; or a
            tensor that is written shares memory with another.
        NotImplementedError: from forward-mode differentiation.
    """
    place = _check_product(gradient, pattern, layer, precision, "gradient")
    _check_batch("x", x, gradient, place.inp)
    _check_batch("dy", dy, gradient, place.out)
    check_shape("dy", dy, (pattern.tickets, x.shape[1], place.out))
    targets = {"gradient": gradient}
    if squares is not None:
        check_shape("squares", squares, (pattern.tickets, pattern.start.shape[1] - 1))
        check_dtype("squares", squares, torch.float32, torch.float64)
        check_device("squares", squares, x)
        targets["squares"] = squares
    for name, target in targets.items():
        if not target.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {target.stride()}")
    check_untransformed("write_gradient_", gradient, dy, x, squares)
    check_separate(targets, {"dy": dy, "x": x})
    _WRITE(
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
    if not 0 <= density <= 1:
        raise ValueError(f"density must be in [0, 1], got {density}")
    device = torch.device(device)
    backend = _backend(device, dtype)
    if backend == "triton":
        reason = "tiles expanded in registers, no dense weight or gradient in memory"
        return Plan("linear_packed", backend, "packed", reason)
    if backend == "cpu":
        from ..linear import cpu

        inner = cpu.plan(out, inp, batch, density, dtype)
        reason = f"unpacked for every product, then as linear: {inner.reason}"
        return Plan("linear_packed", backend, inner.format, reason)
    reason = "unpacked for every product, then torch's dense product"
    if resolve_backend(device) != "reference":
        reason += ": the kernels know float32 and, on a GPU, halves"
    return Plan("linear_packed", backend, "dense", reason)


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast as torch's autocast does, which leaves float64 alone."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


def _check_pattern(pattern: Pattern) -> None:
    if not isinstance(pattern, Pattern):
        raise TypeError(f"pattern must be a Pattern, got {type(pattern).__name__}")


def _check_values(values: Tensor, pattern: Pattern, name: str = "values") -> None:
    _check_pattern(pattern)
    check_shape(name, values, (pattern.tickets, pattern.width))
    check_dtype(name, values, *_DTYPES)
    check_device(name, values, pattern.bits)


def _check_product(
    values: Tensor, pattern: Pattern, layer: int, precision: str, name: str = "values"
) -> Layer:
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    _check_values(values, pattern, name)
    return pattern.layers[check_integer("layer", layer, 0, len(pattern.layers))]


def _check_batch(name: str, tensor: Tensor, values: Tensor, features: int) -> None:
    """``[P, B, features]`` of the values' dtype, where they live."""
    if tensor.dim() != 3 or (tensor.shape[0], tensor.shape[2]) != (values.shape[0], features):
        raise ValueError(
            f"{name} must have shape ({values.shape[0]}, B, {features}), got {tuple(tensor.shape)}"
        )
    check_dtype(name, tensor, values.dtype)
    check_device(name, tensor, values)


def _backend(device: torch.device, dtype: torch.dtype) -> Backend:
    backend = resolve_backend(device)
    if backend == "cpu" and dtype not in (torch.float32, torch.float64):
        return "reference"
    return "reference" if backend == "triton" and dtype == torch.float64 else backend


# Registration. The three products are each the derivative of the other two, as `linear`'s; a
# product reads only the values of its own layer, so theirs need no masking. Packing and unpacking
# are each the derivative of the other.

_library = Library("sparse_tickets", "FRAGMENT")
_PATTERN = "Tensor bits, Tensor start"
_library.define(
    f"linear_packed(Tensor x, Tensor values, {_PATTERN}, Tensor? bias, int[] shapes, int layer, "
    "str precision) -> Tensor"
)
_library.define(
    f"linear_packed_dx(Tensor dy, Tensor values, {_PATTERN}, int[] shapes, int layer, "
    "str precision) -> Tensor"
)
_library.define(
    f"linear_packed_dw(Tensor dy, Tensor x, {_PATTERN}, int[] shapes, int layer, int width, "
    "str precision) -> Tensor"
)
_library.define(f"pack(Tensor dense, {_PATTERN}, int[] shapes, int width) -> Tensor")
_library.define(f"unpack(Tensor values, {_PATTERN}, int[] shapes) -> Tensor")
_library.define(
    f"write_gradient_(Tensor(a!) gradient, Tensor dy, Tensor x, {_PATTERN}, int[] shapes, "
    "int layer, str precision, Tensor(b!)? squares) -> ()"
)
_LINEAR = torch.ops.sparse_tickets.linear_packed.default
_DX = torch.ops.sparse_tickets.linear_packed_dx.default
_DW = torch.ops.sparse_tickets.linear_packed_dw.default
_PACK = torch.ops.sparse_tickets.pack.default
_UNPACK = torch.ops.sparse_tickets.unpack.default
_WRITE = torch.ops.sparse_tickets.write_gradient_.default


def _forward(
    x: Tensor,
    values: Tensor,
    bits: Tensor,
    start: Tensor,
    bias: Tensor | None,
    shapes: list[int],
    layer: int,
    precision: str,
) -> Tensor:
    place = lay_out(*shapes)[layer]
    backend = _backend(x.device, x.dtype)
    if backend == "triton":
        from . import gpu

        return gpu.forward(x, values, bits, start, bias, place, precision)
    if backend == "cpu":
        from . import cpu

        return cpu.forward(x, values, bits, start, bias, place)
    return reference.forward(x, values, bits, start, bias, place)


def _dx(
    dy: Tensor,
    values: Tensor,
    bits: Tensor,
    start: Tensor,
    shapes: list[int],
    layer: int,
    precision: str,
) -> Tensor:
    place = lay_out(*shapes)[layer]
    backend = _backend(dy.device, dy.dtype)
    if backend == "triton":
        from . import gpu

        return gpu.dx(dy, values, bits, start, place, precision)
    if backend == "cpu":
        from . import cpu

        return cpu.dx(dy, values, bits, start, place)
    return reference.dx(dy, values, bits, start, place)


def _dw(
    dy: Tensor,
    x: Tensor,
    bits: Tensor,
    start: Tensor,
    shapes: list[int],
    layer: int,
    width: int,
    precision: str,
) -> Tensor:
    gradient = x.new_zeros(x.shape[0], width)
    _write(gradient, dy, x, bits, start, lay_out(*shapes)[layer], precision, None)
    return gradient


def _write(
    gradient: Tensor,
    dy: Tensor,
    x: Tensor,
    bits: Tensor,
    start: Tensor,
    place: Layer,
    precision: str,
    squares: Tensor | None,
) -> None:
    backend = _backend(x.device, x.dtype)
    if backend == "triton":
        from . import gpu

        gpu.dw(gradient, dy, x, bits, start, place, precision, squares)
    elif backend == "cpu":
        from . import cpu

        cpu.dw(gradient, dy, x, bits, start, place, squares)
    else:
        reference.dw(gradient, dy, x, bits, start, place, squares)


def _write_gradient(
    gradient: Tensor,
    dy: Tensor,
    x: Tensor,
    bits: Tensor,
    start: Tensor,
    shapes: list[int],
    layer: int,
    precision: str,
    squares: Tensor | None,
) -> None:
    _write(gradient, dy, x, bits, start, lay_out(*shapes)[layer], precision, squares)
    mark_written(gradient, *(() if squares is None else (squares,)))


def _pack(dense: Tensor, bits: Tensor, start: Tensor, shapes: list[int], width: int) -> Tensor:
    layers = lay_out(*shapes)
    backend = _backend(dense.device, dense.dtype)
    if backend == "triton":
        from . import gpu

        return gpu.pack(dense, bits, start, layers, width)
    if backend == "cpu":
        from . import cpu

        return cpu.pack(dense, bits, start, layers, width)
    return reference.pack(dense, bits, start, layers, width)


def _unpack(values: Tensor, bits: Tensor, start: Tensor, shapes: list[int]) -> Tensor:
    layers, size = lay_out(*shapes), _size(shapes)
    backend = _backend(values.device, values.dtype)
    if backend == "triton":
        from . import gpu

        return gpu.unpack(values, bits, start, layers, size)
    if backend == "cpu":
        from . import cpu

        return cpu.unpack(values, bits, start, layers, size)
    return reference.unpack(values, bits, start, layers, size)


def _size(shapes: list[int]) -> int:
    return sum(layer.out * layer.inp for layer in lay_out(*shapes))


class _Differentiable(torch.autograd.Function):
    """An op with its tensors saved, but for a bias; subclasses say what its derivative is.

    The backward pass runs on the backend of the forward pass: on a GPU it is another thread, which
    does not see `use_backend`.
    """

    saved = slice(4)

    @classmethod
    def forward(cls, ctx: Any, op: Any, *args: Any) -> Tensor:
        ctx.backend = resolve_backend(args[0].device)
        ctx.args = [arg for arg in args if not isinstance(arg, Tensor)]
        ctx.shape = args[0].shape
        # The pattern too: autograd then raises if it is changed before the backward pass.
        ctx.save_for_backward(*args[cls.saved])
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        raise NotImplementedError(
            "sparse_tickets' packed ops have no forward-mode derivative; use reverse mode "
            "(backward, torch.autograd.grad)"
        )


class _Linear(_Differentiable):
    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, values, bits, start = ctx.saved_tensors
        shapes, layer, precision = ctx.args[-3:]
        needs = ctx.needs_input_grad
        dx = dvalues = None
        with use_backend(ctx.backend):
            if needs[1]:
                dx = _DX(dy, values, bits, start, shapes, layer, precision)
            if needs[2]:
                dvalues = _DW(dy, x, bits, start, shapes, layer, values.shape[1], precision)
        return None, dx, dvalues, None, None, dy.sum(1) if needs[5] else None, None, None, None


class _LinearDX(_Differentiable):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dy, values, bits, start = ctx.saved_tensors
        shapes, layer, precision = ctx.args
        ddy = dvalues = None
        with use_backend(ctx.backend):
            if ctx.needs_input_grad[1]:
                ddy = _LINEAR(grad, values, bits, start, None, shapes, layer, precision)
            if ctx.needs_input_grad[2]:
                dvalues = _DW(dy, grad, bits, start, shapes, layer, values.shape[1], precision)
        return None, ddy, dvalues, None, None, None, None, None


class _LinearDW(_Differentiable):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dy, x, bits, start = ctx.saved_tensors
        shapes, layer, _, precision = ctx.args
        ddy = dx = None
        with use_backend(ctx.backend):
            if ctx.needs_input_grad[1]:
                ddy = _LINEAR(x, grad, bits, start, None, shapes, layer, precision)
            if ctx.needs_input_grad[2]:
                dx = _DX(dy, grad, bits, start, shapes, layer, precision)
        return None, ddy, dx, None, None, None, None, None, None


class _Pack(_Differentiable):
    saved = slice(1, 3)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        bits, start = ctx.saved_tensors
        shapes, _ = ctx.args
        with use_backend(ctx.backend):
            dense = _UNPACK(grad, bits, start, shapes)
        beyond = ctx.shape[1] - dense.shape[1]
        if beyond:
            dense = torch.nn.functional.pad(dense, (0, beyond))
        return None, dense, None, None, None, None


class _Unpack(_Differentiable):
    saved = slice(1, 3)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        bits, start = ctx.saved_tensors
        with use_backend(ctx.backend):
            return None, _PACK(grad, bits, start, ctx.args[0], ctx.shape[1]), None, None, None


def _register(
    name: str, op: Any, compute: Any, function: type[_Differentiable], shape: Any
) -> None:
    """Register an op's kernels: of the devices, autograd, shape inference and vmap."""

    def differentiable(*args: Any) -> Tensor:
        # `requires_grad` is False on dual tensors: asking it would lose their tangents silently.
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            return function.apply(op, *args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    def fake(*args: Any) -> Tensor:
        return args[0].new_empty(shape(*args))

    def batched(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        """Another batch of tickets is just more tickets."""

        def fold(arg: Any, dim: Any) -> Any:
            if not isinstance(arg, Tensor):
                return arg
            if dim is None:
                return arg.expand(info.batch_size, *arg.shape).flatten(0, 1)
            return arg.movedim(dim, 0).flatten(0, 1)

        result = op(*[fold(arg, dim) for arg, dim in zip(args, in_dims, strict=True)])
        tickets = result.shape[0] // max(info.batch_size, 1)
        return result.unflatten(0, (info.batch_size, tickets)), 0

    for device in ("CPU", "CUDA"):
        _library.impl(name, compute, device)
    _library.impl(name, differentiable, "Autograd")
    torch.library.register_fake(f"sparse_tickets::{name}", fake, lib=_library)
    torch.library.register_vmap(f"sparse_tickets::{name}", batched, lib=_library)


_register(
    "linear_packed",
    _LINEAR,
    _forward,
    _Linear,
    lambda x, values, bits, start, bias, shapes, layer, precision: (
        *x.shape[:2],
        shapes[2 * layer],
    ),
)
_register(
    "linear_packed_dx",
    _DX,
    _dx,
    _LinearDX,
    lambda dy, values, bits, start, shapes, layer, precision: (
        *dy.shape[:2],
        shapes[2 * layer + 1],
    ),
)
_register(
    "linear_packed_dw",
    _DW,
    _dw,
    _LinearDW,
    lambda dy, x, bits, start, shapes, layer, width, precision: (dy.shape[0], width),
)
_register(
    "pack",
    _PACK,
    _pack,
    _Pack,
    lambda dense, bits, start, shapes, width: (dense.shape[0], width),
)
_register(
    "unpack",
    _UNPACK,
    _unpack,
    _Unpack,
    lambda values, bits, start, shapes: (values.shape[0], _size(shapes)),
)
for _device in ("CPU", "CUDA"):
    _library.impl("write_gradient_", _write_gradient, _device)
torch.library.register_fake("sparse_tickets::write_gradient_", lambda *_: None, lib=_library)
