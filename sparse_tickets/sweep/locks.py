"""Claims: lock files that say who works on what, across threads, processes and machines.

Two things together hold a claim. The kernel's lock on the file (flock) ends with the process,
however it ends, stands while the process is stopped, and holds between containers; on one machine
it alone decides. Other machines, and file systems that have no such locks, go by the lease: the
owner counts up in the file every `RENEW_S`, and who has seen the same count for `LEASE_S` by its
own monotonic clock takes the claim over. No two clocks are ever compared.

A claim saves work; it does not make results safe, and need not. Where an owner is silent for longer
than its lease and then goes on, two processes do the same work: of their results the one that takes
its name first stays, the other is dropped (`files.write_folder`).
"""

from __future__ import annotations

import errno
import os
import secrets
import socket
import stat
import threading
import time
import uuid
import weakref
from contextlib import suppress
from functools import cache
from pathlib import Path

from sparse_tickets.files import StoreError, explained, write_atomic

try:
    import fcntl
except ImportError:  # Windows, which goes by leases.
    fcntl = None  # type: ignore[assignment]

__all__ = ["Claim", "acquire", "owner"]

RENEW_S = 10.0
LEASE_S = 60.0

_NO_KERNEL_LOCKS = (
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.ENOLCK,
    errno.EINVAL,
)
# What each lock file not ours last said, and since when by the monotonic clock.
_seen: dict[Path, tuple[str, float]] = {}


class Claim:
    """A lock file that this process holds until `release`; made by `acquire`."""

    def __init__(self, path: Path, descriptor: int, name: str) -> None:
        self._path = path
        self._descriptor = descriptor
        self._name = name
        self._released = threading.Event()
        self._renewal = threading.Thread(target=self._renew, name=f"claim {path}", daemon=True)
        _write(descriptor, _line(name, 0))
        _claims.add(self)
        self._renewal.start()

    def release(self) -> None:
        """End the claim and remove its file, unless another process has taken it over."""
        if self._descriptor < 0:
            return
        self._released.set()
        self._renewal.join()
        if self._is_ours():
            self._path.unlink(missing_ok=True)
        self._close()

    def _is_ours(self) -> bool:
        return _is_file(self._path, self._descriptor) and _read(self._descriptor).startswith(
            self._name
        )

    def _renew(self) -> None:
        count = 0
        while not self._released.wait(RENEW_S):
            count += 1
            # A renewal that fails costs at most the claim.
            with suppress(OSError):
                if not self._is_ours():
                    return
                _write(self._descriptor, _line(self._name, count))
                os.fsync(self._descriptor)

    def _close(self) -> None:
        os.close(self._descriptor)
        self._descriptor = -1


_claims: weakref.WeakSet[Claim] = weakref.WeakSet()


def _leave_to_parent() -> None:
    """A forked child must not keep its parent's claims alive."""
    for claim in _claims:
        if claim._descriptor >= 0:
            claim._close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


def acquire(path: Path) -> Claim | None:
    """Claim a lock file, one left by a dead process included; None while another holds it.

    Ask again to take over the claim of a process on another machine: whether it is alive shows in
    `LEASE_S` alone.

    Raises:
        StoreError: the lock is not a file, or nothing may be written there.
    """
    name = f"{os.getpid()}@{_host()} {_machine()} {secrets.token_hex(8)}"
    while True:
        with explained(path):
            if not os.path.lexists(path):
                # Never empty: who opens it reads whose it is.
                write_atomic(path, _line(name, 0).encode(), replace=False)
            descriptor = _open(path)
            if descriptor is None:
                continue
            try:
                claim = _claim(path, descriptor, name)
            except BaseException:
                os.close(descriptor)
                raise
        if claim is not None:
            _seen.pop(path.absolute(), None)
            return claim
        # Its owner removes a lock before it lets go: then this one was no longer the path's.
        gone = not _is_file(path, descriptor)
        os.close(descriptor)
        if not gone:
            return None


def owner(path: Path) -> str | None:
    """``process PID on HOST`` of a lock file; None without one."""
    try:
        descriptor = _open(path, os.O_RDONLY)
    except StoreError:
        return None
    if descriptor is None:
        return None
    try:
        said = _read(descriptor).split(" ")[0]
    finally:
        os.close(descriptor)
    pid, _, host = said.strip().partition("@")
    return f"process {pid} on {host}" if pid and host else "an unknown process"


def _claim(path: Path, descriptor: int, name: str) -> Claim | None:
    """Claim an open lock file if its owner is us, or dead; its descriptor goes with the claim."""
    kernel = _kernel_lock(descriptor)
    if kernel is False or not _is_file(path, descriptor):
        return None
    said = _read(descriptor)
    ours = said.startswith(name)
    # On this machine the kernel's lock, now ours, was all that kept the file's owner.
    dead_here = kernel is True and said.split(" ")[1:2] == [_machine()]
    if ours or dead_here or _is_silent(path, said):
        return Claim(path, descriptor, name)
    return None


def _is_silent(path: Path, said: str) -> bool:
    """Whether a lock file has said the same for longer than a lease."""
    now = time.monotonic()
    last, since = _seen.get(path.absolute(), (None, now))
    if said != last:
        _seen[path.absolute()] = said, now
        return False
    return now - since > LEASE_S


def _kernel_lock(descriptor: int) -> bool | None:
    """Whether the kernel's lock is ours now; None where the file system has none."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_KERNEL_LOCKS:
            return None
        raise
    return True


def _open(path: Path, mode: int = os.O_RDWR) -> int | None:
    """A descriptor of a lock file; None if it has just gone."""
    stranger = StoreError(f"{path} is not a lock file: delete it and run again")
    flags = mode | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in (errno.EISDIR, errno.ELOOP, errno.ENXIO):
            raise stranger from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise stranger
    return descriptor


def _is_file(path: Path, descriptor: int) -> bool:
    """Whether a path still names the open file."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _line(name: str, count: int) -> str:
    return f"{name} {count:010d}\n"


def _read(descriptor: int) -> str:
    os.lseek(descriptor, 0, os.SEEK_SET)
    return os.read(descriptor, 1024).decode(errors="replace")


def _write(descriptor: int, line: str) -> None:
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.ftruncate(descriptor, os.write(descriptor, line.encode()))


@cache
def _machine() -> str:
    """This boot of this kernel, the same in all its containers."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"{uuid.getnode():x}"


@cache
def _host() -> str:
    return socket.gethostname().replace(" ", "-")
