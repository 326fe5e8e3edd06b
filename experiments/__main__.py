"""Run every experiment, one after the other: ``python -m experiments [--quick]``."""

from __future__ import annotations

import subprocess
import sys

from experiments.frame import NAMES

failed = []
for name in NAMES:
    # A process each: an experiment that cannot go on does not stop the others.
    command = [sys.executable, "-m", f"experiments.{name}", *sys.argv[1:]]
    if subprocess.run(command, check=False).returncode:
        failed.append(name)
if failed:
    sys.exit(f"these experiments failed: {', '.join(failed)}")
