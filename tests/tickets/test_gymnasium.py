"""The adapter of gymnasium environments, flawed ones included."""

from typing import ClassVar

import gymnasium
import numpy as np
import pytest
import torch

from sparse_tickets.envs import (
    EnvSpec,
    GymEnv,
    gym_spec,
)
from sparse_tickets.kernels.rollout import evaluate
from sparse_tickets.population import Population, initialise, policy_arena


def keys(count):
    return torch.arange(count) * 7919 - 11


class Flawed(gymnasium.Env):
    """Ends after three steps; subclasses each have one flaw. Every one ever made is remembered."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gymnasium.spaces.Discrete(2)
    made: ClassVar[list] = []

    def __init__(self):
        Flawed.made.append(self)
        self.closed = False

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self.observe(), {}

    def step(self, action):
        self.time += 1
        return self.observe(), self.reward(), False, self.time == 3, self.info()

    def observe(self):
        return np.array([self.time, 1.0])

    def reward(self):
        return 1.0

    def info(self):
        return {}

    def close(self):
        self.closed = True


@pytest.fixture
def made():
    Flawed.made.clear()
    yield Flawed.made
    Flawed.made.clear()


def still(env):
    return torch.zeros(env.tickets, env.copies, dtype=torch.int64)


@pytest.mark.usefixtures("made")
def test_an_observation_buffer_may_be_reused():
    class Reusing(Flawed):
        buffer = np.zeros(2)

        def observe(self):
            self.buffer[:] = [self.time, 1.0]
            return self.buffer

    env = GymEnv(Reusing, 1, 2)
    env.reset(keys(1))
    for _ in range(2):
        env.step(still(env))
    last = env.step(still(env))
    assert last.truncated.all()
    assert last.final_obs[0].tolist() == [[3, 1], [3, 1]]
    assert last.obs[0].tolist() == [[0, 1], [0, 1]]


@pytest.mark.usefixtures("made")
def test_observations_are_scaled_before_they_are_rounded():
    class Tiny(Flawed):
        def observe(self):
            return np.array([1e-60 * (self.time + 1), 1e60])

    spec = EnvSpec(**{**vars(gym_spec(Tiny, "Tiny")), "offset": (0.0, 0.0), "scale": (1e-60, 1e60)})
    env = GymEnv(Tiny, 1, 1, spec=spec)
    assert env.reset(keys(1)).flatten().tolist() == [1.0, 1.0]
    beyond = GymEnv(Tiny, 1, 1)
    with pytest.warns(UserWarning, match=r"beyond float32: give its spec an offset and a scale"):
        beyond.reset(keys(1))


@pytest.mark.usefixtures("made")
def test_infos_are_nobodys_business():
    class Chatty(Flawed):
        def info(self):
            return {"shape": np.zeros(self.time), "kind": "text" if self.time % 2 else 1}

    env = GymEnv(Chatty, 2, 2)
    env.reset(keys(2))
    for _ in range(5):
        env.step(still(env))


def test_every_copy_is_closed(made):
    class Fails(Flawed):
        def __init__(self):
            super().__init__()
            if len(Flawed.made) == 4:
                raise RuntimeError("no memory")

    GymEnv(Flawed, 2, 3).close()
    assert [env.closed for env in made] == [True] * 7
    made.clear()
    with pytest.raises(RuntimeError, match="no memory"):
        GymEnv(Fails, 2, 3)
    assert [env.closed for env in made[:3]] == [True] * 3


@pytest.mark.usefixtures("made")
def test_what_is_not_finite_is_named_and_passed_on():
    class Breaks(Flawed):
        def observe(self):
            return np.array([np.nan if self.time == 2 else 0.0, 1.0])

    class Rich(Flawed):
        def reward(self):
            return np.inf

    env = GymEnv(Breaks, 2, 1)
    env.reset(keys(2))
    env.step(still(env))
    with pytest.warns(UserWarning, match="Breaks") as told:
        result = env.step(still(env))
    assert str(told[0].message).startswith(
        "Breaks (ticket 0, copy 0) returned observation [nan  1.], at step 2"
    )
    assert len(told) == 2
    assert result.obs.isnan().any(-1).all()
    assert env.faults[1] == "Breaks returned observation [nan  1.]"
    rich = GymEnv(Rich, 1, 1)
    rich.reset(keys(1))
    with pytest.warns(UserWarning, match=r"Rich .* returned reward inf, at step 1"):
        rich.step(still(rich))


@pytest.mark.usefixtures("made")
def test_what_does_not_fit_the_space_is_refused():
    class Short(Flawed):
        def observe(self):
            return np.zeros(3)

    class Dict(Flawed):
        def reward(self):
            return {"goal": 1.0}

    class Outside(Flawed):
        observation_space = gymnasium.spaces.Discrete(2)

        def observe(self):
            return 7

    with pytest.raises(ValueError, match=r"Short .*ticket 0, copy 0.* shape \(2,\), got \(3,\)"):
        GymEnv(Short, 1, 1).reset(keys(1))
    with pytest.raises(ValueError, match=r"observations in Discrete\(2\), got 7"):
        GymEnv(Outside, 1, 1).reset(keys(1))
    env = GymEnv(Dict, 1, 1)
    env.reset(keys(1))
    with pytest.raises(TypeError, match=r"a number as reward, got \{'goal': 1.0\}"):
        env.step(still(env))


@pytest.mark.usefixtures("made")
def test_resting_copies_do_not_act():
    env = GymEnv(Flawed, 1, 2)
    env.reset(keys(1))
    env.rest(torch.tensor([[True, False]]))
    for _ in range(2):
        result = env.step(still(env))
    assert [copy.time for copy in env._stepper.envs] == [0, 2]
    assert result.obs[0, :, 0].tolist() == [0, 2]
    assert result.reward.tolist() == [[0, 1]]
    env.reset(keys(1))
    env.step(still(env))
    assert [copy.time for copy in env._stepper.envs] == [1, 1]


@pytest.mark.usefixtures("made")
def test_a_lost_policys_action_does_not_reach_the_environment():
    class Pushed(Flawed):
        action_space = gymnasium.spaces.Box(np.float32([0, -np.inf]), np.float32([2, np.inf]))

        def step(self, action):
            self.pushed = action
            return super().step(action)

    env = GymEnv(Pushed, 1, 1)
    env.reset(keys(1))
    env.step(torch.full((1, 1, 2), np.nan))
    assert env._stepper.envs[0].pushed.tolist() == [1, 0]


@pytest.mark.usefixtures("made")
def test_images_are_scaled():
    class Screen(Flawed):
        observation_space = gymnasium.spaces.Box(0, 255, (2, 3, 3), np.uint8)

        def observe(self):
            return np.full((2, 3, 3), 51, np.uint8)

    obs = GymEnv(Screen, 1, 1).reset(keys(1))
    torch.testing.assert_close(obs, torch.full((1, 1, 18), 0.2))


@pytest.mark.usefixtures("made")
def test_returns_are_summed_in_float64():
    class Swings(Flawed):
        def reward(self):
            return [1e9, 1.0, -1e9][self.time - 1]

    spec = gym_spec(Swings, "Swings")
    arena = policy_arena(spec, (4,))
    population = Population.create(arena, initialise(arena, keys(2)))
    env = GymEnv(Swings, 2, 2)
    returns = evaluate(population.parameters, arena, env, keys(2), index=0, greedy=True)
    assert returns.tolist() == [[1, 1], [1, 1]]
