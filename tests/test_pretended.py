"""The GPU's side of Python on a pretended CUDA device, in a process of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.mark.long
@pytest.mark.parametrize("mark", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has a CUDA of its own")
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.skipif(shutil.which("ninja") is None, reason="needs ninja")
def test_what_a_gpu_is_asked_to_do(mark):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "pretend", "-m", mark, "tests/pretended"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
