"""The training step in Numba: a ticket per thread, from gather to Adam in cache.

Per minibatch and panel of samples: actor forward, the head's policy loss, actor backward; where the
layout has one, critic forward, value loss, critic backward; then clipping and Adam on the packed
parameters. `bind` compiles that for one head; only the head's entry is kept on disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ..compiling import njit
from ..mlp.cpu import FIRST, backward, clear_gradient, collect_gradient, forward, gather
from ..mlp.layout import PANEL, Layout, prepare
from ..mlp.packing import open_scratch, pack, read_row, turn, turn_values, write_row
from ..update.cpu import adam_row
from ..vector import LANES
from . import Update


class Head(NamedTuple):
    """What an algorithm puts into the frame: functions compiled by Numba.

    Losses read the network's output and the sample, in the panel `Layout.head`. They write the
    gradient by the output to the panel `Layout.delta`, zero from ``columns`` to ``width``, add that
    by `log_std` to the packed gradient, and add to the statistics ``measured``.

    Attributes:
        scratch: rows of `Layout.head` that are the losses' own; those of the sample follow.
        draw: ``draw(order, words, key, number, samples, measured)`` writes the indices of a draw to
            ``order[0]``, all int32 ``[2, drawn]``; ``words`` is uint32 scratch of that shape.
        prepare: ``prepare(layout, packed, obs, sample, index, config)`` returns what the losses
            need to know of a whole minibatch; it may run the networks, and write into ``sample``.
        policy_loss: ``policy_loss(layout, packed, columns, width, size, prepared, config,
            measured)`` of a panel of a minibatch of ``size`` samples.
        value_loss: likewise, of the critic's output; never called without a critic.
    """

    scratch: int
    draw: Callable[..., Any]
    prepare: Callable[..., Any]
    policy_loss: Callable[..., Any]
    value_loss: Callable[..., Any]


class Steps(NamedTuple):
    """How many updates of how many samples, and Adam's numbers; no clipping is infinite."""

    first: int
    draws: int
    drawn: int
    size: int
    max_norm: float
    beta1: float
    beta2: float
    eps: float


def bind(head: Head) -> Any:
    """The updates of one ticket by a head, for `threads.share`."""
    draw, prepare_minibatch = head.draw, head.prepare
    policy_loss, value_loss = head.policy_loss, head.value_loss
    scratch = head.scratch * PANEL

    @njit
    def add_gradient(layout, packed, index, obs, sample, config, measured):
        """Add up the gradient of one minibatch, panel by panel."""
        actor, depth = layout.actor_layers, layout.layers.shape[0]
        size = index.size
        prepared = prepare_minibatch(layout, packed, obs, sample, index, config)
        for first in range(0, size, PANEL):
            rows = index[first : first + PANEL]
            columns = rows.size
            width = (columns + LANES - 1) // LANES * LANES
            gather(packed.space, layout.x, obs, rows, columns, width)
            gather(packed.space, layout.head + scratch, sample, rows, columns, width)

            forward(layout, packed, FIRST, actor, width)
            policy_loss(layout, packed, columns, width, size, prepared, config, measured)
            backward(layout, packed, FIRST, actor, columns, width, False, True)
            if actor < depth:
                forward(layout, packed, actor, depth, width)
                value_loss(layout, packed, columns, width, size, prepared, config, measured)
                backward(layout, packed, actor, depth, columns, width, False, True)

    @njit
    def update_ticket(
        thread, ticket, layout, floats, integers, parameters, data, key, lr, steps, config, measured
    ):
        weights, masks, ms, vs, counts = parameters
        source = data[0][ticket]
        obs, sample = data[1][source], data[2][source]
        packed = open_scratch(layout, floats[thread], integers[thread])
        order = np.empty((2, steps.drawn), np.int32)
        words = np.empty((2, steps.drawn), np.uint32)
        mask = masks[ticket]
        count = pack(layout, packed, mask, True)
        turn(layout, packed, False)
        read_row(layout, packed, mask, weights[ticket], packed.weight)
        read_row(layout, packed, mask, ms[ticket], packed.m)
        read_row(layout, packed, mask, vs[ticket], packed.v)
        for number in range(steps.first, steps.first + steps.draws):
            draw(order, words, key[ticket], number, obs.shape[0], measured[ticket])
            for begin in range(0, steps.drawn, steps.size):
                index = order[0, begin : begin + steps.size]
                clear_gradient(layout, packed, count)
                turn_values(layout, packed, False)
                add_gradient(layout, packed, index, obs, sample, config, measured[ticket])
                collect_gradient(layout, packed, mask)
                counts[ticket] += 1
                # The last of the statistics is the norm.
                measured[ticket, -1] += adam_row(
                    packed.weight[:count],
                    packed.grad[:count],
                    packed.m[:count],
                    packed.v[:count],
                    mask[:0],
                    lr[ticket],
                    counts[ticket],
                    steps.max_norm,
                    steps.beta1,
                    steps.beta2,
                    steps.eps,
                )
        write_row(layout, packed, mask, packed.weight, weights[ticket])
        write_row(layout, packed, mask, packed.m, ms[ticket])
        write_row(layout, packed, mask, packed.v, vs[ticket])

    return update_ticket


def train(
    entry: Callable[..., None],
    layout: Layout,
    update: Update[Any],
    source: Tensor,
    obs: Tensor,
    sample: Tensor,
    config: tuple,
    *,
    first: int,
    draws: int,
    drawn: int,
    size: int,
    statistics: int,
) -> np.ndarray:
    """Train every ticket; returns the statistics ``[P, statistics]`` float64, sums of the head's.

    Args:
        entry: ``entry(threads, tickets, arguments)`` shares out what `bind` made.
        layout: of the networks that take part, with room for the sample and the head.
        update: the parameters, keys, learning rates and numbers of Adam.
        source: ``[P]`` int64, the row of ``obs`` and ``sample`` a ticket learns from.
        obs: ``[D, n, I]`` float32.
        sample: ``[D, n, columns]`` float32, what else the head knows of each sample.
        config: of the head, a tuple of plain numbers.
        first: number of the first draw.
        draws: how many.
        drawn: samples per draw.
        size: samples per minibatch; divides ``drawn``.
        statistics: how many the head measures, and the gradient's norm.
    """
    tickets, optimiser = len(update.key), update.config
    threads, floats, integers = prepare(layout, tickets, draws * drawn)
    measured = np.zeros((tickets, statistics))
    steps = Steps(
        first,
        draws,
        drawn,
        size,
        math.inf if optimiser.max_norm is None else float(optimiser.max_norm),
        float(optimiser.beta1),
        float(optimiser.beta2),
        float(optimiser.eps),
    )
    arguments = (
        layout,
        floats,
        integers,
        tuple(tensor.numpy() for tensor in update.parameters),
        tuple(tensor.detach().contiguous().numpy() for tensor in (source, obs, sample)),
        update.key.numpy(),
        update.lr.double().numpy(),
        steps,
        config,
        measured,
    )
    entry(threads, tickets, arguments)
    return measured
