"""What ``overwrite`` deletes: names that a run gives, and nothing beyond a link."""

from __future__ import annotations

import os
import re
from pathlib import Path

from sparse_tickets.files import StoreError
from sparse_tickets.sweep import locks
from sparse_tickets.sweep.integrity import Damaged, read_regular
from sparse_tickets.sweep.unit import ALGO, DATA, MANIFEST, REWIND, ROWS, TICKETS, UNIT

__all__ = ["discard", "refuse_strangers"]

_DAMAGED = r"(\.damaged(-[0-9]+)?)?"
# All that a run ever writes in its two folders.
_OWN = {
    "units": re.compile(
        rf"{UNIT}(\.(json|parquet|safetensors))?{_DAMAGED}|{UNIT}\.lock(~[0-9a-f]{{16}})?"
        rf"|\.{ALGO}~[0-9a-f]+\.tmp"
    ),
    "data": re.compile(
        rf"({'|'.join(DATA)}|{UNIT}-rewind)\.safetensors{_DAMAGED}|\.{ALGO}~[0-9a-f]+\.tmp"
    ),
}


def refuse_strangers(folder: Path) -> None:
    """Raise ``StoreError`` where a folder without a spec has files, which may be anybody's."""
    if any(child for sub in _OWN for child in (folder / sub).iterdir()):
        raise StoreError(
            f"{folder} has files in units/ or data/ but no spec.json, so they are not known to be "
            "a run's: choose another --out, or restore or move them"
        )


def discard(folder: Path) -> None:
    """Delete a run's results and data; the spec stays to be replaced.

    Only names that a run gives are deleted, and nothing beyond a link.
    """
    spec = folder / "spec.json"
    try:
        known = b'"spec_hash"' in read_regular(spec)
    except Damaged:
        known = False
    own = [
        entry
        for sub, names in _OWN.items()
        for entry in (folder / sub).iterdir()
        if names.fullmatch(entry.name)
    ]
    # What else could have written such names? A spec.json may be damaged beyond recognition.
    if not known and not own:
        raise StoreError(f"{spec} is not a run's: nothing was overwritten. Choose another --out")
    for sub in _OWN:
        if (folder / sub).is_symlink():
            raise StoreError(
                f"{folder / sub} is a link, and what it leads to is not --overwrite's to delete: "
                "remove the link, or choose another --out"
            )
    for lock in (folder / "units").glob("*.lock"):
        owner, claim = locks.owner(lock), locks.acquire(lock)
        if claim is None:
            raise StoreError(
                f"{owner} is working in {folder}: stop it before --overwrite "
                f"(if it is gone, delete {lock})"
            )
        claim.release()
    for entry in own:
        _delete(entry)


def _delete(entry: Path) -> None:
    """Delete a file, a link, or a unit's folder without what is not the unit's."""
    if entry.is_symlink() or not entry.is_dir():
        entry.unlink(missing_ok=True)
        return
    for name in (MANIFEST, ROWS, TICKETS, REWIND):
        if os.path.lexists(entry / name):
            _delete(entry / name)
    if not any(entry.iterdir()):
        entry.rmdir()
