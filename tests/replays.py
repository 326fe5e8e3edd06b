"""Every replay of a captured graph draws fresh random numbers: on a GPU, and on the pretended one.

A fault that others published: a captured policy kept the generator's state of its capture, and the
noise of its actions collapsed.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import torch

from sparse_tickets.algos.replay import replayed
from sparse_tickets.envs import env_spec, make_env
from sparse_tickets.kernels.arena import Arena
from sparse_tickets.kernels.dqn import DQNConfig, dqn_update_
from sparse_tickets.kernels.random import Stream, bits, integers, normal, permutation, uniform
from sparse_tickets.kernels.rollout import rollout
from sparse_tickets.kernels.sac import SACConfig, sac_update_
from sparse_tickets.kernels.transitions import Transitions
from sparse_tickets.population import Population, policy_arena

__all__ = ["check_actions", "check_dqn", "check_draws", "check_sac"]

CALLS = 3
KEY = (5, -6)


def check_draws(device: str) -> None:
    """Of every distribution, by a clock on the device: those of the clock, no two alike."""
    stream = Stream.ACTION

    def numbers(key: torch.Tensor, step: int | torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            "bits": bits(key, 9, stream=stream, step=step),
            "uniform": uniform(key, 9, stream=stream, step=step),
            "normal": normal(key, 9, stream=stream, step=step),
            "integers": integers(key, 9, 1000, stream=stream, step=step),
            "permutation": permutation(key, 9, stream=stream, step=step),
        }

    key, clock = torch.tensor(KEY, device=device), torch.zeros((), dtype=torch.int64, device=device)
    drawn: dict[str, torch.Tensor] = {}

    def draw() -> None:
        drawn.update(numbers(key, clock))
        clock.add_(1)

    advance, seen = replayed(draw), []
    for call in range(CALLS):
        advance()
        seen.append({name: values.cpu().clone() for name, values in drawn.items()})
        torch.testing.assert_close(seen[-1], numbers(key.cpu(), call), rtol=1e-6, atol=1e-6)
    for one, other in combinations(seen, 2):
        for name in drawn:
            assert not torch.equal(one[name], other[name]), name


def check_actions(device: str) -> None:
    """A policy of mean zero and deviation one: what it does is its noise, new at every step."""
    arena = policy_arena(env_spec("Pendulum-v1"), (4,), critic=False)
    key = torch.tensor(KEY, device=device)
    weight = torch.zeros(len(KEY), arena.size, device=device)
    policy = Population.create(arena, weight).parameters
    env = make_env("Pendulum-v1", len(KEY), 3, device=key.device)
    obs = env.reset(key)
    env.keep_clock_on_device()
    taken: list[torch.Tensor] = []

    def act() -> None:
        outcome, after = rollout(policy, arena, env, obs, key, 2)
        taken[:] = [outcome.action]
        obs.copy_(after)

    advance, seen = replayed(act), []
    for _ in range(CALLS):
        advance()
        seen.append(taken[0].cpu().clone())
    noise = torch.stack(seen).flatten()
    assert noise.unique().numel() == noise.numel() == CALLS * 2 * len(KEY) * 3
    # 36 normal numbers: four standard errors.
    assert abs(noise.mean()) < 0.67
    assert abs(noise.std() - 1) < 0.48


def check_dqn(device: str) -> None:
    """Each replay takes the transitions of its own updates."""
    arena = Arena.build((3, 8, 2), activation="relu")
    _check_updates(device, dqn_update_, arena, DQNConfig(2, 5))


def check_sac(device: str) -> None:
    """Each replay takes the transitions and the noise of its own updates."""
    arena = Arena.build((3, 8, 4), (5, 8, 1), activation="relu", squashed=True)
    _check_updates(device, sac_update_, arena, SACConfig(1, 5, -1.0))


def _check_updates(device: str, update_: Callable[..., Any], arena: Arena, config: Any) -> None:
    generator, shape = torch.Generator().manual_seed(0), (len(KEY), 40)

    def normals(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator).to(device)

    replay = Transitions(
        normals(*shape, 3),
        normals(*shape, 2).tanh() if arena.squashed else (normals(*shape) > 0).long(),
        normals(*shape),
        torch.full(shape, 0.9, device=device),
        normals(*shape, 3),
    )
    key, rate = torch.tensor(KEY, device=device), torch.full((len(KEY),), 1e-2, device=device)
    start = 0.3 * normals(len(KEY), arena.size)
    counted, told, stuck = (Population.create(arena, start).parameters for _ in range(3))
    targets = {id(each): start.clone() for each in (counted, told, stuck)}

    def update(parameters: Any, number: int | torch.Tensor) -> None:
        target = targets[id(parameters)]
        update_(parameters, arena, target, replay, shape[1], key, number, rate, config)

    clock = torch.zeros((), dtype=torch.int64, device=device)

    def step() -> None:
        update(counted, clock)
        clock.add_(config.updates)

    advance = replayed(step)
    for call in range(CALLS):
        advance()
        update(told, call * config.updates)
        update(stuck, 0)
    for one, other in zip(counted, told, strict=True):
        assert torch.equal(one.cpu(), other.cpu())
    assert not torch.allclose(counted.weight.cpu(), stuck.weight.cpu())
