"""Runs of linear layers, LayerNorms and activations that kernels take whole, where nobody looks."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from sparse_tickets.kernels.dispatch import CHOSEN, Plan, is_chosen
from sparse_tickets.kernels.linear.known import take_snapshot
from sparse_tickets.kernels.linear.masking import are_equal
from sparse_tickets.kernels.policy import Layer, Network, Norm, find_activation, native
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


def _find_setting(module: nn.Module) -> Any:
    """What a module says of its computation beside its class, or None."""
    if type(module) is nn.LayerNorm:
        return module.normalized_shape, module.eps
    return find_activation(module)


class _Unit(NamedTuple):
    """A linear layer, and the LayerNorm and activation that follow it."""

    linear: nn.Linear
    norm: nn.LayerNorm | None = None
    activation: nn.Module | None = None

    @property
    def owners(self) -> Iterator[nn.Linear | nn.LayerNorm]:
        """The modules that have parameters."""
        yield self.linear
        if self.norm is not None:
            yield self.norm


class _Seen:
    """A module's tensors as they were when its run was made ready."""

    __slots__ = (
        "bias", "buffers", "inp", "mask", "mask_at", "out", "parameters", "snapshot", "weight",
    )  # fmt: skip

    def __init__(self, owner: nn.Linear | nn.LayerNorm) -> None:
        self.parameters: Any = owner._parameters
        self.buffers: Any = owner._buffers
        self.weight: Any = self.parameters.get("weight")
        self.bias: Any = self.parameters.get("bias")
        self.mask: Any = self.buffers.get("mask") if isinstance(owner, SparseLinear) else None
        self.snapshot = None if self.mask is None else take_snapshot(self.mask)
        self.mask_at = _address_of(self.mask)
        # A norm is a layer of one input here.
        self.out, self.inp = _shape(owner)


class _Ready:
    """A run made ready: the network for the present masks, and what must not have changed.

    Nobody need announce that a mask was written: `has_masks` compares each with its snapshot.

    Attributes:
        compiled: all that in one call, or None while that is not there; of an input ``[B, I]`` it
            gives the output, or None where anything is not as it was or needs a closer look.
    """

    __slots__ = ("_snapshots", "compiled", "inp", "masks", "network", "owners", "tensors")

    def __init__(self, units: Sequence[_Unit]) -> None:
        self.owners: list[_Seen] = []
        known, self.masks = [], []
        for unit in units:
            linear, *rest = map(_Seen, unit.owners)
            self.owners += linear, *rest
            mask = linear.snapshot
            if mask is not None and bool(mask.all()):
                mask = None
            if mask is not None:
                self.masks.append(linear.mask)
            act = None if unit.activation is None else find_activation(unit.activation)
            norm = None if unit.norm is None else Norm(unit.norm.eps)
            known.append(Layer(linear.out, linear.inp, mask, act, norm))
        self.tensors = [t for owner in self.owners for t in (owner.weight, owner.bias)]
        self.inp = known[0].inp
        self.network = Network(known)
        self._snapshots = array("q")
        for seen in self.owners:
            if seen.snapshot is not None:
                snapshot_at = seen.snapshot.data_ptr()
                self._snapshots.extend((seen.mask_at, snapshot_at, seen.out * seen.inp))
        self.compiled: Any = None
        native.start()

    def compile(self, watch: Any) -> None:
        """Have `compiled`, now that there is what it takes; ``watch`` tells who has to see it."""
        places = [
            (each.parameters, each.buffers, each.weight, each.bias, each.mask)
            for each in self.owners
        ]
        prune = {id(mask) for mask in self.masks}
        layers = [
            (each.out, each.inp, each.mask_at, _address_of(each.snapshot), id(each.mask) in prune)
            for each in self.owners
        ]
        # It borrows tensors and dictionaries, which live as long as `owners`.
        self.compiled = native.module.Run(layers, self.network.form, places, watch)

    def has_masks(self) -> bool:
        """Whether the masks, where they lie, hold what they held."""
        snapshots = self._snapshots
        return are_equal(snapshots.buffer_info()[0], len(snapshots) // 3)


def _shape(owner: nn.Linear | nn.LayerNorm) -> tuple[int, int]:
    if isinstance(owner, nn.Linear):
        return owner.out_features, owner.in_features
    return owner.normalized_shape[0], 1


class Run:
    """Linear layers, norms and activations that follow each other; called as one where that may be.

    Args:
        modules: a linear layer first; each may be followed by one LayerNorm of its width and one
            known activation.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = tuple(modules)
        self._units: list[_Unit] = []
        for module in modules:
            if isinstance(module, nn.Linear):
                self._units.append(_Unit(module))
            elif isinstance(module, nn.LayerNorm):
                self._units[-1] = self._units[-1]._replace(norm=module)
            else:
                self._units[-1] = self._units[-1]._replace(activation=module)
        hooks = [getattr(module, name) for module in modules for name in HOOKS]
        self._hooks = (*_GLOBAL_HOOKS, *hooks)
        self._owners = tuple(module.__dict__ for module in modules)
        self._classes = [type(module) for module in modules]
        self._settings = [
            (module, _find_setting(module))
            for module in modules
            if type(module) in (nn.ELU, nn.LeakyReLU, nn.GELU, nn.LayerNorm)
        ]
        self._ready: _Ready | None = None

    def __call__(self, input: Tensor) -> Tensor:
        """``[..., I] -> [..., O]``."""
        output = self._fused(input)
        return self._layered(input) if output is None else output

    def _has_settings(self) -> bool:
        """Whether the modules' own parameters are what they were."""
        return all(_find_setting(module) == setting for module, setting in self._settings)

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
            self._settings = [(m, _find_setting(m)) for m, _ in self._settings]
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
        for seen in ready.owners:
            parameters, mask = seen.parameters, seen.mask
            weight, bias = seen.weight, seen.bias
            if (
                parameters.get("weight") is not weight
                or parameters.get("bias") is not bias
                or (
                    mask is not None
                    and (
                        seen.buffers.get("mask") is not mask
                        or mask.data_ptr() != seen.mask_at
                        or not mask.is_contiguous()
                    )
                )
            ):
                # Once more with what is there now; a layer that is no longer plain ends it.
                self._ready = None
                return self._fused(input) if self._prepare() is not None else None
            for tensor, size in ((weight, seen.out * seen.inp), (bias, seen.out)):
                if tensor is None:
                    addresses += (0, 0)
                    continue
                if (
                    tensor.dtype is not _float32
                    or not tensor.is_cpu
                    or not tensor.is_contiguous()
                    or tensor.is_neg()
                    or tensor.numel() != size
                ):
                    return None
                addresses += (tensor.data_ptr(), 0)
                trained = trained or (recorded and tensor.requires_grad)
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
        """Make ready for the tensors that the modules have now, or None if kernels cannot."""
        fit = all(
            _fits(unit.linear)
            and (unit.norm is None or _fits_norm(unit.norm, unit.linear.out_features))
            for unit in self._units
        )
        if not fit:
            return None
        self._ready = _Ready(self._units)
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


def _fits(layer: nn.Linear) -> bool:
    """Whether kernels can read a layer's tensors as they are now."""
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    mask = layer._buffers.get("mask") if type(layer) is SparseLinear else None
    shape = _shape(layer)
    return (
        weight is not None
        and "bias" in layer._parameters
        and all(shape)
        and _is_parameter(weight, shape)
        and (bias is None or _is_parameter(bias, shape[:1]))
        and (
            type(layer) is not SparseLinear
            or (
                type(mask) is Tensor
                and mask.is_cpu
                and mask.is_contiguous()
                and not mask.is_inference()
                and mask.dtype is torch.bool
                and tuple(mask.shape) == shape
            )
        )
    )


def _fits_norm(norm: nn.LayerNorm, width: int) -> bool:
    return tuple(norm.normalized_shape) == (width,) and all(
        name in norm._parameters
        and (norm._parameters[name] is None or _is_parameter(norm._parameters[name], (width,)))
        for name in ("weight", "bias")
    )


def _continues(before: nn.Module, module: nn.Module) -> bool:
    """Whether a norm of a whole layer or a known activation follows what it may follow."""
    if type(module) is nn.LayerNorm and isinstance(before, nn.Linear):
        return tuple(module.normalized_shape) == (before.out_features,)
    return isinstance(before, nn.Linear | nn.LayerNorm) and find_activation(module) is not None


def _is_parameter(tensor: Any, shape: tuple[int, ...]) -> bool:
    return (
        type(tensor) is nn.Parameter
        and tensor.dtype is _float32
        and tensor.is_cpu
        and tuple(tensor.shape) == shape
    )


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
        elif run and _continues(run[-1], module):
            run.append(module)
        elif type(module) is not nn.Identity or not run:
            end()
            found.append(module)
    end()
    return found
