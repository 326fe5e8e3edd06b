"""What one copy of an environment draws, sees and does, in the scalars of its program."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from ..dynamics.gpu import task_initial, task_observe
from ..random.gpu import box_muller, philox
from .policy_gpu import entry_of

_HALF_LOG_TWO_PI = tl.constexpr(0.5 * math.log(2 * math.pi))


@triton.jit
def _words(key_pointer, block, stream, step):
    """One block of a draw: see `sparse_tickets.kernels.random`.

    The key is read for each draw, or the compiler would keep the keys of all ten rounds.
    """
    key = tl.load(key_pointer)
    return philox(
        block.to(tl.uint32),
        step.to(tl.uint32),
        (step >> 32).to(tl.uint32),
        stream.to(tl.uint32),
        key.to(tl.uint32),
        (key >> 32).to(tl.uint32),
    )


@triton.jit
def _to_uniform(word):
    return (word >> 8).to(tl.float32) * 2.0**-24


@triton.jit
def uniform(key, element, stream, step):
    """Element of a draw of uniforms."""
    a, b, c, d = _words(key, element // 4, stream, step)
    word = element % 4
    chosen = tl.where(word < 2, tl.where(word == 0, a, b), tl.where(word == 2, c, d))
    return _to_uniform(chosen)


@triton.jit
def normal(key, element, stream, step):
    """Element of a draw of standard normals."""
    a, b, c, d = _words(key, element // 4, stream, step)
    upper = element % 4 >= 2
    even, odd = box_muller(tl.where(upper, c, a), tl.where(upper, d, b))
    return tl.where(element % 2 == 0, even, odd)


@triton.jit
def restart(TASK: tl.constexpr, STATES: tl.constexpr, key, copy, stream, step):
    """Initial state of a copy, from its ``STATES`` uniforms of the draw."""
    a, b, c, d = _words(key, copy * STATES // 4, stream, step)
    if STATES == 2:
        upper = copy % 2 == 1
        a, b = tl.where(upper, c, a), tl.where(upper, d, b)
    return task_initial(TASK, _to_uniform(a), _to_uniform(b), _to_uniform(c), _to_uniform(d))


@triton.jit
def observe(
    TASK: tl.constexpr,
    s0,
    s1,
    s2,
    s3,
    offset,
    scale,
    source,
    key,
    copy,
    step,
    STREAM: tl.constexpr,
    KNOWN: tl.constexpr,
    SIZE: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Scaled observation ``[FEATURES]``; offset and scale are read anew to save registers.

    Where there is a ``source``, inputs that show none of the ``KNOWN`` features of the task show
    noise.
    """
    feature = tl.arange(0, FEATURES)
    real = feature < SIZE
    if source is None:
        seen = task_observe(TASK, s0, s1, s2, s3, feature)
    else:
        shown = tl.load(source + feature, mask=real, other=0)
        seen = task_observe(TASK, s0, s1, s2, s3, shown)
        element = copy * (SIZE - KNOWN) + tl.maximum(shown - KNOWN, 0)
        noise = normal(key, element, tl.full([], STREAM, tl.int32), step)
        seen = tl.where(shown < KNOWN, seen, noise)
    shifted = seen - tl.load(offset + feature, mask=real, other=0.0)
    return tl.div_rn(shifted, tl.load(scale + feature, mask=real, other=1.0))


@triton.jit
def sample_discrete(logits, u, ACTIONS: tl.constexpr, OUTPUTS: tl.constexpr):
    """Action drawn as by `categorical` from the softmax, and its log-probability."""
    top = entry_of(logits, 0, OUTPUTS)
    for a in tl.static_range(1, ACTIONS):
        top = tl.maximum(top, entry_of(logits, a, OUTPUTS))
    total = top * 0.0
    for a in tl.static_range(ACTIONS):
        total += tl.exp(entry_of(logits, a, OUTPUTS) - top)
    mass = total * 0.0
    for a in tl.static_range(ACTIONS):
        mass += tl.exp(entry_of(logits, a, OUTPUTS) - top) / total
    threshold = u * mass
    cumulative = mass * 0.0
    action = tl.zeros([], tl.int64)
    found = tl.zeros([], tl.int1)
    for a in tl.static_range(ACTIONS):
        probability = tl.exp(entry_of(logits, a, OUTPUTS) - top) / total
        cumulative += probability
        action = tl.where((found == 0) & (probability > 0.0), a, action)
        found = found | (threshold < cumulative)
    return action, entry_of(logits, action, OUTPUTS) - top - tl.log(total)


@triton.jit
def sample_gaussian(mean, log_std, noise):
    """A sample and its log-density."""
    std = tl.exp(log_std)
    action = mean + std * noise
    z = (action - mean) / std
    return action, -(0.5 * (z * z) + log_std + _HALF_LOG_TWO_PI)


@triton.jit
def pick_greedy(logits, ACTIONS: tl.constexpr, OUTPUTS: tl.constexpr):
    """Index of the largest of ``ACTIONS`` logits, of equals the lowest."""
    best = entry_of(logits, 0, OUTPUTS)
    action = tl.zeros([], tl.int64)
    for a in tl.static_range(1, ACTIONS):
        logit = entry_of(logits, a, OUTPUTS)
        action = tl.where(logit > best, a, action)
        best = tl.maximum(best, logit)
    return action
