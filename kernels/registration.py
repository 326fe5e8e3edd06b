"""Register ops with torch: `declare` one without a derivative, or `register` one that has.

The latter is differentiable by other ops, traceable and batchable. What trains or acts is no op of
torch's: nobody traces it, and it is `eager`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from operator import itemgetter
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import Library, infer_schema, register_fake, register_vmap

from .dispatch import resolve_backend

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_library = Library("sparse_tickets", "FRAGMENT")


def eager(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """A function that a compiler calls between its graphs instead of tracing it."""

    @wraps(function)
    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return call


def declare(
    name: str,
    compute: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    written: tuple[str, ...] = (),
    symbolic: bool = False,
) -> Any:
    """Register an op that torch does not differentiate, and return it.

    Args:
        name: of the op, and after a dot of its overload.
        compute: what it is on any device; its annotations are the op's schema.
        fake: the shapes of its results.
        written: the arguments that ``compute`` writes.
        symbolic: whether a compiler may leave integers open; costs a look-up at every call.
    """
    schema = infer_schema(compute, mutates_args=written)
    _library.define(name + (schema if symbolic else schema.replace("SymInt", "int")))
    _library.impl(name, compute, "CompositeExplicitAutograd")
    register_fake(f"sparse_tickets::{name}", fake, lib=_library)
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.sparse_tickets, packet), overload or "default")


class Differentiable(torch.autograd.Function):
    """An op with its inputs saved; subclasses say what its derivative is.

    The backward pass runs as the forward pass did (`resume`): on a GPU it is another thread, which
    does not see `use_backend`. It finds in ``ctx`` the ``backend``, the ``shape`` of the first
    argument, and the ``rest``.

    Attributes:
        saved: the arguments saved. Masks and patterns too: autograd then raises if one is changed
            before the backward pass.
        rest: those that are no tensors.
    """

    saved: Any = itemgetter(0, 1, 2, 3)
    rest = slice(4, None)

    @classmethod
    def forward(cls, ctx: Any, op: Any, *args: Any) -> Tensor:
        ctx.backend = resolve_backend(args[0].device)
        ctx.shape = args[0].shape
        ctx.rest = args[cls.rest]
        ctx.save_for_backward(*cls.saved(args))
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        raise NotImplementedError(
            "sparse_tickets' layers have no forward-mode derivative; use reverse mode "
            "(backward, torch.autograd.grad)"
        )


def register(
    name: str,
    compute: Callable[..., Tensor],
    shape: Callable[..., tuple[int, ...]],
    function: type[Differentiable],
) -> Any:
    """Register an op with its autograd and vmap, and return it.

    Args:
        name: of the op, of tensors ``[P, ...]`` and what they share.
        compute: what it is on any device; its annotations are the op's schema.
        shape: of the result, which has the first argument's dtype; raises where arguments do not
            fit: whoever calls the op by its name has passed no other check, and kernels read
            memory by shapes.
        function: how autograd differentiates it, given the op first.
    """

    @wraps(compute)
    def checked(*args: Any) -> Tensor:
        shape(*args)
        return compute(*args)

    def fake(*args: Any) -> Tensor:
        return args[0].new_empty(shape(*args))

    def differentiable(*args: Any) -> Tensor:
        # `requires_grad` is False on dual tensors: asking it would lose their tangents silently.
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            return function.apply(op, *args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    def batched(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        """Another batch of tickets is just more tickets."""

        def fold(arg: Any, dim: int | None) -> Any:
            if not isinstance(arg, Tensor):
                return arg
            if dim is None:
                return arg.expand(info.batch_size, *arg.shape).flatten(0, 1)
            return arg.movedim(dim, 0).flatten(0, 1)

        result = op(*[fold(arg, dim) for arg, dim in zip(args, in_dims, strict=True)])
        tickets = result.shape[0] // max(info.batch_size, 1)
        return result.unflatten(0, (info.batch_size, tickets)), 0

    op = declare(name, checked, fake)
    _library.impl(name, differentiable, "Autograd")
    register_vmap(f"sparse_tickets::{name}", batched, lib=_library)
    return op
