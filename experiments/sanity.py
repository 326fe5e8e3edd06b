"""Would other keys, another learning rate, another budget or a small dense network say the same?

Dense policies of every task that shared sweeps cheaply allow, trained again with other keys; on
CartPole and Acrobot tickets of PPO with a third and three times the learning rate and with half and
twice the steps, and dense networks as small as those::

    python -m experiments.sanity [--quick]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import polars as pl
import torch
from matplotlib.figure import Figure

from experiments.drawing import Line, line_figure
from experiments.frame import Experiment, Finding, Place, direction, effect, main, markdown, signed
from experiments.remarks import cuts, levels_of
from experiments.sweeps import (
    TICKET,
    SharedSweep,
    acrobot,
    cartpole,
    dqn,
    mountain_car,
    pendulum,
    pendulum_sac,
    tickets,
)
from experiments.training import train
from sparse_tickets import Sweep
from sparse_tickets.algos.ppo import PPO
from sparse_tickets.population import initialise

TASK, ACROBOT = "CartPole-v1", "Acrobot-v1"
LEVELS = {TASK: (0, 4, 6, 8), ACROBOT: (0, 3, 5, 6)}
AGAIN = 3
"""Trainings of each dense policy with other keys, beside the sweep's own."""
ALGORITHMS = {"ppo": "PPO", "dqn": "DQN", "sac": "SAC"}
FLOORS = {
    "dqn": (dqn, "dqn"),
    "acrobot": (acrobot, "ppo"),
    "mountaincar": (mountain_car, "dqn"),
    "pendulum": (pendulum, "ppo"),
    "pendulum-sac": (pendulum_sac, "sac"),
}
"""Sweeps whose dense policies are trained again, beside `cartpole`'s."""
AS_IS, NARROW, OTHER_KEY, SWEEP = "as it is", "narrow dense", "other keys", "the sweep"
Change = Callable[[PPO], PPO]
SETTINGS: dict[str, Change] = {
    AS_IS: lambda ppo: ppo,
    "learning rate x 1/3": lambda ppo: replace(ppo, learning_rate=ppo.learning_rate / 3),
    "learning rate x 3": lambda ppo: replace(ppo, learning_rate=ppo.learning_rate * 3),
    "steps x 1/2": lambda ppo: replace(ppo, steps=ppo.steps // 2),
    "steps x 2": lambda ppo: replace(ppo, steps=ppo.steps * 2),
}
METRICS = {"return_auc": "learning curve", "return_final": "final return"}


def collect(place: Place) -> pl.DataFrame:
    found = _settings(place, cartpole, TASK, "sanity")
    spec = cartpole.spec(place)
    chosen = _chosen(place, cartpole, TASK)
    job = f"sanity-{_file(OTHER_KEY)}", (spec, chosen, AGAIN)
    found.append(
        place.once(*job, partial(again, spec, "ppo")).with_columns(variant=pl.lit(OTHER_KEY))
    )
    if not place.quick:  # every task and algorithm compiles kernels of its own
        if acrobot.wanted(place):
            found += _settings(place, acrobot, ACROBOT, "sanity-acrobot")
        for name, (sweep, algo) in FLOORS.items():
            if sweep.wanted(place):
                found += _floor_of(place, name, sweep, algo)
    columns = [name for name in found[0].columns if all(name in each.columns for each in found)]
    return pl.concat([each.select(columns) for each in found])


def _chosen(place: Place, sweep: SharedSweep, env: str) -> list[int]:
    there = levels_of(sweep.cells(place), "ppo")
    return there[:2] if place.quick else [level for level in LEVELS[env] if level in there]


def _settings(place: Place, sweep: SharedSweep, env: str, prefix: str) -> list[pl.DataFrame]:
    """A sweep's tickets of PPO, trained with other settings, and small dense networks."""
    spec, chosen = sweep.spec(place), _chosen(place, sweep, env)
    jobs = {
        name: partial(changed, place, sweep, chosen, change) for name, change in SETTINGS.items()
    }
    jobs[NARROW] = partial(narrow, spec, chosen[1:])
    found = []
    for name, compute in jobs.items():
        cells = place.once_wanted(f"{prefix}-{_file(name)}", (spec, chosen, AGAIN), compute)
        if cells is not None:
            found.append(cells.with_columns(variant=pl.lit(name)))
    stored = sweep.cells(place).filter(
        (pl.col("algo") == "ppo")
        & pl.col("level").is_in(chosen)
        & pl.col("condition").is_in(["dense", TICKET])
    )
    if env != TASK:  # whose dense policies come with the floor's
        stored = stored.filter(pl.col("level") > 0)
    return [*found, stored.with_columns(variant=pl.lit(SWEEP))]


def _floor_of(place: Place, name: str, sweep: SharedSweep, algo: str) -> list[pl.DataFrame]:
    """Dense policies: the sweep's, and trained again."""
    spec = sweep.spec(place)
    floor = place.once(f"sanity-other-keys-{name}", (spec, AGAIN), partial(again, spec, algo))
    dense = sweep.cells(place).filter((pl.col("level") == 0) & (pl.col("algo") == algo))
    return [
        floor.with_columns(variant=pl.lit(OTHER_KEY)),
        dense.with_columns(variant=pl.lit(SWEEP)),
    ]


def _file(name: str) -> str:
    return name.replace(" ", "-").replace("/", "")


def changed(place: Place, sweep: SharedSweep, chosen: list[int], change: Change) -> pl.DataFrame:
    """The sweep's tickets trained with other settings; keys are the same for all settings."""
    spec, store = sweep(place)
    other = replace(spec, ppo=change(spec.ppo))
    found = []
    for level in chosen:
        mine = tickets(store, "ppo", level)
        masks, initial = (torch.stack(rows) for rows in ([t.mask for t in mine], _initial(mine)))
        seeds = [ticket.seed for ticket in mine]
        found.append(train(other, store, "ppo", level, masks, initial, seeds, "sanity").rows)
    return pl.concat(found)


def _initial(mine: list) -> list[torch.Tensor]:
    return [ticket.initial for ticket in mine]


def again(spec: Sweep, algo: str) -> pl.DataFrame:
    """Each seed's dense policy from the same values with other training keys."""
    seeds = [*range(spec.seeds)] * AGAIN
    return train(spec, None, algo, 0, *_dense(spec, algo, seeds), seeds, "again").rows


def _dense(spec: Sweep, algo: str, seeds: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks that keep all, and what the sweep's dense policies start from."""
    arena = spec.arena(algo)
    keys = torch.tensor([spec.initial_key(seed) for seed in seeds])
    masks = torch.ones(len(seeds), arena.prunable, dtype=torch.bool)
    return masks, initialise(arena, keys, spec.init, spec.log_std)


def narrow(spec: Sweep, chosen: list[int]) -> pl.DataFrame:
    """Dense networks of two equal layers, with as near to a level's weights as widths allow."""
    ends = spec.arena("ppo").actor.sizes
    outer = ends[0] + ends[-1]
    seeds = list(range(spec.seeds))
    found = []
    for level in chosen:
        kept = spec.kept("ppo", level)
        width = max(1, round(math.sqrt(outer**2 / 4 + kept) - outer / 2))
        small = replace(spec, hidden=(width, width))
        masks, initial = _dense(small, "ppo", seeds)
        cells = train(small, None, "ppo", 0, masks, initial, seeds, f"narrow {width}").rows
        share = masks.shape[1] / spec.arena("ppo").prunable
        found.append(cells.with_columns(level=pl.lit(level, pl.Int64), density=pl.lit(share)))
    return pl.concat(found)


def matrix(
    cells: pl.DataFrame, variant: str, metric: str, algo: str = "ppo", env: str = TASK
) -> np.ndarray:
    """``[seeds, levels]``, as a share of random to the sweep's dense."""
    cells = cells.filter((pl.col("algo") == algo) & (pl.col("env") == env))
    random = cells["random_return"][0]
    whole = cells.filter((pl.col("variant") == SWEEP) & (pl.col("level") == 0))
    dense = whole["return_final"].median()
    rows = cells.filter(pl.col("variant") == variant).sort("seed", "level")
    values = rows[metric].to_numpy().reshape(rows["seed"].n_unique(), -1)
    return (values - random) / (dense - random)


def densities(cells: pl.DataFrame, variant: str = AS_IS, env: str = TASK) -> np.ndarray:
    rows = cells.filter((pl.col("variant") == variant) & (pl.col("env") == env))
    return rows.group_by("level").agg(pl.col("density").max()).sort("level")["density"].to_numpy()


def tasks(cells: pl.DataFrame) -> list[str]:
    """Those whose tickets were trained with other settings."""
    there = set(cells.filter(pl.col("variant") == AS_IS)["env"])
    return [env for env in LEVELS if env in there]


def small(cells: pl.DataFrame, env: str, metric: str) -> np.ndarray:
    """Each seed's tickets minus dense networks as small, averaged over the densities."""
    own = matrix(cells, AS_IS, metric, env=env)[:, 1:]
    return (own - matrix(cells, NARROW, metric, env=env)).mean(1)


def change_of(cells: pl.DataFrame, env: str, name: str) -> np.ndarray:
    """Final returns of each seed's tickets under other settings, minus as it is."""
    one, other = (matrix(cells, each, "return_final", env=env)[:, 1:] for each in (name, AS_IS))
    return (one - other).mean(1)


def conclude(cells: pl.DataFrame) -> Finding:
    shown, verdicts, ran = [], [], []
    for env in tasks(cells):
        gaps = {metric: small(cells, env, metric) for metric in METRICS}
        shown.append(
            f"{_short(env)}, tickets minus dense networks as small, of the dense return: "
            + "; ".join(
                f"{METRICS[metric]} {signed(*effect(gap), digits=2)}"
                for metric, gap in gaps.items()
            )
        )
        moved = ", ".join(
            f"{name} {'better' if found > 0 else 'worse'}"
            for name in SETTINGS
            if name != AS_IS and (found := direction(change_of(cells, env, name)))
        )
        word = {1: "above", 0: "not told from", -1: "below"}[direction(gaps["return_final"])]
        verdicts.append(
            f"{_short(env)}: tickets {word} small dense networks; by settings: "
            f"{moved or 'none told apart'}"
        )
        here = cells.filter((pl.col("env") == env) & (pl.col("algo") == "ppo"))
        ran.append(
            f"{env}, PPO, {here['seed'].n_unique()} seeds at "
            f"{', '.join(f'{d:.1%}' for d in densities(cells, env=env))} of the weights "
            f"(cut: {cuts(here.filter(pl.col('variant') == SWEEP))})"
        )
    again = ", ".join(
        f"{(floor < 0.95).mean():.0%} of {floor.size} ({named})"
        for named, floor in floors(cells).items()
    )
    others = cells.filter(pl.col("env") != TASK)["env"].unique(maintain_order=True).to_list()
    also = f"; dense policies again on {', '.join([TASK, *others])}" if others else ""
    return Finding(
        ran=f"{'; '.join(ran)}{also}; {len(cells.filter(pl.col('variant') != SWEEP))} trainings",
        effect=f"{'; '.join(shown)}; dense policies trained again that end below 0.95: {again}",
        verdict="; ".join(verdicts),
        text=text(cells),
        figures={"sanity": partial(draw, cells)},
    )


def _short(env: str) -> str:
    return env.partition("-")[0]


def floors(cells: pl.DataFrame) -> dict[str, np.ndarray]:
    """Final returns ``[seeds, keys]`` of dense policies trained again, by task and algorithm."""
    rows = cells.filter(pl.col("variant") == OTHER_KEY)
    return {
        f"{_short(env)}, {ALGORITHMS[algo]}": matrix(cells, OTHER_KEY, "return_final", algo, env)
        for env, algo in rows.select("env", "algo").unique(maintain_order=True).rows()
    }


def text(cells: pl.DataFrame) -> str:
    floor = markdown(FLOOR_HEADER, [_floor(*each) for each in floors(cells).items()])
    paragraphs = [
        f"""Shares of the range from the random policy to the median dense one. **Noise floor**:
dense policies trained again from the same values with other keys, by the budgets of the task's
sweep. One level below 0.95 counts as no degradation, two in a row do: where keys of a seed alone
bring a dense policy below 0.95, a degradation level says little.

{floor}"""
    ]
    for env in tasks(cells):
        paragraphs += [
            f"""On {_short(env)} tickets keep their masks; keys are the same in all rows but the
last two, whose networks are dense with two equal hidden layers and as near to a ticket's number of
weights as that allows: {", ".join(f"{each:.1%}" for each in densities(cells, NARROW, env))}.""",
            _table(cells, env),
        ]
    return "\n\n".join(paragraphs)


def _table(cells: pl.DataFrame, env: str) -> str:
    rows = []
    for name in (*SETTINGS, NARROW):
        for metric, word in METRICS.items():
            values = matrix(cells, name, metric, env=env)
            fields = [f"{value:.2f}" for value in values.mean(0)]
            first, last = ([], "-") if name != NARROW else (["-"], "-")
            if name in SETTINGS and name != AS_IS and metric == "return_final":
                last = signed(*effect(change_of(cells, env, name)), digits=2)
            rows.append([f"{name}, {word}", *first, *fields, last])
    shown = (f"{each:.1%}" for each in densities(cells, env=env))
    return markdown(["variant", *shown, "final change, pruned"], rows)


FLOOR_HEADER = (
    "dense policies", "trained again", "mean", "worst", "below 0.95", "deviation of seeds",
    "of keys in a seed",
)  # fmt: skip


def _floor(named: str, floor: np.ndarray) -> list[str]:
    return [
        named,
        f"{floor.size}",
        f"{floor.mean():.3f}",
        f"{floor.min():.2f}",
        f"{(floor < 0.95).mean():.0%}",
        f"{floor.mean(1).std():.3f}",
        f"{floor.std(1).mean():.3f}",
    ]


def draw(cells: pl.DataFrame) -> Figure:
    panels = {}
    for env in tasks(cells):
        for metric, title in METRICS.items():
            lines = [
                Line(name, 100 * densities(cells, env=env), matrix(cells, name, metric, env=env))
                for name in SETTINGS
            ]
            x = 100 * densities(cells, NARROW, env)
            lines.append(Line(NARROW, x, matrix(cells, NARROW, metric, env=env)))
            panels[f"{_short(env)}, {title}"] = lines
    seeds = [len(matrix(cells, AS_IS, "return_final", env=env)) for env in tasks(cells)]
    return line_figure(
        panels,
        "Tickets of PPO under other settings",
        f"mean of {' and '.join(map(str, seeds))} seeds, 95% interval",
        "density",
        "share of the dense return",
        share_y=False,
    )


EXPERIMENT = Experiment(
    name="sanity",
    question="Do keys, learning rate, budget or width explain it?",
    claim="What tickets do is not the doing of their learning rate or budget, nor what a dense "
    "network as small would do (our own premise)",
    collect=collect,
    conclude=conclude,
)

if __name__ == "__main__":
    main(EXPERIMENT)
