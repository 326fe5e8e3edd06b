"""Made-up results of a sweep, whose degradation is known."""

from __future__ import annotations

import itertools

import numpy as np
import polars as pl

from sparse_tickets.analysis import CONDITIONS

FOUR = CONDITIONS[:4]
COLLAPSE = dict(zip(CONDITIONS, (0.02, 0.035, 0.11, 0.2, 0.03, 0.13, 0.08), strict=True))


def sweep(
    algos=("ppo", "bc"), conditions=FOUR, kinds=("own",), seeds=4, levels=8, env="CartPole-v1"
) -> pl.DataFrame:
    """A synthetic results frame: each condition's return collapses around its own density."""
    rng = np.random.default_rng(0)
    rows = []
    cells = itertools.product(algos, range(seeds), kinds, conditions, range(1, levels))
    dense = ((a, s, "shared", "dense", 0) for a in algos for s in range(seeds))
    for algo, seed, kind, condition, level in (*dense, *cells):
        density = 0.8**level
        half = 0.0 if level == 0 else 3 * COLLAPSE[condition] * (0.7 if algo == "bc" else 1.0)
        value = 22.0 + 478.0 / (1 + (half / density) ** 3) - abs(rng.normal()) * (level > 0)
        rows.append(
            {
                "env": env,
                "algo": algo,
                "condition": condition,
                "controls": kind,
                "seed": seed,
                "level": level,
                "density": density,
                "effective_density": 0.0 if level > 6 and "random" in condition else density**1.2,
                "has_path": True,
                "dead_inputs": 0,
                "dead_units": 0,
                "reachable_actions": 2,
                "return_final": value,
                "return_best": value + 1,
                "return_final_sampled": 0.9 * value,
                "return_initial": 0.5 * value,
                "return_initial_sampled": 0.4 * value,
                "return_auc": 0.7 * value,
                "curve": [22.0, value],
                "train_steps": 1000,
                "wall_s": 1.0,
                "random_return": 22.0,
                "diverged": False,
            }
        )
    return pl.DataFrame(rows)
