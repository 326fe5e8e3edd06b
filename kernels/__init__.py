"""Ops on populations of sparse networks. This floor knows tensors, not policies or tickets.

The names in ``__all__`` load at first use. The ops `linear`, `prune`, `mlp` and `rollout` are not
among them: each is named like its folder, and here these names are the folders, always modules
whatever was imported before. Such an op is imported from its folder, as is everything else:

    from .linear import linear

So are `initial`, `step` and `observe` of ``kernels.dynamics``, which say too little out of it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__all__ = [
    "Arena",
    "Batch",
    "CloneConfig",
    "DQNConfig",
    "Net",
    "PPOConfig",
    "Parameters",
    "Plan",
    "SACConfig",
    "Stream",
    "Transitions",
    "adam_",
    "bits",
    "categorical",
    "clone_update_",
    "demonstrate",
    "derive_key",
    "dqn_update_",
    "evaluate",
    "gae",
    "integers",
    "normal",
    "permutation",
    "ppo_update_",
    "resolve_backend",
    "rewind_",
    "sac_update_",
    "uniform",
    "use_backend",
]

_EXPORTS = {
    "arena": ("Arena", "Net", "Parameters"),
    "dispatch": ("Plan", "resolve_backend", "use_backend"),
    "dqn": ("DQNConfig", "dqn_update_"),
    "imitation": ("CloneConfig", "clone_update_"),
    "ppo": ("Batch", "PPOConfig", "ppo_update_"),
    "random": (
        "Stream",
        "bits",
        "categorical",
        "derive_key",
        "integers",
        "normal",
        "permutation",
        "uniform",
    ),
    "returns": ("gae",),
    "rollout": ("demonstrate", "evaluate"),
    "sac": ("SACConfig", "sac_update_"),
    "transitions": ("Transitions",),
    "update": ("adam_", "rewind_"),
}
_HOME = {name: module for module, names in _EXPORTS.items() for name in names}

if TYPE_CHECKING:
    from .arena import Arena, Net, Parameters
    from .dispatch import Plan, resolve_backend, use_backend
    from .dqn import DQNConfig, dqn_update_
    from .imitation import CloneConfig, clone_update_
    from .ppo import Batch, PPOConfig, ppo_update_
    from .random import (
        Stream,
        bits,
        categorical,
        derive_key,
        integers,
        normal,
        permutation,
        uniform,
    )
    from .returns import gae
    from .rollout import demonstrate, evaluate
    from .sac import SACConfig, sac_update_
    from .transitions import Transitions
    from .update import adam_, rewind_
else:
    # Out of the type checker's sight: it would accept any name of a module with `__getattr__`.
    def __getattr__(name):
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
