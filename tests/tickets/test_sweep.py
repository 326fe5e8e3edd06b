"""Whole sweeps: the table they leave, killed, shared, damaged, with a full disk, or in chunks."""

import json
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from sweeping import SPEC, TIMES, table

from sparse_tickets import run_sweep
from sparse_tickets.algos.bc import BC
from sparse_tickets.algos.ppo import PPO
from sparse_tickets.algos.teaching import ExpertError
from sparse_tickets.envs import registry
from sparse_tickets.files import StoreError
from sparse_tickets.provenance import commit, processor
from sparse_tickets.sweep import run as run_module
from sparse_tickets.sweep.data import checksum, read_data
from sparse_tickets.sweep.progress import total_steps
from sparse_tickets.sweep.rows import COLUMNS, OPTIONAL
from sparse_tickets.sweep.run import run
from sparse_tickets.sweep.spec import Sweep
from sparse_tickets.sweep.store import Store, load_results
from sparse_tickets.sweep.unit import Unit

# Runs SPEC in a process of its own; kills itself after so many agent-steps if told to.
CHILD = """
import json, os, signal, sys
from sparse_tickets.sweep.run import run
from sparse_tickets.sweep.spec import Sweep

spec, out, limit = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
done = 0

def advance(description, steps):
    global done
    done += steps
    if limit and done >= limit:
        os.kill(os.getpid(), signal.SIGKILL)

run(Sweep.from_dict(spec), out, on_progress=advance)
"""


def start(out, limit=0):
    arguments = [sys.executable, "-c", CHILD, json.dumps(SPEC.to_dict()), str(out), str(limit)]
    return subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)


def wait(child):
    """Exit status and what it complained about."""
    _, complaint = child.communicate(timeout=120)
    return child.returncode, complaint


def test_the_table_has_a_row_per_cell_and_the_promised_columns(finished):
    results = load_results(finished)
    promised = [
        "env",
        "algo",
        "condition",
        "controls",
        "seed",
        "level",
        "density",
        "effective_density",
        "return_final",
        "return_best",
        "train_steps",
        "wall_s",
    ]
    assert set(promised) <= set(results.columns)
    assert not any(results[column].is_null().any() for column in promised)
    # Dense once per seed; the ticket and random masks once, mask/permuted under both controls.
    assert len(results) == 2 * (2 + 2 * 2 * 4)
    cells = ["algo", "condition", "controls", "seed", "level"]
    assert results.select(cells).is_unique().all()
    for algo in ("ppo", "bc"):
        for level in range(3):
            rows = results.filter(algo=algo, level=level)
            expected = SPEC.kept(algo, level) / SPEC.kept(algo, 0)
            assert rows["density"].to_list() == [expected] * len(rows)
            assert (rows["train_steps"] == (512 if level == 0 else 384)).all()
            assert (rows["effective_density"] <= rows["density"]).all()
    assert (results["wall_s"] >= results["train_s"]).all()
    assert (results["curve"].list.len() == 2).all()
    areas = results["curve"].list.mean()
    assert (results["return_auc"] - areas).abs().max() < 1e-4
    assert set(results["processor"]) == {processor()}
    assert set(results["commit"]) == {commit()}
    for name, curve in (
        ("dormant_share", "dormant_curve"),
        ("parameter_norm", "norm_curve"),
        ("gradient_norm", "gradient_norm_curve"),
    ):
        assert (results[curve].list.len() == 2).all()
        assert (results[curve].list.last() == results[name]).all()
    assert results["dormant_share"].is_between(0, 1).all()
    assert (results["gradient_norm"] > 0).all()
    assert results["effective_rank"].is_between(1, SPEC.hidden[-1]).all()
    assert results.filter(level=0)["mask_iou"].is_null().all()
    # Magnitudes of a chain give masks within masks; shuffled and drawn ones overlap less.
    chain = results.filter(pl.col("level") > 0, condition="mask/weights")
    assert (chain["mask_iou"] - (1 - SPEC.rate)).abs().max() < 0.01
    drawn = results.filter(pl.col("level") > 1, pl.col("condition") == "random/re-init")
    assert drawn["mask_iou"].is_between(0.3, 0.75).all()


def test_overlap_is_with_the_mask_that_the_track_had_before(finished):
    store = Store(finished)
    cells = {
        (t.algo, t.condition, t.controls, t.seed, t.level): (t, row["mask_iou"])
        for unit in store.units()
        for t, row in zip(store.read_tickets(unit), store.read_rows(unit), strict=True)
    }
    for (*track, level), (ticket, overlap) in cells.items():
        if level > 1:
            before = cells[(*track, level - 1)][0].mask
            both, either = (ticket.mask & before).sum(), (ticket.mask | before).sum()
            assert overlap == float(both) / float(either)


def test_the_docs_tell_every_column_and_its_type(finished):
    results = load_results(finished)
    text = (Path(__file__).parents[2] / "docs" / "results.md").read_text()
    kinds = "string|int64|double|bool|list of double"
    told = dict(re.findall(rf"^\| (\w+) \| ({kinds}) \|", text, re.MULTILINE))
    types = {
        pl.String: "string",
        pl.Int64: "int64",
        pl.Float64: "double",
        pl.Boolean: "bool",
        pl.List(pl.Float64): "list of double",
    }
    found = {name: types[kind] for name, kind in results.schema.items()}
    if commit() is None:  # installed from a wheel
        found["commit"] = "string"
    assert told == found
    assert set(found) == {*COLUMNS, *OPTIONAL}


def test_everything_needed_later_is_stored(finished):
    store = Store(finished)
    for unit in store.units():
        for ticket, row in zip(store.read_tickets(unit), store.read_rows(unit), strict=True):
            assert (ticket.algo, ticket.level) == (unit.algo, unit.level)
            assert (ticket.seed, ticket.condition, ticket.controls) == (
                row["seed"],
                row["condition"],
                row["controls"],
            )
            assert int(ticket.mask.sum()) == SPEC.kept(unit.algo, unit.level)
            assert ticket.offset == SPEC.env_spec.offset
            assert ticket.scale == SPEC.env_spec.scale
            assert ticket.metadata["versions"]["torch"] == torch.__version__
            op = {"ppo": "ppo_update_", "bc": "clone_update_"}[unit.algo]
            assert ticket.metadata["plan"].startswith(f"{op}: cpu/")
    assert Sweep.from_dict(store.spec) == SPEC


def test_initial_weights_are_shared_by_algorithms_conditions_and_levels(finished):
    store = Store(finished)
    tickets = [ticket for unit in store.units() for ticket in store.read_tickets(unit)]
    dense = {(t.algo, t.seed): t for t in tickets if t.level == 0}
    prunable = dense["ppo", 0].arena.prunable
    for seed in range(2):
        actors = [dense[algo, seed].initial[:prunable] for algo in ("ppo", "bc")]
        assert torch.equal(*actors)
    for ticket in tickets:
        whole = dense[ticket.algo, ticket.seed].initial
        assert torch.equal(ticket.initial[:prunable], whole[:prunable] * ticket.mask)
        assert torch.equal(ticket.initial[prunable:], whole[prunable:])


@pytest.mark.long
def test_a_sweep_of_other_seeds_trains_what_one_of_all_seeds_does(finished, tmp_path):
    run(replace(SPEC, seeds=1, first_seed=1), tmp_path / "second")
    assert table(tmp_path / "second").equals(table(finished).filter(seed=1))


def test_the_same_spec_twice_and_in_other_chunks_gives_the_same_table(finished, tmp_path):
    for chunk in (1, 64):
        run(replace(SPEC, chunk=chunk), tmp_path / str(chunk))
        assert table(tmp_path / str(chunk)).equals(table(finished))


def test_a_longer_sweep_and_fewer_conditions_agree_where_they_overlap(finished, tmp_path):
    small = replace(SPEC, conditions=("mask/weights",), controls=("own",), seeds=1, levels=2)
    run(small, tmp_path)
    overlap = table(finished).filter(
        pl.col("condition").is_in(["dense", "mask/weights"]),
        pl.col("seed") == 0,
        pl.col("level") < 2,
    )
    assert table(tmp_path).equals(overlap)


@pytest.mark.parametrize(
    "share",
    [pytest.param(0.1, marks=pytest.mark.slow), 0.5, pytest.param(0.8, marks=pytest.mark.slow)],
)
def test_a_killed_sweep_resumes_to_the_same_table(share, finished, tmp_path):
    out = tmp_path / "run"
    child = start(out, limit=int(share * total_steps(SPEC)))
    assert wait(child) == (-signal.SIGKILL, "")
    locks = [file.name for file in (out / "units").glob("*.lock")]
    assert len(locks) in (1, 2)  # it died at work
    before = {file: file.stat().st_mtime_ns for file in (out / "units").glob("*/*.parquet")}
    assert len(before) < len(list((finished / "units").glob("*/*.parquet")))
    run(SPEC, out)
    assert table(out).equals(table(finished))
    # What was finished was not done again.
    assert all(file.stat().st_mtime_ns == written for file, written in before.items())
    assert not list(out.rglob("*.lock"))
    assert not list(out.rglob("*.tmp"))


@pytest.mark.long
def test_two_processes_share_a_store(finished, tmp_path):
    out = tmp_path / "run"
    children = [start(out) for _ in range(2)]
    assert [wait(child) for child in children] == [(0, ""), (0, "")]
    assert table(out).equals(table(finished))
    store = Store(out)
    assert all(store.has(unit) for unit in store.units())
    assert not list(out.rglob("*.damaged"))


def test_a_process_trains_what_no_other_works_on(finished, tmp_path):
    """While level 0 of PPO is taken, cloning goes on; then PPO is waited for."""
    spec = replace(SPEC, chunk=64, levels=2)
    store = Store.open(tmp_path, spec.to_dict())
    seen = []

    class Enough(Exception):
        pass

    def advance(description, steps):
        seen.append(description)
        if sum("waiting" in each for each in seen) == 3:
            raise Enough

    lock = tmp_path / "units" / "ppo-level-00-chunk-00.lock"
    lock.write_text("1@another-host elsewhere 00 0000000001\n")
    with pytest.raises(Enough):
        run(spec, tmp_path, on_progress=advance)
    assert "waiting for process 1 on another-host" in seen[-1]
    assert {unit.algo for unit in store.units()} == {"bc"}
    assert len(store.units()) == 2
    lock.unlink()
    run(spec, tmp_path)
    expected = table(finished).filter(pl.col("level") < 2)
    assert table(tmp_path).equals(expected)


def test_every_cloned_ticket_names_its_demonstrations(finished):
    store = Store(finished)
    used = checksum(read_data(store, "demonstrations"))
    for unit in store.units():
        for ticket in store.read_tickets(unit):
            expected = {"demonstrations": used} if unit.algo == "bc" else None
            assert ticket.metadata.get("inputs") == expected
    assert store.check_inputs("bc", "demonstrations", used) == []


def test_another_spec_is_refused_unless_overwritten(copy):
    other = replace(SPEC, seeds=1, algos=("ppo",), levels=1)
    with pytest.raises(StoreError, match="holds another run") as error:
        run(other, copy)
    assert "levels is 3 there, 1 here" in str(error.value)
    assert "--overwrite" in str(error.value)
    store = run(other, copy, overwrite=True)
    assert store.units() == [Unit("ppo", 0, 0)]
    assert len(load_results(copy)) == 1
    assert not (copy / "data" / "demonstrations.safetensors").exists()


def test_an_environment_without_a_time_limit_is_pointed_out(tmp_path, monkeypatch):
    factory, spec = registry._registry[SPEC.env]
    monkeypatch.setitem(registry._registry, SPEC.env, (factory, replace(spec, time_limit=None)))
    with pytest.warns(UserWarning, match="names no time limit: .*TimeLimit"):
        run(replace(SPEC, seeds=1, levels=1, algos=("ppo",)), tmp_path)


def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path):
    out = tmp_path / "run"
    for spec, device, message in (
        (replace(SPEC, env="CartPool"), "cpu", "env must be one of .*CartPole-v1"),
        (replace(SPEC, bc=BC(expert_steps=100)), "cpu", "steps must be at least"),
        # Nobody says when this one is solved.
        (replace(SPEC, env="CliffWalking-v1", bc=BC()), "cpu", "expert_gate must be given for"),
        (SPEC, "cpux", "device must be one torch has here, got 'cpux'"),
        (SPEC, "cuda:99", "device must be one torch has here, got 'cuda:99'"),
    ):
        with pytest.raises(ValueError, match=message):
            run(spec, out, device=device)
    assert not out.exists()


def test_too_few_experts_stop_cloning_but_keep_reinforcement_learning(tmp_path):
    spec = replace(SPEC, levels=1, bc=BC(experts=1, expert_gate=501.0, expert_tries=1))
    with pytest.raises(ExpertError, match="only 0 of 1"):
        run(spec, tmp_path)
    assert [unit.algo for unit in Store(tmp_path).units()] == ["ppo"]


def test_progress_adds_up_to_the_announced_total(finished, tmp_path):
    for out in (tmp_path / "new", finished):
        done = {}

        def count(description, steps, done=done):
            assert steps >= 0
            what = "experts" if "experts" in description else "tickets"
            done[what] = done.get(what, 0) + steps

        run(SPEC, out, on_progress=count)
        experts = 2 * 512 if out != finished else 0
        assert done.get("experts", 0) == experts
        assert done["tickets"] + 2 * 512 == total_steps(SPEC)


TINY = replace(
    SPEC,
    algos=("ppo",),
    controls=("own",),
    seeds=4,
    levels=4,
    rewind_step=0,
    ppo=PPO(steps=256, horizon=32),
)


def results(spec, out):
    return load_results(run(spec, out).path).drop(*TIMES)


@pytest.mark.filterwarnings("ignore:.*diverged at level")
def test_a_ticket_without_scores_ends_alone_and_is_recorded(tmp_path, monkeypatch):
    from sparse_tickets.prune import CRITERIA

    def broken(weight, initial, arena):
        return torch.where(weight.sum(1, keepdim=True) > 0, torch.nan, weight.abs())

    monkeypatch.setitem(CRITERIA, "broken", broken)
    spec = replace(TINY, criterion="broken")
    frame = results(spec, tmp_path / "together")
    lost = frame.filter(pl.col("diverged"))
    assert 0 < len(lost) < len(frame)
    assert (lost["train_steps"] == 0).all()
    assert lost["return_final"].is_nan().all()
    # Once lost, a track stays lost.
    for key, track in frame.group_by("condition", "seed"):
        levels = track.sort("level")["diverged"].to_list()
        assert levels == sorted(levels), key
    # Its batch-mates are what they are without it, bit for bit.
    kept, plain = (
        each.filter(level=1).sort("condition", "seed")
        for each in (frame, results(replace(TINY, levels=2), tmp_path / "plain"))
    )
    sound = ~kept["diverged"]
    assert sound.any()
    assert kept.filter(sound).equals(plain.filter(sound))
    # Nothing is left to do.
    assert results(spec, tmp_path / "together").equals(frame)


@pytest.mark.filterwarnings("ignore:.*diverged at level")
def test_a_training_that_diverges_is_recorded_and_not_gone_on_with(tmp_path):
    spec = replace(TINY, levels=2, ppo=replace(TINY.ppo, learning_rate=1e38))
    store = run(spec, tmp_path)
    frame = load_results(store.path)
    dense = frame.filter(level=0)
    assert dense["diverged"].all()
    assert dense["return_final"].is_nan().all()
    assert dense["return_initial"].is_finite().all()
    later = frame.filter(pl.col("level") > 0)
    assert later["diverged"].all()
    assert (later["train_steps"] == 0).all()
    (ticket, *_) = store.read_tickets(Unit("ppo", 0, 0))
    assert "not finite" in ticket.metadata["diverged"]


def too_many(monkeypatch, most, error):
    """Training raises ``error()`` part way for more than so many tickets at once."""
    train, asked = run_module.train_population, []

    def train_few(*arguments, on_iteration=None, **settings):
        tracks = arguments[5]
        asked.append(len(tracks))
        if len(tracks) > most:
            on_iteration(len(tracks) * 32)
            raise error()
        return train(*arguments, on_iteration=on_iteration, **settings)

    monkeypatch.setattr(run_module, "train_population", train_few)
    return asked


def exhaust_torch():
    """What torch's allocator says, asked for more than there is."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55, dtype=torch.uint8)
    return caught.value


def exhaust_numpy():
    with pytest.raises(MemoryError) as caught:
        np.empty(1 << 55, np.uint8)
    return caught.value


OUT_OF_MEMORY = [
    exhaust_torch,
    exhaust_numpy,
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    lambda: RuntimeError("Triton Error [CUDA]: out of memory"),
]


@pytest.mark.long
@pytest.mark.parametrize(
    "error",
    [pytest.param(e, marks=[pytest.mark.slow] * (e is not exhaust_torch)) for e in OUT_OF_MEMORY],
    ids=["torch", "numpy", "cuda", "triton"],
)
def test_out_of_memory_halves_the_population_and_changes_no_result(
    error, finished, tmp_path, monkeypatch
):
    asked = too_many(monkeypatch, 1, error)
    done = []
    spec = replace(SPEC, algos=("ppo",))
    with pytest.warns(UserWarning, match="out of memory with 2 tickets at once. Going on with 1,"):
        run(spec, tmp_path, on_progress=lambda what, steps: done.append(steps))
    assert asked[:2] == [2, 1]
    assert set(asked[1:]) == {1}  # once is enough
    assert table(tmp_path).equals(table(finished).filter(pl.col("algo") == "ppo"))
    assert sum(done) == total_steps(spec)


@pytest.mark.long
def test_what_memory_holds_no_single_ticket_of_is_said(tmp_path, monkeypatch, capsys):
    too_many(monkeypatch, 0, exhaust_torch)
    spec = replace(TINY, levels=1, chunk=4)
    with (
        pytest.warns(UserWarning, match="out of memory"),
        pytest.raises(MemoryError, match=r"training a single ticket, ppo level 0.*--hidden"),
    ):
        run(spec, tmp_path)
    assert Store(tmp_path).units() == []
    assert not list((tmp_path / "units").iterdir())
    monkeypatch.undo()
    assert len(results(spec, tmp_path)) == 4


def test_other_errors_of_training_are_not_taken_for_memory(tmp_path, monkeypatch):
    too_many(monkeypatch, 0, lambda: RuntimeError("a kernel is broken"))
    with pytest.raises(RuntimeError, match="a kernel is broken"):
        run(TINY, tmp_path)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"engine": "dask"}, "engine must be one of local, ray, got 'dask'"),
        ({"address": "auto"}, "address and gpus_per_chunk need engine='ray'"),
        ({"engine": "ray", "device": "cuda"}, "device must be left out with engine='ray'"),
        ({"engine": "ray", "gpus_per_chunk": -1.0}, "gpus_per_chunk must be >= 0, got -1.0"),
    ],
)
def test_engines_refuse_what_is_not_theirs(settings, said, tmp_path):
    with pytest.raises(ValueError, match=re.escape(said)):
        run_sweep(SPEC, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_without_ray_its_engine_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"needs Ray: pip install 'sparse-tickets\[ray\]'"):
        run_sweep(SPEC, tmp_path / "run", engine="ray")
    assert not (tmp_path / "run").exists()
