"""Work on a GPU in processes of its own: watched, cut off in time, and gone on with after a crash.

A kernel that reads where it must not ends all GPU work of its process; one that never returns ends
the process here. So a piece of work keeps its state in a file, and names there what it is ``at``;
where its process ends too early the next one counts that as failed and goes on behind it. A piece
of work may also ask for a new process itself, by leaving ``again`` in its state.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparse_tickets.files import write_atomic

from ..results import available_cores

ROOT = Path(__file__).parents[2]
DIED = "the process ended there, or was ended as it took too long; the log has its last words"

_TOLD = ">> "
_LEAST_S = 15.0
"""Less is not worth another process."""
_POLL_S = 0.2


@dataclass
class Work:
    """What the process of a part of `make gpu` is given; its module's ``part`` does the work.

    ``part`` returns whether what is left needs another process.

    Attributes:
        folder: for all it writes.
        state: the file that keeps what it found.
        found: what there is already; filled in.
        deadline: by `time.monotonic`.
        device: a GPU, or for a rehearsal the CPU.
        rehearse: on tiny sizes.
        share: of the work, from 0 on.
        shares: how many processes do this part.
    """

    folder: Path
    state: Path
    found: dict[str, Any]
    deadline: float
    device: torch.device
    rehearse: bool = False
    share: int = 0
    shares: int = 1

    def keep(self) -> None:
        """Write what was found."""
        write_atomic(self.state, json.dumps(self.found).encode())


def compilers() -> int:
    """Processes that compile while tests run, on a third of the cores."""
    return max(1, available_cores() // 3)


def say(line: str) -> None:
    """Print a line that `attempt` passes on to the terminal; other output stays in the log."""
    print(f"{_TOLD}{line}", flush=True)


@contextmanager
def watched(seconds: float) -> Iterator[None]:
    """End this process, with a traceback of every thread, if the block takes longer.

    From a thread without Python's lock: a host that waits for a kernel cannot be interrupted.
    """
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def until_done(
    command: Sequence[str],
    environment: Mapping[str, str],
    state: Path,
    log: Path,
    seconds: float,
    grace: float,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Run a command, anew where an accident cut it short, until its work is done or time is up.

    Args:
        command: takes, as its last argument, when its time is up, in seconds since the epoch.
        environment: of the process.
        state: the file in which it keeps what it found.
        log: takes all its output, behind what is there.
        seconds: for all attempts together.
        grace: a process that has not ended this long after its time is ended.
        tell: takes the lines that were meant for the terminal.

    Returns:
        What it found; ``seconds`` it took; ``stopped`` if the last attempt did not end well;
        ``accidents``, why earlier ones did not.
    """
    began = time.monotonic()
    accidents: list[str] = []
    while True:
        left = seconds - (time.monotonic() - began)
        until = f"{time.time() + left:.1f}"
        stopped = attempt([*command, until], environment, log, left + grace, tell)
        found = read_state(state)
        left = seconds - (time.monotonic() - began)
        if left < _LEAST_S or not (found.get("again") or (stopped and found.get("at"))):
            break
        accidents.append(stopped or "a new process was needed")
        tell(f"{accidents[-1]}; going on in a new process")
    found.pop("again", None)
    found["seconds"] = time.monotonic() - began
    if accidents:
        found["accidents"] = accidents
    if stopped:
        found["stopped"] = stopped
    return found


def read_state(path: Path) -> dict[str, Any]:
    """What a process left, or nothing."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def attempt(
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    seconds: float,
    tell: Callable[[str], None],
) -> str:
    """Run a process and all it starts, for so long at most; why it did not end well, or nothing."""
    with log.open("ab") as file:
        begin = file.tell()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    end = time.monotonic() + seconds
    with log.open(errors="replace") as lines:
        lines.seek(begin)
        rest = ""
        try:
            while process.poll() is None:
                if time.monotonic() > end:
                    return "stopped: it did not end in time"
                time.sleep(_POLL_S)
                rest = _pass_on(rest + lines.read(), tell)
            _pass_on(rest + lines.read(), tell)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return f"ended with status {process.returncode}: {_last(log)}" if process.returncode else ""


def _pass_on(text: str, tell: Callable[[str], None]) -> str:
    """Tell whole lines; returns the beginning of one that is not whole yet."""
    *whole, rest = text.split("\n")
    for line in whole:
        if line.startswith(_TOLD):
            tell(line.removeprefix(_TOLD))
    return rest


def _last(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "it said nothing")
