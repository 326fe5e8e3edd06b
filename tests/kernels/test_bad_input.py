"""Every op on every backend against what it was not made for: a clear error or the right answer.

`CASES` says how to call each op on small tensors by name. The tests then spoil one tensor at a
time: its dtype, device, shape or strides, or whom it shares its memory with. A spoiled call must
raise a ValueError or TypeError that names an argument, and leave alone what it would have written;
or it must give what it gives on sound copies of the same numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_tickets.envs.classic import ClassicEnv
from sparse_tickets.kernels import dynamics, random
from sparse_tickets.kernels.arena import Arena, Parameters
from sparse_tickets.kernels.dispatch import has_triton, use_backend
from sparse_tickets.kernels.imitation import CloneConfig, clone_update_
from sparse_tickets.kernels.linear import block_pattern, linear, linear_blocked
from sparse_tickets.kernels.mlp import mlp, mlp_packed
from sparse_tickets.kernels.packed import (
    build_pattern,
    linear_packed,
    pack,
    unpack,
    write_gradient_,
)
from sparse_tickets.kernels.ppo import Batch, PPOConfig, ppo_update_
from sparse_tickets.kernels.prune import prune, prune_rewind_
from sparse_tickets.kernels.returns import discounted_returns, gae
from sparse_tickets.kernels.rollout import demonstrate, evaluate, rollout
from sparse_tickets.kernels.update import adam_, rewind_, sgd_

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
    """

    call: Callable[..., Any]
    make: Callable[[int, int, float], Tensors]
    written: tuple[str, ...] = ()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def draw_mask(*shape: int, density: float) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) < density


def whole(high: int, *shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape) % high


def differentiated(op: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """The op's result and its gradients by every float tensor, of a sum: strides of dy are 0."""

    def call(**tensors: Tensor) -> tuple[Tensor, ...]:
        floats = {k: t.detach() for k, t in tensors.items() if t.is_floating_point()}
        leaves = [leaf.requires_grad_() for leaf in floats.values()]
        y = op(**(tensors | floats))
        return (y, *torch.autograd.grad(y.sum(), leaves))

    return call


# Layers of a network of 2 x 3 and 4 x 2 weights, 14 prunable ones.

ARENA = Arena.build((3, 2, 4))
POLICY = Arena.build((4, 3, 2), (4, 3, 1))
LAYERS = ARENA.prunable_layers()
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


def make_packed(tickets: int, batch: int, density: float) -> Tensors:
    return {
        "values": draw(tickets, PRUNABLE),
        "mask": draw_mask(tickets, PRUNABLE, density=density),
    }


def make_gradient(tickets: int, batch: int, density: float) -> Tensors:
    return {
        "gradient": torch.zeros(tickets, PRUNABLE),
        "dy": draw(tickets, batch, 2),
        "x": draw(tickets, batch, 3),
        "mask": draw_mask(tickets, PRUNABLE, density=density),
        "squares": torch.zeros(tickets, 2),
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


def make_packed_optimiser(tickets: int, batch: int, density: float) -> Tensors:
    tensors = make_optimiser(tickets, batch, density)
    del tensors["mask"]
    tensors["count"] = torch.full((tickets,), int(7 * density))
    tensors["norm_partials"] = draw(tickets, 3).abs()
    return tensors


def make_sgd(tickets: int, batch: int, density: float) -> Tensors:
    tensors = make_optimiser(tickets, batch, density)
    del tensors["v"], tensors["step"]
    tensors["momentum_buffer"] = tensors.pop("m")
    return tensors


def make_rewind(tickets: int, batch: int, density: float) -> Tensors:
    names = ("initial", "initial_m", "initial_v")
    return make_rows(tickets, batch, density) | {name: draw(tickets, 7, seed=4) for name in names}


def make_prune(tickets: int, batch: int, density: float) -> Tensors:
    return {
        "scores": draw(tickets, 5),
        "mask": draw_mask(tickets, 5, density=density),
        "k": whole(4, tickets) + 1,
    }


def make_prune_rewind(tickets: int, batch: int, density: float) -> Tensors:
    return make_rewind(tickets, batch, density) | make_prune(tickets, batch, density)


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


def make_discounted(tickets: int, batch: int, density: float) -> Tensors:
    tensors = make_returns(tickets, batch, density)
    del tensors["value"]
    tensors["bootstrap"] = tensors.pop("next_value")
    return tensors


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


def call_write_gradient_(mask: Tensor, **tensors: Tensor) -> None:
    write_gradient_(pattern=build_pattern(mask, LAYERS, width=PRUNABLE), layer=0, **tensors)


def call_build_pattern(mask: Tensor) -> tuple[Tensor, ...]:
    pattern = build_pattern(mask, LAYERS)
    return pattern.bits, pattern.start, pattern.count


def call_packed(op: Callable[..., Tensor], **fixed: Any) -> Callable[..., Tensor]:
    def call(mask: Tensor, **tensors: Tensor) -> Tensor:
        return op(pattern=build_pattern(mask, LAYERS, width=PRUNABLE), **tensors, **fixed)

    return call


def call_draw(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda key, step: op(key, 5, stream=1, step=step)


def environment(tickets: int, copies: int, device: torch.device) -> ClassicEnv:
    env = ClassicEnv("CartPole-v1", 1, 1, device)
    env.tickets, env.copies = tickets, copies
    return env


def parameters_of(weight: Tensor, mask: Tensor) -> Parameters:
    return Parameters(weight, mask, weight, weight, torch.zeros(weight.shape[0]).long())


def call_acting(op: Callable[..., Any]) -> Callable[..., Any]:
    def call(weight: Tensor, mask: Tensor, obs: Tensor, key: Tensor, **start: Tensor) -> Any:
        env = environment(weight.shape[0], obs.shape[1], key.device)
        env.state, env.elapsed, env.key = (start[n] for n in ("state", "elapsed", "reset_key"))
        outcome = op(parameters_of(weight, mask), POLICY, env, obs, key, 2)
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


TASK = dynamics.TASKS["CartPole-v1"]

CASES = {
    "linear": Case(differentiated(linear), make_linear),
    "linear_blocked": Case(
        differentiated(
            lambda x, weight, mask, bias: linear_blocked(x, weight, block_pattern(mask, 16), bias)
        ),
        make_blocked,
    ),
    "linear_packed": Case(
        differentiated(call_packed(linear_packed, layer=0)),
        lambda *sizes: make_packed(*sizes) | {"x": draw(*sizes[:2], 3), "bias": draw(sizes[0], 2)},
    ),
    "pack": Case(
        differentiated(call_packed(pack)),
        lambda *sizes: {"dense": draw(sizes[0], ARENA.size), "mask": make_packed(*sizes)["mask"]},
    ),
    "unpack": Case(differentiated(call_packed(unpack)), make_packed),
    "build_pattern": Case(call_build_pattern, lambda *sizes: {"mask": make_packed(*sizes)["mask"]}),
    "write_gradient_": Case(call_write_gradient_, make_gradient, ("gradient", "squares")),
    "mlp": Case(differentiated(lambda **tensors: mlp(net=ARENA.actor, **tensors)), make_network),
    "mlp_packed": Case(
        differentiated(call_packed(mlp_packed, net=ARENA.actor)),
        lambda *sizes: (
            make_packed(*sizes) | {"x": draw(*sizes[:2], 3), "rest": draw(sizes[0], TAIL)}
        ),
    ),
    "prune": Case(prune, make_prune),
    "prune_rewind_": Case(prune_rewind_, make_prune_rewind, ("mask", "weight", "m", "v")),
    "rewind_": Case(rewind_, make_rewind, ("weight", "m", "v")),
    "adam_": Case(adam_, make_optimiser, ("weight", "m", "v", "step")),
    "adam_ packed": Case(
        lambda **tensors: adam_(mask=None, **tensors),
        make_packed_optimiser,
        ("weight", "m", "v", "step"),
    ),
    "sgd_": Case(sgd_, make_sgd, ("weight", "momentum_buffer")),
    **{
        op.__name__: Case(call_draw(op), make_draw)
        for op in (random.bits, random.uniform, random.normal, random.permutation)
    },
    "integers": Case(lambda key, step: random.integers(key, 5, 9, stream=1, step=step), make_draw),
    "categorical": Case(random.categorical, make_categorical),
    "gae": Case(lambda **tensors: gae(**tensors, gamma=0.9, lam=0.8), make_returns),
    "discounted_returns": Case(
        lambda **tensors: discounted_returns(**tensors, gamma=0.9), make_discounted
    ),
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
    """What comes back, and what was written."""
    with use_backend(backend):
        result = case.call(**tensors)
    return [tensor.detach() for tensor in (*flatten(result), *(tensors[n] for n in case.written))]


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
    sound = {
        n: t.clone(memory_format=torch.contiguous_format) for n, t in (sound or spoiled).items()
    }
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


def arguments_of(names: Any = CASES) -> list[Any]:
    return [
        pytest.param(name, argument, id=f"{name}-{argument}")
        for name in names
        for argument in CASES[name].make(1, 1, 0.5)
    ]


OTHER_DTYPES = {
    torch.float32: (torch.float64, torch.float16, torch.int32, torch.complex64),
    torch.float64: (torch.float32, torch.int64),
    torch.int64: (torch.int32, torch.float32),
    torch.int32: (torch.int64, torch.float32),
    torch.bool: (torch.uint8, torch.float32),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "argument"), arguments_of())
def test_other_dtypes(name: str, argument: str, backend: str) -> None:
    tensors = on_device(backend, CASES[name].make(2, 3, 0.6))
    for dtype in OTHER_DTYPES[tensors[argument].dtype]:
        copies = {n: t.clone() for n, t in tensors.items()}
        spoiled = copies | {argument: tensors[argument].to(dtype)}
        assert_right_or_refused(name, backend, spoiled, tensors, tolerance=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "argument"), arguments_of())
def test_another_device(name: str, argument: str, backend: str) -> None:
    tensors = on_device(backend, CASES[name].make(2, 3, 0.6))
    spoiled = tensors | {argument: tensors[argument].to("meta")}
    try:
        with use_backend(backend):
            result = CASES[name].call(**spoiled)
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "argument"), arguments_of())
def test_other_shapes(name: str, argument: str, backend: str) -> None:
    tensors = on_device(backend, CASES[name].make(2, 3, 0.6))
    for other in other_shapes(tensors[argument]):
        spoiled = {n: t.clone() for n, t in tensors.items()} | {argument: other.contiguous()}
        assert_right_or_refused(name, backend, spoiled)


def read_together(test: Callable[..., None]) -> Any:
    """An op's tensors to spoil: each that it writes by itself, and all that it reads together."""
    spoils = [
        pytest.param(name, spoiled, id=f"{name}-{'+'.join(spoiled)}")
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@read_together
def test_other_strides(
    name: str, spoiled: tuple[str, ...], layout: Callable[[Tensor], Tensor], backend: str
) -> None:
    tensors = on_device(backend, CASES[name].make(2, 3, 0.6))
    strided = {argument: layout(tensors[argument]) for argument in spoiled}
    if "mask" in strided:
        # What is updated in place has to be zero off the mask beforehand.
        for rows in (tensors[written] for written in CASES[name].written):
            if rows.dim() == 2 and rows.shape[1] >= strided["mask"].shape[1]:
                rows[:, : strided["mask"].shape[1]] *= strided["mask"]
    assert_right_or_refused(name, backend, tensors | strided)


def pairs_of() -> list[Any]:
    return [
        pytest.param(name, target, other, id=f"{name}-{target}-{other}")
        for name, case in CASES.items()
        for target in case.written
        for other, tensor in case.make(1, 1, 0.5).items()
        if other != target and tensor.dtype == case.make(1, 1, 0.5)[target].dtype
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "target", "other"), pairs_of())
def test_tensors_that_overlap(name: str, target: str, other: str, backend: str) -> None:
    """One that is written begins where another does, or in its middle."""
    tensors = on_device(backend, CASES[name].make(2, 3, 0.6))
    for begin in (0, tensors[target].numel() // 2):
        copies = {n: t.clone() for n, t in tensors.items()}
        length = tensors[other].numel()
        memory = torch.cat([copies[target].flatten(), tensors[other].flatten()])
        shared = {
            target: memory[: tensors[target].numel()].view_as(tensors[target]),
            other: memory[begin : begin + length].view_as(tensors[other]),
        }
        assert_right_or_refused(name, backend, copies | shared)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(0, 3, 0.6), (2, 0, 0.6), (0, 0, 0.6), (2, 3, 0.0), (1, 1, 1.0)])
@pytest.mark.parametrize("name", CASES)
def test_nothing_to_do(name: str, sizes: tuple[int, int, float], backend: str) -> None:
    """No tickets, no rows, masks with no ones; and one of each."""
    tensors = on_device(backend, CASES[name].make(*sizes))
    assert_right_or_refused(name, backend, tensors)
