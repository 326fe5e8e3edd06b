"""The gradient of a minibatch of PPO in one Triton launch, for networks that registers hold.

PPO's loss splits by network: the policy's and the entropy's terms need the actor alone, the value's
the critic alone. So a program takes a stretch of the minibatch through one network, tile by tile:
it reads the samples through the minibatch's indices, keeps activations, outputs and the gradient of
every weight in registers, and writes these once, as one row of the arena per stretch, which
`update.gpu.adam_` adds in order. No atomics: a result depends neither on P nor on timing.
"""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations_gpu import deactivate
from ..arena import Arena
from ..examples import Example, meta
from ..jit import jit_kernel
from ..launch import Launch
from ..mlp import fused_gpu as mlp
from ..mlp.fused_gpu import hidden_layers, load_bias, load_weight, store_gradients, zeros
from ..mlp.geometry import Geometry
from ..mlp.launches_gpu import FUSED_STRETCH, cut
from ..tuning import prefer
from .loss_gpu import load_spread, policy_loss, standardise, store_policy_sums, value_loss

if TYPE_CHECKING:
    from . import Batch, PPOConfig

NARROW = 32
"""Width up to which any network fits that goes back in one launch."""

MOST_LAYERS = 3
"""Of wider ones, and of what narrower ones may be tuned to: four spill on some GPU."""

_WALK = 512
"""Advantages that a program reads at once for their mean and deviation."""

_STRETCHES = tuple(Launch(samples=samples) for samples in (FUSED_STRETCH, 32, 128, 256))
"""Samples whose gradient a program sums up, the default first."""


@triton.jit
def _load_rows(field, at, inside, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Rows ``at`` of a field ``[., SIZE]``, zero where nothing is."""
    col = tl.arange(0, BLOCK)[None, :]
    there = inside[:, None] & (col < SIZE)
    return tl.load(field + at[:, None] * SIZE + col, mask=there, other=0.0)


@triton.jit
def _add_gradients(
    grads,
    bias_grads,
    delta,
    inputs,
    weight,
    SIZES: tl.constexpr,
    BLOCKS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    MASKED: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Both sums with a tile's gradients, from the output's ``delta [rows, out]`` down."""
    DEPTH: tl.constexpr = len(SIZES) - 1
    new_grads = ()
    new_bias_grads = ()
    for layer in tl.static_range(DEPTH - 1, -1, -1):
        grad = tl.dot(
            tl.trans(delta), inputs[layer], grads[DEPTH - 1 - layer], input_precision="ieee"
        )
        new_grads += (grad,)  # [out, inp]
        new_bias_grads += (bias_grads[DEPTH - 1 - layer] + delta,)  # [rows, out]
        if layer > 0:
            matrix = load_weight(weight, None, layer, SIZES, BLOCKS, WEIGHTS, MASKED)
            delta = tl.dot(delta, matrix, input_precision="ieee")  # [rows, inp]
            delta = deactivate(delta, inputs[layer], ACTIVATION)
    return new_grads, new_bias_grads


@triton.jit
def _learn(
    tensors,
    numbers,
    SIZES: tl.constexpr,
    BLOCKS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BIASES: tl.constexpr,
    MASKED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACTOR: tl.constexpr,
    LOG_STD: tl.constexpr,
    NORMALISE: tl.constexpr,
    CLIP_VALUE: tl.constexpr,
    ROWS: tl.constexpr,
    WALK: tl.constexpr,
):
    """`gradient_kernel` for one of the networks."""
    weight, obs, action, logp, old_value, advantage, target, order, rows, sums = tensors
    size, samples, first, count, stretch, clip, value_coef, entropy_coef = numbers
    DEPTH: tl.constexpr = len(SIZES) - 1
    OUT: tl.constexpr = SIZES[DEPTH]
    WIDE: tl.constexpr = BLOCKS[DEPTH]
    ticket = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    place = ticket * tl.num_programs(1) + split
    weight += ticket * size
    rows += place * size
    sums += place * 5

    head = tl.arange(0, WIDE)
    lane = tl.arange(0, ROWS)
    zero = tl.zeros([ROWS], tl.float32)
    if ACTOR:
        scale = (0.0, 1.0)
        if NORMALISE:
            scale = standardise(advantage, order, ticket, samples, first, count, WALK)
        spread = load_spread(None if LOG_STD is None else weight + LOG_STD, OUT, WIDE)
        spread_gradient = tl.zeros([WIDE], tl.float32)
        policy_sum, entropy_sum, kl_sum, clipped_sum = zero, zero, zero, zero
    else:
        value_sum = zero
    # From the output down; the bias's has a row for each of the tile's, added up once at the end.
    grads = ()
    bias_grads = ()
    for layer in tl.static_range(DEPTH - 1, -1, -1):
        grads += (zeros(BLOCKS[layer + 1], BLOCKS[layer]),)  # [out, inp]
        bias_grads += (zeros(ROWS, BLOCKS[layer + 1]),)  # [rows, out]

    begin = split * stretch
    for done in range(begin, tl.minimum(begin + stretch, count), ROWS):
        inside = done + lane < count
        index = tl.load(order + ticket * samples + first + done + lane, mask=inside, other=0)
        at = (ticket, samples, index, inside)
        tile = _load_rows(obs, ticket * samples + index, inside, SIZES[0], BLOCKS[0])
        inputs = hidden_layers(
            tile, weight, None, DEPTH, SIZES, BLOCKS, WEIGHTS, BIASES, MASKED, ACTIVATION
        )
        matrix = load_weight(weight, None, DEPTH - 1, SIZES, BLOCKS, WEIGHTS, MASKED)
        shift = load_bias(weight, BIASES[DEPTH - 1], OUT, WIDE)
        output = tl.dot(inputs[DEPTH - 1], tl.trans(matrix), input_precision="ieee") + shift
        if ACTOR:
            batch = (action, logp, advantage)
            goal = (count, clip, entropy_coef)
            delta, by_spread, policy, entropy, kl, clipped = policy_loss(
                output, spread, batch, at, scale, *goal, LOG_STD is not None, OUT, WIDE
            )
            spread_gradient += by_spread
            policy_sum += policy
            entropy_sum += entropy
            kl_sum += kl
            clipped_sum += clipped
        else:
            only = head[None, :] == 0
            value = tl.sum(tl.where(only, output, 0.0), 1)  # [rows]
            slope, error = value_loss(
                value, old_value, target, at, count, clip, value_coef, CLIP_VALUE
            )
            delta = tl.where(only, slope[:, None], 0.0)  # [rows, out]
            value_sum += error
        grads, bias_grads = _add_gradients(
            grads, bias_grads, delta, inputs, weight, SIZES, BLOCKS, WEIGHTS, MASKED, ACTIVATION
        )

    store_gradients(rows, None, grads, bias_grads, count, SIZES, BLOCKS, WEIGHTS, BIASES, MASKED)
    if ACTOR:
        if LOG_STD is not None:
            # The entropy's part is no sample's: the first stretch has it.
            of_entropy = tl.where(split == 0, entropy_coef, 0.0)
            tl.store(rows + LOG_STD + head, spread_gradient - of_entropy, mask=head < OUT)
        store_policy_sums(sums, policy_sum, entropy_sum, kl_sum, clipped_sum)
    else:
        tl.store(sums + 1, tl.sum(value_sum, 0))


@jit_kernel(fp_fusion=True)
def gradient_kernel(
    weight,  # [P, size]
    obs,  # [P, samples, inputs]
    action,  # [P, samples], or with [actions] where they are continuous
    logp,  # [P, samples], as the next three
    old_value,
    advantage,
    target,
    order,  # [P, samples], of which the minibatch is a part
    rows,  # [P, stretches, size], written
    sums,  # [P, stretches, 5], written
    size,
    samples,
    first,
    count,
    stretch,
    clip,
    value_coef,
    entropy_coef,
    ACTOR: tl.constexpr,
    CRITIC: tl.constexpr,
    MASKED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LOG_STD: tl.constexpr,
    NORMALISE: tl.constexpr,
    CLIP_VALUE: tl.constexpr,
    ROWS: tl.constexpr,
    WALK: tl.constexpr,
):
    """Gradient of a ticket's network over ``stretch`` samples of the minibatch, and what they sum.

    Samples ``order[p, first : first + count]``; the axes of the grid are ticket, stretch, and actor
    or critic. A ticket takes 6·count·(weights) FLOPs, less 2 for the first layers, whose input
    needs no gradient. Each stretch reads the weights once, and writes its row of gradients; the
    samples are read once, and every actor's stretch walks all of the minibatch's advantages twice.
    ``ACTOR`` and ``CRITIC`` are sizes, blocks, and offsets of weights and biases.
    """
    tensors = (weight, obs, action, logp, old_value, advantage, target, order, rows, sums)
    numbers = (size, samples, first, count, stretch, clip, value_coef, entropy_coef)
    if tl.program_id(2) == 0:
        _learn(
            tensors,
            numbers,
            *ACTOR,
            MASKED,
            ACTIVATION,
            True,
            LOG_STD,
            NORMALISE,
            False,
            ROWS,
            WALK,
        )
    else:
        _learn(
            tensors,
            numbers,
            *CRITIC,
            MASKED,
            ACTIVATION,
            False,
            None,
            False,
            CLIP_VALUE,
            ROWS,
            WALK,
        )


def fits(arena: Arena) -> bool:
    """Whether registers hold the gradients of narrow networks beside their loss, on every GPU."""
    return all(max(net.sizes) <= NARROW or net.depth <= MOST_LAYERS for net in arena.nets)


def gradient(
    weight: Tensor,
    arena: Arena,
    order: Tensor,
    first: int,
    batch: Batch,
    config: PPOConfig,
    rows: Tensor,
    sums: Tensor,
    stretch: int,
) -> None:
    """Gradient of a minibatch's loss for every parameter, in stretches; see `reference.loss`.

    Args:
        weight: ``[P, size]`` float32, zero off the mask; contiguous, as all tensors here.
        arena: of networks that `fits`.
        order: ``[P, S]`` int64; the minibatch is ``order[:, first : first + M]``.
        first: see `order`.
        batch: of all S samples.
        config: of the loss.
        rows: ``[P, stretches, size]`` float32, written.
        sums: ``[P, stretches, SUMS]`` float32, written.
        stretch: samples of all stretches but the last; see `cut_minibatch`.
    """
    tickets, splits, size = rows.shape
    samples = order.shape[1]
    count = samples // config.minibatches
    launch = _prefer_launch(arena, batch, count)
    with torch.cuda.device_of(weight):
        gradient_kernel[(tickets, splits, 2)](
            weight,
            *batch,
            order,
            rows,
            sums,
            size,
            samples,
            first,
            count,
            stretch,
            config.clip,
            config.value_coef,
            config.entropy_coef,
            **_constants(arena),
            NORMALISE=config.normalise_advantage,
            CLIP_VALUE=config.clip_value,
            **launch.constexprs,
            **launch.options,
        )


def cut_minibatch(arena: Arena, batch: Batch, count: int) -> tuple[int, int]:
    """How many stretches ``count`` samples make, and the length of all but the last.

    By the shapes of one ticket, or as was measured for them.
    """
    chosen = prefer(
        _STRETCHES[0],
        "ppo.stretch",
        batch.obs.device,
        among=_STRETCHES,
        layers=_label(arena),
        samples=count,
    )
    return cut(count, chosen.samples)


def _prefer_launch(arena: Arena, batch: Batch, count: int) -> Launch:
    among = _launches(arena)
    if len(among) == 1:
        return among[0]
    return prefer(
        among[0],
        "ppo.gradient",
        batch.obs.device,
        among=among,
        layers=_label(arena),
        kind=arena.actor.activation,
        continuous=arena.log_std is not None,
        samples=count,
    )


@cache
def _launches(arena: Arena) -> tuple[Launch, ...]:
    """What registers hold on every GPU: the default, and others for few layers with tanh."""
    blocks = (block for net in arena.nets for block in Geometry.of(net, 0).blocks)
    launches = mlp.launches(tuple(blocks))
    few = all(net.depth <= MOST_LAYERS for net in arena.nets)
    return launches if few and arena.actor.activation == "tanh" else launches[:1]


def _label(arena: Arena) -> str:
    """Of both networks, as `kernels.tuning` names them."""
    return "+".join(Geometry.of(net, 0).label for net in arena.nets)


@cache
def _constants(arena: Arena) -> dict[str, object]:
    geometries = [Geometry.of(net, 0) for net in arena.nets]
    actor, critic = ((g.sizes, g.blocks, g.weights, g.biases) for g in geometries)
    return {
        "ACTOR": actor,
        "CRITIC": critic,
        "ACTIVATION": arena.actor.activation,
        "LOG_STD": arena.log_std,
        "WALK": _WALK,
        # Weights are zero off the mask already.
        "MASKED": (False,) * max(net.depth for net in arena.nets),
    }


def _example(sizes: tuple[int, ...], activation: str, *, continuous: bool) -> None:
    from . import Batch, PPOConfig

    arena = Arena.build(sizes, (*sizes[:-1], 1), activation=activation, continuous=continuous)
    action = meta(2, 37, sizes[-1]) if continuous else meta(2, 37, dtype=torch.int64)
    batch = Batch(meta(2, 37, sizes[0]), action, *(meta(2, 37) for _ in range(4)))
    order, weight = meta(2, 37, dtype=torch.int64), meta(2, arena.size)
    config = PPOConfig(minibatches=3, normalise_advantage=True, clip_value=True)
    rows, sums = meta(2, 1, arena.size), meta(3, 2, 1, 5)[1]
    gradient(weight, arena, order, 12, batch, config, rows, sums, 32)


EXAMPLES = [
    Example(
        f"{'_'.join(map(str, sizes))}_{activation}_{'continuous' if continuous else 'discrete'}",
        partial(_example, sizes, activation, continuous=continuous),
    )
    for sizes, activation, continuous in (
        ((4, 64, 64, 2), "tanh", False),
        ((17, 64, 64, 6), "tanh", True),
        ((4, 64, 64, 2), "relu", False),
        ((17, 64, 64, 6), "relu", True),
        ((64, 64, 64, 64), "tanh", False),
        ((64, 64, 64, 64), "relu", True),
        ((33, 61, 47, 20), "tanh", True),
        ((33, 61, 47, 20), "relu", False),
        ((64, 64, 64, 64), "elu", True),
        ((33, 61, 47, 20), "elu", False),
        ((4, 32, 32, 2), "relu", False),
        ((4, 32, 32, 2), "tanh", False),
        ((32, 32, 32, 32, 32), "tanh", True),
        ((32, 32, 32, 32, 32), "relu", True),
        ((32, 32, 32, 32, 32), "relu", False),
    )
]
