"""Tasks of envpool: what gymnasium's adapter promises, kept by pools."""

import sys
import warnings
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
from sweeping import SPEC, table

from sparse_tickets import run_sweep
from sparse_tickets.envs import GymEnv, env_spec, gym_spec, make_env, use_workers
from sparse_tickets.envs.gym_adapter import find_registered
from sparse_tickets.kernels.random import Stream, bits, uniform
from sparse_tickets.sweep.protocols import protocol

TASKS = ("CartPole-v1", "Pendulum-v1", "FrozenLake-v1", "Hopper-v5", "LunarLander-v3")


@pytest.fixture
def envpool():
    return pytest.importorskip("envpool")


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "envpool", None)
    with pytest.raises(ValueError, match=r"needs envpool: pip install 'sparse-tickets\[envpool\]'"):
        env_spec("envpool:Hopper-v5")


def test_gymnasium_has_none_of_its_tasks():
    with pytest.raises(ValueError, match="gymnasium knows no tasks of envpool, got 'envpool:Hop"):
        find_registered("envpool:Hopper-v5")


@pytest.mark.usefixtures("envpool")
def test_tasks_that_envpool_lacks_are_refused():
    with pytest.raises(ValueError, match=r"perhaps Hopper-v5.*, got 'envpool:Hoper-v5'"):
        env_spec("envpool:Hoper-v5")
    with pytest.raises(ValueError, match=r"list_all_envs\(\), perhaps .*, got 'envpool:'"):
        make_env("envpool:", 1, 1)
    with pytest.raises(ValueError, match="of one player, got 'envpool:TicTacToe-v1' of 2"):
        env_spec("envpool:TicTacToe-v1")
    with pytest.raises(ValueError, match="to have noise, got 'envpool:CartPole-v1'"):
        env_spec("envpool:CartPole-v1+noise=2")


@pytest.mark.usefixtures("envpool")
@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1", "LunarLander-v3"])
def test_spaces_and_limits_are_those_of_gymnasium(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = gym_spec(f"envpool:{name}", pilot_steps=0)
    if name == "LunarLander-v3":
        pytest.importorskip("Box2D")
    theirs = gym_spec(name, f"envpool:{name}", pilot_steps=0)
    for field in ("observation_dim", "discrete", "action_dim", "action_low", "time_limit"):
        assert getattr(ours, field) == getattr(theirs, field)
    assert ours.name == f"envpool:{name}"


@pytest.mark.usefixtures("envpool")
def test_pilots_are_the_same_every_time():
    one, two = (gym_spec("envpool:CartPole-v1") for _ in range(2))
    assert one == two
    assert 15 < one.random_return < 30
    assert one.solved == 475.0


@pytest.mark.usefixtures("envpool")
def test_protocols_are_those_of_the_same_task():
    assert protocol("envpool:Pendulum-v1").ppo == protocol("Pendulum-v1").ppo


def played(name, keys, copies=3, steps=250, workers=1):
    """All that an environment hands out under actions that each ticket draws by its key."""
    env = GymEnv(f"envpool:{name}", len(keys), copies, workers=workers)
    seen = [env.reset(keys)]
    spec = env.spec
    for step in range(steps):
        width = 1 if spec.discrete else spec.action_dim
        drawn = uniform(keys, copies * width, stream=Stream.ACTION, step=step)
        drawn = drawn.view(len(keys), copies, width)
        action = (drawn[..., 0] * spec.action_dim).long() if spec.discrete else 2 * drawn - 1
        seen.extend(env.step(action))
    env.close()
    return seen


@pytest.mark.usefixtures("envpool")
@pytest.mark.parametrize("name", TASKS)
def test_a_ticket_depends_on_its_key_alone(name):
    keys = torch.tensor([5, 17, 4, 99])
    whole = played(name, keys)
    for again in (played(name, keys), played(name, keys, workers=3)):
        assert all(map(torch.equal, whole, again))
    own = torch.tensor([2, 0])
    part = played(name, keys[own])
    assert all(torch.equal(all_[own], some) for all_, some in zip(whole, part, strict=True))


@pytest.mark.filterwarnings("ignore:.*precision lowered")
@pytest.mark.parametrize("name", TASKS)
def test_steps_are_those_of_copies_played_one_by_one(envpool, name):
    """Each with a pool of its own, by envpool's own calls; its own limit truncates."""
    copies, steps = 4, 230
    env = GymEnv(f"envpool:{name}", 1, copies)
    spec, key = env.spec, torch.tensor([3])
    obs = env.reset(key)
    seeds = (bits(key, copies, stream=Stream.RESET, step=0)[0] >> 1).tolist()
    alone = [envpool.make_gymnasium(name, num_envs=1, env_seed=[seed]) for seed in seeds]

    def flat(observation):
        if isinstance(env._observation_space, gymnasium.spaces.Discrete):
            return torch.eye(16)[observation]
        return torch.tensor(np.asarray(observation, np.float32)).flatten(1)

    assert torch.equal(obs[0], torch.cat([flat(each.reset()[0]) for each in alone]))
    endings = 0
    for step in range(steps):
        drawn = uniform(key, copies * spec.action_dim, stream=Stream.ACTION, step=step)
        drawn = drawn.view(1, copies, -1)
        action = (drawn[..., 0] * spec.action_dim).long() if spec.discrete else 2 * drawn - 1
        now = env.step(action)
        for copy, pool in enumerate(alone):
            observation, reward, ended, cut, _ = pool.step(action[0, copy : copy + 1].numpy())
            assert torch.equal(now.final_obs[0, copy], flat(observation)[0])
            assert now.reward[0, copy] == float(reward[0])
            assert (now.terminated[0, copy], now.truncated[0, copy]) == (ended[0], cut[0])
            if ended[0] or cut[0]:
                observation, _ = pool.reset()
                endings += 1
            assert torch.equal(now.obs[0, copy], flat(observation)[0])
    assert endings > 0


@pytest.mark.usefixtures("envpool")
def test_an_episode_that_ends_in_its_last_step_is_terminated():
    """CartPole under one action falls after about nine steps: with that for a limit, it is both."""
    env = GymEnv("envpool:CartPole-v1", 1, 1)
    push = torch.ones(1, 1, dtype=torch.int64)

    def fallen():
        env.reset(torch.tensor([8]))
        for step in range(1, 30):
            now = env.step(push)
            if now.terminated or now.truncated:
                return step, bool(now.terminated), bool(now.truncated)
        raise AssertionError("CartPole did not fall")

    length, *_ = fallen()
    for limit, terminated in ((length + 1, True), (length, True), (length - 1, False)):
        env._stepper._task.limit = limit
        assert fallen() == (min(limit, length), terminated, not terminated)


@pytest.mark.usefixtures("envpool")
def test_copies_at_rest_stand_still():
    env = make_env("envpool:CartPole-v1", 2, 2)
    first = env.reset(torch.tensor([1, 2]))
    env.rest(torch.tensor([[True, False], [False, True]]))
    push = torch.ones(2, 2, dtype=torch.int64)
    now = env.step(push)
    still = torch.tensor([[True, False], [False, True]])
    assert torch.equal(now.obs[still], first[still])
    assert (now.obs[~still] != first[~still]).any(-1).all()
    assert now.reward[still].eq(0).all()
    assert now.reward[~still].eq(1).all()
    env.rest(torch.ones(2, 2, dtype=torch.bool))
    assert torch.equal(env.step(push).obs, now.obs)


@pytest.mark.long
@pytest.mark.usefixtures("envpool")
def test_sweeps_are_the_same_by_any_number_of_threads(tmp_path):
    spec = replace(SPEC, env="envpool:Hopper-v5", algos=("ppo",), levels=2, rewind_step=0)
    frames = []
    for workers in (1, 3):
        with use_workers(workers):
            run_sweep(spec, tmp_path / str(workers))
        frames.append(table(tmp_path / str(workers)))
    assert frames[0].equals(frames[1])
