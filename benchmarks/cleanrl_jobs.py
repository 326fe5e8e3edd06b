"""Whole programs: CleanRL's own scripts, as they are and with the lines that docs/ tells of.

`python -m benchmarks cleanrl CLONE` runs each script in a process of its own from start to end,
imports and all, dense and 90% pruned in turn. The lines come from the diffs in
`docs/works_with.md`, so what is timed is what a reader is told to write.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import tyro
from rich.console import Console

from sparse_tickets.ceilings import Neighbours

from .jobs import add_job, table
from .results import RecordFile
from .turns import take_turns

SCRIPTS = {
    "ppo.py": ("CartPole-v1", 100_000),
    "dqn.py": ("CartPole-v1", 100_000),
    "sac_continuous_action.py": ("Pendulum-v1", 9_000),
}
"""Environment and timesteps of each."""
DOCS = Path(__file__).parents[1] / "docs" / "works_with.md"


def diffs(page: str) -> dict[str, str]:
    """By script, the first diff after its name in the part of a page on CleanRL."""
    part = page.split("\n## CleanRL\n")[1].split("\n## ")[0]
    return {
        name: part.split(f"`{name}`")[1].split("```diff\n")[1].split("```")[0] for name in SCRIPTS
    }


def patched(text: str, diff: str) -> str:
    """A script with a diff's lines; what has no line before or around it goes to the top.

    Raises:
        ValueError: the script has not, exactly once, what the diff takes or stands behind.
    """
    for hunk in re.split(r"^@@\n", diff, flags=re.MULTILINE):
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if not line.startswith("+"))
        new = "".join(line[1:] for line in lines if not line.startswith("-"))
        if old and text.count(old) != 1:
            raise ValueError(f"the script must have once {old!r}, got it {text.count(old)} times")
        text = text.replace(old, new) if old else new + text
    return text


def run_cleanrl(
    console: Console,
    clone: tyro.conf.Positional[Path],
    python: str = sys.executable,
    rounds: int = 2,
    threads: tuple[int, ...] = (1, 2),
    out: Path | None = None,
) -> Path:
    """Time the scripts dense and 90% pruned; their rows go into the table of whole jobs.

    Args:
        console: where progress and the table go.
        clone: a clone of CleanRL.
        python: an interpreter with what the scripts import (gymnasium 0.29) and this library.
        rounds: runs of each program with each number of threads.
        threads: numbers of threads.
        out: default: results/jobs/<device>-<date>.json, with the table beside it.

    Returns:
        The file written.

    Raises:
        ValueError: a script is not there, or not what the diffs are of.
        subprocess.CalledProcessError: a program fails.
    """
    changes = diffs(DOCS.read_text(encoding="utf-8"))
    file = RecordFile("jobs", table, rounds, out)
    for name, (env, steps) in SCRIPTS.items():
        script = clone / "cleanrl" / name
        if not script.exists():
            raise ValueError(
                f"clone must be one of CleanRL, got {clone}, which has no cleanrl/{name}"
            )
        text = script.read_text()
        programs = {"dense": text, "sparse": patched(text, changes[name])}
        runs = []
        for count in threads:
            neighbours = Neighbours()
            whole = {
                side: partial(_run, program, clone, python, env, steps, count)
                for side, program in programs.items()
            }
            seconds = take_turns(whole, rounds)
            runs.append({"threads": count, "seconds": seconds, "busy": neighbours.share()})
        label = f"CleanRL's {name}, {env}"
        add_job(file, label, {"slice": steps}, runs)
        console.print(f"{label}: done", highlight=False)
    console.print(str(file), highlight=False, soft_wrap=True)
    return file.path


def _run(program: str, clone: Path, python: str, env: str, steps: int, threads: int) -> None:
    """A program from its start to its end, in a folder that is thrown away."""
    paths = [str(clone), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "program.py"
        script.write_text(program)
        command = [
            python,
            str(script),
            f"--env-id={env}",
            f"--total-timesteps={steps}",
            "--no-cuda",
        ]
        subprocess.run(
            command, cwd=folder, env=os.environ | settings, check=True, stdout=subprocess.DEVNULL
        )
