"""Acting in environments: `rollout` for training, `evaluate` for scores, `demonstrate` for cloning.

An environment is anything with the attributes and methods of `sparse_tickets.envs.spec.Env`. Where
its physics is one of `kernels.dynamics`, policy and physics are fused into one call: on the CPU in
Numba (`cpu.py`), on a GPU in Triton (`gpu.py`) if the networks fit its registers. Everything else
takes the loop of `reference.py`; `plan` says which and why.

Actions are drawn from each ticket's key at the environment's clock: discrete ones by `categorical`
with ``uniform(key, E, step=clock)``, continuous ones as ``mean + exp(log_std) * noise`` with
``noise = normal(key, E * A, step=clock)``; a squashed policy's are the hyperbolic tangents of such,
between the environment's bounds, and its critics, which value actions, do not take part. So a
rollout continued in a second call equals one long call bit for bit, and a ticket's rollout does not
depend on the tickets beside it. All results are constants to autograd.

A policy without a finite output is no error, for its batch-mates go on: where its logits are no
distribution it takes action 0 with log-probability NaN, which makes NaN of its next update, and
`evaluate` gives it NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..arena import Arena, Net, Parameters
from ..dispatch import PLAIN_TORCH, Backend, Plan, resolve_backend
from ..dynamics import check_task
from ..dynamics.copies import Copies
from ..errors import check_data, check_density, check_integer, check_tensor, check_untransformed
from ..memory import check_separate, mark_written
from ..mlp import mlp
from ..random import Stream, bits
from ..registration import eager
from ..threads import WORTH_A_THREAD, one_thread
from . import reference
from .reference import Rollout

__all__ = ["Rollout", "demonstrate", "evaluate", "plan", "rollout", "takes_turns"]


@eager
@torch.no_grad()
def rollout(
    parameters: Parameters,
    arena: Arena,
    env: Any,
    obs: Tensor,
    key: Tensor,
    steps: int,
    *,
    density: float = 1.0,
    stream: int = Stream.ACTION,
) -> tuple[Rollout, Tensor]:
    """Act for T steps in every copy of every ticket's environment, restarting ended episodes.

    Args:
        parameters: of P tickets.
        arena: their layout; without a critic, values are zero.
        env: P tickets times E copies, after ``env.reset``; advanced by T steps. To capture this
            call in a CUDA graph ``env.clock`` must be a tensor: then ``env.state``, ``env.elapsed``
            and the clock change in place, and replays go on from one another if ``obs`` does.
        obs: ``[P, E, D]`` float32, the observations `env` returned last.
        key: ``[P]`` int64, for the actions.
        steps: T, at least 1 and below 2^31.
        density: the population's nominal density; decides dense or sparse products, never bits.
        stream: of the actions' draws.

    Returns:
        ``(Rollout, obs [P, E, D])``: what happened, and the observations to continue from.

    Raises:
        TypeError: a wrong dtype, or `steps` or `stream` no integer.
        ValueError: shapes, devices or action spaces that do not fit, or `steps`, `stream` or
            `density` out of range.
        RuntimeError: `env` was never reset.
    """
    arena = _without_critics(arena) if arena.squashed else arena
    outcome, _, obs = _run(parameters, arena, env, obs, key, steps, density, stream, False)
    return outcome, obs


@eager
@torch.no_grad()
def demonstrate(
    parameters: Parameters,
    arena: Arena,
    env: Any,
    obs: Tensor,
    key: Tensor,
    steps: int,
    *,
    density: float = 1.0,
    stream: int = Stream.DATASET_ACTION,
) -> tuple[Tensor, Tensor, Tensor]:
    """What P experts do: the states their sampled actions visit, and their action distributions.

    Args:
        parameters: of P experts.
        arena: their layout; a critic is not run.
        env: see `rollout`.
        obs: see `rollout`.
        key: see `rollout`.
        steps: see `rollout`.
        density: see `rollout`.
        stream: see `rollout`.

    Returns:
        ``(obs [P, T, E, D], target, obs [P, E, D])``: the observations acted on; the experts'
        log-probabilities ``[P, T, E, A]``, or if continuous mean and log standard deviation
        ``[P, T, E, 2A]``; and the observations to continue from.

    Raises:
        TypeError, ValueError: see `rollout`.
    """
    actor = _without_critics(arena)
    outcome, heads, obs = _run(parameters, actor, env, obs, key, steps, density, stream, True)
    return outcome.obs, reference.targets(parameters.weight.detach(), arena, heads), obs


@eager
@torch.no_grad()
def evaluate(
    parameters: Parameters,
    arena: Arena,
    env: Any,
    key: Tensor,
    *,
    index: int,
    greedy: bool,
    density: float = 1.0,
) -> Tensor:
    """Undiscounted returns of one complete episode in every copy of ``env``.

    Episodes start from draws on `Stream.EVAL_RESET` with step ``index``, whatever was done with
    ``env`` before; sampled actions are drawn on `Stream.EVAL_ACTION`, step ``index * 2^20 + t``.
    Where the physics is built in, ``env`` is left as it was. Another is a workplace: it is reset
    with a key of two words drawn like the starts, and must be reset before any other use; if it
    has a method ``rest``, that is called before each step with the copies that need not act.

    Args:
        parameters: of P tickets.
        arena: their layout.
        env: P tickets times as many copies as episodes are wanted.
        key: ``[P]`` int64.
        index: number of this evaluation, in ``[0, 2^43)``.
        greedy: take the most probable action (of equals the lowest index) or the mean; otherwise
            sample.
        density: see `rollout`.

    Returns:
        ``[P, E]`` float32, summed in float64 on the CPU; NaN where the policy's output was not
        finite at some step.

    Raises:
        TypeError, ValueError: see `rollout`; also an `index` out of range, or an episode that does
            not end within 2^20 steps.
    """
    index = check_integer("index", index, 0, 1 << 43)
    arena = _without_critics(arena)
    _check(parameters, arena, env, key, density)
    weight = parameters.weight.detach()
    if env.task is None:
        low, high = bits(key, 2, stream=Stream.EVAL_RESET, step=index).unbind(1)
        obs = env.reset(low | (high << 32))
        with _in_turn(parameters, arena, env, density) as apply:
            return reference.evaluate(weight, arena, env, obs, key, index, greedy, apply)
    backend, _ = _choose(arena, env, weight.device)
    world = env.task, env.copies, env.offset, env.scale
    if backend == "cpu":
        from . import cpu

        return cpu.evaluate(
            weight,
            parameters.mask,
            arena,
            *world,
            key,
            index,
            bool(greedy),
            float(density),
            env.source,
        )
    if backend == "triton":
        from . import gpu

        return gpu.evaluate(weight, arena, *world, key, index, bool(greedy), env.source)
    copies = Copies.start(
        *world,
        key,
        Stream.EVAL_RESET,
        index,
        source=env.source,
        noise_stream=Stream.EVAL_NOISE,
        noise_start=index << 20,
    )
    obs = copies.observe(copies.state)
    return reference.evaluate(weight, arena, copies, obs, key, index, greedy)


def plan(arena: Arena, env: Any, device: torch.device, *, density: float = 1.0) -> Plan:
    """What `rollout` does on ``device``, and why.

    Args:
        arena: the policies' layout.
        env: the environment.
        device: where the parameters live.
        density: see `rollout`.

    Raises:
        ValueError: `density` outside ``[0, 1]``, or the chosen backend cannot run on the device.
    """
    check_density(density)
    arena = _without_critics(arena) if arena.squashed else arena
    backend, reason = _choose(arena, env, device)
    if backend != "cpu":
        return Plan("rollout", backend, "dense", reason)
    from .policy import network

    sparse = [network(net, arena, density, env.copies).sparse for net in arena.nets]
    return Plan("rollout", "cpu", "/".join("csr" if s else "dense" for s in sparse), reason)


def takes_turns(env: Any, device: torch.device) -> bool:
    """Whether simulators in processes have the cores to themselves between a policy's steps."""
    return getattr(env, "workers", None) is not None and device.type == "cpu"


@contextmanager
def _in_turn(
    parameters: Parameters, arena: Arena, env: Any, density: float
) -> Iterator[reference.Apply | None]:
    """How to run networks between the steps of simulators that have the cores to themselves.

    A ticket's small batch is plain torch's on one thread: torch wakes others for a few numbers,
    which then spin where simulators wait, and its products may differ with their number. A larger
    one is worth `mlp`'s kernels, which no number of threads changes.
    """
    if not takes_turns(env, parameters.weight.device):
        yield None
        return
    weights = sum(a * b for net in arena.nets for a, b in pairwise(net.sizes))
    if env.copies * weights >= WORTH_A_THREAD:
        yield partial(_apply, parameters, float(density))
        return
    with one_thread():
        yield None


def _apply(parameters: Parameters, density: float, obs: Tensor, net: Net) -> Tensor:
    return mlp(obs, parameters.weight.detach(), net, parameters.mask, density=density)


def _without_critics(arena: Arena) -> Arena:
    return replace(arena, critic=None, twin=None)


def _choose(arena: Arena, env: Any, device: torch.device) -> tuple[Backend, str]:
    """Backend of a rollout, and why: what is not fused runs as the reference's loop."""
    backend = resolve_backend(device, arena.actor)
    if backend == "reference":
        return backend, PLAIN_TORCH
    if env.task is None:
        return "reference", f"a loop of torch ops: the physics of {env.spec.name} is not built in"
    if backend == "cpu":
        return backend, "policy and physics fused; compressed rows where they beat tiles"
    from .policy_gpu import misfit

    if arena.squashed:
        return "reference", "a loop of torch ops: squashed actions are not fused on a GPU"
    obstacle = misfit(arena.nets)
    if obstacle is not None:
        return "reference", f"a loop of torch ops: {obstacle}"
    return backend, "policy and physics fused, a program per copy, weights in registers"


def _run(
    parameters: Parameters,
    arena: Arena,
    env: Any,
    obs: Tensor,
    key: Tensor,
    steps: int,
    density: float,
    stream: int,
    keep_heads: bool,
) -> tuple[Rollout, Tensor, Tensor]:
    _check(parameters, arena, env, key, density)
    shape = (len(key), env.copies, arena.actor.sizes[0])
    check_tensor("obs", obs, shape, torch.float32, like=key)
    steps = check_integer("steps", steps, 1, 1 << 31)
    stream = check_integer("stream", stream, 0, 1 << 32)
    weight, obs = parameters.weight.detach(), obs.detach()
    if env.task is None:
        with _in_turn(parameters, arena, env, density) as apply:
            return reference.rollout(weight, arena, env, obs, key, steps, stream, apply)
    _check_copies(env, obs)
    if isinstance(env.clock, Tensor):
        # Of a captured call every replay goes on from where the last one ended.
        state, elapsed = env.state.contiguous(), env.elapsed.contiguous()
        read = {"weight": weight, "mask": parameters.mask, "obs": obs, "key": key}
        read |= {f"env.{name}": getattr(env, name) for name in ("key", "offset", "scale", "clock")}
        check_separate({"env.state": state, "env.elapsed": elapsed}, read)
    else:
        contiguous = torch.contiguous_format
        state, elapsed = (t.clone(memory_format=contiguous) for t in (env.state, env.elapsed))
    copies = Copies(
        task=env.task,
        copies=env.copies,
        offset=env.offset,
        scale=env.scale,
        reset_stream=int(env.reset_stream),
        key=env.key,
        state=state,
        elapsed=elapsed,
        clock=env.clock,
        source=env.source,
    )
    outcome, heads, obs = _advance(
        weight, parameters.mask, arena, copies, obs, key, steps, float(density), stream, keep_heads
    )
    env.state, env.elapsed = copies.state, copies.elapsed
    env.clock += steps
    return outcome, heads, obs


def _advance(
    weight: Tensor,
    mask: Tensor,
    arena: Arena,
    env: Copies,
    obs: Tensor,
    key: Tensor,
    steps: int,
    density: float,
    stream: int,
    keep_heads: bool,
) -> tuple[Rollout, Tensor, Tensor]:
    """A rollout, which moves ``env.state`` and ``env.elapsed`` on, but not the clock."""
    backend, _ = _choose(arena, env, weight.device)
    if backend == "reference":
        # It counts its clock on; the caller's is the caller's.
        env.clock = env.clock.clone() if isinstance(env.clock, Tensor) else env.clock
        return reference.rollout(weight, arena, env, obs, key, steps, stream)
    if backend == "cpu":
        from . import cpu

        result = cpu.rollout(weight, mask, arena, env, obs, key, steps, density, stream, keep_heads)
    else:
        from . import gpu

        result = gpu.rollout(weight, arena, env, obs, key, steps, stream, keep_heads)
    mark_written(env.state, env.elapsed)
    return result


def _check(parameters: Parameters, arena: Arena, env: Any, key: Tensor, density: float) -> None:
    check_untransformed("rollout")
    check_data("weight", parameters.weight)
    check_density(density)
    check_tensor("key", key, ("P",), torch.int64, like=key)
    check_tensor("weight", parameters.weight, (len(key), arena.size), torch.float32, like=key)
    check_tensor("mask", parameters.mask, (len(key), arena.prunable), torch.bool, like=key)
    spec = env.spec
    if env.task is not None:
        check_task(env.task)
        inputs = (_check_source(env, key),)
        for name in ("offset", "scale"):
            check_tensor(f"env.{name}", getattr(env, name), inputs, torch.float32, like=key)
    if spec.discrete == arena.continuous:
        kind = "discrete" if spec.discrete else "continuous"
        raise ValueError(f"arena must be built for {kind} actions to act in {spec.name}")
    sizes = (spec.observation_dim, spec.action_dim * (2 if arena.squashed else 1))
    actor = arena.actor.sizes
    if (actor[0], actor[-1]) != sizes:
        raise ValueError(f"actor must map {sizes[0]} features to {sizes[1]} outputs, got {actor}")
    if arena.critic is not None:
        critic = arena.critic.sizes
        if (critic[0], critic[-1]) != (sizes[0], 1):
            raise ValueError(f"critic must map {sizes[0]} features to 1 output, got {critic}")


def _check_source(env: Any, key: Tensor) -> int:
    """How many inputs a policy has; kernels read memory by what each of them shows."""
    known, source = env.task.observation_dim, env.source
    if source is None:
        return known
    check_tensor("env.source", source, ("inputs",), torch.int64, like=key)
    inputs = len(source)
    if inputs < known:
        raise ValueError(f"env.source must name {known} inputs or more, got {inputs}")
    # On a GPU looking would wait for the device.
    if source.device.type == "cpu":
        low, high = (int(bound) for bound in source.aminmax())
        if low < 0 or high >= inputs:
            raise ValueError(f"env.source must be in [0, {inputs}), got {low if low < 0 else high}")
    return inputs


def _check_copies(env: Any, obs: Tensor) -> None:
    """Where a rollout takes an environment's copies from, and leaves them."""
    if env.key is None:
        raise RuntimeError("env.reset must be called before rollout")
    check_untransformed("rollout", env.state)
    shape = obs.shape[:2]
    check_tensor("env.key", env.key, shape[:1], torch.int64, like=obs)
    check_tensor("env.state", env.state, (*shape, env.task.state_dim), torch.float64, like=obs)
    check_tensor("env.elapsed", env.elapsed, shape, torch.int32, like=obs)
    if isinstance(env.clock, Tensor):
        check_tensor("env.clock", env.clock, (), torch.int64, like=obs)
