"""SparseLinear: an nn.Linear whose pruned weights are exactly zero, whatever trains it.

A masked gradient is not enough: weight decay, momentum and moments gathered before pruning still
move pruned weights. So one hook, common to all optimisers, zeroes the pruned weights and the
optimiser's state for them after every step (`hooks`). Forward never writes, and trusts nobody: it
reads the weight through the mask, or looks first whether that would make a difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NoReturn, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from sparse_tickets.hooks import is_kept, keep_, keep_state_, stepped_optimizers, track
from sparse_tickets.kernels.dispatch import Plan, use_backend
from sparse_tickets.kernels.errors import check_data, check_dtype, check_shape, has_data
from sparse_tickets.kernels.linear import linear, plan_for, prepare
from sparse_tickets.kernels.memory import loses_values
from sparse_tickets.kernels.prune import prune

if TYPE_CHECKING:
    from sparse_tickets.kernels.linear.layer import Prepared
    from sparse_tickets.kernels.linear.unpruned import Unpruned

__all__ = ["SparseLinear", "count_kept"]


def count_kept(density: float, total: int) -> int:
    """How many of ``total`` weights a density keeps: ``density * total``, halves rounded up.

    Raises:
        TypeError: density is of a type that has no order with numbers.
        ValueError: density is outside [0, 1] or NaN.
    """
    try:
        inside = 0 <= density <= 1
    except TypeError:
        raise TypeError(f"density must be a number, got {density!r}") from None
    if not inside:
        raise ValueError(f"density must be in [0, 1], got {density}")
    return math.floor(density * total + 0.5)


# Names of the module, because each dot would be a look-up in `SparseLinear.forward`.
_is_compiled = torch.compiler.is_dynamo_compiling
_functorch_active = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state
_dispatch_modes = torch._C._len_torch_dispatch_stack


class SparseLinear(nn.Linear):
    """A linear layer with a fixed set of pruned weights: ``y = x (weight * mask)^T + bias``.

    It is an ``nn.Linear`` in every other way: same constructor, same Parameters, and it survives
    deepcopy, pickle, ``state_dict`` in and out, DDP, autocast, ``torch.compile(fullgraph=True)``,
    ``torch.export`` and ``torch.func``.

    `forward` reads pruned weights as zero, whatever lies there and however it came there: a write
    through ``weight.data``, ``weight.data = new``, another thread or process. It never writes. The
    gradient is exactly zero off the mask, and so are, after its step, the weight and the state
    (tensors of the weight's shape) of every ``torch.optim.Optimizer`` that owns it. Whatever else
    writes pruned weights (an optimiser that is none, an average of weights) leaves them there until
    `apply_mask_`, `prune_`, `set_mask_`, ``state_dict`` or ``load_state_dict`` zero them. Reading
    `density`, `sparsity`, `plan` or the ``repr`` changes nothing.

    A mask that changes between forward and backward raises. After ``to_empty`` nothing is pruned
    until a mask is set or loaded.

    Args:
        in_features: features of the input.
        out_features: features of the output.
        bias: add a bias, which is never pruned.
        device: of the parameters and the mask.
        dtype: of the parameters.
        mask: ``[out_features, in_features]`` bool, True where a weight is kept; all True if None.

    Attributes:
        weight: ``[out_features, in_features]``, zero off the mask.
        bias: ``[out_features]`` or None.
        mask: persistent bool buffer like the weight; always updated in place.

    Raises:
        TypeError: the mask is not bool.
        ValueError: the mask has another shape than the weight.

    Example:
        >>> layer = SparseLinear(64, 64).prune_(density=0.2)
        >>> layer.density
        0.199951171875
        >>> layer(torch.zeros(8, 64)).shape
        torch.Size([8, 64])
    """

    mask: Tensor
    _prepared: Prepared | Unpruned | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        mask: Tensor | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._attach_mask(mask)

    @classmethod
    def from_linear(cls, linear: nn.Linear, mask: Tensor | None = None) -> Self:
        """A sparse layer on the very Parameters of ``linear``, so its optimiser stays valid.

        Args:
            linear: any linear layer. Its hooks stay with it (`sparsify_` keeps them).
            mask: ``[out, in]`` bool; None keeps the mask of a `SparseLinear`, else everything.

        Raises:
            ValueError: the weight is not a Parameter but recomputed by a hook.

        Example:
            >>> dense = nn.Linear(4, 2)
            >>> SparseLinear.from_linear(dense).weight is dense.weight
            True
        """
        if "weight" not in linear._parameters:
            raise ValueError(
                "linear must own its weight as a Parameter, got one that a hook or parametrization "
                "recomputes (for torch.nn.utils.prune use sparse_tickets.convert.from_torch_prune)"
            )
        if mask is None and isinstance(linear, SparseLinear):
            mask = linear.mask
        has_bias = linear.bias is not None
        # On the meta device: no memory, and no draw from the global random generator.
        layer = cls(linear.in_features, linear.out_features, has_bias, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.train(linear.training)
        layer._attach_mask(mask)
        return layer

    def _attach_mask(self, mask: Tensor | None) -> None:
        """Make the layer sparse: buffer, registration with the optimiser hook, zeroed weights."""
        kept = torch.ones(self.weight.shape, dtype=torch.bool, device=self.weight.device)
        self.register_buffer("mask", kept)
        track(self)
        if mask is not None:
            self.set_mask_(mask)

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features] -> [..., out_features]``.

        Raises:
            ValueError: the last dimension of the input is not ``in_features``.
        """
        # First, because under a compiler all that follows would become guards.
        if not (
            _is_compiled()
            or _functorch_active()
            or _tracing_state() is not None
            or _dispatch_modes() > 0
            or forward_ad._current_level >= 0
            or not isinstance(input, Tensor)
        ):
            # Asked of the module each is half a microsecond of searching.
            parameters: Any = self._parameters
            buffers: Any = self._buffers
            tensors = parameters.get("weight"), parameters.get("bias"), buffers.get("mask")
            prepared = self._prepared
            if prepared is not None:
                output = prepared(input, *tensors)
                if output is not None:
                    return output
            if self._prepare():
                output = cast("Prepared | Unpruned", self._prepared)(input, *tensors)
                if output is not None:
                    return output
        return self._forward_anywhere(input)

    def _prepare(self) -> bool:
        """Get to know the mask as it is now; False where no kernel would gain by it."""
        mask, prepared = self._buffers.get("mask"), self._prepared
        if type(mask) is not Tensor or not mask.is_cpu:
            return False
        if prepared is None or not prepared.fits(mask):
            self.__dict__["_prepared"] = prepare(mask)
        return self._prepared is not None

    def _forward_anywhere(self, input: Tensor) -> Tensor:
        """`forward` by operations that torch sees, on any device and in any dtype."""
        # What is recomputed by a hook or a parametrization is an attribute alone.
        weight, mask, bias = self.weight, self.mask, self.bias
        if not isinstance(input, Tensor):
            # A proxy of torch.fx, whose graph then reads through the mask as it is when it runs.
            return F.linear(input, torch.where(mask, weight, 0), bias)
        if not input.dim() or input.shape[-1] != self.in_features:
            raise ValueError(
                f"input must have shape [..., {self.in_features}], got {tuple(input.shape)}"
            )
        if _functorch_active() and not _is_compiled():
            _check_members(weight, mask)
        weight = torch.where(mask, weight, 0)
        if not self._runs_by_op(input):
            return F.linear(input, weight, bias)
        x = input.reshape(1, -1, self.in_features)
        output = linear(x, weight[None], mask[None], None if bias is None else bias[None])
        return output.reshape(*input.shape[:-1], self.out_features)

    def _runs_by_op(self, input: Tensor) -> bool:
        """Whether the op `linear` may gain what torch's own product does not.

        It is no part of what is traced or exported, which runs without this package, and torch's
        transforms do not know it.
        """
        if torch.compiler.is_exporting() or _tracing_state() is not None:
            return False
        if _functorch_active() or (not _is_compiled() and forward_ad._current_level >= 0):
            return False
        weight = self.weight
        # A bias of another shape is broadcast or refused as by nn.Linear.
        fits = self.bias is None or self.bias.shape == (self.out_features,)
        if weight.is_meta or not input.numel() or not fits:
            return False
        usual = input.dtype == weight.dtype or torch.is_autocast_enabled(weight.device.type)
        return usual and (weight.is_cuda or weight.dtype is torch.float32)

    def prune_(self, density: float, scores: Tensor | None = None) -> Self:
        """Keep the weights of largest score, ``floor(density * N + 0.5)`` of all N; in place.

        Pruned weights are never revived: where fewer are left than asked for, all of them stay.
        Scores are compared in their own dtype; ties keep the lowest position.

        Args:
            density: fraction of all weights to keep, in [0, 1].
            scores: ``[out_features, in_features]``; the weights' magnitudes if None.

        Returns:
            The layer itself.

        Raises:
            ValueError: density is outside [0, 1], or the scores have another shape or are NaN.

        Example:
            >>> SparseLinear(10, 10).prune_(0.8).prune_(0.64).density
            0.64
        """
        kept = count_kept(density, self.weight.numel())
        if scores is None:
            scores = self.weight.detach().abs()
        if hasattr(scores, "full_tensor"):
            # Sharded over processes, each of which finds the same mask.
            scores = scores.full_tensor()
        check_shape("scores", scores, tuple(self.weight.shape))
        check_data("scores", scores)
        flat = scores.detach().reshape(1, -1)
        if flat.dtype is not torch.float64:
            flat = flat.float()
        # The reference on a GPU: its kernel compares float32 only.
        exact = flat.is_cuda and flat.dtype is torch.float64
        with use_backend("reference") if exact else nullcontext():
            mask = prune(flat, self.mask.reshape(1, -1), kept)
        return self.set_mask_(mask.reshape(self.mask.shape))

    @torch.no_grad()
    def set_mask_(self, mask: Tensor) -> Self:
        """Replace the mask, in place. A weight that it revives starts at zero.

        Args:
            mask: ``[out_features, in_features]`` bool, on any device.

        Returns:
            The layer itself.

        Raises:
            TypeError: the mask is not bool.
            ValueError: the mask has another shape than the weight.
        """
        check_dtype("mask", mask, torch.bool)
        check_shape("mask", mask, tuple(self.weight.shape))
        self.apply_mask_()
        self.mask.copy_(mask)
        return self.apply_mask_()

    @torch.no_grad()
    def apply_mask_(self) -> Self:
        """Zero the pruned weights, their gradients and their optimiser state, in place.

        For pruned weights that somebody wrote, which `forward` reads as zero anyway.
        A weight that is already zero off the mask is left alone, so a backward pass that still
        needs it is not disturbed.

        Returns:
            The layer itself.
        """
        if not (has_data(self.weight) and has_data(self.mask)):
            return self
        if not self.mask.all():
            for tensor in (self.weight, self.weight.grad):
                if tensor is not None and not is_kept(tensor, self.mask):
                    keep_(tensor, self.mask)
            for optimizer in stepped_optimizers():
                keep_state_(optimizer, self.weight, self.mask)
        return self

    def is_dense(self) -> bool:
        """Whether nothing is known to be pruned, without asking a device."""
        mask, prepared = self._buffers.get("mask"), self._prepared
        if prepared is None or mask is None or not mask.is_cpu:
            return False
        return prepared.is_full(mask)

    @property
    def density(self) -> float:
        """The fraction of weights the mask keeps (1.0 of none)."""
        check_data("mask", self.mask)
        return float(self.mask.count_nonzero()) / self.mask.numel() if self.mask.numel() else 1.0

    @property
    def sparsity(self) -> float:
        """The fraction of weights the mask prunes, ``1 - density``."""
        return 1.0 - self.density

    def plan(self, batch: int = 1, *, training: bool = False) -> Plan:
        """What runs now for a batch of this many rows, and why.

        Args:
            batch: rows, all leading dimensions of the input together.
            training: forward and backward, rather than forward alone.

        Raises:
            ValueError: the batch is negative, or the chosen backend cannot run on this device.

        Example:
            >>> SparseLinear(64, 64).plan(batch=8).format
            'dense'
        """
        if batch < 0:
            raise ValueError(f"batch must be >= 0, got {batch}")
        check_data("mask", self.mask)
        if self.mask.all():
            return Plan("linear", "reference", "dense", "nothing is pruned: torch's own linear")
        device = self.weight.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else self.weight.dtype
        return plan_for(self.mask, batch, dtype, training)

    def extra_repr(self) -> str:
        """nn.Linear's, and the number of weights kept."""
        if not has_data(self.mask):
            return super().extra_repr()
        return f"{super().extra_repr()}, kept={int(self.mask.count_nonzero())}/{self.mask.numel()}"

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        self.apply_mask_()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """A dense layer's state has no mask: the present one is applied to it.

        Where that would prune weights, the mask stays missing, which a strict load refuses.
        """
        loaded = state_dict.get(f"{prefix}weight")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        name = f"{prefix}mask"
        if name in missing_keys:
            at = missing_keys.index(name)
            lost = self._count_lost(loaded)
            missing_keys[at : at + 1] = [_MissingMask(name, lost)] if lost else []
        if self.mask.is_meta and not self.weight.is_meta:
            # Loaded by ``assign=True`` from a state without a mask.
            self.mask = torch.ones_like(self.mask, device=self.weight.device)
        track(self)
        self.apply_mask_()

    def _count_lost(self, loaded: Any) -> int:
        """How many weights of a dense layer's state the present mask prunes."""
        if self.mask.is_meta or not isinstance(loaded, Tensor) or loaded.is_meta:
            return 0
        if loaded.shape != self.mask.shape:
            return 0
        return int(loaded.detach().to(self.mask.device).masked_fill(self.mask, 0).count_nonzero())

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        if name == "weight" and "mask" in self._buffers:
            track(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts, which the mask goes through unchanged; ``to_empty``, which it may not.

        A mask that comes out as memory that nobody initialised prunes nothing.
        """
        before = self.mask
        super()._apply(fn, recurse)
        mask = self.mask
        if mask.dtype is not torch.bool:
            self._buffers["mask"] = mask = mask.bool()
        if has_data(mask) and (not has_data(before) or loses_values(fn, before.device)):
            with torch.no_grad():
                mask.fill_(True)
        track(self)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "mask" and "mask" in self.__dict__.get("_buffers", ()):
            if not isinstance(value, Tensor) or value.dtype is not torch.bool:
                given = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(
                    f"mask must be a bool tensor, got {given}: layer.set_mask_(mask.bool()) "
                    "replaces the mask"
                )
            check_shape("mask", value, (self.out_features, self.in_features))
            if value.is_inference():
                raise ValueError(
                    "mask must be a tensor that autograd may keep, got an inference tensor: "
                    "layer.set_mask_(mask) copies it"
                )
        super().__setattr__(name, value)

    def __prepare_scriptable__(self) -> NoReturn:
        """What ``torch.jit.script`` asks for."""
        raise TypeError(
            "SparseLinear must not be scripted: torch.jit.trace, torch.export.export and "
            "torch.onnx.export take it as it is, and "
            "torch.jit.script(sparse_tickets.densify_(copy.deepcopy(module))) a dense copy"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_prepared"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        track(self)


def _check_members(weight: Tensor, mask: Tensor) -> None:
    """Raise ``ValueError`` if `vmap` runs over weights under one mask, whosever that is."""
    if _is_batched(weight) and not _is_batched(mask):
        raise ValueError(
            "mask must be mapped as the weights are, got one for all members of a vmap: pass the "
            "buffers too, as in functional_call(layer, (parameters, buffers), x) of "
            "torch.func.stack_module_state; members that do share a mask take "
            "{name: buffer.expand(members, *buffer.shape)}"
        )


def _is_batched(tensor: Tensor) -> bool:
    """Whether `vmap` maps over a tensor, at any level."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return False


class _MissingMask(str):
    """The key of a mask that a state lacks; in torch's message it says what to do."""

    __slots__ = ("_lost",)

    _lost: int

    def __new__(cls, key: str, lost: int) -> Self:
        self = super().__new__(cls, key)
        self._lost = lost
        return self

    def __format__(self, spec: str) -> str:
        return (
            f"{self!s} (the state has none, as a dense model's, and {self._lost} weights that the "
            "present mask prunes: load it with strict=False to prune them, or make the model dense "
            "first by sparse_tickets.densify_)"
        )
