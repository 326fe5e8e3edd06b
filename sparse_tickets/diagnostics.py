"""What a trained network is made of: dormant units, rank of its features, size of its parameters.

All of it is measured on the CPU in plain torch, on one fixed set of observations per environment,
each ticket by itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .envs import EnvFactory, EnvSpec, open_env
from .envs.registry import find_env
from .kernels.arena import Net
from .kernels.dispatch import use_backend
from .kernels.errors import check_tensor
from .kernels.mlp.reference import walk
from .kernels.random import Stream, derive_key, integers, uniform

__all__ = [
    "dormant_share",
    "effective_rank",
    "hidden_features",
    "mask_overlap",
    "parameter_norm",
    "random_observations",
]

_COPIES, _STEPS, _EVERY = 32, 128, 4


def random_observations(env_name: str) -> Tensor:
    """1,024 observations ``[B, D]`` that random actions lead to, the same ones every time.

    Every fourth step of 32 copies, 128 steps each, scaled as policies see them; observations that
    are not finite are left out. A direction without bounds is drawn from [-1, 1].

    Args:
        env_name: a built-in or registered environment, or any gymnasium id.
    """
    return _drawn(env_name, find_env(env_name)).clone()


@lru_cache(maxsize=4)
def _drawn(env_name: str, found: tuple[EnvFactory, EnvSpec]) -> Tensor:
    """`random_observations` of what a name stood for when it was asked."""
    key = torch.tensor([derive_key("diagnostics", env_name)], dtype=torch.int64, device="cpu")
    seen = []
    # Plain torch: the same numbers under every backend, and nothing to compile. What an environment
    # is warned of, it is where policies act.
    with (
        use_backend("reference"),
        warnings.catch_warnings(action="ignore"),
        open_env(env_name, 1, _COPIES) as env,
    ):
        spec = env.spec
        bounds = torch.tensor(
            [spec.action_low, spec.action_high], dtype=torch.float32, device="cpu"
        )
        bounded = bounds.isfinite().all(0)
        low, high = bounds.where(bounded, bounds.new_tensor([[-1.0], [1.0]]))
        obs = env.reset(key)
        for step in range(_STEPS):
            if step % _EVERY == 0:
                seen.append(obs[0])
            if spec.discrete:
                action = integers(key, _COPIES, spec.action_dim, stream=Stream.ACTION, step=step)
            else:
                u = uniform(key, _COPIES * spec.action_dim, stream=Stream.ACTION, step=step)
                action = low + (high - low) * u.view(1, _COPIES, spec.action_dim)
            obs = env.step(action).obs
    observed = torch.cat(seen)
    return observed[observed.isfinite().all(1)]


def hidden_features(weight: Tensor, net: Net, obs: Tensor) -> list[Tensor]:
    """What each hidden layer makes of the observations: ``[P, B, units]`` float32 per layer.

    Args:
        weight: ``[P, size]`` float32 rows of the arena, zero off the mask.
        net: one network of the arena.
        obs: ``[B, D]`` float32, scaled.

    Raises:
        ValueError: observations of another width than the network's.
        TypeError: another dtype.
    """
    check_tensor("obs", obs, ("B", net.sizes[0]), weight.dtype, like=weight)

    def product(layer: int, x: Tensor) -> Tensor:
        matrix, bias = net.weight(weight, layer), net.bias(weight, layer)
        return torch.baddbmm(bias[:, None], x, matrix.mT)

    _, outputs = walk(obs.expand(len(weight), *obs.shape), net, product)
    return outputs[:-1]


def dormant_share(features: Sequence[Tensor], tau: float = 0.1) -> Tensor:
    """Share of the hidden units that are dormant (Sokar et al., 2023): ``[P]`` float64.

    A unit is dormant where its mean absolute activation is at most ``tau`` times the mean of its
    layer's. NaN where there is no hidden unit, or an activation is not finite.

    Args:
        features: ``[P, B, units]`` of each hidden layer, at least one.
        tau: the threshold.

    Raises:
        ValueError: there is no layer.
    """
    if not features:
        raise ValueError("features must be of at least one hidden layer, got none")
    dormant = torch.zeros(len(features[0]), dtype=torch.float64, device=features[0].device)
    finite = torch.ones_like(dormant, dtype=torch.bool)
    for layer in features:
        activity = layer.abs().mean(1, dtype=torch.float64)
        dormant += (activity <= tau * activity.mean(1, keepdim=True)).sum(1)
        finite &= activity.isfinite().all(1)
    share = dormant / sum(layer.shape[2] for layer in features)
    return share.masked_fill(~finite, torch.nan)


def effective_rank(features: Tensor, delta: float = 0.01) -> Tensor:
    """Effective rank of each ticket's features (Kumar et al., 2021): ``[P]`` float64.

    The least number of singular values that add up to the share 1 - ``delta`` of them all; NaN
    where a feature is not finite.

    Args:
        features: ``[P, B, units]`` of one layer, as a rule the last hidden one.
        delta: the share that may be missing.
    """
    finite = features.isfinite().flatten(1).all(1) & (features.shape[1] > 0)
    values = torch.linalg.svdvals(features.double().where(finite[:, None, None], 0.0))
    reached = values.cumsum(1)
    rank = (reached < (1.0 - delta) * reached[:, -1:]).sum(1) + (values > 0).any(1)
    return rank.double().masked_fill(~finite, torch.nan)


def parameter_norm(weight: Tensor, net: Net) -> Tensor:
    """Euclidean norm of a network's weights and biases: ``[P]`` float64.

    Args:
        weight: ``[P, size]`` rows of the arena, zero off the mask.
        net: one network of the arena.
    """
    # Row by row: how torch splits a sum among threads depends on how many sums there are.
    rows = [
        torch.cat([part.flatten() for layer in net.layers(row[None]) for part in layer])
        for row in weight.double()
    ]
    norms = [torch.linalg.vector_norm(row) for row in rows]
    return torch.stack(norms) if norms else weight.new_zeros(0, dtype=torch.float64)


def mask_overlap(mask: Tensor, other: Tensor) -> Tensor:
    """Intersection over union of two masks of each ticket: ``[P]`` float64; 1 if both are empty.

    Args:
        mask: ``[P, N]`` bool.
        other: ``[P, N]`` bool.

    Raises:
        ValueError: other shapes.
        TypeError: other dtypes.
    """
    check_tensor("mask", mask, ("P", "N"), torch.bool, like=mask)
    check_tensor("other", other, mask.shape, torch.bool, like=mask)
    union = (mask | other).sum(1)
    return torch.where(union == 0, 1.0, (mask & other).sum(1).double() / union.clamp(min=1))
