"""Every experiment runs end to end, tiny, and what the README says of it is what its data say."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path

import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal

from experiments import sweeps, training
from experiments.frame import NAMES, RESULTS, Place, reported, run
from experiments.other_tasks import turned
from sparse_tickets.analysis.parquet import write_parquet
from sparse_tickets.kernels.mlp.reference import mlp
from sparse_tickets.population import initialise
from sparse_tickets.sweep.protocols import protocol

ROOT = Path(__file__).parents[2]


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


def test_turned_policies_act_the_other_way_round():
    arena = protocol("CartPole-v1").arena("ppo")
    weight = initialise(arena, torch.arange(2))
    weight[:, arena.prunable :] = torch.arange(arena.size - arena.prunable) / 100  # biases, too
    mask = torch.rand(2, arena.prunable, generator=torch.Generator().manual_seed(0)) < 0.5
    seen = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))

    as_it_is = mlp(seen, weight, arena.actor, mask)
    other = mlp(seen, turned(arena.actor, weight), arena.actor, turned(arena.actor, mask))
    torch.testing.assert_close(other, as_it_is.flip(-1), rtol=0, atol=0)
    assert not torch.equal(other, as_it_is)


def refuse(*_, **__):
    raise AssertionError("trained again")


@pytest.fixture
def brief():
    """A sweep of seconds."""
    spec = sweeps.quickly(protocol("CartPole-v1"))
    return replace(spec, algos=("ppo",), conditions=("mask/weights",), levels=2)


def test_stored_cells_of_a_sweep_are_taken_in_place_of_training(tmp_path, brief, monkeypatch):
    table = tmp_path / "table.parquet"
    cells = Place(tmp_path / "first").cells("brief", brief)
    # Beside another sweep's, in a table with columns of its own.
    write_parquet(table, pl.concat([cells, cells.with_columns(source=pl.lit("other"))]))
    study = pl.read_parquet(table).with_columns(study=pl.lit("brief"))
    write_parquet(table, study)

    monkeypatch.setattr("sparse_tickets.sweep.run.train_population", refuse)
    place = Place(tmp_path / "second", stored=(tmp_path / "none.parquet", table))
    assert_frame_equal(place.cells("brief", brief), cells, check_column_order=False)
    assert not (tmp_path / "second").exists()
    assert replace(place, partial=True).wants("brief", brief)
    assert not replace(place, partial=True).wants("brief")

    again, other = replace(place, stored=()), replace(place, runs=tmp_path / "third")
    for refused, spec in ((again, brief), (other, replace(brief, rate=0.3))):
        with pytest.raises(AssertionError, match="trained again"):
            refused.cells("brief", spec)
    assert not replace(place, partial=True).wants("other", replace(brief, rate=0.3))
    for part in (study[1:], pl.concat([study, study[:1]]), study.drop("source")):
        write_parquet(table, part)
        with pytest.raises(AssertionError, match="trained again"):
            place.cells("brief", brief)


def test_an_extended_sweep_is_one_with_both_kinds_of_controls(tmp_path, brief):
    shuffled = ("mask/weights", "mask/permuted", "permuted/permuted")
    spec = replace(brief, conditions=shuffled, controls=("ticket",), levels=3)
    first = sweeps.SharedSweep("first", lambda: spec)
    extended = sweeps.Extended(first, (sweeps.own_controls(first),))
    place = Place(tmp_path)
    found = extended.cells(place)

    both = place.cells("both", replace(spec, controls=("own", "ticket")))
    apart = ("wall_s", "train_s", "source")
    where = ["algo", "level", "seed", "condition", "controls"]
    assert_frame_equal(found.drop(apart).sort(where), both.drop(apart).sort(where))
    assert extended.wanted(replace(place, partial=True))


def test_stored_cells_of_an_extended_sweep_are_taken_whole(tmp_path, brief, monkeypatch):
    """A table has the dense policies once, which both sweeps train."""
    shuffled = ("mask/weights", "mask/permuted")
    spec = replace(brief, conditions=shuffled, controls=("ticket",), levels=3)
    first = sweeps.SharedSweep("first", lambda: spec)
    extended = sweeps.Extended(first, (sweeps.own_controls(first),))
    cells = extended.cells(Place(tmp_path / "runs"))
    table = tmp_path / "table.parquet"
    write_parquet(table, cells)

    monkeypatch.setattr("sparse_tickets.sweep.run.train_population", refuse)
    place = Place(tmp_path / "none", partial=True, stored=(table,))
    assert_frame_equal(extended.cells(place), cells, check_column_order=False)
    own = extended.later[0]
    assert not own.wanted(place)  # by itself it lacks its dense policies


def test_stored_tables_are_taken_in_their_order(tmp_path, brief):
    cells = Place(tmp_path).cells("brief", brief)
    for name in ("own", "other"):
        write_parquet(tmp_path / f"{name}.parquet", cells.with_columns(commit=pl.lit(name)))
    stored = tuple(tmp_path / f"{name}.parquet" for name in ("own", "other"))
    for tables in (stored, stored[::-1]):
        found = Place(tmp_path, stored=tables).cells("brief", brief)
        assert set(found["commit"]) == {tables[0].stem}


def test_what_is_computed_once_is_taken_from_a_stored_table(tmp_path):
    table = tmp_path / "table.parquet"
    first = Place(tmp_path / "first").once("job", 1, lambda: pl.DataFrame({"seed": [0, 1]}))
    write_parquet(table, first)
    place = Place(tmp_path / "second", stored=(table,))
    assert place.kept("job", 1)
    assert place.once("job", 1, refuse).equals(first)
    assert not place.kept("job", 2)
    assert not replace(place, stored=()).kept("job", 1)


STORED = {name: getattr(sweeps, name) for name in (
    "cartpole", "cartpole_deep", "cartpole_late", "maze", "acrobot", "pendulum", "pendulum_sac",
    "mountain_car", "lunar_lander", "hopper", "dqn",
)} | {states: sweeps.taught(states) for states in ("student", "replay")}  # fmt: skip
# A sweep is known by the scale of its observations too, which the environment tells.
NEEDS = {"lunar_lander": "Box2D", "hopper": "mujoco"}


@pytest.mark.parametrize("name", STORED)
def test_stored_cells_of_a_shared_sweep_are_whole(name):
    """So that an experiment on them trains none again."""
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    place = Place(ROOT / "nowhere", partial=True, stored=tuple(RESULTS.glob("*.parquet")))
    assert STORED[name].wanted(place)


# Tables lack the masks that these read inputs and layers from.
OF_MASKS = ("input_masks", "maze_inputs")
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

    # What is trained stays trained, and what is stored too, without its weights.
    monkeypatch.setattr(training, "train_population", refuse)
    monkeypatch.setattr("sparse_tickets.sweep.run.train_population", refuse)
    assert experiment.collect(place).equals(cells)
    if name not in OF_MASKS:
        # Of these a table may hold a part alone; another experiment's has the rest.
        parts = (
            sweeps.cartpole, sweeps.dqn_squared, sweeps.cartpole_deep, sweeps.cartpole_late,
        )  # fmt: skip
        whole = [each for each in parts if (place.runs / each.name).exists()]
        for sweep in whole:
            write_parquet(home / f"{sweep.name}.parquet", sweep.cells(place))
        tables = (
            home / "results" / f"{name}.parquet",
            *(home / f"{s.name}.parquet" for s in whole),
        )
        stored = experiment.collect(Place(home / "none", quick=True, stored=tables))
        assert dict(stored.schema) == dict(cells.schema)
        rows = [sorted(map(repr, table.select(cells.columns).rows())) for table in (stored, cells)]
        assert rows[0] == rows[1]
        assert not (home / "none").exists()
