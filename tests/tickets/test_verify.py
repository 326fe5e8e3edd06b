"""Verification: honest runs agree with plain torch, tampered ones do not."""

import shutil
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from sparse_tickets.algos.bc import BC
from sparse_tickets.algos.evaluation import Evaluation
from sparse_tickets.algos.ppo import PPO
from sparse_tickets.analysis import verify as verify_module
from sparse_tickets.analysis.verify import verify
from sparse_tickets.cli import main
from sparse_tickets.envs.registry import _registry
from sparse_tickets.sweep.data import read_data, write_data
from sparse_tickets.sweep.run import run
from sparse_tickets.sweep.spec import Sweep
from sparse_tickets.sweep.store import Store, StoreError, load_results
from sparse_tickets.sweep.unit import Unit

pytestmark = pytest.mark.usefixtures("one_thread")

SPEC = Sweep(
    conditions=("mask/weights", "permuted/permuted"),
    seeds=1,
    levels=2,
    hidden=(8,),
    rewind_step=64,
    ppo=PPO(steps=192, copies=2, horizon=32),
    bc=BC(experts=1, expert_gate=0.0),
    evaluation=Evaluation(points=1, episodes=2, final_episodes=5),
)
CELLS = 6


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("verify") / "run"
    run(SPEC, out)
    return out


def tamper(out, unit, change, *, rows=None):
    """Replace a unit's tickets, or the rows of its table, as someone with the store could."""
    store = Store(out)
    tickets = [change(ticket) for ticket in store.read_tickets(unit)]
    table, later = store.read_rows(unit), store.read_rewind(unit)
    # A unit that is there is never replaced: it goes first.
    shutil.rmtree(out / "units" / unit.name)
    store.write(unit, [rows(row) for row in table] if rows else table, tickets, rewind=later)


def test_a_fresh_run_agrees(finished, capsys):
    assert main(["verify", str(finished), "--cells", "2"]) == 0
    text = capsys.readouterr().out
    assert text.count("agrees") == 2
    assert "disagrees" not in text


@pytest.mark.long
def test_every_cell_of_both_algorithms_agrees(finished, capsys):
    assert main(["verify", str(finished), "--cells", "99"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"{CELLS} cells again, in plain torch" in text
    assert text.count("agrees") == CELLS


@pytest.mark.long
def test_cells_are_spread_over_algorithms_and_levels(finished):
    table, agree = verify(finished, 4, Console(quiet=True))
    assert agree
    cells = [str(cell).split() for cell in table.columns[0].cells]
    places = {(cell[0], cell[-1]) for cell in cells}
    assert places == {(algo, level) for algo in ("ppo", "bc") for level in ("0", "1")}


@pytest.mark.long
@pytest.mark.parametrize("algo", ["ppo", "bc"])
def test_replaced_final_weights_disagree(algo, copy, capsys):
    # Without weights the pole falls at once.
    tamper(copy, Unit(algo, 1, 0), lambda t: replace(t, final=torch.zeros_like(t.final)))
    assert main(["verify", str(copy), "--cells", "99"]) == 1
    assert "disagrees" in capsys.readouterr().out


def retrained(monkeypatch, shifts):
    """Let the next cells end so far from where they did; everything else agrees."""
    rest = iter(shifts)

    def again(spec, store, cells, on_iteration):
        stored = [cell.row["return_final"] for cell in cells]
        return [verify_module._Again(True, value, 0.0, value + next(rest)) for value in stored]

    monkeypatch.setattr(verify_module, "_again", again)


@pytest.mark.parametrize(
    ("shifts", "agree", "elsewhere"),
    [
        ([0] * 6, True, 0),
        ([-300, 0, 0, 0, 0, 0], True, 1),  # chaos moves one now and then
        ([-300, 300, 0, 0, 0, 0], True, 2),
        ([-300, 300, -300, 300, -300, 0], False, 5),  # but not nearly all
    ],
)
def test_where_cells_end_is_judged_over_all_of_them(
    shifts, agree, elsewhere, finished, monkeypatch
):
    retrained(monkeypatch, shifts)
    table, found = verify(finished, CELLS, Console(quiet=True))
    assert found == agree
    assert f"{elsewhere} of 6 end elsewhere" in table.caption.plain
    assert f"{'within' if agree else 'beyond'} chance" in table.caption.plain
    assert list(table.columns[-1].cells).count("agrees, ends elsewhere") == elsewhere


def test_a_small_difference_in_one_direction_disagrees(finished, monkeypatch):
    monkeypatch.setattr(verify_module, "SIGNIFICANCE", 0.05)  # six cells give no less than 2 / 2^6
    retrained(monkeypatch, [-3.0, -4.0, -1.0, -2.0, -2.5, -0.5])
    assert not verify(finished, CELLS, Console(quiet=True))[1]
    retrained(monkeypatch, [-3.0, 4.0, -1.0, 2.0, -2.5, 0.5])
    assert verify(finished, CELLS, Console(quiet=True))[1]


@pytest.mark.long
def test_a_replaced_start_disagrees(copy, capsys):
    def other_mask(ticket):
        mask = ticket.mask.roll(1)
        rows = {name: getattr(ticket, name).clone() for name in ("initial", "rewind")}
        rows |= {name: getattr(ticket, name).clone() for name in ("final", "best")}
        for row in rows.values():
            row[: len(mask)] = torch.where(mask, row[: len(mask)], 0.0)
        return replace(ticket, mask=mask, **rows)

    tamper(copy, Unit("ppo", 1, 0), other_mask)
    assert main(["verify", str(copy), "--cells", "99"]) == 1
    assert "differs" in capsys.readouterr().out


@pytest.mark.long
def test_an_invented_return_disagrees(copy, capsys):
    tamper(copy, Unit("ppo", 1, 0), lambda t: t, rows=lambda row: row | {"return_final": 499.0})
    assert main(["verify", str(copy), "--cells", "99"]) == 1
    assert "disagrees" in capsys.readouterr().out


def test_what_cannot_be_verified_says_why(copy, tmp_path, capsys):
    assert main(["verify", str(copy), "--cells", "0"]) == 2
    assert "cells must be at least 1" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "nowhere")]) == 1
    assert "holds no run" in capsys.readouterr().err
    (copy / "data" / "demonstrations.safetensors").unlink()
    assert main(["verify", str(copy), "--cells", "99"]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "no intact demonstrations: run the sweep again" in told
    shutil.rmtree(copy / "units")
    (copy / "units").mkdir()
    assert main(["verify", str(copy)]) == 1
    assert "no finished unit" in capsys.readouterr().err


def test_other_demonstrations_are_noticed(copy, capsys):
    store = Store(copy)
    data = {name: value.clone() for name, value in read_data(store, "demonstrations").items()}
    data["obs"][0, 0] += 1
    (store.data / "demonstrations.safetensors").unlink()
    write_data(store, "demonstrations", data)
    assert main(["verify", str(copy), "--cells", "99"]) == 1
    assert "mixes different demonstrations" in " ".join(capsys.readouterr().err.split())


def test_another_observation_scale_is_noticed(finished, monkeypatch, capsys):
    factory, spec = _registry[SPEC.env]
    monkeypatch.setitem(_registry, SPEC.env, (factory, replace(spec, scale=(3.0,) * 4)))
    assert main(["verify", str(finished)]) == 1
    assert "scales observations otherwise" in " ".join(capsys.readouterr().err.split())


def test_critics_pruned_in_one_shot_are_read_but_neither_verified_nor_mixed(tmp_path, capsys):
    spec = replace(SPEC, algos=("ppo",), levels=1, rewind_step=0, prune_critic=True)
    before = spec.to_dict()
    del before["critic_layout"]
    out = tmp_path / "run"
    Store.open(out, before)
    store = run(spec, tmp_path / "now")
    unit = store.units()[0]
    Store(out).write(unit, store.read_rows(unit), store.read_tickets(unit))
    assert len(load_results(out)) == 1
    assert main(["report", str(out)]) == 0
    assert main(["verify", str(out)]) == 1
    assert "took a pruned critic's mask from one-shot" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(StoreError, match=r"critic_layout is absent there, 2 here.*another --out"):
        run(spec, out)


def test_the_reference_backend_is_used_for_training_only(finished, monkeypatch):
    from sparse_tickets.analysis import verify as module
    from sparse_tickets.kernels.dispatch import resolve_backend

    seen = []
    train = module.train_population

    def spy(*arguments, **settings):
        seen.append(resolve_backend(torch.device("cpu")))
        return train(*arguments, **settings)

    monkeypatch.setattr(module, "train_population", spy)
    verify(finished, 1, Console(quiet=True))
    assert seen == ["reference"]
    assert resolve_backend(torch.device("cpu")) != "reference"
