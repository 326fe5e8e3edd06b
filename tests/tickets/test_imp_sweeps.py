"""Iterative pruning end to end: tracks, rewinding, controls and critics."""

import shutil
from dataclasses import replace

import pytest
import torch

from sparse_tickets.algos.bc import BC
from sparse_tickets.algos.evaluation import Evaluation
from sparse_tickets.algos.ppo import PPO
from sparse_tickets.files import StoreError
from sparse_tickets.kernels import use_backend
from sparse_tickets.kernels.arena import Arena

pytestmark = pytest.mark.usefixtures("plain_torch")


def swept(folder, **settings):
    """A small sweep on the fast kernels, its store, its tickets by (condition, ..., level)."""
    from sparse_tickets.sweep.run import run
    from sparse_tickets.sweep.spec import Sweep

    small = {
        "algos": ("ppo",),
        "seeds": 2,
        "hidden": (8,),
        "ppo": PPO(steps=256, horizon=32),
        "evaluation": Evaluation(1, 2, 2),
    }
    spec = Sweep(**(small | settings))
    with use_backend("auto"):
        store = run(spec, folder)
    tickets = [ticket for unit in store.units() for ticket in store.read_tickets(unit)]
    return spec, store, {(t.condition, t.controls, t.seed, t.level): t for t in tickets}


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    return swept(
        tmp_path_factory.mktemp("chain"),
        conditions=("mask/weights", "mask/permuted", "permuted/permuted", "random/re-init"),
        controls=("own", "ticket"),
        levels=4,
        rate=0.6,
        hidden=(8, 8),
        rewind_step=256,
        ppo=PPO(steps=1024, horizon=32),
        evaluation=Evaluation(2, 2, 4),
    )


def test_ticket_controls_take_mask_and_values_from_the_same_seeds_ticket(chain):
    _, _, tickets = chain
    for seed in range(2):
        for number in range(1, 4):
            ticket = tickets["mask/weights", "own", seed, number]
            permuted = tickets["mask/permuted", "ticket", seed, number]
            assert torch.equal(permuted.mask, ticket.mask)
            both = tickets["permuted/permuted", "ticket", seed, number]
            for begin, out, inp in ticket.arena.prunable_layers():
                layer = slice(begin, begin + out * inp)
                values = ticket.rewind[layer][ticket.mask[layer]].sort().values
                for control in (permuted, both):
                    got = control.rewind[layer][control.mask[layer]].sort().values
                    assert torch.equal(got, values)
    # Own controls prune by their own networks: from the second level on they part ways.
    assert not torch.equal(
        tickets["mask/permuted", "own", 0, 2].mask, tickets["mask/weights", "own", 0, 2].mask
    )


def test_each_track_prunes_its_own_final_weights(chain):
    spec, _, tickets = chain
    for condition in ("mask/weights", "mask/permuted"):
        for number in range(2, 4):
            before = tickets[condition, "own", 1, number - 1]
            after = tickets[condition, "own", 1, number]
            kept = spec.kept("ppo", number)
            scores = before.final[: len(before.mask)].abs().masked_fill(~before.mask, -1)
            assert int(after.mask.sum()) == kept
            assert after.mask[scores.topk(kept).indices].all()


@pytest.fixture(scope="module")
def by_best(tmp_path_factory):
    return swept(
        tmp_path_factory.mktemp("best"),
        algos=("ppo", "bc"),
        conditions=("mask/weights",),
        seeds=4,
        levels=3,
        rate=0.6,
        prune_by="best",
        ppo=PPO(steps=2048, horizon=32, learning_rate=0.02),
        bc=BC(experts=1, expert_gate=0.0),
        evaluation=Evaluation(8, 4, 4),
    )


def test_masks_are_chosen_by_the_best_evaluations_weights_where_asked(by_best):
    spec, store, _ = by_best
    differ = 0
    for algo in spec.algos:
        found = {
            (ticket.seed, ticket.level): ticket
            for unit in store.units()
            if unit.algo == algo
            for ticket in store.read_tickets(unit)
        }
        for seed in range(4):
            for number in (1, 2):
                before, after = found[seed, number - 1], found[seed, number]
                kept = spec.kept(algo, number)
                chosen = {
                    which: before.row(which)[: len(before.mask)].abs().topk(kept).indices
                    for which in ("best", "final")
                }
                assert int(after.mask.sum()) == kept
                assert after.mask[chosen["best"]].all()
                differ += not after.mask[chosen["final"]].all()
    assert differ > 4  # of 16; where training ends at its best, both are the same


def test_a_sweep_that_prunes_by_the_best_goes_on_where_it_was(by_best, tmp_path):
    from sparse_tickets.sweep.run import run
    from sparse_tickets.sweep.store import load_results
    from sparse_tickets.sweep.unit import Unit

    spec, store, _ = by_best
    again = tmp_path / "again"
    shutil.copytree(store.path, again)
    shutil.rmtree(again / "units" / Unit("ppo", 2, 0).name)
    with pytest.raises(StoreError, match="prune_by is 'best' there, absent here"):
        run(replace(spec, prune_by="final"), again)
    with use_backend("auto"):
        run(spec, again)
    timed = ("wall_s", "train_s")
    assert load_results(again).drop(timed).equals(load_results(store.path).drop(timed))


def test_training_resumes_at_the_rewind_step(chain):
    spec, store, tickets = chain
    from sparse_tickets.sweep.unit import Unit

    stored = store.read_rewind(Unit("ppo", 0, 0))
    assert (stored["step"] == 2 * 4 * 4).all()  # 2 iterations of 4 epochs of 4 minibatches
    assert stored["m"].any()
    for seed in range(2):
        dense = tickets["dense", "shared", seed, 0]
        assert torch.equal(dense.rewind, stored["weight"][seed])
        assert not torch.equal(dense.rewind, dense.initial)
        ticket = tickets["mask/weights", "own", seed, 3]
        prunable = len(ticket.mask)
        assert torch.equal(ticket.rewind[prunable:], dense.rewind[prunable:])
        assert torch.equal(ticket.rewind[:prunable], dense.rewind[:prunable] * ticket.mask)
        assert torch.equal(ticket.initial[:prunable], dense.initial[:prunable] * ticket.mask)
    assert {row["train_steps"] for row in store.read_rows(Unit("ppo", 1, 0))} == {768}
    assert spec.train_steps("ppo", 0) == 1024


@pytest.mark.long
def test_the_schedule_goes_on_where_it_was(chain, monkeypatch):
    from sparse_tickets.algos import ppo
    from sparse_tickets.sweep.cells import cell_population
    from sparse_tickets.sweep.run import train_population

    spec, store, _ = chain
    track = spec.tracks(1)[0]
    population, key = cell_population(spec, store, "ppo", 1, [track])
    seen = []
    update = ppo.ppo_update_

    def spy(parameters, arena, batch, key, iteration, lr, config, *, density):
        seen.append((iteration, float(lr[0]), int(parameters.step[0])))
        return update(parameters, arena, batch, key, iteration, lr, config, density=density)

    monkeypatch.setattr(ppo, "ppo_update_", spy)
    train_population(spec, "ppo", population, key, 1, [track], None)
    assert [iteration for iteration, _, _ in seen] == [2, 3, 4, 5, 6, 7]
    rates = [rate for _, rate, _ in seen]
    assert rates == pytest.approx([2.5e-4 * (1 - i / 8) for i in range(2, 8)], rel=1e-6)
    assert [step for _, _, step in seen] == [16 * i for i in range(2, 8)]


@pytest.mark.parametrize("algo", ["ppo", "bc"])
def test_disconnected_policies_train_and_are_counted(algo, tmp_path):
    from sparse_tickets.sweep.store import load_results

    spec, _, tickets = swept(
        tmp_path,
        algos=(algo,),
        conditions=("mask/weights", "random/re-init"),
        levels=3,
        rate=0.95,
        hidden=(8, 8),
        bc=BC(experts=1, expert_gate=0.0),
        evaluation=Evaluation(1, 2, 3),
    )
    assert spec.kept(algo, 2) == 0
    results = load_results(tmp_path)
    assert len(results) == 2 * 5
    last = results.filter(level=2)
    assert last["has_path"].to_list() == [False] * 4
    assert last["effective_density"].to_list() == [0.0] * 4
    assert last["reachable_actions"].to_list() == [0] * 4
    assert last["dead_inputs"].to_list() == [4] * 4
    assert results["return_final"].is_finite().all()
    assert (results["return_final"] >= 8).all()
    for ticket in tickets.values():
        assert ticket.final.isfinite().all()
        # What is left of a policy without weights is its biases, and these learn.
        assert not torch.equal(
            ticket.final[head_biases(ticket)], ticket.rewind[head_biases(ticket)]
        )


def head_biases(ticket):
    net = ticket.arena.actor
    return slice(net.biases[-1], net.biases[-1] + net.sizes[-1])


def test_pruning_the_critic_through_a_sweep(tmp_path):
    _, _, tickets = swept(
        tmp_path,
        conditions=("mask/weights", "permuted/permuted"),
        seeds=1,
        levels=2,
        rate=0.5,
        prune_critic=True,
        chunk=1,
    )
    assert [int(ticket.mask.sum()) for ticket in tickets.values()] == [88, 44, 44]
    assert all(ticket.prune_critic for ticket in tickets.values())


@pytest.fixture(scope="module")
def pruned_critics(tmp_path_factory):
    return swept(
        tmp_path_factory.mktemp("critics"),
        conditions=("mask/weights", "random/re-init", "erk-random/re-init"),
        controls=("own", "ticket"),
        levels=4,
        rate=0.4,
        prune_critic=True,
        ppo=PPO(steps=512, horizon=32),
    )


@pytest.mark.parametrize("condition", ["random/re-init", "erk-random/re-init"])
@pytest.mark.parametrize("controls", ["own", "ticket"])
def test_random_conditions_prune_the_critic_level_by_level(condition, controls, pruned_critics):
    spec, _, tickets = pruned_critics
    critic = slice(policy_actor(spec).prunable, None)
    source = ("mask/weights", "own") if controls == "ticket" else (condition, controls)
    for seed in range(spec.seeds):
        for level in range(1, spec.levels):
            ticket = tickets[condition, controls, seed, level]
            before = ("dense", "shared") if level == 1 else source
            trained = tickets[*before, seed, level - 1]
            prunable = len(trained.mask)
            # Neither ties nor revivals: the largest trained weights of the level before.
            top = trained.final[:prunable].abs().topk(spec.kept("ppo", level)).indices
            expected = torch.zeros_like(trained.mask).scatter(0, top, True)
            assert torch.equal(ticket.mask[critic], expected[critic])
            assert not (ticket.mask & ~trained.mask)[critic].any()
            assert int(ticket.mask.sum()) == spec.kept("ppo", level)
            dense = tickets["dense", "shared", seed, 0].initial[:prunable][critic]
            assert torch.equal(ticket.rewind[:prunable][critic], dense * ticket.mask[critic])
    # The actor's mask is drawn, not nested.
    actor = slice(0, critic.start)
    masks = [tickets[condition, controls, 0, level].mask[actor] for level in (1, 2)]
    assert (masks[1] & ~masks[0]).any()


def policy_actor(spec):
    return Arena.build(spec.arena("ppo").actor.sizes)
