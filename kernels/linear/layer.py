"""One layer on the CPU, as in an existing policy: `Prepared`, all that is known about a mask.

A mask is prepared once, from a snapshot, and every call compares the mask with its snapshot and
looks whether the weight is zero off it: 0.5 us at 64 x 64, some 5 us at 256 x 256. So nobody needs
to announce a write, to the weight or to the mask, by whatever road: ``.data``, another thread,
another process. A sparse way reads the weight on the mask alone; a dense one a masked copy where it
must.
"""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from ..dispatch import Plan, is_chosen, resume
from . import is_plain, is_watched
from .cpu import plan_for, wins_single
from .masking import is_equal, is_zero_off, keep, keep_in_place
from .patterns import Pattern, build_pattern, take_snapshot
from .rows import Rows
from .single import SingleRow

__all__ = ["Prepared", "multiply_rows"]

_Way = SingleRow | Rows | Literal["dense", "blocked"]

# Names of the module, because each dot is a look-up, and one row is bound by these.
_bool, _float32 = torch.bool, torch.float32
_empty_like = torch.empty_like
_grads_are_recorded = torch.is_grad_enabled
_autocasts = torch._C._is_any_autocast_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack


class Prepared:
    """A layer's mask ``[O, I]`` made ready: the ways through it for each batch, as they are met.

    Thread-safe: two threads may both find a way, and either serves.

    Args:
        mask: bool, on the CPU. It is copied.

    Attributes:
        mask: the copy, contiguous; never written.
        kept: how many weights it keeps.
    """

    __slots__ = ("_count", "_like", "_mask_at", "_pattern", "_shape", "_ways", "kept", "mask")

    def __init__(self, mask: Tensor) -> None:
        with torch.inference_mode(False):
            self.mask = take_snapshot(mask)
            self._like = torch.empty(1, mask.shape[0], dtype=_float32, device="cpu")
        self.kept = int(self.mask.sum())
        self._shape, self._count, self._mask_at = mask.shape, mask.numel(), self.mask.data_ptr()
        self._pattern: Pattern | None = None
        self._ways: dict[tuple[bool, int], _Way] = {}

    @property
    def pattern(self) -> Pattern:
        """Where the mask is True, as a population of one ticket."""
        if self._pattern is None:
            self._pattern = build_pattern(self.mask[None])
        return self._pattern

    def __call__(self, input: Tensor, weight: Any, bias: Tensor | None, mask: Any) -> Tensor | None:
        """``input (weight * mask)ᵀ + bias``, or None where that is not for this object to say.

        Args:
            input: ``[..., I]``.
            weight: the layer's weight as it is now.
            bias: ``[O]`` or None.
            mask: the layer's mask as it is now.

        Returns:
            ``[..., O]``; None unless weight and mask are plain CPU tensors of this shape, float32
            and bool, the mask is the one that was prepared, and no op need be seen by anyone.
        """
        shape = input.shape
        if (
            type(weight) not in _PLAIN
            or type(mask) is not Tensor
            or not shape
            or shape[-1] != self._shape[1]
            or weight.dtype is not _float32
            or mask.dtype is not _bool
            or not (weight.is_cpu and mask.is_cpu)
            or weight.shape != self._shape
            or mask.shape != self._shape
            or not (weight.is_contiguous() and mask.is_contiguous())
            or weight.is_neg()
        ):
            return None
        trains = _grads_are_recorded() and (
            weight.requires_grad or input.requires_grad or (bias is not None and bias.requires_grad)
        )
        batch = shape[0] if len(shape) == 2 else math.prod(shape[:-1])
        way = self._find_way(batch, trains)
        if isinstance(way, str):
            return self._multiply_dense(input, weight, bias, mask) if way == "dense" else None
        readable = _may_be_read(input, bias, self._shape[0])
        if isinstance(way, Rows):
            if not (readable and is_equal(mask.data_ptr(), self._mask_at, self._count)):
                return None
            y = multiply_rows(way, input.view(batch, -1), weight, mask, bias, trains)
        elif readable:
            y = _empty_like(self._like)
            bias_at = way.no_bias if bias is None else bias.data_ptr()
            addresses = input.data_ptr(), weight.data_ptr(), mask.data_ptr(), bias_at, y.data_ptr()
            if not way.multiply(*addresses, way.form):
                return None
        else:
            return self._multiply_dense(input, weight, bias, mask)
        return y if len(shape) == 2 else y.view(*shape[:-1], -1)

    def fits(self, mask: Tensor) -> bool:
        """Whether a mask is the one that was prepared."""
        return torch.equal(self.mask, mask)

    def is_full(self, mask: Tensor) -> bool:
        """Whether nothing is pruned, which `Unpruned` is for."""
        return False

    def plan(self, batch: int, dtype: torch.dtype, training: bool) -> Plan:
        """What runs for a batch of so many rows, and why."""
        return plan_for(self.pattern, batch, dtype, training)

    def _find_way(self, batch: int, trains: bool) -> _Way:
        key = (trains, (batch - 1).bit_length() if batch else -1)
        way = self._ways.get(key)
        if way is None:
            way = self._ways[key] = self._choose_way(batch, trains)
        return way

    def _choose_way(self, batch: int, trains: bool) -> _Way:
        if not batch:
            return "dense"
        if batch == 1:
            # With a gradient a single row has nothing to gain: overhead is all it costs.
            wins = not trains and wins_single(self.pattern)
            return SingleRow(self.pattern) if wins else "dense"
        format_ = self.plan(batch, _float32, trains).format
        if format_ == "dense+mask":
            return "dense"
        return Rows(self.pattern) if format_ == "csr" else "blocked"

    def _multiply_dense(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor
    ) -> Tensor | None:
        """Torch's own product, which reads the weight off the mask too."""
        if not is_equal(mask.data_ptr(), self._mask_at, self._count):
            return None
        learns = weight.requires_grad and _grads_are_recorded()
        if not self._is_clean(weight):
            if learns:
                return None
            weight = self._keep(weight)
        if not learns:
            return F.linear(input, weight, bias)
        if _autocasts() or type(input) is not Tensor:
            return None
        if input.dim() == 2:
            return cast(Tensor, _Dense.apply(self, input, weight, bias, mask))
        # Torch's product of another dimension is a view, and no view may leave a Function.
        output = _Dense.apply(self, input.reshape(-1, self._shape[1]), weight, bias, mask)
        return cast(Tensor, output.view(*input.shape[:-1], self._shape[0]))

    def _is_clean(self, weight: Tensor) -> bool:
        return is_zero_off(weight.data_ptr(), self._mask_at, self._count)

    def _keep(self, weight: Tensor) -> Tensor:
        """A copy that is zero off the mask."""
        result = torch.empty(self._shape, dtype=_float32, device="cpu")
        keep(weight.data_ptr(), self._mask_at, result.data_ptr(), self._count)
        return result

    def _keep_(self, gradient: Tensor) -> None:
        """Zero a contiguous gradient off the mask."""
        keep_in_place(gradient.data_ptr(), self._mask_at, self._count)


def multiply_rows(
    rows: Rows, x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, trains: bool
) -> Tensor:
    """One layer in compressed rows, twice differentiable; the caller warrants what `Rows` asks for.

    Args:
        rows: of the mask as it is now.
        x: ``[B, I]``.
        weight: ``[O, I]``.
        mask: ``[O, I]``.
        bias: ``[O]`` or None.
        trains: whether any gradient is to be recorded.

    Returns:
        ``[B, O]``.
    """
    if trains:
        return cast(Tensor, _Rows.apply(rows, x, weight, mask, bias))
    return rows.forward(x, weight, bias)


_PLAIN = (Tensor, Parameter)


def _may_be_read(input: Tensor, bias: Tensor | None, out: int) -> bool:
    """Whether kernels may read these where they lie, unseen by modes, autocast or `use_backend`."""
    return (
        type(input) is Tensor
        and input.dtype is _float32
        and input.is_cpu
        and input.is_contiguous()
        and not input.is_neg()
        and (
            bias is None
            or (
                type(bias) in _PLAIN
                and bias.shape == (out,)
                and bias.dtype is _float32
                and bias.is_cpu
                and bias.is_contiguous()
                and not bias.is_neg()
            )
        )
        and not (_dispatch_modes() or _function_modes() or _autocasts() or is_chosen())
    )


def _runs_unseen(dy: Tensor) -> bool:
    """Whether a backward pass may work on memory: nobody differentiates or watches it."""
    return not torch.is_grad_enabled() and not is_watched() and is_plain(dy)


class _Dense(torch.autograd.Function):
    """Torch's own linear on a weight that is zero off the mask; its gradient is too."""

    @staticmethod
    def forward(
        ctx: Any,
        prepared: Prepared,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor,
    ) -> Tensor:
        ctx.prepared = prepared
        # The mask too: autograd then raises if it is changed before the backward pass. The weight
        # only where it is needed, since an optimiser may have stepped it.
        ctx.save_for_backward(x, weight if ctx.needs_input_grad[1] else None, mask)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mask = ctx.saved_tensors
        _, needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        prepared, unseen = ctx.prepared, _runs_unseen(dy)
        dx = dw = db = None
        if needs_x:
            if not (unseen and prepared._is_clean(weight)):
                weight = torch.where(mask, weight, 0)
            dx = dy @ weight
        if needs_weight:
            dw = dy.t() @ x
            if unseen:
                prepared._keep_(dw)
            else:
                dw = torch.where(mask, dw, 0)
        if needs_bias:
            db = dy.sum(0)
        return None, dx, dw, db, None


class _Rows(torch.autograd.Function):
    """The layer in compressed rows, which read the weight on the mask alone."""

    @staticmethod
    def forward(
        ctx: Any, rows: Rows, x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.rows = rows
        ctx.save_for_backward(x, weight, mask)
        return rows.forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mask = ctx.saved_tensors
        _, needs_x, needs_weight, _, needs_bias = ctx.needs_input_grad
        if _runs_unseen(dy):
            needs_dw = needs_weight or needs_bias
            dx, dw, db = ctx.rows.backward(dy.contiguous(), x, weight, needs_x, needs_dw)
            return None, dx, dw if needs_weight else None, None, db if needs_bias else None
        form = (mask[None], None, 0, "ieee")
        ops = torch.ops.sparse_tickets
        with resume("cpu", dy.device):
            kept = torch.where(mask, weight, 0)[None]
            dx = ops.linear_dx(dy[None], kept, *form)[0] if needs_x else None
            dw = ops.linear_dw(dy[None], x[None], *form)[0] if needs_weight else None
        return None, dx, dw, None, dy.sum(0) if needs_bias else None
