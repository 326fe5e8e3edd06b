"""Tasks, networks and copies to roll out."""

from __future__ import annotations

import torch
from networks import any_chain

from sparse_tickets.envs.classic import ClassicEnv
from sparse_tickets.kernels.arena import Arena, Parameters

# float32 sums of at most a few hundred terms of size one.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def make_arena(name: str, hidden=(16, 16), critic=True, **kind) -> Arena:
    spec = ClassicEnv(name, 1, 1).spec
    inp, out = spec.observation_dim, spec.action_dim
    architecture = kind.get("architecture", "mlp")
    return Arena.build(
        any_chain(architecture, inp, hidden, out),
        any_chain(architecture, inp, hidden, 1) if critic else None,
        continuous=not spec.discrete,
        **kind,
    )


def make_parameters(arena: Arena, tickets: int, density: float = 1.0, scale=0.4) -> Parameters:
    """Ticket p is the same in every population."""
    weight = torch.empty(tickets, arena.size)
    mask = torch.empty(tickets, arena.prunable, dtype=torch.bool)
    for p in range(tickets):
        generator = torch.Generator().manual_seed(100 + p)
        weight[p] = torch.randn(arena.size, generator=generator) * scale
        mask[p] = torch.rand(arena.prunable, generator=generator) < density
    weight[:, : arena.prunable] *= mask
    zeros = torch.zeros_like(weight)
    return Parameters(weight, mask, zeros, zeros, torch.zeros(tickets, dtype=torch.int64))


def start(name: str, tickets: int, copies: int, **options):
    env = ClassicEnv(name, tickets, copies, **options)
    key = 7 * torch.arange(tickets) + 1
    return env, env.reset(key), key
