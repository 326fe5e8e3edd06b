"""The built-in tasks in Numba: scalars on one copy's state, to inline into a fused rollout.

`task_reset`, `task_step` and `task_observe` work in place on 1-D slices and branch on an integer
task id; the batched ops below call them once per copy. The `equations` are everybody's, the maze's
tables those of `maze`. Every copy is computed alone, so its bits depend on nothing beside it.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..compiling import njit
from ..formulas import compile_formulas
from ..threads import count_threads, share
from . import maze
from .equations import CONSTANTS, EQUATIONS
from .reference import ACROBOT, CARTPOLE, MAZE, MOUNTAIN_CAR, TASKS, Task

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


@njit(forceinline=True)
def _clamp(x, low, high):
    return min(max(x, low), high)


@njit(forceinline=True)
def _where(condition, one, other):
    return one if condition else other


@njit(forceinline=True)
def _remainder(x, y):
    return x % y


@njit(forceinline=True)
def _exact(value):
    return value


# Inlined before LLVM sees them, as whole tuples would pass through memory otherwise; so only their
# callers need be kept on disk. No fastmath, which would round otherwise than the others.
_bound = compile_formulas(
    EQUATIONS,
    njit(forceinline=True),
    **CONSTANTS,
    __name__=__name__,
    ceil=np.ceil,
    clamp=_clamp,
    cos=math.cos,
    exact=_exact,
    floor=np.floor,
    remainder=_remainder,
    sin=math.sin,
    where=_where,
)
_cartpole_step, _cartpole_features = _bound["cartpole_step"], _bound["cartpole_features"]
_acrobot_step, _acrobot_features = _bound["acrobot_step"], _bound["acrobot_features"]
_car_step, _car_features = _bound["mountain_car_step"], _bound["mountain_car_features"]
_pendulum_step, _pendulum_features = _bound["pendulum_step"], _bound["pendulum_features"]


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
def _maze_observe(state, out):
    if not _maze_knows(state):
        out[:] = np.float32(math.nan)
        return
    layout = int(state[0])
    for cell in range(_CELLS):
        out[cell] = np.float32(_WALL[layout, cell])
        for channel in range(1, 4):
            out[channel * _CELLS + cell] = np.float32(0.0)
    out[_CELLS + int(state[1])] = np.float32(1.0)
    out[2 * _CELLS + _GOAL[layout]] = np.float32(1.0)
    out[3 * _CELLS + _PATROL[layout, int(state[2])]] = np.float32(1.0)


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
    if task_id == _MAZE:
        return _maze_step(state, action)
    s0, s1 = state[0], state[1]
    if task_id in (_CARTPOLE, _ACROBOT):
        s2, s3 = state[2], state[3]
        if task_id == _CARTPOLE:
            s0, s1, s2, s3, reward, terminated = _cartpole_step(s0, s1, s2, s3, action)
        else:
            s0, s1, s2, s3, reward, terminated = _acrobot_step(s0, s1, s2, s3, action)
        state[2], state[3] = s2, s3
    elif task_id == _MOUNTAIN_CAR:
        s0, s1, reward, terminated = _car_step(s0, s1, action)
    else:
        s0, s1, reward, terminated = _pendulum_step(s0, s1, action)
    state[0], state[1] = s0, s1
    return np.float32(reward), terminated


@njit(cache=True)
def task_observe(task_id, state, out):
    """Write the observation of ``state [S]`` to ``out [D]`` float32."""
    if task_id == _MAZE:
        _maze_observe(state, out)
        return
    s0, s1 = state[0], state[1]
    if task_id == _CARTPOLE:
        out[0], out[1], out[2], out[3] = _cartpole_features(s0, s1, state[2], state[3])
    elif task_id == _ACROBOT:
        out[0], out[1], out[2], out[3], out[4], out[5] = _acrobot_features(
            s0, s1, state[2], state[3]
        )
    elif task_id == _MOUNTAIN_CAR:
        out[0], out[1] = _car_features(s0, s1)
    else:
        out[0], out[1], out[2] = _pendulum_features(s0, s1)


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
