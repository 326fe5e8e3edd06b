"""The built-in tasks in Numba: scalars on one copy's state, to inline into a fused rollout.

`task_reset`, `task_step` and `task_observe` work in place on 1-D slices and branch on an integer
task id; the batched ops below call them once per copy. Same equations as `reference`, operation
by operation, in float64. Every copy is computed alone, so its bits depend on nothing beside it.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..compiling import njit
from ..threads import count_threads, share
from . import maze
from .reference import ACROBOT, CARTPOLE, MAZE, MOUNTAIN_CAR, TASKS, Task

__all__ = ["initial", "observe", "step", "task_observe", "task_reset", "task_step"]

_CARTPOLE, _ACROBOT, _MOUNTAIN_CAR = CARTPOLE.id, ACROBOT.id, MOUNTAIN_CAR.id
_MAZE = MAZE.id
_STATE_DIM = np.array([task.state_dim for task in TASKS.values()])
_RESET_LOW = np.zeros((len(TASKS), _STATE_DIM.max()))
_RESET_SPAN = np.zeros_like(_RESET_LOW)
for _task in TASKS.values():
    _low, _high = np.array(_task.reset_low), np.array(_task.reset_high)
    _RESET_LOW[_task.id, : _task.state_dim] = _low
    _RESET_SPAN[_task.id, : _task.state_dim] = _high - _low
_SIZE, _CELLS, _PERIOD, _LAYOUTS = maze.SIZE, maze.CELLS, maze.PERIOD, len(maze.LAYOUTS)
_STEP_COST = np.float32(-maze.STEP_COST)
_WALL, _GOAL, _PATROL, _STARTS, _START_COUNT, _MOVES = (
    table.numpy() for table in maze.tables(torch.device("cpu"))
)
_ANGLE_LIMIT = 12 * 2 * math.pi / 360
_TURN = 2 * math.pi
_COPIES_PER_CHUNK = 256
# Work per copy, in the units of `count_threads`.
_WORK = 1024


@njit(cache=True)
def task_reset(task_id, u, state):
    """Write the initial state of uniforms ``u [S]`` to ``state [S]``."""
    if task_id == _MAZE:
        layout = int(np.float64(u[0]) * _LAYOUTS)
        state[0] = layout
        state[1] = _STARTS[layout, int(np.float64(u[1]) * _START_COUNT[layout])]
        state[2] = int(np.float64(u[2]) * _PERIOD)
        state[3] = 0.0
        return
    for i in range(_STATE_DIM[task_id]):
        state[i] = _RESET_LOW[task_id, i] + _RESET_SPAN[task_id, i] * np.float64(u[i])


@njit(cache=True, forceinline=True)
def _clamp(x, low, high):
    return min(max(x, low), high)


@njit(cache=True)
def _cartpole_step(state, action):
    x, x_dot, theta, theta_dot = state[0], state[1], state[2], state[3]
    force = 10.0 if action == 1.0 else -10.0
    cos, sin = math.cos(theta), math.sin(theta)
    push = (force + 0.05 * (theta_dot * theta_dot) * sin) / 1.1
    theta_acc = (9.8 * sin - cos * push) / (0.5 * (4.0 / 3.0 - 0.1 * (cos * cos) / 1.1))
    x_acc = push - 0.05 * theta_acc * cos / 1.1
    state[0] = x + 0.02 * x_dot
    state[1] = x_dot + 0.02 * x_acc
    state[2] = theta + 0.02 * theta_dot
    state[3] = theta_dot + 0.02 * theta_acc
    terminated = abs(state[0]) > 2.4 or abs(state[2]) > _ANGLE_LIMIT
    return np.float32(1.0), terminated


@njit(cache=True)
def _acrobot_accelerations(theta1, theta2, rate1, rate2, torque):
    cos2, sin2 = math.cos(theta2), math.sin(theta2)
    d1 = 0.25 + (1.25 + cos2) + 2.0
    d2 = (0.25 + 0.5 * cos2) + 1.0
    phi2 = 0.5 * 9.8 * math.cos(theta1 + theta2 - math.pi / 2)
    phi1 = (
        -0.5 * (rate2 * rate2) * sin2
        - rate2 * rate1 * sin2
        + 1.5 * 9.8 * math.cos(theta1 - math.pi / 2)
        + phi2
    )
    acc2 = (torque + d2 / d1 * phi1 - 0.5 * (rate1 * rate1) * sin2 - phi2) / (1.25 - d2 * d2 / d1)
    return -(d2 * acc2 + phi1) / d1, acc2


@njit(cache=True, forceinline=True)
def _wrap(angle):
    above = max(math.ceil((angle - math.pi) / _TURN), 0.0)
    below = min(math.floor((angle + math.pi) / _TURN), 0.0)
    return angle - (above + below) * _TURN


@njit(cache=True)
def _acrobot_step(state, action):
    torque = action - 1.0
    a, b, c, d = state[0], state[1], state[2], state[3]
    c1, d1 = _acrobot_accelerations(a, b, c, d, torque)
    a2, b2 = c + 0.1 * c1, d + 0.1 * d1
    c2, d2 = _acrobot_accelerations(a + 0.1 * c, b + 0.1 * d, a2, b2, torque)
    a3, b3 = c + 0.1 * c2, d + 0.1 * d2
    c3, d3 = _acrobot_accelerations(a + 0.1 * a2, b + 0.1 * b2, a3, b3, torque)
    a4, b4 = c + 0.2 * c3, d + 0.2 * d3
    c4, d4 = _acrobot_accelerations(a + 0.2 * a3, b + 0.2 * b3, a4, b4, torque)
    sixth = 0.2 / 6.0
    state[0] = _wrap(a + sixth * (c + 2.0 * a2 + 2.0 * a3 + a4))
    state[1] = _wrap(b + sixth * (d + 2.0 * b2 + 2.0 * b3 + b4))
    state[2] = _clamp(c + sixth * (c1 + 2.0 * c2 + 2.0 * c3 + c4), -4 * math.pi, 4 * math.pi)
    state[3] = _clamp(d + sixth * (d1 + 2.0 * d2 + 2.0 * d3 + d4), -9 * math.pi, 9 * math.pi)
    terminated = -math.cos(state[0]) - math.cos(state[1] + state[0]) > 1.0
    return np.float32(0.0) if terminated else np.float32(-1.0), terminated


@njit(cache=True)
def _mountain_car_step(state, action):
    velocity = state[1] + ((action - 1.0) * 0.001 + math.cos(3.0 * state[0]) * -0.0025)
    velocity = _clamp(velocity, -0.07, 0.07)
    position = _clamp(state[0] + velocity, -1.2, 0.6)
    if position == -1.2 and velocity < 0.0:
        velocity = 0.0
    state[0] = position
    state[1] = velocity
    return np.float32(-1.0), position >= 0.5 and velocity >= 0.0


@njit(cache=True)
def _pendulum_step(state, action):
    theta, theta_dot = state[0], state[1]
    torque = _clamp(action, -2.0, 2.0)
    angle = (theta + math.pi) % _TURN - math.pi
    cost = angle * angle + 0.1 * (theta_dot * theta_dot) + 0.001 * (torque * torque)
    theta_dot = _clamp(theta_dot + (15.0 * math.sin(theta) + 3.0 * torque) * 0.05, -8.0, 8.0)
    state[0] = theta + theta_dot * 0.05
    state[1] = theta_dot
    return np.float32(-cost), False


@njit(cache=True)
def _maze_knows(state):
    layout, cell = 0.0 <= state[0] < _LAYOUTS, 0.0 <= state[1] < _CELLS
    return layout and cell and 0.0 <= state[2] < _PERIOD


@njit(cache=True)
def _maze_step(state, action):
    if not _maze_knows(state):  # which would be read beyond the tables
        state[:] = math.nan
        return np.float32(math.nan), False
    layout, agent, phase = int(state[0]), int(state[1]), int(state[2])
    row = agent // _SIZE + _MOVES[int(action), 0]
    column = agent % _SIZE + _MOVES[int(action), 1]
    there = agent
    if 0 <= row < _SIZE and 0 <= column < _SIZE and not _WALL[layout, row * _SIZE + column]:
        there = row * _SIZE + column
    following = (phase + 1) % _PERIOD
    enemy, comes = _PATROL[layout, phase], _PATROL[layout, following]
    state[1] = there
    state[2] = following
    state[3] = 0.0
    if there == _GOAL[layout]:
        return np.float32(1.0), True
    if there == comes or (there == enemy and agent == comes):
        return np.float32(-1.0), True
    return _STEP_COST, False


@njit(cache=True)
def task_step(task_id, state, action):
    """Advance ``state [S]`` in place by one step.

    Args:
        task_id: `Task.id`.
        state: ``[S]`` float64.
        action: float64, the action's index or its one component.

    Returns:
        ``(reward float32, terminated bool)``.
    """
    if task_id == _CARTPOLE:
        return _cartpole_step(state, action)
    if task_id == _ACROBOT:
        return _acrobot_step(state, action)
    if task_id == _MOUNTAIN_CAR:
        return _mountain_car_step(state, action)
    if task_id == _MAZE:
        return _maze_step(state, action)
    return _pendulum_step(state, action)


@njit(cache=True)
def task_observe(task_id, state, out):
    """Write the observation of ``state [S]`` to ``out [D]`` float32."""
    if task_id == _CARTPOLE:
        for i in range(4):
            out[i] = np.float32(state[i])
    elif task_id == _ACROBOT:
        out[0] = np.float32(math.cos(state[0]))
        out[1] = np.float32(math.sin(state[0]))
        out[2] = np.float32(math.cos(state[1]))
        out[3] = np.float32(math.sin(state[1]))
        out[4] = np.float32(state[2])
        out[5] = np.float32(state[3])
    elif task_id == _MOUNTAIN_CAR:
        out[0] = np.float32(state[0])
        out[1] = np.float32(state[1])
    elif task_id == _MAZE and not _maze_knows(state):
        out[:] = np.float32(math.nan)
    elif task_id == _MAZE:
        layout = int(state[0])
        for cell in range(_CELLS):
            out[cell] = np.float32(_WALL[layout, cell])
            for channel in range(1, 4):
                out[channel * _CELLS + cell] = np.float32(0.0)
        out[_CELLS + int(state[1])] = np.float32(1.0)
        out[2 * _CELLS + _GOAL[layout]] = np.float32(1.0)
        out[3 * _CELLS + _PATROL[layout, int(state[2])]] = np.float32(1.0)
    else:
        out[0] = np.float32(math.cos(state[0]))
        out[1] = np.float32(math.sin(state[0]))
        out[2] = np.float32(state[1])


@njit(cache=True)
def _copies(chunk, copies):
    begin = chunk * _COPIES_PER_CHUNK
    return range(begin, min(begin + _COPIES_PER_CHUNK, copies))


@njit(cache=True)
def _initial_chunk(thread, chunk, task_id, u, state):
    for copy in _copies(chunk, state.shape[0]):
        task_reset(task_id, u[copy], state[copy])


@njit(cache=True, nogil=True)
def _initial(threads, chunks, task_id, u, state):
    share(_initial_chunk, threads, chunks, (task_id, u, state))


@njit(cache=True)
def _step_chunk(thread, chunk, task_id, state, action, reward, terminated):
    for copy in _copies(chunk, state.shape[0]):
        reward[copy], terminated[copy] = task_step(task_id, state[copy], np.float64(action[copy]))


@njit(cache=True, nogil=True)
def _step(threads, chunks, task_id, state, action, reward, terminated):
    share(_step_chunk, threads, chunks, (task_id, state, action, reward, terminated))


@njit(cache=True)
def _observe_chunk(thread, chunk, task_id, state, out):
    for copy in _copies(chunk, state.shape[0]):
        task_observe(task_id, state[copy], out[copy])


@njit(cache=True, nogil=True)
def _observe(threads, chunks, task_id, state, out):
    share(_observe_chunk, threads, chunks, (task_id, state, out))


def initial(task: Task, u: Tensor) -> Tensor:
    """See `sparse_tickets.kernels.dynamics.initial`."""
    state = torch.empty(u.shape, dtype=torch.float64, device="cpu")
    _initial(*_launch(state), task.id, _rows(u), _rows(state))
    return state


def step(task: Task, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `sparse_tickets.kernels.dynamics.step`."""
    successor = state.clone(memory_format=torch.contiguous_format)
    reward = torch.empty(state.shape[:-1], dtype=torch.float32, device="cpu")
    terminated = torch.empty(state.shape[:-1], dtype=torch.bool, device="cpu")
    _step(
        *_launch(state),
        task.id,
        _rows(successor),
        action.contiguous().view(-1).numpy(),
        reward.view(-1).numpy(),
        terminated.view(-1).numpy(),
    )
    return successor, reward, terminated


def observe(task: Task, state: Tensor) -> Tensor:
    """See `sparse_tickets.kernels.dynamics.observe`."""
    out = torch.empty((*state.shape[:-1], task.observation_dim), dtype=torch.float32, device="cpu")
    _observe(*_launch(state), task.id, _rows(state), _rows(out))
    return out


def _launch(state: Tensor) -> tuple[int, int]:
    """Threads and chunks."""
    copies = math.prod(state.shape[:-1])
    chunks = -(-copies // _COPIES_PER_CHUNK)
    return count_threads(chunks, _WORK * copies), chunks


def _rows(tensor: Tensor) -> np.ndarray:
    return tensor.contiguous().view(-1, tensor.shape[-1]).numpy()
