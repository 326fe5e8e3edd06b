"""Environments whose values are known on paper: what a trainer gets wrong shows in one of them.

Each isolates one thing: the reward, the observation, the discount, a cut by the time limit, the
choice of an action, all together. Episodes last one to three steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from sparse_tickets.envs import EnvSpec, Step, register_env
from sparse_tickets.kernels.random import Stream, uniform

GAMMA = 0.5


@dataclass(frozen=True)
class Probe:
    """What happens in one: observations are a number, +1 or -1, or the step of the episode.

    Attributes:
        reward: of observation and action, both ``[P, E]``.
        values: the value of each observation under the best policy, discounted by `GAMMA`.
        best: the return of an episode under it.
        length: steps of an episode.
        counts: whether the observation is the step, instead of a random sign.
        truncates: whether the last step is a time limit's, after which the task would go on.
        discrete: whether actions are 0 or 1, or a number.
        action: what the best policy does at each observation of `values`, where it matters.
    """

    reward: Callable[[Tensor, Tensor], Tensor]
    values: dict[float, float]
    best: float
    length: int = 1
    counts: bool = False
    truncates: bool = False
    discrete: bool = True
    action: dict[float, float] | None = None


def _match(obs: Tensor, action: Tensor) -> Tensor:
    return torch.where(action == (obs > 0), 1.0, -1.0)


def _near(obs: Tensor, action: Tensor) -> Tensor:
    return 1.0 - (action.squeeze(-1) - 0.5 * obs).square()


PROBES = {
    "constant reward": Probe(lambda obs, action: torch.ones_like(obs), {1: 1, -1: 1}, 1.0),
    "reward of the observation": Probe(lambda obs, action: obs, {1: 1, -1: -1}, 0.0),
    "discount": Probe(
        lambda obs, action: (obs == 2).float(),
        {0: GAMMA**2, 1: GAMMA, 2: 1},
        1.0,
        length=3,
        counts=True,
    ),
    "time limit": Probe(
        lambda obs, action: torch.ones_like(obs),
        {1: 1 / (1 - GAMMA), -1: 1 / (1 - GAMMA)},
        3.0,
        length=3,
        truncates=True,
    ),
    "choice": Probe(lambda obs, action: action.float(), {1: 1, -1: 1}, 1.0, action={1: 1, -1: 1}),
    "choice by the observation": Probe(_match, {1: 1, -1: 1}, 1.0, action={1: 1, -1: 0}),
    "number by the observation": Probe(
        _near, {1: 1, -1: 1}, 1.0, discrete=False, action={1: 0.5, -1: -0.5}
    ),
}


# Where the action does not matter it may as well be a number.
CONTINUOUS = {
    f"{name}, numbers": replace(probe, discrete=False)
    for name, probe in PROBES.items()
    if probe.action is None
} | {
    "number": Probe(
        lambda obs, action: 1.0 - (action.squeeze(-1) + 0.5).square(),
        {1: 1, -1: 1},
        1.0,
        discrete=False,
        action={1: -0.5, -1: -0.5},
    ),
    "number by the observation": PROBES["number by the observation"],
}


class ProbeEnv:
    """E copies of a probe for each of P tickets; see `sparse_tickets.envs.Env`."""

    task = None

    def __init__(
        self,
        probe: Probe,
        tickets: int,
        copies: int,
        device: torch.device | str = "cpu",
        *,
        spec: EnvSpec,
        reset_stream: Stream = Stream.RESET,
    ) -> None:
        self.probe, self.tickets, self.copies = probe, tickets, copies
        self.spec, self.device, self.stream = spec, torch.device(device), reset_stream
        self.clock = 0

    def reset(self, key: Tensor) -> Tensor:
        self.key, self.clock = key, 0
        self.elapsed = torch.zeros(self.tickets, self.copies, dtype=torch.int64)
        self.obs = self._start()
        return self.obs.unsqueeze(-1)

    def step(self, action: Tensor) -> Step:
        reward = self.probe.reward(self.obs, action)
        self.clock += 1
        self.elapsed += 1
        ended = self.elapsed == self.probe.length
        self.elapsed[ended] = 0
        reached = self.obs + 1 if self.probe.counts else self.obs
        self.obs = torch.where(ended, self._start(), reached)
        never = torch.zeros_like(ended)
        terminated, truncated = (never, ended) if self.probe.truncates else (ended, never)
        return Step(self.obs.unsqueeze(-1), reward, terminated, truncated, reached.unsqueeze(-1))

    def _start(self) -> Tensor:
        if self.probe.counts:
            return torch.zeros(self.tickets, self.copies)
        draw = uniform(self.key, self.copies, stream=self.stream, step=self.clock)
        return (draw < 0.5).float() * 2 - 1


def register_probes() -> None:
    """Make the probes known to `make_env` by their names."""
    for name, probe in (PROBES | CONTINUOUS).items():
        bounds = () if probe.discrete else (-1.0,)
        spec = EnvSpec(
            name=name,
            observation_dim=1,
            discrete=probe.discrete,
            action_dim=2 if probe.discrete else 1,
            action_low=bounds,
            action_high=tuple(-low for low in bounds),
            time_limit=probe.length,
            offset=(0.0,),
            scale=(1.0,),
            solved=probe.best - 0.1,
            random_return=0.0,
        )
        register_env(name, partial(ProbeEnv, probe), spec, overwrite=True)
