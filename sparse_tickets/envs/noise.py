"""Pure-noise inputs: observations of which a policy has to find out what matters.

Any environment's name takes ``+noise=16`` (and ``,seed=3``): 16 standard normals, new at every
step, stand between its own inputs, which keep their order. The seed says at which places.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box

from sparse_tickets.kernels.dispatch import use_backend
from sparse_tickets.kernels.random import Stream, derive_key, permutation
from sparse_tickets.settings import at_least, check_fields

from .spec import EnvSpec

__all__ = ["Noise", "NoiseFeatures", "split_noise"]

_SYNTAX = re.compile(r"(.+)\+noise=(\d+)(?:,seed=(\d+))?")


@dataclass(frozen=True)
class Noise:
    """How many inputs are noise, and where.

    Attributes:
        count: n, how many.
        seed: of their places.

    Raises:
        TypeError: a value of another type.
        ValueError: a negative one.
    """

    count: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, {"count": at_least(0), "seed": at_least(0)}, prefix="noise ")

    def source(self, known: int) -> tuple[int, ...]:
        """What each of ``known + count`` inputs shows: ``[0, known)`` the environment's own, in
        order, and the noise from there on, in order too."""
        total = known + self.count
        key = torch.tensor([derive_key("noise", self.seed)], dtype=torch.int64, device="cpu")
        with use_backend("reference"):
            drawn = permutation(key, total, stream=Stream.NOISE, step=0)[0].tolist()
        noisy = set(drawn[: self.count])
        own, noise = iter(range(known)), iter(range(known, total))
        return tuple(next(noise) if place in noisy else next(own) for place in range(total))

    def spec(self, of: EnvSpec, name: str) -> EnvSpec:
        """The spec of an environment with these inputs: noise has offset 0 and scale 1."""
        source = self.source(of.observation_dim)

        def placed(own: Sequence[float], noise: float) -> tuple[float, ...]:
            values = [*own, *[noise] * self.count]
            return tuple(values[index] for index in source)

        return replace(
            of,
            name=name,
            observation_dim=len(source),
            offset=placed(of.offset, 0.0),
            scale=placed(of.scale, 1.0),
        )


def split_noise(name: str) -> tuple[str, Noise | None]:
    """The environment's own name, and the noise that a name asks for.

    Raises:
        ValueError: the part after ``+`` is neither ``noise=N`` nor ``noise=N,seed=S``.
    """
    match = _SYNTAX.fullmatch(name)
    if match is not None:
        return match[1], Noise(int(match[2]), int(match[3] or 0))
    if "+noise" in name:
        raise ValueError(f"env must end in +noise=N or +noise=N,seed=S, got {name!r}")
    return name, None


class NoiseFeatures(gymnasium.ObservationWrapper):
    """Standard normals between the entries of a flat observation, new at every step.

    The noise has a generator of its own, seeded by ``reset(seed=...)``: the environment's episodes
    are what they are without it.

    Args:
        env: its observations are boxes of one dimension.
        count: n, how many entries are noise.
        seed: of their places; see `Noise`.

    Raises:
        ValueError: observations of another kind, or a negative number.
    """

    def __init__(self, env: gymnasium.Env, count: int, seed: int = 0) -> None:
        super().__init__(env)
        space = env.observation_space
        if not isinstance(space, Box) or len(space.shape) != 1:
            raise ValueError(
                f"env must show boxes of one dimension, got {space}: wrap it in "
                "gymnasium.wrappers.FlattenObservation first"
            )
        noise = Noise(count, seed)
        self._source = np.array(noise.source(space.shape[0]), dtype=np.int64)
        self._count = noise.count
        self._generator = np.random.default_rng()
        if count:
            dtype = np.result_type(space.dtype, np.float32)
            endless = np.full(count, np.inf, dtype=dtype)
            self.observation_space = Box(
                np.append(space.low.astype(dtype), -endless)[self._source],
                np.append(space.high.astype(dtype), endless)[self._source],
                dtype=dtype.type,
            )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """As of the environment; a seed starts the noise afresh too."""
        if seed is not None:
            self._generator = np.random.default_rng(seed)
        return super().reset(seed=seed, options=options)

    def observation(self, observation: Any) -> Any:
        """The environment's observation ``[known]`` with noise in between, ``[known + n]``."""
        if not self._count:
            return observation
        noise = self._generator.standard_normal(self._count)
        mixed = np.append(observation, noise)[self._source]
        return mixed.astype(self.observation_space.dtype)
