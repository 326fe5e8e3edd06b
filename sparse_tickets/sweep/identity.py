"""What a run is: its spec and the hash of it, in spec.json."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparse_tickets.files import StoreError, write_atomic
from sparse_tickets.sweep.integrity import Damaged, canonical, parse_json, read_regular, sha256

__all__ = ["check_same", "read_spec", "spec_hash", "write_spec"]


def spec_hash(spec: Mapping[str, Any]) -> str:
    """First 12 hexadecimal digits of the SHA-256 of a spec's canonical JSON.

    Raises:
        TypeError: something JSON cannot hold.
        ValueError: a number that is not finite.
    """
    return sha256(canonical(spec).encode())[:12]


def write_spec(file: Path, spec: Mapping[str, Any]) -> None:
    """Write a spec with its hash."""
    content = {"spec_hash": spec_hash(spec), "spec": json.loads(canonical(spec))}
    write_atomic(file, (json.dumps(content, indent=2) + "\n").encode())


def read_spec(file: Path) -> tuple[dict[str, Any], str]:
    """The spec of a run and its hash.

    Raises:
        StoreError: there is none, or it is not what was written.
    """
    try:
        content = parse_json(file, read_regular(file))
        spec, recorded = content["spec"], content["spec_hash"]
        if spec_hash(spec) == recorded:
            return spec, recorded
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


def check_same(folder: Path, stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise `StoreError`, naming the fields that differ, unless two specs are the same."""
    if spec_hash(stored) == spec_hash(asked):
        return
    differences = list(_differences(stored, json.loads(canonical(asked))))
    shown = "; ".join(differences[:4])
    more = f"; and {len(differences) - 4} more" if len(differences) > 4 else ""
    raise StoreError(
        f"{folder} holds another run ({spec_hash(stored)}, asked for {spec_hash(asked)}): "
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
