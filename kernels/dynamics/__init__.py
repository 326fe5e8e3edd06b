"""Classic control as pure functions: `initial`, `step` and `observe` on float64 states.

CPU tensors go through Numba, one copy at a time, CUDA tensors through Triton, a lane per copy: a
copy's bits depend on nothing beside it. All results are constants to autograd.

The physics is gymnasium's in float64 throughout. gymnasium itself drops to float32 in two places:
Acrobot's initial state, and Pendulum's torque terms when the action is a float32 array.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..dispatch import resolve_backend
from ..errors import check_device, check_dtype, check_shape, check_untransformed
from . import reference
from .reference import TASKS, Task

__all__ = ["TASKS", "Task", "initial", "observe", "step"]


def initial(task: Task, u: Tensor) -> Tensor:
    """Initial states, uniform between the task's reset bounds.

    Args:
        task: one of `TASKS`.
        u: ``[..., S]`` float32 uniforms in ``[0, 1)``.

    Returns:
        ``[..., S]`` float64: low + (high - low) u.

    Raises:
        TypeError: `u` is not float32.
        ValueError: its last size is not the task's `state_dim`.
    """
    check_dtype("u", u, torch.float32)
    check_shape("u", u, (*u.shape[:-1], task.state_dim))
    return _backend("initial", u.device).initial(task, u.detach())


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
        ValueError: a wrong shape or device, or an action outside ``[0, n)`` (looked at on CPU
            tensors only: on a GPU that would wait for it).
    """
    check_dtype("state", state, torch.float64)
    check_shape("state", state, (*state.shape[:-1], task.state_dim))
    check_device("action", action, state)
    check_dtype("action", action, torch.int64 if task.discrete else torch.float32)
    copies = tuple(state.shape[:-1])
    check_shape("action", action, copies if task.discrete else (*copies, task.action_dim))
    if task.discrete and action.device.type == "cpu" and action.numel():
        low, high = (int(bound) for bound in action.aminmax())
        if low < 0 or high >= task.action_dim:
            raise ValueError(
                f"action must be in [0, {task.action_dim}) for {task.name}, "
                f"got {low if low < 0 else high}"
            )
    return _backend("step", state.device).step(task, state.detach(), action.detach())


def observe(task: Task, state: Tensor) -> Tensor:
    """What a policy sees of each copy, before any normalisation.

    Args:
        task: one of `TASKS`.
        state: ``[..., S]`` float64.

    Returns:
        ``[..., D]`` float32.

    Raises:
        TypeError: `state` is not float64.
        ValueError: its last size is not the task's `state_dim`.
    """
    check_dtype("state", state, torch.float64)
    check_shape("state", state, (*state.shape[:-1], task.state_dim))
    return _backend("observe", state.device).observe(task, state.detach())


def _backend(op: str, device: torch.device) -> ModuleType:
    name = resolve_backend(device)
    if name != "reference":
        check_untransformed(op)
    if name == "cpu":
        from . import cpu

        return cpu
    if name == "triton":
        from . import gpu

        return gpu
    return reference
