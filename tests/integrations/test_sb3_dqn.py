"""DQN's updates and replay against Stable-Baselines3's own, on the same transitions."""

import numpy as np
import pytest
import torch

from sparse_tickets.algos.buffer import ReplayBuffer
from sparse_tickets.envs import Step
from sparse_tickets.kernels.arena import Arena
from sparse_tickets.kernels.dqn import DQNConfig, dqn_update_
from sparse_tickets.kernels.random import Stream, integers
from sparse_tickets.population import Population

pytest.importorskip("stable_baselines3")

from stable_baselines3 import DQN
from stable_baselines3.common.logger import Logger

STEPS, UPDATES, BATCH, GAMMA, RATE = 96, 12, 16, 0.99, 2.3e-3
KEY = torch.tensor([3])


def story():
    """What a copy sees, does and gets; some episodes terminate, some are cut by a time limit."""
    generator = np.random.default_rng(0)
    obs, after = generator.normal(size=(2, STEPS, 4)).astype(np.float32)
    ended = generator.integers(0, 6, STEPS)
    reward = 10 * generator.normal(size=STEPS)
    return obs, after, generator.integers(0, 2, STEPS), reward, ended == 0, ended == 1


def theirs():
    """Weights before and after, layer by layer."""
    model = DQN(
        "MlpPolicy",
        "CartPole-v1",
        policy_kwargs={"net_arch": [24, 16]},
        learning_rate=RATE,
        buffer_size=STEPS,
        batch_size=BATCH,
        gamma=GAMMA,
        max_grad_norm=10,
        seed=0,
        device="cpu",
    )
    model.set_logger(Logger(None, []))
    memory = model.replay_buffer
    for obs, after, action, reward, terminated, truncated in zip(*story(), strict=True):
        info = {"TimeLimit.truncated": bool(truncated)}
        done = np.array([terminated or truncated])
        memory.add(obs[None], after[None], np.array([[action]]), np.array([reward]), done, [info])
    drawn = (
        integers(KEY, BATCH, STEPS, stream=Stream.MINIBATCH, step=update)[0].numpy()
        for update in range(UPDATES)
    )
    memory.sample = lambda batch_size, env=None: memory._get_samples(next(drawn), env)
    layers = [each for each in model.q_net.q_net if isinstance(each, torch.nn.Linear)]

    def weights():
        return [(each.weight.detach().clone(), each.bias.detach().clone()) for each in layers]

    before = weights()
    model.train(gradient_steps=UPDATES, batch_size=BATCH)
    return before, weights()


def test_updates_are_those_of_stable_baselines3():
    before, expected = theirs()
    arena = Arena.build((4, 24, 16, 2), activation="relu")
    weight = torch.zeros(1, arena.size)
    for into, of in zip(arena.actor.layers(weight), before, strict=True):
        for ours, their in zip(into, of, strict=True):
            ours[0] = their
    population = Population.create(arena, weight)
    buffer = ReplayBuffer(1, 1, 4, STEPS, n_step=1, gamma=GAMMA, device=torch.device("cpu"))
    for obs, after, action, reward, terminated, truncated in zip(*story(), strict=True):
        seen, led = (torch.from_numpy(each)[None, None] for each in (obs, after))
        # What follows an episode's end is the next one's start, which is not what it led to.
        begun = torch.zeros_like(led) if terminated or truncated else led
        got = torch.tensor([[reward]]), torch.tensor([[terminated]]), torch.tensor([[truncated]])
        buffer.add(seen, torch.tensor([[action]]), Step(begun, *got, led))
    dqn_update_(
        population.parameters,
        arena,
        weight.clone(),
        buffer.transitions,
        buffer.stored,
        KEY,
        0,
        torch.tensor([RATE]),
        DQNConfig(UPDATES, BATCH),
    )
    found = arena.actor.layers(population.parameters.weight)
    for ours, their in zip(found, expected, strict=True):
        torch.testing.assert_close(ours[0][0], their[0], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(ours[1][0], their[1], rtol=1e-3, atol=1e-5)
    moved = [(new[0] - old[0]).abs().max() for new, old in zip(expected, before, strict=True)]
    assert min(moved) > 1e-3
