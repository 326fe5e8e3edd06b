"""Networks as registered ops: what each backend computes, its shapes, and its derivatives.

A network is given in integers (`Net.code`). ``mlp`` and ``mlp_packed`` are differentiable; where
the backward pass reads activations, autograd calls ``mlp_keep`` or ``mlp_packed_keep`` in their
place. A gradient that may be differentiated in its turn is computed `layered`. `run` and
`run_packed` spare eager calls the dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import Library, register_fake

from ..arena import Net
from ..dispatch import Backend, differentiating, resolve_backend, resume
from ..linear import is_plain, is_watched
from . import layered, reference
from .checks import check_floats

__all__ = ["call", "call_packed", "run", "run_packed"]

# Registration. `Library.impl` instead of `custom_op`, which costs ten times as much per call.

_ROWS = "Tensor x, Tensor weight, Tensor? mask, {}int[] net_code, float density, str precision"
_PACKED = (
    "Tensor x, Tensor values, Tensor bits, Tensor start, Tensor rest, {}int[] net_code, "
    "int[] shapes, str precision"
)
_library = Library("sparse_tickets", "FRAGMENT")
_library.define(f"mlp({_ROWS.format('')}) -> Tensor")
_library.define(f"mlp_keep({_ROWS.format('')}) -> (Tensor, Tensor)")
_library.define(
    f"mlp_backward(Tensor dy, {_ROWS.format('Tensor? hidden, ')}, bool to_input) "
    "-> (Tensor, Tensor)"
)
_library.define(f"mlp_packed({_PACKED.format('')}) -> Tensor")
_library.define(f"mlp_packed_keep({_PACKED.format('')}) -> (Tensor, Tensor)")
_library.define(
    f"mlp_packed_backward(Tensor dy, {_PACKED.format('Tensor? hidden, ')}, bool to_input) "
    "-> (Tensor, Tensor, Tensor)"
)
_OPS = torch.ops.sparse_tickets


def call(
    x: Tensor, weight: Tensor, mask: Tensor | None, net: Net, density: float, precision: str
) -> Tensor:
    """`mlp` after its checks, by the dispatcher. Arguments as `mlp`'s."""
    return _OPS.mlp.default(x, weight, mask, net.code, density, precision)


def call_packed(
    x: Tensor,
    values: Tensor,
    bits: Tensor,
    start: Tensor,
    rest: Tensor,
    net: Net,
    shapes: list[int],
    precision: str,
) -> Tensor:
    """`mlp_packed`, by the dispatcher; bits, start and shapes are the pattern's."""
    return _OPS.mlp_packed.default(x, values, bits, start, rest, net.code, shapes, precision)


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
    return _Mlp.apply(x, weight, mask, _Call(backend, True, (net, density, precision)))


def run_packed(
    x: Tensor,
    values: Tensor,
    bits: Tensor,
    start: Tensor,
    rest: Tensor,
    net: Net,
    shapes: list[int],
    precision: str,
    backend: Backend,
) -> Tensor:
    """`call_packed` without the dispatcher's cost where nobody watches."""
    tensors = (x, values, bits, start, rest)
    if is_watched() or not is_plain(*tensors):
        return call_packed(*tensors, net, shapes, precision)
    return _MlpPacked.apply(*tensors, _Call(backend, True, (net, shapes, precision)))


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
) -> tuple[Tensor | None, Tensor]:
    """Gradients of the input, if asked for, and of the weight."""
    if backend == "triton":
        from . import gpu

        return gpu.backward(dy, x, weight, net, mask, precision, hidden=hidden, to_input=to_input)
    if backend == "cpu":
        from . import cpu

        return cpu.mlp_backward(x, weight, net, mask, density, dy, to_input)
    x, weight = x.detach().requires_grad_(to_input), weight.detach().requires_grad_()
    with differentiating():
        y = reference.mlp(x, weight, net, mask)
        found = torch.autograd.grad(y, (weight, x) if to_input else (weight,), dy)
    return found[1].contiguous() if to_input else None, found[0].contiguous()


def _forward_packed(
    backend: Backend,
    x: Tensor,
    values: Tensor,
    bits: Tensor,
    start: Tensor,
    rest: Tensor,
    net: Net,
    shapes: list[int],
    precision: str,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    if backend == "triton":
        from . import packed_gpu

        weights = packed_gpu.Packed.of(values, bits, start, shapes, rest, net)
        return packed_gpu.forward(weights, x, precision, keep=keep)
    weight = torch.cat([_OPS.unpack.default(values, bits, start, shapes), rest], 1)
    return _forward(backend, x, weight, None, net, 1.0, precision, keep)


def _backward_packed(
    backend: Backend,
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    bits: Tensor,
    start: Tensor,
    rest: Tensor,
    hidden: Tensor | None,
    net: Net,
    shapes: list[int],
    precision: str,
    to_input: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of the input, if asked for, of the values and of the rest."""
    if backend == "triton":
        from . import packed_gpu

        weights = packed_gpu.Packed.of(values, bits, start, shapes, rest, net)
        return packed_gpu.backward(weights, dy, x, precision, hidden=hidden, to_input=to_input)
    dense = _OPS.unpack.default(values, bits, start, shapes)
    weight = torch.cat([dense, rest], 1)
    dx, grad = _backward(backend, dy, x, weight, None, None, net, 1.0, precision, to_input)
    packed = _OPS.pack.default(grad, bits, start, shapes, values.shape[1])
    return dx, packed, grad[:, dense.shape[1] :].clone()


def _keeps(backend: Backend, net: Net, precision: str, to_input: bool) -> bool:
    """Whether the backward pass reads the activations of the forward pass."""
    if backend != "triton":
        return False
    from . import gpu

    return gpu.choose(net, precision, to_input=to_input).backward != "fused"


def _differentiably(
    backend: Backend,
    forward: Callable[..., Tensor],
    leaves: Sequence[Tensor],
    needed: Sequence[bool],
    dy: Tensor,
) -> list[Tensor | None]:
    """Gradients of the leaves that need one, as autograd's own ops: it may go on from them."""
    # Copies of the leaves' names alone: one leaf may have been made from another.
    own = [leaf.view_as(leaf) for leaf in leaves]
    asked = [leaf for leaf, need in zip(own, needed, strict=True) if need]
    with resume(backend, dy.device):
        found = iter(torch.autograd.grad(forward(*own), asked, dy, create_graph=True))
    return [next(found) if need else None for need in needed]


class _Call(NamedTuple):
    """What autograd must remember beside tensors.

    The backward pass runs as the forward pass did (`resume`): on a GPU it is another thread, which
    does not see `use_backend`.
    """

    backend: Backend
    direct: bool
    form: tuple[Any, ...]


class _Mlp(torch.autograd.Function):
    """``mlp``, by the dispatcher or directly; the form is network, density and precision."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, mask: Tensor | None, call: _Call) -> Tensor:
        net, density, precision = call.form
        to_input, to_weight, *_ = ctx.needs_input_grad
        keep = (to_input or to_weight) and _keeps(call.backend, net, precision, to_input)
        if call.direct:
            tensors = x.detach(), weight.detach(), mask
            y, hidden = _forward(call.backend, *tensors, net, density, precision, keep)
        else:
            y, hidden = _dispatch("mlp", keep, x, weight, mask, net.code, density, precision)
        # The mask too: autograd then raises if it is changed before the backward pass.
        ctx.save_for_backward(x, weight, mask, hidden)
        ctx.call = call
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mask, hidden = ctx.saved_tensors
        backend, direct, (net, density, precision) = ctx.call
        to_input, to_weight, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            dx, dweight = _differentiably(
                backend,
                lambda x, weight: layered.mlp(x, weight, mask, net, precision),
                (x, weight),
                (to_input, to_weight),
                dy,
            )
            return dx, dweight, None, None
        if direct and not is_watched() and is_plain(dy):
            tensors = dy.detach(), x.detach(), weight.detach(), mask, hidden
            dx, dweight = _backward(backend, *tensors, net, density, precision, to_input)
        else:
            with resume(backend, dy.device), torch._C._AutoDispatchBelowAutograd():
                dx, dweight = _OPS.mlp_backward.default(
                    dy, x, weight, mask, hidden, net.code, density, precision, to_input
                )
        return dx if to_input else None, dweight if to_weight else None, None, None


class _MlpPacked(torch.autograd.Function):
    """``mlp_packed``, as `_Mlp` is ``mlp``; the form is network, shapes and precision."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bits: Tensor,
        start: Tensor,
        rest: Tensor,
        call: _Call,
    ) -> Tensor:
        net, shapes, precision = call.form
        to_input, *_ = ctx.needs_input_grad
        keep = any(ctx.needs_input_grad) and _keeps(call.backend, net, precision, to_input)
        if call.direct:
            tensors = x.detach(), values.detach(), bits, start, rest.detach()
            y, hidden = _forward_packed(call.backend, *tensors, net, shapes, precision, keep)
        else:
            tensors = x, values, bits, start, rest
            y, hidden = _dispatch("mlp_packed", keep, *tensors, net.code, shapes, precision)
        ctx.save_for_backward(x, values, bits, start, rest, hidden)
        ctx.call = call
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, values, bits, start, rest, hidden = ctx.saved_tensors
        backend, direct, (net, shapes, precision) = ctx.call
        to_input, to_values, _, _, to_rest, _ = ctx.needs_input_grad
        needed = to_input, to_values, to_rest
        if torch.is_grad_enabled():
            dx, dvalues, drest = _differentiably(
                backend,
                lambda x, values, rest: layered.mlp_packed(
                    x, values, bits, start, rest, net, shapes, precision
                ),
                (x, values, rest),
                needed,
                dy,
            )
            return dx, dvalues, None, None, drest, None
        if direct and not is_watched() and is_plain(dy):
            tensors = dy.detach(), x.detach(), values.detach(), bits, start, rest.detach(), hidden
            found = _backward_packed(backend, *tensors, net, shapes, precision, to_input)
        else:
            tensors = dy, x, values, bits, start, rest, hidden
            with resume(backend, dy.device), torch._C._AutoDispatchBelowAutograd():
                found = _OPS.mlp_packed_backward.default(
                    *tensors, net.code, shapes, precision, to_input
                )
        asked = zip(found, needed, strict=True)
        dx, dvalues, drest = (gradient if need else None for gradient, need in asked)
        return dx, dvalues, None, None, drest, None


def _dispatch(name: str, keep: bool, *arguments: Any) -> tuple[Tensor, Tensor | None]:
    """An op's output, and the hidden activations if ``keep``, past autograd."""
    with torch._C._AutoDispatchBelowAutograd():
        if keep:
            return getattr(_OPS, f"{name}_keep").default(*arguments)
        return getattr(_OPS, name).default(*arguments), None


def _register(
    name: str, function: type[torch.autograd.Function], forward: Any, backward: Any, tensors: int
) -> None:
    """Register an op, its keeping form and its derivative: kernels, autograd, shape inference.

    Args:
        name: of the op.
        function: how autograd differentiates it.
        forward: computes it, given the backend first and whether to keep activations last.
        backward: computes the gradients, given the backend first.
        tensors: of the op's arguments; the network follows.
    """

    def decode(arguments: tuple[Any, ...], place: int) -> tuple[Any, ...]:
        # Below autograd tensors may still ask for gradients, which arrays of theirs cannot.
        found = [t.detach() if isinstance(t, Tensor) else t for t in arguments]
        found[place] = Net.decode(tuple(arguments[place]))
        return tuple(found)

    def choose_backend(x: Tensor, parameters: Tensor) -> Backend:
        backend = resolve_backend(x.device)
        check_floats(backend, parameters=parameters, x=x)
        return backend

    def compute(*arguments: Any) -> Tensor:
        backend = choose_backend(*arguments[:2])
        return forward(backend, *decode(arguments, tensors), False)[0]

    def keep(*arguments: Any) -> tuple[Tensor, Tensor]:
        backend = choose_backend(*arguments[:2])
        return forward(backend, *decode(arguments, tensors), True)

    def differentiate(*arguments: Any) -> tuple[Tensor, ...]:
        backend = choose_backend(*arguments[1:3])
        dx, *others = backward(backend, *decode(arguments, tensors + 2))
        return arguments[1].new_empty(0) if dx is None else dx, *others

    def differentiable(*arguments: Any) -> Tensor:
        # `requires_grad` is False on dual tensors: asking it would lose their tangents silently.
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            backend = resolve_backend(arguments[0].device)
            form = decode(arguments, tensors)[tensors:]
            return function.apply(*arguments[:tensors], _Call(backend, False, form))
        return _dispatch(name, False, *arguments)[0]

    def fake(*arguments: Any) -> Tensor:
        x, net = arguments[0], Net.decode(tuple(arguments[tensors]))
        return x.new_empty(*x.shape[:2], net.sizes[-1])

    def fake_keep(*arguments: Any) -> tuple[Tensor, Tensor]:
        x, net = arguments[0], Net.decode(tuple(arguments[tensors]))
        return fake(*arguments), x.new_empty(*x.shape[:2], sum(net.sizes[1:-1]))

    def fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
        _, x, *others = arguments[: tensors + 1]
        *_, to_input = arguments
        leaves = others[:1] if len(others) == 2 else (others[0], others[-1])
        return (
            x.new_empty(x.shape if to_input else 0),
            *(leaf.new_empty(leaf.shape) for leaf in leaves),
        )

    for key in ("CPU", "CUDA"):
        _library.impl(name, compute, key)
        _library.impl(f"{name}_keep", keep, key)
        _library.impl(f"{name}_backward", differentiate, key)
    _library.impl(name, differentiable, "Autograd")
    register_fake(f"sparse_tickets::{name}", fake, lib=_library)
    register_fake(f"sparse_tickets::{name}_keep", fake_keep, lib=_library)
    register_fake(f"sparse_tickets::{name}_backward", fake_backward, lib=_library)


_register("mlp", _Mlp, _forward, _backward, tensors=3)
_register("mlp_packed", _MlpPacked, _forward_packed, _backward_packed, tensors=5)
