"""From a run's folder to its table and figures: what `report` and `show` do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import torch
from rich.table import Table

from sparse_tickets.analysis.figures import (
    contribution_figure,
    mask_figure,
    return_figure,
    save,
    ticket_figure,
)
from sparse_tickets.analysis.frame import SHOWN_METRICS
from sparse_tickets.analysis.table import both_tables
from sparse_tickets.export import check_suffix, export_ticket
from sparse_tickets.files import StoreError, write_atomic
from sparse_tickets.kernels.arena import Net
from sparse_tickets.sweep.protocols import protocol
from sparse_tickets.sweep.spec import Sweep, Track
from sparse_tickets.sweep.store import Store, load_results
from sparse_tickets.ticket import Ticket

__all__ = ["find_ticket", "report", "show", "stamp"]

OBSERVATIONS = {
    "CartPole-v1": ("position", "velocity", "angle", "angular velocity"),
    "Acrobot-v1": ("cos 1", "sin 1", "cos 2", "sin 2", "velocity 1", "velocity 2"),
    "MountainCar-v0": ("position", "velocity"),
    "Pendulum-v1": ("cos", "sin", "velocity"),
}


def stamp(spec: Sweep) -> str | None:
    """``toy budget`` where a sweep trains or evaluates less than the protocol asks for."""
    full = protocol(spec.env)
    short = (
        any(spec.budget(algo).steps < full.budget(algo).steps for algo in spec.algos)
        or spec.seeds < 5
        or spec.evaluation.final_episodes < full.evaluation.final_episodes
    )
    return "toy budget" if short else None


def report(out: str | Path, metrics: Sequence[str] = ()) -> tuple[list[Table], list[Path]]:
    """Summarise a run and draw its figures into ``<out>/figures``.

    Args:
        out: the run's folder, finished or not.
        metrics: the returns to report, of ``analysis.METRICS``; by default final, sampled, area
            under the curve and before training.

    Returns:
        Tables for the terminal, one per metric, and the files written.

    Raises:
        StoreError: there is no run, or nothing is finished yet.
        ValueError: an unknown metric.
    """
    out = Path(out)
    frame = load_results(out)
    # Runs of earlier versions have no returns from before training.
    metrics = metrics or [name for name in SHOWN_METRICS if name in frame.columns]
    spec = Sweep.from_dict(Store(out).spec)
    mark = stamp(spec)
    folder = _figures(out)
    files: list[Path] = []
    files += save(return_figure(frame, mark, metric=metrics), folder / "returns.png")
    effective = return_figure(frame, mark, metric=metrics[0], effective_density=True)
    files += save(effective, folder / "returns-effective-density.png")
    files += save(contribution_figure(frame, mark, metric=metrics), folder / "contributions.png")
    kept = _input_masks(spec, Store(out), frame)
    if kept:
        title = f"{spec.env}, mask/weights, share of {spec.seeds} seeds that keep a weight"
        figure = mask_figure(kept, OBSERVATIONS.get(spec.env), mark, title=title)
        files += save(figure, folder / "input-masks.png")
    table = out / "table.md"
    tables, texts = zip(*(both_tables(frame, name) for name in metrics), strict=True)
    write_atomic(table, "\n".join(texts).encode())
    return list(tables), [table, *(file for file in files if file.suffix == ".png")]


def _figures(out: Path) -> Path:
    """The folder that figures go to."""
    folder = out / "figures"
    try:
        folder.mkdir(exist_ok=True)
    except FileExistsError:
        raise StoreError(f"{folder} is not a folder: move it away") from None
    return folder


def _input_masks(spec: Sweep, store: Store, frame: pl.DataFrame) -> list[tuple[str, np.ndarray]]:
    """Per algorithm, how often seeds keep each input weight of their sparsest ticket."""
    masks = []
    for algo in spec.algos:
        rows = frame.filter((pl.col("algo") == algo) & (pl.col("condition") == "mask/weights"))
        if rows.is_empty():
            continue
        sparsest = rows["level"].max()
        tickets = [
            ticket
            for unit in store.units()
            if unit.algo == algo and unit.level == sparsest and store.has(unit)
            for ticket in store.read_tickets(unit)
            if ticket.condition == "mask/weights" and "diverged" not in ticket.metadata
        ]
        if not tickets:
            continue
        density = rows.filter(pl.col("level") == sparsest)["density"][0]
        layers = [ticket.arena.actor.weight(ticket.mask[None], 0)[0] for ticket in tickets]
        share = torch.stack(layers).double().mean(0).numpy()
        masks.append((f"{algo.upper()}, {density:.1%} of weights", share))
    return masks


def find_ticket(store: Store, spec: Sweep, algo: str, track: Track, level: int | None) -> Ticket:
    """One stored ticket; ``level`` None means the sparsest finished.

    Raises:
        StoreError: no such finished cell; the message says what there is.
    """
    wanted = {"condition": track.condition, "controls": track.controls, "seed": track.seed}
    # Sparsest first, so that no more units are read than needed.
    for unit in reversed(store.units()):
        if unit.algo != algo or (level is not None and unit.level != level):
            continue
        if unit.level == 0 and level == 0:
            wanted |= {"condition": "dense", "controls": "shared"}
        for ticket in store.read_tickets(unit):
            if all(getattr(ticket, name) == value for name, value in wanted.items()):
                return ticket
    algos = ", ".join(sorted({unit.algo for unit in store.units()})) or "none"
    raise StoreError(
        f"no finished {algo} ticket of {track.condition} ({track.controls} controls), seed "
        f"{track.seed}, level {'any' if level is None else level} in {store.path} "
        f"(finished algos: {algos}; conditions: {', '.join(spec.conditions)}; "
        f"seeds {spec.first_seed} to {spec.first_seed + spec.seeds - 1})"
    )


def show(
    out: str | Path,
    *,
    algo: str = "ppo",
    condition: str = "mask/weights",
    controls: str = "own",
    seed: int = 0,
    level: int | None = None,
    export: Path | None = None,
) -> list[Path]:
    """Draw a ticket's masks, and its input layer over the levels; optionally export its policy.

    Returns:
        The files written, into ``<out>/figures``.

    Raises:
        StoreError: there is no such finished ticket.
        ValueError: `export` cannot write such a file.
    """
    if export is not None:
        check_suffix(export)
    out = Path(out)
    store = Store(out)
    spec = Sweep.from_dict(store.spec)
    track = Track(seed, condition, controls)
    ticket = find_ticket(store, spec, algo, track, level)
    folder = _figures(out)
    name = f"{algo}-{condition.replace('/', '-')}-seed-{seed}-level-{ticket.level:02d}"
    net = ticket.arena.actor
    layers = [
        (
            _layer_name(net, layer),
            net.weight(ticket.mask[None], layer)[0].numpy(),
            net.weight(ticket.final[None], layer)[0].numpy(),
        )
        for layer in range(net.depth)
    ]
    whose = f"{spec.env}, {algo}, {condition} ({controls} controls), seed {seed}"
    drawn = ticket_figure(layers, stamp(spec), title=f"{whose}, level {ticket.level}")
    files = [save(drawn, folder / f"ticket-{name}.png")[0]]
    steps = [
        find_ticket(store, spec, algo, track, each)
        for each in sorted({0, ticket.level // 2, ticket.level})
    ]
    inputs = [
        (
            f"level {step.level}, {step.density:.1%}",
            net.weight(step.mask[None], 0)[0].numpy().astype(float),
        )
        for step in steps
    ]
    figure = mask_figure(inputs, OBSERVATIONS.get(spec.env), stamp(spec), title=whose)
    files.append(save(figure, folder / f"inputs-{name}.png")[0])
    if export is not None:
        export_ticket(ticket, export)
        files.append(export)
    return files


def _layer_name(net: Net, layer: int) -> str:
    out, inp = net.shape(layer)
    if layer == 0:
        return f"input {inp} → {out}"
    return f"{'head' if layer == net.depth - 1 else f'hidden {layer}'} {inp} → {out}"
