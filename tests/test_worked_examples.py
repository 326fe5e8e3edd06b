"""What docs/inside.md adds to the library works as printed, in a copy of the repository."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_tickets.kernels.dispatch import has_triton

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = dict(
    section.split("\n", 1)
    for section in (ROOT / "docs" / "inside.md").read_text(encoding="utf-8").split("\n## ")[1:]
)


def blocks(section, language):
    return re.findall(rf"```{language}\n(.*?)```", SECTIONS[section], re.DOTALL)


def apply(patch, home):
    """Each hunk of a diff where its text stands, which must be in one place."""
    for part in re.split(r"^--- a/", patch, flags=re.MULTILINE)[1:]:
        names, *hunks = re.split(r"^@@\n", part, flags=re.MULTILINE)
        path = home / names.split()[0]
        text = path.read_text(encoding="utf-8")
        for hunk in hunks:
            lines = hunk.splitlines(keepends=True)
            before = "".join(line[1:] for line in lines if line[0] != "+")
            after = "".join(line[1:] for line in lines if line[0] != "-")
            assert text.count(before) == 1, f"{path.name} has no one place for\n{before}"
            text = text.replace(before, after)
        path.write_text(text, encoding="utf-8")


@pytest.fixture
def run(tmp_path):
    """Add a section's files and diffs to a copy, and run its commands there."""

    def run(section):
        skipped = shutil.ignore_patterns("__pycache__", "*.so")
        for folder in ("kernels", "tests", "sparse_tickets"):
            shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=skipped)
        shutil.copy(ROOT / "pyproject.toml", tmp_path)
        for block in blocks(section, "python"):
            name, text = re.fullmatch(r"# (\S+)\n(.*)", block, re.DOTALL).groups()
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        for patch in blocks(section, "diff"):
            apply(patch, tmp_path)
        commands = re.findall(
            r"^    ((?:pytest|sparse-tickets) .*)$", SECTIONS[section], re.MULTILINE
        )
        assert len(commands) >= 2
        # Kernels are compiled there; pytest has its own settings.
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        for command in commands:
            program, *arguments = shlex.split(command)
            module = {"pytest": ["-m", "pytest"], "sparse-tickets": ["-m", "sparse_tickets.cli"]}
            done = subprocess.run(
                [sys.executable, *module.get(program, []), *arguments],
                cwd=tmp_path,
                env=environment | {"PYTHONPATH": str(tmp_path)},
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"

    return run


@pytest.mark.long
@pytest.mark.skipif(not has_triton(), reason="the examples have Triton kernels")
@pytest.mark.parametrize("section", SECTIONS)
def test_what_is_printed_is_all_there_is_to_do(section, run):
    run(section)
