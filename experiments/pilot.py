"""The pilot run behind the frozen observation scales: prints offset, scale and random return.

Half the copies act at random, half follow a hand-written controller that takes a random action
one time in five, for one time limit of steps with restarts. The scale of a feature is the standard
deviation of the pooled observations; its offset is their mean, or zero where that lies within one
standard deviation of zero. Both are rounded to two digits. A random return is the mean over each
copy's first episode.

Unit variance is not a virtue in itself, so the scale then has to prove itself: dense PPO policies
are trained by the protocol on scaled and on raw observations, and raw ones are frozen where fewer
seeds end below the return that counts as solved. That is so on CartPole, whose angle gets fifteen
times larger by scaling. The numbers printed here are typed into
``sparse_tickets/envs/classic.py``; run the file again only to check them::

    python experiments/pilot.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from sparse_tickets.algos import ppo
from sparse_tickets.envs import ClassicEnv, env_spec, register_env
from sparse_tickets.kernels.random import Stream, derive_key, uniform
from sparse_tickets.population import Population, initialise, policy_arena
from sparse_tickets.sweep.protocols import protocol

COPIES = 512
SEEDS = 24
RANDOM, CONTROLLED = 0, 1
EXPLORATION = 0.2


def balance(obs: Tensor) -> Tensor:
    """CartPole: push the way the pole falls and let the cart drift, as half-trained policies do."""
    return (obs[..., 2] + 0.3 * obs[..., 3] > 0).long()


def pump(obs: Tensor) -> Tensor:
    """Acrobot: torque along the second joint's motion, which adds energy."""
    return 1 + obs[..., 5].sign().long()


def rock(obs: Tensor) -> Tensor:
    """MountainCar: push along the motion."""
    return 1 + obs[..., 1].sign().long()


def swing_up(obs: Tensor) -> Tensor:
    """Pendulum: steer the energy to that of standing upright, and hold on near the top."""
    cos, sin, rate = obs.unbind(-1)
    energy = rate * rate / 6 + 5 * (cos - 1)
    pumping = -2 * energy * rate.sign()
    holding = -12 * torch.atan2(sin, cos) - 3 * rate
    return torch.where((cos > 0.9) & (rate.abs() < 3), holding, pumping).clamp(-2, 2)[..., None]


CONTROLLERS: dict[str, Callable[[Tensor], Tensor]] = {
    "CartPole-v1": balance,
    "Acrobot-v1": pump,
    "MountainCar-v0": rock,
    "Pendulum-v1": swing_up,
}


def pilot(name: str) -> tuple[Tensor, Tensor, list[float]]:
    """Offset and scale ``[D]``, and the mean first-episode return, random and controlled."""
    env = ClassicEnv(name, 2, COPIES, spec=env_spec(name).raw())
    key = torch.tensor([derive_key("pilot", name, kind) for kind in ("random", "controlled")])
    obs = env.reset(key)
    seen, returns = [], torch.zeros(2, COPIES)
    running = torch.ones(2, COPIES, dtype=torch.bool)
    for step in range(env.task.time_limit):
        seen.append(obs)
        u = uniform(key, 2 * COPIES, stream=Stream.ACTION, step=step).unflatten(1, (2, COPIES))
        if env.task.discrete:
            action = (u[:, 0] * env.task.action_dim).long()
        else:
            low, high = torch.tensor((env.task.action_low, env.task.action_high))
            action = low + (high - low) * u[:, 0, :, None]
        follow = u[CONTROLLED, 1] >= EXPLORATION
        action[CONTROLLED, follow] = CONTROLLERS[name](obs[CONTROLLED])[follow]
        obs, reward, terminated, truncated, _ = env.step(action)
        returns += reward * running
        running &= ~(terminated | truncated)
    std, mean = torch.std_mean(torch.stack(seen).flatten(0, 2).double(), dim=0)
    return torch.where(mean.abs() < std, 0.0, mean), std, returns.mean(1).tolist()


def judge(name: str, offset: tuple[float, ...], scale: tuple[float, ...]) -> list[Tensor]:
    """Final returns ``[SEEDS]`` of dense PPO on raw and on scaled observations."""
    raw = env_spec(name).raw()
    returns = []
    for label, spec in (("raw", raw), ("scaled", replace(raw, offset=offset, scale=scale))):
        alias = f"{name} {label}"
        register_env(alias, partial(ClassicEnv, name), replace(spec, name=alias))
        arena = policy_arena(spec)
        key = torch.tensor([derive_key("pilot", name, seed) for seed in range(SEEDS)])
        population = Population.create(arena, initialise(arena, key))
        result = ppo.train(protocol(name).ppo, alias, population, key)
        returns.append(result.return_final)
    return returns


def rounded(values: Tensor) -> tuple[float, ...]:
    """The values to two significant digits."""
    return tuple(float(f"{value:.2g}") for value in values.tolist())


if __name__ == "__main__":
    for name in CONTROLLERS:
        offset, scale, (random_return, controlled_return) = pilot(name)
        print(
            f"{name}: offset={rounded(offset)} scale={rounded(scale)} "
            f"random_return={random_return:.1f} controlled_return={controlled_return:.1f}"
        )
        for label, returns in zip(
            ("raw", "scaled"), judge(name, rounded(offset), rounded(scale)), strict=True
        ):
            shown = " ".join(f"{value:.0f}" for value in returns.sort().values.tolist())
            print(f"  PPO on {label} observations: mean {returns.mean():.1f} ({shown})", flush=True)
