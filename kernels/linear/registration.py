"""The layer as registered ops: what each backend computes, its shapes, and its derivatives.

Three ops, each differentiated by the other two: ``linear``, ``linear_dx`` and ``linear_dw``. Their
``blocks`` and ``block`` are a `BlockPattern`'s table and size, or None and 0. `run` spares eager
calls the dispatcher.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from ..dispatch import Backend, resolve_backend, resume
from ..errors import check_tensor
from ..registration import Differentiable, register
from . import reference
from .blocks import BLOCK_SIZES, BlockPattern, table_shape

PRECISIONS = ("ieee", "tf32", "tf32x3")
"""How a GPU multiplies float32: exactly, rounded to 10 bits of mantissa, or as three of these."""

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_CPU_DTYPES = (torch.float32, torch.float64)
_PLAIN = (Tensor, Parameter)

_functorch_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_tracing_state = torch._C._get_tracing_state


def run(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    blocks: BlockPattern | None,
    precision: str,
) -> Tensor:
    """`linear` under a mask, after its checks."""
    table, block = (None, 0) if blocks is None else (blocks.table, blocks.block)
    if is_watched() or not is_plain(x, weight, mask, bias):
        return _LINEAR(x, weight, mask, bias, table, block, precision)
    if _needs_grad(x, weight, bias):
        return _LinearForward.apply(_forward, x, weight, mask, bias, table, block, precision)
    return _forward(x, weight, mask, bias, table, block, precision)


def under_autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """These, cast as torch's autocast casts the operands of a product where it is on."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return (
        _autocast(x, dtype),
        _autocast(weight, dtype),
        None if bias is None else _autocast(bias, dtype),
    )


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast as torch's autocast does, which leaves float64 alone."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


def check_precision(precision: str) -> None:
    """Raise ``ValueError`` unless ``precision`` is one that the Triton kernels know."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")


def check_operands(
    x: Tensor, weight: Tensor, mask: Tensor | None, bias: Tensor | None, precision: str
) -> None:
    """Raise unless these are as `linear` takes them."""
    check_precision(precision)
    check_tensor("x", x, ("P", "B", "I"), *_DTYPES, like=x)
    check_tensor("weight", weight, (x.shape[0], "O", x.shape[2]), x.dtype, like=x)
    if mask is not None:
        check_tensor("mask", mask, weight.shape, torch.bool, like=x)
    if bias is not None:
        check_tensor("bias", bias, weight.shape[:2], x.dtype, like=x)


def choose_backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """Of a masked product: the CPU kernels know float32 and float64 alone."""
    backend = resolve_backend(device)
    return "reference" if backend == "cpu" and dtype not in _CPU_DTYPES else backend


def is_watched() -> bool:
    """Whether someone watches ops: a compiler, a transform, a mode or a tracer.

    If not, a kernel may be called directly, which saves the dispatcher's 10 us.
    """
    return (
        torch.compiler.is_compiling()
        or _functorch_active()
        or _dispatch_modes() > 0
        or _function_modes() > 0
        or _tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether these are ordinary tensors, with data and without a subclass."""
    return all(t is None or (type(t) in _PLAIN and not t.is_meta) for t in tensors)


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _forward(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    blocks: Tensor | None,
    block: int,
    precision: str,
) -> Tensor:
    backend = choose_backend(x.device, x.dtype)
    if backend == "triton":
        from . import blocked_gpu, gpu

        if blocks is not None:
            return blocked_gpu.forward(x, weight, bias, blocks, block, precision)
        return gpu.forward(x, weight, bias, precision)
    if backend == "cpu":
        from . import cpu

        return cpu.forward(x, weight, mask, bias)
    return reference.linear(x, weight, mask, bias)


def _dx(
    dy: Tensor, weight: Tensor, mask: Tensor, blocks: Tensor | None, block: int, precision: str
) -> Tensor:
    backend = choose_backend(dy.device, dy.dtype)
    if backend == "triton":
        from . import blocked_gpu, gpu

        if blocks is not None:
            return blocked_gpu.dx(dy, weight, blocks, block, precision)
        return gpu.dx(dy, weight, precision)
    if backend == "cpu":
        from . import cpu

        return cpu.dx(dy, weight, mask)
    return reference.linear_dx(dy, weight, mask)


def _dw(
    dy: Tensor, x: Tensor, mask: Tensor, blocks: Tensor | None, block: int, precision: str
) -> Tensor:
    backend = choose_backend(dy.device, dy.dtype)
    if backend == "triton":
        from . import blocked_gpu, gpu

        if blocks is not None:
            return blocked_gpu.dw(dy, x, blocks, block, precision)
        return gpu.dw(dy, x, mask, precision)
    if backend == "cpu":
        from . import cpu

        return cpu.dw(dy, x, mask)
    return reference.linear_dw(dy, x, mask)


class _LinearForward(Differentiable):
    saved = itemgetter(0, 1, 2, 4)
    rest = slice(5, None)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mask, blocks = ctx.saved_tensors
        _, *needs = ctx.needs_input_grad
        form = (blocks, *ctx.rest)
        with resume(ctx.backend, dy.device):
            together = needs[0] and needs[1] and choose_backend(dy.device, dy.dtype) == "cpu"
            eager = not (torch.is_grad_enabled() or is_watched())
            if together and eager and is_plain(dy, x, weight, mask):
                from . import cpu

                dx, dw, db = cpu.backward(dy, x, weight, mask)
                return None, dx, dw, None, db if needs[3] else None, None, None, None
            return (
                None,
                _DX(dy, weight, mask, *form) if needs[0] else None,
                _DW(dy, x, mask, *form) if needs[1] else None,
                None,
                dy.sum(1) if needs[3] else None,
                None,
                None,
                None,
            )


class _LinearDX(Differentiable):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dy, weight, mask, blocks = ctx.saved_tensors
        _, *needs = ctx.needs_input_grad
        form = (blocks, *ctx.rest)
        with resume(ctx.backend, grad.device):
            return (
                None,
                _LINEAR(grad, weight, mask, None, *form) if needs[0] else None,
                _DW(dy, grad, mask, *form) if needs[1] else None,
                None,
                None,
                None,
                None,
            )


class _LinearDW(Differentiable):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dy, x, mask, blocks = ctx.saved_tensors
        _, *needs = ctx.needs_input_grad
        form = (blocks, *ctx.rest)
        on_mask = grad.masked_fill(~mask, 0)
        with resume(ctx.backend, grad.device):
            return (
                None,
                _LINEAR(x, on_mask, mask, None, *form) if needs[0] else None,
                _DX(dy, on_mask, mask, *form) if needs[1] else None,
                None,
                None,
                None,
                None,
            )


def _check_forward(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    blocks: Tensor | None,
    block: int,
    precision: str,
) -> tuple[int, ...]:
    check_operands(x, weight, mask, bias, precision)
    _check_blocks(blocks, block, mask)
    return *x.shape[:2], weight.shape[1]


def _check_dx(
    dy: Tensor, weight: Tensor, mask: Tensor, blocks: Tensor | None, block: int, precision: str
) -> tuple[int, ...]:
    check_tensor("weight", weight, ("P", "O", "I"), dy.dtype, like=dy)
    check_tensor("mask", mask, weight.shape, torch.bool, like=dy)
    # The transposed product: dy takes the place of x.
    check_operands(dy, weight.mT, mask.mT, None, precision)
    _check_blocks(blocks, block, mask)
    return *dy.shape[:2], weight.shape[2]


def _check_dw(
    dy: Tensor, x: Tensor, mask: Tensor, blocks: Tensor | None, block: int, precision: str
) -> tuple[int, ...]:
    check_tensor("mask", mask, ("P", "O", "I"), torch.bool, like=x)
    weight = dy.new_empty(1).expand(mask.shape)
    check_operands(x, weight, mask, None, precision)
    check_tensor("dy", dy, (*x.shape[:2], mask.shape[1]), x.dtype, like=x)
    _check_blocks(blocks, block, mask)
    return mask.shape


def _check_blocks(blocks: Tensor | None, block: int, mask: Tensor) -> None:
    """A `BlockPattern`'s table and size fit the mask, or there are none."""
    if blocks is None:
        if block:
            raise ValueError(f"block must be 0 without a table of blocks, got {block}")
        return
    if block not in BLOCK_SIZES:
        raise ValueError(f"block must be one of {BLOCK_SIZES}, got {block}")
    tickets, out, inp = mask.shape
    shape = table_shape(tickets, out, inp, block)
    check_tensor("blocks", blocks, shape, torch.int32, like=mask)


_LINEAR = register("linear", _forward, _check_forward, _LinearForward)
_DX = register("linear_dx", _dx, _check_dx, _LinearDX)
_DW = register("linear_dw", _dw, _check_dw, _LinearDW)
