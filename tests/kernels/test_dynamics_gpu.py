"""The Triton physics against the reference, in the interpreter; what it costs, counted by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_tickets.kernels import dynamics
from sparse_tickets.kernels.dispatch import use_backend
from sparse_tickets.kernels.dynamics import TASKS

pytest.importorskip("triton")

from sparse_tickets.kernels.dynamics import gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Two libraries' sines; Acrobot's four Runge-Kutta stages amplify the last place by some hundreds.
TOLERANCE = {"CartPole-v1": 1e-14, "Acrobot-v1": 1e-11, "MountainCar-v0": 1e-15}
TOLERANCE |= {"Pendulum-v1": 1e-14, "sparse_tickets/Maze-v0": 0}
HIGH = {
    "CartPole-v1": (2.6, 4.0, 0.25, 4.0),
    "Acrobot-v1": (math.pi, math.pi, 4 * math.pi, 9 * math.pi),
    "MountainCar-v0": (1.3, 0.07),
    "Pendulum-v1": (20.0, 8.0),
    "sparse_tickets/Maze-v0": TASKS["sparse_tickets/Maze-v0"].reset_high,
}
ALL = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def scaled(task, state):
    """States of numbers in [-1, 1]."""
    state = state * torch.tensor(HIGH[task.name], dtype=torch.float64)
    return state.abs().round() if "Maze" in task.name else state


def draw(task, *copies):
    """States all over the reachable region and beyond its edges, and actions."""
    generator = torch.Generator().manual_seed(len(copies))
    state = torch.rand(*copies, task.state_dim, generator=generator).double() * 2 - 1
    state = scaled(task, state)
    if task.discrete:
        action = torch.randint(task.action_dim, copies, generator=generator)
    else:
        action = torch.randn(*copies, task.action_dim, generator=generator) * 2
    return state.to(DEVICE), action.to(DEVICE)


def assert_step(task, state, action, backend="triton"):
    before = state.clone()
    with use_backend(backend):
        successor, reward, terminated = dynamics.step(task, state, action)
        observation = dynamics.observe(task, state)
    assert torch.equal(state, before)
    expected = task.step(state, action)
    assert successor.dtype == torch.float64
    torch.testing.assert_close(successor, expected[0], rtol=0, atol=TOLERANCE[task.name])
    torch.testing.assert_close(reward, expected[1], rtol=2**-23, atol=0)
    assert torch.equal(terminated, expected[2])
    torch.testing.assert_close(observation, task.observe(state), rtol=2**-23, atol=2**-23)


@ALL
@pytest.mark.parametrize("copies", [(), (1,), (300,), (3, 5), (0,)], ids=str)
def test_steps_equal_the_reference(task, copies):
    assert_step(task, *draw(task, *copies))


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@ALL
@settings(deadline=None, max_examples=4, derandomize=True)
@given(data=st.data())
def test_a_step_from_any_state(task, backend, data):
    """Edges and zeros among them, which uniform numbers never hit."""
    number = st.one_of(st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0]), st.floats(-1, 1))
    copies = data.draw(st.integers(0, 5))
    numbers = [[data.draw(number) for _ in range(task.state_dim)] for _ in range(copies)]
    state = torch.tensor(numbers, dtype=torch.float64).reshape(copies, task.state_dim)
    _, action = draw(task, copies)
    device = DEVICE if backend == "triton" else "cpu"
    state = scaled(task, state)
    assert_step(task, state.to(device), action.to(device), backend)


@ALL
def test_initial_states_equal_the_reference_bit_for_bit(task):
    u = torch.rand(7, 3, task.state_dim, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    with use_backend("triton"):
        state = dynamics.initial(task, u)
    assert torch.equal(state, task.initial(u))


def test_bounds_are_exact_in_float64():
    """Triton compares with a literal rounded to float32, by which all of these would go wrong."""
    cartpole, car = TASKS["CartPole-v1"], TASKS["MountainCar-v0"]
    limit = 12 * 2 * math.pi / 360
    edges = [
        math.nextafter(bound, target) for bound in (2.4, -2.4) for target in (-math.inf, math.inf)
    ]
    state = torch.zeros(8, 4, dtype=torch.float64)
    state[:4, 0] = torch.tensor(edges, dtype=torch.float64)
    angles = [math.nextafter(limit, 0), math.nextafter(limit, 1), limit, -limit]
    state[4:, 2] = torch.tensor(angles, dtype=torch.float64)
    assert_step(cartpole, state.to(DEVICE), torch.zeros(8, dtype=torch.int64, device=DEVICE))
    places = [[-1.19, -0.07], [-1.2, -0.01], [0.59, 0.07], [0.5, 0.0], [-1.0, 0.07], [0.0, -0.07]]
    wall, action = torch.tensor(places, dtype=torch.float64), torch.tensor([0, 0, 2, 1, 2, 0])
    assert_step(car, wall.to(DEVICE), action.to(DEVICE))
    with use_backend("triton"):
        successor, _, _ = dynamics.step(car, wall.to(DEVICE), action.to(DEVICE))
    assert successor[:2].tolist() == [[-1.2, 0.0], [-1.2, 0.0]]
    assert successor[4, 1].item() == 0.07


def test_pendulum_angles_beyond_a_turn():
    turn = 2 * math.pi
    whole = [k * math.pi for k in (-29, -3, -1, 0, 1, 3, 27)]
    beside = [math.nextafter(x, y) for x in whole for y in (-math.inf, math.inf)]
    state = torch.tensor([[x, 0.5] for x in (*whole, *beside, turn, -turn)], dtype=torch.float64)
    action = torch.zeros(len(state), 1)
    assert_step(TASKS["Pendulum-v1"], state.to(DEVICE), action.to(DEVICE))


@ALL
def test_strides_and_neighbours_change_no_bit(task):
    state, action = draw(task, 260)
    wide = torch.full((260, 2 * task.state_dim), math.nan, dtype=torch.float64, device=DEVICE)
    wide[:, ::2] = state
    together = gpu.step(task, state, action)
    for alone, everyone in zip(gpu.step(task, wide[:, ::2], action), together, strict=True):
        assert torch.equal(alone, everyone)
    for alone, everyone in zip(gpu.step(task, state[5:7], action[5:7]), together, strict=True):
        assert torch.equal(alone, everyone[5:7])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@ALL
def test_a_diverged_copy_stays_alone(task):
    state, action = draw(task, 5)
    state[2] = math.nan
    successor, reward, _ = gpu.step(task, state, action)
    expected = task.step(state, action)
    assert successor[2].isnan().any()
    torch.testing.assert_close(successor, expected[0], rtol=0, atol=1e-11, equal_nan=True)
    torch.testing.assert_close(reward, expected[1], equal_nan=True)


class _Counter(TorchDispatchMode):
    """Counts the arithmetic that a reference does on one copy."""

    COUNTED = frozenset(("add", "sub", "rsub", "mul", "div", "remainder", "sin", "cos"))

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.__name__.partition(".")[0] in self.COUNTED and out.is_floating_point():
            self.count += out.numel()
        return out
