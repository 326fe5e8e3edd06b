"""Where what is compiled and measured is kept: a folder that can be written, if there is one."""

from __future__ import annotations

import os
import stat
import tempfile
import warnings
from functools import cache
from pathlib import Path


def cache_folder() -> Path:
    """The user's, or with a warning a temporary one that nobody else can write.

    Where neither can be written it is the user's: who is to write there does without.
    """
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return _usable(Path(root, "sparse_tickets"))


def keep_triton_cache() -> None:
    """Send Triton's cache to `cache_folder` where the user's home cannot be written.

    The user's ``TRITON_CACHE_DIR`` and ``TRITON_HOME`` stand, and the interpreter needs none.
    """
    if {"TRITON_CACHE_DIR", "TRITON_HOME"} & os.environ.keys():
        return
    own = Path(os.path.expanduser("~"), ".triton", "cache")
    if os.environ.get("TRITON_INTERPRET") != "1" and not _is_writable(own):
        os.environ["TRITON_CACHE_DIR"] = str(cache_folder() / "triton")


def warn_once(message: str, error: Exception | None = None) -> None:
    """Warn, but once: a message names a folder, and many kernels share one."""
    if message not in _warned:
        _warned.add(message)
        reason = f" ({type(error).__name__}: {error})" if error else ""
        warnings.warn(message + reason, RuntimeWarning, stacklevel=2)


_warned: set[str] = set()


@cache
def _usable(folder: Path) -> Path:
    if _is_writable(folder):
        return folder
    temporary = _temporary_folder()
    if temporary is None:
        warn_once(f"what is compiled is not kept: no folder can be written, {folder} least of all")
        return folder
    warn_once(
        f"what is compiled is kept in {temporary}, since {folder} cannot be written; "
        "XDG_CACHE_HOME names another place"
    )
    return temporary


def _is_writable(folder: Path) -> bool:
    # Without a home "~" stays as it is, and would become a folder of this name.
    if not folder.is_absolute():
        return False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def _temporary_folder() -> Path | None:
    """The same in each process of this user and in no other's: what is in it gets executed."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    try:
        folder = Path(tempfile.gettempdir()) / f"sparse_tickets-{user}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    if not stat.S_ISDIR(found.st_mode):
        return None
    if hasattr(os, "getuid") and (found.st_uid != os.getuid() or found.st_mode & 0o022):
        return None
    return folder if _is_writable(folder) else None
