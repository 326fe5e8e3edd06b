"""Stable-Baselines3's squashed Gaussian with its sample and log-probability in one call."""

from __future__ import annotations

from typing import Any

from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution
from torch import Tensor
from torch.distributions import Normal

from sparse_tickets.kernels.policy import can_squash, squash

__all__ = ["FusedSquashedGaussian", "fuse_distribution_"]


class FusedSquashedGaussian(SquashedDiagGaussianDistribution):
    """`SquashedDiagGaussianDistribution` that draws the same actions in one call of a kernel.

    Its ``distribution`` and ``gaussian_actions``, which a training never asks for, are made when
    somebody does. Where kernels may not run (a GPU, another dtype, a compiler) it is the dense
    class.
    """

    _last: tuple[Tensor, Tensor, Tensor] | None = None

    def actions_from_params(
        self, mean_actions: Tensor, log_std: Tensor, deterministic: bool = False
    ) -> Tensor:
        """Actions ``[B, A]``, as the dense class."""
        if deterministic or not can_squash(mean_actions, log_std):
            return super().actions_from_params(mean_actions, log_std, deterministic)
        return self._squash(mean_actions, log_std)[0]

    def log_prob_from_params(self, mean_actions: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
        """Actions ``[B, A]`` and their log-probability ``[B]``, as the dense class."""
        if not can_squash(mean_actions, log_std):
            return super().log_prob_from_params(mean_actions, log_std)
        return self._squash(mean_actions, log_std)

    def _squash(self, mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
        # As torch.distributions draws it, so that a seed gives the same actions.
        noise = mean.new_empty(mean.shape).normal_()
        self._last = mean, log_std, noise
        self.__dict__.pop("distribution", None)
        self.__dict__.pop("gaussian_actions", None)
        return squash(mean, log_std, noise, self.epsilon)

    def __getattr__(self, name: str) -> Any:
        if name not in ("distribution", "gaussian_actions") or self._last is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        mean, log_std, noise = self._last
        std = log_std.exp()
        self.distribution = Normal(mean, std)
        self.gaussian_actions = mean + std * noise
        return self.__dict__[name]


def fuse_distribution_(distribution: Any) -> None:
    """Make a squashed Gaussian a `FusedSquashedGaussian`, by its class alone; others stay."""
    if type(distribution) is SquashedDiagGaussianDistribution:
        distribution.__class__ = FusedSquashedGaussian
