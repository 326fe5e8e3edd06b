"""DQN and SAC by rl-zoo3's settings: a population of ours, dense and pruned, beside one SB3 agent.

    python -m benchmarks.off_policy [dqn] [sac]

Environment, replay and updates all count, from after the warm-up on; slices of the programs take
turns. Needs stable-baselines3 beside this package. Ours has both cores, SB3 the one that is fastest
for it.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from sparse_tickets.algos import dqn, sac
from sparse_tickets.envs import env_spec, make_env
from sparse_tickets.population import Population, initialise, policy_arena
from sparse_tickets.prune import random_mask
from sparse_tickets.timing import pinned_threads

from .turns import ratio, take_turns

TICKETS = 16
TURNS = 5
DENSITY = 0.1
ENVS = {"dqn": "CartPole-v1", "sac": "Pendulum-v1"}
SETTINGS: dict[str, Any] = {"dqn": dqn.DQN(), "sac": sac.SAC()}
# Slices of about a second each, in iterations of as many steps per agent as settings say.
SLICES = {
    "dqn": {(64, 64): (8, 4), (256, 256): (2, 4)},
    "sac": {(64, 64): (16, 16), (256, 256): (2, 12)},
}


def ours(algo: str, hidden: tuple[int, ...], slices: int, density: float) -> Callable[[], int]:
    """Runs some iterations of the population, critics pruned too; returns its agent-steps."""
    settings, env, critics = SETTINGS[algo], ENVS[algo], algo == "sac"
    arena = policy_arena(
        env_spec(env),
        hidden,
        activation="relu",
        critic=critics,
        prune_critic=critics,
        squashed=critics,
    )
    key = torch.arange(TICKETS)
    mask = random_mask(key, round(density * arena.prunable), arena)
    population = Population.create(arena, initialise(arena, key), mask, density)
    world = make_env(env, TICKETS, settings.copies)
    kind = {"dqn": dqn.Iteration, "sac": sac.Iteration}[algo]
    iterate = kind(replace(settings, warmup=0), world, population, key, 0)
    iterate.learning_rate.fill_(settings.learning_rate)
    if isinstance(iterate, dqn.Iteration):
        iterate.epsilon.fill_(settings.epsilon)

    def run() -> int:
        for _ in range(slices):
            iterate()
        return TICKETS * slices * settings.batch

    return run


def theirs(algo: str, hidden: tuple[int, ...], slices: int) -> Callable[[], int]:
    """The same of one dense agent by Stable-Baselines3."""
    import stable_baselines3

    settings = SETTINGS[algo]
    own: dict[str, Any] = {
        "target_update_interval": getattr(settings, "target_interval", 1),
    }
    if algo == "dqn":
        epsilon = settings.epsilon
        own |= {"exploration_initial_eps": epsilon, "exploration_final_eps": epsilon}
        own["max_grad_norm"] = settings.max_norm
    model = getattr(stable_baselines3, algo.upper())(
        "MlpPolicy",
        ENVS[algo],
        policy_kwargs={"net_arch": list(hidden)},
        learning_rate=settings.learning_rate,
        batch_size=settings.minibatch,
        buffer_size=settings.capacity,
        learning_starts=0,
        gamma=settings.gamma,
        train_freq=settings.batch,
        gradient_steps=settings.updates,
        device="cpu",
        seed=0,
        **own,
    )

    def run() -> int:
        with pinned_threads(1):
            model.learn(slices * settings.batch, reset_num_timesteps=False)
        return slices * settings.batch

    return run


def main(algorithms: list[str]) -> None:
    """Print agent-steps per second of all three, medians over turns, and ratios within turns."""
    for algo in algorithms or SLICES:
        for hidden, (our_slices, their_slices) in SLICES[algo].items():
            programs = {
                "dense": ours(algo, hidden, our_slices, 1.0),
                "pruned": ours(algo, hidden, our_slices, DENSITY),
                "SB3": theirs(algo, hidden, their_slices),
            }
            for program in programs.values():
                program()
            rates = tuple(take_turns(programs, TURNS, rates=True).values())
            dense, pruned, peer = (f"{statistics.median(found):,.0f}" for found in rates)
            of_dense, of_peer, pruned_of_peer = (
                " ".join(ratio(rates[one], rates[other], 1))
                for one, other in ((1, 0), (0, 2), (1, 2))
            )
            print(
                f"{algo} {hidden}: {TICKETS} tickets {dense} agent-steps/s, at {DENSITY:.0%} "
                f"{pruned} ({of_dense} of dense); SB3 (1 agent) {peer}; "
                f"ratio {of_peer}, pruned {pruned_of_peer}",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:])
