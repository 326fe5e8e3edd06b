"""Runs of linear layers and activations that kernels take whole, where nobody has to see each."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from sparse_tickets.kernels.dispatch import CHOSEN, Plan, is_chosen
from sparse_tickets.kernels.linear.known import take_snapshot
from sparse_tickets.kernels.linear.masking import are_equal
from sparse_tickets.kernels.policy import Layer, Network, find_activation, native
from sparse_tickets.linear import SparseLinear

__all__ = ["HOOKS", "Run", "find_runs"]

# Names of the module, because each dot would be a look-up at every call.
_float32 = torch.float32
_grads_are_recorded = torch.is_grad_enabled
_functorch_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_tracing_state = torch._C._get_tracing_state
_autocasts = torch._C._is_any_autocast_enabled

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(getattr(torch_module, f"_global{name}") for name in HOOKS)


def _is_watched() -> bool:
    """Whether something has to see every module or operation."""
    return (
        _tracing_state() is not None
        or _functorch_active()
        or _dispatch_modes() > 0
        or _function_modes() > 0
        or forward_ad._current_level >= 0
        or _autocasts()
        or is_chosen()
    )


def _address_of(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class _Seen:
    """A layer's tensors as they were when its run was made ready."""

    __slots__ = (
        "bias", "bias_size", "buffers", "mask", "mask_at", "parameters", "snapshot", "weight",
        "weight_size",
    )  # fmt: skip

    def __init__(self, layer: nn.Linear) -> None:
        self.parameters: Any = layer._parameters
        self.buffers: Any = layer._buffers
        self.weight: Any = self.parameters.get("weight")
        self.bias: Any = self.parameters.get("bias")
        self.mask: Any = self.buffers.get("mask") if isinstance(layer, SparseLinear) else None
        self.snapshot = None if self.mask is None else take_snapshot(self.mask)
        self.mask_at = _address_of(self.mask)
        self.weight_size = layer.out_features * layer.in_features
        self.bias_size = layer.out_features


class _Ready:
    """A run made ready: the network for the present masks, and what must not have changed.

    Nobody need announce that a mask was written: `has_masks` compares each with its snapshot.

    Attributes:
        compiled: all that in one call, or None while that is not there; of an input ``[B, I]`` it
            gives the output, or None where anything is not as it was or needs a closer look.
    """

    __slots__ = ("_snapshots", "compiled", "inp", "linears", "masks", "network", "tensors")

    def __init__(self, layers: Sequence[tuple[nn.Linear, nn.Module | None]]) -> None:
        self.linears = [_Seen(layer) for layer, _ in layers]
        known, self.masks = [], []
        for linear, (layer, activation) in zip(self.linears, layers, strict=True):
            mask = linear.snapshot
            if mask is not None and bool(mask.all()):
                mask = None
            if mask is not None:
                self.masks.append(linear.mask)
            act = None if activation is None else find_activation(activation)
            known.append(Layer(layer.out_features, layer.in_features, mask, act))
        self.tensors = [t for linear in self.linears for t in (linear.weight, linear.bias)]
        self.inp = known[0].inp
        self.network = Network(known)
        self._snapshots = array("q")
        for linear in self.linears:
            if linear.snapshot is not None:
                snapshot_at = linear.snapshot.data_ptr()
                self._snapshots.extend((linear.mask_at, snapshot_at, linear.weight_size))
        self.compiled: Any = None
        native.start()

    def compile(self, watch: Any) -> None:
        """Have `compiled`, now that there is what it takes; ``watch`` tells who has to see it."""
        seen = self.linears
        places = [
            (each.parameters, each.buffers, each.weight, each.bias, each.mask) for each in seen
        ]
        layers = [
            (known.out, known.inp, each.mask_at, _address_of(each.snapshot), known.mask is not None)
            for each, known in zip(seen, self.network.layers, strict=True)
        ]
        # It borrows tensors and dictionaries, which live as long as `linears`.
        self.compiled = native.module.Run(layers, self.network.form, places, watch)

    def has_masks(self) -> bool:
        """Whether the masks, where they lie, hold what they held."""
        snapshots = self._snapshots
        return are_equal(snapshots.buffer_info()[0], len(snapshots) // 3)


class Run:
    """Linear layers and activations that follow each other; called as one where that may be.

    Args:
        modules: a linear layer first; each may be followed by one known activation.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = tuple(modules)
        self._layers: list[tuple[nn.Linear, nn.Module | None]] = []
        for module in modules:
            if isinstance(module, nn.Linear):
                self._layers.append((module, None))
            else:
                self._layers[-1] = self._layers[-1][0], module
        hooks = [getattr(module, name) for module in modules for name in HOOKS]
        self._hooks = (*_GLOBAL_HOOKS, *hooks)
        self._owners = tuple(module.__dict__ for module in modules)
        self._classes = [type(module) for module in modules]
        self._settings = [
            (module, find_activation(module))
            for module in modules
            if type(module) in (nn.ELU, nn.LeakyReLU, nn.GELU)
        ]
        self._ready: _Ready | None = None

    def __call__(self, input: Tensor) -> Tensor:
        """``[..., I] -> [..., O]``."""
        output = self._fused(input)
        return self._layered(input) if output is None else output

    def _has_settings(self) -> bool:
        """Whether the activations' parameters are what they were."""
        return all(find_activation(module) == setting for module, setting in self._settings)

    def _layered(self, input: Tensor) -> Tensor:
        for module in self.modules:
            input = module(input)
        return input

    def _fused(self, input: Tensor) -> Tensor | None:
        """What kernels make of the input, or None where they may not."""
        ready = self._ready
        settled = not self._settings or self._has_settings()
        if ready is not None and ready.compiled is not None and settled:
            output = ready.compiled(input)
            if output is not None:
                return output
        if (
            any(self._hooks)
            or type(input) is not Tensor
            or _is_watched()
            or not input.is_cpu
            or input.dtype is not _float32
            or input.is_neg()
            or list(map(type, self.modules)) != self._classes
        ):
            return None
        for owner in self._owners:
            if "forward" in owner:
                return None
        if not self._has_settings():
            self._settings = [(m, find_activation(m)) for m, _ in self._settings]
            self._ready = None
        ready = self._ready
        if ready is None:
            ready = self._prepare()
            if ready is None:
                return None
        if ready.compiled is None and native.module is not None:
            ready.compile(self._watch())
        recorded = _grads_are_recorded()
        trained = recorded and input.requires_grad
        addresses: list[int] = []
        for linear in ready.linears:
            parameters, mask = linear.parameters, linear.mask
            weight, bias = linear.weight, linear.bias
            if (
                parameters.get("weight") is not weight
                or parameters.get("bias") is not bias
                or (
                    mask is not None
                    and (
                        linear.buffers.get("mask") is not mask
                        or mask.data_ptr() != linear.mask_at
                        or not mask.is_contiguous()
                    )
                )
            ):
                # Once more with what is there now; a layer that is no longer plain ends it.
                self._ready = None
                return self._fused(input) if self._prepare() is not None else None
            if (
                weight.dtype is not _float32
                or not weight.is_cpu
                or not weight.is_contiguous()
                or weight.is_neg()
                or weight.numel() != linear.weight_size
            ):
                return None
            if bias is None:
                addresses += (weight.data_ptr(), 0, 0, 0)
                trained = trained or (recorded and weight.requires_grad)
                continue
            if (
                bias.dtype is not _float32
                or not bias.is_cpu
                or not bias.is_contiguous()
                or bias.is_neg()
                or bias.numel() != linear.bias_size
            ):
                return None
            addresses += (weight.data_ptr(), 0, bias.data_ptr(), 0)
            trained = trained or (recorded and (weight.requires_grad or bias.requires_grad))
        if not ready.has_masks():
            ready = self._prepare()
            # Not equal to its own snapshot is a mask that is being written, or was never.
            if ready is None or not ready.has_masks():
                return None
        shape = input.shape
        if not shape or shape[-1] != ready.inp:
            return None
        flat = len(shape) == 2
        x = input if flat else input.reshape(-1, ready.inp)
        if not x.is_contiguous():
            x = x.contiguous()
        if trained:
            output = ready.network.train(x, ready.masks, ready.tensors, addresses)
        else:
            output = ready.network.infer(x, x.shape[0], addresses)
        return output if flat else output.view(*shape[:-1], ready.network.out)

    def _watch(self) -> Any:
        """What `_is_watched` and the looks around it ask, in C++; borrows what this run holds."""
        hooks, watcher = list(self._hooks), forward_ad.__dict__
        return native.module.Watch(list(self.modules), hooks, watcher, CHOSEN)

    def _prepare(self) -> _Ready | None:
        """Make ready for the tensors that the layers have now, or None if kernels cannot."""
        for layer, _ in self._layers:
            weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
            mask = layer._buffers.get("mask") if type(layer) is SparseLinear else None
            tensors = [t for t in (weight, bias) if t is not None]
            shape = (layer.out_features, layer.in_features)
            if (
                weight is None
                or ("bias" not in layer._parameters)
                or (type(layer) is SparseLinear and mask is None)
                or any(type(t) is not nn.Parameter for t in tensors)
                or any(t.dtype is not _float32 or not t.is_cpu for t in tensors)
                or tuple(weight.shape) != shape
                or not all(shape)
                or (bias is not None and tuple(bias.shape) != shape[:1])
                or (
                    mask is not None
                    and (
                        type(mask) is not Tensor
                        or not mask.is_cpu
                        or not mask.is_contiguous()
                        or mask.is_inference()
                        or mask.dtype is not torch.bool
                        or tuple(mask.shape) != shape
                    )
                )
            ):
                return None
        self._ready = _Ready(self._layers)
        return self._ready

    def plan(self, batch: int, training: bool) -> Plan:
        """What runs for a batch of this many rows, and why."""
        names = " -> ".join(type(module).__name__ for module in self.modules)
        if any(self._hooks) or any("forward" in owner for owner in self._owners):
            return Plan("policy", "reference", "layers", f"a hook wants to see each of {names}")
        if _is_watched():
            why = "autocast, a transform, a mode, a tracer or a chosen backend goes layer by layer"
            return Plan("policy", "reference", "layers", why)
        ready = self._prepare()
        if ready is None:
            why = f"kernels want contiguous float32 Parameters of a CPU, in {names}"
            return Plan("policy", "reference", "layers", why)
        format, reason = ready.network.describe(batch, training)
        return Plan("policy", "cpu", format, f"{names} in one call {native.status()}: {reason}")


def find_runs(modules: Iterable[nn.Module]) -> list[nn.Module | Run]:
    """Runs worth one call, and what lies between them."""
    found: list[nn.Module | Run] = []
    run: list[nn.Module] = []

    def end() -> None:
        sparse = any(isinstance(module, SparseLinear) for module in run)
        found.extend([Run(run)] if sparse and len(run) > 1 else run)
        run.clear()

    for module in modules:
        if type(module) in (nn.Linear, SparseLinear):
            linear = cast(nn.Linear, module)
            before = [m for m in run if isinstance(m, nn.Linear)]
            if before and before[-1].out_features != linear.in_features:
                end()
            run.append(module)
        elif run and isinstance(run[-1], nn.Linear) and find_activation(module) is not None:
            run.append(module)
        elif type(module) is not nn.Identity or not run:
            end()
            found.append(module)
    end()
    return found
