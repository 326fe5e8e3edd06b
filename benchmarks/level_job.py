"""A whole level of iterative magnitude pruning as a contender: prune, rewind, train, evaluate.

What is verified for the level that is timed: its masks and rewound weights entry by entry, and one
iteration of its training, at this population and density, as `ppo_job` verifies one.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from sparse_tickets.algos.evaluation import Evaluation
from sparse_tickets.algos.ppo import PPO, train
from sparse_tickets.envs import env_spec
from sparse_tickets.imp import Trained, dense_population, next_population
from sparse_tickets.kernels import Parameters, use_backend
from sparse_tickets.kernels.prune import reference
from sparse_tickets.population import Population, policy_arena
from sparse_tickets.timing import Contender

from .ours import OURS, on_backend
from .ppo_job import PPOJob

_ENV = "CartPole-v1"
_EVALUATION = Evaluation(1, 4, 4)


def sparsity_of(level: int) -> float:
    """Percent pruned at a level: 20% of what was left, every time."""
    return round(100 * (1 - 0.8**level), 1)


class LevelJob:
    """P tickets about to begin a level.

    Args:
        tickets: P.
        level: 1 or more.
        iterations: of PPO; 0 stops after pruning and rewinding.
        backend: of every op.
        nominal: density the kernels are told, if not the true one: 1 runs dense.
        settings: of PPO, but for the number of steps.

    Raises:
        ValueError: a level below 1.
    """

    def __init__(
        self,
        tickets: int,
        level: int,
        *,
        iterations: int = 4,
        backend: str = "auto",
        nominal: float | None = None,
        settings: PPO | None = None,
        device: str = "cpu",
    ) -> None:
        if level < 1:
            raise ValueError(f"level must be at least 1, got {level}")
        self.tickets, self.level, self.iterations = tickets, level, iterations
        self.backend = backend
        self.settings, self.device = settings or PPO(), device
        self.density = 0.8**level if nominal is None else nominal
        self.arena, self.key = policy_arena(env_spec(_ENV)), torch.arange(tickets).to(device)
        with use_backend("reference"):
            dense = dense_population(self.arena, self.key, "lecun")
        self.rewind_point = Parameters(*(tensor.clone() for tensor in dense.parameters))
        prunable = self.arena.prunable
        before, self.kept = (int(prunable * 0.8**k + 0.5) for k in (level - 1, level))
        weight = self.rewind_point.weight[:, :prunable]
        mask = reference.prune(weight.abs(), self.rewind_point.mask, self._each(before))
        # As if training had reversed the order of magnitudes: the next mask is not the last one's.
        trained = (1 + weight.abs().amax() - weight.abs()) * mask
        self.trained = Trained(trained, mask)

    def _each(self, count: int) -> torch.Tensor:
        return torch.full((self.tickets,), count, device=self.device)

    def begin(self) -> Population:
        """Prune and rewind."""
        return next_population(
            self.arena,
            ["mask/weights"] * self.tickets,
            self.trained,
            self.rewind_point,
            self.key,
            kept=self.kept,
            density=self.density,
        )

    def run(self) -> Population:
        """The level from its beginning; its training draws the same numbers every time."""
        population = self.begin()
        if self.iterations:
            steps = self.iterations * self.settings.batch
            settings = replace(self.settings, steps=steps)
            train(settings, _ENV, population, self.key, evaluation=_EVALUATION)
        return population

    def error(self) -> float:
        """Wrong entries of the mask or the weights, of which none is allowed; then a PPO job's."""
        parameters = self.begin().parameters
        scores = self.trained.weight.abs()
        mask = reference.prune(scores, self.trained.mask, self._each(self.kept))
        weight = self.rewind_point.weight.clone()
        weight[:, : self.arena.prunable].masked_fill_(~mask, 0)
        wrong = int((parameters.mask != mask).sum() + (parameters.weight != weight).sum())
        if wrong or not self.iterations:
            return 2.0 * wrong
        job = PPOJob(
            self.tickets,
            sparsity_of(self.level),
            self.settings,
            backend=self.backend,
            device=self.device,
            nominal=self.density,
        )
        return job.error()


def level_contender(job: LevelJob, name: str = OURS) -> Contender:
    """One level per call."""
    timed, checked = (on_backend(job.backend, work) for work in (job.run, job.error))
    return Contender(name, timed, checked)
