"""Argument checks of the ops that run whole networks."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..arena import Arena, Net, Parameters
from ..dispatch import Backend, resolve_backend
from ..errors import (
    check_data,
    check_density,
    check_dtype,
    check_integer,
    check_tensor,
    refuse_shape,
)
from ..linear import check_precision
from ..memory import check_separate


def check_counter(name: str, value: int | Tensor, limit: int, like: Tensor) -> int | Tensor:
    """A number of updates below ``limit``; on a GPU also a 0-dim int64 tensor.

    Raises:
        TypeError: no integer, or a tensor where the CPU kernels count.
        ValueError: out of range, or a tensor of another shape or device.
    """
    if not isinstance(value, Tensor):
        return check_integer(name, value, 0, limit)
    check_tensor(name, value, (), torch.int64, like=like)
    if resolve_backend(like.device) == "cpu":
        raise TypeError(f"{name} must be an int on the CPU, got a tensor")
    return value


def check_floats(backend: Backend, **tensors: Tensor) -> None:
    """Raise ``TypeError`` unless all are float32, or all float64 with the reference backend."""
    if backend != "reference":
        for name, tensor in tensors.items():
            if tensor.dtype != torch.float32:
                check_dtype(name, tensor, torch.float32)
        return
    (first, leader), *others = tensors.items()
    check_dtype(first, leader, torch.float32, torch.float64)
    for name, tensor in others:
        check_dtype(name, tensor, leader.dtype)


def check_rows(weight: Tensor, nets: tuple[Net, ...], mask: Tensor | None, tickets: int) -> None:
    """Raise unless ``weight [tickets, size]`` and ``mask`` fit the networks."""
    size = max(
        begin + length
        for net in nets
        for layer in range(net.depth)
        for begin, length in (
            (net.weights[layer], net.sizes[layer] * net.sizes[layer + 1]),
            (net.biases[layer], net.sizes[layer + 1]),
        )
    )
    if weight.dim() != 2 or weight.shape[0] != tickets or weight.shape[1] < size:
        refuse_shape("weight", weight, (tickets, f"{size} or more"))
    if mask is None:
        return
    shape = (tickets, f"N <= {weight.shape[1]}")
    check_tensor("mask", mask, shape, torch.bool, like=weight)
    if mask.shape[1] > weight.shape[1]:
        refuse_shape("mask", mask, shape)
    prunable = mask.shape[1]
    for net in nets:
        for layer, begin in enumerate(net.weights):
            end = begin + net.sizes[layer] * net.sizes[layer + 1]
            if begin < prunable < end:
                raise ValueError(
                    f"mask must not end inside a layer, got {prunable} entries and a layer at "
                    f"[{begin}, {end})"
                )
            if net.biases[layer] < prunable:
                raise ValueError(
                    f"mask must not cover biases, got {prunable} entries and a bias at "
                    f"{net.biases[layer]}"
                )


def check_network(
    x: Tensor, weight: Tensor, mask: Tensor | None, net: Net, density: float, precision: str
) -> None:
    """Raise unless a network, its input and its mask fit; as `mlp` takes them."""
    check_tensor("x", x, ("P", "B", net.sizes[0]), x.dtype, like=weight)
    check_density(density)
    check_rows(weight, (net,), mask, len(x))
    check_precision(precision)


def check_counts(**counts: int) -> None:
    """Raise ``ValueError`` unless every count is at least 1."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be >= 1, got {count}")


def check_optimiser(max_norm: float | None, beta1: float, beta2: float, eps: float) -> None:
    """Raise ``ValueError`` unless the fused kernels can run this Adam."""
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"max_norm must be > 0 or None, got {max_norm}")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"{name} must be in [0, 1), got {beta}")
    # With eps = 0 a parameter without gradient would become 0 / 0.
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be > 0, got {eps}")


def check_parameters(
    parameters: Parameters,
    arena: Arena,
    key: Tensor,
    lr: Tensor,
    floats: tuple[torch.dtype, ...],
    data: Mapping[str, Tensor],
) -> None:
    """Raise unless the tensors of an update fit the arena, and what it writes is nobody else's.

    Of ``data``, what an update learns from, only whose memory it is counts here.
    """
    weight, mask, m, v, step = parameters
    check_data("weight", weight)
    tickets = weight.shape[0]
    check_tensor("weight", weight, (tickets, arena.size), *floats, like=weight)
    check_tensor("mask", mask, (tickets, arena.prunable), torch.bool, like=weight)
    check_tensor("m", m, weight.shape, weight.dtype, like=weight)
    check_tensor("v", v, weight.shape, weight.dtype, like=weight)
    check_tensor("step", step, (tickets,), torch.int64, like=weight)
    check_tensor("key", key, (tickets,), torch.int64, like=weight)
    check_tensor("lr", lr, (tickets,), torch.float32, torch.float64, like=weight)
    # The kernels and `adam_` update these in place, row by row.
    written = {"weight": weight, "m": m, "v": v, "step": step}
    for name, tensor in written.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    check_separate(written, {"mask": mask, "key": key, "lr": lr, **data})
