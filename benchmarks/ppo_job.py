"""A whole PPO iteration of a population as a contender: rollout, advantages, update.

What is verified, on the backend, population and density that is timed, and against plain torch on
a few of the tickets (nothing crosses tickets): the rollout's observations and actions, its
log-probabilities and values in float64, advantages in float64, and the weights after the update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparse_tickets.algos.ppo import PPO
from sparse_tickets.algos.replay import can_replay
from sparse_tickets.envs import env_spec, make_env
from sparse_tickets.kernels import Batch, Parameters, gae, ppo_update_, use_backend
from sparse_tickets.kernels.mlp import mlp
from sparse_tickets.kernels.ppo import plan
from sparse_tickets.kernels.ppo.reference import log_prob_and_entropy
from sparse_tickets.kernels.rollout import Rollout, rollout
from sparse_tickets.population import Population, initialise, policy_arena
from sparse_tickets.timing import Contender, mismatch

from .ours import on_backend
from .problems import density_of, random_masks

KFLOP_PER_STEP = 233
"""Dense work of one agent-step, 4-64-64 tanh actor and critic, four epochs: forward in the rollout,
forward and backward in the update. The yardstick that makes machines comparable."""

CHECKED = 4
"""Tickets of a population that are compared with plain torch."""
# An action drawn within rounding of a boundary may differ; the rest of that episode then does too.
_SAME_ACTIONS = 0.95
# Adam's early steps have the size of the learning rate whatever the gradient's, so rounding in a
# tiny gradient shows in full: allowed is this multiple of plain float32 torch's own distance.
_UPDATE_FACTOR = 8.0
_UPDATE_FLOOR = 0.005


@dataclass
class PPOJob:
    """P tickets at one sparsity on one environment, ready to iterate.

    Attributes:
        tickets: P.
        sparsity: percent of the actor's weights pruned.
        settings: copies, horizon, epochs, minibatches...
        env_name: a built-in environment.
        backend: of every op.
        nominal: density the kernels are told, if not the true one: 1 runs dense.
        network: what `policy_arena` takes beside the environment.
    """

    tickets: int = 60
    sparsity: float = 0.0
    settings: PPO = field(default_factory=PPO)
    env_name: str = "CartPole-v1"
    backend: str = "auto"
    device: str = "cpu"
    nominal: float | None = None
    network: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.arena = policy_arena(env_spec(self.env_name), **self.network)
        self.key = torch.arange(self.tickets).to(self.device)
        generator = torch.Generator().manual_seed(0)
        mask = random_masks(self.tickets, self.arena.prunable, self.sparsity, generator)
        self.density = density_of(self.sparsity) if self.nominal is None else self.nominal
        with use_backend("reference"):
            weight = initialise(self.arena, self.key)
        self._start = (weight, mask.to(self.device))
        self.restart()

    def restart(self) -> None:
        """Back to the initial weights and first observations."""
        weight, mask = self._start
        self.population = Population.create(self.arena, weight, mask, self.density)
        self.env = make_env(self.env_name, self.tickets, self.settings.copies, device=self.device)
        self.obs = self.env.reset(self.key)
        self.iteration: int | Tensor = 0
        with use_backend(self.backend):
            if can_replay(self.env, self.population):
                # As training does it: a CUDA graph replays integers as they were captured.
                self.env.keep_clock_on_device()
                self.iteration = torch.zeros((), dtype=torch.int64, device=self.device)

    @property
    def agent_steps(self) -> int:
        """Of one iteration, over all tickets."""
        return self.tickets * self.settings.batch

    def iterate(self) -> None:
        """One iteration, as `algos.ppo.train` runs it."""
        experience = self.act()
        self.update(self.prepare(experience))

    def act(self) -> Rollout:
        """The rollout."""
        experience, obs = rollout(
            self.population.parameters,
            self.arena,
            self.env,
            self.obs,
            self.key,
            self.settings.horizon,
            density=self.density,
        )
        self.obs.copy_(obs)
        return experience

    def prepare(self, experience: Rollout) -> Batch:
        """Advantages, and samples in one row per ticket."""
        advantage, target = _advantage(experience, self.settings)
        samples = experience.flatten()
        return Batch(
            samples.obs,
            samples.action,
            samples.logp,
            samples.value,
            advantage.flatten(1),
            target.flatten(1),
        )

    def update(self, batch: Batch) -> None:
        """All epochs and minibatches."""
        rate = torch.full((self.tickets,), self.settings.learning_rate, device=self.device)
        ppo_update_(
            self.population.parameters,
            self.arena,
            batch,
            self.key,
            self.iteration,
            rate,
            self.settings.config(),
            density=self.density,
        )
        self.iteration += 1

    def error(self) -> float:
        """See `Contender.error`; leaves the job at its start."""
        self.restart()
        before = Parameters(*(t.clone() for t in self.population.parameters))
        experience = self.act()
        batch = self.prepare(experience)
        worst = max(
            self._rollout_error(experience, before), self._advantage_error(experience, batch)
        )
        self.update(batch)
        worst = max(worst, self._update_error(batch, before))
        self.restart()
        return worst

    def acting_error(self) -> float:
        """As `error`, of the rollout alone."""
        self.restart()
        before = Parameters(*(t.clone() for t in self.population.parameters))
        worst = self._rollout_error(self.act(), before)
        self.restart()
        return worst

    def _rollout_error(self, experience: Rollout, before: Parameters) -> float:
        some = slice(0, CHECKED)
        few = Parameters(*(t[some].clone() for t in before))
        key = self.key[some]
        ours = Rollout(*(t[some] for t in experience))
        with use_backend("reference"):
            env = make_env(self.env_name, len(key), self.settings.copies, device=self.device)
            theirs, _ = rollout(few, self.arena, env, env.reset(key), key, self.settings.horizon)
            weight, obs = few.weight.double(), ours.obs.flatten(1, 2).double()
            head = mlp(obs, weight, self.arena.actor)
            value = mlp(obs, weight, self.arena.critic).squeeze(2)
        # Until the first different action of a copy, and the observation that follows it.
        same = (ours.action == theirs.action).cumprod(1).bool()
        if same.double().mean() < _SAME_ACTIONS:
            return math.inf
        terms = sum(self.arena.actor.sizes)
        flat = ours.flatten()
        logp, _ = log_prob_and_entropy(head, None, flat.action)
        return max(
            mismatch([ours.obs[same]], [theirs.obs[same].double()], self.settings.horizon * 64),
            mismatch([flat.logp, flat.value], [logp, value], terms),
        )

    def _advantage_error(self, experience: Rollout, batch: Batch) -> float:
        with use_backend("reference"):
            expected = _advantage(
                Rollout(*(t.double() if t.is_floating_point() else t for t in experience)),
                self.settings,
            )
        wanted = [t.flatten(1) for t in expected]
        return mismatch([batch.advantage, batch.target], wanted, self.settings.horizon)

    def _update_error(self, batch: Batch, before: Parameters) -> float:
        def update(parameters: Parameters, key: Tensor, *fields: Tensor) -> None:
            rate = torch.full((len(key),), self.settings.learning_rate, device=self.device)
            config = self.settings.config()
            ppo_update_(parameters, self.arena, Batch(*fields), key, 0, rate, config)

        few = (tensor[:CHECKED] for tensor in (self.key, *batch))
        return update_error(update, self.population.parameters.weight, before, *few)


def update_error(
    update: Callable[..., object], ours: Tensor, before: Parameters, *data: Tensor
) -> float:
    """How far some tickets' weights are from float64's after an update, over what is allowed.

    Args:
        update: of parameters and data, in place; here on plain torch, in float32 and float64.
        ours: the weights of all tickets after the update.
        before: the parameters before it.
        data: what else the first `CHECKED` tickets are updated with.
    """
    ours, before = ours[:CHECKED], Parameters(*(tensor[:CHECKED] for tensor in before))
    if not ours.isfinite().all():
        return math.inf
    after = []
    for dtype in (torch.float32, torch.float64):
        parameters, tensors = (
            [t.to(dtype, copy=True) if t.is_floating_point() else t.clone() for t in group]
            for group in (before, data)
        )
        with use_backend("reference"):
            update(Parameters(*parameters), *tensors)
        after.append(parameters[0])
    single, exact = after
    moved = float((exact - before.weight).abs().max())
    natural = float((single.double() - exact).abs().max())
    allowed = max(_UPDATE_FACTOR * natural, _UPDATE_FLOOR * moved)
    return float((ours.double() - exact).abs().max()) / allowed


def ppo_contender(job: PPOJob, name: str) -> Contender:
    """One iteration of ``job``; times are per agent-step."""
    with use_backend(job.backend):
        chosen = str(plan(job.arena, torch.device(job.device), density=job.density))
    checked = on_backend(job.backend, job.error)
    return Contender(
        name,
        on_backend(job.backend, job.iterate),
        checked,
        units=job.agent_steps,
        plan=chosen,
    )


def _advantage(experience: Rollout, settings: PPO) -> tuple[Tensor, Tensor]:
    return gae(
        experience.reward,
        experience.value,
        experience.next_value,
        experience.terminated,
        experience.truncated,
        settings.gamma,
        settings.lam,
    )
