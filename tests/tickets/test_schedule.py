"""Which unit is next: order, precedence, and costs that do not grow; the driver without Ray."""

import cProfile
import os
from dataclasses import replace

import faults
import pytest

from benchmarks.pretended_ray import Lost, PretendedRay
from benchmarks.scheduling import Trainer, simulate, spec_of
from sparse_tickets import run_sweep
from sparse_tickets.algos.teaching import ExpertError
from sparse_tickets.cli import main
from sparse_tickets.files import StoreError
from sparse_tickets.sweep.cells import units_before
from sparse_tickets.sweep.engines import run_study
from sparse_tickets.sweep.experts import EXPERTS
from sparse_tickets.sweep.plugins import load_plugins
from sparse_tickets.sweep.progress import total_steps
from sparse_tickets.sweep.ray import _connected
from sparse_tickets.sweep.run import run
from sparse_tickets.sweep.schedule import UnitSchedule
from sparse_tickets.sweep.spec import Sweep
from sparse_tickets.sweep.store import Store
from sparse_tickets.sweep.unit import Unit

CHAINS = Sweep(seeds=3, levels=4, chunk=1, conditions=("mask/weights", "random/re-init"))


def popped(schedule):
    return list(iter(schedule.pop, None))


def test_every_unit_comes_once_and_after_those_before_it():
    schedule = UnitSchedule(CHAINS)
    finished = set()
    waves = []
    while wave := popped(schedule):
        for unit in wave:
            if unit != EXPERTS:
                tracks = CHAINS.together(unit.level, unit.chunk)
                assert set(units_before(CHAINS, unit, tracks)) <= finished
                assert unit.algo != "bc" or EXPERTS in finished
        for unit in wave:
            schedule.finish(unit)
        finished |= set(wave)
        waves.append(wave)
    expected = {Unit(algo, *at) for algo in CHAINS.algos for *at, _ in CHAINS.units(algo)}
    assert finished == expected | {EXPERTS}
    assert sum(map(len, waves)) == len(finished)
    # Without a chain nothing waits for the level before: all levels are in the second wave.
    free = [u for u in waves[1] if u.algo == "ppo" and u.level > 1]
    assert {u.level for u in free} == {2, 3}
    assert all(CHAINS.together(u.level, u.chunk)[0].condition == "random/re-init" for u in free)


def test_what_most_wait_for_comes_first():
    schedule = UnitSchedule(CHAINS)
    for unit in popped(schedule):
        schedule.finish(unit)
    wave = popped(schedule)
    of = [CHAINS.together(u.level, u.chunk)[0].condition for u in wave if u.algo == "ppo"]
    chained = [condition == "mask/weights" for condition in of]
    assert chained == sorted(chained, reverse=True)
    assert any(chained)
    assert not all(chained)


def test_what_is_put_back_comes_again_and_what_nobody_needs_is_told():
    schedule = UnitSchedule(replace(CHAINS, algos=("ppo",), seeds=1))
    first = schedule.pop()
    assert schedule.pop() is None
    schedule.put_back([first])
    assert schedule.pop() == first
    spent = schedule.finish(first)
    while (unit := schedule.pop()) is not None:
        assert first not in spent
        spent = schedule.finish(unit)
    assert {first, unit or first} <= set(spent)


@pytest.fixture
def unflushed(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def test_a_simulated_sweep_runs_every_unit_once_in_order(tmp_path, unflushed):
    """`Trainer` refuses a unit that comes too early or twice."""
    found = simulate(spec_of(300), tmp_path / "run", slots=30, at_once=7)
    assert found["units"] == 308
    assert found["most at once"] == 30
    assert not list((tmp_path / "run" / "units").glob("*.lock*"))


@pytest.mark.long
def test_what_a_unit_costs_does_not_grow_with_their_number(tmp_path, unflushed):
    """In calls, which no other process slows down; a list of all units per unit would show."""

    def calls(units):
        profile = cProfile.Profile()
        profile.enable()
        found = simulate(spec_of(units), tmp_path / str(units), slots=16, at_once=4)
        profile.disable()
        return sum(each.callcount for each in profile.getstats()) / found["units"]

    calls(10)  # what is imported at first use
    few, many = calls(150), calls(600)
    assert many < 1.1 * few


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    out = tmp_path_factory.mktemp("schedule") / "local"
    run(faults.SPEC, out)
    return faults.contents(out)


@pytest.fixture
def cluster():
    with PretendedRay(cpus=2).installed() as cluster:
        yield cluster


@pytest.mark.long
@pytest.mark.usefixtures("cluster")
def test_the_driver_gives_the_local_table_and_adds_up(expected, tmp_path):
    steps = []
    told = lambda _, done: steps.append(done)  # noqa: E731
    run_sweep(faults.SPEC, tmp_path, engine="ray", on_progress=told)
    assert faults.contents(tmp_path) == expected
    assert sum(steps) == total_steps(faults.SPEC)
    steps.clear()
    run_sweep(faults.SPEC, tmp_path, engine="ray", on_progress=told)
    assert sum(steps) == total_steps(faults.SPEC)


def test_units_share_gpus(tmp_path, unflushed):
    spec = replace(faults.SPEC, seeds=8, chunk=1, rewind_step=0)
    trainer = Trainer(spec)
    with PretendedRay(cpus=8, gpus=1, train=trainer).installed() as cluster:
        run_sweep(spec, tmp_path, engine="ray", gpus_per_chunk=0.25)
    assert cluster.most_running == 4
    assert trainer.devices == {"cuda"}


def test_a_cluster_without_gpus_is_pointed_out(tmp_path):
    with (
        PretendedRay(cpus=2, train=lambda *_: 1 / 0, gpus=0.2).installed(),
        pytest.warns(UserWarning, match=r"waiting for GPUs: the cluster has 0.2, a unit takes 0.5"),
        pytest.raises(KeyboardInterrupt),
    ):
        run_sweep(faults.SPEC, tmp_path, engine="ray", gpus_per_chunk=0.5, on_progress=interrupt)
    assert not list((tmp_path / "units").iterdir())


def test_a_unit_that_is_lost_too_often_is_named(tmp_path):
    def lose(*given):
        raise Lost("the machine is gone")

    said = r"ppo-level-00-chunk-00 was lost 11 times with its process or machine. Finished units"
    with PretendedRay(cpus=1, train=lose).installed(), pytest.raises(StoreError, match=said):
        run_sweep(replace(faults.SPEC, algos=("ppo",)), tmp_path, engine="ray")
    assert not list((tmp_path / "units").iterdir())


def test_claims_end_with_a_driver_whose_cluster_is_gone(cluster, tmp_path, monkeypatch):
    def fail(reference, force):
        raise ConnectionError("no cluster")

    monkeypatch.setattr(cluster, "cancel", fail)
    with pytest.raises(ConnectionError, match="no cluster"):
        run_sweep(faults.SPEC, tmp_path, engine="ray", on_progress=interrupt)
    assert not list((tmp_path / "units").glob("*.lock*"))


def interrupt(description, steps):
    raise KeyboardInterrupt


@pytest.mark.long
def test_sweeps_of_a_study_share_the_cluster(cluster, expected, tmp_path):
    poor = replace(faults.SPEC, bc=replace(faults.SPEC.bc, expert_gate=1e9))
    said = []
    found = run_study(
        {"poor": poor, "rich": faults.SPEC},
        tmp_path,
        engine="ray",
        on_progress=lambda description, steps: said.append(description),
    )
    assert faults.contents(tmp_path / "rich") == expected
    assert isinstance(found["rich"], Store)
    # Too few experts end cloning alone: of reinforcement learning all is there.
    assert isinstance(found["poor"], ExpertError)
    assert {u.algo for u in Store(tmp_path / "poor").units()} == {"ppo"}
    assert len(Store(tmp_path / "poor").units()) == len(list(poor.units("ppo")))
    assert any(line.startswith("poor: ppo") for line in said)
    # Both were under way at once: one alone has no two units at first, but experts and level 0.
    first = [line.split(":")[0] for line in said if ":" in line]
    assert "rich" in first[: first.index("poor") + 4]


PLUGIN = """
from sparse_tickets import register_criterion

@register_criterion("sent-along")
def sent_along(weight, initial, arena):
    return weight.abs()

@register_criterion("sent-along-broken")
def broken(weight, initial, arena):
    return {}["scores"]
"""


def test_plugins_are_sent_along_and_their_errors_name_the_line(cluster, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN)
    load_plugins([file])
    spec = replace(faults.SPEC, algos=("ppo",), criterion="sent-along")
    run_sweep(spec, tmp_path / "run", engine="ray", plugins=[file])
    assert len(Store(tmp_path / "run").units()) == len(list(spec.units("ppo")))
    assert cluster.put_bytes >= len(PLUGIN)
    arguments = [
        *("sweep", "--engine", "ray", "--plugin", str(file), "--out", str(tmp_path / "broken")),
        *("--criterion", "sent-along-broken", "--seeds", "1", "--levels", "2", "--hidden", "4"),
        *("--algos", "ppo", "--ppo.steps", "64", "--ppo.horizon", "16"),
        *("--evaluation.points", "1", "--evaluation.episodes", "1"),
    ]
    assert main(arguments) == 1
    assert f"KeyError: 'scores' ({file}, line 10)" in capsys.readouterr().err


@pytest.mark.parametrize(("address", "asked"), [(None, "local"), ("auto", "auto")])
def test_without_an_address_no_cluster_that_is_there_is_joined(address, asked):
    class Ray:
        heard = None

        def is_initialized(self):
            return False

        def init(self, **options):
            self.heard = options

        def shutdown(self):
            pass

    ray = Ray()
    with _connected(ray, address):
        assert ray.heard["address"] == asked
