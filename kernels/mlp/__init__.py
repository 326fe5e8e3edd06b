"""A whole network of a population in one call: forward, and gradients on the support."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arena import Net
from ..dispatch import Plan, resolve_backend
from ..errors import check_device, check_dtype, check_shape, check_untransformed
from ..packed import Pattern, linear_packed, unpack
from . import reference
from .checks import check_density, check_packed, check_precision, check_rows

__all__ = ["composition", "describe_layers", "mlp", "mlp_packed", "plan", "plan_packed"]


def mlp(
    x: Tensor,
    weight: Tensor,
    net: Net,
    mask: Tensor | None = None,
    *,
    density: float = 1.0,
    precision: str = "ieee",
) -> Tensor:
    """Apply each ticket's network to its own batch.

    Entries of `weight` off the mask count as zero and get an exactly zero gradient; so do all
    parameters that do not belong to `net`. The kernels are differentiable once; where they can,
    they recompute the forward pass in the backward pass instead of keeping its activations. The
    reference backend is a composition of torch ops. On the CPU, a hidden unit between sparse layers
    from which the mask leaves no path to the output is skipped, so a NaN there goes nowhere.

    Args:
        x: ``[P, B, I]`` float32; float64 with the reference backend.
        weight: ``[P, size]``, rows of an arena; same dtype.
        net: where the network lies in the row.
        mask: ``[P, N]`` bool over the first N entries of the row, or None if nothing is pruned.
        density: nominal density of the level: chooses each layer's format, never its meaning.
        precision: ``ieee``, ``tf32`` or ``tf32x3``: products of the Triton backend. Others follow
            torch's own setting.

    Returns:
        ``[P, B, O]``: the output layer is linear.

    Raises:
        ValueError: a shape, a device, a mask that ends inside a layer, a density not in [0, 1], or
            a precision that is none of these.
        TypeError: a dtype the backend does not take.
        NotImplementedError: from forward-mode differentiation, but by the reference backend.
        RuntimeError: inside ``torch.func`` transforms, or where a gradient is differentiated, but
            by the reference backend; from the backward pass, if an input was changed in place in
            between.
    """
    if x.dim() != 3:
        raise ValueError(f"x must have shape [P, B, {net.sizes[0]}], got {tuple(x.shape)}")
    tickets, samples, _ = x.shape
    check_shape("x", x, (tickets, samples, net.sizes[0]))
    check_density(density)
    check_rows(weight, (net,), mask, tickets)
    check_device("x", x, weight)
    check_precision(precision)
    backend = resolve_backend(x.device)
    if backend != "reference":
        check_untransformed("mlp", x, weight)
    if backend == "cpu":
        check_dtype("weight", weight, torch.float32)
        check_dtype("x", x, torch.float32)
        return _Mlp.apply(x, weight, net, mask, float(density))
    if backend == "triton":
        check_dtype("weight", weight, torch.float32)
        check_dtype("x", x, torch.float32)
        return _MlpTriton.apply(x, weight, net, mask, precision)
    check_dtype("weight", weight, torch.float32, torch.float64)
    check_dtype("x", x, weight.dtype)
    return reference.mlp(x, weight, net, mask)


def mlp_packed(
    x: Tensor,
    values: Tensor,
    pattern: Pattern,
    rest: Tensor,
    net: Net,
    *,
    precision: str = "ieee",
) -> Tensor:
    """`mlp` by packed weights; their gradient arrives packed as well.

    Gradients by parameters that do not belong to `net` are exactly zero. On a GPU, networks up to
    64 wide run in one launch, differentiable once, without a dense weight or an activation in
    memory; what their kernels leave out (`plan_packed` tells) runs layer by layer as
    `linear_packed`. Other backends unpack, and call `mlp`.

    Args:
        x: ``[P, B, I]`` float32; float64 with the reference backend.
        values: ``[P, k]``, same dtype: the weights on the mask, as `packed.pack` has them.
        pattern: where they lie. It covers the network's weight matrices, one after the other.
        rest: ``[P, size - N]``, same dtype: what follows the prunable weights in a row of the
            arena, so ``weight[:, N:]``; the biases lie there.
        net: where the network lies in the row.
        precision: see `mlp`.

    Returns:
        ``[P, B, O]``: the output layer is linear.

    Raises:
        ValueError: a shape, a device, a pattern or a precision that is none of these.
        TypeError: a dtype the backend does not take, or the pattern is no `Pattern`.
        NotImplementedError, RuntimeError: as `mlp`.
    """
    if x.dim() != 3 or x.shape[2] != net.sizes[0]:
        raise ValueError(f"x must have shape [P, B, {net.sizes[0]}], got {tuple(x.shape)}")
    check_packed(values, pattern, rest, net, x.shape[0])
    check_device("x", x, values)
    check_precision(precision)
    backend = resolve_backend(x.device)
    floats = (torch.float32, torch.float64) if backend == "reference" else (torch.float32,)
    check_dtype("values", values, *floats)
    check_dtype("x", x, values.dtype)
    if backend != "reference":
        check_untransformed("mlp_packed", x, values, rest)
    if backend != "triton":
        return mlp(x, torch.cat([unpack(values, pattern), rest], 1), net)

    from . import packed_gpu

    needed = torch.is_grad_enabled() and any(t.requires_grad for t in (x, values, rest))
    if packed_gpu.is_fused(net, precision, to_input=x.requires_grad, backward=needed):
        return _MlpPacked.apply(x, values, pattern.bits, pattern.start, rest, pattern, net)
    # As in the kernels, products do not take autocast's dtype.
    with torch.autocast(x.device.type, enabled=False):
        return _packed_layers(x, values, pattern, rest, net, precision)


def _packed_layers(
    x: Tensor, values: Tensor, pattern: Pattern, rest: Tensor, net: Net, precision: str
) -> Tensor:
    """The network as a composition of `linear_packed`."""
    first = [layer.offset for layer in pattern.layers].index(net.weights[0])
    for layer in range(net.depth):
        begin = net.biases[layer] - pattern.size
        bias = rest[:, begin : begin + net.sizes[layer + 1]]
        x = linear_packed(x, values, pattern, first + layer, bias, precision=precision)
        if layer < net.depth - 1:
            x = torch.tanh(x) if net.activation == "tanh" else torch.relu(x)
    return x


class _Once(torch.autograd.Function):
    """Gradients, which raise when they are differentiated.

    torch's `once_differentiable` forgets by what: `torch.autograd.grad` then leaves out silently
    what goes through them.
    """

    @staticmethod
    def forward(ctx, count, *gradients_and_sources):
        return gradients_and_sources[:count]

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "mlp is differentiable once: its kernels have no second derivative; "
            "use_backend('reference') has"
        )


def _once(gradients: tuple[Tensor | None, ...], *sources: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients, tied to what they were computed from if somebody may differentiate them."""
    if not torch.is_grad_enabled():
        return gradients
    return _Once.apply(len(gradients), *gradients, *sources)


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, net, mask, density):
        from . import cpu

        ctx.save_for_backward(x, weight, mask)
        ctx.net, ctx.density = net, density
        return cpu.mlp(x.detach(), weight.detach(), net, mask, density)

    @staticmethod
    def backward(ctx, dy):
        from . import cpu

        x, weight, mask = ctx.saved_tensors
        to_input, to_weight = ctx.needs_input_grad[:2]
        inputs = (x.detach(), weight.detach(), ctx.net, mask, ctx.density, dy.detach())
        dx, dweight = cpu.mlp_backward(*inputs, to_input)
        return *_once((dx, dweight if to_weight else None), dy, x, weight), None, None, None


class _MlpTriton(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, net, mask, precision):
        from . import gpu

        to_input, to_weight = ctx.needs_input_grad[:2]
        route = gpu.choose(net, precision, to_input=to_input)
        keep = (to_input or to_weight) and route.backward != "fused"
        y, hidden = gpu.forward(x.detach(), weight.detach(), net, mask, precision, keep=keep)
        # The mask too: autograd then raises if it is changed before the backward pass.
        ctx.save_for_backward(x, weight, mask, hidden)
        ctx.net, ctx.precision = net, precision
        return y

    @staticmethod
    def backward(ctx, dy):
        from . import gpu

        x, weight, mask, hidden = ctx.saved_tensors
        to_input, to_weight = ctx.needs_input_grad[:2]
        dx, dweight = gpu.backward(
            dy.detach(),
            x.detach(),
            weight.detach(),
            ctx.net,
            mask,
            ctx.precision,
            hidden=hidden,
            to_input=to_input,
        )
        return *_once((dx, dweight if to_weight else None), dy, x, weight), None, None, None


class _MlpPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, values, bits, start, rest, pattern, net):
        from . import packed_gpu

        # The pattern's tensors too: autograd then raises if they are changed in between.
        ctx.save_for_backward(x, values, bits, start, rest)
        ctx.pattern, ctx.net = pattern, net
        return packed_gpu.forward(x.detach(), values.detach(), pattern, rest.detach(), net)

    @staticmethod
    def backward(ctx, dy):
        from . import packed_gpu

        x, values, _, _, rest = ctx.saved_tensors
        dvalues, drest = packed_gpu.backward(
            dy.detach(), x.detach(), values.detach(), ctx.pattern, rest.detach(), ctx.net
        )
        of_values, of_rest = _once((dvalues, drest), dy, x, values, rest)
        return None, of_values, None, None, of_rest, None, None


def plan(
    net: Net,
    device: torch.device,
    *,
    density: float = 1.0,
    masked: bool = True,
    precision: str = "ieee",
    to_input: bool = False,
) -> Plan:
    """What `mlp` does on ``device``, and why.

    Args:
        net: the network.
        device: where its tensors live.
        density: nominal density of the level.
        masked: whether a mask covers the network.
        precision: of the products of the Triton backend.
        to_input: whether the gradient of the input is asked for, not the weight's alone.

    Raises:
        ValueError: a density or a precision that `mlp` refuses, or a backend the device cannot run.
    """
    check_density(density)
    check_precision(precision)
    backend = resolve_backend(device)
    if backend == "triton":
        from . import gpu

        reason = gpu.describe(net, precision, to_input=to_input)
        return Plan("mlp", "triton", "dense+mask" if masked else "dense", reason)
    if backend == "cpu":
        nominal = density if masked else 1.0
        return Plan("mlp", "cpu", *describe_layers((net,), (nominal,)))
    return Plan("mlp", "reference", "dense+mask", composition(backend))


def plan_packed(
    net: Net, device: torch.device, *, precision: str = "ieee", to_input: bool = False
) -> Plan:
    """What `mlp_packed` does on ``device`` where gradients are asked for, and why.

    Args:
        net: the network.
        device: where its tensors live.
        precision: of the products of the Triton backend.
        to_input: whether the gradient of the input is asked for, not the parameters' alone.

    Raises:
        ValueError: a precision that `mlp_packed` refuses, or a backend the device cannot run.
    """
    check_precision(precision)
    backend = resolve_backend(device)
    if backend != "triton":
        inner = plan(net, device, masked=False)
        reason = f"unpacked for every call, then as mlp: {inner.reason}"
        return Plan("mlp_packed", backend, inner.format, reason)
    from . import packed_gpu

    reason = packed_gpu.describe(net, precision, to_input=to_input)
    return Plan("mlp_packed", "triton", "packed", reason)


def describe_layers(nets: tuple[Net, ...], densities: tuple[float, ...]) -> tuple[str, str]:
    """Format and reason of the CPU kernels for networks of these nominal densities."""
    from .layout import CACHED_WIDTH, NARROW, SPARSE_DENSITY, SPARSE_DENSITY_WIDE, is_sparse

    formats = [
        "csr" if is_sparse(*net.shape(layer), density) else "dense+mask"
        for net, density in zip(nets, densities, strict=True)
        for layer in range(net.depth)
    ]
    reason = (
        f"compressed rows at nominal density <= {SPARSE_DENSITY} ({SPARSE_DENSITY_WIDE} beyond "
        f"width {CACHED_WIDTH}) or where a layer is at most {NARROW} wide, tiles elsewhere"
    )
    return "/".join(formats), reason


def composition(backend: str) -> str:
    """Why an op without a kernel of its own for ``backend`` runs as torch ops."""
    if backend == "reference":
        return "the reference backend was chosen"
    return "no fused GPU kernel: a composition of torch ops on the masked dense weight"
