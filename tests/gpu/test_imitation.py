"""Cloning on a GPU: against the reference there, without waiting, and captured."""

import pytest
import torch

from sparse_tickets.kernels.arena import Arena, Parameters
from sparse_tickets.kernels.dispatch import use_backend
from sparse_tickets.kernels.imitation import CloneConfig, clone_update_, plan

TICKETS, DATASETS, SAMPLES = 3, 2, 500
CONFIG = CloneConfig(updates=4, batch=130, eps=1e-3)
KINDS = pytest.mark.parametrize("continuous", [False, True], ids=["discrete", "continuous"])


class CloningProblem:
    """Tickets whose critic has moments, and what they learn from."""

    def __init__(self, device: torch.device, continuous: bool) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device)

        self.arena = Arena.build((4, 64, 64, 3), (4, 64, 64, 1), continuous=continuous)
        weight, m = 0.2 * draw(TICKETS, self.arena.size), 0.01 * draw(TICKETS, self.arena.size)
        mask = draw(TICKETS, self.arena.prunable) > 0
        for row in (weight, m):
            row[:, : self.arena.prunable] *= mask
        step = torch.arange(TICKETS, device=device)
        self.start = Parameters(weight, mask, m, m.square(), step)
        target = draw(DATASETS, SAMPLES, 6) if continuous else draw(DATASETS, SAMPLES, 3)
        self.data = (
            draw(DATASETS, SAMPLES, 4),
            target if continuous else target.log_softmax(-1),
            torch.arange(TICKETS, device=device) % DATASETS,
            torch.arange(TICKETS, device=device) - 1,
        )
        self.rate = torch.full((TICKETS,), 1e-2, device=device)

    def copy(self, dtype: torch.dtype = torch.float32) -> Parameters:
        """The tickets as they begin."""
        return Parameters(
            *(f.to(dtype, copy=True) if f.is_floating_point() else f.clone() for f in self.start)
        )

    def update(self, parameters: Parameters, first_update: int | torch.Tensor) -> torch.Tensor:
        """The loss of four updates, and the gradient's norm."""
        dtype = parameters.weight.dtype
        data = (f.to(dtype) if f.is_floating_point() else f for f in self.data)
        stats = clone_update_(
            parameters, self.arena, *data, first_update, self.rate.to(dtype), CONFIG
        )
        return torch.stack(stats)


@KINDS
def test_updates_follow_the_reference(device, continuous):
    problem = CloningProblem(device, continuous)
    assert plan(problem.arena, device).backend == "triton"
    ours, theirs = problem.copy(), problem.copy(torch.float64)
    loss = problem.update(ours, 7)
    with use_backend("reference"):
        expected = problem.update(theirs, 7)
    torch.testing.assert_close(loss.double(), expected, rtol=3e-5, atol=3e-5)
    for name in ("weight", "m", "v"):
        one, other = getattr(ours, name).double(), getattr(theirs, name)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=3e-5)
        for of_critic, before in zip(
            problem.arena.critic.layers(getattr(ours, name)),
            problem.arena.critic.layers(getattr(problem.start, name)),
            strict=True,
        ):
            assert all(torch.equal(a, b) for a, b in zip(of_critic, before, strict=True))


@KINDS
def test_updates_do_not_wait(device, continuous, no_waiting):
    torch.cuda.set_sync_debug_mode("default")
    problem = CloningProblem(device, continuous)
    parameters, counter = problem.copy(), torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(2):
        problem.update(parameters, counter)
        problem.update(parameters, 4)
        torch.cuda.set_sync_debug_mode("error")


@KINDS
def test_a_graph_counts_on(device, continuous):
    problem = CloningProblem(device, continuous)
    parameters, counter = problem.copy(), torch.zeros((), dtype=torch.int64, device=device)

    def step() -> None:
        problem.update(parameters, counter)
        counter.add_(CONFIG.updates)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(2):
        graph.replay()
    expected = problem.copy()
    for iteration in range(3):
        problem.update(expected, iteration * CONFIG.updates)
    for one, other in zip(parameters, expected, strict=True):
        assert torch.equal(one, other)
