"""How sparse do CartPole policies get, and what makes a ticket win: its mask or its weights?

The paper's main figure by the protocol: PPO and behavioural cloning, four conditions, 15 seeds, 20
levels. Writes ``results/cartpole.parquet``, ``results/cartpole.md`` and ``figures/cartpole_*.png``;
resumes if stopped::

    python experiments/cartpole.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import polars as pl
from rich.console import Console

from sparse_tickets import load_results, run_sweep
from sparse_tickets.analysis.contributions import contributions
from sparse_tickets.analysis.figures import contribution_figure, return_figure, save
from sparse_tickets.analysis.parquet import write_parquet
from sparse_tickets.analysis.table import compare, degradation, markdown_table
from sparse_tickets.sweep.progress import SweepProgress
from sparse_tickets.sweep.protocols import protocol

HERE = Path(__file__).parent
OUT = HERE.parent / "runs" / "cartpole"
METRICS = ("return_final", "return_auc", "return_final_sampled", "return_initial")
SPEC = replace(protocol("CartPole-v1"), seeds=15, levels=20)


def main() -> None:
    with SweepProgress(SPEC, Console()) as progress:
        run_sweep(SPEC, OUT, on_progress=progress.advance)
    frame = load_results(OUT)
    write_parquet(HERE / "results" / "cartpole.parquet", frame)
    tables = write(frame)
    print(tables)
    with pl.Config(tbl_rows=-1, tbl_cols=-1, tbl_width_chars=200, float_precision=2):
        print("Degradation level of each condition", degradation(frame))
        print("Cloning against PPO, paired by seed", compare(frame))
        print("Contributions", contributions(frame))


def write(frame: pl.DataFrame) -> str:
    """Draw the figures and write the tables, which are returned too."""
    shown = [name for name in METRICS if name in frame.columns]
    figures = {
        "returns": return_figure(frame, metric=METRICS[:2]),
        "effective_density": return_figure(frame, effective_density=True),
        "contributions": contribution_figure(frame, metric=METRICS[:2]),
    }
    for name, figure in figures.items():
        save(figure, HERE / "figures" / f"cartpole_{name}.png")
    tables = "\n".join(markdown_table(frame, name) for name in shown)
    (HERE / "results" / "cartpole.md").write_text(tables)
    return tables


if __name__ == "__main__":
    main()
