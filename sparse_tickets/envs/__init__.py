"""Environments for populations: P tickets, E copies each, restarting by themselves."""

from .classic import ClassicEnv
from .gym_adapter import GymEnv, gym_spec
from .noise import Noise, NoiseFeatures, split_noise
from .registry import EnvFactory, env_spec, make_env, open_env, register_env
from .spec import Env, EnvSpec, Step
from .workers import use_workers

__all__ = [
    "ClassicEnv",
    "Env",
    "EnvFactory",
    "EnvSpec",
    "GymEnv",
    "Noise",
    "NoiseFeatures",
    "Step",
    "env_spec",
    "gym_spec",
    "make_env",
    "open_env",
    "register_env",
    "split_noise",
    "use_workers",
]
