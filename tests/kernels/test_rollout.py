"""Rollouts, evaluations and demonstrations: the fused kernels against the loop of `reference`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import KINDS, any_chain
from rolling import CLOSE, make_arena, make_parameters, start

from sparse_tickets.envs.classic import ClassicEnv
from sparse_tickets.envs.spec import Step
from sparse_tickets.kernels.arena import Arena, Parameters
from sparse_tickets.kernels.dispatch import use_backend
from sparse_tickets.kernels.random import Stream, normal
from sparse_tickets.kernels.rollout import Rollout, demonstrate, evaluate, policy, rollout
from sparse_tickets.kernels.rollout import reference as loop
from sparse_tickets.kernels.rollout.reference import _Policy

pytestmark = pytest.mark.usefixtures("one_thread")

TASKS = ("CartPole-v1", "Acrobot-v1", "MountainCar-v0", "Pendulum-v1", "sparse_tickets/Maze-v0")


def assert_same(a: Rollout, b: Rollout) -> None:
    for name, x, y in zip(Rollout._fields, a, b, strict=True):
        assert x.dtype == y.dtype, name
        assert torch.equal(x, y), name


@pytest.mark.parametrize("name", TASKS)
def test_fused_follows_the_reference(name):
    arena = make_arena(name)
    parameters = make_parameters(arena, 3)
    fused, obs, key = start(name, 3, 4)
    got, last = rollout(parameters, arena, fused, obs, key, 20)
    plain, obs, key = start(name, 3, 4)
    with use_backend("reference"):
        want, last_want = rollout(parameters, arena, plain, obs, key, 20)
    for field, x, y in zip(Rollout._fields, got, want, strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        torch.testing.assert_close(x, y, **CLOSE, msg=field)
    torch.testing.assert_close(last, last_want, **CLOSE)
    torch.testing.assert_close(fused.state, plain.state, **CLOSE)
    assert torch.equal(fused.elapsed, plain.elapsed)
    assert fused.clock == plain.clock == 20


@settings(deadline=None, max_examples=20, derandomize=True)
@given(
    name=st.sampled_from(TASKS),
    hidden=st.lists(st.integers(1, 40), max_size=3),
    critic=st.booleans(),
    tickets=st.integers(1, 3),
    copies=st.integers(1, 20),
    density=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    **KINDS,
)
def test_any_policy(name, hidden, critic, tickets, copies, density, **kind):
    arena = make_arena(name, hidden, critic, **kind)
    parameters = make_parameters(arena, tickets, density)
    results = []
    for backend in ("cpu", "reference"):
        env, obs, key = start(name, tickets, copies)
        with use_backend(backend):
            outcome, last = rollout(parameters, arena, env, obs, key, 3, density=density)
            seen, target, _ = demonstrate(parameters, arena, env, last, key, 2, density=density)
            scores = ()
            if name == "CartPole-v1":
                scores = (evaluate(parameters, arena, env, key, index=1, greedy=False),)
        results.append((*outcome, last, seen, target, *scores))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize(
    ("name", "steps"),
    [("CartPole-v1", 150), ("Acrobot-v1", 510), ("MountainCar-v0", 210), ("Pendulum-v1", 210)],
)
def test_replaying_the_actions_gives_the_same_rollout(name, steps):
    """Teacher forcing: long enough for terminations, time limits and restarts."""
    arena = make_arena(name)
    parameters = make_parameters(arena, 2)
    env, obs, key = start(name, 2, 3)
    got, last = rollout(parameters, arena, env, obs, key, steps)

    replay, obs, _ = start(name, 2, 3)
    seen, transitions = [obs], []
    for t in range(steps):
        transitions.append(replay.step(got.action[:, t]))
        seen.append(transitions[-1].obs)
    step = Step(*(torch.stack(field, 1) for field in zip(*transitions, strict=True)))
    assert torch.equal(got.obs, torch.stack(seen[:-1], 1))
    for field in ("reward", "terminated", "truncated"):
        assert torch.equal(getattr(got, field), getattr(step, field)), field
    assert torch.equal(last, seen[-1])
    assert torch.equal(env.state, replay.state)
    assert torch.equal(env.elapsed, replay.elapsed)
    assert env.elapsed.dtype == replay.elapsed.dtype
    assert env.clock == replay.clock
    assert (got.terminated | got.truncated).any()
    assert got.truncated.any() or name == "CartPole-v1"

    judge = _Policy(parameters.weight, arena)
    value = judge.value(torch.stack(seen, 1).flatten(1, 2)).unflatten(1, (-1, 3))
    torch.testing.assert_close(got.value, value[:, :-1], **CLOSE)
    final = judge.value(step.final_obs.flatten(1, 2)).unflatten(1, (-1, 3))
    successor = torch.where(step.truncated, final, value[:, 1:]).masked_fill(step.terminated, 0.0)
    torch.testing.assert_close(got.next_value, successor, **CLOSE)
    head = judge.head(got.obs.flatten(1, 2)).unflatten(1, (-1, 3))
    if arena.log_std is None:
        want = torch.distributions.Categorical(logits=head).log_prob(got.action)
    else:
        std = parameters.weight[:, None, None, arena.log_std :].exp()
        want = torch.distributions.Normal(head, std).log_prob(got.action).sum(-1)
    torch.testing.assert_close(got.logp, want, **CLOSE)


def test_sampling_draws_the_documented_numbers():
    arena = make_arena("Pendulum-v1")
    parameters = make_parameters(arena, 2)
    env, obs, key = start("Pendulum-v1", 2, 5)
    got, _ = rollout(parameters, arena, env, obs, key, 3, stream=Stream.DATASET_ACTION)
    head = _Policy(parameters.weight, arena).head(got.obs[:, 2])
    noise = normal(key, 5, stream=Stream.DATASET_ACTION, step=2)[..., None]
    std = parameters.weight[:, None, arena.log_std :].exp()
    torch.testing.assert_close(got.action[:, 2], head + std * noise, **CLOSE)


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_two_calls_equal_one(name, backend):
    arena = make_arena(name)
    parameters = make_parameters(arena, 2)
    with use_backend(backend):
        env, obs, key = start(name, 2, 4)
        whole, last = rollout(parameters, arena, env, obs, key, 24)
        env, obs, key = start(name, 2, 4)
        first, obs = rollout(parameters, arena, env, obs, key, 9)
        second, obs = rollout(parameters, arena, env, obs, key, 15)
    joined = Rollout(*(torch.cat(pair, 1) for pair in zip(first, second, strict=True)))
    assert_same(joined, whole)
    assert torch.equal(obs, last)


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1"])
def test_env_steps_on_after_a_rollout(name):
    arena = make_arena(name)
    parameters = make_parameters(arena, 2)
    env, obs, key = start(name, 2, 4)
    whole, _ = rollout(parameters, arena, env, obs, key, 50)
    env, obs, key = start(name, 2, 4)
    rollout(parameters, arena, env, obs, key, 20)
    for t in range(20, 50):
        step = env.step(whole.action[:, t])
        assert torch.equal(step.reward, whole.reward[:, t])
        if t < 49:
            assert torch.equal(step.obs, whole.obs[:, t + 1])


@pytest.mark.parametrize("copies", [4, 19])
def test_bits_depend_neither_on_population_nor_plan_nor_threads(copies):
    arena = make_arena("CartPole-v1", hidden=(20, 33))
    everyone = make_parameters(arena, 60, density=0.1)

    def run(tickets, density):
        env, obs, key = start("CartPole-v1", tickets, copies)
        parameters = Parameters(*(tensor[:tickets] for tensor in everyone))
        outcome, _ = rollout(parameters, arena, env, obs, key, 8, density=density)
        sampled = evaluate(parameters, arena, env, key, index=3, greedy=False, density=density)
        return outcome, sampled

    want, want_returns = run(60, 1.0)
    for tickets, density, threads in ((60, 0.0, 2), (7, 1.0, 1), (7, 0.0, 2), (1, 0.0, 1)):
        torch.set_num_threads(threads)
        got, got_returns = run(tickets, density)
        assert_same(got, Rollout(*(field[:tickets] for field in want)))
        assert torch.equal(got_returns, want_returns[:tickets])


@pytest.mark.parametrize("kind", ["tanh", "relu", "gelu", "layernorm-elu", "residual"])
@pytest.mark.parametrize("sizes", [(4, 2), (3, 70, 1), (5, 1, 17, 3), (6, 64, 64, 129)])
@pytest.mark.parametrize("copies", [1, 4, 17, 40])
def test_both_plans_equal_a_dense_network(sizes, copies, kind):
    if kind == "residual":
        inputs, *hidden, outputs = sizes
        chained = any_chain(kind, inputs, hidden, outputs)
        arena = Arena.build(chained, activation="layernorm-silu", architecture=kind)
    else:
        arena = Arena.build(sizes, activation=kind)
    parameters = make_parameters(arena, 1, density=0.3)
    row, mask = parameters.weight[0].numpy(), parameters.mask[0].numpy()
    obs = torch.randn(copies, sizes[0], generator=torch.Generator().manual_seed(1))
    want = _Policy(parameters.weight.double(), arena).head(obs[None].double())[0].float()
    outputs = []
    for sparse in (False, True):
        net = policy.network(arena.actor, arena, 1.0, copies)._replace(sparse=sparse)
        prepared = policy.prepare(row, mask, net, copies)
        for count in (copies, max(1, copies // 2)):
            out = np.full((copies, sizes[-1]), np.nan, np.float32)
            policy.forward(net, prepared, obs.numpy(), count, out)
            torch.testing.assert_close(torch.from_numpy(out[:count]), want[:count], **CLOSE)
            assert np.isnan(out[count:]).all()
            outputs.append(out)
    assert np.array_equal(outputs[0], outputs[2])
    assert np.array_equal(outputs[1], outputs[3], equal_nan=True)


def test_the_plan_is_a_function_of_shape_and_nominal_density():
    sizes = (4, 64, 64, 2)
    assert not policy.prefers_sparse(sizes, 1.0, 32)
    assert policy.prefers_sparse(sizes, 0.1, 32)
    assert not policy.prefers_sparse(sizes, 0.1, 4)
    arena = Arena.build(sizes, (4, 64, 64, 1))
    assert policy.network(arena.actor, arena, 0.1, 32).sparse
    assert not policy.network(arena.critic, arena, 0.1, 32).sparse


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1"])
def test_without_a_critic_values_are_zero(name):
    arena = make_arena(name, critic=False)
    parameters = make_parameters(arena, 2)
    env, obs, key = start(name, 2, 4)
    got, obs = rollout(parameters, arena, env, obs, key, 210)
    assert (got.terminated | got.truncated).any()
    plain, _, _ = loop.rollout(parameters.weight, arena, env, obs, key, 3, Stream.ACTION)
    for outcome in (got, plain):
        assert not outcome.value.any()
        assert not outcome.next_value.any()


def test_an_empty_mask_leaves_a_policy_of_biases():
    arena = make_arena("CartPole-v1")
    parameters = make_parameters(arena, 2, density=0.0)
    for density in (0.0, 1.0):
        env, obs, key = start("CartPole-v1", 2, 18)
        got, _ = rollout(parameters, arena, env, obs, key, 30, density=density)
        bias = arena.actor.bias(parameters.weight, arena.actor.depth - 1)
        logp = bias.log_softmax(-1)[:, None, None].expand(2, 30, 18, 2)
        want = logp.gather(-1, got.action[..., None])[..., 0]
        torch.testing.assert_close(got.logp, want, **CLOSE)
        assert all(field.isfinite().all() for field in got if field.is_floating_point())


def test_no_tickets():
    arena = make_arena("CartPole-v1")
    parameters = make_parameters(arena, 0)
    env, obs, key = start("CartPole-v1", 1, 4)
    env.state, env.elapsed, env.key = env.state[:0], env.elapsed[:0], env.key[:0]
    for backend in ("cpu", "reference"):
        with use_backend(backend):
            got, last = rollout(parameters, arena, env, obs[:0], key[:0], 5)
        assert got.reward.shape == (0, 5, 4)
        assert last.shape == (0, 4, 4)
    assert evaluate(parameters, arena, env, key[:0], index=0, greedy=True).shape == (0, 4)


def test_flatten_joins_steps_and_copies():
    arena = make_arena("Pendulum-v1")
    env, obs, key = start("Pendulum-v1", 2, 3)
    got, _ = rollout(make_parameters(arena, 2), arena, env, obs, key, 5)
    flat = got.flatten()
    assert flat.obs.shape == (2, 15, 3)
    assert flat.action.shape == (2, 15, 1)
    assert torch.equal(flat.logp, got.logp.reshape(2, 15))


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("greedy", [True, False])
def test_evaluate_sums_the_rewards_of_one_episode(name, greedy):
    # Steep policies, so that rounding flips no action of a long episode.
    arena = make_arena(name)
    parameters = make_parameters(arena, 3, density=0.5, scale=1.0)
    env, _, key = start(name, 3, 6)
    state, clock = env.state, env.clock
    got = evaluate(parameters, arena, env, key, index=2, greedy=greedy, density=0.5)
    assert env.state is state
    assert env.clock == clock
    with use_backend("reference"):
        want = evaluate(parameters, arena, env, key, index=2, greedy=greedy)
    assert env.state is state
    torch.testing.assert_close(got, want, rtol=1e-3, atol=0)
    other = evaluate(parameters, arena, env, key, index=3, greedy=greedy, density=0.5)
    if name in ("CartPole-v1", "Pendulum-v1"):
        assert not torch.equal(got, other)


def test_arguments_are_checked():
    arena = make_arena("CartPole-v1")
    parameters = make_parameters(arena, 2)
    env, obs, key = start("CartPole-v1", 2, 4)
    run = partial(rollout, parameters, arena, env)
    with pytest.raises(ValueError, match=r"steps must be in \[1, 2\*\*31\), got 0"):
        run(obs, key, 0)
    with pytest.raises(ValueError, match="obs must have shape"):
        run(obs[:, :3], key, 1)
    with pytest.raises(TypeError, match="obs must be float32"):
        run(obs.double(), key, 1)
    with pytest.raises(TypeError, match="key must be int64"):
        run(obs, key.int(), 1)
    with pytest.raises(ValueError, match=r"density must be in \[0, 1\], got 1.2"):
        run(obs, key, 1, density=1.2)
    with pytest.raises(ValueError, match="weight must have shape"):
        run(obs[:1], key[:1], 1)
    for message, other in (
        ("actor must map 4 features to 2 outputs", Arena.build((4, 3), (4, 1))),
        ("critic must map 4 features to 1 output", Arena.build((4, 2), (4, 2))),
        ("built for discrete actions", Arena.build((4, 2), continuous=True)),
    ):
        with pytest.raises(ValueError, match=message):
            rollout(make_parameters(other, 2), other, env, obs, key, 1)
    with pytest.raises(ValueError, match=r"index must be in"):
        evaluate(parameters, arena, env, key, index=-1, greedy=True)
    with pytest.raises(RuntimeError, match="reset"):
        rollout(parameters, arena, ClassicEnv("CartPole-v1", 2, 4), obs, key, 1)
    env.state = env.state[:1]
    with pytest.raises(ValueError, match=r"env\.state must have shape"):
        run(obs, key, 1)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_copies_change_in_place_with_a_clock_on_the_device_alone(backend):
    arena = make_arena("CartPole-v1")
    parameters = make_parameters(arena, 2)
    for on_device in (False, True):
        env, obs, key = start("CartPole-v1", 2, 3)
        if on_device:
            env.keep_clock_on_device()
        state, before, version = env.state, env.state.clone(), env.state._version
        with use_backend(backend):
            rollout(parameters, arena, env, obs, key, 2)
        assert not torch.equal(env.state, before)
        assert (env.state is state) == on_device
        assert torch.equal(state, before) != on_device
        assert (state._version > version) == on_device
    env.elapsed = env.state.view(torch.int32).flatten()[:6].view(2, 3)
    with pytest.raises(ValueError, match=r"env\.\w+ must not share memory with env\.\w+"):
        rollout(parameters, arena, env, obs, key, 2)


def test_a_task_of_other_physics_is_refused():
    arena = make_arena("CartPole-v1")
    env, obs, key = start("CartPole-v1", 2, 4)
    env.task = replace(env.task, reset_high=(0.1,) * 4)
    with pytest.raises(ValueError, match=r"task must be one of .*, got another CartPole-v1"):
        rollout(make_parameters(arena, 2), arena, env, obs, key, 1)
