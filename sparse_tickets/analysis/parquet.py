"""Tables on the disk."""

from __future__ import annotations

import io
from pathlib import Path

import polars as pl

from sparse_tickets.files import write_atomic

__all__ = ["write_parquet"]


def write_parquet(path: Path, table: pl.DataFrame) -> None:
    """Write a table whole or not at all, as `write_atomic` writes a file."""
    data = io.BytesIO()
    table.write_parquet(data)
    write_atomic(path, data.getvalue())
