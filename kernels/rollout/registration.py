"""Rollouts and evaluations of built-in physics as registered ops: flat arguments, new results.

What an op must know beside tensors travels as numbers and names: the arena as `Arena.code`, the
task as its name and time limit. Copies advance in place in ``state`` and ``elapsed``.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor
from torch.library import Library, register_fake

from ..arena import Arena, Net
from ..dispatch import PLAIN_TORCH, Backend, resolve_backend
from ..dynamics import TASKS, Task
from ..dynamics.copies import Copies
from ..errors import check_device, check_dtype, check_shape
from ..memory import mark_written
from ..random import Stream
from . import reference

__all__ = ["choose"]


def choose(nets: tuple[Net, ...], device: torch.device) -> tuple[Backend, str]:
    """Backend of a rollout of these networks in built-in physics, and why."""
    backend = resolve_backend(device)
    if backend == "reference":
        return backend, PLAIN_TORCH
    if backend == "cpu":
        return backend, "policy and physics fused; compressed rows where they beat tiles"
    from .policy_gpu import misfit

    obstacle = misfit(nets)
    if obstacle is not None:
        return "reference", f"a loop of torch ops: {obstacle}"
    return backend, "policy and physics fused, a program per copy, weights in registers"


@cache
def _task(name: str, time_limit: int) -> Task:
    return replace(TASKS[name], time_limit=time_limit)


# Whoever calls an op by its name has passed no other check; kernels read memory by these shapes.


def _check_policy(
    weight: Tensor,
    mask: Tensor,
    key: Tensor,
    offset: Tensor,
    scale: Tensor,
    code: list[int],
    task: str,
    time_limit: int,
) -> tuple[Arena, Task]:
    """The arena and the task, which everything fits."""
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    arena, found = Arena.decode(tuple(code)), _task(task, time_limit)
    tickets = len(key) if key.dim() else 0
    _check_tensors(
        key,
        ("key", key, torch.int64, (tickets,)),
        ("weight", weight, torch.float32, (tickets, arena.size)),
        ("mask", mask, torch.bool, (tickets, arena.prunable)),
        ("offset", offset, torch.float32, (found.observation_dim,)),
        ("scale", scale, torch.float32, (found.observation_dim,)),
    )
    ends = (arena.actor.sizes[0], arena.actor.sizes[-1])
    if ends != (found.observation_dim, found.action_dim):
        raise ValueError(
            f"actor must map {found.observation_dim} features to {found.action_dim} outputs, "
            f"got {arena.actor.sizes}"
        )
    return arena, found


def _check_copies(
    obs: Tensor,
    restart_key: Tensor,
    state: Tensor,
    elapsed: Tensor,
    clock: int | Tensor,
    key: Tensor,
    task: Task,
) -> None:
    copies = (len(key), obs.shape[1] if obs.dim() == 3 else 0)
    _check_tensors(
        key,
        ("obs", obs, torch.float32, (*copies, task.observation_dim)),
        ("restart_key", restart_key, torch.int64, copies[:1]),
        ("state", state, torch.float64, (*copies, task.state_dim)),
        ("elapsed", elapsed, torch.int32, copies),
    )
    for name, tensor in (("state", state), ("elapsed", elapsed)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    if isinstance(clock, Tensor):
        _check_tensors(key, ("clock", clock, torch.int64, ()))


def _check_tensors(
    like: Tensor, *expected: tuple[str, Tensor, torch.dtype, tuple[int, ...]]
) -> None:
    for name, tensor, dtype, shape in expected:
        check_dtype(name, tensor, dtype)
        check_shape(name, tensor, shape)
        check_device(name, tensor, like)


def _rollout_impl(
    weight: Tensor,
    mask: Tensor,
    obs: Tensor,
    key: Tensor,
    restart_key: Tensor,
    state: Tensor,
    elapsed: Tensor,
    offset: Tensor,
    scale: Tensor,
    clock: int | Tensor,
    arena_code: list[int],
    task: str,
    time_limit: int,
    steps: int,
    stream: int,
    restart_stream: int,
    density: float,
    keep_heads: bool,
) -> tuple[Tensor, ...]:
    policy = weight, mask, key, offset, scale
    arena, found = _check_policy(*policy, arena_code, task, time_limit)
    _check_copies(obs, restart_key, state, elapsed, clock, key, found)
    env = Copies(
        found,
        obs.shape[1],
        offset,
        scale,
        restart_stream,
        restart_key,
        state,
        elapsed,
        clock,
    )
    backend, _ = choose(arena.nets, weight.device)
    if backend == "cpu":
        from . import cpu

        outcome, heads, last = cpu.rollout(
            weight, mask, arena, env, obs, key, steps, density, stream, keep_heads
        )
    elif backend == "triton":
        from . import gpu

        outcome, heads, last = gpu.rollout(weight, arena, env, obs, key, steps, stream, keep_heads)
    else:
        # It counts its clock on; the caller's is the caller's.
        env.clock = clock.clone() if isinstance(clock, Tensor) else clock
        outcome, heads, last = reference.rollout(weight, arena, env, obs, key, steps, stream)
        state.copy_(env.state)
        elapsed.copy_(env.elapsed)
        if not keep_heads:
            heads = heads.new_empty((*heads.shape[:-1], 0))
    mark_written(state, elapsed)
    return *outcome, heads, last


def _evaluate_impl(
    weight: Tensor,
    mask: Tensor,
    key: Tensor,
    offset: Tensor,
    scale: Tensor,
    arena_code: list[int],
    task: str,
    time_limit: int,
    copies: int,
    index: int,
    greedy: bool,
    density: float,
) -> Tensor:
    policy = weight, mask, key, offset, scale
    arena, found = _check_policy(*policy, arena_code, task, time_limit)
    world = found, copies, offset, scale
    backend, _ = choose((arena.actor,), weight.device)
    if backend == "cpu":
        from . import cpu

        return cpu.evaluate(weight, mask, arena, *world, key, index, greedy, density)
    if backend == "triton":
        from . import gpu

        return gpu.evaluate(weight, arena, *world, key, index, greedy)
    env = Copies.start(*world, key, Stream.EVAL_RESET, index)
    return reference.evaluate(weight, arena, env, env.observe(env.state), key, index, greedy)


def _rollout_fake(
    weight, mask, obs, key, restart_key, state, elapsed, offset, scale, clock, arena_code, task,
    time_limit, steps, stream, restart_stream, density, keep_heads,
):  # fmt: skip
    policy = weight, mask, key, offset, scale
    arena, found = _check_policy(*policy, arena_code, task, time_limit)
    _check_copies(obs, restart_key, state, elapsed, clock, key, found)
    tickets, copies, features = obs.shape
    shape = (tickets, steps, copies)
    actions = arena.actor.sizes[-1]
    if found.discrete:
        action = obs.new_empty(shape, dtype=torch.int64)
    else:
        action = obs.new_empty((*shape, actions))
    return (
        obs.new_empty((*shape, features)),
        action,
        *(obs.new_empty(shape) for _ in range(3)),
        *(obs.new_empty(shape, dtype=torch.bool) for _ in range(2)),
        obs.new_empty(shape),
        obs.new_empty((*shape, actions if keep_heads else 0)),
        obs.new_empty(obs.shape),
    )


def _evaluate_fake(weight, mask, key, offset, scale, arena_code, task, time_limit, copies, *_):
    _check_policy(weight, mask, key, offset, scale, arena_code, task, time_limit)
    return weight.new_empty((key.shape[0], copies))


_ROLLOUT = (
    "(Tensor weight, Tensor mask, Tensor obs, Tensor key, Tensor restart_key, "
    "Tensor(a!) state, Tensor(b!) elapsed, Tensor offset, Tensor scale, {} clock, "
    "int[] arena_code, str task, int time_limit, int steps, int stream, int restart_stream, "
    "float density, bool keep_heads) -> (Tensor obs, Tensor action, "
    "Tensor logp, Tensor value, Tensor reward, Tensor terminated, Tensor truncated, "
    "Tensor next_value, Tensor heads, Tensor last_obs)"
)
_EVALUATE = (
    "(Tensor weight, Tensor mask, Tensor key, Tensor offset, Tensor scale, "
    "int[] arena_code, str task, int time_limit, int copies, int index, bool greedy, "
    "float density) -> Tensor"
)
_library = Library("sparse_tickets", "FRAGMENT")
for _op, _schema, _impl, _fake in (
    ("rollout", _ROLLOUT.format("int"), _rollout_impl, _rollout_fake),
    ("rollout.on_device", _ROLLOUT.format("Tensor"), _rollout_impl, _rollout_fake),
    ("evaluate", _EVALUATE, _evaluate_impl, _evaluate_fake),
):
    _library.define(f"{_op}{_schema}")
    for _key in ("CPU", "CUDA"):
        _library.impl(_op, _impl, _key)
    register_fake(f"sparse_tickets::{_op}", _fake, lib=_library)
