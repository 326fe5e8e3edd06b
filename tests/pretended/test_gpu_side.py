"""What Python does with a GPU, on a pretended one; `tests/test_pretended.py` runs this file."""

from __future__ import annotations

import pytest
import torch
from replays import check_actions, check_dqn, check_draws, check_sac

from sparse_tickets import SparseLinear
from sparse_tickets.algos import bc, loop, ppo
from sparse_tickets.algos.evaluation import Evaluation
from sparse_tickets.conditions import CONDITIONS
from sparse_tickets.envs import env_spec
from sparse_tickets.imp import Trained, next_population
from sparse_tickets.kernels import Arena
from sparse_tickets.kernels.linear import block_pattern, linear, linear_blocked
from sparse_tickets.kernels.mlp import mlp
from sparse_tickets.kernels.update import gpu
from sparse_tickets.population import Population, initialise, policy_arena
from sparse_tickets.sweep.run import run
from sparse_tickets.sweep.spec import Sweep
from sparse_tickets.sweep.store import load_results

SETTINGS = ppo.PPO(copies=2, horizon=4, steps=24, epochs=2, minibatches=2)


@pytest.fixture
def no_episodes(monkeypatch):
    """No returns are measured: whole episodes in the interpreter take long."""

    class NoEvaluator:
        def __init__(self, *_) -> None:
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_) -> None:
            pass

        before = after = note = result = lambda self, *_: None

    monkeypatch.setattr(loop, "Evaluator", NoEvaluator)


def test_devices_do_not_mix():
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    assert (there + 1).device.type == "cuda"
    assert torch.equal((2 * there).cpu(), 2 * here)
    with pytest.raises(RuntimeError, match="same device"):
        here + there
    rows, rate = torch.ones(1, 4, device="cuda"), torch.ones(1, device="cuda")
    step, numbers = torch.zeros(1, dtype=torch.int64, device="cuda"), (0.5, 0.9, 0.999, 1e-8)
    with pytest.raises(RuntimeError, match="a pointer to the host's memory"):
        gpu.adam_(rows, torch.ones(1, 4), rows.clone(), rows.clone(), step, rate, None, *numbers)


def test_a_capture_computes_nothing_and_replays_what_it_saw():
    total, graph = torch.zeros(3, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        twice = total * 2
        total += 1
    assert total.tolist() == [0, 0, 0]
    graph.replay()
    graph.replay()
    assert total.tolist() == [2, 2, 2]
    assert twice.tolist() == [2, 2, 2]
    with pytest.raises(RuntimeError, match="waits for"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        total.sum().item()


@pytest.mark.parametrize("check", [check_draws, check_actions, check_dqn, check_sac])
def test_every_replay_draws_fresh_numbers(check):
    check("cuda")


def population(device: str, continuous: bool) -> Population:
    arena = policy_arena(env_spec("Pendulum-v1" if continuous else "CartPole-v1"), hidden=(8,))
    key = torch.tensor([11, 12, 13])
    mask = torch.rand(3, arena.prunable, generator=torch.Generator().manual_seed(1)) < 0.5
    weight = initialise(arena, key, "lecun")
    return Population.create(arena, weight.to(device), mask.to(device), 0.5)


def train(algo: str, device: str, continuous: bool) -> torch.Tensor:
    tickets = population(device, continuous)
    key = torch.tensor([1, 2, 3], device=device)
    name = "Pendulum-v1" if continuous else "CartPole-v1"
    if algo == "ppo":
        ppo.train(SETTINGS, name, tickets, key)
    else:
        generator = torch.Generator().manual_seed(2)
        sizes = tickets.arena.actor.sizes
        obs = torch.randn(2, 20, sizes[0], generator=generator)
        target = torch.randn(2, 20, 2, generator=generator).log_softmax(-1)
        dataset = bc.Dataset(obs.to(device), target.to(device))
        assignment = torch.tensor([0, 1, 0], device=device)
        bc.train(SETTINGS, name, tickets, key, dataset, assignment)
    return torch.cat([tickets.parameters.weight, tickets.parameters.m], 1).cpu()


@pytest.mark.usefixtures("no_episodes")
@pytest.mark.parametrize(
    ("algo", "continuous"),
    [
        ("ppo", True),
        ("bc", False),
        pytest.param("ppo", False, marks=pytest.mark.slow),
        pytest.param("bc", True, marks=pytest.mark.slow),
    ],
)
def test_training_is_captured_and_equals_the_cpu(algo, continuous, monkeypatch):
    replayed = train(algo, "cuda", continuous)
    monkeypatch.setenv("SPARSE_TICKETS_GRAPHS", "0")
    launched = train(algo, "cuda", continuous)
    assert torch.equal(replayed, launched)
    torch.testing.assert_close(replayed, train(algo, "cpu", continuous), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("late", [False, True])
def test_a_level_starts_as_on_the_cpu(late):
    names = tuple(CONDITIONS)
    arena = Arena.build((5, 7, 3), (5, 7, 1), prune_critic=True)
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    rows = Population.create(arena, draw(len(names), arena.size)).parameters
    if late:
        rows = rows._replace(m=draw(*rows.m.shape), v=draw(*rows.v.shape).abs(), step=rows.step + 7)
    trained = draw(len(names), arena.prunable)
    key = torch.arange(len(names))
    results = []
    for device in ("cpu", "cuda"):
        result = next_population(
            arena,
            names,
            Trained(trained.to(device), rows.mask.to(device)),
            type(rows)(*(field.to(device) for field in rows)),
            key.to(device),
            kept=20,
            density=0.5,
        )
        results.append([field.cpu() for field in result.parameters])
    for here, there in zip(*results, strict=True):
        assert torch.equal(here, there)


def test_a_layer_trains_as_on_the_cpu():
    generator = torch.Generator().manual_seed(4)
    mask = torch.rand(5, 6, generator=generator) < 0.4
    weight, x = torch.randn(5, 6, generator=generator), torch.randn(7, 6, generator=generator)
    results = []
    for device in ("cpu", "cuda"):
        layer = SparseLinear(6, 5, bias=False, device=device)
        with torch.no_grad():
            layer.weight.copy_(weight)
        layer.set_mask_(mask.to(device))
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            layer(x.to(device)).square().mean().backward()
            optimizer.step()
        results.append(layer.weight.detach().cpu())
    torch.testing.assert_close(*results)
    assert not results[1][~mask].any()


@pytest.mark.slow
def test_a_sweep_gives_the_table_of_the_cpu(tmp_path):
    spec = Sweep(
        algos=("ppo", "bc"),
        seeds=1,
        levels=2,
        hidden=(8,),
        ppo=ppo.PPO(steps=64, copies=2, horizon=16, epochs=1, minibatches=2),
        bc=bc.BC(experts=1, expert_gate=1.0),
        evaluation=Evaluation(points=1, episodes=1, final_episodes=1),
    )
    tables = []
    for device in ("cpu", "cuda"):
        run(spec, tmp_path / device, device=device)
        table = load_results(tmp_path / device)
        tables.append(table.drop([name for name in table.columns if name.endswith("_s")]))
    assert len(tables[0])
    assert tables[0].equals(tables[1])


@pytest.mark.parametrize("op", ["linear", "blocked", "mlp"])
def test_an_op_is_captured_forward_and_backward(op):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 9, 32, generator=generator).cuda().requires_grad_()
    arena = Arena.build((32, 32, 16))
    blocks = torch.tensor([[True, False], [True, True]]).repeat_interleave(16, 0)
    layer_mask = blocks.repeat_interleave(16, 1).expand(2, 32, 32).contiguous()
    mask = torch.ones(2, arena.prunable, dtype=torch.bool)
    mask[:, : 32 * 32] = layer_mask.flatten(1)
    weight = torch.randn(2, arena.size, generator=generator)
    weight[:, : arena.prunable] *= mask
    matrix = weight[:, : 32 * 32].unflatten(1, (32, 32)).contiguous().cuda().requires_grad_()
    weight, mask, layer_mask = weight.cuda().requires_grad_(), mask.cuda(), layer_mask.cuda()
    pattern = block_pattern(layer_mask, 16)

    def differentiate() -> tuple[torch.Tensor, ...]:
        if op == "mlp":
            y, leaf = mlp(x, weight, arena.actor, mask), weight
        elif op == "linear":
            y, leaf = linear(x, matrix, layer_mask, None, precision="ieee"), matrix
        else:
            y, leaf = linear_blocked(x, matrix, pattern, None, precision="ieee"), matrix
        return (y, *torch.autograd.grad(y.square().sum(), (x, leaf)))

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = differentiate()
    with torch.no_grad():
        x.mul_(0.5)
    graph.replay()
    for kept, fresh in zip(captured, differentiate(), strict=True):
        assert torch.equal(kept, fresh)
