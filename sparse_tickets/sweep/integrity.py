"""Whether stored files are what was written: regular files, by checksum, tied to their unit."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sparse_tickets.files import StoreError

__all__ = [
    "Damaged",
    "Manifest",
    "canonical",
    "parse_json",
    "read_regular",
    "report_damage",
    "set_aside",
    "sha256",
]


class Damaged(Exception):
    """Files that are not what was written.

    Attributes:
        problems: what is wrong, by path.
    """

    def __init__(self, problems: Mapping[Path, str]) -> None:
        super().__init__("; ".join(f"{path} {reason}" for path, reason in problems.items()))
        self.problems = dict(problems)


@dataclass(frozen=True)
class Manifest:
    """What a unit's files are, written with them.

    Attributes:
        unit: the unit's name.
        spec_hash: the run's.
        rows: of its table.
        tickets: in its tickets file.
        inputs: checksum of each data set the unit was trained on, by name.
        files: ``bytes`` and ``sha256`` of each file, by name.
    """

    unit: str
    spec_hash: str
    rows: int
    tickets: int
    files: dict[str, dict[str, Any]]
    inputs: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def of(
        unit: str,
        spec_hash: str,
        *,
        rows: int,
        tickets: int,
        inputs: Mapping[str, str],
        files: Mapping[str, bytes],
    ) -> Manifest:
        """The manifest of a unit with these files."""
        records = {
            name: {"bytes": len(data), "sha256": sha256(data)} for name, data in files.items()
        }
        return Manifest(unit, spec_hash, rows, tickets, records, dict(inputs))

    def to_bytes(self) -> bytes:
        """As JSON that ends with a checksum of the rest."""
        content = asdict(self)
        signed = content | {"sha256": sha256(canonical(content).encode())}
        return (json.dumps(signed, indent=2) + "\n").encode()

    @staticmethod
    def from_bytes(path: Path, data: bytes, *, signed: bool = True) -> Manifest:
        """Read what `to_bytes` wrote; unsigned ones are those of earlier versions.

        Raises:
            Damaged: it is not a manifest, or not as it was written.
        """
        content = parse_json(path, data)
        try:
            if signed:
                signature = content.pop("sha256")
                if signature != sha256(canonical(content).encode()):
                    raise Damaged({path: "does not match its checksum"})
            manifest = Manifest(**content)
            known = all(
                isinstance(record["bytes"], int) and isinstance(record["sha256"], str)
                for record in manifest.files.values()
            )
            if known and isinstance(manifest.inputs, dict):
                return manifest
        except (AttributeError, KeyError, TypeError, ValueError):
            pass
        raise Damaged({path: "is not a manifest"})

    def check_owner(self, path: Path, unit: str, spec_hash: str) -> None:
        """Raise `Damaged` unless this is the manifest of a unit of a run."""
        if self.spec_hash != spec_hash:
            raise Damaged({path: f"belongs to another run ({self.spec_hash})"})
        if self.unit != unit:
            raise Damaged({path: f"belongs to another unit ({self.unit})"})

    def read(self, path: Path, name: str) -> bytes:
        """The contents of one of the unit's files.

        Raises:
            Damaged: it is not there, or not what was written.
        """
        record = self.files.get(name)
        if record is None:
            raise Damaged({path: "is not in the manifest"})
        try:
            data = read_regular(path, size=record["bytes"])
        except FileNotFoundError:
            raise Damaged({path: "is missing"}) from None
        if sha256(data) != record["sha256"]:
            raise Damaged({path: "does not match its checksum"})
        return data


def read_regular(path: Path, size: int | None = None) -> bytes:
    """The contents of a regular file, never through a link.

    Args:
        path: which.
        size: the bytes it must have.

    Raises:
        FileNotFoundError: there is nothing of that name.
        Damaged: there is something else, or a file of another size.
    """
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder"}
        kind = kinds.get(stat.S_IFMT(status.st_mode), "a device or pipe")
        raise Damaged({path: f"is {kind}, not a file"})
    if size is not None and status.st_size != size:
        raise Damaged({path: f"has {status.st_size:,} bytes, {size:,} were written"})
    return path.read_bytes()


def parse_json(path: Path, data: bytes) -> Any:
    """What JSON says; `Damaged` where it is none, or nested beyond reason."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise Damaged({path: "is not JSON"}) from None


def canonical(content: Any) -> str:
    """The one JSON text of a value, whatever the order of its keys.

    Raises:
        TypeError: something JSON cannot hold.
        ValueError: a number that is not finite.
    """
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sha256(data: bytes) -> str:
    """Hexadecimal digest of some bytes."""
    return hashlib.sha256(data).hexdigest()


def set_aside(path: Path, is_damaged: Callable[[Path], bool]) -> None:
    """Rename what is damaged to ``*.damaged``, for its owner to look at.

    Another process may do the same at this moment and put a new one in place; that one, moved by
    mistake, goes back.

    Raises:
        StoreError: nothing may be renamed there.
    """
    count = 1
    aside = path.with_name(f"{path.name}.damaged")
    while os.path.lexists(aside):
        count += 1
        aside = path.with_name(f"{path.name}.damaged-{count}")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StoreError(f"{path} is damaged and cannot be renamed ({error.strerror})") from error
    if is_damaged(aside):
        return
    if aside.is_dir():
        try:
            os.rename(aside, path)
        except OSError:  # Another process was first, with the same contents.
            shutil.rmtree(aside)
    else:
        if os.path.lexists(path):
            aside.unlink()
        else:
            os.rename(aside, path)


def report_damage(lines: list[str], damage: Damaged, consequence: str) -> None:
    """Add each problem to ``lines`` and warn of it."""
    for path, reason in damage.problems.items():
        line = f"{path} {reason}"
        lines.append(line)
        warnings.warn(f"{line}: moved aside, {consequence}", stacklevel=4)
