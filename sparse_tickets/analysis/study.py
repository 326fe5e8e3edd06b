"""One report over the runs of a study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl
from rich.table import Table

from sparse_tickets.analysis.parquet import write_parquet
from sparse_tickets.analysis.table import markdown_table, summary_table
from sparse_tickets.files import write_atomic
from sparse_tickets.sweep.store import load_results

__all__ = ["study_report"]


def study_report(
    out: str | Path, names: Sequence[str], metric: str = "return_final"
) -> tuple[Table, list[Path]]:
    """Summarise the runs of a study in one table.

    Args:
        out: folder of the study, which has a run's folder of each name.
        names: of the sweeps.
        metric: the return to summarise.

    Returns:
        The table, where a sweep's name stands for its environment; and the files written: it as
        Markdown, and all rows with a column ``sweep``.

    Raises:
        StoreError: there is no run of a name, or nothing of it is finished yet.
        ValueError: an unknown metric.
    """
    out = Path(out)
    frames = [load_results(out / name).with_columns(sweep=pl.lit(name)) for name in names]
    frame = pl.concat(frames, how="diagonal_relaxed")
    # Sweeps of one environment must not be taken for one.
    named = frame.with_columns(env=pl.col("sweep"))
    files = [out / "results.parquet", out / "table.md"]
    write_parquet(files[0], frame)
    write_atomic(files[1], markdown_table(named, metric).encode())
    return summary_table(named, metric), files
