"""Whatever a GPU's file of launches says, ops launch it and give what the reference gives.

Every launch that an op says it can take is put in force, in the interpreter or on a GPU; what the
kernel is launched with is recorded, and the result compared with plain torch in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_tickets.envs.classic import ClassicEnv
from sparse_tickets.kernels import tuning
from sparse_tickets.kernels.arena import Arena, Parameters
from sparse_tickets.kernels.dispatch import use_backend
from sparse_tickets.kernels.imitation import CloneConfig, clone_update_
from sparse_tickets.kernels.mlp import mlp
from sparse_tickets.kernels.ppo import Batch, PPOConfig, ppo_update_
from sparse_tickets.kernels.prune import prune
from sparse_tickets.kernels.rollout import rollout
from sparse_tickets.kernels.update import adam_

pytest.importorskip("triton")

from sparse_tickets.kernels.mlp import fused_gpu, split_gpu
from sparse_tickets.kernels.prune import gpu as prune_gpu
from sparse_tickets.kernels.rollout import gpu as rollout_gpu
from sparse_tickets.kernels.rollout import policy_gpu
from sparse_tickets.kernels.training import fused_gpu as step_gpu
from sparse_tickets.kernels.training import loss_gpu
from sparse_tickets.kernels.update import gpu as update_gpu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Sums of at most a few hundred float32 products, through at most three layers: 32 roundings.
TOLERANCE = 32 * torch.finfo(torch.float32).eps


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _population(sizes: tuple[int, ...]) -> tuple[Arena, Tensor, Tensor]:
    """Two tickets' weights, zero off their masks."""
    arena = Arena.build(sizes, (sizes[0], 5, 1))
    weight = 0.3 * torch.randn(2, arena.size, generator=_generator())
    mask = torch.rand(2, arena.prunable, generator=_generator()) < 0.5
    weight[:, : arena.prunable].masked_fill_(~mask, 0)
    return arena, weight.to(DEVICE), mask.to(DEVICE)


def _network(sizes: tuple[int, ...], samples: int) -> Callable:
    arena, weight, mask = _population(sizes)
    x = torch.randn(2, samples, sizes[0], generator=_generator()).to(DEVICE)
    dy = torch.randn(2, samples, sizes[-1], generator=_generator()).to(DEVICE)

    def run(dtype: torch.dtype) -> list[Tensor]:
        leaf = weight.to(dtype).requires_grad_()
        inputs = x.to(dtype)
        y = mlp(inputs, leaf, arena.actor, mask)
        return [y.detach(), *torch.autograd.grad(y, leaf, dy.to(dtype))]

    return run


def _parameters(arena: Arena, weight: Tensor, mask: Tensor, dtype: torch.dtype) -> Parameters:
    zeros = torch.zeros_like(weight, dtype=dtype)
    step = torch.zeros(len(weight), dtype=torch.int64, device=DEVICE)
    return Parameters(weight.to(dtype), mask, zeros, zeros.clone(), step)


def _rollout(dtype: torch.dtype) -> list[Tensor]:
    arena, weight, mask = _population((4, 9, 2))
    env = ClassicEnv("CartPole-v1", 2, 1, DEVICE)
    key = torch.arange(2, device=DEVICE)
    obs = env.reset(key)
    parameters = _parameters(arena, weight, mask, torch.float32)
    outcome, last = rollout(parameters, arena, env, obs, key, 9)
    return [*(field.to(dtype) for field in outcome), last.to(dtype)]


def _ppo(dtype: torch.dtype, hidden: int = 9, samples: int = 40) -> list[Tensor]:
    arena, weight, mask = _population((4, hidden, 2))
    parameters = _parameters(arena, weight.clone(), mask, dtype)
    action = torch.randint(0, 2, (2, samples), generator=_generator())
    fields = (torch.randn(2, samples, generator=_generator()) - 1 for _ in range(4))
    obs = torch.randn(2, samples, 4, generator=_generator())
    floats = [field.to(DEVICE, dtype) for field in (obs, *fields)]
    batch = Batch(floats[0], action.to(DEVICE), *floats[1:])
    rate = torch.full((2,), 1e-3, dtype=dtype, device=DEVICE)
    key = torch.arange(2, device=DEVICE)
    stats = ppo_update_(parameters, arena, batch, key, 0, rate, PPOConfig(epochs=1, minibatches=1))
    return [parameters.m, parameters.v, *stats]


def _clone(dtype: torch.dtype, hidden: int = 9) -> list[Tensor]:
    arena, weight, mask = _population((4, hidden, 2))
    parameters = _parameters(arena, weight.clone(), mask, dtype)
    obs = torch.randn(1, 50, 4, generator=_generator()).to(DEVICE, dtype)
    target = torch.randn(1, 50, 2, generator=_generator()).log_softmax(-1).to(DEVICE, dtype)
    rate = torch.full((2,), 1e-3, dtype=dtype, device=DEVICE)
    key = torch.arange(2, device=DEVICE)
    config = CloneConfig(updates=1, batch=40)
    stats = clone_update_(parameters, arena, obs, target, key * 0, key, 0, rate, config)
    return [parameters.m, parameters.v, *stats]


def _adam(dtype: torch.dtype) -> list[Tensor]:
    generator = _generator()
    mask = torch.rand(2, 2500, generator=generator) < 0.5
    weight, grad, m = (torch.randn(2, 2600, generator=generator) for _ in range(3))
    weight[:, :2500].masked_fill_(~mask, 0)
    m[:, :2500].masked_fill_(~mask, 0)
    rows = [t.to(DEVICE, dtype) for t in (weight, grad, m, m.square())]
    step = torch.tensor([0, 5], device=DEVICE)
    rate = torch.tensor([1e-3, 1e-2], dtype=dtype, device=DEVICE)
    norm = adam_(*rows, step, rate, mask.to(DEVICE))
    return [rows[0], rows[2], rows[3], norm]


def _prune(prunable: int) -> Callable:
    def run(dtype: torch.dtype) -> list[Tensor]:
        scores = torch.randn(2, prunable, generator=_generator()).round(decimals=1).to(DEVICE)
        mask = (torch.rand(2, prunable, generator=_generator()) < 0.8).to(DEVICE)
        k = torch.tensor([prunable // 3, 40], device=DEVICE)
        return [prune(scores, mask, k).to(dtype)]

    return run


# The name of a question, the module and kernel it is about, and what asks it.
CASES: dict[str, tuple[Any, str, Callable]] = {
    "mlp.fused_forward": (fused_gpu, "forward_kernel", _network((3, 17, 9, 2), 37)),
    "mlp.fused_backward": (fused_gpu, "backward_kernel", _network((3, 17, 9, 2), 37)),
    "mlp.stretch": (fused_gpu, "backward_kernel", _network((3, 9, 2), 100)),
    "mlp.forward": (split_gpu, "forward_kernel", _network((3, 70, 2), 37)),
    "mlp.deltas": (split_gpu, "delta_kernel", _network((3, 70, 2), 37)),
    "mlp.gradient": (split_gpu, "gradient_kernel", _network((3, 130, 2), 37)),
    "rollout.act": (rollout_gpu, "_act_kernel", _rollout),
    "rollout.judge": (policy_gpu, "_judge_kernel", _rollout),
    "ppo.gradient": (step_gpu, "gradient_kernel", _ppo),
    "ppo.stretch": (step_gpu, "gradient_kernel", partial(_ppo, samples=100)),
    "ppo.loss": (loss_gpu, "loss_kernel", partial(_ppo, hidden=70)),
    "imitation.gradient": (step_gpu, "gradient_kernel", _clone),
    "imitation.loss": (loss_gpu, "loss_kernel", partial(_clone, hidden=70)),
    "update.norm": (update_gpu, "_norm_kernel", _adam),
    "update.adam": (update_gpu, "_adam_kernel", _adam),
    "prune": (prune_gpu, "_select_kernel", _prune(8192 + 77)),
}  # fmt: skip


class Recorder:
    """A kernel that remembers what it was launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launched = kernel, []

    def __getitem__(self, grid: Any) -> Callable:
        def launch(*arguments: Any, **options: Any) -> None:
            self.launched.append((arguments, options))
            self.kernel[grid](*arguments, **options)

        return launch


@cache
def _ask(op: str, run: Callable) -> tuning.Question:
    with use_backend("triton"), tuning.listen() as heard:
        run(torch.float32)
    # A critic may ask the same of its own shape.
    return next(question for question in heard if question.op == op)


@pytest.mark.parametrize("op", CASES)
def test_what_is_preferred_is_launched_and_right(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name, run = CASES[op]
    question = _ask(op, run)
    with use_backend("reference"):
        expected = run(torch.float64)
    assert len(question.among) > 1
    assert question.among[0] == question.default
    for launch in question.among:
        recorder = Recorder(getattr(module, name))
        monkeypatch.setattr(module, name, recorder)
        with (
            tuning.override(op, question.shapes, launch.numbers),
            use_backend("triton"),
        ):
            actual = run(torch.float32)
        monkeypatch.undo()
        _assert_launched(recorder.launched, launch)
        for one, other in zip(actual, expected, strict=True):
            scale = max(other.abs().max().item(), 1e-3)
            torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=TOLERANCE * scale)


def _assert_launched(launched: list, launch: Any) -> None:
    """Some launch has every number of this one, under the name that its kernel gives it."""
    fields = launch.numbers
    if set(fields) == {"samples"}:  # How the samples are cut, an argument and the grid.
        stretch = -(-100 // -(-100 // fields["samples"]) // 32) * 32
        integers = [[a for a in arguments if isinstance(a, int)] for arguments, _ in launched]
        assert any(stretch in row for row in integers)
        return
    names = {"warps": "num_warps", "stages": "num_stages"}
    found = []
    for _, options in launched:
        if "SIDES" in options:
            options = options | dict.fromkeys(("TILE", "COLS"), max(options["SIDES"]))
        found.append(
            all(options[names.get(name, name.upper())] == value for name, value in fields.items())
        )
    assert any(found)


def test_a_launch_the_op_does_not_know_is_refused() -> None:
    _, _, run = CASES["update.adam"]
    question = _ask("update.adam", run)
    with (
        tuning.override("update.adam", question.shapes, {"block": 64, "warps": 4}),
        use_backend("triton"),
        pytest.raises(ValueError, match=r"configuration of 'update.adam' .* must be one of"),
    ):
        run(torch.float32)


@pytest.mark.parametrize("op", CASES)
def test_no_question_depends_on_the_number_of_tickets_or_of_nonzeros(op: str) -> None:
    shapes = _ask(op, CASES[op][2]).shapes
    names = {part.partition("=")[0] for part in shapes.split()}
    assert not names & {"tickets", "copies", "steps", "nonzeros", "count", "kept"}
