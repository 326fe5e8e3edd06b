"""What numbers depend on besides their settings: commit, versions, processor."""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Iterable
from functools import cache
from importlib import metadata
from pathlib import Path

__all__ = ["commit", "processor", "versions"]


@cache
def commit() -> str | None:
    """Commit of the clone that this library runs from, ``-dirty`` if changed; None elsewhere."""
    # Only a clone of this library counts, not a repository that an environment lies in.
    root = Path(__file__).parents[1]
    if not ((root / ".git").exists() and (root / "kernels").is_dir()):
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


@cache
def processor() -> str:
    """The processor's name, as the operating system has it."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return model[1].strip() if model else platform.processor() or platform.machine()


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Python's version and those of packages that are installed."""
    found = {name: _version(name) for name in packages}
    installed = {name: version for name, version in found.items() if version is not None}
    return {"python": platform.python_version()} | installed


@cache
def _version(package: str) -> str | None:
    """Of a package, None where it is not installed; every unit of a sweep asks."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
