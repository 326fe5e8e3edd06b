"""One layer on the CPU, as in an existing policy: `Prepared`, all that is known about a mask.

A mask is prepared once, from a snapshot, and every call compares the mask with its snapshot: 0.5 us
at 64 x 64, some 5 us at 256 x 256. So nobody needs to announce a write, to the weight or to the
mask, by whatever road: ``.data``, another thread, another process. The layer runs as a network of
one (`policy.Network`), which reads the weight on the mask alone; torch's own product, for large
layers of which much is left, reads a masked copy where it must.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from ..dispatch import Plan, is_chosen
from ..policy import Layer, Network, native
from . import is_plain, is_watched
from .cpu import plan
from .known import take_snapshot
from .masking import is_equal, is_zero_off, keep, keep_in_place

# Names of the module, because each dot is a look-up, and one row is bound by these.
_bool, _float32 = torch.bool, torch.float32
_grads_are_recorded = torch.is_grad_enabled
_autocasts = torch._C._is_any_autocast_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack


class Prepared:
    """A layer's mask ``[O, I]`` made ready.

    Args:
        mask: bool, on the CPU. It is copied.

    Attributes:
        mask: the copy, contiguous; never written.
        kept: how many weights it keeps.
    """

    __slots__ = (
        "_compiled", "_count", "_inp", "_mask_at", "_network", "_out", "_shape", "kept", "mask",
    )  # fmt: skip

    def __init__(self, mask: Tensor) -> None:
        with torch.inference_mode(False):
            self.mask = take_snapshot(mask)
        self.kept = int(self.mask.sum())
        self._shape, self._count, self._mask_at = mask.shape, mask.numel(), self.mask.data_ptr()
        self._out, self._inp = mask.shape
        self._network: Network | None = None
        self._compiled: Any = None
        if self._count:
            pruned = self.mask if self.kept < self._count else None
            self._network = Network([Layer(self._out, self._inp, pruned, None)])
            native.start()

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
        if self._compiled is not None and not is_chosen():
            output = self._compiled(input, weight, bias, mask)
            if output is not None:
                return output
        shape = input.shape
        if (
            type(weight) not in _PLAIN
            or type(mask) is not Tensor
            or not shape
            or shape[-1] != self._inp
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
        network = self._network
        if network is None or not (
            network.form(batch).pays and _may_be_read(input, bias, self._out)
        ):
            return self._multiply_dense(input, weight, bias, mask)
        if not is_equal(mask.data_ptr(), self._mask_at, self._count):
            return None
        if self._compiled is None and native.module is not None:
            self._compile(network)
        x = input.view(batch, self._inp)
        addresses = weight.data_ptr(), 0, 0 if bias is None else bias.data_ptr(), 0
        if trains:
            masks = [mask] if self.kept < self._count else []
            y = network.train(x, masks, (weight, bias), addresses)
        else:
            y = network.infer(x, batch, addresses)
        return y if len(shape) == 2 else y.view(*shape[:-1], self._out)

    def _compile(self, network: Network) -> None:
        """Have all that in one call, for inputs ``[B, I]``."""
        layer = (self._out, self._inp, 0, self._mask_at, self.kept < self._count)
        self._compiled = native.module.Network([layer], network.form).layer

    def fits(self, mask: Tensor) -> bool:
        """Whether a mask is the one that was prepared."""
        return torch.equal(self.mask, mask)

    def is_full(self, mask: Tensor) -> bool:
        """Whether nothing is pruned, which `Unpruned` is for."""
        return False

    def plan(self, batch: int, dtype: torch.dtype, training: bool) -> Plan:
        """What runs for a batch of so many rows, and why."""
        if dtype is not _float32:
            return plan(self._out, self._inp, batch, self.kept / max(self._count, 1), dtype)
        if self._network is None or not self._network.form(batch).pays:
            reason = "torch's product: one large layer of which so much is left gains by no other"
            return Plan("linear", "cpu", "dense+mask", reason)
        format, reason = self._network.describe(batch, training)
        return Plan("linear", "cpu", format, f"in one call {native.status()}: {reason}")

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
        output = _Dense.apply(self, input.reshape(-1, self._inp), weight, bias, mask)
        return cast(Tensor, output.view(*input.shape[:-1], self._out))

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
