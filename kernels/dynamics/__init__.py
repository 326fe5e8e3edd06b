"""Built-in tasks as pure functions: `initial`, `step` and `observe` on float64 states.

CPU tensors go through Numba, one copy at a time, CUDA tensors through Triton, a lane per copy: a
copy's bits depend on nothing beside it. All results are constants to autograd.

The physics is gymnasium's in float64 throughout. gymnasium itself drops to float32 in two places:
Acrobot's initial state, and Pendulum's torque terms when the action is a float32 array.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..dispatch import implementation
from ..errors import check_tensor, check_untransformed, has_data
from ..registration import declare
from .reference import TASKS, Task

__all__ = ["TASKS", "Task", "check_task", "initial", "observe", "step"]


def initial(task: Task, u: Tensor) -> Tensor:
    """Initial states: uniform between the task's reset bounds, the maze's as `maze` says.

    Args:
        task: one of `TASKS`.
        u: ``[..., S]`` float32 uniforms in ``[0, 1)``.

    Returns:
        ``[..., S]`` float64: low + (high - low) u, or the maze's.

    Raises:
        TypeError: `u` is not float32.
        ValueError: its last size is not the task's `state_dim`, or another task.
    """
    check_task(task)
    check_untransformed("initial")
    return torch.ops.sparse_tickets.dynamics_initial(u.detach(), task.name)


def step(task: Task, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One step of every copy, as gymnasium's ``step`` without the time limit.

    Args:
        task: one of `TASKS`.
        state: ``[..., S]`` float64; not changed.
        action: ``[...]`` int64 if the task is discrete, else ``[..., A]`` float32, clipped to the
            task's bounds.

    Returns:
        ``(state [..., S] float64, reward [...] float32, terminated [...] bool)``.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong task, shape or device, or an action outside ``[0, n)`` (looked at on CPU
            tensors only: on a GPU that would wait for it).
    """
    check_task(task)
    check_untransformed("step")
    return torch.ops.sparse_tickets.dynamics_step(state.detach(), action.detach(), task.name)


def observe(task: Task, state: Tensor) -> Tensor:
    """What a policy sees of each copy, before any normalisation.

    Args:
        task: one of `TASKS`.
        state: ``[..., S]`` float64.

    Returns:
        ``[..., D]`` float32.

    Raises:
        TypeError: `state` is not float64.
        ValueError: its last size is not the task's `state_dim`, or another task.
    """
    check_task(task)
    check_untransformed("observe")
    return torch.ops.sparse_tickets.dynamics_observe(state.detach(), task.name)


def check_task(task: Task) -> None:
    """Raise ``ValueError`` unless ``task`` is one of `TASKS`, of which the kernels know by name.

    A time limit of its own is allowed: it is the environment's, not the physics'.
    """
    known = TASKS.get(task.name)
    if known is not task and (known is None or replace(known, time_limit=task.time_limit) != task):
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got another {task.name}")


# Whoever calls an op by its name has passed no other check; kernels read memory by these shapes.


def _find_task(name: str) -> Task:
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    return TASKS[name]


def _check_initial(u: Tensor, task: Task) -> None:
    check_tensor("u", u, (*u.shape[:-1], task.state_dim), torch.float32, like=u)


def _check_state(state: Tensor, task: Task) -> None:
    shape = (*state.shape[:-1], task.state_dim)
    check_tensor("state", state, shape, torch.float64, like=state)


def _check_step(state: Tensor, action: Tensor, task: Task) -> None:
    _check_state(state, task)
    copies = state.shape[:-1]
    if task.discrete:
        check_tensor("action", action, copies, torch.int64, like=state)
    else:
        check_tensor("action", action, (*copies, task.action_dim), torch.float32, like=state)
    if task.discrete and action.is_cpu and has_data(action) and action.numel():
        low, high = (int(bound) for bound in action.aminmax())
        if low < 0 or high >= task.action_dim:
            raise ValueError(
                f"action must be in [0, {task.action_dim}) for {task.name}, "
                f"got {low if low < 0 else high}"
            )


def _initial(u: Tensor, task: str) -> Tensor:
    found = _find_task(task)
    _check_initial(u, found)
    return implementation(__name__, u.device).initial(found, u)


def _step(state: Tensor, action: Tensor, task: str) -> tuple[Tensor, Tensor, Tensor]:
    found = _find_task(task)
    _check_step(state, action, found)
    return implementation(__name__, state.device).step(found, state, action)


def _observe(state: Tensor, task: str) -> Tensor:
    found = _find_task(task)
    _check_state(state, found)
    return implementation(__name__, state.device).observe(found, state)


def _initial_fake(u: Tensor, task: str) -> Tensor:
    _check_initial(u, _find_task(task))
    return u.new_empty(u.shape, dtype=torch.float64)


def _step_fake(state: Tensor, action: Tensor, task: str) -> tuple[Tensor, Tensor, Tensor]:
    _check_step(state, action, _find_task(task))
    copies = state.shape[:-1]
    reward = state.new_empty(copies, dtype=torch.float32)
    return state.new_empty(state.shape), reward, state.new_empty(copies, dtype=torch.bool)


def _observe_fake(state: Tensor, task: str) -> Tensor:
    found = _find_task(task)
    _check_state(state, found)
    return state.new_empty((*state.shape[:-1], found.observation_dim), dtype=torch.float32)


declare("dynamics_initial", _initial, _initial_fake)
declare("dynamics_step", _step, _step_fake)
declare("dynamics_observe", _observe, _observe_fake)
