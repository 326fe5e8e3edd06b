"""Programs that change torch's default dtype or device: no result depends on either."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import polars as pl
import pytest
import torch
from rich.console import Console
from sparse_layers import sparse_layers
from torch import nn

from sparse_tickets import (
    Sweep,
    Ticket,
    compact,
    densify_,
    load_results,
    run_sweep,
    sparsify_,
)
from sparse_tickets.algos.bc import BC
from sparse_tickets.algos.evaluation import Evaluation
from sparse_tickets.algos.ppo import PPO
from sparse_tickets.analysis.verify import verify
from sparse_tickets.export import export_ticket
from sparse_tickets.kernels.dispatch import use_backend
from sparse_tickets.ticket import load_tickets

SPEC = Sweep(
    conditions=("mask/weights", "mask/permuted", "permuted/permuted", "random/re-init"),
    controls=("own",),
    seeds=1,
    levels=2,
    hidden=(8, 8),
    rewind_step=128,
    ppo=PPO(steps=256, horizon=32),
    bc=BC(experts=1, expert_gate=0.0),
    evaluation=Evaluation(points=2, episodes=2, final_episodes=2),
)


@contextmanager
def defaults(dtype: torch.dtype, device: str = "cpu") -> Iterator[None]:
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


ANY_DEFAULT = pytest.mark.parametrize(
    "default",
    [(torch.float64, "cpu"), (torch.bfloat16, "cpu"), (torch.float32, "meta")],
    ids=["float64", "bfloat16", "meta"],
)


def table(spec: Sweep, out: Path) -> pl.DataFrame:
    run_sweep(spec, out)
    return load_results(out).drop("wall_s", "train_s")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    run_sweep(SPEC, out)
    return out


@ANY_DEFAULT
def test_a_sweep_has_the_same_table(
    default: tuple[torch.dtype, str], finished: Path, tmp_path: Path
) -> None:
    with defaults(*default):
        found = table(SPEC, tmp_path)
    assert found.equals(load_results(finished).drop("wall_s", "train_s"))


@pytest.mark.slow
@ANY_DEFAULT
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("env", ["Pendulum-v1", "gymnasium:CartPole-v1", "Acrobot-v1"])
def test_other_sweeps_have_the_same_tables(
    env: str, backend: str, default: tuple[torch.dtype, str], tmp_path: Path
) -> None:
    spec = replace(SPEC, env=env, bc=BC(experts=1, expert_gate=-1e6))
    with use_backend(backend):
        expected = table(spec, tmp_path / "expected")
        with defaults(*default):
            assert table(spec, tmp_path / "found").equals(expected)


@ANY_DEFAULT
def test_what_a_ticket_computes_and_exports(
    default: tuple[torch.dtype, str], finished: Path, tmp_path: Path
) -> None:
    (ticket, *_) = load_tickets(next(finished.rglob("*.safetensors")))
    x = torch.randn(3, 4)
    expected = ticket.to_sequential()(x)
    with defaults(*default):
        ticket.save(tmp_path / "ticket.safetensors")
        ticket = Ticket.load(tmp_path / "ticket.safetensors")
        assert torch.equal(ticket.to_sequential()(x), expected)
        for suffix in (".pt", ".safetensors", *([".onnx"] if find_spec("onnxscript") else [])):
            export_ticket(ticket, (tmp_path / "ticket").with_suffix(suffix))
    exported = torch.load(tmp_path / "ticket.pt", weights_only=True)
    assert {exported[name].dtype for name in ("offset", "scale", "0.weight")} == {torch.float32}


@pytest.mark.long
@ANY_DEFAULT
def test_verification(default: tuple[torch.dtype, str], finished: Path) -> None:
    with defaults(*default):
        _, holds = verify(finished, 2, Console(quiet=True))
    assert holds


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_layers_have_the_default_dtype(dtype: torch.dtype) -> None:
    with defaults(dtype):
        net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        sparsify_(net, 0.5)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            net(torch.randn(5, 8)).square().mean().backward()
            optimizer.step()
        assert all(parameter.dtype == dtype for parameter in net.parameters())
        assert all((layer.weight[~layer.mask] == 0).all() for layer in sparse_layers(net))
        x = torch.randn(3, 8)
        close = dict.fromkeys(("rtol", "atol"), 4 * torch.finfo(dtype).eps)
        torch.testing.assert_close(compact(net)(x), net(x), **close)
        torch.testing.assert_close(densify_(net)(x), net(x), **close)
