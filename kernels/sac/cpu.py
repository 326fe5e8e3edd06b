"""SAC's updates on a CPU: the networks by the kernels of `mlp`, what is between them in Numba.

Whatever of an update lies between the networks' passes is one loop over a ticket's samples, so a
ticket's bits depend on nothing beside it. Transitions and noise of many updates are drawn at once.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from ..arena import Net
from ..compiling import njit
from ..mlp.cpu import mlp, mlp_backward
from ..squashed.cpu import sample, scale_of
from ..squashed.reference import LOG_STD_RANGE
from ..threads import count_threads, share
from ..training import Update
from ..training.reference import adam_step_
from ..transitions import Transitions, runs, take
from .reference import draw_noise

if TYPE_CHECKING:
    from . import SACConfig

_LOSS, _VALUE, _ENTROPY, _TEMPERATURE, _NORM, _STATISTICS = range(6)
_LOWEST, _HIGHEST = (np.float32(bound) for bound in LOG_STD_RANGE)
_ZERO, _ONE, _TWO = (np.float32(number) for number in (0.0, 1.0, 2.0))
# Work per sample, in the units of `count_threads`.
_WORK = 64


@njit(cache=True, error_model="numpy")
def _judge_ticket(
    thread, ticket, log_alpha, reward, discount, logp, following, values, slopes, measured
):
    """Of both critics, the gradients by what they say of actions taken, and of the policy's own."""
    size = reward.shape[1]
    scale = np.float32(1.0 / size)
    alpha = math.exp(log_alpha[ticket])
    loss, mean = 0.0, 0.0
    for b in range(size):
        wanted = reward[ticket, b]
        if discount[ticket, b] != _ZERO:
            lower = min(following[0, ticket, b], following[1, ticket, b])
            wanted += discount[ticket, b] * (lower - alpha * logp[ticket, b])
        for critic in range(2):
            error = values[critic, ticket, b] - wanted
            slopes[critic, ticket, b] = error * scale
            loss += 0.5 * error * error
        own = size + b
        lower = 1 if values[1, ticket, own] < values[0, ticket, own] else 0
        slopes[lower, ticket, own] = -scale
        slopes[1 - lower, ticket, own] = _ZERO
        mean += values[lower, ticket, own]
    measured[ticket, _LOSS] += loss / size
    measured[ticket, _VALUE] += mean / size
    measured[ticket, _TEMPERATURE] += alpha


@njit(cache=True, error_model="numpy")
def _improve_ticket(
    thread, ticket, log_alpha, target_entropy, head, noise, action, logp, pull, d_head, surplus,
    measured,
):  # fmt: skip
    """The gradients by the actor's outputs, and by the logarithm of the temperature.

    ``pull [2, P, B, D + A]`` has the gradients of minus the lower critic's mean by its inputs.
    """
    size, actions = action.shape[1], action.shape[2]
    features = pull.shape[3] - actions
    scale = np.float32(1.0 / size)
    alpha = math.exp(log_alpha[ticket])
    entropy = 0.0
    for b in range(size):
        own = size + b
        entropy -= logp[ticket, own]
        for a in range(actions):
            squashed = action[ticket, b, a]
            slope = pull[0, ticket, b, features + a] + pull[1, ticket, b, features + a]
            slope *= _ONE - squashed * squashed
            slope += scale * alpha * _TWO * squashed
            d_head[ticket, b, a] = slope
            log_std = head[ticket, own, actions + a]
            if log_std < _LOWEST or log_std > _HIGHEST:
                d_head[ticket, b, actions + a] = _ZERO
            else:
                moved = math.exp(scale_of(log_std)) * noise[ticket, own, a]
                d_head[ticket, b, actions + a] = slope * moved - scale * alpha
    entropy /= size
    surplus[ticket] = entropy - target_entropy
    measured[ticket, _ENTROPY] += entropy


@njit(cache=True, nogil=True)
def _judge(threads, arguments):
    share(_judge_ticket, threads, arguments[0].shape[0], arguments)


@njit(cache=True, nogil=True)
def _improve(threads, arguments):
    share(_improve_ticket, threads, arguments[0].shape[0], arguments)


def sac_update_(
    update: Update[SACConfig], target: Tensor, replay: Transitions, stored: int
) -> Tensor:
    """Statistics ``[5, P]``; see the op."""
    parameters, arena, key, first_update, _, config, _ = update
    measured = np.zeros((len(key), _STATISTICS))
    size = config.batch
    for begin, updates in runs(config.updates, size):
        first = first_update + begin
        drawn = take(replay, stored, key, first, updates, size)
        noise = draw_noise(key, first, config, updates, arena.actions)
        for number in range(updates):
            span = slice(number * size, (number + 1) * size)
            batch = type(drawn)(*(field[:, span].contiguous() for field in drawn))
            own_noise = noise[:, number].flatten(1, 2).contiguous()
            grad = _gradient(update, target, batch, own_noise, measured)
            measured[:, _NORM] += adam_step_(update, grad).numpy()
            target.lerp_(parameters.weight, config.tau)
    return torch.from_numpy(np.ascontiguousarray(measured.T / config.updates, np.float32))


def _gradient(
    update: Update[SACConfig],
    target: Tensor,
    batch: Transitions,
    noise: Tensor,
    measured: np.ndarray,
) -> Tensor:
    """Of the three losses by all parameters, ``[P, size]``; ``noise [P, 2B, A]``."""
    (weight, mask, *_), arena, _, _, _, config, density = update
    begin = arena.temperature or 0
    tickets, size = batch.reward.shape
    log_alpha = weight[:, begin].contiguous().numpy()
    threads = count_threads(tickets, _WORK * noise.numel())

    both = torch.cat([batch.next_obs, batch.obs], 1)
    head = mlp(both, weight, arena.actor, mask, density)
    action, logp = sample(head, noise)
    imagined = torch.cat([both, action], -1)
    taken, own = torch.cat([batch.obs, batch.action], -1), imagined[:, size:].contiguous()
    judged = torch.cat([taken, own], 1)
    following = [mlp(imagined[:, :size], target, net, mask, density) for net in arena.critics]
    values = [mlp(judged, weight, net, mask, density) for net in arena.critics]
    slopes = weight.new_empty((2, tickets, 2 * size))
    _judge(
        threads,
        (
            log_alpha,
            batch.reward.numpy(),
            batch.discount.numpy(),
            logp.numpy(),
            torch.stack(following).squeeze(-1).numpy(),
            torch.stack(values).squeeze(-1).numpy(),
            slopes.numpy(),
            measured,
        ),
    )
    errors, leanings = (part.unsqueeze(-1) for part in slopes.split(size, -1))
    pull = [
        mlp_backward(own, weight, net, mask, density, leaning, to_weight=False)[0]
        for net, leaning in zip(arena.critics, leanings, strict=True)
    ]
    d_head, surplus = weight.new_empty((tickets, size, head.shape[-1])), weight.new_empty(tickets)
    _improve(
        threads,
        (
            log_alpha,
            np.float32(config.target_entropy),
            head.numpy(),
            noise.numpy(),
            action[:, size:].numpy(),
            logp.numpy(),
            torch.stack(cast("list[Tensor]", pull)).numpy(),
            d_head.numpy(),
            surplus.numpy(),
            measured,
        ),
    )

    def by_weight(net: Net, x: Tensor, dy: Tensor) -> Tensor:
        found = mlp_backward(x, weight, net, mask, density, dy, to_input=False)[1]
        return cast("Tensor", found)

    grad = by_weight(arena.actor, batch.obs, d_head)
    for net, error in zip(arena.critics, errors, strict=True):
        grad += by_weight(net, taken, error)
    grad[:, begin] = surplus
    return grad
