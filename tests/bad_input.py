"""Every op with tensors that are right, for tests to spoil."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_tickets.envs.classic import ClassicEnv
from sparse_tickets.kernels import dynamics, random
from sparse_tickets.kernels.arena import Arena, Parameters
from sparse_tickets.kernels.dispatch import has_triton, use_backend
from sparse_tickets.kernels.dqn import DQNConfig, dqn_update_
from sparse_tickets.kernels.imitation import CloneConfig, clone_update_
from sparse_tickets.kernels.linear import block_pattern, linear, linear_blocked
from sparse_tickets.kernels.mlp import mlp
from sparse_tickets.kernels.ppo import Batch, PPOConfig, ppo_update_
from sparse_tickets.kernels.prune import prune
from sparse_tickets.kernels.returns import gae
from sparse_tickets.kernels.rollout import demonstrate, evaluate, rollout
from sparse_tickets.kernels.sac import SACConfig, sac_update_
from sparse_tickets.kernels.transitions import Transitions
from sparse_tickets.kernels.update import adam_, rewind_

needs_triton = pytest.mark.skipif(not has_triton(), reason="triton is not installed")


BACKENDS = ["reference", "cpu", pytest.param("triton", marks=needs_triton)]


Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class OpCall:
    """How to call an op.

    Attributes:
        call: the op, on named tensors.
        make: the tensors of P tickets, B rows each, at a density.
        written: names of those it writes; of the others, it may write none.
        differentiable: whether autograd goes through it, any number of times.
    """

    call: Callable[..., Any]
    make: Callable[[int, int, float], Tensors]
    written: tuple[str, ...] = ()
    differentiable: bool = False


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def draw_mask(*shape: int, density: float) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) < density


def whole(high: int, *shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape) % high


ARENA = Arena.build((3, 2, 4))


POLICY = Arena.build((4, 3, 2), (4, 3, 1))


Q_NETWORK = Arena.build((4, 3, 2))


SOFT = Arena.build((4, 3, 2), (5, 3, 1), squashed=True)


PRUNABLE, TAIL = ARENA.prunable, ARENA.size - ARENA.prunable


def make_linear(tickets: int, batch: int, density: float, out: int = 4, inp: int = 5) -> Tensors:
    mask = draw_mask(tickets, out, inp, density=density)
    return {
        "x": draw(tickets, batch, inp),
        "weight": draw(tickets, out, inp) * mask,
        "mask": mask,
        "bias": draw(tickets, out),
    }


def make_blocked(tickets: int, batch: int, density: float) -> Tensors:
    tensors = make_linear(tickets, batch, density, 32, 16)
    mask = draw_mask(tickets, 2, 1, density=density).repeat_interleave(16, 1)
    tensors["mask"] = mask.repeat_interleave(16, 2)
    tensors["weight"] *= tensors["mask"]
    return tensors


def make_network(tickets: int, batch: int, density: float) -> Tensors:
    return {
        "x": draw(tickets, batch, 3),
        "weight": draw(tickets, ARENA.size),
        "mask": draw_mask(tickets, PRUNABLE, density=density),
    }


def make_rows(tickets: int, batch: int, density: float, size: int = 7) -> Tensors:
    rows = {name: draw(tickets, size, seed=i) for i, name in enumerate(("weight", "m", "v"))}
    rows["v"].abs_()
    rows["mask"] = draw_mask(tickets, 5, density=density)
    for name in ("weight", "m", "v"):
        rows[name][:, :5] *= rows["mask"]
    return rows


def make_optimiser(tickets: int, batch: int, density: float) -> Tensors:
    rates = {"lr": torch.full((tickets,), 1e-2), "grad": draw(tickets, 7, seed=9)}
    return make_rows(tickets, batch, density) | rates | {"step": whole(5, tickets)}


def make_rewind(tickets: int, batch: int, density: float) -> Tensors:
    names = ("initial", "initial_m", "initial_v")
    return make_rows(tickets, batch, density) | {name: draw(tickets, 7, seed=4) for name in names}


def make_prune(tickets: int, batch: int, density: float) -> Tensors:
    return {
        "scores": draw(tickets, 5),
        "mask": draw_mask(tickets, 5, density=density),
        "k": whole(4, tickets) + 1,
    }


def make_draw(tickets: int, batch: int, density: float) -> Tensors:
    return {"key": whole(9, tickets) * 7 - 3, "step": whole(3, tickets)}


def make_categorical(tickets: int, batch: int, density: float) -> Tensors:
    return {"probs": draw(tickets, batch, 3).softmax(-1), "u": draw(tickets, batch).sigmoid()}


def make_returns(tickets: int, batch: int, density: float) -> Tensors:
    shape = (tickets, batch, 4)
    floats = {
        name: draw(*shape, seed=i) for i, name in enumerate(("reward", "value", "next_value"))
    }
    ends = {name: draw_mask(*shape, density=0.3) for name in ("terminated", "truncated")}
    return floats | ends


def make_physics(tickets: int, batch: int, density: float) -> Tensors:
    return {"state": draw(tickets, batch, 4).double() * 0.1, "action": whole(2, tickets, batch)}


def make_policy(tickets: int, batch: int, density: float) -> Tensors:
    mask = draw_mask(tickets, POLICY.prunable, density=density)
    weight = draw(tickets, POLICY.size)
    weight[:, : POLICY.prunable] *= mask
    # One action mostly, so that episodes are short.
    POLICY.actor.bias(weight, 1)[:, 1] = 3.0
    return {"weight": weight, "mask": mask, "key": whole(9, tickets) * 7 - 3}


def make_actors(tickets: int, batch: int, density: float) -> Tensors:
    return make_policy(tickets, batch, density) | {
        "obs": draw(tickets, batch, 4) * 0.05,
        "state": draw(tickets, batch, 4).double() * 0.05,
        "elapsed": whole(7, tickets, batch).int(),
        "reset_key": whole(9, tickets) * 5 + 2,
    }


def make_training(tickets: int, batch: int, density: float) -> Tensors:
    tensors = make_policy(tickets, batch, density)
    for name in ("m", "v"):
        tensors[name] = tensors["weight"].abs() * 1e-3
    return tensors | {"step": whole(5, tickets), "lr": torch.full((tickets,), 1e-3)}


def make_ppo(tickets: int, batch: int, density: float) -> Tensors:
    names = ("logp", "value", "advantage", "target")
    return make_training(tickets, batch, density) | {
        "obs": draw(tickets, batch, 4),
        "action": whole(2, tickets, batch),
        **{name: draw(tickets, batch, seed=i) for i, name in enumerate(names)},
    }


def make_clone(tickets: int, batch: int, density: float) -> Tensors:
    return make_training(tickets, batch, density) | {
        "obs": draw(2, batch, 4),
        "target": draw(2, batch, 2).log_softmax(-1),
        "dataset": whole(2, tickets),
    }


def make_dqn(tickets: int, batch: int, density: float) -> Tensors:
    tensors = make_training(tickets, batch, density)
    for name in ("weight", "m", "v"):
        tensors[name] = tensors[name][:, : Q_NETWORK.size].contiguous()
    return tensors | {
        "target": 0.5 * tensors["weight"],
        "obs": draw(tickets, batch, 4),
        "action": whole(2, tickets, batch),
        "reward": draw(tickets, batch),
        "discount": draw(tickets, batch, seed=1).sigmoid(),
        "next_obs": draw(tickets, batch, 4, seed=2),
    }


def make_sac(tickets: int, batch: int, density: float) -> Tensors:
    mask = draw_mask(tickets, SOFT.prunable, density=density)
    weight = 0.3 * draw(tickets, SOFT.size)
    weight[:, : SOFT.prunable] *= mask
    tensors = make_dqn(tickets, batch, density) | {"weight": weight, "mask": mask}
    rows = {"m": weight.abs() * 1e-3, "v": weight.abs() * 1e-3, "target": 0.5 * weight}
    return tensors | rows | {"action": draw(tickets, batch, 1).tanh()}


def call_draw(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda key, step: op(key, 5, stream=1, step=step)


def environment(tickets: int, copies: int, device: torch.device) -> ClassicEnv:
    env = ClassicEnv("CartPole-v1", 1, 1, device)
    env.tickets, env.copies = tickets, copies
    return env


def parameters_of(weight: Tensor, mask: Tensor) -> Parameters:
    step = weight.new_zeros(weight.shape[0], dtype=torch.int64)
    return Parameters(weight, mask, weight, weight, step)


def call_acting(op: Callable[..., Any]) -> Callable[..., Any]:
    def call(weight: Tensor, mask: Tensor, obs: Tensor, key: Tensor, **start: Tensor) -> Any:
        env = environment(weight.shape[0], obs.shape[1], key.device)
        env.state, env.elapsed, env.key = (start[n] for n in ("state", "elapsed", "reset_key"))
        outcome = op(parameters_of(weight, mask), POLICY, env, obs, key, 1)
        return outcome, env.state, env.elapsed

    return call


def call_evaluate(weight: Tensor, mask: Tensor, key: Tensor) -> Tensor:
    env = environment(weight.shape[0], 1, key.device)
    return evaluate(parameters_of(weight, mask), POLICY, env, key, index=1, greedy=False)


def call_ppo_update_(obs: Tensor, key: Tensor, lr: Tensor, **tensors: Tensor) -> Any:
    parameters = Parameters(*(tensors.pop(name) for name in Parameters._fields))
    config = PPOConfig(epochs=1, minibatches=1, normalise_advantage=False)
    return ppo_update_(parameters, POLICY, Batch(obs=obs, **tensors), key, 3, lr, config)


def call_clone_update_(**tensors: Tensor) -> Tensor:
    parameters = Parameters(*(tensors.pop(name) for name in Parameters._fields))
    config = CloneConfig(updates=1, batch=3)
    return clone_update_(parameters, POLICY, first_update=2, config=config, **tensors)


def call_dqn_update_(
    target: Tensor, action: Tensor, key: Tensor, lr: Tensor, **tensors: Tensor
) -> Any:
    parameters = Parameters(*(tensors.pop(name) for name in Parameters._fields))
    replay, config = Transitions(action=action, **tensors), DQNConfig(1, 3, double=True)
    return dqn_update_(parameters, Q_NETWORK, target, replay, action.shape[-1], key, 2, lr, config)


def call_sac_update_(
    target: Tensor, reward: Tensor, key: Tensor, lr: Tensor, **tensors: Tensor
) -> Any:
    parameters = Parameters(*(tensors.pop(name) for name in Parameters._fields))
    replay, config = Transitions(reward=reward, **tensors), SACConfig(1, 3, -1.0)
    return sac_update_(parameters, SOFT, target, replay, reward.shape[-1], key, 2, lr, config)


TASK = dynamics.TASKS["CartPole-v1"]


CASES = {
    "linear": OpCall(linear, make_linear, differentiable=True),
    "linear_blocked": OpCall(
        lambda x, weight, mask, bias: linear_blocked(x, weight, block_pattern(mask, 16), bias),
        make_blocked,
        differentiable=True,
    ),
    "mlp": OpCall(
        lambda **tensors: mlp(net=ARENA.actor, **tensors), make_network, differentiable=True
    ),
    "prune": OpCall(prune, make_prune),
    "rewind_": OpCall(rewind_, make_rewind, ("weight", "m", "v")),
    "adam_": OpCall(adam_, make_optimiser, ("weight", "m", "v", "step")),
    **{
        op.__name__: OpCall(call_draw(op), make_draw)
        for op in (random.bits, random.uniform, random.normal, random.permutation)
    },
    "integers": OpCall(
        lambda key, step: random.integers(key, 5, 9, stream=1, step=step), make_draw
    ),
    "categorical": OpCall(random.categorical, make_categorical),
    "gae": OpCall(lambda **tensors: gae(**tensors, gamma=0.9, lam=0.8), make_returns),
    "initial": OpCall(
        lambda u: dynamics.initial(TASK, u), lambda *sizes: {"u": draw(*sizes[:2], 4).sigmoid()}
    ),
    "step": OpCall(lambda **tensors: dynamics.step(TASK, **tensors), make_physics),
    "observe": OpCall(
        lambda state: dynamics.observe(TASK, state),
        lambda *sizes: {"state": make_physics(*sizes)["state"]},
    ),
    "rollout": OpCall(call_acting(rollout), make_actors),
    "demonstrate": OpCall(call_acting(demonstrate), make_actors),
    "evaluate": OpCall(call_evaluate, make_policy),
    "ppo_update_": OpCall(call_ppo_update_, make_ppo, ("weight", "m", "v", "step")),
    "clone_update_": OpCall(call_clone_update_, make_clone, ("weight", "m", "v", "step")),
    "dqn_update_": OpCall(call_dqn_update_, make_dqn, ("weight", "m", "v", "step")),
    "sac_update_": OpCall(call_sac_update_, make_sac, ("weight", "m", "v", "step", "target")),
}


def on_device(backend: str, tensors: Tensors) -> Tensors:
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def flatten(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [] if result is None else [tensor for part in result for tensor in flatten(part)]


def run(case: OpCall, backend: str, tensors: Tensors) -> list[Tensor]:
    """What comes back, gradients by all that has some, and what was written; on the host."""
    floats = {n: t.detach() for n, t in tensors.items() if t.is_floating_point()}
    with use_backend(backend):
        if case.differentiable:
            leaves = [leaf.requires_grad_() for leaf in floats.values()]
            y = case.call(**(tensors | floats))
            # Of a sum: all strides of the result's gradient are 0.
            found = [y, *torch.autograd.grad(y.sum(), leaves)]
        else:
            found = flatten(case.call(**tensors))
    written = [tensors[n] for n in case.written]
    return [tensor.detach().cpu() for tensor in (*found, *written)]


def on_host(tensors: Tensors) -> Tensors:
    """Contiguous copies, where the reference runs: on a GPU its products are not deterministic."""
    return {
        name: tensor.cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def on_each_backend(test: Callable[..., None]) -> Any:
    return pytest.mark.parametrize("backend", BACKENDS)(test)


def of_each_op(test: Callable[..., None]) -> Any:
    return pytest.mark.parametrize("name", CASES)(test)


@contextmanager
def spoiling(argument: str) -> Iterator[None]:
    """Whatever fails here, fails with this argument."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"spoiled: {argument}")
        raise


def assert_refused(error: Exception, names: Iterable[str]) -> None:
    """A message says of an argument what it must be, or what it needs."""
    words = "|".join((*names, "pattern", "backend", "layers", "minibatches"))
    assert isinstance(error, ValueError | TypeError), repr(error)
    assert re.search(rf"\b({words})\b", str(error)), error
    assert re.search(r"\b(must|needs)\b", str(error)), error


def assert_right_or_refused(
    name: str, backend: str, spoiled: Tensors, sound: Tensors | None = None, tolerance: float = 1e-4
) -> None:
    """As the reference on ``sound`` copies; or an error, and nothing written."""
    case = CASES[name]
    sound = on_host(sound or spoiled)
    before = {n: spoiled[n].clone() for n in case.written}
    try:
        found = run(case, backend, spoiled)
    except (ValueError, TypeError) as error:
        assert_refused(error, sound)
        for n, tensor in before.items():
            if not torch.equal(tensor, spoiled[n]):
                pytest.fail(f"{n} was written in spite of: {error}")
        return
    expected = run(case, "reference", sound)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(
            one, other, rtol=tolerance, atol=tolerance, check_dtype=False, equal_nan=True
        )


OTHER_DTYPES = {
    torch.float32: (torch.float64, torch.float16, torch.int32, torch.complex64),
    torch.float64: (torch.float32, torch.int64),
    torch.int64: (torch.int32, torch.float32),
    torch.int32: (torch.int64, torch.float32),
    torch.bool: (torch.uint8, torch.float32),
}


def other_shapes(tensor: Tensor) -> Iterator[Tensor]:
    """One less or more on every axis, an axis less, an axis more."""
    for axis in range(tensor.dim()):
        yield tensor.narrow(axis, 0, tensor.shape[axis] - 1)
        yield torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis)
    yield tensor[0]
    yield tensor[None]
    yield tensor[..., None]


def columns_first(tensor: Tensor) -> Tensor:
    axes = tuple(reversed(range(tensor.dim())))
    return tensor.permute(axes).contiguous().permute(axes)
