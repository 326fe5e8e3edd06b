"""Rollouts and evaluations in Numba: policy and physics fused, one ticket per thread.

A ticket's T steps are one loop over scratch that stays in L1: forward pass, draw, physics,
autoreset. Nothing is shared between tickets, so the number of threads changes no bit.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..arena import Arena
from ..compiling import njit
from ..dynamics import Task
from ..dynamics.copies import Copies
from ..dynamics.cpu import task_observe, task_reset, task_step
from ..random import Stream
from ..random.cpu import fill_normal, fill_uniform, pick
from ..squashed import half_spans
from ..squashed.cpu import sample_row
from ..threads import count_threads, share
from .policy import RolloutNet, forward, network, prepare
from .reference import Rollout

_EVAL_RESET, _EVAL_ACTION = int(Stream.EVAL_RESET), int(Stream.EVAL_ACTION)
_NOISE, _EVAL_NOISE = int(Stream.NOISE), int(Stream.EVAL_NOISE)
# Work per step of a copy, in the units of `count_threads`: physics, draw and a small policy.
_WORK = 4096
# Slices of tickets per thread: enough to even out tickets that take longer.
_SLICES = 2
_HALF_LOG_TWO_PI = np.float32(0.5 * math.log(2 * math.pi))


class _World(NamedTuple):
    """An environment as Numba sees it; ``offset`` and ``scale`` normalise observations.

    ``features`` are the task's own. ``source`` says which of them an input shows, or which entry of
    the noise from there on; it is empty where there is no noise.
    """

    task: int
    state_dim: int
    discrete: bool
    time_limit: int
    reset_stream: int
    offset: np.ndarray
    scale: np.ndarray
    features: int
    source: np.ndarray


class _Head(NamedTuple):
    """The action distribution: A actions; the offset of ``log_std``, or the row's end if none.

    A squashed one has the environment's lowest actions, and half of the spans above them.
    """

    actions: int
    log_std: int
    squashed: bool
    low: np.ndarray
    half: np.ndarray


@njit(cache=True, error_model="numpy")
def _observe(world, state, noise, copy, scratch, obs):
    """Write what a copy sees to ``obs [D]``; of ``noise`` each copy has its own part."""
    features = world.features
    if world.source.shape[0] == 0:
        task_observe(world.task, state, obs)
    else:
        task_observe(world.task, state, scratch)
        first = copy * (obs.shape[0] - features) - features
        for i in range(obs.shape[0]):
            source = world.source[i]
            obs[i] = scratch[source] if source < features else noise[first + source]
    for i in range(obs.shape[0]):
        obs[i] = (obs[i] - world.offset[i]) / world.scale[i]


@njit(cache=True, inline="always")
def _copy_row(target, source):
    # Numba's slice assignment compiles a formatted error message into every kernel.
    for i in range(source.shape[0]):
        target[i] = source[i]


@njit(cache=True, error_model="numpy")
def _sample_discrete(logits, u, probs):
    """Index and log-probability; 0 and NaN where the logits are no distribution."""
    top = logits[0]
    for a in range(1, logits.shape[0]):
        top = max(top, logits[a])
    total = np.float32(0.0)
    for a in range(logits.shape[0]):
        probs[a] = math.exp(logits[a] - top)
        total += probs[a]
    for a in range(logits.shape[0]):
        probs[a] /= total
    action = pick(probs, u)
    if action < 0:
        return 0, np.float32(np.nan)
    return action, logits[action] - top - math.log(total)


@njit(cache=True, error_model="numpy")
def _sample_gaussian(mean, log_std, noise, action):
    """Write a sample to ``action [A]`` from the first A of ``noise``; returns its log-density."""
    logp = np.float32(0.0)
    for a in range(mean.shape[0]):
        std = math.exp(log_std[a])
        action[a] = mean[a] + std * noise[a]
        z = (action[a] - mean[a]) / std
        logp -= np.float32(0.5) * (z * z) + log_std[a] + _HALF_LOG_TWO_PI
    return logp


@njit(cache=True, error_model="numpy")
def _sample_continuous(head, output, log_std, noise, action):
    """Write a sample within the environment's bounds to ``action``; returns its log-density."""
    if not head.squashed:
        return _sample_gaussian(output, log_std, noise, action)
    logp = sample_row(output, noise, action)
    for a in range(action.shape[0]):
        action[a] = head.low[a] + (action[a] + np.float32(1.0)) * head.half[a]
    return logp


@njit(cache=True, error_model="numpy")
def _is_finite(values):
    for i in range(values.shape[0]):  # noqa: SIM110 (Numba)
        if not math.isfinite(values[i]):
            return False
    return True


@njit(cache=True)
def _greedy(logits):
    best = 0
    for a in range(1, logits.shape[0]):
        if logits[a] > logits[best]:
            best = a
    return best


@njit(cache=True, error_model="numpy")
def _rollout_ticket(
    actor, critic, head, world, row, mask, key, reset_key, stream, clock, state, elapsed, obs, seen,
    index, vector, logp, value, reward, terminated, truncated, next_value, heads,
):  # fmt: skip
    """All steps of one ticket."""
    steps, copies = seen.shape[:2]
    has_critic = critic.sizes.size > 0
    keep_heads = heads.shape[2] > 0
    policy = prepare(row, mask, actor, copies)
    judge = prepare(row, mask, critic, copies)
    log_std = row[head.log_std : head.log_std + head.actions]
    output = np.empty((copies, actor.sizes[-1]), np.float32)
    judged = np.zeros((copies, 1), np.float32)
    probs = np.empty(head.actions, np.float32)
    u = np.empty(copies, np.float32)
    noise = np.empty(copies * head.actions, np.float32)
    draw = np.empty(copies * world.state_dim, np.float32)
    shown = np.empty(copies * (obs.shape[1] - world.features), np.float32)
    scratch = np.empty(world.features, np.float32)

    for t in range(steps):
        for e in range(copies):
            _copy_row(seen[t, e], obs[e])
        forward(actor, policy, obs, copies, output)
        if has_critic:
            forward(critic, judge, obs, copies, judged)
        if world.discrete:
            fill_uniform(u, key, stream, clock + t)
        else:
            fill_normal(noise, key, stream, clock + t)
        fill_normal(shown, reset_key, _NOISE, clock + t + 1)

        any_done, any_truncated = False, False
        for e in range(copies):
            value[t, e] = judged[e, 0]
            if t > 0 and not (terminated[t - 1, e] or truncated[t - 1, e]):
                next_value[t - 1, e] = judged[e, 0]
            if keep_heads:
                _copy_row(heads[t, e], output[e])
            if world.discrete:
                index[t, e], logp[t, e] = _sample_discrete(output[e], u[e], probs)
                chosen = np.float64(index[t, e])
            else:
                logp[t, e] = _sample_continuous(
                    head, output[e], log_std, noise[e * head.actions :], vector[t, e]
                )
                chosen = np.float64(vector[t, e, 0])
            reward[t, e], terminated[t, e] = task_step(world.task, state[e], chosen)
            elapsed[e] += 1
            truncated[t, e] = elapsed[e] >= world.time_limit and not terminated[t, e]
            _observe(world, state[e], shown, e, scratch, obs[e])
            any_done |= terminated[t, e] or truncated[t, e]
            any_truncated |= truncated[t, e]

        if any_truncated and has_critic:
            forward(critic, judge, obs, copies, judged)
        if any_done:
            fill_uniform(draw, reset_key, world.reset_stream, clock + t + 1)
            for e in range(copies):
                if terminated[t, e] or truncated[t, e]:
                    next_value[t, e] = np.float32(0.0) if terminated[t, e] else judged[e, 0]
                    task_reset(world.task, draw[e * world.state_dim :], state[e])
                    elapsed[e] = 0
                    _observe(world, state[e], shown, e, scratch, obs[e])

    if has_critic:
        forward(critic, judge, obs, copies, judged)
    for e in range(copies):
        if not (terminated[steps - 1, e] or truncated[steps - 1, e]):
            next_value[steps - 1, e] = judged[e, 0]


@njit(cache=True)
def _slice(item, threads, tickets):
    """The tickets of one item. Neighbours write to the same cache lines at every step."""
    slices = _SLICES * threads
    return range(item * tickets // slices, (item + 1) * tickets // slices)


@njit(cache=True, error_model="numpy")
def _rollout_slice(
    thread, item, threads, actor, critic, head, world, weight, mask, key, reset_key, stream, clock,
    state, elapsed, obs, seen, index, vector, logp, value, reward, terminated, truncated,
    next_value, heads,
):  # fmt: skip
    for p in _slice(item, threads, key.shape[0]):
        _rollout_ticket(
            actor, critic, head, world, weight[p], mask[p], key[p], reset_key[p], stream, clock,
            state[p], elapsed[p], obs[p], seen[p], index[p], vector[p], logp[p], value[p],
            reward[p], terminated[p], truncated[p], next_value[p], heads[p],
        )  # fmt: skip


@njit(cache=True, nogil=True, error_model="numpy")
def _rollout(threads, arguments):
    share(_rollout_slice, threads, _SLICES * threads, (threads, *arguments))


@njit(cache=True, error_model="numpy")
def _evaluate_ticket(actor, head, world, row, mask, key, index, greedy, total):
    """One episode per copy; the copies still running stay packed at the front.

    A copy whose policy has no finite output ends there and scores NaN.
    """
    copies = total.shape[0]
    features = world.offset.shape[0]
    policy = prepare(row, mask, actor, copies)
    log_std = row[head.log_std : head.log_std + head.actions]
    output = np.empty((copies, actor.sizes[-1]), np.float32)
    obs = np.empty((copies, features), np.float32)
    probs = np.empty(head.actions, np.float32)
    action = np.empty(head.actions, np.float32)
    u = np.empty(copies, np.float32)
    noise = np.zeros(copies * head.actions, np.float32)
    draw = np.empty(copies * world.state_dim, np.float32)
    state = np.empty((copies, world.state_dim), np.float64)
    shown = np.empty(copies * (features - world.features), np.float32)
    scratch = np.empty(world.features, np.float32)
    copy = np.arange(copies)

    fill_uniform(draw, key, _EVAL_RESET, index)
    for e in range(copies):
        task_reset(world.task, draw[e * world.state_dim :], state[e])
        total[e] = 0.0
    running = copies
    for t in range(world.time_limit):
        fill_normal(shown, key, _EVAL_NOISE, (index << 20) | t)
        for e in range(running):
            _observe(world, state[e], shown, copy[e], scratch, obs[e])
        forward(actor, policy, obs, running, output)
        if not greedy:
            if world.discrete:
                fill_uniform(u, key, _EVAL_ACTION, (index << 20) | t)
            else:
                fill_normal(noise, key, _EVAL_ACTION, (index << 20) | t)
        survivors = 0
        for e in range(running):
            c = copy[e]
            if not world.discrete:
                chosen = np.float64(output[e, 0])
                if head.squashed or not greedy:
                    own = noise[c * head.actions :]
                    _sample_continuous(head, output[e], log_std, own, action)
                    chosen = np.float64(action[0])
            elif greedy:
                chosen = np.float64(_greedy(output[e]))
            else:
                sampled, _ = _sample_discrete(output[e], u[c], probs)
                chosen = np.float64(sampled)
            if not (_is_finite(output[e]) and math.isfinite(chosen)):
                total[c] = np.nan
                continue
            reward, terminated = task_step(world.task, state[e], chosen)
            total[c] += reward
            if not terminated:
                copy[survivors] = c
                _copy_row(state[survivors], state[e])
                survivors += 1
        running = survivors
        if running == 0:
            break


@njit(cache=True, error_model="numpy")
def _evaluate_slice(
    thread, item, threads, actor, head, world, weight, mask, key, index, greedy, total
):
    for p in _slice(item, threads, key.shape[0]):
        _evaluate_ticket(actor, head, world, weight[p], mask[p], key[p], index, greedy, total[p])


@njit(cache=True, nogil=True, error_model="numpy")
def _evaluate(threads, arguments):
    share(_evaluate_slice, threads, _SLICES * threads, (threads, *arguments))


def rollout(
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
    """See `reference.rollout`; the heads are ``[P, T, E, 0]`` unless ``keep_heads``.

    ``env.state`` and ``env.elapsed`` change in place, ``env.clock`` does not.
    """
    task = env.task
    tickets, copies, features = obs.shape
    shape = (tickets, steps, copies)
    actions = arena.actions
    outcome = Rollout(
        obs=obs.new_empty((*shape, features)),
        action=obs.new_empty(shape, dtype=torch.int64)
        if task.discrete
        else obs.new_empty((*shape, actions)),
        logp=obs.new_empty(shape),
        value=obs.new_empty(shape),
        reward=obs.new_empty(shape),
        terminated=obs.new_empty(shape, dtype=torch.bool),
        truncated=obs.new_empty(shape, dtype=torch.bool),
        next_value=obs.new_empty(shape),
    )
    index = outcome.action if task.discrete else obs.new_empty((tickets, 0, 0), dtype=torch.int64)
    vector = obs.new_empty((tickets, 0, 0, 0)) if task.discrete else outcome.action
    heads = obs.new_empty((*shape, arena.actor.sizes[-1] if keep_heads else 0))
    obs = obs.clone(memory_format=torch.contiguous_format)
    arguments = (
        network(arena.actor, arena, density, copies),
        _critic(arena, density, copies),
        _head(arena, env.task),
        _world(env.task, env.offset, env.scale, env.reset_stream, env.source),
        _array(weight),
        _array(mask),
        _array(key),
        _array(env.restart_key),
        stream,
        int(env.clock),
        env.state.numpy(),
        env.elapsed.numpy(),
        obs.numpy(),
        outcome.obs.numpy(),
        index.numpy(),
        vector.numpy(),
        outcome.logp.numpy(),
        outcome.value.numpy(),
        outcome.reward.numpy(),
        outcome.terminated.numpy(),
        outcome.truncated.numpy(),
        outcome.next_value.numpy(),
        heads.numpy(),
    )
    work = _WORK * tickets * steps * copies
    _rollout(count_threads(tickets, work), arguments)
    return outcome, heads, obs


def evaluate(
    weight: Tensor,
    mask: Tensor,
    arena: Arena,
    task: Task,
    copies: int,
    offset: Tensor,
    scale: Tensor,
    key: Tensor,
    index: int,
    greedy: bool,
    density: float,
    source: Tensor | None,
) -> Tensor:
    """See `sparse_tickets.kernels.rollout.evaluate`."""
    total = key.new_empty((key.shape[0], copies), dtype=torch.float64)
    arguments = (
        network(arena.actor, arena, density, copies),
        _head(arena, task),
        _world(task, offset, scale, _EVAL_RESET, source),
        _array(weight),
        _array(mask),
        _array(key),
        index,
        greedy,
        total.numpy(),
    )
    work = _WORK * total.numel() * task.time_limit
    _evaluate(count_threads(len(key), work), arguments)
    return total.float()


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


def _critic(arena: Arena, density: float, copies: int) -> RolloutNet:
    if arena.critic is not None:
        return network(arena.critic, arena, density, copies)
    empty = np.empty(0, np.int64)
    return RolloutNet(empty, empty, empty, 0, 0, empty, 0, sparse=False)


def _head(arena: Arena, task: Task) -> _Head:
    log_std = arena.size if arena.log_std is None else arena.log_std
    low, half = task.action_low, half_spans(task.action_low, task.action_high)
    bounds = np.array(low, np.float32), np.array(half, np.float32)
    return _Head(arena.actions, log_std, arena.squashed, *bounds)


def _world(
    task: Task, offset: Tensor, scale: Tensor, reset_stream: int, source: Tensor | None
) -> _World:
    return _World(
        task.id,
        task.state_dim,
        task.discrete,
        task.time_limit,
        int(reset_stream),
        _array(offset),
        _array(scale),
        task.observation_dim,
        np.empty(0, np.int64) if source is None else _array(source),
    )
