"""One level of iterative magnitude pruning for a population: train, prune, rewind."""

import pytest
import torch

from sparse_tickets.algos.evaluation import Evaluation
from sparse_tickets.algos.ppo import PPO, train
from sparse_tickets.envs import env_spec
from sparse_tickets.imp import Trained, dense_population, next_population
from sparse_tickets.kernels import Parameters
from sparse_tickets.kernels.prune import reference
from sparse_tickets.population import policy_arena
from sparse_tickets.timing import Contender

pytestmark = [pytest.mark.bench, pytest.mark.benchmark(max_time=1.0, min_rounds=3, warmup=True)]

_SETTINGS = PPO(steps=4 * PPO.copies * PPO.horizon)
_EVALUATION = Evaluation(1, 4, 4)


def _contender(tickets, level, trains):
    arena, key = policy_arena(env_spec("CartPole-v1")), torch.arange(tickets)
    dense = dense_population(arena, key, "lecun")
    rewind_point = Parameters(*(tensor.clone() for tensor in dense.parameters))
    density, earlier = 0.8**level, 0.8 ** (level - 1)
    kept, before = (int(arena.prunable * share + 0.5) for share in (density, earlier))
    weight, mask = rewind_point.weight[:, : arena.prunable], rewind_point.mask
    mask = reference.prune(weight.abs(), mask, torch.full((tickets,), before))
    trained = Trained(weight * mask, mask)

    def run():
        population = next_population(
            arena,
            ["mask/weights"] * tickets,
            trained,
            rewind_point,
            key,
            kept=kept,
            density=density,
        )
        if trains:
            train(_SETTINGS, "CartPole-v1", population, key, evaluation=_EVALUATION)
        return population.parameters

    def error():
        """Wrong entries of the new mask, and weights off it: none are allowed."""
        parameters = run()
        expected = reference.prune(trained.weight.abs(), mask, torch.full((tickets,), kept))
        off_mask = parameters.weight[:, : arena.prunable][~expected]
        return 2.0 * float((parameters.mask != expected).sum() + off_mask.count_nonzero())

    return Contender("sparse_tickets", run, error)


@pytest.mark.parametrize("trains", [False, True], ids=["prune+rewind", "whole"])
@pytest.mark.parametrize("level", [1, 3, 7, 10, 13, 18, 20])
@pytest.mark.parametrize("tickets", [1, 60])
def bench_level(timed, tickets, level, trains):
    timed(lambda: _contender(tickets, level, trains), level=level, tickets=tickets)
