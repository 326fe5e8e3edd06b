"""Make a policy smaller: without the inputs and units whose weights are gone, and exactly equal."""

from __future__ import annotations

import copy
from itertools import pairwise

import torch
from torch import Tensor, nn

from sparse_tickets.connectivity import flatten
from sparse_tickets.linear import SparseLinear

__all__ = ["ELEMENTWISE", "Compact", "compact"]

ELEMENTWISE: tuple[type[nn.Module], ...] = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardshrink,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.Identity,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.ReLU,
    nn.ReLU6,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Softshrink,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
    nn.Threshold,
)
"""Activations known to act on each feature alone; `compact` takes further ones as an argument."""


class Compact(nn.Module):
    """A smaller dense network and the inputs that it reads: ``net(x[..., kept_inputs])``.

    Attributes:
        in_features: features of the input, dead ones included.
        kept_inputs: ``[k]`` int64 buffer, ascending indices of the inputs that matter.
        net: an ``nn.Sequential`` of plain ``nn.Linear`` and activations.
    """

    kept_inputs: Tensor

    def __init__(self, in_features: int, kept_inputs: Tensor, net: nn.Sequential) -> None:
        super().__init__()
        self.in_features = in_features
        self.register_buffer("kept_inputs", kept_inputs)
        self.net = net

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features] -> [..., out_features]``.

        Raises:
            ValueError: the last dimension of the input is not ``in_features``.
        """
        if input.dim() == 0 or input.shape[-1] != self.in_features:
            raise ValueError(
                f"input must have shape [..., {self.in_features}], got {tuple(input.shape)}"
            )
        return self.net(input[..., self.kept_inputs])

    def extra_repr(self) -> str:
        """How many inputs remain."""
        return f"kept_inputs={self.kept_inputs.numel()}/{self.in_features}"


@torch.no_grad()
def compact(module: nn.Sequential, elementwise: tuple[type[nn.Module], ...] = ()) -> Compact:
    """A smaller dense network that computes the same function, to float tolerance.

    Removed are inputs and units without outgoing weights, and units without incoming weights:
    the latter are constants ``activation(bias)``, which move into the next layer's bias. A weight
    is absent where a `SparseLinear`'s mask says so, or where an ``nn.Linear``'s weight is zero.
    The result is a copy; inputs are taken to be finite.

    Args:
        module: linear layers and activations, possibly in nested ``nn.Sequential``; whatever
            follows the last linear layer is kept as it is.
        elementwise: further activation classes that act on each feature alone, besides
            `ELEMENTWISE` and ``nn.PReLU`` with one parameter.

    Returns:
        A module with attributes ``net`` and ``kept_inputs``.

    Raises:
        TypeError: the module is no ``nn.Sequential``, or holds before its last linear layer
            something that is neither linear nor a known activation.
        ValueError: it holds no linear layer, or its widths do not match.

    Example:
        >>> net = nn.Sequential(SparseLinear(8, 64), nn.Tanh(), SparseLinear(64, 2))
        >>> small = compact(sparsify_(net, density=0.1))
        >>> torch.allclose(small(torch.ones(8)), net(torch.ones(8)))
        True
    """
    if not isinstance(module, nn.Sequential):
        raise TypeError(f"module must be an nn.Sequential, got {type(module).__name__}")
    stages, tail = _parse(module, elementwise)
    _fold_constants(stages)
    kept = _drop_unused(stages)
    # Everything before a layer without inputs computes nothing.
    first = max([i for i, stage in enumerate(stages) if not stage.weight.shape[1]], default=0)
    modules: list[nn.Module] = []
    for stage in stages[first:]:
        if stage.weight.shape[1]:
            modules += stage.before
        modules.append(_dense_layer(stage.weight, stage.bias))
    net = nn.Sequential(*modules, *tail).train(module.training)
    return Compact(stages[0].in_features, kept, net)


class _Stage:
    """One linear layer, the activations before it, and where its weights are."""

    def __init__(self, layer: nn.Linear, before: list[nn.Module]) -> None:
        self.before = copy.deepcopy(before)
        self.in_features = layer.in_features
        self.bias = None if layer.bias is None else layer.bias.detach().clone()
        if isinstance(layer, SparseLinear):
            layer.apply_mask_()
            self.support = layer.mask.clone()
        else:
            self.support = layer.weight != 0
        self.weight = layer.weight.detach().clone()

    def activate(self, features: Tensor) -> Tensor:
        for activation in self.before:
            features = activation(features)
        return features

    def keep_inputs(self, index: Tensor) -> None:
        self.weight, self.support = self.weight[:, index], self.support[:, index]

    def keep_units(self, index: Tensor) -> None:
        self.weight, self.support = self.weight[index], self.support[index]
        self.bias = None if self.bias is None else self.bias[index]


def _parse(
    module: nn.Sequential, elementwise: tuple[type[nn.Module], ...]
) -> tuple[list[_Stage], list[nn.Module]]:
    """Stages up to the last linear layer, and copies of the modules after it."""
    stages: list[_Stage] = []
    pending: list[nn.Module] = []
    for layer in flatten(module):
        if not isinstance(layer, nn.Linear):
            pending.append(layer)
            continue
        for activation in pending:
            scalar = isinstance(activation, nn.PReLU) and activation.num_parameters == 1
            if not (scalar or type(activation) in (*ELEMENTWISE, *elementwise)):
                raise TypeError(
                    "module must hold linear layers and elementwise activations, got "
                    f"{type(activation).__name__} (declare your own by elementwise=...)"
                )
        if stages and stages[-1].weight.shape[0] != layer.in_features:
            raise ValueError(
                f"module must chain layers of matching widths, got {stages[-1].weight.shape[0]} "
                f"features into a layer of {layer.in_features}"
            )
        stages.append(_Stage(layer, pending))
        pending = []
    if not stages:
        raise ValueError("module must hold a linear layer, got none")
    return stages, copy.deepcopy(pending)


def _fold_constants(stages: list[_Stage]) -> None:
    """From the input on: move units without incoming weights into the next layer's bias."""
    for stage, following in pairwise(stages):
        constant = ~stage.support.any(1)
        bias = stage.weight.new_zeros(len(constant)) if stage.bias is None else stage.bias
        value = following.activate(bias.clone())
        # In float64, or the sum over many folded units would cost digits of the bias.
        folded = following.weight[:, constant].double() @ value[constant].double()
        if following.bias is not None:
            following.bias = (following.bias.double() + folded).to(following.bias.dtype)
        elif folded.any():
            following.bias = folded.to(following.weight.dtype)
        alive = (~constant).nonzero().flatten()
        stage.keep_units(alive)
        following.keep_inputs(alive)


def _drop_unused(stages: list[_Stage]) -> Tensor:
    """From the output back: drop units, and name the inputs, without outgoing weights."""
    for following, stage in pairwise(reversed(stages)):
        used = following.support.any(0).nonzero().flatten()
        following.keep_inputs(used)
        stage.keep_units(used)
    kept = stages[0].support.any(0).nonzero().flatten()
    stages[0].keep_inputs(kept)
    return kept


def _dense_layer(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    # nn.Linear warns about widths of zero when it initialises itself: give it its widths after.
    layer = nn.Linear(1, 1, bias=bias is not None, dtype=weight.dtype, device="meta")
    layer.out_features, layer.in_features = weight.shape
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer
