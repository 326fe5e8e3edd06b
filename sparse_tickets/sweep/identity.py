"""What a run is: its spec, the hash of it, and the columns of its rows, in spec.json."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from sparse_tickets.files import StoreError, write_atomic
from sparse_tickets.sweep.integrity import Damaged, canonical, parse_json, read_regular, sha256

__all__ = ["Identity", "check_same", "read_spec", "spec_hash", "write_spec"]


class Identity(NamedTuple):
    """What spec.json says of a run.

    Attributes:
        spec: the spec as JSON holds it.
        spec_hash: its hash.
        columns: of the run's rows; empty where an earlier version did not say.
    """

    spec: dict[str, Any]
    spec_hash: str
    columns: tuple[str, ...]


def spec_hash(spec: Mapping[str, Any]) -> str:
    """First 12 hexadecimal digits of the SHA-256 of a spec's canonical JSON.

    Raises:
        TypeError: something JSON cannot hold.
        ValueError: a number that is not finite.
    """
    return sha256(canonical(spec).encode())[:12]


def write_spec(file: Path, spec: Mapping[str, Any], columns: Sequence[str]) -> None:
    """Write a spec with its hash, and the columns that the run's rows are going to have."""
    content = {
        "spec_hash": spec_hash(spec),
        "columns": list(columns),
        "spec": json.loads(canonical(spec)),
    }
    write_atomic(file, (json.dumps(content, indent=2) + "\n").encode())


def read_spec(file: Path) -> Identity:
    """What a run is.

    Raises:
        StoreError: there is none, or it is not what was written.
    """
    try:
        content = parse_json(file, read_regular(file))
        spec, recorded = content["spec"], content["spec_hash"]
        if spec_hash(spec) == recorded:
            return Identity(spec, recorded, tuple(content.get("columns", ())))
        reason = "the spec does not match its hash"
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(f"{file.parent} holds no run: there is no {file}") from None
    except Damaged as damage:
        reason = damage.problems[file]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"it is not a spec: {error}"
    raise StoreError(
        f"{file} is damaged ({reason}): restore it, choose another --out, or discard the run with "
        "--overwrite"
    )


def check_same(
    folder: Path, run: Identity, asked: Mapping[str, Any], columns: Sequence[str]
) -> None:
    """Raise `StoreError`, naming what differs, unless a run has this spec and these columns."""
    if run.spec_hash != spec_hash(asked):
        _refuse_other(folder, run, asked)
    if set(run.columns) == set(columns):
        return
    if run.columns:
        lacking = ", ".join(sorted(set(columns) - set(run.columns))) or "nothing"
        unknown = ", ".join(sorted(set(run.columns) - set(columns))) or "nothing"
        difference = f"its rows lack {lacking} and have {unknown} that this version does not write"
    else:
        difference = "it does not say which columns its rows have"
    raise StoreError(
        f"{folder} was begun by another version of this library: {difference}. It can be read "
        "(sparse-tickets report), not gone on with, since its table would mix two kinds of rows. "
        "Finish it with that version, choose another --out, or discard it with --overwrite"
    )


def _refuse_other(folder: Path, run: Identity, asked: Mapping[str, Any]) -> NoReturn:
    differences = list(_differences(run.spec, json.loads(canonical(asked))))
    shown = "; ".join(differences[:4])
    more = f"; and {len(differences) - 4} more" if len(differences) > 4 else ""
    raise StoreError(
        f"{folder} holds another run ({run.spec_hash}, asked for {spec_hash(asked)}): "
        f"{shown}{more}. Choose another --out, or discard that run with --overwrite"
    )


def _differences(stored: Any, asked: Any, field: str = "") -> Iterator[str]:
    """Name each field in which two JSON values differ."""
    if isinstance(stored, dict) and isinstance(asked, dict):
        for key in sorted({*stored, *asked}):
            name = f"{field}.{key}" if field else key
            if key not in asked:
                yield f"{name} is {stored[key]!r} there, absent here"
            elif key not in stored:
                yield f"{name} is absent there, {asked[key]!r} here"
            else:
                yield from _differences(stored[key], asked[key], name)
    elif stored != asked:
        yield f"{field} is {stored!r} there, {asked!r} here"
