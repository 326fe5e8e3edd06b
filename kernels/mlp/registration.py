"""A network as registered ops: what each backend computes, its shapes, and its derivatives.

A network is given in integers (`Net.code`). ``mlp`` is differentiable; where the backward pass
reads activations, autograd calls ``mlp_keep`` in its place. A gradient that may be differentiated
in its turn is computed `layered`. `run` spares eager calls the dispatcher.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import Library

from ..arena import Net
from ..dispatch import Backend, differentiating, resolve_backend, resume
from ..errors import check_tensor
from ..linear import is_plain, is_watched
from ..registration import declare
from . import layered, reference
from .checks import check_floats, check_network

_OPS = torch.ops.sparse_tickets


def call(
    x: Tensor, weight: Tensor, mask: Tensor | None, net: Net, density: float, precision: str
) -> Tensor:
    """`mlp` after its checks, by the dispatcher. Arguments as `mlp`'s."""
    return _OPS.mlp.default(x, weight, mask, net.code, density, precision)


def run(
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    net: Net,
    density: float,
    precision: str,
    backend: Backend,
) -> Tensor:
    """`call` without the dispatcher's cost where nobody watches; `backend` is the one in force."""
    if is_watched() or not is_plain(x, weight, mask):
        return call(x, weight, mask, net, density, precision)
    return _Mlp.apply(x, weight, mask, _MlpCall(backend, True, net, density, precision))


def _forward(
    backend: Backend,
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    net: Net,
    density: float,
    precision: str,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """The output, and the hidden activations if ``keep``."""
    if backend == "triton":
        from . import gpu

        return gpu.forward(x, weight, net, mask, precision, keep=keep)
    if backend == "cpu" and not keep:
        from . import cpu

        return cpu.mlp(x, weight, net, mask, density), None
    # Backward passes off the GPU recompute activations: only who calls ``mlp_keep`` asks for them.
    hidden = reference.hidden_layers(x, weight, net, mask) if keep else None
    return reference.mlp(x, weight, net, mask), hidden


def _backward(
    backend: Backend,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    hidden: Tensor | None,
    net: Net,
    density: float,
    precision: str,
    to_input: bool,
    to_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the input and of the weight, those asked for."""
    if not (to_input or to_weight):
        return None, None
    if backend == "triton":
        from . import gpu

        return gpu.backward(
            dy, x, weight, net, mask, precision,
            hidden=hidden, to_input=to_input, to_weight=to_weight,
        )  # fmt: skip
    if backend == "cpu":
        from . import cpu

        return cpu.mlp_backward(
            x, weight, net, mask, density, dy, to_input=to_input, to_weight=to_weight
        )
    leaves = x.detach().requires_grad_(to_input), weight.detach().requires_grad_(to_weight)
    with differentiating():
        y = reference.mlp(*leaves, net, mask)
        found = iter(torch.autograd.grad(y, [leaf for leaf in leaves if leaf.requires_grad], dy))
    dx, dweight = (next(found).contiguous() if leaf.requires_grad else None for leaf in leaves)
    return dx, dweight


def _keeps(backend: Backend, net: Net, precision: str, to_input: bool) -> bool:
    """Whether the backward pass reads the activations of the forward pass."""
    if backend != "triton":
        return False
    from . import gpu

    return gpu.choose(net, precision, to_input=to_input).backward != "fused"


def _differentiably(
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    call: _MlpCall,
    needed: tuple[bool, bool],
    dy: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of x and weight, as autograd's own ops: it may go on from them."""
    # Copies of the leaves' names alone: one leaf may have been made from another.
    x, weight = x.view_as(x), weight.view_as(weight)
    asked = [leaf for leaf, need in zip((x, weight), needed, strict=True) if need]
    with resume(call.backend, dy.device):
        y = layered.mlp(x, weight, mask, call.net, call.precision)
        found = iter(torch.autograd.grad(y, asked, dy, create_graph=True))
    return tuple(next(found) if need else None for need in needed)


class _MlpCall(NamedTuple):
    """What autograd must remember beside tensors.

    The backward pass runs as the forward pass did (`resume`): on a GPU it is another thread, which
    does not see `use_backend`.
    """

    backend: Backend
    direct: bool
    net: Net
    density: float
    precision: str


class _Mlp(torch.autograd.Function):
    """``mlp``, by the dispatcher or directly."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, mask: Tensor | None, call: _MlpCall) -> Tensor:
        backend, direct, net, density, precision = call
        to_input, to_weight, *_ = ctx.needs_input_grad
        keep = (to_input or to_weight) and _keeps(backend, net, precision, to_input)
        if direct:
            tensors = x.detach(), weight.detach(), mask
            y, hidden = _forward(backend, *tensors, net, density, precision, keep)
        else:
            y, hidden = _dispatch(keep, x, weight, mask, net.code, density, precision)
        # The mask too: autograd then raises if it is changed before the backward pass.
        ctx.save_for_backward(x, weight, mask, hidden)
        ctx.call = call
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mask, hidden = ctx.saved_tensors
        backend, direct, net, density, precision = ctx.call
        to_input, to_weight, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            needed = to_input, to_weight
            return *_differentiably(x, weight, mask, ctx.call, needed, dy), None, None
        if direct and not is_watched() and is_plain(dy):
            tensors = dy.detach(), x.detach(), weight.detach(), mask, hidden
            found = _backward(backend, *tensors, net, density, precision, to_input, to_weight)
        else:
            with resume(backend, dy.device), torch._C._AutoDispatchBelowAutograd():
                found = _OPS.mlp_backward.default(
                    dy, x, weight, mask, hidden, net.code, density, precision, to_input, to_weight
                )
        return found[0] if to_input else None, found[1] if to_weight else None, None, None


def _dispatch(keep: bool, *arguments: Any) -> tuple[Tensor, Tensor | None]:
    """An output, and the hidden activations if ``keep``, past autograd."""
    with torch._C._AutoDispatchBelowAutograd():
        if keep:
            return _OPS.mlp_keep.default(*arguments)
        return _OPS.mlp.default(*arguments), None


# Whoever calls an op by its name has passed no other check; kernels read memory by these shapes.


def _check(
    x: Tensor, weight: Tensor, mask: Tensor | None, code: list[int], density: float, precision: str
) -> Net:
    """The network, of whose shapes the arguments are."""
    net = Net.decode(tuple(code))
    check_network(x, weight, mask, net, density, precision)
    return net


def _check_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    hidden: Tensor | None,
    code: list[int],
    density: float,
    precision: str,
) -> Net:
    net = _check(x, weight, mask, code, density, precision)
    given = {"dy": (dy, net.sizes[-1])}
    if hidden is not None:
        given["hidden"] = hidden, net.kept
    for name, (tensor, features) in given.items():
        check_tensor(name, tensor, (*x.shape[:2], features), x.dtype, like=x)
    return net


def _choose_backend(x: Tensor, weight: Tensor, net: Net) -> Backend:
    backend = resolve_backend(x.device, net)
    check_floats(backend, weight=weight, x=x)
    return backend


def _detach(tensor: Tensor | None) -> Any:
    """Without the wish for gradients, which arrays of tensors cannot be asked for."""
    return None if tensor is None else tensor.detach()


def _compute(
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    net_code: list[int],
    density: float,
    precision: str,
) -> Tensor:
    net = _check(x, weight, mask, net_code, density, precision)
    backend = _choose_backend(x, weight, net)
    leaves = x.detach(), weight.detach(), _detach(mask)
    return _forward(backend, *leaves, net, density, precision, False)[0]


def _compute_keeping(
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    net_code: list[int],
    density: float,
    precision: str,
) -> tuple[Tensor, Tensor]:
    net = _check(x, weight, mask, net_code, density, precision)
    backend = _choose_backend(x, weight, net)
    leaves = x.detach(), weight.detach(), _detach(mask)
    kept = _forward(backend, *leaves, net, density, precision, True)
    return cast("tuple[Tensor, Tensor]", kept)


def _compute_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    hidden: Tensor | None,
    net_code: list[int],
    density: float,
    precision: str,
    to_input: bool,
    to_weight: bool,
) -> tuple[Tensor, Tensor]:
    net = _check_backward(dy, x, weight, mask, hidden, net_code, density, precision)
    backend = _choose_backend(x, weight, net)
    dx, dweight = _backward(
        backend,
        dy.detach(),
        x.detach(),
        weight.detach(),
        _detach(mask),
        _detach(hidden),
        net,
        density,
        precision,
        to_input,
        to_weight,
    )
    return x.new_empty(0) if dx is None else dx, weight.new_empty(0) if dweight is None else dweight


def _differentiable(
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    net_code: list[int],
    density: float,
    precision: str,
) -> Tensor:
    # `requires_grad` is False on dual tensors: asking it would lose their tangents silently.
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        net = Net.decode(tuple(net_code))
        call = _MlpCall(resolve_backend(x.device, net), False, net, density, precision)
        return _Mlp.apply(x, weight, mask, call)
    return _dispatch(False, x, weight, mask, net_code, density, precision)[0]


def _fake(x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(*x.shape[:2], _check(x, *others).sizes[-1])


def _fake_keeping(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    net = _check(x, *others)
    return x.new_empty(*x.shape[:2], net.sizes[-1]), x.new_empty(*x.shape[:2], net.kept)


def _fake_backward(dy: Tensor, x: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *rest, to_input, to_weight = others
    _check_backward(dy, x, weight, *rest)
    shapes = x.shape if to_input else 0, weight.shape if to_weight else 0
    return x.new_empty(shapes[0]), weight.new_empty(shapes[1])


declare("mlp", _compute, _fake)
declare("mlp_keep", _compute_keeping, _fake_keeping)
declare("mlp_backward", _compute_backward, _fake_backward)
_library = Library("sparse_tickets", "IMPL")
_library.impl("mlp", _differentiable, "Autograd")
