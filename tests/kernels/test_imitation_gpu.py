"""Cloning on Triton, in the interpreter: draws bit for bit, loss against autograd, updates."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_tickets.kernels import transitions
from sparse_tickets.kernels.activations import KNOWN
from sparse_tickets.kernels.arena import Arena, Parameters
from sparse_tickets.kernels.dispatch import use_backend
from sparse_tickets.kernels.imitation import CloneConfig, clone_update_, plan, reference
from sparse_tickets.kernels.random import Stream, integers
from sparse_tickets.kernels.training import Update
from sparse_tickets.kernels.transitions import draw

pytest.importorskip("triton")

from sparse_tickets.kernels.imitation import gpu
from sparse_tickets.kernels.imitation.head_gpu import head
from sparse_tickets.kernels.training import fused_gpu
from sparse_tickets.kernels.training.head_gpu import Minibatch
from sparse_tickets.kernels.training.loss_gpu import Outputs, loss_and_gradient

pytestmark = pytest.mark.usefixtures("tensors_on_a_gpu")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = torch.finfo(torch.float32).eps
DATASETS, SAMPLES = 2, 37


@pytest.fixture
def poisoned():
    """What is allocated and not written holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class ImitationProblem:
    """Tickets with moments, and what they learn from, in float64."""

    def __init__(self, arena: Arena, tickets: int, *, density: float = 0.4) -> None:
        generator = torch.Generator(DEVICE).manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            # Exact in float32, so that both precisions begin at the same numbers.
            return torch.randn(shape, generator=generator).double()

        self.arena = arena
        inputs, actions = arena.actor.sizes[0], arena.actions
        # Of three tickets, always the first ones; the last one has no weights.
        mask = torch.rand(3, arena.prunable, generator=generator) < density
        mask[2] = False
        rows = [0.5 * normal(3, arena.size), 0.1 * normal(3, arena.size)]
        rows.append(rows[1].square().float().double())
        for row in rows:
            row[:, : arena.prunable] *= mask
        weight, m, v = rows
        if arena.critic is not None:
            # Nobody may touch it, so it need not even be zero off the mask.
            for begin, end in reference.critic_spans(arena):
                weight[:, begin:end], m[:, begin:end], v[:, begin:end] = 3.0, 5.0, 7.0
        full = Parameters(weight, mask, m, v, torch.tensor([0, 4, 9]))
        self.parameters = Parameters(*(field[:tickets] for field in full))
        self.obs = normal(DATASETS, SAMPLES, inputs)
        if not arena.continuous:
            self.target = normal(DATASETS, SAMPLES, actions).log_softmax(-1).float().double()
        else:
            self.target = normal(DATASETS, SAMPLES, 2 * actions)
        self.dataset = torch.tensor([1, 0, 1])[:tickets]
        self.key = torch.tensor([5, -(2**62), 2**40 + 3])[:tickets]

    def update(
        self,
        backend: str,
        config: CloneConfig,
        first_update: int | torch.Tensor = 3,
        tickets: slice = slice(None),
    ) -> tuple[Parameters, torch.Tensor]:
        """Parameters after the updates, and the loss; in float64 on the reference backend."""
        dtype = torch.float64 if backend == "reference" else torch.float32

        def cast(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(dtype) if tensor.is_floating_point() else tensor

        parameters = Parameters(*(cast(field[tickets]).clone() for field in self.parameters))
        rate = torch.full((len(parameters.step),), 1e-2, dtype=dtype)
        data = cast(self.obs), cast(self.target), self.dataset[tickets], self.key[tickets]
        with use_backend(backend):
            stats = clone_update_(parameters, self.arena, *data, first_update, rate, config)
        return parameters, torch.stack(stats)

    def check(self, config: CloneConfig) -> None:
        """Triton gives what the reference gives, and leaves alone what is none of its business."""
        ours, loss = self.update("triton", config)
        theirs, expected = self.update("reference", config)
        for name in ("weight", "m", "v"):
            torch.testing.assert_close(
                getattr(ours, name).double(), getattr(theirs, name), rtol=1e-4, atol=1e-5
            )
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(ours.step, theirs.step)
        for name in ("weight", "m", "v"):
            row, before = getattr(ours, name), getattr(self.parameters, name).float()
            pruned = ~ours.mask
            for begin, end in reference.critic_spans(self.arena):
                assert torch.equal(row[:, begin:end], before[:, begin:end])
                pruned[:, begin:end] = False
            assert bool((row[:, : self.arena.prunable][pruned] == 0).all())


@pytest.mark.parametrize("on_device", [0, 2**32 - 2, 2**40])
def test_draws_of_many_updates_are_those_of_each(on_device: int) -> None:
    key = torch.tensor([-1, 2**62, 17])
    for first in (on_device, torch.tensor(on_device)):
        drawn = draw(SAMPLES, key, first, 2, 131).unflatten(1, (2, 131))
        for update in range(2):
            step = on_device + update
            index = integers(key, 131, SAMPLES, stream=Stream.MINIBATCH, step=step)
            assert torch.equal(drawn[:, update], index)


# The interpreter is NumPy, which warns of NaN.
@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("continuous", [False, True], ids=["discrete", "continuous"])
def test_a_ticket_without_a_dataset_is_nan_and_spares_the_others(continuous: bool) -> None:
    """On a GPU nobody looks whether it is one; nor may anybody read what is not theirs."""
    arena = Arena.build((4, 6, 3), continuous=continuous)
    problem, config = ImitationProblem(arena, 3), CloneConfig(updates=2, batch=5)
    alone, _ = problem.update("triton", config, tickets=slice(1, 2))
    parameters = Parameters(
        *(f.float() if f.is_floating_point() else f for f in problem.parameters)
    )
    numbers = torch.tensor([-1, 0, DATASETS])
    rate = torch.full((3,), 1e-2)
    update = Update(parameters, arena, problem.key, 3, rate, config, 1.0)
    stats = gpu.clone_update_(update, problem.obs.float(), problem.target.float(), numbers)
    for measured in stats:
        assert measured.isnan().tolist() == [True, False, True]
    trained = parameters.weight[:, arena.prunable :]
    assert bool(trained[::2].isnan().all())
    assert torch.equal(parameters.weight[1:2], alone.weight)


@pytest.mark.parametrize("continuous", [False, True], ids=["discrete", "continuous"])
@pytest.mark.parametrize(("batch", "actions"), [(6, 3), (1, 1), (35, 1), (300, 5)])
def test_loss_and_gradient(monkeypatch, continuous: bool, batch: int, actions: int) -> None:
    tickets = 3
    arena = Arena.build((4, 8, actions), continuous=continuous)
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).double()

    weight = 0.5 * normal(tickets, arena.size)
    output = normal(tickets, batch, actions)
    # Neither normalised, nor an action that is taken always or never.
    target = normal(DATASETS, SAMPLES, actions * (1 + continuous))
    if not continuous:
        target[:, ::3, 0], target[:, 1::3, -1] = -torch.inf, -100.0
    rows = torch.randint(0, DATASETS * SAMPLES, (tickets, batch), generator=generator)

    leaf, given = weight.clone().requires_grad_(), output.clone().requires_grad_()
    monkeypatch.setattr(reference, "mlp", lambda *_: given)
    total = reference.loss(leaf, torch.ones(()), arena, given, target.flatten(0, 1)[rows])
    leaves = [given, *([leaf] if continuous else [])]
    expected = torch.autograd.grad(total.sum(), leaves)

    row, by_row = weight.float(), torch.full_like(weight, torch.nan).float()
    by_output = torch.full_like(output, torch.nan).float()
    sums = torch.full((tickets, 1), torch.nan)
    spread = slice(arena.log_std, None)
    outputs = Outputs(
        (output.float(),),
        row[:, spread] if continuous else None,
        (by_output,),
        by_row[:, spread] if continuous else None,
    )
    clone = head(target.float(), continuous=continuous)
    loss_and_gradient(clone, Minibatch(rows, 0, batch, 0), sums, outputs)
    # A few exponentials deep, and sums over the minibatch.
    for ours, theirs in zip(
        [by_output, by_row[:, spread]] if continuous else [by_output],
        [expected[0], expected[1][:, spread]] if continuous else expected,
        strict=True,
    ):
        scale = max(float(theirs.abs().max()), 1e-3)
        torch.testing.assert_close(
            ours.double(), theirs, rtol=0, atol=64 * EPS * scale * batch**0.5
        )
    torch.testing.assert_close(sums[:, 0].double() / batch, total.detach(), rtol=1e-5, atol=1e-5)
    assert bool(by_row[:, : arena.size - (actions if continuous else 0)].isnan().all())


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("continuous", [False, True], ids=["discrete", "continuous"])
def test_a_ticket_that_diverged_stays_nan_and_spares_the_others(continuous: bool) -> None:
    output, target = torch.zeros(2, 8, 3), torch.zeros(1, 8, 3 * (1 + continuous))
    output[0] = torch.nan
    rows = torch.arange(8).expand(2, 8).contiguous()
    spread = torch.zeros(2, 3) if continuous else None
    gradient = torch.zeros(2, 8, 3), torch.zeros(2, 3) if continuous else None
    sums = torch.zeros(2, 1)
    outputs = Outputs((output,), spread, (gradient[0],), gradient[1])
    clone = head(target, continuous=continuous)
    loss_and_gradient(clone, Minibatch(rows, 0, 8, 0), sums, outputs)
    assert sums[:, 0].isnan().tolist() == [True, False]
    assert bool(gradient[0][0].isnan().all())
    assert bool(gradient[0][1].isfinite().all())


ARENAS = {
    "discrete": Arena.build((5, 9, 7, 3)),
    "continuous": Arena.build((5, 9, 7, 3), continuous=True, activation="relu"),
    "critic": Arena.build((5, 9, 3), (5, 6, 1)),
    "continuous_critic": Arena.build((5, 9, 3), (5, 6, 1), continuous=True),
    "pruned_critic": Arena.build((5, 9, 3), (5, 6, 1), prune_critic=True, continuous=True),
    "split": Arena.build((3, 70, 2)),
    "split_continuous": Arena.build((3, 70, 2), continuous=True),
    "squashed": Arena.build((3, 7, 4), (5, 6, 1), squashed=True),
    "one_action": Arena.build((1, 1), (1, 1)),
}


@pytest.mark.parametrize("name", ARENAS)
def test_updates_agree_with_the_reference(name: str, poisoned: None) -> None:
    assert fused_gpu.fits((ARENAS[name].actor,)) == (not name.startswith("split"))
    ImitationProblem(ARENAS[name], 3).check(CloneConfig(updates=3, batch=11, eps=1e-3))


@pytest.mark.parametrize("batch", [1, 133])
def test_minibatches_of_one_and_of_several_programs(batch: int, poisoned: None) -> None:
    ImitationProblem(ARENAS["critic"], 2).check(
        CloneConfig(updates=1, batch=batch, max_norm=None, eps=1e-3)
    )


def test_many_updates_are_drawn_in_parts(monkeypatch) -> None:
    problem, config = ImitationProblem(ARENAS["discrete"], 2), CloneConfig(updates=5, batch=6)
    at_once, loss = problem.update("triton", config)
    monkeypatch.setattr(transitions, "MOST_SAMPLES", 13)
    in_parts, same_loss = problem.update("triton", config)
    assert torch.equal(at_once.weight, in_parts.weight)
    assert torch.equal(loss, same_loss)


@settings(deadline=None, max_examples=6, derandomize=True)
@given(
    hidden=st.lists(st.integers(1, 20), max_size=2),
    ends=st.tuples(st.integers(1, 20), st.integers(1, 5)),
    tickets=st.integers(0, 2),
    batch=st.integers(1, 20),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    continuous=st.booleans(),
    critic=st.booleans(),
    activation=st.sampled_from(KNOWN),
)
def test_any_network_and_minibatch(
    hidden, ends, tickets, batch, density, continuous, critic, activation
) -> None:
    arena = Arena.build(
        (ends[0], *hidden, ends[1]),
        (ends[0], 3, 1) if critic else None,
        continuous=continuous,
        activation=activation,
        prune_critic=critic and density < 1,
    )
    config = CloneConfig(updates=2, batch=batch, eps=1e-3)
    ImitationProblem(arena, tickets, density=density).check(config)


def test_a_ticket_does_not_depend_on_its_batch_mates() -> None:
    problem, config = ImitationProblem(ARENAS["critic"], 3), CloneConfig(updates=2, batch=9)
    together, losses = problem.update("triton", config)
    alone, loss = problem.update("triton", config, tickets=slice(1, 2))
    assert torch.equal(together.weight[1:2], alone.weight)
    assert torch.equal(losses[:, 1:2], loss)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_the_number_of_updates_may_lie_on_the_device(backend: str) -> None:
    problem, config = ImitationProblem(ARENAS["discrete"], 2), CloneConfig(updates=2, batch=5)
    counted, _ = problem.update(backend, config, first_update=2**33)
    read, _ = problem.update(backend, config, first_update=torch.tensor(2**33))
    assert torch.equal(counted.weight, read.weight)
    with pytest.raises(ValueError, match="first_update must have shape"):
        problem.update(backend, config, first_update=torch.tensor([5]))
    with pytest.raises(TypeError, match="first_update must be int64"):
        problem.update(backend, config, first_update=torch.tensor(5.0))


@pytest.mark.skipif(DEVICE != "cpu", reason="tensors are on the GPU")
def test_the_number_of_updates_is_an_integer_on_the_cpu() -> None:
    problem, config = ImitationProblem(ARENAS["discrete"], 2), CloneConfig(updates=2, batch=5)
    with pytest.raises(TypeError, match="first_update must be an int on the CPU"):
        problem.update("cpu", config, first_update=torch.tensor(5))


def test_plan_tells() -> None:
    with use_backend("triton"):
        assert plan(ARENAS["discrete"], torch.device(DEVICE)).backend == "triton"
