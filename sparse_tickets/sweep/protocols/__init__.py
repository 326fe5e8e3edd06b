"""The protocol's budget and tuned hyper-parameters per environment, one file each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sparse_tickets.envs import split_noise
from sparse_tickets.envs.pool import PREFIX
from sparse_tickets.sweep.protocols import (
    acrobot,
    cart_pole,
    half_cheetah,
    hopper,
    lunar_lander,
    maze,
    mountain_car,
    pendulum,
)
from sparse_tickets.sweep.spec import Sweep

__all__ = ["PROTOCOLS", "protocol"]

PROTOCOLS: dict[str, dict[str, Any]] = {
    each.ENV: each.SETTINGS
    for each in (
        acrobot,
        cart_pole,
        pendulum,
        mountain_car,
        lunar_lander,
        half_cheetah,
        hopper,
        maze,
    )
}


def protocol(env: str) -> Sweep:
    """The protocol's sweep for an environment: its budget and tuned hyper-parameters.

    Levels run to 24, so that a condition that never degrades within the paper's 20 trainings can
    still do so. Environments without a tuned PPO, CartPole too, get CleanRL's; with noise among its
    inputs, or by envpool, one keeps its own.

    Raises:
        TypeError: env is no string.
    """
    if not isinstance(env, str):
        raise TypeError(f"env must be a string, got {env!r}")
    base, _ = split_noise(env.removeprefix(PREFIX))
    return replace(Sweep(), env=env, **{"levels": 25, **PROTOCOLS.get(base, {})})
