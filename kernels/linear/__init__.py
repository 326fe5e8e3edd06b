"""The linear layer of a population, ``y = x wᵀ + b``, differentiable twice: `linear` and `plan`.

Three ops, each the derivative of the other two, are registered with torch (`registration`):
``linear``, ``linear_dx`` and ``linear_dw``. The weight is zero off the mask already, so the first
two never look at the mask on a backend that stores zeros; ``linear_dw`` computes the gradient on
the mask alone. Without a mask nothing of this runs: it is one ``torch.baddbmm``. On a GPU a mask
made of full blocks runs blocked once `block_pattern` was asked for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..dispatch import Plan, resolve_backend
from ..errors import check_density
from .blocks import BLOCK_SIZES, BlockPattern, block_pattern, find_blocks
from .registration import (
    PRECISIONS,
    check_operands,
    check_precision,
    choose_backend,
    is_plain,
    is_watched,
    run,
    under_autocast,
)

if TYPE_CHECKING:
    from .layer import Prepared
    from .unpruned import Unpruned

__all__ = [
    "BLOCK_SIZES",
    "PRECISIONS",
    "BlockPattern",
    "block_pattern",
    "check_precision",
    "is_plain",
    "is_watched",
    "linear",
    "linear_blocked",
    "plan",
    "plan_for",
    "prepare",
    "under_autocast",
]


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
    x, weight, bias = under_autocast(x, weight, bias)
    check_operands(x, weight, mask, bias, precision)
    if mask is not None:
        asked = not torch.compiler.is_compiling() and is_plain(mask)
        blocks = find_blocks(mask) if asked else None
        return run(x, weight, mask, bias, blocks, precision)
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

    On any other backend it is `linear`.

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
    x, weight, bias = under_autocast(x, weight, bias)
    mask = pattern.mask
    check_operands(x, weight, mask, bias, precision)
    # A compiler would guard on the version, and compile again after every write.
    versioned = not torch.compiler.is_compiling() and pattern.version is not None
    if versioned and pattern.version != mask._version:
        raise ValueError(
            f"pattern must be of the present mask, got version {pattern.version} of a mask "
            f"now at {mask._version}: ask block_pattern again"
        )
    return run(x, weight, mask, bias, pattern, precision)


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
    check_density(density)
    if block not in (0, *BLOCK_SIZES):
        raise ValueError(f"block must be 0 or one of {BLOCK_SIZES}, got {block}")
    device = torch.device(device)
    backend = choose_backend(device, dtype)
    if backend == "cpu":
        from . import cpu

        return cpu.plan(out, inp, batch, density, dtype)
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
    if choose_backend(mask.device, dtype) == "cpu":
        from .layer import Prepared

        return Prepared(mask).plan(batch, dtype, training)
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
