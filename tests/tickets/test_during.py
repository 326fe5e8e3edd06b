"""Sparsity during training in the trainers and in sweeps: exact counts, alone as together."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from rich.console import Console
from torch.nn.functional import smooth_l1_loss

from sparse_tickets import run_sweep
from sparse_tickets.algos import bc, dqn, ppo, sac
from sparse_tickets.algos.bc import BC
from sparse_tickets.algos.evaluation import Evaluation
from sparse_tickets.algos.ppo import PPO
from sparse_tickets.analysis.report import report
from sparse_tickets.analysis.verify import verify
from sparse_tickets.dynamic import METHODS, Pruning
from sparse_tickets.envs import env_spec, make_env
from sparse_tickets.kernels.arena import Arena
from sparse_tickets.kernels.mlp import mlp
from sparse_tickets.kernels.ppo.reference import loss
from sparse_tickets.kernels.random import Stream, integers
from sparse_tickets.linear import count_kept
from sparse_tickets.population import Population, initialise, policy_arena
from sparse_tickets.sweep.spec import Sweep
from sparse_tickets.sweep.store import Store, load_results

BUDGET = PPO(steps=512, copies=2, horizon=16, epochs=2, minibatches=2)
BRIEF = Evaluation(points=4, episodes=2, final_episodes=2)
ARENA = Arena.build((4, 12, 10, 2), (4, 12, 10, 1))
STUDENT = Arena.build((4, 12, 10, 2))
SQUASHED = policy_arena(env_spec("Pendulum-v1"), (12, 10), squashed=True, prune_critic=True)
ARENAS = {"ppo": ARENA, "sac": SQUASHED}
DEEP_Q = dqn.DQN(steps=512, copies=2, horizon=16, updates=4, minibatch=8, warmup=60, double=True)
SOFT = sac.SAC(steps=512, copies=2, horizon=16, updates=4, minibatch=8, warmup=60)
KEY = torch.tensor([5, -6, 7])
METHOD = {name: replace(method, every=12) for name, method in METHODS.items()}


def population(arena, tickets=3):
    return Population.create(arena, initialise(arena, KEY[:tickets]))


def demonstrations():
    generator = torch.Generator().manual_seed(0)
    obs = torch.randn(2, 64, 4, generator=generator)
    target = torch.randn(2, 64, 2, generator=generator).log_softmax(-1)
    return bc.Dataset(obs, target), torch.tensor([1, 0, 1])


def train(algo, method, on_iteration=None, tickets=3):
    some = population(ARENAS.get(algo, STUDENT), tickets)
    schedule = {
        "evaluation": BRIEF,
        "on_iteration": None if on_iteration is None else partial(on_iteration, some),
        "pruning": Pruning(method, 0.2),
    }
    if algo == "ppo":
        return some, ppo.train(BUDGET, "CartPole-v1", some, KEY[:tickets], **schedule)
    if algo == "sac":
        return some, sac.train(SOFT, "Pendulum-v1", some, KEY[:tickets], **schedule)
    if algo == "dqn":
        return some, dqn.train(DEEP_Q, "CartPole-v1", some, KEY[:tickets], **schedule)
    dataset, assignment = demonstrations()
    taught = dataset, assignment[:tickets]
    return some, bc.train(BUDGET, "CartPole-v1", some, KEY[:tickets], *taught, **schedule)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("algo", ["ppo", "dqn", "sac", "bc"])
def test_every_ticket_keeps_exactly_its_count_at_every_moment(algo, name):
    seen, masks = [], []

    def look(some, steps):
        parameters, size = some.parameters, some.arena.prunable
        kept = parameters.mask.sum(1)
        assert (kept == count_kept(some.density, size)).all()
        for rows in (parameters.weight, parameters.m, parameters.v):
            assert not rows[:, :size][~parameters.mask].any()
        seen.append(int(kept[0]))
        masks.append(parameters.mask.clone())

    some, result = train(algo, METHOD[name], look)
    size = some.arena.prunable
    assert seen[-1] == count_kept(0.2, size)
    changes = sum(not torch.equal(a, b) for a, b in pairwise(masks))
    if name == "gradual":
        assert seen == sorted(seen, reverse=True)
        assert seen[0] == size
        assert len(set(seen)) > 2
    elif name in ("set", "rigl"):
        assert len(set(seen)) == 1
        assert changes >= 2
    elif name in ("static", "static-uniform"):
        assert changes == 0
    if name not in ("gradual", "snip", "one-shot"):
        # What is judged before training is what training begins with.
        assert (result.initial[:, :size] != 0).sum(1).tolist() == [seen[0]] * 3
    for rows in (result.final, result.best):
        assert not rows[:, :size][~some.parameters.mask].any()
    assert result.diverged == (None,) * 3
    assert not torch.equal(some.parameters.mask[0], some.parameters.mask[1])


@pytest.mark.parametrize("name", ["gradual", "set", "rigl"])
@pytest.mark.parametrize("algo", ["ppo", "dqn", "sac", "bc"])
def test_a_ticket_trains_alone_as_beside_others(algo, name):
    together, alone = train(algo, METHOD[name]), train(algo, METHOD[name], tickets=1)
    assert torch.equal(together[0].parameters.mask[:1], alone[0].parameters.mask)
    assert torch.equal(together[1].final[:1], alone[1].final)
    assert torch.equal(together[1].curve[:1], alone[1].curve)


@pytest.mark.parametrize("name", ["gradual", "rigl"])
@pytest.mark.parametrize("algo", ["ppo", "dqn", "sac", "bc"])
def test_a_ticket_that_diverges_ends_alone(algo, name):
    def spoil(some, steps):
        some.parameters.weight[2] = torch.nan

    some, result = train(algo, METHOD[name], spoil)
    _, alone = train(algo, METHOD[name], tickets=1)
    assert result.diverged[:2] == (None, None)
    assert result.diverged[2] is not None
    assert (some.parameters.mask.sum(1) == count_kept(0.2, some.arena.prunable)).all()
    assert torch.equal(result.final[:1], alone.final)


def test_the_dense_gradient_is_that_of_the_loss_by_pruned_weights_too():
    some = population(ARENA)
    some.parameters.mask[:, ::3] = False
    some.parameters.weight[:, : ARENA.prunable][~some.parameters.mask] = 0.0
    env = make_env("CartPole-v1", 3, BUDGET.copies)
    iterate = ppo.Iteration(BUDGET, env, some, KEY, 0)
    with pytest.raises(RuntimeError, match="must be run before it has samples"):
        iterate.dense_gradient()
    iterate.learning_rate.fill_(1e-3)
    iterate()
    found = iterate.dense_gradient()
    assert found.shape == (3, ARENA.prunable)
    assert not found.requires_grad
    batch = type(iterate.samples)(
        *(each.double() if each.is_floating_point() else each for each in iterate.samples)
    )
    weight, every = some.parameters.weight.double(), torch.ones_like(some.parameters.mask)
    pruned = (~some.parameters.mask[0]).nonzero().flatten()
    for place in (pruned[0], pruned[7], pruned[-1], torch.tensor(1)):
        step = torch.zeros_like(weight)
        step[:, place] = 1e-6
        up, down = (
            loss(weight + sign * step, every, ARENA, batch, BUDGET.config())[0] for sign in (1, -1)
        )
        torch.testing.assert_close(
            found[:, place].double(), (up - down) / 2e-6, rtol=1e-3, atol=1e-5
        )


def test_the_gradient_of_cloning_is_of_the_last_minibatch_and_more():
    some, (dataset, assignment) = population(STUDENT), demonstrations()
    iterate = bc.Iteration(BUDGET, some, KEY, dataset, assignment, 0)
    iterate.learning_rate.fill_(1e-3)
    iterate()
    found = iterate.dense_gradient()
    assert found.shape == (3, STUDENT.prunable)
    assert (found.abs().sum(1) > 0).all()
    assert torch.equal(found, iterate.dense_gradient())


def test_dqn_prunes_its_target_too_and_counts_its_updates_alone(monkeypatch):
    update, seen = dqn.dqn_update_, []

    def look(parameters, arena, target, *rest, **options):
        assert not target[:, : arena.prunable][~parameters.mask].any()
        seen.append(int(parameters.mask[0].sum()))
        return update(parameters, arena, target, *rest, **options)

    monkeypatch.setattr(dqn, "dqn_update_", look)
    some = population(STUDENT)
    settings, half = replace(DEEP_Q, target_interval=10_000), Pruning("one-shot", 0.2)
    assert settings.waiting == 1
    dqn.train(settings, "CartPole-v1", some, KEY, evaluation=BRIEF, pruning=half)
    # Of 60 updates, four to a call, the thirtieth is in the eighth call.
    assert seen == [STUDENT.prunable] * 8 + [count_kept(0.2, STUDENT.prunable)] * 7
    never = replace(DEEP_Q, warmup=500, steps=480)
    with pytest.raises(ValueError, match=r"after 480 steps: dqn\.steps must be more, got 480"):
        dqn.train(never, "CartPole-v1", some, KEY, evaluation=BRIEF, pruning=half)


def test_the_gradient_of_dqn_is_of_what_its_last_updates_drew():
    some, env = population(STUDENT), make_env("CartPole-v1", 3, DEEP_Q.copies)
    some.parameters.mask[:, ::3] = False
    some.parameters.weight[:, : STUDENT.prunable][~some.parameters.mask] = 0.0
    iterate = dqn.Iteration(replace(DEEP_Q, double=False), env, some, KEY, 0)
    iterate.learning_rate.fill_(1e-3)
    for _ in range(4):
        iterate()
    found = iterate.dense_gradient()
    buffer, network = iterate.buffer, STUDENT.actor
    drawn = torch.stack(
        [integers(KEY, 8, buffer.stored, stream=Stream.MINIBATCH, step=u) for u in range(12, 16)], 1
    ).flatten(1)
    ticket = torch.arange(3)[:, None]
    obs, action, reward, discount, after = (field[ticket, drawn] for field in buffer.transitions)
    wanted = reward + discount * mlp(after, iterate._target, network).max(-1).values
    weight = some.parameters.weight.clone().requires_grad_()
    value = mlp(obs, weight, network).gather(-1, action[..., None]).squeeze(-1)
    smooth_l1_loss(value, wanted, reduction="none").mean(1).sum().backward()
    torch.testing.assert_close(found, weight.grad[:, : STUDENT.prunable], rtol=1e-4, atol=1e-6)
    assert found[~some.parameters.mask].any()


SPEC = Sweep(
    during="set",
    during_every=8,
    seeds=3,
    levels=3,
    rate=0.5,
    hidden=(8, 8),
    chunk=3,
    ppo=replace(BUDGET, steps=256),
    bc=BC(experts=1, expert_gate=0.0),
    evaluation=BRIEF,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("during") / "run"
    run_sweep(SPEC, out)
    return out


def test_a_sweep_trains_each_seed_to_each_density(finished):
    frame = load_results(finished)
    assert len(frame) == 2 * 3 * 3
    assert set(frame.filter(level=0)["condition"]) == {"dense"}
    pruned = frame.filter(frame["level"] > 0)
    assert set(pruned["condition"]) == {"set"}
    assert pruned["mask_iou"].is_null().all()
    store = Store(finished)
    for unit in store.units():
        for ticket in store.read_tickets(unit):
            assert int(ticket.mask.sum()) == SPEC.kept(unit.algo, unit.level)
    dense, sparse = (
        store.read_tickets(unit)[0]
        for unit in store.units()
        if unit.algo == "ppo" and unit.level < 2
    )
    # What the seed began with, where it began with anything.
    begun = sparse.rewind[: len(sparse.mask)] != 0
    assert begun.any()
    assert torch.equal(dense.initial[: len(begun)][begun], sparse.rewind[: len(begun)][begun])


def test_chunks_change_nothing(finished, tmp_path):
    # chunk is part of what is run, not of what comes out.
    run_sweep(replace(SPEC, chunk=1), tmp_path / "run")
    times = ("wall_s", "train_s")
    assert load_results(tmp_path / "run").drop(times).equals(load_results(finished).drop(times))


@pytest.mark.parametrize("algo", ["ppo", "sac"])
def test_a_sweep_prunes_critics_by_a_method_of_their_own(algo, tmp_path):
    apart = replace(
        SPEC,
        env="CartPole-v1" if algo == "ppo" else "Pendulum-v1",
        algos=(algo,),
        during="static",
        during_critic="set",
        prune_critic=True,
        seeds=2,
        levels=2,
        sac=sac.SAC(steps=96, copies=2, horizon=8, updates=6, minibatch=8, warmup=16),
    )
    assert Sweep.from_dict(apart.to_dict()).during_critic == "set"
    run_sweep(apart, tmp_path)
    store, arena = Store(tmp_path), apart.arena(algo)
    inner = sum(out * inp for _, out, inp in arena.prunable_layers()[: arena.actor.depth])
    (unit,) = (unit for unit in store.units() if unit.level == 1)
    for ticket in store.read_tickets(unit):
        begun = ticket.rewind[: arena.prunable] != 0
        assert int(ticket.mask.sum()) == apart.kept(algo, 1)
        assert int(ticket.mask[:inner].sum()) == count_kept(0.5, inner)
        assert torch.equal(ticket.mask[:inner], begun[:inner]), "the actor's is static"
        assert not torch.equal(ticket.mask[inner:], begun[inner:]), "the critic's is not"


@pytest.mark.long
def test_verify_and_report_know_such_runs(finished):
    _, agree = verify(finished, 4, Console(quiet=True))
    assert agree
    tables, files = report(finished, ())
    assert tables
    assert files


def test_specifications():
    assert "during" not in Sweep().to_dict()
    assert Sweep.from_dict(Sweep().to_dict()) == Sweep()
    stored = SPEC.to_dict()
    assert (stored["during"], stored["during_every"]) == ("set", 8)
    assert Sweep.from_dict(stored) == SPEC
    assert SPEC.pruning("ppo", 0) is None
    assert SPEC.pruning("ppo", 1).method == replace(METHODS["set"], every=8)
    with pytest.raises(ValueError, match="during must be one of none, gradual"):
        Sweep(during="sometimes")
    with pytest.raises(ValueError, match="rewind_step must be 0 where networks are pruned during"):
        Sweep(during="set", rewind_step=512)
    with pytest.raises(ValueError, match="during_every must be at least 1"):
        Sweep(during="set", during_every=0)
    with pytest.raises(ValueError, match="during_critic must be one of None, gradual"):
        Sweep(during="set", during_critic="rigel", prune_critic=True)
    for options in ({"during": "set"}, {"prune_critic": True}):
        with pytest.raises(ValueError, match="during_critic must be None unless prune_critic is"):
            Sweep(during_critic="set", **options)
    with pytest.raises(ValueError, match="no algorithm has a critic, got it for dqn, bc"):
        Sweep(prune_critic=True, algos=("dqn", "bc"))
