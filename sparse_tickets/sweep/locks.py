"""Claims: lock files that say who works on what, across threads, processes and machines.

A claim of PATH is a chain of files, each created whole, and only if its name is free:

    PATH            the first claim, with a token of its own
    PATH~TOKEN      the claim that took over from the one with this token

Who made the last one holds the claim. A file's name says whom it takes over from, so that of all
who find a claim dead one alone succeeds it, and nothing of a process that died on the way is in
anybody's way: a dead successor is succeeded like any other. To let go, the holder removes PATH,
which frees the claim, then the rest. Who took over from a chain that was let go at that moment sees
it, by looking again, and removes its file; left behind, that leads nowhere, since no token is ever
used twice. `tests/tickets/test_locks.py` walks through every order of these steps.

Whether a claim is dead, two things tell. The kernel's lock on its file (flock) ends with the
process, however it ends, stands while the process is stopped, and holds between containers; on one
machine it alone decides. Other machines, and file systems that have no such locks, go by the lease:
the owner counts up in its file every `RENEW_S`, and who has seen the same count for `LEASE_S`, by
its own monotonic clock, holds it for dead. No two clocks are ever compared.

A claim saves work; it does not make results safe, and need not. Where an owner is silent for longer
than its lease and then goes on, two processes do the same work: of their results the one that takes
its name first stays, the other is dropped (`files.write_folder`).
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import socket
import stat
import threading
import time
import uuid
from contextlib import suppress
from functools import cache
from pathlib import Path

from sparse_tickets.files import UNSUPPORTED, StoreError, explained, temporary_name

try:
    import fcntl
except ImportError:  # Windows, which goes by leases.
    fcntl = None  # type: ignore[assignment]

__all__ = ["Claim", "acquire", "owner"]

RENEW_S = 10.0
LEASE_S = 60.0

# What each lock file not ours last said, and since when by the monotonic clock.
_seen: dict[Path, tuple[str, float]] = {}


class Claim:
    """A lock file that this process holds until `release`; made by `acquire`.

    Attributes:
        inherited: whether it was taken over from a process that died.
    """

    def __init__(self, path: Path, file: Path, descriptor: int, name: str, inherited: bool) -> None:
        self.inherited = inherited
        self._path = path
        self._file = file
        self._descriptor = descriptor
        self._name = name
        self._count = 0
        self._writing = threading.Lock()
        _claims.add(self)
        _start_renewing()

    def release(self) -> None:
        """End the claim and remove its files, unless another process has taken it over.

        Raises:
            StoreError: nothing may be removed there any more; the claim is over all the same.
        """
        if self._descriptor < 0:
            return
        try:
            chain = _chain(self._path)
            if list(chain)[-1:] == [self._file] and self._is_ours():
                with explained(self._path):
                    # The first one first: that is the moment the claim is free.
                    for file in chain:
                        file.unlink(missing_ok=True)
        finally:
            self._close()

    def _is_ours(self) -> bool:
        return (_said(self._file) or "").startswith(self._name)

    def _renew(self) -> None:
        """Count up in the lock file, as long as it is ours; failing costs at most the claim."""
        with self._writing, suppress(OSError):
            if self._descriptor < 0:
                return
            # By its name: our descriptor is another file where somebody closed all there were.
            descriptor = os.open(self._file, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
            try:
                if os.read(descriptor, 1024).startswith(self._name.encode()):
                    self._count += 1
                    os.lseek(descriptor, 0, os.SEEK_SET)
                    os.write(descriptor, _line(self._name, self._count))
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _close(self) -> None:
        _claims.discard(self)
        with self._writing:
            os.close(self._descriptor)
            self._descriptor = -1


_claims: set[Claim] = set()
_renewal: threading.Thread | None = None


def _start_renewing() -> None:
    """See to it that there is a thread that renews all claims of this process."""
    global _renewal
    if _renewal is None or not _renewal.is_alive():
        _renewal = threading.Thread(target=_keep_renewing, name="claims", daemon=True)
        _renewal.start()


def _keep_renewing() -> None:
    while True:
        time.sleep(RENEW_S)
        for claim in _claims.copy():
            claim._renew()


def _leave_to_parent() -> None:
    """A forked child must not keep its parent's claims alive."""
    for claim in _claims.copy():
        # The parent's thread may have been writing at the moment of the fork.
        claim._writing = threading.Lock()
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
    with explained(path):
        while True:
            chain = _chain(path)
            file = path
            if chain:
                last, said = list(chain.items())[-1]
                alive = _is_alive(last, said)
                if alive:
                    return None
                if alive is None:
                    continue
                file = _successor(path, said)
            name = f"{os.getpid()}@{_host()} {_machine()} {secrets.token_hex(8)}"
            descriptor = _create(path, file, name)
            if descriptor is None:
                continue
            try:
                # The chain may have been let go on the way: then this file leads nowhere.
                if list(_chain(path))[-1:] == [file]:
                    for each in chain:
                        _seen.pop(each.absolute(), None)
                    return Claim(path, file, descriptor, name, inherited=bool(chain))
                file.unlink(missing_ok=True)
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)


def owner(path: Path) -> str | None:
    """``process PID on HOST`` of a lock file; None without one."""
    try:
        chain = _chain(path)
    except StoreError:
        return None
    if not chain:
        return None
    said = list(chain.values())[-1].split(" ")[0]
    pid, _, host = said.strip().partition("@")
    return f"process {pid} on {host}" if pid and host else "an unknown process"


def _chain(path: Path) -> dict[Path, str]:
    """The files of a claim from the first to the last, with what they say; empty if it is free."""
    chain: dict[Path, str] = {}
    file = path
    while file not in chain and (said := _said(file)) is not None:
        chain[file] = said
        file = _successor(path, said)
    return chain


def _successor(path: Path, said: str) -> Path:
    """The file of whoever takes over from the claim that says so, whatever its count."""
    name = said.rpartition(" ")[0]
    return path.with_name(f"{path.name}~{hashlib.sha256(name.encode()).hexdigest()[:16]}")


def _create(path: Path, file: Path, name: str) -> int | None:
    """Create a file of a claim, whole and with the kernel's lock; None if its name is taken."""
    temporary = temporary_name(path)
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        try:
            os.write(descriptor, _line(name, 0))
            _kernel_lock(descriptor)
            os.link(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
    except BaseException as error:
        os.close(descriptor)
        # Another process may have cleared the temporary file away.
        if isinstance(error, FileExistsError | FileNotFoundError):
            return None
        if isinstance(error, OSError) and error.errno in (*UNSUPPORTED, errno.EPERM):
            return _create_directly(file, name)
        raise
    return descriptor


def _create_directly(file: Path, name: str) -> int | None:
    """`_create` without hard links: for a moment the file says nothing, and is taken for alive."""
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return None
    try:
        _kernel_lock(descriptor)
        os.write(descriptor, _line(name, 0))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _is_alive(file: Path, said: str) -> bool | None:
    """Whether the owner of a lock file is not known to be dead; None if the file has just gone."""
    descriptor = _open(file)
    if descriptor is None:
        return None
    try:
        free = _kernel_lock(descriptor, shared=True)
    finally:
        os.close(descriptor)
    if free is False:
        return True
    # On this machine the kernel's lock was all that kept the file's owner.
    if free and said.split(" ")[1:2] == [_machine()]:
        return False
    return not _is_silent(file, said)


def _is_silent(file: Path, said: str) -> bool:
    """Whether a lock file has said the same for longer than a lease."""
    now = time.monotonic()
    last, since = _seen.get(file.absolute(), (None, now))
    if said != last:
        _seen[file.absolute()] = said, now
        return False
    return now - since > LEASE_S


def _kernel_lock(descriptor: int, shared: bool = False) -> bool | None:
    """Whether the kernel's lock is ours now; None where the file system has none."""
    if fcntl is None:
        return None
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (*UNSUPPORTED, errno.ENOLCK):
            return None
        raise
    return True


def _said(file: Path) -> str | None:
    """What a lock file says; None if there is none."""
    descriptor = _open(file)
    if descriptor is None:
        return None
    try:
        return os.read(descriptor, 1024).decode(errors="replace")
    finally:
        os.close(descriptor)


def _open(file: Path) -> int | None:
    """A descriptor of a lock file; None if there is none."""
    stranger = StoreError(f"{file} is not a lock file: delete it and run again")
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(file, flags)
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


def _line(name: str, count: int) -> bytes:
    return f"{name} {count:010d}\n".encode()


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
