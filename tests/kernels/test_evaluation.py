"""Evaluation, demonstrations and environments of gymnasium in a rollout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rolling import CLOSE, make_arena, make_parameters, start

from sparse_tickets.envs.classic import ClassicEnv
from sparse_tickets.envs.gym_adapter import GymEnv
from sparse_tickets.kernels.dispatch import use_backend
from sparse_tickets.kernels.random import Stream
from sparse_tickets.kernels.rollout import cpu, demonstrate, evaluate, rollout
from sparse_tickets.kernels.rollout.reference import _Policy

pytestmark = pytest.mark.usefixtures("one_thread")


def test_evaluate_equals_a_rollout_of_one_episode():
    """The reference loop against nothing but `env.step`: the first episode's rewards."""
    arena = make_arena("CartPole-v1", critic=False)
    parameters = make_parameters(arena, 2)
    env, _, key = start("CartPole-v1", 2, 8, reset_stream=Stream.EVAL_RESET)
    obs = env.reset(key)
    got = evaluate(parameters, arena, env, key, index=0, greedy=False)
    env.reset(key)
    outcome, _ = rollout(parameters, arena, env, obs, key, 500, stream=Stream.EVAL_ACTION)
    ended = (outcome.terminated | outcome.truncated).int()
    first = ended.cumsum(1) - ended == 0
    assert torch.equal(got, (outcome.reward * first).sum(1))


def test_greedy_ties_take_the_lowest_index():
    for logits, want in (((0.5, 0.5, 0.1), 0), ((0.1, 0.5, 0.5), 1), ((0.0, 0.0, 0.0), 0)):
        assert cpu._greedy(np.array(logits, np.float32)) == want
    arena = make_arena("MountainCar-v0", hidden=(), critic=False)
    parameters = make_parameters(arena, 1)
    parameters.weight.zero_()
    env, _, key = start("MountainCar-v0", 1, 2)
    tied = evaluate(parameters, arena, env, key, index=0, greedy=True)
    with use_backend("reference"):
        want = evaluate(parameters, arena, env, key, index=0, greedy=True)
    assert torch.equal(tied, want)


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1"])
def test_demonstrations_carry_the_expert_distribution(name):
    arena = make_arena(name)
    parameters = make_parameters(arena, 2)
    results = []
    for backend in ("cpu", "reference"):
        env, obs, key = start(name, 2, 4, reset_stream=Stream.DATASET_RESET)
        with use_backend(backend):
            results.append(demonstrate(parameters, arena, env, obs, key, 20))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, **CLOSE)
    seen, target, _ = results[0]
    if name == "CartPole-v1":
        torch.testing.assert_close(target.exp().sum(-1), torch.ones(2, 20, 4))
    else:
        assert target.shape == (2, 20, 4, 2)
        assert torch.equal(target[..., 1], parameters.weight[:, None, None, -1].expand(2, 20, 4))
    env, obs, key = start(name, 2, 4, reset_stream=Stream.DATASET_RESET)
    acted, _ = rollout(parameters, arena, env, obs, key, 20, stream=Stream.DATASET_ACTION)
    assert torch.equal(seen, acted.obs)


def test_scaled_observations_reach_the_policy():
    spec = ClassicEnv("CartPole-v1", 1, 1).spec
    spec = type(spec)(
        **{**vars(spec), "offset": (0.1, -0.2, 0.3, 0.0), "scale": (2.0, 0.5, 3.0, 1.0)}
    )
    arena = make_arena("CartPole-v1")
    parameters = make_parameters(arena, 2)
    results = []
    for backend in ("cpu", "reference"):
        env, obs, key = start("CartPole-v1", 2, 4, spec=spec)
        with use_backend(backend):
            outcome, _ = rollout(parameters, arena, env, obs, key, 15)
            scores = evaluate(parameters, arena, env, key, index=0, greedy=True)
        results.append((*outcome, scores))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


def test_any_gymnasium_environment():
    arena = make_arena("CartPole-v1")
    parameters = make_parameters(arena, 2)
    env = GymEnv("CartPole-v1", 2, 3)
    key = torch.tensor([3, 4])
    got, last = rollout(parameters, arena, env, env.reset(key), key, 40)
    assert got.obs.shape == (2, 40, 3, 4)
    assert last.shape == (2, 3, 4)
    assert got.terminated.any()
    assert not got.next_value[got.terminated].any()
    going = ~(got.terminated | got.truncated)[:, :-1]
    assert torch.equal(got.next_value[:, :-1][going], got.value[:, 1:][going])
    returns = evaluate(parameters, arena, env, key, index=1, greedy=True)
    assert returns.shape == (2, 3)
    assert (returns >= 1).all()
    again = evaluate(parameters, arena, env, key, index=1, greedy=True)
    assert torch.equal(returns, again)
    env.close()


def test_truncation_of_a_gymnasium_environment_bootstraps():
    arena = make_arena("Pendulum-v1")
    parameters = make_parameters(arena, 1)
    env = GymEnv("Pendulum-v1", 1, 2)
    key = torch.tensor([3])
    got, _ = rollout(parameters, arena, env, env.reset(key), key, 201)
    env.reset(key)
    for t in range(200):
        step = env.step(got.action[:, t])
    assert got.truncated[:, 199].all()
    final = _Policy(parameters.weight, arena).value(step.final_obs)
    torch.testing.assert_close(got.next_value[:, 199], final, **CLOSE)
    assert not torch.equal(got.next_value[:, 199], got.value[:, 200])
    env.close()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1"])
def test_a_diverged_policy_scores_nan_and_leaves_its_mates_alone(name, broken, backend):
    arena = make_arena(name)
    sound = make_parameters(arena, 3)
    lost = sound._replace(weight=sound.weight.clone())
    lost.weight[1] = broken
    with use_backend(backend):
        for greedy in (True, False):
            env, _, key = start(name, 3, 4)
            right, got = (
                evaluate(each, arena, env, key, index=2, greedy=greedy) for each in (sound, lost)
            )
            assert got[1].isnan().all()
            assert torch.equal(got[[0, 2]], right[[0, 2]])
        runs = []
        for each in (sound, lost):
            env, obs, key = start(name, 3, 4)
            runs.append(rollout(each, arena, env, obs, key, 20)[0])
    for right, got in zip(*runs, strict=True):
        assert torch.equal(got[[0, 2]], right[[0, 2]])
    assert runs[1].logp[1].isnan().all()
    if name == "CartPole-v1":
        assert (runs[1].action[1] == 0).all()
