"""DQN on Triton, in the interpreter: its head against autograd, updates against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_tickets.kernels import transitions
from sparse_tickets.kernels.activations import KNOWN
from sparse_tickets.kernels.arena import Arena, Parameters
from sparse_tickets.kernels.dispatch import use_backend
from sparse_tickets.kernels.dqn import DQNConfig, DQNStats, dqn_update_, plan
from sparse_tickets.kernels.dqn.reference import LOSSES
from sparse_tickets.kernels.transitions import Transitions

pytest.importorskip("triton")

from sparse_tickets.kernels.dqn.head_gpu import head
from sparse_tickets.kernels.training import fused_gpu
from sparse_tickets.kernels.training.head_gpu import Minibatch
from sparse_tickets.kernels.training.loss_gpu import Outputs, loss_and_gradient

pytestmark = pytest.mark.usefixtures("tensors_on_a_gpu")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = torch.finfo(torch.float32).eps
CAPACITY, STORED = 50, 37
KINDS = pytest.mark.parametrize("loss", list(LOSSES))


def _generator() -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(0)


@KINDS
@pytest.mark.parametrize(("batch", "actions"), [(6, 3), (1, 1), (35, 5), (300, 2)])
def test_loss_and_gradient(loss: str, batch: int, actions: int) -> None:
    tickets, samples, generator = 3, batch + 7, _generator()
    # Errors on both sides of Huber's threshold.
    output = 2 * torch.randn(tickets, batch, actions, generator=generator).double()
    wanted = torch.randn(tickets, samples, generator=generator).double()
    action = torch.randint(0, actions, (tickets, samples), generator=generator)
    index = torch.stack([torch.randperm(samples, generator=generator) for _ in range(tickets)])

    leaf = output.clone().requires_grad_()
    chosen = index[:, 7:]
    value = leaf.gather(-1, action.gather(1, chosen)[..., None]).squeeze(-1)
    total = LOSSES[loss](value, wanted.gather(1, chosen), reduction="none")
    (expected,) = torch.autograd.grad(total.mean(1).sum(), leaf)

    written = torch.full_like(output, torch.nan).float()
    sums = torch.full((tickets, 2), torch.nan)
    outputs = Outputs((output.float(),), None, (written,), None)
    minibatch = Minibatch(index, 7, batch, samples)
    loss_and_gradient(head(loss, action, wanted.float()), minibatch, sums, outputs)
    scale = float(expected.abs().max())
    torch.testing.assert_close(written.double(), expected, rtol=0, atol=8 * EPS * scale)
    measured = torch.stack([total.sum(1), value.sum(1)], 1).detach()
    torch.testing.assert_close(sums.double(), measured, rtol=1e-5, atol=1e-5 * batch)


# The interpreter is NumPy, which warns of NaN.
@pytest.mark.filterwarnings("ignore:invalid value")
@KINDS
def test_a_ticket_that_diverged_stays_nan_and_spares_the_others(loss: str) -> None:
    output, written = torch.zeros(2, 8, 3), torch.zeros(2, 8, 3)
    output[0] = torch.nan
    action, sums = torch.ones(2, 8, dtype=torch.int64), torch.zeros(2, 2)
    index = torch.arange(8).expand(2, 8).contiguous()
    outputs = Outputs((output,), None, (written,), None)
    loss_and_gradient(
        head(loss, action, torch.zeros(2, 8)), Minibatch(index, 0, 8, 8), sums, outputs
    )
    assert sums.isnan().all(1).tolist() == [True, False]
    assert bool(written[0, :, 1].isnan().all())
    assert bool(written[1].isfinite().all())


@pytest.mark.filterwarnings("ignore:invalid value")
@KINDS
@pytest.mark.parametrize("action", [-1, 3])
def test_an_action_that_is_none_makes_its_ticket_nan(loss: str, action: int) -> None:
    """On a GPU nobody looks whether it is one: that has to be seen."""
    output, written = torch.ones(2, 8, 3), torch.zeros(2, 8, 3)
    taken, sums = torch.ones(2, 8, dtype=torch.int64), torch.zeros(2, 2)
    taken[0, 5] = action
    index = torch.arange(8).expand(2, 8).contiguous()
    outputs = Outputs((output,), None, (written,), None)
    values = head(loss, taken, torch.zeros(2, 8))
    loss_and_gradient(values, Minibatch(index, 0, 8, 8), sums, outputs)
    assert sums.isnan().all(1).tolist() == [True, False]
    assert bool(written[0, 5].isnan().all())
    assert bool(written[0, :5].isfinite().all())
    assert bool(written[1].isfinite().all())


ARENAS = {
    "narrow": Arena.build((5, 9, 7, 3), activation="relu"),
    "no hidden layer": Arena.build((5, 2)),
    "width 64": Arena.build((5, 64, 33, 4), activation="relu"),
    "many outputs": Arena.build((5, 8, 33)),
    "wide": Arena.build((5, 70, 3), activation="relu"),
    "deep": Arena.build((5, 40, 9, 9, 3)),
    "gelu": Arena.build((5, 9, 3), activation="gelu"),
}
APART = ("wide", "deep", "gelu")
"""Those with launches of their own for the network and the loss."""


def _update(
    backend: str, arena: Arena, config: DQNConfig, tickets: slice = slice(3)
) -> tuple[Parameters, DQNStats]:
    """Of three tickets' parameters with moments, some; float64 on the reference backend."""
    generator = _generator()

    def normal(*shape: int) -> torch.Tensor:
        # Exact in float32, so that both precisions begin at the same numbers.
        return torch.randn(shape, generator=generator).double()

    mask = torch.rand(3, arena.prunable, generator=generator) < 0.4
    mask[2] = False
    weight, target, m = (0.4 * normal(3, arena.size) for _ in range(3))
    for row in (weight, target, m):
        row[:, : arena.prunable] *= mask
    ended = torch.rand(3, CAPACITY, generator=generator) < 0.2
    action = torch.randint(0, arena.actor.sizes[-1], ended.shape, generator=generator)
    features = arena.actor.sizes[0]
    replay = Transitions(
        normal(*ended.shape, features),
        action,
        2 * normal(*ended.shape),
        torch.where(ended, 0.0, 0.9).double(),
        # What a terminated episode ended with is nobody's business.
        normal(*ended.shape, features).where(~ended[..., None], torch.nan),
    )
    dtype = torch.float64 if backend == "reference" else torch.float32

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor[tickets].clone()
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    rows = (weight, mask, m, m.square().float().double(), torch.tensor([0, 4, 9]))
    parameters = Parameters(*map(cast, rows))
    data = cast(target), Transitions(*map(cast, replay)), STORED
    key = torch.tensor([5, -(2**62), 2**40 + 3])[tickets]
    rate = torch.full((len(key),), 1e-2, dtype=dtype)
    with use_backend(backend):
        stats = dqn_update_(parameters, arena, *data, key, 3, rate, config)
    return parameters, stats


def _check(arena: Arena, config: DQNConfig, tickets: slice = slice(3)) -> None:
    """Triton gives what the reference gives."""
    ours, stats = _update("triton", arena, config, tickets)
    theirs, expected = _update("reference", arena, config, tickets)
    for name in ("weight", "m", "v"):
        torch.testing.assert_close(
            getattr(ours, name).double(), getattr(theirs, name), rtol=1e-4, atol=1e-5
        )
        pruned = getattr(ours, name)[:, : arena.prunable][~ours.mask]
        assert bool((pruned == 0).all())
    torch.testing.assert_close(
        torch.stack(stats).double(), torch.stack(expected), rtol=1e-4, atol=1e-5
    )
    assert torch.equal(ours.step, theirs.step)


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("name", ARENAS)
def test_updates_agree_with_the_reference(name: str, double: bool) -> None:
    arena = ARENAS[name]
    assert fused_gpu.fits((arena.actor,)) == (name not in APART)
    loss = "squared" if double else "huber"
    _check(arena, DQNConfig(updates=3, batch=11, double=double, loss=loss, eps=1e-3))


@pytest.mark.parametrize("batch", [1, 133])
def test_minibatches_of_one_and_of_several_stretches(batch: int, poisoned_memory: None) -> None:
    _check(ARENAS["narrow"], DQNConfig(updates=1, batch=batch, max_norm=None, eps=1e-3))


def test_many_updates_are_drawn_in_parts(monkeypatch) -> None:
    config = DQNConfig(updates=5, batch=6, double=True)
    at_once, stats = _update("triton", ARENAS["narrow"], config)
    monkeypatch.setattr(transitions, "MOST_SAMPLES", 13)
    in_parts, same_stats = _update("triton", ARENAS["narrow"], config)
    assert torch.equal(at_once.weight, in_parts.weight)
    assert torch.equal(torch.stack(stats), torch.stack(same_stats))


@settings(deadline=None, max_examples=6, derandomize=True)
@given(
    hidden=st.lists(st.integers(1, 20), max_size=2),
    ends=st.tuples(st.integers(1, 20), st.integers(1, 9)),
    tickets=st.integers(0, 3),
    batch=st.integers(1, 20),
    double=st.booleans(),
    loss=st.sampled_from(list(LOSSES)),
    activation=st.sampled_from(KNOWN),
)
def test_any_network_and_minibatch(hidden, ends, tickets, batch, double, loss, activation) -> None:
    arena = Arena.build((ends[0], *hidden, ends[1]), activation=activation)
    config = DQNConfig(updates=2, batch=batch, double=double, loss=loss, eps=1e-3)
    _check(arena, config, slice(tickets))


def test_a_ticket_does_not_depend_on_its_batch_mates() -> None:
    config = DQNConfig(updates=2, batch=9, double=True)
    together, stats = _update("triton", ARENAS["narrow"], config)
    alone, own = _update("triton", ARENAS["narrow"], config, slice(1, 2))
    assert torch.equal(together.weight[1:2], alone.weight)
    assert torch.equal(torch.stack(stats)[:, 1:2], torch.stack(own))


def test_plan_tells_which_way_a_network_goes() -> None:
    with use_backend("triton"):
        for name, arena in ARENAS.items():
            reason = plan(arena, torch.device(DEVICE)).reason
            assert ("three launches a minibatch" in reason) == (name not in APART)
