"""Rollouts as a plain loop of act and step: any environment, any device, and the contract.

The policy of every ticket acts on that ticket's E environment copies; nothing crosses tickets.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arena import Arena, Net
from ..mlp.reference import mlp
from ..random import Stream, categorical, normal, uniform
from ..squashed import sample, within_bounds
from ..squashed.reference import distribution

Apply = Callable[[Tensor, Net], Tensor]

_MAX_EPISODE = 1 << 20


class Rollout(NamedTuple):
    """T steps of P tickets in E environment copies each.

    Attributes:
        obs: ``[P, T, E, D]`` float32, scaled: what the policy saw.
        action: ``[P, T, E]`` int64, or ``[P, T, E, A]`` float32 as sampled, not clipped.
        logp: ``[P, T, E]`` float32, log-probability (density) of the action.
        value: ``[P, T, E]`` float32, the critic of `obs`; zero without a critic.
        reward: ``[P, T, E]`` float32.
        terminated: ``[P, T, E]`` bool.
        truncated: ``[P, T, E]`` bool.
        next_value: ``[P, T, E]`` float32, the critic of the true successor: zero where the episode
            terminated, the value of its last observation where it was only truncated.
    """

    obs: Tensor
    action: Tensor
    logp: Tensor
    value: Tensor
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    next_value: Tensor

    def flatten(self) -> Rollout:
        """The same with steps and copies as one axis: ``[P, T * E, ...]``."""
        return Rollout(*(field.flatten(1, 2) for field in self))


def rollout(
    weight: Tensor,
    arena: Arena,
    env: Any,
    obs: Tensor,
    key: Tensor,
    steps: int,
    stream: int,
    apply: Apply | None = None,
) -> tuple[Rollout, Tensor, Tensor]:
    """See `sparse_tickets.kernels.rollout.rollout`; also returns the heads ``[P, T, E, A]``.

    ``apply`` runs a network on ``[P, E, D]``; by default plain torch does.
    """
    policy = _Policy(weight, arena, env, apply)
    records, heads = [], []
    value = policy.value(obs)
    for _ in range(steps):
        head = policy.head(obs)
        action, logp = policy.sample(head, key, stream, env.clock)
        next_obs, reward, terminated, truncated, final_obs = env.step(action)
        next_value = policy.value(next_obs)
        done = terminated | truncated
        successor = torch.where(done, policy.value(final_obs), next_value)
        successor = torch.where(terminated, 0.0, successor)
        record = (obs, action, logp, value, reward.float(), terminated, truncated, successor)
        records.append(Rollout(*record))
        heads.append(head)
        obs, value = next_obs, next_value
    fields = (torch.stack(field, dim=1) for field in zip(*records, strict=True))
    return Rollout(*fields), torch.stack(heads, dim=1), obs


def evaluate(
    weight: Tensor,
    arena: Arena,
    env: Any,
    obs: Tensor,
    key: Tensor,
    index: int,
    greedy: bool,
    apply: Apply | None = None,
) -> Tensor:
    """See `sparse_tickets.kernels.rollout.evaluate`; ``env`` starts from ``obs [P, E, D]``.

    ``apply`` is that of `rollout`.
    """
    policy = _Policy(weight, arena, env, apply)
    total = torch.zeros(obs.shape[:2], dtype=torch.float64, device=obs.device)
    running = torch.ones_like(total, dtype=torch.bool)
    rest = getattr(env, "rest", None)
    for t in range(_MAX_EPISODE):
        if not running.any():
            return total.float()
        head = policy.head(obs)
        if greedy:
            action = policy.best(head)
        else:
            action, _ = policy.sample(head, key, Stream.EVAL_ACTION, (index << 20) | t)
        finite = head.isfinite().all(-1)
        if arena.continuous:
            finite &= action.isfinite().all(-1)
        lost = running & ~finite
        total.masked_fill_(lost, math.nan)
        running &= ~lost
        if rest is not None:
            rest(~running)
        obs, reward, terminated, truncated, _ = env.step(action)
        total += torch.where(running, reward, 0.0)
        running &= ~(terminated | truncated)
    raise ValueError(
        f"env must end its episodes within {_MAX_EPISODE} steps, {env.spec.name} ran on"
    )


def targets(weight: Tensor, arena: Arena, head: Tensor) -> Tensor:
    """What a student imitates: log-probabilities, or mean and log standard deviation."""
    if not arena.continuous:
        return head.log_softmax(-1)
    if arena.squashed:
        return torch.cat(distribution(head), -1)
    log_std = _log_std(weight, arena)[:, None, None, :].expand_as(head)
    return torch.cat([head, log_std], dim=-1)


class _Policy:
    """Actor, critic and action distribution of a population."""

    def __init__(
        self, weight: Tensor, arena: Arena, env: Any = None, apply: Apply | None = None
    ) -> None:
        self.weight, self.arena, self.env = weight, arena, env
        self._apply = apply or (lambda obs, net: mlp(obs, weight, net, None))

    def head(self, obs: Tensor) -> Tensor:
        """Logits ``[P, E, A]``, or means."""
        return self._apply(obs, self.arena.actor)

    def value(self, obs: Tensor) -> Tensor:
        """State values ``[P, E]``; zeros without a critic."""
        if self.arena.critic is None:
            return obs.new_zeros(obs.shape[:2], dtype=torch.float32)
        return self._apply(obs, self.arena.critic)[..., 0]

    def best(self, head: Tensor) -> Tensor:
        """The most probable action per copy, or the mean, squashed where samples are."""
        if not self.arena.continuous:
            return head.argmax(-1)
        if self.arena.squashed:
            return self._squash(head, torch.zeros_like(head[..., ::2]))[0]
        return head

    def sample(self, head: Tensor, key: Tensor, stream: int, step: int) -> tuple[Tensor, Tensor]:
        """An action per copy, and its log-probability ``[P, E]``.

        Logits that are no distribution give action 0, and NaN, which training carries on.
        """
        copies = head.shape[1]
        if not self.arena.continuous:
            probs = head.softmax(-1)
            valid = probs.isfinite().all(-1)
            u = uniform(key, copies, stream=stream, step=step)
            drawn = categorical(torch.where(valid[..., None], probs, 1.0), u)
            action = torch.where(valid, drawn, 0)
            logp = head.log_softmax(-1).gather(-1, action[..., None])[..., 0]
            return action, torch.where(valid, logp, math.nan)
        actions = self.arena.actions
        noise = normal(key, copies * actions, stream=stream, step=step)
        noise = noise.view(*head.shape[:2], actions)
        if self.arena.squashed:
            return self._squash(head, noise)
        log_std = _log_std(self.weight, self.arena)[:, None]
        action = head + log_std.exp() * noise
        surprise = 0.5 * ((action - head) / log_std.exp()) ** 2 + log_std
        return action, -(surprise + 0.5 * math.log(2 * math.pi)).sum(-1)

    def _squash(self, head: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Within the environment's bounds; the density is that of actions in [-1, 1]."""
        action, logp = sample(head, noise)
        limits = self.env.spec if self.env.task is None else self.env.task
        return within_bounds(action, limits.action_low, limits.action_high), logp


def _log_std(weight: Tensor, arena: Arena) -> Tensor:
    begin = arena.log_std
    if begin is None:
        raise ValueError("arena must be continuous to have a log_std, got a discrete one")
    return weight[:, begin : begin + arena.actor.sizes[-1]]
