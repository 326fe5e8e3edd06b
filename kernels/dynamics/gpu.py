"""The built-in tasks in Triton: equations on scalars or blocks, to inline into a fused rollout.

`task_initial`, `task_step` and `task_observe` take a copy's state as four float64 values (a task
with two ignores the others) and branch on `Task.id` while compiling. The `equations` are
everybody's: in a kernel that does not fuse a product and a sum into one rounding, results differ
from the reference's only where two libraries' sines and cosines do.

The ops below run a lane per copy. A step moves 16 S + 13 bytes and takes 30 to 500 float64
operations, of which most are inside sines and cosines.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..examples import Example, meta
from ..formulas import compile_formulas
from ..jit import jit_kernel
from . import maze
from .equations import CONSTANTS, EQUATIONS
from .reference import ACROBOT, CARTPOLE, MAZE, MOUNTAIN_CAR, TASKS, Task

_BLOCK = 128

_CARTPOLE = tl.constexpr(CARTPOLE.id)
_ACROBOT = tl.constexpr(ACROBOT.id)
_MOUNTAIN_CAR = tl.constexpr(MOUNTAIN_CAR.id)
_MAZE = tl.constexpr(MAZE.id)
_LOW = tl.constexpr({task.id: task.reset_low for task in TASKS.values()})
_HIGH = tl.constexpr({task.id: task.reset_high for task in TASKS.values()})

_SIZE, _CELLS = tl.constexpr(maze.SIZE), tl.constexpr(maze.CELLS)
_PERIOD, _LAYOUTS = tl.constexpr(maze.PERIOD), tl.constexpr(len(maze.LAYOUTS))
_STEP_COST = tl.constexpr(-maze.STEP_COST)


def _bits(cells: Iterable[int]) -> int:
    return sum(1 << cell for cell in cells)


# A layout's cells as bits of one integer, its patrol as six bits a phase.
_WALLS = tl.constexpr(tuple(_bits(each.walls) for each in maze.LAYOUTS))
_STARTS = tl.constexpr(tuple(_bits(each.starts) for each in maze.LAYOUTS))
_START_COUNT = tl.constexpr(tuple(len(each.starts) for each in maze.LAYOUTS))
_GOAL = tl.constexpr(tuple(each.goal for each in maze.LAYOUTS))
_PATROL = tl.constexpr(
    tuple(sum(cell << 6 * i for i, cell in enumerate(each.patrol)) for each in maze.LAYOUTS)
)


@triton.jit
def _of_layout(layout, VALUES: tl.constexpr):
    """The int64 that belongs to a layout."""
    value = layout * 0
    for i in tl.static_range(_LAYOUTS):
        value = tl.where(layout == i, VALUES[i], value)
    return value


@triton.jit
def _maze_initial(u0, u1, u2):
    layout = (u0.to(tl.float64) * _LAYOUTS).to(tl.int64)
    starts = _of_layout(layout, _STARTS)
    index = (u1.to(tl.float64) * _of_layout(layout, _START_COUNT)).to(tl.int64)
    agent, passed = layout * 0, layout * 0
    for cell in range(_CELLS):
        is_start = (starts >> cell) & 1
        agent = tl.where((is_start == 1) & (passed == index), cell, agent)
        passed += is_start
    phase = (u2.to(tl.float64) * _PERIOD).to(tl.int64)
    zero = u0.to(tl.float64) * 0.0
    return layout.to(tl.float64), agent.to(tl.float64), phase.to(tl.float64), zero


@triton.jit
def _maze_knows(s0, s1, s2):
    layout, cell = (s0 >= 0.0) & (s0 < _LAYOUTS), (s1 >= 0.0) & (s1 < _CELLS)
    return layout & cell & (s2 >= 0.0) & (s2 < _PERIOD)


@triton.jit
def _maze_step(s0, s1, s2, action):
    known = _maze_knows(s0, s1, s2)
    layout, agent, phase = s0.to(tl.int64), s1.to(tl.int64), s2.to(tl.int64)
    # Stay, up, right, down, left.
    row = agent // _SIZE + tl.where(action == 3.0, 1, tl.where(action == 1.0, -1, 0))
    column = agent % _SIZE + tl.where(action == 2.0, 1, tl.where(action == 4.0, -1, 0))
    inside = (row >= 0) & (row < _SIZE) & (column >= 0) & (column < _SIZE)
    there = tl.where(inside, row * _SIZE + column, agent)
    walls, patrol = _of_layout(layout, _WALLS), _of_layout(layout, _PATROL)
    there = tl.where(((walls >> there) & 1) == 1, agent, there)
    following = (phase + 1) % _PERIOD
    enemy, comes = (patrol >> 6 * phase) & 63, (patrol >> 6 * following) & 63
    reached = there == _of_layout(layout, _GOAL)
    caught = (there == comes) | ((there == enemy) & (agent == comes))
    reward = tl.where(reached, 1.0, tl.where(caught, -1.0, _STEP_COST))
    # No state of the maze leads to NaN.
    nan = tl.where(known, 0.0, float("nan"))
    there, following = there.to(tl.float64) + nan, following.to(tl.float64) + nan
    return s0 + nan, there, following, nan, reward + nan, (reached | caught) & known


@triton.jit
def _maze_observe(s0, s1, s2, feature):
    layout, agent, phase = s0.to(tl.int64), s1.to(tl.int64), s2.to(tl.int64)
    # A loop that is unrolled counts in Python.
    feature = feature + layout * 0
    channel, cell = feature // _CELLS, feature % _CELLS
    enemy = (_of_layout(layout, _PATROL) >> 6 * phase) & 63
    wall = ((_of_layout(layout, _WALLS) >> cell) & 1) == 1
    place = tl.where(channel == 1, agent, tl.where(channel == 2, _of_layout(layout, _GOAL), enemy))
    shown = tl.where(channel == 0, wall, (cell == place) & (channel < 4))
    return tl.where(_maze_knows(s0, s1, s2), tl.where(shown, 1.0, 0.0), float("nan"))


@triton.jit
def _between(u, TASK: tl.constexpr, COMPONENT: tl.constexpr):
    low: tl.constexpr = _LOW[TASK][COMPONENT]
    span: tl.constexpr = _HIGH[TASK][COMPONENT] - low
    return low + span * u.to(tl.float64)


@triton.jit
def _exact(value: tl.constexpr):
    # Triton rounds a literal to float32 where it is compared, and in tl.fma; elsewhere it does not.
    return tl.full([], value, tl.float64)


@triton.jit
def _clamp(x, low: tl.constexpr, high: tl.constexpr):
    # Unlike tl.clamp, and like torch's, this keeps a NaN.
    return tl.where(x < _exact(low), low, tl.where(x > _exact(high), high, x))


@triton.jit
def _remainder(x, y: tl.constexpr):
    # As torch's: the fused remainder is exact, and below zero where x was negative or its quotient
    # was rounded up to a whole number.
    quotient = x / y
    turns = tl.where(quotient < 0.0, tl.ceil(quotient), tl.floor(quotient))
    rest = tl.fma(-turns, _exact(y), x)
    return tl.where(rest < 0.0, rest + y, rest)


# Triton's own functions are looked up in `tl` at every call: the interpreter puts others there.


@triton.jit
def _ceil(x):
    return tl.ceil(x)


@triton.jit
def _cos(x):
    return tl.cos(x)


@triton.jit
def _floor(x):
    return tl.floor(x)


@triton.jit
def _sin(x):
    return tl.sin(x)


@triton.jit
def _where(condition, one, other):
    return tl.where(condition, one, other)


_bound = compile_formulas(
    EQUATIONS,
    triton.jit,
    **{name: tl.constexpr(value) for name, value in CONSTANTS.items()},
    __name__=__name__,
    ceil=_ceil,
    clamp=_clamp,
    cos=_cos,
    exact=_exact,
    floor=_floor,
    remainder=_remainder,
    sin=_sin,
    tl=tl,
    where=_where,
)
_cartpole_step, _cartpole_features = _bound["cartpole_step"], _bound["cartpole_features"]
_acrobot_step, _acrobot_features = _bound["acrobot_step"], _bound["acrobot_features"]
_car_step, _car_features = _bound["mountain_car_step"], _bound["mountain_car_features"]
_pendulum_step, _pendulum_features = _bound["pendulum_step"], _bound["pendulum_features"]


@triton.jit
def task_initial(TASK: tl.constexpr, u0, u1, u2, u3):
    """Initial state of four float32 uniforms, of which a task of two components ignores two."""
    if TASK == _MAZE:
        s0, s1, s2, s3 = _maze_initial(u0, u1, u2)
        return s0, s1, s2, s3
    s0, s1 = _between(u0, TASK, 0), _between(u1, TASK, 1)
    s2, s3 = s0, s1
    if len(_LOW[TASK]) == 4:
        s2, s3 = _between(u2, TASK, 2), _between(u3, TASK, 3)
    return s0, s1, s2, s3


@triton.jit
def task_step(TASK: tl.constexpr, s0, s1, s2, s3, action):
    """One step of ``action``, the float64 of an index or of a torque.

    Returns the four values of the next state, a float32 reward and whether the task ended.
    """
    if TASK == _CARTPOLE:
        s0, s1, s2, s3, reward, terminated = _cartpole_step(s0, s1, s2, s3, action)
    elif TASK == _ACROBOT:
        s0, s1, s2, s3, reward, terminated = _acrobot_step(s0, s1, s2, s3, action)
    elif TASK == _MOUNTAIN_CAR:
        s0, s1, reward, terminated = _car_step(s0, s1, action)
    elif TASK == _MAZE:
        s0, s1, s2, s3, reward, terminated = _maze_step(s0, s1, s2, action)
    else:
        s0, s1, reward, terminated = _pendulum_step(s0, s1, action)
    return s0, s1, s2, s3, reward.to(tl.float32), terminated


@triton.jit
def task_observe(TASK: tl.constexpr, s0, s1, s2, s3, feature):
    """Entry ``feature`` of the observation, float32; 0 beyond its end.

    Where ``feature`` is a block whose entries the compiler knows, nothing is computed twice.
    """
    if TASK == _MAZE:
        return _maze_observe(s0, s1, s2, feature)
    if TASK == _ACROBOT:
        seen = _acrobot_features(s0, s1, s2, s3)
    elif TASK == _CARTPOLE:
        seen = _cartpole_features(s0, s1, s2, s3)
    elif TASK == _MOUNTAIN_CAR:
        seen = _car_features(s0, s1)
    else:
        seen = _pendulum_features(s0, s1)
    value = tl.zeros_like(s0)
    for i in tl.static_range(len(seen)):
        value = tl.where(feature == i, seen[i], value)
    return value.to(tl.float32)


@triton.jit
def load_state(state, inside, SIZE: tl.constexpr):
    """Four float64 values of the state at ``state``; one of two components fills up with them."""
    s0 = tl.load(state, mask=inside)
    s1 = tl.load(state + 1, mask=inside)
    s2, s3 = s0, s1
    if SIZE == 4:
        s2 = tl.load(state + 2, mask=inside)
        s3 = tl.load(state + 3, mask=inside)
    return s0, s1, s2, s3


@triton.jit
def store_state(state, s0, s1, s2, s3, inside, SIZE: tl.constexpr):
    """Inverse of `load_state`."""
    tl.store(state, s0, mask=inside)
    tl.store(state + 1, s1, mask=inside)
    if SIZE == 4:
        tl.store(state + 2, s2, mask=inside)
        tl.store(state + 3, s3, mask=inside)


@jit_kernel(fp_fusion=False)
def _initial_kernel(u, state, copies, TASK: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    copy = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = copy < copies
    u0, u1, u2, u3 = load_state(u + copy * SIZE, inside, SIZE)
    s0, s1, s2, s3 = task_initial(TASK, u0, u1, u2, u3)
    store_state(state + copy * SIZE, s0, s1, s2, s3, inside, SIZE)


@jit_kernel(fp_fusion=False)
def _step_kernel(
    state,  # [copies, SIZE]
    action,  # [copies]
    successor,  # [copies, SIZE], written
    reward,  # [copies], written, as the next
    terminated,
    copies,
    TASK: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    copy = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = copy < copies
    s0, s1, s2, s3 = load_state(state + copy * SIZE, inside, SIZE)
    chosen = tl.load(action + copy, mask=inside, other=0).to(tl.float64)
    s0, s1, s2, s3, gain, ended = task_step(TASK, s0, s1, s2, s3, chosen)
    store_state(successor + copy * SIZE, s0, s1, s2, s3, inside, SIZE)
    tl.store(reward + copy, gain, mask=inside)
    tl.store(terminated + copy, ended, mask=inside)


@jit_kernel(fp_fusion=False)
def _observe_kernel(
    state,  # [copies, SIZE]
    observation,  # [copies, FEATURES], written
    copies,
    TASK: tl.constexpr,
    SIZE: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    copy = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = copy < copies
    s0, s1, s2, s3 = load_state(state + copy * SIZE, inside, SIZE)
    for feature in tl.static_range(FEATURES):
        value = task_observe(TASK, s0, s1, s2, s3, feature)
        tl.store(observation + copy * FEATURES + feature, value, mask=inside)


def _launch(
    kernel: Any, task: Task, tensors: tuple[Tensor, ...], copies: int, **constexprs: int
) -> None:
    if not copies:
        return
    with torch.cuda.device_of(tensors[0]):
        kernel[(triton.cdiv(copies, _BLOCK),)](
            *tensors,
            copies,
            TASK=task.id,
            SIZE=task.state_dim,
            BLOCK=_BLOCK,
            **constexprs,
        )


def initial(task: Task, u: Tensor) -> Tensor:
    """See `sparse_tickets.kernels.dynamics.initial`."""
    state = torch.empty(u.shape, dtype=torch.float64, device=u.device)
    _launch(_initial_kernel, task, (u.contiguous(), state), u.shape[:-1].numel())
    return state


def step(task: Task, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `sparse_tickets.kernels.dynamics.step`."""
    shape = state.shape[:-1]
    successor = torch.empty(state.shape, dtype=torch.float64, device=state.device)
    reward = torch.empty(shape, dtype=torch.float32, device=state.device)
    terminated = torch.empty(shape, dtype=torch.bool, device=state.device)
    tensors = (state.contiguous(), action.contiguous(), successor, reward, terminated)
    _launch(_step_kernel, task, tensors, shape.numel())
    return successor, reward, terminated


def observe(task: Task, state: Tensor) -> Tensor:
    """See `sparse_tickets.kernels.dynamics.observe`."""
    shape = (*state.shape[:-1], task.observation_dim)
    observation = torch.empty(shape, dtype=torch.float32, device=state.device)
    _launch(
        _observe_kernel,
        task,
        (state.contiguous(), observation),
        state.shape[:-1].numel(),
        FEATURES=task.observation_dim,
    )
    return observation


def _example(task: Task) -> None:
    state = meta(5, task.state_dim, dtype=torch.float64)
    initial(task, meta(5, task.state_dim))
    step(task, state, meta(5, dtype=torch.int64) if task.discrete else meta(5, task.action_dim))
    observe(task, state)


EXAMPLES = [
    Example(name.rpartition("/")[2].partition("-")[0].lower(), partial(_example, task))
    for name, task in TASKS.items()
]
