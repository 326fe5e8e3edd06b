"""Environments: long rollouts against gymnasium, independent tickets, restarts, registration."""

from dataclasses import replace
from functools import partial

import gymnasium
import numpy as np
import pytest
import torch

from sparse_tickets.envs import (
    ClassicEnv,
    Env,
    EnvSpec,
    GymEnv,
    env_spec,
    gym_spec,
    make_env,
    register_env,
    registry,
)
from sparse_tickets.kernels import dynamics
from sparse_tickets.kernels.dispatch import use_backend
from sparse_tickets.kernels.random import Stream, uniform

MAZE = "sparse_tickets/Maze-v0"


CLASSIC = ["CartPole-v1", "Acrobot-v1", "MountainCar-v0", "Pendulum-v1", MAZE]


# Largest drift of a float64 state within an episode: Acrobot is chaotic and has up to 500 steps.
DRIFT = {"CartPole-v1": 1e-11, "Acrobot-v1": 1e-9, "MountainCar-v0": 1e-12, "Pendulum-v1": 1e-9}


DRIFT[MAZE] = 0.0


def keys(count):
    return torch.arange(count) * 7919 - 11


def random_action(env, step):
    """The same action for a ticket whatever its batch-mates, long enough to end episodes."""
    n = env.copies * (1 if env.spec.discrete else env.spec.action_dim)
    u = uniform(keys(env.tickets), n, stream=Stream.ACTION, step=step)
    if env.spec.discrete:
        return (u * env.spec.action_dim).long()
    return (u.view(env.tickets, env.copies, -1) - 0.5) * 5


@pytest.mark.long
@pytest.mark.parametrize("name", CLASSIC)
def test_long_rollout_equals_gymnasium(name):
    """Thousands of steps; gymnasium's state is set to ours at restarts and nowhere else."""
    tickets, copies = 2, 3
    env = ClassicEnv(name, tickets, copies, spec=env_spec(name).raw())
    env.reset(keys(tickets))
    places = [(p, e) for p in range(tickets) for e in range(copies)]
    twins = {place: gymnasium.make(name) for place in places}
    for place, twin in twins.items():
        twin.reset(seed=0)
        twin.unwrapped.state = env.state[place].numpy().copy()
    restarts = truncations = 0
    for step in range(1100):
        action = random_action(env, step)
        if name == "MountainCar-v0":
            # Copy 0 rocks itself up the hill, the others run into the time limit.
            action[:, 0] = 1 + env.state[:, 0, 1].sign().long()
        result = env.step(action)
        for place, twin in twins.items():
            act = int(action[place]) if env.spec.discrete else action[place].double().numpy()
            obs, reward, terminated, truncated, _ = twin.step(act)
            np.testing.assert_allclose(result.final_obs[place], obs, rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(result.reward[place], reward, rtol=2**-23, atol=1e-8)
            assert bool(result.terminated[place]) == terminated
            assert bool(result.truncated[place]) == (truncated and not terminated)
            if terminated or truncated:
                restarts += 1
                truncations += truncated
                assert env.elapsed[place] == 0
                twin.reset()
                twin.unwrapped.state = env.state[place].numpy().copy()
            else:
                np.testing.assert_allclose(
                    np.array(twin.unwrapped.state), env.state[place], rtol=0, atol=DRIFT[name]
                )
                assert torch.equal(result.obs[place], result.final_obs[place])
    assert restarts >= 10
    assert truncations > 0 or name == "CartPole-v1"


def test_cartpole_reaches_its_time_limit():
    env = make_env("CartPole-v1", 1, 2)
    obs = env.reset(keys(1))
    for step in range(500):
        physical = obs * env.scale + env.offset
        balance = physical @ torch.tensor([0.05, 0.1, 1.0, 0.3])
        obs, reward, terminated, truncated, final_obs = env.step((balance > 0).long())
        assert not terminated.any()
        assert bool((reward == 1).all())
        assert bool((truncated == (step == 499)).all())
    assert not torch.equal(obs, final_obs)
    assert bool((env.elapsed == 0).all())


@pytest.mark.long
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", CLASSIC)
def test_batch_mates_change_no_bit(name, backend):
    with use_backend(backend):
        together, alone = ClassicEnv(name, 7, 5), ClassicEnv(name, 1, 5)
        for ticket in (0, 3, 6):
            key = keys(7)
            all_obs, obs = together.reset(key), alone.reset(key[ticket : ticket + 1])
            assert torch.equal(all_obs[ticket], obs[0])
            for step in range(230):
                action = random_action(together, step)
                result, single = together.step(action), alone.step(action[ticket : ticket + 1])
                for field, value in zip(result, single, strict=True):
                    assert torch.equal(field[ticket], value[0])
            assert torch.equal(together.state[ticket], alone.state[0])


@pytest.mark.parametrize("stream", [Stream.RESET, Stream.EVAL_RESET])
def test_restarts_draw_as_documented(stream):
    env = ClassicEnv("CartPole-v1", 2, 3, reset_stream=stream)
    obs = env.reset(keys(2))
    restarted = torch.ones(2, 3, dtype=torch.bool)
    for step in range(60):
        assert env.clock == step
        u = uniform(keys(2), 3 * 4, stream=stream, step=step).view(2, 3, 4)
        expected = env.observe(dynamics.initial(env.task, u))
        assert torch.equal(obs[restarted], expected[restarted])
        obs, _, terminated, truncated, _ = env.step(torch.ones(2, 3, dtype=torch.int64))
        restarted = terminated | truncated


def test_reset_replays_and_other_keys_differ():
    env = make_env("Acrobot-v1", 3, 2)
    first = env.reset(keys(3))
    for step in range(4):
        env.step(random_action(env, step))
    assert torch.equal(env.reset(keys(3)), first)
    assert not torch.equal(env.reset(keys(3) + 1), first)
    assert len(first.flatten(0, 1).unique(dim=0)) == 6


@pytest.mark.parametrize("name", CLASSIC)
def test_observations_are_scaled(name):
    env, raw = make_env(name, 1, 4), make_env(name, 1, 4, spec=env_spec(name).raw())
    scale, offset = torch.tensor(env.spec.scale), torch.tensor(env.spec.offset)
    assert torch.equal(env.reset(keys(1)), (raw.reset(keys(1)) - offset) / scale)
    scaled, plain = env.step(random_action(env, 0)), raw.step(random_action(env, 0))
    assert torch.equal(scaled.final_obs, (plain.final_obs - offset) / scale)
    assert scaled.obs.dtype == torch.float32


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1", "FrozenLake-v1"])
def test_adapter_keeps_the_protocol(name):
    env = GymEnv(name, 2, 3)
    assert isinstance(env, Env)
    assert isinstance(make_env("CartPole-v1", 1, 1), Env)
    obs = env.reset(keys(2))
    dim = env.spec.observation_dim
    assert obs.shape == (2, 3, dim)
    result = env.step(random_action(env, 0))
    assert result.obs.shape == result.final_obs.shape == (2, 3, dim)
    assert all(part.shape == (2, 3) for part in result[1:4])
    assert [part.dtype for part in result] == [
        torch.float32,
        torch.float64,
        torch.bool,
        torch.bool,
        torch.float32,
    ]
    assert env.task is None
    assert env.clock == 1
    env.close()


@pytest.mark.parametrize("name", ["CartPole-v1", "FrozenLake-v1"])
def test_adapter_batch_mates_change_no_bit(name):
    together = GymEnv(name, 3, 2)
    all_obs = together.reset(keys(3))
    alone = GymEnv(name, 1, 2)
    assert torch.equal(alone.reset(keys(3)[1:2])[0], all_obs[1])
    for step in range(150):
        action = random_action(together, step)
        result, single = together.step(action), alone.step(action[1:2])
        for field, value in zip(result, single, strict=True):
            assert torch.equal(field[1], value[0])


def test_adapter_and_classic_share_the_physics():
    """From the same states, the adapter around gymnasium's CartPole gives what ours gives."""
    spec = env_spec("CartPole-v1")
    ours, theirs = ClassicEnv("CartPole-v1", 1, 2), GymEnv("CartPole-v1", 1, 2, spec=spec)
    ours.reset(keys(1))
    theirs.reset(keys(1))
    for copy, env in enumerate(theirs._stepper.envs):
        env.unwrapped.state = ours.state[0, copy].numpy().copy()
    for _ in range(30):
        action = torch.tensor([[0, 1]])
        result, expected = ours.step(action), theirs.step(action)
        torch.testing.assert_close(result.final_obs, expected.final_obs, rtol=1e-6, atol=1e-6)
        for part in (1, 2, 3):
            assert torch.equal(result[part], expected[part].to(result[part].dtype))
        if result.terminated.any():
            break
    assert result.terminated.any()


class Corridor(gymnasium.Env):
    """Walk right for a reward at cell 3; the time limit of 5 may come first."""

    observation_space = gymnasium.spaces.Box(-10, 10, (1, 2))
    action_space = gymnasium.spaces.Discrete(2, start=-1)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.cell, self.steps = 0, 0
        return self._observe(), {}

    def step(self, action):
        assert action in (-1, 0)
        self.cell += 1 if action == 0 else 0
        self.steps += 1
        return self._observe(), 1.0, self.cell == 3, self.steps == 5, {}

    def _observe(self):
        return np.array([[self.cell, self.steps]], dtype=np.float32)


def test_adapter_gives_the_observation_to_bootstrap_from():
    env = GymEnv(Corridor, 1, 3)
    env.reset(keys(1))
    # Copy 0 stands still, copy 1 terminates at step 3, copy 2 does both at once at step 5.
    walk = torch.tensor([[0, 1, 1], [0, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]])
    for step, action in enumerate(walk):
        obs, _, terminated, truncated, final_obs = env.step(action[None])
        assert terminated[0].tolist() == [False, step == 2, step == 4]
        assert truncated[0].tolist() == [step == 4, False, False]
        if step == 2:
            assert final_obs[0].tolist() == [[0, 3], [3, 3], [1, 3]]
            assert obs[0].tolist() == [[0, 3], [0, 0], [1, 3]]
    assert final_obs[0].tolist() == [[0, 5], [0, 2], [3, 5]]
    assert obs[0].tolist() == [[0, 0], [0, 2], [0, 0]]


def test_own_environment_is_registered_in_a_line(monkeypatch):
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    spec = gym_spec(Corridor, "Corridor")
    register_env("Corridor", partial(GymEnv, Corridor), spec)
    assert env_spec("Corridor") == spec
    env = make_env("Corridor", 2, 2, reset_stream=Stream.EVAL_RESET)
    assert env.reset_stream == Stream.EVAL_RESET
    assert env.reset(keys(2)).shape == (2, 2, 2)
    with pytest.raises(ValueError, match="name must be new"):
        register_env("Corridor", partial(GymEnv, Corridor), spec)
    register_env("Corridor", partial(GymEnv, Corridor), spec, overwrite=True)
    with pytest.raises(ValueError, match="spec must be named 'Other'"):
        register_env("Other", partial(GymEnv, Corridor), spec)


def test_an_environment_whose_packages_are_missing_says_which():
    gymnasium.register("Missing-v0", entry_point="not_installed_here:Env")
    with pytest.raises(ValueError, match=r"made here, got 'Missing-v0' .*not_installed_here"):
        env_spec("Missing-v0")


def test_unknown_names_list_the_known_ones():
    for call in (env_spec, partial(make_env, tickets=1, copies=1)):
        with pytest.raises(ValueError, match=r"CartPole-v1.*any gymnasium id, .*got 'Nowhere-v0'"):
            call("Nowhere-v0")


def test_the_module_of_an_id_is_imported_first(tmp_path, monkeypatch):
    (tmp_path / "registers_one.py").write_text(
        "import gymnasium\n"
        "entry = 'gymnasium.envs.classic_control:CartPoleEnv'\n"
        "gymnasium.register('Registered-v0', entry_point=entry, max_episode_steps=9)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="got 'Registered-v0'"):
        env_spec("Registered-v0")
    spec = env_spec("registers_one:Registered-v0")
    assert (spec.name, spec.time_limit) == ("registers_one:Registered-v0", 9)
    assert env_spec("registers_one:Registered-v0+noise=2").observation_dim == 6
    # gymnasium's own, through the adapter, where a fused one bears the plain id.
    assert isinstance(make_env("gymnasium:CartPole-v1", 1, 1), GymEnv)
    for unknown in ("not_installed_here:Registered-v0", "gymnasium:Nowhere-v0", ":Registered-v0"):
        with pytest.raises(ValueError, match=f"any gymnasium id, .*got '{unknown}'"):
            env_spec(unknown)


def test_any_gymnasium_id_falls_back_to_the_adapter():
    spec = env_spec("MountainCarContinuous-v0")
    # It starts in [-0.6, -0.4] and rocks under random pushes; each costs 0.1 * action^2.
    assert spec.offset[0] == pytest.approx(-0.5, abs=0.1)
    assert spec.scale[0] == pytest.approx(0.15, abs=0.1)
    assert spec.random_return == pytest.approx(-999 * 0.1 / 3, rel=0.05)
    assert (spec.action_low, spec.action_high) == ((-1.0,), (1.0,))
    assert (spec.time_limit, spec.solved) == (999, 90.0)
    env = make_env("MountainCarContinuous-v0", 1, 2)
    assert isinstance(env, GymEnv)
    env.reset(keys(1))
    clipped, bound = (env.step(torch.full((1, 2, 1), push)) for push in (50.0, 1.0))
    assert torch.equal(clipped.reward, bound.reward)


def test_the_pilot_finds_scale_and_random_return():
    """Episodes of ten steps, of inputs whose moments are known; a reward of 1 for one action."""

    class Known(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2, 3), np.float64)
        action_space = gymnasium.spaces.Discrete(4, start=-1)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.time = 0
            return self.observe(), {}

        def step(self, action):
            self.time += 1
            return self.observe(), float(action == 2), False, self.time == 10, {}

        def observe(self):
            wide, narrow, far = self.np_random.normal((1, 5, 1e7), (30, 0.02, 1))
            return np.array([[wide, narrow, far], [7.0, np.nan, self.time]])

    spec = gym_spec(Known, "Known")
    assert spec == gym_spec(Known, "Known")
    assert spec.random_return == pytest.approx(2.5, abs=0.2)  # 1,000 episodes
    assert spec.offset == (0.0, 5.0, 1e7, 0.0, 0.0, 4.5)
    wide, narrow, far, *rest = spec.scale
    assert wide == pytest.approx(30, abs=1)
    assert narrow == pytest.approx(0.02, abs=0.001)
    assert far == pytest.approx(1, abs=0.1)
    assert rest == [1.0, 1.0, 2.9]
    raw = gym_spec(Known, "Known", pilot_steps=0)
    assert raw == replace(spec.raw(), random_return=None)
    assert gym_spec(Known, pilot_steps=9).random_return is None


def test_the_pilot_leaves_one_hot_observations_and_refuses_other_shapes():
    spec = gym_spec("FrozenLake-v1")
    assert spec.raw() == spec
    assert 0.005 < spec.random_return < 0.03

    class Flat(Corridor):
        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return np.zeros((2, 1)), {}

    with pytest.raises(ValueError, match=r"Flat must return .* shape \(1, 2\), got \(2, 1\)"):
        gym_spec(Flat, "Flat")


@pytest.mark.long
def test_built_in_specs_agree_with_gymnasium():
    for name in CLASSIC:
        spec, theirs = env_spec(name), gym_spec(name)
        for field in ("name", "observation_dim", "discrete", "action_dim", "time_limit"):
            assert getattr(spec, field) == getattr(theirs, field)
        assert (spec.action_low, spec.action_high) == (theirs.action_low, theirs.action_high)
        assert spec.solved == theirs.solved or name == "Pendulum-v1"


def test_arguments_are_checked():
    env, adapter = make_env("CartPole-v1", 2, 1), GymEnv("CartPole-v1", 2, 1)
    for one in (env, adapter):
        with pytest.raises(RuntimeError, match="reset must be called before step"):
            one.step(torch.zeros(2, 1, dtype=torch.int64))
        with pytest.raises(ValueError, match="key must have shape"):
            one.reset(keys(3))
        with pytest.raises(TypeError, match="key must be int64"):
            one.reset(keys(2).float())
        one.reset(keys(2))
        with pytest.raises(ValueError, match=r"action must be in \[0, 2\)"):
            one.step(torch.full((2, 1), 2))
        with pytest.raises(TypeError, match="action must be int64"):
            one.step(torch.zeros(2, 1))
        with pytest.raises(ValueError, match="action must have shape"):
            one.step(torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="task_name must be one of CartPole-v1"):
        ClassicEnv("Nowhere-v0", 1, 1)
    with pytest.raises(ValueError, match="copies must be at least 1"):
        make_env("CartPole-v1", 1, 0)
    with pytest.raises(ValueError, match="tickets must be at least 1"):
        GymEnv("CartPole-v1", 0, 1)
    with pytest.raises(ValueError, match="spec must have observation_dim"):
        make_env("CartPole-v1", 1, 1, spec=env_spec("Acrobot-v1"))
    with pytest.raises(ValueError, match="spec must have observation_dim=4"):
        GymEnv("CartPole-v1", 1, 1, spec=env_spec("Acrobot-v1"))


def test_unsupported_spaces_are_refused_by_name():
    class Tuples(Corridor):
        observation_space = gymnasium.spaces.Tuple((gymnasium.spaces.Discrete(2),))

    class Binary(Corridor):
        action_space = gymnasium.spaces.MultiBinary(2)

    with pytest.raises(ValueError, match=r"observation space .* got Tuple.*FlattenObservation"):
        gym_spec(Tuples)
    with pytest.raises(ValueError, match=r"action space must be Box or Discrete, got MultiBinary"):
        gym_spec(Binary)


def test_spec_checks_its_numbers():
    base = {
        "name": "x",
        "observation_dim": 2,
        "discrete": False,
        "action_dim": 1,
        "action_low": (-1.0,),
        "action_high": (1.0,),
        "time_limit": None,
        "offset": (0.0, 0.0),
        "scale": (1.0, 1.0),
        "solved": None,
        "random_return": None,
    }
    assert EnvSpec(**base).raw() == EnvSpec(**base)
    for field, value in (
        ("scale", (1.0, 0.0)),
        ("scale", (1.0,)),
        ("offset", ()),
        ("action_low", ()),
        ("observation_dim", 0),
    ):
        with pytest.raises(ValueError, match=f"{field} must"):
            EnvSpec(**{**base, field: value})
