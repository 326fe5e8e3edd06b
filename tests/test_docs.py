"""What the docs show runs as printed, block after block."""

import re
from contextlib import nullcontext
from pathlib import Path

import pytest

from benchmarks.pretended_ray import PretendedRay

DOCS = Path(__file__).resolve().parents[1] / "docs"
OTHERS = ("clusters", "gpu", "guarantees", "transfer", "what_does_not_pay")
PAGES = [*sorted((DOCS / "tutorials").glob("*.md")), *(DOCS / f"{name}.md" for name in OTHERS)]
NEEDS = {"sb3_policy": "stable_baselines3"}


@pytest.mark.long
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch, capsys):
    if page.stem in NEEDS:
        pytest.importorskip(NEEDS[page.stem])
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert blocks
    names: dict = {}
    # A cluster that runs its tasks in this process.
    with PretendedRay(cpus=2).installed() if page.stem == "clusters" else nullcontext():
        for block in blocks:
            exec(compile(block, str(page), "exec"), names)
