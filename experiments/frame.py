"""What every experiment shares: where it trains, its data, its figures, its part of the README.

An experiment is a module with an `EXPERIMENT`: a claim, a function that trains what is not trained
yet and returns a table with one row per cell, and one that draws a `Finding` from that table alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from rich.console import Console

from sparse_tickets import Sweep, load_results, run_sweep
from sparse_tickets.analysis.figures import save
from sparse_tickets.analysis.parquet import write_parquet
from sparse_tickets.analysis.statistics import bootstrap_interval, mean, sign_flip
from sparse_tickets.files import write_atomic
from sparse_tickets.provenance import commit, processor
from sparse_tickets.sweep.progress import SweepProgress
from sparse_tickets.sweep.rows import COLUMNS, OPTIONAL
from sparse_tickets.sweep.store import Store, spec_hash

__all__ = [
    "NAMES",
    "RESULTS",
    "SOURCE",
    "Experiment",
    "Finding",
    "Place",
    "direction",
    "effect",
    "main",
    "markdown",
    "reported",
    "run",
    "signed",
]

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results"
NAMES = (
    "bc_vs_rl",
    "distribution_shift",
    "conditions",
    "rescaling",
    "transfer",
    "task_transfer",
    "input_masks",
    "maze_inputs",
    "noise",
    "during_training",
    "failing_ticket",
    "stability",
    "sanity",
    "cleanrl",
    "cost",
)
"""All experiments, in the order of the README."""
SOURCE = "source"
"""Column that names the sweep or job a cell is of, with a hash of all its settings."""
_COLUMNS = ("claim", "what we ran", "effect [95% interval]", "verdict", "command", "time", "figure")


@dataclass(frozen=True)
class Place:
    """Where an experiment keeps what it trains, so that the same command goes on after a stop.

    Attributes:
        runs: a folder; experiments that need the same sweep share it there.
        quick: whether everything is to be cut down to about a minute.
        partial: whether sweeps are taken as far as they are.
        stored: tables whose cells are taken in place of training, the first that has them.
    """

    runs: Path
    quick: bool = False
    partial: bool = False
    stored: tuple[Path, ...] = ()

    def sweep(self, name: str, spec: Sweep) -> Store:
        """The sweep called ``name``, finished unless ``partial``."""
        if self.partial and self._begun(name):
            return Store(self.runs / name)
        with SweepProgress(spec, Console()) as progress:
            return run_sweep(spec, self.runs / name, on_progress=progress.advance)

    def cells(self, name: str, spec: Sweep, *, dense: bool = True) -> pl.DataFrame:
        """A sweep's cells alone: of a stored table that has every one, else of `sweep`.

        Dense policies may be missing there where they are not ``dense``: another sweep has them.
        """
        found = self._stored_sweep(name, spec, dense)
        if found is None:
            found = load_results(self.sweep(name, spec).path)
            found = found.with_columns(pl.lit(_sweep_source(name, spec)).alias(SOURCE))
        return found

    def wants(self, name: str, spec: Sweep | None = None, *, dense: bool = True) -> bool:
        """Whether a sweep is to be told of: one that has not begun is left where ``partial``.

        Given its spec, one whose cells are stored, as for `cells`, is told of, too.
        """
        if not self.partial or self._begun(name):
            return True
        return spec is not None and self._stored_sweep(name, spec, dense) is not None

    def _begun(self, name: str) -> bool:
        return (self.runs / name / "spec.json").exists()

    def once(
        self, name: str, settings: object, compute: Callable[[], pl.DataFrame]
    ) -> pl.DataFrame:
        """What ``compute`` gives, stored where it was computed with these settings before."""
        file = self._file(name, settings)
        stored = next(self._of(file.stem), None)
        if stored is not None:
            return stored
        if not file.exists():
            print(name, flush=True)
            origin = {"commit": commit(), "processor": processor()}
            table = compute().with_columns(**{k: pl.lit(v, pl.String) for k, v in origin.items()})
            file.parent.mkdir(parents=True, exist_ok=True)
            write_parquet(file, table)
        return pl.read_parquet(file).with_columns(pl.lit(file.stem).alias(SOURCE))

    def once_wanted(
        self, name: str, settings: object, compute: Callable[[], pl.DataFrame]
    ) -> pl.DataFrame | None:
        """`once`; None of what is not there yet, where ``partial``."""
        if self.partial and not self.kept(name, settings):
            return None
        return self.once(name, settings, compute)

    def kept(self, name: str, settings: object) -> bool:
        """Whether `once` has it."""
        file = self._file(name, settings)
        return file.exists() or next(self._of(file.stem), None) is not None

    def _stored_sweep(self, name: str, spec: Sweep, dense: bool) -> pl.DataFrame | None:
        for found in self._of(_sweep_source(name, spec)):
            cells = found.select([each for each in found.columns if each in _OF_A_SWEEP])
            if set(COLUMNS) <= set(cells.columns) and _is_whole(cells, spec, dense):
                return cells
        return None

    def _of(self, source: str) -> Iterator[pl.DataFrame]:
        """The stored cells of a source, by table."""
        for file in self.stored:
            if file.exists() and SOURCE in pl.read_parquet_schema(file):
                found = pl.read_parquet(file).filter(pl.col(SOURCE) == source)
                if len(found):
                    yield found

    def _file(self, name: str, settings: object) -> Path:
        digest = hashlib.sha256(repr(_plain(settings)).encode()).hexdigest()[:12]
        return self.runs / f"{name}-{digest}.parquet"


_OF_A_SWEEP = (*COLUMNS, *OPTIONAL, SOURCE)


def _sweep_source(name: str, spec: Sweep) -> str:
    return f"{name}-{spec_hash(spec.to_dict())}"


def _is_whole(cells: pl.DataFrame, spec: Sweep, dense: bool) -> bool:
    """Whether these are all cells of a sweep, each once, and nothing else.

    All but the dense policies are enough where those are not asked for.
    """
    wanted = {
        (algo, level, track.seed, track.condition, track.controls)
        for algo in spec.algos
        for level in range(spec.levels)
        for track in spec.tracks(level)
    }
    found = cells.select("algo", "level", "seed", "condition", "controls").rows()
    pruned = {cell for cell in wanted if cell[1] > 0}
    return any(
        len(found) == len(each) and set(found) == each
        for each in ((wanted,) if dense else (wanted, pruned))
    )


@dataclass(frozen=True)
class Finding:
    """What an experiment's data say of its claim; every number comes from them.

    Attributes:
        ran: what was run, and how it was cut.
        effect: the main effect with its interval.
        verdict: whether that agrees with the claim.
        text: the section in the README, Markdown; figures come after it.
        figures: by name, to be drawn; the first stands in the table.
    """

    ran: str
    effect: str
    verdict: str
    text: str
    figures: Mapping[str, Callable[[], Figure]]


@dataclass(frozen=True)
class Experiment:
    """One question.

    Attributes:
        name: its module's.
        question: the heading of its section.
        claim: what was claimed, and by whom.
        collect: trains what is missing; one row per cell, with ``wall_s``.
        conclude: draws the finding from those rows.
    """

    name: str
    question: str
    claim: str
    collect: Callable[[Place], pl.DataFrame]
    conclude: Callable[[pl.DataFrame], Finding]


def main(experiment: Experiment) -> None:
    """The command line of ``python -m experiments.NAME``."""
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{experiment.name}", description=experiment.question
    )
    parser.add_argument("--quick", action="store_true", help="tiny; writes to build/experiments")
    parser.add_argument("--partial", action="store_true", help="finish no sweep that has begun")
    parser.add_argument("--again", action="store_true", help="train what results/ has already")
    parser.add_argument("--report", action="store_true", help="from the stored table, no training")
    options = parser.parse_args()
    home = ROOT / "build" / "experiments" if options.quick else HERE
    runs = home / "runs" if options.quick else ROOT / "runs" / "experiments"
    table = home / "results" / f"{experiment.name}.parquet"
    if options.report and not table.exists():
        parser.error(f"there is no {table} to report on: run without --report first")
    others = sorted(table.parent.glob("*.parquet"))
    stored = () if options.again else (table, *others)
    place = Place(runs, options.quick, options.partial, stored)
    run(experiment, home, place, train=not options.report)


def run(experiment: Experiment, home: Path, place: Place, *, train: bool = True) -> Finding:
    """Write an experiment's table, figures and part of the README under ``home``."""
    table = home / "results" / f"{experiment.name}.parquet"
    if train:
        table.parent.mkdir(parents=True, exist_ok=True)
        write_parquet(table, experiment.collect(place))
    cells = pl.read_parquet(table)
    finding = experiment.conclude(cells)
    for name, draw in finding.figures.items():
        save(draw(), home / "figures" / f"{name}.png")
    readme = home / "README.md"
    text = readme.read_text() if readme.exists() else "# Experiments\n"
    write_atomic(readme, reported(text, experiment, finding, cells).encode())
    print(f"{experiment.name}: {finding.effect}: {finding.verdict}", flush=True)
    return finding


def reported(text: str, experiment: Experiment, finding: Finding, cells: pl.DataFrame) -> str:
    """A README with an experiment's row and section as its cells have them."""
    return _with_section(_with_claim(text, experiment, finding, cells), experiment, finding, cells)


def effect(values: ArrayLike) -> tuple[float, float, float]:
    """Mean over seeds and its 95% bootstrap interval."""
    column = np.asarray(values, dtype=np.float64)
    low, high = bootstrap_interval(column[:, None], mean)
    return float(mean(column)), float(low[0]), float(high[0])


def direction(differences: ArrayLike) -> int:
    """1 or -1 where the exact sign-flip test over seeds finds a direction at 5%, else 0."""
    values = np.asarray(differences, dtype=np.float64)
    return int(np.sign(values.mean())) if sign_flip(values) < 0.05 else 0


def signed(middle: float, low: float, high: float, digits: int = 1) -> str:
    """``+1.2 [0.3, 2.0]``."""
    return f"{middle:+.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, its first column of words and the others of numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _plain(settings: object) -> object:
    """Sweeps as what they are stored by: a field that comes later makes no other sweep of them."""
    if isinstance(settings, Sweep):
        return json.dumps(settings.to_dict(), sort_keys=True)
    return tuple(map(_plain, settings)) if isinstance(settings, tuple) else settings


def _with_claim(text: str, experiment: Experiment, finding: Finding, cells: pl.DataFrame) -> str:
    """The table of claims with this experiment's row as it is now."""
    begin, end = "<!-- claims:begin -->", "<!-- claims:end -->"
    old = re.search(f"{begin}.*?{end}", text, re.DOTALL)
    lines = old[0].splitlines() if old else []
    rows = {name: line for line in lines for name in NAMES if f"experiments.{name}`" in line}
    picture = next(iter(finding.figures))
    rows[experiment.name] = (
        f"| {experiment.claim} | {finding.ran} | {finding.effect} | **{finding.verdict}** "
        f"| `python -m experiments.{experiment.name}` | {_clock(float(cells['wall_s'].sum()))} "
        f"| [{picture}](figures/{picture}.png) |"
    )
    ordered = [rows[name] for name in NAMES if name in rows]
    head = ["| " + " | ".join(_COLUMNS) + " |", "|" + " --- |" * len(_COLUMNS)]
    block = "\n".join([begin, *head, *ordered, end])
    return text.replace(old[0], block) if old else f"{text}\n{block}\n"


def _with_section(text: str, experiment: Experiment, finding: Finding, cells: pl.DataFrame) -> str:
    begin, end = (f"<!-- {experiment.name}:{side} -->" for side in ("begin", "end"))
    pictures = [f"![{name.replace('_', ' ')}](figures/{name}.png)" for name in finding.figures]
    heading = f"## {experiment.question} `{experiment.name}.py`"
    paragraphs = map(_wrapped, [*finding.text.strip().split("\n\n"), _origin(cells)])
    block = "\n\n".join([begin, heading, *paragraphs, *pictures, end])
    old = re.search(f"{re.escape(begin)}.*?{re.escape(end)}", text, re.DOTALL)
    return text.replace(old[0], block) if old else f"{text}\n{block}\n"


def _origin(cells: pl.DataFrame) -> str:
    """The commits that a table's cells were trained at."""
    there = "commit" in cells.columns
    stored: list[str] = cells["commit"].drop_nulls().unique().sort().to_list() if there else []
    clean = [f"`{commit}`" for commit in stored if not commit.endswith("-dirty")]
    changed = [f"`{c.removesuffix('-dirty')}`, changed" for c in stored if c.endswith("-dirty")]
    commits = "; ".join(clean + changed) or "not stored"
    told = f"Commits that trained these cells: {commits}."
    if changed:
        dirty = cells["commit"].str.ends_with("-dirty").sum()
        told += f" Changed trees trained {dirty} of {len(cells)}; what stands above rests on them."
    return told


def _wrapped(paragraph: str) -> str:
    return paragraph if paragraph.startswith("|") else textwrap.fill(paragraph, 104)


def _clock(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes >= 1 else f"{seconds:.0f} s"
