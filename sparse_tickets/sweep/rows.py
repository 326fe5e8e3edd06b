"""The rows of a unit: one per track, as Parquet."""

from __future__ import annotations

import io
import numbers
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow

__all__ = ["COLUMNS", "OPTIONAL", "SORTED_BY", "from_parquet", "to_parquet"]

COLUMNS = {
    "env": "string",
    "algo": "string",
    "condition": "string",
    "controls": "string",
    "seed": "int64",
    "level": "int64",
    "density": "double",
    "effective_density": "double",
    "has_path": "bool",
    "dead_inputs": "int64",
    "dead_units": "int64",
    "reachable_actions": "int64",
    "return_initial": "double",
    "return_initial_sampled": "double",
    "return_final": "double",
    "return_best": "double",
    "return_final_sampled": "double",
    "return_auc": "double",
    "curve": "list<double>",
    "train_steps": "int64",
    "wall_s": "double",
    "random_return": "double",
    "diverged": "bool",
}
# Also written, but lacking in runs of earlier versions, which are gone on with all the same.
OPTIONAL = {
    "curve_sampled": "list<double>",
    "mask_iou": "double",
    "dormant_share": "double",
    "effective_rank": "int64",
    "parameter_norm": "double",
    "dormant_curve": "list<double>",
    "norm_curve": "list<double>",
    "gradient_norm": "double",
    "gradient_norm_curve": "list<double>",
    "train_s": "double",
    "commit": "string",
    "processor": "string",
}
SORTED_BY = ("env", "algo", "condition", "controls", "seed", "level")


def to_parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows as Parquet: every column of `COLUMNS` in its type, then any others.

    Raises:
        ValueError: no rows, a missing column, or a value that does not fit its column.
    """
    import pyarrow
    import pyarrow.parquet

    if not rows:
        raise ValueError("rows must not be empty")
    missing = sorted({column for row in rows for column in COLUMNS if column not in row})
    if missing:
        raise ValueError(f"rows must have every column, missing {', '.join(missing)}")
    names = list(dict.fromkeys([*COLUMNS, *(name for row in rows for name in row)]))
    columns = {}
    for name in names:
        values = [row.get(name) for row in rows]
        if (COLUMNS | OPTIONAL).get(name) == "int64":
            # Arrow would drop the fraction of a Python float.
            wrong = [v for v in values if not isinstance(v, numbers.Integral | None)]
            if wrong:
                raise ValueError(f"column {name!r} must hold integers, got {wrong[0]!r}")
        try:
            columns[name] = pyarrow.array(values, type=_arrow_type(name))
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
            raise ValueError(f"column {name!r}: {error}") from error
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink, compression="zstd")
    return sink.getvalue()


def from_parquet(data: bytes) -> list[dict[str, Any]]:
    """The rows that `to_parquet` wrote."""
    import pyarrow.parquet

    return pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()


def _arrow_type(column: str) -> pyarrow.DataType | None:
    """The type of a known column; None lets arrow infer it."""
    import pyarrow

    name = (COLUMNS | OPTIONAL).get(column)
    if name == "list<double>":
        return pyarrow.list_(pyarrow.float64())
    return None if name is None else pyarrow.type_for_alias(name)
