"""What each command is asked for: its options, and in their docstrings its help."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from sparse_tickets.sweep.spec import Sweep

__all__ = [
    "BenchCommand",
    "InspectCommand",
    "ReportCommand",
    "ShowCommand",
    "StudyCommand",
    "SweepCommand",
    "TransferCommand",
    "VerifyCommand",
]

Files = Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE ...")]


@dataclass(frozen=True)
class SweepCommand:
    """Train, prune, rewind, retrain: every seed, condition and level; resumable."""

    out: Path
    """Folder for results; running the same command again resumes it."""
    spec: Annotated[Sweep, tyro.conf.arg(name="")] = field(default_factory=Sweep)
    dry_run: bool = False
    """Print the cells, the time and the disk the sweep will take, and stop."""
    overwrite: bool = False
    """Discard the run the folder holds, of whatever specification, and start anew."""
    plugin: Files = ()
    """Python files that register your own environments, criteria, conditions or algorithms."""
    device: str = "cpu"
    """Where to train: cpu or cuda; results agree to rounding, which training amplifies."""
    engine: str = "local"
    """local, or ray: units are tasks of a Ray cluster; the same table."""
    address: str | None = None
    """Of the Ray cluster, or auto; default: one is started on this machine."""
    gpus_per_chunk: float = 0.0
    """Share of a GPU that a unit takes on Ray; 0 trains on CPUs."""
    workers: int | None = None
    """Processes that step environments which are not built in; no result depends on it. Default: as
    many as torch has threads, but one for classes and functions of your own."""
    track: str | None = None
    """tensorboard, wandb or trackio: show curves and levels as they come."""


@dataclass(frozen=True)
class StudyCommand:
    """Run the sweeps of a TOML file, on Ray side by side, with one report; resumable."""

    file: tyro.conf.Positional[Path]
    """The study: settings of all sweeps, a [[sweep]] for each, grids."""
    out: Path
    """Folder for results, one folder per sweep; running the same command again resumes it."""
    dry_run: bool = False
    """Print the cells, the time and the disk each sweep and all will take, and stop."""
    overwrite: bool = False
    """Discard the runs the folders hold, of whatever specification, and start anew."""
    plugin: Files = ()
    """Python files that register your own environments, criteria or conditions."""
    device: str = "cpu"
    """Where to train: cpu or cuda; results agree to rounding, which training amplifies."""
    engine: str = "local"
    """local, or ray: units are tasks of a Ray cluster; the same table."""
    address: str | None = None
    """Of the Ray cluster, or auto; default: one is started on this machine."""
    gpus_per_chunk: float = 0.0
    """Share of a GPU that a unit takes on Ray; 0 trains on CPUs."""
    workers: int | None = None
    """Processes that step environments which are not built in; no result depends on it. Default: as
    many as torch has threads, but one for classes and functions of your own."""
    track: str | None = None
    """tensorboard, wandb or trackio: show curves and levels as they come."""


@dataclass(frozen=True)
class ReportCommand:
    """Print a run's table and draw its figures."""

    run: tyro.conf.Positional[Path]
    """The folder given to sweep as --out."""
    metric: Annotated[tuple[str, ...], tyro.conf.arg(metavar="RETURN ...")] = ()
    """Of return_final, return_final_sampled, return_auc (area under the learning curve) and
    return_initial (before training), all by default, return_best, return_initial_sampled."""
    plugin: Files = ()
    """Python files that register your own environments, criteria, conditions or algorithms."""


@dataclass(frozen=True)
class ShowCommand:
    """Draw one ticket's masks, and which inputs its tracks keep, as pictures."""

    run: tyro.conf.Positional[Path]
    """The folder given to sweep as --out."""
    algo: str = "ppo"
    """Algorithm that trained it: ppo, dqn, sac, bc or your own."""
    condition: str = "mask/weights"
    """Condition of the track: how its mask and weights are drawn."""
    controls: str = "own"
    """own, or ticket where the condition was run on the ticket's masks."""
    seed: int = 0
    """Seed of the track, from 0."""
    level: int | None = None
    """Level; default: the sparsest finished."""
    export: Path | None = None
    """Also write the trained policy to this file: .pt, .safetensors or .onnx."""
    plugin: Files = ()
    """Python files that register your own environments, criteria, conditions or algorithms."""


@dataclass(frozen=True)
class VerifyCommand:
    """Retrain some cells of a run in plain torch (the reference ops) and compare."""

    run: tyro.conf.Positional[Path]
    """The folder given to sweep as --out."""
    cells: int = 5
    """How many cells, one of every algorithm and level before a second of any."""
    plugin: Files = ()
    """Python files that register your own environments, criteria, conditions or algorithms."""


@dataclass(frozen=True)
class TransferCommand:
    """Train a run's dense starts under masks that others found."""

    run: tyro.conf.Positional[Path]
    """Folder of the run whose initial values and settings are used."""
    out: Path
    """Folder for rows and tickets of each level."""
    levels: Annotated[tuple[int, ...], tyro.conf.arg(metavar="LEVEL ...")]
    """Of the masks, from 1."""
    algo: str = "ppo"
    """What trains, one of the run's algorithms."""
    masks: Path | None = None
    """Folder of the run that found the masks, of policies with the same layers; default: RUN."""
    found_by: str | None = None
    """The algorithm that found them; default: the one that trains."""
    condition: str = "mask/weights"
    """Of the track that the masks are from."""
    controls: str = "own"
    """Of that track: own or ticket."""
    keep: str = "mask"
    """mask, or inputs: all weights but those of inputs without a path to an action, dense."""
    shift: int = 0
    """Take the mask of the seed so many further on; 1: every seed another's."""
    device: str = "cpu"
    """Where to train: cpu or cuda."""
    plugin: Files = ()
    """Python files that register your own environments, criteria, conditions or algorithms."""


@dataclass(frozen=True)
class BenchCommand:
    """Measure what sparsity gains here: whole steps of your policy, and a layer."""

    what: Literal["both", "steps", "layer"] = "both"
    """Whole training steps in plain loops, warm calls of a single layer, or both."""
    policy: tuple[int, ...] = ()
    """Sizes of the policy, inputs first; default: 17, twice the width, 6."""
    activation: Literal["tanh", "relu", "elu", "gelu", "silu"] = "relu"
    """Of the policy."""
    width: int = 256
    """Inputs and outputs of the single layer."""
    batch: int = 2048
    """Rows per step and per call."""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU where there is one."""
    sparsities: tuple[float, ...] = (0.0, 50.0, 80.0, 90.0, 95.0, 98.0, 99.0)
    """Percents of the weights pruned."""
    threads: int | None = None
    """Of both sides; torch's own number if not given."""


@dataclass(frozen=True)
class InspectCommand:
    """Compile the GPU kernels, no GPU needed: registers, spills, matrix instructions."""

    op: Annotated[tuple[str, ...], tyro.conf.arg(metavar="OPS")] = ()
    """Folders under kernels/; default: all that have GPU kernels."""
    arch: Annotated[tuple[int, ...], tyro.conf.arg(metavar="CCS")] = ()
    """Compute capabilities, of 80, 90 and 100; default: all three."""
    all: bool = False
    """Every shipped configuration, not a few per kernel."""
    json: bool = False
    """Print the numbers as JSON."""
