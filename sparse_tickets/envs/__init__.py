"""Environments for populations: P tickets, E copies each, restarting by themselves."""

from .classic import ClassicEnv
from .gym_adapter import GymEnv, gym_spec
from .registry import EnvFactory, env_spec, make_env, open_env, register_env
from .spec import Env, EnvSpec, Step

__all__ = [
    "ClassicEnv",
    "Env",
    "EnvFactory",
    "EnvSpec",
    "GymEnv",
    "Step",
    "env_spec",
    "gym_spec",
    "make_env",
    "open_env",
    "register_env",
]
