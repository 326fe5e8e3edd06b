"""DQN's and SAC's updates on a GPU: against the reference there, and without waiting."""

import pytest
import torch

from sparse_tickets.kernels import dqn, sac
from sparse_tickets.kernels.arena import Arena, Parameters
from sparse_tickets.kernels.dispatch import use_backend
from sparse_tickets.kernels.transitions import Transitions

TICKETS, STORED, FEATURES, ACTIONS = 3, 500, 5, 2
KINDS = pytest.mark.parametrize(
    ("algo", "width"), [("dqn", 64), ("dqn", 128), ("sac", 64), ("sac", 128)]
)


class OffPolicyProblem:
    """Tickets in the middle of their training, and what they remember."""

    def __init__(self, device: torch.device, algo: str, width: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device)

        hidden, shape = (width, width), (TICKETS, STORED)
        if algo == "dqn":
            self.op, update = dqn, dqn.dqn_update_
            self.config = dqn.DQNConfig(4, 130, double=True, loss="squared", eps=1e-3)
            self.arena = Arena.build((FEATURES, *hidden, ACTIONS), activation="relu")
            action = torch.randint(0, ACTIONS, shape, generator=generator).to(device)
        else:
            self.op, update = sac, sac.sac_update_
            self.config = sac.SACConfig(4, 130, -2.0, tau=0.1, eps=1e-3)
            self.arena = Arena.build(
                (FEATURES, *hidden, 2 * ACTIONS),
                (FEATURES + ACTIONS, *hidden, 1),
                activation="relu",
                squashed=True,
            )
            action = draw(*shape, ACTIONS).tanh()
        self.update_ = update
        weight, target, m = (0.1 * draw(TICKETS, self.arena.size) for _ in range(3))
        mask = draw(TICKETS, self.arena.prunable) > 0
        for row in (weight, target, m):
            row[:, : self.arena.prunable] *= mask
        step = torch.arange(TICKETS, device=device)
        self.start, self.target = Parameters(weight, mask, m, m.square(), step), target
        ended = draw(*shape) > 1
        # What a terminated episode ended with is nobody's business.
        following = draw(*shape, FEATURES).where(~ended[..., None], torch.nan)
        discount = torch.where(ended, 0.0, 0.9)
        self.replay = Transitions(draw(*shape, FEATURES), action, draw(*shape), discount, following)
        self.key = torch.arange(TICKETS, device=device) - 1
        self.rate = torch.full((TICKETS,), 1e-3, device=device)

    def copy(self, dtype: torch.dtype = torch.float32) -> tuple[Parameters, torch.Tensor]:
        """The tickets as they begin, and their targets."""
        return Parameters(*_copied(self.start, dtype)), self.target.to(dtype, copy=True)

    def update(
        self, parameters: Parameters, target: torch.Tensor, first: int | torch.Tensor
    ) -> torch.Tensor:
        """What four updates measured, ``[., P]``."""
        dtype = parameters.weight.dtype
        replay = Transitions(*_copied(self.replay, dtype))
        return torch.stack(
            self.update_(
                parameters,
                self.arena,
                target,
                replay,
                STORED,
                self.key,
                first,
                self.rate.to(dtype),
                self.config,
            )
        )


def _copied(tensors: tuple[torch.Tensor, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    return [t.to(dtype, copy=True) if t.is_floating_point() else t.clone() for t in tensors]


@KINDS
def test_updates_follow_the_reference(device, algo, width):
    problem = OffPolicyProblem(device, algo, width)
    assert problem.op.plan(problem.arena, device).backend == "triton"
    (ours, target), (theirs, expected_target) = problem.copy(), problem.copy(torch.float64)
    statistics = problem.update(ours, target, 7)
    with use_backend("reference"):
        expected = problem.update(theirs, expected_target, 7)
    near = {"rtol": 1e-4, "atol": 3e-5}
    torch.testing.assert_close(statistics.double(), expected, **near)
    for name in ("weight", "m", "v"):
        one, other = getattr(ours, name).double(), getattr(theirs, name)
        torch.testing.assert_close(one, other, **near)
        assert (getattr(ours, name)[:, : problem.arena.prunable][~ours.mask] == 0).all()
    assert torch.equal(ours.step, theirs.step)
    torch.testing.assert_close(target.double(), expected_target, **near)


@KINDS
def test_updates_do_not_wait(device, algo, width, no_waiting):
    torch.cuda.set_sync_debug_mode("default")
    problem = OffPolicyProblem(device, algo, width)
    tickets, counter = problem.copy(), torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(2):
        problem.update(*tickets, counter)
        problem.update(*tickets, 4)
        torch.cuda.set_sync_debug_mode("error")
