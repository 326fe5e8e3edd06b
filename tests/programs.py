"""Policies whose masks other people's programs must keep."""

import copy

import torch
from sparse_layers import sparse_layers
from torch import nn

from sparse_tickets import densify_, sparsify_


def make(density: float = 0.3, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    policy = nn.Sequential(
        nn.Linear(17, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 6)
    )
    return sparsify_(policy, density)


def draw(batch: int = 5) -> torch.Tensor:
    return torch.randn(batch, 17)


def truth(module: nn.Module) -> nn.Module:
    """A dense copy whose pruned weights are zero."""
    return densify_(copy.deepcopy(module))


def assert_zero(module: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    for layer in sparse_layers(module):
        tensors = [layer.weight.detach()]
        for optimizer in optimizers:
            tensors += optimizer.state.get(layer.weight, {}).values()
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor) and tensor.shape == layer.mask.shape:
                assert not tensor[~layer.mask].count_nonzero()
