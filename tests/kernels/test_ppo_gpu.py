"""PPO on Triton, in the interpreter: the fused loss against autograd, updates against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_tickets.kernels.activations import KNOWN
from sparse_tickets.kernels.arena import Arena, Parameters
from sparse_tickets.kernels.dispatch import use_backend
from sparse_tickets.kernels.mlp.reference import mlp
from sparse_tickets.kernels.ppo import Batch, PPOConfig, Stats, plan, ppo_update_, reference
from sparse_tickets.kernels.training import Update

pytest.importorskip("triton")

from sparse_tickets.kernels.ppo import gpu
from sparse_tickets.kernels.ppo.head_gpu import head
from sparse_tickets.kernels.training import fused_gpu
from sparse_tickets.kernels.training import gpu as training_gpu
from sparse_tickets.kernels.training.head_gpu import Minibatch
from sparse_tickets.kernels.training.loss_gpu import Outputs, loss_and_gradient
from sparse_tickets.kernels.update import gpu as update_gpu

pytestmark = pytest.mark.usefixtures("tensors_on_a_gpu")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = torch.finfo(torch.float32).eps


def _batch(tickets: int, samples: int, actions: int, continuous: bool) -> Batch:
    generator = torch.Generator(DEVICE).manual_seed(samples)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    action = torch.randint(0, actions, (tickets, samples), generator=generator)
    return Batch(
        normal(tickets, samples, 4),
        normal(tickets, samples, actions) if continuous else action,
        # Wide enough that ratios are clipped on both sides.
        normal(tickets, samples) - 1.5 * min(actions, 8),
        *(normal(tickets, samples) for _ in range(3)),
    )


def _float(batch: Batch) -> Batch:
    return Batch(*(f.float() if f.is_floating_point() else f for f in batch))


@pytest.mark.parametrize("continuous", [False, True], ids=["discrete", "continuous"])
@pytest.mark.parametrize(
    ("samples", "minibatch", "actions", "config"),
    [
        (12, 6, 3, PPOConfig()),
        (2, 2, 2, PPOConfig(entropy_coef=0.0)),
        (70, 35, 1, PPOConfig(clip_value=False, value_coef=2.0)),
        (300, 300, 5, PPOConfig(normalise_advantage=False, clip=0.05)),
    ],
)
def test_loss_and_gradient(monkeypatch, continuous, samples, minibatch, actions, config) -> None:
    tickets, first = 3, samples - minibatch
    arena = Arena.build((4, 8, actions), (4, 8, 1), continuous=continuous)
    generator = torch.Generator(DEVICE).manual_seed(0)
    weight = 0.5 * torch.randn(tickets, arena.size, generator=generator, dtype=torch.float64)
    batch = _batch(tickets, samples, actions, continuous)
    order = torch.stack([torch.randperm(samples, generator=generator) for _ in range(tickets)])
    index = order[:, first : first + minibatch]
    chosen = Batch(*(field[torch.arange(tickets)[:, None], index] for field in batch))
    output, value = (
        mlp(chosen.obs, weight, net, None).requires_grad_() for net in (arena.actor, arena.critic)
    )

    leaf = weight.clone().requires_grad_()
    heads = iter([output, value])
    monkeypatch.setattr(reference, "mlp", lambda *_: next(heads))
    total, expected = reference.loss(leaf, torch.ones(()), arena, chosen, config)
    leaves = [output, value, *([leaf] if continuous else [])]
    gradients = torch.autograd.grad(total.sum(), leaves)

    row = weight.float()
    by_row = torch.full_like(row, torch.nan)
    spread = slice(arena.log_std, None)
    written = torch.full_like(output, torch.nan).float(), torch.full_like(value, torch.nan).float()
    sums = torch.full((tickets, 5), torch.nan)
    outputs = Outputs(
        (output.detach().float(), value.detach().float()),
        row[:, spread] if continuous else None,
        written,
        by_row[:, spread] if continuous else None,
    )
    minibatch_of = Minibatch(order, first, minibatch, samples)
    loss_and_gradient(
        head(_float(batch), config, continuous=continuous), minibatch_of, sums, outputs
    )

    got = [*written, *([by_row[:, spread]] if continuous else [])]
    wanted = [*gradients[:2], *([gradients[2][:, spread]] if continuous else [])]
    for ours, theirs in zip(got, wanted, strict=True):
        scale = float(theirs.abs().max())
        # A few exponentials deep, and sums over the minibatch.
        torch.testing.assert_close(
            ours.double(), theirs, rtol=0, atol=64 * EPS * max(scale, 1e-3) * minibatch**0.5
        )
    torch.testing.assert_close(sums.double() / minibatch, expected.mT, rtol=1e-5, atol=1e-5)
    assert bool(by_row[:, : arena.size - (actions if continuous else 0)].isnan().all())


# The interpreter is NumPy, which warns of NaN.
@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_ticket_that_diverged_stays_nan_and_spares_the_others() -> None:
    batch = _float(_batch(2, 8, 3, continuous=False))
    output, value = torch.zeros(2, 8, 3), torch.zeros(2, 8, 1)
    output[0], value[0] = torch.nan, torch.nan
    gradient = torch.zeros(2, 8, 3), torch.zeros(2, 8, 1)
    order = torch.arange(8).expand(2, 8).contiguous()
    sums = torch.zeros(2, 5)
    loss = head(batch, PPOConfig(), continuous=False)
    outputs = Outputs((output, value), None, gradient, None)
    loss_and_gradient(loss, Minibatch(order, 0, 8, 8), sums, outputs)
    assert bool(gradient[0][0].isnan().all())
    assert bool(gradient[1][0].isnan().all())
    assert bool(gradient[0][1].isfinite().all())
    assert bool(sums[1].isfinite().all())


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("action", [-1, 3])
def test_an_action_that_is_none_makes_its_ticket_nan(action: int) -> None:
    """On a GPU nobody looks whether it is one: that has to be seen."""
    batch = _float(_batch(2, 8, 3, continuous=False))
    batch.action[0, 5] = action
    gradient = torch.zeros(2, 8, 3), torch.zeros(2, 8, 1)
    order, sums = torch.arange(8).expand(2, 8).contiguous(), torch.zeros(2, 5)
    loss = head(batch, PPOConfig(), continuous=False)
    outputs = Outputs((torch.zeros(2, 8, 3), torch.zeros(2, 8, 1)), None, gradient, None)
    loss_and_gradient(loss, Minibatch(order, 0, 8, 8), sums, outputs)
    assert bool(gradient[0][0, 5].isnan().all())
    assert bool(gradient[0][0, :5].isfinite().all())
    assert sums[:, 0].isnan().tolist() == [True, False]


def _parameters(arena: Arena, tickets: int, dtype: torch.dtype) -> Parameters:
    generator = torch.Generator(DEVICE).manual_seed(1)
    weight = 0.5 * torch.randn(tickets, arena.size, generator=generator)
    mask = torch.rand(tickets, arena.prunable, generator=generator) < 0.4
    # A unit without inputs, and a ticket without weights.
    mask[:, :4], mask[-1] = False, False
    weight[:, : arena.prunable] *= mask
    moments = torch.zeros(2, tickets, arena.size, dtype=dtype).unbind()
    return Parameters(weight.to(dtype), mask, *moments, torch.zeros(tickets, dtype=torch.int64))


def _update(
    backend: str, arena: Arena, batch: Batch, config: PPOConfig, iteration: int | torch.Tensor = 3
) -> tuple[Parameters, Stats]:
    tickets, dtype = len(batch.logp), batch.logp.dtype
    # Of three tickets, always the first ones.
    parameters = Parameters(*(rows[:tickets].clone() for rows in _parameters(arena, 3, dtype)))
    rate = torch.full((tickets,), 1e-2, dtype=dtype)
    with use_backend(backend):
        stats = ppo_update_(
            parameters, arena, batch, torch.arange(tickets), iteration, rate, config
        )
    return parameters, stats


def _update_like_the_reference(arena: Arena, batch: Batch, config: PPOConfig) -> Parameters:
    """What Triton made of an update, after it was found to agree with the reference."""
    ours, stats = _update("triton", arena, _float(batch), config)
    theirs, expected = _update("reference", arena, batch, config)
    for name in ("weight", "m", "v"):
        torch.testing.assert_close(
            getattr(ours, name).double(), getattr(theirs, name), rtol=1e-4, atol=1e-5
        )
    torch.testing.assert_close(
        torch.stack(stats).double(), torch.stack(expected), rtol=1e-4, atol=1e-5
    )
    return ours


ARENAS = {
    "discrete": Arena.build((4, 7, 6, 3), (4, 6, 1)),
    "continuous": Arena.build((4, 7, 6, 3), (4, 6, 1), continuous=True),
    "no hidden layer": Arena.build((4, 3), (4, 1), continuous=True),
    "relu": Arena.build((4, 31, 17, 3), (4, 32, 1), activation="relu"),
    "width 64": Arena.build((4, 40, 33, 3), (4, 35, 1)),
    "tiles are full": Arena.build((4, 64, 64, 16), (4, 64, 64, 1), continuous=True),
    "critic pruned": Arena.build((4, 8, 3), (4, 33, 9, 1), prune_critic=True),
    "wide": Arena.build((4, 7, 6, 3), (4, 70, 1)),
    "wide, continuous": Arena.build((4, 70, 3), (4, 6, 1), continuous=True),
    "deep": Arena.build((4, 40, 9, 9, 3), (4, 6, 1)),
    "many outputs": Arena.build((4, 8, 33), (4, 6, 1)),
    "elu": Arena.build((4, 31, 17, 3), (4, 32, 1), activation="elu"),
    "gelu": Arena.build((4, 31, 17, 3), (4, 32, 1), activation="gelu"),
    "wider relu": Arena.build((4, 40, 3), (4, 6, 1), activation="relu"),
}
SPLIT = ("wide", "wide, continuous", "deep", "gelu")
"""Those with launches of their own for each network and the loss."""


@pytest.mark.parametrize("name", ARENAS)
def test_updates_agree_with_the_reference(name) -> None:
    arena = ARENAS[name]
    assert fused_gpu.fits(arena.nets) == (name not in SPLIT)
    batch = _batch(3, 12, arena.actor.sizes[-1], arena.log_std is not None)
    config = PPOConfig(epochs=2, minibatches=2, eps=1e-3)
    ours = _update_like_the_reference(arena, batch, config)
    pruned = ~ours.mask
    for rows in (ours.weight, ours.m, ours.v):
        assert bool((rows[:, : arena.prunable][pruned] == 0).all())
    assert ours.step.tolist() == [4, 4, 4]


LENGTHS = [
    # Two stretches, the second of which ends within a tile.
    (71, PPOConfig(max_norm=None)),
    (130, PPOConfig(clip_value=False, value_coef=2.0)),
    # Two steps of the walk over the advantages.
    (515, PPOConfig(clip=0.05, entropy_coef=0.3)),
    (1, PPOConfig(normalise_advantage=False, max_norm=1e-3)),
]
# Each length once on each of the two roads, each kind of action once.
OFTEN = {("discrete", 515), ("continuous", 130), ("wide", 71), ("wide", 1), ("discrete", 1)}


@pytest.mark.parametrize(
    ("name", "minibatch", "config"),
    [
        pytest.param(name, *length, marks=[pytest.mark.slow] * ((name, length[0]) not in OFTEN))
        for name in ("discrete", "continuous", "wide")
        for length in LENGTHS
    ],
)
def test_any_length_and_configuration(monkeypatch, name, minibatch, config) -> None:
    _poison(monkeypatch)
    arena = ARENAS[name]
    config = replace(config, epochs=1, minibatches=2, eps=1e-3)
    batch = _batch(2, 2 * minibatch, 3, arena.log_std is not None)
    _update_like_the_reference(arena, batch, config)


def _poison(monkeypatch) -> None:
    """Memory that nothing was written to holds NaN."""
    empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def poisoned(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poisoned(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poisoned(empty_like(*a, **k)))


def test_both_ways_give_the_same(monkeypatch) -> None:
    arena, batch = ARENAS["continuous"], _float(_batch(3, 80, 3, continuous=True))
    config = PPOConfig(epochs=1, minibatches=1)
    fused, stats = _update("triton", arena, batch, config)
    monkeypatch.setattr(fused_gpu, "fits", lambda _: False)
    split, expected = _update("triton", arena, batch, config)
    torch.testing.assert_close(fused.m, split.m, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.stack(stats), torch.stack(expected), rtol=1e-5, atol=1e-6)


class _Ops(TorchDispatchMode):
    """What torch computes: its operators, but for those that only find memory."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__
        if not op.is_view and not name.startswith(("empty", "new_empty")):
            self.names.append(name)
        return op(*args, **(kwargs or {}))


def test_a_minibatch_of_narrow_networks_is_three_launches(monkeypatch) -> None:
    launched = []

    class Counted:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]):
            return lambda *_, **__: launched.append(self.name)

    kernels = {
        fused_gpu: ["gradient_kernel"],
        update_gpu: ["_norm_kernel", "_adam_kernel"],
        training_gpu: ["_statistics_kernel"],
    }
    for module, names in kernels.items():
        for name in names:
            monkeypatch.setattr(module, name, Counted(name))
    arena, batch = ARENAS["continuous"], _float(_batch(3, 300, 3, continuous=True))
    parameters = _parameters(arena, 3, torch.float32)
    rate, key = torch.full((3,), 1e-2), torch.arange(3)
    for minibatches in (1, 3):
        launched.clear()
        config = PPOConfig(epochs=2, minibatches=minibatches)
        with use_backend("triton"), _Ops() as ops:
            gpu.ppo_update_(Update(parameters, arena, key, 3, rate, config, 1.0), batch)
        each = ["gradient_kernel", "_norm_kernel", "_adam_kernel"]
        assert launched == 2 * minibatches * each + ["_statistics_kernel"]
        assert ops.names == 2 * ["random_permutation"]


@pytest.mark.long
@settings(deadline=None, max_examples=5, derandomize=True)
@given(
    hidden=st.lists(st.integers(1, 20), max_size=2),
    tickets=st.integers(0, 2),
    minibatch=st.integers(2, 20),
    continuous=st.booleans(),
    activation=st.sampled_from(KNOWN),
    prune_critic=st.booleans(),
)
def test_any_networks_and_minibatch(
    hidden, tickets, minibatch, continuous, activation, prune_critic
) -> None:
    critic = (4, *hidden, 1)
    kind = {"continuous": continuous, "activation": activation, "prune_critic": prune_critic}
    arena = Arena.build((4, *hidden, 3), critic, **kind)
    batch = _batch(tickets, 2 * minibatch, 3, continuous)
    config = PPOConfig(epochs=1, minibatches=2, eps=1e-3)
    _update_like_the_reference(arena, batch, config)


# The interpreter is NumPy, which warns of NaN.
@pytest.mark.long
@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("name", ["continuous", "wide"])
def test_a_ticket_does_not_depend_on_its_batch_mates(name) -> None:
    arena = ARENAS[name]
    batch = _float(_batch(3, 140, 3, arena.log_std is not None))
    # A mate that diverged.
    batch.logp[2] = torch.nan
    config = PPOConfig(epochs=1, minibatches=2)
    together, stats = _update("triton", arena, batch, config)
    alone, expected = _update("triton", arena, Batch(*(field[:1] for field in batch)), config)
    assert torch.equal(together.weight[:1], alone.weight)
    assert torch.equal(torch.stack(stats)[:, :1], torch.stack(expected))
    assert bool(together.weight[2].isnan().any())


def test_the_iteration_may_lie_on_the_device() -> None:
    arena = Arena.build((4, 8, 3), (4, 8, 1))
    batch = _float(_batch(2, 8, 3, continuous=False))
    config = PPOConfig(epochs=1, minibatches=2)
    counted, _ = _update("triton", arena, batch, config, iteration=5)
    read, _ = _update("triton", arena, batch, config, iteration=torch.tensor(5))
    assert torch.equal(counted.weight, read.weight)
    with pytest.raises(ValueError, match="iteration must have shape"):
        _update("triton", arena, batch, config, iteration=torch.tensor([5]))


@pytest.mark.skipif(DEVICE != "cpu", reason="tensors are on the GPU")
def test_the_iteration_is_an_integer_on_the_cpu() -> None:
    arena, batch = Arena.build((4, 8, 3), (4, 8, 1)), _float(_batch(2, 8, 3, continuous=False))
    with pytest.raises(TypeError, match="iteration must be an int on the CPU"):
        _update("cpu", arena, batch, PPOConfig(minibatches=2), iteration=torch.tensor(5))


def test_plan_tells() -> None:
    with use_backend("triton"):
        for name, arena in ARENAS.items():
            told = plan(arena, torch.device(DEVICE))
            assert told.backend == "triton"
            assert told.reason.startswith("three launches") == (name not in SPLIT)
