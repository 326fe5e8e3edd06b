"""Cloning updates of a population as a contender, verified against plain torch in float64.

Experts and observations are made up: what they say changes no kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_tickets.envs import env_spec
from sparse_tickets.kernels import CloneConfig, Parameters, clone_update_, use_backend
from sparse_tickets.population import Population, initialise, policy_arena
from sparse_tickets.timing import Contender

from .ppo_job import CHECKED, update_error
from .problems import density_of, random_masks

_ENV = "CartPole-v1"
_EXPERTS, _SAMPLES = 5, 4096
_RATE = 2.5e-4


class CloneJob:
    """P students at one sparsity, ready to imitate.

    Args:
        tickets: P.
        sparsity: percent of the weights pruned.
        batch: samples of an update.
        updates: in a call.
        device: where they learn.
    """

    def __init__(
        self, tickets: int, sparsity: float, batch: int, updates: int, device: torch.device
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.config = CloneConfig(updates=updates, batch=batch)
        self.arena = policy_arena(env_spec(_ENV), critic=False)
        self.density = density_of(sparsity)
        mask = random_masks(tickets, self.arena.prunable, sparsity, generator).to(device)
        key = torch.arange(tickets).to(device)
        with use_backend("reference"):
            weight = initialise(self.arena, key)
        inputs, actions = self.arena.actor.sizes[0], self.arena.actor.sizes[-1]
        obs = torch.randn(_EXPERTS, _SAMPLES, inputs, generator=generator)
        target = torch.randn(_EXPERTS, _SAMPLES, actions, generator=generator).log_softmax(-1)
        self._start = weight, mask
        self._data = obs.to(device), target.to(device), key % _EXPERTS, key
        self.restart()

    def restart(self) -> None:
        """Back to the initial weights."""
        self.population = Population.create(self.arena, *self._start, self.density)

    def update(self) -> Tensor:
        """The updates; the same minibatches every time."""
        return self._clone(self.population.parameters, *self._data)

    def error(self) -> float:
        """Distance to float64, see `update_error`; leaves the job at its start."""
        self.restart()
        before = Parameters(*(tensor.clone() for tensor in self.population.parameters))
        self.update()
        *datasets, dataset, key = self._data
        data = (*datasets, dataset[:CHECKED], key[:CHECKED])
        found = update_error(self._clone, self.population.parameters.weight, before, *data)
        self.restart()
        return found

    def _clone(self, parameters: Parameters, *data: Tensor) -> Tensor:
        weight = parameters.weight
        rate = torch.full((len(weight),), _RATE, dtype=weight.dtype, device=weight.device)
        return clone_update_(
            parameters, self.arena, *data, 0, rate, self.config, density=self.density
        ).loss


def clone_contender(job: CloneJob) -> Contender:
    """All updates of a call."""
    return Contender("cloning", job.update, job.error)
