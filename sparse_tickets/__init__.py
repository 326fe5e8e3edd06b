"""Lottery tickets of policies: sparse layers, populations of masked networks, pruning sweeps.

Three ways in, each loaded at first use:

- a layer or model of yours: `SparseLinear`, `sparsify_`, `summary`, `densify_`, `compact`,
  `to_semi_structured`;
- a study: `Sweep`, `run_sweep`, `load_results`, `transfer`, with `register_env`,
  `register_criterion`, `register_condition` and `register_algorithm` for what is not built in;
- the parts of such a study: `Population`, `Ticket`, `make_env`, `use_backend`.

The ops beneath are in `sparse_tickets.kernels`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__all__ = [
    "Population",
    "Pruner",
    "SparseLinear",
    "Sweep",
    "Ticket",
    "__version__",
    "compact",
    "densify_",
    "load_results",
    "make_env",
    "register_algorithm",
    "register_condition",
    "register_criterion",
    "register_env",
    "run_sweep",
    "sparsify_",
    "summary",
    "to_semi_structured",
    "transfer",
    "use_backend",
]

_HOME = {
    "Population": ("population", "Population"),
    "Pruner": ("dynamic.pruner", "Pruner"),
    "SparseLinear": ("linear", "SparseLinear"),
    "Sweep": ("sweep.spec", "Sweep"),
    "Ticket": ("ticket", "Ticket"),
    "compact": ("compaction", "compact"),
    "densify_": ("convert", "densify_"),
    "load_results": ("sweep.store", "load_results"),
    "make_env": ("envs", "make_env"),
    "register_algorithm": ("algos.registry", "register_algorithm"),
    "register_condition": ("conditions", "register_condition"),
    "register_criterion": ("prune", "register_criterion"),
    "register_env": ("envs", "register_env"),
    "run_sweep": ("sweep.engines", "run"),
    "sparsify_": ("convert", "sparsify_"),
    "summary": ("coverage", "summary"),
    "to_semi_structured": ("convert", "to_semi_structured"),
    "transfer": ("analysis.transfer", "transfer"),
    "use_backend": ("kernels.dispatch", "use_backend"),
}

if TYPE_CHECKING:
    from sparse_tickets.algos.registry import register_algorithm
    from sparse_tickets.analysis.transfer import transfer
    from sparse_tickets.compaction import compact
    from sparse_tickets.conditions import register_condition
    from sparse_tickets.convert import densify_, sparsify_, to_semi_structured
    from sparse_tickets.coverage import summary
    from sparse_tickets.dynamic.pruner import Pruner
    from sparse_tickets.envs import make_env, register_env
    from sparse_tickets.kernels.dispatch import use_backend
    from sparse_tickets.linear import SparseLinear
    from sparse_tickets.population import Population
    from sparse_tickets.prune import register_criterion
    from sparse_tickets.sweep.engines import run as run_sweep
    from sparse_tickets.sweep.spec import Sweep
    from sparse_tickets.sweep.store import load_results
    from sparse_tickets.ticket import Ticket

    __version__: str
else:
    # Out of the type checker's sight: it would accept any name of a module with `__getattr__`.
    def __getattr__(name):
        if name == "__version__":
            value = import_module("importlib.metadata").version("sparse-tickets")
        elif name in ("optim", "targets"):
            return import_module(f"{__name__}.{name}")
        elif name in _HOME:
            module, attribute = _HOME[name]
            value = getattr(import_module(f"{__name__}.{module}"), attribute)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
