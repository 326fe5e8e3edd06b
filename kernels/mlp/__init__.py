"""A whole network of a population in one call: forward, and gradients on the support."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arena import Net
from ..dispatch import PLAIN_TORCH, Plan, resolve_backend
from ..errors import check_density, check_untransformed
from . import reference, registration
from .checks import check_floats, check_network, check_precision

__all__ = ["describe_layers", "mlp", "plan"]


def mlp(
    x: Tensor,
    weight: Tensor,
    net: Net,
    mask: Tensor | None = None,
    *,
    density: float = 1.0,
    precision: str = "ieee",
) -> Tensor:
    """Apply each ticket's network to its own batch; traceable by ``torch.compile``.

    Entries of `weight` off the mask count as zero and get an exactly zero gradient; so do all
    parameters that do not belong to `net`. Where they can, the kernels recompute the forward pass
    in the backward pass instead of keeping its activations. A gradient that may be differentiated
    again (``create_graph=True``) is computed layer by layer, by `linear`: slower, and equal but for
    rounding. The reference backend is a composition of torch ops. On the CPU, a hidden unit between
    sparse layers from which the mask leaves no path to the output is skipped, so a NaN there goes
    nowhere.

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
        RuntimeError: inside ``torch.func`` transforms, but by the reference backend; from the
            backward pass, if an input was changed in place in between.
    """
    check_network(x, weight, mask, net, density, precision)
    arguments = x, weight, mask, net, float(density), precision
    if torch.compiler.is_compiling():
        # A compiler sees no backend: the op asks for it whenever it runs.
        return registration.call(*arguments)
    backend = resolve_backend(x.device, net)
    check_floats(backend, weight=weight, x=x)
    if backend == "reference":
        return reference.mlp(x, weight, net, mask)
    check_untransformed("mlp", x, weight)
    return registration.run(*arguments, backend)


def plan(
    net: Net,
    device: torch.device,
    *,
    density: float = 1.0,
    masked: bool = True,
    precision: str = "ieee",
    to_input: bool = False,
) -> Plan:
    """What `mlp` does on ``device``, and why; gradients that may be differentiated again apart.

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
    backend = resolve_backend(device, net)
    if backend == "triton":
        from . import gpu

        reason = gpu.describe(net, precision, to_input=to_input)
        return Plan("mlp", "triton", "dense+mask" if masked else "dense", reason)
    if backend == "cpu":
        nominal = density if masked else 1.0
        return Plan("mlp", "cpu", *describe_layers((net,), (nominal,)))
    return Plan("mlp", "reference", "dense+mask", PLAIN_TORCH)


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
