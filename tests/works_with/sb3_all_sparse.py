"""A pytest plugin for Stable-Baselines3's own tests: every policy of every model is sparse.

See docs/works_with.md for the command. A model's policy class becomes its sparse one, half pruned
unless the test says otherwise; ``SB3_DENSITY`` sets another density, and ``dense`` runs the tests
as they are.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BaseModel
from torch import Tensor

from sparse_tickets.integrations.sb3 import SparsePolicy, sparse_policy

DENSITY = os.environ.get("SB3_DENSITY", "0.5")


def pytest_configure() -> None:
    """Patch before any test module is imported."""
    _draw_masks()
    if DENSITY == "dense":
        return
    defaults = SparsePolicy.__init__.__kwdefaults__
    defaults["density"] = float(DENSITY)
    construct, load = BaseAlgorithm.__init__, BaseModel.load.__func__

    def construct_sparse(self: BaseAlgorithm, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        self.policy_class = sparse_policy(self.policy_class)

    def load_as_it_was(cls: type[BaseModel], *args: Any, **kwargs: Any) -> BaseModel:
        # A part of a policy is built of the very layers whose state is loaded next.
        defaults["density"] = 1.0
        try:
            return load(cls, *args, **kwargs)
        finally:
            defaults["density"] = float(DENSITY)

    BaseAlgorithm.__init__, BaseModel.load = construct_sparse, classmethod(load_as_it_was)


def _draw_masks() -> None:
    """The tests fill whole states with random numbers, which torch does not draw for bools."""
    rand_like, randint_like = torch.rand_like, torch.randint_like

    def rand_like_any(tensor: Tensor, **options: Any) -> Tensor:
        if tensor.dtype is torch.bool:
            return rand_like(tensor, dtype=torch.float32) < 0.5
        return rand_like(tensor, **options)

    def randint_like_any(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        if tensor.dtype is torch.bool:
            return rand_like_any(tensor)
        return randint_like(tensor, *args, **options)

    torch.rand_like, torch.randint_like = rand_like_any, randint_like_any
