"""Packed layers as registered ops: what each backend computes, its shapes, and its derivatives.

The three products are each the derivative of the other two, as `linear`'s; a product reads only the
values of its own layer, so theirs need no masking. Packing and unpacking are each the derivative of
the other. A pattern travels as its tensors and, in integers, the shapes of its layers.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from ..dispatch import Backend, resolve_backend, resume
from ..errors import check_dtype, check_integer, check_tensor
from ..linear import check_precision
from ..memory import check_separate, mark_written
from ..registration import Differentiable, declare, register
from . import reference
from .checks import (
    DTYPES,
    check_batch,
    check_dense,
    check_squares,
    check_values,
    check_where,
    find_layer,
)
from .layout import PackedLayer, lay_out

__all__ = ["DW", "DX", "LINEAR", "PACK", "UNPACK", "WRITE", "choose"]


def choose(device: torch.device, dtype: torch.dtype) -> Backend:
    """Triton, which knows no float64, or plain torch: packed weights spare a GPU's memory alone."""
    triton = resolve_backend(device) == "triton" and dtype != torch.float64
    return "triton" if triton else "reference"


def _check_forward(
    x: Tensor,
    values: Tensor,
    bits: Tensor,
    start: Tensor,
    bias: Tensor | None,
    shapes: list[int],
    layer: int,
    precision: str,
) -> tuple[int, ...]:
    check_precision(precision)
    place = find_layer(check_where(bits, start, shapes), layer)
    check_values("values", values, bits)
    check_batch("x", x, values, place.inp)
    if bias is not None:
        check_tensor("bias", bias, (len(bits), place.out), x.dtype, like=x)
    return *x.shape[:2], place.out


def _check_dx(
    dy: Tensor,
    values: Tensor,
    bits: Tensor,
    start: Tensor,
    shapes: list[int],
    layer: int,
    precision: str,
) -> tuple[int, ...]:
    check_precision(precision)
    place = find_layer(check_where(bits, start, shapes), layer)
    check_values("values", values, bits)
    check_batch("dy", dy, values, place.out)
    return *dy.shape[:2], place.inp


def _check_dw(
    dy: Tensor,
    x: Tensor,
    bits: Tensor,
    start: Tensor,
    shapes: list[int],
    layer: int,
    width: int,
    precision: str,
) -> tuple[int, ...]:
    check_precision(precision)
    place = find_layer(check_where(bits, start, shapes), layer)
    check_integer("width", width, 0, 1 << 31)
    check_tensor("x", x, (len(bits), "B", place.inp), *DTYPES, like=bits)
    check_tensor("dy", dy, (*x.shape[:2], place.out), x.dtype, like=x)
    return len(dy), width


def _check_write(
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
    check_values("gradient", gradient, bits)
    check_dtype("gradient", gradient, x.dtype)
    _check_dw(dy, x, bits, start, shapes, layer, gradient.shape[1], precision)
    targets = {"gradient": gradient}
    if squares is not None:
        check_squares(squares, start)
        targets["squares"] = squares
    for name, target in targets.items():
        if not target.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {target.stride()}")


def _check_pack(
    dense: Tensor, bits: Tensor, start: Tensor, shapes: list[int], width: int
) -> tuple[int, ...]:
    check_where(bits, start, shapes)
    check_dense(dense, bits, _size(shapes))
    check_integer("width", width, 0, 1 << 31)
    return len(dense), width


def _check_unpack(
    values: Tensor, bits: Tensor, start: Tensor, shapes: list[int]
) -> tuple[int, ...]:
    check_where(bits, start, shapes)
    check_values("values", values, bits)
    return len(values), _size(shapes)


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
    if choose(x.device, x.dtype) == "triton":
        from . import gpu

        return gpu.forward(x, values, bits, start, bias, place, precision)
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
    if choose(dy.device, dy.dtype) == "triton":
        from . import gpu

        return gpu.dx(dy, values, bits, start, place, precision)
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
    place: PackedLayer,
    precision: str,
    squares: Tensor | None,
) -> None:
    if choose(x.device, x.dtype) == "triton":
        from . import gpu

        gpu.dw(gradient, dy, x, bits, start, place, precision, squares)
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
    _check_write(gradient, dy, x, bits, start, shapes, layer, precision, squares)
    written = {"gradient": gradient} | ({} if squares is None else {"squares": squares})
    check_separate(written, {"dy": dy, "x": x, "bits": bits, "start": start})
    _write(gradient, dy, x, bits, start, lay_out(*shapes)[layer], precision, squares)
    mark_written(*written.values())


def _pack(dense: Tensor, bits: Tensor, start: Tensor, shapes: list[int], width: int) -> Tensor:
    layers = lay_out(*shapes)
    if choose(dense.device, dense.dtype) == "triton":
        from . import gpu

        return gpu.pack(dense, bits, start, layers, width)
    return reference.pack(dense, bits, start, layers, width)


def _unpack(values: Tensor, bits: Tensor, start: Tensor, shapes: list[int]) -> Tensor:
    layers, size = lay_out(*shapes), _size(shapes)
    if choose(values.device, values.dtype) == "triton":
        from . import gpu

        return gpu.unpack(values, bits, start, layers, size)
    return reference.unpack(values, bits, start, layers, size)


def _size(shapes: list[int]) -> int:
    return sum(layer.out * layer.inp for layer in lay_out(*shapes))


class _PackedLinear(Differentiable):
    rest = slice(5, None)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, values, bits, start = ctx.saved_tensors
        shapes, layer, precision = ctx.rest
        needs = ctx.needs_input_grad
        dx = dvalues = None
        with resume(ctx.backend, dy.device):
            if needs[1]:
                dx = DX(dy, values, bits, start, shapes, layer, precision)
            if needs[2]:
                dvalues = DW(dy, x, bits, start, shapes, layer, values.shape[1], precision)
        return None, dx, dvalues, None, None, dy.sum(1) if needs[5] else None, None, None, None


class _PackedDX(Differentiable):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dy, values, bits, start = ctx.saved_tensors
        shapes, layer, precision = ctx.rest
        ddy = dvalues = None
        with resume(ctx.backend, grad.device):
            if ctx.needs_input_grad[1]:
                ddy = LINEAR(grad, values, bits, start, None, shapes, layer, precision)
            if ctx.needs_input_grad[2]:
                dvalues = DW(dy, grad, bits, start, shapes, layer, values.shape[1], precision)
        return None, ddy, dvalues, None, None, None, None, None


class _PackedDW(Differentiable):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dy, x, bits, start = ctx.saved_tensors
        shapes, layer, _, precision = ctx.rest
        ddy = dx = None
        with resume(ctx.backend, grad.device):
            if ctx.needs_input_grad[1]:
                ddy = LINEAR(x, grad, bits, start, None, shapes, layer, precision)
            if ctx.needs_input_grad[2]:
                dx = DX(dy, grad, bits, start, shapes, layer, precision)
        return None, ddy, dx, None, None, None, None, None, None


class _Pack(Differentiable):
    saved = itemgetter(1, 2)
    rest = slice(3, None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        bits, start = ctx.saved_tensors
        shapes, _ = ctx.rest
        with resume(ctx.backend, grad.device):
            dense = UNPACK(grad, bits, start, shapes)
        beyond = ctx.shape[1] - dense.shape[1]
        if beyond:
            dense = torch.nn.functional.pad(dense, (0, beyond))
        return None, dense, None, None, None, None


class _Unpack(Differentiable):
    saved = itemgetter(1, 2)
    rest = slice(3, None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        bits, start = ctx.saved_tensors
        with resume(ctx.backend, grad.device):
            return None, PACK(grad, bits, start, ctx.rest[0], ctx.shape[1]), None, None, None


LINEAR = register("linear_packed", _forward, _check_forward, _PackedLinear)
DX = register("linear_packed_dx", _dx, _check_dx, _PackedDX)
DW = register("linear_packed_dw", _dw, _check_dw, _PackedDW)
PACK = register("pack", _pack, _check_pack, _Pack)
UNPACK = register("unpack", _unpack, _check_unpack, _Unpack)
WRITE = declare("write_gradient_", _write_gradient, _check_write, written=("gradient", "squares"))
