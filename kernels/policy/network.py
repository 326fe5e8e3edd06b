"""A network on its Parameters: `Network.infer` without gradients, `Network.train` with them.

Everything here serves the overhead: tensors pass by address, and one call of a kernel does the
work of all layers. The weights on the mask are gathered at every call, so nothing ever depends on
who wrote them, or on what lies off the mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..linear import is_watched
from ..threads import count_threads
from ..vector import aligned_empty
from . import cpu, reference, reused_memory
from .layout import ACT_FROM, CALL_FIRST, FEW, LONG, Form, Layer, Support

# How many sizes of batches a network keeps its forms for.
_FORMS = 64

_empty, _empty_like = torch.empty, torch.empty_like
_grads_are_recorded = torch.is_grad_enabled


class _Call:
    """Memory for one call at a time."""

    __slots__ = ("address", "numbers", "scratch", "scratch_at")

    def __init__(self) -> None:
        self.numbers: Any = np.zeros(256, np.int64)
        self.address = self.numbers.ctypes.data
        self.scratch = aligned_empty(1 << 14)
        self.scratch_at = self.scratch.ctypes.data

    def reserve(self, numbers: int, scratch: int) -> None:
        """Make room for so many numbers of a call and elements of scratch."""
        if numbers > self.numbers.size:
            self.numbers = np.zeros(numbers, np.int64)
            self.address = self.numbers.ctypes.data
        if scratch > self.scratch.size:
            self.scratch = aligned_empty(scratch)
            self.scratch_at = self.scratch.ctypes.data


# Calls that nobody uses; a list's methods are atomic.
_calls: list[_Call] = []


def _take(numbers: int, scratch: int) -> _Call:
    call = _calls.pop() if _calls else _Call()
    if numbers > call.numbers.size or scratch > call.scratch.size:
        call.reserve(numbers, scratch)
    return call


class Network:
    """Linear layers, norms and activations, with their masks, made ready for the kernels.

    The caller warrants that every tensor it passes is contiguous float32 on the CPU and of the
    shape that its layer says.

    Args:
        layers: at least one, of matching widths, none of them zero.

    Attributes:
        layers: the same.
        out: features of the output.
        parameters: how many a call takes: of each layer the weight, then the bias or None, then the
            same of its norm, if it has one.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = tuple(layers)
        self.out = self.layers[-1].out
        self._supports = [Support(layer) for layer in self.layers]
        self._small = [
            reused_memory.is_small(size)
            for layer in self.layers
            for size in (layer.out * layer.inp, *(layer.parameters - 1) * (layer.out,))
        ]
        self.parameters = len(self._small)
        self._numbers = CALL_FIRST + 2 * self.parameters
        self._pack = Struct(f"{self._numbers}q").pack_into
        self._forms: dict[int, Form] = {}
        act, *kernels = cpu.kernels()
        self._act, self._short, self._long = act, kernels[:2], kernels[2:]
        self._few = self.form(1)
        self._few_address = self._few.address

    def form(self, batch: int) -> Form:
        """The form for a batch of this many rows."""
        form = self._forms.get(batch)
        if form is None:
            if len(self._forms) >= _FORMS:
                self._forms.clear()
            form = self._forms[batch] = Form(self.layers, self._supports, batch)
        return form

    def infer(self, x: Tensor, batch: int, addresses: Sequence[int]) -> Tensor:
        """The output ``[B, O]``, without a gradient to record.

        Args:
            x: ``[B, I]``, contiguous.
            batch: B.
            addresses: of every parameter (zero where there is none), each followed by a zero.
        """
        y = _empty(batch, self.out)
        if batch <= FEW:
            call = _take(self._numbers, self._few.scratch)
            self._pack(
                call.numbers, 0, batch, 0, 1, 0, call.scratch_at, x.data_ptr(), y.data_ptr(), 0, 0,
                *addresses,
            )  # fmt: skip
            self._act(0, self._few_address, call.address)
        else:
            form = self.form(batch)
            size = form.values + form.parts * form.record
            call = _take(self._numbers, form.scratch + size)
            saved_at = call.scratch_at + 4 * form.scratch
            work = form.work * batch
            self._pack(
                call.numbers, 0, batch, 0, count_threads(form.parts, work), saved_at,
                call.scratch_at, x.data_ptr(), y.data_ptr(), 0, 0, *addresses,
            )  # fmt: skip
            kernel = self._long if work > LONG else self._short
            kernel[0](0, form.address, call.address)
        _calls.append(call)
        return y

    def train(
        self,
        x: Tensor,
        masks: Sequence[Tensor],
        parameters: Sequence[Any],
        addresses: Sequence[int],
    ) -> Any:
        """The output ``[B, O]``, differentiable any number of times.

        Args:
            x: ``[B, I]``, contiguous.
            masks: those that the layers were made of, which must not change before the backward
                pass.
            parameters: as the network counts them.
            addresses: of the same, as for `infer`.
        """
        return _NetworkPass.apply(self, masks, addresses, x, *parameters)

    def forward(self, x: Tensor, addresses: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The output, and what the backward pass needs."""
        batch = x.shape[0]
        form = self.form(batch)
        y = _empty(batch, self.out)
        saved = reused_memory.empty(form.values + -(-batch // form.tile) * form.record)
        call = _take(self._numbers, form.scratch)
        work = form.work * batch
        self._pack(
            call.numbers, 0, batch, form.record, count_threads(form.parts, work), saved.data_ptr(),
            call.scratch_at, x.data_ptr(), y.data_ptr(), 0, 0, *addresses,
        )  # fmt: skip
        kernel = self._long if work > LONG else self._short
        kernel[0](0, form.address, call.address)
        _calls.append(call)
        return y, saved

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        parameters: Sequence[Any],
        saved: Tensor,
        needed: Sequence[bool],
    ) -> list[Tensor | None]:
        """The gradients that are needed of x and the parameters, None elsewhere."""
        batch = x.shape[0]
        form = self.form(batch)
        dx = reused_memory.empty(*x.shape) if needed[0] else None
        found: list[Tensor | None] = [dx]
        addresses: list[int] = []
        for parameter, need, small in zip(parameters, needed[1:], self._small, strict=True):
            # A weight is read where nothing of its layer is pruned.
            if not need:
                found.append(None)
                addresses += (0 if parameter is None else parameter.data_ptr(), 0)
                continue
            grad = _empty_like(parameter) if small else reused_memory.empty(*parameter.shape)
            found.append(grad)
            addresses += (parameter.data_ptr(), grad.data_ptr())
        dy = dy.resolve_neg().contiguous()
        call = _take(self._numbers, form.scratch)
        work = 2 * form.work * batch
        self._pack(
            call.numbers, 0, batch, form.record, count_threads(form.parts, work), saved.data_ptr(),
            call.scratch_at, 0, 0, 0 if dx is None else dx.data_ptr(), dy.data_ptr(), *addresses,
        )  # fmt: skip
        kernel = self._long if work > LONG else self._short
        kernel[1](0, form.address, call.address)
        _calls.append(call)
        return found

    def describe(self, batch: int, training: bool) -> tuple[str, str]:
        """The layers' formats for a batch of this many rows, and why."""
        if batch <= FEW and not training:
            formats = "/".join(
                "csr" if ACT_FROM * support.nonzeros < layer.out * layer.inp else "dense+mask"
                for layer, support in zip(self.layers, self._supports, strict=True)
            )
            return formats, "few rows: each through all layers at once"
        form = self.form(batch)
        formats = "/".join(
            "csr" if not dense else "dense" if layer.mask is None else "dense+mask"
            for layer, dense in zip(self.layers, form.dense, strict=True)
        )
        return formats, f"{form.tile} rows at a time through all layers"


class _NetworkPass(torch.autograd.Function):
    """A network as one node of autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        network: Network,
        masks: Sequence[Tensor],
        addresses: Sequence[int],
        x: Tensor,
        *parameters: Tensor | None,
    ) -> Tensor:
        y, saved = network.forward(x, addresses)
        # The masks too: autograd then raises if one is changed before the backward pass.
        ctx.save_for_backward(saved, x, *parameters, *masks)
        ctx.network = network
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        network: Network = ctx.network
        saved, x, *tensors = ctx.saved_tensors
        count = network.parameters
        parameters, masks = tensors[:count], tensors[count:]
        needed = ctx.needs_input_grad[3:]
        if _grads_are_recorded() or is_watched() or type(dy) is not Tensor:
            found = reference.differentiate(network.layers, masks, x, parameters, needed, dy)
        else:
            found = network.backward(dy, x, parameters, saved, needed)
        return None, None, None, *found
