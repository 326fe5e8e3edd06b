"""Every op on every backend against what it was not made for: a clear error or the right answer.

`CASES` says how to call each op on small tensors by name. The tests then spoil one tensor at a
time: its dtype, device, shape or strides, or whom it shares its memory with. A spoiled call must
raise a ValueError or TypeError that names an argument, and leave alone what it would have written;
or it must give what it gives on sound copies of the same numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

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
class Case:
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


# Layers of a network of 2 x 3 and 4 x 2 weights, 14 prunable ones.

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
    "linear": Case(linear, make_linear, differentiable=True),
    "linear_blocked": Case(
        lambda x, weight, mask, bias: linear_blocked(x, weight, block_pattern(mask, 16), bias),
        make_blocked,
        differentiable=True,
    ),
    "mlp": Case(
        lambda **tensors: mlp(net=ARENA.actor, **tensors), make_network, differentiable=True
    ),
    "prune": Case(prune, make_prune),
    "rewind_": Case(rewind_, make_rewind, ("weight", "m", "v")),
    "adam_": Case(adam_, make_optimiser, ("weight", "m", "v", "step")),
    **{
        op.__name__: Case(call_draw(op), make_draw)
        for op in (random.bits, random.uniform, random.normal, random.permutation)
    },
    "integers": Case(lambda key, step: random.integers(key, 5, 9, stream=1, step=step), make_draw),
    "categorical": Case(random.categorical, make_categorical),
    "gae": Case(lambda **tensors: gae(**tensors, gamma=0.9, lam=0.8), make_returns),
    "initial": Case(
        lambda u: dynamics.initial(TASK, u), lambda *sizes: {"u": draw(*sizes[:2], 4).sigmoid()}
    ),
    "step": Case(lambda **tensors: dynamics.step(TASK, **tensors), make_physics),
    "observe": Case(
        lambda state: dynamics.observe(TASK, state),
        lambda *sizes: {"state": make_physics(*sizes)["state"]},
    ),
    "rollout": Case(call_acting(rollout), make_actors),
    "demonstrate": Case(call_acting(demonstrate), make_actors),
    "evaluate": Case(call_evaluate, make_policy),
    "ppo_update_": Case(call_ppo_update_, make_ppo, ("weight", "m", "v", "step")),
    "clone_update_": Case(call_clone_update_, make_clone, ("weight", "m", "v", "step")),
    "dqn_update_": Case(call_dqn_update_, make_dqn, ("weight", "m", "v", "step")),
    "sac_update_": Case(call_sac_update_, make_sac, ("weight", "m", "v", "step", "target")),
}


@pytest.fixture(autouse=True)
def _one_thread_and_poisoned_memory() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def on_device(backend: str, tensors: Tensors) -> Tensors:
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def flatten(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [] if result is None else [tensor for part in result for tensor in flatten(part)]


def run(case: Case, backend: str, tensors: Tensors) -> list[Tensor]:
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


OTHER_DTYPES = {
    torch.float32: (torch.float64, torch.float16, torch.int32, torch.complex64),
    torch.float64: (torch.float32, torch.int64),
    torch.int64: (torch.int32, torch.float32),
    torch.int32: (torch.int64, torch.float32),
    torch.bool: (torch.uint8, torch.float32),
}


@on_each_backend
@of_each_op
def test_other_dtypes(name: str, backend: str) -> None:
    tensors = on_device(backend, CASES[name].make(2, 3, 0.6))
    for argument, tensor in tensors.items():
        for dtype in OTHER_DTYPES[tensor.dtype]:
            spoiled = {n: t.clone() for n, t in tensors.items()} | {argument: tensor.to(dtype)}
            with spoiling(argument):
                assert_right_or_refused(name, backend, spoiled, tensors, tolerance=1e-2)


@on_each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@of_each_op
def test_all_of_another_precision(name: str, dtype: torch.dtype, backend: str) -> None:
    tensors = on_device(backend, CASES[name].make(2, 3, 0.6))
    cast = {n: t.to(dtype) if t.dtype == torch.float32 else t for n, t in tensors.items()}
    assert_right_or_refused(name, backend, cast, tensors, tolerance=1e-2)


@on_each_backend
@of_each_op
def test_another_device(name: str, backend: str) -> None:
    tensors = on_device(backend, CASES[name].make(2, 3, 0.6))
    for argument, tensor in tensors.items():
        with spoiling(argument):
            try:
                with use_backend(backend):
                    result = CASES[name].call(**(tensors | {argument: tensor.to("meta")}))
            except (ValueError, TypeError) as error:
                assert_refused(error, tensors)
            else:
                # An op of one tensor is where that is.
                assert len(tensors) == 1
                assert all(tensor.is_meta for tensor in flatten(result))


def other_shapes(tensor: Tensor) -> Iterator[Tensor]:
    """One less or more on every axis, an axis less, an axis more."""
    for axis in range(tensor.dim()):
        yield tensor.narrow(axis, 0, tensor.shape[axis] - 1)
        yield torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis)
    yield tensor[0]
    yield tensor[None]
    yield tensor[..., None]


@on_each_backend
@of_each_op
def test_other_shapes(name: str, backend: str) -> None:
    tensors = on_device(backend, CASES[name].make(2, 3, 0.6))
    for argument, tensor in tensors.items():
        for other in other_shapes(tensor):
            spoiled = {n: t.clone() for n, t in tensors.items()} | {argument: other.contiguous()}
            with spoiling(f"{argument} {tuple(other.shape)}"):
                assert_right_or_refused(name, backend, spoiled)


def read_together(test: Callable[..., None]) -> Any:
    """An op's tensors to spoil: each that it writes by itself, and all that it reads together."""
    spoils = [
        pytest.param(
            name, spoiled, id=f"{name}-{spoiled[0] if spoiled[0] in case.written else 'read'}"
        )
        for name, case in CASES.items()
        for spoiled in (
            *((written,) for written in case.written),
            tuple(n for n in case.make(1, 1, 0.5) if n not in case.written),
        )
        if spoiled
    ]
    return pytest.mark.parametrize(("name", "spoiled"), spoils)(test)


def columns_first(tensor: Tensor) -> Tensor:
    axes = tuple(reversed(range(tensor.dim())))
    return tensor.permute(axes).contiguous().permute(axes)


def every_other(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, tensor], -1).flatten(-2)[..., ::2]


def in_longer_rows(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]]


def all_tickets_one(tensor: Tensor) -> Tensor:
    return tensor[:1].expand_as(tensor)


def all_columns_one(tensor: Tensor) -> Tensor:
    return tensor[..., :1].expand_as(tensor)


def rows_overlap(tensor: Tensor) -> Tensor:
    return tensor.contiguous().as_strided(tensor.shape, (1, *tensor.stride()[1:]))


LAYOUTS = [
    columns_first,
    every_other,
    in_longer_rows,
    all_tickets_one,
    all_columns_one,
    rows_overlap,
]


@on_each_backend
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@read_together
def test_other_strides(
    name: str, spoiled: tuple[str, ...], layout: Callable[[Tensor], Tensor], backend: str
) -> None:
    tensors = on_device(backend, CASES[name].make(2, 2, 0.6))
    strided = {argument: layout(tensors[argument]) for argument in spoiled}
    if "mask" in strided:
        # What is updated in place has to be zero off the mask beforehand.
        for rows in (tensors[written] for written in CASES[name].written):
            if rows.dim() == 2 and rows.shape[1] >= strided["mask"].shape[1]:
                rows[:, : strided["mask"].shape[1]] *= strided["mask"]
    assert_right_or_refused(name, backend, tensors | strided)


@on_each_backend
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.written])
def test_tensors_that_overlap(name: str, backend: str) -> None:
    """One that is written begins where another does, or in its middle."""
    tensors = on_device(backend, CASES[name].make(2, 3, 0.6))
    for target, other in product(CASES[name].written, tensors):
        one, two = tensors[target], tensors[other]
        if other == target or one.dtype != two.dtype:
            continue
        for begin in (0, one.numel() // 2):
            memory = torch.cat([one.flatten(), two.flatten()])
            shared = {
                target: memory[: one.numel()].view_as(one),
                other: memory[begin : begin + two.numel()].view_as(two),
            }
            spoiled = {n: t.clone() for n, t in tensors.items()} | shared
            with spoiling(f"{target} at {begin} {other}"):
                assert_right_or_refused(name, backend, spoiled)


@on_each_backend
@pytest.mark.parametrize("sizes", [(0, 3, 0.6), (2, 0, 0.6), (0, 0, 0.6), (2, 3, 0.0), (1, 1, 1.0)])
@of_each_op
def test_nothing_to_do(name: str, sizes: tuple[int, int, float], backend: str) -> None:
    """No tickets, no rows, masks with no ones; and one of each."""
    tensors = on_device(backend, CASES[name].make(*sizes))
    assert_right_or_refused(name, backend, tensors)


# What trains or acts is no op of torch's; tests/kernels/test_opcheck.py asks the same of those.
EAGER = ("rollout", "demonstrate", "evaluate", "ppo_update_", "clone_update_")


@on_each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EAGER)
def test_no_result_depends_on_a_default(name: str, dtype: torch.dtype, backend: str) -> None:
    case = CASES[name]
    tensors = on_device(backend, case.make(2, 3, 0.6))
    copies = {n: t.clone() for n, t in tensors.items()}
    expected = run(case, backend, tensors)
    torch.set_default_dtype(dtype)
    try:
        # Triton's interpreter makes tensors on the default device itself.
        with torch.device(copies["key"].device if backend == "triton" else "meta"):
            found = run(case, backend, copies)
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_a_compiler_leaves_training_alone() -> None:
    case = CASES["clone_update_"]
    tensors = case.make(2, 3, 0.6)
    copies = {n: t.clone() for n, t in tensors.items()}

    def train(**tensors: Tensor) -> Tensor:
        return 2 * case.call(**tensors)

    found = torch.compile(train, backend="eager")(**copies)
    assert torch.equal(found, train(**tensors))
    assert all(torch.equal(copies[n], tensors[n]) for n in case.written)


@on_each_backend
@pytest.mark.parametrize("k", [-1, 6, torch.tensor([1, -1]), torch.tensor([6, 0])], ids=str)
def test_counts_out_of_range(k: int | Tensor, backend: str) -> None:
    tensors = CASES["prune"].make(2, 3, 0.6) | {"k": k}
    tensors = on_device(backend, {n: torch.as_tensor(t) for n, t in tensors.items()})
    before = {n: tensors[n].clone() for n in CASES["prune"].written}
    count = tensors["k"] if isinstance(k, Tensor) else k
    with (
        use_backend(backend),
        pytest.raises(ValueError, match=r"k must be in \[0, 5\], got (6|-1)"),
    ):
        CASES["prune"].call(**(tensors | {"k": count}))
    assert all(torch.equal(tensor, tensors[n]) for n, tensor in before.items())


@on_each_backend
def test_nan_scores(backend: str) -> None:
    """Refused inside the mask, ignored off it."""
    tensors = on_device(backend, CASES["prune"].make(2, 3, 0.6))
    finite = {n: t.clone() for n, t in tensors.items()}
    tensors["scores"].masked_fill_(~tensors["mask"], torch.nan)
    inside = tensors["scores"].masked_fill(tensors["mask"], torch.nan)
    with use_backend(backend), pytest.raises(ValueError, match="scores must not be NaN inside"):
        CASES["prune"].call(**(tensors | {"scores": inside}))
    for one, other in zip(
        run(CASES["prune"], backend, tensors), run(CASES["prune"], backend, finite), strict=True
    ):
        assert torch.equal(one, other)


def acting(**numbers: Any) -> Any:
    tensors = make_actors(1, 1, 1.0)
    env = environment(1, 1, torch.device("cpu"))
    env.reset(tensors["key"])
    parameters = parameters_of(tensors["weight"], tensors["mask"])
    arguments = (parameters, POLICY, env, tensors["obs"], tensors["key"])
    return rollout(*arguments, **({"steps": 1} | numbers))


def judging(index: Any) -> Tensor:
    tensors = make_policy(1, 1, 1.0)
    parameters = parameters_of(tensors["weight"], tensors["mask"])
    env = environment(1, 1, torch.device("cpu"))
    return evaluate(parameters, POLICY, env, tensors["key"], index=index, greedy=True)


def training(iteration: Any) -> Any:
    tensors = make_ppo(1, 2, 1.0)
    parameters = Parameters(*(tensors.pop(name) for name in Parameters._fields))
    key, lr = tensors.pop("key"), tensors.pop("lr")
    return ppo_update_(parameters, POLICY, Batch(**tensors), key, iteration, lr, PPOConfig(1, 1))


def cloning(first_update: Any) -> Tensor:
    tensors = make_clone(1, 2, 1.0) | {"dataset": torch.tensor([0])}
    parameters = Parameters(*(tensors.pop(name) for name in Parameters._fields))
    config = CloneConfig(updates=1, batch=1)
    return clone_update_(parameters, POLICY, first_update=first_update, config=config, **tensors)


def valuing(**numbers: Any) -> Any:
    tensors = make_dqn(1, 2, 1.0)
    parameters = Parameters(*(tensors.pop(name) for name in Parameters._fields))
    target, key, lr = (tensors.pop(name) for name in ("target", "key", "lr"))
    counts = {"stored": 2, "first_update": 0} | numbers
    replay, config = Transitions(**tensors), DQNConfig(1, 1)
    return dqn_update_(
        parameters, Q_NETWORK, target, replay, key=key, lr=lr, config=config, **counts
    )


def optimising(**numbers: Any) -> Tensor:
    return adam_(**(make_optimiser(1, 1, 1.0) | numbers))


def estimating(**numbers: Any) -> Any:
    return gae(**make_returns(1, 2, 1.0), **({"gamma": 0.9, "lam": 0.9} | numbers))


def drawing(**numbers: Any) -> Tensor:
    return random.integers(
        torch.tensor([1]), **({"n": 2, "high": 3, "stream": 0, "step": 0} | numbers)
    )


NAN = float("nan")


@pytest.mark.parametrize(
    ("call", "name", "values"),
    [
        (acting, "steps", (0, -1, 2**31, 1.5, None)),
        (acting, "stream", (-1, 2**32, 1.5)),
        (acting, "density", (-0.1, 1.1, NAN)),
        (judging, "index", (-1, 2**43, 0.5)),
        (training, "iteration", (-1, 2**48, 0.5)),
        (cloning, "first_update", (-1, 2**62, 0.5)),
        (valuing, "first_update", (-1, 2**62, 0.5)),
        (valuing, "stored", (-1, 0, 3, 2**31 + 1, 1.5)),
        (optimising, "max_norm", (0.0, -1.0, NAN)),
        (optimising, "beta1", (-0.1, 1.0, NAN)),
        (optimising, "beta2", (-0.1, 1.0, NAN)),
        (optimising, "eps", (-1e-9, NAN)),
        (estimating, "gamma", (-0.1, 1.1, NAN)),
        (estimating, "lam", (-0.1, 1.1, NAN)),
        (drawing, "n", (-1, 2**31, 1.5)),
        (drawing, "high", (0, 2**31 + 1, 1.5)),
        (drawing, "step", (-1, 2**63, 1.5)),
        (PPOConfig, "max_norm", (0.0, -1.0, NAN)),
        (PPOConfig, "minibatches", (0,)),
        (PPOConfig, "clip", (0.0, NAN)),
        (lambda **numbers: CloneConfig(1, 1, **numbers), "max_norm", (0.0, -1.0, NAN)),
        (lambda **numbers: CloneConfig(1, 1, **numbers), "eps", (0.0, NAN)),
        (lambda **numbers: DQNConfig(1, 1, **numbers), "eps", (0.0, NAN)),
        (Arena.build, "actor", ((), (3,), (3, 0), (3, -1, 2), (3, 2.5))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_numbers_out_of_range(call: Callable[..., Any], name: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises((ValueError, TypeError), match=rf"^{name} must be .*got"):
            call(**{name: value})


# Transforms of torch's.


def jvp(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Any]:
    return lambda x: torch.func.jvp(function, (x,), (torch.ones_like(x),))


@on_each_backend
@of_each_op
def test_forward_mode(name: str, backend: str) -> None:
    """Refused, or right; only what is constant to autograd may lose a tangent."""
    case = CASES[name]
    tensors = on_device(backend, case.make(2, 3, 0.6))
    floats = [n for n, t in tensors.items() if t.is_floating_point()]
    gradients = (
        run(case, "reference", on_host(tensors))[1:]
        if case.differentiable
        else [None] * len(floats)
    )
    for argument, gradient in zip(floats, gradients, strict=True):
        with spoiling(argument), use_backend(backend), forward_ad.dual_level():
            tangent = torch.ones_like(tensors[argument])
            dual = {argument: forward_ad.make_dual(tensors[argument], tangent)}
            try:
                results = flatten(case.call(**(tensors | dual)))
            except NotImplementedError as error:
                assert "no forward-mode derivative" in str(error)  # noqa: PT017
                continue
            assert not case.written
            tangents = [forward_ad.unpack_dual(result).tangent for result in results]
            if gradient is None:
                assert tangents == [None] * len(results)
            else:
                assert backend == "reference"
                torch.testing.assert_close(tangents[0].sum(), gradient.sum())


@on_each_backend
@of_each_op
def test_vmap(name: str, backend: str) -> None:
    """More tickets, or refused."""
    case = CASES[name]
    tensors = on_device(backend, case.make(2, 3, 0.6))
    stacked = {n: torch.stack([t, t.flip(0)]) for n, t in tensors.items()}
    before = {n: t.clone() for n, t in stacked.items()}
    try:
        with use_backend(backend):
            found = torch.func.vmap(lambda batch: tuple(flatten(case.call(**batch))))(stacked)
    except RuntimeError as error:
        assert re.search("vmap|Batching rule not implemented", str(error)), error  # noqa: PT017
        for n, tensor in before.items():
            assert torch.equal(stacked[n], tensor)
        return
    assert not case.written
    for i in range(2):
        with use_backend("reference"):
            expected = flatten(case.call(**on_host({n: t[i] for n, t in before.items()})))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one[i].cpu(), other, rtol=1e-4, atol=1e-4)


@on_each_backend
@pytest.mark.parametrize("transform", [torch.func.grad, jvp], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.written])
def test_nothing_is_written_inside_transforms(
    name: str, transform: Callable[..., Any], backend: str
) -> None:
    case = CASES[name]
    tensors = on_device(backend, case.make(2, 3, 0.6))
    before = {n: t.clone() for n, t in tensors.items()}
    argument = next(n for n, t in tensors.items() if t.is_floating_point())

    def function(x: Tensor) -> Tensor:
        case.call(**(tensors | {argument: x}))
        return x.sum()

    with use_backend(backend), pytest.raises(RuntimeError, match=r"outside of torch\.func"):
        transform(function)(tensors[argument])
    assert all(torch.equal(tensors[n], tensor) for n, tensor in before.items())


@on_each_backend
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.written])
def test_autograd_hears_of_what_is_written(name: str, backend: str) -> None:
    tensors = on_device(backend, CASES[name].make(2, 3, 0.6))
    versions = {n: tensors[n]._version for n in CASES[name].written}
    run(CASES[name], backend, tensors)
    assert all(tensors[n]._version > version for n, version in versions.items())


@on_each_backend
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.differentiable])
def test_second_derivatives(name: str, backend: str) -> None:
    """Those of the reference in float64."""
    case = CASES[name]
    tensors = on_device(backend, case.make(2, 3, 0.6))
    exact = {n: t.double() if t.is_floating_point() else t for n, t in on_host(tensors).items()}

    def differentiate(backend: str, tensors: Tensors) -> list[Tensor]:
        floats = {n: t.clone() for n, t in tensors.items() if t.is_floating_point()}
        leaves = [leaf.requires_grad_() for leaf in floats.values()]
        with use_backend(backend):
            y = case.call(**(tensors | floats))
            first = torch.autograd.grad(y.tanh().sum(), leaves, create_graph=True)
            # Torch must find no way past the gradients: what it cannot reach, it leaves out.
            total = y.sum() + sum((gradient * gradient.detach().sin()).sum() for gradient in first)
            return list(torch.autograd.grad(total, leaves))

    found = differentiate(backend, tensors)
    for one, other in zip(found, differentiate("reference", exact), strict=True):
        torch.testing.assert_close(one.cpu().double(), other, rtol=1e-4, atol=1e-4)
