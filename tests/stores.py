"""Rows and tickets for a store."""

import torch

from sparse_tickets.kernels.arena import Arena
from sparse_tickets.sweep.unit import Unit
from sparse_tickets.ticket import ROWS, Ticket

SPEC = {"env": "CartPole-v1", "levels": 3, "ppo": {"lr": 2.5e-4, "sizes": (64, 64)}}
UNIT = Unit("ppo", 3, 0)
ARENA = Arena.build((4, 5, 2))


def make_row(seed=0, level=3, condition="mask/weights", **changes):
    row = {
        "env": "CartPole-v1",
        "algo": "ppo",
        "condition": condition,
        "controls": "own",
        "seed": seed,
        "level": level,
        "density": 0.512,
        "effective_density": 0.4,
        "has_path": True,
        "dead_inputs": 0,
        "dead_units": 1,
        "reachable_actions": 2,
        "return_final": 500.0,
        "return_initial": 20.0,
        "return_initial_sampled": 21.0,
        "return_best": 500.0,
        "diverged": False,
        "return_final_sampled": 499.5,
        "return_auc": 0.9,
        "curve": [20.0, 500.0],
        "train_steps": 1000,
        "wall_s": 1.5,
        "random_return": 22.0,
    }
    return {**row, **changes}


def make_tickets(unit=UNIT, count=2):
    mask = torch.ones(ARENA.prunable, dtype=torch.bool)
    return [
        Ticket.of(
            ARENA,
            mask=mask,
            **{name: torch.randn(ARENA.size) for name in ROWS},
            env="CartPole-v1",
            algo=unit.algo,
            seed=seed,
            condition="mask/weights",
            controls="own",
            level=unit.level,
        )
        for seed in range(count)
    ]


def fill(store, unit=UNIT, **changes):
    rows = [make_row(seed, unit.level, algo=unit.algo, **changes) for seed in (1, 0)]
    return store.write(unit, rows, make_tickets(unit))


def unit_file(store, name, unit=UNIT):
    return store.path / "units" / unit.name / name


def names(folder):
    return sorted(file.name for file in folder.iterdir())
