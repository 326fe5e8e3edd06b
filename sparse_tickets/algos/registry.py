"""Algorithms by name, in the order of tables and figures."""

from __future__ import annotations

from sparse_tickets.algos import bc, dqn, ppo, sac
from sparse_tickets.algos.algorithm import Algorithm

__all__ = ["ALGORITHMS", "find_algorithm", "register_algorithm"]

ALGORITHMS: dict[str, Algorithm] = {
    each.name: each for each in (ppo.ALGORITHM, dqn.ALGORITHM, sac.ALGORITHM, bc.ALGORITHM)
}


def find_algorithm(name: str) -> Algorithm:
    """The registered algorithm called ``name``.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {name!r}")
    return ALGORITHMS[name]


def register_algorithm(algorithm: Algorithm) -> Algorithm:
    """Add an algorithm of your own to `ALGORITHMS`: sweeps, reports and `verify` then know it.

    Raises:
        ValueError: the name is taken, or is not letters, digits and underscores.
    """
    name = algorithm.name
    if name in ALGORITHMS:
        raise ValueError(f"name must be new, got {name!r}; registered: {', '.join(ALGORITHMS)}")
    if not name.isidentifier():
        raise ValueError(f"name must be letters, digits and underscores, got {name!r}")
    ALGORITHMS[name] = algorithm
    return algorithm
