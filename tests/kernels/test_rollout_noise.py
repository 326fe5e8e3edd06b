"""Inputs of pure noise in fused rollouts: every backend shows what the contract draws."""

from dataclasses import replace

import pytest
import torch

from sparse_tickets.envs.classic import ClassicEnv
from sparse_tickets.envs.noise import Noise
from sparse_tickets.kernels.arena import Arena, Parameters
from sparse_tickets.kernels.dispatch import use_backend
from sparse_tickets.kernels.dynamics import TASKS
from sparse_tickets.kernels.random import Stream, normal
from sparse_tickets.kernels.rollout import evaluate, rollout

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = ["reference", "cpu"] if DEVICE.type == "cpu" else ["reference"]
NAMES = ("CartPole-v1", "Pendulum-v1")
COPIES, STEPS = 2, 6


def backend_or_skip(backend):
    if backend == "triton":
        pytest.importorskip("triton")
    return use_backend(backend)


def start(name, noise, tickets=2):
    env = ClassicEnv(name, tickets, COPIES, DEVICE, noise=noise)
    key = 11 * torch.arange(tickets, device=DEVICE) + 5
    obs = env.reset(key)
    env.task = replace(env.task, time_limit=7)
    env.elapsed[:, 1] = 4
    return env, obs, key


def policy(name, inputs, tickets=2):
    task = TASKS[name]
    arena = Arena.build((inputs, 8, task.action_dim), (inputs, 8, 1), continuous=not task.discrete)
    rows = [torch.randn(arena.size, generator=torch.Generator().manual_seed(p)) for p in range(9)]
    weight = torch.stack(rows[:tickets]).to(DEVICE) * 0.4
    mask = torch.ones(tickets, arena.prunable, dtype=torch.bool, device=DEVICE)
    zeros = torch.zeros_like(weight)
    step = torch.zeros(tickets, dtype=torch.int64, device=DEVICE)
    return arena, Parameters(weight, mask, zeros, zeros, step)


def act(name, backend, noise, tickets=2, steps=STEPS):
    with backend_or_skip(backend):
        env, obs, key = start(name, noise, tickets)
        arena, parameters = policy(name, obs.shape[2], tickets)
        outcome, last = rollout(parameters, arena, env, obs, key, steps)
        score = evaluate(parameters, arena, env, key, index=4, greedy=False)
    return outcome, last, score, env, key


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
@pytest.mark.parametrize("name", NAMES)
def test_inputs_show_the_task_and_the_noise_where_they_should(name, backend):
    noise = Noise(5, seed=1)
    outcome, last, _, env, key = act(name, backend, noise)
    known = env.task.observation_dim
    source = torch.tensor(noise.source(known), device=DEVICE)
    seen = torch.cat([outcome.obs, last[:, None]], 1)
    for clock in range(STEPS + 1):
        drawn = normal(key, COPIES * 5, stream=Stream.NOISE, step=clock).view(-1, COPIES, 5)
        shown = seen[:, clock][..., source >= known]
        torch.testing.assert_close(shown, drawn, rtol=1e-6, atol=1e-7)
    own = last[..., source < known] * env.scale[source < known] + env.offset[source < known]
    torch.testing.assert_close(own, env.task.observe(env.state), rtol=1e-5, atol=1e-6)
    assert outcome.truncated.any()


@pytest.mark.parametrize("backend", [*BACKENDS[1:], "triton"])
@pytest.mark.parametrize("name", NAMES)
def test_backends_agree(name, backend):
    expected = act(name, "reference", Noise(3))
    found = act(name, backend, Noise(3))
    for name_, a, b in zip(expected[0]._fields, expected[0], found[0], strict=True):
        assert a.shape == b.shape, name_
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5, msg=name_)
    torch.testing.assert_close(expected[1], found[1], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(expected[2], found[2], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_noise_changes_no_bit(backend):
    bare, none = act("CartPole-v1", backend, None), act("CartPole-v1", backend, Noise(0, seed=3))
    for a, b in zip((*bare[0], bare[1], bare[2]), (*none[0], none[1], none[2]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_ticket_sees_the_same_noise_alone_and_in_two_calls(backend):
    noise = Noise(4)
    together, last, score, _, _ = act("CartPole-v1", backend, noise)
    alone, last_alone, score_alone, _, _ = act("CartPole-v1", backend, noise, tickets=1)
    for a, b in zip((*together, last, score), (*alone, last_alone, score_alone), strict=True):
        assert torch.equal(a[:1], b)
    with backend_or_skip(backend):
        env, obs, key = start("CartPole-v1", noise)
        arena, parameters = policy("CartPole-v1", obs.shape[2])
        first, obs = rollout(parameters, arena, env, obs, key, 2)
        second, obs = rollout(parameters, arena, env, obs, key, STEPS - 2)
    for a, b, c in zip(together, first, second, strict=True):
        assert torch.equal(a, torch.cat([b, c], 1))
    assert torch.equal(last, obs)


def test_sources_out_of_range_are_refused():
    env, obs, key = start("CartPole-v1", Noise(2))
    arena, parameters = policy("CartPole-v1", obs.shape[2])
    if DEVICE.type == "cpu":
        env.source[0] = 6
        with pytest.raises(ValueError, match=r"source must be in \[0, 6\), got 6"):
            rollout(parameters, arena, env, obs, key, 2)
        with pytest.raises(ValueError, match=r"source must be in \[0, 6\), got 6"):
            evaluate(parameters, arena, env, key, index=0, greedy=True)
    env.source = env.source[:3]
    with pytest.raises(ValueError, match=r"env.source must name 4 inputs or more, got 3"):
        rollout(parameters, arena, env, obs, key, 2)
