"""The squashed Gaussian in Numba: one number at a time, so that a row's bits are its own."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from ..compiling import njit
from ..threads import count_threads, share
from .reference import LOG_STD_RANGE

_LOWEST, _HIGHEST = (np.float32(bound) for bound in LOG_STD_RANGE)
_ZERO, _HALF, _TWO = (np.float32(number) for number in (0.0, 0.5, 2.0))
_LOG_TWO = np.float32(math.log(2))
_HALF_LOG_TWO_PI = np.float32(0.5 * math.log(2 * math.pi))
# Work per number, in the units of `count_threads`.
_WORK = 128


@njit(cache=True, error_model="numpy")
def scale_of(log_std):
    """A logarithm of a standard deviation within its range; a NaN stays one."""
    if log_std < _LOWEST:
        return _LOWEST
    return _HIGHEST if log_std > _HIGHEST else log_std


@njit(cache=True, error_model="numpy")
def sample_row(head, noise, action):
    """Write a sample to ``action [A]`` from ``head [2A]`` and A of ``noise``; its log-density."""
    actions = action.shape[0]
    logp = _ZERO
    for a in range(actions):
        log_std = scale_of(head[actions + a])
        raw = head[a] + math.exp(log_std) * noise[a]
        # log(1 + exp(-2 raw)), whichever way the exponential would overflow.
        soft = max(-_TWO * raw, _ZERO) + math.log1p(math.exp(-_TWO * abs(raw)))
        action[a] = math.tanh(raw)
        logp -= _HALF * noise[a] * noise[a] + log_std + _HALF_LOG_TWO_PI
        logp -= _TWO * (_LOG_TWO - raw - soft)
    return logp


@njit(cache=True, error_model="numpy")
def _sample_ticket(thread, ticket, head, noise, action, logp):
    for b in range(head.shape[1]):
        logp[ticket, b] = sample_row(head[ticket, b], noise[ticket, b], action[ticket, b])


@njit(cache=True, nogil=True, error_model="numpy")
def _sample(threads, head, noise, action, logp):
    share(_sample_ticket, threads, head.shape[0], (head, noise, action, logp))


def sample(head: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """See the op."""
    action, logp = noise.new_empty(noise.shape), noise.new_empty(noise.shape[:2])
    arrays = (each.detach().contiguous().numpy() for each in (head, noise))
    threads = count_threads(len(head), _WORK * noise.numel())
    _sample(threads, *arrays, action.numpy(), logp.numpy())
    return action, logp
