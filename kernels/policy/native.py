"""`node.cpp`, compiled once per machine and version of torch: in the background, as programs run.

Until it is there, and where no C++ compiler is, `network.py` does the same in Python. Which of them
runs changes no bit of a result.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
import sys
import sysconfig
import threading
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch

from ..caching import cache_folder
from ..compiling import has_changed
from ..threads import WORTH_A_THREAD, used_threads
from . import cpu, reference
from .layout import FEW, LONG

SETTING = "SPARSE_TICKETS_NATIVE"
"""The environment's variable: ``background``, ``wait`` to compile at first use, or ``off``."""

THREAD = "sparse_tickets compiling"

_SOURCE, _HEADER = (Path(__file__).with_name(name) for name in ("node.cpp", "steps.h"))
_TORCH = Path(torch.__file__).parent

_SCRIPT = 'file="$1"; shift; "$@" && mv "$0" "$file"'

module: Any = None
"""The compiled module once it is there."""

_status = "not asked for"
_lock = threading.Lock()
_started = False


def status() -> str:
    """What calls a network's kernels, and why if it is not compiled."""
    return "in C++" if module is not None else f"in Python: {_status}"


def start() -> None:
    """Load the compiled module, or begin to compile it; all calls but the first do nothing.

    Raises:
        ValueError: the environment's setting is none of those there are.
    """
    global _started
    if _started:
        return
    with _lock:
        if _started:
            return
        setting = os.environ.get(SETTING, "background")
        if setting not in ("background", "wait", "off"):
            raise ValueError(f"{SETTING} must be background, wait or off, got {setting!r}")
        _started = True
        file = _file()
        if setting == "off":
            _tell(f"{SETTING} is off")
        elif has_changed(_SOURCE) or has_changed(_HEADER):
            _tell("its source has changed since this process began")
        elif setting == "wait" or file.exists():
            _provide(file)
        else:
            _tell("it is being compiled")
            threading.Thread(target=_provide, args=(file,), name=THREAD, daemon=True).start()


def _tell(reason: str) -> None:
    global _status
    _status = reason


def _file() -> Path:
    """Where it is kept; another source, torch, Python or machine has a file of its own."""
    of = (torch.__version__, sys.implementation.cache_tag, platform.machine())
    sources = _SOURCE.read_bytes() + _HEADER.read_bytes()
    digest = hashlib.blake2b(sources + " ".join(of).encode(), digest_size=8)
    return cache_folder() / "native" / f"node-{digest.hexdigest()}.so"


def _provide(file: Path) -> None:
    """Compile what is not there, and load it; what goes wrong is told, and no program stops."""
    try:
        if not file.exists():
            _compile(file)
        _load(file)
    except (OSError, ImportError, subprocess.SubprocessError) as error:
        _tell(f"no compiled node of autograd ({error})")


def _compile(file: Path) -> None:
    """In a process that outlives this one; of several that begin one compiles.

    Raises:
        OSError: there is no compiler, or nothing can be written.
        subprocess.SubprocessError: it did not compile.
    """
    # Not there on Windows.
    from fcntl import LOCK_EX, flock

    compiler = shlex.split(os.environ.get("CXX", "c++"))
    file.parent.mkdir(parents=True, exist_ok=True)
    part, log = file.with_suffix(f".{os.getpid()}"), file.with_suffix(".log")
    includes = (_TORCH / "include", _TORCH / "include/torch/csrc/api/include")
    command = [
        *(*compiler, "-std=c++20", "-O2", "-shared", "-fPIC", "-DTORCH_EXTENSION_NAME=node"),
        *(f"-isystem{path}" for path in (*includes, sysconfig.get_path("include"))),
        *(str(_SOURCE), "-o", str(part), f"-L{_TORCH / 'lib'}"),
        *("-ltorch_python", "-ltorch_cpu", "-lc10"),
    ]
    with file.with_suffix(".lock").open("w") as lock, log.open("wb") as output:
        # The compiler inherits it, and keeps it until it ends.
        flock(lock, LOCK_EX)
        if file.exists():
            return
        process = subprocess.Popen(
            ["/bin/sh", "-c", _SCRIPT, str(part), str(file), *command],
            stdout=output,
            stderr=output,
            pass_fds=(lock.fileno(),),
            start_new_session=True,
        )
        if process.wait():
            raise subprocess.SubprocessError(f"{compiler[0]} failed, see {log}")


def _load(file: Path) -> None:
    global module
    spec = spec_from_file_location("node", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no extension of this Python")
    loaded: Any = module_from_spec(spec)
    spec.loader.exec_module(loaded)
    loaded.set_up(
        *cpu.addresses(),
        FEW,
        LONG,
        WORTH_A_THREAD,
        ctypes.addressof(used_threads),
        reference.differentiate,
    )
    module = loaded
