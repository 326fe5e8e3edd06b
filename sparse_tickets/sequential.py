"""Sequences of modules whose linear layers and activations run as one: forward, and backward.

`Chain` finds the runs that kernels take whole in a sequence of modules, and asks at every call
whether they still may: hooks, other Parameters, autocast, tracing and the like make it go module by
module, with the same result. `SparseSequential` is an ``nn.Sequential`` that calls its chain.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from sparse_tickets.kernels.dispatch import Plan, is_chosen
from sparse_tickets.kernels.linear.masking import are_equal
from sparse_tickets.kernels.linear.patterns import take_snapshot
from sparse_tickets.kernels.policy import Layer, Network, find_activation
from sparse_tickets.linear import SparseLinear

__all__ = ["Chain", "SparseSequential", "make_fused_", "make_plain_"]

# Names of the module, because each dot would be a look-up at every call.
_float32 = torch.float32
_grads_are_recorded = torch.is_grad_enabled
_is_compiled = torch.compiler.is_dynamo_compiling
_functorch_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_tracing_state = torch._C._get_tracing_state
_autocasts = torch._C._is_any_autocast_enabled

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(getattr(torch_module, f"_global{name}") for name in _HOOKS)


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


class _Linear:
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
        self.mask_at = 0 if self.mask is None else self.mask.data_ptr()
        self.weight_size = layer.out_features * layer.in_features
        self.bias_size = layer.out_features


class _Ready:
    """A run made ready: the network for the present masks, and what must not have changed.

    Nobody need announce that a mask was written: `has_masks` compares each with its snapshot.
    """

    __slots__ = ("_snapshots", "inp", "linears", "masks", "network", "tensors")

    def __init__(self, layers: Sequence[tuple[nn.Linear, nn.Module | None]]) -> None:
        self.linears = [_Linear(layer) for layer, _ in layers]
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

    def has_masks(self) -> bool:
        """Whether the masks, where they lie, hold what they held."""
        snapshots = self._snapshots
        return are_equal(snapshots.buffer_info()[0], len(snapshots) // 3)


class _Run:
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
        hooks = [getattr(module, name) for module in modules for name in _HOOKS]
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
        output = None if any(self._hooks) else self._fused(input)
        return self._layered(input) if output is None else output

    def _layered(self, input: Tensor) -> Tensor:
        for module in self.modules:
            input = module(input)
        return input

    def _fused(self, input: Tensor) -> Tensor | None:
        """What kernels make of the input, or None where they may not."""
        if (
            type(input) is not Tensor
            or _is_watched()
            or not input.is_cpu
            or input.dtype is not _float32
            or list(map(type, self.modules)) != self._classes
        ):
            return None
        for owner in self._owners:
            if "forward" in owner:
                return None
        for module, setting in self._settings:
            if find_activation(module) != setting:
                self._settings = [(m, find_activation(m)) for m, _ in self._settings]
                self._ready = None
                break
        ready = self._ready
        if ready is None:
            ready = self._prepare()
            if ready is None:
                return None
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
        return Plan("policy", "cpu", format, f"{names} in one call: {reason}")


def _find_runs(modules: Iterable[nn.Module]) -> list[nn.Module | _Run]:
    """Runs worth one call, and what lies between them."""
    found: list[nn.Module | _Run] = []
    run: list[nn.Module] = []

    def end() -> None:
        sparse = any(isinstance(module, SparseLinear) for module in run)
        found.extend([_Run(run)] if sparse and len(run) > 1 else run)
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


def _flatten(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The modules in order, with those of nested sequences."""
    for module in modules:
        if _is_sequence(module):
            yield from _flatten(cast(nn.Sequential, module)._modules.values())
        else:
            yield module


def _sequences(modules: Iterable[Any]) -> Iterator[nn.Sequential]:
    """The sequences that `_flatten` looks into."""
    for module in modules:
        if _is_sequence(module):
            yield module
            yield from _sequences(module._modules.values())


def _is_sequence(module: nn.Module) -> bool:
    """Whether a module is an ``nn.Sequential`` that only calls its modules in order."""
    return isinstance(module, nn.Sequential) and (
        type(module).forward in (nn.Sequential.forward, SparseSequential.forward)
    )


class Chain:
    """Modules called one after the other, with as few calls of kernels as may be.

    For policies whose layers are not in one ``nn.Sequential``: an extractor and its head, say. The
    modules stay where they are; a chain only refers to them, and keeps nothing else when it is
    copied or pickled. Later changes are seen: of Parameters, masks, hooks, and of what a sequence
    holds.

    Args:
        modules: in order.

    Example:
        >>> body, head = nn.Sequential(nn.Linear(4, 64), nn.Tanh()), nn.Linear(64, 2)
        >>> policy = sparsify_(nn.ModuleList([body, head]), density=0.5)
        >>> Chain(*policy)(torch.zeros(8, 4)).shape
        torch.Size([8, 2])
    """

    def __init__(self, *modules: nn.Module) -> None:
        self.modules = modules
        self._parts: list[nn.Module | _Run] | None = None
        self._sequences: list[tuple[nn.Sequential, tuple[nn.Module, ...]]] = []
        self._hooks: tuple[Any, ...] = ()

    def __call__(self, input: Any) -> Any:
        """``[..., I] -> [..., O]``."""
        if _is_compiled() or not self._is_fused():
            for module in self._listed():
                input = module(input)
            return input
        for part in cast(list[Any], self._parts):
            input = part(input)
        return input

    def plan(self, batch: int = 1, *, training: bool = False) -> tuple[Plan, ...]:
        """What runs now for a batch of this many rows, and why: a plan for each run of layers.

        Args:
            batch: rows, all leading dimensions of the input together.
            training: forward and backward, rather than forward alone.

        Raises:
            ValueError: the batch is negative.
        """
        if batch < 0:
            raise ValueError(f"batch must be >= 0, got {batch}")
        if not self._is_fused():
            why = "a hook on a sequence wants to see it called"
            return (Plan("policy", "reference", "layers", why),)
        parts = cast(list[Any], self._parts)
        return tuple(part.plan(batch, training) for part in parts if isinstance(part, _Run))

    def _listed(self) -> Iterable[nn.Module]:
        """The modules as they are to be called."""
        return self.modules

    def _is_fused(self) -> bool:
        """Whether the parts may be called; finds them anew where a sequence has changed."""
        if self._parts is None:
            self._find()
        for sequence, modules in self._sequences:
            if tuple(sequence._modules.values()) != modules:
                self._find()
                break
        return not any(self._hooks)

    def _find(self) -> None:
        nested = list(_sequences(self._listed()))
        self._sequences = [(s, cast(Any, tuple(s._modules.values()))) for s in nested]
        self._parts = _find_runs(_flatten(self._listed()))
        self._hooks = tuple(getattr(s, name) for s in nested for name in _HOOKS)

    def __getstate__(self) -> dict[str, Any]:
        return {"modules": self.modules}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Chain.__init__(self, *state["modules"])


class _Inner(Chain):
    """The modules of a sequence, which calls this itself: its own hooks have been heard."""

    def __init__(self, owner: nn.Sequential) -> None:
        super().__init__()
        self._owner = owner

    def _listed(self) -> Iterable[nn.Module]:
        return cast(Any, self._owner._modules.values())

    def _find(self) -> None:
        super()._find()
        self._sequences.append((self._owner, tuple(self._listed())))


class SparseSequential(nn.Sequential):
    """An ``nn.Sequential`` whose runs of linear layers and activations are each one call.

    `sparsify_` makes one of an ``nn.Sequential`` by changing its class. All else stays: modules,
    names, indexing, hooks, ``state_dict``, copies. A sequence of another class that keeps
    ``nn.Sequential.forward`` becomes a `SparseSequential` and what it was.
    """

    def forward(self, input: Any) -> Any:
        """The modules in order, as ``nn.Sequential``."""
        if _is_compiled():
            for module in self:
                input = module(input)
            return input
        return self._get_chain()(input)

    def plan(self, batch: int = 1, *, training: bool = False) -> tuple[Plan, ...]:
        """What runs now for a batch of this many rows, and why: a plan for each run of layers.

        Args:
            batch: rows, all leading dimensions of the input together.
            training: forward and backward, rather than forward alone.

        Raises:
            ValueError: the batch is negative.

        Example:
            >>> policy = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 2))
            >>> [plan.backend for plan in sparsify_(policy, density=0.5).plan(batch=8)]
            ['cpu']
        """
        return self._get_chain().plan(batch, training=training)

    def _get_chain(self) -> Chain:
        chain = self.__dict__.get("_chain")
        if chain is None:
            chain = self.__dict__["_chain"] = _Inner(self)
        return chain

    def __getstate__(self) -> dict[str, Any]:
        state = cast(dict[str, Any], super().__getstate__())
        return {k: v for k, v in state.items() if k != "_chain"}

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (_plain_class(type(self)),), self.__getstate__()


@cache
def _fused_class(plain: Any) -> Any:
    """The class of sequences that are `plain` and a `SparseSequential`."""
    if plain is nn.Sequential:
        return SparseSequential
    body = {"__module__": plain.__module__, "__doc__": plain.__doc__, "_plain": plain}
    return type(f"Sparse{plain.__name__}", (SparseSequential, plain), body)


def _plain_class(fused: type[nn.Module]) -> Any:
    return getattr(fused, "_plain", nn.Sequential)


def _rebuild(plain: Any) -> SparseSequential:
    fused = _fused_class(plain)
    return fused.__new__(fused)


_COMMON = ("forward", "__call__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__")


def make_fused_(module: nn.Module) -> None:
    """Make a `SparseSequential` of every sequence in a module in which one call pays.

    Classes change, not objects. Sequences that call or pickle in their own way stay as they are.
    """
    for sequence in list(module.modules()):
        kind: Any = type(sequence)
        if (
            isinstance(sequence, nn.Sequential)
            and all(getattr(kind, n) is getattr(nn.Sequential, n) for n in _COMMON)
            and any(isinstance(p, _Run) for p in _find_runs(_flatten(sequence._modules.values())))
        ):
            sequence.__class__ = _fused_class(kind)


def make_plain_(module: nn.Module) -> None:
    """Undo `make_fused_`."""
    for sequence in list(module.modules()):
        if isinstance(sequence, SparseSequential):
            sequence.__dict__.pop("_chain", None)
            sequence.__class__ = _plain_class(type(sequence))
