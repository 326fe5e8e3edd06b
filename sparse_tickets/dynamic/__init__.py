"""Sparsity during training, along four axes: when, where, what goes and what comes.

A method is one choice on each: a **schedule** (`schedules`), a **distribution** over layers
(`distributions`), a score of what to **drop** and one of what to **grow** (`scores`). `METHODS`
names the published ones; `update_mask` takes one step of any of them, for a module of
one's own (`Pruner`) or a whole population (`PopulationPruner`).
"""

from .distributions import DISTRIBUTIONS, layer_counts
from .method import METHODS, Method
from .population import PopulationPruner, Pruning
from .pruner import Pruner
from .schedules import SCHEDULES
from .scores import DROP_SCORES, GROW_SCORES
from .update import update_mask

__all__ = [
    "DISTRIBUTIONS",
    "DROP_SCORES",
    "GROW_SCORES",
    "METHODS",
    "SCHEDULES",
    "Method",
    "PopulationPruner",
    "Pruner",
    "Pruning",
    "layer_counts",
    "update_mask",
]
