"""Sequences of modules whose layers, LayerNorms and activations run as one: forward, and backward.

`Chain` finds the runs that kernels take whole in a sequence of modules, and asks at every call
whether they still may: hooks, other Parameters, autocast, tracing and the like make it go module by
module, with the same result. `SparseSequential` is an ``nn.Sequential`` that calls its chain.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, cast

import torch
from torch import nn

from sparse_tickets.kernels.dispatch import Plan
from sparse_tickets.runs import HOOKS, Run, find_runs

__all__ = ["Chain", "SparseSequential", "make_fused_", "make_plain_"]

# A name of the module, because each dot would be a look-up at every call.
_is_compiled = torch.compiler.is_dynamo_compiling


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
        self._parts: list[nn.Module | Run] | None = None
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
        return tuple(part.plan(batch, training) for part in parts if isinstance(part, Run))

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
        self._parts = find_runs(_flatten(self._listed()))
        self._hooks = tuple(getattr(s, name) for s in nested for name in HOOKS)

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

    Each linear layer may be followed by an ``nn.LayerNorm`` of its whole output and an activation:
    tanh, ReLU, leaky ReLU, ELU, sigmoid, SiLU or GELU. Any other module ends a run.

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
            and any(isinstance(p, Run) for p in find_runs(_flatten(sequence._modules.values())))
        ):
            sequence.__class__ = _fused_class(kind)


def make_plain_(module: nn.Module) -> None:
    """Undo `make_fused_`."""
    for sequence in list(module.modules()):
        if isinstance(sequence, SparseSequential):
            sequence.__dict__.pop("_chain", None)
            sequence.__class__ = _plain_class(type(sequence))
