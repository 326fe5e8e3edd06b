"""Does a mask serve another task of the same shape, and is it better rewound to later?

Tickets of PPO on CartPole, rewound to the start or to a tenth of the training, trained on CartPole
with a narrow track and with reversed pushes, beside the tickets that those tasks give from the same
initial values, and beside shuffled masks::

    python -m experiments.task_transfer [--quick]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import polars as pl
import torch
from matplotlib.figure import Figure
from torch import Tensor

from experiments.drawing import Line, line_figure
from experiments.frame import Experiment, Finding, Place, direction, effect, main, markdown, signed
from experiments.other_tasks import NARROW, REVERSED, turned
from experiments.sweeps import INPUTS, SharedSweep, cartpole_deep, cartpole_late, quickly, tickets
from experiments.training import kept_inputs, train
from sparse_tickets import Sweep, Ticket
from sparse_tickets.kernels.prune import prune
from sparse_tickets.kernels.random import derive_key
from sparse_tickets.sweep.protocols import protocol

ITSELF = "CartPole-v1"
TASKS = {NARROW: "narrow track", REVERSED: "reversed pushes"}
TITLES = {ITSELF: "CartPole itself", **TASKS}
LEVELS = (2, 3, 4)
"""Of `cartpole_late`, four of the protocol's at a time; `cartpole_deep` has twice as many."""
SEEDS = 10
STEPS = 204_800
METRICS = {
    "return_initial": "before training",
    "return_auc": "learning curve",
    "return_final": "final return",
}
DENSE, OWN, CARRIED, LATE, SHUFFLED = (
    "dense", "the task's own ticket", "CartPole's ticket", "CartPole's, rewound late",
    "CartPole's mask, shuffled",
)  # fmt: skip
AGAIN = "dense, trained for later points"
MASKS = (OWN, CARRIED, LATE, SHUFFLED)


def _spec(place: Place, env: str) -> Sweep:
    """What trains on a task: the settings of CartPole's tickets, with fewer steps."""
    spec = replace(cartpole_late.full(), env=env, rewind_step=0, seeds=SEEDS)
    spec = replace(spec, ppo=replace(spec.ppo, steps=STEPS))
    return quickly(spec) if place.quick else spec


def collect(place: Place) -> pl.DataFrame:
    found = []
    for env, task in TASKS.items():
        spec = _spec(place, env)
        early, late = cartpole_deep.spec(place), cartpole_late.spec(place)
        chosen = [level for level in LEVELS if level < spec.levels]
        jobs: list[tuple[str, object, Callable[[], pl.DataFrame]]] = []
        for level in range(max(chosen) + 1):
            name = f"task-{task.split()[0]}-{level}-own"
            jobs.append((name, (spec, early), partial(_own, place, spec, level)))
        for level in chosen:
            name = f"task-{task.split()[0]}-{level}-carried"
            jobs.append((name, (spec, early, late), partial(_carried, place, spec, level)))
        found += [place.once_wanted(*job) for job in jobs]
    there = [cells for cells in found if cells is not None]
    return pl.concat([_itself(place), *there], how="diagonal")


def _itself(place: Place) -> pl.DataFrame:
    """The tickets on the task that they come from, rewound to the start and to later."""
    late = cartpole_late.cells(place)
    step = 1 if place.quick else 2
    early = cartpole_deep.cells(place).filter(
        (pl.col("algo") == "ppo")
        & pl.col("seed").is_in(late["seed"].unique().to_list())
        & (pl.col("level") % step == 0)
        & (pl.col("level") // step).is_in(late["level"].unique().to_list())
    )
    level = pl.col("level") // step
    return pl.concat(
        [
            early.with_columns(
                level=level,
                mask=pl.when(level == 0).then(pl.lit(DENSE)).otherwise(pl.lit(CARRIED)),
            ),
            # Its dense policies are the same, and stored so that the sweep is there as a whole.
            late.with_columns(
                mask=pl.when(pl.col("level") == 0).then(pl.lit(AGAIN)).otherwise(pl.lit(LATE))
            ),
        ],
        how="diagonal",
    )


def _own(place: Place, spec: Sweep, level: int) -> pl.DataFrame:
    """A task's tickets of one level, pruned by those of the level before; level 0 is dense."""
    _, store = cartpole_deep(place)
    initial = torch.stack([ticket.initial for ticket in tickets(store, "ppo", 0)[: spec.seeds]])
    arena, seeds = spec.arena("ppo"), list(range(spec.seeds))
    prunable = arena.prunable
    if spec.env == REVERSED:
        initial = turned(arena.actor, initial)
    mask = torch.ones(len(seeds), prunable, dtype=torch.bool)
    if level:
        name = f"task-{TASKS[spec.env].split()[0]}-{level - 1}-own"
        settings = spec, cartpole_deep.spec(place)
        before = place.once(name, settings, partial(_own, place, spec, level - 1))
        mask = torch.stack([_unpacked(row, prunable) for row in before.sort("seed")["next"]])
    rows, final = train(spec, None, "ppo", level, mask, initial, seeds, "own")
    kept = torch.full((len(seeds),), spec.kept("ppo", level + 1))
    following = prune(final[:, :prunable].abs(), mask, kept).numpy()
    return rows.with_columns(
        mask=pl.lit(OWN if level else DENSE),
        next=pl.Series([np.packbits(row).tobytes() for row in following], dtype=pl.Binary),
    )


def _unpacked(row: bytes, prunable: int) -> Tensor:
    bits = np.unpackbits(np.frombuffer(row, dtype=np.uint8), count=prunable)
    return torch.from_numpy(bits.astype(bool))


def _carried(place: Place, spec: Sweep, level: int) -> pl.DataFrame:
    """CartPole's tickets, rewound to the start and to later, and their masks shuffled."""
    early = _tickets(place, cartpole_deep, level if place.quick else 2 * level, spec)
    late = _tickets(place, cartpole_late, level, spec)
    initial = torch.stack([ticket.initial for ticket in early])
    mask = torch.stack([ticket.mask for ticket in early])
    starts = {
        CARRIED: (mask, initial),
        LATE: tuple(torch.stack(each) for each in zip(*map(_rewound, late), strict=True)),
        SHUFFLED: (_shuffled(spec.arena("ppo").prunable_layers(), mask, level), initial),
    }
    masks, values = (torch.cat(each) for each in zip(*starts.values(), strict=True))
    if spec.env == REVERSED:
        masks, values = (turned(spec.arena("ppo").actor, each) for each in (masks, values))
    seeds = list(range(spec.seeds)) * len(starts)
    rows, _ = train(spec, None, "ppo", level, masks, values, seeds, "carried")
    inputs = [kept_inputs(ticket) for ticket in (*early, *late)]
    return rows.with_columns(
        mask=pl.Series([name for name in starts for _ in range(spec.seeds)]),
        inputs=pl.Series([*inputs, *[None] * spec.seeds], dtype=pl.List(pl.Boolean)),
    )


def _tickets(place: Place, sweep: SharedSweep, level: int, spec: Sweep) -> list[Ticket]:
    _, store = sweep(place)
    return tickets(store, "ppo", level)[: spec.seeds]


def _rewound(ticket: Ticket) -> tuple[Tensor, Tensor]:
    return ticket.mask, ticket.rewind


def _shuffled(layers: list[tuple[int, int, int]], mask: Tensor, level: int) -> Tensor:
    """As many weights in each layer, elsewhere."""
    shuffled = mask.clone()
    for seed, row in enumerate(shuffled):
        drawn = torch.Generator().manual_seed(derive_key("shuffled", seed, level) % 2**63)
        for begin, out, inp in layers:
            order = torch.randperm(out * inp, generator=drawn)
            row[begin : begin + out * inp] = row[begin : begin + out * inp][order]
    return shuffled


def matrix(cells: pl.DataFrame, env: str, mask: str, metric: str) -> np.ndarray:
    """``[seeds, levels]``, as a share of random to the task's dense return."""
    here = cells.filter(pl.col("env") == env)
    random = here["random_return"].mean()
    dense = here.filter(pl.col("mask") == DENSE)["return_final"].median()
    rows = here.filter((pl.col("mask") == mask) & pl.col("level").is_in(_levels(here)))
    rows = rows.sort("seed", "level")
    values = rows[metric].to_numpy().reshape(rows["seed"].n_unique(), -1)
    return (values - random) / (dense - random)


def _levels(cells: pl.DataFrame) -> list[int]:
    """Those at which masks were carried over."""
    return cells.filter(pl.col("mask") == CARRIED)["level"].unique().sort().to_list()


def densities(cells: pl.DataFrame, env: str) -> np.ndarray:
    rows = cells.filter((pl.col("env") == env) & (pl.col("mask") == CARRIED)).group_by("level")
    return rows.agg(pl.col("density").max()).sort("level")["density"].to_numpy()


def masks(cells: pl.DataFrame, env: str) -> list[str]:
    there = set(cells.filter(pl.col("env") == env)["mask"])
    return [name for name in MASKS if name in there]


def gap(cells: pl.DataFrame, env: str, metric: str, one: str, two: str) -> np.ndarray:
    """Difference of two masks of each seed, averaged over the densities."""
    return (matrix(cells, env, one, metric) - matrix(cells, env, two, metric)).mean(1)


PAIRS = ((CARRIED, SHUFFLED), (CARRIED, OWN), (LATE, CARRIED), (OWN, SHUFFLED))
WORDS = {1: "better than", 0: "not told from", -1: "worse than"}


def conclude(cells: pl.DataFrame) -> Finding:
    words = {
        (CARRIED, SHUFFLED): "above its mask shuffled",
        (CARRIED, OWN): "above the task's own",
        (LATE, CARRIED): "more where rewound late",
    }
    shown, verdicts = [], []
    for env, task in _tasks(cells).items():
        pairs = [pair for pair in words if set(pair) <= set(masks(cells, env))]
        gaps = {pair: gap(cells, env, "return_auc", *pair) for pair in pairs}
        told = (f"{signed(*effect(gaps[pair]), digits=2)} {words[pair]}" for pair in pairs)
        shown.append(f"{task}: CartPole's ticket {', '.join(told)}")
        found = {pair: WORDS[direction(gaps[pair])] for pair in pairs}
        others = {(CARRIED, SHUFFLED): "their masks shuffled", (CARRIED, OWN): "the task's own"}
        compared = [f"{found[pair]} {other}" for pair, other in others.items() if pair in found]
        late = f"rewound late {found[LATE, CARRIED]} rewound to the start"
        verdicts.append(f"{task}: {', '.join([*compared, late])}")
    return Finding(
        ran=setting_of(cells),
        effect="learning curve, of the dense return, mean over densities: " + "; ".join(shown),
        verdict="CartPole's tickets on " + "; ".join(verdicts),
        text=text(cells),
        figures={"task_transfer": partial(draw, cells)},
    )


def _tasks(cells: pl.DataFrame) -> dict[str, str]:
    return {env: task for env, task in TITLES.items() if env in set(cells["env"])}


def setting_of(cells: pl.DataFrame) -> str:
    elsewhere = cells.filter(pl.col("env") != ITSELF)
    others = " and with ".join(task for env, task in _tasks(cells).items() if env != ITSELF)
    share = elsewhere["train_steps"].max() / protocol(ITSELF).ppo.steps
    return (
        f"CartPole-v1, as it is and with {others}, PPO, {cells['seed'].n_unique()} seeds down to "
        f"{cells['density'].min():.1%} of the weights, {elsewhere['train_steps'].max():,} steps "
        f"elsewhere, {len(cells)} trainings (cut: elsewhere {share:.0%} of the steps of CartPole's "
        f"protocol, {cells['seed'].n_unique()} of 15 seeds, 4 of its levels at a time)"
    )


def text(cells: pl.DataFrame) -> str:
    paragraphs = [
        """Two tasks with CartPole's inputs, actions and physics. On a **narrow track** the cart
must stay within a tenth of the way that CartPole allows. With **reversed pushes** the same inputs
matter, and what a policy knows of CartPole is wrong. All begin from the initial values of the same
seeds. The task's own tickets were pruned level by level there; CartPole's, at the whole budget of
the protocol, were rewound to the start, or to a tenth of the training, which brings along what they
had learnt by then, critic and all. "Shuffled" keeps CartPole's number of weights in each layer, and
the initial values of where they are now. Reversed pushes are trained as CartPole with the order of
the two actions swapped in whatever is carried, which is the same. Differences within a seed,
averaged over the densities, as a share of the range from the random policy to the task's dense
return."""
    ]
    for env, task in _tasks(cells).items():
        dense = cells.filter((pl.col("env") == env) & (pl.col("mask") == DENSE))["return_final"]
        there = masks(cells, env)
        rows = [
            [
                f"{one} minus {two}",
                *(
                    signed(*effect(gap(cells, env, metric, one, two)), digits=2)
                    for metric in METRICS
                ),
            ]
            for one, two in PAIRS
            if {one, two} <= set(there)
        ]
        shown = ("return_initial", "return_final")
        means = [
            [
                name,
                *(
                    f"{value:.2f}"
                    for metric in shown
                    for value in matrix(cells, env, name, metric).mean(0)
                ),
            ]
            for name in there
        ]
        header = [
            "mean share",
            *(
                f"{METRICS[metric]}, {density:.1%}"
                for metric in shown
                for density in densities(cells, env)
            ),
        ]
        paragraphs += [
            f"**{task[0].upper()}{task[1:]}**: dense policies end at {dense.mean():.0f} "
            f"({dense.min():.0f} to {dense.max():.0f}).{_positions(cells, env)}",
            markdown(["difference", *METRICS.values()], rows),
            markdown(header, means),
        ]
    return "\n\n".join(paragraphs)


def _positions(cells: pl.DataFrame, env: str) -> str:
    """Whether tickets that have lost the cart's position do worse where it has less room."""
    carried = cells.filter((pl.col("env") == env) & (pl.col("mask") == CARRIED))
    last = carried.filter(pl.col("level") == pl.col("level").max())
    seen = last["inputs"].list.get(INPUTS[ITSELF].index("cart position"))
    if env != NARROW or not 0 < seen.sum() < len(seen):
        return ""
    with_it, without = (
        last.filter(those).select("return_initial", "return_final").mean().row(0)
        for those in (seen, ~seen)
    )
    return (
        f" At {last['density'][0]:.1%} CartPole's tickets of {(~seen).sum()} of {len(seen)} seeds "
        f"see nothing of the cart's position: before training they return {without[0]:.0f} and at "
        f"the end {without[1]:.0f}, the others {with_it[0]:.0f} and {with_it[1]:.0f}."
    )


def draw(cells: pl.DataFrame) -> Figure:
    panels = {
        f"{task}, {METRICS[metric]}": [
            Line(name, 100 * densities(cells, env), matrix(cells, env, name, metric))
            for name in masks(cells, env)
        ]
        for env, task in _tasks(cells).items()
        for metric in ("return_auc", "return_final")
    }
    return line_figure(
        panels,
        "CartPole's tickets of PPO, there and on other tasks of its shape",
        f"mean of {cells['seed'].n_unique()} seeds, 95% interval",
        "density",
        "share of the dense return",
    )


EXPERIMENT = Experiment(
    name="task_transfer",
    question="Does a mask serve another task, and better when rewound late?",
    claim="Masks carry over to related tasks (Morcos et al. 2019, between data sets of images; of "
    "policies no claim that we know of)",
    collect=collect,
    conclude=conclude,
)

if __name__ == "__main__":
    main(EXPERIMENT)
