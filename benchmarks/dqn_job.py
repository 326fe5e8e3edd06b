"""DQN on CartPole by rl-zoo3's settings: a population of ours beside one agent of SB3.

    python -m benchmarks.dqn_job

Environment, replay and updates all count, from after the warm-up on; slices of both programs take
turns. Needs stable-baselines3 beside this package. Ours has both cores, SB3 the one that is fastest
for it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from sparse_tickets.algos.dqn import DQN, Iteration
from sparse_tickets.envs import env_spec, make_env
from sparse_tickets.population import Population, initialise, policy_arena
from sparse_tickets.timing import pinned_threads

ENV = "CartPole-v1"
TICKETS = 16
TURNS = 5
SETTINGS = DQN()
# Slices of about a second each, in iterations of 256 steps per agent.
SLICES = {(64, 64): (8, 4), (256, 256): (2, 4)}


def ours(hidden: tuple[int, ...], slices: int) -> Callable[[], int]:
    """Runs some iterations of the population; returns its agent-steps."""
    arena = policy_arena(env_spec(ENV), hidden, activation="relu", critic=False)
    key = torch.arange(TICKETS)
    population = Population.create(arena, initialise(arena, key))
    env = make_env(ENV, TICKETS, SETTINGS.copies)
    iterate = Iteration(replace(SETTINGS, warmup=0), env, population, key, 0)
    iterate.learning_rate.fill_(SETTINGS.learning_rate)
    iterate.epsilon.fill_(SETTINGS.epsilon)

    def run() -> int:
        for _ in range(slices):
            iterate()
        return TICKETS * slices * SETTINGS.batch

    return run


def theirs(hidden: tuple[int, ...], slices: int) -> Callable[[], int]:
    """The same of one agent by Stable-Baselines3."""
    from stable_baselines3 import DQN as Peer

    model = Peer(
        "MlpPolicy",
        ENV,
        policy_kwargs={"net_arch": list(hidden)},
        learning_rate=SETTINGS.learning_rate,
        batch_size=SETTINGS.minibatch,
        buffer_size=SETTINGS.capacity,
        learning_starts=0,
        gamma=SETTINGS.gamma,
        target_update_interval=SETTINGS.target_interval,
        train_freq=SETTINGS.batch,
        gradient_steps=SETTINGS.updates,
        exploration_initial_eps=SETTINGS.epsilon,
        exploration_final_eps=SETTINGS.epsilon,
        max_grad_norm=SETTINGS.max_norm,
        device="cpu",
        seed=0,
    )

    def run() -> int:
        with pinned_threads(1):
            model.learn(slices * SETTINGS.batch, reset_num_timesteps=False)
        return slices * SETTINGS.batch

    return run


def main() -> None:
    """Print agent-steps per second of both, medians over turns, and the ratio of each turn."""
    for hidden, (our_slices, their_slices) in SLICES.items():
        programs = ours(hidden, our_slices), theirs(hidden, their_slices)
        for program in programs:
            program()
        rates: list[list[float]] = [[], []]
        for _ in range(TURNS):
            for program, found in zip(programs, rates, strict=True):
                begin = time.perf_counter()
                steps = program()
                found.append(steps / (time.perf_counter() - begin))
        ratios = sorted(one / other for one, other in zip(*rates, strict=True))
        print(
            f"{hidden}: {TICKETS} tickets {statistics.median(rates[0]):,.0f} agent-steps/s, "
            f"SB3 (1 agent) {statistics.median(rates[1]):,.0f}; "
            f"ratio {statistics.median(ratios):.1f} ({ratios[0]:.1f}-{ratios[-1]:.1f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
