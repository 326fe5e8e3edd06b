"""The physics: reference against gymnasium's own steps, Numba against the reference."""

import math

import gymnasium
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse_tickets.envs  # noqa: F401  (registers the maze with gymnasium)
from sparse_tickets.kernels import dynamics
from sparse_tickets.kernels.dispatch import use_backend
from sparse_tickets.kernels.dynamics import TASKS, cpu, equations

# One step: sines and cosines of two libraries differ by a unit in the last place; Acrobot's four
# Runge-Kutta stages amplify that through accelerations of some hundreds.
TOLERANCE = {"CartPole-v1": 1e-14, "Acrobot-v1": 1e-11, "MountainCar-v0": 1e-15}
TOLERANCE |= {"Pendulum-v1": 1e-14, "sparse_tickets/Maze-v0": 0}


def states(task, count, generator):
    """States all over the reachable region, and beyond the edges where episodes end."""
    high = {
        "CartPole-v1": (2.6, 4.0, 0.25, 4.0),
        "Acrobot-v1": (math.pi, math.pi, 4 * math.pi, 9 * math.pi),
        "MountainCar-v0": (0.9, 0.07),
        "Pendulum-v1": (20.0, 8.0),
        "sparse_tickets/Maze-v0": task.reset_high,
    }[task.name]
    state = torch.rand(count, task.state_dim, generator=generator).double() * 2 - 1
    state = state * torch.tensor(high, dtype=torch.float64)
    if task.name == "MountainCar-v0":
        state[:, 0] -= 0.3
    return state.abs().round() if "Maze" in task.name else state


def actions(task, count, generator):
    if task.discrete:
        return torch.randint(task.action_dim, (count,), generator=generator)
    return torch.randn(count, task.action_dim, generator=generator) * 2


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_step_from_anywhere_equals_gymnasium(task, backend, generator):
    env = gymnasium.make(task.name).unwrapped
    env.reset(seed=0)
    state, action = states(task, 400, generator), actions(task, 400, generator)
    with use_backend(backend):
        successor, reward, terminated = dynamics.step(task, state, action)
        observation = dynamics.observe(task, successor)
    tolerance = TOLERANCE[task.name]
    for i in range(400):
        env.state = state[i].numpy().copy()
        env.steps_beyond_terminated = None
        # float64 keeps gymnasium's Pendulum in float64.
        act = int(action[i]) if task.discrete else action[i].double().numpy()
        expected, expected_reward, expected_terminated, _, _ = env.step(act)
        np.testing.assert_allclose(successor[i], np.array(env.state), rtol=0, atol=tolerance)
        np.testing.assert_allclose(observation[i], expected, rtol=2**-23, atol=2**-23)
        np.testing.assert_allclose(reward[i], expected_reward, rtol=2**-23)
        assert bool(terminated[i]) == expected_terminated
    assert terminated.any() == (task.name != "Pendulum-v1"), "the case needs both outcomes"
    assert not terminated.all()


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_record_agrees_with_gymnasium(task):
    env = gymnasium.make(task.name)
    assert env.spec.max_episode_steps == task.time_limit
    assert env.observation_space.shape == (task.observation_dim,)
    if task.discrete:
        assert env.action_space.n == task.action_dim
        assert task.action_low == task.action_high == ()
    else:
        assert env.action_space.shape == (task.action_dim,)
        assert tuple(env.action_space.low) == task.action_low
        assert tuple(env.action_space.high) == task.action_high
    resets = []
    for seed in range(300):
        env.reset(seed=seed)
        resets.append(np.array(env.unwrapped.state, dtype=np.float64))
    low, high = np.array(task.reset_low), np.array(task.reset_high)
    margin = (high - low) / 20
    # Acrobot's initial state is rounded to float32 there.
    assert (np.min(resets, axis=0) >= low - 1e-8).all()
    assert (np.min(resets, axis=0) <= low + margin).all()
    assert (np.max(resets, axis=0) <= high + 1e-8).all()
    assert (np.max(resets, axis=0) >= high - margin).all()


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("copies", [(), (0,), (1,), (7,), (3, 5), (2, 1500)])
def test_numba_equals_reference(task, copies, generator):
    count = math.prod(copies)
    state = states(task, count, generator).view(*copies, task.state_dim)
    action = actions(task, count, generator)
    action = action.view(copies if task.discrete else (*copies, task.action_dim))
    u = torch.rand(*copies, task.state_dim, generator=generator)
    results = {}
    for backend in ("reference", "cpu"):
        with use_backend(backend):
            results[backend] = (
                dynamics.initial(task, u),
                *dynamics.step(task, state, action),
                dynamics.observe(task, state),
            )
    initial, successor, reward, terminated, observation = results["cpu"]
    expected = results["reference"]
    assert torch.equal(initial, expected[0])
    torch.testing.assert_close(successor, expected[1], rtol=0, atol=TOLERANCE[task.name])
    torch.testing.assert_close(reward, expected[2], rtol=2**-23, atol=0)
    assert torch.equal(terminated, expected[3])
    torch.testing.assert_close(observation, expected[4], rtol=2**-23, atol=2**-23)
    assert successor.dtype == torch.float64
    assert observation.shape == (*copies, task.observation_dim)


@pytest.mark.parametrize(
    "state", [[math.nan, 8, 2, 0], [-1, 8, 2, 0], [4, 8, 2, 0], [0, 49, 2, 0], [0, 8, 6, 0]]
)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_no_state_of_the_maze_reads_no_table_beyond_its_end(backend, state):
    task, there = TASKS["sparse_tickets/Maze-v0"], torch.tensor([[0, 8, 2, 0], state]).double()
    with use_backend(backend):
        successor, reward, terminated = dynamics.step(task, there, torch.tensor([1, 1]))
        observation = dynamics.observe(task, there)
    assert successor[1].isnan().all()
    assert reward[1].isnan()
    assert not terminated[1]
    assert observation[1].isnan().all()
    for mate in (successor[0], reward[0], observation[0]):
        assert not mate.isnan().any()


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_scalars_equal_the_op_and_write_nothing_else(task, generator):
    state, action = states(task, 50, generator), actions(task, 50, generator)
    u = torch.rand(50, task.state_dim, generator=generator)
    expected = dynamics.step(task, state, action)
    for i in range(50):
        row = np.full(task.state_dim + 2, np.nan)
        out = np.full(task.observation_dim + 2, np.nan, np.float32)
        cpu.task_reset(task.id, u[i].numpy(), row[1:-1])
        assert np.array_equal(row[1:-1], dynamics.initial(task, u[i]))
        row[1:-1] = state[i]
        reward, terminated = cpu.task_step(task.id, row[1:-1], float(action[i]))
        cpu.task_observe(task.id, row[1:-1], out[1:-1])
        assert np.array_equal(row[1:-1], expected[0][i])
        assert (reward, terminated) == (expected[1][i].item(), expected[2][i].item())
        assert np.array_equal(out[1:-1], dynamics.observe(task, expected[0][i]))
        assert np.isnan(row[[0, -1]]).all()
        assert np.isnan(out[[0, -1]]).all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_neighbours_and_position_change_no_bit(task, backend, generator):
    """Vectorised sines may differ from scalar ones: a slice anywhere must still agree."""
    state, action = states(task, 203, generator), actions(task, 203, generator)
    with use_backend(backend):
        together = (*dynamics.step(task, state, action), dynamics.observe(task, state))
        for begin, end in ((0, 1), (5, 6), (3, 10), (1, 18), (200, 203), (7, 140)):
            part = (
                *dynamics.step(task, state[begin:end], action[begin:end]),
                dynamics.observe(task, state[begin:end]),
            )
            for alone, all_of_them in zip(part, together, strict=True):
                assert torch.equal(alone, all_of_them[begin:end])


@given(angle=st.floats(-100, 100))
@settings(deadline=None, max_examples=100, derandomize=True)
def test_acrobot_angles_are_wrapped_by_whole_turns(angle):
    wrapped = equations.wrap(torch.tensor(angle, dtype=torch.float64)).item()
    assert abs(wrapped) <= math.pi + 1e-13
    assert wrapped == pytest.approx(math.remainder(angle, 2 * math.pi), abs=1e-13) or (
        abs(abs(wrapped) - math.pi) < 1e-13
    )
    if abs(angle) <= math.pi:
        assert wrapped == angle


def test_acrobot_keeps_its_energy_without_torque():
    """No torque and a small swing: steps of 0.2 s damp it by a few per cent in 20 s."""
    task = TASKS["Acrobot-v1"]

    def energy(state):
        theta1, theta2, rate1, rate2 = state.unbind(-1)
        d1 = 3.5 + theta2.cos()
        d2 = 1.25 + 0.5 * theta2.cos()
        kinetic = 0.5 * d1 * rate1**2 + d2 * rate1 * rate2 + 0.625 * rate2**2
        height = -1.5 * theta1.cos() - 0.5 * (theta1 + theta2).cos()
        return kinetic + 9.8 * height

    state = start = torch.tensor([0.1, -0.05, 0.0, 0.0], dtype=torch.float64)
    for _ in range(100):
        state, _, _ = dynamics.step(task, state, torch.tensor(1))
    lowest = energy(torch.zeros(4, dtype=torch.float64))
    assert (energy(state) - energy(start)).abs() < 0.05 * (energy(start) - lowest)


def test_state_is_not_changed_and_strides_do_not_matter(generator):
    task = TASKS["Pendulum-v1"]
    wide = torch.rand(9, 4, generator=generator).double()
    state, action = wide[:, ::2], torch.rand(3, 9, 1, generator=generator)[1]
    before = wide.clone()
    strided = dynamics.step(task, state, action)
    assert torch.equal(wide, before)
    for got, expected in zip(
        strided, dynamics.step(task, state.clone(), action.clone()), strict=True
    ):
        assert torch.equal(got, expected)


def test_arguments_are_checked():
    task, pendulum = TASKS["Acrobot-v1"], TASKS["Pendulum-v1"]
    state = torch.zeros(2, 4, dtype=torch.float64)
    for bad in (-1, 3):
        with pytest.raises(ValueError, match=r"action must be in \[0, 3\) for Acrobot-v1, got"):
            dynamics.step(task, state, torch.tensor([1, bad]))
    with pytest.raises(TypeError, match="action must be int64"):
        dynamics.step(task, state, torch.zeros(2))
    with pytest.raises(ValueError, match="action must have shape"):
        dynamics.step(task, state, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="action must have shape"):
        dynamics.step(pendulum, state[:, :2], torch.zeros(2))
    with pytest.raises(TypeError, match="state must be float64"):
        dynamics.observe(task, state.float())
    with pytest.raises(ValueError, match="state must have shape"):
        dynamics.observe(pendulum, state)
    with pytest.raises(TypeError, match="u must be float32"):
        dynamics.initial(task, state)
