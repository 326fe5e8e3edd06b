"""DQN's updates on a GPU: the transitions of many gathered at once, then `training.gpu`'s updates.

Over these transitions the target networks run in one call; only which action a double DQN would
take next has to wait for its update. Nothing waits for the device.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..arena import Arena
from ..examples import Example, meta
from ..mlp import mlp
from ..training import Update, fused_gpu
from ..training.gpu import Learner
from ..training.head_gpu import Minibatch
from ..training.loss_gpu import Outputs, loss_and_gradient
from .head_gpu import head
from .reference import bootstrap, draws

if TYPE_CHECKING:
    from ..transitions import Transitions
    from . import DQNConfig


def dqn_update_(
    update: Update[DQNConfig], target: Tensor, replay: Transitions, stored: int
) -> Tensor:
    """Statistics ``[3, P]``; see the op."""
    (weight, mask, *_), arena, key, _, _, config, density = update
    net, size = arena.actor, config.batch
    learner = Learner(update, (net,), size, config.updates, head="dqn", statistics=2)
    taken = 0
    for updates, drawn in draws(update, replay, stored) if len(key) else ():
        values = mlp(drawn.next_obs, target, net, mask, density=density)
        wanted = bootstrap(drawn, values, values)
        loss = head(config.loss, drawn.action, wanted)
        # They were gathered in the order of the draws.
        order = torch.arange(updates * size, device=key.device).expand(len(key), -1).contiguous()
        for number in range(updates):
            span = slice(number * size, (number + 1) * size)
            if config.double:
                batch = type(drawn)(*(field[:, span] for field in drawn))
                judges = mlp(batch.next_obs, weight, net, mask, density=density)
                wanted[:, span] = bootstrap(batch, values[:, span], judges)
            minibatch = Minibatch(order, span.start, size, updates * size)
            part = partial(_part, drawn.obs, span)
            learner.take_(taken + number, loss, drawn.obs, minibatch, part)
        taken += updates
    return learner.statistics()


def _part(obs: Tensor, span: slice) -> Tensor:
    return obs[:, span]


def _gradient_example(sizes: tuple[int, ...], activation: str, kind: str) -> None:
    arena = Arena.build(sizes, activation=activation)
    loss = head(kind, meta(2, 36, dtype=torch.int64), meta(2, 36))
    minibatch = Minibatch(meta(2, 36, dtype=torch.int64), 12, 12, 36)
    weight, obs = meta(2, arena.size), meta(2, 36, sizes[0])
    fused_gpu.gradient(weight, arena, arena.nets, obs, loss, minibatch, meta(2, 1, 2), 32)


def _loss_example(actions: int, count: int, kind: str) -> None:
    samples = 3 * count
    loss = head(kind, meta(2, samples, dtype=torch.int64), meta(2, samples))
    values = (meta(2, count, actions),)
    minibatch = Minibatch(meta(2, samples, dtype=torch.int64), count, count, samples)
    loss_and_gradient(loss, minibatch, meta(2, 2), Outputs(values, None, values, None))


EXAMPLES = [
    *(
        Example(f"{kind}_{name}", partial(_loss_example, actions, count, kind))
        for name, actions, count, kind in (
            ("short", 2, 128, "huber"),
            ("long", 2, 1024, "huber"),
            ("wide", 18, 1024, "squared"),
        )
    ),
    *fused_gpu.examples(_gradient_example, ("huber", "squared")),
]
