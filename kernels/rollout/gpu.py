"""Rollouts and evaluations in Triton: one program lives through all steps of one environment copy.

T steps are a chain of small dependent ones, so latency decides, not throughput. The actor's weights
stay in registers from the first step to the last (`policy_gpu`); state, clock and random numbers
are scalars that every thread computes for itself, for no thread could use them sooner. The critic
is not on the chain: it values the observations of all steps afterwards, side by side.

A program knows one copy only, so its bits depend neither on P nor on E, nor on how a rollout is cut
into calls. Products and sums are rounded apart (``fp_fusion=False``), so the physics equals that of
`env.step` bit for bit.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arena import Arena
from ..dynamics import TASKS, Task
from ..dynamics.copies import Copies
from ..dynamics.gpu import load_state, store_state, task_step
from ..examples import Example, meta
from ..jit import jit_kernel
from ..random import Stream
from .copy_gpu import (
    normal,
    observe,
    pick_greedy,
    restart,
    sample_discrete,
    sample_gaussian,
    uniform,
)
from .policy_gpu import describe, entry_of, forward, judge, load_network, prefer_launch
from .reference import Rollout

_EVAL_RESET = tl.constexpr(int(Stream.EVAL_RESET))
_EVAL_ACTION = tl.constexpr(int(Stream.EVAL_ACTION))
_NOISE = tl.constexpr(int(Stream.NOISE))
_EVAL_NOISE = tl.constexpr(int(Stream.EVAL_NOISE))


@jit_kernel(
    fp_fusion=False,
    do_not_specialize=["size", "steps", "copies", "clock", "stream", "reset_stream"],
)
def _act_kernel(
    weight,  # [P, size]
    key,  # [P], as reset_key
    reset_key,
    clock_pointer,  # [], or None: then the clock is an argument
    state,  # [P, copies, STATES], as elapsed read and written
    elapsed,
    obs,  # [P, copies, features]
    offset,  # [features], as scale
    scale,
    source,  # [features]: which input shows what, or None
    seen,  # written, all [P, steps, copies] and what follows; seen has features
    action,
    logp,
    reward,
    terminated,
    truncated,
    final_obs,  # with features, or None
    heads,  # with actions, or None
    last_obs,  # [P, copies, features], written
    size,
    steps,
    copies,
    clock,
    stream,
    reset_stream,
    TASK: tl.constexpr,
    TIME_LIMIT: tl.constexpr,
    KNOWN: tl.constexpr,
    STATES: tl.constexpr,
    LOG_STD: tl.constexpr,
    NET: tl.constexpr,
    WIDTH: tl.constexpr,
    FEATURES: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """All steps of one copy; ``state`` and ``elapsed`` change in place.

    A step writes 4 D + 18 bytes (14 if the action is a float) and reads what the cache holds.
    """
    features: tl.constexpr = NET[0][0]
    actions: tl.constexpr = NET[0][len(NET[0]) - 1]
    program = tl.program_id(0)
    ticket, copy = program // copies, program % copies
    lane = program.to(tl.int64)
    row = weight + ticket.to(tl.int64) * size
    layers = load_network(row, NET, WIDTH, FEATURES, OUTPUTS)
    now = clock.to(tl.int64)
    if clock_pointer is not None:
        now += tl.load(clock_pointer)
    log_std = 0.0
    if LOG_STD is not None:
        log_std = tl.load(row + LOG_STD)

    feature = tl.arange(0, FEATURES)
    real = feature < features
    x = tl.load(obs + lane * features + feature, mask=real, other=0.0)  # [features]
    s0, s1, s2, s3 = load_state(state + lane * STATES, None, STATES)
    age = tl.load(elapsed + lane)
    for t in range(steps):
        # 32 bits: of a longer index the compiler would keep an address for every output.
        entry = (ticket * steps + t) * copies + copy
        tl.store(seen + entry.to(tl.int64) * features + feature, x, mask=real)
        head = forward(layers, x, NET)
        if heads is not None:
            output = tl.arange(0, OUTPUTS)
            tl.store(heads + entry.to(tl.int64) * actions + output, head, mask=output < actions)
        if LOG_STD is None:
            u = uniform(key + ticket, copy, stream, now)
            chosen, density = sample_discrete(head, u, actions, OUTPUTS)
        else:
            noise = normal(key + ticket, copy, stream, now)
            chosen, density = sample_gaussian(entry_of(head, 0, OUTPUTS), log_std, noise)
        tl.store(action + entry, chosen)
        tl.store(logp + entry, density)

        s0, s1, s2, s3, gain, ended = task_step(TASK, s0, s1, s2, s3, chosen.to(tl.float64))
        age += 1
        now += 1
        cut = (age >= TIME_LIMIT) & (ended == 0)
        tl.store(reward + entry, gain)
        tl.store(terminated + entry, ended)
        tl.store(truncated + entry, cut)
        x = observe(
            TASK, s0, s1, s2, s3, offset, scale, source, reset_key + ticket, copy, now, _NOISE,
            KNOWN, features, FEATURES,
        )  # fmt: skip
        if ended | cut:
            if final_obs is not None:
                tl.store(final_obs + entry.to(tl.int64) * features + feature, x, mask=real)
            s0, s1, s2, s3 = restart(TASK, STATES, reset_key + ticket, copy, reset_stream, now)
            age *= 0
            x = observe(
                TASK, s0, s1, s2, s3, offset, scale, source, reset_key + ticket, copy, now, _NOISE,
                KNOWN, features, FEATURES,
            )  # fmt: skip
    store_state(state + lane * STATES, s0, s1, s2, s3, None, STATES)
    tl.store(elapsed + lane, age)
    tl.store(last_obs + lane * features + feature, x, mask=real)


@jit_kernel(fp_fusion=False, do_not_specialize=["size", "copies", "index"])
def _evaluate_kernel(
    weight,  # [P, size]
    key,  # [P]
    offset,  # [features], as the next two
    scale,
    source,  # which input shows what, or None
    total,  # [P, copies], written
    size,
    copies,
    index,
    GREEDY: tl.constexpr,
    TASK: tl.constexpr,
    TIME_LIMIT: tl.constexpr,
    KNOWN: tl.constexpr,
    STATES: tl.constexpr,
    LOG_STD: tl.constexpr,
    NET: tl.constexpr,
    WIDTH: tl.constexpr,
    FEATURES: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """One episode of one copy, whose program ends with it."""
    features: tl.constexpr = NET[0][0]
    actions: tl.constexpr = NET[0][len(NET[0]) - 1]
    program = tl.program_id(0).to(tl.int64)
    ticket, copy = program // copies, program % copies
    row = weight + ticket * size
    layers = load_network(row, NET, WIDTH, FEATURES, OUTPUTS)
    log_std = 0.0
    if LOG_STD is not None:
        log_std = tl.load(row + LOG_STD)

    number = index.to(tl.int64)
    stream = tl.full([], _EVAL_ACTION, tl.int32)
    reset_stream = tl.full([], _EVAL_RESET, tl.int32)
    s0, s1, s2, s3 = restart(TASK, STATES, key + ticket, copy, reset_stream, number)
    step = number << 20
    end = step + TIME_LIMIT
    score = tl.zeros([], tl.float32)
    while step < end:
        x = observe(
            TASK, s0, s1, s2, s3, offset, scale, source, key + ticket, copy, step, _EVAL_NOISE,
            KNOWN, features, FEATURES,
        )  # fmt: skip
        head = forward(layers, x, NET)
        if LOG_STD is None:
            if GREEDY:
                chosen = pick_greedy(head, actions, OUTPUTS)
            else:
                u = uniform(key + ticket, copy, stream, step)
                chosen, _ = sample_discrete(head, u, actions, OUTPUTS)
        else:
            chosen = entry_of(head, 0, OUTPUTS)
            if not GREEDY:
                chosen, _ = sample_gaussian(
                    chosen, log_std, normal(key + ticket, copy, stream, step)
                )
            score += chosen - chosen
        s0, s1, s2, s3, gain, ended = task_step(TASK, s0, s1, s2, s3, chosen.to(tl.float64))
        # What is not finite scores NaN: physics would clip it, and a comparison pick an action.
        score += gain + tl.sum(head - head, axis=0)
        step = tl.where(ended, end, step + 1)
    tl.store(total + program, score)


def _describe_actor(arena: Arena, task: Task) -> dict[str, Any]:
    """What a kernel knows of a policy and its task while it compiles."""
    return {
        **describe(arena.actor),
        "OUTPUTS": triton.next_power_of_2(arena.actor.sizes[-1]),
        "LOG_STD": arena.log_std,
        "TASK": task.id,
        "TIME_LIMIT": task.time_limit,
        "KNOWN": task.observation_dim,
        "STATES": task.state_dim,
    }


def _signed(word: int) -> int:
    """A 32-bit word as the int32 of the same bits: one kernel signature for every stream."""
    return (word & 0xFFFFFFFF) - ((word & 0x80000000) << 1)


def rollout(
    weight: Tensor,
    arena: Arena,
    env: Copies,
    obs: Tensor,
    key: Tensor,
    steps: int,
    stream: int,
    keep_heads: bool,
) -> tuple[Rollout, Tensor, Tensor]:
    """See `reference.rollout`; the heads are ``[P, T, E, 0]`` unless ``keep_heads``.

    ``env.state`` and ``env.elapsed`` change in place, ``env.clock`` does not.
    """
    task, device = env.task, obs.device
    tickets, copies, features = obs.shape
    if tickets * steps * copies >= 2**31:
        raise ValueError(
            f"steps must keep P * T * E below 2**31, got P={tickets}, T={steps}, E={copies}"
        )
    clock, clock_pointer = _clock(env, device)
    shape = (tickets, steps, copies)
    actions, critic = arena.actor.sizes[-1], arena.critic

    def empty(*trailing: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty((*shape, *trailing), dtype=dtype, device=device)

    outcome = Rollout(
        obs=empty(features),
        action=empty(dtype=torch.int64) if task.discrete else empty(actions),
        logp=empty(),
        value=empty() if critic else obs.new_zeros(shape),
        reward=empty(),
        terminated=empty(dtype=torch.bool),
        truncated=empty(dtype=torch.bool),
        next_value=empty() if critic else obs.new_zeros(shape),
    )
    heads = empty(actions if keep_heads else 0)
    final_obs = empty(features) if critic else None
    last_obs = torch.empty_like(obs, memory_format=torch.contiguous_format)
    weight = weight.contiguous()
    if tickets:
        with torch.cuda.device_of(obs):
            _act_kernel[(tickets * copies,)](
                weight,
                key.contiguous(),
                env.restart_key.contiguous(),
                clock_pointer,
                env.state,
                env.elapsed,
                obs.contiguous(),
                env.offset.contiguous(),
                env.scale.contiguous(),
                None if env.source is None else env.source.contiguous(),
                outcome.obs,
                outcome.action,
                outcome.logp,
                outcome.reward,
                outcome.terminated,
                outcome.truncated,
                final_obs,
                heads if keep_heads else None,
                last_obs,
                arena.size,
                steps,
                copies,
                clock,
                _signed(stream),
                _signed(env.reset_stream),
                **_describe_actor(arena, task),
                **prefer_launch(arena.actor, task.name, device).options,
            )
    if tickets and critic is not None and final_obs is not None:
        judge(weight, critic, outcome, last_obs, final_obs)
    return outcome, heads, last_obs


def evaluate(
    weight: Tensor,
    arena: Arena,
    task: Task,
    copies: int,
    offset: Tensor,
    scale: Tensor,
    key: Tensor,
    index: int,
    greedy: bool,
    source: Tensor | None,
) -> Tensor:
    """See `sparse_tickets.kernels.rollout.evaluate`."""
    tickets = key.shape[0]
    total = weight.new_empty((tickets, copies))
    if tickets:
        with torch.cuda.device_of(key):
            _evaluate_kernel[(tickets * copies,)](
                weight.contiguous(),
                key.contiguous(),
                offset.contiguous(),
                scale.contiguous(),
                None if source is None else source.contiguous(),
                total,
                arena.size,
                copies,
                index,
                GREEDY=greedy,
                **_describe_actor(arena, task),
                **prefer_launch(arena.actor, task.name, key.device).options,
            )
    return total


def _clock(env: Copies, device: torch.device) -> tuple[int, Tensor | None]:
    """The clock as an integer and a pointer, of which the kernel takes the sum."""
    if isinstance(env.clock, Tensor):
        return 0, env.clock
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            "env.clock must be a tensor while a CUDA graph is captured, or every replay would draw "
            f"the same numbers; got {env.clock} (env.keep_clock_on_device() makes it one)"
        )
    return env.clock, None


def _example(name: str, hidden: tuple[int, ...], activation: str, noise: int) -> None:
    task = TASKS[name]
    inputs = task.observation_dim + noise
    arena = Arena.build(
        (inputs, *hidden, task.action_dim),
        (inputs, *hidden, 1),
        activation=activation,
        continuous=not task.discrete,
    )
    weight, key, scale = meta(2, arena.size), meta(2, dtype=torch.int64), meta(inputs)
    source = meta(inputs, dtype=torch.int64) if noise else None
    env: Any = SimpleNamespace(
        task=task,
        state=meta(2, 3, task.state_dim, dtype=torch.float64),
        elapsed=meta(2, 3, dtype=torch.int32),
        clock=meta(dtype=torch.int64),
        restart_key=key,
        reset_stream=1,
        offset=scale,
        scale=scale,
        source=source,
    )
    obs = meta(2, 3, inputs)
    for keep_heads in (False, True):
        rollout(weight, arena, env, obs, key, 9, 2, keep_heads)
    evaluate(weight, arena, task, 3, scale, scale, key, 7, False, source)


EXAMPLES = [
    Example(
        f"{name.partition('-')[0].lower()}_{'_'.join(map(str, hidden))}_{activation}"
        + (f"_noise_{noise}" if noise else ""),
        partial(_example, name, hidden, activation, noise),
    )
    for name, hidden, activation, noise in (
        ("CartPole-v1", (64, 64), "tanh", 0),
        ("Pendulum-v1", (64, 64), "tanh", 0),
        ("MountainCar-v0", (32,), "relu", 0),
        ("CartPole-v1", (128, 128), "tanh", 0),
        ("Acrobot-v1", (128, 128), "relu", 0),
        ("Acrobot-v1", (64, 64, 64, 64, 64), "tanh", 0),
        ("Pendulum-v1", (128, 128), "elu", 0),
        ("CartPole-v1", (64, 64), "silu", 0),
        ("Acrobot-v1", (128, 128), "gelu", 0),
        ("CartPole-v1", (64, 64), "tanh", 12),
    )
]
