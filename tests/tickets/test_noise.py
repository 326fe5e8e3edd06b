"""Noise features by name: places by seed, any environment, and no change without noise."""

from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch

from sparse_tickets import run_sweep
from sparse_tickets.algos.evaluation import Evaluation
from sparse_tickets.algos.ppo import PPO
from sparse_tickets.envs import (
    Noise,
    NoiseFeatures,
    env_spec,
    make_env,
    register_env,
    registry,
    split_noise,
)
from sparse_tickets.sweep.protocols import protocol
from sparse_tickets.sweep.spec import Sweep
from sparse_tickets.sweep.store import load_results


def test_places_are_drawn_by_the_seed_and_keep_the_order():
    for seed in range(5):
        source = np.array(Noise(6, seed).source(4))
        assert sorted(source) == list(range(10))
        for own in (source < 4, source >= 4):
            assert (np.diff(source[own]) == 1).all()
    assert len({Noise(6, seed).source(4) for seed in range(20)}) > 15
    assert Noise(6, 3).source(4) == Noise(6, 3).source(4)
    assert Noise(0, 3).source(4) == (0, 1, 2, 3)


def test_names():
    assert split_noise("CartPole-v1") == ("CartPole-v1", None)
    assert split_noise("CartPole-v1+noise=16") == ("CartPole-v1", Noise(16))
    assert split_noise("ALE/Pong-v5+noise=2,seed=7") == ("ALE/Pong-v5", Noise(2, 7))
    for wrong in ("CartPole-v1+noise", "CartPole-v1+noise=-1", "CartPole-v1+noise=2,places=3"):
        with pytest.raises(ValueError, match=r"must end in \+noise=N or \+noise=N,seed=S, got"):
            env_spec(wrong)
    with pytest.raises(ValueError, match="noise count must be at least 0, got -1"):
        Noise(-1)


@pytest.mark.parametrize("name", ["MountainCar-v0", "CliffWalking-v1"])
def test_specs_scale_the_own_inputs_and_leave_the_noise(name):
    plain, noisy = env_spec(name), env_spec(f"{name}+noise=3,seed=1")
    own = np.array(Noise(3, 1).source(plain.observation_dim)) < plain.observation_dim
    assert noisy.name == f"{name}+noise=3,seed=1"
    assert noisy.observation_dim == plain.observation_dim + 3
    assert tuple(np.array(noisy.offset)[own]) == plain.offset
    assert tuple(np.array(noisy.scale)[own]) == plain.scale
    assert set(np.array(noisy.offset)[~own]) == {0.0}
    assert set(np.array(noisy.scale)[~own]) == {1.0}
    assert (noisy.solved, noisy.time_limit) == (plain.solved, plain.time_limit)


def test_a_protocol_is_that_of_the_environment():
    plain, noisy = protocol("Acrobot-v1"), protocol("Acrobot-v1+noise=8")
    assert noisy.ppo == plain.ppo
    assert noisy.env == "Acrobot-v1+noise=8"


def play(env, steps=60):
    env.action_space.seed(0)
    seen = [env.reset(seed=3)[0]]
    for _ in range(steps):
        obs, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        seen += [obs, reward]
        if terminated or truncated:
            seen.append(env.reset()[0])
    return seen


def test_the_wrapper_without_noise_is_the_environment():
    plain = gymnasium.make("CartPole-v1")
    wrapped = NoiseFeatures(gymnasium.make("CartPole-v1"), 0, seed=5)
    assert wrapped.observation_space == plain.observation_space
    for a, b in zip(play(plain), play(wrapped), strict=True):
        assert np.array_equal(a, b)


def test_the_wrapper_leaves_episodes_as_they_are_and_repeats_its_noise():
    source = np.array(Noise(3, 1).source(4))
    wrapped = NoiseFeatures(gymnasium.make("CartPole-v1"), 3, seed=1)
    first, again = play(wrapped), play(wrapped)
    for plain, found, repeated in zip(
        play(gymnasium.make("CartPole-v1")), first, again, strict=True
    ):
        assert np.array_equal(found, repeated)
        if isinstance(found, np.ndarray):
            assert found.dtype == wrapped.observation_space.dtype == np.float32
            assert found in wrapped.observation_space
            assert np.array_equal(found[source < 4], plain)
        else:
            assert found == plain
    noise = np.stack([obs[source >= 4] for obs in first if isinstance(obs, np.ndarray)])
    assert np.abs(np.corrcoef(noise.T) - np.eye(3)).max() < 0.5
    assert np.abs(noise.mean(0)).max() < 0.6
    assert (np.abs(noise.std(0) - 1) < 0.4).all()


def test_the_wrapper_wants_flat_boxes():
    with pytest.raises(ValueError, match=r"boxes of one dimension.*FlattenObservation"):
        NoiseFeatures(gymnasium.make("CliffWalking-v1"), 2)


def test_any_gymnasium_environment_by_name():
    env = make_env("CliffWalking-v1+noise=2", 2, 3)
    obs = env.reset(torch.arange(2))
    assert obs.shape == (2, 3, 50)
    own = np.array(Noise(2).source(48)) < 48
    assert (obs[..., own].sum(-1) == 1).all()
    assert len(obs[..., ~own].unique()) == 12
    env.close()


def test_what_is_neither_built_in_nor_gymnasium_is_refused(monkeypatch):
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    spec = replace(env_spec("CartPole-v1"), name="Own")
    register_env("Own", lambda *_, **__: None, spec)
    with pytest.raises(ValueError, match="built-in or a gymnasium one to have noise, got 'Own'"):
        make_env("Own+noise=2", 1, 1)


@pytest.mark.long
def test_a_sweep_with_noise_counts_the_inputs_it_loses(tmp_path):
    spec = Sweep(
        env="CartPole-v1+noise=12",
        algos=("ppo",),
        conditions=("mask/weights",),
        seeds=2,
        levels=3,
        rate=0.7,
        hidden=(8,),
        ppo=PPO(steps=512, horizon=32),
        evaluation=Evaluation(points=1, episodes=2, final_episodes=2),
    )
    run_sweep(spec, tmp_path / "run")
    frame = load_results(tmp_path / "run")
    assert set(frame["env"]) == {"CartPole-v1+noise=12"}
    assert frame.filter(level=2)["dead_inputs"].max() > 0
