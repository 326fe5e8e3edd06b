"""The linear layer of a population, ``y = x wᵀ + b``, differentiable twice: `linear` and `plan`.

Three ops, each the derivative of the other two, are registered with torch: ``linear``,
``linear_dx`` and ``linear_dw``. The weight is zero off the mask already, so the first two never
look at the mask on a backend that stores zeros; ``linear_dw`` computes the gradient on the mask
alone. Without a mask nothing of this runs: it is one ``torch.baddbmm``. On a GPU a mask made of
full blocks runs blocked once `block_pattern` was asked for it; on a CPU it is seen unasked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from ..dispatch import Backend, Plan, resolve_backend, resume
from ..errors import check_tensor
from ..registration import register
from . import reference
from .blocks import (
    BLOCK_SIZES,
    BlockPattern,
    block_pattern,
    find_blocks,
    table_shape,
)

if TYPE_CHECKING:
    from .layer import Prepared
    from .unpruned import Unpruned

__all__ = [
    "BLOCK_SIZES",
    "PRECISIONS",
    "BlockPattern",
    "block_pattern",
    "is_plain",
    "is_watched",
    "linear",
    "linear_blocked",
    "plan",
    "plan_for",
    "prepare",
]

PRECISIONS = ("ieee", "tf32", "tf32x3")
"""How a GPU multiplies float32: exactly, rounded to 10 bits of mantissa, or as three of these."""

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_CPU_DTYPES = (torch.float32, torch.float64)
_PLAIN = (Tensor, Parameter)

_functorch_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_tracing_state = torch._C._get_tracing_state


def linear(
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    precision: str = "ieee",
) -> Tensor:
    """``y[p] = x[p] weight[p]ᵀ + bias[p]`` for every ticket p, with dW on the mask only.

    Differentiable any number of times in reverse mode, traceable by ``torch.compile``, and under
    autocast computed in its dtype. All inputs may be strided or expanded. On a GPU a mask that
    `block_pattern` was asked for runs blocked; a compiler does not see that and needs
    `linear_blocked`.

    Args:
        x: ``[P, B, I]`` float32, float64, float16 or bfloat16.
        weight: ``[P, O, I]``, dtype of `x`; must be zero where the mask is False, which is not
            checked. A backend may or may not read what lies there.
        mask: ``[P, O, I]`` bool, or None if all weights count; then torch's own product runs. It
            must not change before the backward pass: that raises.
        bias: ``[P, O]``, dtype of `x`, or None.
        precision: ``ieee``, ``tf32`` or ``tf32x3``: float32 products of the Triton backend. Other
            backends and the unmasked product follow torch's own setting.

    Returns:
        ``[P, B, O]``, dtype of `x`.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape, a device or the precision is not as above.
        RuntimeError: from the backward pass, if an input was changed in place in between; from
            ``torch.func`` transforms other than ``vmap``.
        NotImplementedError: from forward-mode differentiation.
    """
    x, weight, bias = _under_autocast(x, weight, bias)
    _validate(x, weight, mask, bias, precision)
    if mask is not None:
        asked = not torch.compiler.is_compiling() and is_plain(mask)
        blocks = find_blocks(mask) if asked else None
        return _masked(x, weight, mask, bias, blocks, precision)
    if bias is None:
        return torch.bmm(x, weight.mT)
    return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)


def linear_blocked(
    x: Tensor,
    weight: Tensor,
    pattern: BlockPattern,
    bias: Tensor | None = None,
    *,
    precision: str = "ieee",
) -> Tensor:
    """`linear` under a mask made of full blocks, of which a GPU reads and computes the kept ones.

    On any other backend it is `linear`; the CPU's looks for blocks by itself.

    Args:
        x: ``[P, B, I]`` float32, float64, float16 or bfloat16.
        weight: ``[P, O, I]``, dtype of `x`, zero where the pattern's mask is False.
        pattern: of the mask, from `block_pattern`.
        bias: ``[P, O]``, dtype of `x`, or None.
        precision: see `linear`.

    Returns:
        ``[P, B, O]``, dtype of `x`.

    Raises:
        TypeError: a dtype is not as above, or the pattern is no `BlockPattern`.
        ValueError: a shape, a device or the precision is not as above, or the mask was written
            since the pattern was built.
        RuntimeError: as `linear`.
        NotImplementedError: as `linear`.
    """
    if not isinstance(pattern, BlockPattern):
        raise TypeError(f"pattern must be a BlockPattern, got {type(pattern).__name__}")
    x, weight, bias = _under_autocast(x, weight, bias)
    mask = pattern.mask
    _validate(x, weight, mask, bias, precision)
    # A compiler would guard on the version, and compile again after every write.
    versioned = not torch.compiler.is_compiling() and pattern.version is not None
    if versioned and pattern.version != mask._version:
        raise ValueError(
            f"pattern must be of the present mask, got version {pattern.version} of a mask "
            f"now at {mask._version}: ask block_pattern again"
        )
    return _masked(x, weight, mask, bias, pattern, precision)


def _masked(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    blocks: BlockPattern | None,
    precision: str,
) -> Tensor:
    table, block = (None, 0) if blocks is None else (blocks.table, blocks.block)
    if is_watched() or not is_plain(x, weight, mask, bias):
        return _LINEAR(x, weight, mask, bias, table, block, precision)
    if _needs_grad(x, weight, bias):
        return _Linear.apply(_forward, x, weight, mask, bias, table, block, precision)
    return _forward(x, weight, mask, bias, table, block, precision)


def plan(
    out: int,
    inp: int,
    batch: int,
    density: float,
    dtype: torch.dtype,
    device: torch.device | str,
    block: int = 0,
) -> Plan:
    """What a masked `linear` does with such inputs now, and why.

    Args:
        out: O.
        inp: I.
        batch: B, rows per ticket.
        density: share of the weights under the mask.
        dtype: of `x` and the weight.
        device: where they live.
        block: size of the full blocks that make up the mask, and on a GPU `block_pattern` was asked
            for; 0 if it is unstructured.

    Raises:
        ValueError: the density is not in [0, 1], the block is none of 0, 16, 32 and 64, or the
            chosen backend cannot run on the device.
    """
    if not 0 <= density <= 1:
        raise ValueError(f"density must be in [0, 1], got {density}")
    if block not in (0, *BLOCK_SIZES):
        raise ValueError(f"block must be 0 or one of {BLOCK_SIZES}, got {block}")
    device = torch.device(device)
    backend = _backend(device, dtype)
    if backend == "cpu":
        from . import cpu

        return cpu.plan(out, inp, batch, density, dtype, block=block)
    if backend == "triton" and block:
        reason = "block_pattern was asked for this mask: only its kept blocks are computed"
        return Plan("linear", backend, f"blocked-{block}", reason)
    if backend == "triton":
        reason = "dense products over explicit zeros, the mask fused into the weight gradient"
    elif resolve_backend(device) == "cpu":
        reason = "torch's dense product: the CPU kernels know float32 and float64 only"
    else:
        reason = "torch's dense product, the weight gradient masked afterwards"
    return Plan("linear", backend, "dense+mask", reason)


def plan_for(mask: Tensor, batch: int, dtype: torch.dtype, training: bool = False) -> Plan:
    """`plan` for one layer's mask, whose pattern counts: full blocks have their own format.

    Args:
        mask: ``[O, I]`` bool; counting its weights waits for a GPU.
        batch: B.
        dtype: of the input and the weight.
        training: forward and backward, rather than forward alone.

    Raises:
        ValueError: the chosen backend cannot run on the device.
    """
    if _backend(mask.device, dtype) == "cpu":
        from . import cpu
        from .patterns import find_pattern

        return cpu.plan_for(find_pattern(mask[None]), batch, dtype, training)
    density = int(mask.sum()) / max(mask.numel(), 1)
    out, inp = mask.shape
    blocks = find_blocks(mask[None])
    block = 0 if blocks is None else blocks.block
    return plan(out, inp, batch, density, dtype, mask.device, block)


def prepare(mask: Tensor) -> Prepared | Unpruned | None:
    """All that is known about one layer's mask on the CPU, to multiply with.

    Args:
        mask: ``[O, I]`` bool. It may be written meanwhile.

    Returns:
        None where `use_backend` or ``SPARSE_TICKETS_BACKEND`` runs no CPU kernels.
    """
    if resolve_backend(mask.device) != "cpu":
        return None
    from .layer import Prepared
    from .unpruned import Unpruned

    plain = mask.is_contiguous() and mask.dtype is torch.bool
    return Unpruned(mask) if plain and bool(mask.all()) else Prepared(mask)


def _under_autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
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


def _validate(
    x: Tensor, weight: Tensor, mask: Tensor | None, bias: Tensor | None, precision: str
) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    check_tensor("x", x, ("P", "B", "I"), *_DTYPES, like=x)
    check_tensor("weight", weight, (x.shape[0], "O", x.shape[2]), x.dtype, like=x)
    if mask is not None:
        check_tensor("mask", mask, weight.shape, torch.bool, like=x)
    if bias is not None:
        check_tensor("bias", bias, weight.shape[:2], x.dtype, like=x)


def _backend(device: torch.device, dtype: torch.dtype) -> Backend:
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
    backend = _backend(x.device, x.dtype)
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
    backend = _backend(dy.device, dy.dtype)
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
    backend = _backend(dy.device, dy.dtype)
    if backend == "triton":
        from . import blocked_gpu, gpu

        if blocks is not None:
            return blocked_gpu.dw(dy, x, blocks, block, precision)
        return gpu.dw(dy, x, mask, precision)
    if backend == "cpu":
        from . import cpu

        return cpu.dw(dy, x, mask)
    return reference.linear_dw(dy, x, mask)


class _Differentiable(torch.autograd.Function):
    """An op with its inputs saved; the three subclasses differentiate it by the other two.

    The backward pass runs as the forward pass did (`resume`): on a GPU it is another thread, which
    does not see `use_backend`.
    """

    @staticmethod
    def forward(ctx: Any, op: Any, *args: Any) -> Tensor:
        ctx.backend = resolve_backend(args[0].device)
        *_, blocks, ctx.block, ctx.precision = args
        # The mask too: autograd then raises if it is changed before the backward pass.
        ctx.save_for_backward(*args[:3], blocks)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        raise NotImplementedError(
            "sparse_tickets linear has no forward-mode derivative; use reverse mode "
            "(backward, torch.autograd.grad)"
        )


class _Linear(_Differentiable):
    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mask, blocks = ctx.saved_tensors
        _, *needs = ctx.needs_input_grad
        form = (blocks, ctx.block, ctx.precision)
        with resume(ctx.backend, dy.device):
            together = needs[0] and needs[1] and _backend(dy.device, dy.dtype) == "cpu"
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


class _LinearDX(_Differentiable):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dy, weight, mask, blocks = ctx.saved_tensors
        _, *needs = ctx.needs_input_grad
        form = (blocks, ctx.block, ctx.precision)
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


class _LinearDW(_Differentiable):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dy, x, mask, blocks = ctx.saved_tensors
        _, *needs = ctx.needs_input_grad
        form = (blocks, ctx.block, ctx.precision)
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
    _validate(x, weight, mask, bias, precision)
    _check_blocks(blocks, block, mask)
    return *x.shape[:2], weight.shape[1]


def _check_dx(
    dy: Tensor, weight: Tensor, mask: Tensor, blocks: Tensor | None, block: int, precision: str
) -> tuple[int, ...]:
    check_tensor("weight", weight, ("P", "O", "I"), dy.dtype, like=dy)
    check_tensor("mask", mask, weight.shape, torch.bool, like=dy)
    # The transposed product: dy takes the place of x.
    _validate(dy, weight.mT, mask.mT, None, precision)
    _check_blocks(blocks, block, mask)
    return *dy.shape[:2], weight.shape[2]


def _check_dw(
    dy: Tensor, x: Tensor, mask: Tensor, blocks: Tensor | None, block: int, precision: str
) -> tuple[int, ...]:
    check_tensor("mask", mask, ("P", "O", "I"), torch.bool, like=x)
    weight = dy.new_empty(1).expand(mask.shape)
    _validate(x, weight, mask, None, precision)
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


# `blocks` and `block` are a `BlockPattern`'s table and size, or None and 0.
_LINEAR = register("linear", _forward, _check_forward, _Linear)
_DX = register("linear_dx", _dx, _check_dx, _LinearDX)
_DW = register("linear_dw", _dw, _check_dw, _LinearDW)
