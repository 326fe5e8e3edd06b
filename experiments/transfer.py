"""Is a mask found by cloning any good for reinforcement learning, and the reverse?

Each seed's own initial weights under its own mask, under the mask that the other algorithm found
from the same weights, and under the mask the same algorithm found from another seed's::

    python -m experiments.transfer [--quick]
"""

from __future__ import annotations

from functools import partial

import numpy as np
import polars as pl
import torch
from matplotlib.figure import Figure

from experiments.drawing import Line, line_figure
from experiments.frame import Experiment, Finding, Place, direction, effect, main, markdown, signed
from experiments.remarks import cuts, levels_of
from experiments.sweeps import TICKET, cartpole, tickets
from experiments.training import train

ALGORITHMS = {"ppo": "PPO", "bc": "cloning"}
OTHER = {"ppo": "bc", "bc": "ppo"}
LEVELS = (5, 7, 9)
METRICS = {
    "return_initial": "before training",
    "return_auc": "learning curve",
    "return_final": "final return",
}
WORDS = {1: "better than", 0: "not told from", -1: "worse than"}
OWN, ALGORITHM, SEED, SHUFFLED = "own mask", "other algorithm's", "other seed's", "shuffled"


def collect(place: Place) -> pl.DataFrame:
    spec, swept = cartpole.spec(place), cartpole.cells(place)
    there = set(levels_of(swept, "ppo")) & set(levels_of(swept, "bc"))
    chosen = sorted(there & set(LEVELS)) or [max(there)]
    stored = (
        swept.filter(pl.col("level").is_in([0, *chosen]))
        .with_columns(
            mask=pl.when(pl.col("level") == 0)
            .then(pl.lit("dense"))
            .when(pl.col("condition") == TICKET)
            .then(pl.lit(OWN))
            .when((pl.col("condition") == "permuted/permuted") & (pl.col("controls") == "ticket"))
            .then(pl.lit(SHUFFLED))
        )
        .drop_nulls("mask")
    )
    fresh = pl.concat(
        place.once(f"transfer-{algo}-{level:02d}", spec, partial(_crossed, place, algo, level))
        for algo in ALGORITHMS
        for level in chosen
    )
    return pl.concat([fresh, stored.select(fresh.columns)])


def _crossed(place: Place, algo: str, level: int) -> pl.DataFrame:
    """Dense starts trained under the other algorithm's masks, then under another seed's."""
    spec, store = cartpole(place)
    dense = torch.stack([ticket.initial for ticket in tickets(store, algo, 0)])
    own, other = (
        torch.stack([ticket.mask for ticket in tickets(store, name, level)])
        for name in (algo, OTHER[algo])
    )
    masks = torch.cat([other, own.roll(1, 0)])
    seeds, rows = list(range(spec.seeds)) * 2, torch.cat([dense, dense])
    return train(spec, store, algo, level, masks, rows, seeds, "transfer").rows.with_columns(
        mask=pl.Series([ALGORITHM] * spec.seeds + [SEED] * spec.seeds)
    )


def matrix(cells: pl.DataFrame, algo: str, mask: str, metric: str) -> np.ndarray:
    """``[seeds, levels]``, as a share of random to dense."""
    here = cells.filter(pl.col("algo") == algo)
    random = here["random_return"].mean()
    dense = here.filter(pl.col("mask") == "dense")["return_final"].median()
    rows = here.filter(pl.col("mask") == mask).sort("seed", "level")
    values = rows[metric].to_numpy().reshape(rows["seed"].n_unique(), -1)
    return (values - random) / (dense - random)


def gap(cells: pl.DataFrame, algo: str, metric: str, one: str, two: str) -> np.ndarray:
    """Difference of two masks of each seed, averaged over the densities."""
    return (matrix(cells, algo, one, metric) - matrix(cells, algo, two, metric)).mean(1)


def conclude(cells: pl.DataFrame) -> Finding:
    shown, verdicts = [], []
    for algo, name in ALGORITHMS.items():
        whose = f"{ALGORITHMS[OTHER[algo]]}'s mask under {name}"
        above = {mask: gap(cells, algo, "return_auc", ALGORITHM, mask) for mask in (SHUFFLED, OWN)}
        shown.append(
            f"{whose}: {signed(*effect(above[SHUFFLED]), digits=2)} above a shuffled one, "
            f"{signed(*effect(above[OWN]), digits=2)} above its own"
        )
        words = (WORDS[direction(above[mask])] for mask in (SHUFFLED, OWN))
        verdicts.append("{}: {} a shuffled one, {} its own".format(whose, *words))
    return Finding(
        ran=setting_of(cells.filter(pl.col("level") > 0)),
        effect="learning curve, of the dense return, mean over densities: " + "; ".join(shown),
        verdict="; ".join(verdicts),
        text=text(cells),
        figures={"transfer": partial(draw, cells)},
    )


def setting_of(cells: pl.DataFrame) -> str:
    density = densities(cells)
    return (
        f"{cells['env'][0]}, {cells['seed'].n_unique()} seeds at "
        f"{', '.join(f'{each:.2%}' for each in density)} of the weights, "
        f"{cells['train_steps'].max():,} steps, {len(cells)} trainings (cut: {cuts(cells)})"
    )


def densities(cells: pl.DataFrame) -> np.ndarray:
    return cells.group_by("level").agg(pl.col("density").max()).sort("level")["density"].to_numpy()


def text(cells: pl.DataFrame) -> str:
    rows = []
    for algo, name in ALGORITHMS.items():
        for mask in (ALGORITHM, SEED, SHUFFLED):
            rows.append(
                [
                    f"{mask} mask minus own, {name}",
                    *(signed(*effect(gap(cells, algo, m, mask, OWN)), digits=2) for m in METRICS),
                ]
            )
    return f"""{setting_of(cells.filter(pl.col("level") > 0))}.

PPO and cloning start a seed from the same actor, so that a mask found by one fits the other's
initial values. Differences within a seed, averaged over the densities, as a share of the range
from the random policy to the dense one. "Shuffled" is permuted/permuted with `ticket` controls:
the same number of weights in each layer, elsewhere.

""" + markdown(["mask, trained by", *METRICS.values()], rows)


def draw(cells: pl.DataFrame) -> Figure:
    panels = {}
    for algo, name in ALGORITHMS.items():
        here = cells.filter((pl.col("algo") == algo) & (pl.col("level") > 0))
        x = (
            100
            * here.group_by("level")
            .agg(pl.col("density").max())
            .sort("level")["density"]
            .to_numpy()
        )
        panels[f"trained by {name}"] = [
            Line(mask, x, matrix(cells, algo, mask, "return_auc"))
            for mask in (OWN, ALGORITHM, SEED, SHUFFLED)
        ]
    return line_figure(
        panels,
        cells["env"][0],
        f"own initial values under different masks, {cells['seed'].n_unique()} seeds, 95% interval",
        "density",
        "learning curve,\nshare of the dense return",
    )


EXPERIMENT = Experiment(
    name="transfer",
    question="Does a mask serve another algorithm, or another seed?",
    claim="No claim that we know of: cloning's masks under PPO, and the reverse",
    collect=collect,
    conclude=conclude,
)

if __name__ == "__main__":
    main(EXPERIMENT)
