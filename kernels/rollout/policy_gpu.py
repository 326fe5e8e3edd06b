"""An observation's way through a network in Triton, a thread per unit; and the critic's values.

The networks are small and an observation is a vector, so a product is bound by latency: a thread
keeps its unit's row of weights in registers for the life of the program, sums over its inputs
alone, and only the activations pass through shared memory. The sums run in one order whatever P, E
and T are, products and sums rounded apart.

Observations and outputs are so short that every thread holds all of them.

How many threads share a unit may be measured (`kernels.tuning`), by networks alone: never by P, E
or T, which no bit of a result may depend on.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations_gpu import activate
from ..arena import Net, Processor
from ..jit import jit_kernel
from ..launch import Launch
from ..tuning import prefer
from .reference import Rollout

_WIDEST = 128
# Between hidden layers: a quarter of the register file of a multiprocessor.
_MOST_WEIGHTS = 128 * 128
# Of the first layer, whose inputs are rounded up to a power of two.
_MOST_FIRST_WEIGHTS = 64 * 64
_WEIGHTS_PER_THREAD = 64
_MOST_WARPS = 8


@triton.jit
def _load_layer(
    row, NET: tl.constexpr, LAYER: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr
):
    """Weight ``[COUNT / 4, 4, WIDTH]``, inputs first, and bias ``[WIDTH]``, padded with zeros.

    Loaded along one axis, so that the compiler cannot but give neighbouring units to neighbouring
    threads. Shown two, it would share each row out to neighbours, for the sake of one read, and
    every sum over a unit's inputs would be a sum over threads.
    """
    inp: tl.constexpr = NET[0][LAYER]
    out: tl.constexpr = NET[0][LAYER + 1]
    entry = tl.arange(0, COUNT * WIDTH)
    source, unit = entry // WIDTH, entry % WIDTH
    inside = (unit < out) & (source < inp)
    weight = tl.load(row + NET[1][LAYER] + unit * inp + source, mask=inside, other=0.0)
    unit = tl.arange(0, WIDTH)
    bias = tl.load(row + NET[2][LAYER] + unit, mask=unit < out, other=0.0)
    side: tl.constexpr = min(COUNT, 4)
    return tl.reshape(weight, [COUNT // side, side, WIDTH]), bias


@triton.jit
def _load_head(row, NET: tl.constexpr, OUTPUTS: tl.constexpr, WIDTH: tl.constexpr):
    """Weight ``[OUTPUTS, WIDTH]`` of the last layer and its bias ``[OUTPUTS]``."""
    last: tl.constexpr = len(NET[0]) - 2
    inp: tl.constexpr = NET[0][last]
    out: tl.constexpr = NET[0][last + 1]
    entry = tl.arange(0, OUTPUTS * WIDTH)
    output, source = entry // WIDTH, entry % WIDTH
    inside = (output < out) & (source < inp)
    weight = tl.load(row + NET[1][last] + output * inp + source, mask=inside, other=0.0)
    output = tl.arange(0, OUTPUTS)
    bias = tl.load(row + NET[2][last] + output, mask=output < out, other=0.0)
    return tl.reshape(weight, [OUTPUTS, WIDTH]), bias


@triton.jit
def load_network(
    row, NET: tl.constexpr, WIDTH: tl.constexpr, FEATURES: tl.constexpr, OUTPUTS: tl.constexpr
):
    """Weight and bias of every layer, one after the other."""
    layers = _load_layer(row, NET, 0, FEATURES, WIDTH)
    for layer in tl.static_range(1, len(NET[0]) - 2):
        layers = layers + _load_layer(row, NET, layer, WIDTH, WIDTH)
    return layers + _load_head(row, NET, OUTPUTS, WIDTH)


@triton.jit
def forward(layers, x, NET: tl.constexpr):
    """Outputs ``[OUTPUTS]`` of one observation ``[FEATURES]``."""
    last: tl.constexpr = len(NET[0]) - 2
    for layer in tl.static_range(last):
        weight = layers[2 * layer]  # [inp / 4, 4, units]
        inputs = tl.reshape(x, [weight.shape[0], weight.shape[1]])[:, :, None]  # [inp / 4, 4, 1]
        # Four sums side by side within a thread, then the sum of the four.
        total = tl.sum(tl.sum(weight * inputs, axis=0), axis=0)
        x = activate(total + layers[2 * layer + 1], NET[3])  # [units]
    return tl.sum(layers[2 * last] * x[None, :], axis=1) + layers[2 * last + 1]


@triton.jit
def entry_of(vector, index, SIZE: tl.constexpr):
    """One entry of a vector ``[SIZE]`` that every thread holds: a choice of registers."""
    return tl.sum(tl.where(tl.arange(0, SIZE) == index, vector, 0.0), axis=0)


@jit_kernel(fp_fusion=False, do_not_specialize=["size", "steps", "copies", "stretches"])
def _judge_kernel(
    weight,  # [P, size]
    seen,  # [P, steps, copies, features]
    last_obs,  # [P, copies, features]
    final_obs,  # as seen, where an episode was cut
    terminated,  # [P, steps, copies], as truncated
    truncated,
    value,  # [P, steps, copies], as next_value written
    next_value,
    size,
    steps,
    copies,
    stretches,
    NET: tl.constexpr,
    WIDTH: tl.constexpr,
    FEATURES: tl.constexpr,
    STRETCH: tl.constexpr,
):
    """Values of ``STRETCH`` of the T + 1 observations that one copy acted on or ended with.

    Each is the value of its own step, and the next value of the step before if that ended nothing.
    """
    features: tl.constexpr = NET[0][0]
    program = tl.program_id(0)
    lane, stretch = (program // stretches).to(tl.int64), program % stretches
    ticket, copy = lane // copies, lane % copies
    layers = load_network(weight + ticket * size, NET, WIDTH, FEATURES, 1)
    feature = tl.arange(0, FEATURES)
    real = feature < features
    begin = stretch * STRETCH
    for t in range(begin, tl.minimum(begin + STRETCH, steps + 1)):
        entry = (ticket * steps + t) * copies + copy
        before = entry - copies
        during = t < steps
        # One of the two is there, the other has no features.
        there = tl.where(during, features, 0)
        x = tl.load(seen + entry * features + feature, mask=feature < there, other=0.0)
        last = feature < features - there
        x += tl.load(last_obs + lane * features + feature, mask=last, other=0.0)
        worth = entry_of(forward(layers, x, NET), 0, 1)
        tl.store(value + entry, worth, mask=during)
        ended = tl.load(terminated + before, mask=t > 0, other=1).to(tl.int1)
        cut = tl.load(truncated + before, mask=t > 0, other=1).to(tl.int1)
        tl.store(next_value + before, worth, mask=(ended | cut) == 0)
        ended = tl.load(terminated + entry, mask=during, other=0).to(tl.int1)
        cut = tl.load(truncated + entry, mask=during, other=0).to(tl.int1)
        tl.store(next_value + entry, 0.0, mask=ended)
        if cut:
            x = tl.load(final_obs + entry * features + feature, mask=real, other=0.0)
            worth = entry_of(forward(layers, x, NET), 0, 1)
            tl.store(next_value + entry, worth)


def misfit(nets: tuple[Net, ...]) -> str | None:
    """Why registers cannot hold a population's networks, or None if they can."""
    for net in nets:
        if net.depth < 2:
            return "the fused kernel needs a hidden layer"
        widest = max(net.sizes[1:-1])
        if widest > _WIDEST:
            return f"layers up to width {_WIDEST} fit the registers, not {widest}"
        first = triton.next_power_of_2(net.sizes[0]) * triton.next_power_of_2(net.sizes[1])
        if first > _MOST_FIRST_WEIGHTS:
            return f"{_MOST_FIRST_WEIGHTS} weights of a first layer fit the registers, not {first}"
        weights = _hidden_weights(net)
        if weights > _MOST_WEIGHTS:
            return f"{_MOST_WEIGHTS} weights between hidden layers fit the registers, not {weights}"
    return None


def describe(net: Net) -> dict[str, Any]:
    """What a kernel knows of a network while it compiles."""
    net.check_kernels(Processor.GPU)
    return {
        "NET": (net.sizes, net.weights, net.biases, net.activation),
        "WIDTH": _width(net),
        "FEATURES": triton.next_power_of_2(net.sizes[0]),
    }


def _launch(**numbers: int) -> Launch:
    """Left alone, the assembler would rather spill a little than lose occupancy."""
    return Launch(**numbers, maxnreg=255)


@cache
def launches(net: Net) -> tuple[Launch, ...]:
    """What can be launched, the default first: a thread per unit, or several of many weights."""
    threads = max(_width(net), triton.next_power_of_2(_hidden_weights(net)) // _WEIGHTS_PER_THREAD)
    warps = max(1, threads // 32)
    found = (warps, warps // 2, 2 * warps)
    return tuple(_launch(warps=each) for each in found if 1 <= each <= _MOST_WARPS)


@cache
def _judge_launches(net: Net) -> tuple[Launch, ...]:
    """The same of the critic; a program loads the weights once for a stretch of observations."""
    warps = [launch.warps for launch in launches(net)]
    cuts = [*((each, 16) for each in warps), (warps[0], 8), (warps[0], 32)]
    return tuple(_launch(warps=each, stretch=stretch) for each, stretch in cuts)


def prefer_launch(net: Net, task: str, device: torch.device) -> Launch:
    """What was measured on this device for such an actor on a task, or the default."""
    among = launches(net)
    return prefer(among[0], "rollout.act", device, among=among, task=task, **_key(net))


def _key(net: Net) -> dict[str, Any]:
    return {
        "inputs": net.sizes[0],
        "outputs": net.sizes[-1],
        "width": _width(net),
        "depth": f"{net.depth}",
        "activation": net.activation,
    }


def _width(net: Net) -> int:
    return max(16, triton.next_power_of_2(max(net.sizes[1:-1])))


def _hidden_weights(net: Net) -> int:
    """Of the matrices between hidden layers, padded."""
    return (net.depth - 2) * _width(net) ** 2


def judge(
    weight: Tensor, critic: Net, outcome: Rollout, last_obs: Tensor, final_obs: Tensor
) -> None:
    """Fill in ``outcome.value`` and ``outcome.next_value``.

    Args:
        weight: ``[P, size]`` float32, contiguous.
        critic: the value network.
        outcome: contiguous; all but the values is there.
        last_obs: ``[P, E, D]``, what follows the last step.
        final_obs: ``[P, T, E, D]``, what a truncated step led to; not read elsewhere.
    """
    tickets, steps, copies = outcome.value.shape
    among = _judge_launches(critic)
    launch = prefer(among[0], "rollout.judge", weight.device, among=among, **_key(critic))
    stretches = triton.cdiv(steps + 1, launch.stretch)
    with torch.cuda.device_of(weight):
        _judge_kernel[(tickets * copies * stretches,)](
            weight,
            outcome.obs,
            last_obs,
            final_obs,
            outcome.terminated,
            outcome.truncated,
            outcome.value,
            outcome.next_value,
            weight.shape[1],
            steps,
            copies,
            stretches,
            **describe(critic),
            **launch.constexprs,
            **launch.options,
        )
