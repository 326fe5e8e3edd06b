"""The squashed Gaussian in plain torch, differentiable by the head."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import softplus

LOG_STD_RANGE = (-20.0, 2.0)


def distribution(head: Tensor) -> tuple[Tensor, Tensor]:
    """Means and log standard deviations, each ``[..., A]``, before squashing."""
    mean, log_std = head.chunk(2, -1)
    return mean, log_std.clamp(*LOG_STD_RANGE)


def sample(head: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """See the op."""
    mean, log_std = distribution(head)
    raw = mean + log_std.exp() * noise
    # log(1 - tanh(raw)^2), which would be the logarithm of 0 for large actions.
    slope = 2 * (math.log(2) - raw - softplus(-2 * raw))
    logp = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi) - slope
    return raw.tanh(), logp.sum(-1)
