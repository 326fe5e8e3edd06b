"""Policies to convert."""

import math
import warnings

import torch
from torch import nn

from sparse_tickets.convert import (
    SparsifyWarning,
    densify_,
    sparsify_,
)


class ActorCritic(nn.Module):
    """As libraries build it: two bodies from a helper, two heads, orthogonal initialisation."""

    def __init__(self) -> None:
        super().__init__()
        self.actor = create_mlp(4, 2, [16, 16])
        self.critic = create_mlp(4, 1, [16])

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.actor(obs), self.critic(obs)

    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.orthogonal_(module.weight, gain=math.sqrt(2))
                module.bias.data.fill_(0.0)


def create_mlp(inputs: int, outputs: int, hidden: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(inputs, width), nn.Tanh()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


def train(policy: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> float:
    obs = torch.linspace(-1, 1, 32).reshape(8, 4)
    for _ in range(steps):
        logits, value = policy(obs)
        loss = nn.functional.cross_entropy(logits, torch.arange(8) % 2) + value.square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
        optimizer.step()
    return loss.item()


ACTIVATIONS = [
    nn.Tanh(),
    nn.ReLU(inplace=True),
    nn.Sigmoid(),
    nn.Softplus(),
    nn.ELU(),
    nn.GELU(),
    nn.PReLU(),
    nn.Identity(),
]


def random_stack(seed: int, density: float, bias: bool, sparse: bool = True) -> nn.Sequential:
    """A stack with weights so rare that dead inputs, dead units and constants all occur."""
    torch.manual_seed(seed)
    activation = ACTIVATIONS[seed % len(ACTIVATIONS)]
    module = nn.Sequential(
        nn.Linear(9, 12, bias=bias),
        activation,
        nn.Sequential(nn.Linear(12, 11, bias=bias), nn.Tanh(), activation),
        nn.Linear(11, 7, bias=bias),
        nn.Linear(7, 3, bias=bias),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SparsifyWarning)
        sparsify_(module, density, scope="global")
    return module if sparse else densify_(module)
