"""Durable files: written whole or not at all, and errors that say what to do."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import socket
from functools import cache
from pathlib import Path

__all__ = [
    "StoreError",
    "is_alive",
    "is_here",
    "process_token",
    "remove_leftovers",
    "write_atomic",
]

_TEMPORARY = re.compile(r"\.(?P<owner>[^~]+)~[0-9a-f]+~.*\.tmp")


class StoreError(RuntimeError):
    """Stored results cannot be used or written; the message names the file and the way out."""


def write_atomic(path: Path, data: bytes, needed: int | None = None) -> None:
    """Write a file so that its name only ever stands for complete contents.

    The bytes go to a temporary file in the same folder, are flushed to the disk, and take the name
    in one step; a process killed at any moment leaves the old file or the new one.

    Args:
        path: where.
        data: the contents.
        needed: bytes the caller is about to write in all, for the message on a full disk.

    Raises:
        StoreError: the disk or the quota is full.
    """
    temporary = path.with_name(f".{process_token()}~{secrets.token_hex(4)}~{path.name}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(path.parent).free
        raise StoreError(
            f"no space left to write {path}: {needed or len(data):,} bytes needed, {free:,} free. "
            "Finished units are safe; free some space and run the same command again"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files that dead processes of this host left in a folder."""
    for file in folder.glob(".*.tmp"):
        match = _TEMPORARY.fullmatch(file.name)
        if match and not is_alive(match["owner"]):
            file.unlink(missing_ok=True)


def process_token() -> str:
    """Name of this process: ``pid-start@host``; the start time tells a reused pid apart."""
    pid = os.getpid()
    return f"{pid}-{_started(pid)}@{_host()}"


def is_alive(token: str) -> bool:
    """Whether the process of a `process_token` runs; one on another host counts as running."""
    pid, _, started = token.partition("@")[0].partition("-")
    if not is_here(token):
        return True
    return pid.isdigit() and _started(int(pid)) == started


def is_here(token: str) -> bool:
    """Whether the process of a `process_token` is, or was, one of this host."""
    return token.partition("@")[2] == _host()


@cache
def _host() -> str:
    # Asked once: a laptop's name changes with its network, and a process must know its own locks.
    return socket.gethostname()


def _started(pid: int) -> str | None:
    """When a process started, in ticks since boot; ``0`` where unknown; None if it is not there."""
    if os.path.isdir("/proc/self"):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] == "Z" else fields[19]
    if os.name == "posix":
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
    # Signal 0 kills on Windows: there every process counts as running.
    return "0"


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; Windows cannot open folders and needs no such call."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
