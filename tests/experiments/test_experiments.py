"""Every experiment runs end to end, tiny, and what the README says of it is what its data say."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import polars as pl
import pytest

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from experiments import sweeps  # noqa: E402
from experiments.frame import NAMES, RESULTS, Place, reported, run  # noqa: E402


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """One folder for all, so that a sweep that several need is trained once."""
    return tmp_path_factory.mktemp("experiments")


@pytest.mark.parametrize("name", [n for n in NAMES if (RESULTS / f"{n}.parquet").exists()])
def test_the_readme_says_what_the_stored_cells_say(name):
    experiment = import_module(f"experiments.{name}").EXPERIMENT
    cells = pl.read_parquet(RESULTS / f"{name}.parquet")
    text = (RESULTS.parent / "README.md").read_text()
    assert f"<!-- {name}:begin -->" in text
    assert reported(text, experiment, experiment.conclude(cells), cells) == text


def test_every_shared_sweep_is_tiny_where_quick():
    shared = [each for each in vars(sweeps).values() if isinstance(each, sweeps.SharedSweep)]
    shared += [sweeps.taught("student"), sweeps.taught("replay")]
    assert {each.full().env for each in shared} >= {"LunarLander-v3", "Hopper-v5"}
    assert len({each.name for each in shared}) == len(shared)
    for each in shared:
        full, quick = each.full(), each.spec(Place(ROOT, quick=True))
        assert quick.seeds * quick.levels <= 6 < full.seeds * full.levels
        for algo in quick.algos:
            assert quick.train_steps(algo, 1) <= 1024 < full.train_steps(algo, 1)
        assert not quick.imitating or quick.expert_budget.steps <= 1024


# As many figures and sweeps as the others together; kernels compile in whichever comes first.
SLOW = ("cleanrl", "conditions", "distribution_shift", "rescaling", "stability")


@pytest.mark.long
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in NAMES]
)
def test_an_experiment_fills_its_part_of_the_readme(name, home, monkeypatch):
    experiment = import_module(f"experiments.{name}").EXPERIMENT
    place = Place(home / "runs", quick=True)
    finding = run(experiment, home, place)
    cells = pl.read_parquet(home / "results" / f"{name}.parquet")
    assert experiment.name == name
    assert len(cells)
    assert cells["wall_s"].is_not_null().all()
    for figure in finding.figures:
        for kind in ("png", "svg"):
            assert (home / "figures" / f"{figure}.{kind}").stat().st_size > 1000
    readme = (home / "README.md").read_text()
    assert readme.count(f"`python -m experiments.{name}`") == 1
    assert readme.count(f"<!-- {name}:begin -->") == 1
    assert finding.effect in readme
    assert "nan" not in readme

    # What is trained stays trained.
    def refuse(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(sweeps, "train_population", refuse)
    monkeypatch.setattr("sparse_tickets.sweep.run.train_population", refuse)
    assert experiment.collect(place).equals(cells)
