"""Environments by name: the built-in ones, your own, and whatever gymnasium knows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Protocol

import gymnasium
import torch

from sparse_tickets.kernels.random import Stream

from .classic import CLASSIC_SPECS, ClassicEnv
from .gym_adapter import GymEnv, find_registered, gym_spec, maker
from .noise import Noise, NoiseFeatures, split_noise
from .pool import PREFIX, PoolTask
from .spec import Env, EnvSpec

__all__ = ["EnvFactory", "env_spec", "find_env", "make_env", "open_env", "register_env"]


class EnvFactory(Protocol):
    """Makes an environment; `ClassicEnv` and `GymEnv` with their first argument bound are two."""

    def __call__(
        self,
        tickets: int,
        copies: int,
        device: torch.device | str,
        *,
        spec: EnvSpec,
        reset_stream: Stream,
    ) -> Env:
        """P tickets times E copies on a device."""
        ...


# Steps: some of MinAtar's games go on for ever under some policies, and name no limit.
_MINATAR_LIMIT = 5_000

_registry: dict[str, tuple[EnvFactory, EnvSpec]] = {
    name: (partial(ClassicEnv, name), spec) for name, spec in CLASSIC_SPECS.items()
}


def register_env(name: str, factory: EnvFactory, spec: EnvSpec, *, overwrite: bool = False) -> None:
    """Make an environment known to `make_env`, sweeps and the command line.

    A gymnasium class needs one line::

        register_env("Corridor", partial(GymEnv, Corridor), gym_spec(Corridor, "Corridor"))

    Args:
        name: what `make_env` will be asked for.
        factory: see `EnvFactory`.
        spec: spaces and observation scale; handed to the factory.
        overwrite: replace an environment of the same name.

    Raises:
        ValueError: the name is taken and `overwrite` is False, or the spec bears another name.
    """
    if name in _registry and not overwrite:
        raise ValueError(f"name must be new (or pass overwrite=True), got {name!r}")
    if spec.name != name:
        raise ValueError(f"spec must be named {name!r}, got {spec.name!r}")
    _registry[name] = (factory, spec)


def env_spec(name: str) -> EnvSpec:
    """Spaces and observation scale of an environment.

    Args:
        name: a built-in or registered environment, any gymnasium id, or ``envpool:`` and a task
            of envpool; see `gym_spec`.

    Raises:
        ValueError: nobody knows the name; the message lists the known ones.
    """
    return find_env(name)[1]


def make_env(
    name: str,
    tickets: int,
    copies: int,
    device: torch.device | str = "cpu",
    *,
    spec: EnvSpec | None = None,
    reset_stream: Stream = Stream.RESET,
) -> Env:
    """Make an environment for a population.

    Args:
        name: a built-in or registered environment, any gymnasium id, or ``envpool:`` and a task
            of envpool.
        tickets: P.
        copies: E, per ticket.
        device: where its tensors live.
        spec: another observation scale than ``env_spec(name)``, e.g. ``env_spec(name).raw()``.
        reset_stream: stream of the initial states.

    Raises:
        ValueError: nobody knows the name; the message lists the known ones.
    """
    factory, frozen = find_env(name)
    return factory(
        tickets, copies, device, spec=frozen if spec is None else spec, reset_stream=reset_stream
    )


@contextmanager
def open_env(name: str, tickets: int, copies: int, **settings: Any) -> Iterator[Env]:
    """`make_env` for a ``with`` statement: what the copies hold is released at its end."""
    env = make_env(name, tickets, copies, **settings)
    try:
        yield env
    finally:
        close = getattr(env, "close", None)
        if close is not None:
            close()


def find_env(name: str) -> tuple[EnvFactory, EnvSpec]:
    """What makes an environment, and its spec.

    Raises:
        ValueError: nobody knows the name; the message lists the known ones.
    """
    if name in _registry:
        return _registry[name]
    base, noise = split_noise(name)
    if noise is not None:
        factory, spec = find_env(base)
        return _noisy(factory, base, noise), noise.spec(spec, name)
    if name.startswith("MinAtar/"):
        _register_minatar()
    try:
        if not name.startswith(PREFIX):
            find_registered(name)
    except (gymnasium.error.Error, ImportError, ValueError) as error:
        raise ValueError(
            f"env must be one of {', '.join(sorted(_registry))}, one registered with "
            f"register_env, any gymnasium id, each with +noise=N or without, or "
            f"{PREFIX} and a task of envpool, got {name!r} (gymnasium: {error})"
        ) from error
    try:
        return _make_gym(name), _read_spec_once(name)
    except (gymnasium.error.Error, ImportError) as error:
        raise ValueError(
            f"env must be one that can be made here, got {name!r} (gymnasium: {error})"
        ) from error


def _noisy(factory: EnvFactory, base: str, noise: Noise) -> EnvFactory:
    """What makes an environment with inputs that are noise."""
    if isinstance(factory, partial):
        made: partial[Any] = factory
        if made.func is ClassicEnv:
            return partial(made, noise=noise)
        if made.func is GymEnv and not isinstance(make := maker(made.args[0]), PoolTask):
            return partial(GymEnv, partial(_with_noise, make, noise))
    raise ValueError(
        f"env must be a built-in or a gymnasium one to have noise, got {base!r}, which is "
        "something else"
    )


def _with_noise(make: Callable[[], gymnasium.Env], noise: Noise) -> gymnasium.Env:
    flat = gymnasium.wrappers.FlattenObservation(make())
    return NoiseFeatures(flat, noise.count, noise.seed)


@cache
def _register_minatar() -> None:
    """Tell gymnasium of MinAtar's games, which no longer asks packages itself; limit episodes."""
    try:
        from minatar.gym import register_envs
    except ImportError as error:
        raise ValueError(
            "env MinAtar/GAME-v1 needs MinAtar: pip install 'sparse-tickets[minatar]'"
        ) from error
    register_envs()
    for each in gymnasium.registry.values():
        if each.namespace == "MinAtar":
            each.max_episode_steps = _MINATAR_LIMIT


@cache
def _make_gym(name: str) -> EnvFactory:
    return partial(GymEnv, name)


@cache
def _read_spec_once(name: str) -> EnvSpec:
    """Of a gymnasium id; to read it an environment has to be made, to scale it played."""
    spec = gym_spec(name, name)
    if set(spec.scale) == {255.0}:
        warnings.warn(
            f"{name} shows images of bytes: the policy sees them flattened and divided by 255. "
            "For smaller or grey ones register it wrapped (gymnasium.wrappers)",
            stacklevel=3,
        )
    return spec
