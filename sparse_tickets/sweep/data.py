"""Data sets kept beside a sweep's units: experts and demonstrations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sparse_tickets.files import write_atomic
from sparse_tickets.sweep.integrity import Damaged, read_regular, report_damage, set_aside
from sparse_tickets.sweep.store import Store
from sparse_tickets.sweep.tensors import checksum, dump_tensors, parse_tensors

__all__ = ["checksum", "data_file", "read_data", "write_data"]


def data_file(store: Store, name: str) -> Path:
    """Where a data set is kept."""
    return store.data / f"{name}.safetensors"


def write_data(store: Store, name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Write tensors to ``data/<name>.safetensors`` in one step, unless they are there.

    Returns:
        Whether these are stored now; False where another process was first.

    Raises:
        StoreError: the disk is full, or the folder cannot be written.
    """
    contents = dump_tensors(tensors, name, store.spec_hash)
    return write_atomic(data_file(store, name), contents, replace=False)


def read_data(store: Store, name: str) -> dict[str, Tensor] | None:
    """Read what `write_data` wrote; None if it is not there.

    A file that is not what was written is named in a warning and in ``store.damaged``, renamed to
    ``*.damaged``, and counts as not there.
    """
    path = data_file(store, name)

    def read(place: Path) -> dict[str, Tensor]:
        return parse_tensors(place, read_regular(place), name, store.spec_hash)

    def is_damaged(place: Path) -> bool:
        try:
            read(place)
        except Damaged:
            return True
        return False

    try:
        return read(path)
    except FileNotFoundError:
        return None
    except Damaged as damage:
        set_aside(path, is_damaged)
        report_damage(store.damaged, damage, "it will be made again where it is needed")
        return None
