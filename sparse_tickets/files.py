"""Durable files: written whole or not at all, and errors that say what to do."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

__all__ = [
    "UNSUPPORTED",
    "StoreError",
    "explained",
    "leftovers",
    "make_folder",
    "remove_leftovers",
    "temporary_name",
    "write_atomic",
    "write_folder",
]

_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)
UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""What file systems say to a call that they do not have."""


class StoreError(RuntimeError):
    """Stored results cannot be used or written; the message names the file and the way out."""


def write_atomic(path: Path, data: bytes, *, replace: bool = True) -> bool:
    """Write a file so that its name only ever stands for complete contents.

    The bytes go to a temporary file in the same folder, are flushed to the disk, and take the name
    in one step; a process killed at any moment leaves the old file or the new one.

    Args:
        path: where.
        data: the contents.
        replace: whether to take a name that is taken; otherwise whoever is first keeps it.

    Returns:
        Whether the file is there with these contents; False only where its name was taken.

    Raises:
        StoreError: the disk or the quota is full, or nothing may be written there.
    """
    temporary = temporary_name(path)
    with explained(path, len(data)):
        try:
            _write_synced(temporary, data)
            if replace:
                os.replace(temporary, path)
            elif not _take_name(temporary, path):
                return False
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    return True


def write_folder(path: Path, files: Mapping[str, bytes]) -> bool:
    """Create a folder with all its files in one step, unless its name is taken.

    Of several processes that do so at the same moment exactly one succeeds.

    Args:
        path: where.
        files: contents by name.

    Returns:
        Whether the folder is there with these files; False where its name was taken, or where
        another process removed the files on the way, as leftovers of a process it held for dead.

    Raises:
        StoreError: the disk or the quota is full, or nothing may be written there.
    """
    temporary = temporary_name(path)
    with explained(path, sum(map(len, files.values()))):
        try:
            temporary.mkdir()
            try:
                for name, data in files.items():
                    _write_synced(temporary / name, data)
                _sync_folder(temporary)
                os.rename(temporary, path)
            except OSError as error:
                taken = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.ENOENT)
                if error.errno in taken:
                    return False
                raise
            _sync_folder(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return True


def make_folder(path: Path) -> None:
    """Create a folder and those above it, for good: a power cut does not take them back.

    Raises:
        FileExistsError: there is something else of its name.
    """
    if path.is_dir():
        return
    make_folder(path.absolute().parent)
    path.mkdir(exist_ok=True)
    _sync_folder(path.absolute().parent)


def leftovers(folder: Path) -> dict[str, list[Path]]:
    """What killed processes left of writing in a folder, by the name of what was written."""
    found: dict[str, list[Path]] = {}
    for entry in os.scandir(folder):
        if entry.name.startswith(".") and entry.name.endswith(".tmp") and "~" in entry.name:
            found.setdefault(entry.name[1:].rpartition("~")[0], []).append(Path(entry.path))
    return found


def remove_leftovers(found: Iterable[Path]) -> None:
    """Delete some of `leftovers`; only for who alone writes there."""
    for leftover in found:
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


@contextmanager
def explained(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn a full disk and what refuses a file into a `StoreError` that says what to do.

    Args:
        path: what is written.
        needed: its bytes.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            free = shutil.disk_usage(path.parent).free
            raise StoreError(
                f"no space left to write {path}: {needed:,} bytes needed, {free:,} free. Finished "
                "units are safe; free some space and run the same command again"
            ) from error
        if error.errno in _REFUSED:
            raise StoreError(
                f"{path} cannot be written ({error.strerror}). Finished units are safe; make "
                f"{path.parent} writable and run the same command again, or choose another folder"
            ) from error
        if error.errno == errno.EISDIR:
            raise StoreError(
                f"{path} is a folder, and a file is to be written there: move it away"
            ) from error
        raise


def temporary_name(path: Path) -> Path:
    """A new name beside a path, which `leftovers` knows."""
    return path.with_name(f".{path.name}~{secrets.token_hex(8)}.tmp")


def _take_name(temporary: Path, path: Path) -> bool:
    """Give a file its name unless that is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (*UNSUPPORTED, errno.EPERM):
            raise
        # No hard links here: of two writers at the same moment the later one stays.
        if os.path.lexists(path):
            return False
        os.replace(temporary, path)
    return True


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a rename durable where the file system can; Windows cannot open folders."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)
